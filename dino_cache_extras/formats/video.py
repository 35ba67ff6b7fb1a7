"""Video files with poses beside them, as phones and drones give them."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import math
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino_cache import (
    AXES,
    DEFAULT_KEYS,
    MAX_POSITION_M,
    NAMED_UNITS,
    CacheSpec,
    ChecksumKind,
    DataKeys,
    FolderFiles,
    Format,
    FrameReader,
    InputError,
    InvalidDataError,
    Note,
    Poses,
    Trajectory,
    check_values,
    columns_asked_for,
    ground_plane,
    open_regular,
    read_file,
    recordable_name,
    refuse_other_unit,
    unit_of_name,
    walk_folders,
    yaw_in_radians,
)
from dino_cache_extras.formats.video_frames import (
    SAME_TIME_S,
    VIDEO_TOLERANCE,
    VideoFrames,
    changed_picture,
    frame_times,
    video_times,
)
from progress_utils import open_library

MIN_QUATERNION_NORM = 1e-12  # a quaternion shorter than this tells no direction
VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi")
POSE_SUFFIXES = (".csv", ".txt")
VIDEO_STEM = "video"  # of a folder's only video, whose poses are poses.csv or .txt, or video.csv or .txt
POSE_STEM = "poses"
POSE_COLUMNS = {  # names in a CSV file's first line
    "timestamp": ("timestamp", "time", "t"),
    "x": ("x", "tx"),
    "y": ("y", "ty"),
    "z": ("z", "tz"),
    "yaw": ("yaw", "heading"),
    "qx": ("qx",), "qy": ("qy",), "qz": ("qz",), "qw": ("qw",),
}  # fmt: skip
TIME_ZEROS = {"first_frame": "the first frame shown", "container": "0 s on the container's clock"}
CLOCK_STEP_S = 1e-3  # what containers round times to
TUM_NAMES = ("timestamp", "tx", "ty", "tz", "qx", "qy", "qz", "qw")
TUM_COLUMNS = ("timestamp", "x", "y", "z", "qx", "qy", "qz", "qw")
QUATERNION = ("qx", "qy", "qz", "qw")
UNIT_SETTINGS = {"timestamp": "time_scale", "yaw": "yaw_unit"} | dict.fromkeys(("x", "y", "z"), "position_scale")
MOST_DISAGREEMENT_RAD = 0.2  # between a yaw column and quaternions, at the median
LIKELY_TIME_SCALES = {"milliseconds": 1e-3, "microseconds": 1e-6, "nanoseconds": 1e-9}


def video_files(folder: FolderFiles) -> Iterator[tuple[str, str, str | None]]:
    """(trajectory, video file, pose file or None) of a folder's videos."""
    for file in folder.files:
        stem, suffix = os.path.splitext(file)
        if suffix.lower() in VIDEO_SUFFIXES and not file.startswith("."):
            is_whole_folder = stem == VIDEO_STEM and folder.name != ""
            stems = (POSE_STEM, stem) if is_whole_folder else (stem,)
            name = folder.name.rstrip("/") if is_whole_folder else folder.name + stem
            yield name, file, _pose_file(stems, folder.files)


def _pose_file(stems: Sequence[str], files: Sequence[str]) -> str | None:
    """The first of the files that may hold a video's poses; their endings may be in capitals."""
    for stem in stems:
        for suffix in POSE_SUFFIXES:
            found = [stem + ending for ending in (suffix, suffix.upper()) if stem + ending in files]
            if found:
                return found[0]
    return None


def find_videos(data_folder: Path, spec: CacheSpec) -> Iterator[Trajectory]:
    """Videos below `data_folder`, sorted by folder; those without poses beside them are marked so. A folder that cannot
    be listed is yielded as a trajectory, so that it fails with that reason."""
    open_library("av")
    for folder in walk_folders(data_folder):
        if folder.error and folder.name:
            yield Trajectory(recordable_name(folder.name.rstrip("/")), folder.path / VIDEO_STEM, format="video")
        for name, file, pose_file in video_files(folder):
            yield Trajectory(recordable_name(name), folder.path / file, pose_file is None, format="video")


