"""--shard I/N: runs that share a cache, each with a record of its own; and merging those records into the cache's.

A shard's record begins as a copy of what the cache's says of its share. What it redoes is withdrawn from the cache's,
so that this one is true at every moment, also for programs that know nothing of shards; merging adds what is missing
there. So the merged record does not depend on when, in which order or how often that is begun. Three locks keep all
apart:

    <cache_dir>/.lock                     a run without --shard, or an edit, holds it alone; shards hold it together
    <cache_dir>/.shards/3-of-16/.lock     one run per shard
    <cache_dir>/.shards/.lock             held for moments, by shards that begin or that write what all of them share
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dino_cache import (
    LOG,
    ChunkStore,
    DatasetConfig,
    PreparedDataset,
    Selection,
    Trajectory,
    spec_differences,
    storage_errors,
)
from dino_cache import (
    open_progress as open_whole_progress,
)
from progress_utils import (
    LOCK_FILE,
    LOG_FILE,
    LOOK_S,
    PROGRESS_FILE,
    SHARDS_FOLDER,
    STAGING_FOLDER,
    CacheLockedError,
    Progress,
    RefusedError,
    Shard,
    TrajectoryRecord,
    cache_lock,
    fsync_path,
    human_list,
    lock_owner,
    make_cache_folder,
    make_directories_durably,
    progress_command,
    refuse_links,
    shard_folders,
    shards_at_work,
    unmerged_shards,
)

GUARD_S = 600.0  # how long a shard waits for others that read or save a large record
# What a record says of the runs, trajectories apart, and what is in force is that of the last one that was saved.
SETTINGS = (
    "processing_config", "weights", "checksum_kind", "data_folder", "data_format", "num_trajectories", "other_caches",
)  # fmt: skip


# ======================================================================================================================
# Before the work: what is refused, and the locks
# ======================================================================================================================


def sharded(config: DatasetConfig, shard: Shard) -> DatasetConfig:
    """The config of a run that does one share. RefusedError where a setting does not go with it."""
    options, name = config.options, f"--shard {shard}: datasets.{config.name}"
    if options.executor != "local":
        raise RefusedError(
            f"{name}: goes with executor: local, not with {options.executor}, which shares the work out itself"
        )
    if not options.enable_progress_tracking:
        raise RefusedError(f"{name}: needs a record for each shard: not with enable_progress_tracking: False")
    if options.force_rebuild:
        raise RefusedError(
            f"{name}: not with force_rebuild. {progress_command(f'reset --cache-dir {config.cache_dir}')} before the "
            "shards has them redo every trajectory"
        )
    return dataclasses.replace(config, shard=shard)


_HELD: set[Path] = set()  # folders of the shards that this process holds


@contextlib.contextmanager
def locked(config: DatasetConfig) -> Iterator[None]:
    """Hold a shard, and with the other shards the cache.

    Raises:
        CacheLockedError: the cache is held alone, this shard is at work, or one that would share trajectories with it.
        RefusedError: as for `cache_lock`.
    """
    cache_dir, shard, folder = config.cache_dir, config.shard, config.record_dir
    make_cache_folder(cache_dir)
    with _held_together(cache_dir), contextlib.ExitStack() as own:
        with guard(cache_dir):
            for other, owner in shards_at_work(cache_dir).items():
                if other.count != shard.count:
                    raise CacheLockedError(
                        f"{cache_dir}: shard {other} is at work ({owner.name}), and {shard} would do some of the same "
                        f"trajectories. Wait for it, or cut all into {other.count} shards"
                    )
            if folder.is_symlink():
                raise RefusedError(f"{folder}: is a link, and would be written through. Remove it")
            make_directories_durably(folder)
            try:
                own.enter_context(cache_lock(folder))
            except CacheLockedError:
                holder = lock_owner(folder) or "its holder left no name"
                raise CacheLockedError(
                    f"{cache_dir}: another run of shard {shard} holds this cache ({holder})"
                ) from None
        own.callback(_HELD.discard, folder)
        _HELD.add(folder)
        yield


@contextlib.contextmanager
def _held_together(cache_dir: Path) -> Iterator[None]:
    """Hold the cache together with other shards. CacheLockedError where somebody holds it alone."""
    refuse_links(cache_dir)
    path, deadline = cache_dir / LOCK_FILE, time.monotonic() + LOOK_S
    while True:
        descriptor = _open_lock(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if _is_file_of(descriptor, path):
                break
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                holder = lock_owner(cache_dir) or "its holder left no name"
                raise CacheLockedError(f"{cache_dir}: another run holds this cache ({holder})") from None
            time.sleep(LOOK_S / 10)
        except OSError as error:
            os.close(descriptor)
            raise RefusedError(f"{path}: cannot lock: {error}. Put cache_dir on a filesystem with flock") from error
        os.close(descriptor)
    try:
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except OSError as error:
        raise RefusedError(f"{path}: cannot lock: {error}. Make the folder writable") from error


def _is_file_of(descriptor: int, path: Path) -> bool:
    """Whether a lock is that of the file that others find: somebody may have removed the one that was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def guard(cache_dir: Path) -> Iterator[None]:
    """Be the only shard that begins, or writes what all shards share. Held for moments; the caller holds the cache.

    Raises:
        CacheLockedError: another one is at that for GUARD_S.
    """
    from filelock import FileLock, Timeout

    folder = cache_dir / SHARDS_FOLDER
    make_directories_durably(folder)
    lock = FileLock(folder / LOCK_FILE, timeout=GUARD_S, poll_interval=0.02, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise CacheLockedError(f"{cache_dir}: other shards are at their start for {GUARD_S:g} s. Run again") from None
    try:
        yield
    finally:
        lock.release()


# ======================================================================================================================
# Records
# ======================================================================================================================


class ShardProgress(Progress):
    """The record of a shard, and what the others say."""

    others_begun = False  # trajectories are, or are about to be, made with the configuration that it begins with
    elsewhere: frozenset[str] = frozenset()  # recorded trajectories that are not of this shard
    seen: frozenset[str] = frozenset()  # configurations of the others when this run began, as `_configuration` has them

    @property
    def is_begun(self) -> bool:
        return super().is_begun or self.others_begun


def _load(folder: Path) -> Progress | None:
    """A shard's record, None where there is none."""
    try:
        return Progress.load(folder)
    except RefusedError as error:
        raise RefusedError(
            f"{folder / PROGRESS_FILE}: not a usable record of a shard: {error.__cause__ or error}. Nothing was "
            f"changed. Ways out: put {PROGRESS_FILE}.bak in its place; or remove the folder {folder}, and "
            f"{progress_command(f'rebuild --cache-dir {folder.parent.parent}')} finds its chunks"
        ) from error


def load_all(folders: dict[Shard, Path]) -> dict[Shard, Progress]:
    """The records of shards, in the order in which they were saved."""
    found = {shard: _load(folder) for shard, folder in folders.items()}
    pairs = [(shard, progress) for shard, progress in found.items() if progress is not None]
    return dict(sorted(pairs, key=lambda pair: pair[1].last_update))


def take_over(progress: Progress, shard: Shard, own: Progress) -> int:
    """Add to `progress` what a shard's record has of its share; returns how many completed trajectories are new there.
    A shard withdraws from the cache's record what it redoes: what is there still, or again, is as it says. So a second
    time changes nothing."""
    has_changed, num_new = False, 0
    progress.specs |= own.specs
    for name, record in own.records.items():
        known = progress.records.get(name)
        if shard.holds(name) and (known is None or _is_renewed(known, record)):
            progress.complete(name, own.checksums[name], record)
            has_changed, num_new = True, num_new + (known is None)
    for name, failure in own.failures.items():
        if shard.holds(name) and name not in progress.records and progress.failures.get(name) != failure:
            progress.fail(name, failure)
            has_changed = True
    if has_changed:
        progress.elapsed_s += own.elapsed_s
    if own.processing_config:
        for key in SETTINGS:
            setattr(progress, key, getattr(own, key))
    return num_new


def _is_renewed(known: TrajectoryRecord, record: TrajectoryRecord) -> bool:
    """Whether a record is of the same chunks, and only says by another checksum or rule what they were made from."""
    is_same = all(known[key] == record[key] for key in ("fingerprint", "spans", "bytes"))
    return is_same and known != record


def with_shards(cache_dir: Path, but_for: int | None = None) -> Progress | None:
    """The cache's record with what waits in its shards, those that are `but_for` the number in which this run cuts;
    None where there is no record. Nothing is written."""
    progress = Progress.load(cache_dir)
    if progress is not None:
        folders = {shard: path for shard, path in unmerged_shards(cache_dir).items() if shard.count != but_for}
        for shard, own in load_all(folders).items():
            take_over(progress, shard, own)
    return progress


def open_progress(config: DatasetConfig) -> ShardProgress:
    """The record of a shard: what merging its own would now give of its share. The configuration that it begins with is
    the one that was last in force, here or in another shard.

    Raises:
        RefusedError: a record is unusable, of another dataset, or missing beside chunks.
    """
    cache_dir, shard = config.cache_dir, config.shard
    # Another shard that begins may make the first record just now, and then chunks, or merge those of another cut.
    may_change = not os.path.lexists(cache_dir / PROGRESS_FILE) or _of_other_cut(cache_dir, shard)
    with guard(cache_dir) if may_change and config.record_dir in _HELD else contextlib.nullcontext():
        whole = open_whole_progress(dataclasses.replace(config, shard=None))
        base = with_shards(cache_dir, but_for=shard.count) or whole
        folders = unmerged_shards(cache_dir)
        mates = load_all({other: path for other, path in folders.items() if other.count == shard.count})
    names = itertools.chain(whole.records, *(record.records for record in mates.values()))
    elsewhere = frozenset(name for name in names if not shard.holds(name))
    # The cache's configuration has not changed since the first shard began: that of the last one counts.
    begun = [record for record in mates.values() if record.processing_config] or ([base] if base.records else [])
    seen = frozenset(_configuration(record.processing_config, record.weights) for record in (*begun, base))
    last = max(begun or [base], key=lambda record: record.last_update)
    settings = {key: copy.deepcopy(getattr(last, key)) for key in SETTINGS}
    own = ShardProgress(config.record_dir, config.name)
    if (before := mates.get(shard)) is not None:
        take_over(base, shard, before)
        own.start_time, own.elapsed_s = before.start_time, before.elapsed_s
    own.specs, own.elsewhere, own.others_begun, own.seen = {**base.specs}, elsewhere, bool(begun), seen
    for name, record in base.records.items():
        if shard.holds(name):
            own.complete(name, base.checksums[name], record)
    own.failures = {name: failure for name, failure in base.failures.items() if shard.holds(name)}
    for key, value in settings.items():
        setattr(own, key, value)
    return own


def _of_other_cut(cache_dir: Path, shard: Shard) -> dict[Shard, Path]:
    """Shards that wait to be merged and are of another number of shares."""
    return {other: path for other, path in unmerged_shards(cache_dir).items() if other.count != shard.count}


def _configuration(spec: dict[str, Any], weights: dict[str, Any] | None) -> str:
    """What two records agree in that were made alike."""
    return json.dumps([spec, weights and weights["digest"]], sort_keys=True)


# ======================================================================================================================
# The work
# ======================================================================================================================


class Share(NamedTuple):
    """What a shard does of a dataset."""

    selection: Selection
    store: ChunkStore
    num_elsewhere: int  # trajectories of other shards, present or recorded


class SharedStore(ChunkStore):
    """For trajectories that lie in each other's folders, which several shards may publish at once: one at a time."""

    def publish(self, *arguments: Any) -> Path | None:
        with guard(self.cache_dir):
            return super().publish(*arguments)

    def remove_chunks(self, name: str) -> None:
        with guard(self.cache_dir):
            super().remove_chunks(name)


def share_of(config: DatasetConfig, progress: ShardProgress, selection: Selection) -> Share:
    """A shard's share of the trajectories that are present and selected."""
    mine: list[Trajectory] = []
    elsewhere = set(progress.elsewhere)
    for trajectory in selection.trajectories:
        if config.shard.holds(trajectory.name):
            mine.append(trajectory)
        else:
            elsewhere.add(trajectory.name)
    names = elsewhere | {trajectory.name for trajectory in mine} | progress.records.keys()
    is_nested = any(parent.as_posix() in names for name in names for parent in Path(name).parents)
    store = (SharedStore if is_nested else ChunkStore)(config.cache_dir, record_dir=config.record_dir)
    return Share(selection._replace(trajectories=mine), store, len(elsewhere))


def announce(dataset: PreparedDataset) -> None:
    """Say which share of a dataset is done, and what becomes of its record."""
    config = dataset.config
    merge = progress_command(f"merge --cache-dir {config.cache_dir}")
    LOG.info(
        "Shard %s: %d trajectories; %d are others'. Record and log: %s, until %s or a run without --shard",
        config.shard, len(dataset.trajectories), dataset.num_elsewhere, config.record_dir, merge,
    )  # fmt: skip


def begin(dataset: PreparedDataset) -> None:
    """What is written before the work: without --shard, what waits in shards comes into the cache's record; a shard
    with work begins its own."""
    config = dataset.config
    with storage_errors(config.cache_dir):
        if config.shard is None:
            merged = merge(config.cache_dir)
            if merged.shards:
                LOG.info("%s: merged shards: %s", config.name, merged)
        elif dataset.pending or dataset.lost:
            with guard(config.cache_dir):
                _begin_shard(dataset)


def _begin_shard(dataset: PreparedDataset) -> None:
    """Begin a shard's record, then withdraw from the cache's what this run redoes. Killed in between, the shard's
    record still has it, as it was.

    Raises:
        RefusedError: another shard began meanwhile with another configuration.
    """
    config, own, spec = dataset.config, dataset.progress, dataset.spec
    cache_dir = config.cache_dir
    for shard, folder in unmerged_shards(cache_dir).items():
        if shard.count == config.shard.count and shard != config.shard:
            _refuse_other_configuration(dataset, shard, folder)
    (cache_dir / STAGING_FOLDER).mkdir(exist_ok=True)  # by which a cache is known
    if other_cut := _of_other_cut(cache_dir, config.shard):
        LOG.info("%s: merged shards: %s", config.name, merge(cache_dir, other_cut))
    if not os.path.lexists(cache_dir / PROGRESS_FILE):
        Progress(cache_dir, config.name).save()
    own.processing_config, own.weights, own.data_format = spec.to_json(), dataset.weights, config.format
    own.save()
    names = ({trajectory.name for trajectory in dataset.pending} | dataset.lost.keys()) & own.records.keys()
    if names:
        progress = Progress.load(cache_dir)
        if sum(progress.forget(name) for name in names):
            progress.save()


def _refuse_other_configuration(dataset: PreparedDataset, shard: Shard, folder: Path) -> None:
    """Raise RefusedError where a shard that began since this one compared configurations has another one."""
    record = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))  # checked before; it may be large
    spec, weights = record["processing_config"], record["weights"]
    if not spec or _configuration(spec, weights) in dataset.progress.seen:
        return
    differences = spec_differences(spec, dataset.spec)
    digests = [it and it["digest"] for it in (weights, dataset.weights)]
    if digests[0] != digests[1]:
        differences.append(("weights", *digests))
    if differences:
        what = ", ".join(f"{key}: {theirs} there, {ours} here" for key, theirs, ours in differences)
        raise RefusedError(
            f"{dataset.name}: shard {shard} began just now with another configuration ({what}). Nothing was changed. "
            "Give both the same one, or run the same command again to be asked about it"
        )


