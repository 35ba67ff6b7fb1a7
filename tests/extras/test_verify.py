"""verify finds whatever is wrong with a cache, and what it repairs ends as if nothing had happened."""

import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from commands_support import (
    CHUNK,
    STAMPS,
    CachedRobot,
    Problem,
    answer,
    flip,
    mix,
    reseal,
    set_attributes,
    swap,
)

from dino_cache_extras.chunk_files import read_chunk_header
from dino_cache_extras.commands import verify as verify_command
from progress_utils import DamagedChunkError, cache_lock
from support import FRAMES, make_trajectory, read_progress, tree

DATASETS = ("cls_token", "patch_tokens", "position", "yaw", "frame_index", "travelled_distance")
TEXTS = (
    "format", "dataset_name", "trajectory", "spec", "fingerprint", "weights_digest", "trajectory_checksum",
    "checksum_kind", "versions", "created_at", "attributes_digest",
)  # fmt: skip
NUMBERS = ("format_version", "chunk_index", "num_chunks", "start", "stop")
DIGESTS = tuple(f"{name}/digest" for name in DATASETS)
OWN = ("notes.txt", "own.tmp", "plots/a.tmp", "lab/b.txt")  # the user's files, in the cache folder


@pytest.fixture
def robot(cached) -> CachedRobot:
    """Three trajectories are cached."""
    return cached(*STAMPS)


@pytest.fixture
def single(cached) -> CachedRobot:
    """One trajectory is cached."""
    return cached("t1")


# ---------------------------------------------------------------------------------------------------------------------
# verify --deep: any changed byte of data or attributes
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DATASETS)
def test_deep_finds_a_flipped_byte_anywhere_in_a_dataset(single, name):
    path = single.cache / CHUNK
    with h5py.File(path) as file:
        first, size = file[name].id.get_offset(), file[name].nbytes
    within = random.Random(name).sample(range(1, size - 1), 3)
    for place in (0, size - 1, *within):
        flip(path, first + place)
        found = single.verify("--deep")
        assert found.keys() == {("damaged", CHUNK)}
        assert name in found["damaged", CHUNK]
        assert single.verify() == {}  # without --deep no data is read
        flip(path, first + place)
    assert single.verify("--deep") == {}


@pytest.mark.parametrize("key", TEXTS + NUMBERS + DIGESTS)
def test_a_changed_or_missing_attribute_is_found(single, key):
    *dataset, key = key.split("/")
    path, sound = single.cache / CHUNK, (single.cache / CHUNK).read_bytes()

    def change(how: str) -> None:
        with h5py.File(path, "r+") as file:
            attributes = file[dataset[0]].attrs if dataset else file.attrs
            old = attributes[key]
            if how == "other":
                attributes[key] = chr(ord(old[0]) ^ 1) + old[1:] if isinstance(old, str) else old + 1
            elif how == "of another type":
                attributes[key] = 7 if isinstance(old, str) else float(old) + 0.5
            else:
                del attributes[key]

    for how in ("other", "of another type", "missing"):
        change(how)
        assert single.verify().keys() == {("damaged", CHUNK)}, how
        with pytest.raises(DamagedChunkError):  # by the file itself, not just because its size is another
            read_chunk_header(path, deep=False)
        path.write_bytes(sound)


@pytest.mark.parametrize("key", TEXTS + NUMBERS + DIGESTS)
def test_a_flipped_byte_of_an_attribute_is_found(single, key):
    path = single.cache / CHUNK
    places = attribute_places(path, key)
    for place in {places[0], places[-1], *random.Random(key).sample(places, min(3, len(places)))}:
        flip(path, place)
        assert single.verify().keys() == {("damaged", CHUNK)}, place - places[0]
        flip(path, place)
    assert single.verify() == {}


