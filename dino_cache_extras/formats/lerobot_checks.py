"""LeRobot: whether what the meta data say of an episode agrees with its neighbours, its video and the parquet files."""

from __future__ import annotations

import bisect
import functools
import glob
import re
import string
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino_cache import InputError, recordable_name
from dino_cache_extras.formats.common import FileCache
from dino_cache_extras.formats.video_frames import frame_times, open_video, video_errors


class VideoExtent(NamedTuple):
    """When a video's first and last frames are shown [s], on its container's clock."""

    first_s: float
    last_s: float


def _read_extent(path: Path) -> VideoExtent:
    """An mp4 file's index tells it; of other files every packet is looked at."""
    where = recordable_name(path.name)
    container, stream = open_video(path, where)
    with video_errors(where), container:
        entries = list(stream.index_entries)
        is_whole = "mp4" in container.format.name and 0 < stream.frames == len(entries)  # a fragmented one's is not
        if is_whole and stream.start_time is not None and not any(entry.is_discard for entry in entries):
            first_s = float(stream.start_time * stream.time_base)
            rest_s = float((entries[-1].timestamp - entries[0].timestamp) * stream.time_base)
            return VideoExtent(first_s, first_s + rest_s)
    times = frame_times(path)
    if len(times) == 0:
        raise InputError(f"{where}: holds no frames")
    return VideoExtent(float(times[0]), float(times[-1]))


video_extent = FileCache(_read_extent, 4096)


class VideoSpan(NamedTuple):
    """Where the meta data put an episode in a video that others share, and how long its rows take [s]."""

    name: str
    start_s: float
    stop_s: float
    rows_s: float


