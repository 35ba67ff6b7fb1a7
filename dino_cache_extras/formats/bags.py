"""Bags: a .bag or .mcap file, or a rosbag2 folder of SQLite or MCAP files, which may be split and packed.

path --open_bag--> Bag: topics; messages of some topics, in the files' order; one message, by its place
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sqlite3
import struct
import threading
import urllib.parse
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from dino_cache import FENCE, InputError, open_regular, recordable_name
from dino_cache_extras.formats.bag_files import (
    BAG_SIGN,
    MCAP_SIGN,
    MOST_RECORD_BYTES,
    ZSTD_SIGN,
    BagFile,
    Channel,
    McapFile,
    OpenFile,
    Part,
    bag_errors,
    header_fields,
    short_kind,
    unpack_file,
    unpack_zstd,
    whole_number,
)
from progress_utils import open_library

OPEN_PARTS = 2  # files of a split bag that are open at a time
LEAST_ROW_BYTES = 8  # that a message takes in an SQLite file; a damaged one could have more rows than bytes
SQLITE_SIGN = b"SQLite format 3\x00"
METADATA_FILE, METADATA_KEY = "metadata.yaml", "rosbag2_bagfile_information"
MOST_METADATA_BYTES = 1 << 24
LOOKED_AT_BYTES = 1 << 16  # of metadata.yaml, to see whose it is; of a file's end, where it has no index
PART_SUFFIXES = (".db3", ".mcap", ".db3.zstd", ".mcap.zstd")


class Topic(NamedTuple):
    """A bag's topic."""

    name: str
    kind: str  # several, with commas, where its messages are of several types
    encoding: str
    count: int
    definitions: tuple[tuple[str, str], ...]  # those that there are: (text, kind)


Place = tuple[int, int, int]  # part of the bag, chunk or -1, offset in the chunk or the file (SQLite: row)


class Message(NamedTuple):
    """A message, not looked into."""

    topic: str
    log_ns: int  # when it was recorded
    place: Place
    data: bytes  # the first of them, where no more were asked for


class SqliteFile:
    """A file of rosbag2's SQLite storage. Messages are gone through in the order in which they were written."""

    def __init__(self, path: Path, where: str):
        self._where = where
        self._check(path)
        name = urllib.parse.quote(os.fsencode(os.path.abspath(path)))
        with bag_errors(where):
            self._connection = sqlite3.connect(
                f"file:{name}?mode=ro&immutable=1", uri=True, check_same_thread=False, isolation_level=None
            )
            self._connection.execute("PRAGMA trusted_schema = OFF")
            self._refuse_other_tables()
            rows = self._connection.execute("SELECT id, name, type, serialization_format FROM topics").fetchall()
            texts = self._definitions()
        self.channels: dict[int, Channel] = {}
        for number, topic, kind, encoding in rows:
            if not isinstance(number, int) or not all(isinstance(value, str) for value in (topic, kind, encoding)):
                raise InputError(f"{where}: is damaged: its table of topics holds {topic!r}")
            self.channels[number] = Channel(topic, short_kind(kind), encoding, *texts.get(kind, ("", "")))
        self.counts: Counter[int] = Counter()
        self.span_ns = None

    def _check(self, path: Path) -> None:
        file = OpenFile(path, self._where)
        try:
            head, self._size = file.read(0, 100, whole=False), file.size
        finally:
            file.close()
        if not head.startswith(SQLITE_SIGN) or len(head) < 100:
            raise InputError(f"{self._where}: is no SQLite file by its first bytes")
        page_size, pages = struct.unpack_from(">H", head, 16)[0], struct.unpack_from(">I", head, 28)[0]
        needed = (65536 if page_size == 1 else page_size) * pages
        if head[24:28] == head[92:96] and needed > self._size:
            raise InputError(f"{self._where}: is cut: it has {self._size} of {needed} bytes")
        journal = Path(f"{path}-wal")
        if journal.exists() and journal.stat().st_size:
            raise InputError(
                f"{self._where}: its last messages lie in {recordable_name(journal.name)}: its recording was cut; open "
                "a copy once with sqlite3, so that they are moved"
            )

    def _refuse_other_tables(self) -> None:
        """Only plain tables are read: a view or a virtual table is a program."""
        found = self._connection.execute(
            "SELECT name, type, sql FROM sqlite_master WHERE name IN ('topics', 'messages', 'message_definitions')"
        ).fetchall()
        plain = {name for name, kind, sql in found if kind == "table" and str(sql).upper().startswith("CREATE TABLE")}
        if missing := {"topics", "messages"} - plain or {name for name, *_ in found} - plain:
            raise InputError(
                f"{self._where}: is no file of rosbag2: it has no plain table {', '.join(sorted(missing))}"
            )

    def _definitions(self) -> dict[str, tuple[str, str]]:
        """type -> (definition, its kind), which newer files have."""
        names = {row[1] for row in self._connection.execute("PRAGMA table_info(message_definitions)")}
        if not {"topic_type", "encoding", "encoded_message_definition"} <= names:
            return {}
        query = "SELECT topic_type, encoding, encoded_message_definition FROM message_definitions"
        kinds = {"ros2msg": "msg", "ros2idl": "idl"}
        return {
            str(kind): (str(text), kinds[encoding])
            for kind, encoding, text in self._connection.execute(query)
            if encoding in kinds
        }

    def messages(self, wanted: dict[int, int | None]) -> Iterator[tuple[int, int, int, int, bytes]]:
        """As Part has it: (channel, log time [ns], -1, row, data). Raises InputError where the file is damaged."""
        whole = ", ".join(str(int(number)) for number, most in wanted.items() if most is None)
        data_or_none = f"CASE WHEN topic_id IN ({whole}) THEN data END"
        query = f"SELECT id, topic_id, timestamp, {data_or_none} FROM messages ORDER BY id"
        with bag_errors(self._where):
            for count, (row, channel, log_ns, content) in enumerate(self._connection.execute(query)):
                if count % 256 == 0:
                    FENCE.getting_on()
                if count > self._size // LEAST_ROW_BYTES:
                    raise InputError(f"{self._where}: is damaged: it has more messages than bytes")
                if channel not in wanted:
                    continue
                data = content if wanted[channel] is None else self._begin_of(row, wanted[channel])
                if not isinstance(data, bytes) or not isinstance(log_ns, int):
                    raise InputError(f"{self._where}: message {row} holds no bytes, or has no time")
                yield channel, log_ns, -1, row, data

    def _begin_of(self, row: int, most: int) -> bytes:
        with self._connection.blobopen("messages", "data", row, readonly=True) as blob:
            return blob.read(most)

    def read(self, chunk: int, offset: int) -> bytes:
        with bag_errors(self._where):
            row = self._connection.execute("SELECT data FROM messages WHERE id = ?", (offset,)).fetchone()
        if row is None or not isinstance(row[0], bytes):
            raise InputError(f"{self._where}: message {offset} holds no bytes")
        return row[0]

    def close(self) -> None:
        self._connection.close()


