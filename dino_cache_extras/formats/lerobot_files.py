"""LeRobot: frames that are pictures beside the parquet files, in videos/chunk-000/<image key>/."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from dino_cache import ChecksumKind, FileFrames, InputError, InvalidDataError, read_file, recordable_name
from dino_cache_extras.formats.common import FileCache

STATS = "meta/episodes_stats.jsonl"
MOST_PICTURES = 2_000_000  # in one folder; more would fill a reader's memory
LOOKED_AT = 50  # entries of a folder that tell whether it holds pictures
PICTURE = re.compile(
    r"(?:episode_(\d{1,9})_)?(?:frame_)?(\d{1,9})\.(?:jpg|jpeg|png|webp|bmp)", re.ASCII | re.IGNORECASE
)


class PictureFolder(NamedTuple):
    """The pictures of a folder by number, and by episode where their names tell it: 7.jpg, episode_000000_7.jpg."""

    files: dict[int | None, dict[int, str]]  # episode (None: the name tells none) -> number -> file name
    doubles: dict[tuple[int | None, int], str]  # a second file of the same number
    count: int


def _list_pictures(path: Path) -> PictureFolder:
    files: dict[int | None, dict[int, str]] = {}
    doubles: dict[tuple[int | None, int], str] = {}
    count = 0
    with os.scandir(path) as entries:
        for entry in entries:
            if not (match := PICTURE.fullmatch(entry.name)):
                continue
            count += 1
            if count > MOST_PICTURES:
                raise InputError(f"{path}: holds more than {MOST_PICTURES} pictures")
            episode, number = match[1] and int(match[1]), int(match[2])
            first = files.setdefault(episode, {}).setdefault(number, entry.name)
            if first != entry.name:
                doubles[episode, number] = entry.name
    return PictureFolder(files, doubles, count)


pictures_in = FileCache(_list_pictures, 500_000, lambda folder: folder.count + 100)


def holds_pictures(folder: Path) -> bool:
    """Whether one of the first entries of a folder is a picture."""
    try:
        with os.scandir(folder) as entries:
            return any(PICTURE.fullmatch(entry.name) for entry in itertools.islice(entries, LOOKED_AT))
    except (FileNotFoundError, NotADirectoryError):
        return False


def picture_keys(root: Path) -> list[str]:
    """The image keys for which a dataset's first chunk has folders of pictures, sorted."""
    try:
        chunk = min((child for child in (root / "videos").iterdir() if child.name.startswith("chunk-")), default=None)
        folders = sorted(chunk.iterdir()) if chunk is not None else []
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [folder.name for folder in folders if holds_pictures(folder)]


