"""Reading a chunk file, and checking it against its record."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import h5py
import numpy as np

from dino_cache import (
    CHUNK_FORMAT,
    CHUNK_FORMAT_VERSION,
    COLUMN_SHAPES,
    EXTRA_PREFIX,
    POSE_SHAPES,
    POSE_TYPES,
    READ_BLOCK_BYTES,
    SEAL_BYTES,
    attributes_digest,
    bytes_digest,
    cameras_of,
    extra_dataset,
    metadata_digest,
    scale_dataset,
    token_dataset,
    token_names,
    token_of,
    token_type,
)
from progress_utils import (
    CANNOT_LOOK,
    PROGRESS_FILE,
    DamagedChunkError,
    Progress,
    RefusedError,
    TrajectoryRecord,
    chunk_file_name,
    progress_command,
    read_or_refuse,
)


class StoredDataset(NamedTuple):
    """Where a dataset's bytes lie in a chunk file, and what they are."""

    offset: int
    size: int  # [bytes]
    dtype: str
    digest: str
    shape: tuple[int, ...]


class ChunkHeader(NamedTuple):
    """What a chunk file says of itself; and its size [bytes]."""

    attributes: dict[str, Any]
    num_bytes: int
    datasets: dict[str, StoredDataset]


def read_chunk_header(path: Path, *, deep: bool) -> ChunkHeader:
    """Check a chunk file against its own attributes and digests; with `deep`, every byte of its datasets too.

    Raises:
        DamagedChunkError: anything is not as it was written.
        OSError: the file cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DamagedChunkError("is not a regular file")
    with open(path, "rb") as file:
        check_metadata(file)  # first: damaged metadata can crash HDF5, or keep it in a loop
    with hdf5_errors(), h5py.File(path, locking=False) as file:  # a chunk never changes, whoever else has it open
        attributes, stored = plain_attributes(file.attrs), stored_datasets(file)
        _check_attributes(attributes, {name: str(dataset.attrs.get("digest")) for name, dataset in stored.items()})
        shapes = dict(_dataset_shapes(attributes, stored))
        datasets = {
            name: check_dataset(stored[name], name, shape, dataset_type(name, shapes)) for name, shape in shapes.items()
        }
    if deep:
        for name, dataset in datasets.items():
            _check_bytes(path, name, dataset)
    return ChunkHeader(attributes, status.st_size, datasets)


def stored_datasets(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Name -> dataset of a chunk file; those of a group, as extra/action or front/cls_token, by both names."""
    found: dict[str, h5py.Dataset] = {}
    for name, item in file.items():
        if isinstance(item, h5py.Group):
            found |= {f"{name}/{inner}": dataset for inner, dataset in item.items()}
        else:
            found[name] = item
    return found


@contextlib.contextmanager
def hdf5_errors() -> Iterator[None]:
    """Turn what h5py raises of bad bytes into DamagedChunkError."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise DamagedChunkError(f"cannot be read as HDF5: {error}") from error


def check_metadata(file: BinaryIO) -> None:
    """Compare all bytes that are not a dataset's with the seal, HDF5 unasked."""
    try:
        seal = json.loads(file.read(SEAL_BYTES))
        intact = seal["digest"] == metadata_digest(file, seal["data"])
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, OSError) and error.errno in CANNOT_LOOK:
            raise
        raise DamagedChunkError(f"has no seal: {error}") from error
    if not intact:
        raise DamagedChunkError("its structure or attributes do not match their digest")


def token_datasets(spec: Mapping[str, Any], token: str) -> list[str]:
    """The names under which a chunk of this recorded spec has a token's datasets, one of each camera and layer."""
    names = token_names(token, spec.get("layers"))
    return [token_dataset(camera, name) for camera in cameras_of(spec.get("image_key")) for name in names]


