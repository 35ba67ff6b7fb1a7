"""The files of ops/: what they call is there, and the Slurm script does a dataset a task."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
from pathlib import Path

import pytest

from dino_cache import build_parser
from support import ROOT

OPS = ROOT / "ops"
ARRAY = OPS / "dino_cache_array.sbatch"


@pytest.mark.parametrize("path", sorted(OPS.iterdir()), ids=lambda path: path.name)
def test_command_lines_have_options_that_there_are(path: Path) -> None:
    for line in re.findall(r"dino_cache\.py (.+)", path.read_text()):
        parsed = build_parser().parse_args(line.split())
        assert parsed.max_hours > 0


@pytest.mark.parametrize("name", ["dino-cache.service", "dino-cache.timer"])
def test_units_are_units(name: str) -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.read(OPS / name)
    assert {*unit.sections()} <= {"Unit", "Service", "Timer", "Install"}


def test_units_in_the_docs_are_named() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    assert all(f"ops/{path.name}" in text for path in OPS.iterdir())


def stand_in(folder: Path, code: int) -> Path:
    """A clone whose Python writes down its arguments and ends with `code`, with an sbatch that writes down its own."""
    for name, ending in ((".venv/bin/python", f"exit {code}"), ("bin/sbatch", "")):
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(f'#!/bin/sh\necho {path.name} "$@" >> {folder}/called\n{ending}\n')
        path.chmod(0o755)
    script = folder / "array.sbatch"
    script.write_text(ARRAY.read_text().replace("root=/shared/dino_cache", f"root={folder}"))
    return script


@pytest.mark.parametrize(("code", "is_queued"), [(0, False), (1, False), (5, True), (143, False)])
def test_a_task_does_its_dataset_and_comes_again_where_work_is_left(tmp_path: Path, code: int, is_queued: bool) -> None:
    script = stand_in(tmp_path, code)
    environment = {"SLURM_ARRAY_TASK_ID": "1", "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    first, *rest = (tmp_path / "called").read_text().splitlines()
    assert "--config /shared/my.yaml --dataset robot_b --max-hours 7.5" in first
    queued = [f"sbatch --array=1 {tmp_path}/ops/dino_cache_array.sbatch"]
    assert rest == (queued if is_queued else [])


def test_a_task_without_a_dataset_does_nothing(tmp_path: Path) -> None:
    script = stand_in(tmp_path, 0)
    done = subprocess.run(
        ["bash", str(script)],
        env={**os.environ, "SLURM_ARRAY_TASK_ID": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "no dataset has this number" in done.stderr
    assert not (tmp_path / "called").exists()
