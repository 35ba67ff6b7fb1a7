"""What could be made of the machine and of the data beside what a run makes of them."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from dino_cache import DatasetConfig, FolderFiles, FoundFormat, format_named, format_names, one_line, recordable_name
from progress_utils import SHOWN_NAMES, install_command

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


def other_gpus() -> list[str]:
    """How to use all GPUs of this machine, where there are several."""
    import torch

    if (count := torch.cuda.device_count()) < 2:
        return []
    how = f"`executor: ray` in the config uses all ({install_command('ray')})"
    return [f"{count} GPUs are visible and one of them is used; {how}"]


def other_signs(config: DatasetConfig, names: Sequence[str]) -> list[FoundFormat]:
    """The first sign of another format at trajectories that lack poses, or in the folders that hold these: images/
    beside poses.csv, for one."""
    if not names:
        return []  # without opening all formats
    others = [(name, format_named(name)) for name in format_names() if name != config.format]
    for name in names[:SHOWN_NAMES]:
        for folder in (name, os.path.dirname(name)):
            path = config.data_folder / folder
            if path.is_dir():
                files = FolderFiles(f"{folder}/" if folder else "", path, sorted(os.listdir(path)))
                for other, kind in others:
                    if sign := next(iter(kind.signs(files, not folder)), None):
                        return [FoundFormat(other, recordable_name(files.name + sign))]
    return []
