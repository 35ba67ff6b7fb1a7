"""Runs and resets that are killed at each of their calls (crash_lab)."""

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import dino_cache
from crash_harness import Disk
from crash_lab import (
    BOTH,
    FRAMES,
    LONG,
    NESTED,
    A,
    C,
    D,
    Lab,
    Scenario,
    checksums,
    chunk_folders,
    journalled,
    num_calls,
    survive,
)
from support import make_trajectory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")


def two_changed(lab: Lab) -> None:
    """Both trajectories have new data."""
    lab.add(A, D)
    lab.configure()
    lab.run()
    for name, stamp in ((A, 11), (D, 14)):
        shutil.rmtree(lab.data / name)
        make_trajectory(lab.data / name, FRAMES[name], stamp=stamp, yaw=np.ones(FRAMES[name]))


def nothing_yet(lab: Lab) -> None:
    """Two good trajectories, one whose seventh frame is cut off, one with a pose that is not a number."""
    lab.add(A, NESTED, C, D)
    frame = lab.data / C / "6.png"
    frame.write_bytes(frame.read_bytes()[:60])
    lab.spoil_poses(D)
    lab.configure()


def changed_data(lab: Lab) -> None:
    """One trajectory has new data, one lost a chunk, one is now invalid and is tried just once, one is as it was."""
    lab.add(A, NESTED, C, D)
    lab.configure(max_attempts=1)
    lab.run()
    shutil.rmtree(lab.data / A)
    make_trajectory(lab.data / A, FRAMES[A], stamp=11, yaw=np.ones(FRAMES[A]))
    (lab.cache / NESTED / "chunk_00001.h5").unlink()
    lab.spoil_poses(C)


def repainted(lab: Lab, *names: str) -> None:
    """The data changed in a way that only redoing everything takes in: 10 more in the stamps."""
    lab.add(*names)
    lab.configure()
    lab.run()
    for name in names:
        lab.paint(name, int(name[-1]) + 10)


def two_repainted(lab: Lab) -> None:
    repainted(lab, A, NESTED)


def one_repainted(lab: Lab) -> None:
    repainted(lab, NESTED)


def one_repainted_and_reset(lab: Lab) -> None:
    repainted(lab, NESTED)
    assert lab.execute(lab.start, "reset --yes").code == 0


def mended(lab: Lab) -> None:
    """One trajectory failed as often as it may, and its data was mended in a way that nobody noticed."""
    lab.add(A, C)
    frame = lab.data / C / "6.png"
    good = frame.read_bytes()
    frame.write_bytes(bytes(len(good)))
    lab.configure(max_attempts=1)
    lab.run(code=1)
    frame.write_bytes(good)


def two_changed_and_journalled(lab: Lab) -> None:
    two_changed(lab)
    journalled(lab.cache)


def one_repainted_and_journalled(lab: Lab) -> None:
    one_repainted(lab)
    journalled(lab.cache)


def mended_and_journalled(lab: Lab) -> None:
    mended(lab)
    journalled(lab.cache)


def one_long(lab: Lab) -> None:
    lab.add(LONG)
    lab.configure()


def one_begun(lab: Lab) -> None:
    """A run was stopped in the last batch but one of a trajectory of four chunks."""
    one_long(lab)
    assert lab.execute(lab.start, "run-stopped").code == 143
    (journal,) = (lab.cache / ".staging").glob("*.journal")
    assert journal.read_bytes().count(b"\n") in (2, 3, 4)
    lab.add(A)


