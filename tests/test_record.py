"""progress.json: what it must hold, that it is whole after any death, and how seldom it is saved."""

import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import progress_utils
from progress_utils import Progress
from support import make_trajectory, read_progress, record, run_utils, tree, write_config, write_poses

KEYS = {
    "format_version", "dataset_name", "start_time", "last_update", "elapsed_s", "completed_trajectories",
    "failed_trajectories", "total_chunks", "processing_config", "trajectory_checksums", "checksum_kind",
    "rebuild_started", "weights", "specs", "trajectory_records", "failures",
}  # fmt: skip


# Those that records of earlier versions lack.
LATER_KEYS = {"data_folder", "data_format", "num_trajectories", "other_caches", "recut_started"}


def test_a_record_of_an_earlier_version_is_shown_and_listed(tmp_path):
    data = {key: value for key, value in record().items() if key not in LATER_KEYS}
    (tmp_path / "progress.json").write_text(json.dumps(data))
    assert run_utils("show", "--cache-dir", tmp_path).returncode == 0
    (row,) = json.loads(run_utils("list", "--root", tmp_path, "--json").stdout)
    assert (row["completed"], row["percent"]) == (2, None)


def test_a_run_records_exactly_these_keys(tmp_path, run_here):
    make_trajectory(tmp_path / "data" / "good", 20)
    write_poses(make_trajectory(tmp_path / "data" / "bad", 3), np.full((3, 2), np.nan), np.zeros(3))
    assert run_here(write_config(tmp_path / "c.yaml", tmp_path / "data")).code == 1
    written = read_progress(tmp_path / "data" / "dino_cache_small")
    assert written.keys() == KEYS | LATER_KEYS
    assert written["data_folder"] == str(tmp_path / "data")
    assert written["data_format"] == "gnm"
    assert written["num_trajectories"] == 2
    assert written["completed_trajectories"] == ["good"]
    assert written["failed_trajectories"] == ["bad"]
    entry, failure = written["trajectory_records"]["good"], written["failures"]["bad"]
    assert entry.keys() == {"fingerprint", "spans", "bytes", "checksum_kind"}
    assert failure.keys() == {"reason", "error_type", "attempts", "time", "checksum", "checksum_kind"}
    # 20 frames 0.25 m apart, 2 m chunks with 0.5 m overlap: 0-2.0, 1.5-3.5, 3.0-4.75 m
    assert entry["spans"] == [[0, 9], [6, 15], [12, 20]]
    assert written["total_chunks"] == 3
    files = sorted((tmp_path / "data" / "dino_cache_small" / "good").iterdir())
    assert entry["bytes"] == [path.stat().st_size for path in files]
    assert written["processing_config"] == written["specs"][entry["fingerprint"]]
    assert len(written["trajectory_checksums"]["good"]) == 16
    assert int(written["trajectory_checksums"]["good"], 16) >= 0


def without(entries: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if name != key}


def with_entry(key: str, name: str, **changes: Any) -> dict[str, Any]:
    """The record, with some fields of one trajectory's entry changed."""
    entries = record(1)[key]
    return record(1, **{key: {**entries, name: {**entries[name], **changes}}})


def with_wrong_type(key: str) -> dict[str, Any]:
    is_number = isinstance(record(rebuild_started=1.0, recut_started=1.0)[key], (int, float))
    return record(1, **{key: "text" if is_number else 1})


UNUSABLE: dict[str, Any] = {
    "empty": b"",
    "half a file": json.dumps(record()).encode()[:-40],
    "zeros, as after a power cut": bytes(500),
    "not UTF-8": b'{"format_version": "\xff"}',
    "deeply nested": b"[" * 100_000,
    "a list": [],
    "null": None,
    "no version": without(record(), "format_version"),
    "an older layout": {"completed_trajectories": ["a"], "failed_trajectories": [], "total_chunks": 1},
    "version 0": record(format_version=0),
    **{f"no {key}": without(record(1), key) for key in sorted(KEYS)},
    **{f"{key} of a wrong type": with_wrong_type(key) for key in sorted(KEYS | LATER_KEYS)},
    "elapsed_s is true": record(elapsed_s=True),
    "completed without a record": record(completed_trajectories=["a", "b/ü", "c"]),
    "a record that is not completed": record(completed_trajectories=["a"]),
    "no checksum": record(trajectory_checksums={"a": "0" * 16}),
    "a checksum that is a number": record(trajectory_checksums={"a": 0, "b/ü": "1" * 16}),
    "failed without a reason": record(1, failures={}),
    "a reason without a failed one": record(1, failed_trajectories=[]),
    "completed and failed": record(1, failed_trajectories=["a"], failures={"a": record(1)["failures"]["f0"]}),
    "a list among the names": record(completed_trajectories=["a", ["b/ü"]]),
    "a spec that is missing": record(specs={}),
    "a spec that is a number": record(specs={"f" * 16: 1}),
    "weights without a digest": record(weights={"source": "random"}),
    "fewer sizes than spans": with_entry("trajectory_records", "a", bytes=[100]),
    "a span of one number": with_entry("trajectory_records", "a", spans=[[0], [7, 12]]),
    "a span of text": with_entry("trajectory_records", "a", spans=[["0", "9"], [7, 12]]),
    "no spans": with_entry("trajectory_records", "a", spans=[], bytes=[]),
    "attempts as text": with_entry("failures", "f0", attempts="3"),
    "a reason of null": with_entry("failures", "f0", reason=None),
    "a time that no clock shows": record(last_update=1e300),
    "a time that is no number": record(last_update=float("nan")),
}


