"""Every format against the GNM folders of the same trajectories, and against faults in the data of strangers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dino_cache import TrajectoryResult
from formats import WRITERS, BitEncoder, Rendered
from support import check_stamps, read_chunk, stream_results

TRAJECTORIES = [Rendered(1, 40), Rendered(2, 27), Rendered(3, 33)]
OTHERS = [name for name in WRITERS if name != "gnm"]


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, list[str]]]:
    """Kind -> (data folder, names in the order of TRAJECTORIES)."""
    root = tmp_path_factory.mktemp("formats")
    return {kind: (root / kind, write(root / kind, TRAJECTORIES)) for kind, (_, write) in WRITERS.items()}


def cache(data: Path, cache_dir: Path, kind: str, **settings: Any) -> dict[str, TrajectoryResult]:
    settings = {"resize": "stretch", "format": WRITERS[kind][0], **settings}
    return {result.name: result for result in stream_results(data, cache_dir, BitEncoder(), **settings)}


def chunks(cache_dir: Path, name: str) -> list[tuple[tuple[int, int], dict[str, np.ndarray]]]:
    """(start, stop) and datasets of a trajectory's chunks."""
    read = [read_chunk(path) for path in sorted((cache_dir / name).glob("*.h5"))]
    return [((attributes["start"], attributes["stop"]), datasets) for attributes, datasets in read]


@pytest.mark.parametrize("frame_stride", [1, 3])
@pytest.mark.parametrize("kind", OTHERS)
def test_a_format_gives_the_chunks_that_gnm_folders_give(
    tmp_path: Path, written: dict[str, tuple[Path, list[str]]], kind: str, frame_stride: int
) -> None:
    for which in ("gnm", kind):
        results = cache(written[which][0], tmp_path / which, which, frame_stride=frame_stride)
        assert [str(result.error) for result in results.values() if result.error] == []
    for trajectory, gnm_name, name in zip(TRAJECTORIES, written["gnm"][1], written[kind][1]):
        expected, found = chunks(tmp_path / "gnm", gnm_name), chunks(tmp_path / kind, name)
        assert len(expected) > 1
        assert [span for span, _ in found] == [span for span, _ in expected]
        for (_, right), (_, datasets) in zip(expected, found):
            for key in ("frame_index", "position", "travelled_distance"):
                np.testing.assert_array_equal(datasets[key], right[key])
            np.testing.assert_allclose(datasets["yaw"], right["yaw"], rtol=0, atol=1e-12)  # quaternions round
        check_stamps(tmp_path / kind, name, trajectory.stamp, frame_stride)
