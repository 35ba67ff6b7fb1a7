"""Labels of windows: waypoints against the published rule, goals by steps, negatives, and what is refused."""

import hashlib
import math
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_support import Robot, write_cache
from torch.utils.data import DataLoader

from dino_cache import CacheWindows
from dino_cache_extras.labels import PoseMemory, draw
from progress_utils import DamagedChunkError, RefusedError
from support import ROOT, read_chunk, read_progress


def arc(count: int, radius: float = 3.0, step_m: float = 0.25, begin: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Positions (count, 2) and yaws (count,) of a robot that drives a circle to the left, looking along it."""
    angle = begin + np.arange(count) * step_m / radius
    position = radius * np.stack([np.sin(angle), 1 - np.cos(angle)], axis=1)
    return position + [7.0, -2.0], np.arctan2(np.sin(angle), np.cos(angle))


def published(position: np.ndarray, yaw: np.ndarray, now: int, count: int, spacing: int) -> np.ndarray:
    """(count, 4): ViNT's rule, pose by pose: the pose `spacing` frames on, the last one again where there is none."""
    labels, place = [], now
    for _ in range(count):
        place = place + spacing if place + spacing < len(yaw) else place
        to_body = np.array([[math.cos(yaw[now]), math.sin(yaw[now])], [-math.sin(yaw[now]), math.cos(yaw[now])]])
        x, y = to_body @ (position[place] - position[now])
        labels.append([x, y, math.cos(yaw[place] - yaw[now]), math.sin(yaw[place] - yaw[now])])
    return np.array(labels)


ARCS = {"a": Robot(1, *arc(60)), "b": Robot(2, *arc(30, radius=-2.0, step_m=0.4)), "c": Robot(3, *arc(9, step_m=0.1))}


@pytest.fixture
def arcs(tmp_path: Path) -> Path:
    """Chunks of 2 m that overlap by half a metre: 60 frames make nine of them."""
    return write_cache(tmp_path / "arcs", ARCS)


def last_frame(windows: CacheWindows, index: int) -> tuple[str, int]:
    """The trajectory of a window, and the kept frame that is its last, by what the chunk file says."""
    source = windows.source(index)
    attributes, _ = read_chunk(source.cache_dir / source.trajectory / f"chunk_{source.chunk_index:05d}.h5")
    return source.trajectory, int(attributes["start"]) + source.rows[-1]


def all_samples(windows: CacheWindows) -> list[dict[str, torch.Tensor]]:
    return list(windows.__getitems__(range(len(windows))))


# ------------------------------------------------------------------------------------------------------- waypoints


@pytest.mark.parametrize(("window", "frame_step", "count", "spacing"), [(3, 1, 8, 1), (2, 2, 5, 3), (1, 1, 1, 1)])
def test_waypoints_are_those_of_the_published_rule(arcs, window, frame_step, count, spacing):
    windows = CacheWindows(arcs, window, frame_step=frame_step, waypoints=count, waypoint_step=spacing)
    beyond = 0
    for index, sample in enumerate(all_samples(windows)):
        name, now = last_frame(windows, index)
        robot = ARCS[name]
        expected = published(robot.position, robot.yaw, now, count, spacing)
        np.testing.assert_allclose(sample["waypoints"], expected, atol=1e-6)
        there = [now + k * spacing < robot.length for k in range(1, count + 1)]
        assert sample["waypoint_mask"].tolist() == there
        assert sample["waypoints"].dtype == torch.float32
        beyond += now + spacing >= int(windows._table.stop[windows._locate([index])[0][0]])
    assert beyond > 3, "some lie in the next chunk"


def test_a_robot_that_drives_straight_and_turns_left_has_x_ahead_and_y_to_the_left(tmp_path):
    position = np.array([[5.0, 1.0], [5.0, 2.0], [4.0, 2.0]])  # north, then west
    cache = write_cache(tmp_path / "c", {"t": Robot(1, position, np.array([1.0, 1.0, 2.0]) * math.pi / 2)})
    sample = CacheWindows(cache, 1, waypoints=3)[0]
    expected = [[1, 0, 1, 0], [1, 1, 0, 1], [1, 1, 0, 1]]
    np.testing.assert_allclose(sample["waypoints"], expected, atol=1e-6)
    assert sample["waypoint_mask"].tolist() == [True, True, False]


def test_waypoints_count_kept_frames(tmp_path):
    robot = Robot(1, *arc(40))
    cache = write_cache(tmp_path / "c", {"t": robot}, frame_stride=3)
    windows = CacheWindows(cache, 2, waypoints=4)
    sample = windows[5]
    assert sample["frame_index"].tolist() == [15, 18]
    np.testing.assert_allclose(sample["waypoints"], published(robot.position, robot.yaw, 6, 4, 1), atol=1e-6)


def test_no_waypoint_is_taken_across_a_pose_jump(tmp_path):
    position, yaw = arc(30)
    position[12:] += [40.0, 0.0]
    cache = write_cache(tmp_path / "c", {"t": Robot(1, position, yaw)})
    spans = read_progress(cache)["trajectory_records"]["t"]["spans"]
    assert [b[0] for a, b in zip(spans, spans[1:]) if b[0] >= a[1]] == [12]
    windows = CacheWindows(cache, 2, waypoints=6)
    for index, sample in enumerate(all_samples(windows)):
        _, now = last_frame(windows, index)
        piece = slice(0, 12) if now < 12 else slice(12, 30)
        expected = published(position[piece], yaw[piece], now - piece.start, 6, 1)
        np.testing.assert_allclose(sample["waypoints"], expected, atol=1e-6)
        assert sample["waypoint_mask"].tolist() == [now + k < piece.stop for k in range(1, 7)]


def test_a_jump_inside_a_chunk_that_was_cut_by_frames_ends_the_waypoints(tmp_path):
    position, yaw = arc(30)
    position[12:] += [400.0, 0.0]
    cut = {"chunk_by": "frames", "max_chunk_frames": 20, "overlap_frames": 4, "max_chunk_distance_m": 50.0}
    windows = CacheWindows(
        write_cache(tmp_path / "c", {"t": Robot(1, position, yaw)}, **cut), 2, waypoints=3, waypoint_step=2
    )
    seen = set()
    for index, sample in enumerate(all_samples(windows)):
        _, now = last_frame(windows, index)
        end = 12 if now < 12 else 30
        begin = 0 if now < 12 else 12
        np.testing.assert_allclose(
            sample["waypoints"], published(position[begin:end], yaw[begin:end], now - begin, 3, 2), atol=1e-6
        )
        assert sample["waypoint_mask"].tolist() == [now + k < end for k in (2, 4, 6)]
        seen.add(now)
    assert {10, 11, 13, 19, 20, 29} <= seen  # window frames 11 and 12 lie on both sides: its last counts


def test_a_border_that_shares_no_frame_ends_the_waypoints(tmp_path):
    cut = {"chunk_by": "frames", "max_chunk_frames": 10, "overlap_frames": 0}
    windows = CacheWindows(write_cache(tmp_path / "c", {"t": Robot(1, *arc(20))}, **cut), 2, waypoints=3)
    masks = {last_frame(windows, index)[1]: s["waypoint_mask"].tolist() for index, s in enumerate(all_samples(windows))}
    assert masks[8] == [True, False, False]
    assert masks[9] == [False, False, False]
    assert masks[12] == [True, True, True]


def test_poses_that_a_trajectory_lacks_are_masked_and_nan(tmp_path):
    robots = {"a": Robot(1, *arc(12)), "b": Robot(2, None, None, count=12)}
    windows = CacheWindows(write_cache(tmp_path / "c", robots, chunk_by="frames"), 2, waypoints=2)
    of_b = windows.trajectories()[(tmp_path / "c", "b")]
    sample = windows[of_b[0]]
    assert not sample["waypoint_mask"].any()
    assert sample["waypoints"].isnan().all()
    assert windows[0]["waypoint_mask"].all()


def test_a_cache_of_the_first_version_has_waypoints(tmp_path):
    shutil.copytree(ROOT / "tests/pinned/gnm/cache", tmp_path / "cache")
    chunks = [read_chunk(tmp_path / f"cache/t3/chunk_{number:05d}.h5") for number in range(3)]
    position, yaw = np.full((12, 2), np.nan), np.full(12, np.nan)
    for attributes, data in chunks:
        rows = slice(attributes["start"], attributes["stop"])
        position[rows], yaw[rows] = data["position"], data["yaw"]
    windows = CacheWindows(tmp_path / "cache", 2, waypoints=8, goal_steps=(1, 3))
    for index, sample in enumerate(all_samples(windows)):
        _, now = last_frame(windows, index)
        np.testing.assert_allclose(sample["waypoints"], published(position, yaw, now, 8, 1), atol=1e-6)
        if now < 11:
            np.testing.assert_array_equal(sample["goal_position"], position[now + int(sample["goal_distance"])])


# -------------------------------------------------------------------------------------------------------- normalise


def test_lengths_are_divided_by_the_mean_step_or_by_the_one_given(tmp_path):
    one, other = (
        write_cache(tmp_path / name, {"t": Robot(1, *arc(40, step_m=step))})
        for name, step in (("one", 0.25), ("other", 0.5))
    )
    plain = CacheWindows([one, other], 2, waypoints=4, waypoint_step=2, goal_steps=(1, 4))
    assert plain.step_lengths == {}
    chord = {step: 6 * math.sin(step / 6) for step in (0.25, 0.5)}  # of a circle of 3 m radius
    for asked, lengths in (
        (True, [chord[0.25], chord[0.5]]),
        (0.3, [0.3, 0.3]),
        ((0.25, 0.38), [0.25, 0.38]),
    ):
        windows = CacheWindows([one, other], 2, waypoints=4, waypoint_step=2, goal_steps=(1, 4), normalise=asked)
        assert list(windows.step_lengths) == [one, other]
        assert list(windows.step_lengths.values()) == pytest.approx(lengths)
        for index in (0, len(windows) - 1):
            unit = 2 * lengths[index > 0]
            before, after = plain[index], windows[index]
            assert float(after["label_unit_m"]) == pytest.approx(unit)
            for key in ("waypoints", "goal_pose"):
                np.testing.assert_allclose(after[key][..., :2] * unit, before[key][..., :2], atol=1e-6)
                assert torch.equal(after[key][..., 2:], before[key][..., 2:])


def test_the_mean_step_counts_each_step_once_and_no_jump(tmp_path):
    position = np.zeros((9, 2))
    position[:, 0] = [0, 1, 3, 6, 6, 6, 60, 62, 64]
    robot = Robot(1, position, np.zeros(9), spans=[(0, 4), (1, 6), (6, 9)])
    cache = write_cache(tmp_path / "c", {"t": robot})
    windows = CacheWindows(cache, 1, waypoints=1, normalise=True)
    assert windows.step_lengths[cache] == pytest.approx(10 / 7)
    by_frames = write_cache(
        tmp_path / "d", {"t": Robot(1, position, np.zeros(9))}, chunk_by="frames", max_chunk_distance_m=50.0
    )
    assert CacheWindows(by_frames, 1, waypoints=1, normalise=True).step_lengths[by_frames] == pytest.approx(10 / 7)


def test_a_robot_that_stands_has_no_length_to_divide_by(tmp_path):
    robot = Robot(1, np.zeros((9, 2)), np.zeros(9), spans=[(0, 9)])
    cache = write_cache(tmp_path / "c", {"t": robot})
    with pytest.raises(RefusedError, match=rf"{cache}: normalise: its frames do not move"):
        CacheWindows(cache, 2, waypoints=1, normalise=True)
    assert CacheWindows(cache, 2, waypoints=1, normalise=0.25)[0]["waypoints"].tolist() == [[0, 0, 1, 0]]


# ------------------------------------------------------------------------------------------------------------ goals


@pytest.mark.parametrize("steps", [(1, 5), (3, 20), (-6, 6), (-4, -2), (0, 0)])
def test_goals_by_steps_are_all_frames_of_the_trajectory_that_are_so_far_away(arcs, steps):
    windows = CacheWindows(arcs, 2, goal_steps=steps)
    chosen: dict[int, set[int]] = {}
    for epoch in range(120):
        windows.set_epoch(epoch)
        for sample in all_samples(windows):
            chosen.setdefault(int(sample["index"]), set()).add(int(sample["goal_frame_index"]))
    for index, sample in enumerate(all_samples(windows)):
        name, now = last_frame(windows, index)
        robot = ARCS[name]
        inside = set(range(max(0, now + steps[0]), min(robot.length - 1, now + steps[1]) + 1))
        goal = int(sample["goal_frame_index"])
        assert sample["goal_valid"] == bool(inside)
        assert chosen[index] <= (inside or {robot.length - 1 if steps[0] > 0 else 0})
        assert len(inside) > 14 or chosen[index] == (inside or {goal}), "in 120 epochs each comes up"
        assert sample["goal_distance"] == goal - now
        assert sample["goal_cls_token"].tolist() == [robot.stamp, 0, goal, 0]
        np.testing.assert_array_equal(sample["goal_position"], robot.position[goal])
        assert not sample["is_negative"]
        if goal >= now:
            expected = published(robot.position[[now, goal]], robot.yaw[[now, goal]], 0, 1, 1)[0]
            np.testing.assert_allclose(sample["goal_pose"], expected, atol=1e-6)


def test_a_goal_lies_behind_in_the_axes_of_the_window(tmp_path):
    position = np.array([[0.0, 0.0], [0.0, 1.0], [0.0, 2.0]])
    cache = write_cache(tmp_path / "c", {"t": Robot(1, position, np.full(3, math.pi / 2))})
    sample = CacheWindows(cache, 3, goal_steps=(-2, -2))[0]
    np.testing.assert_allclose(sample["goal_pose"], [-2, 0, 1, 0], atol=1e-6)
    assert sample["goal_distance"] == -2


def test_no_goal_lies_beyond_a_pose_jump(tmp_path):
    position, yaw = arc(30)
    position[12:] += [400.0, 0.0]
    by_frames = {"chunk_by": "frames", "max_chunk_frames": 20, "overlap_frames": 4, "max_chunk_distance_m": 50.0}
    for name, cut in (("distance", {}), ("frames", by_frames)):
        windows = CacheWindows(
            write_cache(tmp_path / name, {"t": Robot(1, position, yaw)}, **cut), 1, goal_steps=(-8, 8)
        )
        present = [last_frame(windows, index)[1] for index in range(len(windows))]
        chosen = set()
        for epoch in range(80):
            windows.set_epoch(epoch)
            chosen |= {(now, int(sample["goal_frame_index"])) for now, sample in zip(present, all_samples(windows))}
        pieces = (range(12), range(12, 30))
        assert chosen == {(now, goal) for piece in pieces for now in piece for goal in piece if abs(goal - now) <= 8}


def test_frames_without_poses_have_goals_by_steps_too(tmp_path):
    robots = {name: Robot(stamp, None, None, count=40) for name, stamp in (("a", 1), ("b", 2))}
    cache = write_cache(tmp_path / "c", robots, chunk_by="frames", max_chunk_frames=16, overlap_frames=4)
    windows = CacheWindows(cache, 2, goal_steps=(10, 20), negatives=0.5)
    for index, sample in enumerate(all_samples(windows)):
        name, now = last_frame(windows, index)
        assert "goal_pose" not in sample
        assert (sample["goal_cls_token"][0] == robots[name].stamp) != sample["is_negative"]
        if not sample["is_negative"]:
            assert sample["goal_frame_index"] == now + sample["goal_distance"]


# -------------------------------------------------------------------------------------------------------- negatives


def test_negatives_are_frames_of_other_trajectories_with_the_high_distance(arcs):
    windows = CacheWindows(arcs, 2, goal_steps=(1, 20), negatives=0.25, waypoints=2, normalise=True)
    total = negative = 0
    for epoch in range(20):
        windows.set_epoch(epoch)
        for index, sample in enumerate(all_samples(windows)):
            name = windows.source(index).trajectory
            stamp, _, frame, _ = map(int, sample["goal_cls_token"].tolist())
            total += 1
            if sample["is_negative"]:
                negative += 1
                assert stamp != ARCS[name].stamp
                assert sample["goal_frame_index"] == frame
                assert sample["goal_distance"] == 20
                assert sample["goal_valid"]
                assert sample["goal_pose"].isnan().all()
            else:
                assert stamp == ARCS[name].stamp
    assert negative / total == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / total))


