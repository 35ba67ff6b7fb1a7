"""A cache's record as a table of chunks, indexed without opening one."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import tempfile
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino_cache import NOT_OF_ENCODER, StorageError, bytes_digest, with_defaults, without_guesses
from dino_cache_extras.chunk_files import ChunkHeader, RecordedChunk, check_recorded
from progress_utils import (
    PROGRESS_FILE,
    DamagedChunkError,
    Progress,
    RefusedError,
    is_locked,
    program_name,
    progress_command,
    read_or_refuse,
    unmerged_shards,
    waiting_in_shards,
)

INDEX_PREFIX = ".index-"  # begins the name of a large record's index, kept beside it for the next reader
MIN_INDEXED_BYTES = 1 << 20  # a record smaller than this is read about as quickly as its index


@dataclass(frozen=True)
class CacheIndex:
    """What a cache's record says of its completed trajectories, in order of their names, and of their chunks."""

    names: list[str]
    checksums: list[str]  # of each trajectory, <kind>:<digits>
    fingerprints: list[str]  # in use
    chunks: np.ndarray  # (n, 6) int64: places in `names` and `fingerprints`, chunk_index, start, stop, size [bytes]


def cache_index(cache_dir: Path) -> CacheIndex:
    """Index a cache by its record alone. A large record's index is kept beside it, named by the record's digest.

    Raises:
        RefusedError: there is no record, or it is unreadable, corrupt, of a newer version or empty.
    """
    stored = read_or_refuse(cache_dir)
    digest = bytes_digest(stored.text.encode())
    digest.update(stored.journal)
    file = cache_dir / f"{INDEX_PREFIX}{digest.hexdigest()}.npz"
    index = _kept_index(file)
    if index is None:
        index = _index_of(Progress.parse(cache_dir, stored))
        if len(stored.text) + len(stored.journal) >= MIN_INDEXED_BYTES:
            _keep_index(file, index)
    if waiting := unmerged_shards(cache_dir) and waiting_in_shards(cache_dir, set(index.names)):
        warnings.warn(f"{cache_dir}: {waiting}", stacklevel=2)
    return index


def _index_of(progress: Progress) -> CacheIndex:
    path, names = progress.cache_dir / PROGRESS_FILE, sorted(progress.records)
    if not names:
        waiting = waiting_in_shards(progress.cache_dir, ())
        way = waiting or f"run {program_name('dino_cache.py')} first"
        raise RefusedError(f"{path}: no trajectory is completed yet; {way}")
    fingerprints = sorted(progress.fingerprints)
    numbers = {fingerprint: number for number, fingerprint in enumerate(fingerprints)}
    rows = (
        (place, numbers[record["fingerprint"]], index, *span, size)
        for place, record in enumerate(map(progress.records.__getitem__, names))
        for index, (span, size) in enumerate(zip(record["spans"], record["bytes"]))
    )
    try:
        chunks = np.fromiter(itertools.chain.from_iterable(rows), np.int64).reshape(-1, 6)
        _check_spans(chunks, names)
    except (ValueError, OverflowError) as error:
        raise RefusedError(
            f"{path}: not a usable progress record: {error}. "
            f"{progress_command(f'rebuild --cache-dir {progress.cache_dir}')} makes it anew from the chunk files"
        ) from error
    checksums = [f"{progress.records[name]['checksum_kind']}:{progress.checksums[name]}" for name in names]
    return CacheIndex(names, checksums, fingerprints, chunks)


def _check_spans(chunks: np.ndarray, names: list[str]) -> None:
    """Raise ValueError unless every trajectory's spans are as a chunk plan has them: in order, none inside another."""
    place, _, _, start, stop, _ = chunks.T
    follows = place[1:] == place[:-1]
    wrong = (start < 0) | (stop <= start)
    wrong[1:] |= follows & ((start[1:] <= start[:-1]) | (stop[1:] <= stop[:-1]))
    if wrong.any():
        raise ValueError(f"trajectory_records[{names[place[wrong.argmax()]]!r}]: spans are not in order")


