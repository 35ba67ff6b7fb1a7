"""Labels of windows for navigation: waypoints ahead, and goals by steps, of the same trajectory or of another one.

All count kept frames from a window's last frame, its present; x points forward and y left there. They reach beyond the
window and beyond its chunk, over the chunks of its piece: those that share frames, up to the trajectory's end or to a
place where it was cut (a pose jump, a gap). docs/training.md says where the rules are from.
"""

from __future__ import annotations

import collections
import json
import math
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dino_cache import bytes_digest
from dino_cache_extras.cache_index import ChunkTable
from dino_cache_extras.chunk_files import ChunkHeader, is_cut_by_frames
from progress_utils import RefusedError

if TYPE_CHECKING:
    import torch


VINT_GOAL_STEPS = (0, 20)  # of the goals that ViNT is trained on
MAX_POSE_BYTES = 1 << 26  # of poses that a process keeps: those of some 2.8 million frames
MEASURED_CHUNKS = 256  # of a cache, whose steps are measured


def draw(count: int, *of: object) -> int:
    """A number from 0 to `count` - 1, all as likely, that depends on `of` alone."""
    digest = bytes_digest(" ".join(map(str, of)).encode()).digest()
    return int.from_bytes(digest) * count >> 8 * len(digest)


class LabelRules(NamedTuple):
    """The labels that are asked for, as in the arguments of CacheWindows."""

    waypoints: int
    waypoint_step: int
    normalise: bool | float | tuple[float, ...]
    goal_steps: tuple[int, int] | None
    negatives: float

    @property
    def is_asked(self) -> bool:
        return self.waypoints > 0 or self.goal_steps is not None

    def check(self, goal: tuple[float, float] | None, num_caches: int) -> None:
        """Raise RefusedError where they make no sense."""
        if self.waypoints < 0:
            raise RefusedError(f"waypoints: {self.waypoints} must be at least 0")
        if self.waypoint_step < 1:
            raise RefusedError(f"waypoint_step: {self.waypoint_step} must be at least 1")
        steps = self.goal_steps
        if steps is not None and not (all(isinstance(it, Integral) for it in steps) and steps[0] <= steps[1]):
            raise RefusedError(f"goal_steps: {steps} must be whole numbers (low, high) with low <= high [kept frames]")
        if self.goal_steps is not None and goal is not None:
            raise RefusedError("goal, goal_steps: a goal is drawn by metres or by steps; give one of them")
        if not 0 <= self.negatives <= 1:
            raise RefusedError(f"negatives: {self.negatives} must be a share, from 0 to 1")
        if self.negatives > 0 and self.goal_steps is None:
            raise RefusedError(
                "negatives: they are goals by steps; give goal_steps in place of goal, the high one is their distance"
            )
        if self.normalise is not False and not self.is_asked:
            raise RefusedError("normalise: there is nothing to divide; give waypoints or goal_steps too")
        self._check_lengths(num_caches)

    def _check_lengths(self, num_caches: int) -> None:
        if isinstance(self.normalise, bool):
            return
        lengths = self.normalise if isinstance(self.normalise, tuple) else (self.normalise,)
        if isinstance(self.normalise, tuple) and len(lengths) != num_caches:
            raise RefusedError(f"normalise: {len(lengths)} lengths for {num_caches} caches; give one for each, or one")
        for length in lengths:
            if not 0 < length < math.inf:
                raise RefusedError(f"normalise: {length} must be True, or the length of a step, above 0 [m]")


class Pieces:
    """Of each chunk of a table: which chunks its trajectory's piece has, and from which frame to which it goes. Chunks
    of a piece share frames; where the next one shares none, the trajectory may have been cut."""

    def __init__(self, table: ChunkTable):
        begins = np.ones(len(table), bool)
        begins[1:] = (np.diff(table.trajectory) != 0) | (table.start[1:] >= table.stop[:-1])
        first = np.flatnonzero(begins)
        last = np.append(first[1:], len(table)) - 1
        piece = np.cumsum(begins) - 1
        self._stops = table.stop
        self._first, self._last = first[piece], last[piece]
        self.start, self.stop = table.start[self._first], table.stop[self._last]  # of the piece
        self.fresh = table.start.copy()  # a chunk's first frame that no chunk before it has
        self.fresh[1:][~begins[1:]] = table.stop[:-1][~begins[1:]]

    def holder(self, number: int, frame: int) -> int:
        """The first chunk that has a frame of chunk `number`'s piece."""
        first = int(self._first[number])
        return first + int(np.searchsorted(self._stops[first : self._last[number] + 1], frame, side="right"))


