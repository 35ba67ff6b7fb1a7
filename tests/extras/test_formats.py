"""Every format against the GNM folders of the same trajectories, and against faults in the data of strangers."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
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
    AV1_ENCODER,
    FPS,
    VIDEO_KEY,
    WRITERS,
    BitEncoder,
    Rendered,
    lerobot_entry,
    put_index_first,
    write_episodes,
    write_gnm,
    write_joined_mp4,
    write_lerobot,
    write_mp4,
    write_recon,
    write_tum,
    write_videos,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import dino_cache
import progress_utils
from conftest import Outcome
from dino_cache import (
    CacheSpec,
    DataKeys,
    DinoEncoder,
    EncodedRows,
    Hooks,
    InputError,
    ModelShape,
    Trajectory,
    TrajectoryResult,
    build_model,
    format_named,
    open_source,
    plan_frame_chunks,
)
from dino_cache_extras.commands import report
from dino_cache_extras.formats import lerobot, recon, video, video_frames
from progress_utils import RefusedError
from support import (
    ROOT,
    check_stamps,
    chunk_files,
    no_hang,
    read_chunk,
    read_progress,
    stream_results,
    wait_until,
)

TRAJECTORIES = [Rendered(1, 40), Rendered(2, 27), Rendered(3, 33)]
OTHERS = [name for name in WRITERS if name != "gnm"]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """Kind -> (data folder, names in the order of TRAJECTORIES)."""
    root = tmp_path_factory.mktemp("formats")
    return {kind: (root / kind, write(root / kind, TRAJECTORIES)) for kind, (_, write) in WRITERS.items()}


def cache(data: Path, cache_dir: Path, kind: str, **settings: Any) -> dict[str, TrajectoryResult]:
    settings = {"resize": "stretch", "format": WRITERS[kind][0], **settings}
    return {result.name: result for result in stream_results(data, cache_dir, BitEncoder(), **settings)}


def chunks(cache_dir: Path, name: str) -> list[tuple[tuple[int, int], dict[str, np.ndarray]]]:
    """(start, stop) and datasets of a trajectory's chunks."""
    read = [read_chunk(path) for path in sorted((cache_dir / name).glob("*.h5"))]
    return [((attributes["start"], attributes["stop"]), datasets) for attributes, datasets in read]


@pytest.mark.parametrize("frame_stride", [1, 3])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_format_gives_the_chunks_that_gnm_folders_give(
    tmp_path: Path, written: dict[str, tuple[Path, list[str]]], kind: str, frame_stride: int
) -> None:
    for which in ("gnm", kind):
        results = cache(written[which][0], tmp_path / which, which, frame_stride=frame_stride)
        assert [str(result.error) for result in results.values() if result.error] == []
    for trajectory, gnm_name, name in zip(TRAJECTORIES, written["gnm"][1], written[kind][1]):
        expected, found = chunks(tmp_path / "gnm", gnm_name), chunks(tmp_path / kind, name)
        assert len(expected) > 1
        assert [span for span, _ in found] == [span for span, _ in expected]
        for (_, right), (_, datasets) in zip(expected, found):
            for key in ("frame_index", "position", "travelled_distance"):
                np.testing.assert_array_equal(datasets[key], right[key])
            np.testing.assert_allclose(datasets["yaw"], right["yaw"], rtol=0, atol=1e-12)  # quaternions round
        check_stamps(tmp_path / kind, name, trajectory.stamp, frame_stride)


@pytest.mark.parametrize("kind", WRITERS)
def test_a_trajectory_is_a_small_value_that_another_process_can_open(
    written: dict[str, tuple[Path, list[str]]], kind: str
) -> None:
    found = list(format_named(WRITERS[kind][0]).find(written[kind][0], CacheSpec()))
    data = pickle.dumps(found)
    assert len(data) < 1000 * len(found)
    copies = pickle.loads(data)
    assert copies == found
    lerobot._LEROBOT_DATASETS.clear()  # as in a process that has not listed them
    poses = open_source(copies[1], DataKeys()).poses(required=True)
    np.testing.assert_array_equal(poses.position, TRAJECTORIES[1].position)


