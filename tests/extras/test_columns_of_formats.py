"""Columns that come along, from every format, through the commands on a cache."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from commands_support import flip
from formats_support import (
    FPS,
    VIDEO_KEY,
    cache,
    chunks,
    lerobot_files,
    write_csv,
    write_lerobot,
    write_mp4,
    write_recon,
    write_recon_file,
    write_videos,
)

import dino_cache
import progress_utils
from dino_cache_extras.chunk_files import read_chunk_header
from dino_cache_extras.formats.lerobot import column_of_numbers
from support import FIRST, SECOND, Outcome, chunk_files, read_chunk, read_progress, sealed, tree, write_gnm

ACTION = np.arange(2 * FIRST.count, dtype=np.float32).reshape(-1, 2) / 8
BY_FRAMES = {"chunk_by": "frames", "max_chunk_frames": 12, "overlap_frames": 3}


def add_action(path: Path, values: Any) -> None:
    """Put a column into a parquet file, over one that is there."""
    table = pyarrow.parquet.read_table(path)
    if "action" in table.column_names:
        table = table.drop_columns(["action"])
    pyarrow.parquet.write_table(table.append_column("action", values), path)


def lists(values: np.ndarray, width: int | None = 2) -> pyarrow.Array:
    kind = pyarrow.list_(pyarrow.float32(), width) if width else pyarrow.list_(pyarrow.float32())
    return pyarrow.array(values.tolist(), kind)


def write_action(data: Path, format: str, values: np.ndarray = ACTION) -> tuple[str, str, np.ndarray]:
    """One trajectory whose data have an action; returns its name, the key, and the values that its chunks must hold."""
    if format == "gnm":
        (name,) = write_gnm(data, [FIRST])
        poses = {"position": FIRST.position, "yaw": FIRST.yaw, "action": values}
        (data / name / "traj_data.pkl").unlink(missing_ok=True)
        np.savez(data / name / "traj_data.npz", **poses)
        return name, "action", values
    if format == "recon":
        (name,) = write_recon(data, [FIRST])
        with h5py.File(data / "t1.r01.hdf5", "r+") as file:
            file["commands/linear"] = values
        return name, "commands/linear", values
    if format == "lerobot":
        (name,) = write_lerobot(data, [FIRST], "v3.0", "libx264")
        add_action(lerobot_files(data, "v3.0", 0)[0], lists(values))
        return name, "action", values
    (name,) = write_videos(data, [FIRST], "csv")
    lines = (data / name / "poses.csv").read_text().splitlines()
    rows = [f"{line},{value}" for line, value in zip(lines[1:], values[:, 0], strict=True)]
    (data / name / "poses.csv").write_text("\n".join([lines[0] + ", steer", *rows]))
    return name, "steer", values[:, 0].astype(float)


FORMATS = ("gnm", "recon", "lerobot", "video")
KINDS = {"gnm": "gnm", "recon": "recon", "lerobot": "lerobot v3.0 h264", "video": "video and csv"}


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("format", FORMATS)
def test_an_extra_equals_the_column(tmp_path: Path, format: str, stride: int) -> None:
    name, key, values = write_action(tmp_path / "data", format)
    settings = {"extra_keys": [key], "frame_stride": stride, **BY_FRAMES}
    result = cache(tmp_path / "data", tmp_path / "cache", KINDS[format], **settings)[name]
    assert result.error is None
    found = chunks(tmp_path / "cache", name)
    assert len(found) > 1
    dataset = "extra/" + key.replace("/", ".")
    for (start, stop), datasets in found:
        index = datasets["frame_index"]
        np.testing.assert_array_equal(index, np.arange(start, stop) * stride)
        assert datasets[dataset].dtype == values.dtype
        np.testing.assert_allclose(datasets[dataset], values[index], rtol=0, atol=1e-9 if format == "video" else 0)
        if format in ("lerobot", "video"):
            np.testing.assert_allclose(datasets["timestamp"], index / FPS, rtol=0, atol=1e-6)
        else:
            assert "timestamp" not in datasets


@pytest.mark.parametrize("format", FORMATS)
def test_a_column_that_is_not_there_fails_with_those_that_there_are(
    tmp_path: Path, run_bits: Callable[..., Outcome], format: str
) -> None:
    name, key, _ = write_action(tmp_path / "data", format)
    assert run_bits({"extra_keys": [key, "wrench"]}).code == 1
    failure = read_progress(tmp_path / "cache")["failures"][name]
    assert failure["error_type"] == "InvalidDataError"
    assert "wrench" in failure["reason"]
    assert key in failure["reason"].split("its keys are")[1]


@pytest.mark.parametrize("format", FORMATS)
def test_a_changed_column_is_noticed_and_only_where_it_is_asked_for(
    tmp_path: Path, run_bits: Callable[..., Outcome], format: str
) -> None:
    """By `stat`. In gnm and video the pose file's bytes count, whatever is asked for."""
    data = tmp_path / "data"
    name, key, _ = write_action(data, format)
    assert run_bits({"extra_keys": [key]}).code == 0
    assert "Redoing" not in run_bits({"extra_keys": [key]}).err

    def rewrite() -> None:
        if format == "recon":
            with h5py.File(data / "t1.r01.hdf5", "r+") as file:
                file["commands/linear"][5] += 1
        elif format == "lerobot":
            add_action(lerobot_files(data, "v3.0", 0)[0], lists(ACTION + 1))
        else:
            for path in data.glob(f"{name}/*.*"):
                if path.suffix in (".npz", ".csv"):
                    path.unlink()
            again = tmp_path / f"again{len(list(tmp_path.iterdir()))}"
            write_action(again, format, ACTION + 1)
            pose_file = next(path for path in (again / name).iterdir() if path.suffix in (".npz", ".csv"))
            pose_file.rename(data / name / pose_file.name)

    rewrite()
    outcome = run_bits({"extra_keys": [key]})
    assert outcome.code == 0
    assert "its data changed" in outcome.err
    if format in ("recon", "lerobot"):
        assert run_bits(None, "--force-rebuild").code == 0
        if format == "lerobot":
            add_action(lerobot_files(data, "v3.0", 0)[0], lists(ACTION + 2))
        else:
            rewrite()
        assert "its data changed" not in run_bits().err


