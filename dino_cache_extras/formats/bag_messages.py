"""What messages of a bag say: stamps, pictures, poses, transforms, numbers. Only ROS's own types are looked into.

Their definitions are those of the rosbags library; a bag that brings another one for such a type is refused. So nothing
that a file says becomes a program, and messages of types that nobody knows do not matter.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from dino_cache import MAX_FRAME_PIXELS, InputError, InvalidDataError
from dino_cache_extras.formats.bag_files import bag_errors
from dino_cache_extras.formats.bags import Topic
from progress_utils import open_library

STAMP_BYTES = 16  # of a message, in which its header's stamp lies
COMPRESSED_KIND, RAW_KIND = "sensor_msgs/CompressedImage", "sensor_msgs/Image"
IMAGE_KINDS = (COMPRESSED_KIND, RAW_KIND)
POSE_KINDS: dict[str, Callable[[Any], Any]] = {  # -> what has position and orientation, or translation and rotation
    "nav_msgs/Odometry": lambda message: message.pose.pose,
    "geometry_msgs/PoseStamped": lambda message: message.pose,
    "geometry_msgs/PoseWithCovarianceStamped": lambda message: message.pose.pose,
    "geometry_msgs/TransformStamped": lambda message: message.transform,
}
TF_KINDS = ("tf2_msgs/TFMessage", "tf/tfMessage")
PICTURE_SIGNS = (b"\xff\xd8", b"\x89PNG", b"RIFF", b"BM")  # JPEG, PNG, WebP, BMP
ENCODINGS = {  # of raw images: (channels, which of them are red, green and blue)
    "rgb8": (3, (0, 1, 2)), "bgr8": (3, (2, 1, 0)), "rgba8": (4, (0, 1, 2)), "bgra8": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
}  # fmt: skip
YUV_PLACES = {  # of two pixels' four bytes: both lights, blue's and red's colour difference
    "yuv422": (1, 3, 0, 2), "uyvy": (1, 3, 0, 2), "yuv422_yuy2": (0, 2, 1, 3), "yuyv": (0, 2, 1, 3),
}  # fmt: skip
TF_DEFINITION = "geometry_msgs/TransformStamped[] transforms"


@functools.cache
def _types(encoding: str) -> Any:
    """The types of ROS1 or ROS2, as rosbags has them."""
    typesys = open_library("rosbags.typesys")
    if encoding == "cdr":
        return typesys.get_typestore(typesys.Stores.ROS2_HUMBLE)
    types = typesys.get_typestore(typesys.Stores.ROS1_NOETIC)
    for kind in TF_KINDS:
        types.register(typesys.get_types_from_msg(TF_DEFINITION, long_kind(kind)))
    return types


def long_kind(kind: str) -> str:
    """A type's name as ROS2 writes it: nav_msgs/msg/Odometry."""
    package, _, name = kind.partition("/")
    return f"{package}/msg/{name}"


def check_topic(topic: Topic, where: str) -> None:
    """Raise InputError unless a topic's messages are of one type, encoded and defined as ROS does."""
    if topic.encoding not in ("ros1", "cdr") or "," in topic.kind:
        raise InputError(
            f"{where}: {topic.name} holds {topic.kind}, encoded as {topic.encoding}; ros1 and cdr are read"
        )
    for text, kind in topic.definitions:
        if not _is_known(topic.kind, topic.encoding, text, kind):
            raise InputError(f"{where}: {topic.name}: its {topic.kind} is not ROS's: the bag defines it otherwise")


@functools.lru_cache(64)
def _is_known(kind: str, encoding: str, text: str, text_kind: str) -> bool:
    """Whether a definition has the fields that are expected; of types that it does not define, those are."""
    typesys, known = open_library("rosbags.typesys"), _types(encoding).fielddefs
    with bag_errors(f"the definition of {kind}"):
        if text_kind == "idl":
            found = {}
            for part in _idl_parts(text):
                found |= typesys.get_types_from_idl(part)
        else:
            found = typesys.get_types_from_msg(text, long_kind(kind))
    wanted, seen = [long_kind(kind)], set()
    while wanted:
        name = wanted.pop()
        if name in seen or name not in found:
            continue
        seen.add(name)
        fields, expected = found[name][1], known.get(name, (None, None))[1]
        if expected is None or [(field, _plain(what)) for field, what in fields] != [
            (field, _plain(what)) for field, what in expected
        ]:
            return False
        wanted += [part for _, what in fields for part in _names(what)]
    return True


