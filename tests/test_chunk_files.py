"""What a chunk file holds, byte by byte, and how files and folders become final. Digests are computed anew here."""

import gc
import hashlib
import importlib.metadata
import json
import math
import multiprocessing
import os
import resource
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from dino_cache import ChunkStore, EncodedRows, Hooks, InputError, ModelShape, StorageError
from support import (
    StampEncoder,
    cache_command,
    check_stamps,
    chunk_files,
    make_trajectory,
    read_chunk,
    stream_results,
    write_config,
    write_frame,
)

FRAMES = 40  # of the trajectory in `cached`, every second one kept: 20
SHAPE = ModelShape(patch_size=14, width=4, num_registers=3)
TOKENS = {"cls_token": (4,), "patch_tokens": (2, 3, 4), "register_tokens": (3, 4)}
SPANS = [(0, 9), (6, 15), (12, 20)]  # 0.25 m between kept frames: 2 m are 8 steps, an overlap of 0.5 m is 2
POSES = {"position": (2,), "yaw": (), "frame_index": (), "travelled_distance": (), "delta": (3,)}
ATTRIBUTES = {
    "format", "format_version", "dataset_name", "trajectory", "chunk_index", "num_chunks", "start", "stop", "spec",
    "fingerprint", "weights_digest", "trajectory_checksum", "checksum_kind", "versions", "created_at",
    "attributes_digest",
}  # fmt: skip


def expected_tokens(name: str, frames: np.ndarray) -> np.ndarray:
    """(n, ...) float16: source frame number plus 1/16 of the place within the frame's tokens, exact in float16."""
    shape = TOKENS[name]
    within = np.arange(math.prod(shape)).reshape(shape) / 16
    return (frames.reshape(-1, *[1] * len(shape)) + within).astype(np.float16)


class ThreeTokensEncoder(StampEncoder):
    """All three kinds of tokens, as expected_tokens has them for the number in the frame's stamp."""

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        frames = pixels[:, 2, 0, 0].numpy().astype(np.int64)
        tokens = {name: expected_tokens(name, frames) for name in TOKENS}
        return lambda: EncodedRows(tokens, np.ones(len(frames), bool))


