"""A dataset with its cache, the commands on it, and ways to harm a chunk file."""

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import pytest

import progress_utils
from support import (
    FRAMES,
    Outcome,
    blake2b,
    cache_content,
    make_trajectory,
    read_progress,
    seal_of,
    tree,
    write_config,
)

STAMPS = {"t1": 1, "lab/t2": 2, "t3": 3}  # of three trajectories, each in chunks [0, 9), [6, 15), [12, 20)
CHUNK = "t1/chunk_00001.h5"


class Problem(NamedTuple):
    """A finding without its reason."""

    kind: str
    path: str


class CachedRobot:
    """A dataset, its cache, and the commands on it."""

    def __init__(self, root: Path, run: Callable[..., Any], capsys: pytest.CaptureFixture[str]):
        self.data, self.cache, self.config = root / "data", root / "data" / "dino_cache_small", root / "robot.yaml"
        self._run, self._capsys = run, capsys
        self.configure()

    def configure(self, **settings: Any) -> None:
        write_config(self.config, self.data, **{"tokens": ["cls", "patch"], "batch_size": FRAMES, **settings})

    def add(self, name: str, stamp: int) -> None:
        make_trajectory(self.data / name, FRAMES, stamp=stamp)

    def run(self, *arguments: str, code: int = 0) -> None:
        outcome = self._run(self.config, *arguments)
        assert outcome.code == code, outcome.err

    def utils(self, command: str, *options: str) -> Outcome:
        self._capsys.readouterr()
        code = progress_utils.main([command, "--cache-dir", str(self.cache), *options])
        return Outcome(code, *self._capsys.readouterr())

    def verify(self, *options: str) -> dict[Problem, str]:
        """What verify finds, with its reasons; its exit code agrees, and it changed nothing."""
        before = tree(self.cache)
        outcome = self.utils("verify", "--json", *options)
        assert tree(self.cache) == before
        report = json.loads(outcome.out)
        assert report["sound"] == (report["findings"] == []) == (outcome.code == 0)
        assert outcome.code in (0, 1)
        return {Problem(finding["kind"], finding["path"]): finding["reason"] for finding in report["findings"]}

    def edit_record(self, change: Callable[[dict[str, Any]], Any]) -> None:
        record = read_progress(self.cache)
        change(record)
        (self.cache / "progress.json").write_text(json.dumps(record))

    def state(self) -> list[Any]:
        """Chunks and record, without times: for np.testing.assert_equal."""
        record = read_progress(self.cache)
        for key in ("start_time", "last_update", "elapsed_s", "data_folder", "data_format", "num_trajectories"):
            del record[key]
        return [cache_content(self.cache), {**record, "completed_trajectories": set(record["completed_trajectories"])}]

    def files(self) -> dict[str, bytes | None]:
        """All of the cache but the lock file, which edits leave there."""
        return {path: content for path, content in tree(self.cache).items() if path != ".lock"}


def flip(path: Path, place: int, bits: int = 1) -> None:
    """Change one byte of a file; doing it twice changes nothing."""
    with open(path, "r+b") as file:
        (byte,) = os.pread(file.fileno(), 1, place)
        os.pwrite(file.fileno(), bytes([byte ^ bits]), place)


def reseal(path: Path, change: Callable[[h5py.File], Any]) -> None:
    """Change a chunk file and make its digests agree again."""
    with h5py.File(path, "r+") as file:
        change(file)
        digests = {name: blake2b(dataset[...].tobytes()) for name, dataset in file.items()}
        for name, digest in digests.items():
            file[name].attrs["digest"] = digest
        attributes = {key: value if isinstance(value, str) else int(value) for key, value in file.attrs.items()}
        del attributes["attributes_digest"]
        file.attrs["attributes_digest"] = blake2b(json.dumps([attributes, digests], sort_keys=True).encode())
    path.write_bytes(seal_of(path) + path.read_bytes()[512:])


def set_attributes(**attributes: Any) -> Callable[[h5py.File], None]:
    return lambda file: file.attrs.update(attributes)


def answer(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    """What is typed on the terminal."""
    terminal = io.StringIO(line + "\n")
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdin", terminal)


def swap(cache: Path, one: str, other: str) -> None:
    os.rename(cache / one, cache / "x")
    os.rename(cache / other, cache / one)
    os.rename(cache / "x", cache / other)


def mix(robot: CachedRobot) -> None:
    """A fourth trajectory, made with another configuration: two chunks."""
    robot.add("t4", 4)
    robot.configure(max_chunk_distance_m=3.0)
    robot.run("--yes")
