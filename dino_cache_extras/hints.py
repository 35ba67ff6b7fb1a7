"""What the machine could do beside what a run has it do."""

from __future__ import annotations

from progress_utils import install_command


def other_gpus() -> list[str]:
    """How to use all GPUs of this machine, where there are several."""
    import torch

    if (count := torch.cuda.device_count()) < 2:
        return []
    how = f"`executor: ray` in the config uses all ({install_command('ray')})"
    return [f"{count} GPUs are visible and one of them is used; {how}"]
