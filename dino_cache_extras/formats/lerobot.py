"""LeRobot: episodes in parquet files, frames in videos, in the parquet files, or in files of their own."""

from __future__ import annotations

import contextlib
import functools
import hashlib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dino_cache import (
    KEY_SETTINGS,
    LOG,
    LOST_MOUNT_ERRNOS,
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
    camera_name,
    checked_numbers,
    columns_asked_for,
    data_keys,
    recordable_name,
)
from dino_cache_extras.formats.lerobot_checks import video_extent
from dino_cache_extras.formats.lerobot_dataset import LeRobotDataset
from dino_cache_extras.formats.lerobot_files import PictureFiles, holds_pictures, picture_files
from dino_cache_extras.formats.lerobot_parquet import (
    ParquetFrames,
    add_images,
    column_of_numbers,
    parquet_columns,
    parquet_errors,
    parquet_names,
    whole_numbers,
)
from dino_cache_extras.formats.lerobot_poses import (
    are_pose_matrices,
    frame_times,
    part_of,
    read_poses,
    refuse_half_velocities,
    refuse_other_kind,
)
from dino_cache_extras.formats.lerobot_roots import (
    LEROBOT_INFO,
    OpenedRoots,
    Root,
    episode_name,
    episode_of,
    find_roots,
    located_episode,
    unreadable_root,
)
from dino_cache_extras.formats.lerobot_tasks import episode_task
from dino_cache_extras.formats.video_frames import VIDEO_TOLERANCE, VideoFrames, changed_picture, packet_index, packets
from progress_utils import RefusedError, open_library

if TYPE_CHECKING:
    import pyarrow


_LEROBOT_DATASETS = OpenedRoots(LeRobotDataset, 50_000, lambda dataset: 50 + dataset.num_episodes)


def lerobot_dataset(root: Path) -> LeRobotDataset:
    """A dataset's meta data, kept while they are among those used last; `find_lerobot` reads them anew."""
    return _LEROBOT_DATASETS(root)


def guess_lerobot_keys(data_folder: Path, spec: CacheSpec) -> dict[str, str | dict[str, str] | None]:
    """The features that are read now, in all roots: those set, else those guessed for the first one that has them.

    Raises:
        RefusedError: the meta data are unreadable, or no key fits.
    """
    given, errors = data_keys(spec), []
    for root in find_roots(data_folder):
        try:
            dataset = _LEROBOT_DATASETS.anew(root.path)
            keys = dataset.resolve_keys(given, poses_required=spec.chunk_by == "distance")
            pose_keys = dataset.pose_keys(keys)
            for setting, key in zip(("position_key", "yaw_key"), pose_keys):
                if key is not None:
                    refuse_other_kind(setting, key, integrate=spec.integrate)
            if spec.integrate:
                refuse_half_velocities(str(root.path), *pose_keys)
            image = dict(keys.image) if isinstance(keys.image, tuple) else keys.image
            return dict(zip(KEY_SETTINGS, (image, *keys[1:])))
        except (InputError, RefusedError) as error:
            errors.append(error)
    if not errors:
        lerobot_dataset(data_folder)  # raises the reason why there is no root
    others = f"; {len(errors) - 1} other datasets below {data_folder} cannot be read so either"
    raise RefusedError(f"{errors[0]}{others if len(errors) > 1 else ''}") from errors[0]


def find_lerobot(data_folder: Path, spec: CacheSpec) -> Iterator[Trajectory]:
    """The episodes of all datasets. A root below data_folder whose meta data cannot be read is one that fails.

    Raises:
        RefusedError: nothing can be read, or no key fits.
    """
    open_library("av")
    image, position, yaw = guess_lerobot_keys(data_folder, spec).values()
    num_roots = num_read = 0
    for root in find_roots(data_folder):
        num_roots += 1
        try:
            dataset = _LEROBOT_DATASETS.anew(root.path)
        except RefusedError:
            if not root.name:
                raise
            yield unreadable_root(root)
            continue
        num_read += 1
        if num_read == 1:
            _announce(data_folder, root, dataset, image, position, yaw, spec)
        for number in dataset.episode_numbers:
            yield episode_of(root, number)
    if num_roots > 1:
        unread = f", {num_roots - num_read} of them unreadable" if num_read < num_roots else ""
        LOG.info("%s: %d LeRobot datasets below it%s", data_folder, num_roots, unread)


