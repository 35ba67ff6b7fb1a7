#!/usr/bin/env python3
"""Read and edit the progress record of a dino_cache.

    python progress_utils.py show         --cache-dir D [--json | --watch [SECONDS]] [--all]
    python progress_utils.py list         [--root .] [--json]
    python progress_utils.py reset-failed --cache-dir D
    python progress_utils.py reset        --cache-dir D [--yes]
    python progress_utils.py verify       --cache-dir D [--deep] [--json] [--repair [--yes]]
    python progress_utils.py rebuild      --cache-dir D [--yes]
    python progress_utils.py report       --cache-dir D [-o report.html] [--data-folder DIR]
    python progress_utils.py export       --cache-dir D --to flat|vint -o PATH [--tokens ...] [--allow-mixed] [--force]

This file owns three things, which dino_cache.py imports from here:

    durable writing   write_durably, fsync_directory: every file that must survive a crash passes through them
    the lock          cache_lock: one run, or one edit, per cache; and what a run tells those who watch it
    the record        Progress: what <cache_dir>/progress.json holds, how it is checked, loaded and saved

Reading commands never write and never lock; editing commands take the lock and are refused while a run holds it.
Exit codes: 0 fine, 1 problems found, 2 could not do it, 4 a run holds the cache.

A save survives a killed process and, as far as the disk keeps its word about fsync, a power cut. The copy before it
stays as progress.json.bak. Only the standard library is imported at the top, so that every command starts at once; what
knows chunk files (verify, rebuild, export, report) imports dino_cache when it runs.
"""

from __future__ import annotations

import argparse
import base64
import bisect
import calendar
import collections
import contextlib
import errno
import functools
import gc
import hashlib
import html
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

# ======================================================================================================================
# Constants: the names of a cache's own files
# ======================================================================================================================

PROGRESS_FILE = "progress.json"
BACKUP_FILE = "progress.json.bak"
STAGING_FOLDER = ".staging"
LOCK_FILE = ".lock"
LOCK_OWNER_FILE = ".lock.owner"  # who holds the lock and how far it is; advisory, the lock itself decides
TEMPORARY_FILES = tuple(f"{name}.tmp" for name in (PROGRESS_FILE, BACKUP_FILE, LOCK_OWNER_FILE))  # of a killed save
LOG_FILE = "dino_cache.log"

PROGRESS_FORMAT_VERSION = 1
SAVE_SHARE = 0.02  # saves may take this share of a run's time before they are spaced
READABLE_ENTRIES = 1000  # up to here progress.json is indented; json's indenting encoder is 10 times slower
SHOWN_FAILURES = 10
HEARTBEAT_INTERVAL_S = 1.0  # between two times that a run says how far it is
STALE_AFTER_S = 900.0  # a run that encodes and says nothing for so long is taken for stuck
WATCH_INTERVAL_S = 2.0
# Errors of reading that are the mount's fault or the user's, so that a file that gives one is not called damaged.
CANNOT_LOOK = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOTCONN, errno.ENXIO, errno.ETIMEDOUT)
GC_THRESHOLDS = (100_000, 20, 100)  # a large record is a million objects, not to be looked through every 700 new ones


# ======================================================================================================================
# Errors: each carries the exit code that it ends a command with
# ======================================================================================================================


class DinoCacheError(Exception):
    """An error with a message for the user: what is wrong, with which file or value, and the way on."""

    exit_code = 3


class RefusedError(DinoCacheError):
    """Configuration, usage or an unusable record: nothing was started, nothing changed."""

    exit_code = 2


class DamagedChunkError(Exception):
    """A chunk file is not what it was when it was written, or not what the record says."""


class CacheLockedError(DinoCacheError):
    """Another run or edit holds the cache."""

    exit_code = 4


# ======================================================================================================================
# Names and small helpers
# ======================================================================================================================


def chunk_file_name(index: int) -> str:
    """The file of a trajectory's chunk number `index`, from 0."""
    return f"chunk_{index:05d}.h5"


def is_chunk_file(name: str) -> bool:
    """Whether a file's name is that of a chunk."""
    return re.fullmatch(r"chunk_\d{5,}\.h5", name) is not None


CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container: "<microseconds> <in so many>", or "max <...>"


