"""What was guessed, the camera, the poses and the format, is settled once per cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from formats_support import VIDEO_KEY, edit_features, write_lerobot, write_mp4, write_recon

import progress_utils
from dino_cache import CacheSpec
from support import FIRST, SECOND, Outcome, Rendered, cache_content, read_progress, write_gnm

WRIST = "observation.images.wrist"
POSITION, YAW = "observation.filtered_position", "observation.filtered_heading"
CAMERA = {"dtype": "video", "shape": [48, 64, 3]}


def one_camera(data: Path, *, trajectories: list[Rendered] | None = None) -> None:
    """A LeRobot dataset whose only camera is the wrist's."""
    write_lerobot(data, trajectories or [FIRST, SECOND], "v2.1", "libx264")
    (data / f"videos/chunk-000/{VIDEO_KEY}").rename(data / f"videos/chunk-000/{WRIST}")
    edit_features(data, {VIDEO_KEY: None, WRIST: CAMERA})


def add_front_camera(data: Path) -> None:
    """Another camera, whose name is the better guess; of the first episode its video is missing."""
    edit_features(data, {VIDEO_KEY: CAMERA})
    write_mp4(data / f"videos/chunk-000/{VIDEO_KEY}/episode_000001.mp4", Rendered(9, SECOND.count).frames)


def stamps(cache: Path) -> set[int]:
    """Of all rows of a cache."""
    return {int(stamp) for _, values in cache_content(cache).values() for stamp in values["cls_token"][:, 0]}


def forget_guesses(cache: Path) -> dict[str, Any]:
    """Make the record one of a version that recorded no guesses; returns it."""
    progress = read_progress(cache)
    for spec in (progress["processing_config"], *progress["specs"].values()):
        for key in spec.pop("guessed_keys"):
            spec.pop(key, None)
    (cache / "progress.json").write_text(json.dumps(progress))
    return progress


