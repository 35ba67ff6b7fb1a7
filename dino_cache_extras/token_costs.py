"""What a cache would take with other tokens, and how long it takes: lines of --dry-run."""

from __future__ import annotations

from dino_cache import TOKEN_DATASETS, PreparedDataset, Token, cache_bytes
from progress_utils import human_bytes, human_duration, print_lines


def alternative_tokens(dataset: PreparedDataset) -> list[tuple[Token, ...]]:
    """Choices of tokens, to compare what they take: each that the model has, those chosen, and all."""
    known: list[Token] = [token for token in TOKEN_DATASETS if token != "register" or dataset.shape.num_registers]
    return list(dict.fromkeys([*((token,) for token in known), dataset.spec.tokens, tuple(known)]))


def print_cost(dataset: PreparedDataset, rates: dict[str, float | None]) -> None:
    """The space that other tokens would take, and, where it was measured, the time."""
    works = dataset.work.values()
    if dataset.num_frames:
        sizes = []
        for tokens in alternative_tokens(dataset):
            spec = dataset.spec.model_copy(update={"tokens": tokens})
            chosen = " (chosen)" if tokens == dataset.spec.tokens else ""
            sizes.append(f"{' + '.join(tokens)} {human_bytes(cache_bytes(dataset, spec, works))}{chosen}")
        print_lines(f"  by tokens: {', '.join(sizes)}")
    if rate := rates.get(dataset.name):
        how = f"at {rate:.1f} frames/s, measured while decoding and encoding on {dataset.workers.device}"
        how += " in one process, without Ray" if dataset.config.options.executor == "ray" else ""
        print_lines(f"  estimated time: {human_duration(dataset.num_frames / rate)} {how}")
