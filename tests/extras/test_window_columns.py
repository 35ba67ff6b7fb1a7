"""CacheWindows: columns that come along, and several cameras."""

import shutil

import h5py
import numpy as np
import pytest
import torch
from cache_support import Robot, tokens_of, write_cache
from torch.utils.data import DataLoader

from dino_cache import CacheWindows
from dino_cache_extras.chunk_files import read_chunk_header
from progress_utils import DamagedChunkError, RefusedError
from support import ROOT, straight_line


def robot(stamp: int, count: int = 30, *drop: str) -> Robot:
    """A trajectory with columns of several types, less those in `drop`."""
    rng = np.random.default_rng(stamp)
    delta = np.tile([0.25, 0.0, 0.0], (count, 1))
    delta[-1] = np.nan
    columns = {
        "timestamp": np.arange(count) / 4,
        "delta": delta,
        "extra/action": rng.normal(size=(count, 7)).astype(np.float32),
        "extra/gear": rng.integers(-1, 6, count).astype(np.int16),
        "extra/brake": rng.integers(0, 2, count).astype(bool),
        "extra/scan": np.where(rng.random((count, 3, 2)) < 0.2, np.nan, 1.5),
    }
    kept = {name: values for name, values in columns.items() if name not in drop}
    return Robot(stamp, straight_line(count), np.zeros(count), columns=kept)


ALL = ("timestamp", "delta", "action", "gear", "brake", "scan")
DATASETS = ("timestamp", "delta", "extra/action", "extra/gear", "extra/brake", "extra/scan")


# ----------------------------------------------------------------------------------------------------------- columns


def test_columns_come_as_they_are_in_the_file(tmp_path):
    robots = {"a": robot(1), "b": robot(2, 12)}
    windows = CacheWindows(write_cache(tmp_path / "c", robots), 3, frame_step=2, extra=ALL, goal_steps=(1, 4))
    plain = CacheWindows(tmp_path / "c", 3, frame_step=2, goal_steps=(1, 4))
    for sample, before in zip(windows.__getitems__(range(len(windows))), plain.__getitems__(range(len(plain)))):
        source = windows.source(int(sample["index"]))
        rows = sample["frame_index"].numpy()
        for name in DATASETS:
            values = robots[source.trajectory].columns[name]
            for key, chosen in ((name, rows), (f"goal_{name}", int(sample["goal_frame_index"]))):
                np.testing.assert_array_equal(sample[key].numpy(), values[chosen])
                assert sample[key].numpy().dtype == values.dtype
        assert {key: values for key, values in sample.items() if key in before}.keys() == before.keys()
        assert set(sample) - set(before) == {*DATASETS, *(f"goal_{name}" for name in DATASETS)}
        assert torch.equal(sample["cls_token"], before["cls_token"])


def test_columns_are_sealed_and_a_changed_byte_is_found(tmp_path):
    cache = write_cache(tmp_path / "c", {"a": robot(1)})
    path = cache / "a" / "chunk_00001.h5"
    assert set(DATASETS) <= set(read_chunk_header(path, deep=True).datasets)
    with h5py.File(path) as file:
        offset = file["extra/action"].id.get_offset()
    content = bytearray(path.read_bytes())
    content[offset + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedChunkError, match="the bytes of extra/action do not match their digest"):
        read_chunk_header(path, deep=True)


def test_workers_give_the_same_columns(tmp_path):
    windows = CacheWindows(write_cache(tmp_path / "c", {"a": robot(1)}), 3, extra=ALL, dtype=torch.float32)
    alone = list(DataLoader(windows, 5, collate_fn=windows.collate))
    for ours, others in zip(alone, DataLoader(windows, 5, num_workers=2), strict=True):
        assert list(ours) == list(others)
        for key, values in ours.items():
            np.testing.assert_array_equal(values.numpy(), others[key].numpy())
    assert alone[0]["extra/action"].dtype == torch.float32
    assert alone[0]["extra/brake"].dtype == torch.bool
    assert CacheWindows(tmp_path / "c", 3, extra="gear")[0]["extra/gear"].dtype == torch.int16


def test_chunks_that_lack_a_column_are_counted_and_the_remedy_named(tmp_path):
    robots = {"a": robot(1, 30, "timestamp", "extra/gear"), "b": robot(2), "c": robot(3, 12, "timestamp")}
    cache = write_cache(tmp_path / "c", robots)
    counts = {name: len(list((cache / name).iterdir())) for name in robots}
    total = sum(counts.values())
    lacking = counts["a"] + counts["c"]
    with pytest.raises(
        RefusedError,
        match=rf"^{cache}: extra: {lacking} of its {total} chunks have no timestamp, the first is "
        rf"{cache}/a/chunk_00000.h5\. .*reset --cache-dir {cache}. and a run make it anew, or leave it out$",
    ):
        CacheWindows(cache, 3, extra=("delta", "timestamp"))
    with pytest.raises(
        RefusedError, match=rf"{counts['a']} of its {total} chunks have no extra/gear.*extra_keys.*gear"
    ):
        CacheWindows(cache, 3, extra="gear")
    with pytest.raises(RefusedError, match=rf"{total} of its {total} chunks have no extra/wheel.*extra_keys"):
        CacheWindows(cache, 3, extra="wheel")
    assert "delta" in CacheWindows(cache, 3, extra="delta")[0]


def test_a_cache_of_the_first_version_lacks_all_columns(tmp_path):
    shutil.copytree(ROOT / "tests/pinned/gnm/cache", tmp_path / "cache")
    with pytest.raises(RefusedError, match=r"3 of its 3 chunks have no delta.*Earlier versions stored none"):
        CacheWindows(tmp_path / "cache", 2, extra=["delta"])


