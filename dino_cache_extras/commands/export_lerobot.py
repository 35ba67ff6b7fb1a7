"""export --to lerobot: a LeRobot v3.0 dataset."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dino_cache_extras.chunk_files import recorded_chunk
from dino_cache_extras.commands.column_stats import ColumnStats
from dino_cache_extras.commands.export_folder import exported_folder
from dino_cache_extras.commands.export_rows import (
    BLOCK_BYTES,
    Block,
    Column,
    ExportJob,
    column_name,
    columns_of,
    episode_blocks,
    is_extra,
    refuse_full_disk,
)
from progress_utils import RefusedError, fsync_path, human_bytes, write_durably

DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
DATASET_FILES = re.compile(
    r"(data|meta/episodes)/chunk-\d{3,}/file-\d{3,}\.parquet|meta/(info|stats)\.json(\.tmp)?|meta/tasks\.parquet"
)
FILES_A_FOLDER = 1000  # as lerobot has them
DATA_FILE_BYTES = 100 << 20  # an episode that begins beyond so many goes into the next file
EPISODES_AT_A_TIME = 1000  # rows of meta/episodes in memory
MEASURED_TRAJECTORIES = 256  # whose first chunk's times say the rate
RATE_TOLERANCE = 0.1  # that --fps may be off the stored times
MOST_DIMENSIONS = 5  # of a row, that datasets can read
OF_FRAMES = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64", "index": "int64"}
OF_FRAMES |= {"task_index": "int64"}
STATE_NAMES, ACTION_NAMES = ["x", "y", "yaw"], ["dx", "dy", "dyaw"]


class Feature(NamedTuple):
    """A column of the dataset."""

    dtype: str
    shape: tuple[int, ...]
    names: list[str] | None = None

    def arrow_type(self) -> pa.DataType:
        """A number where there is one a frame, else lists in lists."""
        kind = pa.bool_() if self.dtype == "bool" else pa.from_numpy_dtype(self.dtype)
        if self.shape == (1,):
            return kind
        for _ in self.shape:
            kind = pa.list_(kind)
        return kind

    def array(self, values: np.ndarray) -> pa.Array:
        """(n, *shape) values, as a column."""
        array, total = pa.array(values.reshape(-1)), values.size
        if self.shape == (1,):
            return array
        for length in reversed(self.shape):
            total //= length
            array = pa.ListArray.from_arrays(pa.array(np.arange(total + 1, dtype=np.int32) * length), array)
        return array


def write(job: ExportJob) -> str:
    """Write the dataset; returns what it holds, in words.

    Raises:
        RefusedError: nothing says the rate, or --fps contradicts the stored times; the place is taken; a chunk is not
            as recorded; or a column is none that LeRobot can have.
    """
    columns = columns_of(job)
    features = _features(columns)
    fps = _rate(job)
    refuse_full_disk(job, columns)
    with exported_folder(job.output, "lerobot", DATASET_FILES, job.about, force=job.force) as folder:
        dataset = DatasetWriter(folder, features, fps)
        try:
            for block in episode_blocks(job, columns):
                dataset.add(block)
            dataset.finish()
        finally:
            dataset.close_files()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{dataset.episodes} episodes, {dataset.frames} frames at {fps:g} fps, {human_bytes(size)}"


def _features(columns: list[Column]) -> dict[str, Feature]:
    """Name -> feature, of each column that the cache's columns make."""
    datasets = {column.dataset for column in columns}
    features = {}
    for column in columns:
        if column.dataset in ("position", "yaw"):
            continue
        features[_feature_name(column.dataset)] = Feature(str(column.dtype), column.shape or (1,))
        if len(column.shape) > MOST_DIMENSIONS or 0 in column.shape:
            raise RefusedError(
                f"{column.dataset}: has rows of shape {column.shape}; LeRobot's have at most {MOST_DIMENSIONS} "
                "dimensions, none of them empty. Leave it out of extra_keys"
            )
    if {"position", "yaw"} <= datasets:
        features["observation.state"] = Feature("float64", (3,), STATE_NAMES)
        features["action"] = Feature("float64", (3,), ACTION_NAMES)
    features["next.done"] = Feature("bool", (1,))
    return features | {name: Feature(kind, (1,)) for name, kind in OF_FRAMES.items()}


