"""What the reader costs: CacheWindows over a bare numpy.memmap of the same tokens, and over encoding the frames anew.

    python benchmarks/reader.py --chunks 200 --frames 100

Random 8-frame windows, cls and then patch tokens of the small model at 224x224, in batches of 64 from a DataLoader with
2 workers, on caches that lie in the page cache. `memmap` reads the same bytes, tokens and poses, each from a flat file
of all frames, by the shortest dataset that one can write, with torch's default collate; `memmap of tokens` leaves the
poses out. `decode and encode` works on a window's frames with the same model (random weights: they do not change the
time). In turns in the same run; prints a table and, last, one JSON line.

    start     seconds to make a CacheWindows of 100,000 chunks, with and without its kept index
    smaller   patch tokens as int8 (de-quantised and raw), pooled, of two layers, and all of that, over a bare
              numpy.memmap of the same bytes, without the poses and with them; alone with --only smaller
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, RandomSampler
from workload import Spread, dino_cache, interleave, make_trajectories, ratios, report, scratch

from progress_utils import Progress

WINDOW, BATCH, WORKERS = 8, 64, 2
SPEC = dino_cache.CacheSpec(
    dino_model_type="small", weights="random", image_size=(224, 224), precision="fp32", overlap_distance_m=0.0
)
POSES = {"position", "yaw", "frame_index", "travelled_distance", "timestamp", "delta"}
FINGERPRINT, CHECKSUM = "0" * 16, "0" * 16


SMALLER = {  # how patch tokens are stored
    "int8": {"store": "int8"},
    "pooled": {"patch_pool": 2},
    "two layers": {"layers": (5, 11)},
    "int8, pooled, two layers": {"store": "int8", "patch_pool": 2, "layers": (5, 11)},
}


def make_cache(cache_dir: Path, token: str, chunks: int, frames: int, **settings: Any) -> dict[str, np.memmap]:
    """A cache of one trajectory of so many chunks of `frames` frames; returns the same as memmaps: dataset -> rows."""
    spec = SPEC.model_copy(update={"tokens": (token,), **settings})
    shapes = dino_cache.token_shapes(spec, dino_cache.model_shape(spec.dino_model_type))
    total = chunks * frames
    spans = [dino_cache.Span(start, start + frames) for start in range(0, total, frames)]
    position = np.stack([np.arange(total) * 0.1, np.zeros(total)], axis=1)
    trajectory = dino_cache.Trajectory("t", cache_dir)
    travelled, numbers = dino_cache.travelled_distance(position), np.arange(total)
    plan = dino_cache.TrajectoryPlan(
        trajectory, CHECKSUM, "stat", CHECKSUM, numbers, position, np.zeros(total), travelled, spans
    )
    label = dino_cache.ChunkLabel("benchmark", spec, FINGERPRINT, "0" * 32, shapes)
    (cache_dir / "t").mkdir(parents=True)
    writer = dino_cache.TrajectoryWriter(cache_dir / "t", plan, label)
    kinds = {name: dino_cache.token_type(name, shapes) for name in shapes}
    rows = {name: flat_file(cache_dir / name, kinds[name], (total, *shape)) for name, shape in shapes.items()}
    rng = np.random.default_rng(0)
    for span in spans:
        for name, values in rows.items():
            values[slice(*span)] = rng.normal(0, 40, (frames, *shapes[name])).clip(-127, 127).astype(kinds[name])
        writer.write(np.arange(*span), {name: values[slice(*span)] for name, values in rows.items()})
    record(cache_dir, spec, {"t": (spans, writer.chunk_bytes)})
    for pose, values in plan.datasets.items():
        rows[pose] = flat_file(cache_dir / pose, values.dtype, values.shape)
        rows[pose][:] = values
    return rows


def flat_file(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A new file of so many rows."""
    return np.memmap(path, dtype, "w+", shape=shape)


