"""Reader processes, real ones: what ends them, what they may take, and that nothing is lost or mixed by it."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dino_cache
import reader_tricks as tricks
from dino_cache import FatalDataError, InputError, MachineError, ReaderProcesses
from support import (
    ROOT,
    StampEncoder,
    cache_command,
    cache_content,
    check_stamps,
    make_trajectory,
    no_hang,
    read_progress,
    run_cache,
    stream_results,
    wait_until,
    write_poses,
)

pytestmark = pytest.mark.real_readers


@pytest.fixture(scope="module", autouse=True)
def fork_server() -> None:
    dino_cache.start_fork_server(dino_cache.READING_LIBRARIES)


@pytest.fixture
def pool() -> Iterator[ReaderProcesses]:
    readers = ReaderProcesses(None, 2)
    with no_hang(120):
        yield readers
        readers.close()


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_for_another(begun: Path) -> int:
    """The process that begins it next."""
    before = begun.read_text()
    wait_until(lambda: begun.read_text() not in ("", before))
    return int(begun.read_text())


# ---------------------------------------------------------------------------------------------------------------------
# What ends a reader
# ---------------------------------------------------------------------------------------------------------------------


def test_readers_are_other_processes_as_many_as_allowed(pool):
    futures = [pool.submit(tricks.get_on, 0.2, about="t") for _ in range(8)]
    pids = {pool.submit(tricks.pid, about="t").result() for _ in range(8)}
    assert [future.result() for future in futures] == ["done"] * 8
    assert os.getpid() not in pids and 1 <= len(pids) <= 2


@pytest.mark.parametrize("how", [signal.SIGKILL, 0, -3], ids=["SIGKILL", "exit 0", "exit 3"])
def test_a_reader_that_is_killed_from_outside_is_replaced_and_its_request_tried_again(pool, tmp_path, how):
    assert pool.submit(tricks.die_so_often, 2, how, tmp_path / "log", about="t1").result() == 3


def test_a_request_whose_reader_is_killed_three_times_is_the_machines_fault(pool, tmp_path):
    with pytest.raises(MachineError, match=r"t1: .* 3 times by SIGKILL"):
        pool.submit(tricks.die_so_often, 9, signal.SIGKILL, tmp_path / "log", about="t1").result()
    assert pool.submit(tricks.pid, about="t").result() != os.getpid()


@pytest.mark.parametrize("how", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_data_that_crash_their_reader_twice_are_at_fault_and_once_are_not(pool, tmp_path, how):
    assert pool.submit(tricks.die_so_often, 1, how, tmp_path / "once", about="t1").result() == 2
    with pytest.raises(FatalDataError, match=f"t1: crashes the process that reads it .{how.name}."):
        pool.submit(tricks.die_so_often, 9, how, tmp_path / "twice", about="t1").result()


def test_what_waits_behind_a_crash_is_answered_all_the_same(pool, tmp_path):
    bad = [pool.submit(tricks.die_so_often, 9, signal.SIGSEGV, tmp_path / str(i), about="bad") for i in range(3)]
    good = [pool.submit(tricks.plain_work, [i], tmp_path, about="good") for i in range(10)]
    assert [future.result() for future in good] == [[i * i] for i in range(10)]
    assert all(isinstance(future.exception(), FatalDataError) for future in bad)


def test_the_one_of_many_at_which_a_reader_dies_is_found_alone(pool):
    class Number(SimpleNamespace):
        name = "a number"

    found = dino_cache.in_readers(
        pool,
        tricks.plain_work,
        [13 if i == 40 else i + 100 for i in range(70)],
        Path(),
        failure=lambda number, error: (number, type(error)),
        should_stop=lambda: False,
        name_of=str,
    )
    expected: list[Any] = [(i + 100) ** 2 for i in range(70)]
    expected[40] = (13, FatalDataError)
    assert list(found) == expected


def test_a_call_that_does_not_end_is_ended_by_its_processor_time(monkeypatch, tmp_path):
    monkeypatch.setattr(dino_cache, "READER_CPU_S", 1)
    readers = ReaderProcesses(None, 1)
    with no_hang(120), pytest.raises(FatalDataError, match="t1: takes more than 1 s of processor time"):
        readers.submit(tricks.spin, tmp_path / "begun", about="t1").result()
    readers.close()


def test_work_that_gets_on_may_take_longer(monkeypatch):
    monkeypatch.setattr(dino_cache, "READER_CPU_S", 2)
    readers = ReaderProcesses(None, 1)
    assert readers.submit(tricks.get_on, 5.0, about="t1").result() == "done"
    readers.close()


def test_data_that_need_more_memory_than_a_reader_may_take_are_at_fault(monkeypatch):
    monkeypatch.setattr(dino_cache, "READER_MEMORY_BYTES", 1 << 28)
    readers = ReaderProcesses(None, 1)
    assert readers.submit(tricks.allocate, 1 << 27, about="t1").result() == 1
    with pytest.raises(InputError, match=r"t1: needs more than 0\.2 GiB of memory"):
        readers.submit(tricks.allocate, 1 << 29, about="t1").result()
    assert readers.submit(tricks.allocate, 1 << 27, about="t1").result() == 1
    readers.close()


def test_a_reader_whose_memory_was_full_answers_all_the_same(monkeypatch):
    monkeypatch.setattr(dino_cache, "READER_MEMORY_BYTES", 1 << 28)
    readers = ReaderProcesses(None, 1)
    pid = readers.submit(tricks.pid, about="t").result()
    error, pixels = readers.submit(tricks.answer_after_a_full_memory, 20_000_000, about="t1").result()
    assert (str(error), len(pixels)) == ("t1: needs more than 0.2 GiB of memory to be read", 20_000_000)
    with pytest.raises(InputError, match=r"t2: needs more than 0\.2 GiB of memory to be read"):
        readers.submit(tricks.answer_too_much, 200_000_000, about="t2").result()
    assert readers.submit(tricks.pid, about="t").result() == pid
    readers.close()


@pytest.mark.parametrize("file", ["1.png", "traj_data.json"])
def test_a_file_that_needs_too_much_memory_is_named(file, robot, run_here, monkeypatch):
    monkeypatch.setattr(dino_cache, "READER_MEMORY_BYTES", 100_000_000)
    robot.add("t0", "t2")
    folder = make_trajectory(robot.data / "t1", stamp=1)
    if file == "1.png":
        Image.new("RGB", (6000, 6000)).save(folder / file, "BMP")  # 108 MB of pixels
    else:
        (folder / "traj_data.pkl").unlink()
        (folder / file).write_text(f'{{"yaw": [{"[]," * 4_000_000} 0]}}')  # some 400 MB of lists
    robot.configure(readers="processes")
    outcome = run_here(robot.config)
    assert outcome.code == 1
    assert re.search(rf"Failed: t1/{file}: needs more than \d.\d GiB of memory to be read", outcome.err)
    robot.check("t0", "t2")


def test_what_time_the_run_was_suspended_is_no_silence(tmp_path):
    """Ctrl-Z, or a scheduler's SIGSTOP: the readers stand still with it."""
    script = (
        "import sys; import dino_cache, reader_tricks as tricks; from pathlib import Path\n"
        "dino_cache.READER_SILENCE_S = 4.0\n"
        "readers = dino_cache.ReaderProcesses(None, 1)\n"
        "print(readers.submit(tricks.nap, 3.0, Path(sys.argv[1]), about='t').result(), flush=True)\n"
        "readers.close()\n"
    )
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, "-c", script, tmp_path / "begun"]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as run:
        wait_until((tmp_path / "begun").exists)
        time.sleep(1.5)  # its silence begins with the first look at it
        os.killpg(run.pid, signal.SIGSTOP)
        time.sleep(5)
        os.killpg(run.pid, signal.SIGCONT)
        assert run.communicate(timeout=60)[0] == "rested\n"


