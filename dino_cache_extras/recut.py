"""--recut: completed trajectories are cut anew from the tokens in their chunks; frames that are in none are encoded.

    take_up          which completed trajectories, before the work; each gets OldChunks, where its tokens are read
    old_rows         in a reader: in which of these chunks, and where there, the tokens of each kept frame lie
    RecutWriter      in the writer: the new chunks, filled from the old ones, every byte of which is digested before
    NoEncoder        takes the encoder's place where all frames were stored: no model is loaded

A mark in the record, `recut_started`, makes the next run go on, with or without the option.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from dino_cache import (
    FENCE,
    READ_BLOCK_BYTES,
    ChecksumKind,
    ChunkLabel,
    DataKeys,
    EncodedRows,
    InputError,
    PreparedDataset,
    TrajectoryPlan,
    TrajectoryWriter,
    bytes_digest,
    checksum_of,
    data_keys,
    open_source,
    recorded_spec,
    settle_recorded_keys,
    spec_differences,
    storage_errors,
    token_bytes,
    token_dataset,
)
from dino_cache_extras.chunk_files import ChunkHeader, RecordedChunk, StoredDataset, read_chunk_header
from dino_cache_extras.smaller_tokens import sampled_before
from progress_utils import DamagedChunkError, DinoCacheError, RefusedError, human_bytes, human_list, progress_command

# Settings that neither make a frame's tokens nor say which picture a frame_index means: they choose among the frames,
# cut them, or make what lies beside the tokens. A setting forgotten here costs time, never truth.
RECUT_SETTINGS = {
    *("max_chunk_distance_m", "overlap_distance_m", "min_chunk_distance_m"),
    *("chunk_by", "max_chunk_frames", "overlap_frames", "frame_stride", "sample_hz"),
    *("position_scale", "yaw_offset", "extra_keys"),
}


# ---------------------------------------------------------------------------------------------------------------------
# What is cut anew
# ---------------------------------------------------------------------------------------------------------------------


class OldChunks(NamedTuple):
    """The recorded chunks of a completed trajectory, for those who plan it anew, in whatever process."""

    cache_dir: Path
    fingerprint: str
    spans: tuple[tuple[int, int], ...]
    num_bytes: tuple[int, ...]
    checksum: str  # <kind>:<digits>, as recorded: the files have it too
    data_checksum: str  # of the data when the run began, of the kind now asked for
    data_checksum_kind: ChecksumKind
    old_keys: DataKeys | None  # with which it was computed, where they are not those of now

    def files(self, name: str) -> list[RecordedChunk]:
        """One of each chunk of the trajectory called so."""
        return [
            RecordedChunk(
                cache_dir=self.cache_dir,
                trajectory=name,
                chunk_index=index,
                start=start,
                stop=stop,
                num_bytes=num_bytes,
                fingerprint=self.fingerprint,
                checksum=self.checksum,
                num_chunks=len(self.spans),
            )
            for index, ((start, stop), num_bytes) in enumerate(zip(self.spans, self.num_bytes))
        ]


def obstacles(differences: list[tuple[str, Any, Any]]) -> list[tuple[str, Any, Any]]:
    """Those of the changes after which features are others, or may be."""
    return [difference for difference in differences if difference[0] not in RECUT_SETTINGS]


def refuse_other_features(dataset: PreparedDataset, differences: list[tuple[str, Any, Any]]) -> None:
    """Raise RefusedError where a change cannot be followed without encoding, or all is redone anyway."""
    if dataset.config.options.force_rebuild:
        raise RefusedError(
            f"{dataset.name}: force_rebuild: True redoes every feature, and --recut keeps them: take one of them out"
        )
    if changed := obstacles(differences):
        what = "; ".join(f"{key}: {old} -> {new}" for key, old, new in changed)
        raise RefusedError(
            f"{dataset.name}: --recut: features would be others, which only encoding gives ({what}). Nothing was "
            "changed. Ways on: undo these changes; --force-rebuild redoes everything; --yes keeps what is completed "
            "and makes the rest with the new configuration"
        )


def take_up(dataset: PreparedDataset) -> None:
    """Make pending what is completed, with the features that are wanted and another cut. The others stay."""
    progress, kind_now = dataset.progress, dataset.config.options.checksum
    differs_in_cut, keys_now = which_differ_in_cut(dataset), data_keys(dataset.spec)
    keys_of = functools.cache(lambda fingerprint: DataKeys.of(progress.specs[fingerprint]))
    for place, state in enumerate(dataset.states):
        name = state.trajectory.name
        record = progress.records.get(name)
        if state.status != "completed" or record is None or not differs_in_cut(record["fingerprint"]):
            continue
        if state.remark:  # it cannot be looked at now
            dataset.recut_is_left = True
            continue
        old_keys = keys_of(record["fingerprint"])
        old = OldChunks(
            cache_dir=dataset.config.cache_dir,
            fingerprint=record["fingerprint"],
            spans=tuple(map(tuple, record["spans"])),
            num_bytes=tuple(record["bytes"]),
            checksum=f"{record['checksum_kind']}:{progress.checksums[name]}",
            data_checksum=state.new_checksum or progress.checksums[name],
            data_checksum_kind=kind_now,
            old_keys=None if old_keys == keys_now else old_keys,
        )
        dataset.states[place] = state._replace(trajectory=state.trajectory._replace(old=old), status="pending")
        dataset.recut.append(name)
    if dataset.recut or dataset.recut_is_left:
        progress.recut_started = progress.recut_started or time.time()


def which_differ_in_cut(dataset: PreparedDataset) -> Callable[[str], bool]:
    """Tells whether what has a recorded fingerprint was made with the features that are wanted, and cut otherwise."""
    progress = dataset.progress
    digest = (progress.weights or {}).get("digest")

    @functools.cache
    def differs_in_cut(fingerprint: str) -> bool:
        settings = progress.specs[fingerprint]
        changes = spec_differences(settings, dataset.spec)
        if digest is None or not changes or obstacles(changes):
            return False
        try:
            return recorded_spec(settings).fingerprint(digest) == fingerprint  # else other weights made it
        except ValueError:  # a setting that this version does not know
            return False

    return differs_in_cut


def describe(dataset: PreparedDataset) -> str:
    """What is cut anew, and what is encoded for that, in a line."""
    frames = sum(dataset.work[name].num_frames for name in dataset.recut if name in dataset.work)
    num_bytes = sum(sum(dataset.progress.records[name]["bytes"]) for name in dataset.recut)
    return (
        f"to re-cut: {len(dataset.recut)} completed trajectories ({human_bytes(num_bytes)}), of which {frames} frames "
        f"are in no chunk and are encoded: {human_list(dataset.recut)}"
    )


def begin(dataset: PreparedDataset) -> None:
    """Put the mark and the configuration into the record before any dataset's work: a plain run goes on with all."""
    progress = dataset.progress
    settle_recorded_keys(progress.specs, dataset.spec)
    progress.processing_config = dataset.spec.to_json()
    with storage_errors(dataset.config.cache_dir):
        progress.save()


