"""CacheWindows: windows of frames to train on, straight from the chunk files."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np

from dino_cache import POSE_SHAPES, POSE_TYPES, TOKEN_DATASETS, Token, scale_dataset, token_of
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
from dino_cache_extras.frame_data import POSE_NAMES, FrameType, column_types, pose_types, token_types
from dino_cache_extras.labels import (
    VINT_GOAL_STEPS,
    Goals,
    LabelRules,
    Labels,
    draw,
    jump_lengths,
    refuse_without_poses,
)
from dino_cache_extras.smaller_tokens import dequantise_into, has_scale, new_block, restored
from progress_utils import DamagedChunkError, RefusedError

if TYPE_CHECKING:
    import torch


MAX_OPEN_CHUNKS = 128  # chunk files that a reader holds open; 256 open files is the least that systems grant a process


class SampleField(NamedTuple):
    """One key of a sample, and the dataset that it is read from; of int8 tokens, that of their scales."""

    key: str
    dataset: str | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_goal: bool = False
    scales: str | None = None


def sample_fields(
    types: dict[str, FrameType], window: int, dtype: torch.dtype, *, with_goal: bool, raw: bool = False
) -> list[SampleField]:
    """The keys of a sample, in order. `types`: dataset name -> one frame's values; tokens become `dtype`, but with
    `raw` those of int8, whose scales have keys of their own then."""
    import torch

    scales = {name: scale_dataset(name) for name in types if has_scale(name, types)}
    undone = {} if raw else scales
    kept = {name: stored for name, stored in types.items() if name not in undone.values()}
    kinds = {
        name: dtype if is_tokens(name) and (name in undone or name not in scales) else torch_type(stored.dtype)
        for name, stored in kept.items()
    }
    fields = [SampleField("index", None, (), torch.int64)]
    for prefix, rows in (("", (window,)), ("goal_", ())) if with_goal else (("", (window,)),):
        fields += [
            SampleField(prefix + name, name, (*rows, *stored.shape), kinds[name], bool(prefix), undone.get(name))
            for name, stored in kept.items()
        ]
    if with_goal:
        fields.append(SampleField("goal_valid", None, (), torch.bool))
    return fields


def is_tokens(dataset: str) -> bool:
    return token_of(dataset) is not None


def torch_type(stored: str) -> torch.dtype:
    import torch

    return getattr(torch, np.dtype(stored).name)


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

    def check(self, chunk: RecordedChunk, types: dict[str, FrameType]) -> list[int]:
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
                    if name in POSE_NAMES and name not in content
                    else check_dataset(content[name], name, (self._length, *stored.shape), stored.dtype).offset
                    for name, stored in types.items()
                ]

    def read_poses(self, offsets: dict[str, int]) -> None:
        """Read all poses, in one piece: they are small and lie one after another. `offsets`: of all datasets. A pose
        that the trajectory does not have is NaN."""
        self._offsets = offsets
        shapes = {
            name: (self._length, *shape)
            for name, shape in POSE_SHAPES.items()
            if name in POSE_NAMES and name in offsets
        }
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

    def __init__(self, table: ChunkTable, types: dict[str, FrameType]):
        self._table, self._types = table, types
        self._checked = np.zeros(len(table), np.int64)  # identity of the file that was checked; 0: none was
        self._offsets = np.zeros((len(table), len(types)), np.int64)
        self.open = functools.lru_cache(MAX_OPEN_CHUNKS)(self._open)

    def __reduce__(self) -> tuple[Any, ...]:
        return ChunkFiles, (self._table, self._types)

    def _open(self, number: int) -> OpenChunk:
        chunk = self._table[number]
        opened = OpenChunk(chunk)
        if opened.identity != self._checked[number]:
            self._offsets[number] = opened.check(chunk, self._types)
            self._checked[number] = opened.identity
        opened.read_poses(dict(zip(self._types, self._offsets[number].tolist())))
        return opened

    @contextlib.contextmanager
    def reading(self, number: int) -> Iterator[None]:
        """Says of what goes wrong with a chunk's file which it is and what to do."""
        try:
            yield
        except (DamagedChunkError, OSError) as error:
            raise reading_error(self._table[number], error) from error

    def poses_of(self, number: int) -> dict[str, np.ndarray]:
        """Dataset name -> (L, ...) of a chunk."""
        with self.reading(number):
            return self.open(number).poses


