"""export --to lerobot, read by the rules of the v3.0 format; test_exports_opened.py has lerobot itself read it."""

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
from cache_support import Robot, tokens_of, write_cache
from test_export import EPISODES, robot, with_a_cut, with_a_jump  # noqa: F401

import dino_cache
import progress_utils
from dino_cache_extras.commands import export_lerobot, export_rows
from support import ROOT, straight_line, tree

FRAMES = 20
YAW = np.linspace(0, 1, FRAMES)
POSITIONS = {"a": straight_line(FRAMES), "lab/b": with_a_jump(), "lab/c": with_a_cut()}


class LeRobot(NamedTuple):
    """A dataset's files, read by its own templates."""

    info: dict[str, Any]
    stats: dict[str, Any]
    tasks: list[str]
    episodes: list[dict[str, Any]]
    frames: dict[str, np.ndarray]  # of all episodes, in order of their indices


def read_lerobot(folder: Path) -> LeRobot:
    info = json.loads((folder / "meta/info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert info["video_path"] is None
    episodes = pq.read_table(folder / "meta/episodes").to_pylist()
    assert [episode["episode_index"] for episode in episodes] == list(range(info["total_episodes"]))
    parts: list[dict[str, np.ndarray]] = []
    for episode in episodes:
        place = {"chunk_index": episode["data/chunk_index"], "file_index": episode["data/file_index"]}
        table = pq.read_table(folder / info["data_path"].format(**place))
        assert table.schema.names == list(info["features"])
        rows = table.filter(np.asarray(table["episode_index"]) == episode["episode_index"])
        columns = {name: np.array(rows[name].to_pylist()) for name in rows.schema.names}
        low, high = episode["dataset_from_index"], episode["dataset_to_index"]
        np.testing.assert_array_equal(columns["index"], np.arange(low, high))
        np.testing.assert_array_equal(columns["frame_index"], np.arange(episode["length"]))
        parts.append(columns)
    frames = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert len(frames["index"]) == info["total_frames"]
    for name, feature in info["features"].items():
        shape = () if feature["shape"] == [1] else tuple(feature["shape"])
        assert frames[name].shape[1:] == shape, name
    tasks = pq.read_table(folder / "meta/tasks.parquet")
    named = json.loads(tasks.schema.metadata[b"pandas"])["index_columns"]
    assert named == [tasks.schema.names[1]]
    assert tasks["task_index"].to_pylist() == list(range(info["total_tasks"]))
    return LeRobot(info, json.loads((folder / "meta/stats.json").read_text()), tasks[1].to_pylist(), episodes, frames)


def way(position: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """(n, 3) where the next frame is, ahead and to the left, and the turn; nowhere from the last one."""
    found = np.zeros((len(yaw), 3))
    for row in range(len(yaw) - 1):
        step = complex(*(position[row + 1] - position[row])) * np.exp(-1j * yaw[row])
        found[row] = step.real, step.imag, yaw[row + 1] - yaw[row]
    return found


@pytest.mark.parametrize("block_bytes", [1, 500])
def test_lerobot_holds_each_frame_once_in_episodes_without_gaps(robot, monkeypatch, capsys, block_bytes):  # noqa: F811
    monkeypatch.setattr(export_rows, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(export_lerobot, "EPISODES_AT_A_TIME", 2)
    monkeypatch.setattr(export_lerobot, "DATA_FILE_BYTES", 1000)
    monkeypatch.setattr(export_lerobot, "FILES_A_FOLDER", 2)
    assert robot.export("lerobot", "--fps", "4") == 0
    assert "3 trajectories: 5 episodes, 57 frames at 4 fps" in capsys.readouterr().out
    found = read_lerobot(robot.out)
    assert (found.info["fps"], found.info["splits"], found.tasks) == (4, {"train": "0:5"}, [""])
    assert [(it["trajectory"], it["length"]) for it in found.episodes] == [(n, b - a) for n, _, a, b in EPISODES]
    assert {(it["data/chunk_index"], it["data/file_index"]) for it in found.episodes} > {(0, 0), (0, 1), (1, 0)}
    features = found.info["features"]
    assert features["observation.patch_tokens"] == {"dtype": "float16", "shape": [2, 3, 4], "names": None}
    assert features["observation.state"]["names"] == ["x", "y", "yaw"]
    for (name, stamp, first, stop), episode in zip(EPISODES, found.episodes, strict=True):
        row = slice(episode["dataset_from_index"], episode["dataset_to_index"])
        frames = np.arange(first, stop)
        expected = np.stack([np.full(len(frames), stamp), frames // 256, frames % 256], axis=1)
        np.testing.assert_array_equal(found.frames["observation.cls_token"][row][:, :3], expected)
        np.testing.assert_array_equal(found.frames["observation.patch_tokens"][row][:, 1, 2, :3], expected)
        np.testing.assert_array_equal(found.frames["source.frame_index"][row], frames)
        position = POSITIONS[name][first:stop]
        np.testing.assert_array_equal(found.frames["observation.state"][row][:, :2], position)
        np.testing.assert_array_equal(found.frames["observation.state"][row][:, 2], YAW[first:stop])
        np.testing.assert_allclose(found.frames["action"][row], way(position, YAW[first:stop]), atol=1e-12)
        np.testing.assert_array_equal(found.frames["timestamp"][row], np.arange(len(frames)) / 4)
        assert found.frames["next.done"][row].tolist() == [False] * (len(frames) - 1) + [True]
    assert_stats_are_those_of_the_frames(found)
    assert [path.name for path in robot.out.parent.iterdir()] == ["robot.h5"]


def assert_stats_are_those_of_the_frames(found: LeRobot) -> None:
    assert found.stats.keys() == found.frames.keys()
    for name, stats in found.stats.items():
        values = found.frames[name].astype(np.float64)
        axes = (0, 1, 2) if values.ndim == 4 else 0
        for key, of in {"min": np.min, "max": np.max, "mean": np.mean, "std": np.std}.items():
            expected = of(values, axis=axes)
            np.testing.assert_allclose(np.array(stats[key]).reshape(expected.shape), expected, atol=1e-9, err_msg=name)
        assert stats["count"] == [57]
        if values.ndim < 4:  # all rows are in the sample
            np.testing.assert_allclose(np.ravel(stats["q90"]), np.quantile(values, 0.9, axis=0).ravel())
        assert np.array(stats["q50"]).shape == np.array(stats["mean"]).shape


def columns_of(position: np.ndarray, starts: list[int], **more: np.ndarray) -> dict[str, np.ndarray]:
    return {"delta": dino_cache.to_next_frame(position, YAW, starts), **more}


def export(cache: Path, out: Path, *arguments: str) -> int:
    return progress_utils.main(["export", "--cache-dir", str(cache), "--to", "lerobot", "-o", str(out), *arguments])


@pytest.fixture
def rover(tmp_path) -> Path:
    """Two cameras, times, tasks and columns; the second trajectory is cut at its 10th frame."""
    times = np.arange(FRAMES) * 0.1
    speed, battery = np.arange(2 * FRAMES, dtype=np.float32).reshape(-1, 2), np.arange(FRAMES, dtype=np.uint8)
    more = {"timestamp": times, "extra/speed": speed, "extra/battery": battery}
    cut = with_a_cut()
    robots = {
        "a": Robot(
            1, straight_line(FRAMES), YAW, columns=columns_of(straight_line(FRAMES), [], **more), task="Go home"
        ),
        "b": Robot(2, cut, YAW, columns=columns_of(cut, [10], **more)),
    }
    cameras = {"cameras": ["front", "left"], "extra_keys": ["battery", "speed"]}
    return write_cache(tmp_path / "cache", robots, **cameras)


def test_times_tasks_cameras_and_columns_come_along(rover, tmp_path):
    assert export(rover, tmp_path / "out") == 0
    found = read_lerobot(tmp_path / "out")
    assert (found.info["fps"], found.tasks) == (10, ["Go home", ""])
    assert [episode["tasks"] for episode in found.episodes] == [["Go home"], [""], [""]]
    assert found.frames["task_index"].tolist() == [0] * 20 + [1] * 20
    for place, camera in enumerate(["front", "left"]):
        expected = np.concatenate([tokens_of(stamp, np.arange(FRAMES), place) for stamp in (1, 2)])
        np.testing.assert_array_equal(found.frames[f"observation.{camera}.cls_token"], expected)
    times = np.arange(FRAMES) * 0.1
    expected = np.concatenate([times, times[:10], times[10:] - times[10]]).astype(np.float32)
    np.testing.assert_array_equal(found.frames["timestamp"].astype(np.float32), expected)
    np.testing.assert_array_equal(found.frames["extra.speed"], np.tile(np.arange(40).reshape(20, 2), (2, 1)))
    np.testing.assert_array_equal(found.frames["extra.battery"], np.tile(np.arange(20), 2))
    assert found.info["features"]["extra.battery"] == {"dtype": "uint8", "shape": [1], "names": None}


def test_a_rate_comes_from_the_times_or_from_the_user_and_never_from_nowhere(rover, robot, tmp_path, capsys):  # noqa: F811
    assert robot.export("lerobot") == 2
    assert "--fps: LeRobot needs a rate, and this cache has no times" in capsys.readouterr().err
    assert export(rover, tmp_path / "rate", "--fps", "4") == 2
    assert "--fps 4: the stored times say 10 kept frames a second" in capsys.readouterr().err
    assert export(rover, tmp_path / "rate", "--fps", "9.5") == 0
    assert read_lerobot(tmp_path / "rate").info["fps"] == 9.5
    for wrong in ("0", "nan", "-1", "ten"):
        with pytest.raises(SystemExit):
            robot.export("lerobot", "--fps", wrong)
    assert robot.export("flat", "--fps", "4") == 2
    assert robot.export("lerobot", "--fps", "4", "--camera", "front") == 2
    assert not robot.out.exists()


def test_chunks_of_before_delta_and_chunks_cut_by_frames_have_the_same_actions(tmp_path):
    cut = with_a_cut()
    old = write_cache(tmp_path / "old", {"a": Robot(1, cut, YAW)})
    frames = {"chunk_by": "frames", "max_chunk_frames": 6, "overlap_frames": 2}
    by_frames = write_cache(tmp_path / "frames", {"a": Robot(1, cut, YAW, columns=columns_of(cut, []))}, **frames)
    for cache in (old, by_frames):
        assert export(cache, tmp_path / "out", "--fps", "4", "--force") == 0
        found = read_lerobot(tmp_path / "out")
        assert [episode["length"] for episode in found.episodes] == [10, 10]
        expected = np.concatenate([way(cut[:10], YAW[:10]), way(cut[10:], YAW[10:])])
        np.testing.assert_allclose(found.frames["action"], expected, atol=1e-12)


def test_without_poses_there_is_no_state_and_no_action(tmp_path, capsys):
    spec = {"chunk_by": "frames", "max_chunk_frames": 6, "overlap_frames": 2}
    bare = Robot(1, None, None, count=FRAMES)
    assert export(write_cache(tmp_path / "c", {"a": bare}, **spec), tmp_path / "out", "--fps", "4") == 0
    found = read_lerobot(tmp_path / "out")
    assert not {"observation.state", "action"} & found.frames.keys()
    np.testing.assert_array_equal(found.frames["observation.cls_token"], tokens_of(1, np.arange(FRAMES)))
    posed = Robot(2, straight_line(FRAMES), YAW)
    for robots, what in (({"a": bare, "b": posed}, "chunks before have none"), ({"a": posed, "b": bare}, "has no po")):
        cache = write_cache(tmp_path / what[:3], robots, **spec)
        assert export(cache, tmp_path / "mixed", "--fps", "4") == 2
        assert what in capsys.readouterr().err
    assert not (tmp_path / "mixed").exists()


def test_only_an_export_as_it_was_made_is_replaced(rover, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(rover, out) == 0
    before = tree(out)
    assert export(rover, out) == 2
    assert "--force" in capsys.readouterr().err
    for foreign, content in {
        "README.md": b"of mine",
        "data/chunk-000/file-001.parquet": b"added by another program",
        "meta/info.json": before["meta/info.json"] + b" ",
    }.items():
        (out / foreign).write_bytes(content)
        changed = tree(out)
        assert export(rover, out, "--force") == 2
        assert foreign in capsys.readouterr().err
        assert tree(out) == changed
        if foreign in before:
            (out / foreign).write_bytes(before[foreign])
        else:
            (out / foreign).unlink()
    assert export(rover, out, "--force") == 0
    assert tree(out).keys() == before.keys()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "dino_cache_export.json").write_text('{"made_by": "another program"}')
    assert export(rover, tmp_path / "mine", "--force") == 2
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes.txt").write_text("of mine")
    assert export(rover, out, "--force") == 2
    assert "notes.txt" in capsys.readouterr().err
    assert tree(tmp_path / "out.partial") == {"notes.txt": b"of mine"}


KILLED = """
import os, sys
from dino_cache_extras.commands import export_{layout} as layout
import progress_utils
blocks = layout.episode_blocks
def until_killed(*arguments):
    for number, block in enumerate(blocks(*arguments)):
        if number == 2:
            os.kill(os.getpid(), {signal})
        yield block
layout.episode_blocks = until_killed
sys.exit(progress_utils.main(sys.argv[1:]))
"""


def killed_export(layout: str, cache: Path, out: Path, *arguments: str, by: signal.Signals = signal.SIGKILL) -> int:
    """An export in a process of its own that gets a signal after two blocks; returns what it ended with."""
    command = ["export", "--cache-dir", str(cache), "--to", layout, "-o", str(out), *arguments]
    script = KILLED.format(layout=layout, signal=int(by))
    return subprocess.run([sys.executable, "-c", script, *command], cwd=ROOT, check=False).returncode


def test_a_killed_export_begins_anew_and_leaves_what_was_there(rover, tmp_path):
    out = tmp_path / "out"
    assert export(rover, out) == 0
    whole = tree(out)
    assert killed_export("lerobot", rover, out, "--force") == -signal.SIGKILL
    assert tree(out) == whole
    assert (tmp_path / "out.partial").is_dir()
    assert export(rover, out, "--force") == 0
    assert tree(out) == whole
    assert not (tmp_path / "out.partial").exists()


def test_a_bad_chunk_or_a_full_disk_ends_it_and_leaves_what_was_there(robot, capsys):  # noqa: F811
    assert robot.export("lerobot", "--fps", "4") == 0
    before = tree(robot.out.parent)
    path = robot.cache / "lab" / "c" / "chunk_00001.h5"
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert robot.export("lerobot", "--fps", "4", "--force") == 2
    assert str(path) in capsys.readouterr().err
    assert tree(robot.out.parent) == before
    path.write_bytes(content)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))  # no file may grow beyond
    try:
        code = robot.export("lerobot", "--fps", "4", "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 2
    assert tree(robot.out.parent) == before
    assert os.listdir(robot.out.parent) == ["robot.h5"]


def test_a_layout_whose_library_is_missing_says_what_to_install(rover, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lance", None)
    monkeypatch.delitem(sys.modules, "dino_cache_extras.commands.export_lance", raising=False)
    command = ["export", "--cache-dir", str(rover), "--to", "lance", "-o", str(tmp_path / "out.lance")]
    assert progress_utils.main(command) == 2
    assert "pip install -r requirements-lance.txt" in capsys.readouterr().err
    assert not (tmp_path / "out.lance").exists()
