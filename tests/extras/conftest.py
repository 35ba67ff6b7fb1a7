"""Fixtures for the commands on a cache, and for what computes."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands_support import STAMPS, CachedRobot


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """torch computes in one thread, as an encoder's cores do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where caches lie that are made once for all tests of a file."""
    return tmp_path_factory.mktemp("originals")


@pytest.fixture
def cached(
    originals: Path, tmp_path: Path, run_here: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> Callable[..., CachedRobot]:
    """cached(names of STAMPS) -> a robot of the test's own with a complete cache of these trajectories."""

    def copy_of(*names: str) -> CachedRobot:
        original = originals / str(len(names))
        if not original.exists():
            original.mkdir()
            robot = CachedRobot(original, run_here, capsys)
            for name in names:
                robot.add(name, STAMPS[name])
            robot.run()
        shutil.copytree(original / "data", tmp_path / "data")
        return CachedRobot(tmp_path, run_here, capsys)

    return copy_of