def test_a_large_request_waits_for_a_process_that_is_idle(tmp_path):
    """Into the pipe to a busy one it would not fit, and who sends it could not be stopped."""
    readers = ReaderProcesses(None, 1)
    readers.submit(tricks.sleep, tmp_path / "begun", about="t")
    wait_until((tmp_path / "begun").exists)
    with no_hang(30):
        large = readers.submit(tricks.plain_work, list(range(100, 300_000)), tmp_path, about="u")
    assert not large.done()
    os.kill(int((tmp_path / "begun").read_text()), signal.SIGSEGV)
    os.kill(wait_for_another(tmp_path / "begun"), signal.SIGSEGV)  # it is tried twice
    with no_hang(60):
        assert large.result()[0] == 10_000
    readers.close()


def test_more_shared_memory_than_there_is_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(dino_cache, "available_memory", lambda: 1e9)
    dino_cache.FrameSlots(4, (32, 3, 224, 308)).close()
    with pytest.raises(OSError, match=r"771\.\d GB are wanted, and 1\.0 GB are free"):
        dino_cache.FrameSlots(116_460, (32, 3, 224, 308))


def test_a_reader_without_a_sign_of_life_is_given_up_as_an_unreadable_file(monkeypatch, tmp_path):
    monkeypatch.setattr(dino_cache, "READER_SILENCE_S", 2.0)
    readers = ReaderProcesses(None, 1)
    with no_hang(120), pytest.raises(OSError, match="no sign of life") as caught:
        readers.submit(tricks.sleep, tmp_path / "begun", about="t1").result()
    assert caught.value.errno == errno.EIO
    assert readers.submit(tricks.pid, about="t").result() != int((tmp_path / "begun").read_text())
    readers.close()


