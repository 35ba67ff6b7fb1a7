"""Patch tokens that take less space: pooled over patches, stored as int8 with a scale each; and the way back.

An int8 token is round(value / scale), its scale the least float16 that is at least its largest absolute value / 127: so
nothing is clipped, also where float16 is coarse, and a token below 7e-6 is what float16 would make of it. A token whose
de-quantised values would not be finite in float16 fails its frame, as one that is not finite itself.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Container, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from dino_cache import (
    EXTRA_PREFIX,
    CacheSpec,
    ChunkLabel,
    ModelShape,
    as_float16,
    scale_dataset,
    token_dataset,
    token_of,
)
from progress_utils import RefusedError

if TYPE_CHECKING:
    import h5py
    import torch

MOST_INT8 = 127  # of either sign, so that a token and its negative are stored alike
SAMPLED_EVERY = 64  # kept frames; of each such frame, one token's computed values stay with the chunk
SAMPLED_PLACES = 4  # of the patch grid, taken in turn
SAMPLE_SEED = 0
SAMPLE_ATTRIBUTE = "computed_tokens"
BLOCK_VALUES = 1 << 17  # de-quantised at a time, within a core's cache


def check(spec: CacheSpec, shape: ModelShape) -> None:
    """Raise RefusedError unless the patch grid can be pooled."""
    step = shape.patch_size * spec.patch_pool
    if any(size % step for size in spec.image_size):
        grid = " x ".join(str(size // shape.patch_size) for size in spec.image_size)
        less = [max(1, size // step) * step for size in spec.image_size]
        more = [math.ceil(size / step) * step for size in spec.image_size]
        choices = " or ".join(dict.fromkeys(map(str, (less, more))))
        raise RefusedError(
            f"patch_pool: {spec.patch_pool}: does not divide the {grid} patches of image_size {list(spec.image_size)}; "
            f"height and width must be multiples of {step}: set image_size to {choices}, or patch_pool: 1"
        )


# ----------------------------------------------------------------------------------------------------------------------
# Encoding, on the device
# ----------------------------------------------------------------------------------------------------------------------


def stage(spec: CacheSpec) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    """What turns tokens as computed, dataset name -> (B, ...), into rows as stored and "finite": (B,) bool. Beside int8
    tokens go their scales, and under `computed_name` the values of a few."""

    def to_store(tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        patches = {name: pooled(tokens[name], spec.patch_pool) for name in tokens if token_of(name) == "patch"}
        if spec.store == "float16":
            return as_float16({**tokens, **patches})
        quantised: dict[str, torch.Tensor] = {}
        ends = {}  # of each token the largest value that it can be read as
        for name, values in patches.items():
            quantised[name], scale = quantise(values)
            quantised[scale_dataset(name)] = scale
            quantised[computed_name(name)] = sampled(values)
            ends[name] = scale * MOST_INT8  # in float16: infinite where that cannot hold it
        return {**as_float16({**tokens, **ends}), **quantised}

    return to_store


def pooled(patches: torch.Tensor, size: int) -> torch.Tensor:
    """(B, h, w, D) to (B, h / size, w / size, D) float32: means over size x size patches, taken in float32."""
    if size == 1:
        return patches
    return patches.unflatten(1, (-1, size)).unflatten(3, (-1, size)).float().mean((2, 4))


def quantise(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(..., D) floats to (..., D) int8, and a scale for each token (...) float16, never too small for its values. The
    scale of a token of zeros is 0; one that is not finite has a scale that is not."""
    import torch

    values = values.float()
    exact = values.abs().amax(-1) / MOST_INT8
    scale = exact.half()
    too_small = (scale.float() < exact).to(torch.int16)
    scale = (scale.view(torch.int16) + too_small).view(torch.float16)  # the next larger one is the next whole number
    divisor = torch.where(scale == 0, 1.0, scale.float())
    return (values / divisor[..., None]).round().clamp(-MOST_INT8, MOST_INT8).to(torch.int8), scale


