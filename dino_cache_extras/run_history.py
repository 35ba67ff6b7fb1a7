"""The runs that a cache has seen: runs.jsonl, a JSON line a run, and what `show --runs` prints of it."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import sys
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from progress_utils import (
    RUNS_FILE,
    Failure,
    RefusedError,
    Shard,
    __version__,
    human_bytes,
    human_duration,
    print_lines,
    read_or_refuse,
    write_durably,
)

if TYPE_CHECKING:
    from dino_cache import DatasetOutcome

MOST_RUNS = 1000  # that are kept; older ones are dropped
MOST_BYTES = 1 << 24  # of runs.jsonl that are read, from its end: a run takes some 600
MOST_CAUSES = 20  # of failures that a run's line names, the most frequent first
LIBRARIES = ("torch", "torchvision", "timm", "numpy", "h5py")  # whose versions are told, where they were imported


def without_name(reason: str, name: str) -> str:
    """A reason without the trajectory's name where it stands as a path or begins one."""
    return re.sub(rf"(?:^|(?<=/)){re.escape(name)}(?=[/:])", "...", reason) if name else reason


def cause_of(name: str, failure: Failure) -> str:
    """A failure's reason without names and numbers: what is equal is one cause."""
    reason = failure["reason"].removeprefix(name)
    reason = re.sub(r"^/[^:]*?(\.\w+)?: ", lambda match: f"*{match[1] or ''}: ", reason).removeprefix(": ")
    reason = without_name(reason, name)
    return re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", reason)


def add_run(
    cache_dir: Path, outcome: DatasetOutcome, verdict: str, begin: float, exit_code: int, shard: Shard | None = None
) -> None:
    """Add a run to the history of one of its caches, atomically and durably. The caller holds the
    cache's lock, or the guard of its shards.

    Raises:
        OSError: it could not be written; what was there before is there still.
    """
    entry = run_entry(outcome, verdict, begin, exit_code) | ({"shard": str(shard)} if shard is not None else {})
    line = json.dumps(entry, ensure_ascii=False)
    lines = [*_read_lines(cache_dir), line.encode(errors="backslashreplace")][-MOST_RUNS:]
    write_durably(cache_dir / RUNS_FILE, b"".join(line + b"\n" for line in lines))


def run_entry(outcome: DatasetOutcome, verdict: str, begin: float, exit_code: int) -> dict[str, Any]:
    """What is kept of a run: counts are those of one dataset, verdict and exit code those of the whole run."""
    causes = Counter(cause_of(name, failure) for name, failure in outcome.failures.items())
    versions = {name: sys.modules[name].__version__ for name in LIBRARIES if name in sys.modules}
    return {
        "start": begin,
        "end": time.time(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "versions": {"dino_cache": __version__, "python": sys.version.split()[0], **versions},
        "dataset": outcome.name,
        "verdict": verdict,
        "trajectories": outcome.num_trajectories,
        "completed": outcome.num_completed,
        "new": outcome.num_new,
        "failed": len(outcome.failures) + len(outcome.held_back),
        "left": outcome.num_left,
        "odd": outcome.num_odd,
        "chunks": outcome.num_chunks,
        "frames": outcome.num_frames,
        "bytes": outcome.num_bytes,
        "seconds": round(outcome.seconds, 3),
        "frames_per_s": round(outcome.num_frames / max(outcome.seconds, 1e-9), 1),
        "exit_code": exit_code,
        "reasons": dict(causes.most_common(MOST_CAUSES)),
        "stopped_by": outcome.stopped_by,
        "error": None if outcome.error is None else str(outcome.error) or repr(outcome.error),
    }


def _read_lines(cache_dir: Path) -> list[bytes]:
    """The lines of runs.jsonl, whatever they hold; of a large file the last ones. Only a regular file is read."""
    try:
        descriptor = os.open(cache_dir / RUNS_FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    with open(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{cache_dir / RUNS_FILE}: not a regular file")
        skipped = max(0, status.st_size - MOST_BYTES)
        file.seek(skipped)
        lines = file.read(MOST_BYTES).split(b"\n")
    return [line for line in lines[bool(skipped) :] if line.strip()]


def read_runs(cache_dir: Path) -> tuple[list[dict[str, Any]], int]:
    """The runs in a cache's history, oldest first, and how many of its lines are not one.

    Raises:
        RefusedError: there is no cache here, or the history cannot be read.
    """
    try:
        lines = _read_lines(cache_dir)
    except OSError as error:
        raise RefusedError(f"{cache_dir / RUNS_FILE}: cannot read it: {error.strerror or error}") from error
    if not lines:
        read_or_refuse(cache_dir)
    runs = []
    for line in lines:
        try:
            run = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_run(run):
            runs.append(run)
    return runs, len(lines) - len(runs)


_SHOWN = {"end": float, "start": float, "verdict": str, "completed": int, "new": int, "failed": int, "left": int}
_SHOWN |= {"bytes": int, "frames_per_s": float, "exit_code": int}


def _is_run(run: Any) -> bool:
    """Whether it has what is shown of a run, in its types."""
    if not isinstance(run, dict):
        return False
    numbers = {key: run.get(key) for key, kind in _SHOWN.items() if kind is not str}
    if not all(type(value) in (int, float) and abs(value) < 1e18 for value in numbers.values()):
        return False
    return isinstance(run.get("verdict"), str) and 0 <= numbers["end"] < 1e11


def show_runs(cache_dir: Path, *, as_json: bool) -> int:
    """Print the history of a cache, a line a run, oldest first; returns the exit code."""
    runs, damaged = read_runs(cache_dir)
    if as_json:
        print(json.dumps(runs, ensure_ascii=False))
        return 0
    lines = [_line(run) for run in runs] or [f"No runs in {cache_dir / RUNS_FILE}"]
    print_lines(*lines, *[f"{damaged} lines of {RUNS_FILE} are no runs, and are not shown"] * bool(damaged))
    return 0


def _line(run: dict[str, Any]) -> str:
    """2026-01-10 06:12  PARTIAL: 412 completed (+37), 2 failed, 0 left, 1.2 TB, 7.9 h, 214 frames/s, exit 1"""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run["end"]))
    parts = (
        f"{run['completed']} completed (+{run['new']})",
        f"{run['failed']} failed",
        f"{run['left']} left",
        human_bytes(run["bytes"]),
        human_duration(run["end"] - run["start"]),
        f"{run['frames_per_s']:.0f} frames/s",
        f"exit {run['exit_code']}",
    )
    return f"{when}  {run['verdict']}: {', '.join(parts)}"
