"""A command killed at any of its calls: nothing false is recorded, and running it again gives what it would have given.

A scenario is a cache in some state and a command that is killed before its first, second, ... durability call, until
one runs to its end (crash_harness). After each death the cache is checked as it lies there, the job is taken up again,
and the result is compared with that of a command that nobody disturbed.
"""

import contextlib
import hashlib
import itertools
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import yaml

import dino_cache
import progress_utils
from crash_harness import DIED, Call, Child, Command, Disk, Ending
from progress_utils import Progress
from support import (
    StampEncoder,
    cache_content,
    check_stamps,
    chunk_files,
    make_trajectory,
    read_progress,
    read_whole_record,
    sealed,
    straight_line,
    tree,
    write_config,
    write_frame,
    write_poses,
)

CHILDREN = 2  # at a time

# Frames are 0.25 m apart. Chunks of 1 m that overlap by 0.25 m: of four frames one, of eight 0..4 and 3..7. Batches are
# of four; what the tokens tell of a batch's size is left out, since a run that is taken up has other batches.
A, NESTED, C, D, LONG = "a1", "b/deep/n2", "c3", "d4", "e5"  # the digit is the stamp of the frames
SPANS = {
    A: [[0, 4]],
    NESTED: [[0, 5], [3, 8]],
    C: [[0, 5], [3, 8]],
    D: [[0, 4]],
    LONG: [[0, 5], [3, 8], [6, 11], [9, 14]],
}
FRAMES = {name: spans[-1][1] for name, spans in SPANS.items()}
ROWS = {name: sum(stop - start for start, stop in spans) for name, spans in SPANS.items()}


class Lab:
    """A dataset, and folders with a cache of it: `start`, as a scenario finds it, and copies of that."""

    def __init__(self, root: Path):
        self.data, self.start = root / "data", root / "start"
        self.readers = "threads"
        self.start.mkdir()
        self._copies = (root / f"copy{number}" for number in itertools.count())

    @property
    def cache(self) -> Path:
        return self.start / "cache"

    def add(self, *names: str) -> None:
        for name in names:
            make_trajectory(self.data / name, FRAMES[name], stamp=int(name[-1]))
            self.paint(name, int(name[-1]))

    def paint(self, name: str, stamp: int) -> None:
        """Frames in the stamp's colour, in files of one size: to the checksum `stat` they are all the same."""
        for path in (self.data / name).glob("*.png"):
            write_frame(path, stamp, int(path.stem))
            path.write_bytes(path.read_bytes().ljust(200, b"\0"))

    def spoil_poses(self, name: str) -> None:
        position = straight_line(FRAMES[name])
        position[2, 1] = np.nan
        write_poses(self.data / name, position, np.zeros(FRAMES[name]))

    def configure(self, **settings: Any) -> None:
        path = self.start / "robot.yaml"
        limits = {"max_chunk_distance_m": 1.0, "overlap_distance_m": 0.25, "batch_size": 4}
        config = yaml.safe_load(write_config(path, self.data, **limits, readers=self.readers, **settings).read_text())
        config["datasets"]["robot"]["cache_dir"] = "cache"
        path.write_text(yaml.safe_dump(config))

    def run(self, code: int = 0) -> None:
        """Make `start` by a run."""
        assert self.execute(self.start, "run").code == code, (self.start / "output.txt").read_text()

    def copy(self) -> Path:
        return shutil.copytree(self.start, next(self._copies))

    def execute(self, folder: Path, line: str) -> Ending:
        return Child([command(folder, line)], folder / "output.txt").endings()[0]


# A record after each trajectory, as in any run that is longer than these; or only where it must not wait.
SAVE_SHARES = {"run": 1e9, "run-rarely-saved": 1e-9}


def run(save_share: float, arguments: list[str], last_batch: int | None = None) -> int:
    """In a child; it is stopped in a batch, counted from 0, or never."""
    progress_utils.SAVE_SHARE = save_share
    encode = StampEncoder.encode

    def encode_whatever_the_batch(self: StampEncoder, pixels: Any) -> Any:
        if len(self.batch_sizes) == last_batch:
            os.kill(os.getpid(), signal.SIGTERM)
        rows = encode(self, pixels)()
        for values in rows.tokens.values():
            values[..., 3] = 0
        return lambda: rows

    StampEncoder.encode = encode_whatever_the_batch
    return dino_cache.main(arguments)