class VideoSpans:
    """The episodes of one video file. They must fill it from its first frame to its last, one after the other: a frame
    of nobody, or of two, means that some episode's frames are another's.

    An episode is found by its start. That is trusted where the file begins there, or where one ends whose own start is
    trusted and whose span is as long as its rows; likewise its end, from the end of the file. Where two that should
    meet do not, both are at fault, unless one of them alone can be trusted.
    """

    def __init__(self, path: Path, spans: list[VideoSpan], frame_s: float):
        self._path, self._file, self._frame_s = path, recordable_name(path.name), frame_s
        self._names = [span.name for span in spans]
        self._starts = np.array([span.start_s for span in spans])
        self._stops = np.array([span.stop_s for span in spans])
        self._rows_s = np.array([span.rows_s for span in spans])

    def _is_same(self, first_s: np.ndarray | float, second_s: np.ndarray | float) -> np.ndarray:
        return np.abs(np.subtract(first_s, second_s)) <= self._frame_s / 2

    @functools.cached_property
    def zero_s(self) -> float | None:
        """What to add to these times for the container's: its first frame is at 0 s, or when the container shows it.
        None where the first episode begins at neither."""
        first_s, start_s = video_extent(self._path).first_s, self._starts.min()
        if self._is_same(start_s, first_s) or self._is_same(first_s, 0):
            return 0.0
        return first_s if self._is_same(start_s, 0) else None

    @functools.cached_property
    def _ends_s(self) -> tuple[float, float]:
        """When the file's frames begin and end, on the clock of the spans."""
        extent, zero_s = video_extent(self._path), self.zero_s or 0.0
        return extent.first_s - zero_s, extent.last_s + self._frame_s - zero_s

    @functools.cached_property
    def _is_odd(self) -> np.ndarray:
        """Of each episode whether it is longer or shorter than its own rows."""
        return ~self._is_same(self._stops - self._starts, self._rows_s)

    @functools.cached_property
    def _meets(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each episode whether it begins, and whether it ends, where another one or the file does."""
        begin_s, end_s = self._ends_s
        return (
            self._is_same(self._starts, begin_s) | self._is_near(self._starts, self._stops),
            self._is_same(self._stops, end_s) | self._is_near(self._stops, self._starts),
        )

    def _is_near(self, times: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether each of the times is that of any of the others."""
        others = np.sort(others)
        after = np.searchsorted(others, times).clip(max=len(others) - 1)
        return self._is_same(times, others[after]) | self._is_same(times, others[np.maximum(after - 1, 0)])

    @functools.cached_property
    def _is_trusted(self) -> np.ndarray:
        """Of each episode whether the file's begin or end tells where it is."""
        begin_s, end_s = self._ends_s
        from_end = self._reached(-end_s, -self._stops, -self._starts)
        return self._reached(begin_s, self._starts, self._stops) | (from_end & ~self._is_odd)

    def _reached(self, from_s: float, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
        """Which episodes begin where a chain of others ends, each as long as its rows, that begins at `from_s`."""
        reached, ends = np.zeros(len(starts), bool), [from_s]
        for place in np.argsort(starts, kind="stable").tolist():
            after = bisect.bisect_left(ends, starts[place] - self._frame_s / 2)
            if after < len(ends) and self._is_same(ends[after], starts[place]):
                reached[place] = True
                if not self._is_odd[place]:
                    bisect.insort(ends, float(stops[place]))
        return reached

    def fault(self, name: str) -> str | None:
        """How an episode's span contradicts the others' or the file, with both numbers; None where it does not."""
        here = self._names.index(name)
        if self._stops[here] - self._starts[here] < self._frame_s / 2:
            return f"it {self._lies(here)} of {self._file}"
        if self.zero_s is None:
            start_s, first_s = self._starts.min(), video_extent(self._path).first_s
            return f"the first episode of {self._file} begins at {start_s:.3f} s, and the file at {first_s:.3f} s"
        return self._begins_alone(here) or self._ends_alone(here) or self._overlap(here) or self._lost(here)

    def _begins_alone(self, here: int) -> str | None:
        before = np.flatnonzero(self._starts < self._starts[here])
        other = before[self._starts[before].argmax()] if len(before) else None
        if self._meets[0][here] or self._is_excused(here, other):
            return None
        found = f"{self._file} begins at {self._ends_s[0]:.3f} s"
        if other is not None:
            found = f"{self._names[other]} before it ends at {self._stops[other]:.3f} s"
        return f"it begins at {self._starts[here]:.3f} s of {self._file}, and {found}"

    def _ends_alone(self, here: int) -> str | None:
        after = np.flatnonzero(self._starts > self._starts[here])
        other = after[self._starts[after].argmin()] if len(after) else None
        if self._meets[1][here] or self._is_excused(here, other):
            return None
        found = f"{self._file} ends at {self._ends_s[1]:.3f} s"
        if other is not None:
            found = f"{self._names[other]} after it begins at {self._starts[other]:.3f} s"
        return f"it ends at {self._stops[here]:.3f} s of {self._file}, and {found}"

    def _is_excused(self, here: int, other: int | None) -> bool:
        """Whether one of two that do not meet is where it says, and the other is not."""
        good = self._is_trusted & ~self._is_odd
        return other is not None and bool(good[here]) and not good[other]

    def _overlap(self, here: int) -> str | None:
        half_s = self._frame_s / 2
        across = (self._starts < self._stops[here] - half_s) & (self._starts[here] < self._stops - half_s)
        across &= self._meets[0] & self._meets[1]
        across[here] = False
        for other in np.flatnonzero(across):
            if not self._is_excused(here, other):
                return f"it {self._lies(here)} of {self._file}, and {self._names[other]} {self._lies(other)}"
        return None

    def _lies(self, place: int) -> str:
        return f"lies from {self._starts[place]:.3f} to {self._stops[place]:.3f} s"

    def _lost(self, here: int) -> str | None:
        """Why one that meets its neighbours is not known to be where it says: there are wrong ones on both sides."""
        if self._is_trusted[here]:
            return None
        it_lies = f"it {self._lies(here)} of {self._file}"
        if self._is_odd[here]:
            return f"{it_lies}, and has rows for {self._rows_s[here]:.3f} s"
        wrong = np.flatnonzero(self._is_odd | ~self._meets[0] | ~self._meets[1])
        other = wrong[np.abs(self._starts[wrong] - self._starts[here]).argmin()]
        found = f"{self._lies(other)}, and has rows for {self._rows_s[other]:.3f} s"
        return f"{it_lies}, where others are not where they should be: {self._names[other]} {found}"


class DataFiles:
    """The parquet files with rows, by a template of chunk_index and file_index, and which episodes are in each."""

    def __init__(self, root: Path, template: str, episodes_in: Callable[[Path], Iterable[int]]):
        self._root, self._template, self._episodes_in = root, template, episodes_in
        self._lock = threading.Lock()  # the first thread looks, the others wait for what it finds

    def holding(self, number: int) -> list[Path]:
        """The files with rows of an episode. Those that cannot be read are left out: they tell nothing."""
        with self._lock:
            return self._files_of.get(number, [])

    @functools.cached_property
    def _files_of(self) -> dict[int, list[Path]]:
        files: dict[int, list[Path]] = {}
        for path in self._paths():
            try:
                numbers = self._episodes_in(path)
            except (InputError, OSError):
                continue
            for number in numbers:
                files.setdefault(number, []).append(path)
        return files

    def _paths(self) -> Iterable[Path]:
        parts = list(string.Formatter().parse(self._template))
        name = re.compile("".join(re.escape(text) + (r"\d+" if field else "") for text, field, *_ in parts))
        found = self._root.glob("".join(glob.escape(text) + ("*" if field else "") for text, field, *_ in parts))
        return sorted(path for path in found if name.fullmatch(path.relative_to(self._root).as_posix()))
