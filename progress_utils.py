#!/usr/bin/env python3
"""Read and edit the progress record of a dino_cache.

    python progress_utils.py show         CACHE [--json | --watch [SECONDS]] [--all] [--runs]
    python progress_utils.py list         [--root .] [--json]
    python progress_utils.py reset-failed CACHE
    python progress_utils.py reset        CACHE [--yes]

and, where dino_cache_extras/ lies beside it, what COMMAND_MODULES names (`--help` of each says more):

    python progress_utils.py verify       CACHE [--deep] [--json] [--repair [--yes]]
    python progress_utils.py rebuild      CACHE [--yes]
    python progress_utils.py report       CACHE [-o report.html] [--data-folder DIR]
    python progress_utils.py export       CACHE --to flat|vint|lerobot|lance -o PATH [--tokens ...] [--force]
    python progress_utils.py prune        CACHE [--yes]
    python progress_utils.py merge        CACHE

CACHE is the folder that holds progress.json, or that file; also `--cache-dir D`, or `--config FILE [--dataset NAME]`.

This file owns three things, which dino_cache.py imports from here:

    durable writing   write_durably, fsync_path: every file that must survive a crash passes through them
    the lock          cache_lock: one run, or one edit, per cache; and the heartbeat of a run for those who watch it
    the record        Progress: what progress.json and its journal hold; how it is checked, loaded, saved (RECORD_KEYS)

Reading commands never write and never lock; editing commands take the lock and are refused while a run holds it.
Exit codes: 0 fine, 1 problems found, 2 could not do it, 4 a run holds the cache.

A save survives a killed process and, as far as the disk keeps its word about fsync, a power cut. The copy before it
stays as progress.json.bak. Only the standard library is imported at the top, so that every command starts at once.

Sections, each using only those above it: constants - errors - names and small helpers - the console - doors - durable
writing - the lock - the journal - partial trajectories - the record - showing and resetting it - command line.
"""

from __future__ import annotations

import argparse
import atexit
import collections
import contextlib
import copy
import errno
import fcntl
import gc
import hashlib
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import socket
import sys
import textwrap
import threading
import time
import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, TextIO, TypedDict

# ======================================================================================================================
# Constants: the names of a cache's own files, and what several sections need
# ======================================================================================================================

__version__ = "0.2.0"  # dino_cache.py and pyproject.toml take it from here

PROGRESS_FILE = "progress.json"
BACKUP_FILE = "progress.json.bak"
JOURNAL_FILE = "progress.json.journal"  # results that progress.json does not hold yet, where its saves are spaced
STAGING_FOLDER = ".staging"
SHARDS_FOLDER = ".shards"  # record, lock, log and staging of each run with --shard, until they are merged
LOCK_FILE = ".lock"
LOCK_OWNER_FILE = ".lock.owner"  # who holds the lock and how far it is; advisory, the lock itself decides
LOG_FILE = "dino_cache.log"
RUNS_FILE = "runs.jsonl"  # a line a run; nothing is decided by it
# What a killed save leaves.
TEMPORARY_FILES = tuple(f"{name}.tmp" for name in (PROGRESS_FILE, BACKUP_FILE, LOCK_OWNER_FILE, RUNS_FILE))

SHOWN_NAMES = 10  # names of a list that a message shows
FSTAB = Path("/etc/fstab")  # which disks belong where
# Errors of reading that are the mount's fault or the user's, so that a file that gives one is not called damaged.
CANNOT_LOOK = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.ENOTCONN, errno.ENXIO, errno.ETIMEDOUT)
SAVE_SHARE = 0.002  # saves of the record may take this share of a run's time before they are spaced
GC_THRESHOLDS = (100_000, 20, 100)  # a large record is a million objects, not to be looked through every 700 new ones


# ======================================================================================================================
# Errors: each carries the exit code that it ends a command with
# ======================================================================================================================


class DinoCacheError(Exception):
    """An error with a message for the user: what is wrong, with which file or value, and the way on. Several arguments
    are lines of their own; a newline within one came with a name, and is shown escaped."""

    exit_code = 3

    def __str__(self) -> str:
        return "\n".join(map(str, self.args))


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


def available_cores() -> int:
    """Cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota_us, period_us = map(int, CPU_QUOTA.read_text().split())
        cores = min(cores, max(1, quota_us // period_us))
    return cores


class Shard(NamedTuple):
    """A share of a cache's trajectories: those whose name's digest is `index` modulo `count`."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def holds(self, name: str) -> bool:
        """Whether a trajectory is of this share; the same on every machine, in every version."""
        digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.count == self.index

    def folder(self, cache_dir: Path) -> Path:
        """Where its record, lock, log and staging lie."""
        return cache_dir / SHARDS_FOLDER / f"{self.index}-of-{self.count}"


def chunk_folders(cache_dir: Path) -> Iterator[str]:
    """Names of trajectories that have chunk files here, recorded or not.

    Raises:
        RefusedError: a folder cannot be listed; what lies in it must not be taken for absent.
    """

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise RefusedError(f"{error.filename}: cannot list it: {error.strerror}. Nothing was changed") from error

    for folder, subfolders, files in os.walk(cache_dir, onerror=refuse):
        ours = (STAGING_FOLDER, SHARDS_FOLDER) if Path(folder) == cache_dir else ()
        subfolders[:] = sorted(name for name in subfolders if name not in ours)
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


def human_list(names: list[str]) -> str:
    """The first ten names, and how many more there are."""
    more = f" and {len(names) - SHOWN_NAMES} more" if len(names) > SHOWN_NAMES else ""
    return ", ".join(names[:SHOWN_NAMES]) + more


# ======================================================================================================================
# The console: what people are told; it never decides over the work
# ======================================================================================================================

# Control characters, line separators, and what turns the direction of writing or hides there.
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def printable(text: object) -> str:
    """A text as one line for the terminal or a log: names come from strangers' data, and neither move a cursor nor
    look like a line of ours."""
    return _UNPRINTABLE.sub(lambda match: repr(match[0])[1:-1], str(text))


def print_lines(*lines: object, file: TextIO | None = None) -> None:
    """Print texts, each as one line whatever names it holds; to stdout where no file is given."""
    print("\n".join(map(printable, lines)), file=file, flush=True)


class Console:
    """stdout or stderr. A write that fails (its reader is gone, the terminal closed, the disk under a redirection full)
    raises nothing, and from then on nothing is written."""

    def __init__(self, stream: TextIO, error: Exception | None = None):
        self._stream = stream
        self.error = error  # of the first write that failed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, action: Callable[..., Any], *arguments: str) -> None:
        if self.error is not None:
            return
        try:
            action(*arguments)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            self.error = error
            with contextlib.suppress(OSError, ValueError):
                if self._stream.fileno() in (1, 2):  # what it still holds must not fail again when Python ends
                    os.dup2(os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC), self._stream.fileno())


def set_up_console() -> None:
    """Have stdout and stderr raise nothing, and a closed descriptor 0, 1 or 2 lead nowhere: the next file that is
    opened, a chunk say, would get its number, and what is printed."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, Console):
            continue
        if stream is None:
            closed = OSError(errno.EBADF, os.strerror(errno.EBADF))
            console = Console(os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"), closed)
        else:
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # a cron job's locale may have no emoji
            console = Console(stream)
        setattr(sys, name, console)
        atexit.register(console.flush)  # before Python flushes, which would end with an error of its own


def console_error(*names: str) -> Exception | None:
    """Why stdout or stderr, or those named, could not be written; None where everything was told."""
    errors = (getattr(getattr(sys, name), "error", None) for name in names or ("stdout", "stderr"))
    return next((error for error in errors if error is not None), None)


def refuse_locale() -> None:
    """Raise RefusedError where file names are not UTF-8: one folder would have two names under two locales."""
    if (encoding := sys.getfilesystemencoding()) != "utf-8":
        raise RefusedError(
            f"file names are {encoding} in this locale, and caches name trajectories in UTF-8. Set LC_ALL=C.UTF-8 (in "
            "a crontab: a line of its own above the job), and do not set PYTHONUTF8=0"
        )


# ======================================================================================================================
# Doors: what is optional is opened by name, and its absence says what to install
# ======================================================================================================================

# Library -> the extra that brings it
EXTRA_OF = {
    **{"av": "lerobot", "pyarrow": "lerobot", "ray": "ray", "openvino": "openvino", "lance": "lance"},
    **dict.fromkeys(("matplotlib", "jinja2", "markupsafe"), "report"),
    **dict.fromkeys(("rosbags", "lz4", "zstandard"), "rosbag"),
}
# Library -> its package, where that is called otherwise
PACKAGE_OF = {"yaml": "pyyaml", "PIL": "pillow", "lance": "pylance"}
SCRIPTS = {"dino_cache.py": "dino-cache", "progress_utils.py": "dino-cache-progress"}  # file -> command, once installed


def install_command(library: str) -> str:
    """The command that installs a library: in a clone by its requirements file, of the package as its extra."""
    library = library.partition(".")[0]
    extra = EXTRA_OF.get(library)
    file = "requirements.txt" if extra is None else f"requirements-{extra}.txt"
    if (Path(__file__).parent / file).exists():
        return f"pip install -r {file}"
    if is_installed() and extra is not None:
        return f'pip install "dino-cache[{extra}]"'
    return f"pip install {PACKAGE_OF.get(library, library)}"


def missing_library(error: ImportError) -> RefusedError:
    """What to tell the user where a library cannot be imported."""
    library = (error.name or "a library").partition(".")[0]
    return RefusedError(f"this needs {library}, which cannot be imported ({error}): {install_command(library)}")


def open_library(name: str) -> ModuleType:
    """A library that only some of the work needs. Raises RefusedError, with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        error.name = error.name or name
        raise missing_library(error) from error


