"""What the benchmarks share: frames to work on, rates, ratios, and how results are printed."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dino_cache  # noqa: E402

NUM_PICTURES = 64  # different ones; further frames are hard links to them
STEP_M = 0.1  # between frames


def make_frame(rng: np.random.Generator, width: int = 640, height: int = 480) -> Image.Image:
    """A picture that a JPEG encoder finds about as hard as a camera's: soft blobs, edges, a little sensor noise."""
    coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    stripes = rng.integers(-40, 40, (1, width // 8, 1)).repeat(8, axis=1)
    noise = rng.normal(0, 6, (height, width, 1))
    return Image.fromarray(np.clip(picture + stripes + noise, 0, 255).astype(np.uint8))


def make_trajectories(data_folder: Path, lengths: list[int], size: tuple[int, int] = (640, 480)) -> None:
    """Trajectories t0000, t0001, ... of so many JPEG frames, moving straight at STEP_M a frame."""
    rng = np.random.default_rng(0)
    pictures = data_folder.with_name(data_folder.name + "_pictures")
    if not pictures.exists():
        pictures.mkdir(parents=True)
        for index in range(NUM_PICTURES):
            make_frame(rng, *size).save(pictures / f"{index}.jpg", quality=85)
    for index, length in enumerate(lengths):
        folder = data_folder / f"t{index:04d}"
        folder.mkdir(parents=True)
        for number in range(length):
            os.link(pictures / f"{number % NUM_PICTURES}.jpg", folder / f"{number}.jpg")
        position = np.stack([np.arange(length) * STEP_M, np.zeros(length)], axis=1)
        (folder / "traj_data.pkl").write_bytes(pickle.dumps({"position": position, "yaw": np.zeros(length)}))


def data_of(root: Path, *lengths: int, size: tuple[int, int] = (640, 480)) -> Path:
    """A data folder with trajectories of these lengths and pictures of this size, made once."""
    name = "_".join(map(str, dict.fromkeys(lengths))) + f"_x{len(lengths)}_{size[0]}"
    folder = root / f"data_{name}"
    if not folder.exists():
        make_trajectories(folder, list(lengths), size)
    return folder


def cache_once(
    data_folder: Path,
    cache_dir: Path,
    spec: dino_cache.CacheSpec,
    encoder: Any,
    on_result: Callable[[dino_cache.TrajectoryResult], None] | None = None,
    **options: Any,
) -> float:
    """Run the whole pipeline, files to durable chunks, into an empty `cache_dir`; returns seconds."""
    shutil.rmtree(cache_dir, ignore_errors=True)
    store = dino_cache.ChunkStore(cache_dir)
    cache_dir.mkdir(parents=True)
    store.empty_staging()
    shapes = dino_cache.token_shapes(spec, dino_cache.model_shape(spec.dino_model_type))
    label = dino_cache.ChunkLabel("benchmark", spec, "0" * 16, "0" * 16, shapes)
    trajectories = list(dino_cache.find_trajectories(data_folder))
    begin = time.perf_counter()
    run = dino_cache.RunOptions(**options)
    for result in dino_cache.cache_trajectories(trajectories, label, run, encoder, store, dino_cache.Hooks()):
        if result.error is not None:
            raise result.error
        if on_result is not None:
            on_result(result)
    seconds = time.perf_counter() - begin
    shutil.rmtree(cache_dir)
    return seconds


def rate_of_difference(short: int, long: int, seconds: Callable[[int], float]) -> float:
    """Frames/s from two runs of different length, so that starting and ending cancel."""
    short_s = seconds(short)
    return (long - short) / (seconds(long) - short_s)


class Spread(NamedTuple):
    """Median and range of a figure over repetitions."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        median, low, high = (f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in self)
        return f"{median:>8}   ({low} to {high})"


def interleave(repetitions: int, **measures: Callable[[], float]) -> dict[str, list[float]]:
    """Take every measure once, in turn, `repetitions` times: what slows the machine for a while slows them all."""
    values: dict[str, list[float]] = {name: [] for name in measures}
    for _ in range(repetitions):
        for name, measure in measures.items():
            values[name].append(measure())
    return values


def ratios(values: dict[str, list[float]], over: str, under: str) -> Spread:
    """Ratio of medians; its range is that of the pairs taken in one turn."""
    pairs = [a / b for a, b in zip(values[over], values[under])]
    return Spread(statistics.median(values[over]) / statistics.median(values[under]), min(pairs), max(pairs))


def report(title: str, rows: dict[str, Spread | float | int | str]) -> None:
    """A table for people and, last, one JSON line."""
    print(f"\n{title}\n{'-' * len(title)}")
    for name, value in rows.items():
        print(f"{name:44} {value}")
    machine = {"cores": dino_cache.available_cores(), "python": platform.python_version()}
    versions = json.loads(dino_cache.library_versions())
    content = {name: value._asdict() if isinstance(value, Spread) else value for name, value in rows.items()}
    print(json.dumps({"benchmark": title, **content, "machine": {**machine, **versions}}), flush=True)


@contextlib.contextmanager
def scratch(folder: str | None) -> Iterator[Path]:
    """A folder of one's own, on the disk that is to be measured; removed afterwards."""
    path = Path(tempfile.mkdtemp(prefix="dino_cache_benchmark_", dir=folder))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