def attribute_places(path: Path, key: str) -> list[int]:
    """Where in the file the bytes of an attribute's value are; texts lie as they are in a heap."""
    *dataset, key = key.split("/")
    raw, copy = path.read_bytes(), path.with_name("copy")
    with h5py.File(path) as file:
        value = (file[dataset[0]] if dataset else file).attrs[key]
    if isinstance(value, str):
        found = [match.start() for match in re.finditer(re.escape(value.encode()), raw)]
        return [start + i for start in found for i in range(len(value))]
    copy.write_bytes(raw)
    with h5py.File(copy, "r+") as file:
        file.attrs.modify(key, value ^ 1)
    (lowest,) = (i for i, (one, other) in enumerate(zip(raw, copy.read_bytes())) if one != other)
    copy.unlink()
    return [*range(lowest, lowest + 8)]  # <i8


def flip_and_read(path: Path, places: Sequence[int], report: Path) -> None:
    """Append a line for each place: before, and what came of reading the file with that byte flipped."""
    sound = everything(path)
    with open(report, "w", buffering=1) as lines:
        for place, bits in itertools.product(places, (0x01, 0xFF)):
            signal.alarm(20)  # ends this process where reading does not
            lines.write(f"{place} {bits} ")
            flip(path, place, bits)
            try:
                read_chunk_header(path, deep=True)
                verdict = "as it was" if everything(path) == sound else "changed and not noticed"
            except DamagedChunkError:
                verdict = "found"
            flip(path, place, bits)
            lines.write(f"{verdict}\n")


def everything(path: Path) -> dict[str, Any]:
    """Values of all attributes and datasets, as a reader of the file gets them."""
    with h5py.File(path) as file:
        values = {f"{name} {key}": value for name in file for key, value in file[name].attrs.items()}
        values |= {name: (dataset.shape, dataset.dtype, dataset[...].tobytes()) for name, dataset in file.items()}
        return {**values, **file.attrs}


@pytest.mark.slow
def test_a_flipped_byte_anywhere_in_the_file_is_found_or_changes_nothing_that_can_be_read(single, tmp_path):
    """In processes of their own: damaged metadata must not bring down, or hold up, who checks it."""
    size = (single.cache / CHUNK).stat().st_size
    places = range(size)
    fork, work = multiprocessing.get_context("fork"), []
    for number in range(2):
        path, report = shutil.copy(single.cache / CHUNK, tmp_path / f"{number}.h5"), tmp_path / f"{number}.txt"
        work.append((fork.Process(target=flip_and_read, args=(Path(path), places[number::2], report)), report))
        work[-1][0].start()
    for process, report in work:
        process.join()
        *_, last = lines = report.read_text().splitlines()
        assert process.exitcode == 0, f"reading died at byte {last}"
        assert [line for line in lines if not line.endswith((" found", " as it was"))] == []
        assert any(line.endswith(" found") for line in lines)


NOT_AS_WRITTEN: dict[str, Callable[[h5py.File], Any]] = {
    "more": lambda file: file.create_dataset("more", data=np.zeros(9)),
    "less": lambda file: file.__delitem__("yaw"),
    "renamed": lambda file: file.move("yaw", "pitch"),
    "swapped": lambda file: (file.move("yaw", "y"), file.move("cls_token", "yaw"), file.move("y", "cls_token")),
    "a group": lambda file: (file.__delitem__("yaw"), file.create_group("yaw")),
    "another version": set_attributes(format_version=2),
    "another format": set_attributes(format="lab_cache"),
    "one more attribute": set_attributes(comment="mine"),
}  # fmt: skip


@pytest.mark.parametrize("change", NOT_AS_WRITTEN.values(), ids=NOT_AS_WRITTEN)
def test_a_chunk_that_is_not_as_it_was_written_is_found(single, change):
    with h5py.File(single.cache / CHUNK, "r+") as file:
        change(file)
    assert single.verify().keys() == {("damaged", CHUNK)}
    with pytest.raises(DamagedChunkError):
        read_chunk_header(single.cache / CHUNK, deep=False)


