"""ROS1 .bag and MCAP files: chunks of messages, read by topic and by place.

Nothing here looks into messages. What is held of a file is where its chunks and their indexes lie, and a few unpacked
chunks: some bytes a chunk and topic, however large the file. Whether a file is whole is seen when it is opened.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import os
import sqlite3
import struct
import tempfile
import zlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

import numpy as np

from dino_cache import FENCE, DinoCacheError, InputError, free_bytes, open_regular
from progress_utils import open_library

MOST_CHUNK_BYTES = 1 << 29  # of an unpacked chunk; more are refused
KEPT_CHUNK_BYTES = 1 << 26  # of unpacked chunks that are kept, since messages near in time lie in neighbours
MOST_RECORD_BYTES = 1 << 29  # of one message
WINDOW_BYTES = 1 << 14  # read at once where a file is gone through
FREE_BYTES = 1 << 30  # that unpacking leaves free on the disk of temporary files
ZSTD_SIGN = b"\x28\xb5\x2f\xfd"
BAG_SIGN, MCAP_SIGN = b"#ROSBAG V2.0\n", b"\x89MCAP0\r\n"
BAG_OPS = {"message": 2, "header": 3, "index": 4, "chunk": 5, "chunk info": 6, "connection": 7}
MCAP_OPS = {"header": 1, "footer": 2, "schema": 3, "channel": 4, "message": 5, "chunk": 6, "index": 7,
            "statistics": 11, "data end": 15}  # fmt: skip


class Channel(NamedTuple):
    """What a file says of messages that came by one way."""

    topic: str
    kind: str  # the type without what ROS2 puts in between: nav_msgs/Odometry
    encoding: str  # ros1, cdr
    definition: str  # "" where the file has none
    definition_kind: str  # msg, idl


@contextlib.contextmanager
def bag_errors(where: str) -> Iterator[None]:
    """Whatever damaged bytes raise in parsers and codecs as the bag's error; the system's as OSError."""
    try:
        yield
    except (InputError, DinoCacheError, MemoryError):
        raise
    except sqlite3.Error as error:
        if (getattr(error, "sqlite_errorname", "") or "").startswith("SQLITE_IOERR"):
            raise OSError(errno.EIO, f"{where}: {error}") from error
        raise InputError(f"{where}: is damaged or cut: {error}") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise InputError(f"{where}: is damaged or cut: {error}") from error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{where}: is damaged or cut: {type(error).__name__}: {reason}") from error


def short_kind(name: str) -> str:
    """A type's name as ROS1 writes it: nav_msgs/Odometry for nav_msgs/msg/Odometry."""
    return name.replace("/msg/", "/")


# ---------------------------------------------------------------------------------------------------------------------
# Packed bytes
# ---------------------------------------------------------------------------------------------------------------------


def unpack(data: bytes, how: str, size: int | None, where: str) -> bytes:
    """The unpacked bytes, exactly `size` where it is known. Raises InputError: they are too many, or not so many."""
    if (size or 0) > MOST_CHUNK_BYTES:
        raise InputError(f"{where}: unpacks to {size} bytes; {MOST_CHUNK_BYTES} are read at most")
    most = MOST_CHUNK_BYTES if size is None else size
    if how in ("", "none"):
        unpacked = data
    elif how == "zstd":
        unpacked = unpack_zstd(data, most)
    elif how == "lz4":
        unpacked = open_library("lz4.frame").LZ4FrameDecompressor().decompress(data, max_length=most + 1)
    elif how == "bz2":
        unpacked = bz2.BZ2Decompressor().decompress(data, max_length=most + 1)
    else:
        raise InputError(f"{where}: is packed by {how!r}; none, bz2, lz4 and zstd are read")
    if (size is not None and len(unpacked) != size) or len(unpacked) > MOST_CHUNK_BYTES:
        raise InputError(f"{where}: is damaged: it unpacks to {len(unpacked)} bytes, not {size or MOST_CHUNK_BYTES}")
    return unpacked


