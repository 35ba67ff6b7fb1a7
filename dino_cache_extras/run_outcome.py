"""How a run went, as those are told who wait for it: a word, an exit code, counts, a line."""

from __future__ import annotations

from typing import NamedTuple

from dino_cache import DatasetOutcome, NightOutcome

SIGNALLED = 128  # exit codes above it are those of signals


class RunOutcome(NamedTuple):
    """What hooks and metrics say of a run."""

    verdict: str  # OK, PARTIAL, FAILED or STOPPED
    exit_code: int
    datasets: list[DatasetOutcome]  # those that were begun; none where the run was refused
    seconds: float  # of the whole run
    num_frames: int  # encoded
    text: str  # in one line, beginning with the verdict


def num_failed(dataset: DatasetOutcome) -> int:
    """Trajectories that failed, now or earlier, and those that could not be read."""
    return len(dataset.failures) + len(dataset.held_back)


def run_outcome(night: NightOutcome, seconds: float) -> RunOutcome:
    """Of a run that took `seconds` in all."""
    num_frames = sum(dataset.num_frames for dataset in night.datasets)
    word = night.verdict.partition(":")[0]
    return RunOutcome(word, night.exit_code, night.datasets, seconds, num_frames, night.verdict)