# ---------------------------------------------------------------------------------------------------------------------
# Where tokens lie
# ---------------------------------------------------------------------------------------------------------------------


class OldRows(NamedTuple):
    """Where the tokens of a plan's kept frames lie, one place for each frame: (T,) int64 each."""

    chunk: np.ndarray  # index of the old chunk, the first that holds the frame; -1: none does
    row: np.ndarray  # in it


def old_rows(plan: TrajectoryPlan) -> OldRows:
    """Find the kept frames of a trajectory in its old chunks.

    Raises:
        InputError: a chunk is damaged or cannot be read, or the data changed since the run began.
        OSError: the data cannot be read.
    """
    trajectory, old = plan.trajectory, plan.trajectory.old
    if plan.checksum_kind == old.data_checksum_kind:
        checksum = plan.checksum
        if old.old_keys is not None:  # a checksum may cover what they name
            checksum = checksum_of(open_source(trajectory, old.old_keys), plan.checksum_kind)
        if checksum != old.data_checksum:
            raise InputError(f"{trajectory.name}: its data changed while it was read; run the same command again")
    numbers = []
    for file in old.files(trajectory.name):
        numbers.append(_frame_index(file))
        FENCE.getting_on()
    first = np.cumsum([0, *map(len, numbers)])  # of each chunk, among the rows of all
    known, places = np.unique(np.concatenate(numbers), return_index=True)  # the first of those with one number
    nearest = np.minimum(np.searchsorted(known, plan.frame_index), len(known) - 1)
    place = places[nearest]
    chunk = np.searchsorted(first, place, side="right") - 1
    row = place - first[chunk]
    return OldRows(np.where(known[nearest] == plan.frame_index, chunk, -1), row)


