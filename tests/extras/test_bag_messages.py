"""Pictures in messages: every encoding by hand, and those that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bags_support import ROS1, ROS2, Event, compressed, odometry, raw, stamps, write_ros1, write_ros2

from dino_cache import DataKeys, InputError, Trajectory
from dino_cache_extras.formats.bag_messages import check_topic
from dino_cache_extras.formats.bags import Topic
from dino_cache_extras.formats.rosbag import RosbagSource
from support import encoded, render

COLOURS = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [10, 20, 30]]], np.uint8)  # (2, 2, 3) RGB


def read(folder: Path, event: Event, *, is_ros1: bool = True) -> np.ndarray:
    """The first frame of a bag of this image."""
    path = folder / ("t.bag" if is_ros1 else "t")
    (write_ros1 if is_ros1 else write_ros2)(path, [event])
    source = RosbagSource(Trajectory("t", path, format="rosbag"), DataKeys())
    numbers = source.poses(required=False).frame_index
    (frame,) = source.open_frames(numbers).read(numbers)
    return frame


def image(encoding: str, rows: Any, width: int, **changes: Any) -> Event:
    return raw(stamps(1)[0], encoding, np.asarray(rows, np.uint8), width=width, **changes)


ALPHA = np.full((2, 2, 1), 7, np.uint8)


@pytest.mark.parametrize("is_ros1", [True, False])
@pytest.mark.parametrize(("encoding", "pixels"), [
    ("rgb8", COLOURS), ("bgr8", COLOURS[..., ::-1]),
    ("rgba8", np.concatenate([COLOURS, ALPHA], 2)), ("bgra8", np.concatenate([COLOURS[..., ::-1], ALPHA], 2)),
])  # fmt: skip
def test_colours(tmp_path: Path, encoding: str, pixels: np.ndarray, is_ros1: bool) -> None:
    frame = read(tmp_path, image(encoding, pixels.reshape(2, -1), 2), is_ros1=is_ros1)
    np.testing.assert_array_equal(frame, COLOURS)


def test_rows_may_be_longer_than_their_pixels(tmp_path: Path) -> None:
    padded = np.concatenate([COLOURS.reshape(2, -1), np.full((2, 5), 99, np.uint8)], axis=1)
    np.testing.assert_array_equal(read(tmp_path, image("rgb8", padded, 2)), COLOURS)


def test_grey(tmp_path: Path) -> None:
    frame = read(tmp_path, image("mono8", [[0, 100, 255]], 3))
    assert frame.tolist() == [[[0] * 3, [100] * 3, [255] * 3]]


@pytest.mark.parametrize(("is_bigendian", "kind"), [(0, "<u2"), (1, ">u2")])
def test_grey_of_16_bits(tmp_path: Path, is_bigendian: int, kind: str) -> None:
    values = np.array([[0, 257, 65535, 32896]], kind).view(np.uint8)
    frame = read(tmp_path, image("mono16", values, 4, is_bigendian=is_bigendian))
    assert frame[0, :, 0].tolist() == [0, 1, 255, 128]


@pytest.mark.parametrize(("encoding", "order"), [
    ("yuv422", "UYVY"), ("uyvy", "UYVY"), ("yuv422_yuy2", "YUYV"), ("yuyv", "YUYV"),
])  # fmt: skip
def test_light_and_colour_differences(tmp_path: Path, encoding: str, order: str) -> None:
    """Known colours of BT.601: (Y, U, V) of black, white, red and blue, one pair of pixels each."""
    pairs = [(16, 16, 128, 128), (235, 235, 128, 128), (81, 81, 90, 240), (41, 16, 240, 110)]
    rows = []
    for first, second, u, v in pairs:
        light = iter((first, second))
        colour = {"U": u, "V": v}
        rows += [colour[letter] if letter in colour else next(light) for letter in order]
    frame = read(tmp_path, image(encoding, [rows], 8)).astype(int)
    expected = [[0, 0, 0], [0, 0, 0], [255, 255, 255], [255, 255, 255], [255, 0, 0], [255, 0, 0], [0, 0, 255]]
    assert np.abs(frame[0, :7] - expected).max() <= 2
    assert frame[0, 7, 2] < frame[0, 6, 2]  # the second of its pair has less light


def test_pictures_pass_as_they_are(tmp_path: Path) -> None:
    for number, kind in enumerate(("JPEG", "PNG", "WEBP", "BMP")):
        data = encoded(render(1, 5), kind)
        (tmp_path / kind).mkdir()
        frame = read(tmp_path / kind, compressed(stamps(1)[0], data), is_ros1=number % 2 == 0)
        assert (frame.dtype, frame.tobytes(), frame.flags.writeable) == (np.uint8, data, True)


@pytest.mark.parametrize(("event", "said"), [
    (image("bayer_rggb8", [[1, 2]], 2), "its encoding is bayer_rggb8, a sensor's own; make it rgb8"),
    (image("16UC1", [[1, 2]], 1), "its encoding is '16UC1'; rgb8, bgr8, rgba8, bgra8, mono8, mono16, yuv422 and"),
    (image("rgb8", [[1, 2, 3]], 2), "2x1 px of rgb8 need 6 bytes a row; its step is 3, and it has 3 bytes"),
    (image("rgb8", [[1, 2, 3]], 1, height=2), "1x2 px of rgb8 need 3 bytes a row; its step is 3, and it has 3 bytes"),
    (image("rgb8", [[1, 2, 3]], 1, step=0), "its step is 0"),
    (image("rgb8", [[1, 2, 3]], 0), "it claims 0x1 px"),
    (image("mono8", [[1, 2, 3]], 1 << 30, height=1 << 30), "it claims 1073741824x1073741824 px"),
    (image("yuv422", [[1, 2, 3, 4, 5, 6]], 3), "pixels in pairs, and it is 3 px wide"),
    (compressed(stamps(1)[0], b"\x00\x00\x00\x01\x67", form="h264"), "its format is 'h264', and its bytes are no JPEG"),
    (compressed(stamps(1)[0], bytes(12) + b"\x89PNG", form="16UC1; compressedDepth png"), "compressedDepth png"),
    (compressed(stamps(1)[0], b""), "its bytes are no JPEG"),
])  # fmt: skip
def test_what_is_no_picture_is_refused_by_name(tmp_path: Path, event: Event, said: str) -> None:
    with pytest.raises(InputError) as raised:
        read(tmp_path, event)
    assert said in str(raised.value)
    assert "frame 0 (at 1700000000000000000 ns)" in str(raised.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_poses_that_are_no_numbers_are_refused(tmp_path: Path, value: float) -> None:
    events = [event for stamp in stamps(3) for event in (odometry(stamp, 0, 0, 0), compressed(stamp, b"\xff\xd8"))]
    events[2] = odometry(stamps(3)[1], value, 0, 0)
    write_ros1(tmp_path / "t.bag", events)
    with pytest.raises(InputError, match=r"/odom: pose\[1, 0\] is (nan|inf|1e\+300)"):
        RosbagSource(Trajectory("t", tmp_path / "t.bag", format="rosbag"), DataKeys()).poses(required=True)


def test_both_worlds_have_the_types_that_are_read() -> None:
    for store in (ROS1, ROS2):
        assert {"sensor_msgs/msg/CompressedImage", "nav_msgs/msg/Odometry", "tf2_msgs/msg/TFMessage"} <= {
            *store.fielddefs
        }


IDL = """================================================================================
IDL: sensor_msgs/msg/CompressedImage
#include "std_msgs/msg/Header.idl"