@pytest.mark.parametrize("format", FORMATS)
def test_columns_survive_redo_rebuild_verify_and_export(
    tmp_path: Path, run_bits: Callable[..., Outcome], capsys: pytest.CaptureFixture[str], format: str
) -> None:
    name, key, values = write_action(tmp_path / "data", format)
    dataset = {"extra_keys": [key]}
    assert run_bits(dataset).code == 0
    folder = tmp_path / "cache"
    before = [datasets for _, datasets in chunks(folder, name)]
    assert run_bits(dataset, "--force-rebuild").code == 0
    np.testing.assert_equal([datasets for _, datasets in chunks(folder, name)], before)

    def utils(command: str, *options: str) -> int:
        return progress_utils.main([command, "--cache-dir", str(folder), *options])

    assert utils("verify", "--deep") == 0
    files = {path: data for path, data in tree(folder).items() if path.endswith(".h5")}
    (folder / "progress.json").unlink()
    assert utils("rebuild", "--yes") == 0
    assert {path: data for path, data in tree(folder).items() if path.endswith(".h5")} == files
    assert "Redoing" not in run_bits(dataset).err
    capsys.readouterr()
    assert utils("export", "--to", "flat", "-o", str(tmp_path / "flat.h5")) == 0
    with h5py.File(tmp_path / "flat.h5") as flat:
        index = flat["frame_index"][...]
        stored = flat["extra." + key.replace("/", ".")]
        assert stored.dtype == values.dtype
        np.testing.assert_allclose(stored[...], values[index], rtol=0, atol=1e-9)
        assert ("timestamp" in flat) == (format in ("lerobot", "video"))
        assert np.flatnonzero(np.isnan(flat["delta"][:, 0])).tolist() == [len(index) - 1]
    assert utils("export", "--to", "vint", "-o", str(tmp_path / "vint")) == 0


