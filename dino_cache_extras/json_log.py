"""--log-json: what a run does as JSON, an object a line, for machines."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from dino_cache import EVENTS, LOG
from progress_utils import RefusedError


class JsonHandler(logging.StreamHandler):
    """Writes an event as {"time": epoch seconds, "event": its name, ...}. One that cannot be written ends the writing,
    with a warning; the run goes on."""

    def emit(self, record: logging.LogRecord) -> None:
        entry = {"time": record.created, "event": record.msg, **(record.args or {})}
        try:
            self.stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self.stream.flush()
        except (OSError, ValueError) as error:
            EVENTS.setLevel(logging.CRITICAL)
            LOG.warning("--log-json: cannot write it any more: %s", error)


@contextlib.contextmanager
def events_go_to(path: Path) -> Iterator[None]:
    """Append this run's events to a file; a pipe or a device takes them too.

    Raises:
        RefusedError: it cannot be opened.
    """
    try:
        stream = os.fdopen(_open(path), "w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise RefusedError(f"--log-json {path}: cannot write it: {error.strerror}") from error
    handler = JsonHandler(stream)
    EVENTS.addHandler(handler)
    EVENTS.propagate = False
    EVENTS.setLevel(logging.INFO)
    try:
        yield
    finally:
        EVENTS.removeHandler(handler)
        EVENTS.setLevel(logging.CRITICAL)
        with contextlib.suppress(OSError, ValueError):
            stream.close()


def _open(path: Path) -> int:
    """A descriptor to append to; a pipe that nobody reads is an error, not waited for."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    descriptor = os.open(path, flags | os.O_NONBLOCK, 0o666)
    if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
        os.set_blocking(descriptor, True)
    return descriptor
