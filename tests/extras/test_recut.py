"""--recut: what is completed is cut anew from its stored features, and only frames that are in no chunk are encoded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import dino_cache
from support import (
    FRAMES,
    Robot,
    StampEncoder,
    cache_content,
    check_stamps,
    frames_encoded,
    make_trajectory,
    read_progress,
    run_utils,
    straight_line,
    tree,
)

CUT = {"max_chunk_distance_m": 1.5, "overlap_distance_m": 0.25}


class PlainEncoder(StampEncoder):
    """Its tokens do not tell how many rows were in the batch."""

    def encode(self, pixels: Any) -> Any:
        rows = super().encode(pixels)()
        for values in rows.tokens.values():
            values[..., 3] = 0
        return lambda: rows


@pytest.fixture
def loaded(run_here: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> list[PlainEncoder]:
    """The encoders that runs load."""
    encoders: list[PlainEncoder] = []

    def load(spec: dino_cache.CacheSpec, device: str) -> tuple[StampEncoder, str]:
        encoders.append(PlainEncoder(spec.image_size, spec.tokens))
        return encoders[-1], "stamp" + spec.weights

    monkeypatch.setattr(dino_cache, "load_encoder", load)
    monkeypatch.setattr(dino_cache, "build_model", lambda spec: pytest.fail("a model was built"))
    return encoders


def datasets(cache: Path) -> dict[str, dict[str, tuple[Any, ...]]]:
    """Every chunk's datasets, byte for byte, and the attributes that do not tell when it was made."""
    content = cache_content(cache)
    return {
        path: {"attributes": attributes, **{name: (it.dtype, it.shape, it.tobytes()) for name, it in found.items()}}
        for path, (attributes, found) in content.items()
    }


def fresh(robot: Robot, run_here: Callable[..., Any], folder: Path, **settings: Any) -> Any:
    """What a run makes that finds no cache."""
    config = folder / "fresh.yaml"
    content = yaml.safe_load(robot.config.read_text())
    content["datasets"]["robot"]["cache_dir"] = str(folder / "fresh")
    config.write_text(yaml.safe_dump(content))
    assert run_here(config).code == 0
    return datasets(folder / "fresh")


def check_clean(cache: Path) -> None:
    done = run_utils("verify", "--cache-dir", cache, "--deep")
    assert done.returncode == 0, done.stdout
    assert list((cache / ".staging").iterdir()) == []
    assert read_progress(cache)["recut_started"] is None


@pytest.mark.parametrize(
    "settings",
    [
        CUT,
        {"max_chunk_distance_m": 4.0, "overlap_distance_m": 1.0},
        {"chunk_by": "frames", "max_chunk_frames": 7, "overlap_frames": 3},
        {"frame_stride": 2, "position_scale": 0.5, "min_chunk_distance_m": 0.0},
        {"extra_keys": ["speed"], "yaw_offset": 0.5, **CUT},
    ],
    ids="-".join,
)
def test_what_was_stored_is_cut_anew_without_a_model_and_is_what_a_fresh_run_makes(
    robot, run_here, loaded, tmp_path, settings
):
    robot.add("t0", "t1")
    for name in ("t0", "t1"):
        poses = {"position": straight_line(FRAMES), "yaw": np.zeros(FRAMES), "speed": np.arange(FRAMES)}
        (robot.data / name / "traj_data.pkl").unlink()
        np.savez(robot.data / name / "traj_data.npz", **poses)
    robot.configure(tokens=["cls", "patch"])
    assert run_here(robot.config).code == 0
    robot.configure(tokens=["cls", "patch"], **settings)
    loaded.clear()
    before = tree(robot.cache)
    forecast = run_here(robot.config, "--recut", "--dry-run")
    assert forecast.code == 0
    assert re.search(r"to re-cut: 2 completed trajectories \(.*\), of which 0 frames", forecast.out)
    assert "frames to encode: 0" in forecast.out
    assert tree(robot.cache) == before
    outcome = run_here(robot.config, "--recut")
    assert outcome.code == 0, outcome.err
    assert "2 completed (+2), 0 failed" in outcome.out
    assert loaded == []
    check_clean(robot.cache)
    assert run_here(robot.config).code == 0  # confirmed once and for all
    assert loaded == []
    assert datasets(robot.cache) == fresh(robot, run_here, tmp_path)


def test_only_frames_that_were_in_no_chunk_are_encoded_and_each_lands_in_its_place(robot, run_here, loaded, tmp_path):
    """Of 40 frames, pieces of 12, 2, 10, 2 and 14 between jumps: those of 2 are stored only when 0.2 m are enough."""
    position = straight_line(40)
    for jump in (12, 14, 24, 26):
        position[jump:, 1] += 100
    robot.data.mkdir()
    for name, stamp in (("t0", 0), ("t1", 1)):
        make_trajectory(robot.data / name, 40, stamp=stamp, position=position)
    make_trajectory(robot.data / "t2", 20, stamp=2)
    assert run_here(robot.config).code == 0
    robot.add("t3")  # a new one beside them, in the same batches
    robot.configure(min_chunk_distance_m=0.2, **CUT)
    assert "frames to encode: 28" in run_here(robot.config, "--recut", "--dry-run").out
    assert run_here(robot.config, "--recut").code == 0
    assert frames_encoded(loaded) == 2 * 4 + 20
    for stamp in range(4):
        check_stamps(robot.cache, f"t{stamp}", stamp)
    check_clean(robot.cache)
    assert datasets(robot.cache) == fresh(robot, run_here, tmp_path)
