"""Clocks of a bag, and poses out of its messages: of one topic, or by walking through transforms."""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dino_cache import MAX_POSITION_M, DataKeys, InputError, InvalidDataError, Poses, check_values, ground_plane
from dino_cache_extras.formats.bag_messages import Pose
from dino_cache_extras.formats.bags import Place
from dino_cache_extras.formats.pose_files import QUATERNION, yaw_of_quaternions

LEAST_STEP_BACK_S = 1.0  # of one topic's clock; messages of a topic come less out of order than that
LEAST_STEP_AHEAD_S = 10.0  # of stamps against the log's times, for good; messages may be seconds late
LEAST_RUN = 8  # messages that rise between steps back, on average; where there are fewer, they are in no order at all
QUATERNION_NORMS = (0.5, 2.0)  # of those that are taken for turns, rounded as they may be


class Times:
    """When messages of one kind were stamped and recorded [ns], and where they lie, in the files' order."""

    def __init__(self) -> None:
        self._values = array("q")

    def add(self, stamp: int, log: int, place: Place = (0, 0, 0)) -> None:
        self._values.extend((stamp, log, *place))

    @property
    def rows(self) -> np.ndarray:
        """(n, 5) int64: stamp, log time, place."""
        return np.array(self._values, np.int64).reshape(-1, 5)

    def __len__(self) -> int:
        return len(self._values) // 5

    @property
    def unstamped(self) -> bool:
        """Whether no message has a stamp."""
        return not self.rows[:, 0].any()

    def of(self, clock: str) -> np.ndarray:
        """(n,) int64 [ns] of the clock `header` or `log`."""
        return self.rows[:, 0 if clock == "header" else 1]


def check_clock(where: str, times: Times, clock: str) -> None:
    """See that a clock went on as clocks do, by the order in which messages were recorded.

    Raises:
        InvalidDataError: a message has no stamp, or the clock stepped back or ahead, so that sorting by it would mix
            what belongs to different times.
    """
    values, logs = times.of(clock), times.of("log")
    if clock == "header" and (unstamped := np.flatnonzero(values == 0)).size:
        raise InvalidDataError(
            f"{where}: {len(unstamped)} of {len(values)} messages have the stamp 0, the first is message "
            f"{unstamped[0]}; stamps: log takes the times at which they were recorded"
        )
    back = np.flatnonzero(np.diff(values) < -LEAST_STEP_BACK_S * 1e9) + 1
    if len(values) < LEAST_RUN * len(back):
        return
    runs = np.split(values, back)
    spans = np.array(sorted((run.min(), run.max()) for run in runs))
    if (spans[1:, 0] <= np.maximum.accumulate(spans[:, 1])[:-1]).any():
        raise InvalidDataError(
            f"{where}: its clock steps back by {(values[back[0] - 1] - values[back[0]]) / 1e9:.3f} s at message "
            f"{back[0]}, and what came before and after lies over each other" + _other_clock(clock)
        )
    offset = values - logs
    if clock == "header" and len(offset) > 1:
        ahead = np.minimum.accumulate(offset[::-1])[::-1][1:] - np.maximum.accumulate(offset)[:-1]
        if (most := ahead.max()) > LEAST_STEP_AHEAD_S * 1e9:
            raise InvalidDataError(
                f"{where}: its clock jumps ahead by {most / 1e9:.3f} s at message {ahead.argmax() + 1}, against the "
                "times at which messages were recorded" + _other_clock(clock)
            )


def _other_clock(clock: str) -> str:
    return "; stamps: log takes the times at which they were recorded" if clock == "header" else ""


def rising_order(where: str, values: np.ndarray) -> np.ndarray:
    """(n,) rows by time. Raises InvalidDataError where two have one time."""
    order = np.argsort(values, kind="stable")
    if (same := np.flatnonzero(np.diff(values[order]) == 0)).size:
        first, second = sorted(order[same[0] : same[0] + 2].tolist())
        raise InvalidDataError(
            f"{where}: messages {first} and {second} have the same time, {values[first]} ns; {len(same)} do"
        )
    return order


class PoseRows:
    """Poses of one topic, or one transform, as they come."""

    def __init__(self) -> None:
        self.times, self._values = Times(), array("d")
        self.frames: dict[tuple[str, str], int] = {}

    def add(self, pose: Pose, stamp: int, log: int) -> None:
        self.times.add(stamp, log)
        self._values.extend(pose.values)
        self.frames.setdefault(pose.frames, len(self.times) - 1)

    @property
    def values(self) -> np.ndarray:
        """(n, 7): x, y, z, and the quaternion's x, y, z, w."""
        return np.array(self._values).reshape(-1, 7)

    def sorted(self, where: str, clock: str) -> tuple[np.ndarray, np.ndarray]:
        """(n,) int64 [ns] rising, and (n, 7), checked; what says the same twice is there once.

        Raises:
            InvalidDataError: its clock is not one, two poses have one time, or a value is not finite or no turn.
        """
        check_clock(where, self.times, clock)
        at, values = self.times.of(clock), self.values
        order = np.argsort(at, kind="stable")
        at, values = at[order], values[order]
        again = np.concatenate([[False], (np.diff(at) == 0) & (values[1:] == values[:-1]).all(axis=1)])
        at, values = at[~again], values[~again]
        rising_order(where, at)
        check_turns(where, values)
        return at, values