def _read_ranges(path: Path) -> dict[int, tuple[int, int]]:
    """Episode -> first and last number of its pictures, where a line tells them: {min: 0, max: 77}, or {min: [0], ...}
    among its `stats`."""
    ranges: dict[int, tuple[int, int]] = {}
    try:
        for line in read_file(path).tobytes().splitlines():
            entry = json.loads(line) if line.strip() else {}
            image_index = entry.get("image_index") or (entry.get("stats") or {}).get("image_index")
            if image_index is not None:
                ranges[_whole(entry["episode_index"])] = _whole(image_index["min"]), _whole(image_index["max"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InvalidDataError(f"{path}: its image_index cannot be read: {error!r}"[:300]) from error
    return ranges


def _whole(value: Any) -> int:
    value = value[0] if isinstance(value, list) and len(value) == 1 else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9 or value != int(value):
        raise ValueError(f"{value!r} is no number of a picture")
    return int(value)


picture_ranges = FileCache(_read_ranges, 200_000, lambda ranges: len(ranges) + 1)


def ranges_of(root: Path) -> dict[int, tuple[int, int]]:
    """Those of a dataset; none where it has no such file."""
    try:
        return picture_ranges(root / STATS)
    except FileNotFoundError:
        return {}


def picture_files(name: str, folder: Path, root: Path, number: int, lengths: Mapping[int, int]) -> list[str]:
    """The names of an episode's pictures, in the order of its rows.

    Which they are tells the name itself (episode_000000_7.jpg), else image_index of meta/episodes_stats.jsonl, else the
    lengths of the episodes in that folder, which must then fill it.

    Args:
        name: the episode, for messages.
        folder: where the pictures lie; `root`: the dataset's.
        number: the episode's.
        lengths: rows of all episodes whose pictures lie in that folder, in order.

    Raises:
        InvalidDataError: pictures are missing or twice there, or counts differ.
    """
    pictures, ranges, length = pictures_in(folder), ranges_of(root), lengths[number]
    shown = recordable_name(folder.relative_to(root).as_posix())
    if len(pictures.files) > 1 and None in pictures.files:
        examples = sorted({min(files.values()) for files in pictures.files.values()})
        raise InvalidDataError(f"{name}: {shown} has pictures of two kinds of names: {examples[0]} and {examples[-1]}")
    if number in ranges and ranges[number][1] - ranges[number][0] + 1 != length:
        first, last = ranges[number]
        raise InvalidDataError(
            f"{name}: {length} rows, but {last - first + 1} pictures: image_index of {STATS} is {first} to {last}"
        )
    if pictures.count and None not in pictures.files:
        own = pictures.files.get(number, {})
        first = min(own, default=0)
        wanted, episode = range(first if first == 1 else 0, (first if first == 1 else 0) + length), number
        if len(own) != length and not set(wanted) - own.keys():
            raise InvalidDataError(f"{name}: {length} rows, but {len(own)} pictures of it in {shown}")
    else:
        own, episode = pictures.files.get(None, {}), None
        wanted = (
            _by_index(name, shown, own, number, ranges) if ranges else _by_length(name, shown, own, number, lengths)
        )
    if missing := [place for place in wanted if place not in own]:
        raise InvalidDataError(
            f"{name}: {len(missing)} of its {length} pictures are missing in {shown}, the first is number {missing[0]}"
        )
    if double := next((place for place in wanted if (episode, place) in pictures.doubles), None):
        both = own[double], pictures.doubles[episode, double]
        raise InvalidDataError(f"{name}: {shown} has two pictures of one number: {both[0]} and {both[1]}")
    return [own[place] for place in wanted]


def _by_index(name: str, shown: str, own: dict[int, str], number: int, ranges: dict[int, tuple[int, int]]) -> range:
    """The numbers that image_index says. They are no other episode's, and not all of them are shifted."""
    if number not in ranges:
        raise InvalidDataError(f"{name}: {STATS} has an image_index of other episodes and none of it")
    first, last = ranges[number]
    for other, (begin, end) in ranges.items():
        if other != number and begin <= last and first <= end:
            raise InvalidDataError(
                f"{name}: its image_index in {STATS} is {first} to {last}, and that of episode {other} {begin} to {end}"
            )
    least, most = min(begin for begin, _ in ranges.values()), max(end for _, end in ranges.values())
    if own and (shift := min(own) - least) and max(own) - most == shift:
        raise InvalidDataError(
            f"{name}: {shown} has pictures {min(own)} to {max(own)}, and image_index in {STATS} is {least} to {most}; "
            "number the pictures as it does"
        )
    return range(first, last + 1)


def _by_length(name: str, shown: str, own: dict[int, str], number: int, lengths: Mapping[int, int]) -> range:
    """The numbers that are left for it by the episodes before it, where all together fill the folder."""
    total, least = sum(lengths.values()), min(own, default=0)
    if len(own) != total or least > 1 or max(own, default=0) != least + total - 1:
        begin = least if least == 1 else 0
        gap = next((place for place in range(begin, begin + total) if place not in own), None)
        first = f"; the first that is missing is {gap}" if gap is not None else ""
        raise InvalidDataError(
            f"{name}: {total} rows of {len(lengths)} episodes, but {len(own)} pictures in {shown}{first}. Which are "
            f"its own, nothing says: {STATS} has no image_index"
        )
    before = sum(length for other, length in lengths.items() if other < number)
    return range(least + before, least + before + lengths[number])


class PictureFiles(FileFrames):
    """An episode's frames as files, by row."""

    def __init__(self, folder: Path, name: str, files: list[str]):
        self._folder, self._files = folder, files
        super().__init__(
            path_of=lambda number: f"{folder}/{files[number]}",
            name_of=lambda number: f"{name}: frame {number} ({recordable_name(files[number])})",
        )

    def add_to(self, digest: hashlib._Hash, kind: ChecksumKind) -> None:
        """Add names and sizes (`stat`), or names and bytes (`content`)."""
        for file in self._files:
            if kind == "stat":
                digest.update(f"{file} {os.stat(self._folder / file).st_size}\n".encode("utf-8", "surrogateescape"))
            else:
                digest.update(f"{file}\n".encode("utf-8", "surrogateescape"))
                digest.update(read_file(self._folder / file))