def _announce(data_folder: Path, root: Root, dataset: LeRobotDataset, *what: Any) -> None:
    """Say what is read."""
    image, position, yaw, spec = what
    poses = f"poses from {position} and {yaw}" if position or yaw else "no poses"
    where = f"{data_folder}: {recordable_name(root.name)} and those beside it:" if root.name else f"{data_folder}:"
    images = ", ".join(image.values()) if isinstance(image, dict) else image
    LOG.info("%s LeRobot %s, frames from %s, %s", where, dataset.version, images, poses)
    if spec.integrate:
        LOG.warning(
            "%s: integrate: true: POSES ARE ADDED UP from velocities (%s, %s) and drift; distances and headings are as "
            "good as those", data_folder, position, yaw,
        )  # fmt: skip


def locate_lerobot(data_folder: Path, name: str) -> Trajectory:
    """The episode of that name; InputError where it is not an episode's."""
    return located_episode(data_folder, name)


def _opened(trajectory: Trajectory) -> LeRobotDataset:
    """A trajectory's dataset. Raises InputError where its meta data cannot be used, OSError where the disk is gone."""
    try:
        return lerobot_dataset(trajectory.path)
    except RefusedError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in LOST_MOUNT_ERRNOS:
            raise OSError(
                cause.errno, cause.strerror, cause.filename
            ) from None  # anew: a cause's cause must not be itself
        raise InputError(f"{trajectory.name}: {error}") from error