def unpack_zstd(data: bytes, most: int) -> bytes:
    """The first most + 1 bytes of it, at most."""
    zstandard = open_library("zstandard")
    with zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data) as reader:
        return reader.read(most + 1)


def unpack_file(packed: Path, where: str) -> BinaryIO:
    """A zstd file's content, in a file of its own among the temporary ones, which goes when it is closed.

    Raises:
        InputError: there is no room for it.
    """
    zstandard = open_library("zstandard")
    target = tempfile.NamedTemporaryFile(prefix="dino_cache_bag_", suffix=".unpacked")  # noqa: SIM115
    try:
        with open(open_regular(packed), "rb") as file:
            reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(file, read_across_frames=True)
            while block := reader.read(1 << 20):
                if free_bytes(Path(target.name)) < FREE_BYTES + len(block):
                    raise InputError(
                        f"{where}: is packed as a whole, and {os.path.dirname(target.name)} has no room to unpack it; "
                        "set TMPDIR to a folder on a larger disk"
                    )
                target.write(block)
                FENCE.getting_on()
        target.flush()
        return target
    except BaseException:
        target.close()
        raise


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


class OpenFile:
    """Reads of a regular file at places, through a window: for going through it record by record."""

    def __init__(self, path: Path, where: str):
        self._where, self._file = where, open(open_regular(path), "rb", buffering=0)  # noqa: SIM115
        self.size = os.fstat(self._file.fileno()).st_size
        self._start, self._window = 0, b""

    def read(self, place: int, size: int, *, whole: bool = True) -> bytes:
        """`size` bytes from `place`. Raises InputError where there are not so many, unless `whole` is False."""
        if not 0 <= size <= MOST_RECORD_BYTES:
            raise InputError(f"{self._where}: is damaged: a record of {size} bytes at {place}")
        begin = place - self._start
        if not (begin >= 0 and begin + size <= len(self._window)):
            if size > WINDOW_BYTES:
                data = self._read_from_disk(place, size)
            else:
                self._start, self._window, begin = place, self._read_from_disk(place, WINDOW_BYTES), 0
        if size <= WINDOW_BYTES:
            data = self._window[begin : begin + size]
        if whole and len(data) < size:
            raise InputError(f"{self._where}: is cut: a record at {place} needs more than its {self.size} bytes")
        return data

    def read_few(self, place: int, size: int) -> bytes:
        """As `read`, but no more than that: for a record far from the next one. May give less, at the file's end."""
        begin = place - self._start
        if begin >= 0 and begin + size <= len(self._window):
            return self._window[begin : begin + size]
        return self._read_from_disk(place, size)

    def _read_from_disk(self, place: int, size: int) -> bytes:
        parts = []
        while size and (part := os.pread(self._file.fileno(), size, place)):
            parts.append(part)
            place, size = place + len(part), size - len(part)
        return b"".join(parts)

    def close(self) -> None:
        self._file.close()


class Part(Protocol):
    """One file of a bag."""

    channels: dict[int, Channel]
    counts: Counter[int]  # messages a channel; empty where it is not known before they are read
    span_ns: tuple[int, int] | None  # of log times, first and last

    def messages(self, wanted: dict[int, int | None]) -> Iterator[tuple[int, int, int, int, bytes]]:
        """(channel, log time, chunk or -1, offset, data) in the file's order; of a channel so many bytes of each."""

    def read(self, chunk: int, offset: int) -> bytes:
        """A message."""

    def close(self) -> None:
        """Give back what is open."""


