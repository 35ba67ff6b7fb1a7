"""Videos in segments, and tables of poses and of frames' times that lie apart from their videos."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
from formats_support import FPS, chunks, write_csv, write_mp4, write_tum

from dino_cache import CacheSpec, DataKeys, InputError, format_named, open_source
from dino_cache_extras.formats.playlists import Segments, segments_of
from support import FIRST, SECOND, SIZE, Outcome, Rendered, check_stamps, read_progress

EPOCH_S = 1_700_000_000.0


def write_playlist(path: Path, trajectory: Rendered) -> None:
    """As FFmpeg's own segmenter writes it: segments of 1.2 s beside a playlist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", format="hls", options={"hls_time": "1", "hls_list_size": "0"}) as container:
        options = {"crf": "16", "preset": "ultrafast", "bf": "2", "x264-params": "b-adapt=0"}
        stream = container.add_stream("libx264", rate=FPS, options=options)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *SIZE, "yuv420p", 12
        for number, image in enumerate(trajectory.frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def reason(cache: Path) -> str:
    (failure,) = read_progress(cache)["failures"].values()
    return failure["reason"]


@pytest.mark.parametrize("frame_stride", [1, 3])
def test_a_playlist_is_one_video(run_bits: Callable[..., Outcome], tmp_path: Path, frame_stride: int) -> None:
    write_playlist(tmp_path / "data/ride_1/recordings/front.m3u8", FIRST)
    assert len(list((tmp_path / "data/ride_1/recordings").glob("*.ts"))) > 2
    write_csv(tmp_path / "data/ride_1/recordings/front.csv", FIRST)
    outcome = run_bits(frame_stride=frame_stride)
    assert outcome.code == 0, outcome.err
    assert "format video (ride_1/recordings/front.m3u8 and front.csv)" in outcome.out
    assert check_stamps(tmp_path / "cache", "ride_1/recordings/front", 1, frame_stride) > FIRST.count / frame_stride


def test_a_late_frame_of_a_playlist_is_sought(tmp_path: Path) -> None:
    write_playlist(tmp_path / "front.m3u8", Rendered(1, 90))
    write_mp4(tmp_path / "whole.mp4", Rendered(1, 90).frames)
    video, pictures = format_named("video"), []
    for name in ("front", "whole"):
        source = open_source(video.locate(tmp_path, name), DataKeys())
        (picture,) = source.open_frames([77]).read([77])
        pictures.append(picture.astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() < 60  # each block is 20 or 235


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("#EXTM3U\n/etc/passwd\n", "names '/etc/passwd'"),
        ("#EXTM3U\n../secret.ts\n", "names '../secret.ts'"),
        ("#EXTM3U\nfile:///etc/x.ts\n", "only .ts files in its folder"),
        ("#EXTM3U\nhttp://example.com/x.ts\n", "only .ts files in its folder"),
        ("#EXTM3U\nconcat:a.ts|b.ts\n", "only .ts files"),
        ("#EXTM3U\nother.m3u8\n", "only .ts files"),
        ('#EXTM3U\n#EXT-X-MAP:URI="/etc/passwd"\na.ts\n', "parts of MP4"),
        ('#EXTM3U\n#EXT-X-KEY:METHOD=AES-128,URI="file:///etc/x"\na.ts\n', "encrypted"),
        ("#EXTM3U\n#EXT-X-STREAM-INF:BANDWIDTH=1\na.ts\n", "playlist of playlists"),
        ("#EXTM3U\n#EXT-X-DISCONTINUITY\na.ts\n", "clock starts anew"),
        ("#EXTM3U\n", "names no segments"),
        ("a.ts\n", "does not begin with #EXTM3U"),
        ("#EXTM3U\nplaylist.ts\n", "cannot read the video"),  # whose content is another playlist
    ],
)
def test_a_playlist_opens_nothing_but_its_segments(
    run_bits: Callable[..., Outcome], tmp_path: Path, content: str, expected: str
) -> None:
    write_playlist(tmp_path / "secret.m3u8", SECOND)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.ts").write_bytes((tmp_path / "secret0.ts").read_bytes())
    (tmp_path / "data/playlist.ts").write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/secret0.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "data/t.m3u8").write_text(content)
    write_csv(tmp_path / "data/t.csv", FIRST)
    assert run_bits().code == 1
    assert expected in reason(tmp_path / "cache")