def open_door(module: str) -> ModuleType:
    """A module of dino_cache_extras.

    Raises:
        RefusedError: the folder is not there, or a library that the module needs; the message says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        folder = module.partition(".")[0]
        if (error.name or "").partition(".")[0] != folder:
            raise missing_library(error) from error
        what = f"the folder {folder}" if "." in module else f"{module}.py"
        raise RefusedError(
            f"this needs {module}, which is not there: copy {what} of the clone to {Path(__file__).parent}"
        ) from error


def is_there(module: str) -> bool:
    """Whether a module can be found; it is not imported, only the folders above it are."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def end_without_library(error: ImportError) -> NoReturn:
    """End a command, exit 2, where a library cannot be imported that it always needs; raise ImportError in a program
    that imports this one."""
    refusal = missing_library(error)
    if not is_command():
        raise ImportError(str(refusal), name=error.name) from error
    set_up_console()
    print_lines(f"error: {refusal}", file=sys.stderr)
    sys.exit(refusal.exit_code)


def is_command() -> bool:
    """Whether this process was started as one of our commands."""
    return Path(sys.argv[0]).name in (*SCRIPTS, *SCRIPTS.values())


def is_installed() -> bool:
    """Whether this is the installed package, started by one of its commands or imported, and not a clone's file."""
    started = Path(sys.argv[0]).name
    return started in SCRIPTS.values() or Path(__file__).parent.name in ("site-packages", "dist-packages")


def program_name(script: str) -> str:
    """What a script is called here, for the user to type: by its file, or by its name once installed."""
    return SCRIPTS[script] if is_installed() else script


def progress_command(arguments: str) -> str:
    """A command line of progress_utils.py, for messages."""
    return f"`{program_name('progress_utils.py')} {arguments}`"


def example(script: str, arguments: str) -> str:
    """The last line of a help: a command line that works."""
    name = program_name(script)
    return f"Example: {f'python {name}' if name == script else name} {arguments}"


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

HEARTBEAT_INTERVAL_S = 1.0  # time between two heartbeats of a run
STALE_AFTER_S = 900.0  # a run that encodes and has no heartbeat for so long is taken for stuck
LOOK_S = 0.2  # time that a run waits for those who only look whether somebody holds the lock, an instant each


def refuse_links(cache_dir: Path) -> None:
    """Raise RefusedError where one of the cache's own files is a link: the folder may have come with the data, from a
    stranger."""
    for name in (LOCK_FILE, LOCK_OWNER_FILE, LOG_FILE, SHARDS_FOLDER):
        if (cache_dir / name).is_symlink():
            raise RefusedError(f"{cache_dir / name}: is a link, and would be written through. Remove it")


@contextlib.contextmanager
def cache_lock(cache_dir: Path) -> Iterator[None]:
    """Hold the cache for this process. The system drops the lock with the process, so a dead one leaves no stale lock.
    Runs with --shard hold it together, which keeps all others out.

    Raises:
        CacheLockedError: another process holds it; the message says who.
        RefusedError: the folder cannot be written, its filesystem cannot lock, or a file to be written is a link.
    """
    from filelock import FileLock, Timeout  # here: 50 ms that reading commands need not pay

    refuse_links(cache_dir)
    lock = FileLock(cache_dir / LOCK_FILE, timeout=LOOK_S, poll_interval=LOOK_S / 10, fallback_to_soft=False)
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


def make_cache_folder(cache_dir: Path) -> None:
    """Make the folder, durably. Raises RefusedError where it cannot be made."""
    try:
        make_directories_durably(cache_dir)
    except OSError as error:
        raise RefusedError(f"cache_dir {cache_dir}: cannot make it: {error.strerror}") from error


@contextlib.contextmanager
def locked_cache(cache_dir: Path) -> Iterator[None]:
    """Make the cache folder and hold its lock."""
    make_cache_folder(cache_dir)
    with cache_lock(cache_dir):
        yield


@contextlib.contextmanager
def edit_lock(cache_dir: Path) -> Iterator[None]:
    """Hold the cache to edit its record. RefusedError where records of shards wait to be merged into it."""
    with cache_lock(cache_dir):
        if waiting := [str(shard) for shard in unmerged_shards(cache_dir)]:
            raise RefusedError(
                f"{cache_dir}: the records of shards {human_list(waiting)} are not merged yet: first "
                f"{progress_command(f'merge --cache-dir {cache_dir}')}. Nothing was changed"
            )
        yield


def shard_folders(cache_dir: Path) -> dict[Shard, Path]:
    """The folders of a cache's shards, in order."""
    folder, found = cache_dir / SHARDS_FOLDER, {}
    if folder.is_symlink():
        return {}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in folder.iterdir():
            parts = re.fullmatch(r"(0|[1-9]\d*)-of-([1-9]\d*)", path.name, re.ASCII)
            if parts is not None and path.is_dir() and not path.is_symlink():
                found[Shard(int(parts[1]), int(parts[2]))] = path
    return dict(sorted(found.items(), key=lambda item: (item[0].count, item[0].index)))


def unmerged_shards(cache_dir: Path) -> dict[Shard, Path]:
    """Those whose record is not in the cache's own yet."""
    found = shard_folders(cache_dir).items()
    return {shard: folder for shard, folder in found if os.path.lexists(folder / PROGRESS_FILE)}


def is_empty_cache(cache_dir: Path) -> bool:
    """Whether the folder is missing, or holds nothing that a run has made but locks."""
    locks = {LOCK_FILE, LOCK_OWNER_FILE, "lost+found"}
    try:
        return not set(os.listdir(cache_dir)) - (locks if unmerged_shards(cache_dir) else locks | {SHARDS_FOLDER})
    except OSError:
        return not os.path.lexists(cache_dir)


def absent_mount(folder: Path) -> str | None:
    """The mount point of /etc/fstab in which `folder` lies and on which nothing is mounted; None where all are."""
    try:
        lines = FSTAB.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return None
    fields = [line.split() for line in lines if not line.lstrip().startswith("#")]
    points = [entry[1].replace("\\040", " ") for entry in fields if len(entry) > 1 and entry[1].startswith("/")]
    inside = [point for point in points if folder.is_relative_to(point)]
    return next((point for point in sorted(inside, key=len) if not os.path.ismount(point)), None)


class RunState(NamedTuple):
    """How far a run is. Its fields are the keys of what lies beside the lock, for whatever version reads it."""

    done: int  # trajectories completed, of those present and selected
    total: int
    chunks: int
    elapsed_s: float
    frames_left: int
    frames_per_s: float
    trajectory: str | None  # the one in work
    frames_done: int | None = None  # by this run; None: a version that did not say. Written apart: older ones read it

    def line(self) -> str:
        """In words; time left and rate once there is a rate."""
        percent = 100 * self.done / self.total
        line = f"Progress: {self.done}/{self.total} trajectories ({percent:.1f}%), {self.chunks} chunks"
        line += f", {self.elapsed_s / 3600:.1f}h elapsed"
        if self.frames_per_s > 0 and self.elapsed_s > 2:
            hours_left = self.frames_left / self.frames_per_s / 3600
            line += f", {hours_left:.1f}h remaining, {self.frames_per_s:.0f} frames/s"
        return line

    def frames_line(self) -> str | None:
        """How far it is in frames, which move within a long trajectory too."""
        if self.frames_done is None or not (total := self.frames_done + self.frames_left):
            return None
        return f"Frames: {self.frames_done:,} of {total:,} in this run ({100 * self.frames_done / total:.1f}%)"


