"""Frames of a video, found by their times, decoded once and in order."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import threading
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from dino_cache import (
    FENCE,
    LOST_MOUNT_ERRNOS,
    MAX_FRAME_PIXELS,
    PROFILE,
    CacheSpec,
    DinoCacheError,
    InputError,
    open_regular,
    recordable_name,
)
from dino_cache_extras.formats.common import FileCache
from dino_cache_extras.formats.playlists import Segments, is_playlist, segments_of
from dino_cache_extras.formats.pose_times import SAME_TIME_S
from progress_utils import available_cores, open_library

if TYPE_CHECKING:
    import av


VIDEO_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"  # FFmpeg's names of the containers that are opened
SEGMENTS = "mpegts"  # its name of what a playlist's segments are
VIDEO_THREADS = 4  # threads of one video's decoder, at most
VIDEO_TOLERANCE = 0.25  # a frame's time may differ from its pose's by this part of the time between two frames
SEEK_BEYOND_S = 2.0  # a first frame later than this is sought; before it, decoding from the start is as quick
SEEK_BACK_S = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # so long before a frame a key frame is sought that leads to it
MOST_TIMES = 1 << 24  # times of frames that are kept, so that no video that was just planned is looked through again
AVI = "avi"  # FFmpeg's name of the container
VP8_DECODERS = ("vp8", "libvpx")


@contextlib.contextmanager
def video_errors(where: str) -> Iterator[None]:
    """Whatever a video raises while it is opened, looked through or decoded is that trajectory's fault, or the mount's.
    Strangers' bytes raise more than FFmpeg's errors: AttributeError where a codec is unknown, UnicodeDecodeError for a
    text. Only what this program itself raises passes, and running out of memory."""
    av = open_library("av")
    try:
        yield
    except av.FFmpegError as error:
        if error.errno in LOST_MOUNT_ERRNOS:
            raise OSError(error.errno, f"{where}: {error.strerror}") from error
        raise InputError(f"{where}: cannot read the video: {error.strerror}") from error
    except (InputError, OSError, DinoCacheError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{where}: cannot read the video: {type(error).__name__}: {reason}") from error


def open_video(path: Path, where: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    """A video file and its first video stream. What the file refers to (other files) is not opened, but the segments of
    a playlist beside it; texts in it that are not UTF-8 do not matter.

    Raises:
        InputError, OSError: it is no video, or cannot be read.
    """
    os.close(open_regular(path))
    is_listed = is_playlist(path)
    options = {"protocol_whitelist": "file", "format_whitelist": SEGMENTS if is_listed else VIDEO_CONTAINERS}
    with video_errors(where):
        file, kind = (Segments(segments_of(path)), SEGMENTS) if is_listed else (os.fspath(path), None)
        container = open_library("av").open(file, format=kind, options=options, metadata_errors="replace")
        try:
            if not container.streams.video:
                raise InputError(f"{where}: has no video stream")
            return container, container.streams.video[0]
        except BaseException:
            container.close()
            raise


def packets(path: Path, where: str) -> Iterator[tuple[av.Packet, Fraction]]:
    """Packets of shown frames, in the order of the file, undecoded; and the unit of their times [s]."""
    container, stream = open_video(path, where)
    with video_errors(where), container:
        for packet in container.demux(stream):
            FENCE.getting_on()
            if packet.size and packet.pts is not None and not packet.is_discard:
                yield packet, stream.time_base


class VideoTimes(NamedTuple):
    """When a video's n frames are shown, and by what the decoder's frames can be told from each other."""

    shown_s: np.ndarray  # (n,) [s] on the container's clock, ascending
    stamps: list[int] | None  # of AVI: what the decoder's frames carry for a time, ascending; None: they carry the time
    first_stamp_s: float  # what the first frame carries


def _read_times(path: Path) -> VideoTimes:
    where = recordable_name(os.fspath(path))
    container, stream = open_video(path, where)
    with video_errors(where), container:
        is_avi, codec_name, time_base = container.format.name == AVI, _codec_of(stream, where).name, stream.time_base
        shown, stamps, first, is_cut, before = [], [], None, False, None
        for packet in container.demux(stream):
            FENCE.getting_on()
            if not packet.size or (codec_name in VP8_DECODERS and _is_hidden_vp8(packet)):
                continue
            if packet.pts is None:
                raise _without_times(where)
            if is_playlist(path) and before is not None and (packet.dts or 0) < before:
                raise InputError(f"{where}: its clock goes back between segments, so frames cannot be told by time")
            first, before = first or packet, packet.dts
            is_cut = is_cut or not first.is_keyframe or (packet.pts < first.pts and not is_avi)
            if not packet.is_discard:
                shown.append(float((packet.dts if is_avi else packet.pts) * time_base))
                stamps.append(packet.pts)
    times = np.array(sorted(shown))
    if is_cut and len(times):  # out of a longer video: what its first frames are decoded from may be missing
        if is_avi:
            raise _without_times(where)
        times = times[times >= first_picture(path).shown_s - SAME_TIME_S]
    if is_avi and len(times):
        return VideoTimes(times, sorted(stamps), float(min(stamps) * time_base))
    return VideoTimes(times, None, times.min(initial=math.inf))


def _without_times(where: str) -> InputError:
    return InputError(
        f"{where}: it cannot be known when its frames are shown: the file gives no times for them, and they cannot be "
        f"counted, since some are not decoded; encode it anew, as {Path(where).stem}.mp4, for one"
    )


class OrderClock:
    """When the frames of an AVI file are shown. Such a file keeps the order in which they are decoded, not their times,
    and with B-frames what FFmpeg makes of it can be a frame off: the frame that comes k-th has the k-th time. A frame
    that the decoder leaves out would shift all that follow, so it is seen that each comes, some places early or late.
    """

    MOST_PLACES = 16  # by which H.264 and HEVC can reorder frames

    def __init__(self, times: VideoTimes, where: str):
        self._times, self._stamps, self._where = times.shown_s, times.stamps, where
        self._missing, self._count = list(times.stamps), 0

    def __call__(self, frame: av.VideoFrame) -> float:
        """The time of the next frame [s]; InputError where one was left out, or is too many."""
        if frame.pts not in self._missing[: 2 * self.MOST_PLACES]:
            raise _without_times(self._where)
        self._missing.remove(frame.pts)
        self._count += 1
        before = self._count - self.MOST_PLACES
        if before > 0 and self._missing and self._missing[0] < self._stamps[before - 1]:
            raise _without_times(self._where)
        return float(self._times[self._count - 1])

    def check_end(self, frames: Iterator[av.VideoFrame]) -> None:
        """See that no frame up to here was left out; it may still come."""
        more = [self(frame) for frame in itertools.islice(frames, self.MOST_PLACES + 1)]
        if self._missing and len(more) <= self.MOST_PLACES:
            raise _without_times(self._where)


def _is_hidden_vp8(packet: av.Packet) -> bool:
    """Whether it only helps to decode the frames that follow: show_frame is 0 (RFC 6386, 9.1)."""
    return not bytes(packet)[0] & 0x10


def _read_packet_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    where = recordable_name(os.fspath(path))
    container, stream = open_video(path, where)
    with video_errors(where), container:
        entries = [(entry.timestamp, entry.size) for entry in stream.index_entries]
        times = np.array([(time - entries[0][0]) * float(stream.time_base) for time, _ in entries])
        return times, np.array([size for _, size in entries], dtype=np.int64)


video_times = FileCache(_read_times, MOST_TIMES, lambda times: len(times.shown_s) + 1)  # without decoding frames
packet_index = FileCache(_read_packet_index, 8)  # (n,) times [s] from 0 in the order of decoding, and (n,) sizes


def frame_times(path: Path) -> np.ndarray:
    """(n,) [s] of a video's frames, on its container's clock, ascending."""
    return video_times(path).shown_s


class FirstPicture(NamedTuple):
    """What decoding a video's first frame tells."""

    shown_s: float  # on the container's clock
    pixel_aspect: Fraction  # width to height of a pixel
    is_mirrored: bool


