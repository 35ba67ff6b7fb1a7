"""Poses at the times of frames, from poses at times of their own."""

from __future__ import annotations

import numpy as np

from dino_cache import InputError, Poses

SAME_TIME_S = 1e-6  # two times that are no further apart are the same, computed in two ways


def poses_at(name: str, numbers: np.ndarray, times: np.ndarray, table: Poses, max_gap_s: float) -> Poses:
    """Poses of frames: position on the line between the two poses around a frame, yaw over the shorter arc.

    A frame before the first pose, after the last one, or between two that are more than `max_gap_s` apart has none: it
    is left out and counted. Such a gap cuts the trajectory.

    Args:
        name: the trajectory, for messages.
        numbers: (n,) int64 by which the frames are read, ascending.
        times: (n,) float64 [s] of the frames, rising.
        table: m poses with `position`, `yaw` and, rising, `times` [s] on the same clock.
        max_gap_s: the longest time between two poses over which is interpolated [s].

    Raises:
        InputError: no frame has a pose before it and one after it.
    """
    at = table.times
    gaps = np.flatnonzero(np.diff(at) > max_gap_s)  # each between this pose and the next
    has_pose = are_between(times, at)
    for gap in gaps:
        has_pose &= (times <= at[gap] + SAME_TIME_S) | (times >= at[gap + 1] - SAME_TIME_S)
    if not has_pose.any():
        raise InputError(
            f"{name}: no frame lies between two poses at most max_pose_gap_s {max_gap_s:g} apart: frames are at "
            f"{times[0]:.3f} to {times[-1]:.3f} s, poses at {at[0]:.3f} to {at[-1]:.3f} s"
        )
    kept = times[has_pose]
    yaw = None if table.yaw is None else turned_between(kept, at, table.yaw)
    position = np.stack([np.interp(kept, at, table.position[:, axis]) for axis in (0, 1)], axis=1)
    breaks = np.unique(np.searchsorted(kept, at[gaps] + SAME_TIME_S, side="right"))
    return Poses(
        frame_index=numbers[has_pose],
        position=position,
        yaw=yaw,
        times=kept,
        table=table,
        num_without=int((~has_pose).sum()),
        breaks=breaks[(breaks > 0) & (breaks < len(kept))].astype(np.int64),
    )


def are_between(times: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(n,) whether frames at these times lie between the first and the last of poses at `at`, both in seconds."""
    return (times >= at[0] - SAME_TIME_S) & (times <= at[-1] + SAME_TIME_S)


def turned_between(times: np.ndarray, at: np.ndarray, yaw: np.ndarray) -> np.ndarray:
    """(n,) [rad], from -pi to pi: yaw at `times`, between those at `at`, over the shorter arc."""
    between = np.interp(times, at, np.unwrap(yaw))
    return np.arctan2(np.sin(between), np.cos(between))