@pytest.mark.parametrize("error", [InputError("t1: odd"), OSError(errno.ESTALE, "gone", "/x"), ValueError("odd")])
def test_errors_come_as_themselves_with_where_they_came_from(pool, error):
    found = pool.submit(tricks.fail, error, about="t1").exception()
    assert type(found) is (InputError if isinstance(error, ValueError) else type(error))
    assert getattr(found, "errno", None) == getattr(error, "errno", None)
    assert "reader_tricks.py" in found.__notes__[0]


def test_closing_ends_readers_whatever_they_are_at(tmp_path):
    readers = ReaderProcesses(None, 2)
    futures = [readers.submit(tricks.spin, tmp_path / str(i), about="t") for i in range(4)]
    wait_until(lambda: (tmp_path / "0").exists() and (tmp_path / "1").exists())
    pids = [int((tmp_path / str(i)).read_text() or 0) for i in range(2)]
    with no_hang(30):
        readers.close()
    assert all(is_gone(pid) for pid in pids if pid)
    assert all(future.done() for future in futures)


def test_no_process_stays_when_a_run_is_killed_while_its_reader_is_stuck(tmp_path):
    code = (
        "import sys; from pathlib import Path; import dino_cache, reader_tricks\n"
        "readers = dino_cache.ReaderProcesses(None, 1)\n"
        "readers.submit(reader_tricks.spin, Path(sys.argv[1]), about='t').result()\n"
    )
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    run = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "begun")], env={**os.environ, "PYTHONPATH": paths}
    )
    wait_until(lambda: (tmp_path / "begun").exists() and (tmp_path / "begun").read_text())
    reader = int((tmp_path / "begun").read_text())
    server = int(Path(f"/proc/{reader}/stat").read_text().rpartition(")")[2].split()[1])
    assert not is_gone(reader) and not is_gone(server)
    run.kill()
    run.wait()
    wait_until(lambda: is_gone(reader) and is_gone(server), 20)


def test_a_fork_server_holds_back_the_signals_of_a_terminal_from_its_first_moment() -> None:
    """Importing takes it seconds, in which Ctrl-C would make it print a traceback."""
    script = (
        "import dino_cache; from pathlib import Path; dino_cache.start_fork_server();"
        "pid = dino_cache.forkserver._forkserver._forkserver_pid; print(Path(f'/proc/{pid}/status').read_text())"
    )
    shown = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (blocked,) = [int(line.split()[1], 16) for line in shown.splitlines() if line.startswith("SigBlk")]
    assert {number for number in dino_cache.HELD_SIGNALS if not blocked >> (number - 1) & 1} == set()


