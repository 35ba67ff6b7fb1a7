"""prune: what the data no longer have goes, and nothing while they may only be out of sight."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from progress_utils import cache_lock
from support import Outcome, Robot, make_trajectory, read_progress, run_utils, tree


@pytest.fixture
def cached(robot: Robot, run_here: Callable[..., Outcome]) -> Robot:
    """t0, site/t1 and site/t2 completed, t3 failed; of the data, site/t1 and t3 are gone."""
    robot.add("t0")
    for name in ("site/t1", "site/t2"):
        make_trajectory(robot.data / name, stamp=int(name[-1]))
    robot.add_broken("t3")
    assert run_here(robot.config).code == 1
    shutil.rmtree(robot.data / "site" / "t1")
    shutil.rmtree(robot.data / "t3")
    return robot


def completed(robot: Robot) -> list[str]:
    return sorted(read_progress(robot.cache)["completed_trajectories"])


@pytest.mark.parametrize("by", ["record", "config"])
def test_what_the_data_no_longer_have_is_named_and_then_removed(cached: Robot, by: str) -> None:
    named = ["--config", cached.config] if by == "config" else [cached.cache]
    before = tree(cached.cache)
    said = run_utils("prune", *named)
    assert said.returncode == 0, said.stderr
    assert "gone from the data: site/t1 (" in said.stdout
    assert "gone from the data: t3 (" in said.stdout
    assert "Would remove 2 trajectories, 0 records set aside, 0 leftovers: " in said.stdout
    assert "Nothing was changed: --yes removes them" in said.stdout
    assert "" not in said.stdout.splitlines()
    assert tree(cached.cache) == before
    done = run_utils("prune", *named, "--yes")
    assert (done.returncode, "Removed 2 trajectories" in done.stdout) == (0, True), done.stderr
    record = read_progress(cached.cache)
    assert (completed(cached), record["failures"], record["num_trajectories"]) == (["site/t2", "t0"], {}, 3)
    assert not (cached.cache / "site" / "t1").exists()
    after = tree(cached.cache)
    for path in before:
        if path.endswith(".h5") and not path.startswith("site/t1/"):
            assert after[path] == before[path]
    assert run_utils("verify", cached.cache, "--deep").returncode == 0
    assert "nothing to remove" in run_utils("prune", *named).stdout


def test_records_set_aside_and_leftovers_go(cached: Robot, run_here: Callable[..., Outcome]) -> None:
    assert run_utils("reset", cached.cache, "--yes").returncode == 0
    assert run_here(cached.config).code == 0
    (cached.cache / "progress.json.rebuild-20260101-000000").write_text("{}")
    (cached.cache / ".staging" / "half").mkdir()
    (cached.cache / ".staging" / "half" / "chunk_00000.h5").write_bytes(b"x")
    (cached.cache / "notes.txt").write_text("mine")
    said = run_utils("prune", cached.cache).stdout
    assert "record set aside: progress.json.reset-" in said
    assert "leftover: .staging/half" in said
    assert "gone from the data: site/t1 (" in said  # its chunks lie there still, recorded or not
    assert run_utils("prune", cached.cache, "--yes").returncode == 0
    assert sorted(path.name for path in cached.cache.iterdir()) == sorted(
        [
            ".lock",
            ".staging",
            "dino_cache.log",
            "notes.txt",
            "progress.json",
            "progress.json.bak",
            "runs.jsonl",
            "site",
            "t0",
        ]
    )
    assert os.listdir(cached.cache / ".staging") == []
    assert completed(cached) == ["site/t2", "t0"]


def empty(data: Path) -> None:
    for name in ("t0", "site"):
        shutil.rmtree(data / name)


def other(data: Path) -> None:
    empty(data)
    make_trajectory(data / "elsewhere")


def absent_below(data: Path) -> None:
    shutil.rmtree(data / "site")
    (data / "site").mkdir()  # a mount point


def dangling(data: Path) -> None:
    shutil.rmtree(data / "site")
    (data / "site").symlink_to("/nowhere/site")


@pytest.mark.parametrize("hide", [empty, other, absent_below, dangling], ids=lambda hide: hide.__name__)
@pytest.mark.parametrize("by", ["record", "config"])
def test_data_that_may_be_out_of_sight_cost_nothing(cached: Robot, hide: Callable[[Path], None], by: str) -> None:
    hide(cached.data)
    before = tree(cached.cache)
    named = ["--config", cached.config] if by == "config" else [cached.cache]
    refused = run_utils("prune", *named, "--yes")
    assert refused.returncode == 2, refused.stdout
    assert "Traceback" not in refused.stderr
    assert {path: content for path, content in tree(cached.cache).items() if path != ".lock"} == {
        path: content for path, content in before.items() if path != ".lock"
    }


def test_a_data_folder_that_is_not_there_is_refused(cached: Robot, tmp_path: Path) -> None:
    cache = Path(shutil.move(cached.cache, tmp_path / "cache"))
    cached.data.rename(tmp_path / "moved")
    before = tree(cache)
    refused = run_utils("prune", cache, "--yes")
    assert refused.returncode == 2
    assert f"{cached.data}: cannot list it: No such file or directory" in refused.stderr
    assert tree(cache) == before


def test_a_run_at_work_keeps_what_it_writes(cached: Robot) -> None:
    (cached.cache / "new").mkdir()
    (cached.cache / "new" / "chunk_00000.h5").write_bytes(b"x")
    with cache_lock(cached.cache):
        assert run_utils("prune", cached.cache, "--yes").returncode == 4
        said = run_utils("prune", cached.cache)
    assert said.returncode == 0
    assert "a run is at work" in said.stdout
    assert "new" not in said.stdout
    assert "gone from the data: new (" in run_utils("prune", cached.cache).stdout


def test_a_name_that_leads_out_of_the_cache_is_refused(cached: Robot, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "chunk_00000.h5").write_bytes(b"precious")
    record = cached.cache / "progress.json"
    record.write_text(record.read_text().replace('"site/t1"', f'"{os.path.relpath(victim, cached.cache)}"'))
    refused = run_utils("prune", cached.cache, "--yes")
    assert (refused.returncode, "is not the name of a trajectory" in refused.stderr) == (2, True)
    assert (victim / "chunk_00000.h5").read_bytes() == b"precious"
