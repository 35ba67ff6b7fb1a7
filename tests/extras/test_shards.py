"""--shard I/N: shares of a dataset done side by side, each with its own record, and merging those records."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import dino_cache
import progress_utils
from dino_cache_extras import shards
from dino_cache_extras.commands.verify import check_trajectory
from progress_utils import Shard, cache_lock
from support import (
    ROOT,
    Outcome,
    Robot,
    cache_command,
    check_stamps,
    chunk_files,
    frames_encoded,
    make_trajectory,
    read_progress,
    read_whole_record,
    run_utils,
    straight_line,
    tree,
    wait_until,
    write_poses,
)

NAMES = [f"lab/t{number}" for number in range(9)]
SHARES = [[name for name in NAMES if Shard(index, 3).holds(name)] for index in range(3)]
TIMES = ("start_time", "last_update", "elapsed_s")


def without_times(record: dict[str, Any]) -> dict[str, Any]:
    """A record but for times and the order in which trajectories came."""
    record = {key: value for key, value in copy.deepcopy(record).items() if key not in TIMES}
    for failure in record["failures"].values():
        del failure["time"]
    for key in ("completed_trajectories", "failed_trajectories"):
        record[key] = sorted(record[key])
    return record


def shard_dir(robot: Robot, shard: str) -> Path:
    return robot.cache / ".shards" / shard.replace("/", "-of-")


def merge(robot: Robot) -> str:
    done = run_utils("merge", robot.cache)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_shards(run_here: Callable[..., Outcome], robot: Robot, *arguments: str) -> list[Outcome]:
    return [run_here(robot.config, "--shard", f"{index}/3", *arguments) for index in range(3)]


@contextlib.contextmanager
def begun(robot: Robot, *arguments: str, batch_s: float = 0) -> Iterator[subprocess.Popen[str]]:
    """A run of its own."""
    environment = {**os.environ, "STAMP_BATCH_SECONDS": str(batch_s)}
    command = cache_command(robot.config, *arguments)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as it:
        try:
            yield it
        finally:
            it.kill()


def wait_for_batch(process: subprocess.Popen[str]) -> None:
    assert any(line == "batch begun\n" for line in process.stdout), "it ended before it encoded"


def test_shares_are_the_same_everywhere() -> None:
    assert [[name[-1] for name in share] for share in SHARES] == [["2", "4", "6", "7"], ["1", "3", "5"], ["0", "8"]]
    assert [Shard(index, 4).holds("ward/run_07") for index in range(4)] == [True, False, False, False]
    assert [Shard(index, 3).holds("b/ü") for index in range(3)] == [False, False, True]


@pytest.fixture
def whole(robot: Robot, tmp_path: Path, run_here: Callable[..., Outcome]) -> Robot:
    """What one run makes of the same data, in which one is broken."""
    robot.add(*NAMES)
    robot.add_broken("lab/b0")
    whole = Robot(robot.data, tmp_path / "whole", tmp_path / "whole.yaml")
    settings = yaml.safe_load(robot.config.read_text())
    settings["datasets"]["robot"]["cache_dir"] = str(whole.cache)
    whole.config.write_text(yaml.safe_dump(settings))
    assert run_here(whole.config).code == 1
    return whole


def check_merged(robot: Robot, whole: Robot) -> None:
    """All three shards are done: merged, they are what one run made."""
    assert read_progress(robot.cache)["completed_trajectories"] == []
    shown = run_utils("show", robot.cache).stdout
    assert "9 completed trajectories wait in 3 unmerged shards: `progress_utils.py merge --cache-dir " in shown
    assert "merged shards 0/3, 1/3, 2/3: 9 trajectories taken in, now 9 completed, 1 failed" in merge(robot)
    assert without_times(read_progress(robot.cache)) == without_times(read_progress(whole.cache))
    (robot.cache / ".staging").mkdir(exist_ok=True)
    robot.check(*NAMES)
    assert not (robot.cache / ".shards").exists()
    assert run_utils("verify", "--deep", robot.cache).returncode == 0
    assert "Failed: lab/b0" in (robot.cache / "dino_cache.log").read_text()


def test_three_shards_and_a_merge_equal_one_run(robot, whole, run_here):
    assert [outcome.code for outcome in run_shards(run_here, robot)] == [0, 0, 1]
    check_merged(robot, whole)
    runs = [json.loads(line) for line in (robot.cache / "runs.jsonl").read_text().splitlines()]
    assert [(run["shard"], run["completed"], run["failed"]) for run in runs] == [
        ("0/3", 4, 0),
        ("1/3", 3, 0),
        ("2/3", 2, 1),
    ]
    assert "no shards to merge" in merge(robot)
    assert run_here(robot.config, "--shard", "0/3").code == 0
    assert "unmerged" not in run_utils("show", robot.cache).stdout  # nothing to do begins no record


@pytest.mark.slow
def test_three_shards_at_once_one_killed_one_interrupted_and_a_merge_equal_one_run(robot, whole):
    """What was lost is redone by the same shards, at once too."""
    with contextlib.ExitStack() as running:
        killed, stopped, other = (
            running.enter_context(begun(robot, "--shard", f"{index}/3", batch_s=seconds))
            for index, seconds in enumerate((30, 1, 0))
        )
        wait_for_batch(stopped)
        stopped.send_signal(signal.SIGINT)
        wait_for_batch(killed)
        killed.kill()
        assert [process.wait(120) for process in (killed, stopped, other)] == [-signal.SIGKILL, 130, 1]
    with contextlib.ExitStack() as running:
        again = [running.enter_context(begun(robot, "--shard", f"{index}/3")) for index in (0, 1)]
        assert [process.wait(120) for process in again] == [0, 0]
    check_merged(robot, whole)


@pytest.fixture
def two_done(robot: Robot, run_here: Callable[..., Outcome]) -> Robot:
    """Two of three shards are done, and wait."""
    robot.add(*NAMES)
    for index in range(2):
        assert run_here(robot.config, "--shard", f"{index}/3").code == 0
    return robot


EDITS = [["reset", "--yes"], ["reset-failed"], ["prune", "--yes"], ["verify", "--repair", "--yes"]]
EDITS_AND_MERGE = [*EDITS, ["rebuild", "--yes"], ["merge"]]


@pytest.mark.slow
def test_who_is_kept_out_while_a_shard_is_at_work(two_done, run_here):
    robot = two_done
    with begun(robot, "--shard", "2/3", batch_s=60) as shard:
        wait_for_batch(shard)
        before = {path: data for path, data in tree(robot.cache).items() if path.endswith((".json", ".h5"))}
        holder = f"pid {shard.pid} on "
        for arguments, told in (
            ([], f"another run holds this cache (shard 2/3: {holder}"),
            (["--shard", "2/3"], f"another run of shard 2/3 holds this cache ({holder}"),
            (["--shard", "0/4"], f"shard 2/3 is at work ({holder}"),
        ):
            outcome = run_here(robot.config, *arguments)
            assert (outcome.code, told in outcome.err) == (4, True), outcome.err
        for command in EDITS_AND_MERGE:
            assert progress_utils.main([*command, "--cache-dir", str(robot.cache)]) == 4, command
        assert run_here(robot.config, "--dry-run").code == 0
        assert run_here(robot.config, "--shard", "0/3").code == 0  # the others go on
        assert {path: data for path, data in tree(robot.cache).items() if path.endswith((".json", ".h5"))} == before
        assert f"Shard 2/3 at work: {holder}" in run_utils("show", robot.cache).stdout
        (row,) = json.loads(run_utils("list", "--json", "--root", robot.cache.parent).stdout)
        assert row["state"] == "running"
        assert run_utils("verify", robot.cache).returncode == 0
    assert run_here(robot.config, "--shard", "2/3").code == 0
    merge(robot)
    robot.check(*NAMES)


def test_a_shard_is_kept_out_while_somebody_holds_the_cache(two_done, run_here):
    with cache_lock(two_done.cache):
        outcome = run_here(two_done.config, "--shard", "2/3")
        assert outcome.code == 4
        assert f"another run holds this cache (pid {os.getpid()} on" in outcome.err
        assert run_utils("merge", two_done.cache).returncode == 4


def test_a_watch_and_a_report_tell_what_waits(two_done, run_here, tmp_path):
    assert run_utils("report", two_done.cache, "-o", tmp_path / "report.html").returncode == 0
    assert "7 completed trajectories wait in 2 unmerged shards" in (tmp_path / "report.html").read_text()
    command = [sys.executable, ROOT / "progress_utils.py", "show", "--cache-dir", two_done.cache, "--watch", "0.1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watcher:
        assert any("7 completed trajectories wait in 2 unmerged" in line for line in watcher.stdout)
        assert run_here(two_done.config, "--shard", "2/3").code == 0
        assert any("9 completed trajectories wait in 3 unmerged" in line for line in watcher.stdout)
        watcher.send_signal(signal.SIGINT)
    assert watcher.returncode == 0


def test_edits_wait_for_a_merge_and_the_next_whole_run_merges(two_done, run_here, encoders):
    robot = two_done
    before = tree(robot.cache)
    for command in EDITS:
        done = run_utils(*command, "--cache-dir", robot.cache)
        assert done.returncode == 2, command
        assert "the records of shards 0/3, 1/3 are not merged yet: first `progress_utils.py merge" in done.stderr
    done = run_utils("verify", robot.cache)  # what shards have is nothing odd
    assert (done.returncode, "7 completed trajectories wait in 2 unmerged" in done.stdout) == (0, True), done.stdout
    listed = run_utils("list", "--root", robot.cache.parent).stdout.splitlines()
    assert listed[-1].startswith(f"{robot.cache}: 7 completed trajectories wait in 2 unmerged shards: ")
    (row,) = json.loads(run_utils("list", "--root", robot.cache.parent, "--json").stdout)
    assert row["waiting"].startswith("7 completed trajectories wait in 2 unmerged shards: ")
    dry = run_here(robot.config, "--dry-run")
    assert f"to do now: {len(SHARES[2])}" in dry.out
    assert tree(robot.cache) == before
    outcome = run_here(robot.config)
    assert outcome.code == 0
    assert "robot: merged shards: 0/3, 1/3: " in outcome.out
    assert frames_encoded(encoders) == 20 * len(SHARES[2])
    robot.check(*NAMES)
    assert not (robot.cache / ".shards").exists()


def test_caches_of_a_configuration_are_merged_together_and_a_dry_run_writes_nothing(two_done, run_here):
    robot = two_done
    settings = yaml.safe_load(robot.config.read_text())
    make_trajectory(robot.data.with_name("yard") / "t0")
    settings["datasets"]["yard"] = {"data_folder": str(robot.data.with_name("yard"))}
    robot.config.write_text(yaml.safe_dump(settings))
    assert [outcome.code for outcome in run_shards(run_here, robot)] == [0, 0, 0]
    before = tree(robot.data.parent)
    dry = run_here(robot.config, "--dry-run", "--shard", "2/3")
    assert (dry.code, dry.out.count("to do now: 0")) == (0, 2)
    assert tree(robot.data.parent) == before
    done = run_utils("merge", "--config", robot.config)
    assert (done.returncode, done.stdout.count("merged shards")) == (0, 2), done.stderr
    robot.check(*NAMES)
    assert run_here(robot.config).code == 0


def test_a_record_that_came_since_is_kept(two_done, run_here):
    """Another version, which knows nothing of shards, redid a trajectory; rebuild found one that a shard withdrew."""
    robot, name = two_done, SHARES[0][0]
    own = progress_utils.Progress.load(shard_dir(robot, "0/3"))
    main = progress_utils.Progress.load(robot.cache)
    record = {**own.records[name], "fingerprint": "f" * 16}
    main.specs["f" * 16] = {**own.processing_config, "max_chunk_distance_m": 9.0}
    main.complete(name, own.checksums[name], record)
    main.save()
    merge(robot)
    assert read_progress(robot.cache)["trajectory_records"][name] == record


def test_trajectories_in_each_others_folders_are_published_one_at_a_time(tmp_path):
    config = dino_cache.DatasetConfig(
        "robot", tmp_path, tmp_path / "cache", None, dino_cache.CacheSpec(), dino_cache.RunOptions(), shard=Shard(0, 1)
    )
    progress = shards.ShardProgress(config.record_dir, "robot")

    def store(*names: str) -> dino_cache.ChunkStore:
        found = [dino_cache.Trajectory(name, tmp_path / name) for name in names]
        return shards.share_of(config, progress, dino_cache.Selection(found, [], [])).store

    assert type(store("a/b", "a/c")) is dino_cache.ChunkStore
    nested = store("a", "a/b")
    assert type(nested) is shards.SharedStore
    config.record_dir.mkdir(parents=True)
    nested.empty_staging()
    for name in ("a/b", "a"):
        staged = nested.new_staging_folder()
        (staged / "chunk_00000.h5").touch()
        assert nested.publish(staged, name, lambda name: None) is None or name == "a"
    assert sorted(progress_utils.chunk_folders(config.cache_dir)) == ["a", "a/b"]


def test_readers_say_what_waits(two_done):
    from dino_cache import CacheWindows

    with pytest.raises(dino_cache.RefusedError, match="completed trajectories wait in 2 unmerged shards"):
        CacheWindows(two_done.cache, window=2)
    merge(two_done)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        count = len(CacheWindows(two_done.cache, window=2))
    assert count > 0


def test_a_redone_trajectory_is_in_no_record_while_its_chunks_are_replaced(robot, run_here, monkeypatch):
    robot.add(*NAMES)
    assert run_here(robot.config).code == 0
    name, other = SHARES[1][:2]
    for path in sorted((robot.data / name).glob("*.png")):
        path.unlink()
    shutil.rmtree(robot.data / name)
    make_trajectory(robot.data / name, 12, stamp=7)
    publish = dino_cache.ChunkStore.publish

    def die(self: Any, staged: Path, it: str, before_replacing: Callable[[str], None]) -> Path | None:
        assert read_progress(robot.cache)["trajectory_records"].keys() == {*NAMES} - {name}  # other shards' are there
        before_replacing(it)
        raise RuntimeError("died")

    monkeypatch.setattr(dino_cache.ChunkStore, "publish", die)
    assert run_here(robot.config, "--shard", "1/3").code == 3
    assert name not in read_progress(robot.cache)["trajectory_records"]
    assert sorted(read_whole_record(shard_dir(robot, "1/3"))["completed_trajectories"]) == sorted({*SHARES[1]} - {name})
    with pytest.warns(UserWarning, match="0 completed trajectories wait in 1 unmerged"):
        assert len(dino_cache.CacheWindows(robot.cache, window=2)) > 0
    monkeypatch.setattr(dino_cache.ChunkStore, "publish", publish)
    outcome = run_here(robot.config, "--shard", "1/3")
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].startswith(f"OK: 1 datasets, {len(SHARES[1])} completed (+1), 0 failed, 0 left")
    merge(robot)
    record = read_progress(robot.cache)
    assert record["trajectory_records"][name]["spans"][-1][-1] == 12
    assert {*record["trajectory_records"]} == {*NAMES}
    assert run_utils("verify", "--deep", robot.cache).returncode == 0
    assert other in record["trajectory_records"]


def test_changed_data_that_break_a_rule_fail_in_the_shard_and_after_the_merge(robot, run_here):
    robot.add(*NAMES)
    assert run_here(robot.config).code == 0
    name = SHARES[0][0]
    write_poses(robot.data / name, straight_line(7), straight_line(7)[:, 0])
    assert [outcome.code for outcome in run_shards(run_here, robot)] == [1, 0, 0]
    assert not list((robot.cache / name).glob("*.h5"))
    merge(robot)
    record = read_progress(robot.cache)
    assert [*record["failures"]] == [name]
    assert {*record["trajectory_records"]} == {*NAMES} - {name}


class Died(BaseException):
    """The process is gone."""


@contextlib.contextmanager
def dying_at(number: int) -> Iterator[list[int]]:
    """Whatever would change the disk raises from the call with that number on, from 0; yields how many are left."""
    left = [number]

    def step(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            if str(arguments[0]).endswith(".lock.owner"):  # the system drops a dead process's locks
                return real(*arguments, **more)
            if left[0] == 0:
                raise Died
            left[0] -= 1
            return real(*arguments, **more)

        return call

    with pytest.MonkeyPatch.context() as patches, contextlib.suppress(Died):
        for name in ("replace", "unlink", "rename", "rmdir", "mkdir", "fsync", "link"):
            patches.setattr(os, name, step(getattr(os, name)))
        yield left


def test_a_merge_killed_anywhere_comes_to_the_same(two_done, tmp_path):
    expected, number, has_died = None, 0, True
    while has_died:
        cache = shutil.copytree(two_done.cache, tmp_path / "copy" / str(number))
        with dying_at(number) as left:
            shards.merge(cache)
        has_died = left[0] == 0
        shards.merge(cache)
        record = without_times(read_progress(cache)) | {"elapsed_s": read_progress(cache)["elapsed_s"]}
        expected = expected or record
        assert record == expected
        assert {*record["completed_trajectories"]} == {*SHARES[0], *SHARES[1]}
        assert not (cache / ".shards").exists()
        number += 1
    assert number > 10


@pytest.mark.slow
def test_a_shard_killed_anywhere_mixes_nothing(robot, run_here, tmp_path):
    """It redoes one trajectory and does a new one; whatever a record names is there, every byte."""
    *old, new = SHARES[1]
    robot.add(*(name for name in NAMES if name != new))
    assert run_here(robot.config).code == 0
    robot.add(new)
    shutil.rmtree(robot.data / old[0])
    make_trajectory(robot.data / old[0], 16, stamp=int(old[0][-1]))  # as many bytes in its first chunk
    shutil.copytree(robot.cache, tmp_path / "before")
    number, has_died = 0, True
    while has_died:
        shutil.rmtree(robot.cache)
        shutil.copytree(tmp_path / "before", robot.cache)
        with dying_at(number) as left:
            run_here(robot.config, "--shard", "1/3")
        has_died = left[0] == 0
        for folder in (robot.cache, shard_dir(robot, "1/3")):
            progress = progress_utils.Progress.load(folder)
            for name, record in progress.records.items() if progress else ():
                task = (name, record, progress.checksums[name])
                assert check_trajectory(robot.cache, task, deep=True) == [], (number, folder)
        assert run_here(robot.config, "--shard", "1/3").code == 0
        with cache_lock(robot.cache):
            shards.merge(robot.cache)
        record = read_progress(robot.cache)
        assert sorted(record["completed_trajectories"]) == NAMES
        assert record["trajectory_records"][old[0]]["spans"][-1][-1] == 16
        assert all(check_stamps(robot.cache, name, int(name[-1])) for name in NAMES)
        number += 1
    assert number > 20


def test_another_configuration_is_asked_about_once_and_never_mixes_unasked(two_done, run_here, monkeypatch):
    robot = two_done
    robot.configure(max_chunk_distance_m=1.0)
    before = tree(robot.cache)
    outcome = run_here(robot.config, "--shard", "2/3")
    assert outcome.code == 2
    assert "max_chunk_distance_m: 2.0 -> 1.0" in outcome.err
    assert {path for path in tree(robot.cache).keys() - before.keys() if not path.startswith(".shards/2-of-3")} == set()
    assert run_here(robot.config, "--shard", "2/3", "--yes").code == 0
    make_trajectory(robot.data / "lab/t30", 20)
    later = next(Shard(index, 3) for index in range(3) if Shard(index, 3).holds("lab/t30"))
    assert run_here(robot.config, "--shard", str(later)).code == 0  # it was confirmed
    merge(robot)
    assert "Mixed cache" in run_utils("show", robot.cache).stdout


def test_a_shard_that_begins_meanwhile_with_another_configuration_stops_this_one(robot, run_here, monkeypatch):
    """Neither has anything recorded when they compare."""
    robot.add(*NAMES)
    load = dino_cache.load_encoders

    def begin_another(*arguments: Any) -> None:
        mate = progress_utils.Progress(shard_dir(robot, "0/3"), "robot")
        mate.cache_dir.mkdir()
        mate.processing_config = dino_cache.CacheSpec(weights="random", max_chunk_distance_m=7.0).to_json()
        mate.save()
        load(*arguments)

    monkeypatch.setattr(dino_cache, "load_encoders", begin_another)
    outcome = run_here(robot.config, "--shard", "1/3")
    assert outcome.code == 2
    assert "shard 0/3 began just now with another configuration" in outcome.err
    assert "max_chunk_distance_m: 7.0 there, 2.0 here" in outcome.err
    assert chunk_files(robot.cache) == []


def test_another_cut_takes_up_what_the_first_one_did(two_done, run_here, encoders):
    robot = two_done
    outcomes = [run_here(robot.config, "--shard", f"{index}/2") for index in range(2)]
    assert [outcome.code for outcome in outcomes] == [0, 0]
    assert "merged shards: 0/3, 1/3: " in "".join(outcome.out for outcome in outcomes)
    encoded = sum(sum(encoder.batch_sizes) for encoder in encoders)
    assert encoded == 20 * len(NAMES)
    merge(robot)
    robot.check(*NAMES)


def test_limit_failures_and_the_verdict_are_the_shards_own(robot, run_here):
    robot.add(*NAMES)
    robot.configure(max_attempts=2)
    name = SHARES[2][0]
    write_poses(robot.data / name, straight_line(7), straight_line(7)[:, 0])
    outcome = run_here(robot.config, "--shard", "1/3", "--limit", "1")
    assert outcome.code == 5
    assert f"PARTIAL: 1 datasets, 1 completed (+1), 0 failed, {len(SHARES[1]) - 1} left" in outcome.out
    assert run_here(robot.config, "--shard", "2/3").code == 1
    assert read_progress(shard_dir(robot, "2/3"))["failures"][name]["attempts"] == 1
    merge(robot)
    assert run_here(robot.config, "--shard", "2/3").code == 1
    again = run_here(robot.config, "--shard", "2/3")
    assert again.code == 1
    assert "1 failed trajectories are not tried again after 2 attempts" in again.err
    assert read_progress(robot.cache)["num_trajectories"] == len(NAMES)


@pytest.mark.slow
def test_a_killed_shards_partial_trajectory_is_taken_up(robot, run_here):
    names = [name for name in NAMES if Shard(0, 2).holds(name)][:1]
    make_trajectory(robot.data / names[0], 60, stamp=int(names[0][-1]))
    command = cache_command(robot.config, "--shard", "0/2", "--batch-size", "4")
    environment = {**os.environ, "STAMP_BATCH_SECONDS": "0.1"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as it:
        wait_until(lambda: [*shard_dir(robot, "0/2").glob(".staging/**/chunk_00002.h5")])
        it.kill()
    outcome = run_here(robot.config, "--shard", "0/2", "--dry-run")
    assert outcome.code == 0
    assert "goes on after" in run_here(robot.config, "--shard", "0/2").out
    merge(robot)
    assert run_utils("verify", "--deep", robot.cache).returncode == 0


@pytest.mark.parametrize("text", ["3/3", "-1/3", "1", "a/b", "1/0", "1/3/5", "1.0/3", ""])
def test_what_is_no_shard_is_answered_with_what_to_write(robot, capsys, text):
    with pytest.raises(SystemExit) as ended:
        dino_cache.main(["--config", str(robot.config), f"--shard={text}"])
    assert ended.value.code == 2
    assert "is not I/N with 0 <= I < N: of 16 shares write 0/16, ..., 15/16" in capsys.readouterr().err


def test_what_does_not_go_with_shards_is_refused(robot, run_here):
    robot.add("t0")
    for settings, told in (
        ({"executor": "ray"}, "goes with executor: local, not with ray"),
        ({"enable_progress_tracking": False}, "not with enable_progress_tracking: False"),
        ({"force_rebuild": True}, "not with force_rebuild. `progress_utils.py reset"),
    ):
        robot.configure(**settings)
        outcome = run_here(robot.config, "--shard", "0/3")
        assert (outcome.code, told in outcome.err) == (2, True), outcome.err
    assert not robot.cache.exists()


def test_the_folder_of_shards_is_nobodys_trajectory(two_done, run_here):
    robot = two_done
    assert not any(name.startswith(".shards") for name in progress_utils.chunk_folders(robot.cache))
    for command in (["verify"], ["export", "--to", "flat", "-o", "x.h5"], ["report"]):
        done = run_utils(*command, "--cache-dir", shard_dir(robot, "0/3"))
        assert done.returncode == 2
        assert f"is a shard of a cache: name the cache, {robot.cache}" in done.stderr
    assert run_utils("rebuild", "--yes", "--cache-dir", robot.cache).returncode == 0  # also before a merge
    merge(robot)
    assert run_here(robot.config).code == 0
    robot.check(*NAMES)


def test_a_damaged_record_of_a_shard_is_refused_and_nothing_changes(two_done, run_here):
    robot = two_done
    (shard_dir(robot, "0/3") / "progress.json").write_text("{")
    before = tree(robot.cache)
    for outcome in (run_here(robot.config), run_here(robot.config, "--shard", "0/3")):
        assert outcome.code == 2
        assert "not a usable record of a shard" in outcome.err
    assert run_utils("merge", robot.cache).returncode == 2
    assert "the records of shards 0/3 cannot be read" in run_utils("show", robot.cache).stdout
    after = tree(robot.cache)
    assert {path: after[path] for path in before} == before
