"""The runs that made a cache: when, how fast, how they ended; from runs.jsonl and, for those before it, the log."""

from __future__ import annotations

import datetime
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dino_cache_extras.commands.report_facts import CacheSample, ChunkFacts
from progress_utils import LOG_FILE, RUNS_FILE, human_duration

MOST_BYTES = 8 << 20  # of either file, from its end
CHART_WEEKS = 4  # before the last run
CHART_RUNS = 40
CLOCK_S = 2.0  # chunk files tell whole seconds of UTC, the log local time

ENDINGS = {
    0: "completed",
    1: "some failed",
    2: "refused",
    3: "stopped by storage, device or an unexpected error",
    4: "another run held the cache",
    5: "work left",
}


class Run(NamedTuple):
    """One run on this cache; None for what is not known of it."""

    start: float  # epoch s
    end: float | None
    exit_code: int | None
    completed: int | None
    failed: int | None
    frames: int | None  # encoded
    seconds: float | None  # at work
    frames_per_s: float | None
    left: int | None = None
    error: str | None = None  # that stopped it in this cache; "" where that is not told
    is_logged: bool = False  # the log tells of it, which has no count of frames

    @property
    def level(self) -> str:
        """good | bad (some failed) | doubtful"""
        if self.failed or (self.exit_code == 1 and self.failed is None):
            return "bad"
        is_known_good = self.completed is not None if self.exit_code is None else self.exit_code == 0
        return "good" if is_known_good else "doubtful"

    @property
    def was_stopped(self) -> bool:
        """Whether a fault, a refusal or a signal ended it, and not in another cache of its configuration."""
        is_own = self.error is not None or bool(self.left)
        return self.exit_code not in (None, 0, 1, 4, 5) and is_own

    @property
    def ending(self) -> str:
        """How it ended, in words."""
        code = self.exit_code
        if code is None:
            return "some failed" if self.failed else "not known" if self.completed is None else "completed"
        words = f"stopped by signal {code - 128}" if code > 128 else ENDINGS.get(code, "stopped")
        return f"{words} (exit {code})"


class Rate(NamedTuple):
    """How fast frames were encoded last."""

    facts: list[ChunkFacts]  # of the chunks written meanwhile
    frames_per_s: float | None
    of: str  # what it is the rate of, in words


class LeftOut(NamedTuple):
    """What the last run that is in the log did not take."""

    remarks: list[str]
    pieces: list[str]  # of trajectories, between pose jumps


def known_runs(sample: CacheSample) -> list[Run]:
    """All runs that runs.jsonl or the log tells of, in order of time."""
    cache_dir = sample.progress.cache_dir
    recorded = sorted(_recorded_runs(cache_dir), key=lambda run: run.start)
    logged = list(_logged_runs(cache_dir))
    ends = [*(run.start - CLOCK_S for run in logged[1:]), math.inf]
    logged = [_to_last_chunk(run, until, sample.facts) for run, until in zip(logged, ends)]
    logged = [run for run in logged if not any(_overlap(run, other) for other in recorded)]
    runs = [*recorded, *(_with_frames(run, sample.facts) for run in logged)]
    return sorted(map(_with_rate, runs), key=lambda run: run.start)


def _to_last_chunk(run: Run, until: float, facts: list[ChunkFacts]) -> Run:
    """A run that was killed ended with its last chunk, if the log has nothing later."""
    if run.completed is not None:
        return run
    times = [fact.created_at for fact in facts if run.start <= fact.created_at < until]
    return run._replace(end=max([run.end, *times]))


def _overlap(run: Run, other: Run) -> bool:
    begins, ends = (run.start, other.start), (run.end or run.start, other.end or other.start)
    return max(begins) <= min(ends) + CLOCK_S


def last_rate(sample: CacheSample, runs: list[Run]) -> Rate:
    """The rate of the run that wrote the newest chunk; where that is not known, of the last night's chunks."""
    run = _last_encoding(runs, sample.facts)
    if run is None:
        night = sample.last_night()
        return Rate(night, _night_rate(night, sample.progress.elapsed_s), "mean of the last night")
    facts = sample.facts_between(run.start - CLOCK_S, run.end + CLOCK_S)
    if run.is_logged:
        run = _with_rate(_with_frames(run, facts))
    day = time.strftime("%a %d %b %H:%M", time.localtime(run.start))
    lasted = f", {human_duration(run.seconds)}" if run.seconds else ""
    return Rate(facts, run.frames_per_s, f"last run, {day}{lasted}")


def _last_encoding(runs: list[Run], facts: list[ChunkFacts]) -> Run | None:
    """The run that wrote the newest chunk, as far as it is known; `facts` are in order of time."""
    if not facts:
        return None
    newest = facts[-1].created_at
    for run in reversed(runs):
        if run.end is not None and run.start - CLOCK_S <= newest <= run.end + CLOCK_S:
            return run
    return None


