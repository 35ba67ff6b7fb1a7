"""The question about a changed configuration: what each answer comes to, and no lock is held while it waits."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pexpect
import pytest

from progress_utils import cache_lock
from support import Robot, cache_command, chunk_files, read_chunk, read_progress, run_cache, run_utils, tree

QUESTION = "Continue with the changed configuration? [y/N]"


@pytest.fixture
def asked(robot: Robot, run_here: Callable[..., Any]) -> Robot:
    """t0 and t1 are completed, t2 is to do, and chunks are to be of 3 m instead of 2 m."""
    robot.add("t0", "t1", "t2")
    assert run_here(robot.config, "--limit", "2").code == 5
    robot.configure(max_chunk_distance_m=3.0)
    return robot


def spawn(robot: Robot) -> pexpect.spawn:
    program, *arguments = cache_command(robot.config)
    return pexpect.spawn(program, arguments, timeout=120, encoding="utf-8", dimensions=(50, 220))


def spans(robot: Robot) -> dict[str, list[list[int]]]:
    return {name: entry["spans"] for name, entry in read_progress(robot.cache)["trajectory_records"].items()}


OLD, NEW = [[0, 9], [6, 15], [12, 20]], [[0, 13], [10, 20]]


def test_each_answer_is_told_with_what_it_comes_to(asked):
    size = sum(path.stat().st_size for path in chunk_files(asked.cache)) / 1000
    with spawn(asked) as terminal:
        terminal.expect_exact(QUESTION)
        said = terminal.before.replace("\r\n", "\n")
        terminal.sendline("")
        terminal.expect(pexpect.EOF)
    pace = r"(?: \(about \d+ \w+ at the pace so far\))"
    made = "are made with the new configuration"
    assert re.search(
        rf"\n  y  keep: 2 completed trajectories \({size:.1f} kB\) stay as they are, 1 {made}{pace}; "
        rf"the cache is mixed\n"
        rf"  c  re-cut: 2 completed trajectories are cut anew from their stored features \({size:.1f} kB are read and "
        rf"replaced\), frames in no chunk are encoded; 1 {made}{pace}\n"
        rf"  r  redo: all 3 {made}{pace}, which replaces {size:.1f} kB\n"
        r"  N  stop: nothing is changed \(the default\)\n$",
        said,
    ), said


@pytest.mark.parametrize("answer", ["", "n", "N", "no", "s", "x", "redo everything"])
def test_any_other_answer_stops_and_changes_nothing(asked, answer):
    before = tree(asked.cache)
    with spawn(asked) as terminal:
        terminal.expect_exact(QUESTION)
        terminal.sendline(answer)
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 2
    assert tree(asked.cache) == before
    assert "FAILED: 1 datasets, 2 completed (+0), 0 failed, 1 left" in terminal.before


def test_r_redoes_everything_and_keeps_the_record_before_it(asked):
    with spawn(asked) as terminal:
        terminal.expect_exact(QUESTION)
        terminal.sendline("r")
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 0, terminal.before
    assert terminal.before.count("the configuration changed since") == 0  # asked once
    assert spans(asked) == {"t0": NEW, "t1": NEW, "t2": NEW}
    attributes = [read_chunk(path)[0] for path in chunk_files(asked.cache)]
    assert len({item["fingerprint"] for item in attributes}) == 1
    assert len([*asked.cache.glob("progress.json.rebuild-*")]) == 1
    assert "OK: 1 datasets, 3 completed (+3), 0 failed, 0 left" in terminal.before


def test_no_lock_is_held_while_it_waits_and_what_changed_meanwhile_is_asked_again(asked):
    with spawn(asked) as terminal:
        terminal.expect_exact(QUESTION)
        with cache_lock(asked.cache):  # free
            pass
        asked.configure()
        assert run_cache(asked.config).returncode == 0  # another run ends the work with the old configuration
        asked.configure(max_chunk_distance_m=3.0)
        terminal.sendline("r")
        terminal.expect_exact("keep: 3 completed trajectories")
        terminal.expect_exact(QUESTION)
        terminal.sendline("n")
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 2
    assert spans(asked) == {"t0": OLD, "t1": OLD, "t2": OLD}


def test_a_run_that_began_meanwhile_is_not_disturbed(asked):
    with spawn(asked) as terminal:
        terminal.expect_exact(QUESTION)
        with cache_lock(asked.cache):
            terminal.sendline("y")
            terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 4
    assert spans(asked) == {"t0": OLD, "t1": OLD}


def test_other_commands_work_while_it_waits(asked):
    with spawn(asked) as terminal:
        terminal.expect_exact(QUESTION)
        assert run_utils("reset-failed", "--cache-dir", asked.cache).returncode == 0
        terminal.sendline("y")
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 0
    assert spans(asked) == {"t0": OLD, "t1": OLD, "t2": NEW}


def test_new_weights_can_be_taken_or_not_and_r_is_no_answer_to_them(asked, run_here):
    asked.configure()
    progress = asked.cache / "progress.json"
    progress.write_text(progress.read_text().replace('"digest": "stamprandom"', '"digest": "others"'))
    before = tree(asked.cache)
    for answer, code in (("r", 2), ("y", 0)):
        with spawn(asked) as terminal:
            terminal.expect_exact(QUESTION)
            assert "redo: all" not in terminal.before
            terminal.sendline(answer)
            terminal.expect(pexpect.EOF)
        assert terminal.exitstatus == code, terminal.before
        assert code == 0 or tree(asked.cache) == before
