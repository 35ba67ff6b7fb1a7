"""Faults of disk, clock, device and neighbours.

Nothing false is recorded, exit code and message say what to do, and the same command finishes the work once the fault
is gone.
"""

import errno
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import progress_utils
from faults_support import (
    DAMAGES,
    IS_NO_FILE,
    NAMES,
    Robot,
    before_batch,
    damage,
    immutable,
    read_only_mount,
    utils,
)
from support import Outcome, check_stamps, chunk_files, make_trajectory, read_progress, tree, write_config


@pytest.fixture
def robot(tmp_path: Path) -> Robot:
    return Robot(tmp_path, tmp_path / "cache")


def check_stopped(outcome: Outcome, number: int) -> None:
    """The run ended with exit 3, said why and what to do, and had no accident of its own."""
    assert outcome.code == 3, outcome.err
    assert os.strerror(number) in outcome.err
    assert "run the same command again" in outcome.err
    assert "unexpected" not in outcome.err


# ---------------------------------------------------------------------------------------------------------------------
# The disk that is written to
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 600 kB, mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("may not mount a disk here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(disk: Path) -> Path:
    """Take all the room there is; returns the file that does."""
    with open(disk / "filler", "wb", buffering=0) as file:
        for size in (4096, 1):
            try:
                while file.write(bytes(size)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return disk / "filler"


@pytest.mark.parametrize("batch", [0, 3, 6])  # of eight
def test_a_disk_that_others_fill_stops_the_run_and_the_next_one_at_once(tmp_path, disk, run_here, monkeypatch, batch):
    robot = Robot(tmp_path, disk / "cache")
    with monkeypatch.context() as patch:
        before_batch(patch, lambda number, _: fill(disk) if number == batch else None)
        check_stopped(run_here(robot.config), errno.ENOSPC)
    done = robot.check_recorded()
    assert len(done) < len(NAMES)
    before = tree(robot.cache)
    outcome = run_here(robot.config)  # the disk is still full
    assert outcome.code == 2, outcome.err
    assert "free" in outcome.err
    assert "unexpected" not in outcome.err
    assert tree(robot.cache) == before
    (disk / "filler").unlink()
    robot.check_finished(run_here(robot.config))


def test_a_record_that_outgrows_what_the_disk_takes_stops_the_run(tmp_path, run_here, monkeypatch):
    """Files are limited to a size that every chunk keeps and that the record of 40 long names does not."""
    monkeypatch.setattr(progress_utils, "SAVE_SHARE", 1e9)  # save after each trajectory, as a longer run does
    data, cache = tmp_path / "data", tmp_path / "data" / "dino_cache_small"
    names = [f"{number:02}" + "x" * 200 for number in range(40)]
    for name in names:
        make_trajectory(data / name, 3)
    config = write_config(tmp_path / "c.yaml", data)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (24_000, limits[1]))  # beyond it, writing fails with EFBIG
    try:
        outcome = run_here(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    check_stopped(outcome, errno.EFBIG)
    progress = read_progress(cache)
    assert progress["failures"] == {}
    assert 0 < len(progress["completed_trajectories"]) < len(names)
    for name in progress["completed_trajectories"]:
        assert check_stamps(cache, name, 0) == 3
    assert run_here(config).code == 0
    assert read_progress(cache)["completed_trajectories"] == names


CALLS = {  # system call, which of its paths, the how-many-th
    "fsync of a chunk": ("fsync", r"/\.staging/.*chunk_00001\.h5$", 2),
    "fsync of a staged folder": ("fsync", r"/\.staging/[^/]+$", 2),
    "fsync of the cache folder": ("fsync", r"/cache$", 3),
    "fsync of the record": ("fsync", r"/progress\.json\.tmp$", 2),
    "rename of a staged folder": ("rename", r"/\.staging/[^/]+$", 2),
    "replace of the record": ("replace", r"/progress\.json\.tmp$", 2),
    "mkdir of a staged folder": ("mkdir", r"/\.staging/[^/]+$", 2),
}


@pytest.mark.parametrize(
    ("call", "number"),
    [*((call, errno.EIO) for call in CALLS), ("fsync of a chunk", errno.EDQUOT), ("fsync of the record", errno.EROFS)],
)
def test_a_disk_that_fails_for_good_stops_the_run_wherever_it_does(robot, run_here, monkeypatch, call, number):
    function, pattern, nth = CALLS[call]
    works, count = getattr(os, function), 0

    def fail(target: Any, *arguments: Any, **keywords: Any) -> Any:
        nonlocal count
        path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else os.fspath(target)
        count += bool(re.search(pattern, path))
        if count >= nth and str(robot.cache) in path:
            raise OSError(number, os.strerror(number), path)
        return works(target, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, function, fail)
        check_stopped(run_here(robot.config), number)
    assert count >= nth
    assert len(robot.check_recorded()) < len(NAMES)
    robot.check_finished(run_here(robot.config))


@pytest.mark.parametrize("mount_point_stays", [False, True])
def test_a_cache_disk_that_is_gone_in_mid_run_stops_it(robot, run_here, monkeypatch, mount_point_stays):
    elsewhere = robot.cache.with_name("elsewhere")

    def lose(batch: int, _: torch.Tensor) -> None:
        if batch == 4:  # of eight
            robot.cache.rename(elsewhere)
            if mount_point_stays:
                robot.cache.mkdir()

    with monkeypatch.context() as patch:
        before_batch(patch, lose)
        check_stopped(run_here(robot.config), errno.ENOENT)
    assert chunk_files(robot.cache) == []
    shutil.rmtree(robot.cache, ignore_errors=True)
    elsewhere.rename(robot.cache)
    assert robot.check_recorded() in ([], ["t0"])
    robot.check_finished(run_here(robot.config))


@pytest.mark.parametrize("forbid", [immutable, read_only_mount])
def test_a_cache_that_may_not_be_written_is_refused_and_can_be_read(robot, run_here, capsys, forbid):
    assert run_here(robot.config, "--limit", "1").code == 5
    before = tree(robot.cache)
    if not forbid(robot.cache, True):
        pytest.skip("may not forbid writing here")
    try:
        outcome = run_here(robot.config)
        for refused in (outcome, utils(capsys, "reset", "--yes", "--cache-dir", robot.cache)):
            assert refused.code == 2, refused.err
            assert str(robot.cache) in refused.err
            assert "unexpected" not in refused.err
        assert utils(capsys, "show", "--cache-dir", robot.cache).code == 0
        assert utils(capsys, "list", "--root", robot.cache).code == 0
        assert tree(robot.cache) == before
    finally:
        forbid(robot.cache, False)
    robot.check_finished(run_here(robot.config))


# ---------------------------------------------------------------------------------------------------------------------
# The disk that is read
# ---------------------------------------------------------------------------------------------------------------------


def reading(
    monkeypatch: pytest.MonkeyPatch, ends: str, read: Callable[[int, int, memoryview], int]
) -> Callable[[int, list[Any]], int]:
    """Have files whose path ends so read by read(calls before, descriptor, buffer)."""
    works, calls = os.readv, {}

    def readv(descriptor: int, buffers: list[Any]) -> int:
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        if not path.endswith(ends):
            return works(descriptor, buffers)
        calls[path] = calls.get(path, -1) + 1
        return read(calls[path], descriptor, memoryview(buffers[0]))

    monkeypatch.setattr(os, "readv", readv)
    return works


@pytest.mark.parametrize("ends", ["", ".png", "traj_data.pkl"])
def test_reads_that_come_in_small_pieces_give_the_same_content(robot, run_here, monkeypatch, ends):
    works = os.readv
    reading(monkeypatch, ends, lambda _, descriptor, buffer: works(descriptor, [buffer[:7]]))
    robot.check_finished(run_here(robot.config))


@pytest.mark.parametrize("ends", ["t1/3.png", "t1/traj_data.pkl"])
def test_a_read_error_in_the_middle_of_a_file_fails_its_trajectory_alone(robot, run_here, monkeypatch, ends):
    works = os.readv

    def fail_later(calls: int, descriptor: int, buffer: memoryview) -> int:
        if calls > 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return works(descriptor, [buffer[:7]])

    with monkeypatch.context() as patch:
        reading(patch, ends, fail_later)
        outcome = run_here(robot.config)
    assert outcome.code == 1, outcome.err
    progress = read_progress(robot.cache)
    assert progress["completed_trajectories"] == ["t0", "t2"]
    assert os.strerror(errno.EIO) in progress["failures"]["t1"]["reason"]
    robot.check_finished(run_here(robot.config))


@pytest.mark.parametrize("ends", ["t1/3.png", "t1/traj_data.pkl"])
def test_a_file_that_shrinks_while_it_is_read_fails_its_trajectory_alone(robot, run_here, monkeypatch, ends):
    works = os.readv
    with monkeypatch.context() as patch:
        reading(patch, ends, lambda calls, descriptor, buffer: 0 if calls else works(descriptor, [buffer[:50]]))
        assert run_here(robot.config).code == 1
    progress = read_progress(robot.cache)
    assert progress["completed_trajectories"] == ["t0", "t2"]
    assert ends in progress["failures"]["t1"]["reason"]
    robot.check_finished(run_here(robot.config))


# ---------------------------------------------------------------------------------------------------------------------
# The clock
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [1.7e9, 30.0])  # as set; as a board without a battery begins
def test_a_clock_that_goes_backwards_changes_nothing(robot, run_here, capsys, monkeypatch, start):
    now = start

    def earlier() -> float:
        nonlocal now
        now = max(0.0, now - 1000.0 * (start > 1000))
        return now

    monkeypatch.setattr(time, "time", earlier)
    elapsed = []
    for arguments in (["--limit", "1"], ["--limit", "1"], [], []):
        assert run_here(robot.config, *arguments).code == (5 if arguments else 0)
        progress = read_progress(robot.cache)
        elapsed.append(progress["elapsed_s"])
        assert progress["last_update"] >= 0
    assert elapsed[0] > 0
    assert elapsed == sorted(elapsed)
    assert sorted(robot.check_recorded()) == list(NAMES)
    assert utils(capsys, "show", "--cache-dir", robot.cache).code == 0
    outcome = run_here(robot.config, "--force-rebuild")
    robot.check_finished(outcome)
    assert read_progress(robot.cache)["rebuild_started"] is None


# ---------------------------------------------------------------------------------------------------------------------
# The device
# ---------------------------------------------------------------------------------------------------------------------


def test_a_device_short_of_memory_takes_smaller_batches_and_finishes(robot, run_here, monkeypatch):
    def refuse_large(_: int, pixels: torch.Tensor) -> None:
        if len(pixels) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    before_batch(monkeypatch, refuse_large)
    outcome = run_here(robot.config)
    assert "batches of 2 frames" in outcome.err
    robot.check_finished(outcome)


def test_a_batch_that_no_memory_holds_is_told_with_the_setting_that_made_it_so(robot, run_here):
    robot.configure(batch_size=2**31 - 1, image_size=[1400, 1400])  # 12 PB, more than can be addressed
    outcome = run_here(robot.config)
    assert outcome.code == 3
    assert re.search("making room for a batch failed.*set a smaller batch_size, and run the same command", outcome.err)
    assert robot.check_recorded() == []


@pytest.mark.parametrize(
    "fault",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: unspecified launch failure"),
        MemoryError(),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_a_device_that_fails_for_good_stops_the_run_and_blames_no_trajectory(robot, run_here, monkeypatch, fault):
    """As a sticky CUDA error does: whatever is asked of it from the fourth batch on fails."""

    def fail(batch: int, _: torch.Tensor) -> None:
        if batch >= 3:
            raise fault

    with monkeypatch.context() as patch:
        before_batch(patch, fail)
        outcome = run_here(robot.config)
    assert outcome.code == 3
    assert (str(fault) or type(fault).__name__) in outcome.err
    assert "unexpected" not in outcome.err
    assert robot.check_recorded() in ([], ["t0"])
    robot.check_finished(run_here(robot.config))


# ---------------------------------------------------------------------------------------------------------------------
# The record
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(robot: Robot, run_here: Callable[..., Outcome], request: pytest.FixtureRequest) -> Robot:
    run_here(robot.config)
    damage(robot, request.param)
    return robot


@pytest.mark.parametrize("damaged", DAMAGES, indirect=True)
def test_a_damaged_record_is_refused_by_name_with_the_way_out_and_nothing_changes(damaged, run_here, capsys):
    before, cache = tree(damaged.cache), damaged.cache
    outcomes = [
        run_here(damaged.config),
        run_here(damaged.config, "--dry-run"),
        run_here(damaged.config, "--force-rebuild"),
    ]
    for command in ("show", "reset-failed"):
        outcomes.append(utils(capsys, command, "--cache-dir", cache))
    for outcome in outcomes:
        assert outcome.code == 2, outcome
        assert str(cache / "progress.json") in outcome.err
        assert re.search(r"Ways? out|Update the program|[Mm]ove it", outcome.err), outcome.err
        assert "Traceback" not in outcome.err
    assert tree(cache) == before


@pytest.mark.parametrize("damaged", [damage for damage in DAMAGES if damage not in IS_NO_FILE], indirect=True)
def test_a_damaged_record_is_set_aside_by_the_reset_that_its_refusal_names(damaged, run_here, capsys):
    content = (damaged.cache / "progress.json").read_bytes()
    listed = utils(capsys, "list", "--root", damaged.cache)
    assert listed.code == 1
    assert str(damaged.cache / "progress.json") in listed.out
    assert utils(capsys, "reset", "--yes", "--cache-dir", damaged.cache).code == 0
    (aside,) = damaged.cache.glob("progress.json.reset-*")
    assert aside.read_bytes() == content
    assert read_progress(damaged.cache)["completed_trajectories"] == []
    damaged.check_finished(run_here(damaged.config))


@pytest.mark.parametrize("damaged", ["a folder"], indirect=True)
def test_a_folder_in_the_records_place_is_not_replaced(damaged, capsys):
    before = tree(damaged.cache)
    outcome = utils(capsys, "reset", "--yes", "--cache-dir", damaged.cache)
    assert outcome.code == 2, outcome
    assert str(damaged.cache / "progress.json") in outcome.err
    assert tree(damaged.cache) == before


# ---------------------------------------------------------------------------------------------------------------------
# Two at a time
# ---------------------------------------------------------------------------------------------------------------------

EDITS = (["reset", "--yes"], ["reset-failed"])


def test_during_a_run_edits_are_refused_and_reading_works(robot, run_here, monkeypatch, capsys):
    seen: dict[str, Any] = {}

    def use_the_cache(batch: int, _: torch.Tensor) -> None:
        if batch != 5 or seen:  # of eight
            return
        edits = [progress_utils.main([*edit, "--cache-dir", str(robot.cache)]) for edit in EDITS]
        said = capsys.readouterr().err
        shown = progress_utils.main(["show", "--cache-dir", str(robot.cache)])
        listed = progress_utils.main(["list", "--root", str(robot.cache)])
        seen.update(edits=edits, said=said, reading=[shown, listed], out=capsys.readouterr().out)

    before_batch(monkeypatch, use_the_cache)
    outcome = run_here(robot.config)
    assert seen["edits"] == [4] * len(EDITS)
    assert seen["said"].count(f"pid {os.getpid()} ") == len(EDITS)
    assert seen["reading"] == [0, 0]
    assert "Dataset: robot\n" in seen["out"]
    robot.check_finished(outcome)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_run_on_a_filesystem_that_cannot_lock_is_refused_with_the_way_on(
    robot, run_here, encoders, monkeypatch, number
):
    def no_locks(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", no_locks)
        outcome = run_here(robot.config)
    assert outcome.code == 2, outcome.err
    assert str(robot.cache / ".lock") in outcome.err
    assert "flock" in outcome.err
    assert encoders == []
    assert set(tree(robot.cache)) <= {".lock"}
    robot.check_finished(run_here(robot.config))
