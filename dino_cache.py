#!/usr/bin/env python3
"""Turn robot trajectories (camera frames with metric poses) into frozen DINOv2 or DINOv3 features, once.

    python dino_cache.py --config config/data/dino_cache.yaml              # start, or go on where the last run stopped
    python dino_cache.py --config config/data/dino_cache.yaml --dry-run    # what it would do, and the space it takes
    python progress_utils.py show --cache-dir /data/my_robot/dino_cache_large

The flow, one flat stream of frames across trajectory and chunk borders, so that batches are always full:

    config -> trajectories -> chunk plan -> decode -> encode -> cut -> write -> progress
     YAML     poses + frames   spans by m   threads   GPU      per     1 thread  main thread
     typed    validated        half-open    bounded   full B   chunk   durable   atomic

The output, one folder a trajectory, one HDF5 file a chunk of travelled distance (L frames, patch grid h x w, width D):

    <cache_dir>/progress.json, dino_cache.log, <trajectory>/chunk_00000.h5, chunk_00001.h5, ...
        cls_token           (L, D) float16         position            (L, 2) float64 [m]
        patch_tokens        (L, h, w, D) float16   yaw                 (L,) float64 [rad]   (store: int8: see docs)
        register_tokens     (L, R, D) float16      frame_index         (L,) int64, row of the source's poses
        mean_token          (L, D) float16         travelled_distance  (L,) float64 [m] from frame 0
        timestamp           (L,) float64 [s]       delta               (L, 3) float64 to the next frame [m, m, rad]
        extra/<name>        (L, ...), for each of extra_keys
    Of tokens those asked for; of chosen layers cls_token_l05, cls_token_l11, and so on.
    With chunk_by: frames a chunk has a number of frames, no distance, and the poses that its data have.
    Its first 512 bytes (HDF5's user block) hold a digest of all bytes that are no dataset's; each dataset has its own.

What is guaranteed: a file under a final name is complete and was forced to the disk before it was recorded; a killed
run loses the work in flight and nothing else; a broken trajectory fails alone, with its reason; changed data is redone;
a changed configuration never mixes in unasked. What is not: protection against a disk that lies about fsync, or against
JPEG bytes that are damaged in a way that still decodes.

Sections, each using only those above it: constants - errors - profile - configuration - trajectories - formats - chunk
plan - decoding - encoding - storage - working ahead - pipeline - executors - before the work - the work - forecast -
a run - command line. torch, torchvision, timm and h5py are imported where they are first needed, so that refusals and
runs with nothing to do are quick. What goes beyond this job (other formats, executor: ray, CacheWindows to train with,
encode_images, other engines, other models) lies in dino_cache_extras/ and is opened by name: FORMAT_MODULES,
EXECUTOR_MODULES, ENGINE_MODULES, TIMM_MODELS_MODULE, DOORS.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import errno
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import logging
import math
import mmap
import multiprocessing
import multiprocessing.reduction
import os
import pickle
import pickletools
import re
import reprlib
import resource
import selectors
import shutil
import signal
import stat
import sys
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import zipfile
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Container, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import forkserver, resource_tracker
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, BinaryIO, Literal, NamedTuple, NoReturn, Protocol, TypeVar

from progress_utils import (
    FSTAB,
    GC_THRESHOLDS,
    JOURNAL_FILE,
    LOCK_FILE,
    LOCK_OWNER_FILE,
    LOG_FILE,
    PROGRESS_FILE,
    RUNS_FILE,
    SHARDS_FOLDER,
    SHOWN_NAMES,
    STAGING_FOLDER,
    TEMPORARY_FILES,
    CacheLockedError,
    DamagedChunkError,
    DinoCacheError,
    Failure,
    Heartbeat,
    Partial,
    Progress,
    RefusedError,
    RunState,
    Shard,
    TrajectoryRecord,
    __version__,
    absent_mount,
    ask_for_answer,
    available_cores,
    chunk_file_name,
    chunk_folders,
    console_error,
    end_without_library,
    example,
    find_partials,
    fsync_path,
    human_bytes,
    human_duration,
    human_list,
    is_chunk_file,
    is_empty_cache,
    is_there,
    locked_cache,
    missing_library,
    move_partial,
    note_partial,
    open_door,
    open_library,
    partial_folder,
    partial_journal,
    print_lines,
    printable,
    program_name,
    progress_command,
    read_partial,
    recorded_caches,
    refuse_locale,
    set_aside,
    set_up_console,
    unmerged_shards,
)

try:
    import numpy as np
    import yaml
    from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator
    from tqdm import tqdm
except ImportError as missing:
    end_without_library(missing)

if TYPE_CHECKING:
    import PIL.Image
    import torch

__all__ = [  # the public API, documented in docs/api.md; also what DOORS names
    "CacheSpec", "ChunkLabel", "ChunkStore", "DamagedChunkError", "DeviceError", "DinoCacheError", "Hooks",
    "InputError", "RefusedError", "RunOptions", "StorageError", "Trajectory", "TrajectoryResult", "cache_trajectories",
    "find_trajectories", "load_config", "load_encoder", "model_shape", "token_shapes",
]  # fmt: skip

# ======================================================================================================================
# Constants: names and limits that are not the user's to set
# ======================================================================================================================

TOKEN_DATASETS = {"cls": "cls_token", "patch": "patch_tokens", "register": "register_tokens", "mean": "mean_token"}
DINOV2_NAMES = {
    f"{size}{suffix}": f"vit_{size}_patch14{timm_suffix}_dinov2.lvd142m"
    for size in ("small", "base", "large", "giant")
    for suffix, timm_suffix in (("", ""), ("_reg", "_reg4"))
}
DINOV3_NAMES = {
    f"dinov3_{size}": f"vit_{size}_patch16_dinov3.lvd1689m"
    for size in ("small", "small_plus", "base", "large", "huge_plus", "7b")
}
MODEL_NAMES = DINOV2_NAMES | DINOV3_NAMES  # dino_model_type -> the model's name in timm; others: TIMM_MODELS_MODULE
IMAGENET = {"pixel_mean": (0.485, 0.456, 0.406), "pixel_std": (0.229, 0.224, 0.225)}  # of DINOv2 and DINOv3

FRAME_PATTERN = r"(\d+)\.(?:jpg|jpeg|png|JPG|JPEG|PNG)"
FILE_THREADS = 16  # threads that wait for files of a slow disk or a network
READ_TOGETHER = 8  # frames that are taken from a container in one go
MAX_POSE_NUMBERS = 50_000_000  # a pose file with more numbers is refused; they would take 400 MB
MAX_TEXT = 10_000  # characters of a text that is stored with each chunk
MAX_POSITION_M = 1e8  # no place on Earth is farther from any map's origin; one glitch of 1e16 m would swallow all steps
MAX_FRAME_PIXELS = 80_000_000  # a frame that claims more pixels is refused undecoded
LOST_MOUNT_ERRNOS = (errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENXIO)

FORMAT_MODULES = {  # format -> the module that reads it; gnm is read here
    "recon": "dino_cache_extras.formats.recon",
    "lerobot": "dino_cache_extras.formats.lerobot",
    "video": "dino_cache_extras.formats.video",
    "frames": "dino_cache_extras.formats.frames",
    "rosbag": "dino_cache_extras.formats.rosbag",
}
EXECUTOR_MODULES = {"ray": "dino_cache_extras.ray_workers"}  # executor -> its module; local is this process
PARTIAL_WORK_MODULE = "dino_cache_extras.partial_work"  # what is left of trajectories that are begun, for estimates
RECUT_MODULE = "dino_cache_extras.recut"  # --recut: tokens come from the chunks that are replaced
ENGINE_MODULES = {"openvino": "dino_cache_extras.openvino_engine"}  # engine -> its module; torch is used here
HOOKS_MODULE = "dino_cache_extras.hooks"  # tells others how a run went, as the settings HOOK_KEYS want it
HOOK_KEYS = ("notify", "metrics_file")
TRANSFORMERS_NAMES_MODULE = "dino_cache_extras.transformers_names"  # reads facebook's weights files of the hub
TIMM_MODELS_MODULE = "dino_cache_extras.timm_models"  # any other model of timm
HUB_MODULE = "dino_cache_extras.hub"  # keeps the hub quiet, and knows soon when it cannot be reached
SMALLER_TOKENS_MODULE = "dino_cache_extras.smaller_tokens"  # patch tokens pooled, and as int8
CONFIG_ADVICE_MODULE = "dino_cache_extras.config_advice"  # says what to write instead
DOORS = {"CacheWindows": "dino_cache_extras.windows", "encode_images": "dino_cache_extras.images"}  # see __getattr__
__all__.extend(DOORS)

Token = Literal["cls", "patch", "register", "mean"]
ModelType = Literal[
    "small", "small_reg", "base", "base_reg", "large", "large_reg", "giant", "giant_reg",
    "dinov3_small", "dinov3_small_plus", "dinov3_base", "dinov3_large", "dinov3_huge_plus", "dinov3_7b",
]  # fmt: skip
ChecksumKind = Literal["stat", "content"]

Item = TypeVar("Item")
Result = TypeVar("Result")

LOG = logging.getLogger("dino_cache")
EVENTS = logging.getLogger("dino_cache_events")  # for machines: a name and a mapping; nobody listens by default

# ======================================================================================================================
# Errors: whose fault it is decides what happens
# ======================================================================================================================
# RefusedError (exit 2) and CacheLockedError (exit 4) come from progress_utils.


class InputError(Exception):
    """A trajectory's own fault, with the file and the value: it fails alone and the run goes on."""


class InvalidDataError(InputError):
    """The data could be read, and what they say breaks a rule. Where they changed since the trajectory was completed,
    its chunks match no data any more. Any other InputError (cannot be opened, parsed, decoded) proves nothing."""


class PlaceTakenError(InputError):
    """What is not ours lies where a trajectory's chunks belong; it is tried again when that is gone."""


class MachineError(DinoCacheError):
    """The machine lacks memory or file descriptors: the run stops, no trajectory is blamed, a rerun resumes."""


class StorageError(DinoCacheError):
    """The disk written to, or the mount read from, fails: the run stops, nothing false is recorded, a rerun resumes."""


class DeviceError(DinoCacheError):
    """The encoder's device fails: the run stops, no trajectory is blamed, a rerun resumes."""


class StoppedError(DinoCacheError):
    """A signal or --max-hours ended the run before its work began; it carries the exit code."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


# ======================================================================================================================
# Fence: the limits of a process that parses others' bytes; and whose fault an error is
# ======================================================================================================================

READER_MEMORY_BYTES = 3 << 29  # that a reader may take beyond what it has after its imports
READER_CPU_S = 20  # processor time that it may take without getting on
CONTENT_CPU_S = 3600  # ... while it digests whole files, which may be large, and parses nothing
PR_SET_PDEATHSIG = 1  # prctl's: a signal when the parent dies


class FenceLimits(NamedTuple):
    """What a reader process may take."""

    memory_bytes: int
    cpu_s: int


class Fence:
    """This process's limits, where it is a reader. An overrun of memory comes as MemoryError; at one of processor time
    the kernel ends the process with SIGXCPU, whatever code it is in."""

    def __init__(self) -> None:
        self.limits: FenceLimits | None = None  # None: this process is no reader
        self._renewed_s = 0.0

    def set_up(self, limits: FenceLimits) -> None:
        """Make this process a reader: it keeps the limits, writes nowhere and ends with its parent."""
        if (prctl := getattr(ctypes.CDLL(None), "prctl", None)) is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGXCPU, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(nowhere, descriptor)
        _limit(resource.RLIMIT_CORE, 0)
        os.environ["ARROW_DEFAULT_MEMORY_POOL"] = "system"  # pyarrow's own takes 1 GiB at once, of the memory allowed
        with contextlib.suppress(OSError), open("/proc/self/status", "rb") as status:
            used_kb = next(int(line.split()[1]) for line in status if line.startswith(b"VmData:"))
            _limit(resource.RLIMIT_DATA, used_kb * 1024 + limits.memory_bytes)
        self.limits = limits
        self.allow()

    def allow(self, cpu_s: int | None = None) -> None:
        """Give so much processor time from here on; what the limits say where nothing is said."""
        if self.limits is not None:
            self._renewed_s = time.process_time()
            _limit(resource.RLIMIT_CPU, math.ceil(self._renewed_s) + (cpu_s or self.limits.cpu_s))

    def getting_on(self) -> None:
        """Something was achieved: the time for the next thing begins. Cheap, and without effect elsewhere."""
        if self.limits is not None and time.process_time() > self._renewed_s + 1:
            self.allow()

    def memory_fault(self, name: str, error: Exception) -> Exception:
        """Whose fault it is that no memory was left to read a trajectory."""
        if self.limits is not None:
            return beyond_memory(name, self.limits)
        ways = "free memory, or raise the limit (ulimit), and run the same command again"
        return MachineError(f"{name}: cannot be read: {error or type(error).__name__}; {ways}")

    def portable(self, error: Exception) -> Exception:
        """An error as it can go to another process, with its traceback as a note for the log."""
        if self.limits is None:
            return error
        text, is_full = "".join(traceback.format_exception(error)), isinstance(error.__cause__, MemoryError)
        error.__traceback__ = error.__cause__ = error.__context__ = None  # they hold all that the parser had taken
        if is_full:
            gc.collect()
        if isinstance(error, OSError):  # libraries' own kinds cannot be made anew without them
            error = OSError(error.errno, error.strerror or str(error), error.filename)
        elif not isinstance(error, (InputError, DinoCacheError)):
            error = InputError(f"{type(error).__name__}: {error}")
        error.add_note(f"in a reader process:\n{text}")
        return error


def beyond_memory(name: str, limits: FenceLimits) -> InputError:
    """The fault of data, or of a file of them, that a reader has not the memory for."""
    return InputError(f"{name}: needs more than {limits.memory_bytes / 2**30:.1f} GiB of memory to be read")


def _limit(what: int, most: int) -> None:
    """Set a soft limit, as far as the hard one lets."""
    _, hard = resource.getrlimit(what)
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(what, (most, hard))


FENCE = Fence()


class FatalDataError(InputError):
    """The data crash the process that reads them, or keep it busy beyond its limits."""


MACHINE_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@contextlib.contextmanager
def input_errors(name: str) -> Iterator[None]:
    """The one place that decides whose fault it is when a trajectory's data are opened, planned, read or decoded.

    Raises:
        InputError: the data's, whatever a library made of them.
        OSError: the system could not read them; nothing is known of what they hold.
        MachineError: no memory, or no file descriptors, were left. Other errors of ours pass too.
    """
    try:
        yield
    except (InputError, DinoCacheError):
        raise
    except MemoryError as error:
        raise FENCE.memory_fault(name, error) from error
    except OSError as error:
        if error.errno == errno.ENOMEM:
            raise FENCE.memory_fault(name, error) from error
        if error.errno in MACHINE_ERRNOS:
            ways = "raise the limit (ulimit -n), and run the same command again"
            raise MachineError(f"{name}: cannot be read: {error}; {ways}") from error
        if error.errno is not None:
            raise
        raise InputError(f"{name}: cannot be read: {error or type(error).__name__}") from error
    except Exception as error:  # parsers and codecs make all sorts of odd bytes
        raise InputError(f"{name}: cannot be read: {type(error).__name__}: {error}") from error


# ======================================================================================================================
# Profile: where a run's time goes
# ======================================================================================================================


class Profile:
    """Seconds that each stage was at work, summed over its threads: `with PROFILE("decode"): ...`. A stage inside
    another counts for itself alone."""

    def __init__(self) -> None:
        self._seconds: dict[tuple[str, int], float] = {}  # by stage and thread, so that no two threads share a sum
        self._begin = time.perf_counter()
        self._here = threading.local()

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        inside_outer_s = getattr(self._here, "inside_s", 0.0)
        self._here.inside_s, begin = 0.0, time.perf_counter()
        try:
            yield
        finally:
            elapsed_s = time.perf_counter() - begin
            self.add(stage, elapsed_s - self._here.inside_s)
            self._here.inside_s = inside_outer_s + elapsed_s

    def add(self, stage: str, seconds: float, worker: int | None = None) -> None:
        """Count what was measured elsewhere, perhaps in another process."""
        key = (stage, worker or threading.get_ident())
        self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """The seconds by stage so far, which are forgotten here: another process counts them."""
        taken, self._seconds = self._seconds, {}
        return {stage: sum(s for (name, _), s in taken.items() if name == stage) for stage in {key[0] for key in taken}}

    def pulling(self, stage: str, items: Iterable[Item]) -> Iterator[Item]:
        """The items; the time that each takes to come is the stage's."""
        source = iter(items)
        while True:
            with self(stage):
                item = next(source, None)
            if item is None:
                return
            yield item

    def table(self) -> list[str]:
        """For people: per stage the seconds, the threads, and the share of the run that each of them was at work."""
        wall_s = time.perf_counter() - self._begin
        lines = [f"{'stage':16} {'seconds':>9} {'threads':>8} {'share of the run':>17}"]
        shares = {}
        for stage in STAGES:
            seconds = [value for (name, _), value in list(self._seconds.items()) if name == stage]
            shares[stage] = sum(seconds) / max(1, len(seconds)) / wall_s
            lines.append(f"{stage:16} {sum(seconds):9.2f} {len(seconds):8} {shares[stage]:17.1%}")
        at_work = {stage: share for stage, share in shares.items() if stage not in ("load", "wait for frames")}
        lines.append(f"whole run {wall_s:.2f} s; the limit was: {max(at_work, key=at_work.get)}")
        return lines


STAGES = ("list", "load", "read", "decode", "wait for frames", "encode", "copy out", "write", "fsync", "record")
PROFILE = Profile()

# ======================================================================================================================
# Configuration: YAML to a typed, frozen description of each dataset
# ======================================================================================================================

MODELS_WITH_REGISTERS = (*(name for name in DINOV2_NAMES if name.endswith("_reg")), *DINOV3_NAMES)


Metres = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Scale = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
PositiveInt = Annotated[int, Field(strict=True, ge=1, le=2**31 - 1)]
StrictBool = Annotated[bool, Field(strict=True)]
ChannelValues = tuple[float, float, float]
DataKey = Annotated[str, Field(min_length=1)]
PoseColumn = Literal["timestamp", "x", "y", "z", "yaw", "qx", "qy", "qz", "qw", "file"]
PoseColumns = dict[PoseColumn, Annotated[str, Field(min_length=1, coerce_numbers_to_str=True)]]


def one_of(name: str, known: Sequence[str]) -> str:
    """The name, where it is one of those known; ValueError where it is not."""
    if name not in known:
        raise ValueError(f"should be one of {', '.join(known)}")
    return name


EXTRA_PREFIX = "extra/"


def extra_dataset(key: str) -> str:
    """The dataset in which a column that came along is stored: `commands/linear` in `extra/commands.linear`."""
    return EXTRA_PREFIX + key.strip("/").replace("/", ".")


def cameras_of(image_key: Any) -> tuple[str | None, ...]:
    """The names of the cameras that an `image_key` means, in order; (None,) for a single one, which has no name."""
    return tuple(image_key) if isinstance(image_key, dict) else (None,)


def token_dataset(camera: str | None, name: str) -> str:
    """What a dataset of tokens is called in a chunk file."""
    return name if camera is None else f"{camera}/{name}"


def scale_dataset(name: str) -> str:
    """Beside a dataset of int8 tokens, that of their scales, one a token."""
    return f"{name}_scale"


def token_type(name: str, names: Container[str]) -> np.dtype:
    """What a dataset of tokens holds, of a chunk that has datasets of these names: int8 beside scales, else float16."""
    return np.dtype(np.int8 if scale_dataset(name) in names else np.float16)


