"""What a dataset's poses add up to, and what looks as if it were in another unit or along other axes than is set."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dino_cache import CacheSpec, Poses, human_list, kept_rows, travelled_distance

LONGEST_STEP_M = 5.0  # at the median; a robot filmed so rarely is seldom meant
HIGHEST_SPEED_M_S = 60.0
MIN_MOVING_STEPS = 5  # fewer steps tell nothing of a direction
GOOD_FIT, BAD_FIT = 0.9, 0.6  # of yaw to the direction of the path, see _agreement
MIN_TURN_RAD = 1.0  # of the path; on a straight one, every reading of yaw fits
TURN_RAD = 2 * math.pi * 1.01  # yaw that is not unwrapped goes no farther, in radians


class PoseFacts(NamedTuple):
    """What a trajectory's poses add up to. Numbers are NaN where the data have nothing for them."""

    metres: float
    num_steps: int
    median_step_m: float
    num_jumps: int
    least_yaw: float
    most_yaw: float
    num_frames: int
    seconds: float
    doubts: tuple[str, ...]  # each may be meant


def look_at(poses: Poses, spec: CacheSpec) -> PoseFacts:
    """Of the kept frames; of the yaws as the data have them."""
    kept = kept_rows("these poses", poses, spec)
    yaw = poses.yaw if poses.table is None else poses.table.yaw
    steps = np.zeros(0)
    if poses.position is not None:
        steps = np.diff(travelled_distance(poses.position[kept] * spec.position_scale))
    return PoseFacts(
        metres=math.nan if poses.position is None else float(steps.sum()),
        num_steps=len(steps),
        median_step_m=float(np.median(steps)) if len(steps) else math.nan,
        num_jumps=int((steps > spec.max_chunk_distance_m).sum()),
        least_yaw=math.nan if yaw is None or not len(yaw) else float(yaw.min()),
        most_yaw=math.nan if yaw is None or not len(yaw) else float(yaw.max()),
        num_frames=len(poses.frame_index[kept]),
        seconds=math.nan if poses.times is None or not len(poses.times) else float(np.ptp(poses.times[kept])),
        doubts=doubts_about(poses, spec),
    )


def describe(facts: dict[str, PoseFacts]) -> tuple[list[str], list[str]]:
    """Of the trajectories of a dataset, by name: their sums in one line, and a line for each doubt."""
    doubtful: dict[str, list[str]] = {}
    for name, of_one in facts.items():
        for doubt in of_one.doubts:
            doubtful.setdefault(doubt, []).append(name)
    lines = [f"Poses of {len(named)} trajectories: {doubt}: {human_list(named)}" for doubt, named in doubtful.items()]
    return [f"Poses to do: {_sums(list(facts.values()))}"], lines


def _sums(motions: list[PoseFacts]) -> str:
    moving = [motion for motion in motions if not math.isnan(motion.metres)]
    timed = [motion for motion in motions if motion.seconds > 0]
    parts = [f"{len(motions)} trajectories", f"{sum(motion.num_frames for motion in motions)} frames"]
    if moving:
        stepping = sorted((motion.median_step_m, motion.num_steps) for motion in moving if motion.num_steps)
        counts = np.cumsum([0, *(count for _, count in stepping)])
        middle = int(np.searchsorted(counts[1:], counts[-1] / 2))
        parts.append(f"{sum(motion.metres for motion in moving):.6g} m")
        parts += [f"median step {stepping[middle][0]:.3g} m"] if stepping else []
        parts.append(f"{sum(motion.num_jumps for motion in moving)} pose jumps")
    yaws = [motion for motion in motions if not math.isnan(motion.least_yaw)]
    if yaws:
        least, most = min(motion.least_yaw for motion in yaws), max(motion.most_yaw for motion in yaws)
        parts.append(f"yaw {least:.4g} to {most:.4g} rad")
    if timed:
        seconds = sum(motion.seconds for motion in timed)
        rate = sum(motion.num_frames - 1 for motion in timed) / seconds
        parts.append(f"{seconds:.6g} s at {rate:.3g} frames/s")
    return ", ".join(parts) if moving or yaws else f"{', '.join(parts)}, no poses"


