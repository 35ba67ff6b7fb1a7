"""The last line of a run says how it went, with counts by hand; what failed outranks what is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from progress_utils import cache_lock
from support import ROOT, Robot, cache_command, make_trajectory, run_cache, tree, write_config

SIZE, TIME, RATE = r"[\d.]+ (?:bytes|kB|MB|GB|TB)", r"[\d.]+ (?:s|min|h)", r"\d+ frames/s"


def last_line(text: str) -> str:
    return text.rstrip("\n").rpartition("\n")[2]


def check(line: str, word: str, counts: str, code: int) -> None:
    """Whether a verdict is `word`, with these counts."""
    assert re.fullmatch(rf"{word}: {re.escape(counts)}, {SIZE}, {TIME}, {RATE}, exit {code}", line), line


def logged(robot: Robot) -> str:
    """The last line of the cache's log, without its time and level."""
    line = last_line((robot.cache / "dino_cache.log").read_text())
    return re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} INFO (.*)", line)[1]


@pytest.mark.parametrize(
    ("good", "broken", "arguments", "word", "counts", "code"),
    [
        (2, 0, [], "OK", "1 datasets, 2 completed (+2), 0 failed, 0 left", 0),
        (2, 1, [], "PARTIAL", "1 datasets, 2 completed (+2), 1 failed, 0 left", 1),
        (3, 0, ["--limit", "1"], "PARTIAL", "1 datasets, 1 completed (+1), 0 failed, 2 left", 5),
        (3, 1, ["--limit", "2"], "PARTIAL", "1 datasets, 1 completed (+1), 1 failed, 2 left", 1),  # failures outrank
        (0, 2, [], "FAILED", "1 datasets, 0 completed (+0), 2 failed, 0 left", 1),
        (1, 1, ["--limit", "1"], "FAILED", "1 datasets, 0 completed (+0), 1 failed, 1 left", 1),
    ],
)
def test_the_last_line_says_how_a_run_went(robot, run_here, good, broken, arguments, word, counts, code):
    for number in range(broken):
        robot.add_broken(f"a{number}")
    robot.add(*(f"b{number}" for number in range(good)))
    done = run_here(robot.config, *arguments)
    assert done.code == code
    check(last_line(done.out), word, counts, code)
    assert logged(robot) == last_line(done.out)
    for number in range(broken):
        said = done.out + done.err
        assert said.count(f"a{number}/traj_data.pkl: position") == 1


def test_what_was_done_before_is_completed_and_not_new(robot, run_here):
    robot.add("t0", "t1")
    run_here(robot.config, "--limit", "1")
    check(last_line(run_here(robot.config).out), "OK", "1 datasets, 2 completed (+1), 0 failed, 0 left", 0)
    check(last_line(run_here(robot.config).out), "OK", "1 datasets, 2 completed (+0), 0 failed, 0 left", 0)


def test_failures_of_earlier_runs_are_named_once_too_and_make_a_run_partial(robot, run_here):
    robot.add("t0")
    robot.add_broken("t1")
    robot.configure(max_attempts=1)
    for number in range(2):  # tried, then exhausted
        done = run_here(robot.config)
        assert (done.out + done.err).count("t1/traj_data.pkl") == 1
        assert ("  failed (1 of 1 attempts): " in done.err) == (number == 1)
        check(last_line(done.out), "PARTIAL", f"1 datasets, 1 completed (+{1 - number}), 1 failed, 0 left", 1)


@pytest.mark.parametrize(("broken", "code"), [(0, 5), (1, 1)])
def test_a_deadline_with_failures_ends_with_1_and_without_with_5(robot, run_here, before_batch, clock, broken, code):
    if broken:
        robot.add_broken("a0")
    robot.add("b0", "b1", "b2", "b3", "b4", "b5")
    before_batch(lambda number: setattr(clock, "now", 1000.0 + 7200 * (number >= 4)))
    done = run_here(robot.config, "--max-hours", "1")
    assert done.code == code
    match = re.fullmatch(rf"PARTIAL: .* (\d) completed \(\+(\d)\), {broken} failed, (\d) left.*", last_line(done.out))
    assert match, done.out
    completed, new, left = map(int, match.groups())
    assert completed == new == 6 - left
    assert left > 0


