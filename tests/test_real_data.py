"""Recordings of real robots and people, and the committed sample, through the real model with random weights."""

import math
import os
import pickle
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml

import dino_cache
from support import REAL, ROOT, chunk_files, read_chunk, read_progress, run_cache

NAMES = {
    "gopro_karma_drone": ["flight_10hz"],
    "gopro_max_walk": ["walk_5hz"],
    "hololens_walk": ["walk_i000_120", "walk_i120_240_s2"],
}
TRAJECTORIES = [(dataset, name) for dataset, names in NAMES.items() for name in names]
OVERLAP_M, MIN_M = 1.0, 0.3

needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"the real recordings are not in {REAL}")


class RealCaches(NamedTuple):
    """What one run made of the three datasets."""

    exit_code: int
    folder: Path
    max_m: float

    def chunks(self, dataset: str, name: str) -> list[tuple[dict[str, Any], dict[str, np.ndarray]]]:
        return [read_chunk(path) for path in chunk_files(self.folder / dataset / name)]


@pytest.fixture(scope="module", params=[50.0, 4.0], ids=["50m", "4m"])
def caches(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealCaches]:
    folder = tmp_path_factory.mktemp("real")
    config = {
        "dino_model_type": "small",
        "weights": "random",
        "tokens": ["cls", "patch"],
        "image_size": [56, 70],
        "device": "cpu",
        "max_chunk_distance_m": request.param,
        "overlap_distance_m": OVERLAP_M,
        "min_chunk_distance_m": MIN_M,
        "datasets": {name: {"data_folder": str(REAL / name), "cache_dir": str(folder / name)} for name in NAMES},
    }
    path = folder / "real.yaml"
    path.write_text(yaml.safe_dump(config))
    before = {number: signal.getsignal(number) for number in dino_cache.STOP_SIGNALS}
    yield RealCaches(dino_cache.main(["--config", str(path)]), folder, request.param)
    for number, handler in before.items():
        signal.signal(number, handler)


def source(dataset: str, name: str) -> tuple[np.ndarray, np.ndarray, list[float]]:
    """Positions, yaws and travelled distances [m], straight from the recording."""
    poses = pickle.loads((REAL / dataset / name / "traj_data.pkl").read_bytes())
    travelled = [0.0]
    for (x0, y0), (x1, y1) in zip(poses["position"], poses["position"][1:]):
        travelled.append(travelled[-1] + math.hypot(x1 - x0, y1 - y0))
    return poses["position"], poses["yaw"], travelled


@needs_real
def test_every_real_trajectory_completes_and_nothing_is_written_beside_the_data(caches):
    assert caches.exit_code == 0
    for dataset, names in NAMES.items():
        progress = read_progress(caches.folder / dataset)
        assert sorted(progress["completed_trajectories"]) == names
        assert progress["failures"] == {}
        assert sorted(os.listdir(REAL / dataset)) == names


@needs_real
@pytest.mark.parametrize(("dataset", "name"), TRAJECTORIES)
def test_every_row_is_its_frames(caches, dataset, name):
    position, yaw, travelled = source(dataset, name)
    chunks = caches.chunks(dataset, name)
    seen = set()
    for number, (attributes, rows) in enumerate(chunks):
        index = rows["frame_index"]
        assert (attributes["chunk_index"], attributes["num_chunks"]) == (number, len(chunks))
        np.testing.assert_array_equal(index, np.arange(attributes["start"], attributes["stop"]))
        np.testing.assert_array_equal(rows["position"], position[index])
        np.testing.assert_array_equal(rows["yaw"], yaw[index])
        np.testing.assert_allclose(rows["travelled_distance"], np.array(travelled)[index], rtol=0, atol=1e-9)
        assert rows["cls_token"].shape == (len(index), 384)
        assert rows["patch_tokens"].shape == (len(index), 4, 5, 384)
        assert len(np.unique(rows["cls_token"], axis=0)) == len(index)  # every frame has tokens of its own
        assert len(np.unique(rows["patch_tokens"].reshape(len(index), -1), axis=0)) == len(index)
        seen.update(index.tolist())
    assert seen == set(range(len(position)))


@needs_real
@pytest.mark.parametrize(("dataset", "name"), TRAJECTORIES)
def test_chunks_keep_to_their_length_and_share_the_rows_of_their_overlap(caches, dataset, name):
    *_, travelled = source(dataset, name)
    chunks = caches.chunks(dataset, name)
    if caches.max_m == 50.0:
        assert len(chunks) == (2 if name == "flight_10hz" else 1)  # 81 m; the others are walks of 9 to 13 m
    ends = [(int(rows["frame_index"][0]), int(rows["frame_index"][-1])) for _, rows in chunks]
    lengths = [travelled[last] - travelled[first] for first, last in ends]
    assert max(lengths[:-1], default=0.0) <= caches.max_m
    assert MIN_M <= lengths[-1] < caches.max_m + MIN_M
    for i in range(len(chunks) - 1):
        last, first = ends[i][1], ends[i + 1][0]
        assert travelled[last] - travelled[first] >= OVERLAP_M > travelled[last] - travelled[first + 1]
        for key in ("cls_token", "patch_tokens", "position"):
            before, after = chunks[i][1][key], chunks[i + 1][1][key]
            np.testing.assert_array_equal(before[first - last - 1 :], after[: last - first + 1])


def test_the_sample_config_caches_the_sample(tmp_path):
    """Its paths made absolute, the cache elsewhere; the command as a user gives it."""
    config = yaml.safe_load((ROOT / "config" / "data" / "sample.yaml").read_text())
    (dataset,) = config["datasets"].values()
    dataset["data_folder"] = str((ROOT / "config" / "data" / dataset["data_folder"]).resolve())
    dataset["cache_dir"] = str(tmp_path / "cache")
    path = tmp_path / "sample.yaml"
    path.write_text(yaml.safe_dump(config))
    done = run_cache(path, "--device", "cpu", fake=False)
    assert done.returncode == 0, done.stderr
    assert "RANDOM" in done.stderr
    chunks = {
        name: len(chunk_files(tmp_path / "cache" / name))
        for name in ("corridor_straight", "room_loop", "evening/s_curve", "stop_and_go")
    }
    # 4 m with 0.5 m overlap. Corridor, 12 m in steps of 0.25: 0-4, 3.5-7.5, 7-11, 10.5-12. Loop, 8 m in steps of 0.2:
    # 0-4, 3.4-7.4, 6.8-8. S-curve, 6 m: 0-4, 3.4-6. Stop-and-go, 3 m: one.
    assert chunks == {"corridor_straight": 4, "room_loop": 3, "evening/s_curve": 2, "stop_and_go": 1}
    progress = read_progress(tmp_path / "cache")
    assert sorted(progress["completed_trajectories"]) == sorted(chunks)
    assert progress["total_chunks"] == 10
    assert progress["failures"] == {}
    attributes, rows = read_chunk(tmp_path / "cache" / "stop_and_go" / "chunk_00000.h5")
    assert rows["patch_tokens"].shape == (23, 8, 11, 384)  # 112 x 154 px in patches of 14
    assert attributes["dataset_name"] == "rendered_rooms"
