"""What bounds a run where the encoder does not: whole runs in processes of their own, of this checkout and another.

Commands `ceiling` and `memory` of throughput.py.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from instant_run import PROC, InstantEncoder, process_tree
from workload import ROOT, Spread, data_of, dino_cache, interleave, ratios, report

INSTANT_RUN = Path(__file__).with_name("instant_run.py")
LOOK_EVERY_S = 0.1  # at the memory of the processes
BUSY = 0.5  # of the cores' load, from which two runs in turn do not find the same machine
SHORT_FRAMES = 20  # of a short trajectory
LEAST_FRAMES = 16 * InstantEncoder.default_batch_size  # of the longest case; a quarter of them must have a middle
TINY, CAMERA = (16, 16), (640, 480)


class Checkout(NamedTuple):
    """A version of the program, and the settings that it is run with."""

    folder: Path
    settings: dict[str, Any]


class WholeRun(NamedTuple):
    """What one run took; times from its middle, where frames are read ahead at either end."""

    frames_per_s: float
    main_us: float  # processor microseconds of the main process a frame
    all_us: float  # likewise of all processes
    start_s: float  # from launch to the first batch
    end_s: float  # from the last frames' middle to the end of the process
    memory_mib: float  # at its peak, of all processes


# ----------------------------------------------------------------------------------------------------------------------
# One run
# ----------------------------------------------------------------------------------------------------------------------


def run_once(
    checkout: Checkout, data: Path, root: Path, num_frames: int, settings: dict[str, Any], *, weigh: bool = False
) -> WholeRun:
    """Cache `data`, anew, with an encoder that answers at once; `weigh` looks at the memory, which disturbs a little.

    Raises:
        SystemExit: the run failed, or encoded other than `num_frames` frames.
    """
    config, job_file, marks, log = (root / name for name in ("run.yaml", "job.json", "marks.json", "run.log"))
    cache_dir = root / "cache"
    shutil.rmtree(cache_dir, ignore_errors=True)
    paths = {"data_folder": str(data), "cache_dir": str(cache_dir)}
    common = {"weights": "random", "precision": "fp32", "device": "cpu", "datasets": {"run": paths}}
    config.write_text(json.dumps({**common, **settings, **checkout.settings}))  # JSON is YAML
    lead = max(InstantEncoder.default_batch_size, num_frames // 8)
    job = {"config": str(config), "marks": str(marks), "num_frames": num_frames, "lead": lead}
    job_file.write_text(json.dumps(job))
    command = [sys.executable, "-W", "ignore", str(INSTANT_RUN), str(job_file)]
    environment = {**os.environ, "DINO_CACHE_CHECKOUT": str(checkout.folder)}
    begin, peak = time.time(), 0.0
    with log.open("wb") as output, subprocess.Popen(command, env=environment, stdout=output, stderr=output) as process:
        try:
            while weigh and process.poll() is None:
                peak = max(peak, tree_memory_mib(process.pid))
                time.sleep(LOOK_EVERY_S)
            process.wait()
        finally:
            process.kill()  # where this program is interrupted; otherwise it has ended
    ended = time.time()
    if process.returncode:
        sys.exit(f"{checkout.folder}: exit code {process.returncode}\n{log.read_text(errors='replace')[-3000:]}")
    shutil.rmtree(cache_dir)
    return measured(json.loads(marks.read_text()), num_frames, begin, ended, peak)


def measured(marks: dict[str, Any], num_frames: int, launched: float, ended: float, peak_mib: float) -> WholeRun:
    """Rates between the marks "begin" and "end"."""
    if marks["done"]["frames"] != num_frames:
        sys.exit(f"{marks['done']['frames']} frames were encoded instead of {num_frames}")
    begin, end = marks["begin"], marks["end"]
    frames = end["frames"] - begin["frames"]
    return WholeRun(
        frames_per_s=frames / (end["time"] - begin["resumed_time"]),
        main_us=(end["main_s"] - begin["resumed_main_s"]) / frames * 1e6,
        all_us=(end["all_s"] - begin["all_s"]) / frames * 1e6,
        start_s=marks["first"]["time"] - launched,
        end_s=ended - end["time"],
        memory_mib=peak_mib,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Memory of all processes
# ----------------------------------------------------------------------------------------------------------------------


def tree_memory_mib(root: int) -> float:
    """Memory [MiB] of a process and its descendants.

    Pages that several of them hold, of shared memory or since a fork, are counted once (proportional set size). Pages
    of files, libraries above all, count once for the process that holds most of them: shares of these would depend on
    what else runs on the machine. Without smaps_rollup, resident sets are added up, which counts shared pages anew.
    """
    own_kib, file_kib = 0, [0]
    for pid in process_tree(root):
        status = kib_of(PROC / str(pid) / "status")
        shares = kib_of(PROC / str(pid) / "smaps_rollup")
        if "Pss_Anon" in shares:
            own_kib += shares["Pss_Anon"] + shares["Pss_Shmem"]
            file_kib.append(status.get("RssFile", 0))
        else:
            own_kib += status.get("VmRSS", 0)
    return (own_kib + max(file_kib)) / 1024


def kib_of(path: Path) -> dict[str, int]:
    """The lines `Name:  123 kB` of a file in /proc; none where it, or its process, is not there."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return {}
    rows = (line.split() for line in lines)
    return {row[0].removesuffix(":"): int(row[1]) for row in rows if len(row) == 3 and row[2] == "kB"}


