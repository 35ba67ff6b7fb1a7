"""ROS bags: pictures of one topic, poses of another or through transforms, brought together by their stamps."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dino_cache import (
    PROFILE,
    CacheSpec,
    ChecksumKind,
    DataKeys,
    FolderFiles,
    Format,
    FrameReader,
    InputError,
    Note,
    Poses,
    Trajectory,
    recordable_name,
    walk_folders,
)
from dino_cache_extras.formats.bag_messages import (
    IMAGE_KINDS,
    NUMBER_KINDS,
    POSE_KINDS,
    STAMP_BYTES,
    STAMPED_KINDS,
    TF_KINDS,
    check_topic,
    decoded,
    picture_of,
    pose_of,
    stamp_ns,
    transforms_of,
)
from dino_cache_extras.formats.bag_poses import (
    PoseRows,
    Times,
    Transforms,
    check_clock,
    one_pair_of_frames,
    pose_table,
    rising_order,
)
from dino_cache_extras.formats.bags import METADATA_FILE, Bag, Place, bag_checksum, is_rosbag2, open_bag
from dino_cache_extras.formats.pose_times import poses_at
from progress_utils import RefusedError, open_library

ACTIVE_SUFFIX = ".bag.active"  # of a ROS1 bag while it is recorded
BAG_SUFFIXES = (ACTIVE_SUFFIX, ".bag", ".mcap.zstd", ".mcap", ".db3.zstd", ".db3")
TF_TOPIC, STATIC_TF_TOPIC = "/tf", "/tf_static"
SHOWN_TOPICS = 40  # of a table in a message
MUCH_LONGER_S = 10.0  # that poses go on before the first image or after the last
OTHER_LATENESS_S = 0.5  # by which images and poses are recorded later than stamped, one more than the other


def bags_of(folder: FolderFiles) -> Iterator[tuple[str, Path]]:
    """(trajectory, path) of the bags of a folder: itself, where it is rosbag2's, or files in it."""
    if METADATA_FILE in folder.files and _is_rosbag2(folder.path):
        yield folder.name.rstrip("/"), folder.path
        return
    for file in folder.files:
        suffix = next((suffix for suffix in BAG_SUFFIXES if file.lower().endswith(suffix)), None)
        if suffix is None or file.startswith("."):
            continue
        stem = file[: -len(suffix)]
        if suffix != ACTIVE_SUFFIX or not any(f"{stem}{other}" in folder.files for other in (".bag", ".BAG")):
            yield folder.name + stem, folder.path / file


def _is_rosbag2(folder: Path) -> bool:
    try:
        return is_rosbag2(folder)
    except (OSError, InputError):
        return True  # it fails alone where it is opened


def find_bags(data_folder: Path, spec: CacheSpec) -> Iterator[Trajectory]:
    """Bags below `data_folder`, sorted by folder. A folder that cannot be listed is yielded as a trajectory, so that it
    fails with that reason.

    Raises:
        RefusedError: `data_folder` is itself a bag, or a library is not there.
    """
    for library in ("rosbags.typesys", "lz4.frame", "zstandard"):
        open_library(library)
    for folder in walk_folders(data_folder):
        if folder.error and folder.name:
            yield Trajectory(recordable_name(folder.name.rstrip("/")), folder.path, format="rosbag")
        for name, path in bags_of(folder):
            if not name:
                raise RefusedError(
                    f"data_folder {data_folder} is itself a bag (it holds {METADATA_FILE}); data_folder is the folder "
                    "above the bags"
                )
            yield Trajectory(recordable_name(name), path, format="rosbag")


def locate_bag(data_folder: Path, name: str) -> Trajectory:
    """The bag of that name; InputError where there is none."""
    path = data_folder / name
    for folder, prefix in ((path, f"{name}/"), (path.parent, name[: -len(path.name)])):
        if folder.is_dir():
            for found, place in bags_of(FolderFiles(prefix, folder, sorted(os.listdir(folder)))):
                if found == name:
                    return Trajectory(name, place, format="rosbag")
    raise InputError(f"{data_folder} has no bag {name}")


# ---------------------------------------------------------------------------------------------------------------------
# Topics: which are read
# ---------------------------------------------------------------------------------------------------------------------


