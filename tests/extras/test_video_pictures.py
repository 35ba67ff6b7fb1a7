"""Pictures of a video as a player shows them: turned, mirrored, with square pixels."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from formats_support import FPS, write_csv
from test_video_times import make_as_before

from dino_cache import InputError
from dino_cache_extras.formats import video_frames
from support import Outcome, Rendered

TOP_LEFT, TOP_RIGHT, BOTTOM_LEFT, BOTTOM_RIGHT = 220, 160, 100, 40
QUARTERS = np.array([[TOP_LEFT, TOP_RIGHT], [BOTTOM_LEFT, BOTTOM_RIGHT]], np.uint8)
MATRICES = {  # what players do with a display matrix (a, b, c, d) -> the quarters as shown
    "as it is": ((1, 0, 0, 1), [[TOP_LEFT, TOP_RIGHT], [BOTTOM_LEFT, BOTTOM_RIGHT]]),
    "a quarter turn clockwise": ((0, 1, -1, 0), [[BOTTOM_LEFT, TOP_LEFT], [BOTTOM_RIGHT, TOP_RIGHT]]),
    "a half turn": ((-1, 0, 0, -1), [[BOTTOM_RIGHT, BOTTOM_LEFT], [TOP_RIGHT, TOP_LEFT]]),
    "a quarter turn back": ((0, -1, 1, 0), [[TOP_RIGHT, BOTTOM_RIGHT], [TOP_LEFT, BOTTOM_LEFT]]),
    "left to right": ((-1, 0, 0, 1), [[TOP_RIGHT, TOP_LEFT], [BOTTOM_RIGHT, BOTTOM_LEFT]]),
    "top to bottom": ((1, 0, 0, -1), [[BOTTOM_LEFT, BOTTOM_RIGHT], [TOP_LEFT, TOP_RIGHT]]),
    "transposed": ((0, 1, 1, 0), [[TOP_LEFT, BOTTOM_LEFT], [TOP_RIGHT, BOTTOM_RIGHT]]),
    "transposed the other way": ((0, -1, -1, 0), [[BOTTOM_RIGHT, TOP_RIGHT], [BOTTOM_LEFT, TOP_LEFT]]),
}


def write_quarters(
    path: Path,
    size: tuple[int, int] = (48, 64),
    *,
    matrix: tuple[int, ...] = (1, 0, 0, 1),
    pixel_aspect: Fraction | None = None,
    count: int = 3,
) -> None:
    """A video of `count` frames with a grey in each quarter."""
    path.parent.mkdir(parents=True, exist_ok=True)
    grey = QUARTERS.repeat(size[0] // 2, 0).repeat(size[1] // 2, 1)
    with av.open(path, "w") as file:
        stream = file.add_stream("libx264", rate=FPS, options={"crf": "10", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = *size, "yuv420p"
        if pixel_aspect is not None:
            stream.codec_context.sample_aspect_ratio = pixel_aspect
        a, b, c, d = (value << 16 for value in matrix)
        stream.set_display_matrix([a, b, 0, c, d, 0, 0, 0, 1 << 30])
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(np.repeat(grey[..., None], 3, 2), format="rgb24")
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def read_picture(path: Path) -> np.ndarray:
    (image,) = video_frames.VideoFrames(path, "t", [0], [0.0], 0.025).read([0])
    return image


def quarters(image: np.ndarray) -> np.ndarray:
    """(2, 2): the grey in the middle of each quarter."""
    height, width = image.shape[:2]
    return image[height // 4 :: height // 2, width // 4 :: width // 2, 0][:2, :2].astype(int)


@pytest.mark.parametrize("case", MATRICES)
def test_a_display_matrix_turns_and_mirrors_the_picture(tmp_path: Path, case: str) -> None:
    matrix, expected = MATRICES[case]
    write_quarters(tmp_path / "t.mp4", matrix=matrix)
    image = read_picture(tmp_path / "t.mp4")
    assert image.shape == ((64, 48, 3) if matrix[0] == 0 else (48, 64, 3))
    np.testing.assert_allclose(quarters(image), expected, atol=4)


@pytest.mark.parametrize("pixel_aspect", [Fraction(4, 3), Fraction(3, 4), Fraction(1), None])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_pixels_that_are_not_square_are_made_so(tmp_path: Path, suffix: str, pixel_aspect: Fraction | None) -> None:
    write_quarters(tmp_path / f"t{suffix}", pixel_aspect=pixel_aspect)
    image = read_picture(tmp_path / f"t{suffix}")
    expected = {Fraction(4, 3): (48, 85, 3), Fraction(3, 4): (64, 64, 3)}  # 64 * 4 / 3 wide; 48 * 4 / 3 high
    assert image.shape == expected.get(pixel_aspect, (48, 64, 3))
    np.testing.assert_allclose(quarters(image), QUARTERS, atol=4)


def test_pixels_are_made_square_before_the_picture_is_turned(tmp_path: Path) -> None:
    write_quarters(tmp_path / "t.mp4", matrix=(0, 1, -1, 0), pixel_aspect=Fraction(2))
    image = read_picture(tmp_path / "t.mp4")
    assert image.shape == (128, 48, 3)
    np.testing.assert_allclose(quarters(image), MATRICES["a quarter turn clockwise"][1], atol=4)


@pytest.mark.parametrize("pixel_aspect", [Fraction(400), Fraction(1, 400)])
def test_pixels_of_an_absurd_shape_are_refused_before_memory_is_taken(tmp_path: Path, pixel_aspect: Fraction) -> None:
    write_quarters(tmp_path / "t.mkv", (512, 512), pixel_aspect=pixel_aspect)
    with pytest.raises(InputError, match=r"t: its pixels of .* make .* of 512x512 px; more than 80000000 pixels"):
        read_picture(tmp_path / "t.mkv")


@pytest.mark.parametrize(
    ("how", "resize", "reason"),
    [
        ({"matrix": (-1, 0, 0, 1)}, "crop", "its pictures were not mirrored as the video says"),
        ({"matrix": (-1, 0, 0, 1)}, "stretch", "its pictures were not mirrored as the video says"),
        ({"matrix": (0, 1, -1, 0)}, "crop", None),  # turned before, too
        ({"pixel_aspect": Fraction(4, 3)}, "crop", "its pixels of 4:3 were taken for square"),
        ({"pixel_aspect": Fraction(4, 3)}, "stretch", None),  # comes to the same
        ({"pixel_aspect": Fraction(1)}, "crop", None),
    ],
)
def test_a_video_that_was_cached_with_other_pictures_is_redone(
    tmp_path: Path, run_bits: Callable[..., Outcome], how: dict, resize: str, reason: str | None
) -> None:
    write_quarters(tmp_path / "data/t1.mp4", count=12, **how)
    write_csv(tmp_path / "data/t1.csv", Rendered(1, 12))
    assert run_bits({"resize": resize}).code == 0
    make_as_before(tmp_path / "cache")
    outcome = run_bits({"resize": resize})
    assert outcome.code == 0
    redone = [line for line in outcome.err.splitlines() if "Redoing" in line]
    assert redone == ([f"Redoing t1: {reason}"] if reason else [])
