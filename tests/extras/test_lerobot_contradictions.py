"""LeRobot: an episode whose meta data contradict its neighbours, its video or the data files fails, and it alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pyarrow
import pyarrow.parquet
import pytest
from formats_support import (
    VIDEO_KEY,
    cache,
    edit_features,
    lerobot_entry,
    truncate,
    write_episodes,
    write_lerobot,
    write_mp4,
)

from dino_cache_extras.formats.lerobot_checks import VideoSpans
from support import FIRST, SECOND, Outcome, Rendered, check_stamps, chunk_files, read_progress

FRAMES = 20  # of each episode, 0.1 s apart: episode i lies from 2 i to 2 i + 2 s of its file
FROM, TO = (f"videos/{VIDEO_KEY}/{end}_timestamp" for end in ("from", "to"))
EPISODES = [Rendered(stamp, FRAMES) for stamp in (1, 2, 3, 4, 5)]
KIND = "lerobot v3.0 h264"
Span = tuple[float, float]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five episodes in one file."""
    folder = tmp_path_factory.mktemp("lerobot") / "data"
    write_lerobot(folder, EPISODES, "v3.0", "libx264", together=5)
    return folder


@pytest.fixture
def data(original: Path, tmp_path: Path) -> Path:
    shutil.copytree(original, tmp_path / "data")
    return tmp_path / "data"


def entries(spans: list[Span] | None = None, **columns: list[Any]) -> list[dict[str, Any]]:
    """What meta/ says of the episodes; `spans`: [s] in the video, one each."""
    found = [lerobot_entry(index, FRAMES, 0, index * FRAMES) for index in range(len(EPISODES))]
    for entry, (start_s, stop_s) in zip(found, spans or [(2.0 * index, 2.0 * index + 2) for index in range(5)]):
        entry |= {FROM: start_s, TO: stop_s}
    return [{**entry, **{key: values[index] for key, values in columns.items()}} for index, entry in enumerate(found)]


def failures(data: Path) -> dict[int, str]:
    """Number of each episode that fails -> why. The frames of all others are checked to be their own."""
    cache_dir, failed = data.parent / "cache", {}
    for name, result in cache(data, cache_dir, KIND).items():
        number = int(name.rpartition("_")[2])
        if result.error is None:
            assert check_stamps(cache_dir, name, number + 1) >= FRAMES
        else:
            assert name in str(result.error)
            failed[number] = str(result.error)
    return failed


