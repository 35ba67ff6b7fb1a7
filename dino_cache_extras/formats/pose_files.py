"""Poses of videos, in tables beside them; and what other formats share: names of columns, yaw, where tables lie."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino_cache import (
    AXES,
    DEFAULT_KEYS,
    MAX_POSITION_M,
    NAMED_UNITS,
    DataKeys,
    InputError,
    InvalidDataError,
    check_values,
    columns_asked_for,
    ground_plane,
    read_file,
    recordable_name,
    refuse_other_unit,
    unit_of_name,
    yaw_in_radians,
)

MIN_QUATERNION_NORM = 1e-12  # a quaternion shorter than this tells no direction
POSE_COLUMNS = {  # names in a CSV file's first line
    "timestamp": ("timestamp", "time", "t"),
    "x": ("x", "tx"),
    "y": ("y", "ty"),
    "z": ("z", "tz"),
    "yaw": ("yaw", "heading"),
    "qx": ("qx",), "qy": ("qy",), "qz": ("qz",), "qw": ("qw",),
}  # fmt: skip
TUM_NAMES = ("timestamp", "tx", "ty", "tz", "qx", "qy", "qz", "qw")
TUM_COLUMNS = ("timestamp", "x", "y", "z", "qx", "qy", "qz", "qw")
QUATERNION = ("qx", "qy", "qz", "qw")
UNIT_SETTINGS = {"timestamp": "time_scale", "yaw": "yaw_unit"} | dict.fromkeys(("x", "y", "z"), "position_scale")
LIKELY_TIME_SCALES = {"milliseconds": 1e-3, "microseconds": 1e-6, "nanoseconds": 1e-9}
MOST_DISAGREEMENT_RAD = 0.2  # between a yaw column and quaternions, at the median


def table_apart(data_folder: Path, name: str, poses_folder: str, suffixes: Sequence[str]) -> Path | None:
    """The pose table of the trajectory `name` (with `/`) in `poses_folder`: the nearest folder of that name, in the
    trajectory's parent or higher up to `data_folder`. Of a/b/c below that parent it is called a/b/c, b/c or c, with
    one of the suffixes, the first that is there; they may be in capitals."""
    parts = name.split("/")
    for depth in range(len(parts) - 1, -1, -1):
        folder = data_folder.joinpath(*parts[:depth], poses_folder)
        if folder.is_dir():
            stems = ["/".join(parts[first:]) for first in range(depth, len(parts))]
            files = (folder / f"{stem}{end}" for stem in stems for s in suffixes for end in (s, s.upper()))
            return next((file for file in files if os.path.lexists(file)), None)
    return None


class TableRows(NamedTuple):
    """The rows of a pose file as texts, and the names of its columns."""

    where: str  # for messages
    header: list[str]
    records: list[list[str]]
    has_names: bool  # in its first line


def read_rows(path: Path, name: str, keys: DataKeys = DEFAULT_KEYS) -> TableRows:
    """A .csv file with names in its first line, or one in TUM's form (timestamp tx ty tz qx qy qz qw, no names).
    InputError where it is no such table."""
    is_beside = path.with_suffix("").as_posix().endswith(f"/{name}")  # else in the trajectory's own folder
    where = name + path.suffix if is_beside else f"{name}/{recordable_name(path.name)}"
    if keys.poses_folder is not None:
        where = f"{name}: {recordable_name('/'.join(path.parts[-2:]))}"
    try:
        lines = read_file(path).tobytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not a text file: {error}") from error
    rows = [line for line in lines if line.strip() and not line.startswith("#")]
    if not rows:
        raise InputError(f"{where}: is empty, it holds no poses")
    if path.suffix.lower() == ".csv":
        try:
            header, *records = csv.reader(rows)
        except csv.Error as error:
            raise InputError(f"{where}: not a table: {error}") from error
        return TableRows(where, header, records, True)
    return TableRows(where, list(TUM_NAMES), [re.split(r"[\s,]+", row.strip()) for row in rows], False)


def read_pose_table(path: Path, name: str, keys: DataKeys = DEFAULT_KEYS) -> dict[str, np.ndarray]:
    """The poses in a .csv or TUM file, as `pose_table` has them. Raises InputError."""
    return pose_table(read_rows(path, name, keys), keys)


def pose_table(rows: TableRows, keys: DataKeys) -> dict[str, np.ndarray]:
    """The poses in a table.

    Returns:
        timestamp [s], x, y and yaw [rad] in the ground plane, (T,) float64 each, times rising; and `height`, the third
        coordinate, where there is one.

    Raises:
        InputError: a column is missing, there twice or in another unit by its name, or a value is not finite.
    """
    where, header, records, has_names = rows
    names = _column_names(where, header, keys) if has_names else list(TUM_COLUMNS)
    columns = _pose_columns(where, header, names, records, keys)
    timestamp = columns["timestamp"] * keys.time_scale + keys.time_offset
    check_values(where, "timestamp", timestamp, math.inf)  # finite also when scaled
    if (steps := np.diff(timestamp)).min(initial=1) <= 0:
        raise InputError(f"{where}: its timestamps do not rise, at pose {int(steps.argmin()) + 1}")
    points = np.stack([columns[key] for key in ("x", "y", "z") if key in columns], axis=1)
    position, height = ground_plane(where, "position", points, keys.pose_axes)
    table = {
        "timestamp": timestamp,
        "x": position[:, 0],
        "y": position[:, 1],
        "yaw": yaw_of_columns(where, columns, keys),
    }
    return {**table, "height": height} if height is not None and np.isfinite(height).all() else table


def extra_columns(rows: TableRows, extra_keys: Sequence[str]) -> dict[str, np.ndarray]:
    """(T,) float64 of each column that extra_keys names, by what stands in the first line. Raises InvalidDataError."""
    names, columns = [name.strip() for name in rows.header], {}
    for key in columns_asked_for(rows.where, dict.fromkeys(names), extra_keys):
        if names.count(key) > 1:
            raise InvalidDataError(f"{rows.where}: two columns are called {key}; take one out")
        try:
            columns[key] = _column(names.index(key), rows.records)
        except (ValueError, IndexError) as error:
            raise InvalidDataError(f"{rows.where}: {key} is no column of numbers: {error}") from error
    return columns


def _column_names(where: str, header: list[str], keys: DataKeys) -> list[str]:
    """Which of POSE_COLUMNS each cell of the first line names, '' for none."""
    names: list[str] = []
    for cell in header:
        plain, unit = unit_of_name(cell)
        known = next((key for key, forms in POSE_COLUMNS.items() if plain.lower() in forms), "")
        if unit is not None and NAMED_UNITS[unit][0] != UNIT_SETTINGS.get(known):
            known = ""
        if known and known in names:
            other = header[names.index(known)].strip()
            raise InputError(f"{where}: two columns for {known}: {other} and {cell.strip()}; take one out")
        if known in UNIT_SETTINGS:
            refuse_other_unit(where, cell.strip(), UNIT_SETTINGS[known], keys)
        names.append(known)
    return names


def _found_columns(header: list[str]) -> str:
    return f"; its columns are {', '.join(name.strip() for name in header)[:300]}" if header else ""


def _pose_columns(
    where: str, header: list[str], names: list[str], records: list[list[str]], keys: DataKeys
) -> dict[str, np.ndarray]:
    needs_z = max(AXES[keys.pose_axes].columns) == 2
    needed = {"timestamp", "x", "y"} | ({"z"} if needs_z else set()) | ({"yaw"} if "yaw" in names else set(QUATERNION))
    if missing := needed - set(names):
        raise InputError(
            f"{where}: has no column {', '.join(sorted(missing))}; expected a first line with timestamp, x, y and yaw "
            f"or qx, qy, qz, qw; a .txt file in TUM's form: timestamp tx ty tz qx qy qz qw{_found_columns(header)}"
        )
    if not records:
        raise InputError(f"{where}: holds no poses")
    columns = {}
    for key in sorted(needed):
        try:
            columns[key] = _column(names.index(key), records)
        except (ValueError, IndexError) as error:
            raise InputError(f"{where}: {key}: {error}") from error
        check_values(where, key, columns[key], MAX_POSITION_M if key in ("x", "y", "z") else math.inf)
    for key in {"z", *QUATERNION} & set(names) - needed:  # looked at for what they tell of the others, if they can be
        with contextlib.suppress(ValueError, IndexError):
            columns[key] = _column(names.index(key), records)
    return columns


def _column(place: int, records: list[list[str]]) -> np.ndarray:
    return np.array([float(record[place]) for record in records])


def yaw_of_columns(where: str, columns: dict[str, np.ndarray], keys: DataKeys) -> np.ndarray:
    """(T,) [rad], of the yaw column, else of the quaternions; where both are there they must agree."""
    has_quaternions = columns.keys() >= {*QUATERNION}
    norms = sum(columns[key] ** 2 for key in QUATERNION) if has_quaternions else np.zeros(1)
    tells = norms >= MIN_QUATERNION_NORM
    if "yaw" not in columns:
        if not tells.all():
            raise InputError(f"{where}: pose {int(norms.argmin())} has the quaternion 0")
        return yaw_of_quaternions(columns, keys)
    yaw = yaw_in_radians(columns["yaw"], keys)
    if has_quaternions and tells.any():
        apart = np.median(np.abs(np.angle(np.exp(1j * (yaw - yaw_of_quaternions(columns, keys)))))[tells])
        if apart > MOST_DISAGREEMENT_RAD:
            raise InputError(
                f"{where}: its yaw and its quaternions are {apart:.2f} rad apart, at the median; set yaw_unit or "
                "pose_axes, or take one of them out"
            )
    return yaw


def yaw_of_quaternions(columns: dict[str, np.ndarray], keys: DataKeys) -> np.ndarray:
    """(T,) [rad]: where the body's forward axis points in the ground plane."""
    qx, qy, qz, qw = (columns[key] for key in QUATERNION)
    axes = AXES[keys.pose_axes]
    if axes.forward == 0:  # x forward, seen in the plane of x and y
        return axes.yaw_sign * np.arctan2(2 * (qw * qz + qx * qy), qw**2 + qx**2 - qy**2 - qz**2)
    return axes.yaw_sign * np.arctan2(2 * (qx * qz + qw * qy), qw**2 + qz**2 - qx**2 - qy**2)


def poses_inside(at: np.ndarray, times: np.ndarray) -> int:
    """How many of the pose times [s] lie between a video's first and last frame, to the time of a frame."""
    margin_s = (times[-1] - times[0]) / max(1, len(times) - 1)
    return int(((at >= times[0] - margin_s) & (at <= times[-1] + margin_s)).sum())


def likely_time_scale(at: np.ndarray, times: np.ndarray, time_scale: float) -> str:
    """A hint at the time_scale by which most poses would lie inside the video and span most of it; '' for none."""
    scales = dict(LIKELY_TIME_SCALES)
    if len(times) > 1 and times[-1] > times[0]:
        scales["frame numbers"] = (times[-1] - times[0]) / (len(times) - 1)
    for unit, scale in scales.items():
        scaled = at / time_scale * scale
        spans_most = scaled[-1] - scaled[0] > (times[-1] - times[0]) / 2
        if spans_most and poses_inside(scaled, times) >= len(at) / 2:
            return f". They look like {unit}: set time_scale: {scale:.6g}"
    return ""
