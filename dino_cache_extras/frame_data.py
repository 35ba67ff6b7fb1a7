"""Which datasets of a frame a reader gives, and their types: tokens of one or several cameras, poses, columns."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np

from dino_cache import (
    COLUMN_SHAPES,
    EXTRA_PREFIX,
    POSE_SHAPES,
    TOKEN_DATASETS,
    extra_dataset,
    human_list,
    scale_dataset,
    token_of,
)
from dino_cache_extras.cache_index import ChunkTable, reading_error
from dino_cache_extras.chunk_files import (
    ChunkHeader,
    RecordedChunk,
    camera_prefixes,
    check_metadata,
    dataset_type,
    hdf5_errors,
    stored_datasets,
)
from progress_utils import DamagedChunkError, RefusedError, progress_command

POSE_NAMES = ("position", "yaw", "frame_index", "travelled_distance")  # in a sample, where all chunks have them

COLUMN_TYPES = {"|b1", "|i1", "|u1", *(f"<{kind}" for kind in ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8"))}


class FrameType(NamedTuple):
    """Of one frame's values in a dataset: shape and type as stored."""

    shape: tuple[int, ...]
    dtype: str  # as numpy writes it in a header: <f2

    def __str__(self) -> str:
        return f"{self.shape} {np.dtype(self.dtype).name}"


def pose_types(
    chunks: list[RecordedChunk], headers: list[ChunkHeader], *, distances_needed: bool
) -> dict[str, FrameType]:
    """Dataset name -> one frame's pose, of those that all these chunks have.

    Raises:
        RefusedError: distances are needed, and a chunk has none.
    """
    for chunk, header in zip(chunks, headers):
        if distances_needed and "travelled_distance" not in header.datasets:
            raise RefusedError(
                f"{chunk.path}: goal: is drawn by travelled distance, and this cache has none: it was cut with "
                "chunk_by: frames. Read it without goal, or make one with chunk_by: distance"
            )
    return {
        name: FrameType(POSE_SHAPES[name], dataset_type(name))
        for name in POSE_NAMES
        if all(name in header.datasets for header in headers)
    }


def token_types(
    chunks: list[RecordedChunk], headers: list[ChunkHeader], tokens: Sequence[str], cameras: Sequence[str] | None
) -> dict[str, FrameType]:
    """Dataset name -> one frame's tokens, the same in all these chunks; int8 tokens are followed by their scales.
    `tokens`: cls, ..., of all layers that the first chunk has, or one layer's by name. `cameras`: None for all there
    are.

    Raises:
        RefusedError: a chunk lacks one of the tokens or cameras, or shapes differ.
    """
    types: dict[str, FrameType] = {}
    prefixes = chosen_prefixes(chunks, headers, cameras)
    wanted = names_of_tokens(tokens, headers[0].datasets if headers else ())
    for (chunk, header), prefix, (dataset, token) in itertools.product(zip(chunks, headers), prefixes, wanted.items()):
        name = prefix + dataset
        if name not in header.datasets:
            raise RefusedError(f"{chunk.path}: tokens: {_why_not(name, token, header, headers[0])}")
        found = FrameType(header.datasets[name].shape[1:], header.datasets[name].dtype)
        if (before := types.setdefault(name, found)) != found:
            raise RefusedError(
                f"{chunk.path}: {name} of a frame is {found}, in {chunks[0].path} {before}: they do not fit into one "
                "batch. Read these caches apart"
            )
        if (scale := scale_dataset(name)) in header.datasets:
            types.setdefault(scale, FrameType(header.datasets[scale].shape[1:], header.datasets[scale].dtype))
    return types


def tokens_held(datasets: Collection[str]) -> list[str]:
    """The tokens that there are among datasets, of any layer and camera."""
    found = {token_of(name) for name in datasets}
    return [token for token in TOKEN_DATASETS if token in found]


def _why_not(name: str, token: str, header: ChunkHeader, first: ChunkHeader) -> str:
    """Why the token asked for cannot be had of a chunk that lacks the dataset `name`, and what can."""
    held = tokens_held(header.datasets)
    if token_of(name) not in held:
        ways = f"ask for those, or make one with tokens: [{', '.join([*held, token])}]"
        return f"{token} is asked for, and this cache holds {', '.join(held)}; {ways}"
    there = ", ".join(sorted(other for other in header.datasets if token_of(other) == token_of(name)))
    if name in first.datasets:
        ways = "other layers. Read caches apart, or name a layer's tokens that all have"
    else:
        ways = f"name one of those, or {token_of(name)}, which is all of them"
    return f"{name} is asked for, and this cache holds {there}: {ways}"


