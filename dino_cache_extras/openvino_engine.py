"""engine: openvino: the same model on a CPU, computed by OpenVINO instead of torch.

The model is torch's, at its input size and in fp32 (dino_cache.build_model, set_input_size), turned into OpenVINO's
graph once. The graph is kept in $XDG_CACHE_HOME/dino_cache/openvino (~/.cache where that is not set), which may be
deleted at any time, and is used only where its bytes have their digest and one frame has torch's features.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import queue
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import openvino

from dino_cache import LOG, CacheSpec, DinoEncoder, Encoder, is_out_of_memory, one_line, token_layers, versions_of
from progress_utils import RefusedError

if TYPE_CHECKING:
    import torch

PRECISION_HINTS = {"fp32": "f32", "bf16": "bf16"}
GRAPH_FILE, DATA_FILE, DIGEST_FILE = "model.xml", "model.bin", "digest"
READ_BLOCK_BYTES = 1 << 24
STAGING_PREFIX, LEFTOVER_AGE_S = ".new-", 86_400
# Mean over tokens of 1 - cosine to torch in fp32, of one frame of noise: many times what rounding makes, and far below
# what a damaged graph would.
MOST_DEVIATION = {"fp32": 1e-5, "bf16": 1e-2}


def check(spec: CacheSpec) -> None:
    """Raise RefusedError unless OpenVINO can encode in the spec's precision on this machine."""
    try:
        abilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    except RuntimeError as error:
        raise RefusedError(
            f"engine: openvino {openvino.__version__} cannot use this CPU: {one_line(error)}. Set engine: torch"
        ) from error
    if spec.precision == "bf16" and "BF16" not in abilities:
        raise RefusedError(
            "precision: bf16 by engine: openvino needs a CPU with bf16 instructions, and this one has none. Ways on: "
            "precision: fp32, or engine: torch (a changed configuration, for the trajectories still to do)"
        )


def load(model: torch.nn.Module, spec: CacheSpec, weights_digest: str) -> Encoder:
    """An encoder of this model, whose weights have that digest.

    Raises:
        RefusedError: OpenVINO cannot convert the model, or does not compute what torch does.
    """
    return OpenVinoEncoder(model, spec, weights_digest)


class OpenVinoEncoder(DinoEncoder):
    """As DinoEncoder on a CPU: every core encodes rows of its own. It takes one at a time, which is as fast here as
    four, and makes a frame's features the same bytes whatever it is batched with."""

    def __init__(self, model: torch.nn.Module, spec: CacheSpec, weights_digest: str):
        self._weights_digest = weights_digest
        super().__init__(model, spec, "cpu")

    def _features_of(self, model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        kept = kept_folder(self._spec, self._weights_digest)
        graph = read_kept(kept)
        if graph is not None:
            compute = self._compiled(graph)
            deviation = self._deviation(compute, model)
            if deviation <= MOST_DEVIATION[self._spec.precision]:
                return compute
            LOG.warning("%s: its features are not torch's (1 - cosine %.1e): converting anew", kept, deviation)
        graph = convert(model, self._spec)
        keep(graph, kept)
        compute = self._compiled(graph)
        deviation = self._deviation(compute, model)
        if not deviation <= MOST_DEVIATION[self._spec.precision]:
            raise RefusedError(
                f"engine: openvino {openvino.__version__} does not compute what torch does on this machine: 1 - cosine "
                f"is {deviation:.1e} for {self._spec.dino_model_type} in {self._spec.precision}. Set engine: torch"
            )
        return compute

    def _compiled(self, graph: openvino.Model) -> Callable[[torch.Tensor], torch.Tensor]:
        hint = PRECISION_HINTS[self._spec.precision]
        settings = {
            "INFERENCE_PRECISION_HINT": hint,  # without it OpenVINO takes the fastest that the CPU has
            "NUM_STREAMS": self._num_cores,
            "INFERENCE_NUM_THREADS": self._num_cores,
            "ENABLE_CPU_PINNING": False,  # two processes would be pinned to the same cores
        }
        compiled = openvino.Core().compile_model(graph, "CPU", settings)
        requests: queue.SimpleQueue[openvino.InferRequest] = queue.SimpleQueue()
        for _ in range(self._num_cores):
            requests.put(compiled.create_infer_request())
        row_shape = tuple(compiled.output(0).shape)[1:]

        def compute(normalised: torch.Tensor) -> torch.Tensor:
            tokens = self._torch.empty((len(normalised), *row_shape))  # fp32: OpenVINO's own fp16 would hide overflows
            request = requests.get()
            try:
                for row, frame in enumerate(normalised.numpy()):
                    request.infer([frame[None]], share_inputs=True)
                    tokens[row] = self._torch.from_numpy(request.get_output_tensor(0).data[0])
            finally:
                requests.put(request)
            return tokens

        return compute

    def _deviation(self, compute: Callable[[torch.Tensor], torch.Tensor], model: torch.nn.Module) -> float:
        """Mean over tokens of 1 - cosine to torch in fp32, of one frame of noise; 0 where torch's are not finite, for
        then every frame will fail."""
        noise = np.random.default_rng(0).normal(size=(1, 3, *self._spec.image_size)).astype(np.float32)
        frame = self._torch.from_numpy(noise)
        with self._torch.inference_mode():
            expected, tokens = token_layers(model, self._spec)(frame).double(), compute(frame).double()
        if not expected.isfinite().all():
            return 0.0
        return float(1 - self._torch.nn.functional.cosine_similarity(tokens, expected, dim=-1).mean())


def convert(model: torch.nn.Module, spec: CacheSpec) -> openvino.Model:
    """OpenVINO's graph of normalised fp32 frames (1, 3, H, W) to tokens, as token_layers."""
    import torch

    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, normalised: torch.Tensor) -> torch.Tensor:
            return token_layers(self.model, spec)(normalised)

    begin, shape = time.monotonic(), (1, 3, *spec.image_size)
    try:
        with warnings.catch_warnings(), quiet_torch():
            warnings.simplefilter("ignore")
            program = torch.export.export(Features().eval(), (torch.zeros(shape),))
            graph = openvino.convert_model(program)
            graph.reshape(list(shape))
    except Exception as error:  # of torch.export and OpenVINO they come in many classes, all of them before work
        if is_out_of_memory(error):
            raise
        raise RefusedError(
            f"engine: openvino {openvino.__version__} cannot convert {spec.dino_model_type}: {one_line(error)[:500]}. "
            "Set engine: torch"
        ) from error
    LOG.info("Converted %s for OpenVINO in %.0f s", spec.dino_model_type, time.monotonic() - begin)
    return graph