def _kept_index(file: Path) -> CacheIndex | None:
    """The index in a file, or None where there is none that can be used."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            chunks = stored["chunks"].astype(np.int64, casting="safe").reshape(-1, 6)
            return CacheIndex(**json.loads(stored["texts"].tobytes()), chunks=chunks)
    except (OSError, EOFError, ValueError, TypeError, KeyError, RecursionError, zipfile.BadZipFile, zlib.error):
        return None


def _keep_index(file: Path, index: CacheIndex) -> None:
    """Leave an index for the next start and remove those of earlier records; not where a run holds the cache, nor where
    it cannot be written. It is not forced to the disk: a torn one fails its checksums and is made anew."""
    if is_locked(file.parent):
        return
    texts = {key: value for key, value in vars(index).items() if key != "chunks"}
    with contextlib.suppress(OSError):
        with tempfile.NamedTemporaryFile(dir=file.parent, prefix=INDEX_PREFIX, delete=False) as temporary:
            np.savez(temporary, chunks=index.chunks, texts=np.frombuffer(json.dumps(texts).encode(), np.uint8))
        os.chmod(temporary.name, 0o644)
        os.replace(temporary.name, file)
        for path in file.parent.glob(INDEX_PREFIX + "*"):
            if path != file:
                path.unlink(missing_ok=True)


def reading_error(chunk: RecordedChunk, error: Exception) -> Exception:
    """What to tell the user where a chunk could not be read: file, reason, remedy."""
    if isinstance(error, OSError) and error.errno not in (errno.ENOENT, errno.ENOTDIR):
        return StorageError(f"{chunk.path}: cannot read: {error.strerror or error}")
    reason = "recorded, but not there" if isinstance(error, OSError) else error
    return DamagedChunkError(
        f"{chunk.path}: {reason}. If a run has redone it since this dataset was made, make the dataset anew; else "
        f"{progress_command(f'verify --cache-dir {chunk.cache_dir} --deep')} says what is wrong"
    )


def recorded_header(chunk: RecordedChunk) -> ChunkHeader:
    """The header of a chunk file, checked against the record.

    Raises:
        DamagedChunkError, StorageError: as `CacheWindows` when it reads.
    """
    try:
        return check_recorded(chunk, deep=False)
    except (DamagedChunkError, OSError) as error:
        raise reading_error(chunk, error) from error


class ChunkTable:
    """The chunks of several caches, one after another, numbered from 0."""

    def __init__(self, cache_dirs: list[Path], indexes: list[CacheIndex]):
        self.cache_dirs, self._indexes = cache_dirs, indexes
        self._chunks = np.concatenate([index.chunks for index in indexes])
        self.cache = np.repeat(np.arange(len(indexes)), [len(index.chunks) for index in indexes])
        self.start, self.stop = self._chunks[:, 3], self._chunks[:, 4]
        begins = np.ones(len(self), bool)
        begins[1:] = (np.diff(self._chunks[:, 0]) != 0) | (np.diff(self.cache) != 0)
        self.trajectory = np.cumsum(begins) - 1  # a number for each trajectory of all caches

    def __len__(self) -> int:
        return len(self._chunks)

    def __getitem__(self, number: int) -> RecordedChunk:
        place, fingerprint, chunk_index, start, stop, num_bytes = self._chunks[number].tolist()
        cache = self.cache[number]
        index = self._indexes[cache]
        return RecordedChunk(
            cache_dir=self.cache_dirs[cache],
            trajectory=index.names[place],
            chunk_index=chunk_index,
            start=start,
            stop=stop,
            num_bytes=num_bytes,
            fingerprint=index.fingerprints[fingerprint],
            checksum=index.checksums[place],
        )

    def one_of_each_configuration(self) -> list[RecordedChunk]:
        """A chunk of each fingerprint in each cache, in order."""
        return [self[number] for number in self._configurations(return_index=True).tolist()]

    def configuration(self) -> np.ndarray:
        """(n,) number of each chunk's, in `one_of_each_configuration`."""
        return self._configurations(return_inverse=True)

    def _configurations(self, **what: bool) -> np.ndarray:
        return np.unique(self.cache << 32 | self._chunks[:, 1], **what)[1]


def open_table(cache_dirs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]]) -> ChunkTable:
    """The chunks of one cache folder or several, by their records.

    Raises:
        RefusedError: no folder is given, or one twice, or a record cannot be used.
    """
    one = isinstance(cache_dirs, (str, os.PathLike))
    paths = [Path(os.path.abspath(path)) for path in ([cache_dirs] if one else cache_dirs)]
    if not paths:
        raise RefusedError("cache_dirs: no cache folder is given")
    for place, path in enumerate(paths):
        if path in paths[:place]:
            raise RefusedError(f"cache_dirs: {path} is given twice")
    return ChunkTable(paths, [cache_index(path) for path in paths])


# Settings that leave a frame's features as they are: those that reach no encoder, but for those that choose and fit the
# picture; which tokens are stored; and where weights were found (what they are, weights_digest tells).
NOT_OF_FEATURES = NOT_OF_ENCODER - {"image_key", "resize", "guessed_keys"} | {"tokens", "weights"}


def refuse_mixed(chunks: list[RecordedChunk], headers: list[ChunkHeader]) -> None:
    """Refuse trajectories of several configurations in one cache, and caches whose features differ.

    Raises:
        RefusedError: naming the cache and the settings that differ.
    """
    first_in: dict[Path, dict[str, Any]] = {}
    for chunk, header in zip(chunks, headers):
        settings = without_guesses(with_defaults(json.loads(header.attributes["spec"])))
        settings["weights_digest"] = header.attributes["weights_digest"]
        others = first_in.setdefault(chunk.cache_dir, settings)
        if others is not settings:
            what = "its trajectories"
        else:
            what = f"its features and those of {chunks[0].cache_dir}"
            first = first_in[chunks[0].cache_dir]
            others = {key: value for key, value in first.items() if key not in NOT_OF_FEATURES}
        differences = [
            f"{key}: {value} or {settings.get(key)}" for key, value in others.items() if value != settings.get(key)
        ]
        if differences:
            raise RefusedError(
                f"{chunk.cache_dir / PROGRESS_FILE}: mixed: {what} were made with different settings ("
                f"{', '.join(differences)}). Read together what belongs together, or pass allow_mixed=True"
            )
