"""CacheWindows: which windows there are, what they hold, and what happens when a cache is not what it should be."""

import importlib.util
import json
import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, Subset

import dino_cache
from dino_cache import CacheWindows, StorageError
from dino_cache_extras.windows import plan_windows
from progress_utils import DamagedChunkError, Progress, RefusedError, cache_lock
from support import (
    ROOT,
    make_trajectory,
    read_chunk,
    read_progress,
    run_utils,
    straight_line,
    write_config,
    write_poses,
)

STAMPS = {"a": (1, 40), "b/c": (2, 25), "d": (3, 12)}  # trajectory -> stamp, frames
POSES = ("position", "yaw", "frame_index", "travelled_distance")


@pytest.fixture
def make_cache(run_here: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """make_cache(name, **settings) -> a cache of STAMPS' trajectories, frames 0.25 m apart, chunks of 2 m."""

    def make(name: str = "robot", **settings: Any) -> Path:
        data = tmp_path / f"data_{name}"
        if not data.exists():
            for trajectory, (stamp, count) in STAMPS.items():
                make_trajectory(data / trajectory, count, stamp=stamp, yaw=np.arange(count) / 100)
        outcome = run_here(write_config(tmp_path / f"{name}.yaml", data, name, **settings), "--yes")
        assert outcome.code == 0, outcome.err
        return data / "dino_cache_small"

    return make


def chunks_of(cache_dir: Path) -> Iterator[tuple[str, int, dict[str, np.ndarray]]]:
    """(trajectory, start, datasets) of every chunk, read with h5py, in order of name and number."""
    for name, record in sorted(read_progress(cache_dir)["trajectory_records"].items()):
        for index, (start, _) in enumerate(record["spans"]):
            yield name, start, read_chunk(cache_dir / name / f"chunk_{index:05d}.h5")[1]


def expected_windows(cache_dir: Path, length: int, stride: int) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """(a chunk's datasets, first row) of each window, frame by frame: the earliest `stride` after the one before."""
    chunks = list(chunks_of(cache_dir))
    for name in dict.fromkeys(name for name, _, _ in chunks):
        own = [(start, data) for other, start, data in chunks if other == name]
        earliest = 0
        for frame in range(own[-1][0] + len(own[-1][1]["yaw"])):
            for start, data in own:
                if frame >= earliest and start <= frame and frame + length <= start + len(data["yaw"]):
                    yield data, frame - start
                    earliest = frame + stride


def assert_same(ours: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(others)
    for key, tensor in ours.items():
        assert tensor.dtype == others[key].dtype
        assert torch.equal(tensor, others[key]), key


def batches(windows: CacheWindows, workers: int = 0, **options: Any) -> list[dict[str, torch.Tensor]]:
    return list(DataLoader(windows, 7, num_workers=workers, **{"collate_fn": windows.collate, **options}))


# ------------------------------------------------------------------------------------------------------ which windows


@given(
    steps=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 12)), min_size=1, max_size=6),
    length=st.integers(1, 10),
    stride=st.integers(1, 7),
)
def test_windows_are_the_earliest_that_fit_a_chunk_each_once(steps, length, stride):
    spans, start, stop = [], 0, 0
    for ahead, more in steps:  # in order, none inside another, overlapping or with gaps
        start, stop = (start + ahead, max(stop + 1, start + ahead + more)) if spans else (0, more)
        spans.append((start, stop))
    expected: list[tuple[int, int]] = []
    for frame in range(stop):
        holders = [n for n, (a, b) in enumerate(spans) if a <= frame and frame + length <= b]
        if holders and (not expected or frame >= expected[-1][1] + stride):
            expected.append((holders[0], frame))
    found = []
    for number, (first, count) in enumerate(plan_windows(["t"] * len(spans), spans, length, stride)):
        found += [(number, first + k * stride) for k in range(count)]
    assert found == expected