class Chosen(NamedTuple):
    """The topics that are read."""

    images: dict[str | None, str]  # camera -> topic; the first one's images are the frames
    position: str | None  # None: through transforms, or no poses
    tf: tuple[str, str] | None  # from which frame to which
    guessed: tuple[str, ...]  # those that nobody set


def choose_topics(bag: Bag, keys: DataKeys, where: str, *, required: bool) -> Chosen:
    """The topics that the settings name, else those of which there is only one.

    Raises:
        InputError: one is not there, is of another type, or it is not clear which; the message lists those that there
            are. Poses only have to be there if they are `required`.
    """
    images, guessed = {}, []
    for camera, wanted in keys.keys_of_cameras.items():
        images[camera] = _topic(bag, where, "image_key", wanted, IMAGE_KINDS)
        guessed += [images[camera]] if wanted is None else []
    if keys.tf is not None:
        outer, _, inner = (part.strip().removeprefix("/") for part in keys.tf.partition("->"))
        if TF_TOPIC not in bag.topics:
            raise InputError(f"{where}: tf: {keys.tf}: it has no {TF_TOPIC}{_table(bag)}")
        for topic in {TF_TOPIC, STATIC_TF_TOPIC} & bag.topics.keys():
            _topic(bag, where, "tf", topic, TF_KINDS)
        return Chosen(images, None, (outer, inner), tuple(guessed))
    if keys.position_key is None and not required and len(_candidates(bag, tuple(POSE_KINDS))) != 1:
        return Chosen(images, None, None, tuple(guessed))
    position = _topic(bag, where, "position_key", keys.position_key, tuple(POSE_KINDS))
    guessed += [position] if keys.position_key is None else []
    return Chosen(images, position, None, tuple(guessed))


def _candidates(bag: Bag, kinds: Sequence[str]) -> list[str]:
    return [topic.name for topic in bag.topics.values() if topic.kind in kinds and topic.count]


def _topic(bag: Bag, where: str, setting: str, wanted: str | None, kinds: Sequence[str]) -> str:
    """A topic that can be read."""
    if wanted is None:
        found = _candidates(bag, kinds)
        if len(found) != 1:
            ways = f"set {setting}" if setting == "image_key" else "set position_key, or tf (tf: map->base_link)"
            what = " or ".join(kind.partition("/")[2] for kind in kinds)
            raise InputError(
                f"{where}: {len(found)} topics hold {what}; {ways if found or bag.topics else 'nothing can be read'}"
                + _table(bag)
            )
        wanted = found[0]
    topic = bag.topics.get(wanted)
    if topic is None:
        raise InputError(f"{where}: {setting}: it has no topic {wanted}{_table(bag)}")
    if topic.kind not in kinds:
        raise InputError(
            f"{where}: {setting}: {wanted} holds {topic.kind or 'messages without a type'}, expected "
            f"{', '.join(kinds)}{_table(bag)}"
        )
    check_topic(topic, where)
    return wanted


def _table(bag: Bag) -> str:
    """The topics that there are: name, type, number of messages, rate."""
    lines = []
    for topic in bag.topics.values():
        rate = f", {topic.count / bag.duration_s:.3g} Hz" if bag.duration_s and topic.count > 1 else ""
        lines.append(f"{topic.name} ({topic.kind or 'no type'}, {topic.count} messages{rate})")
    more = f" and {len(lines) - SHOWN_TOPICS} more" if len(lines) > SHOWN_TOPICS else ""
    return f". Its topics are {', '.join(lines[:SHOWN_TOPICS]) or '(none)'}{more}"


# ---------------------------------------------------------------------------------------------------------------------
# One pass: stamps of images, and poses
# ---------------------------------------------------------------------------------------------------------------------


class Content(NamedTuple):
    """What a pass over a bag finds; of images their stamps and places alone."""

    images: dict[str, Times]  # topic -> its messages
    poses: PoseRows
    transforms: Transforms


