"""Why trajectories failed, in plain words, and what mends it."""

from __future__ import annotations

import re
from typing import NamedTuple

from dino_cache_extras.run_history import cause_of, without_name
from progress_utils import Failure


class Cause(NamedTuple):
    """A kind of failure, known by the text of its reason."""

    pattern: str  # that the reason holds, as a regular expression
    words: str  # what it most likely is; a question where the reason alone cannot tell
    remedy: str


# The first row that fits counts. A reason that none fits is shown as it is: a wrong cause would be worse than none.
CAUSES = (
    Cause(
        r"\b(?:\d{2,}|[4-9]) steps are longer than max_chunk_distance_m",
        "Positions in millimetres?",
        "Nearly every step counts as a pose jump. Where positions are not in metres, set position_scale (0.001 for "
        "millimetres, 0.01 for centimetres); where they are, raise max_chunk_distance_m.",
    ),
    Cause(
        r"steps are longer than max_chunk_distance_m",
        "Parked robot whose positions jump?",
        "Look for glitches in the positions. Take the trajectory out with a split, or set chunk_by: frames.",
    ),
    Cause(
        r"insufficient movement",
        "Parked robot",
        "Nothing to mend if it stood still: take it out with a split. To store it all the same, set a smaller "
        "min_chunk_distance_m, or chunk_by: frames.",
    ),
    Cause(
        r"expected metres, at most",
        "A position far outside the world",
        "A glitch, or not metres: mend the value that the reason names, or set position_scale.",
    ),
    Cause(r" is [-+]?(?:nan|inf)\b", "Values missing in the poses (NaN)", "Fill or cut out the rows that it names."),
    Cause(
        r": cannot decode 0 bytes",
        "Empty picture",
        "Copy the picture again from the robot. A full disk often leaves empty files.",
    ),
    Cause(
        r": cannot decode .*(?:incomplete or truncated|premature end)",
        "Cut JPEG",
        "Copy the picture again from the robot. Changed data is tried again by itself.",
    ),
    Cause(r": cannot decode .*[Tt]runcated", "Cut picture", "Copy the picture again from the robot."),
    Cause(
        r": cannot decode .*not a JPEG, PNG, WebP or BMP",
        "Not a picture, or the beginning of one",
        "Copy the file again from the robot, or convert it to JPEG or PNG.",
    ),
    Cause(
        r": cannot decode .*(?:it claims|it has \d+ scans|it is an animation)",
        "Picture of a kind that is refused",
        "Make it anew as a plain JPEG or PNG.",
    ),
    Cause(r": cannot decode ", "Damaged picture", "Copy the picture again from the robot, or make it anew."),
    Cause(r"No space left|\[Errno 28\]", "No space", "Free space on that disk, then run again."),
    Cause(
        r"Permission denied|\[Errno 13\]|no access to",
        "No access",
        "Give the user that runs dino_cache the right to read it (or, in the cache, to write).",
    ),
    Cause(
        r"Input/output error|Stale file handle|\[Errno (?:5|116)\]|no answer, no processor time",
        "Disk or mount that cannot be read",
        "Check the disk or mount it anew, then run again.",
    ),
    Cause(r"No such file or directory|\[Errno 2\]", "File gone while it was read", "Put it back, then run again."),
    Cause(r"its data changed while it was read", "Changed while it was read", "Run again once copying has ended."),
    Cause(
        r"no pose file|no file of poses|: no poses beside|has no poses",
        "No poses",
        "Put the poses beside the frames, or set chunk_by: frames.",
    ),
    Cause(
        r"\b\d+ (?:frames|images|pictures)\b.* but \d+ poses|\bfewer frames than poses",
        "Frames and poses differ in number",
        "Each frame needs its pose: bring the rest, or cut both to the part that they share.",
    ),
    Cause(r"frame \d+ is missing between", "A frame is missing", "Bring the frame that the reason names."),
    Cause(
        r"numbers must begin at 0 or 1|are both frame \d+|no frames here whose names match frame_pattern",
        "Frames are numbered or named otherwise",
        "Rename them, or set frame_pattern.",
    ),
    Cause(
        r"lie inside the video|no frame lies between|its timestamps do not rise",
        "Times of frames and poses do not fit",
        "Set time_scale (the times' unit), time_offset or time_zero, or take out rows of other recordings.",
    ),
    Cause(
        r"in .{1,40} by its name, and \w+ is|two columns for|rad apart",
        "Units or columns contradict each other",
        "Set the key that the reason names (yaw_unit, pose_axes, position_scale, time_scale), or take a column out.",
    ),
    Cause(
        r"has no column|has no \S+(?:, which extra_keys names)?; (?:its|those)",
        "A key or column is called otherwise",
        "Set it to one of those that the reason lists (position_key, yaw_key, image_key, pose_columns, extra_keys).",
    ),
    Cause(
        r"SIGSEGV|SIGKILL|processor time|GiB of memory to be read|kills? .*worker",
        "Data that crash what reads them",
        "Throw the file away, or make it anew.",
    ),
    Cause(
        r"it asks for|no pickle|no whole pickle|zip archive, as torch\.save|cannot read poses",
        "Pose file of an unknown kind",
        "Write plain numpy arrays: a dict in traj_data.pkl, or traj_data.npz.",
    ),
    Cause(
        r"cannot read the video|holds no frames|no frame that can be decoded|has no video stream",
        "Cut video, or no decoder for it",
        "Copy the video again, or encode it anew (H.264 in mp4).",
    ),
    Cause(r"rosbag reindex|mcap recover|is cut or damaged", "Cut bag", "Mend the bag as the reason says."),
    Cause(r"\.(?:hdf5|h5|parquet)\b.*cannot read it", "Cut or foreign file", "Copy the file again from its source."),
    Cause(r"not finite", "Features that are not finite", "Set precision: bf16 or fp32, then run again."),
    Cause(r"what is not a chunk file|\bcannot replace what lies in", "Other files lie in the cache", "Move them away."),
    Cause(r"rename (?:it|the folder)|not UTF-8", "A name that cannot be used", "Rename the folder."),
    Cause(r"not a regular file", "A device, pipe or folder in a file's place", "Put the real file there."),
)


class FailureGroup(NamedTuple):
    """Failures that have one cause."""

    words: str
    remedy: str | None  # None where the cause is not known
    members: list[tuple[str, Failure]]


def failure_groups(failures: dict[str, Failure]) -> list[FailureGroup]:
    """Failures by cause, the most frequent first; those of no known cause by their reasons' common text."""
    groups: dict[str, FailureGroup] = {}
    for text, members in failure_causes(failures).items():
        cause = known_cause(members[0][1]["reason"], members[0][0])
        words, remedy = (f"{members[0][1]['error_type']}: {text}", None) if cause is None else cause[1:]
        groups.setdefault(words, FailureGroup(words, remedy, [])).members.extend(members)
    return sorted(groups.values(), key=lambda group: -len(group.members))


def known_cause(reason: str, name: str) -> Cause | None:
    """The cause that a reason tells of; what the trajectory's `name` holds does not count."""
    told = without_name(reason, name)
    return next((cause for cause in CAUSES if re.search(cause.pattern, told)), None)


def failure_causes(failures: dict[str, Failure]) -> dict[str, list[tuple[str, Failure]]]:
    """Failures by cause, the most frequent first: reasons that differ in names and numbers alone are one cause."""
    causes: dict[str, list[tuple[str, Failure]]] = {}
    for name, failure in failures.items():
        causes.setdefault(cause_of(name, failure), []).append((name, failure))
    return dict(sorted(causes.items(), key=lambda item: -len(item[1])))