class PoseMemory:
    """Poses of chunks, (L, 3) float64 x, y [m] and yaw [rad], each read once as long as they are few enough to keep."""

    def __init__(self, poses_of: Callable[[int], dict[str, np.ndarray]]):
        self._poses_of = poses_of
        self._kept: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self._num_bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return PoseMemory, (self._poses_of,)

    def __call__(self, number: int) -> np.ndarray:
        """Of a chunk, by its number."""
        poses = self._kept.get(number)
        if poses is not None:
            self._kept.move_to_end(number)
            return poses
        read = self._poses_of(number)
        poses = np.column_stack([read["position"], read["yaw"]])
        self._kept[number] = poses
        self._num_bytes += poses.nbytes
        while self._num_bytes > MAX_POSE_BYTES and len(self._kept) > 1:
            self._num_bytes -= self._kept.popitem(last=False)[1].nbytes
        return poses


class Goals(NamedTuple):
    """Where the goals of a batch are: (B,) int64 each."""

    number: np.ndarray  # of the chunk
    row: np.ndarray  # in it


class Labels:
    """Fills in a batch's labels; see CacheWindows.

    Args:
        poses_of: chunk number -> its poses, dataset name -> (L, ...); raises what CacheWindows raises.
        jump_m: (n,) of each chunk, as from `jump_lengths`.
        with_poses: whether all chunks have position and yaw.
    """

    def __init__(
        self,
        table: ChunkTable,
        poses_of: Callable[[int], dict[str, np.ndarray]],
        rules: LabelRules,
        jump_m: np.ndarray,
        *,
        with_poses: bool,
        seed: int,
    ):
        self._table, self._rules, self._seed, self._with_poses = table, rules, seed, with_poses
        self._pieces, self._poses, self._jump_m = Pieces(table), PoseMemory(poses_of), jump_m
        self._seen = np.concatenate([[0], np.cumsum(table.stop - self._pieces.fresh)])  # frames before, each once
        if rules.negatives > 0:
            self._refuse_single_trajectories()
        self.step_length_m: np.ndarray | None = None  # (number of caches,)
        if rules.normalise is not False:
            self.step_length_m = self._step_lengths(int(table.cache[-1]) + 1)

    def fields(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Key, shape and type of each label of a sample."""
        keys: list[tuple[str, tuple[int, ...], str]] = []
        if self._rules.waypoints:
            keys += [("waypoints", (self._rules.waypoints, 4), "float32")]
            keys += [("waypoint_mask", (self._rules.waypoints,), "bool")]
        if self._rules.goal_steps is not None:
            keys += [("goal_distance", (), "int64"), ("is_negative", (), "bool")]
            keys += [("goal_pose", (4,), "float32")] if self._with_poses else []
        if self.step_length_m is not None:
            keys += [("label_unit_m", (), "float32")]
        return keys

    def fill(
        self, batch: dict[str, torch.Tensor], numbers: np.ndarray, rows: np.ndarray, indices: Sequence[int], epoch: int
    ) -> Goals | None:
        """Write the labels of windows whose last frames are `rows` of the chunks `numbers`; returns where their goals
        are, with goal_steps."""
        present = self._table.start[numbers] + rows  # kept frames of their trajectories
        if self.step_length_m is not None:
            units = self._rules.waypoint_step * self.step_length_m[self._table.cache[numbers]]
            batch["label_unit_m"].numpy()[:] = units
        else:
            units = np.ones(len(numbers))
        if self._rules.waypoints:
            local, is_there = self._waypoints(numbers, present)
            local[..., :2] /= units[:, None, None]
            batch["waypoints"].numpy()[:] = local
            batch["waypoint_mask"].numpy()[:] = is_there
        if self._rules.goal_steps is None:
            return None
        return self._fill_goals(batch, numbers, present, indices, epoch, units)

    def _waypoints(self, numbers: np.ndarray, present: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, n, 4) x, y [m], cosine and sine of the turn, and (B, n) whether there was a frame. Where there was none,
        the last waypoint before is repeated; the present where that was the first."""
        count, step = self._rules.waypoints, self._rules.waypoint_step
        ahead = np.minimum(count * step, self._pieces.stop[numbers] - 1 - present)
        poses = np.empty((len(numbers), count * step + 1, 3))  # every frame from the present on
        for place, (number, frame, more) in enumerate(zip(numbers.tolist(), present.tolist(), ahead.tolist())):
            found = self._poses_from(number, frame, more + 1)
            poses[place, : more + 1], poses[place, more + 1 :] = found, found[-1]
        jumps = _steps(poses) > self._jump_m[numbers, None]
        ahead = np.where(jumps.any(axis=1), np.minimum(ahead, jumps.argmax(axis=1)), ahead)
        places = step * np.arange(1, count + 1)
        last = ahead // step * step
        chosen = np.take_along_axis(poses, np.minimum(places, last[:, None])[..., None], axis=1)  # (B, n, 3)
        local = in_axes_of(poses[:, :1], chosen)
        return local, (places <= last[:, None]) & np.isfinite(local).all(axis=2)

    def _poses_from(self, number: int, frame: int, count: int) -> np.ndarray:
        """(count, 3) of the kept frames from `frame` on, all in chunk `number`'s piece."""
        poses, row = self._poses(number), frame - int(self._table.start[number])
        if row >= 0 and row + count <= len(poses):
            return poses[row : row + count]
        parts: list[np.ndarray] = []
        end = frame + count
        while frame < end:
            holder = self._pieces.holder(number, frame)
            begin = int(self._table.start[holder])
            parts.append(self._poses(holder)[frame - begin : end - begin])
            frame += len(parts[-1])
        return np.concatenate(parts)

    def _fill_goals(
        self,
        batch: dict[str, torch.Tensor],
        numbers: np.ndarray,
        present: np.ndarray,
        indices: Sequence[int],
        epoch: int,
        units: np.ndarray,
    ) -> Goals:
        size = len(numbers)
        found, rows = np.empty(size, np.int64), np.empty(size, np.int64)
        distance, is_valid, is_negative = np.empty(size, np.int64), np.ones(size, bool), np.zeros(size, bool)
        for place, (number, frame, index) in enumerate(zip(numbers.tolist(), present.tolist(), indices)):
            key = (self._seed, epoch, int(index))
            if self._rules.negatives and draw(1 << 53, *key, "negative") < self._rules.negatives * (1 << 53):
                is_negative[place], distance[place] = True, self._rules.goal_steps[1]
                holder, goal = self._another(number, key)
            else:
                goal, is_valid[place] = self._choose(number, frame, key)
                distance[place] = goal - frame
                own = self._table.start[number] <= goal < self._table.stop[number]
                holder = number if own else self._pieces.holder(number, goal)
            found[place], rows[place] = holder, goal - self._table.start[holder]
        for name, values in (("distance", distance), ("valid", is_valid)):
            batch[f"goal_{name}"].numpy()[:] = values
        batch["is_negative"].numpy()[:] = is_negative
        if self._with_poses:
            pairs = zip(numbers.tolist(), present.tolist(), found.tolist(), rows.tolist())
            poses = np.array(
                [
                    (self._poses_from(number, frame, 1)[0], self._poses(holder)[row])
                    for number, frame, holder, row in pairs
                ]
            )
            local = in_axes_of(poses[:, :1], poses[:, 1:])[:, 0]  # (B, 4)
            local[:, :2] /= units[:, None]
            local[is_negative] = math.nan  # where it lies from here, nobody knows
            batch["goal_pose"].numpy()[:] = local
        return Goals(found, rows)

    def _choose(self, number: int, frame: int, key: tuple[int, ...]) -> tuple[int, bool]:
        """A frame of the piece as many steps away as asked for, and whether there is one; else the nearest to that."""
        low, high = self._rules.goal_steps
        first, last = self._without_jumps(number, frame, min(low, 0), max(high, 0))
        least, most = max(first, frame + low), min(last, frame + high)
        if least > most:
            return (last if low > 0 else first), False
        return least + draw(most - least + 1, *key, "goal"), True

    def _without_jumps(self, number: int, frame: int, back: int, ahead: int) -> tuple[int, int]:
        """The first and the last frame of the piece, at most so many steps from `frame`, with no pose jump between."""
        first = max(frame + back, int(self._pieces.start[number]))
        last = min(frame + ahead, int(self._pieces.stop[number]) - 1)
        if self._with_poses and np.isfinite(self._jump_m[number]):  # else a jump ends the piece
            jumps = np.flatnonzero(_steps(self._poses_from(number, first, last - first + 1)) > self._jump_m[number])
            after = int(np.searchsorted(jumps, frame - first))
            last = first + int(jumps[after]) if after < len(jumps) else last
            first = first + int(jumps[after - 1]) + 1 if after else first
        return first, last

    def _another(self, number: int, key: tuple[int, ...]) -> tuple[int, int]:
        """A frame of another trajectory of the cache, all as likely: its chunk, and which one it is."""
        begin, end = self._frames_with(self._table.cache, number)
        own_begin, own_end = self._frames_with(self._table.trajectory, number)
        place = begin + draw(end - begin - (own_end - own_begin), *key, "negative frame")
        place += own_end - own_begin if place >= own_begin else 0
        holder = int(np.searchsorted(self._seen, place, side="right")) - 1
        return holder, int(self._pieces.fresh[holder]) + place - int(self._seen[holder])

    def _frames_with(self, group: np.ndarray, number: int) -> tuple[int, int]:
        """Of all frames, each once, those of chunk `number`'s group (ascending numbers): half-open."""
        chunks = np.searchsorted(group, [group[number], group[number] + 1])
        begin, end = self._seen[chunks].tolist()
        return begin, end

    def _refuse_single_trajectories(self) -> None:
        table = self._table
        for number in np.unique(table.cache, return_index=True)[1].tolist():
            if self._frames_with(table.cache, number) == self._frames_with(table.trajectory, number):
                raise RefusedError(
                    f"{table[number].cache_dir}: negatives: are frames of other trajectories of the cache, and it has "
                    "one; read it without"
                )

    def _step_lengths(self, num_caches: int) -> np.ndarray:
        """(num_caches,) [m]: those given, or measured."""
        asked = self._rules.normalise
        if not isinstance(asked, bool):
            return np.broadcast_to(np.asarray(asked, np.float64), num_caches)
        return np.array([self._mean_step(cache) for cache in range(num_caches)])

    def _mean_step(self, cache: int) -> float:
        """The mean length of a cache's steps from kept frame to kept frame [m], each once, without pose jumps; of
        MEASURED_CHUNKS chunks, spread evenly, where there are more."""
        numbers = np.flatnonzero(self._table.cache == cache)
        chosen = numbers[np.linspace(0, len(numbers) - 1, min(len(numbers), MEASURED_CHUNKS)).astype(np.int64)]
        total, count = 0.0, 0
        for number in chosen.tolist():
            row = max(0, int(self._pieces.fresh[number] - self._table.start[number]) - 1)
            steps = _steps(self._poses(number)[row:])
            steps = steps[steps <= self._jump_m[number]]  # nor NaN
            total, count = total + float(steps.sum()), count + len(steps)
        if total == 0:
            raise RefusedError(
                f"{self._table[int(numbers[0])].cache_dir}: normalise: its frames do not move, so their steps have no "
                "length; give it, as normalise=0.25 [m]"
            )
        return total / count


def _steps(poses: np.ndarray) -> np.ndarray:
    """(..., T - 1) lengths [m] of the steps between poses (..., T, 3)."""
    return np.linalg.norm(np.diff(poses[..., :2], axis=-2), axis=-1)


def in_axes_of(present: np.ndarray, poses: np.ndarray) -> np.ndarray:
    """Poses as one of them sees them: x forward, y left, and the turn.

    Args:
        present: (..., 1, 3) x, y [m] and yaw [rad].
        poses: (..., n, 3).

    Returns:
        (..., n, 4) x, y [m], cosine and sine of the turn from `present`.
    """
    dx, dy, turn = np.moveaxis(poses - present, -1, 0)
    cos, sin = np.cos(present[..., 2]), np.sin(present[..., 2])
    return np.stack([dx * cos + dy * sin, dy * cos - dx * sin, np.cos(turn), np.sin(turn)], axis=-1)


def jump_lengths(headers: list[ChunkHeader], configuration: np.ndarray) -> np.ndarray:
    """Of each chunk, the length of a step inside it that is a pose jump [m]: chunks that were cut by distance have
    none, since it ends them.

    Args:
        headers: of a chunk of each configuration.
        configuration: (n,) number of each chunk's.
    """
    specs = [json.loads(header.attributes["spec"]) for header in headers]
    jumps = [spec["max_chunk_distance_m"] if is_cut_by_frames(spec) else math.inf for spec in specs]
    return np.array(jumps)[configuration]


def refuse_without_poses(cache_dirs: list[Path], headers: list[ChunkHeader], what: str) -> None:
    """Refuse a cache that lacks position or yaw.

    Args:
        cache_dirs: of each header.
        what: needs them.
    """
    for cache_dir, header in zip(cache_dirs, headers):
        missing = [name for name in ("position", "yaw") if name not in header.datasets]
        if missing:
            raise RefusedError(
                f"{cache_dir}: {what}: poses are needed, and this cache has no {' and no '.join(missing)}; read it "
                f"without, or make one from data that have {'them' if len(missing) > 1 else 'it'}"
            )