module sensor_msgs {
  module msg {
    @verbatim (language="comment", text=
      "Pictures" "\\n"
      "with # and ;")
    struct CompressedImage {
      std_msgs::msg::Header header;
      string format;
      sequence<uint8> data;
    };
  };
};

================================================================================
IDL: std_msgs/msg/Header
#include "builtin_interfaces/msg/Time.idl"

module std_msgs {
  module msg {
    struct Header {
      builtin_interfaces::msg::Time stamp;
      string frame_id;
    };
  };
};
"""


@pytest.mark.parametrize(("text", "kind", "is_known"), [
    (IDL, "idl", True),
    (IDL.replace("string format", "string<4> form"), "idl", False),
    (IDL.replace("string frame_id", "int32 frame_id"), "idl", False),
    ("std_msgs/Header header\nstring format\nuint8[] data", "msg", True),  # what it names is ROS's
    ("string format\nstd_msgs/Header header\nuint8[] data", "msg", False),
])  # fmt: skip
def test_a_definition_is_compared_field_by_field(text: str, kind: str, is_known: bool) -> None:
    topic = Topic("/camera", "sensor_msgs/CompressedImage", "cdr", 1, ((text, kind),))
    if is_known:
        check_topic(topic, "t")
    else:
        with pytest.raises(InputError, match="is not ROS's"):
            check_topic(topic, "t")


def test_a_definition_that_cannot_be_parsed_and_other_encodings_are_refused() -> None:
    topic = Topic("/camera", "sensor_msgs/CompressedImage", "cdr", 1, (("(((", "msg"),))
    with pytest.raises(InputError, match=r"the definition of sensor_msgs/CompressedImage"):
        check_topic(topic, "t")
    with pytest.raises(InputError, match="encoded as json; ros1 and cdr are read"):
        check_topic(topic._replace(encoding="json"), "t")
