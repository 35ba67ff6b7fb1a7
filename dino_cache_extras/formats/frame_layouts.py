"""Layouts of pictures with a file of poses: how each is known, where its pictures, their times and its poses are."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from dino_cache import FRAME_PATTERN, DataKeys, InputError, InvalidDataError, Poses, recordable_name
from dino_cache_extras.formats.pose_rows import (
    POSE_SUFFIXES,
    poses_of,
    read_columns,
    read_text,
    read_text_table,
    rotations_of,
)

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
POSE_STEMS = ("poses", "pose", "trajectory", "odometry", "odom", "traj")  # of a file of poses, in layout custom
KITTI_CAMERAS = ("image_2", "image_3", "image_0", "image_1")  # colour before grey, left before right
KITTI_GROUP = "sequences"
TARTANAIR_CAMERAS = ("left", "lcam_front")
TARTANAIR_PATTERN = r"(\d+)_\w+\.(?:png|jpg|jpeg)"
TARTANDRIVE_POSES = "odom/odometry.npy"
TARTANDRIVE_CAMERAS = ("image_left", "image_left_color")
EUROC_POSES = ("state_groundtruth_estimate0/data.csv", "mocap0/data.csv")
TUM_FILES = ("groundtruth.txt", "groundtruth.tum", "poses.txt", "poses.tum")
NANOSECOND = 1e-9
LEVEL = 0.5  # length of the level part of an axis that points along the ground rather than up


class Picture(NamedTuple):
    """A file that shows a frame; size is -1 where there is no regular file."""

    file: str  # relative to the trajectory's folder
    size: int
    number: Fraction | None = None  # in its name


class Pictures(NamedTuple):
    """A trajectory's pictures in order, and when they were taken."""

    pictures: list[Picture]
    times: np.ndarray | None = None  # (n,) [s], not yet looked at
    lists: tuple[str, ...] = ()  # files that say so


class Place(NamedTuple):
    """A trajectory's folder, and what it is called in messages."""

    folder: Path
    name: str

    def where(self, file: str) -> str:
        return f"{self.name}/{recordable_name(file)}"


class Layout(NamedTuple):
    """How pictures and poses lie. `files` are the names of a folder's files."""

    sign: Callable[[Path, Collection[str], DataKeys], str | None]  # the file that shows it
    pictures: Callable[[Place, DataKeys], Pictures]
    pose_file: Callable[[Place, DataKeys], str | None]  # None: it has none
    expected: str  # files of poses, for messages
    axes: str = "z_up"  # what pose_axes means where it is at its default
    by_time: bool = False  # poses are found by the pictures' times
    poses: Callable[[Place, str, str, DataKeys], Poses] | None = None  # from a file; None: one a row


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def numbered_pictures(place: Place, camera: str, pattern: str) -> list[Picture]:
    """Pictures of a folder whose whole names match, by the numbers in them. Raises InvalidDataError, OSError."""
    match, found, other = re.compile(pattern).fullmatch, [], None
    prefix = "" if camera == "." else f"{camera}/"
    for name, size in sizes_in(place.folder / camera).items():
        number = _number_in(match(name))
        if number is not None:
            found.append(Picture(prefix + name, size, number))
        elif name.lower().endswith(PICTURE_SUFFIXES):
            other = min(name, other or name)
    if not found:
        example = f"; it holds {recordable_name(other)}, for one: set frame_pattern" if other else ""
        raise InputError(f"{place.where(camera)}: no pictures here whose names match {pattern}{example}")
    found.sort(key=lambda picture: (picture.number, picture.file))
    for before, picture in zip(found, found[1:]):
        if before.number == picture.number:
            raise InvalidDataError(f"{place.name}: {before.file} and {picture.file} have the same number")
    return found


def _number_in(match: re.Match[str] | None) -> Fraction | None:
    try:
        return None if match is None or not match[1] else Fraction(match[1])
    except (ValueError, ZeroDivisionError):
        return None