def test_a_flipped_byte_of_a_column_is_found(tmp_path: Path, run_bits: Callable[..., Outcome], capsys: Any) -> None:
    name, key, _ = write_action(tmp_path / "data", "gnm")
    assert run_bits({"extra_keys": [key]}).code == 0
    path = chunk_files(tmp_path / "cache")[1]
    header = read_chunk_header(path, deep=True)
    for dataset in ("extra/action", "delta"):
        place = header.datasets[dataset]
        for offset in (place.offset, place.offset + place.size - 1):
            flip(path, offset)
            assert progress_utils.main(["verify", "--cache-dir", str(tmp_path / "cache"), "--deep"]) == 1
            assert f"{name}/chunk_00001.h5: the bytes of {dataset} do not match" in capsys.readouterr().out
            flip(path, offset)
    assert progress_utils.main(["verify", "--cache-dir", str(tmp_path / "cache"), "--deep"]) == 0


def test_nan_is_data_in_an_extra_and_damage_elsewhere(tmp_path: Path, run_bits: Callable[..., Outcome]) -> None:
    values = ACTION.copy()
    values[::2] = np.nan
    write_action(tmp_path / "data", "gnm", values)
    assert run_bits({"extra_keys": ["action"]}).code == 0
    for path in chunk_files(tmp_path / "cache"):
        assert np.isnan(read_chunk(path)[1]["extra/action"]).any()
    assert progress_utils.main(["verify", "--cache-dir", str(tmp_path / "cache"), "--deep"]) == 0


