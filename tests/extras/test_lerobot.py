"""LeRobot: keys and meta data that do not fit are refused, and an episode takes none of another's frames."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from formats_support import (
    AV1_ENCODER,
    VIDEO_KEY,
    cache,
    edit_features,
    lerobot_entry,
    truncate,
    write_episodes,
    write_joined_mp4,
    write_lerobot,
)

from support import FIRST, SECOND, Outcome, Rendered, check_stamps, chunk_files

V30 = ("data/chunk-000/file-000.parquet", f"videos/{VIDEO_KEY}/chunk-000/file-000.mp4")


def test_an_episode_does_not_take_the_frames_of_the_next_one_in_its_file(tmp_path: Path) -> None:
    names = write_lerobot(tmp_path / "data", [FIRST, SECOND], "v3.0", "libx264")
    write_joined_mp4(tmp_path / "data" / V30[1], [FIRST.frames[:39], SECOND.frames], "libx264")
    write_episodes(tmp_path / "data", "v3.0", [
        {**lerobot_entry(0, 40, 0, 0), f"videos/{VIDEO_KEY}/to_timestamp": 3.9}, lerobot_entry(1, 27, 0, 39),
    ])  # fmt: skip
    results = cache(tmp_path / "data", tmp_path / "cache", "lerobot v3.0 h264")
    assert "fewer frames than poses" in str(results[names[0]].error)
    assert results[names[1]].error is None
    check_stamps(tmp_path / "cache", names[1], 2)


@pytest.mark.parametrize(
    ("features", "dataset", "expected"),
    [
        ({}, {"image_key": "observation.images.rear"}, ["image_key", "observation.images.rear", VIDEO_KEY]),
        ({}, {"position_key": "gps"}, ["position_key", "gps", "observation.filtered_position", "action"]),
        ({"observation.filtered_heading": None}, {}, ["yaw_key", "action", "chunk_by: frames"]),
        ({VIDEO_KEY: None}, {}, ["image_key", "(none)"]),
        ({VIDEO_KEY: None, "left": {"dtype": "video"}, "right": {"dtype": "image"}}, {}, ["image_key", "left, right"]),
    ],
)  # fmt: skip
def test_keys_that_do_not_fit_are_refused_with_those_that_there_are(
    run_bits: Callable[..., Outcome], tmp_path: Path, features: dict, dataset: dict[str, Any], expected: list[str]
) -> None:
    write_lerobot(tmp_path / "data", [FIRST], "v2.1", "libx264")
    edit_features(tmp_path / "data", features)
    outcome = run_bits(dataset)
    assert outcome.code == 2
    assert all(word in outcome.err for word in expected), outcome.err
    assert not chunk_files(tmp_path / "cache")


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (lambda d: (d / "meta/info.json").write_text("{"), ["info.json", "cannot be read"]),
        (lambda d: edit_features(d, {}, codebase_version="v9.0"), ["'v9.0'", "v2.1", "v3.0"]),
        (lambda d: edit_features(d, {}, fps="fast"), ["fps", "'fast'"]),
        (lambda d: edit_features(d, {}, video_path=7), ["video_path", "7"]),
        (lambda d: write_episodes(d, "v3.0", [{**lerobot_entry(0, 40, 0, 0), "length": 1.5}]), ["1.5 frames"]),
        (lambda d: edit_features(d, {}, data_path="data/{episode_index.__class__}"), ["template"]),
        (lambda d: edit_features(d, {}, data_path="data/{episode_index:0999999999d}"), ["template"]),
        (lambda d: truncate(d / "meta/episodes/chunk-000/file-000.parquet"), ["file-000.parquet", "never finalised"]),
        (lambda d: shutil.rmtree(d / "meta/episodes"), ["meta/episodes"]),
    ],
)
def test_meta_data_that_cannot_be_used_are_refused(
    run_bits: Callable[..., Outcome], tmp_path: Path, harm: Callable[[Path], Any], expected: list[str]
) -> None:
    write_lerobot(tmp_path / "data", [FIRST], "v3.0", "libx264")
    harm(tmp_path / "data")
    outcome = run_bits()
    assert outcome.code == 2
    assert all(word in outcome.err for word in expected), outcome.err


def test_a_template_that_leads_out_of_the_dataset_is_not_followed(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    write_lerobot(tmp_path / "data", [FIRST], "v2.1", "libx264")
    edit_features(tmp_path / "data", {}, data_path="../elsewhere/episode_{episode_index:06d}.parquet")
    outcome = run_bits()
    assert outcome.code == 1
    assert "leads out of the dataset" in outcome.err


@pytest.mark.parametrize("codec", ["libx264", AV1_ENCODER or "mpeg4", "image"])
def test_episodes_appended_to_a_file_leave_those_before_them_done(
    run_bits: Callable[..., Outcome], tmp_path: Path, codec: str
) -> None:
    how = {"row_group": 36}  # the length of an episode
    episodes = [Rendered(number, 36) for number in (1, 2, 3)]
    write_lerobot(tmp_path / "data", episodes[:2], "v3.0", codec, together=3, **how)
    assert run_bits().code == 0
    names = write_lerobot(tmp_path / "data", episodes, "v3.0", codec, together=3, **how)
    outcome = run_bits()
    assert outcome.code == 0, outcome.err
    assert "Redoing" not in outcome.err
    assert check_stamps(tmp_path / "cache", names[2], 3) > 36