def without_gap(place: Place, pictures: list[Picture]) -> list[Picture]:
    """The pictures themselves. Raises InvalidDataError where a number between two others is missing."""
    for before, picture in zip(pictures, pictures[1:]):
        if picture.number != before.number + 1:
            raise InvalidDataError(
                f"{place.name}: picture {before.number + 1} is missing between {before.file} and {picture.file}"
            )
    return pictures


def sizes_in(folder: Path) -> dict[str, int]:
    """Name -> size [bytes] of what is in a folder, -1 where it is no regular file."""
    with os.scandir(folder) as entries:
        return {entry.name: entry.stat().st_size if entry.is_file() else -1 for entry in entries}


def listed_pictures(place: Place, list_file: str, below: str, scale_s: float) -> Pictures:
    """Pictures by a list of times and files, `below` which folder. Raises InputError, OSError."""
    where, files, times = place.where(list_file), [], []
    for line in read_text(place.folder / list_file, where):
        cells = re.split(r"\s*[,;]\s*|\s+", line.strip(), maxsplit=1)
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        try:
            times.append(float(cells[0]))
        except ValueError:
            if times or files:
                raise InputError(f"{where}: {cells[0][:60]!r} is not a time") from None
            continue  # names of the columns
        if len(cells) < 2 or not is_inside(cells[1]):
            raise InputError(
                f"{where}: {line.strip()[:80]!r}: expected a time and a file below {below or 'its folder'}"
            )
        files.append(below + cells[1])
    if not files:
        raise InputError(f"{where}: names no pictures")
    return Pictures(with_sizes(place, files), np.array(times) * scale_s, (list_file,))


def is_inside(file: str) -> bool:
    """Whether a path that a stranger's file gives stays below where it is taken from."""
    path = PurePosixPath(file)
    return bool(file) and "\0" not in file and not path.is_absolute() and ".." not in path.parts


def with_sizes(place: Place, files: list[str]) -> list[Picture]:
    sizes: dict[str, dict[str, int]] = {}
    pictures = []
    for file in files:
        parent, _, name = file.rpartition("/")
        if parent not in sizes:
            folder = place.folder / parent
            sizes[parent] = sizes_in(folder) if folder.is_dir() else {}
        pictures.append(Picture(file, sizes[parent].get(name, -1)))
    return pictures


def read_times(place: Place, file: str, keys: DataKeys) -> tuple[np.ndarray, list[str] | None]:
    """(n,) [s] of frames from a table with one a row, a `timestamp` or a single number; and the files that it names."""
    where = place.where(file)
    table = read_text_table(place.folder / file, where)
    if table.names is None and len(table.records[0]) == 1:
        cells, files = [record[0] for record in table.records], None
        try:
            return np.array([float(cell) for cell in cells]) * keys.time_scale, files
        except ValueError as error:
            raise InputError(f"{where}: {error}") from error
    columns = read_columns(place.folder / file, where, keys._replace(pose_columns=None))
    if "timestamp" not in columns:
        raise InputError(f"{where}: has no column timestamp; expected one, or a single number a line")
    files = columns["file"].tolist() if "file" in columns else None
    return columns["timestamp"] * keys.time_scale, files


def only_match(place: Place, pattern: str) -> str:
    """The file of a trajectory's folder that a setting names; * stands for any part of a name. Raises InputError."""
    folder, _, name = pattern.rpartition("/")
    base = place.folder / folder
    names = sorted(fnmatch.filter(os.listdir(base), name)) if base.is_dir() else []
    if len(names) != 1:
        what = f"there are {' and '.join(names[:3])}" if names else "there is none"
        raise InputError(f"{place.name}: expected one file {pattern}, {what}")
    return f"{folder}/{names[0]}" if folder else names[0]


