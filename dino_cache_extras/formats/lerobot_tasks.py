"""LeRobot: what an episode's robot was told to do."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dino_cache import InputError, read_file
from dino_cache_extras.formats.common import FileCache
from dino_cache_extras.formats.lerobot_dataset import Episode, LeRobotDataset
from dino_cache_extras.formats.lerobot_parquet import parquet_columns, parquet_names, whole_numbers

MOST_DEPTH = 4  # of a task that is not a text but a mapping of texts
Table = dict[int, list[str]]


def texts_in(value: Any, depth: int = MOST_DEPTH) -> list[str]:
    """The texts of a task, in order: itself, or those in its lists and mappings; each once."""
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    found = [text for one in inner for text in texts_in(one, depth - 1)] if depth else []
    return list(dict.fromkeys(found))


def _read_lines(path: Path, number_key: str, text_key: str) -> Table:
    """number -> texts, of a .jsonl file."""
    table: Table = {}
    try:
        for line in read_file(path).tobytes().splitlines():
            if line.strip():
                entry = json.loads(line)
                table[int(entry[number_key])] = texts_in(entry.get(text_key))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {error!r}"[:300]) from error
    return table


_tables = FileCache(_read_lines, 200_000, lambda table: len(table) + 1)


def table_of_lines(path: Path, number_key: str, text_key: str) -> Table:
    """The same; empty where there is no such file. Raises InputError."""
    try:
        return _tables(path, number_key, text_key)
    except FileNotFoundError:
        return {}


def episode_task(dataset: LeRobotDataset, episode: Episode) -> str | None:
    """What the robot was told to do in an episode, a line for each of its tasks: what the meta data say of the episode,
    else the tasks that its rows name. None where nothing does.

    Raises:
        InputError: the meta data of tasks cannot be read.
    """
    if dataset.version != "v3.0":
        told = table_of_lines(dataset.root / "meta/episodes.jsonl", "episode_index", "tasks").get(episode.index)
        return joined(told or _texts_of_rows(dataset, episode))
    for path in sorted((dataset.root / "meta/episodes").glob("[!.]*/[!.]*.parquet")):
        if "tasks" in parquet_names(path):
            rows = parquet_columns(path, ("episode_index", "tasks")).to_pylist()
            if told := table_of_rows(rows, "episode_index").get(episode.index):
                return joined(told)
    return joined(_texts_of_rows(dataset, episode))


def _texts_of_rows(dataset: LeRobotDataset, episode: Episode) -> list[str]:
    """The tasks that an episode's rows name."""
    numbers = _task_numbers(dataset, episode)
    table = _task_table(dataset) if numbers else {}
    return [text for number in numbers for text in table.get(number, [])]


def _task_table(dataset: LeRobotDataset) -> dict[int, list[str]]:
    """Task number -> texts."""
    path = dataset.root / "meta/tasks.parquet"
    if dataset.version == "v3.0" and path.is_file():
        names = sorted(parquet_names(path))
        return table_of_rows(parquet_columns(path, tuple(names)).to_pylist(), "task_index")
    return table_of_lines(dataset.root / "meta/tasks.jsonl", "task_index", "task")


def _task_numbers(dataset: LeRobotDataset, episode: Episode) -> list[int]:
    """The tasks that an episode's rows name, in order."""
    path = dataset.data_file(episode)
    names = parquet_names(path)
    if "task_index" not in names:
        return []
    columns = ("episode_index", "task_index") if dataset.needs_column("episode_index", names) else ("task_index",)
    table = parquet_columns(path, columns)
    numbers = whole_numbers(path, table, "task_index")
    if "episode_index" in columns:
        numbers = numbers[whole_numbers(path, table, "episode_index") == episode.index]
    return [int(number) for number in dict.fromkeys(numbers[np.isfinite(numbers)].tolist())]


def table_of_rows(rows: Iterable[dict[str, Any]], number_key: str) -> Table:
    """number -> texts, of the rows of a parquet file: all their texts."""
    return {row[number_key]: texts_in({**row, number_key: None}) for row in rows if type(row.get(number_key)) is int}


def joined(texts: Iterable[str]) -> str | None:
    """Several tasks of an episode, a line each; None where there is none."""
    return "\n".join(dict.fromkeys(texts)) or None