def test_each_frame_of_the_other_trajectories_is_as_likely_a_negative(arcs):
    windows = CacheWindows(arcs, 2, goal_steps=(1, 20), negatives=1.0)
    of_b = list(windows.trajectories()[(arcs, "b")])  # in the middle
    counts = np.zeros((4, 60), int)  # stamp, frame
    for epoch in range(600):
        windows.set_epoch(epoch)
        goals = windows.collate(windows.__getitems__(of_b))["goal_cls_token"].numpy().astype(int)
        np.add.at(counts, (goals[:, 0], goals[:, 2]), 1)
    drawn = np.concatenate([counts[1], counts[3, :9]])  # 60 frames of a and 9 of c, those that chunks share once
    mean = 600 * len(of_b) / 69
    assert counts.sum() == drawn.sum()
    assert np.abs(drawn - mean).max() < 5 * math.sqrt(mean) < mean / 2


def test_negatives_alone_are_among_goals_as_vint_draws_them(arcs):
    windows = CacheWindows(arcs, 2, negatives=0.25, waypoints=8, waypoint_step=1, normalise=True)
    same = CacheWindows(arcs, 2, negatives=0.25, waypoints=8, waypoint_step=1, normalise=True, goal_steps=(0, 20))
    for index in range(0, len(windows), 7):
        assert {
            key: value.tolist() for key, value in windows[index].items() if "goal" in key and "pose" not in key
        } == {key: value.tolist() for key, value in same[index].items() if "goal" in key and "pose" not in key}
    assert {int(windows[index]["goal_distance"]) for index in range(len(windows))} <= {*range(21)}