def _named_or_first(place: Place, keys: DataKeys, known: Sequence[str]) -> str:
    """The camera's folder: the one that image_key names, or the first one there is."""
    if keys.image_key is not None:
        return keys.image_key
    return next((camera for camera in known if (place.folder / camera).is_dir()), known[0])


def _first_file(place: Place, files: Sequence[str]) -> str | None:
    return next((file for file in files if os.path.lexists(place.folder / file)), None)


# ---------------------------------------------------------------------------------------------------------------------
# KITTI odometry
# ---------------------------------------------------------------------------------------------------------------------


def _kitti_sign(folder: Path, files: Collection[str], keys: DataKeys) -> str | None:
    shown = next((file for file in ("times.txt", "poses.txt") if file in files), None)
    if shown is None and folder.parent.name != KITTI_GROUP:
        return None
    cameras = (keys.image_key,) if keys.image_key else KITTI_CAMERAS
    camera = next((camera for camera in cameras if (folder / camera).is_dir()), None)
    return camera and (shown or camera)


def _kitti_pictures(place: Place, keys: DataKeys) -> Pictures:
    camera = _named_or_first(place, keys, KITTI_CAMERAS)
    pictures = without_gap(place, numbered_pictures(place, camera, keys.frame_pattern))
    if not os.path.lexists(place.folder / "times.txt"):
        return Pictures(pictures)
    times, _ = read_times(place, "times.txt", keys)
    if len(times) != len(pictures):
        raise InvalidDataError(
            f"{place.name}: {len(pictures)} pictures in {camera} but {len(times)} times in times.txt"
        )
    return Pictures(pictures, times, ("times.txt",))


def _kitti_pose_file(place: Place, keys: DataKeys) -> str | None:
    beside = f"../../poses/{place.folder.name}.txt"
    found = [file for file in ("poses.txt", beside) if os.path.lexists(place.folder / file)]
    if len(found) > 1:
        raise InputError(f"{place.name}: has poses in poses.txt and in {beside}; set pose_file")
    return found[0] if found else None


# ---------------------------------------------------------------------------------------------------------------------
# TUM RGB-D
# ---------------------------------------------------------------------------------------------------------------------


def _tum_list(keys: DataKeys) -> str:
    return f"{keys.image_key or 'rgb'}.txt"


def _tum_sign(folder: Path, files: Collection[str], keys: DataKeys) -> str | None:
    name = _tum_list(keys)
    is_one = name in files and ("groundtruth.txt" in files or (folder / name[:-4]).is_dir())
    return name if is_one else None


# ---------------------------------------------------------------------------------------------------------------------
# EuRoC MAV
# ---------------------------------------------------------------------------------------------------------------------


def _euroc_list(folder: Path, keys: DataKeys) -> str | None:
    camera = keys.image_key or "cam0"
    files = (f"mav0/{camera}/data.csv", f"{camera}/data.csv")
    return next((file for file in files if (folder / file).is_file()), None)


def _euroc_pictures(place: Place, keys: DataKeys) -> Pictures:
    list_file = _euroc_list(place.folder, keys)
    if list_file is None:
        raise InputError(f"{place.name}: has no mav0/{keys.image_key or 'cam0'}/data.csv")
    found = listed_pictures(place, list_file, list_file.removesuffix(".csv") + "/", NANOSECOND)
    sensor = _sensor_file(list_file)
    return found._replace(lists=(list_file, sensor)) if (place.folder / sensor).is_file() else found


def _sensor_file(list_file: str) -> str:
    return f"{os.path.dirname(list_file)}/sensor.yaml"


def _euroc_pose_file(place: Place, keys: DataKeys) -> str | None:
    files = [f"{prefix}{file}" for prefix in ("mav0/", "") for file in (*EUROC_POSES, *TUM_FILES)]
    return _first_file(place, files)


