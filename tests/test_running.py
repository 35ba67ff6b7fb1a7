"""Runs from outside: what is done, redone, recorded, refused and said, and with which exit code."""

import errno
import functools
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pexpect
import pytest
import yaml
from PIL import Image

import dino_cache
import progress_utils
from dino_cache import STAGES, CacheSpec, FrameDecoder, Profile, RunOptions, available_cores, measure_rate
from progress_utils import cache_lock, read_lock_owner
from support import (
    ROOT,
    STAMP_SHAPE,
    StampEncoder,
    cache_command,
    check_stamps,
    chunk_files,
    make_trajectory,
    read_chunk,
    read_progress,
    run_cache,
    run_utils,
    straight_line,
    tree,
    write_config,
    write_frame,
    write_poses,
)

# A trajectory of 20 frames, 0.25 m apart: with 2 m chunks that overlap by 0.5 m, three of them with 9 + 9 + 8 rows.
FRAMES, CHUNKS, ROWS = 20, 3, 26


class Robot(NamedTuple):
    """A dataset of one cache, in the folders that a user would have."""

    data: Path
    cache: Path
    config: Path

    def add(self, *names: str, **what: Any) -> None:
        """Good trajectories; the digit at the end of a name is its stamp."""
        for name in names:
            make_trajectory(self.data / name, FRAMES, stamp=int(name[-1]), **what)

    def add_broken(self, name: str) -> None:
        """One whose third pose is not a number; mend makes it good."""
        make_trajectory(self.data / name, FRAMES, stamp=int(name[-1]))
        position = straight_line(FRAMES)
        position[2, 1] = np.nan
        write_poses(self.data / name, position, np.zeros(FRAMES))

    def mend(self, name: str) -> None:
        write_poses(self.data / name, straight_line(FRAMES), np.zeros(FRAMES))

    def configure(self, **settings: Any) -> None:
        write_config(self.config, self.data, **settings)

    def check(self, *names: str) -> None:
        """These and no others are completed, with all their chunks and every row from its own frame."""
        progress = read_progress(self.cache)
        assert sorted(progress["completed_trajectories"]) == sorted(names)
        assert sorted(progress["trajectory_checksums"]) == sorted(names)
        for name in names:
            assert check_stamps(self.cache, name, int(name[-1])) == ROWS
        assert len(chunk_files(self.cache)) == progress["total_chunks"] == CHUNKS * len(names)
        assert list((self.cache / ".staging").iterdir()) == []


@pytest.fixture
def robot(tmp_path: Path) -> Robot:
    robot = Robot(tmp_path / "data", tmp_path / "data" / "dino_cache_small", tmp_path / "robot.yaml")
    robot.configure()
    return robot


@pytest.fixture
def before_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], Any]], None]:
    """Have something done before each batch is encoded: it gets the number of batches that were, from 0."""
    encode = StampEncoder.encode

    def install(action: Callable[[int], Any]) -> None:
        def act_and_encode(self: StampEncoder, pixels: Any) -> Any:
            action(len(self.batch_sizes))
            return encode(self, pixels)

        monkeypatch.setattr(StampEncoder, "encode", act_and_encode)

    return install


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The run's clock stands at `clock.now` [s]; file times and pauses elsewhere are as ever."""
    clock = SimpleNamespace(now=1000.0)
    here = SimpleNamespace(**{**vars(time), "monotonic": lambda: clock.now})
    monkeypatch.setattr(dino_cache, "time", here)
    return clock


def frames_encoded(encoders: list[StampEncoder]) -> int:
    """By the latest encoder."""
    return sum(encoders[-1].batch_sizes)


def unreadable(monkeypatch: pytest.MonkeyPatch, is_lost: Callable[[str], bool], number: int = errno.EIO) -> None:
    """Opening a file whose path is_lost gives an I/O error, as on a mount that went away."""
    opened = os.open

    def fail(path: Any, *arguments: Any, **keywords: Any) -> int:
        if is_lost(str(path)):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", fail)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming
