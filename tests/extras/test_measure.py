"""--dry-run --measure tells the speed of this machine and writes nothing."""

import re
from types import SimpleNamespace
from typing import Any

import pytest

import dino_cache
from dino_cache import CacheSpec, RunOptions
from dino_cache_extras import measure
from support import FRAMES, STAMP_SHAPE, chunk_files, make_trajectory, tree


@pytest.fixture
def clock(clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """It stands for --measure too."""
    monkeypatch.setattr(measure, "time", dino_cache.time)
    return clock


@pytest.mark.parametrize(
    ("names", "batches", "rate", "left"), [(("t0", "t1", "t2"), 4, "4.0", "15 s"), (("t0",), 1, "2.5", "2 s")]
)
def test_dry_run_measures_the_speed_and_writes_nothing(
    robot, run_here, encoders, clock, before_batch, tmp_path, names, batches, rate, left
):
    """A batch of 8 takes 2 s; measured are batches until 5 s after the first, which fills the pipeline."""
    for name in names:
        make_trajectory(robot.data / name, FRAMES if len(names) > 1 else 5, stamp=int(name[-1]))

    def tick(batch: int) -> None:
        clock.now += 2

    before_batch(tick)
    before = tree(tmp_path)
    outcome = run_here(robot.config, "--dry-run", "--measure")
    assert outcome.code == 0
    assert f"  estimated time: {left} at {rate} frames/s, measured while decoding and encoding on cpu\n" in outcome.out
    assert len(encoders[-1].batch_sizes) == batches
    assert tree(tmp_path) == before
    assert run_here(robot.config).code == 0
    outcome = run_here(robot.config, "--dry-run", "--measure")
    assert "estimated time" not in outcome.out
    assert "Nothing to measure of robot: it has no frames to encode" in outcome.err


@pytest.mark.parametrize("ends", [(4, 4, 8, 8, 12, 12), (4, 4, 8, 8), (4, 4)])
def test_parts_of_a_batch_that_end_together_do_not_deceive_the_measure(ends, clock, monkeypatch):
    """Two cores take 8 frames each, in 4 s: 4 frames/s, however many there are."""

    def cache(*arguments: Any) -> list[Any]:
        for end in ends:
            clock.now = begin + end
            arguments[-1].on_encoded(8)
        return []

    begin = clock.now
    monkeypatch.setattr(measure, "cache_trajectories", cache)
    dataset = SimpleNamespace(
        name="robot", spec=CacheSpec(), shape=STAMP_SHAPE, weights={"digest": ""}, pending=[],
        config=SimpleNamespace(options=RunOptions(batch_size=16)), encoder=None,
    )  # fmt: skip
    assert measure.measure_rate(dataset, lambda: False) == 4.0


def test_measure_without_dry_run_is_refused(robot, run_here, encoders, capsys):
    robot.add("t0")
    with pytest.raises(SystemExit) as refused:
        run_here(robot.config, "--measure")
    assert refused.value.code == 2
    assert "--dry-run" in capsys.readouterr().err
    assert encoders == []


def test_dry_run_tells_what_other_tokens_would_take(robot, run_here):
    robot.add("t0", "t1")
    line = next(line for line in run_here(robot.config, "--dry-run").out.splitlines() if "by tokens: " in line)
    found = re.findall(r"([a-z][a-z +]*) ([\d.]+) (k?B|bytes)( \(chosen\))?", line.partition("by tokens: ")[2])
    assert [(tokens, chosen) for tokens, _, _, chosen in found] == [
        ("cls", " (chosen)"),
        ("patch", ""),
        ("cls + patch", ""),
    ]
    told = [float(number) * (1000 if unit == "kB" else 1) for _, number, unit, _ in found]
    for tokens, size in zip(("cls", "patch", ["cls", "patch"]), told):
        robot.configure(tokens=[tokens] if isinstance(tokens, str) else tokens)
        assert run_here(robot.config, "--force-rebuild").code == 0
        taken = sum(path.stat().st_size for path in chunk_files(robot.cache))
        assert 0.95 * taken <= size <= 1.5 * taken
