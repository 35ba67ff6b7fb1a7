"""What several formats need: a cache of opened files."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Container, Hashable, Iterable
from pathlib import Path
from typing import Any


class FileCache:
    """What was made of the last few files; anew where a file's size or time of change is another. The weights of
    those kept come to `most`, at the most; the last one is kept whatever it weighs."""

    def __init__(self, make: Callable[..., Any], most: int, weigh: Callable[[Any], int] = lambda value: 1):
        self._make, self._most, self._weigh, self._weight = make, most, weigh, 0
        self._values: OrderedDict[tuple, Any] = OrderedDict()
        self._lock = threading.Lock()  # also while it is made: it is what the next thread wants too

    def __call__(self, path: Path, *arguments: Hashable) -> Any:
        status = os.stat(path)
        key = (path, status.st_size, status.st_mtime_ns, *arguments)
        with self._lock:
            if key not in self._values:
                self._values[key] = self._make(path, *arguments)
                self._weight += self._weigh(self._values[key])
            self._values.move_to_end(key)
            while self._weight > self._most and len(self._values) > 1:
                self._weight -= self._weigh(self._values.popitem(last=False)[1])
            return self._values[key]


def first_of(guesses: Iterable[str], present: Container[str]) -> str | None:
    return next((guess for guess in guesses if guess in present), None)