def doubts_about(poses: Poses, spec: CacheSpec) -> tuple[str, ...]:
    """What looks odd about a trajectory's poses, with the settings that would mend it."""
    seen = poses if poses.table is None else poses.table  # as the data have them
    doubts = [*_doubts_about_yaw(seen, spec)]
    if seen.position is not None:
        doubts += [*_doubts_about_length(seen, spec), *_doubts_about_axes(seen, spec)]
    if poses.table is not None and poses.num_without > len(poses.frame_index):
        doubts.append("poses lie beside less than half of the video's frames, the rest is left out (time_scale)")
    return tuple(doubts)


def _doubts_about_yaw(poses: Poses, spec: CacheSpec) -> list[str]:
    yaw, doubts = poses.yaw, []
    if yaw is None or len(yaw) < 2:
        return []
    if spec.yaw_unit == "radians" and _is_in_degrees(yaw):
        doubts.append("yaw looks like degrees (yaw_unit: degrees or compass_degrees)")
    readings = {
        "as degrees, yaw would point along the path (yaw_unit: degrees)": np.deg2rad(yaw),
        "as degrees from north, yaw would point along the path (yaw_unit: compass_degrees)": -np.deg2rad(yaw),
        "yaw turns against the path (yaw_unit: compass_degrees, or pose_axes)": -yaw,
    }
    if spec.yaw_unit != "radians":
        readings = {"yaw turns against the path (the other one of yaw_unit's degrees, or pose_axes)": -yaw}
    return doubts or [what for what, reading in readings.items() if _fits_better(poses.position, reading, yaw)][:1]


def _is_in_degrees(yaw: np.ndarray) -> bool:
    """Whether yaw is neither wrapped radians, which stay within a turn, nor unwrapped ones, whose steps stay within
    half a turn; or whole numbers far beyond a turn."""
    beyond_a_turn = np.abs(yaw).max() > TURN_RAD
    is_whole = bool((yaw == np.round(yaw)).all())
    return bool(beyond_a_turn and (is_whole or np.abs(np.diff(yaw)).max() > math.pi * 1.01))


def _fits_better(position: np.ndarray | None, reading: np.ndarray, yaw: np.ndarray) -> bool:
    """Whether `reading` turns with the path and `yaw` does not."""
    if position is None:
        return False
    steps = np.diff(position, axis=0)
    lengths = np.linalg.norm(steps, axis=1)
    moves = lengths > 0.5 * np.median(lengths)
    if moves.sum() < MIN_MOVING_STEPS or not lengths.any():
        return False
    course = np.arctan2(steps[:, 1], steps[:, 0])[moves]
    if np.ptp(np.unwrap(course)) < MIN_TURN_RAD:
        return False
    return _agreement(reading[:-1][moves], course) > GOOD_FIT and _agreement(yaw[:-1][moves], course) < BAD_FIT


def _agreement(yaw: np.ndarray, course: np.ndarray) -> float:
    """1 where the angle between them stays the same, near 0 where it takes all values."""
    return float(np.abs(np.exp(1j * (yaw - course)).mean()))


def _doubts_about_length(poses: Poses, spec: CacheSpec) -> list[str]:
    steps = np.linalg.norm(np.diff(poses.position, axis=0), axis=1) * spec.position_scale
    if not len(steps):
        return []
    step_m = float(np.median(steps))
    if poses.times is not None:
        speed = step_m / float(np.median(np.diff(poses.times)))
        return ["faster than 60 m/s, at the median (position_scale, time_scale)"] if speed > HIGHEST_SPEED_M_S else []
    if step_m > LONGEST_STEP_M:
        return ["steps between frames are longer than 5 m, at the median (position_scale: 0.01 where in centimetres)"]
    return []


def _doubts_about_axes(poses: Poses, spec: CacheSpec) -> list[str]:
    if poses.height is None or len(poses.position) < 2 or not np.isfinite(poses.height).all():
        return []
    across, along = sorted(np.ptp(poses.position, axis=0).tolist())
    up = float(np.ptp(poses.height))
    if up * spec.position_scale < spec.min_chunk_distance_m:
        return []
    if up > along or (up > along / 2 and across < up / 10):
        others = " or ".join(name for name in ("camera", "y_up", "z_up") if name != spec.pose_axes)
        return [f"the path is mostly along the coordinate that is taken for height (pose_axes: {others})"]
    return []