def test_a_run_that_is_stopped_says_so_with_what_is_left_of_all_datasets(tmp_path):
    config = two_datasets(tmp_path)
    environment = {**os.environ, "STAMP_BATCH_SECONDS": "0.5"}
    with subprocess.Popen(cache_command(config), stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as it:
        for line in it.stdout:
            if line.startswith("Processing"):
                it.send_signal(signal.SIGTERM)
                break
        rest = it.stdout.read()
    assert it.returncode == 143
    line = last_line(rest)
    match = re.fullmatch(
        rf"STOPPED: 2 datasets, (\d) completed \(\+(\d)\), 0 failed, (\d) left, {SIZE}, {TIME}, {RATE}, exit 143", line
    )
    assert match, line
    completed, new, left = map(int, match.groups())
    assert (completed, completed + left) == (new, 3)  # two of lab, one of yard, which was not begun


def two_datasets(folder: Path, **settings: Any) -> Path:
    """Datasets lab, of two trajectories, and yard, of one."""
    for number, name in enumerate(("lab/t0", "lab/t1", "yard/t0")):
        make_trajectory(folder / name, 20, stamp=number)
    config = write_config(folder / "pair.yaml", folder / "lab", dataset="lab", **settings)
    content = yaml.safe_load(config.read_text())
    content["datasets"]["yard"] = {"data_folder": str(folder / "yard")}
    config.write_text(yaml.safe_dump(content))
    return config


def test_two_datasets_are_counted_together(tmp_path, run_here):
    config = two_datasets(tmp_path)
    (tmp_path / "yard/t0/7.png").write_bytes(b"no picture")
    check(last_line(run_here(config).out), "PARTIAL", "2 datasets, 2 completed (+2), 1 failed, 0 left", 1)
    only = run_here(config, "--dataset", "yard")
    check(last_line(only.out), "FAILED", "1 datasets, 0 completed (+0), 1 failed, 0 left", 1)


def test_a_refused_run_says_what_is_known(robot, run_here, tmp_path):
    robot.add("t0", "t1")
    run_here(robot.config, "--limit", "1")
    before = tree(robot.cache)
    robot.configure(frame_stride=2)
    done = run_cache(robot.config)
    assert done.returncode == 2
    check(last_line(done.stdout), "FAILED", "1 datasets, 1 completed (+0), 0 failed, 1 left", 2)
    with cache_lock(robot.cache):
        done = run_here(robot.config)
    assert (done.code, last_line(done.out)) == (4, "FAILED: 1 datasets, exit 4")
    robot.config.write_text("datasets: [")
    done = run_here(robot.config)
    assert done.code == 2
    assert re.fullmatch(rf"FAILED: {TIME}, exit 2", last_line(done.out))
    assert tree(robot.cache) == before


def test_a_fault_stops_a_run(robot, run_here, before_batch):
    def fail(_: int) -> None:
        raise RuntimeError("the device is gone")

    robot.add("t0", "t1")
    before_batch(fail)
    done = run_here(robot.config)
    check(last_line(done.out), "STOPPED", "1 datasets, 0 completed (+0), 0 failed, 2 left", 3)


def test_a_dry_run_has_no_verdict(robot, run_here):
    robot.add("t0")
    assert "exit" not in run_here(robot.config, "--dry-run").out


def test_completed_ones_that_are_not_as_they_should_be_are_counted(robot, run_here):
    robot.add("t0", "t1")
    run_here(robot.config)
    (robot.data / "t0" / "traj_data.pkl").write_bytes(b"cut")  # nothing is proven; it stays
    done = run_here(robot.config)
    assert done.code == 1
    check(last_line(done.out), "PARTIAL", "1 datasets, 2 completed (+0), 0 failed, 0 left, 1 odd", 1)
