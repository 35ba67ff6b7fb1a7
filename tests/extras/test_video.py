"""Videos with tables of poses: what decoding costs, which frames come out, which poses are read."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from formats_support import FPS, cache, chunks, write_lerobot, write_mp4, write_videos
from hypothesis import given, settings
from hypothesis import strategies as st

from dino_cache import CacheSpec, EncodedRows, Hooks, InputError, format_named
from dino_cache_extras.commands import report
from dino_cache_extras.formats import video_frames
from dino_cache_extras.formats.pose_files import read_pose_table
from support import BitEncoder, Rendered, check_stamps, stream_results

# ---------------------------------------------------------------------------------------------------------------------
# What they cost
# ---------------------------------------------------------------------------------------------------------------------


class Watched:
    """Stands for a container that counts."""

    opened = closed = seeks = frames = 0

    def __init__(self, container: Any):
        self._container = container
        Watched.opened += 1

    def decode(self, stream: Any) -> Iterator[Any]:
        for frame in self._container.decode(stream):
            Watched.frames += 1
            yield frame

    def seek(self, *arguments: Any, **how: Any) -> None:
        Watched.seeks += 1
        self._container.seek(*arguments, **how)

    def close(self) -> None:
        Watched.closed += 1
        self._container.close()


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    """Counts what VideoFrames does with its containers."""
    real = video_frames.open_video
    Watched.opened = Watched.closed = Watched.seeks = Watched.frames = 0

    def open_video(path: Path, where: str) -> tuple[Any, Any]:
        container, stream = real(path, where)
        is_for_frames = sys._getframe(1).f_code.co_name == "_open"
        return (Watched(container) if is_for_frames else container), stream

    monkeypatch.setattr(video_frames, "open_video", open_video)
    return Watched


@pytest.mark.slow
def test_a_long_video_is_decoded_once_and_little_of_it_is_held(tmp_path: Path, watched: type[Watched]) -> None:
    long = Rendered(5, 3000)
    names = write_videos(tmp_path / "data", [long])
    ahead, encoded = [], []

    def on_encoded(count: int) -> None:
        encoded.append(count)
        ahead.append(watched.frames - sum(encoded))

    results = cache(tmp_path / "data", tmp_path / "cache", "video and tum", hooks=Hooks(on_encoded=on_encoded))
    assert [result.error for result in results.values()] == [None]
    assert (watched.opened, watched.closed, watched.seeks, watched.frames) == (1, 1, 0, 3000)
    assert max(ahead) < 250  # 16 groups of 8 are read ahead, and some wait for the encoder, however long the video
    assert check_stamps(tmp_path / "cache", names[0], 5) > 3000


def test_episodes_in_one_file_cost_a_seek_each_and_no_descriptor_stays_open(
    tmp_path: Path, watched: type[Watched]
) -> None:
    episodes = [Rendered(number % 16, 6) for number in range(120)]
    names = write_lerobot(tmp_path / "data", episodes, "v3.0", "libx264", together=60)
    before, most = len(os.listdir("/proc/self/fd")), []
    how = {"resize": "stretch", "format": "lerobot"}
    for result in stream_results(tmp_path / "data", tmp_path / "cache", BitEncoder(), **how):
        assert result.error is None
        most.append(len(os.listdir("/proc/self/fd")) - before)
    assert max(most) < 50
    assert len(os.listdir("/proc/self/fd")) - before <= 4
    assert watched.opened == watched.closed == 120
    assert watched.seeks <= 120
    assert watched.frames <= 120 * 6 + 2 * (6 + 12 + 18)  # the first four of a file begin within two seconds: no seek
    for episode, name in list(zip(episodes, names))[::7]:
        assert check_stamps(tmp_path / "cache", name, episode.stamp) >= 6


def test_a_single_frame_late_in_a_video_costs_a_seek(tmp_path: Path, watched: type[Watched]) -> None:
    (name,) = write_videos(tmp_path / "data", [Rendered(5, 300)])
    spec = CacheSpec(image_size=(28, 42), resize="stretch")
    for number in (299, 100):
        trajectory = format_named("video").locate(tmp_path / "data", name)
        pixels = report.read_frame(trajectory, number, spec)
        assert BitEncoder().stamps(pixels[None]).tolist() == [[5, number // 256, number % 256]]
    assert (watched.opened, watched.closed, watched.seeks) == (2, 2, 2)
    assert watched.frames <= 2 * (12 + 4)  # a key frame every 12 frames, and those shown before it but decoded after


# ---------------------------------------------------------------------------------------------------------------------
# Which frames come out
# ---------------------------------------------------------------------------------------------------------------------


def test_a_video_below_other_folders_is_located_as_it_was_found(tmp_path: Path) -> None:
    for folder, how in (("a/b", "csv"), ("a", "tum"), ("a/t1", "tum")):
        write_videos(tmp_path / folder, [Rendered(1, 2)], how)
    found = list(format_named("video").find(tmp_path, CacheSpec()))
    assert [trajectory.name for trajectory in found] == ["a/t1", "a/b/t1", "a/t1/t1"]
    assert [format_named("video").locate(tmp_path, trajectory.name) for trajectory in found] == found


@pytest.mark.parametrize("stop_after", [None, 20])
def test_a_video_is_closed_when_its_trajectory_fails_or_the_run_stops(
    tmp_path: Path, watched: type[Watched], stop_after: int | None
) -> None:
    write_videos(tmp_path / "data", [Rendered(1, 100), Rendered(2, 20)])
    before, encoded = len(os.listdir("/proc/self/fd")), []
    if stop_after is None:
        data = (tmp_path / "data/t1.mp4").read_bytes()
        write_mp4(tmp_path / "data/t1.mp4", Rendered(1, 100).frames[:70])
        times = "\n".join(f"{number / FPS} {number} 0 0 0 0 0 1" for number in range(70))
        (tmp_path / "data/t1.txt").write_text(times)
        assert len(data) > 0
    hooks = Hooks(should_stop=lambda: stop_after is not None and sum(encoded) > stop_after, on_encoded=encoded.append)
    bad = NonFinite(at=30) if stop_after is None else BitEncoder()
    how = {"resize": "stretch", "format": "video", "hooks": hooks}
    results = {result.name: result for result in stream_results(tmp_path / "data", tmp_path / "cache", bad, **how)}
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) <= before + 1
    if stop_after is None:
        assert "not finite" in str(results["t1"].error)
        assert results["t2"].error is None
    else:
        assert results == {}


class NonFinite(BitEncoder):
    """Finds the features of the first trajectory's frame number `at` not finite."""

    def __init__(self, at: int):
        super().__init__()
        self._at = at

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        rows = super().encode(pixels)()
        number = rows.tokens["cls_token"][:, 1] * 256 + rows.tokens["cls_token"][:, 2]
        finite = ~((number == self._at) & (rows.tokens["cls_token"][:, 0] == 1))
        return lambda: EncodedRows(rows.tokens, finite)


