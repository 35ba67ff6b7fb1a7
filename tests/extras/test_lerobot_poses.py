"""LeRobot: poses from 4 x 4 matrices, parts of vectors and velocities; times of frames."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from formats_support import FPS, edit_features, write_lerobot
from lerobot_support import RGB, matrices, matrix, write_root

import dino_cache
from dino_cache import AXES, CacheSpec, InputError, Poses, data_keys, open_source
from dino_cache_extras.formats.lerobot_poses import frame_times, integrate, pose_key
from support import FIRST, SECOND, Outcome, Rendered, cache_content, check_stamps, chunk_files, read_progress, write_gnm

STATE = {"observation.state": {"dtype": "float32", "shape": [3], "names": ["x.pos", "y.pos", "theta"]}}
VELOCITIES = {"observation.state": {"dtype": "float32", "shape": [3], "names": ["x.vel", "y.vel", "theta.vel"]}}


def poses_of(root: Path, **settings: Any) -> Poses:
    trajectory = dino_cache.format_named("lerobot").locate(root, "episode_000000")
    return open_source(trajectory, data_keys(CacheSpec(**settings))).poses(required=True)


def rows_of(values: Any, name: str = "action") -> Callable[[Rendered], dict[str, Any]]:
    return lambda trajectory: {name: np.asarray(values).tolist()}


# ---- 4 x 4 matrices


@pytest.mark.parametrize("pose_axes", AXES)
@pytest.mark.parametrize("shape", ["flat", "nested"])
def test_a_matrix_gives_position_and_yaw(tmp_path: Path, pose_axes: str, shape: str) -> None:
    """Matrices made by hand of places, yaws all around, and the table of docs/formats.md."""
    yaw = np.linspace(-3, 3, 25)
    place = np.stack([np.linspace(0, 5, 25), np.linspace(2, -3, 25) ** 2], 1)
    made = [matrix(x, y, turn, pose_axes) for (x, y), turn in zip(place, yaw)]
    values = [pose.ravel().tolist() if shape == "flat" else pose.tolist() for pose in made]
    features = {"action": {"dtype": "float32", "shape": [16] if shape == "flat" else [4, 4]}}
    write_root(tmp_path / "data", [Rendered(1, 25)], columns=lambda _: {"action": values}, features=features)
    poses = poses_of(tmp_path / "data", position_key="action", pose_axes=pose_axes)
    np.testing.assert_allclose(poses.position, place, atol=1e-9)
    np.testing.assert_allclose(poses.yaw, yaw, atol=1e-9)
    np.testing.assert_allclose(np.abs(poses.height), 7)


def test_a_yaw_key_of_its_own_is_taken_rather_than_the_rotation(tmp_path: Path) -> None:
    columns = {"action": [pose.ravel().tolist() for pose in matrices(FIRST)], "heading": np.full(40, 0.25)}
    features = {"heading": {"dtype": "float32", "shape": [1]}}
    write_root(tmp_path / "data", [FIRST], columns=lambda _: columns, features=features)
    assert (poses_of(tmp_path / "data", position_key="action", yaw_key="heading").yaw == 0.25).all()
    poses = poses_of(tmp_path / "data", position_key="action", yaw_key="action")
    np.testing.assert_allclose(poses.yaw, FIRST.yaw, atol=1e-9)


def changed(change: Callable[[np.ndarray], Any]) -> list[list[float]]:
    """Sound matrices of FIRST but for row 5."""
    values = np.array(matrices(FIRST))
    change(values[5])
    return values.reshape(-1, 16).tolist()


def put(rows: Any, columns: Any, value: Any) -> Callable[[np.ndarray], None]:
    return lambda pose: pose.__setitem__((rows, columns), value)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (
            changed(put(3, 0, 0.5)),
            ["row 5", "the last row is 0.5 0 0 1, expected 0 0 0 1", "position_key: action[0:2]"],
        ),
        (changed(put(3, 3, 2)), ["row 5", "0 0 0 2"]),
        (changed(put(0, 0, 1.5)), ["row 5", "not at right angles, of length 1"]),
        (changed(lambda pose: put(slice(3), 2, -pose[:3, 2])(pose)), ["row 5", "mirrored"]),
        (changed(put(1, 1, math.nan)), ["row 5", "right angles"]),
        (changed(put(0, 3, math.inf)), ["action[5, 0]", "inf"]),
        (changed(put(0, 3, 1e12)), ["action[5, 0]", "at most 1e+08"]),
        ([pose.T.ravel().tolist() for pose in matrices(FIRST)], ["row 0", "column by column"]),
        (np.arange(640.0).reshape(40, 16).tolist(), ["row 0", "12 13 14 15", "action[0:2]"]),  # a state, not a matrix
        ([[*pose.ravel().tolist(), 0.0][: 16 + (row == 7)] for row, pose in enumerate(matrices(FIRST))], ["action"]),
        ([[None, *pose.ravel().tolist()[1:]] for pose in matrices(FIRST)], ["action", "expected rows of numbers"]),
    ],
)
def test_16_numbers_that_are_no_pose_are_refused(
    run_bits: Callable[..., Outcome], tmp_path: Path, values: list[Any], expected: list[str]
) -> None:
    """Never are the first two of them taken for x and y."""
    write_root(tmp_path / "data", [FIRST], columns=lambda _: {"action": values})
    outcome = run_bits({"position_key": "action", "yaw_key": "action"})
    assert outcome.code == 1
    (failure,) = read_progress(tmp_path / "cache")["failures"].values()
    assert all(word in failure["reason"] for word in expected), failure["reason"]
    assert not chunk_files(tmp_path / "cache")


def test_an_axis_that_points_up_tells_no_yaw(tmp_path: Path) -> None:
    upright = np.eye(4)[[1, 2, 0, 3]]  # the x axis of the body points along z
    write_root(tmp_path / "data", [FIRST], columns=rows_of([upright.ravel()] * 40))
    with pytest.raises(InputError, match="the x axis of the body is vertical"):
        poses_of(tmp_path / "data", position_key="action")


def test_a_vector_of_16_whose_first_two_are_a_place_is_read_by_its_parts(tmp_path: Path) -> None:
    state = np.random.default_rng(0).normal(size=(40, 16))
    write_root(tmp_path / "data", [FIRST], columns=rows_of(state))
    poses = poses_of(tmp_path / "data", position_key="action[0:2]", yaw_key="action[2]")
    np.testing.assert_array_equal(poses.position, state[:, :2])
    np.testing.assert_array_equal(poses.yaw, state[:, 2])


@pytest.mark.parametrize(("values", "is_redone"), [("matrices", True), ("state", False)])
def test_what_was_made_of_16_numbers_before(
    run_bits: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str, is_redone: bool
) -> None:
    """The first two were x and y: wrong of matrices, which are redone; right of some states, which stay as they are."""
    made = np.array(matrices(FIRST)).reshape(40, 16)
    if values == "state":
        made = np.concatenate([FIRST.position, np.zeros((40, 14))], 1)
    columns = {"action": made.tolist(), "yaw": FIRST.yaw}
    features = {"yaw": {"dtype": "float32", "shape": [1]}}
    write_root(tmp_path / "data", [FIRST], columns=lambda _: columns, features=features)
    module = dino_cache.format_named("lerobot").open.__module__
    with monkeypatch.context() as before:
        before.setattr(f"{module}.are_pose_matrices", lambda rows: False)
        before.setattr("dino_cache_extras.formats.lerobot_poses.has_16_numbers", lambda rows: False)
        assert run_bits({"position_key": "action", "chunk_by": "frames"}).code == 0
    content = cache_content(tmp_path / "cache")
    outcome = run_bits({"position_key": "action", "chunk_by": "frames"})
    assert outcome.code == 0, outcome.err
    assert ("its data changed" in outcome.err) == is_redone
    after = cache_content(tmp_path / "cache")
    for path, (_, datasets) in after.items():
        expected = content[path][1] if not is_redone else {"position": FIRST.position[datasets["frame_index"]]}
        np.testing.assert_allclose(datasets["position"], expected["position"], atol=1e-9)


# ---- Parts of vectors


def state_root(root: Path, names: Any, *, shape: list[int] | None = None) -> None:
    values = np.column_stack([FIRST.position, FIRST.yaw])
    features = {"observation.state": {"dtype": "float32", "shape": shape or [3], "names": names}}
    write_root(root, [FIRST], columns=rows_of(values, "observation.state"), features={**features, "action": None})


@pytest.mark.parametrize(
    ("names", "position", "yaw"),
    [
        (None, "[0:2]", "[2]"),
        (["x.pos", "y.pos", "theta"], "{x.pos,y.pos}", "{theta}"),
        ({"motors": ["x.pos", "y.pos", "theta"]}, "{x.pos, y.pos}", "[2:3]"),
        ({"base": ["x", "y"], "head": [["theta"]]}, "{x,y}", "{theta}"),
        ([["x", "y"], ["theta"]], "[0:2]", "{theta}"),
    ],
)
def test_parts_of_a_vector(
    run_bits: Callable[..., Outcome], tmp_path: Path, names: Any, position: str, yaw: str
) -> None:
    state_root(tmp_path / "data", names)
    keys = {"position_key": f"observation.state{position}", "yaw_key": f"observation.state{yaw}"}
    outcome = run_bits(keys)
    assert outcome.code == 0, outcome.err
    check_stamps(tmp_path / "cache", "episode_000000", 1)
    for _, values in cache_content(tmp_path / "cache").values():
        np.testing.assert_array_equal(values["position"], FIRST.position[values["frame_index"]])
        np.testing.assert_array_equal(values["yaw"], FIRST.yaw[values["frame_index"]])
    assert run_bits(keys).code == 0


def test_the_order_of_names_is_that_of_the_key(tmp_path: Path) -> None:
    state_root(tmp_path / "data", ["x", "y", "theta"])
    poses = poses_of(tmp_path / "data", position_key="observation.state{y,x}", yaw_key="observation.state{theta}")
    np.testing.assert_array_equal(poses.position, FIRST.position[:, ::-1])


@pytest.mark.parametrize(
    ("names", "position", "expected"),
    [
        (["x", "y", "t"], "observation.state{X,y}", ["no X", "x, y, t"]),
        (["x", "x", "t"], "observation.state{x,t}", ["twice the name x"]),
        (None, "observation.state{x,y}", ["names no parts", "observation.state[0:2]"]),
        (["x", "y"], "observation.state{x,y}", ["2 names for the 3 numbers"]),
        ({"motors": ["x", 3, "t"]}, "observation.state{x,t}", ["names no parts"]),
        (None, "observation.state[2:4]", ["has 3 numbers"]),
        (None, "observation.state[3]", ["has 3 numbers"]),
        (None, "observation.state[0:99999999999999999]", ["has 3 numbers"]),
        (None, "observation.state[2:1]", ["[i:j] with i < j"]),
        (None, "observation.state[-1]", ["has the keys"]),
        (None, "observation.state[0:2", ["has the keys"]),
        (None, "observation.nothing[0:2]", ["has the keys", "observation.state"]),
        (["x_deg", "y.vel", "t"], "observation.state{y.vel}", ["velocity", "integrate: true"]),
        (["x.vel", "y.vel", "t"], "observation.state[0:2]", ["velocity", "integrate: true"]),
        (["x.vel", "y.vel", "theta.vel"], "observation.state", ["velocity", "integrate: true"]),
    ],
)
def test_a_part_that_is_not_there_is_refused(
    run_bits: Callable[..., Outcome], tmp_path: Path, names: Any, position: str, expected: list[str]
) -> None:
    state_root(tmp_path / "data", names)
    outcome = run_bits({"position_key": position, "yaw_key": "observation.state[2]"})
    assert outcome.code == 2
    assert all(word in outcome.err for word in expected), outcome.err
    assert not chunk_files(tmp_path / "cache")


def test_rows_that_are_shorter_than_described_fail(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    for shape, names, key in (([5], None, "[3:5]"), ([4], ["x", "y", "t", "more"], "{x,y}"), ([10**17], None, "[3:5]")):
        root = tmp_path / "data"
        state_root(root, names, shape=shape)
        outcome = run_bits({"position_key": f"observation.state{key}", "yaw_key": "observation.state[2]"})
        assert outcome.code == 1
        assert "row 0 of observation.state has 3 numbers" in outcome.err
        root.rename(tmp_path / f"done{shape[0]}")
        (tmp_path / "cache").rename(tmp_path / f"cache{shape[0]}")


def test_a_name_that_tells_another_unit_is_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    state_root(tmp_path / "data", ["x", "y", "theta_deg"])
    keys = {"position_key": "observation.state{x,y}", "yaw_key": "observation.state{theta_deg}"}
    outcome = run_bits(keys)
    assert outcome.code == 1
    assert "set yaw_unit: degrees" in outcome.err
    assert run_bits({**keys, "yaw_unit": "degrees"}, "--yes").code == 0


def test_a_feature_that_is_called_like_a_part_is_itself(tmp_path: Path) -> None:
    key = pose_key("position_key", "a[0]", {"a": {"shape": [3]}, "a[0]": {"shape": [2]}}, "x")
    assert (key.feature, key.columns) == ("a[0]", None)


# ---- Velocities


def velocity_root(root: Path, values: np.ndarray, *, stamps: np.ndarray | None = None, **features: Any) -> None:
    trajectory = Rendered(1, len(values))
    columns = rows_of(values, "observation.state")
    write_root(root, [trajectory], columns=columns, features={**VELOCITIES, **features, "action": None})
    if stamps is not None:
        path = root / "data/chunk-000/episode_000000.parquet"
        table = pyarrow.parquet.read_table(path)
        pyarrow.parquet.write_table(table.drop(["timestamp"]).append_column("timestamp", pyarrow.array(stamps)), path)


INTEGRATE = {
    "position_key": "observation.state{x.vel,y.vel}",
    "yaw_key": "observation.state{theta.vel}",
    "integrate": True,
}


def circle(times: np.ndarray, speed: float, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """The closed form, from (0, 0) on, ahead along x."""
    radius = speed / rate
    return np.stack([radius * np.sin(rate * times), radius * (1 - np.cos(rate * times))], 1), rate * times


@pytest.mark.parametrize("rate", [0.5, -0.8])
def test_a_circle_is_integrated_to_its_closed_form(
    run_bits: Callable[..., Outcome], tmp_path: Path, rate: float
) -> None:
    times = np.arange(120) / FPS
    velocity_root(tmp_path / "data", np.tile([1.0, 0.0, rate], (120, 1)))
    outcome = run_bits(INTEGRATE)
    assert outcome.code == 0, outcome.err
    assert "POSES ARE ADDED UP from velocities" in outcome.err
    assert "1 trajectories have poses integrated from velocities (integrate: true), which drift" in outcome.err
    place, yaw = circle(times, 1.0, rate)
    bound = 1.0 * times[-1] * (rate / FPS) ** 2 / 24  # a chord is so much longer than the arc's, on all the way
    for _, values in cache_content(tmp_path / "cache").values():
        rows = values["frame_index"]
        np.testing.assert_allclose(values["yaw"], yaw[rows], atol=1e-9)
        assert np.abs(values["position"] - place[rows]).max() <= bound


def test_a_body_that_slides_aside_and_degrees_a_second(tmp_path: Path) -> None:
    """A quarter turn to the left in 2 s while it slides to its right: it comes round a circle the other way."""
    times = np.arange(21) / FPS
    velocity_root(tmp_path / "data", np.tile([0.0, -1.0, 45.0], (21, 1)))
    poses = poses_of(tmp_path / "data", **INTEGRATE, yaw_unit="degrees")
    along, yaw = circle(times, 1.0, math.pi / 4)
    np.testing.assert_allclose(poses.position, np.stack([along[:, 1], -along[:, 0]], 1), atol=1e-3)
    np.testing.assert_allclose(poses.yaw, yaw, atol=1e-12)
    right = poses_of(tmp_path / "data", **INTEGRATE, yaw_unit="degrees", pose_axes="ned")  # y and yaw to the right
    np.testing.assert_allclose(right.position, poses.position * (1, -1), atol=1e-12)
    np.testing.assert_allclose(right.yaw, -poses.yaw, atol=1e-12)
    compass = poses_of(tmp_path / "data", **INTEGRATE, yaw_unit="compass_degrees")
    np.testing.assert_allclose(compass.yaw, -poses.yaw, atol=1e-12)


def test_velocities_are_added_up_over_the_timestamps(tmp_path: Path) -> None:
    stamps = np.array([0.0, 0.1, 0.5, 0.6, 2.0])
    velocity_root(tmp_path / "data", np.tile([2.0, 0.0, 0.0], (5, 1)), stamps=stamps)
    poses = poses_of(tmp_path / "data", **INTEGRATE)
    np.testing.assert_allclose(poses.position[:, 0], 2 * stamps)
    np.testing.assert_array_equal(poses.times, stamps)
    ahead = poses_of(tmp_path / "data", **{**INTEGRATE, "position_key": "observation.state{x.vel}"})
    np.testing.assert_allclose(ahead.position, poses.position)


def test_integrate_of_steps_by_hand() -> None:
    place, yaw = integrate(np.array([0.0, 1.0, 3.0]), np.array([[1.0, 0], [3, 0], [3, 0]]), np.array([0, math.pi, 0]))
    np.testing.assert_allclose(yaw, [0, math.pi / 2, math.pi * 3 / 2])
    x, y = 2 * math.cos(math.pi / 4), 2 * math.sin(math.pi / 4)  # 2 m along pi / 4, then 6 m along pi
    np.testing.assert_allclose(place, [[0, 0], [x, y], [x - 6, y]])


@pytest.mark.parametrize(
    ("settings", "code", "expected"),
    [
        ({"position_key": "observation.state"}, 1, ["has 3 numbers", "observation.state[0:2]"]),
        ({"pose_axes": "camera"}, 1, ["pose_axes must be z_up or ned"]),
        ({"position_key": "action{x.pos,y.pos}"}, 2, ["is a pose by its name", "take integrate out"]),
        ({"integrate": False}, 2, ["is a velocity by its name", "integrate: true"]),
    ],
)
def test_what_cannot_be_integrated_is_refused(
    run_bits: Callable[..., Outcome], tmp_path: Path, settings: dict[str, Any], code: int, expected: list[str]
) -> None:
    velocity_root(tmp_path / "data", np.tile([1.0, 0.0, 0.1], (40, 1)))
    edit_features(tmp_path / "data", {"action": STATE["observation.state"]})
    outcome = run_bits({**INTEGRATE, **settings})
    assert outcome.code == code, outcome.err
    assert all(word in outcome.err for word in expected), outcome.err


def test_half_of_the_velocities_are_not_taken_for_poses(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    """Without positions, rates would be yaws."""
    velocity_root(tmp_path / "data", np.tile([1.0, 0.0, 0.1], (40, 1)))
    outcome = run_bits({"yaw_key": INTEGRATE["yaw_key"], "integrate": True, "chunk_by": "frames"})
    assert outcome.code == 2
    assert "there is no position_key" in outcome.err


def test_velocities_that_are_no_numbers_fail(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    velocity_root(tmp_path / "data", np.array([[1.0, 0, 0], [math.nan, 0, 0], [1, 0, 0]]))
    assert "nan" in run_bits(INTEGRATE).err


def test_integrate_is_a_setting_of_lerobot_alone(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_gnm(tmp_path / "data", [FIRST])
    outcome = run_bits({"integrate": True})
    assert outcome.code == 2
    assert "integrate: True: does not apply to format: gnm" in outcome.err


def test_integrate_at_its_default_is_in_no_fingerprint() -> None:
    assert CacheSpec(integrate=False).fingerprint("x") == CacheSpec().fingerprint("x")
    assert CacheSpec(integrate=True).fingerprint("x") != CacheSpec().fingerprint("x")
    assert "integrate" not in CacheSpec().to_json()


# ---- Times


@pytest.mark.parametrize(
    ("stamps", "expected"),
    [
        ([0.0, 0.5, 2.0], [0.0, 0.5, 2.0]),
        (np.float32([0.0, 0.1, 0.2]).astype(float).tolist(), [0.0, 0.1, 0.2]),  # as exact as the rate
        ([0.0, 0.5, 0.5], [0.0, 0.1, 0.2]),  # does not rise
        ([0.0, math.nan, 1.0], [0.0, 0.1, 0.2]),
        ([0.0, None, 1.0], [0.0, 0.1, 0.2]),
        ([0.0, 1.0], [0.0, 0.1, 0.2]),
        (["a", "b", "c"], [0.0, 0.1, 0.2]),
        (None, [0.0, 0.1, 0.2]),
        ([[0.0], [1.0], [2.0]], [0.0, 1.0, 2.0]),
    ],
)
def test_times_are_the_timestamps_where_they_rise(stamps: Any, expected: list[float]) -> None:
    times = frame_times(stamps, 3, 10.0)
    assert times.dtype == np.float64
    assert times.tolist() == [pytest.approx(value, abs=1e-15) for value in expected]


@pytest.mark.parametrize("codec", ["libx264", "image"])
def test_frames_are_thinned_by_their_timestamps(run_bits: Callable[..., Outcome], tmp_path: Path, codec: str) -> None:
    """Long recordings too: float32 rounds 1000 s to 0.06 ms, and no frame is missed or doubled for it."""
    write_lerobot(tmp_path / "data", [Rendered(1, 101)], "v2.1", codec)
    assert run_bits(None, sample_hz=2.5).code == 0
    frames = sorted(
        {int(row) for _, values in cache_content(tmp_path / "cache").values() for row in values["frame_index"]}
    )
    assert frames == list(range(0, 101, 4))


def test_irregular_timestamps_are_the_times_of_images(tmp_path: Path) -> None:
    write_lerobot(tmp_path / "data", [Rendered(1, 20)], "v2.1", "image")
    path = tmp_path / "data/data/chunk-000/episode_000000.parquet"
    table, stamps = pyarrow.parquet.read_table(path), np.arange(20) ** 2 / 10
    pyarrow.parquet.write_table(table.drop(["timestamp"]).append_column("timestamp", pyarrow.array(stamps)), path)
    np.testing.assert_array_equal(poses_of(tmp_path / "data").times, stamps)


# ---- Several cameras


def test_a_source_serves_one_of_several_cameras(tmp_path: Path) -> None:
    """Poses are shared, and each camera's frames are its own."""
    write_root(tmp_path / "data", [SECOND])
    left = tmp_path / "data/videos/chunk-000/left"
    left.mkdir()
    for number, data in enumerate(Rendered(9, SECOND.count).jpegs):
        (left / f"{number}.jpg").write_bytes(data)
    edit_features(tmp_path / "data", {"left": {"dtype": "image", "shape": [48, 64, 3]}})
    trajectory = dino_cache.format_named("lerobot").locate(tmp_path / "data", "episode_000000")
    keys = data_keys(CacheSpec(position_key="action"))
    both = open_source(trajectory, keys._replace(image_key=(("front", RGB), ("left", "left"))))
    assert len(both.poses(required=True).position) == SECOND.count
    for camera, key in (("front", RGB), ("left", "left")):
        alone = open_source(trajectory, keys._replace(image_key=key)).open_frames([0, 5]).read([0, 5])
        for frame, expected in zip(both.open_frames([0, 5], camera).read([0, 5]), alone, strict=True):
            np.testing.assert_array_equal(frame, expected)
    before = both.checksum("content")
    (left / "3.jpg").write_bytes(b"x")
    assert (
        open_source(trajectory, keys._replace(image_key=(("front", RGB), ("left", "left")))).checksum("content")
        != before
    )
