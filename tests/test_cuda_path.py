"""The CUDA path on a fake device: its order, its tails, its halving and its values; and what a real one does wrong.

The device does nothing before it is waited for: a copy or a kernel that is asked for joins a queue, and reads its
input when its turn comes. So a buffer that is used again too early, or a result that is read too early, shows.
"""

from __future__ import annotations

import copy
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch

import dino_cache
from dino_cache import (
    Batch,
    CacheSpec,
    Content,
    DeviceError,
    DinoEncoder,
    EncodedBatch,
    EncodedRows,
    FailedTrajectories,
    FrameGroup,
    RefusedError,
    Rows,
    build_model,
    check_engine,
    encode_batches,
    full_batches,
    resolve_device,
    resolve_precision,
)
from support import make_trajectory, run_cache, write_config

SPEC = CacheSpec(
    dino_model_type="small_reg", weights="random", tokens=("cls", "patch", "register"), image_size=(56, 70),
    precision="fp32",
)  # fmt: skip
GRID, WIDTH, REGISTERS = (4, 5), 384, 4
NUM_FRAMES = 53


class FakeStream:
    """Work in the order in which it was asked for; none is done before somebody waits."""

    def __init__(self) -> None:
        self.queue: deque[Callable[[], None]] = deque()

    def ask(self, work: Callable[[], None]) -> None:
        self.queue.append(work)

    def do_next(self) -> None:
        with torch.inference_mode():
            self.queue.popleft()()


class FakeEvent:
    stream: FakeStream

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self._time: float | None = None

    def record(self, stream: FakeStream) -> None:
        stream.ask(lambda: setattr(self, "_time", time.perf_counter()))

    def synchronize(self) -> None:
        while self._time is None:
            self.stream.do_next()

    def elapsed_time(self, other: FakeEvent) -> float:
        assert None not in (self._time, other._time), "the time between events that are not done"
        return 1000 * (other._time - self._time)


class OnDevice:
    """A tensor of the device: its values are there when the stream gets to them."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, values: Callable[[], torch.Tensor]):
        self.shape, self.dtype, self.values = shape, dtype, values


class HostPixels:
    """A batch on the host; its copy to the device is only asked for."""

    def __init__(self, pixels: torch.Tensor):
        self.pixels = pixels

    def to(self, device: torch.device, non_blocking: bool) -> torch.Tensor:
        assert non_blocking
        return self.pixels


class FakeCudaEncoder(DinoEncoder):
    """DinoEncoder as on CUDA, with a queue in the device's place and a model on the CPU."""

    def __init__(self, model: torch.nn.Module, stream: FakeStream, most_rows: int):
        super().__init__(model, SPEC, "cpu")
        self._cores, self.most_rows = None, sys.maxsize
        self._stream, self._fitting = stream, most_rows
        self.asked: list[int] = []  # rows of each forward pass that the device took

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        return super().encode(HostPixels(pixels))

    def _forward(self, pixels: torch.Tensor) -> dict[str, OnDevice]:
        count = len(pixels)
        if count > self._fitting:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.asked.append(count)
        done: dict[str, torch.Tensor] = {}
        self._stream.ask(lambda: done.update(DinoEncoder._forward(self, pixels)))
        shapes = {"cls_token": (WIDTH,), "patch_tokens": (*GRID, WIDTH), "register_tokens": (REGISTERS, WIDTH)}
        rows = {
            key: OnDevice((count, *shape), torch.float16, lambda key=key: done[key]) for key, shape in shapes.items()
        }
        return {**rows, "finite": OnDevice((count,), torch.bool, lambda: done["finite"])}

    def _to_pinned(self, tensor: OnDevice) -> torch.Tensor:
        host = self._pinned(tensor.shape, tensor.dtype)
        host.fill_(float("nan") if tensor.dtype.is_floating_point else 0)  # what is read too early shows
        self._stream.ask(lambda: host.copy_(tensor.values()))
        return host


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> FakeStream:
    """Takes the place of torch's CUDA stream; memory cannot be pinned here, and is taken as it is."""
    stream, empty = FakeStream(), torch.empty
    monkeypatch.setattr(FakeEvent, "stream", stream, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def unpinned(*shape: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        return empty(*shape, **more)

    monkeypatch.setattr(torch, "empty", unpinned)
    return stream


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    """Of two blocks."""
    create = timm.create_model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timm, "create_model", lambda *names, **more: create(*names, **more, depth=2))
        return build_model(SPEC)


@pytest.fixture(scope="module")
def frames() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (NUM_FRAMES, 3, 56, 70), np.uint8))