@pytest.mark.parametrize(
    ("spans", "wrong", "numbers"),
    [
        ([(0.0, 2.0), (2.1, 4.0), (4.0, 6.0), (6.0, 8.0), (8.0, 10.0)], {1}, ["2.100", "2.000"]),  # a gap
        ([(0.0, 2.0), (1.9, 4.0), (4.0, 6.0), (6.0, 8.0), (8.0, 10.0)], {1}, ["1.900", "2.000"]),  # an overlap
        ([(0.0, 2.1), (2.0, 4.0), (4.0, 6.0), (6.0, 8.0), (8.0, 10.0)], {0}, ["2.100", "2.000"]),
        ([(0.0, 2.0), (2.1, 4.1), (4.0, 6.0), (6.0, 8.0), (8.0, 10.0)], {1}, ["2.100", "2.000"]),  # as long as its rows
        ([(0.0, 2.0), (2.0, 4.1), (4.1, 6.0), (6.0, 8.0), (8.0, 10.0)], {1, 2}, []),  # they meet a frame too late
        ([(0.1, 2.0), (2.0, 4.0), (4.0, 6.0), (6.0, 8.0), (8.0, 10.0)], {0}, ["0.100", "0.000"]),
        ([(0.0, 2.0), (2.0, 4.0), (4.0, 6.0), (6.0, 8.0), (8.0, 10.1)], {4}, ["10.100", "10.000"]),
        ([(0.0, 2.0), (2.0, 4.0), (4.0, 6.0), (6.0, 8.0), (8.0, 9.9)], {4}, ["9.900", "10.000"]),
        ([(0.0, 2.0), (2.1, 4.1), (4.1, 6.1), (6.1, 8.1), (8.1, 10.1)], {1, 2, 3, 4}, []),  # all after the gap
        ([(0.1, 2.1), (2.1, 4.1), (4.1, 6.1), (6.1, 8.1), (8.1, 10.1)], {0, 1, 2, 3, 4}, []),
        ([(0.0, 2.0), (2.0, 4.1), (4.1, 6.1), (6.1, 8.0), (8.0, 10.0)], {1, 2, 3}, []),  # 2 lies between two wrong ones
        ([(0.0, 2.0), (0.0, 2.0), (4.0, 6.0), (6.0, 8.0), (8.0, 10.0)], {0, 1, 2}, []),
        ([(0.0, 2.0), (2.0, 4.0), (2.0, 4.0), (6.0, 8.0), (8.0, 10.0)], {1, 2, 3}, []),
        ([(0.0, 2.0), (2.0, 2.0), (4.0, 6.0), (6.0, 8.0), (8.0, 10.0)], {1}, ["2.000 to 2.000"]),
    ],
)  # fmt: skip
def test_episodes_must_fill_their_video_one_after_the_other(
    data: Path, spans: list[Span], wrong: set[int], numbers: list[str]
) -> None:
    write_episodes(data, "v3.0", entries(spans))
    failed = failures(data)
    assert set(failed) == wrong, failed
    assert all(number in failed[min(wrong)] for number in numbers), failed


def test_a_frame_of_nobody_fails_those_on_both_sides(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write_lerobot(data, EPISODES[:3], "v3.0", "libx264", together=3)
    frames = [frame for episode in EPISODES[:3] for frame in episode.frames]
    write_mp4(data / f"videos/{VIDEO_KEY}/chunk-000/file-000.mp4", [*frames[:20], frames[0], *frames[20:]])
    write_episodes(data, "v3.0", entries([(0.0, 2.0), (2.1, 4.1), (4.1, 6.1)])[:3])
    failed = failures(data)
    assert set(failed) == {0, 1}
    assert all("2.000" in reason and "2.100" in reason for reason in failed.values())


def test_two_episodes_with_the_same_frames_both_fail(data: Path) -> None:
    frames = [frame for episode in (*EPISODES[:2], *EPISODES[3:]) for frame in episode.frames]
    write_mp4(data / f"videos/{VIDEO_KEY}/chunk-000/file-000.mp4", frames)
    write_episodes(data, "v3.0", entries([(0.0, 2.0), (2.0, 4.0), (2.0, 4.0), (4.0, 6.0), (6.0, 8.0)]))
    failed = failures(data)
    assert set(failed) == {1, 2}
    assert all("2.000 to 4.000" in reason for reason in failed.values())


def test_an_episode_in_a_video_file_of_others_fails_and_those_go_on(tmp_path: Path) -> None:
    data = tmp_path / "data"
    lengths = (40, 27, 33)
    trajectories = [Rendered(stamp, length) for stamp, length in enumerate(lengths, 1)]
    names = write_lerobot(data, trajectories, "v3.0", "libx264", together=2)
    write_episodes(data, "v3.0", [
        lerobot_entry(0, 40, 0, 0),
        lerobot_entry(1, 27, 0, 40),
        {**lerobot_entry(2, 33, 1, 0), f"videos/{VIDEO_KEY}/file_index": 0},
    ])  # fmt: skip
    results = cache(data, tmp_path / "cache", KIND)
    assert [name for name in names if results[name].error] == [names[2]]
    assert "3.300" in str(results[names[2]].error)
    for name, stamp in zip(names[:2], (1, 2)):
        check_stamps(tmp_path / "cache", name, stamp)


@pytest.mark.parametrize("more", [1, 3])
def test_a_video_of_its_own_with_more_frames_than_rows_is_another_recording(tmp_path: Path, more: int) -> None:
    names = write_lerobot(tmp_path / "data", [FIRST, SECOND], "v2.1", "libx264")
    video = tmp_path / f"data/videos/chunk-000/{VIDEO_KEY}/{names[0]}.mp4"
    write_mp4(video, Rendered(9, 40 + more).frames)
    results = cache(tmp_path / "data", tmp_path / "cache", "lerobot v2.1 h264")
    assert all(word in str(results[names[0]].error) for word in ("3.900", f"{4 + more / 10:.3f}", "more frames"))
    check_stamps(tmp_path / "cache", names[1], 2)


# ---------------------------------------------------------------------------------------------------------------------
# Entries and data files
# ---------------------------------------------------------------------------------------------------------------------


def write_meta(data: Path, file: str, found: list[dict[str, Any]]) -> None:
    path = data / "meta/episodes/chunk-000" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(found), path)


