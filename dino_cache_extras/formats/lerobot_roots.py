"""LeRobot: dataset roots at any depth below data_folder, how episodes are called, and those kept open."""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Generic, NamedTuple, TypeVar

from dino_cache import InputError, Trajectory, recordable_name, walk_folders
from progress_utils import RefusedError

LEROBOT_INFO = "meta/info.json"
NO_EPISODE = -1  # of what stands for a root whose meta data cannot be read: it fails with the reason
Dataset = TypeVar("Dataset")


class Root(NamedTuple):
    """A folder with meta/info.json; `name` is its path below data_folder, '' where it is that itself."""

    name: str
    path: Path
    error: OSError | None = None  # why a folder cannot be listed, in which roots may be


def find_roots(data_folder: Path) -> Iterator[Root]:
    """The dataset roots, sorted, and folders that cannot be listed. Nothing below a root is looked at: its pictures
    are not listed.

    Raises:
        RefusedError: `data_folder` cannot be listed, or holds a maze of links.
    """
    for folder in walk_folders(data_folder, leaf=LEROBOT_INFO):
        name = folder.name.rstrip("/")
        if not name and folder.error:
            raise RefusedError(f"data_folder {data_folder}: cannot list it: {folder.error.strerror}") from folder.error
        if folder.error or folder.files == [LEROBOT_INFO]:
            yield Root(name, folder.path, folder.error)


def episode_name(number: int) -> str:
    """The name of an episode as a trajectory, in its root."""
    return f"episode_{number:06d}"


def episode_of(root: Root, number: int) -> Trajectory:
    """An episode of a root, called by its path: <group>/<scene>/episode_000000."""
    name = recordable_name(f"{root.name}/{episode_name(number)}" if root.name else episode_name(number))
    return Trajectory(name, root.path, format="lerobot", episode=number)


def unreadable_root(root: Root) -> Trajectory:
    """What stands for a root below data_folder whose meta data cannot be read, or a folder that cannot be listed."""
    return Trajectory(recordable_name(root.name), root.path, format="lerobot", episode=NO_EPISODE)


def located_episode(data_folder: Path, name: str) -> Trajectory:
    """The episode of that name; InputError where it is not an episode's."""
    match = re.fullmatch(r"(?:(.+)/)?episode_(\d{6,18})", name)
    if not match or os.path.isabs(name) or ".." in name.split("/"):
        raise InputError(f"{name} is not the name of an episode")
    return Trajectory(name, data_folder / (match[1] or ""), format="lerobot", episode=int(match[2]))


class OpenedRoots(Generic[Dataset]):
    """The datasets used last, as they were when they were opened. Their weights come to `most`, at the most; the last
    one stays whatever it weighs."""

    def __init__(self, make: Callable[[Path], Dataset], most: int, weigh: Callable[[Dataset], int]):
        self._make, self._most, self._weigh, self._weight = make, most, weigh, 0
        self._opened: OrderedDict[Path, Dataset] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, root: Path) -> Dataset:
        """A root's dataset, opened if it is not."""
        with self._lock:
            if root not in self._opened:
                self._opened[root] = self._make(root)
                self._weight += self._weigh(self._opened[root])
            self._opened.move_to_end(root)
            while self._weight > self._most and len(self._opened) > 1:
                self._weight -= self._weigh(self._opened.popitem(last=False)[1])
            return self._opened[root]

    def anew(self, root: Path) -> Dataset:
        """The same, as it is now."""
        with self._lock:
            if root in self._opened:
                self._weight -= self._weigh(self._opened.pop(root))
        return self(root)

    def clear(self) -> None:
        """Forget them all."""
        with self._lock:
            self._opened.clear()
            self._weight = 0