@pytest.fixture(scope="module")
def expected(model: torch.nn.Module, frames: torch.Tensor) -> dict[str, np.ndarray]:
    """Tokens of every frame, by the model itself, one frame at a time."""
    encoder = DinoEncoder(copy.deepcopy(model), SPEC, "cpu")
    rows = [encoder.encode(frame[None])() for frame in frames]
    return {key: np.concatenate([row.tokens[key] for row in rows]) for key in rows[0].tokens}


PLAN = SimpleNamespace(trajectory=SimpleNamespace(name="t"))


def encoded(encoder: dino_cache.Encoder, frames: torch.Tensor, batch_size: int) -> list[EncodedBatch]:
    """Frames through the pipeline's own functions."""
    groups = ((np.arange(i, min(i + 6, len(frames))), frames.numpy()[i : i + 6]) for i in range(0, len(frames), 6))
    stream = (FrameGroup(PLAN, rows, None, Content(len(rows)), pixels) for rows, pixels in groups)
    batches: Iterator[Batch] = full_batches(stream, encoder.new_pixels, batch_size, FailedTrajectories(), lambda: False)
    return list(encode_batches(encoder, batches, lambda count: None, lambda: False))


@pytest.mark.parametrize(
    ("batch_size", "fitting", "parts"),
    [
        (16, 100, [16, 16, 16, 5]),
        (53, 100, [53]),
        (64, 100, [53]),
        (16, 5, [4] * 12 + [4, 1]),  # 16, 8, 4; the tail of 5 in 4 + 1
        (16, 1, [1] * 53),
        (7, 3, [2, 2, 2, 1] * 7 + [2, 2]),  # 7, 4, 2
    ],
)
def test_every_row_is_its_frames_whatever_fits_on_the_device(
    stream, model, frames, expected, batch_size, fitting, parts
):
    encoder = FakeCudaEncoder(copy.deepcopy(model), stream, fitting)
    out = encoded(encoder, frames, batch_size)
    rows = [np.concatenate([run.rows for run in part.parts]) for part in out]
    assert [len(numbers) for numbers in rows] == parts
    assert np.concatenate(rows).tolist() == list(range(NUM_FRAMES))
    assert all(part.rows.finite.all() for part in out)
    for key, values in expected.items():
        found = np.concatenate([part.rows.tokens[key] for part in out])
        np.testing.assert_allclose(found.astype(float), values, atol=2e-3)  # float16, summed in another order
    assert not stream.queue


def test_two_batches_are_on_the_device_while_a_third_is_filled(stream, model, frames):
    encoder = FakeCudaEncoder(copy.deepcopy(model), stream, 100)
    batches = (Batch([Rows(PLAN, 8 * i + np.arange(8))], frames[8 * i : 8 * i + 8]) for i in range(6))
    out = encode_batches(encoder, batches, lambda count: None, lambda: False)
    for number in range(1, 7):
        next(out)
        assert len(encoder.asked) == min(number + encoder.batches_in_flight, 6)


def test_a_row_that_is_not_finite_is_told_from_its_neighbours(stream, model, frames):
    broken = copy.deepcopy(model)
    encoder = FakeCudaEncoder(broken, stream, 100)
    forward = DinoEncoder._forward

    def one_bad_row(self: DinoEncoder, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = forward(self, pixels)
        rows["cls_token"][2, 7] = float("inf")
        return {**rows, "finite": rows["cls_token"].isfinite().all(1)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DinoEncoder, "_forward", one_bad_row)
        (out,) = encoded(encoder, frames[:5], 8)
    assert out.rows.finite.tolist() == [True, True, False, True, True]


# ---------------------------------------------------------------------------------------------------------------------
# Memory
# ---------------------------------------------------------------------------------------------------------------------


class ShortOfMemory:
    """An encoder that raises `error` for more than `fitting` rows."""

    most_rows, batches_in_flight, default_batch_size = sys.maxsize, 1, 8

    def __init__(self, error: Exception, fitting: int = 4):
        self._error, self._fitting = error, fitting

    def new_pixels(self, batch_size: int) -> torch.Tensor:
        return torch.empty((batch_size, 3, 2, 2), dtype=torch.uint8)

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        if len(pixels) > self._fitting:
            raise self._error
        first = pixels[:, 0, 0, :1].numpy().astype(np.float16)
        return lambda: EncodedRows({"cls_token": first}, np.ones(len(first), bool))

    def drop(self) -> None:
        pass


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
def test_a_lack_of_memory_halves_the_batch_by_whatever_name_it_comes(error):
    frames = torch.arange(16, dtype=torch.uint8).view(16, 1, 1, 1).expand(16, 3, 2, 2)
    out = encoded(ShortOfMemory(error), frames, 8)
    assert [len(part.rows.finite) for part in out] == [4] * 4


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"),
        RuntimeError("The size of tensor a (4) must match the size of tensor b (5)"),
    ],
    ids=str,
)
def test_another_error_of_the_device_halves_nothing_and_stops(error, caplog):
    with pytest.raises(DeviceError, match="the encoder failed"):
        encoded(ShortOfMemory(error), torch.zeros((16, 3, 2, 2), dtype=torch.uint8), 8)
    assert "Out of device memory" not in caplog.text