# ---------------------------------------------------------------------------------------------------------------------


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
    assert "h5py" in modules
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
# Failures
# ---------------------------------------------------------------------------------------------------------------------


def attempts(robot: Robot) -> dict[str, int]:
    return {name: failure["attempts"] for name, failure in read_progress(robot.cache)["failures"].items()}


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
    assert run_here(robot.config, "--limit", "2").code == 5
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


# ---------------------------------------------------------------------------------------------------------------------
# Changed configuration and rebuilds
# ---------------------------------------------------------------------------------------------------------------------


def begun(robot: Robot, run_here: Callable[..., Any]) -> None:
    """t0 is completed, t1 is to do."""
    robot.add("t0", "t1")
    assert run_here(robot.config, "--limit", "1").code == 5


@pytest.mark.parametrize(
    ("key", "old", "new"),
    [
        ("max_chunk_distance_m", 2.0, 3.0),
        ("overlap_distance_m", 0.5, 0.0),
        ("min_chunk_distance_m", 0.3, 0.0),
        ("tokens", ["cls"], ["cls", "patch"]),
        ("image_size", [28, 42], [42, 42]),
        ("resize", "crop", "stretch"),
        ("pixel_mean", [0.485, 0.456, 0.406], [0.5, 0.5, 0.5]),
        ("frame_stride", 1, 2),
        ("precision", "fp32", "bf16"),
        ("dino_model_type", "small", "base"),
        ("weights", "random", "pretrained"),
    ],
)
def test_a_changed_configuration_without_a_terminal_is_refused_and_nothing_changes(robot, run_here, key, old, new):
    begun(robot, run_here)
    before = tree(robot.cache)
    write_config(robot.config, robot.data, **{key: new})
    settings = yaml.safe_load(robot.config.read_text())
    settings["datasets"]["robot"]["cache_dir"] = str(robot.cache)  # the default's name follows the model
    robot.config.write_text(yaml.safe_dump(settings))
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert re.search(rf"\b{key}: {re.escape(str(old))}.* -> .*{re.escape(str(new))}", outcome.err)
    for way in ("--yes", "--force-rebuild", f"progress_utils.py reset --cache-dir {robot.cache}"):
        assert way in outcome.err
    assert tree(robot.cache) == before


@pytest.mark.parametrize("setting", [{"batch_size": 3}, {"decode_workers": 1}, {"progress_interval_s": 5.0}])
def test_settings_that_change_nothing_computed_are_no_changed_configuration(robot, run_here, setting):
    begun(robot, run_here)
    robot.configure(**setting)
    assert run_here(robot.config).code == 0
    robot.check("t0", "t1")


def check_mixed(robot: Robot) -> None:
    """t0 as it was, in 2 m chunks; t1 in 3 m chunks: 0-3, 2.5-4.75 m; every chunk says which."""
    expected = {"t0": [(0, 9), (6, 15), (12, 20)], "t1": [(0, 13), (10, 20)]}
    for name, spans in expected.items():
        attributes = [read_chunk(path)[0] for path in chunk_files(robot.cache / name)]
        assert [(item["start"], item["stop"]) for item in attributes] == spans
        assert {yaml.safe_load(item["spec"])["max_chunk_distance_m"] for item in attributes} == {2.0 + (name == "t1")}
    progress = read_progress(robot.cache)
    assert progress["processing_config"]["max_chunk_distance_m"] == 3.0
    fingerprints = {name: entry["fingerprint"] for name, entry in progress["trajectory_records"].items()}
    assert {name: progress["specs"][key]["max_chunk_distance_m"] for name, key in fingerprints.items()} == {
        "t0": 2.0,
        "t1": 3.0,
    }
    assert "mixed" in run_utils("show", "--cache-dir", robot.cache).stdout.lower()


def test_with_yes_what_is_completed_stays_and_the_rest_is_made_anew(robot, run_here, encoders):
    begun(robot, run_here)
    robot.configure(max_chunk_distance_m=3.0)
    assert run_here(robot.config, "--yes").code == 0
    assert frames_encoded(encoders) == FRAMES
    check_mixed(robot)
    encoders.clear()
    assert run_here(robot.config).code == 0  # confirmed once and for all
    assert encoders == []


