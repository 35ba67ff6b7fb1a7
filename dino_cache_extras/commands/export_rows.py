"""What an export writes: the rows of a cache, each frame once, episode after episode, in blocks of a bounded size."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino_cache import EXTRA_PREFIX, free_bytes, to_next_frame
from dino_cache_extras.chunk_files import NewRows, is_cut_by_frames, pieces, recorded_chunk
from dino_cache_extras.commands.workers import with_bar
from dino_cache_extras.smaller_tokens import read_rows, read_type
from progress_utils import Progress, RefusedError, human_bytes

BLOCK_BYTES = 1 << 24  # of rows in memory at a time, but one row at least
POSES = ("position", "yaw")


class Column(NamedTuple):
    """A dataset of a chunk that becomes a column of the export: a row a frame."""

    dataset: str
    shape: tuple[int, ...]  # of a row
    dtype: np.dtype

    @property
    def row_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class ExportJob(NamedTuple):
    """What one of the layouts is to write, and where."""

    progress: Progress
    output: Path
    tokens: list[str]  # names of token datasets in the chunks
    extras: list[str]  # of those that extra_keys named
    fps: float | None  # kept frames a second, as the user says
    force: bool

    @property
    def about(self) -> dict[str, Any]:
        """What the export was made from."""
        return {
            "dataset_name": self.progress.dataset_name,
            "specs": self.progress.specs,
            "weights": self.progress.weights,
        }


class Block(NamedTuple):
    """Rows [start, stop) of an episode."""

    trajectory: str
    task: str  # what the robot was told to do; empty where the trajectory does not say
    episode: int  # 0, 1, ... in order of writing
    length: int  # frames of the whole episode
    start: int
    stop: int
    values: dict[str, np.ndarray]  # dataset -> (stop - start, ...), as stored
    action: np.ndarray | None  # (stop - start, 3) float64: dx [m], dy [m], turn [rad] to the next frame; 0 at the last
    timestamp: np.ndarray | None  # (stop - start,) [s] from the episode's first frame, where the cache has times


class Plan(NamedTuple):
    """A piece of a trajectory, without its tokens: T rows, each frame once."""

    rows: list[NewRows]
    stops: list[int]  # where its episodes end, ascending; the last one is T
    action: np.ndarray | None  # (T, 3)
    timestamp: np.ndarray | None  # (T,)
    task: str


def columns_of(job: ExportJob) -> list[Column]:
    """What each frame has, by the first chunk: tokens, poses where there are some, the source's row, extras."""
    with recorded_chunk(job.progress, next(iter(job.progress.records)), 0, deep=False) as chunk:
        poses = [name for name in POSES if name in chunk]
        names = [*job.tokens, *poses, "frame_index", *job.extras]
        return [Column(name, chunk[name].shape[1:], read_type(chunk, name)) for name in names]


def has_times(job: ExportJob) -> bool:
    """Whether the first chunk has the times of its frames."""
    with recorded_chunk(job.progress, next(iter(job.progress.records)), 0, deep=False) as chunk:
        return "timestamp" in chunk


def episode_blocks(job: ExportJob, columns: list[Column]) -> Iterator[Block]:
    """All that is recorded, in order. Every byte of a chunk is checked before its first row is given.

    Raises:
        RefusedError: a chunk is not as recorded, or its columns differ from the first one's.
    """
    episode = 0
    for name in with_bar(list(job.progress.records), "Exporting", " trajectories"):
        for rows in pieces(job.progress, name):
            plan = _plan(job.progress, name, rows)
            starts = [0, *plan.stops[:-1]]
            for row, values in _values(job.progress, name, plan, columns):
                stop = row + len(values["frame_index"])
                for number, (first, end) in enumerate(zip(starts, plan.stops)):
                    low, high = max(row, first), min(stop, end)
                    if low < high:
                        yield _block(name, plan, episode + number, (first, end), (low, high), row, values)
            episode += len(starts)


