"""For --dry-run: what other tokens would take; and with --measure frames/s, after a few seconds of the work."""

from __future__ import annotations

import contextlib
import sys
import time

from dino_cache import (
    ChunkLabel,
    Hooks,
    PreparedDataset,
    StopRequest,
    Token,
    cache_bytes,
    cache_trajectories,
    load_encoders,
    resolve_batch_size,
    token_shapes,
    tokens_of,
)
from dino_cache_extras import smaller_tokens
from progress_utils import RefusedError, human_bytes, human_duration, print_lines

MEASURE_S = 5.0  # time after the first batch in which --measure decodes and encodes


def measure_rate(dataset: PreparedDataset, stop_request: StopRequest) -> float | None:
    """Frames/s of decoding and encoding what is pending, after a few seconds of it; None where no frame is encoded."""
    ticks: list[tuple[float, int]] = [(time.monotonic(), 0)]  # when so many frames were encoded

    def is_over() -> bool:
        return stop_request() or (len(ticks) > 1 and time.monotonic() - ticks[1][0] > MEASURE_S)

    hooks = Hooks(should_stop=is_over, on_encoded=lambda count: ticks.append((time.monotonic(), ticks[-1][1] + count)))
    options, encoder = dataset.config.options, dataset.encoder
    label = ChunkLabel(
        dataset_name=dataset.name,
        spec=dataset.spec,
        fingerprint="",
        weights_digest=dataset.weights["digest"],
        token_shapes=token_shapes(dataset.spec, dataset.shape),
    )
    for _ in cache_trajectories(dataset.pending, label, options, encoder, None, hooks):
        pass
    batch_size = resolve_batch_size(options, encoder)  # the first batch's time is that of filling the pipeline, too
    begin_s, before = next((tick for tick in ticks[:-1] if tick[1] >= batch_size), ticks[0])
    end_s, frames = ticks[-1]
    return (frames - before) / (end_s - begin_s) if end_s > begin_s else None


def measure(datasets: list[PreparedDataset], stop_request: StopRequest) -> dict[str, float | None]:
    """Frames/s by dataset, of those that have frames to encode; loads the models and writes nothing."""
    busy = [dataset for dataset in datasets if dataset.num_frames]
    load_encoders(busy, stop_request)
    rates = {}
    for name in sorted({dataset.name for dataset in datasets} - {dataset.name for dataset in busy}):
        print_lines(f"Nothing to measure of {name}: it has no frames to encode", file=sys.stderr)
    for dataset in busy:
        print_lines(f"Measuring {dataset.name} on {dataset.workers.device} ...", file=sys.stderr)
        rates[dataset.name] = measure_rate(dataset, stop_request)
        stop_request.check()
    return rates


def alternative_tokens(dataset: PreparedDataset) -> list[tuple[Token, ...]]:
    """Choices of tokens, to compare what they take: each that the model has, those chosen, and all."""
    known = tokens_of(dataset.spec.dino_model_type, dataset.shape)
    if "cls" in known and "mean" not in dataset.spec.tokens:
        known.remove("mean")  # for models without a class token, most of all
    return list(dict.fromkeys([*((token,) for token in known), dataset.spec.tokens, tuple(known)]))


def _smaller_sizes(dataset: PreparedDataset) -> list[str]:
    """The space that the cache takes with patch tokens pooled, as int8, both and neither."""
    known = [(pool, store) for pool in (1, 2) for store in ("float16", "int8")]
    chosen, sizes = (dataset.spec.patch_pool, dataset.spec.store), []
    for pool, store in dict.fromkeys([*known, chosen]):
        spec = dataset.spec.model_copy(update={"patch_pool": pool, "store": store})
        with contextlib.suppress(RefusedError):
            smaller_tokens.check(spec, dataset.shape)
            mark = " (chosen)" if (pool, store) == chosen else ""
            sizes.append(f"{pool} {store} {human_bytes(cache_bytes(dataset, spec, dataset.work.values()))}{mark}")
    return sizes


def cost_lines(dataset: PreparedDataset, rates: dict[str, float | None]) -> list[str]:
    """The space that other tokens would take, and, where it was measured, the time."""
    works, lines = dataset.work.values(), []
    if dataset.num_frames:
        sizes = []
        for tokens in alternative_tokens(dataset):
            spec = dataset.spec.model_copy(update={"tokens": tokens})
            chosen = " (chosen)" if tokens == dataset.spec.tokens else ""
            sizes.append(f"{' + '.join(tokens)} {human_bytes(cache_bytes(dataset, spec, works))}{chosen}")
        lines.append(f"  by tokens: {', '.join(sizes)}")
        if "patch" in dataset.spec.tokens:
            lines.append(f"  by patch_pool and store: {', '.join(_smaller_sizes(dataset))}")
    if rate := rates.get(dataset.name):
        how = f"at {rate:.1f} frames/s, measured while decoding and encoding on {dataset.workers.device}"
        how += " in one process, without Ray" if dataset.config.options.executor == "ray" else ""
        lines.append(f"  estimated time: {human_duration(dataset.num_frames / rate)} {how}")
    return lines