@pytest.mark.parametrize(("window", "stride", "frame_step"), [(1, 1, 1), (3, 1, 1), (3, 2, 2), (5, 4, 1), (9, 1, 1)])
def test_every_window_holds_the_rows_of_its_chunk(make_cache, window, stride, frame_step):
    cache = make_cache(tokens=["cls", "patch"])
    windows = CacheWindows(cache, window, stride, frame_step=frame_step, tokens=("cls", "patch"))
    expected = list(expected_windows(cache, (window - 1) * frame_step + 1, stride))
    assert len(windows) == len(expected) > 0
    for index, (data, row) in enumerate(expected):
        sample = windows[index]
        assert set(sample) == {"index", "cls_token", "patch_tokens", *POSES}
        for name in ("cls_token", "patch_tokens", *POSES):
            rows = data[name][row : row + window * frame_step : frame_step][:window]
            np.testing.assert_array_equal(sample[name].numpy(), rows)
            assert sample[name].numpy().dtype == data[name].dtype
        assert sample["index"] == index


def test_frames_tokens_and_poses_are_those_of_the_source(make_cache):
    windows = CacheWindows(make_cache(), 3)
    seen = set()
    for index in range(len(windows)):
        sample, source = windows[index], windows.source(index)
        stamp, count = STAMPS[source.trajectory]
        frames = sample["frame_index"].tolist()
        assert frames == list(range(frames[0], frames[0] + 3))
        assert sample["cls_token"][:, :3].tolist() == [[stamp, 0, frame] for frame in frames]
        np.testing.assert_array_equal(sample["position"], straight_line(count)[frames])
        np.testing.assert_array_equal(sample["yaw"], np.arange(count)[frames] / 100)
        np.testing.assert_allclose(sample["travelled_distance"], 0.25 * np.array(frames))
        file = source.cache_dir / source.trajectory / f"chunk_{source.chunk_index:05d}.h5"
        assert read_chunk(file)[1]["frame_index"][list(source.rows)].tolist() == frames
        assert (stamp, frames[0]) not in seen, "a window appears twice"
        seen.add((stamp, frames[0]))


def test_windows_of_a_trajectory_are_neighbours_in_order_of_cache_and_name(make_cache):
    first, second = make_cache("one"), make_cache("two")
    windows = CacheWindows([second, first], 3)
    ranges = windows.trajectories()
    assert list(ranges) == [(cache, name) for cache in (second, first) for name in ("a", "b/c", "d")]
    assert [index for indices in ranges.values() for index in indices] == list(range(len(windows)))
    for (cache, name), indices in ranges.items():
        assert {windows.source(index)[:2] for index in indices} == {(cache, name)}


def test_a_trajectory_shorter_than_the_window_has_none(make_cache):
    windows = CacheWindows(make_cache(max_chunk_distance_m=50.0), 20)
    assert [len(indices) for indices in windows.trajectories().values()] == [21, 6, 0]
    assert windows[21]["cls_token"][0, 0] == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_come_in_the_dtype_asked_for_and_poses_as_stored(make_cache, dtype):
    cache = make_cache()
    stored, asked = CacheWindows(cache, 4), CacheWindows(cache, 4, dtype=dtype)
    indices = [5, 0, 17]
    for plain, converted in zip(stored.__getitems__(indices), asked.__getitems__(indices)):
        assert_same({**plain, "cls_token": plain["cls_token"].to(dtype)}, converted)


def test_poses_alone_are_read_without_tokens(make_cache):
    assert set(CacheWindows(make_cache(), 4, tokens=())[0]) == {"index", *POSES}


# ------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("collate", ["own", "default"])
def test_workers_give_the_same_batches_as_none(make_cache, collate):
    windows = CacheWindows(make_cache(), 3, goal=(0.3, 1.0), dtype=torch.float32)
    options = {} if collate == "own" else {"collate_fn": None}
    alone = batches(windows, **options)
    assert sum(len(batch["index"]) for batch in alone) == len(windows)
    forked = batches(windows, 2, multiprocessing_context="fork", **options)  # after this process opened files
    assert len(alone) == len(forked)
    for ours, others in zip(alone, forked):
        assert_same(ours, others)


def test_spawned_workers_give_the_same_batches(make_cache):
    windows = CacheWindows(make_cache(), 3, goal=(0.3, 1.0))
    alone = batches(windows)
    for ours, others in zip(alone, batches(windows, 1, multiprocessing_context="spawn"), strict=True):
        assert_same(ours, others)