class Heartbeat:
    """Writes how far a run is beside the name of the lock's holder, once a second at most.

    It is for eyes only: it is not forced to the disk, goes with the lock, and nothing is decided by it.
    """

    def __init__(self, cache_dir: Path):
        self._path = cache_dir / LOCK_OWNER_FILE
        self._has_beaten = False
        self._last_beat = time.monotonic()  # a run that is over at once needs no heartbeat

    def beat(self, state: Callable[[], RunState]) -> None:
        """Write how far the run is, if it is time to."""
        if time.monotonic() - self._last_beat >= HEARTBEAT_INTERVAL_S:
            self._last_beat, self._has_beaten = time.monotonic(), True
            fields = state()._asdict()
            self._write({"frames_done": fields.pop("frames_done"), "run": fields})

    def end(self) -> None:
        """Write that the run is over, though its process may hold the lock for longer."""
        if self._has_beaten:
            self._write({})

    def _write(self, more: dict[str, Any]) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk, say
            owner = json.loads(self._path.read_text(encoding="utf-8"))
            for key in ("run", "frames_done"):
                owner.pop(key, None)
            temporary = self._path.with_name(self._path.name + ".tmp")
            temporary.write_text(json.dumps({**owner, **more}), encoding="utf-8")
            os.replace(temporary, self._path)


def is_locked(cache_dir: Path) -> bool:
    """Whether somebody holds the cache alone; shards hold it together. The lock itself is asked: the name beside it may
    be that of a killed process, whose pid another has by now (in a container always), or whose host is a container that
    is no more."""
    try:
        descriptor = os.open(cache_dir / LOCK_FILE, os.O_RDONLY | os.O_NONBLOCK)
    except PermissionError:
        return (cache_dir / LOCK_OWNER_FILE).exists()  # nobody can tell here: rather taken for held
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)  # else a filesystem that cannot lock, on which no run works
    finally:
        os.close(descriptor)
    return False


class LockOwner(NamedTuple):
    """Who left its name beside the lock."""

    name: str  # pid, host and start time, in words
    is_alive: bool  # it holds the lock
    last_heartbeat: float  # epoch seconds
    run: RunState | None

    @property
    def is_stale(self) -> bool:
        """Whether it left the name when it was killed, or seems stuck. One that encodes nothing has no heartbeat: it
        reads poses, loads a model, or is at work on another of its config's datasets."""
        is_silent = self.run is not None and time.time() - self.last_heartbeat > STALE_AFTER_S
        return is_silent or not self.is_alive


def shards_at_work(cache_dir: Path) -> dict[Shard, LockOwner]:
    """Who holds which shard of a cache."""
    owners = {shard: _read_owner(folder) for shard, folder in shard_folders(cache_dir).items()}
    return {shard: owner for shard, owner in owners.items() if owner is not None and owner.is_alive}


def read_lock_owner(cache_dir: Path) -> LockOwner | None:
    """Who holds the cache, shards together too, or held it when it was killed; None where nobody does and nobody left
    a name."""
    owner = _read_owner(cache_dir)
    if owner is not None and owner.is_alive:
        return owner
    if not (shards := shards_at_work(cache_dir)):
        return owner
    names = ", ".join(f"shard {shard}: {holder.name}" for shard, holder in shards.items())
    last_heartbeat = max(holder.last_heartbeat for holder in shards.values())
    return LockOwner(names, True, last_heartbeat, None)


def _read_owner(cache_dir: Path) -> LockOwner | None:
    path = cache_dir / LOCK_OWNER_FILE
    try:
        last_heartbeat = path.stat().st_mtime
        owner = json.loads(path.read_text(encoding="utf-8"))
        name = f"pid {owner['pid']} on {owner['host']}, since {owner['started']}"
        run = RunState(**owner["run"], frames_done=owner.get("frames_done")) if "run" in owner else None
    except (OSError, ValueError, KeyError, TypeError):
        return LockOwner("its holder left no name", True, time.time(), None) if is_locked(cache_dir) else None
    is_alive = is_locked(cache_dir)
    return LockOwner(name, is_alive, last_heartbeat, run) if is_alive or path.exists() else None


def lock_owner(cache_dir: Path) -> str | None:
    """Who holds the lock, in words; None where nobody does."""
    owner = read_lock_owner(cache_dir)
    return owner.name if owner is not None and owner.is_alive else None


# ======================================================================================================================
# The journal: lines appended beside progress.json, each with its checksum
# ======================================================================================================================


class Journal:
    """Takes entries, one a line; the first makes the file."""

    def __init__(self, path: Path):
        self._path = path
        self._file: io.FileIO | None = None
        self._size = 0
        self._is_synced = True
        self._last_sync_s = self._last_sync_end = 0.0

    def append(self, entries: Iterable[dict[str, Any]]) -> None:
        """Add entries; they survive this process at once, and a power cut after `sync`."""
        lines = journal_lines(entries)
        if self._file is None:
            self._file, self._size = io.FileIO(self._path, "x"), 0  # a new one, never through a link
            fsync_path(self._path.parent)
        rest, self._is_synced = memoryview(lines), False
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):  # a full disk: no half line may stand before the next one
                self._file.truncate(self._file.seek(self._size))
            raise
        self._size += len(lines)

    def sync(self, *, at_once: bool = False) -> None:
        """Force the entries to the disk; unless `at_once`, for a part of SAVE_SHARE of the time only."""
        begin = time.monotonic()
        if not self._is_synced and (at_once or begin - self._last_sync_end >= self._last_sync_s / (SAVE_SHARE / 2)):
            os.fsync(self._file.fileno())
            self._is_synced, self._last_sync_end = True, time.monotonic()
            self._last_sync_s = self._last_sync_end - begin

    def remove(self) -> None:
        """Remove the file, also one that another process left."""
        if self._file is not None:
            self._file.close()
        self._file, self._is_synced = None, True
        self._path.unlink(missing_ok=True)


_JOURNAL_JSON = json.JSONEncoder(ensure_ascii=False)  # json.dumps would make one for each line


def journal_lines(entries: Iterable[dict[str, Any]]) -> bytes:
    """Entries as a journal's bytes."""
    texts = [_JOURNAL_JSON.encode(entry).encode(errors="backslashreplace") for entry in entries]
    return b"".join(b"%08x %b\n" % (zlib.crc32(text), text) for text in texts)


def journal_entries(journal: bytes) -> Iterator[dict[str, Any] | None]:
    """The entries in a journal's bytes, None for a line that is damaged."""
    lines = journal.split(b"\n")
    lines.pop()  # half a line, of a process that was killed
    while lines and b"\0" in lines[-1]:  # never forced to the disk before its power was cut
        lines.pop()
    for line in lines:
        digits, _, text = line.partition(b" ")
        yield json.loads(text) if digits == b"%08x" % zlib.crc32(text) else None


# ======================================================================================================================
# Partial trajectories: finished chunks of one that no run has come to the end of, in a folder of staging
# ======================================================================================================================

PARTIAL_SUFFIX = ".journal"  # of the file beside the folder: what the chunks are made from, then a line for each


class Partial(NamedTuple):
    """The first chunks of a trajectory, as their journal tells."""

    folder: Path
    made_from: dict[str, Any]  # the trajectory's name, and all that the chunks are void without
    chunks: list[dict[str, Any]]  # what was noted of each, in order: its bytes and digests


def partial_journal(folder: Path) -> Path:
    """The journal of a partial trajectory's folder."""
    return folder.with_name(folder.name + PARTIAL_SUFFIX)


def partial_folder(cache_dir: Path, name: str) -> Path:
    """Where the chunks of a trajectory lie that nobody works on. A name may be long and hold `/`: its digest stands
    for it."""
    digest = hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=16).hexdigest()
    return cache_dir / STAGING_FOLDER / f"partial-{digest}"


