"""Folders of pictures with a file of poses: KITTI, TUM, EuRoC, TartanAir, TartanDrive, and one's own."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino_cache import (
    DEFAULT_KEYS,
    LOG,
    POSE_FILES,
    CacheSpec,
    ChecksumKind,
    DataKeys,
    FileFrames,
    FolderFiles,
    Format,
    FrameReader,
    InputError,
    InvalidDataError,
    Note,
    Poses,
    Trajectory,
    checked_extra,
    columns_asked_for,
    data_keys,
    read_file,
    recordable_name,
    walk_folders,
)
from dino_cache_extras.formats.frame_layouts import (
    KITTI_GROUP,
    LAYOUTS,
    OF_CUSTOM,
    Layout,
    Place,
    layouts_of,
    rows_of_files,
)
from dino_cache_extras.formats.pose_files import likely_time_scale, table_apart
from dino_cache_extras.formats.pose_rows import POSE_SUFFIXES, extra_columns, poses_of, read_columns, rising
from dino_cache_extras.formats.pose_times import SAME_TIME_S, poses_at
from progress_utils import RefusedError


class Found(NamedTuple):
    """A trajectory's folder, its layout, and the file that shows it; '' where it has pictures alone."""

    trajectory: Trajectory
    layout: str
    sign: str


def find_frames(data_folder: Path, spec: CacheSpec) -> Iterator[Trajectory]:
    """Trajectories below `data_folder`, sorted by folder; nothing below one is searched. Folders of pictures without a
    file of poses are marked so. A folder that cannot be listed is yielded, so that it fails with that reason.

    Raises:
        RefusedError: a folder may be in two layouts, or two folders are in different ones; `data_folder` is itself a
            trajectory; two trajectories have one table in `poses_folder`; a setting is for another layout.
    """
    keys, shown, tables, count = data_keys(spec), {}, {}, 0
    _refuse_other_settings(keys)
    for found in _walk(data_folder, keys):
        if found.sign:
            shown.setdefault(found.layout, found)
            count += 1
        if len(shown) > 1:
            raise RefusedError(f"{data_folder}: {_two(shown.values())}; set layout, or separate them")
        table = _table_apart(found.trajectory, keys)
        if table is not None and (other := tables.setdefault(table, found.trajectory.name)) != found.trajectory.name:
            raise RefusedError(f"{table}: would be the poses of {other} and of {found.trajectory.name}; rename them")
        yield found.trajectory
    for name, found in shown.items():
        how = f"set, as {found.sign} has it" if keys.layout != "auto" else f"guessed by {found.sign}"
        axes = axes_of(LAYOUTS[name], keys)
        LOG.info("%s: layout %s (%s), %d trajectories, pose_axes %s", data_folder, name, how, count, axes)


def _refuse_other_settings(keys: DataKeys) -> None:
    if isinstance(keys.image_key, tuple):
        raise RefusedError(f"image_key: {dict(keys.image_key)}: format frames reads one camera; give its folder")
    for key, default in OF_CUSTOM.items():
        if getattr(keys, key) != default and keys.layout not in ("auto", "custom"):
            raise RefusedError(f"{key}: {getattr(keys, key)}: is for layout: custom, and layout is {keys.layout}")


def _two(found: Iterator[Found]) -> str:
    return " and ".join(f"{one.trajectory.name} looks like layout {one.layout} ({one.sign})" for one in found)


def _walk(data_folder: Path, keys: DataKeys) -> Iterator[Found]:
    inside = None  # the last trajectory's folder: what lies below it is its own
    for folder in walk_folders(data_folder):
        if inside is not None and folder.name.startswith(inside):
            continue
        found = _look_at(data_folder, folder, keys)
        if found is not None:
            inside = folder.name
            yield found


