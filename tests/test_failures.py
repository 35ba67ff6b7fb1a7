"""A trajectory at fault fails alone and is tried again as often as allowed; a fault of another kind stops the run."""

import errno
import os
import pickle
import re
import shutil
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support import (
    FRAMES,
    ROWS,
    attempts,
    check_stamps,
    frames_encoded,
    make_trajectory,
    read_chunk,
    read_progress,
    run_utils,
    straight_line,
    unreadable,
    write_frame,
    write_poses,
)


def test_a_failure_is_recorded_with_reason_and_attempts_and_fails_only_its_trajectory(robot, run_here):
    robot.add("t0", "t2")
    robot.add_broken("t1")
    outcome = run_here(robot.config)
    assert outcome.code == 1
    robot.check("t0", "t2")
    failure = read_progress(robot.cache)["failures"]["t1"]
    for part in ("t1/traj_data.pkl", "position[2, 1]", "nan"):
        assert part in failure["reason"]
    assert failure["attempts"] == 1
    assert failure["reason"] in outcome.err
    assert f"  - t1: {failure['reason']}\n" in run_utils("show", "--cache-dir", robot.cache).stdout
    log = (robot.cache / "dino_cache.log").read_text()
    assert failure["reason"] in log
    assert "Traceback (most recent call last)" in log
    assert "Traceback" not in outcome.err


def test_failed_ones_are_tried_again_until_max_attempts_and_wait_for_reset_failed(robot, run_here, encoders):
    robot.add("t0")
    robot.add_broken("t1")
    robot.configure(max_attempts=2)
    for expected in (1, 2, 2, 2):
        assert run_here(robot.config).code == 1  # exhausted ones too
        assert attempts(robot) == {"t1": expected}
    encoders.clear()
    run_here(robot.config)
    assert encoders == []  # an exhausted one is nothing to do
    assert run_utils("reset-failed", "--cache-dir", robot.cache).returncode == 0
    assert run_here(robot.config).code == 1
    assert attempts(robot) == {"t1": 1}
    robot.check("t0")


def test_switching_the_checksum_kind_does_not_forget_attempts(robot, run_here):
    robot.add_broken("t0")
    run_here(robot.config)
    robot.configure(checksum="content")
    run_here(robot.config)
    assert attempts(robot) == {"t0": 2}


def test_failed_ones_come_after_the_others(robot, run_here):
    robot.add_broken("a0")
    run_here(robot.config)
    robot.add("b1", "c2")
    assert run_here(robot.config, "--limit", "2").code == 1  # a0 is left, and has failed before
    assert attempts(robot) == {"a0": 1}
    robot.check("b1", "c2")
    assert run_here(robot.config, "--limit", "2").code == 1
    assert attempts(robot) == {"a0": 2}


@pytest.mark.parametrize("mended", [True, False])
def test_an_exhausted_one_starts_afresh_when_its_data_changed(robot, run_here, mended):
    robot.add_broken("t0")
    robot.add("t1")
    robot.configure(max_attempts=1)
    for _ in range(2):
        run_here(robot.config)
    if mended:
        robot.mend("t0")
        outcome = run_here(robot.config)
        assert outcome.code == 0
        assert "Redoing t0: " in outcome.err
        assert "not tried again" not in outcome.err
        robot.check("t0", "t1")
        assert attempts(robot) == {}
    else:
        write_frame(robot.data / "t0" / "3.png", 0, 3, size=(64, 48))
        robot.configure(max_attempts=5)
        run_here(robot.config)
        assert attempts(robot) == {"t0": 1}


def test_a_recorded_failure_that_is_gone_from_the_data_still_counts_and_is_named(robot, run_here):
    robot.add("t0")
    robot.add_broken("t1")
    run_here(robot.config)
    shutil.rmtree(robot.data / "t1")
    outcome = run_here(robot.config)
    assert outcome.code == 1
    assert "t1" in outcome.out + outcome.err


