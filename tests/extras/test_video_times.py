"""When the frames of a video are shown, and so which pose is theirs; every row of a chunk holds its own frame's."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from formats_support import FPS, cache, chunks, write_csv, write_mp4, write_videos

import dino_cache
from dino_cache import InputError
from dino_cache_extras.commands.rebuild import rebuild
from dino_cache_extras.formats import video_frames
from support import SIZE, BitEncoder, Outcome, Rendered, read_progress

H264 = {"crf": "16", "preset": "ultrafast", "x264-params": "b-adapt=0"}
CLOSED, B_FRAMES = {**H264, "bf": "0"}, {**H264, "bf": "2"}
PYRAMID = {"crf": "16", "bf": "7", "x264-params": "b-adapt=0:b-pyramid=normal"}
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
NO_EDIT_LIST = {"use_editlist": "0"}
OPEN_GOP = "open-gop=1:keyint=12:min-keyint=12:bframes=3:b-adapt=0:scenecut=0"
X265 = {"crf": "16", "preset": "fast", "x265-params": f"{OPEN_GOP}:log-level=none"}
needs_x265 = pytest.mark.skipif("libx265" not in av.codecs_available, reason="PyAV has no x265 here")


def write_video(
    path: Path,
    frames: list[np.ndarray],
    codec: str = "libx264",
    options: dict[str, str] = CLOSED,
    container: dict[str, str] | None = None,
    first_s: float = 0.0,
    times: list[float] | None = None,
) -> None:
    """`first_s`: the first frame's time; `times`: all frames', 1 / FPS apart unless given."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = times or [number / FPS for number in range(len(frames))]
    with av.open(path, "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *SIZE, "yuv420p", 12
        unit = Fraction(1, FPS if path.suffix == ".avi" else 1000)
        stream.time_base = stream.codec_context.time_base = unit
        for image, time in zip(frames, times):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = round((first_s + time) / unit), unit
            file.mux(stream.encode(frame))
        file.mux(stream.encode())


def cut(path: Path, target: Path, first: int) -> None:
    """The packets of a video from the `first` on, in the order of the file, with their times."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path) as file, av.open(target, "w") as copy:
        stream = copy.add_stream_from_template(file.streams.video[0], opaque=True)
        for packet in itertools.islice(file.demux(video=0), first, None):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)


def write_poses(path: Path, times: list[float]) -> None:
    """x is the row times 0.25."""
    rows = ["timestamp,x,y,yaw", *(f"{time!r},{row * 0.25},0,0" for row, time in enumerate(times))]
    path.write_text("\n".join(rows) + "\n")


def rows_of(cache_dir: Path, name: str) -> list[tuple[int, int, float]]:
    """(frame_index, number that the frame shows, pose row at its position) of a trajectory's frames."""
    rows = {}
    for _, datasets in chunks(cache_dir, name):
        shown = datasets["cls_token"].astype(int)
        for index, token, position in zip(datasets["frame_index"], shown, datasets["position"]):
            rows[int(index)] = (int(index), int(token[1]) * 256 + int(token[2]), round(float(position[0]) / 0.25, 6))
    return list(rows.values())


# ---------------------------------------------------------------------------------------------------------------------
# The zero of a pose table
# ---------------------------------------------------------------------------------------------------------------------

STARTS = {  # case -> (suffix, codec, options, container's options, time of the first frame [s])
    "mp4": (".mp4", "libx264", B_FRAMES, None, 0.0),
    "mkv": (".mkv", "libx264", B_FRAMES, None, 0.0),
    "webm": (".webm", "libvpx", {"b": "1M"}, None, 0.0),
    "late mkv": (".mkv", "libx264", B_FRAMES, None, 1.4),
    "copied timestamps": (".mkv", "libx264", CLOSED, None, 3600.0),
    "edit list": (".mp4", "libx264", B_FRAMES, None, 1.4),
    "no edit list": (".mp4", "libx264", B_FRAMES, NO_EDIT_LIST, 0.0),
    "fragmented": (".mp4", "libx264", B_FRAMES, FRAGMENTED, 0.0),
    "h264 in avi": (".avi", "libx264", CLOSED, None, 0.0),
    "h264 with B-frames in avi": (".avi", "libx264", B_FRAMES, None, 0.0),
    "h264 with a pyramid in avi": (".avi", "libx264", PYRAMID, None, 0.0),
    "mpeg4 with B-frames in avi": (".avi", "mpeg4", {"bf": "2", "q:v": "2"}, None, 0.0),
}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("case", STARTS)
def test_every_frame_lies_beside_its_own_pose_wherever_the_container_starts(
    tmp_path: Path, case: str, stride: int
) -> None:
    suffix, codec, options, container, first_s = STARTS[case]
    write_video(tmp_path / f"data/t1{suffix}", Rendered(1, 40).frames, codec, options, container, first_s)
    write_csv(tmp_path / "data/t1.csv", Rendered(1, 40))
    results = cache(tmp_path / "data", tmp_path / "cache", "video and csv", frame_stride=stride)
    assert results["t1"].error is None
    assert rows_of(tmp_path / "cache", "t1") == [(number, number, number) for number in range(0, 40, stride)]


def test_with_time_zero_container_pose_times_are_those_of_the_file(tmp_path: Path) -> None:
    write_video(tmp_path / "data/t1.mkv", Rendered(1, 30).frames, first_s=1.4)
    write_csv(tmp_path / "data/t1.csv", Rendered(1, 30))
    results = cache(tmp_path / "data", tmp_path / "cache", "video and csv", time_zero="container")
    assert results["t1"].error is None
    assert rows_of(tmp_path / "cache", "t1") == [(number, number, number + 14) for number in range(16)]


def test_frames_of_uneven_times_get_the_poses_of_their_times(tmp_path: Path) -> None:
    times = np.cumsum([0.0, *(0.05 + 0.1 * (number % 3) for number in range(29))]).round(3).tolist()
    write_video(tmp_path / "data/t1.mkv", Rendered(1, 30).frames, first_s=0.7, times=times)
    write_poses(tmp_path / "data/t1.csv", times)
    results = cache(tmp_path / "data", tmp_path / "cache", "video and csv")
    assert results["t1"].error is None
    assert rows_of(tmp_path / "cache", "t1") == [(number, number, number) for number in range(30)]


def test_a_line_names_the_videos_that_start_later_by_more_than_half_a_frame(
    tmp_path: Path, run_bits: Callable[..., Outcome]
) -> None:
    for name, first_s in (("at_0", 0.0), ("below", 0.049), ("above", 0.051), ("late", 2.0)):
        write_video(tmp_path / f"data/{name}.mkv", Rendered(1, 12).frames, first_s=first_s)
        write_csv(tmp_path / f"data/{name}.csv", Rendered(1, 12))
    for arguments in (("--dry-run",), ()):
        outcome = run_bits(None, *arguments)
        assert outcome.code == 0
        (line,) = (line for line in (outcome.out + outcome.err).splitlines() if "on their own clock" in line)
        assert line.strip().startswith("2 videos have their first frame elsewhere than at 0 s")
        assert line.endswith("(time_zero: first_frame): above (0.051 s), late (2.000 s)")


def test_poses_on_the_containers_clock_are_refused_with_the_setting_that_reads_them(tmp_path: Path) -> None:
    write_video(tmp_path / "data/t1.mkv", Rendered(1, 20).frames, first_s=3600.0)
    write_poses(tmp_path / "data/t1.csv", [3600.0 + number / FPS for number in range(20)])
    results = cache(tmp_path / "data", tmp_path / "refused", "video and csv")
    assert "with time_zero: container 20 of them do" in str(results["t1"].error)
    results = cache(tmp_path / "data", tmp_path / "cache", "video and csv", time_zero="container")
    assert results["t1"].error is None
    assert rows_of(tmp_path / "cache", "t1") == [(number, number, number) for number in range(20)]


@needs_x265
@pytest.mark.parametrize("first", [24, 30])
def test_the_first_frame_is_the_first_that_can_be_decoded_where_a_video_was_cut_out(tmp_path: Path, first: int) -> None:
    write_video(tmp_path / "whole.mkv", Rendered(1, 60).frames, "libx265", X265)
    cut(tmp_path / "whole.mkv", tmp_path / "data/t1.mkv", first)
    with av.open(tmp_path / "data/t1.mkv") as file:
        shown = [read_number(frame.to_ndarray(format="rgb24")) for frame in file.decode(video=0)]
        assert shown == list(range(shown[0], 60))
        assert shown[0] >= first  # frames whose packets come later in the file are not shown
    write_csv(tmp_path / "data/t1.csv", Rendered(1, len(shown) + 5))
    results = cache(tmp_path / "data", tmp_path / "cache", "video and csv")
    assert results["t1"].error is None
    assert rows_of(tmp_path / "cache", "t1") == [(row, number, row) for row, number in enumerate(shown)]


def read_number(image: np.ndarray) -> int:
    """What a rendered frame shows."""
    (stamp, high, low) = BitEncoder().stamps(torch.from_numpy(image).permute(2, 0, 1)[None])[0].tolist()
    assert stamp == 1
    return high * 256 + low


def test_a_vp8_packet_that_shows_nothing_is_no_frame() -> None:
    """The first byte of a VP8 frame (RFC 6386, 9.1): bit 0 is 0 in a key frame, bit 4 is show_frame."""
    assert video_frames._is_hidden_vp8(b"\x01\x00")
    assert not video_frames._is_hidden_vp8(b"\x11\x00")
    assert not video_frames._is_hidden_vp8(b"\x10\x00")


def stub_clock(stamps: list[int]) -> video_frames.OrderClock:
    times = video_frames.VideoTimes(np.arange(len(stamps)) / FPS, sorted(stamps), 0.0)
    return video_frames.OrderClock(times, "t")


def stub_frames(stamps: list[int]) -> Iterator[Any]:
    return (SimpleNamespace(pts=stamp) for stamp in stamps)


def test_frames_that_are_counted_have_the_times_of_their_places() -> None:
    order = [1, 3, 4, 2, 5, 7, 8, 6, 9]  # as H.264 with two B-frames comes out of an AVI file
    clock, frames = stub_clock(order), stub_frames(order)
    assert [clock(frame) for frame in frames] == [number / FPS for number in range(9)]
    clock.check_end(frames)


@pytest.mark.parametrize("left_out", [0, 5, 40, 59])
@pytest.mark.parametrize("last", [10, 41, 58])
def test_a_frame_that_the_decoder_leaves_out_is_noticed_before_another_takes_its_time(left_out: int, last: int) -> None:
    clock = stub_clock(list(range(60)))
    frames = stub_frames([stamp for stamp in range(60) if stamp != left_out])
    read = itertools.islice(frames, last + 1)
    if left_out > last + clock.MOST_PLACES:
        assert [clock(frame) for frame in read] == [number / FPS for number in range(last + 1)]
        clock.check_end(frames)
        return
    with pytest.raises(InputError, match="encode it anew"):
        for frame in read:
            clock(frame)
        clock.check_end(frames)


def test_a_frame_too_many_is_noticed() -> None:
    clock = stub_clock([0, 1, 2])
    with pytest.raises(InputError, match="encode it anew"):
        for frame in stub_frames([0, 1, 1]):
            clock(frame)


# ---------------------------------------------------------------------------------------------------------------------
# Seeks
# ---------------------------------------------------------------------------------------------------------------------


SOUGHT = {
    "open gop, mp4": (".mp4", "libx265", X265, None),
    "open gop, mkv": (".mkv", "libx265", X265, None),
    "h264, open gop": (".mp4", "libx264", {"crf": "16", "x264-params": OPEN_GOP}, NO_EDIT_LIST),
    "fragmented": (".mp4", "libx264", B_FRAMES, FRAGMENTED),
    "avi": (".avi", "libx264", B_FRAMES, None),
    "webm": (".webm", "libvpx-vp9", {"b": "1M", "cpu-used": "8", "deadline": "realtime"}, None),
}


@needs_x265
@pytest.mark.parametrize("case", SOUGHT)
def test_whichever_frame_is_the_first_wanted_it_is_found(tmp_path: Path, case: str) -> None:
    suffix, codec, options, container = SOUGHT[case]
    path = tmp_path / f"t{suffix}"
    write_video(path, Rendered(1, 60).frames, codec, options, container)
    times = video_frames.frame_times(path)
    for first in range(20, 58):
        numbers = [first, first + 1]
        frames = video_frames.VideoFrames(path, "t", numbers, times[numbers].tolist(), 0.025)
        assert [read_number(image) for image in frames.read(numbers)] == numbers


class Container:
    """Stands for a container, and counts the frames that it decodes."""

    frames = 0

    def __init__(self, container: Any):
        self._container = container

    def __getattr__(self, name: str) -> Any:
        return getattr(self._container, name)

    def decode(self, stream: Any) -> Iterator[Any]:
        for frame in self._container.decode(stream):
            Container.frames += 1
            yield frame


class Unseekable(Container):
    """In which FFmpeg refuses to seek, as in a file without an index."""

    def seek(self, *arguments: Any, **how: Any) -> None:
        raise av.error.PermissionError(1, "Operation not permitted")


def stand_for_containers(monkeypatch: pytest.MonkeyPatch, container_type: type[Container]) -> None:
    real = video_frames.open_video

    def open_video(path: Path, where: str) -> tuple[Any, Any]:
        container, stream = real(path, where)
        return container_type(container), stream

    monkeypatch.setattr(video_frames, "open_video", open_video)
    monkeypatch.setattr(Container, "frames", 0)


def test_where_a_seek_lands_too_late_it_goes_back_by_a_key_frame_and_not_to_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.mp4"
    write_video(path, Rendered(1, 300).frames, options=B_FRAMES, container=FRAGMENTED)
    times = video_frames.frame_times(path)
    stand_for_containers(monkeypatch, Container)
    frames = video_frames.VideoFrames(path, "t", [286, 287], times[[286, 287]].tolist(), 0.025)
    assert [read_number(image) for image in frames.read([286, 287])] == [286, 287]
    assert Container.frames <= 1 + 12 + 2  # key frame 288, found too late; then from key frame 276 on


def test_a_video_that_cannot_be_sought_in_is_decoded_from_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_mp4(tmp_path / "t.mp4", Rendered(1, 60).frames)
    stand_for_containers(monkeypatch, Unseekable)
    frames = video_frames.VideoFrames(tmp_path / "t.mp4", "t", [40, 41], [4.0, 4.1], 0.025)
    assert [read_number(image) for image in frames.read([40, 41])] == [40, 41]
    frames.close()


# ---------------------------------------------------------------------------------------------------------------------
# One broken video fails alone, and each is opened as often as it must be
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_title_that_is_not_utf8_does_not_matter(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data/t1{suffix}"
    path.parent.mkdir()
    write_video(tmp_path / f"plain{suffix}", Rendered(1, 20).frames)
    with av.open(tmp_path / f"plain{suffix}") as file, av.open(path, "w") as copy:
        copy.metadata["title"] = "Cafe_Zurich"
        stream = copy.add_stream_from_template(file.streams.video[0], opaque=True)
        for packet in file.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                copy.mux(packet)
    data = path.read_bytes()
    assert b"Cafe_Zurich" in data
    path.write_bytes(data.replace(b"Cafe_Zurich", b"Caf\xe9_Zurich"))
    write_csv(tmp_path / "data/t1.csv", Rendered(1, 20))
    results = cache(tmp_path / "data", tmp_path / "cache", "video and csv")
    assert results["t1"].error is None
    assert rows_of(tmp_path / "cache", "t1") == [(number, number, number) for number in range(20)]


def test_a_video_of_an_unknown_codec_fails_alone(tmp_path: Path, run_bits: Callable[..., Outcome]) -> None:
    write_videos(tmp_path / "data", [Rendered(1, 20), Rendered(2, 20)])
    data = (tmp_path / "data/t2.mp4").read_bytes()
    at = data.rindex(b"avc1")
    (tmp_path / "data/t2.mp4").write_bytes(data[:at] + b"zzzz" + data[at + 4 :])
    outcome = run_bits()
    assert outcome.code == 1
    assert "t2.mp4: cannot read the video: no decoder for its codec here" in outcome.err
    assert read_progress(tmp_path / "cache")["completed_trajectories"] == ["t1"]


class Raises:
    """Stands for a container that raises at one of its calls."""

    def __init__(self, container: Any, call: str, error: BaseException):
        self._container, self._call, self._error = container, call, error

    def __getattr__(self, name: str) -> Any:
        if name == self._call:
            raise self._error
        return getattr(self._container, name)

    def __enter__(self) -> Raises:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()


@pytest.mark.parametrize("call", ["streams", "demux", "decode"])
@pytest.mark.parametrize(
    "error", [AttributeError("x"), UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "x"), OverflowError("x"), KeyError("x")]
)
def test_whatever_a_video_raises_is_that_trajectorys_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, error: Exception
) -> None:
    write_videos(tmp_path / "data", [Rendered(1, 20), Rendered(2, 20)])
    real = av.open
    monkeypatch.setattr(
        av, "open", lambda path, **how: Raises(real(path, **how), call, error) if "t1" in path else real(path, **how)
    )
    results = cache(tmp_path / "data", tmp_path / "cache", "video and tum")
    assert isinstance(results["t1"].error, InputError)
    assert type(error).__name__ in str(results["t1"].error)
    assert results["t2"].error is None


