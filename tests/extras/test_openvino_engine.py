"""engine: openvino against torch, whose features it must have; the graph that it keeps; what is refused before work."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import dino_cache
from dino_cache import CacheSpec, Encoder, RefusedError, check_engine, encode_images, load_encoder
from support import REAL, ROOT, chunk_files, make_trajectory, read_chunk, tree, write_config

openvino = pytest.importorskip("openvino")
from dino_cache_extras import openvino_engine, ray_workers  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_torch_thread")

SIZES = {"small": (28, 42), "small_reg": (28, 42), "dinov3_small": (32, 48)}
MOST = {"fp32": 1e-6, "bf16": 1e-4}  # 1 - cosine to torch in fp32
HAS_BF16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="this CPU has no bf16 instructions")
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real recordings are not in {REAL}")
PRECISIONS = ["fp32", pytest.param("bf16", marks=needs_bf16)]


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where this file's tests keep what was converted, so that each model is converted once."""
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(autouse=True)
def kept(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared_cache))
    return shared_cache / "dino_cache/openvino"


@pytest.fixture
def own_cache(shared_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, with the graph of `small` in it; returns the graph's folder."""
    load_encoder(spec_of("small"), "cpu")
    shutil.copytree(shared_cache, tmp_path / "own")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "own"))
    (folder,) = (tmp_path / "own/dino_cache/openvino").glob("*-small-28x42-*")
    return folder


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The models that are converted."""
    converted, convert = [], openvino_engine.convert

    def convert_and_count(model: torch.nn.Module, spec: CacheSpec) -> Any:
        converted.append(spec.dino_model_type)
        return convert(model, spec)

    monkeypatch.setattr(openvino_engine, "convert", convert_and_count)
    return converted


@pytest.fixture
def depth() -> int:
    """Blocks of a model: two have all kinds of layers, and take a sixth of the time."""
    return 2


@pytest.fixture(autouse=True)
def shallow_models(depth: int, monkeypatch: pytest.MonkeyPatch) -> None:
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, **settings: create(name, **{"depth": depth, **settings}))


def spec_of(model_type: str, engine: str = "openvino", **settings: Any) -> CacheSpec:
    tokens = ("cls", "patch", "register") if model_type != "small" else ("cls", "patch")
    defaults = {"weights": "random", "image_size": SIZES[model_type], "precision": "fp32", "tokens": tokens}
    return CacheSpec(**{**defaults, "dino_model_type": model_type, "engine": engine, **settings})


def frames_of(size: tuple[int, int], count: int = 3) -> torch.Tensor:
    """(B, 3, H, W) uint8 of the committed sample."""
    files = sorted((ROOT / "sample").glob("**/*.jpg"))[:: 144 // count][:count]
    return as_pixels(files, size)


def as_pixels(files: list[Path], size: tuple[int, int]) -> torch.Tensor:
    pictures = [np.asarray(Image.open(file).convert("RGB").resize(size[::-1])) for file in files]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def model_tokens(spec: CacheSpec, pixels: torch.Tensor) -> torch.Tensor:
    """(B, 1 + R + h*w, D) in fp32, of torch's model."""
    model = dino_cache.build_model(spec).eval()
    dino_cache.set_input_size(model, spec.image_size, "cpu")
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.pixel_mean, spec.pixel_std))
    with torch.inference_mode():
        return model.forward_features((pixels.float() / 255 - mean) / std)