def plain_attributes(attributes: h5py.AttributeManager, keys: Iterable[str] | None = None) -> dict[str, Any]:
    values = {key: attributes[key] for key in (attributes if keys is None else keys)}
    return {key: value if isinstance(value, str) else value.item() for key, value in values.items()}


def _check_attributes(attributes: dict[str, Any], dataset_digests: dict[str, str]) -> None:
    stored = attributes.pop("attributes_digest", None)
    check_chunk_format(attributes)
    if stored != attributes_digest(attributes, dataset_digests):
        raise DamagedChunkError("its attributes do not match their digest")


def check_chunk_format(attributes: Mapping[str, Any]) -> None:
    if attributes.get("format") != CHUNK_FORMAT:
        raise DamagedChunkError(f"format is {attributes.get('format')!r}, not {CHUNK_FORMAT!r}")
    version = attributes.get("format_version")
    if version != CHUNK_FORMAT_VERSION:
        raise DamagedChunkError(
            f"format_version is {version!r}, known is {CHUNK_FORMAT_VERSION}; if a newer dino_cache made it, update "
            "this one"
        )


def _dataset_shapes(
    attributes: dict[str, Any], present: Mapping[str, h5py.Dataset]
) -> Iterator[tuple[str, tuple[int | None, ...]]]:
    """(dataset name, shape) that a chunk's attributes promise; None where only the model knows. A chunk cut by number
    of frames has the poses that its source had, and those are covered by the digest if they are present; so are
    timestamp and delta, which chunks of 0.2.0 and earlier lack. What extra_keys names has the shape that it has."""
    length = attributes["stop"] - attributes["start"]
    spec = json.loads(attributes["spec"])
    by_distance = spec.get("chunk_by", "distance") == "distance"
    for name, shape in POSE_SHAPES.items():
        if by_distance or name == "frame_index" or name in present:
            yield name, (length, *shape)
    yield from ((name, (length, *shape)) for name, shape in COLUMN_SHAPES.items() if name in present)
    extras = dict.fromkeys(map(extra_dataset, spec.get("extra_keys", ())))
    for name in extras | dict.fromkeys(name for name in present if name.startswith(EXTRA_PREFIX)):
        yield name, (length, *present[name].shape[1:])
    token_dimensions = {"cls": 1, "patch": 3, "register": 2, "mean": 1}
    for token in spec["tokens"]:
        for name in token_datasets(spec, token):
            yield name, (length, *[None] * token_dimensions[token])
            if token == "patch" and spec.get("store") == "int8":
                yield scale_dataset(name), (length, None, None)


def camera_prefixes(names: Iterable[str]) -> list[str]:
    """What stands before the names of the tokens' datasets: of each camera its name and /, of one camera nothing."""
    tokens = (name for name in names if token_of(name) is not None)
    return sorted({name[: len(name) - len(name.rpartition("/")[2])] for name in tokens}) or [""]


def check_dataset(
    dataset: h5py.Dataset, name: str, shape: tuple[int | None, ...], dtype: str | None = None
) -> StoredDataset:
    """Check a dataset's type and shape, and that it lies in one piece. `dtype`: the one that it must have; None: by its
    name, any number in extra/."""
    expected_type = dtype or dataset_type(name) or _type_of_numbers(dataset)
    fits = len(shape) == dataset.ndim and all(want in (None, got) for want, got in zip(shape, dataset.shape))
    offset = dataset.id.get_offset()
    if dataset.dtype.str != expected_type or not fits or offset is None:
        raise DamagedChunkError(
            f"{name} is {dataset.shape} {dataset.dtype.str}, expected {shape} {expected_type} in one piece"
        )
    return StoredDataset(
        offset=offset,
        size=dataset.nbytes,
        dtype=expected_type,
        digest=dataset.attrs["digest"],
        shape=dataset.shape,
    )


def dataset_type(name: str, names: Container[str] = ()) -> str | None:
    """The type that a dataset of this name has, of a chunk with datasets of these `names`; None where that is the
    source's, in extra/."""
    if name.startswith(EXTRA_PREFIX):
        return None
    return "<f8" if name in COLUMN_SHAPES else POSE_TYPES.get(name) or token_type(name, names).str


