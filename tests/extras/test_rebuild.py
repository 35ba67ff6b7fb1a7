"""rebuild makes a lost or corrupt record anew from the chunks that are complete; a run then redoes just the others."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from commands_support import CHUNK, STAMPS, CachedRobot, answer, flip, mix, reseal, set_attributes, swap

import progress_utils
from progress_utils import cache_lock
from support import FRAMES, ROOT, read_progress, wait_until


@pytest.fixture
def robot(cached) -> CachedRobot:
    """Three trajectories are cached."""
    return cached(*STAMPS)


@pytest.fixture
def single(cached) -> CachedRobot:
    """One trajectory is cached."""
    return cached("t1")


def kept_aside(robot: CachedRobot) -> list[bytes]:
    return [path.read_bytes() for path in robot.cache.glob("progress.json.rebuild-*")]


@pytest.mark.parametrize("content", [None, b"", b'{"half": '])
def test_rebuild_restores_the_record_and_the_next_run_has_nothing_to_do(robot, encoders, content):
    (robot.cache / "progress.json.bak").write_bytes(b"the copy before")
    undisturbed, record = robot.state(), robot.cache / "progress.json"
    record.unlink() if content is None else record.write_bytes(content)
    files = robot.files()
    assert robot.utils("rebuild", "--yes").code == 0
    np.testing.assert_equal(robot.state(), undisturbed)
    assert kept_aside(robot) == ([] if content is None else [content])
    assert robot.files().items() >= {path: it for path, it in files.items() if path != "progress.json"}.items()
    assert robot.verify("--deep") == {}
    encoders.clear()
    robot.run()
    assert encoders == []
    np.testing.assert_equal(robot.state(), undisturbed)


def test_rebuild_of_a_good_record_keeps_it_aside(robot):
    undisturbed, record = robot.state(), (robot.cache / "progress.json").read_bytes()
    assert robot.utils("rebuild", "--yes").code == 0
    assert kept_aside(robot) == [record]
    np.testing.assert_equal(robot.state(), undisturbed)


def test_rebuild_keeps_what_a_readable_record_knows_beside_the_chunks(robot):
    failure = {"reason": "no poses", "error_type": "InputError", "attempts": 2, "time": 1.0, "checksum": None}
    failures = {"bad": {**failure, "checksum_kind": "stat"}}
    robot.edit_record(lambda record: record.update(elapsed_s=77, failures=failures, failed_trajectories=["bad"]))
    assert robot.utils("rebuild", "--yes").code == 0
    record = read_progress(robot.cache)
    assert (record["elapsed_s"], record["failures"]) == (77, failures)
    assert set(record["completed_trajectories"]) == set(STAMPS)


def test_rebuild_is_refused_while_a_force_rebuild_is_unfinished(robot):
    robot.run("--force-rebuild", "--limit", "1", code=5)
    before = robot.files()
    refused = robot.utils("rebuild", "--yes")
    assert refused.code == 2
    assert "force_rebuild is under way" in refused.err
    assert robot.files() == before


@pytest.mark.parametrize("change", [{"a_new_setting": 1}, {"dino_model_type": "enormous"}])
def test_rebuild_of_chunks_with_settings_of_a_newer_program_is_refused(single, change):
    for path in (single.cache / "t1").iterdir():
        with h5py.File(path) as file:
            spec = json.dumps({**json.loads(file.attrs["spec"]), **change})
        reseal(path, set_attributes(spec=spec))
    before = single.files()
    refused = single.utils("rebuild", "--yes")
    assert refused.code == 2
    assert next(iter(change)) in refused.err
    assert "update the program" in refused.err
    assert single.files() == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_the_workers_of_a_killed_command_end_too_and_hold_no_lock(robot):
    for name in STAMPS:  # a chunk that takes minutes to read: two terabytes of zeros
        path = robot.cache / name / "chunk_00000.h5"
        path.write_bytes(b'{"data": [], "digest": ""}'.ljust(512))
        os.truncate(path, 1 << 41)
    command = [sys.executable, str(ROOT / "progress_utils.py"), "rebuild", "--yes", "--cache-dir", str(robot.cache)]
    with subprocess.Popen(command, start_new_session=True) as process:

        def group() -> list[str]:
            stats = [path.read_text().rpartition(")")[2].split() for path in Path("/proc").glob("[0-9]*/stat")]
            return [state for state, _, number, *_ in stats if int(number) == process.pid and state != "Z"]

        try:
            wait_until(lambda: len(group()) > 1 or progress_utils.available_cores() == 1)
            process.kill()
            process.wait()
            wait_until(lambda: not group())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    with cache_lock(robot.cache):
        pass


def test_a_rebuilt_record_began_with_its_first_chunk(robot):
    reseal(robot.cache / CHUNK, set_attributes(created_at="2020-01-02T03:04:05Z"))
    assert robot.utils("rebuild", "--yes").code == 0
    assert read_progress(robot.cache)["start_time"] == 1577934245.0
    assert robot.verify("--deep") == {}


def spoil_data(path: Path) -> None:
    with h5py.File(path) as file:
        place = file["yaw"].id.get_offset()
    flip(path, place)


INCOMPLETE: dict[str, tuple[Callable[[Path], Any], str]] = {
    **{
        f"chunk {index} is missing": (lambda cache, index=index: (cache / f"t1/chunk_0000{index}.h5").unlink(), "t1: ")
        for index in range(3)
    },
    "a flipped byte": (lambda cache: spoil_data(cache / CHUNK), CHUNK),
    "cut off": (lambda cache: os.truncate(cache / CHUNK, 5000), CHUNK),
    "one more": (lambda cache: shutil.copy(cache / CHUNK, cache / "t1/chunk_00003.h5"), "t1: "),
    "two in each other's place": (lambda cache: swap(cache, CHUNK, "t1/chunk_00002.h5"), "t1: "),
    "one of another trajectory": (lambda cache: shutil.copy(cache / "t3/chunk_00001.h5", cache / CHUNK), "t1: "),
    "all of another trajectory": (
        lambda cache: (shutil.rmtree(cache / "t1"), shutil.copytree(cache / "t3", cache / "t1")), "t1: "
    ),
    "one of another configuration": (
        lambda cache: reseal(cache / CHUNK, set_attributes(fingerprint="e" * 16)), "t1: "
    ),
    "one of other data": (
        lambda cache: reseal(cache / CHUNK, set_attributes(trajectory_checksum="0" * 16)), "t1: "
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "named"), INCOMPLETE.values(), ids=INCOMPLETE)
def test_what_is_not_complete_is_left_out_with_its_reason_and_the_next_run_redoes_just_that(
    robot, encoders, damage, named
):
    undisturbed = robot.state()
    damage(robot.cache)
    (robot.cache / "progress.json").unlink()
    rebuilt = robot.utils("rebuild", "--yes")
    assert rebuilt.code == 1
    (reason,) = re.findall(rf"^  left out: {named}(.*)$", rebuilt.err, re.MULTILINE)
    assert len(reason) > 5
    assert set(read_progress(robot.cache)["completed_trajectories"]) == {"lab/t2", "t3"}
    assert robot.verify("--deep").keys() == {("unrecorded", "t1")}
    encoders.clear()
    robot.run()
    assert sum(encoders[-1].batch_sizes) == FRAMES
    np.testing.assert_equal(robot.state(), undisturbed)


def test_half_made_chunks_and_the_users_own_files_are_not_taken_in(robot):
    undisturbed = robot.state()
    shutil.copytree(robot.cache / "t1", robot.cache / ".staging" / "tmp1")
    (robot.cache / "mine").mkdir()
    shutil.copy(robot.cache / CHUNK, robot.cache / "mine" / "my_chunk_00001.h5")
    (robot.cache / "progress.json").unlink()
    assert robot.utils("rebuild", "--yes").code == 0
    np.testing.assert_equal(robot.state(), undisturbed)
    assert (robot.cache / "mine" / "my_chunk_00001.h5").exists()


@pytest.mark.parametrize(("latest", "max_chunk_distance_m"), [("t1", 2.0), ("t3", 2.0), ("t4", 3.0)])
def test_a_rebuilt_mixed_cache_has_the_configuration_of_the_most_recent_chunk(robot, latest, max_chunk_distance_m):
    mix(robot)
    recorded = read_progress(robot.cache)
    for name in (*STAMPS, "t4"):
        for path in (robot.cache / name).iterdir():
            reseal(path, set_attributes(created_at=f"20{30 if name == latest else 20}-01-01T00:00:00Z"))
    rebuilt = robot.utils("rebuild", "--yes")
    assert rebuilt.code == 0
    assert "mixed" in rebuilt.err.lower()
    record = read_progress(robot.cache)
    assert record["processing_config"]["max_chunk_distance_m"] == max_chunk_distance_m
    for key in ("specs", "trajectory_checksums", "total_chunks"):
        assert record[key] == recorded[key]
    assert robot.verify("--deep") == {}
    assert json.loads(robot.utils("verify", "--json").out)["mixed"] is True


def no_chunks(cache: Path) -> None:
    for name in STAMPS:
        shutil.rmtree(cache / name)


def no_complete_one(cache: Path) -> None:
    for name in STAMPS:
        (cache / name / "chunk_00000.h5").unlink()


@pytest.mark.parametrize("spoil", [no_chunks, no_complete_one])
def test_rebuild_without_a_complete_trajectory_does_nothing(robot, spoil):
    spoil(robot.cache)
    before = robot.files()
    refused = robot.utils("rebuild", "--yes")
    assert refused.code == 2
    assert str(robot.cache) in refused.err
    assert robot.files() == before


def test_rebuild_without_a_terminal_needs_yes(robot):
    before = robot.files()
    refused = robot.utils("rebuild")
    assert refused.code == 2
    assert "--yes" in refused.err
    assert robot.files() == before


@pytest.mark.parametrize(("line", "code"), [("n", 2), ("", 2), ("y", 0)])
def test_rebuild_asks_on_a_terminal(robot, monkeypatch, line, code):
    undisturbed = robot.state()
    (robot.cache / "progress.json").unlink()
    before = robot.files()
    answer(monkeypatch, line)
    asked = robot.utils("rebuild")
    assert asked.code == code
    assert "3 trajectories, 9 chunks" in asked.err
    assert "[y/N]" in asked.err
    if code == 0:
        np.testing.assert_equal(robot.state(), undisturbed)
    else:
        assert robot.files() == before