def record(cache_dir: Path, spec: dino_cache.CacheSpec, trajectories: dict[str, tuple[list[Any], list[int]]]) -> None:
    """A progress.json that has these trajectories: name -> (spans, bytes)."""
    progress = Progress(cache_dir, "benchmark")
    progress.processing_config = progress.specs[FINGERPRINT] = spec.to_json()
    for name, (spans, sizes) in trajectories.items():
        entry = {"fingerprint": FINGERPRINT, "spans": list(map(list, spans)), "bytes": sizes, "checksum_kind": "stat"}
        progress.complete(name, CHECKSUM, entry)
    progress.save()


class BareWindows(torch.utils.data.Dataset):
    """Windows of memmaps' rows, copied out of them."""

    def __init__(self, rows: dict[str, np.memmap]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows["yaw"]) - WINDOW + 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.array(rows[index : index + WINDOW])) for name, rows in self.rows.items()}


class BareTokens(BareWindows):
    """The tokens alone."""

    def __init__(self, rows: dict[str, np.memmap]):
        super().__init__({**{name: rows[name] for name in rows if name not in POSES}, "yaw": rows["yaw"]})

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        tokens = (rows for name, rows in self.rows.items() if name != "yaw")
        return tuple(torch.from_numpy(np.array(rows[index : index + WINDOW])) for rows in tokens)


def windows_rate(dataset: Any, windows: int, seed: int, collate: Callable[[Any], Any] | None = None) -> float:
    """Windows/s of a DataLoader at random places, from its second batch on: the workers are up by then."""
    sampler = RandomSampler(dataset, num_samples=windows, generator=torch.Generator().manual_seed(seed))
    loader = DataLoader(dataset, BATCH, sampler=sampler, num_workers=WORKERS, collate_fn=collate, drop_last=True)
    batches = iter(loader)
    next(batches)
    begin = time.perf_counter()
    count = sum(1 for _ in batches)
    return count * BATCH / (time.perf_counter() - begin)


class OnTheFly:
    """Decodes and encodes a window's frames when it is asked for."""

    def __init__(self, root: Path, token: str):
        make_trajectories(root / "data", [256])
        self._files = sorted((root / "data" / "t0000").glob("*.jpg"))
        spec = SPEC.model_copy(update={"tokens": (token,)})
        self._decoder = dino_cache.FrameDecoder(spec)
        self._encoder, _ = dino_cache.load_encoder(spec, "cpu")

    def rate(self, windows: int = 8) -> float:
        """Windows/s."""
        begin = time.perf_counter()
        for start in range(0, windows * WINDOW, WINDOW):
            pixels = self._encoder.new_pixels(WINDOW)
            for place, path in enumerate(self._files[start : start + WINDOW]):
                pixels[place] = self._decoder(dino_cache.read_file(path), path.name)
            self._encoder.encode(pixels)()
        return windows / (time.perf_counter() - begin)


