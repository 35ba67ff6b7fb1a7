"""Poses at the times of frames: by hand."""

import math

import numpy as np
import pytest

from dino_cache import InputError, Poses
from dino_cache_extras.formats.pose_times import poses_at


def table(times: list[float], x: list[float], yaw: list[float]) -> Poses:
    position = np.stack([np.array(x), np.zeros(len(x))], axis=1)
    return Poses(np.arange(len(x)), position, np.array(yaw), times=np.array(times))


def test_position_on_a_line_and_yaw_over_the_shorter_arc() -> None:
    poses = poses_at("t", np.array([5, 7]), np.array([0.25, 0.5]), table([0, 1], [0, 2], [3.0, -3.0]), 1.0)
    assert poses.frame_index.tolist() == [5, 7]
    assert poses.position.tolist() == [[0.5, 0.0], [1.0, 0.0]]
    arc = 2 * math.pi - 6.0
    assert poses.yaw == pytest.approx([3 + arc / 4, 3 + arc / 2])
    assert (poses.num_without, poses.breaks.tolist()) == (0, [])


def test_frames_without_poses_are_left_out_and_counted() -> None:
    times = np.arange(8.0)
    poses = poses_at("t", np.arange(8), times, table([1, 2, 5, 6], [0, 1, 4, 5], [0, 0, 0, 0]), 1.0)
    assert poses.frame_index.tolist() == [1, 2, 5, 6]
    assert poses.num_without == 4
    assert poses.breaks.tolist() == [2]  # of the kept ones


def test_a_gap_without_frames_in_it_cuts_too() -> None:
    poses = poses_at("t", np.arange(3), np.array([0.5, 4.5, 5.5]), table([0, 1, 4, 5, 6], [0, 1, 2, 3, 4], [0] * 5), 1)
    assert (poses.frame_index.tolist(), poses.breaks.tolist(), poses.num_without) == ([0, 1, 2], [1], 0)


def test_frames_all_outside_are_refused_with_both_times() -> None:
    with pytest.raises(InputError, match=r"t: no frame .* frames are at 9.000 to 9.000 s, poses at 0.000 to 1.000"):
        poses_at("t", np.array([0]), np.array([9.0]), table([0, 1], [0, 1], [0, 0]), 1.0)
