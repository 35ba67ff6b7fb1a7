"""LeRobot: what a dataset's meta folder says, and which of its features are read."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import re
import reprlib
import string
import threading
from pathlib import Path
from typing import Any, NamedTuple

from dino_cache import (
    DataKeys,
    InputError,
    InvalidDataError,
    read_file,
    recordable_name,
)
from dino_cache_extras.formats.common import first_of
from dino_cache_extras.formats.lerobot_checks import DataFiles, VideoSpan, VideoSpans
from dino_cache_extras.formats.lerobot_files import picture_keys
from dino_cache_extras.formats.lerobot_parquet import (
    episodes_in,
    parquet_columns,
    parquet_names,
)
from dino_cache_extras.formats.lerobot_poses import (
    PoseKey,
    is_declared_matrix,
    pose_key,
)
from dino_cache_extras.formats.lerobot_roots import (
    LEROBOT_INFO,
    episode_name,
)
from progress_utils import RefusedError

LEROBOT_VERSIONS = ("v2.0", "v2.1", "v3.0")
PICTURES = "videos/chunk-{episode_chunk:03d}/{video_key}/picture"  # where info.json has no template of videos
IMAGE_GUESSES = ("observation.images.front", "observation.images.rgb")
POSITION_GUESSES = ("observation.filtered_position", "position")
YAW_GUESSES = ("observation.filtered_heading", "yaw")


class LeRobotKeys(NamedTuple):
    """The features that are read; None where a dataset has no base pose."""

    image: Any  # a key; of several cameras, (camera, key) of each
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
        self._templates["pictures"] = PICTURES
        for template in self._templates.values():
            self._check_template(template)
        self._episodes: dict[int, tuple[int, dict[str, Any]]] = {}
        self._faults: dict[int, str] = {}  # of episodes whose entries contradict themselves
        self._read_parquet_meta() if self.version == "v3.0" else self._read_jsonl()
        self.data_files = DataFiles(root, self._templates["data"], episodes_in)
        self._spans: dict[str, dict[Path, VideoSpans]] = {}  # camera -> video file -> where its episodes lie in it
        self._lock = threading.Lock()

    @property
    def num_episodes(self) -> int:
        return len(self._episodes)

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

    def has_video(self, episode: Episode, key: str) -> bool:
        """Whether the video with its frames is there."""
        return bool(self._templates["video"]) and self.video_file(episode, key).is_file()

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

    def picture_folder(self, episode: Episode, key: str) -> Path | None:
        """Where pictures of an image key would lie; None in v3.0, which has no such place."""
        if self.version == "v3.0":
            return None
        return self._fill("video" if self._templates["video"] else "pictures", episode, key).parent

    def lengths_beside(self, episode: Episode) -> dict[int, int]:
        """Number -> length of the episodes that share its folders, in order."""
        return self._lengths[episode.place.get("episode_chunk")]

    @functools.cached_property
    def _lengths(self) -> dict[int | None, dict[int, int]]:
        """Chunk -> number -> length."""
        lengths: dict[int | None, dict[int, int]] = {}
        for number in self.episode_numbers:
            length, place = self._episodes[number]
            lengths.setdefault(place.get("episode_chunk"), {})[number] = length
        return lengths

    def needs_column(self, name: str, names: frozenset[str]) -> bool:
        """Whether a numbering column of a parquet file must be read, `names` being those it has: where a file is one
        episode, its rows may go without."""
        is_alone = self.version != "v3.0" and "{episode_index" in self._templates["data"]
        return not is_alone or name in names

    @functools.cached_property
    def image_keys(self) -> list[str]:
        """The keys of frames, of info.json; where that describes none, those that there are folders of pictures for."""
        described = [key for key, feature in self.features.items() if feature.get("dtype") in ("image", "video")]
        return described or (picture_keys(self.root) if self.version != "v3.0" else [])

    def resolve_keys(self, given: DataKeys, *, poses_required: bool) -> LeRobotKeys:
        """The features to read: those given, else those guessed.

        Raises:
            InputError: there is none, or it is not clear which; the message lists the keys that there are.
        """
        images = self.image_keys
        image = given.image_key or (images[0] if len(images) == 1 else first_of(IMAGE_GUESSES, images))
        for key in given._replace(image_key=image).keys_of_cameras.values():
            if key not in images and not (key and self.version != "v3.0" and key in picture_keys(self.root)):
                raise InputError(f"image_key: {key}: {self.root} has the image keys {', '.join(images) or '(none)'}")
        others = {key: feature for key, feature in self.features.items() if key not in images}
        position = given.position_key or first_of(POSITION_GUESSES, others)
        yaw = given.yaw_key or first_of(YAW_GUESSES, others)
        if position is not None and yaw is None:
            parsed = pose_key("position_key", position, others, str(self.root))
            yaw = position if is_declared_matrix(parsed, others[parsed.feature]) else None
        for setting, key in (("position_key", position), ("yaw_key", yaw)):
            if key is None and poses_required:
                raise InputError(
                    f"{setting}: {self.root} has none that is known. Set position_key and yaw_key to two of "
                    f"{', '.join(others)}, or to parts of one (state[0:2]); {_matrices_among(others)}where none of "
                    "them is the pose of the base, set chunk_by: frames"
                )
            if key is not None:
                pose_key(setting, key, others, str(self.root))
        return LeRobotKeys(image, position, yaw)

    def pose_keys(self, keys: LeRobotKeys) -> tuple[PoseKey | None, PoseKey | None]:
        """What position_key and yaw_key name."""
        return tuple(
            None if key is None else pose_key(setting, key, self.features, str(self.root))
            for setting, key in (("position_key", keys.position), ("yaw_key", keys.yaw))
        )


def _matrices_among(features: dict[str, dict[str, Any]]) -> str:
    """What may be poses as 4 x 4 matrices, as a part of a message."""
    found = [key for key, feature in features.items() if is_declared_matrix(PoseKey(key, key), feature)]
    return f"position_key alone where it is a 4 x 4 pose ({', '.join(found)} has 16 numbers); " if found else ""


def _differences(before: tuple[int, dict], after: tuple[int, dict]) -> str:
    """What differs between two entries of one episode, in words."""
    first, second = ({"length": length, **place} for length, place in (before, after))
    different = [key for key in first.keys() | second.keys() if first.get(key) != second.get(key)]
    return ", ".join(f"{key} {first.get(key)} and {second.get(key)}" for key in sorted(different)[:3])