def test_an_episode_with_two_entries_that_differ_fails(data: Path) -> None:
    write_meta(data, "file-001.parquet", [{**entries()[3], TO: 8.5}])
    failed = failures(data)
    assert set(failed) == {3}
    assert all(number in failed[3] for number in ("8.0", "8.5"))


def test_an_episode_with_two_lines_that_differ_fails(tmp_path: Path) -> None:
    names = write_lerobot(tmp_path / "data", [FIRST, SECOND], "v2.1", "libx264")
    lines = [{"episode_index": 0, "length": length} for length in (41, 40)] + [{"episode_index": 1, "length": 27}]
    (tmp_path / "data/meta/episodes.jsonl").write_text("\n".join(map(json.dumps, lines)))
    results = cache(tmp_path / "data", tmp_path / "cache", "lerobot v2.1 h264")
    assert all(word in str(results[names[0]].error) for word in ("twice", "41", "40"))
    assert results[names[1]].error is None


def test_an_episode_with_rows_in_two_files_fails(data: Path) -> None:
    rows = pyarrow.parquet.read_table(data / "data/chunk-000/file-000.parquet")
    pyarrow.parquet.write_table(rows.slice(2 * FRAMES, FRAMES), data / "data/chunk-000/file-001.parquet")
    failed = failures(data)
    assert set(failed) == {2}
    assert all(file in failed[2] for file in ("file-000.parquet", "file-001.parquet"))


def test_an_entry_whose_rows_are_not_as_many_as_its_length_fails(data: Path) -> None:
    starts = [0, 20, 40, 61, 81]
    rows = {"dataset_from_index": starts, "dataset_to_index": [20, 40, 61, 81, 101]}
    write_episodes(data, "v3.0", entries(**rows))
    failed = failures(data)
    assert set(failed) == {2}
    assert all(number in failed[2] for number in ("40 to 61", "20"))


# ---------------------------------------------------------------------------------------------------------------------
# No faults
# ---------------------------------------------------------------------------------------------------------------------


DOT_FILES = (
    *("meta/episodes/chunk-000/._file-000.parquet", "meta/episodes/._chunk-000", "meta/episodes/.DS_Store"),
    *("meta/episodes/.old/file-000.parquet", "data/chunk-000/._file-000.parquet", "data/.DS_Store"),
)


def add_dot_files(data: Path) -> None:
    for file in DOT_FILES:
        (data / file).parent.mkdir(exist_ok=True)
        (data / file).write_bytes(b"\0\5\26\7")


def add_cameras(data: Path) -> None:
    """One without times, one whose times make no sense: neither is asked for."""
    edit_features(data, {key: {"dtype": "video", "shape": [1, 1, 3]} for key in ("rear", "top")})
    columns = {f"videos/rear/{name}": [None] * 5 for name in ("chunk_index", "file_index")}
    columns |= {f"videos/rear/{end}_timestamp": [7.0] * 5 for end in ("from", "to")}
    write_episodes(data, "v3.0", entries(**columns))


