"""CacheWindows: windows of frames to train on, straight from the chunk files."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np

from dino_cache import POSE_SHAPES, POSE_TYPES, TOKEN_DATASETS, Token, bytes_digest, cameras_of
from dino_cache_extras.cache_index import (
    ChunkTable,
    open_table,
    reading_error,
    recorded_header,
    refuse_mixed,
)
from dino_cache_extras.chunk_files import (
    CHECKED_ATTRIBUTES,
    ChunkHeader,
    RecordedChunk,
    check_dataset,
    check_metadata,
    hdf5_errors,
    plain_attributes,
    refuse_outdated,
)
from progress_utils import DamagedChunkError, RefusedError

if TYPE_CHECKING:
    import torch


MAX_OPEN_CHUNKS = 128  # chunk files that a reader holds open; 256 open files is the least that systems grant a process


def frame_shapes(
    chunks: list[RecordedChunk], headers: list[ChunkHeader], tokens: Sequence[Token]
) -> dict[str, tuple[int, ...]]:
    """Dataset name -> shape of one frame's tokens, the same in all these chunks.

    Raises:
        RefusedError: a chunk lacks one of the tokens, or shapes differ.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for chunk, header in zip(chunks, headers):
        if (cameras := cameras_of(json.loads(header.attributes["spec"]).get("image_key"))) != (None,):
            raise RefusedError(f"{chunk.path}: holds several cameras ({', '.join(cameras)}), which cannot be read yet")
    for (chunk, header), token in itertools.product(zip(chunks, headers), tokens):
        name = TOKEN_DATASETS[token]
        if name not in header.datasets:
            held = [token for token, dataset in TOKEN_DATASETS.items() if dataset in header.datasets]
            raise RefusedError(
                f"{chunk.path}: tokens: {token} is asked for, and this cache holds {', '.join(held)}; ask for those, "
                f"or make one with tokens: [{', '.join([*held, token])}]"
            )
        shape = header.datasets[name].shape[1:]
        if shapes.setdefault(name, shape) != shape:
            raise RefusedError(
                f"{chunk.path}: {name} of a frame is {shape}, in {chunks[0].path} {shapes[name]}: they do not fit into "
                "one batch. Read these caches apart"
            )
    return shapes


def common_poses(
    chunks: list[RecordedChunk], headers: list[ChunkHeader], *, distances_needed: bool
) -> dict[str, tuple[int, ...]]:
    """Dataset name -> shape of one frame's pose, of those that all these chunks have.

    Raises:
        RefusedError: distances are needed, and a chunk has none.
    """
    for chunk, header in zip(chunks, headers):
        if distances_needed and "travelled_distance" not in header.datasets:
            raise RefusedError(
                f"{chunk.path}: goal: is drawn by travelled distance, and this cache has none: it was cut with "
                "chunk_by: frames. Read it without goal, or make one with chunk_by: distance"
            )
    return {name: shape for name, shape in POSE_SHAPES.items() if all(name in header.datasets for header in headers)}


class SampleField(NamedTuple):
    """One key of a sample, and the dataset that it is read from."""

    key: str
    dataset: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_goal: bool = False


def sample_fields(
    shapes: dict[str, tuple[int, ...]], window: int, dtype: torch.dtype, *, with_goal: bool
) -> list[SampleField]:
    """The keys of a sample, in order. `shapes`: dataset name -> shape of one frame, tokens of `dtype` and poses."""
    import torch

    types = {name: getattr(torch, np.dtype(stored).name) for name, stored in POSE_TYPES.items()}
    fields = [SampleField("index", None, (), torch.int64)]
    fields += [SampleField(name, name, (window, *shape), types.get(name, dtype)) for name, shape in shapes.items()]
    if with_goal:
        fields += [
            SampleField(f"goal_{name}", name, shape, types.get(name, dtype), is_goal=True)
            for name, shape in shapes.items()
        ]
        fields.append(SampleField("goal_valid", None, (), torch.bool))
    return fields


