"""Commands in forked children that die at their n-th durability call, and what of their work a power cut would leave.

A durability call is one that changes what the cache folder holds, or forces it to the disk: opening a file for writing,
a write of the record, mkdir, rename, link, unlink, rmdir, fsync, and HDF5's create, write and close. Dying before call
n + 1 is dying after call n. The parent imports everything and runs no torch operator, so that a child starts within
milliseconds and inherits no threads.
"""

from __future__ import annotations

import faulthandler
import functools
import gc
import io
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import filelock  # noqa: F401  here, so that no child has to
import h5py
import torch

import dino_cache
import progress_utils

DIED, BROKEN = 77, 78  # exit codes that no command has: dead at the call asked for; the harness itself failed
SECONDS = 300  # after which a child that hangs says where, and ends

dino_cache.FrameDecoder(dino_cache.CacheSpec())  # imports torchvision and Pillow
dino_cache.library_versions()


def in_staging(path: str) -> bool:
    return is_below(path, progress_utils.STAGING_FOLDER)


def is_below(path: str, folder: str) -> bool:
    """Whether a path is a folder or in it."""
    return f"{path}/".startswith(f"{folder}/")


class Call(NamedTuple):
    """One durability call. Paths are relative to the cache folder, which is `.` itself."""

    kind: str
    path: str
    target: str | None = None  # of a rename or a link
    recorded: list[str] | None = None  # of a write of the record: the trajectories that it calls completed
    last_words: dict[str, bool] | None = None  # of a write of its journal: trajectory -> whether it calls it completed


class Ending(NamedTuple):
    """How a command ended: its exit code (DIED where it was killed), its calls in order."""

    code: int
    calls: list[Call]


class Command(NamedTuple):
    """A function that returns an exit code, and the cache that it works on."""

    function: Callable[[], int]
    cache_dir: Path


class Child:
    """A forked process that runs commands one after the other; it dies at call number `die_at` of the first, from 1.

    `log` gets what it prints.
    """

    def __init__(self, commands: list[Command], log: Path, die_at: int | None = None):
        self._log, self._report = log, log.with_suffix(".json")
        self._pid = os.fork()
        if self._pid == 0:
            _be_the_child(commands, log, self._report, die_at)

    def endings(self) -> list[Ending]:
        """Of the commands that ended, once the process has."""
        code = os.waitstatus_to_exitcode(os.waitpid(self._pid, 0)[1])
        assert code in (0, DIED), f"exit {code}: {self._log.read_text()}"
        endings = json.loads(self._report.read_bytes())
        return [Ending(code, [Call(*call) for call in calls]) for code, calls in endings]


def _be_the_child(commands: list[Command], log: Path, report: Path, die_at: int | None) -> NoReturn:
    code = BROKEN
    try:
        gc.disable()
        _redirect(log)
        faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)
        _share_fork_server()
        torch.set_num_threads(1)
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})  # verify and rebuild then start no processes
        progress_utils.HEARTBEAT_INTERVAL_S = float("inf")  # else a slow run would make calls that a quick one does not
        counter = _Counter(die_at, report)
        for command in commands:
            counter.watch(command.cache_dir)
            counter.end(command.function())
        counter.report()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _redirect(log: Path) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False, encoding="utf-8")
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", closefd=False, encoding="utf-8")


def _share_fork_server() -> None:
    """Readers come from the fork server of the parent, where it has one, which stays when this process ends."""
    dino_cache._STARTED.clear()
    if forkserver._forkserver._forkserver_pid is not None:
        for owner in (forkserver, forkserver._forkserver):
            owner.ensure_running = lambda: None  # its own would wait for a process that is no child of this one


