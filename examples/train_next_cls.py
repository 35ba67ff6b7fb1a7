#!/usr/bin/env python3
"""Train a small network to predict the next frame's CLS token from the frames before it and the robot's motion.

    python examples/train_next_cls.py sample/rendered_rooms/dino_cache_small
    python examples/train_next_cls.py /data/recon/dino_cache_large /data/scand/dino_cache_large --workers 2

Takes seconds on a CPU. Every fourth trajectory is held out. The loss is the squared error in units of what repeating
the last frame costs: 1.0 is no better than that; with the sample's random weights only that of training falls.
`--workers` changes nothing but the time: the digest of all batches, printed last, stays the same.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Subset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dino_cache import CacheWindows, DinoCacheError


class Outcome(NamedTuple):
    """Losses after each epoch, on what was trained on and on what was held out; the digest of all batches."""

    train: list[float]
    held_out: list[float]
    digest: str


class NextToken(nn.Module):
    """The last CLS token and what is to be added to it."""

    def __init__(self, width: int, context: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(context * (width + 4), 256), nn.GELU(), nn.Linear(256, width))

    def forward(self, cls: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
        """cls (B, W - 1, D) of the frames before, steps (B, W - 1, 4) -> (B, D)."""
        return cls[:, -1] + self.layers(torch.cat([cls, steps], dim=2).flatten(1))


def motion(position: torch.Tensor, yaw: torch.Tensor) -> torch.Tensor:
    """(B, W - 1, 4): steps in the robot's own frame, forward and left [m], and the turn's sine and cosine."""
    step, heading, turn = position.diff(dim=1), yaw[:, :-1], yaw.diff(dim=1)
    forward = step[..., 0] * heading.cos() + step[..., 1] * heading.sin()
    left = step[..., 1] * heading.cos() - step[..., 0] * heading.sin()
    return torch.stack([forward, left, turn.sin(), turn.cos()], dim=2).float()


def split(windows: CacheWindows) -> tuple[Subset, Subset]:
    """To train on, and held out: whole trajectories, since neighbouring windows share frames."""
    parts: tuple[list[int], list[int]] = ([], [])
    for place, indices in enumerate(windows.trajectories().values()):
        parts[place % 4 == 3].extend(indices)
    return Subset(windows, parts[False]), Subset(windows, parts[True])


def errors(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(2,): mean squared error of the prediction, and of repeating the last frame."""
    cls = batch["cls_token"]
    predicted = model(cls[:, :-1], motion(batch["position"], batch["yaw"]))
    return torch.stack([(guess - cls[:, -1]).square().mean() for guess in (predicted, cls[:, -2])])


def relative(batches: list[torch.Tensor]) -> float:
    """The loss over all batches of an epoch."""
    predicted, repeated = sum(batches, torch.zeros(2)).tolist()
    return predicted / repeated if repeated else float("nan")


def train(cache_dirs: list[Path], *, window: int, batch_size: int, epochs: int, workers: int) -> Outcome:
    """Train and say how it went."""
    torch.manual_seed(0)
    windows = CacheWindows(cache_dirs, window, tokens="cls", dtype=torch.float32)
    to_train, held_out = split(windows)
    order = RandomSampler(to_train, generator=torch.Generator().manual_seed(0))  # its own: workers draw from a loader's
    options = {"batch_size": batch_size, "num_workers": workers, "collate_fn": windows.collate}
    train_loader = DataLoader(to_train, sampler=order, persistent_workers=workers > 0, **options)
    test_loader = DataLoader(held_out, persistent_workers=workers > 0, **options)
    model = NextToken(width=windows[0]["cls_token"].shape[-1], context=window - 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    outcome, digest = Outcome([], [], ""), hashlib.blake2b(digest_size=8)
    for epoch in range(epochs):
        seen = []
        for batch in train_loader:
            error, repeated = errors(model, batch)
            optimizer.zero_grad()
            (error / repeated.clamp(min=1e-6)).backward()
            optimizer.step()
            seen.append(torch.stack([error, repeated]).detach())
            digest.update(batch["cls_token"].numpy())
        with torch.inference_mode():
            tested = [errors(model, batch) for batch in test_loader]
        outcome.train.append(relative(seen))
        outcome.held_out.append(relative(tested))
        held = f"{outcome.held_out[-1]:.3f}" if tested else "none (it takes four trajectories)"
        print(f"epoch {epoch:3}: loss {outcome.train[-1]:.3f}, held out {held}")
    print(f"batches: {digest.hexdigest()}")
    return outcome._replace(digest=digest.hexdigest())


def main(argv: list[str] | None = None) -> Outcome:
    """Train as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache_dirs", type=Path, nargs="+", metavar="CACHE_DIR")
    parser.add_argument("--window", type=int, default=4, help="frames, the last of which is predicted")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--workers", type=int, default=0)
    arguments = vars(parser.parse_args(argv))
    return train(arguments.pop("cache_dirs"), **arguments)


if __name__ == "__main__":
    try:
        main()
    except DinoCacheError as error:
        sys.exit(f"error: {error}")