# ----------------------------------------------------------------------------------------------------------------------
# The way back
# ----------------------------------------------------------------------------------------------------------------------


def new_block(width: int) -> torch.Tensor:
    """Room for `dequantise_into`, (n, D) float32."""
    import torch

    return torch.empty((max(1, BLOCK_VALUES // width), width))


def dequantise_into(values: torch.Tensor, scales: torch.Tensor, out: torch.Tensor, exact: torch.Tensor) -> None:
    """(..., D) int8 times (...) float16 into `out` (..., D), of any floating type: the product is exact in float32, and
    rounded once. All on the CPU and in one piece; block by block of `exact`, since it is the memory that takes time."""
    width, block = values.shape[-1], len(exact)
    parts = values.view(-1, width), scales.view(-1, 1).float(), out.view(-1, width)
    for tokens, factors, target in zip(*(part.split(block) for part in parts)):
        product = exact[: len(tokens)].copy_(tokens).mul_(factors)
        target.copy_(product)


def restored(rows: Mapping[str, Any], dtype: torch.dtype | None = None) -> dict[str, Any]:
    """A batch, or a sample, without scales, its int8 tokens de-quantised on the device that they are on. `dtype`: of
    these; None: float16."""
    import torch

    scales = {scale_dataset(name): name for name in rows if has_scale(name, rows)}
    full = {name: values for name, values in rows.items() if name not in scales}
    for scale, name in scales.items():
        full[name] = (rows[name].float() * rows[scale].float()[..., None]).to(dtype or torch.float16)
    return full


def dequantised(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """(..., D) int8 times (...) float16, as (..., D) float16."""
    return (values * scales.astype(np.float32)[..., None]).astype(np.float16)


def without_scales(rows: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Encoded rows, dataset name -> (B, ...), as a reader gives them: float16 alone."""
    beside = {beside for name in rows for beside in (scale_dataset(name), computed_name(name))}
    return {
        name: dequantised(values, rows[scale_dataset(name)]) if has_scale(name, rows) else values
        for name, values in rows.items()
        if name not in beside
    }


def read_rows(chunk: h5py.File, name: str, rows: Any = ...) -> np.ndarray:
    """Rows of any dataset of a chunk file; int8 tokens de-quantised."""
    values = chunk[name][rows]
    return dequantised(values, chunk[scale_dataset(name)][rows]) if has_scale(name, chunk) else values


def read_type(chunk: h5py.File, name: str) -> np.dtype:
    """The type of what `read_rows` gives."""
    return np.dtype(np.float16) if has_scale(name, chunk) else chunk[name].dtype


def has_scale(name: str, names: Container[str]) -> bool:
    """Whether a dataset, or a key of a batch, is of int8 tokens, by their scales among `names`. What extra_keys named
    may be called alike."""
    return EXTRA_PREFIX not in name and scale_dataset(name) in names


# ----------------------------------------------------------------------------------------------------------------------
# The sample of computed tokens that int8 tokens can be compared with
# ----------------------------------------------------------------------------------------------------------------------


def computed_name(dataset: str) -> str:
    """Under which name an encoder gives the computed values of a few of a dataset's tokens, (B, places, D) float16."""
    return f"{dataset}_computed"


def sampled_places(height: int, width: int) -> list[tuple[int, int]]:
    """The places of the patch grid that are sampled: the same ones for every frame, (row, column)."""
    count = min(SAMPLED_PLACES, height * width)
    chosen = np.random.default_rng(SAMPLE_SEED).choice(height * width, count, replace=False)
    return [divmod(int(place), width) for place in chosen]


def sampled(patches: torch.Tensor) -> torch.Tensor:
    """(B, h, w, D) to (B, places, D) float16."""
    rows, columns = zip(*sampled_places(*patches.shape[1:3]))
    return patches[:, list(rows), list(columns)].half()


class Sample:
    """Of a chunk's int8 tokens, the computed values of a few. A frame's number alone says whether one of its tokens is
    among them and which, whatever it is batched with and in whatever chunks it lies."""

    def __init__(self, label: ChunkLabel):
        shapes = label.token_shapes
        self._places = {name: sampled_places(*shapes[name][:2]) for name in shapes if scale_dataset(name) in shapes}
        self._found: dict[str, list[tuple[int, tuple[int, int], bytes]]] = {}  # dataset -> frame, place, values

    def add(self, first: int, tokens: Mapping[str, np.ndarray], camera: str | None) -> None:
        """Look at a camera's kept frames from `first` on. Where tokens come from elsewhere than an encoder, there are
        no computed ones."""
        for name, places in self._places.items():
            if (computed := tokens.get(computed_name(name))) is None:
                continue
            found = self._found.setdefault(token_dataset(camera, name), [])
            for frame in range(-(-first // SAMPLED_EVERY) * SAMPLED_EVERY, first + len(computed), SAMPLED_EVERY):
                turn = frame // SAMPLED_EVERY % len(places)
                values = computed[frame - first, turn].astype("<f2")
                if np.isfinite(values).all():  # NaN: not known any more, where chunks were cut anew
                    found.append((frame, places[turn], values.tobytes()))

    def attributes(self) -> dict[str, str]:
        """The chunk's attribute; none where no frame of it is sampled."""
        found = {
            name: {
                "frames": [frame for frame, _, _ in tokens],
                "places": [place for _, place, _ in tokens],
                "values": base64.b64encode(b"".join(values for _, _, values in tokens)).decode(),
            }
            for name, tokens in self._found.items()
            if tokens
        }
        return {SAMPLE_ATTRIBUTE: json.dumps(found, sort_keys=True)} if found else {}


def sampled_before(
    attributes: Mapping[str, Any], label: ChunkLabel, camera: str | None, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """What a chunk's sample has of its rows (n,), under the names and in the shape in which an encoder gives it; NaN
    where it has nothing."""
    samples, found = json.loads(attributes.get(SAMPLE_ATTRIBUTE, "{}")), {}
    for name, shape in label.token_shapes.items():
        if (sample := samples.get(token_dataset(camera, name))) is None:
            continue
        places = sampled_places(*shape[:2])
        found[computed_name(name)] = known = np.full((len(rows), len(places), shape[2]), np.nan, np.float16)
        values = np.frombuffer(base64.b64decode(sample["values"]), "<f2").reshape(-1, shape[2])
        for frame, place, token in zip(sample["frames"], sample["places"], values):
            known[rows == frame - attributes["start"], places.index(tuple(place))] = token
    return found


def stored_cosines(chunk: h5py.File) -> list[float]:
    """Of the tokens that a chunk has a sample of, the cosine between stored and computed; empty where it has none."""
    cosines: list[float] = []
    for name, sample in json.loads(chunk.attrs.get(SAMPLE_ATTRIBUTE, "{}")).items():
        computed = np.frombuffer(base64.b64decode(sample["values"]), "<f2").reshape(len(sample["frames"]), -1)
        for frame, place, values in zip(sample["frames"], sample["places"], computed):
            stored = read_rows(chunk, name, (frame - int(chunk.attrs["start"]), *place))
            cosines.append(cosine(stored, values))
    return cosines


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Of two vectors; of two that are zero 1, of one that is and one that is not 0."""
    one, other = one.astype(np.float64), other.astype(np.float64)
    lengths = np.linalg.norm(one), np.linalg.norm(other)
    if 0.0 in lengths:
        return float(lengths[0] == lengths[1])
    return float(one @ other / (lengths[0] * lengths[1]))


def describe_cosines(cosines: list[float]) -> str:
    """For people."""
    return f"cosine {min(cosines):.5f} at the worst, {np.median(cosines):.5f} at the median, of {len(cosines)} sampled"