class _Counter:
    """Counts this process's calls, from all its threads, and ends it before the one asked for."""

    def __init__(self, die_at: int | None, report: Path):
        self._die_at, self._report = die_at, report
        self._root = ""
        self._calls: list[Call] = []
        self._endings: list[Ending] = []
        self._lock = threading.RLock()
        self._install()

    def _install(self) -> None:
        sys.addaudithook(self._on_audit)
        os.fsync = lambda descriptor: self.count("fsync", _open_path(descriptor))  # what a killed process wrote stays
        self._before(h5py.File, "__init__", _h5_create)
        self._before(h5py.File, "close", _h5_close)
        self._before(h5py.Dataset, "__setitem__", _h5_write)
        self._before(h5py.Group, "create_dataset", _h5_write)
        progress_utils.open = self._open
        progress_utils.io = SimpleNamespace(FileIO=functools.partial(_JournalFile, self))

    def watch(self, cache_dir: Path) -> None:
        self._root, self._calls = os.path.realpath(cache_dir), []

    def end(self, code: int) -> None:
        self._endings.append(Ending(code, self._calls))

    def report(self) -> None:
        self._report.write_text(json.dumps(self._endings))

    def count(self, kind: str, path: str, last_act: Callable[[], Any] = lambda: None, **more: Any) -> None:
        """Note a call on the cache. Where it is the one to die at, `last_act` leaves the worst that half a call can."""
        place = self._place(path)
        if place is None:
            return
        with self._lock:
            if len(self._calls) + 1 == self._die_at:
                last_act()
                self.end(DIED)
                self.report()
                os._exit(DIED)
            self._calls.append(Call(kind, place, **more))

    def _place(self, path: str) -> str | None:
        """The path relative to the cache, or None outside it."""
        path = os.path.abspath(path)
        return os.path.relpath(path, self._root) if is_below(path, self._root) else None

    def _on_audit(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                self.count("open", os.fsdecode(path))
        elif event in ("os.mkdir", "os.remove", "os.rmdir"):
            path = _at(arguments[0], arguments[-1])
            if os.path.lexists(path) != (event == "os.mkdir"):  # else it changes nothing
                self.count(event[3:], path)
        elif event in ("os.rename", "os.link"):
            source, target, source_folder, target_folder = arguments
            target = self._place(_at(target, target_folder))
            self.count(event[3:], _at(source, source_folder), target=target)

    def _before(self, owner: Any, name: str, describe: Callable[..., Any]) -> None:
        """Count each call of owner.name that `describe` gives the kind and the path of."""
        function = getattr(owner, name)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            call = describe(*arguments, **keywords)
            if call:
                self.count(*call)
            return function(*arguments, **keywords)

        setattr(owner, name, counted)

    def _open(self, path: Any, mode: str = "r", **keywords: Any) -> Any:
        is_record = mode == "xb" and os.path.basename(path).startswith(progress_utils.PROGRESS_FILE)
        return _RecordFile(path, self) if is_record else io.open(path, mode, **keywords)  # noqa: UP020


class _RecordFile(io.BufferedWriter):
    """A record being written, in counted writes."""

    def __init__(self, path: Any, counter: _Counter):
        super().__init__(io.FileIO(path, "x"))
        self._counter = counter

    def write(self, data: bytes) -> int:
        write = super().write
        half = data[: len(data) // 2]
        completed = json.loads(data)["completed_trajectories"]
        self._counter.count("write", os.fspath(self.name), lambda: (write(half), self.flush()), recorded=completed)
        return write(data)


class _JournalFile(io.FileIO):
    """A journal of the record being written, in counted writes."""

    def __init__(self, counter: _Counter, path: Any, mode: str):
        super().__init__(path, mode)
        self._counter = counter

    def write(self, data: Any) -> int:
        write, data = super().write, bytes(data)
        entries = [json.loads(line[9:]) for line in data.splitlines()]
        words = {name: kind == "completed" for entry in entries for kind, name in entry.items() if kind in _LAST_WORDS}
        half = data[: len(data) // 2]
        self._counter.count("write", os.fspath(self.name), lambda: write(half), last_words=words)
        return write(data)


_LAST_WORDS = ("completed", "failed", "withdrawn")

_h5_paths: dict[str, str] = {}  # what h5py calls a file -> its path


def _h5_create(_: h5py.File, file: Any, mode: str = "r", **__: Any) -> tuple | None:
    if mode == "r":
        return None
    path = os.fspath(getattr(file, "name", file))
    _h5_paths[repr(file) if hasattr(file, "write") else path] = path
    return "h5create", path


def _h5_write(group: h5py.Group | h5py.Dataset, *_: Any, **__: Any) -> tuple:
    return "h5write", _h5_paths[group.file.filename], group.file.flush


def _h5_close(file: h5py.File) -> tuple | None:
    return ("h5close", _h5_paths[file.filename], file.flush) if file.id.valid and file.mode != "r" else None


def _open_path(descriptor: int) -> str:
    return os.readlink(f"/proc/self/fd/{descriptor}")


def _at(path: Any, folder: int) -> str:
    """A path, which may be relative to an open folder."""
    return os.fsdecode(path) if folder == -1 else os.path.join(_open_path(folder), os.fsdecode(path))


class Disk:
    """What a power cut would leave of a cache, worked out from its calls; AssertionError where one comes too early.

    Bytes last once their file was forced to the disk after the last write, a name once its folder was. Until then a
    power cut may keep them or not. `recorded` and `published` are the trajectories that the record calls completed, and
    those that have chunk files, before the first call.
    """

    def __init__(self, recorded: Iterable[str], published: Iterable[str]):
        self.published: list[str] = []
        self.replaced: list[str] = []
        self._in_place = set(published)
        self._bytes: set[str] = set()  # files whose bytes may be lost
        self._names: set[str] = set()  # files and folders whose name may be lost
        self._records = [set(recorded)]  # what progress.json may call completed, the latest last
        self._written: list[str] = []
        self._journal: dict[str, set[bool]] = {}  # trajectory -> what the journal may say after a power cut
        self._last_words: dict[str, bool] = {}  # and what it says otherwise

    def replay(self, calls: Iterable[Call]) -> Disk:
        for call in calls:
            getattr(self, f"_{call.kind.removeprefix('h5')}")(call)
        return self

    def check_settled(self) -> None:
        """After a run: the record in force is the one that lasts, with its trajectories."""
        assert len(self._records) == 1, "the last record is not forced to the disk"
        assert progress_utils.PROGRESS_FILE not in self._bytes | self._names
        self._check_lasting(self._records[0])

    def _open(self, call: Call) -> None:
        is_final = progress_utils.is_chunk_file(os.path.basename(call.path)) and not in_staging(call.path)
        assert not is_final, f"{call.path} is opened for writing under its final name"
        self._bytes.add(call.path)
        self._names.add(call.path)

    _create = _open

    def _write(self, call: Call) -> None:
        self._bytes.add(call.path)
        if call.recorded is not None:
            assert call.path != progress_utils.PROGRESS_FILE, "the record is written in place"
            self._check_lasting(call.recorded)
            self._written = call.recorded
        for name, is_completed in (call.last_words or {}).items():
            self._check_lasting([name] * is_completed)
            self._journal.setdefault(name, set()).add(is_completed)
            self._last_words[name] = is_completed

    _close = _write

    def _mkdir(self, call: Call) -> None:
        self._names.add(call.path)

    def _link(self, call: Call) -> None:
        self._names.add(call.target)

    def _rename(self, call: Call) -> None:
        if in_staging(call.path) and not in_staging(call.target):
            assert not self._fleeting(call.path), f"published, but may be lost: {self._fleeting(call.path)}"
            self.published.append(call.target)
            self._in_place.add(call.target)
        elif in_staging(call.target):
            self._check_unrecorded(call.path)
            self.replaced.append(call.path)
            self._in_place.discard(call.path)
        elif call.target == progress_utils.PROGRESS_FILE:
            assert call.path not in self._bytes, "the record's bytes are renamed before they are forced to the disk"
            self._records.append(set(self._written))
        for places in (self._bytes, self._names):
            moved = {call.target + place[len(call.path) :] for place in places if is_below(place, call.path)}
            gone = {place for place in places if is_below(place, call.path) or is_below(place, call.target)}
            places.difference_update(gone)
            places.update(moved)
        self._names.add(call.target)

    def _remove(self, call: Call) -> None:
        if not in_staging(call.path) and progress_utils.is_chunk_file(os.path.basename(call.path)):
            self._check_unrecorded(os.path.dirname(call.path))
        if call.path == progress_utils.JOURNAL_FILE:
            self._journal.clear()
        for places in (self._bytes, self._names):
            places.difference_update({place for place in places if is_below(place, call.path)})

    _rmdir = _remove

    def _fsync(self, call: Call) -> None:
        self._bytes.discard(call.path)
        if call.path == progress_utils.JOURNAL_FILE:
            self._journal = {name: {self._last_words[name]} for name in self._journal}
        self._names -= {place for place in self._names if (os.path.dirname(place) or ".") == call.path}
        if call.path == ".":
            self._records = self._records[-1:]

    def _fleeting(self, folder: str) -> set[str]:
        return {place for place in self._bytes | self._names if is_below(place, folder) and place != folder}

    def _check_lasting(self, names: Any) -> None:
        for name in names:
            assert name in self._in_place, f"{name} is recorded, but its chunks are not in place"
            lost = self._fleeting(name) | {place for place in self._names if is_below(name, place)}
            assert not lost, f"{name} is recorded, but a power cut may lose {sorted(lost)}"

    def _check_unrecorded(self, name: str) -> None:
        is_recorded = any(name in names for names in self._records) or True in self._journal.get(name, ())
        assert not is_recorded, f"{name} is taken away while it may still be recorded"
