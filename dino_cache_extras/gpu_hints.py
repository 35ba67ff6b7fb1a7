"""Hints about GPUs: one that torch cannot use, and others that a run leaves idle."""

from __future__ import annotations

import glob
import os
from pathlib import Path

from dino_cache import LOG, one_line
from progress_utils import install_command

# What shows an NVIDIA GPU: its driver, the driver's device file, or (no driver loaded) the maker's number on the bus.
GPU_SIGNS = ("/proc/driver/nvidia/gpus/*", "/dev/nvidia[0-9]*")
BUS_DEVICES, NVIDIA, DISPLAY_CLASS = Path("/sys/bus/pci/devices"), "0x10de", "0x03"


def _is_nvidia_gpu(bus_device: Path) -> bool:
    try:
        maker, kind = ((bus_device / name).read_text().strip() for name in ("vendor", "class"))
    except OSError:
        return False
    return maker == NVIDIA and kind.startswith(DISPLAY_CLASS)


def unused_gpu() -> list[str]:
    """A line on why torch cannot use the GPU that is plugged in; none where there is no GPU, or CUDA_VISIBLE_DEVICES
    hides it on purpose."""
    import torch

    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return []
    sign = next((path for pattern in GPU_SIGNS for path in sorted(glob.glob(pattern))), None)
    if sign is None:
        sign = next(filter(_is_nvidia_gpu, sorted(BUS_DEVICES.glob("*"))), None)
    if sign is None:
        return []
    try:
        torch.cuda.init()
        why = "it reports no usable device"
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without CUDA
        why = one_line(error)
    return [
        f"An NVIDIA GPU is plugged in ({sign}), which torch {torch.__version__} cannot use: {why}; see `nvidia-smi`"
    ]


def hint_at_other_gpus() -> None:
    """Say how to use all GPUs of this machine, where there are several."""
    import torch

    if (count := torch.cuda.device_count()) > 1:
        how = f"`executor: ray` in the config uses all ({install_command('ray')})"
        LOG.warning("%d GPUs are visible and one of them is used; %s", count, how)
