"""How a run went, as those are told who wait for it: a word, an exit code, counts, a line."""

from __future__ import annotations

from typing import NamedTuple

from dino_cache import EXIT_COMPLETED, EXIT_SOME_FAILED, EXIT_WORK_LEFT, DatasetOutcome, NightOutcome
from progress_utils import human_bytes, human_duration

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


def verdict_of(exit_code: int, datasets: list[DatasetOutcome]) -> str:
    """The word for how a run ended."""
    if exit_code == EXIT_COMPLETED:
        return "OK"
    if exit_code == EXIT_WORK_LEFT or exit_code > SIGNALLED:
        return "STOPPED"
    is_partial = exit_code == EXIT_SOME_FAILED and any(dataset.num_completed for dataset in datasets)
    return "PARTIAL" if is_partial else "FAILED"


def run_outcome(night: NightOutcome, seconds: float) -> RunOutcome:
    """Of a run that took `seconds` in all."""
    datasets, code = night.datasets, night.exit_code
    verdict, num_frames = verdict_of(code, datasets), sum(dataset.num_frames for dataset in datasets)
    counts = []
    if datasets:
        work_s = sum(dataset.seconds for dataset in datasets)
        counts = [
            f"{len(datasets)} dataset{'s' if len(datasets) != 1 else ''}",
            f"{sum(dataset.num_completed for dataset in datasets)} completed",
            f"{sum(map(num_failed, datasets))} failed",
            f"{sum(dataset.num_left for dataset in datasets)} left",
            f"{human_bytes(sum(dataset.num_bytes for dataset in datasets))} written",
            human_duration(seconds),
            f"{num_frames / work_s if work_s > 0 else 0:.0f} frames/s",
        ]
    text = f"{verdict}: {', '.join([*counts, f'exit {code}'])}"
    return RunOutcome(verdict, code, datasets, seconds, num_frames, text)
