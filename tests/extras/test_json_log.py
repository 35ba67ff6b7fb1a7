"""--log-json: one JSON object a line, from the start of each dataset to the end of the run."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from progress_utils import cache_lock
from support import chunk_files, run_cache


def events(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_a_run_says_what_happens(robot, tmp_path):
    robot.add_broken("a0")
    robot.add("b0")
    done = run_cache(robot.config, "--log-json", str(tmp_path / "log.jsonl"))
    assert done.returncode == 1
    said = events(tmp_path / "log.jsonl")
    assert [event["event"] for event in said] == ["start", "failed", "completed", "end"]
    start, failed, completed, end = said
    assert (start["dataset"], start["trajectories"], start["completed"], start["to_do"]) == ("robot", 2, 0, 2)
    assert (start["frames"], start["data_folder"], start["cache_dir"]) == (20, str(robot.data), str(robot.cache))
    assert (failed["dataset"], failed["trajectory"], failed["error_type"]) == ("robot", "a0", "InvalidDataError")
    assert failed["reason"] == "a0/traj_data.pkl: position[2, 1] is nan"
    assert (completed["dataset"], completed["trajectory"], completed["chunks"]) == ("robot", "b0", 3)
    assert completed["bytes"] == sum(path.stat().st_size for path in chunk_files(robot.cache))
    assert (end["exit_code"], end["verdict"]) == (1, done.stdout.splitlines()[-1])
    assert sorted(event["time"] for event in said) == [event["time"] for event in said]


def test_progress_is_told_as_often_as_to_people(robot, run_here, tmp_path):
    robot.add("t0", "t1")
    robot.configure(progress_interval_s=1e-6)
    done = run_here(robot.config, "--log-json", str(tmp_path / "log"))
    lines = re.findall(r"^Progress: (\d)/2 ", done.out, re.MULTILINE)
    told = [event for event in events(tmp_path / "log") if event["event"] == "progress"]
    assert [str(event["done"]) for event in told] == lines
    assert told[-1]["done"] == told[-1]["total"] == 2


def test_a_later_run_appends_and_a_refused_one_says_its_end(robot, run_here, tmp_path):
    robot.add("t0")
    for _ in range(2):
        run_here(robot.config, "--log-json", str(tmp_path / "log"))
    with cache_lock(robot.cache):
        run_here(robot.config, "--log-json", str(tmp_path / "log"))
    said = events(tmp_path / "log")
    assert [event["event"] for event in said] == ["start", "completed", "end", "start", "end", "end"]
    assert [event["exit_code"] for event in said if event["event"] == "end"] == [0, 0, 4]
    run_here(robot.config)  # without the option nothing is added
    assert len(events(tmp_path / "log")) == 6


@pytest.mark.parametrize("kind", ["folder", "missing folder", "pipe without a reader"])
def test_a_file_that_cannot_be_opened_is_refused(robot, run_here, tmp_path, kind):
    robot.add("t0")
    path = {"folder": tmp_path, "missing folder": tmp_path / "no/log"}.get(kind, tmp_path / "pipe")
    if kind == "pipe without a reader":
        os.mkfifo(path)
    done = run_here(robot.config, "--log-json", str(path))
    assert done.code == 2
    assert f"--log-json {path}: cannot write it: " in done.err
    assert not robot.cache.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_full_disk_under_it_is_said_once_and_changes_nothing(robot, run_here):
    robot.add("t0", "t1")
    done = run_here(robot.config, "--log-json", "/dev/full")
    assert done.code == 0
    assert done.err.count("--log-json: cannot write it any more: ") == 1
    robot.check("t0", "t1")
