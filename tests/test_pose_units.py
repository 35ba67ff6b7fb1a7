"""Units and axes of poses: what settings say is what is stored, and what looks like another unit is told or refused."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from dino_cache import CacheSpec, InputError, checked_poses, data_keys
from support import Outcome, Robot, make_trajectory, read_chunk, read_progress, straight_line, write_poses

COUNT = 20
TURN = np.linspace(0, 2.4, COUNT)  # of a robot that drives a bend to the left [rad]
PATH = np.stack([np.cumsum(np.cos(TURN)), np.cumsum(np.sin(TURN))], axis=1) * 0.25
UP = np.full(COUNT, 1.5)

# The same drive as other people would write it. Axes by hand: forward f, left l, up u.
DRIVES: dict[str, tuple[dict[str, Any], np.ndarray, np.ndarray]] = {
    "z_up": ({}, np.stack([PATH[:, 0], PATH[:, 1], UP], 1), TURN),
    "ned": ({"pose_axes": "ned"}, np.stack([PATH[:, 0], -PATH[:, 1], -UP], 1), -TURN),
    "y_up": ({"pose_axes": "y_up"}, np.stack([-PATH[:, 1], UP, -PATH[:, 0]], 1), TURN),
    "camera": ({"pose_axes": "camera"}, np.stack([-PATH[:, 1], -UP, PATH[:, 0]], 1), -TURN),
    "degrees": ({"yaw_unit": "degrees"}, PATH, TURN * 180 / math.pi),
    "compass": ({"yaw_unit": "compass_degrees"}, PATH, 90 - TURN * 180 / math.pi),
    "compass, ned": (
        {"yaw_unit": "compass_degrees", "pose_axes": "ned"},
        np.stack([PATH[:, 0], -PATH[:, 1]], 1),
        -TURN * 180 / math.pi,
    ),
    "centimetres": ({"position_scale": 0.01}, PATH * 100, TURN),
}


@pytest.mark.parametrize("drive", DRIVES)
def test_one_drive_in_all_units_and_axes_is_stored_alike(
    robot: Robot, run_here: Callable[..., Outcome], drive: str
) -> None:
    settings, position, yaw = DRIVES[drive]
    make_trajectory(robot.data / "t1", COUNT, stamp=1, position=position, yaw=yaw)
    robot.configure(max_chunk_distance_m=50.0, **settings)
    outcome = run_here(robot.config)
    assert outcome.code == 0, outcome.err
    _, datasets = read_chunk(robot.cache / "t1" / "chunk_00000.h5")
    np.testing.assert_allclose(datasets["position"], PATH, atol=1e-9)
    np.testing.assert_allclose(datasets["yaw"], TURN, atol=1e-9)


def test_a_yaw_offset_turns_every_yaw(robot: Robot, run_here: Callable[..., Outcome]) -> None:
    make_trajectory(robot.data / "t1", COUNT, stamp=1, position=PATH, yaw=TURN)
    robot.configure(max_chunk_distance_m=50.0, yaw_offset=math.pi / 2)
    assert run_here(robot.config).code == 0
    _, datasets = read_chunk(robot.cache / "t1" / "chunk_00000.h5")
    expected = TURN + math.pi / 2
    expected[expected > math.pi] -= 2 * math.pi
    np.testing.assert_allclose(datasets["yaw"], expected, atol=1e-12)


def test_frames_without_times_cannot_be_sampled(robot: Robot, run_here: Callable[..., Outcome]) -> None:
    make_trajectory(robot.data / "t1", COUNT, stamp=1, position=PATH, yaw=TURN)
    robot.configure(sample_hz=4.0)
    outcome = run_here(robot.config)
    assert outcome.code == 1
    assert "t1: sample_hz: 4.0 needs times of frames, and there are none" in outcome.err


def test_at_the_defaults_poses_are_stored_as_they_are(robot: Robot, run_here: Callable[..., Outcome]) -> None:
    """To the bit, also what no unit turns into: -0.0, and yaw beyond a turn."""
    position, yaw = PATH / 3, np.linspace(-0.0, 20.0, COUNT)
    position[0] = -0.0
    make_trajectory(robot.data / "t1", COUNT, stamp=1, position=position, yaw=yaw)
    robot.configure(max_chunk_distance_m=50.0)
    assert run_here(robot.config).code == 0
    _, datasets = read_chunk(robot.cache / "t1" / "chunk_00000.h5")
    assert datasets["position"].tobytes() == position.tobytes()
    assert datasets["yaw"].tobytes() == yaw.tobytes()


@pytest.mark.parametrize(
    ("key", "value"), [("yaw_unit", "degrees"), ("pose_axes", "ned"), ("position_scale", 0.01), ("time_scale", 0.001)]
)
def test_a_unit_is_part_of_the_configuration_and_its_default_is_not(key: str, value: Any) -> None:
    default = CacheSpec.model_fields[key].default
    assert CacheSpec(**{key: default}).fingerprint("0" * 16) == "1ed2a0704c412d32"  # as test_pinned has it
    assert CacheSpec(**{key: value}).fingerprint("0" * 16) != "1ed2a0704c412d32"
    assert key not in CacheSpec().to_json()


def test_a_changed_unit_is_a_changed_configuration(robot: Robot, run_here: Callable[..., Outcome]) -> None:
    robot.add("t1")
    assert run_here(robot.config).code == 0
    robot.configure(yaw_unit="degrees")
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert "yaw_unit: radians -> degrees" in outcome.err


def test_times_are_scaled_only_where_there_are_times(robot: Robot, run_here: Callable[..., Outcome]) -> None:
    robot.add("t1")
    config = robot.config.read_text().replace("data_folder:", "time_scale: 0.001\n    data_folder:")
    robot.config.write_text(config)
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert "time_scale: 0.001: does not apply to format: gnm" in outcome.err


@pytest.mark.parametrize("pose_axes", ["camera", "y_up"])
def test_axes_with_another_height_need_three_coordinates(
    robot: Robot, run_here: Callable[..., Outcome], pose_axes: str
) -> None:
    robot.add("t1")
    robot.configure(pose_axes=pose_axes)
    outcome = run_here(robot.config)
    assert outcome.code == 1
    assert f"position is (20, 2), expected (T, 3), as pose_axes: {pose_axes} has it" in outcome.err


@pytest.mark.parametrize(
    ("key", "settings", "remedy"),
    [
        ("heading_deg", {}, "set yaw_unit: degrees or compass_degrees"),
        ("yaw (degrees)", {}, "set yaw_unit: degrees or compass_degrees"),
        ("base.yaw_rad", {"yaw_unit": "degrees"}, "set yaw_unit: radians"),
        ("heading_deg", {"yaw_unit": "compass_degrees"}, None),
        ("yaw_rad", {}, None),
        ("degree_of_yaw", {}, None),
    ],
)
def test_a_name_that_tells_of_another_unit_is_refused(key: str, settings: dict[str, Any], remedy: str | None) -> None:
    keys = data_keys(CacheSpec(**settings))
    data = {"position": PATH, key: TURN}
    if remedy is None:
        assert checked_poses("t1", data, keys, "position", key).yaw is not None
        return
    with pytest.raises(InputError) as error:
        checked_poses("t1", data, keys, "position", key)
    assert remedy in str(error.value)
    assert key in str(error.value)


def test_positions_named_in_centimetres_are_refused_until_a_scale_is_set() -> None:
    data = {"position_cm": PATH * 100}
    with pytest.raises(InputError, match=r"position_cm is in cm by its name.*set position_scale: 0\.01"):
        checked_poses("t1", data, data_keys(CacheSpec()), "position_cm", None)
    checked_poses("t1", data, data_keys(CacheSpec(position_scale=0.0101)), "position_cm", None)  # calibrated


# ---------------------------------------------------------------------------------------------------------------------
# A trajectory that does not move enough, or has no poses: the reason is what was found
# ---------------------------------------------------------------------------------------------------------------------


def reason(robot: Robot) -> str:
    """Of the one failed trajectory."""
    (failure,) = read_progress(robot.cache)["failures"].values()
    return failure["reason"]


def test_pose_jumps_are_named_where_they_leave_no_piece(robot: Robot, run_here: Callable[..., Outcome]) -> None:
    """Millimetres taken for metres: every step is a jump."""
    make_trajectory(robot.data / "t1", COUNT, position=straight_line(COUNT, 250.0))
    robot.configure()
    assert run_here(robot.config).code == 1
    assert "19 steps are longer than max_chunk_distance_m 2.0" in reason(robot)
    assert "250 m at the median" in reason(robot)
    assert "the longest piece between them travels 0 m" in reason(robot)
    assert "position_scale" in reason(robot)
    assert "in all" not in reason(robot)


def test_the_longest_piece_between_jumps_is_named(robot: Robot, run_here: Callable[..., Outcome]) -> None:
    position = straight_line(6, 0.05)
    position[2:, 0] += 100  # pieces of 0.05 m and 0.15 m
    make_trajectory(robot.data / "t1", 6, position=position)
    robot.configure()
    assert run_here(robot.config).code == 1
    assert "1 steps are longer" in reason(robot)
    assert "travels 0.15 m, less than min_chunk_distance_m 0.3" in reason(robot)


@pytest.mark.parametrize("position", [np.zeros((0, 2)), np.zeros((0, 3))])
def test_a_file_without_poses_says_so(robot: Robot, run_here: Callable[..., Outcome], position: np.ndarray) -> None:
    robot.add("t1")
    write_poses(robot.data / "t1", position, np.zeros(0))
    assert run_here(robot.config).code == 1
    assert "holds no poses" in reason(robot)
    assert "too many" not in reason(robot)


# ---------------------------------------------------------------------------------------------------------------------
# Pose files as others write them
# ---------------------------------------------------------------------------------------------------------------------


def python2_pickle(protocol: int) -> bytes:
    """{'position': PATH, 'yaw': TURN, 'gr\\xf6\\xdfe': 'x'} as Python 2.7 and numpy 1.16 write it: texts are bytes."""
    arrays = []
    for array in (PATH, TURN):
        shape = b"".join(b"I%d\n" % size for size in array.shape)
        state = b"(I1\n(" + shape + b"tcnumpy\ndtype\n(" + text(b"f8", protocol) + b"I0\nI1\ntR(I3\n"
        state += text(b"<", protocol) + b"NNNI-1\nI-1\nI0\ntbI00\n" + text(array.tobytes(), protocol) + b"tb"
        new = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\nt" + text(b"b", protocol) + b"tR"
        arrays.append(new + state)
    pairs = [(b"position", arrays[0]), (b"yaw", arrays[1]), (b"gr\xf6\xdfe", text(b"x", protocol))]
    items = b"".join(text(key, protocol) + value + b"s" for key, value in pairs)
    return (b"" if protocol == 0 else b"\x80" + bytes([protocol])) + b"(d" + items + b"."


def text(value: bytes, protocol: int) -> bytes:
    """Python 2's str: a line in quotes, or a length and bytes."""
    if protocol == 0:
        return b"S" + repr(value)[1:].encode() + b"\n"
    return b"T" + len(value).to_bytes(4, "little") + value


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_a_pickle_of_python_2_is_read(robot: Robot, run_here: Callable[..., Outcome], protocol: int) -> None:
    data = python2_pickle(protocol)
    loaded = pickle.loads(data, encoding="latin1")  # as numpy itself reads it
    np.testing.assert_array_equal(loaded["position"], PATH)
    make_trajectory(robot.data / "t1", COUNT, stamp=1)
    (robot.data / "t1" / "traj_data.pkl").write_bytes(data)
    robot.configure(max_chunk_distance_m=50.0)
    outcome = run_here(robot.config)
    assert outcome.code == 0, outcome.err
    _, datasets = read_chunk(robot.cache / "t1" / "chunk_00000.h5")
    np.testing.assert_array_equal(datasets["position"], PATH)
    np.testing.assert_array_equal(datasets["yaw"], TURN)


