"""LeRobot: pictures beside the parquet files; which are an episode's, and what happens where they are not all there."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from formats_support import VIDEO_KEY, edit_features, write_lerobot
from lerobot_support import RGB, write_root

import dino_cache
from dino_cache import CacheSpec, data_keys, open_source
from support import FIRST, SECOND, Outcome, Rendered, cache_content, check_stamps, read_progress

MATRIX = {"position_key": "action"}
PICTURES = f"videos/chunk-000/{RGB}"
STATS = "meta/episodes_stats.jsonl"
LONG = Rendered(5, 115)  # numbers of one, two and three digits
NAMES = ["{number}.jpg", "{number:06d}.png", "frame_{number}.jpg", "episode_{episode:06d}_{number}.jpg"]


def failures(run_bits: Callable[..., Outcome], tmp_path: Path, *, code: int = 1) -> dict[str, str]:
    """Name -> reason of what fails; all others have their own frames."""
    outcome = run_bits(MATRIX)
    assert outcome.code == code, outcome.err
    progress = read_progress(tmp_path / "cache")
    for name in progress["completed_trajectories"]:
        assert check_stamps(tmp_path / "cache", name, int(name[-1]) + 1) > 0
    return {name: failure["reason"] for name, failure in progress["failures"].items()}


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("names", NAMES)
def test_frames_are_found_by_number_and_never_by_text(
    run_bits: Callable[..., Outcome], tmp_path: Path, names: str, stride: int
) -> None:
    write_root(tmp_path / "data", [FIRST, SECOND, LONG], names=names)
    outcome = run_bits(MATRIX, frame_stride=stride)
    assert outcome.code == 0, outcome.err
    for number, trajectory in enumerate((FIRST, SECOND, LONG)):
        rows = check_stamps(tmp_path / "cache", f"episode_{number:06d}", trajectory.stamp, stride)
        assert rows >= -(-trajectory.count // stride)
    again = run_bits(MATRIX, frame_stride=stride)
    assert again.code == 0
    assert "Encoding with" not in again.out


def test_positions_and_yaws_are_those_of_the_matrices(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_root(tmp_path / "data", [SECOND])
    assert run_bits(MATRIX).code == 0
    for _, values in cache_content(tmp_path / "cache").values():
        rows = values["frame_index"]
        np.testing.assert_allclose(values["position"], SECOND.position[rows], atol=1e-12)
        np.testing.assert_allclose(values["yaw"], SECOND.yaw[rows], atol=1e-12)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("names", NAMES[:1])
def test_without_image_index_all_episodes_together_fill_the_folder(
    run_bits: Callable[..., Outcome], tmp_path: Path, names: str, first: int
) -> None:
    episodes = [Rendered(stamp, count) for stamp, count in ((1, 30), (2, 25), (3, 41))]
    write_root(tmp_path / "data", episodes, names=names, image_index=False, first=first)
    assert not failures(run_bits, tmp_path, code=0)
    (tmp_path / "data" / PICTURES / f"{first + 40}.jpg").unlink()
    shutil.rmtree(tmp_path / "cache")
    failed = failures(run_bits, tmp_path)
    assert len(failed) == 3  # which of them lost it, nothing says
    assert all(f"96 rows of 3 episodes, but 95 pictures in {PICTURES}" in reason for reason in failed.values())
    assert all(f"missing is {first + 40}" in reason for reason in failed.values())


def test_image_index_of_lerobots_own_statistics(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    """{"stats": {"image_index": {"min": [0], "max": [39]}}}"""
    write_root(tmp_path / "data", [FIRST, SECOND])
    lines = [json.loads(line) for line in (tmp_path / "data" / STATS).read_text().splitlines()]
    for line in lines:
        line["stats"] = {"image_index": {key: [value] for key, value in line.pop("image_index").items()}}
    (tmp_path / "data" / STATS).write_text("\n".join(map(json.dumps, reversed(lines))))
    assert not failures(run_bits, tmp_path, code=0)


def change_stats(data: Path, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    lines = [json.loads(line) for line in (data / STATS).read_text().splitlines()]
    change(lines)
    (data / STATS).write_text("\n".join(map(json.dumps, lines)))


def rename_all(data: Path, shift: int) -> None:
    files = sorted((data / PICTURES).iterdir(), key=lambda file: -int(file.stem))
    for file in files:
        file.rename(file.with_name(f"{int(file.stem) + shift}.jpg"))


@pytest.mark.parametrize(
    ("harm", "failing", "expected"),
    [
        (lambda d: (d / PICTURES / "45.jpg").unlink(), {1}, ["1 of its", "the first is number 45"]),
        (lambda d: (d / PICTURES / "0.jpg").unlink(), {0}, ["the first is number 0"]),
        (lambda d: (d / PICTURES / "07.jpg").write_bytes(b"x"), {0}, ["two pictures of one number", "7.jpg", "07.jpg"]),
        (lambda d: change_stats(d, lambda lines: lines.pop()), {1}, ["and none of it"]),
        (lambda d: change_stats(d, lambda lines: lines[0]["image_index"].update(max=38)), {0}, ["40 rows", "39 pict"]),
        (
            lambda d: change_stats(d, lambda lines: lines[1].update(image_index={"min": 39, "max": 65})),
            {0, 1},
            ["39 to 65"],
        ),
        (lambda d: rename_all(d, 1), {0, 1}, ["pictures 1 to 67", "0 to 66"]),
        (lambda d: change_stats(d, lambda lines: lines[1]["image_index"].update(min=-3)), {0, 1}, ["-3"]),
        (lambda d: change_stats(d, lambda lines: lines[1]["image_index"].update(max=10**30)), {0, 1}, [STATS]),
        (lambda d: (d / STATS).write_text("{"), {0, 1}, [STATS, "cannot be read"]),
        (lambda d: (d / PICTURES / "3.jpg").write_bytes(b"no picture"), {0}, ["3.jpg"]),
        (lambda d: ((d / PICTURES / "3.jpg").unlink(), os.mkfifo(d / PICTURES / "3.jpg")), {0}, ["not a regular file"]),
    ],
)
def test_pictures_that_do_not_fit_fail_their_episodes(
    run_bits: Callable[..., Outcome],
    tmp_path: Path,
    harm: Callable[[Path], Any],
    failing: set[int],
    expected: list[str],
) -> None:
    assert (FIRST.count, SECOND.count) == (40, 27)
    write_root(tmp_path / "data", [FIRST, SECOND])
    harm(tmp_path / "data")
    failed = failures(run_bits, tmp_path)
    assert {int(name[-1]) for name in failed} == failing
    for reason in failed.values():
        assert any(word in reason for word in ("episode_00000", STATS, PICTURES))
    assert any(all(word in reason for word in expected) for reason in failed.values()), failed


def test_pictures_named_in_two_ways_are_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_root(tmp_path / "data", [FIRST], names=NAMES[3])
    shutil.copy(tmp_path / "data" / PICTURES / "episode_000000_0.jpg", tmp_path / "data" / PICTURES / "0.jpg")
    assert "two kinds of names" in failures(run_bits, tmp_path)["episode_000000"]


def test_an_episode_with_a_picture_too_many_fails(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_root(tmp_path / "data", [FIRST, SECOND], names=NAMES[3], image_index=False)
    shutil.copy(*(tmp_path / "data" / PICTURES / f"episode_000000_{number}.jpg" for number in (0, 40)))
    assert failures(run_bits, tmp_path) == {
        "episode_000000": f"episode_000000: 40 rows, but 41 pictures of it in {PICTURES}"
    }


def test_a_video_that_is_not_there_may_be_pictures(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    """info.json calls them a video all the same."""
    write_root(tmp_path / "data", [FIRST], features={RGB: {"dtype": "video", "shape": [48, 64, 3]}})
    assert not failures(run_bits, tmp_path, code=0)


def test_a_video_that_is_there_is_read_and_not_the_pictures_beside_it(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    write_lerobot(tmp_path / "data", [FIRST], "v2.1", "libx264")
    for number, data in enumerate(Rendered(9, 40).jpegs):
        (tmp_path / f"data/videos/chunk-000/{VIDEO_KEY}/{number}.jpg").write_bytes(data)
    assert run_bits().code == 0
    check_stamps(tmp_path / "cache", "episode_000000", 1)


def test_pictures_that_info_json_does_not_describe_are_found(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    """As in InternData-N1's VLN-N1: rows without numbers, three features, none of them an image."""
    write_root(tmp_path / "data", [FIRST, SECOND], features={RGB: None}, numbered=False, names=NAMES[3])
    (tmp_path / "data/videos/chunk-000/observation.images.depth").mkdir()
    shutil.copy(
        tmp_path / "data" / PICTURES / "episode_000000_0.jpg",
        tmp_path / "data/videos/chunk-000/observation.images.depth/episode_000000_0.png",
    )
    assert not failures(run_bits, tmp_path, code=0)
    assert read_progress(tmp_path / "cache")["processing_config"]["image_key"] == RGB