def test_own_collate_gives_what_torchs_does(make_cache):
    windows = CacheWindows(make_cache(), 3, goal=(0.3, 1.0))
    for ours, others in zip(batches(windows), batches(windows, collate_fn=None), strict=True):
        assert_same(ours, others)
    pairs = torch.utils.data.ConcatDataset([windows, windows])  # fetches one by one
    assert_same(windows.collate([pairs[3], pairs[len(windows) + 4]]), windows.collate(windows.__getitems__([3, 4])))


def test_a_batch_is_one_piece_of_memory(make_cache):
    batch = batches(CacheWindows(make_cache(), 3, goal=(0.3, 1.0)), 1)[0]
    assert len({tensor.untyped_storage().data_ptr() for tensor in batch.values()}) == 1
    assert all(tensor.is_contiguous() for tensor in batch.values())


def test_samplers_of_two_ranks_share_the_windows(make_cache):
    windows = CacheWindows(make_cache(), 3)
    seen = []
    for rank in range(2):
        sampler = DistributedSampler(windows, num_replicas=2, rank=rank, shuffle=True, drop_last=False)
        seen += [index for batch in batches(windows, sampler=sampler) for index in batch["index"].tolist()]
    assert set(seen) == set(range(len(windows)))
    assert len(seen) == len(windows) + len(windows) % 2


def test_a_copy_for_another_process_takes_no_open_file_along_and_reads_the_same(make_cache):
    windows = CacheWindows(make_cache(), 3)
    before = windows[0]
    copy = pickle.loads(pickle.dumps(windows))
    assert_same(copy[0], before)
    assert len(pickle.dumps(windows)) < 20_000


def test_few_chunk_files_are_open_at_a_time(make_cache, monkeypatch):
    monkeypatch.setattr("dino_cache_extras.windows.MAX_OPEN_CHUNKS", 2)
    cache = make_cache()
    windows = CacheWindows(cache, 3)
    assert sum(1 for _ in cache.rglob("chunk_*.h5")) > 4
    for _ in range(2):
        list(windows.__getitems__(range(len(windows))))
        open_files = [os.readlink(f"/proc/self/fd/{number}") for number in descriptors()]
        assert sum(str(cache) in file for file in open_files) == 2


def descriptors() -> list[str]:
    return [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]


def test_subset_and_index_borders(make_cache):
    windows = CacheWindows(make_cache(), 3)
    assert_same(windows[-1], windows[len(windows) - 1])
    for wrong in (len(windows), -len(windows) - 1):
        with pytest.raises(IndexError, match=f"window .* of {len(windows)}"):
            windows[wrong]
    assert [sample["index"].item() for sample in windows] == list(range(len(windows)))
    picked = next(iter(DataLoader(Subset(windows, [9, 2]), 2, collate_fn=windows.collate)))
    assert picked["index"].tolist() == [9, 2]


# ---------------------------------------------------------------------------------------------------------- goals


@pytest.mark.parametrize(("low", "high"), [(0.5, 1.0), (0.0, 0.3), (0.6, 0.7), (1.2, float("inf"))])
def test_goals_are_later_frames_of_the_chunk_within_the_range(make_cache, low, high):
    cache = make_cache()
    windows = CacheWindows(cache, 3, goal=(low, high))
    chosen: dict[int, set[int]] = {}
    for epoch in range(50):
        windows.set_epoch(epoch)
        for sample in windows.__getitems__(range(len(windows))):
            chosen.setdefault(int(sample["index"]), set()).add(int(sample["goal_frame_index"]))
    num_valid = 0
    for index, (data, row) in enumerate(expected_windows(cache, 3, 1)):
        travelled, last = data["travelled_distance"], row + 2
        later = range(last + 1, len(travelled))
        inside = {int(data["frame_index"][k]) for k in later if low <= travelled[k] - travelled[last] <= high}
        sample = windows[index]
        assert sample["goal_valid"] == bool(inside)
        num_valid += bool(inside)
        if inside:
            assert chosen[index] == inside, "in 50 epochs each comes up"
        else:
            beyond = [k for k in later if travelled[k] - travelled[last] > high]
            assert chosen[index] == {int(data["frame_index"][beyond[0] if beyond else -1])}
        goal = int(np.flatnonzero(data["frame_index"] == sample["goal_frame_index"].item())[0])
        for name in ("cls_token", *POSES):
            np.testing.assert_array_equal(sample[f"goal_{name}"].numpy(), data[name][goal])
    assert num_valid > 0 or (low, high) == (0.6, 0.7)  # frames are 0.25 m apart: none is that far


