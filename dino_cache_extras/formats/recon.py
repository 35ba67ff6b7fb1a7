"""RECON: an HDF5 file a trajectory, JPEG bytes inside, read in a process of its own."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import queue
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from dino_cache import (
    KEY_SETTINGS,
    LOST_MOUNT_ERRNOS,
    MAX_POSE_NUMBERS,
    PROFILE,
    CacheSpec,
    ChecksumKind,
    DataKeys,
    FolderFiles,
    Format,
    FrameReader,
    InputError,
    Poses,
    Trajectory,
    checked_numbers,
    checked_position,
    open_regular,
    recordable_name,
)
from progress_utils import RefusedError

HDF5_PROCESSES = 4  # processes that read others' HDF5 files, at most
HDF5_TIMEOUT_S = 30  # time in which such a process must answer
HDF5_MEMORY_BYTES = 4 << 30  # memory that such a process may take
RECON_KEYS = ("images/rgb_left", "jackal/position", "jackal/yaw")
RECON_SUFFIX = ".hdf5"


def find_recon(data_folder: Path, spec: CacheSpec) -> Iterator[Trajectory]:
    """The .hdf5 files in `data_folder`, sorted; a trajectory's name is its file's, up to the first dot.

    Raises:
        RefusedError: `data_folder` cannot be listed.
    """
    try:
        file_names = sorted(os.listdir(data_folder))
    except OSError as error:
        raise RefusedError(f"data_folder {data_folder}: cannot list it: {error.strerror}") from error
    for file_name in file_names:
        if file_name.endswith(RECON_SUFFIX) and not file_name.startswith("."):
            yield Trajectory(recordable_name(file_name.partition(".")[0]), data_folder / file_name, format="recon")


def locate_recon(data_folder: Path, name: str) -> Trajectory:
    """The file of that name; InputError where there is none."""
    for trajectory in find_recon(data_folder, CacheSpec()):
        if trajectory.name == name:
            return trajectory
    raise InputError(f"{data_folder} has no {name}*{RECON_SUFFIX}")


class ReconSource:
    """recon: image bytes and poses, row by row, in one HDF5 file."""

    def __init__(self, trajectory: Trajectory, keys: DataKeys):
        self._trajectory = trajectory
        self._where = f"{trajectory.name} ({recordable_name(trajectory.path.name)})"
        given = (keys.image_key, keys.position_key, keys.yaw_key)
        self._keys = [key or default for key, default in zip(given, RECON_KEYS)]
        self._size = os.stat(trajectory.path).st_size

    @functools.cached_property
    def _content(self) -> tuple[int, dict[str, np.ndarray]]:
        """The number of images, and the poses by key."""
        return self._ask(None)

    def _ask(self, rows: list[int] | None) -> Any:
        return HDF5_READERS.read(self._where, (os.fspath(self._trajectory.path), self._keys, rows))

    def checksum(self, kind: ChecksumKind) -> str:
        """Over the poses and the file's size (`stat`), or over the file's bytes (`content`)."""
        digest = hashlib.sha256(f"{kind} {self._keys} {self._size}".encode())
        if kind == "content":
            with open(open_regular(self._trajectory.path), "rb") as file:
                digest = hashlib.file_digest(file, lambda: digest)
        else:
            for values in self._content[1].values():
                digest.update(np.ascontiguousarray(values))
        return digest.hexdigest()[:16]

    def poses(self, *, required: bool) -> Poses:
        count, poses = self._content
        _, position_key, yaw_key = self._keys
        position = checked_position(self._where, poses, position_key)
        yaw = checked_numbers(self._where, poses, yaw_key, len(position))
        if count != len(position):
            raise InputError(f"{self._where}: {count} images in {self._keys[0]} but {len(position)} poses")
        return Poses(np.arange(count, dtype=np.int64), position, yaw)

    def open_frames(self, numbers: Sequence[int]) -> FrameReader:
        return self

    def name(self, number: int) -> str:
        return f"{self._where} {self._keys[0]}[{number}]"

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        with PROFILE("read"):
            images = self._ask(list(numbers))
        yield from (np.frombuffer(bytearray(data), np.uint8) for data in images)

    def close(self) -> None:
        """Nothing stays open."""


class Hdf5Process:
    """A process that reads files for this one: damaged HDF5 metadata can crash the library, or keep it in a loop. It
    imports numpy and h5py, not torch, and ends when this process does."""

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        here = os.fspath(Path(__file__).resolve().parents[2])
        serve = f"from {__name__} import serve_hdf5; serve_hdf5({theirs.fileno()})"
        code = f"import sys; sys.path.insert(0, {here!r}); {serve}"
        command = [sys.executable, "-c", code]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()], start_new_session=True,
        )  # fmt: skip
        theirs.close()

    def ask(self, request: tuple) -> tuple[str, Any]:
        """Its answer. Raises TimeoutError where it takes too long, EOFError or ConnectionError where it died."""
        self._connection.send(request)
        if not self._connection.poll(HDF5_TIMEOUT_S):
            raise TimeoutError(errno.EIO, f"HDF5 gave no answer in {HDF5_TIMEOUT_S} s")
        return self._connection.recv()

    def end(self) -> int:
        """Kill it; its exit status, negative where a signal ended it."""
        self._connection.close()
        try:
            return self._process.wait(0.2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


class Hdf5Readers:
    """At most so many Hdf5Process, each started when it is first needed and replaced when it dies."""

    def __init__(self, count: int):
        self._idle: queue.LifoQueue[Hdf5Process | None] = queue.LifoQueue()
        for _ in range(count):
            self._idle.put(None)

    def read(self, where: str, request: tuple) -> Any:
        """What `read_recon` returns for the request; `where` is for messages.

        Raises:
            InputError: the file is damaged, lacks a key, or crashes HDF5 twice.
            OSError: it cannot be opened or read, or HDF5 does not come to an end with it.
        """
        process = self._idle.get()
        try:
            for is_last in (False, True):
                process = process or Hdf5Process()
                try:
                    kind, value = process.ask(request)
                    break
                except TimeoutError:
                    process.end()
                    process = None
                    raise
                except (EOFError, ConnectionError) as error:
                    status, process = process.end(), None
                    if is_last:
                        raise InputError(f"{where}: HDF5 crashed on it (exit status {status})") from error
        finally:
            self._idle.put(process)
        if kind == "error":
            raise OSError(*value)
        if kind == "fault":
            raise InputError(f"{where}: {value}")
        return value


HDF5_READERS = Hdf5Readers(HDF5_PROCESSES)


def serve_hdf5(descriptor: int) -> None:
    """Answer the requests that come from the process at the other end, until it goes away. Runs in a Hdf5Process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # of the whole group: the run ends itself, and this with it
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_DATA, (HDF5_MEMORY_BYTES, HDF5_MEMORY_BYTES))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    connection = multiprocessing.connection.Connection(descriptor)
    while True:
        try:
            request = connection.recv()
        except EOFError:
            return
        connection.send(_answer(request))