def test_on_a_terminal_the_question_is_asked_and_the_answer_followed(robot, run_here):
    begun(robot, run_here)
    robot.configure(max_chunk_distance_m=3.0)
    before = tree(robot.cache)
    for answer, code in (("n", 2), ("y", 0)):
        program, *arguments = cache_command(robot.config)
        with pexpect.spawn(program, arguments, timeout=120, encoding="utf-8", dimensions=(50, 200)) as terminal:
            terminal.expect_exact("max_chunk_distance_m: 2.0 -> 3.0")
            terminal.expect_exact("Continue with the changed configuration? [y/N]")
            terminal.sendline(answer)
            terminal.expect(pexpect.EOF)
        assert terminal.exitstatus == code
        if answer == "n":
            assert tree(robot.cache) == before
    assert "frames" in terminal.before  # the progress bar
    check_mixed(robot)


def test_ctrl_c_at_the_question_ends_the_run_and_changes_nothing(robot, run_here):
    begun(robot, run_here)
    robot.configure(max_chunk_distance_m=3.0)
    before = tree(robot.cache)
    program, *arguments = cache_command(robot.config)
    with pexpect.spawn(program, arguments, timeout=30) as terminal:
        terminal.expect_exact("[y/N]")
        terminal.sendintr()
        terminal.expect(pexpect.EOF)
    assert terminal.exitstatus == 130
    assert tree(robot.cache) == before


def test_a_confirmed_change_gives_exhausted_ones_another_try_at_once(robot, run_here):
    robot.add("t0")
    make_trajectory(robot.data / "t1", 3, stamp=1)  # 0.5 m
    robot.configure(max_attempts=1, min_chunk_distance_m=0.6)
    assert run_here(robot.config).code == 1
    robot.configure(max_attempts=1, min_chunk_distance_m=0.5)
    assert run_here(robot.config, "--yes").code == 0
    assert read_progress(robot.cache)["completed_trajectories"] == ["t0", "t1"]


def test_a_record_without_completed_ones_is_never_a_changed_configuration(robot, run_here):
    robot.add_broken("t0")
    assert run_here(robot.config).code == 1
    robot.configure(max_chunk_distance_m=3.0)
    outcome = run_here(robot.config)
    assert outcome.code == 1
    assert "configuration" not in outcome.err
    assert attempts(robot) == {"t0": 1}  # counted afresh


def test_a_rebuild_redoes_everything_and_a_plain_run_finishes_an_interrupted_one(robot, run_here, encoders):
    robot.add("t0", "t1", "t2")
    run_here(robot.config)
    robot.configure(max_chunk_distance_m=1.5)  # no question: nothing is kept
    assert run_here(robot.config, "--force-rebuild", "--limit", "1").code == 5
    assert frames_encoded(encoders) == FRAMES
    assert read_progress(robot.cache)["rebuild_started"] > 0
    assert "rebuild" in run_utils("show", "--cache-dir", robot.cache).stdout.lower()
    assert run_here(robot.config, "--force-rebuild", "--limit", "1").code == 5  # goes on with it too
    assert read_progress(robot.cache)["completed_trajectories"] == ["t0", "t1"]
    assert run_here(robot.config).code == 0
    assert frames_encoded(encoders) == FRAMES
    progress = read_progress(robot.cache)
    assert progress["rebuild_started"] is None
    # 1.5 m chunks, 0.5 m overlap: 0-1.5, 1-2.5, 2-3.5, 3-4.5 m; 0.25 m more is less than min: 3-4.75 m
    spans = [[0, 7], [4, 11], [8, 15], [12, 20]]
    assert [entry["spans"] for entry in progress["trajectory_records"].values()] == [spans] * 3
    assert len(chunk_files(robot.cache)) == 12
    encoders.clear()
    assert run_here(robot.config).code == 0
    assert encoders == []
    assert run_here(robot.config, "--force-rebuild").code == 0  # a finished one starts anew with the flag
    assert frames_encoded(encoders) == 3 * FRAMES