def _look_at(data_folder: Path, folder: FolderFiles, keys: DataKeys) -> Found | None:
    """The trajectory that a folder is, if it is one. Raises RefusedError."""
    if folder.error:
        return Found(_trajectory(data_folder, folder.path, folder.name, "", keys), "", "") if folder.name else None
    layouts = {} if _is_gnm(folder) else layouts_of(folder.path, folder.files, keys)
    if not folder.name:
        layouts = {name: sign for name, sign in layouts.items() if not sign.startswith("mav0/")}  # mav0/ is one below
    if len(layouts) > 1:
        signs = " and ".join(f"layout {name} ({folder.name}{sign})" for name, sign in layouts.items())
        raise RefusedError(f"{data_folder}: {folder.name or 'it'} looks like {signs}; set layout, or separate them")
    for name, sign in layouts.items():
        if not folder.name:
            raise RefusedError(
                f"data_folder {data_folder} is itself a trajectory (layout {name}: {sign}); data_folder is the folder "
                "above the trajectories"
            )
        return Found(_trajectory(data_folder, folder.path, folder.name, name, keys), name, f"{folder.name}{sign}")
    holds_pictures = any(map(re.compile(keys.frame_pattern).fullmatch, folder.files))
    if not folder.name or _is_gnm(folder) or keys.layout not in ("auto", "custom") or not holds_pictures:
        return None
    found = _trajectory(data_folder, folder.path, folder.name, "custom", keys)
    return Found(found, "custom", "" if found.lacks_poses else f"{folder.name} and {_table_apart(found, keys)}")


def _is_gnm(folder: FolderFiles) -> bool:
    return any(file.lower() in POSE_FILES for file in folder.files)


def _trajectory(data_folder: Path, path: Path, folder_name: str, layout: str, keys: DataKeys) -> Trajectory:
    """`folder_name` is relative to data_folder; a sequence of KITTI is not called after the folder of all sequences."""
    name = recordable_name(folder_name.rstrip("/"))
    *above, group, last = ["", *name.split("/")]
    if layout == "kitti" and group == KITTI_GROUP:
        name = "/".join([*above[1:], last])
    found = Trajectory(name, path, format="frames", data_folder=data_folder)
    return found._replace(lacks_poses=bool(layout) and not _has_poses(found, layout, keys))


def _has_poses(trajectory: Trajectory, layout: str, keys: DataKeys) -> bool:
    try:
        return pose_path(trajectory, LAYOUTS[layout], keys) is not None
    except (InputError, OSError):
        return True  # it fails with that reason


def _table_apart(trajectory: Trajectory, keys: DataKeys) -> Path | None:
    if keys.poses_folder is None or trajectory.data_folder is None:
        return None
    return table_apart(trajectory.data_folder, trajectory.name, keys.poses_folder, POSE_SUFFIXES)


def pose_path(trajectory: Trajectory, layout: Layout, keys: DataKeys) -> str | None:
    """The trajectory's file of poses, relative to its folder, absolute where poses_folder holds it; None for none."""
    if keys.poses_folder is not None:
        table = _table_apart(trajectory, keys)
        return None if table is None else os.path.abspath(table)
    place = Place(trajectory.path, trajectory.name)
    if keys.pose_file is not None:
        return keys.pose_file if os.path.lexists(trajectory.path / keys.pose_file) else None
    return layout.pose_file(place, keys)


def locate_frames(data_folder: Path, name: str) -> Trajectory:
    """The trajectory of that name: its folder, or KITTI's among the sequences. InputError where there is none."""
    above, _, last = name.rpartition("/")
    for folder_name in (name, f"{above}/{KITTI_GROUP}/{last}".lstrip("/")):
        path = data_folder / folder_name
        if path.is_dir():
            layout = next(iter(layouts_of(path, os.listdir(path), DEFAULT_KEYS)), "custom")
            return _trajectory(data_folder, path, folder_name, layout, DEFAULT_KEYS)._replace(name=name)
    raise InputError(f"{data_folder} has no folder {name}")


def axes_of(layout: Layout, keys: DataKeys) -> str:
    """The axes in force: the layout's own, unless pose_axes is set to others than its default."""
    return layout.axes if keys.pose_axes == DEFAULT_KEYS.pose_axes else keys.pose_axes