def _euroc_poses(place: Place, file: str, where: str, keys: DataKeys) -> Poses:
    """Positions of the body; yaw is where the camera looks, see `_looking`. With pose_axes set, as that says."""
    if file.lower().endswith(".csv"):
        keys = keys._replace(time_scale=NANOSECOND)
    columns = read_columns(place.folder / file, where, keys)
    if keys.pose_axes != "z_up" or "qw" not in columns:
        return poses_of(where, columns, keys)
    list_file = _euroc_list(place.folder, keys)
    in_body = _camera_in_body(place, _sensor_file(list_file)) if list_file else None
    return poses_of(where, columns, keys, _looking(where, rotations_of(where, columns), in_body))


def _camera_in_body(place: Place, sensor_file: str) -> np.ndarray | None:
    """(3, 3) by the camera's T_BS, None where its file is not there."""
    if not (place.folder / sensor_file).is_file():
        return None
    where = place.where(sensor_file)
    text = "\n".join(read_text(place.folder / sensor_file, where))
    match = re.search(r"^T_BS:.*?data:\s*\[(.*?)\]", text, re.DOTALL | re.MULTILINE)
    try:
        numbers = [float(cell) for cell in re.sub(r"#.*", "", match[1]).split(",")] if match else []
    except ValueError as error:
        raise InputError(f"{where}: T_BS: {error}") from error
    if match and len(numbers) != 16:
        raise InputError(f"{where}: T_BS has {len(numbers)} numbers, expected 16")
    return np.array(numbers).reshape(4, 4)[:3, :3] if match else None


def _looking(where: str, rotations: np.ndarray, in_body: np.ndarray | None) -> np.ndarray:
    """(T, 3, 3) of a body whose x axis is where the camera looks: along z of the camera by its T_BS. Where that is not
    known or points up or down, along z of a body whose x axis is vertical, as that of EuRoC's own IMU, or along x of
    one whose z axis is. Raises InvalidDataError where neither is."""
    if in_body is not None:
        turned = rotations @ in_body
        if np.median(np.linalg.norm(turned[:, :2, 2], axis=1)) > LEVEL:
            return turned[:, :, [2, 0, 1]]  # z, x, y of the camera: a right-handed frame with z first
    uprightness = np.abs(np.median(rotations[:, 2], axis=0))
    if uprightness[2] > 1 - LEVEL and uprightness[2] == uprightness.max():
        return rotations
    if uprightness[0] > 1 - LEVEL and uprightness[0] == uprightness.max():
        return rotations[:, :, [2, 0, 1]]
    raise InvalidDataError(
        f"{where}: cannot tell where the camera looks: there is no T_BS in its sensor.yaml, and neither the x axis of "
        "the body is vertical, as EuRoC's, nor the z axis; set pose_axes"
    )


# ---------------------------------------------------------------------------------------------------------------------
# TartanAir and TartanDrive
# ---------------------------------------------------------------------------------------------------------------------


def _tartanair_camera(folder: Path, files: Collection[str], keys: DataKeys) -> str | None:
    """left of image_left and pose_left.txt."""
    known = (keys.image_key.removeprefix("image_"),) if keys.image_key else TARTANAIR_CAMERAS
    named = (camera for camera in known if f"pose_{camera}.txt" in files)
    return next((camera for camera in named if (folder / f"image_{camera}").is_dir()), None)


def _tartanair_sign(folder: Path, files: Collection[str], keys: DataKeys) -> str | None:
    camera = _tartanair_camera(folder, files, keys)
    return camera and f"pose_{camera}.txt"


def _tartanair_pictures(place: Place, keys: DataKeys) -> Pictures:
    camera = _tartanair_camera(place.folder, os.listdir(place.folder), keys)
    folder = keys.image_key or f"image_{camera or TARTANAIR_CAMERAS[0]}"
    pattern = TARTANAIR_PATTERN if keys.frame_pattern == FRAME_PATTERN else keys.frame_pattern
    return Pictures(without_gap(place, numbered_pictures(place, folder, pattern)))


