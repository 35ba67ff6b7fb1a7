"""What is left of trajectories that an interrupted run began; the estimate plans them from the start."""

from __future__ import annotations

from dino_cache import CacheSpec, PreparedDataset, Work
from progress_utils import STAGING_FOLDER, Partial, find_partials


def work_left(work: Work, partial: Partial, spec: CacheSpec) -> Work:
    """`work` less what lies in staging; as it is where that was made with other settings, or is cut otherwise."""
    made, spans = partial.made_from, partial.made_from["spans"]
    rows = [stop - start for start, stop in spans]
    is_same = (len(spans), sum(rows)) == (work.num_chunks, work.num_rows)
    if not is_same or made["fingerprint"] != spec.fingerprint(made["weights_digest"]):
        return work
    count = min(len(partial.chunks), len(spans) - 1)
    frames_left = last_stop = 0
    for start, stop in spans[count:]:
        frames_left += stop - max(start, last_stop)
        last_stop = stop
    rows_left = sum(rows[count:])
    return work._replace(
        num_frames=min(work.num_frames, frames_left * len(spec.cameras)),  # the former: others are in old chunks
        num_chunks=len(spans) - count,
        num_rows=rows_left,
        pose_bytes=work.pose_bytes * rows_left // work.num_rows,
        num_bytes=max(0, work.num_bytes - sum(note["bytes"] for note in partial.chunks[:count])),
    )


def count_only_what_is_left(dataset: PreparedDataset) -> None:
    """Take what is in staging already off the work of a dataset."""
    for partial in find_partials(dataset.config.record_dir / STAGING_FOLDER):
        name = partial.made_from["trajectory"]
        if name in dataset.work:
            dataset.work[name] = work_left(dataset.work[name], partial, dataset.spec)
