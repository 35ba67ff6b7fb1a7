"""What a run says while it works: the periodic line, the profile, and what it leaves for those who watch."""

import re
import time
from typing import Any

import pytest

import dino_cache
import progress_utils
from dino_cache import STAGES, FrameDecoder, Profile, available_cores
from progress_utils import read_lock_owner
from support import FRAMES, make_trajectory, run_cache


def test_a_run_tells_how_far_it_is_while_it_works(robot, run_here, before_batch, monkeypatch):
    robot.add("t0", "t1", "t2")
    monkeypatch.setattr(progress_utils, "HEARTBEAT_INTERVAL_S", 0.0)
    monkeypatch.setattr(dino_cache, "SHOW_INTERVAL_S", 0.0)
    told = []
    before_batch(lambda batch: told.append(read_lock_owner(robot.cache).run))
    assert run_here(robot.config).code == 0
    assert told[0] is None  # nothing is encoded yet
    states = told[1:]
    assert [state.frames_left for state in states] == [52, 44, 36, 28, 20, 12, 4]  # of 60, 8 a batch
    names = [state.trajectory for state in states]
    assert names[0] == "t0"
    assert names == sorted(names)
    assert {(state.total, state.chunks) for state in states} <= {(3, 0), (3, 3), (3, 6)}
    assert not list(robot.cache.glob(".lock.owner*"))


def profile(out: str) -> tuple[dict[str, tuple[float, int, float]], str]:
    """The table of --profile: stage -> (seconds, threads, percent of the run); and the line below it."""
    table = out[out.index("stage ") :]
    rows = re.findall(r"^([a-z ]+?) +([0-9.]+) +([0-9]+) +([0-9.]+)%$", table, re.MULTILINE)
    stages = {name: (float(seconds), int(threads), float(share)) for name, seconds, threads, share in rows}
    return stages, table.rstrip().splitlines()[-2]  # the last one is the run's verdict


@pytest.mark.slow
def test_the_profile_names_the_encoder_where_it_is_the_limit(robot):
    robot.add("t0", "t1", "t2")
    robot.configure(image_size=[140, 196])
    done = run_cache(robot.config, "--profile", fake=False)
    assert done.returncode == 0, done.stderr
    stages, verdict = profile(done.stdout)
    assert list(stages) == list(STAGES)
    assert all(threads for _, threads, _ in stages.values())  # every stage was at work
    assert stages["encode"][1] <= available_cores()
    assert all(share <= 100 for _, _, share in stages.values())
    assert verdict.endswith("the limit was: encode")


def test_the_profile_names_decoding_where_it_is_the_limit(robot, run_here, monkeypatch):
    robot.add("t0", "t1", "t2")
    decode = FrameDecoder.__call__

    def slow(self: FrameDecoder, data: Any, name: str) -> Any:
        time.sleep(0.05)
        return decode(self, data, name)

    monkeypatch.setattr(FrameDecoder, "__call__", slow)
    monkeypatch.setattr(dino_cache, "PROFILE", Profile())
    outcome = run_here(robot.config, "--profile")
    assert outcome.code == 0
    stages, verdict = profile(outcome.out)
    assert stages["decode"][0] >= 3 * FRAMES * 0.05
    assert stages["decode"][1] == 2  # decode_workers of this config
    assert verdict.endswith("the limit was: decode")


@pytest.mark.parametrize(
    ("tick_s", "expected"),
    [  # 32 frames in 4 batches; the last two parts need more than the first seconds
        (0.25, ["0.0h elapsed"] * 4),
        (4.0, [f"0.0h elapsed, 0.0h remaining, {rate} frames/s" for rate in (2, 2, 2, 2)]),
        (3600.0, [f"{hours}.0h elapsed, {4 - hours}.0h remaining, 0 frames/s" for hours in (1, 2, 3, 4)]),
    ],
)
def test_the_periodic_line(robot, run_here, clock, before_batch, tick_s, expected):
    for stamp in (0, 1):
        make_trajectory(robot.data / f"t{stamp}", 16, stamp=stamp)
    robot.configure(progress_interval_s=tick_s)

    def tick(batch: int) -> None:
        clock.now += tick_s

    before_batch(tick)
    outcome = run_here(robot.config)
    lines = [line for line in outcome.out.splitlines() if line.startswith("Progress: ")]
    assert [line.split(" chunks, ")[1] for line in lines] == expected
    counts = [re.fullmatch(r"Progress: (\d)/2 trajectories \((\d+\.\d)%\), (\d+) chunks, .*", line) for line in lines]
    for match in counts:
        done = int(match[1])
        assert (float(match[2]), int(match[3])) == (50.0 * done, 2 * done)  # 3.75 m: 0-2, 1.5-3.75 m, 0.25 m too few


def test_the_periodic_line_comes_no_more_often_than_the_interval(robot, run_here, clock, before_batch):
    make_trajectory(robot.data / "t0", 80, stamp=0)  # 10 batches
    robot.configure(progress_interval_s=30)

    def tick(batch: int) -> None:
        clock.now += 10

    before_batch(tick)
    assert len(re.findall(r"^Progress: ", run_here(robot.config).out, re.MULTILINE)) == 3  # at 30, 60 and 90 s