def replaced(name: str, change: Callable[[np.ndarray], np.ndarray], **how: Any) -> Callable[[h5py.File], None]:
    def replace(file: h5py.File) -> None:
        values = change(file[name][...])
        del file[name]
        file.create_dataset(name, data=values, **how)

    return replace


WRONG_BUT_SEALED: dict[str, Callable[[h5py.File], Any]] = {
    "yaw": replaced("yaw", lambda values: values.astype("f4")),
    "position": replaced("position", lambda values: values[:-1]),
    "cls_token": replaced("cls_token", lambda values: values.astype(">f2")),
    "patch_tokens": replaced("patch_tokens", lambda values: values[:, 0]),
    "frame_index": replaced("frame_index", lambda values: values, chunks=(3,)),
    "travelled_distance": lambda file: file.__delitem__("travelled_distance"),
}


@pytest.mark.parametrize("name", WRONG_BUT_SEALED)
def test_a_dataset_of_another_type_shape_or_layout_is_found_though_its_digests_match(single, name):
    reseal(single.cache / CHUNK, WRONG_BUT_SEALED[name])
    assert name in single.verify()["damaged", CHUNK]


def with_value(name: str, place: int, value: float) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        values = file[name][...]
        values.flat[place] = value
        file[name][...] = values

    return change


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [name for name in DATASETS if name != "frame_index"])
def test_deep_finds_what_is_not_finite_though_its_digests_match(single, name, value):
    reseal(single.cache / CHUNK, with_value(name, -1, value))
    assert single.verify("--deep") == {("damaged", CHUNK): f"{name} is not finite"}


def test_deep_reads_datasets_larger_than_one_block(single, monkeypatch):
    for module in ("dino_cache", "dino_cache_extras.chunk_files"):
        monkeypatch.setattr(f"{module}.READ_BLOCK_BYTES", 16)
    assert single.verify("--deep") == {}
    with h5py.File(single.cache / CHUNK) as file:
        last = file["patch_tokens"].id.get_offset() + file["patch_tokens"].nbytes - 1
    flip(single.cache / CHUNK, last)
    assert "digest" in single.verify("--deep")["damaged", CHUNK]
    reseal(single.cache / CHUNK, with_value("patch_tokens", 0, np.nan))
    assert "finite" in single.verify("--deep")["damaged", CHUNK]


# ---------------------------------------------------------------------------------------------------------------------
# verify: chunk files against the record
# ---------------------------------------------------------------------------------------------------------------------


def resize(path: Path, by: int) -> None:
    os.truncate(path, path.stat().st_size + by)