def _type_of_numbers(dataset: h5py.Dataset) -> str:
    """A dataset's own type, where that is one of numbers."""
    found = dataset.dtype
    return found.str if found.kind in "biuf" and found.itemsize <= 8 else "numbers"


def may_hold_nan(name: str) -> bool:
    """Whether NaN in a dataset of this name says that there is nothing: no next frame in delta, no value in extra/."""
    return name == "delta" or name.startswith(EXTRA_PREFIX)


def _check_bytes(path: Path, name: str, dataset: StoredDataset) -> None:
    """Read a dataset's bytes past HDF5, block by block: they must match the digest and be finite, but where NaN means
    something."""
    running, finite, size = bytes_digest(), True, dataset.size
    must_be_finite = dataset.dtype.startswith("<f") and not may_hold_nan(name)
    with open(path, "rb") as file:
        file.seek(dataset.offset)
        while size > 0:
            block = file.read(min(size, READ_BLOCK_BYTES))
            if not block:
                raise DamagedChunkError(f"{name} ends early")
            running.update(block)
            finite &= not must_be_finite or bool(np.isfinite(np.frombuffer(block, dataset.dtype)).all())
            size -= len(block)
    if running.hexdigest() != dataset.digest:
        raise DamagedChunkError(f"the bytes of {name} do not match their digest")
    if not finite:
        raise DamagedChunkError(f"{name} is not finite")


RECORDED_ATTRIBUTES = ("trajectory", "chunk_index", "start", "stop", "fingerprint")
CHECKED_ATTRIBUTES = ("format", "format_version", "checksum_kind", "trajectory_checksum", *RECORDED_ATTRIBUTES)


class RecordedChunk(NamedTuple):
    """A chunk file, as the record has it."""

    cache_dir: Path
    trajectory: str
    chunk_index: int
    start: int
    stop: int
    num_bytes: int
    fingerprint: str
    checksum: str  # of the trajectory, <kind>:<digits>
    num_chunks: int | None = None  # of the trajectory; None where it is not known

    @property
    def path(self) -> str:
        return f"{self.cache_dir}/{self.trajectory}/{chunk_file_name(self.chunk_index)}"  # Path takes 10 us

    def is_of_another_kind(self, attributes: Mapping[str, Any]) -> bool:
        """Whether the file has a checksum of another kind than the record, so that `check` cannot compare them."""
        return not self.checksum.startswith(f"{attributes['checksum_kind']}:")

    def check(self, attributes: Mapping[str, Any]) -> None:
        """Raise DamagedChunkError unless these are the root attributes of the file that was recorded."""
        check_chunk_format(attributes)
        for key in RECORDED_ATTRIBUTES if self.num_chunks is None else (*RECORDED_ATTRIBUTES, "num_chunks"):
            if attributes[key] != getattr(self, key):
                raise DamagedChunkError(f"its {key} is {attributes[key]!r}, recorded is {getattr(self, key)!r}")
        digits = self.checksum.partition(":")[2]
        if not self.is_of_another_kind(attributes) and digits != attributes["trajectory_checksum"]:
            found = attributes["trajectory_checksum"]
            raise DamagedChunkError(
                f"it was made from other data than recorded: its trajectory_checksum is {found!r}, recorded is "
                f"{digits!r}"
            )


def recorded_chunks(cache_dir: Path, name: str, record: TrajectoryRecord, checksum: str) -> list[RecordedChunk]:
    """The chunk files of a trajectory, as its record has them."""
    return [
        RecordedChunk(
            cache_dir=cache_dir,
            trajectory=name,
            chunk_index=index,
            start=start,
            stop=stop,
            num_bytes=num_bytes,
            fingerprint=record["fingerprint"],
            checksum=f"{record['checksum_kind']}:{checksum}",
            num_chunks=len(record["spans"]),
        )
        for index, ((start, stop), num_bytes) in enumerate(zip(record["spans"], record["bytes"]))
    ]


