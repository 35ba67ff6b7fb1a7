"""Pose tables of videos in other units and axes; and what a run says of poses, and of what looks wrong with them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats_support import FPS, write_csv, write_lerobot, write_mp4, write_recon_file, write_tum, write_videos

from dino_cache import CacheSpec, Poses
from dino_cache_extras.pose_facts import doubts_about
from support import FIRST, Outcome, Rendered, check_stamps, make_trajectory, read_chunk, read_progress

COUNT = 40
TRAJECTORY = Rendered(1, COUNT)
TURN = np.linspace(0, 2.4, COUNT)  # a bend to the left [rad]
PATH = np.stack([np.cumsum(np.cos(TURN)), np.cumsum(np.sin(TURN))], axis=1) * 0.05
TIMES = np.arange(COUNT) / FPS


def write_table(data: Path, header: str, *columns: Any, name: str = "t1.csv") -> None:
    """A video of COUNT frames and a table beside it."""
    write_mp4(data / "t1.mp4", TRAJECTORY.frames)
    rows = (",".join(repr(float(value)) for value in row) for row in zip(*columns))
    (data / name).write_text("\n".join([header, *rows]) + "\n")


def stored(cache: Path) -> dict[str, np.ndarray]:
    """The only chunk."""
    _, datasets = read_chunk(cache / "t1" / "chunk_00000.h5")
    return datasets


def reason(cache: Path) -> str:
    (failure,) = read_progress(cache)["failures"].values()
    return failure["reason"]


TABLES = {  # header -> columns, and the settings that fit
    "time_s,x [m],y (m),yaw_rad": ((TIMES, *PATH.T, TURN), {}),
    "time,x,y,yaw_deg": ((TIMES, *PATH.T, np.rad2deg(TURN)), {"yaw_unit": "degrees"}),
    "t,x,y,heading (deg)": ((TIMES, *PATH.T, 90 - np.rad2deg(TURN)), {"yaw_unit": "compass_degrees"}),
    "Timestamp_ms,x,y,yaw": ((TIMES * 1000, *PATH.T, TURN), {"time_scale": 0.001}),
    "time,x_cm,y_cm,yaw": ((TIMES, *PATH.T * 100, TURN), {"position_scale": 0.01}),
    "t,x,y,z,yaw": ((TIMES, -PATH[:, 1], 0 * TIMES, PATH[:, 0], -TURN), {"pose_axes": "camera"}),
    "t,x,y,z,qx,qy,qz,qw": (
        (TIMES, -PATH[:, 1], 0 * TIMES, -PATH[:, 0], 0 * TURN, np.sin(TURN / 2), 0 * TURN, np.cos(TURN / 2)),
        {"pose_axes": "y_up"},
    ),
    "t,tx,ty,tz,qx,qy,qz,qw": (
        (TIMES, PATH[:, 0], -PATH[:, 1], 0 * TIMES, 0 * TURN, 0 * TURN, -np.sin(TURN / 2), np.cos(TURN / 2)),
        {"pose_axes": "ned"},
    ),
    "t,y,x,qz,qy,qx,qw,yaw": (
        (TIMES, PATH[:, 1], PATH[:, 0], np.sin(TURN / 2), 0 * TURN, 0 * TURN, np.cos(TURN / 2), TURN),
        {},
    ),
}


@pytest.mark.parametrize("header", TABLES)
def test_one_drive_in_all_tables_is_stored_alike(run_bits: Callable[..., Outcome], tmp_path: Path, header: str) -> None:
    columns, settings = TABLES[header]
    write_table(tmp_path / "data", header, *columns)
    outcome = run_bits({**settings, "max_chunk_distance_m": 50.0})
    assert outcome.code == 0, outcome.err
    np.testing.assert_allclose(stored(tmp_path / "cache")["position"], PATH, atol=1e-9)
    np.testing.assert_allclose(stored(tmp_path / "cache")["yaw"], TURN, atol=1e-9)
    assert check_stamps(tmp_path / "cache", "t1", 1) == COUNT


def test_degrees_are_interpolated_the_shorter_way(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    """Between 350 and 10 degrees lies 0, not 180."""
    write_table(tmp_path / "data", "t,x,y,yaw", [0, 2, 4], [0, 2, 4], [0, 0, 0], [350, 10, 30])
    assert run_bits({"yaw_unit": "degrees", "max_chunk_distance_m": 50.0}).code == 0
    yaw = np.rad2deg(stored(tmp_path / "cache")["yaw"])
    np.testing.assert_allclose(yaw[:21], np.linspace(-10, 10, 21), atol=1e-9)


@pytest.mark.parametrize(
    ("header", "columns", "expected"),
    [
        ("t,x,y,yaw_deg", (TIMES, *PATH.T, TURN), ["yaw_deg is in deg by its name", "set yaw_unit: degrees"]),
        ("t,x,y,heading [degrees]", (TIMES, *PATH.T, TURN), ["degrees by its name", "yaw_unit: degrees"]),
        ("time_ms,x,y,yaw", (TIMES, *PATH.T, TURN), ["time_ms is in ms by its name", "set time_scale: 0.001"]),
        ("t,x_mm,y_mm,yaw", (TIMES, *PATH.T, TURN), ["x_mm is in mm by its name", "set position_scale: 0.001"]),
        ("t,x,y,yaw,heading", (TIMES, *PATH.T, TURN, TURN), ["two columns for yaw: yaw and heading"]),
        ("t,x,tx,y,yaw", (TIMES, *PATH.T, TURN, TURN), ["two columns for x: x and tx"]),
        ("time,timestamp,x,y,yaw", (TIMES, TIMES, *PATH.T, TURN), ["two columns for timestamp: time and timestamp"]),
        (
            "t,x,y,yaw,qx,qy,qz,qw",
            (TIMES, *PATH.T, np.rad2deg(TURN), 0 * TURN, 0 * TURN, np.sin(TURN / 2), np.cos(TURN / 2)),
            ["its yaw and its quaternions are", "rad apart", "yaw_unit"],
        ),
        ("t,x,y,yaw", (TIMES * 1000, *PATH.T, TURN), ["1 of 40 poses lie inside", "milliseconds", "time_scale: 0.001"]),
        ("t,x,y,yaw", (TIMES * 10, *PATH.T, TURN), ["5 of 40 poses lie inside", "frame numbers", "time_scale: 0.1"]),
        ("t,x,y,yaw", (TIMES * 1e9 + 1e5, *PATH.T, TURN), ["no frame lies between", "nanoseconds", "1e-09"]),
        ("t,x,y,yaw", (TIMES + 1.7e9, *PATH.T, TURN), ["no frame lies between"]),
        ("t,x,y,yaw", (), ["holds no poses"]),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_fails_its_trajectory(
    run_bits: Callable[..., Outcome], tmp_path: Path, header: str, columns: tuple, expected: list[str]
) -> None:
    write_table(tmp_path / "data", header, *columns)
    assert run_bits().code == 1
    assert all(words in reason(tmp_path / "cache") for words in expected), reason(tmp_path / "cache")


@pytest.mark.parametrize("content", [b"", b"\n \n", b"# timestamp tx ty tz qx qy qz qw\n"])
@pytest.mark.parametrize("suffix", [".csv", ".txt"])
def test_an_empty_table_says_so(run_bits: Callable[..., Outcome], tmp_path: Path, content: bytes, suffix: str) -> None:
    write_mp4(tmp_path / "data" / "t1.mp4", TRAJECTORY.frames)
    (tmp_path / "data" / f"t1{suffix}").write_bytes(content)
    assert run_bits().code == 1
    assert reason(tmp_path / "cache") == f"t1{suffix}: is empty, it holds no poses"


@pytest.mark.parametrize(("inside", "code"), [(20, 0), (19, 1)])
def test_half_of_the_table_must_lie_inside_the_video(
    run_bits: Callable[..., Outcome], tmp_path: Path, inside: int, code: int
) -> None:
    """40 poses, of which so many lie at the video's times."""
    times = np.concatenate([np.linspace(0, 3.9, inside), 100 + np.arange(COUNT - inside)])
    write_table(tmp_path / "data", "t,x,y,yaw", times, *PATH.T, TURN)
    assert run_bits().code == code
    if code:
        assert "19 of 40 poses lie inside the video" in reason(tmp_path / "cache")