def zigzag() -> np.ndarray:
    """(40, 2) [m]: steps of 0.125 m, in turn along x and along y, so that straight lines would be shorter."""
    steps = np.zeros((FRAMES, 2))
    steps[1::2, 0] = steps[2::2, 1] = 0.125
    return np.cumsum(steps, axis=0)


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of one trajectory, `day/run`, with all three kinds of tokens and every second frame."""
    root = tmp_path_factory.mktemp("cached")
    make_trajectory(root / "data" / "day" / "run", FRAMES, position=zigzag(), yaw=np.linspace(3, -3, FRAMES)[:, None])
    encoder = ThreeTokensEncoder(tokens=("cls", "patch", "register"))
    # two steps are 0.25 m in the file, but the kept frames are sqrt(2) / 8 m apart: that is what is travelled
    scale = math.sqrt(2) / 2
    settings = {"max_chunk_distance_m": 2.0 * scale + 1e-9, "overlap_distance_m": 0.5 * scale - 1e-9}
    settings |= {"dino_model_type": "small_reg", "frame_stride": 2}
    (result,) = stream_results(root / "data", root / "cache", encoder, shape=SHAPE, **settings)
    assert result.spans == SPANS
    return root / "cache"


def chunks_of(cache: Path) -> Iterator[tuple[Path, np.ndarray]]:
    """(path, kept frames (L,)) of the three chunks of `cached`."""
    for index, (start, stop) in enumerate(SPANS):
        yield cache / "day" / "run" / f"chunk_{index:05d}.h5", np.arange(start, stop)


def blake2b(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# The file
# ----------------------------------------------------------------------------------------------------------------------


def test_one_folder_a_trajectory_and_one_file_a_chunk(cached):
    files = [str(path.relative_to(cached)) for path in sorted(cached.rglob("*")) if path.is_file()]
    assert files == [f"day/run/chunk_0000{index}.h5" for index in range(3)]


def test_datasets_have_exactly_these_names_types_and_shapes_and_no_storage_layer(cached):
    for path, kept in chunks_of(cached):
        with h5py.File(path) as file:
            assert {name: dataset.shape for name, dataset in file.items()} == {
                name: (len(kept), *shape) for name, shape in (TOKENS | POSES).items()
            }
            types = dict.fromkeys(TOKENS, "<f2") | dict.fromkeys(POSES, "<f8") | {"frame_index": "<i8"}
            assert {name: dataset.dtype.str for name, dataset in file.items()} == types
            for dataset in file.values():
                assert (dataset.chunks, dataset.compression, dataset.fletcher32) == (None, None, False)


def test_only_the_tokens_asked_for_are_stored(tmp_path):
    make_trajectory(tmp_path / "data" / "t1", stamp=1)
    list(stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder(tokens=("patch",))))
    _, datasets = read_chunk(tmp_path / "cache" / "t1" / "chunk_00000.h5")
    assert datasets.keys() == {"patch_tokens", *POSES}


def test_rows_are_the_tokens_and_poses_of_their_source_frames(cached):
    yaw = np.linspace(3, -3, FRAMES)
    for path, kept in chunks_of(cached):
        _, datasets = read_chunk(path)
        source = kept * 2
        np.testing.assert_array_equal(datasets["frame_index"], source)
        np.testing.assert_array_equal(datasets["position"], zigzag()[source])
        np.testing.assert_array_equal(datasets["yaw"], yaw[source])
        np.testing.assert_allclose(datasets["travelled_distance"], kept * math.sqrt(2) / 8, atol=1e-12)
        for name in TOKENS:
            np.testing.assert_array_equal(datasets[name], expected_tokens(name, source))


def test_travelled_distance_counts_from_frame_0_and_over_pose_jumps(tmp_path):
    x = np.concatenate([np.arange(9) * 0.25, 12 + np.arange(9) * 0.25])  # a jump of 10 m
    make_trajectory(tmp_path / "data" / "t1", 18, stamp=1, position=np.stack([x, 0 * x], axis=1))
    list(stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder()))
    _, datasets = read_chunk(tmp_path / "cache" / "t1" / "chunk_00001.h5")
    np.testing.assert_array_equal(datasets["travelled_distance"], x[9:])


def test_attributes_say_what_the_chunk_is_and_how_it_was_made(cached):
    for index, (path, kept) in enumerate(chunks_of(cached)):
        attributes, _ = read_chunk(path)
        assert attributes.keys() == ATTRIBUTES
        plain = {key: attributes[key] for key in ATTRIBUTES - {"spec", "versions", "created_at", "trajectory_checksum"}}
        del plain["attributes_digest"]
        assert plain == {
            "format": "dino_cache",
            "format_version": 1,
            "dataset_name": "robot",
            "trajectory": "day/run",
            "chunk_index": index,
            "num_chunks": 3,
            "start": kept[0],
            "stop": kept[-1] + 1,
            "fingerprint": "f" * 16,
            "weights_digest": "d" * 16,
            "checksum_kind": "stat",
        }
        spec = json.loads(attributes["spec"])
        assert (spec["dino_model_type"], spec["image_size"], spec["frame_stride"]) == ("small_reg", [28, 42], 2)
        assert spec["tokens"] == ["cls", "patch", "register"]
        assert spec["pixel_mean"] == [0.485, 0.456, 0.406]
        assert len(spec) == 13  # every key of the configuration's "what is stored"
        versions = json.loads(attributes["versions"])
        for library in ("torch", "torchvision", "timm", "numpy", "h5py"):
            assert versions[library] == importlib.metadata.version(library)
        assert len(attributes["trajectory_checksum"]) == 16
        int(attributes["trajectory_checksum"], 16)
        made = time.strptime(attributes["created_at"] + "+0000", "%Y-%m-%dT%H:%M:%SZ%z")
        assert made.tm_gmtoff == 0


def test_created_at_is_the_time_in_utc(tmp_path, monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        make_trajectory(tmp_path / "data" / "t1", stamp=1)
        before = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        list(stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder()))
        after = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    finally:
        monkeypatch.undo()
        time.tzset()
    assert before <= read_chunk(tmp_path / "cache" / "t1" / "chunk_00000.h5")[0]["created_at"] <= after


def test_digests_are_those_of_the_bytes_in_the_file(cached):
    for path, _ in chunks_of(cached):
        raw, digests = path.read_bytes(), {}
        with h5py.File(path) as file:
            attributes = {key: value.item() if hasattr(value, "item") else value for key, value in file.attrs.items()}
            for name, dataset in file.items():
                assert list(dataset.attrs) == ["digest"]
                offset, size = dataset.id.get_offset(), dataset.size * dataset.dtype.itemsize
                assert dataset.attrs["digest"] == blake2b(raw[offset : offset + size])
                digests[name] = dataset.attrs["digest"]
        recorded = attributes.pop("attributes_digest")
        assert recorded == blake2b(json.dumps([attributes, digests], sort_keys=True).encode())


def test_datasets_can_be_memory_mapped_where_they_lie(cached):
    for path, kept in chunks_of(cached):
        with h5py.File(path) as file:
            places = {name: (file[name].dtype, file[name].id.get_offset(), file[name].shape) for name in file}
        for name in TOKENS:
            dtype, offset, shape = places[name]
            mapped = np.memmap(path, dtype, "r", offset, shape)
            np.testing.assert_array_equal(mapped, expected_tokens(name, kept * 2))
        assert np.memmap(path, *places["frame_index"][:1], "r", *places["frame_index"][1:])[-1] == kept[-1] * 2


# ----------------------------------------------------------------------------------------------------------------------
# Publishing
# ----------------------------------------------------------------------------------------------------------------------


def cache_t1(root: Path, *, hooks: Hooks | None = None, **settings: object) -> list:
    """Cache `data/t1` (20 frames, stamp 1), made if it is not there."""
    if not (root / "data" / "t1").exists():
        make_trajectory(root / "data" / "t1", stamp=1)
    return list(stream_results(root / "data", root / "cache", StampEncoder(), hooks=hooks, **settings))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_and_folder_are_forced_to_the_disk_before_the_rename_and_the_parent_after_it(tmp_path, monkeypatch):
    forced, renamed = [], []
    fsync, rename = os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (forced.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda *paths: (renamed.append((paths, list(forced))), rename(*paths)))
    make_trajectory(tmp_path / "data" / "day" / "t1", stamp=1)
    for _ in stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder()):
        before_result = list(forced)
    target = tmp_path / "cache" / "day" / "t1"
    ((paths, before_rename),) = renamed
    assert paths[1] == target
    inodes = {path.stat().st_ino for path in [target, *target.iterdir()]}
    assert len(inodes) == 4
    assert inodes <= set(before_rename)
    after_rename = before_result[len(before_rename) :]
    assert target.parent.stat().st_ino in after_rename
    assert target.parent.parent.stat().st_ino in before_result  # the entry `day` of the cache folder


def test_nothing_is_withdrawn_where_nothing_is_replaced(tmp_path):
    withdrawn = []
    cache_t1(tmp_path, hooks=Hooks(before_replacing=withdrawn.append))
    assert withdrawn == []


def test_old_chunks_lie_untouched_until_they_are_withdrawn_and_aside_afterwards(tmp_path):
    cache_t1(tmp_path)
    target = tmp_path / "cache" / "t1"
    old, seen = contents(target), []

    def before_replacing(name: str) -> None:
        seen.append((name, contents(target)))

    (result,) = cache_t1(tmp_path, hooks=Hooks(before_replacing=before_replacing), max_chunk_distance_m=3.0)
    assert seen == [("t1", old)]
    assert [len(old), len(contents(target))] == [3, 2]  # 19 steps of 0.25 m: [0, 13) and [10, 20)
    assert contents(result.replaced) == old
    assert tmp_path / "cache" / ".staging" in result.replaced.parents
    assert check_stamps(tmp_path / "cache", "t1", 1) == 23


def test_old_chunks_stay_where_the_record_cannot_be_withdrawn(tmp_path):
    cache_t1(tmp_path)
    old = contents(tmp_path / "cache")

    def before_replacing(name: str) -> None:
        raise StorageError("the record cannot be saved")

    with pytest.raises(StorageError, match="the record cannot be saved"):
        cache_t1(tmp_path, hooks=Hooks(before_replacing=before_replacing))
    assert {path: data for path, data in contents(tmp_path / "cache").items() if ".staging" not in path} == old


def test_reader_of_an_old_chunk_keeps_reading_the_old_bytes(tmp_path):
    cache_t1(tmp_path)
    path = tmp_path / "cache" / "t1" / "chunk_00000.h5"
    old = path.read_bytes()
    with h5py.File(path) as opened, open(path, "rb") as raw:
        for number in range(20):
            write_frame(tmp_path / "data" / "t1" / f"{number}.png", 2, number)
        cache_t1(tmp_path)
        assert raw.read() == old
        assert set(opened["cls_token"][:, 0]) == {1}
    assert set(read_chunk(path)[1]["cls_token"][:, 0]) == {2}


def test_a_trajectory_whose_place_in_the_cache_is_taken_fails_alone(tmp_path):
    for name in ("a/t1", "t2"):
        make_trajectory(tmp_path / "data" / name, stamp=2)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "a").symlink_to("gone")  # no folder, and nothing that a folder could be made over
    failed, completed = stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder())
    assert (failed.name, completed.name, completed.error) == ("a/t1", "t2", None)
    assert isinstance(failed.error, InputError)
    assert str(tmp_path / "cache" / "a" / "t1") in str(failed.error)


@pytest.mark.parametrize("foreign", ["t1/notes.txt", "t1/plots/a.png", "t1/chunk_00000.h5.bak", "t1"])
def test_foreign_files_in_a_chunk_folder_fail_its_trajectory_and_stay_untouched(tmp_path, foreign):
    make_trajectory(tmp_path / "data" / "t2", stamp=2)
    path = tmp_path / "cache" / foreign
    path.parent.mkdir(parents=True)
    path.write_text("the user's own")
    withdrawn = []
    failed, completed = cache_t1(tmp_path, hooks=Hooks(before_replacing=withdrawn.append))
    assert isinstance(failed.error, InputError)
    assert str(tmp_path / "cache" / "t1") in str(failed.error)
    assert (completed.name, completed.error) == ("t2", None)
    assert path.read_text() == "the user's own"
    assert [str(path.relative_to(tmp_path / "cache")) for path in chunk_files(tmp_path / "cache" / "t1")] == []
    assert os.listdir(tmp_path / "cache" / ".staging") == []
    assert withdrawn == []


def test_removing_chunks_leaves_the_users_files_and_no_empty_folder(tmp_path):
    for name in ("bare", "noted"):
        make_trajectory(tmp_path / "data" / name, stamp=1)
    list(stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder()))
    (tmp_path / "cache" / "noted" / "notes.txt").write_text("the user's own")
    store = ChunkStore(tmp_path / "cache")
    for name in ("bare", "noted", "unknown"):
        store.remove_chunks(name)
    assert sorted(os.listdir(tmp_path / "cache")) == [".staging", "noted"]
    assert contents(tmp_path / "cache") == {"noted/notes.txt": b"the user's own"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([], False),
        (["progress.json", "t1/notes.h5"], False),
        ([".staging/x/chunk_00000.h5"], False),
        (["a/b/chunk_00000.h5"], True),
        (["a/chunk_123456.h5"], True),
    ],
)
def test_cache_has_chunks_where_one_lies_under_a_final_name(tmp_path, files, expected):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    assert ChunkStore(tmp_path).has_chunks() is expected


def test_staging_of_an_earlier_run_is_emptied(tmp_path):
    (tmp_path / ".staging" / "left" / "replaced").mkdir(parents=True)
    (tmp_path / ".staging" / "left" / "replaced" / "chunk_00000.h5").write_bytes(b"half")
    ChunkStore(tmp_path).empty_staging()
    assert contents(tmp_path) == {}
    assert os.listdir(tmp_path / ".staging") == []


# ----------------------------------------------------------------------------------------------------------------------
# A disk that fails
# ----------------------------------------------------------------------------------------------------------------------


def fail_at_every_size(root: Path) -> None:
    """Cache `root/data` with files limited to fewer bytes than a chunk takes, at many limits, then to just enough."""

    def cache(name: str) -> list:
        return list(
            stream_results(root / "data", root / name, StampEncoder((140, 140), ("cls", "patch")), batch_size=5)
        )

    (whole,) = cache("whole")
    largest = max(whole.chunk_bytes)
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in [*range(0, largest, 1021), largest - 1]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # beyond it, writing fails with EFBIG
        with pytest.raises(StorageError, match="cannot write"):
            cache("cache")
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        gc.collect()  # what is left of a file that could not be closed must do no harm
        assert contents(root / "cache") == {}
        assert os.listdir(root / "cache") == [".staging"]
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    cache("cache")


@pytest.mark.slow
def test_write_that_fails_anywhere_in_a_file_is_a_storage_error_and_publishes_nothing(tmp_path):
    make_trajectory(tmp_path / "data" / "t1", stamp=1)
    process = multiprocessing.get_context("spawn").Process(target=fail_at_every_size, args=(tmp_path,))
    process.start()  # a process of its own: HDF5 may crash where it cannot write
    process.join(600)
    assert process.exitcode == 0
    assert check_stamps(tmp_path / "cache", "t1", 1) == 26


@pytest.fixture(scope="module")
def full_disk(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run of its own process, with umask 027, that cannot write the long chunk of its second trajectory."""
    root = tmp_path_factory.mktemp("full_disk")
    for stamp, (name, count) in enumerate({"day/t1": 4, "t2": 20, "t3": 4}.items(), start=1):
        make_trajectory(root / "data" / name, count, stamp=stamp)
    settings = {"max_chunk_distance_m": 50.0, "image_size": [280, 280], "tokens": ["cls", "patch"], "batch_size": 4}
    command = cache_command(write_config(root / "config.yaml", root / "data", **settings))
    script = 'umask 027; ulimit -f 32; exec "$@"'  # 32 KiB: 4 rows of 20 x 20 x 4 halves fit, 20 rows do not
    run = subprocess.run(
        ["bash", "-c", script, "bash", *command], capture_output=True, text=True, timeout=120, check=False
    )
    return root, run


