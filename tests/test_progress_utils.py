"""progress_utils: the commands' output and exit codes, what a record must be, saving, the lock."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pexpect
import pytest

import progress_utils
from progress_utils import Progress, cache_lock
from support import ROOT, make_trajectory, read_progress, run_utils, tree, write_config, write_poses

SPEC = {"dino_model_type": "small", "max_chunk_distance_m": 50.0, "frame_pattern": r"(\d+)\.jpg"}
KEYS = {
    "format_version", "dataset_name", "start_time", "last_update", "elapsed_s", "completed_trajectories",
    "failed_trajectories", "total_chunks", "processing_config", "trajectory_checksums", "checksum_kind",
    "rebuild_started", "weights", "specs", "trajectory_records", "failures",
}  # fmt: skip
LATER_KEYS = {"data_folder", "data_format", "num_trajectories"}  # that records of earlier versions lack


def record(failed: int = 0, **changes: Any) -> dict[str, Any]:
    """progress.json by hand: `a` with two chunks and `b/ü` with one are completed, f0, f1, ... failed."""
    entry = {"fingerprint": "f" * 16, "checksum_kind": "stat"}
    failure = {"error_type": "InputError", "attempts": 3, "time": 1.0, "checksum": None, "checksum_kind": "stat"}
    return {
        "format_version": 1,
        "dataset_name": "robot",
        "start_time": 1641800000.0,
        "last_update": 1641828645.0,  # Mon Jan 10 15:30:45 2022 UTC
        "elapsed_s": 9000.0,
        "completed_trajectories": ["a", "b/ü"],
        "failed_trajectories": [f"f{i}" for i in range(failed)],
        "total_chunks": 3,
        "processing_config": SPEC,
        "trajectory_checksums": {"a": "0" * 16, "b/ü": "1" * 16},
        "data_folder": "/data/robot",
        "data_format": "gnm",
        "num_trajectories": 8,
        "checksum_kind": "stat",
        "rebuild_started": None,
        "weights": {"source": "random", "size": None, "mtime": None, "digest": "d" * 16},
        "specs": {"f" * 16: SPEC},
        "trajectory_records": {
            "a": {**entry, "spans": [[0, 9], [7, 12]], "bytes": [100, 60]},
            "b/ü": {**entry, "spans": [[0, 5]], "bytes": [70]},
        },
        "failures": {f"f{i}": {**failure, "reason": f"f{i}/0.jpg: broken"} for i in range(failed)},
        **changes,
    }


def write_record(cache_dir: Path, failed: int = 0, **changes: Any) -> Path:
    cache_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record(failed, **changes), ensure_ascii=False)
    (cache_dir / "progress.json").write_text(text, encoding="utf-8")
    return cache_dir


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


def test_a_record_of_an_earlier_version_is_shown_and_listed(tmp_path):
    data = {key: value for key, value in record().items() if key not in LATER_KEYS}
    (tmp_path / "progress.json").write_text(json.dumps(data))
    assert run_utils("show", "--cache-dir", tmp_path).returncode == 0
    (row,) = json.loads(run_utils("list", "--root", tmp_path, "--json").stdout)
    assert (row["completed"], row["percent"]) == (2, None)


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
    assert state_of(tmp_path, capsys) == "running"  # nobody here can tell whether that process lives
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


def test_what_is_told_is_spaced(tmp_path, monkeypatch):
    told, now = [], [100.0]
    state = progress_utils.RunState(1, 2, 3, 4.0, 5, 6.0, "t")
    with cache_lock(tmp_path):
        monkeypatch.setattr(progress_utils, "HEARTBEAT_INTERVAL_S", 2.0)
        monkeypatch.setattr(progress_utils.time, "monotonic", lambda: now[0])
        heartbeat = progress_utils.Heartbeat(tmp_path)
        for now[0] in (100.0, 101.5, 102.0, 103.5, 104.0, 104.5, 107.0):
            heartbeat.beat(lambda: told.append(now[0]) or state)
    assert told == [102.0, 104.0, 107.0]  # a run that is over at once tells nothing


def test_watch_shows_in_place_what_changes_until_ctrl_c(tmp_path, monkeypatch):
    write_record(tmp_path)
    arguments = [str(ROOT / "progress_utils.py"), "show", "--cache-dir", str(tmp_path), "--watch", "0.1"]
    with pexpect.spawn(sys.executable, arguments, timeout=60, encoding="utf-8", dimensions=(30, 120)) as terminal:
        terminal.expect_exact("\x1b[2J")  # the screen is cleared once
        terminal.expect_exact("Completed trajectories: 2")
        with cache_lock(tmp_path):
            terminal.expect_exact("Run at work: ")
            beat(tmp_path, 2, "b/c", monkeypatch)
            terminal.expect_exact(TOLD)
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


# ---------------------------------------------------------------------------------------------------------------------
# The lock
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def held_cache(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """A cache whose lock another process holds, and that process."""
    write_record(tmp_path, failed=1)
    code = (
        "import sys; from pathlib import Path; from progress_utils import cache_lock\n"
        "with cache_lock(Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as it:
        assert it.stdout.readline() == "held\n"
        yield tmp_path, it
        it.kill()


@pytest.mark.parametrize("command", [["reset", "--yes"], ["reset-failed"]])
def test_edits_are_refused_while_the_lock_is_held_and_work_once_its_holder_is_dead(held_cache, command):
    cache_dir, holder = held_cache
    refused = run_utils(*command, "--cache-dir", cache_dir)
    assert refused.returncode == 4
    assert f"pid {holder.pid} " in refused.stderr
    assert read_progress(cache_dir) == record(1)
    holder.kill()  # leaves what a power cut leaves
    holder.wait()
    assert run_utils(*command, "--cache-dir", cache_dir).returncode == 0
    assert read_progress(cache_dir)["failures"] == {}


def test_reading_works_and_writes_nothing_while_the_lock_is_held(held_cache):
    cache_dir, _ = held_cache
    before = tree(cache_dir)
    assert run_utils("show", "--cache-dir", cache_dir).returncode == 0
    assert run_utils("list", "--root", cache_dir).returncode == 0
    assert tree(cache_dir) == before


def test_reading_writes_nothing(tmp_path):
    write_record(tmp_path, failed=1)
    run_utils("show", "--cache-dir", tmp_path)
    run_utils("list", "--root", tmp_path)
    assert set(tree(tmp_path)) == {"progress.json"}


def test_a_filesystem_that_cannot_lock_is_refused_with_the_way_on(tmp_path, monkeypatch, capsys):
    def no_locks(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    write_record(tmp_path, failed=1)
    monkeypatch.setattr("fcntl.flock", no_locks)
    assert progress_utils.main(["reset-failed", "--cache-dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / ".lock") in message
    assert "flock" in message
    assert read_progress(tmp_path) == record(1)


def test_the_owner_is_written_beside_the_lock_and_removed_with_it(tmp_path):
    with cache_lock(tmp_path):
        owner = json.loads((tmp_path / ".lock.owner").read_text())
        assert sorted(owner) == ["host", "pid", "started"]
        assert owner["pid"] == os.getpid()
    assert not (tmp_path / ".lock.owner").exists()


# ---------------------------------------------------------------------------------------------------------------------
# What a record must be
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_records_exactly_these_keys(tmp_path, run_here):
    make_trajectory(tmp_path / "data" / "good", 20)
    write_poses(make_trajectory(tmp_path / "data" / "bad", 3), np.full((3, 2), np.nan), np.zeros(3))
    assert run_here(write_config(tmp_path / "c.yaml", tmp_path / "data")).code == 1
    written = read_progress(tmp_path / "data" / "dino_cache_small")
    assert written.keys() == KEYS | LATER_KEYS
    assert written["data_folder"] == str(tmp_path / "data")
    assert written["data_format"] == "gnm"
    assert written["num_trajectories"] == 2
    assert written["completed_trajectories"] == ["good"]
    assert written["failed_trajectories"] == ["bad"]
    entry, failure = written["trajectory_records"]["good"], written["failures"]["bad"]
    assert entry.keys() == {"fingerprint", "spans", "bytes", "checksum_kind"}
    assert failure.keys() == {"reason", "error_type", "attempts", "time", "checksum", "checksum_kind"}
    # 20 frames 0.25 m apart, 2 m chunks with 0.5 m overlap: 0-2.0, 1.5-3.5, 3.0-4.75 m
    assert entry["spans"] == [[0, 9], [6, 15], [12, 20]]
    assert written["total_chunks"] == 3
    files = sorted((tmp_path / "data" / "dino_cache_small" / "good").iterdir())
    assert entry["bytes"] == [path.stat().st_size for path in files]
    assert written["processing_config"] == written["specs"][entry["fingerprint"]]
    assert len(written["trajectory_checksums"]["good"]) == 16
    assert int(written["trajectory_checksums"]["good"], 16) >= 0


def without(entries: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if name != key}


def with_entry(key: str, name: str, **changes: Any) -> dict[str, Any]:
    """The record, with some fields of one trajectory's entry changed."""
    entries = record(1)[key]
    return record(1, **{key: {**entries, name: {**entries[name], **changes}}})