def test_an_export_has_the_columns_that_every_chunk_has(
    tmp_path: Path, run_bits: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    data, folder = tmp_path / "data", tmp_path / "cache"
    write_gnm(data, [FIRST])
    assert run_bits().code == 0
    write_gnm(data, [SECOND])
    poses = {"position": SECOND.position, "yaw": SECOND.yaw, "action": np.arange(SECOND.count)}
    for path in (data / "t2").glob("traj_data.*"):
        path.unlink()
    np.savez(data / "t2/traj_data.npz", **poses)
    assert run_bits({"extra_keys": ["action"]}, "--yes").code == 0
    command = ["export", "--cache-dir", str(folder), "--to", "flat", "-o", str(tmp_path / "o.h5"), "--force"]
    assert progress_utils.main([*command, "--allow-mixed"]) == 0
    with h5py.File(tmp_path / "o.h5") as flat:
        assert "extra.action" not in flat
        assert len(flat["delta"]) == len(flat["frame_index"])


def test_an_export_refuses_columns_of_different_types(
    tmp_path: Path, run_bits: Callable[..., Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    for trajectory, kind in ((FIRST, np.float32), (SECOND, np.int64)):
        (name,) = write_gnm(tmp_path / "data", [trajectory])
        for path in (tmp_path / "data" / name).glob("traj_data.*"):
            path.unlink()
        poses = {"position": trajectory.position, "yaw": trajectory.yaw, "a": np.zeros(trajectory.count, kind)}
        np.savez(tmp_path / "data" / name / "traj_data.npz", **poses)
    assert run_bits({"extra_keys": ["a"]}).code == 0
    command = ["export", "--cache-dir", str(tmp_path / "cache"), "--to", "flat", "-o", str(tmp_path / "o.h5")]
    assert progress_utils.main(command) == 2
    assert "extra/a has int64 values, those before have float32 values" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------------------- lerobot


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_the_task_of_an_episode_is_an_attribute(tmp_path: Path, version: str) -> None:
    names = write_lerobot(tmp_path / "data", [FIRST, SECOND], version, "image")
    cache(tmp_path / "data", tmp_path / "cache", f"lerobot {version} images")
    paths = chunk_files(tmp_path / "cache")
    assert {path.parent.name for path in paths} == {*names}
    assert {sealed(path)["task"] for path in paths} == {"drive"}


@pytest.mark.parametrize(("tasks", "task"), [(["go", "stop"], "go\nstop"), ([], None), ([7], None), ("go", "go")])
def test_an_episode_may_have_several_tasks_or_none(tmp_path: Path, tasks: Any, task: str | None) -> None:
    write_lerobot(tmp_path / "data", [FIRST], "v2.1", "image")
    path = tmp_path / "data/meta/episodes.jsonl"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tasks": tasks}))
    (tmp_path / "data/meta/tasks.jsonl").unlink(missing_ok=True)
    cache(tmp_path / "data", tmp_path / "cache", "lerobot v2.1 images")
    assert read_chunk(chunk_files(tmp_path / "cache")[0])[0].get("task") == task


def test_a_task_that_cannot_be_read_costs_no_trajectory(tmp_path: Path, run_bits: Callable[..., Outcome]) -> None:
    write_lerobot(tmp_path / "data", [FIRST], "v2.1", "image")
    path = tmp_path / "data/meta/episodes.jsonl"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tasks": []}))
    rows = tmp_path / "data/data/chunk-000/episode_000000.parquet"
    numbers = pyarrow.array([0] * FIRST.count)
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(rows).append_column("task_index", numbers), rows)
    (tmp_path / "data/meta/tasks.jsonl").write_text("{")
    outcome = run_bits({"format": "lerobot"})
    assert outcome.code == 0, outcome.err
    assert "episodes have a task that cannot be read" in outcome.out + outcome.err
    assert "task" not in read_chunk(chunk_files(tmp_path / "cache")[0])[0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (lists(ACTION), ACTION),
        (lists(ACTION, None), ACTION),
        (lists(ACTION).slice(5, 7), ACTION[5:12]),
        (lists(ACTION, None).slice(5, 7), ACTION[5:12]),
        (pyarrow.array([[[1, 2]], [[3, 4]]]), np.array([[[1, 2]], [[3, 4]]])),
        (pyarrow.array([True, False]), np.array([True, False])),
        (pyarrow.array([1, 255], pyarrow.uint8()), np.array([1, 255], np.uint8)),
        (pyarrow.array([1.5, None, 2.0], pyarrow.float32()), np.array([1.5, math.nan, 2.0], np.float32)),
        (pyarrow.array([np.float16(1.5)]), np.array([1.5], np.float16)),
    ],
)
def test_a_parquet_column_is_read_in_its_own_type(values: pyarrow.Array, expected: np.ndarray) -> None:
    found = column_of_numbers("t", pyarrow.chunked_array([values]))
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (pyarrow.array(["a", "b"]), "holds string values"),
        (pyarrow.array([1, None]), "is null in 1 places, where a int64 is expected"),
        (pyarrow.array([[1.0], [1.0, 2.0]]), "not of one length"),
        (pyarrow.array([[1.0], None]), "not of one length"),
        (pyarrow.array([None, [1.0, 2.0]], pyarrow.list_(pyarrow.float32(), 2)), "not of one length"),
        (pyarrow.array([{"a": 1}]), "holds struct"),
        (pyarrow.array([1, 2], pyarrow.timestamp("s")), "holds timestamp"),
    ],
)
def test_a_parquet_column_of_anything_else_is_refused(values: pyarrow.Array, message: str) -> None:
    with pytest.raises(dino_cache.InvalidDataError, match=message):
        column_of_numbers("t", pyarrow.chunked_array([values]))