def note_partial(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Append to a folder's journal, durably; the first entry tells what the chunks are made from."""
    with open(partial_journal(folder), "ab") as file:
        file.write(journal_lines(entries))
        file.flush()
        os.fsync(file.fileno())


def read_partial(folder: Path) -> Partial | None:
    """What a folder's journal tells, up to a line that is torn or damaged; None where it tells nothing. Whether the
    chunks are there and intact is another question."""
    try:
        entries = list(itertools.takewhile(bool, journal_entries(partial_journal(folder).read_bytes())))
    except (OSError, ValueError):
        return None
    if not entries or folder.is_symlink() or not folder.is_dir():
        return None
    return Partial(folder, entries[0], entries[1:])


def find_partials(staging: Path) -> list[Partial]:
    """Those in staging, and in the folders that workers have there."""
    if staging.is_symlink() or not staging.is_dir():
        return []
    with os.scandir(staging) as entries:
        places = [staging, *sorted(Path(entry.path) for entry in entries if entry.is_dir(follow_symlinks=False))]
    names = [path for place in places for path in sorted(place.glob(f"*{PARTIAL_SUFFIX}"))]
    found = (read_partial(path.with_name(path.name.removesuffix(PARTIAL_SUFFIX))) for path in names)
    return [partial for partial in found if partial is not None]


def move_partial(partial: Partial, folder: Path) -> None:
    """Give it another folder, which is empty or not there, with the chunks that it names and nothing else. At every
    moment one of the two folders has its journal; whoever still writes into the old one finds it no more."""
    write_durably(partial_journal(folder), journal_lines([partial.made_from, *partial.chunks]))
    os.rename(partial.folder, folder)
    partial_journal(partial.folder).unlink()
    for path in set(folder.iterdir()) - {folder / chunk_file_name(index) for index in range(len(partial.chunks))}:
        path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)


# ======================================================================================================================
# The record: progress.json with its journal, checked when read, durable when saved
# ======================================================================================================================

PROGRESS_FORMAT_VERSION = 1
JOURNAL_FORMAT_VERSION = 1
READABLE_ENTRIES = 1000  # up to here progress.json is indented; json's indenting encoder is 10 times slower


class _LaterFields(TypedDict, total=False):
    pairing: int  # of the format, where it is not the first: the rule by which poses were found for frames


class TrajectoryRecord(_LaterFields):
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


class RecordKey(NamedTuple):
    """A key of progress.json and, unless it is derived, an attribute of Progress."""

    types: tuple[type, ...]  # of the value in the file
    initial: Callable[[], Any] = lambda: None  # makes a new record's value
    attribute: str | None = None  # of Progress, where it is not called as the key
    saved: Callable[[Progress], Any] | None = None  # makes the value to save, where it is not the attribute's own
    is_derived: bool = False  # follows from other keys: it is no attribute and is not loaded
    check: Callable[[Any], None] = lambda value: None  # raises ValueError
    is_later: bool = False  # records of the first versions lack it, or have null


class Progress:
    """The record of one cache: what is completed, what failed and why, and the configuration in force.

    Its attributes are those of RECORD_KEYS. Safe to use from the run's main thread and its writer thread. Nothing
    reaches the disk before `save` or `save_spaced`.

    progress.json alone is true at every moment, for whoever does not know of the journal: it names no trajectory whose
    chunks may have been replaced since. Those that a run is to redo, `to_redo`, therefore stand in the journal only,
    while there is one.
    """

    def __init__(self, cache_dir: Path, dataset_name: str | None):
        self.cache_dir = cache_dir
        for key, row in RECORD_KEYS.items():
            if not row.is_derived:
                setattr(self, row.attribute or key, row.initial())
        self.dataset_name = dataset_name
        self.to_redo: set[str] = set()  # completed ones that may be withdrawn soon
        self._count()
        self._lock = threading.RLock()
        self._saves_s = self._last_save_s = self._last_save_end = 0.0
        self.has_journal = False  # what was read had one that belongs to it
        self._journal = Journal(cache_dir / JOURNAL_FILE)
        self._journal_head: tuple[Any, ...] = ()  # what its last head says
        self._saved_update: float | None = None  # last_update of the progress.json saved from here, None before that
        self._changed: dict[str, None] = {}  # trajectories to save or append, in order; of none before the first save
        self._not_in_file: set[str] = set()  # completed ones that it does not name
        self._file_is_untrue = False  # progress.json names a trajectory that was withdrawn or redone

    def _count(self) -> None:
        self.total_chunks = sum(len(record["spans"]) for record in self.records.values())  # of completed trajectories
        self._uses = collections.Counter(record["fingerprint"] for record in self.records.values())

    @property
    def is_begun(self) -> bool:
        """Whether the configuration in force counts: trajectories were made with it."""
        return bool(self.records)

    @property
    def fingerprints(self) -> set[str]:
        """Fingerprints in use; more than one means that the cache is mixed."""
        with self._lock:
            return {fingerprint for fingerprint, count in self._uses.items() if count}

    def complete(self, name: str, checksum: str, record: TrajectoryRecord) -> None:
        """Record a trajectory whose chunks are durable."""
        with self._lock:
            self.forget(name)
            self.failures.pop(name, None)
            self.checksums[name] = checksum
            self.records[name] = record
            self.total_chunks += len(record["spans"])
            self._uses[record["fingerprint"]] += 1
            self.to_redo.discard(name)
            self._changed[name] = None
            self._not_in_file.add(name)

    def fail(self, name: str, failure: Failure) -> None:
        """Record a trajectory as failed, and so no longer as completed."""
        with self._lock:
            self.forget(name)
            self.failures[name] = failure
            self._changed[name] = None

    def forget(self, name: str) -> bool:
        """Un-record a completed trajectory; says whether it was recorded."""
        with self._lock:
            self.checksums.pop(name, None)
            record = self.records.pop(name, None)
            if record is None:
                return False
            self.total_chunks -= len(record["spans"])
            self._uses[record["fingerprint"]] -= 1
            self._changed[name] = None
            self._file_is_untrue |= name not in self._not_in_file
            self._not_in_file.discard(name)
            return True

    def empty(self) -> None:
        """Forget every trajectory and the configuration that they were made with."""
        with self._lock:
            for entries in (self.checksums, self.records, self.failures, self.specs, self.processing_config):
                entries.clear()
            self._count()
            self._file_is_untrue = True  # appending would not say it
            self.weights = None
            self.elapsed_s = 0.0

    def to_json(self) -> dict[str, Any]:
        """The file's content, key by key."""
        return {
            key: getattr(self, row.attribute or key) if row.saved is None else row.saved(self)
            for key, row in RECORD_KEYS.items()
        }

    @classmethod
    def load(cls, cache_dir: Path, *, with_journal: bool = True) -> Progress | None:
        """The record in `cache_dir`, with its journal, or None where there is no progress.json.

        Raises:
            RefusedError: there is one, but it is unreadable, corrupt, unversioned or of a newer version. It is never
                taken for "no progress".
        """
        stored = read_record(cache_dir, with_journal=with_journal)
        return None if stored is None else cls.parse(cache_dir, stored)

    @classmethod
    def parse(cls, cache_dir: Path, stored: StoredRecord) -> Progress:
        """The record that was read from `cache_dir`; RefusedError as for `load`."""
        path = cache_dir / PROGRESS_FILE
        try:
            data = json.loads(stored.text, object_hook=_compact)
            _refuse_newer(path, data, PROGRESS_FORMAT_VERSION)
            _check_progress(data)
        except (ValueError, TypeError, RecursionError) as error:
            raise RefusedError(f"{path}: not a usable progress record: {error}. {_ways_out(cache_dir)}") from error
        progress = cls(cache_dir, data["dataset_name"])
        for key, row in RECORD_KEYS.items():
            if not row.is_derived and key in data:
                setattr(progress, row.attribute or key, data[key])
        progress._count()
        progress._take_journal(stored.journal)
        return progress

    def _take_journal(self, journal: bytes) -> None:
        """Take in the entries that follow progress.json. Those that follow an earlier one are in it already."""
        path, saved_update, follows = self.cache_dir / JOURNAL_FILE, self.last_update, None
        try:
            for number, entry in enumerate(journal_entries(journal), 1):
                if entry is None:
                    if follows is not False:
                        raise ValueError(f"line {number} is damaged")
                elif "follows" in entry:
                    _refuse_newer(path, entry, JOURNAL_FORMAT_VERSION)
                    follows = entry["follows"] == saved_update
                    self.has_journal |= follows
                    self.specs |= entry["specs"] if follows else {}
                    _check_specs(self.specs)
                elif follows:
                    _take_entry(self, entry)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            what = error if isinstance(error, ValueError) else f"an entry is no trajectory's ({error!r})"
            by_hand = f"remove it: without it {PROGRESS_FILE} is true, and what only it holds is redone"
            raise RefusedError(f"{path}: not usable: {what}. {_ways_out(self.cache_dir, by_hand)}") from error

    def save(self, *, keep_old: bool = True) -> None:
        """Write progress.json atomically and durably; the copy before stays as progress.json.bak, if wanted. The
        journal, which it then holds, is removed."""
        with self._lock:
            self._save(set(), keep_old=keep_old)

    def save_spaced(self, run_time_s: float, *, at_once: bool = False) -> None:
        """Save, or append what changed to the journal, where saves would take over 0.2 % of the run's time; then they
        are 1,000 times their duration apart. A power cut loses what was appended in 1,000 fsyncs' time; with `at_once`
        none."""
        with self._lock:
            since_last_s = time.monotonic() - self._last_save_end
            within_share = self._saves_s + self._last_save_s <= SAVE_SHARE * run_time_s
            if within_share or self._saved_update is None:
                self.save()
            elif self._file_is_untrue or since_last_s >= self._last_save_s / (SAVE_SHARE / 2):
                self._save(self.to_redo & self.records.keys())
            elif self._changed:
                self._append(self._changed, self._saved_update)
                self._changed.clear()
            self._journal.sync(at_once=at_once)

    def sync_spaced(self) -> None:
        """Force to the disk what was appended to the journal, if it is time to."""
        with self._lock:
            self._journal.sync()

    def _save(self, left_out: set[str], *, keep_old: bool = True) -> None:
        """Save progress.json; those left out are in the journal, and before it."""
        begin, content, self.last_update = time.monotonic(), self, time.time()
        if left_out:
            self._append(left_out, self.last_update)
            self._journal.sync(at_once=True)
            content = copy.copy(self)
            content.records = {name: record for name, record in self.records.items() if name not in left_out}
            content.checksums = {name: self.checksums[name] for name in content.records}
            content._count()
        indent = 1 if len(content.records) + len(content.failures) <= READABLE_ENTRIES else None
        text = json.dumps(content.to_json(), indent=indent, ensure_ascii=False) + "\n"
        path, backup = self.cache_dir / PROGRESS_FILE, self.cache_dir / BACKUP_FILE if keep_old else None
        write_durably(path, text.encode(errors="backslashreplace"), backup=backup)
        self._saved_update, self._not_in_file, self._file_is_untrue = self.last_update, left_out, False
        self._changed.clear()
        if not left_out:
            self._journal.remove()
            self._journal_head = ()
        self._last_save_end = time.monotonic()
        self._last_save_s = self._last_save_end - begin
        self._saves_s += self._last_save_s

    def _append(self, names: Iterable[str], follows: float) -> None:
        """Append what is known of trajectories to the journal of the progress.json whose last_update is `follows`."""
        head, now = (follows, *self.specs), {"time": time.time(), "elapsed_s": self.elapsed_s}
        entries = [{**self._entry(name), **now} for name in names]
        if head != self._journal_head:
            entries.insert(0, {"format_version": JOURNAL_FORMAT_VERSION, "follows": follows, "specs": self.specs})
        self._journal.append(entries)
        self._journal_head = head

    def _entry(self, name: str) -> dict[str, Any]:
        if name in self.records:
            return {"completed": name, "checksum": self.checksums[name], "record": self.records[name]}
        return {"failed": name, "failure": self.failures[name]} if name in self.failures else {"withdrawn": name}


