"""FrameDecoder against Pillow, which decodes and resizes with other code, and against broken files."""

import os
import struct
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from dino_cache import CacheSpec, FrameDecoder, InputError, read_file
from support import ROOT, Outcome, check_stamps, chunk_files, make_trajectory, run_cache, write_config, write_frame

ROOMS = ROOT / "sample" / "rendered_rooms" / "corridor_straight"  # 160x120 JPEGs with edges and textures


def decode(path: Path, image_size: tuple[int, int], resize: str = "stretch") -> np.ndarray:
    """(H, W, 3) uint8."""
    pixels = FrameDecoder(CacheSpec(image_size=image_size, resize=resize))(read_file(path), f"robot/{path.name}")
    assert pixels.shape == (3, *image_size)
    array = pixels.permute(1, 2, 0).numpy()
    assert array.dtype == np.uint8
    return array


def difference(pixels: np.ndarray, expected: Image.Image) -> int:
    """The largest difference, in levels of 255."""
    expected = np.asarray(expected)
    assert pixels.shape == expected.shape
    return int(np.abs(pixels.astype(int) - expected).max())


def textured(width: int, height: int, seed: int = 0) -> Image.Image:
    """Coloured blobs a few pixels wide."""
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


# ---------------------------------------------------------------------------------------------------------------------
# Sizes.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", [(56, 70), (112, 154), (120, 160), (224, 308), (42, 280)], ids=str)
@pytest.mark.parametrize("number", [0, 10])
def test_stretch_is_pillows_bicubic(number: int, image_size: tuple[int, int]) -> None:
    height, width = image_size
    expected = Image.open(ROOMS / f"{number}.jpg").resize((width, height), Image.Resampling.BICUBIC)
    assert difference(decode(ROOMS / f"{number}.jpg", image_size), expected) <= 2


@pytest.mark.parametrize(
    ("image_size", "covering", "left", "top"),
    [
        # 160x120 scaled by max(width / 160, height / 120), then cut at the centre: (width, height), offsets
        ((56, 56), (75, 56), 9.5, 0),
        ((112, 154), (154, 116), 0, 2),
        ((112, 112), (149, 112), 18.5, 0),
        ((42, 280), (280, 210), 0, 84),
        ((280, 42), (373, 280), 165.5, 0),
        ((224, 308), (308, 231), 0, 3.5),
    ],
    ids=str,
)
def test_crop_is_pillows_bicubic_scaled_to_cover_and_cut_at_the_centre(
    image_size: tuple[int, int], covering: tuple[int, int], left: float, top: float
) -> None:
    height, width = image_size
    scaled = Image.open(ROOMS / "0.jpg").resize(covering, Image.Resampling.BICUBIC)
    centres = {(int(x), int(y)) for x in (left, left + 0.5) for y in (top, top + 0.5)}  # a half falls to either side
    pixels = decode(ROOMS / "0.jpg", image_size, "crop")
    assert min(difference(pixels, scaled.crop((x, y, x + width, y + height))) for x, y in centres) <= 2


@pytest.mark.parametrize("resize", ["crop", "stretch"])
def test_a_frame_of_the_input_size_is_untouched(tmp_path: Path, resize: str) -> None:
    image = textured(70, 42)
    image.save(tmp_path / "0.png")
    assert difference(decode(tmp_path / "0.png", (42, 70), resize), image) == 0


def test_a_frame_too_narrow_to_crop_fails_with_its_size(tmp_path: Path) -> None:
    """The limit is 64 times the pixels of the input: 28x28 px here, so 28x1792 px."""
    for height in (1791, 1792):
        write_frame(tmp_path / "0.png", 1, 2, (28, height))
        assert decode(tmp_path / "0.png", (28, 28), "crop").reshape(-1, 3).max(axis=0).tolist() == [1, 0, 2]
    write_frame(tmp_path / "0.png", 1, 2, (28, 1793))
    with pytest.raises(InputError, match=r"robot/0\.png.*28x1793"):
        decode(tmp_path / "0.png", (28, 28), "crop")
    assert decode(tmp_path / "0.png", (28, 28), "stretch").reshape(-1, 3).max(axis=0).tolist() == [1, 0, 2]


def test_frames_of_mixed_sizes_and_kinds_make_one_trajectory(tmp_path: Path, run_here: Callable[..., Outcome]) -> None:
    folder = make_trajectory(tmp_path / "data" / "mixed", 20, stamp=9)
    for number, size in enumerate([(42, 28), (320, 240), (28, 42), (1, 1), (640, 20)]):
        write_frame(folder / f"{number}.png", 9, number, size)
    Image.new("RGBA", (32, 24), (9, 0, 7, 40)).save(folder / "7.png")
    Image.new("RGB", (32, 24), (9, 0, 8)).quantize().save(folder / "8.png")
    outcome = run_here(write_config(tmp_path / "config.yaml", tmp_path / "data"))
    assert outcome.code == 0, outcome.err
    assert check_stamps(tmp_path / "data" / "dino_cache_small", "mixed", 9) >= 20


