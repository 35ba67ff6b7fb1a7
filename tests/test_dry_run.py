"""--dry-run says what a run would do and writes nothing; a disk that cannot hold the cache is refused beforehand."""

import functools
import re
import shutil
from types import SimpleNamespace

import pytest

from support import CHUNKS, FRAMES, chunk_files, tree


def forecast(out: str) -> dict[str, int]:
    """The numbers of --dry-run by what they count."""
    return {key: int(number) for key, number in re.findall(r"^ *([a-z ]+): (\d+)", out, re.MULTILINE)}


def test_dry_run_tells_what_a_run_would_do_and_writes_nothing(robot, run_here, encoders, tmp_path):
    robot.add("t0", "t1")
    robot.add_broken("t2")
    before = tree(tmp_path)
    outcome = run_here(robot.config, "--dry-run")
    assert outcome.code == 0
    told = forecast(outcome.out)
    assert (told["trajectories"], told["frames to encode"], told["chunks to write"]) == (3, 2 * FRAMES, 2 * CHUNKS)
    assert "position[2, 1] is nan" in outcome.out
    assert encoders == []
    assert tree(tmp_path) == before
    run_here(robot.config)
    taken = sum(path.stat().st_size for path in chunk_files(robot.cache))
    assert taken <= told["bytes they take"] <= 2 * taken
    before = tree(tmp_path)
    robot.configure(max_attempts=1)
    assert forecast(run_here(robot.config, "--dry-run").out)["frames to encode"] == 0
    robot.configure(max_chunk_distance_m=3.0)
    assert "max_chunk_distance_m: 2.0 -> 3.0" in run_here(robot.config, "--dry-run").out
    robot.configure()
    assert tree(tmp_path) == before


def test_dry_run_tells_what_other_tokens_would_take(robot, run_here):
    pytest.importorskip("dino_cache_extras")
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


def set_free_space(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    usage = functools.partial(SimpleNamespace, total=10**12, used=0, free=count)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage())


def test_a_disk_that_cannot_hold_the_cache_is_refused_before_any_work(robot, run_here, encoders, monkeypatch):
    robot.add("t0", "t1")
    needed = forecast(run_here(robot.config, "--dry-run").out)["bytes they take"]
    set_free_space(monkeypatch, needed - 1)
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert str(robot.cache) in outcome.err
    assert encoders == []
    assert set(tree(robot.cache)) <= {".lock"}
    set_free_space(monkeypatch, needed)
    assert run_here(robot.config).code == 0
    # a rebuild replaces what it writes, so hardly any free space is needed; only the estimate is above the files
    taken = sum(path.stat().st_size for path in chunk_files(robot.cache))
    set_free_space(monkeypatch, needed - taken)
    assert run_here(robot.config, "--force-rebuild").code == 0
    set_free_space(monkeypatch, needed - taken - 1)
    assert run_here(robot.config, "--force-rebuild").code == 2