def fork_servers(group: int) -> list[str]:
    """Command lines of the fork servers in a process group."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.getpgid(int(process.name)) == group and not is_gone(int(process.name)):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
    return [line for line in found if "forkserver" in line]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_when_a_run_ends_nobody_holds_its_output_open(robot, mode):
    robot.add("t0")
    robot.configure(readers=mode)
    command = cache_command(robot.config)
    run = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    assert run.wait(120) == 0
    assert fork_servers(run.pid) == []


# ---------------------------------------------------------------------------------------------------------------------
# The stream
# ---------------------------------------------------------------------------------------------------------------------

COUNTS = {"t1": 20, "t2": 7, "t3": 90, "t4": 3}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, count in COUNTS.items():
        make_trajectory(tmp_path / "data" / name, count, stamp=int(name[1:]))
    return tmp_path / "data"


@pytest.mark.parametrize("batch_size", [8, 64])
def test_processes_and_threads_make_the_same_cache_in_the_same_order(data, tmp_path, batch_size):
    (data / "t2" / "5.png").write_bytes(b"broken")
    write_poses(data / "t4", np.zeros((3, 2)), np.zeros(3))
    told, content = {}, {}
    for mode in ("threads", "processes"):
        options = {"readers": mode, "batch_size": batch_size}
        results = list(stream_results(data, tmp_path / mode, StampEncoder(), **options))
        told[mode] = [(result.name, result.checksum, result.spans, str(result.error)) for result in results]
        content[mode] = cache_content(tmp_path / mode)
        for name in ("t1", "t3"):
            check_stamps(tmp_path / mode, name, int(name[1:]))
    assert sorted(told["threads"]) == sorted(told["processes"])
    assert content["threads"].keys() == content["processes"].keys()
    for path, (attributes, datasets) in content["threads"].items():
        assert attributes == content["processes"][path][0]
        for key, values in datasets.items():
            np.testing.assert_array_equal(values, content["processes"][path][1][key])


@pytest.mark.parametrize("lacking", ["posix_fallocate", "memfd_create"])
def test_without_shared_memory_frames_come_all_the_same(data, tmp_path, monkeypatch, caplog, lacking):
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(dino_cache.LOG, "propagate", True)
    if lacking == "memfd_create":
        monkeypatch.delattr(os, "memfd_create")
    else:
        monkeypatch.setattr(os, lacking, refuse)
    results = list(stream_results(data, tmp_path / "cache", StampEncoder()))
    assert [result.error for result in results] == [None] * 4
    for name in COUNTS:
        check_stamps(tmp_path / "cache", name, int(name[1:]))
    assert ("No shared memory" in caplog.text) == (lacking == "posix_fallocate")


def test_data_that_change_while_they_are_read_are_not_paired_with_poses_of_before(tmp_path):
    """Of a long trajectory, once its first frames are encoded, poses and frames are exchanged: those who open it anew
    see it."""
    folder = make_trajectory(tmp_path / "data" / "t1", 400, stamp=1)
    readers = dino_cache.ReaderProcesses(
        dino_cache.ReadingJob(dino_cache.CacheSpec(image_size=(28, 42), precision="fp32"), "stat"), 1
    )
    trajectory = dino_cache.Trajectory("t1", folder)
    plan, first = readers.submit(dino_cache.TrajectoryReader.plan, trajectory, None, 4, about="t1").result()
    assert first.count == 4 and first.pixels[3, :, 0, 0].tolist() == [1, 0, 3]
    wanted = dino_cache.Wanted(trajectory, plan.stat_checksum, [8, 9])
    assert readers.submit(dino_cache.TrajectoryReader.read, wanted, about="t1").result().count == 2
    readers.close()
    write_poses(folder, np.zeros((400, 2)), np.zeros(400))
    readers = dino_cache.ReaderProcesses(
        dino_cache.ReadingJob(dino_cache.CacheSpec(image_size=(28, 42), precision="fp32"), "stat"), 1
    )
    content = readers.submit(dino_cache.TrajectoryReader.read, wanted, about="t1").result()
    readers.close()
    assert content.count == 0 and "changed while it was read" in str(content.error)


def test_readers_that_are_killed_under_way_lose_and_mix_nothing(tmp_path):
    for stamp in range(1, 7):
        make_trajectory(tmp_path / "data" / f"t{stamp}", 60, stamp=stamp)
    killed = []

    class Killing(StampEncoder):
        def encode(self, pixels: Any) -> Callable[[], Any]:
            if len(self.batch_sizes) in (4, 20, 36):
                killed.extend(children_named_reader()[:1])
                os.kill(killed[-1], signal.SIGKILL)
            return super().encode(pixels)

    with no_hang(240):
        results = list(stream_results(tmp_path / "data", tmp_path / "cache", Killing()))
    assert [result.error for result in results] == [None] * 6
    assert len({*killed}) == 3
    for stamp in range(1, 7):
        assert check_stamps(tmp_path / "cache", f"t{stamp}", stamp) > 60


def children_named_reader() -> list[int]:
    """Processes forked from this one's fork server."""
    server = dino_cache.forkserver._forkserver._forkserver_pid
    tasks = Path(f"/proc/{server}/task/{server}/children")
    return [int(pid) for pid in tasks.read_text().split()]


# ---------------------------------------------------------------------------------------------------------------------
# From the command line: strangers' data
# ---------------------------------------------------------------------------------------------------------------------