ALL_OF_T1 = [("damaged", f"t1/chunk_0000{index}.h5") for index in range(3)]
FILES: dict[str, tuple[Callable[[Path], Any], list[Problem], str]] = {
    "deleted": (lambda cache: (cache / CHUNK).unlink(), [("missing", CHUNK)], "not there"),
    "deleted with its folder": (
        lambda cache: shutil.rmtree(cache / "lab"),
        [("missing", f"lab/t2/chunk_0000{index}.h5") for index in range(3)],
        "not there",
    ),
    "a folder": (
        lambda cache: ((cache / CHUNK).unlink(), (cache / CHUNK).mkdir()), [("damaged", CHUNK)], ""
    ),
    "a file in its folder's place": (
        lambda cache: (shutil.rmtree(cache / "t1"), (cache / "t1").touch()),
        [("missing", f"t1/chunk_0000{index}.h5") for index in range(3)],
        "not there",
    ),
    "a pipe": (
        lambda cache: ((cache / CHUNK).unlink(), os.mkfifo(cache / CHUNK)), [("damaged", CHUNK)], "not a regular file"
    ),
    "empty": (lambda cache: os.truncate(cache / CHUNK, 0), [("damaged", CHUNK)], ""),
    "half of it": (lambda cache: os.truncate(cache / CHUNK, 4000), [("damaged", CHUNK)], ""),
    "one byte short": (lambda cache: resize(cache / CHUNK, -1), [("damaged", CHUNK)], ""),
    "one byte more": (lambda cache: resize(cache / CHUNK, 1), [("damaged", CHUNK)], ""),
    "another trajectory's": (
        lambda cache: swap(cache, CHUNK, "lab/t2/chunk_00001.h5"),
        [("damaged", CHUNK), ("damaged", "lab/t2/chunk_00001.h5")],
        "trajectory is",
    ),
    "another place in its trajectory": (
        lambda cache: swap(cache, CHUNK, "t1/chunk_00000.h5"), ALL_OF_T1[:2], "chunk_index is"
    ),
    "one more": (
        lambda cache: shutil.copy(cache / CHUNK, cache / "t1/chunk_00003.h5"),
        [("damaged", "t1/chunk_00003.h5")],
        "the record does not know",
    ),
    "of an unrecorded trajectory": (
        lambda cache: shutil.copytree(cache / "t1", cache / "lab/t9"), [("unrecorded", "lab/t9")], "not in the record"
    ),
    "half-made": (
        lambda cache: shutil.copytree(cache / "t1", cache / ".staging/tmp1"), [("leftover", ".staging/tmp1")], "left"
    ),
    "half-made alone": (
        lambda cache: shutil.copy(cache / CHUNK, cache / ".staging/x.h5"), [("leftover", ".staging/x.h5")], "left"
    ),
    "half a save": (
        lambda cache: (cache / "progress.json.tmp").write_text("{"), [("leftover", "progress.json.tmp")], "left"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "expected", "reason"), FILES.values(), ids=FILES)
def test_a_file_that_is_not_as_recorded_is_found(robot, damage, expected, reason):
    damage(robot.cache)
    found = robot.verify()
    assert found.keys() == set(expected)
    assert all(reason in text for text in found.values())
    shown = robot.utils("verify")
    assert shown.code == 1
    for kind, path in expected:
        assert f"  {kind}: {path}: " in shown.out


def in_record(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda record: record["trajectory_records"]["t1"].update(changes)


def other_fingerprint(record: dict[str, Any]) -> None:
    (spec,) = record["specs"].values()
    record["specs"]["e" * 16] = spec
    in_record(fingerprint="e" * 16)(record)


def withdraw_t1(record: dict[str, Any]) -> None:
    record["completed_trajectories"].remove("t1")
    del record["trajectory_records"]["t1"], record["trajectory_checksums"]["t1"]


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], Any], list[Problem], str]] = {
    "a start": (in_record(spans=[[0, 9], [5, 15], [12, 20]]), ALL_OF_T1[1:2], "its start is 6, recorded is 5"),
    "a stop": (in_record(spans=[[0, 9], [6, 15], [12, 21]]), ALL_OF_T1[2:], "its stop is 20, recorded is 21"),
    "a size": (
        lambda record: record["trajectory_records"]["t1"]["bytes"].__setitem__(0, 1), ALL_OF_T1[:1], "recorded are 1"
    ),
    "fewer chunks": (
        in_record(spans=[[0, 9], [6, 15]], bytes=[1, 1]), ALL_OF_T1, ""
    ),
    "more chunks": (
        in_record(spans=[[0, 9], [6, 15], [12, 20], [18, 30]], bytes=[1] * 4),
        [*ALL_OF_T1, ("missing", "t1/chunk_00003.h5")],
        "",
    ),
    "the fingerprint": (other_fingerprint, ALL_OF_T1, "fingerprint"),
    "the checksum": (
        lambda record: record["trajectory_checksums"].update(t1="0" * 16), ALL_OF_T1, "recorded is '0000000000000000'"
    ),
    "the trajectory": (withdraw_t1, [("unrecorded", "t1")], "not in the record"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "expected", "reason"), RECORDS.values(), ids=RECORDS)
