"""Trajectories that a run did not come to the end of: the next one goes on after their finished chunks."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import dino_cache
from support import (
    StampEncoder,
    cache_content,
    check_stamps,
    chunk_files,
    make_trajectory,
    write_config,
)

# 80 frames, 0.25 m apart: chunks of 2 m that overlap by 0.5 m, of 9 frames each: [0, 9), [6, 15), [12, 21) ...
FRAMES = 80
SPANS = [(start, min(start + 9, FRAMES)) for start in range(0, FRAMES - 3, 6)]
NAME = "long/ü tra\nck"


class PlainEncoder(StampEncoder):
    """Its tokens do not tell how many rows were in the batch: batches lie otherwise after an interruption."""

    def encode(self, pixels: Any) -> Any:
        rows = super().encode(pixels)()
        for values in rows.tokens.values():
            values[..., 3] = 0
        return lambda: rows


class Trial:
    """A dataset of one trajectory, or more, and runs of it."""

    def __init__(self, folder: Path, run_here: Callable[..., Any]):
        self.data, self.cache, self.config = folder / "data", folder / "cache", folder / "robot.yaml"
        self.run = lambda *arguments: run_here(self.config, *arguments)
        self.encoded: list[int] = []  # numbers of frames, in order
        self.stop_after: int | None = None  # frames, of one run
        make_trajectory(self.data / NAME, FRAMES, stamp=1)
        self.configure()

    def configure(self, **settings: Any) -> None:
        content = yaml.safe_load(write_config(self.config, self.data, batch_size=1, **settings).read_text())
        content["datasets"]["robot"]["cache_dir"] = str(self.cache)
        self.config.write_text(yaml.safe_dump(content))

    def interrupt(self, after: int, *arguments: str, code: int = 143) -> None:
        """A run that gets a signal when so many frames are encoded."""
        self.encoded.clear()
        self.stop_after = after
        outcome = self.run(*arguments)
        self.stop_after = None
        assert outcome.code == code, outcome.err
        assert chunk_files(self.cache) == []

    def finish(self, *arguments: str) -> list[int]:
        """A run to the end; returns the frames that it encoded."""
        self.encoded.clear()
        outcome = self.run(*arguments)
        assert outcome.code == 0, outcome.err
        assert list((self.cache / ".staging").iterdir()) == []
        return list(self.encoded)

    @property
    def journals(self) -> list[Path]:
        return sorted((self.cache / ".staging").rglob("*.journal"))

    @property
    def staged(self) -> list[Path]:
        """Chunk files in staging."""
        return sorted((self.cache / ".staging").rglob("chunk_*.h5"))


@pytest.fixture
def trial(tmp_path, run_here, monkeypatch) -> Trial:
    trial = Trial(tmp_path, run_here)

    class CountingEncoder(PlainEncoder):
        def encode(self, pixels: Any) -> Any:
            trial.encoded += [int(high) * 256 + int(low) for _, high, low in self.stamps(pixels)]
            if len(trial.encoded) == trial.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().encode(pixels)

    def load(spec: dino_cache.CacheSpec, device: str) -> tuple[StampEncoder, str]:
        return CountingEncoder(spec.image_size, spec.tokens), "stamp" + spec.weights

    monkeypatch.setattr(dino_cache, "load_encoder", load)
    return trial


@pytest.fixture
def expected(trial: Trial) -> dict[str, Any]:
    """What a run makes that nobody disturbed; there is no cache afterwards."""
    assert sorted(set(trial.finish())) == list(range(FRAMES))
    content = cache_content(trial.cache)
    assert [(chunk["start"], chunk["stop"]) for chunk, _ in content.values()] == SPANS
    shutil.rmtree(trial.cache)
    return content


def check_same(cache: Path, expected: dict[str, Any]) -> None:
    """Attributes equal, and datasets byte for byte."""
    content = cache_content(cache)
    assert content.keys() == expected.keys()
    for name, (attributes, datasets) in content.items():
        assert attributes == expected[name][0]
        assert {key: (rows.dtype, rows.shape, rows.tobytes()) for key, rows in datasets.items()} == {
            key: (rows.dtype, rows.shape, rows.tobytes()) for key, rows in expected[name][1].items()
        }


def durable_after(frames: int) -> int:
    """Chunks that are whole when the first so many frames are there; the last one is never left alone."""
    return min(sum(stop <= frames for _, stop in SPANS), len(SPANS) - 1)


@pytest.mark.parametrize("after", [1, 9, 10, 30, 76, 79])
def test_a_stopped_run_is_taken_up_at_the_first_frame_of_the_next_chunk(trial, expected, after):
    trial.interrupt(after)
    durable = len(trial.staged)
    assert durable in (durable_after(after), durable_after(after - 1))  # the last batch may have been dropped
    assert trial.finish() == list(range(SPANS[durable][0], FRAMES))
    check_same(trial.cache, expected)
    assert check_stamps(trial.cache, NAME, 1) == sum(stop - start for start, stop in SPANS)


def test_several_stops_in_a_row_lose_a_chunk_each_at_most(trial, expected):
    total = 0
    for after in (20, 20, 20):
        trial.interrupt(after)
        total += len(trial.encoded)
    total += len(trial.finish())
    check_same(trial.cache, expected)
    assert total <= FRAMES + 3 * (9 + 3)