HARMLESS: dict[str, Callable[[Path], Any]] = {
    "whole numbers": lambda d: write_episodes(d, "v3.0", entries([(2 * i, 2 * i + 2) for i in range(5)])),
    "less than half a frame": lambda d: write_episodes(
        d, "v3.0", entries([(2 * i + 0.01 * (i > 0), 2 * i + 2.03) for i in range(5)])
    ),
    "dot files": add_dot_files,
    "cameras": add_cameras,
    "an entry twice": lambda d: write_meta(d, "file-001.parquet", entries()[1:3]),
    "rows of the dataset": lambda d: write_episodes(
        d, "v3.0", entries(dataset_from_index=[0, 20, 40, 60, 80], dataset_to_index=[20, 40, 60, 80, 100])
    ),
    "a data file that cannot be read": lambda d: (d / "data/chunk-000/file-009.parquet").write_bytes(b"half"),
    "another file beside the data": lambda d: shutil.copy(
        d / "data/chunk-000/file-000.parquet", d / "data/chunk-000/file-000 (copy).parquet"
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HARMLESS)
def test_what_contradicts_nothing_is_no_fault(data: Path, what: str) -> None:
    HARMLESS[what](data)
    assert failures(data) == {}


def rewrite(path: Path, format_name: str, options: dict[str, str], codec: str) -> None:
    """Encode a video anew, with B-frames, in another container, under the same name."""
    with av.open(path) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(path, "w", format=format_name, options=options) as container:
        stream = container.add_stream(codec, rate=10, options={"preset": "ultrafast", "bf": "2", "crf": "16"})
        stream.height, stream.width, stream.pix_fmt, stream.gop_size = *frames[0].shape[:2], "yuv420p", 4
        for number, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.mark.parametrize(
    ("format_name", "movflags"), [("mp4", "frag_keyframe+empty_moov"), ("mp4", "faststart"), ("matroska", None)]
)
def test_times_count_from_the_first_frame_whatever_the_container(
    data: Path, format_name: str, movflags: str | None
) -> None:
    video = data / f"videos/{VIDEO_KEY}/chunk-000/file-000.mp4"
    rewrite(video, format_name, {"movflags": movflags} if movflags else {}, "libx264")
    assert failures(data) == {}


@pytest.mark.parametrize("later_frames", [0, 1, 5])
def test_a_first_episode_that_begins_when_the_file_does_is_on_the_files_clock(data: Path, later_frames: int) -> None:
    video = data / f"videos/{VIDEO_KEY}/chunk-000/file-000.mp4"
    rewrite(video, "mp4", {"movflags": "frag_keyframe+empty_moov"}, "libx264")
    with av.open(video) as container:
        begin_s = next(container.decode(video=0)).time
    assert begin_s >= 0.1
    begin_s += later_frames / 10
    write_episodes(data, "v3.0", entries([(2 * i + begin_s, 2 * i + 2 + begin_s) for i in range(5)]))
    assert set(failures(data)) == (set(range(5)) if later_frames else set())


# ---------------------------------------------------------------------------------------------------------------------
# One broken file, one night
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("timestamp", pyarrow.array([2**62 + i for i in range(40)]).cast(pyarrow.timestamp("us"), safe=False)),
        ("observation.filtered_heading", pyarrow.array([b"\xff\xfe"] * 40, pyarrow.binary()).view(pyarrow.string())),
        ("observation.filtered_heading", pyarrow.array(range(1, 41)).cast(pyarrow.timestamp("ns"))),
        ("observation.filtered_heading", pyarrow.array([{"a": 1}] * 40)),
        ("observation.filtered_position", pyarrow.array([None] * 40, pyarrow.float64())),
        ("episode_index", pyarrow.array([{"a": 1}] * 40)),
        ("frame_index", pyarrow.array(["x"] * 40)),
    ],
)
def test_an_odd_column_fails_its_episode_alone(
    run_bits: Callable[..., Outcome], tmp_path: Path, column: str, values: pyarrow.Array
) -> None:
    names = write_lerobot(tmp_path / "data", [FIRST, SECOND], "v2.1", "libx264")
    path = tmp_path / f"data/data/chunk-000/{names[0]}.parquet"
    table = pyarrow.parquet.read_table(path)
    place = table.schema.get_field_index(column)
    pyarrow.parquet.write_table(table.set_column(place, column, values), path)
    for attempts in (1, 2):
        assert run_bits().code == 1
        record = read_progress(tmp_path / "cache")
        assert record["completed_trajectories"] == [names[1]]
        assert record["failures"][names[0]]["attempts"] == attempts
        assert column in record["failures"][names[0]]["reason"]


