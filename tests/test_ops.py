"""The files of ops/: what they call is there, and the Slurm script does a share a task."""

from __future__ import annotations

import configparser
import os
import re
import shlex
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
        command = line.partition(" |")[0].replace("$SLURM_ARRAY_TASK_ID/$shards", "0/16")
        parsed = build_parser().parse_args(shlex.split(command))
        assert parsed.max_hours > 0


@pytest.mark.parametrize("name", ["dino-cache.service", "dino-cache.timer"])
def test_units_are_units(name: str) -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.read(OPS / name)
    assert {*unit.sections()} <= {"Unit", "Service", "Timer", "Install"}


def test_units_in_the_docs_are_named() -> None:
    text = (ROOT / "docs/operations.md").read_text()
    assert all(f"ops/{path.name}" in text for path in OPS.iterdir())


def stand_in(folder: Path, code: int = 0, verdict: str = "") -> Path:
    """A clone whose Python writes down its arguments, prints a verdict and ends with `code`, with an sbatch that writes
    down its own."""
    said = {".venv/bin/python": f"echo '{verdict}'\nexit {code}", "bin/sbatch": "echo '77;cluster'"}
    for name, ending in said.items():
        path = folder / name
        path.parent.mkdir(parents=True)
        path.write_text(f'#!/bin/sh\necho {path.name} "$@" >> {folder}/called\n{ending}\n')
        path.chmod(0o755)
    script = folder / "array.sbatch"
    script.write_text(ARRAY.read_text().replace("root=/shared/dino_cache", f"root={folder}"))
    return script


def call(script: Path, **variables: str) -> tuple[int, list[str]]:
    """What the script ends with, and what it called."""
    folder = script.parent
    environment = {"PATH": f"{folder}/bin:{os.environ['PATH']}", **variables}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, (folder / "called").read_text().splitlines()


def queued(folder: Path, tasks: str) -> list[str]:
    """The calls that bring tasks into the queue, and a merge after them."""
    merge = "--wrap=.venv/bin/python progress_utils.py merge --config '/shared/my.yaml'"
    options = "--job-name=dino_cache_merge --output=dino_cache.%j.out"
    return [
        f"sbatch --parsable --array={tasks} {folder}/ops/dino_cache_array.sbatch",
        f"sbatch --dependency=afterany:77 {options} --chdir={folder} {merge}",
    ]


def test_the_array_is_queued_with_a_merge_after_it(tmp_path: Path) -> None:
    assert call(stand_in(tmp_path)) == (0, queued(tmp_path, "0-15"))


@pytest.mark.parametrize(
    ("code", "verdict", "is_queued"),
    [
        (0, "OK: 1 datasets, 4 completed (+4), 0 failed, 0 left, exit 0", False),
        (1, "PARTIAL: 1 datasets, 3 completed (+3), 1 failed, 0 left, exit 1", False),
        (1, "PARTIAL: 1 datasets, 3 completed (+3), 1 failed, 12 left, exit 1", True),
        (5, "PARTIAL: 1 datasets, 3 completed (+3), 0 failed, 2 left, exit 5", True),
        (143, "STOPPED: 1 datasets, 3 completed (+3), 0 failed, 2 left, exit 143", False),
        (4, "FAILED: 1 datasets, 0 s, exit 4", False),
    ],
)
def test_a_task_does_its_share_and_comes_again_where_work_is_left(
    tmp_path: Path, code: int, verdict: str, is_queued: bool
) -> None:
    ended, (first, *rest) = call(stand_in(tmp_path, code, verdict), SLURM_ARRAY_TASK_ID="3")
    assert ended == code
    assert first == "python dino_cache.py --config /shared/my.yaml --shard 3/16 --max-hours 7.5"
    assert rest == (queued(tmp_path, "3") if is_queued else [])