def test_goals_depend_on_seed_epoch_and_index_alone(make_cache):
    cache = make_cache(max_chunk_distance_m=50.0)

    def goals(seed: int, epoch: int, order: list[int]) -> dict[int, int]:
        windows = CacheWindows(cache, 3, goal=(0.0, 9.0), seed=seed)
        windows.set_epoch(epoch)
        batch = windows.collate(windows.__getitems__(order))
        return dict(zip(batch["index"].tolist(), batch["goal_frame_index"].tolist()))

    order = list(range(40))
    first = goals(0, 0, order)
    assert goals(0, 0, order[::-1]) == first
    assert goals(0, 1, order) != first
    assert goals(1, 0, order) != first


def test_a_new_epoch_reaches_workers_that_are_at_work_already(make_cache):
    windows = CacheWindows(make_cache(max_chunk_distance_m=50.0), 3, goal=(0.0, 9.0))
    loader = DataLoader(windows, 16, num_workers=2, persistent_workers=True, collate_fn=windows.collate)
    goals = []
    for epoch in (0, 1, 0):
        windows.set_epoch(epoch)
        goals.append([goal for batch in loader for goal in batch["goal_frame_index"].tolist()])
    assert goals[0] == goals[2] != goals[1]


# ---------------------------------------------------------------------------------------------- what is refused


def test_no_record_is_refused(tmp_path):
    with pytest.raises(RefusedError, match=rf"{tmp_path}: no progress.json here"):
        CacheWindows(tmp_path, 3)


def test_an_empty_cache_is_refused(tmp_path):
    Progress(tmp_path, "robot").save()
    with pytest.raises(RefusedError, match=rf"{tmp_path}/progress.json: no trajectory is completed yet"):
        CacheWindows(tmp_path, 3)


def test_a_newer_or_corrupt_record_is_refused(make_cache):
    cache = make_cache()
    content = read_progress(cache)
    for text, message in (
        (json.dumps({**content, "format_version": 2}), "progress.json: format_version is 2.*Update the program"),
        ("{", "progress.json: not a usable progress record"),
    ):
        (cache / "progress.json").write_text(text)
        with pytest.raises(RefusedError, match=message):
            CacheWindows(cache, 3)


@pytest.mark.parametrize(
    "spans", [[[0, 9], [0, 12]], [[5, 9], [2, 12]], [[0, 9], [3, 8]], [[-1, 5]], [[4, 4]], [[0, 2**70]]]
)
def test_spans_that_no_plan_makes_are_refused(make_cache, spans):
    cache = make_cache()
    content = read_progress(cache)
    content["trajectory_records"]["b/c"].update(spans=spans, bytes=[1] * len(spans))
    (cache / "progress.json").write_text(json.dumps(content))
    with pytest.raises(RefusedError, match=r"progress.json: not a usable progress record.*rebuild"):
        CacheWindows(cache, 3)


def test_a_mixed_cache_is_refused_unless_allowed(make_cache, tmp_path):
    cache = make_cache()
    make_trajectory(tmp_path / "data_robot" / "e", 30, stamp=5)
    make_cache(max_chunk_distance_m=3.0)
    with pytest.raises(RefusedError, match=r"progress.json: mixed.*max_chunk_distance_m: (2.0 or 3.0|3.0 or 2.0)"):
        CacheWindows(cache, 3)
    assert (cache, "e") in CacheWindows(cache, 3, allow_mixed=True).trajectories()


def test_caches_of_different_features_are_refused_unless_allowed(make_cache):
    first, second = make_cache("one"), make_cache("two", pixel_mean=[0.5, 0.5, 0.5])
    with pytest.raises(RefusedError, match=rf"{second}/progress.json: mixed.*{first}.*pixel_mean"):
        CacheWindows([first, second], 3)
    both = CacheWindows([first, second], 3, allow_mixed=True)
    assert len(both) == 2 * len(CacheWindows(first, 3))
    other_weights = make_cache("three", weights=str(weights_file(first)))
    with pytest.raises(RefusedError, match="weights_digest"):
        CacheWindows([first, other_weights], 3)