SCENARIOS = {
    "a long trajectory": Scenario(one_long, "run", 0, 0, {LONG: 5}),
    "a trajectory that is begun": Scenario(one_begun, "run", 0, 0, {A: 1, LONG: 5}),
    "force_rebuild of one that is begun": Scenario(one_begun, "run --force-rebuild", 0, 0, {A: 1, LONG: 5}),
    "reset of one that is begun": Scenario(one_begun, "reset --yes", 0, 0, {A: 1, LONG: 5}),
    "a fresh run": Scenario(nothing_yet, "run", 1, 1, BOTH),
    "a redo": Scenario(changed_data, "run", 1, 1, {A: 11, NESTED: 2, D: 4}, {A: 1, C: 3}, (NESTED,)),
    "a redo, rarely saved": Scenario(two_changed, "run-rarely-saved", 0, 0, {A: 11, D: 14}, {A: 1, D: 4}),
    "a fresh run, rarely saved": Scenario(nothing_yet, "run-rarely-saved", 1, 1, BOTH),
    "a redo with failures, rarely saved": Scenario(
        changed_data, "run-rarely-saved", 1, 1, {A: 11, NESTED: 2, D: 4}, {A: 1, C: 3}, (NESTED,)
    ),
    "a redo with a journal": Scenario(two_changed_and_journalled, "run", 0, 0, {A: 11, D: 14}, {A: 1, D: 4}),
    "force_rebuild": Scenario(two_repainted, "run --force-rebuild", 0, 0, {A: 11, NESTED: 12}, BOTH),
    "reset": Scenario(one_repainted, "reset --yes", 0, 0, {NESTED: 12}, {NESTED: 2}),
    "a run after reset": Scenario(one_repainted_and_reset, "run", 0, 0, {NESTED: 12}, {NESTED: 2}),
    "reset with a journal": Scenario(one_repainted_and_journalled, "reset --yes", 0, 0, {NESTED: 12}, {NESTED: 2}),
    "reset-failed": Scenario(mended, "reset-failed", 0, 0, {A: 1, C: 3}),
    "reset-failed with a journal": Scenario(mended_and_journalled, "reset-failed", 0, 0, {A: 1, C: 3}),
}


@pytest.fixture
def lab(tmp_path: Path, encoders: list) -> Lab:
    return Lab(tmp_path)


STEP = int(os.environ.get("CRASH_STEP", "7"))  # from one call that a run is killed at to the next


@pytest.mark.slow
@pytest.mark.parametrize("title", SCENARIOS)
def test_killed_at_any_call_it_records_nothing_false_and_then_ends_as_if_undisturbed(title, lab):
    assert survive(lab, SCENARIOS[title], step=STEP) > 0


@pytest.fixture
def reader_processes(lab: Lab) -> Iterator[None]:
    """Children read in processes, all of them from the fork server of this one."""
    lab.readers = "processes"
    dino_cache.start_fork_server(dino_cache.READING_LIBRARIES)
    yield
    dino_cache.stop_fork_server()


# Such runs take a second: here at few calls of some scenarios; CRASH_STEP=1 is at all calls of all, in half an hour.
WITH_PROCESSES = ["a long trajectory", "a trajectory that is begun", "a redo"]


@pytest.mark.slow
@pytest.mark.real_readers
@pytest.mark.usefixtures("reader_processes")
@pytest.mark.parametrize("title", SCENARIOS if "CRASH_STEP" in os.environ else WITH_PROCESSES)
def test_so_it_is_with_reader_processes(title, lab):
    assert survive(lab, SCENARIOS[title], step=int(os.environ.get("CRASH_STEP", "25"))) > 0


@pytest.mark.parametrize(
    ("title", "published", "replaced"),
    [
        ("a fresh run", [A, NESTED], []),
        ("a redo", [A, NESTED], [A, NESTED, C]),
        ("force_rebuild", [A, NESTED], [A, NESTED]),
    ],
)
def test_nothing_is_recorded_or_replaced_before_a_power_cut_would_spare_it(title, published, replaced, lab):
    """That the process was killed does not show what the disk had not been told to keep."""
    SCENARIOS[title].prepare(lab)
    recorded, folders = checksums(lab.cache), chunk_folders(lab.cache)
    calls = lab.execute(lab.start, SCENARIOS[title].command).calls
    disk = Disk(recorded, folders).replay(calls)
    disk.check_settled()
    assert (sorted(disk.published), sorted(disk.replaced)) == (published, replaced)


@pytest.mark.slow
def test_there_are_more_than_300_calls_to_be_killed_at(tmp_path, encoders):
    assert num_calls(tmp_path, SCENARIOS.values()) > 300
