"""Columns that come along: timestamp, delta and what extra_keys names, from the data into the chunks."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dino_cache
from dino_cache import CacheSpec, InvalidDataError, Poses, Trajectory, extra_dataset, plan_trajectory, to_next_frame
from support import (
    FRAMES,
    Outcome,
    Robot,
    StampEncoder,
    make_trajectory,
    read_chunk,
    read_progress,
    sealed,
    straight_line,
    stream_results,
    tree,
    write_config,
)

ACTION = np.arange(2 * FRAMES, dtype=np.float32).reshape(FRAMES, 2) / 8


def write_pose_file(folder: Path, **columns: Any) -> None:
    """A traj_data.pkl with these columns beside a straight line of 0.25 m a frame."""
    poses = {"position": straight_line(FRAMES), "yaw": np.linspace(0, 1, FRAMES)}
    (folder / "traj_data.pkl").write_bytes(pickle.dumps({**poses, **columns}))


def chunks(cache: Path, name: str) -> list[dict[str, np.ndarray]]:
    return [read_chunk(path)[1] for path in sorted((cache / name).glob("*.h5"))]


@pytest.fixture
def t1(robot: Robot) -> Path:
    """The folder of a trajectory with an action, whose column the config asks for."""
    make_trajectory(robot.data / "t1", FRAMES, stamp=1)
    write_pose_file(robot.data / "t1", action=ACTION)
    robot.configure(extra_keys=["action"])
    return robot.data / "t1"


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("key", "dataset"),
    [
        ("action", "extra/action"),
        ("/jackal/cmd/linear/", "extra/jackal.cmd.linear"),
        ("observation.state", "extra/observation.state"),
        ("cmd vel", "extra/cmd vel"),
    ],
)
def test_a_key_names_a_dataset(key: str, dataset: str) -> None:
    assert CacheSpec(extra_keys=(key,)).extra_keys == (key,)
    assert extra_dataset(key) == dataset


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["a/b", "a.b"], "a/b and a.b would both be stored as extra/a.b"),
        (["/cmd", "cmd"], "/cmd and cmd would both be stored as extra/cmd"),
        (["cmd", "cmd"], "names a key twice"),
        (["/"], "cannot be the name of a dataset"),
        (["."], "cannot be the name of a dataset"),
        (["a\0b"], "cannot be the name of a dataset"),
        ([""], "at least 1 character"),
        ("action", "should be a list"),
    ],
)
def test_keys_that_name_no_dataset_of_their_own_are_refused(
    robot: Robot, run_here: Callable[..., Outcome], keys: Any, message: str
) -> None:
    robot.add("t1")
    robot.configure(extra_keys=keys)
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert "extra_keys" in outcome.err
    assert message in outcome.err


def test_the_default_is_in_no_fingerprint_and_a_key_is() -> None:
    assert "extra_keys" not in CacheSpec().to_json()
    assert CacheSpec(extra_keys=["a"]).to_json()["extra_keys"] == ["a"]
    assert CacheSpec(extra_keys=["a"]).fingerprint("0") != CacheSpec().fingerprint("0")


def test_another_key_later_is_a_changed_configuration(robot: Robot, t1: Path, run_here: Callable[..., Outcome]) -> None:
    robot.configure()
    assert run_here(robot.config).code == 0
    before = tree(robot.cache / "t1")
    robot.configure(extra_keys=["action"])
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert "extra_keys: [] -> ['action']" in outcome.err + outcome.out
    robot.add("t2")
    write_pose_file(robot.data / "t2", action=ACTION)
    assert run_here(robot.config, "--yes").code == 0  # what is completed stays as it is
    assert tree(robot.cache / "t1") == before
    assert "extra/action" in chunks(robot.cache, "t2")[0]
    assert run_here(robot.config, "--force-rebuild").code == 0
    assert "extra/action" in chunks(robot.cache, "t1")[0]
    before = tree(robot.cache / "t1")
    assert run_here(robot.config).code == 0  # there is nothing to do
    assert tree(robot.cache / "t1") == before


# --------------------------------------------------------------------------------------------------------------- extra


@pytest.mark.parametrize("stride", [1, 3])
def test_an_extra_equals_the_column_also_where_chunks_overlap(
    robot: Robot, t1: Path, run_here: Callable[..., Outcome], stride: int
) -> None:
    robot.configure(extra_keys=["action"], frame_stride=stride)
    assert run_here(robot.config).code == 0
    found = chunks(robot.cache, "t1")
    assert len(found) > 1
    assert found[0]["frame_index"][-1] >= found[1]["frame_index"][0]  # they overlap
    for chunk in found:
        assert chunk["extra/action"].dtype == np.float32
        np.testing.assert_array_equal(chunk["extra/action"], ACTION[chunk["frame_index"]])
    for path in (robot.cache / "t1").glob("*.h5"):
        sealed(path)


@pytest.mark.parametrize("kind", ["pkl", "json", "npz"])
@pytest.mark.parametrize(
    ("values", "dtype"),
    [
        (np.arange(FRAMES) % 2 == 0, "bool"),
        (np.arange(FRAMES) - 3, "int64"),
        (np.where(np.arange(FRAMES) == 4, math.nan, 0.5), "float64"),
        (np.arange(3.0 * FRAMES).reshape(FRAMES, 3), "float64"),
    ],
)
def test_types_shapes_and_nan_are_kept(tmp_path: Path, kind: str, values: np.ndarray, dtype: str) -> None:
    folder = make_trajectory(tmp_path / "data/t1", FRAMES, stamp=1)
    (folder / "traj_data.pkl").unlink()
    poses = {"position": straight_line(FRAMES), "yaw": np.zeros(FRAMES), "command": values, "note": np.zeros(3)}
    if kind == "pkl":
        (folder / "traj_data.pkl").write_bytes(pickle.dumps(poses))
    elif kind == "json":
        (folder / "traj_data.json").write_text(json.dumps({key: value.tolist() for key, value in poses.items()}))
    else:
        np.savez(folder / "traj_data.npz", **poses)
    (result,) = stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder(), extra_keys=["command"])
    assert result.error is None
    for chunk in chunks(tmp_path / "cache", "t1"):
        assert chunk["extra/command"].dtype == dtype
        np.testing.assert_array_equal(chunk["extra/command"], values[chunk["frame_index"]])


@pytest.mark.parametrize("kind", ["i1", "u2", "<i4", ">i4", "u8", "f2", "<f4", ">f8"])
def test_every_type_of_number_is_kept(tmp_path: Path, kind: str) -> None:
    folder = make_trajectory(tmp_path / "data/t1", FRAMES, stamp=1)
    values = np.arange(FRAMES).astype(kind)
    write_pose_file(folder, a=values)
    list(stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder(), extra_keys=["a"]))
    for chunk in chunks(tmp_path / "cache", "t1"):
        assert chunk["extra/a"].dtype == np.dtype(kind).newbyteorder("=")
        np.testing.assert_array_equal(chunk["extra/a"], values[chunk["frame_index"]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (None, "has no action, which extra_keys names; its keys are position, yaw, other"),
        (["go"] * FRAMES, "action: holds a str; expected rows of numbers"),
        (np.array(["go"] * FRAMES), "action holds <U"),
        (np.zeros(FRAMES, complex), "action holds complex128 values"),
        (np.zeros(FRAMES - 1), f"action is ({FRAMES - 1},), expected ({FRAMES}, ...), a row for each frame"),
        (np.zeros((FRAMES, 0)), f"action is ({FRAMES}, 0), expected"),
        (3.0, "action is (), expected"),
        ([[1.0], [1.0, 2.0]] * (FRAMES // 2), "action: "),
    ],
)
def test_what_is_no_column_of_numbers_fails_its_trajectory_alone(
    robot: Robot, t1: Path, run_here: Callable[..., Outcome], values: Any, message: str
) -> None:
    robot.add("t2")
    write_pose_file(robot.data / "t2", **({} if values is None else {"action": values}), other=1)
    assert run_here(robot.config).code == 1
    progress = read_progress(robot.cache)
    assert progress["completed_trajectories"] == ["t1"]
    failure = progress["failures"]["t2"]
    assert message in failure["reason"]
    assert failure["error_type"] == "InvalidDataError"


def test_a_changed_column_is_changed_data(robot: Robot, t1: Path, run_here: Callable[..., Outcome]) -> None:
    assert run_here(robot.config).code == 0
    write_pose_file(t1, action=ACTION + 1)
    outcome = run_here(robot.config)
    assert outcome.code == 0
    assert "its data changed" in outcome.err
    np.testing.assert_array_equal(chunks(robot.cache, "t1")[0]["extra/action"], ACTION[:9] + 1)


def test_frames_without_poses_have_no_columns(robot: Robot, t1: Path, run_here: Callable[..., Outcome]) -> None:
    (t1 / "traj_data.pkl").unlink()
    robot.configure(extra_keys=["action"], chunk_by="frames")
    assert run_here(robot.config).code == 1
    assert "its keys are (none)" in read_progress(robot.cache)["failures"]["t1"]["reason"]


def test_many_columns_leave_a_file_that_every_byte_of_is_covered(tmp_path: Path) -> None:
    """More than the first 512 bytes can list."""
    folder = make_trajectory(tmp_path / "data/t1", FRAMES, stamp=1)
    names = [f"a{number}" for number in range(40)]
    write_pose_file(folder, **{name: np.arange(FRAMES) + number for number, name in enumerate(names)})
    list(stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder(), extra_keys=names))
    path = tmp_path / "cache/t1/chunk_00000.h5"
    _, datasets = read_chunk(path)
    for number, name in enumerate(names):
        np.testing.assert_array_equal(datasets[f"extra/{name}"], np.arange(9) + number)
    raw = path.read_bytes()
    seal = json.loads(raw[:512])
    with path.open("rb") as file:
        assert dino_cache.metadata_digest(file, seal["data"]) == seal["digest"]


def test_the_estimate_counts_the_columns(robot: Robot, run_here: Callable[..., Outcome]) -> None:
    """26 rows of 100,000 bytes are 2.6 MB more."""
    robot.add("t1")
    write_pose_file(robot.data / "t1", wide=np.zeros((FRAMES, 12_500)))
    robot.configure(extra_keys=["wide"])
    outcome = run_here(robot.config, "--dry-run")
    assert outcome.code == 0
    assert "2.6 MB" in outcome.out + outcome.err


# --------------------------------------------------------------------------------------------------- timestamp, delta


def recompose(position: np.ndarray, yaw: float, delta: np.ndarray) -> np.ndarray:
    """(n + 1, 3): x, y, yaw from a first pose and n steps in the frame's own axes, by complex numbers."""
    place, heading, poses = complex(*position), yaw, [(*position, yaw)]
    for dx, dy, dyaw in delta:
        place += complex(dx, dy) * np.exp(1j * heading)
        heading += dyaw
        poses.append((place.real, place.imag, heading))
    return np.array(poses)