class OpenChunk:
    """A chunk file open for reading past HDF5: its poses, and rows of tokens straight into the caller's memory.

    pread, not a mapping: it reads from the same page cache without page faults, shares no state with a forked process,
    and where a file is cut short or a mount lost it is an error; a mapping would end the process (SIGBUS).
    """

    def __init__(self, chunk: RecordedChunk):
        self._length = chunk.stop - chunk.start
        self._offsets: dict[str, int] = {}  # of its datasets
        self.poses: dict[str, np.ndarray] = {}  # dataset name -> (L, ...)
        self._descriptor = os.open(chunk.path, os.O_RDONLY | os.O_CLOEXEC)
        status = os.fstat(self._descriptor)
        if status.st_size != chunk.num_bytes:
            raise DamagedChunkError(f"it has {status.st_size} bytes, recorded are {chunk.num_bytes}")
        self.identity = hash((status.st_dev, status.st_ino, status.st_mtime_ns))

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)

    def check(self, chunk: RecordedChunk, shapes: dict[str, tuple[int, ...]]) -> list[int]:
        """Compare the file with its record; returns its datasets' offsets, -1 for a pose that its trajectory does not
        have. DamagedChunkError where anything differs."""
        with open(self._descriptor, "rb", closefd=False) as file:
            check_metadata(file)
            with hdf5_errors(), h5py.File(file) as content:
                attributes = plain_attributes(content.attrs, CHECKED_ATTRIBUTES)
                chunk.check(attributes)
                refuse_outdated(chunk, attributes)
                return [
                    -1  # that it was never there, the seal has vouched for
                    if name in POSE_SHAPES and name not in content
                    else check_dataset(content[name], name, (self._length, *shape)).offset
                    for name, shape in shapes.items()
                ]

    def read_poses(self, offsets: dict[str, int]) -> None:
        """Read all poses, in one piece: they are small and lie one after another. `offsets`: of all datasets. A pose
        that the trajectory does not have is NaN."""
        self._offsets = offsets
        shapes = {name: (self._length, *shape) for name, shape in POSE_SHAPES.items() if name in offsets}
        there = {name: shape for name, shape in shapes.items() if offsets[name] >= 0}
        begin = min(offsets[name] for name in there)
        piece = bytearray(max(offsets[name] + 8 * math.prod(shape) for name, shape in there.items()) - begin)
        self._read(begin, memoryview(piece))
        for name, shape in shapes.items():
            if name in there:
                self.poses[name] = np.ndarray(shape, POSE_TYPES[name], piece, offsets[name] - begin)
            else:
                self.poses[name] = np.full(shape, np.nan)

    def read_rows(self, dataset: str, rows: range, memory: memoryview) -> None:
        """Fill `memory` with rows of a dataset."""
        offset, size = self._offsets[dataset], len(memory) // len(rows)
        if rows.step == 1:
            self._read(offset + rows.start * size, memory)
        else:
            for place, row in enumerate(rows):
                self._read(offset + row * size, memory[place * size : (place + 1) * size])

    def _read(self, offset: int, memory: memoryview) -> None:
        while memory:
            count = os.preadv(self._descriptor, [memory], offset)
            if count == 0:
                raise DamagedChunkError("it ends early")
            memory, offset = memory[count:], offset + count


class ChunkFiles:
    """The files of a table's chunks, opened and checked when first read, few of them open at a time.

    It goes to another process without its open files. A file once checked is known again by its inode and time, so that
    opening it once more takes microseconds.
    """

    def __init__(self, table: ChunkTable, shapes: dict[str, tuple[int, ...]]):
        self._table, self._shapes = table, shapes
        self._checked = np.zeros(len(table), np.int64)  # identity of the file that was checked; 0: none was
        self._offsets = np.zeros((len(table), len(shapes)), np.int64)
        self.open = functools.lru_cache(MAX_OPEN_CHUNKS)(self._open)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChunkFiles, (self._table, self._shapes)

    def _open(self, number: int) -> OpenChunk:
        chunk = self._table[number]
        opened = OpenChunk(chunk)
        if opened.identity != self._checked[number]:
            self._offsets[number] = opened.check(chunk, self._shapes)
            self._checked[number] = opened.identity
        opened.read_poses(dict(zip(self._shapes, self._offsets[number].tolist())))
        return opened