@contextlib.contextmanager
def quiet_torch() -> Iterator[None]:
    """Without torch.export's own log lines, which are about its making."""
    logger = logging.getLogger("torch")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


# ----------------------------------------------------------------------------------------------------------------------
# Graphs that are kept
# ----------------------------------------------------------------------------------------------------------------------


def kept_folder(spec: CacheSpec, weights_digest: str) -> Path:
    """Where the graph of these weights and this input size lies; other versions of what made it have other folders."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(base):
        base = os.path.expanduser("~/.cache")
    versions = hashlib.sha256(versions_of(spec).encode()).hexdigest()[:8]
    height, width = spec.image_size
    model = "-l".join([spec.dino_model_type.replace(":", "_"), *map(str, spec.layers or ())])
    model += "" if spec.layer_norm else "-raw"
    name = f"{weights_digest}-{model}-{height}x{width}-{openvino.__version__.split('-')[0]}-{versions}"
    return Path(base) / "dino_cache" / "openvino" / name


def graph_digest(folder: Path) -> str:
    """Of the graph's two files."""
    digest = hashlib.blake2b(digest_size=16)
    for name in (GRAPH_FILE, DATA_FILE):
        with open(folder / name, "rb") as file:
            digest.update(f"{name} {os.fstat(file.fileno()).st_size}\n".encode())
            while block := file.read(READ_BLOCK_BYTES):
                digest.update(block)
    return digest.hexdigest()


def read_kept(folder: Path) -> openvino.Model | None:
    """The graph that is kept in a folder; None where there is none, or a damaged one."""
    try:
        if graph_digest(folder) == (folder / DIGEST_FILE).read_text(encoding="ascii"):
            return openvino.Core().read_model(folder / GRAPH_FILE)
        why = "its digest is another"
    except FileNotFoundError:
        if not folder.exists():
            return None
        why = "a file is missing"
    except (OSError, RuntimeError, ValueError) as error:
        why = one_line(error)
    LOG.warning("%s: the converted model that is kept there is damaged (%s): converting anew", folder, why)
    return None


def remove_leftovers(parent: Path) -> None:
    """Of runs that were killed while they kept a graph; a day old, since another run may be at it now."""
    for path in parent.glob(f"{STAGING_PREFIX}*"):
        if time.time() - path.stat().st_mtime > LEFTOVER_AGE_S:
            shutil.rmtree(path, ignore_errors=True)


def keep(graph: openvino.Model, folder: Path) -> None:
    """Keep a graph, in place of what lies there; where that fails, each run converts anew."""
    staging = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent)
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=folder.parent))
        openvino.save_model(graph, staging / GRAPH_FILE, compress_to_fp16=False)
        (staging / DIGEST_FILE).write_text(graph_digest(staging), encoding="ascii")
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(staging, folder)
    except (OSError, RuntimeError) as error:
        LOG.warning("%s: cannot keep the converted model: %s. Each run converts it anew", folder, one_line(error))
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)  # gone already where it was renamed
