"""Videos in segments: a local .m3u8 playlist whose .ts files are read one behind the other.

FFmpeg would open what a playlist names, wherever that is. Here it is given the segments' bytes and opens nothing.
"""

from __future__ import annotations

import io
import os
from bisect import bisect_right
from itertools import accumulate
from pathlib import Path, PurePosixPath

from dino_cache import InputError, open_regular, read_file, recordable_name

PLAYLIST_SUFFIX = ".m3u8"
SEGMENT_SUFFIX = ".ts"
MAX_PLAYLIST_BYTES = 1 << 24
REFUSED_TAGS = {  # of a playlist -> why its segments are not one video here
    "#EXT-X-STREAM-INF": "it is a playlist of playlists",
    "#EXT-X-I-FRAME-STREAM-INF": "it is a playlist of playlists",
    "#EXT-X-MEDIA:": "it is a playlist of playlists",
    "#EXT-X-MAP": "its segments are parts of MP4 files",
    "#EXT-X-BYTERANGE": "its segments are parts of files",
    "#EXT-X-DISCONTINUITY": "its clock starts anew between segments (EXT-X-DISCONTINUITY)",
    "#EXT-X-GAP": "segments are missing (EXT-X-GAP)",
}


def is_playlist(path: Path) -> bool:
    return path.suffix.lower() == PLAYLIST_SUFFIX


def segments_of(path: Path) -> list[Path]:
    """The files of a playlist, in order: .ts files in its folder or below.

    Raises:
        InputError: it is no such playlist, or names something else: an address, a path that leads out of its folder.
        OSError: it cannot be read.
    """
    where = recordable_name(os.fspath(path))
    if os.stat(path).st_size > MAX_PLAYLIST_BYTES:
        raise InputError(f"{where}: is too large for a playlist")
    try:
        lines = [line.strip() for line in read_file(path).tobytes().decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not a playlist: {error}") from error
    if not lines or lines[0] != "#EXTM3U":
        raise InputError(f"{where}: not a playlist: it does not begin with #EXTM3U")
    segments = []
    for line in lines:
        refused = next((why for tag, why in REFUSED_TAGS.items() if line.startswith(tag)), None)
        if refused is None and line.startswith("#EXT-X-KEY") and "METHOD=NONE" not in line:
            refused = "its segments are encrypted"
        if refused is not None:
            raise InputError(f"{where}: {refused}; make one file of it: ffmpeg -i {path.name} -c copy video.mp4")
        if line and not line.startswith("#"):
            segments.append(_segment(path.parent, line, where))
    if not segments:
        raise InputError(f"{where}: names no segments")
    return segments


def _segment(folder: Path, name: str, where: str) -> Path:
    parts = PurePosixPath(name)
    leads_out = parts.is_absolute() or ".." in parts.parts or ":" in name or "\\" in name or "\0" in name
    if leads_out or parts.suffix.lower() != SEGMENT_SUFFIX:
        raise InputError(f"{where}: names {name[:200]!r}; only {SEGMENT_SUFFIX} files in its folder or below are read")
    return folder / name


class Segments(io.RawIOBase):
    """Files one behind the other, for reading; one of them is open at a time."""

    def __init__(self, paths: list[Path]):
        super().__init__()
        self._paths, self._place, self._index, self._file = paths, 0, -1, None
        self._stops = list(accumulate(os.stat(path).st_size for path in paths))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        begin = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._stops[-1]}[whence]
        self._place = max(0, begin + offset)
        return self._place

    def read(self, size: int = -1) -> bytes:
        """At most so many bytes, none at the end. Raises OSError, InputError."""
        left = self._stops[-1] - self._place if size < 0 else size
        parts = []
        while left > 0 and self._place < self._stops[-1]:
            index = bisect_right(self._stops, self._place)
            file, begin = self._open(index), self._stops[index - 1] if index else 0
            file.seek(self._place - begin)
            part = file.read(min(left, self._stops[index] - self._place))
            if not part:
                raise InputError(f"{recordable_name(os.fspath(self._paths[index]))}: became shorter while it was read")
            parts.append(part)
            self._place, left = self._place + len(part), left - len(part)
        return b"".join(parts)

    def _open(self, index: int) -> io.FileIO:
        if index != self._index:
            self._close_file()
            self._file, self._index = io.FileIO(open_regular(self._paths[index])), index
        return self._file

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file, self._index = None, -1

    def close(self) -> None:
        self._close_file()
        super().close()
