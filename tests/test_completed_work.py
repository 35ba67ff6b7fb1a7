"""Completed work stays until something better is durable: what withdraws a record and removes chunks, and what not."""

import errno
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

import dino_cache
import progress_utils
from support import (
    CHUNKS,
    FRAMES,
    Robot,
    attempts,
    check_stamps,
    chunk_files,
    frames_encoded,
    read_progress,
    run_cache,
    run_utils,
    straight_line,
    tree,
    unreadable,
    write_config,
    write_frame,
    write_poses,
)


def is_sound(robot: Robot) -> bool:
    return run_utils("verify", "--deep", "--cache-dir", robot.cache).returncode == 0


def cut_poses(robot: Robot) -> None:
    path = robot.data / "t1/traj_data.pkl"
    path.write_bytes(path.read_bytes()[:-100])


def cut_frame(robot: Robot) -> None:
    path = robot.data / "t1/7.png"
    path.write_bytes(path.read_bytes()[:60])


def remove_frames(robot: Robot) -> None:
    for path in robot.data.glob("t1/*.png"):
        path.unlink()


@pytest.mark.parametrize("damage", [cut_poses, cut_frame, remove_frames])
def test_data_that_cannot_be_parsed_tonight_withdraw_nothing(robot, run_here, encoders, tmp_path, damage):
    robot.add("t0", "t1")
    assert run_here(robot.config).code == 0
    before, record = {path: path.read_bytes() for path in chunk_files(robot.cache)}, read_progress(robot.cache)
    shutil.copytree(robot.data / "t1", tmp_path / "t1")
    damage(robot)
    for _ in range(2):
        outcome = run_here(robot.config)
        assert outcome.code == 1
        assert "t1 stays as it was completed" in outcome.err
        assert {path: path.read_bytes() for path in chunk_files(robot.cache)} == before
        assert read_progress(robot.cache)["trajectory_records"] == record["trajectory_records"]
        assert attempts(robot) == {}
        assert "robot: 2/2 trajectories completed" in outcome.out
    shutil.rmtree(robot.data / "t1")
    shutil.copytree(tmp_path / "t1", robot.data / "t1")
    encoders.clear()
    assert run_here(robot.config).code == 0
    assert encoders == []  # whole again: nothing to do
    assert is_sound(robot)


def test_data_that_cannot_be_read_tonight_withdraw_nothing(robot, run_here, encoders, monkeypatch):
    robot.add("t0", "t1")
    run_here(robot.config)
    before = {path: path.read_bytes() for path in chunk_files(robot.cache)}
    with monkeypatch.context() as patch:
        unreadable(patch, lambda path: path.endswith("t1/traj_data.pkl"), errno.EACCES)
        outcome = run_here(robot.config)
    assert outcome.code == 1
    assert "t1" in outcome.err
    assert "Permission denied" in outcome.err
    assert {path: path.read_bytes() for path in chunk_files(robot.cache)} == before
    encoders.clear()
    assert run_here(robot.config).code == 0
    assert encoders == []
    robot.check("t0", "t1")


def test_changed_data_that_break_a_rule_withdraw_the_record_and_remove_the_chunks(robot, run_here):
    robot.add("t0", "t1")
    run_here(robot.config)
    position = straight_line(FRAMES)
    position[4, 0] = np.inf
    write_poses(robot.data / "t1", position, np.zeros(FRAMES))
    assert run_here(robot.config).code == 1
    robot.check("t0")
    assert attempts(robot) == {"t1": 1}


@pytest.mark.parametrize("is_there", [True, False])
def test_a_record_of_chunks_that_are_gone_is_withdrawn_where_it_cannot_be_redone(robot, run_here, is_there):
    robot.add("t0", "t1")
    run_here(robot.config)
    (robot.cache / "t1/chunk_00001.h5").unlink()
    if is_there:
        cut_poses(robot)
    else:
        shutil.rmtree(robot.data / "t1")
    outcome = run_here(robot.config)
    assert outcome.code == 1
    assert f"t1: {'its data changed' if is_there else 'its chunk_00001.h5 is missing'}" in outcome.err
    progress = read_progress(robot.cache)
    assert progress["completed_trajectories"] == ["t0"]
    assert len(chunk_files(robot.cache)) == CHUNKS + CHUNKS - 1  # what is left of t1 stays
    if not is_there:
        assert run_here(robot.config).code == 0


