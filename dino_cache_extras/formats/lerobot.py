"""LeRobot: episodes in parquet files, frames in videos or in the parquet files."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import reprlib
import string
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dino_cache import (
    KEY_SETTINGS,
    LOG,
    MAX_POSE_NUMBERS,
    PROFILE,
    READ_TOGETHER,
    CacheSpec,
    ChecksumKind,
    DataKeys,
    FolderFiles,
    Format,
    FrameReader,
    InputError,
    InvalidDataError,
    Poses,
    Trajectory,
    camera_name,
    checked_numbers,
    checked_poses,
    data_keys,
    open_regular,
    read_file,
    recordable_name,
)
from dino_cache_extras.formats.common import FileCache, first_of
from dino_cache_extras.formats.lerobot_checks import DataFiles, VideoSpan, VideoSpans, video_extent
from dino_cache_extras.formats.video_frames import VIDEO_TOLERANCE, VideoFrames, changed_picture, packet_index, packets
from progress_utils import RefusedError, open_library

if TYPE_CHECKING:
    import pyarrow


ROWS_KEPT = 256  # images of a parquet file that were passed over and wait for the threads that want them
LEROBOT_VERSIONS = ("v2.0", "v2.1", "v3.0")
LEROBOT_INFO = "meta/info.json"
IMAGE_GUESSES = ("observation.images.front",)
POSITION_GUESSES = ("observation.filtered_position", "position")
YAW_GUESSES = ("observation.filtered_heading", "yaw")


class LeRobotKeys(NamedTuple):
    """The features that are read; None where a dataset has no base pose."""

    image: str | tuple[tuple[str, str], ...]  # of several cameras, (name, key) of each
    position: str | None
    yaw: str | None


class Episode(NamedTuple):
    """Where an episode's rows are: all of those with its number in one parquet file."""

    index: int
    length: int
    place: dict[
        str, Any
    ]  # what the templates of info.json are filled with; in v3.0 also where its videos begin and end


