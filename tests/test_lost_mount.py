"""Data that cannot be read any more stop the run as a lost mount, and no trajectory is blamed for it."""

import errno
import os
import shutil
from pathlib import Path

import pytest
import yaml

from support import (
    attempts,
    frames_encoded,
    make_trajectory,
    read_progress,
    unreadable,
    write_config,
)


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
