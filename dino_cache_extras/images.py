"""encode_images: features of a few pictures, as a cache would hold them."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import ValidationError

import dino_cache
from dino_cache import (
    Batch,
    CacheSpec,
    Encoder,
    FrameDecoder,
    InputError,
    Rows,
    Token,
    check_image_size,
    check_tokens,
    encode_batches,
    encoder_key,
    explain_faults,
    in_groups,
    one_torch_thread,
    prefetch,
    read_file,
    resolve_device,
    resolve_precision,
    thread_pool,
    token_shapes,
    weights_source,
)
from dino_cache_extras.smaller_tokens import without_scales
from progress_utils import RefusedError, available_cores

if TYPE_CHECKING:
    import torch

Picture = str | os.PathLike[str] | np.ndarray

_LOADED: dict[tuple, Encoder] = {}  # the encoder of the last call


def encode_images(
    images: Sequence[Picture] | np.ndarray,
    *,
    dino_model_type: str = "large",
    weights: str | os.PathLike[str] = "pretrained",
    image_size: tuple[int, int] = (224, 308),
    tokens: Token | Sequence[Token] = ("cls",),
    resize: Literal["crop", "stretch"] = "crop",
    pixel_mean: Sequence[float] | None = None,
    pixel_std: Sequence[float] | None = None,
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto",
    engine: str = "torch",
    device: str = "auto",
    layers: Sequence[int] | None = None,
    layer_norm: bool = True,
    patch_pool: int = 1,
    store: Literal["float16", "int8"] = "float16",
) -> dict[str, np.ndarray]:
    """Features of pictures: what a cache of the same settings holds for them, to the rounding of its batches.

    The settings are those of the configuration. The encoder stays loaded for the next call with the same ones.

    Args:
        images: paths of picture files and (h, w, 3) uint8 RGB arrays, of any sizes; or one array (N, h, w, 3).
        dino_model_type: a name from docs/configuration.md, or timm:<name>.
        weights: pretrained, random, or the path of an official file.
        pixel_mean, pixel_std: None: the model's own.
        layers: blocks of the model, from 0, whose tokens are wanted in place of those at its end.
        image_size: height and width [px] that pictures are brought to, multiples of the patch size.
        device: auto, cpu, cuda or cuda:N.

    Returns:
        Of the tokens asked for, (N, ...) float16: cls_token (N, D), patch_tokens (N, h, w, D) over the patch grid,
        pooled where that is asked for, register_tokens (N, R, D), mean_token (N, D). Of layers cls_token_l05,
        patch_tokens_l05, ... With store: int8, patch_tokens are what a reader makes of such a cache.

    Raises:
        InputError: a picture does not decode, is no such array, or its features are not finite; it is named.
        OSError: a file cannot be read.
        RefusedError: a setting is not allowed, the weights cannot be had, or the engine is not there.
        DeviceError: the encoder fails.
    """
    if isinstance(images, str | os.PathLike):
        raise RefusedError(f"images: {images}: is one path; give a list of them")
    settings = {
        "dino_model_type": dino_model_type,
        "weights": weights if weights in ("pretrained", "random") else os.path.abspath(weights),
        "image_size": tuple(image_size),
        "tokens": (tokens,) if isinstance(tokens, str) else tuple(tokens),
        "resize": resize,
        "pixel_mean": None if pixel_mean is None else tuple(pixel_mean),
        "pixel_std": None if pixel_std is None else tuple(pixel_std),
        "precision": precision,
        "engine": engine,
        "layers": None if layers is None else tuple(layers),
        "layer_norm": layer_norm,
        "patch_pool": patch_pool,
        "store": store,
    }
    device = resolve_device(device)
    spec = _settled_spec(settings, device)
    shape = dino_cache.model_shape(spec.dino_model_type)
    check_image_size(spec, shape)
    check_tokens(spec, shape)
    none = {name: np.zeros((0, *row), np.float16) for name, row in token_shapes(spec, shape).items()}
    rows = {name: [values] for name, values in without_scales(none).items()}
    for tokens_of_part in _encoded_parts(images, spec, _encoder(spec, device)):
        for name, values in without_scales(tokens_of_part).items():
            rows[name].append(values)
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def _settled_spec(settings: dict[str, Any], device: str) -> CacheSpec:
    """A spec of these settings, its precision settled as for a new cache."""
    try:
        spec = CacheSpec(**settings)
    except ValidationError as error:
        raise RefusedError(*explain_faults(error, lambda key: "")) from error
    precision = resolve_precision(spec.precision, None, device, spec.dino_model_type)
    return spec.model_copy(update={"precision": precision})


def _encoder(spec: CacheSpec, device: str) -> Encoder:
    """The encoder of the last call, if it is the one wanted and its weights file is as it was."""
    key = (*encoder_key(spec, device), *weights_source(spec).values())
    if key not in _LOADED:
        _LOADED.clear()  # first, as two may not fit on the device
        _LOADED[key], _ = dino_cache.load_encoder(spec, device)
    return _LOADED[key]


def _encoded_parts(
    images: Sequence[Picture] | np.ndarray, spec: CacheSpec, encoder: Encoder
) -> Iterator[dict[str, np.ndarray]]:
    """Tokens of the pictures in order, part by part, batched as a run batches frames."""
    done = 0
    for part in encode_batches(encoder, _batches(images, spec, encoder), lambda count: None, lambda: False):
        if not part.rows.finite.all():
            name = _name(done + int(np.argmin(part.rows.finite)), images)
            raise InputError(f"{name}: its features are not finite; precision: fp32 may help")
        done += len(part.rows.finite)
        yield part.rows.tokens


def _batches(images: Sequence[Picture] | np.ndarray, spec: CacheSpec, encoder: Encoder) -> Iterator[Batch]:
    decode = functools.partial(_decode, decoder=FrameDecoder(spec), images=images)
    workers, size = available_cores(), encoder.default_batch_size
    with thread_pool(workers, "decode", one_torch_thread) as pool:
        decoded = prefetch(decode, range(len(images)), pool, 2 * max(workers, size))
        for group in in_groups(decoded, size):
            pixels = encoder.new_pixels(len(group))
            for row, image in enumerate(group):
                pixels[row] = image
            yield Batch([Rows(None, np.arange(len(group)))], pixels)


def _decode(number: int, decoder: FrameDecoder, images: Sequence[Picture] | np.ndarray) -> torch.Tensor:
    """Picture number `number`, (3, H, W) uint8 at the input size."""
    image, name = images[number], _name(number, images)
    if isinstance(image, str | os.PathLike):
        return decoder(read_file(Path(image)), name)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        what = f"{image.shape} {image.dtype}" if isinstance(image, np.ndarray) else f"a {type(image).__name__}"
        raise InputError(f"{name}: is {what}; expected a path or (h, w, 3) uint8 RGB. One picture goes into a list")
    return decoder.fit(np.array(image, order="C"), name)  # a copy: torch takes no flipped and no read-only arrays


def _name(number: int, images: Sequence[Picture] | np.ndarray) -> str:
    """A picture, for messages."""
    image = images[number]
    return f"images[{number}] ({image})" if isinstance(image, str | os.PathLike) else f"images[{number}]"