def weights_file(folder: Path) -> Path:
    path = folder / "weights.pth"
    path.write_bytes(b"StampEncoder takes its place")
    return path


def test_caches_cut_differently_are_read_together(make_cache):
    caches = [make_cache("one"), make_cache("two", max_chunk_distance_m=3.0, frame_stride=2, tokens=["cls", "patch"])]
    assert len(CacheWindows(caches, 3)) == sum(len(CacheWindows(cache, 3)) for cache in caches)


def test_tokens_that_do_not_fit_into_one_batch_are_refused_even_if_mixed_is_allowed(make_cache):
    caches = [make_cache("one", tokens=["patch"]), make_cache("two", tokens=["patch"], image_size=[28, 28])]
    with pytest.raises(RefusedError, match=r"two.*chunk_00000.h5: patch_tokens of a frame is \(2, 2, 4\).*\(2, 3, 4\)"):
        CacheWindows(caches, 3, tokens="patch", allow_mixed=True)


def test_tokens_that_a_cache_lacks_are_refused(make_cache):
    cache = make_cache()
    with pytest.raises(RefusedError, match=rf"{cache}/.*: tokens: patch is asked for, and this cache holds cls"):
        CacheWindows(cache, 3, tokens=("cls", "patch"))


def test_arguments_that_make_no_sense_are_refused(make_cache):
    cache = make_cache()
    longest = max(len(data["yaw"]) for _, _, data in chunks_of(cache))
    for message, arguments in (
        ("window: 0 must be at least 1", {"window": 0}),
        ("stride: -1", {"window": 3, "stride": -1}),
        ("tokens: 'clss' is none of cls, patch, register", {"window": 3, "tokens": "clss"}),
        ("goal: ", {"window": 3, "goal": (2.0, 1.0)}),
        ("dtype: torch.int64", {"window": 3, "dtype": torch.int64}),
        (rf"{cache}/.*h5: a window spans {longest + 1} frames.* has {longest}", {"window": longest + 1}),
    ):
        with pytest.raises(RefusedError, match=message):
            CacheWindows(cache, **arguments)
    with pytest.raises(RefusedError, match=f"cache_dirs: {cache} is given twice"):
        CacheWindows([cache, f"{cache}/"], 3)
    with pytest.raises(RefusedError, match="cache_dirs: no cache folder"):
        CacheWindows([], 3)


# --------------------------------------------------------------------------------- files that are not what they were


def window_in(windows: CacheWindows, trajectory: str, chunk_index: int) -> int:
    return next(i for i in range(len(windows)) if windows.source(i)[1:3] == (trajectory, chunk_index))


@pytest.mark.parametrize("damage", ["gone", "shorter", "attributes"])
def test_a_chunk_that_is_not_as_recorded_is_an_error_that_names_it(make_cache, damage):
    cache = make_cache()
    windows = CacheWindows(cache, 3)
    file = cache / "a" / "chunk_00002.h5"
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    elif damage == "shorter":
        file.write_bytes(content[:-1])
    else:
        content[content.index(b"robot")] ^= 1
        file.write_bytes(content)
    expected = {"gone": "not there", "shorter": "bytes, recorded are", "attributes": "digest"}
    with pytest.raises(DamagedChunkError, match=rf"{file}: .*{expected[damage]}.*verify --cache-dir {cache} --deep"):
        windows[window_in(windows, "a", 2)]
    assert windows[window_in(windows, "a", 1)]["cls_token"][0, 0] == 1
    loader = DataLoader(windows, 8, num_workers=1, collate_fn=windows.collate)
    with pytest.raises(DamagedChunkError, match=f"{file}: "):
        list(loader)