def test_the_reason_is_that_of_the_frame_at_fault_whichever_thread_meets_it(tmp_path: Path) -> None:
    write_mp4(tmp_path / "t.mp4", Rendered(1, 20).frames)
    times = [number / FPS if number < 9 else number / FPS + 0.05 for number in range(19)]
    frames = video_frames.VideoFrames(tmp_path / "t.mp4", "t", range(19), times, 0.025)
    for numbers in ([16, 17], [8, 9], [0, 1]):  # the last group comes first
        with pytest.raises(InputError, match=r"frame 9 .*no frame within"):
            list(frames.read(numbers))
        frames.close()


def test_a_video_of_more_pixels_than_are_decoded_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_videos(tmp_path / "data", [Rendered(1, 20)])
    monkeypatch.setattr(video_frames, "MAX_FRAME_PIXELS", 64 * 48 - 1)
    results = cache(tmp_path / "data", tmp_path / "cache", "video and tum")
    assert "cannot read the video" in str(results["t1"].error)


@pytest.mark.parametrize("first", range(22, 28))
def test_a_late_first_frame_is_found_also_where_key_frames_are_decoded_early(tmp_path: Path, first: int) -> None:
    """Key frame 24 is decoded before frames 22 and 23 are shown: a seek by the time of decoding misses them."""
    write_mp4(tmp_path / "t.mp4", Rendered(1, 40).frames)
    frames = video_frames.VideoFrames(tmp_path / "t.mp4", "t", [first], [first / FPS], 0.025)
    (image,) = frames.read([first])
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    assert BitEncoder().stamps(pixels).tolist() == [[1, 0, first]]


