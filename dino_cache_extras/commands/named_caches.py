"""The caches of a configuration, for the commands of progress_utils.py that are told `--config FILE`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from dino_cache import DatasetConfig, load_config
from progress_utils import PROGRESS_FILE, RefusedError, print_lines


def configured(config: Path, dataset: str | None) -> list[DatasetConfig]:
    """The datasets of a config file, or the one that is named.

    Raises:
        RefusedError: the file is not a configuration, or has no such dataset.
    """
    configs = load_config(config)
    named = [one for one in configs if dataset in (None, one.name)]
    if not named:
        raise RefusedError(f"--dataset {dataset}: not in {config}; it has {', '.join(one.name for one in configs)}")
    return named


def run_on_caches(arguments: argparse.Namespace) -> int:
    """Run a command on the cache of a configuration. `show` and `merge` take those of several datasets, one
    after the other.

    Raises:
        RefusedError: there are several, and the command is for one.
    """
    configs = configured(arguments.config, arguments.dataset)
    if len(configs) > 1 and (arguments.command not in ("show", "merge") or getattr(arguments, "watch", None)):
        names = ", ".join(config.name for config in configs)
        raise RefusedError(f"{arguments.config}: has several datasets: name one with --dataset: {names}")
    begun = [config for config in configs if os.path.lexists(config.cache_dir / PROGRESS_FILE)]
    for number, config in enumerate(begun or configs[:1]):
        if number and arguments.command == "show" and not arguments.json:
            print_lines("")
        arguments.cache_dir = config.cache_dir
        code = arguments.run(arguments)
    for config in configs:
        if config not in begun and not os.path.lexists(config.cache_dir / PROGRESS_FILE):  # made while it was watched
            print_lines(f"Dataset {config.name}: no {PROGRESS_FILE} in {config.cache_dir} yet", file=sys.stderr)
    return code