# ---------------------------------------------------------------------------------------------------------------------
# Kinds of images: all become RGB.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGB", "L", "LA", "RGBA", "P", "1"])
def test_a_png_of_any_mode_is_rgb_as_pillow_converts_it(tmp_path: Path, mode: str) -> None:
    image = textured(42, 28).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(textured(42, 28, seed=1).convert("L"))  # colours stay as stored, whatever their alpha
    image.save(tmp_path / "0.png")
    assert difference(decode(tmp_path / "0.png", (28, 42)), image.convert("RGB")) == 0


def test_a_palette_with_a_transparent_colour_is_rgb(tmp_path: Path) -> None:
    image = textured(42, 28).quantize(16)
    image.save(tmp_path / "0.png", transparency=3)
    assert difference(decode(tmp_path / "0.png", (28, 42)), image.convert("RGB")) == 0


@pytest.mark.parametrize(
    "options", [{"quality": 90}, {"quality": 40, "subsampling": 2}, {"progressive": True}], ids=str
)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_of_any_mode_is_rgb_as_pillow_converts_it(tmp_path: Path, mode: str, options: dict) -> None:
    textured(42, 28).convert(mode).save(tmp_path / "0.jpg", **options)
    assert difference(decode(tmp_path / "0.jpg", (28, 42)), Image.open(tmp_path / "0.jpg").convert("RGB")) <= 2


