"""progress.json.journal: results go there where saves are spaced; every reader takes them in, and nothing else."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import progress_utils
from dino_cache import RunCounts
from progress_utils import Progress, RefusedError
from support import (
    make_trajectory,
    read_progress,
    read_whole_record,
    record,
    run_utils,
    tree,
    write_config,
    write_record,
)

JOURNAL = "progress.json.journal"
ENTRY = {"fingerprint": "f" * 16, "spans": [[0, 7]], "bytes": [90], "checksum_kind": "stat"}
FAILURE = {**record(1)["failures"]["f0"], "reason": "bad/0.jpg: broken"}


@pytest.fixture
def spaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first save, none is made that need not be."""
    monkeypatch.setattr(progress_utils, "SAVE_SHARE", 1e-12)


def begun(cache_dir: Path, failed: int = 1) -> Progress:
    """The record of `record()` as a run has it that is at work: `a`, `b/ü` completed, f0 failed, and saved once."""
    progress = Progress.load(write_record(cache_dir, failed))
    progress.save()
    return progress


def with_results(cache_dir: Path) -> Progress:
    """And then new/0 was completed, bad failed, and f0 was completed at last: three lines behind the first."""
    progress = begun(cache_dir)
    progress.elapsed_s = 9100.0
    progress.complete("new/0", "2" * 16, {**ENTRY})
    progress.save_spaced(1.0)
    progress.fail("bad", FAILURE)
    progress.save_spaced(1.0)
    progress.complete("f0", "3" * 16, {**ENTRY})
    progress.save_spaced(1.0)
    return progress


def completed(cache_dir: Path) -> list[str]:
    return sorted(Progress.load(cache_dir).records)


# ---------------------------------------------------------------------------------------------------------------------
# What is in it is known
# ---------------------------------------------------------------------------------------------------------------------


def test_results_between_two_saves_are_in_the_journal_and_every_command_sees_them(tmp_path, spaced):
    with_results(tmp_path)
    assert read_progress(tmp_path)["completed_trajectories"] == ["a", "b/ü"]  # as it was saved first
    shown = json.loads(run_utils("show", "--cache-dir", tmp_path, "--json").stdout)
    assert sorted(shown["completed_trajectories"]) == ["a", "b/ü", "f0", "new/0"]
    assert shown["trajectory_checksums"]["f0"] == "3" * 16
    assert shown["trajectory_records"]["new/0"] == ENTRY
    assert shown["failures"] == {"bad": FAILURE}
    assert (shown["total_chunks"], shown["elapsed_s"]) == (5, 9100.0)  # 2 + 1, and one each of f0 and new/0
    (row,) = json.loads(run_utils("list", "--root", tmp_path, "--json").stdout)
    assert (row["completed"], row["failed"], row["chunks"]) == (4, 1, 5)


def test_a_save_takes_the_journal_in_and_removes_it(tmp_path, spaced):
    with_results(tmp_path).save()
    assert sorted(read_progress(tmp_path)["completed_trajectories"]) == ["a", "b/ü", "f0", "new/0"]
    assert set(tree(tmp_path)) == {"progress.json", "progress.json.bak"}


def test_an_edit_takes_the_journal_in(tmp_path, spaced):
    with_results(tmp_path)
    assert progress_utils.main(["reset-failed", "--cache-dir", str(tmp_path)]) == 0
    written = read_progress(tmp_path)
    assert (sorted(written["completed_trajectories"]), written["failures"]) == (["a", "b/ü", "f0", "new/0"], {})
    assert not (tmp_path / JOURNAL).exists()


def test_reset_keeps_the_journal_beside_the_record_that_it_belongs_to(tmp_path, spaced):
    with_results(tmp_path)
    assert progress_utils.main(["reset", "--cache-dir", str(tmp_path), "--yes"]) == 0
    assert completed(tmp_path) == []
    (kept,) = tmp_path.glob("progress.json.reset-*[0-9]")
    os.replace(kept, tmp_path / "progress.json")
    os.replace(f"{kept}.journal", tmp_path / JOURNAL)
    assert completed(tmp_path) == ["a", "b/ü", "f0", "new/0"]


