"""LeRobot: poses out of an episode's rows: parts of vectors, 4 x 4 matrices, velocities that are integrated, times."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dino_cache import (
    AXES,
    DataKeys,
    InputError,
    InvalidDataError,
    Note,
    Poses,
    check_values,
    checked_numbers,
    checked_poses,
    ground_plane,
    refuse_other_unit,
    yaw_in_radians,
)

MATRIX_TOLERANCE = 1e-3  # float32 and half-rounded matrices stay within it
MIN_LEVEL = 1e-3  # of a forward axis' length, in the ground plane; less points nowhere there
MOST_PARTS = 16  # numbers of a vector that one key may take
MOST_DEPTH = 8  # of nested names
PART_OF = re.compile(r"(.+?)(?:\[(\d{1,18})(?::(\d{1,18}))?\]|\{([^{}]+)\})", re.DOTALL)
VELOCITY_WORDS = {"vel", "vels", "velocity", "velocities", "speed", "rate", "twist", "vx", "vy", "vz", "wz", "vtheta"}
PLACE_WORDS = {"pos", "position", "positions", "odom", "pose"}
SETTINGS = {"position": "position_key", "yaw": "yaw_key"}


class PoseKey(NamedTuple):
    """A feature, or some numbers of it, as a setting names it."""

    key: str  # as it was set
    feature: str  # of info.json; a column of the parquet files
    columns: tuple[int, ...] | None = None  # of its numbers those that are meant; None: all
    width: int | None = None  # numbers that a row must have, where info.json names them
    names: tuple[str, ...] = ()  # of those that are meant, where info.json names them


def pose_key(setting: str, key: str, features: dict[str, dict[str, Any]], where: str) -> PoseKey:
    """What a key names: a feature, `feature[2]`, `feature[0:2]`, `feature{x.pos,y.pos}`.

    Raises:
        InputError: there is no such feature, number or name; the message lists those that there are.
    """
    if key in features:
        names = axis_names(features[key])
        return PoseKey(key, key, names=tuple(names or ()))
    match = PART_OF.fullmatch(key)
    if match is None or match[1] not in features:
        raise InputError(f"{setting}: {key}: {where} has the keys {', '.join(features)}")
    feature, start, stop, wanted = match.groups()
    names, width = axis_names(features[feature]), declared_width(features[feature])
    if names is not None and width is not None and len(names) != width:
        if wanted is not None:
            raise InputError(f"{setting}: {key}: {where} has {len(names)} names for the {width} numbers of {feature}")
        names = None
    if wanted is not None:
        return _named_part(setting, key, feature, [name.strip() for name in wanted.split(",")], names, where)
    first = int(start)
    end = first + 1 if stop is None else int(stop)
    if end <= first or end - first > MOST_PARTS or (width is not None and end > width):
        has = f"{feature} has {width} numbers" if width is not None else f"{feature} is a vector"
        raise InputError(f"{setting}: {key}: {has}; a part of it is [i], or [i:j] with i < j, of {MOST_PARTS} at most")
    named = tuple(names[first:end]) if names is not None and width is not None else ()
    return PoseKey(key, feature, tuple(range(first, end)), width, named)


def _named_part(
    setting: str, key: str, feature: str, wanted: list[str], names: list[str] | None, where: str
) -> PoseKey:
    if names is None:
        raise InputError(f"{setting}: {key}: {where} names no parts of {feature}; take them by number: {feature}[0:2]")
    for name in wanted:
        if names.count(name) != 1:
            has = "twice the name" if name in names else "no"
            raise InputError(f"{setting}: {key}: {feature} has {has} {name}; its names are {', '.join(names)[:500]}")
    if len(wanted) > MOST_PARTS:
        raise InputError(f"{setting}: {key}: {len(wanted)} numbers are too many for a pose")
    return PoseKey(key, feature, tuple(map(names.index, wanted)), len(names), tuple(wanted))


def axis_names(feature: dict[str, Any]) -> list[str] | None:
    """What info.json calls the numbers of a vector, through lists and mappings of lists; None where it does not."""
    found: list[str] = []
    return found if _add_names(feature.get("names"), found, MOST_DEPTH) and found else None


def _add_names(value: Any, found: list[str], depth: int) -> bool:
    if isinstance(value, str):
        found.append(value)
        return True
    inner = list(value.values()) if isinstance(value, dict) else value
    return isinstance(inner, list) and depth > 0 and all(_add_names(one, found, depth - 1) for one in inner)


def declared_width(feature: dict[str, Any]) -> int | None:
    """How many numbers a row of a vector has; None where the feature is no vector."""
    shape = feature.get("shape")
    is_vector = isinstance(shape, list) and len(shape) == 1 and type(shape[0]) is int
    return shape[0] if is_vector else None


def is_declared_matrix(key: PoseKey, feature: dict[str, Any]) -> bool:
    """Whether info.json says that it has 16 numbers a row, as a 4 x 4 matrix has."""
    if key.columns is not None:
        return len(key.columns) == 16
    return feature.get("shape") in ([16], [4, 4])


def refuse_other_kind(setting: str, key: PoseKey, *, integrate: bool) -> None:
    """Raise InputError where the names tell of velocities and a pose is wanted, or the other way round."""
    names = key.names or (key.feature,)
    names = names[:2] if setting == "position_key" and key.columns is None else names
    words = [set(re.split(r"[^0-9a-z]+", name.lower())) for name in names]
    if integrate and any(name_words & PLACE_WORDS and not name_words & VELOCITY_WORDS for name_words in words):
        raise InputError(
            f"{setting}: {key.key}: {', '.join(names)} is a pose by its name, and integrate: true takes velocities; "
            "take integrate out"
        )
    if not integrate and words and all(name_words & VELOCITY_WORDS for name_words in words):
        raise InputError(
            f"{setting}: {key.key}: {', '.join(names)} is a velocity by its name, and no pose. Where there is none, "
            "integrate: true adds velocities up from (0, 0, 0); such poses drift"
        )


def refuse_half_velocities(where: str, position: PoseKey | None, yaw: PoseKey | None) -> None:
    """Raise InputError unless there is what integrate: true adds up."""
    if position is None or yaw is None:
        key = "position_key" if position is None else "yaw_key"
        raise InputError(f"{where}: integrate: true needs velocities, and there is no {key}; set it")


def part_of(where: str, key: PoseKey, values: list[Any]) -> list[Any]:
    """Of each row the numbers that a key names. Raises InvalidDataError where a row does not have them."""
    if key.columns is None:
        return values
    last, rows = max(key.columns), []
    for number, value in enumerate(values):
        row = value if isinstance(value, list) else [value]
        if len(row) <= last or (key.width is not None and len(row) != key.width):
            expected = f"{key.width}, as info.json says" if key.width is not None else f"more than {last}"
            raise InvalidDataError(
                f"{where}: {key.key}: row {number} of {key.feature} has {len(row)} numbers, expected {expected}"
            )
        rows.append([row[column] for column in key.columns])
    return rows


def read_poses(
    where: str,
    position: PoseKey | None,
    yaw: PoseKey | None,
    values_of: Callable[[str], list[Any]],
    settings: DataKeys,
    times: np.ndarray,
) -> Poses:
    """The poses of an episode's T rows.

    Args:
        where: the episode and its file, for messages.
        values_of: name of a feature -> its T values.
        times: (T,) [s], rising.

    Raises:
        InputError: values are not there, break a rule, or are of another kind than the settings say.
    """
    for setting, key in (("position_scale", position), ("yaw_unit", yaw)):
        for name in key.names if key is not None and key.columns is not None else ():
            refuse_other_unit(where, name, setting, settings)
    columns = {key: part_of(where, key, values_of(key.feature)) for key in {position, yaw} - {None}}
    if settings.integrate:
        refuse_half_velocities(where, position, yaw)
        return _integrated(where, position, yaw, columns, settings, times)
    rotations = None
    if position is not None and has_16_numbers(columns[position]):
        poses_4x4 = pose_matrices(where, position.key, columns[position])
        columns[position] = poses_4x4[:, :3, 3].tolist()
        rotations = poses_4x4[:, :3, :3] if position == yaw else None
    elif yaw is not None and has_16_numbers(columns[yaw]):
        rotations = pose_matrices(where, yaw.key, columns[yaw])[:, :3, :3]
    if rotations is None and position is not None and position == yaw:
        raise InvalidDataError(f"{where}: position_key and yaw_key are both {yaw.key}, which holds no 4 x 4 matrices")
    by_key = {key.key: values for key, values in columns.items()}
    yaw_key = yaw.key if yaw is not None and rotations is None else None
    poses = checked_poses(where, by_key, settings, position.key if position is not None else None, yaw_key)
    return poses if rotations is None else poses._replace(yaw=yaw_of_rotations(where, yaw.key, rotations, settings))


def has_16_numbers(rows: list[Any]) -> bool:
    """Whether rows are as long as a 4 x 4 matrix, flat or nested."""
    first = rows[0] if rows else None
    if not isinstance(first, list):
        return False
    return len(first) == 16 or (len(first) == 4 and all(isinstance(row, list) and len(row) == 4 for row in first))


def pose_matrices(where: str, key: str, rows: list[Any]) -> np.ndarray:
    """(T, 4, 4) float64 of T rows of 16 numbers, row by row of the matrix.

    Raises:
        InvalidDataError: they are not all poses: [R t; 0 0 0 1] with a rotation R.
    """
    matrices = _as_numbers(where, key, rows).reshape(len(rows), 4, 4)
    fault = _fault_of(matrices)
    if fault is None:
        return matrices
    row, what = fault
    hint = ""
    if _fault_of(matrices.transpose(0, 2, 1)) is None:
        hint = ". They lie column by column; store them row by row"
    elif rows and not isinstance(rows[0][0], list):
        hint = f". Where they are no matrices and the first two are x and y, set position_key: {key}[0:2]"
    raise InvalidDataError(f"{where}: {key} has 16 numbers, as a 4 x 4 pose matrix, and of row {row} {what}{hint}")


def are_pose_matrices(rows: list[Any]) -> bool:
    """Whether these rows are taken for 4 x 4 poses, and are all sound."""
    if not has_16_numbers(rows):
        return False
    try:
        return _fault_of(_as_numbers("", "", rows).reshape(len(rows), 4, 4)) is None
    except InvalidDataError:
        return False


def _as_numbers(where: str, key: str, rows: list[Any]) -> np.ndarray:
    """(T, n) float64."""
    try:
        values = np.asarray(rows)
    except (ValueError, OverflowError) as error:  # rows of unequal length
        raise InvalidDataError(f"{where}: {key}: {error}") from error
    if values.dtype.kind not in "iuf" or not values.size:
        raise InvalidDataError(f"{where}: {key} holds {values.dtype} values, expected rows of numbers")
    return values.astype(np.float64).reshape(len(rows), -1)


def _fault_of(matrices: np.ndarray) -> tuple[int, str] | None:
    """The first row that is no pose, and what is wrong with it; None where there is none."""
    last, turned = matrices[:, 3], matrices[:, :3, :3]
    with np.errstate(all="ignore"):
        is_last = (np.abs(last - (0, 0, 0, 1)) <= MATRIX_TOLERANCE).all(axis=1)
        is_square = np.abs(turned.transpose(0, 2, 1) @ turned - np.eye(3)) <= MATRIX_TOLERANCE * 2
        is_turned = is_square.all(axis=(1, 2))
        is_right_handed = np.linalg.det(np.where(is_turned[:, None, None], turned, np.eye(3))) > 0
    bad = np.flatnonzero(~(is_last & is_turned & is_right_handed))
    if not len(bad):
        return None
    row = int(bad[0])
    if not is_last[row]:
        return row, f"the last row is {' '.join(f'{value:g}' for value in last[row])}, expected 0 0 0 1"
    return row, "the rotation is mirrored" if is_turned[
        row
    ] else "the rotation's columns are not at right angles, of length 1"


def yaw_of_rotations(where: str, key: str, rotations: np.ndarray, settings: DataKeys) -> np.ndarray:
    """(T,) [rad]: where the forward axis of the body points in the ground plane, as `pose_axes` has both.

    Raises:
        InvalidDataError: it points up or down.
    """
    axes = AXES[settings.pose_axes]
    sine = rotations[:, 1, 0] if axes.forward == 0 else rotations[:, 0, 2]
    cosine = rotations[:, 0, 0] if axes.forward == 0 else rotations[:, 2, 2]
    upright = np.flatnonzero(np.hypot(sine, cosine) < MIN_LEVEL)
    if len(upright):
        raise InvalidDataError(
            f"{where}: {key}: in row {int(upright[0])} the {'x' if axes.forward == 0 else 'z'} axis of the body is "
            f"vertical, and tells no yaw; pose_axes is {settings.pose_axes}"
        )
    return axes.yaw_sign * np.arctan2(sine, cosine)


def _integrated(
    where: str,
    position: PoseKey,
    yaw: PoseKey,
    columns: dict[PoseKey, list[Any]],
    settings: DataKeys,
    times: np.ndarray,
) -> Poses:
    """Poses from (0, 0, 0) on, out of the body's velocities."""
    axes = AXES[settings.pose_axes]
    if axes.forward != 0:
        raise InputError(f"{where}: integrate: true takes velocities ahead and aside; pose_axes must be z_up or ned")
    ahead = _as_numbers(where, position.key, columns[position])
    if ahead.shape[1] not in (1, 2):
        raise InvalidDataError(
            f"{where}: {position.key} has {ahead.shape[1]} numbers; integrate: true takes one (ahead) or two (ahead, "
            f"aside): {position.feature}[0:2]"
        )
    check_values(where, position.key, ahead, math.inf)
    aside = ahead[:, 1] * axes.signs[1] if ahead.shape[1] == 2 else np.zeros(len(ahead))
    rates = checked_numbers(where, {yaw.key: columns[yaw]}, yaw.key, len(ahead))
    rates = yaw_in_radians(rates, settings) - yaw_in_radians(np.zeros(1), settings)
    path, heading = integrate(times, np.stack([ahead[:, 0], aside], axis=1), rates)
    position_m, _ = ground_plane(where, position.key, path, "z_up")
    detail = f"{len(times)} rows over {times[-1] - times[0]:.3g} s"
    note = Note("trajectories have poses integrated from velocities (integrate: true), which drift", detail)
    return Poses(np.arange(len(times), dtype=np.int64), position_m, heading, notes=(note,))