class ChunkTable:
    """Where a file's chunks lie, and where in the file the index of each channel's messages in it."""

    def __init__(self) -> None:
        self._chunks, self._index = array("q"), array("q")
        self.packing: list[str] = []

    def add_chunk(self, start: int, size: int, full_size: int, packing: str, crc: int = 0) -> None:
        self._chunks.extend((start, size, full_size, crc))
        self.packing.append(packing)

    def add_index(self, channel: int, start: int, count: int) -> None:
        self._index.extend((len(self.packing) - 1, channel, start, count))

    def chunk(self, number: int) -> tuple[int, int, int, int]:
        """Its start and size in the file, its size unpacked, and its checksum or 0."""
        return tuple(self._chunks[4 * number : 4 * number + 4])

    @property
    def index(self) -> np.ndarray:
        """(n, 4) int64: chunk, channel, start in the file, number of messages."""
        return np.array(self._index, np.int64).reshape(-1, 4)


class ChunkedFile:
    """What ROS1 bags and MCAP files have in common: chunks of messages, packed or not, each followed by an index of
    its messages by channel."""

    entry = np.dtype([])  # of an index: `log` fields and `offset`, in the chunk
    near_bytes = 0  # of a message's record before its data, at most, as a rule

    def __init__(self, path: Path, where: str):
        self._where, self._file = where, OpenFile(path, where)
        self._table = ChunkTable()
        self._loose: dict[int, array] = {}  # of messages without an index: channel -> chunk or -1, log time, offset
        self._unpacked: OrderedDict[int, bytes] = OrderedDict()
        self.channels: dict[int, Channel] = {}
        self.counts: Counter[int] = Counter()
        self.span_ns: tuple[int, int] | None = None

    def close(self) -> None:
        self._file.close()

    def _content(self, chunk: int) -> bytes | None:
        """An unpacked chunk; None where it lies unpacked in the file."""
        start, size, full_size, crc = self._table.chunk(chunk)
        if self._table.packing[chunk] in ("", "none"):
            return None
        if chunk not in self._unpacked:
            where = f"{self._where}: chunk {chunk}"
            with bag_errors(where):
                content = unpack(self._file.read(start, size), self._table.packing[chunk], full_size, where)
            if crc and zlib.crc32(content) != crc:
                raise InputError(f"{where} is damaged: its checksum is another")
            self._unpacked[chunk] = content
            while len(self._unpacked) > 1 and sum(map(len, self._unpacked.values())) > KEPT_CHUNK_BYTES:
                self._unpacked.popitem(last=False)
            FENCE.getting_on()
        self._unpacked.move_to_end(chunk)
        return self._unpacked[chunk]

    def _whole_content(self, chunk: int) -> bytes:
        content = self._content(chunk)
        return self._file.read(*self._table.chunk(chunk)[:2]) if content is None else content

    def messages(self, wanted: dict[int, int | None]) -> Iterator[tuple[int, int, int, int, bytes]]:
        """As Part has it: (channel, log time [ns], chunk or -1, offset, data). Raises InputError: damaged."""
        for chunk, entries in self._entries(wanted):
            content = self._content(chunk) if chunk >= 0 else None
            for channel, log_ns, offset in entries:
                data = self._message(chunk, offset, content, wanted[channel], (channel, log_ns))
                yield channel, log_ns, chunk, offset, data
            FENCE.getting_on()

    def read(self, chunk: int, offset: int) -> bytes:
        content = self._content(chunk) if chunk >= 0 else None
        return self._message(chunk, offset, content, None, None)

    def _entries(self, wanted: dict[int, int | None]) -> Iterator[tuple[int, list[tuple[int, int, int]]]]:
        """A chunk, or -1 for a file without, and (channel, log time, offset) of the wanted messages, as they lie."""
        index = self._table.index
        index = index[np.isin(index[:, 1], list(wanted))]
        loose = [
            np.insert(np.array(self._loose[channel], np.int64).reshape(-1, 3), 1, channel, axis=1)
            for channel in wanted
            if channel in self._loose
        ]
        loose = np.concatenate(loose) if loose else np.empty((0, 4), np.int64)
        loose = loose[np.lexsort((loose[:, 3], loose[:, 0]))]
        for chunk in np.union1d(index[:, 0], loose[:, 0]).tolist():
            first, stop = np.searchsorted(index[:, 0], (chunk, chunk + 1))
            entries = []
            for _, channel, start, count in index[first:stop].tolist():
                entries += self._index_of(channel, start, count)
            first, stop = np.searchsorted(loose[:, 0], (chunk, chunk + 1))
            entries += [tuple(row) for row in loose[first:stop, 1:].tolist()]
            yield chunk, sorted(entries, key=lambda entry: entry[2])

    def _index_of(self, channel: int, start: int, count: int) -> list[tuple[int, int, int]]:
        entries = np.frombuffer(self._file.read(start, count * self.entry.itemsize), self.entry)
        places = zip(self.log_times(entries).tolist(), entries["offset"].tolist())
        return [(channel, log_ns, offset) for log_ns, offset in places]

    @staticmethod
    def log_times(entries: np.ndarray) -> np.ndarray:
        """(n,) int64 [ns]."""
        raise NotImplementedError

    def _message(
        self, chunk: int, offset: int, content: bytes | None, most: int | None, expected: tuple[int, int] | None
    ) -> bytes:
        """A message's data, `most` bytes of them at most. Raises InputError where its record is not what its index says
        (channel, log time)."""
        where = f"{self._where}: the message at {offset}" + (f" of chunk {chunk}" if chunk >= 0 else "")
        if content is None:
            start, size = self._table.chunk(chunk)[:2] if chunk >= 0 else (0, self._file.size)
            limit = start + size

            def get(begin: int, count: int) -> bytes:
                return self._file.read_few(start + begin, max(0, min(count, limit - start - begin)))
        else:

            def get(begin: int, count: int) -> bytes:
                return content[begin : begin + count]

        near = get(offset, self.near_bytes + (1 << 12 if most is None else most))
        with bag_errors(where):
            begin, size, *found = self._record(near)
        if expected is not None and tuple(found) != expected:
            raise InputError(f"{where}: is damaged: its index says channel and time {expected}, it has {tuple(found)}")
        if size > MOST_RECORD_BYTES:
            raise InputError(f"{where}: has {size} bytes; {MOST_RECORD_BYTES} are read at most")
        take = size if most is None else min(size, most)
        data = near[begin : begin + take] if begin + take <= len(near) else get(offset + begin, take)
        if len(data) < take:
            raise InputError(f"{where}: is cut: it has {len(data)} of {take} bytes")
        return data

    @staticmethod
    def _record(near: bytes) -> tuple[int, int, int, int]:
        """Where a message's data begin in its record, how many bytes they are, its channel and its log time."""
        raise NotImplementedError