def _take_entry(progress: Progress, entry: dict[str, Any]) -> None:
    name = entry.get("completed", entry.get("failed", entry.get("withdrawn")))
    _check_texts([name])
    for key in ("time", "elapsed_s"):
        _check_time(entry[key])
    progress.last_update, progress.elapsed_s = entry["time"], entry["elapsed_s"]
    progress.forget(name)
    progress.failures.pop(name, None)
    if "completed" in entry:
        _check_records({name: entry["record"]})
        _check_texts([entry["checksum"]])
        progress.specs[entry["record"]["fingerprint"]]  # KeyError
        progress.complete(name, entry["checksum"], _compact(entry["record"]))
    elif "failed" in entry:
        _check_failures({name: entry["failure"]})
        progress.fail(name, entry["failure"])


def _check_time(value: float) -> None:
    if not 0 <= value < 1e11:  # NaN and what no calendar can show
        raise ValueError(f"is {value}")


def _check_texts(values: list[Any] | dict[str, Any] | None) -> None:
    if not all(isinstance(value, str) for value in (values.values() if isinstance(values, dict) else values or [])):
        raise ValueError("holds something that is not a text")


def _check_specs(specs: dict[str, Any]) -> None:
    for fingerprint, spec in specs.items():
        if not isinstance(spec, dict) or not isinstance(spec.get("frame_pattern"), str):
            raise ValueError(f"holds, as {fingerprint!r}, what is not a configuration")


def _check_weights(weights: dict[str, Any] | None) -> None:
    if weights is not None and not {"source", "size", "mtime", "digest"} <= weights.keys():
        raise ValueError("lacks source, size, mtime or digest")


def _check_records(records: dict[str, Any]) -> None:
    for name, record in records.items():
        _check_fields(name, record, TrajectoryRecord)
        spans, sizes = record["spans"], record["bytes"]
        pairs = all(isinstance(span, list) and len(span) == 2 and all(type(i) is int for i in span) for span in spans)
        if not spans or not pairs or len(spans) != len(sizes) or not all(type(size) is int for size in sizes):
            raise ValueError(f"{name!r}: spans and bytes do not describe chunk files")


def _check_failures(failures: dict[str, Any]) -> None:
    for name, failure in failures.items():
        _check_fields(name, failure, Failure)


_NUMBER = (int, float)
_NULL = type(None)
_FIELD_TYPES = {
    "spans": list, "bytes": list, "pairing": int, "attempts": int, "time": _NUMBER, "checksum": (str, _NULL),
}  # fmt: skip


def _check_fields(name: str, entry: Any, shape: type) -> None:
    for field in shape.__annotations__:
        if field in shape.__optional_keys__ and isinstance(entry, dict) and field not in entry:
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get(field, ...), _FIELD_TYPES.get(field, str)):
            raise ValueError(f"{name!r}: {field} is missing or has the wrong type")


def _specs_in_use(progress: Progress) -> dict[str, dict[str, Any]]:
    in_use = progress.fingerprints
    return {fingerprint: spec for fingerprint, spec in progress.specs.items() if fingerprint in in_use}


def _derived(types: tuple[type, ...], value: Callable[[Progress], Any], **more: Any) -> RecordKey:
    return RecordKey(types, saved=value, is_derived=True, **more)


# Loading, checking and saving follow from these rows, which stand in the order of the file: a new key is a new row.
RECORD_KEYS: dict[str, RecordKey] = {
    "format_version": _derived((int,), lambda progress: PROGRESS_FORMAT_VERSION),
    "dataset_name": RecordKey((str, _NULL)),
    "start_time": RecordKey(_NUMBER, time.time, check=_check_time),  # epoch seconds
    "last_update": RecordKey(_NUMBER, time.time, check=_check_time),
    "elapsed_s": RecordKey(_NUMBER, float, check=_check_time),  # working time of all runs
    "total_chunks": _derived((int,), lambda progress: progress.total_chunks),
    # Where the last run read, in which format, and how many trajectories it knew of, those present and those recorded;
    # for people, nothing is decided by them.
    "data_folder": RecordKey((str, _NULL), is_later=True),
    "data_format": RecordKey((str, _NULL), is_later=True),
    "num_trajectories": RecordKey((int, _NULL), is_later=True),
    # Where the caches of the same config's other datasets are: where one of them is gone entirely, a run asks.
    "other_caches": RecordKey((list, _NULL), check=_check_texts, is_later=True),
    "checksum_kind": RecordKey((str,), lambda: "stat"),
    "rebuild_started": RecordKey((*_NUMBER, _NULL)),
    "recut_started": RecordKey((*_NUMBER, _NULL), is_later=True),
    "processing_config": RecordKey((dict,), dict),
    "weights": RecordKey((dict, _NULL), check=_check_weights),  # source, size, mtime, digest
    "specs": RecordKey((dict,), dict, saved=_specs_in_use, check=_check_specs),  # fingerprint -> spec
    "completed_trajectories": _derived((list,), lambda progress: list(progress.records), check=_check_texts),
    "failed_trajectories": _derived((list,), lambda progress: list(progress.failures), check=_check_texts),
    "trajectory_checksums": RecordKey((dict,), dict, attribute="checksums", check=_check_texts),
    "trajectory_records": RecordKey((dict,), dict, attribute="records", check=_check_records),
    "failures": RecordKey((dict,), dict, check=_check_failures),
}


class StoredRecord(NamedTuple):
    text: str  # of progress.json; its bytes as well would be much to hold while it is parsed
    journal: bytes  # empty where there is none