def _idl_parts(text: str) -> list[str]:
    """Definitions of several types, which ROS2 puts behind each other with two lines before each; without the lines
    that include others, which rosbags does not parse."""
    parts = [part.partition("\n") for part in text.split("=" * 80 + "\n")]
    whole = [rest for first, _, rest in parts if first.startswith("IDL: ")] or [text]
    return ["\n".join(line for line in part.split("\n") if not line.startswith("#")) for part in whole]


def _plain(what: Any) -> str:
    """A field's description, to be compared."""
    return repr(what)


def _names(what: Any) -> list[str]:
    """The types that a field's description names."""
    _, inner = what
    if isinstance(inner, str):
        return [inner]
    return _names(inner[0]) if isinstance(inner[0], tuple) else []


def decoded(data: bytes, topic: Topic, where: str) -> Any:
    """A message. Raises InputError."""
    types = _types(topic.encoding)
    with bag_errors(where):
        if topic.encoding == "cdr":
            return types.deserialize_cdr(data, long_kind(topic.kind))
        return types.deserialize_ros1(data, long_kind(topic.kind))


def stamp_ns(data: bytes, topic: Topic, where: str) -> int:
    """The stamp of a message's header, out of its first STAMP_BYTES. Raises InputError."""
    try:
        if topic.encoding == "ros1":
            seconds, nanoseconds = struct.unpack_from("<II", data, 4)  # behind its sequence number
        else:
            if data[:2] not in (b"\x00\x00", b"\x00\x01"):
                raise InputError(f"{where}: is encoded by another CDR than ROS2's: it begins with {data[:4].hex()}")
            seconds, nanoseconds = struct.unpack_from("<iI" if data[1] else ">iI", data, 4)
    except struct.error:
        raise InputError(f"{where}: has {len(data)} bytes, too few for a header") from None
    if nanoseconds >= 10**9:
        raise InputError(f"{where}: its stamp has {nanoseconds} nanoseconds")
    return seconds * 10**9 + nanoseconds


class Pose(NamedTuple):
    """Where one frame of reference lies in another."""

    frames: tuple[str, str]  # in which, which
    values: tuple[float, ...]  # x, y, z, and the quaternion's x, y, z, w


def pose_of(message: Any, kind: str) -> Pose:
    """What a message of POSE_KINDS says."""
    frames = (_frame(message.header.frame_id), _frame(getattr(message, "child_frame_id", "")))
    return Pose(frames, _values(POSE_KINDS[kind](message)))


def transforms_of(message: Any) -> list[tuple[int, Pose]]:
    """The transforms of a TFMessage, with their stamps [ns]."""
    return [
        (
            transform.header.stamp.sec * 10**9 + transform.header.stamp.nanosec,
            Pose((_frame(transform.header.frame_id), _frame(transform.child_frame_id)), _values(transform.transform)),
        )
        for transform in message.transforms
    ]


def _frame(name: str) -> str:
    return name.removeprefix("/")  # as ROS1's first tf wrote it


def _values(pose: Any) -> tuple[float, ...]:
    place = pose.position if hasattr(pose, "position") else pose.translation
    turn = pose.orientation if hasattr(pose, "orientation") else pose.rotation
    return (place.x, place.y, place.z, turn.x, turn.y, turn.z, turn.w)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def picture_of(message: Any, kind: str, where: str) -> np.ndarray:
    """(N,) uint8 bytes of an image file as they are, or (h, w, 3) uint8 RGB of a raw image.

    Raises:
        InputError: it is no picture, or of an encoding that is not read.
    """
    if kind == COMPRESSED_KIND:
        content = bytearray(message.data)
        if not content.startswith(PICTURE_SIGNS):
            raise InputError(
                f"{where}: its format is {message.format!r}, and its bytes are no JPEG, PNG, WebP or BMP picture"
            )
        return np.frombuffer(content, np.uint8)
    return _raw_picture(message, where)


