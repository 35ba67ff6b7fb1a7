"""What a report reads from a cache."""

from __future__ import annotations

import bisect
import calendar
import itertools
import math
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dino_cache import TOKEN_DATASETS, cameras_of, token_dataset, token_names, token_of
from dino_cache_extras.chunk_files import NewRows, pieces, recorded_chunk, stored_datasets
from dino_cache_extras.smaller_tokens import read_rows, stored_cosines
from progress_utils import Progress, RefusedError

REPORT_SEED = 0
REPORT_CHUNKS = 300  # looked into for time and distance
REPORT_TRAJECTORIES = 12  # shown with their map and similarity
REPORT_CHUNKS_OF_ONE = 100  # of one trajectory, from its beginning
REPORT_POINTS = 400  # of one trajectory's similarity
REPORT_PICTURES = 6  # frames shown with their patch tokens
NIGHT_GAP_S = 1800.0  # so long without a chunk: another night
FROZEN_FRAMES = 5  # in a row with equal features, though the robot moves
SHUFFLED_LEAST = 20  # frames; fewer say nothing
SHUFFLED_RATIO = 0.75  # of how far neighbours are apart to how far any two frames are


class ChunkFacts(NamedTuple):
    """What a report needs of a sampled chunk."""

    num_frames: int
    distance_m: float | None  # None where chunks were cut by number of frames
    created_at: float  # epoch seconds
    new_frames: int  # of it and of the chunks since the one sampled before, in the order of completion
    versions: str
    cosines: list[float]  # between stored and computed, of the int8 tokens that it has a sample of


class TrajectorySample(NamedTuple):
    """What a report shows of a sampled trajectory: n frames of those looked into."""

    name: str
    paths: list[Any]  # per chunk (L, 2) [m]; none where there are no positions
    jumps: list[int]  # numbers of the chunks before which the pose jumps
    jump_frames: list[int]
    frame_index: Any  # (n,)
    camera: str | None  # of several, the one whose features these are
    to_first: Any  # (n,) cosine similarity with the first frame
    to_next: Any  # (n,) with the frame after it
    chunks_seen: int
    num_chunks: int  # in all
    remarks: list[str]