def test_one_text_for_many_arrays_is_refused_before_it_fills_the_memory(
    robot: Robot, run_here: Callable[..., Outcome]
) -> None:
    """A text of 80 kB that a thousand arrays name would become 80 MB."""
    head = b"\x80\x02(d" + text(b"position", 2) + b"]q\x01("
    number_type = b"cnumpy\ndtype\n(" + text(b"f8", 2) + b"tRq\x02"
    first = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b", 2) + b"tR"
    body = first + b"(K\x01(M\x10\x27t" + number_type + b"I00\n" + text(bytes(80_000), 2) + b"q\x03tb"
    again = first + b"(K\x01(M\x10\x27th\x02I00\nh\x03tb"
    robot.add("t1")
    (robot.data / "t1" / "traj_data.pkl").write_bytes(head + body + again * 1000 + b"es.")
    assert run_here(robot.config).code == 1
    assert "more text than it holds" in reason(robot)


@pytest.mark.parametrize("name", ["TRAJ_DATA.PKL", "traj_data.PKL", "Traj_Data.pkl"])
def test_a_pose_file_in_capitals_is_read(robot: Robot, run_here: Callable[..., Outcome], name: str) -> None:
    robot.add("t1")
    (robot.data / "t1" / "traj_data.pkl").rename(robot.data / "t1" / name)
    outcome = run_here(robot.config)
    assert outcome.code == 0, outcome.err
    assert "format gnm" in outcome.out + outcome.err
    robot.check("t1")


def test_a_pose_file_in_small_letters_comes_first(robot: Robot, run_here: Callable[..., Outcome]) -> None:
    robot.add("t1")
    (robot.data / "t1" / "TRAJ_DATA.PKL").write_bytes(b"not poses")
    assert run_here(robot.config).code == 0
    robot.check("t1")


def test_what_torch_saves_is_refused_with_what_it_is(robot: Robot, run_here: Callable[..., Outcome]) -> None:
    torch = pytest.importorskip("torch")
    robot.add("t1")
    torch.save({"position": torch.tensor(PATH), "yaw": torch.tensor(TURN)}, robot.data / "t1" / "traj_data.pkl")
    assert run_here(robot.config).code == 1
    assert "it is a zip archive, as torch.save writes" in reason(robot)
    assert "codec" not in reason(robot)