def command(folder: Path, line: str) -> Command:
    """A command line on the cache in `folder`: `run` with options, or one of progress_utils."""
    name, *options = line.split()
    cache = folder / "cache"
    if name == "run-stopped":
        return Command(lambda: run(1e9, ["--config", str(folder / "robot.yaml")], last_batch=2), cache)
    if name in SAVE_SHARES:
        return Command(lambda: run(SAVE_SHARES[name], ["--config", str(folder / "robot.yaml"), *options]), cache)
    return Command(lambda: progress_utils.main([name, "--cache-dir", str(cache), *options]), cache)


def journalled(cache: Path) -> None:
    """Have the record as a killed run may leave it: every trajectory's result in the journal, none in progress.json."""
    before, save_share = Progress.load(cache), progress_utils.SAVE_SHARE
    progress_utils.SAVE_SHARE = 1e-9
    try:
        record = Progress.load(cache)
        for name in before.records:
            record.forget(name)
        record.failures.clear()
        record.save()
        for name, entry in before.records.items():
            record.complete(name, before.checksums[name], entry)
        for name, failure in before.failures.items():
            record.fail(name, failure)
        record.save_spaced(0.0, at_once=True)
    finally:
        progress_utils.SAVE_SHARE = save_share
    (cache / "progress.json.bak").unlink(missing_ok=True)
    assert (cache / "progress.json.journal").exists()


@dataclass(frozen=True)
class Scenario:
    prepare: Callable[[Lab], None]
    command: str
    code: int  # of the command, undisturbed
    run_code: int  # of a run after it
    stamps: dict[str, int]  # trajectory completed in the end -> stamp of its frames
    old_stamps: dict[str, int] = field(
        default_factory=dict
    )  # of trajectories whose chunks were made from other data at the start
    damaged: tuple[str, ...] = ()  # trajectories that are not as recorded at the start

    @property
    def edits(self) -> bool:
        """Whether the command is one of progress_utils: it changes the record, never a chunk."""
        return not self.command.startswith("run")


BOTH = {A: 1, NESTED: 2}


# ---------------------------------------------------------------------------------------------------------------------
# What a cache holds
# ---------------------------------------------------------------------------------------------------------------------


def record_bytes(cache: Path) -> bytes | None:
    path = cache / "progress.json"
    return path.read_bytes() if path.exists() else None


def checksums(cache: Path) -> dict[str, str]:
    """What the record calls completed; nothing where there is no record, or a corrupt one."""
    try:
        return read_whole_record(cache)["trajectory_checksums"]
    except (FileNotFoundError, ValueError):
        return {}


def essence(cache: Path) -> dict[str, Any] | bytes | None:
    """What the record says, without times and counts of attempts; the bytes of a corrupt one."""
    try:
        data = read_whole_record(cache)
    except (FileNotFoundError, ValueError):
        return record_bytes(cache)
    for key in ("start_time", "last_update", "elapsed_s"):
        del data[key]
    data["rebuild_started"] = data["rebuild_started"] is not None
    data["failures"] = {name: (failure["reason"], failure["checksum"]) for name, failure in data["failures"].items()}
    return {**data, **{key: sorted(data[key]) for key in ("completed_trajectories", "failed_trajectories")}}


def outcome(cache: Path) -> dict[str, Any]:
    """What a user has in the end: files (but for records set aside), the content of the chunks, the record."""
    chunks = {}
    for name, (attributes, datasets) in cache_content(cache).items():
        rows = {key: (rows.dtype, rows.shape, hashlib.sha256(rows).hexdigest()) for key, rows in datasets.items()}
        chunks[name] = (attributes, rows)
    files = {name for name in tree(cache) if not name.startswith(("progress.json.reset-", "progress.json.rebuild-"))}
    return {"files": files, "chunks": chunks, "record": essence(cache)}


