"""Bags: the same cache as the folder that they were written from, whatever holds them; and what is told or refused."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bags_support import (
    CAMERA,
    FPS,
    KINDS,
    ODOM,
    START_NS,
    Event,
    compressed,
    drive,
    drive_of,
    odometry,
    stamps,
    tf,
    twist,
    write,
    write_ros1,
    write_ros2,
    write_split,
)
from formats_support import chunks

from dino_cache import CacheSpec, DataKeys, InputError, detect_format
from dino_cache_extras.formats.bag_poses import Times
from dino_cache_extras.formats.bags import open_bag
from dino_cache_extras.formats.rosbag import (
    RosbagSource,
    find_bags,
    locate_bag,
    nearest_rows,
    numbers_at_frames,
    pair_cameras,
)
from support import FIRST, REAL, SECOND, Outcome, Rendered, encoded, read_progress, render, write_gnm

BAGS = REAL.parent / "bags"
needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real recordings are not in {REAL}")
needs_bags = pytest.mark.skipif(not BAGS.is_dir(), reason=f"the real bags are not in {BAGS}")
BOTH = f"images from {CAMERA} and poses from {ODOM}"


def source_of(path: Path, **settings: Any) -> RosbagSource:
    name = path.name.partition(".")[0]
    return RosbagSource(locate_bag(path.parent, name), DataKeys(**settings))


def reason(path: Path, *, required: bool = True, **settings: Any) -> str:
    with pytest.raises(InputError) as raised:
        source_of(path, **settings).poses(required=required)
    return str(raised.value)


def notes(path: Path, **settings: Any) -> dict[str, str]:
    return dict(source_of(path, **settings).poses(required=True).notes)


def assert_same_chunks(found: list, expected: list) -> None:
    assert [span for span, _ in found] == [span for span, _ in expected]
    for (_, datasets), (_, of_folder) in zip(found, expected):
        assert datasets.keys() == {*of_folder, "timestamp"}
        for name in ("cls_token", "frame_index"):
            np.testing.assert_array_equal(datasets[name], of_folder[name])
        for name in ("position", "travelled_distance"):
            np.testing.assert_allclose(datasets[name], of_folder[name], rtol=0, atol=1e-9)
        np.testing.assert_allclose(np.exp(1j * datasets["yaw"]), np.exp(1j * of_folder["yaw"]), rtol=0, atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Whatever holds them
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_is_that_of_the_folder(run_bits: Callable[..., Outcome], tmp_path: Path, kind: str) -> None:
    for trajectory in (FIRST, SECOND):
        write(kind, tmp_path / "data/deep", f"t{trajectory.stamp}", drive_of(trajectory))
    outcome = run_bits()
    assert outcome.code == 0, outcome.err
    assert (
        f"2 bags are read by topics of which each has only one: {CAMERA} and {ODOM}: deep/t1"
        in outcome.out + outcome.err
    )
    write_gnm(tmp_path / "folders", [FIRST, SECOND])
    assert run_bits({"data_folder": str(tmp_path / "folders"), "cache_dir": str(tmp_path / "of_folders")}).code == 0
    for trajectory in (FIRST, SECOND):
        name = f"t{trajectory.stamp}"
        assert_same_chunks(chunks(tmp_path / "cache", f"deep/{name}"), chunks(tmp_path / "of_folders", name))
    assert run_bits().code == 0
    assert "Redoing" not in run_bits().err


@pytest.mark.slow
@pytest.mark.real_readers
@pytest.mark.parametrize("kind", ["bag lz4", "rosbag2 sqlite3, packed file", "mcap of ROS2"])
def test_bags_are_read_in_reader_processes(run_bits: Callable[..., Outcome], tmp_path: Path, kind: str) -> None:
    write(kind, tmp_path / "data", "t1", drive_of(FIRST))
    assert run_bits().code == 0
    index = np.concatenate([datasets["frame_index"] for _, datasets in chunks(tmp_path / "cache", "t1")])
    assert sorted(set(index.tolist())) == list(range(FIRST.count))


@pytest.mark.parametrize("frame_stride", [1, 3])
@pytest.mark.parametrize("kind", ["bag", "bag bz2", "rosbag2 sqlite3, split", "mcap of ROS2"])
def test_each_row_is_its_frames_also_after_a_resume(
    run_bits: Callable[..., Outcome], tmp_path: Path, kind: str, frame_stride: int
) -> None:
    long = Rendered(5, 90)
    write(kind, tmp_path / "data", "t5", drive_of(long))
    write(kind, tmp_path / "data", "t2", drive_of(SECOND))
    assert run_bits({"frame_stride": frame_stride}, "--limit", "1").code == 5
    assert run_bits({"frame_stride": frame_stride}).code == 0
    for trajectory in (long, SECOND):
        read = chunks(tmp_path / "cache", f"t{trajectory.stamp}")
        assert len(read) > 1
        for (start, stop), datasets in read:
            index = datasets["frame_index"]
            np.testing.assert_array_equal(index, np.arange(start, stop) * frame_stride)
            tokens = datasets["cls_token"].astype(int)
            np.testing.assert_array_equal(tokens[:, 0], trajectory.stamp)
            np.testing.assert_array_equal(tokens[:, 1] * 256 + tokens[:, 2], index)
            np.testing.assert_allclose(datasets["position"], trajectory.position[index], atol=1e-9)


def test_frames_are_sampled_by_time(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write("bag", tmp_path / "data", "t1", drive_of(FIRST))
    assert run_bits({"sample_hz": 4.0, "max_chunk_distance_m": 50.0}).code == 0
    ((_, datasets),) = chunks(tmp_path / "cache", "t1")
    expected = [0, 3, 5, 8, 10, 13, 15, 18, 20, 23, 25, 28, 30, 33, 35, 38]  # first at or after each quarter second
    assert datasets["frame_index"].tolist() == expected


@needs_real
@pytest.mark.parametrize(
    "kind", ["bag", "rosbag2 sqlite3, split", "rosbag2 mcap, packed chunks", "mcap of ROS1", "mcap of ROS2"]
)
def test_a_real_trajectory_is_that_of_its_folder(run_bits: Callable[..., Outcome], tmp_path: Path, kind: str) -> None:
    folders = {"gopro_max_walk": "walk_5hz", "hololens_walk": "walk_i120_240_s2"}
    for dataset, name in folders.items():
        folder = REAL / dataset / name
        poses = pickle.loads((folder / "traj_data.pkl").read_bytes())
        files = [(folder / f"{number}.jpg").read_bytes() for number in range(len(poses["position"]))]
        write(kind, tmp_path / "data", name, drive(files, poses["position"], poses["yaw"].reshape(-1), 5))
        source, expected = source_of(next((tmp_path / "data").glob(f"{name}*"))), poses["position"][:, :2]
        found = source.poses(required=True)
        assert found.frame_index.tolist() == list(range(len(files)))
        np.testing.assert_allclose(found.position, expected, rtol=0, atol=1e-9)
        read = [frame.tobytes() for frame in source.open_frames(found.frame_index).read(found.frame_index)]
        assert read == files
        (tmp_path / "folders").mkdir(exist_ok=True)
        (tmp_path / "folders" / name).symlink_to(folder)
    assert run_bits().code == 0
    assert run_bits({"data_folder": str(tmp_path / "folders"), "cache_dir": str(tmp_path / "of_folders")}).code == 0
    for name in folders.values():
        assert_same_chunks(chunks(tmp_path / "cache", name), chunks(tmp_path / "of_folders", name))


# ---------------------------------------------------------------------------------------------------------------------
# Which bags there are
# ---------------------------------------------------------------------------------------------------------------------


def test_bags_lie_at_any_depth_and_parts_are_none_of_their_own(tmp_path: Path) -> None:
    events = drive_of(SECOND)
    write("bag", tmp_path / "a/b", "one", events)
    write("mcap of ROS2", tmp_path, "two", events)
    write("rosbag2 sqlite3, split", tmp_path / "a", "three", events)
    write("rosbag2 mcap", tmp_path, "four", events)
    (tmp_path / "a/.hidden.bag").write_bytes(b"")
    (tmp_path / "a/metadata.yaml").write_text("of something else: 1\n")
    names = {found.name: found for found in find_bags(tmp_path, CacheSpec())}
    assert sorted(names) == ["a/b/one", "a/three", "four", "two"]
    assert all(locate_bag(tmp_path, name) == found for name, found in names.items())
    with pytest.raises(InputError, match="has no bag five"):
        locate_bag(tmp_path, "five")


@pytest.mark.parametrize(("kind", "sign"), [
    ("bag", "t1.bag"), ("mcap of ROS1", "t1.mcap"), ("rosbag2 mcap", "t1/metadata.yaml"),
])  # fmt: skip
def test_a_format_is_known_by_its_bags(tmp_path: Path, kind: str, sign: str) -> None:
    write(kind, tmp_path, "t1", drive_of(SECOND))
    assert detect_format(tmp_path, DataKeys()) == ("rosbag", sign)


def test_a_data_folder_that_is_a_bag_is_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_ros2(tmp_path / "data", drive_of(SECOND))
    outcome = run_bits()
    assert outcome.code == 2
    assert "is itself a bag (it holds metadata.yaml)" in outcome.err


def test_a_recording_that_was_cut_fails_with_that_reason(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write("bag", tmp_path / "data", "whole", drive_of(FIRST))
    shutil.copy(tmp_path / "data/whole.bag", tmp_path / "data/cut.bag.active")
    shutil.copy(tmp_path / "data/whole.bag", tmp_path / "data/whole.bag.active")  # beside what was made of it
    write_ros2(tmp_path / "data/folder", drive_of(FIRST))
    (tmp_path / "data/folder/metadata.yaml").unlink()
    assert run_bits().code == 1
    failures = read_progress(tmp_path / "cache")["failures"]
    assert sorted(failures) == ["cut", "folder/folder"]
    assert "its recording was cut; rosbag reindex mends it" in failures["cut"]["reason"]
    assert "no metadata.yaml of rosbag2 beside it" in failures["folder/folder"]["reason"]


# ---------------------------------------------------------------------------------------------------------------------
# Topics
# ---------------------------------------------------------------------------------------------------------------------


def two_of_each(trajectory: Rendered = SECOND) -> list[Event]:
    other = Rendered(9, trajectory.count)
    more = [event._replace(topic=f"/other{event.topic}") for event in drive_of(other) if "secret" not in event.topic]
    return sorted([*drive_of(trajectory), *more], key=lambda event: event.log_ns)


def test_what_is_not_clear_is_refused_with_the_topics_that_there_are(tmp_path: Path) -> None:
    write_ros1(tmp_path / "t.bag", two_of_each())
    said = reason(tmp_path / "t.bag")
    assert "2 topics hold CompressedImage or Image; set image_key" in said
    assert f"/other{CAMERA} (sensor_msgs/CompressedImage, 27 messages, " in said
    assert "/secret (my_robot/Secret, 1 messages)" in said
    said = reason(tmp_path / "t.bag", image_key=CAMERA)
    assert "2 topics hold Odometry or PoseStamped or" in said
    assert "set position_key, or tf" in said
    poses = source_of(tmp_path / "t.bag", image_key=CAMERA, position_key=f"/other{ODOM}").poses(required=True)
    assert (len(poses.position), poses.notes) == (27, ())


def test_a_bag_without_the_topic_fails_alone(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write("bag", tmp_path / "data", "two", two_of_each())
    write("bag", tmp_path / "data", "one", drive_of(FIRST))
    assert run_bits({"image_key": f"/other{CAMERA}", "position_key": ODOM}).code == 1
    progress = read_progress(tmp_path / "cache")
    assert progress["completed_trajectories"] == ["two"]
    said = progress["failures"]["one"]["reason"]
    assert f"image_key: it has no topic /other{CAMERA}. Its topics are {CAMERA} (" in said


@pytest.mark.parametrize(
    ("setting", "topic"), [("image_key", ODOM), ("position_key", CAMERA), ("image_key", "/secret")]
)
def test_a_topic_of_another_type_is_refused(tmp_path: Path, setting: str, topic: str) -> None:
    write_ros1(tmp_path / "t.bag", drive_of(SECOND))
    said = reason(tmp_path / "t.bag", **{setting: topic})
    assert f"{setting}: {topic} holds" in said and "expected" in said and "Its topics are" in said


def test_images_without_poses_are_for_chunks_by_frames(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write("bag", tmp_path / "data", "t2", [event for event in drive_of(SECOND) if event.topic == CAMERA])
    assert "0 topics hold Odometry" in reason(tmp_path / "data/t2.bag")
    assert run_bits({"chunk_by": "frames", "max_chunk_frames": 10, "overlap_frames": 2}).code == 0
    read = chunks(tmp_path / "cache", "t2")
    assert [span for span, _ in read] == [(0, 10), (8, 18), (16, 26), (24, 27)]
    assert {*read[0][1]} == {"cls_token", "frame_index", "timestamp"}


@pytest.mark.parametrize("kind", ["PoseStamped", "PoseWithCovarianceStamped", "TransformStamped"])
@pytest.mark.parametrize("writer", [write_ros1, write_ros2])
def test_poses_of_other_types(tmp_path: Path, kind: str, writer: Callable) -> None:
    events = [event for event in drive_of(FIRST) if event.topic == CAMERA]
    for stamp, (x, y), yaw in zip(stamps(FIRST.count), FIRST.position, FIRST.yaw):
        events.append(odometry(stamp, x, y, yaw, kind=kind, topic="/pose"))
    path = tmp_path / ("t.bag" if writer is write_ros1 else "t")
    writer(path, sorted(events, key=lambda event: event.log_ns))
    poses = source_of(path).poses(required=True)
    np.testing.assert_allclose(poses.position, FIRST.position, atol=1e-12)
    np.testing.assert_allclose(poses.yaw, FIRST.yaw, atol=1e-12)
    assert poses.height == pytest.approx([0.3] * 40) or poses.height is None


def test_poses_of_two_frames_of_reference_do_not_go_together(tmp_path: Path) -> None:
    events = drive_of(SECOND)
    events[21] = odometry(stamps(27)[10], 2.5, 0, 0.2, frame="map")
    write_ros1(tmp_path / "t.bag", events)
    assert "poses are of several frames: odom -> base_link, and map -> base_link from message 10 on" in reason(
        tmp_path / "t.bag"
    )


def test_settings_of_other_formats_are_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write("bag", tmp_path / "data", "t1", drive_of(FIRST))
    for setting, value in (("yaw_key", "yaw"), ("time_scale", 0.001)):
        outcome = run_bits({setting: value})
        assert (outcome.code, "does not apply to format: rosbag" in outcome.err) == (2, True)
    outcome = run_bits({"tf": "map->base_link", "position_key": ODOM})
    assert (outcome.code, "both say where poses are" in outcome.err) == (2, True)
    outcome = run_bits({"tf": "base_link"})
    assert (outcome.code, "tf" in outcome.err) == (2, True)


# ---------------------------------------------------------------------------------------------------------------------
# Transforms
# ---------------------------------------------------------------------------------------------------------------------


def driven_by_transforms(trajectory: Rendered) -> list[Event]:
    """The trajectory as map -> odom -> base_link -> camera_link; odom lies at (1, 2), a quarter turn to the left, and
    the camera half a metre ahead of the base, looking to the left."""
    events = [tf(START_NS - 10**9, "base_link", "camera_link", 0.5, 0, np.pi / 2, static=True)]
    for number, (x, y), yaw in zip(range(trajectory.count), trajectory.position, trajectory.yaw):
        stamp = stamps(trajectory.count)[number]
        back = (y - 2, -(x - 1))  # of map's coordinates in odom
        events.append(tf(stamp, "odom", "base_link", *back, yaw - np.pi / 2))
        if number % 3 == 0 or number == trajectory.count - 1:
            events.append(tf(stamp, "/map", "odom", 1, 2, np.pi / 2))
        events.append(compressed(stamp, encoded(render(trajectory.stamp, number)), stamp + 1))
    return events


@pytest.mark.parametrize("writer", [write_ros1, write_ros2])
def test_poses_through_transforms(tmp_path: Path, writer: Callable) -> None:
    path = tmp_path / ("t.bag" if writer is write_ros1 else "t")
    writer(path, driven_by_transforms(FIRST))
    poses = source_of(path, tf="map->base_link").poses(required=True)
    np.testing.assert_allclose(poses.position, FIRST.position, atol=1e-9)
    np.testing.assert_allclose(poses.yaw, FIRST.yaw, atol=1e-9)
    camera = source_of(path, tf="map -> camera_link").poses(required=True)
    ahead = 0.5 * np.stack([np.cos(FIRST.yaw), np.sin(FIRST.yaw)], axis=1)
    np.testing.assert_allclose(camera.position, FIRST.position + ahead, atol=1e-9)
    np.testing.assert_allclose(camera.yaw, FIRST.yaw + np.pi / 2, atol=1e-9)
    back = source_of(path, tf="camera_link->base_link")  # against the arrows, and fixed
    with pytest.raises(InputError, match="none of the transforms on the way moves"):
        back.poses(required=True)
    inverse = source_of(path, tf="base_link->map").poses(required=True)
    turn = -FIRST.yaw
    expected = -np.stack([
        np.cos(turn) * FIRST.position[:, 0] - np.sin(turn) * FIRST.position[:, 1],
        np.sin(turn) * FIRST.position[:, 0] + np.cos(turn) * FIRST.position[:, 1],
    ], axis=1)  # fmt: skip
    np.testing.assert_allclose(inverse.position, expected, atol=1e-9)


def test_transforms_that_lead_nowhere_or_two_ways_are_refused(tmp_path: Path) -> None:
    events = driven_by_transforms(SECOND)
    write_ros1(tmp_path / "t.bag", events)
    said = reason(tmp_path / "t.bag", tf="world->base_link")
    assert "no transforms lead from one to the other; its frames are base_link, camera_link, map, odom" in said
    write_ros1(tmp_path / "u.bag", [*events, tf(stamps(27)[-1] + 10, "world", "base_link", 0, 0, 0)])
    assert "base_link is told in two ways: odom -> base_link and world -> base_link" in reason(
        tmp_path / "u.bag", tf="map->base_link"
    )
    write_ros1(tmp_path / "v.bag", [*events, tf(stamps(27)[-1] + 10, "base_link", "map", 0, 0, 0)])
    assert "go in a circle" in reason(tmp_path / "v.bag", tf="map->base_link")
    write_ros1(tmp_path / "w.bag", drive_of(SECOND))
    assert "it has no /tf. Its topics are" in reason(tmp_path / "w.bag", tf="map->base_link")


def test_a_transform_that_pauses_cuts_the_trajectory(tmp_path: Path) -> None:
    paused = range(stamps(40)[10] + 1, stamps(40)[25])
    events = [event for event in driven_by_transforms(FIRST) if event.topic != "/tf" or event.log_ns not in paused]
    write_ros1(tmp_path / "t.bag", events)
    poses = source_of(tmp_path / "t.bag", tf="odom->base_link").poses(required=True)
    assert poses.frame_index.tolist() == [*range(11), *range(25, 40)]
    assert (poses.breaks.tolist(), poses.num_without) == ([11], 14)


def test_one_of_two_transforms_that_pauses_cuts_too(tmp_path: Path) -> None:
    """map -> odom has times at frames 9 and 27 and none between, while odom -> base_link goes on."""
    paused = range(stamps(40)[10], stamps(40)[26])
    events, number_of_map = [], 0
    for event in driven_by_transforms(FIRST):
        is_map = event.topic == "/tf" and events and events[-1].topic == "/tf"  # the second one of a frame
        number_of_map += is_map
        if not (is_map and event.log_ns in paused):
            events.append(event)
    assert number_of_map == 14
    write_ros1(tmp_path / "t.bag", events)
    poses = source_of(tmp_path / "t.bag", tf="map->base_link").poses(required=True)
    kept = [*range(10), *range(27, 40)]
    assert (poses.frame_index.tolist(), poses.breaks.tolist(), poses.num_without) == (kept, [10], 17)
    np.testing.assert_allclose(poses.position, FIRST.position[kept], atol=1e-9)


# ---------------------------------------------------------------------------------------------------------------------
# Times
# ---------------------------------------------------------------------------------------------------------------------


def test_messages_are_brought_into_the_order_of_their_stamps(tmp_path: Path) -> None:
    rng, events = np.random.default_rng(1), drive_of(FIRST)
    for name, order in (
        ("far", rng.permutation(len(events)).tolist()),
        ("near", np.argsort(np.arange(len(events)) + rng.uniform(0, 8, len(events))).tolist()),
    ):
        shuffled = [events[place] for place in order]
        write_ros1(tmp_path / f"{name}.bag", shuffled)
        by_arrival = [event._replace(log_ns=START_NS + 1000 * place) for place, event in enumerate(shuffled)]
        write_ros2(tmp_path / f"{name}_arrived", by_arrival)
        for path in (tmp_path / f"{name}.bag", tmp_path / f"{name}_arrived"):
            source = source_of(path)
            poses = source.poses(required=True)
            np.testing.assert_allclose(poses.position, FIRST.position, atol=1e-9)
            frames = source.open_frames(poses.frame_index).read(poses.frame_index)
            assert [frame.tobytes() for frame in frames] == FIRST.jpegs
            np.testing.assert_allclose(poses.times, np.arange(40) / FPS, atol=1e-9)


def test_equal_stamps_are_refused(tmp_path: Path) -> None:
    events = drive_of(SECOND)
    images = [place for place, event in enumerate(events) if event.topic == CAMERA]
    events[images[7]] = compressed(stamps(27)[6], SECOND.jpegs[7], events[images[7]].log_ns)
    write_ros1(tmp_path / "images.bag", events)
    assert f"{CAMERA}: messages 6 and 7 have the same time" in reason(tmp_path / "images.bag")
    events = drive_of(SECOND)
    events[13] = odometry(stamps(27)[5], 77, 0, 0, events[13].log_ns)  # pose 6, as if it were pose 5
    write_ros1(tmp_path / "poses.bag", events)
    assert f"{ODOM}: messages 5 and 6 have the same time" in reason(tmp_path / "poses.bag")
    events = drive_of(SECOND)
    events.insert(13, events[11])  # pose 5 once more, word by word
    write_ros1(tmp_path / "again.bag", events)
    assert len(source_of(tmp_path / "again.bag").poses(required=True).position) == 27


@pytest.mark.parametrize(("step_s", "with_log", "said"), [
    (-3.0, False, "its clock steps back by 2.900 s at message 20"),
    (-3.0, True, "its clock steps back by 2.900 s at message 20"),
    (600.0, False, "its clock jumps ahead by 600.000 s at message 20, against the times"),
])  # fmt: skip
@pytest.mark.parametrize("topic", [CAMERA, ODOM])
def test_a_clock_that_steps_fails_its_bag(tmp_path: Path, topic: str, step_s: float, with_log: bool, said: str) -> None:
    events = []
    for number, stamp in enumerate(stamps(40)):
        for kind, make in ((CAMERA, compressed), (ODOM, odometry)):
            moved = stamp + (round(step_s * 1e9) if number >= 20 and kind == topic else 0)
            values = (FIRST.jpegs[number],) if kind == CAMERA else (*FIRST.position[number], FIRST.yaw[number])
            events.append(make(moved, *values, moved if with_log else stamp))
    write_ros1(tmp_path / "t.bag", events)
    found = reason(tmp_path / "t.bag")
    assert f"{topic}: {said}" in found
    if not with_log:
        assert "stamps: log takes" in found
        assert len(source_of(tmp_path / "t.bag", stamps="log").poses(required=True).position) == 40


def test_a_recording_that_paused_is_cut_there(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    events = []
    for number, stamp in enumerate(stamps(40)):
        moved = stamp + (600 * 10**9 if number >= 20 else 0)
        events += [odometry(moved, *FIRST.position[number], FIRST.yaw[number]), compressed(moved, FIRST.jpegs[number])]
    write("bag", tmp_path / "data", "t1", events)
    assert run_bits({"max_chunk_distance_m": 50.0}).code == 0
    assert [span for span, _ in chunks(tmp_path / "cache", "t1")] == [(0, 20), (20, 40)]


def test_stamps_or_the_logs_times(tmp_path: Path) -> None:
    """Images are stamped 0.2 s later than they are recorded: two frames."""
    events = []
    for number, stamp in enumerate(stamps(40)):
        events += [odometry(stamp, *FIRST.position[number], FIRST.yaw[number]),
                   compressed(stamp + 200_000_000, FIRST.jpegs[number], stamp)]  # fmt: skip
    write_ros1(tmp_path / "t.bag", events)
    by_stamp = source_of(tmp_path / "t.bag").poses(required=True)
    np.testing.assert_allclose(by_stamp.position, FIRST.position[2:], atol=1e-9)
    assert (by_stamp.frame_index[[0, -1]].tolist(), by_stamp.num_without) == ([0, 37], 2)
    by_log = source_of(tmp_path / "t.bag", stamps="log").poses(required=True)
    np.testing.assert_allclose(by_log.position, FIRST.position, atol=1e-9)


def test_a_bag_without_stamps_is_read_by_the_logs_times_and_that_is_told(tmp_path: Path) -> None:
    events = []
    for number, stamp in enumerate(stamps(27)):
        events += [odometry(stamp, *SECOND.position[number], 0), compressed(0, SECOND.jpegs[number], stamp)]
    write_ros2(tmp_path / "t", events)
    poses = source_of(tmp_path / "t").poses(required=True)
    np.testing.assert_allclose(poses.position, SECOND.position, atol=1e-9)
    told = [note for note in poses.notes if "no stamps in their headers" in note.what]
    assert [note.detail for note in told] == [CAMERA]
    events[20] = odometry(0, 5, 5, 0, stamps(27)[10])
    events = [event if event.topic == ODOM else compressed(event.log_ns, SECOND.jpegs[0]) for event in events]
    write_ros1(tmp_path / "u.bag", events)
    assert f"{ODOM}: 1 of 27 messages have the stamp 0, the first is message 10" in reason(tmp_path / "u.bag")


def test_stamps_of_two_clocks_are_told(tmp_path: Path) -> None:
    events = []
    for number, stamp in enumerate(stamps(40)):
        events += [odometry(stamp, *FIRST.position[number], 0),
                   compressed(stamp + 10**9, FIRST.jpegs[number], stamp)]  # fmt: skip
    write_ros1(tmp_path / "near.bag", events)
    (told,) = [detail for what, detail in notes(tmp_path / "near.bag").items() if "of two clocks" in what]
    assert told == "-1.00 and 0.00 s, at the median"
    events = [
        compressed(event.log_ns - 10**15, b"\xff\xd8", event.log_ns) if event.topic == CAMERA else event
        for event in events
    ]
    write_ros1(tmp_path / "far.bag", events)
    said = reason(tmp_path / "far.bag")
    assert "no frame lies between two poses" in said and "if header stamps are of two clocks, set stamps: log" in said


def test_a_topic_that_stops(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    half = stamps(40)[20]
    write("bag", tmp_path / "data", "poses", [e for e in drive_of(FIRST) if e.topic != ODOM or e.log_ns < half])
    write("bag", tmp_path / "data", "images", [e for e in drive_of(FIRST) if e.topic != CAMERA or e.log_ns < half])
    outcome = run_bits({"max_chunk_distance_m": 50.0})
    assert outcome.code == 0
    assert (
        "frames that do not lie between two poses near enough in time, which are left out: poses (20 of 40)"
        in outcome.err
    )
    for name in ("poses", "images"):
        ((span, datasets),) = chunks(tmp_path / "cache", name)
        assert span == (0, 20)
        np.testing.assert_allclose(datasets["position"], FIRST.position[:20], atol=1e-9)
    long = [odometry(stamp, number, 0, 0) for number, stamp in enumerate(stamps(400))]
    images = [compressed(stamp, SECOND.jpegs[number]) for number, stamp in enumerate(stamps(27))]
    write_ros1(tmp_path / "long.bag", sorted(long + images, key=lambda event: event.log_ns))
    assert notes(tmp_path / "long.bag")["bags have poses long before the first image or after the last"] == "37 s"


# ---------------------------------------------------------------------------------------------------------------------
# Changed data
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checksum", ["stat", "content"])
@pytest.mark.parametrize("kind", ["bag", "rosbag2 sqlite3", "mcap of ROS2"])
def test_another_bag_of_that_name_is_redone(
    run_bits: Callable[..., Outcome], tmp_path: Path, kind: str, checksum: str
) -> None:
    path = write(kind, tmp_path / "data", "t1", drive_of(FIRST))
    assert run_bits(checksum=checksum).code == 0
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    write(kind, tmp_path / "data", "t1", drive_of(SECOND))
    outcome = run_bits(checksum=checksum)
    assert outcome.code == 0
    assert "Redoing t1" in outcome.err
    assert chunks(tmp_path / "cache", "t1")[-1][0][1] == SECOND.count


def test_a_part_that_comes_later_is_noticed(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write_split(tmp_path / "data/t1", drive_of(FIRST))
    part = tmp_path / "data/t1/t1_1.db3"
    part.rename(tmp_path / "away")
    assert run_bits().code == 1
    assert "1 of its 2 parts are missing: t1_1.db3" in read_progress(tmp_path / "cache")["failures"]["t1"]["reason"]
    (tmp_path / "away").rename(part)
    assert run_bits().code == 0


# ---------------------------------------------------------------------------------------------------------------------
# Several cameras, and numbers that come along
# ---------------------------------------------------------------------------------------------------------------------


def test_other_cameras_give_the_image_nearest_in_time(tmp_path: Path) -> None:
    left, events = Rendered(7, 40), drive_of(FIRST)
    for number, stamp in enumerate(stamps(40)):
        if number not in (5, 6):
            late = 60_000_000 if number == 9 else 30_000_000  # half a period is 50 ms
            events.append(compressed(stamp + late, left.jpegs[number], topic="/left"))
    write_ros1(tmp_path / "t.bag", sorted(events, key=lambda event: event.log_ns))
    source = source_of(tmp_path / "t.bag", image_key=(("front", CAMERA), ("left", "/left")))
    poses = source.poses(required=True)
    kept = [number for number in range(40) if number not in (5, 6, 9)]
    assert poses.frame_index.tolist() == kept
    np.testing.assert_allclose(poses.position, FIRST.position[kept], atol=1e-9)
    for camera, trajectory in ((None, FIRST), ("front", FIRST), ("left", left)):
        frames = source.open_frames(kept, camera).read(kept)
        assert [frame.tobytes() for frame in frames] == [trajectory.jpegs[number] for number in kept]
    (detail,) = [note.detail for note in poses.notes if "without one of another" in note.what]
    assert detail == "3 of 40"


@pytest.mark.parametrize("kind", ["bag lz4", "mcap of ROS2"])
def test_each_cameras_tokens_are_those_of_its_own_cache(
    run_bits: Callable[..., Outcome], tmp_path: Path, kind: str
) -> None:
    left, events = Rendered(7, 40), drive_of(FIRST)
    events += [compressed(stamp, left.jpegs[number], topic="/left") for number, stamp in enumerate(stamps(40))]
    write(kind, tmp_path / "data", "t1", sorted(events, key=lambda event: event.log_ns))
    cameras = {"front": CAMERA, "left": "/left"}
    assert run_bits({"image_key": cameras}).code == 0
    both = chunks(tmp_path / "cache", "t1")
    for camera, topic in cameras.items():
        assert run_bits({"image_key": topic, "cache_dir": str(tmp_path / camera)}).code == 0
        for (span, datasets), (own_span, own) in zip(both, chunks(tmp_path / camera, "t1"), strict=True):
            assert span == own_span
            np.testing.assert_array_equal(datasets[f"{camera}/cls_token"], own["cls_token"])
            np.testing.assert_array_equal(datasets["position"], own["position"])
    assert {int(stamp) for _, datasets in both for stamp in datasets["left/cls_token"][:, 0]} == {7}


@pytest.mark.parametrize("frame_stride", [1, 3])
def test_a_topic_comes_along(run_bits: Callable[..., Outcome], tmp_path: Path, frame_stride: int) -> None:
    events = drive_of(FIRST)
    events += [twist(stamp + 25_000_000, number) for number, stamp in enumerate(stamps(40))]
    write("bag", tmp_path / "data", "t1", sorted(events, key=lambda event: event.log_ns))
    assert run_bits({"extra_keys": ["/cmd_vel"], "frame_stride": frame_stride}).code == 0
    for (start, stop), datasets in chunks(tmp_path / "cache", "t1"):
        numbers = np.arange(start, stop) * frame_stride
        np.testing.assert_array_equal(datasets["extra/cmd_vel"][:, 0], numbers)
        np.testing.assert_array_equal(datasets["extra/cmd_vel"][:, 5], numbers / 2)
        np.testing.assert_allclose(datasets["timestamp"], numbers / FPS, atol=1e-9)


def test_a_topic_that_is_not_there_fails_its_bag(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write("bag", tmp_path / "data", "t1", drive_of(FIRST))
    assert run_bits({"extra_keys": ["/cmd_vel"]}).code == 1
    assert "extra_keys: it has no topic /cmd_vel" in read_progress(tmp_path / "cache")["failures"]["t1"]["reason"]


def test_nearest_rows_by_hand() -> None:
    at = np.array([10, 20, 30])
    assert nearest_rows(at, np.array([0, 10, 15, 16, 29, 99])).tolist() == [0, 0, 0, 1, 2, 2]
    assert nearest_rows(np.array([7]), np.array([0, 9])).tolist() == [0, 0]


def test_numbers_of_other_topics_at_frames(tmp_path: Path) -> None:
    events = drive_of(FIRST)
    events += [twist(stamp + 25_000_000, number) for number, stamp in enumerate(stamps(20))]
    write_ros1(tmp_path / "t.bag", sorted(events, key=lambda event: event.log_ns))
    bag, times = open_bag(tmp_path / "t.bag", "t"), Times()
    for stamp in stamps(40):
        times.add(stamp, stamp + 20_000_000)  # as drive_of has images recorded
    frames = pair_cameras("t", {None: times}, "header")
    found = numbers_at_frames(bag, "/cmd_vel", frames, "header", 1.0, "t")  # no header: both by the log's times
    assert found.shape == (40, 6)
    np.testing.assert_array_equal(found[:20, 0], np.arange(20))
    np.testing.assert_array_equal(found[:20, 5], np.arange(20) / 2)
    assert np.isnan(found[30:]).all() and not np.isnan(found[:29]).any()
    speeds = numbers_at_frames(bag, ODOM, frames, "header", 1.0, "t")
    np.testing.assert_array_equal(speeds, np.tile([1.0, 2, 3, 4, 5, 6], (40, 1)))
    with pytest.raises(InputError, match="extra_keys: /secret holds my_robot/Secret, expected"):
        numbers_at_frames(bag, "/secret", frames, "header", 1.0, "t")


# ---------------------------------------------------------------------------------------------------------------------
# Real bags
# ---------------------------------------------------------------------------------------------------------------------


@needs_bags
def test_real_bags_are_read_or_refused_with_the_true_reason(tmp_path: Path) -> None:
    assert "12 of its 13 parts are missing: soccer_goal_0.mcap" in reason(BAGS / "soccer_goal")
    aruco = "/raspicam_node/image/compressed"
    assert "0 topics hold Odometry or PoseStamped" in reason(BAGS / "aruco_images.bag")
    source = source_of(BAGS / "aruco_images.bag")
    assert source.poses(required=False).frame_index.tolist() == [0]
    (picture,) = source.open_frames([0]).read([0])
    assert picture[:2].tobytes() == b"\xff\xd8" and aruco in source.open_frames([0]).name(0)
    for name, topic, count, rate in (
        ("husky", "/husky_velocity_controller/odom", 3952, "10 Hz"),
        ("jackal", "/jackal_velocity_controller/odom", 3060, "50 Hz"),
    ):
        said = reason(BAGS / f"{name}_odometry.bag")
        assert "0 topics hold CompressedImage or Image; set image_key" in said
        assert f"{topic} (nav_msgs/Odometry, {count} messages, {rate})" in said
    (tmp_path / "part").mkdir()
    shutil.copy(BAGS / "soccer_goal/soccer_goal_12.mcap", tmp_path / "soccer.mcap")
    source = source_of(tmp_path / "soccer.mcap")  # its messages are packed, each by itself
    assert source.poses(required=False).frame_index.tolist() == [0, 1]
    pictures = list(source.open_frames([0, 1]).read([0, 1]))
    assert pictures[0].shape == pictures[1].shape and pictures[0].shape[2] == 3 and pictures[0].std() > 10


@needs_bags
@needs_real
def test_real_odometry_with_images_written_beside(tmp_path: Path) -> None:
    """Images at a third of the odometry's stamps, exactly: their poses are the messages', by rosbags' own reader."""
    from rosbags.highlevel import AnyReader

    with AnyReader([BAGS / "jackal_odometry.bag"]) as reader:
        connections = [each for each in reader.connections if each.topic.endswith("/odom")]
        messages = [(log, reader.deserialize(data, each.msgtype)) for each, log, data in reader.messages(connections)]
    events, expected = [], []
    for number, (log, message) in enumerate(messages[:300]):
        stamp = message.header.stamp.sec * 10**9 + message.header.stamp.nanosec
        place, turn = message.pose.pose.position, message.pose.pose.orientation
        yaw = np.arctan2(2 * (turn.w * turn.z + turn.x * turn.y), 1 - 2 * (turn.y**2 + turn.z**2))
        events.append(odometry(stamp, place.x, place.y, yaw, log))
        if number % 3 == 0:
            events.append(compressed(stamp, encoded(render(3, number // 3)), log))
            expected.append((place.x, place.y, yaw))
    write_ros2(tmp_path / "t", events, "mcap")
    poses = source_of(tmp_path / "t").poses(required=True)
    np.testing.assert_allclose(np.column_stack([poses.position, poses.yaw]), expected, atol=1e-9)