def with_wrong_type(key: str) -> dict[str, Any]:
    is_number = isinstance(record(rebuild_started=1.0)[key], (int, float))
    return record(1, **{key: "text" if is_number else 1})


UNUSABLE: dict[str, Any] = {
    "empty": b"",
    "half a file": json.dumps(record()).encode()[:-40],
    "zeros, as after a power cut": bytes(500),
    "not UTF-8": b'{"format_version": "\xff"}',
    "deeply nested": b"[" * 100_000,
    "a list": [],
    "null": None,
    "no version": without(record(), "format_version"),
    "an older layout": {"completed_trajectories": ["a"], "failed_trajectories": [], "total_chunks": 1},
    "version 0": record(format_version=0),
    **{f"no {key}": without(record(1), key) for key in sorted(KEYS)},
    **{f"{key} of a wrong type": with_wrong_type(key) for key in sorted(KEYS | LATER_KEYS)},
    "elapsed_s is true": record(elapsed_s=True),
    "completed without a record": record(completed_trajectories=["a", "b/ü", "c"]),
    "a record that is not completed": record(completed_trajectories=["a"]),
    "no checksum": record(trajectory_checksums={"a": "0" * 16}),
    "a checksum that is a number": record(trajectory_checksums={"a": 0, "b/ü": "1" * 16}),
    "failed without a reason": record(1, failures={}),
    "a reason without a failed one": record(1, failed_trajectories=[]),
    "completed and failed": record(1, failed_trajectories=["a"], failures={"a": record(1)["failures"]["f0"]}),
    "a list among the names": record(completed_trajectories=["a", ["b/ü"]]),
    "a spec that is missing": record(specs={}),
    "a spec that is a number": record(specs={"f" * 16: 1}),
    "weights without a digest": record(weights={"source": "random"}),
    "fewer sizes than spans": with_entry("trajectory_records", "a", bytes=[100]),
    "a span of one number": with_entry("trajectory_records", "a", spans=[[0], [7, 12]]),
    "a span of text": with_entry("trajectory_records", "a", spans=[["0", "9"], [7, 12]]),
    "no spans": with_entry("trajectory_records", "a", spans=[], bytes=[]),
    "attempts as text": with_entry("failures", "f0", attempts="3"),
    "a reason of null": with_entry("failures", "f0", reason=None),
    "a time that no clock shows": record(last_update=1e300),
    "a time that is no number": record(last_update=float("nan")),
}