def test_columns_that_do_not_fit_into_one_batch_are_refused(tmp_path):
    second = robot(2)
    second.columns["extra/action"] = second.columns["extra/action"].astype(np.float64)
    cache = write_cache(tmp_path / "c", {"a": robot(1), "b": second})
    with pytest.raises(
        RefusedError,
        match=rf"{cache}/b/chunk_00000.h5: extra: extra/action of a frame is \(7,\) float64, elsewhere \(7,\) float32",
    ):
        CacheWindows(cache, 3, extra="action")
    assert "extra/gear" in CacheWindows(cache, 3, extra="gear")[0]


@pytest.mark.parametrize("dtype", [">f4", "<f16", "<c8"])
def test_columns_that_no_tensor_can_hold_are_refused(tmp_path, dtype):
    column = robot(1)
    column.columns["extra/odd"] = np.ones(30, dtype)
    cache = write_cache(tmp_path / "c", {"a": column})
    with pytest.raises((RefusedError, DamagedChunkError), match=rf"extra/odd is .*{dtype}"):
        CacheWindows(cache, 3, extra="odd")


def test_a_column_that_is_called_as_ours_is_told_apart(tmp_path):
    with_both = robot(1)
    with_both.columns["extra/timestamp"] = np.arange(30, dtype=np.int64) * 1000
    sample = CacheWindows(write_cache(tmp_path / "c", {"a": with_both}), 2, extra=("timestamp", "extra/timestamp"))[3]
    assert sample["timestamp"].tolist() == [0.75, 1.0]
    assert sample["extra/timestamp"].tolist() == [3000, 4000]


# ----------------------------------------------------------------------------------------------------------- cameras


def test_all_cameras_come_unless_some_are_named(tmp_path):
    cache = write_cache(tmp_path / "c", {"a": robot(1), "b": robot(2)}, cameras=("front", "left", "rear"))
    places = {"front": 0, "left": 1, "rear": 2}
    for asked, expected in (
        (None, ["front", "left", "rear"]),
        (("rear", "front"), ["rear", "front"]),
        ("left", ["left"]),
    ):
        windows = CacheWindows(cache, 3, cameras=asked, goal_steps=(1, 3), negatives=0.3, waypoints=2)
        for index in (0, 20, len(windows) - 1):
            sample = windows[index]
            stamp = {"a": 1, "b": 2}[windows.source(index).trajectory]
            assert [key for key in sample if key.endswith("cls_token") and "goal" not in key] == [
                f"{camera}/cls_token" for camera in expected
            ]
            goal_stamp = 3 - stamp if sample["is_negative"] else stamp
            for camera in expected:
                tokens = sample[f"{camera}/cls_token"].numpy()
                np.testing.assert_array_equal(tokens, tokens_of(stamp, sample["frame_index"].numpy(), places[camera]))
                goal = tokens_of(goal_stamp, sample["goal_frame_index"].numpy()[None], places[camera])[0]
                np.testing.assert_array_equal(sample[f"goal_{camera}/cls_token"].numpy(), goal)
    assert CacheWindows(cache, 3, cameras="left", dtype=torch.float64)[0]["left/cls_token"].dtype == torch.float64
    assert not any("token" in key for key in CacheWindows(cache, 3, tokens=())[0])


def test_cameras_that_are_not_there_are_refused_with_those_that_are(tmp_path):
    several = write_cache(tmp_path / "several", {"a": robot(1)}, cameras=("front", "left"))
    one = write_cache(tmp_path / "one", {"a": robot(1)})
    with pytest.raises(RefusedError, match=rf"^{several}: cameras: 'rear' is not there; it has front, left$"):
        CacheWindows(several, 3, cameras=("front", "rear"))
    with pytest.raises(RefusedError, match=rf"^{one}: cameras: 'front' is not there; it has one camera, .* no name"):
        CacheWindows(one, 3, cameras="front")
    with pytest.raises(RefusedError, match="cameras: 'left' is given twice"):
        CacheWindows(several, 3, cameras=("left", "left"))
    with pytest.raises(RefusedError, match="cameras: name one"):
        CacheWindows(several, 3, cameras=())


@pytest.mark.parametrize("tokens", ["cls", ()])
def test_one_and_several_cameras_do_not_mix(tmp_path, tokens):
    one = write_cache(tmp_path / "one", {"a": robot(1)})
    several = write_cache(tmp_path / "several", {"a": robot(1)}, cameras=("front", "left"))
    for caches in ([one, several], [several, one]):
        with pytest.raises(RefusedError, match=rf"^{caches[1]}: cameras: it has .*, and {caches[0]} has .*"):
            CacheWindows(caches, 3, tokens=tokens, allow_mixed=True)


def test_caches_with_different_cameras_are_read_by_those_that_both_have(tmp_path):
    first = write_cache(tmp_path / "one", {"a": robot(1)}, cameras=("front", "left"))
    second = write_cache(tmp_path / "two", {"a": robot(2)}, cameras=("front", "rear"))
    with pytest.raises(
        RefusedError, match=rf"^{second}: cameras: it has front, rear, and {first} has front, left; read"
    ):
        CacheWindows([first, second], 3, allow_mixed=True)
    windows = CacheWindows([first, second], 3, cameras=["front"], allow_mixed=True)
    assert [int(windows[index]["front/cls_token"][0, 0]) for index in (0, len(windows) - 1)] == [1, 2]
