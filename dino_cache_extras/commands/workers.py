"""A task on all cores, with a progress bar."""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from tqdm import tqdm

from progress_utils import RefusedError, available_cores


def with_bar(tasks: list[Any], title: str, unit: str = " chunks") -> Iterable[Any]:
    """The tasks, with a progress bar on a terminal."""
    return tqdm(tasks, desc=title, unit=unit, disable=not sys.stderr.isatty())


def on_all_cores(function: Callable[[Any], Any], tasks: list[Any], title: str) -> list[Any]:
    """`function` of each task, in order, in worker processes, with a progress bar on a terminal."""
    bar = functools.partial(tqdm, total=len(tasks), desc=title, unit=" trajectories", disable=not sys.stderr.isatty())
    workers = min(available_cores(), len(tasks))
    if workers <= 1:
        return list(bar(map(function, tasks)))
    try:
        with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
            return list(bar(pool.map(function, tasks, chunksize=max(1, min(64, len(tasks) // (4 * workers))))))
    except BrokenProcessPool as error:
        raise RefusedError("a worker process was killed, for want of memory perhaps; nothing was changed") from error


def _end_with_parent() -> None:
    """Of a worker process: it would otherwise wait for work for ever when its parent is killed."""
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