@pytest.mark.parametrize(
    ("change", "fate"),
    [
        (cut_poses, "it stays as it was completed"),
        (lambda robot: (robot.data / "t1/19.png").unlink(), "its chunks will be removed"),  # 19 frames, 20 poses
    ],
)
def test_a_dry_run_tells_what_becomes_of_a_completed_trajectory_that_will_fail(robot, run_here, change, fate):
    robot.add("t0", "t1")
    run_here(robot.config)
    change(robot)
    assert fate in run_here(robot.config, "--dry-run").out
    outcome = run_here(robot.config)
    assert outcome.code == 1
    assert ("t1" in read_progress(robot.cache)["completed_trajectories"]) == ("stays" in fate)
    assert ("1 completed trajectories were not as they should be" in outcome.err) == ("stays" in fate)


def test_a_dry_run_tells_lost_chunks_and_withdraws_nothing(robot, run_here):
    robot.add("t0", "t1")
    run_here(robot.config)
    shutil.rmtree(robot.data / "t1")
    shutil.rmtree(robot.cache / "t1")
    before = tree(robot.cache)
    assert "No longer completed: t1" in run_here(robot.config, "--dry-run").out
    assert tree(robot.cache) == before


# ---------------------------------------------------------------------------------------------------------------------
# A forced rebuild
# ---------------------------------------------------------------------------------------------------------------------


def test_a_rebuild_of_a_split_forgets_only_what_it_redoes_and_keeps_the_old_record(robot, run_here, encoders, tmp_path):
    robot.add("t0", "t1", "t2")
    run_here(robot.config)
    old = (robot.cache / "progress.json").read_bytes()
    (tmp_path / "split.txt").write_text("t1\n")
    robot.configure()
    config = yaml.safe_load(robot.config.read_text())
    config["datasets"]["robot"]["split"] = str(tmp_path / "split.txt")
    robot.config.write_text(yaml.safe_dump(config))
    outcome = run_here(robot.config, "--force-rebuild")
    assert outcome.code == 0
    assert frames_encoded(encoders) == FRAMES
    assert "2 completed trajectories are not among those redone, and stay: t0, t2" in outcome.err
    robot.check("t0", "t1", "t2")
    (kept,) = robot.cache.glob("progress.json.rebuild-*")
    assert kept.read_bytes() == old
    assert kept.name in outcome.err


def test_a_rebuild_of_one_dataset_leaves_the_others_record(run_here, tmp_path):
    config = write_config(tmp_path / "pair.yaml", tmp_path / "lab", dataset="lab")
    settings = yaml.safe_load(config.read_text())
    settings["datasets"]["yard"] = {"data_folder": str(tmp_path / "yard")}
    config.write_text(yaml.safe_dump(settings))
    pair = [Robot(tmp_path / name, tmp_path / name / "dino_cache_small", config) for name in ("lab", "yard")]
    for robot in pair:
        robot.add("t0")
    assert run_here(config).code == 0
    before = tree(pair[1].cache)
    assert run_here(config, "--force-rebuild", "--dataset", "lab").code == 0
    assert tree(pair[1].cache) == before


def test_a_rebuild_of_another_split_redoes_that_too_while_the_first_is_unfinished(robot, run_here, encoders, tmp_path):
    robot.add("t0", "t1", "t2")
    run_here(robot.config)
    config = yaml.safe_load(robot.config.read_text())
    for names, code, frames in (("t0\nt1\n", 5, FRAMES), ("t1\nt2\n", 0, 2 * FRAMES)):
        (tmp_path / "split.txt").write_text(names)
        config["datasets"]["robot"]["split"] = str(tmp_path / "split.txt")
        robot.config.write_text(yaml.safe_dump(config))
        limit = ("--limit", "1") if code else ()
        assert run_here(robot.config, "--force-rebuild", *limit).code == code
        assert frames_encoded(encoders) == frames
    robot.check("t0", "t1", "t2")


# ---------------------------------------------------------------------------------------------------------------------
# The place of a trajectory's chunks
# ---------------------------------------------------------------------------------------------------------------------


