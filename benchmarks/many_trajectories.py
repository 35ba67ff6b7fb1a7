"""How a run's bookkeeping scales: start, resume, record, show and verify with very many trajectories.

    python benchmarks/many_trajectories.py --trajectories 100000 [--folder /disk/many]
    python benchmarks/many_trajectories.py --records 1000000

Makes so many tiny trajectories (their frames are hard links), each with a chunk file of its own and recorded as
completed, then measures, with the peak memory of each command:

    resume       `dino_cache.py` with nothing to do, over a bare walk: os.walk, a stat of every file, every pose file
                 read; in turns in the same run
    start        `dino_cache.py --dry-run` with an empty cache: all that a first run does before its first batch
    record       share of a run's time that recording takes, over trajectories more at 10 ms of other work each: 0.2 %
                 for the saves, which are spaced for that, as much at most for fsyncs, and a line of the journal each
    show, list, verify, verify --deep

With --records, no data and no chunks are made, only records of so many trajectories and of a tenth of it, and measured:

    completed, failed    milliseconds of this process's time to record one more, while saves are spaced (the journal)
    withdrawn            likewise, the first one apart, which saves the record
    look                 what the display and the heartbeat ask of the record, each time
    growth               each of these over that with a tenth of the trajectories: 1 where nothing grows
    load                 bytes of the peak memory a trajectory, to load the record, of two chunks each

With --folder, data that is there already is taken, and stays. Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import itertools
import os
import pickle
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image
from workload import ROOT, dino_cache, report, scratch

from progress_utils import Progress, TrajectoryRecord

FRAMES = 4
TRAJECTORIES_PER_SOURCE = 10_000  # ext4 allows 65,000 hard links to a file
SPEC = dino_cache.CacheSpec(dino_model_type="small", weights="random", image_size=(28, 28), precision="fp32")


def make_dataset(root: Path, count: int) -> None:
    """`count` trajectories of FRAMES frames below root/data, every one recorded as completed in root/cache."""
    sources, staging = root / "sources", root / "cache" / ".staging"
    for folder in (sources, staging):
        folder.mkdir(parents=True)
    weights = {**dino_cache.weights_source(SPEC), "digest": "0" * 16}
    fingerprint = SPEC.fingerprint(weights["digest"])
    progress = Progress(root / "cache", "many")
    progress.processing_config, progress.weights = SPEC.to_json(), weights
    progress.specs[fingerprint] = SPEC.to_json()
    label = dino_cache.ChunkLabel("many", SPEC, fingerprint, weights["digest"], {"cls_token": (384,)})
    poses = pickle.dumps({"position": np.stack([np.arange(FRAMES), np.zeros(FRAMES)], 1), "yaw": np.zeros(FRAMES)})
    os.fsync = lambda descriptor: None  # this need not survive a power cut
    for index in range(count):
        if index % TRAJECTORIES_PER_SOURCE == 0:
            frame = sources / f"{index}.jpg"
            Image.new("RGB", (32, 32)).save(frame)
        trajectory = dino_cache.Trajectory(f"t{index:06d}", root / "data" / f"t{index:06d}")
        trajectory.path.mkdir(parents=True)
        for number in range(FRAMES):
            os.link(frame, trajectory.path / f"{number}.jpg")
        (trajectory.path / "traj_data.pkl").write_bytes(poses)
        record_as_completed(progress, dino_cache.plan_or_fail(trajectory, SPEC, "stat"), label, staging)
    progress.save()
    config = {key: SPEC.to_json()[key] for key in ("dino_model_type", "weights", "image_size", "precision")}
    for cache in ("cache", "empty"):
        config["datasets"] = {"many": {"data_folder": str(root / "data"), "cache_dir": str(root / cache)}}
        (root / f"{cache}.yaml").write_text(yaml.safe_dump(config))


def record_as_completed(
    progress: Progress, plan: dino_cache.TrajectoryPlan, label: dino_cache.ChunkLabel, staging: Path
) -> None:
    """Write a trajectory's chunk, of tokens that are all 0, and record it."""
    name = plan.trajectory.name
    (staging / name).mkdir()
    writer = dino_cache.TrajectoryWriter(staging / name, plan, label)
    writer.write(np.arange(FRAMES), {"cls_token": np.zeros((FRAMES, 384), np.float16)})
    os.rename(staging / name, progress.cache_dir / name)
    record = {"fingerprint": label.fingerprint, "spans": [list(span) for span in plan.spans]}
    progress.complete(name, plan.checksum, {**record, "bytes": writer.chunk_bytes, "checksum_kind": "stat"})