def test_force_rebuild_in_the_file_rebuilds_every_run_and_says_so(robot, run_here, encoders):
    robot.add("t0")
    robot.configure(force_rebuild=True)
    for number in (1, 2):
        outcome = run_here(robot.config)
        assert outcome.code == 0
        assert re.search(r"force_rebuild.*every run", outcome.err)
        assert len(encoders) == number
    robot.check("t0")


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


def test_a_run_tells_how_far_it_is_while_it_works(robot, run_here, before_batch, monkeypatch):
    robot.add("t0", "t1", "t2")
    monkeypatch.setattr(progress_utils, "HEARTBEAT_INTERVAL_S", 0.0)
    monkeypatch.setattr(dino_cache, "SHOW_INTERVAL_S", 0.0)
    told = []
    before_batch(lambda batch: told.append(read_lock_owner(robot.cache).run))
    assert run_here(robot.config).code == 0
    assert told[0] is None  # nothing is encoded yet
    states = told[1:]
    assert [state.frames_left for state in states] == [52, 44, 36, 28, 20, 12, 4]  # of 60, 8 a batch
    names = [state.trajectory for state in states]
    assert names[0] == "t0"
    assert names == sorted(names)
    assert {(state.total, state.chunks) for state in states} <= {(3, 0), (3, 3), (3, 6)}
    assert not list(robot.cache.glob(".lock.owner*"))


# ---------------------------------------------------------------------------------------------------------------------
# Dry run, disk, deadline
# ---------------------------------------------------------------------------------------------------------------------


def profile(out: str) -> tuple[dict[str, tuple[float, int, float]], str]:
    """The table of --profile: stage -> (seconds, threads, percent of the run); and the line below it."""
    table = out[out.index("stage ") :]
    rows = re.findall(r"^([a-z ]+?) +([0-9.]+) +([0-9]+) +([0-9.]+)%$", table, re.MULTILINE)
    stages = {name: (float(seconds), int(threads), float(share)) for name, seconds, threads, share in rows}
    return stages, table.rstrip().splitlines()[-1]


def test_the_profile_names_the_encoder_where_it_is_the_limit(robot):
    robot.add("t0", "t1", "t2")
    robot.configure(image_size=[140, 196])
    done = run_cache(robot.config, "--profile", fake=False)
    assert done.returncode == 0, done.stderr
    stages, verdict = profile(done.stdout)
    assert list(stages) == list(STAGES)
    assert all(threads for _, threads, _ in stages.values())  # every stage was at work
    assert stages["encode"][1] <= available_cores()
    assert all(share <= 100 for _, _, share in stages.values())
    assert verdict.endswith("the limit was: encode")


def test_the_profile_names_decoding_where_it_is_the_limit(robot, run_here, monkeypatch):
    robot.add("t0", "t1", "t2")
    decode = FrameDecoder.__call__

    def slow(self: FrameDecoder, data: Any, name: str) -> Any:
        time.sleep(0.05)
        return decode(self, data, name)

    monkeypatch.setattr(FrameDecoder, "__call__", slow)
    monkeypatch.setattr(dino_cache, "PROFILE", Profile())
    outcome = run_here(robot.config, "--profile")
    assert outcome.code == 0
    stages, verdict = profile(outcome.out)
    assert stages["decode"][0] >= 3 * FRAMES * 0.05
    assert stages["decode"][1] == 2  # decode_workers of this config
    assert verdict.endswith("the limit was: decode")


def forecast(out: str) -> dict[str, int]:
    """The numbers of --dry-run by what they count."""
    return {key: int(number) for key, number in re.findall(r"^ *([a-z ]+): (\d+)", out, re.MULTILINE)}