class Made:
    """A source with these poses and no frames."""

    def __init__(self, poses: Poses):
        self._poses = poses

    def checksum(self, kind: str) -> str:
        return "0" * 16

    def poses(self, *, required: bool) -> Poses:
        return self._poses


def plan(poses: Poses, **spec: Any) -> dino_cache.TrajectoryPlan:
    return plan_trajectory(Trajectory("t", Path("t")), Made(poses), "0" * 16, "stat", CacheSpec(**spec))


steps = st.lists(
    st.tuples(st.floats(-1.5, 1.5), st.floats(-1.5, 1.5), st.floats(-7, 7), st.booleans()), min_size=2, max_size=60
)


@settings(deadline=None, max_examples=200)
@given(steps, st.integers(1, 3), st.booleans(), st.floats(-3, 3))
def test_delta_recomposed_gives_the_poses_also_across_chunk_borders(
    steps: list[tuple[float, float, float, bool]], stride: int, by_frames: bool, yaw_offset: float
) -> None:
    """Poses far from the origin; every so often a jump of 10 m, which ends a piece where chunks are cut by distance."""
    jumps = np.array([10.0 * jump for *_, jump in steps])
    moves = np.array([step[:2] for step in steps]) + jumps[:, None] * (np.arange(len(steps)) % 7 == 3)[:, None]
    position, yaw = np.cumsum(moves, axis=0) + [3000.0, -2000.0], np.array([step[2] for step in steps])
    spec = {"max_chunk_distance_m": 8.0, "overlap_distance_m": 1.0, "min_chunk_distance_m": 0.0}
    spec |= {"max_chunk_frames": 5, "overlap_frames": 2, "chunk_by": "frames" if by_frames else "distance"}
    made = plan(Poses(np.arange(len(yaw)), position, yaw), frame_stride=stride, yaw_offset=yaw_offset, **spec)
    delta, count = made.columns["delta"], len(made.yaw)
    far = np.linalg.norm(np.diff(made.position, axis=0), axis=1) > (math.inf if by_frames else 8.0)
    ends = [*np.flatnonzero(far).tolist(), count - 1]  # the last frame of each piece
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(delta).any(axis=1)), ends)
    assert np.isnan(delta[ends]).all()
    for first, last in zip([0, *(end + 1 for end in ends)], ends):
        found = recompose(made.position[first], made.yaw[first], delta[first:last])
        np.testing.assert_allclose(found[:, :2], made.position[first : last + 1], rtol=0, atol=1e-9)
        turned = np.exp(1j * found[:, 2])
        np.testing.assert_allclose(turned, np.exp(1j * made.yaw[first : last + 1]), rtol=0, atol=1e-9)
    assert (np.abs(delta[~np.isnan(delta[:, 2]), 2]) <= math.pi).all()