def test_a_configuration_that_only_the_journal_knows_is_known(tmp_path, spaced):
    progress = begun(tmp_path)
    progress.specs["e" * 16] = {**record()["processing_config"], "image_size": [14, 14]}
    progress.complete("new", "2" * 16, {**ENTRY, "fingerprint": "e" * 16})
    progress.save_spaced(1.0)
    progress.specs["d" * 16] = {**record()["processing_config"], "image_size": [28, 14]}
    progress.complete("newer", "2" * 16, {**ENTRY, "fingerprint": "d" * 16})
    progress.save_spaced(1.0)
    loaded = Progress.load(tmp_path)
    assert loaded.fingerprints == {"f" * 16, "e" * 16, "d" * 16}
    assert loaded.specs["d" * 16]["image_size"] == [28, 14]


def test_names_of_any_kind_come_back(tmp_path, spaced):
    names = ["zwei\nzeilen", "null\0", "ü/\u2028", "\udc80", '"']
    progress = begun(tmp_path)
    for name in names:
        progress.complete(name, "2" * 16, {**ENTRY})
        progress.save_spaced(1.0)
    assert completed(tmp_path) == sorted(["a", "b/ü", *names])


# ---------------------------------------------------------------------------------------------------------------------
# progress.json alone is true
# ---------------------------------------------------------------------------------------------------------------------


def test_progress_json_alone_names_no_trajectory_that_was_withdrawn(tmp_path, spaced):
    """An older program reads progress.json alone. What it names must be so, whatever the journal withdraws."""
    progress = begun(tmp_path)
    progress.to_redo = {"a", "b/ü"}
    for name in ("a", "b/ü"):
        assert progress.forget(name)
        progress.save_spaced(1.0, at_once=True)
        assert read_progress(tmp_path)["completed_trajectories"] == []
        assert name not in completed(tmp_path)
        progress.complete(name, "4" * 16, {**ENTRY})
        progress.save_spaced(1.0)
        assert Progress.load(tmp_path).checksums[name] == "4" * 16
    assert completed(tmp_path) == ["a", "b/ü"]


def test_the_first_redo_leaves_those_to_come_in_the_journal_alone_and_the_next_ones_save_nothing(tmp_path, spaced):
    progress = begun(tmp_path)
    progress.to_redo = {"a", "b/ü"}
    progress.forget("a")
    progress.save_spaced(1.0, at_once=True)
    saved = (tmp_path / "progress.json").read_bytes()
    assert (read_progress(tmp_path)["completed_trajectories"], completed(tmp_path)) == ([], ["b/ü"])
    progress.forget("b/ü")
    progress.save_spaced(1.0, at_once=True)
    assert (tmp_path / "progress.json").read_bytes() == saved
    assert completed(tmp_path) == []


def test_a_withdrawal_that_nobody_announced_is_saved(tmp_path, spaced):
    progress = begun(tmp_path)
    progress.fail("a", FAILURE)
    progress.save_spaced(1.0)
    assert read_progress(tmp_path)["completed_trajectories"] == ["b/ü"]


def test_a_journal_of_an_earlier_progress_json_is_ignored_and_a_leftover(tmp_path, spaced):
    """As where a run is killed between the save and the removal, or an older program saved."""
    progress = with_results(tmp_path)
    journal = (tmp_path / JOURNAL).read_bytes()
    progress.forget("new/0")
    progress.save()
    (tmp_path / JOURNAL).write_bytes(journal)
    assert completed(tmp_path) == ["a", "b/ü", "f0"]
    assert not Progress.load(tmp_path).has_journal
    (tmp_path / JOURNAL).write_bytes(journal.replace(b"completed", b"conpleted"))  # nor does it matter what it says
    assert completed(tmp_path) == ["a", "b/ü", "f0"]


# ---------------------------------------------------------------------------------------------------------------------
# What a kill, a power cut or a bad disk leaves
# ---------------------------------------------------------------------------------------------------------------------


def test_half_a_last_line_is_ignored(tmp_path, spaced):
    with_results(tmp_path)
    journal = (tmp_path / JOURNAL).read_bytes()
    begin = journal.rindex(b"\n", 0, -1) + 1  # of the last line, which completes f0
    for end in range(begin, len(journal)):
        (tmp_path / JOURNAL).write_bytes(journal[:end])
        assert completed(tmp_path) == ["a", "b/ü", "new/0"]