def bare_walk(root: Path) -> float:
    """List the same folders, stat the same files, read the same pose files as a resume must; returns seconds."""
    begin = time.perf_counter()
    for side in ("data", "cache"):
        for folder, _, files in os.walk(root / side):
            for file in files:
                path = os.path.join(folder, file)
                os.stat(path)
                if file.endswith(".pkl"):
                    with open(path, "rb") as poses:
                        poses.read()
    return time.perf_counter() - begin


class Cost(NamedTuple):
    """Of one command."""

    seconds: float
    peak_mib: float

    def __str__(self) -> str:
        return f"{self.seconds:8.2f} s {self.peak_mib:8.0f} MiB"


def cost(script: str, *arguments: object) -> Cost:
    """Run a command that must end with exit code 0."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit {process.returncode}")
    return Cost(seconds, usage.ru_maxrss / 1024)


def median_cost(repetitions: int, *command: object) -> Cost:
    return statistics.median(cost(*command) for _ in range(repetitions))


def recording_share(root: Path, more: int = 4000) -> float:
    """Share of the time that recording takes while `more` trajectories are recorded, after a run's first save."""
    progress = Progress.load(root / "cache")
    name, record = next(iter(progress.records.items()))
    checksum = progress.checksums[name]
    progress.cache_dir = root / "copy"
    progress.cache_dir.mkdir(exist_ok=True)
    progress.save()
    begin, recording_s = time.monotonic(), 0.0
    for index in range(more):
        time.sleep(0.01)
        start = time.monotonic()
        progress.complete(f"more{index}", checksum, record)
        progress.save_spaced(start - begin)
        recording_s += time.monotonic() - start
    return recording_s / (time.monotonic() - begin)


def measure(root: Path, count: int, repetitions: int) -> None:
    """Take every measure and print it."""
    walks, resumes = [], []
    for _ in range(repetitions):
        walks.append(bare_walk(root))
        resumes.append(cost("dino_cache.py", "--config", root / "cache.yaml"))
    utils, at = "progress_utils.py", ("--cache-dir", root / "cache")
    costs = {
        "resume": statistics.median(resumes),
        "start": median_cost(1, "dino_cache.py", "--config", root / "empty.yaml", "--dry-run"),
        "show": median_cost(repetitions, utils, "show", *at),
        "list": median_cost(repetitions, utils, "list", "--root", root / "cache"),
        "verify": median_cost(1, utils, "verify", *at),
        "verify --deep": median_cost(1, utils, "verify", *at, "--deep"),
    }
    walk_s = statistics.median(walks)
    ratio = statistics.median(resume.seconds / walk for resume, walk in zip(resumes, walks))
    shares = {"recording_share": round(recording_share(root), 4)}
    rows = {"trajectories": count, "bare_walk_s": round(walk_s, 2), "resume_over_bare_walk": round(ratio, 2), **shares}
    report("Very many trajectories", rows | costs)


def make_record(cache_dir: Path, count: int) -> None:
    """A record of `count` completed trajectories, of which nothing else is there."""
    progress, fingerprint = Progress(cache_dir, "many"), SPEC.fingerprint("0" * 16)
    progress.specs[fingerprint] = SPEC.to_json()
    for index in range(count):
        progress.complete(f"site{index % 97}/t{index:07d}", f"{index:016x}", record_of(index, fingerprint))
    cache_dir.mkdir()
    progress.save()