def test_delta_is_in_the_frames_own_axes() -> None:
    """Facing y, one metre on and two to the left; then turned by 200 degrees to the left, which is 160 to the right."""
    position = np.array([[0, 0], [-2, 1], [-2, 1]])
    yaw = np.radians([90, 90, 290])
    expected = [[1, 2, 0], [0, 0, math.radians(-160)], [math.nan] * 3]
    np.testing.assert_allclose(to_next_frame(position, yaw, []), expected, rtol=0, atol=1e-12)


def test_a_break_has_no_way_over_it() -> None:
    poses = Poses(np.arange(6), straight_line(6), np.zeros(6), breaks=np.array([3]))
    for chunk_by in ("distance", "frames"):
        made = plan(poses, chunk_by=chunk_by, overlap_frames=0)
        assert np.flatnonzero(np.isnan(made.columns["delta"][:, 0])).tolist() == [2, 5]


def test_a_row_at_a_chunks_end_has_its_delta_and_the_trajectorys_last_has_none(
    robot: Robot, t1: Path, run_here: Callable[..., Outcome]
) -> None:
    assert run_here(robot.config).code == 0
    found = chunks(robot.cache, "t1")
    rows: dict[int, np.ndarray] = {}
    for chunk in found:
        for number, delta in zip(chunk["frame_index"].tolist(), chunk["delta"]):
            np.testing.assert_array_equal(rows.setdefault(number, delta), delta)
    assert [number for number, delta in rows.items() if np.isnan(delta).any()] == [FRAMES - 1]