def test_a_video_that_is_to_be_turned_is_turned(tmp_path: Path) -> None:
    write_videos(tmp_path / "data", [Rendered(4, 20)])
    write_mp4(tmp_path / "data/t4.mp4", Rendered(4, 20).frames, rotation=90)
    results = cache(tmp_path / "data", tmp_path / "cache", "video and tum")
    assert results["t4"].error is None
    check_stamps(tmp_path / "cache", "t4", 4)


def test_frames_outside_the_poses_are_left_out_and_poses_are_interpolated(tmp_path: Path) -> None:
    write_mp4(tmp_path / "data/t1.mp4", Rendered(1, 30).frames)
    # yaw goes from 3 rad over pi to -3 rad: half-way it is pi
    rows = ["time,tx,ty,yaw", "0.45,0,1,3", "0.65,2,1,-3", "2.05,16,1,-3"]
    (tmp_path / "data/t1.csv").write_text("\n".join(rows))
    results = cache(
        tmp_path / "data", tmp_path / "cache", "video and tum", position_scale=0.5, max_chunk_distance_m=50.0
    )
    assert results["t1"].error is None
    ((_, datasets),) = chunks(tmp_path / "cache", "t1")
    assert datasets["frame_index"].tolist() == list(range(5, 21))
    assert datasets["cls_token"][:, 2].tolist() == list(range(5, 21))  # the frames that reached the encoder
    np.testing.assert_allclose(datasets["position"][:3], [[0.25, 0.5], [0.75, 0.5], [1.25, 0.5]], atol=1e-9)
    turn = (2 * np.pi - 6) / 4  # a quarter of the shorter way
    np.testing.assert_allclose(datasets["yaw"][:3], [3 + turn, 3 + 3 * turn - 2 * np.pi, -3], atol=1e-9)
    np.testing.assert_allclose(datasets["travelled_distance"][1:3], [0.5, 1.0], atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Tables of poses
# ---------------------------------------------------------------------------------------------------------------------


NUMBERS = st.floats(-1e6, 1e6)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(1, 1000), NUMBERS, NUMBERS, st.floats(-3.1, 3.1)), min_size=1, max_size=20))
def test_csv_and_tum_hold_the_same_poses(rows: list[tuple[int, float, float, float]]) -> None:
    times = np.cumsum([gap / 100 for gap, *_ in rows])
    with tempfile.TemporaryDirectory() as folder:
        table, tum = Path(folder) / "a.csv", Path(folder) / "a.txt"
        lines = [f"{yaw!r};{t!r};{y!r};{x!r}".replace(";", ",") for t, (_, x, y, yaw) in zip(times.tolist(), rows)]
        table.write_text("\r\n".join(["yaw,timestamp,y,x", *lines]))
        lines = [
            f"{t!r}\t{x!r} {y!r} 0 0 0 {np.sin(yaw / 2).item()!r} {np.cos(yaw / 2).item()!r}"
            for t, (_, x, y, yaw) in zip(times.tolist(), rows)
        ]
        tum.write_text("\n".join(["# timestamp tx ty tz qx qy qz qw", "", *lines]))
        by_name, by_place = (read_pose_table(path, "t") for path in (table, tum))
    for key, column in zip(("timestamp", "x", "y", "yaw"), (times, *zip(*(row[1:] for row in rows)))):
        np.testing.assert_array_equal(by_name[key], column)
        np.testing.assert_allclose(by_place[key], column, rtol=0, atol=1e-9)


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=200), st.sampled_from([".csv", ".txt"]))
def test_any_bytes_for_poses_are_read_or_refused(data: bytes, suffix: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a{suffix}"
        path.write_bytes(data)
        try:
            table = read_pose_table(path, "t")
        except InputError as error:
            assert str(error).startswith(f"t/a{suffix}: ")
        else:
            assert all(np.isfinite(column).all() for column in table.values())