def read_record(cache_dir: Path, *, with_journal: bool = True) -> StoredRecord | None:
    """The record in `cache_dir`, or None where there is none; RefusedError where it cannot be read."""
    path = cache_dir / PROGRESS_FILE
    for _ in range(10):  # a run may save it between the two files
        stamp = _file_stamp(path)
        content = _read_or_none(path)
        journal = _read_or_none(cache_dir / JOURNAL_FILE) if with_journal else None
        if _file_stamp(path) == stamp:
            break
    if content is None:
        return None
    try:
        return StoredRecord(content.decode("utf-8"), journal or b"")
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path}: not a usable progress record: {error}. {_ways_out(cache_dir)}") from error


def _read_or_none(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not path.is_symlink():
            return None
        raise RefusedError(f"{path}: cannot read: {error.strerror}. {_ways_out(path.parent)}") from error


def _file_stamp(path: Path) -> tuple[int, ...] | None:
    """What tells a file from the one that was there before it; None where there is none."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_mtime_ns, status.st_ino, status.st_size
    return None


def _compact(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry that takes less memory: texts of a million others are shared, and lists have no room to grow."""
    for key in ("fingerprint", "checksum_kind"):
        if type(entry.get(key)) is str:
            entry[key] = sys.intern(entry[key])
    if "spans" in entry and "bytes" in entry:
        entry["spans"], entry["bytes"] = [span[:] for span in entry["spans"]], entry["bytes"][:]
    return entry


def _refuse_newer(path: Path, data: Any, known: int) -> None:
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is int and version > known:
        raise RefusedError(
            f"{path}: format_version is {version}, this program knows {known}: a newer dino_cache made it. Update the "
            "program. Nothing was changed"
        )


def _check_progress(data: Any) -> None:
    """Raise ValueError, naming the key, unless `data` is a progress record of this version that agrees with itself."""
    if not isinstance(data, dict) or "format_version" not in data:
        raise ValueError("it has no format_version")
    version = data["format_version"]
    if version != PROGRESS_FORMAT_VERSION:
        raise ValueError(f"format_version is {version!r}, this program knows {PROGRESS_FORMAT_VERSION}")
    for key, row in RECORD_KEYS.items():
        if key not in data and not row.is_later:
            raise ValueError(f"key {key} is missing")
        if key in data:
            _check_key(key, row, data[key])
    _check_agreement(data)


def _check_key(key: str, row: RecordKey, value: Any) -> None:
    if not isinstance(value, row.types) or isinstance(value, bool):
        raise ValueError(f"key {key} has the wrong type ({type(value).__name__})")
    try:
        row.check(value)
    except ValueError as error:
        raise ValueError(f"key {key}: {error}") from error


def _check_agreement(data: dict[str, Any]) -> None:
    """Raise ValueError where two keys contradict each other."""
    records, failures = data["trajectory_records"], data["failures"]
    for names, others in (
        ("completed_trajectories", "trajectory_records"),
        ("trajectory_checksums", "trajectory_records"),
        ("failed_trajectories", "failures"),
    ):
        if set(data[names]) != set(data[others]):
            raise ValueError(f"{names} and {others} name different trajectories")
    if both := set(records) & set(failures):
        raise ValueError(f"{min(both)!r} is both completed and failed")
    for name, record in records.items():
        if record["fingerprint"] not in data["specs"]:
            raise ValueError(f"trajectory_records[{name!r}]: fingerprint {record['fingerprint']!r} is not in specs")


def _ways_out(cache_dir: Path, by_hand: str = f"put {BACKUP_FILE} in its place") -> str:
    command = f"{program_name('progress_utils.py')} {{}} --cache-dir {cache_dir}"
    return (
        f"Nothing was changed. Ways out: `{command.format('rebuild')}` makes the record anew from the chunk files; or "
        f"{by_hand}; or `{command.format('reset')}` starts afresh and redoes every trajectory. Both commands keep the "
        "file aside"
    )


# ======================================================================================================================
# Showing and resetting the record
# ======================================================================================================================

SHOWN_FAILURES = 10
WATCH_INTERVAL_S = 2.0
MOST_RUN_BYTES = 1_000_000  # of a line of runs.jsonl


def recorded_caches(cache_dir: Path) -> list[str]:
    """Where the caches of the same config's other datasets were, as the record in `cache_dir` says."""
    try:
        progress = Progress.load(cache_dir)
    except RefusedError:  # said where that dataset is prepared
        return []
    return (progress and progress.other_caches) or []


def load_or_refuse(cache_dir: Path) -> Progress:
    """The record in `cache_dir`; RefusedError where there is none."""
    return Progress.parse(cache_dir, read_or_refuse(cache_dir))


def read_or_refuse(cache_dir: Path) -> StoredRecord:
    """The record in `cache_dir` as it lies there; RefusedError where there is none."""
    stored = read_record(cache_dir)
    if stored is None:
        near = [str(path.parent) for path in sorted(cache_dir.glob(f"*/{PROGRESS_FILE}"))[:3]]
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        if owner := lock_owner(cache_dir):
            hint = f". A run is at work ({owner}) and has recorded nothing yet"
        raise RefusedError(f"{cache_dir}: no {PROGRESS_FILE} here; a cache is the folder that holds it{hint}")
    return stored


def show(cache_dir: Path, *, as_json: bool, show_all: bool) -> int:
    """Print the state of one cache."""
    progress = load_or_refuse(cache_dir)
    if as_json:
        mixed = len(progress.fingerprints) > 1
        print(json.dumps({"cache_dir": str(cache_dir), "mixed": mixed, **progress.to_json()}, ensure_ascii=False))
        return 0
    configuration = [f"  {key}: {value}" for key, value in progress.processing_config.items()]
    lines = [*_status_lines(progress, waiting_in_shards(cache_dir, progress.records)), ""]
    print_lines(*lines, "Processing Configuration:", *configuration, *_failure_lines(progress.failures, show_all))
    return 0


def waiting_in_shards(cache_dir: Path, recorded: Container[str]) -> str | None:
    """A line on the trajectories that shards completed and the cache's record, which has those `recorded`, does not
    have yet; None where no shard waits. A redone one was withdrawn from that record before."""
    count, unusable, waiting = 0, [], unmerged_shards(cache_dir)
    for shard, folder in waiting.items():
        try:
            progress = Progress.load(folder)  # None: it was merged just now
            count += sum(name not in recorded for name in (progress.records if progress else ()))
        except RefusedError:
            unusable.append(str(shard))
    if not waiting:
        return None
    how = f"{progress_command(f'merge --cache-dir {cache_dir}')} or the next run without --shard brings them in"
    bad = f"; the records of shards {human_list(unusable)} cannot be read" if unusable else ""
    return f"{count} completed trajectories wait in {len(waiting)} unmerged shards: {how}{bad}"


def watch(cache_dir: Path, *, every_s: float, show_all: bool) -> int:
    """Print the state of one cache again and again, until Ctrl-C: in place on a terminal, else whenever it changed."""
    record, in_place, before = _WatchedRecord(cache_dir), sys.stdout.isatty(), None
    try:
        _await_record(cache_dir, every_s)
        while console_error("stdout") is None:  # else nobody watches any more
            progress, waiting = record.load()
            lines = [*_status_lines(progress, waiting), *_failure_lines(progress.failures, show_all)]
            if in_place:
                _print_in_place(lines, is_first=before is None)
            elif lines != before:
                print_lines(*lines, "")
            before = lines
            time.sleep(every_s)
    except KeyboardInterrupt:
        pass
    return 0


def _await_record(cache_dir: Path, every_s: float) -> None:
    """Wait while a run holds a cache that has no record yet: it loads weights and reads poses before the first.

    Raises:
        RefusedError: there is no record, and no run that would make one; or it is unreadable.
    """
    is_told = False
    while read_record(cache_dir, with_journal=False) is None and (owner := lock_owner(cache_dir)) is not None:
        if not is_told:
            print_lines(
                f"{cache_dir}: a run is at work ({owner}) and has recorded nothing yet; waiting", file=sys.stderr
            )
        is_told = True
        time.sleep(every_s)
    load_or_refuse(cache_dir)


class _WatchedRecord:
    """A record, and what waits in shards, read again when a file changed, and not for more than a tenth of the time."""

    def __init__(self, cache_dir: Path):
        self._cache_dir = cache_dir
        self._progress: Progress | None = None
        self._waiting: str | None = None
        self._stamp: list[tuple[int, ...] | None] = []
        self._not_before = 0.0

    def load(self) -> tuple[Progress, str | None]:
        begin, folders = time.monotonic(), [self._cache_dir, *unmerged_shards(self._cache_dir).values()]
        stamp = [_file_stamp(folder / name) for folder in folders for name in (PROGRESS_FILE, JOURNAL_FILE)]
        if self._progress is None or (stamp != self._stamp and begin >= self._not_before):
            self._progress, self._stamp = load_or_refuse(self._cache_dir), stamp
            self._waiting = waiting_in_shards(self._cache_dir, self._progress.records)
            self._not_before = begin + 10 * (time.monotonic() - begin)
        return self._progress, self._waiting


def _print_in_place(lines: list[str], *, is_first: bool) -> None:
    """Print over what was printed before, as much of it as fits into the terminal."""
    width, height = os.get_terminal_size(sys.stdout.fileno())
    width, height = max(width - 1, 20), max(height - 1, 10)  # some terminals say 0
    parts = [part for line in lines for part in textwrap.wrap(printable(line), width, subsequent_indent="  ") or [""]]
    shown = parts[:height]
    clear, home, to_line_end, to_screen_end = "\x1b[2J", "\x1b[H", "\x1b[K", "\x1b[J"
    text = "".join(f"{line}{to_line_end}\n" for line in shown)
    print(f"{clear if is_first else ''}{home}{text}{to_screen_end}", end="", flush=True)


def _status_lines(progress: Progress, waiting: str | None) -> list[str]:
    return [
        f"📊 Progress Status for {progress.cache_dir}",
        "=" * 60,
        f"Dataset: {progress.dataset_name}",
        f"Completed trajectories: {len(progress.records)}",
        f"Failed trajectories: {len(progress.failures)}",
        f"Total chunks generated: {progress.total_chunks}",
        f"Processing time: {progress.elapsed_s / 3600:.1f} hours",
        f"Last update: {time.ctime(progress.last_update)}",
        _summary_line(progress),
        *_run_lines(progress.cache_dir),
        *state_remarks(progress),
        *([waiting] if waiting else []),
    ]


def _summary_line(progress: Progress) -> str:
    """How much is done, how large it is and how the last run went, as far as that is recorded."""
    completed, failed, total = len(progress.records), len(progress.failures), progress.num_trajectories
    counts = f"{completed} completed, {failed} failed"
    if total is not None:
        total = max(total, completed)  # failed ones that are gone from the data are not among them
        counts = f"{completed} of {total}, {failed} failed, {max(0, total - completed - failed)} pending"
    size = human_bytes(sum(sum(record["bytes"]) for record in progress.records.values()))
    return "; ".join([f"Done: {counts}", size, *_last_run(progress.cache_dir)])


def _last_run(cache_dir: Path) -> list[str]:
    """How long the last run took and how fast it was, of the last line of runs.jsonl; nothing where it does not say."""
    with contextlib.suppress(OSError, ValueError, LookupError, TypeError):
        if not (cache_dir / RUNS_FILE).is_file():  # a pipe would be waited for
            return []
        with open(cache_dir / RUNS_FILE, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - MOST_RUN_BYTES))
            run = json.loads(file.read().splitlines()[-1])
        took = f"last run {human_duration(run['seconds'])}"
        return [f"{took} at {run['frames_per_s']:.1f} frames/s" if run.get("frames_per_s") else took]
    return []