def png16(values: np.ndarray, size: tuple[int, int] | None = None) -> bytes:
    """A 16-bit PNG of (h, w) grey or (h, w, 3) RGB values, claiming `size` (w, h); Pillow writes only grey."""
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in values)  # filter 0: as it is
    size = size or values.shape[1::-1]
    header = struct.pack(">IIBBBBB", *size, 16, 0 if values.ndim == 2 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("channels", [(), (3,)], ids=["grey", "RGB"])
def test_a_16_bit_png_is_scaled_to_8_bits(tmp_path: Path, channels: tuple[int, ...]) -> None:
    values = np.random.default_rng(0).integers(0, 2**16, (28, 42, *channels))
    values.reshape(-1)[:8] = [0, 1, 255, 256, 257, 32768, 65534, 65535]
    (tmp_path / "0.png").write_bytes(png16(values))
    expected = values / 257 if channels else np.repeat((values / 257)[..., None], 3, axis=2)
    pixels = decode(tmp_path / "0.png", (28, 42))
    assert np.abs(pixels - expected).max() <= 1
    assert pixels.min() == 0
    assert pixels.max() == 255


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_name", ["0.jpg", "0.png"])
def test_exif_orientation_is_applied(tmp_path: Path, file_name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    textured(56, 28).save(tmp_path / file_name, exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(tmp_path / file_name))
    assert expected.size == ((56, 28) if orientation < 5 else (28, 56))
    assert difference(decode(tmp_path / file_name, expected.size[::-1]), expected) <= 2


# ---------------------------------------------------------------------------------------------------------------------
# Files that are no frames.
# ---------------------------------------------------------------------------------------------------------------------


def encoded(file_name: str, **options: object) -> bytes:
    """A textured image in the format of the file name."""
    path = Path(file_name)
    textured(64, 48).save(path, **options)
    return path.read_bytes()


BROKEN = {
    "no bytes": ("0.jpg", lambda path: b""),
    "text": ("0.jpg", lambda path: b"This is not a picture.\n"),
    "JPEG without its last byte": ("0.jpg", lambda path: encoded(path)[:-1]),
    "JPEG without its end marker": ("0.jpg", lambda path: encoded(path)[:-2]),
    "half a JPEG": ("0.jpg", lambda path: encoded(path)[: len(encoded(path)) // 2]),
    "half a progressive JPEG": ("0.jpg", lambda path: encoded(path, progressive=True)[: len(encoded(path)) // 2]),
    "a JPEG's first 2 bytes": ("0.jpg", lambda path: encoded(path)[:2]),
    "PNG without the end of its pixels": ("0.png", lambda path: encoded(path)[:-60]),
    "half a PNG": ("0.png", lambda path: encoded(path)[: len(encoded(path)) // 2]),
    "a PNG's first 8 bytes": ("0.png", lambda path: encoded(path)[:8]),
    "an animated GIF": ("0.gif", lambda path: encoded(path, save_all=True, append_images=[textured(64, 48, 1)])),
    "an animated WebP": ("0.webp", lambda path: encoded(path, save_all=True, append_images=[textured(64, 48, 1)])),
    "a TIFF": ("0.tiff", encoded),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_file_that_is_no_whole_image_is_named(tmp_path: Path, kind: str) -> None:
    file_name, make = BROKEN[kind]
    path = tmp_path / file_name
    path.write_bytes(make(path))
    with pytest.raises(InputError, match=f"robot/{file_name}") as caught:
        decode(path, (28, 42))
    assert "decode_" not in str(caught.value)  # advice to programmers of torchvision, none to the user


@pytest.mark.parametrize(("width", "height"), [(9_000, 9_000), (50_000, 50_000)])
def test_a_small_file_that_claims_a_huge_picture_is_refused_with_its_size(
    tmp_path: Path, width: int, height: int
) -> None:
    (tmp_path / "0.png").write_bytes(png16(np.zeros((2, 2)), size=(width, height)))
    with pytest.raises(InputError, match=rf"robot/0\.png.*({width}x{height}|{width * height})"):
        decode(tmp_path / "0.png", (28, 42))


@pytest.mark.parametrize("file_name", ["0.jpg", "0.bmp"])
def test_no_format_is_decoded_at_a_size_that_it_only_claims(tmp_path: Path, file_name: str) -> None:
    """60000x60000 px would take 10 GB."""
    path = tmp_path / file_name
    image = bytearray(encoded(path))
    if file_name == "0.jpg":
        struct.pack_into(">HH", image, image.index(b"\xff\xc0") + 5, 60_000, 60_000)  # in the frame header
    else:
        struct.pack_into("<ii", image, 18, 60_000, 60_000)
    path.write_bytes(image)
    with pytest.raises(InputError, match=rf"robot/0\.(jpg|bmp).*(60000x60000|{60_000 * 60_000})"):
        decode(path, (28, 42))


def test_a_pipe_in_a_frames_place_is_refused_without_waiting_on_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "0.jpg")
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(decode, tmp_path / "0.jpg", (28, 42))
        try:
            with pytest.raises(InputError, match=r"0\.jpg: not a regular file"):
                future.result(timeout=60)
        finally:  # lets a reader that waits go on, so that a failure of this test ends
            os.close(os.open(tmp_path / "0.jpg", os.O_RDWR | os.O_NONBLOCK))


def test_a_missing_frame_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"0\.jpg"):
        decode(tmp_path / "0.jpg", (28, 42))


@pytest.mark.parametrize("kind", ["JPEG without its end marker", "an animated GIF", "no bytes"])
def test_a_broken_frame_fails_its_trajectory_alone(tmp_path: Path, run_here: Callable[..., Outcome], kind: str) -> None:
    make_trajectory(tmp_path / "data" / "good", 20, stamp=1)
    folder = make_trajectory(tmp_path / "data" / "broken", 20, stamp=2)
    (folder / "11.png").write_bytes(BROKEN[kind][1](tmp_path / BROKEN[kind][0]))
    outcome = run_here(write_config(tmp_path / "config.yaml", tmp_path / "data"))
    assert outcome.code == 1
    assert "broken/11.png" in outcome.err
    assert {path.parent.name for path in chunk_files(tmp_path / "data" / "dino_cache_small")} == {"good"}
    assert check_stamps(tmp_path / "data" / "dino_cache_small", "good", 1) >= 20


def test_a_png_with_a_flipped_bit_fails_its_trajectory_alone(tmp_path: Path) -> None:
    """In a process of its own: such a file can bring down a decoder, and the process with it."""
    make_trajectory(tmp_path / "data" / "good", 20, stamp=1)
    image = encoded(tmp_path / "0.png")
    pixels = image.index(b"IDAT") + 4
    length = struct.unpack(">I", image[pixels - 8 : pixels - 4])[0]
    places = {
        "header": 20,
        "length": pixels - 5,
        "data": pixels + length // 2,
        "end_of_data": pixels + length - 6,  # where a decoder may have all pixels before it sees a checksum
        "checksum": pixels + length,
    }
    for place, position in places.items():
        folder = make_trajectory(tmp_path / "data" / f"bad_{place}", 20, stamp=2)
        flipped = image[:position] + bytes([image[position] ^ 1]) + image[position + 1 :]
        (folder / "11.png").write_bytes(flipped)
    outcome = run_cache(write_config(tmp_path / "config.yaml", tmp_path / "data"))
    assert outcome.returncode == 1, outcome.stderr
    assert [place for place in places if f"bad_{place}/11.png" not in outcome.stderr] == []
    assert check_stamps(tmp_path / "data" / "dino_cache_small", "good", 1) >= 20


def test_one_decoder_serves_many_threads() -> None:
    """Every thread gets its own frame."""
    paths = sorted(ROOMS.glob("*.jpg")) * 4
    decoder = FrameDecoder(CacheSpec(image_size=(56, 70)))
    with ThreadPoolExecutor(8) as pool:
        frames = list(pool.map(lambda path: decoder(read_file(path), path.name), paths))
    for path, frame in zip(paths, frames):
        assert frame.equal(decoder(read_file(path), path.name))