def _feature_name(dataset: str) -> str:
    """What a dataset's feature is called: tokens are observations, and the source's row is no frame_index of theirs."""
    if dataset == "frame_index":
        return "source.frame_index"
    return column_name(dataset) if is_extra(dataset) else f"observation.{column_name(dataset)}"


def _rate(job: ExportJob) -> float:
    """Frames a second: --fps, else by the stored times."""
    measured = _measured_rate(job)
    if job.fps is None and measured is None:
        raise RefusedError(
            f"{job.progress.cache_dir}: --fps: LeRobot needs a rate, and this cache has no times; give --fps RATE, "
            "kept frames a second"
        )
    if job.fps is None:
        return measured
    if measured is not None and abs(job.fps / measured - 1) > RATE_TOLERANCE:
        raise RefusedError(
            f"--fps {job.fps:g}: the stored times say {measured:g} kept frames a second; leave it out to take that"
        )
    return job.fps


def _measured_rate(job: ExportJob) -> float | None:
    """By the median step of the stored times; a whole number where it is within 1 % of one. None without times."""
    names = list(job.progress.records)
    chosen = np.unique(np.linspace(0, len(names) - 1, min(len(names), MEASURED_TRAJECTORIES)).astype(np.int64))
    steps = []
    for number in chosen.tolist():
        with recorded_chunk(job.progress, names[number], 0, deep=False) as chunk:
            if "timestamp" in chunk:
                steps.append(np.diff(chunk["timestamp"][...]))
    step = float(np.median(np.concatenate(steps))) if any(map(len, steps)) else 0.0
    if step <= 0:
        return None
    whole = round(1 / step)
    return float(whole) if abs(whole * step - 1) < 0.01 else round(1 / step, 3)


