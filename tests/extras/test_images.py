"""encode_images: what a cache holds for the same pictures, for paths and arrays; what is wrong is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dino_cache
from dino_cache import (
    CacheSpec,
    EncodedRows,
    InputError,
    RefusedError,
    encode_images,
    load_encoder,
    model_shape,
    token_shapes,
)
from dino_cache_extras import images as images_module
from support import StampEncoder, make_trajectory, read_chunk, stream_results

SIZE = (56, 84)  # height, width [px]: 4 x 6 patches
SMALL: dict[str, Any] = {"dino_model_type": "small", "weights": "random", "image_size": SIZE, "precision": "fp32"}


@pytest.fixture(autouse=True)
def nothing_loaded() -> None:
    images_module._LOADED.clear()


def noise(count: int, height: int = 70, width: int = 90) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture
def stamped(monkeypatch: pytest.MonkeyPatch) -> list[StampEncoder]:
    """StampEncoder in the model's place; collects those that were loaded."""
    loaded: list[StampEncoder] = []

    def load(spec: CacheSpec, device: str) -> tuple[StampEncoder, str]:
        loaded.append(StampEncoder(spec.image_size, spec.tokens))
        return loaded[-1], "stamp"

    monkeypatch.setattr(dino_cache, "load_encoder", load)
    monkeypatch.setattr(dino_cache, "model_shape", lambda model_type: dino_cache.ModelShape(14, 4, 0))
    return loaded


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_features_are_those_of_a_cache(tmp_path: Path, precision: str, resize: str) -> None:
    folder = make_trajectory(tmp_path / "data/t", 9)
    for number, image in enumerate(noise(9)):
        kind = "jpg" if number % 2 else "png"
        (folder / f"{number}.png").unlink()
        Image.fromarray(image).save(folder / f"{number}.{kind}")
    settings = {**SMALL, "precision": precision, "resize": resize, "tokens": ("cls", "patch")}
    encoder, _ = load_encoder(CacheSpec(**settings), "cpu")
    encoder.image_size, encoder.tokens = SIZE, settings["tokens"]  # which stream_results asks for
    shape = model_shape("small")
    (result,) = stream_results(
        tmp_path / "data", tmp_path / "cache", encoder, shape=shape, resize=resize, precision=precision,
        max_chunk_distance_m=50.0,
    )  # fmt: skip
    assert result.error is None
    _, cached = read_chunk(tmp_path / "cache/t/chunk_00000.h5")
    paths = [next(folder.glob(f"{number}.*")) for number in range(9)]
    features = encode_images(paths, **settings)
    assert {name: values.shape for name, values in features.items()} == {
        name: (9, *row) for name, row in token_shapes(CacheSpec(**settings), shape).items()
    }
    for name, values in features.items():
        assert values.dtype == np.float16
        np.testing.assert_array_equal(values, cached[name])


def test_arrays_and_paths_mix_and_keep_their_order(tmp_path: Path) -> None:
    pictures = noise(5)
    path = tmp_path / "picture.png"
    Image.fromarray(pictures[2]).save(path)
    together = encode_images([pictures[0], pictures[1], str(path), pictures[3], pictures[4]], **SMALL)["cls_token"]
    np.testing.assert_array_equal(together, encode_images(pictures, **SMALL)["cls_token"])
    assert len({row.tobytes() for row in together}) == 5


def test_pictures_of_different_sizes_and_layouts_in_memory_are_taken() -> None:
    wide, tall = noise(1, 40, 200)[0], noise(1, 200, 40)[0]
    expected = encode_images([wide, tall], **SMALL)["cls_token"]
    flipped = np.ascontiguousarray(wide[:, :, ::-1])[:, :, ::-1]  # as of OpenCV's BGR
    read_only = np.asfortranarray(tall)
    read_only.setflags(write=False)
    np.testing.assert_array_equal(encode_images([flipped, read_only], **SMALL)["cls_token"], expected)