def first_picture(path: Path) -> FirstPicture:
    """Decode a video's first frame.

    Raises:
        InputError, OSError: there is none, or it cannot be decoded.
    """
    where = recordable_name(os.fspath(path))
    container, stream = open_video(path, where)
    with video_errors(where), container:
        _set_up_decoder(stream, where)
        frame = next(container.decode(stream), None)
        if frame is None or frame.time is None:
            raise InputError(f"{where}: holds no frame that can be decoded and has a time")
        (a, b), (c, d) = _display_matrix(frame)
        return FirstPicture(frame.time, _pixel_aspect(stream), a * d - b * c < 0)


first_pictures = FileCache(first_picture, 64)


def changed_picture(path: Path, spec: CacheSpec) -> str | None:
    """How pictures that 0.2.0 made of a video, neither mirrored nor with square pixels, differ from what they are now;
    None where they do not."""
    first = first_pictures(path)
    if first.is_mirrored:
        return "its pictures were not mirrored as the video says"
    if first.pixel_aspect != 1 and spec.resize == "crop":
        width, height = first.pixel_aspect.as_integer_ratio()
        return f"its pixels of {width}:{height} were taken for square"
    return None


def _codec_of(stream: av.VideoStream, where: str) -> av.CodecContext:
    """Its decoder; InputError where there is none."""
    if stream.codec_context is None:
        raise InputError(f"{where}: cannot read the video: no decoder for its codec here")
    return stream.codec_context