# ======================================================================================================================
# Merging
# ======================================================================================================================


class Merged(NamedTuple):
    """What was merged."""

    shards: list[Shard]
    num_new: int  # completed trajectories that the cache's record did not have so
    num_completed: int
    num_failed: int

    def __str__(self) -> str:
        counts = f"{self.num_completed} completed, {self.num_failed} failed"
        return f"{human_list(list(map(str, self.shards)))}: {self.num_new} trajectories taken in, now {counts}"


def merge(cache_dir: Path, only: dict[Shard, Path] | None = None) -> Merged:
    """Take the records of shards into the cache's own, durably, then remove their folders; of all, or of `only` those.
    Killed anywhere, the next merge comes to the same. The caller holds the cache alone, or keeps these shards out.

    Raises:
        RefusedError: a record is unusable; nothing was changed.
    """
    records, progress, num_new = load_all(unmerged_shards(cache_dir) if only is None else only), None, 0
    if records:
        progress = Progress.load(cache_dir) or Progress(cache_dir, next(iter(records.values())).dataset_name)
        num_new = sum(take_over(progress, shard, own) for shard, own in records.items())
        progress.save()
    store, staging = ChunkStore(cache_dir), cache_dir / STAGING_FOLDER
    for folder in (shard_folders(cache_dir) if only is None else only).values():
        if (folder / STAGING_FOLDER).is_dir() and not staging.is_symlink():
            staging.mkdir(exist_ok=True)
            store.keep_partials(folder / STAGING_FOLDER)
        _append_log(folder / LOG_FILE, cache_dir / LOG_FILE)
        _remove(folder)
    if only is None:  # nobody waits for the lock that goes with it: shards are kept out before they look at it
        shutil.rmtree(cache_dir / SHARDS_FOLDER, ignore_errors=True)
    counts = (len(progress.records), len(progress.failures)) if progress else (0, 0)
    return Merged(sorted(records, key=lambda shard: (shard.count, shard.index)), num_new, *counts)


def _append_log(log: Path, whole: Path) -> None:
    """Keep what a shard said."""
    if log.is_file() and not log.is_symlink() and not whole.is_symlink():
        with open(log, "rb") as source, open(whole, "ab") as target:
            shutil.copyfileobj(source, target)


def _remove(folder: Path) -> None:
    """Remove a merged shard: first its record, durably. Without its journal, it would be an older one."""
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    fsync_path(folder)
    shutil.rmtree(folder, ignore_errors=True)
