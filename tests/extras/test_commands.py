"""What all commands of the wing share."""

import pytest

from support import ODD_NAMES, make_trajectory, read_progress, run_utils


@pytest.mark.parametrize("command", ["verify", "rebuild", "export", "report"])
def test_the_help_ends_in_an_example(command):
    shown = run_utils(command, "--help")
    assert shown.returncode == 0
    assert "Example: python progress_utils.py " in " ".join(shown.stdout.splitlines()[-2:])


def test_odd_names_are_names_like_any_other(robot, run_here):
    for stamp, odd in enumerate(ODD_NAMES):
        make_trajectory(robot.data / odd, 5, stamp=stamp)
    assert run_here(robot.config).code == 0
    assert run_utils("verify", "--cache-dir", robot.cache).stdout.endswith("\nSound\n")
    assert run_utils("rebuild", "--yes", "--cache-dir", robot.cache).returncode == 0
    assert sorted(read_progress(robot.cache)["completed_trajectories"]) == sorted(ODD_NAMES)


def test_a_folder_deep_down_that_is_called_staging_is_not_overlooked(robot, run_here):
    make_trajectory(robot.data / "good", 5)
    make_trajectory(robot.data / "deep" / ".staging" / "t", 5)
    run_here(robot.config)
    before = read_progress(robot.cache)
    assert sorted(before["completed_trajectories"]) == ["deep/.staging/t", "good"]
    assert run_utils("rebuild", "--yes", "--cache-dir", robot.cache).returncode == 0
    after = read_progress(robot.cache)
    assert sorted(after["completed_trajectories"]) == sorted(before["completed_trajectories"])
