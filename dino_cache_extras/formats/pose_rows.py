"""Poses as other programs write them beside pictures: tables of text, arrays, rows of matrices."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino_cache import (
    AXES,
    DEFAULT_KEYS,
    FENCE,
    MAX_FILE_BYTES,
    MAX_POSITION_M,
    NAMED_UNITS,
    DataKeys,
    InputError,
    InvalidDataError,
    Poses,
    check_claim,
    check_values,
    columns_asked_for,
    ground_plane,
    read_file,
    refuse_other_unit,
    unit_of_name,
)
from dino_cache_extras.formats.pose_files import POSE_COLUMNS, QUATERNION, TUM_COLUMNS, UNIT_SETTINGS, yaw_of_columns

POSE_SUFFIXES = (".csv", ".txt", ".tum", ".npy", ".npz")
MAX_TEXT_BYTES = 1 << 26  # of a table; its cells take some ten times as much
USUAL_NAMES = {  # what is read -> how columns are called, in small letters; the last ones are EuRoC's
    **POSE_COLUMNS,
    "timestamp": (*POSE_COLUMNS["timestamp"], "stamp"),
    **{axis: (*POSE_COLUMNS[axis], f"pos_{axis}", f"position_{axis}", f"p_rs_r_{axis}") for axis in ("x", "y", "z")},
    "yaw": (*POSE_COLUMNS["yaw"], "theta"),
    **{f"q{axis}": (f"q{axis}", f"q_{axis}", f"q_rs_{axis}") for axis in "xyzw"},
    "file": ("file", "filename", "file_name", "image"),
}
MATRIX = tuple(f"m{row}{column}" for row in range(3) for column in range(4))  # 3x4, row by row
FORMS = {  # number of columns without names -> what they are
    7: TUM_COLUMNS[1:],
    8: TUM_COLUMNS,
    12: MATRIX,
    16: (*MATRIX, "", "", "", ""),
}
ARRAY_FORMS = {**FORMS, 13: (*TUM_COLUMNS[1:], *[""] * 6)}  # 13: an odometry's, with six velocities
POSITION_ARRAY, YAW_ARRAY = "position", "yaw"  # of an .npz file
MOST_SKEW = 0.02  # by which a rotation's axes may differ from unit vectors at right angles
DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+(?:[eE][+-]?\d+)?")


class Table(NamedTuple):
    """Cells by row, each row as long as the others; names of the columns where the file has them."""

    names: list[str] | None
    records: list[list[str]]


def read_text(path: Path, where: str) -> list[str]:
    """Lines of a text file. Raises InputError."""
    if os.stat(path).st_size > MAX_TEXT_BYTES:
        raise InputError(f"{where}: is too large for a table, {os.stat(path).st_size} bytes")
    try:
        return read_file(path).tobytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not a text file: {error}") from error


def read_text_table(path: Path, where: str, keys: DataKeys = DEFAULT_KEYS) -> Table:
    """A table whose cells are parted by commas, semicolons, tabs or blanks. Names stand in its first line, or in the
    last comment (#) before it. Other comments and empty lines are left out.

    Raises:
        InputError: it is no table, has rows of unequal length, or numbers with decimal commas.
    """
    rows, comment = [], ""
    for line in read_text(path, where):
        is_comment = line.lstrip().startswith("#")
        if is_comment and not rows:
            comment = line.lstrip(" \t#")
        elif line.strip() and not is_comment:
            rows.append(line)
    if not rows:
        raise InputError(f"{where}: is empty, it holds no poses")
    delimiter = _delimiter(where, rows[0])
    try:
        records = [[cell.strip() for cell in record] for record in _split(rows, delimiter)]
        names = [name.strip() for name in _split([comment], delimiter)[0]] if comment else []
    except csv.Error as error:
        raise InputError(f"{where}: not a table: {error}") from error
    if len(names) != len(records[0]) or not (_knows(keys, names) or {"x", "y"} & {*map(_usual, names)}):
        names = [] if all(map(_is_number, records[0])) else records.pop(0)
    _check_lengths(where, records, len(names or records[0]))
    return Table(names or None, records)


def _split(rows: list[str], delimiter: str) -> list[list[str]]:
    if delimiter == " ":
        return [row.split() for row in rows]
    return list(csv.reader((row.strip(" ") for row in rows), delimiter=delimiter, skipinitialspace=True))


def _delimiter(where: str, line: str) -> str:
    for delimiter in (";", "\t"):
        if delimiter in line:
            return delimiter
    words = line.split()
    if any(DECIMAL_COMMA.fullmatch(word.strip(",")) for word in words) and len(words) > 1:
        raise _decimal_comma(where, line.strip())
    return "," if "," in line else " "


def _decimal_comma(where: str, text: str) -> InputError:
    return InputError(f"{where}: {text[:60]!r} has a decimal comma; write numbers with a point")


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return DECIMAL_COMMA.fullmatch(cell) is not None  # said where it is read
    return True


def _check_lengths(where: str, records: list[list[str]], expected: int) -> None:
    """Raise InputError unless all rows have so many cells; a line may end in delimiters."""
    for number, record in enumerate(records):
        while len(record) > expected and not record[-1]:
            record.pop()
        if len(record) != expected:
            more = "; where its numbers have decimal commas, write them with a point" if len(record) > expected else ""
            raise InputError(f"{where}: row {number} has {len(record)} cells, expected {expected}{more}")


def read_columns(path: Path, where: str, keys: DataKeys) -> dict[str, np.ndarray]:
    """What a file of poses holds, by what it is: the keys of USUAL_NAMES, or MATRIX; (T,) float64 each, `file` text.

    Raises:
        InputError: it cannot be parsed; a column is there twice, in another unit by its name, or named by
            `pose_columns` and not there.
    """
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        return _array_columns(path, where, keys, suffix)
    table = read_text_table(path, where, keys)
    if table.names is not None:
        places = _named_places(where, table.names, keys)
    else:
        places = _counted_places(where, len(table.records[0]), FORMS, keys)
    if not table.records:
        raise InputError(f"{where}: holds no poses")
    columns = {}
    for role, place in places.items():
        cells = [record[place] for record in table.records]
        columns[role] = np.array(cells) if role == "file" else _numbers(where, role, cells)
    return columns


def extra_columns(path: Path, where: str, keys: DataKeys) -> dict[str, np.ndarray]:
    """Those of a file's columns that extra_keys names: (T,) float64 of a table with names, by what stands in its first
    line; arrays of an .npz file, and fields of a structured .npy file, (T, ...).

    Raises:
        InputError: it cannot be parsed.
        InvalidDataError: it has no such column, or one that holds no numbers.
    """
    suffix = path.suffix.lower()
    if suffix in (".npy", ".npz"):
        arrays = _read_arrays(path, where, suffix)
        fields = {name: array[name] for array in arrays.values() for name in array.dtype.names or ()}
        return columns_asked_for(where, fields or {name: arrays[name] for name in arrays if name}, keys.extra_keys)
    names, records = read_text_table(path, where, keys)
    places = {name: place for place, name in enumerate(names or [])}
    columns = columns_asked_for(where, places, keys.extra_keys)
    if twice := [name for name in columns if names.count(name) > 1]:
        raise InvalidDataError(f"{where}: two columns are called {twice[0]}; take one out")
    return {name: _numbers(where, name, [record[place] for record in records]) for name, place in columns.items()}


def _numbers(where: str, role: str, cells: list[str]) -> np.ndarray:
    try:
        return np.array([float(cell) for cell in cells])
    except ValueError:
        for number, cell in enumerate(cells):
            if DECIMAL_COMMA.fullmatch(cell):
                raise _decimal_comma(where, cell) from None
            if not _is_number(cell):
                raise InputError(f"{where}: {role}[{number}] is {cell[:60]!r}, not a number") from None
        raise


def _usual(name: str) -> str:
    """What a column of that name is, '' where that is not known."""
    plain, unit = unit_of_name(name.replace("[]", ""))  # "q_RS_w []": without a unit
    role = next((role for role, forms in USUAL_NAMES.items() if plain.lower() in forms), "")
    return "" if unit is not None and NAMED_UNITS[unit][0] != UNIT_SETTINGS.get(role) else role


def _knows(keys: DataKeys, names: list[str]) -> bool:
    return any(_same(name, given) for name in names for given in (keys.pose_columns or {}).values())


def _same(name: str, given: str) -> bool:
    return given.lower() in (name.lower(), unit_of_name(name)[0].lower())


def _named_places(where: str, names: list[str], keys: DataKeys) -> dict[str, int]:
    """What is read -> its column: those that `pose_columns` names, and others by their usual names."""
    given, places = keys.pose_columns or {}, {}
    for role, name in given.items():
        found = [place for place, other in enumerate(names) if _same(other, name)]
        found = [int(name)] if not found and name.isdecimal() and int(name) < len(names) else found
        if len(found) != 1:
            which = "has no column" if not found else "has two columns"
            raise InputError(
                f"{where}: {which} {name} (pose_columns: {role}); its columns are {', '.join(names)[:300]}"
            )
        places[role] = found[0]
    for place, name in enumerate(names):
        role = _usual(name)
        if not role or role in given or place in places.values():
            continue
        if role in places:
            raise InputError(f"{where}: two columns for {role}: {names[places[role]]} and {name}; take one out")
        places[role] = place
    for role, place in places.items():
        if role in UNIT_SETTINGS:
            refuse_other_unit(where, names[place], UNIT_SETTINGS[role], keys)
    return places


def _counted_places(where: str, count: int, forms: Mapping[int, tuple[str, ...]], keys: DataKeys) -> dict[str, int]:
    """The same, of a file without names: by the numbers that `pose_columns` gives, else by how many columns it has."""
    if keys.pose_columns:
        for role, number in keys.pose_columns.items():
            if not number.isdecimal() or int(number) >= count:
                raise InputError(
                    f"{where}: has no names of columns, and {count} columns; pose_columns: {role}: {number} is none of "
                    f"them: give numbers from 0 to {count - 1}"
                )
        return {role: int(number) for role, number in keys.pose_columns.items()}
    if count not in forms:
        known = "8 (timestamp x y z qx qy qz qw), 7 (without timestamp), 12 (a 3x4 matrix) or 16 (a 4x4 matrix)"
        raise InputError(
            f"{where}: has {count} columns without names, expected {known}; else say which is which by number, with "
            "pose_columns: {x: 0, y: 1, yaw: 2}, for one"
        )
    return {role: place for place, role in enumerate(forms[count]) if role}


def _read_arrays(path: Path, where: str, suffix: str) -> dict[str, np.ndarray]:
    """The arrays of an .npz file; that of an .npy file under ''. Raises InputError."""
    data = read_file(path).tobytes()
    try:
        return {"": _read_npy(data)} if suffix == ".npy" else _read_npz(data)
    except OSError:
        raise
    except MemoryError as error:
        raise FENCE.memory_fault(where, error) from error
    except Exception as error:  # hostile bytes can raise anything
        raise InputError(f"{where}: cannot read poses: {str(error) or type(error).__name__}") from error


def _array_columns(path: Path, where: str, keys: DataKeys, suffix: str) -> dict[str, np.ndarray]:
    arrays = _read_arrays(path, where, suffix)
    if len(arrays) == 1:
        (array,) = arrays.values()
        if array.dtype.names is None and array.ndim > 1:
            rows = array.reshape(len(array), math.prod(array.shape[1:]))
            _check_numeric(where, rows)
            places = _counted_places(where, rows.shape[1], ARRAY_FORMS, keys)
            return {role: rows[:, place].astype(np.float64) for role, place in places.items()}
    named = _named_arrays(arrays)
    places = _named_places(where, list(named), keys)
    columns = {role: list(named.values())[place] for role, place in places.items()}
    for role, values in columns.items():
        _check_numeric(f"{where}: {role}", values)
    if len({len(values) for values in columns.values()}) > 1:
        lengths = ", ".join(f"{role} {len(values)}" for role, values in columns.items())
        raise InvalidDataError(f"{where}: its columns differ in length: {lengths}")
    return {role: values.astype(np.float64) for role, values in columns.items()}


def _check_numeric(where: str, values: np.ndarray) -> None:
    if values.dtype.kind not in "iuf" or not values.size:
        raise InputError(f"{where}: holds {values.dtype} values of shape {values.shape}, expected numbers")


def _read_npy(data: bytes) -> np.ndarray:
    check_claim(io.BytesIO(data), len(data))
    return np.load(io.BytesIO(data), allow_pickle=False)


def _read_npz(data: bytes) -> dict[str, np.ndarray]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if (unpacked := sum(member.file_size for member in members)) > MAX_FILE_BYTES:
            raise InputError(f"unpacks to {unpacked} bytes")
        return {member.filename.removesuffix(".npy"): _read_npy(archive.read(member)) for member in members}


def _named_arrays(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Name -> (T,) of each: fields of a structured array; name[0], name[1], ... where there are several columns."""
    named = {}
    for name, array in arrays.items():
        if array.dtype.names is not None:
            named |= {field: array[field].reshape(-1) for field in array.dtype.names}
        elif array.ndim == 1 or (array.ndim == 2 and array.shape[1] == 1):
            named[name] = array.reshape(-1)
        elif array.ndim == 2:
            axes = "xyz" if name.lower() == POSITION_ARRAY and array.shape[1] in (2, 3) else ()
            labels = axes or [f"{name}[{place}]" for place in range(array.shape[1])]
            named |= dict(zip(labels, array.T))
    return named


def poses_of(where: str, columns: dict[str, np.ndarray], keys: DataKeys, rotations: np.ndarray | None = None) -> Poses:
    """Poses in the ground plane, one a row, as `keys` say; `times` [s] where there is a timestamp.

    Args:
        rotations: (T, 3, 3), of a body whose forward axis is that of the axes in force; instead of the file's.

    Raises:
        InputError: a column is missing, a value is not finite, a quaternion is 0, a matrix is no rotation, or times do
            not rise.
    """
    if MATRIX[0] in columns:
        matrices = np.stack([columns[cell] for cell in MATRIX], axis=1).reshape(-1, 3, 4)
        columns = {**columns, **dict(zip("xyz", matrices[:, :, 3].T))}
        rotations = matrices[:, :, :3] if rotations is None else rotations
    needed = ["x", "y", "z"][: max(AXES[keys.pose_axes].columns) + 1]
    missing = [role for role in needed if role not in columns]
    if not missing and rotations is None and "yaw" not in columns and not columns.keys() >= {*QUATERNION}:
        missing = ["yaw", "or qx, qy, qz, qw"]
    if missing:
        known = ", ".join(role for role in columns if role not in MATRIX) or "none"
        raise InputError(
            f"{where}: has no column {', '.join(missing)}; those known are {known}. pose_columns says which is which: "
            "{x: pos_x, yaw: heading}, for one"
        )
    for role in ("x", "y", "z", "yaw", *QUATERNION, "timestamp"):
        if role in columns:
            check_values(where, role, columns[role], MAX_POSITION_M if role in ("x", "y", "z") else math.inf)
    points = np.stack([columns[role] for role in ("x", "y", "z") if role in columns], axis=1)
    position, height = ground_plane(where, "position", points, keys.pose_axes)
    if rotations is not None:
        yaw = yaw_of_rotations(where, rotations, keys)
    else:
        drawn = {role: values for role, values in columns.items() if role not in QUATERNION}
        is_given = "yaw" in (keys.pose_columns or {})  # then it alone counts
        yaw = yaw_of_columns(where, drawn if is_given else columns, keys)
    times = None
    if "timestamp" in columns:
        times = rising(where, "timestamp", columns["timestamp"] * keys.time_scale + keys.time_offset)
    return Poses(np.arange(len(position), dtype=np.int64), position, yaw, height, times)


def rising(where: str, what: str, times: np.ndarray) -> np.ndarray:
    """The times themselves, (n,) [s]. Raises InvalidDataError unless they are finite and rise."""
    check_values(where, what, times, math.inf)
    steps = np.diff(times)
    if steps.min(initial=1) <= 0:
        row = int((steps <= 0).argmax()) + 1
        raise InvalidDataError(f"{where}: its {what}s do not rise: row {row} is at {times[row]:.9g} s, the one before "
                               f"at {times[row - 1]:.9g} s")  # fmt: skip
    return times


def yaw_of_rotations(where: str, rotations: np.ndarray, keys: DataKeys) -> np.ndarray:
    """(T,) [rad]: where the body's forward axis points in the ground plane. Raises InvalidDataError.

    Args:
        rotations: (T, 3, 3), body to world; a column is where an axis of the body points.
    """
    check_values(where, "rotation", rotations, 1e3)
    skew = np.abs(rotations @ rotations.transpose(0, 2, 1) - np.eye(3)).max(axis=(1, 2))
    is_turn = (skew <= MOST_SKEW) & (np.linalg.det(rotations) > 0)
    if not is_turn.all():
        row = int((~is_turn).argmax())
        raise InvalidDataError(f"{where}: the matrix of pose {row} is no rotation: its axes are no unit vectors at "
                               "right angles, or are mirrored")  # fmt: skip
    axes = AXES[keys.pose_axes]
    if axes.forward == 0:  # x forward, seen in the plane of x and y
        return axes.yaw_sign * np.arctan2(rotations[:, 1, 0], rotations[:, 0, 0])
    return axes.yaw_sign * np.arctan2(rotations[:, 0, 2], rotations[:, 2, 2])


def rotations_of(where: str, columns: dict[str, np.ndarray]) -> np.ndarray:
    """(T, 3, 3) of the quaternions. Raises InvalidDataError where one is 0."""
    quaternions = np.stack([columns[key] for key in QUATERNION], axis=1)
    check_values(where, "quaternion", quaternions, math.inf)
    norms = np.linalg.norm(quaternions, axis=1)
    if not norms.all():
        raise InvalidDataError(f"{where}: pose {int(norms.argmin())} has the quaternion 0")
    x, y, z, w = (quaternions / norms[:, None]).T
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)
