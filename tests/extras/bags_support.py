"""Bags of rendered and real trajectories, by two independent writers: rosbags, and mcap with hand-made ROS1 messages or
mcap-ros2's own encoder."""

from __future__ import annotations

import math
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import mcap.writer
import mcap_ros2.writer
import numpy as np
import rosbags.rosbag1
import rosbags.rosbag2
import yaml
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from support import Rendered

ROS1, ROS2 = get_typestore(Stores.ROS1_NOETIC), get_typestore(Stores.ROS2_HUMBLE)
ROS1.register(get_types_from_msg("geometry_msgs/TransformStamped[] transforms", "tf2_msgs/msg/TFMessage"))
CUSTOM = "my_robot/msg/Secret"
for store in (ROS1, ROS2):
    store.register(get_types_from_msg("float32 volts\nstring note", CUSTOM))
START_NS = 1_700_000_000_000_000_000
CAMERA, ODOM = "/camera/image/compressed", "/odom"
FPS = 10


class Event(NamedTuple):
    """A message as it is recorded; `make` builds it of a typestore's types and a function for headers."""

    topic: str
    kind: str
    log_ns: int
    make: Callable[[Any, Callable[[int, str], Any]], Any]


def headers(store: Any) -> Callable[[int, str], Any]:
    """header(stamp [ns], frame)."""
    types = store.types
    more = {"seq": 0} if store is ROS1 else {}

    def header(stamp: int, frame: str = "odom") -> Any:
        time = types["builtin_interfaces/msg/Time"](sec=stamp // 10**9, nanosec=stamp % 10**9)
        return types["std_msgs/msg/Header"](stamp=time, frame_id=frame, **more)

    return header


def compressed(stamp: int, data: bytes, log_ns: int | None = None, topic: str = CAMERA, form: str = "jpeg") -> Event:
    kind = "sensor_msgs/msg/CompressedImage"

    def make(types: Any, header: Any) -> Any:
        return types[kind](header=header(stamp, "camera"), format=form, data=np.frombuffer(data, np.uint8))

    return Event(topic, kind, stamp if log_ns is None else log_ns, make)


def raw(stamp: int, encoding: str, image: np.ndarray, topic: str = "/camera/image_raw", **changes: Any) -> Event:
    """`image`: (h, bytes of a row) uint8."""
    kind = "sensor_msgs/msg/Image"
    height, row = image.shape

    def make(types: Any, header: Any) -> Any:
        values = {"height": height, "width": 1, "encoding": encoding, "is_bigendian": 0, "step": row, **changes}
        return types[kind](header=header(stamp, "camera"), data=image.reshape(-1), **values)

    return Event(topic, kind, stamp, make)


def _pose(types: Any, x: float, y: float, yaw: float, z: float = 0.3) -> tuple[Any, Any]:
    turn = types["geometry_msgs/msg/Quaternion"](x=0.0, y=0.0, z=math.sin(yaw / 2), w=math.cos(yaw / 2))
    return types["geometry_msgs/msg/Point"](x=float(x), y=float(y), z=z), turn


def odometry(
    stamp: int, x: float, y: float, yaw: float, log_ns: int | None = None, *, kind: str = "Odometry", topic: str = ODOM,
    frame: str = "odom", twist: Sequence[float] = (1, 2, 3, 4, 5, 6),
) -> Event:  # fmt: skip
    def make(types: Any, header: Any) -> Any:
        place, turn = _pose(types, x, y, yaw)
        pose = types["geometry_msgs/msg/Pose"](position=place, orientation=turn)
        with_covariance = types["geometry_msgs/msg/PoseWithCovariance"](pose=pose, covariance=np.zeros(36))
        if kind == "PoseStamped":
            return types["geometry_msgs/msg/PoseStamped"](header=header(stamp, frame), pose=pose)
        if kind == "PoseWithCovarianceStamped":
            return types[f"geometry_msgs/msg/{kind}"](header=header(stamp, frame), pose=with_covariance)
        if kind == "TransformStamped":
            return _transform(types, header, stamp, frame, "base_link", x, y, yaw)
        vector = types["geometry_msgs/msg/Vector3"]
        speeds = types["geometry_msgs/msg/Twist"](
            linear=vector(*map(float, twist[:3])), angular=vector(*map(float, twist[3:]))
        )
        return types["nav_msgs/msg/Odometry"](
            header=header(stamp, frame), child_frame_id="base_link", pose=with_covariance,
            twist=types["geometry_msgs/msg/TwistWithCovariance"](twist=speeds, covariance=np.zeros(36)),
        )  # fmt: skip

    package = "nav_msgs" if kind == "Odometry" else "geometry_msgs"
    return Event(topic, f"{package}/msg/{kind}", stamp if log_ns is None else log_ns, make)


def _transform(types: Any, header: Any, stamp: int, outer: str, inner: str, x: float, y: float, yaw: float) -> Any:
    place, turn = _pose(types, x, y, yaw)
    vector = types["geometry_msgs/msg/Vector3"](x=place.x, y=place.y, z=place.z)
    transform = types["geometry_msgs/msg/Transform"](translation=vector, rotation=turn)
    kind = types["geometry_msgs/msg/TransformStamped"]
    return kind(header=header(stamp, outer), child_frame_id=inner, transform=transform)


def tf(stamp: int, outer: str, inner: str, x: float, y: float, yaw: float, *, static: bool = False) -> Event:
    kind = "tf2_msgs/msg/TFMessage"

    def make(types: Any, header: Any) -> Any:
        return types[kind](transforms=[_transform(types, header, stamp, outer, inner, x, y, yaw)])

    return Event("/tf_static" if static else "/tf", kind, stamp, make)


def custom(log_ns: int) -> Event:
    return Event("/secret", CUSTOM, log_ns, lambda types, header: types[CUSTOM](volts=1.5, note="x"))


def twist(log_ns: int, speed: float) -> Event:
    kind = "geometry_msgs/msg/Twist"

    def make(types: Any, header: Any) -> Any:
        vector = types["geometry_msgs/msg/Vector3"]
        return types[kind](linear=vector(x=speed, y=0.0, z=0.0), angular=vector(x=0.0, y=0.0, z=speed / 2))

    return Event("/cmd_vel", kind, log_ns, make)


def stamps(count: int, fps: float = FPS) -> list[int]:
    return [START_NS + round(number * 1e9 / fps) for number in range(count)]


def drive(jpegs: Iterable[bytes], position: np.ndarray, yaw: np.ndarray, fps: float = FPS) -> list[Event]:
    """Images, each with an Odometry of the same stamp; logged 20 ms later, poses before images."""
    events = [custom(START_NS)]
    for stamp, data, (x, y), turn in zip(stamps(len(position), fps), jpegs, position, yaw):
        events += [odometry(stamp, x, y, turn, stamp + 19_000_000), compressed(stamp, data, stamp + 20_000_000)]
    return events


def drive_of(trajectory: Rendered) -> list[Event]:
    return drive(trajectory.jpegs, trajectory.position, trajectory.yaw)


# ---------------------------------------------------------------------------------------------------------------------
# Writers
# ---------------------------------------------------------------------------------------------------------------------


def write_ros1(path: Path, events: list[Event], packing: str = "", chunk_bytes: int = 20_000) -> None:
    """A .bag, by rosbags."""
    writer = rosbags.rosbag1.Writer(path)
    if packing:
        writer.set_compression(writer.CompressionFormat[packing.upper()])
    writer.chunk_threshold = chunk_bytes
    header = headers(ROS1)
    with writer:
        connections = {event.topic: event.kind for event in events}
        connections = {topic: writer.add_connection(topic, kind, typestore=ROS1) for topic, kind in connections.items()}
        for event in events:
            data = ROS1.serialize_ros1(event.make(ROS1.types, header), event.kind)
            writer.write(connections[event.topic], event.log_ns, data)


def write_ros2(path: Path, events: list[Event], storage: str = "sqlite3", mode: str = "none") -> None:
    """A rosbag2 folder, by rosbags; `mode` of packing: none, file, message or storage."""
    writer = rosbags.rosbag2.Writer(path, version=9, storage_plugin=rosbags.rosbag2.StoragePlugin[storage.upper()])
    if mode != "none":
        writer.set_compression(rosbags.rosbag2.CompressionMode[mode.upper()], rosbags.rosbag2.CompressionFormat.ZSTD)
    header = headers(ROS2)
    with writer:
        kinds = {event.topic: event.kind for event in events}
        connections = {topic: writer.add_connection(topic, kind, typestore=ROS2) for topic, kind in kinds.items()}
        for event in events:
            data = ROS2.serialize_cdr(event.make(ROS2.types, header), event.kind)
            writer.write(connections[event.topic], event.log_ns, bytes(data))


def write_split(path: Path, events: list[Event], storage: str = "sqlite3", mode: str = "none") -> None:
    """A rosbag2 folder of two parts."""
    half = len(events) // 2
    parts = [path.with_name(f"{path.name}_{number}") for number in (0, 1)]
    for part, some in zip(parts, (events[:half], events[half:])):
        write_ros2(part, some, storage, mode)
    path.mkdir()
    first, second = (yaml.safe_load((part / "metadata.yaml").read_text()) for part in parts)
    merged, other = first["rosbag2_bagfile_information"], second["rosbag2_bagfile_information"]
    merged["relative_file_paths"] += other["relative_file_paths"]
    merged["message_count"] += other["message_count"]
    counts = {t["topic_metadata"]["name"]: t for t in merged["topics_with_message_count"]}
    for topic in other["topics_with_message_count"]:
        name = topic["topic_metadata"]["name"]
        counts.setdefault(name, {**topic, "message_count": 0})["message_count"] += topic["message_count"]
    merged["topics_with_message_count"] = list(counts.values())
    for part in parts:
        for file in part.iterdir():
            if file.name != "metadata.yaml":
                file.rename(path / file.name)
        shutil.rmtree(part)
    (path / "metadata.yaml").write_text(yaml.safe_dump(first))


def _text(value: str) -> bytes:
    return struct.pack("<I", len(value)) + value.encode()


def _ros1_header(header: Any) -> bytes:
    return struct.pack("<III", 0, header.stamp.sec, header.stamp.nanosec) + _text(header.frame_id)


def ros1_bytes(message: Any) -> bytes:
    """A CompressedImage or an Odometry by hand, as ROS1 has it on the wire."""
    head = _ros1_header(message.header)
    if hasattr(message, "format"):
        return head + _text(message.format) + struct.pack("<I", len(message.data)) + message.data.tobytes()
    place, turn = message.pose.pose.position, message.pose.pose.orientation
    pose = struct.pack("<7d", place.x, place.y, place.z, turn.x, turn.y, turn.z, turn.w)
    return head + _text(message.child_frame_id) + pose + bytes(36 * 8) + bytes(6 * 8 + 36 * 8)


def write_mcap_ros1(path: Path, events: list[Event], **how: Any) -> None:
    """A lone .mcap of ROS1 messages, by mcap-ros1-support's writer."""
    import mcap_ros1.writer

    packing = how.pop("compression", mcap.writer.CompressionType.ZSTD)
    with open(path, "wb") as file:
        writer = mcap_ros1.writer.Writer(file, chunk_size=20_000, compression=packing)
        for event in events:
            if event.kind == CUSTOM:
                continue
            definition = ROS1.generate_msgdef(event.kind)[0]

            class Message:
                _type, _full_text = event.kind.replace("/msg/", "/"), definition

                def __init__(self, data: bytes):
                    self._data = data

                def serialize(self, buffer: Any) -> None:
                    buffer.write(self._data)

            data = ros1_bytes(event.make(ROS1.types, headers(ROS1)))
            writer.write_message(event.topic, Message(data), event.log_ns, event.log_ns)
        writer.finish()


def write_mcap_ros2(path: Path, events: list[Event], **how: Any) -> None:
    """A lone .mcap of ROS2 messages, encoded by mcap-ros2-support."""
    packing = how.pop("compression", mcap.writer.CompressionType.LZ4)
    with open(path, "wb") as file:
        writer = mcap_ros2.writer.Writer(file, chunk_size=20_000, compression=packing)
        schemas = {
            kind: writer.register_msgdef(kind, ROS2.generate_msgdef(kind, ros_version=2)[0])
            for kind in {event.kind for event in events}
        }
        for event in events:
            message = _plain(event.make(ROS2.types, headers(ROS2)))
            writer.write_message(event.topic, schemas[event.kind], message, event.log_ns, event.log_ns)
        writer.finish()


def write_mcap_bare(path: Path, events: list[Event], **how: Any) -> None:
    """A lone .mcap by mcap's own writer, with chunks, indexes and statistics as wished."""
    with open(path, "wb") as file:
        writer = mcap.writer.Writer(file, chunk_size=20_000, **how)
        writer.start(profile="ros2", library="test")
        channels = {}
        for event in events:
            if event.topic not in channels:
                text = ROS2.generate_msgdef(event.kind, ros_version=2)[0].encode()
                schema = writer.register_schema(event.kind, "ros2msg", text)
                channels[event.topic] = writer.register_channel(event.topic, "cdr", schema)
            data = bytes(ROS2.serialize_cdr(event.make(ROS2.types, headers(ROS2)), event.kind))
            writer.add_message(channels[event.topic], event.log_ns, data, event.log_ns)
        writer.finish()


def _plain(value: Any) -> Any:
    """A message as nested mappings."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, list):
        return [_plain(each) for each in value]
    fields = getattr(value, "__dataclass_fields__", None)
    if fields is None:
        return value
    return {name: _plain(getattr(value, name)) for name in fields if name != "__msgtype__"}


NONE = mcap.writer.CompressionType.NONE
KINDS: dict[str, tuple[str, Callable[[Path, list[Event]], None]]] = {  # how it is called here -> (ending, writer)
    "bag": (".bag", write_ros1),
    "bag lz4": (".bag", lambda path, events: write_ros1(path, events, "lz4")),
    "bag bz2": (".bag", lambda path, events: write_ros1(path, events, "bz2")),
    "rosbag2 sqlite3": ("", write_ros2),
    "rosbag2 sqlite3, packed messages": ("", lambda path, events: write_ros2(path, events, mode="message")),
    "rosbag2 sqlite3, packed file": ("", lambda path, events: write_ros2(path, events, mode="file")),
    "rosbag2 sqlite3, split": ("", write_split),
    "rosbag2 mcap": ("", lambda path, events: write_ros2(path, events, "mcap")),
    "rosbag2 mcap, packed chunks": ("", lambda path, events: write_ros2(path, events, "mcap", "storage")),
    "rosbag2 mcap, packed messages": ("", lambda path, events: write_ros2(path, events, "mcap", "message")),
    "rosbag2 mcap, packed file, split": ("", lambda path, events: write_split(path, events, "mcap", "file")),
    "mcap of ROS1": (".mcap", write_mcap_ros1),
    "mcap of ROS1, plain": (".mcap", lambda path, events: write_mcap_ros1(path, events, compression=NONE)),
    "mcap of ROS2": (".mcap", write_mcap_ros2),
    "mcap of ROS2, plain": (".mcap", lambda path, events: write_mcap_ros2(path, events, compression=NONE)),
    "mcap without chunks": (".mcap", lambda path, events: write_mcap_bare(path, events, use_chunking=False)),
    "mcap without indexes": (
        ".mcap",
        lambda path, events: write_mcap_bare(
            path,
            events,
            index_types=mcap.writer.IndexType.NONE,
            use_statistics=False,
            repeat_channels=False,
            repeat_schemas=False,
            use_summary_offsets=False,
        ),
    ),
}


def write(kind: str, folder: Path, name: str, events: list[Event]) -> Path:
    """A bag of one of KINDS; returns its path."""
    suffix, writer = KINDS[kind]
    path = folder / f"{name}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    writer(path, events)
    return path