@pytest.mark.parametrize("tail", [bytes(300), b'1234 {"compl' + bytes(80), b"x" + bytes(9) + b"\n" + bytes(5) + b"\n"])
def test_zeros_where_a_power_cut_came_first_are_ignored(tmp_path, spaced, tail):
    with_results(tmp_path)
    with open(tmp_path / JOURNAL, "ab") as file:
        file.write(tail)
    assert completed(tmp_path) == ["a", "b/ü", "f0", "new/0"]
    (tmp_path / JOURNAL).write_bytes(tail)
    assert completed(tmp_path) == ["a", "b/ü"]


DAMAGES: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "another name": lambda lines: [lines[0], lines[1].replace(b"new/0", b"new/1"), *lines[2:]],
    "the first line": lambda lines: [lines[0].replace(b"1", b"2"), *lines[1:]],
    "a digit of the last line": lambda lines: [*lines[:-1], lines[-1].replace(b"3333", b"3334")],
    "zeros in the middle": lambda lines: [lines[0], bytes(len(lines[1]) - 1) + b"\n", *lines[2:]],
    "half a line in the middle": lambda lines: [lines[0], lines[1][:30], *lines[2:]],
    "an empty line": lambda lines: [lines[0], b"\n", *lines[1:]],
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_line_stops_everything_with_the_way_out(tmp_path, spaced, run_here, capsys, damage):
    make_trajectory(tmp_path / "data" / "t", 3)
    cache_dir = tmp_path / "data" / "dino_cache_small"
    with_results(cache_dir)
    lines = damage((cache_dir / JOURNAL).read_bytes().splitlines(keepends=True))
    (cache_dir / JOURNAL).write_bytes(b"".join(lines))
    before = tree(cache_dir)
    config = write_config(tmp_path / "c.yaml", tmp_path / "data")
    messages = []
    for command in ("show", "reset-failed"):
        assert progress_utils.main([command, "--cache-dir", str(cache_dir)]) == 2
        messages.append(capsys.readouterr().err)
    outcome = run_here(config)
    assert outcome.code == 2
    for message in (*messages, outcome.err):
        assert f"{cache_dir / JOURNAL}: not usable" in message
        assert "remove it" in message
    assert {name: data for name, data in tree(cache_dir).items() if name != ".lock"} == before
    (cache_dir / JOURNAL).unlink()
    assert completed(cache_dir) == ["a", "b/ü"]


def sealed_line(entry: Any) -> bytes:
    """A whole line, made by an independent rule: CRC-32 as in zip files, then JSON."""
    text = json.dumps(entry).encode()
    return subprocess.run(
        [sys.executable, "-c", "import binascii, sys; d = sys.stdin.buffer.read(); print('%08x' % binascii.crc32(d))"],
        input=text, capture_output=True, check=True,
    ).stdout.strip() + b" " + text + b"\n"  # fmt: skip


@pytest.mark.parametrize(
    "entry",
    [
        {"unheard of": 1},
        ["completed"],
        {"completed": "x", "checksum": 5, "record": ENTRY, "time": 1.0, "elapsed_s": 1.0},
        {"completed": "x", "checksum": "5", "record": {**ENTRY, "bytes": []}, "time": 1.0, "elapsed_s": 1.0},
        {"completed": "x", "checksum": "5", "record": {**ENTRY, "fingerprint": "e"}, "time": 1.0, "elapsed_s": 1.0},
        {"failed": "x", "failure": {}, "time": 1.0, "elapsed_s": 1.0},
        {"withdrawn": 7, "time": 1.0, "elapsed_s": 1.0},
        {"withdrawn": "a", "time": "now", "elapsed_s": 1.0},
        {"follows": "LAST", "specs": {"e": 5}},
    ],
    ids=json.dumps,
)
def test_a_line_that_says_nothing_known_stops_everything(tmp_path, spaced, entry):
    with_results(tmp_path)
    if isinstance(entry, dict) and "follows" in entry:
        entry = {**entry, "follows": read_progress(tmp_path)["last_update"]}
    with open(tmp_path / JOURNAL, "ab") as file:
        file.write(sealed_line(entry))
    with pytest.raises(RefusedError, match=r"journal: not usable.*rebuild.*; or remove it.*reset") as refused:
        Progress.load(tmp_path)
    assert "progress.json.bak" not in str(refused.value)  # the journal, which is still there, does not follow it