def redone(outcome: Outcome, cache_dir: Path, before: dict[Path, bytes]) -> bool:
    return "Redoing" in outcome.err or {path: path.read_bytes() for path in chunk_files(cache_dir)} != before


@pytest.mark.parametrize(
    "file",
    [
        "data/chunk-000/file-000.parquet",
        "meta/episodes/chunk-000/file-000.parquet",
        "meta/info.json",
    ],
)
def test_a_file_that_is_cut_in_half_over_night_costs_nothing(
    run_bits: Callable[..., Outcome], data: Path, file: str
) -> None:
    cache_dir = data.parent / "cache"
    assert run_bits().code == 0
    before = {path: path.read_bytes() for path in chunk_files(cache_dir)}
    whole = (data / file).read_bytes()
    truncate(data / file, 0.5)
    outcome = run_bits()
    assert outcome.code in (1, 2)
    assert Path(file).name in outcome.err
    assert "cannot be read" in outcome.err
    assert not redone(outcome, cache_dir, before)
    (data / file).write_bytes(whole)
    outcome = run_bits()
    assert outcome.code == 0
    assert not redone(outcome, cache_dir, before)


def as_made_by_0_2_0(cache_dir: Path) -> None:
    """Its records say nothing of the rule by which frames were found."""
    record = read_progress(cache_dir)
    for entry in record["trajectory_records"].values():
        assert entry.pop("pairing") == 2
    (cache_dir / "progress.json").write_text(json.dumps(record))


def test_an_episode_that_was_made_of_contradictory_data_is_found_and_its_chunks_are_removed(
    run_bits: Callable[..., Outcome], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache_dir = data.parent / "cache"
    write_episodes(data, "v3.0", entries([(0.0, 2.0), (2.1, 4.1), (4.0, 6.0), (6.0, 8.0), (8.0, 10.0)]))
    with monkeypatch.context() as patch:  # 0.2.0 believed it: episode 1 has the frame of its next row, in each row
        patch.setattr(VideoSpans, "fault", lambda self, name: None)
        assert run_bits().code == 0
    as_made_by_0_2_0(cache_dir)
    others = {path: path.read_bytes() for path in chunk_files(cache_dir) if path.parent.name != "episode_000001"}
    outcome = run_bits()
    assert outcome.code == 1
    assert "Redoing episode_000001: its frames may be another's" in outcome.err
    assert {path: path.read_bytes() for path in chunk_files(cache_dir)} == others
    record = read_progress(cache_dir)
    assert [*record["failures"]] == ["episode_000001"]
    assert {entry["pairing"] for entry in record["trajectory_records"].values()} == {2}


def test_a_cache_of_0_2_0_of_data_that_agree_has_nothing_to_do(run_bits: Callable[..., Outcome], data: Path) -> None:
    cache_dir = data.parent / "cache"
    assert run_bits().code == 0
    as_made_by_0_2_0(cache_dir)
    before = {path: path.read_bytes() for path in chunk_files(cache_dir)}
    outcome = run_bits()
    assert outcome.code == 0
    assert not redone(outcome, cache_dir, before)
    assert {entry["pairing"] for entry in read_progress(cache_dir)["trajectory_records"].values()} == {2}