def token_bytes(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """What the tokens of a frame of a camera take: dataset name -> shape, as `token_shapes` gives them."""
    return sum(token_type(name, shapes).itemsize * math.prod(shape) for name, shape in shapes.items())


def token_names(token: Token, layers: Sequence[int] | None) -> list[str]:
    """What a token's datasets are called, of one camera: patch_tokens, or of layers patch_tokens_l05, ..._l11."""
    return [f"{TOKEN_DATASETS[token]}_l{layer:02d}" for layer in layers or ()] or [TOKEN_DATASETS[token]]


_NAMED_TOKENS = re.compile(rf"(?!{EXTRA_PREFIX})(?s:.*/)?({'|'.join(TOKEN_DATASETS.values())})(?:_l\d{{2,}})?")


def token_of(dataset: str) -> Token | None:
    """Which token a dataset of a chunk file holds, of any camera and layer: patch of front/patch_tokens_l05."""
    found = _NAMED_TOKENS.fullmatch(dataset)
    return found and next(token for token, name in TOKEN_DATASETS.items() if name == found[1])


CAMERA_NAME = re.compile(r"[A-Za-z0-9_-]+")
NOT_CAMERAS = (  # what else lies, or may come to lie, where a camera's datasets do
    *TOKEN_DATASETS.values(), "position", "yaw", "frame_index", "travelled_distance", "timestamp", "delta", "extra",
)  # fmt: skip


def named_cameras(keys: Any) -> dict[str, str]:
    """Camera name -> its key, in order of the names, so that the order in a config file makes no other cache. `keys`: a
    mapping, or a list, whose keys are named by the parts that tell them apart.

    Raises:
        ValueError: a name or a key cannot be used.
    """
    if isinstance(keys, list | tuple):
        keys = dict(zip(_telling_parts(keys), keys))
    if not keys:
        raise ValueError("names no camera")
    for name, key in keys.items():
        if not isinstance(name, str) or not CAMERA_NAME.fullmatch(name):
            raise ValueError(f"{name!r} cannot be a camera's name; a name has letters, digits, _ and - alone")
        if name in NOT_CAMERAS:
            raise ValueError(f"{name} cannot be a camera's name, since a dataset of a chunk has it")
        if not isinstance(key, str) or not key:
            raise ValueError(f"{name} needs a key of the data, not {_brief(key)}")
    for (name, key), (other, same) in itertools.combinations(keys.items(), 2):
        if key == same:
            raise ValueError(f"{name} and {other} are both {key}")
    return dict(sorted(keys.items()))


def _telling_parts(keys: Sequence[Any]) -> list[str]:
    """What tells keys apart: each without the parts, between `.` and `/`, that all begin and end with.

    Raises:
        ValueError: that gives no names, or one name twice.
    """
    if len(keys) < 2 or not all(isinstance(key, str) and key for key in keys):
        raise ValueError("a list holds the keys of two or more cameras")
    rests = [[part for part in re.split(r"[./]", key) if part] for key in keys]
    for place in (0, -1):
        while all(rests) and len({parts[place] for parts in rests}) == 1:
            for parts in rests:
                parts.pop(place)
    names = ["_".join(parts) for parts in rests]
    if not all(map(CAMERA_NAME.fullmatch, names)) or len(set(names)) < len(names):
        raise ValueError("these keys give no names; name the cameras: {front: <key>, left: <key>}")
    return names


class CacheSpec(BaseModel):
    """Every setting that changes what is computed, beyond rounding. Its hash, with the weights, is the fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    dino_model_type: str = "large"  # one of MODEL_NAMES, or of TIMM_MODELS_MODULE
    weights: Annotated[str, Field(min_length=1)] = "pretrained"  # pretrained | random | absolute path of a file
    tokens: Annotated[tuple[Token, ...], Field(min_length=1)] = ("cls",)
    image_size: tuple[PositiveInt, PositiveInt] = (224, 308)  # height, width [px]
    resize: Literal["crop", "stretch"] = "crop"
    pixel_mean: ChannelValues = Field(default=None, validate_default=True)  # None: the model's own, put in here
    pixel_std: ChannelValues = Field(default=None, validate_default=True)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    engine: str = "torch"
    compile: StrictBool = False
    max_chunk_distance_m: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = 50.0
    overlap_distance_m: Metres = 1.0
    min_chunk_distance_m: Metres = 0.3
    frame_stride: PositiveInt = 1
    frame_pattern: str = FRAME_PATTERN
    image_key: DataKey | dict[str, DataKey] | None = None  # several cameras: name -> key, in order of the names
    position_key: DataKey | None = None
    yaw_key: DataKey | None = None
    position_scale: Scale = 1.0  # metres per unit
    yaw_unit: Literal["radians", "degrees", "compass_degrees"] = "radians"
    pose_axes: Literal["z_up", "y_up", "camera", "ned"] = "z_up"  # see AXES
    time_scale: Scale = 1.0  # seconds per unit of the poses' times
    chunk_by: Literal["distance", "frames"] = "distance"
    max_chunk_frames: PositiveInt = 256  # kept frames
    overlap_frames: Annotated[int, Field(strict=True, ge=0)] = 8
    time_zero: Literal["first_frame", "container"] = "first_frame"  # of a video's poses
    yaw_offset: Annotated[float, Field(strict=True, allow_inf_nan=False)] = 0.0  # [rad], added to every yaw
    sample_hz: Scale | None = None  # of the frames that are kept, before frame_stride; None: all
    max_pose_gap_s: Scale = 1.0  # between two poses; a longer one cuts the trajectory where poses are interpolated
    layout: Literal["auto", "kitti", "tum", "euroc", "tartanair", "tartandrive", "custom"] = "auto"  # of format frames
    pose_file: DataKey | None = None  # relative to a trajectory's folder
    pose_columns: PoseColumns | None = None  # what is read -> its name in the pose file
    pose_match: Literal["row", "time"] = "row"
    poses_folder: DataKey | None = None  # where pose tables lie apart from pictures and videos
    time_offset: Annotated[float, Field(strict=True, allow_inf_nan=False)] = 0.0  # [s], added to the poses' times
    frame_times: DataKey | None = None  # a table of the frames' times, relative to a trajectory's folder
    tf: Annotated[str, Field(pattern=r"^[^\s>]+ *-> *[^\s>]+$")] | None = None  # a bag's frames: from->to
    stamps: Literal["header", "log"] = "header"  # by which a bag's messages are brought together
    extra_keys: tuple[DataKey, ...] = ()  # columns of the data that are stored beside the poses
    integrate: StrictBool = False  # position_key and yaw_key name velocities, which are added up to poses
    layers: tuple[Annotated[int, Field(strict=True)], ...] | None = None  # from 0; None: what comes out at the end
    layer_norm: StrictBool = True  # of layers: after the model's final norm
    patch_pool: PositiveInt = 1  # patch tokens are means over n x n patches
    store: Literal["float16", "int8"] = "float16"  # of patch tokens

    @field_validator("dino_model_type", mode="before")
    @classmethod
    def _model_is_known(cls, name: Any) -> str:
        if not isinstance(name, str) or name in MODEL_NAMES:
            return one_of(name, tuple(MODEL_NAMES))
        if not is_there(TIMM_MODELS_MODULE):
            raise ValueError(f"should be one of {', '.join(MODEL_NAMES)}; others need dino_cache_extras, not there")
        return open_door(TIMM_MODELS_MODULE).checked_name(name)

    @field_validator("pixel_mean", "pixel_std", mode="before")
    @classmethod
    def _pixels_are_the_models_own(cls, values: Any, others: ValidationInfo) -> Any:
        name = others.data.get("dino_model_type", "large")  # absent where it was refused
        if values is not None:
            return values
        own = IMAGENET if name in MODEL_NAMES else open_door(TIMM_MODELS_MODULE).pixels(name)
        return own[others.field_name]

    @field_validator("layers")
    @classmethod
    def _layers_in_order(cls, layers: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if layers is not None and min(layers, default=-1) < 0:
            raise ValueError("should be numbers of the model's blocks, from 0, like [5, 11]")
        if layers is not None and len(set(layers)) != len(layers):
            raise ValueError("names a layer twice")
        return layers and tuple(sorted(layers))

    @field_validator("tokens")
    @classmethod
    def _tokens_in_file_order(cls, tokens: tuple[Token, ...]) -> tuple[Token, ...]:
        if len(set(tokens)) != len(tokens):
            raise ValueError("names a token twice")
        return tuple(token for token in TOKEN_DATASETS if token in tokens)

    @field_validator("engine")
    @classmethod
    def _engine_is_known(cls, name: str) -> str:
        return one_of(name, ("torch", *ENGINE_MODULES))

    @field_validator("extra_keys")
    @classmethod
    def _extra_keys_have_names(cls, keys: tuple[str, ...]) -> tuple[str, ...]:
        datasets: dict[str, str] = {}
        for key in keys:
            if not (name := extra_dataset(key).removeprefix(EXTRA_PREFIX)).strip(".") or not name.isprintable():
                raise ValueError(f"{key!r} cannot be the name of a dataset")
            if (other := datasets.setdefault(name, key)) != key:
                raise ValueError(f"{other} and {key} would both be stored as {extra_dataset(key)}")
        if len(datasets) < len(keys):
            raise ValueError("names a key twice")
        return keys

    @field_validator("image_key", mode="before")
    @classmethod
    def _cameras_have_names(cls, key: Any) -> Any:
        if key is None or isinstance(key, str):
            return key
        if not isinstance(key, dict | list | tuple):
            raise ValueError("should be a key of the data, or one for each camera: {front: <key>, left: <key>}")
        return named_cameras(key)

    @field_validator("pixel_std")
    @classmethod
    def _std_is_positive(cls, std: ChannelValues) -> ChannelValues:
        if min(std) <= 0:
            raise ValueError("every value must be greater than 0")
        return std

    @field_validator("frame_pattern")
    @classmethod
    def _pattern_has_one_group(cls, pattern: str) -> str:
        try:
            groups = re.compile(pattern).groups
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        if groups != 1:
            raise ValueError(f"needs exactly one group, the frame's number; it has {groups}")
        return pattern

    @model_validator(mode="after")
    def _settings_agree(self) -> CacheSpec:
        if self.overlap_distance_m >= self.max_chunk_distance_m:
            raise ValueError(
                f"overlap_distance_m: {self.overlap_distance_m} must be less than "
                f"max_chunk_distance_m: {self.max_chunk_distance_m}"
            )
        if self.min_chunk_distance_m > self.max_chunk_distance_m:
            raise ValueError(
                f"min_chunk_distance_m: {self.min_chunk_distance_m} must be at most "
                f"max_chunk_distance_m: {self.max_chunk_distance_m}"
            )
        if self.overlap_frames >= self.max_chunk_frames:
            raise ValueError(
                f"overlap_frames: {self.overlap_frames} must be less than max_chunk_frames: {self.max_chunk_frames}"
            )
        if self.tf is not None and self.position_key is not None:
            raise ValueError(f"tf: {self.tf} and position_key: {self.position_key} both say where poses are; set one")
        if self.compile and self.engine != "torch":
            raise ValueError(f"compile: true is for engine: torch; engine: {self.engine} compiles by itself")
        if self.layers is None and not self.layer_norm:
            raise ValueError("layer_norm: false is for layers; set them, or take it out")
        if "register" in self.tokens and self.dino_model_type in MODEL_NAMES.keys() - set(MODELS_WITH_REGISTERS):
            raise ValueError(
                f"tokens: register needs a model with registers; dino_model_type: {self.dino_model_type} has none, "
                f"{self.dino_model_type}_reg and every dinov3 model have"
            )
        for key, value in (("patch_pool", self.patch_pool), ("store", self.store)):
            if "patch" not in self.tokens and value != type(self).model_fields[key].default:
                raise ValueError(
                    f"{key}: {value} is of patch tokens, and tokens: {', '.join(self.tokens)} has none; add patch, or "
                    f"leave {key} out"
                )
        return self

    @property
    def cameras(self) -> tuple[str | None, ...]:
        """Their names; (None,) for a single one."""
        return cameras_of(self.image_key)

    @property
    def has_smaller_tokens(self) -> bool:
        """Whether patch tokens are stored otherwise than as they are computed, in float16."""
        return self.patch_pool > 1 or self.store != "float16"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, key by key. Settings that came later are left out where they are at their defaults, which
        do what was done before: older caches keep their configuration and their fingerprint."""
        values = self.model_dump(mode="json")
        return {
            key: value for key, value in values.items() if key not in _LATER_DEFAULTS or value != _LATER_DEFAULTS[key]
        }

    def fingerprint(self, weights_digest: str) -> str:
        """16 hex digits that name what is computed: all settings, with the weights by content, not by place."""
        identity = json.dumps({**self._identity(), "weights": weights_digest}, sort_keys=True)
        return hashlib.sha256(identity.encode()).hexdigest()[:16]

    def _identity(self) -> dict[str, Any]:
        return self.to_json()


class GuessedSpec(CacheSpec):
    """A spec with keys of the data that nobody set. What was guessed for them is settled once per cache, recorded, and
    in no fingerprint: caches from before it was recorded keep theirs."""

    guessed_keys: tuple[str, ...]  # also those for which the data have nothing

    def _identity(self) -> dict[str, Any]:
        return {key: value for key, value in self.to_json().items() if key not in (*self.guessed_keys, "guessed_keys")}


def recorded_spec(settings: dict[str, Any]) -> CacheSpec:
    """The spec that was recorded as these settings. Raises ValueError where one of them is not known."""
    return (GuessedSpec if "guessed_keys" in settings else CacheSpec).model_validate(settings)


def without_guesses(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recorded spec as they were set: keys that were guessed are None, as nobody set them."""
    guessed = settings.get("guessed_keys", ())
    return {key: None if key in guessed else value for key, value in settings.items() if key != "guessed_keys"}


_LATER_SETTINGS = (
    "image_key", "position_key", "yaw_key", "position_scale", "chunk_by", "max_chunk_frames", "overlap_frames",
    "time_zero", "yaw_unit", "pose_axes", "time_scale", "engine", "compile",
    "yaw_offset", "sample_hz", "max_pose_gap_s", "extra_keys", "integrate",
    "layout", "pose_file", "pose_columns", "pose_match", "poses_folder", "time_offset", "frame_times",
    "tf", "stamps", "layers", "layer_norm", "patch_pool", "store",
)  # fmt: skip
_LATER_DEFAULTS = CacheSpec().model_dump(mode="json", include=set(_LATER_SETTINGS))


def with_defaults(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a recorded spec; those that came after it was recorded are at their defaults."""
    return {**_LATER_DEFAULTS, **settings}


class RunOptions(BaseModel):
    """Settings that do not change what is computed, beyond rounding."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    batch_size: PositiveInt | Literal["auto"] = "auto"
    readers: Literal["auto", "threads", "processes"] = "auto"
    decode_workers: Annotated[int, Field(strict=True, ge=1, le=1024)] | Literal["auto"] = "auto"
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+)$")] = "auto"
    enable_progress_tracking: StrictBool = True
    force_rebuild: StrictBool = False
    max_attempts: PositiveInt = 3
    checksum: ChecksumKind = "stat"
    progress_interval_s: Annotated[float, Field(strict=True, gt=0)] = 30.0
    executor: str = "local"
    ray_address: Annotated[str, Field(pattern=r"^(local|auto|[^/\s]+:\d+)$")] = "local"
    num_workers: PositiveInt | Literal["auto"] = "auto"
    cpus_per_worker: PositiveInt | Literal["auto"] = "auto"
    notify: Annotated[tuple[Any, ...], Field(repr=False)] = ()  # checked in HOOKS_MODULE, which shows none of its URLs
    metrics_file: Annotated[str, Field(min_length=1)] | None = None

    @field_validator("executor")
    @classmethod
    def _executor_is_known(cls, name: str) -> str:
        return one_of(name, ("local", *EXECUTOR_MODULES))


class DatasetPaths(BaseModel):
    """Where a dataset is read, in which format, and where its cache is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_folder: Annotated[str, Field(min_length=1)]
    cache_dir: Annotated[str, Field(min_length=1)] | None = None
    split: Annotated[str, Field(min_length=1)] | None = None
    format: str = "auto"

    @field_validator("format")
    @classmethod
    def _format_is_known(cls, name: str) -> str:
        return one_of(name, ("auto", "gnm", *FORMAT_MODULES))


@dataclass(frozen=True)
class DatasetConfig:
    """One dataset of the config file, every setting resolved."""

    name: str
    data_folder: Path
    cache_dir: Path
    split: Path | None
    spec: CacheSpec
    options: RunOptions
    format: str = "auto"
    own_keys: frozenset[str] = frozenset()  # given under the dataset, not at the top
    shard: Shard | None = None  # --shard: the share of the trajectories that is done

    @property
    def record_dir(self) -> Path:
        """Where record, lock, log and staging lie: the cache folder, or that of the shard."""
        return self.cache_dir if self.shard is None else self.shard.folder(self.cache_dir)


_SECTIONS: tuple[type[BaseModel], ...] = (CacheSpec, RunOptions, DatasetPaths)
_SHARED_KEYS = (*CacheSpec.model_fields, *RunOptions.model_fields)


def load_config(
    path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None, told: list[Any] | None = None
) -> list[DatasetConfig]:
    """Read a config file. `overrides` (from the command line) replace a key of every dataset. `told` gets the config's
    hooks, for a run that begins here, before anything else is refused.

    Raises:
        RefusedError: the file is missing, is not YAML, or has a key or a value that is not allowed; the message names
            the file, the key, the value and what is allowed. All faults of a dataset are reported together.
    """
    path, overrides = Path(path), dict(overrides or {})
    with advice_on(path, overrides):
        return _load_config(path, overrides, told)


def say_step(step: str) -> None:
    """Say what takes its time before the first batch: in the log, and on a terminal, which would be blank."""
    LOG.info("%s", step, extra={"is_step": True})


@contextlib.contextmanager
def advice_on(path: Path, overrides: Mapping[str, Any]) -> Iterator[None]:
    """Adds to a refusal the lines of the config file that it is about, and what to write instead."""
    try:
        yield
    except RefusedError as error:
        if is_there(CONFIG_ADVICE_MODULE) and not hasattr(error, "has_advice"):
            error.args = tuple(open_door(CONFIG_ADVICE_MODULE).advised(path, map(str, error.args), overrides.keys()))
            error.has_advice = True
        raise


def _load_config(path: Path, overrides: dict[str, Any], told: list[Any] | None) -> list[DatasetConfig]:
    top = _read_yaml(path)
    if sections := hook_sections(top, overrides):
        open_door(HOOKS_MODULE).begin(path, sections, told)
    _refuse_unknown_keys(path, "", top, (*_SHARED_KEYS, "datasets"))
    datasets = top.pop("datasets", None)
    if not isinstance(datasets, dict) or not datasets:
        raise RefusedError(
            f"{path}: datasets: needs a dataset, like `datasets: {{my_robot: {{data_folder: /data/my_robot}}}}`"
        )
    for key, value in overrides.items():
        prefix = next((prefix for name in datasets if key.startswith(prefix := f"datasets.{name}.")), "")
        own = DatasetPaths.model_fields if prefix else [f"datasets.{name}." for name in datasets]
        _refuse_unknown_keys("--set", prefix, {key.removeprefix(prefix): value}, (*_SHARED_KEYS, *own))
    configs = [_load_dataset(path, name, top, section, overrides) for name, section in datasets.items()]
    _refuse_shared_folders(path, configs)
    return configs


def hook_sections(top: dict[str, Any], overrides: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Dataset -> its settings, with those at the top, where any of HOOK_KEYS is set; else nothing."""
    datasets = top.get("datasets")
    known = datasets if isinstance(datasets, dict) and datasets else {"": {}}
    sections = {str(name): {**top, **own, **overrides} for name, own in known.items() if isinstance(own, dict)}
    return sections if any(section.get(key) for section in sections.values() for key in HOOK_KEYS) else {}


class _UniqueKeyLoader(yaml.SafeLoader):
    """Plain YAML data, in which a key given twice is an error: the first value would be lost silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in seen and key_node.tag != "tag:yaml.org,2002:merge":
                raise yaml.MarkedYAMLError(
                    problem=f"key {key_node.value!r} is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key_node.value if isinstance(key_node.value, str) else repr(key_node.value))
        return super().construct_mapping(node, deep)


def _brief(value: Any) -> str:
    """A value in a message, URLs cut after their scheme. YAML anchors can make a few lines print as gigabytes."""
    brief = reprlib.Repr()
    brief.repr_str = lambda text, at: reprlib.Repr.repr_str(brief, re.sub(r"(?is)(https?://).*", r"\1...", text), at)
    brief.maxstring = brief.maxother = 200
    brief.maxlevel = 2
    return brief.repr(value)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        shown = io.StringIO(text) if "://" in text else text  # a stream's lines, and secrets in them, are in no message
        data = yaml.load(shown, Loader=_UniqueKeyLoader)
    except OSError as error:
        raise RefusedError(f"{path}: cannot read the config file: {error.strerror}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:  # dates and keys that Python refuses, too
        raise RefusedError(*f"{path}: not a YAML file: {error}".splitlines()) from error
    if not isinstance(data, dict):
        raise RefusedError(f"{path}: needs keys and values, as in config/data/dino_cache.yaml")
    return data


def _refuse_unknown_keys(path: Path | str, prefix: str, section: dict[str, Any], known: Iterable[str]) -> None:
    known = tuple(known)
    for key, value in section.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=2, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(known)}"
            raise RefusedError(f"{path}: unknown key {prefix}{key}: {_brief(value)}; {hint}")


def _load_dataset(path: Path, name: Any, top: dict[str, Any], section: Any, overrides: dict[str, Any]) -> DatasetConfig:
    prefix = f"datasets.{name}."
    if not isinstance(name, str) or not isinstance(section, dict):
        raise RefusedError(f"{path}: datasets.{name}: needs a name and settings, at least data_folder")
    _refuse_unknown_keys(path, prefix, section, (*_SHARED_KEYS, *DatasetPaths.model_fields))
    here = {key.removeprefix(prefix): value for key, value in overrides.items() if key.startswith(prefix)}
    given = {**{key: value for key, value in overrides.items() if key in _SHARED_KEYS}, **here}
    values = {**top, **section, **given}
    faults: list[str] = []
    parsed = []
    for model in _SECTIONS:
        try:
            parsed.append(model.model_validate({key: values[key] for key in model.model_fields if key in values}))
        except ValidationError as error:
            own_keys = (*section, *DatasetPaths.model_fields, "")  # "": a rule between keys, wherever they stand
            prefixes = {**dict.fromkeys(own_keys, prefix), **dict.fromkeys(given, "on the command line: ")}
            faults += explain_faults(error, lambda key, prefixes=prefixes: prefixes.get(key, ""))
    if faults:
        raise RefusedError(*(f"{path}: {fault}" for fault in faults))
    spec, options, paths = parsed
    data_folder = _resolve_path(path, f"{prefix}data_folder", paths.data_folder)
    default_cache_dir = data_folder / f"dino_cache_{spec.dino_model_type.replace(':', '_')}"
    cache_dir = _resolve_path(path, f"{prefix}cache_dir", paths.cache_dir) if paths.cache_dir else default_cache_dir
    split = _resolve_path(path, f"{prefix}split", paths.split) if paths.split else None
    if spec.weights not in ("pretrained", "random"):
        spec = spec.model_copy(update={"weights": str(_resolve_path(path, "weights", spec.weights))})
    return DatasetConfig(name, data_folder, cache_dir, split, spec, options, paths.format, frozenset((*section, *here)))


def explain_faults(error: ValidationError, prefix_of: Callable[[str], str]) -> list[str]:
    """One line a key: its value and what is allowed."""
    reasons: dict[str, list[str]] = {}
    values: dict[str, Any] = {}
    for fault in error.errors():
        key = str(fault["loc"][0]) if fault["loc"] else ""
        message = fault["msg"].removeprefix("Value error, ").replace("Input should", "should")
        message = message.replace("a valid tuple", "a list, like [a, b]")
        reasons.setdefault(key, []).append(message)
        values.setdefault(key, fault["input"])
    return [
        prefix_of(key) + (f"{key}: {_brief(values[key])}: {' or '.join(messages)}" if key else "; ".join(messages))
        for key, messages in reasons.items()
    ]


def _resolve_path(config: Path, key: str, text: str) -> Path:
    """`~` and `$VAR` expanded; a relative path is relative to the config file, since cron has no useful folder."""
    expanded = os.path.expandvars(os.path.expanduser(text))
    if "$" in expanded:
        raise RefusedError(f"{config}: {key}: {text!r}: the environment variable is not set")
    return Path(os.path.abspath(config.absolute().parent / expanded))


def _refuse_shared_folders(path: Path, configs: list[DatasetConfig]) -> None:
    """No two caches in one folder, and no cache where its trajectory folders could be the data's own."""
    for other, config in itertools.product(configs, configs):
        fault = f"{path}: datasets.{config.name}.cache_dir: {config.cache_dir}"
        cache_dir = config.cache_dir.resolve()
        if config is not other and other.cache_dir.resolve() == cache_dir:
            raise RefusedError(f"{fault} is also the cache_dir of {other.name}")
        if config is not other and other.cache_dir.resolve().is_relative_to(cache_dir):
            raise RefusedError(f"{fault} holds the cache_dir of {other.name}; give each cache a folder of its own")
        if other.data_folder.resolve().is_relative_to(cache_dir):
            raise RefusedError(f"{fault} holds the data_folder of {other.name}; give the cache a folder of its own")


def spec_differences(recorded: dict[str, Any], spec: CacheSpec) -> list[tuple[str, Any, Any]]:
    """(key, recorded value, new value) of every setting that differs. Weights are compared by digest, not here."""
    old, new = with_defaults(recorded), with_defaults(spec.to_json())
    same = {"weights", "guessed_keys"}
    if "guessed_keys" not in old:  # from before guesses were recorded: taken for what is guessed now
        same.update(key for key in new.get("guessed_keys", ()) if old.get(key) is None)
    return [(key, old.get(key), new.get(key)) for key in new | old if key not in same and old.get(key) != new.get(key)]


# ======================================================================================================================
# Trajectories: poses, and a way to get at frames; what comes after the section on formats knows none
# ======================================================================================================================

POSE_FILES = ("traj_data.pkl", "traj_data.json", "traj_data.npz")  # the first one found is read
OWN_NAMES = (  # of no trajectory
    PROGRESS_FILE, LOG_FILE, RUNS_FILE, LOCK_FILE, LOCK_OWNER_FILE, STAGING_FOLDER, SHARDS_FOLDER,
)  # fmt: skip
CACHE_SIGNS = (PROGRESS_FILE, LOCK_FILE)  # files that, with the staging folder, show a cache of this tool
ZIP_SIGN = b"PK\x03\x04"
MAX_FILE_BYTES = 1 << 29  # a pose or frame file larger than this is refused unread
MAX_VISITS = (
    200  # visits of one folder by links; a few folders that link to each other have more paths than anyone can walk
)


class Trajectory(NamedTuple):
    """Where a trajectory is. A small value that can be sent to another process; `open_source` opens it."""

    name: str  # its path relative to data_folder, with `/`; in lerobot the dataset's, and the episode
    path: Path  # gnm, frames: its folder; recon, video, rosbag: its file; lerobot: the dataset's folder
    lacks_poses: bool = False  # frames and no pose file: not a trajectory, and worth a remark
    format: str = "gnm"
    episode: int = 0  # lerobot: its number
    data_folder: Path | None = None  # video, frames: poses_folder is looked for no higher than there
    old: Any = None  # one that is cut anew: recut.OldChunks, where its tokens are read


class DataKeys(NamedTuple):
    """The settings of a CacheSpec that say which of the data are read, None where the format knows, and how."""

    frame_pattern: str = FRAME_PATTERN
    image_key: str | tuple[tuple[str, str], ...] | None = None  # several cameras: (name, key) of each, sorted
    position_key: str | None = None
    yaw_key: str | None = None
    time_zero: str = "first_frame"
    time_scale: float = 1.0
    position_scale: float = 1.0
    yaw_unit: str = "radians"
    pose_axes: str = "z_up"
    max_pose_gap_s: float = 1.0
    layout: str = "auto"
    pose_file: str | None = None
    pose_columns: Mapping[str, str] | None = None
    pose_match: str = "row"
    poses_folder: str | None = None
    time_offset: float = 0.0
    frame_times: str | None = None
    tf: str | None = None
    stamps: str = "header"
    extra_keys: tuple[str, ...] = ()
    integrate: bool = False

    @classmethod
    def of(cls, settings: dict[str, Any]) -> DataKeys:
        """Those among the settings of a recorded spec, which may be from before some of them."""
        settings = with_defaults(settings)
        keys = cls(**{key: settings[key] for key in cls._fields})
        if isinstance(keys.image_key, dict):
            keys = keys._replace(image_key=tuple(sorted(keys.image_key.items())))
        return keys._replace(extra_keys=tuple(keys.extra_keys))

    @property
    def keys_of_cameras(self) -> dict[str | None, str | None]:
        """Camera name -> its key; {None: image_key} for a single one."""
        return dict(self.image_key) if isinstance(self.image_key, tuple) else {None: self.image_key}


DEFAULT_KEYS = DataKeys()


def data_keys(spec: CacheSpec) -> DataKeys:
    """Those of a spec."""
    return DataKeys.of({key: getattr(spec, key) for key in DataKeys._fields})


def camera_name(name: str, camera: str | None) -> str:
    """A trajectory, and which of its cameras, for messages."""
    return name if camera is None else f"{name}, camera {camera}"


class Note(NamedTuple):
    """What is worth a line about a dataset: what was found in some trajectories, and how it shows in this one."""

    what: str
    detail: str


class Poses(NamedTuple):
    """A trajectory's T frames that can be cached, and where the robot was; None where the data do not say."""

    frame_index: np.ndarray  # (T,) int64, ascending: the numbers by which `FrameReader.read` knows them
    position: np.ndarray | None  # (T, 2) float64 in the ground plane, in the data's unit
    yaw: np.ndarray | None  # (T,) float64 [rad]
    height: np.ndarray | None = None  # (T,) float64, the data's other coordinate; may hold NaN
    times: np.ndarray | None = None  # (T,) float64 [s]
    table: Poses | None = None  # the poses that these were interpolated from
    num_without: int = 0  # frames that are left out because they have no pose
    breaks: np.ndarray | None = None  # (n,) int64, ascending: frames at which the trajectory is cut, for want of poses
    notes: tuple[Note, ...] = ()
    extra: Mapping[str, Any] = {}  # each of extra_keys -> (T, ...) numbers, as `checked_extra` takes them
    task: str | None = None  # what the robot was told to do


class FrameReader(Protocol):
    """Some frames of a trajectory, each to be read once, at least roughly in order. Safe to use from many threads."""

    def name(self, number: int) -> str:
        """A frame, for messages."""

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        """Frames by ascending number: the bytes (N,) uint8 of an image file, or (h, w, 3) uint8 RGB if decoded.

        Raises:
            InputError, OSError: where the frame's turn comes.
        """

    def close(self) -> None:
        """Give back what is open; no frame is wanted any more."""


class Source(Protocol):
    """A trajectory's data, as its format keeps them."""

    def checksum(self, kind: ChecksumKind) -> str:
        """16 hex digits that change when the data do; how closely it looks, `kind` says."""

    def poses(self, *, required: bool) -> Poses:
        """Check everything but the frames' own bytes, and read the poses, of frames that every camera has.

        Raises:
            InputError: something is wrong, or there are no poses and they are required.
        """

    def open_frames(self, numbers: Sequence[int], camera: str | None = None) -> FrameReader:
        """A way to those frames of a camera, ascending, before any is read. A format without `image_key` among its
        settings is not asked for a camera."""


class FrameFile(NamedTuple):
    """A file whose name matches frame_pattern; size is -1 where it is not a regular file."""

    number: int
    file_name: str
    size: int


@dataclass(frozen=True)
class TrajectoryListing:
    """What a trajectory's folder holds, before anything is checked."""

    trajectory: Trajectory
    pose_file: str | None
    frames: list[FrameFile]  # by number
    advice: str | None  # on what is no frame, where it has none


def find_trajectories(data_folder: Path, frame_pattern: str = FRAME_PATTERN) -> Iterator[Trajectory]:
    """Trajectories below `data_folder`, sorted by name. A folder with a pose file is a leaf: nothing below is searched.

    A folder that cannot be listed is yielded as a trajectory, so that it fails with that reason. One with frames but no
    pose file is yielded with `lacks_poses`.

    Raises:
        RefusedError: `data_folder` cannot be listed, is itself a trajectory, or holds a maze of links.
    """
    is_frame = re.compile(frame_pattern).fullmatch
    for folder in walk_folders(data_folder, leaf=POSE_FILES[0]):
        name, pose_file = folder.name.rstrip("/"), _first_pose_file(folder.files)
        if not name and folder.error:
            raise RefusedError(f"data_folder {data_folder}: cannot list it: {folder.error.strerror}") from folder.error
        if not name and pose_file:
            raise RefusedError(
                f"data_folder {data_folder} is itself a trajectory (it holds {pose_file}); data_folder is the folder "
                "above the trajectories"
            )
        if name and (pose_file or folder.error or any(map(is_frame, folder.files))):
            lacks_poses = not pose_file and not folder.error
            yield Trajectory(recordable_name(name), folder.path, lacks_poses=lacks_poses)


def _first_pose_file(names: Collection[str]) -> str | None:
    """The one that is read; its name may be in capitals where there is none in small letters."""
    exact = next((name for name in POSE_FILES if name in names), None)
    others = [name for name in names if name.lower() in POSE_FILES] if exact is None else []
    return exact or min(others, key=lambda name: (POSE_FILES.index(name.lower()), name), default=None)


class FolderFiles(NamedTuple):
    """A folder below data_folder: what comes before the names of its files, '' or 'a/b/', and those, sorted."""

    name: str
    path: Path
    files: list[str]
    error: OSError | None = None  # why it cannot be listed; then it has no files


def walk_folders(data_folder: Path, *, leaf: str | None = None) -> Iterator[FolderFiles]:
    """`data_folder` and all below it, sorted; each before those that it holds. Caches of this tool, lost+found, and
    what is below a gnm trajectory are left out. Links are followed, except back to a folder that holds them. Of a
    folder that holds the file `leaf` only that is yielded, without listing its frames or what is below it.

    Raises:
        RefusedError: links lead to a folder again and again.
    """
    yield from _walk(data_folder, "", os.path.realpath(data_folder), (), Counter(), leaf)


def _walk(
    folder: Path, name: str, real: str, ancestors: tuple[str, ...], visits: Counter[str], leaf: str | None
) -> Iterator[FolderFiles]:
    """`real`: the folder's path without links; `ancestors`: those of the folders that it was come by."""
    if real in ancestors:
        return
    if leaf is not None and os.path.lexists(f"{folder}/{leaf}"):
        yield FolderFiles(name, folder, [leaf])
        return
    try:
        with os.scandir(folder) as entries:
            by_name = {entry.name: entry for entry in entries}
        subfolders = [child for child in sorted(by_name) if child != "lost+found" and _is_folder(by_name[child])]
        is_cache = STAGING_FOLDER in by_name and all(own in by_name and by_name[own].is_file() for own in CACHE_SIGNS)
    except OSError as error:
        yield FolderFiles(name, folder, [], error)
        return
    if is_cache:
        return
    yield FolderFiles(name, folder, sorted(by_name.keys() - set(subfolders)))
    if not subfolders or _first_pose_file(by_name):
        return
    visits[real] += 1
    if visits[real] > MAX_VISITS:
        raise RefusedError(f"{folder}: links lead to this folder in more than {MAX_VISITS} ways; remove some")
    for child in subfolders:
        path = Path(f"{folder}/{child}")
        child_real = os.path.realpath(path) if by_name[child].is_symlink() else f"{real}/{child}"
        yield from _walk(path, f"{name}{child}/", child_real, (*ancestors, real), visits, leaf)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a link to itself
            return False
        if isinstance(error, PermissionError):  # it is taken for one, and fails alone where it is listed
            return True
        raise


def recordable_name(name: str) -> str:
    """The name itself if it is UTF-8; else one that can be printed and recorded, and that check_name refuses."""
    return name if name.isascii() else name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def read_split(path: Path) -> list[str]:
    """Trajectory names of a traj_names.txt: one a line; blank lines and CRLF are tolerated."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a byte order mark is Windows' way to say UTF-8
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"split {path}: cannot read it: {error}") from error
    return [line.strip().rstrip("/") for line in lines if line.strip()]


def check_name(trajectory: Trajectory) -> None:
    """Raise InputError unless the name can be recorded and cannot collide with the cache's own files."""
    try:
        os.fspath(trajectory.path).encode("utf-8")
    except UnicodeEncodeError:
        raise InputError(f"{trajectory.name}: the folder's name is not UTF-8; rename it") from None
    first = trajectory.name.partition("/")[0].casefold()
    if first in OWN_NAMES or first.startswith((PROGRESS_FILE + ".", LOCK_OWNER_FILE + ".", RUNS_FILE + ".")):
        raise InputError(f"{trajectory.name}: {first} is the name of one of the cache's own files; rename the folder")


def list_trajectory(trajectory: Trajectory, frame_pattern: str) -> TrajectoryListing:
    """List pose file and frames, frames in the order of their numbers, never of their text.

    Raises:
        OSError: the folder cannot be listed.
    """
    fullmatch = re.compile(frame_pattern).fullmatch
    frames, names = [], set()
    with os.scandir(trajectory.path) as entries:
        for entry in entries:
            name = entry.name
            names.add(name)
            match = fullmatch(name)
            if match is not None and (number := match[1]) and number.isdecimal():
                frames.append(FrameFile(int(number), name, _regular_size(entry)))
    others, advice = names.difference(POSE_FILES) if not frames else (), None
    if others:
        advice = f"; it holds {recordable_name(min(others))}, for one"
        if is_there(CONFIG_ADVICE_MODULE):
            advice += open_door(CONFIG_ADVICE_MODULE).pattern_advice(others)
    return TrajectoryListing(trajectory, _first_pose_file(names), sorted(frames), advice)


def _regular_size(entry: os.DirEntry[str]) -> int:
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # a broken link
            return -1
        raise
    return status.st_size if stat.S_ISREG(status.st_mode) else -1


def open_regular(path: Path | str) -> int:
    """A descriptor of a regular file, open for reading. Anything else is refused without waiting on it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path}: not a regular file")
    return descriptor


def read_file(path: Path | str) -> np.ndarray:
    """A regular file's bytes, (N,) uint8. Anything else (a pipe, a device) is refused without waiting on it."""
    descriptor = open_regular(path)
    try:
        status = os.fstat(descriptor)
        if status.st_size > MAX_FILE_BYTES:
            raise InputError(f"{path}: {status.st_size} bytes is too large for a frame or a pose file")
        data = np.empty(status.st_size, dtype=np.uint8)
        filled = 0
        while filled < len(data) and (count := os.readv(descriptor, [data[filled:]])):
            filled += count
        return data[:filled]
    finally:
        os.close(descriptor)


def trajectory_checksum(listing: TrajectoryListing, kind: ChecksumKind) -> str:
    """16 hex digits over the pose file's bytes and every frame's name and size (`stat`) or bytes (`content`).

    Frames that frame_stride skips count too. Raises OSError where a file cannot be read.
    """
    digest = hashlib.sha256(kind.encode())
    folder = os.fspath(listing.trajectory.path)
    if listing.pose_file is not None:
        digest.update(listing.pose_file.encode())
        digest.update(read_file(f"{folder}/{listing.pose_file}"))
    names_and_sizes = "".join(f"\n{frame.file_name}\n{frame.size}\n" for frame in listing.frames)
    digest.update(names_and_sizes.encode("utf-8", "surrogateescape"))
    if kind == "content":
        for frame in listing.frames:
            if frame.size >= 0:
                digest.update(read_file(f"{folder}/{frame.file_name}"))
    return digest.hexdigest()[:16]


def check_frames(listing: TrajectoryListing) -> None:
    """Raise InputError unless the frames are regular files numbered 0, 1, 2, ... (or 1, 2, 3, ...) without a gap."""
    name, frames = listing.trajectory.name, listing.frames
    if not frames:
        raise InputError(f"{name}: no frames here whose names match frame_pattern{listing.advice or ''}")
    for frame in frames:
        if frame.size < 0:
            raise InputError(f"{name}/{frame.file_name}: not a regular file")
    first = frames[0].number
    if first > 1:
        raise InvalidDataError(f"{name}: the first frame is {frames[0].file_name}; numbers must begin at 0 or 1")
    for before, frame in zip(frames, frames[1:]):
        if frame.number == before.number:
            raise InvalidDataError(f"{name}: {before.file_name} and {frame.file_name} are both frame {frame.number}")
        if frame.number != before.number + 1:
            raise InvalidDataError(
                f"{name}: frame {before.number + 1} is missing between {before.file_name} and {frame.file_name}"
            )


class _PoseUnpickler(pickle.Unpickler):
    """Admits numpy arrays, numpy scalars and plain containers. Pose files come from strangers: nothing else is even
    looked up, and what numpy's own rebuilding calls are given is checked before they allocate."""

    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data), encoding="latin1")  # of Python 2's texts, which its arrays' bytes are too
        self._text_left = len(data)

    def find_class(self, module: str, name: str) -> _Rebuild:
        module = module.replace("numpy.core", "numpy._core")  # as numpy 1 wrote it
        if (module, name) == ("_codecs", "encode"):
            return _Rebuild(self._encode_latin1)
        if (module, name) not in _PICKLE_GLOBALS:
            raise InputError(
                f"it asks for {module}.{name}; only numpy arrays, numbers and plain containers (dict, list, tuple) are "
                "read: convert it before it is pickled, or write traj_data.npz"
            )
        return _Rebuild(functools.partial(_PICKLE_GLOBALS[module, name], self._bytes_of))

    def _bytes_of(self, data: Any) -> Any:
        """The bytes of an array, which Python 2 wrote as a text."""
        return self._encode_latin1(data, "latin1") if isinstance(data, str) else data

    def _encode_latin1(self, text: str, encoding: str) -> bytes:
        """_codecs.encode as protocols 0 to 2 use it for bytes. Other codecs could inflate or execute; so could one text
        encoded again and again."""
        self._text_left -= len(text)
        if encoding != "latin1" or self._text_left < 0:
            raise InputError(f"it asks for the codec {reprlib.repr(encoding)}, or for more text than it holds")
        return text.encode("latin1")

    def persistent_load(self, pid: Any) -> Any:
        raise InputError("it asks for an object outside the file")


def _unpickle_poses(data: bytes) -> Any:
    """Load a pose pickle, after a look at its opcodes: a memo index far beyond the file would be allocated."""
    if data.startswith(ZIP_SIGN):
        raise InputError("it is a zip archive, as torch.save writes them; expected numpy arrays, by pickle.dump")
    for opcode, argument in _opcodes(data):
        if opcode in ("PUT", "BINPUT", "LONG_BINPUT") and argument > len(data):
            raise InputError(f"memo index {argument} in {len(data)} bytes")
    return _PoseUnpickler(data).load()


def _opcodes(data: bytes) -> Iterator[tuple[str, Any]]:
    """Names and arguments of a pickle's opcodes. As pickletools.genops, which takes texts of Python 2 for ASCII."""
    stream = io.BytesIO(data)
    while code := stream.read(1):
        opcode = pickletools.code2op.get(code.decode("latin1"))
        if opcode is None:
            raise InputError(f"it is no pickle: byte {stream.tell() - 1} is no opcode")
        if opcode.name == "STRING":  # a line in quotes
            yield opcode.name, stream.readline()
        else:
            yield opcode.name, opcode.arg.reader(stream) if opcode.arg else None
        if opcode.name == "STOP":
            return
    raise InputError("it is no whole pickle")


class _Rebuild:
    """A call that a pickle may make. Without attributes, and without the state that a pickle may give to anything it
    names: set on a function, it would change the program and outlive the file."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: Any) -> None:
        raise InputError("it gives a function a state")


class _NumberType:
    """Stands for numpy.dtype in a pickle: a plain number type and its byte order. A real one would take any state that
    the file gives it, object pointers included."""

    def __init__(self, code: Any, *_: Any):
        if not isinstance(code, str) or not re.fullmatch(r"[<>=|]?[a-zA-Z]\d{0,4}", code):
            raise InputError(f"it holds values of type {reprlib.repr(code)}, expected numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray:
    """Stands for an array while a pickle rebuilds it, from the state (version, shape, type, is_fortran, bytes)."""

    values: np.ndarray | None = None

    def __init__(self, bytes_of: Callable[[Any], Any]):
        self._bytes_of = bytes_of

    def __setstate__(self, state: Any) -> None:
        _, shape, number_type, is_fortran, data = state
        self.values = _array_from_buffer(self._bytes_of, data, number_type, shape, "F" if is_fortran else "C")


# What numpy's own calls do, each after the unpickler's way to bytes.


def _empty_array(bytes_of: Callable[[Any], Any], array_type: Any, shape: Any, typecode: Any) -> _PickledArray:
    """numpy's _reconstruct: the array that __setstate__ fills. A shape given here would be allocated; none is."""
    return _PickledArray(bytes_of)


def _array_from_buffer(
    bytes_of: Callable[[Any], Any], buffer: Any, number_type: Any, shape: Any, order: str, *_: Any
) -> np.ndarray:
    """numpy's _frombuffer (protocol 5)."""
    if not isinstance(number_type, _NumberType) or not isinstance(shape, tuple):
        raise InputError("it holds an array without a number type and a shape")
    if number_type.dtype.kind not in "iufb":
        return np.empty(0, number_type.dtype)  # refused by its type, once it is known what it is for
    if not all(type(size) is int and size >= 0 for size in shape):
        raise InputError(f"it holds an array of shape {reprlib.repr(shape)}")
    return np.frombuffer(bytes_of(buffer), number_type.dtype).reshape(shape, order="F" if order == "F" else "C")


def _number_type(bytes_of: Callable[[Any], Any], *arguments: Any) -> _NumberType:
    """numpy's dtype."""
    return _NumberType(*arguments)


def _scalar(bytes_of: Callable[[Any], Any], number_type: Any, data: Any) -> Any:
    """numpy's scalar."""
    return _array_from_buffer(bytes_of, data, number_type, (1,), "C")[0]


def _array_type(*_: Any) -> Any:
    """numpy.ndarray: named as an argument of _reconstruct, never called."""
    raise InputError("it makes an array of its own")


_PICKLE_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _array_type,
    ("numpy", "dtype"): _number_type,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): _array_from_buffer,
}


def _parse_pose_file(file_name: str, data: bytes, wanted: Collection[str]) -> Any:
    """What a pose file holds. Of a .npz file only the arrays wanted are read; the others are None."""
    suffix = os.path.splitext(file_name)[1].lower()
    if suffix == ".pkl":
        return _unpickle_poses(data)
    if suffix == ".json":
        return json.loads(data)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = archive.infolist()
        if (unpacked := sum(member.file_size for member in members)) > MAX_FILE_BYTES:
            raise InputError(f"unpacks to {unpacked} bytes")
        for member in members:
            with archive.open(member) as file:
                check_claim(file, member.file_size)
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return {key: arrays[key] if key in wanted else None for key in arrays.files}


def check_claim(file: IO[bytes], size: int) -> None:
    """Raise InputError where the head of a .npy file claims an array that its `size` [bytes] cannot hold: numpy would
    allocate it first."""
    try:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, number_type = read_header(file)
    except ValueError:  # no .npy file, or an odd one: refused where it is read
        return
    if math.prod(shape) * number_type.itemsize > size:
        raise InputError(f"it claims an array of shape {reprlib.repr(shape)} in {size} bytes")


def read_poses(path: Path, name: str, keys: DataKeys = DEFAULT_KEYS) -> Poses:
    """Poses of a trajectory, from traj_data.pkl, .json or .npz.

    Args:
        path: the pose file, a mapping with `position` (T, 2 or more), `yaw` (T,) or (T, 1), and the keys' extra_keys.
        name: the trajectory's, for messages.

    Raises:
        InputError: the file cannot be parsed, a key is missing, a shape is wrong or a value is not finite.
        OSError: the file cannot be read.
    """
    where = f"{name}/{path.name}"
    try:
        wanted = ("position", "yaw", *keys.extra_keys)
        poses = _parse_pose_file(path.name, read_file(path).tobytes(), wanted)
    except OSError:
        raise
    except MemoryError as error:
        raise FENCE.memory_fault(where, error) from error
    except Exception as error:  # hostile bytes can raise anything; whatever it is, this file is not poses
        raise InputError(f"{where}: cannot read poses: {str(error) or type(error).__name__}") from error
    if isinstance(poses, dict):
        poses = {key: _rebuilt(value) for key, value in poses.items() if isinstance(key, str)}
    else:
        raise InputError(f"{where}: holds a {type(poses).__name__}, expected a mapping with position and yaw")
    checked = checked_poses(where, poses, keys, "position", "yaw")
    return checked._replace(extra=columns_asked_for(where, poses, keys.extra_keys))


class Axes(NamedTuple):
    """How a source's coordinates lie. Seen from above, the plane's second axis is 90 degrees to the left of its first;
    yaw 0 is along the first and rises to the left."""

    columns: tuple[int, int]  # those of the ground plane
    signs: tuple[float, float]
    height: int  # the third
    yaw_sign: float  # yaw is the right-hand turn about the vertical coordinate: to the right where that points down
    forward: int  # of the body's axes, by which quaternions tell the yaw
    compass: float  # yaw of the compass heading 0 [rad]: where north is


AXES = {
    "z_up": Axes((0, 1), (1.0, 1.0), 2, 1.0, 0, math.pi / 2),  # x forward or east, y left or north: ROS, ENU
    "ned": Axes((0, 1), (1.0, -1.0), 2, -1.0, 0, 0.0),  # x north, y east, z down: drones
    "y_up": Axes((2, 0), (-1.0, -1.0), 1, 1.0, 2, 0.0),  # x right, y up, z backward: ARKit, OpenGL
    "camera": Axes((2, 0), (1.0, -1.0), 1, -1.0, 2, 0.0),  # x right, y down, z forward: SLAM, OpenCV
}


def checked_poses(
    where: str, poses: dict[str, Any], keys: DataKeys, position_key: str | None, yaw_key: str | None
) -> Poses:
    """What a source has under these keys, in the ground plane and radians, as the settings among `keys` say.

    Raises:
        InputError: a key is missing, a shape is wrong, a value is not finite, or a name tells of another unit.
    """
    position = height = yaw = None
    count = 0
    if position_key is not None:
        refuse_other_unit(where, position_key, "position_scale", keys)
        points = _pose_array(where, poses, position_key)
        count = len(points)
        position, height = ground_plane(where, position_key, points, keys.pose_axes)
    if yaw_key is not None:
        refuse_other_unit(where, yaw_key, "yaw_unit", keys)
        count = count if position_key is not None else len(_pose_array(where, poses, yaw_key))
        yaw = yaw_in_radians(checked_numbers(where, poses, yaw_key, count), keys)
    return Poses(np.arange(count, dtype=np.int64), position, yaw, height)


def ground_plane(where: str, key: str, points: np.ndarray, pose_axes: str) -> tuple[np.ndarray, np.ndarray | None]:
    """(T, 2) float64: of points (T, 2 or more) the ground plane's two coordinates; and (T,) the other, where there is
    one. Raises InvalidDataError."""
    axes = AXES[pose_axes]
    needed = max(axes.columns) + 1
    if points.ndim != 2 or points.shape[1] < needed:
        which = "" if needed == 2 else f", as pose_axes: {pose_axes} has it"
        raise InvalidDataError(f"{where}: {key} is {points.shape}, expected (T, {needed}){which}")
    check_values(where, key, points[:, :needed], MAX_POSITION_M)
    position = np.ascontiguousarray(points[:, axes.columns]) * axes.signs
    return position, points[:, axes.height] if points.shape[1] > axes.height else None


def yaw_in_radians(yaw: np.ndarray, keys: DataKeys) -> np.ndarray:
    """(T,) [rad], counter-clockwise seen from above, 0 along the ground plane's first axis."""
    axes = AXES[keys.pose_axes]
    if keys.yaw_unit == "compass_degrees":  # clockwise from north
        return axes.compass - np.deg2rad(yaw)
    return axes.yaw_sign * (np.deg2rad(yaw) if keys.yaw_unit == "degrees" else yaw)


NAMED_UNITS = {  # a unit at the end of a name -> the setting that it asks for, and the values that fit it
    **dict.fromkeys(("deg", "degs", "degree", "degrees", "\u00b0"), ("yaw_unit", ("degrees", "compass_degrees"))),
    **dict.fromkeys(("rad", "rads", "radian", "radians"), ("yaw_unit", ("radians",))),
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), ("position_scale", (1.0,))),
    "cm": ("position_scale", (0.01,)), "mm": ("position_scale", (0.001,)), "km": ("position_scale", (1000.0,)),
    **dict.fromkeys(("s", "sec", "secs", "seconds"), ("time_scale", (1.0,))),
    "ms": ("time_scale", (0.001,)), "us": ("time_scale", (1e-6,)), "ns": ("time_scale", (1e-9,)),
}  # fmt: skip
_UNIT_OF_NAME = re.compile(rf"(.+?)(?:[\s_.-]*[\[(]|[\s_.-]+|(?=\u00b0))({'|'.join(NAMED_UNITS)})[\])]?", re.IGNORECASE)


def unit_of_name(name: str) -> tuple[str, str | None]:
    """A name without the unit at its end, and that unit: yaw_deg, `x [cm]`, `heading (degrees)`."""
    match = _UNIT_OF_NAME.fullmatch(name.strip())
    return (match[1], match[2].lower()) if match else (name.strip(), None)


def refuse_other_unit(where: str, key: str, setting: str, keys: DataKeys) -> None:
    """Raise InputError where a name tells of another unit than `setting` does. A scale that somebody set is meant."""
    _, unit = unit_of_name(key)
    of_setting, fitting = NAMED_UNITS.get(unit, (None, ()))
    value = getattr(keys, setting)
    if of_setting == setting and value not in fitting and (isinstance(value, str) or value == 1.0):
        ways = " or ".join(map(str, fitting))
        raise InputError(f"{where}: {key} is in {unit} by its name, and {setting} is {value}; set {setting}: {ways}")


def checked_numbers(where: str, poses: dict[str, Any], key: str, count: int) -> np.ndarray:
    """(count,) float64 of what a source has under `key`. Raises InvalidDataError."""
    values = _pose_array(where, poses, key)
    if values.shape not in ((count,), (count, 1)):
        raise InvalidDataError(f"{where}: {key} is {values.shape}, expected ({count},), one for each position")
    values = values.reshape(-1)
    check_values(where, key, values, math.inf)
    return values


def columns_asked_for(where: str, columns: Mapping[str, Any], extra_keys: Sequence[str]) -> dict[str, Any]:
    """Those of a source's columns that extra_keys names. Raises InvalidDataError, naming those that there are."""
    if missing := [key for key in extra_keys if key not in columns]:
        raise InvalidDataError(
            f"{where}: has no {', '.join(missing)}, which extra_keys names; its keys are "
            f"{', '.join(map(str, columns))[:500] or '(none)'}"
        )
    return {key: columns[key] for key in extra_keys}