class CacheSample:
    """The record, and what was read of a sample of its chunk files. A file that is not as recorded is left out."""

    def __init__(self, progress: Progress, data_folder: Path | None):
        self.progress, self.data_folder = progress, data_folder
        self.random = random.Random(REPORT_SEED)
        self.problems: dict[str, None] = {}
        self.num_frames = {
            name: sum(rows.stop - rows.start for episode in pieces(progress, name) for rows in episode)
            for name in progress.records
        }
        self.facts = self._sampled_facts()
        names = list(progress.records)
        chosen = names if len(names) <= REPORT_TRAJECTORIES else self.random.sample(names, REPORT_TRAJECTORIES)
        samples = [self.tried(_sample_trajectory, progress, name) for name in sorted(chosen)]
        self.trajectories = [sample for sample in samples if sample is not None]

    def tried(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RefusedError as error:
            self.problems[str(error)] = None
            return None

    def _sampled_facts(self, after: float = 0.0) -> list[ChunkFacts]:
        """Facts of evenly spaced chunks of trajectories completed since `after` [epoch s], about; in order of time."""
        progress = self.progress
        rows = [(name, new) for name in progress.records for episode in pieces(progress, name) for new in episode]
        if after:
            rows = rows[self._first_chunk_after(rows, after) :]
        step = max(1, math.ceil(len(rows) / REPORT_CHUNKS))
        facts = []
        for last in range(step - 1, len(rows), step):
            name, new = rows[last]
            count = sum(part.stop - part.start for _, part in rows[last - step + 1 : last + 1])
            facts.append(self.tried(_chunk_facts, self.progress, name, new.index, count))
        return sorted((fact for fact in facts if fact is not None), key=lambda fact: fact.created_at)

    def _first_chunk_after(self, rows: list[tuple[str, NewRows]], after: float) -> int:
        """Where, in the order of completion, chunks are younger; by bisection, a redone one may be out of order."""

        def is_older(row: tuple[str, NewRows]) -> bool:
            fact = self.tried(_chunk_facts, self.progress, row[0], row[1].index, 0)
            return fact is not None and fact.created_at < after

        return bisect.bisect_left(rows, True, key=lambda row: not is_older(row))

    def last_night(self) -> list[ChunkFacts]:
        """Facts of chunks since the last long gap."""
        times = [fact.created_at for fact in self.facts]
        gaps = [later - earlier for earlier, later in zip(times, times[1:])]
        long = max(NIGHT_GAP_S, 20 * sorted(gaps)[len(gaps) // 2]) if gaps else NIGHT_GAP_S
        begins = [time_ for time_, gap in zip(times[1:], gaps) if gap > long]
        return self.facts_between(begins[-1], math.inf) if begins else self.facts

    def facts_between(self, begin: float, end: float) -> list[ChunkFacts]:
        """Facts of chunks made from `begin` to `end` [epoch s], sampled as densely as those of all."""
        has_all = bool(self.facts) and begin <= self.facts[0].created_at
        facts = self.facts if has_all else self._sampled_facts(begin)
        return [fact for fact in facts if begin <= fact.created_at <= end]


def _chunk_facts(progress: Progress, name: str, index: int, new_frames: int) -> ChunkFacts:
    with recorded_chunk(progress, name, index, deep=False) as chunk:
        travelled = chunk.get("travelled_distance")
        created_at = calendar.timegm(time.strptime(chunk.attrs["created_at"], "%Y-%m-%dT%H:%M:%SZ"))
        distance_m = None if travelled is None else float(travelled[-1] - travelled[0])
        num_frames, cosines = len(chunk["frame_index"]), stored_cosines(chunk)
        return ChunkFacts(num_frames, distance_m, created_at, new_frames, chunk.attrs["versions"], cosines)


def _sample_trajectory(progress: Progress, name: str) -> TrajectorySample:
    """Read positions and, of evenly spaced frames, features of a trajectory's first chunks."""
    record = progress.records[name]
    found = pieces(progress, name)
    parts = [rows for piece in found for rows in piece][:REPORT_CHUNKS_OF_ONE]
    jumps = [piece[0].index for piece in found[1:] if piece[0].index < len(parts)]
    cameras = cameras_of(progress.specs[record["fingerprint"]].get("image_key"))
    pairs: dict[str | None, list[Any]] = {camera: [] for camera in cameras}
    paths, rows, steps, jump_frames = [], [], [], []
    for new in parts:
        with recorded_chunk(progress, name, new.index, deep=False) as chunk:
            index = chunk["frame_index"][...]
            if "position" in chunk:
                paths.append(chunk["position"][...])
            if new.index in jumps:
                jump_frames.append(int(index[0]))
            wanted = np.arange(max(0, new.start - 1), len(index) - 1, max(1, len(parts) * len(index) // REPORT_POINTS))
            for camera in cameras:
                pairs[camera] += [_feature_pair(chunk, row, camera) for row in wanted]
            rows += index[np.stack([wanted, wanted + 1], axis=1)].tolist()
            if paths:
                steps += np.linalg.norm(paths[-1][wanted + 1] - paths[-1][wanted], axis=1).tolist()
    rows = np.array(rows, int).reshape(-1, 2)
    steps_m = np.array(steps) if paths else np.zeros(len(rows))
    remarks: list[str] = []
    for camera in reversed(cameras):  # the first one, which is shown, comes last
        unit = _unit_pairs(pairs[camera])
        to_next = (unit[:, 0] * unit[:, 1]).sum(1)
        found_here = _camera_remarks(unit[:, 0], to_next, steps_m, rows)
        remarks[:0] = [remark if camera is None else f"{camera}: {remark}" for remark in found_here]
    to_first = unit[:, 0] @ unit[0, 0] if len(rows) else to_next
    return TrajectorySample(
        name=name,
        paths=paths,
        jumps=jumps,
        jump_frames=jump_frames,
        frame_index=rows[:, 0],
        camera=cameras[0],
        to_first=to_first,
        to_next=to_next,
        chunks_seen=len(parts),
        num_chunks=len(record["spans"]),
        remarks=remarks,
    )


def _unit_pairs(pairs: list[Any]) -> Any:
    """(n, 2, D) float32 of n pairs (2, D), each vector of length 1."""
    stacked = np.stack(pairs) if pairs else np.zeros((0, 2, 1), np.float32)
    return stacked / np.maximum(np.linalg.norm(stacked, axis=2, keepdims=True), 1e-12)


def _feature_pair(chunk: Any, row: int, camera: str | None) -> Any:
    """(2, D): a frame's vector and the next one's: the CLS token, else the mean of the tokens that there are; of the
    last layer."""
    prefix = token_dataset(camera, "")
    there = sorted((name for name in (chunk[prefix] if prefix else chunk) if token_of(name)), reverse=True)
    name = prefix + next(name for token in TOKEN_DATASETS for name in there if token_of(name) == token)
    tokens = read_rows(chunk, name, slice(row, row + 2)).astype("float32")
    return tokens.reshape(2, -1, tokens.shape[-1]).mean(1)


def _camera_remarks(unit: Any, to_next: Any, steps_m: Any, rows: Any) -> list[str]:
    """What looks wrong about a camera, of n frames that were looked into.

    `unit` (n, D) are unit vectors; `to_next` (n,) similarities with, `steps_m` (n,) steps to the frame after it; `rows`
    (n, 2) the numbers of both.
    """
    remarks = []
    frozen = (to_next > 1 - 1e-6) & (steps_m > 1e-3)
    for is_frozen, group in itertools.groupby(range(len(frozen)), frozen.__getitem__):
        numbers = list(group)
        if is_frozen and len(numbers) + 1 >= FROZEN_FRAMES:
            first, last = rows[numbers[0], 0], rows[numbers[-1], 1]
            remarks.append(f"frozen camera? frames {first} to {last} are alike though the robot moves")
    if len(unit) >= SHUFFLED_LEAST:
        apart = np.sqrt(np.maximum(0, 1 - unit @ unit.T))[~np.eye(len(unit), dtype=bool)].mean()
        next_apart = np.sqrt(np.maximum(0, 1 - to_next)).mean()
        if next_apart > SHUFFLED_RATIO * apart and apart > 1e-3:
            remarks.append("frames out of order? neighbours are hardly more alike than any two frames")
    return remarks


def stored_columns(progress: Progress) -> str | None:
    """The datasets of the latest trajectory's first chunk, each with the shape of a row and its type; and its task."""
    if not progress.records:
        return None
    with recorded_chunk(progress, next(reversed(progress.records)), 0, deep=False) as chunk:
        task = f"; task: {chunk.attrs['task']}" if "task" in chunk.attrs else ""
        stored = stored_datasets(chunk).items()
        return ", ".join(f"{name} {dataset.shape[1:]} {dataset.dtype}" for name, dataset in stored) + task


def frames_to_picture(sample: CacheSample) -> list[tuple[str, int, int]]:
    """(trajectory, chunk, row) of some frames: a third and two thirds into sampled trajectories with patch tokens."""
    specs, records = sample.progress.specs, sample.progress.records
    names = [
        shown.name
        for shown in sample.trajectories
        if "patch" in specs[records[shown.name]["fingerprint"]].get("tokens", ())
    ]
    names = sorted(sample.random.sample(names, min(len(names), REPORT_PICTURES // 2)))
    frames = []
    for name, share in itertools.product(names, (1 / 3, 2 / 3)):
        parts = [rows for episode in pieces(sample.progress, name) for rows in episode]
        row = int(share * sample.num_frames[name])
        for part in parts:
            if row < part.stop - part.start:
                frames.append((name, part.index, part.start + row))
                break
            row -= part.stop - part.start
    return frames


def first_camera(progress: Progress, name: str) -> str | None:
    """A trajectory's first camera, whose pictures are shown."""
    return cameras_of(progress.specs[progress.records[name]["fingerprint"]].get("image_key"))[0]


def read_patches(progress: Progress, name: str, index: int, row: int) -> tuple[str, int, Any]:
    """Trajectory, frame's row in the source, patch tokens (h, w, D) float32."""
    layers = progress.specs[progress.records[name]["fingerprint"]].get("layers")
    dataset = token_dataset(first_camera(progress, name), token_names("patch", layers)[-1])
    with recorded_chunk(progress, name, index, deep=False) as chunk:
        return name, int(chunk["frame_index"][row]), read_rows(chunk, dataset, row).astype("float32")


def colours_of_patches(patches: list[Any]) -> list[Any]:
    """(h, w, 3) uint8 for each (h, w, D): the first three principal components of the patches that have its width."""
    colours: dict[int, Any] = {}
    for width in {grid.shape[-1] for grid in patches}:
        members = [number for number, grid in enumerate(patches) if grid.shape[-1] == width]
        rows = np.concatenate([patches[number].reshape(-1, width) for number in members])  # (N, D)
        centred = rows - rows.mean(0)
        _, axes = np.linalg.eigh(centred.T @ centred)  # ascending
        components = centred @ axes[:, :-4:-1]  # (N, 3)
        low, high = np.percentile(components, (1, 99), axis=0)
        rgb = (255 * np.clip((components - low) / np.maximum(high - low, 1e-12), 0, 1)).astype(np.uint8)
        borders = np.cumsum([math.prod(patches[number].shape[:2]) for number in members])[:-1]
        for number, part in zip(members, np.split(rgb, borders)):
            colours[number] = part.reshape(*patches[number].shape[:2], 3)
    return [colours[number] for number in range(len(patches))]
