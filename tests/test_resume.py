"""One run after another on one cache: what is done stays, what is new, changed or damaged is done."""

import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from support import (
    CHUNKS,
    FRAMES,
    ROOT,
    ROWS,
    Robot,
    check_stamps,
    chunk_files,
    frames_encoded,
    read_chunk,
    read_progress,
    run_utils,
    straight_line,
    tree,
    unreadable,
    write_config,
    write_frame,
    write_poses,
)


def test_a_run_with_a_limit_leaves_work_and_the_next_one_resumes_with_these_lines(robot, run_here, encoders):
    robot.add("t0", "t1", "t2", "t3", "t4")
    first = run_here(robot.config, "--limit", "2")
    assert first.code == 5
    assert "Loaded existing progress" not in first.out
    robot.check("t0", "t1")
    shutil.rmtree(robot.data / "t1")  # so of those present now one is completed
    second = run_here(robot.config)
    assert second.code == 0
    lines = [
        "Loaded existing progress: 1 trajectories completed",
        "Resuming processing: 1/4 trajectories completed",
        "Remaining trajectories: 3",
    ]
    printed = second.out.splitlines()
    assert [line for line in printed if line in lines] == lines
    assert frames_encoded(encoders) == 3 * FRAMES
    assert re.search(r"1 recorded.*stay.*: t1$", second.err, re.MULTILINE)
    robot.check("t0", "t1", "t2", "t3", "t4")


def test_new_trajectories_are_picked_up(robot, run_here, encoders):
    robot.add("t0")
    assert run_here(robot.config).code == 0
    robot.add("evening/t1")
    assert run_here(robot.config).code == 0
    assert frames_encoded(encoders) == FRAMES
    robot.check("t0", "evening/t1")


def shorter(robot: Robot) -> None:
    write_poses(robot.data / "t1", straight_line(FRAMES, 0.05), np.zeros(FRAMES))  # 0.95 m: one chunk


def bigger_frame(robot: Robot) -> None:
    write_frame(robot.data / "t1" / "7.png", 1, 7, size=(640, 480))


def another_frame(robot: Robot) -> None:
    write_frame(robot.data / "t1" / f"{FRAMES}.png", 1, FRAMES)
    write_poses(robot.data / "t1", straight_line(FRAMES + 1), np.zeros(FRAMES + 1))


@pytest.mark.parametrize(
    ("change", "frames", "chunks"), [(shorter, 20, 1), (bigger_frame, 20, 3), (another_frame, 21, 3)]
)
def test_changed_data_is_redone_and_no_chunk_of_the_old_plan_stays(robot, run_here, encoders, change, frames, chunks):
    robot.add("t0", "t1")
    run_here(robot.config)
    before = {path.name: path.read_bytes() for path in chunk_files(robot.cache / "t0")}
    change(robot)
    outcome = run_here(robot.config)
    assert outcome.code == 0
    assert re.search(r"t1\b.*data changed", outcome.err)
    assert "t0" not in outcome.err
    assert frames_encoded(encoders) == frames
    assert [path.name for path in chunk_files(robot.cache / "t1")] == [f"chunk_0000{i}.h5" for i in range(chunks)]
    for path in chunk_files(robot.cache / "t1"):
        attributes, _ = read_chunk(path)
        assert attributes["num_chunks"] == chunks
        assert attributes["trajectory_checksum"] == read_progress(robot.cache)["trajectory_checksums"]["t1"]
    check_stamps(robot.cache, "t1", 1)
    assert {path.name: path.read_bytes() for path in chunk_files(robot.cache / "t0")} == before
    assert list((robot.cache / ".staging").iterdir()) == []


def delete_chunk(folder: Path) -> None:
    (folder / "chunk_00001.h5").unlink()


def truncate_chunk(folder: Path) -> None:
    path = folder / "chunk_00001.h5"
    os.truncate(path, path.stat().st_size - 1)


def add_chunk(folder: Path) -> None:
    shutil.copy(folder / "chunk_00002.h5", folder / "chunk_00003.h5")


