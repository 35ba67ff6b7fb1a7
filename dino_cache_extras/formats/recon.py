"""RECON: an HDF5 file a trajectory, JPEG bytes inside."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
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
    READ_TOGETHER,
    CacheSpec,
    ChecksumKind,
    DataKeys,
    FolderFiles,
    Format,
    FrameReader,
    InputError,
    InvalidDataError,
    Poses,
    Trajectory,
    camera_name,
    checked_poses,
    in_groups,
    open_regular,
    recordable_name,
)
from progress_utils import RefusedError

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
        if file_name.lower().endswith(RECON_SUFFIX) and not file_name.startswith("."):
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
        self._keys, self._settings = [key or default for key, default in zip(given, RECON_KEYS)], keys
        self._extra_keys = keys.extra_keys
        self._images = keys._replace(image_key=self._keys[0]).keys_of_cameras  # camera -> its dataset
        self._size = os.stat(trajectory.path).st_size

    @functools.cached_property
    def _content(self) -> tuple[dict[str, int], dict[str, np.ndarray]]:
        """The number of images by key, and the poses by key."""
        with hdf5_errors(self._where, self._trajectory.path), open_hdf5(self._trajectory.path) as file:
            counts = {key: len(_recon_dataset(file, key)) for key in self._images.values()}
            poses = [_recon_dataset(file, key) for key in self._keys[1:]]
            if any(values.size > MAX_POSE_NUMBERS for values in poses):
                raise InputError(f"{self._keys[1:]} hold more than {MAX_POSE_NUMBERS} numbers")
            return counts, {key: _comparable(values[...]) for key, values in zip(self._keys[1:], poses)}

    @functools.cached_property
    def _extra(self) -> dict[str, np.ndarray]:
        """The datasets that extra_keys names, as they are."""
        columns, numbers = {}, 0
        with hdf5_errors(self._where, self._trajectory.path), open_hdf5(self._trajectory.path) as file:
            for key in self._extra_keys:
                if getattr(file.get(key), "shape", None) in (None, ()):
                    raise InvalidDataError(f"{self._where}: has no rows {key}, as extra_keys has it; {_its_keys(file)}")
                dataset = _recon_dataset(file, key)
                numbers += dataset.size
                if dataset.dtype.kind not in "biuf":
                    raise InvalidDataError(f"{self._where}: {key} holds {dataset.dtype} values, expected numbers")
                if numbers > MAX_POSE_NUMBERS:
                    raise InvalidDataError(f"{self._where}: extra_keys name more than {MAX_POSE_NUMBERS} numbers")
                columns[key] = dataset[...]
        return columns

    def checksum(self, kind: ChecksumKind) -> str:
        """Over the poses, what extra_keys names, and the file's size (`stat`), or over the file's bytes (`content`)."""
        digest = hashlib.sha256(f"{kind} {self._keys} {self._size}".encode())
        if kind == "content":
            with open(open_regular(self._trajectory.path), "rb") as file:
                digest = hashlib.file_digest(file, lambda: digest)
        else:
            for values in self._content[1].values():
                digest.update(np.ascontiguousarray(values))
            for key, values in self._extra.items():
                digest.update(f"{key} {values.dtype} {values.shape}".encode())
                digest.update(np.ascontiguousarray(values))
        return digest.hexdigest()[:16]

    def poses(self, *, required: bool) -> Poses:
        counts, values = self._content
        poses = checked_poses(self._where, values, self._settings, *self._keys[1:])
        for key, count in counts.items():
            if count != len(poses.position):
                raise InputError(f"{self._where}: {count} images in {key} but {len(poses.position)} poses")
        return poses._replace(extra=self._extra)

    def open_frames(self, numbers: Sequence[int], camera: str | None = None) -> FrameReader:
        return ReconFrames(self._trajectory.path, camera_name(self._where, camera), self._images[camera])


class ReconFrames:
    """The images of one dataset of a file."""

    def __init__(self, path: Path, where: str, key: str):
        self._path, self._where, self._key = path, where, key

    def name(self, number: int) -> str:
        return f"{self._where} {self._key}[{number}]"

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        for some in in_groups(numbers, READ_TOGETHER):
            with PROFILE("read"), hdf5_errors(self._where, self._path), open_hdf5(self._path) as file:
                images = [_image_bytes(value) for value in _recon_dataset(file, self._key)[some]]
            yield from (np.frombuffer(bytearray(data), np.uint8) for data in images)

    def close(self) -> None:
        """Nothing stays open."""


@contextlib.contextmanager
def hdf5_errors(where: str, path: Path) -> Iterator[None]:
    """Whatever h5py makes of damaged bytes as the trajectory's error; the system's as OSError."""
    try:
        yield
    except (MemoryError, InvalidDataError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        code, number = getattr(error, "errno", None), re.search(r"errno = (\d+)", reason)
        if code is None and number and int(number[1]) in LOST_MOUNT_ERRNOS:
            code = int(number[1])  # of a read, h5py puts the system's error only into its text
        if code:
            raise OSError(code, f"{path}: {reason}") from error
        raise InputError(f"{where}: cannot read it: {reason}") from error


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file that is a regular file."""
    os.close(open_regular(path))
    with h5py.File(path, "r", locking=False) as file:
        yield file


def _recon_dataset(file: h5py.File, key: str) -> h5py.Dataset:
    dataset = file.get(key)
    if not isinstance(dataset, h5py.Dataset) or dataset.ndim == 0:
        raise InputError(f"has no {key}; {_its_keys(file)}")
    if dataset.file.filename != file.filename or dataset.external or dataset.is_virtual:
        raise InputError(f"{key} lies in another file; what a file refers to is not read")
    return dataset


def _its_keys(file: h5py.File) -> str:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return f"its keys are {', '.join(names)[:500]}"


def _comparable(values: np.ndarray) -> np.ndarray:
    """The values; text in place of objects. Those could not be poses, but the checksum is over what they say: over the
    objects, it would be over where they lie in memory, and another one every time."""
    if not values.dtype.hasobject:
        return values
    texts = map(repr, values.flat)
    return np.array([text if len(text) <= 64 else hashlib.sha256(text.encode()).hexdigest() for text in texts])


def _image_bytes(value: Any) -> bytes:
    """The bytes of one image, of fixed length, of variable length, or a padded row of numbers."""
    if isinstance(value, bytes):
        return value
    array = np.asarray(value)
    if array.dtype.kind != "V" and array.dtype not in (np.uint8, np.int8):
        raise InputError(f"its images are {array.dtype} values, expected bytes")
    return array.tobytes()


def _signs(folder: FolderFiles, is_top: bool) -> list[str]:
    return [file for file in folder.files if file.lower().endswith(RECON_SUFFIX)][:1] if is_top else []


FORMAT = Format(
    find=find_recon,
    locate=locate_recon,
    open=ReconSource,
    settings=(*KEY_SETTINGS, "extra_keys"),
    trajectory=f"a *{RECON_SUFFIX} file in the folder itself",
    signs=_signs,
    guess=lambda data_folder, spec: {
        setting: getattr(spec, setting) or key for setting, key in zip(KEY_SETTINGS, RECON_KEYS)
    },
    frames="rows",
)
