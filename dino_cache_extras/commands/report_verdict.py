"""The first line of a report: whether the cache is well, and what to type next."""

from __future__ import annotations

import shlex
from typing import NamedTuple

from dino_cache_extras.commands.report_facts import CacheSample
from dino_cache_extras.commands.report_runs import Run
from progress_utils import LOG_FILE, LockOwner, Progress, program_name

MOST_ERROR = 400  # characters of what stopped the last run
CONFIG = "my.yaml"  # stands for the configuration, which no record names


class Verdict(NamedTuple):
    """A word, a line, and what to do."""

    word: str
    level: str  # good | doubtful | bad: its colour
    line: str
    todo: str  # what to do, in words, before the commands
    commands: list[str]


def verdict(sample: CacheSample, owner: LockOwner | None, runs: list[Run]) -> Verdict:
    """What is to be said first. The worst comes first: damage, failures, work that is left."""
    progress = sample.progress
    left = num_left(progress)
    counts = _counts(progress, left)
    run, last = _run_command(progress), runs[-1] if runs else None
    if sample.problems:
        count = len(sample.problems)
        line = f"{count} of the chunk files looked into {'is' if count == 1 else 'are'} not as recorded; {counts}"
        return Verdict("DAMAGED", "bad", line, "See how many there are:", [_command(progress, "verify", "--deep")])
    if owner is not None and not owner.is_stale:
        todo = "A run is at work. To watch it:"
        return Verdict("RUNNING", "good", f"{owner.name}; {counts}", todo, [_command(progress, "show", "--watch")])
    if progress.failures:
        todo = "Mend what is listed under the failures, let it be tried again, and run:"
        word = "PARTIAL" if progress.records else "FAILED"
        return Verdict(word, "bad", counts, todo, [_command(progress, "reset-failed"), run])
    if owner is not None:
        return Verdict("STOPPED", "doubtful", f"a run was killed ({owner.name}); {counts}", "Run again:", [run])
    if last is not None and last.was_stopped:
        line = f"the last run: {last.ending}{': ' * bool(last.error)}{(last.error or '')[:MOST_ERROR]}; {counts}"
        return Verdict("STOPPED", "doubtful", line, f"Look at the end of {LOG_FILE}, then run again:", [run])
    if left:
        return Verdict("STOPPED", "doubtful", counts, "Run again, it goes on where it stopped:", [run])
    if not progress.records:
        return Verdict("EMPTY", "doubtful", "nothing is completed yet", "Run:", [run])
    todo = "Nothing is left to do. To check every byte:"
    return Verdict("OK", "good", counts, todo, [_command(progress, "verify", "--deep")])


def num_left(progress: Progress) -> int | None:
    """Trajectories that are neither completed nor failed; None where the record does not know of all."""
    if progress.num_trajectories is None:
        return None
    return max(0, progress.num_trajectories - len(progress.records) - len(progress.failures))


def _counts(progress: Progress, left: int | None) -> str:
    of = f" of {progress.num_trajectories:,}" if progress.num_trajectories else ""
    rest = "" if left is None else f", {left:,} left"
    return f"{len(progress.records):,}{of} trajectories completed, {len(progress.failures):,} failed{rest}"


def _command(progress: Progress, command: str, *options: str) -> str:
    return " ".join([_program("progress_utils.py"), command, "--cache-dir", shlex.quote(str(progress.cache_dir)),
                     *options])  # fmt: skip


def _run_command(progress: Progress) -> str:
    dataset = f" --dataset {shlex.quote(progress.dataset_name)}" if progress.dataset_name else ""
    return f"{_program('dino_cache.py')} --config {CONFIG}{dataset}"


def _program(script: str) -> str:
    name = program_name(script)
    return f"python {name}" if name == script else name