def test_a_clock_that_goes_back_between_segments_fails(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_playlist(tmp_path / "data/t.m3u8", FIRST)
    (tmp_path / "data/t.m3u8").write_text("#EXTM3U\nt1.ts\nt0.ts\n")
    write_csv(tmp_path / "data/t.csv", FIRST)
    assert run_bits().code == 1
    assert "clock goes back between segments" in reason(tmp_path / "cache")


def test_a_missing_segment_fails_the_trajectory(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_playlist(tmp_path / "data/t.m3u8", FIRST)
    (tmp_path / "data/t1.ts").unlink()
    write_csv(tmp_path / "data/t.csv", FIRST)
    assert run_bits().code == 1
    assert "t1.ts" in reason(tmp_path / "cache")


def test_a_changed_segment_is_noticed(tmp_path: Path) -> None:
    write_playlist(tmp_path / "t.m3u8", FIRST)
    source = open_source(format_named("video").locate(tmp_path, "t"), DataKeys())
    before = {kind: source.checksum(kind) for kind in ("stat", "content")}
    data = (tmp_path / "t1.ts").read_bytes()
    (tmp_path / "t1.ts").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert source.checksum("stat") == before["stat"]
    assert source.checksum("content") != before["content"]
    (tmp_path / "t1.ts").write_bytes(data[:-188])
    assert source.checksum("stat") != before["stat"]


def test_segments_read_as_one_file(tmp_path: Path) -> None:
    parts = [b"abc", b"", b"defgh", b"i"]
    for number, part in enumerate(parts):
        (tmp_path / f"{number}.ts").write_bytes(part)
    (tmp_path / "t.m3u8").write_text("#EXTM3U\r\n0.ts\r\n1.ts\r\n\r\n2.ts\r\n3.ts\r\n")
    file, whole = Segments(segments_of(tmp_path / "t.m3u8")), b"".join(parts)
    assert file.read() == whole
    assert file.read(5) == b""
    for start in range(len(whole) + 1):
        for size in range(len(whole) + 2):
            assert file.seek(start) == file.tell() == start
            assert file.read(size) == whole[start : start + size]
    assert file.seek(-2, 2) == 7
    with pytest.raises(InputError, match="not a playlist"):
        segments_of(tmp_path / "0.ts")


# ---------------------------------------------------------------------------------------------------------------------
# Tables apart from the videos, and clocks
# ---------------------------------------------------------------------------------------------------------------------


def test_tables_in_a_folder_of_their_own_are_found_by_stem(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    for city, trajectory in (("a", FIRST), ("b/c", SECOND)):  # videos/ and poses/ side by side, at any depth
        write_mp4(tmp_path / f"data/{city}/videos/t{trajectory.stamp}.mp4", trajectory.frames)
        (tmp_path / f"data/{city}/poses").mkdir()
        write_tum(tmp_path / f"data/{city}/poses/t{trajectory.stamp}.txt", trajectory)
    outcome = run_bits({"poses_folder": "poses"})
    assert outcome.code == 0, outcome.err
    assert check_stamps(tmp_path / "cache", "a/videos/t1", 1) > 40
    assert check_stamps(tmp_path / "cache", "b/c/videos/t2", 2) > 27
    (start, stop), datasets = chunks(tmp_path / "cache", "a/videos/t1")[0]
    np.testing.assert_array_equal(datasets["position"], FIRST.position[start:stop])


def test_one_table_for_two_videos_is_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    for day in ("monday", "tuesday"):
        write_mp4(tmp_path / f"data/videos/{day}/t1.mp4", FIRST.frames[:3])
    (tmp_path / "data/poses").mkdir()
    write_tum(tmp_path / "data/poses/t1.txt", FIRST)
    outcome = run_bits({"poses_folder": "poses"})
    assert outcome.code == 2
    assert "poses of videos/monday/t1 and of videos/tuesday/t1" in outcome.err


def write_epoch_table(path: Path, trajectory: Rendered) -> None:
    rows = zip(np.arange(trajectory.count) / FPS + EPOCH_S, *trajectory.position.T, trajectory.yaw)
    path.write_text("timestamp,x,y,yaw\n" + "".join(f"{','.join(map(repr, map(float, row)))}\n" for row in rows))


def test_an_absolute_clock_is_met_by_time_offset_or_by_the_frames_own_times(
    run_bits: Callable[..., Outcome], tmp_path: Path
) -> None:
    write_mp4(tmp_path / "data/t1.mp4", FIRST.frames)
    write_epoch_table(tmp_path / "data/t1.csv", FIRST)
    assert run_bits().code == 1
    assert "no frame lies between the first pose (1700000000.000 s)" in reason(tmp_path / "cache")
    (tmp_path / "data/front_camera_timestamps_1.csv").write_text(
        "frame_id,timestamp\n" + "".join(f"{number},{EPOCH_S + number / FPS}\n" for number in range(FIRST.count))
    )
    for number, settings in enumerate(({"time_offset": -EPOCH_S}, {"frame_times": "front_camera_timestamps_*.csv"})):
        cache = tmp_path / f"cache_{number}"
        outcome = run_bits({**settings, "cache_dir": str(cache)})
        assert outcome.code == 0, outcome.err
        assert check_stamps(cache, "t1", 1) > 40
        for (start, stop), datasets in chunks(cache, "t1"):
            np.testing.assert_allclose(datasets["position"], FIRST.position[start:stop], atol=1e-6)
    source = open_source(
        format_named("video").locate(tmp_path / "data", "t1"), DataKeys(frame_times="front_camera_timestamps_1.csv")
    )
    times = source.poses(required=True).times
    assert math.isclose(times[5], EPOCH_S + 0.5, abs_tol=1e-6)


def test_a_table_of_times_for_other_frames_is_refused(run_bits: Callable[..., Outcome], tmp_path: Path) -> None:
    write_mp4(tmp_path / "data/t1.mp4", FIRST.frames)
    write_epoch_table(tmp_path / "data/t1.csv", FIRST)
    (tmp_path / "data/times.txt").write_text("".join(f"{EPOCH_S + number / FPS}\n" for number in range(39)))
    assert run_bits({"frame_times": "times.txt"}).code == 1
    assert "t1: 40 frames in t1.mp4 but 39 times in times.txt" in reason(tmp_path / "cache")


def test_settings_of_videos_with_tables_apart_are_located(tmp_path: Path) -> None:
    write_mp4(tmp_path / "videos/t1.mp4", FIRST.frames[:3])
    (tmp_path / "poses").mkdir()
    write_tum(tmp_path / "poses/t1.txt", FIRST)
    (found,) = format_named("video").find(tmp_path, CacheSpec(poses_folder="poses"))
    assert not found.lacks_poses
    source = open_source(found, DataKeys(poses_folder="poses"))
    assert open_source(format_named("video").locate(tmp_path, "videos/t1"), DataKeys(poses_folder="poses")).checksum(
        "stat"
    ) == source.checksum("stat")