@pytest.mark.parametrize("command", ["reset", "rebuild"])
def test_what_has_the_journals_name_and_is_no_file_is_found_before_anything_is_changed(robot, run_here, command):
    robot.add("t0")
    assert run_here(robot.config).code == 0
    (robot.cache / JOURNAL).mkdir()
    before = tree(robot.cache)
    done = run_utils(command, "--yes", "--cache-dir", robot.cache)
    assert done.returncode == 2
    assert f"{robot.cache / JOURNAL}: is no file of this program's; remove it. Nothing was changed" in done.stderr
    assert tree(robot.cache) == before


def test_a_journal_of_a_newer_version_asks_for_a_newer_program(tmp_path, spaced):
    with_results(tmp_path)
    (tmp_path / JOURNAL).write_bytes(sealed_line({"format_version": 2, "follows": 1.0, "specs": {}}))
    with pytest.raises(RefusedError, match=r"journal: format_version is 2, this program knows 1.*Update the program"):
        Progress.load(tmp_path)


def test_a_disk_that_is_full_in_the_middle_of_a_line_leaves_whole_lines(tmp_path, spaced):
    progress = with_results(tmp_path)

    class FullFile(progress_utils.io.FileIO):
        def write(self, data: Any) -> int:
            super().write(bytes(data)[:20])
            raise OSError(28, "No space left on device")

    file = progress._journal._file
    progress._journal._file = FullFile(os.dup(file.fileno()), "r+")  # one place in the file for both
    progress.complete("late", "5" * 16, {**ENTRY})
    with pytest.raises(OSError, match="No space left"):
        progress.save_spaced(1.0)
    progress._journal._file = file
    assert completed(tmp_path) == ["a", "b/ü", "f0", "new/0"]
    progress.complete("later", "5" * 16, {**ENTRY})
    progress.save_spaced(1.0)
    assert completed(tmp_path) == ["a", "b/ü", "f0", "late", "later", "new/0"]


def test_a_link_in_the_journals_place_is_not_written_through(tmp_path, spaced):
    (tmp_path / "precious").write_text("precious")
    cache_dir = tmp_path / "cache"
    write_record(cache_dir)
    (cache_dir / JOURNAL).symlink_to(tmp_path / "precious")
    with_results(cache_dir)
    assert (tmp_path / "precious").read_text() == "precious"
    assert completed(cache_dir) == ["a", "b/ü", "f0", "new/0"]


def test_a_record_saved_while_it_is_read_is_read_again(tmp_path, spaced, monkeypatch):
    """Else the old progress.json would be read, and then no journal, which the save took in."""
    progress, read = with_results(tmp_path), progress_utils._read_or_none
    saves = iter([progress.save])

    def read_slowly(path: Path) -> bytes | None:
        content = read(path)
        if path.name == "progress.json":
            next(saves, lambda: None)()
        return content

    monkeypatch.setattr(progress_utils, "_read_or_none", read_slowly)
    assert completed(tmp_path) == ["a", "b/ü", "f0", "new/0"]


# ---------------------------------------------------------------------------------------------------------------------
# What it costs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_withdrawal_is_on_the_disk_before_its_chunks_may_go_and_results_share_an_fsync(tmp_path, spaced, monkeypatch):
    progress, synced = begun(tmp_path), []
    fsync = os.fsync

    def noting_fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        fsync(descriptor)

    for number in range(2):  # the first makes the file and is forced to the disk; its time is then 1e12 times spaced
        progress.complete(f"first{number}", "2" * 16, {**ENTRY})
        progress.save_spaced(1.0)
    monkeypatch.setattr(os, "fsync", noting_fsync)
    for number in range(100):
        progress.complete(f"new{number}", "2" * 16, {**ENTRY})
        progress.save_spaced(1.0)
        progress.sync_spaced()
    assert synced == []
    progress.forget("new5")
    progress.save_spaced(1.0, at_once=True)
    assert synced == [JOURNAL]


class Uncounted(dict):
    """A dict that nobody may go through."""

    def refuse(self, *_: Any) -> Any:
        raise AssertionError("went through all entries")

    values = items = keys = __iter__ = copy = refuse


