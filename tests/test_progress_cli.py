"""The commands show, list, reset and reset-failed: their output, exit codes and cost."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pexpect
import pytest

import progress_utils
from progress_utils import Progress, cache_lock
from support import (
    ROOT,
    SPEC,
    read_progress,
    record,
    run_utils,
    tree,
    write_record,
)


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "UTC")  # for the commands started here


# ---------------------------------------------------------------------------------------------------------------------
# show
# ---------------------------------------------------------------------------------------------------------------------


def test_show_prints_these_lines(tmp_path):
    write_record(tmp_path)
    shown = run_utils("show", "--cache-dir", tmp_path)
    expected = f"""\
📊 Progress Status for {tmp_path}
============================================================
Dataset: robot
Completed trajectories: 2
Failed trajectories: 0
Total chunks generated: 3
Processing time: 2.5 hours
Last update: Mon Jan 10 15:30:45 2022
Done: 2 of 8, 0 failed, 6 pending; 230 bytes

Processing Configuration:
  dino_model_type: small
  max_chunk_distance_m: 50.0
  frame_pattern: (\\d+)\\.jpg
"""
    assert (shown.returncode, shown.stdout, shown.stderr) == (0, expected, "")


@pytest.mark.parametrize(
    ("failed", "arguments", "listed", "last"),
    [
        (5, [], 5, None),
        (10, [], 10, None),
        (11, [], 10, "  ... and 1 more"),
        (25, [], 10, "  ... and 15 more"),
        (25, ["--all"], 25, None),
    ],
)
def test_show_lists_ten_failures_and_counts_the_rest(tmp_path, failed, arguments, listed, last):
    write_record(tmp_path, failed)
    shown = run_utils("show", "--cache-dir", tmp_path, *arguments)
    lines = shown.stdout.splitlines()
    expected = [f"❌ Failed Trajectories ({failed}):", *(f"  - f{i}: f{i}/0.jpg: broken" for i in range(listed))]
    assert lines[lines.index(expected[0]) :] == expected + ([last] if last else [])
    assert f"Failed trajectories: {failed}" in lines
    assert shown.returncode == 0


def test_show_says_that_a_cache_is_mixed_and_that_a_rebuild_is_under_way(tmp_path):
    changes = record()
    changes["specs"]["e" * 16] = SPEC
    changes["trajectory_records"]["b/ü"]["fingerprint"] = "e" * 16
    changes["rebuild_started"] = 1641828645.0
    write_record(tmp_path, **changes)
    shown = run_utils("show", "--cache-dir", tmp_path).stdout
    assert "mixed" in shown.lower()
    assert "rebuild" in shown.lower()
    assert json.loads(run_utils("show", "--cache-dir", tmp_path, "--json").stdout)["mixed"] is True
    write_record(tmp_path)
    shown = run_utils("show", "--cache-dir", tmp_path).stdout
    assert "mixed" not in shown.lower()
    assert "rebuild" not in shown.lower()


def test_show_json_is_the_whole_record(tmp_path):
    write_record(tmp_path, failed=12)
    shown = run_utils("show", "--cache-dir", tmp_path, "--json")
    assert shown.returncode == 0
    assert json.loads(shown.stdout) == {"cache_dir": str(tmp_path), "mixed": False, **record(12)}


def test_a_locale_without_emoji_does_not_stop_show(tmp_path, monkeypatch):
    write_record(tmp_path, failed=1)
    for key, value in {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}.items():
        monkeypatch.setenv(key, value)
    shown = run_utils("show", "--cache-dir", tmp_path)
    assert shown.returncode == 0
    assert "  - f0: f0/0.jpg: broken" in shown.stdout


def test_total_chunks_is_derived_from_the_record(tmp_path):
    write_record(tmp_path, total_chunks=99)
    assert "Total chunks generated: 3\n" in run_utils("show", "--cache-dir", tmp_path).stdout


# ---------------------------------------------------------------------------------------------------------------------
# list
# ---------------------------------------------------------------------------------------------------------------------


def test_list_prints_a_line_for_every_cache_below_root(tmp_path):
    write_record(tmp_path / "lab" / "cache", failed=4)
    write_record(tmp_path / "yard", dataset_name="yard_walks", num_trajectories=None)
    listed = run_utils("list", "--root", tmp_path)
    lines = [line.split() for line in listed.stdout.splitlines()]
    date = ["Mon", "Jan", "10", "15:30:45", "2022"]
    assert lines == [
        ["Dataset", "Completed", "Done", "Failed", "Chunks", "Size", "State", "Last", "update", "Cache", "folder"],
        ["robot", "2", "25.0%", "4", "3", "230", "bytes", "idle", *date, str(tmp_path / "lab" / "cache")],
        ["yard_walks", "2", "?", "0", "3", "230", "bytes", "idle", *date, str(tmp_path / "yard")],
    ]
    rows = listed.stdout.splitlines()
    ends = [re.search(r"Completed|\b2\b", row).end() for row in rows]
    assert len(set(ends)) == 1  # numbers stand under each other
    assert listed.returncode == 0


def test_list_json_has_the_same_facts(tmp_path):
    write_record(tmp_path / "cache", failed=4)
    listed = run_utils("list", "--root", tmp_path, "--json")
    assert listed.returncode == 0
    facts = {"dataset_name": "robot", "completed": 2, "failed": 4, "chunks": 3, "last_update": 1641828645.0}
    facts |= {"percent": 25.0, "bytes": 230, "state": "idle"}  # 2 of 8; 100 + 60 + 70 bytes
    assert json.loads(listed.stdout) == [{"cache_dir": str(tmp_path / "cache"), **facts}]


def test_list_searches_the_current_folder_by_default(tmp_path, monkeypatch):
    write_record(tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    assert [row["cache_dir"] for row in json.loads(run_utils("list", "--json").stdout)] == ["cache"]


def test_list_goes_on_past_an_unreadable_cache_and_exits_1(tmp_path):
    write_record(tmp_path / "bad")
    (tmp_path / "bad" / "progress.json").write_text("{")
    write_record(tmp_path / "good")
    listed = run_utils("list", "--root", tmp_path)
    assert listed.returncode == 1
    assert str(tmp_path / "bad" / "progress.json") in listed.stdout
    assert listed.stdout.splitlines()[-1].endswith(str(tmp_path / "good"))
    rows = json.loads(run_utils("list", "--root", tmp_path, "--json").stdout)
    assert [sorted(row) for row in rows] == [
        ["cache_dir", "error"],
        ["bytes", "cache_dir", "chunks", "completed", "dataset_name", "failed", "last_update", "percent", "state"],
    ]


def test_list_without_caches_is_fine_and_without_root_is_not(tmp_path):
    listed = run_utils("list", "--root", tmp_path)
    assert (listed.returncode, str(tmp_path) in listed.stdout) == (0, True)
    assert json.loads(run_utils("list", "--root", tmp_path, "--json").stdout) == []
    listed = run_utils("list", "--root", tmp_path / "absent")
    assert (listed.returncode, str(tmp_path / "absent") in listed.stderr) == (2, True)


# ---------------------------------------------------------------------------------------------------------------------
# What a run tells while it works
# ---------------------------------------------------------------------------------------------------------------------


def state_of(cache_dir: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert progress_utils.main(["list", "--root", str(cache_dir), "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    return row["state"]


def beat(cache_dir: Path, done: int, name: str, monkeypatch: pytest.MonkeyPatch) -> progress_utils.Heartbeat:
    """What a run 360 s old tells at 25 frames/s with 45,000 frames left."""
    monkeypatch.setattr(progress_utils, "HEARTBEAT_INTERVAL_S", 0.0)
    state = progress_utils.RunState(done, 8, 30, 360.0, 45000, 25.0, name)
    heartbeat = progress_utils.Heartbeat(cache_dir)
    heartbeat.beat(lambda: state)
    return heartbeat


def test_list_says_running_stale_or_idle(tmp_path, capsys, monkeypatch):
    owner = write_record(tmp_path) / ".lock.owner"
    assert state_of(tmp_path, capsys) == "idle"
    with cache_lock(tmp_path):
        assert state_of(tmp_path, capsys) == "running"
        text = owner.read_text()
        os.utime(owner, (0, 0))
        assert state_of(tmp_path, capsys) == "running"  # it reads poses, or is at work on another dataset
        heartbeat = beat(tmp_path, 2, "a", monkeypatch)
        os.utime(owner, (time.time() - 890, time.time() - 890))
        assert state_of(tmp_path, capsys) == "running"
        os.utime(owner, (time.time() - 901, time.time() - 901))
        assert state_of(tmp_path, capsys) == "stale"  # it encodes, and is silent for 15 minutes
        heartbeat.end()
        os.utime(owner, (0, 0))
        assert state_of(tmp_path, capsys) == "running"  # done with this one
    assert state_of(tmp_path, capsys) == "idle"
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    owner.write_text(text.replace(str(os.getpid()), str(dead.pid)))  # as a kill -9 leaves it
    assert state_of(tmp_path, capsys) == "stale"
    progress_utils.main(["show", "--cache-dir", str(tmp_path)])
    assert f"Stale: a run (pid {dead.pid} on " in capsys.readouterr().out
    owner.write_text(text.replace(str(os.getpid()), str(dead.pid)).replace(os.uname().nodename, "elsewhere"))
    assert state_of(tmp_path, capsys) == "stale"  # of a container that is no more, say: nobody holds the lock
    owner.write_text(text)  # by a pid that lives
    assert state_of(tmp_path, capsys) == "stale"
    owner.write_text("{")
    assert state_of(tmp_path, capsys) == "idle"


TOLD = "Progress: 2/8 trajectories (25.0%), 30 chunks, 0.1h elapsed, 0.5h remaining, 25 frames/s"


def test_show_says_how_far_a_run_is_and_which_trajectory_is_in_work(tmp_path, monkeypatch):
    write_record(tmp_path)
    with cache_lock(tmp_path):
        lines = run_utils("show", "--cache-dir", tmp_path).stdout.splitlines()
        (line,) = [line for line in lines if line.startswith("Run at work: ")]
        assert line.startswith(f"Run at work: pid {os.getpid()} on ")
        beat(tmp_path, 2, "b/\x1b[31mred", monkeypatch)
        lines = run_utils("show", "--cache-dir", tmp_path).stdout.splitlines()
        assert lines[lines.index(line) + 1 :][:2] == [TOLD, "Trajectory in work: b/\\x1b[31mred"]
        with pytest.raises(progress_utils.CacheLockedError, match=f"pid {os.getpid()} on "), cache_lock(tmp_path):
            pass  # what is told leaves the holder's name as it was
    assert "Run at work" not in run_utils("show", "--cache-dir", tmp_path).stdout
    assert set(tree(tmp_path)) == {"progress.json", ".lock"}


def test_watch_shows_in_place_what_changes_until_ctrl_c(tmp_path, monkeypatch):
    write_record(tmp_path)
    arguments = [str(ROOT / "progress_utils.py"), "show", "--cache-dir", str(tmp_path), "--watch", "0.1"]
    with pexpect.spawn(sys.executable, arguments, timeout=60, encoding="utf-8", dimensions=(30, 80)) as terminal:
        terminal.expect_exact("\x1b[2J")  # the screen is cleared once
        terminal.expect_exact("Completed trajectories: 2")
        with cache_lock(tmp_path):
            terminal.expect_exact("Run at work: ")
            beat(tmp_path, 2, "b/c", monkeypatch)
            terminal.expect_exact(TOLD.replace(" frames/s", "\x1b[K\r\n  frames/s"))  # all of it, on a narrow screen
            terminal.expect_exact("Trajectory in work: b/c")
        progress = Progress.load(tmp_path)
        progress.fail("f", record(1)["failures"]["f0"])
        progress.save()
        terminal.expect_exact("  - f: f0/0.jpg: broken")
        assert "\x1b[2J" not in terminal.before
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 0


def test_watch_without_a_terminal_prints_a_block_for_each_change(tmp_path):
    write_record(tmp_path)
    command = [sys.executable, str(ROOT / "progress_utils.py"), "show", "--cache-dir", str(tmp_path), "--watch", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        first = list(iter(it.stdout.readline, "\n"))
        time.sleep(0.5)  # nothing changes
        progress = Progress.load(tmp_path)
        progress.forget("a")
        progress.save()
        second = list(iter(it.stdout.readline, "\n"))
        it.send_signal(signal.SIGINT)
        rest, errors = it.communicate(timeout=60)
    assert "Completed trajectories: 2\n" in first
    assert "Completed trajectories: 1\n" in second
    assert (it.returncode, rest, errors) == (0, "", "")
    assert not any("\x1b" in line for line in first + second)


@pytest.mark.parametrize("arguments", [["--watch", "0"], ["--watch", "nan"], ["--watch", "--json"]], ids=" ".join)
def test_a_watch_that_cannot_be_is_refused(tmp_path, arguments):
    write_record(tmp_path)
    assert run_utils("show", "--cache-dir", tmp_path, *arguments).returncode == 2


def test_watch_waits_for_the_record_of_a_run_that_has_begun(tmp_path):
    command = [sys.executable, str(ROOT / "progress_utils.py"), "show", "--cache-dir", str(tmp_path)]
    with cache_lock(tmp_path):
        refused = run_utils("show", "--cache-dir", tmp_path)
        assert refused.returncode == 2
        assert f"A run is at work (pid {os.getpid()} on " in refused.stderr
        told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen([*command, "--watch", "0.1"], **told) as watching:
            assert "has recorded nothing yet; waiting" in watching.stderr.readline()
            write_record(tmp_path)
            assert "Completed trajectories: 2\n" in iter(watching.stdout.readline, "\n")
            watching.send_signal(signal.SIGINT)
    assert watching.returncode == 0


def test_watch_refuses_a_folder_without_a_record(tmp_path):
    refused = run_utils("show", "--cache-dir", tmp_path, "--watch")
    assert (refused.returncode, "no progress.json here" in refused.stderr) == (2, True)


# ---------------------------------------------------------------------------------------------------------------------
# reset and reset-failed
# ---------------------------------------------------------------------------------------------------------------------


def check_reset(cache_dir: Path, before: bytes, dataset_name: str | None = "robot") -> None:
    (kept,) = cache_dir.glob("progress.json.reset-*")
    assert kept.read_bytes() == before
    empty = read_progress(cache_dir)
    assert empty["dataset_name"] == dataset_name
    assert [empty[key] for key in ("completed_trajectories", "failed_trajectories")] == [[], []]
    assert [empty[key] for key in ("trajectory_records", "trajectory_checksums", "failures", "specs")] == [{}] * 4
    assert (empty["total_chunks"], empty["elapsed_s"], empty["processing_config"]) == (0, 0, {})


def test_reset_empties_the_record_and_keeps_the_old_one(tmp_path):
    before = (write_record(tmp_path, failed=2) / "progress.json").read_bytes()
    done = run_utils("reset", "--cache-dir", tmp_path, "--yes")
    assert done.returncode == 0
    check_reset(tmp_path, before)


def test_reset_sets_an_unusable_record_aside(tmp_path):
    (tmp_path / "progress.json").write_bytes(b'{"half": ')
    (tmp_path / "progress.json.bak").write_bytes(b"a good one")
    assert run_utils("reset", "--cache-dir", tmp_path, "--yes").returncode == 0
    check_reset(tmp_path, b'{"half": ', dataset_name=None)
    assert (tmp_path / "progress.json.bak").read_bytes() == b"a good one"


def test_two_resets_within_a_second_keep_both_records(tmp_path, monkeypatch):
    before = (write_record(tmp_path) / "progress.json").read_bytes()
    monkeypatch.setattr(time, "strftime", lambda *_: "20220110-153045")
    for _ in range(2):
        assert progress_utils.main(["reset", "--cache-dir", str(tmp_path), "--yes"]) == 0
    assert before in [path.read_bytes() for path in tmp_path.glob("progress.json.reset-*")]


def test_reset_without_a_terminal_needs_yes(tmp_path):
    write_record(tmp_path)
    refused = run_utils("reset", "--cache-dir", tmp_path)
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert set(tree(tmp_path)) <= {"progress.json", ".lock"}
    assert read_progress(tmp_path) == record()


@pytest.mark.parametrize(("answer", "code"), [("n", 2), ("", 2), ("y", 0)])
def test_reset_asks_on_a_terminal(tmp_path, answer, code):
    before = (write_record(tmp_path) / "progress.json").read_bytes()
    command = [str(ROOT / "progress_utils.py"), "reset", "--cache-dir", str(tmp_path)]
    with pexpect.spawn(sys.executable, command, timeout=60) as terminal:
        terminal.expect_exact("2 completed, 0 failed trajectories")  # what would be lost
        terminal.expect_exact("[y/N]")
        terminal.sendline(answer)
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == code
    if code == 0:
        check_reset(tmp_path, before)
    else:
        assert set(tree(tmp_path)) <= {"progress.json", ".lock"}
        assert (tmp_path / "progress.json").read_bytes() == before


def test_reset_failed_forgets_failures_and_nothing_else(tmp_path):
    before = (write_record(tmp_path, failed=2) / "progress.json").read_bytes()
    done = run_utils("reset-failed", "--cache-dir", tmp_path)
    assert (done.returncode, "2" in done.stdout) == (0, True)
    after = read_progress(tmp_path)
    assert after.pop("last_update") > 1641828645.0
    expected = record()
    del expected["last_update"]
    assert after == expected
    assert (tmp_path / "progress.json.bak").read_bytes() == before


def test_reset_failed_without_failures_changes_nothing(tmp_path):
    before = (write_record(tmp_path) / "progress.json").read_bytes()
    assert run_utils("reset-failed", "--cache-dir", tmp_path).returncode == 0
    assert (tmp_path / "progress.json").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# Use and cost
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["show"],
        ["destroy"],
        ["show", "--cache-dir", "{folder}"],
        ["show", "--cache-dir", "{folder}/absent"],
        ["reset-failed", "--cache-dir", "{folder}"],
        ["reset", "--cache-dir", "{folder}", "--yes"],
    ],
)
def test_wrong_usage_exits_2_and_writes_nothing(tmp_path, arguments):
    done = run_utils(*(argument.format(folder=tmp_path) for argument in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert tree(tmp_path) == {}


def test_reading_writes_nothing(tmp_path):
    write_record(tmp_path, failed=1)
    run_utils("show", "--cache-dir", tmp_path)
    run_utils("list", "--root", tmp_path)
    assert set(tree(tmp_path)) == {"progress.json"}


def test_importing_it_imports_the_standard_library_only():
    code = "import sys; before = set(sys.modules); import progress_utils; print(*(set(sys.modules) - before))"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packages = {name.partition(".")[0] for name in imported.split()}
    assert "json" in packages
    assert packages - sys.stdlib_module_names == {"progress_utils"}


def test_the_scripts_help_ends_in_an_example():
    for arguments in ([], ["show"], ["list"], ["reset"], ["reset-failed"]):
        shown = run_utils(*arguments, "--help")
        assert shown.returncode == 0
        assert "Example: python progress_utils.py " in " ".join(shown.stdout.splitlines()[-2:])


def test_a_reader_that_stops_early_gets_no_traceback(tmp_path):
    write_record(tmp_path, failed=5000)
    command = f"{sys.executable} {ROOT / 'progress_utils.py'} show --all --cache-dir {tmp_path} | head -1"
    shown = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert shown.stdout == f"📊 Progress Status for {tmp_path}\n"
    assert "Traceback" not in shown.stderr


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("max 100000\n", 8), ("400000 100000\n", 4), ("250000 100000\n", 2), ("20000 100000\n", 1), ("", 8), (None, 8)],
)
def test_a_containers_quota_bounds_the_cores(tmp_path, monkeypatch, quota, cores):
    if quota is not None:
        (tmp_path / "cpu.max").write_text(quota)
    monkeypatch.setattr(progress_utils, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    assert progress_utils.available_cores() == cores


# ---------------------------------------------------------------------------------------------------------------------
# Which cache, and how it stands in one line
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", [["{cache}"], ["{cache}/progress.json"], ["--cache-dir", "{cache}/progress.json"]])
def test_a_cache_is_named_by_its_folder_or_its_record(tmp_path, way):
    write_record(tmp_path, failed=1)
    named = [word.format(cache=tmp_path) for word in way]
    shown = run_utils("show", *named)
    assert (shown.returncode, shown.stdout.splitlines()[0]) == (0, f"📊 Progress Status for {tmp_path}")
    assert run_utils("reset-failed", *named).returncode == 0
    assert read_progress(tmp_path)["failures"] == {}
    assert run_utils("reset", *named, "--yes").returncode == 0
    assert read_progress(tmp_path)["completed_trajectories"] == []


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "needs a cache: give its folder, or --config FILE [--dataset NAME]"),
        (["{cache}", "--cache-dir", "{cache}"], "names its cache more than once"),
        (["{cache}", "--config", "robot.yaml"], "names its cache more than once"),
        (["{cache}", "--dataset", "robot"], "--dataset robot: goes with --config FILE"),
        (["{cache}/robot.yaml"], "is a configuration, not a cache: give it as --config "),
        (["--watch", "{cache}"], "is not a number of seconds; a cache stands before --watch"),
    ],
)
def test_a_cache_that_is_not_clear_is_refused(tmp_path, arguments, why):
    write_record(tmp_path)
    (tmp_path / "robot.yaml").touch()
    before = tree(tmp_path)
    for command in ["show"] if "--watch" in arguments else ["show", "reset-failed"]:
        refused = run_utils(command, *(word.format(cache=tmp_path) for word in arguments))
        assert (refused.returncode, refused.stdout) == (2, "")
        assert why in refused.stderr
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("failed", "total", "last_run", "line"),
    [
        (5, 10, None, "Done: 2 of 10, 5 failed, 3 pending; 230 bytes"),
        (5, 4, None, "Done: 2 of 4, 5 failed, 0 pending; 230 bytes"),  # failed ones are gone from the data
        (0, None, None, "Done: 2 completed, 0 failed; 230 bytes"),  # an early version did not say
        (0, 2, '{"seconds": 12.3, "frames_per_s": 14.61}', "Done: 2 of 2, 0 failed, 0 pending; 230 bytes; "
         "last run 12 s at 14.6 frames/s"),
        (0, 2, '{"seconds": 9000}', "Done: 2 of 2, 0 failed, 0 pending; 230 bytes; last run 2.5 h"),
        (0, 2, '{"seconds": ', "Done: 2 of 2, 0 failed, 0 pending; 230 bytes"),
        (0, 2, "[]", "Done: 2 of 2, 0 failed, 0 pending; 230 bytes"),
    ],
)  # fmt: skip
def test_show_says_in_a_line_how_a_cache_stands(tmp_path, failed, total, last_run, line):
    write_record(tmp_path, failed, num_trajectories=total)
    if last_run is not None:
        (tmp_path / "runs.jsonl").write_text(f'{{"seconds": 1}}\n{last_run}\n')
    assert line in run_utils("show", tmp_path).stdout.splitlines()


def test_a_reason_that_begins_with_the_trajectory_names_it_once(tmp_path):
    failures = record(2)["failures"]
    failures["f0"]["reason"] = "f0: position is in millimetres"
    write_record(tmp_path, 2, failures=failures)
    lines = run_utils("show", tmp_path).stdout.splitlines()
    assert lines[-2:] == ["  - f0: position is in millimetres", "  - f1: f1/0.jpg: broken"]


def test_a_long_trajectory_moves_by_frames(tmp_path, monkeypatch):
    monkeypatch.setattr(progress_utils, "HEARTBEAT_INTERVAL_S", 0.0)
    write_record(tmp_path)
    with cache_lock(tmp_path):
        heartbeat = progress_utils.Heartbeat(tmp_path)
        for done, told in (
            (1200, "1,200 of 20,000"),
            (15000, "15,000 of 20,000"),
        ):
            state = progress_utils.RunState(0, 1, 0, 60.0, 20000 - done, 20.0, "hour", frames_done=done)
            heartbeat.beat(lambda state=state: state)
            line = f"Frames: {told} in this run ({done / 200:.1f}%)"
            assert line in run_utils("show", tmp_path).stdout.splitlines()
            owner = json.loads((tmp_path / ".lock.owner").read_text())
            assert [*owner["run"]] == [  # what older versions read
                "done", "total", "chunks", "elapsed_s", "frames_left", "frames_per_s", "trajectory",
            ]  # fmt: skip
        heartbeat.end()
        assert "Frames: " not in run_utils("show", tmp_path).stdout
