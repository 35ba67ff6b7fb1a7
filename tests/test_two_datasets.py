"""Two datasets of one config file: the worst outcome is the exit code, and one refusal starts neither."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

import progress_utils
from progress_utils import cache_lock
from support import (
    FRAMES,
    Robot,
    StampEncoder,
    attempts,
    frames_encoded,
    make_trajectory,
    read_progress,
    tree,
    unreadable,
    write_config,
)


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
        ([], ["--limit", "1"], 5),
        (["lab"], ["--limit", "1"], 5),  # the broken one is left
        (["lab"], ["--limit", "3"], 1),
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


def test_a_failure_in_one_dataset_is_worse_than_work_left_in_the_other(pair, run_here):
    pair["lab"].add_broken("t0")
    pair["yard"].add("t0", "t1")
    assert run_here(pair["lab"].config, "--limit", "1").code == 1
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


def test_a_stop_counts_the_work_of_the_datasets_that_come_after(pair, run_here, before_batch):
    pair["lab"].add("t0", "t1")
    pair["yard"].add("t0", "t1", "t2")
    before_batch(lambda count: os.kill(os.getpid(), signal.SIGTERM) if count == 0 else None)
    stopped = run_here(pair["lab"].config)
    assert stopped.code == 143
    done = len(read_progress(pair["lab"].cache)["completed_trajectories"])
    assert f"Stopped by a signal, {5 - done} trajectories are left" in stopped.err
    assert not (pair["yard"].cache / "progress.json").exists()
