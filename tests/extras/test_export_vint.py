"""export --to vint, read by the rules of the feature reader of satinavrobotics/visualnav-transformer, of which there
is no package: dataset/feature_dataset.py and dataset/base_dataset.py, commit f78759e."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from test_export import robot  # noqa: F401
from torch.utils.data import DataLoader, Dataset

from support import read_chunk

CONTEXT, PREDICTED = 2, 3  # frames before the present, waypoints after it
MOST_GOAL_M = 20.0


class FeatureWindows(Dataset):
    """A sample is a present frame of a chunk with CONTEXT frames before it and PREDICTED after it, whose goal may lie
    more than one frame ahead and less than MOST_GOAL_M away."""

    def __init__(self, folder: Path):
        metadata = json.loads((folder / "cache_metadata.json").read_text())
        self.width, self.samples, self.chunks = metadata["feature_dim"], [], {}
        for chunk_id in metadata["chunks"]:
            chunk = torch.load(folder / f"{chunk_id}.pt", map_location="cpu", weights_only=True)
            assert {"features", "positions", "yaws"} <= chunk.keys()
            assert isinstance(chunk["features"], torch.Tensor)
            assert chunk["features"].shape == (len(chunk["positions"]), self.width)
            self.chunks[chunk_id] = chunk
            for present in range(CONTEXT, len(chunk["positions"]) - PREDICTED):
                far = [
                    np.hypot(*np.subtract(p, chunk["positions"][present])) for p in chunk["positions"][present + 1 :]
                ]
                ahead = next((n for n, distance in enumerate(far) if distance >= MOST_GOAL_M), len(far))
                if ahead <= 1:
                    break
                self.samples.append((chunk_id, present, ahead))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        chunk_id, present, ahead = self.samples[index]
        chunk = self.chunks[chunk_id]
        position = np.array(chunk["positions"][present : present + PREDICTED + 1])
        yaw = np.array(chunk["yaws"][present : present + PREDICTED + 1])
        turn = np.array([[np.cos(yaw[0]), -np.sin(yaw[0])], [np.sin(yaw[0]), np.cos(yaw[0])]])
        local = (position[1:] - position[0]) @ turn / MOST_GOAL_M
        angle = yaw[1:] - yaw[0]
        action = np.concatenate([local, np.cos(angle)[:, None], np.sin(angle)[:, None]], axis=1)
        return {
            "context": torch.stack([chunk["features"][t] for t in range(present - CONTEXT, present + 1)]).float(),
            "goal": chunk["features"][present + ahead].float(),
            "action": torch.as_tensor(action, dtype=torch.float32),
        }


def train_one_step(batches: Iterable[dict[str, torch.Tensor]], tokens: str) -> None:
    """A step down the loss of a network that tells actions by tokens: the loss of the same batch falls."""
    batch = next(iter(batches))
    inputs, wanted = batch[tokens].float().flatten(1), batch["action"].float().flatten(1)
    model = torch.nn.Linear(inputs.shape[1], wanted.shape[1])
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-5)
    before = torch.nn.functional.mse_loss(model(inputs), wanted)
    before.backward()
    optimiser.step()
    after = torch.nn.functional.mse_loss(model(inputs), wanted)
    assert torch.isfinite(after)
    assert after < before


def test_the_feature_reader_finds_every_window_of_the_chunks_and_trains(robot):  # noqa: F811
    assert robot.export("vint") == 0
    windows = FeatureWindows(robot.out)
    found = {sample[:2] for sample in windows.samples}
    assert {("a_00000", present) for present in range(2, 6)} <= found  # of frames 0 to 8
    assert {("lab__b_00013", present) for present in range(2, 4)} <= found  # of frames 13 to 19
    sample = windows[windows.samples.index(("lab__b_00013", 3, 3))]
    _, stored = read_chunk(robot.cache / "lab" / "b" / "chunk_00001.h5")
    np.testing.assert_array_equal(sample["context"], stored["cls_token"][1:4].astype(np.float32))
    np.testing.assert_array_equal(sample["goal"], stored["cls_token"][6].astype(np.float32))
    yaw = np.linspace(0, 1, 20)[16:20]  # the robot moves by 0.25 m along x, and turns
    ahead = 0.25 * np.arange(1, 4) / MOST_GOAL_M
    turned = yaw[1:] - yaw[0]
    expected = [ahead * np.cos(yaw[0]), -ahead * np.sin(yaw[0]), np.cos(turned), np.sin(turned)]
    np.testing.assert_allclose(sample["action"], np.stack(expected, axis=1), atol=1e-6)
    train_one_step(DataLoader(windows, batch_size=8, shuffle=True), "context")