def test_a_hostile_and_broken_dataset(robot, run_here, encoders, tmp_path):
    """Good ones complete, bad ones fail with reasons that name file and value; once mended, only they are done."""
    robot.add("good0", "cut1", "nan2", "still3", "evil4")
    make_trajectory(robot.data / "ordered", 12, stamp=5)
    for number in range(12):  # 1.jpg, 10.jpg, 11.jpg, 2.jpg ... as text
        (robot.data / "ordered" / f"{number}.png").unlink()
        Image.new("RGB", (32, 24), (20 * number,) * 3).save(robot.data / "ordered" / f"{number}.jpg", quality=95)
    frame = robot.data / "cut1" / "11.png"
    whole = frame.read_bytes()
    frame.write_bytes(whole[: len(whole) // 2])
    position = straight_line(FRAMES)
    position[17, 0] = np.nan
    write_poses(robot.data / "nan2", position, np.zeros(FRAMES))
    write_poses(robot.data / "still3", np.full((FRAMES, 2), 7.0), np.zeros(FRAMES))

    class Command:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    (robot.data / "evil4" / "traj_data.pkl").write_bytes(pickle.dumps({"position": Command(), "yaw": Command()}))

    outcome = run_here(robot.config)
    assert outcome.code == 1
    assert not (tmp_path / "executed").exists()
    progress = read_progress(robot.cache)
    assert progress["completed_trajectories"] == ["good0", "ordered"]
    reasons = {name: failure["reason"] for name, failure in progress["failures"].items()}
    assert sorted(reasons) == ["cut1", "evil4", "nan2", "still3"]
    assert "cut1/11.png" in reasons["cut1"]
    assert "nan2/traj_data.pkl: position[17, 0] is nan" in reasons["nan2"]
    assert "still3: insufficient movement: 0 m" in reasons["still3"]
    assert "evil4/traj_data.pkl" in reasons["evil4"]
    assert "system" in reasons["evil4"]
    for reason in reasons.values():
        assert reason in outcome.err
    _, datasets = read_chunk(robot.cache / "ordered" / "chunk_00000.h5")
    np.testing.assert_array_equal(datasets["frame_index"], np.arange(9))
    np.testing.assert_allclose(datasets["cls_token"][:, 0].astype(float), 20 * np.arange(9), atol=2)
    assert check_stamps(robot.cache, "good0", 0) == ROWS

    frame.write_bytes(whole)
    for name in ("nan2", "still3", "evil4"):
        robot.mend(name)
    assert run_utils("reset-failed", "--cache-dir", robot.cache).returncode == 0
    assert run_here(robot.config).code == 0
    assert frames_encoded(encoders) == 4 * FRAMES
    shutil.rmtree(robot.cache / "ordered")  # its frames carry no stamps
    for name in ("good0", "cut1", "nan2", "still3", "evil4"):
        assert check_stamps(robot.cache, name, int(name[-1])) == ROWS
    assert read_progress(robot.cache)["failures"] == {}


def test_permission_errors_are_ordinary_failures(robot, run_here, monkeypatch):
    for number in range(25):
        make_trajectory(robot.data / f"t{number:02}", 3)
    unreadable(monkeypatch, lambda path: path.endswith("1.png"), errno.EACCES)
    assert run_here(robot.config).code == 1
    assert len(read_progress(robot.cache)["failures"]) == 25


# ---------------------------------------------------------------------------------------------------------------------
# Faults that are not a trajectory's
# ---------------------------------------------------------------------------------------------------------------------


def test_a_failing_encoder_stops_the_run_and_blames_no_trajectory(robot, run_here, before_batch):
    robot.add("t0", "t1", "t2")

    def fail(batch: int) -> None:
        if batch == 4:
            raise RuntimeError("CUDA error: device-side assert triggered")

    before_batch(fail)
    outcome = run_here(robot.config)
    assert outcome.code == 3
    assert "device-side assert" in outcome.err
    assert "Traceback (most recent call last)" in (robot.cache / "dino_cache.log").read_text()
    progress = read_progress(robot.cache)
    assert progress["failures"] == {}
    assert set(progress["completed_trajectories"]) <= {"t0"}
    before_batch(lambda batch: None)
    assert run_here(robot.config).code == 0
    robot.check("t0", "t1", "t2")


@pytest.mark.parametrize(
    ("files", "fatal", "done"),
    [
        (r"chunk_\d+\.h5$", 5, ["t0"]),  # the second chunk of t1
        (r"progress\.json\.tmp$", 2, []),  # the save that would record t0
    ],
)
def test_a_full_disk_stops_the_run_and_what_is_recorded_is_whole(robot, run_here, monkeypatch, files, fatal, done):
    """From the `fatal`-th on, the disk takes none of the files that match."""
    robot.add("t0", "t1", "t2")
    fsync, count = os.fsync, 0

    def force(descriptor: int) -> None:
        nonlocal count
        if re.search(files, os.readlink(f"/proc/self/fd/{descriptor}")):
            count += 1
            if count >= fatal:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", force)
        outcome = run_here(robot.config)
    assert outcome.code == 3
    assert "No space left on device" in outcome.err
    progress = read_progress(robot.cache)
    assert progress["failures"] == {}
    assert progress["completed_trajectories"] == done
    for name in done:
        assert check_stamps(robot.cache, name, int(name[-1])) == ROWS
    assert run_here(robot.config).code == 0
    robot.check("t0", "t1", "t2")
