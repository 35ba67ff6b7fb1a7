#!/usr/bin/env python3
"""Read and edit the progress record of a dino_cache.

    python progress_utils.py show         --cache-dir D [--json] [--all]
    python progress_utils.py list         [--root .] [--json]
    python progress_utils.py reset-failed --cache-dir D
    python progress_utils.py reset        --cache-dir D [--yes]
    python progress_utils.py verify       --cache-dir D [--deep] [--json] [--repair [--yes]]
    python progress_utils.py rebuild      --cache-dir D [--yes]

This file owns three things, which dino_cache.py imports from here:

    durable writing   write_durably, fsync_directory: every file that must survive a crash passes through them
    the lock          cache_lock: one run, or one edit, per cache
    the record        Progress: what <cache_dir>/progress.json holds, how it is checked, loaded and saved

Reading commands never write and never lock; editing commands take the lock and are refused while a run holds it.
Exit codes: 0 fine, 1 problems found, 2 could not do it, 4 a run holds the cache.

A save survives a killed process and, as far as the disk keeps its word about fsync, a power cut. The copy before it
stays as progress.json.bak. Only the standard library is imported at the top, so that every command starts at once; what
knows chunk files (verify, rebuild) imports dino_cache when it runs.
"""

from __future__ import annotations

import argparse
import calendar
import collections
import contextlib
import errno
import functools
import gc
import itertools
import json
import os
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
LOCK_OWNER_FILE = ".lock.owner"  # who holds the lock: pid, host, start time; advisory, the lock itself decides
TEMPORARY_FILES = (PROGRESS_FILE + ".tmp", BACKUP_FILE + ".tmp")  # what a save that was killed leaves
LOG_FILE = "dino_cache.log"

PROGRESS_FORMAT_VERSION = 1
SAVE_SHARE = 0.02  # saves may take this share of a run's time before they are spaced
READABLE_ENTRIES = 1000  # up to here progress.json is indented; json's indenting encoder is 10 times slower
SHOWN_FAILURES = 10
# Errors of reading that are the mount's fault or the user's, so that a file that gives one is not called damaged.
CANNOT_LOOK = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOTCONN, errno.ENXIO, errno.ETIMEDOUT)
GC_THRESHOLDS = (100_000, 20, 100)  # a large record is a million objects, not to be looked through every 700 new ones


def chunk_file_name(index: int) -> str:
    """The file of a trajectory's chunk number `index`, from 0."""
    return f"chunk_{index:05d}.h5"


def is_chunk_file(name: str) -> bool:
    """Whether a file's name is that of a chunk."""
    return re.fullmatch(r"chunk_\d{5,}\.h5", name) is not None


def printable(text: str) -> str:
    """A text for the terminal: names come from strangers' data, control characters in them do not reach it."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def lock_owner(cache_dir: Path) -> str | None:
    """Who seems to hold the lock, in words; None where it left no name, or was a process of this host that is dead."""
    try:
        owner = json.loads((cache_dir / LOCK_OWNER_FILE).read_text())
        if owner["host"] == socket.gethostname():
            os.kill(owner["pid"], 0)
    except (OSError, ValueError, KeyError, TypeError, OverflowError) as error:
        if not isinstance(error, PermissionError):  # somebody else's process, and alive
            return None
    return f"pid {owner['pid']} on {owner['host']}, since {owner['started']}"


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
        path = cache_dir / PROGRESS_FILE
        try:
            data = json.loads(path.read_bytes().decode("utf-8"))
            _refuse_newer(path, data)
            _check_progress(data)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not path.is_symlink():
                return None
            raise RefusedError(f"{path}: cannot read: {error.strerror}. {_ways_out(cache_dir)}") from error
        except (ValueError, TypeError, RecursionError) as error:
            raise RefusedError(f"{path}: not a usable progress record: {error}. {_ways_out(cache_dir)}") from error
        progress = cls(cache_dir, data["dataset_name"])
        for key in _PLAIN_KEYS:
            setattr(progress, key, data[key])
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
    progress = Progress.load(cache_dir)
    if progress is None:
        near = [str(path.parent) for path in sorted(cache_dir.glob(f"*/{PROGRESS_FILE}"))[:3]]
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        raise RefusedError(f"{cache_dir}: no {PROGRESS_FILE} here; --cache-dir takes the folder that holds it{hint}")
    return progress


def show(cache_dir: Path, *, as_json: bool, show_all: bool) -> int:
    """Print the state of one cache."""
    progress = load_or_refuse(cache_dir)
    if as_json:
        mixed = len(progress.fingerprints) > 1
        print(json.dumps({"cache_dir": str(cache_dir), "mixed": mixed, **progress.to_json()}, ensure_ascii=False))
        return 0
    print(f"📊 Progress Status for {cache_dir}")
    print("=" * 60)
    print(f"Dataset: {progress.dataset_name}")
    print(f"Completed trajectories: {len(progress.records)}")
    print(f"Failed trajectories: {len(progress.failures)}")
    print(f"Total chunks generated: {progress.total_chunks}")
    print(f"Processing time: {progress.elapsed_s / 3600:.1f} hours")
    print(f"Last update: {time.ctime(progress.last_update)}")
    for line in _state_remarks(progress):
        print(line)
    print()
    print("Processing Configuration:")
    for key, value in progress.processing_config.items():
        print(f"  {key}: {value}")
    if progress.failures:
        _print_failures(progress.failures, show_all)
    return 0


def _state_remarks(progress: Progress) -> list[str]:
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


def _print_failures(failures: dict[str, Failure], show_all: bool) -> None:
    print()
    print(f"❌ Failed Trajectories ({len(failures)}):")
    shown = len(failures) if show_all else SHOWN_FAILURES
    for name, failure in list(failures.items())[:shown]:
        print(printable(f"  - {name}: {failure['reason']}"))
    if len(failures) > shown:
        print(f"  ... and {len(failures) - shown} more")


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
    return {
        "cache_dir": str(cache_dir),
        "dataset_name": progress.dataset_name,
        "completed": len(progress.records),
        "failed": len(progress.failures),
        "chunks": progress.total_chunks,
        "last_update": progress.last_update,
    }


def _print_table(rows: list[dict[str, Any]]) -> None:
    lines = [("Dataset", "Completed", "Failed", "Chunks", "Last update", "Cache folder")]
    for row in rows:
        if "error" in row:
            lines.append(("unreadable", "?", "?", "?", "?", row["error"]))
        else:
            counts = (str(row["completed"]), str(row["failed"]), str(row["chunks"]))
            lines.append((str(row["dataset_name"]), *counts, time.ctime(row["last_update"]), row["cache_dir"]))
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        cells = [
            cell.rjust(width) if 1 <= i <= 3 else cell.ljust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ]
        print("  ".join(cells).rstrip())


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
            progress.elapsed_s = old.elapsed_s
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
    show_parser.add_argument("--json", action="store_true", help="print the whole record as JSON")
    show_parser.add_argument("--all", action="store_true", help="print all failures, not just the first ten")
    list_parser = command("list", "List the caches below a folder.", "--root /data")
    list_parser.add_argument("--root", type=Path, default=Path("."), help="the folder to search (default: here)")
    list_parser.add_argument("--json", action="store_true", help="print the list as JSON")
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
    return parser


def run_command(arguments: argparse.Namespace) -> int:
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