def test_nothing_goes_through_the_record_for_a_result_or_a_look(tmp_path, spaced):
    progress = begun(tmp_path)
    for key in ("records", "checksums", "failures"):
        setattr(progress, key, Uncounted(getattr(progress, key)))
    for number in range(3):
        progress.complete(f"new{number}", "2" * 16, {**ENTRY})
        progress.save_spaced(1.0)
    progress.fail("bad", FAILURE)
    progress.save_spaced(1.0)
    assert (progress.total_chunks, progress.fingerprints) == (6, {"f" * 16})
    progress.forget("new1")
    progress.save_spaced(1.0, at_once=True)
    assert progress.total_chunks == 5


def test_the_trajectory_in_work_is_the_first_in_order_that_has_no_result():
    names = ["a", "b", "c", "d"]
    dataset = SimpleNamespace(
        num_completed=0, num_frames=4, trajectories=names, pending=[SimpleNamespace(name=name) for name in names],
        work=dict.fromkeys(names, SimpleNamespace(num_frames=1)),
    )  # fmt: skip
    counts, seen = RunCounts(dataset), []
    for name in ("b", "a", "d", "c"):
        seen.append(counts.state(0).trajectory)
        counts.add(SimpleNamespace(name=name, chunk_bytes=[]))
    assert [*seen, counts.state(0).trajectory] == ["a", "a", "c", "c", None]


# ---------------------------------------------------------------------------------------------------------------------
# A run
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_with_nothing_to_do_takes_in_what_a_killed_one_left(tmp_path, run_here, spaced):
    make_trajectory(tmp_path / "data" / "t0", 8)
    make_trajectory(tmp_path / "data" / "t1", 8)
    config, cache = write_config(tmp_path / "c.yaml", tmp_path / "data"), tmp_path / "data" / "dino_cache_small"
    assert run_here(config).code == 0
    whole = read_progress(cache)
    progress = Progress.load(cache)
    progress.forget("t1")
    progress.save()
    progress.complete("t1", whole["trajectory_checksums"]["t1"], whole["trajectory_records"]["t1"])
    progress.save_spaced(1.0)
    assert read_progress(cache)["completed_trajectories"] == ["t0"]
    before = {path: path.read_bytes() for path in cache.glob("*/*.h5")}
    assert run_here(config).code == 0
    assert sorted(read_progress(cache)["completed_trajectories"]) == ["t0", "t1"]
    assert {path: path.read_bytes() for path in cache.glob("*/*.h5")} == before
    assert not (cache / JOURNAL).exists()


KILLED_RUN = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import dino_cache, progress_utils, run_with_stamp_encoder
progress_utils.SAVE_SHARE = 1e-12
dino_cache.load_encoder = run_with_stamp_encoder.stamp_encoder
dino_cache.model_shape = lambda model_type: dino_cache.ModelShape(patch_size=14, width=4, num_registers=0)
complete, left = dino_cache.DatasetRun._record_result, [3]
def dying(self, result, fingerprint):
    complete(self, result, fingerprint)
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
dino_cache.DatasetRun._record_result = dying
dino_cache.main(["--config", {config!r}])
"""


def test_a_run_killed_after_three_results_loses_none_of_them(tmp_path, run_here):
    for number in range(5):
        make_trajectory(tmp_path / "data" / f"t{number}", 8)
    (tmp_path / "data" / "t1" / "3.png").write_bytes(b"broken")
    config, cache = write_config(tmp_path / "c.yaml", tmp_path / "data"), tmp_path / "data" / "dino_cache_small"
    tests = Path(__file__).parent
    code = KILLED_RUN.format(root=str(tests.parent), tests=str(tests), config=str(config))
    killed = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    known = read_whole_record(cache)
    assert len(known["completed_trajectories"]) + len(known["failed_trajectories"]) == 3
    assert read_progress(cache)["completed_trajectories"] == []
    outcome = run_here(config)
    assert "Loaded existing progress: 2 trajectories completed" in outcome.out
    assert outcome.code == 1
    assert read_progress(cache)["failures"]["t1"]["attempts"] == 2
    assert sorted(read_progress(cache)["completed_trajectories"]) == ["t0", "t2", "t3", "t4"]