def chunk_folders(cache: Path) -> set[str]:
    """Trajectories that have chunk files."""
    return {path.parent.relative_to(cache).as_posix() for path in chunk_files(cache)}


def chunk_bytes(cache: Path) -> dict[Path, bytes]:
    return {path.relative_to(cache): path.read_bytes() for path in chunk_files(cache)}


def leftovers(cache: Path) -> list[Path]:
    return [*(cache / ".staging").iterdir(), *cache.glob("*.tmp"), *cache.glob(".lock.owner")]


# ---------------------------------------------------------------------------------------------------------------------
# What must hold
# ---------------------------------------------------------------------------------------------------------------------


class Undisturbed(NamedTuple):
    """How a scenario goes whose command nobody kills."""

    after_command: dict[str, Any] | bytes | None  # the essence of the record
    outcome: dict[str, Any]
    stamps: set[tuple[str, str, int]]  # (trajectory, checksum, stamp) that may be recorded


def undisturbed(lab: Lab, scenario: Scenario) -> Undisturbed:
    """The command, then a run; what comes out is right."""
    folder = lab.copy()
    cache = folder / "cache"
    code = lab.execute(folder, scenario.command).code
    after_command = essence(cache)
    assert (code, lab.execute(folder, "run").code) == (scenario.code, scenario.run_code)
    assert sorted(checksums(cache)) == sorted(scenario.stamps)
    for name, stamp in scenario.stamps.items():
        assert check_stamps(cache, name, stamp) == ROWS[name]
    assert len(chunk_files(cache)) == sum(len(SPANS[name]) for name in scenario.stamps)
    assert leftovers(cache) == []
    stamps = {
        (name, checksum, stamp_of[name])
        for place, stamp_of in ((lab.cache, scenario.stamps | scenario.old_stamps), (cache, scenario.stamps))
        for name, checksum in checksums(place).items()
    }
    return Undisturbed(after_command, outcome(cache), stamps)


def check_nothing_false(cache: Path, start: Path, scenario: Scenario, expected: Undisturbed) -> None:
    """What is recorded is true; what lies under a final name is whole."""
    if scenario.edits:
        assert chunk_bytes(cache) == chunk_bytes(start)
        assert essence(cache) in (essence(start), expected.after_command)
    elif record_bytes(cache) != record_bytes(start):
        assert isinstance(essence(cache), dict)  # it parses
    if isinstance(essence(cache), dict):
        check_recorded_alone(cache, start, scenario, expected)
    recorded = checksums(cache)
    for name in chunk_folders(cache) | recorded.keys():
        as_found = name in scenario.damaged and tree(cache / name) == tree(start / name)
        if as_found and (name not in recorded or name in checksums(start)):
            continue
        if name in recorded:
            record = read_whole_record(cache)["trajectory_records"][name]
            check_recorded(cache, name, recorded[name], record, expected)
        else:
            files = list((cache / name).iterdir())
            heads = [(attributes["trajectory"], attributes["num_chunks"]) for attributes in map(sealed, files)]
            assert heads == [(name, len(files))] * len(files)


def check_recorded_alone(cache: Path, start: Path, scenario: Scenario, expected: Undisturbed) -> None:
    """What progress.json says to a program that does not know of its journal is true too."""
    alone = read_progress(cache)
    for name, record in alone["trajectory_records"].items():
        if name not in scenario.damaged or tree(cache / name) != tree(start / name):
            check_recorded(cache, name, alone["trajectory_checksums"][name], record, expected)


def check_recorded(cache: Path, name: str, checksum: str, record: dict[str, Any], expected: Undisturbed) -> None:
    """All its chunks are there and intact, of its own frames, and of the data that its checksum stands for."""
    files = sorted((cache / name).iterdir())
    heads = [sealed(path) for path in files]
    assert [path.name for path in files] == [f"chunk_{index:05d}.h5" for index in range(len(SPANS[name]))]
    assert [[head["start"], head["stop"]] for head in heads] == record["spans"] == SPANS[name]
    assert [path.stat().st_size for path in files] == record["bytes"]
    told = {(head["trajectory"], head["trajectory_checksum"], head["fingerprint"]) for head in heads}
    assert told == {(name, checksum, record["fingerprint"])}
    with h5py.File(cache / name / "chunk_00000.h5") as file:
        stamp = int(file["cls_token"][0, 0])
    assert (name, checksum, stamp) in expected.stamps
    assert check_stamps(cache, name, stamp) == ROWS[name]