class FramesSource:
    """frames: pictures in files of their own, and one file of poses."""

    def __init__(self, trajectory: Trajectory, keys: DataKeys):
        files = os.listdir(trajectory.path)
        layouts = layouts_of(trajectory.path, files, keys)
        if len(layouts) > 1:
            raise InputError(f"{trajectory.name}: looks like layout {' and '.join(layouts)}; set layout")
        self._layout_name = next(iter(layouts), "custom" if keys.layout == "auto" else keys.layout)
        self._layout = LAYOUTS[self._layout_name]
        self._keys = keys._replace(pose_axes=axes_of(self._layout, keys))
        self._name, self._place = trajectory.name, Place(trajectory.path, trajectory.name)
        self._pictures, self._times, self._lists = self._layout.pictures(self._place, self._keys)
        self._pose_file = pose_path(trajectory, self._layout, self._keys)

    def checksum(self, kind: ChecksumKind) -> str:
        """Over the layout, the bytes of the file of poses and of lists, and the pictures' names and sizes (`stat`) or
        bytes (`content`)."""
        digest = hashlib.sha256(f"{kind} {self._layout_name}".encode())
        for file in filter(None, (self._pose_file, *self._lists)):
            name = os.path.basename(file) if os.path.isabs(file) else file
            digest.update(f"\n{name}\n".encode("utf-8", "surrogateescape"))
            digest.update(read_file(self._place.folder / file))
        names_and_sizes = "".join(f"\n{picture.file}\n{picture.size}\n" for picture in self._pictures)
        digest.update(names_and_sizes.encode("utf-8", "surrogateescape"))
        if kind == "content":
            for picture in self._pictures:
                if picture.size >= 0:
                    digest.update(read_file(self._place.folder / picture.file))
        return digest.hexdigest()[:16]

    def poses(self, *, required: bool) -> Poses:
        """Poses of the pictures, by row or interpolated at their times."""
        if self._pose_file is None and required:
            expected = self._keys.pose_file or self._layout.expected
            raise InvalidDataError(f"{self._name}: no file of poses; expected {expected} (layout {self._layout_name})")
        self._check_pictures()
        numbers = np.arange(len(self._pictures), dtype=np.int64)
        if self._pose_file is None:
            extra = columns_asked_for(self._name, {}, self._keys.extra_keys)
            return Poses(numbers, None, None, times=self._times, extra=extra)
        table, files = self._read_poses()
        is_custom = self._layout_name == "custom"
        by_time = self._layout.by_time or (
            is_custom and (self._keys.pose_match == "time" or self._keys.frame_times is not None)
        )
        return self._at_times(numbers, table) if by_time else self._by_row(numbers, table, files)

    @property
    def _pose_where(self) -> str:
        """It, for messages: in the trajectory's folder, or elsewhere."""
        if os.path.isabs(self._pose_file):
            return f"{self._name}: {recordable_name('/'.join(Path(self._pose_file).parts[-2:]))}"
        if self._pose_file.startswith("../"):
            return f"{self._name}: {recordable_name(self._pose_file.replace('../', ''))}"
        return self._place.where(self._pose_file)

    def _check_pictures(self) -> None:
        for picture in self._pictures:
            if picture.size < 0:
                named = f", which {self._lists[0]} names," if self._lists else ""
                raise InvalidDataError(
                    f"{self._place.where(picture.file)}: this picture{named} is no file that is there"
                )
        if self._times is not None:
            rising(self._place.where(self._lists[0] if self._lists else "pictures"), "time", self._times)

    def _read_poses(self) -> tuple[Poses, list[str] | None]:
        """One a row of the file; and the pictures that its rows name, if those of a custom table do."""
        if self._layout.poses is not None:
            return self._layout.poses(self._place, self._pose_file, self._pose_where, self._keys), None
        columns = read_columns(self._place.folder / self._pose_file, self._pose_where, self._keys)
        files = columns.get("file") if self._layout_name == "custom" else None
        is_text = files is not None and files.dtype.kind == "U"  # arrays of numbers name none
        return poses_of(self._pose_where, columns, self._keys), files.tolist() if is_text else None

    def _by_row(self, numbers: np.ndarray, table: Poses, files: list[str] | None) -> Poses:
        """`files`: the picture of each row, where the rows name them."""
        if files is not None:
            numbers = rows_of_files(self._place, self._pose_file, files, self._pictures)
        elif len(table.position) != len(numbers):
            hint = "; with pose_match: time they are found by time" if table.times is not None else ""
            raise InvalidDataError(
                f"{self._name}: {len(numbers)} pictures ({self._pictures[0].file} ... {self._pictures[-1].file}) but "
                f"{len(table.position)} poses in {os.path.basename(self._pose_file)}{hint}"
            )
        times = table.times if self._times is None else self._times[numbers]
        without = len(self._pictures) - len(numbers)
        notes, extra = self._notes(without), self._extra()
        return table._replace(frame_index=numbers, times=times, num_without=without, notes=notes, extra=extra)

    def _extra(self) -> dict[str, np.ndarray]:
        """The columns that extra_keys names, by row of the file of poses."""
        if not self._keys.extra_keys:
            return {}
        return extra_columns(self._place.folder / self._pose_file, self._pose_where, self._keys)

    def _at_times(self, numbers: np.ndarray, table: Poses) -> Poses:
        if table.times is None:
            raise InvalidDataError(f"{self._pose_where}: has no timestamp, by which poses are found here")
        try:
            times = snapped(self._times, table.times)
            poses = poses_at(self._name, numbers, times, table, self._keys.max_pose_gap_s)
        except InputError as error:
            likely = likely_time_scale(table.times, self._times, self._keys.time_scale)
            raise InputError(
                f"{error}{likely or '. Where their clocks differ, time_offset is added to poses'}"
            ) from error
        extra = {key: self._between(key, values, table, poses) for key, values in self._extra().items()}
        return poses._replace(times=self._times[poses.frame_index], notes=self._notes(poses.num_without), extra=extra)

    def _between(self, key: str, values: np.ndarray, table: Poses, poses: Poses) -> np.ndarray:
        """A column at the frames' times, on the line between two rows. Raises InvalidDataError."""
        rows = checked_extra(self._pose_where, key, values, len(table.times)).reshape(len(table.times), -1)
        between = np.stack([np.interp(poses.times, table.times, column) for column in rows.T], axis=1)
        return between.reshape(len(between), *np.shape(values)[1:])

    def _notes(self, without: int) -> tuple[Note, ...]:
        what = "trajectories have pictures without a pose, which are left out"
        return (Note(what, f"{without} of {len(self._pictures)}"),) if without else ()

    def open_frames(self, numbers: Sequence[int]) -> FrameReader:
        return FileFrames(
            path_of=lambda number: f"{self._place.folder}/{self._pictures[number].file}",
            name_of=lambda number: self._place.where(self._pictures[number].file),
        )