class LeRobotDataset:
    """What a dataset's meta folder says, v2.0 to v3.0.

    Raises:
        RefusedError: it is unreadable, or of an unknown version.
    """

    def __init__(self, root: Path):
        self.root, self._info_file = root, root / LEROBOT_INFO
        self._info = self._read_info()
        self.version: str = self._get("codebase_version", str)
        if self.version not in LEROBOT_VERSIONS:
            raise self._refusal(f"codebase_version {self.version!r}; known are {', '.join(LEROBOT_VERSIONS)}")
        self.fps: float = self._get("fps", (int, float))
        self.features: dict[str, dict[str, Any]] = self._get("features", dict)
        if not 0 < self.fps < math.inf or not all(isinstance(value, dict) for value in self.features.values()):
            raise self._refusal("fps is not a rate, or features are not described")
        self._info["video_path"] = self._info.get("video_path") or ""  # null where there are no videos
        self._templates = {kind: self._get(f"{kind}_path", str) for kind in ("data", "video")}
        for template in self._templates.values():
            self._check_template(template)
        self._episodes: dict[int, tuple[int, dict[str, Any]]] = {}
        self._faults: dict[int, str] = {}  # of episodes whose entries contradict themselves
        self._read_parquet_meta() if self.version == "v3.0" else self._read_jsonl()
        self.data_files = DataFiles(root, self._templates["data"], episodes_in)
        self._spans: dict[str, dict[Path, VideoSpans]] = {}  # camera -> video file -> where its episodes lie in it
        self._lock = threading.Lock()

    @property
    def episode_numbers(self) -> list[int]:
        return sorted(self._episodes)

    def _refusal(self, what: str) -> RefusedError:
        return RefusedError(f"{self._info_file}: {what}")

    def _read_info(self) -> dict[str, Any]:
        try:
            info = json.loads(read_file(self._info_file).tobytes())
        except (OSError, ValueError, RecursionError, InputError) as error:
            raise self._refusal(f"cannot be read: {error}") from error
        if not isinstance(info, dict):
            raise self._refusal("is not a description of a dataset")
        return info

    def _get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        value = self._info.get(key)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self._refusal(f"{key} is {reprlib.repr(value)}")
        return value

    def _check_template(self, template: str) -> None:
        fields = ("episode_chunk", "episode_index", "video_key", "chunk_index", "file_index")
        try:
            parts = list(string.Formatter().parse(template))
        except ValueError as error:
            raise self._refusal(f"template {template!r}: {error}") from error
        for _, name, width, conversion in parts:
            if name is not None and (name not in fields or conversion or not re.fullmatch(r"\d{0,2}d?", width)):
                raise self._refusal(f"template {template!r}: {name} is not known")

    def _add(self, number: Any, length: Any, place: dict[str, Any], rows: tuple[Any, Any] = (None, None)) -> None:
        """Take an episode's entry; `rows`: of the whole dataset, those that it says are the episode's."""
        if type(number) is not int or type(length) is not int or number < 0:
            raise self._refusal(f"episode {number!r} of {length!r} frames is among its episodes")
        before = self._episodes.setdefault(number, (length, place))
        if before != (length, place):
            self._faults[number] = f"meta/episodes has it twice, as {_differences(before, (length, place))}"
        if all(type(row) is int for row in rows) and rows[1] - rows[0] != length:
            self._faults[number] = f"its rows are {rows[0]} to {rows[1]} of the dataset, and its length is {length}"
        self._episodes[number] = (length, place)

    def _read_jsonl(self) -> None:
        path, chunk_size = self.root / "meta/episodes.jsonl", self._get("chunks_size", int)
        try:
            for line in read_file(path).tobytes().splitlines():
                if line.strip():
                    entry = json.loads(line)
                    index, length = entry["episode_index"], entry["length"]
                    self._add(index, length, {"episode_chunk": index // chunk_size})
        except (OSError, ValueError, KeyError, TypeError, ArithmeticError, RecursionError, InputError) as error:
            raise RefusedError(f"{path}: cannot be read: {error!r}") from error

    def _read_parquet_meta(self) -> None:
        columns = {"episode_index": "index", "length": "length"}
        columns |= {f"data/{name}": f"data {name}" for name in ("chunk_index", "file_index")}
        optional = {}
        for key, feature in self.features.items():
            if feature.get("dtype") == "video":
                names = ("chunk_index", "file_index", "from_timestamp", "to_timestamp")
                optional |= {f"videos/{key}/{name}": f"{key} {name}" for name in names}
        optional |= {f"dataset_{name}": name for name in ("from_index", "to_index")}
        files = sorted((self.root / "meta/episodes").glob("[!.]*/[!.]*.parquet"))
        if not files:
            raise self._refusal("there are no meta/episodes/*/*.parquet beside it")
        for path in files:
            try:
                present = parquet_names(path)
                wanted = columns | {name: column for name, column in optional.items() if name in present}
                rows = parquet_columns(path, tuple(wanted)).rename_columns(list(wanted.values())).to_pylist()
                for row in rows:
                    of_dataset = (row.pop("from_index", None), row.pop("to_index", None))
                    self._add(row.pop("index"), row.pop("length"), row, of_dataset)
            except (InputError, OSError, ValueError, TypeError, OverflowError) as error:
                raise RefusedError(f"{path}: cannot be read: {error}") from error

    def episode(self, number: int) -> Episode:
        if number not in self._episodes:
            raise InputError(f"{episode_name(number)}: is not among the episodes that {self._info_file} belongs to")
        length, place = self._episodes[number]
        return Episode(index=number, length=length, place=place)

    def data_file(self, episode: Episode) -> Path:
        """The parquet file with an episode's rows."""
        return self._fill("data", episode, "data")

    def video_file(self, episode: Episode, key: str) -> Path:
        """The video with an episode's frames."""
        return self._fill("video", episode, key)

    def video_span(self, episode: Episode, key: str) -> tuple[float, float]:
        """Where in its video an episode begins and ends [s]."""
        if self.version != "v3.0":
            return 0.0, math.inf
        span = [episode.place.get(f"{key} {end}") for end in ("from_timestamp", "to_timestamp")]
        if not all(type(end) in (int, float) and math.isfinite(end) for end in span):
            raise InvalidDataError(f"{episode_name(episode.index)}: it lies from {span[0]} to {span[1]} s in its video")
        return float(span[0]), float(span[1])

    def spans_beside(self, episode: Episode, key: str) -> VideoSpans:
        """Where the episodes of its video file lie in that; v3.0."""
        with self._lock:
            if key not in self._spans:
                files: dict[Path, list[VideoSpan]] = {}
                for number in self.episode_numbers:
                    with contextlib.suppress(InputError):  # one without a file or a span fails for itself
                        other = self.episode(number)
                        span = VideoSpan(episode_name(number), *self.video_span(other, key), other.length / self.fps)
                        files.setdefault(self.video_file(other, key), []).append(span)
                self._spans[key] = {path: VideoSpans(path, spans, 1 / self.fps) for path, spans in files.items()}
            return self._spans[key][self.video_file(episode, key)]

    def refuse_contradiction(self, episode: Episode) -> None:
        """Raise InputError where an episode's entries contradict each other, or its rows are in several files."""
        if fault := self._faults.get(episode.index):
            raise InvalidDataError(f"{episode_name(episode.index)}: {self.root}: {fault}")
        files = self.data_files.holding(episode.index) if self.version == "v3.0" else []
        if len(files) > 1:
            names = [recordable_name(path.relative_to(self.root).as_posix()) for path in files[:2]]
            raise InvalidDataError(
                f"{episode_name(episode.index)}: {names[0]} and {names[1]} both have rows of it, and one of them must "
                "be out of date; move that away"
            )

    def _fill(self, kind: str, episode: Episode, group: str) -> Path:
        values = {name: episode.place.get(f"{group} {name}") for name in ("chunk_index", "file_index")}
        values |= {"episode_chunk": episode.place.get("episode_chunk"), "video_key": group}
        name = episode_name(episode.index)
        try:
            path = Path(self._templates[kind].format(**values, episode_index=episode.index))
        except (ValueError, TypeError) as error:
            raise InputError(f"{name}: {kind}_path {self._templates[kind]!r} cannot be filled: {error}") from error
        if path.is_absolute() or ".." in path.parts:
            raise InputError(f"{name}: {kind}_path leads out of the dataset: {path}")
        return self.root / path

    def resolve_keys(self, given: DataKeys, *, poses_required: bool) -> LeRobotKeys:
        """The features to read: those given, else those guessed.

        Raises:
            InputError: there is none, or it is not clear which; the message lists the keys that there are.
        """
        images = [key for key, feature in self.features.items() if feature.get("dtype") in ("image", "video")]
        image = given.image_key or (images[0] if len(images) == 1 else first_of(IMAGE_GUESSES, images))
        for key in given._replace(image_key=image).keys_of_cameras.values():
            if key in images:
                continue
            raise InputError(f"image_key: {key}: {self.root} has the image keys {', '.join(images) or '(none)'}")
        others = [key for key in self.features if key not in images]
        position = given.position_key or first_of(POSITION_GUESSES, others)
        yaw = given.yaw_key or first_of(YAW_GUESSES, others)
        for setting, key in (("position_key", position), ("yaw_key", yaw)):
            if key is None and poses_required:
                raise InputError(
                    f"{setting}: {self.root} has none that is known. Set position_key and yaw_key to two of "
                    f"{', '.join(others)}; where none of them is the pose of the base, set chunk_by: frames"
                )
            if key is not None and key not in others:
                raise InputError(f"{setting}: {key}: {self.root} has the keys {', '.join(others)}")
        return LeRobotKeys(image, position, yaw)


def _differences(before: tuple[int, dict], after: tuple[int, dict]) -> str:
    """What differs between two entries of one episode, in words."""
    first, second = ({"length": length, **place} for length, place in (before, after))
    different = [key for key in first.keys() | second.keys() if first.get(key) != second.get(key)]
    return ", ".join(f"{key} {first.get(key)} and {second.get(key)}" for key in sorted(different)[:3])


def episode_name(number: int) -> str:
    """The name of an episode as a trajectory."""
    return f"episode_{number:06d}"


_LEROBOT_DATASETS: dict[Path, LeRobotDataset] = {}  # as they were when their trajectories were listed


def lerobot_dataset(root: Path) -> LeRobotDataset:
    """A dataset's meta data, read once a process; `find_lerobot` reads them anew."""
    if root not in _LEROBOT_DATASETS:
        _LEROBOT_DATASETS[root] = LeRobotDataset(root)
    return _LEROBOT_DATASETS[root]


def guess_lerobot_keys(data_folder: Path, spec: CacheSpec) -> dict[str, str | dict[str, str] | None]:
    """The features that are read now: those set, else those guessed.

    Raises:
        RefusedError: the meta data are unreadable, or no key fits.
    """
    _LEROBOT_DATASETS.pop(data_folder, None)
    dataset = lerobot_dataset(data_folder)
    try:
        keys = dataset.resolve_keys(data_keys(spec), poses_required=spec.chunk_by == "distance")
    except InputError as error:
        raise RefusedError(str(error)) from error
    image = dict(keys.image) if isinstance(keys.image, tuple) else keys.image
    return dict(zip(KEY_SETTINGS, (image, *keys[1:])))


def find_lerobot(data_folder: Path, spec: CacheSpec) -> Iterator[Trajectory]:
    """The episodes of a dataset.

    Raises:
        RefusedError: its meta data are unreadable, or no key fits.
    """
    open_library("av")
    image, position, yaw = guess_lerobot_keys(data_folder, spec).values()
    dataset = lerobot_dataset(data_folder)
    poses = f"poses from {position} and {yaw}" if position or yaw else "no poses"
    images = ", ".join(image.values()) if isinstance(image, dict) else image
    LOG.info("%s: LeRobot %s, frames from %s, %s", data_folder, dataset.version, images, poses)
    for number in dataset.episode_numbers:
        yield Trajectory(episode_name(number), data_folder, format="lerobot", episode=number)


def locate_lerobot(data_folder: Path, name: str) -> Trajectory:
    """The episode of that name; InputError where it is not an episode's."""
    number = re.fullmatch(r"episode_(\d{6,18})", name)
    if not number:
        raise InputError(f"{name} is not the name of an episode")
    return Trajectory(name, data_folder, format="lerobot", episode=int(number[1]))


@contextlib.contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    """pyarrow's errors as those of a trajectory; real ones of the system pass."""
    pyarrow = open_library("pyarrow")
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:300]
        if "footer" in reason:
            reason += " (a recording that was never finalised has none)"
        raise InputError(f"{path}: cannot be read: not a whole parquet file: {reason}") from error


def _read_columns(path: Path, columns: tuple[str, ...]) -> pyarrow.Table:
    parquet = open_library("pyarrow.parquet")
    os.close(open_regular(path))
    with _parquet_errors(path), parquet.ParquetFile(path, pre_buffer=False) as file:
        if file.metadata.num_rows > MAX_POSE_NUMBERS:
            raise InputError(f"{path}: {file.metadata.num_rows} rows are too many")
        present = file.schema_arrow.names
        if missing := [name for name in columns if name not in present]:
            raise InputError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(present)[:500]}")
        return file.read(columns=list(columns), use_threads=False).combine_chunks()