def test_running_out_of_memory_is_not_taken_for_a_videos_fault() -> None:
    with pytest.raises(MemoryError), video_frames.video_errors("t"):
        raise MemoryError
    with pytest.raises(dino_cache.StorageError), video_frames.video_errors("t"):
        raise dino_cache.StorageError("x")


def test_a_run_opens_each_video_once_to_plan_and_once_to_decode(
    tmp_path: Path, run_bits: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_videos(tmp_path / "data", [Rendered(1, 4)])
    for number in range(70):
        for suffix in (".mp4", ".txt"):
            shutil.copy(tmp_path / f"data/t1{suffix}", tmp_path / f"data/copy{number}{suffix}")
    opened, real = [], av.open
    monkeypatch.setattr(av, "open", lambda path, **how: opened.append(path) or real(path, **how))
    assert run_bits().code == 0
    assert len(opened) == 2 * 71


# ---------------------------------------------------------------------------------------------------------------------
# Caches made before
# ---------------------------------------------------------------------------------------------------------------------


def make_as_before(cache_dir: Path) -> None:
    """Take what a record says beyond 0.2.0 out of it; its trajectories were made with time_zero: container."""
    record = read_progress(cache_dir)
    for spec in (record["processing_config"], *record["specs"].values()):
        spec.pop("time_zero", None)
    for entry in record["trajectory_records"].values():
        assert entry.pop("pairing") == 2
    (cache_dir / "progress.json").write_text(json.dumps(record))


def test_of_a_cache_made_before_those_with_other_poses_are_redone_and_the_rest_has_nothing_to_do(
    tmp_path: Path, run_bits: Callable[..., Outcome]
) -> None:
    for name, suffix, first_s in (("plain", ".mp4", 0.0), ("late", ".mkv", 1.4), ("whole", ".webm", 0.0)):
        codec, options = ("libvpx", {"b": "1M"}) if suffix == ".webm" else ("libx264", B_FRAMES)
        write_video(tmp_path / f"data/{name}{suffix}", Rendered(1, 40).frames, codec, options, None, first_s)
        write_csv(tmp_path / f"data/{name}.csv", Rendered(1, 40))
    assert run_bits({"time_zero": "container"}).code == 0
    assert rows_of(tmp_path / "cache", "late")[0] == (0, 0, 14)  # as 0.2.0 stored it
    make_as_before(tmp_path / "cache")
    kept = {path: path.stat().st_ino for name in ("plain", "whole") for path in (tmp_path / "cache" / name).iterdir()}

    outcome = run_bits()
    assert outcome.code == 0
    redone = [line for line in outcome.err.splitlines() if "Redoing" in line]
    assert redone == [
        "Redoing late: its frames were given poses of 1.400 s later: pose times were counted on the clock of late.mkv, "
        "on which its first frame is at 1.400 s"
    ]
    assert {path: path.stat().st_ino for path in kept} == kept
    for name in ("plain", "late", "whole"):
        assert rows_of(tmp_path / "cache", name) == [(number, number, number) for number in range(40)]

    record = (tmp_path / "cache/progress.json").read_bytes()
    outcome = run_bits()
    assert outcome.code == 0
    assert "Redoing" not in outcome.err
    assert (tmp_path / "cache/progress.json").read_bytes() == record


def test_a_video_is_looked_at_once_and_not_each_night(
    tmp_path: Path, run_bits: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_videos(tmp_path / "data", [Rendered(1, 20)])
    assert run_bits().code == 0
    make_as_before(tmp_path / "cache")
    opened, real = [], av.open
    monkeypatch.setattr(av, "open", lambda path, **how: opened.append(path) or real(path, **how))
    video_frames.video_times._values.clear()
    assert run_bits().code == 0
    assert len(opened) == 2  # when its frames are shown, and how
    video_frames.video_times._values.clear()
    assert run_bits().code == 0
    assert len(opened) == 2


def test_a_video_that_cannot_be_looked_at_stays_as_it_is(tmp_path: Path, run_bits: Callable[..., Outcome]) -> None:
    write_videos(tmp_path / "data", [Rendered(1, 20)])
    assert run_bits().code == 0
    make_as_before(tmp_path / "cache")
    before = chunks(tmp_path / "cache", "t1")
    size = (tmp_path / "data/t1.mp4").stat().st_size
    (tmp_path / "data/t1.mp4").write_bytes(b"\0" * size)  # which its checksum, of the kind stat, does not show
    outcome = run_bits()
    assert outcome.code == 1
    assert "Completed t1: cannot be looked at, stays as it is" in outcome.err
    assert len(chunks(tmp_path / "cache", "t1")) == len(before)
    assert read_progress(tmp_path / "cache")["completed_trajectories"] == ["t1"]


def test_a_rebuilt_record_knows_by_which_rule_its_trajectories_were_made(
    tmp_path: Path, run_bits: Callable[..., Outcome]
) -> None:
    write_video(tmp_path / "data/t1.mkv", Rendered(1, 20).frames, first_s=1.4)
    write_csv(tmp_path / "data/t1.csv", Rendered(1, 20))
    assert run_bits().code == 0
    (tmp_path / "cache/progress.json").unlink()
    assert rebuild(tmp_path / "cache", yes=True) == 0
    assert read_progress(tmp_path / "cache")["trajectory_records"]["t1"]["pairing"] == 2
    outcome = run_bits()
    assert outcome.code == 0
    assert "Redoing" not in outcome.err
