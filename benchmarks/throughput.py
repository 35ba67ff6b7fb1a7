"""How close a run comes to its physical limit, side by side in one process.

    python benchmarks/throughput.py encoder         # the forward pass by rows at once, over matrix multiply
    python benchmarks/throughput.py engine          # openvino over torch on a CPU, compiled over not on CUDA
    python benchmarks/throughput.py efficiency      # whole runs over the same encoder on resident batches
    python benchmarks/throughput.py host            # an encoder that returns at once, over decoding and resizing alone
    python benchmarks/throughput.py baselines       # over what a user would write instead
    python benchmarks/throughput.py short           # 300 trajectories of 20 frames over one of 6,000
    python benchmarks/throughput.py safety          # with fsync, digests and record over without them
    python benchmarks/throughput.py ceiling         # whole runs, an encoder that answers at once, over another checkout
    python benchmarks/throughput.py memory          # peak of all processes: long trajectories and many over short, few
    python benchmarks/throughput.py start           # from launch to the first batch, over a bare torch and timm program

Rates are differences of two runs of different length, so that starting and ending cancel, or (ceiling) taken from a
run's middle; repetitions are interleaved. `--baseline DIR` names a checkout of another version, e.g. of
`git worktree add DIR <commit>`, that is measured in turn with this one.
Each command prints a table and, last, one JSON line. Weights are random: they do not change the time.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from ceiling import ceiling, checkouts, memory
from instant_run import InstantEncoder
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from workload import (
    Spread,
    cache_once,
    data_of,
    dino_cache,
    interleave,
    rate_of_difference,
    ratios,
    report,
    scratch,
)

from progress_utils import Progress

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def make_spec(arguments: argparse.Namespace, tokens: tuple[str, ...]) -> dino_cache.CacheSpec:
    precision = arguments.precision
    if precision == "auto":
        precision = dino_cache.default_precision(arguments.device, arguments.model)
    return dino_cache.CacheSpec(
        dino_model_type=arguments.model, weights="random", tokens=tokens, image_size=(224, 224), precision=precision
    )


def resident_rate(encoder: dino_cache.DinoEncoder, pixels: torch.Tensor, frames: int) -> float:
    """Frames/s of the encoder alone, on a batch that lies in memory, tokens back on the host."""
    batches = -(-frames // len(pixels))
    resident = itertools.repeat(dino_cache.Batch([dino_cache.Rows(None, np.arange(len(pixels)))], pixels), batches)
    begin = time.perf_counter()
    for _ in dino_cache.encode_batches(encoder, resident, lambda count: None, lambda: False):
        pass
    return batches * len(pixels) / (time.perf_counter() - begin)


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of large matrix multiplications: what the device can do at most."""
    size, times = (8192, 20) if device.startswith("cuda") else (2048, 10)
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    (left @ right).sum().item()  # warm up
    wait()
    begin = time.perf_counter()
    for _ in range(times):
        left @ right
    wait()
    return 2 * size**3 * times / (time.perf_counter() - begin)


def flop_per_frame(spec: dino_cache.CacheSpec) -> float:
    """FLOP of the forward pass of one frame, as torch counts them, with plain attention: it does not know others."""
    model = timm.create_model(dino_cache.MODEL_NAMES[spec.dino_model_type], num_classes=0, img_size=spec.image_size)
    with FlopCounterMode(display=False) as counter, torch.inference_mode(), sdpa_kernel(SDPBackend.MATH):
        model.eval().forward_features(torch.zeros(1, 3, *spec.image_size))
    return counter.get_total_flops()