def test_negatives_are_of_the_windows_own_cache(tmp_path):
    first = write_cache(tmp_path / "one", {"a": Robot(1, *arc(20)), "b": Robot(2, *arc(20))})
    second = write_cache(tmp_path / "two", {"a": Robot(3, *arc(20)), "b": Robot(4, *arc(20))})
    windows = CacheWindows([first, second], 2, goal_steps=(1, 20), negatives=1.0)
    other = {(first, "a"): 2, (first, "b"): 1, (second, "a"): 4, (second, "b"): 3}
    for index, sample in enumerate(all_samples(windows)):
        assert int(sample["goal_cls_token"][0]) == other[windows.source(index)[:2]]


def test_a_cache_of_one_trajectory_has_no_negatives(tmp_path):
    cache = write_cache(tmp_path / "c", {"a": Robot(1, *arc(20))})
    with pytest.raises(RefusedError, match=rf"{cache}: negatives: .* it has one"):
        CacheWindows(cache, 2, goal_steps=(1, 20), negatives=0.1)


# ----------------------------------------------------------------------------------------------------- determinism


OPTIONS: dict[str, Any] = {"goal_steps": (1, 20), "negatives": 0.3, "waypoints": 4, "normalise": True}


def assert_equal(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(others)
    for key, values in ours.items():
        np.testing.assert_array_equal(values.numpy(), others[key].numpy(), err_msg=key)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_and_collates_give_the_same_labels(arcs, start):
    windows = CacheWindows(arcs, 2, **OPTIONS)
    alone = list(DataLoader(windows, 7, collate_fn=windows.collate))
    for workers, collate in ((2, windows.collate), (1, None)):
        loader = DataLoader(windows, 7, num_workers=workers, collate_fn=collate, multiprocessing_context=start)
        for ours, others in zip(alone, loader, strict=True):
            assert_equal(ours, others)
    assert alone[0]["waypoints"].shape == (7, 4, 4)
    assert_equal(pickle.loads(pickle.dumps(windows))[5], windows[5])


def test_labels_depend_on_seed_epoch_and_index_alone(arcs):
    def labels(seed: int, epoch: int, order: list[int]) -> dict[int, tuple[Any, ...]]:
        windows = CacheWindows(arcs, 2, seed=seed, **OPTIONS)
        windows.set_epoch(epoch)
        batch = windows.collate(windows.__getitems__(order))
        rows = zip(*(batch[key].tolist() for key in ("goal_frame_index", "goal_distance", "is_negative")))
        return dict(zip(batch["index"].tolist(), rows))

    order = list(range(60))
    first = labels(0, 0, order)
    assert labels(0, 0, order[::-1]) == first
    assert labels(0, 1, order) != first
    assert labels(1, 0, order) != first


def test_goals_by_metres_are_drawn_as_before(arcs):
    windows = CacheWindows(arcs, 2, goal=(0.5, 1.5), waypoints=3)
    assert_equal(
        {key: value for key, value in windows[9].items() if not key.startswith("waypoint")},
        dict(CacheWindows(arcs, 2, goal=(0.5, 1.5))[9]),
    )
    by_hand = int.from_bytes(hashlib.blake2b(b"0 0 9", digest_size=16).digest()) / 2**128  # what earlier versions drew
    assert draw(1000, 0, 0, 9) == int(1000 * by_hand)


# ------------------------------------------------------------------------------------------------------ what it takes


def test_poses_are_read_once_while_they_are_few_and_dropped_when_they_are_many(monkeypatch):
    reads: list[int] = []

    def poses_of(number: int) -> dict[str, np.ndarray]:
        reads.append(number)
        return {"position": np.full((10, 2), number), "yaw": np.zeros(10)}

    memory = PoseMemory(poses_of)
    for number in (0, 1, 2, 0, 1, 2):
        assert memory(number)[3].tolist() == [number, number, 0]
    assert reads == [0, 1, 2]
    monkeypatch.setattr("dino_cache_extras.labels.MAX_POSE_BYTES", 2 * 240)
    memory, reads[:] = PoseMemory(poses_of), []
    for number in (0, 1, 0, 2, 0, 1):  # 2 takes 1's place
        memory(number)
    assert reads == [0, 1, 2, 1]


def test_a_neighbour_that_is_not_as_recorded_is_an_error_that_names_it(arcs):
    windows = CacheWindows(arcs, 2, waypoints=8)
    file = arcs / "a" / "chunk_00001.h5"
    file.write_bytes(file.read_bytes()[:-1])
    source = windows.source(0)
    assert (source.trajectory, source.chunk_index) == ("a", 0)
    with pytest.raises(DamagedChunkError, match=rf"^{file}: .*bytes, recorded are"):
        windows[5]
    assert CacheWindows(arcs, 2, waypoints=2)[0]["waypoint_mask"].all()


# -------------------------------------------------------------------------------------------------- what is refused


def test_a_cache_without_poses_is_refused_by_name(tmp_path):
    line = arc(20)[0]
    for name, robot, missing in (
        ("none", Robot(1, None, None, count=20), "no position and no yaw"),
        ("no_yaw", Robot(1, line, None), "no yaw"),
    ):
        cache = write_cache(tmp_path / name, {"t": robot}, chunk_by="frames")
        with pytest.raises(RefusedError, match=rf"{cache}: waypoints: poses are needed, and this cache has {missing}"):
            CacheWindows(cache, 2, waypoints=3)


@pytest.mark.parametrize(
    ("message", "arguments"),
    [
        ("waypoints: -1 must be", {"waypoints": -1}),
        ("waypoint_step: 0 must be", {"waypoints": 2, "waypoint_step": 0}),
        (r"goal_steps: \(5, 2\) must be", {"goal_steps": (5, 2)}),
        (r"goal_steps: \(1, 2.5\) must be whole numbers", {"goal_steps": (1, 2.5)}),
        ("goal, goal_steps: ", {"goal_steps": (1, 5), "goal": (0.0, 1.0)}),
        ("negatives: 1.5 must be a share", {"goal_steps": (1, 5), "negatives": 1.5}),
        ("negatives: they are goals by steps", {"goal": (0.0, 1.0), "negatives": 0.1}),
        ("normalise: there is nothing to divide", {"normalise": True}),
        ("normalise: 0 must be True, or the length", {"waypoints": 2, "normalise": 0}),
        ("normalise: nan must be", {"waypoints": 2, "normalise": math.nan}),
        ("normalise: 2 lengths for 1 caches", {"waypoints": 2, "normalise": (0.1, 0.2)}),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arcs, message, arguments):
    with pytest.raises(RefusedError, match=message):
        CacheWindows(arcs, 2, **arguments)