def _read_names(path: Path) -> frozenset[str]:
    os.close(open_regular(path))
    with _parquet_errors(path), open_library("pyarrow.parquet").ParquetFile(path, pre_buffer=False) as file:
        return frozenset(file.schema_arrow.names)


parquet_columns = FileCache(_read_columns, 8)  # (path, columns) -> a table of them; many episodes share a file
parquet_names = FileCache(_read_names, 8)  # path -> the names of its columns


def episodes_in(path: Path) -> list[int]:
    """The numbers of the episodes that have rows in a parquet file."""
    return np.unique(_whole_numbers(path, parquet_columns(path, ("episode_index",)), "episode_index")).tolist()


def _whole_numbers(path: Path, table: pyarrow.Table, key: str) -> np.ndarray:
    with _parquet_errors(path):
        values = table[key].to_numpy()
    if values.dtype.kind not in "iuf":
        raise InputError(f"{path}: {key} holds {table[key].type} values, expected whole numbers")
    return values


class LeRobotSource:
    """lerobot: the rows of one episode, and its frames."""

    def __init__(self, trajectory: Trajectory, keys: DataKeys):
        self._name, self._dataset = trajectory.name, lerobot_dataset(trajectory.path)
        self._episode = self._dataset.episode(trajectory.episode)
        self._keys, self._settings = self._dataset.resolve_keys(keys, poses_required=False), keys
        self._images = keys._replace(image_key=self._keys.image).keys_of_cameras  # camera -> its feature
        features = self._dataset.features
        self._videos = [camera for camera, key in self._images.items() if features[key]["dtype"] == "video"]
        self._data_file = self._dataset.data_file(self._episode)

    @functools.cached_property
    def _rows(self) -> tuple[int, pyarrow.Table]:
        """The first row of the episode in its file, and its rows."""
        wanted = {"episode_index", "frame_index", *filter(None, self._keys[1:])}
        wanted |= {"timestamp"} if self._videos else set()
        table = parquet_columns(self._data_file, tuple(sorted(wanted)))
        rows = np.flatnonzero(_whole_numbers(self._data_file, table, "episode_index") == self._episode.index)
        count, length = len(rows), self._episode.length
        if count != length or count == 0 or rows[-1] - rows[0] != count - 1:
            raise InvalidDataError(
                f"{self._name}: {self._data_file} has {count} rows of it in one piece, expected {length}"
            )
        table = table.slice(rows[0], count)
        if not np.array_equal(_whole_numbers(self._data_file, table, "frame_index"), np.arange(count)):
            raise InvalidDataError(f"{self._name}: {self._data_file}: its frame_index is not 0 to {count - 1}")
        return int(rows[0]), table

    def _column(self, key: str) -> dict[str, Any]:
        return {key: self._values(key)}

    def _values(self, key: str) -> list[Any]:
        column = self._rows[1][key]
        try:
            with _parquet_errors(self._data_file):
                return column.to_pylist()
        except (ValueError, OverflowError) as error:  # text that is no UTF-8, times that Python does not have
            where = f"{self._name} ({self._data_file})"
            raise InputError(f"{where}: {key}: cannot be read as {column.type}: {str(error)[:200]}") from error

    def poses(self, *, required: bool) -> Poses:
        _, *pose_keys = self._keys
        self._dataset.refuse_contradiction(self._episode)
        if required and None in pose_keys:
            raise InputError(f"{self._name}: has no position and yaw; set position_key and yaw_key")
        columns = {key: self._values(key) for key in pose_keys if key is not None}
        poses = checked_poses(f"{self._name} ({self._data_file})", columns, self._settings, *pose_keys)
        numbers = np.arange(self._episode.length, dtype=np.int64)
        return poses._replace(frame_index=numbers, times=numbers / self._dataset.fps)

    def _times(self, camera: str | None) -> np.ndarray:
        """(T,) [s] on a video's clock of each row. The rows must fill the episode's part of the video."""
        name = camera_name(self._name, camera)
        start_s, stop_s, zero_s = self._part_of_video(camera)
        times = start_s + checked_numbers(self._name, self._column("timestamp"), "timestamp", self._episode.length)
        if (np.diff(times) <= 0).any():
            raise InvalidDataError(
                f"{self._name}: its timestamps do not rise, at row {int(np.argmin(np.diff(times))) + 1}"
            )
        last = f"its last row is at {times[-1]:.3f} s of {recordable_name(self._video_file(camera).name)}"
        frame_s, is_shared = 1 / self._dataset.fps, self._dataset.version == "v3.0"
        if is_shared and times[-1] > stop_s - frame_s / 2:  # else decoding tells the first one missing
            raise InvalidDataError(f"{name}: {last}, in which it ends at {stop_s:.3f} s: fewer frames than poses")
        if times[-1] + frame_s < stop_s - frame_s / 2:
            raise InvalidDataError(f"{name}: {last}, in which it ends at {stop_s:.3f} s: more frames than poses")
        return times + zero_s

    def _part_of_video(self, camera: str | None) -> tuple[float, float, float]:
        """Where the episode begins and ends in a video [s], and what to add for the container's clock: times are
        counted from the first frame shown."""
        dataset, key = self._dataset, self._images[camera]
        start_s, stop_s = dataset.video_span(self._episode, key)
        if dataset.version != "v3.0":
            extent = video_extent(self._video_file(camera))
            return 0.0, extent.last_s - extent.first_s + 1 / dataset.fps, extent.first_s
        spans = dataset.spans_beside(self._episode, key)
        if fault := spans.fault(self._name):
            raise InvalidDataError(f"{camera_name(self._name, camera)}: {fault}: its frames may be another episode's")
        return start_s, stop_s, spans.zero_s

    def mispaired(self, spec: CacheSpec) -> str | None:
        """Why what 0.2.0 made is not what is made now: it believed meta data that contradict themselves, and counted
        times on the container's clock alone."""
        try:
            self._dataset.refuse_contradiction(self._episode)
            for camera in self._videos:
                self._times(camera)
        except InvalidDataError as error:
            return f"its frames may be another's: {error}"
        return next(filter(None, (self._mispaired_video(camera, spec) for camera in self._videos)), None)

    def _mispaired_video(self, camera: str | None, spec: CacheSpec) -> str | None:
        *_, zero_s = self._part_of_video(camera)
        video_file = self._video_file(camera)
        if abs(zero_s) > VIDEO_TOLERANCE / self._dataset.fps:
            return f"its times were counted on the clock of {video_file.name}, which begins at {zero_s:.3f} s"
        return changed_picture(video_file, spec)

    def _video_file(self, camera: str | None) -> Path:
        return self._dataset.video_file(self._episode, self._images[camera])

    def open_frames(self, numbers: Sequence[int], camera: str | None = None) -> FrameReader:
        name = camera_name(self._name, camera)
        if camera not in self._videos:
            return ParquetFrames(self._data_file, self._images[camera], name, self._rows[0])
        times = self._times(camera)[list(numbers)].tolist()
        return VideoFrames(self._video_file(camera), name, numbers, times, VIDEO_TOLERANCE / self._dataset.fps)

    def checksum(self, kind: ChecksumKind) -> str:
        """Over the rows read, and the sizes (`stat`) or bytes (`content`) of the frames as they are stored: what is
        appended to a file that episodes share is not theirs."""
        digest = hashlib.sha256(f"{kind} {self._keys} {self._episode}".encode())
        first, table = self._rows
        for key in table.column_names:
            digest.update(repr(self._values(key)).encode("utf-8", "surrogatepass"))
        for camera, key in self._images.items():
            if camera in self._videos:
                self._add_video(digest, camera, kind)
            else:
                _add_images(digest, self._data_file, key, first, len(table), kind)
        return digest.hexdigest()[:16]

    def _add_video(self, digest: hashlib._Hash, camera: str | None, kind: ChecksumKind) -> None:
        """Add the sizes (`stat`) or the bytes of the episode's packets in a video."""
        video_file = self._video_file(camera)
        if kind == "stat":
            times, sizes = packet_index(video_file)
            digest.update(sizes[self._is_inside(times, camera)])
            return
        first_dts = None
        for packet, time_base in packets(video_file, self._name):
            first_dts = packet.dts if first_dts is None else first_dts
            if self._is_inside(np.array([(packet.dts - first_dts) * float(time_base)]), camera)[0]:
                digest.update(bytes(packet))

    def _is_inside(self, times: np.ndarray, camera: str | None) -> np.ndarray:
        """Whether packets at these times, in the order of decoding, are the episode's."""
        start_s, stop_s = self._dataset.video_span(self._episode, self._images[camera])
        early_s = 0.5 / self._dataset.fps
        return (times >= start_s - early_s) & (times < stop_s - early_s)