def printable(text: str) -> str:
    """A text for the terminal: names come from strangers' data, control characters in them do not reach it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def available_cores() -> int:
    """Cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota_us, period_us = map(int, CPU_QUOTA.read_text().split())
        cores = min(cores, max(1, quota_us // period_us))
    return cores


def chunk_folders(cache_dir: Path) -> Iterator[str]:
    """Names of trajectories that have chunk files here, recorded or not.

    Raises:
        RefusedError: a folder cannot be listed; what lies in it must not be taken for absent.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise RefusedError(f"{error.filename}: cannot list it: {error.strerror}. Nothing was changed") from error

    for folder, subfolders, files in os.walk(cache_dir, onerror=refuse):
        is_top = Path(folder) == cache_dir
        subfolders[:] = sorted(name for name in subfolders if not (is_top and name == STAGING_FOLDER))
        if any(map(is_chunk_file, files)):
            yield Path(folder).relative_to(cache_dir).as_posix()


def human_bytes(count: float) -> str:
    """1234567 -> 1.2 MB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def human_duration(seconds: float) -> str:
    """5400 -> 1.5 h."""
    if seconds >= 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


# ======================================================================================================================
# Durable writing: temp beside the target, fsync, rename, fsync the folder
# ======================================================================================================================


def fsync_path(path: Path) -> None:
    """Force a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directories_durably(directory: Path) -> None:
    """Create a folder and its missing parents, each entry forced to the disk; the folder's own also if it was there."""
    if not directory.parent.is_dir():
        make_directories_durably(directory.parent)
    directory.mkdir(exist_ok=True)
    with contextlib.suppress(PermissionError):  # a parent that may not be read
        fsync_path(directory.parent)


def write_durably(path: Path, data: bytes, *, backup: Path | None = None) -> None:
    """Replace a file by `data` so that at every moment the path holds the old bytes or the new, never a part.

    With `backup`, the bytes replaced stay under that name. Survives a killed process; survives a power cut as far as
    the disk keeps its word about fsync.
    """
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # it may be a link, which must not be written through
    with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if backup is not None and path.exists():
        keep_copy(path, backup)
    os.replace(temporary, path)
    fsync_path(path.parent)


def keep_copy(path: Path, copy: Path) -> None:
    """Give the file's present bytes a second name, replacing what had it; `path` is there all the while."""
    temporary = copy.with_name(copy.name + ".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # no hard links here (exFAT, some network mounts)
        shutil.copyfile(path, temporary)
        fsync_path(temporary)
    os.replace(temporary, copy)
    temporary.unlink(missing_ok=True)  # rename(2) leaves both names where they already were one file


# ======================================================================================================================
# The lock: one run, or one edit, per cache
# ======================================================================================================================


@contextlib.contextmanager
def cache_lock(cache_dir: Path) -> Iterator[None]:
    """Hold the cache for this process. The system drops the lock with the process, so a dead one leaves no stale lock.

    Raises:
        CacheLockedError: another process holds it; the message says who.
        RefusedError: the folder cannot be written, its filesystem cannot lock, or a file to be written is a link.
    """
    from filelock import FileLock, Timeout  # here: 50 ms that reading commands need not pay

    for name in (LOCK_FILE, LOCK_OWNER_FILE, LOG_FILE):  # a cache folder may have come with the data, from a stranger
        if (cache_dir / name).is_symlink():
            raise RefusedError(f"{cache_dir / name}: is a link, and would be written through. Remove it")
    lock = FileLock(cache_dir / LOCK_FILE, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        holder = lock_owner(cache_dir) or "its holder left no name"
        raise CacheLockedError(f"{cache_dir}: another run holds this cache ({holder})") from None
    except (OSError, NotImplementedError) as error:
        raise RefusedError(
            f"{cache_dir / LOCK_FILE}: cannot lock: {error}. Make the folder writable, or put cache_dir on a "
            "filesystem that supports flock (on NFS: mount with locking enabled)."
        ) from error
    owner = cache_dir / LOCK_OWNER_FILE
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    try:
        try:
            owner.write_text(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}))
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise RefusedError(f"{owner}: cannot write: {error.strerror}. Make the folder writable") from error
            # else a full disk, say: the lock holds without a name
        yield
    finally:
        with contextlib.suppress(OSError):
            owner.unlink(missing_ok=True)
        lock.release()


class RunState(NamedTuple):
    """How far a run is, as it tells it."""

    done: int  # trajectories completed, of those present and selected
    total: int
    chunks: int
    elapsed_s: float
    frames_left: int
    frames_per_s: float
    trajectory: str | None  # the one in work

    def line(self) -> str:
        """In words; time left and rate once there is a rate to tell."""
        percent = 100 * self.done / self.total
        line = f"Progress: {self.done}/{self.total} trajectories ({percent:.1f}%), {self.chunks} chunks"
        line += f", {self.elapsed_s / 3600:.1f}h elapsed"
        if self.frames_per_s > 0 and self.elapsed_s > 2:
            hours_left = self.frames_left / self.frames_per_s / 3600
            line += f", {hours_left:.1f}h remaining, {self.frames_per_s:.0f} frames/s"
        return line


class Heartbeat:
    """Tells those who watch how far a run is, beside the name of the lock's holder, once a second at most.

    What is told is for eyes only: it is not forced to the disk, goes with the lock, and nothing is decided by it.
    """

    def __init__(self, cache_dir: Path):
        self._path = cache_dir / LOCK_OWNER_FILE
        self._has_beaten = False
        self._last_beat = time.monotonic()  # a run that is over at once has nothing to tell

    def beat(self, state: Callable[[], RunState]) -> None:
        """Tell how far the run is, if it is time to."""
        if time.monotonic() - self._last_beat >= HEARTBEAT_INTERVAL_S:
            self._last_beat, self._has_beaten = time.monotonic(), True
            self._write({"run": state()._asdict()})

    def end(self) -> None:
        """Tell that the run is over, though its process may hold the lock for longer."""
        if self._has_beaten:
            self._write({})

    def _write(self, more: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk, say
            owner = json.loads(self._path.read_text(encoding="utf-8"))
            owner.pop("run", None)
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_text(json.dumps({**owner, **more}), encoding="utf-8")
            os.replace(temporary, self._path)


class LockOwner(NamedTuple):
    """Who left its name beside the lock."""

    name: str  # pid, host and start time, in words
    is_alive: bool  # a process of another host counts as alive, nobody here can tell
    last_heartbeat: float  # epoch seconds
    run: RunState | None

    @property
    def is_stale(self) -> bool:
        """Whether it left the name when it was killed, or seems stuck. One that encodes nothing has nothing to say: it
        reads poses, loads a model, or is at work on another of its config's datasets."""
        is_silent = self.run is not None and time.time() - self.last_heartbeat > STALE_AFTER_S
        return is_silent or not self.is_alive


def read_lock_owner(cache_dir: Path) -> LockOwner | None:
    """Who left its name beside the lock; None where nobody did."""
    path, is_alive = cache_dir / LOCK_OWNER_FILE, True
    try:
        last_heartbeat = path.stat().st_mtime
        owner = json.loads(path.read_text(encoding="utf-8"))
        name = f"pid {owner['pid']} on {owner['host']}, since {owner['started']}"
        run = RunState(**owner["run"]) if "run" in owner else None
        if owner["host"] == socket.gethostname():
            os.kill(owner["pid"], 0)
    except PermissionError:  # somebody else's process, and alive
        pass
    except ProcessLookupError:
        is_alive = False
    except (OSError, ValueError, KeyError, TypeError, OverflowError):
        return None
    return LockOwner(name, is_alive, last_heartbeat, run)


def lock_owner(cache_dir: Path) -> str | None:
    """Who seems to hold the lock, in words; None where it left no name, or was a process of this host that is dead."""
    owner = read_lock_owner(cache_dir)
    return owner.name if owner is not None and owner.is_alive else None


# ======================================================================================================================
# The record: progress.json, checked when read, durable when saved
# ======================================================================================================================


class TrajectoryRecord(TypedDict):
    """A completed trajectory: enough to index its chunks, or to see that a file is missing, without opening one."""

    fingerprint: str  # of the spec it was made with, a key of `specs`
    spans: list[list[int]]  # per chunk, half-open [start, stop) in kept frames
    bytes: list[int]  # per chunk, the file's size
    checksum_kind: str  # stat | content: what its entry in trajectory_checksums was computed from


class Failure(TypedDict):
    """A trajectory that could not be cached, with the reason of its last attempt."""

    reason: str
    error_type: str
    attempts: int
    time: float  # epoch seconds of the last attempt
    checksum: str | None  # of the data that failed; null where it could not be read
    checksum_kind: str


class Progress:
    """The record of one cache: what is completed, what failed and why, and the configuration in force.

    Safe to use from the run's main thread and its writer thread. Nothing reaches the disk before `save`.
    """

    def __init__(self, cache_dir: Path, dataset_name: str | None):
        now = time.time()
        self.cache_dir = cache_dir
        self.dataset_name = dataset_name
        self.start_time = now
        self.last_update = now
        self.elapsed_s = 0.0  # working time of all runs
        self.data_folder: str | None = None  # where the last run read, in which format, and how many trajectories it
        self.data_format: str | None = None  # knew of, those present and those recorded; for people, nothing is
        self.num_trajectories: int | None = None  # decided by them
        self.checksum_kind = "stat"
        self.rebuild_started: float | None = None
        self.processing_config: dict[str, Any] = {}
        self.weights: dict[str, Any] | None = None  # source, size, mtime, digest
        self.specs: dict[str, dict[str, Any]] = {}
        self.checksums: dict[str, str] = {}
        self.records: dict[str, TrajectoryRecord] = {}
        self.failures: dict[str, Failure] = {}
        self._lock = threading.RLock()
        self._saves_s = 0.0
        self._last_save_s = 0.0
        self._last_save_end = 0.0

    @property
    def total_chunks(self) -> int:
        """Chunk files of all completed trajectories."""
        with self._lock:
            return sum(len(record["spans"]) for record in self.records.values())

    @property
    def fingerprints(self) -> set[str]:
        """Fingerprints in use; more than one means that the cache is mixed."""
        with self._lock:
            return {record["fingerprint"] for record in self.records.values()}

    def complete(self, name: str, checksum: str, record: TrajectoryRecord) -> None:
        """Record a trajectory whose chunks are durable."""
        with self._lock:
            self.failures.pop(name, None)
            self.checksums[name] = checksum
            self.records[name] = record

    def fail(self, name: str, failure: Failure) -> None:
        """Record a trajectory as failed, and so no longer as completed."""
        with self._lock:
            self.forget(name)
            self.failures[name] = failure

    def forget(self, name: str) -> bool:
        """Un-record a completed trajectory; says whether it was recorded."""
        with self._lock:
            self.checksums.pop(name, None)
            return self.records.pop(name, None) is not None

    def empty(self) -> None:
        """Forget every trajectory and the configuration that they were made with."""
        with self._lock:
            for entries in (self.checksums, self.records, self.failures, self.specs, self.processing_config):
                entries.clear()
            self.weights = None
            self.elapsed_s = 0.0

    def to_json(self) -> dict[str, Any]:
        """The file's content, key by key."""
        in_use = self.fingerprints
        return {
            "format_version": PROGRESS_FORMAT_VERSION,
            "dataset_name": self.dataset_name,
            "start_time": self.start_time,
            "last_update": self.last_update,
            "elapsed_s": self.elapsed_s,
            "total_chunks": self.total_chunks,
            "data_folder": self.data_folder,
            "data_format": self.data_format,
            "num_trajectories": self.num_trajectories,
            "checksum_kind": self.checksum_kind,
            "rebuild_started": self.rebuild_started,
            "processing_config": self.processing_config,
            "weights": self.weights,
            "specs": {key: spec for key, spec in self.specs.items() if key in in_use},
            "completed_trajectories": list(self.records),
            "failed_trajectories": list(self.failures),
            "trajectory_checksums": self.checksums,
            "trajectory_records": self.records,
            "failures": self.failures,
        }

    @classmethod
    def load(cls, cache_dir: Path) -> Progress | None:
        """The record in `cache_dir`, or None where there is no progress.json.

        Raises:
            RefusedError: there is one, but it is unreadable, corrupt, unversioned or of a newer version. It is never
                taken for "no progress".
        """
        content = read_record(cache_dir)
        return None if content is None else cls.parse(cache_dir, content)

    @classmethod
    def parse(cls, cache_dir: Path, content: bytes) -> Progress:
        """The record that `content`, read from `cache_dir`, holds; RefusedError as for `load`."""
        path = cache_dir / PROGRESS_FILE
        try:
            data = json.loads(content.decode("utf-8"))
            _refuse_newer(path, data)
            _check_progress(data)
        except (ValueError, TypeError, RecursionError) as error:
            raise RefusedError(f"{path}: not a usable progress record: {error}. {_ways_out(cache_dir)}") from error
        progress = cls(cache_dir, data["dataset_name"])
        for key in _PLAIN_KEYS:
            setattr(progress, key, data[key])
        for key in _LATER_KEYS:
            setattr(progress, key, data.get(key))
        progress.checksums = data["trajectory_checksums"]
        progress.records = data["trajectory_records"]
        return progress

    def save(self, *, keep_old: bool = True) -> None:
        """Write progress.json atomically and durably; the copy before stays as progress.json.bak, if wanted."""
        with self._lock:
            begin = time.monotonic()
            self.last_update = time.time()
            data = self.to_json()
            indent = 1 if len(self.records) + len(self.failures) <= READABLE_ENTRIES else None
            text = json.dumps(data, indent=indent, ensure_ascii=False) + "\n"
            write_durably(
                self.cache_dir / PROGRESS_FILE,
                text.encode(errors="backslashreplace"),
                backup=self.cache_dir / BACKUP_FILE if keep_old else None,
            )
            self._last_save_end = time.monotonic()
            self._last_save_s = self._last_save_end - begin
            self._saves_s += self._last_save_s

    def save_spaced(self, run_time_s: float) -> None:
        """Save, unless saves would then take over 2 % of the run's time; at most 50 times one save's duration apart."""
        with self._lock:
            since_last_s = time.monotonic() - self._last_save_end
            within_share = self._saves_s + self._last_save_s <= SAVE_SHARE * run_time_s
            if within_share or since_last_s >= self._last_save_s / SAVE_SHARE:
                self.save()


_PLAIN_KEYS = (  # stored under the name of the attribute
    "start_time",
    "last_update",
    "elapsed_s",
    "checksum_kind",
    "rebuild_started",
    "processing_config",
    "weights",
    "specs",
    "failures",
)
_LATER_KEYS = {"data_folder": str, "data_format": str, "num_trajectories": int}  # a record may lack them, or have null
_NUMBER = (int, float)
_NULL = type(None)
_KEY_TYPES: dict[str, tuple[type, ...]] = {
    "dataset_name": (str, _NULL),
    "start_time": _NUMBER,
    "last_update": _NUMBER,
    "elapsed_s": _NUMBER,
    "total_chunks": (int,),
    "checksum_kind": (str,),
    "rebuild_started": (*_NUMBER, _NULL),
    "processing_config": (dict,),
    "weights": (dict, _NULL),
    "specs": (dict,),
    "completed_trajectories": (list,),
    "failed_trajectories": (list,),
    "trajectory_checksums": (dict,),
    "trajectory_records": (dict,),
    "failures": (dict,),
}


def read_record(cache_dir: Path) -> bytes | None:
    """The bytes of the record in `cache_dir`, or None where there is none; RefusedError where it cannot be read."""
    path = cache_dir / PROGRESS_FILE
    try:
        return path.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            return None
        raise RefusedError(f"{path}: cannot read: {error.strerror}. {_ways_out(cache_dir)}") from error


def _refuse_newer(path: Path, data: Any) -> None:
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is int and version > PROGRESS_FORMAT_VERSION:
        raise RefusedError(
            f"{path}: format_version is {version}, this program knows {PROGRESS_FORMAT_VERSION}: a newer dino_cache "
            "made it. Update the program. Nothing was changed"
        )


def _check_progress(data: Any) -> None:
    """Raise ValueError, naming the key, unless `data` is a progress record of this version that agrees with itself."""
    if not isinstance(data, dict) or "format_version" not in data:
        raise ValueError("it has no format_version")
    version = data["format_version"]
    if version != PROGRESS_FORMAT_VERSION:
        raise ValueError(f"format_version is {version!r}, this program knows {PROGRESS_FORMAT_VERSION}")
    for key, types in _KEY_TYPES.items():
        if key not in data:
            raise ValueError(f"key {key} is missing")
        if not isinstance(data[key], types) or isinstance(data[key], bool):
            raise ValueError(f"key {key} has the wrong type ({type(data[key]).__name__})")
    for key, kind in _LATER_KEYS.items():
        if data.get(key) is not None and type(data[key]) is not kind:
            raise ValueError(f"key {key} has the wrong type ({type(data[key]).__name__})")
    _check_values(data)
    for name, record in data["trajectory_records"].items():
        _check_record(name, record, data["specs"])
    for name, failure in data["failures"].items():
        _check_fields(f"failures[{name!r}]", failure, Failure)
    if set(data["completed_trajectories"]) != set(data["trajectory_records"]):
        raise ValueError("completed_trajectories and trajectory_records name different trajectories")
    if not all(isinstance(checksum, str) for checksum in data["trajectory_checksums"].values()):
        raise ValueError("trajectory_checksums holds something that is not a text")
    if set(data["trajectory_checksums"]) != set(data["trajectory_records"]):
        raise ValueError("trajectory_checksums and trajectory_records name different trajectories")
    if set(data["failed_trajectories"]) != set(data["failures"]):
        raise ValueError("failed_trajectories and failures name different trajectories")


def _check_values(data: dict[str, Any]) -> None:
    for key in ("start_time", "last_update", "elapsed_s"):
        if not 0 <= data[key] < 1e11:  # NaN and what no calendar can show
            raise ValueError(f"key {key} is {data[key]}")
    for names in (data["completed_trajectories"], data["failed_trajectories"]):
        if not all(isinstance(name, str) for name in names):
            raise ValueError("a trajectory's name is not a text")
    for fingerprint, spec in data["specs"].items():
        if not isinstance(spec, dict) or not isinstance(spec.get("frame_pattern"), str):
            raise ValueError(f"specs[{fingerprint!r}] is not a configuration")
    if data["weights"] is not None and not {"source", "size", "mtime", "digest"} <= data["weights"].keys():
        raise ValueError("weights lacks source, size, mtime or digest")
    if both := set(data["trajectory_records"]) & set(data["failures"]):
        raise ValueError(f"{min(both)!r} is both completed and failed")


def _check_record(name: str, record: Any, specs: dict[str, Any]) -> None:
    _check_fields(f"trajectory_records[{name!r}]", record, TrajectoryRecord)
    spans, sizes = record["spans"], record["bytes"]
    pairs = all(isinstance(span, list) and len(span) == 2 and all(type(i) is int for i in span) for span in spans)
    if not spans or not pairs or len(spans) != len(sizes) or not all(type(size) is int for size in sizes):
        raise ValueError(f"trajectory_records[{name!r}]: spans and bytes do not describe chunk files")
    if record["fingerprint"] not in specs:
        raise ValueError(f"trajectory_records[{name!r}]: fingerprint {record['fingerprint']!r} is not in specs")


_FIELD_TYPES = {"spans": list, "bytes": list, "attempts": int, "time": _NUMBER, "checksum": (str, _NULL)}


def _check_fields(where: str, entry: Any, shape: type) -> None:
    for field in shape.__annotations__:
        if not isinstance(entry, dict) or not isinstance(entry.get(field, ...), _FIELD_TYPES.get(field, str)):
            raise ValueError(f"{where}: {field} is missing or has the wrong type")


def _ways_out(cache_dir: Path) -> str:
    command = f"progress_utils.py {{}} --cache-dir {cache_dir}"
    return (
        f"Nothing was changed. Ways out: `{command.format('rebuild')}` makes it anew from the chunk files; or put "
        f"{BACKUP_FILE} in its place; or `{command.format('reset')}` starts afresh and redoes every trajectory. Both "
        "commands keep the file aside"
    )


# ======================================================================================================================
# Showing and resetting the record
# ======================================================================================================================


def load_or_refuse(cache_dir: Path) -> Progress:
    """The record in `cache_dir`; RefusedError where there is none."""
    return Progress.parse(cache_dir, read_or_refuse(cache_dir))


def read_or_refuse(cache_dir: Path) -> bytes:
    """The bytes of the record in `cache_dir`; RefusedError where there is none."""
    content = read_record(cache_dir)
    if content is None:
        near = [str(path.parent) for path in sorted(cache_dir.glob(f"*/{PROGRESS_FILE}"))[:3]]
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise RefusedError(f"{cache_dir}: no {PROGRESS_FILE} here; a cache is the folder that holds it{hint}")
    return content


def show(cache_dir: Path, *, as_json: bool, show_all: bool) -> int:
    """Print the state of one cache."""
    progress = load_or_refuse(cache_dir)
    if as_json:
        mixed = len(progress.fingerprints) > 1
        print(json.dumps({"cache_dir": str(cache_dir), "mixed": mixed, **progress.to_json()}, ensure_ascii=False))
        return 0
    configuration = [f"  {key}: {value}" for key, value in progress.processing_config.items()]
    lines = [*_status_lines(progress), "", "Processing Configuration:", *configuration]
    print("\n".join(lines + _failure_lines(progress.failures, show_all)))
    return 0


def watch(cache_dir: Path, *, every_s: float, show_all: bool) -> int:
    """Print the state of one cache again and again, until Ctrl-C: in place on a terminal, else whenever it changed."""
    load_or_refuse(cache_dir)
    record, in_place, before = _WatchedRecord(cache_dir), sys.stdout.isatty(), None
    try:
        while True:
            progress = record.load()
            lines = [*_status_lines(progress), *_failure_lines(progress.failures, show_all)]
            if in_place:
                _print_in_place(lines, is_first=before is None)
            elif lines != before:
                print("\n".join(lines), end="\n\n", flush=True)
            before = lines
            time.sleep(every_s)
    except KeyboardInterrupt:
        return 0


class _WatchedRecord:
    """A record that is read again when its file changed, and not for more than a tenth of the time."""

    def __init__(self, cache_dir: Path):
        self._cache_dir = cache_dir
        self._progress: Progress | None = None
        self._stamp: tuple[int, ...] | None = None
        self._not_before = 0.0

    def load(self) -> Progress:
        begin = time.monotonic()
        status = os.stat(self._cache_dir / PROGRESS_FILE)
        stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        if self._progress is None or (stamp != self._stamp and begin >= self._not_before):
            self._progress, self._stamp = load_or_refuse(self._cache_dir), stamp
            self._not_before = begin + 10 * (time.monotonic() - begin)
        return self._progress


def _print_in_place(lines: list[str], *, is_first: bool) -> None:
    """Print over what was printed before, as much of it as fits into the terminal."""
    width, height = os.get_terminal_size(sys.stdout.fileno())
    shown = [line[: max(width - 1, 20)] for line in lines[: max(height - 1, 10)]]  # some terminals say 0
    clear, home, to_line_end, to_screen_end = "\x1b[2J", "\x1b[H", "\x1b[K", "\x1b[J"
    text = "".join(f"{line}{to_line_end}\n" for line in shown)
    print(f"{clear if is_first else ''}{home}{text}{to_screen_end}", end="", flush=True)


def _status_lines(progress: Progress) -> list[str]:
    return [
        f"📊 Progress Status for {progress.cache_dir}",
        "=" * 60,
        f"Dataset: {progress.dataset_name}",
        f"Completed trajectories: {len(progress.records)}",
        f"Failed trajectories: {len(progress.failures)}",
        f"Total chunks generated: {progress.total_chunks}",
        f"Processing time: {progress.elapsed_s / 3600:.1f} hours",
        f"Last update: {time.ctime(progress.last_update)}",
        *_run_lines(progress.cache_dir),
        *state_remarks(progress),
    ]


def _run_lines(cache_dir: Path) -> list[str]:
    """What is known of a run at work, or of one that was killed."""
    owner = read_lock_owner(cache_dir)
    if owner is None:
        return []
    if owner.is_stale:
        how = "not heard of since" if owner.is_alive else "killed; last heard of"
        return [f"⚠️ Stale: a run ({owner.name}) was {how} {time.ctime(owner.last_heartbeat)}"]
    lines = [f"Run at work: {owner.name}"]
    if owner.run is not None:
        lines += [owner.run.line(), printable(f"Trajectory in work: {owner.run.trajectory}")]
    return lines


def state_remarks(progress: Progress) -> list[str]:
    remarks = []
    if progress.rebuild_started is not None:
        remarks.append(f"Rebuild under way since {time.ctime(progress.rebuild_started)}: the next run goes on with it")
    if len(progress.fingerprints) > 1:
        remarks.append(
            f"⚠️ Mixed cache: its chunks were made with {len(progress.fingerprints)} different configurations"
        )
    return remarks + _other_configurations(progress)


def _other_configurations(progress: Progress) -> list[str]:
    """A line for each configuration that trajectories were made with and that is not the one in force."""
    now, lines = progress.processing_config, []
    counts = collections.Counter(record["fingerprint"] for record in progress.records.values())
    for fingerprint, count in counts.items():
        spec = progress.specs[fingerprint]
        changes = [f"{key}: {spec.get(key)}" for key in spec | now if spec.get(key) != now.get(key)]
        if changes:
            lines.append(f"  {count} trajectories were made with {', '.join(changes)}")
    return lines


def _failure_lines(failures: dict[str, Failure], show_all: bool) -> list[str]:
    if not failures:
        return []
    shown = len(failures) if show_all else SHOWN_FAILURES
    lines = ["", f"❌ Failed Trajectories ({len(failures)}):"]
    lines += [printable(f"  - {name}: {failure['reason']}") for name, failure in list(failures.items())[:shown]]
    return lines + [f"  ... and {len(failures) - shown} more"] * (len(failures) > shown)


def list_caches(root: Path, *, as_json: bool) -> int:
    """Print one line for every cache below `root`; exit code 1 where a record is unreadable."""
    if not root.is_dir():
        raise RefusedError(f"{root}: no such folder; --root takes the folder to search")
    rows = [_cache_row(cache_dir) for cache_dir in find_caches(root)]
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
    elif not rows:
        print(f"No caches below {root}")
    else:
        _print_table(rows)
    return 1 if any("error" in row for row in rows) else 0


def find_caches(root: Path) -> Iterator[Path]:
    """Folders below `root` that hold a progress.json, in order; nothing below one of them is searched."""
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        if PROGRESS_FILE in files or PROGRESS_FILE in subfolders:
            subfolders.clear()
            yield Path(folder)


def _cache_row(cache_dir: Path) -> dict[str, Any]:
    try:
        progress = load_or_refuse(cache_dir)
    except RefusedError as error:
        return {"cache_dir": str(cache_dir), "error": str(error)}
    total, owner = progress.num_trajectories, read_lock_owner(cache_dir)
    return {
        "cache_dir": str(cache_dir),
        "dataset_name": progress.dataset_name,
        "completed": len(progress.records),
        "percent": round(100 * len(progress.records) / total, 1) if total else None,
        "failed": len(progress.failures),
        "chunks": progress.total_chunks,
        "bytes": sum(sum(record["bytes"]) for record in progress.records.values()),
        "state": "idle" if owner is None else "stale" if owner.is_stale else "running",
        "last_update": progress.last_update,
    }


_TABLE_HEAD = ("Dataset", "Completed", "Done", "Failed", "Chunks", "Size", "State", "Last update", "Cache folder")
_NUMBER_COLUMNS = range(1, 6)


def _print_table(rows: list[dict[str, Any]]) -> None:
    lines = [_TABLE_HEAD, *map(_table_line, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_TABLE_HEAD))]
    for line in lines:
        cells = [
            cell.rjust(width) if column in _NUMBER_COLUMNS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ]
        print(printable("  ".join(cells).rstrip()))


def _table_line(row: dict[str, Any]) -> tuple[str, ...]:
    if "error" in row:
        return ("unreadable", *"?" * 7, row["error"])
    percent = "?" if row["percent"] is None else f"{row['percent']:.1f}%"
    counts = (str(row["completed"]), percent, str(row["failed"]), str(row["chunks"]), human_bytes(row["bytes"]))
    return (str(row["dataset_name"]), *counts, row["state"], time.ctime(row["last_update"]), row["cache_dir"])


def reset(cache_dir: Path, *, yes: bool) -> int:
    """Replace the record by an empty one, keeping the old one aside, so that the next run redoes every trajectory."""
    if not (cache_dir / PROGRESS_FILE).exists():
        raise RefusedError(f"{cache_dir}: no {PROGRESS_FILE} here, nothing to reset")
    with cache_lock(cache_dir):
        try:
            old = load_or_refuse(cache_dir)
            dataset_name = old.dataset_name
            remark = f"{len(old.records)} completed, {len(old.failures)} failed trajectories"
        except RefusedError:
            dataset_name, remark = None, "unusable"
        question = f"{cache_dir}: set the record ({remark}) aside? The next run then redoes every trajectory."
        if not yes and not ask(question, otherwise="--yes"):
            return 2
        kept = set_aside(cache_dir, "reset")
        Progress(cache_dir, dataset_name).save(keep_old=False)
    print(f"Reset {cache_dir}; the old record is {kept.name}")
    return 0


def set_aside(cache_dir: Path, why: str) -> Path:
    """Give the present record a second name, progress.json.<why>-<time>, that no older one has; returns it."""
    stem = f"{PROGRESS_FILE}.{why}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{count}" for count in itertools.count(2)))
    kept = next(cache_dir / name for name in names if not os.path.lexists(cache_dir / name))
    try:
        os.link(cache_dir / PROGRESS_FILE, kept)
    except OSError:  # no hard links here
        shutil.copyfile(cache_dir / PROGRESS_FILE, kept)
        fsync_path(kept)
    return kept