def checked_extra(where: str, key: str, values: Any, count: int) -> np.ndarray:
    """(count, ...) bool, whole or real numbers of a column that comes along, of its own type in this machine's byte
    order; NaN is data. Raises InvalidDataError."""
    try:
        column = np.asarray(_plain_rows(values))
    except (ValueError, OverflowError) as error:
        raise InvalidDataError(f"{where}: {key}: {error}") from error
    if column.dtype.kind not in "biuf" or column.dtype.itemsize > 8:
        raise InvalidDataError(f"{where}: {key} holds {column.dtype} values; extra_keys names columns of numbers")
    if column.ndim == 0 or len(column) != count or column.size == 0:
        raise InvalidDataError(f"{where}: {key} is {column.shape}, expected ({count}, ...), a row for each frame")
    if column.size > MAX_POSE_NUMBERS:
        raise InvalidDataError(f"{where}: {key} is {column.shape}: more than {MAX_POSE_NUMBERS} numbers")
    return column.astype(np.dtype(column.dtype.str).newbyteorder("="), copy=False)  # without h5py's mark of an enum


def check_values(where: str, key: str, values: np.ndarray, most: float) -> None:
    """Raise InvalidDataError, naming the first, where a value is not finite or its size exceeds `most`."""
    bad = np.argwhere(~(np.isfinite(values) & (np.abs(values) <= most)))
    if len(bad):
        row = tuple(bad[0])
        allowed = f"; expected metres, at most {most:.0e}" if np.isfinite(values[row]) else ""
        raise InvalidDataError(f"{where}: {key}{list(map(int, row))} is {values[row]}{allowed}")


def _rebuilt(values: Any) -> Any:
    """Arrays in place of what stood for them while a pickle was read, also as rows of a list."""
    if isinstance(values, _PickledArray):
        return np.empty(0) if values.values is None else values.values
    if isinstance(values, list | tuple) and any(isinstance(row, _PickledArray) for row in values):
        return [_rebuilt(row) if isinstance(row, _PickledArray) else row for row in values]
    return values


def _pose_array(where: str, poses: dict[str, Any], key: str) -> np.ndarray:
    if key not in poses:
        near = next((name for name in map(str, poses) if unit_of_name(name)[0] == key), None)
        hint = f"; call {near} {key}, and set its unit in the config (yaw_unit, position_scale)" if near else ""
        raise InvalidDataError(f"{where}: has no {key}; its keys are {', '.join(map(str, poses))[:200]}{hint}")
    try:
        values = np.asarray(_plain_rows(poses[key]))
    except (ValueError, OverflowError) as error:  # rows of unequal length, numbers too large
        raise InvalidDataError(f"{where}: {key}: {error}") from error
    if values.dtype.kind not in "iuf":
        raise InvalidDataError(f"{where}: {key} holds {values.dtype} values, expected numbers")
    if not 0 < values.size <= MAX_POSE_NUMBERS:
        raise InvalidDataError(f"{where}: {key} is {values.shape}: holds {'too many' if values.size else 'no'} poses")
    return values.astype(np.float64)


def _plain_rows(values: Any) -> Any:
    """The values themselves, unless they are what numpy would blow up: ten names for one list of ten names for one list
    ... or for one long text or array take few bytes in a file."""
    if not isinstance(values, list | tuple):
        return values
    rows = [row if isinstance(row, list | tuple | np.ndarray) else (row,) for row in values]
    count = sum(row.size if isinstance(row, np.ndarray) else len(row) for row in rows)
    if count > MAX_POSE_NUMBERS:
        raise ValueError(f"holds {count} numbers")
    for row in rows:
        if isinstance(row, np.ndarray):
            if row.ndim > 1:
                raise ValueError("is nested deeper than a list of rows")
        elif not_numbers := {type(number) for number in row if not isinstance(number, int | float | np.number)}:
            raise ValueError(f"holds a {not_numbers.pop().__name__}; expected rows of numbers")
    return values


class FileFrames:
    """A FrameReader of frames that are files of their own: where each lies, and its name for messages, by number."""

    def __init__(self, path_of: Callable[[int], str], name_of: Callable[[int], str]):
        self._path_of, self.name = path_of, name_of

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        return map_files(self._read_frame, numbers, measured=2, together=1)

    def _read_frame(self, number: int) -> np.ndarray:
        try:
            with PROFILE("read"):
                return read_file(self._path_of(number))
        except MemoryError as error:
            raise FENCE.memory_fault(self.name(number), error) from error

    def close(self) -> None:
        """Nothing stays open."""


class FolderSource:
    """gnm: a folder with a pose file and numbered frames."""

    def __init__(self, trajectory: Trajectory, keys: DataKeys):
        self._name, self._folder = trajectory.name, trajectory.path
        self._listing, self._keys = list_trajectory(trajectory, keys.frame_pattern), keys

    def checksum(self, kind: ChecksumKind) -> str:
        return trajectory_checksum(self._listing, kind)

    def poses(self, *, required: bool) -> Poses:
        """Position (T, 2), in the data's unit, and yaw (T,) [rad] from the pose file, one for each frame of the folder.

        Raises:
            InputError: a frame number is missing or double; poses are missing, unreadable or not as many as frames.
            OSError: the pose file cannot be read.
        """
        pose_file, frames = self._listing.pose_file, self._listing.frames
        if pose_file is None and required:
            raise InvalidDataError(f"{self._name}: no pose file; expected one of {', '.join(POSE_FILES)}")
        check_frames(self._listing)
        numbers = np.arange(len(frames), dtype=np.int64)
        if pose_file is None:
            return Poses(numbers, None, None, extra=columns_asked_for(self._name, {}, self._keys.extra_keys))
        poses = read_poses(self._folder / pose_file, self._name, self._keys)
        if len(poses.position) != len(frames):
            raise InvalidDataError(
                f"{self._name}: {len(frames)} frames ({frames[0].file_name} ... {frames[-1].file_name}) "
                f"but {len(poses.position)} poses in {pose_file}"
            )
        return poses

    def open_frames(self, numbers: Sequence[int]) -> FrameReader:
        frames = self._listing.frames
        return FileFrames(
            path_of=lambda number: f"{self._folder}/{frames[number].file_name}",
            name_of=lambda number: f"{self._name}/{recordable_name(frames[number].file_name)}",
        )


# ======================================================================================================================
# Formats: which one a folder holds, and what there is to each
# ======================================================================================================================

FOLDERS_LOOKED_INTO = 8  # folders that are looked at even where the first one shows a format: there may be another one
KEY_SETTINGS = ("image_key", "position_key", "yaw_key")
POSE_SETTINGS = ("position_scale", "yaw_unit", "pose_axes")  # those of DataKeys that apply to every format


class Format(NamedTuple):
    """What the program has to know of a format. A format's module ends with FORMAT = Format(...)."""

    find: Callable[[Path, CacheSpec], Iterator[Trajectory]]
    locate: Callable[[Path, str], Trajectory]  # one of a known name, without a search; InputError where there is none
    open: Callable[[Trajectory, DataKeys], Source]
    settings: tuple[str, ...]  # those of DataKeys that apply
    trajectory: str  # what is one, for messages
    signs: Callable[[FolderFiles, bool], Iterable[str]]  # files that show this format; is it data_folder itself?
    hints: Callable[[FolderFiles, DataKeys], Iterable[str]] = lambda folder, keys: ()  # where nothing else shows one
    pairing: int = 1  # the rule by which frames are read and poses found for them; recorded, except the first
    # Why a trajectory of that spec, made by the rule before, is to be redone; None where both come to the same.
    mispaired: Callable[[Source, CacheSpec], str | None] = lambda source, spec: None
    guess: Callable[[Path, CacheSpec], dict[str, str | None]] = lambda data_folder, spec: {}  # KEY_SETTINGS as read now
    # How frames can be read: each from a file of its own; in any order from one; or in one pass, by who began it.
    frames: Literal["files", "rows", "stream"] = "stream"


def _gnm_signs(folder: FolderFiles, is_top: bool) -> list[str]:
    return [file for file in [_first_pose_file(folder.files)] if file]


def _gnm_hints(folder: FolderFiles, keys: DataKeys) -> Iterator[str]:
    is_set_otherwise = keys.poses_folder or keys.pose_file or keys.layout != "auto"  # these say where poses are
    return filter(re.compile(keys.frame_pattern).fullmatch, () if is_set_otherwise else folder.files)


GNM = Format(
    find=lambda data_folder, spec: find_trajectories(data_folder, spec.frame_pattern),
    locate=lambda data_folder, name: Trajectory(name, data_folder / name),
    open=FolderSource,
    settings=("frame_pattern", "extra_keys"),
    trajectory=f"a folder with one of {', '.join(POSE_FILES)} and its frames",
    signs=_gnm_signs,
    hints=_gnm_hints,
    frames="files",
)


def format_names() -> list[str]:
    """Formats that can be read here: gnm, and those of FORMAT_MODULES whose module is there."""
    return ["gnm", *(name for name, module in FORMAT_MODULES.items() if is_there(module))]


def format_named(name: str) -> Format:
    """A format. Raises RefusedError where its module is not there."""
    return GNM if name == "gnm" else open_door(FORMAT_MODULES[name]).FORMAT


class FoundFormat(NamedTuple):
    """What a folder is taken for, and by which sign."""

    name: str
    sign: str


def detect_format(data_folder: Path, keys: DataKeys) -> FoundFormat:
    """The format of what lies in `data_folder`: by a look at the first folders, and at more until there is a sign.

    Raises:
        RefusedError: nothing shows one, or it could be two.
    """
    formats = {name: format_named(name) for name in format_names()}
    signs: dict[str, str] = {}
    hint = None  # frames without poses show a format only where nothing else does
    listed = (folder for folder in walk_folders(data_folder) if not folder.error)
    for count, folder in enumerate(listed, 1):
        for name, kind in formats.items():
            if sign := next(iter(kind.signs(folder, count == 1)), None):
                signs.setdefault(name, recordable_name(folder.name + sign))
            if hint is None and (file := next(iter(kind.hints(folder, keys)), None)):
                hint = FoundFormat(name, recordable_name(folder.name + file))
        if signs and count >= FOLDERS_LOOKED_INTO:
            break
    if not signs and hint:
        return hint
    if len(signs) == 1:
        return FoundFormat(*next(iter(signs.items())))
    if signs:
        what = " and ".join(f"{name} ({sign})" for name, sign in signs.items())
        raise RefusedError(f"{data_folder}: looks like {what}; set format: under the dataset, or separate them")
    kinds = "; ".join(f"{name}: {kind.trajectory}" for name, kind in formats.items())
    absent = "" if len(formats) > len(FORMAT_MODULES) else "; other formats need the folder dino_cache_extras"
    raise RefusedError(f"{data_folder}: no trajectories below it; looked for {kinds}{absent}. Is the disk mounted?")


def open_source(trajectory: Trajectory, keys: DataKeys) -> Source:
    """A trajectory's data.

    Raises:
        InputError, OSError: they cannot be had.
    """
    kind = format_named(trajectory.format)
    if isinstance(keys.image_key, tuple) and "image_key" not in kind.settings:
        raise InputError(f"{trajectory.name}: image_key: format {trajectory.format} has one camera, which has no key")
    return kind.open(trajectory, keys)


def open_camera(source: Source, numbers: Sequence[int], camera: str | None) -> FrameReader:
    """A way to those frames of a camera; a format that has but one need not know of any."""
    return source.open_frames(numbers) if camera is None else source.open_frames(numbers, camera)


# ======================================================================================================================
# Chunk plan: which frames go into which chunk
# ======================================================================================================================


class Span(NamedTuple):
    """Frames [start, stop), half-open, in kept frames (after striding)."""

    start: int
    stop: int


def travelled_distance(position: np.ndarray) -> np.ndarray:
    """Distance along the path from frame 0, over the first two coordinates.

    Args:
        position: (T, 2) [m].

    Returns:
        (T,) float64 [m], from 0, non-decreasing; pose jumps are included.
    """
    steps = np.linalg.norm(np.diff(position[:, :2], axis=0), axis=1)
    return np.concatenate([[0.0], np.cumsum(steps)])


def plan_chunks(
    travelled: np.ndarray, max_m: float, overlap_m: float, min_m: float, breaks: Sequence[int] = ()
) -> list[Span]:
    """Cut a trajectory into chunks by travelled distance. O(T).

    With s = travelled: a step longer than `max_m` is a pose jump and separates pieces, without overlap; so does a
    break, the first frame of a new piece. A piece that travels less than `min_m` is left out. Within a piece a chunk
    from frame a ends at the last frame b with s[b] - s[a] <= max_m, or at the piece's end where less than `min_m`
    remains after b. The next one starts at the last a' > a with s[b] - s[a'] >= overlap_m (at b where there is none),
    moved on to the first frame from which it reaches past b. So the chunks are in order, none lies inside another, they
    cover every frame of every stored piece, and only a piece's last chunk may exceed `max_m`, by less than `min_m`.

    Args:
        travelled: (T,) [m], as from `travelled_distance`.
        max_m, overlap_m, min_m: 0 <= overlap_m < max_m and 0 <= min_m <= max_m.
    """
    s = travelled.tolist()
    jumps = piece_starts(travelled, max_m, breaks)
    spans: list[Span] = []
    for first, end in zip([0, *jumps], [*jumps, len(s)]):
        if s[end - 1] - s[first] >= min_m:
            spans += _plan_piece(s, first, end - 1, max_m, overlap_m, min_m)
    return spans


def piece_starts(travelled: np.ndarray, max_m: float, breaks: Sequence[int] = ()) -> list[int]:
    """The first frame of every piece but the first, ascending: after each step longer than `max_m`, and each break."""
    return sorted({*(np.flatnonzero(np.diff(travelled) > max_m) + 1).tolist(), *breaks})


def _plan_piece(s: list[float], first: int, last: int, max_m: float, overlap_m: float, min_m: float) -> Iterator[Span]:
    """Chunks of the frames first..last (inclusive), whose steps are at most max_m. Indices only move forward: O(T)."""
    a = b = first
    while True:
        while b < last and s[b + 1] - s[a] <= max_m:
            b += 1
        if s[last] - s[b] < min_m:
            b = last
        yield Span(a, b + 1)
        if b == last:
            return
        following = a
        while following < b and s[b] - s[following + 1] >= overlap_m:
            following += 1
        if following == a:
            following = b
        while s[b + 1] - s[following] > max_m:  # the step after b is at most max_m, so this ends at b
            following += 1
        a = following


def plan_frame_chunks(count: int, max_frames: int, overlap: int, breaks: Sequence[int] = ()) -> list[Span]:
    """Cut `count` frames into chunks of at most `max_frames`, neighbours sharing `overlap`, which must be less, but
    nothing across a break, the first frame of a new piece."""
    spans: list[Span] = []
    for first, end in zip([0, *breaks], [*breaks, count]):
        starts = range(first, max(first + 1, end - overlap), max_frames - overlap)
        spans += [Span(start, min(start + max_frames, end)) for start in starts]
    return spans


def to_next_frame(position: np.ndarray, yaw: np.ndarray, starts: Sequence[int]) -> np.ndarray:
    """Where the next frame is, seen from each frame.

    Args:
        position, yaw: (T, 2) [m], (T,) [rad].
        starts: first frames of pieces; from the frame before each there is no way on, nor from the last one.

    Returns:
        (T, 3) float64: dx [m] to where the frame's own yaw points, dy [m] to the left of that, and by how much the yaw
        turns [rad], from -pi to pi. NaN where there is no next frame.
    """
    cos, sin = np.cos(yaw), np.sin(yaw)
    dx, dy = np.diff(position, axis=0).T
    to_next = np.full((len(yaw), 3), np.nan)
    to_next[:-1, 0] = cos[:-1] * dx + sin[:-1] * dy
    to_next[:-1, 1] = cos[:-1] * dy - sin[:-1] * dx
    turned = (sin[1:] * cos[:-1] - cos[1:] * sin[:-1], cos[1:] * cos[:-1] + sin[1:] * sin[:-1])  # sin, cos of it
    to_next[:-1, 2] = np.arctan2(*turned)
    to_next[np.array(starts, np.int64) - 1] = np.nan
    return to_next


def sampled_rows(times: np.ndarray, sample_hz: float) -> np.ndarray:
    """(n,) int64 rows of the first frame in each period of 1 / sample_hz, counted from the first frame.

    Args:
        times: (T,) [s], rising.
    """
    periods = np.floor((times - times[0]) * sample_hz + 1e-6)  # a frame due at a period's begin is in it, if rounded
    return np.flatnonzero(np.diff(periods, prepend=-1.0) > 0)


def kept_rows(name: str, poses: Poses, spec: CacheSpec) -> np.ndarray:
    """(n,) int64 rows of the frames that are kept: by time, then every `frame_stride`th. Raises InvalidDataError."""
    rows = np.arange(len(poses.frame_index))
    if spec.sample_hz is not None:
        if poses.times is None:
            raise InvalidDataError(f"{name}: sample_hz: {spec.sample_hz} needs times of frames, and there are none")
        rows = sampled_rows(poses.times, spec.sample_hz)
    return rows[:: spec.frame_stride]


@dataclass(frozen=True)
class TrajectoryPlan:
    """A trajectory that passed every check, and how it is cut. T kept frames, after striding."""

    trajectory: Trajectory
    checksum: str
    checksum_kind: ChecksumKind
    stat_checksum: str  # by which those who open the trajectory again see that it is the same
    frame_index: np.ndarray  # (T,) int64, row of the source's pose arrays
    position: np.ndarray | None  # (T, 2) float64 [m]
    yaw: np.ndarray | None  # (T,) float64 [rad]
    travelled: np.ndarray | None  # (T,) float64 [m]; None where chunks are cut by number of frames
    spans: list[Span]
    notes: tuple[Note, ...] = ()
    read: Poses | None = None  # as the source gave them, every frame
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # dataset name -> (T, ...): what comes along
    task: str | None = None
    partial: Partial | None = None  # its first chunks, of an interrupted run; frames are wanted from the next one on
    old: Any = None  # one that is cut anew: recut.OldRows, where the tokens of its kept frames lie

    @property
    def datasets(self) -> dict[str, np.ndarray]:
        """Dataset name -> (T, ...): those of POSE_SHAPES that the data hold, and what comes along."""
        poses = {
            "position": self.position,
            "yaw": self.yaw,
            "frame_index": self.frame_index,
            "travelled_distance": self.travelled,
        }
        return {**{name: values for name, values in poses.items() if values is not None}, **self.columns}

    @functools.cached_property
    def stored_rows(self) -> np.ndarray:
        """(n,) int64: kept frames that lie in a chunk that is not there yet, each once, in order."""
        spans = self.spans[len(self.partial.chunks) if self.partial else 0 :]
        done = [0, *(span.stop for span in spans)]
        return np.concatenate([np.arange(max(span.start, begin), span.stop) for begin, span in zip(done, spans)])

    @functools.cached_property
    def rows_to_encode(self) -> np.ndarray:
        """(n,) int64: those of them whose tokens are not in an old chunk."""
        return self.stored_rows if self.old is None else self.stored_rows[self.old.chunk[self.stored_rows] < 0]

    @property
    def numbers_to_encode(self) -> list[int]:
        """Their numbers, by which the source knows them."""
        return self.frame_index[self.rows_to_encode].tolist()

    def left_out(self) -> list[Span]:
        """Kept frames that lie in no chunk: pieces between pose jumps that travel too little."""
        starts = [0, *(span.stop for span in self.spans)]
        stops = [*(span.start for span in self.spans), len(self.frame_index)]
        return [Span(start, stop) for start, stop in zip(starts, stops) if start < stop]

    @property
    def num_rows(self) -> int:
        """Rows of all chunks together; frames in an overlap count once a chunk."""
        return sum(span.stop - span.start for span in self.spans)


def plan_trajectory(
    trajectory: Trajectory, source: Source, checksum: str, checksum_kind: ChecksumKind, spec: CacheSpec
) -> TrajectoryPlan:
    """Check a trajectory and cut it.

    Raises:
        InputError: name, frames or poses break a rule, they do not match each other, or it moves too little.
        OSError: the poses cannot be read.
    """
    check_name(trajectory)
    by_distance = spec.chunk_by == "distance"
    poses = source.poses(required=by_distance)
    kept = kept_rows(trajectory.name, poses, spec)
    frame_index = poses.frame_index[kept]
    position = None if poses.position is None else poses.position[kept] * spec.position_scale
    breaks = [] if poses.breaks is None else sorted(set(np.searchsorted(kept, poses.breaks).tolist()) - {0, len(kept)})
    yaw = None if poses.yaw is None else turned(poses.yaw[kept], spec.yaw_offset)
    columns = columns_that_come_along(trajectory.name, poses, kept, spec)
    if by_distance:
        travelled = travelled_distance(position)
        distances = spec.max_chunk_distance_m, spec.overlap_distance_m, spec.min_chunk_distance_m
        spans = plan_chunks(travelled, *distances, breaks)
        breaks = piece_starts(travelled, spec.max_chunk_distance_m, breaks)
    else:
        travelled, spans = None, plan_frame_chunks(len(frame_index), spec.max_chunk_frames, spec.overlap_frames, breaks)
    if not spans:
        raise InvalidDataError(f"{trajectory.name}: insufficient movement: {_why_nothing_is_stored(travelled, spec)}")
    if position is not None and yaw is not None:
        columns["delta"] = to_next_frame(position, yaw, breaks)
    return TrajectoryPlan(
        trajectory=trajectory,
        checksum=checksum,
        checksum_kind=checksum_kind,
        stat_checksum=checksum if checksum_kind == "stat" else source.checksum("stat"),
        frame_index=frame_index,
        position=position,
        yaw=yaw,
        travelled=travelled,
        spans=spans,
        notes=poses.notes,
        read=poses,
        columns=columns,
        task=None if poses.task is None else storable_text(poses.task),
    )


def columns_that_come_along(name: str, poses: Poses, kept: np.ndarray, spec: CacheSpec) -> dict[str, np.ndarray]:
    """Dataset name -> (T, ...) of kept frames: their times [s] from the trajectory's first frame, where the data have
    times, and the columns that extra_keys names. Raises InvalidDataError."""
    columns = {} if poses.times is None else {"timestamp": poses.times[kept] - poses.times[0]}
    for key, values in columns_asked_for(name, poses.extra, spec.extra_keys).items():
        columns[extra_dataset(key)] = checked_extra(name, key, values, len(poses.frame_index))[kept]
    return columns


def storable_text(text: str) -> str:
    """The text as an attribute can hold it: its first MAX_TEXT characters, those that HDF5 cannot store replaced."""
    return text[:MAX_TEXT].replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def turned(yaw: np.ndarray, offset: float) -> np.ndarray:
    """(T,) [rad], from -pi to pi: the yaw, and so much more; as it is where that is nothing."""
    return yaw if offset == 0 else np.arctan2(np.sin(yaw + offset), np.cos(yaw + offset))


def _why_nothing_is_stored(travelled: np.ndarray, spec: CacheSpec) -> str:
    steps, least = np.diff(travelled), f"less than min_chunk_distance_m {spec.min_chunk_distance_m}"
    jumps = steps[steps > spec.max_chunk_distance_m]
    if not len(jumps):
        return f"{travelled[-1]:.3g} m in all, {least}"
    starts = np.flatnonzero(np.concatenate([[True], steps > spec.max_chunk_distance_m, [True]]))
    longest = (travelled[starts[1:] - 1] - travelled[starts[:-1]]).max()
    return (
        f"{len(jumps)} steps are longer than max_chunk_distance_m {spec.max_chunk_distance_m} and count as pose jumps "
        f"({np.median(jumps):.3g} m at the median); the longest piece between them travels {longest:.3g} m, {least}. "
        "Where positions are not in metres, set position_scale"
    )


# ======================================================================================================================
# Decoding: a file to an RGB frame of the input size
# ======================================================================================================================

MAX_SCANNED_PIXELS = 2_000_000_000  # of all scans of a progressive JPEG, which take some 2 ns each; more are refused
RGB_MODE = 3  # torchvision.io.ImageReadMode.RGB
MIN_SCAN_BYTES = 8  # that a scan takes in a file, at least
MAX_SCALED_PIXELS = 64  # a frame scaled to cover the input may have so many times the input's pixels; 1x9000 px fails


def open_jpeg_decoder() -> Callable[[torch.Tensor, int, bool], torch.Tensor]:
    """torchvision's decoder: bytes (N,) uint8, a mode, whether to turn it as EXIF says -> (3, h, w) uint8. Its library
    alone is loaded, in 2 ms: the package imports torch's compiler with it, which takes as long as torch itself."""
    import torch

    package = importlib.util.find_spec("torchvision")
    libraries = sorted(Path(package.origin).parent.glob("image*.so")) if package and package.origin else []
    if libraries:
        torch.ops.load_library(str(libraries[0]))
    else:
        open_library("torchvision.io")
    return torch.ops.image.decode_jpeg