def rows_in_order(spec: CacheSpec, encoder: Encoder, pixels: torch.Tensor) -> np.ndarray:
    """(B, tokens, D): what is stored, as the model has it: CLS, registers, patches."""
    stored = encoder.encode(pixels)()
    assert stored.finite.tolist() == [True] * len(pixels)
    assert {values.dtype for values in stored.tokens.values()} == {np.dtype(np.float16)}
    parts = [stored.tokens["cls_token"][:, None]]
    if "register" in spec.tokens:
        parts.append(stored.tokens["register_tokens"])
    patches = stored.tokens["patch_tokens"]
    patch = 16 if spec.dino_model_type.startswith("dinov3") else 14
    assert patches.shape[1:3] == (spec.image_size[0] // patch, spec.image_size[1] // patch)
    return np.concatenate([*parts, patches.reshape(len(pixels), -1, patches.shape[-1])], axis=1)


def deviation(a: Any, b: Any) -> float:
    """The largest 1 - cosine of two tokens in the same place."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape
    return float((1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)).max())


# ----------------------------------------------------------------------------------------------------------------------
# Features
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("model_type", SIZES)
def test_features_are_torchs(model_type: str, precision: str) -> None:
    settings = {"precision": precision, "pixel_mean": (0.5, 0.4, 0.3), "pixel_std": (0.5, 0.25, 0.2)}
    spec = spec_of(model_type, **settings)
    pixels = frames_of(spec.image_size)
    encoder, digest = load_encoder(spec, "cpu")
    expected = model_tokens(spec, pixels)
    assert deviation(rows_in_order(spec, encoder, pixels), expected) <= MOST[precision]
    assert digest == dino_cache.weights_digest(dino_cache.build_model(spec))
    if precision == "fp32":
        np.testing.assert_allclose(rows_in_order(spec, encoder, pixels), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@needs_real
@pytest.mark.parametrize("depth", [12])
def test_features_of_real_frames_are_torchs(depth: int) -> None:
    files = [sorted(folder.glob("*.jpg"))[10] for folder in sorted(REAL.glob("*/*"))]
    spec = spec_of("small", image_size=(112, 154))
    pixels = as_pixels(files, spec.image_size)
    expected = model_tokens(spec, pixels)
    for precision in ("fp32", "bf16") if HAS_BF16 else ("fp32",):
        encoder, _ = load_encoder(spec.model_copy(update={"precision": precision}), "cpu")
        assert deviation(rows_in_order(spec, encoder, pixels), expected) <= MOST[precision]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_frames_features_are_the_same_bytes_in_every_batch(precision: str) -> None:
    encoder, _ = load_encoder(spec_of("small_reg", precision=precision), "cpu")
    pixels = frames_of(SIZES["small_reg"], 9)
    together = [part for result in [encoder.encode(rows) for rows in pixels.split(4)] for part in [result()]]
    alone = [encoder.encode(pixels[row : row + 1])() for row in range(9)]
    for name in alone[0].tokens:
        np.testing.assert_array_equal(
            np.concatenate([part.tokens[name] for part in together]),
            np.concatenate([part.tokens[name] for part in alone]),
        )


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("factor", [float("nan"), 1e6], ids=["nan", "beyond float16"])
def test_features_that_are_not_finite_are_seen(
    factor: float, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    spec = spec_of("small", precision=precision, tokens=("patch",))
    model = dino_cache.build_model(spec)
    with torch.no_grad():
        model.norm.weight[5] *= factor
    encoded = openvino_engine.load(model, spec, "spoilt").encode(frames_of(spec.image_size))()
    assert encoded.finite.tolist() == [False] * 3


# ----------------------------------------------------------------------------------------------------------------------
# The graph that is kept
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_is_converted_once(own_cache: Path, conversions: list[str]) -> None:
    pixels = frames_of(SIZES["small"])
    before = tree(own_cache)
    first, again = (rows_in_order(spec, load_encoder(spec, "cpu")[0], pixels) for spec in [spec_of("small")] * 2)
    assert conversions == []
    assert tree(own_cache) == before
    np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    "other", [{"image_size": (42, 28)}, {"image_size": (28, 56)}, {"weights": "changed"}, {"dino_model_type": "base"}],
    ids=str,
)  # fmt: skip
def test_what_differs_is_not_taken_for_what_is_kept(other: dict[str, Any]) -> None:
    spec, digest = spec_of("small"), "0" * 16
    changed = "1" * 16 if other.pop("weights", None) else digest
    folder = openvino_engine.kept_folder(spec, digest)
    assert folder != openvino_engine.kept_folder(spec.model_copy(update=other), changed)
    assert folder == openvino_engine.kept_folder(spec.model_copy(update={"precision": "bf16"}), digest)


@pytest.mark.slow
def test_another_release_converts_anew(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, digest = spec_of("small"), own_cache.name.partition("-")[0]
    assert openvino_engine.kept_folder(spec, digest) == own_cache
    versions = {**json.loads(dino_cache.library_versions()), "timm": "9.9"}
    monkeypatch.setattr(dino_cache, "library_versions", lambda: json.dumps(versions))
    assert openvino_engine.kept_folder(spec, digest) != own_cache


def flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "a byte of the weights": lambda folder: flip_byte(folder / "model.bin"),
    "weights cut short": lambda folder: os.truncate(folder / "model.bin", 1000),
    "an empty graph": lambda folder: os.truncate(folder / "model.xml", 0),
    "no digest": lambda folder: (folder / "digest").unlink(),
    "a digest that is no text": lambda folder: (folder / "digest").write_bytes(b"\xff\xfe"),
    "no weights": lambda folder: (folder / "model.bin").unlink(),
    "a folder in a file's place": lambda folder: ((folder / "digest").unlink(), (folder / "digest").mkdir()),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_graph_is_said_and_made_anew(
    damage: Callable[[Path], Any], own_cache: Path, conversions: list[str], caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(dino_cache.LOG, "propagate", True)
    spec = spec_of("small")
    pixels = frames_of(spec.image_size)
    damage(own_cache)
    encoder, _ = load_encoder(spec, "cpu")
    assert f"{own_cache}: the converted model that is kept there is damaged" in caplog.text
    assert conversions == ["small"]
    rows = rows_in_order(spec, encoder, pixels)
    assert deviation(rows, model_tokens(spec, pixels)) <= MOST["fp32"]
    again, _ = load_encoder(spec, "cpu")
    np.testing.assert_array_equal(rows_in_order(spec, again, pixels), rows)
    assert conversions == ["small"]  # what was damaged is whole again
    assert [path.name for path in own_cache.parent.iterdir() if path.name.startswith(".")] == []


@pytest.mark.slow
def test_a_whole_graph_of_other_weights_is_not_used(
    own_cache: Path, conversions: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dino_cache.LOG, "propagate", True)
    spec = spec_of("small")
    pixels = frames_of(spec.image_size)
    data = np.fromfile(own_cache / "model.bin", np.float32)
    data[len(data) // 2 :] *= 1.5
    data.tofile(own_cache / "model.bin")
    (own_cache / "digest").write_text(openvino_engine.graph_digest(own_cache))
    encoder, _ = load_encoder(spec, "cpu")
    assert "its features are not torch's" in caplog.text
    assert conversions == ["small"]
    assert deviation(rows_in_order(spec, encoder, pixels), model_tokens(spec, pixels)) <= MOST["fp32"]


@pytest.mark.slow
def test_a_folder_that_cannot_be_written_only_costs_time(
    tmp_path: Path, conversions: list[str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dino_cache.LOG, "propagate", True)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    spec = spec_of("small")
    encoder, _ = load_encoder(spec, "cpu")
    assert "cannot keep the converted model: " in caplog.text
    assert conversions == ["small"]
    rows_in_order(spec, encoder, frames_of(spec.image_size))


def test_leftovers_of_killed_runs_are_removed_after_a_day(own_cache: Path) -> None:
    old, young = own_cache.parent / ".new-old", own_cache.parent / ".new-young"
    for folder in (old, young):
        folder.mkdir()
        (folder / "model.bin").touch()
    day_before = young.stat().st_mtime - 90_000
    os.utime(old, (day_before, day_before))
    openvino_engine.remove_leftovers(own_cache.parent)
    assert (old.exists(), young.exists(), own_cache.exists()) == (False, True, True)


# ----------------------------------------------------------------------------------------------------------------------
# What is refused
# ----------------------------------------------------------------------------------------------------------------------


def test_cuda_is_refused() -> None:
    for call in (check_engine, load_encoder):
        with pytest.raises(RefusedError, match=r"the device is cuda:1\. Ways on: set device: cpu, or engine: torch"):
            call(spec_of("small"), "cuda:1")


def test_bf16_needs_a_cpu_with_bf16_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    without = SimpleNamespace(get_property=lambda device, name: ["FP32", "INT8"])
    monkeypatch.setattr(openvino, "Core", lambda: without)
    check_engine(spec_of("small"), "cpu")
    with pytest.raises(RefusedError, match="needs a CPU with bf16 instructions"):
        check_engine(spec_of("small", precision="bf16"), "cpu")


@pytest.mark.slow
def test_features_that_are_not_torchs_are_refused(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    convert = openvino_engine.convert

    def convert_wrongly(model: torch.nn.Module, spec: CacheSpec) -> Any:
        other = dino_cache.build_model(spec).eval()
        dino_cache.set_input_size(other, spec.image_size, "cpu")
        with torch.no_grad():
            other.pos_embed += torch.randn(other.pos_embed.shape, generator=torch.Generator().manual_seed(0))
        return convert(other, spec)

    shutil.rmtree(own_cache)
    monkeypatch.setattr(openvino_engine, "convert", convert_wrongly)
    with pytest.raises(RefusedError, match=r"does not compute what torch does .* Set engine: torch"):
        load_encoder(spec_of("small"), "cpu")


def test_a_model_that_cannot_be_converted_is_refused(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("aten::new_operation")

    shutil.rmtree(own_cache)
    monkeypatch.setattr(torch.export, "export", fail)
    with pytest.raises(RefusedError, match=r"cannot convert small: 'aten::new_operation'\. Set engine: torch"):
        load_encoder(spec_of("small"), "cpu")


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--dry-run",)], ids=str)
def test_a_missing_library_is_said_before_work(options: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "hidden").mkdir()
    missing = "raise ModuleNotFoundError('No module named openvino', name='openvino')"
    (tmp_path / "hidden/openvino.py").write_text(missing)
    make_trajectory(tmp_path / "data/t", 4)
    config = write_config(tmp_path / "config.yaml", tmp_path / "data", weights="random", engine="openvino")
    done = subprocess.run(
        [sys.executable, ROOT / "dino_cache.py", "--config", config, *options], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "hidden")}, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "this needs openvino" in done.stderr
    assert "pip install -r requirements-openvino.txt" in done.stderr
    assert not list(tmp_path.rglob("chunk_*"))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_ray_worker_refuses_what_it_cannot_compute_alike(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"handlers": [], "propagate": False, "level": 0}.items():
        monkeypatch.setattr(dino_cache.LOG, name, value)  # which a worker changes for its whole process
    spec = spec_of("small")
    label = dino_cache.ChunkLabel("robot", spec, "0" * 16, "0" * 16, {})
    job = ray_workers.WorkerJob(
        label, dino_cache.RunOptions(), lambda spec, device: (None, "0" * 16), tmp_path, tmp_path,
        versions=dino_cache.versions_of(spec),
    )  # fmt: skip
    worker = ray_workers.RayWorker("worker", device, 1, dino_cache.library_versions())
    if device == "cuda":
        assert "openvino encodes on a CPU" in worker.load(job, tmp_path)
    else:
        assert worker.load(job, tmp_path) is None
        other = job.versions.replace(openvino.__version__.split("-")[0], "2026.9.9")
        assert "the driver has" in worker.load(dataclasses.replace(job, versions=other), tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# A run, and encode_images
# ----------------------------------------------------------------------------------------------------------------------


def test_a_run_caches_what_the_engine_computes_and_records_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_trajectory(tmp_path / "data/t", 9)
    settings = {"weights": "random", "precision": "fp32", "tokens": ["cls", "patch"], "image_size": [28, 42]}

    def run(engine: str) -> int:
        config = write_config(
            tmp_path / "config.yaml", tmp_path / "data", dino_model_type="small", engine=engine, device="cpu",
            resize="stretch", max_chunk_distance_m=50.0, **settings,
        )  # fmt: skip
        return dino_cache.main(["--config", str(config)])

    assert run("openvino") == 0
    assert "(random (small, seed 0)) in fp32 by openvino on cpu" in capsys.readouterr().out
    (chunk,) = chunk_files(tmp_path / "data/dino_cache_small/t")
    attributes, data = read_chunk(chunk)
    assert json.loads(attributes["spec"])["engine"] == "openvino"
    assert json.loads(attributes["versions"])["openvino"].split("-")[0] == openvino.__version__.split("-")[0]
    frames = [folder / f"{number}{suffix}" for number in range(9) for suffix in (".jpg", ".png")]
    frames = [frame for frame in frames if frame.exists()]
    same = {**settings, "image_size": (28, 42), "dino_model_type": "small", "resize": "stretch", "device": "cpu"}
    for name, values in encode_images(frames, engine="openvino", **same).items():
        np.testing.assert_array_equal(data[name], values)
    assert run("torch") == 2  # another configuration, and no terminal to ask on
    assert "engine: openvino" in capsys.readouterr().err
    assert run("openvino") == 0