class WindowBatch(Sequence):
    """B samples; their tensors are views of the batch's, `whole`: key -> (B, ...). All lie in one piece of memory, in a
    DataLoader's worker shared memory, so that a batch goes to the main process as it is, by a single descriptor.
    `pin`: elsewhere in pinned memory."""

    def __init__(self, fields: list[SampleField], count: int, *, pin: bool = False):
        import torch.utils.data

        sizes = [count * math.prod(field.shape) * field.dtype.itemsize for field in fields]
        begins = [0, *itertools.accumulate(-(-size // 64) * 64 for size in sizes)]  # aligned for every dtype
        if torch.utils.data.get_worker_info() is not None:
            flat = torch.empty(0, dtype=torch.uint8).set_(torch.UntypedStorage._new_shared(begins[-1]))
        else:
            flat = torch.empty(begins[-1], dtype=torch.uint8, pin_memory=pin)
        pieces = {field.key: flat[begin : begin + size] for field, begin, size in zip(fields, begins, sizes)}
        self.whole = {field.key: pieces[field.key].view(field.dtype).view(count, *field.shape) for field in fields}
        self._poses = [
            [
                (field, self.whole[field.key].numpy())
                for field in fields
                if field.dataset in POSE_NAMES and field.is_goal is is_goal
            ]
            for is_goal in (False, True)
        ]
        self._rows = [
            [
                (field, memoryview(pieces[field.key].numpy()), self._as_stored(field))
                for field in fields
                if field.dataset is not None and field.dataset not in POSE_NAMES and field.is_goal is is_goal
            ]
            for is_goal in (False, True)
        ]
        self._blocks = {width: new_block(width) for width in {field.shape[-1] for field in fields if field.scales}}
        self._count = count

    @staticmethod
    def _as_stored(field: SampleField) -> dict[str, torch.Tensor] | None:
        """Dataset -> where it is read to, of tokens that are then converted."""
        import torch

        if field.scales is not None:
            values, scales = torch.empty(field.shape, dtype=torch.int8), torch.empty(field.shape[:-1], dtype=torch.half)
            return {field.dataset: values, field.scales: scales}
        is_other = is_tokens(field.dataset) and field.dtype not in (torch.float16, torch.int8)
        return {field.dataset: torch.empty(field.shape, dtype=torch.float16)} if is_other else None

    def fill(self, place: int, chunk: OpenChunk, rows: range, *, is_goal: bool = False) -> None:
        """Read the window of sample number `place`, or its goal, one row, from a chunk's rows."""
        chosen = rows.start if is_goal else slice(rows.start, rows.stop, rows.step)
        for field, values in self._poses[is_goal]:
            values[place] = chunk.poses[field.dataset][chosen]
        for field, memory, stored in self._rows[is_goal]:
            if stored is None:
                size = len(memory) // self._count
                chunk.read_rows(field.dataset, rows, memory[place * size : (place + 1) * size])
                continue
            for dataset, values in stored.items():
                chunk.read_rows(dataset, rows, memoryview(values.numpy()).cast("B"))
            target = self.whole[field.key][place]
            if field.scales is None:
                target.copy_(stored[field.dataset])
            else:
                dequantise_into(stored[field.dataset], stored[field.scales], target, self._blocks[field.shape[-1]])

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


def _names(given: str | Sequence[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)


def _check_arguments(
    counts: dict[str, int],
    tokens: Sequence[str],
    names: dict[str, Sequence[str] | None],
    goal: tuple[float, float] | None,
) -> None:
    """Refuse arguments of CacheWindows that make no sense."""
    for argument, given in names.items():
        for name in given or ():
            if given.count(name) > 1:
                raise RefusedError(f"{argument}: {name!r} is given twice")
    if names["cameras"] == ():
        raise RefusedError("cameras: name one, or leave it out for all; tokens=() leaves all tokens out")
    for name, value in counts.items():
        if value < 1:
            raise RefusedError(f"{name}: {value} must be at least 1")
    for token in tokens:
        if token not in TOKEN_DATASETS and ("/" in token or token_of(token) is None):
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

        cls_token (W, D), patch_tokens (W, h, w, D), register_tokens (W, R, D), mean_token (W, D): those asked for, of
            `dtype`; of a cache with layers cls_token_l05, cls_token_l11, ...; of one with patch_pool, h and w are those
            of the pooled grid, and with store: int8 values are de-quantised
        position (W, 2) float64 [m], yaw (W,) float64 [rad], frame_index (W,) int64,
        travelled_distance (W,) float64 [m] from the trajectory's frame 0; of a cache cut with chunk_by: frames, no
            travelled_distance, and only the poses that the first trajectory has, NaN in those that lack them
        index () int64: the sample's own, for `source`
        timestamp (W,) float64 [s], delta (W, 3) float64, extra/<name> (W, ...) as stored: with `extra`; delta holds dx,
            dy [m] and dyaw [rad] to the next kept frame in the frame's own axes, NaN where there is none
        goal_<each of these> of another frame, without the axis W, and goal_valid () bool: with `goal` or `goal_steps`
        waypoints (n, 4) float32, waypoint_mask (n,) bool: with `waypoints`
        goal_distance () int64 [kept frames], is_negative () bool, goal_pose (4,) float32: with `goal_steps`; goal_pose
            where all chunks have position and yaw
        label_unit_m () float32 [m]: with `normalise`, what x and y of waypoints and goal_pose were divided by

    Of several cameras, tokens are front/cls_token, left/cls_token, ...: keys are the datasets' names in a chunk file.
    Waypoints and goal_pose are x, y, and cosine and sine of the turn, from the window's last frame: x forward, y left.

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
        tokens: any of cls, patch, register, mean, of all layers that there are, or of one: patch_tokens_l11; () for
            poses alone.
        dtype: of the tokens, any floating type of torch; None: float16, as stored.
        goal: (low, high) [m]. The goal is drawn, uniformly, from the frames of the window's chunk after its last frame
            whose travelled distance from that frame is at least low and at most high. Where there is none (goal_valid
            False) it is the first frame beyond, or the chunk's last. It depends on (seed, epoch, index) alone, so that
            all workers and samplers agree.
        allow_mixed: take trajectories and caches made with different settings.
        seed: of the goals.
        extra: columns: timestamp, delta, and names of those in extra/. Asking makes the start look into a chunk of each
            trajectory, since not all may have them.
        cameras: of caches with several, in this order; None: all, which must be the same in all caches.
        waypoints: how many; the poses `waypoint_step`, 2 * `waypoint_step`, ... kept frames after the window's last
            frame, also beyond its chunk. Where its trajectory ends or is cut before (waypoint_mask False), the last
            waypoint is repeated.
        normalise: divide x and y of waypoints and goal_pose by `waypoint_step` times this length of a step [m], or by
            one for each cache; True: by the cache's mean step, see `step_lengths`. False: metres.
        goal_steps: (low, high) [kept frames]. The goal is drawn, uniformly, from the frames so far after the window's
            last one, or before where negative, of its trajectory as far as that is not cut; where there is none
            (goal_valid False) it is that part's last frame, or its first.
        negatives: share of goals that are drawn, uniformly, from the frames of the cache's other trajectories instead:
            is_negative is True, goal_distance the high one of `goal_steps`, goal_pose NaN. Without `goal_steps`, these
            are ViNT's, (0, 20).
        raw: give tokens that are stored as int8 as they are, and patch_tokens_scale (W, h, w) float16: half the bytes
            to a device, where `restored` de-quantises them.
        pin_memory: have batches in pinned memory, for copies to a device that do not wait. Those of a DataLoader's
            workers it pins itself, with its own pin_memory=True.

    Raises:
        RefusedError: a cache is empty, mixed, newer than this program, or lacks what is asked for (tokens, cameras,
            columns, poses; distances for goals); the file or folder is named. Or no memory can be pinned.
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
        extra: str | Sequence[str] = (),
        cameras: str | Sequence[str] | None = None,
        waypoints: int = 0,
        waypoint_step: int = 1,
        normalise: bool | float | Sequence[float] = False,
        goal_steps: tuple[int, int] | None = None,
        negatives: float = 0.0,
        raw: bool = False,
        pin_memory: bool = False,
    ):
        import torch

        tokens, extra, cameras = _names(tokens), _names(extra), None if cameras is None else _names(cameras)
        counts = {"window": window, "stride": stride, "frame_step": frame_step}
        _check_arguments(counts, tokens, {"extra": extra, "cameras": cameras}, goal)
        lengths = normalise if isinstance(normalise, Real) else tuple(normalise)
        if negatives and goal is None and goal_steps is None:
            goal_steps = VINT_GOAL_STEPS
        rules = LabelRules(waypoints, waypoint_step, lengths, goal_steps, negatives)
        dtype = dtype or torch.float16
        if not dtype.is_floating_point:
            raise RefusedError(f"dtype: {dtype} is no floating type")
        if raw and dtype != torch.float16:
            raise RefusedError(f"dtype: {dtype}: raw gives tokens as they are stored; give it to restored instead")
        if pin_memory and not torch.cuda.is_available():
            raise RefusedError("pin_memory: torch sees no CUDA device, without which no memory is pinned; leave it out")
        self._pin = pin_memory
        self._table = open_table(cache_dirs)
        rules.check(goal, len(self._table.cache_dirs))
        chunks = self._table.one_of_each_configuration()
        headers = [recorded_header(chunk) for chunk in chunks]
        if not allow_mixed:
            refuse_mixed(chunks, headers)
        if rules.waypoints:
            refuse_without_poses([chunk.cache_dir for chunk in chunks], headers, "waypoints")
        types = {
            **token_types(chunks, headers, tokens, cameras),
            **pose_types(chunks, headers, distances_needed=goal is not None),
            **column_types(self._table, extra),
        }
        self._files = ChunkFiles(self._table, types)
        with_goal = goal is not None or goal_steps is not None
        self._fields = sample_fields(types, window, dtype, with_goal=with_goal, raw=raw)
        self._length, self._stride, self._frame_step = (window - 1) * frame_step + 1, stride, frame_step
        self._goal, self._seed = goal, seed
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # it reaches workers that are at work already
        self._first_row, self._first_index = self._place_windows()
        self._labels = self._make_labels(rules, headers, types)

    def _make_labels(self, rules: LabelRules, headers: list[ChunkHeader], types: dict[str, FrameType]) -> Labels | None:
        """None where none are asked for. Adds their keys."""
        if not rules.is_asked:
            return None
        jumps = jump_lengths(headers, self._table.configuration())
        with_poses = {"position", "yaw"} <= types.keys()
        labels = Labels(self._table, self._files.poses_of, rules, jumps, with_poses=with_poses, seed=self._seed)
        self._fields += [SampleField(key, None, shape, torch_type(dtype)) for key, shape, dtype in labels.fields()]
        return labels

    @property
    def step_lengths(self) -> dict[Path, float]:
        """Cache folder -> the length of a step [m] that `normalise` divides by; empty without. Keep it with a model
        that was trained on these labels, and pass it on as `normalise`: the mean step changes when a cache grows."""
        lengths = None if self._labels is None else self._labels.step_length_m
        return {} if lengths is None else dict(zip(self._table.cache_dirs, lengths.tolist()))

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
        batch = WindowBatch(self._fields, len(numbers), pin=self._pin)
        batch.whole["index"].copy_(torch.as_tensor(indices))
        for place in np.lexsort((rows, numbers)).tolist():
            number = int(numbers[place])
            try:
                self._read_window(batch, place, int(indices[place]), number, int(rows[place]))
            except (DamagedChunkError, OSError) as error:
                raise reading_error(self._table[number], error) from error
        if self._labels is not None:
            goals = self._labels.fill(batch.whole, numbers, rows + self._length - 1, indices, int(self._epoch))
            if goals is not None:
                self._read_goals(batch, goals)
        return batch

    def _read_goals(self, batch: WindowBatch, goals: Goals) -> None:
        """Read the goals that labels say, file by file."""
        for place in np.lexsort((goals.row, goals.number)).tolist():
            number, row = int(goals.number[place]), int(goals.row[place])
            with self._files.reading(number):
                batch.fill(place, self._files.open(number), range(row, row + 1), is_goal=True)

    def _read_window(self, batch: WindowBatch, place: int, index: int, number: int, row: int) -> None:
        """Read window number `index`, at `row` of a chunk, into the batch."""
        chunk = self._files.open(number)
        rows = range(row, row + self._length, self._frame_step)
        batch.fill(place, chunk, rows)
        if self._goal is not None:
            goal_row, is_valid = self._choose_goal(chunk, rows[-1], index)
            batch.whole["goal_valid"][place] = is_valid
            batch.fill(place, chunk, range(goal_row, goal_row + 1), is_goal=True)

    @staticmethod
    def collate(samples: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """A batch of samples, (B, ...) under each key: as it was read, where it was read as a batch."""
        import torch.utils.data

        return samples.whole if isinstance(samples, WindowBatch) else torch.utils.data.default_collate(samples)

    @staticmethod
    def restored(batch: Mapping[str, torch.Tensor], dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """A batch, or a sample, that was read `raw`, as it is read otherwise: int8 tokens times their scales, in
        `dtype` (None: float16), on the device that they are on."""
        return restored(batch, dtype)

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
        return last_row + first + draw(count, self._seed, int(self._epoch), index), True