def test_pictures_are_no_columns_of_numbers(tmp_path: Path) -> None:
    write_lerobot(tmp_path / "data", [FIRST], "v2.1", "image")
    (result,) = cache(tmp_path / "data", tmp_path / "c", "lerobot v2.1 images", extra_keys=[VIDEO_KEY]).values()
    assert f"{VIDEO_KEY} holds pictures" in str(result.error)


# --------------------------------------------------------------------------------------------------------------- recon


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(FIRST.count - 1), f"is ({FIRST.count - 1},), expected ({FIRST.count}, ...)"),
        (np.array([b"x"] * FIRST.count), "holds |S1 values"),
        (3.0, "has no rows x"),
    ],
)
def test_a_dataset_that_is_no_column_is_refused(tmp_path: Path, values: Any, message: str) -> None:
    (tmp_path / "data").mkdir()
    write_recon_file(tmp_path / "data/t1.hdf5", FIRST)
    with h5py.File(tmp_path / "data/t1.hdf5", "r+") as file:
        file["x"] = values
    (result,) = cache(tmp_path / "data", tmp_path / "c", "recon", extra_keys=["x"]).values()
    assert isinstance(result.error, dino_cache.InvalidDataError)
    assert message in str(result.error)


def test_a_dataset_of_truth_values_stays_one(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_recon_file(tmp_path / "data/t1.hdf5", FIRST)
    collides = np.arange(FIRST.count) % 3 == 0
    with h5py.File(tmp_path / "data/t1.hdf5", "r+") as file:
        file["collision/any"] = collides
    cache(tmp_path / "data", tmp_path / "c", "recon", extra_keys=["collision/any"])
    for _, datasets in chunks(tmp_path / "c", "t1"):
        assert datasets["extra/collision.any"].dtype == bool
        np.testing.assert_array_equal(datasets["extra/collision.any"], collides[datasets["frame_index"]])


# --------------------------------------------------------------------------------------------------------------- video


def test_a_videos_column_is_interpolated_at_the_times_of_frames(tmp_path: Path) -> None:
    """Rows at every second frame's time: between them lies half of both."""
    write_mp4(tmp_path / "data/t1.mp4", FIRST.frames)
    lines = ["timestamp,x,y,yaw,speed,name"]
    for number in range(0, FIRST.count, 2):
        lines.append(f"{number / FPS},{FIRST.position[number][0]},{FIRST.position[number][1]},0,{number * 10},n")
    (tmp_path / "data/t1.csv").write_text("\n".join(lines))
    cache(tmp_path / "data", tmp_path / "c", "video and csv", extra_keys=["speed"])
    for _, datasets in chunks(tmp_path / "c", "t1"):
        np.testing.assert_allclose(datasets["extra/speed"], datasets["frame_index"] * 10.0, rtol=0, atol=1e-6)
    (result,) = cache(tmp_path / "data", tmp_path / "d", "video and csv", extra_keys=["name"]).values()
    assert "name is no column of numbers" in str(result.error)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    write_mp4(tmp_path / "data/t1.mp4", FIRST.frames)
    write_csv(tmp_path / "data/t1.csv", FIRST)
    lines = (tmp_path / "data/t1.csv").read_text().splitlines()
    (tmp_path / "data/t1.csv").write_text("\n".join([lines[0] + ",a, a", *(line + ",1,2" for line in lines[1:])]))
    (result,) = cache(tmp_path / "data", tmp_path / "c", "video and csv", extra_keys=["a"]).values()
    assert "two columns are called a" in str(result.error)


def test_a_tum_file_has_the_names_of_its_form(tmp_path: Path) -> None:
    (name,) = write_videos(tmp_path / "data", [FIRST])
    cache(tmp_path / "data", tmp_path / "c", "video and tum", extra_keys=["tz"])
    for _, datasets in chunks(tmp_path / "c", name):
        np.testing.assert_array_equal(datasets["extra/tz"], 1.5)
