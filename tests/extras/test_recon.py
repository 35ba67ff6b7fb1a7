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

import h5py
import numpy as np
import pytest
from formats_support import chunks, write_recon

from dino_cache import DataKeys, InputError, Trajectory, open_source
from dino_cache_extras.formats import recon
from support import FIRST, ROOT, SECOND, Outcome, chunk_files, no_hang, read_progress, wait_until


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


def end_by(number: int) -> Callable[[recon.Hdf5Process, tuple], Any]:
    """In place of Hdf5Process.ask: the process is ended by this signal before it answers."""

    def ask(self: recon.Hdf5Process, request: tuple) -> Any:
        os.kill(self._process.pid, number)
        return self._connection.recv()

    return ask


def test_a_reading_process_that_is_killed_each_time_says_nothing_of_the_file(
    tmp_path: Path, readers: recon.Hdf5Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recon(tmp_path, [FIRST])
    monkeypatch.setattr(recon.Hdf5Process, "ask", end_by(signal.SIGKILL))
    with pytest.raises(OSError, match=r"t1.r01.hdf5.*cannot be read.*killed by signal 9.*memory"):
        read_one(tmp_path / "t1.r01.hdf5")


def test_a_library_that_does_not_load_says_nothing_of_the_file(
    tmp_path: Path, readers: recon.Hdf5Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recon(tmp_path, [FIRST])
    (tmp_path / "site").mkdir()
    (tmp_path / "site/sitecustomize.py").write_text("import sys; sys.modules['h5py'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    with pytest.raises(OSError, match=r"t1.r01.hdf5.*cannot be read.*exit status 1.*h5py"):
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


def test_completed_trajectories_survive_runs_in_which_every_reading_process_is_killed(
    run_bits: Callable[..., Outcome], tmp_path: Path, readers: recon.Hdf5Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recon(tmp_path / "data", [FIRST, SECOND])
    assert run_bits().code == 0
    before = {path: path.read_bytes() for path in chunk_files(tmp_path / "cache")}
    with monkeypatch.context() as harm:
        harm.setattr(recon.Hdf5Process, "ask", end_by(signal.SIGKILL))
        outcome = run_bits()
    assert outcome.code == 1
    assert "killed by signal 9" in outcome.err
    assert read_progress(tmp_path / "cache")["completed_trajectories"] == ["t1", "t2"]
    assert {path: path.read_bytes() for path in chunk_files(tmp_path / "cache")} == before
    outcome = run_bits()
    assert outcome.code == 0
    assert "Redoing" not in outcome.err
    assert {path: path.read_bytes() for path in chunk_files(tmp_path / "cache")} == before


@pytest.mark.parametrize("values", [["0.1"] * 40, [b"x" * 100] * 40, [np.ones(2)] * 40])
def test_poses_that_are_no_numbers_are_the_same_data_in_every_run(
    run_bits: Callable[..., Outcome], tmp_path: Path, values: list[Any]
) -> None:
    write_recon(tmp_path / "data", [FIRST, SECOND])
    with h5py.File(tmp_path / "data/t1.r01.hdf5", "r+") as file:
        del file["jackal/yaw"]
        kind = h5py.vlen_dtype(float) if isinstance(values[0], np.ndarray) else h5py.string_dtype()
        yaw = file.create_dataset("jackal/yaw", (40,), kind)
        for row, value in enumerate(values):
            yaw[row] = value
    for attempts in (1, 2, 3, 3):
        outcome = run_bits()
        assert outcome.code == 1
        assert "Redoing" not in outcome.err
        failure = read_progress(tmp_path / "cache")["failures"]["t1"]
        assert failure["attempts"] == attempts
        assert "jackal/yaw" in failure["reason"]
        assert "expected numbers" in failure["reason"]
    assert read_progress(tmp_path / "cache")["completed_trajectories"] == ["t2"]


def test_poses_that_are_there_are_stored_also_in_chunks_by_number_of_frames(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    (name,) = write_recon(tmp_path / "data", [FIRST])
    assert run_bits({"chunk_by": "frames", "max_chunk_frames": 40, "overlap_frames": 0}).code == 0
    ((_, datasets),) = chunks(tmp_path / "cache", name)
    assert {*datasets} == {"cls_token", "frame_index", "position", "yaw"}
    np.testing.assert_array_equal(datasets["position"], FIRST.position)