def test_a_frame_that_does_not_fit_alone_stops():
    with pytest.raises(DeviceError, match="one frame does not fit"):
        encoded(ShortOfMemory(OUT_OF_MEMORY[1], fitting=0), torch.zeros((16, 3, 2, 2), dtype=torch.uint8), 8)


def test_where_nothing_can_be_pinned_ordinary_memory_serves(stream, model, frames, expected, monkeypatch, caplog):
    empty, asked = torch.empty, []

    def cannot_pin(*shape: Any, pin_memory: bool = False, **more: Any) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory:
            raise torch.AcceleratorError("CUDA error: out of memory")
        return empty(*shape, **more)

    monkeypatch.setattr(torch, "empty", cannot_pin)
    with caplog.at_level("WARNING", "dino_cache"):
        out = encoded(FakeCudaEncoder(copy.deepcopy(model), stream, 100), frames, 16)
    found = np.concatenate([part.rows.tokens["cls_token"] for part in out])
    np.testing.assert_allclose(found.astype(float), expected["cls_token"], atol=2e-3)
    assert asked.count(True) == 1  # asked once, told once
    assert caplog.text.count("Cannot pin memory") == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("CUDA error: out of memory\nmore of it"), *OUT_OF_MEMORY[:1]], ids=repr
)
def test_a_model_that_does_not_fit_stops_with_the_devices_error(error, monkeypatch):
    def no_room(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(dino_cache, "DinoEncoder", no_room)
    monkeypatch.setattr(dino_cache, "build_model", lambda spec: torch.nn.Linear(1, 1))
    with pytest.raises(DeviceError, match=r"loading the model .* failed: [^\n]*$") as raised:
        dino_cache.load_encoder(SPEC, "cuda")
    assert raised.value.exit_code == 3


def test_weights_are_not_blamed_for_memory_that_is_short(tmp_path, monkeypatch):
    file = tmp_path / "dinov2_vits14_reg4_pretrain.pth"
    file.write_bytes(b"weights")

    def no_room(*_: Any, **__: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: 4 bytes")

    monkeypatch.setattr(timm.models, "load_state_dict", no_room)
    with pytest.raises(DeviceError, match="can't allocate memory"):
        dino_cache.load_encoder(SPEC.model_copy(update={"weights": str(file)}), "cpu")


# ---------------------------------------------------------------------------------------------------------------------
# The device
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tf32_allowed() -> Iterator[Callable[[], list[bool]]]:
    """TF32 is allowed to matrix multiplications and convolutions, as a program may have it; asks for both."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = True
    yield lambda: [backend.allow_tf32 for backend in backends]
    for backend, allowed in zip(backends, before):
        backend.allow_tf32 = allowed


@pytest.mark.parametrize(("precision", "allowed"), [("fp32", False), ("bf16", True)])
def test_fp32_has_all_its_bits_on_a_gpu(model, monkeypatch, tf32_allowed, precision, allowed):
    """TF32 keeps 10 of a number's 23 bits; torch allows it to convolutions by itself."""
    monkeypatch.setattr(dino_cache, "set_input_size", lambda *_: GRID)
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_: self)
    monkeypatch.setattr(torch, "tensor", lambda values, device: torch.as_tensor(values))
    DinoEncoder(copy.deepcopy(model), SPEC.model_copy(update={"precision": precision}), "cuda")
    assert tf32_allowed() == [allowed, allowed]


@pytest.fixture
def bus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The devices of a machine without a GPU; torch finds no driver."""
    hints = pytest.importorskip("dino_cache_extras.hints")
    for number, (maker, kind) in enumerate([("0x8086", "0x030000"), ("0x10de", "0x0c0330")]):  # Intel; NVIDIA's USB
        add_device(tmp_path / f"0000:00:0{number}.0", maker, kind)
    monkeypatch.setattr(hints, "GPU_SIGNS", (str(tmp_path / "nvidia[0-9]"),))
    monkeypatch.setattr(hints, "BUS_DEVICES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def no_driver() -> None:
        raise RuntimeError("Found no NVIDIA driver\non your system.")

    monkeypatch.setattr(torch.cuda, "init", no_driver)
    return tmp_path


def add_device(folder: Path, maker: str, kind: str) -> None:
    folder.mkdir()
    (folder / "vendor").write_text(maker + "\n")
    (folder / "class").write_text(kind + "\n")


def test_a_machine_without_a_gpu_is_told_nothing(bus):
    assert dino_cache.unused_gpu() == []
    assert resolve_device("auto") == "cpu"


@pytest.mark.parametrize("sign", ["on the bus", "a device file"])
def test_a_gpu_that_torch_cannot_use_is_named_with_the_reason(bus, sign, run_here, robot, monkeypatch):
    if sign == "on the bus":
        add_device(bus / "0000:41:00.0", "0x10de", "0x030200")
    else:
        (bus / "nvidia0").touch()
    robot.add("t0")
    robot.configure(device="auto")
    outcome = run_here(robot.config)
    assert outcome.code == 0
    (line,) = [line for line in outcome.err.splitlines() if "NVIDIA GPU" in line]
    assert str(bus) in line
    assert "Found no NVIDIA driver on your system." in line
    assert line.endswith("The CPU is used instead")
    robot.configure(device="cpu")  # as the user wants it
    assert "NVIDIA GPU" not in run_here(robot.config, "--force-rebuild").err
    for refused in (lambda: resolve_device("cuda"), lambda: resolve_precision("auto", "fp16", "cpu", "small")):
        with pytest.raises(RefusedError, match="Found no NVIDIA driver"):
            refused()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # hidden on purpose
    assert dino_cache.unused_gpu() == []


@pytest.mark.slow
def test_a_driver_that_breaks_while_the_model_is_loaded_ends_with_one_message(tmp_path):
    """torch sees a GPU, and the first thing that is asked of it fails. In a process of its own: the real model."""
    make_trajectory(tmp_path / "data" / "t0", 12)
    config = write_config(tmp_path / "config.yaml", tmp_path / "data", device="auto", precision="fp32")
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'timm' and 'torch' in sys.modules:\n"
        "            import torch\n"
        "            torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    done = run_cache(config, fake=False, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 3, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: loading the model (small, to cuda) failed: ")


# ----------------------------------------------------------------------------------------------------------------------
# compile: true
# ----------------------------------------------------------------------------------------------------------------------

COMPILED = SPEC.model_copy(update={"compile": True})


@pytest.mark.parametrize("model_type", ["small_reg", "dinov3_small"])
def test_a_compiled_model_has_the_same_features_in_batches_of_any_size(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.compile as it traces, without its code generator, which needs a compiler."""
    create, compile_for_real, compiled = timm.create_model, torch.compile, []

    def trace(function: Callable[..., Any]) -> Callable[..., Any]:
        compiled.append(function)
        return compile_for_real(function, backend="eager")

    monkeypatch.setattr(timm, "create_model", lambda name, **settings: create(name, depth=1, **settings))
    monkeypatch.setattr(torch, "compile", trace)
    spec = COMPILED.model_copy(update={"dino_model_type": model_type, "image_size": (112, 112)})
    model = build_model(spec)
    encoder = DinoEncoder(copy.deepcopy(model), spec, "cpu")
    plain = DinoEncoder(model, spec.model_copy(update={"compile": False}), "cpu")
    assert len(compiled) == 1
    for count in (4, 4, 3):
        pixels = torch.randint(0, 256, (count, 3, 112, 112), dtype=torch.uint8)
        expected = plain.encode(pixels)()
        for name, values in encoder.encode(pixels)().tokens.items():
            np.testing.assert_allclose(values, expected.tokens[name], rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_compile_needs_cuda(tmp_path: Path) -> None:
    check_engine(COMPILED, "cuda:0")
    check_engine(COMPILED, None)  # Ray's workers, before they are asked
    with pytest.raises(RefusedError, match=r"compile: true needs CUDA and the device is cpu.* set compile: false"):
        check_engine(COMPILED, "cpu")
    make_trajectory(tmp_path / "data" / "t")
    config = write_config(tmp_path / "config.yaml", tmp_path / "data", compile=True, device="cpu")
    for options in ([], ["--dry-run"]):
        done = run_cache(config, *options)
        assert done.returncode == 2
        assert "compile: true needs CUDA" in done.stderr


def test_compile_needs_triton_before_the_first_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RefusedError, match="this needs triton"):
        DinoEncoder(timm.create_model("vit_small_patch14_reg4_dinov2", depth=0), COMPILED, "cuda")
