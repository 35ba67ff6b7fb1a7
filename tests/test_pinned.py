"""What users have on disk stays what it is: fingerprints, checksums, a chunk file's attributes and seal, a record.

Every expected value is a literal that dino_cache 0.1.0 gave. A test that fails here says that every cache in the world
would be redone, or refused.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest

import dino_cache
from dino_cache import CacheSpec, attributes_digest, metadata_digest
from support import BitEncoder, Outcome, tree

PINNED = Path(__file__).parent / "pinned"
CHUNK = PINNED / "gnm/cache/t3/chunk_00001.h5"  # frames 4 to 9 of 12
SPEC = (
    '{"dino_model_type": "small", "weights": "random", "tokens": ["cls"], "image_size": [28, 42], "resize": "stretch", '
    '"pixel_mean": [0.485, 0.456, 0.406], "pixel_std": [0.229, 0.224, 0.225], "precision": "fp32", '
    '"max_chunk_distance_m": 2.0, "overlap_distance_m": 0.5, "min_chunk_distance_m": 0.3, "frame_stride": 1, '
    '"frame_pattern": "(\\\\d+)\\\\.(?:jpg|jpeg|png|JPG|JPEG|PNG)"}'
)
ATTRIBUTES = {
    "format": "dino_cache",
    "format_version": 1,
    "dataset_name": "robot",
    "trajectory": "t3",
    "chunk_index": 1,
    "num_chunks": 3,
    "start": 4,
    "stop": 10,
    "spec": SPEC,
    "fingerprint": "4a77dc32507fd45b",
    "weights_digest": "bits",
    "trajectory_checksum": "6f2cb1f2ed882eac",
    "checksum_kind": "stat",
    "versions": '{"dino_cache": "0.1.0", "python": "3.11.7", "torch": "2.14.1", "torchvision": "0.29.1", '
    '"timm": "1.0.31", "numpy": "2.4.6", "h5py": "3.16.0"}',
    "created_at": "2026-11-26T02:14:57Z",
}
DATASET_DIGESTS = {
    "cls_token": "e1fe58aafdd8ac04df582ddc0efd54dd",
    "frame_index": "d3e2525f9ab20a5e4354baab17481610",
    "position": "cf497763ec5db2e1dfe42ea42422691e",
    "travelled_distance": "47dc256410a9f0904fb0292a14c07b3c",
    "yaw": "f34d7a781eb8b8f4ea992f05784d601b",
}
DATA = [[1912, 48], [2232, 96], [2600, 48], [2920, 48], [3240, 48]]  # offset, size [bytes]
SEAL_DIGEST = "be2c616ca3bf55f79c438a71c5912ade"


@pytest.mark.parametrize(
    ("settings", "fingerprint"),
    [
        ({}, "1ed2a0704c412d32"),
        (
            {
                "dino_model_type": "small",
                "weights": "random",
                "tokens": ("cls", "patch"),
                "image_size": (112, 154),
                "max_chunk_distance_m": 4.0,
                "overlap_distance_m": 0.5,
            },
            "12430c32568b207b",
        ),
        ({"chunk_by": "frames", "image_key": "front", "position_scale": 0.01}, "81a688930e518acf"),
    ],
)
def test_a_fingerprint_is_what_it_was(settings: dict[str, Any], fingerprint: str) -> None:
    assert CacheSpec(**settings).fingerprint("0" * 16) == fingerprint


def test_a_spec_is_recorded_as_it_was() -> None:
    settings = {
        "dino_model_type": "small",
        "weights": "random",
        "image_size": (28, 42),
        "resize": "stretch",
        "precision": "fp32",
        "max_chunk_distance_m": 2.0,
        "overlap_distance_m": 0.5,
    }
    assert json.dumps(CacheSpec(**settings).to_json()) == SPEC


def test_digests_of_the_same_content_are_what_they_were() -> None:
    assert attributes_digest(ATTRIBUTES, DATASET_DIGESTS) == "e046648378c68227d194f57693312887"
    seal = json.dumps({"data": DATA, "digest": SEAL_DIGEST}).encode()
    assert CHUNK.read_bytes()[:512] == seal.ljust(512)
    with CHUNK.open("rb") as file:
        assert metadata_digest(file, DATA) == SEAL_DIGEST


@pytest.mark.parametrize(("kind", "checksum"), [("stat", "6f2cb1f2ed882eac"), ("content", "b2b2f7cfdbde6f30")])
def test_a_checksum_of_gnm_data_is_what_it_was(kind: str, checksum: str) -> None:
    trajectory = dino_cache.format_named("gnm").locate(PINNED / "gnm/data", "t3")
    assert dino_cache.open_source(trajectory, dino_cache.data_keys(CacheSpec())).checksum(kind) == checksum


@pytest.fixture
def pinned(tmp_path: Path) -> Path:
    shutil.copytree(PINNED / "gnm", tmp_path, dirs_exist_ok=True)
    return tmp_path / "cache"


def chunks(cache: Path) -> dict[str, bytes | None]:
    return {path: data for path, data in tree(cache).items() if path.endswith(".h5")}


def test_a_cache_of_an_earlier_version_has_nothing_to_do(
    pinned: Path, run_bits: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(spec: CacheSpec, device: str) -> None:
        raise AssertionError("there is nothing to encode")

    monkeypatch.setattr(dino_cache, "load_encoder", refuse)
    before = chunks(pinned)
    outcome = run_bits()
    assert outcome.code == 0, outcome.err
    assert "robot: 1/1 trajectories completed, 0 failed, 3 chunks" in outcome.out
    assert "Redoing" not in outcome.err
    assert chunks(pinned) == before


def test_the_same_data_give_the_same_chunks_anew(
    pinned: Path, run_bits: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = BitEncoder((28, 42), ("cls",))
    monkeypatch.setattr(dino_cache, "load_encoder", lambda spec, device: (encoder, "bits"))
    monkeypatch.setattr(dino_cache, "library_versions", lambda: ATTRIBUTES["versions"])
    assert run_bits(None, "--force-rebuild").code == 0
    assert encoder.batch_sizes  # they are made anew
    with h5py.File(pinned / "t3/chunk_00001.h5") as made:
        attributes = {key: value if isinstance(value, str) else value.item() for key, value in made.attrs.items()}
        del attributes["attributes_digest"]
        assert attributes == {**ATTRIBUTES, "created_at": attributes["created_at"]}
        digests = {name: dataset.attrs["digest"] for name, dataset in made.items()}
        assert digests.pop("delta")  # which chunks of 0.2.0 and earlier do not have
        assert digests == DATASET_DIGESTS