# ---------------------------------------------------------------------------------------------------------------------
# Bags
# ---------------------------------------------------------------------------------------------------------------------


class PartFile(NamedTuple):
    """A file of a bag, and how it is opened."""

    path: Path
    open: Callable[[Path, str], Part]
    is_packed: bool = False  # as a whole, by zstd


class Bag:
    """A bag's messages, over all of its files. Safe to use from one thread at a time: `lock` is for that.

    Raises:
        InputError, OSError: when it is made: a file is cut, damaged, or of another kind.
    """

    def __init__(self, name: str, parts: list[PartFile], counts: dict[str, int], duration_s: float | None = None):
        self._name, self._parts, self._said = name, parts, counts
        self._open: OrderedDict[int, tuple[Part, BinaryIO | None]] = OrderedDict()
        self._states: dict[int, tuple[int, int]] = {}
        self.lock = threading.Lock()
        self._channels: list[dict[int, Channel]] = []
        found: Counter[str] = Counter()
        spans = []
        for number in range(len(parts)):
            part = self._part(number)
            self._channels.append(part.channels)
            spans += [part.span_ns] if part.span_ns else []
            for channel, count in part.counts.items():
                if channel in part.channels:
                    found[part.channels[channel].topic] += count
        if spans:
            duration_s = (max(last for _, last in spans) - min(first for first, _ in spans)) / 1e9
        self.duration_s = duration_s
        self.topics = self._merged_topics(found)

    def _merged_topics(self, found: Counter[str]) -> dict[str, Topic]:
        channels: dict[str, list[Channel]] = {}
        for part in self._channels:
            for channel in part.values():
                channels.setdefault(channel.topic, []).append(channel)
        return {
            name: Topic(
                name,
                ", ".join(sorted({channel.kind for channel in same})),
                ", ".join(sorted({channel.encoding for channel in same})),
                found[name] if name in found else self._said.get(name, 0),
                tuple(dict.fromkeys((each.definition, each.definition_kind) for each in same if each.definition)),
            )
            for name, same in sorted(channels.items())
        }

    def _where(self, part: int) -> str:
        path = self._parts[part].path
        file = recordable_name(path.name)
        return f"{self._name} ({file})"

    def _part(self, number: int) -> Part:
        """An open part. Raises InputError where its file is another than when it was first opened."""
        if number not in self._open:
            path, opener, is_packed = self._parts[number]
            status = os.stat(path)
            state = (status.st_size, status.st_mtime_ns)
            if self._states.setdefault(number, state) != state:
                raise InputError(f"{self._where(number)}: changed while it was read; run the same command again")
            unpacked = None
            with bag_errors(self._where(number)):
                unpacked = unpack_file(path, self._where(number)) if is_packed else None
            try:
                part = opener(Path(unpacked.name) if unpacked else path, self._where(number))
            except BaseException:
                if unpacked:
                    unpacked.close()
                raise
            self._open[number] = (part, unpacked)
            while len(self._open) > OPEN_PARTS:
                self._close_part(next(iter(self._open)))
        self._open.move_to_end(number)
        return self._open[number][0]

    def _close_part(self, number: int) -> None:
        part, unpacked = self._open.pop(number)
        part.close()
        if unpacked is not None:
            unpacked.close()

    def messages(self, wanted: dict[str, int | None]) -> Iterator[Message]:
        """Those of some topics, in the order of the files; of each the first so many bytes, or all (None).

        Raises:
            InputError: they are fewer than the bag says.
        """
        count: Counter[str] = Counter()
        for number, channels in enumerate(self._channels):
            of_part = {key: wanted[channel.topic] for key, channel in channels.items() if channel.topic in wanted}
            if not of_part:
                continue
            for channel, log_ns, chunk, offset, data in self._part(number).messages(of_part):
                topic = channels[channel].topic
                count[topic] += 1
                plain = _plain(data, of_part[channel], lambda at=(chunk, offset), n=number: self._part(n).read(*at))
                yield Message(topic, log_ns, (number, chunk, offset), plain)
        for topic in wanted:
            if count[topic] < (said := self._said.get(topic, 0)):
                raise InputError(
                    f"{self._name}: {METADATA_FILE} says {said} messages of {topic}, its files hold {count[topic]}: a "
                    "part is cut or of another recording"
                )

    def read(self, place: Place) -> bytes:
        """A message."""
        number, chunk, offset = place
        data = self._part(number).read(chunk, offset)
        return _plain(data, None, lambda: data)

    def close(self) -> None:
        """Close all files; they are opened again when they are wanted."""
        for number in list(self._open):
            self._close_part(number)


