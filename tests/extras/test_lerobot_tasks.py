"""LeRobot: what an episode's robot was told to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from formats_support import lerobot_entry, write_episodes, write_lerobot
from lerobot_support import write_root

from dino_cache import InputError
from dino_cache_extras.formats.lerobot_dataset import LeRobotDataset
from dino_cache_extras.formats.lerobot_tasks import episode_task
from support import FIRST, SECOND


def tasks(root: Path) -> list[str | None]:
    dataset = LeRobotDataset(root)
    return [episode_task(dataset, dataset.episode(number)) for number in dataset.episode_numbers]


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_the_tasks_of_the_meta_data(tmp_path: Path, version: str) -> None:
    write_lerobot(tmp_path, [FIRST, SECOND], version, "image")
    assert tasks(tmp_path) == ["drive", "drive"]


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        (["go", "stop"], "go\nstop"),
        (["go", "go"], "go"),
        ([{"sub_instruction": "left", "sub_indexes": [0, 9]}, {"sum_instruction": "then right"}], "left\nthen right"),
        ("  go  ", "go"),
        ([], None),
        (7, None),
        (None, None),
    ],
)
def test_tasks_of_other_shapes(tmp_path: Path, told: Any, expected: str | None) -> None:
    write_root(tmp_path / "data", [FIRST])
    entry = {"episode_index": 0, "tasks": told, "length": FIRST.count}
    (tmp_path / "data/meta/episodes.jsonl").write_text(json.dumps(entry))
    assert tasks(tmp_path / "data") == [expected]


def add_task_index(path: Path, numbers: np.ndarray) -> None:
    table = pyarrow.parquet.read_table(path)
    pyarrow.parquet.write_table(table.append_column("task_index", pyarrow.array(numbers)), path)


@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_the_tasks_that_rows_name(tmp_path: Path, version: str) -> None:
    write_lerobot(tmp_path, [FIRST, SECOND], version, "image")
    entries = [lerobot_entry(0, FIRST.count, 0, 0), lerobot_entry(1, SECOND.count, 0 if version == "v3.0" else 1, 40)]
    first = np.r_[np.zeros(20), np.full(20, 2)].astype(int)
    second = np.ones(SECOND.count, int)
    texts = {0: "begin", 1: "other", 2: "end"}
    if version == "v3.0":
        write_episodes(tmp_path, version, [{key: entry[key] for key in entry if key != "tasks"} for entry in entries])
        add_task_index(tmp_path / "data/chunk-000/file-000.parquet", np.r_[first, second])
        table = pyarrow.table({"task_index": list(texts), "__index_level_0__": list(texts.values())})
        pyarrow.parquet.write_table(table, tmp_path / "meta/tasks.parquet")
    else:
        write_episodes(tmp_path, version, [{**entry, "tasks": []} for entry in entries])
        for number, numbers in enumerate((first, second)):
            add_task_index(tmp_path / f"data/chunk-000/episode_{number:06d}.parquet", numbers)
        lines = [json.dumps({"task_index": number, "task": text}) for number, text in texts.items()]
        (tmp_path / "meta/tasks.jsonl").write_text("\n".join(lines))
    assert tasks(tmp_path) == ["begin\nend", "other"]


def test_tasks_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_lerobot(tmp_path, [FIRST], "v2.1", "image")
    write_episodes(tmp_path, "v2.1", [{**lerobot_entry(0, FIRST.count, 0, 0), "tasks": []}])
    add_task_index(tmp_path / "data/chunk-000/episode_000000.parquet", np.zeros(FIRST.count, int))
    (tmp_path / "meta/tasks.jsonl").write_text("[")
    with pytest.raises(InputError, match=r"tasks\.jsonl: cannot be read"):
        tasks(tmp_path)