@pytest.mark.parametrize("name", ["t1.CSV", "t1.TXT", "T.CSV"])
def test_a_table_whose_ending_is_in_capitals_is_read(
    run_bits: Callable[..., Outcome], tmp_path: Path, name: str
) -> None:
    write_mp4(tmp_path / "data" / f"{name[:-4]}.MP4", TRAJECTORY.frames)
    (write_csv if name.endswith("CSV") else write_tum)(tmp_path / "data" / name, TRAJECTORY)
    outcome = run_bits()
    assert outcome.code == 0, outcome.err
    assert check_stamps(tmp_path / "cache", name[:-4], 1) > COUNT


def test_a_recon_file_whose_ending_is_in_capitals_is_read(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_recon_file(tmp_path / "data" / "t1.HDF5", FIRST)
    outcome = run_bits()
    assert outcome.code == 0, outcome.err
    assert check_stamps(tmp_path / "cache", "t1", 1) > FIRST.count


# ---------------------------------------------------------------------------------------------------------------------
# What a run says of the poses
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_a_run_and_a_dry_run_say_what_the_poses_add_up_to(
    run_bits: Callable[..., Outcome], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    """Two videos of 4 and 3 s at 10 frames/s, one with a jump of 100 m among its steps of 0.25 m."""
    write_mp4(tmp_path / "data" / "t1.mp4", Rendered(1, 41).frames)
    write_mp4(tmp_path / "data" / "t2.mp4", Rendered(2, 31).frames)
    for name, count in (("t1", 41), ("t2", 31)):
        x = np.arange(count) * 0.25
        x[30:] += 100 if name == "t1" else 0
        rows = [f"{i / FPS},{x[i]},0,{i / 40 - 0.5}" for i in range(count)]
        (tmp_path / "data" / f"{name}.csv").write_text("\n".join(["t,x,y,yaw", *rows]))
    outcome = run_bits(None, *arguments)
    assert outcome.code == 0, outcome.err
    (line,) = re.findall(r"Poses to do: (.*)", outcome.out + outcome.err)
    assert line == (
        "2 trajectories, 72 frames, 117.5 m, median step 0.25 m, 1 pose jumps, yaw -0.5 to 0.5 rad, 7 s at 10 frames/s"
    )


def test_data_without_times_or_poses_have_none_in_that_line(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    make_trajectory(tmp_path / "data" / "t1", 5)
    assert "Poses to do: 1 trajectories, 5 frames, 1 m, median step 0.25 m, 0 pose jumps, yaw 0 to 1 rad\n" in (
        run_bits(None, "--dry-run").out
    )
    (tmp_path / "data" / "t1" / "traj_data.pkl").unlink()
    assert "Poses to do: 1 trajectories, 5 frames, no poses\n" in run_bits(None, "--dry-run", chunk_by="frames").out


def test_lerobots_times_are_those_of_its_rate(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_lerobot(tmp_path / "data", [Rendered(1, 41)], "v2.1", "libx264")
    assert "4 s at 10 frames/s" in run_bits(None, "--dry-run").out


def doubtful(position: np.ndarray, yaw: np.ndarray, **more: Any) -> str:
    """What is doubted about poses."""
    settings = {key: more.pop(key) for key in set(more) & set(CacheSpec.model_fields)}
    poses = Poses(np.arange(len(position)), position, yaw, **more)
    return "; ".join(doubts_about(poses, CacheSpec(**settings)))


WHOLE = np.round(np.rad2deg(TURN))


@pytest.mark.parametrize(
    ("position", "yaw", "more", "expected"),
    [
        (PATH, np.linspace(0, 350, COUNT), {}, "yaw_unit: degrees"),
        (PATH, WHOLE, {}, "yaw_unit: degrees"),
        (PATH, np.rad2deg(TURN), {}, "yaw_unit: degrees"),
        (PATH, 90 - np.rad2deg(TURN), {}, "compass_degrees"),
        (PATH, -TURN, {}, "yaw turns against the path"),
        (PATH, np.deg2rad(90 - np.rad2deg(TURN)), {}, "yaw turns against the path"),
        (PATH, -TURN, {"yaw_unit": "degrees"}, "yaw turns against the path"),
        (PATH * 100, TURN, {}, "position_scale: 0.01"),
        (PATH * 20, TURN, {"times": TIMES}, None),  # 1 m a step at 10 frames/s
        (PATH * 200, TURN, {"times": TIMES}, "faster than 60 m/s"),
        (np.stack([PATH[:, 1], 0 * TURN], 1), TURN, {"height": PATH[:, 0]}, "pose_axes: camera or y_up"),
        (PATH * 0.1, TURN, {"height": np.linspace(0, 9, COUNT)}, "pose_axes: camera or y_up"),
    ],
)  # fmt: skip
def test_what_looks_like_another_unit_is_doubted(
    position: np.ndarray, yaw: np.ndarray, more: dict[str, Any], expected: str | None
) -> None:
    found = doubtful(position, yaw, **more)
    assert (expected in found) if expected else not found, found


LAPS = np.linspace(0, 12 * math.pi, 400)
CIRCLE = np.stack([np.cos(LAPS), np.sin(LAPS)], 1) * 3


@pytest.mark.parametrize(
    ("position", "yaw", "more"),
    [
        (CIRCLE, LAPS + math.pi / 2, {}),  # unwrapped
        (CIRCLE, np.angle(np.exp(1j * (LAPS + math.pi / 2))), {}),
        (CIRCLE, (LAPS + math.pi / 2) % (2 * math.pi), {}),
        (CIRCLE, 0 * LAPS, {}),  # moves without turning, as drones and omnidirectional robots do
        (CIRCLE, -LAPS * 3.3, {}),  # looks round while it drives
        (PATH, np.full(COUNT, 6.0), {}),
        (PATH, TURN + math.pi, {}),  # drives backward
        (PATH, TURN, {"height": np.linspace(0, 0.3, COUNT)}),  # up a slope
        (np.stack([np.linspace(0, 9, COUNT), 0 * TURN], 1), 0 * TURN, {"height": np.linspace(0, 2, COUNT)}),
        (PATH, TURN, {"height": np.full(COUNT, np.nan)}),
        (np.zeros((0, 2)), np.zeros(0), {"height": np.zeros(0), "times": np.zeros(0)}),
        (np.zeros((1, 2)), np.zeros(1), {"height": np.zeros(1), "times": np.zeros(1)}),
        (np.zeros((9, 2)), np.zeros(9), {"height": np.zeros(9), "times": np.arange(9.0)}),
    ],
)  # fmt: skip
def test_what_is_common_is_not_doubted(position: np.ndarray, yaw: np.ndarray, more: dict[str, Any]) -> None:
    assert doubtful(position, yaw, **more) == ""


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
def test_a_doubt_is_one_line_for_the_dataset(
    run_bits: Callable[..., Outcome], tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    for name in ("t1", "t2"):
        make_trajectory(tmp_path / "data" / name, COUNT, stamp=1, position=PATH, yaw=np.linspace(0, 350, COUNT))
    make_trajectory(tmp_path / "data" / "t3", COUNT, stamp=1, position=PATH, yaw=TURN)
    outcome = run_bits(None, *arguments)
    assert outcome.code == 0  # it may be meant
    line = "Poses of 2 trajectories: yaw looks like degrees (yaw_unit: degrees or compass_degrees): t1, t2"
    assert (outcome.out + outcome.err).count(line) == 1


def test_a_table_in_degrees_is_doubted_before_it_is_interpolated(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    write_table(tmp_path / "data", "t,x,y,yaw", TIMES, *PATH.T, np.linspace(0, 350, COUNT))
    outcome = run_bits(None, "--dry-run")
    assert "yaw looks like degrees" in outcome.out
    assert "yaw 0 to 350 rad" in outcome.out


def test_poses_beside_few_of_a_videos_frames_are_doubted(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    """A table in tens of seconds: it covers the first tenth of the video."""
    write_table(tmp_path / "data", "t,x,y,yaw", TIMES / 10, *PATH.T, TURN)
    assert "less than half of the video's frames" in run_bits(None, "--dry-run").out


def test_good_data_raise_no_doubt(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_videos(tmp_path / "data", [FIRST])
    assert "Poses of" not in run_bits(None, "--dry-run").out
