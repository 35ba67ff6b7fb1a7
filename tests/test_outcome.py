"""A run yields how it ended, dataset by dataset, and one function says it."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import yaml

import dino_cache
from dino_cache import NightOutcome, RunArguments, StopRequest
from support import StampEncoder, chunk_files, make_trajectory, write_config


@pytest.fixture
def pair(tmp_path: Path, encoders: list[StampEncoder]) -> Path:
    """A config of two datasets: a has two good trajectories, b a good one and one with a frame that does not decode."""
    for number, name in enumerate(("a/t0", "a/t1", "b/t0", "b/broken")):
        make_trajectory(tmp_path / name, 20, stamp=number)
    (tmp_path / "b/broken/7.png").write_bytes(b"no picture")
    config = write_config(tmp_path / "config.yaml", tmp_path / "a", "a")
    content = yaml.safe_load(config.read_text())
    content["datasets"]["b"] = {"data_folder": str(tmp_path / "b")}
    config.write_text(yaml.safe_dump(content))
    return config


def run(config: Path, **arguments: object) -> NightOutcome:
    return dino_cache.run(RunArguments(config=config, overrides={}, **arguments), StopRequest(None))


def edit_options(config: Path, **options: object) -> None:
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | options))


def size_of_chunks(folder: Path) -> int:
    return sum(path.stat().st_size for path in chunk_files(folder))


def test_a_night_says_of_each_dataset_what_was_done(pair: Path) -> None:
    night = run(pair)
    assert night.exit_code == 1
    a, b = night.datasets
    assert (a.name, a.exit_code, a.num_trajectories, a.num_completed, a.num_chunks) == ("a", 0, 2, 2, 6)
    assert (b.name, b.exit_code, b.num_trajectories, b.num_completed, b.num_chunks) == ("b", 1, 2, 1, 3)
    assert (a.num_frames, a.num_left, a.failures, a.error, a.stopped_by) == (40, 0, {}, None, None)
    assert 20 <= b.num_frames <= 40  # of the broken one as far as they were encoded before it failed
    assert a.num_bytes == size_of_chunks(pair.parent / "a")
    assert b.num_bytes == size_of_chunks(pair.parent / "b")
    assert [*b.failures] == ["broken"]
    assert "broken/7.png: cannot decode" in b.failures["broken"]["reason"]
    assert a.seconds > 0


def test_what_was_done_before_is_not_counted_again(pair: Path) -> None:
    run(pair, limit=1)
    night = run(pair, datasets=["a"])
    (a,) = night.datasets
    assert (a.num_completed, a.num_frames, a.num_left, a.exit_code) == (2, 20, 0, 0)
    assert a.num_bytes == size_of_chunks(pair.parent / "a/dino_cache_small/t1")


def test_work_that_is_left_is_counted(pair: Path) -> None:
    a, b = run(pair, limit=1).datasets
    assert (a.num_left, a.exit_code) == (1, 5)
    assert b.num_left == 1


def test_what_ended_the_work_is_in_the_outcome(
    pair: Path, encoders: list[StampEncoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: StampEncoder, pixels: object) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(StampEncoder, "encode", fail)
    night = run(pair)
    assert night.exit_code == 3
    (a,) = night.datasets  # the other one is not begun: it has the same device
    assert (a.name, a.exit_code, a.num_completed, a.num_left) == ("a", 3, 0, 2)
    assert "the device is gone" in str(a.error)


def test_a_dry_run_has_no_outcome(pair: Path) -> None:
    assert run(pair, dry_run=True) == NightOutcome([], 0)


def test_a_dataset_that_is_refused_starts_none(pair: Path) -> None:
    content = yaml.safe_load(pair.read_text())
    content["datasets"]["b"]["data_folder"] = str(pair.parent / "gone")
    pair.write_text(yaml.safe_dump(content))
    with pytest.raises(dino_cache.RefusedError, match="gone is not a folder"):
        run(pair)
    assert chunk_files(pair.parent) == []


def test_the_outcome_is_said_by_one_function(
    pair: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(pair)
    edit_options(pair, max_attempts=1)
    _, b = run(pair).datasets  # names what failed before, as it does not try it again
    monkeypatch.setattr(dino_cache.LOG, "handlers", [caplog.handler])
    monkeypatch.setattr(dino_cache.LOG, "propagate", False)
    caplog.set_level(logging.INFO, "dino_cache")
    caplog.clear()
    dino_cache.log_outcome(b)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "b: 1/2 trajectories completed, 1 failed, 3 chunks"
    assert second.startswith("  failed (1 of 1 attempts): broken/7.png: cannot decode 10 bytes")
