"""Caches of RECON, LeRobot and video data that dino_cache 0.1.0 made have nothing to do: checksums are literals."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import dino_cache
from dino_cache import CacheSpec
from dino_cache_extras.chunk_files import read_chunk_header
from support import Outcome, tree
from test_pinned import ATTRIBUTES, CHUNK, DATASET_DIGESTS

PINNED = Path(__file__).parent / "pinned"
CHECKSUMS = {  # folder -> (format, trajectory, checksum of the kind stat, of the kind content)
    "recon": ("recon", "t3", "6a5d019d3334afb9", "8f46338cfa425903"),
    "lerobot_video": ("lerobot", "episode_000000", "af291d364054e95a", "c06b1f3d2b51668b"),
    "lerobot_images": ("lerobot", "episode_000000", "dc614f71dc947fd0", "34227325d93b38f7"),
    "video": ("video", "t3", "aecf381b81c86043", "317aec69258f6796"),
}


@pytest.mark.parametrize("folder", CHECKSUMS)
def test_a_checksum_is_what_it_was(folder: str) -> None:
    format_name, name, stat, content = CHECKSUMS[folder]
    trajectory = dino_cache.format_named(format_name).locate(PINNED / folder / "data", name)
    source = dino_cache.open_source(trajectory, dino_cache.data_keys(CacheSpec()))
    assert (source.checksum("stat"), source.checksum("content")) == (stat, content)


def test_a_chunk_file_of_an_earlier_version_is_sound_and_says_what_it_said() -> None:
    header = read_chunk_header(CHUNK, deep=True)
    assert header.attributes == ATTRIBUTES
    assert {name: dataset.digest for name, dataset in header.datasets.items()} == DATASET_DIGESTS
    assert {name: (dataset.dtype, dataset.shape) for name, dataset in header.datasets.items()} == {
        "cls_token": ("<f2", (6, 4)),
        "frame_index": ("<i8", (6,)),
        "position": ("<f8", (6, 2)),
        "travelled_distance": ("<f8", (6,)),
        "yaw": ("<f8", (6,)),
    }


def chunks(cache: Path) -> dict[str, bytes | None]:
    return {path: data for path, data in tree(cache).items() if path.endswith(".h5")}


@pytest.mark.parametrize("folder", CHECKSUMS)
def test_a_cache_of_an_earlier_version_has_nothing_to_do(
    folder: str, tmp_path: Path, run_bits: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(spec: CacheSpec, device: str) -> None:
        raise AssertionError("there is nothing to encode")

    monkeypatch.setattr(dino_cache, "load_encoder", refuse)
    shutil.copytree(PINNED / folder, tmp_path, dirs_exist_ok=True)
    before = chunks(tmp_path / "cache")
    outcome = run_bits()
    assert outcome.code == 0, outcome.err
    assert "robot: 1/1 trajectories completed, 0 failed, 3 chunks" in outcome.out
    assert "Redoing" not in outcome.err
    assert len(before) == 3
    assert chunks(tmp_path / "cache") == before