def test_dry_run_tells_what_a_run_would_do_and_writes_nothing(robot, run_here, encoders, tmp_path):
    robot.add("t0", "t1")
    robot.add_broken("t2")
    before = tree(tmp_path)
    outcome = run_here(robot.config, "--dry-run")
    assert outcome.code == 0
    told = forecast(outcome.out)
    assert (told["trajectories"], told["frames to encode"], told["chunks to write"]) == (3, 2 * FRAMES, 2 * CHUNKS)
    assert "position[2, 1] is nan" in outcome.out
    assert encoders == []
    assert tree(tmp_path) == before
    run_here(robot.config)
    taken = sum(path.stat().st_size for path in chunk_files(robot.cache))
    assert taken <= told["bytes they take"] <= 2 * taken
    before = tree(tmp_path)
    robot.configure(max_attempts=1)
    assert forecast(run_here(robot.config, "--dry-run").out)["frames to encode"] == 0
    robot.configure(max_chunk_distance_m=3.0)
    assert "max_chunk_distance_m: 2.0 -> 3.0" in run_here(robot.config, "--dry-run").out
    robot.configure()
    assert tree(tmp_path) == before


def test_dry_run_tells_what_other_tokens_would_take(robot, run_here):
    robot.add("t0", "t1")
    line = next(line for line in run_here(robot.config, "--dry-run").out.splitlines() if "by tokens: " in line)
    found = re.findall(r"([a-z][a-z +]*) ([\d.]+) (k?B|bytes)( \(chosen\))?", line.partition("by tokens: ")[2])
    assert [(tokens, chosen) for tokens, _, _, chosen in found] == [
        ("cls", " (chosen)"),
        ("patch", ""),
        ("cls + patch", ""),
    ]
    told = [float(number) * (1000 if unit == "kB" else 1) for _, number, unit, _ in found]
    for tokens, size in zip(("cls", "patch", ["cls", "patch"]), told):
        robot.configure(tokens=[tokens] if isinstance(tokens, str) else tokens)
        assert run_here(robot.config, "--force-rebuild").code == 0
        taken = sum(path.stat().st_size for path in chunk_files(robot.cache))
        assert 0.95 * taken <= size <= 1.5 * taken


@pytest.mark.parametrize(
    ("names", "batches", "rate", "left"), [(("t0", "t1", "t2"), 4, "4.0", "15 s"), (("t0",), 1, "2.5", "2 s")]
)
def test_dry_run_measures_the_speed_and_writes_nothing(
    robot, run_here, encoders, clock, before_batch, tmp_path, names, batches, rate, left
):
    """A batch of 8 takes 2 s; measured are batches until 5 s after the first, which fills the pipeline."""
    for name in names:
        make_trajectory(robot.data / name, FRAMES if len(names) > 1 else 5, stamp=int(name[-1]))

    def tick(batch: int) -> None:
        clock.now += 2

    before_batch(tick)
    before = tree(tmp_path)
    outcome = run_here(robot.config, "--dry-run", "--measure")
    assert outcome.code == 0
    assert f"  estimated time: {left} at {rate} frames/s, measured while decoding and encoding on cpu\n" in outcome.out
    assert len(encoders[-1].batch_sizes) == batches
    assert tree(tmp_path) == before
    assert run_here(robot.config).code == 0
    outcome = run_here(robot.config, "--dry-run", "--measure")
    assert "estimated time" not in outcome.out
    assert "Nothing to measure of robot: it has no frames to encode" in outcome.err


@pytest.mark.parametrize("ends", [(4, 4, 8, 8, 12, 12), (4, 4, 8, 8), (4, 4)])
def test_parts_of_a_batch_that_end_together_do_not_deceive_the_measure(ends, clock, monkeypatch):
    """Two cores take 8 frames each, in 4 s: 4 frames/s, however many there are."""

    def cache(*arguments: Any) -> list[Any]:
        for end in ends:
            clock.now = begin + end
            arguments[-1].on_encoded(8)
        return []

    begin = clock.now
    monkeypatch.setattr(dino_cache, "cache_trajectories", cache)
    dataset = SimpleNamespace(
        name="robot", spec=CacheSpec(), shape=STAMP_SHAPE, weights={"digest": ""}, pending=[],
        config=SimpleNamespace(options=RunOptions(batch_size=16)), encoder=None,
    )  # fmt: skip
    assert measure_rate(dataset, lambda: False) == 4.0


