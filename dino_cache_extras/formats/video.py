"""Video files with poses beside them, as phones and drones give them."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from dino_cache import (
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
    columns_asked_for,
    open_regular,
    read_file,
    recordable_name,
    walk_folders,
)
from dino_cache_extras.formats.frame_layouts import Place, only_match, read_times
from dino_cache_extras.formats.playlists import PLAYLIST_SUFFIX, is_playlist, segments_of
from dino_cache_extras.formats.pose_files import (
    extra_columns,
    likely_time_scale,
    pose_table,
    poses_inside,
    read_rows,
    table_apart,
)
from dino_cache_extras.formats.pose_rows import rising
from dino_cache_extras.formats.pose_times import SAME_TIME_S, are_between, poses_at
from dino_cache_extras.formats.video_frames import (
    VIDEO_TOLERANCE,
    VideoFrames,
    changed_picture,
    frame_times,
    video_times,
)
from progress_utils import RefusedError, open_library

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", PLAYLIST_SUFFIX)
POSE_SUFFIXES = (".csv", ".txt")
VIDEO_STEM = "video"  # of a folder's only video, whose poses are poses.csv or .txt, or video.csv or .txt
POSE_STEM = "poses"
TIME_ZEROS = {"first_frame": "the first frame shown", "container": "0 s on the container's clock"}
CLOCK_STEP_S = 1e-3  # what containers round times to


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
    be listed is yielded as a trajectory, so that it fails with that reason.

    Raises:
        RefusedError: two videos have one table in `poses_folder`.
    """
    open_library("av")
    tables: dict[Path, str] = {}  # of poses_folder -> whose poses they are
    for folder in walk_folders(data_folder):
        if folder.error and folder.name:
            yield Trajectory(recordable_name(folder.name.rstrip("/")), folder.path / VIDEO_STEM, format="video")
        for found, file, pose_file in video_files(folder):
            name, table = recordable_name(found), None if pose_file is None else folder.path / pose_file
            if spec.poses_folder is not None:
                table = table_apart(data_folder, name, spec.poses_folder, POSE_SUFFIXES)
                if table is not None and (other := tables.setdefault(table, name)) != name:
                    raise RefusedError(f"{table}: would be the poses of {other} and of {name}; rename them")
            yield Trajectory(name, folder.path / file, table is None, format="video", data_folder=data_folder)


def locate_video(data_folder: Path, name: str) -> Trajectory:
    """The video of that name, a file's or its folder's; InputError where there is none."""
    path = data_folder / name
    for folder, prefix in ((path, f"{name}/"), (path.parent, name[: -len(path.name)])):
        if folder.is_dir():
            for found, file, pose_file in video_files(FolderFiles(prefix, folder, sorted(os.listdir(folder)))):
                if found == name:
                    return Trajectory(name, folder / file, pose_file is None, format="video", data_folder=data_folder)
    raise InputError(f"{data_folder} has no video {name}")