def check_recorded(chunk: RecordedChunk, *, deep: bool) -> ChunkHeader:
    """The header of a chunk file that is the one recorded; with `deep`, every byte of it was checked.

    Raises:
        DamagedChunkError: it is damaged, or another one.
        OSError: it cannot be read.
    """
    header = read_chunk_header(Path(chunk.path), deep=deep)
    chunk.check(header.attributes)
    refuse_outdated(chunk, header.attributes)
    if header.num_bytes != chunk.num_bytes:
        raise DamagedChunkError(f"it has {header.num_bytes} bytes, recorded are {chunk.num_bytes}")
    return header


def refuse_outdated(chunk: RecordedChunk, attributes: Mapping[str, Any]) -> None:
    """Look into the record once more where a file's checksum is of another kind than the recorded one.

    Raises:
        DamagedChunkError: the trajectory was recorded anew since the record was read, so the file may be another. Where
            it was not, the kind was changed after the file was made.
        OSError: the record cannot be read.
    """
    if not chunk.is_of_another_kind(attributes):
        return
    try:
        status = os.stat(chunk.cache_dir / PROGRESS_FILE)
        now = _checksums_now(chunk.cache_dir, status.st_ino, status.st_mtime_ns).get(chunk.trajectory, "none")
    except (FileNotFoundError, RefusedError) as error:
        raise DamagedChunkError(f"the record can no longer be read: {error}") from error
    if now != chunk.checksum:
        raise DamagedChunkError(f"it was recorded anew: the checksum was {chunk.checksum}, now it is {now}")


@functools.lru_cache(4)
def _checksums_now(cache_dir: Path, *identity: int) -> dict[str, str]:
    """Trajectory -> <kind>:<digits>, by the record that lies there now, a file of this identity."""
    progress = Progress.parse(cache_dir, read_or_refuse(cache_dir))
    return {name: f"{record['checksum_kind']}:{progress.checksums[name]}" for name, record in progress.records.items()}


@contextlib.contextmanager
def recorded_chunk(progress: Progress, name: str, index: int, *, deep: bool) -> Iterator[Any]:
    """A recorded chunk file, open for reading once it proved to be what was recorded; with `deep`, every byte of it.

    Raises:
        RefusedError: it is missing or damaged, or a run replaced it since the record was read.
    """
    chunk = recorded_chunks(progress.cache_dir, name, progress.records[name], progress.checksums[name])[index]
    try:
        check_recorded(chunk, deep=deep)
        file = h5py.File(chunk.path, locking=False)
    except (DamagedChunkError, OSError) as error:
        raise RefusedError(
            f"{chunk.path}: {error}. If a run has just replaced it, give the command again; else "
            f"{progress_command(f'verify --cache-dir {progress.cache_dir} --deep --repair')} and a run mend it"
        ) from error
    with file:
        yield file


class NewRows(NamedTuple):
    """Rows [start, stop) of a chunk, those that no chunk before it has."""

    index: int  # of the chunk
    start: int
    stop: int


def is_cut_by_frames(spec: dict[str, Any]) -> bool:
    """Whether chunks of this spec were cut by their number of frames: without distances, and at no pose jump."""
    return spec.get("chunk_by") == "frames"


def pieces(progress: Progress, name: str) -> list[list[NewRows]]:
    """A trajectory's pieces without a gap, each frame once: chunks cut by distance overlap, unless there is a gap."""
    record = progress.records[name]
    has_gaps = not is_cut_by_frames(progress.specs[record["fingerprint"]])
    pieces, done = [], -1
    for index, (start, stop) in enumerate(record["spans"]):
        if not pieces or (has_gaps and start >= done):
            pieces.append([])
        pieces[-1].append(NewRows(index, max(0, done - start), stop - start))
        done = stop
    return pieces