def test_measure_without_dry_run_is_refused(robot, run_here, encoders, capsys):
    robot.add("t0")
    with pytest.raises(SystemExit) as refused:
        run_here(robot.config, "--measure")
    assert refused.value.code == 2
    assert "--dry-run" in capsys.readouterr().err
    assert encoders == []


def set_free_space(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    usage = functools.partial(SimpleNamespace, total=10**12, used=0, free=count)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage())


def test_a_disk_that_cannot_hold_the_cache_is_refused_before_any_work(robot, run_here, encoders, monkeypatch):
    robot.add("t0", "t1")
    needed = forecast(run_here(robot.config, "--dry-run").out)["bytes they take"]
    set_free_space(monkeypatch, needed - 1)
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert str(robot.cache) in outcome.err
    assert encoders == []
    assert set(tree(robot.cache)) <= {".lock"}
    set_free_space(monkeypatch, needed)
    assert run_here(robot.config).code == 0
    # a rebuild replaces what it writes, so hardly any free space is needed; only the estimate is above the files
    taken = sum(path.stat().st_size for path in chunk_files(robot.cache))
    set_free_space(monkeypatch, needed - taken)
    assert run_here(robot.config, "--force-rebuild").code == 0
    set_free_space(monkeypatch, needed - taken - 1)
    assert run_here(robot.config, "--force-rebuild").code == 2


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


@pytest.mark.parametrize(
    ("tick_s", "expected"),
    [  # 32 frames in 4 batches; the last two parts need more than the first seconds
        (0.25, ["0.0h elapsed"] * 4),
        (4.0, [f"0.0h elapsed, 0.0h remaining, {rate} frames/s" for rate in (2, 2, 2, 2)]),
        (3600.0, [f"{hours}.0h elapsed, {4 - hours}.0h remaining, 0 frames/s" for hours in (1, 2, 3, 4)]),
    ],
)
def test_the_periodic_line(robot, run_here, clock, before_batch, tick_s, expected):
    for stamp in (0, 1):
        make_trajectory(robot.data / f"t{stamp}", 16, stamp=stamp)
    robot.configure(progress_interval_s=tick_s)

    def tick(batch: int) -> None:
        clock.now += tick_s

    before_batch(tick)
    outcome = run_here(robot.config)
    lines = [line for line in outcome.out.splitlines() if line.startswith("Progress: ")]
    assert [line.split(" chunks, ")[1] for line in lines] == expected
    counts = [re.fullmatch(r"Progress: (\d)/2 trajectories \((\d+\.\d)%\), (\d+) chunks, .*", line) for line in lines]
    for match in counts:
        done = int(match[1])
        assert (float(match[2]), int(match[3])) == (50.0 * done, 2 * done)  # 3.75 m: 0-2, 1.5-3.75 m, 0.25 m too few


def test_the_periodic_line_comes_no_more_often_than_the_interval(robot, run_here, clock, before_batch):
    make_trajectory(robot.data / "t0", 80, stamp=0)  # 10 batches
    robot.configure(progress_interval_s=30)

    def tick(batch: int) -> None:
        clock.now += 10

    before_batch(tick)
    assert len(re.findall(r"^Progress: ", run_here(robot.config).out, re.MULTILINE)) == 3  # at 30, 60 and 90 s


# ---------------------------------------------------------------------------------------------------------------------
# Faults that are not a trajectory's
# ---------------------------------------------------------------------------------------------------------------------


def gone(data: Path) -> None:
    """The data folder is not there any more."""


def unmounted(data: Path) -> None:
    """An empty mount point stays."""
    data.mkdir()