def test_frames_come_out_under_their_own_number(stamped: list[StampEncoder]) -> None:
    stamps = np.zeros((300, 20, 30, 3), np.uint8)
    stamps[:, :, :, 1] = (np.arange(300) // 256)[:, None, None]
    stamps[:, :, :, 2] = (np.arange(300) % 256)[:, None, None]
    rows = encode_images(stamps, **{**SMALL, "image_size": (28, 42)})["cls_token"].astype(int)
    np.testing.assert_array_equal(rows[:, 1] * 256 + rows[:, 2], np.arange(300))


def test_no_pictures_give_no_rows(stamped: list[StampEncoder]) -> None:
    features = encode_images([], **SMALL, tokens=("cls", "patch"))
    assert {name: values.shape for name, values in features.items()} == {
        "cls_token": (0, 4), "patch_tokens": (0, 4, 6, 4),
    }  # fmt: skip


def test_the_encoder_stays_loaded_until_other_settings_are_asked_for(
    stamped: list[StampEncoder], tmp_path: Path
) -> None:
    pictures = noise(2)
    for _ in range(3):
        encode_images(pictures, **SMALL)
    assert len(stamped) == 1
    encode_images(pictures, **SMALL, resize="stretch")  # which no encoder sees
    assert len(stamped) == 1
    encode_images(pictures, **SMALL, tokens="patch")
    assert len(stamped) == 2
    weights = tmp_path / "weights.pth"
    for content in (b"a", b"bb"):
        weights.write_bytes(content)
        encode_images(pictures, **{**SMALL, "weights": weights})
    assert len(stamped) == 4


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (np.zeros((20, 30), np.uint8), r"images\[1\]: is \(20, 30\) uint8; expected a path or \(h, w, 3\) uint8 RGB"),
        (np.zeros((20, 30, 4), np.uint8), r"images\[1\]: is \(20, 30, 4\) uint8"),
        (np.zeros((20, 30, 3), np.float32), r"images\[1\]: is \(20, 30, 3\) float32"),
        (torch.zeros(20, 30, 3, dtype=torch.uint8), r"images\[1\]: is a Tensor"),
        (b"not a picture", r"images\[1\] \(.*\): cannot decode 13 bytes: not a JPEG, PNG, WebP or BMP image"),
        (np.zeros((1, 9000, 3), np.uint8), r"images\[1\]: 9000x1 px is too narrow to crop"),
    ],
)
def test_a_picture_that_cannot_be_taken_is_named(
    stamped: list[StampEncoder], tmp_path: Path, picture: Any, message: str
) -> None:
    if isinstance(picture, bytes):
        (tmp_path / "picture.jpg").write_bytes(picture)
        picture = tmp_path / "picture.jpg"
    with pytest.raises(InputError, match=message):
        encode_images([noise(1)[0], picture], **SMALL)


def test_one_picture_belongs_into_a_list(stamped: list[StampEncoder]) -> None:
    with pytest.raises(RefusedError, match=r"images: a.png: is one path; give a list"):
        encode_images("a.png", **SMALL)
    with pytest.raises(InputError, match=r"images\[0\]: is \(90, 3\) uint8.*goes into a list"):
        encode_images(noise(1)[0], **SMALL)


def test_a_file_that_is_not_there_is_the_systems_error(stamped: list[StampEncoder], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        encode_images([tmp_path / "gone.png"], **SMALL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": (56, 85)}, r"image_size: \[56, 85\]: .* multiples of the patch size 14"),
        ({"dino_model_type": "huge"}, "dino_model_type: 'huge'"),
        ({"tokens": ("cls", "register")}, "register needs a model with registers"),
        ({"precision": "fp16", "device": "cpu"}, "precision: fp16 .* needs CUDA"),
        ({"weights": "gone.pth"}, r"weights: .*gone\.pth: No such file"),
        ({"device": "cuda:99"}, "device: cuda:99: torch sees"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RefusedError, match=message):
        encode_images(noise(1), **{**SMALL, **settings})


def test_features_that_are_not_finite_are_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class NotFinite(StampEncoder):
        def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
            rows = super().encode(pixels)()
            return lambda: rows._replace(finite=np.arange(len(pixels)) != 1)

    monkeypatch.setattr(dino_cache, "load_encoder", lambda spec, device: (NotFinite(spec.image_size), "stamp"))
    with pytest.raises(InputError, match=r"images\[1\]: its features are not finite"):
        encode_images(noise(3), **SMALL)