class Crash(NamedTuple):
    """A command that died at its call number `die_at`, the cache as it lay then, and the command lines that follow."""

    die_at: int
    folder: Path
    calls: list[Call]
    way_on: list[str]


def crashes(lab: Lab, scenario: Scenario, step: int) -> Iterator[Crash]:
    """The command killed at its first call, and at every `step`-th after it, until one ends undisturbed. The next ones
    are under way."""
    under_way: deque[tuple[int, Path, Child]] = deque()
    try:
        for number in itertools.count(1, step):
            folder = lab.copy()
            under_way.append(
                (number, folder, Child([command(folder, scenario.command)], folder / "output.txt", number))
            )
            if len(under_way) <= CHILDREN:
                continue
            die_at, folder, child = under_way.popleft()
            (ending,) = child.endings()
            if ending.code != DIED:
                assert ending.code == scenario.code
                return
            yield Crash(die_at, folder, ending.calls, way_on(folder / "cache", lab.cache, scenario))
    finally:
        for *_, child in under_way:
            child.endings()


def way_on(cache: Path, start: Path, scenario: Scenario) -> list[str]:
    """What a user would do after a crash: repeat an edit, or a command that had not begun; then a plain run."""
    if scenario.command != "run" and (scenario.edits or record_bytes(cache) == record_bytes(start)):
        return [scenario.command, "run"]
    return ["run"]


def take_up_again(lab: Lab, crashes: list[Crash]) -> Iterator[tuple[Crash, list[Ending]]]:
    """Each crash with the endings of what follows it. Few children do it all: a run in a new one takes longer."""
    shares = [crashes[first::CHILDREN] for first in range(CHILDREN)]
    children = [
        Child([command(crash.folder, line) for crash in share for line in crash.way_on], lab.start / f"{number}.txt")
        for number, share in enumerate(shares)
    ]
    for share, endings in zip(shares, [iter(child.endings()) for child in children]):
        for crash in share:
            yield crash, [next(endings) for _ in crash.way_on]


@contextlib.contextmanager
def noted(crash: Crash) -> Iterator[None]:
    """What fails says for which crash."""
    try:
        yield
    except Exception as error:
        error.add_note(f"killed at call {crash.die_at}, after {crash.calls[-1:]}; then {crash.way_on}: {crash.folder}")
        raise


def num_calls(folder: Path, scenarios: Iterable[Scenario]) -> int:
    """At which a run of one of these commands, undisturbed, could have been killed."""
    count = 0
    for number, scenario in enumerate(scenarios):
        (folder / str(number)).mkdir()
        lab = Lab(folder / str(number))
        scenario.prepare(lab)
        count += len(lab.execute(lab.start, scenario.command).calls)
    return count


def survive(lab: Lab, scenario: Scenario, check_more: Callable[[Path], Any] = lambda cache: None, step: int = 1) -> int:
    """The command killed at each call, or at every `step`-th, the cache as it lies then, and what comes of going on;
    the number of deaths."""
    start = lab.cache
    scenario.prepare(lab)
    expected = undisturbed(lab, scenario)
    died = []
    for crash in crashes(lab, scenario, step):
        with noted(crash):
            check_nothing_false(crash.folder / "cache", start, scenario, expected)
            check_more(crash.folder / "cache")
        died.append(crash)
    for crash, endings in take_up_again(lab, died):
        cache = crash.folder / "cache"
        with noted(crash):
            assert endings[-1].code == scenario.run_code
            assert all(ending.code in (0, scenario.code) for ending in endings)
            assert leftovers(cache) == []
            assert outcome(cache) == expected.outcome
            calls = itertools.chain(crash.calls, *(ending.calls for ending in endings))
            Disk(checksums(start), chunk_folders(start)).replay(calls)
        shutil.rmtree(crash.folder)
    return len(died)