def _add_images(digest: hashlib._Hash, path: Path, key: str, first: int, count: int, kind: ChecksumKind) -> None:
    """Add the sizes of the row groups that hold these rows (`stat`), or the rows' images (`content`)."""
    with _parquet_errors(path), open_library("pyarrow.parquet").ParquetFile(path, pre_buffer=False) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        starts = np.cumsum([0, *(group.num_rows for group in groups)])
        held = [i for i in range(len(groups)) if starts[i] < first + count and starts[i + 1] > first]
        if kind == "stat":
            digest.update(repr([(groups[index].num_rows, groups[index].total_byte_size) for index in held]).encode())
            return
        row = int(starts[held[0]])
        for batch in file.iter_batches(READ_TOGETHER, held, [key], use_threads=False):
            inside = batch.slice(max(0, first - row), max(0, first + count - max(row, first)))
            digest.update(repr(inside.column(0).to_pylist()).encode())
            row += len(batch)


class ParquetFrames:
    """Image bytes in a column of a parquet file, {bytes, path} a row."""

    def __init__(self, path: Path, key: str, name: str, first_row: int):
        self._path, self._key, self._name, self._first_row = path, key, name, first_row

    def name(self, number: int) -> str:
        return f"{self._name}: frame {number} ({recordable_name(self._path.name)})"

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        for number in numbers:
            with PROFILE("read"):
                image = parquet_rows(self._path, self._key).get(self._first_row + number)
            data = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(data, bytes) or not data:
                raise InputError(f"{self.name(number)}: {self._key} holds no image bytes there")
            yield np.frombuffer(bytearray(data), np.uint8)

    def close(self) -> None:
        """The file is shared with other episodes."""


