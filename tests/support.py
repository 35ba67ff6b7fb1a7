"""Datasets, runs and checks that the tests share.

Frames made here are flat colours that say which frame of which trajectory they are: (trajectory id, number // 256,
number % 256) in RGB. Decoding and resizing keep a flat PNG exactly, so StampEncoder can read the stamp back from the
pixels that reached it and write it into the tokens; every row of every chunk can then be checked.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import time
import unicodedata
import zlib
from collections.abc import Callable, Container, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import h5py
import numpy as np
import torch
import yaml
from PIL import Image

from dino_cache import (
    CacheSpec,
    ChunkLabel,
    ChunkStore,
    EncodedRows,
    Encoder,
    Hooks,
    ModelShape,
    RunOptions,
    TrajectoryResult,
    cache_trajectories,
    format_named,
    token_shapes,
)

if TYPE_CHECKING:
    import pytest

ROOT = Path(__file__).resolve().parent.parent
REAL = ROOT.parent / "shared" / "data" / "real"
STAMP_SHAPE = ModelShape(patch_size=14, width=4, num_registers=0)


class StampEncoder:
    """Tokens are the stamp that the pixels carry: (trajectory id, number // 256, number % 256, rows in the batch)."""

    batches_in_flight = 0
    default_batch_size = 8
    most_rows = sys.maxsize

    def __init__(self, image_size: tuple[int, int] = (28, 42), tokens: tuple[str, ...] = ("cls",)):
        self.image_size, self.tokens = image_size, tokens
        self.batch_sizes: list[int] = []

    def new_pixels(self, batch_size: int) -> torch.Tensor:
        return torch.empty((batch_size, 3, *self.image_size), dtype=torch.uint8)

    def drop(self) -> None:
        """Nothing waits."""

    def stamps(self, pixels: torch.Tensor) -> torch.Tensor:
        """(B, 3): what each frame says of itself."""
        return pixels[:, :, 0, 0]

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        self.batch_sizes.append(len(pixels))
        stamps = self.stamps(pixels).to(torch.float16).numpy()
        rows = np.concatenate([stamps, np.full((len(stamps), 1), len(stamps), np.float16)], axis=1)
        height, width = (size // STAMP_SHAPE.patch_size for size in self.image_size)
        tokens = {"cls_token": rows, "patch_tokens": np.tile(rows[:, None, None], (1, height, width, 1))}
        wanted = {"cls": "cls_token", "patch": "patch_tokens"}
        kept = {wanted[token]: tokens[wanted[token]] for token in self.tokens}
        return lambda: EncodedRows(kept, np.ones(len(rows), bool))


class PlainEncoder(StampEncoder):
    """Its tokens do not tell how many rows were in the batch: batches lie otherwise after an interruption."""

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        rows = super().encode(pixels)()
        for values in rows.tokens.values():
            values[..., 3] = 0
        return lambda: rows


def straight_line(count: int, step_m: float = 0.25) -> np.ndarray:
    """(count, 2) positions [m], `step_m` apart along x."""
    return np.stack([np.arange(count) * step_m, np.zeros(count)], axis=1)


def make_trajectory(
    folder: Path, count: int = 20, *, stamp: int = 0, position: np.ndarray | None = None, yaw: np.ndarray | None = None
) -> Path:
    """A trajectory of `count` stamped 0.png ... frames with traj_data.pkl; returns its folder."""
    folder.mkdir(parents=True)
    for number in range(count):
        write_frame(folder / f"{number}.png", stamp, number)
    position = straight_line(count) if position is None else position
    yaw = np.linspace(0, 1, count) if yaw is None else yaw
    write_poses(folder, position, yaw)
    return folder


def write_frame(path: Path, stamp: int, number: int, size: tuple[int, int] = (32, 24)) -> None:
    """A flat frame (width, height) in the stamp's colour; the format follows the file name."""
    Image.new("RGB", size, (stamp, number // 256, number % 256)).save(path)


def write_poses(folder: Path, position: Any, yaw: Any) -> None:
    (folder / "traj_data.pkl").write_bytes(pickle.dumps({"position": position, "yaw": yaw}))


# Where runs of their own decode: in threads, which spares each of them one more import of torch; CONTRIBUTING.md says
# when tests run with processes.
READERS = os.environ.get("TEST_READERS", "threads")


def write_config(path: Path, data_folder: Path, dataset: str = "robot", **settings: Any) -> Path:
    """A config of one dataset for StampEncoder; `settings` add to it, at the top level."""
    config = {
        "dino_model_type": "small",
        "weights": "random",
        "image_size": [28, 42],
        "precision": "fp32",
        "device": "cpu",
        "max_chunk_distance_m": 2.0,
        "overlap_distance_m": 0.5,
        "min_chunk_distance_m": 0.3,
        "batch_size": 8,
        "decode_workers": 2,
        "readers": READERS,
        **settings,
        "datasets": {dataset: {"data_folder": str(data_folder)}},
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def cache_command(config: Path, *arguments: str, fake: bool = True) -> list[str]:
    """The command line of a run; with `fake`, StampEncoder takes the model's place."""
    script = ROOT / "tests" / "run_with_stamp_encoder.py" if fake else ROOT / "dino_cache.py"
    return [sys.executable, str(script), "--config", str(config), *arguments]


class Outcome(NamedTuple):
    """How a command ended: exit code, stdout, stderr."""

    code: int
    out: str
    err: str


def run_cache(
    config: Path,
    *arguments: str,
    fake: bool = True,
    env: dict[str, str] | None = None,
    timeout: float = 120,
    prefix: Sequence[str] = (),
) -> subprocess.CompletedProcess[str]:
    """Run to the end, without a terminal; `prefix` is a command that runs it."""
    return subprocess.run(
        [*prefix, *cache_command(config, *arguments, fake=fake)],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, env={**os.environ, **(env or {})}, timeout=timeout,
        check=False,
    )  # fmt: skip


def run_utils(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run progress_utils.py without a terminal."""
    command = [sys.executable, str(ROOT / "progress_utils.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60, check=False)


def chunk_files(cache_dir: Path) -> list[Path]:
    """Chunk files under final names, sorted; a run may be at work."""
    found = []
    for folder, subfolders, files in os.walk(cache_dir):
        subfolders[:] = set(subfolders) - {".staging"}
        found += [Path(folder) / name for name in files if name.startswith("chunk_") and name.endswith(".h5")]
    return sorted(found)


def datasets_of(file: h5py.File) -> dict[str, h5py.Dataset]:
    """All datasets of a file by their paths in it, those of several cameras lie in groups."""
    found: dict[str, h5py.Dataset] = {}
    file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
    return found


def read_chunk(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """A chunk file's root attributes and datasets."""
    with h5py.File(path) as file:
        return dict(file.attrs), {name: dataset[...] for name, dataset in datasets_of(file).items()}


def blake2b(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def seal_of(path: Path) -> bytes:
    """The first 512 bytes that a chunk file must have: where its datasets lie, and a digest of all other bytes."""
    with h5py.File(path) as file:
        found = datasets_of(file).values()
        data = sorted([it.id.get_offset(), it.nbytes] for it in found if it.id.get_offset() is not None)
    raw, rest, position = path.read_bytes(), json.dumps(data).encode(), 512
    for offset, size in data:
        rest, position = rest + raw[position:offset], offset + size
    return json.dumps({"data": data, "digest": blake2b(rest + raw[position:])}).encode().ljust(512)


def sealed(path: Path) -> dict[str, Any]:
    """A chunk file's root attributes; AssertionError where a byte of the file does not agree with its digest."""
    with h5py.File(path) as file:
        digests = {name: dataset.attrs["digest"] for name, dataset in datasets_of(file).items()}
        assert digests == {name: blake2b(dataset[...].tobytes()) for name, dataset in datasets_of(file).items()}
        attributes = {key: value if isinstance(value, str) else int(value) for key, value in file.attrs.items()}
    told = attributes.pop("attributes_digest")
    assert told == blake2b(json.dumps([attributes, digests], sort_keys=True).encode())
    assert path.read_bytes()[:512] == seal_of(path)
    return attributes


def cache_content(cache_dir: Path) -> dict[str, tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """Relative chunk path -> (attributes without created_at and the digest over them, datasets)."""
    content = {}
    for path in chunk_files(cache_dir):
        attributes, datasets = read_chunk(path)
        for key in ("created_at", "attributes_digest"):
            del attributes[key]
        content[str(path.relative_to(cache_dir))] = (attributes, datasets)
    return content


def check_stamps(cache_dir: Path, name: str, stamp: int, frame_stride: int = 1) -> int:
    """Assert that every row of a trajectory's chunks holds the tokens of its own frame; returns the number of rows."""
    rows = 0
    for path in sorted((cache_dir / name).glob("chunk_*.h5")):
        attributes, datasets = read_chunk(path)
        index = datasets["frame_index"]
        expected = np.arange(attributes["start"], attributes["stop"]) * frame_stride
        np.testing.assert_array_equal(index, expected)
        cls = datasets["cls_token"].astype(int)
        np.testing.assert_array_equal(cls[:, 0], np.full(len(index), stamp))
        np.testing.assert_array_equal(cls[:, 1] * 256 + cls[:, 2], index)
        rows += len(index)
    return rows


def stream_results(
    data_folder: Path,
    cache_dir: Path,
    encoder: Encoder,
    *,
    hooks: Hooks | None = None,
    batch_size: int = 8,
    shape: ModelShape = STAMP_SHAPE,
    format: str = "gnm",
    skip: Container[str] = (),
    readers: str = "auto",
    **settings: Any,
) -> Iterator[TrajectoryResult]:
    """cache_trajectories on all trajectories below `data_folder`, by name, without a record; `settings` are the spec's.

    `encoder` has the attributes of StampEncoder. Chunks are cut as write_config has them cut.
    """
    defaults = {
        "dino_model_type": "small",
        "weights": "random",
        "precision": "fp32",
        "max_chunk_distance_m": 2.0,
        "overlap_distance_m": 0.5,
    }
    spec = CacheSpec(**{**defaults, "image_size": encoder.image_size, "tokens": encoder.tokens, **settings})
    label = ChunkLabel("robot", spec, "f" * 16, "d" * 16, token_shapes(spec, shape))
    options = RunOptions(batch_size=batch_size, decode_workers=2, readers=readers)
    store = ChunkStore(cache_dir)
    cache_dir.mkdir(exist_ok=True)
    store.empty_staging()
    trajectories = [found for found in format_named(format).find(data_folder, spec) if found.name not in skip]
    return cache_trajectories(trajectories, label, options, encoder, store, hooks or Hooks())


def read_whole_record(cache_dir: Path) -> dict[str, Any]:
    """progress.json with what the whole lines of its journal add: the last word on each trajectory."""
    data, path = read_progress(cache_dir), cache_dir / "progress.json.journal"
    last_words, belongs = {}, None
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else []:
        if belongs is not False and int(line[:8], 16) != zlib.crc32(line[9:]):
            raise ValueError("damaged")
        entry = json.loads(line[9:])
        if "follows" in entry:
            belongs = entry["follows"] == data["last_update"]
            data["specs"] |= entry["specs"] if belongs else {}
        elif belongs:
            last_words[entry.get("completed") or entry.get("failed") or entry["withdrawn"]] = entry
    for name, entry in last_words.items():
        for key in ("trajectory_checksums", "trajectory_records", "failures"):
            data[key].pop(name, None)
        if "completed" in entry:
            data["trajectory_checksums"][name], data["trajectory_records"][name] = entry["checksum"], entry["record"]
        elif "failed" in entry:
            data["failures"][name] = entry["failure"]
    data["completed_trajectories"], data["failed_trajectories"] = [*data["trajectory_records"]], [*data["failures"]]
    data["total_chunks"] = sum(len(record["spans"]) for record in data["trajectory_records"].values())
    return data


def read_progress(cache_dir: Path) -> dict[str, Any]:
    """What progress.json holds."""
    return json.loads((cache_dir / "progress.json").read_text(encoding="utf-8"))


def tree(folder: Path) -> dict[str, bytes | None]:
    """Relative path -> bytes (None for a folder) of everything below `folder`, to tell that nothing was written."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def wait_until(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for another process; AssertionError where the condition does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


@contextlib.contextmanager
def no_hang(seconds: int = 60) -> Iterator[None]:
    """Ends a test that would otherwise never end; in the main thread."""

    def interrupt(*_: object) -> None:
        raise AssertionError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# ---------------------------------------------------------------------------------------------------------------------
# A dataset and its runs
# ---------------------------------------------------------------------------------------------------------------------

# A trajectory of 20 frames, 0.25 m apart: with 2 m chunks that overlap by 0.5 m, three of them with 9 + 9 + 8 rows.
FRAMES, CHUNKS, ROWS = 20, 3, 26


class Robot(NamedTuple):
    """A dataset of one cache, in the folders that a user would have."""

    data: Path
    cache: Path
    config: Path

    def add(self, *names: str, **what: Any) -> None:
        """Good trajectories; the digit at the end of a name is its stamp."""
        for name in names:
            make_trajectory(self.data / name, FRAMES, stamp=int(name[-1]), **what)

    def add_broken(self, name: str) -> None:
        """One whose third pose is not a number; mend makes it good."""
        make_trajectory(self.data / name, FRAMES, stamp=int(name[-1]))
        position = straight_line(FRAMES)
        position[2, 1] = np.nan
        write_poses(self.data / name, position, np.zeros(FRAMES))

    def mend(self, name: str) -> None:
        write_poses(self.data / name, straight_line(FRAMES), np.zeros(FRAMES))

    def configure(self, **settings: Any) -> None:
        write_config(self.config, self.data, **settings)

    def check(self, *names: str) -> None:
        """These and no others are completed, with all their chunks and every row from its own frame."""
        progress = read_progress(self.cache)
        assert sorted(progress["completed_trajectories"]) == sorted(names)
        assert sorted(progress["trajectory_checksums"]) == sorted(names)
        for name in names:
            assert check_stamps(self.cache, name, int(name[-1])) == ROWS
        assert len(chunk_files(self.cache)) == progress["total_chunks"] == CHUNKS * len(names)
        assert list((self.cache / ".staging").iterdir()) == []


def frames_encoded(encoders: list[StampEncoder]) -> int:
    """By the latest encoder."""
    return sum(encoders[-1].batch_sizes)


def unreadable(monkeypatch: pytest.MonkeyPatch, is_lost: Callable[[str], bool], number: int = errno.EIO) -> None:
    """Opening a file whose path is_lost gives an I/O error, as on a mount that went away."""
    opened = os.open

    def fail(path: Any, *arguments: Any, **keywords: Any) -> int:
        if is_lost(str(path)):
            raise OSError(number, os.strerror(number), str(path))
        return opened(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", fail)


def attempts(robot: Robot) -> dict[str, int]:
    return {name: failure["attempts"] for name, failure in read_progress(robot.cache)["failures"].items()}


# ---------------------------------------------------------------------------------------------------------------------
# A record by hand
# ---------------------------------------------------------------------------------------------------------------------

SPEC = {"dino_model_type": "small", "max_chunk_distance_m": 50.0, "frame_pattern": r"(\d+)\.jpg"}


def record(failed: int = 0, **changes: Any) -> dict[str, Any]:
    """progress.json by hand: `a` with two chunks and `b/ü` with one are completed, f0, f1, ... failed."""
    entry = {"fingerprint": "f" * 16, "checksum_kind": "stat"}
    failure = {"error_type": "InputError", "attempts": 3, "time": 1.0, "checksum": None, "checksum_kind": "stat"}
    return {
        "format_version": 1,
        "dataset_name": "robot",
        "start_time": 1641800000.0,
        "last_update": 1641828645.0,  # Mon Jan 10 15:30:45 2022 UTC
        "elapsed_s": 9000.0,
        "completed_trajectories": ["a", "b/ü"],
        "failed_trajectories": [f"f{i}" for i in range(failed)],
        "total_chunks": 3,
        "processing_config": SPEC,
        "trajectory_checksums": {"a": "0" * 16, "b/ü": "1" * 16},
        "data_folder": "/data/robot",
        "data_format": "gnm",
        "num_trajectories": 8,
        "other_caches": None,
        "checksum_kind": "stat",
        "rebuild_started": None,
        "recut_started": None,
        "weights": {"source": "random", "size": None, "mtime": None, "digest": "d" * 16},
        "specs": {"f" * 16: SPEC},
        "trajectory_records": {
            "a": {**entry, "spans": [[0, 9], [7, 12]], "bytes": [100, 60]},
            "b/ü": {**entry, "spans": [[0, 5]], "bytes": [70]},
        },
        "failures": {f"f{i}": {**failure, "reason": f"f{i}/0.jpg: broken"} for i in range(failed)},
        **changes,
    }


def write_record(cache_dir: Path, failed: int = 0, **changes: Any) -> Path:
    cache_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record(failed, **changes), ensure_ascii=False)
    (cache_dir / "progress.json").write_text(text, encoding="utf-8")
    return cache_dir


# ---------------------------------------------------------------------------------------------------------------------
# Rendered trajectories
# ---------------------------------------------------------------------------------------------------------------------

SIZE = (48, 64)  # height, width [px]


class BitEncoder(StampEncoder):
    """Reads the stamp and the number out of the blocks."""

    def stamps(self, pixels: torch.Tensor) -> torch.Tensor:
        rows, columns = ([int((i + 0.5) * size / 4) for i in range(4)] for size in pixels.shape[-2:])
        white = pixels.float().mean(1)[:, rows][:, :, columns].flatten(1) > 128  # (B, 16)
        values = (white.int() << torch.arange(16)).sum(1)
        return torch.stack([values >> 12, values % 4096 // 256, values % 256], 1)


def render(stamp: int, number: int) -> np.ndarray:
    """(48, 64, 3) uint8."""
    bits = (stamp << 12 | number) >> np.arange(16) & 1
    blocks = np.where(bits, 235, 20).astype(np.uint8).reshape(4, 4)
    return np.repeat(blocks.repeat(SIZE[0] // 4, 0).repeat(SIZE[1] // 4, 1)[..., None], 3, 2)


class Rendered(NamedTuple):
    """A trajectory; its positions and yaws are the same in float32."""

    stamp: int
    count: int

    @property
    def position(self) -> np.ndarray:
        number = np.arange(self.count)
        return np.stack([number * 0.25, number % 5 * 0.125], 1)

    @property
    def yaw(self) -> np.ndarray:
        return np.arange(self.count) % 100 / 64

    @property
    def frames(self) -> list[np.ndarray]:
        return [render(self.stamp, number) for number in range(self.count)]

    @property
    def jpegs(self) -> list[bytes]:
        return [encoded(frame) for frame in self.frames]


def encoded(frame: np.ndarray, kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.fromarray(frame).save(file, kind, quality=90)
    return file.getvalue()


def write_gnm(folder: Path, trajectories: list[Rendered]) -> list[str]:
    """Folders t<stamp>; as all writers here, returns the trajectories' names."""
    for trajectory in trajectories:
        path = folder / f"t{trajectory.stamp}"
        path.mkdir(parents=True)
        for number, data in enumerate(trajectory.jpegs):
            (path / f"{number}.jpg").write_bytes(data)
        (path / "traj_data.pkl").write_bytes(pickle.dumps({"position": trajectory.position, "yaw": trajectory.yaw}))
    return [f"t{trajectory.stamp}" for trajectory in trajectories]


FIRST, SECOND = Rendered(1, 40), Rendered(2, 27)

# Names of trajectories.
NFC, NFD = unicodedata.normalize("NFC", "café"), unicodedata.normalize("NFD", "café")
ODD_NAMES = [
    *(" ", "a b ", "tab\tand\nnew line", "\x01\x1b[31m", "a\u2028b", "\u202egpj.0"),  # blank, control, right to left
    *(NFC, NFD, "Case", "case", "CASE/x", "x" * 255, "ü" * 127, "..."),  # alike, long
    *("-rf", "[0-9]*?", "%s {0} $HOME ~", "back\\slash", "'\"`;|&"),  # special elsewhere
    *("walk.tmp", "chunk_00000.h5", "deep/progress.json", "deep/.lock", "0.png", "traj_data"),  # like the tool's own
]