def _run_lines(cache_dir: Path) -> list[str]:
    """What is known of a run at work, or of one that was killed."""
    lines = []
    for shard, owner in shards_at_work(cache_dir).items():
        lines.append(f"Shard {shard} at work: {owner.name}")
        lines += [owner.run.line()] if owner.run is not None else []
    owner = None if lines else read_lock_owner(cache_dir)
    if owner is None:
        return lines
    if owner.is_stale:
        how = "not heard of since" if owner.is_alive else "killed; last heard of"
        return [f"⚠️ Stale: a run ({owner.name}) was {how} {time.ctime(owner.last_heartbeat)}"]
    lines = [f"Run at work: {owner.name}"]
    if owner.run is not None:
        lines += [owner.run.line(), f"Trajectory in work: {owner.run.trajectory}"]
        lines += [line] if (line := owner.run.frames_line()) else []
    return lines


def state_remarks(progress: Progress) -> list[str]:
    remarks = []
    if progress.recut_started is not None:
        remarks.append(f"Re-cut under way since {time.ctime(progress.recut_started)}: the next run goes on with it")
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
    for name, failure in list(failures.items())[:shown]:
        lines.append(f"  - {name}: {failure['reason'].removeprefix(f'{name}: ')}")  # the name once
    return lines + [f"  ... and {len(failures) - shown} more"] * (len(failures) > shown)


def list_caches(root: Path, *, as_json: bool) -> int:
    """Print one line for every cache below `root`; exit code 1 where a record is unreadable."""
    if not root.is_dir():
        raise RefusedError(f"{root}: no such folder; --root takes the folder to search")
    rows = [_cache_row(cache_dir) for cache_dir in find_caches(root)]
    if as_json:
        print(json.dumps(rows, ensure_ascii=False))
    elif not rows:
        print_lines(f"No caches below {root}")
    else:
        _print_table(rows)
        for row in rows:
            if "waiting" in row:
                print_lines(f"{row['cache_dir']}: {row['waiting']}")
    return 1 if any("error" in row for row in rows) else 0


def find_caches(root: Path) -> Iterator[Path]:
    """Folders below `root` that hold a progress.json, in order; nothing below one of them is searched."""
    for folder, subfolders, files in os.walk(root):
        subfolders.sort()
        if PROGRESS_FILE in files or PROGRESS_FILE in subfolders:
            subfolders.clear()
            yield Path(folder)
        elif SHARDS_FOLDER in subfolders:
            subfolders.remove(SHARDS_FOLDER)


def _cache_row(cache_dir: Path) -> dict[str, Any]:
    try:
        progress = load_or_refuse(cache_dir)
    except RefusedError as error:
        return {"cache_dir": str(cache_dir), "error": str(error)}
    total, owner = progress.num_trajectories, read_lock_owner(cache_dir)
    waiting = waiting_in_shards(cache_dir, progress.records)
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
        **({"waiting": waiting} if waiting else {}),
    }


_TABLE_HEAD = ("Dataset", "Completed", "Done", "Failed", "Chunks", "Size", "State", "Last update", "Cache folder")
_NUMBER_COLUMNS = range(1, 6)


def _print_table(rows: list[dict[str, Any]]) -> None:
    lines = [tuple(map(printable, line)) for line in (_TABLE_HEAD, *map(_table_line, rows))]
    if sys.stdout.isatty() and is_there(NARROW_TABLE_MODULE):
        print_lines(*open_door(NARROW_TABLE_MODULE).fitted(lines, shutil.get_terminal_size().columns))
    else:
        print_lines(*in_columns(lines))


def in_columns(lines: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table whose cells stand below each other."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    return [
        "  ".join(
            cell.rjust(width) if column in _NUMBER_COLUMNS else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    ]


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
    with edit_lock(cache_dir):
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
        for partial in find_partials(cache_dir / STAGING_FOLDER):  # all is redone, and so are these
            partial_journal(partial.folder).unlink()
        Progress(cache_dir, dataset_name).save(keep_old=False)
    print_lines(f"Reset {cache_dir}; the old record is {kept.name}")
    return 0


def set_aside(cache_dir: Path, why: str) -> Path:
    """Give the present record a new name too, progress.json.<why>-<time>, and its journal that and .journal.

    Raises:
        RefusedError: something that is no file has the journal's name, which a save would not get rid of.
    """
    journal = cache_dir / JOURNAL_FILE
    if os.path.lexists(journal) and not journal.is_file():
        raise RefusedError(f"{journal}: is no file of this program's; remove it. Nothing was changed")
    stem = f"{PROGRESS_FILE}.{why}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{count}" for count in itertools.count(2)))
    kept = next(cache_dir / name for name in names if not os.path.lexists(cache_dir / name))
    pairs = [(cache_dir / PROGRESS_FILE, kept), *([(journal, Path(f"{kept}.journal"))] if journal.is_file() else [])]
    for path, second in pairs:
        try:
            os.link(path, second)
        except OSError:  # no hard links here, or a folder, which is refused
            shutil.copyfile(path, second)
            fsync_path(second)
    return kept


def reset_failed(cache_dir: Path) -> int:
    """Forget failures and their attempts, so that the next run tries those trajectories again."""
    load_or_refuse(cache_dir)
    with edit_lock(cache_dir):
        progress = load_or_refuse(cache_dir)  # again: a run may have ended in between
        count = len(progress.failures)
        progress.failures.clear()
        if count:
            progress.save()
    print_lines(f"Forgot {count} failed trajectories; the next run tries them again")
    return 0


def ask(question: str, *, otherwise: str) -> bool:
    """Ask on the terminal; the default is no. RefusedError as for `ask_for_answer`."""
    return ask_for_answer(question, otherwise=otherwise) in ("y", "yes")