class ParquetRows:
    """A column read row by row, each once and roughly in order: many episodes share a file, and it is gone through
    once. Rows passed over are kept for a while, for threads that come later."""

    def __init__(self, path: Path, key: str):
        self._path, self._key = path, key
        with _parquet_errors(path):
            self._file = open_library("pyarrow.parquet").ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        if key not in self._file.schema_arrow.names:
            raise InputError(f"{path}: has no column {key}")
        metadata = self._file.metadata
        counts = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        self._group_starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._next_row, self._batches = sys.maxsize, iter(())  # nothing is read yet
        self._lock = threading.Lock()

    def get(self, row: int) -> Any:
        """One row's value."""
        with self._lock, _parquet_errors(self._path):
            if row not in self._kept:
                group = int(np.searchsorted(self._group_starts, row, side="right")) - 1
                if row < self._next_row or self._group_starts[group] > self._next_row:
                    self._start_at(group)
                while row not in self._kept:
                    self._read_batch()
            return self._kept.pop(row)

    def _start_at(self, group: int) -> None:
        groups = list(range(group, len(self._group_starts) - 1))
        self._next_row = int(self._group_starts[group])
        self._batches = self._file.iter_batches(READ_TOGETHER, groups, [self._key], use_threads=False)

    def _read_batch(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            raise InputError(f"{self._path}: ends before its last row")
        for value in batch.column(0).to_pylist():
            self._kept[self._next_row] = value
            self._next_row += 1
        while len(self._kept) > ROWS_KEPT:
            self._kept.popitem(last=False)


parquet_rows = FileCache(ParquetRows, 4)


def _signs(folder: FolderFiles, is_top: bool) -> list[str]:
    return [LEROBOT_INFO] if is_top and (folder.path / LEROBOT_INFO).is_file() else []


FORMAT = Format(
    find=find_lerobot,
    locate=locate_lerobot,
    open=LeRobotSource,
    settings=KEY_SETTINGS,
    trajectory=f"an episode of a dataset with {LEROBOT_INFO}",
    signs=_signs,
    guess=guess_lerobot_keys,
    pairing=2,
    mispaired=lambda source, spec: source.mispaired(spec),
)
