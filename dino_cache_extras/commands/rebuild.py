"""rebuild: make the record anew from the chunk files."""

from __future__ import annotations

import argparse
import calendar
import functools
import json
import os
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dino_cache import recorded_spec, weights_source
from dino_cache_extras.chunk_files import read_chunk_header
from dino_cache_extras.commands.verify import Finding, damage_of
from dino_cache_extras.commands.workers import on_all_cores
from progress_utils import (
    PROGRESS_FILE,
    RECORD_KEYS,
    DamagedChunkError,
    Progress,
    RefusedError,
    TrajectoryRecord,
    add_cache_dir,
    ask,
    cache_lock,
    chunk_file_name,
    chunk_folders,
    fsync_path,
    is_chunk_file,
    print_lines,
    set_aside,
)


def rebuild(cache_dir: Path, *, yes: bool) -> int:
    """Make progress.json anew from the chunk files; exit code 1 where some could not be taken into it."""
    if not cache_dir.is_dir():
        raise RefusedError(f"{cache_dir}: no such folder; --cache-dir takes the folder that holds the chunks")
    with cache_lock(cache_dir):
        old = _readable_record(cache_dir)
        names = list(chunk_folders(cache_dir))
        outcomes = on_all_cores(functools.partial(read_trajectory, cache_dir), names, "Reading chunks")
        found = [outcome for outcome in outcomes if isinstance(outcome, FoundTrajectory)]
        problems = [outcome for outcome in outcomes if isinstance(outcome, Finding)]
        for problem in problems:
            print_lines(f"  left out: {problem.path}: {problem.reason}", file=sys.stderr)
        if not found:
            raise RefusedError(f"{cache_dir}: no complete trajectory here to make a record from")
        progress = _progress_from(cache_dir, found)
        if old is not None:
            for key in ("elapsed_s", *(key for key, row in RECORD_KEYS.items() if row.is_later)):
                setattr(progress, key, getattr(old, key))
            progress.failures = {name: old.failures[name] for name in old.failures.keys() - progress.records.keys()}
        if len(progress.fingerprints) > 1:
            print_lines(
                f"Mixed cache: made with {len(progress.fingerprints)} different configurations", file=sys.stderr
            )
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
    print_lines(f"Rebuilt {path}: {len(found)} trajectories, {progress.total_chunks} chunks")
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
    files = list(filter(is_chunk_file, os.listdir(cache_dir / name)))
    expected = [chunk_file_name(index) for index in range(len(files))]
    if set(files) != set(expected):
        return Finding("missing", name, name, f"its chunks are not numbered from 0 on: {', '.join(sorted(files)[:10])}")
    headers = []
    for file in expected:
        try:
            headers.append(read_chunk_header(cache_dir / name / file, deep=True))
        except (DamagedChunkError, OSError) as error:
            return Finding("damaged", name, f"{name}/{file}", damage_of(cache_dir / name / file, error))
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
    if "pairing" in chunks[0]:
        record["pairing"] = chunks[0]["pairing"]
    latest = max(chunks, key=lambda attributes: attributes["created_at"])
    return FoundTrajectory(name, record, latest, min(attributes["created_at"] for attributes in chunks))


def _progress_from(cache_dir: Path, found: list[FoundTrajectory]) -> Progress:
    """A record of the trajectories found; the configuration in force is that of the most recent chunk."""
    latest = max(found, key=lambda trajectory: trajectory.attributes["created_at"]).attributes
    progress = Progress(cache_dir, latest["dataset_name"])
    first = min(trajectory.first_created_at for trajectory in found)
    progress.start_time = float(calendar.timegm(time.strptime(first, "%Y-%m-%dT%H:%M:%SZ")))
    progress.processing_config = json.loads(latest["spec"])
    try:
        spec = recorded_spec(progress.processing_config)
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_cache_dir(parser)
    parser.add_argument("--yes", action="store_true", help="do not ask")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    return rebuild(arguments.cache_dir, yes=arguments.yes)
