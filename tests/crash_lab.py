"""Whatever call a command is killed at, nothing false is recorded, and running it again gives what it would have given.

Each scenario is a cache in some state and a command that is killed before its first, second, ... durability call, until
one runs to its end (crash_harness). After each death the cache is checked as it lies there, the job is taken up again,
and the result is compared with that of a command that nobody disturbed.
"""

import contextlib
import hashlib
import itertools
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import yaml

import dino_cache
import progress_utils
from crash_harness import DIED, Call, Child, Command, Disk, Ending
from dino_cache_extras.chunk_files import read_chunk_header
from dino_cache_extras.commands import verify
from support import (
    cache_content,
    check_stamps,
    chunk_files,
    make_trajectory,
    read_progress,
    straight_line,
    tree,
    write_config,
    write_frame,
    write_poses,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs fork and /proc")

CHILDREN = 2  # at a time

# Frames are 0.25 m apart. Chunks of 1 m that overlap by 0.25 m: of four frames one, of eight 0..4 and 3..7. Batches are
# of four, and so always full, since StampEncoder's tokens tell the size of the batch too.
A, NESTED, C, D = "a1", "b/deep/n2", "c3", "d4"  # the digit is the stamp of the frames
SPANS = {A: [[0, 4]], NESTED: [[0, 5], [3, 8]], C: [[0, 5], [3, 8]], D: [[0, 4]]}
FRAMES = {name: spans[-1][1] for name, spans in SPANS.items()}
ROWS = {name: sum(stop - start for start, stop in spans) for name, spans in SPANS.items()}


class Lab:
    """A dataset, and folders with a cache of it: `start`, as a scenario finds it, and copies of that."""

    def __init__(self, root: Path):
        self.data, self.start = root / "data", root / "start"
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
        config = yaml.safe_load(write_config(path, self.data, **limits, **settings).read_text())
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


def run(save_share: float, arguments: list[str]) -> int:
    progress_utils.SAVE_SHARE = save_share
    return dino_cache.main(arguments)


def command(folder: Path, line: str) -> Command:
    """A command line on the cache in `folder`: `run` with options, or one of progress_utils."""
    name, *options = line.split()
    cache = folder / "cache"
    if name in SAVE_SHARES:
        return Command(lambda: run(SAVE_SHARES[name], ["--config", str(folder / "robot.yaml"), *options]), cache)
    return Command(lambda: progress_utils.main([name, "--cache-dir", str(cache), *options]), cache)


# ---------------------------------------------------------------------------------------------------------------------
# The scenarios
# ---------------------------------------------------------------------------------------------------------------------


def two_changed(lab: Lab) -> None:
    """Both trajectories have new data."""
    lab.add(A, D)
    lab.configure()
    lab.run()
    for name, stamp in ((A, 11), (D, 14)):
        shutil.rmtree(lab.data / name)
        make_trajectory(lab.data / name, FRAMES[name], stamp=stamp, yaw=np.ones(FRAMES[name]))


def nothing_yet(lab: Lab) -> None:
    """Two good trajectories, one whose seventh frame is cut off, one with a pose that is not a number."""
    lab.add(A, NESTED, C, D)
    frame = lab.data / C / "6.png"
    frame.write_bytes(frame.read_bytes()[:60])
    lab.spoil_poses(D)
    lab.configure()


def changed_data(lab: Lab) -> None:
    """One trajectory has new data, one lost a chunk, one is now invalid and is tried just once, one is as it was."""
    lab.add(A, NESTED, C, D)
    lab.configure(max_attempts=1)
    lab.run()
    shutil.rmtree(lab.data / A)
    make_trajectory(lab.data / A, FRAMES[A], stamp=11, yaw=np.ones(FRAMES[A]))
    (lab.cache / NESTED / "chunk_00001.h5").unlink()
    lab.spoil_poses(C)


def repainted(lab: Lab, *names: str) -> None:
    """The data changed in a way that only redoing everything takes in: 10 more in the stamps."""
    lab.add(*names)
    lab.configure()
    lab.run()
    for name in names:
        lab.paint(name, int(name[-1]) + 10)


def two_repainted(lab: Lab) -> None:
    repainted(lab, A, NESTED)


def one_repainted(lab: Lab) -> None:
    repainted(lab, NESTED)


def one_repainted_and_reset(lab: Lab) -> None:
    repainted(lab, NESTED)
    assert lab.execute(lab.start, "reset --yes").code == 0


def mended(lab: Lab) -> None:
    """One trajectory failed as often as it may, and its data was mended in a way that nobody noticed."""
    lab.add(A, C)
    frame = lab.data / C / "6.png"
    good = frame.read_bytes()
    frame.write_bytes(bytes(len(good)))
    lab.configure(max_attempts=1)
    lab.run(code=1)
    frame.write_bytes(good)


def damaged(lab: Lab) -> None:
    """One trajectory has a chunk with a wrong byte, one lost a chunk, one is sound; and things lie about."""
    lab.add(A, NESTED, D)
    lab.configure()
    lab.run()
    chunk = lab.cache / A / "chunk_00000.h5"
    with h5py.File(chunk) as file:
        place = file["yaw"].id.get_offset()
    data = bytearray(chunk.read_bytes())
    data[place] ^= 1
    chunk.write_bytes(data)
    (lab.cache / NESTED / "chunk_00001.h5").unlink()
    shutil.copytree(lab.cache / D, lab.cache / ".staging" / "tmp1234")
    (lab.cache / "progress.json.tmp").write_text("{")


def lost_record(lab: Lab) -> None:
    lab.add(A, NESTED)
    lab.configure()
    lab.run()
    (lab.cache / "progress.json").unlink()


def corrupt_record(lab: Lab) -> None:
    """And one trajectory lost a chunk, so that it cannot be taken into the record."""
    lab.add(A, NESTED)
    lab.configure()
    lab.run()
    (lab.cache / NESTED / "chunk_00001.h5").unlink()
    record = lab.cache / "progress.json"
    record.write_bytes(record.read_bytes()[:300])


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
SCENARIOS = {
    "a fresh run": Scenario(nothing_yet, "run", 1, 1, BOTH),
    "a redo": Scenario(changed_data, "run", 1, 1, {A: 11, NESTED: 2, D: 4}, {A: 1, C: 3}, (NESTED,)),
    "a redo, rarely saved": Scenario(two_changed, "run-rarely-saved", 0, 0, {A: 11, D: 14}, {A: 1, D: 4}),
    "force_rebuild": Scenario(two_repainted, "run --force-rebuild", 0, 0, {A: 11, NESTED: 12}, BOTH),
    "reset": Scenario(one_repainted, "reset --yes", 0, 0, {NESTED: 12}, {NESTED: 2}),
    "a run after reset": Scenario(one_repainted_and_reset, "run", 0, 0, {NESTED: 12}, {NESTED: 2}),
    "reset-failed": Scenario(mended, "reset-failed", 0, 0, {A: 1, C: 3}),
    "verify --repair": Scenario(damaged, "verify --deep --repair --yes", 1, 0, {**BOTH, D: 4}, {}, (A, NESTED)),
    "rebuild, no record": Scenario(lost_record, "rebuild --yes", 0, 0, BOTH),
    "rebuild, corrupt record": Scenario(corrupt_record, "rebuild --yes", 1, 0, BOTH, {}, (NESTED,)),
}


# ---------------------------------------------------------------------------------------------------------------------
# What a cache holds
# ---------------------------------------------------------------------------------------------------------------------


def record_bytes(cache: Path) -> bytes | None:
    path = cache / "progress.json"
    return path.read_bytes() if path.exists() else None


def checksums(cache: Path) -> dict[str, str]:
    """What the record calls completed; nothing where there is no record, or a corrupt one."""
    try:
        return read_progress(cache)["trajectory_checksums"]
    except (FileNotFoundError, ValueError):
        return {}


def essence(cache: Path) -> dict[str, Any] | bytes | None:
    """What the record says, without times and counts of attempts; the bytes of a corrupt one."""
    try:
        data = read_progress(cache)
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
    recorded = checksums(cache)
    for name in chunk_folders(cache) | recorded.keys():
        as_found = name in scenario.damaged and tree(cache / name) == tree(start / name)
        if as_found and (name not in recorded or name in checksums(start)):
            continue
        if name in recorded:
            check_recorded(cache, name, recorded[name], expected)
        else:
            files = list((cache / name).iterdir())
            headers = [read_chunk_header(path, deep=True).attributes for path in files]
            assert [(header["trajectory"], header["num_chunks"]) for header in headers] == [(name, len(files))] * len(
                files
            )


def check_recorded(cache: Path, name: str, checksum: str, expected: Undisturbed) -> None:
    """All its chunks are there and intact, of its own frames, and of the data that its checksum stands for."""
    record = read_progress(cache)["trajectory_records"][name]
    assert verify.check_trajectory(cache, (name, record, checksum), deep=True) == []
    assert record["spans"] == SPANS[name]
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


def crashes(lab: Lab, scenario: Scenario) -> Iterator[Crash]:
    """The command killed at its first call, its second, ... until one ends undisturbed. The next ones are under way."""
    under_way: deque[tuple[int, Path, Child]] = deque()
    try:
        for number in itertools.count(1):
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


@pytest.fixture
def lab(tmp_path: Path, encoders: list) -> Lab:
    return Lab(tmp_path)


@pytest.fixture(scope="module")
def survived() -> dict[str, int]:
    """Scenario -> crash points."""
    return {}


@pytest.mark.parametrize("title", SCENARIOS)
def test_killed_at_any_call_it_records_nothing_false_and_then_ends_as_if_undisturbed(title, lab, survived):
    scenario, start = SCENARIOS[title], lab.cache
    scenario.prepare(lab)
    expected = undisturbed(lab, scenario)
    died = []
    for crash in crashes(lab, scenario):
        with noted(crash):
            check_nothing_false(crash.folder / "cache", start, scenario, expected)
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
    survived[title] = len(died)


@pytest.mark.parametrize(
    ("title", "published", "replaced"),
    [
        ("a fresh run", [A, NESTED], []),
        ("a redo", [A, NESTED], [A, NESTED, C]),
        ("force_rebuild", [A, NESTED], [A, NESTED]),
    ],
)
def test_nothing_is_recorded_or_replaced_before_a_power_cut_would_spare_it(title, published, replaced, lab):
    """That the process was killed does not show what the disk had not been told to keep."""
    SCENARIOS[title].prepare(lab)
    recorded, folders = checksums(lab.cache), chunk_folders(lab.cache)
    calls = lab.execute(lab.start, SCENARIOS[title].command).calls
    disk = Disk(recorded, folders).replay(calls)
    disk.check_settled()
    assert (sorted(disk.published), sorted(disk.replaced)) == (published, replaced)


def test_more_than_300_crash_points_are_survived(survived):
    if survived.keys() != SCENARIOS.keys():
        pytest.skip("not all scenarios were run, or one failed")
    print(f"\n{sum(survived.values())} crash points survived")
    assert sum(survived.values()) > 300