def names_of_tokens(tokens: Sequence[str], datasets: Collection[str]) -> dict[str, str]:
    """Dataset name, without a camera's -> the token asked for: of all layers that there are, or the one named."""
    there = sorted({name.rpartition("/")[2] for name in datasets if token_of(name) is not None})
    names = {token: [name for name in there if token_of(name) == token] for token in TOKEN_DATASETS}
    return {
        name: token
        for token in tokens
        for name in ((names[token] or [TOKEN_DATASETS[token]]) if token in TOKEN_DATASETS else [token])
    }


def chosen_prefixes(
    chunks: list[RecordedChunk], headers: list[ChunkHeader], cameras: Sequence[str] | None
) -> list[str]:
    """What stands before the names of the tokens' datasets of the cameras asked for: front/, left/, or nothing.

    Raises:
        RefusedError: a cache lacks a camera; without `cameras`, caches differ in theirs.
    """
    there = [camera_prefixes(header.datasets) for header in headers]
    for chunk, prefixes in zip(chunks, there):
        if cameras is None and prefixes != there[0]:
            raise RefusedError(
                f"{chunk.cache_dir}: cameras: it has {_named(prefixes)}, and {chunks[0].cache_dir} has "
                f"{_named(there[0])}; read these caches apart, or name cameras that all of them have"
            )
        for camera in cameras or ():
            if f"{camera}/" not in prefixes:
                raise RefusedError(f"{chunk.cache_dir}: cameras: {camera!r} is not there; it has {_named(prefixes)}")
    return there[0] if cameras is None else [f"{camera}/" for camera in cameras]


def _named(prefixes: Sequence[str]) -> str:
    names = [prefix.rstrip("/") for prefix in prefixes]
    return "one camera, which has no name (leave cameras out)" if names == [""] else ", ".join(names)


def dataset_of(column: str) -> str:
    """The name of a column's dataset; of one that is called as ours are, extra/timestamp, it may be given itself."""
    return column if column in COLUMN_SHAPES or column.startswith(EXTRA_PREFIX) else extra_dataset(column)


def column_types(table: ChunkTable, columns: Sequence[str]) -> dict[str, FrameType]:
    """Dataset name -> one frame's value in a column, the same in all chunks. A chunk of each trajectory is opened:
    caches keep chunks that were made before there were columns.

    Raises:
        RefusedError: chunks lack one, or types differ.
        DamagedChunkError, StorageError: a chunk cannot be read.
    """
    types: dict[str, FrameType] = {}
    lacking: dict[tuple[Path, str], list[int]] = {}  # cache folder and dataset -> chunks
    known: dict[Path, set[str]] = {}  # cache folder -> the datasets that it has somewhere
    wanted = [dataset_of(column) for column in columns]
    begins = np.flatnonzero(np.diff(table.trajectory, prepend=-1)).tolist() if wanted else []
    for number, end in itertools.pairwise([*begins, len(table)]):
        chunk = table[number]
        there = _columns_in(chunk)
        known.setdefault(chunk.cache_dir, set()).update(there)
        for name in wanted:
            if name not in there:
                lacking.setdefault((chunk.cache_dir, name), []).extend(range(number, end))
            elif there[name].dtype not in COLUMN_TYPES:
                raise RefusedError(
                    f"{chunk.path}: extra: {name} is of type {there[name].dtype}, which no tensor has; leave it out"
                )
            elif types.setdefault(name, there[name]) != there[name]:
                raise RefusedError(
                    f"{chunk.path}: extra: {name} of a frame is {there[name]}, elsewhere {types[name]}: they do not "
                    "fit into one batch. Leave it out, or read caches apart"
                )
    for (cache_dir, name), numbers in lacking.items():
        total = int((table.cache == table.cache[numbers[0]]).sum())
        raise RefusedError(
            f"{cache_dir}: extra: {len(numbers)} of its {total} chunks have no {name}, the first is "
            f"{table[numbers[0]].path}. {_remedy(cache_dir, name, known[cache_dir])}, or leave it out"
        )
    return {name: types[name] for name in wanted}


def _remedy(cache_dir: Path, name: str, known: set[str]) -> str:
    if name.startswith(EXTRA_PREFIX):
        there = f" (it has {human_list(sorted(known))})" if known else ""
        return f"Name it in extra_keys and make the cache anew{there}"
    needs = {"timestamp": "times of frames", "delta": "position and yaw"}[name]
    redo = progress_command(f"reset --cache-dir {cache_dir}")
    return f"Earlier versions stored none; where the data have {needs}, {redo} and a run make it anew"


def _columns_in(chunk: RecordedChunk) -> dict[str, FrameType]:
    """Dataset name -> type, of the columns in a chunk file."""
    try:
        with open(chunk.path, "rb") as file:
            check_metadata(file)
            with hdf5_errors(), h5py.File(file) as content:
                return {
                    name: FrameType(dataset.shape[1:], dataset.dtype.str)
                    for name, dataset in stored_datasets(content).items()
                    if name in COLUMN_SHAPES or name.startswith(EXTRA_PREFIX)
                }
    except (DamagedChunkError, OSError) as error:
        raise reading_error(chunk, error) from error
