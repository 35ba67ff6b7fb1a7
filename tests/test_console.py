"""The console decides nothing: it may be full, closed, gone or hostile, and the run does what it would have done."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pexpect
import pytest

import dino_cache
import progress_utils
from support import (
    ROOT,
    Robot,
    cache_command,
    chunk_files,
    make_trajectory,
    no_hang,
    read_progress,
    record,
    run_cache,
    run_utils,
    tree,
    write_record,
)

FULL = "/dev/full"
needs_full = pytest.mark.skipif(not os.path.exists(FULL), reason=f"{FULL} is not here")

# What every complete log of a run on t0 and t1 has, in this order.
SAID = ("robot: format gnm", "Dataset robot: ", "Encoding with small", "WEIGHTS ARE RANDOM", "2/2 trajectories")
MORE_CLOSINGS = (">/dev/full", "2>/dev/full", ">&-", "2>&-", "2>&1 | :", "| head -c 1")
CLOSINGS = (
    *(">/dev/full 2>&1", "<&- >&- 2>&-"),
    *(pytest.param(redirection, marks=pytest.mark.slow) for redirection in MORE_CLOSINGS),
)


def shell(script: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """A script of bash, its arguments as "$@"."""
    command = ["bash", "-c", script, "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120, check=False)


def log_of(robot: Robot) -> str:
    return (robot.cache / "dino_cache.log").read_text(encoding="utf-8")


def check_log(text: str, *said: str) -> None:
    """Every line begins with a time, and all that is said is there, in order."""
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} [A-Z]+ ", line) for line in text.splitlines()), text
    places = [text.find(line) for line in said]
    assert -1 not in places, text
    assert places == sorted(places)


# ---------------------------------------------------------------------------------------------------------------------
# A console that cannot be written
# ---------------------------------------------------------------------------------------------------------------------


@needs_full
@pytest.mark.parametrize("redirection", CLOSINGS)
def test_a_console_that_cannot_be_written_changes_nothing(robot, redirection):
    robot.add("t0", "t1")
    done = shell(f'set -o pipefail; "$@" {redirection}', *cache_command(robot.config))
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "Exception ignored" not in done.stderr
    robot.check("t0", "t1")
    check_log(log_of(robot), *SAID)
    verified = run_utils("verify", "--deep", "--cache-dir", robot.cache)
    assert (verified.returncode, "Sound" in verified.stdout) == (0, True)


@needs_full
def test_failures_are_in_the_exit_code_and_in_the_log_where_nobody_can_be_told(robot):
    robot.add("t0")
    robot.add_broken("t1")
    done = shell('"$@" >/dev/full 2>&1', *cache_command(robot.config, "--profile"))
    assert done.returncode == 1
    robot.check("t0")
    log = log_of(robot)
    for line in ("Failed: ", "1/2 trajectories completed, 1 failed", "whole run ", "the limit was: "):
        assert line in log


@needs_full
@pytest.mark.parametrize(
    "redirection",
    [">/dev/full 2>&1", pytest.param("", marks=pytest.mark.slow), pytest.param(">&- 2>&-", marks=pytest.mark.slow)],
)
def test_why_a_run_was_refused_is_in_the_log_where_the_console_could_not_be_told(robot, redirection):
    robot.add("t0")
    assert run_cache(robot.config).returncode == 0
    before = tree(robot.cache)
    robot.configure(frame_stride=2)
    done = shell(f'"$@" {redirection}', *cache_command(robot.config))
    assert done.returncode == 2
    after = tree(robot.cache)
    if redirection:
        more = after.pop("dino_cache.log")[len(before.pop("dino_cache.log")) :].decode()
        check_log(more, "robot: the configuration changed", "  frame_stride: 1 -> 2", "error: ", "--yes")
    assert after == before


@pytest.mark.slow
@needs_full
def test_a_dry_run_writes_nothing_whatever_the_console(robot):
    robot.add("t0")
    before = tree(robot.data)
    for redirection in (">/dev/full 2>&1", "| head -1", ">&-"):
        assert shell(f'set -o pipefail; "$@" --dry-run {redirection}', *cache_command(robot.config)).returncode == 0
    assert tree(robot.data) == before


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("command", [pytest.param("--dry-run", marks=pytest.mark.slow), "--help", "show", "list"])
def test_a_reader_that_has_seen_enough_ends_a_command_quietly(robot, command, count):
    robot.add("t0")
    if command in ("show", "list"):
        write_record(robot.cache, failed=5000)
        where = ["--cache-dir", robot.cache, "--all"] if command == "show" else ["--root", robot.data]
        line = [sys.executable, ROOT / "progress_utils.py", command, *where]
    else:
        line = cache_command(robot.config, command)
    done = shell(f'set -o pipefail; "$@" | head -{count}', *line)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == count


@needs_full
@pytest.mark.parametrize("redirection", [">/dev/full", ">&-"])
@pytest.mark.parametrize("command", ["show", "show --json", "list --json", "verify --json"])
def test_an_answer_that_cannot_be_written_was_not_given(robot, run_here, command, redirection):
    """Of commands that only print: whoever keeps their output must not take half of it for all."""
    robot.add("t0")
    assert run_here(robot.config).code == 0
    name, *options = command.split()
    where = ["--root", robot.data] if name == "list" else ["--cache-dir", robot.cache]
    line = [sys.executable, ROOT / "progress_utils.py", name, *where, *options]
    done = shell(f'"$@" {redirection}', *line)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write to the standard output: ")
    assert len(done.stderr.splitlines()) == 1


@needs_full
def test_an_edit_that_cannot_say_so_was_made(tmp_path):
    write_record(tmp_path, failed=2)
    line = [sys.executable, ROOT / "progress_utils.py", "reset-failed", "--cache-dir", tmp_path]
    assert shell('"$@" >/dev/full 2>&1', *line).returncode == 0
    assert read_progress(tmp_path)["failures"] == {}


def test_a_watch_ends_when_nobody_watches(tmp_path):
    write_record(tmp_path)
    line = [sys.executable, ROOT / "progress_utils.py", "show", "--cache-dir", tmp_path, "--watch", "0.1"]
    with subprocess.Popen(list(map(str, line)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        it.stdout.readline()
        it.stdout.close()
        progress = progress_utils.Progress.load(tmp_path)
        progress.forget("a")
        progress.save()
        assert it.wait(60) == 0
        assert it.stderr.read() == ""


@pytest.mark.slow
def test_no_file_of_a_run_gets_the_number_of_a_closed_stdout(robot, tmp_path):
    """Else what a library prints there would be written into a chunk."""
    robot.add("t0")
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit, os\natexit.register(lambda: [os.write(number, b'stray') for number in (1, 2)])\n"
    )
    done = shell('PYTHONPATH=$0 "$@" <&- >&- 2>&-'.replace("$0", str(tmp_path)), *cache_command(robot.config))
    assert done.returncode == 0
    robot.check("t0")
    assert run_utils("verify", "--deep", "--cache-dir", robot.cache).returncode == 0


# ---------------------------------------------------------------------------------------------------------------------
# A terminal that is closed
# ---------------------------------------------------------------------------------------------------------------------


# Makes its stdin the terminal of its session, as a terminal emulator does, and becomes the command given.
TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


@contextlib.contextmanager
def run_on_a_terminal(robot: Robot) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A slow run whose stdin, stdout and stderr are a terminal, and the terminal's other end."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", TAKE_TERMINAL, *cache_command(robot.config)]
    environment = {**os.environ, "STAMP_BATCH_SECONDS": "0.3"}
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=environment
    ) as process:
        os.close(theirs)
        yield process, ours
        process.kill()


def test_closing_the_terminal_stops_the_run_and_the_next_one_resumes(robot, run_here):
    robot.add(*(f"t{number}" for number in range(8)))
    with run_on_a_terminal(robot) as (process, terminal):
        said = b""
        while not chunk_files(robot.cache):
            if select.select([terminal], [], [], 0.05)[0]:
                said += os.read(terminal, 4096)
        assert b"frames" in said  # the bar
        os.close(terminal)
        assert process.wait(60) == 128 + signal.SIGHUP
    check_log(log_of(robot), "Processing 8 trajectories", "Stopped by a signal")
    done = len(read_progress(robot.cache)["completed_trajectories"])
    assert 1 <= done < 8
    outcome = run_here(robot.config)
    assert outcome.code == 0
    assert f"Resuming processing: {done}/8 trajectories completed" in outcome.out
    robot.check(*(f"t{number}" for number in range(8)))


# ---------------------------------------------------------------------------------------------------------------------
# Names that would write on the console themselves
# ---------------------------------------------------------------------------------------------------------------------

EVIL = "evil\x1b]0;PWNED\x07\x1b[2J\u202e\x9b31m\nrobot: 9/9 trajectories completed, 0 failed, 99 chunks"
ESCAPED = r"evil\x1b]0;PWNED\x07\x1b[2J\u202e\x9b31m\nrobot: 9/9"
UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def check_harmless(text: str) -> None:
    """No control character but newlines, and none of these from a name."""
    assert UNPRINTABLE.search(text) is None, ascii(text)
    assert not [line for line in text.splitlines() if line.startswith("robot: 9/9")], text


@pytest.fixture
def evil(robot: Robot) -> Robot:
    """A good trajectory, and one with a hostile name that lacks frame 12."""
    robot.add("t0")
    folder = make_trajectory(robot.data / EVIL, 20, stamp=2)
    (folder / "12.png").unlink()
    return robot


def test_a_hostile_name_reaches_neither_terminal_nor_log(evil, run_here):
    for arguments in (["--dry-run"], [], ["--force-rebuild"]):
        outcome = run_here(evil.config, *arguments)
        check_harmless(outcome.out)
        check_harmless(outcome.err)
        assert ESCAPED in outcome.out + outcome.err
    log = log_of(evil)
    check_harmless(log)
    assert ESCAPED in log
    assert "Traceback (most recent call last)" in log
    assert "99 chunks: frame" in log
    for line in log.splitlines():  # a line of ours begins with its time, one of a traceback is indented
        assert re.match(r"\d{4}-\d\d-\d\d |    ", line), line


def test_json_for_scripts_has_names_as_they_are(evil, run_here):
    run_here(evil.config)
    shown = run_utils("show", "--json", "--cache-dir", evil.cache)
    assert json.loads(shown.stdout)["failed_trajectories"] == [EVIL]


@pytest.mark.parametrize("command", ["show", "show --all", "list", "verify", "verify --repair --yes", "rebuild --yes"])
def test_a_cache_from_a_stranger_writes_nothing_on_the_terminal(robot, run_here, command):
    pytest.importorskip("dino_cache_extras")
    robot.add("t0")
    run_here(robot.config)
    content = read_progress(robot.cache)
    content["dataset_name"] = EVIL
    content["processing_config"][EVIL] = EVIL
    content["failures"][EVIL] = {**record(1)["failures"]["f0"], "reason": EVIL}
    content["failed_trajectories"] = [EVIL]
    (robot.cache / "progress.json").write_text(json.dumps(content))
    owner = {"pid": 1, "host": EVIL, "started": EVIL}
    (robot.cache / ".lock.owner").write_text(json.dumps(owner))
    stray = robot.cache / "stray" / EVIL.replace("/", "_")
    stray.mkdir(parents=True)
    (stray / "chunk_00000.h5").write_bytes(b"none")
    where = "--root" if command == "list" else "--cache-dir"
    done = run_utils(*command.split(), where, robot.cache)
    check_harmless(done.stdout)
    check_harmless(done.stderr)
    assert r"evil\x1b]0;PWNED" in done.stdout + done.stderr


def test_the_faults_of_a_config_are_lines_of_their_own(robot, run_here):
    robot.add("t0")
    robot.configure(batch_size=0, frame_stride=0)
    outcome = run_here(robot.config)
    assert outcome.code == 2
    lines = outcome.err.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f"error: {robot.config}: ")
    assert lines[1].startswith(f"{robot.config}: ")


# ---------------------------------------------------------------------------------------------------------------------
# The locale
# ---------------------------------------------------------------------------------------------------------------------

NO_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


@pytest.mark.slow
def test_a_locale_in_which_names_are_not_utf8_is_refused_before_anything(robot):
    robot.add("t0")
    before = tree(robot.data)
    done = run_cache(robot.config, env=NO_UTF8)
    assert done.returncode == 2
    assert "LC_ALL=C.UTF-8" in done.stderr
    assert "ascii" in done.stderr
    assert tree(robot.data) == before
    assert run_cache(robot.config, env={"LC_ALL": "C"}).returncode == 0  # in which Python takes UTF-8


@pytest.mark.parametrize("command", ["verify", "rebuild"])
def test_commands_that_look_for_trajectories_refuse_such_a_locale_too(tmp_path, monkeypatch, command):
    write_record(tmp_path)
    before = tree(tmp_path)
    for key, value in NO_UTF8.items():
        monkeypatch.setenv(key, value)
    done = run_utils(command, "--cache-dir", tmp_path)
    assert (done.returncode, "LC_ALL=C.UTF-8" in done.stderr) == (2, True)
    assert tree(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# A run in a program of somebody else's
# ---------------------------------------------------------------------------------------------------------------------


def test_a_stream_that_fails_later_is_silent_from_then_on():
    class Failing:
        def __init__(self) -> None:
            self.texts: list[str] = []

        def write(self, text: str) -> None:
            if len(self.texts) == 2:
                self.texts.append("failed")
                raise BlockingIOError(11, "Resource temporarily unavailable")
            self.texts.append(text)

        def fileno(self) -> int:
            raise OSError("none")

    stream: Any = Failing()
    console = progress_utils.Console(stream)
    for text in "abcd":
        assert console.write(text) == 1
    assert stream.texts == ["a", "b", "failed"]
    assert isinstance(console.error, BlockingIOError)


def test_two_runs_of_one_process_each_have_their_own_lines(robot, run_here):
    robot.add("t0")
    run_here(robot.config)
    run_here(robot.config)
    log = log_of(robot)
    assert log.count("robot: format gnm") == 2
    assert log.count("Loaded existing progress") == 1
    assert dino_cache.BACKLOG not in dino_cache.LOG.handlers


def test_causes_that_go_round_in_a_ring_are_logged_once():
    first, second = ValueError("one\x1b"), KeyError("two")
    first.__cause__, second.__cause__ = second, first
    with no_hang():
        text = dino_cache.LogFormatter().formatException((ValueError, first, None))
    assert "ValueError: one" in text and "KeyError: 'two'" in text
    assert "\x1b" not in text


# ---------------------------------------------------------------------------------------------------------------------
# Before the first batch
# ---------------------------------------------------------------------------------------------------------------------

STEPS = ["loading torch", "reading poses 0 / 2", "loading weights of small"]


def test_a_terminal_is_told_what_happens_before_the_first_batch(robot):
    robot.add("t0", "t1")
    command = cache_command(robot.config, fake=False)
    with pexpect.spawn(command[0], command[1:], timeout=120, encoding="utf-8", dimensions=(30, 120)) as terminal:
        for step in STEPS:
            terminal.expect_exact(step)
        terminal.expect_exact("2/2 trajectories completed")
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 0


def test_a_file_is_not_told_it_and_the_log_is(robot, run_here, monkeypatch):
    monkeypatch.setattr(dino_cache, "STEP_INTERVAL_S", -1.0)
    robot.add("t0", "t1")
    outcome = run_here(robot.config)
    log = (robot.cache / "dino_cache.log").read_text()
    for step in (*STEPS, "reading poses 1 / 2"):
        assert step not in outcome.out + outcome.err
        assert f" INFO {step}\n" in log
    before = len(log)
    assert run_here(robot.config).code == 0
    assert "loading" not in (robot.cache / "dino_cache.log").read_text()[before:]  # nothing to do: nothing is loaded
