"""verify: check the chunk files against the record."""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from dino_cache_extras.chunk_files import check_recorded, recorded_chunks
from dino_cache_extras.commands.workers import on_all_cores
from dino_cache_extras.shards import load_all
from progress_utils import (
    CANNOT_LOOK,
    JOURNAL_FILE,
    STAGING_FOLDER,
    TEMPORARY_FILES,
    DamagedChunkError,
    Progress,
    RefusedError,
    TrajectoryRecord,
    add_cache_dir,
    ask,
    chunk_file_name,
    chunk_folders,
    edit_lock,
    find_partials,
    is_chunk_file,
    load_or_refuse,
    lock_owner,
    partial_journal,
    print_lines,
    program_name,
    unmerged_shards,
    waiting_in_shards,
)


class Finding(NamedTuple):
    """One thing that is wrong with a cache."""

    kind: str  # missing | damaged | unrecorded | leftover
    trajectory: str | None
    path: str  # relative to the cache folder
    reason: str


def verify(cache_dir: Path, *, deep: bool, as_json: bool, repair: bool, yes: bool) -> int:
    """Check every recorded trajectory's chunk files; exit code 0 sound, 1 problems found (also when repaired)."""
    load_or_refuse(cache_dir)
    with edit_lock(cache_dir) if repair else contextlib.nullcontext():
        progress = load_or_refuse(cache_dir)
        findings = _check_recorded(progress, deep)
        if findings and not repair:
            findings = _still_true(progress, findings)
        holder = None if repair else lock_owner(cache_dir)
        if holder is None:  # else these are what a run has in flight
            others = [*_find_unrecorded(progress), *find_leftovers(progress)]
            holder = None if repair else lock_owner(cache_dir)  # one that began during the look
            findings += others if holder is None else []
        mixed = len(progress.fingerprints) > 1
        if not as_json:
            _print_findings(progress, findings, holder, deep=deep)
        repaired = repair and _repair(progress, findings, yes=yes)
        if as_json:
            report = {"cache_dir": str(cache_dir), "deep": deep, "sound": not findings, "mixed": mixed}
            report |= {"repaired": repaired, "findings": [finding._asdict() for finding in findings]}
            print(json.dumps(report, ensure_ascii=False))
    return 1 if findings else 0


def _check_recorded(progress: Progress, deep: bool) -> list[Finding]:
    check = functools.partial(check_trajectory, progress.cache_dir, deep=deep)
    tasks = [(name, record, progress.checksums[name]) for name, record in progress.records.items()]
    return [finding for findings in on_all_cores(check, tasks, "Verifying") for finding in findings]


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
    findings, chunks = [], recorded_chunks(cache_dir, name, record, checksum)
    for chunk in chunks:
        path = f"{name}/{chunk_file_name(chunk.chunk_index)}"
        try:
            check_recorded(chunk, deep=deep)
        except (FileNotFoundError, NotADirectoryError):
            findings.append(Finding("missing", name, path, "recorded, but not there"))
        except (DamagedChunkError, OSError) as problem:
            findings.append(Finding("damaged", name, path, damage_of(cache_dir / path, problem)))
    expected = {chunk_file_name(chunk.chunk_index) for chunk in chunks}
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for file in sorted(set(filter(is_chunk_file, os.listdir(cache_dir / name))) - expected):
            findings.append(Finding("damaged", name, f"{name}/{file}", "a chunk that the record does not know"))
    return findings


def damage_of(path: Path, problem: Exception) -> str:
    """What is wrong with a chunk file. Raises RefusedError where the file could not be looked at."""
    if isinstance(problem, OSError) and problem.errno in CANNOT_LOOK:
        raise RefusedError(f"{path}: cannot look: {problem.strerror}. Nothing was changed") from problem
    return str(problem)


def _find_unrecorded(progress: Progress) -> list[Finding]:
    shards = load_all(unmerged_shards(progress.cache_dir)).values()
    in_shards = {name for shard in shards for name in shard.records}
    return [
        Finding("unrecorded", name, name, "chunk files that are not in the record")
        for name in chunk_folders(progress.cache_dir)
        if name not in progress.records and name not in in_shards
    ]


def find_leftovers(progress: Progress) -> list[Finding]:
    """What interrupted runs left beside the chunks."""
    cache_dir, staging = progress.cache_dir, progress.cache_dir / STAGING_FOLDER
    names = TEMPORARY_FILES if progress.has_journal else (*TEMPORARY_FILES, JOURNAL_FILE)  # of an earlier progress.json
    paths = [cache_dir / name for name in names if os.path.lexists(cache_dir / name)]
    if staging.is_symlink():
        paths.append(staging)  # what it points to is not ours
    elif staging.is_dir():
        begun = {
            path for partial in find_partials(staging) for path in (partial.folder, partial_journal(partial.folder))
        }
        begun |= {path.parent for path in begun} - {staging}  # of workers
        paths += sorted(set(staging.iterdir()) - begun)  # the next run goes on with the others
    return [
        Finding("leftover", None, path.relative_to(cache_dir).as_posix(), "left by an interrupted run")
        for path in paths
    ]


def _print_findings(progress: Progress, findings: list[Finding], holder: str | None, *, deep: bool) -> None:
    how = "every byte read" if deep else "names, sizes, shapes and attributes; --deep reads every byte"
    print_lines(
        f"Verified {progress.cache_dir}: {len(progress.records)} trajectories, {progress.total_chunks} chunks ({how})"
    )
    if holder:
        print_lines(f"Note: a run is at work ({holder}); unrecorded and leftover files are not looked for")
    if waiting := waiting_in_shards(progress.cache_dir, progress.records):
        print_lines(f"Note: {waiting}; they are not looked into")
    if len(progress.fingerprints) > 1:
        print_lines(f"Note: mixed cache: made with {len(progress.fingerprints)} different configurations")
    for finding in findings:
        print_lines(f"  {finding.kind}: {finding.path}: {finding.reason}")
    if not findings:
        print_lines("Sound")
    elif any(finding.kind == "unrecorded" for finding in findings):
        print_lines(
            "Unrecorded chunks are redone by the next run if their data is there; where the record was lost, `rebuild`",
            "takes those that are intact into a new one",
        )


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
    print_lines(f"Forgot {len(damaged)} trajectories, removed {len(leftovers)} leftovers", file=sys.stderr)
    if damaged:
        print_lines(f"The next run of {program_name('dino_cache.py')} redoes what was forgotten", file=sys.stderr)
    return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_cache_dir(parser)
    parser.add_argument("--deep", action="store_true", help="read every byte and check the digests")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--repair", action="store_true", help="forget damaged trajectories, remove leftovers")
    parser.add_argument("--yes", action="store_true", help="do not ask before repairing")


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    return verify(
        arguments.cache_dir,
        deep=arguments.deep,
        as_json=arguments.json,
        repair=arguments.repair,
        yes=arguments.yes,
    )
