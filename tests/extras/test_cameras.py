"""Several cameras: one trajectory, and datasets of each camera in its chunks."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from formats_support import (
    VIDEO_KEY,
    chunks,
    edit_features,
    lerobot_entry,
    truncate,
    write_episodes,
    write_joined_mp4,
    write_lerobot,
    write_recon,
)

from dino_cache import EncodedRows
from dino_cache_extras.formats import video_frames
from support import (
    SIZE,
    BitEncoder,
    Rendered,
    chunk_files,
    encoded,
    sealed,
    stream_results,
)

LEFT_KEY = "observation.images.left"
TRAJECTORIES = [Rendered(1, 40), Rendered(2, 27), Rendered(3, 33)]
IN_RECON = {"front": "images/rgb_left", "left": "images/rgb_right"}
IN_LEROBOT = {"front": VIDEO_KEY, "left": LEFT_KEY}


def left(trajectory: Rendered) -> Rendered:
    """What the other camera sees: frames with another stamp."""
    return trajectory._replace(stamp=trajectory.stamp + 8)


class BitsAlone(BitEncoder):
    """Tokens without the number of rows in the batch, which depends on what else is cached."""

    def encode(self, pixels: Any) -> Callable[[], EncodedRows]:
        rows = super().encode(pixels)()
        for values in rows.tokens.values():
            values[..., 3] = 0
        return lambda: rows


# ---------------------------------------------------------------------------------------------------------------------
# Data of two cameras
# ---------------------------------------------------------------------------------------------------------------------


def two_in_recon(folder: Path, trajectories: list[Rendered]) -> list[str]:
    names = write_recon(folder, trajectories)
    for trajectory in trajectories:
        with h5py.File(folder / f"t{trajectory.stamp}.r01.hdf5", "r+") as file:
            images = file.create_dataset("images/rgb_right", (trajectory.count,), h5py.vlen_dtype(np.uint8))
            for number, data in enumerate(left(trajectory).jpegs):
                images[number] = np.frombuffer(data, np.uint8)
    return names


def two_in_lerobot(folder: Path, trajectories: list[Rendered], version: str, codec: str) -> list[str]:
    """What write_lerobot writes, and a second camera beside it; in v3.0 two episodes share their files."""
    names = write_lerobot(folder, trajectories, version, codec)
    dtype = "image" if codec == "image" else "video"
    edit_features(folder, {LEFT_KEY: {"dtype": dtype, "shape": [*SIZE, 3]}})
    size, entries = 2 if version == "v3.0" else 1, []
    for file, first in enumerate(range(0, len(trajectories), size)):
        group, start = trajectories[first : first + size], 0
        if dtype == "image":
            add_images(sorted((folder / "data/chunk-000").iterdir())[file], group)
        else:
            beside = sorted(folder.glob(f"videos/**/{VIDEO_KEY}/**/*.mp4"))[file]
            video = Path(str(beside).replace(VIDEO_KEY, LEFT_KEY))
            write_joined_mp4(video, [left(trajectory).frames for trajectory in group], codec)
        for index, trajectory in enumerate(group, first):
            entry = lerobot_entry(index, trajectory.count, file, start)
            entries.append(entry | {key.replace(VIDEO_KEY, LEFT_KEY): value for key, value in entry.items()})
            start += trajectory.count
    write_episodes(folder, version, entries)
    return names


def add_images(path: Path, group: list[Rendered]) -> None:
    images = [{"bytes": encoded(frame, "PNG"), "path": "x.png"} for one in group for frame in left(one).frames]
    table = pyarrow.parquet.read_table(path).append_column(LEFT_KEY, pyarrow.array(images))
    pyarrow.parquet.write_table(table, path, row_group_size=50)


KINDS: dict[str, tuple[str, dict[str, str], Callable[[Path, list[Rendered]], list[str]]]] = {
    "recon": ("recon", IN_RECON, two_in_recon),
    "lerobot v2.1": ("lerobot", IN_LEROBOT, lambda folder, data: two_in_lerobot(folder, data, "v2.1", "libx264")),
    "lerobot v3.0": ("lerobot", IN_LEROBOT, lambda folder, data: two_in_lerobot(folder, data, "v3.0", "libx264")),
    "lerobot images": ("lerobot", IN_LEROBOT, lambda folder, data: two_in_lerobot(folder, data, "v3.0", "image")),
}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """Kind -> (data folder, names in the order of TRAJECTORIES)."""
    root = tmp_path_factory.mktemp("cameras")
    return {kind: (root / kind, write(root / kind, TRAJECTORIES)) for kind, (*_, write) in KINDS.items()}


def cache(data: Path, cache_dir: Path, kind: str, image_key: Any, **settings: Any) -> dict[str, Any]:
    settings = {"resize": "stretch", "format": KINDS[kind][0], "image_key": image_key, **settings}
    encoder = settings.pop("encoder", None) or BitsAlone(tokens=("cls", "patch"))
    return {result.name: result for result in stream_results(data, cache_dir, encoder, **settings)}


def check_both(cache_dir: Path, name: str, stamp: int, frame_stride: int = 1) -> int:
    """Assert that every row of both cameras holds the tokens of its own frame; returns how many rows each has."""
    rows = 0
    for (start, stop), datasets in chunks(cache_dir, name):
        index = datasets["frame_index"]
        np.testing.assert_array_equal(index, np.arange(start, stop) * frame_stride)
        for camera, its_stamp in (("front", stamp), ("left", stamp + 8)):
            cls = datasets[f"{camera}/cls_token"].astype(int)
            np.testing.assert_array_equal(cls[:, 0], np.full(len(index), its_stamp))
            np.testing.assert_array_equal(cls[:, 1] * 256 + cls[:, 2], index)
        rows += len(index)
    assert rows
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# What is stored
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frame_stride", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_each_cameras_tokens_equal_its_one_camera_cache(
    tmp_path: Path, written: dict[str, tuple[Path, list[str]]], kind: str, frame_stride: int
) -> None:
    data, names = written[kind]
    how = {"frame_stride": frame_stride, "batch_size": 5, "overlap_distance_m": 0.8}
    both = cache(data, tmp_path / "both", kind, KINDS[kind][1], **how)
    assert [str(result.error) for result in both.values() if result.error] == []
    for camera, key in KINDS[kind][1].items():
        alone = cache(data, tmp_path / camera, kind, key, **how)
        for trajectory, name in zip(TRAJECTORIES, names):
            assert both[name].spans == alone[name].spans
            found, expected = chunks(tmp_path / "both", name), chunks(tmp_path / camera, name)
            assert len(found) == len(expected) > 1
            for (span, datasets), (its_span, its_datasets) in zip(found, expected):
                assert span == its_span
                tokens = {"cls_token", "patch_tokens"}
                per_camera = {f"{one}/{token}" for one in ("front", "left") for token in tokens}
                assert datasets.keys() == (its_datasets.keys() - tokens) | per_camera
                for dataset, values in its_datasets.items():
                    other = datasets[f"{camera}/{dataset}" if dataset in tokens else dataset]
                    assert (other.dtype, other.shape) == (values.dtype, values.shape)
                    assert other.tobytes() == values.tobytes()
            check_both(tmp_path / "both", name, trajectory.stamp, frame_stride)
    for path in chunk_files(tmp_path / "both"):
        assert json.loads(sealed(path)["spec"])["image_key"] == KINDS[kind][1]


@pytest.mark.real_readers
@pytest.mark.parametrize("kind", ["recon", "lerobot v3.0", "lerobot images"])
def test_readers_in_processes_and_in_threads_make_the_same(
    tmp_path: Path, written: dict[str, tuple[Path, list[str]]], kind: str
) -> None:
    data, names = written[kind]
    for readers in ("threads", "processes"):
        results = cache(data, tmp_path / readers, kind, KINDS[kind][1], readers=readers, batch_size=5)
        assert [str(result.error) for result in results.values() if result.error] == []
    for trajectory, name in zip(TRAJECTORIES, names):
        check_both(tmp_path / "processes", name, trajectory.stamp)
        for (_, threads), (_, processes) in zip(
            chunks(tmp_path / "threads", name), chunks(tmp_path / "processes", name), strict=True
        ):
            assert {key: values.tobytes() for key, values in threads.items()} == {
                key: values.tobytes() for key, values in processes.items()
            }


def test_three_cameras_are_cut_by_number_of_frames_too(tmp_path: Path) -> None:
    (name,) = two_in_recon(tmp_path / "data", [Rendered(1, 40)])
    with h5py.File(tmp_path / "data/t1.r01.hdf5", "r+") as file:
        file["images/again"] = file["images/rgb_left"][...]
    how = {"chunk_by": "frames", "max_chunk_frames": 7, "overlap_frames": 5, "batch_size": 64}
    results = cache(tmp_path / "data", tmp_path / "cache", "recon", {**IN_RECON, "again": "images/again"}, **how)
    assert results[name].error is None
    for _, datasets in chunks(tmp_path / "cache", name):
        assert {"again/cls_token", "front/cls_token", "left/cls_token", "position"} < datasets.keys()
        np.testing.assert_array_equal(datasets["again/cls_token"], datasets["front/cls_token"])
    assert check_both(tmp_path / "cache", name, 1) == 17 * 7 + 6  # from 0, 2, ..., 34


@pytest.fixture
def video_use(monkeypatch: pytest.MonkeyPatch) -> Counter[tuple[str, str]]:
    """(what, camera) -> how often VideoFrames opened, sought or closed one of its videos, or decoded a frame of it."""
    use, real = Counter(), video_frames.open_video

    class Watched:
        def __init__(self, container: Any, camera: str):
            self._container, self._camera = container, camera
            use["opened", camera] += 1

        def decode(self, stream: Any) -> Iterator[Any]:
            for frame in self._container.decode(stream):
                use["frames", self._camera] += 1
                yield frame

        def seek(self, *arguments: Any, **how: Any) -> None:
            use["sought", self._camera] += 1
            self._container.seek(*arguments, **how)

        def close(self) -> None:
            use["closed", self._camera] += 1
            self._container.close()

    def open_video(path: Path, where: str) -> tuple[Any, Any]:
        container, stream = real(path, where)
        is_for_frames = sys._getframe(1).f_code.co_name == "_open"
        return (
            Watched(container, "left" if LEFT_KEY in str(path) else "front") if is_for_frames else container
        ), stream

    monkeypatch.setattr(video_frames, "open_video", open_video)
    return use


def test_each_video_is_opened_and_decoded_once(tmp_path: Path, video_use: Counter[tuple[str, str]]) -> None:
    names = two_in_lerobot(tmp_path / "data", [Rendered(5, 700), Rendered(6, 500)], "v2.1", "libx264")
    results = cache(tmp_path / "data", tmp_path / "cache", "lerobot v2.1", IN_LEROBOT)
    assert [result.error for result in results.values()] == [None, None]
    for camera in ("front", "left"):
        counts = [video_use[what, camera] for what in ("opened", "closed", "sought", "frames")]
        assert counts == [2, 2, 0, 1200]
    for stamp, name in zip((5, 6), names):
        check_both(tmp_path / "cache", name, stamp)


# ---------------------------------------------------------------------------------------------------------------------
# What fails
# ---------------------------------------------------------------------------------------------------------------------


def spoil_image(data: Path) -> None:
    with h5py.File(data / "t1.r01.hdf5", "r+") as file:
        file["images/rgb_right"][11] = np.frombuffer(b"broken", np.uint8)


def drop_image(data: Path) -> None:
    with h5py.File(data / "t1.r01.hdf5", "r+") as file:
        file["other"] = file["images/rgb_right"][:39]
        del file["images/rgb_right"]
        file["images/rgb_right"] = file["other"]


def spoil_column(data: Path) -> None:
    path = data / "data/chunk-000/episode_000000.parquet"
    table = pyarrow.parquet.read_table(path)
    images = table[LEFT_KEY].to_pylist()
    images[11] = {"bytes": b"broken", "path": "x.png"}
    place = table.schema.get_field_index(LEFT_KEY)
    pyarrow.parquet.write_table(table.set_column(place, LEFT_KEY, pyarrow.array(images)), path)


def shorten_video(data: Path) -> None:
    path = data / f"videos/chunk-000/{LEFT_KEY}/episode_000000.mp4"
    write_joined_mp4(path, [left(TRAJECTORIES[0]).frames[:30]], "libx264")


def cut_video(data: Path) -> None:
    truncate(data / f"videos/chunk-000/{LEFT_KEY}/episode_000000.mp4")


def in_images(folder: Path, data: list[Rendered]) -> list[str]:
    return two_in_lerobot(folder, data, "v2.1", "image")


@pytest.mark.parametrize(
    ("kind", "write", "harm", "reasons"),
    [
        ("recon", two_in_recon, spoil_image, ["camera left", "images/rgb_right[11]", "not a JPEG"]),
        ("recon", two_in_recon, drop_image, ["39 images in images/rgb_right", "40 poses"]),
        ("lerobot images", in_images, spoil_column, ["camera left: frame 11", "not a JPEG"]),
        ("lerobot v2.1", KINDS["lerobot v2.1"][2], shorten_video, ["camera left: frame 30", "no such frame"]),
        ("lerobot v2.1", KINDS["lerobot v2.1"][2], cut_video, [LEFT_KEY, "episode_000000.mp4"]),
    ],
)
@pytest.mark.parametrize("batch_size", [5, 64])
def test_a_fault_of_one_camera_fails_its_trajectory_alone_and_whole(
    tmp_path: Path, kind: str, write: Callable, harm: Callable[[Path], None], reasons: list[str], batch_size: int
) -> None:
    names = write(tmp_path / "data", TRAJECTORIES[:2])
    harm(tmp_path / "data")
    results = cache(tmp_path / "data", tmp_path / "cache", kind, KINDS[kind][1], batch_size=batch_size)
    message = str(results[names[0]].error)
    assert all(reason in message for reason in [names[0], *reasons]), message
    assert not (tmp_path / "cache" / names[0]).exists()
    assert results[names[1]].error is None
    check_both(tmp_path / "cache", names[1], 2)


def test_features_of_one_camera_that_are_not_finite_fail_the_trajectory_and_name_the_frame(tmp_path: Path) -> None:
    class Failing(BitsAlone):
        def encode(self, pixels: Any) -> Callable[[], EncodedRows]:
            rows = super().encode(pixels)()
            cls = rows.tokens["cls_token"].astype(int)
            finite = ~((cls[:, 0] == 9) & (cls[:, 2] == 13))
            return lambda: EncodedRows(rows.tokens, finite)

    names = two_in_recon(tmp_path / "data", TRAJECTORIES[:2])
    results = cache(tmp_path / "data", tmp_path / "cache", "recon", IN_RECON, encoder=Failing())
    assert "camera left images/rgb_right[13]: its features are not finite" in str(results[names[0]].error)
    assert results[names[1]].error is None
    check_both(tmp_path / "cache", names[1], 2)


@pytest.mark.parametrize("key", ["images/none", "jackal"])
def test_a_camera_that_is_not_there_is_named(tmp_path: Path, key: str) -> None:
    (name,) = two_in_recon(tmp_path / "data", TRAJECTORIES[:1])
    results = cache(tmp_path / "data", tmp_path / "cache", "recon", {"front": "images/rgb_left", "left": key})
    assert f"has no {key}; its keys are" in str(results[name].error)
