"""Caches cut by number of frames, whose trajectories may lack poses: reader, export, report and forecast of them."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

import progress_utils
from dino_cache import CacheWindows, RefusedError
from support import FIRST, SECOND, Outcome, read_chunk, read_progress, tree, write_gnm

BY_FRAMES = {"chunk_by": "frames", "max_chunk_frames": 10, "overlap_frames": 2}


@pytest.fixture
def make_cache(run_bits: Callable[..., Outcome], tmp_path: Path) -> Callable[..., Path]:
    """make_cache(names of those that lack poses, settings) -> a cache of t1 and t2."""

    def make(*bare: str, **settings: Any) -> Path:
        write_gnm(tmp_path / "data", [FIRST, SECOND])
        for name in bare:
            (tmp_path / "data" / name / "traj_data.pkl").unlink()
        outcome = run_bits({**BY_FRAMES, **settings})
        assert outcome.code == 0, outcome.err
        return tmp_path / "cache"

    return make


def utils(command: str, cache: Path, *arguments: str) -> int:
    return progress_utils.main([command, "--cache-dir", str(cache), *arguments])


# ------------------------------------------------------------------------------------------------------------- reader


def test_a_sample_holds_the_poses_that_there_are(make_cache):
    windows = CacheWindows(make_cache("t1", "t2"), 3)
    assert set(windows[0]) == {"index", "cls_token", "frame_index"}
    numbers = set()
    for index in range(len(windows)):
        sample, source = windows[index], windows.source(index)
        stamp = int(source.trajectory[1:])
        assert sample["cls_token"][:, 0].tolist() == [stamp] * 3
        assert sample["cls_token"][:, 2].tolist() == sample["frame_index"].tolist()
        numbers |= {(stamp, number) for number in sample["frame_index"].tolist()}
    assert numbers == {(1, number) for number in range(40)} | {(2, number) for number in range(27)}


def test_poses_that_only_the_first_trajectory_has_are_nan_in_the_others(make_cache):
    windows = CacheWindows(make_cache("t2"), 4)
    assert set(windows[0]) == {"index", "cls_token", "position", "yaw", "frame_index"}
    of = windows.trajectories()
    for (_, name), indices in of.items():
        batch = windows.collate(windows.__getitems__(list(indices)))
        rows = batch["frame_index"]
        if name == "t1":
            np.testing.assert_array_equal(batch["position"], FIRST.position[rows])
            np.testing.assert_array_equal(batch["yaw"], FIRST.yaw[rows])
        else:
            assert batch["position"].shape == (len(indices), 4, 2)
            assert batch["position"].isnan().all()
            assert batch["yaw"].isnan().all()
        assert torch.equal(batch["cls_token"][..., 2].long(), rows)


def test_poses_that_the_first_trajectory_lacks_are_in_no_sample(make_cache):
    windows = CacheWindows(make_cache("t1"), 4)
    assert {key for index in range(len(windows)) for key in windows[index]} == {"index", "cls_token", "frame_index"}


def test_a_goal_by_distance_is_refused_where_there_are_no_distances(make_cache):
    cache = make_cache()  # with poses: distances are not stored all the same
    assert "position" in CacheWindows(cache, 4)[0]
    with pytest.raises(RefusedError, match=r"t1/chunk_00000.h5: goal: .*chunk_by: frames"):
        CacheWindows(cache, 4, goal=(0.5, 1.0))


def test_caches_cut_by_distance_and_by_frames_are_read_together(make_cache, run_bits, tmp_path):
    by_frames = make_cache("t2")
    (tmp_path / "data" / "t2").rename(tmp_path / "t2")
    by_distance = tmp_path / "by_distance"
    assert run_bits({"cache_dir": str(by_distance)}).code == 0
    windows = CacheWindows([by_distance, by_frames], 4)
    assert set(windows[0]) == {"index", "cls_token", "position", "yaw", "frame_index"}
    assert len(windows.trajectories()) == 3
    with pytest.raises(RefusedError, match=rf"{by_frames}/t1.*goal"):
        CacheWindows([by_distance, by_frames], 4, goal=(0.5, 1.0))
    assert "goal_position" in CacheWindows(by_distance, 4, goal=(0.5, 1.0))[0]


# ------------------------------------------------------------------------------------------------------------- export


def read_columns(path: Path) -> dict[str, np.ndarray]:
    with h5py.File(path) as file:
        return {name: file[name][...] for name in file}


@pytest.mark.parametrize("overlap", [0, 2])
def test_flat_leaves_out_the_columns_that_no_trajectory_has_and_knows_no_gaps(make_cache, tmp_path, overlap):
    cache = make_cache("t1", "t2", overlap_frames=overlap)
    assert utils("export", cache, "--to", "flat", "-o", str(tmp_path / "o.h5")) == 0
    columns = read_columns(tmp_path / "o.h5")
    assert columns.keys() == {"cls_token", "frame_index", "ep_idx", "step_idx", "ep_len", "ep_offset"}
    assert columns["ep_len"].tolist() == [40, 27]
    assert columns["frame_index"].tolist() == [*range(40), *range(27)]
    assert columns["cls_token"][:, 0].tolist() == [1] * 40 + [2] * 27


@pytest.mark.parametrize("bare", ["t1", "t2"])
def test_flat_has_nan_where_only_other_trajectories_have_poses(make_cache, tmp_path, bare):
    assert utils("export", make_cache(bare), "--to", "flat", "-o", str(tmp_path / "o.h5")) == 0
    columns = read_columns(tmp_path / "o.h5")
    assert "travelled_distance" not in columns
    for name, rows, trajectory in (("t1", slice(0, 40), FIRST), ("t2", slice(40, 67), SECOND)):
        expected = np.full((trajectory.count, 2), np.nan) if name == bare else trajectory.position
        np.testing.assert_array_equal(columns["position"][rows], expected)
        assert np.isnan(columns["yaw"][rows]).all() == (name == bare)


def test_vint_holds_chunks_by_frames_that_have_poses(make_cache, tmp_path):
    cache = make_cache()
    assert utils("export", cache, "--to", "vint", "-o", str(tmp_path / "out")) == 0
    metadata = json.loads((tmp_path / "out" / "cache_metadata.json").read_text())
    assert metadata["max_chunk_distance_m"] is metadata["overlap_distance_m"] is None
    assert metadata["chunks"][:5] == [f"t1_{start:05d}" for start in (0, 8, 16, 24, 32)]
    chunk = torch.load(tmp_path / "out" / "t1_00008.pt", weights_only=True)
    assert chunk["indices"] == list(range(8, 18))
    np.testing.assert_array_equal(np.array(chunk["positions"]), FIRST.position[8:18])


def test_vint_is_refused_without_poses_and_leaves_nothing(make_cache, tmp_path, capsys):
    cache = make_cache("t2")
    before = tree(tmp_path)
    assert utils("export", cache, "--to", "vint", "-o", str(tmp_path / "out")) == 2
    message = capsys.readouterr().err
    assert f"{cache}/t2/chunk_00000.h5" in message
    assert "--to flat" in message
    assert tree(tmp_path) == before


# ------------------------------------------------------------------------------------------- report, forecast, record


def cards(page: str) -> dict[str, str]:
    """Trajectory -> its card."""
    return dict(re.findall(r"<figure><figcaption><b>(\w+)</b>(.*?)</figure>", page, flags=re.DOTALL))


@pytest.mark.parametrize("overlap", [0, 2])
def test_a_report_says_why_there_is_no_map_and_no_distance_and_shows_the_rest(make_cache, tmp_path, overlap):
    cache = make_cache("t2", overlap_frames=overlap)
    assert utils("report", cache, "-o", str(tmp_path / "r.html")) == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count("No travelled distances: the chunks were cut by number of frames") == 1
    assert "chunk distance [m]" not in page
    assert "not looked for: chunk_by: frames" in page
    assert "<td>67</td>" in page  # frames of the run that made it
    assert "not as recorded" not in page
    bare, whole = cards(page)["t2"], cards(page)["t1"]
    assert "No map: it has no positions" in bare
    assert "x [m]" not in bare
    assert "x [m]" in whole
    assert all("cosine similarity" in card and "pose jump" not in card for card in (bare, whole))


def test_the_forecast_counts_the_poses_that_there_are(run_bits, tmp_path):
    write_gnm(tmp_path / "data", [FIRST])

    def told(*arguments: str) -> int:
        outcome = run_bits(BY_FRAMES, "--dry-run", *arguments)
        assert outcome.code == 0
        return int(re.search(r"bytes they take: (\d+)", outcome.out)[1])

    with_poses = told("--measure")
    (tmp_path / "data/t1/traj_data.pkl").unlink()
    assert with_poses - told() == 48 * (2 + 1 + 3) * 8  # chunks 0-9, 8-17, 16-25, 24-33, 32-39: position, yaw, delta
    assert run_bits(BY_FRAMES).code == 0
    taken = sum(path.stat().st_size for path in (tmp_path / "cache/t1").iterdir())
    assert taken <= with_poses <= 2 * taken


def test_verify_show_and_rebuild_know_chunks_without_poses(make_cache, capsys):
    cache = make_cache("t2")
    assert utils("verify", cache, "--deep") == 0
    before = read_progress(cache)
    assert utils("rebuild", cache, "--yes") == 0
    after = read_progress(cache)
    for key in ("trajectory_records", "specs", "data_folder", "data_format", "num_trajectories"):
        assert after[key] == before[key]
    capsys.readouterr()
    assert utils("show", cache) == 0
    assert "Total chunks generated: 9" in capsys.readouterr().out
    with h5py.File(cache / "t1" / "chunk_00000.h5", "r+") as file:
        del file["position"]  # not the same as never written
    assert utils("verify", cache) == 1
    with pytest.raises(Exception, match=r"t1/chunk_00000.h5"):
        CacheWindows(cache, 4)
    assert "position" in read_chunk(cache / "t1" / "chunk_00001.h5")[1]