class DatasetWriter:
    """Fills an empty folder with episodes, block by block; in memory are a block, the statistics, the tasks, and a line
    for each of EPISODES_AT_A_TIME episodes."""

    def __init__(self, folder: Path, features: dict[str, Feature], fps: float):
        self._folder, self._features, self._fps = folder, features, fps
        self._schema = pa.schema([(name, feature.arrow_type()) for name, feature in features.items()])
        self._stats = {name: ColumnStats(feature.shape) for name, feature in features.items()}
        small = [name for name, feature in features.items() if feature.shape == (1,)]
        self._encoding = {
            "use_dictionary": False,
            "write_statistics": small,  # by which one episode is found
            "compression": {name: "snappy" if name in small else "none" for name in features},  # tokens do not shrink
        }
        self._data: pq.ParquetWriter | None = None
        self._data_bytes, self._file = 0, -1
        self._waiting: list[pa.RecordBatch] = []  # for the next row group
        self._waiting_bytes = 0
        self._lines: list[dict[str, Any]] = []
        self._episodes_file: pq.ParquetWriter | None = None
        self._tasks: dict[str, int] = {}
        self.episodes = self.frames = 0

    def add(self, block: Block) -> None:
        """Write rows of an episode; all of one episode are in one file."""
        if block.start == 0:
            self._begin_episode(block)
        values = self._values(block)
        arrays = [self._features[name].array(values[name]) for name in self._features]
        self._waiting.append(pa.record_batch(arrays, schema=self._schema))
        num_bytes = sum(rows.nbytes for rows in values.values())
        self._data_bytes += num_bytes
        self._waiting_bytes += num_bytes
        if self._waiting_bytes >= BLOCK_BYTES:
            self._flush_data()
        for name, rows in values.items():
            self._stats[name].add(rows)
        self.frames += block.stop - block.start

    def close_files(self) -> None:
        """End the files that are open."""
        for writer in filter(None, (self._data, self._episodes_file)):
            writer.close()
        self._data = self._episodes_file = None

    def finish(self) -> None:
        """End all files and write what says where everything is."""
        self._flush_data()
        self._flush_episodes()
        self.close_files()
        _write_tasks(self._folder / "meta/tasks.parquet", list(self._tasks))
        stats = {name: stats.result() for name, stats in self._stats.items()}
        write_durably(self._folder / "meta/stats.json", json.dumps(stats).encode())
        write_durably(self._folder / "meta/info.json", json.dumps(self._info(), indent=4).encode())
        for path in self._folder.rglob("*.parquet"):
            fsync_path(path)

    def _info(self) -> dict[str, Any]:
        features = {
            name: {"dtype": feature.dtype, "shape": list(feature.shape), "names": feature.names}
            for name, feature in self._features.items()
        }
        return {
            "codebase_version": "v3.0",
            "robot_type": None,
            "total_episodes": self.episodes,
            "total_frames": self.frames,
            "total_tasks": len(self._tasks),
            "chunks_size": FILES_A_FOLDER,
            "data_files_size_in_mb": DATA_FILE_BYTES >> 20,
            "video_files_size_in_mb": 200,
            "fps": int(self._fps) if self._fps.is_integer() else self._fps,
            "splits": {"train": f"0:{self.episodes}"},
            "data_path": DATA_PATH,
            "video_path": None,
            "features": features,
        }

    def _begin_episode(self, block: Block) -> None:
        if self._data is None or self._data_bytes >= DATA_FILE_BYTES:
            if self._data is not None:
                self._flush_data()
                self._data.close()
            self._file, self._data_bytes = self._file + 1, 0
            path = self._folder / DATA_PATH.format(**self._place())
            path.parent.mkdir(parents=True, exist_ok=True)
            self._data = pq.ParquetWriter(path, self._schema, **self._encoding)
        self._tasks.setdefault(block.task, len(self._tasks))
        place = self._place()
        self._lines.append(
            {
                "episode_index": block.episode,
                "tasks": [block.task],
                "length": block.length,
                "data/chunk_index": place["chunk_index"],
                "data/file_index": place["file_index"],
                "dataset_from_index": self.frames,
                "dataset_to_index": self.frames + block.length,
                "meta/episodes/chunk_index": 0,
                "meta/episodes/file_index": 0,
                "trajectory": block.trajectory,
            }
        )
        self.episodes = block.episode + 1
        if len(self._lines) >= EPISODES_AT_A_TIME:
            self._flush_episodes()

    def _place(self) -> dict[str, int]:
        return {"chunk_index": self._file // FILES_A_FOLDER, "file_index": self._file % FILES_A_FOLDER}

    def _flush_data(self) -> None:
        if self._waiting:
            self._data.write_table(pa.Table.from_batches(self._waiting, self._schema), row_group_size=1 << 30)
        self._waiting, self._waiting_bytes = [], 0

    def _flush_episodes(self) -> None:
        table = pa.Table.from_pylist(self._lines)
        if self._episodes_file is None:
            path = self._folder / EPISODES_PATH
            path.parent.mkdir(parents=True)
            self._episodes_file = pq.ParquetWriter(path, table.schema, compression="snappy")
        if self._lines:
            self._episodes_file.write_table(table)
        self._lines = []

    def _values(self, block: Block) -> dict[str, np.ndarray]:
        """Feature -> (n, *shape) of these rows."""
        rows = np.arange(block.start, block.stop)
        times = rows / self._fps if block.timestamp is None else block.timestamp
        values = {
            "next.done": rows == block.length - 1,
            "timestamp": times.astype(np.float32),
            "frame_index": rows,
            "episode_index": np.full(len(rows), block.episode),
            "index": self.frames + np.arange(len(rows)),
            "task_index": np.full(len(rows), self._tasks[block.task]),
        }
        if "action" in self._features:
            values["observation.state"] = np.column_stack([block.values["position"], block.values["yaw"]])
            values["action"] = block.action
        for dataset, found in block.values.items():
            if dataset not in ("position", "yaw"):
                values[_feature_name(dataset)] = found
        return values


def _write_tasks(path: Path, tasks: list[str]) -> None:
    """Task -> number, as pandas lays a table whose index is the task: lerobot reads it so."""
    index = "__index_level_0__"
    described = [
        {"name": "task_index", "field_name": "task_index", "pandas_type": "int64", "numpy_type": "int64"},
        {"name": None, "field_name": index, "pandas_type": "unicode", "numpy_type": "object"},
    ]
    pandas = {
        "index_columns": [index],
        "column_indexes": [{"name": None, "field_name": None, "pandas_type": "unicode", "numpy_type": "object"}],
        "columns": [{**column, "metadata": None} for column in described],
        "creator": {"library": "pyarrow", "version": pa.__version__},
        "pandas_version": "2.0.0",
    }
    pandas["column_indexes"][0]["metadata"] = {"encoding": "UTF-8"}
    table = pa.table({"task_index": pa.array(range(len(tasks)), pa.int64()), index: pa.array(tasks, pa.string())})
    pq.write_table(table.replace_schema_metadata({"pandas": json.dumps(pandas)}), path)
