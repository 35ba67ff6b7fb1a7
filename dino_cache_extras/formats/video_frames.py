"""Frames of a video, found by their times, decoded once and in order."""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dino_cache import LOST_MOUNT_ERRNOS, MAX_FRAME_PIXELS, PROFILE, InputError, open_regular, recordable_name
from dino_cache_extras.formats.common import FileCache
from progress_utils import available_cores, open_library

if TYPE_CHECKING:
    import av


VIDEO_CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi"  # FFmpeg's names of the containers that are opened
VIDEO_THREADS = 4  # threads of one video's decoder, at most
VIDEO_TOLERANCE = 0.25  # a frame's time may differ from its pose's by this part of the time between two frames
SEEK_BEYOND_S = 2.0  # a first frame later than this is sought; before it, decoding from the start is as quick


@contextlib.contextmanager
def video_errors(where: str) -> Iterator[None]:
    """FFmpeg's errors as those of a trajectory, or of the mount."""
    av = open_library("av")
    try:
        yield
    except av.FFmpegError as error:
        if error.errno in LOST_MOUNT_ERRNOS:
            raise OSError(error.errno, f"{where}: {error.strerror}") from error
        raise InputError(f"{where}: cannot read the video: {error.strerror}") from error


def open_video(path: Path, where: str) -> tuple[av.container.InputContainer, av.VideoStream]:
    """A video file and its first video stream. What the file refers to (playlists, other files) is not opened.

    Raises:
        InputError, OSError: it is no video, or cannot be read.
    """
    os.close(open_regular(path))
    options = {"protocol_whitelist": "file", "format_whitelist": VIDEO_CONTAINERS}
    with video_errors(where):
        container = open_library("av").open(os.fspath(path), options=options)
    if not container.streams.video:
        container.close()
        raise InputError(f"{where}: has no video stream")
    return container, container.streams.video[0]


def packets(path: Path, where: str) -> Iterator[tuple[av.Packet, Fraction]]:
    """Packets of shown frames, in the order of the file, undecoded; and the unit of their times [s]."""
    container, stream = open_video(path, where)
    with video_errors(where), container:
        for packet in container.demux(stream):
            if packet.size and packet.pts is not None and not packet.is_discard:
                yield packet, stream.time_base


def _read_frame_times(path: Path) -> np.ndarray:
    times = sorted(float(packet.pts * time_base) for packet, time_base in packets(path, recordable_name(path.name)))
    return np.array(times)


def _read_packet_index(path: Path) -> tuple[np.ndarray, np.ndarray]:
    container, stream = open_video(path, recordable_name(path.name))
    with container:
        entries = [(entry.timestamp, entry.size) for entry in stream.index_entries]
        times = np.array([(time - entries[0][0]) * float(stream.time_base) for time, _ in entries])
        return times, np.array([size for _, size in entries], dtype=np.int64)


frame_times = FileCache(_read_frame_times, 64)  # (n,) [s] of a video's frames, ascending, without decoding them
packet_index = FileCache(_read_packet_index, 8)  # (n,) times [s] from 0 in the order of decoding, and (n,) sizes


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
        self._shown_s = 0.0  # of the last frame decoded
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
                image = _rgb(frames.popleft())
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
            self._open(self._times[number])
        wanted = self._times[number]
        for frame in self._stream:
            self._shown_s = shown = -math.inf if frame.time is None else frame.time
            if shown >= wanted - self._tolerance_s:
                break
        else:
            raise InputError(f"{self.name(number)}: there is no such frame, the video ends at {self._shown_s:.3f} s")
        if shown > wanted + self._tolerance_s:
            raise InputError(f"{self.name(number)}: there is no frame within {self._tolerance_s:.3g} s of it")
        return frame

    def _open(self, first_s: float) -> None:
        self._container, stream = open_video(self._path, self._name)
        stream.thread_type = "AUTO"
        stream.codec_context.thread_count = min(VIDEO_THREADS, available_cores())
        stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}  # more are refused undecoded
        if first_s > SEEK_BEYOND_S:
            self._container.seek(round(first_s / stream.time_base), stream=stream)
        self._stream = self._container.decode(stream)

    def close(self) -> None:
        """Nothing more is read: the file is closed, what was decoded is dropped."""
        with self._lock:
            self._waiting.clear()
            self._decoded.clear()
            self._close_container()

    def _close_container(self) -> None:
        if self._container is not None:
            self._stream.close()
            self._container.close()
            self._container = None


_VIDEO_DECODERS = threading.BoundedSemaphore(available_cores())


def _rgb(frame: av.VideoFrame) -> np.ndarray:
    """(h, w, 3) uint8, turned as the video says."""
    image = frame.to_ndarray(format="rgb24")
    quarter_turns = round(frame.rotation / 90) % 4
    return np.ascontiguousarray(np.rot90(image, quarter_turns)) if quarter_turns else image