class LeRobotSource:
    """lerobot: the rows of one episode, and its frames."""

    def __init__(self, trajectory: Trajectory, keys: DataKeys):
        self._name, self._dataset = trajectory.name, _opened(trajectory)
        self._episode = self._dataset.episode(trajectory.episode)
        self._keys, self._settings = self._dataset.resolve_keys(keys, poses_required=False), keys
        self._pose_keys = self._dataset.pose_keys(self._keys)
        self._cameras = keys._replace(image_key=self._keys.image).keys_of_cameras  # camera -> its feature
        self._names = {key: camera_name(self._name, camera) for camera, key in self._cameras.items()}
        self._data_file = self._dataset.data_file(self._episode)

    def _kind(self, key: str) -> str:
        """Where the frames of an image key are: in a `video`, in `rows` of the parquet file, or in `files`."""
        folder = self._dataset.picture_folder(self._episode, key)
        dtype = self._dataset.features.get(key, {}).get("dtype")
        if dtype == "video":
            is_here = folder is None or self._dataset.has_video(self._episode, key)
            return "video" if is_here or not holds_pictures(folder) else "files"
        if dtype == "image" and (folder is None or key in parquet_names(self._data_file) or not folder.is_dir()):
            return "rows"
        return "files"

    @functools.cached_property
    def _kinds(self) -> dict[str, str]:
        return {key: self._kind(key) for key in self._cameras.values()}

    @functools.cached_property
    def _rows(self) -> tuple[int, pyarrow.Table]:
        """The first row of the episode in its file, and its rows."""
        names = parquet_names(self._data_file)
        numbering = [name for name in ("episode_index", "frame_index") if self._dataset.needs_column(name, names)]
        wanted = {*numbering, *(key.feature for key in self._pose_keys if key is not None)}
        is_timed = self._settings.integrate or "files" in self._kinds.values()
        if "video" in self._kinds.values() or (is_timed and "timestamp" in names):
            wanted.add("timestamp")
        wanted |= self._extra_columns(names)
        table = parquet_columns(self._data_file, tuple(sorted(wanted) or sorted(names)[:1]))
        rows = np.arange(len(table))
        if "episode_index" in numbering:
            rows = np.flatnonzero(whole_numbers(self._data_file, table, "episode_index") == self._episode.index)
        count, length = len(rows), self._episode.length
        if count != length or count == 0 or rows[-1] - rows[0] != count - 1:
            raise InvalidDataError(
                f"{self._name}: {self._data_file} has {count} rows of it in one piece, expected {length}"
            )
        table = table.slice(rows[0], count)
        if "frame_index" in numbering and not np.array_equal(
            whole_numbers(self._data_file, table, "frame_index"), np.arange(count)
        ):
            raise InvalidDataError(f"{self._name}: {self._data_file}: its frame_index is not 0 to {count - 1}")
        return int(rows[0]), table

    def _extra_columns(self, present: Collection[str]) -> set[str]:
        """Names of columns that extra_keys names, none of them pictures. Raises InvalidDataError."""
        keys, features = self._settings.extra_keys, self._dataset.features
        if pictures := [key for key in keys if features.get(key, {}).get("dtype") in ("image", "video")]:
            raise InvalidDataError(f"{self._where}: {pictures[0]} holds pictures; extra_keys names columns of numbers")
        return {*columns_asked_for(self._where, dict.fromkeys(sorted(present)), keys)}

    @property
    def _where(self) -> str:
        return f"{self._name} ({self._data_file})"

    def _column(self, key: str) -> dict[str, Any]:
        return {key: self._values(key)}

    def _values(self, key: str) -> list[Any]:
        column = self._rows[1][key]
        try:
            with parquet_errors(self._data_file):
                return column.to_pylist()
        except (ValueError, OverflowError) as error:  # text that is no UTF-8, times that Python does not have
            raise InputError(f"{self._where}: {key}: cannot be read as {column.type}: {str(error)[:200]}") from error

    def poses(self, *, required: bool) -> Poses:
        """Of every row of the episode: position (T, 2), in the data's unit, yaw (T,) [rad] and times (T,) [s].

        Raises:
            InputError: rows, pictures or meta data contradict each other; poses are missing or no poses.
            OSError: a file cannot be read.
        """
        position, yaw = self._pose_keys
        self._dataset.refuse_contradiction(self._episode)
        if required and None in self._pose_keys:
            raise InputError(f"{self._name}: has no position and yaw; set position_key and yaw_key")
        for setting, key in (("position_key", position), ("yaw_key", yaw)):
            if key is not None:
                refuse_other_kind(setting, key, integrate=self._settings.integrate)
        for key, kind in self._kinds.items():
            if kind == "files":
                self._picture_files(key)
        times = self.times()
        poses = read_poses(self._where, position, yaw, self._values, self._settings, times)
        table = self._rows[1]
        with parquet_errors(self._data_file):
            extra = {key: column_of_numbers(f"{self._where}: {key}", table[key]) for key in self._settings.extra_keys}
        task, notes = self._told()
        numbers = np.arange(self._episode.length, dtype=np.int64)
        return poses._replace(frame_index=numbers, times=times, extra=extra, task=task, notes=(*poses.notes, *notes))

    def _told(self) -> tuple[str | None, list[Note]]:
        """The episode's task, and what is to be said where it cannot be read: nothing else needs it."""
        try:
            return self.task(), []
        except InputError as error:
            return None, [Note("episodes have a task that cannot be read, and none is stored", str(error))]

    def times(self) -> np.ndarray:
        """(T,) [s] of the rows, from the episode's begin."""
        first, table = self._rows
        stamps = None
        if "timestamp" in table.column_names:
            stamps = self._values("timestamp")
        elif "timestamp" in parquet_names(self._data_file):  # not in the checksum: it has never been for images in rows
            column = parquet_columns(self._data_file, ("timestamp",)).slice(first, len(table))["timestamp"]
            with contextlib.suppress(ValueError, OverflowError), parquet_errors(self._data_file):
                stamps = column.to_pylist()
        return frame_times(stamps, self._episode.length, self._dataset.fps)

    def task(self) -> str | None:
        """What the robot was told to do."""
        return episode_task(self._dataset, self._episode)

    def _picture_files(self, key: str) -> PictureFiles:
        """An image key's frames where they are files. Raises InvalidDataError where they are not as many as rows."""
        folder = self._dataset.picture_folder(self._episode, key)
        lengths = self._dataset.lengths_beside(self._episode)
        files = picture_files(self._name, folder, self._dataset.root, self._episode.index, lengths)
        return PictureFiles(folder, self._names[key], files)

    def _video_times(self, key: str) -> np.ndarray:
        """(T,) [s] on its video's clock of each row. The rows must fill the episode's part of the video."""
        start_s, stop_s, zero_s = self._part_of_video(key)
        name = self._names[key]
        times = start_s + checked_numbers(self._name, self._column("timestamp"), "timestamp", self._episode.length)
        if (np.diff(times) <= 0).any():
            raise InvalidDataError(
                f"{self._name}: its timestamps do not rise, at row {int(np.argmin(np.diff(times))) + 1}"
            )
        file = recordable_name(self._dataset.video_file(self._episode, key).name)
        last = f"its last row is at {times[-1]:.3f} s of {file}"
        frame_s, is_shared = 1 / self._dataset.fps, self._dataset.version == "v3.0"
        if is_shared and times[-1] > stop_s - frame_s / 2:  # else decoding tells the first one missing
            raise InvalidDataError(f"{name}: {last}, in which it ends at {stop_s:.3f} s: fewer frames than poses")
        if times[-1] + frame_s < stop_s - frame_s / 2:
            raise InvalidDataError(f"{name}: {last}, in which it ends at {stop_s:.3f} s: more frames than poses")
        return times + zero_s

    def _part_of_video(self, key: str) -> tuple[float, float, float]:
        """Where the episode begins and ends in its video [s], and what to add for the container's clock: times are
        counted from the first frame shown."""
        dataset = self._dataset
        start_s, stop_s = dataset.video_span(self._episode, key)
        if dataset.version != "v3.0":
            extent = video_extent(dataset.video_file(self._episode, key))
            return 0.0, extent.last_s - extent.first_s + 1 / dataset.fps, extent.first_s
        spans = dataset.spans_beside(self._episode, key)
        if fault := spans.fault(episode_name(self._episode.index)):
            raise InvalidDataError(f"{self._names[key]}: {fault}: its frames may be another episode's")
        return start_s, stop_s, spans.zero_s

    def mispaired(self, spec: CacheSpec) -> str | None:
        """Why what 0.2.0 made is not what is made now: it believed meta data that contradict themselves, and counted
        times on the container's clock alone."""
        try:
            self._dataset.refuse_contradiction(self._episode)
            for key in self._videos:
                self._video_times(key)
        except InvalidDataError as error:
            return f"its frames may be another's: {error}"
        for key, file in self._videos.items():
            *_, zero_s = self._part_of_video(key)
            if abs(zero_s) > VIDEO_TOLERANCE / self._dataset.fps:
                return f"its times were counted on the clock of {file.name}, which begins at {zero_s:.3f} s"
            if changed := changed_picture(file, spec):
                return changed
        return None

    @property
    def _videos(self) -> dict[str, Path]:
        """Image key -> video, of those whose frames are in one."""
        return {
            key: self._dataset.video_file(self._episode, key) for key, kind in self._kinds.items() if kind == "video"
        }

    def open_frames(self, numbers: Sequence[int], camera: str | None = None) -> FrameReader:
        """Frames of one camera; `camera`: which, where image_key names several."""
        key = self._cameras[camera]
        kind = self._kinds[key]
        if kind == "rows":
            return ParquetFrames(self._data_file, key, self._names[key], self._rows[0])
        if kind == "files":
            return self._picture_files(key)
        times = self._video_times(key)[list(numbers)].tolist()
        tolerance = VIDEO_TOLERANCE / self._dataset.fps
        return VideoFrames(self._videos[key], self._names[key], numbers, times, tolerance)

    def checksum(self, kind: ChecksumKind) -> str:
        """Over the rows read, and the sizes (`stat`) or bytes (`content`) of the frames as they are stored: what is
        appended to a file that episodes share is not theirs."""
        digest = hashlib.sha256(f"{kind} {self._keys} {self._episode}".encode())
        _, table = self._rows
        position, has_matrices = self._pose_keys[0], False
        for key in table.column_names:
            values = self._values(key)
            digest.update(repr(values).encode("utf-8", "surrogatepass"))
            if position is not None and key == position.feature:
                has_matrices = are_pose_matrices(part_of(self._name, position, values))
        if has_matrices:  # of caches from before, which took the first two of 16 numbers for x and y, nothing stays
            digest.update(b"4 x 4")
        for key in self._cameras.values():
            self._add_frames(digest, key, kind)
        return digest.hexdigest()[:16]

    def _add_frames(self, digest: hashlib._Hash, key: str, kind: ChecksumKind) -> None:
        if self._kinds[key] == "rows":
            first, table = self._rows
            add_images(digest, self._data_file, key, first, len(table), kind)
        elif self._kinds[key] == "files":
            self._picture_files(key).add_to(digest, kind)
        elif kind == "stat":
            times, sizes = packet_index(self._videos[key])
            digest.update(sizes[self._is_inside(times, key)])
        else:
            first_dts = None
            for packet, time_base in packets(self._videos[key], self._name):
                first_dts = packet.dts if first_dts is None else first_dts
                if self._is_inside(np.array([(packet.dts - first_dts) * float(time_base)]), key)[0]:
                    digest.update(bytes(packet))

    def _is_inside(self, times: np.ndarray, key: str) -> np.ndarray:
        """Whether packets at these times, in the order of decoding, are the episode's."""
        start_s, stop_s = self._dataset.video_span(self._episode, key)
        early_s = 0.5 / self._dataset.fps
        return (times >= start_s - early_s) & (times < stop_s - early_s)


def _signs(folder: FolderFiles, is_top: bool) -> list[str]:
    return [LEROBOT_INFO] if (folder.path / LEROBOT_INFO).is_file() else []


FORMAT = Format(
    find=find_lerobot,
    locate=locate_lerobot,
    open=LeRobotSource,
    settings=(*KEY_SETTINGS, "integrate", "extra_keys"),
    trajectory=f"an episode of a dataset with {LEROBOT_INFO}",
    signs=_signs,
    guess=guess_lerobot_keys,
    pairing=2,
    mispaired=lambda source, spec: source.mispaired(spec),
)