def _block(
    name: str,
    plan: Plan,
    episode: int,
    bounds: tuple[int, int],
    taken: tuple[int, int],
    row: int,
    values: dict[str, np.ndarray],
) -> Block:
    """Of values that begin at `row` of the piece, those of the rows `taken`, in the episode within `bounds`."""
    (first, end), (low, high) = bounds, taken
    times = plan.timestamp
    return Block(
        trajectory=name,
        task=plan.task,
        episode=episode,
        length=end - first,
        start=low - first,
        stop=high - first,
        values={key: rows[low - row : high - row] for key, rows in values.items()},
        action=None if plan.action is None else plan.action[low:high],
        timestamp=None if times is None else times[low:high] - times[first],
    )


def _plan(progress: Progress, name: str, rows: list[NewRows]) -> Plan:
    """Read what is small of a piece, and find where its episodes end."""
    found: dict[str, list[np.ndarray]] = {}
    for part in rows:
        with recorded_chunk(progress, name, part.index, deep=False) as chunk:
            task = str(chunk.attrs.get("task", ""))
            for key in (*POSES, "delta", "timestamp"):
                if key in chunk:
                    found.setdefault(key, []).append(chunk[key][part.start : part.stop])
    whole = {key: np.concatenate(parts) for key, parts in found.items() if len(parts) == len(rows)}
    count = sum(part.stop - part.start for part in rows)
    if not {*POSES} <= whole.keys():
        return Plan(rows, [count], None, whole.get("timestamp"), task)
    spec = progress.specs[progress.records[name]["fingerprint"]]
    jump_m = spec["max_chunk_distance_m"] if is_cut_by_frames(spec) else math.inf  # else it has ended the piece
    action = whole["delta"] if "delta" in whole else to_next_frame(whole["position"], whole["yaw"], [])
    action = action.copy()
    steps = np.linalg.norm(np.diff(whole["position"], axis=0), axis=1)
    ends = np.isnan(action[:-1]).any(axis=1) | (steps > jump_m)
    stops = [*(np.flatnonzero(ends) + 1).tolist(), count]
    action[np.array(stops) - 1] = 0.0
    return Plan(rows, stops, action, whole.get("timestamp"), task)


def _values(
    progress: Progress, name: str, plan: Plan, columns: list[Column]
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(row of the piece, dataset -> rows from there on), in blocks."""
    block = max(1, BLOCK_BYTES // max(1, sum(column.row_bytes for column in columns)))
    row = 0
    for part in plan.rows:
        with recorded_chunk(progress, name, part.index, deep=True) as chunk:
            _refuse_other_columns(chunk, columns)
            for start in range(part.start, part.stop, block):
                stop = min(start + block, part.stop)
                yield row, {column.dataset: read_rows(chunk, column.dataset, slice(start, stop)) for column in columns}
                row += stop - start


def _refuse_other_columns(chunk: Any, columns: list[Column]) -> None:
    there = {column.dataset for column in columns}
    for name in POSES:
        if name in chunk and name not in there:
            raise RefusedError(f"{chunk.filename}: has {name}, chunks before have none; --to flat holds both")
    for column in columns:
        if column.dataset not in chunk:
            raise RefusedError(
                f"{chunk.filename}: has no {column.dataset}, chunks before have it; --to flat holds both"
            )
        found = Column(column.dataset, chunk[column.dataset].shape[1:], read_type(chunk, column.dataset))
        if found != column:
            raise RefusedError(
                f"{chunk.filename}: {column.dataset} has rows of {found.shape} {found.dtype}, those before have "
                f"{column.shape} {column.dtype}: one column cannot hold both. Choose other --tokens, or redo the cache"
            )


def refuse_full_disk(job: ExportJob, columns: Iterable[Column]) -> None:
    """Raise RefusedError where the disk cannot hold the columns of all frames."""
    frames = sum(
        part.stop - part.start for name in job.progress.records for rows in pieces(job.progress, name) for part in rows
    )
    needed, free = frames * sum(column.row_bytes for column in columns), free_bytes(job.output.parent)
    if needed > free:
        raise RefusedError(
            f"{job.output.parent}: the export takes {human_bytes(needed)} and {human_bytes(free)} are free"
        )


def column_name(dataset: str) -> str:
    """What a dataset is called in tables, which know no folders: front/cls_token is front.cls_token."""
    return dataset.replace("/", ".")


def is_extra(dataset: str) -> bool:
    """Whether it is one that extra_keys named."""
    return dataset.startswith(EXTRA_PREFIX)