def test_tokens_of_a_real_model_agree_within_the_compression(
    tmp_path: Path, written: dict[str, tuple[Path, list[str]]]
) -> None:
    spec = CacheSpec(dino_model_type="small", weights="random", image_size=(28, 42), precision="fp32")
    model = build_model(spec)
    shape = ModelShape(14, 384, 0)
    features = {}
    for kind in ("gnm", "recon", "lerobot v3.0 h264", "video and tum"):
        encoder = DinoEncoder(model if kind == "gnm" else build_model(spec), spec, "cpu")
        encoder.image_size, encoder.tokens = (28, 42), ("cls",)
        skip = written[kind][1][1:]
        how = {"format": WRITERS[kind][0], "skip": skip, "shape": shape, "resize": "stretch"}
        (result,) = stream_results(written[kind][0], tmp_path / kind, encoder, **how)
        assert result.error is None
        (_, datasets), *_ = chunks(tmp_path / kind, written[kind][1][0])
        features[kind] = datasets["cls_token"].astype(float)
    right = features["gnm"]
    assert np.abs(right[0] - right[5]).max() > 0.1  # two frames do differ
    np.testing.assert_array_equal(features["recon"], right)  # the same JPEG bytes
    for kind in ("lerobot v3.0 h264", "video and tum"):
        cosine = (
            (features[kind] * right).sum(1) / np.linalg.norm(features[kind], axis=1) / np.linalg.norm(right, axis=1)
        )
        assert cosine.min() > 0.99


@pytest.mark.parametrize("kind", OTHERS)
def test_frames_and_poses_belong_together_after_a_stop_and_a_resume(
    tmp_path: Path, written: dict[str, tuple[Path, list[str]]], kind: str
) -> None:
    (data, names), encoded = written[kind], []
    hooks = Hooks(should_stop=lambda: sum(encoded) >= 56, on_encoded=encoded.append)  # in the second trajectory
    how = {"resize": "stretch", "format": WRITERS[kind][0]}
    first = [result.name for result in stream_results(data, tmp_path / "cache", BitEncoder(), hooks=hooks, **how)]
    assert first == names[:1]
    rest = [result.name for result in stream_results(data, tmp_path / "cache", BitEncoder(), skip=first, **how)]
    assert rest == names[1:]
    for trajectory, name in zip(TRAJECTORIES, names):
        assert check_stamps(tmp_path / "cache", name, trajectory.stamp) >= trajectory.count


# ---------------------------------------------------------------------------------------------------------------------
# Videos: what they cost.
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


@pytest.mark.parametrize("kind", ["gnm", *OTHERS])
def test_a_trajectory_is_located_as_it_was_found(written: dict[str, tuple[Path, list[str]]], kind: str) -> None:
    (data, names), kind = written[kind], format_named(WRITERS[kind][0])
    assert [kind.locate(data, name) for name in names] == list(kind.find(data, CacheSpec()))


def test_a_video_below_other_folders_is_located_as_it_was_found(tmp_path: Path) -> None:
    for folder, how in (("a/b", "csv"), ("a", "tum"), ("a/t1", "tum")):
        write_videos(tmp_path / folder, [Rendered(1, 2)], how)
    found = list(format_named("video").find(tmp_path, CacheSpec()))
    assert [trajectory.name for trajectory in found] == ["a/t1", "a/b/t1", "a/t1/t1"]
    assert [format_named("video").locate(tmp_path, trajectory.name) for trajectory in found] == found


@pytest.mark.parametrize("format_name", ["recon", "lerobot", "video"])
def test_a_trajectory_that_is_not_there_is_not_located(tmp_path: Path, format_name: str) -> None:
    with pytest.raises(InputError, match="t1"):
        format_named(format_name).locate(tmp_path, "t1")


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
# Faults: the trajectory fails with its reason, the others are done.
# ---------------------------------------------------------------------------------------------------------------------

FIRST, SECOND = Rendered(1, 40), Rendered(2, 27)
V21 = ("data/chunk-000/episode_000000.parquet", f"videos/chunk-000/{VIDEO_KEY}/episode_000000.mp4")
V30 = ("data/chunk-000/file-000.parquet", f"videos/{VIDEO_KEY}/chunk-000/file-000.mp4")


