"""runs.jsonl: a line a run, the last 1,000; what show --runs makes of it; nothing takes it for a stranger's file."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import dino_cache
from dino_cache_extras import run_history
from progress_utils import __version__, cache_lock
from support import ROOT, cache_command, chunk_files, make_trajectory, run_cache, run_utils, tree, write_config


def runs(cache: Path) -> list[dict[str, Any]]:
    text = (cache / "runs.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def counts(run: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(run[key] for key in ("verdict", "completed", "new", "failed", "left", "exit_code"))


@pytest.mark.slow
def test_every_run_leaves_a_line(robot):
    robot.add_broken("a0")
    robot.add("b0", "b1")
    assert run_cache(robot.config, "--limit", "2").returncode == 1
    assert run_cache(robot.config).returncode == 1
    first, second = runs(robot.cache)
    assert counts(first) == ("PARTIAL", 1, 1, 1, 1, 1)
    assert counts(second) == ("PARTIAL", 2, 1, 1, 0, 1)
    sizes = {path: path.stat().st_size for path in chunk_files(robot.cache)}
    assert first["bytes"] + second["bytes"] == sum(sizes.values())
    assert (first["frames"], second["frames"], second["chunks"]) == (20, 20, 6)
    assert first["reasons"] == {"*.pkl: position[#, #] is nan": 1}
    assert (first["host"], first["dataset"], first["trajectories"]) == (socket.gethostname(), "robot", 3)
    assert first["versions"]["dino_cache"] == __version__
    assert {"python", "torch", "numpy", "h5py"} <= first["versions"].keys()
    assert first["start"] < first["end"] <= second["start"] < second["end"]
    assert first["pid"] != second["pid"]
    assert first["frames_per_s"] == pytest.approx(first["frames"] / first["seconds"], rel=0.1)


def test_a_run_with_nothing_to_do_and_all_failed_ones_leave_a_line(robot, run_here):
    robot.add_broken("a0")
    run_here(robot.config)
    robot.mend("a0")
    run_here(robot.config)
    run_here(robot.config)
    assert [counts(run) for run in runs(robot.cache)] == [
        ("FAILED", 0, 0, 1, 0, 1),
        ("OK", 1, 1, 0, 0, 0),
        ("OK", 1, 0, 0, 0, 0),
    ]
    assert [run["reasons"] for run in runs(robot.cache)][1:] == [{}, {}]


def test_a_fault_leaves_a_line_that_says_it(robot, run_here, before_batch):
    def fail(_: int) -> None:
        raise RuntimeError("the device is gone")

    robot.add("t0")
    before_batch(fail)
    assert run_here(robot.config).code == 3
    (run,) = runs(robot.cache)
    assert counts(run) == ("STOPPED", 0, 0, 0, 1, 3)
    assert "the device is gone" in run["error"]


@pytest.mark.slow
def test_a_signal_leaves_a_line(robot):
    robot.add("t0", "t1")
    environment = {**os.environ, "STAMP_BATCH_SECONDS": "0.5"}
    command = cache_command(robot.config)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as it:
        for line in it.stdout:
            if line.startswith("Processing"):
                it.send_signal(signal.SIGTERM)
                break
        it.stdout.read()
    (run,) = runs(robot.cache)
    assert (run["verdict"], run["exit_code"], run["stopped_by"]) == ("STOPPED", 143, "signal")
    assert run["completed"] + run["left"] == 2


def test_runs_that_start_nothing_leave_none(robot, run_here):
    robot.add("t0", "t1")
    run_here(robot.config, "--limit", "1")
    before = tree(robot.cache)
    run_here(robot.config, "--dry-run")
    with cache_lock(robot.cache):
        assert run_here(robot.config).code == 4
    robot.configure(frame_stride=2)
    assert run_here(robot.config).code == 2
    assert tree(robot.cache) == before


def test_each_of_two_caches_has_the_counts_of_its_dataset_and_the_run_s_exit_code(tmp_path, run_here):
    for number, name in enumerate(("lab/t0", "lab/t1", "yard/t0")):
        make_trajectory(tmp_path / name, 20, stamp=number)
    (tmp_path / "yard/t0/7.png").write_bytes(b"no picture")
    config = write_config(tmp_path / "pair.yaml", tmp_path / "lab", dataset="lab")
    content = yaml.safe_load(config.read_text())
    content["datasets"]["yard"] = {"data_folder": str(tmp_path / "yard")}
    config.write_text(yaml.safe_dump(content))
    assert run_here(config).code == 1
    (lab,), (yard,) = (runs(tmp_path / name / "dino_cache_small") for name in ("lab", "yard"))
    assert (lab["dataset"], *counts(lab)) == ("lab", "PARTIAL", 2, 2, 0, 0, 1)
    assert (yard["dataset"], *counts(yard)) == ("yard", "PARTIAL", 0, 0, 1, 0, 1)
    assert run_here(config, "--dataset", "lab").code == 0
    assert [len(runs(tmp_path / name / "dino_cache_small")) for name in ("lab", "yard")] == [2, 1]


@pytest.mark.parametrize(("before", "kept_from"), [(999, 0), (1000, 1), (1005, 6)])
def test_the_last_thousand_are_kept(robot, run_here, before, kept_from):
    robot.add("t0")
    run_here(robot.config)
    (run,) = runs(robot.cache)
    path = robot.cache / "runs.jsonl"
    path.write_text("".join(json.dumps({**run, "number": number}) + "\n" for number in range(before)))
    run_here(robot.config)
    after = runs(robot.cache)
    assert len(after) == 1000
    assert [run["number"] for run in after[:-1]] == [*range(kept_from, before)]
    assert "number" not in after[-1]


def test_a_history_that_cannot_be_written_changes_nothing_else(robot, run_here):
    robot.add("t0")
    (robot.cache / "runs.jsonl").mkdir(parents=True)
    done = run_here(robot.config)
    assert done.code == 0
    assert "runs.jsonl: this run is not added: " in done.err
    robot.check("t0")


def test_a_link_in_its_place_is_not_written_through(robot, run_here, tmp_path):
    robot.add("t0")
    robot.cache.mkdir()
    (tmp_path / "mine").write_text("mine")
    (robot.cache / "runs.jsonl").symlink_to(tmp_path / "mine")
    assert run_here(robot.config).code == 0
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_damaged_line_is_kept_told_and_hides_no_other(robot, run_here):
    robot.add("t0")
    run_here(robot.config)
    with open(robot.cache / "runs.jsonl", "ab") as file:
        file.write(b'{"half": \n\xff\xfe\n{"end": "x"}\n[1]\n')
    run_here(robot.config)
    shown = run_utils("show", "--cache-dir", robot.cache, "--runs")
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert len(lines) == 3
    assert lines[2] == "4 lines of runs.jsonl are no runs, and are not shown"


def test_show_runs_prints_a_line_a_run(robot, run_here):
    robot.add("t0")
    robot.add_broken("t1")
    run_here(robot.config)
    before = tree(robot.cache)
    shown = run_utils("show", "--cache-dir", robot.cache, "--runs")
    assert shown.returncode == 0
    when, size, took = r"\d{4}-\d\d-\d\d \d\d:\d\d", r"[\d.]+ kB", r"\d+ s"
    line = rf"{when}  PARTIAL: 1 completed \(\+1\), 1 failed, 0 left, {size}, {took}, \d+ frames/s, exit 1\n"
    assert re.fullmatch(line, shown.stdout), shown.stdout
    as_json = run_utils("show", "--cache-dir", robot.cache, "--runs", "--json")
    assert json.loads(as_json.stdout) == runs(robot.cache)
    assert tree(robot.cache) == before


def test_show_runs_where_there_are_none(robot, run_here, tmp_path):
    robot.add("t0")
    run_here(robot.config)
    (robot.cache / "runs.jsonl").unlink()
    shown = run_utils("show", "--cache-dir", robot.cache, "--runs")
    assert (shown.returncode, shown.stdout) == (0, f"No runs in {robot.cache / 'runs.jsonl'}\n")
    assert run_utils("show", "--cache-dir", robot.cache, "--runs", "--json").stdout == "[]\n"
    nowhere = run_utils("show", "--cache-dir", tmp_path, "--runs")
    assert nowhere.returncode == 2
    assert "no progress.json here" in nowhere.stderr
    both = run_utils("show", "--cache-dir", robot.cache, "--runs", "--watch")
    assert (both.returncode, "--runs goes with --json, not with --watch" in both.stderr) == (2, True)


def test_it_is_no_stranger_and_reset_keeps_it(robot, run_here):
    robot.add("t0")
    run_here(robot.config)
    before = (robot.cache / "runs.jsonl").read_bytes()
    (robot.cache / "runs.jsonl.tmp").write_bytes(b"half")  # of a killed run
    verified = run_utils("verify", "--cache-dir", robot.cache)
    assert verified.returncode == 1
    assert "leftover: runs.jsonl.tmp" in verified.stdout
    assert "runs.jsonl:" not in verified.stdout
    assert run_utils("verify", "--cache-dir", robot.cache, "--repair", "--yes").returncode == 1
    assert run_utils("verify", "--deep", "--cache-dir", robot.cache).returncode == 0
    assert run_utils("reset", "--yes", "--cache-dir", robot.cache).returncode == 0
    assert (robot.cache / "runs.jsonl").read_bytes() == before
    assert run_here(robot.config).code == 0
    assert len(runs(robot.cache)) == 2


@pytest.mark.parametrize("step", ["fsync", "replace", "fsync_path"])
def test_a_run_killed_while_it_writes_leaves_the_history_whole(robot, run_here, monkeypatch, step):
    robot.add("t0")
    run_here(robot.config)
    before = (robot.cache / "runs.jsonl").read_bytes()
    code = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "import progress_utils\n"
        "from dino_cache_extras import run_history\n"
        "def die(*_): os._exit(9)\n"
        f"setattr(progress_utils if {step!r} == 'fsync_path' else os, {step!r}, die)\n"
        "progress_utils.write_durably(Path(sys.argv[1]), Path(sys.argv[1]).read_bytes() * 2)\n"
    )
    done = subprocess.run(["python", "-c", code, robot.cache / "runs.jsonl"], cwd=ROOT, check=False)
    assert done.returncode == 9
    assert (robot.cache / "runs.jsonl").read_bytes() in (before, before * 2)
    assert run_here(robot.config).code == 0
    assert not (robot.cache / "runs.jsonl.tmp").exists()
    assert len(runs(robot.cache)) in (2, 3)


def test_a_trajectory_of_its_name_fails_alone(robot, run_here):
    robot.add("t0")
    make_trajectory(robot.data / "runs.jsonl")
    assert run_here(robot.config).code == 1
    robot.check("t0")
    assert runs(robot.cache)[0]["failed"] == 1


def test_there_is_one_word_for_its_name() -> None:
    assert run_history.RUNS_FILE in dino_cache.OWN_NAMES
