"""Caches written without a run: the poses, columns and cameras that a test wants, by the writer that a run has."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import dino_cache
from dino_cache import CacheSpec, ChunkLabel, Span, Trajectory, TrajectoryPlan, TrajectoryWriter
from progress_utils import Progress

FINGERPRINT, CHECKSUM = "0" * 16, "c" * 16
WIDTH = 4  # of the CLS tokens


@dataclasses.dataclass
class Robot:
    """A trajectory of T frames, T by the longest of what is given. CLS tokens say (stamp, frame // 256, frame % 256,
    camera)."""

    stamp: int
    position: np.ndarray | None  # (T, 2)
    yaw: np.ndarray | None  # (T,)
    spans: Sequence[tuple[int, int]] | None = None  # None: as the spec cuts it
    columns: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # dataset -> (T, ...)
    count: int = 0
    task: str | None = None

    @property
    def length(self) -> int:
        return max([self.count, *(len(values) for values in (self.position, self.yaw) if values is not None)])


def tokens_of(stamp: int, rows: np.ndarray, camera: int = 0) -> np.ndarray:
    """(n, 4) float16."""
    parts = [np.full_like(rows, stamp), rows // 256, rows % 256, np.full_like(rows, camera)]
    return np.stack(parts, axis=1).astype(np.float16)


def write_cache(cache_dir: Path, robots: dict[str, Robot], cameras: Sequence[str] = (), **settings: Any) -> Path:
    """A cache of these trajectories; returns its folder. `settings` are the spec's."""
    defaults = {"dino_model_type": "small", "weights": "random", "precision": "fp32", "image_size": (28, 42)}
    cut = {"max_chunk_distance_m": 2.0, "overlap_distance_m": 0.5, "min_chunk_distance_m": 0.0}
    keys = {"image_key": {camera: f"images/{camera}" for camera in cameras}} if cameras else {}
    spec = CacheSpec(**{**defaults, **cut, **keys, **settings})
    label = ChunkLabel("robot", spec, FINGERPRINT, "0" * 32, {"cls_token": (WIDTH,)})
    progress = Progress(cache_dir, "robot")
    progress.processing_config = progress.specs[FINGERPRINT] = spec.to_json()
    for name, robot in robots.items():
        folder, plan = cache_dir / name, plan_of(name, robot, spec)
        folder.mkdir(parents=True)
        writer = TrajectoryWriter(folder, plan, label)
        for row in plan.stored_rows:
            rows = np.array([row])
            for place, camera in enumerate(cameras or [None]):
                writer.write(rows, {"cls_token": tokens_of(robot.stamp, rows, place)}, camera)
        record = {"fingerprint": FINGERPRINT, "spans": [list(span) for span in plan.spans], "bytes": writer.chunk_bytes}
        progress.complete(name, CHECKSUM, {**record, "checksum_kind": "stat"})
    progress.save()
    return cache_dir


def plan_of(name: str, robot: Robot, spec: CacheSpec) -> TrajectoryPlan:
    by_distance = spec.chunk_by == "distance"
    travelled = dino_cache.travelled_distance(robot.position) if by_distance else None
    if robot.spans is not None:
        spans = [Span(*span) for span in robot.spans]
    elif by_distance:
        limits = spec.max_chunk_distance_m, spec.overlap_distance_m, spec.min_chunk_distance_m
        spans = dino_cache.plan_chunks(travelled, *limits)
    else:
        spans = dino_cache.plan_frame_chunks(robot.length, spec.max_chunk_frames, spec.overlap_frames)
    numbers = np.arange(robot.length) * spec.frame_stride
    return TrajectoryPlan(
        trajectory=Trajectory(name, Path(name)),
        checksum=CHECKSUM,
        checksum_kind="stat",
        stat_checksum=CHECKSUM,
        frame_index=numbers,
        position=robot.position,
        yaw=robot.yaw,
        travelled=travelled,
        spans=spans,
        columns=robot.columns,
        task=robot.task,
    )
