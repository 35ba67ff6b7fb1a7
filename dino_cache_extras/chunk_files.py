"""Reading a chunk file, and checking it against its record."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import h5py

from dino_cache import read_chunk_header
from progress_utils import DamagedChunkError, Progress, RefusedError, TrajectoryRecord, chunk_file_name


def check_recorded(path: Path, name: str, record: TrajectoryRecord, checksum: str, index: int, *, deep: bool) -> None:

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


@contextlib.contextmanager
def recorded_chunk(progress: Progress, name: str, index: int, *, deep: bool) -> Iterator[Any]:
    """A recorded chunk file, open for reading once it proved to be what was recorded; with `deep`, every byte of it.

    Raises:
        RefusedError: it is missing or damaged, or a run replaced it since the record was read.
    """

    path = progress.cache_dir / name / chunk_file_name(index)
    try:
        check_recorded(path, name, progress.records[name], progress.checksums[name], index, deep=deep)
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


def pieces(progress: Progress, name: str) -> list[list[NewRows]]:
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