def test_a_record_that_disagrees_with_the_files_is_found(robot, change, expected, reason):
    robot.edit_record(change)
    found = robot.verify()
    assert found.keys() == set(expected)
    assert all(reason in text for text in found.values())


@pytest.mark.parametrize("command", [["verify"], ["verify", "--repair", "--yes"], ["rebuild", "--yes"]])
@pytest.mark.parametrize("number", [errno.ESTALE, errno.EACCES])
def test_what_cannot_be_looked_at_is_not_called_damaged(single, monkeypatch, command, number):
    """A mount that is lost under way must not have everything redone."""

    def fail(path: Any, *_: Any) -> Any:
        raise OSError(number, os.strerror(number), str(path))

    before = single.files()
    with monkeypatch.context() as patch:
        patch.setattr("dino_cache_extras.chunk_files.open", fail, raising=False)
        outcome = single.utils(*command)
    assert outcome.code == 2
    assert "t1/chunk_0000" in outcome.err
    assert os.strerror(number) in outcome.err
    assert single.files() == before


def test_a_bad_block_is_damage(single, monkeypatch):
    def fail(path: Any, *_: Any) -> Any:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    monkeypatch.setattr("dino_cache_extras.chunk_files.open", fail, raising=False)
    assert single.verify().keys() == set(ALL_OF_T1)


@pytest.mark.parametrize("command", [["verify"], ["verify", "--repair", "--yes"], ["rebuild", "--yes"]])
def test_a_folder_that_cannot_be_listed_is_not_taken_for_empty(robot, monkeypatch, command):
    scandir = os.scandir

    def fail(path: Any) -> Any:
        if str(path).endswith("/lab"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return scandir(path)

    before = robot.files()
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", fail)
        outcome = robot.utils(*command)
    assert outcome.code == 2
    assert f"{robot.cache}/lab: cannot list it" in outcome.err
    assert robot.files() == before


def test_a_chunk_that_another_program_holds_locked_is_sound(single):
    """HDF5 locks what it opens, and cannot on some network mounts."""
    with open(single.cache / CHUNK) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert single.verify("--deep") == {}


@pytest.mark.parametrize("still", [False, True])
def test_what_a_run_redoes_while_verify_looks_is_no_finding(robot, monkeypatch, still):
    look = verify_command._check_recorded

    def look_late(*arguments: Any) -> Any:
        shutil.rmtree(robot.data / "t1")
        make_trajectory(robot.data / "t1", FRAMES + 4, stamp=1)  # a stop and a checksum change
        robot.run()
        if still:
            (robot.cache / "t3" / "chunk_00000.h5").unlink()
        return look(*arguments)

    monkeypatch.setattr(verify_command, "_check_recorded", look_late)
    outcome = robot.utils("verify", "--json")
    assert outcome.code == still
    paths = [finding["path"] for finding in json.loads(outcome.out.splitlines()[-1])["findings"]]
    assert paths == ["t3/chunk_00000.h5"] * still


def test_a_sound_cache_is_said_to_be_sound(robot):
    (robot.cache / "notes.txt").write_text("the user's own")
    for options in ([], ["--deep"]):
        shown = robot.utils("verify", *options)
        assert (shown.code, shown.err) == (0, "")
        assert f"Verified {robot.cache}: 3 trajectories, 9 chunks" in shown.out
        assert "Sound" in shown.out
        assert "mixed" not in shown.out.lower()


def test_json_has_the_findings_and_nothing_else_goes_to_stdout(robot):
    (robot.cache / CHUNK).unlink()
    (robot.cache / "progress.json.tmp").touch()
    facts = {"cache_dir": str(robot.cache), "deep": True, "sound": False, "mixed": False, "repaired": False}
    report = json.loads(robot.utils("verify", "--json", "--deep").out)
    for finding in report["findings"]:
        assert len(finding.pop("reason")) > 5
    missing = {"kind": "missing", "trajectory": "t1", "path": CHUNK}
    leftover = {"kind": "leftover", "trajectory": None, "path": "progress.json.tmp"}
    assert report == {**facts, "findings": [missing, leftover]}


def test_a_mixed_cache_is_sound_and_said_to_be_mixed(robot):
    mix(robot)
    for options in ([], ["--deep"]):
        shown = robot.utils("verify", *options)
        assert shown.code == 0
        assert "mixed" in shown.out.lower()
        report = json.loads(robot.utils("verify", "--json", *options).out)
        assert (report["sound"], report["mixed"], report["deep"]) == (True, True, options != [])


def test_a_checksum_that_was_recorded_anew_in_another_kind_is_no_damage(single):
    single.configure(checksum="content")
    single.run()
    assert read_progress(single.cache)["trajectory_records"]["t1"]["checksum_kind"] == "content"
    assert single.verify("--deep") == {}


@pytest.mark.parametrize("options", [[], ["--deep", "--json"], ["--repair", "--yes"]])
@pytest.mark.parametrize("content", [None, b"", b'{"format_version": 1'])
def test_without_a_usable_record_nothing_is_verified_or_changed(robot, options, content):
    record = robot.cache / "progress.json"
    record.unlink() if content is None else record.write_bytes(content)
    before = robot.files()
    refused = robot.utils("verify", *options)
    assert (refused.code, refused.out) == (2, "")
    assert "progress.json" in refused.err
    assert robot.files() == before


@pytest.mark.parametrize("command", [["verify"], ["verify", "--repair", "--yes"], ["rebuild", "--yes"]])
def test_without_the_folder_nothing_is_done(robot, command):
    shutil.rmtree(robot.cache)
    refused = robot.utils(*command)
    assert refused.code == 2
    assert str(robot.cache) in refused.err
    assert not robot.cache.exists()


def test_verify_touches_nothing_and_works_while_a_run_holds_the_cache(robot):
    def times() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in [robot.cache, *robot.cache.rglob("*")]}

    with cache_lock(robot.cache):
        before = times()
        shown = robot.utils("verify", "--deep")
        assert (shown.code, f"pid {os.getpid()} " in shown.out) == (0, True)
        (robot.cache / CHUNK).unlink()
        before = times()
        assert robot.utils("verify").code == 1
        assert robot.verify("--deep").keys() == {("missing", CHUNK)}
        assert times() == before
    (robot.cache / ".lock").unlink()
    robot.verify()
    assert not (robot.cache / ".lock").exists()


