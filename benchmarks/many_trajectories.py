"""How a run's bookkeeping scales: resume, record and show with very many trajectories.

    python benchmarks/many_trajectories.py --trajectories 100000

Makes so many tiny trajectories (frames and chunk files are hard links) with a record that says that all are completed,
then measures:

    resume       `dino_cache.py` with nothing to do, over a bare walk: os.walk, a stat of every file, every pose file
                 read; in turns in the same run
    record       share of a run's time that recording takes, over trajectories more at 10 ms of other work each: 2 % is
                 what the saves are spaced for, so over a few spaces it must come out as no more
    show, list   seconds

Prints a table and, last, one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dino_cache  # noqa: E402
from progress_utils import Progress, chunk_file_name  # noqa: E402

FRAMES = 4
TRAJECTORIES_PER_SOURCE = 10_000  # ext4 allows 65,000 hard links to a file


def make_dataset(root: Path, count: int) -> None:
    """`count` trajectories of FRAMES frames below root/data, every one recorded as completed in root/cache."""
    sources = root / "sources"
    sources.mkdir()
    spec = dino_cache.CacheSpec(dino_model_type="small", weights="random", image_size=(28, 28), precision="fp32")
    progress = Progress(root / "cache", "many")
    progress.processing_config = spec.to_json()
    progress.weights = {**dino_cache.weights_source(spec), "digest": "0" * 16}
    fingerprint = spec.fingerprint("0" * 16)
    progress.specs[fingerprint] = spec.to_json()
    poses = pickle.dumps({"position": np.stack([np.arange(FRAMES), np.zeros(FRAMES)], 1), "yaw": np.zeros(FRAMES)})
    for index in range(count):
        if index % TRAJECTORIES_PER_SOURCE == 0:
            frame, chunk = sources / f"{index}.jpg", sources / f"{index}.h5"
            Image.new("RGB", (32, 32)).save(frame)
            chunk.write_bytes(bytes(1000))
        name = f"t{index:06d}"
        folder, chunks = root / "data" / name, root / "cache" / name
        folder.mkdir(parents=True)
        chunks.mkdir(parents=True)
        for number in range(FRAMES):
            os.link(frame, folder / f"{number}.jpg")
        (folder / "traj_data.pkl").write_bytes(poses)
        os.link(chunk, chunks / chunk_file_name(0))
        if index == 0:  # all have the same files, so the same checksum
            listing = dino_cache.list_trajectory(dino_cache.Trajectory(name, folder), spec.frame_pattern)
            checksum = dino_cache.trajectory_checksum(listing, "stat")
        record = {"fingerprint": fingerprint, "spans": [[0, FRAMES]], "bytes": [1000], "checksum_kind": "stat"}
        progress.complete(name, checksum, record)
    progress.save()
    config = {**{key: spec.to_json()[key] for key in ("dino_model_type", "weights", "image_size", "precision")}}
    config["datasets"] = {"many": {"data_folder": str(root / "data"), "cache_dir": str(root / "cache")}}
    (root / "config.yaml").write_text(yaml.safe_dump(config))


def bare_walk(root: Path) -> None:
    """List the same folders, stat the same files, read the same pose files as a resume must."""
    for side in ("data", "cache"):
        for folder, _, files in os.walk(root / side):
            for file in files:
                path = os.path.join(folder, file)
                os.stat(path)
                if file.endswith(".pkl"):
                    with open(path, "rb") as poses:
                        poses.read()


def timed(command: list[str]) -> tuple[float, int]:
    """Seconds and exit code of a command."""
    begin = time.perf_counter()
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode
    return time.perf_counter() - begin, code


def recording_share(root: Path, more: int = 4000) -> float:
    """Share of the time that recording takes while `more` trajectories are recorded, after a run's first save."""
    progress = Progress.load(root / "cache")
    name, record = next(iter(progress.records.items()))
    checksum = progress.checksums[name]
    progress.save()
    begin, recording_s = time.monotonic(), 0.0
    for index in range(more):
        time.sleep(0.01)
        start = time.monotonic()
        progress.complete(f"more{index}", checksum, record)
        progress.save_spaced(start - begin)
        recording_s += time.monotonic() - start
    return recording_s / (time.monotonic() - begin)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=20_000)
    parser.add_argument("--repetitions", type=int, default=3)
    arguments = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="many_trajectories_"))
    try:
        make_dataset(root, arguments.trajectories)
        run = [sys.executable, str(ROOT / "dino_cache.py"), "--config", str(root / "config.yaml")]
        ratios = []
        for _ in range(arguments.repetitions):
            begin = time.perf_counter()
            bare_walk(root)
            walk_s = time.perf_counter() - begin
            resume_s, code = timed(run)
            assert code == 0, "the resume found something to do"
            ratios.append((resume_s / walk_s, resume_s, walk_s))
        ratio, resume_s, walk_s = sorted(ratios)[len(ratios) // 2]
        utils = [sys.executable, str(ROOT / "progress_utils.py")]
        show_s = statistics.median(timed([*utils, "show", "--cache-dir", str(root / "cache")])[0] for _ in range(3))
        list_s = statistics.median(timed([*utils, "list", "--root", str(root / "cache")])[0] for _ in range(3))
        result = {
            "trajectories": arguments.trajectories,
            "resume_over_bare_walk": round(ratio, 2),
            "spread": [round(min(ratios)[0], 2), round(max(ratios)[0], 2)],
            "resume_s": round(resume_s, 2),
            "bare_walk_s": round(walk_s, 2),
            "recording_share": round(recording_share(root), 4),
            "show_s": round(show_s, 3),
            "list_s": round(list_s, 3),
            "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
        }
        for key, value in result.items():
            print(f"{key:24} {value}")
        print(json.dumps(result))
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
