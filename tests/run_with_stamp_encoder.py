"""dino_cache.py with StampEncoder in the model's place: the same command line, real files, no model.

STAMP_BATCH_SECONDS in the environment makes every batch take so long.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import dino_cache


def stamp_encoder(spec: dino_cache.CacheSpec, device: str) -> tuple[dino_cache.Encoder, str]:
    """Takes load_encoder's place. Imported late, like torch itself."""
    import torch

    from support import StampEncoder

    class SlowStampEncoder(StampEncoder):
        def encode(self, pixels: torch.Tensor) -> Callable[[], dino_cache.EncodedRows]:
            if seconds := float(os.environ.get("STAMP_BATCH_SECONDS", "0")):
                print("batch begun", flush=True)
                time.sleep(seconds)
            return super().encode(pixels)

    print("encoder loaded", flush=True)
    return SlowStampEncoder(spec.image_size, spec.tokens), "stamp" + spec.weights


if __name__ == "__main__":
    dino_cache.load_encoder = stamp_encoder
    dino_cache.WORK_LIBRARIES = ("torch", "PIL.Image", "h5py")  # those of models are half of a start
    dino_cache.model_shape = lambda model_type: dino_cache.ModelShape(patch_size=14, width=4, num_registers=0)
    sys.exit(dino_cache.main())