def together_rate(encoder: dino_cache.DinoEncoder, pixels: torch.Tensor, frames: int) -> float:
    """Frames/s of a CPU whose cores all work on one batch, as torch does it by itself."""
    begin = time.perf_counter()
    batches = -(-frames // len(pixels))
    for _ in range(batches):
        encoder._encode_on_core(pixels)  # in this thread, which has all of torch's threads
    return batches * len(pixels) / (time.perf_counter() - begin)


def encoder_alone(arguments: argparse.Namespace, root: Path) -> None:
    spec = make_spec(arguments, tuple(arguments.tokens.split("+")))
    encoder, _ = dino_cache.load_encoder(spec, arguments.device)
    is_cuda = arguments.device.startswith("cuda")
    sizes = [arguments.batch_size] if arguments.batch_size else [32, 64, 128, 256, 512] if is_cuda else [2, 4, 8, 16]
    measures: dict[str, Callable[[], float]] = {"matmul": lambda: matmul_rate(arguments.device, encoder._dtype)}

    def own_rate(size: int, pixels: torch.Tensor) -> float:
        if not is_cuda:
            encoder.most_rows = size
        return resident_rate(encoder, pixels, arguments.frames)

    for size in sizes:
        pixels = encoder.new_pixels(size if is_cuda else 2 * size * dino_cache.available_cores()).random_(0, 255)
        measures[f"own {size}"] = functools.partial(own_rate, size, pixels)
        if not is_cuda:
            measures[f"together {size}"] = functools.partial(together_rate, encoder, pixels[:size], arguments.frames)
    resident_rate(encoder, pixels, len(pixels))  # warm up
    rates = interleave(arguments.repetitions, **measures)
    per_frame = flop_per_frame(spec)
    rows: dict[str, Any] = {"matrix multiply [GFLOP/s]": Spread.of([rate / 1e9 for rate in rates["matmul"]])}
    for size in sizes:
        rows[f"{size} rows at once [frames/s]"] = Spread.of(rates[f"own {size}"])
        flop = {"run": [rate * per_frame for rate in rates[f"own {size}"]], "matmul": rates["matmul"]}
        rows[f"{size} rows, over matrix multiply"] = ratios(flop, "run", "matmul")
        if not is_cuda:
            rows[f"{size} rows, all cores at them [frames/s]"] = Spread.of(rates[f"together {size}"])
            rows[f"{size} rows, a core's own over all cores"] = ratios(rates, f"own {size}", f"together {size}")
    title = f"Encoder alone: {spec.dino_model_type}, {spec.precision}, {arguments.tokens}, {arguments.device}"
    report(title, rows)


def engine_rates(arguments: argparse.Namespace, engines: dict[str, Any]) -> dict[str, list[float]]:
    """Frames/s of each engine alone, in turn. --processor-time: of a core that has nothing else to do, by the time that
    the cores gave this process, for machines that others use too; what threads wait for is not in it."""
    clock = time.process_time if arguments.processor_time else time.perf_counter

    def rate(encoder: Any) -> float:
        size = arguments.batch_size or encoder.default_batch_size
        pixels = encoder.new_pixels(size).random_(0, 255)
        begin = clock()
        resident_rate(encoder, pixels, arguments.frames)
        return -(-arguments.frames // size) * size / (clock() - begin)

    for encoder in engines.values():  # to warm up: what is compiled is compiled then
        rate(encoder)
    return interleave(arguments.repetitions, **{name: functools.partial(rate, it) for name, it in engines.items()})


def engine(arguments: argparse.Namespace, root: Path) -> None:
    plain = make_spec(arguments, tuple(arguments.tokens.split("+")))
    is_cuda = arguments.device.startswith("cuda")
    other = plain.model_copy(update={"compile": True} if is_cuda else {"engine": "openvino"})
    name = "compiled" if is_cuda else "openvino"
    begin = time.perf_counter()
    engines = {"torch": dino_cache.load_encoder(plain, arguments.device)[0]}
    loaded = time.perf_counter()
    engines[name] = dino_cache.load_encoder(other, arguments.device)[0]
    rows: dict[str, Any] = {
        "torch, to load [s]": loaded - begin,
        f"{name}, to load [s]": time.perf_counter() - loaded,
    }
    rates = engine_rates(arguments, engines)
    rows |= {f"{key} [frames/s]": Spread.of(values) for key, values in rates.items()}
    rows[f"{name}, over torch"] = ratios(rates, name, "torch")
    report(f"Engine: {plain.dino_model_type}, {plain.precision}, {arguments.tokens}, {arguments.device}", rows)


def efficiency(arguments: argparse.Namespace, root: Path) -> None:
    spec = make_spec(arguments, tuple(arguments.tokens.split("+")))
    encoder, _ = dino_cache.load_encoder(spec, arguments.device)
    batch_size = arguments.batch_size or encoder.default_batch_size
    short, long = arguments.frames // 4 // batch_size * batch_size, arguments.frames // batch_size * batch_size
    data = {length: data_of(root, length) for length in (short, long)}
    pixels = encoder.new_pixels(batch_size).random_(0, 255)
    resident_rate(encoder, pixels, 4 * batch_size)  # warm up

    def whole_run(length: int) -> float:
        return cache_once(data[length], root / "cache", spec, encoder, batch_size=batch_size)

    rates = interleave(
        arguments.repetitions,
        before=lambda: resident_rate(encoder, pixels, long - short),
        run=lambda: rate_of_difference(short, long, whole_run),
        after=lambda: resident_rate(encoder, pixels, long - short),
    )
    rates["alone"] = [(before + after) / 2 for before, after in zip(rates["before"], rates["after"])]
    rows = {
        "encoder alone [frames/s]": Spread.of(rates["alone"]),
        "whole run [frames/s]": Spread.of(rates["run"]),
        "pipeline efficiency": ratios(rates, "run", "alone"),
    }
    title = f"Pipeline efficiency: {spec.dino_model_type}, {spec.precision}, {arguments.tokens}, batch {batch_size}"
    report(title, rows)


def decode_rate(spec: dino_cache.CacheSpec, data: Path, workers: int) -> float:
    """Frames/s of decoding and resizing alone, by so many threads."""
    decoder = dino_cache.FrameDecoder(spec)
    files = sorted(next(data.iterdir()).glob("*.jpg"))
    with ThreadPoolExecutor(workers, initializer=functools.partial(torch.set_num_threads, 1)) as pool:
        list(pool.map(lambda _: None, range(workers)))
        begin = time.perf_counter()
        for chunk in range(0, len(files), 256):
            list(pool.map(lambda path: decoder(dino_cache.read_file(path), path.name), files[chunk : chunk + 256]))
        return len(files) / (time.perf_counter() - begin)


def disk_rate(folder: Path, frame_bytes: int, frames: int) -> float:
    """Frames/s that the disk takes, written in one piece and forced to it."""
    block = np.random.default_rng(0).bytes(32 * frame_bytes)
    begin = time.perf_counter()
    with open(folder / "raw", "wb") as file:
        for _ in range(frames // 32):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    (folder / "raw").unlink()
    return frames / seconds


def host(arguments: argparse.Namespace, root: Path) -> None:
    workers = dino_cache.available_cores()
    short, long = 512, arguments.frames
    data = {length: data_of(root, length) for length in (short, long)}
    rows: dict[str, Any] = {}
    for tokens in (("cls",), ("cls", "patch")):
        spec = make_spec(arguments, tokens)
        encoder = InstantEncoder(spec)
        shapes = dino_cache.token_shapes(spec, dino_cache.model_shape(spec.dino_model_type))
        frame_bytes = sum(2 * int(np.prod(shape)) for shape in shapes.values())

        def whole_run(length: int, spec: Any = spec, encoder: Any = encoder) -> float:
            return cache_once(data[length], root / "cache", spec, encoder)

        rates = interleave(
            arguments.repetitions,
            decode=lambda spec=spec: decode_rate(spec, data[short], workers),
            run=lambda whole_run=whole_run: rate_of_difference(short, long, whole_run),
            disk=lambda size=frame_bytes: disk_rate(root, size, long - short),
        )
        name = " + ".join(tokens)
        rows[f"{name}: decode and resize alone [frames/s]"] = Spread.of(rates["decode"])
        rows[f"{name}: whole run, instant encoder [frames/s]"] = Spread.of(rates["run"])
        rows[f"{name}: over decode and resize"] = ratios(rates, "run", "decode")
        if "patch" in tokens:
            rows[f"{name}: raw disk [frames/s]"] = Spread.of(rates["disk"])
            rows[f"{name}: over raw disk"] = ratios(rates, "run", "disk")
    report(f"Host capacity: {workers} workers, 640x480 JPEG to 224x224", rows)


def obvious_script(data: Path, out: Path, model: torch.nn.Module) -> float:
    """(a) Trajectory by trajectory, Pillow, fp32, batches of 32, one .npz each."""
    mean, std = (np.array(values, np.float32) for values in (IMAGENET_MEAN, IMAGENET_STD))
    begin = time.perf_counter()
    for folder in sorted(data.iterdir()):
        poses = pickle.loads((folder / "traj_data.pkl").read_bytes())
        cls, patch = [], []
        for start in range(0, len(poses["yaw"]), 32):
            frames = []
            for number in range(start, min(start + 32, len(poses["yaw"]))):
                with Image.open(folder / f"{number}.jpg") as picture:
                    square = picture.convert("RGB").resize((299, 224), Image.Resampling.BICUBIC).crop((37, 0, 261, 224))
                frames.append((np.asarray(square, np.float32) / 255 - mean) / std)
            batch = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
            with torch.inference_mode():
                features = model.forward_features(batch)
            cls.append(features[:, 0].half().numpy())
            patch.append(features[:, model.num_prefix_tokens :].half().numpy())
        np.savez(out / f"{folder.name}.npz", cls=np.concatenate(cls), patch=np.concatenate(patch), **poses)
    return time.perf_counter() - begin


class FrameDataset(torch.utils.data.Dataset):
    """Every frame of a data folder, prepared by `transform`."""

    def __init__(self, data: Path, transform: Callable[[Image.Image], Any]):
        self.files = [
            folder / f"{number}.jpg"
            for folder in sorted(data.iterdir())
            for number in range(len(list(folder.glob("*.jpg"))))
        ]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Any:
        with Image.open(self.files[index]) as picture:
            return self.transform(picture.convert("RGB"))


def loader_script(data: Path, out: Path, features_of: Callable[[Any], torch.Tensor], transform: Callable) -> float:
    """(b), (c) A DataLoader with a worker a core, bf16, one .npy of all tokens."""
    begin = time.perf_counter()
    workers = dino_cache.available_cores()
    loader = torch.utils.data.DataLoader(FrameDataset(data, transform), batch_size=32, num_workers=workers)
    rows = []
    with torch.inference_mode():
        for batch in loader:
            rows.append(features_of(batch).half().numpy())
    np.save(out / "features.npy", np.concatenate(rows))
    return time.perf_counter() - begin


def baselines(arguments: argparse.Namespace, root: Path) -> None:
    import transformers
    from torchvision import transforms

    spec = make_spec(arguments, ("cls", "patch"))
    encoder, _ = dino_cache.load_encoder(spec, "cpu")
    name = dino_cache.MODEL_NAMES[spec.dino_model_type]
    model = timm.create_model(name, pretrained=False, num_classes=0, img_size=224).eval()
    hugging_face = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=model.embed_dim,
            num_attention_heads=model.blocks[0].attn.num_heads,
            image_size=518,
            patch_size=14,
        )
    )
    hugging_face = hugging_face.eval().to(torch.bfloat16)
    processor = transformers.BitImageProcessor(
        size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}, image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
    )  # fmt: skip
    prepare = transforms.Compose(
        [
            transforms.Resize(224, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
            transforms.ToTensor(),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def autocast_features(batch: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model.forward_features(batch)

    def transformers_features(batch: torch.Tensor) -> torch.Tensor:
        return hugging_face(pixel_values=batch.to(torch.bfloat16)).last_hidden_state

    def processed(picture: Image.Image) -> torch.Tensor:
        return processor(picture, return_tensors="pt")["pixel_values"][0]

    short, long = 64, arguments.frames
    data = {length: data_of(root, *[length // 2] * 2) for length in (short, long)}
    out = root / "out"
    out.mkdir()
    rates = interleave(
        arguments.repetitions,
        ours=lambda: rate_of_difference(short, long, lambda n: cache_once(data[n], root / "cache", spec, encoder)),
        a=lambda: rate_of_difference(short, long, lambda n: obvious_script(data[n], out, model)),
        b=lambda: rate_of_difference(short, long, lambda n: loader_script(data[n], out, autocast_features, prepare)),
        c=lambda: rate_of_difference(
            short, long, lambda n: loader_script(data[n], out, transformers_features, processed)
        ),
    )
    scripts = {
        "a": "(a) Pillow, fp32, batch 32",
        "b": "(b) timm, DataLoader, autocast bf16",
        "c": "(c) transformers, image processor, bf16",
    }
    rows: dict[str, Any] = {"dino_cache [frames/s]": Spread.of(rates["ours"])}
    for key, title in scripts.items():
        rows[f"{title} [frames/s]"] = Spread.of(rates[key])
        rows[f"dino_cache over {title[:3]}"] = ratios(rates, "ours", key)
    report(f"Against what a user would write: {spec.dino_model_type}, {spec.precision}, cls + patch", rows)


def short_trajectories(arguments: argparse.Namespace, root: Path) -> None:
    spec = make_spec(arguments, ("cls",))
    encoder = InstantEncoder(spec)
    many, one = data_of(root, *[20] * 300), data_of(root, 6000)
    if not arguments.instant:
        encoder, _ = dino_cache.load_encoder(spec, arguments.device)
        many, one = data_of(root, *[20] * (arguments.frames // 20)), data_of(root, arguments.frames // 20 * 20)
    seconds = interleave(
        arguments.repetitions,
        many=lambda: cache_once(many, root / "cache", spec, encoder),
        one=lambda: cache_once(one, root / "cache", spec, encoder),
    )
    what = "an instant encoder" if arguments.instant else f"{spec.dino_model_type}, {spec.precision}"
    rows = {
        "many short trajectories [s]": Spread.of(seconds["many"]),
        "one long trajectory [s]": Spread.of(seconds["one"]),
        "time of many over time of one": ratios(seconds, "many", "one"),
    }
    report(f"Short trajectories of 20 frames, {what}", rows)


class NoDigest:
    """Stands for a digest that costs nothing."""

    def update(self, data: Any) -> None:
        """Nothing."""

    def hexdigest(self) -> str:
        return "0" * 32


def recorded_run(data: Path, root: Path, spec: dino_cache.CacheSpec, encoder: Any, *, safe: bool) -> float:
    """A run with fsync, digests and record, or without any of them."""
    progress = Progress(root / "cache", "benchmark")
    real = os.fsync, dino_cache.bytes_digest
    if not safe:
        os.fsync, dino_cache.bytes_digest = lambda descriptor: None, lambda data=b"": NoDigest()
    try:
        return cache_once(data, root / "cache", spec, encoder, on_result=record_into(progress) if safe else None)
    finally:
        os.fsync, dino_cache.bytes_digest = real


def record_into(progress: Progress) -> Callable[[dino_cache.TrajectoryResult], None]:
    begin = time.monotonic()

    def record(result: dino_cache.TrajectoryResult) -> None:
        spans = [list(span) for span in result.spans]
        entry = {"fingerprint": "0" * 16, "spans": spans, "bytes": result.chunk_bytes, "checksum_kind": "stat"}
        progress.complete(result.name, result.checksum, entry)
        progress.save_spaced(time.monotonic() - begin)

    return record


def safety(arguments: argparse.Namespace, root: Path) -> None:
    spec = make_spec(arguments, ("cls", "patch"))
    encoder, _ = dino_cache.load_encoder(spec, arguments.device)
    data = data_of(root, *[50] * (arguments.frames // 50))
    seconds = interleave(
        arguments.repetitions,
        safe=lambda: recorded_run(data, root, spec, encoder, safe=True),
        bare=lambda: recorded_run(data, root, spec, encoder, safe=False),
    )
    rows = {
        "with fsync, digests and record [s]": Spread.of(seconds["safe"]),
        "without [s]": Spread.of(seconds["bare"]),
        "with over without": ratios(seconds, "safe", "bare"),
    }
    report(f"Cost of safety: {spec.dino_model_type}, {spec.precision}, cls + patch, 50 frames a trajectory", rows)


BARE_START = """
import sys, time, timm, torch
torch.manual_seed(0)
model = timm.create_model(sys.argv[1], pretrained=False, num_classes=0, img_size=224).eval()
print(time.time())
"""
FIRST_BATCH = """
import os, sys, time
sys.path[:0] = [sys.argv[1]]
import dino_cache
def first_batch(self, pixels):
    print(time.time(), flush=True)
    os._exit(0)
dino_cache.DinoEncoder.encode = first_batch
sys.exit(dino_cache.main(sys.argv[2:]))
"""


def seconds_to_mark(*command: str) -> float:
    """Seconds from launch until the program prints the time of its mark."""
    begin = time.time()
    done = subprocess.run([sys.executable, "-W", "ignore", *command], check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1]) - begin


def start(arguments: argparse.Namespace, root: Path) -> None:
    count = 25 if arguments.quick else arguments.frames // 20
    data = data_of(root, *[20] * count)
    sides = checkouts(arguments)
    settings = {"dino_model_type": arguments.model, "weights": "random", "image_size": [28, 28], "device": "cpu"}
    for side, checkout in sides.items():
        for name in ("fresh", "recorded", "complete"):
            paths = {"data_folder": str(data), "cache_dir": str(root / side / name)}
            config = {**settings, **checkout.settings, "datasets": {"start": paths}}
            (root / f"{side}_{name}.yaml").write_text(json.dumps(config))

    def run(side: str, name: str, *options: str) -> float:
        begin = time.time()
        program = str(sides[side].folder / "dino_cache.py")
        command = [sys.executable, program, "--config", str(root / f"{side}_{name}.yaml"), *options]
        subprocess.run(command, check=not options, capture_output=True)
        return time.time() - begin

    def to_first_batch(side: str, name: str) -> float:
        config = str(root / f"{side}_{name}.yaml")
        return seconds_to_mark("-c", FIRST_BATCH, str(sides[side].folder), "--config", config)

    measures = {"bare": lambda: seconds_to_mark("-c", BARE_START, dino_cache.MODEL_NAMES[arguments.model])}
    for side in sides:
        run(side, "recorded", "--limit", str(count - 1))
        run(side, "complete")
        measures[f"{side} fresh"] = functools.partial(to_first_batch, side, "fresh")
        measures[f"{side} recorded"] = functools.partial(to_first_batch, side, "recorded")
        measures[f"{side} complete"] = functools.partial(run, side, "complete")
    seconds = interleave(1 if arguments.quick else arguments.repetitions, **measures)
    rows = {"bare program: torch, timm, random model [s]": Spread.of(seconds["bare"])}
    titles = {
        "fresh": ("no cache yet, to the first batch", "no cache yet"),
        "recorded": ("one trajectory left, to its batch", "one left"),
        "complete": ("nothing to do, the whole command", "nothing to do"),
    }
    for name, (title, short_title) in titles.items():
        rows[f"{title} [s]"] = Spread.of(seconds[f"this {name}"])
        rows[f"{short_title}, over the bare program"] = ratios(seconds, f"this {name}", "bare")
        if "base" in sides:
            rows[f"{short_title}, over baseline"] = ratios(seconds, f"this {name}", f"base {name}")
    report(f"Start: {arguments.model}, {count} trajectories of 20 frames", rows)


COMMANDS = {
    "encoder": encoder_alone,
    "engine": engine,
    "efficiency": efficiency,
    "host": host,
    "baselines": baselines,
    "short": short_trajectories,
    "safety": safety,
    "memory": memory,
    "start": start,
    "ceiling": ceiling,
}
DEFAULT_FRAMES = {
    "encoder": 128, "engine": 64, "efficiency": 768, "host": 4096, "baselines": 384, "short": 600, "safety": 600,
    "memory": 20_000, "start": 2000, "ceiling": 8000,
}  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("benchmark", choices=COMMANDS)
    parser.add_argument("--model", default="small", choices=dino_cache.MODEL_NAMES)
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16", "fp16"])
    parser.add_argument("--tokens", default="cls+patch")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--frames", type=int, help="of the longer run")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--instant", action="store_true", help="short: an encoder that returns at once")
    parser.add_argument("--baseline", metavar="DIR", help="ceiling, memory, start: another checkout, measured in turn")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="likewise: a setting of both")
    parser.add_argument("--baseline-set", metavar="KEY=VALUE", action="append", default=[], help="of the baseline")
    parser.add_argument("--quick", action="store_true", help="likewise: a few frames, once; its figures mean nothing")
    parser.add_argument(
        "--processor-time", action="store_true", help="engine: by the processor's time, not the clock's"
    )
    parser.add_argument("--scratch", metavar="FOLDER", help="where frames and caches are written (default: /tmp)")
    arguments = parser.parse_args()
    arguments.frames = arguments.frames or DEFAULT_FRAMES[arguments.benchmark]
    with scratch(arguments.scratch) as root:
        COMMANDS[arguments.benchmark](arguments, root)


if __name__ == "__main__":
    main()
