"""What the tests have reader processes do. Imported there by name."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np

import dino_cache
from dino_cache import InputError


def pid(_: dino_cache.TrajectoryReader) -> int:
    return os.getpid()


def die_so_often(_: dino_cache.TrajectoryReader, times: int, how: int, log: Path) -> int:
    """End by a signal, or where `how` is not greater than 0 with that exit status negated; then answer. Leaves a byte
    each time."""
    with log.open("ab") as file:
        file.write(b".")
    if log.stat().st_size <= times:
        if how <= 0:
            os._exit(-how)
        os.kill(os.getpid(), how)
    return log.stat().st_size


def spin(_: dino_cache.TrajectoryReader, begun: Path) -> None:
    """One call into C that does not end, with the interpreter's lock held."""
    begun.write_text(str(os.getpid()))
    pow(7, 1 << 40, (1 << 4_000_000) - 1)


def get_on(_: dino_cache.TrajectoryReader, seconds: float) -> str:
    """Take processor time, but never much for one thing."""
    begin = time.process_time()
    while time.process_time() - begin < seconds:
        dino_cache.FENCE.getting_on()
    return "done"


def allocate(_: dino_cache.TrajectoryReader, num_bytes: int) -> int:
    with dino_cache.input_errors("t1"):
        return int(np.ones(num_bytes, np.uint8)[-1])


def _take_all() -> None:
    """Take all the memory there is, in small pieces, as parsers do."""
    pieces = []
    while True:
        pieces.append(bytearray(1 << 16))


def answer_after_a_full_memory(_: dino_cache.TrajectoryReader, num_bytes: int) -> tuple[Exception, bytes]:
    """What a group of frames comes to whose second frame needs too much: an error beside pixels."""
    try:
        with dino_cache.input_errors("t1"):
            _take_all()
    except InputError as error:
        return dino_cache.FENCE.portable(error), bytes(num_bytes)


def answer_too_much(_: dino_cache.TrajectoryReader, num_bytes: int) -> np.ndarray:
    """What fits into the memory once and not twice."""
    return np.zeros(num_bytes, np.uint8)


def fail(_: dino_cache.TrajectoryReader, error: Exception) -> None:
    raise error


def sleep(_: dino_cache.TrajectoryReader, begun: Path) -> None:
    begun.write_text(str(os.getpid()))
    time.sleep(600)


def nap(reader: dino_cache.TrajectoryReader, seconds: float, begun: Path) -> str:
    """Wait in short pieces, none of which is over when a process that was stopped goes on."""
    begun.touch()
    for _ in range(10):
        time.sleep(seconds / 10)
    return "rested"


def plain_work(_: dino_cache.TrajectoryReader, numbers: list[int], log: Path) -> list[int]:
    """Squares; a process that meets 13 dies."""
    if 13 in numbers:
        os.kill(os.getpid(), 11)
    return [number * number for number in numbers]
