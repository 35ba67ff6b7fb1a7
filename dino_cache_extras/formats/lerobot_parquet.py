"""LeRobot: columns of parquet files, and images in them."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dino_cache import (
    MAX_POSE_NUMBERS,
    PROFILE,
    READ_TOGETHER,
    ChecksumKind,
    InputError,
    InvalidDataError,
    open_regular,
    recordable_name,
)
from dino_cache_extras.formats.common import FileCache
from progress_utils import open_library

if TYPE_CHECKING:
    import pyarrow


ROWS_KEPT = 256  # images of a parquet file that were passed over and wait for the threads that want them


@contextlib.contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """pyarrow's errors as those of a trajectory; real ones of the system pass."""
    pyarrow = open_library("pyarrow")
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:300]
        if "footer" in reason:
            reason += " (a recording that was never finalised has none)"
        raise InputError(f"{path}: cannot be read: not a whole parquet file: {reason}") from error


def _read_columns(path: Path, columns: tuple[str, ...]) -> pyarrow.Table:
    parquet = open_library("pyarrow.parquet")
    os.close(open_regular(path))
    with parquet_errors(path), parquet.ParquetFile(path, pre_buffer=False) as file:
        if file.metadata.num_rows > MAX_POSE_NUMBERS:
            raise InputError(f"{path}: {file.metadata.num_rows} rows are too many")
        present = file.schema_arrow.names
        if missing := [name for name in columns if name not in present]:
            raise InputError(f"{path}: has no column {', '.join(missing)}; its columns are {', '.join(present)[:500]}")
        return file.read(columns=list(columns), use_threads=False).combine_chunks()


def _read_names(path: Path) -> frozenset[str]:
    os.close(open_regular(path))
    with parquet_errors(path), open_library("pyarrow.parquet").ParquetFile(path, pre_buffer=False) as file:
        return frozenset(file.schema_arrow.names)


parquet_columns = FileCache(_read_columns, 8)  # (path, columns) -> a table of them; many episodes share a file
parquet_names = FileCache(_read_names, 8)  # path -> the names of its columns


def episodes_in(path: Path) -> list[int]:
    """The numbers of the episodes that have rows in a parquet file."""
    return np.unique(whole_numbers(path, parquet_columns(path, ("episode_index",)), "episode_index")).tolist()


def whole_numbers(path: Path, table: pyarrow.Table, key: str) -> np.ndarray:
    with parquet_errors(path):
        values = table[key].to_numpy()
    if values.dtype.kind not in "iuf":
        raise InputError(f"{path}: {key} holds {table[key].type} values, expected whole numbers")
    return values


def add_images(digest: hashlib._Hash, path: Path, key: str, first: int, count: int, kind: ChecksumKind) -> None:
    """Add the sizes of the row groups that hold these rows (`stat`), or the rows' images (`content`)."""
    with parquet_errors(path), open_library("pyarrow.parquet").ParquetFile(path, pre_buffer=False) as file:
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        starts = np.cumsum([0, *(group.num_rows for group in groups)])
        held = [i for i in range(len(groups)) if starts[i] < first + count and starts[i + 1] > first]
        if kind == "stat":
            digest.update(repr([(groups[index].num_rows, groups[index].total_byte_size) for index in held]).encode())
            return
        row = int(starts[held[0]])
        for batch in file.iter_batches(READ_TOGETHER, held, [key], use_threads=False):
            inside = batch.slice(max(0, first - row), max(0, first + count - max(row, first)))
            digest.update(repr(inside.column(0).to_pylist()).encode())
            row += len(batch)


class ParquetFrames:
    """Image bytes in a column of a parquet file, {bytes, path} a row."""

    def __init__(self, path: Path, key: str, name: str, first_row: int):
        self._path, self._key, self._name, self._first_row = path, key, name, first_row

    def name(self, number: int) -> str:
        return f"{self._name}: frame {number} ({recordable_name(self._path.name)})"

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        for number in numbers:
            with PROFILE("read"):
                image = parquet_rows(self._path, self._key).get(self._first_row + number)
            data = image.get("bytes") if isinstance(image, dict) else image
            if not isinstance(data, bytes) or not data:
                raise InputError(f"{self.name(number)}: {self._key} holds no image bytes there")
            yield np.frombuffer(bytearray(data), np.uint8)

    def close(self) -> None:
        """The file is shared with other episodes."""


class ParquetRows:
    """A column read row by row, each once and roughly in order: many episodes share a file, and it is gone through
    once. Rows passed over are kept for a while, for threads that come later."""

    def __init__(self, path: Path, key: str):
        self._path, self._key = path, key
        with parquet_errors(path):
            self._file = open_library("pyarrow.parquet").ParquetFile(path, pre_buffer=False, buffer_size=1 << 20)
        if key not in self._file.schema_arrow.names:
            raise InputError(f"{path}: has no column {key}")
        metadata = self._file.metadata
        counts = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
        self._group_starts = np.concatenate([[0], np.cumsum(counts)]).astype(int)
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._next_row, self._batches = sys.maxsize, iter(())  # nothing is read yet
        self._lock = threading.Lock()

    def get(self, row: int) -> Any:
        """One row's value."""
        with self._lock, parquet_errors(self._path):
            if row not in self._kept:
                group = int(np.searchsorted(self._group_starts, row, side="right")) - 1
                if row < self._next_row or self._group_starts[group] > self._next_row:
                    self._start_at(group)
                while row not in self._kept:
                    self._read_batch()
            return self._kept.pop(row)

    def _start_at(self, group: int) -> None:
        groups = list(range(group, len(self._group_starts) - 1))
        self._next_row = int(self._group_starts[group])
        self._batches = self._file.iter_batches(READ_TOGETHER, groups, [self._key], use_threads=False)

    def _read_batch(self) -> None:
        batch = next(self._batches, None)
        if batch is None:
            raise InputError(f"{self._path}: ends before its last row")
        for value in batch.column(0).to_pylist():
            self._kept[self._next_row] = value
            self._next_row += 1
        while len(self._kept) > ROWS_KEPT:
            self._kept.popitem(last=False)


parquet_rows = FileCache(ParquetRows, 4)


def column_of_numbers(where: str, column: pyarrow.ChunkedArray) -> np.ndarray:
    """(T, ...) of a column of numbers, or of lists of equally many, in the column's own type. A real number that is
    null is NaN, which pandas writes so. Raises InvalidDataError."""
    types, values, shape = open_library("pyarrow").types, column.combine_chunks(), [len(column)]
    while types.is_list(values.type) or types.is_large_list(values.type) or types.is_fixed_size_list(values.type):
        lengths = open_library("pyarrow.compute").list_value_length(values).unique()
        if values.null_count or len(lengths) != 1:
            raise InvalidDataError(f"{where}: its lists are not of one length; extra_keys names columns of numbers")
        shape.append(lengths[0].as_py())
        values = values.flatten()
    if not (types.is_boolean(values.type) or types.is_integer(values.type) or types.is_floating(values.type)):
        raise InvalidDataError(f"{where}: holds {column.type} values; extra_keys names columns of numbers")
    if values.null_count and not types.is_floating(values.type):
        raise InvalidDataError(f"{where}: is null in {values.null_count} places, where a {values.type} is expected")
    return values.to_numpy(zero_copy_only=False).reshape(shape)