def truncate(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def truncate_after_index(path: Path) -> None:
    put_index_first(path)
    truncate(path, 0.8)


def edit_table(path: Path, edit: Callable[[pyarrow.Table], pyarrow.Table]) -> None:
    pyarrow.parquet.write_table(edit(pyarrow.parquet.read_table(path)), path)


def set_column(path: Path, key: str, change: Callable[[np.ndarray], Any]) -> None:
    def edit(table: pyarrow.Table) -> pyarrow.Table:
        values = change(np.array(table[key].to_pylist()))
        column = pyarrow.array(values.tolist(), table.schema.field(key).type)
        return table.set_column(table.schema.get_field_index(key), key, column)

    edit_table(path, edit)


def changed(values: np.ndarray, row: int, value: Any) -> np.ndarray:
    values[row] = value
    return values


def edit_hdf5(path: Path, edit: Callable[[h5py.File], Any]) -> None:
    with h5py.File(path, "r+") as file:
        edit(file)


def move_away(file: h5py.File, folder: Path) -> None:
    with h5py.File(folder / "secret.h5", "w") as other:
        file.copy("images", other)
    del file["images"]
    file["images"] = h5py.ExternalLink("secret.h5", "images")


RECON, V, PQ, TUM, CSV = "recon", "lerobot v2.1 h264", "lerobot v2.1 images", "video and tum", "video and csv"
H5, YAW, POSITION = "t1.r01.hdf5", "observation.filtered_heading", "observation.filtered_position"
HARMS: list[tuple[str, Callable[[Path], Any], list[str]]] = [  # the file, a harm to it, what the reason says
    (RECON, truncate, [H5, "truncated"]),
    (RECON, lambda p: p.write_bytes(b"not HDF5" * 100), [H5, "cannot read it"]),
    (RECON, lambda p: p.write_bytes(b""), [H5, "cannot read it"]),
    (RECON, lambda p: edit_hdf5(p, lambda f: f.pop("jackal/yaw")), [H5, "no jackal/yaw", "images/rgb_left"]),
    (RECON, lambda p: put(p, "jackal/yaw", np.zeros(39)), [H5, "jackal/yaw", "(39,)", "(40,)"]),
    (RECON, lambda p: put(p, "jackal/position", np.full((40, 2), np.inf)), ["jackal/position[0, 0]", "inf"]),
    (RECON, lambda p: put(p, "images/rgb_left", np.array([b"x"] * 39)), [H5, "39 images", "40 poses"]),
    (RECON, lambda p: put(p, "images/rgb_left", np.array([b"junk"] * 40)), ["images/rgb_left[0]", "cannot decode"]),
    (RECON, lambda p: put(p, "images/rgb_left", np.zeros(40)), [H5, "float64"]),
    (RECON, lambda p: edit_hdf5(p, lambda f: move_away(f, p.parent)), [H5, "lies in another file"]),
    (V, lambda d: truncate(d / V21[0]), [V21[0], "never finalised"]),
    (V, lambda d: (d / V21[0]).write_bytes(b""), [V21[0], "not a whole parquet file"]),
    (V, lambda d: (d / V21[0]).unlink(), [V21[0], "No such file"]),
    (V, lambda d: edit_table(d / V21[0], lambda t: t.drop_columns([YAW])), [V21[0], f"no column {YAW}", "frame_index"]),
    (V, lambda d: edit_table(d / V21[0], lambda t: t.slice(0, 30)), ["30 rows", "expected 40"]),
    (V, lambda d: set_column(d / V21[0], POSITION, lambda p: changed(p, 7, [np.nan, 0])), [f"{POSITION}[7, 0]", "nan"]),
    (V, lambda d: set_column(d / V21[0], "frame_index", lambda n: n + 1), ["frame_index", "0 to 39"]),
    (V, lambda d: set_column(d / V21[0], "timestamp", lambda t: t + 0.05), ["frame 0", "within 0.025 s"]),
    (V, lambda d: set_column(d / V21[0], "timestamp", lambda t: changed(t, 9, 0.8)), ["do not rise", "row 9"]),
    (V, lambda d: truncate(d / V21[1]), ["episode_000000.mp4", "cannot read the video"]),
    (V, lambda d: truncate_after_index(d / V21[1]), ["episode_000000.mp4", "cannot read the video"]),
    (V, lambda d: (d / V21[1]).write_bytes(b"#EXTM3U\n#EXT-X-VERSION:3\n"), ["cannot read the video"]),
    (V, lambda d: (d / V21[1]).unlink(), [V21[1], "No such file"]),
    (V, lambda d: write_mp4(d / V21[1], FIRST.frames[:31]), ["frame 31", "no such frame", "3.000 s"]),
    (PQ, lambda d: truncate(d / V21[0]), [V21[0], "never finalised"]),
    (
        PQ,
        lambda d: set_column(d / V21[0], VIDEO_KEY, lambda c: changed(c, 5, image(b""))),
        ["frame 5", "no image bytes"],
    ),
    (
        PQ,
        lambda d: set_column(d / V21[0], VIDEO_KEY, lambda c: changed(c, 5, image(b"x"))),
        ["frame 5", "cannot decode"],
    ),
    (TUM, lambda d: truncate(d / "t1.mp4"), ["t1.mp4", "cannot read the video"]),
    (TUM, lambda d: (d / "t1.mp4").write_bytes(b""), ["t1.mp4", "cannot read the video"]),
    (TUM, lambda d: (d / "t1.txt").write_text("# nothing\n"), [" t1.txt:", "no poses"]),
    (TUM, lambda d: (d / "t1.txt").write_text("0 1 2\n1 2 3\n"), [" t1.txt:", "qw"]),
    (TUM, lambda d: (d / "t1.txt").write_bytes(b"\xff\xfe\x00"), [" t1.txt:", "not a text file"]),
    (TUM, lambda d: (d / "t1.txt").write_text(tum(1.6e9, 1.7e9)), ["no frame lies between", "0.000 to 3.900 s"]),
    (TUM, lambda d: (d / "t1.txt").write_text(tum(0, 0)), [" t1.txt:", "do not rise", "pose 1"]),
    (TUM, lambda d: (d / "t1.txt").write_text(tum(0, 9, qw=0)), [" t1.txt:", "quaternion 0"]),
    (CSV, lambda d: (d / "t1/poses.csv").write_text("timestamp,x,y\n0,1,2\n"), ["t1/poses.csv", "no column", "qw"]),
    (CSV, lambda d: (d / "t1/poses.csv").write_text("timestamp,x,y,yaw\n0,1,nan,2\n"), ["t1/poses.csv", "y[0]", "nan"]),
]


def put(path: Path, key: str, values: np.ndarray) -> None:
    def edit(file: h5py.File) -> None:
        del file[key]
        file[key] = values

    edit_hdf5(path, edit)


def image(data: bytes) -> dict[str, Any]:
    return {"bytes": data, "path": "x.png"}


def tum(first_s: float, last_s: float, qw: int = 1) -> str:
    return f"{first_s} 0 0 0 0 0 0 {qw}\n{last_s} 9 0 0 0 0 0 1\n"


@pytest.mark.parametrize(("kind", "harm", "reasons"), HARMS)
def test_a_broken_trajectory_fails_alone_and_says_why(
    tmp_path: Path, kind: str, harm: Callable[[Path], Any], reasons: list[str]
) -> None:
    names = WRITERS[kind][1](tmp_path / "data", [FIRST, SECOND])
    harm(tmp_path / "data" / (H5 if kind == RECON else ""))
    results = cache(tmp_path / "data", tmp_path / "cache", kind)
    message = str(results[names[0]].error)
    assert all(reason in f" {message}" for reason in [names[0], *reasons]), message
    assert results[names[1]].error is None
    assert check_stamps(tmp_path / "cache", names[1], 2) >= 27


def test_an_episode_does_not_take_the_frames_of_the_next_one_in_its_file(tmp_path: Path) -> None:
    names = write_lerobot(tmp_path / "data", [FIRST, SECOND], "v3.0", "libx264")
    write_joined_mp4(tmp_path / "data" / V30[1], [FIRST.frames[:39], SECOND.frames], "libx264")
    write_episodes(tmp_path / "data", "v3.0", [
        {**lerobot_entry(0, 40, 0, 0), f"videos/{VIDEO_KEY}/to_timestamp": 3.9}, lerobot_entry(1, 27, 0, 39),
    ])  # fmt: skip
    results = cache(tmp_path / "data", tmp_path / "cache", "lerobot v3.0 h264")
    assert "fewer frames than poses" in str(results[names[0]].error)
    assert results[names[1]].error is None
    check_stamps(tmp_path / "cache", names[1], 2)


# ---------------------------------------------------------------------------------------------------------------------
# The process that reads HDF5.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[recon.Hdf5Readers]:
    """One process of this test's own."""
    readers = recon.Hdf5Readers(1)
    monkeypatch.setattr(recon, "HDF5_READERS", readers)
    yield readers
    process = readers._idle.get()
    if process is not None:
        process.end()


def pid_of(readers: recon.Hdf5Readers) -> int:
    process = readers._idle.get()
    readers._idle.put(process)
    return process._process.pid


def read_one(path: Path) -> list[bytes]:
    trajectory = Trajectory("t1", path, format="recon")
    return [bytes(data) for data in open_source(trajectory, DataKeys()).open_frames([3]).read([3])]


def test_a_reading_process_that_was_killed_is_replaced(tmp_path: Path, readers: recon.Hdf5Readers) -> None:
    write_recon(tmp_path, [FIRST])
    expected = [FIRST.jpegs[3]]
    assert read_one(tmp_path / "t1.r01.hdf5") == expected
    os.kill(pid_of(readers), signal.SIGKILL)
    assert read_one(tmp_path / "t1.r01.hdf5") == expected


def test_a_file_that_crashes_hdf5_twice_is_at_fault(
    tmp_path: Path, readers: recon.Hdf5Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recon(tmp_path, [FIRST])

    def crash(self: recon.Hdf5Process, request: tuple) -> Any:
        os.kill(self._process.pid, signal.SIGSEGV)
        return self._connection.recv()

    monkeypatch.setattr(recon.Hdf5Process, "ask", crash)
    with pytest.raises(InputError, match=r"t1.r01.hdf5.*crashed.*-11"):
        read_one(tmp_path / "t1.r01.hdf5")


def test_a_file_that_hdf5_does_not_finish_with_is_given_up(
    tmp_path: Path, readers: recon.Hdf5Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recon(tmp_path, [FIRST])
    assert len(read_one(tmp_path / "t1.r01.hdf5")) == 1
    os.kill(pid_of(readers), signal.SIGSTOP)
    monkeypatch.setattr(recon, "HDF5_TIMEOUT_S", 0.3)
    with no_hang(), pytest.raises(OSError, match="no answer"):
        read_one(tmp_path / "t1.r01.hdf5")
    monkeypatch.setattr(recon, "HDF5_TIMEOUT_S", 60)
    assert len(read_one(tmp_path / "t1.r01.hdf5")) == 1


def test_a_reading_process_ends_with_the_run(tmp_path: Path) -> None:
    write_recon(tmp_path / "data", [FIRST])
    code = (
        "import sys, pathlib, dino_cache, os\n"
        "from dino_cache_extras.formats import recon\n"
        "keys = dino_cache.DataKeys()\n"
        "source = dino_cache.open_source(dino_cache.Trajectory('t', pathlib.Path(sys.argv[1]), format='recon'), keys)\n"
        "source.poses(required=True)\n"
        "print(recon.HDF5_READERS._idle.get()._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data/t1.r01.hdf5")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    pid = int(done.stdout)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z")


# ---------------------------------------------------------------------------------------------------------------------
# From the command line: which format, which keys, what changed.
# ---------------------------------------------------------------------------------------------------------------------


SIGNS = {
    "gnm": "gnm (t1/traj_data.pkl)", "recon": "recon (t1.r01.hdf5)", "lerobot": "lerobot (meta/info.json)",
    "video": "video (t1.mp4 and t1.txt)",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["gnm", "recon", "lerobot v2.1 h264", "lerobot v3.0 h264", "video and tum"])
def test_auto_says_what_it_took_a_folder_for_and_a_second_run_has_nothing_to_do(
    run_bits: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    format, write = WRITERS[kind]
    (name,) = write(tmp_path / "data", [FIRST])
    for count in (1, 2):
        outcome = run_bits()
        assert outcome.code == 0, outcome.err
        assert f"robot: format {SIGNS[format]}" in outcome.out
        assert ("Encoding with" in outcome.out) == (count == 1)
    check_stamps(tmp_path / "cache", name, 1)
    assert run_bits({"format": format}, checksum="content").code == 0  # the same data, recorded by content
    again = run_bits({"format": format}, checksum="content")
    assert again.code == 0
    assert "Redoing" not in again.err


def test_a_folder_that_could_be_two_formats_or_none_is_refused(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/notes.txt").write_text("x")
    outcome = run_bits()
    assert outcome.code == 2
    assert all(word in outcome.err for word in ("traj_data.pkl", "*.hdf5", "meta/info.json", ".mp4")), outcome.err
    write_recon(tmp_path / "data", [FIRST])
    write_gnm(tmp_path / "data", [SECOND])
    outcome = run_bits()
    assert outcome.code == 2
    assert "recon (t1.r01.hdf5) and gnm (t2/traj_data.pkl)" in outcome.err
    assert run_bits({"format": "gnm"}).code == 0
    assert chunk_files(tmp_path / "cache")[0].parent.name == "t2"


def test_two_files_with_one_name_are_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_recon(tmp_path / "data", [FIRST])
    shutil.copy(tmp_path / "data/t1.r01.hdf5", tmp_path / "data/t1.r02.hdf5")
    outcome = run_bits()
    assert outcome.code == 2
    assert all(word in outcome.err for word in ("t1.r01.hdf5", "t1.r02.hdf5", "rename"))


@pytest.mark.parametrize(
    ("dataset", "key"),
    [
        ({"image_key": "images/rgb_left"}, "image_key"),
        ({"yaw_key": "yaw"}, "yaw_key"),
        ({"max_chunk_frames": 10}, "max_chunk_frames"),
        ({"chunk_by": "frames", "max_chunk_distance_m": 3.0}, "max_chunk_distance_m"),
    ],
)
def test_a_setting_under_a_dataset_that_does_not_apply_to_it_is_refused(
    run_bits: Callable[..., Outcome], tmp_path: Path, dataset: dict[str, Any], key: str
) -> None:
    write_gnm(tmp_path / "data", [FIRST])
    outcome = run_bits(dataset)
    assert outcome.code == 2
    assert f"datasets.robot.{key}: {dataset[key]}: does not apply" in outcome.err


def test_a_setting_at_the_top_that_does_not_apply_makes_no_other_cache(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    write_gnm(tmp_path / "data", [FIRST])
    assert run_bits().code == 0
    outcome = run_bits(image_key="observation.images.front", max_chunk_frames=10)
    assert outcome.code == 0, outcome.err
    assert "changed" not in outcome.err


@pytest.mark.parametrize(
    ("features", "dataset", "expected"),
    [
        ({}, {"image_key": "observation.images.rear"}, ["image_key", "observation.images.rear", VIDEO_KEY]),
        ({}, {"position_key": "gps"}, ["position_key", "gps", "observation.filtered_position", "action"]),
        ({"observation.filtered_heading": None}, {}, ["yaw_key", "action", "chunk_by: frames"]),
        ({VIDEO_KEY: None}, {}, ["image_key", "(none)"]),
        ({VIDEO_KEY: None, "left": {"dtype": "video"}, "right": {"dtype": "image"}}, {}, ["image_key", "left, right"]),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused_with_those_that_there_are(
    run_bits: Callable[..., Outcome], tmp_path: Path, features: dict, dataset: dict[str, Any], expected: list[str]
) -> None:
    write_lerobot(tmp_path / "data", [FIRST], "v2.1", "libx264")
    edit_features(tmp_path / "data", features)
    outcome = run_bits(dataset)
    assert outcome.code == 2
    assert all(word in outcome.err for word in expected), outcome.err
    assert not chunk_files(tmp_path / "cache")


def edit_features(folder: Path, features: dict[str, Any], **changes: Any) -> None:
    info = json.loads((folder / "meta/info.json").read_text())
    kept = {**info["features"], **features}
    info = {**info, "features": {key: value for key, value in kept.items() if value is not None}, **changes}
    (folder / "meta/info.json").write_text(json.dumps(info))


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda d: (d / "meta/info.json").write_text("{"), ["info.json", "cannot be read"]),
        (lambda d: edit_features(d, {}, codebase_version="v9.0"), ["'v9.0'", "v2.1", "v3.0"]),
        (lambda d: edit_features(d, {}, fps="fast"), ["fps", "'fast'"]),
        (lambda d: edit_features(d, {}, video_path=7), ["video_path", "7"]),
        (lambda d: write_episodes(d, "v3.0", [{**lerobot_entry(0, 40, 0, 0), "length": 1.5}]), ["1.5 frames"]),
        (lambda d: edit_features(d, {}, data_path="data/{episode_index.__class__}"), ["template"]),
        (lambda d: edit_features(d, {}, data_path="data/{episode_index:0999999999d}"), ["template"]),
        (lambda d: truncate(d / "meta/episodes/chunk-000/file-000.parquet"), ["file-000.parquet", "never finalised"]),
        (lambda d: shutil.rmtree(d / "meta/episodes"), ["meta/episodes"]),
    ],
)
def test_meta_data_that_cannot_be_used_are_refused(
    run_bits: Callable[..., Outcome], tmp_path: Path, harm: Callable[[Path], Any], expected: list[str]
) -> None:
    write_lerobot(tmp_path / "data", [FIRST], "v3.0", "libx264")
    harm(tmp_path / "data")
    outcome = run_bits()
    assert outcome.code == 2
    assert all(word in outcome.err for word in expected), outcome.err


def test_a_template_that_leads_out_of_the_dataset_is_not_followed(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    write_lerobot(tmp_path / "data", [FIRST], "v2.1", "libx264")
    edit_features(tmp_path / "data", {}, data_path="../elsewhere/episode_{episode_index:06d}.parquet")
    outcome = run_bits()
    assert outcome.code == 1
    assert "leads out of the dataset" in outcome.err


@pytest.mark.parametrize("kind", ["gnm", "lerobot v3.0 h264", "video and tum"])
def test_data_without_poses_are_cut_by_number_of_frames(
    run_bits: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (name,) = WRITERS[kind][1](tmp_path / "data", [FIRST])
    for path in (*(tmp_path / "data").rglob("traj_data.pkl"), *(tmp_path / "data").rglob("*.txt")):
        path.unlink()
    if kind == "lerobot v3.0 h264":
        edit_features(tmp_path / "data", {"observation.filtered_position": None, "observation.filtered_heading": None})
    refused = run_bits()
    assert refused.code == 2
    assert "chunk_by: frames" in refused.err
    outcome = run_bits({"chunk_by": "frames", "max_chunk_frames": 10, "overlap_frames": 2}, frame_stride=2)
    assert outcome.code == 0, outcome.err
    found = chunks(tmp_path / "cache", name)
    assert [span for span, _ in found] == [(0, 10), (8, 18), (16, 20)]
    assert all({*datasets} == {"cls_token", "frame_index"} for _, datasets in found)
    check_stamps(tmp_path / "cache", name, 1, frame_stride=2)
    windows = dino_cache.CacheWindows(tmp_path / "cache", window=4)
    assert {*windows[0]} == {"index", "cls_token", "frame_index"}
    assert windows[1]["frame_index"].tolist() == [2, 4, 6, 8]
    with pytest.raises(RefusedError, match="goal"):
        dino_cache.CacheWindows(tmp_path / "cache", window=4, goal=(1.0, 2.0))
    where = ["--cache-dir", str(tmp_path / "cache")]
    assert progress_utils.main(["export", *where, "--to", "vint", "-o", str(tmp_path / "pt")]) == 2
    assert progress_utils.main(["export", *where, "--to", "flat", "-o", str(tmp_path / "flat.h5")]) == 0
    with h5py.File(tmp_path / "flat.h5") as flat:
        assert "position" not in flat
        assert flat["frame_index"][...].tolist() == list(range(0, 40, 2))
    assert progress_utils.main(["verify", *where, "--deep"]) == 0
    record = read_progress(tmp_path / "cache")
    (tmp_path / "cache/progress.json").unlink()
    assert progress_utils.main(["rebuild", *where, "--yes"]) == 0
    assert read_progress(tmp_path / "cache")["trajectory_records"] == record["trajectory_records"]
    assert record["processing_config"]["chunk_by"] == "frames"


def test_poses_that_are_there_are_stored_also_in_chunks_by_number_of_frames(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    (name,) = write_recon(tmp_path / "data", [FIRST])
    assert run_bits({"chunk_by": "frames", "max_chunk_frames": 40, "overlap_frames": 0}).code == 0
    ((_, datasets),) = chunks(tmp_path / "cache", name)
    assert {*datasets} == {"cls_token", "frame_index", "position", "yaw"}
    np.testing.assert_array_equal(datasets["position"], FIRST.position)


@pytest.mark.parametrize(
    ("count", "most", "overlap", "expected"),
    [
        (10, 10, 3, [(0, 10)]), (11, 10, 3, [(0, 10), (7, 11)]), (17, 10, 3, [(0, 10), (7, 17)]),
        (18, 10, 3, [(0, 10), (7, 17), (14, 18)]), (1, 10, 3, [(0, 1)]), (3, 1, 0, [(0, 1), (1, 2), (2, 3)]),
        (2, 10, 9, [(0, 2)]), (12, 10, 9, [(0, 10), (1, 11), (2, 12)]),
    ],
)  # fmt: skip
def test_chunks_by_number_of_frames(count: int, most: int, overlap: int, expected: list[tuple[int, int]]) -> None:
    assert plan_frame_chunks(count, most, overlap) == expected


@pytest.mark.parametrize(("module", "kind"), [("av", "video and tum"), ("pyarrow", "lerobot v3.0 h264")])
def test_a_missing_library_is_named_with_the_command_that_installs_it(
    run_bits: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, kind: str
) -> None:
    WRITERS[kind][1](tmp_path / "data", [FIRST])
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.setitem(sys.modules, name, None)
    outcome = run_bits()
    assert outcome.code == 2
    assert all(word in outcome.err for word in (module, "pip install -r requirements-lerobot.txt"))


@pytest.mark.parametrize("codec", ["libx264", AV1_ENCODER or "mpeg4", "image"])
def test_episodes_appended_to_a_file_leave_those_before_them_done(
    run_bits: Callable[..., Outcome], tmp_path: Path, codec: str
) -> None:
    how = {"row_group": 36}  # the length of an episode
    episodes = [Rendered(number, 36) for number in (1, 2, 3)]
    write_lerobot(tmp_path / "data", episodes[:2], "v3.0", codec, together=3, **how)
    assert run_bits().code == 0
    names = write_lerobot(tmp_path / "data", episodes, "v3.0", codec, together=3, **how)
    outcome = run_bits()
    assert outcome.code == 0, outcome.err
    assert "Redoing" not in outcome.err
    assert check_stamps(tmp_path / "cache", names[2], 3) > 36


@pytest.mark.parametrize(
    ("kind", "change", "redone_by_stat", "redone_by_content"),
    [
        ("recon", lambda d: edit_hdf5(d / "t1.r01.hdf5", lambda f: f["jackal/yaw"].write_direct(np.ones(40))), 1, 1),
        ("lerobot v2.1 h264", lambda d: set_column(d / V21[0], "observation.filtered_heading", lambda y: y + 1), 1, 1),
        ("lerobot v2.1 h264", lambda d: write_mp4(d / V21[1], reversed(FIRST.frames)), 1, 1),
        ("lerobot v2.1 h264", lambda d: os.utime(d / V21[1], (1, 1)), 0, 0),
        ("lerobot v2.1 images", lambda d: set_column(d / V21[0], VIDEO_KEY, lambda c: c[::-1]), 0, 1),
        ("video and tum", lambda d: write_tum(d / "t1.txt", FIRST._replace(count=39)), 1, 1),
        ("video and tum", lambda d: os.utime(d / "t1.mp4", (1, 1)), 0, 0),
    ],
)
@pytest.mark.parametrize("checksum", ["stat", "content"])
def test_changed_data_are_done_again(
    tmp_path: Path, kind: str, change: Callable[[Path], Any], redone_by_stat: int, redone_by_content: int, checksum: str
) -> None:
    WRITERS[kind][1](tmp_path / "data", [FIRST])
    before = checksums(tmp_path / "data", kind, checksum)
    change(tmp_path / "data")
    redone = redone_by_stat if checksum == "stat" else redone_by_content
    assert (checksums(tmp_path / "data", kind, checksum) != before) == bool(redone)


def checksums(data: Path, kind: str, checksum: str) -> list[str]:
    trajectories = format_named(WRITERS[kind][0]).find(data, CacheSpec())
    return [open_source(trajectory, DataKeys()).checksum(checksum) for trajectory in trajectories]


# ---------------------------------------------------------------------------------------------------------------------
# Tables of poses.
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
        by_name, by_place = (video.read_pose_table(path, "t") for path in (table, tum))
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
            table = video.read_pose_table(path, "t")
        except InputError as error:
            assert str(error).startswith(f"t/a{suffix}: ")
        else:
            assert all(np.isfinite(column).all() for column in table.values())