def _frame_index(file: RecordedChunk) -> np.ndarray:
    """(L,) int64 of an old chunk, whose bytes match their digest."""
    stored = _checked_header(file, deep=False).datasets["frame_index"]
    values = _read_rows(file, stored, 0, stored.shape[0], "<i8")
    if bytes_digest(values).hexdigest() != stored.digest:
        _refuse_damaged(file, "the bytes of frame_index do not match their digest")
    return values


def _checked_header(file: RecordedChunk, *, deep: bool) -> ChunkHeader:
    """The header of a chunk file that is the one recorded; with `deep`, every byte of it was checked. Raises
    InputError: the run goes on without its trajectory, whose chunks stay."""
    try:
        header = read_chunk_header(Path(file.path), deep=deep)
        file.check(header.attributes)
        if header.num_bytes != file.num_bytes:
            raise DamagedChunkError(f"it has {header.num_bytes} bytes, recorded are {file.num_bytes}")
    except (DamagedChunkError, OSError) as error:
        _refuse_damaged(file, error)
    return header


def _refuse_damaged(file: RecordedChunk, why: object) -> NoReturn:
    mend = progress_command(f"verify --cache-dir {file.cache_dir} --deep --repair")
    raise InputError(f"{file.path}: cannot be re-cut: {why}; {mend} takes it out, and the next run encodes it anew")


def _read_rows(file: RecordedChunk, stored: StoredDataset, start: int, stop: int, dtype: str) -> np.ndarray:
    """Rows [start, stop) of a dataset, past HDF5. Raises InputError."""
    shape = (stop - start, *stored.shape[1:])
    values = np.empty(shape, dtype)
    row_bytes = values.nbytes // len(values) if len(values) else 0
    try:
        with open(file.path, "rb") as opened:
            opened.seek(stored.offset + start * row_bytes)
            count = opened.readinto(values.reshape(-1).view(np.uint8))
    except OSError as error:
        _refuse_damaged(file, error)
    if count != values.nbytes:
        _refuse_damaged(file, "it ends early")
    return values