def reset_failed(cache_dir: Path) -> int:
    """Forget failures and their attempts, so that the next run tries those trajectories again."""
    load_or_refuse(cache_dir)
    with cache_lock(cache_dir):
        progress = load_or_refuse(cache_dir)  # again: a run may have ended in between
        count = len(progress.failures)
        progress.failures.clear()
        if count:
            progress.save()
    print(f"Forgot {count} failed trajectories; the next run tries them again")
    return 0


def ask(question: str, *, otherwise: str) -> bool:
    """Ask on the terminal; the default is no.

    Raises:
        RefusedError: there is no terminal to ask on; the message names the option that answers, `otherwise`.
    """
    if not sys.stdin or not sys.stdin.isatty():
        raise RefusedError(
            f"{question} There is no terminal to ask on: give {otherwise} to go ahead. Nothing was changed."
        )
    print(f"{question} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


# ======================================================================================================================
# Checking chunk files against the record, and making the record from them
# ======================================================================================================================


class Finding(NamedTuple):
    """One thing that is wrong with a cache."""

    kind: str  # missing | damaged | unrecorded | leftover
    trajectory: str | None
    path: str  # relative to the cache folder
    reason: str


def verify(cache_dir: Path, *, deep: bool, as_json: bool, repair: bool, yes: bool) -> int:
    """Check every recorded trajectory's chunk files; exit code 0 sound, 1 problems found (also when repaired)."""
    load_or_refuse(cache_dir)
    with cache_lock(cache_dir) if repair else contextlib.nullcontext():
        progress = load_or_refuse(cache_dir)
        findings = _check_recorded(progress, deep)
        if findings and not repair:
            findings = _still_true(progress, findings)
        if repair or lock_owner(cache_dir) is None:  # else a run is at work, and these are what it has in flight
            findings += [*_find_unrecorded(progress), *_find_leftovers(cache_dir)]
        mixed = len(progress.fingerprints) > 1
        if not as_json:
            _print_findings(progress, findings, deep=deep, repair=repair)
        repaired = repair and _repair(progress, findings, yes=yes)
        if as_json:
            report = {"cache_dir": str(cache_dir), "deep": deep, "sound": not findings, "mixed": mixed}
            report |= {"repaired": repaired, "findings": [finding._asdict() for finding in findings]}
            print(json.dumps(report, ensure_ascii=False))
    return 1 if findings else 0


def _check_recorded(progress: Progress, deep: bool) -> list[Finding]:
    check = functools.partial(check_trajectory, progress.cache_dir, deep=deep)
    tasks = [(name, record, progress.checksums[name]) for name, record in progress.records.items()]
    return [finding for findings in _on_all_cores(check, tasks, "Verifying") for finding in findings]


def _still_true(progress: Progress, findings: list[Finding]) -> list[Finding]:
    """Findings on trajectories that are recorded as before; a run may have redone others since the record was read."""
    now = load_or_refuse(progress.cache_dir)
    same = {
        name
        for name, record in progress.records.items()
        if now.records.get(name) == record and now.checksums[name] == progress.checksums[name]
    }
    return [finding for finding in findings if finding.trajectory in same]


def check_trajectory(cache_dir: Path, task: tuple[str, TrajectoryRecord, str], *, deep: bool) -> list[Finding]:
    """Compare one trajectory's chunk files with its record. Runs in a worker process."""
    name, record, checksum = task
    findings = []
    expected = {chunk_file_name(index): index for index in range(len(record["spans"]))}
    for file, index in expected.items():
        path = f"{name}/{file}"
        try:
            _check_chunk(cache_dir / path, name, record, checksum, index, deep=deep)
        except (FileNotFoundError, NotADirectoryError):
            findings.append(Finding("missing", name, path, "recorded, but not there"))
        except (DamagedChunkError, OSError) as problem:
            findings.append(Finding("damaged", name, path, _damage(cache_dir / path, problem)))
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for file in sorted(set(filter(is_chunk_file, os.listdir(cache_dir / name))) - expected.keys()):
            findings.append(Finding("damaged", name, f"{name}/{file}", "a chunk that the record does not know"))
    return findings


def _damage(path: Path, problem: Exception) -> str:
    """What is wrong with a chunk file. Raises RefusedError where that cannot be told."""
    if isinstance(problem, OSError) and problem.errno in CANNOT_LOOK:
        raise RefusedError(f"{path}: cannot look: {problem.strerror}. Nothing was changed") from problem
    return str(problem)


def _check_chunk(path: Path, name: str, record: TrajectoryRecord, checksum: str, index: int, *, deep: bool) -> None:
    from dino_cache import read_chunk_header

    header = read_chunk_header(path, deep=deep)
    start, stop = record["spans"][index]
    expected = {
        "trajectory": name,
        "chunk_index": index,
        "num_chunks": len(record["spans"]),
        "start": start,
        "stop": stop,
        "fingerprint": record["fingerprint"],
    }
    if header.attributes["checksum_kind"] == record["checksum_kind"]:  # else it was recorded anew with another kind
        expected["trajectory_checksum"] = checksum
    for key, value in expected.items():
        if header.attributes[key] != value:
            raise DamagedChunkError(f"its {key} is {header.attributes[key]!r}, recorded is {value!r}")
    if header.num_bytes != record["bytes"][index]:
        raise DamagedChunkError(f"it has {header.num_bytes} bytes, recorded are {record['bytes'][index]}")


def _find_unrecorded(progress: Progress) -> list[Finding]:
    return [
        Finding("unrecorded", name, name, "chunk files that are not in the record")
        for name in chunk_folders(progress.cache_dir)
        if name not in progress.records
    ]


def _find_leftovers(cache_dir: Path) -> list[Finding]:
    staging = cache_dir / STAGING_FOLDER
    paths = [cache_dir / name for name in TEMPORARY_FILES if os.path.lexists(cache_dir / name)]
    if staging.is_symlink():
        paths.append(staging)  # what it points to is not ours
    elif staging.is_dir():
        paths += sorted(staging.iterdir())
    return [
        Finding("leftover", None, path.relative_to(cache_dir).as_posix(), "left by an interrupted run")
        for path in paths
    ]


def _print_findings(progress: Progress, findings: list[Finding], *, deep: bool, repair: bool) -> None:
    how = "every byte read" if deep else "names, sizes, shapes and attributes; --deep reads every byte"
    print(
        f"Verified {progress.cache_dir}: {len(progress.records)} trajectories, {progress.total_chunks} chunks ({how})"
    )
    holder = lock_owner(progress.cache_dir)
    if holder and not repair:
        print(f"Note: a run is at work ({holder}); unrecorded and leftover files are not looked for")
    if len(progress.fingerprints) > 1:
        print(f"Note: mixed cache: made with {len(progress.fingerprints)} different configurations")
    for finding in findings:
        print(printable(f"  {finding.kind}: {finding.path}: {finding.reason}"))
    if not findings:
        print("Sound")
    elif any(finding.kind == "unrecorded" for finding in findings):
        print(
            "Unrecorded chunks are redone by the next run if their data is there; where the record was lost, `rebuild`"
        )
        print("takes those that are intact into a new one")


def _repair(progress: Progress, findings: list[Finding], *, yes: bool) -> bool:
    """Forget damaged trajectories, then remove leftovers; the next run does the rest. Says whether it did."""
    damaged = sorted({finding.trajectory for finding in findings if finding.kind in ("missing", "damaged")})
    leftovers = [progress.cache_dir / finding.path for finding in findings if finding.kind == "leftover"]
    if not damaged and not leftovers:
        return False
    question = (
        f"Forget {len(damaged)} trajectories, so that the next run redoes them, and remove {len(leftovers)} leftovers?"
    )
    if not yes and not ask(question, otherwise="--yes"):
        return False
    for name in damaged:
        progress.forget(name)
    if damaged:
        progress.save()
    for path in leftovers:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    print(f"Forgot {len(damaged)} trajectories, removed {len(leftovers)} leftovers", file=sys.stderr)
    if damaged:
        print("The next run of dino_cache.py redoes what was forgotten", file=sys.stderr)
    return True


def rebuild(cache_dir: Path, *, yes: bool) -> int:
    """Make progress.json anew from the chunk files; exit code 1 where some could not be taken into it."""
    if not cache_dir.is_dir():
        raise RefusedError(f"{cache_dir}: no such folder; --cache-dir takes the folder that holds the chunks")
    with cache_lock(cache_dir):
        old = _readable_record(cache_dir)
        names = list(chunk_folders(cache_dir))
        outcomes = _on_all_cores(functools.partial(read_trajectory, cache_dir), names, "Reading chunks")
        found = [outcome for outcome in outcomes if isinstance(outcome, FoundTrajectory)]
        problems = [outcome for outcome in outcomes if isinstance(outcome, Finding)]
        for problem in problems:
            print(f"  left out: {problem.path}: {problem.reason}", file=sys.stderr)
        if not found:
            raise RefusedError(f"{cache_dir}: no complete trajectory here to make a record from")
        progress = _progress_from(cache_dir, found)
        if old is not None:
            for key in ("elapsed_s", *_LATER_KEYS):
                setattr(progress, key, getattr(old, key))
            progress.failures = {name: old.failures[name] for name in old.failures.keys() - progress.records.keys()}
        if len(progress.fingerprints) > 1:
            print(f"Mixed cache: made with {len(progress.fingerprints)} different configurations", file=sys.stderr)
        path = cache_dir / PROGRESS_FILE
        question = f"{cache_dir}: record {len(found)} trajectories, {progress.total_chunks} chunks?"
        if path.exists():
            question += " The present record is set aside."
        if not yes and not ask(question, otherwise="--yes"):
            return 2
        if path.exists():
            set_aside(cache_dir, "rebuild")
        _make_entries_durable(cache_dir, progress.records)
        progress.save(keep_old=False)
    print(f"Rebuilt {path}: {len(found)} trajectories, {progress.total_chunks} chunks")
    return 1 if problems else 0


def _readable_record(cache_dir: Path) -> Progress | None:
    """The record that is to be replaced, where it can be read.

    Raises:
        RefusedError: it says that a force_rebuild is under way; chunks still to be redone would be taken for finished.
    """
    try:
        progress = Progress.load(cache_dir)
    except RefusedError:
        return None
    if progress is not None and progress.rebuild_started is not None:
        raise RefusedError(
            f"{cache_dir}: its {PROGRESS_FILE} is sound, and a force_rebuild is under way: the next run goes on with "
            "it. To keep the chunks as they are instead, move the file away and give this command again"
        )
    return progress


def _make_entries_durable(cache_dir: Path, names: Iterable[str]) -> None:
    """Force the entries of trajectories' folders to the disk: the run that made them may have died in between."""
    for folder in {parent for name in names for parent in Path(name).parents}:
        fsync_path(cache_dir / folder)


class FoundTrajectory(NamedTuple):
    """A trajectory whose chunk files are all there and intact."""

    name: str
    record: TrajectoryRecord
    attributes: dict[str, Any]  # of its latest chunk
    first_created_at: str


def read_trajectory(cache_dir: Path, name: str) -> FoundTrajectory | Finding:
    """Read every byte of one trajectory's chunks. Runs in a worker process."""
    from dino_cache import read_chunk_header

    files = list(filter(is_chunk_file, os.listdir(cache_dir / name)))
    expected = [chunk_file_name(index) for index in range(len(files))]
    if set(files) != set(expected):
        return Finding("missing", name, name, f"its chunks are not numbered from 0 on: {', '.join(sorted(files)[:10])}")
    headers = []
    for file in expected:
        try:
            headers.append(read_chunk_header(cache_dir / name / file, deep=True))
        except (DamagedChunkError, OSError) as error:
            return Finding("damaged", name, f"{name}/{file}", _damage(cache_dir / name / file, error))
    chunks = [header.attributes for header in headers]
    shared = ("dataset_name", "trajectory", "num_chunks", "fingerprint", "trajectory_checksum", "checksum_kind")
    if any(attributes[key] != chunks[0][key] for attributes in chunks for key in shared):
        return Finding("damaged", name, name, "its chunks are of different trajectories or configurations")
    if chunks[0]["trajectory"] != name:
        return Finding("damaged", name, name, f"its chunks are of trajectory {chunks[0]['trajectory']!r}")
    if [attributes["chunk_index"] for attributes in chunks] != list(range(chunks[0]["num_chunks"])):
        return Finding("missing", name, name, f"has {len(chunks)} of {chunks[0]['num_chunks']} chunks, or out of order")
    record: TrajectoryRecord = {
        "fingerprint": chunks[0]["fingerprint"],
        "spans": [[attributes["start"], attributes["stop"]] for attributes in chunks],
        "bytes": [header.num_bytes for header in headers],
        "checksum_kind": chunks[0]["checksum_kind"],
    }
    latest = max(chunks, key=lambda attributes: attributes["created_at"])
    return FoundTrajectory(name, record, latest, min(attributes["created_at"] for attributes in chunks))


def _progress_from(cache_dir: Path, found: list[FoundTrajectory]) -> Progress:
    """A record of the trajectories found; the configuration in force is that of the most recent chunk."""
    from dino_cache import CacheSpec, weights_source

    latest = max(found, key=lambda trajectory: trajectory.attributes["created_at"]).attributes
    progress = Progress(cache_dir, latest["dataset_name"])
    first = min(trajectory.first_created_at for trajectory in found)
    progress.start_time = float(calendar.timegm(time.strptime(first, "%Y-%m-%dT%H:%M:%SZ")))
    progress.processing_config = json.loads(latest["spec"])
    try:
        spec = CacheSpec.model_validate(progress.processing_config)
    except ValueError as error:
        raise RefusedError(
            f"{cache_dir}: its latest chunk was made with a configuration that this program does not know; update the "
            f"program. Nothing was changed. {error}"
        ) from error
    unknown = {"source": spec.weights, "size": None, "mtime": None}  # a file may have changed since
    source = weights_source(spec) if spec.weights in ("random", "pretrained") else unknown
    progress.weights = {**source, "digest": latest["weights_digest"]}
    progress.checksum_kind = latest["checksum_kind"]
    for trajectory in sorted(found, key=lambda trajectory: (trajectory.first_created_at, trajectory.name)):
        attributes = trajectory.attributes
        progress.specs[attributes["fingerprint"]] = json.loads(attributes["spec"])
        progress.complete(trajectory.name, attributes["trajectory_checksum"], trajectory.record)
    return progress


def _with_bar(tasks: list[Any], title: str, unit: str = " chunks") -> Iterable[Any]:
    """The tasks, with a progress bar on a terminal."""
    from tqdm import tqdm

    return tqdm(tasks, desc=title, unit=unit, disable=not sys.stderr.isatty())


def _on_all_cores(function: Callable[[Any], Any], tasks: list[Any], title: str) -> list[Any]:
    """`function` of each task, in order, in worker processes, with a progress bar on a terminal."""
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    from tqdm import tqdm

    bar = functools.partial(tqdm, total=len(tasks), desc=title, unit=" trajectories", disable=not sys.stderr.isatty())
    workers = min(available_cores(), len(tasks))
    if workers <= 1:
        return list(bar(map(function, tasks)))
    try:
        with ProcessPoolExecutor(workers, initializer=_end_with_parent) as pool:
            return list(bar(pool.map(function, tasks, chunksize=max(1, min(64, len(tasks) // (4 * workers))))))
    except BrokenProcessPool as error:
        raise RefusedError("a worker process was killed, for want of memory perhaps; nothing was changed") from error


def _end_with_parent() -> None:
    """Of a worker process: it would otherwise wait for work for ever when its parent is killed."""
    import multiprocessing

    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ======================================================================================================================
# Exporting a cache to what other training code reads
# ======================================================================================================================

FLAT_DESCRIPTION = (
    "flat: one HDF5 file in stable-worldmodel's dialect. Every dataset but ep_len and ep_offset is a column, one row "
    "a frame, one episode after the other. An episode is a piece of a trajectory that was stored without a gap: it "
    "ends where a pose jump cut the trajectory. A frame that lies in two chunks appears once. Poses that no trajectory "
    "has (chunk_by: frames) are no columns; where only some have them, the others' rows are NaN."
)
VINT_DESCRIPTION = (
    "vint: a folder with one .pt file a chunk (features (L, D) float16: the CLS tokens; positions, yaws, indices) and "
    "cache_metadata.json, as visualnav-transformer's feature cache has them. Chunks overlap as in the cache. "
    "Refused where a trajectory has no poses."
)
VINT_METADATA = "cache_metadata.json"
EXPORT_BLOCK_BYTES = 1 << 24  # read and written at a time
LONGEST_CHUNK_ID = 200  # bytes, so that a file can have it as its name


def export(
    cache_dir: Path, *, layout: str, output: Path, tokens: list[str] | None, allow_mixed: bool, force: bool
) -> int:
    """Write what is recorded in another layout; the output appears under its name when it is complete.

    Raises:
        RefusedError: the cache is empty, mixed without `allow_mixed`, or a chunk file is not as recorded; or the output
            exists without `force`, or is something that no export made.
    """
    progress = load_or_refuse(cache_dir)
    _refuse_unexportable(progress, allow_mixed)
    output = Path(os.path.abspath(output))
    if output.is_relative_to(os.path.abspath(cache_dir)):
        raise RefusedError(f"-o {output}: lies inside the cache; an export belongs beside it")
    if not output.parent.is_dir():
        raise RefusedError(f"-o {output}: there is no folder {output.parent}")
    if layout == "flat":
        done = _export_flat(progress, output, _exported_datasets(progress, tokens), force=force)
    else:
        if tokens not in (None, ["cls"]):
            raise RefusedError("--tokens: the vint layout holds one vector a frame, the CLS token")
        done = _export_vint(progress, output, _exported_datasets(progress, ["cls"])[0], force=force)
    print(f"Exported {len(progress.records)} trajectories: {done} -> {output}")
    return 0


def _refuse_unexportable(progress: Progress, allow_mixed: bool) -> None:
    if not progress.records:
        raise RefusedError(f"{progress.cache_dir}: no trajectory is completed, there is nothing to export")
    if len(progress.fingerprints) > 1 and not allow_mixed:
        raise RefusedError(
            f"{progress.cache_dir}: is mixed: made with {len(progress.fingerprints)} different configurations (`show` "
            "says which). Give --allow-mixed to export it all the same, or redo it with --force-rebuild"
        )


def _exported_datasets(progress: Progress, tokens: list[str] | None) -> list[str]:
    """Names of the token datasets to export: those asked for, else those that every chunk has."""
    from dino_cache import TOKEN_DATASETS

    specs = [progress.specs[fingerprint] for fingerprint in progress.fingerprints]
    common = [token for token in TOKEN_DATASETS if all(token in spec.get("tokens", ()) for spec in specs)]
    for token in tokens or common:
        if token not in common:
            raise RefusedError(
                f"{progress.cache_dir}: has no {token} tokens, or not in all chunks; it has {', '.join(common)}"
            )
    return [TOKEN_DATASETS[token] for token in TOKEN_DATASETS if token in (tokens or common)]


@contextlib.contextmanager
def recorded_chunk(progress: Progress, name: str, index: int, *, deep: bool) -> Iterator[Any]:
    """A recorded chunk file, open for reading once it proved to be what was recorded; with `deep`, every byte of it.

    Raises:
        RefusedError: it is missing or damaged, or a run replaced it since the record was read.
    """
    import h5py

    path = progress.cache_dir / name / chunk_file_name(index)
    try:
        _check_chunk(path, name, progress.records[name], progress.checksums[name], index, deep=deep)
        file = h5py.File(path, locking=False)
    except (DamagedChunkError, OSError) as error:
        raise RefusedError(
            f"{path}: {error}. If a run has just replaced it, give the command again; else `progress_utils.py verify "
            f"--cache-dir {progress.cache_dir} --deep --repair` and a run mend it"
        ) from error
    with file:
        yield file


class NewRows(NamedTuple):
    """Rows [start, stop) of a chunk, those that no chunk before it has."""

    index: int  # of the chunk
    start: int
    stop: int


def is_cut_by_frames(spec: dict[str, Any]) -> bool:
    """Whether chunks of this spec were cut by their number of frames: without distances, and at no pose jump."""
    return spec.get("chunk_by") == "frames"


def episodes(progress: Progress, name: str) -> list[list[NewRows]]:
    """A trajectory's pieces without a gap, each frame once: chunks cut by distance overlap, unless there is a gap."""
    record = progress.records[name]
    has_gaps = not is_cut_by_frames(progress.specs[record["fingerprint"]])
    pieces, done = [], -1
    for index, (start, stop) in enumerate(record["spans"]):
        if not pieces or (has_gaps and start >= done):
            pieces.append([])
        pieces[-1].append(NewRows(index, max(0, done - start), stop - start))
        done = stop
    return pieces


def _export_flat(progress: Progress, output: Path, token_datasets: list[str], *, force: bool) -> str:
    """Write the flat file; returns what it holds, in words."""
    from dino_cache import ChunkFile

    if output.is_dir() or (output.exists() and not force):
        raise RefusedError(f"-o {output}: exists; --force replaces a file")
    found = [(name, episode) for name in progress.records for episode in episodes(progress, name)]
    temporary = output.with_name(output.name + ".partial")
    try:
        temporary.unlink(missing_ok=True)
        with ChunkFile(temporary, "x+") as raw:
            _write_flat(progress, raw, found, token_datasets, output.parent)
            raw.check()
            os.fsync(raw.fileno())
        os.replace(temporary, output)
        fsync_path(output.parent)
    finally:
        temporary.unlink(missing_ok=True)
    frames = sum(rows.stop - rows.start for _, episode in found for rows in episode)
    return f"{len(found)} episodes, {frames} frames, {human_bytes(output.stat().st_size)}"


def _write_flat(
    progress: Progress, raw: Any, found: list[tuple[str, list[NewRows]]], token_datasets: list[str], folder: Path
) -> None:
    """Fill an empty file with the episodes found, block by block."""
    import h5py

    lengths = [sum(rows.stop - rows.start for rows in episode) for _, episode in found]
    parts = [(name, rows) for name, episode in found for rows in episode]
    with h5py.File(raw, "w", libver="v110") as file:  # attributes may exceed 64 kB then
        columns = _make_columns(progress, file, token_datasets, sum(lengths), folder)
        _write_episodes(progress, file, [name for name, _ in found], lengths)
        position, told = 0, set()
        for name, rows in _with_bar(parts, "Exporting"):
            with recorded_chunk(progress, name, rows.index, deep=True) as chunk:
                told |= _copy_rows(chunk, rows, columns, position)
            raw.check()
            position += rows.stop - rows.start
        for name in columns.keys() - told:
            del file[name]  # nothing was written to it, so that it takes no space


def _make_columns(
    progress: Progress, file: Any, token_datasets: list[str], num_frames: int, folder: Path
) -> dict[str, Any]:
    """An empty column for each dataset that a chunk can have; RefusedError where the disk cannot hold them."""
    import numpy as np

    from dino_cache import POSE_SHAPES, POSE_TYPES, free_bytes

    rows = {name: (shape, np.dtype(POSE_TYPES[name])) for name, shape in POSE_SHAPES.items()}
    if all(map(is_cut_by_frames, progress.specs.values())):
        del rows["travelled_distance"]
    with recorded_chunk(progress, next(iter(progress.records)), 0, deep=False) as chunk:
        rows |= {name: (chunk[name].shape[1:], chunk[name].dtype) for name in token_datasets}
    needed = num_frames * sum(math.prod(shape) * dtype.itemsize for shape, dtype in rows.values())
    if needed > (free := free_bytes(folder)):
        raise RefusedError(f"{folder}: the export takes {human_bytes(needed)} and {human_bytes(free)} are free")
    return {
        name: file.create_dataset(name, (num_frames, *shape), dtype, fillvalue=math.nan if dtype.kind == "f" else None)
        for name, (shape, dtype) in rows.items()
    }


def _write_episodes(progress: Progress, file: Any, names: list[str], lengths: list[int]) -> None:
    """Where each episode begins and ends, as datasets and as columns; where it is from, as attributes."""
    import h5py
    import numpy as np

    lengths = np.array(lengths, np.int64)
    file["ep_len"] = lengths
    file["ep_offset"] = offsets = np.cumsum(lengths) - lengths
    file["ep_idx"] = np.repeat(np.arange(len(lengths)), lengths)
    file["step_idx"] = np.arange(lengths.sum()) - np.repeat(offsets, lengths)
    file.attrs["ep_trajectory"] = np.array(names, h5py.string_dtype())
    file.attrs["dataset_name"] = str(progress.dataset_name)
    file.attrs["specs"] = json.dumps(progress.specs)
    file.attrs["weights"] = json.dumps(progress.weights)


def _copy_rows(chunk: Any, rows: NewRows, columns: dict[str, Any], position: int) -> set[str]:
    """Copy a chunk's rows into the columns from `position` on; returns the columns that it has."""
    there = {name: column for name, column in columns.items() if name in chunk}
    for name, column in there.items():
        dataset = chunk[name]
        if dataset.shape[1:] != column.shape[1:]:
            raise RefusedError(
                f"{chunk.filename}: {name} has rows of shape {dataset.shape[1:]}, those before have "
                f"{column.shape[1:]}: one column cannot hold both. Choose other --tokens, or redo the cache"
            )
        block = max(1, EXPORT_BLOCK_BYTES // max(1, math.prod(column.shape[1:]) * column.dtype.itemsize))
        for start in range(rows.start, rows.stop, block):
            stop = min(start + block, rows.stop)
            target = position + start - rows.start
            column[target : target + stop - start] = dataset[start:stop]
    return set(there)


def _export_vint(progress: Progress, output: Path, token_dataset: str, *, force: bool) -> str:
    """Write the folder of .pt files; returns what it holds, in words."""
    _refuse_foreign_folder(output, force)
    temporary = output.with_name(output.name + ".partial")
    _refuse_foreign_folder(temporary, True)
    shutil.rmtree(temporary, ignore_errors=True)  # of an export that was killed
    temporary.mkdir()
    try:
        chunk_ids, width = _write_vint_chunks(progress, temporary, token_dataset)
        spec = progress.processing_config
        settings = {key: None if is_cut_by_frames(spec) else spec.get(key) for key in _VINT_SETTINGS}
        metadata = {"name": progress.dataset_name, **settings, "feature_dim": width, "cache_path": output.name}
        write_durably(temporary / VINT_METADATA, json.dumps({**metadata, "chunks": chunk_ids}, indent=2).encode())
        shutil.rmtree(output, ignore_errors=True)
        os.rename(temporary, output)
        fsync_path(output.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return f"{len(chunk_ids)} chunks, features of width {width}"


_VINT_SETTINGS = ("max_chunk_distance_m", "overlap_distance_m", "min_chunk_distance_m")


def _refuse_foreign_folder(folder: Path, force: bool) -> None:
    """Raise RefusedError unless the place is free, or an earlier export that may be replaced."""
    if not os.path.lexists(folder):
        return
    if not folder.is_dir() or folder.is_symlink():
        raise RefusedError(f"-o {folder}: is not a folder")
    names = os.listdir(folder)
    foreign = [name for name in names if not name.startswith(VINT_METADATA) and not name.endswith(".pt")]
    if foreign:
        raise RefusedError(f"-o {folder}: holds {min(foreign)}, which no export made; give another folder")
    if names and not force:
        raise RefusedError(f"-o {folder}: exists; --force replaces an earlier export")


def _write_vint_chunks(progress: Progress, folder: Path, token_dataset: str) -> tuple[list[str], int]:
    """Write a .pt file for each chunk; returns the chunks' ids and the width of their features."""
    import torch

    flat_names, chunk_ids, widths = _flat_names(progress.records), [], set()
    chunks = [(name, index) for name, record in progress.records.items() for index in range(len(record["spans"]))]
    for name, index in _with_bar(chunks, "Exporting"):
        with recorded_chunk(progress, name, index, deep=True) as chunk:
            if not {"position", "yaw"} <= set(chunk):
                raise RefusedError(
                    f"{chunk.filename}: has no position or no yaw (chunk_by: frames), and the vint layout holds both; "
                    "--to flat does without"
                )
            content = {
                "features": torch.from_numpy(chunk[token_dataset][...]),  # (L, D) float16
                "positions": chunk["position"][...].tolist(),  # L times [x, y] [m]
                "yaws": chunk["yaw"][...].tolist(),  # L numbers [rad]
                "indices": chunk["frame_index"][...].tolist(),  # L rows of the source's poses
            }
        widths.add(content["features"].shape[1])
        if len(widths) > 1:
            raise RefusedError(f"{progress.cache_dir}: its features are of widths {sorted(widths)}; redo the cache")
        chunk_ids.append(f"{flat_names[name]}_{progress.records[name]['spans'][index][0]:05d}")
        data = io.BytesIO()
        torch.save(content, data)  # into memory: for a full disk it has an error of its own
        (folder / f"{chunk_ids[-1]}.pt").write_bytes(data.getbuffer())
        fsync_path(folder / f"{chunk_ids[-1]}.pt")
    return chunk_ids, widths.pop()


def _flat_names(names: Iterable[str]) -> dict[str, str]:
    """Trajectory name -> one that can be a file's: without `/`, not too long, and that no other one has."""
    flat: dict[str, str] = {}
    taken: set[str] = set()
    for name in names:
        candidate = name.replace("/", "__")
        if candidate.casefold() in taken or len(candidate.encode()) > LONGEST_CHUNK_ID:
            short = candidate.encode()[: LONGEST_CHUNK_ID - 10].decode(errors="ignore")
            candidate = f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        taken.add(candidate.casefold())
        flat[name] = candidate
    return flat


# ======================================================================================================================
# Reporting: one HTML file to look at in the morning
# ======================================================================================================================
# Counts are of the whole record; what must be read from chunk files is read from a seeded sample of them, so that a
# report takes seconds whatever the cache's size. numpy and matplotlib are imported in the functions that need them.

REPORT_SEED = 0
REPORT_CHUNKS = 300  # looked into for time and distance
REPORT_TRAJECTORIES = 12  # shown with their map and similarity
REPORT_CHUNKS_OF_ONE = 100  # of one trajectory, from its beginning
REPORT_POINTS = 400  # of one trajectory's similarity
REPORT_PICTURES = 6  # frames shown with their patch tokens
REPORT_FRAME_FILE_BYTES = 2 << 30  # of a trajectory's own file: a video's frame times are read from all of it
REPORT_REMARKS = 4  # on one trajectory
REPORT_NAMES = 20  # of failed trajectories with one cause
NIGHT_GAP_S = 1800.0  # so long without a chunk: another night
FROZEN_FRAMES = 5  # in a row with equal features, though the robot moves
SHUFFLED_LEAST = 20  # frames; fewer say nothing
SHUFFLED_RATIO = 0.75  # of how far neighbours are apart to how far any two frames are
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"  # Okabe, Ito
CHUNK_COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY)
INK = "#010203"  # stands for the text's colour, light or dark, in figures


def report(cache_dir: Path, *, output: Path, data_folder: Path | None) -> int:
    """Write the report; `data_folder` is where the frames are, if not where the last run read them."""
    progress = load_or_refuse(cache_dir)
    _require_matplotlib()
    if output.is_dir():
        raise RefusedError(f"-o {output}: is a folder; give the name of a file")
    look = _Look(progress, data_folder or (Path(progress.data_folder) if progress.data_folder else None))
    sections = [
        _summary_section(look),
        _failures_section(progress.failures),
        _figures_section(look),
        _trajectories_section(look),
        _pictures_section(look),
        _configuration_section(look),
    ]
    page = _page(f"{progress.dataset_name}: dino_cache report", _problems_section(look) + "".join(sections))
    write_durably(output, page.encode(errors="replace"))
    print(f"Wrote {output} ({human_bytes(output.stat().st_size)})")
    return 0


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RefusedError(f"report needs matplotlib: pip install -r requirements-report.txt ({error})") from error


class ChunkFacts(NamedTuple):
    """What a report needs of a sampled chunk."""

    num_frames: int
    distance_m: float | None  # None where chunks were cut by number of frames
    created_at: float  # epoch seconds
    new_frames: int  # of it and of the chunks since the one sampled before, in the order of completion
    versions: str


class TrajectoryLook(NamedTuple):
    """What a report shows of a sampled trajectory: n frames of those looked into."""

    name: str
    paths: list[Any]  # per chunk (L, 2) [m]; none where there are no positions
    jumps: list[int]  # numbers of the chunks before which the pose jumps
    jump_frames: list[int]
    frame_index: Any  # (n,)
    to_first: Any  # (n,) cosine similarity with the first frame
    to_next: Any  # (n,) with the frame after it
    chunks_seen: int
    num_chunks: int  # in all
    remarks: list[str]


class _Look:
    """The record, and what was read of a sample of its chunk files. A file that is not as recorded is left out."""

    def __init__(self, progress: Progress, data_folder: Path | None):
        self.progress, self.data_folder = progress, data_folder
        self.random = random.Random(REPORT_SEED)
        self.problems: dict[str, None] = {}
        self.num_frames = {
            name: sum(rows.stop - rows.start for episode in episodes(progress, name) for rows in episode)
            for name in progress.records
        }
        self.facts = self._sampled_facts()
        self.night = self._last_night()
        names = list(progress.records)
        chosen = names if len(names) <= REPORT_TRAJECTORIES else self.random.sample(names, REPORT_TRAJECTORIES)
        looks = [self._tried(_look_at_trajectory, progress, name) for name in sorted(chosen)]
        self.trajectories = [look for look in looks if look is not None]

    def _tried(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RefusedError as error:
            self.problems[str(error)] = None
            return None

    def _sampled_facts(self, after: float = 0.0) -> list[ChunkFacts]:
        """Facts of evenly spaced chunks of trajectories completed since `after` [epoch s], about; in order of time."""
        progress = self.progress
        rows = [(name, new) for name in progress.records for episode in episodes(progress, name) for new in episode]
        if after:
            rows = rows[self._first_chunk_after(rows, after) :]
        step = max(1, math.ceil(len(rows) / REPORT_CHUNKS))
        facts = []
        for last in range(step - 1, len(rows), step):
            name, new = rows[last]
            count = sum(part.stop - part.start for _, part in rows[last - step + 1 : last + 1])
            facts.append(self._tried(_chunk_facts, self.progress, name, new.index, count))
        return sorted((fact for fact in facts if fact is not None), key=lambda fact: fact.created_at)

    def _first_chunk_after(self, rows: list[tuple[str, NewRows]], after: float) -> int:
        """Where, in the order of completion, chunks are younger; by bisection, a redone one may be out of order."""

        def is_older(row: tuple[str, NewRows]) -> bool:
            fact = self._tried(_chunk_facts, self.progress, row[0], row[1].index, 0)
            return fact is not None and fact.created_at < after

        return bisect.bisect_left(rows, True, key=lambda row: not is_older(row))

    def _last_night(self) -> list[ChunkFacts]:
        """Facts of chunks since the last long gap."""
        times = [fact.created_at for fact in self.facts]
        gaps = [later - earlier for earlier, later in zip(times, times[1:])]
        long = max(NIGHT_GAP_S, 20 * sorted(gaps)[len(gaps) // 2]) if gaps else NIGHT_GAP_S
        begins = [time_ for time_, gap in zip(times[1:], gaps) if gap > long]
        if not begins:
            return self.facts
        return [fact for fact in self._sampled_facts(begins[-1]) if fact.created_at >= begins[-1]]


def _chunk_facts(progress: Progress, name: str, index: int, new_frames: int) -> ChunkFacts:
    with recorded_chunk(progress, name, index, deep=False) as chunk:
        travelled = chunk.get("travelled_distance")
        created_at = calendar.timegm(time.strptime(chunk.attrs["created_at"], "%Y-%m-%dT%H:%M:%SZ"))
        distance_m = None if travelled is None else float(travelled[-1] - travelled[0])
        return ChunkFacts(len(chunk["frame_index"]), distance_m, created_at, new_frames, chunk.attrs["versions"])


def _look_at_trajectory(progress: Progress, name: str) -> TrajectoryLook:
    """Read positions and, of evenly spaced frames, features of a trajectory's first chunks."""
    import numpy as np

    record = progress.records[name]
    pieces = episodes(progress, name)
    parts = [rows for episode in pieces for rows in episode][:REPORT_CHUNKS_OF_ONE]
    jumps = [episode[0].index for episode in pieces[1:] if episode[0].index < len(parts)]
    paths, rows, pairs, steps, jump_frames = [], [], [], [], []
    for new in parts:
        with recorded_chunk(progress, name, new.index, deep=False) as chunk:
            index = chunk["frame_index"][...]
            if "position" in chunk:
                paths.append(chunk["position"][...])
            if new.index in jumps:
                jump_frames.append(int(index[0]))
            wanted = np.arange(max(0, new.start - 1), len(index) - 1, max(1, len(parts) * len(index) // REPORT_POINTS))
            pairs += [_feature_pair(chunk, row) for row in wanted]
            rows += index[np.stack([wanted, wanted + 1], axis=1)].tolist()
            if paths:
                steps += np.linalg.norm(paths[-1][wanted + 1] - paths[-1][wanted], axis=1).tolist()
    pairs = np.stack(pairs) if pairs else np.zeros((0, 2, 1), np.float32)
    unit = pairs / np.maximum(np.linalg.norm(pairs, axis=2, keepdims=True), 1e-12)  # (n, 2, D)
    to_next = (unit[:, 0] * unit[:, 1]).sum(1)
    rows = np.array(rows, int).reshape(-1, 2)
    remarks = _camera_remarks(unit[:, 0], to_next, np.array(steps) if paths else np.zeros(len(rows)), rows)
    to_first = unit[:, 0] @ unit[0, 0] if len(rows) else to_next
    counts = (len(parts), len(record["spans"]), remarks)
    return TrajectoryLook(name, paths, jumps, jump_frames, rows[:, 0], to_first, to_next, *counts)


def _feature_pair(chunk: Any, row: int) -> Any:
    """(2, D): a frame's vector and the next one's: the CLS token, else the mean of the tokens that there are."""
    name = next(name for name in ("cls_token", "patch_tokens", "register_tokens") if name in chunk)
    tokens = chunk[name][row : row + 2].astype("float32")
    return tokens.reshape(2, -1, tokens.shape[-1]).mean(1)


def _camera_remarks(unit: Any, to_next: Any, steps_m: Any, rows: Any) -> list[str]:
    """What looks wrong about a camera, of n frames that were looked into.

    `unit` (n, D) are unit vectors; `to_next` (n,) similarities with, `steps_m` (n,) steps to the frame after it; `rows`
    (n, 2) the numbers of both.
    """
    import numpy as np

    remarks = []
    frozen = (to_next > 1 - 1e-6) & (steps_m > 1e-3)
    for is_frozen, group in itertools.groupby(range(len(frozen)), frozen.__getitem__):
        numbers = list(group)
        if is_frozen and len(numbers) + 1 >= FROZEN_FRAMES:
            first, last = rows[numbers[0], 0], rows[numbers[-1], 1]
            remarks.append(f"frozen camera? frames {first} to {last} are alike though the robot moves")
    if len(unit) >= SHUFFLED_LEAST:
        apart = np.sqrt(np.maximum(0, 1 - unit @ unit.T))[~np.eye(len(unit), dtype=bool)].mean()
        next_apart = np.sqrt(np.maximum(0, 1 - to_next)).mean()
        if next_apart > SHUFFLED_RATIO * apart and apart > 1e-3:
            remarks.append("frames out of order? neighbours are hardly more alike than any two frames")
    return remarks


def _summary_section(look: _Look) -> str:
    progress = look.progress
    owner = read_lock_owner(progress.cache_dir)
    state = "idle" if owner is None else "stale" if owner.is_stale else "running"
    total = progress.num_trajectories
    share = f"of {total:,} ({100 * len(progress.records) / total:.1f}%)" if total else "of unknown"
    size = sum(sum(record["bytes"]) for record in progress.records.values())
    rate = _night_rate(look.night)
    tiles = [
        ("completed trajectories", f"{len(progress.records):,}", share),
        ("failed trajectories", f"{len(progress.failures):,}", "see below" if progress.failures else "none"),
        ("frames", f"{sum(look.num_frames.values()):,}", "each counted once"),
        ("chunks", f"{progress.total_chunks:,}", human_bytes(size)),
        ("pose jumps", *_jumps_tile(progress)),
        ("rate", f"{rate:.1f} frames/s" if rate else "?", "mean of the last night"),
        ("time left", _time_left(look, owner, rate), state),
        ("working time", f"{progress.elapsed_s / 3600:.1f} h", "of all runs"),
    ]
    cards = "".join(f"<div class=tile><b>{_text(value)}</b>{_text(name)}<i>{_text(more)}</i></div>"
                    for name, value, more in tiles)  # fmt: skip
    remarks = "".join(f"<p class=warn>{_text(remark)}</p>" for remark in _report_remarks(progress))
    where = f"<p><code>{_text(progress.cache_dir)}</code>, last saved {_text(time.ctime(progress.last_update))}</p>"
    return f"<h1>{_text(progress.dataset_name)}</h1>{where}{remarks}<div class=tiles>{cards}</div>"


def _jumps_tile(progress: Progress) -> tuple[str, str]:
    if progress.records and all(is_cut_by_frames(progress.specs[fingerprint]) for fingerprint in progress.fingerprints):
        return "?", "not looked for: chunk_by: frames"
    jumps = sum(len(episodes(progress, name)) > 1 for name in progress.records)
    return f"{jumps:,}", "trajectories with one or more"


def _report_remarks(progress: Progress) -> list[str]:
    remarks = state_remarks(progress)
    if str((progress.weights or {}).get("source", "")).startswith("random"):
        remarks.append("The weights are random: the features, their similarities and their colours mean nothing")
    return remarks


def _night_rate(night: list[ChunkFacts]) -> float | None:
    """Frames/s, over the time from the first chunk to the last."""
    if len(night) < 2 or night[-1].created_at <= night[0].created_at:
        return None
    return sum(fact.new_frames for fact in night[1:]) / (night[-1].created_at - night[0].created_at)


def _time_left(look: _Look, owner: LockOwner | None, rate: float | None) -> str:
    progress, total = look.progress, look.progress.num_trajectories
    if owner is not None and not owner.is_stale and owner.run is not None and owner.run.frames_per_s > 0:
        return human_duration(owner.run.frames_left / owner.run.frames_per_s)
    left = (total or 0) - len(progress.records) - len(progress.failures)
    if total is not None and left <= 0:
        return "none"
    if not rate or total is None:
        return "?"
    return human_duration(left * sum(look.num_frames.values()) / len(progress.records) / rate)


def _problems_section(look: _Look) -> str:
    problems = list(look.problems)
    items = "".join(f"<li>{_text(problem)}</li>" for problem in problems[:REPORT_NAMES])
    more = f"<p>... and {len(problems) - REPORT_NAMES} more</p>" if len(problems) > REPORT_NAMES else ""
    title = f"<p class=warn>{len(problems)} of the chunk files looked into are not as recorded</p>"
    return f"{title}<ul>{items}</ul>{more}" if problems else ""


def failure_causes(failures: dict[str, Failure]) -> dict[str, list[tuple[str, Failure]]]:
    """Failures by cause, the most frequent first: reasons that differ in names and numbers alone are one cause."""
    causes: dict[str, list[tuple[str, Failure]]] = {}
    for name, failure in failures.items():
        causes.setdefault(_cause(name, failure), []).append((name, failure))
    return dict(sorted(causes.items(), key=lambda item: -len(item[1])))


def _cause(name: str, failure: Failure) -> str:
    reason = failure["reason"].removeprefix(name)
    reason = re.sub(r"^/[^:]*?(\.\w+)?: ", lambda match: f"*{match[1] or ''}: ", reason).removeprefix(": ")
    reason = reason.replace(name, "...")
    return re.sub(r"[-+]?\d+(\.\d+)?(e[-+]?\d+)?", "#", reason)


def _failures_section(failures: dict[str, Failure]) -> str:
    if not failures:
        return ""
    groups = []
    for cause, members in failure_causes(failures).items():
        shown = "".join(
            f"<li><code>{_text(failure['reason'])}</code> <i>{_count(failure['attempts'], 'attempt')}, last "
            f"{_text(_when(failure['time']))}</i></li>"
            for _, failure in members[:REPORT_NAMES]
        )
        more = f"<li>... and {len(members) - REPORT_NAMES} more</li>" if len(members) > REPORT_NAMES else ""
        title = f"<b>{len(members):,}</b> {_text(members[0][1]['error_type'])}: {_text(cause)}"
        groups.append(f"<details open><summary>{title}</summary><ul>{shown}{more}</ul></details>")
    return f"<h2>{len(failures):,} failed, by cause</h2>{''.join(groups)}"


def _figures_section(look: _Look) -> str:
    """The rate, and histograms of the chunks."""
    lengths = [stop - start for record in look.progress.records.values() for start, stop in record["spans"]]
    distances = [fact.distance_m for fact in look.facts if fact.distance_m is not None]
    if not lengths:
        return ""
    sampled = f"{len(distances):,} of {len(lengths):,} chunks" if len(distances) < len(lengths) else "all chunks"
    figures = [_figure(_histogram(lengths, "chunk length [frames]"), "Length of all chunks")]
    if distances:
        figures.append(_figure(_histogram(distances, "chunk distance [m]"), f"Travelled distance of {sampled}"))
    elif look.facts:
        figures.append(
            _figure("", "No travelled distances: the chunks were cut by number of frames (chunk_by: frames)")
        )
    if _night_rate(look.night):
        begin, end = (time.localtime(look.night[i].created_at) for i in (0, -1))
        day = "%a %d %b "
        until = time.strftime(("" if begin[:3] == end[:3] else day) + "%H:%M", end)
        caption = f"Rate of the last night, {time.strftime(day + '%H:%M', begin)} to {until}"
        figures.insert(0, _figure(_rate_figure(look.night), caption))
    return f"<h2>Rate and chunks</h2><div class=grid>{''.join(figures)}</div>"


def _rate_figure(night: list[ChunkFacts]) -> str:
    import numpy as np

    times = np.array([fact.created_at for fact in night])
    frames = np.cumsum([fact.new_frames for fact in night])
    edges = np.linspace(times[0], times[-1], 1 + max(1, min(30, len(night) // 4)))
    last = np.append(np.diff(times) > 0, True)  # of chunks in one second, the last has them all
    rates = np.diff(np.interp(edges, times[last], frames[last])) / np.diff(edges)

    def draw(axes: Any) -> None:
        length_s = edges[-1] - edges[0]
        unit_s, unit = (3600, "h") if length_s > 7200 else (60, "min") if length_s > 180 else (1, "s")
        axes.stairs(rates, (edges - edges[0]) / unit_s, fill=True, color=BLUE)
        axes.set(xlabel=f"time since its first chunk [{unit}]", ylabel="rate [frames/s]", ylim=(0, None))

    return _svg(draw)


def _histogram(values: list[float], label: str) -> str:
    def draw(axes: Any) -> None:
        whole = all(isinstance(value, int) for value in values)
        bins = range(min(values), max(values) + 2) if whole and max(values) - min(values) < 24 else 24
        axes.hist(values, bins=bins, color=GREEN)
        axes.set(xlabel=label, ylabel="chunks")
        axes.yaxis.get_major_locator().set_params(integer=True)

    return _svg(draw)


def _trajectories_section(look: _Look) -> str:
    if not look.trajectories:
        return ""
    total = len(look.progress.records)
    which = f"A seeded sample of {len(look.trajectories)} of {total:,}." if total > REPORT_TRAJECTORIES else "All."
    keys = [
        f"Maps: each chunk in a colour, wide and narrow in turn, so that overlaps show; {_key(RED)} a pose jump; the "
        "ring is the start.",
        f"Similarity of each frame's features {_key(BLUE)} with the first frame's and {_key(ORANGE)} with the next "
        "frame's. A camera that works leaves the first frame slowly and stays near 1 from frame to frame; a frozen one "
        "is flat, shuffled frames jump up and down.",
    ]
    cards = "".join(map(_trajectory_card, look.trajectories))
    return f"<h2>Trajectories</h2><p>{which} {' '.join(keys)}</p><div class=grid>{cards}</div>"


def _when(epoch_s: float) -> str:
    with contextlib.suppress(ValueError, OverflowError, OSError):  # of a record that was tampered with
        return time.ctime(epoch_s)
    return f"at {epoch_s}"


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _key(colour: str) -> str:
    return f'<span class=key style="background:{colour}"></span>'


def _trajectory_card(look: TrajectoryLook) -> str:
    parts = _count(look.num_chunks, "chunk")
    if look.num_chunks > look.chunks_seen:
        parts = f"the first {look.chunks_seen} of {parts}"
    jumps = f", {_count(len(look.jumps), 'pose jump')}" if look.jumps else ""
    remarks = "".join(f"<p class=warn>{_text(remark)}</p>" for remark in look.remarks[:REPORT_REMARKS])
    if look.paths:
        figures = _svg(lambda axes: _draw_map(axes, look), height_in=2.6)
    else:
        figures = "<p><i>No map: it has no positions.</i></p>"
    if len(look.frame_index):
        figures += _svg(lambda axes: _draw_similarity(axes, look), height_in=1.9)
    return f"<figure><figcaption><b>{_text(look.name)}</b> {parts}{jumps}</figcaption>{remarks}{figures}</figure>"


def _draw_map(axes: Any, look: TrajectoryLook) -> None:
    for number, path in enumerate(look.paths):
        thin = path[:: max(1, len(path) // REPORT_POINTS)]
        colour = CHUNK_COLOURS[number % len(CHUNK_COLOURS)]
        axes.plot(
            *thin.T, color=colour, linewidth=3.5 - 2 * (number % 2), solid_capstyle="round", zorder=2 + number % 2
        )
    for number in look.jumps:
        ends = (look.paths[number - 1][-1], look.paths[number][0])
        axes.plot(*zip(*ends), color=RED, linestyle=(0, (2, 2)), linewidth=1.2, marker="x", markersize=6, zorder=5)
    axes.plot(*look.paths[0][0], marker="o", markersize=7, markerfacecolor="none", markeredgecolor=INK, zorder=6)
    axes.set(xlabel="x [m]", ylabel="y [m]")
    axes.set_aspect("equal", adjustable="datalim")
    axes.margins(0.08)


def _draw_similarity(axes: Any, look: TrajectoryLook) -> None:
    axes.plot(look.frame_index, look.to_next, color=ORANGE, linewidth=1)
    axes.plot(look.frame_index, look.to_first, color=BLUE, linewidth=1.4)
    for frame in look.jump_frames:
        axes.axvline(frame, color=RED, linestyle=(0, (2, 2)), linewidth=1.2)
    lowest = min(look.to_first.min(), look.to_next.min())
    axes.set(xlabel="frame", ylabel="cosine similarity", ylim=(min(lowest - 0.02, 0.9), 1.01))


def _pictures_section(look: _Look) -> str:
    """Patch tokens as colours beside the frames that they are of."""
    wanted = _frames_to_picture(look)
    pictures = [
        picture for picture in (look._tried(_read_patches, look.progress, *frame) for frame in wanted) if picture
    ]
    if not pictures:
        return ""
    colours = _colours_of_patches([patches for _, _, patches in pictures])
    cards, unseen = [], set()
    for (name, frame, patches), rgb in zip(pictures, colours):
        try:
            shown = f'<img alt="frame {frame}" src="{_frame_as_url(look, name, frame)}">'
        except RefusedError as error:
            shown, _ = "", unseen.add(str(error))
        height, width = patches.shape[:2]
        shown += f'<img class=patches alt="its patch tokens" src="{_image_as_url(rgb, "PNG")}">'
        caption = f"<figcaption><b>{_text(name)}</b> frame {frame}, {height} x {width} patches</figcaption>"
        cards.append(f"<figure><div class=pair>{shown}</div>{caption}</figure>")
    notes = "".join(f"<p class=warn>{_text(note)}</p>" for note in sorted(unseen)[:3])
    about = (
        "Each frame as the encoder saw it, and its patch tokens: their first three principal components, common to all "
        "frames shown here, as red, green and blue. Like things should have like colours, from frame to frame."
    )
    return f"<h2>Patch tokens</h2><p>{about}</p>{notes}<div class=grid>{''.join(cards)}</div>"


def _frames_to_picture(look: _Look) -> list[tuple[str, int, int]]:
    """(trajectory, chunk, row) of some frames: a third and two thirds into sampled trajectories with patch tokens."""
    specs, records = look.progress.specs, look.progress.records
    names = [
        shown.name
        for shown in look.trajectories
        if "patch" in specs[records[shown.name]["fingerprint"]].get("tokens", ())
    ]
    names = sorted(look.random.sample(names, min(len(names), REPORT_PICTURES // 2)))
    frames = []
    for name, share in itertools.product(names, (1 / 3, 2 / 3)):
        parts = [rows for episode in episodes(look.progress, name) for rows in episode]
        row = int(share * look.num_frames[name])
        for part in parts:
            if row < part.stop - part.start:
                frames.append((name, part.index, part.start + row))
                break
            row -= part.stop - part.start
    return frames


def _read_patches(progress: Progress, name: str, index: int, row: int) -> tuple[str, int, Any]:
    """Trajectory, frame's row in the source, patch tokens (h, w, D) float32."""
    with recorded_chunk(progress, name, index, deep=False) as chunk:
        return name, int(chunk["frame_index"][row]), chunk["patch_tokens"][row].astype("float32")


def _colours_of_patches(patches: list[Any]) -> list[Any]:
    """(h, w, 3) uint8 for each (h, w, D): the first three principal components of the patches that have its width."""
    import numpy as np

    colours: dict[int, Any] = {}
    for width in {grid.shape[-1] for grid in patches}:
        members = [number for number, grid in enumerate(patches) if grid.shape[-1] == width]
        rows = np.concatenate([patches[number].reshape(-1, width) for number in members])  # (N, D)
        centred = rows - rows.mean(0)
        _, axes = np.linalg.eigh(centred.T @ centred)  # ascending
        components = centred @ axes[:, :-4:-1]  # (N, 3)
        low, high = np.percentile(components, (1, 99), axis=0)
        rgb = (255 * np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)).astype(np.uint8)
        borders = np.cumsum([math.prod(patches[number].shape[:2]) for number in members])[:-1]
        for number, part in zip(members, np.split(rgb, borders)):
            colours[number] = part.reshape(*patches[number].shape[:2], 3)
    return [colours[number] for number in range(len(patches))]


def _frame_as_url(look: _Look, name: str, frame: int) -> str:
    """A frame, cut and scaled as the encoder saw it. RefusedError where it cannot be had."""
    from dino_cache import FORMATS, CacheSpec, InputError, data_keys, detect_format, read_frame

    progress, folder = look.progress, look.data_folder
    spec = CacheSpec.model_validate(progress.specs[progress.records[name]["fingerprint"]])
    if folder is None:
        raise RefusedError("Frames are not shown: give --data-folder, the record does not say where they are")
    try:
        format_name = progress.data_format if progress.data_format in FORMATS else None
        trajectory = FORMATS[format_name or detect_format(folder, data_keys(spec)).name].locate(folder, name)
        if trajectory.path.is_file() and (size := trajectory.path.stat().st_size) > REPORT_FRAME_FILE_BYTES:
            raise RefusedError(f"Frames of {name} are not shown: {trajectory.path} has {human_bytes(size)} to search")
        pixels = read_frame(trajectory, frame, spec)  # (3, H, W) uint8
    except (InputError, OSError, IndexError) as error:
        raise RefusedError(f"Frames of {name} cannot be shown ({error}); are they elsewhere? --data-folder") from error
    return _image_as_url(pixels.permute(1, 2, 0).numpy(), "JPEG")


def _image_as_url(rgb: Any, kind: str) -> str:
    """An image (h, w, 3) uint8 as a data URL."""
    import PIL.Image

    data = io.BytesIO()
    PIL.Image.fromarray(rgb).save(data, kind, optimize=True)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(data.getvalue()).decode()}"


def _configuration_section(look: _Look) -> str:
    progress = look.progress
    weights = progress.weights or {}
    rows = {
        **progress.processing_config,
        "weights source": weights.get("source"),
        "weights digest": weights.get("digest"),
    }
    if look.facts:
        versions = json.loads(look.facts[-1].versions)
        rows["made with"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    rows |= {"data folder": look.data_folder, "data format": progress.data_format}
    cells = "".join(f"<tr><th>{_text(key)}</th><td>{_text(value)}</td></tr>" for key, value in rows.items())
    return f"<h2>Configuration</h2><table>{cells}</table>"


def _figure(svg: str, caption: str) -> str:
    return f"<figure><figcaption>{_text(caption)}</figcaption>{svg}</figure>"


def _text(value: Any) -> str:
    """For HTML: names and reasons come from strangers' data."""
    return html.escape(printable(str(value)))


def _svg(draw: Callable[[Any], None], height_in: float = 2.2) -> str:
    """A figure as wide as a card, in the page's text colour."""
    import matplotlib
    from matplotlib.figure import Figure

    style = {"svg.fonttype": "none", "font.size": 8, "font.family": "sans-serif", "svg.hashsalt": "dino_cache"}
    colours = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
    with matplotlib.rc_context({**style, **colours}):
        figure = Figure(figsize=(3.6, height_in), layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        axes.grid(color=INK, alpha=0.15, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.ticklabel_format(useOffset=False) if axes.get_xscale() == "linear" else None
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = re.sub(r' (width|height)="[\d.]+pt"', "", svg[svg.index("<svg") :], count=2)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r'<g id="[^"]*">', "<g>", svg).replace(INK, "currentColor")


_STYLE = """
:root{color-scheme:light dark;--back:#fff;--card:#f4f5f7;--ink:#1b1e23;--soft:#5a6270;--line:#d9dce2;--warn:#9a3b00}
@media(prefers-color-scheme:dark){:root{--back:#14161a;--card:#1e2127;--ink:#e8eaee;--soft:#a5adba;--line:#363b45;
--warn:#ffa566}}
*{box-sizing:border-box}
body{margin:0 auto;padding:16px;max-width:1180px;background:var(--back);color:var(--ink);
font:15px/1.45 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:24px;margin:8px 0}h2{font-size:19px;margin:28px 0 8px}p{margin:6px 0}i{color:var(--soft);font-style:normal}
.warn{color:var(--warn);font-weight:600}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(max(130px,23%),1fr));gap:10px}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(300px,100%),1fr));gap:12px;align-items:start}
.tile,figure,details{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px;margin:0}
.tile b{display:block;font-size:20px}.tile i{display:block;font-size:13px}
figcaption{font-size:13px;color:var(--soft)}figcaption b{color:var(--ink)}
svg{display:block;width:100%;height:auto}details{margin:8px 0}summary{cursor:pointer}ul{margin:6px 0;padding-left:20px}
code{font-size:13px}.key{display:inline-block;width:14px;height:4px;border-radius:2px;vertical-align:middle}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:6px;margin-bottom:6px}.pair img{width:100%;border-radius:4px}
.patches{image-rendering:pixelated}
table{border-collapse:collapse;font-size:13px;width:100%}th,td{text-align:left;padding:3px 8px 3px 0;vertical-align:top;
border-bottom:1px solid var(--line)}th{font-weight:400;color:var(--soft);width:35%}
"""


def _page(title: str, body: str) -> str:
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"  # nothing comes from elsewhere
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{_text(title)}</title><meta name=viewport "
        f'content="width=device-width,initial-scale=1"><meta http-equiv=Content-Security-Policy content="{policy}">'
        f"<style>{_STYLE}</style></head><body>{body}<p><i>dino_cache report of {_text(time.ctime())}</i></p></body>"
        "</html>\n"
    )


# ======================================================================================================================
# Command line
# ======================================================================================================================


def build_parser() -> argparse.ArgumentParser:
    """The command line: one subcommand an action."""
    parser = argparse.ArgumentParser(
        prog="progress_utils.py",
        description="Read and edit the progress record of a dino_cache.",
        epilog="Example: python progress_utils.py show --cache-dir /data/my_robot/dino_cache_large",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        example = f"Example: python progress_utils.py {name} {example}"
        return commands.add_parser(name, help=summary, description=summary, epilog=example)

    cache_dir = {"type": Path, "required": True, "metavar": "D", "help": "the folder that holds progress.json"}
    show_parser = command("show", "Print the state of one cache.", "--cache-dir D")
    show_parser.add_argument("--cache-dir", **cache_dir)
    how = show_parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print the whole record as JSON")
    how.add_argument(
        "--watch", type=_seconds, nargs="?", const=WATCH_INTERVAL_S, metavar="SECONDS",
        help=f"show it anew every so often (default: {WATCH_INTERVAL_S:g} s) until Ctrl-C, also while a run works; "
        "into a file or pipe, whenever it changed",
    )  # fmt: skip
    show_parser.add_argument("--all", action="store_true", help="print all failures, not just the first ten")
    list_parser = command("list", "List the caches below a folder.", "--root /data")
    list_parser.add_argument("--root", type=Path, default=Path("."), help="the folder to search (default: here)")
    list_parser.add_argument("--json", action="store_true", help="print the list as JSON")
    _add_editing_commands(command, cache_dir)
    _add_export_and_report(command, cache_dir)
    return parser


_AddCommand = Callable[[str, str, str], argparse.ArgumentParser]


def _add_editing_commands(command: _AddCommand, cache_dir: dict[str, Any]) -> None:
    reset_parser = command(
        "reset", "Start the record afresh, so that every trajectory is redone.", "--cache-dir D --yes"
    )
    reset_parser.add_argument("--cache-dir", **cache_dir)
    reset_parser.add_argument("--yes", action="store_true", help="do not ask")
    failed_parser = command("reset-failed", "Forget failures, so that they are tried again.", "--cache-dir D")
    failed_parser.add_argument("--cache-dir", **cache_dir)
    verify_parser = command("verify", "Check the chunk files against the record.", "--cache-dir D --deep")
    verify_parser.add_argument("--cache-dir", **cache_dir)
    verify_parser.add_argument("--deep", action="store_true", help="read every byte and check the digests")
    verify_parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    verify_parser.add_argument("--repair", action="store_true", help="forget damaged trajectories, remove leftovers")
    verify_parser.add_argument("--yes", action="store_true", help="do not ask before repairing")
    rebuild_parser = command("rebuild", "Make the record anew from the chunk files.", "--cache-dir D")
    rebuild_parser.add_argument("--cache-dir", **cache_dir)
    rebuild_parser.add_argument("--yes", action="store_true", help="do not ask")


def _add_export_and_report(command: _AddCommand, cache_dir: dict[str, Any]) -> None:
    export_parser = command("export", "Write a cache in another layout.", "--cache-dir D --to flat -o robot.h5")
    export_parser.description = f"Write a cache in another layout. {FLAT_DESCRIPTION} {VINT_DESCRIPTION}"
    export_parser.add_argument("--cache-dir", **cache_dir)
    export_parser.add_argument("--to", choices=("flat", "vint"), required=True, dest="layout", help="the layout")
    export_parser.add_argument("-o", "--output", type=Path, required=True, metavar="PATH", help="the file or folder")
    export_parser.add_argument(
        "--tokens", nargs="+", choices=("cls", "patch", "register"), help="which of them (default: all that there are)"
    )
    export_parser.add_argument("--allow-mixed", action="store_true", help="also of several configurations")
    export_parser.add_argument("--force", action="store_true", help="replace an earlier export")
    report_parser = command("report", "Write one HTML file to look at.", "--cache-dir D -o report.html")
    report_parser.add_argument("--cache-dir", **cache_dir)
    report_parser.add_argument(
        "-o", "--output", type=Path, default=Path("report.html"), metavar="FILE", help="default: report.html, here"
    )
    report_parser.add_argument(
        "--data-folder", type=Path, metavar="DIR", help="where the frames are (default: where the last run read them)"
    )


def _seconds(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return seconds


def run_command(arguments: argparse.Namespace) -> int:
    """Run what the parsed command line names; returns its exit code, or raises the error that carries it."""
    if arguments.command == "show" and arguments.watch is not None:
        return watch(arguments.cache_dir, every_s=arguments.watch, show_all=arguments.all)
    if arguments.command == "show":
        return show(arguments.cache_dir, as_json=arguments.json, show_all=arguments.all)
    if arguments.command == "list":
        return list_caches(arguments.root, as_json=arguments.json)
    if arguments.command == "reset":
        return reset(arguments.cache_dir, yes=arguments.yes)
    if arguments.command == "verify":
        how = {"deep": arguments.deep, "as_json": arguments.json, "repair": arguments.repair, "yes": arguments.yes}
        return verify(arguments.cache_dir, **how)
    if arguments.command == "rebuild":
        return rebuild(arguments.cache_dir, yes=arguments.yes)
    if arguments.command == "export":
        what = {"layout": arguments.layout, "output": arguments.output, "tokens": arguments.tokens}
        return export(arguments.cache_dir, **what, allow_mixed=arguments.allow_mixed, force=arguments.force)
    if arguments.command == "report":
        return report(arguments.cache_dir, output=arguments.output, data_folder=arguments.data_folder)
    return reset_failed(arguments.cache_dir)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    gc.set_threshold(*GC_THRESHOLDS)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a cron job's locale may have no emoji
    try:
        return run_command(build_parser().parse_args(argv))
    except DinoCacheError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # `show | head` has seen enough
        sys.stdout = None
        return 0
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    import progress_utils  # itself under its own name: dino_cache's errors are then the classes that main catches

    sys.exit(progress_utils.main())
