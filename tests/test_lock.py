"""The lock of a cache: who holds it, who is refused meanwhile, and what its holder tells."""

import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import progress_utils
from progress_utils import cache_lock
from support import ROOT, read_progress, record, run_utils, tree, write_record


@pytest.mark.parametrize("tracking", [True, False])
def test_a_held_cache_is_refused_whatever_the_tracking_but_not_for_a_dry_run(robot, run_here, encoders, tracking):
    robot.add("t0")
    robot.configure(enable_progress_tracking=tracking)
    robot.cache.mkdir()
    with cache_lock(robot.cache):
        before = tree(robot.cache)
        outcome = run_here(robot.config)
        assert outcome.code == 4
        assert f"pid {os.getpid()} " in outcome.err
        assert encoders == []
        assert run_here(robot.config, "--dry-run").code == 0
        assert tree(robot.cache) == before
    assert run_here(robot.config).code == 0


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
# Whether somebody holds it
# ---------------------------------------------------------------------------------------------------------------------

OWNERS = {  # what a killed process left: its pid is another's by now, or its host a container that is no more
    "a pid that lives": {"pid": os.getpid(), "host": os.uname().nodename, "started": "2022-01-10 15:30:45"},
    "pid 1": {"pid": 1, "host": os.uname().nodename, "started": "2022-01-10 15:30:45"},
    "another host": {"pid": 7, "host": "elsewhere", "started": "2022-01-10 15:30:45"},
}


@pytest.mark.parametrize("owner", OWNERS.values(), ids=OWNERS)
def test_a_dead_owners_name_hides_nothing_from_verify(tmp_path, owner):
    pytest.importorskip("dino_cache_extras")
    write_record(tmp_path, trajectory_records={}, trajectory_checksums={}, completed_trajectories=[], total_chunks=0)
    (tmp_path / ".lock").touch()
    (tmp_path / ".lock.owner").write_text(json.dumps(owner))
    (tmp_path / ".staging" / "half").mkdir(parents=True)
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "chunk_00000.h5").touch()
    before = tree(tmp_path)
    done = run_utils("verify", "--json", "--cache-dir", tmp_path)
    assert done.returncode == 1
    findings = json.loads(done.stdout)["findings"]
    assert [(it["kind"], it["path"]) for it in findings] == [("unrecorded", "stray"), ("leftover", ".staging/half")]
    assert not progress_utils.is_locked(tmp_path)
    assert "Stale: a run (" in run_utils("show", "--cache-dir", tmp_path).stdout
    assert tree(tmp_path) == before


def test_a_holder_without_a_name_is_a_holder(held_cache):
    """One whose disk was full when it wrote its name."""
    cache_dir, holder = held_cache
    (cache_dir / ".lock.owner").unlink()
    assert progress_utils.is_locked(cache_dir)
    (row,) = json.loads(run_utils("list", "--json", "--root", cache_dir).stdout)
    assert row["state"] == "running"
    assert "Run at work: its holder left no name" in run_utils("show", "--cache-dir", cache_dir).stdout
    holder.kill()
    holder.wait()
    assert not progress_utils.is_locked(cache_dir)


@pytest.mark.parametrize("lock", ["absent", "a folder", "a FIFO"])
def test_what_is_no_lock_is_held_by_nobody(tmp_path, lock):
    if lock == "a folder":
        (tmp_path / ".lock").mkdir()
    elif lock == "a FIFO":
        os.mkfifo(tmp_path / ".lock")
    before = sorted(tmp_path.iterdir())
    assert not progress_utils.is_locked(tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_those_who_look_keep_no_run_from_starting(tmp_path, monkeypatch):
    """A look holds the lock, shared, for an instant; who wants to hold it meanwhile waits for so long."""
    monkeypatch.setattr(progress_utils, "LOOK_S", 5.0)
    with open(tmp_path / ".lock", "w") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        timer = threading.Timer(0.1, fcntl.flock, (look, fcntl.LOCK_UN))
        timer.start()
        with cache_lock(tmp_path):
            assert progress_utils.is_locked(tmp_path)
        timer.join()