def header_fields(header: bytes) -> dict[str, bytes]:
    """The fields of a ROS1 bag's record header."""
    fields, place = {}, 0
    while place < len(header):
        (size,) = struct.unpack_from("<I", header, place)
        name, equals, value = header[place + 4 : place + 4 + size].partition(b"=")
        if not equals or place + 4 + size > len(header):
            raise ValueError("a record's header is no list of fields")
        fields[name.decode("ascii")] = value
        place += 4 + size
    return fields


def whole_number(value: bytes) -> int:
    return int.from_bytes(value, "little")


def _ros1_time(value: bytes) -> int:
    seconds, nanoseconds = struct.unpack("<II", value)
    return seconds * 10**9 + nanoseconds


class BagFile(ChunkedFile):
    """A ROS1 bag, version 2.0."""

    entry = np.dtype([("seconds", "<u4"), ("nanoseconds", "<u4"), ("offset", "<u4")])
    near_bytes = 256

    def __init__(self, path: Path, where: str):
        super().__init__(path, where)
        with bag_errors(where):
            self._read()

    @staticmethod
    def log_times(entries: np.ndarray) -> np.ndarray:
        return entries["seconds"].astype(np.int64) * 10**9 + entries["nanoseconds"]

    @staticmethod
    def _record(near: bytes) -> tuple[int, int, int, int]:
        (length,) = struct.unpack_from("<I", near)
        fields = header_fields(near[4 : 4 + length])
        if whole_number(fields["op"]) != BAG_OPS["message"]:
            raise ValueError("it is no message")
        (size,) = struct.unpack_from("<I", near, 4 + length)
        return 8 + length, size, whole_number(fields["conn"]), _ros1_time(fields["time"])

    def _records(self, place: int, stop: int) -> Iterator[tuple[dict[str, bytes], int, int]]:
        """Fields of a record's header, where its data begin, and how many bytes they are."""
        while place < stop:
            (length,) = struct.unpack("<I", self._file.read(place, 4))
            fields = header_fields(self._file.read(place + 4, length))
            (size,) = struct.unpack("<I", self._file.read(place + 4 + length, 4))
            begin = place + 8 + length
            if begin + size > stop:
                raise InputError(f"{self._where}: is cut: a record at {place} goes on beyond {stop} bytes")
            yield fields, begin, size
            place = begin + size
            FENCE.getting_on()

    def _read(self) -> None:
        if self._file.read(0, len(BAG_SIGN), whole=False) != BAG_SIGN:
            raise InputError(f"{self._where}: is no ROS1 bag of version 2.0; it does not begin with #ROSBAG V2.0")
        header, begin, size = next(self._records(len(BAG_SIGN), self._file.size), ({}, 0, 0))
        if whole_number(header.get("op", b"")) != BAG_OPS["header"]:
            raise InputError(f"{self._where}: is cut: it has no header")
        if header.get("encryptor"):
            raise InputError(f"{self._where}: is encrypted by {header['encryptor'].decode('ascii', 'replace')}")
        index_at = whole_number(header["index_pos"])
        if index_at == 0:
            raise InputError(f"{self._where}: has no index: its recording was cut; rosbag reindex makes one")
        if index_at > self._file.size:
            raise InputError(f"{self._where}: is cut: its index lies at {index_at}, beyond its {self._file.size} bytes")
        for fields, start, length in self._records(begin + size, index_at):
            op = whole_number(fields["op"])
            if op == BAG_OPS["chunk"]:
                self._table.add_chunk(
                    start, length, whole_number(fields["size"]), fields["compression"].decode("ascii")
                )
            elif op == BAG_OPS["index"]:
                count = whole_number(fields["count"])
                if length != count * self.entry.itemsize or not self._table.packing:
                    raise InputError(f"{self._where}: is damaged: an index at {start} has {length} bytes")
                self._table.add_index(whole_number(fields["conn"]), start, count)
        self._read_end(index_at, header)

    def _read_end(self, index_at: int, header: dict[str, bytes]) -> None:
        """Connections and what the chunks are said to hold, with which they must agree."""
        num_chunks, said, spans = 0, Counter(), []
        for fields, start, length in self._records(index_at, self._file.size):
            op = whole_number(fields["op"])
            if op == BAG_OPS["connection"]:
                more = header_fields(self._file.read(start, length))
                definition = more["message_definition"].decode("utf-8", "replace")
                kind = short_kind(more["type"].decode())
                topic = fields["topic"].decode("utf-8", "backslashreplace")
                self.channels[whole_number(fields["conn"])] = Channel(topic, kind, "ros1", definition, "msg")
            elif op == BAG_OPS["chunk info"]:
                num_chunks += 1
                pairs = np.frombuffer(self._file.read(start, length), "<u4").reshape(-1, 2)
                said.update(dict(pairs.tolist()))
                if len(pairs):
                    spans.append((_ros1_time(fields["start_time"]), _ros1_time(fields["end_time"])))
        index = self._table.index
        self.counts = Counter(dict.fromkeys(self.channels, 0))
        for channel, count in index[:, (1, 3)].tolist():
            self.counts[channel] += count
        promised = (whole_number(header["chunk_count"]), whole_number(header["conn_count"]), +said)
        found = (len(self._table.packing), len(self.channels), +self.counts)
        if num_chunks != promised[0] or found != promised:
            raise InputError(
                f"{self._where}: is cut or damaged: {found[0]} chunks, {found[1]} connections and "
                f"{found[2].total()} messages, where its header and its index have {promised[0]}, {promised[1]} and "
                f"{promised[2].total()}; rosbag reindex may mend it"
            )
        if spans:
            self.span_ns = min(first for first, _ in spans), max(last for _, last in spans)


