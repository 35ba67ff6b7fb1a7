"""export --to lance: a Lance table in stable-worldmodel's layout."""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import lance  # of pylance
import numpy as np
import pyarrow as pa

from dino_cache_extras.commands.export_folder import exported_folder
from dino_cache_extras.commands.export_rows import (
    Block,
    Column,
    ExportJob,
    column_name,
    columns_of,
    episode_blocks,
    has_times,
    refuse_full_disk,
)
from progress_utils import RefusedError, fsync_path, human_bytes

TABLE_FILES = re.compile(r"(data|_versions|_transactions|_indices|_deletions)/[\w.-]+(/[\w.-]+)*|_latest\.manifest")
INDEX_COLUMNS = {"episode_idx": pa.int32(), "step_idx": pa.int32()}


def write(job: ExportJob) -> str:
    """Write the table; returns what it holds, in words.

    Raises:
        RefusedError: the name is none of a table's, the place is taken, a chunk is not as recorded, or two columns
            would have one name.
    """
    if job.output.suffix != ".lance":
        raise RefusedError(
            f"-o {job.output}: stable-worldmodel opens tables whose name ends in .lance; give such a one"
        )
    columns = columns_of(job)
    schema = _schema(columns, with_times=has_times(job))
    refuse_full_disk(job, columns)
    batches = Batches(job, columns, schema)
    with exported_folder(job.output, "lance", TABLE_FILES, job.about, force=job.force) as folder:
        try:
            lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches), str(folder), mode="create")
        except Exception as error:  # of which class, depends on where in Lance it came up
            raise batches.error or error from None
        finally:
            batches.end()
        size = _force_to_disk(folder)
    return f"{batches.episodes} episodes, {batches.frames} frames, {human_bytes(size)}"


def table_name(dataset: str) -> str:
    """What a dataset's column is called: Lance takes a dot for a part of a column."""
    return column_name(dataset).replace(".", "_")


def _schema(columns: list[Column], *, with_times: bool) -> pa.Schema:
    fields = [pa.field(name, kind) for name, kind in INDEX_COLUMNS.items()]
    fields += [pa.field(table_name(column.dataset), _list_type(column)) for column in columns]
    if any(column.dataset == "position" for column in columns):
        fields.append(pa.field("action", pa.list_(pa.float32(), 3)))
    if with_times:
        fields.append(pa.field("timestamp", pa.list_(pa.float64(), 1)))
    fields += [pa.field("trajectory", pa.string()), pa.field("task", pa.string())]
    names = [field.name for field in fields]
    for name in names:
        if names.count(name) > 1:
            raise RefusedError(f"{name}: two columns would have this name; leave out a token, or one of extra_keys")
    return pa.schema(fields)


def _list_type(column: Column) -> pa.DataType:
    """All numbers of a row one after the other, as its own writer lays them."""
    return pa.list_(pa.from_numpy_dtype(column.dtype), int(np.prod(column.shape, dtype=np.int64)))


class Batches:
    """The rows of an export as Lance pulls them, in a thread of its own.

    What went wrong there is in `error`, since Lance hands on the text alone. It may pull on after a Ctrl-C, and Python
    crashes if it ends meanwhile: call `end` before you leave.
    """

    def __init__(self, job: ExportJob, columns: list[Column], schema: pa.Schema):
        self._blocks, self._columns, self._schema = episode_blocks(job, columns), columns, schema
        self.episodes = self.frames = 0
        self.error: Exception | None = None
        self._pull, self._is_over = threading.Lock(), False

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return self

    def __next__(self) -> pa.RecordBatch:
        with self._pull:
            if self._is_over:
                raise RuntimeError("the export has ended")  # not StopIteration, after which Lance would end its file
            try:
                block = next(self._blocks)
                self.episodes = block.episode + 1
                self.frames += block.stop - block.start
                return _batch(block, self._columns, self._schema)
            except StopIteration:
                raise
            except Exception as error:
                self.error = error
                raise

    def end(self) -> None:
        """Give no more, once the pull that is at work has ended."""
        with self._pull:
            self._is_over = True


def _batch(block: Block, columns: list[Column], schema: pa.Schema) -> pa.RecordBatch:
    rows = block.stop - block.start
    arrays = {
        "episode_idx": np.full(rows, block.episode),
        "step_idx": np.arange(block.start, block.stop),
        "trajectory": [block.trajectory] * rows,
        "task": [block.task] * rows,
        "timestamp": np.full(rows, math.nan) if block.timestamp is None else block.timestamp,
        "action": None if block.action is None else block.action.astype(np.float32),
    }
    arrays |= {table_name(column.dataset): block.values[column.dataset] for column in columns}
    return pa.record_batch([_array(arrays[field.name], field.type) for field in schema], schema=schema)


def _array(values: np.ndarray | list[str], kind: pa.DataType) -> pa.Array:
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values, kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), kind.value_type), kind.list_size)


def _force_to_disk(folder: Path) -> int:
    """Force all files of a folder to the disk; returns their bytes."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        fsync_path(path)
    return sum(path.stat().st_size for path in files)