@pytest.mark.parametrize("leave", [gone, unmounted])
def test_a_data_folder_lost_in_mid_run_stops_it_and_blames_no_trajectory(
    tmp_path, run_here, before_batch, leave, encoders
):
    data, cache = tmp_path / "data", tmp_path / "cache"
    names = [f"t{number:02}" for number in range(60)]
    for number, name in enumerate(names):
        make_trajectory(data / name, 8, stamp=number)
    config = write_config(tmp_path / "c.yaml", data)
    settings = yaml.safe_load(config.read_text())
    settings["datasets"]["robot"]["cache_dir"] = str(cache)
    config.write_text(yaml.safe_dump(settings))

    def lose(batch: int) -> None:
        if batch == 3 and len(encoders) == 1:
            data.rename(tmp_path / "elsewhere")
            leave(data)

    before_batch(lose)
    outcome = run_here(config)
    assert outcome.code == 3
    assert "mount" in outcome.err
    progress = read_progress(cache)
    assert progress["failures"] == {}
    done = len(progress["completed_trajectories"])
    assert done >= 3
    shutil.rmtree(data, ignore_errors=True)
    (tmp_path / "elsewhere").rename(data)
    assert run_here(config).code == 0
    assert frames_encoded(encoders) == 8 * (60 - done)
    assert sorted(read_progress(cache)["completed_trajectories"]) == names


@pytest.mark.parametrize(("count", "code"), [(19, 1), (20, 3), (25, 3)])
@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENXIO])
def test_twenty_unreadable_ones_in_a_row_are_a_lost_mount(robot, run_here, monkeypatch, count, code, number):
    for trajectory in range(count):
        make_trajectory(robot.data / f"t{trajectory:02}", 3)
    with monkeypatch.context() as patch:
        unreadable(patch, lambda path: path.endswith("1.png"), number)
        outcome = run_here(robot.config)
    assert outcome.code == code
    assert read_progress(robot.cache)["failures"] == {}
    assert "t00" in outcome.err
    assert os.strerror(number) in outcome.err
    assert run_here(robot.config).code == 0


def test_unreadable_ones_are_blamed_once_another_succeeds(robot, run_here, monkeypatch):
    robot.add("a1", "b2", "c3")
    with monkeypatch.context() as patch:
        unreadable(patch, lambda path: path.endswith("b2/1.png"))
        assert run_here(robot.config).code == 1
    robot.check("a1", "c3")
    assert "Input/output error" in read_progress(robot.cache)["failures"]["b2"]["reason"]
    assert attempts(robot) == {"b2": 1}


def test_permission_errors_are_ordinary_failures(robot, run_here, monkeypatch):
    for number in range(25):
        make_trajectory(robot.data / f"t{number:02}", 3)
    unreadable(monkeypatch, lambda path: path.endswith("1.png"), errno.EACCES)
    assert run_here(robot.config).code == 1
    assert len(read_progress(robot.cache)["failures"]) == 25


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


# ---------------------------------------------------------------------------------------------------------------------
# Two datasets
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Robot]:
    """Datasets `lab` and `yard` of one config file."""
    config = write_config(tmp_path / "pair.yaml", tmp_path / "lab", dataset="lab")
    settings = yaml.safe_load(config.read_text())
    settings["datasets"]["yard"] = {"data_folder": str(tmp_path / "yard")}
    config.write_text(yaml.safe_dump(settings))
    return {name: Robot(tmp_path / name, tmp_path / name / "dino_cache_small", config) for name in ("lab", "yard")}


@pytest.mark.parametrize(
    ("broken", "arguments", "code"),
    [
        ([], [], 0),
        (["lab"], [], 1),
        (["yard"], [], 1),
        (["lab"], ["--limit", "1"], 5),
        (["yard"], ["--dataset", "lab"], 0),
        (["yard"], ["--dataset", "yard"], 1),
    ],
)
def test_the_worst_outcome_of_two_datasets_is_the_exit_code(pair, run_here, encoders, broken, arguments, code):
    for name, robot in pair.items():
        robot.add("t0", "t1")
        if name in broken:
            robot.add_broken("t2")
    outcome = run_here(pair["lab"].config, *arguments)
    assert outcome.code == code
    if not arguments:
        for robot in pair.values():
            robot.check("t0", "t1")
        assert len(encoders) == 1  # one model for both
    if arguments[:1] == ["--dataset"]:
        (other,) = pair.keys() - {arguments[1]}
        assert not pair[other].cache.exists()