def delete_chunks(folder: Path) -> None:
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (delete_chunk, "chunk_00001.h5"),
        (truncate_chunk, "chunk_00001.h5"),
        (add_chunk, "chunk_00003.h5"),
        (delete_chunks, "chunk_00000.h5"),
    ],
)
def test_chunk_files_that_are_not_as_recorded_are_redone(robot, run_here, encoders, damage, named):
    robot.add("t0", "t1")
    run_here(robot.config)
    damage(robot.cache / "t1")
    outcome = run_here(robot.config)
    assert outcome.code == 0
    assert re.search(rf"t1\b.*{named}", outcome.err)
    assert frames_encoded(encoders) == FRAMES
    robot.check("t0", "t1")


def test_a_redo_that_fails_leaves_no_chunk_of_data_that_is_no_more(robot, run_here):
    robot.add("t0", "t1")
    run_here(robot.config)
    position = straight_line(FRAMES)
    position[5, 0] = np.inf
    write_poses(robot.data / "t1", position, np.zeros(FRAMES))
    assert run_here(robot.config).code == 1
    robot.check("t0")
    assert read_progress(robot.cache)["failed_trajectories"] == ["t1"]
    robot.mend("t1")
    assert run_here(robot.config).code == 0
    robot.check("t0", "t1")


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
@pytest.mark.parametrize("changed", [False, True])
def test_a_completed_trajectory_that_cannot_be_read_is_reported_and_stays(
    robot, run_here, encoders, monkeypatch, changed, number
):
    robot.add("t0", "t1")
    run_here(robot.config)
    before, record = tree(robot.cache / "t1"), read_progress(robot.cache)["trajectory_records"]["t1"]
    if changed:
        bigger_frame(robot)
        robot.add("t2")  # its success shows that the mount is there
    with monkeypatch.context() as patch:
        unreadable(patch, lambda path: path.endswith("t1/1.png" if changed else "t1/traj_data.pkl"), number)
        outcome = run_here(robot.config)
    assert outcome.code == 1
    assert os.strerror(number) in outcome.err
    assert re.search(r"\bt1\b.*\bstays\b", outcome.err)
    assert tree(robot.cache / "t1") == before
    assert read_progress(robot.cache)["trajectory_records"]["t1"] == record
    encoders.clear()
    assert run_here(robot.config).code == 0
    assert [sum(encoder.batch_sizes) for encoder in encoders] == ([FRAMES] if changed else [])
    robot.check("t0", "t1", *(["t2"] if changed else []))


def test_chunks_without_a_record_are_refused_with_two_ways_on(robot, run_here):
    robot.add("t0")
    run_here(robot.config)
    (robot.cache / "progress.json").unlink()
    (robot.cache / "progress.json.bak").unlink()
    before = tree(robot.cache)
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert "progress_utils.py rebuild" in outcome.err
    assert "--force-rebuild" in outcome.err
    assert tree(robot.cache) == before
    assert run_here(robot.config, "--force-rebuild").code == 0
    robot.check("t0")


def test_the_cache_of_another_dataset_is_refused(robot, run_here):
    robot.add("t0")
    run_here(robot.config)
    before = tree(robot.cache)
    write_config(robot.config, robot.data, dataset="drone")
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert "robot" in outcome.err
    assert "drone" in outcome.err
    assert tree(robot.cache) == before


def test_a_reset_record_has_everything_redone_with_whatever_configuration(robot, run_here, encoders):
    robot.add("t0", "t1")
    run_here(robot.config)
    assert run_utils("reset", "--cache-dir", robot.cache, "--yes").returncode == 0
    robot.configure(frame_stride=2)
    outcome = run_here(robot.config)
    assert outcome.code == 0
    assert "configuration" not in outcome.err
    assert frames_encoded(encoders) == FRAMES  # half of two trajectories'
    for name, stamp in (("t0", 0), ("t1", 1)):
        check_stamps(robot.cache, name, stamp, frame_stride=2)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing to do
# ---------------------------------------------------------------------------------------------------------------------


def test_with_nothing_to_do_no_encoder_is_loaded_and_no_chunk_touched(robot, run_here, encoders):
    robot.add("t0", "t1")
    run_here(robot.config)
    before = {path: path.stat().st_mtime_ns for path in chunk_files(robot.cache)}
    encoders.clear()
    assert run_here(robot.config).code == 0
    assert encoders == []
    assert {path: path.stat().st_mtime_ns for path in chunk_files(robot.cache)} == before