def _night_rate(night: list[ChunkFacts], elapsed_s: float) -> float | None:
    """Frames/s, over the time from the first chunk to the last; not over more than all runs were at work."""
    if len(night) < 2 or night[-1].created_at <= night[0].created_at:
        return None
    lasted = night[-1].created_at - night[0].created_at
    return sum(fact.new_frames for fact in night[1:]) / (min(lasted, elapsed_s) if elapsed_s > 0 else lasted)


def charted(runs: list[Run]) -> list[Run]:
    """The runs of the last weeks before the last one."""
    return [run for run in runs if run.start >= runs[-1].start - CHART_WEEKS * 7 * 86400][-CHART_RUNS:]


def _with_rate(run: Run) -> Run:
    """With the time at work and the rate, where they follow from what else is known; frames_per_s may be rounded."""
    seconds = run.seconds
    if seconds is None and run.end is not None and run.end > run.start:
        seconds = run.end - run.start
    rate = run.frames / seconds if run.frames and seconds else run.frames_per_s
    return run._replace(seconds=seconds, frames_per_s=rate)


def _with_frames(run: Run, facts: list[ChunkFacts]) -> Run:
    """With the frames of the chunks that were written meanwhile."""
    ends = run.start - CLOCK_S, run.end + CLOCK_S
    frames = sum(fact.new_frames for fact in facts if ends[0] <= fact.created_at <= ends[1])
    return run._replace(frames=frames or None)


def _recorded_runs(cache_dir: Path) -> Iterator[Run]:
    """Runs of runs.jsonl. A line that is none, half a last one, say, is passed over."""
    for line in _last_lines(cache_dir / RUNS_FILE):
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(entry, dict) or (start := _number(entry.get("start"))) is None:
            continue
        times = {key: _number(entry.get(key)) for key in ("end", "seconds", "frames_per_s")}
        counts = {key: _number(entry.get(key)) for key in ("exit_code", "completed", "failed", "frames", "left")}
        error = entry.get("error", "")
        yield Run(
            start=start,
            **times,
            **{key: None if count is None else int(count) for key, count in counts.items()},
            error=None if error is None else str(error),
        )


def _number(value: Any) -> float | None:
    """A number that a count or a time can be, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 <= value < 1e15 else None  # NaN is not


_BEGIN = re.compile(r"dino_cache \S+, \d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(\d{3}) ([A-Z]+) (.*)")
_END = re.compile(r".*: (\d+)/\d+ trajectories completed, (\d+) failed, \d+ chunks")
_LEFT_OUT = re.compile(
    r"\d+ (?:folders hold frames but no pose file, left out|names of the split are not in the data folder): .*"
    r"|There are poses beside frames that are left out: .*"
)
_AT_WORK = re.compile(
    r"(?:Progress|Failed|Cannot read|error): .*|Stopped .*"
)  # lines while a run is at work, or its last
_PIECE = re.compile(r".*: kept frames \d+ to \d+ are not stored: .*")


def _logged_runs(cache_dir: Path) -> Iterator[Run]:
    run = None
    for at, _, text in _log_lines(cache_dir):
        if _BEGIN.fullmatch(text):
            if run is not None:
                yield run
            run = Run(at, at, None, None, None, None, None, None, is_logged=True)
        elif run is None or run.completed is not None or at < run.start:
            continue  # what comes after a run's last line is of its summary, or of the next run before it begins
        elif found := _END.fullmatch(text):
            run = run._replace(end=at, completed=int(found[1]), failed=int(found[2]))
        elif _AT_WORK.fullmatch(text) or _PIECE.fullmatch(text):
            run = run._replace(end=at)
    if run is not None:
        yield run


def left_out(cache_dir: Path) -> LeftOut:
    """What the last run said of folders without poses, of names of its split, and of pieces that travel too little."""
    remarks: dict[str, None] = {}
    pieces: dict[str, None] = {}
    for _, level, text in _log_lines(cache_dir):
        if _BEGIN.fullmatch(text):
            remarks, pieces = {}, {}
        elif level == "WARNING" and _LEFT_OUT.fullmatch(text):
            remarks[text] = None
        elif level == "INFO" and _PIECE.fullmatch(text):
            pieces[text] = None
    return LeftOut(list(remarks), list(pieces))


def _log_lines(cache_dir: Path) -> Iterator[tuple[float, str, str]]:
    """(epoch s, level, text) of the log's lines, without those of tracebacks."""
    for line in _last_lines(cache_dir / LOG_FILE):
        if found := _LINE.fullmatch(line):
            try:
                begun = datetime.datetime.strptime(found[1], "%Y-%m-%d %H:%M:%S")
                yield time.mktime(begun.timetuple()) + int(found[2]) / 1000, found[3], found[4]
            except (ValueError, OverflowError):
                continue


def _last_lines(path: Path) -> list[str]:
    """A text file's whole lines within its last MOST_BYTES; none where it cannot be read."""
    try:
        if not path.is_file():  # a pipe would be waited for
            return []
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - MOST_BYTES))
            data = file.read(MOST_BYTES)
    except OSError:
        return []
    lines = data.decode("utf-8", "replace").split("\n")
    return lines[size > MOST_BYTES :]
