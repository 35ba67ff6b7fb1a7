"""Fixtures for runs in this process."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import dino_cache
from support import STAMP_SHAPE, StampEncoder


class Outcome(NamedTuple):
    """How a run ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


@pytest.fixture
def encoders(monkeypatch: pytest.MonkeyPatch) -> list[StampEncoder]:
    """Puts StampEncoder in the model's place for runs in this process; collects those that were loaded."""
    loaded: list[StampEncoder] = []

    def load(spec: dino_cache.CacheSpec, device: str) -> tuple[StampEncoder, str]:
        loaded.append(StampEncoder(spec.image_size, spec.tokens))
        return loaded[-1], "stamp" + spec.weights

    monkeypatch.setattr(dino_cache, "load_encoder", load)
    monkeypatch.setattr(dino_cache, "model_shape", lambda model_type: STAMP_SHAPE)
    return loaded


@pytest.fixture
def run_here(encoders: list[StampEncoder], capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[..., Outcome]]:
    """A run in this process, without a terminal, with StampEncoder: run_here(config, *arguments) -> Outcome."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(config: Path, *arguments: str) -> Outcome:
        capsys.readouterr()
        code = dino_cache.main(["--config", str(config), *arguments])
        return Outcome(code, *capsys.readouterr())

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