def test_chunks_of_a_newer_format_are_refused(make_cache, monkeypatch, tmp_path):
    cache = make_cache()
    with monkeypatch.context() as newer:
        newer.setattr(dino_cache, "CHUNK_FORMAT_VERSION", 2)
        make_trajectory(tmp_path / "data_robot" / "e", 30, stamp=5)
        make_cache()
    windows = CacheWindows(cache, 3)
    with pytest.raises(DamagedChunkError, match=r"e/chunk_00000.h5: format_version is 2, known is 1; .*update"):
        windows[window_in(windows, "e", 0)]
    shutil.rmtree(cache / "a")
    (cache / "e").rename(cache / "a")
    with pytest.raises(DamagedChunkError, match=r"a/chunk_00000.h5: .*format_version is 2, known is 1; .*update"):
        CacheWindows(cache, 3)


def test_a_missing_cache_is_an_error_at_once(make_cache):
    cache = make_cache()
    shutil.rmtree(cache / "a")
    with pytest.raises(DamagedChunkError, match=rf"{cache}/a/chunk_00000.h5: recorded, but not there"):
        CacheWindows(cache, 3)


def test_a_file_cut_short_while_it_is_open_is_an_error(make_cache):
    cache = make_cache(tokens=["cls", "patch"])
    windows = CacheWindows(cache, 3, tokens="patch")
    index = window_in(windows, "a", 1)
    assert windows[index]["patch_tokens"][0, 0, 0, 0] == 1
    os.truncate(cache / "a" / "chunk_00001.h5", 600)
    with pytest.raises(DamagedChunkError, match=r"a/chunk_00001.h5: it ends early"):
        windows[index]


def test_a_disk_that_cannot_be_read_is_a_storage_error(make_cache, monkeypatch):
    cache = make_cache()
    windows = CacheWindows(cache, 3)

    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError, match=rf"{cache}/a/chunk_00000.h5: cannot read: Input/output error"):
        windows[0]


def test_a_trajectory_redone_meanwhile_gives_old_bytes_or_an_error_never_a_mix(make_cache, tmp_path):
    cache = make_cache()
    sizes = {path: path.stat().st_size for path in cache.rglob("chunk_*.h5")}
    windows = CacheWindows(cache, 3)
    opened, unopened = window_in(windows, "a", 0), window_in(windows, "a", 1)
    before = windows[opened]
    write_poses(tmp_path / "data_robot" / "a", straight_line(40), np.arange(40) / 100 + 1)
    make_cache()
    assert {path: path.stat().st_size for path in cache.rglob("chunk_*.h5")} == sizes
    assert_same(windows[opened], before)
    with pytest.raises(
        DamagedChunkError, match=r"a/chunk_00001.h5: it was made from other data.*make the dataset anew"
    ):
        windows[unopened]
    assert windows[window_in(windows, "d", 0)]["cls_token"][0, 0] == 3
    assert CacheWindows(cache, 3)[opened]["yaw"][0] == before["yaw"][0] + 1


def test_a_checksum_recorded_anew_of_another_kind_is_no_difference(make_cache):
    make_cache()
    assert len(CacheWindows(make_cache(checksum="content"), 3)) > 0


@pytest.mark.parametrize(("kind", "other"), [("stat", "content"), ("content", "stat")])
def test_a_trajectory_redone_meanwhile_under_another_kind_of_checksum_is_an_error(make_cache, tmp_path, kind, other):
    cache = make_cache(checksum=kind)
    windows = CacheWindows(cache, 3)
    write_poses(tmp_path / "data_robot" / "a", straight_line(40), np.arange(40) / 100 + 1)
    make_cache(checksum=other)
    with pytest.raises(DamagedChunkError, match=rf"a/chunk_00001.h5: it was recorded anew: .*{kind}:.*{other}:"):
        windows[window_in(windows, "a", 1)]


def test_chunks_recorded_anew_of_another_kind_are_read_until_they_are_redone(make_cache, tmp_path):
    make_cache()
    cache = make_cache(checksum="content")
    windows = CacheWindows(cache, 3)
    assert windows[window_in(windows, "a", 1)]["cls_token"][0, 0] == 1
    write_poses(tmp_path / "data_robot" / "a", straight_line(40), np.arange(40) / 100 + 1)
    make_cache()
    with pytest.raises(DamagedChunkError, match=r"a/chunk_00002.h5: it was recorded anew"):
        windows[window_in(windows, "a", 2)]
    (cache / "progress.json").unlink()
    with pytest.raises(DamagedChunkError, match=r"a/chunk_00003.h5: the record can no longer be read"):
        windows[window_in(windows, "a", 3)]