@pytest.mark.parametrize("key", ["../../elsewhere", "x/../../../../elsewhere"])
def test_a_key_that_leads_out_of_the_dataset_is_not_followed(
    run_bits: Callable[..., Outcome], tmp_path: Path, key: str
) -> None:
    write_root(tmp_path / "data", [FIRST])
    edit_features(tmp_path / "data", {RGB: None, key: {"dtype": "image", "shape": [48, 64, 3]}})
    outcome = run_bits({**MATRIX, "image_key": key})
    assert outcome.code == 1
    assert "leads out of the dataset" in outcome.err


@pytest.mark.parametrize(
    ("change", "by_stat", "by_content"),
    [
        (lambda folder: (folder / "3.jpg").write_bytes(b"\0" * (folder / "3.jpg").stat().st_size), 0, 1),
        (lambda folder: (folder / "3.jpg").write_bytes(b"\0"), 1, 1),
        (lambda folder: os.utime(folder / "3.jpg", (1, 1)), 0, 0),
        (lambda folder: (folder / "note.txt").write_text("x"), 0, 0),
        (lambda folder: (folder / "40.jpg").write_bytes(b"another's"), 0, 0),
        (lambda folder: (folder / "3.jpg").rename(folder / "03.jpg"), 1, 1),
    ],
)
def test_changed_pictures_are_noticed(
    tmp_path: Path, change: Callable[[Path], Any], by_stat: int, by_content: int
) -> None:
    write_root(tmp_path / "data", [FIRST, SECOND])
    trajectory = dino_cache.format_named("lerobot").locate(tmp_path / "data", "episode_000000")

    def checksums() -> list[str]:
        source = open_source(trajectory, data_keys(CacheSpec(**MATRIX)))
        return [source.checksum(kind) for kind in ("stat", "content")]

    before = checksums()
    change(tmp_path / "data" / PICTURES)
    assert [new != old for new, old in zip(checksums(), before)] == [bool(by_stat), bool(by_content)]


def test_a_stopped_run_goes_on(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_root(tmp_path / "data", [FIRST, SECOND, Rendered(3, 50)])
    assert run_bits(MATRIX, "--limit", "1", frame_stride=3).code == 5
    assert run_bits(MATRIX, frame_stride=3).code == 0
    for stamp in (1, 2, 3):
        check_stamps(tmp_path / "cache", f"episode_{stamp - 1:06d}", stamp, 3)


@pytest.mark.real_readers
def test_reader_processes_read_pictures(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_root(tmp_path / "data/g/s", [FIRST, SECOND])
    outcome = run_bits(MATRIX)
    assert outcome.code == 0, outcome.err
    check_stamps(tmp_path / "cache", "g/s/episode_000000", 1)
    check_stamps(tmp_path / "cache", "g/s/episode_000001", 2)