def read_content(bag: Bag, chosen: Chosen, where: str) -> Content:
    """One pass over a bag, which does not read the pictures where its files allow that.

    Raises:
        InputError, OSError: a message is cut, damaged or not what its type says.
    """
    content = Content({topic: Times() for topic in chosen.images.values()}, PoseRows(), Transforms())
    wanted: dict[str, int | None] = dict.fromkeys(content.images, STAMP_BYTES)
    wanted |= {} if chosen.position is None else {chosen.position: None}
    if chosen.tf is not None:
        wanted |= dict.fromkeys({TF_TOPIC, STATIC_TF_TOPIC} & bag.topics.keys())
    for message in bag.messages(wanted):
        topic = bag.topics[message.topic]
        at = f"{where}: {topic.name} at {message.log_ns} ns"
        if topic.name in content.images:
            content.images[topic.name].add(stamp_ns(message.data, topic, at), message.log_ns, message.place)
        elif topic.name == chosen.position:
            pose = pose_of(decoded(message.data, topic, at), topic.kind)
            content.poses.add(pose, stamp_ns(message.data, topic, at), message.log_ns)
        else:
            for stamp, pose in transforms_of(decoded(message.data, topic, at)):
                content.transforms.add(pose, stamp, message.log_ns, is_static=topic.name == STATIC_TF_TOPIC)
    return content


class Frames(NamedTuple):
    """n frames, by time: the first camera's images, and of each other camera the one nearest in time."""

    at_ns: np.ndarray  # (n,) int64, rising
    log_ns: np.ndarray  # (n,) int64, when they were recorded
    places: dict[str | None, np.ndarray]  # camera -> (n, 3) int64
    is_whole: np.ndarray  # (n,) whether every other camera has one near enough


def pair_cameras(where: str, images: dict[str | None, Times], clock: str) -> Frames:
    """The frames of some cameras, the first of which says when they are. Another camera's image belongs to a frame if
    it is at most half of the first camera's median period away.

    Raises:
        InvalidDataError: a clock stepped, or two images of a camera have one time.
    """
    places, at_ns, log_ns, is_whole = {}, None, None, None
    for camera, times in images.items():
        which = where if camera is None else f"{where}: camera {camera}"
        check_clock(which, times, clock)
        order = rising_order(which, times.of(clock))
        at, rows = times.of(clock)[order], times.rows[order]
        if at_ns is None:
            at_ns, log_ns, is_whole = at, rows[:, 1], np.ones(len(at), bool)
            nearest = np.arange(len(at))
        else:
            nearest = nearest_rows(at, at_ns)
            most_ns = np.median(np.diff(at_ns)) / 2 if len(at_ns) > 1 else 0
            is_whole &= np.abs(at[nearest] - at_ns) <= most_ns
        places[camera] = rows[nearest, 2:]
    return Frames(at_ns, log_ns, places, is_whole)