def locate_video(data_folder: Path, name: str) -> Trajectory:
    """The video of that name, a file's or its folder's; InputError where there is none."""
    path = data_folder / name
    for folder, prefix in ((path, f"{name}/"), (path.parent, name[: -len(path.name)])):
        if folder.is_dir():
            for found, file, pose_file in video_files(FolderFiles(prefix, folder, sorted(os.listdir(folder)))):
                if found == name:
                    return Trajectory(name, folder / file, pose_file is None, format="video")
    raise InputError(f"{data_folder} has no video {name}")


class VideoSource:
    """video: one file, its poses in a table beside it, with times of the video's clock."""

    def __init__(self, trajectory: Trajectory, keys: DataKeys):
        self._name, self._path, self._keys = trajectory.name, trajectory.path, keys
        folder = FolderFiles("/", self._path.parent, sorted(os.listdir(self._path.parent)))
        pose_files = {file: pose_file for _, file, pose_file in video_files(folder)}
        pose_file = pose_files.get(self._path.name)
        self._pose_path = self._path.parent / pose_file if pose_file else None

    def checksum(self, kind: ChecksumKind) -> str:
        """Over the pose file's bytes and the video's size (`stat`) or bytes (`content`)."""
        digest = hashlib.sha256(f"{kind} {self._path.suffix} {os.stat(self._path).st_size}".encode())
        if self._pose_path is not None:
            digest.update(self._pose_path.suffix.encode())
            digest.update(read_file(self._pose_path))
        if kind == "content":
            with open(open_regular(self._path), "rb") as file:
                digest = hashlib.file_digest(file, lambda: digest)
        return digest.hexdigest()[:16]

    def poses(self, *, required: bool) -> Poses:
        """Of the frames between the first and the last pose, interpolated: position on a line, yaw the shorter way."""
        times = self._times(self._keys.time_zero)
        if self._pose_path is None and required:
            raise InputError(f"{self._name}: no poses beside {self._path.name}; expected a .csv or .txt file")
        if self._pose_path is None:
            extra = columns_asked_for(self._name, {}, self._keys.extra_keys)
            return Poses(np.arange(len(times), dtype=np.int64), None, None, times=times, extra=extra)
        rows = read_rows(self._pose_path, self._name)
        table = pose_table(rows, self._keys)
        at = table["timestamp"]
        self._check_some_between(times, at)
        if (inside := poses_inside(at, times)) < len(at) / 2:
            raise InputError(
                f"{self._name}: {inside} of {len(at)} poses lie inside the video: they are at {at[0]:.3f} to "
                f"{at[-1]:.3f} s, its frames at {times[0]:.3f} to {times[-1]:.3f} s. Pose times are seconds, or "
                f"time_scale says how many their unit is{likely_time_scale(at, times, self._keys.time_scale)}; rows "
                "that are not of this video are to be taken out"
            )
        numbers = np.flatnonzero(are_between(times, at))
        position = np.stack([np.interp(times[numbers], at, table[axis]) for axis in ("x", "y")], axis=1)
        yaw = np.interp(times[numbers], at, np.unwrap(table["yaw"]))
        points = np.stack([table["x"], table["y"]], axis=1)
        return Poses(
            numbers.astype(np.int64),
            position,
            np.arctan2(np.sin(yaw), np.cos(yaw)),
            times=times[numbers],
            num_without=len(times) - len(numbers),
            table=Poses(np.arange(len(at)), points, table["yaw"], table.get("height"), at),
            notes=self._notes(at),
            extra={
                key: np.interp(times[numbers], at, column)
                for key, column in extra_columns(rows, self._keys.extra_keys).items()
            },
        )

    def _times(self, zero: str) -> np.ndarray:
        """(n,) [s] of the frames shown, counted from the first one or on the container's clock."""
        times = frame_times(self._path)
        if len(times) == 0:
            raise InputError(f"{self._name}: {self._path.name} holds no frames")
        return times - times[0] if zero == "first_frame" else times

    def _check_some_between(self, times: np.ndarray, at: np.ndarray) -> None:
        """Raise InputError unless some frame has a pose before and after it."""
        if are_between(times, at).any():
            return
        other = next(zero for zero in TIME_ZEROS if zero != self._keys.time_zero)
        others = np.count_nonzero(are_between(self._times(other), at))
        raise InputError(
            f"{self._name}: no frame lies between the first pose ({at[0]:.3f} s) and the last ({at[-1]:.3f} s); "
            f"the video's frames are at {times[0]:.3f} to {times[-1]:.3f} s, counted from "
            f"{TIME_ZEROS[self._keys.time_zero]} (time_zero: {self._keys.time_zero})"
            + (f"; with time_zero: {other} {others} of them do" if others else "")
            + likely_time_scale(at, times, self._keys.time_scale)
        )

    def _notes(self, at: np.ndarray) -> tuple[Note, ...]:
        """What should be known of a video whose poses are at these times: that frames are left out, and where the two
        ways to count would give a frame the pose of another."""
        zero = self._keys.time_zero
        times, first_s = self._times(zero), frame_times(self._path)[0]
        inside, notes = np.count_nonzero(are_between(times, at)), []
        if inside < len(times):
            what = "videos have frames before their first pose or after the last, which are left out"
            notes.append(Note(what, f"{len(times) - inside} of {len(times)}"))
        if abs(first_s) > (np.median(np.diff(times)) / 2 if len(times) > 1 else 0.0):
            what = "videos have their first frame elsewhere than at 0 s on their own clock"
            notes.append(
                Note(f"{what}; pose times are counted from {TIME_ZEROS[zero]} (time_zero: {zero})", f"{first_s:.3f} s")
            )
            other = next(other for other in TIME_ZEROS if other != zero)
            others = np.count_nonzero(are_between(self._times(other), at))
            if others > inside:
                what = f"of these have more frames between their poses if those are counted from {TIME_ZEROS[other]}"
                notes.append(Note(f"{what}: set time_zero: {other} if they are", f"{others} instead of {inside}"))
        return tuple(notes)

    def mispaired(self, spec: CacheSpec) -> str | None:
        """Why what 0.2.0 made is not what is made now: it counted pose times on the container's clock alone, and showed
        pictures neither mirrored nor with square pixels."""
        first_s = video_times(self._path).first_stamp_s
        if self._pose_path is not None and self._keys.time_zero == "first_frame" and abs(first_s) > CLOCK_STEP_S:
            which = "later" if first_s > 0 else "earlier"
            return (
                f"its frames were given poses of {abs(first_s):.3f} s {which}: pose times were counted on the clock of "
                f"{recordable_name(self._path.name)}, on which its first frame is at {first_s:.3f} s"
            )
        return changed_picture(self._path, spec)

    def open_frames(self, numbers: Sequence[int]) -> FrameReader:
        times = frame_times(self._path)
        tolerance_s = max(np.diff(times).min(initial=1.0) * VIDEO_TOLERANCE, SAME_TIME_S)
        return VideoFrames(self._path, self._name, numbers, times[list(numbers)].tolist(), tolerance_s)