class WindowBatch(Sequence):
    """B samples; their tensors are views of the batch's, `whole`: key -> (B, ...). All lie in one piece of memory, in a
    DataLoader's worker shared memory, so that a batch goes to the main process as it is, by a single descriptor."""

    def __init__(self, fields: list[SampleField], count: int):
        import torch.utils.data

        sizes = [count * math.prod(field.shape) * field.dtype.itemsize for field in fields]
        begins = [0, *itertools.accumulate(-(-size // 64) * 64 for size in sizes)]  # aligned for every dtype
        is_worker = torch.utils.data.get_worker_info() is not None
        storage = (torch.UntypedStorage._new_shared if is_worker else torch.UntypedStorage)(begins[-1])
        flat = torch.empty(0, dtype=torch.uint8).set_(storage)
        pieces = {field.key: flat[begin : begin + size] for field, begin, size in zip(fields, begins, sizes)}
        self.whole = {field.key: pieces[field.key].view(field.dtype).view(count, *field.shape) for field in fields}
        self._poses = [(field, self.whole[field.key].numpy()) for field in fields if field.dataset in POSE_SHAPES]
        self._tokens = [
            (
                field,
                memoryview(pieces[field.key].numpy()),
                None if field.dtype == torch.float16 else torch.empty(field.shape, dtype=torch.float16),
            )
            for field in fields
            if field.dataset in TOKEN_DATASETS.values()
        ]
        self._count = count

    def fill(self, place: int, chunk: OpenChunk, rows: range, goal_row: int) -> None:
        """Read sample number `place` from a chunk's rows."""
        window, goal = slice(rows.start, rows.stop, rows.step), range(goal_row, goal_row + 1)
        for part, values in self._poses:
            values[place] = chunk.poses[part.dataset][goal_row if part.is_goal else window]
        for part, memory, stored in self._tokens:
            size = len(memory) // self._count
            into = memory[place * size : (place + 1) * size] if stored is None else memoryview(stored.numpy()).cast("B")
            chunk.read_rows(part.dataset, goal if part.is_goal else rows, into)
            if stored is not None:
                self.whole[part.key][place].copy_(stored)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (self._samples,)

    @functools.cached_property
    def _samples(self) -> list[dict[str, torch.Tensor]]:
        return [dict(zip(self.whole, row)) for row in zip(*(tensor.unbind() for tensor in self.whole.values()))]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place: int) -> dict[str, torch.Tensor]:
        return self._samples[place]


def plan_windows(
    trajectories: Iterable[Hashable], spans: Iterable[tuple[int, int]], length: int, stride: int
) -> Iterator[tuple[int, int]]:
    """Place windows over `length` frames in chunks; yields each chunk's first window's first frame, and their number.

    A trajectory's first window starts at the first frame from which one fits into a chunk, every next one at the first
    such frame at least `stride` later: none crosses a chunk's border, and none appears twice where chunks overlap.

    Args:
        trajectories: the one that each chunk belongs to.
        spans: of each chunk, half-open; within a trajectory in order, none inside another.
    """
    previous, earliest = None, 0
    for trajectory, (start, stop) in zip(trajectories, spans):
        if trajectory != previous:
            previous, earliest = trajectory, 0
        first = max(start, earliest)
        count = max(0, (stop - length - first) // stride + 1)
        if count:
            earliest = first + count * stride
        yield first, count


def _check_arguments(counts: dict[str, int], tokens: Sequence[str], goal: tuple[float, float] | None) -> None:
    """Refuse arguments of CacheWindows that make no sense."""
    for name, value in counts.items():
        if value < 1:
            raise RefusedError(f"{name}: {value} must be at least 1")
    for token in tokens:
        if token not in TOKEN_DATASETS:
            raise RefusedError(f"tokens: {token!r} is none of {', '.join(TOKEN_DATASETS)}")
    if goal is not None and not 0 <= goal[0] <= goal[1]:
        raise RefusedError(f"goal: {goal} must be (low, high) with 0 <= low <= high [m]")


class WindowSource(NamedTuple):
    """Where a window comes from: `rows` of the trajectory's chunk file number `chunk_index`."""

    cache_dir: Path
    trajectory: str
    chunk_index: int
    rows: range


class CacheWindows:
    """Windows of consecutive frames of one or several caches: a map-style dataset for torch's DataLoader.

        windows = CacheWindows("/data/my_robot/dino_cache_large", window=8, tokens=("cls", "patch"))
        loader = DataLoader(windows, batch_size=64, shuffle=True, num_workers=4, collate_fn=windows.collate)

    A sample is a dict of tensors, of W frames:

        cls_token (W, D), patch_tokens (W, h, w, D), register_tokens (W, R, D): those asked for, of `dtype`
        position (W, 2) float64 [m], yaw (W,) float64 [rad], frame_index (W,) int64,
        travelled_distance (W,) float64 [m] from the trajectory's frame 0; of a cache cut with chunk_by: frames, no
            travelled_distance, and only the poses that the first trajectory has, NaN in those that lack them
        index () int64: the sample's own, for `source`
        goal_<each of these> of one later frame, without the axis W, and goal_valid () bool: with `goal`

    Windows are in order of cache, trajectory name and frame; `plan_windows` says where they start. Caches are indexed
    by their progress.json alone. A chunk file is opened when it is first read, by the process that reads it, and
    compared with the record: one that was redone since is an error, never a mix. A DataLoader calls `__len__` and
    `__getitems__` and needs no base class, so importing this needs no torch. `collate` hands a batch on without copying
    it; a tensor of it that is kept keeps all of it. torch's default collate works too.

    Args:
        cache_dirs: one cache folder, or several.
        window: frames of a sample.
        stride: kept frames from the start of a window to that of the next, at least.
        frame_step: kept frames from one frame of a window to the next.
        tokens: any of cls, patch, register; () for poses alone.
        dtype: of the tokens, any floating type of torch; None: float16, as stored.
        goal: (low, high) [m]. The goal is drawn, uniformly, from the frames of the window's chunk after its last frame
            whose travelled distance from that frame is at least low and at most high. Where there is none (goal_valid
            False) it is the first frame beyond, or the chunk's last. It depends on (seed, epoch, index) alone, so that
            all workers and samplers agree.
        allow_mixed: take trajectories and caches made with different settings.
        seed: of the goals.

    Raises:
        RefusedError: a cache is empty, mixed, newer than this program, or lacks what is asked for (tokens; distances
            for goals); the file is named.
        DamagedChunkError: when read, a chunk file is missing, damaged, or not the one recorded.
        StorageError: when read, a chunk file cannot be read.
    """

    def __init__(
        self,
        cache_dirs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        window: int,
        stride: int = 1,
        *,
        frame_step: int = 1,
        tokens: Token | Sequence[Token] = ("cls",),
        dtype: torch.dtype | None = None,
        goal: tuple[float, float] | None = None,
        allow_mixed: bool = False,
        seed: int = 0,
    ):
        import torch

        tokens = (tokens,) if isinstance(tokens, str) else tuple(tokens)
        _check_arguments({"window": window, "stride": stride, "frame_step": frame_step}, tokens, goal)
        dtype = dtype or torch.float16
        if not dtype.is_floating_point:
            raise RefusedError(f"dtype: {dtype} is no floating type")
        self._table = open_table(cache_dirs)
        chunks = self._table.one_of_each_configuration()
        headers = [recorded_header(chunk) for chunk in chunks]
        if not allow_mixed:
            refuse_mixed(chunks, headers)
        poses = common_poses(chunks, headers, distances_needed=goal is not None)
        shapes = {**frame_shapes(chunks, headers, tokens), **poses}
        self._files = ChunkFiles(self._table, shapes)
        self._fields = sample_fields(shapes, window, dtype, with_goal=goal is not None)
        self._length, self._stride, self._frame_step = (window - 1) * frame_step + 1, stride, frame_step
        self._goal, self._seed = goal, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # it reaches workers that are at work already
        self._first_row, self._first_index = self._place_windows()

    def _place_windows(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each chunk the first window's first row in the file, and its index."""
        table = self._table
        spans = zip(table.start.tolist(), table.stop.tolist())
        plan = plan_windows(table.trajectory.tolist(), spans, self._length, self._stride)
        first, count = np.fromiter(itertools.chain.from_iterable(plan), np.int64).reshape(-1, 2).T
        if not count.any():
            longest = table[int((table.stop - table.start).argmax())]
            raise RefusedError(
                f"{longest.path}: a window spans {self._length} frames, and this, the longest chunk, has "
                f"{longest.stop - longest.start}; ask for a smaller window or frame_step"
            )
        return first - table.start, np.concatenate([[0], np.cumsum(count)])

    def __len__(self) -> int:
        return int(self._first_index[-1])

    def set_epoch(self, epoch: int) -> None:
        """Draw other goals from now on, in this process and its workers."""
        self._epoch.fill_(epoch)

    def source(self, index: int) -> WindowSource:
        """Where a window comes from."""
        (number,), (row,) = self._locate([index])
        chunk = self._table[number]
        rows = range(row, row + self._length, self._frame_step)
        return WindowSource(chunk.cache_dir, chunk.trajectory, chunk.chunk_index, rows)

    def trajectories(self) -> dict[tuple[Path, str], range]:
        """(cache folder, trajectory name) -> the indices of its windows, to split by trajectory with Subset."""
        chunks = np.searchsorted(self._table.trajectory, np.arange(self._table.trajectory[-1] + 2)).tolist()
        ends = self._first_index[chunks].tolist()
        names = ((chunk.cache_dir, chunk.trajectory) for chunk in map(self._table.__getitem__, chunks[:-1]))
        return {name: range(*ends[place : place + 2]) for place, name in enumerate(names)}

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index + len(self) if index < 0 else index])[0]

    def __getitems__(self, indices: Sequence[int]) -> WindowBatch:
        """The samples at `indices`, in that order; they are read file by file."""
        import torch

        numbers, rows = self._locate(indices)
        batch = WindowBatch(self._fields, len(numbers))
        batch.whole["index"].copy_(torch.as_tensor(indices))
        for place in np.lexsort((rows, numbers)).tolist():
            try:
                self._read_window(batch, place, int(indices[place]), int(numbers[place]), int(rows[place]))
            except (DamagedChunkError, OSError) as error:
                raise reading_error(self._table[int(numbers[place])], error) from error
        return batch

    def _read_window(self, batch: WindowBatch, place: int, index: int, number: int, row: int) -> None:
        """Read window number `index`, at `row` of a chunk, into the batch."""
        chunk = self._files.open(number)
        rows = range(row, row + self._length, self._frame_step)
        goal_row = rows[-1]
        if self._goal is not None:
            goal_row, is_valid = self._choose_goal(chunk, rows[-1], index)
            batch.whole["goal_valid"][place] = is_valid
        batch.fill(place, chunk, rows, goal_row)

    @staticmethod
    def collate(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A batch of samples, (B, ...) under each key: as it was read, where it was read as a batch."""
        import torch.utils.data

        return samples.whole if isinstance(samples, WindowBatch) else torch.utils.data.default_collate(samples)

    def _locate(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of each window its chunk's number and its first row."""
        index = np.asarray(indices, np.int64)
        for wrong in index[(index < 0) | (index >= len(self))]:
            raise IndexError(f"window {wrong} of {len(self)}")
        number = np.searchsorted(self._first_index, index, side="right") - 1
        return number, self._first_row[number] + (index - self._first_index[number]) * self._stride

    def _choose_goal(self, chunk: OpenChunk, last_row: int, index: int) -> tuple[int, bool]:
        """The row of a window's goal, and whether it lies within the distances asked for."""
        travelled = chunk.poses["travelled_distance"][last_row:]
        distance = travelled - travelled[0]
        first = max(1, int(np.searchsorted(distance, self._goal[0])))
        count = int(np.searchsorted(distance, self._goal[1], side="right")) - first
        if count <= 0:
            return last_row + min(first, len(distance) - 1), False
        draw = bytes_digest(f"{self._seed} {int(self._epoch)} {index}".encode()).digest()
        return last_row + first + (int.from_bytes(draw) * count >> 8 * len(draw)), True