def check_turns(where: str, values: np.ndarray) -> None:
    """Raise InvalidDataError where poses (n, 7) are not finite, or their quaternions are no turns."""
    check_values(where, "pose", values, MAX_POSITION_M)
    norms = np.linalg.norm(values[:, 3:], axis=1)
    shortest, longest = QUATERNION_NORMS
    if (odd := np.flatnonzero((norms < shortest) | (norms > longest))).size:
        raise InvalidDataError(f"{where}: pose {odd[0]} has a quaternion of length {norms[odd[0]]:.3g}; expected 1")


def pose_table(where: str, at_ns: np.ndarray, zero_ns: int, values: np.ndarray, keys: DataKeys) -> Poses:
    """Poses in the ground plane, by times [s] from `zero_ns` on. Raises InvalidDataError."""
    position, height = ground_plane(where, "position", values[:, :3], keys.pose_axes)
    yaw = yaw_of_quaternions(dict(zip(QUATERNION, values[:, 3:].T)), keys)
    return Poses(np.arange(len(at_ns)), position, yaw, height, (at_ns - zero_ns) / 1e9)


def one_pair_of_frames(where: str, rows: PoseRows) -> None:
    """Raise InvalidDataError where poses of a topic are of several frames of reference: they do not go together."""
    if len(rows.frames) > 1:
        (first, _), (second, number), *_ = rows.frames.items()
        raise InvalidDataError(
            f"{where}: its poses are of several frames: {_arrow(first)}, and {_arrow(second)} from message {number} on"
        )


def _arrow(frames: tuple[str, str]) -> str:
    return " -> ".join(frame or "(none)" for frame in frames)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------


class Edge(NamedTuple):
    """A transform between two frames, on a way through them."""

    frames: tuple[str, str]  # in which, which
    forward: bool  # from the first to the second