@pytest.mark.parametrize("content", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_an_unusable_record_stops_everything_with_the_way_out_and_nothing_changed(tmp_path, run_here, capsys, content):
    make_trajectory(tmp_path / "data" / "a", 3)
    cache_dir = tmp_path / "data" / "dino_cache_small"
    cache_dir.mkdir()
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    (cache_dir / "progress.json").write_bytes(data)
    config = write_config(tmp_path / "c.yaml", tmp_path / "data")
    folder = str(cache_dir)
    commands: list[Callable[[], int]] = [
        lambda: progress_utils.main(["show", "--cache-dir", folder]),
        lambda: progress_utils.main(["show", "--cache-dir", folder, "--json"]),
        lambda: progress_utils.main(["reset-failed", "--cache-dir", folder]),
    ]
    for command in commands:
        assert command() == 2
        check_way_out(cache_dir, capsys.readouterr().err)
    outcome = run_here(config)
    assert outcome.code == 2
    check_way_out(cache_dir, outcome.err)
    assert without(tree(cache_dir), ".lock") == {"progress.json": data}


def test_a_newer_record_stops_everything_and_asks_for_a_newer_program(tmp_path, run_here, capsys):
    make_trajectory(tmp_path / "data" / "a", 3)
    cache_dir = tmp_path / "data" / "dino_cache_small"
    cache_dir.mkdir()
    text = json.dumps({**record(), "format_version": 2, "unheard of": 1})
    (cache_dir / "progress.json").write_text(text)
    assert progress_utils.main(["show", "--cache-dir", str(cache_dir)]) == 2
    for message in (capsys.readouterr().err, run_here(write_config(tmp_path / "c.yaml", tmp_path / "data")).err):
        assert f"{cache_dir / 'progress.json'}: format_version is 2, this program knows 1" in message
        assert "Update the program" in message
    assert (cache_dir / "progress.json").read_text() == text


def check_note(value: str) -> None:
    if value == "wrong":
        raise ValueError("it is wrong")


@pytest.mark.parametrize(
    ("note", "reason"), [("wrong", "key note: it is wrong"), (3, r"key note has the wrong type \(int\)")]
)
def test_a_new_key_is_a_row_that_is_saved_loaded_and_checked(tmp_path, monkeypatch, capsys, note, reason):
    row = progress_utils.RecordKey((str,), lambda: "new", check=check_note, is_later=True)
    monkeypatch.setitem(progress_utils.RECORD_KEYS, "note", row)
    (tmp_path / "progress.json").write_text(json.dumps(record()))  # of a version that does not know the key
    progress = Progress.load(tmp_path)
    assert progress.note == "new"
    progress.note = "kept"
    progress.save()
    assert read_progress(tmp_path)["note"] == "kept"
    assert Progress.load(tmp_path).note == "kept"
    (tmp_path / "progress.json").write_text(json.dumps({**record(), "note": note}))
    assert progress_utils.main(["show", "--cache-dir", str(tmp_path)]) == 2
    assert re.search(reason, capsys.readouterr().err)


def check_way_out(cache_dir: Path, message: str) -> None:
    for part in (cache_dir / "progress.json", "progress.json.bak", f"progress_utils.py reset --cache-dir {cache_dir}"):
        assert str(part) in message


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here; nothing that handles errors sees it."""


def no_hard_links(*_: Any) -> None:
    raise OSError(1, "Operation not permitted")


def save(cache_dir: Path, elapsed_s: float) -> None:
    """Save a record that is known by its elapsed_s."""
    progress = Progress(cache_dir, "robot")
    progress.elapsed_s = elapsed_s
    progress.save()


def saved(path: Path) -> float:
    return json.loads(path.read_text())["elapsed_s"]


@pytest.mark.parametrize("hard_links", [True, False])
def test_the_copy_before_stays_as_bak(tmp_path, monkeypatch, hard_links):
    if not hard_links:
        monkeypatch.setattr(os, "link", no_hard_links)
    save(tmp_path, 1.0)
    assert set(tree(tmp_path)) == {"progress.json"}
    for number in (2.0, 3.0, 4.0):
        before = (tmp_path / "progress.json").read_bytes()
        save(tmp_path, number)
        assert saved(tmp_path / "progress.json") == number
        assert (tmp_path / "progress.json.bak").read_bytes() == before
        assert set(tree(tmp_path)) == {"progress.json", "progress.json.bak"}


@pytest.mark.parametrize("hard_links", [True, False])
def test_a_save_killed_at_any_step_leaves_the_old_record_or_the_new(tmp_path, monkeypatch, hard_links):
    """Before every call that changes the disk the record is whole; the process dies at the n-th, for every n."""
    finished, step = False, 0
    while not finished:
        step += 1
        folder = tmp_path / str(step)
        folder.mkdir()
        save(folder, 1.0)
        save(folder, 2.0)
        calls = 0

        def dying(function: Callable[..., Any], folder: Path = folder, fatal: int = step) -> Callable[..., Any]:
            def call(*arguments: Any, **keywords: Any) -> Any:
                nonlocal calls
                calls += 1
                assert saved(folder / "progress.json") in (2.0, 3.0)
                assert saved(folder / "progress.json.bak") in (1.0, 2.0)
                if calls == fatal:
                    raise Killed
                return function(*arguments, **keywords)

            return call

        with monkeypatch.context() as patch:
            if not hard_links:
                patch.setattr(os, "link", no_hard_links)
            for name in ("fsync", "link", "replace", "rename", "unlink"):
                patch.setattr(os, name, dying(getattr(os, name)))
            patch.setattr(shutil, "copyfile", dying(shutil.copyfile))
            try:
                save(folder, 3.0)
                finished = True
            except Killed:
                pass
        assert Progress.load(folder).elapsed_s in (2.0, 3.0)
        save(folder, 4.0)  # what the dead one left is not in the way
        assert Progress.load(folder).elapsed_s == 4.0
        assert saved(folder / "progress.json.bak") in (2.0, 3.0)
    assert step > 5  # fsync, copy, replace, replace, fsync at least


def test_a_full_disk_leaves_the_old_record(tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    save(tmp_path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, 2.0)
    assert saved(tmp_path / "progress.json") == 1.0


def test_saves_beyond_a_share_of_the_run_are_1000_saves_apart(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    replace = os.replace

    def slow_replace(source: Path, target: Path) -> None:
        replace(source, target)
        if Path(target).name == "progress.json":
            clock.now += 2.0  # a save takes 2 s

    monkeypatch.setattr(progress_utils, "time", SimpleNamespace(monotonic=lambda: clock.now, time=time.time))
    monkeypatch.setattr(os, "replace", slow_replace)
    progress = Progress(tmp_path, "robot")

    def saves(run_time_s: float, wait_s: float = 0.0) -> bool:
        before = clock.now = clock.now + wait_s
        progress.save_spaced(run_time_s)
        return clock.now > before

    assert saves(1.0)  # the first
    assert not saves(1999.0)  # it and another one are 4 s of 1999 s: above 0.2 %
    assert saves(2000.0)  # at 0.2 %
    assert not saves(2000.0)  # 6 s of 2000 s
    assert not saves(2500.0, wait_s=1999.0)  # 1000 times 2 s are not yet over
    assert saves(2500.0, wait_s=1.0)  # now they are
    assert not saves(3999.0)  # 8 s of 3999 s
    assert saves(4000.0)
    progress.save()  # a plain save is never spaced, and counts
    assert not saves(5000.0)  # 12 s of 5000 s


def test_counts_can_be_read_while_another_thread_changes_the_record(tmp_path):
    """As a run's progress line does while its writer withdraws what it replaces."""
    progress = Progress(tmp_path, "robot")
    for number in range(2000):
        progress.complete(str(number), "0" * 16, {**record()["trajectory_records"]["a"]})
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as writer:
            withdrawals = [writer.submit(progress.forget, str(number)) for number in range(2000)]
            while not withdrawals[-1].done():
                assert 0 <= progress.total_chunks <= 4000
                assert len(progress.fingerprints) <= 1
    finally:
        sys.setswitchinterval(interval)
    assert progress.total_chunks == 0