def test_what_was_guessed_is_recorded(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    one_camera(tmp_path / "data")
    assert run_bits().code == 0
    progress = read_progress(tmp_path / "cache")
    guesses = {"image_key": WRIST, "position_key": POSITION, "yaw_key": YAW}
    for spec in (progress["processing_config"], *progress["specs"].values()):
        assert {key: spec[key] for key in guesses} == guesses
    attributes, _ = next(iter(cache_content(tmp_path / "cache").values()))
    assert json.loads(attributes["spec"])["image_key"] == WRIST


def test_a_guess_that_would_differ_is_a_changed_configuration(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    one_camera(tmp_path / "data")
    assert run_bits().code == 0
    before = cache_content(tmp_path / "cache")
    add_front_camera(tmp_path / "data")
    outcome = run_bits()
    assert outcome.code == 2
    assert f"image_key: {WRIST} -> {VIDEO_KEY}" in outcome.err
    assert "position_key" not in outcome.err
    assert cache_content(tmp_path / "cache").keys() == before.keys()
    assert stamps(tmp_path / "cache") == {1, 2}
    assert f"changed configuration: image_key: {WRIST} -> {VIDEO_KEY}" in run_bits(None, "--dry-run").out


def test_the_key_that_was_guessed_may_be_set(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    """The cache goes on with its camera, and stays of one configuration."""
    one_camera(tmp_path / "data")
    assert run_bits().code == 0
    add_front_camera(tmp_path / "data")
    third = write_lerobot(tmp_path / "more", [FIRST, SECOND, Rendered(3, 20)], "v2.1", "libx264")[2]
    for place in ("data/chunk-000/{}.parquet", f"videos/chunk-000/{VIDEO_KEY}/{{}}.mp4", "meta/episodes.jsonl"):
        target = tmp_path / "data" / place.format(third).replace(VIDEO_KEY, WRIST)
        shutil.copy(tmp_path / "more" / place.format(third), target)
    outcome = run_bits({"image_key": WRIST})
    assert outcome.code == 0, outcome.err
    assert "Redoing" not in outcome.err
    assert stamps(tmp_path / "cache") == {1, 2, 3}
    assert len(read_progress(tmp_path / "cache")["specs"]) == 1


def test_a_change_that_is_accepted_makes_another_configuration(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    """The cache is mixed then, and readers can tell."""
    one_camera(tmp_path / "data", trajectories=[FIRST])
    assert run_bits().code == 0
    write_lerobot(tmp_path / "new", [FIRST, SECOND], "v2.1", "libx264")
    for place in ("data/chunk-000/episode_000001.parquet", "meta/episodes.jsonl"):
        shutil.copy(tmp_path / "new" / place, tmp_path / "data" / place)
    add_front_camera(tmp_path / "data")
    outcome = run_bits(None, "--yes")
    assert outcome.code == 0, outcome.err
    assert stamps(tmp_path / "cache") == {1, 9}
    specs = read_progress(tmp_path / "cache")["specs"]
    assert sorted(spec["image_key"] for spec in specs.values()) == [VIDEO_KEY, WRIST]
    assert run_bits().code == 0  # the new guess is now the recorded one


def test_a_cache_from_before_guesses_were_recorded_is_taken_for_what_it_is(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    one_camera(tmp_path / "data")
    assert run_bits().code == 0
    before = cache_content(tmp_path / "cache")
    (old,) = forget_guesses(tmp_path / "cache")["specs"]
    outcome = run_bits()
    assert outcome.code == 0, outcome.err
    assert "changed" not in outcome.err
    assert cache_content(tmp_path / "cache").keys() == before.keys()
    progress = read_progress(tmp_path / "cache")
    assert list(progress["specs"]) == [old]
    assert progress["specs"][old]["image_key"] == progress["processing_config"]["image_key"] == WRIST
    add_front_camera(tmp_path / "data")
    assert run_bits().code == 2


def test_a_guess_is_in_no_fingerprint(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    """A cache of an earlier version, where it was not recorded, stays of one configuration as it grows."""
    one_camera(tmp_path / "data")
    assert run_bits().code == 0
    progress = read_progress(tmp_path / "cache")
    (fingerprint,) = progress["specs"]
    plain = {key: value for key, value in progress["specs"][fingerprint].items() if not key.endswith(("_key", "_keys"))}
    assert CacheSpec(**plain).fingerprint(progress["weights"]["digest"]) == fingerprint


def test_where_nothing_can_be_guessed_any_more_the_recorded_key_is_named(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    one_camera(tmp_path / "data")
    assert run_bits().code == 0
    edit_features(tmp_path / "data", {"left": CAMERA, "right": CAMERA})
    outcome = run_bits()
    assert outcome.code == 2
    assert f"made with image_key: {WRIST}" in outcome.err


def test_poses_that_appear_later_are_a_changed_configuration(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_lerobot(tmp_path / "data", [FIRST], "v2.1", "libx264")
    columns = {key: {"dtype": "float32", "shape": [1]} for key in (POSITION, YAW)}
    edit_features(tmp_path / "data", dict.fromkeys(columns))
    assert run_bits(chunk_by="frames").code == 0
    edit_features(tmp_path / "data", columns)
    outcome = run_bits(chunk_by="frames")
    assert outcome.code == 2
    assert f"position_key: None -> {POSITION}" in outcome.err


@pytest.mark.parametrize("dataset", [{}, {"format": "gnm"}])
def test_another_format_is_a_changed_configuration(
    run_bits: Callable[..., Outcome], tmp_path: Path, dataset: dict[str, str]
) -> None:
    write_recon(tmp_path / "data", [FIRST])
    assert run_bits().code == 0
    shutil.rmtree(tmp_path / "data")
    write_gnm(tmp_path / "data", [SECOND])
    outcome = run_bits(dataset)
    assert outcome.code == 2
    assert "format: recon -> gnm" in outcome.err


def test_a_rebuilt_record_knows_what_was_guessed(
    run_bits: Callable[..., Outcome], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one_camera(tmp_path / "data")
    assert run_bits().code == 0
    (tmp_path / "cache" / "progress.json").unlink()
    assert progress_utils.main(["rebuild", "--cache-dir", str(tmp_path / "cache"), "--yes"]) == 0
    assert run_bits().code == 0
    add_front_camera(tmp_path / "data")
    assert run_bits().code == 2


def test_caches_whose_keys_were_guessed_are_read_together(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    """As ever: what a camera is called is each dataset's own."""
    pytest.importorskip("torch")
    from dino_cache_extras.windows import CacheWindows

    write_recon(tmp_path / "data", [FIRST])
    assert run_bits().code == 0
    (tmp_path / "cache").rename(tmp_path / "first")
    shutil.rmtree(tmp_path / "data")
    write_lerobot(tmp_path / "data", [SECOND], "v2.1", "libx264")
    assert run_bits().code == 0
    assert len(CacheWindows([tmp_path / "first", tmp_path / "cache"], window=1)) > 0
