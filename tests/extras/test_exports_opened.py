"""Exports opened by the packages that they are for, and a step of training on each. Marked `exports`: they need
requirements-exports.txt, which CI installs in an environment of its own."""

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_support import tokens_of
from test_export import EPISODES, robot  # noqa: F401
from test_export_lerobot import FRAMES, POSITIONS, YAW, killed_export, rover, way  # noqa: F401
from test_export_vint import train_one_step
from torch.utils.data import DataLoader

import progress_utils
from support import tree

pytestmark = pytest.mark.exports


def export(cache: Path, layout: str, out: Path, *arguments: str) -> int:
    return progress_utils.main(["export", "--cache-dir", str(cache), "--to", layout, "-o", str(out), *arguments])


@pytest.fixture
def lerobot_dataset(tmp_path, monkeypatch) -> Any:
    """LeRobotDataset of a folder; what `datasets` unpacks goes into this test's folder, and no hub is asked."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "unpacked")
    return lambda root, **arguments: LeRobotDataset("local/robot", root=root, **arguments)


def test_lerobot_opens_it_reads_what_the_cache_holds_and_trains(robot, lerobot_dataset):  # noqa: F811
    from lerobot.datasets.sampler import EpisodeAwareSampler
    from lerobot.datasets.utils import dataset_to_policy_features

    assert robot.export("lerobot", "--fps", "4") == 0
    before = tree(robot.out)
    dataset = lerobot_dataset(robot.out, delta_timestamps={"action": [0.0, 0.25, 0.5]})
    assert (len(dataset), dataset.num_episodes, dataset.fps) == (57, 5, 4)
    features = dataset_to_policy_features(dataset.features)
    assert {"observation.cls_token", "observation.patch_tokens", "observation.state", "action"} == features.keys()
    for episode, (name, stamp, first, stop) in enumerate(EPISODES):
        bounds = dataset.meta.episodes[episode]
        assert (bounds["length"], bounds["trajectory"]) == (stop - first, name)
        actions = way(POSITIONS[name][first:stop], YAW[first:stop])
        for number in range(stop - first):
            item, frame = dataset[bounds["dataset_from_index"] + number], first + number
            expected = np.concatenate([[stamp, frame // 256, frame % 256]])
            np.testing.assert_array_equal(item["observation.cls_token"][:3], expected)
            np.testing.assert_array_equal(item["observation.patch_tokens"][1, 2, :3], expected)
            state = np.float32([*POSITIONS[name][frame], YAW[frame]])
            np.testing.assert_array_equal(item["observation.state"], state)
            ahead = np.minimum(number + np.arange(3), stop - first - 1)
            np.testing.assert_allclose(item["action"], actions[ahead], atol=1e-6)
            assert item["action_is_pad"].tolist() == [number + step >= stop - first for step in range(3)]
            assert item["timestamp"] == number / 4
            assert item["next.done"] == (number == stop - first - 1)
            assert item["task"] == ""
    bounds = [dataset.meta.episodes[key] for key in ("dataset_from_index", "dataset_to_index")]
    sampler = EpisodeAwareSampler(*bounds, drop_n_last_frames=1, shuffle=True)
    assert len(sampler) == 57 - 5
    train_one_step(DataLoader(dataset, batch_size=16, sampler=sampler), "observation.patch_tokens")
    assert tree(robot.out) == before


def test_lerobot_has_times_tasks_cameras_columns_and_statistics(rover, tmp_path, lerobot_dataset):  # noqa: F811
    from lerobot.datasets.compute_stats import aggregate_stats

    assert export(rover, "lerobot", tmp_path / "out") == 0
    dataset = lerobot_dataset(tmp_path / "out", episodes=[0, 2])
    assert (len(dataset), dataset.fps) == (30, 10)
    assert [dataset[index]["task"] for index in (0, 19, 20)] == ["Go home", "Go home", ""]
    item = dataset[25]  # frame 15 of the second trajectory, the sixth of its second episode
    np.testing.assert_array_equal(item["observation.left.cls_token"], tokens_of(2, np.array([15]), 1)[0])
    np.testing.assert_array_equal(item["extra.speed"], [30, 31])
    assert item["extra.battery"] == 15
    assert item["timestamp"].item() == pytest.approx(0.5)
    stats = aggregate_stats([dataset.meta.stats, dataset.meta.stats])  # as its tools join datasets
    assert stats["action"]["mean"].shape == stats["action"]["q99"].shape == (3,)


def test_stable_worldmodel_opens_the_table_reads_what_the_cache_holds_and_trains(robot):  # noqa: F811
    from stable_worldmodel.data import LanceDataset, detect_format

    out = robot.out.with_name("robot.lance")
    assert export(robot.cache, "lance", out) == 0
    assert detect_format(str(out)).name == "lance"
    dataset = LanceDataset(out, num_steps=2)
    assert dataset.lengths.tolist() == [stop - first for _, _, first, stop in EPISODES]
    for episode, (name, stamp, first, stop) in enumerate(EPISODES):
        found, frames = dataset.load_episode(episode), np.arange(first, stop)
        np.testing.assert_array_equal(found["cls_token"][:, :3], tokens_of(stamp, frames)[:, :3])
        patches = found["patch_tokens"].reshape(-1, 2, 3, 4)
        np.testing.assert_array_equal(patches[:, 1, 2, :3], tokens_of(stamp, frames)[:, :3])
        np.testing.assert_array_equal(found["position"], POSITIONS[name][first:stop])
        np.testing.assert_array_equal(found["yaw"][:, 0], YAW[first:stop])
        np.testing.assert_array_equal(found["frame_index"][:, 0], frames)
        np.testing.assert_allclose(found["action"], way(POSITIONS[name][first:stop], YAW[first:stop]), atol=1e-6)
        assert (found["trajectory"], found["task"]) == (name, "")
        assert found["cls_token"].dtype == torch.float16
    assert dataset[0]["action"].shape == (2, 3)
    train_one_step(DataLoader(dataset, batch_size=16, shuffle=True), "cls_token")


def test_stable_worldmodel_opens_the_flat_file(robot):  # noqa: F811
    from stable_worldmodel.data import HDF5Dataset

    assert robot.export("flat") == 0
    dataset = HDF5Dataset(path=robot.out, num_steps=2)
    for episode, (name, stamp, first, stop) in enumerate(EPISODES):
        found, frames = dataset.load_episode(episode), np.arange(first, stop)
        np.testing.assert_array_equal(found["cls_token"][:, :3], tokens_of(stamp, frames)[:, :3])
        np.testing.assert_array_equal(found["position"], POSITIONS[name][first:stop])
    loader = DataLoader(dataset, batch_size=16, shuffle=True)
    batch = next(iter(loader))
    assert batch["cls_token"].shape == (16, 2, 4)
    train_one_step([{**batch, "action": batch["delta"][:, :1]}], "cls_token")


def test_a_table_has_times_tasks_cameras_and_columns(rover, tmp_path):  # noqa: F811
    from stable_worldmodel.data import LanceDataset

    assert export(rover, "lance", tmp_path / "rover.lance") == 0
    dataset = LanceDataset(tmp_path / "rover.lance")
    assert dataset.lengths.tolist() == [20, 10, 10]
    first, last = dataset.load_episode(0), dataset.load_episode(2)
    assert (first["task"], last["task"]) == ("Go home", "")
    np.testing.assert_array_equal(last["left_cls_token"], tokens_of(2, np.arange(10, FRAMES), 1))
    np.testing.assert_array_equal(last["extra_speed"][:, 1], 2 * np.arange(10, FRAMES) + 1)
    np.testing.assert_allclose(last["timestamp"][:, 0], np.arange(10) * 0.1)


def test_a_table_is_replaced_only_as_it_was_made(rover, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "rover.lance"
    assert export(rover, "lance", tmp_path / "rover") == 2
    assert "whose name ends in .lance" in capsys.readouterr().err
    assert export(rover, "lance", out) == 0
    assert export(rover, "lance", out) == 2
    assert "--force" in capsys.readouterr().err
    assert killed_export("lance", rover, out, "--force", by=signal.SIGINT) == 130  # while Lance pulls rows
    assert sorted(os.listdir(tmp_path)) == ["cache", "rover.lance"]
    assert killed_export("lance", rover, out, "--force") == -signal.SIGKILL
    assert (tmp_path / "rover.lance.partial").is_dir()
    assert export(rover, "lance", out, "--force") == 0
    assert not (tmp_path / "rover.lance.partial").exists()
    import lance

    lance.write_dataset(lance.dataset(str(out)).to_table(), str(out), mode="append")  # another program's rows
    before = tree(out)
    assert export(rover, "lance", out, "--force") == 2
    assert "which was changed since" in capsys.readouterr().err
    assert tree(out) == before
    assert sorted(os.listdir(tmp_path)) == ["cache", "rover.lance"]


def test_a_bad_chunk_ends_a_table_and_is_named(rover, tmp_path, capsys):  # noqa: F811
    path = rover / "b" / "chunk_00001.h5"
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    assert export(rover, "lance", tmp_path / "rover.lance") == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {path}: ")
    assert "verify" in message
    assert os.listdir(tmp_path) == ["cache"]