class FrameDecoder:
    """Turns a frame file's bytes into (3, H, W) uint8 RGB at the input size. Safe to call from many threads.

    JPEG is decoded by torchvision, which is fast and lets other threads run; the rest by Pillow, since torchvision's
    PNG decoder brings the process down on a damaged file. uint8 all the way: resizing float tensors is 8 times slower
    and overshoots; without antialias features are ruined.
    """

    IMAGE_TYPES = ("JPEG", "PNG", "WEBP", "BMP")

    def __init__(self, spec: CacheSpec):
        import PIL.Image
        import PIL.ImageOps
        import torch

        self._torch, self._decode_jpeg = torch, open_jpeg_decoder()
        self._open_picture = functools.partial(PIL.Image.open, formats=self.IMAGE_TYPES)
        self._transpose = PIL.ImageOps.exif_transpose
        self._resize = functools.partial(
            torch.nn.functional.interpolate, mode="bicubic", align_corners=False, antialias=True
        )
        self._height, self._width = spec.image_size
        self._crops = spec.resize == "crop"

    def __call__(self, data: np.ndarray, name: str) -> torch.Tensor:
        """Decode one frame from a file's bytes (N,) uint8; `name` is for messages.

        Raises:
            InputError: the bytes are not one whole image, or claim to be a huge one.
        """
        try:
            picture = self._open_picture(io.BytesIO(data))  # reads just the header, in some 20 us
            self._check_header(picture, data)
            if picture.format in ("JPEG", "MPO"):  # MPO: JPEG with a second picture behind it, as some cameras write
                # What torchvision.io.decode_jpeg calls, which warns at every call; turned as EXIF says
                image = self._decode_jpeg(self._torch.from_numpy(data), RGB_MODE, True)
            else:
                self._open_picture(io.BytesIO(data)).verify()  # a PNG's checksums, which decoding does not look at
                image = self._torch.from_numpy(self._to_rgb(picture)).permute(2, 0, 1)
        except MemoryError as error:
            raise FENCE.memory_fault(name, error) from error
        except Exception as error:  # hostile bytes can raise anything from a decoder; whatever it is, it is this file's
            reason = " ".join(str(error).split()) or type(error).__name__
            if "torchvision" in reason:  # decode_jpeg, <path of a C++ file>:<line>, <reason>
                reason = reason.rsplit(", ", 1)[-1]
            if type(error).__name__ == "UnidentifiedImageError":
                reason = "not a JPEG, PNG, WebP or BMP image"
            raise InputError(f"{name}: cannot decode {len(data)} bytes: {reason}") from error
        return self._fit(image, name)

    def fit(self, image: np.ndarray, name: str) -> torch.Tensor:
        """Bring a frame that a video's decoder made, (h, w, 3) uint8 RGB, to the input size.

        Raises:
            InputError: it is too narrow to crop.
        """
        return self._fit(self._torch.from_numpy(image).permute(2, 0, 1), name)

    @staticmethod
    def _check_header(picture: PIL.Image.Image, data: np.ndarray) -> None:
        width, height = picture.size
        most_scans = MAX_SCANNED_PIXELS // max(1, width * height)
        if len(data) > most_scans * MIN_SCAN_BYTES and (scans := data.tobytes().count(b"\xff\xda")) > most_scans:
            raise ValueError(
                f"it has {scans} scans of {width}x{height} px; {most_scans} of this size are decoded at most"
            )
        if width * height > MAX_FRAME_PIXELS:
            raise ValueError(f"it claims {width}x{height} px; more than {MAX_FRAME_PIXELS} pixels are refused")
        if getattr(picture, "is_animated", False) and picture.format != "MPO":
            raise ValueError(f"it is an animation of {picture.n_frames} pictures")

    def _to_rgb(self, picture: PIL.Image.Image) -> np.ndarray:
        """(h, w, 3) uint8, turned as its EXIF orientation says; 16-bit grey is scaled, 65535 to 255."""
        picture = self._transpose(picture)
        if not picture.mode.startswith("I"):
            return np.array(picture.convert("RGB"))
        grey = (np.asarray(picture).astype(np.uint32) + 128) // 257
        return np.repeat(grey.astype(np.uint8)[..., None], 3, axis=2)

    def _fit(self, image: torch.Tensor, name: str) -> torch.Tensor:
        """(3, h, w) to (3, H, W): stretched, or scaled to cover and cut at the centre."""
        if not self._crops:
            return self._resized(image, self._height, self._width)
        height, width = image.shape[-2:]
        scale = max(self._height / height, self._width / width)
        covering = max(self._height, round(height * scale)), max(self._width, round(width * scale))
        if math.prod(covering) > MAX_SCALED_PIXELS * self._height * self._width:
            raise InputError(f"{name}: {width}x{height} px is too narrow to crop to {self._width}x{self._height}")
        fitted = self._resized(image, *covering)
        top, left = (round((have - want) / 2) for have, want in zip(covering, (self._height, self._width)))
        return fitted[:, top : top + self._height, left : left + self._width]

    def _resized(self, image: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """What torchvision's resize makes, which costs more than the resizing of a small frame."""
        if image.shape[-2:] == (height, width):
            return image
        return self._resize(image[None], (height, width))[0]


# ======================================================================================================================
# Encoding: frames to tokens of DINOv2 or DINOv3; what is other of other models is in TIMM_MODELS_MODULE
# ======================================================================================================================

RANDOM_WEIGHTS_SEED = 0
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h has them
KEPT_BYTES = 1 << 30  # freed memory that the process keeps for the next batch


BLOCKS = {"large": 24, "giant": 40, "dinov3_large": 24, "dinov3_huge_plus": 32, "dinov3_7b": 40}  # others: 12
# LayerScale of all families, which timm starts at 1e-5: that would leave all CLS tokens equal whatever the image
LAYER_SCALE = re.compile(r".*\.(gamma(_?\d)?|layer_scale\w*(\.\w+)?)")


class ModelShape(NamedTuple):
    """What a model's output looks like: patch size [px], width D, register tokens R."""

    patch_size: int
    width: int
    num_registers: int


class ModelParts(NamedTuple):
    """What else settings can ask of a model; layers are 0 where their tokens differ in shape."""

    has_class_token: bool
    num_layers: int


@functools.cache
def model_shape(model_type: str) -> ModelShape:
    """Taken from the architecture itself, built without blocks (one of dinov3_7b takes 0.8 GB) or weights to load."""
    import timm

    if model_type not in MODEL_NAMES:
        return open_door(TIMM_MODELS_MODULE).model_shape(model_type)
    model = timm.create_model(MODEL_NAMES[model_type], pretrained=False, num_classes=0, depth=0)
    return ModelShape(model.patch_embed.patch_size[0], model.embed_dim, model.num_prefix_tokens - 1)


def model_parts(model_type: str) -> ModelParts:
    """As model_shape, the rest."""
    if model_type not in MODEL_NAMES:
        return open_door(TIMM_MODELS_MODULE).model_parts(model_type)
    return ModelParts(has_class_token=True, num_layers=BLOCKS.get(model_type.removesuffix("_reg"), 12))


def check_image_size(spec: CacheSpec, shape: ModelShape) -> None:
    """Raise RefusedError unless the input is a whole number of patches."""
    if any(size % shape.patch_size for size in spec.image_size):
        nearest = [max(1, round(size / shape.patch_size)) * shape.patch_size for size in spec.image_size]
        raise RefusedError(
            f"image_size: {list(spec.image_size)}: height and width must be multiples of the patch size "
            f"{shape.patch_size} of dino_model_type {spec.dino_model_type}; the nearest is {nearest}"
        )
    if spec.dino_model_type not in MODEL_NAMES:
        open_door(TIMM_MODELS_MODULE).check_input(spec, shape)


def tokens_of(model_type: str, shape: ModelShape) -> list[Token]:
    """The tokens that a model of this shape has."""
    lacking = {"cls": not model_parts(model_type).has_class_token, "register": not shape.num_registers}
    return [token for token in TOKEN_DATASETS if not lacking.get(token)]


def check_tokens(spec: CacheSpec, shape: ModelShape) -> None:
    """Raise RefusedError unless the model has the tokens and layers asked for, and patch tokens can be so stored."""
    if spec.has_smaller_tokens:
        open_door(SMALLER_TOKENS_MODULE).check(spec, shape)
    model, known = f"dino_model_type {spec.dino_model_type}", tokens_of(spec.dino_model_type, shape)
    for token in set(spec.tokens).difference(known):
        raise RefusedError(
            f"tokens: {list(spec.tokens)}: {model} gives no {token} token; it gives {', '.join(known)}"
            f"{', where mean is the average of the patch tokens' * ('cls' not in known)}"
        )
    if spec.layers is None:
        return
    num_layers = model_parts(spec.dino_model_type).num_layers
    if num_layers == 0:
        raise RefusedError(f"layers: {list(spec.layers)}: those of {model} differ in size; take the key out")
    if spec.layers[-1] >= num_layers:
        raise RefusedError(f"layers: {list(spec.layers)}: {model} has {num_layers}, from 0 to {num_layers - 1}")


def token_shapes(spec: CacheSpec, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Dataset name -> shape of one frame's tokens, of the tokens asked for; those of int8 are followed by their scales.
    What type they are says `token_type`."""
    height, width = (size // shape.patch_size // spec.patch_pool for size in spec.image_size)
    shapes = {
        "cls": (shape.width,),
        "patch": (height, width, shape.width),
        "register": (shape.num_registers, shape.width),
        "mean": (shape.width,),
    }
    stored: dict[str, tuple[int, ...]] = {}
    for token in spec.tokens:
        for name in token_names(token, spec.layers):
            stored[name] = shapes[token]
            if token == "patch" and spec.store == "int8":
                stored[scale_dataset(name)] = shapes[token][:-1]
    return stored


def one_line(error: BaseException) -> str:
    """What an error of a library says, which may be many lines, or nothing."""
    return " ".join(str(error).split()) or type(error).__name__


# CUDA and the libraries on it report a lack of memory in several classes of errors, some of them by the first thing
# that they cannot make: a handle, or an algorithm's workspace.
_OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|MemoryAllocation|ALLOC(ATION)?_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
    r"|valid cuDNN algorithm|unable to find an engine",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the device, or the host, has no memory left."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


@contextlib.contextmanager
def device_errors(what: str) -> Iterator[None]:
    """Turn what a failing device, or one without memory, raises into DeviceError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        remedy = "free memory or set a smaller batch_size, and " if is_out_of_memory(error) else ""
        raise DeviceError(
            f"{what} failed: {one_line(error)}. No trajectory is blamed; what is recorded is safe: {remedy}run the "
            "same command again to go on"
        ) from error


def unused_gpu() -> list[str]:
    """A line on why torch cannot use the GPU that is plugged in; none where dino_cache_extras is not there to tell."""
    return open_door(HINTS_MODULE).unused_gpu() if is_there(HINTS_MODULE) else []


def resolve_device(device: str) -> str:
    """`auto` is CUDA where torch can use one; a warning says why not, where one is plugged in.

    Raises:
        RefusedError: CUDA is asked for and there is none.
    """
    import torch

    if device == "auto":
        for line in unused_gpu():
            LOG.warning("%s. The CPU is used instead", line)
        return "cuda" if torch.cuda.is_available() else "cpu"
    index = int(device.partition(":")[2] or 0)
    if device != "cpu" and (count := torch.cuda.device_count()) <= index:
        raise RefusedError(f"device: {device}: torch sees {count} CUDA devices; use cpu or auto", *unused_gpu())
    return device


def resolve_precision(wanted: str, recorded: str | None, device: str, model_type: str) -> str:
    """`auto` is what the cache has recorded; in a new one what default_precision says.

    Raises:
        RefusedError: the result is fp16 and the device is not CUDA.
    """
    precision = (recorded or default_precision(device, model_type)) if wanted == "auto" else wanted
    if precision == "fp16" and not device.startswith("cuda"):
        source = "recorded in this cache" if wanted == "auto" else "set in the config"
        raise RefusedError(
            f"precision: fp16 ({source}) needs CUDA and the device is {device}. Ways on: run on a machine with a GPU, "
            "or set precision: bf16 or fp32 (a changed configuration, for the trajectories still to do)",
            *unused_gpu(),
        )
    return precision


def default_precision(device: str, model_type: str) -> str:
    """On CUDA fp16 for DINOv2 and bf16 for all others; bf16 on a CPU with bf16 instructions, else fp32."""
    import torch

    if device.startswith("cuda"):
        return "fp16" if model_type in DINOV2_NAMES else "bf16"  # DINOv3 was trained in bf16: fp16's range is narrower
    capabilities = torch.backends.cpu.get_cpu_capability()
    has_bf16 = capabilities.startswith("AVX512") and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if has_bf16 else "fp32"


def check_engine(spec: CacheSpec, device: str | None) -> None:
    """See, before any work, that what computes the features is there and fits the device (None: not known yet).

    Raises:
        RefusedError: it is not, or does not; the message says the ways on.
    """
    is_cuda = device is not None and device.startswith("cuda")
    if spec.engine != "torch":
        if is_cuda:
            raise RefusedError(
                f"engine: {spec.engine} encodes on a CPU and the device is {device}. Ways on: set device: cpu, or "
                "engine: torch"
            )
        open_door(ENGINE_MODULES[spec.engine]).check(spec)
    if spec.compile and not is_cuda and device is not None:
        raise RefusedError(
            f"compile: true needs CUDA and the device is {device}, where torch.compile gains little. Ways on: run on a "
            "machine with a GPU, or set compile: false",
            *unused_gpu(),
        )


def timm_name(model_type: str) -> str:
    """What timm calls a model."""
    return MODEL_NAMES.get(model_type) or open_door(TIMM_MODELS_MODULE).timm_name(model_type)


def hub_repository(model_type: str) -> str:
    """Where the Hugging Face hub has timm's copy of a model's weights."""
    name = MODEL_NAMES.get(model_type)
    return f"timm/{name}" if name else open_door(TIMM_MODELS_MODULE).repository(model_type)


def weights_source(spec: CacheSpec) -> dict[str, Any]:
    """Where the weights come from: {source, size, mtime}; size and mtime are null where there is no file of the user's.

    Raises:
        RefusedError: the file is missing or unreadable.
    """
    if spec.weights == "random":
        return {"source": f"random ({spec.dino_model_type}, seed {RANDOM_WEIGHTS_SEED})", "size": None, "mtime": None}
    if spec.weights == "pretrained":
        return {"source": f"hf-hub:timm/{timm_name(spec.dino_model_type)}", "size": None, "mtime": None}
    try:
        status = os.stat(spec.weights)
    except OSError as error:
        raise RefusedError(
            f"weights: {spec.weights}: {error.strerror}; expected pretrained, random, or the path of an official .pth "
            "or .safetensors file"
        ) from error
    return {"source": spec.weights, "size": status.st_size, "mtime": status.st_mtime}


def build_model(spec: CacheSpec) -> torch.nn.Module:
    """The timm model of `spec` at its native size, in fp32 on the CPU, with its weights.

    Raises:
        RefusedError: the weights cannot be had or do not fit; the message says the ways on.
    """
    import timm
    import torch

    name = timm_name(spec.dino_model_type)
    if spec.dino_model_type not in MODEL_NAMES:
        open_door(TIMM_MODELS_MODULE).check_known(spec.dino_model_type)
    if spec.weights == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_WEIGHTS_SEED)
            model = timm.create_model(name, pretrained=False, num_classes=0)
        for key, parameter in model.named_parameters():
            if LAYER_SCALE.fullmatch(key):
                torch.nn.init.ones_(parameter)
        return model
    weights_source(spec)  # the errors of a missing file that come later do not name it
    try:
        if spec.weights == "pretrained":
            repository = hub_repository(spec.dino_model_type)
            with contextlib.ExitStack() as stack:
                if is_there(HUB_MODULE):
                    stack.enter_context(open_door(HUB_MODULE).hub(repository))
                if spec.dino_model_type not in MODEL_NAMES:
                    stack.enter_context(open_door(TIMM_MODELS_MODULE).with_card(repository))
                return timm.create_model(name, pretrained=True, num_classes=0)
        if spec.dino_model_type not in MODEL_NAMES:
            return open_door(TIMM_MODELS_MODULE).load_weight_file(Path(spec.weights), name)
        return load_weight_file(Path(spec.weights), name)
    except Exception as error:  # hub, network, unpickling and key errors come in many classes, all of them before work
        if is_out_of_memory(error):
            raise
        raise RefusedError(_weights_advice(spec, name, error)) from error


def load_weight_file(path: Path, model_name: str) -> torch.nn.Module:
    """The timm model with the weights of a file in the official layout, timm's, or, for DINOv3, transformers'."""
    import timm

    weights = timm.models.load_state_dict(str(path), weights_only=True)  # which timm < 1.0.26 does not do unasked
    if "_dinov3" in model_name:
        if "embeddings.cls_token" in weights:
            weights = open_door(TRANSFORMERS_NAMES_MODULE).official_dinov3_names(weights)
        weights = _without_qkv_bias(weights)
    model = timm.create_model(model_name, pretrained=False, num_classes=0)
    to_timm = importlib.import_module(type(model).__module__).checkpoint_filter_fn
    model.load_state_dict(to_timm(weights, model), strict=True)
    return model


def _without_qkv_bias(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """DINOv3's tensors less the query, key and value biases: all zero as published, so timm's models have none.

    Raises:
        ValueError: one is not zero, and would be missing.
    """
    biases = {name for name in weights if re.search(r"\.(qkv|[qkv]_proj)\.bias$", name)}
    masks = {f"{name}_mask" for name in biases} & weights.keys()
    for name in biases:
        if (weights[name] * weights.get(f"{name}_mask", 1)).any():
            raise ValueError(f"{name} is not zero, as it is in all published DINOv3 weights")
    return {name: tensor for name, tensor in weights.items() if name not in biases | masks}


def _weights_advice(spec: CacheSpec, model_name: str, error: Exception) -> str:
    if spec.weights != "pretrained":
        reason = one_line(error)[:500]
        families = ((DINOV2_NAMES, "an official DINOv2"), (DINOV3_NAMES, "an official DINOv3"))
        family = next((family for names, family in families if spec.dino_model_type in names), "timm's, or an original")
        return (
            f"weights: {spec.weights}: cannot be loaded into {model_name} (dino_model_type {spec.dino_model_type}): "
            f"{reason}. Expected {family} .pth or .safetensors file of that model"
        )
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE

    reason = one_line(error)[:300]
    repository = hub_repository(spec.dino_model_type)
    downloaded = try_to_load_from_cache(repository, "model.safetensors")
    if isinstance(downloaded, str):
        return f"weights: pretrained: {downloaded} cannot be loaded: {reason}. Delete it and run again online"
    folder = Path(HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    once = "go online once and run again"
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        once = f"log in with `hf auth login`, agree to the terms at https://huggingface.co/{repository}, run again"
    return (
        f"weights: pretrained: the file model.safetensors of {repository} is neither in {folder} nor could it be "
        f"downloaded ({type(error).__name__}: {reason}). Ways on: {once}; or download the "
        "official .pth or .safetensors elsewhere and set `weights: <its path>`; or set `weights: random` just to try "
        "things out"
    )


def weights_digest(model: torch.nn.Module) -> str:
    """16 hex digits over sorted tensor names, dtypes, shapes and bytes as loaded: .pth and .safetensors agree."""
    digest = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().numpy())
    return digest.hexdigest()[:16]


def resample_position_grid(model: torch.nn.Module, grid: tuple[int, int]) -> torch.Tensor:
    """Position embedding (1, P + h*w, D) for a patch grid (h, w), by the official rule, not timm's, which differs.

    Plain models: scale factors with an offset of 0.1, no antialias; register models: by size, antialias. Source:
    facebookresearch/dinov2, DinoVisionTransformer.interpolate_pos_encoding with the settings of its hub models. P is
    the number of prefix positions: 1 (CLS) in plain models, 0 in register models.
    """
    import torch

    native = model.patch_embed.grid_size
    if grid == native:
        return model.pos_embed.detach()
    num_prefix = model.pos_embed.shape[1] - math.prod(native)
    prefix, patches = model.pos_embed.detach().float().split([num_prefix, math.prod(native)], dim=1)
    patches = patches.reshape(1, *native, -1).permute(0, 3, 1, 2)  # (1, D, 37, 37)
    if model.num_reg_tokens:
        how = {"size": grid, "antialias": True}
    else:
        how = {"scale_factor": tuple((new + 0.1) / old for new, old in zip(grid, native)), "antialias": False}
    patches = torch.nn.functional.interpolate(patches, mode="bicubic", **how)
    return torch.cat([prefix, patches.permute(0, 2, 3, 1).flatten(1, 2)], dim=1)


def set_input_size(model: torch.nn.Module, image_size: tuple[int, int], device: str) -> tuple[int, int]:
    """Settle where the patches of (height, width) [px] images are, once and in fp32; returns the patch grid (h, w).

    DINOv2 has a position grid, resampled. DINOv3 has rotary embeddings, whose periods its published files hold rounded
    to bfloat16; timm leaves them exact, and would make the embedding anew for every batch, from periods in the weights'
    precision. It stays in float32, on `device`: queries and keys are turned in it, as in facebookresearch/dinov3.
    """
    import torch

    patch_size = model.patch_embed.patch_size[0]
    grid = (image_size[0] // patch_size, image_size[1] // patch_size)
    if model.pos_embed is None:
        model.rope.periods = model.rope.periods.bfloat16().float()
        rotary = model.rope.get_embed(grid).to(device)  # (h*w, 2 * width of a head): sines, cosines
        model.rope.get_embed = lambda shape: rotary
    else:
        position = resample_position_grid(model, grid)
        model.set_input_size(img_size=image_size)
        model.pos_embed = torch.nn.Parameter(position)
    return grid


def keep_freed_memory() -> None:
    """Have this process keep the memory that it frees. Handed back to the system after every batch, a batch's
    activations are cleared page by page for the next one: a seventh of an encoder's time on a CPU. glibc only."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
            mallopt(parameter, KEPT_BYTES)


def one_torch_thread() -> None:
    """For threads that are the parallelism: torch's own threads under each of them would only be in the way."""
    import torch

    torch.set_num_threads(1)


class EncodedRows(NamedTuple):
    """Tokens of B frames on the host: dataset name -> (B, ...) of `token_type`, float16 most often, and (B,) bool,
    whether a row is all finite. Beside int8 tokens there are a few as computed, for `ChunkWriter` to sample."""

    tokens: dict[str, np.ndarray]
    finite: np.ndarray


class Encoder(Protocol):
    """What the pipeline needs of an encoder. `encode` may return before the device is done; the result waits for it.
    An encoder keeps the profile's stages "encode" and "copy out" itself: it alone knows when they are at work."""

    batches_in_flight: int  # beyond the one whose result is waited for; 0 where encode is synchronous
    default_batch_size: int
    most_rows: int  # that encode takes at once

    def new_pixels(self, batch_size: int) -> torch.Tensor: ...

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]: ...

    def drop(self) -> None:
        """Do not begin what encode was asked for and has not begun: its results raise CancelledError."""


def as_float16(tokens: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dataset name -> (B, ...) as computed, to float16, and "finite": (B,) bool, whether a row is."""
    import torch

    rows = {name: values.half() for name, values in tokens.items()}
    finite = [values.isfinite().flatten(1).all(1) for values in rows.values()]
    return {**rows, "finite": torch.stack(finite).all(0)}


def token_layers(model: torch.nn.Module, spec: CacheSpec) -> Callable[[torch.Tensor], torch.Tensor]:
    """What turns normalised frames (B, 3, H, W) into tokens (B, K * (P + h*w), D): of each of the K layers asked for,
    or of the model's end (K = 1), the P prefix tokens, the class token before registers, then the patches row by row.

    Layers are those of get_intermediate_layers, in timm and in facebookresearch/dinov2.
    """
    import torch

    if spec.layers is None and spec.dino_model_type in MODEL_NAMES:
        return model.forward_features
    known = inspect.signature(model.forward_intermediates).parameters
    how = {"norm": spec.layer_norm, "output_fmt": "NCHW", "intermediates_only": True, "stop_early": True}
    how["indices"] = [*(spec.layers or ())] or 1  # by name: in some models it is not the second argument
    if has_prefix := "return_prefix_tokens" in known and getattr(model, "num_prefix_tokens", 0) > 0:
        how["return_prefix_tokens"] = True
    if spec.layers is None:
        how |= open_door(TIMM_MODELS_MODULE).end_of(model)

    def forward(normalised: torch.Tensor) -> torch.Tensor:
        parts = []
        for found in model.forward_intermediates(normalised, **how):
            patches, prefix = found if has_prefix else (found, None)
            parts += [prefix] if has_prefix else []
            parts.append(patches.flatten(2).transpose(1, 2))  # (B, D, h, w) -> (B, h*w, D)
        return torch.cat(parts, dim=1)

    return forward


class DinoEncoder:
    """A frozen DINOv2 or DINOv3, or another model of timm, on one device.

    Weights and activations are cast to the spec's precision (1 - cos against fp32 at worst 5e-5 in bf16, 9e-7 in fp16).
    `encode` returns at once; only the result waits. On CUDA, pixels cross the bus as uint8 from pinned memory and
    tokens come back into pinned memory. On a CPU, every core encodes rows of its own: faster than all cores at the same
    rows, whose threads wait for each other at every layer, the more so while decoding keeps one of them from its core.
    """

    batches_in_flight = 1

    def __init__(self, model: torch.nn.Module, spec: CacheSpec, device: str):
        import torch

        self._torch = torch
        self._device = torch.device(device)
        self._dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[spec.precision]
        self._spec = spec
        self._can_pin = True
        if self._device.type == "cuda":
            if spec.precision == "fp32":
                torch.backends.cuda.matmul.allow_tf32 = False
                torch.backends.cudnn.allow_tf32 = False  # torch's default is True: 10 bits of the patch embedding's 23
            self._cores, self.default_batch_size, self.most_rows = None, 128, sys.maxsize
        else:
            self._num_cores = min(torch.get_num_threads(), available_cores())  # the former: OMP_NUM_THREADS
            self._cores = self._new_cores()
            self.most_rows = 4  # more leave a core's caches, and a stop waits for them
            self.default_batch_size = 2 * self.most_rows * self._num_cores
            keep_freed_memory()
        self._others = None if spec.dino_model_type in MODEL_NAMES else open_door(TIMM_MODELS_MODULE)
        if self._others is None:  # in fp32, before any cast
            self._grid = set_input_size(model.eval(), spec.image_size, device)
        else:
            self._grid = self._others.settle_input(model.eval(), spec, device)
        self._has_class_token = getattr(model, "cls_token", None) is not None
        self._to_store = open_door(SMALLER_TOKENS_MODULE).stage(spec) if spec.has_smaller_tokens else as_float16
        self._features = self._features_of(model.requires_grad_(False))
        self._mean = torch.tensor(spec.pixel_mean, device=self._device).view(3, 1, 1) * 255
        self._std = torch.tensor(spec.pixel_std, device=self._device).view(3, 1, 1) * 255

    def _features_of(self, model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
        """What turns normalised fp32 frames (B, 3, H, W) into tokens (B, K * (P + h*w), D), as token_layers."""
        if self._spec.compile and self._device.type == "cuda":
            open_library("triton")  # which the first batch would miss
        cast = model.to if self._others is None else functools.partial(self._others.cast, model)
        forward = token_layers(cast(self._device, self._dtype), self._spec)
        if self._spec.compile:
            forward = self._torch.compile(forward)
        return lambda normalised: forward(normalised.to(self._dtype))

    def new_pixels(self, batch_size: int) -> torch.Tensor:
        """Room for (B, 3, H, W) uint8 frames; pinned for CUDA, and reused by torch once its copy is done."""
        shape = (batch_size, 3, *self._spec.image_size)
        if self._cores is None:
            return self._pinned(shape, self._torch.uint8)
        return self._torch.empty(shape, dtype=self._torch.uint8)

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        """Start encoding (B, 3, H, W) uint8 RGB; calling the result waits for the tokens.

        Raises:
            torch.OutOfMemoryError: the batch does not fit on the device.
        """
        if self._cores is None:
            return self._start_on_cuda(pixels)
        return self._cores.submit(self._encode_on_core, pixels).result

    def drop(self) -> None:
        """On a CPU, leave what no core has begun; a device is quick enough."""
        if self._cores is not None:
            self._cores.shutdown(wait=False, cancel_futures=True)
            self._cores = self._new_cores()

    def _new_cores(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._num_cores, "encode", one_torch_thread)

    def _encode_on_core(self, pixels: torch.Tensor) -> EncodedRows:
        with self._torch.inference_mode():
            with PROFILE("encode"):
                rows = self._forward(pixels)
            with PROFILE("copy out"):
                host = {key: values.contiguous().numpy() for key, values in rows.items()}
        return EncodedRows(finite=host.pop("finite"), tokens=host)

    def _start_on_cuda(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        torch, stream = self._torch, self._torch.cuda.current_stream(self._device)
        begun, encoded, copied = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        with torch.inference_mode():
            begun.record(stream)
            rows = self._forward(pixels.to(self._device, non_blocking=True))
            encoded.record(stream)
            host = {key: self._to_pinned(values) for key, values in rows.items()}
            copied.record(stream)

        def collect() -> EncodedRows:
            copied.synchronize()
            PROFILE.add("encode", begun.elapsed_time(encoded) / 1000)
            PROFILE.add("copy out", encoded.elapsed_time(copied) / 1000)
            arrays = {key: values.numpy() for key, values in host.items()}
            return EncodedRows(finite=arrays.pop("finite"), tokens=arrays)

        return collect

    def _forward(self, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, 3, H, W) uint8 to dataset name -> (B, ...) as stored, and "finite": (B,) bool."""
        return self._to_store(self._named(self._features((pixels - self._mean) / self._std)))

    def _named(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        """(B, K * (P + h*w), D) to dataset name -> (B, ...), all in the precision that was computed in."""
        layers = features.unflatten(1, (len(self._spec.layers or (None,)), -1)).unbind(1)  # K of (B, P + h*w, D)
        num_prefix, num_class = layers[0].shape[1] - math.prod(self._grid), int(self._has_class_token)
        parts: dict[Token, Callable[[torch.Tensor], torch.Tensor]] = {
            "cls": lambda layer: layer[:, 0],
            "patch": lambda layer: layer[:, num_prefix:].unflatten(1, self._grid),
            "register": lambda layer: layer[:, num_class:num_prefix],
            "mean": lambda layer: layer[:, num_prefix:].float().mean(1),
        }
        return {
            name: parts[token](layer)
            for token in self._spec.tokens
            for name, layer in zip(token_names(token, self._spec.layers), layers, strict=True)
        }

    def _to_pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._pinned(tensor.shape, tensor.dtype).copy_(tensor, non_blocking=True)

    def _pinned(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Room on the host that the device copies from and to by itself; where no more can be pinned (a limit of the
        container), in ordinary memory, which is slower: a copy then waits."""
        if self._can_pin:
            try:
                return self._torch.empty(shape, dtype=dtype, pin_memory=True)
            except (RuntimeError, MemoryError) as error:
                self._can_pin = False
                LOG.warning("Cannot pin memory (%s): copies to and from the device are slower", one_line(error))
        return self._torch.empty(shape, dtype=dtype)


def load_encoder(spec: CacheSpec, device: str) -> tuple[Encoder, str]:
    """An encoder on its device, and the digest of its weights.

    Raises:
        RefusedError: the weights cannot be had, or the engine cannot compute with them on that device.
        DeviceError: host or device cannot hold the model, or the device does not work.
    """
    check_engine(spec, device)
    with device_errors(f"loading the model ({spec.dino_model_type}, to {device})"):
        model = build_model(spec)
        digest = weights_digest(model)
        if spec.engine == "torch":
            encoder: Encoder = DinoEncoder(model, spec, device)
        else:
            encoder = open_door(ENGINE_MODULES[spec.engine]).load(model, spec, digest)
        if spec.dino_model_type not in MODEL_NAMES:
            open_door(TIMM_MODELS_MODULE).check_output(encoder, spec)
        return encoder, digest


# Settings that do not reach an encoder: they choose frames, bring them to the input size, or cut trajectories. All
# others are its own, so that a setting forgotten here costs a second encoder in memory and never mixes features.
NOT_OF_ENCODER = {
    *("max_chunk_distance_m", "overlap_distance_m", "min_chunk_distance_m", "frame_stride", "frame_pattern", "resize"),
    *("image_key", "position_key", "yaw_key", "guessed_keys", "position_scale", "yaw_unit", "pose_axes", "time_scale"),
    *("chunk_by", "max_chunk_frames", "overlap_frames", "yaw_offset", "sample_hz", "max_pose_gap_s", "time_zero"),
    *("layout", "pose_file", "pose_columns", "pose_match", "poses_folder", "time_offset", "frame_times"),
    *("tf", "stamps", "extra_keys", "integrate"),
}


def encoder_key(spec: CacheSpec, device: str) -> tuple:
    """Equal for datasets that one encoder serves: the device, and every setting but those of NOT_OF_ENCODER."""
    return (device, *(value for key, value in spec if key not in NOT_OF_ENCODER))


# ======================================================================================================================
# Storage: chunk files and how they become final
# ======================================================================================================================

CHUNK_FORMAT = "dino_cache"
CHUNK_FORMAT_VERSION = 1
READ_BLOCK_BYTES = 1 << 24  # bytes of a chunk file that are read and digested at a time
NAME_FAULTS = (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR)  # errors of one trajectory's place in the cache
ACCESS_FAULTS = (errno.EACCES, errno.EPERM)  # there, of this place too; of staging or the record, the disk's


@dataclass(frozen=True)
class ChunkLabel:
    """What every chunk of a run carries in its attributes, so that a file alone says how it was made."""

    dataset_name: str
    spec: CacheSpec
    fingerprint: str
    weights_digest: str
    token_shapes: dict[str, tuple[int, ...]]  # of one frame of a camera, as `token_shapes` gives them

    @functools.cached_property
    def spec_json(self) -> str:
        """Made once a run."""
        return json.dumps(self.spec.to_json())


@contextlib.contextmanager
def storage_errors(cache_dir: Path) -> Iterator[None]:
    """Turn what a failing disk raises into StorageError."""
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{cache_dir}: cannot write: {error}. What is recorded is safe; free space, or mend the disk or its "
            "permissions, then run the same command again"
        ) from error


@functools.cache
def library_versions() -> str:
    """JSON of the versions that made a chunk."""
    names = ("torch", "torchvision", "timm", "numpy", "h5py")
    versions = {"dino_cache": __version__, "python": sys.version.split()[0]}
    return json.dumps({**versions, **{name: importlib.metadata.version(name) for name in names}})


def versions_of(spec: CacheSpec) -> str:
    """library_versions, with that of an engine beside torch."""
    if spec.engine == "torch":
        return library_versions()
    return json.dumps({**json.loads(library_versions()), spec.engine: importlib.metadata.version(spec.engine)})


def bytes_digest(data: bytes | np.ndarray = b"") -> hashlib.blake2b:
    """The running digest of a dataset's bytes."""
    return hashlib.blake2b(data, digest_size=16)


def attributes_digest(attributes: dict[str, Any], dataset_digests: dict[str, str]) -> str:
    """Digest over a chunk's root attributes (without this one) and its datasets' digests."""
    content = json.dumps([attributes, dataset_digests], sort_keys=True)
    return bytes_digest(content.encode()).hexdigest()


SEAL_BYTES = 512  # HDF5's user block, before its own first byte


def sealed_apart(data: Iterable[list[int]]) -> list[list[int]]:
    """[offset, size] in order of offset of the datasets that a seal leaves to digests of their own: all, or where it
    has no room for so many the largest; the others' bytes count among those that it digests."""
    largest_first, digest = sorted(data, key=lambda piece: -piece[1]), bytes_digest().hexdigest()
    while len(seal_of(largest_first, digest)) > SEAL_BYTES:
        largest_first.pop()
    return sorted(largest_first)


def seal_of(data: list[list[int]], digest: str) -> bytes:
    """What is written into the user block."""
    return json.dumps({"data": data, "digest": digest}).encode().ljust(SEAL_BYTES)


def metadata_digest(file: BinaryIO, data: list[list[int]]) -> str:
    """Digest over all bytes of a chunk file but the seal and these pieces, [offset, size] each, in order of offset."""
    running, position = bytes_digest(json.dumps(data).encode()), SEAL_BYTES
    for offset, size in [*data, [sys.maxsize, 0]]:
        _digest_bytes(running, file, position, offset)
        position = offset + size
    return running.hexdigest()


def _digest_bytes(running: hashlib.blake2b, file: BinaryIO, start: int, stop: int) -> str:
    file.seek(start)
    while block := file.read(min(READ_BLOCK_BYTES, max(0, stop - file.tell()))):
        running.update(block)
        FENCE.getting_on()
    return running.hexdigest()


def is_as_noted(path: Path, note: dict[str, Any]) -> bool:
    """Whether a chunk file is, to the byte, what ChunkWriter.finish noted of it."""
    try:
        with open(path, "rb") as file:
            size, seal, digests = os.fstat(file.fileno()).st_size, file.read(SEAL_BYTES), []
            digests.append(metadata_digest(file, note["data"]))
            digests += [_digest_bytes(bytes_digest(), file, at, at + count) for at, count in note["data"]]
    except OSError:
        return False
    return note == _chunk_note(size, note["data"], digests) and seal == seal_of(note["data"], digests[0])


def _chunk_note(size: int, data: list[list[int]], digests: list[str]) -> dict[str, Any]:
    """What a journal tells of a chunk file: its size, [offset, size] of the data that have digests of their own, and a
    digest over all, that of the metadata first."""
    return {"bytes": size, "data": data, "digest": bytes_digest("".join(digests).encode()).hexdigest()}


class ChunkFile(io.FileIO):
    """A new file for HDF5 to write, whose write errors wait in `error`: HDF5 brings the process down when it cannot
    write what it still holds while it closes."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of `data`, or nothing more after an error."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest and self.error is None:
                rest = rest[super().write(rest) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Set the size."""
        try:
            return super().truncate(size) if self.error is None else size or 0
        except OSError as error:
            self.error = error
            return size or 0

    def check(self) -> None:
        """Raise the first error there was."""
        if self.error is not None:
            raise self.error


# What h5py's own way of writing rows and attributes makes, without its asking for types, half of the time of a chunk.


@functools.cache
def _storage_type(kind: np.dtype) -> tuple[Any, Any]:
    """The type of a dataset in the file, and how it is laid out: contiguous, so that it can be memory-mapped."""
    import h5py

    layout = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    layout.set_obj_track_times(False)
    return h5py.h5t.py_create(kind, logical=True), layout


def new_dataset(file: Any, name: str, shape: tuple[int, ...], kind: np.dtype) -> Any:
    """A new dataset as an h5py.h5d.DatasetID; `file`: an h5py.h5f.FileID."""
    import h5py

    in_file, layout = _storage_type(kind)
    return h5py.h5d.create(file, name.encode(), in_file, h5py.h5s.create_simple(shape), layout)


def write_rows(dataset: Any, start: int, rows: np.ndarray) -> None:
    """Write (n, ...) rows from `start` on; `dataset`: an h5py.h5d.DatasetID."""
    import h5py

    place = dataset.get_space()
    place.select_hyperslab((start, *(0 for _ in rows.shape[1:])), rows.shape)
    dataset.write(h5py.h5s.create_simple(rows.shape), place, rows)


@functools.cache
def _attribute_type(is_text: bool) -> tuple[np.dtype, Any, Any, Any]:
    """numpy's, the file's and the memory's type of an attribute, text or a whole number; and its space, one value."""
    import h5py

    kind = h5py.string_dtype() if is_text else np.dtype(np.int64)
    return kind, h5py.h5t.py_create(kind, logical=True), h5py.h5t.py_create(kind), h5py.h5s.create_simple(())


def write_attribute(owner: Any, name: str, value: str | int) -> None:
    """Give a dataset or file an attribute that it has not; `owner`: its low-level identifier."""
    import h5py

    kind, in_file, in_memory, one = _attribute_type(isinstance(value, str))
    attribute = h5py.h5a.create(owner, name.encode(), in_file, one)
    attribute.write(np.array(value, kind), mtype=in_memory)


class ChunkWriter:
    """One chunk file, written row by row in frame order, its digests computed on the way."""

    def __init__(self, folder: Path, plan: TrajectoryPlan, chunk_index: int, label: ChunkLabel):
        import h5py

        self._path = folder / chunk_file_name(chunk_index)
        self._plan, self._chunk_index, self._label = plan, chunk_index, label
        self._span = plan.spans[chunk_index]
        self._raw = ChunkFile(self._path, "x+")
        self._file = h5py.File(self._raw, "w", userblock_size=SEAL_BYTES)
        length = self._span.stop - self._span.start
        cameras = label.spec.cameras
        shapes = {
            token_dataset(camera, name): (length, *shape)
            for camera, (name, shape) in itertools.product(cameras, label.token_shapes.items())
        }
        for camera in filter(None, cameras):
            h5py.h5g.create(self._file.id, camera.encode())
        self._kinds = kinds = {name: token_type(name, shapes) for name in shapes}
        self._datasets = {name: new_dataset(self._file.id, name, shapes[name], kinds[name]) for name in shapes}
        self._num_bytes = {name: kinds[name].itemsize * math.prod(shape) for name, shape in shapes.items()}
        self._sample = open_door(SMALLER_TOKENS_MODULE).Sample(label) if label.spec.store == "int8" else None
        self._digests = {name: bytes_digest() for name in self._datasets}
        self._rows_left = length * len(cameras)

    @property
    def is_whole(self) -> bool:
        """Whether the rows of all cameras are written."""
        return self._rows_left == 0

    def write(self, first: int, tokens: dict[str, np.ndarray], camera: str | None = None) -> None:
        """Write a camera's kept frames from `first` on: dataset name -> (n, ...) of `token_type`."""
        for token in self._label.token_shapes:
            name, rows = token_dataset(camera, token), np.ascontiguousarray(tokens[token])
            if rows.dtype != self._kinds[name]:  # HDF5 would convert them in silence
                raise TypeError(f"{name} of {rows.dtype} came to a dataset of {self._kinds[name]}")
            write_rows(self._datasets[name], first - self._span.start, rows)
            self._digests[name].update(rows)
            self._raw.check()
        if self._sample is not None:
            self._sample.add(first, tokens, camera)
        self._rows_left -= len(rows)

    def finish(self) -> dict[str, Any]:
        """Add poses, columns, attributes and digests, force the file to the disk; returns what is to be noted of it."""
        self._write_columns()
        digests = {name: digest.hexdigest() for name, digest in self._digests.items()}
        for name, digest in digests.items():
            write_attribute(self._datasets[name], "digest", digest)
        attributes = self._attributes()
        for name, value in {**attributes, "attributes_digest": attributes_digest(attributes, digests)}.items():
            write_attribute(self._file.id, name, value)
        data = sealed_apart([it.get_offset(), self._num_bytes[name]] for name, it in self._datasets.items())
        digest_at = {it.get_offset(): digests[name] for name, it in self._datasets.items()}
        self._datasets.clear()
        self._file.close()
        self._raw.check()
        metadata = metadata_digest(self._raw, data)
        self._raw.seek(0)
        self._raw.write(seal_of(data, metadata))
        self._raw.check()
        with PROFILE("fsync"):
            os.fsync(self._raw.fileno())
        size = os.fstat(self._raw.fileno()).st_size
        self._raw.close()
        return _chunk_note(size, data, [metadata, *(digest_at[offset] for offset, _ in data)])

    def _write_columns(self) -> None:
        """Poses, and what comes along."""
        import h5py

        columns, rows = self._plan.datasets, slice(*self._span)
        if any(name.startswith(EXTRA_PREFIX) for name in columns):
            h5py.h5g.create(self._file.id, EXTRA_PREFIX.rstrip("/").encode())
        for name, values in columns.items():
            inside = np.ascontiguousarray(values[rows])
            self._datasets[name] = dataset = new_dataset(self._file.id, name, inside.shape, inside.dtype)
            dataset.write(h5py.h5s.ALL, h5py.h5s.ALL, inside)
            self._digests[name], self._num_bytes[name] = bytes_digest(inside), inside.nbytes

    def _attributes(self) -> dict[str, Any]:
        plan, label = self._plan, self._label
        pairing = format_named(plan.trajectory.format).pairing
        return {
            "format": CHUNK_FORMAT,
            "format_version": CHUNK_FORMAT_VERSION,
            "dataset_name": label.dataset_name,
            "trajectory": plan.trajectory.name,
            "chunk_index": self._chunk_index,
            "num_chunks": len(plan.spans),
            "start": self._span.start,
            "stop": self._span.stop,
            "spec": label.spec_json,
            "fingerprint": label.fingerprint,
            "weights_digest": label.weights_digest,
            "trajectory_checksum": plan.checksum,
            "checksum_kind": plan.checksum_kind,
            **({"pairing": pairing} if pairing > 1 else {}),
            **({} if plan.task is None else {"task": plan.task}),
            **({} if self._sample is None else self._sample.attributes()),
            "versions": versions_of(label.spec),
            "created_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def abandon(self) -> None:
        """Close the file as it is; its folder is about to be removed."""
        self._raw.error = self._raw.error or OSError(errno.ECANCELED, "abandoned")  # nothing more is written
        with contextlib.suppress(OSError, RuntimeError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._raw.close()


def made_from(plan: TrajectoryPlan, label: ChunkLabel) -> dict[str, Any]:
    """What a trajectory's chunks are made from, as JSON: where nothing of it differs, work on them may go on."""
    content = bytes_digest(json.dumps([plan.task, format_named(plan.trajectory.format).pairing]).encode())
    for name, values in sorted(plan.datasets.items()):
        content.update(f"{name} {values.dtype} {values.shape}".encode())
        content.update(np.ascontiguousarray(values))
    return {
        "trajectory": plan.trajectory.name,
        "dataset_name": label.dataset_name,
        "fingerprint": label.fingerprint,
        "weights_digest": label.weights_digest,
        "checksum": plan.checksum,
        "checksum_kind": plan.checksum_kind,
        "spans": [list(span) for span in plan.spans],
        "columns_digest": content.hexdigest(),
    }


class TrajectoryWriter:
    """The chunks of one trajectory, in a staging folder until all of them are durable. Few are open at a time. Each but
    the last, after which nothing is left to do, is noted in the folder's journal; those of plan.partial lie there."""

    def __init__(self, folder: Path, plan: TrajectoryPlan, label: ChunkLabel):
        self.folder, self.plan, self._label = folder, plan, label
        self._open: dict[int, ChunkWriter] = {}
        self.chunk_bytes = [note["bytes"] for note in plan.partial.chunks] if plan.partial else []
        self._next_chunk = len(self.chunk_bytes)

    @property
    def is_complete(self) -> bool:
        return len(self.chunk_bytes) == len(self.plan.spans)

    def write(self, rows: np.ndarray, tokens: dict[str, np.ndarray], camera: str | None = None) -> None:
        """Write kept frames `rows` (n,) of a camera, ascending; a frame goes to every chunk whose span holds it."""
        spans = self.plan.spans
        while self._next_chunk < len(spans) and spans[self._next_chunk].start <= rows[-1]:
            self._open[self._next_chunk] = ChunkWriter(self.folder, self.plan, self._next_chunk, self._label)
            self._next_chunk += 1
        for index, chunk in list(self._open.items()):
            low, high = np.searchsorted(rows, spans[index])
            if low < high:
                chunk.write(int(rows[low]), {name: values[low:high] for name, values in tokens.items()}, camera)
            if chunk.is_whole:
                note = chunk.finish()
                del self._open[index]
                self.chunk_bytes.append(note["bytes"])
                if not self.is_complete:
                    head = [made_from(self.plan, self._label)] if index == 0 else []
                    note_partial(self.folder, [*head, note])

    def abandon(self, *, keep: bool) -> None:
        """Close what is open and remove the staging folder; with `keep`, unless a chunk in it is finished."""
        for chunk in self._open.values():
            chunk.abandon()
        if not (keep and self.chunk_bytes):
            partial_journal(self.folder).unlink(missing_ok=True)
            shutil.rmtree(self.folder, ignore_errors=True)


class ChunkStore:
    """A cache folder: staging, publishing and removing trajectories' chunks."""

    def __init__(self, cache_dir: Path, staging: Path | None = None, record_dir: Path | None = None):
        self.cache_dir = cache_dir
        self._record_dir = record_dir or cache_dir  # where the record and, unless it is given, staging lie
        self._staging = staging or self._record_dir / STAGING_FOLDER
        self._durable_folders = {cache_dir}  # whose own entries this run has forced to the disk

    def empty_staging(self, wanted: Container[str] | None = None) -> None:
        """Remove what an interrupted run left half-made; partial trajectories stay, or those that are `wanted`."""
        for name in TEMPORARY_FILES:
            (self._record_dir / name).unlink(missing_ok=True)
        if self._staging.is_symlink():
            self._staging.unlink()  # what it points to is not ours
        self._staging.mkdir(exist_ok=True)
        kept = self.keep_partials(self._staging, wanted)
        self.discard_staged([path for path in self._staging.iterdir() if path not in kept])

    def keep_partials(self, staging: Path, wanted: Container[str] | None = None) -> set[Path]:
        """Bring partial trajectories to where the next run, or worker, looks for them; returns those places. They are
        renamed, and so out of reach of a worker that outlived its driver."""
        kept: set[Path] = set()
        for partial in find_partials(staging):
            name = partial.made_from["trajectory"]
            folder = partial_folder(self._record_dir, name)
            if folder in kept or (wanted is not None and name not in wanted):
                continue
            if partial.folder != folder:
                self._discard_partial(folder)
                move_partial(partial, folder)
            kept |= {folder, partial_journal(folder)}
        return kept

    def _discard_partial(self, folder: Path) -> bool:
        """Remove it; says whether there was one."""
        paths = [path for path in (partial_journal(folder), folder) if os.path.lexists(path)]
        self.discard_staged(paths)
        return bool(paths)

    def partial_of(self, plan: TrajectoryPlan, label: ChunkLabel) -> Partial | None:
        """The chunks of it that an interrupted run finished from the same data with the same settings, and that are
        intact, up to the first that is not."""
        partial = read_partial(partial_folder(self._record_dir, plan.trajectory.name))
        if partial is None or partial.made_from != made_from(plan, label):
            return None
        paths = (partial.folder / chunk_file_name(index) for index in range(len(plan.spans) - 1))
        intact = [note for _, note in itertools.takewhile(lambda it: is_as_noted(*it), zip(paths, partial.chunks))]
        return partial._replace(chunks=intact) if intact else None

    def new_chunks_folder(self, plan: TrajectoryPlan) -> Path:
        """A new staging folder for a trajectory's chunks, with those in it after which the plan goes on. What else an
        interrupted run left of it is removed."""
        folder, name = self.new_staging_folder(), plan.trajectory.name
        if plan.partial is not None:
            move_partial(plan.partial, folder)
            LOG.info("%s: goes on after %d of %d chunks", name, len(plan.partial.chunks), len(plan.spans))
        elif self._discard_partial(partial_folder(self._record_dir, name)):
            LOG.info("%s: its chunks of an interrupted run are of other data or settings, or damaged: made anew", name)
        return folder

    def discard_staged(self, paths: list[Path]) -> None:
        """Remove what lies in staging. Renamed first: a worker that outlived its driver finds nothing under the names
        that it knows, and can publish nothing any more."""
        if not paths:
            return
        doomed = self.new_staging_folder()
        for index, path in enumerate(paths):
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, doomed / str(index))
        shutil.rmtree(doomed, ignore_errors=True)  # a network filesystem may keep an open file's name for a while

    def new_staging_folder(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self._staging))

    def folder(self, name: str) -> Path:
        """Where a trajectory's chunks lie."""
        return self.cache_dir / name

    def chunk_sizes(self, name: str) -> dict[str, int]:
        """File name -> size [bytes] of everything in a trajectory's folder; empty where there is none."""
        try:
            with os.scandir(f"{self.cache_dir}/{name}") as entries:
                return {entry.name: entry.stat().st_size for entry in entries}
        except OSError as error:
            if error.errno in (errno.ENOENT, *NAME_FAULTS):
                return {}
            raise

    def is_older(self, name: str, when: float) -> bool:
        """Whether a trajectory's chunk files were made before `when` (epoch seconds), by their file times."""
        try:
            return os.stat(self.folder(name) / chunk_file_name(0)).st_mtime < when
        except OSError:
            return True

    def foreign_files(self, name: str) -> list[str]:
        """What lies where a trajectory's folder belongs and would be lost with it: neither a chunk file nor the folder
        of a trajectory whose name begins with this one's."""
        try:
            return sorted(entry.name for entry in self._entries(name) if not _is_ours(entry))
        except NotADirectoryError:
            return [name]
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENAMETOOLONG):
                return []
            raise

    def _entries(self, name: str) -> list[os.DirEntry[str]]:
        with os.scandir(self.folder(name)) as entries:
            return list(entries)

    def refuse_taken_place(self, name: str) -> None:
        """Raise PlaceTakenError where a trajectory's folder cannot become its chunks'. Asked before it is encoded, and
        again before it is published."""
        where = place = self.folder(name)
        while not os.path.exists(place) and place != self.cache_dir:
            place = place.parent
        if os.path.isdir(place) and not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            raise PlaceTakenError(f"{name}: cannot replace what lies in {where}: no access to {place}; give it")
        if foreign := self.foreign_files(name):
            raise PlaceTakenError(f"{name}: {where} holds what is not a chunk file ({foreign[0]}); move it away")

    def publish(self, staged: Path, name: str, before_replacing: Callable[[str], None]) -> Path | None:
        """Make a staged folder a trajectory's final one, durably; returns where the folder replaced lies now.

        `before_replacing` is called with the name before an existing folder is moved: there the record must be
        withdrawn, durably.
        """
        target = self.folder(name)
        os.chmod(staged, 0o777 & ~process_umask())  # mkdtemp's folders are private
        with PROFILE("fsync"):
            fsync_path(staged)
            self._make_durable(target.parent)
        replaced = None
        if target.exists():
            before_replacing(name)
            replaced = self.new_staging_folder() / "replaced"
            if any(entry.is_dir() for entry in self._entries(name)):
                self._replace_files(target, staged, replaced)
                partial_journal(staged).unlink(missing_ok=True)
                return replaced
            os.rename(target, replaced)
        os.rename(staged, target)
        with PROFILE("fsync"):
            fsync_path(target.parent)
        partial_journal(staged).unlink(missing_ok=True)
        return replaced

    def _replace_files(self, target: Path, staged: Path, replaced: Path) -> None:
        """Exchange the chunk files of a folder in which other trajectories' folders lie, which stay where they are."""
        replaced.mkdir()
        for entry in self._entries(target.relative_to(self.cache_dir).as_posix()):
            if entry.is_file():
                os.rename(entry.path, replaced / entry.name)
        for path in sorted(staged.iterdir()):
            os.rename(path, target / path.name)
        staged.rmdir()
        with PROFILE("fsync"):
            fsync_path(target)

    def _make_durable(self, folder: Path) -> None:
        """Make a folder and force its entry to the disk, once a run: an earlier run may have died in between."""
        if folder not in self._durable_folders:
            self._make_durable(folder.parent)
            folder.mkdir(exist_ok=True)
            fsync_path(folder.parent)
            self._durable_folders.add(folder)

    def remove_chunks(self, name: str) -> None:
        """Delete a trajectory's chunk files, at once where nothing else is beside them. They must not be recorded."""
        folder = self.folder(name)
        try:
            entries = self._entries(name)
        except (FileNotFoundError, NotADirectoryError):
            return
        chunks = [entry for entry in entries if is_chunk_file(entry.name) and entry.is_file()]
        if not chunks:
            return
        if len(chunks) < len(entries):
            for entry in chunks:
                os.unlink(entry.path)
            fsync_path(folder)
            return
        removed = self.new_staging_folder() / "removed"
        os.rename(folder, removed)
        fsync_path(folder.parent)
        shutil.rmtree(removed.parent)

    def has_chunks(self) -> bool:
        """Whether any trajectory's chunk lies in this cache."""
        return any(chunk_folders(self.cache_dir))


def _is_ours(entry: os.DirEntry[str]) -> bool:
    """Whether an entry of a trajectory's folder is a chunk file, or a folder that holds such and nothing else."""
    if not entry.is_dir(follow_symlinks=False):
        return is_chunk_file(entry.name) and entry.is_file()
    with os.scandir(entry.path) as inner:
        return all(_is_ours(child) for child in inner)


@functools.cache
def process_umask() -> int:
    """The process's file mode mask, which can only be read by setting it: once, before any thread depends on it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


POSE_SHAPES = {"position": (2,), "yaw": (), "frame_index": (), "travelled_distance": ()}
POSE_TYPES = {"position": "<f8", "yaw": "<f8", "frame_index": "<i8", "travelled_distance": "<f8"}
COLUMN_SHAPES = {"timestamp": (), "delta": (3,)}  # what comes along unasked, float64; delta may hold NaN


# ======================================================================================================================
# Working ahead: threads that do something to many items, in order and with bounds
# ======================================================================================================================


STOP_LOOK_S = 0.2  # time between two looks at whether the run shall stop, while something is waited for
MEASURED_ITEMS = 64  # items whose time tells whether files are slow


def in_groups(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """The items in lists of `size`; the last may be shorter."""
    items = iter(items)
    while group := list(itertools.islice(items, size)):
        yield group


@contextlib.contextmanager
def thread_pool(workers: int, name: str, initializer: Callable[[], None] | None = None) -> Iterator[Executor]:
    """Threads that, at the end, finish what they are at and nothing more."""
    pool = ThreadPoolExecutor(workers, name, initializer)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def under_way(
    begin: Callable[[Item], Future | None],
    items: Iterable[Item],
    depth: int,
    *,
    early: bool = False,
    weigh: Callable[[Item], int] = lambda item: 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Item, Future | None]]:
    """Begin what is to be done with each item, up to `depth` ahead; items come out in order, each when it is done.

    One is handed out once `depth` items are under way, so that the workers never run dry; at once where there was
    nothing to begin (None); with `early`, as soon as it is done when another item is taken up. An item may count for
    several; one is under way ahead in any case. Ends early where it waits and the run shall stop.
    """
    pending: deque[tuple[Item, Future | None, int]] = deque()  # with weights
    ahead = 0  # weight of all but the first
    try:
        for item in itertools.chain(items, [_END]):
            if item is not _END:
                weight = weigh(item)
                ahead += weight if pending else 0
                pending.append((item, begin(item), weight))
            while pending:
                head, future, _ = pending[0]
                may_go = item is _END or ahead >= depth - 1 or future is None or (early and future.done())
                if not may_go:
                    break
                if future is not None and not _wait(future, should_stop):
                    return
                pending.popleft()
                ahead -= pending[0][2] if pending else 0
                yield head, future
    finally:
        for _, future, _ in pending:
            if future is not None:
                future.cancel()


_END: Any = object()  # after the last item


def _wait(future: Future, should_stop: Callable[[], bool]) -> bool:
    """Wait until it is done; False where the run shall stop before that."""
    while not future.done():
        try:
            future.exception(STOP_LOOK_S)
        except TimeoutError:
            if should_stop():
                return False
    return True


def prefetch(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    pool: Executor,
    depth: int,
    *,
    early: bool = False,
    weigh: Callable[[Item], int] = lambda item: 1,
) -> Iterator[Result]:
    """`function` of each item, in order, worked ahead as `under_way` says; an exception comes out where its result
    would."""
    begun = under_way(lambda item: pool.submit(function, item), items, depth, early=early, weigh=weigh)
    with contextlib.closing(begun):
        for _, future in begun:
            yield future.result()


def _num_waits() -> int:
    """How often this thread has waited by itself, rather than for its turn on a busy machine."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


def map_files(
    function: Callable[[Item], Result], items: Sequence[Item], *, measured: int = MEASURED_ITEMS, together: int = 64
) -> Iterator[Result]:
    """`function` of each item, in order; in threads where the files that it reads make it wait, as a network's do,
    which the `measured` first items show; a thread then takes so many `together`. A local disk's answer so fast that
    threads would only contend for the interpreter's lock, at twice the time."""
    first, rest = items[:measured], items[measured:]
    wall_s, work_s, waits = time.perf_counter(), time.thread_time(), _num_waits()
    yield from [function(item) for item in first]
    if time.perf_counter() - wall_s < 2 * (time.thread_time() - work_s) or _num_waits() == waits:
        yield from map(function, rest)
        return
    with thread_pool(FILE_THREADS, "files") as pool:
        groups = in_groups(rest, together)
        for results in prefetch(lambda group: [function(item) for item in group], groups, pool, 2 * FILE_THREADS):
            yield from results


# ======================================================================================================================
# Reading: trajectories to plans, and to groups of frames at the input's size
# ======================================================================================================================

GROUP_FRAMES = 32  # frames that are read, decoded and handed over together, at most; one by one costs more
GROUP_BYTES = 2 << 20  # bytes of their pixels, at most
OPEN_TRAJECTORIES = 24  # that a reader keeps open; more than are planned ahead


@dataclass(frozen=True)
class TrajectoryResult:
    """What became of one trajectory: completed (chunks durable under their final names) or failed (`error` is set)."""

    name: str
    checksum: str | None  # null where the data could not be read
    checksum_kind: ChecksumKind
    spans: list[Span] = field(default_factory=list)
    chunk_bytes: list[int] = field(default_factory=list)
    left_out: list[Span] = field(default_factory=list)  # kept frames in no chunk, in pieces that travel too little
    replaced: Path | None = None  # the chunks that these replace, set aside
    error: Exception | None = None  # InputError or OSError


class ReadingJob(NamedTuple):
    """What a reader must know of a dataset."""

    spec: CacheSpec
    checksum_kind: ChecksumKind
    store: ChunkStore | None = None  # in which there must be a place for a trajectory's chunks
    label: ChunkLabel | None = None  # theirs; without one, none of an interrupted run are looked for


class Wanted(NamedTuple):
    """Frames of a planned trajectory that a reader shall read."""

    trajectory: Trajectory
    stat_checksum: str
    numbers: list[int]  # of frame_index, ascending
    slot: int | None = None  # of the shared memory in which their pixels shall lie; None: they come with the answer
    camera: str | None = None


class Content(NamedTuple):
    """What was read of a group of frames: the first `count` are good; the one after them is not, where there is an
    error."""

    count: int
    error: Exception | None = None
    pixels: np.ndarray | None = None  # (n, 3, H, W) uint8, where they lie in no slot


class OpenTrajectory(NamedTuple):
    """What is open of a trajectory, or of one of its cameras."""

    source: Source
    frames: FrameReader | None  # None of a format whose frames need not come in one pass


def checksum_of(source: Source, kind: ChecksumKind) -> str:
    """Its checksum; a reader may take longer for the content of large files than it takes to parse anything."""
    if kind == "content":
        FENCE.allow(CONTENT_CPU_S)
    checksum = source.checksum(kind)
    FENCE.allow()
    return checksum


def with_old_rows(plan: TrajectoryPlan) -> TrajectoryPlan:
    """The plan, with where the tokens of its frames lie, where its trajectory is cut anew. Raises InputError."""
    if plan.trajectory.old is None:
        return plan
    return dataclasses.replace(plan, old=open_door(RECUT_MODULE).old_rows(plan))


def open_plan(
    trajectory: Trajectory, job: ReadingJob
) -> tuple[TrajectoryPlan, Source, FrameReader | None] | TrajectoryResult:
    """Open, check and cut a trajectory, for whose chunks there must be a place in the store; a failure is a value. The
    reader is the first camera's; None where no frame is to be encoded."""
    checksum, spec = None, job.spec
    try:
        with input_errors(trajectory.name):
            if job.store is not None:
                job.store.refuse_taken_place(trajectory.name)
            source = open_source(trajectory, data_keys(spec))
            checksum = checksum_of(source, job.checksum_kind)
            plan = with_old_rows(plan_trajectory(trajectory, source, checksum, job.checksum_kind, spec))
            if job.label is not None:
                plan = dataclasses.replace(plan, partial=job.store.partial_of(plan, job.label))
            if not (numbers := plan.numbers_to_encode):
                return plan, source, None
            frames, *others = [open_camera(source, numbers, camera) for camera in spec.cameras]  # checks all of them
            for other in others:
                other.close()
            return plan, source, frames
    except (InputError, OSError) as error:
        return TrajectoryResult(trajectory.name, checksum, job.checksum_kind, error=FENCE.portable(error))


def plan_or_fail(
    trajectory: Trajectory, spec: CacheSpec, checksum_kind: ChecksumKind, store: ChunkStore | None = None
) -> TrajectoryPlan | TrajectoryResult:
    """Check and cut a trajectory; a failure is a value."""
    opened = open_plan(trajectory, ReadingJob(spec, checksum_kind, store))
    if isinstance(opened, TrajectoryResult):
        return opened
    plan, _, frames = opened
    if frames is not None:
        frames.close()
    return plan


def available_memory() -> float:
    """Bytes that the machine has to give, or that this process's control group may have if that is less."""
    available = math.inf
    with contextlib.suppress(OSError), open("/proc/meminfo", "rb") as lines:
        available = next((1024 * int(line.split()[1]) for line in lines if line.startswith(b"MemAvailable:")), math.inf)
    for limit in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):  # "max"
            available = min(available, int(Path("/sys/fs/cgroup", limit).read_bytes()))
    return available


class FrameSlots:
    """Memory that this process and its readers share, in slots of a group of frames each. It has no name that could
    be left behind, and no limit but half of the memory that is available.

    Raises:
        OSError: there is not so much.
    """

    def __init__(self, count: int, shape: tuple[int, ...], descriptor: int | None = None):
        self._count, self._shape = count, shape
        size = count * math.prod(shape)
        if descriptor is None:
            if size > (free := available_memory()) / 2:  # else the kernel would kill somebody for it
                raise OSError(errno.ENOMEM, f"{human_bytes(size)} are wanted, and {human_bytes(free)} are free")
            descriptor = self._new_file()
            os.posix_fallocate(descriptor, 0, size)
        self._descriptor = descriptor
        self.pixels = np.frombuffer(mmap.mmap(descriptor, size), np.uint8).reshape(count, *shape)
        self._free = list(range(count))

    @staticmethod
    def _new_file() -> int:
        if hasattr(os, "memfd_create"):
            return os.memfd_create("dino_cache frames", os.MFD_CLOEXEC)
        with tempfile.TemporaryFile() as file:
            return os.dup(file.fileno())

    def take(self) -> int | None:
        """A slot; None where all are taken."""
        return self._free.pop() if self._free else None

    def give_back(self, slot: int | None) -> None:
        """It may be overwritten."""
        if slot is not None:
            self._free.append(slot)

    def __reduce__(self) -> tuple:  # for a process that is being started
        return _open_slots, (multiprocessing.reduction.DupFd(self._descriptor), self._count, self._shape)

    def close(self) -> None:
        """Give the memory back when nobody looks at it any more."""
        os.close(self._descriptor)


def _open_slots(descriptor: Any, count: int, shape: tuple[int, ...]) -> FrameSlots:
    return FrameSlots(count, shape, descriptor.detach())


class TrajectoryReader:
    """Plans trajectories and reads their frames: for one dataset, in a process of its own or in threads of this one.
    What it opened stays open for a while."""

    def __init__(self, job: ReadingJob, slots: FrameSlots | None = None):
        self._job, self._slots = job, slots
        self._open: OrderedDict[tuple[str, str | None], OpenTrajectory] = OrderedDict()  # by trajectory and camera
        self._lock = threading.RLock()

    @functools.cached_property
    def _decoder(self) -> FrameDecoder:
        return FrameDecoder(self._job.spec)

    def plan(
        self, trajectory: Trajectory, slot: int | None, most: int
    ) -> tuple[TrajectoryPlan | TrajectoryResult, Content | None]:
        """Open, check and cut a trajectory, and read the first frames of it, `most` at most."""
        opened = open_plan(trajectory, self._job)
        if isinstance(opened, TrajectoryResult):
            return opened, None
        plan, source, frames = opened
        plan = dataclasses.replace(plan, read=None)  # much to send, and only an estimate asks for it
        if frames is None:
            return plan, None
        numbers, camera = plan.numbers_to_encode[:most], self._job.spec.cameras[0]
        wanted = Wanted(trajectory, plan.stat_checksum, numbers, slot, camera)
        self._keep(wanted, source, frames if format_named(trajectory.format).frames == "stream" else None)
        return plan, self.read(wanted) if most else None

    def read(self, wanted: Wanted) -> Content:
        """Read and decode a group of frames, of a trajectory that may have been planned elsewhere."""
        name, numbers, count = wanted.trajectory.name, wanted.numbers, 0
        if wanted.slot is None:
            pixels = np.empty((len(numbers), 3, *self._job.spec.image_size), np.uint8)
        else:
            pixels = self._slots.pixels[wanted.slot]
        try:
            with input_errors(name):
                frames = self._frame_reader(wanted)
                for number, content in zip(numbers, frames.read(numbers), strict=True):
                    with PROFILE("decode"):
                        take = self._decoder if content.ndim == 1 else self._decoder.fit
                        pixels[count] = take(content, frames.name(number)).numpy()
                    count += 1
                    FENCE.getting_on()
        except (InputError, OSError) as error:
            self._drop(self._place(wanted))
            return Content(count, FENCE.portable(error), None if wanted.slot is not None else pixels)
        return Content(count, None, None if wanted.slot is not None else pixels)

    def name(self, wanted: Wanted) -> str:
        """The first of those frames, for messages."""
        with input_errors(wanted.trajectory.name):
            return self._frame_reader(wanted).name(wanted.numbers[0])

    @staticmethod
    def _place(wanted: Wanted) -> tuple[str, str | None]:
        """Under which what is open is kept; where frames come in one pass, each camera's is another."""
        is_stream = format_named(wanted.trajectory.format).frames == "stream"
        return wanted.trajectory.name, wanted.camera if is_stream else None

    def _frame_reader(self, wanted: Wanted) -> FrameReader:
        with self._lock:
            opened = self._open.get(self._place(wanted)) or self._open_again(wanted)
        return opened.frames or open_camera(opened.source, wanted.numbers, wanted.camera)

    def _open_again(self, wanted: Wanted) -> OpenTrajectory:
        """Open what was planned in another process, or so long ago that it is closed.

        Raises:
            InputError, OSError: that is not possible any more, or it is not the same.
        """
        trajectory, spec = wanted.trajectory, self._job.spec
        source = open_source(trajectory, data_keys(spec))
        if (checksum := source.checksum("stat")) != wanted.stat_checksum:
            raise InputError(f"{trajectory.name}: its data changed while it was read; run the same command again")
        frames = None
        if format_named(trajectory.format).frames == "stream":
            rest = with_old_rows(plan_trajectory(trajectory, source, checksum, "stat", spec)).numbers_to_encode
            frames = open_camera(source, rest[rest.index(wanted.numbers[0]) :], wanted.camera)
        return self._keep(wanted, source, frames)

    def _keep(self, wanted: Wanted, source: Source, frames: FrameReader | None) -> OpenTrajectory:
        with self._lock:
            self._open[self._place(wanted)] = opened = OpenTrajectory(source, frames)
            surplus = list(self._open)[:-OPEN_TRAJECTORIES]
        for closed in surplus:
            self._drop(closed)
        return opened

    def _drop(self, place: tuple[str, str | None]) -> None:
        with self._lock:
            opened = self._open.pop(place, None)
        if opened is not None and opened.frames is not None:
            opened.frames.close()

    def close(self) -> None:
        """Close what is open."""
        for place in list(self._open):
            self._drop(place)


class ReaderThreads:
    """A reader in threads of this process, for data that may be read here."""

    def __init__(self, job: ReadingJob | None, count: int, slots: FrameSlots | None = None, method: str = ""):
        self._reader = TrajectoryReader(job, slots)
        self._threads = ThreadPoolExecutor(count, "read", one_torch_thread)

    def submit(
        self, function: Callable[..., Result], *arguments: Any, about: str, home: Hashable = None
    ) -> Future[Result]:
        """Begin function(reader, *arguments)."""
        return self._threads.submit(function, self._reader, *arguments)

    def leave(self, home: Hashable) -> None:
        """All are at home here."""

    def close(self) -> None:
        """Finish what is begun, and nothing more."""
        self._threads.shutdown(cancel_futures=True)
        self._reader.close()


# ======================================================================================================================
# Reader processes: others' bytes are parsed where they can do no harm
# ======================================================================================================================
# concurrent.futures.ProcessPoolExecutor does not fit: there, one death breaks the whole pool, nothing has a time limit,
# and a request cannot be sent to the process that has the trajectory open.

READER_SILENCE_S = 60.0  # without an answer, and without processor time or bytes read, after which a read hangs
READER_LOOK_S = 1.0  # time between two looks at that
READ_AT_ONCE = 32  # trajectories that a reader looks at in one go, before the work
READER_REQUESTS = 2  # that a process has at once: the next one is there when it is done with one
PIPE_BYTES = 1 << 16  # of requests that a pipe takes before they are read, at least
MOST_KILLS = 3  # of the process that works on one request, from outside, after which the machine is at fault
CRASHES = {signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGXCPU}
HELD_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2}  # of a whole group
READING_LIBRARIES = ("torch", "PIL.Image", "PIL.ImageOps")
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
_STARTING = threading.Lock()
_STARTED: set[int] = set()  # fork servers that start_fork_server started


@contextlib.contextmanager
def _starting_process() -> Iterator[None]:
    """While a process is started: it shall not run the user's script again, which holds nothing that it needs; and
    signals to the whole group are held back from it, since the run itself ends it."""
    with _STARTING:
        main, held = sys.modules["__main__"], signal.pthread_sigmask(signal.SIG_BLOCK, HELD_SIGNALS)
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main
            signal.pthread_sigmask(signal.SIG_SETMASK, held)


def start_fork_server(libraries: Sequence[str] = ()) -> None:
    """Start the process from which readers are forked, unless it is there. It imports the libraries, once for all and
    beside this process's own imports, has no threads, and never touches a GPU. It ends when this process does."""
    variables = {**ONE_THREAD, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # Python's own way is broken
    before = {key: os.environ.get(key) for key in variables}
    forkserver.set_forkserver_preload([__name__, *libraries])
    resource_tracker.ensure_running()  # now: starting it lets SIGINT and SIGTERM through again, to the fork server too
    with _starting_process():
        os.environ.update(variables)
        before_it = forkserver._forkserver._forkserver_pid
        try:
            forkserver.ensure_running()
            _STARTED.update({forkserver._forkserver._forkserver_pid} - {before_it})
        finally:
            for key, value in before.items():
                if value is None:
                    del os.environ[key]
                else:
                    os.environ[key] = value


def stop_fork_server() -> None:
    """End the process that start_fork_server started, whatever it is at: importing takes it seconds, in which it would
    hold the run's output open. One that was there before stays."""
    if (pid := forkserver._forkserver._forkserver_pid) in _STARTED:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)
        forkserver._forkserver._stop()
        _STARTED.discard(pid)


@dataclass(eq=False)
class _Request:
    """What a reader is asked."""

    call: bytes  # (function, arguments)
    about: str  # the trajectory, for messages
    home: Hashable  # it and a camera, where one process has to read that from begin to end; else None
    future: Future = field(default_factory=Future)
    crashes: int = 0
    kills: int = 0


class _ReaderProcess:
    """One process, as those see it who ask it."""

    def __init__(self, context: Any, job: ReadingJob | None, slots: FrameSlots | None, limits: FenceLimits):
        self.connection, theirs = context.Pipe()
        arguments = (theirs, job, slots, limits)
        self.process = context.Process(target=serve_reader, args=arguments, name="reader", daemon=True)
        with _starting_process():
            self.process.start()
        theirs.close()
        self.asked: deque[_Request] = deque()  # in order; it is at the first
        self.own: deque[_Request] = deque()  # that no other one can answer, and it has no room for yet
        self.heard_at, self._signs = time.monotonic(), None

    def ask(self, request: _Request) -> None:
        """Send it a request. One that is dead already is buried by who waits for its answers."""
        if not self.asked:
            self.heard_at = time.monotonic()
        self.asked.append(request)
        with contextlib.suppress(OSError):
            self.connection.send_bytes(request.call)

    def has_room(self, waiting: deque[_Request]) -> bool:
        """Whether there is something to ask it and it has room for that. A large request does not fit into the pipe
        beside another one: whoever sends it would wait until the process is done."""
        first = next(iter(self.own or waiting), None)
        return first is not None and len(self.asked) < (READER_REQUESTS if len(first.call) < PIPE_BYTES else 1)

    def is_silent(self, unwatched_s: float) -> bool:
        """Whether it has been at something for too long without an answer and any sign of life; what time nobody
        looked does not count: then the run may have been suspended, and its readers with it."""
        self.heard_at += unwatched_s
        now, signs = time.monotonic(), _signs_of_life(self.process.pid)
        if not self.asked or signs != self._signs:
            self._signs, self.heard_at = signs, now
        return now - self.heard_at > READER_SILENCE_S

    def end(self, *, is_dead: bool, wait_s: float = 5.0) -> int:
        """See that it is gone; returns its exit status, negative where a signal ended it."""
        if is_dead:  # its status is on its way
            self.process.join(wait_s)
        self.process.kill()
        self.process.join(wait_s)
        self.connection.close()
        if (status := self.process.exitcode) is None:  # in a read that cannot be interrupted: it dies after it
            multiprocessing.process._children.discard(self.process)  # nobody shall wait for it at the end
            return 255
        return status


class ReaderProcesses:
    """Processes that read trajectories, each started when there is work for it and replaced when it dies.

    A request that crashes its process twice, or overruns it, is at fault itself: FatalDataError. One whose process is
    killed from outside is tried again, and at the third time the machine is at fault: MachineError.
    """

    def __init__(
        self,
        job: ReadingJob | None,
        count: int,
        slots: FrameSlots | None = None,
        method: Literal["forkserver", "spawn"] = "forkserver",
    ):
        self._job, self._count, self._slots = job, count, slots
        self._context = multiprocessing.get_context(method)
        self._limits = FenceLimits(READER_MEMORY_BYTES, READER_CPU_S)
        self._processes: list[_ReaderProcess] = []
        self._waiting: deque[_Request] = deque()
        self._homes: dict[Hashable, _ReaderProcess] = {}
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._is_closing = False
        self._thread = threading.Thread(target=self._receive, name="readers", daemon=True)
        if method == "forkserver":
            start_fork_server()  # where nobody has
        self._thread.start()

    def submit(
        self, function: Callable[..., Result], *arguments: Any, about: str, home: Hashable = None
    ) -> Future[Result]:
        """Have function(reader, *arguments) called in a process; all calls with one home in the same."""
        request = _Request(bytes(multiprocessing.reduction.ForkingPickler.dumps((function, arguments))), about, home)
        with self._lock:
            if self._is_closing:
                request.future.cancel()
                return request.future
            process = self._homes.get(home) if home is not None else None
            (self._waiting if process is None else process.own).append(request)
            self._hand_out()
        return request.future

    def leave(self, home: Hashable) -> None:
        """Nothing more is asked with this home."""
        with self._lock:
            self._homes.pop(home, None)

    def close(self) -> None:
        """End all processes, whatever they are at."""
        with self._lock:
            self._is_closing = True
            for process in self._processes:
                process.process.kill()
        self._thread.join()
        self._fail_all(CancelledError())
        for process in self._processes:
            process.end(is_dead=False, wait_s=2.0)
        self._selector.close()

    def _fail_all(self, error: BaseException) -> None:
        """Nobody shall wait for an answer that will not come."""
        with self._lock:
            self._is_closing = True
            unanswered = [*self._waiting]
            for process in self._processes:
                unanswered += [*process.asked, *process.own]
        for request in unanswered:
            if not request.future.cancel() and not request.future.done():
                request.future.set_exception(error)

    def _hand_out(self) -> None:
        """Give what waits to processes that have room for it. With the lock."""
        while True:
            by_load = sorted(self._processes, key=lambda process: len(process.asked))
            process = next((process for process in by_load if process.has_room(self._waiting)), None)
            if self._waiting and (process is None or process.asked) and len(self._processes) < self._count:
                process = self._start() or process
            if process is None:
                return
            is_at_home = bool(process.own)
            request = (process.own or self._waiting).popleft()
            if not request.future.running() and not request.future.set_running_or_notify_cancel():
                continue
            if request.home is not None and not is_at_home:
                host = self._homes.setdefault(request.home, process)
                if host is not process:
                    host.own.append(request)
                    continue
            process.ask(request)

    def _start(self) -> _ReaderProcess | None:
        """Another process; None where there can be no more than there are."""
        try:
            process = _ReaderProcess(self._context, self._job, self._slots, self._limits)
        except OSError as error:
            if not self._processes:
                raise MachineError(
                    f"cannot start a process that reads data: {error}; may this user start {sys.executable}?"
                ) from error
            self._count = len(self._processes)
            return None
        self._processes.append(process)
        self._selector.register(process.connection, selectors.EVENT_READ, process)
        return process

    def _receive(self) -> None:
        """Take the answers, in a thread of its own."""
        looked_at = time.monotonic()
        try:
            while not self._is_closing:
                for key, _ in self._selector.select(READER_LOOK_S):
                    self._take_answer(key.data)
                if (now := time.monotonic()) - looked_at > READER_LOOK_S:
                    unwatched_s, looked_at = max(0.0, now - looked_at - 2 * READER_LOOK_S), now
                    for process in [process for process in self._processes if process.is_silent(unwatched_s)]:
                        self._bury(process, is_silent=True)
        except Exception as error:
            self._fail_all(error)

    def _take_answer(self, process: _ReaderProcess) -> None:
        try:
            value, error, seconds = process.connection.recv()
        except (EOFError, OSError):
            if not self._is_closing:
                self._bury(process)
            return
        except Exception as fault:  # what libraries put into their errors need not be there
            value, error, seconds = None, InputError(f"{process.asked[0].about}: an answer cannot be read: {fault}"), {}
        for stage, elapsed_s in seconds.items():
            PROFILE.add(stage, elapsed_s, worker=process.process.pid)
        with self._lock:
            request = process.asked.popleft()
            process.heard_at = time.monotonic()
            self._hand_out()
        if isinstance(error, MemoryError):
            error = beyond_memory(request.about, self._limits)
        if error is None:
            request.future.set_result(value)
        else:
            request.future.set_exception(error)

    def _bury(self, process: _ReaderProcess, *, is_silent: bool = False) -> None:
        """Remove a process that died, or gives no sign of life; what it was asked is tried again, or fails."""
        self._selector.unregister(process.connection)
        status = process.end(is_dead=not is_silent)
        fault = None
        with self._lock:
            self._processes.remove(process)
            for home in [home for home, host in self._homes.items() if host is process]:
                del self._homes[home]
            if process.asked:
                fault = _fault(process.asked[0], status, is_silent=is_silent)
            failed = process.asked.popleft() if fault else None
            self._waiting.extendleft(reversed([*process.asked, *process.own]))
            if not self._is_closing:
                self._hand_out()
        if failed is not None:
            failed.future.set_exception(fault)


def _signs_of_life(pid: int) -> list[Any]:
    """A process's processor time and the number of bytes that it has read."""
    signs = []
    with contextlib.suppress(OSError):
        signs.append(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[11:13])
    with contextlib.suppress(OSError):
        signs.append(Path(f"/proc/{pid}/io").read_bytes().split()[1])
    return signs


def _fault(request: _Request, status: int, *, is_silent: bool) -> Exception | None:
    """What the death of the process that was at it means for a request; None: it is tried again."""
    where = request.about
    if is_silent:
        return OSError(errno.EIO, f"no answer and no sign of life from who reads it in {READER_SILENCE_S:.0f} s", where)
    if -status == signal.SIGXCPU:  # the task's own, however busy the machine is: once is enough
        return FatalDataError(f"{where}: takes more than {READER_CPU_S} s of processor time to be read")
    if -status in CRASHES:
        request.crashes += 1
        name = signal.Signals(-status).name
        fault = FatalDataError(f"{where}: crashes the process that reads it ({name}), tried {request.crashes} times")
        return fault if request.crashes > 1 else None
    request.kills += 1
    if request.kills < MOST_KILLS:
        return None
    how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
    return MachineError(
        f"{where}: the process that read it ended {request.kills} times {how}, from outside: for lack of memory? Free "
        "some, or lower decode_workers, and run the same command again"
    )


def read_checksum(_: TrajectoryReader, trajectory: Trajectory, keys: DataKeys, kind: ChecksumKind) -> str:
    """A trajectory's checksum. Runs in a reader."""
    with input_errors(trajectory.name):
        return checksum_of(open_source(trajectory, keys), kind)


def died(
    readers: ReaderThreads | ReaderProcesses,
    trajectory: Trajectory,
    error: Exception,
    job: ReadingJob,
    should_stop: Callable[[], bool],
) -> TrajectoryResult:
    """The result of one whose reader died at it, with the checksum by which a change of its data will be seen."""
    keys, kind, checksum = data_keys(job.spec), job.checksum_kind, None
    future = readers.submit(read_checksum, trajectory, keys, kind, about=trajectory.name)
    with contextlib.suppress(InputError, OSError):
        checksum = future.result() if _wait(future, should_stop) else None
    return TrajectoryResult(trajectory.name, checksum, kind, error=error)


def in_readers(
    readers: ReaderThreads | ReaderProcesses,
    function: Callable[..., list[Result]],
    items: Iterable[Item],
    *arguments: Any,
    failure: Callable[[Item, Exception], Result],
    name_of: Callable[[Item], str] = lambda item: item.name,
    should_stop: Callable[[], bool],
) -> Iterator[Result]:
    """function(reader, items, *arguments) of all, in order, many together; those at which a reader dies are found one
    by one, and have `failure` in its place. Ends early where the run shall stop."""
    about = "one of many trajectories"
    groups = in_groups(items, READ_AT_ONCE)
    depth = 2 * available_cores() + 1
    begun = under_way(
        lambda group: readers.submit(function, group, *arguments, about=about), groups, depth, should_stop=should_stop
    )
    for group, future in begun:
        if future.exception() is None:
            yield from future.result()
            continue
        for item in group:
            single = readers.submit(function, [item], *arguments, about=name_of(item))
            if not _wait(single, should_stop):
                return
            try:
                yield from single.result()
            except (InputError, OSError) as error:
                yield failure(item, error)


def serve_reader(connection: Any, job: ReadingJob | None, slots: FrameSlots | None, limits: FenceLimits) -> None:
    """Answer requests until the process at the other end goes away. Runs in a reader process."""
    if (alive := getattr(forkserver._forkserver, "_forkserver_alive_fd", None)) is not None:
        os.close(alive)  # with it the fork server, and so this process, would outlive a run that is killed
    FENCE.set_up(limits)
    if "torch" in sys.modules:
        one_torch_thread()
    reader = TrajectoryReader(job, slots)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        FENCE.allow()
        value = error = None
        try:
            value = function(reader, *arguments)
        except Exception as fault:
            error = FENCE.portable(fault)
        try:
            connection.send((value, error, PROFILE.take()))
        except MemoryError:  # of what is open so much is kept that no answer can be made; nothing of it is sent yet
            value = error = None
            reader.close()
            connection.send((None, MemoryError(), {}))


# ======================================================================================================================
# Pipeline: one stream of frames through all trajectories
# ======================================================================================================================

PLANS_AHEAD = 16  # trajectories whose poses are read before their frames are wanted
FRAMES_PLANNED_AHEAD = 2048  # the same bound in frames, where a trajectory's number of frames is known
WRITE_BACKLOG = 2  # encoded batches that may wait for the disk; more would only fill memory


class Rows(NamedTuple):
    """Kept frames of one trajectory and camera: (n,), ascending."""

    plan: TrajectoryPlan
    rows: np.ndarray
    camera: str | None = None


@dataclass(frozen=True)
class Batch:
    """B frames of one or many trajectories: pixels (B, 3, H, W) uint8."""

    parts: list[Rows]  # B rows in all
    pixels: torch.Tensor


@dataclass(frozen=True)
class EncodedBatch:
    """A batch, or a part of one, with its tokens."""

    parts: list[Rows]
    rows: EncodedRows


class FailedTrajectories:
    """Names of trajectories that failed under way, known to all threads of the stream."""

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._lock = threading.Lock()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def add(self, name: str) -> bool:
        """Count the trajectory as failed; true for the first thread that says so, which has to report it."""
        with self._lock:
            is_first = name not in self._names
            self._names.add(name)
            return is_first


@dataclass(frozen=True)
class Hooks:
    """How a run watches and steers the stream."""

    # Asked by every thread of the stream, again and again. True: finish or drop what is in flight.
    should_stop: Callable[[], bool] = lambda: False
    # Called by the thread that iterates over the results, when so many frames more are encoded.
    on_encoded: Callable[[int], None] = lambda count: None
    # Called by the writer thread (with Ray, by the driver's main thread while the worker waits) when a trajectory's new
    # chunks are durable in staging and its old folder is about to be renamed away. It must withdraw the record durably
    # before it returns: a run killed between the two renames would else leave a record of chunks that are gone.
    before_replacing: Callable[[str], None] = lambda name: None
    # Asked by the thread that plans ahead. Of trajectories with many frames fewer are planned; 0: not known.
    num_frames_of: Callable[[str], int] = lambda name: 0


class FrameGroup(NamedTuple):
    """Consecutive stored frames of one trajectory and camera, to be read or read; the pixels of those that are good."""

    plan: TrajectoryPlan
    rows: np.ndarray  # (n,) kept frames
    slot: int | None  # where their pixels lie; None: they come with the content
    content: Content | None = None
    pixels: np.ndarray | None = None  # (n, 3, H, W) uint8
    camera: str | None = None


class FrameStream:
    """All trajectories' stored frames, in groups, read ahead and in order; failures are values. Of several cameras,
    each has the same frames in its turn, a group at a time."""

    def __init__(self, job: ReadingJob, options: RunOptions, batch_size: int, batches_ahead: int, hooks: Hooks):
        workers = available_cores() if options.decode_workers == "auto" else options.decode_workers
        shape = (3, *job.spec.image_size)
        self._job, self._hooks, self._cameras = job, hooks, job.spec.cameras
        self._group_frames = max(1, min(GROUP_FRAMES, GROUP_BYTES // math.prod(shape), batch_size))
        self._groups_ahead = max(2 * workers, 2 * batch_size * batches_ahead // self._group_frames)
        self._plans_ahead = max(PLANS_AHEAD, 2 * workers)
        self._slots = self._threads = None
        if options.readers == "threads":
            self._threads = ReaderThreads(job, workers)
        try:
            self._slots = FrameSlots(self._plans_ahead + self._groups_ahead + 2, (self._group_frames, *shape))
        except OSError as error:
            LOG.warning("No shared memory (%s): frames come from their readers through pipes, more slowly", error)
        start_fork_server(() if self._threads else READING_LIBRARIES)  # where nobody has
        self._processes = ReaderProcesses(job, workers, self._slots)

    def close(self) -> None:
        """End the readers."""
        self._processes.close()
        if self._threads is not None:
            self._threads.close()
        if self._slots is not None:
            self._slots.close()

    def groups(
        self, trajectories: Iterable[Trajectory], failed: FailedTrajectories
    ) -> Iterator[FrameGroup | TrajectoryPlan | TrajectoryResult]:
        """Every stored frame of every trajectory, but those whose tokens are in old chunks; the plan of one that has no
        others. The rest of one that failed is left out. A group's pixels are there until the next is asked for."""
        stop = self._hooks.should_stop
        taken = ((trajectory, self._take_slot(trajectory)) for trajectory in trajectories)
        plans = under_way(self._begin_plan, taken, self._plans_ahead, weigh=self._weigh, should_stop=stop)
        wanted = self._wanted(plans, failed)
        for item, future in under_way(self._begin_read, wanted, self._groups_ahead, should_stop=stop):
            group = item
            if isinstance(group, FrameGroup):
                if future is not None:
                    group = group._replace(content=self._content(group.plan, future))
                inside = group.content.pixels
                if inside is None and group.slot is not None:
                    inside = self._slots.pixels[group.slot]
                group = group._replace(pixels=inside)
            yield group
            if isinstance(group, FrameGroup) and group.slot is not None:
                self._slots.give_back(group.slot)

    def _wanted(
        self, plans: Iterator[tuple[tuple[Trajectory, int | None], Future]], failed: FailedTrajectories
    ) -> Iterator[FrameGroup | TrajectoryPlan | TrajectoryResult]:
        """What is to be read, and what is known already."""
        for (trajectory, slot), future in plans:
            try:
                plan, first = future.result()
            except (InputError, OSError) as error:
                plan, first = died(self._processes, trajectory, error, self._job, self._hooks.should_stop), None
            if first is None and slot is not None:
                self._slots.give_back(slot)
            if isinstance(plan, TrajectoryResult) or not len(plan.rows_to_encode):
                self._leave(trajectory)
                yield plan
                continue
            starts = range(0, len(plan.rows_to_encode), self._group_frames)
            for start, camera in itertools.product(starts, self._cameras):
                rows = plan.rows_to_encode[start : start + self._group_frames]
                if first is not None:  # of the first camera
                    yield FrameGroup(plan, rows, slot, first, camera=camera)
                    first = None
                    continue
                if self._hooks.should_stop():
                    return
                if trajectory.name in failed:
                    break
                yield FrameGroup(plan, rows, self._take_slot(trajectory), camera=camera)
            self._leave(trajectory)

    def _is_read_in_threads(self, trajectory: Trajectory) -> bool:
        return self._threads is not None and format_named(trajectory.format).frames == "files"

    def _take_slot(self, trajectory: Trajectory) -> int | None:
        if self._slots is None or self._is_read_in_threads(trajectory):
            return None
        return self._slots.take()

    def _weigh(self, item: tuple[Trajectory, int | None]) -> int:
        return 1 + self._hooks.num_frames_of(item[0].name) * self._plans_ahead // FRAMES_PLANNED_AHEAD

    def _begin_plan(self, item: tuple[Trajectory, int | None]) -> Future:
        trajectory, slot = item
        most = 0 if self._is_read_in_threads(trajectory) else self._group_frames
        return self._submit(self._processes, TrajectoryReader.plan, trajectory, slot, most)

    def _begin_read(self, item: FrameGroup | TrajectoryPlan | TrajectoryResult) -> Future | None:
        if not isinstance(item, FrameGroup) or item.content is not None:
            return None
        plan = item.plan
        readers = self._threads if self._is_read_in_threads(plan.trajectory) else self._processes
        numbers = plan.frame_index[item.rows].tolist()
        wanted = Wanted(plan.trajectory, plan.stat_checksum, numbers, item.slot, item.camera)
        return self._submit(readers, TrajectoryReader.read, wanted)

    def _submit(self, readers: ReaderThreads | ReaderProcesses, function: Callable, first: Any, *others: Any) -> Future:
        of_frames = isinstance(first, Wanted)
        trajectory, camera = (first.trajectory, first.camera) if of_frames else (first, self._cameras[0])
        home = (trajectory.name, camera) if format_named(trajectory.format).frames == "stream" else None
        return readers.submit(function, first, *others, about=trajectory.name, home=home)

    def _leave(self, trajectory: Trajectory) -> None:
        """No more is asked of it."""
        for camera in self._cameras:
            self._processes.leave((trajectory.name, camera))

    @staticmethod
    def _content(plan: TrajectoryPlan, future: Future) -> Content:
        try:
            return future.result()
        except (InputError, OSError) as error:
            return Content(0, error)

    def frame_name(self, plan: TrajectoryPlan, row: int, camera: str | None) -> str:
        """A kept frame of a camera, for messages."""
        number = int(plan.frame_index[row])
        readers = self._threads if self._is_read_in_threads(plan.trajectory) else self._processes
        wanted = Wanted(plan.trajectory, plan.stat_checksum, [number], camera=camera)
        try:
            return self._submit(readers, TrajectoryReader.name, wanted).result()
        except (InputError, OSError, CancelledError):
            return f"{camera_name(plan.trajectory.name, camera)}: frame {number}"


def full_batches(
    groups: Iterable[FrameGroup | TrajectoryPlan | TrajectoryResult],
    new_pixels: Callable[[int], torch.Tensor],
    batch_size: int,
    failed: FailedTrajectories,
    should_stop: Callable[[], bool],
) -> Iterator[Batch | TrajectoryPlan | TrajectoryResult]:
    """Gather frames into batches of `batch_size`, across trajectory borders; only the last one may be smaller.

    What is no frames is passed on at once; frames of a failed trajectory that come later are dropped. When stopping,
    the batch begun is dropped too.
    """
    with device_errors("making room for a batch"):
        pixels, parts, filled = new_pixels(batch_size), [], 0
    for group in groups:
        if should_stop():
            return
        if not isinstance(group, FrameGroup):
            yield group
            continue
        plan, done, count = group.plan, 0, group.content.count
        while done < count and plan.trajectory.name not in failed:
            stop = done + min(batch_size - filled, count - done)
            taken = slice(filled, filled + stop - done)
            pixels.numpy()[taken] = group.pixels[done:stop]  # torch would wake threads for each of these copies
            parts.append(Rows(plan, group.rows[done:stop], group.camera))
            filled, done = taken.stop, stop
            if filled == batch_size:
                yield Batch(parts, pixels)
                with device_errors("making room for a batch"):
                    pixels, parts, filled = new_pixels(batch_size), [], 0
        if group.content.error is not None and plan.trajectory.name not in failed:
            yield from _fail(plan, group.content.error, failed)
    if parts and not should_stop():
        yield Batch(parts, pixels[:filled])


def _fail(plan: TrajectoryPlan, error: Exception, failed: FailedTrajectories) -> list[TrajectoryResult]:
    """The result of a trajectory that fails under way, unless it failed already; its other frames, wherever they are in
    the stream, are void."""
    if not failed.add(plan.trajectory.name):
        return []
    return [TrajectoryResult(plan.trajectory.name, plan.checksum, plan.checksum_kind, error=error)]


def cut_parts(parts: list[Rows], start: int, stop: int) -> list[Rows]:
    """Those of rows [start, stop) of all parts together."""
    cut, first = [], 0
    for part in parts:
        inside = part.rows[max(0, start - first) : max(0, stop - first)]
        if len(inside):
            cut.append(part._replace(rows=inside))
        first += len(part.rows)
    return cut


def encode_batches(
    encoder: Encoder,
    batches: Iterable[Batch | TrajectoryPlan | TrajectoryResult],
    on_encoded: Callable[[int], None],
    should_stop: Callable[[], bool],
) -> Iterator[EncodedBatch | TrajectoryPlan | TrajectoryResult]:
    """Encode each batch, in order, with up to `encoder.batches_in_flight` more under way on the device; it comes out in
    the parts that the device took. When stopping, what is under way is finished, and what has not begun is dropped.

    Raises:
        DeviceError: the encoder fails, or a single frame does not fit into the device's memory.
    """
    in_flight: deque[tuple[Batch, list[Callable[[], EncodedRows]]]] = deque()
    largest = encoder.most_rows  # at once; halved whenever the device runs out of memory

    def finish() -> Iterator[EncodedBatch]:
        batch, parts = in_flight[0]
        start = 0
        for part in parts:
            if should_stop():
                encoder.drop()
            with device_errors("the encoder"):
                rows = part()
            stop = start + len(rows.finite)
            on_encoded(stop - start)
            yield EncodedBatch(cut_parts(batch.parts, start, stop), rows)
            start = stop
        in_flight.popleft()

    try:
        for batch in batches:
            if not isinstance(batch, Batch):
                yield batch
                continue
            with device_errors("the encoder"):
                parts, largest = _encode_within_memory(encoder, batch.pixels, largest)
            in_flight.append((batch, parts))
            if len(in_flight) > encoder.batches_in_flight:
                yield from finish()
        while in_flight:
            yield from finish()
    except CancelledError:  # the stop above dropped it, and all behind it
        return
    finally:
        if in_flight:  # nobody will take their results
            encoder.drop()


def _encode_within_memory(
    encoder: Encoder, pixels: torch.Tensor, largest: int
) -> tuple[list[Callable[[], EncodedRows]], int]:
    """Start encoding in parts of at most `largest` rows, halving on out-of-memory; returns the parts and the limit."""
    import torch

    largest = min(largest, len(pixels))
    while True:
        try:
            return [encoder.encode(part) for part in pixels.split(largest)], largest
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            if largest == 1:
                raise RuntimeError(f"one frame does not fit into the device's memory: {error}") from error
        largest = (largest + 1) // 2  # outside the except clause, whose traceback keeps tensors alive
        torch.cuda.empty_cache()
        LOG.warning("Out of device memory: going on with batches of %d frames; set batch_size to avoid this", largest)


class StreamWriter:
    """The end of the stream: cuts encoded batches into chunks and publishes trajectories. Used from one thread.

    Frames arrive in the order of the stream, so at most one trajectory is open; one without frames to encode is written
    in one go, while it is.
    """

    def __init__(
        self,
        store: ChunkStore,
        label: ChunkLabel,
        failed: FailedTrajectories,
        before_replacing: Callable[[str], None],
        frame_name: Callable[[TrajectoryPlan, int, str | None], str],
        should_stop: Callable[[], bool],
    ):
        self._store, self._label, self._failed = store, label, failed
        self._before_replacing, self._frame_name, self._should_stop = before_replacing, frame_name, should_stop
        self._open: TrajectoryWriter | None = None

    def write(self, item: EncodedBatch | TrajectoryPlan | TrajectoryResult) -> list[TrajectoryResult]:
        """Take the next item; returns the trajectories that it finished, or failed.

        Raises:
            StorageError: the cache's disk fails.
        """
        with storage_errors(self._store.cache_dir), PROFILE("write"):
            if isinstance(item, TrajectoryResult):
                if self._open is not None and self._open.plan.trajectory.name == item.name:
                    self.close(keep=isinstance(item.error, OSError))  # what cannot be read tonight proves nothing
                return [item]
            if isinstance(item, TrajectoryPlan):
                return self._write_old(item)
            runs = _runs_of_one_camera(item)
            return [result for run in runs for result in self._write_rows(*run)]

    def _write_rows(self, part: Rows, encoded: EncodedRows) -> list[TrajectoryResult]:
        plan, rows, camera = part
        name = plan.trajectory.name
        if name in self._failed:
            return []
        if not encoded.finite.all():
            frame = self._frame_name(plan, int(rows[int(np.argmin(encoded.finite))]), camera)
            return self._give_up(plan, InvalidDataError(f"{frame}: its features are not finite"))
        if self._open is None:
            self._open = self._new_writer(plan)
        try:
            self._open.write(rows, encoded.tokens, camera)
        except InputError as error:  # an old chunk is damaged
            return self._give_up(plan, error)
        return self._publish() if self._open.is_complete else []

    def _write_old(self, plan: TrajectoryPlan) -> list[TrajectoryResult]:
        """Write a trajectory all of whose tokens are in old chunks; the one that is open waits."""
        waiting, self._open = self._open, None
        try:
            self._open = self._new_writer(plan)
            self._open.write_rest()
            return self._publish() if self._open.is_complete else []
        except InputError as error:
            return self._give_up(plan, error)
        finally:
            self.close()
            self._open = waiting

    def _new_writer(self, plan: TrajectoryPlan) -> TrajectoryWriter:
        folder = self._store.new_chunks_folder(plan)
        if plan.old is None:
            return TrajectoryWriter(folder, plan, self._label)
        return open_door(RECUT_MODULE).RecutWriter(folder, plan, self._label, self._should_stop)

    def _publish(self) -> list[TrajectoryResult]:
        writer, plan = self._open, self._open.plan
        name = plan.trajectory.name
        try:
            self._store.refuse_taken_place(name)
            replaced = self._store.publish(writer.folder, name, self._before_replacing)
        except PlaceTakenError as error:
            return self._give_up(plan, error)
        except OSError as error:
            if error.errno not in (*NAME_FAULTS, *ACCESS_FAULTS):
                raise
            where = self._store.folder(name)
            reason = f"{name}: cannot make {where}: {error.strerror}; rename it, or make way"
            return self._give_up(plan, PlaceTakenError(reason))
        self._open = None
        result = TrajectoryResult(
            name=name,
            checksum=plan.checksum,
            checksum_kind=plan.checksum_kind,
            spans=plan.spans,
            chunk_bytes=writer.chunk_bytes,
            left_out=plan.left_out(),
            replaced=replaced,
        )
        return [result]

    def _give_up(self, plan: TrajectoryPlan, error: InputError) -> list[TrajectoryResult]:
        self.close(keep=False)
        return _fail(plan, error, self._failed)

    def close(self, *, keep: bool = True) -> None:
        """Leave the trajectory begun, if any; its finished chunks stay for the next run unless it failed."""
        if self._open is not None:
            self._open.abandon(keep=keep)
            self._open = None


class NoWriter:
    """The end of a stream that is only measured: nothing is written, and no trajectory is completed."""

    def write(self, item: EncodedBatch | TrajectoryPlan | TrajectoryResult) -> list[TrajectoryResult]:
        """Pass failures on."""
        return [item] if isinstance(item, TrajectoryResult) else []

    def close(self) -> None:
        """Nothing is open."""


def _runs_of_one_camera(batch: EncodedBatch) -> Iterator[tuple[Rows, EncodedRows]]:
    """Cut a batch where the trajectory or the camera changes: kept frames, and their rows."""
    start = 0
    for _, parts in itertools.groupby(batch.parts, lambda part: (id(part.plan), part.camera)):
        run = list(parts)
        rows = np.concatenate([part.rows for part in run])
        stop = start + len(rows)
        tokens = {name: values[start:stop] for name, values in batch.rows.tokens.items()}
        yield run[0]._replace(rows=rows), EncodedRows(tokens, batch.rows.finite[start:stop])
        start = stop


def resolve_batch_size(options: RunOptions, encoder: Encoder) -> int:
    """Frames per batch: the user's, or what suits the encoder's device."""
    return encoder.default_batch_size if options.batch_size == "auto" else options.batch_size


def cache_trajectories(
    trajectories: Iterable[Trajectory],
    label: ChunkLabel,
    options: RunOptions,
    encoder: Encoder,
    store: ChunkStore | None,
    hooks: Hooks,
) -> Iterator[TrajectoryResult]:
    """Cache trajectories: an iterable in, an iterator of what became of each out, in order of completion.

    A completed trajectory's chunks are durable and under their final names before its result appears; recording it is
    the caller's part. A trajectory's own fault fails it alone. Memory is bounded by the prefetch depths, whatever a
    trajectory's length. Without a store nothing is written and none is completed: for measuring.

    Raises:
        StorageError, DeviceError: the fault is not a trajectory's; nothing further is yielded.
    """
    failed, batch_size = FailedTrajectories(), resolve_batch_size(options, encoder)
    job = ReadingJob(label.spec, options.checksum, store, None if store is None else label)
    with contextlib.closing(FrameStream(job, options, batch_size, encoder.batches_in_flight, hooks)) as stream:
        writer = NoWriter()
        if store is not None:
            writer = StreamWriter(store, label, failed, hooks.before_replacing, stream.frame_name, hooks.should_stop)
        with (
            contextlib.closing(writer),  # first in, last out: no thread writes any more when it drops what is half-made
            thread_pool(1, "write") as writers,
        ):
            groups = stream.groups(trajectories, failed)
            batches = full_batches(groups, encoder.new_pixels, batch_size, failed, hooks.should_stop)
            batches = PROFILE.pulling("wait for frames", batches)
            with contextlib.closing(encode_batches(encoder, batches, hooks.on_encoded, hooks.should_stop)) as encoded:
                for results in prefetch(writer.write, encoded, writers, WRITE_BACKLOG, early=True):
                    yield from results


# ======================================================================================================================
# Executors: who runs the stream of one dataset
# ======================================================================================================================


@dataclass(frozen=True)
class CacheJob:
    """One dataset's work, for those who do it."""

    trajectories: list[Trajectory]  # in the order in which one worker shall begin them
    num_frames: dict[str, int]  # trajectory name -> frames to encode, 0 where it will fail
    retried: frozenset[str]  # names of those that failed in an earlier run; they come last
    label: ChunkLabel
    options: RunOptions
    store: ChunkStore
    encoder: Encoder | None  # None where workers have their own
    data_folder: Path


class Workers(Protocol):
    """Who does a dataset's work. An executor's module defines workers(datasets), a context manager that yields them."""

    device: str  # of each: cpu, cuda or cuda:N
    encodes_here: bool  # whether they need the encoder of this process

    def describe(self) -> str:
        """Who they are, in words."""

    def gather(self, should_stop: Callable[[], bool]) -> None:
        """Wait until they are there. Raises RefusedError where none comes, or one cannot do the work."""

    def stream(self, job: CacheJob, hooks: Hooks) -> Iterator[TrajectoryResult]:
        """What became of each trajectory, as it comes: what cache_trajectories is on one device."""


class LocalWorkers:
    """This process, with one device."""

    encodes_here = True

    def __init__(self, device: str):
        self.device = device

    def describe(self) -> str:
        return self.device

    def gather(self, should_stop: Callable[[], bool]) -> None:
        """Nobody has to come."""

    def stream(self, job: CacheJob, hooks: Hooks) -> Iterator[TrajectoryResult]:
        return cache_trajectories(job.trajectories, job.label, job.options, job.encoder, job.store, hooks)


# ======================================================================================================================
# Before the work: what is to do, checked for all datasets before anything is begun
# ======================================================================================================================

CHUNK_OVERHEAD_BYTES = 12_000  # what an HDF5 file takes beside its datasets: headers and attributes, about
STEP_INTERVAL_S = 3.0  # between two lines on how many poses are read
DISTANCE_SETTINGS = ("max_chunk_distance_m", "overlap_distance_m", "min_chunk_distance_m")
FRAME_SETTINGS = ("max_chunk_frames", "overlap_frames")

HISTORY_MODULE = "dino_cache_extras.run_history"  # writes runs.jsonl
CHOICES_MODULE = "dino_cache_extras.changed_config"  # what can be done about a changed configuration
HINTS_MODULE = "dino_cache_extras.hints"  # what the machine could do beside what it does
JSON_LOG_MODULE = "dino_cache_extras.json_log"  # writes what --log-json asks for
MEASURE_MODULE = "dino_cache_extras.measure"  # what --measure does; what other tokens would take
SHARDS_MODULE = "dino_cache_extras.shards"  # what --shard does; merges the records of shards
POSE_FACTS_MODULE = "dino_cache_extras.pose_facts"  # tells what poses add up to, and what looks like another unit

WORK_LIBRARIES = ("torch", "torchvision", "timm", "PIL.Image", "h5py")  # imported where there is work, and only there

INSISTING_SIGNALS = (signal.SIGINT, signal.SIGTERM)
STOP_SIGNALS = (*INSISTING_SIGNALS, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)

EXIT_COMPLETED, EXIT_SOME_FAILED, EXIT_STOPPED_BY_FAULT, EXIT_WORK_LEFT = 0, 1, 3, 5


class StopRequest:
    """Whether the run shall end: a signal or the deadline. A second SIGINT or SIGTERM ends the process at once; others
    may come in company: a scheduler's SIGUSR1 before its SIGTERM, two SIGHUPs of a terminal that is closed."""

    def __init__(self, max_hours: float | None):
        self.signal_number: int | None = None
        self.is_asking = False
        self._is_insisted_on = False  # a SIGINT or SIGTERM came
        self._deadline = math.inf if max_hours is None else time.monotonic() + max_hours * 3600

    def install(self) -> None:
        """Handle the signals from here on, but for those that came ignored: of nohup, or of a background job."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _frame: Any) -> None:
        if self._is_insisted_on and number in INSISTING_SIGNALS:
            os._exit(128 + number)
        self._is_insisted_on |= number in INSISTING_SIGNALS
        if self.signal_number is not None:
            return
        self.signal_number = number
        if self.is_asking:  # Python would go on waiting for the answer
            self.check()
        with contextlib.suppress(OSError):  # a terminal that is gone; sys.stderr may be at work below this handler
            os.write(2, b"\nStopping: what is in flight is finished or dropped (Ctrl-C or SIGTERM to stop at once)\n")

    def __call__(self) -> bool:
        return self.signal_number is not None or time.monotonic() > self._deadline

    @property
    def exit_code(self) -> int:
        """Of a run that ends because of this request."""
        return EXIT_WORK_LEFT if self.signal_number is None else 128 + self.signal_number

    def check(self) -> None:
        """Raise StoppedError if the run shall end; for the time before its work begins."""
        if self():
            raise StoppedError(
                "stopped, by a signal or --max-hours, before the work began; run the same command again to go on",
                self.exit_code,
            )


class TrajectoryState(NamedTuple):
    """What the record says of a trajectory at the start of a run."""

    trajectory: Trajectory
    status: Literal["completed", "pending", "failed"]
    remark: str | None = None  # why a recorded one is redone, or what is odd
    new_checksum: str | None = None  # of the kind now asked for, where the recorded one is of the other
    has_changed: bool = False  # its data could be read, and are not those that its chunks were made from
    is_whole: bool = True  # its chunk files are those recorded
    new_pairing: int | None = None  # of its format, where it was made by an earlier one and comes to the same


class Work(NamedTuple):
    """What a pending trajectory will cost: frames to encode, chunk files and their bytes. Zero where it will fail."""

    num_frames: int = 0  # of all cameras
    num_chunks: int = 0
    num_rows: int = 0  # of all chunks together; frames in an overlap count once a chunk
    pose_bytes: int = 0  # of all rows
    num_bytes: int = 0
    pose_facts: Any = None  # what dino_cache_extras.pose_facts says of its poses, where it is there


class Selection(NamedTuple):
    """What a dataset's trajectories are."""

    trajectories: list[Trajectory]
    missing: list[str]  # names in the split that are not in the data folder
    lack_poses: list[str]  # folders with frames and no pose file, left out


@dataclass
class PreparedDataset:
    """A dataset whose record, trajectories and configuration are checked, and nothing written yet."""

    config: DatasetConfig  # its format settled
    spec: CacheSpec  # as settle_spec makes it; precision may be auto until the device is known
    progress: Progress
    store: ChunkStore
    selection: Selection
    states: list[TrajectoryState]
    weights: dict[str, Any] | None  # source, size, mtime, digest
    lost: dict[str, str]  # recorded, not among the data now, and with chunk files that are not as recorded -> how
    has_forgotten: bool = False  # a forced rebuild that begins now forgot completed trajectories
    begins_rebuild: bool = False  # a forced rebuild begins now
    num_elsewhere: int = 0  # trajectories of other shards, present or recorded
    other_caches: list[str] = field(default_factory=list)  # of the config's other datasets, where they are or were
    pending: list[Trajectory] = field(default_factory=list)  # to do in this run, failed ones last
    left_out: int = 0  # pending too, beyond --limit
    work: dict[str, Work] = field(default_factory=dict)  # trajectory name -> its cost, of the pending ones
    fatal: list[TrajectoryResult] = field(default_factory=list)  # pending ones that readers died at; once is enough
    notes: dict[str, list[str]] = field(default_factory=dict)  # what was found -> pending trajectories, with details
    workers: Workers | None = None  # None where nothing is pending, or a dry run does not ask who would do it
    shape: ModelShape | None = None
    encoder: Encoder | None = None
    recut: list[str] = field(default_factory=list)  # completed trajectories that are cut anew, all of them pending
    recut_is_left: bool = False  # others that should be cannot be looked at in this run

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def must_encode(self) -> bool:
        """Whether a pending trajectory has frames to encode, as far as is known: of one that will fail, nothing is."""
        return any(work.num_frames or not work.num_chunks for work in self.work.values())

    @property
    def trajectories(self) -> list[Trajectory]:
        """Those present and selected."""
        return self.selection.trajectories

    @property
    def num_completed(self) -> int:
        """Trajectories present and selected that were completed at the start."""
        return sum(state.status == "completed" for state in self.states)

    @property
    def num_frames(self) -> int:
        """Frames to encode in this run."""
        return sum(work.num_frames for work in self.work.values())

    def choose_pending(self, limit: int | None) -> None:
        """Take up what is to do: new and changed trajectories, then failed ones that have attempts left."""
        failures, most = self.progress.failures, self.config.options.max_attempts
        todo = [state.trajectory for state in self.states if state.status == "pending"]
        failed = [state.trajectory for state in self.states if state.status == "failed"]
        todo += [trajectory for trajectory in failed if failures[trajectory.name]["attempts"] < most]
        self.pending, self.left_out = todo[:limit], len(todo[limit:]) if limit else 0


def prepare_dataset(config: DatasetConfig, stop_request: StopRequest) -> PreparedDataset:
    """Read the record, list the trajectories, compare them. Writes nothing.

    Raises:
        RefusedError: the record is unusable or of another dataset, or there are no trajectories.
    """
    progress = open_progress(config) if config.shard is None else open_door(SHARDS_MODULE).open_progress(config)
    config = settle_keys(settle_format(config), progress)
    spec = settle_spec(config, progress.processing_config.get("precision"))
    selection = select_trajectories(config, spec, stop_request)
    refuse_case_collisions(config.cache_dir, selection.trajectories)
    store, num_elsewhere, has_forgotten = ChunkStore(config.cache_dir), 0, False
    if config.shard is not None:
        selection, store, num_elsewhere = open_door(SHARDS_MODULE).share_of(config, progress, selection)
    begins_rebuild = config.options.force_rebuild and progress.rebuild_started is None
    if config.options.force_rebuild:
        has_forgotten = forget_selected(config, progress, selection, store)
    states = compare_with_record(config, spec, progress, store, selection.trajectories, stop_request)
    return PreparedDataset(
        config=config,
        spec=spec,
        progress=progress,
        store=store,
        selection=selection,
        states=states,
        weights=progress.weights,
        lost=lost_trajectories(progress, store, {trajectory.name for trajectory in selection.trajectories}),
        has_forgotten=has_forgotten,
        begins_rebuild=begins_rebuild,
        num_elsewhere=num_elsewhere,
    )


def forget_selected(config: DatasetConfig, progress: Progress, selection: Selection, store: ChunkStore) -> bool:
    """Forget what a forced rebuild will redo, and nothing else; says whether one begins that forgets something. In one
    that goes on, trajectories whose chunk files are younger than its beginning are redone already."""
    names = {trajectory.name for trajectory in selection.trajectories}
    began, is_new = progress.rebuild_started, progress.rebuild_started is None
    progress.recut_started = None
    if is_new:
        which = f"every trajectory{' of the split' if config.split else ''} is redone"
        LOG.warning("%s: force_rebuild: %s (by every run, if it is True in the config file)", config.name, which)
        progress.rebuild_started = time.time()
    else:
        names = {name for name in names & progress.records.keys() if store.is_older(name, began)}
    kept = sorted(progress.records.keys() - names)
    if kept and is_new:
        what = "completed trajectories are not among those redone, and stay"
        LOG.warning("%s: %d %s: %s", config.name, len(kept), what, human_list(kept))
    forgotten = names & progress.records.keys()
    if kept or not is_new:
        for name in names:
            progress.forget(name)
            progress.failures.pop(name, None)
    else:
        progress.empty()
    return bool(forgotten) and is_new


def open_progress(config: DatasetConfig) -> Progress:
    """The cache's record, with what waits in its shards, or an empty one.

    Raises:
        RefusedError: it is unusable, of another dataset, missing beside chunks, or there although tracking is off.
    """
    options, cache_dir = config.options, config.cache_dir
    if unmerged_shards(cache_dir):
        progress = open_door(SHARDS_MODULE).with_shards(cache_dir)
    else:
        progress = Progress.load(cache_dir)
    if not options.enable_progress_tracking:
        if progress is not None:
            raise RefusedError(
                f"{cache_dir}: has a {PROGRESS_FILE}, which a run with enable_progress_tracking: False would make "
                "untrue; turn it on, or give the run another cache_dir"
            )
        return Progress(cache_dir, config.name)
    if progress is None:
        if not options.force_rebuild and ChunkStore(cache_dir).has_chunks():
            raise RefusedError(
                f"{cache_dir}: holds chunk files but no {PROGRESS_FILE}. Ways on: "
                f"{progress_command(f'rebuild --cache-dir {cache_dir}')} makes it anew from the chunks, "
                "--force-rebuild redoes every trajectory"
            )
        return Progress(cache_dir, config.name)
    if progress.dataset_name not in (None, config.name):
        raise RefusedError(
            f"{cache_dir}: is the cache of dataset {progress.dataset_name!r}, not of {config.name!r}; give datasets."
            f"{config.name} a cache_dir of its own"
        )
    progress.dataset_name = config.name
    return progress


def settle_format(config: DatasetConfig) -> DatasetConfig:
    """The config with its format settled.

    Raises:
        RefusedError: the format is not clear, or a setting under the dataset does not apply to it.
    """
    found = FoundFormat(config.format, "set in the config")
    if config.format == "auto":
        found = detect_format(config.data_folder, data_keys(config.spec))
    LOG.info("%s: format %s (%s)", config.name, found.name, found.sign)
    config = dataclasses.replace(config, format=found.name)
    idle = idle_settings(config)
    for key in sorted(idle.keys() & config.own_keys):
        raise RefusedError(
            f"datasets.{config.name}.{key}: {getattr(config.spec, key)}: does not apply to {idle[key]}; take it out"
        )
    return config


def idle_settings(config: DatasetConfig) -> dict[str, str]:
    """Settings that have no effect -> what makes them so."""
    applying = (*format_named(config.format).settings, *POSE_SETTINGS)
    idle = dict.fromkeys(set(DataKeys._fields).difference(applying), f"format: {config.format}")
    other = FRAME_SETTINGS if config.spec.chunk_by == "distance" else DISTANCE_SETTINGS
    return idle | dict.fromkeys(other, f"chunk_by: {config.spec.chunk_by}")


def settle_keys(config: DatasetConfig, progress: Progress) -> DatasetConfig:
    """The config with its keys of the data settled: those that are set, else guesses. What is guessed for a cache with
    trajectories stays a guess while it is what was recorded, or none was; another one is a changed configuration.

    Raises:
        RefusedError: nothing can be guessed, or a key is not among the data.
    """
    kind = format_named(config.format)
    recorded = with_defaults(progress.processing_config) if progress.is_begun else {}
    known = recorded.get("guessed_keys")  # None: no record, or from before guesses were recorded
    try:
        found = kind.guess(config.data_folder, config.spec)
    except RefusedError as error:
        made_with = ", ".join(f"{key}: {recorded[key]}" for key in KEY_SETTINGS if recorded.get(key) is not None)
        raise RefusedError(f"{error}{made_with and f'. This cache was made with {made_with}'}") from error
    guessed = []
    for key, value in found.items():
        is_set, before = getattr(config.spec, key) is not None, recorded.get(key)
        is_first = before is None and known is None and not is_set
        if is_first or (key in (known or ()) and before == value):
            guessed.append(key)
    if not found:
        return config
    settings = {**config.spec.model_dump(), **found}
    spec = GuessedSpec(**settings, guessed_keys=guessed) if guessed else CacheSpec(**settings)
    return dataclasses.replace(config, spec=spec)


def configuration_changes(dataset: PreparedDataset) -> list[tuple[str, Any, Any]]:
    """(key, recorded value, new value) of the format and every setting in which a dataset differs from its record."""
    progress, new_format = dataset.progress, dataset.config.format
    changes = spec_differences(progress.processing_config, dataset.spec)
    if progress.is_begun and progress.data_format not in (None, new_format):
        changes.insert(0, ("format", progress.data_format, new_format))
    return changes


def settle_recorded_keys(specs: dict[str, dict[str, Any]], spec: CacheSpec) -> None:
    """Put what is guessed now into specs from before guesses were recorded: a later guess does not alter them."""
    for recorded in specs.values():
        if "guessed_keys" not in recorded and isinstance(spec, GuessedSpec):
            recorded["guessed_keys"] = [key for key in spec.guessed_keys if recorded.get(key) is None]
            recorded |= {key: value for key in recorded["guessed_keys"] if (value := getattr(spec, key)) is not None}


def settle_spec(config: DatasetConfig, recorded_precision: str | None, device: str | None = None) -> CacheSpec:
    """The spec in force. Settings without effect are at their defaults: another value of theirs is no other cache.
    Precision auto is what the cache has recorded, else what suits the device; it stays auto while neither is known.

    Raises:
        RefusedError: the precision is not for the device.
    """
    settled = {key: CacheSpec.model_fields[key].default for key in idle_settings(config)}
    if device is not None:
        wanted, model_type = config.spec.precision, config.spec.dino_model_type
        settled["precision"] = resolve_precision(wanted, recorded_precision, device, model_type)
    elif config.spec.precision == "auto" and recorded_precision is not None:
        settled["precision"] = recorded_precision
    return config.spec.model_copy(update=settled)


def select_trajectories(config: DatasetConfig, spec: CacheSpec, stop_request: StopRequest) -> Selection:
    """The trajectories below data_folder that the split names; without one, all that have poses, or need none."""
    found, kind = [], format_named(config.format)
    for trajectory in kind.find(config.data_folder, spec):
        stop_request.check()
        found.append(trajectory)
    refuse_same_names(found)
    missing, lack_poses = [], []
    if config.split is not None:
        wanted = dict.fromkeys(read_split(config.split))
        missing = sorted(wanted.keys() - {trajectory.name for trajectory in found})
        found = [trajectory for trajectory in found if trajectory.name in wanted]
    elif spec.chunk_by == "distance":
        lack_poses = [trajectory.name for trajectory in found if trajectory.lacks_poses]
        found = [trajectory for trajectory in found if not trajectory.lacks_poses]
    if not found:
        refuse_no_trajectories(config, kind, lack_poses)
    return Selection(found, missing, lack_poses)


def refuse_no_trajectories(config: DatasetConfig, kind: Format, lack_poses: Sequence[str] = ()) -> NoReturn:
    """Raise RefusedError: there is nothing to do in this data folder."""
    which = f" that split {config.split} names" if config.split else ""
    why = "Is the disk mounted?"
    if lack_poses:
        why = f"These have frames and no poses, for which there is chunk_by: frames: {human_list(lack_poses)}"
        for other in open_door(HINTS_MODULE).other_signs(config, lack_poses) if is_there(HINTS_MODULE) else ():
            why = f"It looks like format: {other.name} ({other.sign})"
    raise RefusedError(
        f"datasets.{config.name}.data_folder: {config.data_folder}: no trajectories below it{which}; a trajectory "
        f"is {kind.trajectory}. {why}"
    )


def refuse_same_names(trajectories: list[Trajectory]) -> None:
    """Raise RefusedError where two trajectories have one name: their chunks would go into one folder."""
    seen: dict[str, Trajectory] = {}
    for trajectory in trajectories:
        other = seen.setdefault(trajectory.name, trajectory)
        if other is not trajectory:
            raise RefusedError(f"{other.path} and {trajectory.path} are both trajectory {trajectory.name}; rename one")


def refuse_case_collisions(cache_dir: Path, trajectories: list[Trajectory]) -> None:
    """Raise RefusedError where two names differ only in case and the cache's filesystem makes one folder of them."""
    if not (cache_dir / LOCK_FILE.upper()).exists():  # the lock file is held, so it exists under its own name
        return
    seen: dict[str, str] = {}
    for name, *_ in trajectories:
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise RefusedError(
                f"trajectories {other} and {name} differ only in case, or in how accents are coded, which the disk of "
                f"cache_dir {cache_dir} does not tell apart; give the cache another disk, or rename one"
            )


class Checked(NamedTuple):
    """A trajectory's checksums as they are now, by kind, or why there are none. Of one that its format made by an
    earlier rule, why it is to be redone, or why that is not known."""

    checksums: dict[ChecksumKind, str]
    error: Exception | None = None
    mispaired: str | None = None
    pairing_error: Exception | None = None


def compare_with_record(
    config: DatasetConfig,
    spec: CacheSpec,
    progress: Progress,
    store: ChunkStore,
    trajectories: list[Trajectory],
    stop_request: StopRequest,
) -> list[TrajectoryState]:
    """Compare trajectories with their records: data by checksum, chunk files by name and size."""
    kind_now, states = config.options.checksum, []
    keys_of = functools.cache(lambda fingerprint: DataKeys.of(progress.specs[fingerprint]))
    pairing = format_named(config.format).pairing

    def wanted(trajectory: Trajectory) -> tuple[tuple[ChecksumKind, ...], DataKeys | None, dict[str, Any] | None]:
        """The checksums that tell what became of it, the keys that it was made with, and the spec's settings where an
        earlier rule made it."""
        if (record := progress.records.get(trajectory.name)) is not None:
            kinds = (kind_now,) if record["checksum_kind"] == kind_now else (record["checksum_kind"], kind_now)
            fingerprint, is_old = record["fingerprint"], record.get("pairing", 1) < pairing
            return kinds, keys_of(fingerprint), progress.specs[fingerprint] if is_old else None
        failure = progress.failures.get(trajectory.name)
        if failure is None or failure["error_type"] == PlaceTakenError.__name__:
            return (), None, None
        return (failure["checksum_kind"],), data_keys(spec), None

    def state(trajectory: Trajectory, checked: Checked) -> TrajectoryState:
        stop_request.check()
        return _compare(trajectory, checked, progress, store, kind_now)

    if format_named(config.format).frames == "files":  # their bytes are digested and not parsed: no reader is needed
        return list(
            map_files(lambda trajectory: state(trajectory, look_at(trajectory, *wanted(trajectory))), trajectories)
        )
    checks = ((trajectory, *wanted(trajectory)) for trajectory in trajectories)
    with contextlib.closing(ReaderProcesses(None, available_cores(), method="spawn")) as readers:  # without torch
        found = in_readers(
            readers,
            look_at_many,
            (check for check in checks if check[1]),
            failure=lambda check, error: Checked({}, error),
            name_of=lambda check: check[0].name,
            should_stop=stop_request,
        )
        for trajectory in trajectories:
            checked = next(found, Checked({})) if wanted(trajectory)[0] else Checked({})
            states.append(state(trajectory, checked))
    return states


def look_at(
    trajectory: Trajectory, kinds: tuple[ChecksumKind, ...], keys: DataKeys | None, settings: dict[str, Any] | None
) -> Checked:
    """What these checksums are now; with the settings of a spec, whether its frames were paired with other poses."""
    checksums: dict[ChecksumKind, str] = {}
    try:
        with input_errors(trajectory.name):
            source = open_source(trajectory, keys) if kinds else None
            for kind in kinds:
                checksums[kind] = checksum_of(source, kind)
    except (InputError, OSError) as error:
        return Checked(checksums, FENCE.portable(error))
    if settings is None:
        return Checked(checksums)
    try:
        with input_errors(trajectory.name):
            reason = format_named(trajectory.format).mispaired(source, recorded_spec(settings))
            return Checked(checksums, mispaired=reason)
    except (InputError, OSError) as error:
        return Checked(checksums, pairing_error=FENCE.portable(error))


def look_at_many(_: TrajectoryReader, wanted: list[tuple]) -> list[Checked]:
    """The same of many trajectories. Runs in a reader."""
    found = []
    for one in wanted:
        found.append(look_at(*one))
        FENCE.allow()
    return found


def _compare(
    trajectory: Trajectory, checked: Checked, progress: Progress, store: ChunkStore, checksum_kind: ChecksumKind
) -> TrajectoryState:
    record = progress.records.get(trajectory.name)
    if record is not None:
        return _compare_completed(trajectory, record, checked, progress, store, checksum_kind)
    failure = progress.failures.get(trajectory.name)
    if failure is None:
        return TrajectoryState(trajectory, "pending")
    if failure["error_type"] == PlaceTakenError.__name__:
        return _compare_place(trajectory, store)
    if checked.checksums.get(failure["checksum_kind"]) != failure["checksum"]:
        return TrajectoryState(trajectory, "pending", "failed before; its data changed")
    return TrajectoryState(trajectory, "failed")


def _compare_place(trajectory: Trajectory, store: ChunkStore) -> TrajectoryState:
    """The state of one that failed since something lay where its chunks belong."""
    try:
        store.refuse_taken_place(trajectory.name)
    except (PlaceTakenError, OSError):
        return TrajectoryState(trajectory, "failed")
    return TrajectoryState(trajectory, "pending", "failed before; the place of its chunks is free now")


def _compare_completed(
    trajectory: Trajectory,
    record: TrajectoryRecord,
    checked: Checked,
    progress: Progress,
    store: ChunkStore,
    checksum_kind: ChecksumKind,
) -> TrajectoryState:
    """The state of a recorded one. It stays completed unless a checksum says that its data changed, or its chunk files
    are not those recorded: what cannot be read or parsed now proves nothing."""
    kind, new_checksum, remark = record["checksum_kind"], None, None
    has_changed = kind in checked.checksums and checked.checksums[kind] != progress.checksums[trajectory.name]
    if kind != checksum_kind:
        new_checksum = checked.checksums.get(checksum_kind)
    if checked.error is not None:
        remark = f"cannot be checked, stays as it is: {checked.error}"
    try:
        found = chunk_files(trajectory.name, store)
    except OSError as error:
        return TrajectoryState(trajectory, "completed", f"its chunks cannot be checked, and stay as they are: {error}")
    lost, extra = lost_chunk(record, found), found.keys() - {chunk_file_name(i) for i in range(len(record["bytes"]))}
    if has_changed or lost or extra:
        why = "its data changed" if has_changed else lost or f"its {min(extra)} is not in the record"
        return TrajectoryState(trajectory, "pending", why, has_changed=has_changed, is_whole=lost is None)
    state = TrajectoryState(trajectory, "completed", remark, new_checksum)
    return state if remark else _compare_pairing(state, record, checked)


def _compare_pairing(state: TrajectoryState, record: TrajectoryRecord, checked: Checked) -> TrajectoryState:
    """The state, looked at once more where an earlier version of its format made the chunks."""
    pairing = format_named(state.trajectory.format).pairing
    if record.get("pairing", 1) >= pairing:
        return state
    if checked.pairing_error is not None:
        return state._replace(remark=f"cannot be looked at, stays as it is: {checked.pairing_error}")
    if checked.mispaired is not None:
        return TrajectoryState(state.trajectory, "pending", checked.mispaired, has_changed=True)
    return state._replace(new_pairing=pairing)


def chunk_files(name: str, store: ChunkStore) -> dict[str, int]:
    """File name -> size [bytes] of a trajectory's chunk files. Raises OSError where they cannot be listed."""
    return {file: size for file, size in store.chunk_sizes(name).items() if is_chunk_file(file)}


def lost_chunk(record: TrajectoryRecord, found: dict[str, int]) -> str | None:
    """What is wrong with the first recorded chunk file that is missing or has another size; None where none is."""
    for index, size in enumerate(record["bytes"]):
        file = chunk_file_name(index)
        if file not in found:
            return f"its {file} is missing"
        if found[file] != size:
            return f"its {file} has {found[file]} bytes, recorded are {size}"
    return None


def lost_trajectories(progress: Progress, store: ChunkStore, present: Container[str]) -> dict[str, str]:
    """Recorded trajectories that are not among the data now, and whose chunk files are not as recorded -> how. They
    cannot be redone, and with a record of files that are gone a reader would refuse the cache."""
    lost = {}
    for name, record in progress.records.items():
        if name not in present:
            with contextlib.suppress(OSError):  # cannot be looked at: nothing is known
                if difference := lost_chunk(record, chunk_files(name, store)):
                    lost[name] = difference
    return lost


ANSWERS = {"y": "keep", "yes": "keep", "c": "recut", "r": "redo"}  # about a changed configuration; others: no


class ChangedConfig(Exception):
    """A dataset's configuration changed, and nobody has decided on that yet. It is asked when no lock is held."""

    def __init__(self, dataset: PreparedDataset, differences: list[tuple[str, Any, Any]], *, can_redo: bool):
        super().__init__(dataset.name)
        self.dataset, self.differences, self.can_redo = dataset, differences, can_redo
        self.facts = repr((dataset.name, differences, len(dataset.progress.records)))  # what an answer is good for

    @property
    def can_recut(self) -> bool:
        """Whether what is completed can be cut anew, since no feature is another."""
        return self.can_redo and is_there(RECUT_MODULE) and not open_door(RECUT_MODULE).obstacles(self.differences)

    def decide(self, stop_request: StopRequest, *, yes: bool) -> str:
        """Say what changed; keep: what is completed stays as it is, the rest is made with the new one; recut; or redo.

        Raises:
            RefusedError: the answer is no, or there is neither --yes nor a terminal.
        """
        name, reset = self.dataset.name, progress_command(f"reset --cache-dir {self.dataset.config.cache_dir}")
        ways = (
            "Ways on: --yes keeps what is completed and makes the rest with the new configuration; --force-rebuild "
            f"redoes everything, as {reset} does; or undo it"
        )
        if self.can_recut:
            ways = ways.replace("--force-rebuild", "--recut cuts it anew without encoding it again; --force-rebuild")
        lines = [f"  {key}: {old} -> {new}" for key, old, new in self.differences]
        for line in (f"{name}: the configuration changed since this cache was begun:", *lines):
            LOG.warning("%s", line)
        if self.can_redo and not yes and sys.stdin and sys.stdin.isatty() and is_there(CHOICES_MODULE):
            for letter, what in open_door(CHOICES_MODULE).choices(self.dataset, can_recut=self.can_recut):
                LOG.warning("  %s  %s", letter, what)
        question = "Continue with the changed configuration?"
        answer = ANSWERS.get("y" if yes else answer_to(question, ways, stop_request))
        is_possible = {"redo": self.can_redo, "recut": self.can_recut}
        if answer is None or not is_possible.get(answer, True):
            raise RefusedError(f"{name}: not continued with the changed configuration. Nothing was changed. {ways}")
        return answer


def confirm_changes(change: ChangedConfig, answers: dict[str, str], stop_request: StopRequest, *, yes: bool) -> str:
    """What was decided on a changed configuration, if it did change: keep, recut or redo.

    Raises:
        ChangedConfig: it is to be asked, on the terminal.
        RefusedError: as for `decide`.
    """
    dataset, differences = change.dataset, change.differences
    if dataset.recut:  # decided; what comes now are other weights
        open_door(RECUT_MODULE).refuse_other_features(dataset, differences)
    if differences and dataset.progress.is_begun and change.facts not in answers:
        if not yes and sys.stdin and sys.stdin.isatty():
            raise change
        answers[change.facts] = change.decide(stop_request, yes=yes)
    for failure in dataset.progress.failures.values() if differences else ():
        failure["attempts"] = 0
    return answers.get(change.facts, "keep")


def answer_to(question: str, ways: str, stop_request: StopRequest) -> str:
    """Ask on the terminal; a signal ends the question."""
    stop_request.is_asking = True
    try:
        return ask_for_answer(question, otherwise="--yes")
    except RefusedError as error:
        raise RefusedError(f"{error} {ways}") from None
    finally:
        stop_request.is_asking = False


def open_workers(datasets: list[PreparedDataset], resources: contextlib.ExitStack) -> list[Workers]:
    """Give every dataset with work to do its workers; an executor's own are shared by all its datasets. Returns all.

    Raises:
        RefusedError: the device is missing, the executor's module is not there, or it has no workers.
    """
    by_executor: dict[str, list[PreparedDataset]] = {}
    for dataset in datasets:
        if dataset.pending:
            by_executor.setdefault(dataset.config.options.executor, []).append(dataset)
    opened: list[Workers] = []
    for executor, group in by_executor.items():
        if executor != "local":
            opened.append(resources.enter_context(open_door(EXECUTOR_MODULES[executor]).workers(group)))
        for dataset in group:
            if executor == "local":
                opened.append(LocalWorkers(resolve_device(dataset.config.options.device)))
            dataset.workers = opened[-1]
    return opened


def settle_encoding(dataset: PreparedDataset) -> None:
    """Settle in which precision and shape the pending trajectories of a dataset are encoded.

    Raises:
        RefusedError: the precision or the engine is not for the device, image_size is no multiple of the patches, or
            there is no weights file.
    """
    if dataset.workers is not None:
        recorded = dataset.progress.processing_config.get("precision")
        dataset.spec = settle_spec(dataset.config, recorded, dataset.workers.device)
    check_engine(dataset.spec, dataset.workers.device if dataset.workers is not None else None)
    dataset.shape = model_shape(dataset.spec.dino_model_type)
    check_image_size(dataset.spec, dataset.shape)
    check_tokens(dataset.spec, dataset.shape)
    weights_source(dataset.spec)


class Cost(NamedTuple):
    """What a trajectory will cost, its bytes apart, and what is odd about it."""

    work: Work
    notes: tuple[Note, ...]


def plan_costs(_: TrajectoryReader, trajectories: list[Trajectory], job: ReadingJob) -> list[Cost | TrajectoryResult]:
    """What trajectories will cost, or why they fail. Runs in a reader."""
    look_at = open_door(POSE_FACTS_MODULE).look_at if is_there(POSE_FACTS_MODULE) else None
    costs: list[Cost | TrajectoryResult] = []
    for trajectory in trajectories:
        outcome = plan_or_fail(trajectory, job.spec, job.checksum_kind, job.store)
        FENCE.allow()
        if isinstance(outcome, TrajectoryPlan):
            work = Work(
                num_frames=len(outcome.rows_to_encode) * len(job.spec.cameras),
                num_chunks=len(outcome.spans),
                num_rows=outcome.num_rows,
                pose_bytes=outcome.num_rows * sum(values[:1].nbytes for values in outcome.datasets.values()),
                pose_facts=look_at and look_at(outcome.read, job.spec),
            )
            outcome = Cost(work, outcome.notes)
        costs.append(outcome)
    return costs


def estimate_work(
    dataset: PreparedDataset, readers: ReaderThreads | ReaderProcesses, stop_request: StopRequest
) -> list[str]:
    """Plan every pending trajectory, keeping only what it will cost; returns the reasons of those that will fail."""
    job = ReadingJob(dataset.spec, dataset.config.options.checksum, dataset.store)
    stat_job = job._replace(checksum_kind="stat")  # quick; what is planned again has the kind asked for
    failure = functools.partial(died, readers, job=job, should_stop=stop_request)
    costs = in_readers(readers, plan_costs, dataset.pending, stat_job, failure=failure, should_stop=stop_request)
    reasons, states = [], {state.trajectory.name: state for state in dataset.states}
    told = -math.inf
    for number, (trajectory, cost) in enumerate(zip(dataset.pending, costs)):
        if time.monotonic() - told > STEP_INTERVAL_S:
            told = time.monotonic()
            say_step(f"reading poses {number:,} / {len(dataset.pending):,}")
        if isinstance(cost, TrajectoryResult):
            dataset.work[trajectory.name] = Work()
            is_recorded = trajectory.name in dataset.progress.records
            reasons.append(f"{cost.error}{fate_of(states[trajectory.name], cost.error) if is_recorded else ''}")
            if isinstance(cost.error, FatalDataError):
                dataset.fatal.append(cost)
            continue
        for note in cost.notes:
            dataset.notes.setdefault(note.what, []).append(f"{trajectory.name} ({note.detail})")
        size = cache_bytes(dataset, dataset.spec, [cost.work])
        dataset.work[trajectory.name] = cost.work._replace(num_bytes=size)
    if is_there(PARTIAL_WORK_MODULE) and not dataset.begins_rebuild:
        open_door(PARTIAL_WORK_MODULE).count_only_what_is_left(dataset)
    stop_request.check()
    return reasons


def fate_of(state: TrajectoryState, error: Exception) -> str:
    """What becomes of a completed trajectory that will fail when it is redone, in words."""
    if is_void(state, error):
        return " (its chunks will be removed)"
    return " (it stays as it was completed)" if state.is_whole else " (it will no longer count as completed)"


def is_void(state: TrajectoryState, error: Exception) -> bool:
    """Whether chunks match no data any more: those that could be read changed, and break a rule."""
    return state.has_changed and isinstance(error, InvalidDataError)


def reads_in_processes(dataset: PreparedDataset) -> bool:
    """Whether frames are decoded in processes that this one starts."""
    options, kind = dataset.config.options, format_named(dataset.config.format)
    return (
        bool(dataset.pending)
        and options.executor == "local"
        and not (options.readers == "threads" and kind.frames == "files")
    )


def estimate_all(datasets: list[PreparedDataset], stop_request: StopRequest) -> list[list[str]]:
    """As estimate_work, of each dataset."""
    if not any(dataset.pending for dataset in datasets):
        return [[] for _ in datasets]
    with contextlib.closing(ReaderProcesses(None, available_cores())) as readers:
        return [estimate_work(dataset, readers, stop_request) for dataset in datasets]


def pose_lines(dataset: PreparedDataset) -> tuple[list[str], list[str]]:
    """What the poses of the trajectories to do add up to, in a line; and what looks wrong about them, a line each."""
    facts = {name: work.pose_facts for name, work in dataset.work.items() if work.pose_facts is not None}
    return open_door(POSE_FACTS_MODULE).describe(facts) if facts else ([], [])


def cache_bytes(dataset: PreparedDataset, spec: CacheSpec, works: Iterable[Work]) -> int:
    """What the chunk files take with the tokens of `spec`, about."""
    tokens = len(spec.cameras) * token_bytes(token_shapes(spec, dataset.shape))
    return sum(work.num_rows * tokens + work.pose_bytes + work.num_chunks * CHUNK_OVERHEAD_BYTES for work in works)


def check_disk(datasets: list[PreparedDataset]) -> None:
    """Raise RefusedError unless each filesystem can hold what is to come, less the chunks that it replaces."""
    needs: dict[int, list[PreparedDataset]] = {}
    for dataset in datasets:
        needs.setdefault(os.stat(dataset.config.cache_dir).st_dev, []).append(dataset)
    for group in needs.values():
        needed = sum(new_bytes(dataset) - replaced_bytes(dataset) for dataset in group)
        free = free_bytes(group[0].config.cache_dir)
        if needed > free:
            folders = ", ".join(str(dataset.config.cache_dir) for dataset in group)
            raise RefusedError(
                f"{folders}: the cache will take {human_bytes(needed)} more and {human_bytes(free)} are free. Ways "
                "on: free space, another cache_dir, fewer tokens (patch takes most), or --limit"
            )


def new_bytes(dataset: PreparedDataset) -> int:
    return sum(work.num_bytes for work in dataset.work.values())


def replaced_bytes(dataset: PreparedDataset) -> int:
    return sum(sum(dataset.store.chunk_sizes(trajectory.name).values()) for trajectory in dataset.pending)


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def load_encoders(datasets: list[PreparedDataset], stop_request: StopRequest) -> None:
    """Give every dataset with work to do its encoder, one for all that compute the same, and know the digests."""
    loaded: dict[tuple, tuple[Encoder, str]] = {}
    for dataset in datasets:
        stop_request.check()
        source, recorded = weights_source(dataset.spec), dataset.progress.weights
        if not dataset.pending or not dataset.must_encode:
            if dataset.pending:
                dataset.encoder = open_door(RECUT_MODULE).NoEncoder()
            if recorded is not None and {**recorded, **source} == recorded:
                continue
            if dataset.progress.records:
                with device_errors("loading the model"):
                    dataset.weights = {**source, "digest": weights_digest(build_model(dataset.spec))}
            continue
        spec, device = dataset.spec, dataset.workers.device
        if not dataset.workers.encodes_here:  # only the digest is wanted
            spec, device = spec.model_copy(update={"engine": "torch", "compile": False}), "cpu"
        key = encoder_key(spec, device)
        if key not in loaded:
            say_step(f"loading weights of {spec.dino_model_type}")
            loaded[key] = load_encoder(spec, device)
        dataset.encoder, digest = loaded[key]
        dataset.weights = {**source, "digest": digest}


def weights_differences(dataset: PreparedDataset) -> list[tuple[str, Any, Any]]:
    """As spec_differences, for the weights' content: a file that only moved is no change."""
    old, new = dataset.progress.weights, dataset.weights
    if old is None or new is None or old["digest"] == new["digest"]:
        return []
    return [("weights", *(f"{weights['source']} (digest {weights['digest']})" for weights in (old, new)))]


def remarks(dataset: PreparedDataset) -> list[str]:
    """What is odd about a dataset before its work begins, a line each."""
    lines = []
    for state in dataset.states:
        if state.remark:
            verb = "Redoing" if state.status == "pending" else "Completed"
            lines.append(f"{verb} {state.trajectory.name}: {state.remark}")
    for name, how in sorted(dataset.lost.items()):
        lines.append(f"No longer completed: {name}: {how}, and its data are not there to redo it")
    records, failures = dataset.progress.records, dataset.progress.failures
    present = {trajectory.name for trajectory in dataset.trajectories}
    most = dataset.config.options.max_attempts
    tried_again = {state.trajectory.name for state in dataset.states if state.status == "pending"}
    given_up = sum(failures[name]["attempts"] >= most for name in (failures.keys() & present) - tried_again)
    if given_up:  # their names and reasons are said at the end
        lines.append(
            f"{given_up} failed trajectories are not tried again after {most} attempts (reset-failed allows it)"
        )
    others = {key for key, spec in dataset.progress.specs.items() if spec_differences(spec, dataset.spec)}
    recut = set(dataset.recut)
    kept = [name for name, record in records.items() if record["fingerprint"] in others and name not in recut]
    for names, what in (
        (
            sorted(records.keys() - present - dataset.lost.keys()),
            f"recorded trajectories are not {'in the split or ' if dataset.config.split else ''}among the data now; "
            "their chunks stay",
        ),
        (dataset.selection.missing, "names of the split are not in the data folder"),
        (dataset.selection.lack_poses, "folders hold frames but no pose file, left out"),
        (kept, "completed trajectories were made with another configuration, and stay"),
    ):
        if names:
            lines.append(f"{len(names)} {what}: {human_list(names)}")
    lack = dataset.selection.lack_poses if is_there(HINTS_MODULE) else []
    for other in open_door(HINTS_MODULE).other_signs(dataset.config, lack) if lack else ():
        lines.append(f"There are poses beside frames that are left out: format: {other.name} reads {other.sign}")
    return lines + [f"{len(found)} {what}: {human_list(found)}" for what, found in dataset.notes.items()]


# ======================================================================================================================
# The work: one dataset after the other is encoded, recorded and shown
# ======================================================================================================================

LOST_MOUNT_FAILURES = 20  # unreadable trajectories in a row, without a success between them, that mean a lost mount
SHOW_INTERVAL_S = 0.2  # time between two looks at the progress

_LOST_MOUNT = "the mount seems lost. None of them is recorded as failed; mount it and run the same command again"
_REFUSALS = (RefusedError.exit_code, CacheLockedError.exit_code)
_WORST_FIRST = (EXIT_STOPPED_BY_FAULT, EXIT_SOME_FAILED, EXIT_WORK_LEFT, EXIT_COMPLETED)


@dataclass(frozen=True)
class DatasetOutcome:
    """How the work on one dataset ended."""

    name: str
    exit_code: int
    num_trajectories: int  # present and selected
    num_completed: int  # of these, now
    num_new: int  # of these, completed by this run
    num_chunks: int  # of the whole cache
    num_left: int  # trajectories that this run could not begin, and those beyond --limit
    num_waiting: int  # trajectories of datasets after this one, which a signal kept this run from
    failures: dict[str, Failure]  # recorded ones, of this run or earlier
    told: frozenset[str]  # names of those whose reasons were said while the run was at work
    gone: frozenset[str]  # names of failures that are not among the data now
    held_back: list[str]  # why trajectories could not be read that are not recorded as failed
    num_odd: int  # completed ones that could not be checked or redone and stay, or that lost their chunks
    seconds: float  # of this run
    num_frames: int  # encoded by this run
    num_bytes: int  # of the chunk files that this run wrote
    max_attempts: int
    stopped_by: Literal["signal", "deadline"] | None = None
    error: Exception | None = None  # what ended the work early


@dataclass(frozen=True)
class NightOutcome:
    """How a run ended: all its datasets that were begun, and the exit code of the command."""

    datasets: list[DatasetOutcome]
    exit_code: int
    verdict: str = ""  # the run's last line


@dataclass
class Night:
    """What is known of a run so far, for its last line."""

    num_datasets: int | None = None  # None: the config is not read yet
    prepared: list[PreparedDataset] = field(default_factory=list)  # all datasets, once compared with their records
    outcomes: list[DatasetOutcome] = field(default_factory=list)  # of those begun, once the work is over
    begin: float = field(default_factory=time.time)  # epoch seconds


def log_outcome(outcome: DatasetOutcome) -> None:
    """Say how the work on a dataset ended."""
    error = outcome.error
    if error is not None:
        what = error if isinstance(error, DinoCacheError) else f"unexpected: {error!r}"
        LOG.error("error: %s", what, exc_info=None if isinstance(error, RefusedError) else error)
        return
    if outcome.held_back:
        count, why = len(outcome.held_back), human_list(outcome.held_back)
        LOG.warning("%d trajectories could not be read and are not recorded as failed: %s", count, why)
    LOG.info(
        "%s: %d/%d trajectories completed, %d failed, %d chunks",
        outcome.name,
        outcome.num_completed,
        outcome.num_trajectories,
        len(outcome.failures),
        outcome.num_chunks,
    )
    if outcome.num_odd:
        LOG.warning("%d completed trajectories were not as they should be; the lines above say how", outcome.num_odd)
    earlier = {name: failure for name, failure in outcome.failures.items() if name not in outcome.told}
    for name, failure in list(earlier.items())[:SHOWN_NAMES]:
        gone = f" ({name} is not among the data now; reset-failed forgets it)" if name in outcome.gone else ""
        attempts = f"{failure['attempts']} of {outcome.max_attempts} attempts"
        LOG.warning("  failed (%s): %s%s", attempts, failure["reason"], gone)
    if (more := len(earlier) - SHOWN_NAMES) > 0:
        LOG.warning("  ... and %d more; %s lists them", more, progress_command("show --all"))
    if outcome.stopped_by is not None:
        reason = "by a signal" if outcome.stopped_by == "signal" else "by --max-hours"
        left = outcome.num_left + outcome.num_waiting
        LOG.warning("Stopped %s, %d trajectories are left; run the same command again to go on", reason, left)
    elif outcome.num_left:
        LOG.info("%d trajectories are left for the next run (--limit)", outcome.num_left)


class RunCounts:
    """What the work on a dataset has come to. Counted by the threads that encode and record, read by the display."""

    def __init__(self, dataset: PreparedDataset):
        self.begin = time.monotonic()
        self.num_completed = dataset.num_completed  # of the trajectories present and selected
        self.num_trajectories = len(dataset.trajectories)
        self.num_pending = len(dataset.pending)
        self.frames_total = dataset.num_frames
        self.frames_encoded = self.frames_finished = 0  # finished: of trajectories that are completed or failed
        self.num_results = self.num_bytes = self.num_new = 0
        self._work = dataset.work
        self._unfinished = {trajectory.name for trajectory in dataset.pending}
        self._stream = deque(trajectory.name for trajectory in dataset.pending)  # in order, from the first

    def add(self, result: TrajectoryResult) -> None:
        """Count a trajectory as finished."""
        self.num_results += 1
        self.num_bytes += sum(result.chunk_bytes)
        self.frames_finished += self._work[result.name].num_frames
        self._unfinished.discard(result.name)
        while self._stream and self._stream[0] not in self._unfinished:
            self._stream.popleft()

    @property
    def is_finished(self) -> bool:
        """Whether every pending trajectory is completed or failed."""
        return self.num_results == self.num_pending

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.begin

    @property
    def frames_done(self) -> int:
        """Frames that are behind: encoded, or of a trajectory that failed before all of its were."""
        return min(max(self.frames_encoded, self.frames_finished), self.frames_total)

    def state(self, num_chunks: int) -> RunState:
        """How far the run is."""
        elapsed_s = self.elapsed_s
        return RunState(
            done=self.num_completed,
            total=self.num_trajectories,
            chunks=num_chunks,
            elapsed_s=elapsed_s,
            frames_left=self.frames_total - self.frames_done,
            frames_per_s=self.frames_encoded / elapsed_s if elapsed_s > 0 else 0.0,
            trajectory=self._stream[0] if self._stream else None,
            frames_done=self.frames_done,
        )


class ProgressDisplay:
    """Shows how far a run is: a bar on a terminal, a line every progress_interval_s, the heartbeat. A context."""

    def __init__(self, counts: RunCounts, progress: Progress, cache_dir: Path, interval_s: float):
        self._counts, self._progress, self._interval_s = counts, progress, interval_s
        self._heartbeat = Heartbeat(cache_dir)
        self._last_line = self._last_shown = counts.begin

    def __enter__(self) -> ProgressDisplay:
        total, is_hidden = self._counts.frames_total, not sys.stderr.isatty()
        self._bar = tqdm(total=total, unit=" frames", dynamic_ncols=True, disable=is_hidden)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        self._heartbeat.end()

    def show(self, *, at_once: bool = False) -> None:
        """Bring everything up to date, unless that was done just now."""
        now, counts = time.monotonic(), self._counts
        if now - self._last_shown < SHOW_INTERVAL_S and not at_once:
            return
        self._last_shown = now
        num_chunks = self._progress.total_chunks
        self._bar.set_postfix(trajectories=counts.num_completed, chunks=num_chunks, refresh=False)
        self._bar.update(counts.frames_done - self._bar.n)
        if now - self._last_line >= self._interval_s:
            self._last_line = now
            LOG.info("%s", counts.state(num_chunks).line())
            EVENTS.info("progress", counts.state(num_chunks)._asdict())
        self._heartbeat.beat(lambda: counts.state(num_chunks))


class MountGuard:
    """Tells trajectories that cannot be read from a lost mount: such results are held back until one succeeds."""

    def __init__(self, data_folder: Path, trajectories: Iterable[Trajectory]):
        self._data_folder = data_folder
        self._paths = {trajectory.name: trajectory.path for trajectory in trajectories}
        self.held_back: list[TrajectoryResult] = []

    def holds_back(self, result: TrajectoryResult) -> bool:
        """Whether a failed trajectory is held back, since it may be one of many.

        Raises:
            StorageError: the data folder is gone, or too many cannot be read in a row.
        """
        if not isinstance(result.error, OSError) or not self._may_be_lost(result):
            return False
        self.held_back.append(result)
        LOG.warning("Cannot read %s: %s", result.name, result.error)
        if (count := len(self.held_back)) >= LOST_MOUNT_FAILURES:
            raise StorageError(f"{count} trajectories in a row cannot be read ({result.error}): {_LOST_MOUNT}")
        return True

    def _may_be_lost(self, result: TrajectoryResult) -> bool:
        try:
            with os.scandir(self._data_folder):
                pass
        except OSError as error:
            raise StorageError(
                f"data_folder {self._data_folder} no longer lists ({error.strerror}): {_LOST_MOUNT}"
            ) from error
        if isinstance(result.error, PermissionError):  # nothing there can be looked at, and this is no lost mount
            return False
        return result.error.errno in LOST_MOUNT_ERRNOS or not os.path.exists(self._paths[result.name])

    def release(self) -> list[TrajectoryResult]:
        """A trajectory succeeded, so the mount is there: those held back are themselves at fault."""
        released, self.held_back = self.held_back, []
        return released


class DatasetRun:
    """One dataset's work: feeds its trajectories to the workers and records what becomes of them."""

    def __init__(self, dataset: PreparedDataset, stop_request: StopRequest):
        options = dataset.config.options
        self._dataset, self._stop_request, self._options = dataset, stop_request, options
        self._progress, self._store = dataset.progress, dataset.store
        self._counts = RunCounts(dataset)
        self._display = ProgressDisplay(
            self._counts, dataset.progress, dataset.config.record_dir, options.progress_interval_s
        )
        self._mount = MountGuard(dataset.config.data_folder, dataset.pending)
        self._unchanged_failures = {s.trajectory.name for s in dataset.states if s.status == "failed"}
        self._states = {s.trajectory.name: s for s in dataset.states if s.status != "completed"}
        self._unfinished = set(self._states)  # whose chunks in staging are still wanted
        self._num_odd = sum(bool(s.status == "completed" and s.remark) for s in dataset.states) + len(dataset.lost)
        self._told: set[str] = set()  # trajectories that were said to have failed
        self._recut_is_left = dataset.recut_is_left  # the next run tries again
        self._must_save = False  # a run that has nothing to do, and changes no setting, leaves the record as it is
        self._elapsed_before_s = dataset.progress.elapsed_s

    def run(self) -> None:
        """Do the work.

        Raises:
            StorageError, DeviceError: the run cannot go on; what was completed is recorded.
        """
        announce(self._dataset)
        self._begin_record()
        try:
            if self._dataset.pending:
                with self._display:
                    self._process()
            self._end_record()
        finally:
            if self._must_save:
                self._save()

    def outcome(self, error: Exception | None, num_waiting: int) -> DatasetOutcome:
        """How it ended, `error` being what ended it early, if anything did. `num_waiting`: trajectories that come after
        this dataset."""
        dataset, counts, failures = self._dataset, self._counts, self._progress.failures
        present = {trajectory.name for trajectory in dataset.trajectories}
        stopped_by, held_back = None, self._mount.held_back
        if self._stop_request.signal_number is not None:
            stopped_by = "signal"
        elif not counts.is_finished:
            stopped_by = "deadline"
        if error is not None:
            exit_code = error.exit_code if isinstance(error, DinoCacheError) else EXIT_STOPPED_BY_FAULT
        elif stopped_by == "signal":
            exit_code = self._stop_request.exit_code
        elif failures or held_back or self._num_odd:
            exit_code = EXIT_SOME_FAILED
        else:
            exit_code = EXIT_WORK_LEFT if stopped_by or dataset.left_out else EXIT_COMPLETED
        return DatasetOutcome(
            name=dataset.name,
            exit_code=exit_code,
            num_trajectories=len(present),
            num_completed=counts.num_completed,
            num_new=counts.num_new,
            num_chunks=self._progress.total_chunks,
            num_left=counts.num_pending - counts.num_results + dataset.left_out,
            num_waiting=num_waiting if stopped_by == "signal" else 0,
            failures=dict(failures),
            told=frozenset(self._told),
            gone=frozenset(failures.keys() - present),
            held_back=[str(result.error) for result in held_back],
            num_odd=self._num_odd,
            seconds=counts.elapsed_s,
            num_frames=counts.frames_encoded,
            num_bytes=counts.num_bytes,
            max_attempts=self._options.max_attempts,
            stopped_by=stopped_by if error is None else None,
            error=error,
        )

    def _begin_record(self) -> None:
        """Put the configuration in force into the record, before any work."""
        dataset, progress = self._dataset, self._progress
        before = self._settings()
        progress.data_folder, progress.data_format = str(dataset.config.data_folder), dataset.config.format
        progress.other_caches = dataset.other_caches or None
        num_new = sum(name not in progress.records for name, *_ in dataset.trajectories)
        progress.num_trajectories = len(progress.records) + num_new + dataset.num_elsewhere
        if dataset.pending or progress.records:
            progress.processing_config = dataset.spec.to_json()
            progress.weights = dataset.weights
            settle_recorded_keys(progress.specs, dataset.spec)
        progress.checksum_kind = self._options.checksum
        renewed = [state for state in dataset.states if state.new_checksum or state.new_pairing]
        for state in renewed:
            name = state.trajectory.name
            record: TrajectoryRecord = {**progress.records[name]}
            if state.new_checksum:
                record["checksum_kind"] = self._options.checksum
            if state.new_pairing:
                record["pairing"] = state.new_pairing
            progress.complete(name, state.new_checksum or progress.checksums[name], record)
        for name in dataset.lost:
            progress.forget(name)
        progress.to_redo = {name for name, *_ in dataset.pending if name in progress.records}
        has_changed = bool(renewed or dataset.lost) or before != self._settings()
        has_changed |= (dataset.config.record_dir / JOURNAL_FILE).exists()  # of a killed run
        self._must_save = bool(dataset.pending or progress.rebuild_started or progress.recut_started) or has_changed
        with storage_errors(self._store.cache_dir):
            self._store.empty_staging(self._unfinished)
        if dataset.pending:
            self._save()

    def _settings(self) -> dict[str, Any]:
        """What the record says of the run, trajectories apart."""
        keys = (
            "processing_config", "weights", "checksum_kind", "data_folder", "data_format", "num_trajectories",
            "other_caches",
        )  # fmt: skip
        return {key: getattr(self._progress, key) for key in keys}

    def _process(self) -> None:
        dataset = self._dataset
        digest = dataset.weights["digest"]
        fingerprint = dataset.spec.fingerprint(digest)
        self._progress.specs[fingerprint] = dataset.spec.to_json()
        label = ChunkLabel(
            dataset_name=dataset.name,
            spec=dataset.spec,
            fingerprint=fingerprint,
            weights_digest=digest,
            token_shapes=token_shapes(dataset.spec, dataset.shape),
        )
        fatal = {result.name for result in dataset.fatal}
        job = CacheJob(
            trajectories=[trajectory for trajectory in dataset.pending if trajectory.name not in fatal],
            num_frames={name: work.num_frames for name, work in dataset.work.items()},
            retried=frozenset(self._progress.failures),
            label=label,
            options=self._options,
            store=self._store,
            encoder=dataset.encoder if dataset.workers.encodes_here else None,
            data_folder=dataset.config.data_folder,
        )
        hooks = Hooks(should_stop=self._stop_request, on_encoded=self._on_encoded, before_replacing=self._withdraw)
        for result in itertools.chain(dataset.fatal, dataset.workers.stream(job, hooks)):
            self._record_result(result, fingerprint)
            self._display.show(at_once=self._counts.is_finished)

    def _end_record(self) -> None:
        if self._counts.is_finished and not self._dataset.left_out:
            self._progress.rebuild_started = None
            if not (self._recut_is_left or self._mount.held_back):
                self._progress.recut_started = None
        with storage_errors(self._store.cache_dir):
            self._store.empty_staging(self._unfinished)

    def _record_result(self, result: TrajectoryResult, fingerprint: str) -> None:
        """Record what became of one trajectory, unless it is held back while it may be the mount's fault."""
        self._counts.add(result)
        if not isinstance(result.error, OSError):
            self._unfinished.discard(result.name)
        if result.error is None:
            for held_back in self._mount.release():
                self._fail(held_back)
            self._complete(result, fingerprint)
        elif not self._mount.holds_back(result):
            self._fail(result)

    def _complete(self, result: TrajectoryResult, fingerprint: str) -> None:
        record: TrajectoryRecord = {
            "fingerprint": fingerprint,
            "spans": [list(span) for span in result.spans],
            "bytes": result.chunk_bytes,
            "checksum_kind": result.checksum_kind,
        }
        if (pairing := format_named(self._dataset.config.format).pairing) > 1:
            record["pairing"] = pairing
        self._progress.complete(result.name, result.checksum, record)
        self._counts.num_completed += 1
        self._counts.num_new += 1
        about = {"dataset": self._dataset.name, "trajectory": result.name}
        EVENTS.info("completed", {**about, "chunks": len(result.spans), "bytes": sum(result.chunk_bytes)})
        for start, stop in result.left_out:
            why = f"less than min_chunk_distance_m {self._dataset.spec.min_chunk_distance_m} between pose jumps"
            LOG.info("%s: kept frames %d to %d are not stored: %s", result.name, start, stop - 1, why)
        self._save(spaced=True)
        if result.replaced is not None:
            shutil.rmtree(result.replaced.parent, ignore_errors=True)

    def _fail(self, result: TrajectoryResult) -> None:
        """Record a failure. The one rule of completed work: its record and its chunks stay unless data that could be
        read changed and break a rule, or chunk files that it names are gone. Chunks that no record names are void."""
        name, error, state = result.name, result.error, self._states[result.name]
        LOG.warning("Failed: %s", error, exc_info=error)
        self._told.add(name)
        about = {"dataset": self._dataset.name, "trajectory": name}
        EVENTS.info("failed", {**about, "reason": str(error), "error_type": type(error).__name__})
        is_recorded = name in self._progress.records
        is_removed = is_void(state, error) or (not is_recorded and isinstance(error, InvalidDataError))
        if is_recorded and state.is_whole and not is_removed:
            LOG.warning("%s stays as it was completed", name)
            self._counts.num_completed += 1
            self._num_odd += 1
            self._recut_is_left |= state.trajectory.old is not None and not isinstance(error, InvalidDataError)
            return
        before = self._progress.failures.get(name)
        unchanged = before is not None and (name in self._unchanged_failures or before["checksum"] == result.checksum)
        failure: Failure = {
            "reason": str(error),
            "error_type": type(error).__name__,
            "attempts": before["attempts"] + 1 if unchanged else 1,
            "time": time.time(),
            "checksum": result.checksum,
            "checksum_kind": result.checksum_kind,
        }
        self._withdraw(name)
        if is_removed:
            with storage_errors(self._store.cache_dir):
                self._store.remove_chunks(name)
        self._progress.fail(name, failure)
        self._save(spaced=True)

    def _withdraw(self, name: str) -> None:
        """Un-record a trajectory, durably: its chunks are about to be replaced or removed."""
        if self._progress.forget(name):
            self._save(spaced=True, at_once=True)

    def _save(self, *, spaced: bool = False, at_once: bool = False) -> None:
        if not self._options.enable_progress_tracking:
            return
        run_time_s = self._counts.elapsed_s
        self._progress.elapsed_s = self._elapsed_before_s + run_time_s
        with storage_errors(self._store.cache_dir), PROFILE("record"):
            if spaced:
                self._progress.save_spaced(run_time_s, at_once=at_once)
            else:
                self._progress.save()

    def _on_encoded(self, count: int) -> None:
        self._counts.frames_encoded += count
        self._display.show()
        with storage_errors(self._store.cache_dir):
            self._progress.sync_spaced()


def announce(dataset: PreparedDataset) -> None:
    """Say what a run is about to do."""
    total, completed = len(dataset.trajectories), dataset.num_completed
    LOG.info("dino_cache %s, %s", __version__, time.strftime("%Y-%m-%d %H:%M:%S"))
    LOG.info("Dataset %s: %s -> %s", dataset.name, dataset.config.data_folder, dataset.config.cache_dir)
    if dataset.config.shard is not None:
        open_door(SHARDS_MODULE).announce(dataset)
    places = {"data_folder": str(dataset.config.data_folder), "cache_dir": str(dataset.config.cache_dir)}
    counts = {"trajectories": total, "completed": completed, "to_do": len(dataset.pending)}
    EVENTS.info("start", {"dataset": dataset.name, **places, **counts, "frames": dataset.num_frames})
    if dataset.pending and dataset.must_encode:
        announce_encoding(dataset)
    if dataset.recut:
        LOG.info("%s", open_door(RECUT_MODULE).describe(dataset))
    if dataset.progress.records:
        LOG.info("Loaded existing progress: %d trajectories completed", completed)
        LOG.info("Resuming processing: %d/%d trajectories completed", completed, total)
        LOG.info("Remaining trajectories: %d", total - completed)
    else:
        LOG.info("Processing %d trajectories", total)
    facts, doubts = pose_lines(dataset)
    for fact in facts:
        LOG.info("%s", fact)
    for remark in [*remarks(dataset), *doubts]:
        LOG.warning("%s", remark)


def announce_encoding(dataset: PreparedDataset) -> None:
    """Say with what, where and in which batches frames are encoded."""
    spec, workers = dataset.spec, dataset.workers
    where = workers.describe()
    if workers.encodes_here:
        where += f", {resolve_batch_size(dataset.config.options, dataset.encoder)} frames a batch"
    source = dataset.weights["source"]
    how = spec.precision + (f" by {spec.engine}" if spec.engine != "torch" else ", compiled" if spec.compile else "")
    LOG.info("Encoding with %s (%s) in %s on %s", spec.dino_model_type, source, how, where)
    if workers.encodes_here and workers.device.startswith("cuda") and is_there(HINTS_MODULE):
        for hint in open_door(HINTS_MODULE).other_gpus():
            LOG.warning("%s", hint)
    if spec.weights == "random":
        LOG.warning("WEIGHTS ARE RANDOM (seeded): the features are for trying things out and mean nothing")
    elif spec.dino_model_type not in MODEL_NAMES:
        LOG.info("Licence of these weights: %s", open_door(TIMM_MODELS_MODULE).licence(spec.dino_model_type))


def begin_shards(dataset: PreparedDataset) -> None:
    """Bring what waits in shards into the record; of a run with --shard, begin its own record."""
    if dataset.config.shard is not None or (dataset.config.cache_dir / SHARDS_FOLDER).is_dir():
        open_door(SHARDS_MODULE).begin(dataset)


def begin_rebuild(dataset: PreparedDataset) -> None:
    """Where much is redone, withdraw it from the record before any dataset's work: a plain run then goes on with all.
    The record before it is set aside. Of a re-cut, only a mark is put there."""
    progress, cache_dir = dataset.progress, dataset.config.cache_dir
    if dataset.begins_rebuild:
        with storage_errors(cache_dir):
            dataset.store.empty_staging(())  # partial trajectories are redone too
    if progress.rebuild_started is not None and dataset.config.options.enable_progress_tracking:
        with storage_errors(cache_dir):
            if dataset.has_forgotten:
                LOG.warning(
                    "%s: the record before it is kept as %s", dataset.name, set_aside(cache_dir, "rebuild").name
                )
            progress.save()
    if progress.recut_started is not None:
        open_door(RECUT_MODULE).begin(dataset)


class LogFormatter(logging.Formatter):
    """A record as one line, whatever names it holds; the lines of a traceback follow it, indented."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(logging.makeLogRecord({**vars(record), "exc_text": None}))  # not what others made of it

    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))

    def formatException(self, fault: Any) -> str:
        text, error, seen = super().formatException(fault), fault[1], set()
        while error is not None and id(error) not in seen:  # causes can go round in a ring
            seen.add(id(error))
            if str(error):
                text = text.replace(str(error), printable(error))
            error = error.__cause__ or error.__context__
        return "\n".join("    " + printable(line) for line in text.split("\n"))


class Backlog(logging.Handler):
    """What is said while no cache's log is open. Each log gets what it lacks when it is opened, and at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.locked: list[Path] = []  # caches that this run holds or held
        self._records: list[logging.LogRecord] = []
        self._num_handed: dict[Path, int] = {}  # cache folder -> records that its log has, of those opened

    def begin(self) -> None:
        """Keep what is said from here on; what an earlier run of this process said is forgotten."""
        for kept in (self.locked, self._records, self._num_handed):
            kept.clear()
        LOG.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)

    def hand_to(self, cache_dir: Path, log: logging.Handler) -> None:
        """Write into a log what it lacks."""
        for record in self._records[self._num_handed.get(cache_dir, 0) :]:
            log.handle(record)
        self._num_handed[cache_dir] = len(self._records)

    def end(self) -> None:
        """Write what was said since into the logs of this run; where the console could not be told why the run was
        refused, into those of all caches that it held. Otherwise a refusal leaves caches as they are."""
        for cache_dir in self.locked if console_error() else list(self._num_handed):
            if self._num_handed.get(cache_dir, 0) < len(self._records):
                with contextlib.suppress(OSError), log_file(cache_dir):
                    pass
        LOG.removeHandler(self)


BACKLOG = Backlog()


@contextlib.contextmanager
def log_file(cache_dir: Path) -> Iterator[None]:
    """Everything that is logged goes to the cache's log file too, with times and tracebacks."""
    handler = logging.FileHandler(cache_dir / LOG_FILE, encoding="utf-8", errors="backslashreplace")
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(message)s"))
    BACKLOG.hand_to(cache_dir, handler)
    has_backlog = BACKLOG in LOG.handlers
    LOG.removeHandler(BACKLOG)
    LOG.addHandler(handler)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        if has_backlog:
            LOG.addHandler(BACKLOG)
        with contextlib.suppress(OSError):  # a full disk: what is buffered cannot be written
            handler.close()


def run_datasets(datasets: list[PreparedDataset], stop_request: StopRequest) -> NightOutcome:
    """Do the work of one dataset after the other. A fault of its disk ends the work on one dataset, any other all."""
    outcomes: list[DatasetOutcome] = []
    for number, dataset in enumerate(datasets, 1):
        num_waiting = sum(len(other.pending) + other.left_out for other in datasets[number:])
        outcomes.append(run_dataset(dataset, stop_request, num_waiting))
        error = outcomes[-1].error
        if error is not None and not isinstance(error, StorageError):  # the device, a worker's refusal, our own fault
            return NightOutcome(outcomes, outcomes[-1].exit_code)
        if stop_request.signal_number is not None:
            return NightOutcome(outcomes, stop_request.exit_code)
    codes = {outcome.exit_code for outcome in outcomes}
    return NightOutcome(outcomes, next(code for code in _WORST_FIRST if code in codes))


def verdict(night: Night, exit_code: int) -> str:
    """A run's last line: how it went, and what is known of what it came to. A dataset that was not begun counts too.

    STOPPED: by a signal or a fault (exit 3, 128 + n). FAILED: refused (2, 4), or some failed and none is completed, by
    this run or earlier. PARTIAL: some failed, or work is left (1, 5). OK: neither (0).
    """
    begun, outcomes = {outcome.name for outcome in night.outcomes}, list(night.outcomes)
    for dataset in night.prepared:
        if dataset.name not in begun:
            if not dataset.pending:  # not chosen yet
                dataset.choose_pending(None)
            outcomes.append(DatasetRun(dataset, StopRequest(None)).outcome(None, 0))

    def total(key: str) -> Any:
        return sum(getattr(outcome, key) for outcome in outcomes)

    failed = sum(len(outcome.failures) + len(outcome.held_back) for outcome in outcomes)
    duration, rate = human_duration(time.time() - night.begin), total("num_frames") / max(total("seconds"), 1e-9)
    parts = [] if night.num_datasets is None else [f"{night.num_datasets} datasets"]
    if outcomes:
        parts += [f"{total('num_completed')} completed (+{total('num_new')})", f"{failed} failed"]
        parts += [f"{total('num_left')} left", *[f"{total('num_odd')} odd"] * bool(total("num_odd"))]
        parts += [human_bytes(total("num_bytes")), duration, f"{rate:.0f} frames/s"]
    word = "OK" if exit_code == EXIT_COMPLETED else "PARTIAL"
    if exit_code in _REFUSALS or (exit_code == EXIT_SOME_FAILED and failed and not total("num_completed")):
        word = "FAILED"
    elif exit_code == EXIT_STOPPED_BY_FAULT or exit_code > 128:
        word = "STOPPED"
    return f"{word}: {', '.join(parts or [duration])}, exit {exit_code}"


def run_dataset(dataset: PreparedDataset, stop_request: StopRequest, num_waiting: int = 0) -> DatasetOutcome:
    """Do one dataset's work and say, in its log too, how it ended. Whatever ended it early is in the outcome: nothing
    false is recorded, and a rerun resumes."""
    with contextlib.ExitStack() as logs:
        run, error = DatasetRun(dataset, stop_request), None
        try:
            with storage_errors(dataset.config.cache_dir):
                logs.enter_context(log_file(dataset.config.record_dir))
            run.run()
        except Exception as fault:
            error = fault
        outcome = run.outcome(error, num_waiting)
        log_outcome(outcome)
    return outcome


# ======================================================================================================================
# Forecast: what a run would do and take, for --dry-run
# ======================================================================================================================


def print_forecast(dataset: PreparedDataset, reasons: list[str], rates: dict[str, float | None]) -> None:
    """What a run would do. `reasons`: why trajectories will fail; `rates`: frames/s by dataset, where measured."""
    taken = new_bytes(dataset)
    print_lines(f"Dataset {dataset.name}: {dataset.config.data_folder} -> {dataset.config.cache_dir}")
    print_lines(f"  trajectories: {len(dataset.trajectories)}")
    print_lines(f"  completed: {dataset.num_completed}")
    print_lines(f"  to do now: {len(dataset.pending)}")
    if dataset.recut:
        print_lines(f"  {open_door(RECUT_MODULE).describe(dataset)}")
    print_lines(f"  frames to encode: {dataset.num_frames}")
    print_lines(f"  chunks to write: {sum(work.num_chunks for work in dataset.work.values())}")
    print_lines(f"  bytes they take: {taken} ({human_bytes(taken)}), replacing {human_bytes(replaced_bytes(dataset))}")
    for line in open_door(MEASURE_MODULE).cost_lines(dataset, rates) if is_there(MEASURE_MODULE) else ():
        print_lines(line)
    print_lines(f"  free space: {human_bytes(free_bytes(dataset.config.cache_dir))}")
    model_type, is_random = dataset.spec.dino_model_type, dataset.spec.weights == "random"
    if dataset.pending and not is_random and model_type not in MODEL_NAMES:
        print_lines(f"  licence of the weights: {open_door(TIMM_MODELS_MODULE).licence(model_type)}")
    if dataset.progress.is_begun:
        changes = configuration_changes(dataset)
        recorded, source = dataset.progress.weights, weights_source(dataset.spec)["source"]
        if recorded and recorded["source"] != source:
            changes.append(("weights", recorded["source"], source))
        for key, old, new in changes:
            print_lines(f"  changed configuration: {key}: {old} -> {new}")
        if changes and not dataset.progress.recut_started:
            print_lines("  a run would ask about it, and without a terminal refuse to start unless --yes is given")
    facts, doubts = pose_lines(dataset)
    for remark in [*facts, *remarks(dataset), *doubts]:
        print_lines(f"  {remark}")
    if reasons:
        print_lines(f"  will fail: {len(reasons)}")
        for reason in reasons[:SHOWN_NAMES]:
            print_lines(f"    {reason}")
        if len(reasons) > SHOWN_NAMES:
            print_lines(f"    ... and {len(reasons) - SHOWN_NAMES} more")


# ======================================================================================================================
# A run: every step from the config to the outcome, in the order that is promised
# ======================================================================================================================


class RunArguments(NamedTuple):
    """What the command line asks for, the config's own settings apart."""

    config: Path
    overrides: dict[str, Any]  # of config keys, for every dataset
    datasets: list[str] | None = None  # None: all of the config
    dry_run: bool = False
    measure: bool = False
    yes: bool = False
    limit: int | None = None
    told: list[Any] | None = None  # gets the config's hooks; None: no one is told
    log_json: Path | None = None
    recut: bool = False
    shard: Shard | None = None


def run(arguments: RunArguments, stop_request: StopRequest, night: Night | None = None) -> NightOutcome:
    """Check everything that can be refused, for all datasets; then do the work. One refusal starts nothing. What is
    known at any moment, also when this raises, is in `night`.

    Raises:
        RefusedError, CacheLockedError, StoppedError: nothing was started.
    """
    night, answers = night or Night(), {}
    while True:
        try:
            return attempt(arguments, stop_request, night, answers)
        except ChangedConfig as change:  # all locks are free while it is asked; then all is compared again
            answers[change.facts] = change.decide(stop_request, yes=arguments.yes)


def confirmed(
    dataset: PreparedDataset,
    config: DatasetConfig,
    answers: dict[str, str],
    stop_request: StopRequest,
    arguments: RunArguments,
) -> PreparedDataset:
    """The dataset, once its changed settings are confirmed, which a dry run takes for granted; prepared anew where all
    is redone. Raises ChangedConfig where that is to be asked."""
    change = ChangedConfig(dataset, configuration_changes(dataset), can_redo=config.shard is None)
    if arguments.recut:
        is_begun = bool(dataset.progress.records)
        open_door(RECUT_MODULE).refuse_other_features(dataset, change.differences if is_begun else [])
        answers[change.facts] = "recut"
    answer = "keep"
    if arguments.recut or not arguments.dry_run:
        answer = confirm_changes(change, answers, stop_request, yes=arguments.yes)
    if answer == "redo":
        options = config.options.model_copy(update={"force_rebuild": True})
        return prepare_dataset(dataclasses.replace(config, options=options), stop_request)
    if answer == "keep" and change.differences:
        dataset.progress.recut_started = None
    if answer == "recut" or dataset.progress.recut_started is not None:
        open_door(RECUT_MODULE).take_up(dataset)
    return dataset


def attempt(arguments: RunArguments, stop_request: StopRequest, night: Night, answers: dict[str, str]) -> NightOutcome:
    """A run, with what was answered so far. Raises ChangedConfig where something is to be asked."""
    with contextlib.ExitStack() as resources:
        # 1) read the config
        not_told_yet = None if arguments.told else arguments.told
        all_configs = load_config(arguments.config, arguments.overrides, not_told_yet)
        configs = select_datasets(all_configs, arguments.datasets, arguments.shard)
        night.num_datasets = len(configs)
        # 2) see that every disk is there, and lock every cache before anything slow
        for config in configs:
            refuse_missing_data(config)
            if not arguments.dry_run:
                refuse_gone_cache(config, all_configs, stop_request, yes=arguments.yes)
        for config in () if arguments.dry_run else configs:
            resources.enter_context(locked(config))
            BACKLOG.locked.append(config.record_dir)
        # 3) read the records, list the trajectories, compare them
        with PROFILE("list"):
            datasets = night.prepared = [prepare_dataset(config, stop_request) for config in configs]
        # 4) have changed settings confirmed
        for number, config in enumerate(configs):
            datasets[number] = confirmed(datasets[number], config, answers, stop_request, arguments)
        # 5) choose what is to do
        for dataset in datasets:
            dataset.other_caches = other_caches(dataset, all_configs)
            dataset.choose_pending(arguments.limit)
        if arguments.dry_run:
            forecast(datasets, stop_request, with_rates=arguments.measure)
            return NightOutcome([], EXIT_COMPLETED)
        # 6) find libraries and workers, settle device, precision and shapes
        if any(dataset.pending for dataset in datasets):
            start_fork_server(READING_LIBRARIES if any(map(reads_in_processes, datasets)) else ())
            say_step("loading torch")
            for library in WORK_LIBRARIES:
                open_library(library)
        workers = open_workers(datasets, resources)
        stop_request.check()
        for dataset in (dataset for dataset in datasets if dataset.pending):
            settle_encoding(dataset)
        # 7) see that the disks can hold it
        with PROFILE("list"):
            estimate_all(datasets, stop_request)
        check_disk(datasets)
        # 8) load the weights, and have other ones than the recorded confirmed
        with PROFILE("load"):
            load_encoders(datasets, stop_request)
        for dataset in datasets:
            change = ChangedConfig(dataset, weights_differences(dataset), can_redo=False)
            confirm_changes(change, answers, stop_request, yes=arguments.yes)
        # 9) wait for the workers
        for party in workers:
            party.gather(stop_request)
        stop_request.check()
        # 10) from here on something is written: withdraw what is redone, then work
        for dataset in datasets:
            begin_shards(dataset)
            begin_rebuild(dataset)
        outcome = run_datasets(datasets, stop_request)
        night.outcomes = outcome.datasets
        record_history(night, outcome.exit_code)
        return outcome


def record_history(night: Night, exit_code: int) -> None:
    """Add the run to the histories of the caches that it worked on, where there is what writes them."""
    word = verdict(night, exit_code).partition(":")[0]
    for dataset, outcome in zip(night.prepared, night.outcomes if is_there(HISTORY_MODULE) else ()):
        shard, cache_dir = dataset.config.shard, dataset.config.cache_dir
        try:
            with contextlib.nullcontext() if shard is None else open_door(SHARDS_MODULE).guard(cache_dir):
                open_door(HISTORY_MODULE).add_run(cache_dir, outcome, word, night.begin, exit_code, shard)
        except (OSError, CacheLockedError) as error:  # a full disk, say; what was done stays done
            LOG.warning("%s: this run is not added: %s", cache_dir / RUNS_FILE, error)


def forecast(datasets: list[PreparedDataset], stop_request: StopRequest, *, with_rates: bool) -> None:
    """Say what a run would do and take. With rates, measured in this process; else no cluster is asked."""
    for dataset in datasets:
        if dataset.pending:
            if with_rates or dataset.config.options.executor == "local":
                dataset.workers = LocalWorkers(resolve_device(dataset.config.options.device))
            settle_encoding(dataset)
    start_fork_server(READING_LIBRARIES if with_rates else ())
    reasons = estimate_all(datasets, stop_request)
    rates = open_door(MEASURE_MODULE).measure(datasets, stop_request) if with_rates else {}
    for dataset, why in zip(datasets, reasons):
        print_forecast(dataset, why, rates)


def select_datasets(
    configs: list[DatasetConfig], names: list[str] | None, shard: Shard | None = None
) -> list[DatasetConfig]:
    """Those named on the command line, all where none is; of each the share that is asked for."""
    known = [config.name for config in configs]
    for name in names or []:
        if name not in known:
            raise RefusedError(f"--dataset {name}: not in the config; it has {', '.join(known)}")
    chosen = [config for config in configs if not names or config.name in names]
    return chosen if shard is None else [open_door(SHARDS_MODULE).sharded(config, shard) for config in chosen]


def locked(config: DatasetConfig) -> contextlib.AbstractContextManager[None]:
    """Holds the lock of a dataset's cache, or of its shard."""
    return locked_cache(config.cache_dir) if config.shard is None else open_door(SHARDS_MODULE).locked(config)


def refuse_missing_data(config: DatasetConfig) -> None:
    """Raise RefusedError unless the data folder is there and, before the cache folder is made, which may lie in it,
    holds a trajectory: it could be the mount point of a disk that is absent."""
    if not config.data_folder.is_dir():
        raise RefusedError(
            f"datasets.{config.name}.data_folder: {config.data_folder} is not a folder; is the disk mounted?"
        )
    if not config.cache_dir.exists():
        is_known = config.format != "auto"
        kind = format_named(
            config.format if is_known else detect_format(config.data_folder, data_keys(config.spec)).name
        )
        if next(iter(kind.find(config.data_folder, config.spec)), None) is None:
            refuse_no_trajectories(config, kind)


def refuse_gone_cache(
    config: DatasetConfig, all_configs: list[DatasetConfig], stop_request: StopRequest, *, yes: bool
) -> None:
    """Have it confirmed that a cache is begun where one was and nothing is left of it.

    Raises:
        RefusedError: the answer is no, there is neither --yes nor a terminal, or the cache's disk is not mounted.
    """
    if not is_empty_cache(config.cache_dir):
        return
    where = f"datasets.{config.name}.cache_dir: {config.cache_dir}"
    if mount_point := absent_mount(config.cache_dir):
        raise RefusedError(
            f"{where}: nothing is mounted on {mount_point}, which {FSTAB} lists; mount it, or give another cache_dir"
        )
    witnesses = [other.cache_dir for other in all_configs if str(config.cache_dir) in recorded_caches(other.cache_dir)]
    if not witnesses or yes or config.options.force_rebuild:
        return
    ways = "Ways on: mount the disk that it is on; or --yes begins it anew"
    gone = f"{where}: there was a cache, as {witnesses[0] / PROGRESS_FILE} says, and nothing is left of it"
    LOG.warning("%s", gone)
    if answer_to("Begin it anew?", ways, stop_request) not in ("y", "yes"):
        raise RefusedError(f"{gone}. Nothing was changed. {ways}")


def other_caches(dataset: PreparedDataset, all_configs: list[DatasetConfig]) -> list[str]:
    """Where the caches of the config's other datasets are, or were when that was last recorded."""
    recorded = dataset.progress.other_caches or []
    others = [config.cache_dir for config in all_configs if config.name != dataset.name]
    return sorted(str(path) for path in others if str(path) in recorded or (path / PROGRESS_FILE).exists())


# ======================================================================================================================
# Command line
# ======================================================================================================================


class ConsoleHandler(logging.Handler):
    """Messages without tracebacks, past the progress bar: information to stdout, warnings and errors to stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        is_step = getattr(record, "is_step", False)
        if is_step and not sys.stderr.isatty():
            return
        to_stderr = is_step or record.levelno >= logging.WARNING
        tqdm.write(printable(record.getMessage()), file=sys.stderr if to_stderr else sys.stdout)
        sys.stdout.flush()


def set_up_process() -> None:
    """Logging, and as many open files as the system grants: overlapping chunks are open together."""
    gc.set_threshold(*GC_THRESHOLDS)
    LOG.setLevel(logging.INFO)
    LOG.propagate = False
    logging.raiseExceptions = False  # a full disk shall not drown its own message in tracebacks of the log file
    if not LOG.handlers:
        LOG.addHandler(ConsoleHandler())
    BACKLOG.begin()
    process_umask()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


HELP_ON_EXITS = (
    "Exit codes: 0 all completed, 1 some failed, 2 refused, 3 stopped by a fault, 4 another run holds the cache, 5 "
    "stopped with work left, 128 + n by signal n; of several the first of 3, 1, 5, 0."
)


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program_name("dino_cache.py"),
        description="Turn robot trajectories into frozen DINO features. Running it again goes on where it stopped.",
        epilog=f"{HELP_ON_EXITS} {example('dino_cache.py', '--config config/data/sample.yaml')}",
        allow_abbrev=False,
    )
    add, version = parser.add_argument, f"dino_cache {__version__}"
    add("--version", action="version", version=version)
    add("--config", type=Path, required=True, metavar="FILE", help="the YAML configuration")
    add("--dataset", action="append", metavar="NAME", help="only this dataset of the config (may be repeated)")
    add("--dry-run", action="store_true", help="say what would be done and what it takes; write nothing")
    add("--measure", action="store_true", help="with --dry-run: decode and encode for seconds, to estimate the time")
    add("--force-rebuild", action="store_true", help="redo every trajectory (of the split)")
    add("--recut", action="store_true", help="cut what is completed anew, as configured now, from its stored features")
    add("--yes", action="store_true", help="go on with a changed configuration, or where a cache is gone")
    add("--limit", type=_positive(int), metavar="N", help="at most N pending trajectories per dataset")
    add("--max-hours", type=_positive(float), metavar="H", help="stop, resumably, after H hours")
    add(
        "--shard", type=_shard, metavar="I/N",
        help="only the I-th of N shares of the trajectories, 0/N to N-1/N, beside runs that do the others",
    )  # fmt: skip
    add("--profile", action="store_true", help="at the end, say where the time went, and the limit")
    add("--log-json", type=Path, metavar="FILE", help="append what happens to a file, a JSON object a line")
    add("--device", metavar="D", help="auto, cpu, cuda or cuda:N, instead of the config's")
    add("--batch-size", type=_positive(int), metavar="B", help="frames per batch, instead of the config's")
    add(
        "--set", action="append", type=_setting, default=[], metavar="KEY=VALUE",
        help="a key of the config, for every dataset; datasets.NAME.KEY=VALUE for one (may be repeated)",
    )  # fmt: skip
    return parser


def _setting(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not sign or not key.strip():
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    try:
        return key.strip(), yaml.load(value, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: the value is not YAML: {one_line(error)}") from error


def _shard(text: str) -> Shard:
    parts = re.fullmatch(r"(\d+)/(\d+)", text, re.ASCII)
    if parts is None or not int(parts[1]) < int(parts[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with 0 <= I < N: of 16 shares write 0/16, ..., 15/16")
    return Shard(int(parts[1]), int(parts[2]))


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not greater than 0")
        return value

    parse.__name__ = kind.__name__  # argparse names it in its message
    return parse


def run_arguments(parsed: argparse.Namespace) -> RunArguments:
    """The parsed command line as a run takes it; options that replace keys of the config are overrides."""
    overrides = {key: getattr(parsed, key) for key in ("device", "batch_size")}
    overrides["force_rebuild"] = parsed.force_rebuild or None
    return RunArguments(
        datasets=parsed.dataset,
        overrides={**dict(parsed.set), **{key: value for key, value in overrides.items() if value is not None}},
        **{
            key: getattr(parsed, key)
            for key in ("config", "dry_run", "measure", "yes", "limit", "log_json", "recut", "shard")
        },
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 everything completed; 1 some trajectories failed; 2 refused, nothing started; 3 stopped by storage, device or an
    unexpected error, resumable; 4 another run holds the cache; 5 --max-hours or --limit left work; 128 + n signal n.
    Of several the first of 3, 1, 5, 0 stands.
    """
    set_up_console()
    parser = build_parser()
    parsed = parser.parse_args(argv)
    if parsed.measure and not parsed.dry_run:
        parser.error("--measure: goes with --dry-run")
    if parsed.recut and parsed.force_rebuild:
        parser.error("--recut keeps features that --force-rebuild redoes: give one of them")
    if parsed.recut and parsed.shard is not None:
        parser.error("--recut: not with --shard. One run cuts the whole cache anew; begin the shards after it")
    for key, count in Counter(key for key, _ in parsed.set).items():
        if count > 1:
            parser.error(f"--set: {key} is given twice")
    stop_request = StopRequest(parsed.max_hours)
    stop_request.install()
    set_up_process()
    try:
        told: list[Any] | None = None if parsed.dry_run else []
        arguments = run_arguments(parsed)._replace(told=told)
        night = run_and_say(arguments, stop_request, with_profile=parsed.profile)
        for hooks in told or ():
            hooks.end(night)
        return night.exit_code
    finally:
        stop_fork_server()
        BACKLOG.end()


def run_and_say(arguments: RunArguments, stop_request: StopRequest, *, with_profile: bool) -> NightOutcome:
    """Run, say what kept it from running, and end with the verdict."""
    night = Night()
    with contextlib.ExitStack() as resources:
        try:
            refuse_locale()
            if arguments.log_json is not None:
                resources.enter_context(open_door(JSON_LOG_MODULE).events_go_to(arguments.log_json))
            with advice_on(arguments.config, arguments.overrides):
                exit_code = run(arguments, stop_request, night).exit_code
            if with_profile and not arguments.dry_run:
                for line in PROFILE.table():
                    LOG.info("%s", line)
        except Exception as error:
            exit_code = say_what_ended(error)
        line = verdict(night, exit_code)
        if not arguments.dry_run:
            LOG.info("%s", line)
            EVENTS.info("end", {"verdict": line, "exit_code": exit_code})
    return NightOutcome(night.outcomes, exit_code, line)


def say_what_ended(error: Exception) -> int:
    """Say what kept a run from running; returns the exit code."""
    if isinstance(error, ImportError):
        error = missing_library(error)
    if not isinstance(error, DinoCacheError):
        LOG.error("error: unexpected: %r", error, exc_info=error)
        print_lines(*"".join(traceback.format_exception(error)).splitlines(), file=sys.stderr)
        return EXIT_STOPPED_BY_FAULT
    first, *more = error.args
    for line in (f"error: {first}", *more):
        LOG.error("%s", line)
    return error.exit_code


def __getattr__(name: str) -> Any:
    """What DOORS names is imported from here as if it stood here."""
    if name not in DOORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(open_door(DOORS[name]), name)
    except RefusedError as error:
        raise ImportError(str(error)) from error


if __name__ == "__main__":
    import dino_cache  # by this name, under which Ray's workers find its classes too

    sys.exit(dino_cache.main())