class McapFile(ChunkedFile):
    """An MCAP file, of ROS1 or ROS2."""

    entry = np.dtype([("log", "<u8"), ("offset", "<u8")])
    near_bytes = 31

    def __init__(self, path: Path, where: str):
        super().__init__(path, where)
        self._schemas: dict[int, tuple[str, str, str]] = {}  # name, encoding, text
        self._raw_channels: dict[int, tuple[int, str, str]] = {}  # schema, topic, encoding
        with bag_errors(where):
            self._read()

    @staticmethod
    def log_times(entries: np.ndarray) -> np.ndarray:
        return entries["log"].astype(np.int64)

    @staticmethod
    def _record(near: bytes) -> tuple[int, int, int, int]:
        op, size, channel, _, log_ns, _ = struct.unpack_from("<BQHIQQ", near)
        if op != MCAP_OPS["message"] or size < 22:
            raise ValueError("it is no message")
        return 31, size - 22, channel, log_ns

    def _read(self) -> None:
        if self._file.read(0, 8, whole=False) != MCAP_SIGN:
            raise InputError(f"{self._where}: is no MCAP file by its first bytes")
        end = self._file.size - 8 - 29  # the footer: 9 bytes of a record's head, 20 of its own
        if end < 8 or self._file.read(self._file.size - 8, 8) != MCAP_SIGN or self._file.read(end, 1) != b"\x02":
            raise InputError(f"{self._where}: has no end: it was cut, or its recording was; mcap recover makes one")
        said = self._go_through(8, end)
        self._name_channels()
        for _, channel, _, count in self._table.index.tolist():
            self.counts[channel] += count
        for channel, entries in self._loose.items():
            self.counts[channel] += len(entries) // 3
        if said is not None and said != +self.counts:
            raise InputError(
                f"{self._where}: is damaged: its statistics have {said.total()} messages, its indexes "
                f"{self.counts.total()}; mcap recover may mend it"
            )
        for channel in self.channels:
            self.counts.setdefault(channel, 0)

    def _go_through(self, place: int, end: int) -> Counter[int] | None:
        """Take all records; the numbers of messages by channel that the file says it has, where it does."""
        said, chunk_indexed = None, True
        while place < end:
            op, size = struct.unpack("<BQ", self._file.read(place, 9))
            begin = place + 9
            if begin + size > end:
                raise InputError(f"{self._where}: is cut or damaged: a record at {place} goes on beyond its end")
            if op != MCAP_OPS["index"] and not chunk_indexed:
                self._look_through(len(self._table.packing) - 1)
            chunk_indexed = chunk_indexed or op != MCAP_OPS["chunk"]
            if op == MCAP_OPS["chunk"]:
                self._add_chunk(begin, size)
                chunk_indexed = False
            elif op == MCAP_OPS["index"]:
                channel, length = struct.unpack("<HI", self._file.read(begin, 6))
                if length != size - 6 or length % 16 or not self._table.packing:
                    raise InputError(f"{self._where}: is damaged: an index at {begin} has {length} bytes")
                self._table.add_index(channel, begin + 6, length // 16)
            elif op == MCAP_OPS["message"]:
                self._add_loose(-1, place, self._file.read(begin, 22))
            elif op in (MCAP_OPS["schema"], MCAP_OPS["channel"]):
                self._take(op, self._file.read(begin, size))
            elif op == MCAP_OPS["statistics"]:
                said = self._statistics(self._file.read(begin, size))
            place = begin + size
            FENCE.getting_on()
        if not chunk_indexed:
            self._look_through(len(self._table.packing) - 1)
        return said

    def _statistics(self, record: bytes) -> Counter[int]:
        first, last, length = struct.unpack_from("<QQI", record, 26)
        self.span_ns = (first, last) if last else None
        return +Counter(dict(struct.iter_unpack("<HQ", record[46 : 46 + length])))

    def _add_chunk(self, begin: int, size: int) -> None:
        head = self._file.read(begin, min(size, 96))
        first, last, full_size, crc, length = struct.unpack_from("<QQQII", head)
        packing = head[32 : 32 + length].decode("ascii")
        (packed_size,) = struct.unpack_from("<Q", head, 32 + length)
        if 40 + length + packed_size > size:
            raise InputError(f"{self._where}: is damaged: the chunk at {begin} is longer than its record")
        self._table.add_chunk(begin + 40 + length, packed_size, full_size, packing, crc)
        if last and self.span_ns is None:
            self.span_ns = first, last
        elif last:
            self.span_ns = min(first, self.span_ns[0]), max(last, self.span_ns[1])

    def _add_loose(self, chunk: int, offset: int, head: bytes) -> None:
        channel, _, log_ns, _ = struct.unpack("<HIQQ", head)
        self._loose.setdefault(channel, array("q")).extend((chunk, log_ns, offset))

    def _look_through(self, chunk: int) -> None:
        """Take what lies in a chunk that has no index."""
        content, place = self._whole_content(chunk), 0
        while place < len(content):
            op, size = struct.unpack_from("<BQ", content, place)
            record = content[place + 9 : place + 9 + size]
            if len(record) < size:
                raise InputError(f"{self._where}: is damaged: a record of chunk {chunk} is cut")
            if op == MCAP_OPS["message"]:
                self._add_loose(chunk, place, record[:22])
            elif op in (MCAP_OPS["schema"], MCAP_OPS["channel"]):
                self._take(op, record)
            place += 9 + size

    def _take(self, op: int, record: bytes) -> None:
        """A schema or a channel."""
        (number,) = struct.unpack_from("<H", record)
        if op == MCAP_OPS["schema"]:
            name, place = _text(record, 2)
            encoding, place = _text(record, place)
            self._schemas[number] = (name, encoding, _text(record, place)[0])
        else:
            (schema,) = struct.unpack_from("<H", record, 2)
            topic, place = _text(record, 4)
            self._raw_channels[number] = (schema, topic, _text(record, place)[0])

    def _name_channels(self) -> None:
        """Those of the records; where the end of the file does not repeat them, they lie in the chunks."""
        unnamed = {*self._table.index[:, 1].tolist(), *self._loose} - {*self._raw_channels}
        for chunk in range(len(self._table.packing) if unnamed else 0):
            before, self._loose = self._loose, {}
            self._look_through(chunk)
            self._loose = before
        for number, (schema, topic, encoding) in self._raw_channels.items():
            name, schema_encoding, text = self._schemas.get(schema, ("", "", ""))
            kind = {"ros1msg": "msg", "ros2msg": "msg", "ros2idl": "idl", "omgidl": "idl"}.get(schema_encoding, "")
            self.channels[number] = Channel(topic, short_kind(name), encoding, text if kind else "", kind)


def _text(record: bytes, place: int) -> tuple[str, int]:
    """A text with its length before it, and where the next value is."""
    (length,) = struct.unpack_from("<I", record, place)
    if place + 4 + length > len(record):
        raise ValueError("a text is longer than its record")
    return record[place + 4 : place + 4 + length].decode("utf-8", "backslashreplace"), place + 4 + length
