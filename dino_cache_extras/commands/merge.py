"""merge: take the records of shards into the cache's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from dino_cache_extras.shards import merge
from progress_utils import add_cache_dir, cache_lock, load_or_refuse, print_lines


def merge_shards(cache_dir: Path) -> int:
    """Merge what waits; returns the exit code.

    Raises:
        RefusedError: there is no record, or one is unusable; nothing was changed.
        CacheLockedError: a run or a shard is at work.
    """
    load_or_refuse(cache_dir)
    with cache_lock(cache_dir):
        merged = merge(cache_dir)
    print_lines(f"{cache_dir}: merged shards {merged}" if merged.shards else f"{cache_dir}: no shards to merge")
    return 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_cache_dir(parser)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    return merge_shards(arguments.cache_dir)