def test_with_nothing_to_do_the_heavy_libraries_are_not_imported(robot, run_here):
    robot.add("t0")
    run_here(robot.config)
    code = "import sys, dino_cache; print(dino_cache.main(sys.argv[1:]), *sys.modules)"
    command = [sys.executable, "-c", code, "--config", str(robot.config)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    exit_code, *modules = done.stdout.splitlines()[-1].split()
    assert exit_code == "0"
    assert "yaml" in modules
    assert not {"torch", "torchvision", "timm"} & set(modules)


def test_switching_the_checksum_kind_redoes_nothing_and_then_watches_the_other(robot, run_here, encoders):
    robot.add("t0", "t1")
    run_here(robot.config)
    encoders.clear()
    by_stat = read_progress(robot.cache)["trajectory_checksums"]
    robot.configure(checksum="content")
    assert run_here(robot.config).code == 0
    assert encoders == []
    progress = read_progress(robot.cache)
    assert progress["checksum_kind"] == "content"
    assert progress["trajectory_checksums"].keys() == by_stat.keys()
    assert not set(progress["trajectory_checksums"].values()) & set(by_stat.values())
    # 3.png with the pixels of frame 9, in as many bytes: only the content tells
    frame = robot.data / "t1" / "3.png"
    size = frame.stat().st_size
    write_frame(frame, 1, 9)
    assert frame.stat().st_size == size
    robot.configure(checksum="stat")  # verified once more by content
    outcome = run_here(robot.config)
    assert outcome.code == 0
    assert re.search(r"t1\b.*data changed", outcome.err)
    assert frames_encoded(encoders) == FRAMES
    progress = read_progress(robot.cache)
    assert progress["checksum_kind"] == "stat"
    assert progress["trajectory_checksums"] == by_stat


# ---------------------------------------------------------------------------------------------------------------------
# Without progress tracking
# ---------------------------------------------------------------------------------------------------------------------


def test_without_tracking_nothing_is_recorded_and_every_run_redoes_everything(robot, run_here, encoders):
    robot.add("t0", "t1")
    robot.configure(enable_progress_tracking=False)
    for number in (1, 2):
        assert run_here(robot.config).code == 0
        assert len(encoders) == number
        assert frames_encoded(encoders) == 2 * FRAMES
    assert not list(robot.cache.glob("progress.json*"))
    assert len(chunk_files(robot.cache)) == 2 * CHUNKS
    assert check_stamps(robot.cache, "t1", 1) == ROWS


def test_without_tracking_a_cache_with_a_record_is_refused(robot, run_here):
    robot.add("t0")
    run_here(robot.config)
    before = tree(robot.cache)
    robot.configure(enable_progress_tracking=False)
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert "enable_progress_tracking" in outcome.err
    assert tree(robot.cache) == before


# ---------------------------------------------------------------------------------------------------------------------
# A deadline
# ---------------------------------------------------------------------------------------------------------------------


def test_max_hours_stops_with_work_left_and_the_next_run_goes_on(robot, run_here, clock, before_batch):
    robot.add("t0", "t1", "t2", "t3")

    def tick(batch: int) -> None:
        clock.now += 0.5 * 3600  # half an hour a batch, 10 batches

    before_batch(tick)
    outcome = run_here(robot.config, "--max-hours", "2.25")
    assert outcome.code == 5
    done = read_progress(robot.cache)["completed_trajectories"]
    assert done in (["t0"], ["t0", "t1"])  # four or five batches of 8: 32 or 40 frames
    robot.check(*done)
    assert run_here(robot.config).code == 0
    robot.check("t0", "t1", "t2", "t3")


def test_a_deadline_that_passes_when_all_is_done_leaves_no_work(robot, run_here, clock, before_batch):
    robot.add("t0", "t1")

    def tick(batch: int) -> None:
        clock.now += 3600 if batch == 4 else 0  # in the last of 5 batches

    before_batch(tick)
    assert run_here(robot.config, "--max-hours", "0.5").code == 0
    robot.check("t0", "t1")
