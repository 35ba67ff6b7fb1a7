"""The lock of a cache: who holds it, who is refused meanwhile, and what its holder tells."""

import json
import os
import subprocess
import sys
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