def run_with(changes: str, config: Path, *, timeout: float = 250) -> subprocess.CompletedProcess[str]:
    """A run with StampEncoder, by a program that changes this first, in its own process: `dino_cache.X = ...`."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:3]; del sys.argv[1:3]\n"
        "import dino_cache, run_with_stamp_encoder as fake\n"
        "dino_cache.load_encoder = fake.stamp_encoder\n"
        "dino_cache.model_shape = lambda kind: dino_cache.ModelShape(patch_size=14, width=4, num_registers=0)\n"
        f"{changes}\n"
        "sys.exit(dino_cache.main())\n"
    )
    command = [sys.executable, "-c", code, str(ROOT), str(ROOT / "tests"), "--config", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def deep_key() -> bytes:
    """A pickle of 150 kB whose dictionary has a deeply nested tuple as its key: hashing it overruns the C stack."""
    return b"\x80\x04}" + b"N" + b"\x85" * 150_000 + b"Ns."


def endless() -> bytes:
    """A pickle of some hundred kB whose keys all have the hash 0."""
    prime, parts = (1 << 61) - 1, [b"\x80\x04}("]
    for number in range(1, 60_001):
        digits = (number * prime).to_bytes(11, "little", signed=True)
        parts.append(b"\x8a" + bytes([len(digits)]) + digits + b"N")
    return b"".join(parts) + b"u."


def many_lists() -> bytes:
    """A pickle of 10 MB that Python has as 600 MB."""
    return b"\x80\x04}(\x8c\x08position](" + b"]" * 10_000_000 + b"e\x8c\x03yaw](K\x01eu."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("poses", "limit", "reason"),
    [
        (deep_key, "", "SIGSEGV"),
        (endless, "dino_cache.READER_CPU_S = 3", "more than 3 s of processor time"),
        (many_lists, "dino_cache.READER_MEMORY_BYTES = 1 << 28", "0.2 GiB of memory"),
    ],
    ids=["deep_key", "endless", "many_lists"],
)
def test_poses_that_would_end_or_fill_a_process_fail_their_trajectory_alone(robot, poses, limit, reason):
    robot.add("t0", "t1", "t2")
    (robot.data / "t1" / "traj_data.pkl").write_bytes(poses())
    outcome = run_with(limit, robot.config)
    assert outcome.returncode == 1, outcome.stderr
    robot.check("t0", "t2")
    assert reason in read_progress(robot.cache)["failures"]["t1"]["reason"]


def forked_from(run: int) -> list[int]:
    """The readers of a run."""
    own = Path(f"/proc/{run}/task/{run}/children").read_text().split()
    found = []
    for server in own:
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split()]
    return found


def ticks(pid: int) -> int:
    """Of processor time that a process has taken; 0 where it is gone."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11])
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_whose_reader_is_stuck(robot, signal_number):
    robot.add("t0", "t1")
    (robot.data / "t1" / "traj_data.pkl").write_bytes(endless())
    command = [sys.executable, str(ROOT / "tests/run_with_stamp_encoder.py"), "--config", str(robot.config)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    stuck: list[int] = []
    wait_until(lambda: stuck.extend(pid for pid in forked_from(run.pid) if ticks(pid) > 100) or stuck, 120)
    run.send_signal(signal_number)
    run.communicate(timeout=30)
    assert run.returncode == 128 + signal_number
    wait_until(lambda: is_gone(stuck[0]), 10)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_a_progressive_picture_with_hundreds_of_scans_is_refused_undecoded(robot, mode):
    robot.add("t0", "t1")
    file = io.BytesIO()
    Image.new("RGB", (8000, 8000)).save(file, "JPEG", progressive=True)
    data = file.getvalue()
    scan = data[data.rindex(b"\xff\xda") : -2]
    (robot.data / "t1" / "3.png").unlink()
    (robot.data / "t1" / "3.jpg").write_bytes(data[:-2] + scan * 400 + b"\xff\xd9")
    robot.configure(readers=mode)
    outcome = run_cache(robot.config, timeout=200)
    assert outcome.returncode == 1, outcome.stderr
    robot.check("t0")
    assert "scans of 8000x8000 px" in read_progress(robot.cache)["failures"]["t1"]["reason"]


@pytest.mark.slow
def test_a_failure_by_crash_is_tried_as_often_as_any_and_a_change_of_the_data_is_seen(robot):
    robot.add("t0", "t1")
    robot.configure(max_attempts=2)
    (robot.data / "t1" / "traj_data.pkl").write_bytes(deep_key())
    for attempts in (1, 2, 2):
        assert run_cache(robot.config).returncode == 1
        assert read_progress(robot.cache)["failures"]["t1"]["attempts"] == attempts
    robot.mend("t1")
    assert run_cache(robot.config).returncode == 0
    robot.check("t0", "t1")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["threads", "processes"])
def test_poses_are_not_parsed_in_the_runs_own_process(robot, mode):
    robot.add("t0")
    robot.configure(readers=mode)
    outcome = run_with("dino_cache._unpickle_poses = None", robot.config)
    assert outcome.returncode == 0, outcome.stderr
    robot.check("t0")