def _tartanair_pose_file(place: Place, keys: DataKeys) -> str | None:
    return _tartanair_sign(place.folder, os.listdir(place.folder), keys)


def _tartandrive_sign(folder: Path, files: Collection[str], keys: DataKeys) -> str | None:
    return TARTANDRIVE_POSES if (folder / TARTANDRIVE_POSES).is_file() else None


def _tartandrive_pictures(place: Place, keys: DataKeys) -> Pictures:
    camera = _named_or_first(place, keys, TARTANDRIVE_CAMERAS)
    pictures = without_gap(place, numbered_pictures(place, camera, keys.frame_pattern))
    times_file = _first_file(place, ("timestamps.txt", f"{camera}/timestamps.txt"))
    if times_file is None:
        return Pictures(pictures)
    times, _ = read_times(place, times_file, keys)
    if len(times) != len(pictures):
        raise InvalidDataError(
            f"{place.name}: {len(pictures)} pictures in {camera} but {len(times)} times in {times_file}"
        )
    return Pictures(pictures, times, (times_file,))


# ---------------------------------------------------------------------------------------------------------------------
# Custom: pictures in a folder, or in one folder of it, and one file of poses
# ---------------------------------------------------------------------------------------------------------------------


def picture_folders(folder: Path, keys: DataKeys) -> list[str]:
    """Those that may hold a custom trajectory's pictures: '.', and folders in it."""
    if keys.image_key is not None:
        return [keys.image_key] if _holds_pictures(folder / keys.image_key) else []
    with os.scandir(folder) as entries:
        inner = sorted(entry.name for entry in entries if entry.is_dir())
    return [name for name in (".", *inner) if _holds_pictures(folder / name)]


