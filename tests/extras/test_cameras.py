"""Several cameras: one trajectory, and datasets of each camera in its chunks."""

from __future__ import annotations

import json
import re
import subprocess
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
import torch
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
from pydantic import ValidationError

import dino_cache
import progress_utils
from dino_cache import POSE_SHAPES, CacheSpec, CacheWindows, EncodedRows
from dino_cache_extras.formats import video_frames
from support import (
    ROOT,
    SIZE,
    BitEncoder,
    Outcome,
    Rendered,
    chunk_files,
    encoded,
    read_progress,
    sealed,
    stream_results,
    tree,
    write_gnm,
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


@pytest.mark.slow
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


# ---------------------------------------------------------------------------------------------------------------------
# From the command line
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_counts_the_frames_of_all_cameras_and_foresees_what_they_take(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    two_in_recon(tmp_path / "data", TRAJECTORIES)
    how = {"tokens": ["cls", "patch"], "max_chunk_distance_m": 20.0}
    dry = run_bits({"image_key": IN_RECON}, "--dry-run", **how)
    assert f"frames to encode: {2 * (40 + 27 + 33)}\n" in dry.out
    (foreseen,) = map(int, re.findall(r"bytes they take: (\d+)", dry.out))
    outcome = run_bits({"image_key": IN_RECON}, **how)
    assert outcome.code == 0, outcome.err
    taken = sum(path.stat().st_size for path in chunk_files(tmp_path / "cache"))
    assert abs(foreseen - taken) < 0.2 * taken
    record = read_progress(tmp_path / "cache")
    assert record["processing_config"]["image_key"] == IN_RECON
    assert {name: entry["spans"] for name, entry in record["trajectory_records"].items()} == {
        "t1": [[0, 40]],
        "t2": [[0, 27]],
        "t3": [[0, 33]],
    }
    again = run_bits({"image_key": {"left": IN_RECON["left"], "front": IN_RECON["front"]}}, **how)
    assert again.code == 0 and "Redoing" not in again.err  # in whatever order


DYING = """
import os, sys
sys.path[:0] = sys.argv[1:3]
point, config = sys.argv[3:5]
import dino_cache
from support import STAMP_SHAPE, BitEncoder
dino_cache.load_encoder = lambda spec, device: (BitEncoder(spec.image_size, spec.tokens), "bits")
dino_cache.model_shape = lambda kind: STAMP_SHAPE
owner, name, count = point.split()
owner, calls = getattr(dino_cache, owner), []
original = getattr(owner, name)
def die(*arguments, **keywords):
    calls.append(1)
    if len(calls) == int(count):
        os._exit(9)
    return original(*arguments, **keywords)
setattr(owner, name, die)
if __name__ == "__main__":
    sys.exit(dino_cache.main(["--config", config]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "point", "completed", "frame_stride"),
    [
        ("recon", "ChunkWriter write 30", 0, 1),
        ("lerobot v3.0", "ChunkWriter finish 6", 0, 3),
        ("lerobot v3.0", "ChunkStore publish 2", 1, 1),
    ],
)
def test_a_killed_run_is_taken_up_and_makes_what_an_undisturbed_one_makes(
    run_bits: Callable[..., Outcome], tmp_path: Path, kind: str, point: str, completed: int, frame_stride: int
) -> None:
    names = KINDS[kind][2](tmp_path / "data", TRAJECTORIES)
    how = {"frame_stride": frame_stride, "batch_size": 5, "max_chunk_distance_m": 0.9}
    assert run_bits({"image_key": KINDS[kind][1]}, "--dry-run", **how).code == 0  # writes the config
    command = [sys.executable, "-c", DYING, str(ROOT), str(ROOT / "tests"), point, str(tmp_path / "config.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 9, done.stderr
    record = tmp_path / "cache/progress.json"
    assert not record.exists() or len(read_progress(tmp_path / "cache")["completed_trajectories"]) <= completed
    outcome = run_bits({"image_key": KINDS[kind][1]}, **how)
    assert outcome.code == 0, outcome.err
    for trajectory, name in zip(TRAJECTORIES, names):
        check_both(tmp_path / "cache", name, trajectory.stamp, frame_stride)
    assert list((tmp_path / "cache/.staging").iterdir()) == []
    assert progress_utils.main(["verify", "--cache-dir", str(tmp_path / "cache"), "--deep"]) == 0


def test_other_cameras_are_a_changed_configuration(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    two_in_recon(tmp_path / "data", TRAJECTORIES[:1])
    assert run_bits().code == 0
    outcome = run_bits({"image_key": IN_RECON})
    assert outcome.code == 2
    assert f"image_key: images/rgb_left -> {IN_RECON}" in outcome.err
    assert run_bits({"image_key": IN_RECON}, "--force-rebuild").code == 0
    check_both(tmp_path / "cache", "t1", 1)
    other = {"front": IN_RECON["front"], "rear": IN_RECON["left"]}
    assert f"image_key: {IN_RECON} -> {other}" in run_bits({"image_key": other}).err
    assert run_bits().code == 2


def test_a_camera_whose_data_changed_is_redone_with_its_trajectory(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    names = two_in_lerobot(tmp_path / "data", TRAJECTORIES[:2], "v2.1", "libx264")
    assert run_bits({"image_key": IN_LEROBOT}).code == 0
    changed = Rendered(1, 40)._replace(stamp=13)
    video = tmp_path / f"data/videos/chunk-000/{LEFT_KEY}/episode_000000.mp4"
    write_joined_mp4(video, [changed.frames], "libx264")
    outcome = run_bits({"image_key": IN_LEROBOT})
    assert outcome.code == 0, outcome.err
    assert "1 trajectories" in outcome.err + outcome.out
    for _, datasets in chunks(tmp_path / "cache", names[0]):
        assert {*datasets["left/cls_token"][:, 0].astype(int)} == {13}
        assert {*datasets["front/cls_token"][:, 0].astype(int)} == {1}
    check_both(tmp_path / "cache", names[1], 2)


def test_a_list_names_the_cameras_and_they_are_recorded(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    two_in_lerobot(tmp_path / "data", TRAJECTORIES[:1], "v2.1", "image")
    outcome = run_bits({"image_key": [LEFT_KEY, VIDEO_KEY]})
    assert outcome.code == 0, outcome.err
    config = read_progress(tmp_path / "cache")["processing_config"]
    assert config["image_key"] == IN_LEROBOT and list(config["image_key"]) == ["front", "left"]
    assert "image_key" not in config.get("guessed_keys", ())
    check_both(tmp_path / "cache", "episode_000000", 1)
    refused = run_bits({"image_key": [LEFT_KEY, "observation.images.rear"]})
    assert refused.code == 2
    assert "image_key: observation.images.rear" in refused.err and VIDEO_KEY in refused.err


def test_a_format_of_one_camera_refuses_several(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_gnm(tmp_path / "data", TRAJECTORIES[:1])
    outcome = run_bits({"image_key": IN_RECON})
    assert outcome.code == 2
    assert "does not apply to format: gnm" in outcome.err
    assert run_bits(image_key=IN_RECON).code == 0  # for other datasets of the config
    assert {*chunks(tmp_path / "cache", "t1")[0][1]} > {"cls_token"}
    (result,) = stream_results(tmp_path / "data", tmp_path / "other", BitEncoder(), image_key=IN_RECON)
    assert "format gnm has one camera" in str(result.error)


# ---------------------------------------------------------------------------------------------------------------------
# What is made of such a cache
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def cached(run_bits: Callable[..., Outcome], tmp_path: Path) -> list[str]:
    """A cache of two cameras with patch tokens; returns the options that name it."""
    two_in_recon(tmp_path / "data", TRAJECTORIES[:2])
    assert run_bits({"image_key": IN_RECON}, tokens=["cls", "patch"]).code == 0
    return ["--cache-dir", str(tmp_path / "cache")]


def test_verify_finds_a_wrong_byte_of_any_camera_and_a_run_mends_it(
    cached: list[str], run_bits: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert progress_utils.main(["verify", *cached, "--deep"]) == 0
    path = tmp_path / "cache/t1/chunk_00001.h5"
    with h5py.File(path) as file:
        place = file["left/patch_tokens"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    assert progress_utils.main(["verify", *cached]) == 0  # reads no dataset
    assert progress_utils.main(["verify", *cached, "--deep"]) == 1
    assert "the bytes of left/patch_tokens do not match their digest" in capsys.readouterr().out
    assert progress_utils.main(["verify", *cached, "--deep", "--repair", "--yes"]) == 1
    assert run_bits({"image_key": IN_RECON}, tokens=["cls", "patch"]).code == 0
    assert progress_utils.main(["verify", *cached, "--deep"]) == 0
    check_both(tmp_path / "cache", "t1", 1)


def test_a_chunk_without_one_of_its_cameras_is_damaged(cached: list[str], tmp_path: Path) -> None:
    path = tmp_path / "cache/t1/chunk_00000.h5"
    with h5py.File(path, "r+") as file:
        del file["left"]
    assert progress_utils.main(["verify", *cached]) == 1


def test_the_record_is_made_anew_from_the_chunks(
    cached: list[str], run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    record = read_progress(tmp_path / "cache")
    (tmp_path / "cache/progress.json").unlink()
    assert progress_utils.main(["rebuild", *cached, "--yes"]) == 0
    rebuilt = read_progress(tmp_path / "cache")
    for key in ("trajectory_records", "trajectory_checksums", "processing_config", "specs"):
        assert rebuilt[key] == record[key]
    before = tree(tmp_path / "cache/t1")
    assert run_bits({"image_key": IN_RECON}, tokens=["cls", "patch"]).code == 0
    assert tree(tmp_path / "cache/t1") == before


def test_a_flat_export_has_columns_of_each_camera(cached: list[str], tmp_path: Path) -> None:
    output = tmp_path / "flat.h5"
    assert progress_utils.main(["export", *cached, "--to", "flat", "--camera", "left", "-o", str(output)]) == 2
    assert progress_utils.main(["export", *cached, "--to", "flat", "-o", str(output)]) == 0
    with h5py.File(output) as file:
        tokens = {f"{camera}.{name}" for camera in ("front", "left") for name in ("cls_token", "patch_tokens")}
        assert {*file} == {*tokens, "ep_len", "ep_offset", "ep_idx", "step_idx", "delta", *POSE_SHAPES}
        numbers = np.concatenate([np.arange(40), np.arange(27)])
        np.testing.assert_array_equal(file["frame_index"], numbers)
        for camera, stamps in (("front", (1, 2)), ("left", (9, 10))):
            expected = np.stack([np.repeat(stamps, (40, 27)), numbers // 256, numbers % 256], 1)
            np.testing.assert_array_equal(file[f"{camera}.cls_token"][:, :3], expected)
            np.testing.assert_array_equal(file[f"{camera}.patch_tokens"][:, 1, 2, :3], expected)
    assert progress_utils.main(["export", *cached, "--to", "flat", "--force", "-o", str(output)]) == 0


def test_a_vint_export_is_of_the_camera_asked_for(
    cached: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = ["export", *cached, "--to", "vint", "-o", str(tmp_path / "pt")]
    for asked in ([], ["--camera", "rear"]):
        assert progress_utils.main([*export, *asked]) == 2
        assert "front, left" in capsys.readouterr().err
    assert progress_utils.main([*export, "--camera", "left"]) == 0
    read = torch.load(tmp_path / "pt" / "t1_00000.pt")
    assert {*read["features"][:, 0].tolist()} == {9}
    assert read["features"][:, 2].tolist() == read["indices"]


def test_a_camera_is_not_asked_for_where_there_is_one(
    run_bits: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_gnm(tmp_path / "data", TRAJECTORIES[:1])
    assert run_bits().code == 0
    export = ["export", "--cache-dir", str(tmp_path / "cache"), "--to", "vint", "-o", str(tmp_path / "pt")]
    assert progress_utils.main([*export, "--camera", "front"]) == 2
    assert "one camera, without a name" in capsys.readouterr().err
    assert progress_utils.main(export) == 0


def test_trajectories_of_other_cameras_are_not_exported_together(
    run_bits: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_in_recon(tmp_path / "data", TRAJECTORIES[:1])
    assert run_bits().code == 0
    two_in_recon(tmp_path / "data", TRAJECTORIES[1:2])
    assert run_bits({"image_key": IN_RECON}, "--yes").code == 0
    export = ["export", "--cache-dir", str(tmp_path / "cache"), "--allow-mixed", "--to", "flat"]
    assert progress_utils.main([*export, "-o", str(tmp_path / "flat.h5")]) == 2
    assert "front, left or one camera" in capsys.readouterr().err


def test_windows_have_every_cameras_tokens(cached: list[str], tmp_path: Path) -> None:
    windows = CacheWindows(tmp_path / "cache", window=4, tokens=("cls",))
    with h5py.File(chunk_files(tmp_path / "cache")[0]) as file:
        for camera in ("front", "left"):
            np.testing.assert_array_equal(windows[0][f"{camera}/cls_token"], file[f"{camera}/cls_token"][:4])


def test_a_report_shows_the_first_camera_and_remarks_on_all(
    cached: list[str], run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    with h5py.File(tmp_path / "data/t2.r01.hdf5", "r+") as file:
        for row in range(5, 27):
            file["images/rgb_right"][row] = file["images/rgb_right"][4]
    assert run_bits({"image_key": IN_RECON}, "--force-rebuild", tokens=["cls", "patch"]).code == 0
    assert progress_utils.main(["report", *cached, "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "similarity of camera front" in page and "t1, camera front" in page
    assert "left: frozen camera? frames 4 to " in page and "front: frozen" not in page
    assert "cannot be shown" not in page


# ---------------------------------------------------------------------------------------------------------------------
# Their names
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        (["observation.images.front", "observation.images.left"], ["front", "left"]),
        (["/cam_front/image_raw/compressed", "/cam_left/image_raw/compressed"], ["cam_front", "cam_left"]),
        (["images/rgb_right", "images/rgb_left"], ["rgb_left", "rgb_right"]),
        (["a.b/c.x", "a.d.x", "a.e.f.x"], ["b_c", "d", "e_f"]),
        (["left", "right"], ["left", "right"]),
        (["a.left.left", "a.right.left"], ["left", "right"]),
        (["front_left/image", "front_right/image"], ["front_left", "front_right"]),
    ],
)
def test_a_list_names_cameras_by_what_tells_their_keys_apart(keys: list[str], names: list[str]) -> None:
    assert list(CacheSpec(image_key=keys).image_key) == names
    assert sorted(CacheSpec(image_key=keys).image_key.values()) == sorted(keys)


@pytest.mark.parametrize(
    ("image_key", "reason"),
    [
        (["image", "image.left"], "give no names"),
        (["a.left", "a.left"], "give no names"),
        (["a.b_c", "a.b.c"], "give no names"),
        (["a.rear view", "a.front"], "give no names"),
        (["a"], "two or more"),
        ([], "two or more"),
        (["a", 7], "two or more"),
        ({}, "names no camera"),
        ({"front left": "a"}, "letters, digits, _ and -"),
        ({"front/left": "a"}, "letters, digits, _ and -"),
        ({1: "a"}, "letters, digits, _ and -"),
        ({"": "a"}, "letters, digits, _ and -"),
        ({"position": "a"}, "a dataset of a chunk has it"),
        ({"extra": "a", "left": "b"}, "a dataset of a chunk has it"),
        ({"front": None}, "needs a key"),
        ({"front": ""}, "needs a key"),
        ({"front": "a", "left": "a"}, "front and left are both a"),
        (7, "one for each camera"),
    ],
)
def test_cameras_that_cannot_be_told_apart_are_refused(image_key: Any, reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        CacheSpec(image_key=image_key)


def test_the_order_of_cameras_makes_no_other_cache_and_their_names_do() -> None:
    one, other = CacheSpec(image_key={"b": "x", "a": "y"}), CacheSpec(image_key={"a": "y", "b": "x"})
    assert one.to_json() == other.to_json() and json.dumps(one.to_json()) == json.dumps(other.to_json())
    assert one.fingerprint("w") == other.fingerprint("w") != CacheSpec(image_key={"a": "x", "b": "y"}).fingerprint("w")
    assert dino_cache.data_keys(one) == dino_cache.data_keys(other) == dino_cache.DataKeys.of(one.to_json())
    assert dino_cache.encoder_key(one, "cpu") == dino_cache.encoder_key(CacheSpec(), "cpu")


@pytest.mark.parametrize("kind", ["recon", "lerobot v3.0"])
def test_each_cameras_tokens_are_cut_anew_and_the_frames_between_encoded(
    run_bits: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Every third frame is stored; then every second one is wanted, of which every third is."""
    names = KINDS[kind][2](tmp_path / "data", TRAJECTORIES)
    keys, cut = {"image_key": KINDS[kind][1]}, {"tokens": ["cls", "patch"], "batch_size": 5}
    assert run_bits(keys, frame_stride=3, max_chunk_distance_m=3.0, **cut).code == 0
    loaded: list[BitEncoder] = []

    def load(spec: CacheSpec, device: str) -> tuple[BitEncoder, str]:
        loaded.append(BitEncoder(spec.image_size, spec.tokens))
        return loaded[-1], "bits"

    monkeypatch.setattr(dino_cache, "load_encoder", load)
    outcome = run_bits(keys, "--recut", frame_stride=2, max_chunk_distance_m=1.9, **cut)
    assert outcome.code == 0, outcome.err
    wanted = [set(range(0, one.count, 2)) - set(range(0, one.count, 3)) for one in TRAJECTORIES]
    assert sum(loaded[0].batch_sizes) == 2 * sum(map(len, wanted))
    for trajectory, name in zip(TRAJECTORIES, names):
        check_both(tmp_path / "cache", name, trajectory.stamp, frame_stride=2)
    loaded.clear()
    assert run_bits(keys, "--recut", frame_stride=4, max_chunk_distance_m=4.0, **cut).code == 0
    for trajectory, name in zip(TRAJECTORIES, names):
        check_both(tmp_path / "cache", name, trajectory.stamp, frame_stride=4)
    assert loaded == []
    assert progress_utils.main(["verify", "--cache-dir", str(tmp_path / "cache"), "--deep"]) == 0