def test_a_foreign_file_is_found_before_encoding_and_the_trajectory_tried_again_when_it_is_gone(
    robot, run_here, encoders
):
    robot.add("t0", "t1")
    robot.configure(max_attempts=1)
    (robot.cache / "t1").mkdir(parents=True)
    foreign = robot.cache / "t1" / "notes.txt"
    foreign.write_text("mine")
    for number in range(3):
        assert run_here(robot.config).code == 1
        assert "notes.txt" in read_progress(robot.cache)["failures"]["t1"]["reason"]
        assert frames_encoded(encoders) == FRAMES, f"run {number}: t0 alone, once"
    assert foreign.read_text() == "mine"
    foreign.unlink()
    assert run_here(robot.config).code == 0
    robot.check("t0", "t1")


@pytest.mark.parametrize("first", ["a0", "a0/b1"])
def test_a_trajectory_inside_another_ones_folder_stays_when_that_is_redone(robot, run_here, first):
    """Without poses, a folder of frames may hold another one."""
    robot.configure(chunk_by="frames", max_chunk_frames=10, overlap_frames=0)

    def write_frames(name: str, count: int) -> None:
        (robot.data / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            write_frame(robot.data / name / f"{number}.png", int(name[-1]), number)

    for name in (first, *({"a0", "a0/b1"} - {first})):
        write_frames(name, 20)
        assert run_here(robot.config).code == 0
    inner = {path: path.read_bytes() for path in (robot.cache / "a0/b1").iterdir()}
    for count in (25, 8):  # three chunks instead of two, then one
        for path in (robot.data / "a0").glob("*.png"):
            path.unlink()
        write_frames("a0", count)
        outcome = run_here(robot.config)
        assert outcome.code == 0, outcome.err
        assert check_stamps(robot.cache, "a0", 0) == count
        assert len(list(robot.cache.glob("a0/*.h5"))) == math.ceil(count / 10)
        assert {path: path.read_bytes() for path in (robot.cache / "a0/b1").iterdir()} == inner
        assert is_sound(robot)
    (robot.data / "a0/3.png").unlink()  # a number is missing now
    assert run_here(robot.config).code == 1
    assert read_progress(robot.cache)["completed_trajectories"] == ["a0/b1"]
    assert list(robot.cache.glob("a0/*.h5")) == []
    assert {path: path.read_bytes() for path in (robot.cache / "a0/b1").iterdir()} == inner


def test_a_foreign_file_leaves_a_completed_trajectory_completed(robot, run_here):
    robot.add("t0")
    run_here(robot.config)
    before = {path: path.read_bytes() for path in chunk_files(robot.cache)}
    (robot.cache / "t0" / "notes.txt").write_text("mine")
    write_poses(robot.data / "t0", straight_line(FRAMES), np.ones(FRAMES))
    outcome = run_here(robot.config)
    assert outcome.code == 1
    assert "notes.txt" in outcome.err
    assert {path: path.read_bytes() for path in chunk_files(robot.cache)} == before
    assert read_progress(robot.cache)["completed_trajectories"] == ["t0"]


@pytest.mark.slow
def test_a_cache_folder_without_access_fails_its_trajectory_alone(tmp_path):
    """Root may write everywhere; here it gives that up."""
    prefix = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.geteuid() == 0 else []
    if prefix and shutil.which("setpriv") is None:
        pytest.skip("setpriv is not there, and root may write everywhere")
    robot = Robot(tmp_path / "data", tmp_path / "data" / "dino_cache_small", tmp_path / "robot.yaml")
    robot.configure()
    robot.add("t0", "t1", "t2")
    (robot.cache / "t1").mkdir(parents=True)
    (robot.cache / "t1").chmod(0o500)
    done = run_cache(robot.config, prefix=prefix)
    assert done.returncode == 1, done.stderr
    progress = read_progress(robot.cache)
    assert progress["completed_trajectories"] == ["t0", "t2"]
    assert "no access" in progress["failures"]["t1"]["reason"]


# ---------------------------------------------------------------------------------------------------------------------
# The machine's faults and a library's
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")], ids=repr)
def test_a_machine_without_memory_or_descriptors_stops_the_run_and_blames_no_trajectory(
    robot, run_here, monkeypatch, error
):
    robot.add("t0", "t1")

    def fail(data: bytes) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(dino_cache, "_unpickle_poses", fail)
        assert run_here(robot.config).code == 3
    assert not (robot.cache / "progress.json").exists() or read_progress(robot.cache)["failures"] == {}
    assert run_here(robot.config).code == 0


@pytest.mark.parametrize("error", [AttributeError("no such codec"), RuntimeError("odd"), StopIteration()], ids=repr)
@pytest.mark.parametrize(
    "where", ["FolderSource.checksum", "FolderSource.poses", "FolderSource.open_frames", "FileFrames.read"]
)
def test_whatever_a_source_raises_fails_its_trajectory_alone(robot, run_here, monkeypatch, error, where):
    robot.add("t0", "t1", "t2")
    owner, method = where.split(".")
    real = getattr(getattr(dino_cache, owner), method)

    def fail(self: object, *arguments: object, **keywords: object) -> object:
        name = self._name if owner == "FolderSource" else self.name(0).split("/")[0]
        if name == "t1":
            raise error
        return real(self, *arguments, **keywords)

    monkeypatch.setattr(getattr(dino_cache, owner), method, fail)
    assert run_here(robot.config).code == 1
    robot.check("t0", "t2")
    assert type(error).__name__ in read_progress(robot.cache)["failures"]["t1"]["reason"]


# ---------------------------------------------------------------------------------------------------------------------
# Disks that are not there
# ---------------------------------------------------------------------------------------------------------------------


def test_nothing_is_written_into_an_empty_data_folder(robot, run_here):
    robot.data.mkdir()
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert "mounted" in outcome.err
    assert list(robot.data.iterdir()) == []


@pytest.fixture
def pair(tmp_path: Path) -> list[Robot]:
    """Two datasets of one config, whose caches lie in folders of their own."""
    config = write_config(tmp_path / "pair.yaml", tmp_path / "lab", dataset="lab")
    settings = yaml.safe_load(config.read_text())
    settings["datasets"] = {
        name: {"data_folder": str(tmp_path / name), "cache_dir": str(tmp_path / "caches" / name)}
        for name in ("lab", "yard")
    }
    config.write_text(yaml.safe_dump(settings))
    robots = [Robot(tmp_path / name, tmp_path / "caches" / name, config) for name in ("lab", "yard")]
    for robot in robots:
        robot.add("t0")
    return robots


def begin_twice(pair: list[Robot], run_here) -> None:
    """After the second run, each record knows of the other cache."""
    for _ in range(2):
        assert run_here(pair[0].config).code == 0


@pytest.mark.parametrize("is_mount_point", [True, False])
def test_a_cache_that_is_gone_entirely_is_not_made_anew_without_a_terminal(pair, run_here, is_mount_point):
    lab, yard = pair
    begin_twice(pair, run_here)
    shutil.rmtree(yard.cache)
    if is_mount_point:
        yard.cache.mkdir()
    before = tree(lab.cache.parent)
    for arguments in ([], ["--dataset", "yard"]):
        outcome = run_here(lab.config, *arguments)
        assert outcome.code == 2
        for part in (str(yard.cache), str(lab.cache / "progress.json"), "--yes", "mount"):
            assert part in outcome.err
    now = tree(lab.cache.parent)
    assert {path for path in now if "lock" not in path} == {path for path in before if "lock" not in path}
    assert run_here(lab.config, "--dataset", "lab").code == 0  # what is there goes on
    assert run_here(lab.config).code == 2  # and does not forget the other one
    assert run_here(lab.config, "--yes").code == 0
    yard.check("t0")
    assert run_here(lab.config).code == 0


def test_a_cache_that_was_never_there_is_made_without_a_question(pair, run_here):
    assert run_here(pair[0].config, "--dataset", "lab").code == 0
    begin_twice(pair, run_here)
    pair[1].check("t0")


def test_a_cache_on_a_disk_that_is_not_mounted_is_refused(pair, run_here, monkeypatch, tmp_path):
    fstab = tmp_path / "fstab"
    fstab.write_text(f"# disks\nUUID=1 / ext4 defaults 0 1\nUUID=2 {tmp_path / 'caches'} ext4 nofail 0 2\n\n")
    monkeypatch.setattr(progress_utils, "FSTAB", fstab)
    outcome = run_here(pair[0].config, "--yes")
    assert outcome.code == 2
    assert f"nothing is mounted on {tmp_path / 'caches'}" in outcome.err
    assert not (tmp_path / "caches").exists()
    fstab.write_text("UUID=1 / ext4 defaults 0 1\ntmpfs none tmpfs\n")
    assert run_here(pair[0].config).code == 0
