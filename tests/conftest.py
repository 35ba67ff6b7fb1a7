"""Fixtures for runs in this process."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

import dino_cache
from support import STAMP_SHAPE, BitEncoder, Outcome, Robot, StampEncoder, write_config

# A shell's background jobs ignore it, and what they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three test files at a time, since many wait; in this process where one wants to see what they print (-s)."""
    if config.option.capture == "no":
        config.option.dist = "no"
        return 0
    return 3


@pytest.fixture(autouse=True)
def readers_here(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Puts threads of this process in the place of reader processes, which a test's patches cannot reach; not in tests
    marked real_readers, and not in runs of their own."""
    if request.node.get_closest_marker("real_readers") is None:
        monkeypatch.setattr(dino_cache, "ReaderProcesses", dino_cache.ReaderThreads)
        monkeypatch.setattr(dino_cache, "start_fork_server", lambda *_: None)


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
    before = {number: signal.getsignal(number) for number in dino_cache.STOP_SIGNALS}

    def run(config: Path, *arguments: str) -> Outcome:
        capsys.readouterr()
        code = dino_cache.main(["--config", str(config), *arguments])
        return Outcome(code, *capsys.readouterr())

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def run_bits(
    run_here: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Outcome]:
    """A run with BitEncoder, data/ to cache/: run_bits(settings of the dataset, *arguments, settings at the top)."""
    monkeypatch.setattr(
        dino_cache, "load_encoder", lambda spec, device: (BitEncoder(spec.image_size, spec.tokens), "bits")
    )

    def run(dataset: dict[str, Any] | None = None, *arguments: str, **settings: Any) -> Outcome:
        config = write_config(tmp_path / "config.yaml", tmp_path / "data", resize="stretch", **settings)
        content = yaml.safe_load(config.read_text())
        content["datasets"]["robot"] |= {"cache_dir": str(tmp_path / "cache"), **(dataset or {})}
        config.write_text(yaml.safe_dump(content))
        return run_here(config, *arguments)

    return run


@pytest.fixture
def robot(tmp_path: Path) -> Robot:
    robot = Robot(tmp_path / "data", tmp_path / "data" / "dino_cache_small", tmp_path / "robot.yaml")
    robot.configure()
    return robot


@pytest.fixture
def before_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], Any]], None]:
    """Have something done before each batch is encoded: it gets the number of batches that were, from 0."""
    encode = StampEncoder.encode

    def install(action: Callable[[int], Any]) -> None:
        def act_and_encode(self: StampEncoder, pixels: Any) -> Any:
            action(len(self.batch_sizes))
            return encode(self, pixels)

        monkeypatch.setattr(StampEncoder, "encode", act_and_encode)

    return install


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The run's clock stands at `clock.now` [s]; file times and pauses elsewhere are as ever."""
    clock = SimpleNamespace(now=1000.0)
    here = SimpleNamespace(**{**vars(time), "monotonic": lambda: clock.now})
    monkeypatch.setattr(dino_cache, "time", here)
    return clock