def are_between(times: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(n,) whether frames at these times lie between the first and the last of poses at `at`, both in seconds."""
    return (times >= at[0] - SAME_TIME_S) & (times <= at[-1] + SAME_TIME_S)


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


class TableRows(NamedTuple):
    """The rows of a pose file as texts, and the names of its columns."""

    where: str  # for messages
    header: list[str]
    records: list[list[str]]
    has_names: bool  # in its first line


def read_rows(path: Path, name: str) -> TableRows:
    """A .csv file with names in its first line, or one in TUM's form (timestamp tx ty tz qx qy qz qw, no names).
    InputError where it is no such table."""
    is_beside = path.with_suffix("").as_posix().endswith(f"/{name}")  # else in the trajectory's own folder
    where = name + path.suffix if is_beside else f"{name}/{recordable_name(path.name)}"
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
    return pose_table(read_rows(path, name), keys)


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
    columns = _pose_columns(where, names, records, keys)
    timestamp = columns["timestamp"] * keys.time_scale
    check_values(where, "timestamp", timestamp, math.inf)  # finite also when scaled
    if (steps := np.diff(timestamp)).min(initial=1) <= 0:
        raise InputError(f"{where}: its timestamps do not rise, at pose {int(steps.argmin()) + 1}")
    points = np.stack([columns[key] for key in ("x", "y", "z") if key in columns], axis=1)
    position, height = ground_plane(where, "position", points, keys.pose_axes)
    table = {"timestamp": timestamp, "x": position[:, 0], "y": position[:, 1], "yaw": _yaw(where, columns, keys)}
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


def _pose_columns(where: str, names: list[str], records: list[list[str]], keys: DataKeys) -> dict[str, np.ndarray]:
    needs_z = max(AXES[keys.pose_axes].columns) == 2
    needed = {"timestamp", "x", "y"} | ({"z"} if needs_z else set()) | ({"yaw"} if "yaw" in names else set(QUATERNION))
    if missing := needed - set(names):
        raise InputError(
            f"{where}: has no column {', '.join(sorted(missing))}; expected a first line with timestamp, x, y and yaw "
            "or qx, qy, qz, qw; a .txt file in TUM's form: timestamp tx ty tz qx qy qz qw"
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


def _yaw(where: str, columns: dict[str, np.ndarray], keys: DataKeys) -> np.ndarray:
    """(T,) [rad], of the yaw column, else of the quaternions; where both are there they must agree."""
    has_quaternions = columns.keys() >= {*QUATERNION}
    norms = sum(columns[key] ** 2 for key in QUATERNION) if has_quaternions else np.zeros(1)
    tells = norms >= MIN_QUATERNION_NORM
    if "yaw" not in columns:
        if not tells.all():
            raise InputError(f"{where}: pose {int(norms.argmin())} has the quaternion 0")
        return _yaw_of_quaternions(columns, keys)
    yaw = yaw_in_radians(columns["yaw"], keys)
    if has_quaternions and tells.any():
        apart = np.median(np.abs(np.angle(np.exp(1j * (yaw - _yaw_of_quaternions(columns, keys)))))[tells])
        if apart > MOST_DISAGREEMENT_RAD:
            raise InputError(
                f"{where}: its yaw and its quaternions are {apart:.2f} rad apart, at the median; set yaw_unit or "
                "pose_axes, or take one of them out"
            )
    return yaw


def _yaw_of_quaternions(columns: dict[str, np.ndarray], keys: DataKeys) -> np.ndarray:
    """(T,) [rad]: where the body's forward axis points in the ground plane."""
    qx, qy, qz, qw = (columns[key] for key in QUATERNION)
    axes = AXES[keys.pose_axes]
    if axes.forward == 0:  # x forward, seen in the plane of x and y
        return axes.yaw_sign * np.arctan2(2 * (qw * qz + qx * qy), qw**2 + qx**2 - qy**2 - qz**2)
    return axes.yaw_sign * np.arctan2(2 * (qx * qz + qw * qy), qw**2 + qz**2 - qx**2 - qy**2)


def _signs(folder: FolderFiles, is_top: bool) -> list[str]:
    return [f"{file} and {pose_file}" for _, file, pose_file in video_files(folder) if pose_file is not None]


def _hints(folder: FolderFiles, keys: DataKeys) -> list[str]:
    return [file for _, file, _ in video_files(folder)]


FORMAT = Format(
    find=find_videos,
    locate=locate_video,
    open=VideoSource,
    settings=("time_zero", "time_scale", "extra_keys"),
    trajectory="<name>.mp4 with <name>.csv or .txt, or a folder with video.mp4 and poses.csv or .txt",
    signs=_signs,
    hints=_hints,
    pairing=2,
    mispaired=lambda source, spec: source.mispaired(spec),
)