# ----------------------------------------------------------------------------------------------------------------------
# Commands
# ----------------------------------------------------------------------------------------------------------------------


KNOWN_SETTINGS = """
import json, sys
sys.path[:0] = [sys.argv[1]]
import dino_cache
print(json.dumps([*dino_cache.CacheSpec.model_fields, *dino_cache.RunOptions.model_fields]))
"""


def settings_of(option: str, pairs: list[str]) -> dict[str, Any]:
    """`KEY=VALUE`, as on the command line, with values as in a config.

    Raises:
        SystemExit: this checkout has no such setting.
    """
    settings = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key not in {*dino_cache.CacheSpec.model_fields, *dino_cache.RunOptions.model_fields}:
            sys.exit(f"{option} {pair}: not KEY=VALUE with a setting that this checkout has")
        settings[key] = yaml.safe_load(value)
    return settings


def checkouts(arguments: argparse.Namespace) -> dict[str, Checkout]:
    """This one, as "this", and what it is compared with, as "base", if anything; a setting that the baseline does not
    know yet is left out there, and named.

    Raises:
        SystemExit: the baseline is no checkout.
    """
    settings = settings_of("--set", arguments.set)
    sides = {"this": Checkout(ROOT, settings)}
    if arguments.baseline or arguments.baseline_set:
        folder = Path(arguments.baseline or ROOT).resolve()
        if not (folder / "dino_cache.py").is_file():
            sys.exit(f"--baseline {folder}: has no dino_cache.py")
        asked = {**settings, **settings_of("--baseline-set", arguments.baseline_set)}
        command = [sys.executable, "-c", KNOWN_SETTINGS, str(folder)]
        known = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        for key in asked.keys() - {*known}:
            print(f"The baseline has no setting {key}: it runs without.")
        sides["base"] = Checkout(folder, {key: value for key, value in asked.items() if key in known})
    return sides


class Case(NamedTuple):
    """A kind of data."""

    title: str
    pictures: tuple[int, int]
    image_size: tuple[int, int]
    lengths: list[int]  # of the trajectories


def cases(num_frames: int) -> list[Case]:
    side, count = num_frames // 4, num_frames // SHORT_FRAMES
    return [
        Case(f"one trajectory of {num_frames:,} tiny frames", TINY, (56, 56), [num_frames]),
        Case(f"{count:,} trajectories of {SHORT_FRAMES} tiny frames", TINY, (56, 56), [SHORT_FRAMES] * count),
        Case(f"one trajectory of {side:,} frames of 640x480", CAMERA, (224, 224), [side]),
    ]