def _plain(data: bytes, most: int | None, whole: Callable[[], bytes]) -> bytes:
    """A message's bytes, unpacked where it is packed by itself; no other begins in this way."""
    if not data.startswith(ZSTD_SIGN):
        return data
    unpacked = unpack_zstd(data if most is None else whole(), MOST_RECORD_BYTES if most is None else most)
    if len(unpacked) > MOST_RECORD_BYTES:
        raise InputError(f"a message unpacks to more than {MOST_RECORD_BYTES} bytes")
    return unpacked if most is None else unpacked[:most]


STORAGES: dict[str, tuple[str, Callable[[Path, str], Part]]] = {
    "sqlite3": (".db3", SqliteFile),
    "mcap": (".mcap", McapFile),
}


def is_rosbag2(folder: Path) -> bool:
    """Whether a folder's metadata.yaml is rosbag2's. Raises OSError, InputError."""
    with open(open_regular(folder / METADATA_FILE), "rb") as file:
        return METADATA_KEY.encode() in file.read(LOOKED_AT_BYTES)


def open_bag(path: Path, name: str) -> Bag:
    """A bag: a .bag or .mcap file, or a rosbag2 folder.

    Raises:
        InputError: it is cut, damaged, a part is missing, or it is packed or stored in a way that is not read.
        OSError: it cannot be read.
    """
    if path.is_dir():
        return _open_folder(path, name)
    suffix = path.name.lower()
    if suffix.endswith(".bag.active"):
        raise InputError(f"{name} ({recordable_name(path.name)}): its recording was cut; rosbag reindex mends it")
    if suffix.endswith((".db3", ".zstd")):
        raise InputError(
            f"{name} ({recordable_name(path.name)}): no {METADATA_FILE} of rosbag2 beside it: its recording was cut, "
            "or it was taken out of its folder; ros2 bag reindex makes one"
        )
    return Bag(name, [PartFile(path, McapFile if suffix.endswith(".mcap") else BagFile)], {})