def record_of(index: int, fingerprint: str) -> TrajectoryRecord:
    return {
        "fingerprint": fingerprint,
        "spans": [[0, 300 + index % 97], [290 + index % 97, 500 + index % 89]],
        "bytes": [240_000 + index % 997, 170_000 + index % 991],
        "checksum_kind": "stat",
    }


def milliseconds(count: int, action: Callable[[int], None]) -> float:
    """Of this process's time for one of `count` actions."""
    begin = time.process_time()
    for index in range(count):
        action(index)
    return 1e3 * (time.process_time() - begin) / count


def record_costs(cache_dir: Path, count: int, results: int = 5000) -> dict[str, float]:
    """What a run pays for one result more, with `count` recorded and saves that are spaced."""
    make_record(cache_dir, count)
    progress, fingerprint, begin = Progress.load(cache_dir), SPEC.fingerprint("0" * 16), time.monotonic()
    progress.save()

    def complete(index: int) -> None:
        progress.complete(f"new{index}", "0" * 16, record_of(index, fingerprint))
        progress.save_spaced(time.monotonic() - begin)

    def fail(index: int) -> None:
        failure = {"reason": f"bad{index}/7.jpg: cannot decode", "error_type": "InputError", "attempts": 1}
        progress.fail(f"bad{index}", {**failure, "time": 1.0, "checksum": None, "checksum_kind": "stat"})
        progress.save_spaced(time.monotonic() - begin)

    redone = list(itertools.islice(progress.records, 201))
    progress.to_redo = set(redone)

    def withdraw(index: int) -> None:
        progress.forget(redone[index])
        progress.save_spaced(time.monotonic() - begin, at_once=True)

    costs = {"completed": milliseconds(results, complete), "failed": milliseconds(results, fail)}
    withdraw(200)
    costs["withdrawn"] = milliseconds(200, withdraw)
    costs["look"] = milliseconds(results, lambda _: (progress.total_chunks, progress.fingerprints))
    return costs


def peak_of_loading(cache_dir: Path) -> int:
    """Peak memory [bytes] of a process that loads a record, by its own word: to its parent it seems no smaller than
    the parent itself."""
    code = (
        "import sys, pathlib, progress_utils; progress_utils.Progress.load(pathlib.Path(sys.argv[1]));"
        "print(pathlib.Path('/proc/self/status').read_text().partition('VmHWM:')[2].split()[0])"
    )
    command = [sys.executable, "-c", code, str(cache_dir)]
    return 1024 * int(subprocess.run(command, check=True, cwd=ROOT, capture_output=True).stdout)


def measure_records(root: Path, count: int) -> None:
    """Take the measures of --records and print them."""
    few, many = record_costs(root / "few", count // 10), record_costs(root / "many", count)
    rows: dict[str, object] = {"trajectories": count}
    for what, cost_ms in many.items():
        rows |= {f"{what}_ms": round(cost_ms, 4), f"{what}_growth": round(cost_ms / few[what], 2)}
    more = peak_of_loading(root / "many") - peak_of_loading(root / "few")
    rows["load_bytes_a_trajectory"] = round(more / (count - count // 10))
    report("Records of very many trajectories", rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=20_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the data lies, or is made; it stays")
    parser.add_argument("--make", action="store_true", help="only make the data")
    parser.add_argument("--records", type=int, metavar="N", help="measure records of N trajectories, without data")
    arguments = parser.parse_args()
    with scratch(None) as temporary:
        root = arguments.folder or temporary
        if arguments.records:
            measure_records(temporary, arguments.records)
            return
        if not (root / "cache.yaml").exists():
            make_dataset(root, arguments.trajectories)
        if not arguments.make:
            measure(root, arguments.trajectories, arguments.repetitions)


if __name__ == "__main__":
    main()