# ---------------------------------------------------------------------------------------------------------------------
# verify --repair
# ---------------------------------------------------------------------------------------------------------------------


def damage(robot: CachedRobot) -> None:
    """One trajectory has a flipped byte, one lacks a chunk, one is sound; leftovers and the user's own lie about."""
    with h5py.File(robot.cache / CHUNK) as file:
        place = file["cls_token"].id.get_offset()
    flip(robot.cache / CHUNK, place)
    (robot.cache / "lab" / "t2" / "chunk_00002.h5").unlink()
    shutil.copytree(robot.cache / "t3", robot.cache / ".staging" / "tmp1" / "replaced")
    (robot.cache / "progress.json.tmp").write_text("{")
    for own in OWN:
        (robot.cache / own).parent.mkdir(exist_ok=True)
        (robot.cache / own).write_text(own)


def check_repaired(robot: CachedRobot, undisturbed: list[Any], encoders: list[Any]) -> None:
    """The next run redoes the two damaged trajectories, and then all is as if nothing had happened."""
    assert set(read_progress(robot.cache)["completed_trajectories"]) == {"t3"}
    encoders.clear()
    robot.run()
    assert sum(encoders[-1].batch_sizes) == 2 * FRAMES
    np.testing.assert_equal(robot.state(), undisturbed)
    assert robot.verify("--deep") == {}
    assert all((robot.cache / own).read_text() == own for own in OWN)