class Transforms:
    """All transforms of a bag."""

    def __init__(self) -> None:
        self.moving: dict[tuple[str, str], PoseRows] = {}
        self.fixed: dict[tuple[str, str], PoseRows] = {}

    def add(self, pose: Pose, stamp: int, log: int, *, is_static: bool) -> None:
        table = self.fixed if is_static else self.moving
        table.setdefault(pose.frames, PoseRows()).add(pose, stamp, log)

    def unstamped(self, way: Iterable[Edge]) -> bool:
        """Whether none of the moving transforms of a way has a stamp."""
        moving = [self.moving[edge.frames] for edge in way if edge.frames in self.moving]
        return bool(moving) and all(rows.times.unstamped for rows in moving)

    def way(self, where: str, parent: str, child: str) -> list[Edge]:
        """The transforms that lead from `parent` to `child`.

        Raises:
            InputError: there is no way, or a frame on it lies in two others.
        """
        up_from_child, up_from_parent = self._upward(where, child), self._upward(where, parent)
        above_child = [child, *(outer for outer, _ in up_from_child)]
        above_parent = [parent, *(outer for outer, _ in up_from_parent)]
        common = next((frame for frame in above_child if frame in above_parent), None)
        if common is None:
            known = sorted({frame for frames in (*self.moving, *self.fixed) for frame in frames})
            raise InputError(
                f"{where}: tf: {parent}->{child}: no transforms lead from one to the other; its frames are "
                f"{', '.join(known)[:500] or '(none)'}"
            )
        down = [Edge(frames, True) for frames in up_from_child[: above_child.index(common)]]
        up = [Edge(frames, False) for frames in up_from_parent[: above_parent.index(common)]]
        return up + down[::-1]

    def _upward(self, where: str, frame: str) -> list[tuple[str, str]]:
        """(outer, inner) of the transforms from a frame up to its root."""
        found: list[tuple[str, str]] = []
        while True:
            outer = sorted({frames for frames in (*self.moving, *self.fixed) if frames[1] == frame})
            if not outer:
                return found
            if len(outer) > 1 or (outer[0] in self.moving and outer[0] in self.fixed):
                ways = " and ".join(_arrow(frames) for frames in outer) if len(outer) > 1 else "both /tf and /tf_static"
                raise InvalidDataError(f"{where}: the frame {frame} is told in two ways: {ways}")
            if outer[0] in found:
                raise InvalidDataError(f"{where}: its transforms go in a circle through {frame}")
            found.append(outer[0])
            frame = outer[0][0]

    def along(self, where: str, way: list[Edge], clock: str, max_gap_s: float) -> tuple[np.ndarray, np.ndarray]:
        """(n,) int64 [ns] and (n, 7) poses along a way, at all times of the moving transforms at which each of them is
        known: between two of its times that are at most `max_gap_s` apart.

        Raises:
            InvalidDataError: none of them moves, there is no such time, or as `PoseRows.sorted`.
        """
        moving = {
            edge.frames: self.moving[edge.frames].sorted(f"{where}: {_arrow(edge.frames)}", clock)
            for edge in way
            if edge.frames in self.moving
        }
        if not moving:
            raise InvalidDataError(f"{where}: none of the transforms on the way moves: all are in /tf_static")
        at = np.unique(np.concatenate([times for times, _ in moving.values()]))
        for times, _ in moving.values():
            after = np.searchsorted(times, at).clip(0, len(times) - 1)
            is_one = times[after] == at
            before = (after - 1).clip(0)
            near = (times[before] < at) & (at < times[after]) & (times[after] - times[before] <= max_gap_s * 1e9)
            at = at[is_one | near]
        if not len(at):
            raise InvalidDataError(f"{where}: at no time are all of the transforms on the way known")
        pose = np.tile([0.0, 0, 0, 0, 0, 0, 1], (len(at), 1))
        for edge in way:
            if edge.frames in moving:
                step = _between(at, *moving[edge.frames])
            else:
                step = np.tile(self._fixed(where, edge.frames), (len(at), 1))
            pose = _composed(pose, step if edge.forward else _inverse(step))
        return at, pose

    def _fixed(self, where: str, frames: tuple[str, str]) -> np.ndarray:
        values = self.fixed[frames].values
        check_turns(f"{where}: {_arrow(frames)}", values)
        if (values != values[0]).any():
            raise InvalidDataError(f"{where}: the static transform {_arrow(frames)} has several values")
        return np.concatenate([values[0, :3], values[0, 3:] / np.linalg.norm(values[0, 3:])])


def _between(at: np.ndarray, times: np.ndarray, values: np.ndarray) -> np.ndarray:
    """(n, 7) at `at`, all of it inside `times`: positions on a line, turns over the shorter arc at an even rate."""
    after = np.searchsorted(times, at).clip(1, max(1, len(times) - 1)) if len(times) > 1 else np.zeros(len(at), int)
    before = (after - 1).clip(0)
    span = np.maximum(times[after] - times[before], 1)
    share = ((at - times[before]) / span)[:, None]
    turns = values[:, 3:] / np.linalg.norm(values[:, 3:], axis=1, keepdims=True)
    first, second = turns[before], turns[after]
    cosine = (first * second).sum(1, keepdims=True)
    second, angle = np.where(cosine < 0, -second, second), np.arccos(np.clip(np.abs(cosine), 0, 1))
    sine = np.sin(angle)
    is_small = sine < 1e-9
    safe = np.where(is_small, 1.0, sine)
    turn = np.where(
        is_small,
        first + (second - first) * share,
        (np.sin((1 - share) * angle) * first + np.sin(share * angle) * second) / safe,
    )
    place = values[before, :3] + (values[after, :3] - values[before, :3]) * share
    return np.concatenate([place, turn / np.linalg.norm(turn, axis=1, keepdims=True)], axis=1)


def _rotated(turn: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(n, 3): points, turned by (n, 4) quaternions."""
    axis, w = turn[:, :3], turn[:, 3:]
    across = 2 * np.cross(axis, points)
    return points + w * across + np.cross(axis, across)


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(n, 4) quaternions: first b, then a."""
    axis_a, w_a, axis_b, w_b = a[:, :3], a[:, 3:], b[:, :3], b[:, 3:]
    axis = w_a * axis_b + w_b * axis_a + np.cross(axis_a, axis_b)
    return np.concatenate([axis, w_a * w_b - (axis_a * axis_b).sum(1, keepdims=True)], axis=1)


def _composed(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    """(n, 7): what lies at `inner` in what lies at `outer`."""
    place = outer[:, :3] + _rotated(outer[:, 3:], inner[:, :3])
    return np.concatenate([place, _product(outer[:, 3:], inner[:, 3:])], axis=1)


def _inverse(pose: np.ndarray) -> np.ndarray:
    back = pose[:, 3:] * [-1, -1, -1, 1]
    return np.concatenate([-_rotated(back, pose[:, :3]), back], axis=1)