def integrate(times: np.ndarray, velocities: np.ndarray, rates: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(T, 2) and (T,): where a body is that starts at (0, 0) with yaw 0. Between two rows it moves with the mean of
    their velocities along the heading of the middle (midpoint rule; an arc's error falls with the square of the step).

    Args:
        times: (T,) [s], rising.
        velocities: (T, 2) ahead and to the left, in the body's axes.
        rates: (T,) [rad/s], to the left.
    """
    steps = np.diff(times)
    turns = steps * (rates[1:] + rates[:-1]) / 2
    yaw = np.concatenate([[0.0], np.cumsum(turns)])
    middle = yaw[:-1] + turns / 2
    ahead, aside = (steps[:, None] * (velocities[1:] + velocities[:-1]) / 2).T
    moves = [ahead * np.cos(middle) - aside * np.sin(middle), ahead * np.sin(middle) + aside * np.cos(middle)]
    return np.concatenate([np.zeros((1, 2)), np.cumsum(np.stack(moves, axis=1), axis=0)]), yaw


def frame_times(stamps: list[Any] | None, count: int, fps: float) -> np.ndarray:
    """(count,) [s]: the timestamps where they are numbers and rise, else frame number / rate. Timestamps that are those
    quotients but for float32's rounding are given exactly."""
    exact = np.arange(count) / fps
    try:
        times = np.array(stamps, np.float64).reshape(-1)
    except (TypeError, ValueError, OverflowError):
        return exact
    if len(times) != count or not np.isfinite(times).all() or (np.diff(times) <= 0).any():
        return exact
    with np.errstate(over="ignore"):
        is_rounded = np.abs(times - exact) <= np.spacing(np.abs(times).astype(np.float32))
    return exact if is_rounded.all() else times