def ask_for_answer(question: str, *, otherwise: str) -> str:
    """What is answered on the terminal, in small letters.

    Raises:
        RefusedError: there is no terminal to ask on; the message names the option that answers, `otherwise`.
    """
    if not sys.stdin or not sys.stdin.isatty():
        raise RefusedError(
            f"{question} There is no terminal to ask on: give {otherwise} to go ahead. Nothing was changed."
        )
    print(f"{printable(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # a terminal that is gone says no
        return sys.stdin.readline().strip().lower()
    return "n"


# ======================================================================================================================
# Command line
# ======================================================================================================================


class CommandModule(NamedTuple):
    """A command of dino_cache_extras; its module defines add_arguments(parser) and run(arguments) -> exit code."""

    module: str
    summary: str
    example: str


NAMED_CACHES_MODULE = "dino_cache_extras.commands.named_caches"  # finds those of a configuration
NARROW_TABLE_MODULE = "dino_cache_extras.commands.narrow_table"  # fits the list of caches into a terminal
HISTORY_MODULE = "dino_cache_extras.run_history"  # what show --runs prints
COMMAND_MODULES = {
    "verify": CommandModule(
        "dino_cache_extras.commands.verify", "Check the chunk files against the record.", "--cache-dir D --deep"
    ),
    "rebuild": CommandModule(
        "dino_cache_extras.commands.rebuild", "Make the record anew from the chunk files.", "--cache-dir D"
    ),
    "export": CommandModule(
        "dino_cache_extras.commands.export", "Write a cache in another layout.", "--cache-dir D --to flat -o robot.h5"
    ),
    "report": CommandModule(
        "dino_cache_extras.commands.report", "Write one HTML file to look at.", "--cache-dir D -o report.html"
    ),
    "prune": CommandModule(
        "dino_cache_extras.commands.prune", "Remove what the data no longer have, and leftovers.", "--config my.yaml"
    ),
    "merge": CommandModule(
        "dino_cache_extras.commands.merge", "Take the records of shards into the cache's own.", "--config my.yaml"
    ),
}


def build_parser(asked_for: str | None = None) -> argparse.ArgumentParser:
    """The command line: one subcommand an action. Of those in COMMAND_MODULES only the module of the one asked for is
    opened; RefusedError where it cannot be."""
    parser = argparse.ArgumentParser(
        prog=program_name("progress_utils.py"),
        description="Read and edit the progress record of a dino_cache.",
        epilog=example("progress_utils.py", "show --cache-dir /data/my_robot/dino_cache_large"),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dino_cache {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, summary: str, arguments: str) -> argparse.ArgumentParser:
        about = {"help": summary, "description": summary, "epilog": example("progress_utils.py", f"{name} {arguments}")}
        return commands.add_parser(name, **about, allow_abbrev=False)

    _add_show(command("show", "Print the state of one cache.", "--cache-dir D"))
    _add_list(command("list", "List the caches below a folder.", "--root /data"))
    _add_reset(command("reset", "Start the record afresh, so that every trajectory is redone.", "--cache-dir D --yes"))
    _add_reset_failed(command("reset-failed", "Forget failures, so that they are tried again.", "--cache-dir D"))
    for name, (module, summary, arguments) in COMMAND_MODULES.items():
        subparser = command(name, summary, arguments)
        if name == asked_for:
            door = open_door(module)
            door.add_arguments(subparser)
            subparser.set_defaults(run=door.run)
    return parser


def add_cache_dir(parser: argparse.ArgumentParser) -> None:
    """How every command on a cache is told which; `_run_on_cache` puts it into `cache_dir`."""
    parser.add_argument("cache", type=Path, nargs="?", metavar="CACHE", help="the folder that holds progress.json")
    parser.add_argument("--cache-dir", type=Path, metavar="D", help="the same, as an option")
    parser.add_argument("--config", type=Path, metavar="FILE", help="the cache of this configuration instead")
    parser.add_argument("--dataset", metavar="NAME", help="of this dataset of the configuration")


def _run_on_cache(arguments: argparse.Namespace) -> int:
    """Run a command on the cache that the command line names. RefusedError where it names none, or several ways."""
    ways = [way for way in (arguments.cache, arguments.cache_dir, arguments.config) if way is not None]
    if len(ways) != 1:
        what = "names its cache more than once" if ways else "needs a cache"
        raise RefusedError(f"{arguments.command}: {what}: give its folder, or --config FILE [--dataset NAME]")
    if arguments.config is not None:
        return open_door(NAMED_CACHES_MODULE).run_on_caches(arguments)
    (path,) = ways
    if arguments.dataset is not None:
        raise RefusedError(f"--dataset {arguments.dataset}: goes with --config FILE")
    if path.suffix in (".yaml", ".yml") and path.is_file():
        raise RefusedError(f"{path}: is a configuration, not a cache: give it as --config {path}")
    is_record = path.name == PROGRESS_FILE and not (path / PROGRESS_FILE).exists()
    arguments.cache_dir = path.parent if is_record else path
    if arguments.cache_dir.parent.name == SHARDS_FOLDER and arguments.command != "show":
        raise RefusedError(f"{path}: is a shard of a cache: name the cache, {arguments.cache_dir.parent.parent}")
    return arguments.run(arguments)


def _add_show(parser: argparse.ArgumentParser) -> None:
    add_cache_dir(parser)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print the whole record, or the runs, as JSON")
    parser.add_argument("--runs", action="store_true", help="print what the last runs came to, a line a run")
    how.add_argument(
        "--watch", type=_seconds, nargs="?", const=WATCH_INTERVAL_S, metavar="SECONDS",
        help=f"show it anew every so often (default: {WATCH_INTERVAL_S:g} s) until Ctrl-C, also while a run works; "
        "into a file or pipe, whenever it changed",
    )  # fmt: skip
    parser.add_argument("--all", action="store_true", help="print all failures, not just the first ten")
    parser.set_defaults(run=_run_show)


def _run_show(arguments: argparse.Namespace) -> int:
    if arguments.runs:
        if arguments.watch is not None:
            raise RefusedError("--runs goes with --json, not with --watch")
        return open_door(HISTORY_MODULE).show_runs(arguments.cache_dir, as_json=arguments.json)
    if arguments.watch is not None:
        return watch(arguments.cache_dir, every_s=arguments.watch, show_all=arguments.all)
    return show(arguments.cache_dir, as_json=arguments.json, show_all=arguments.all)


def _add_list(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--root", type=Path, default=Path("."), help="the folder to search (default: here)")
    parser.add_argument("--json", action="store_true", help="print the list as JSON")
    parser.set_defaults(run=lambda arguments: list_caches(arguments.root, as_json=arguments.json))


def _add_reset(parser: argparse.ArgumentParser) -> None:
    add_cache_dir(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")
    parser.set_defaults(run=lambda arguments: reset(arguments.cache_dir, yes=arguments.yes))


def _add_reset_failed(parser: argparse.ArgumentParser) -> None:
    add_cache_dir(parser)
    parser.set_defaults(run=lambda arguments: reset_failed(arguments.cache_dir))


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds; a cache stands before --watch") from None
    if not 0 < seconds < 1e6:
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds above 0")
    return seconds


PRINTING_COMMANDS = ("show", "list", "verify")  # whose output is the work: one that cannot be written was not done


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    gc.set_threshold(*GC_THRESHOLDS)
    set_up_console()
    asked_for = next((argument for argument in argv if not argument.startswith("-")), None)
    code = _run_command(asked_for, argv)
    sys.stdout.flush()
    error = console_error("stdout")
    if code == 0 and asked_for in PRINTING_COMMANDS and error is not None and not isinstance(error, BrokenPipeError):
        print_lines(f"error: cannot write to the standard output: {error}", file=sys.stderr)
        return 2
    return code  # after a broken pipe too: `show | head` has seen enough


def _run_command(asked_for: str | None, argv: list[str]) -> int:
    try:
        if asked_for in COMMAND_MODULES:  # they look for trajectories by name
            refuse_locale()
        arguments = build_parser(asked_for).parse_args(argv)
        return _run_on_cache(arguments) if hasattr(arguments, "cache") else arguments.run(arguments)
    except DinoCacheError as error:
        first, *more = error.args
        print_lines(f"error: {first}", *more, file=sys.stderr)
        return error.exit_code
    except ImportError as error:
        print_lines(f"error: {missing_library(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print_lines(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    import progress_utils  # under its own name: what it opens raises the errors that this main catches

    sys.exit(progress_utils.main())
