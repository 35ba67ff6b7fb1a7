"""How `executor: ray` scales, with encoders that only sleep: any number of "GPUs" on one machine.

    python benchmarks/ray_scaling.py actors --actors 1 2 4 8         # frames/s over the number of workers
    python benchmarks/ray_scaling.py light --actors 8 64             # only the driver's side, for fast GPUs
    python benchmarks/ray_scaling.py driver                          # the driver's cost for each recorded trajectory
    python benchmarks/ray_scaling.py plot actors.json                # benchmarks/ray_scaling.svg, with matplotlib

Each worker gets the same amount of work: long and short trajectories of tiny frames, so that the cores of one machine
can decode for all of them. A batch takes --batch-ms, as on a device; --batch-size 2 and 10 ms make 200 frames/s a
worker. Efficiency is frames/s over so many times one worker's, from the first trajectory that is handed out to the last
that is recorded; that workers start is not in it. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from workload import dino_cache, make_trajectories, report, scratch

from dino_cache_extras import ray_workers
from progress_utils import Progress

LENGTHS = (500, *[100] * 4, *[20] * 15)  # frames of the trajectories of one worker's share
SPEC = dino_cache.CacheSpec(dino_model_type="small", weights="random", image_size=(28, 42), precision="fp32")


def sleeping_encoder(batch_s: float) -> Callable[..., Any]:
    """A load_encoder whose encoder takes so long for a batch, and no core."""

    def load(spec: dino_cache.CacheSpec, device: str) -> tuple[Any, str]:
        import torch

        class SleepingEncoder:
            batches_in_flight, default_batch_size = 1, 32  # on a device: the host goes on meanwhile
            most_rows = sys.maxsize

            def __init__(self) -> None:
                self._free_at = 0.0

            def new_pixels(self, batch_size: int) -> torch.Tensor:
                return torch.empty((batch_size, 3, *spec.image_size), dtype=torch.uint8)

            def encode(self, pixels: torch.Tensor) -> Callable[[], dino_cache.EncodedRows]:
                self._free_at = done = max(self._free_at, time.monotonic()) + batch_s
                tokens = {"cls_token": np.ones((len(pixels), 384), np.float16)}
                rows = dino_cache.EncodedRows(tokens, np.ones(len(pixels), bool))
                return lambda: (time.sleep(max(0.0, done - time.monotonic())), rows)[1]

            def drop(self) -> None:
                """A device goes on."""

        return SleepingEncoder(), "0" * 16

    return load


def one_run(
    workers: ray_workers.RayWorkers,
    root: Path,
    lengths: list[int],
    load_encoder: Callable[..., Any],
    data_folder: Path | None = None,
    **options: Any,
) -> dict[str, float]:
    """Cache trajectories of these lengths; frames/s, and the share of a core that the driver takes."""
    cache = root / "cache"
    shutil.rmtree(cache, ignore_errors=True)
    cache.mkdir()
    store = dino_cache.ChunkStore(cache)
    store.empty_staging()
    shapes = dino_cache.token_shapes(SPEC, dino_cache.model_shape(SPEC.dino_model_type))
    label = dino_cache.ChunkLabel("benchmark", SPEC, "0" * 16, "0" * 16, shapes)
    names = [f"t{index:04d}" for index in range(len(lengths))]  # as make_trajectories calls them
    found = [dino_cache.Trajectory(name, Path(f"{data_folder}/{name}")) for name in names]
    assignments = sorted(map(ray_workers.Assignment, found, lengths), key=lambda item: -item.num_frames)
    job = ray_workers.WorkerJob(label, dino_cache.RunOptions(**options), load_encoder, cache, data_folder or cache)
    progress = Progress(cache, "benchmark")
    progress.specs["0" * 16] = SPEC.to_json()
    begin = None

    def begins() -> bool:
        nonlocal begin  # asked last before the work begins
        if all(handle.state == "idle" for handle in workers.handles):
            begin = begin or (time.perf_counter(), time.process_time())
        return False

    hooks = dino_cache.Hooks(should_stop=begins)
    for result in ray_workers.RayDataset(workers, assignments, job, store, hooks).results():
        if result.error is not None:
            raise result.error
        record = {"fingerprint": "0" * 16, "spans": result.spans, "bytes": result.chunk_bytes, "checksum_kind": "stat"}
        progress.complete(result.name, result.checksum, record)
        progress.save_spaced(time.perf_counter() - begin[0])
    wall_s, cpu_s = time.perf_counter() - begin[0], time.process_time() - begin[1]
    return {"frames_per_s": sum(lengths) / wall_s, "driver_cores": cpu_s / wall_s}


class LightWorker(ray_workers.RayWorker):
    """A worker without files, threads and torch, of 80 instead of 350 MB: it pulls, sleeps and reports."""

    def load(self, job: ray_workers.WorkerJob, staging: Path) -> None:
        self._encode = job.load_encoder(None, "")

    def _stream(self, first: list[ray_workers.Assignment]) -> None:
        free_at = time.monotonic()
        for trajectory in self._pull(first):
            frames = self._num_frames[trajectory.name]
            free_at = self._encode(frames, free_at)
            outcome = {"spans": [dino_cache.Span(0, frames)], "chunk_bytes": [1000 * frames]}
            result = dino_cache.TrajectoryResult(trajectory.name, "0" * 16, "stat", **outcome)
            self._outbox.put(ray_workers.WorkerReport(num_frames=frames, results=[result]))
        self._outbox.put(ray_workers.WorkerReport(has_ended=True))


def measure_light(arguments: argparse.Namespace) -> None:
    """Only the driver's side: many workers that sleep as long as fast GPUs take."""
    from ray.cluster_utils import Cluster

    speed = arguments.frames_per_s

    def load(*_: Any) -> Callable[[int, float], float]:
        def encode(frames: int, free_at: float) -> float:
            free_at = max(free_at, time.monotonic() - 0.5) + frames / speed  # half a second is under way
            time.sleep(max(0.0, free_at - time.monotonic()))
            return free_at

        return encode

    os.environ["PYTHONPATH"] = str(Path(dino_cache.__file__).parent)
    ray_workers.RayWorker = LightWorker
    ray_workers.LATE_WORKER_S = ray_workers.NO_WORKER_S
    rows: dict[str, Any] = {"frames/s a worker": speed, "frames a trajectory": arguments.length}
    for count in arguments.actors:
        head = {"num_cpus": count, "include_dashboard": False, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        with ray_workers.ray_connection(cluster.address), scratch(arguments.scratch) as root:
            workers = ray_workers.RayWorkers(ray_workers.WorkerPlan("cpu", count, 1), [])
            workers.gather(lambda: False)
            run = one_run(
                workers, root, [arguments.length] * round(count * arguments.seconds * speed / arguments.length), load
            )
        cluster.shutdown()
        rows[f"{count} efficiency"] = round(run["frames_per_s"] / (count * speed), 3)
        rows[f"{count} driver cores"] = round(run["driver_cores"], 3)
    report("ray scaling, the driver's side", rows)


def measure_actors(arguments: argparse.Namespace) -> None:
    """One cluster, one number of workers after the other."""
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = str(Path(dino_cache.__file__).parent)
    ray_workers.LATE_WORKER_S = ray_workers.NO_WORKER_S  # all of them, however long these cores take to start them
    rows: dict[str, Any] = {"batch_ms": arguments.batch_ms, "batch_size": arguments.batch_size}
    for count in arguments.actors:
        head = {"num_cpus": count, "include_dashboard": False, "object_store_memory": 100 << 20}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        load, options = sleeping_encoder(arguments.batch_ms / 1000), {"batch_size": arguments.batch_size}
        lengths = [round(length * arguments.share) for length in LENGTHS] * count
        with ray_workers.ray_connection(cluster.address), scratch(arguments.scratch) as root:
            make_trajectories(root / "first", [20] * (4 * count), size=(32, 24))
            make_trajectories(root / "data", lengths, size=(32, 24))
            workers = ray_workers.RayWorkers(ray_workers.WorkerPlan("cpu", count, 1), [])
            workers.gather(lambda: False)
            one_run(workers, root, [20] * (4 * count), load, root / "first", **options)  # imports, connections
            runs = [one_run(workers, root, lengths, load, root / "data", **options) for _ in range(arguments.runs)]
        cluster.shutdown()
        rows[f"{count} frames/s"] = round(max(run["frames_per_s"] for run in runs), 1)
        rows[f"{count} frames/s, lowest"] = round(min(run["frames_per_s"] for run in runs), 1)
        rows[f"{count} driver cores"] = round(min(run["driver_cores"] for run in runs), 4)
    first = arguments.actors[0]
    for count in arguments.actors:
        rows[f"{count} efficiency"] = round(rows[f"{count} frames/s"] * first / (count * rows[f"{first} frames/s"]), 3)
    report("ray scaling", rows)


def measure_driver(arguments: argparse.Namespace) -> None:
    """Record trajectories at a given pace into a record that holds many already."""
    rows: dict[str, Any] = {}
    record = {"fingerprint": "0" * 16, "spans": [[0, 40]], "bytes": [100_000], "checksum_kind": "stat"}
    for count in arguments.recorded:
        with scratch(arguments.scratch) as root:
            progress = Progress(root, "driver")
            progress.specs["0" * 16] = SPEC.to_json()
            for index in range(count):
                progress.complete(f"recording_{index:07d}", "0" * 16, record)
            progress.save()
            begin, spent_s, done = time.monotonic(), 0.0, 0
            while time.monotonic() < begin + arguments.seconds:
                time.sleep(0.001)
                start = time.monotonic()
                progress.complete(f"more_{done:07d}", "0" * 16, record)
                progress.save_spaced(start - begin)
                spent_s, done = spent_s + time.monotonic() - start, done + 1
            rows[f"{count} recorded: ms each"] = round(1000 * spent_s / done, 4)
            rows[f"{count} recorded: share of time"] = round(spent_s / arguments.seconds, 4)
    report("driver", rows)


def plot(arguments: argparse.Namespace) -> None:
    """Efficiency over workers, of JSON lines that `actors` and `light` printed."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.5))
    for line in arguments.results.read_text().splitlines():
        rows = json.loads(line)
        points = sorted((int(key.split()[0]), value) for key, value in rows.items() if key.endswith("efficiency"))
        if "batch_ms" in rows:
            label = f"whole workers, {1000 * rows['batch_size'] / rows['batch_ms']:.0f} frames/s each"
        else:
            label = f"driver's side only, {rows['frames/s a worker']:.0f} frames/s each"
        axes.plot(*zip(*points), marker="o", label=label)
    axes.axhline(1, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="workers, on two cores", ylabel="frames/s over linear", ylim=(0, 1.1))
    axes.set_xticks([1, 2, 4, 8, 16, 32, 64], [1, 2, 4, 8, 16, 32, 64], minor=False)
    axes.minorticks_off()
    axes.legend()
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".svg"), metadata={"Date": None})


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    actors = commands.add_parser("actors")
    actors.add_argument("--actors", type=int, nargs="+", default=[1, 2, 4, 8])
    actors.add_argument("--batch-ms", type=float, default=10.0)
    actors.add_argument("--batch-size", type=int, default=2)
    actors.add_argument("--share", type=float, default=1.0, help="so many times 1,200 frames for each worker")
    actors.add_argument("--runs", type=int, default=2, help="the best one counts")
    actors.set_defaults(command=measure_actors)
    light = commands.add_parser("light")
    light.add_argument("--actors", type=int, nargs="+", default=[8, 64])
    light.add_argument("--frames-per-s", type=float, default=1500.0)
    light.add_argument("--length", type=int, default=40)
    light.add_argument("--seconds", type=float, default=15.0)
    light.set_defaults(command=measure_light)
    driver = commands.add_parser("driver")
    driver.add_argument("--recorded", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    driver.add_argument("--seconds", type=float, default=20.0)
    driver.set_defaults(command=measure_driver)
    for command in (actors, light, driver):
        command.add_argument("--scratch", help="a folder on the disk to measure on")
    plotting = commands.add_parser("plot")
    plotting.add_argument("results", type=Path)
    plotting.set_defaults(command=plot)
    arguments = parser.parse_args()
    arguments.command(arguments)


if __name__ == "__main__":
    main()
