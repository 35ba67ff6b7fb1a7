"""What could be made of the machine and of the data beside what a run makes of them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from dino_cache import DatasetConfig, FolderFiles, FoundFormat, format_named, format_names, recordable_name
from progress_utils import SHOWN_NAMES, install_command


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