class OldTokens:
    """Reads the tokens of kept frames out of old chunks, each of which is checked to the byte before it is used."""

    def __init__(self, plan: TrajectoryPlan, label: ChunkLabel, block: int):
        self._plan, self._label, self._block = plan, label, block
        self._files = plan.trajectory.old.files(plan.trajectory.name)
        self._headers: dict[int, ChunkHeader] = {}

    def of(self, camera: str | None, rows: np.ndarray) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
        """Kept frames `rows` (n,), ascending, in parts: (m,) rows, and dataset name -> (m, ...) as stored."""
        chunks, places = self._plan.old.chunk[rows], self._plan.old.row[rows]
        cuts = np.flatnonzero((np.diff(chunks) != 0) | (np.diff(places // self._block) != 0)) + 1
        for part in np.split(np.arange(len(rows)), cuts):
            yield rows[part], self._tokens(camera, int(chunks[part[0]]), places[part])

    def _tokens(self, camera: str | None, chunk: int, places: np.ndarray) -> dict[str, np.ndarray]:
        file, header = self._files[chunk], self._header(chunk)
        start, stop = int(places[0]), int(places[-1]) + 1
        tokens = {}
        for name, shape in self._label.token_shapes.items():
            stored = header.datasets.get(token_dataset(camera, name))
            if stored is None or stored.shape[1:] != shape:
                _refuse_damaged(file, f"it has no {token_dataset(camera, name)} of {shape}")
            tokens[name] = _read_rows(file, stored, start, stop, stored.dtype)[places - start]
        return {**tokens, **sampled_before(header.attributes, self._label, camera, places)}

    def _header(self, chunk: int) -> ChunkHeader:
        if chunk not in self._headers:
            file = self._files[chunk]
            header = _checked_header(file, deep=True)
            if header.attributes["weights_digest"] != self._label.weights_digest:
                _refuse_damaged(file, "other weights made it")
            used = self._plan.old.chunk == chunk
            if (_frame_index(file)[self._plan.old.row[used]] != self._plan.frame_index[used]).any():
                _refuse_damaged(file, "it holds other frames than when the run began")
            self._headers[chunk] = header
        return self._headers[chunk]


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class RecutWriter(TrajectoryWriter):
    """The new chunks of a trajectory: rows that are encoded come to `write`, all others from old chunks, in blocks. The
    cameras go on side by side, so that few chunks are open at a time. After a stop nothing more is written."""

    def __init__(self, folder: Path, plan: TrajectoryPlan, label: ChunkLabel, should_stop: Callable[[], bool]):
        super().__init__(folder, plan, label)
        # rows of a camera that are in memory at a time
        self._block = max(1, READ_BLOCK_BYTES // token_bytes(label.token_shapes))
        self._rows, self._should_stop = plan.stored_rows, should_stop
        self._encoded = np.flatnonzero(plan.old.chunk[self._rows] < 0)  # places in _rows that come to `write`
        self._done = dict.fromkeys(label.spec.cameras, 0)  # camera -> places in _rows that are written
        self._tokens = OldTokens(plan, label, self._block)

    def write(self, rows: np.ndarray, tokens: dict[str, np.ndarray], camera: str | None = None) -> None:
        """Write kept frames `rows` (n,) of a camera, ascending, what lies before them, and after the last ones all.

        Raises:
            InputError: an old chunk is damaged.
        """
        places = np.searchsorted(self._rows, rows)
        for part in np.split(np.arange(len(rows)), np.flatnonzero(np.diff(places) != 1) + 1):
            first, last = int(places[part[0]]), int(places[part[-1]])
            if not self._fill(first):
                return
            if self._done[camera] != first:
                raise RuntimeError(f"{self.plan.trajectory.name}: rows from {first} on came after {self._done[camera]}")
            super().write(rows[part], {name: values[part] for name, values in tokens.items()}, camera)
            self._done[camera] = last + 1
        if min(self._done.values()) > self._encoded[-1]:
            self.write_rest()

    def write_rest(self) -> None:
        """Write all that is left, which is in old chunks. Raises InputError where one is damaged."""
        self._fill(len(self._rows))

    def _fill(self, limit: int) -> bool:
        """Write from old chunks what lies before the place `limit` and waits for no encoded row, of all cameras; says
        whether that was done, and no stop came between."""
        has_gone_on = True
        while has_gone_on:
            has_gone_on = False
            for camera, begin in self._done.items():
                stop = self._next_encoded(begin, min(limit, begin + self._block))
                if stop <= begin:
                    continue
                if self._should_stop():
                    return False
                for rows, tokens in self._tokens.of(camera, self._rows[begin:stop]):
                    super().write(rows, tokens, camera)
                self._done[camera], has_gone_on = stop, True
        return True

    def _next_encoded(self, begin: int, limit: int) -> int:
        """The first place from `begin` on that comes to `write`; `limit` where none is before it."""
        after = self._encoded[np.searchsorted(self._encoded, begin) :]
        return min(limit, int(after[0])) if len(after) else limit


class NoEncoder:
    """An encoder where nothing is to encode."""

    batches_in_flight = 0
    default_batch_size = 1
    most_rows = 1

    def new_pixels(self, batch_size: int) -> None:
        """Nothing is put there."""

    def encode(self, pixels: Any) -> Callable[[], EncodedRows]:
        """Never asked."""
        raise DinoCacheError("frames are to be encoded that were stored before; run the same command again")

    def drop(self) -> None:
        """Nothing waits."""