@pytest.mark.parametrize("lacking", ["position", "yaw"])
def test_there_is_no_delta_without_position_and_yaw(lacking: str) -> None:
    poses = Poses(np.arange(5), straight_line(5), np.zeros(5))._replace(**{lacking: None})
    assert plan(poses, chunk_by="frames").columns == {}


def test_timestamps_are_seconds_from_the_trajectorys_first_frame() -> None:
    times = np.array([1e9, 1e9 + 0.5, 1e9 + 0.75, 1e9 + 2])
    poses = Poses(np.arange(4), straight_line(4), np.zeros(4), times=times)
    assert plan(poses).columns["timestamp"].tolist() == [0, 0.5, 0.75, 2]
    assert plan(poses, frame_stride=3).columns["timestamp"].tolist() == [0, 2]
    assert "timestamp" not in plan(poses._replace(times=None)).columns


def test_a_source_without_what_is_asked_for_is_refused() -> None:
    poses = Poses(np.arange(4), straight_line(4), np.zeros(4), extra={"b": np.zeros(4)})
    with pytest.raises(InvalidDataError, match="t: has no a, which extra_keys names; its keys are b"):
        plan(poses, extra_keys=["a"])


# ---------------------------------------------------------------------------------------------------------------- task


def test_a_task_is_an_attribute_of_each_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_trajectory(tmp_path / "data/t1", FRAMES, stamp=1)
    poses = dino_cache.FolderSource.poses
    text = "go \u00fcber there\0" + "\ud800" + "x" * 20_000
    monkeypatch.setattr(
        dino_cache.FolderSource, "poses", lambda self, *, required: poses(self, required=required)._replace(task=text)
    )
    list(stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder()))
    for path in (tmp_path / "cache/t1").glob("*.h5"):
        assert sealed(path)["task"] == ("go \u00fcber there\ufffd?" + "x" * 20_000)[:10_000]


def test_without_a_task_there_is_no_such_attribute(robot: Robot, t1: Path, run_here: Callable[..., Outcome]) -> None:
    assert run_here(robot.config).code == 0
    assert "task" not in read_chunk(robot.cache / "t1/chunk_00000.h5")[0]


def test_a_key_under_a_dataset_goes_for_that_dataset(tmp_path: Path) -> None:
    path = write_config(tmp_path / "c.yaml", tmp_path, extra_keys=["a"])
    (config,) = dino_cache.load_config(path)
    assert dino_cache.data_keys(config.spec).extra_keys == ("a",)
    assert dino_cache.DataKeys.of(config.spec.to_json()).extra_keys == ("a",)
    assert dino_cache.DataKeys.of(CacheSpec().to_json()) == dino_cache.DataKeys()