def test_after_a_repair_the_next_run_ends_as_if_nothing_had_happened(robot, encoders):
    undisturbed = robot.state()
    damage(robot)
    before = robot.files()
    repaired = robot.utils("verify", "--deep", "--repair", "--yes")
    assert repaired.code == 1  # it was damaged
    assert f"  damaged: {CHUNK}: " in repaired.out
    after = robot.files()
    assert {path for path in before.keys() | after if before.get(path) != after.get(path)} <= {
        "progress.json", "progress.json.bak", "progress.json.tmp", ".staging/tmp1", ".staging/tmp1/replaced",
        *(f".staging/tmp1/replaced/chunk_0000{index}.h5" for index in range(3)),
    }  # fmt: skip
    assert not (robot.cache / "progress.json.tmp").exists()
    assert list((robot.cache / ".staging").iterdir()) == []
    check_repaired(robot, undisturbed, encoders)


@pytest.mark.parametrize("line", ["n", "", "y"])
def test_repair_asks_on_a_terminal(robot, encoders, monkeypatch, line):
    undisturbed = robot.state()
    damage(robot)
    before = robot.files()
    answer(monkeypatch, line)
    asked = robot.utils("verify", "--deep", "--repair")
    assert asked.code == 1
    assert "[y/N]" in asked.err
    if line == "y":
        check_repaired(robot, undisturbed, encoders)
    else:
        assert robot.files() == before


def test_repair_without_a_terminal_needs_yes(robot):
    damage(robot)
    before = robot.files()
    refused = robot.utils("verify", "--repair")
    assert refused.code == 2
    assert "--yes" in refused.err
    assert robot.files() == before


@pytest.mark.parametrize("command", [["verify", "--repair", "--yes"], ["rebuild", "--yes"]])
def test_repair_and_rebuild_are_refused_while_a_run_holds_the_cache(robot, command):
    damage(robot)
    with cache_lock(robot.cache):
        before = tree(robot.cache)
        refused = robot.utils(*command)
        assert refused.code == 4
        assert f"pid {os.getpid()} " in refused.err
        assert tree(robot.cache) == before


def test_repair_of_what_it_cannot_mend_asks_and_changes_nothing(robot):
    shutil.copytree(robot.cache / "t1", robot.cache / "t9")
    before = robot.files()
    assert robot.utils("verify", "--repair").code == 1
    assert robot.files() == before


def test_repair_of_a_sound_cache_changes_nothing(robot):
    before = robot.files()
    assert robot.utils("verify", "--repair").code == 0
    assert robot.files() == before


@pytest.mark.parametrize("place", ["a link in .staging", "a link to a file", "a link below", ".staging is a link"])
def test_repair_removes_nothing_outside_the_cache(robot, tmp_path, place):
    outside, staging = tmp_path / "outside", robot.cache / ".staging"
    (outside / "deep").mkdir(parents=True)
    (outside / "deep" / "own.txt").write_text("the user's own")
    if place == "a link in .staging":
        (staging / "link").symlink_to(outside)
    elif place == "a link to a file":
        (staging / "link").symlink_to(outside / "deep" / "own.txt")
    elif place == "a link below":
        (staging / "tmp1").mkdir()
        (staging / "tmp1" / "link").symlink_to(outside)
    else:
        staging.rmdir()
        staging.symlink_to(outside)
    robot.utils("verify", "--repair", "--yes")
    assert (outside / "deep" / "own.txt").read_text() == "the user's own"
    if place != ".staging is a link":
        assert list(staging.iterdir()) == []


def test_the_holders_name_is_shown_while_it_lives_and_not_when_it_is_dead(robot):
    with cache_lock(robot.cache):
        assert f"a run is at work (pid {os.getpid()} " in robot.utils("verify").out
        owner = (robot.cache / ".lock.owner").read_text()
    child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    (robot.cache / ".lock.owner").write_text(owner.replace(str(os.getpid()), str(child)))  # as a kill -9 leaves it
    assert "a run is at work" not in robot.utils("verify").out