def _answer(request: tuple) -> tuple[str, Any]:
    """("value", what read_recon returns), ("error", an OSError's arguments) or ("fault", what is wrong with a file)."""
    try:
        return "value", read_recon(*request)
    except Exception as error:  # of damaged bytes, h5py makes all sorts
        reason = " ".join(str(error).split()) or type(error).__name__
        code, number = getattr(error, "errno", None), re.search(r"errno = (\d+)", reason)
        if code is None and number and int(number[1]) in LOST_MOUNT_ERRNOS:
            code = int(number[1])  # of a read, h5py puts the system's error only into its text
        return ("error", (code, f"{request[0]}: {reason}")) if code else ("fault", f"cannot read it: {reason}")


def read_recon(path: str, keys: list[str], rows: list[int] | None) -> Any:
    """Without rows, the number of images and the poses by key; else those images' bytes. Runs in a Hdf5Process.

    Raises:
        InputError, OSError, or whatever h5py makes of damaged bytes.
    """
    os.close(open_regular(path))
    with h5py.File(path, "r", locking=False) as file:
        images, *poses = (_recon_dataset(file, key) for key in keys)
        if rows is not None:
            return [_image_bytes(value) for value in images[rows]]
        if any(values.size > MAX_POSE_NUMBERS for values in poses):
            raise InputError(f"{keys[1:]} hold more than {MAX_POSE_NUMBERS} numbers")
        return len(images), {key: values[...] for key, values in zip(keys[1:], poses)}


def _recon_dataset(file: h5py.File, key: str) -> h5py.Dataset:
    dataset = file.get(key)
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim == 0:
        names: list[str] = []
        file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
        raise InputError(f"has no {key}; its keys are {', '.join(names)[:500]}")
    if dataset.file.filename != file.filename or dataset.external or dataset.is_virtual:
        raise InputError(f"{key} lies in another file; what a file refers to is not read")
    return dataset


def _image_bytes(value: Any) -> bytes:
    """The bytes of one image, of fixed length, of variable length, or a padded row of numbers."""
    if isinstance(value, bytes):
        return value
    array = np.asarray(value)
    if array.dtype.kind != "V" and array.dtype not in (np.uint8, np.int8):
        raise InputError(f"its images are {array.dtype} values, expected bytes")
    return array.tobytes()


def _signs(folder: FolderFiles, is_top: bool) -> list[str]:
    return [file for file in folder.files if file.endswith(RECON_SUFFIX)][:1] if is_top else []


FORMAT = Format(
    find=find_recon,
    locate=locate_recon,
    open=ReconSource,
    settings=KEY_SETTINGS,
    trajectory=f"a *{RECON_SUFFIX} file in the folder itself",
    signs=_signs,
    frames="rows",
)
