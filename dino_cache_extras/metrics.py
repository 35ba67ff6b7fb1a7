"""`metrics_file`: what a run came to, in Prometheus' text exposition format, for node_exporter's textfile collector.

The file is replaced by a rename, so that it is whole whenever it is read. Of the file before it stay the time of the
last success, and the lines of datasets that this run did not begin, while the config has them.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from dino_cache import EXIT_COMPLETED, DatasetOutcome
from dino_cache_extras.run_outcome import RunOutcome, num_failed
from progress_utils import write_durably

OWN_START = "# HELP dino_cache_"  # how a file begins that was written here
MOST_BYTES = 16 << 20  # of a file that is read
LINE = re.compile(r'(dino_cache_\w+)(?:\{dataset="((?:[^"\\\n]|\\.)*)"\})? (\S+)')
LAST_SUCCESS = "dino_cache_last_success_timestamp_seconds"


class RunMetric(NamedTuple):
    """One number of a run."""

    name: str
    help: str
    value: Callable[[RunOutcome, float], float]  # of the outcome and the time of the end


class DatasetMetric(NamedTuple):
    """One number of each dataset."""

    name: str
    help: str
    value: Callable[[DatasetOutcome], float]


OF_RUNS = (
    RunMetric("dino_cache_last_run_end_timestamp_seconds", "When the last run ended.", lambda run, end: end),
    RunMetric(
        "dino_cache_last_run_exit_code", "Exit code of the last run; 128 + n: signal n.", lambda run, end: run.exit_code
    ),
    RunMetric("dino_cache_last_run_seconds", "How long the last run took.", lambda run, end: run.seconds),
)
OF_DATASETS = (
    DatasetMetric("dino_cache_trajectories", "Trajectories among the data.", lambda d: d.num_trajectories),
    DatasetMetric("dino_cache_trajectories_completed", "Completed ones among them.", lambda d: d.num_completed),
    DatasetMetric("dino_cache_trajectories_failed", "Failed ones, of any run.", num_failed),
    DatasetMetric("dino_cache_trajectories_left", "Those that its last run did not do.", lambda d: d.num_left),
    DatasetMetric("dino_cache_chunks", "Chunks of the whole cache.", lambda d: d.num_chunks),
    DatasetMetric("dino_cache_written_bytes", "Bytes of chunks that its last run wrote.", lambda d: d.num_bytes),
    DatasetMetric("dino_cache_work_seconds", "How long its last run worked on it.", lambda d: d.seconds),
    DatasetMetric("dino_cache_encoded_frames", "Frames that its last run encoded.", lambda d: d.num_frames),
)


def label(text: str) -> str:
    """A name as the format writes a label's value."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


def read_own(path: Path) -> str:
    """What the file holds; nothing where there is none.

    Raises:
        ValueError: something else is there, which must not be replaced.
        OSError: it cannot be read.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return ""
    if not stat.S_ISREG(status.st_mode) or status.st_size > MOST_BYTES:
        raise ValueError("something else than a metrics file is there")
    text = path.read_bytes().decode("utf-8", "replace")
    if text.strip() and not text.startswith(OWN_START):
        raise ValueError("another file is there, which dino_cache did not write")
    return text


def exposition(run: RunOutcome, end: float, before: str, names: Collection[str]) -> str:
    """The file's text.

    Args:
        end: when the run ended [epoch seconds].
        before: the text that the file had.
        names: the config's datasets; lines of others are not kept.
    """
    found = [match for line in before.splitlines() if (match := LINE.fullmatch(line))]
    begun, known = {label(dataset.name) for dataset in run.datasets}, {label(name) for name in names}
    lines: list[str] = []

    def add(name: str, what: str, samples: list[str]) -> None:
        if samples:
            lines.extend((f"# HELP {name} {what}", f"# TYPE {name} gauge", *samples))

    for metric in OF_RUNS:
        add(metric.name, metric.help, [f"{metric.name} {float(metric.value(run, end))!r}"])
    successes = [match[3] for match in found if match[1] == LAST_SUCCESS]
    if run.exit_code == EXIT_COMPLETED:
        successes = [repr(end)]
    add(LAST_SUCCESS, "When a run last ended with exit code 0.", [f"{LAST_SUCCESS} {time}" for time in successes[:1]])
    for metric in OF_DATASETS:
        now = [f'{metric.name}{{dataset="{label(d.name)}"}} {float(metric.value(d))!r}' for d in run.datasets]
        kept = [m[0] for m in found if m[1] == metric.name and m[2] in known and m[2] not in begun]
        add(metric.name, metric.help, now + kept)
    return "\n".join([*lines, ""])


def write_metrics(path: Path, run: RunOutcome, end: float, names: Collection[str]) -> None:
    """Replace the file. Raises ValueError and OSError as read_own does, and OSError where it cannot be written."""
    write_durably(path, exposition(run, end, read_own(path), names).encode("utf-8"))