def _open_folder(folder: Path, name: str) -> Bag:
    where = f"{name}/{METADATA_FILE}"
    information = _metadata(folder, where)
    with bag_errors(where):
        storage, names = information["storage_identifier"], [str(each) for each in information["relative_file_paths"]]
        said = Counter()
        for topic in information["topics_with_message_count"]:
            said[str(topic["topic_metadata"]["name"])] += int(topic["message_count"])
        duration_s = int(information["duration"]["nanoseconds"]) / 1e9
        packing = str(information.get("compression_format") or "")
        mode = str(information.get("compression_mode") or "none").lower()
    if storage not in STORAGES:
        raise InputError(f"{where}: its storage is {storage!r}; {' and '.join(STORAGES)} are read")
    if mode not in ("", "none") and packing != "zstd":
        raise InputError(f"{where}: it is packed by {packing!r}; zstd is read")
    if not names:
        raise InputError(f"{where}: names no files")
    present = {each for each in os.listdir(folder) if each.endswith(PART_SUFFIXES)}
    wanted = [_present_name(os.path.basename(each), present) for each in names]
    if missing := [each for each in wanted if each not in present]:
        shown = ", ".join(map(recordable_name, missing[:3])) + (" ..." if len(missing) > 3 else "")
        raise InputError(f"{name}: {len(missing)} of its {len(wanted)} parts are missing: {shown}")
    if unnamed := sorted(present - {*wanted}):
        raise InputError(
            f"{name}: {METADATA_FILE} does not name {recordable_name(unnamed[0])}, which lies beside it; ros2 bag "
            "reindex adds it, or move it away"
        )
    opener = STORAGES[storage][1]
    return Bag(name, [PartFile(folder / each, opener, each.endswith(".zstd")) for each in wanted], said, duration_s)


def _present_name(file: str, present: set[str]) -> str:
    """The name of a part, which some versions write without .zstd."""
    return f"{file}.zstd" if file not in present and f"{file}.zstd" in present else file


def _metadata(folder: Path, where: str) -> dict[str, Any]:
    yaml = open_library("yaml")
    with open(open_regular(folder / METADATA_FILE), "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > MOST_METADATA_BYTES:
            raise InputError(f"{where}: has {size} bytes; {MOST_METADATA_BYTES} are read at most")
        text = file.read(size)
    with bag_errors(where):
        information = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))[METADATA_KEY]
        if not isinstance(information, dict):
            raise InputError(f"{where}: {METADATA_KEY} is no mapping")
        return information


def bag_files(path: Path) -> list[Path]:
    """The files that a bag is read from, those that are there."""
    if not path.is_dir():
        return [path]
    names = sorted(each for each in os.listdir(path) if each.endswith(PART_SUFFIXES))
    return [path / METADATA_FILE, *(path / each for each in names)]


def bag_checksum(path: Path, kind: str) -> str:
    """16 hex digits over every byte (`content`), or over names, sizes, and what the files say of themselves: the head
    and the end, where the index of a .bag and an MCAP file lies with its counts and times (`stat`)."""
    digest = hashlib.sha256(kind.encode())
    for file in bag_files(path):
        with open(open_regular(file), "rb", buffering=0) as opened:
            size = os.fstat(opened.fileno()).st_size
            digest.update(f"\n{file.name if path.is_dir() else ''}\n{size}\n".encode("utf-8", "surrogateescape"))
            is_whole = kind == "content" or file.name == METADATA_FILE
            digest.update(os.pread(opened.fileno(), 4096, 0))
            start = 0 if is_whole else _index_start(opened.fileno(), size)
            while start < size and (block := os.pread(opened.fileno(), 1 << 20, start)):
                digest.update(block)
                start += len(block)
                FENCE.getting_on()
    return digest.hexdigest()[:16]


def _index_start(descriptor: int, size: int) -> int:
    """Where what a file says at its end begins: the index, or the last bytes where it has none."""
    last = max(0, size - LOOKED_AT_BYTES)
    head, end = os.pread(descriptor, 4096, 0), os.pread(descriptor, 37, max(0, size - 37))
    with contextlib.suppress(ValueError, KeyError, struct.error):
        if head.startswith(BAG_SIGN):
            (length,) = struct.unpack_from("<I", head, len(BAG_SIGN))
            start = whole_number(header_fields(head[len(BAG_SIGN) + 4 : len(BAG_SIGN) + 4 + length])["index_pos"])
            return start if 0 < start <= size else last
        if head.startswith(MCAP_SIGN) and end.endswith(MCAP_SIGN):
            (start,) = struct.unpack_from("<Q", end, 9)
            return start if 0 < start <= size else last
    return last
