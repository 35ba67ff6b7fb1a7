"""LeRobot: many datasets in a tree are one cache, and none takes another's frames."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from formats_support import VIDEO_KEY, edit_features, write_lerobot
from lerobot_support import RGB, write_root

import dino_cache
from dino_cache import CacheSpec, InputError
from dino_cache_extras.formats import lerobot
from dino_cache_extras.formats.lerobot_roots import OpenedRoots, find_roots
from support import FIRST, SECOND, Outcome, Rendered, check_stamps, chunk_files, read_progress

THIRD, FOURTH = Rendered(3, 21), Rendered(4, 33)


def names_found(data: Path, **settings: str) -> list[str]:
    return [found.name for found in lerobot.find_lerobot(data, CacheSpec(**settings))]


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("version", ["v2.1", "v3.0"])
def test_roots_with_the_same_episode_numbers_are_not_mixed(
    run_bits: Callable[..., Outcome], tmp_path: Path, version: str, stride: int
) -> None:
    write_lerobot(tmp_path / "data/b/kitchen", [FIRST, SECOND], version, "libx264")
    write_lerobot(tmp_path / "data/a/hall/deep", [THIRD, FOURTH], version, "libx264")
    outcome = run_bits(frame_stride=stride)
    assert outcome.code == 0, outcome.err
    assert "format lerobot (a/hall/deep/meta/info.json)" in outcome.out
    stamps = {"a/hall/deep": (3, 4), "b/kitchen": (1, 2)}
    for root, pair in stamps.items():
        for number, stamp in enumerate(pair):
            assert check_stamps(tmp_path / "cache", f"{root}/episode_{number:06d}", stamp, stride)
    assert len(read_progress(tmp_path / "cache")["completed_trajectories"]) == 4
    again = run_bits(frame_stride=stride)
    assert again.code == 0
    assert "Redoing" not in again.err
    assert "Encoding with" not in again.out


def test_a_stopped_run_goes_on_in_the_next_root(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    for name, stamp in (("a", 1), ("b", 2), ("c", 3)):
        write_lerobot(tmp_path / "data" / name, [Rendered(stamp, 30)], "v2.1", "libx264")
    assert run_bits(None, "--limit", "1").code == 5
    assert run_bits().code == 0
    for name, stamp in (("a", 1), ("b", 2), ("c", 3)):
        assert check_stamps(tmp_path / "cache", f"{name}/episode_000000", stamp) >= 30


def test_a_root_that_is_data_folder_itself_keeps_its_names(tmp_path: Path) -> None:
    write_lerobot(tmp_path / "data", [FIRST], "v2.1", "libx264")
    write_lerobot(tmp_path / "data/videos/inner", [SECOND], "v2.1", "libx264")  # below a root nothing is looked at
    assert names_found(tmp_path / "data") == ["episode_000000"]


def test_a_root_is_not_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(3):
        write_root(tmp_path / f"data/g/s{index}", [FIRST])
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: (listed.append(Path(path).name), scandir(path))[1])
    assert [root.name for root in find_roots(tmp_path / "data")] == ["g/s0", "g/s1", "g/s2"]
    assert listed == ["data", "g"]


def test_a_root_without_the_key_fails_alone_with_its_keys_named(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    for name, stamp in (("a", FIRST), ("b", SECOND), ("c", THIRD)):
        write_lerobot(tmp_path / "data" / name, [stamp], "v2.1", "libx264")
    edit_features(
        tmp_path / "data/b", {"observation.filtered_heading": None, "compass": {"dtype": "float32", "shape": [1]}}
    )
    outcome = run_bits()
    assert outcome.code == 1
    (failure,) = read_progress(tmp_path / "cache")["failures"].items()
    assert failure[0] == "b/episode_000000"
    assert all(word in failure[1]["reason"] for word in ("yaw", "observation.filtered_heading", "compass"))
    check_stamps(tmp_path / "cache", "a/episode_000000", 1)
    check_stamps(tmp_path / "cache", "c/episode_000000", 3)


def test_a_key_is_guessed_from_the_first_root_that_has_one(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    for name, stamp in (("a", FIRST), ("b", SECOND)):
        write_lerobot(tmp_path / "data" / name, [stamp], "v2.1", "libx264")
    edit_features(tmp_path / "data/a", {"observation.filtered_heading": None})
    outcome = run_bits()
    assert outcome.code == 1
    check_stamps(tmp_path / "cache", "b/episode_000000", 2)
    assert read_progress(tmp_path / "cache")["processing_config"]["image_key"] == VIDEO_KEY


def test_where_no_root_has_a_key_the_run_is_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_root(tmp_path / "data" / name, [FIRST])
    outcome = run_bits({"position_key": "gps"})
    assert outcome.code == 2
    assert all(word in outcome.err for word in ("position_key: gps", "action", "2 other datasets")), outcome.err


def test_a_root_whose_meta_data_cannot_be_read_fails_alone(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    for name, stamp in (("a", FIRST), ("b", SECOND)):
        write_lerobot(tmp_path / "data" / name, [stamp], "v2.1", "libx264")
    (tmp_path / "data/a/meta/episodes.jsonl").write_text("{")
    outcome = run_bits()
    assert outcome.code == 1
    (failure,) = read_progress(tmp_path / "cache")["failures"].items()
    assert failure[0] == "a"
    assert "a/meta/episodes.jsonl: cannot be read" in failure[1]["reason"]
    check_stamps(tmp_path / "cache", "b/episode_000000", 2)


@pytest.mark.parametrize(("number", "code"), [(errno.EACCES, 1), (errno.EIO, 3)])
def test_a_folder_that_cannot_be_listed_is_told(
    run_bits: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    for name in ("a", "b"):
        write_lerobot(tmp_path / "data" / name / "s", [FIRST], "v2.1", "libx264")
    is_there, scandir, open_file = os.path.lexists, os.scandir, os.open
    lost = f"{tmp_path}/data/a/"

    def refuse(function: Callable[..., Any]) -> Callable[..., Any]:
        def instead(path: Any, *arguments: Any, **more: Any) -> Any:
            if f"{path}/".startswith(lost):
                raise OSError(number, os.strerror(number), str(path))
            return function(path, *arguments, **more)

        return instead

    monkeypatch.setattr(os.path, "lexists", lambda path: not str(path).startswith(lost) and is_there(path))
    monkeypatch.setattr(os, "scandir", refuse(scandir))
    monkeypatch.setattr(os, "open", refuse(open_file))
    outcome = run_bits({"format": "lerobot"})
    assert outcome.code in (1, code), outcome.err
    assert os.strerror(number) in outcome.err
    check_stamps(tmp_path / "cache", "b/s/episode_000000", 1)


@pytest.mark.parametrize("name", ["../b/episode_000000", "/b/episode_000000", "a/../../b/episode_000000", "a/b"])
def test_a_name_that_leads_out_of_data_folder_is_none(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="not the name of an episode"):
        lerobot.locate_lerobot(tmp_path, name)


def test_a_located_episode_is_the_one_that_was_found(tmp_path: Path) -> None:
    write_lerobot(tmp_path / "data/a/b", [FIRST, SECOND], "v2.1", "libx264")
    found = list(lerobot.find_lerobot(tmp_path / "data", CacheSpec()))
    assert [lerobot.locate_lerobot(tmp_path / "data", trajectory.name) for trajectory in found] == found


def test_links_to_roots_are_followed_but_not_in_a_ring(tmp_path: Path) -> None:
    write_root(tmp_path / "elsewhere/s0", [FIRST])
    (tmp_path / "data/g").mkdir(parents=True)
    (tmp_path / "data/g/linked").symlink_to(tmp_path / "elsewhere/s0")
    (tmp_path / "data/g/ring").symlink_to(tmp_path / "data")
    (tmp_path / "data/g/itself").symlink_to("itself")
    assert names_found(tmp_path / "data", position_key="action") == ["g/linked/episode_000000"]


def test_a_tree_that_could_be_two_formats_is_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_root(tmp_path / "data/a", [FIRST])
    (tmp_path / "data/0").mkdir()
    (tmp_path / "data/0/traj_data.json").write_text(json.dumps({"position": [[0, 0]], "yaw": [0]}))
    outcome = run_bits()
    assert outcome.code == 2
    assert "lerobot (a/meta/info.json)" in outcome.err
    assert not chunk_files(tmp_path / "cache")


def test_opened_datasets_are_bounded() -> None:
    made: list[Path] = []
    opened = OpenedRoots(lambda root: made.append(root) or len(str(root)), 6, lambda value: 2)
    for name in "abcd":
        opened(Path(name))
    assert opened(Path("d")) == 1
    assert made == list(map(Path, "abcd"))  # b, c and d are kept
    opened(Path("b"))
    opened(Path("a"))  # c goes, which was used longest ago
    opened(Path("b"))
    assert made == list(map(Path, "abcda"))
    opened.anew(Path("b"))
    assert made[-1] == Path("b")
    assert len(opened._opened) <= 3


def test_thousands_of_roots_are_listed_with_bounded_memory(tmp_path: Path) -> None:
    write_root(tmp_path / "one", [Rendered(1, 2)])
    for index in range(1500):
        folder = tmp_path / f"data/g{index % 10}/s{index}/meta"
        folder.mkdir(parents=True)
        for file in ("info.json", "episodes.jsonl"):
            (folder / file).write_bytes((tmp_path / "one/meta" / file).read_bytes())
    spec = CacheSpec(image_key=RGB, position_key="action")
    assert sum(1 for _ in dino_cache.format_named("lerobot").find(tmp_path / "data", spec)) == 1500
    assert len(lerobot._LEROBOT_DATASETS._opened) <= 1000