def ceiling(arguments: argparse.Namespace, root: Path) -> None:
    """Print what this checkout does in each case, and over the baseline."""
    sides = checkouts(arguments)
    num_frames, repetitions = (LEAST_FRAMES, 1) if arguments.quick else (arguments.frames, arguments.repetitions)
    if num_frames < LEAST_FRAMES:
        sys.exit(f"--frames {num_frames}: at least {LEAST_FRAMES}")
    load = os.getloadavg()[0]
    if load > BUSY * dino_cache.available_cores():
        print(f"The machine is busy (load {load:.1f}): rates and starts mean little, processor times a little more.")
    for case in cases(num_frames):
        data = data_of(root, *case.lengths, size=case.pictures)
        settings = {"dino_model_type": arguments.model, "tokens": ["cls"], "image_size": list(case.image_size)}
        run = functools.partial(run_once, data=data, root=root, num_frames=sum(case.lengths), settings=settings)
        runs = interleave(repetitions, **{name: functools.partial(run, side) for name, side in sides.items()})
        report(f"Ceiling: {case.title}, encoder that answers at once", rows_of(runs, case))


def rows_of(runs: dict[str, list[WholeRun]], case: Case) -> dict[str, Any]:
    """Each figure of both sides, and its ratio."""
    frames_a_trajectory = sum(case.lengths) / len(case.lengths)
    figures: dict[str, Callable[[WholeRun], float]] = {"frames/s": lambda run: run.frames_per_s}
    if len(case.lengths) > 1:
        figures["trajectories/s"] = lambda run: run.frames_per_s / frames_a_trajectory
    figures["main process [us a frame]"] = lambda run: run.main_us
    if len(case.lengths) > 1:
        figures["main process [ms a trajectory]"] = lambda run: run.main_us * frames_a_trajectory / 1000
    figures["all processes [us a frame]"] = lambda run: run.all_us
    figures["start to the first batch [s]"] = lambda run: run.start_s
    figures["last eighth and end [s]"] = lambda run: run.end_s
    rows: dict[str, Any] = {}
    for name, figure in figures.items():
        values = {side: [figure(run) for run in side_runs] for side, side_runs in runs.items()}
        rows[name] = Spread.of(values["this"])
        if "base" in values:
            rows[f"  baseline's {name}"] = Spread.of(values["base"])
            rows[f"  {name.partition(' [')[0]}, over baseline"] = ratios(values, "this", "base")
    return rows


def memory(arguments: argparse.Namespace, root: Path) -> None:
    """Print the peak memory of all processes of a run, with few frames and with many."""
    count = 320 if arguments.quick else arguments.frames
    few, short = (160, 40) if arguments.quick else (1000, 250)
    sizes = {"short": [few], "long": [count], "few": [4] * short, "many": [4] * (count // 4)}
    settings = {
        "dino_model_type": "small",
        "tokens": ["cls", "patch"],
        "image_size": [112, 112],
        "max_chunk_distance_m": 1e6,
    }
    for name, side in checkouts(arguments).items():
        measures = {
            size: functools.partial(peak_memory_mib, side, data_of(root, *lengths), root, sum(lengths), settings)
            for size, lengths in sizes.items()
        }
        peaks = interleave(1 if arguments.quick else arguments.repetitions, **measures)
        rows = {
            f"one trajectory of {few:,} frames, one chunk [MiB]": Spread.of(peaks["short"]),
            f"one of {count:,} frames, one chunk [MiB]": Spread.of(peaks["long"]),
            "long over short": ratios(peaks, "long", "short"),
            f"{short:,} trajectories of 4 frames [MiB]": Spread.of(peaks["few"]),
            f"{count // 4:,} trajectories of 4 frames [MiB]": Spread.of(peaks["many"]),
            "many over few": ratios(peaks, "many", "few"),
        }
        whose = "" if name == "this" else ", baseline"
        report(f"Peak memory of all processes{whose}: cls + patch, 640x480 JPEG, instant encoder", rows)


def peak_memory_mib(side: Checkout, data: Path, root: Path, num_frames: int, settings: dict[str, Any]) -> float:
    return run_once(side, data, root, num_frames, settings, weigh=True).memory_mib