def test_work_left_in_one_dataset_is_worse_than_a_failure_in_the_other(pair, run_here):
    pair["lab"].add_broken("t0")
    pair["yard"].add("t0", "t1")
    assert run_here(pair["lab"].config, "--limit", "1").code == 5
    assert attempts(pair["lab"]) == {"t0": 1}


def test_a_lost_mount_of_one_dataset_is_the_worst_and_the_other_is_done(pair, run_here, monkeypatch):
    for number in range(20):
        make_trajectory(pair["lab"].data / f"t{number:02}", 3)
    pair["yard"].add("t0")
    pair["yard"].add_broken("t1")
    unreadable(monkeypatch, lambda path: "/lab/" in path and path.endswith(".png"))
    assert run_here(pair["lab"].config).code == 3
    assert read_progress(pair["lab"].cache)["failures"] == {}
    pair["yard"].check("t0")


def corrupt_record(robot: Robot) -> None:
    robot.add("t0")
    robot.cache.mkdir()
    (robot.cache / "progress.json").write_text("{}")


def no_data(robot: Robot) -> None:
    """No data folder at all."""


def no_trajectories(robot: Robot) -> None:
    robot.data.mkdir()


@pytest.mark.parametrize("spoil", [corrupt_record, no_data, no_trajectories])
def test_one_refusal_starts_nothing(pair, run_here, encoders, spoil):
    pair["lab"].add("t0")
    spoil(pair["yard"])
    outcome = run_here(pair["lab"].config)
    assert outcome.code == 2
    assert str(pair["yard"].data) in outcome.err
    assert encoders == []
    assert not pair["lab"].cache.exists() or set(tree(pair["lab"].cache)) <= {".lock"}


def test_a_rebuild_of_two_datasets_stopped_in_the_first_is_finished_by_a_plain_run(pair, run_here, encoders):
    for robot in pair.values():
        robot.add("t0", "t1")
    config = pair["lab"].config
    assert run_here(config).code == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StampEncoder, "encode", failing_encode)
        assert run_here(config, "--force-rebuild").code == 3
    assert [read_progress(robot.cache)["completed_trajectories"] for robot in pair.values()] == [[], []]
    encoders.clear()
    assert run_here(config).code == 0
    assert frames_encoded(encoders) == 4 * FRAMES
    assert [read_progress(robot.cache)["rebuild_started"] for robot in pair.values()] == [None, None]


def failing_encode(self: StampEncoder, pixels: Any) -> None:
    raise RuntimeError("CUDA error: unspecified launch failure")


def test_one_held_cache_starts_nothing(pair, run_here, encoders):
    for robot in pair.values():
        robot.add("t0")
    pair["yard"].cache.mkdir()
    with cache_lock(pair["yard"].cache):
        assert run_here(pair["lab"].config).code == 4
    assert encoders == []
    assert set(tree(pair["lab"].cache)) <= {".lock"}
    assert progress_utils.main(["show", "--cache-dir", str(pair["lab"].cache)]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# Looking at many files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait_s", [0, 0.0005], ids=["a quick disk", "a slow one"])
@pytest.mark.parametrize("count", [0, 1, 64, 65, 300])
def test_map_files_gives_every_result_in_order(count, wait_s):
    threads = set()

    def square(number: int) -> int:
        threads.add(threading.get_ident())
        if wait_s:
            time.sleep(wait_s)
        return number * number

    assert list(dino_cache.map_files(square, list(range(count)))) == [number * number for number in range(count)]
    if wait_s and count > 64:  # the other way round, a busy machine may make any function look slow
        assert len(threads) > 1


def test_map_files_raises_in_the_place_of_the_result():
    def fail_at_200(number: int) -> int:
        time.sleep(0.0005)
        return 1 // (200 - number)

    results = dino_cache.map_files(fail_at_200, list(range(300)))
    with pytest.raises(ZeroDivisionError):
        list(results)