def _holds_pictures(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(entry.name.lower().endswith(PICTURE_SUFFIXES) for entry in entries)
    except OSError:
        return False


def _pose_files(files: Collection[str]) -> list[str]:
    parts = ((file, *os.path.splitext(file.lower())) for file in files)
    return sorted(file for file, stem, suffix in parts if stem in POSE_STEMS and suffix in POSE_SUFFIXES)


def _custom_sign(folder: Path, files: Collection[str], keys: DataKeys) -> str | None:
    if keys.pose_file is not None:
        found = [keys.pose_file] if (folder / keys.pose_file).is_file() else []
    else:
        found = _pose_files(files)
    folders = picture_folders(folder, keys) if found else []
    if not folders:
        return None
    return f"{found[0]} and {'pictures' if folders[0] == '.' else folders[0] + '/'}"


def _custom_pose_file(place: Place, keys: DataKeys) -> str | None:
    found = _pose_files(os.listdir(place.folder))
    if len(found) > 1:
        raise InputError(f"{place.name}: {' and '.join(found)} may both be its poses; set pose_file")
    return found[0] if found else None


def _custom_pictures(place: Place, keys: DataKeys) -> Pictures:
    folders = picture_folders(place.folder, keys)
    if len(folders) > 1:
        raise InputError(f"{place.name}: pictures lie in {' and '.join(folders)}; set image_key to one of them")
    if not folders:
        raise InputError(f"{place.name}: no pictures in it{f', in {keys.image_key}' if keys.image_key else ''}")
    pictures = numbered_pictures(place, folders[0], keys.frame_pattern)
    if keys.frame_times is None:
        times = np.array([float(picture.number) for picture in pictures]) * keys.time_scale
        return Pictures(pictures, times if keys.pose_match == "time" else None)
    times_file = only_match(place, keys.frame_times)
    times, files = read_times(place, times_file, keys)
    if files is not None:
        pictures = [pictures[row] for row in rows_of_files(place, times_file, files, pictures)]
    if len(times) != len(pictures):
        raise InvalidDataError(
            f"{place.name}: {len(pictures)} pictures in {folders[0]} but {len(times)} times in {times_file}"
        )
    return Pictures(pictures, times, (times_file,))


def rows_of_files(place: Place, table: str, files: Sequence[str], pictures: list[Picture]) -> np.ndarray:
    """(n,) int64: which picture each row of a table names, by path or name. Raises InvalidDataError unless all are
    there, and in the order of the pictures' numbers."""
    rows = {key: row for row, picture in enumerate(pictures) for key in (picture.file, os.path.basename(picture.file))}
    found = [rows.get(file, rows.get(os.path.basename(file), -1)) for file in files]
    for number, (row, file) in enumerate(zip(found, files)):
        if row < 0:
            raise InvalidDataError(f"{place.name}: row {number} of {table} names {file[:200]}, which is not there")
        if number and row <= found[number - 1]:
            raise InvalidDataError(
                f"{place.name}: rows of {table} are not in the order of the pictures: {file[:200]} comes after "
                f"{files[number - 1][:200]}"
            )
    return np.array(found, dtype=np.int64)


LAYOUTS = {
    "kitti": Layout(
        sign=_kitti_sign,
        pictures=_kitti_pictures,
        pose_file=_kitti_pose_file,
        expected="poses.txt, or ../../poses/<sequence>.txt",
        axes="camera",
    ),
    "tum": Layout(
        sign=_tum_sign,
        pictures=lambda place, keys: listed_pictures(place, _tum_list(keys), "", keys.time_scale),
        pose_file=lambda place, keys: _first_file(place, TUM_FILES),
        expected=", ".join(TUM_FILES),
        by_time=True,
    ),
    "euroc": Layout(
        sign=lambda folder, files, keys: _euroc_list(folder, keys),
        pictures=_euroc_pictures,
        pose_file=_euroc_pose_file,
        expected=f"mav0/{EUROC_POSES[0]}, mav0/{EUROC_POSES[1]}, or a TUM file called {', '.join(TUM_FILES)}",
        by_time=True,
        poses=_euroc_poses,
    ),
    "tartanair": Layout(
        sign=_tartanair_sign,
        pictures=_tartanair_pictures,
        pose_file=_tartanair_pose_file,
        expected="pose_left.txt, called like image_left",
        axes="ned",
    ),
    "tartandrive": Layout(
        sign=_tartandrive_sign,
        pictures=_tartandrive_pictures,
        pose_file=lambda place, keys: _first_file(place, (TARTANDRIVE_POSES,)),
        expected=TARTANDRIVE_POSES,
    ),
    "custom": Layout(
        sign=_custom_sign,
        pictures=_custom_pictures,
        pose_file=_custom_pose_file,
        expected=f"one of {', '.join(f'{POSE_STEMS[0]}{suffix}' for suffix in POSE_SUFFIXES)}, or pose_file",
    ),
}
OF_CUSTOM = {"pose_columns": None, "pose_match": "row", "frame_times": None}  # settings of it alone, and their defaults


# Files that another layout reads, and that therefore do not show layout custom.
TAKEN = {"kitti": ("poses.txt", "times.txt"), "tum": TUM_FILES, "euroc": TUM_FILES}


def layouts_of(folder: Path, files: Collection[str], keys: DataKeys) -> dict[str, str]:
    """Layouts that a folder may be a trajectory of -> the file that shows it. A layout that is set is the only one, and
    settings of layout custom alone set it."""
    is_custom = any(getattr(keys, key) != default for key, default in OF_CUSTOM.items())
    if keys.layout != "auto" or is_custom:
        names = ["custom"] if keys.layout == "auto" else [keys.layout]
    else:
        names = list(LAYOUTS)
    found: dict[str, str] = {}
    for name in names:
        if name == "custom" and found and keys.pose_file is not None:
            continue  # it is the other layout's file of poses
        taken = {file for other in found for file in TAKEN.get(other, ())} if name == "custom" else set()
        sign = LAYOUTS[name].sign(folder, [file for file in files if file not in taken], keys)
        if sign is not None:
            found[name] = sign
    return found