def nearest_rows(at: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """(n,) which of the rising times `at` is nearest to each of those wanted; of two, the earlier one."""
    after = np.searchsorted(at, wanted).clip(0, len(at) - 1)
    before = (after - 1).clip(0)
    return np.where(wanted - at[before] <= at[after] - wanted, before, after)


def numbers_at_frames(
    bag: Bag, topic_name: str, frames: Frames, clock: str, max_gap_s: float, where: str
) -> np.ndarray:
    """(n, 6) or (n,) float64: numbers of a topic at frames' times: those of the message nearest in time, NaN where it
    is more than `max_gap_s` away. Of Twist, TwistStamped and Odometry linear x, y, z [m/s] and angular x, y, z
    [rad/s]; of std_msgs its number. Messages without a header are taken by the times at which they were recorded, and
    so are the frames then.

    Raises:
        InputError: there is no such topic, or its type has no numbers that are known.
    """
    topic = bag.topics[_topic(bag, where, "extra_keys", topic_name, tuple(NUMBER_KINDS))]
    is_stamped = topic.kind in STAMPED_KINDS and clock == "header"
    times, values = Times(), []
    for message in bag.messages({topic_name: None}):
        at = f"{where}: {topic_name} at {message.log_ns} ns"
        times.add(stamp_ns(message.data, topic, at) if is_stamped else 0, message.log_ns)
        values.append(NUMBER_KINDS[topic.kind](decoded(message.data, topic, at)))
    if not values:
        raise InputError(f"{where}: {topic_name} holds no messages")
    own_clock = "header" if is_stamped else "log"
    check_clock(f"{where}: {topic_name}", times, own_clock)
    order = np.argsort(times.of(own_clock), kind="stable")
    at_ns, wanted = times.of(own_clock)[order], frames.at_ns if is_stamped else frames.log_ns
    nearest = nearest_rows(at_ns, wanted)
    found = np.array(values, np.float64)[order][nearest]
    found[np.abs(at_ns[nearest] - wanted) > max_gap_s * 1e9] = np.nan
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A bag as a trajectory
# ---------------------------------------------------------------------------------------------------------------------


class RosbagSource:
    """rosbag: one bag."""

    def __init__(self, trajectory: Trajectory, keys: DataKeys):
        self._name, self._path, self._keys = trajectory.name, trajectory.path, keys
        self._where = f"{trajectory.name} ({recordable_name(trajectory.path.name)})"
        self._frames: Frames | None = None

    @functools.cached_property
    def _bag(self) -> Bag:
        return open_bag(self._path, self._name)

    def checksum(self, kind: ChecksumKind) -> str:
        """Over sizes, and the counts and times in the files' indexes (`stat`), or over every byte (`content`)."""
        return bag_checksum(self._path, kind)

    def poses(self, *, required: bool) -> Poses:
        """Of the images between two poses, interpolated at their times: position on a line, yaw the shorter way."""
        chosen = choose_topics(self._bag, self._keys, self._where, required=required)
        self._chosen = chosen
        content = read_content(self._bag, chosen, self._where)
        if empty := [topic for topic, times in content.images.items() if not len(times)]:
            raise InputError(f"{self._where}: {empty[0]} holds no images{_table(self._bag)}")
        clock, notes = self._settle_clock(chosen, content)
        frames = self._frames = self._pair(chosen, content, clock)
        numbers = np.flatnonzero(frames.is_whole)
        times = (frames.at_ns[numbers] - frames.at_ns[0]) / 1e9
        if chosen.guessed:
            what = f"bags are read by topics of which each has only one: {' and '.join(chosen.guessed)}"
            notes.append(Note(what, f"{len(frames.at_ns)} images"))
        if not len(numbers):
            raise InputError(f"{self._where}: no image of the first camera has one of every other camera near in time")
        if len(numbers) < len(frames.at_ns):
            what = "bags have images of the first camera without one of another near in time, which are left out"
            notes.append(Note(what, f"{len(frames.at_ns) - len(numbers)} of {len(frames.at_ns)}"))
        if chosen.position is None and chosen.tf is None:
            return Poses(
                numbers.astype(np.int64), None, None, times=times, notes=tuple(notes), extra=self._extra(numbers, clock)
            )
        table = self._table(chosen, content, clock, int(frames.at_ns[0]))
        poses = self._poses_at(numbers, times, table, clock)
        notes += self._notes(poses, frames, content)
        return poses._replace(notes=tuple(notes), extra=self._extra(poses.frame_index, clock))

    def _extra(self, numbers: np.ndarray, clock: str) -> dict[str, np.ndarray]:
        """The topics that extra_keys names, at the images of these numbers."""
        bag, frames, gap_s = self._bag, self._frames, self._keys.max_pose_gap_s
        return {
            topic: numbers_at_frames(bag, topic, frames, clock, gap_s, self._where)[numbers]
            for topic in self._keys.extra_keys
        }

    def _settle_clock(self, chosen: Chosen, content: Content) -> tuple[str, list[Note]]:
        """By which times a bag is read, header or log: one for all of it."""
        if self._keys.stamps == "log":
            return "log", []
        unstamped = [topic for topic, times in content.images.items() if times.unstamped]
        if chosen.position is not None and len(content.poses.times) and content.poses.times.unstamped:
            unstamped.append(chosen.position)
        if chosen.tf is not None and content.transforms.unstamped(self._way(chosen, content)):
            unstamped.append(TF_TOPIC)
        if not unstamped:
            return "header", []
        what = "bags have no stamps in their headers, and are read by the times at which messages were recorded"
        return "log", [Note(what, " and ".join(unstamped))]

    def _pair(self, chosen: Chosen, content: Content, clock: str) -> Frames:
        where = f"{self._where}: {chosen.images[None]}" if None in chosen.images else self._where
        return pair_cameras(where, {camera: content.images[topic] for camera, topic in chosen.images.items()}, clock)

    def _way(self, chosen: Chosen, content: Content) -> list:
        return content.transforms.way(self._where, *chosen.tf)

    def _table(self, chosen: Chosen, content: Content, clock: str, zero_ns: int) -> Poses:
        """The poses that the bag holds, by the times from the first image on."""
        if chosen.tf is not None:
            where = f"{self._where}: tf: {self._keys.tf}"
            way = self._way(chosen, content)
            at, values = content.transforms.along(where, way, clock, self._keys.max_pose_gap_s)
        else:
            where = f"{self._where}: {chosen.position}"
            if not len(content.poses.times):
                raise InputError(f"{where} holds no poses{_table(self._bag)}")
            one_pair_of_frames(where, content.poses)
            at, values = content.poses.sorted(where, clock)
        return pose_table(where, at, zero_ns, values, self._keys)

    def _poses_at(self, numbers: np.ndarray, times: np.ndarray, table: Poses, clock: str) -> Poses:
        try:
            return poses_at(self._where, numbers, times, table, self._keys.max_pose_gap_s)
        except InputError as error:
            hint = "; if header stamps are of two clocks, set stamps: log" if clock == "header" else ""
            raise type(error)(f"{error}{hint}") from error

    def _notes(self, poses: Poses, frames: Frames, content: Content) -> Iterator[Note]:
        """What should be known of a bag's poses."""
        if poses.num_without:
            what = "bags have frames that do not lie between two poses near enough in time, which are left out"
            yield Note(what, f"{poses.num_without} of {len(frames.at_ns)}")
        span_s = (frames.at_ns[-1] - frames.at_ns[0]) / 1e9
        more_s = max(-poses.table.times[0], poses.table.times[-1] - span_s)
        if more_s > max(MUCH_LONGER_S, span_s / 5):
            yield Note("bags have poses long before the first image or after the last", f"{more_s:.0f} s")
        if self._keys.stamps == "header" and len(content.poses.times) and not content.poses.times.unstamped:
            late = [
                np.median(times.of("log") - times.of("header")) / 1e9
                for times in (next(iter(content.images.values())), content.poses.times)
            ]
            if abs(late[0] - late[1]) > OTHER_LATENESS_S:
                what = "bags have images and poses that were recorded later than stamped, one by more than the other"
                detail = f"{late[0]:.2f} and {late[1]:.2f} s, at the median"
                yield Note(f"{what}: if their stamps are of two clocks, set stamps: log", detail)

    def open_frames(self, numbers: Sequence[int], camera: str | None = None) -> FrameReader:
        """Those frames, of a camera where there are several; of the first one where none is named."""
        if self._frames is None:
            self.poses(required=False)
        camera = next(iter(self._chosen.images)) if camera is None else camera
        return BagFrames(self._bag, self._chosen.images[camera], self._frames, camera, self._where)


class BagFrames:
    """Pictures of one topic, by number in the order of their times: one pass over the files where they lie in that
    order, and near to one where they nearly do."""

    def __init__(self, bag: Bag, topic: str, frames: Frames, camera: str | None, where: str):
        self._bag, self._topic, self._where = bag, bag.topics[topic], where
        self._at_ns, self._places = frames.at_ns, frames.places[camera]

    def name(self, number: int) -> str:
        return f"{self._where}: {self._topic.name}: frame {number} (at {self._at_ns[number]} ns)"

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        for number in numbers:
            with PROFILE("read"), self._bag.lock:
                place: Place = tuple(self._places[number].tolist())
                data = self._bag.read(place)
            with PROFILE("decode"):
                message = decoded(data, self._topic, self.name(number))
                picture = picture_of(message, self._topic.kind, self.name(number))
            yield picture

    def close(self) -> None:
        with self._bag.lock:
            self._bag.close()


def _signs(folder: FolderFiles, is_top: bool) -> Iterator[str]:
    for _, path in bags_of(folder):
        yield METADATA_FILE if path == folder.path else path.name


FORMAT = Format(
    find=find_bags,
    locate=locate_bag,
    open=RosbagSource,
    settings=("image_key", "position_key", "tf", "stamps", "max_pose_gap_s", "extra_keys"),
    trajectory=f"a *.bag or *.mcap file, or a folder with {METADATA_FILE} of rosbag2",
    signs=_signs,
)