def snapped(times: np.ndarray, at: np.ndarray) -> np.ndarray:
    """(n,) [s]: the times, those of a pose exactly where they are the same but for rounding: seconds since 1970 are
    known to 0.2 us, in which a drone flies some um."""
    after = np.searchsorted(at, times).clip(1, max(1, len(at) - 1))
    nearest = np.where(
        np.abs(at[after - 1] - times) <= np.abs(at[after.clip(max=len(at) - 1)] - times), after - 1, after
    )
    nearest = at[nearest.clip(max=len(at) - 1)]
    return np.where(np.abs(nearest - times) <= SAME_TIME_S, nearest, times)


def _signs(folder: FolderFiles, is_top: bool) -> list[str]:
    if _is_gnm(folder):
        return []
    return list(layouts_of(folder.path, folder.files, DEFAULT_KEYS).values())[:1]


def _hints(folder: FolderFiles, keys: DataKeys) -> list[str]:
    """Pictures, where a setting says that poses lie elsewhere than in gnm."""
    return [file for file in folder.files if re.fullmatch(keys.frame_pattern, file)]


FORMAT = Format(
    find=find_frames,
    locate=locate_frames,
    open=FramesSource,
    settings=(
        *("frame_pattern", "image_key", "time_scale", "max_pose_gap_s", "layout", "pose_file", "pose_columns"),
        *("pose_match", "poses_folder", "time_offset", "frame_times", "extra_keys"),
    ),
    trajectory="a folder of pictures with a file of poses (poses.csv beside images/; KITTI, TUM, EuRoC, TartanAir)",
    signs=_signs,
    hints=_hints,
    frames="files",
)
