"""LeRobot datasets as navigation has them: small roots in a tree, pictures beside the parquet files, 4 x 4 poses."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
from formats_support import FPS

from support import SIZE, Rendered, encoded

RGB = "observation.images.rgb"


def matrix(x: float, y: float, yaw: float, pose_axes: str) -> np.ndarray:
    """(4, 4) of a body at (x, y), seen from above, that looks along yaw, with a height of 7; by hand from the table of
    docs/formats.md: its columns are where the body's own axes point."""
    ahead, left, up = (math.cos(yaw), math.sin(yaw)), (-math.sin(yaw), math.cos(yaw)), 1.0
    place = {  # what is a, b, h (along the plane's axes, and up) in the source's coordinates
        "z_up": lambda a, b, h: (a, b, h), "ned": lambda a, b, h: (a, -b, -h),
        "y_up": lambda a, b, h: (-b, h, -a), "camera": lambda a, b, h: (-b, -h, a),
    }[pose_axes]  # fmt: skip
    ahead_3d, left_3d, up_3d = place(*ahead, 0), place(*left, 0), place(0, 0, up)
    opposite = lambda vector: tuple(-value for value in vector)  # noqa: E731
    columns = {
        "z_up": (ahead_3d, left_3d, up_3d), "ned": (ahead_3d, opposite(left_3d), opposite(up_3d)),
        "y_up": (opposite(left_3d), up_3d, opposite(ahead_3d)),
        "camera": (opposite(left_3d), opposite(up_3d), ahead_3d),
    }[pose_axes]  # fmt: skip
    pose = np.eye(4)
    pose[:3, :3], pose[:3, 3] = np.array(columns).T, place(x, y, 7.0)
    return pose


def matrices(trajectory: Rendered, pose_axes: str = "z_up") -> list[np.ndarray]:
    return [matrix(x, y, yaw, pose_axes) for (x, y), yaw in zip(trajectory.position, trajectory.yaw)]


def write_root(
    root: Path,
    trajectories: list[Rendered],
    *,
    columns: dict[str, Any] | None = None,
    features: dict[str, Any] | None = None,
    numbered: bool = True,
    names: str = "{number}.jpg",
    image_index: bool = True,
    first: int = 0,
    **info: Any,
) -> None:
    """A root of v2.1 with pictures as files. `columns(trajectory)`: those of the parquet file (`action` with 16 numbers
    a row unless told); `names` may hold {episode}; `first`: the number of the folder's first picture."""
    (root / "meta").mkdir(parents=True)
    folder = root / f"videos/chunk-000/{RGB}"
    folder.mkdir(parents=True)
    (root / "data/chunk-000").mkdir(parents=True)
    columns = columns or (lambda trajectory: {"action": [pose.ravel().tolist() for pose in matrices(trajectory)]})
    number, entries, stats = first, [], []
    for episode, trajectory in enumerate(trajectories):
        rows = dict(columns(trajectory))
        if numbered:
            numbers = np.arange(trajectory.count)
            rows |= {"frame_index": numbers, "episode_index": np.full(trajectory.count, episode)}
            rows |= {"timestamp": pyarrow.array(numbers / FPS, pyarrow.float32())}
        pyarrow.parquet.write_table(pyarrow.table(rows), root / f"data/chunk-000/episode_{episode:06d}.parquet")
        for row, frame in enumerate(trajectory.frames):
            name = names.format(number=row if "episode" in names else number + row, episode=episode)
            (folder / name).write_bytes(encoded(frame, "JPEG" if name.endswith("jpg") else "PNG"))
        entries.append({"episode_index": episode, "tasks": [f"drive {episode}"], "length": trajectory.count})
        stats.append({"episode_index": episode, "image_index": {"min": number, "max": number + trajectory.count - 1}})
        number += trajectory.count
    lines = {"episodes": entries} | ({"episodes_stats": stats} if image_index else {})
    for name, values in lines.items():
        (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(value) + "\n" for value in values))
    described = {RGB: {"dtype": "image", "shape": [*SIZE, 3]}, "action": {"dtype": "float32", "shape": [16]}}
    described = {**described, **(features or {})}
    content = {
        "codebase_version": "v2.1", "fps": FPS, "chunks_size": 1000, "video_path": None,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "features": {key: value for key, value in described.items() if value is not None},
    }  # fmt: skip
    (root / "meta/info.json").write_text(json.dumps({**content, **info}))
