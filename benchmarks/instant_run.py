"""One whole run of some checkout's dino_cache.py with an encoder that answers at once; `throughput.py` starts it.

    DINO_CACHE_CHECKOUT=<checkout> python benchmarks/instant_run.py JOB.json

The job names the config and where the marks go: the times at which so many frames had reached the encoder, on the
wall's clock, on that of this process and on that of all processes of the run. Rates are taken between two marks in the
middle of the run, when frames are read ahead at either of them; starting and ending are told apart from it.

Any version since 0.1.0 can be run. Reader processes import this file too, so that nothing happens at its import.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

sys.path.insert(0, os.environ.get("DINO_CACHE_CHECKOUT", str(Path(__file__).resolve().parent.parent)))

import dino_cache

if TYPE_CHECKING:
    import torch

PROC = Path("/proc")
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


class InstantEncoder:
    """Stands for an infinitely fast device: returns tokens of the right shape that are there already."""

    batches_in_flight = 0
    default_batch_size = most_rows = 32

    def __init__(self, spec: dino_cache.CacheSpec):
        self._spec = spec
        shapes = dino_cache.token_shapes(spec, dino_cache.model_shape(spec.dino_model_type))
        rng = np.random.default_rng(0)
        rows = self.default_batch_size
        self._tokens = {name: rng.normal(size=(rows, *shape)).astype(np.float16) for name, shape in shapes.items()}
        self._finite = np.ones(rows, bool)

    def new_pixels(self, batch_size: int) -> torch.Tensor:
        import torch  # late, as in dino_cache: this file's import shall not be what a start is measured with

        return torch.empty((batch_size, 3, *self._spec.image_size), dtype=torch.uint8)

    def encode(self, pixels: torch.Tensor) -> Callable[[], dino_cache.EncodedRows]:
        count = len(pixels)
        tokens = {name: rows[:count] for name, rows in self._tokens.items()}
        return lambda: dino_cache.EncodedRows(tokens, self._finite[:count])

    def drop(self) -> None:
        """Nothing waits."""


# ----------------------------------------------------------------------------------------------------------------------
# What the processes of a run take
# ----------------------------------------------------------------------------------------------------------------------


def process_tree(root: int) -> list[int]:
    """The process and all that descend from it and are there."""
    children: dict[int, list[int]] = {}
    for folder in PROC.iterdir():
        if folder.name.isdecimal() and (fields := stat_fields(int(folder.name))):
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def stat_fields(pid: int) -> list[str]:
    """The fields of /proc/<pid>/stat from the third, the state, on; empty where the process has gone."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()  # a program's name may hold blanks
    except (FileNotFoundError, ProcessLookupError):
        return []


def processor_s(pids: list[int]) -> float:
    """Processor seconds that these processes took so far, and children of theirs that have ended, to a tick (10 ms)."""
    return sum(int(ticks) for pid in pids for ticks in stat_fields(pid)[11:15]) / TICKS_PER_S


# ----------------------------------------------------------------------------------------------------------------------
# Marks
# ----------------------------------------------------------------------------------------------------------------------


class Mark(NamedTuple):
    """Where the run was, and what it had taken."""

    frames: int  # that had reached the encoder
    time: float  # [s] of the epoch
    main_s: float  # processor seconds of the main process: all its threads, no child
    all_s: float  # processor seconds of all processes of the run, which it takes milliseconds to look up
    resumed_time: float  # `time` and `main_s` once that is done
    resumed_main_s: float

    @classmethod
    def now(cls, frames: int) -> Mark:
        at, main_s = time.time(), time.process_time()
        times = os.times()
        others_s = times.children_user + times.children_system + processor_s(process_tree(os.getpid())[1:])
        return cls(frames, at, main_s, main_s + others_s, time.time(), time.process_time())


class Marks:
    """Taken at the first batch, at those that begin and end the middle of the run, and at the last."""

    def __init__(self, num_frames: int, lead: int):
        self._wanted = [(0, "first"), (lead, "begin"), (num_frames - lead, "end")]
        self.frames = 0
        self.taken: dict[str, Mark] = {}

    def at_batch(self, rows: int) -> None:
        """Called before `rows` more frames are encoded."""
        while self._wanted and self.frames >= self._wanted[0][0]:
            self.taken[self._wanted.pop(0)[1]] = Mark.now(self.frames)
        self.frames += rows


def main(job: dict[str, Any]) -> int:
    """Run the job; returns dino_cache's exit code."""
    marks = Marks(job["num_frames"], job["lead"])

    class MarkingEncoder(InstantEncoder):
        def encode(self, pixels: torch.Tensor) -> Callable[[], dino_cache.EncodedRows]:
            marks.at_batch(len(pixels))
            return super().encode(pixels)

    dino_cache.load_encoder = lambda spec, device: (MarkingEncoder(spec), "0" * 16)
    exit_code = dino_cache.main(["--config", job["config"]])
    marks.taken["done"] = Mark.now(marks.frames)
    Path(job["marks"]).write_text(json.dumps({name: mark._asdict() for name, mark in marks.taken.items()}))
    return exit_code


if __name__ == "__main__":
    sys.exit(main(json.loads(Path(sys.argv[1]).read_text())))