def test_full_disk_ends_the_run_with_exit_3_and_records_only_what_is_durable(full_disk):
    root, run = full_disk
    cache = root / "data" / "dino_cache_small"
    assert run.returncode == 3, run.stderr
    assert f"{cache}: cannot write" in run.stderr
    progress = json.loads((cache / "progress.json").read_text())
    assert progress["completed_trajectories"] == ["day/t1"]
    assert progress["failed_trajectories"] == []
    assert check_stamps(cache, "day/t1", 1) == 4
    assert {path.parent.name for path in chunk_files(cache)} == {"t1"}


def test_folders_and_files_have_the_permissions_that_the_umask_leaves(full_disk):
    cache = full_disk[0] / "data" / "dino_cache_small"
    modes = {path: stat.S_IMODE((cache / path).stat().st_mode) for path in ["day", "day/t1", "day/t1/chunk_00000.h5"]}
    assert modes == {"day": 0o750, "day/t1": 0o750, "day/t1/chunk_00000.h5": 0o640}


def test_run_after_the_full_disk_finishes_the_work(full_disk, run_here):
    root, _ = full_disk
    outcome = run_here(root / "config.yaml")
    assert outcome.code == 0
    cache = root / "data" / "dino_cache_small"
    progress = json.loads((cache / "progress.json").read_text())
    assert progress["completed_trajectories"] == ["day/t1", "t2", "t3"]
    rows = [check_stamps(cache, name, stamp) for stamp, name in enumerate(["day/t1", "t2", "t3"], start=1)]
    assert rows == [4, 20, 4]