# ---------------------------------------------------------------------------------------------------- the kept index


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], list[Path]]:
    """Every record's index is kept, as a large one's; returns the index files of a cache."""
    monkeypatch.setattr("dino_cache_extras.cache_index.MIN_INDEXED_BYTES", 0)
    return lambda cache: sorted(cache.glob(".index-*"))


def test_a_small_record_leaves_no_index(make_cache):
    cache = make_cache()
    before = sorted(os.listdir(cache))
    CacheWindows(cache, 3)
    assert sorted(os.listdir(cache)) == before


def test_the_second_start_takes_the_index_and_finds_the_same_windows(make_cache, kept, monkeypatch):
    cache = make_cache()
    first = CacheWindows(cache, 3)
    assert len(kept(cache)) == 1
    monkeypatch.setattr(Progress, "parse", None)
    second = CacheWindows(cache, 3)
    assert second.trajectories() == first.trajectories()
    for ours, others in zip(batches(first), batches(second), strict=True):
        assert_same(ours, others)


def test_an_index_is_valid_for_its_own_record_only_and_stale_ones_go(make_cache, kept, tmp_path):
    cache = make_cache()
    CacheWindows(cache, 3)
    old = kept(cache)
    make_trajectory(tmp_path / "data_robot" / "e", 30, stamp=5)
    make_cache()
    assert (cache, "e") in CacheWindows(cache, 3).trajectories()
    assert len(kept(cache)) == 1
    assert kept(cache) != old


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no index"])
def test_a_broken_index_is_made_anew(make_cache, kept, content):
    cache = make_cache()
    expected = CacheWindows(cache, 3).trajectories()
    (file,) = kept(cache)
    whole = file.read_bytes()
    for damaged in (content, whole[: len(whole) // 2], whole.replace(b"b/c", b"b/x")):
        file.write_bytes(damaged)
        assert CacheWindows(cache, 3).trajectories() == expected


def test_no_index_is_written_where_a_run_holds_the_cache_or_the_folder_cannot_be_written(make_cache, kept, monkeypatch):
    cache = make_cache()
    with cache_lock(cache):
        assert len(CacheWindows(cache, 3)) > 0
    assert kept(cache) == []

    def refuse(**_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(dino_cache.tempfile, "NamedTemporaryFile", refuse)
    assert len(CacheWindows(cache, 3)) > 0
    assert kept(cache) == []


def test_verify_and_the_next_run_leave_an_index_alone(make_cache, kept):
    cache = make_cache()
    CacheWindows(cache, 3)
    assert len(kept(cache)) == 1
    outcome = run_utils("verify", "--cache-dir", cache)
    assert (outcome.returncode, outcome.stdout.splitlines()[-1]) == (0, "Sound")
    make_cache()
    assert len(CacheWindows(cache, 3)) > 0
    assert len(kept(cache)) == 1


# -------------------------------------------------------------------------------------------------------- the example


def test_example_learns_on_the_sample_and_workers_give_it_the_same_batches(tmp_path):
    config = yaml.safe_load((ROOT / "config" / "data" / "sample.yaml").read_text())
    config |= {"tokens": ["cls"], "image_size": [28, 42], "precision": "fp32", "device": "cpu"}
    cache = tmp_path / "cache"
    config["datasets"]["rendered_rooms"] = {"data_folder": str(ROOT / "sample/rendered_rooms"), "cache_dir": str(cache)}
    (tmp_path / "sample.yaml").write_text(yaml.safe_dump(config))
    before = {number: signal.getsignal(number) for number in dino_cache.STOP_SIGNALS}
    try:
        assert dino_cache.main(["--config", str(tmp_path / "sample.yaml")]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    example = load_example()
    alone, workers = (example.main([str(cache), "--epochs", "8", "--workers", count]) for count in ("0", "2"))
    assert alone == workers
    assert alone.train[-1] < 0.8 * alone.train[0]
    assert sum(after < before for before, after in pairwise(alone.train)) >= 5


def load_example() -> Any:
    spec = importlib.util.spec_from_file_location("train_next_cls", ROOT / "examples" / "train_next_cls.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
