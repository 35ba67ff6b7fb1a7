"""RECON: the process that reads HDF5 may be killed, crash or hang; names that say too little are refused."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats_support import chunks, write_recon

from dino_cache import DataKeys, InputError, Trajectory, open_source
from dino_cache_extras.formats import recon
from support import FIRST, ROOT, Outcome, no_hang, wait_until


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[recon.Hdf5Readers]:
    """One process of this test's own."""
    readers = recon.Hdf5Readers(1)
    monkeypatch.setattr(recon, "HDF5_READERS", readers)
    yield readers
    process = readers._idle.get()
    if process is not None:
        process.end()


def pid_of(readers: recon.Hdf5Readers) -> int:
    process = readers._idle.get()
    readers._idle.put(process)
    return process._process.pid


def read_one(path: Path) -> list[bytes]:
    trajectory = Trajectory("t1", path, format="recon")
    return [bytes(data) for data in open_source(trajectory, DataKeys()).open_frames([3]).read([3])]


def test_a_reading_process_that_was_killed_is_replaced(tmp_path: Path, readers: recon.Hdf5Readers) -> None:
    write_recon(tmp_path, [FIRST])
    expected = [FIRST.jpegs[3]]
    assert read_one(tmp_path / "t1.r01.hdf5") == expected
    os.kill(pid_of(readers), signal.SIGKILL)
    assert read_one(tmp_path / "t1.r01.hdf5") == expected


def test_a_file_that_crashes_hdf5_twice_is_at_fault(
    tmp_path: Path, readers: recon.Hdf5Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recon(tmp_path, [FIRST])

    def crash(self: recon.Hdf5Process, request: tuple) -> Any:
        os.kill(self._process.pid, signal.SIGSEGV)
        return self._connection.recv()

    monkeypatch.setattr(recon.Hdf5Process, "ask", crash)
    with pytest.raises(InputError, match=r"t1.r01.hdf5.*crashed.*-11"):
        read_one(tmp_path / "t1.r01.hdf5")


def test_a_file_that_hdf5_does_not_finish_with_is_given_up(
    tmp_path: Path, readers: recon.Hdf5Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recon(tmp_path, [FIRST])
    assert len(read_one(tmp_path / "t1.r01.hdf5")) == 1
    os.kill(pid_of(readers), signal.SIGSTOP)
    monkeypatch.setattr(recon, "HDF5_TIMEOUT_S", 0.3)
    with no_hang(), pytest.raises(OSError, match="no answer"):
        read_one(tmp_path / "t1.r01.hdf5")
    monkeypatch.setattr(recon, "HDF5_TIMEOUT_S", 60)
    assert len(read_one(tmp_path / "t1.r01.hdf5")) == 1


def test_a_reading_process_ends_with_the_run(tmp_path: Path) -> None:
    write_recon(tmp_path / "data", [FIRST])
    code = (
        "import sys, pathlib, dino_cache, os\n"
        "from dino_cache_extras.formats import recon\n"
        "keys = dino_cache.DataKeys()\n"
        "source = dino_cache.open_source(dino_cache.Trajectory('t', pathlib.Path(sys.argv[1]), format='recon'), keys)\n"
        "source.poses(required=True)\n"
        "print(recon.HDF5_READERS._idle.get()._process.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data/t1.r01.hdf5")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120, check=False)
    pid = int(done.stdout)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z")


# ---------------------------------------------------------------------------------------------------------------------
# From the command line
# ---------------------------------------------------------------------------------------------------------------------


def test_two_files_with_one_name_are_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_recon(tmp_path / "data", [FIRST])
    shutil.copy(tmp_path / "data/t1.r01.hdf5", tmp_path / "data/t1.r02.hdf5")
    outcome = run_bits()
    assert outcome.code == 2
    assert all(word in outcome.err for word in ("t1.r01.hdf5", "t1.r02.hdf5", "rename"))


def test_poses_that_are_there_are_stored_also_in_chunks_by_number_of_frames(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    (name,) = write_recon(tmp_path / "data", [FIRST])
    assert run_bits({"chunk_by": "frames", "max_chunk_frames": 40, "overlap_frames": 0}).code == 0
    ((_, datasets),) = chunks(tmp_path / "cache", name)
    assert {*datasets} == {"cls_token", "frame_index", "position", "yaw"}
    np.testing.assert_array_equal(datasets["position"], FIRST.position)