def _set_up_decoder(stream: av.VideoStream, where: str) -> None:
    codec = _codec_of(stream, where)
    codec.thread_type = "AUTO"
    codec.thread_count = min(VIDEO_THREADS, available_cores())
    codec.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # more are refused undecoded


class VideoFrames:
    """Frames of one video, found by their times: one pass over the file, one seek at most.

    Whichever thread comes first decodes on to the frame that it wants, and leaves those on the way to the others. No
    thread waits for another's turn, so none waits in vain. Raw frames are held by at most as many threads as there are
    cores, and given away as they are converted.
    """

    def __init__(self, path: Path, name: str, numbers: Sequence[int], times: Sequence[float], tolerance_s: float):
        self._path, self._name, self._tolerance_s = path, name, tolerance_s
        self._times = dict(zip(numbers, times))
        self._waiting = deque(numbers)
        self._decoded: dict[int, av.VideoFrame] = {}
        self._container: av.container.InputContainer | None = None
        self._frames: Generator[av.VideoFrame] = (frame for frame in ())
        self._ahead: av.VideoFrame | None = None  # decoded to see where a seek led
        self._clock: OrderClock | None = None  # None: frames carry their times
        self._pixel_aspect = Fraction(1)
        self._shown_s = -math.inf  # of the last frame decoded; minus infinity before the first
        self._error: Exception | None = None  # the first, which then is that of all frames: one thread meets another's
        self._lock = threading.Lock()

    def name(self, number: int) -> str:
        return f"{self._name}: frame {number} ({recordable_name(self._path.name)} at {self._times[number]:.3f} s)"

    def read(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        with self._lock, _VIDEO_DECODERS, PROFILE("decode"):
            try:
                with video_errors(self.name(numbers[0])):
                    frames = deque([self._take(number) for number in numbers])
            except (InputError, OSError) as error:
                self._error = self._error or error
                raise
        while frames:
            with PROFILE("decode"), video_errors(self._name):
                image = _rgb(frames.popleft(), self._pixel_aspect, self._name)
            yield image

    def _take(self, number: int) -> av.VideoFrame:
        while number not in self._decoded:
            if self._error or not self._waiting:
                raise self._error or InputError(f"{self.name(number)}: the video was closed")
            following = self._waiting[0]
            self._decoded[following] = self._decode_to(following)
            self._waiting.popleft()
        if not self._waiting:
            self._close_container()
        return self._decoded.pop(number)

    def _decode_to(self, number: int) -> av.VideoFrame:
        """Decode on to the frame that is shown at the time of this one."""
        if self._container is None:
            self._start(self._times[number])
        wanted = self._times[number]
        while (frame := self._next_frame()) is not None:
            self._shown_s = shown = self._time_of(frame)
            if shown >= wanted - self._tolerance_s:
                break
        else:
            end = f"ends at {self._shown_s:.3f} s" if math.isfinite(self._shown_s) else "holds none that can be decoded"
            raise InputError(f"{self.name(number)}: there is no such frame, the video {end}")
        if self._clock is not None and len(self._waiting) == 1:
            self._clock.check_end(self._frames)
        if shown > wanted + self._tolerance_s:
            raise InputError(f"{self.name(number)}: there is no frame within {self._tolerance_s:.3g} s of it")
        return frame

    def _next_frame(self) -> av.VideoFrame | None:
        frame, self._ahead = self._ahead or next(self._frames, None), None
        FENCE.getting_on()
        return frame

    def _time_of(self, frame: av.VideoFrame) -> float:
        if self._clock is not None:
            return self._clock(frame)
        return self._shown_s if frame.time is None else frame.time

    def _start(self, first_s: float) -> None:
        """Open the file and go to where decoding leads to the frame at `first_s`, at last to the start of the file."""
        self._open()
        if self._clock is None and first_s > SEEK_BEYOND_S and not self._seek(first_s):
            self._close_container()
            self._open()

    def _open(self) -> None:
        self._container, self._stream = open_video(self._path, self._name)
        _set_up_decoder(self._stream, self._name)
        self._pixel_aspect = _pixel_aspect(self._stream)
        self._frames = self._container.decode(self._stream)
        if self._stream.container.format.name == AVI:
            self._clock = OrderClock(video_times(self._path), self._name)

    def _seek(self, first_s: float) -> bool:
        """Go to a key frame that is shown no later than `first_s`. Those that follow a key frame in the file can be
        shown before it, and need frames before it (B-frames, open GOPs): then one further back will do. False where
        none does, or the file cannot be sought in."""
        for back_s in SEEK_BACK_S:
            if back_s >= first_s:
                return False
            try:
                self._container.seek(round((first_s - back_s) / self._stream.time_base), stream=self._stream)
                self._frames = self._container.decode(self._stream)
                self._ahead = next(self._frames, None)
            except open_library("av").FFmpegError:  # an AVI file without an index, for one
                self._ahead = None
                return False
            if self._ahead is not None and (self._ahead.time or 0.0) <= first_s + self._tolerance_s:
                return True
        return False

    def close(self) -> None:
        """Nothing more is read: the file is closed, what was decoded is dropped."""
        with self._lock:
            self._waiting.clear()
            self._decoded.clear()
            self._close_container()

    def _close_container(self) -> None:
        self._ahead = None
        if self._container is not None:
            self._frames.close()
            self._container.close()
            self._container = None


_VIDEO_DECODERS = threading.BoundedSemaphore(available_cores())


def _rgb(frame: av.VideoFrame, pixel_aspect: Fraction, where: str) -> np.ndarray:
    """(h, w, 3) uint8, as a player shows it: with square pixels, then turned and mirrored as the video says."""
    width, height = _shown_size(frame.width, frame.height, pixel_aspect)
    if width * height > MAX_FRAME_PIXELS:
        raise InputError(
            f"{where}: its pixels of {pixel_aspect.numerator}:{pixel_aspect.denominator} make {width}x{height} px of "
            f"{frame.width}x{frame.height} px; more than {MAX_FRAME_PIXELS} pixels are refused"
        )
    if (width, height) != (frame.width, frame.height):
        size = {"width": width, "height": height, "interpolation": "BICUBIC"}
        image = frame.to_ndarray(format="rgb24", threads=1, **size)
    else:
        image = frame.to_ndarray(format="rgb24", threads=1)  # others would stay until the frame is collected
    return _turned(image, _display_matrix(frame))


def _shown_size(width: int, height: int, pixel_aspect: Fraction) -> tuple[int, int]:
    """Width and height with square pixels [px]: never fewer than there are, so that nothing is lost."""
    if pixel_aspect > 1:
        return round(width * pixel_aspect), height
    return width, round(height / pixel_aspect)


def _pixel_aspect(stream: av.VideoStream) -> Fraction:
    """Width to height of a pixel; 1 where the video does not say."""
    return stream.sample_aspect_ratio or Fraction(1)


def _display_matrix(frame: av.VideoFrame) -> np.ndarray:
    """(2, 2): a pixel (x, y) is shown at (x, y) @ matrix, up to a scale and where the corner comes to lie."""
    data = frame.side_data.get("DISPLAYMATRIX")
    if data is None:
        return np.eye(2)
    return np.frombuffer(bytes(data), "=i4").reshape(3, 3)[:2, :2].astype(np.float64)


def _turned(image: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """The image as the matrix shows it, to the nearest quarter turn."""
    (a, b), (c, d) = matrix
    if abs(b) + abs(c) > abs(a) + abs(d):  # what was along x is along y
        image, a, d = image.transpose(1, 0, 2), c, b
    rows, columns = slice(None, None, -1 if d < 0 else 1), slice(None, None, -1 if a < 0 else 1)
    return np.ascontiguousarray(image[rows, columns])