class VideoSource:
    """video: one file, its poses in a table beside it, with times of the video's clock."""

    def __init__(self, trajectory: Trajectory, keys: DataKeys):
        self._name, self._path, self._keys = trajectory.name, trajectory.path, keys
        self._place = Place(self._path.parent, self._name)
        folder = FolderFiles("/", self._path.parent, sorted(os.listdir(self._path.parent)))
        pose_files = {file: pose_file for _, file, pose_file in video_files(folder)}
        pose_file = pose_files.get(self._path.name)
        self._pose_path = self._path.parent / pose_file if pose_file else None
        if keys.poses_folder is not None:
            self._pose_path = table_apart(trajectory.data_folder, self._name, keys.poses_folder, POSE_SUFFIXES)

    def checksum(self, kind: ChecksumKind) -> str:
        """Over the bytes of the pose file and of a playlist, and the video's size (`stat`) or bytes (`content`)."""
        digest = hashlib.sha256(f"{kind} {self._path.suffix} {os.stat(self._path).st_size}".encode())
        if self._pose_path is not None:
            digest.update(self._pose_path.suffix.encode())
            digest.update(read_file(self._pose_path))
        if self._times_file is not None:
            digest.update(b"\ntimes\n" + read_file(self._path.parent / self._times_file).tobytes())
        files = [self._path]
        if is_playlist(self._path):
            digest.update(read_file(self._path))
            files = segments_of(self._path)
            digest.update("".join(f"\n{os.stat(file).st_size}" for file in files).encode())
        for file in files if kind == "content" else ():
            with open(open_regular(file), "rb") as stream:
                hashlib.file_digest(stream, lambda: digest)  # goes on with it
        return digest.hexdigest()[:16]

    @functools.cached_property
    def _times_file(self) -> str | None:
        """The table of the frames' own times. Raises InputError where there is not one."""
        return None if self._keys.frame_times is None else only_match(self._place, self._keys.frame_times)

    def poses(self, *, required: bool) -> Poses:
        """Of the frames between the first and the last pose, interpolated: position on a line, yaw the shorter way."""
        times = self._times(self._keys.time_zero)
        if self._pose_path is None and required:
            raise InputError(f"{self._name}: no poses beside {self._path.name}; expected a .csv or .txt file")
        if self._pose_path is None:
            extra = columns_asked_for(self._name, {}, self._keys.extra_keys)
            return Poses(np.arange(len(times), dtype=np.int64), None, None, times=times, extra=extra)
        rows = read_rows(self._pose_path, self._name, self._keys)
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
        points = np.stack([table["x"], table["y"]], axis=1)
        all_poses = Poses(np.arange(len(at)), points, table["yaw"], table.get("height"), at)
        numbers = np.arange(len(times), dtype=np.int64)
        poses = poses_at(self._name, numbers, times, all_poses, math.inf)  # however far apart they are
        extra = extra_columns(rows, self._keys.extra_keys)
        return poses._replace(
            notes=self._notes(at),
            extra={key: np.interp(poses.times, at, column) for key, column in extra.items()},
        )

    def _times(self, zero: str) -> np.ndarray:
        """(n,) [s] of the frames shown: by their own table, else counted from the first one or on the container's
        clock."""
        times = frame_times(self._path)
        if len(times) == 0:
            raise InputError(f"{self._name}: {self._path.name} holds no frames")
        if self._times_file is not None:
            own, _ = read_times(self._place, self._times_file, self._keys)
            if len(own) != len(times):
                raise InvalidDataError(
                    f"{self._name}: {len(times)} frames in {self._path.name} but {len(own)} times in {self._times_file}"
                )
            return rising(self._place.where(self._times_file), "time", own)
        return times - times[0] if zero == "first_frame" else times

    @property
    def _counted(self) -> str:
        if self._times_file is not None:
            return f"by {recordable_name(self._times_file)}"
        return f"counted from {TIME_ZEROS[self._keys.time_zero]} (time_zero: {self._keys.time_zero})"

    def _check_some_between(self, times: np.ndarray, at: np.ndarray) -> None:
        """Raise InputError unless some frame has a pose before and after it."""
        if are_between(times, at).any():
            return
        other = next(zero for zero in TIME_ZEROS if zero != self._keys.time_zero)
        others = np.count_nonzero(are_between(self._times(other), at))
        raise InputError(
            f"{self._name}: no frame lies between the first pose ({at[0]:.3f} s) and the last ({at[-1]:.3f} s); "
            f"the video's frames are at {times[0]:.3f} to {times[-1]:.3f} s, {self._counted}"
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
        if self._times_file is None and abs(first_s) > (np.median(np.diff(times)) / 2 if len(times) > 1 else 0.0):
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


def _signs(folder: FolderFiles, is_top: bool) -> list[str]:
    return [f"{file} and {pose_file}" for _, file, pose_file in video_files(folder) if pose_file is not None]


def _hints(folder: FolderFiles, keys: DataKeys) -> list[str]:
    return [file for _, file, _ in video_files(folder)]


FORMAT = Format(
    find=find_videos,
    locate=locate_video,
    open=VideoSource,
    settings=("time_zero", "time_scale", "poses_folder", "time_offset", "frame_times", "extra_keys"),
    trajectory="<name>.mp4 with <name>.csv or .txt, or a folder with video.mp4 and poses.csv or .txt",
    signs=_signs,
    hints=_hints,
    pairing=2,
    mispaired=lambda source, spec: source.mispaired(spec),
)