@pytest.mark.parametrize("content", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_record_stops_everything_with_the_way_out_and_nothing_changed(tmp_path, run_here, capsys, content):
    make_trajectory(tmp_path / "data" / "a", 3)
    cache_dir = tmp_path / "data" / "dino_cache_small"
    cache_dir.mkdir()
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (cache_dir / "progress.json").write_bytes(data)
    config = write_config(tmp_path / "c.yaml", tmp_path / "data")
    folder = str(cache_dir)
    commands: list[Callable[[], int]] = [
        lambda: progress_utils.main(["show", "--cache-dir", folder]),
        lambda: progress_utils.main(["show", "--cache-dir", folder, "--json"]),
        lambda: progress_utils.main(["reset-failed", "--cache-dir", folder]),
    ]
    for command in commands:
        assert command() == 2
        check_way_out(cache_dir, capsys.readouterr().err)
    outcome = run_here(config)
    assert outcome.code == 2
    check_way_out(cache_dir, outcome.err)
    assert without(tree(cache_dir), ".lock") == {"progress.json": data}


def test_a_newer_record_stops_everything_and_asks_for_a_newer_program(tmp_path, run_here, capsys):
    make_trajectory(tmp_path / "data" / "a", 3)
    cache_dir = tmp_path / "data" / "dino_cache_small"
    cache_dir.mkdir()
    text = json.dumps({**record(), "format_version": 2, "unheard of": 1})
    (cache_dir / "progress.json").write_text(text)
    assert progress_utils.main(["show", "--cache-dir", str(cache_dir)]) == 2
    for message in (capsys.readouterr().err, run_here(write_config(tmp_path / "c.yaml", tmp_path / "data")).err):
        assert f"{cache_dir / 'progress.json'}: format_version is 2, this program knows 1" in message
        assert "Update the program" in message
    assert (cache_dir / "progress.json").read_text() == text


def check_way_out(cache_dir: Path, message: str) -> None:
    for part in (cache_dir / "progress.json", "progress.json.bak", f"progress_utils.py reset --cache-dir {cache_dir}"):
        assert str(part) in message


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here; nothing that handles errors sees it."""


def no_hard_links(*_: Any) -> None:
    raise OSError(1, "Operation not permitted")


def save(cache_dir: Path, elapsed_s: float) -> None:
    """Save a record that is known by its elapsed_s."""
    progress = Progress(cache_dir, "robot")
    progress.elapsed_s = elapsed_s
    progress.save()


def saved(path: Path) -> float:
    return json.loads(path.read_text())["elapsed_s"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_copy_before_stays_as_bak(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(os, "link", no_hard_links)
    save(tmp_path, 1.0)
    assert set(tree(tmp_path)) == {"progress.json"}
    for number in (2.0, 3.0, 4.0):
        before = (tmp_path / "progress.json").read_bytes()
        save(tmp_path, number)
        assert saved(tmp_path / "progress.json") == number
        assert (tmp_path / "progress.json.bak").read_bytes() == before
        assert set(tree(tmp_path)) == {"progress.json", "progress.json.bak"}


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_save_killed_at_any_step_leaves_the_old_record_or_the_new(tmp_path, monkeypatch, hard_links):
    """Before every call that changes the disk the record is whole; the process dies at the n-th, for every n."""
    finished, step = False, 0
    while not finished:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        save(folder, 1.0)
        save(folder, 2.0)
        calls = 0

        def dying(function: Callable[..., Any], folder: Path = folder, fatal: int = step) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                nonlocal calls
                calls += 1
                assert saved(folder / "progress.json") in (2.0, 3.0)
                assert saved(folder / "progress.json.bak") in (1.0, 2.0)
                if calls == fatal:
                    raise Killed
                return function(*arguments, **keywords)

            return call

        with monkeypatch.context() as patch:
            if not hard_links:
                patch.setattr(os, "link", no_hard_links)
            for name in ("fsync", "link", "replace", "rename", "unlink"):
                patch.setattr(os, name, dying(getattr(os, name)))
            patch.setattr(shutil, "copyfile", dying(shutil.copyfile))
            try:
                save(folder, 3.0)
                finished = True
            except Killed:
                pass
        assert Progress.load(folder).elapsed_s in (2.0, 3.0)
        save(folder, 4.0)  # what the dead one left is not in the way
        assert Progress.load(folder).elapsed_s == 4.0
        assert saved(folder / "progress.json.bak") in (2.0, 3.0)
    assert step > 5  # fsync, copy, replace, replace, fsync at least


def test_a_full_disk_leaves_the_old_record(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2.0)
    assert saved(tmp_path / "progress.json") == 1.0


def test_saves_beyond_2_percent_of_the_run_are_50_saves_apart(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    replace = os.replace

    def slow_replace(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name == "progress.json":
            clock.now += 2.0  # a save takes 2 s

    monkeypatch.setattr(progress_utils, "time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    monkeypatch.setattr(os, "replace", slow_replace)
    progress = Progress(tmp_path, "robot")

    def saves(run_time_s: float, wait_s: float = 0.0) -> bool:
        before = clock.now = clock.now + wait_s
        progress.save_spaced(run_time_s)
        return clock.now > before

    assert saves(1.0)  # the first
    assert not saves(199.0)  # it and another one are 4 s of 199 s: above 2 %
    assert saves(200.0)  # at 2 %
    assert not saves(200.0)  # 6 s of 200 s
    assert not saves(250.0, wait_s=99.0)  # 50 times 2 s are not yet over
    assert saves(250.0, wait_s=1.0)  # now they are
    assert not saves(399.0)  # 8 s of 399 s
    assert saves(400.0)
    progress.save()  # a plain save is never spaced, and counts
    assert not saves(500.0)  # 12 s of 500 s


def test_counts_can_be_read_while_another_thread_changes_the_record(tmp_path):
    """As a run's progress line does while its writer withdraws what it replaces."""
    progress = Progress(tmp_path, "robot")
    for number in range(2000):
        progress.complete(str(number), "0" * 16, {**record()["trajectory_records"]["a"]})
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as writer:
            withdrawals = [writer.submit(progress.forget, str(number)) for number in range(2000)]
            while not withdrawals[-1].done():
                assert 0 <= progress.total_chunks <= 4000
                assert len(progress.fingerprints) <= 1
    finally:
        sys.setswitchinterval(interval)
    assert progress.total_chunks == 0


# ---------------------------------------------------------------------------------------------------------------------
# Cheap to start
# ---------------------------------------------------------------------------------------------------------------------


def test_importing_it_imports_the_standard_library_only():
    code = "import sys; before = set(sys.modules); import progress_utils; print(*(set(sys.modules) - before))"
    imported = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    packages = {name.partition(".")[0] for name in imported.split()}
    assert "json" in packages
    assert packages - sys.stdlib_module_names == {"progress_utils"}


def test_the_scripts_help_ends_in_an_example():
    for arguments in (
        [],
        ["show"],
        ["list"],
        ["reset"],
        ["reset-failed"],
        ["verify"],
        ["rebuild"],
        ["export"],
        ["report"],
    ):
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