def _raw_picture(message: Any, where: str) -> np.ndarray:
    encoding, height, width = message.encoding.lower(), message.height, message.width
    if encoding.startswith("bayer"):
        raise InputError(f"{where}: its encoding is {message.encoding}, a sensor's own; make it rgb8 (image_proc)")
    if encoding not in {*ENCODINGS, *YUV_PLACES, "mono16"}:
        raise InputError(f"{where}: its encoding is {message.encoding!r}; {', '.join(ENCODINGS)}, mono16, yuv422 and "
                         "yuv422_yuy2 are read")  # fmt: skip
    if not 0 < height * width <= MAX_FRAME_PIXELS:
        raise InputError(f"{where}: it claims {width}x{height} px; 1 to {MAX_FRAME_PIXELS} pixels are read")
    pixel_bytes = ENCODINGS[encoding][0] if encoding in ENCODINGS else 2
    data, row_bytes = np.asarray(message.data), width * pixel_bytes
    if message.step < row_bytes or len(data) < (height - 1) * message.step + row_bytes:
        raise InvalidDataError(
            f"{where}: {width}x{height} px of {message.encoding} need {row_bytes} bytes a row; its step is "
            f"{message.step}, and it has {len(data)} bytes"
        )
    rows = np.lib.stride_tricks.as_strided(data, (height, row_bytes), (message.step, 1), writeable=False)
    if encoding in YUV_PLACES:
        return _rgb_of_yuv(rows, YUV_PLACES[encoding], where)
    if encoding == "mono16":
        grey = np.ascontiguousarray(rows).view(">u2" if message.is_bigendian else "<u2").astype(np.uint32)
        return np.repeat(((grey + 128) // 257).astype(np.uint8)[..., None], 3, axis=2)
    channels, colours = ENCODINGS[encoding]
    return np.ascontiguousarray(rows.reshape(height, width, channels)[..., colours])


def _rgb_of_yuv(rows: np.ndarray, places: tuple[int, int, int, int], where: str) -> np.ndarray:
    """BT.601 with lights from 16 to 235, as OpenCV and cv_bridge take it."""
    height, row_bytes = rows.shape
    if row_bytes % 4:
        raise InvalidDataError(f"{where}: yuv422 has pixels in pairs, and it is {row_bytes // 2} px wide")
    pairs = rows.reshape(height, row_bytes // 4, 4).astype(np.float32)
    light = (pairs[..., places[:2]] - 16) * 1.164
    blue, red = (pairs[..., place, None] - 128 for place in places[2:])
    colours = (light + 1.596 * red, light - 0.813 * red - 0.391 * blue, light + 2.018 * blue)
    image = np.stack([np.clip(np.rint(colour), 0, 255) for colour in colours], axis=-1)
    return image.astype(np.uint8).reshape(height, row_bytes // 2, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that come along
# ---------------------------------------------------------------------------------------------------------------------


def _twist(twist: Any) -> list[float]:
    return [getattr(part, axis) for part in (twist.linear, twist.angular) for axis in "xyz"]


NUMBER_KINDS: dict[str, Callable[[Any], list[float] | float]] = {  # (6,): linear x, y, z, angular x, y, z; or a number
    "geometry_msgs/Twist": _twist,
    "geometry_msgs/TwistStamped": lambda message: _twist(message.twist),
    "nav_msgs/Odometry": lambda message: _twist(message.twist.twist),
    **{
        f"std_msgs/{name}": lambda message: float(message.data)
        for name in (
            "Bool",
            "Float32",
            "Float64",
            *(f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)),
        )
    },
}
STAMPED_KINDS = (*IMAGE_KINDS, *POSE_KINDS, "geometry_msgs/TwistStamped")  # whose first field is a header
