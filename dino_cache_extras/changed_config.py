"""What can be done about a changed configuration: the choices that are shown on a terminal before it is asked."""

from __future__ import annotations

from typing import NamedTuple

from dino_cache import PreparedDataset
from dino_cache_extras.recut import which_differ_in_cut
from progress_utils import human_bytes, human_duration


class Choice(NamedTuple):
    """An answer to the question, and what it would come to."""

    letter: str  # a key of dino_cache.ANSWERS; N is any other answer
    what: str


def choices(dataset: PreparedDataset, *, can_recut: bool) -> list[Choice]:
    """The answers with counts, bytes and, at the pace of the cache's runs so far, times."""
    progress = dataset.progress
    present = {trajectory.name for trajectory in dataset.trajectories}
    num_bytes = {name: sum(record["bytes"]) for name, record in progress.records.items()}
    replaced = sum(size for name, size in num_bytes.items() if name in present)
    left = len(dataset.trajectories) - dataset.num_completed
    kept = f"keep: {len(num_bytes)} completed trajectories ({human_bytes(sum(num_bytes.values()))}) stay as they are"
    redone = f"redo: all {len(present)} are made with the new configuration{_time(dataset, len(present))}"
    completed = [state.trajectory.name for state in dataset.states if state.status == "completed"]
    differs_in_cut = which_differ_in_cut(dataset)
    found = [name for name in completed if differs_in_cut(progress.records[name]["fingerprint"])]
    size = human_bytes(sum(num_bytes[name] for name in found))
    recut = f"re-cut: {len(found)} completed trajectories are cut anew from their stored features ({size} are read and "
    recut += f"replaced), frames in no chunk are encoded; {left} are made with the new configuration"
    return [
        Choice("y", f"{kept}, {left} are made with the new configuration{_time(dataset, left)}; the cache is mixed"),
        *([Choice("c", f"{recut}{_time(dataset, left)}")] if can_recut else []),
        Choice("r", f"{redone}, which replaces {human_bytes(replaced)}"),
        Choice("N", "stop: nothing is changed (the default)"),
    ]


def _time(dataset: PreparedDataset, count: int) -> str:
    """What so many trajectories take, at the pace so far; nothing where that is unknown."""
    progress = dataset.progress
    if not count or not progress.records or progress.elapsed_s <= 0:
        return ""
    return f" (about {human_duration(count * progress.elapsed_s / len(progress.records))} at the pace so far)"
