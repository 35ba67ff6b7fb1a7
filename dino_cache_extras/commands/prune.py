"""prune: remove what a cache holds of trajectories that its data no longer have, records set aside, leftovers."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dino_cache import CacheSpec, ChunkStore, DatasetConfig, format_named, recorded_spec, settle_format
from dino_cache_extras.commands.named_caches import configured
from dino_cache_extras.commands.verify import find_leftovers
from progress_utils import (
    PROGRESS_FILE,
    STAGING_FOLDER,
    Progress,
    RefusedError,
    add_cache_dir,
    chunk_folders,
    edit_lock,
    human_bytes,
    load_or_refuse,
    lock_owner,
    print_lines,
)

SET_ASIDE = ("reset", "rebuild")  # progress.json.<one of these>-<time>


class Waste(NamedTuple):
    """What a cache holds that nothing needs any more."""

    gone: list[str]  # trajectories that are recorded or have chunks, and are not among the data
    set_aside: list[Path]
    leftovers: list[Path]


def prune(cache_dir: Path, config: DatasetConfig | None, *, yes: bool) -> int:
    """Say what is not needed, and with `yes` remove it. `config`: where the data are, else as recorded.

    Raises:
        RefusedError: it cannot be told what the data have; nothing was changed.
        CacheLockedError: a run holds the cache, and something would be removed.
    """
    load_or_refuse(cache_dir)
    with edit_lock(cache_dir) if yes else contextlib.nullcontext():
        progress = load_or_refuse(cache_dir)
        holder = None if yes else lock_owner(cache_dir)
        unrecorded = chunk_folders(cache_dir) if holder is None else ()  # else a run has just written them
        known = {*progress.records, *progress.failures, *unrecorded}
        gone = known - present_trajectories(progress, config, known)
        waste = find_waste(progress, gone, in_use=holder is not None)
        sizes = {name: sum(_file_sizes(cache_dir / name)) for name in waste.gone}
        size = sum(sizes.values()) + sum(sum(_file_sizes(path)) for path in (*waste.set_aside, *waste.leftovers))
        for name in waste.gone:
            print_lines(f"  gone from the data: {name} ({human_bytes(sizes[name])})")
        for what, paths in (("record set aside", waste.set_aside), ("leftover", waste.leftovers)):
            for path in paths:
                print_lines(f"  {what}: {path.relative_to(cache_dir)}")
        counts = f"{len(waste.gone)} trajectories, {len(waste.set_aside)} records set aside, "
        counts += f"{len(waste.leftovers)} leftovers: {human_bytes(size)}"
        if holder is not None:
            print_lines(f"Note: a run is at work ({holder}); leftovers are not looked for")
        if yes:
            remove(progress, waste)
            print_lines(f"Removed {counts}")
        elif any(waste):
            print_lines(f"Would remove {counts}. Nothing was changed: --yes removes them")
        else:
            print_lines(f"{cache_dir}: nothing to remove")
    return 0


def present_trajectories(progress: Progress, config: DatasetConfig | None, known: set[str]) -> set[str]:
    """Names of the trajectories that the data have, whatever a split says; `known` are those of the cache.

    Raises:
        RefusedError: the data are not known, cannot be listed, or hold no trajectory.
    """
    folder, kind, spec = _source(progress, config)
    try:
        is_empty = not os.listdir(folder)
    except OSError as error:
        raise RefusedError(f"{folder}: cannot list it: {error.strerror}. Nothing was changed") from error
    present = set() if is_empty else {trajectory.name for trajectory in format_named(kind).find(folder, spec)}
    if not present:
        raise RefusedError(f"{folder}: no trajectories below it. Is the disk mounted? Nothing was changed")
    if known and not known & present:
        raise RefusedError(
            f"{folder}: has none of the {len(known)} trajectories that this cache knows: these seem to be other data. "
            "Nothing was changed. --config FILE says where the data are"
        )
    for name in known - present:
        _refuse_unseen(folder, name)
    return present


def _source(progress: Progress, config: DatasetConfig | None) -> tuple[Path, str, CacheSpec]:
    """Where the data are, in which format, and the settings by which they are found."""
    if config is not None:
        return config.data_folder, settle_format(config).format, config.spec
    if progress.data_folder is None or progress.data_format is None or not progress.processing_config:
        raise RefusedError(f"{progress.cache_dir}: its record does not say where its data are: give --config FILE")
    try:
        spec = recorded_spec(progress.processing_config)
    except ValueError as error:
        raise RefusedError(f"{progress.cache_dir}: its settings are not known here: give --config FILE") from error
    return Path(progress.data_folder), progress.data_format, spec


def _refuse_unseen(data_folder: Path, name: str) -> None:
    """Raise RefusedError where a trajectory may be there and is only not seen: a folder above it cannot be listed, is a
    link that leads nowhere, or is empty, as the mount point of an absent disk is."""
    for part in [*[*reversed(Path(name).parents)][1:], Path(name)]:
        folder = data_folder / part
        try:
            if os.path.lexists(folder) and (not folder.exists() or (folder.is_dir() and not os.listdir(folder))):
                why = "is empty, or a link that leads nowhere"
                raise RefusedError(f"{folder}: {why}: {name} may be there. Mount its disk, or remove the folder")
        except OSError as error:
            raise RefusedError(f"{folder}: cannot list it: {error.strerror}. Nothing was changed") from error


def find_waste(progress: Progress, gone: set[str], *, in_use: bool) -> Waste:
    """What can go. While a run is at work, its files in flight look like leftovers: none are named."""
    cache_dir = progress.cache_dir
    for name in gone:
        if Path(name).is_absolute() or ".." in Path(name).parts or not Path(name).parts:
            raise RefusedError(f"{cache_dir / PROGRESS_FILE}: {name!r} is not the name of a trajectory")
    set_aside = sorted(path for why in SET_ASIDE for path in cache_dir.glob(f"{PROGRESS_FILE}.{why}-*"))
    leftovers = [] if in_use else [cache_dir / finding.path for finding in find_leftovers(progress)]
    return Waste(sorted(gone), set_aside, leftovers)


def remove(progress: Progress, waste: Waste) -> None:
    """Remove what can go: from the record first, durably, then the chunks."""
    store, cache_dir = ChunkStore(progress.cache_dir), progress.cache_dir
    num_recorded = sum(progress.forget(name) for name in waste.gone)
    num_failed = sum(progress.failures.pop(name, None) is not None for name in waste.gone)
    if num_recorded or num_failed:
        if progress.num_trajectories is not None:
            progress.num_trajectories = max(len(progress.records), progress.num_trajectories - num_recorded)
        progress.save()
    for path in (*waste.set_aside, *waste.leftovers):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    (cache_dir / STAGING_FOLDER).mkdir(exist_ok=True)
    for name in waste.gone:
        store.remove_chunks(name)
        for folder in [cache_dir / name, *(cache_dir / part for part in Path(name).parents if part.parts)]:
            with contextlib.suppress(OSError):  # not empty, or not there
                folder.rmdir()


def _file_sizes(path: Path) -> Iterator[int]:
    """Of a file, or of the files in a folder; links are not followed."""
    with contextlib.suppress(OSError):
        if path.is_symlink() or not path.is_dir():
            yield path.lstat().st_size
            return
        for inner in path.iterdir():
            yield from _file_sizes(inner)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_cache_dir(parser)
    parser.add_argument("--yes", action="store_true", help="remove it; without it, only say what would be removed")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    config = configured(arguments.config, arguments.dataset)[0] if arguments.config is not None else None
    return prune(arguments.cache_dir, config, yes=arguments.yes)