def compare(token: str, windows: int, arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The rows of the table for one kind of token."""
    frames = arguments.frames if token == "cls" else max(WINDOW, arguments.frames // 4)
    rows = make_cache(root / token, token, arguments.chunks, frames)
    bare, tokens = BareWindows(rows), BareTokens(rows)
    ours = dino_cache.CacheWindows(root / token, WINDOW, tokens=token)
    anew = OnTheFly(root / token, token)
    rates = interleave(
        arguments.repetitions,
        bare=lambda: windows_rate(bare, windows, seed=0),
        tokens=lambda: windows_rate(tokens, windows, seed=0),
        ours=lambda: windows_rate(ours, windows, seed=0, collate=ours.collate),
        default=lambda: windows_rate(ours, windows, seed=0),
        anew=anew.rate,
    )
    shutil.rmtree(root / token)
    return {
        f"{token}: memmap [windows/s]": Spread.of(rates["bare"]),
        f"{token}: memmap of tokens [windows/s]": Spread.of(rates["tokens"]),
        f"{token}: CacheWindows [windows/s]": Spread.of(rates["ours"]),
        f"{token}: CacheWindows, default collate [windows/s]": Spread.of(rates["default"]),
        f"{token}: decode and encode [windows/s]": Spread.of(rates["anew"]),
        f"{token}: over memmap": ratios(rates, "ours", "bare"),
        f"{token}: over memmap of tokens": ratios(rates, "ours", "tokens"),
        f"{token}: default collate over memmap": ratios(rates, "default", "bare"),
        f"{token}: over decode and encode": ratios(rates, "ours", "anew"),
    }


def compare_smaller(name: str, windows: int, arguments: argparse.Namespace, root: Path) -> dict[str, Any]:
    """The rows of the table for one way to store patch tokens."""
    frames = max(WINDOW, arguments.frames // 4)
    rows = make_cache(root / "smaller", "patch", arguments.chunks, frames, **SMALLER[name])
    bare, tokens = BareWindows(rows), BareTokens(rows)
    full = dino_cache.CacheWindows(root / "smaller", WINDOW, tokens="patch")
    raw = dino_cache.CacheWindows(root / "smaller", WINDOW, tokens="patch", raw=True)
    measures = {
        "bare": lambda: windows_rate(bare, windows, seed=0),
        "tokens": lambda: windows_rate(tokens, windows, seed=0),
        "ours": lambda: windows_rate(full, windows, seed=0, collate=full.collate),
    }
    if "int8" in name:
        measures["raw"] = lambda: windows_rate(raw, windows, seed=0, collate=raw.collate)
    rates = interleave(arguments.repetitions, **measures)
    shutil.rmtree(root / "smaller")
    found = {f"{name}: memmap [windows/s]": Spread.of(rates["bare"])}
    for measure, what in (("ours", "CacheWindows"), ("raw", "CacheWindows, raw")):
        if measure in rates:
            found[f"{name}: {what} [windows/s]"] = Spread.of(rates[measure])
            found[f"{name}: {what} over memmap"] = ratios(rates, measure, "bare")
            found[f"{name}: {what} over memmap of tokens"] = ratios(rates, measure, "tokens")
    return found


def start(repetitions: int, root: Path, chunks: int = 100_000) -> dict[str, Any]:
    """What starting on a large cache takes; its first chunk alone is there."""
    make_cache(root / "one", "cls", 1, WINDOW)
    size = (root / "one" / "t" / "chunk_00000.h5").stat().st_size
    record(
        root / "one",
        SPEC,
        {"t": ([(0, WINDOW)], [size]), **{f"u{n:06d}": ([(0, WINDOW)], [size]) for n in range(1, chunks)}},
    )

    def seconds(*, kept: bool) -> float:
        if not kept:
            for path in (root / "one").glob(".index-*"):
                path.unlink()
        begin = time.perf_counter()
        dino_cache.CacheWindows(root / "one", WINDOW)
        return time.perf_counter() - begin

    times = interleave(repetitions, without=lambda: seconds(kept=False), kept=lambda: seconds(kept=True))
    return {
        f"start on {chunks:,} chunks, from the record [s]": Spread.of(times["without"]),
        f"start on {chunks:,} chunks, kept index [s]": Spread.of(times["kept"]),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--chunks", type=int, default=200)
    parser.add_argument("--frames", type=int, default=100, help="of a chunk of cls tokens; a fourth of it for patch")
    parser.add_argument("--windows", type=int, default=20_000, help="of cls tokens; a twentieth of it of patch tokens")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", choices=("smaller",), help="this alone")
    parser.add_argument("--scratch", metavar="FOLDER", help="where caches are written (default: /tmp)")
    arguments = parser.parse_args()
    with scratch(arguments.scratch) as root:
        rows: dict[str, Any] = {}
        if arguments.only is None:
            rows |= compare("cls", arguments.windows, arguments, root)
            rows |= compare("patch", arguments.windows // 20, arguments, root)
            rows |= start(arguments.repetitions, root)
        for name in SMALLER:
            rows |= compare_smaller(name, arguments.windows // 20, arguments, root)
    report(f"Reader: {WINDOW}-frame windows, batches of {BATCH}, {WORKERS} workers", rows)


if __name__ == "__main__":
    main()
