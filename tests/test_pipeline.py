"""The stream from trajectories to published chunks, in this process, with real frames and files, without a model."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dino_cache
from dino_cache import (
    DeviceError,
    EncodedRows,
    FrameDecoder,
    Hooks,
    InputError,
    TrajectoryResult,
    prefetch,
)
from support import (
    StampEncoder,
    check_stamps,
    chunk_files,
    make_trajectory,
    read_chunk,
    straight_line,
    stream_results,
    write_poses,
)

COUNTS = {"t1": 20, "t2": 7, "t3": 33, "t4": 3, "t5": 12}  # frames; the digit is the stamp
NUM_FRAMES = 75


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name, count in COUNTS.items():
        make_trajectory(tmp_path / "data" / name, count, stamp=int(name[1:]))
    return tmp_path / "data"


def check_cache(cache: Path, names: list[str], *, frame_stride: int = 1) -> None:
    """Assert that exactly these trajectories are there, with all their frames, each row its own, and no rest but what
    a trajectory that was stopped in its middle goes on with."""
    assert sorted(os.listdir(cache)) == sorted([".staging", *names])
    staged = set(os.listdir(cache / ".staging"))
    begun = {name for name in staged if f"{name}.journal" in staged}
    assert staged == begun | {f"{name}.journal" for name in begun}
    assert len(begun) <= 1
    for name in names:
        check_stamps(cache, name, int(name[1:]), frame_stride)
        stored = [read_chunk(path)[1]["frame_index"] for path in chunk_files(cache / name)]
        np.testing.assert_array_equal(np.unique(np.concatenate(stored)), range(0, COUNTS[name], frame_stride))


def by_name(results: list[TrajectoryResult]) -> dict[str, TrajectoryResult]:
    assert len({result.name for result in results}) == len(results)
    return {result.name: result for result in results}


class LateEncoder(StampEncoder):
    """Reads the pixels only when the result is asked for, as a device may: a buffer reused before that would show."""

    def __init__(self, batches_in_flight: int):
        super().__init__()
        self.batches_in_flight = batches_in_flight
        self.started = self.collected = self.most_in_flight = 0

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        self.started += 1

        def result() -> EncodedRows:
            self.most_in_flight = max(self.most_in_flight, self.started - self.collected)
            self.collected += 1
            return super(LateEncoder, self).encode(pixels)()

        return result


# ----------------------------------------------------------------------------------------------------------------------
# The stream
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [1, 8, 1000])
def test_every_row_is_its_own_frames_however_many_batches_are_in_flight(data, tmp_path, batch_size, in_flight):
    encoder = LateEncoder(in_flight)
    results = list(stream_results(data, tmp_path / "cache", encoder, batch_size=batch_size))
    assert [result.error for result in results] == [None] * 5
    check_cache(tmp_path / "cache", list(COUNTS))
    assert encoder.most_in_flight == min(in_flight + 1, -(-NUM_FRAMES // batch_size))


def test_batches_are_full_across_trajectories_and_chunks_and_every_frame_is_encoded_once(data, tmp_path):
    encoder, counted = StampEncoder(), []
    list(stream_results(data, tmp_path / "cache", encoder, hooks=Hooks(on_encoded=counted.append)))
    assert encoder.batch_sizes == [8] * 9 + [3]
    assert counted == encoder.batch_sizes


class SlowFrame:
    """Holds one frame up until so many later ones have gone by."""

    def __init__(self, number: int, others: int):
        self._number, self._others = number, others
        self._gone_by: list[int] = []
        self.enough = threading.Event()

    def meet(self, number: int) -> None:
        """A frame comes by, on any thread."""
        if number == self._number:
            assert self.enough.wait(60), f"only {len(self._gone_by)} frames went by meanwhile"
        elif number > self._number:
            self._gone_by.append(number)
            if len(self._gone_by) == self._others:
                self.enough.set()


def test_files_of_a_slow_disk_are_read_together(tmp_path, monkeypatch):
    """Six of a group of eight, once the first two have been slow."""
    make_trajectory(tmp_path / "data" / "t1", 8, stamp=1)
    read, together = dino_cache.read_file, threading.Barrier(6)

    def slow_read(path: Any) -> np.ndarray:
        if Path(path).stem in ("0", "1"):
            time.sleep(0.02)
        elif Path(path).stem.isdecimal():
            together.wait(60)  # broken unless six come at once
        return read(path)

    monkeypatch.setattr(dino_cache, "read_file", slow_read)
    (result,) = stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder(), batch_size=16)
    assert result.error is None
    check_stamps(tmp_path / "cache", "t1", 1)


def test_a_frame_that_is_slow_to_decode_waits_while_others_are_decoded(tmp_path, monkeypatch):
    """As many as lie ready for the encoder: four a decoding thread, the slow one among them."""
    make_trajectory(tmp_path / "data" / "t1", 40, stamp=1)
    decode, slow = FrameDecoder.__call__, SlowFrame(10, others=7)

    def slow_decode(decoder: FrameDecoder, content: np.ndarray, name: str) -> torch.Tensor:
        slow.meet(int(Path(name).stem))
        return decode(decoder, content, name)

    monkeypatch.setattr(FrameDecoder, "__call__", slow_decode)
    (result,) = stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder())
    assert result.error is None and slow.enough.is_set()
    check_stamps(tmp_path / "cache", "t1", 1)


def test_results_come_in_order_with_spans_and_sizes_of_files_that_are_there(data, tmp_path):
    names = []
    for result in stream_results(data, tmp_path / "cache", StampEncoder()):
        names.append(result.name)
        paths = chunk_files(tmp_path / "cache" / result.name)
        attributes = [read_chunk(path)[0] for path in paths]
        assert result.spans == [(chunk["start"], chunk["stop"]) for chunk in attributes]
        assert result.chunk_bytes == [path.stat().st_size for path in paths]
        assert result.replaced is None
        if result.name == "t1":  # 0.25 m a frame: 2 m are 8 steps, 0.5 m are 2
            assert result.spans == [(0, 9), (6, 15), (12, 20)]
    assert names == list(COUNTS)


def test_no_trajectories_give_no_results_and_no_batch(tmp_path):
    (tmp_path / "data").mkdir()
    encoder = StampEncoder()
    assert list(stream_results(tmp_path / "data", tmp_path / "cache", encoder)) == []
    assert encoder.batch_sizes == []


def test_frame_stride_keeps_every_third_frame_and_its_source_row(data, tmp_path):
    list(stream_results(data, tmp_path / "cache", StampEncoder(), frame_stride=3, min_chunk_distance_m=0.0))
    check_cache(tmp_path / "cache", list(COUNTS), frame_stride=3)


def test_frame_in_many_chunks_is_encoded_once_and_stored_in_all_of_them(tmp_path):
    # 1/16 m a frame: chunks of 33 frames (2 m) begin every second frame, as 30 frames before their end are 1.875 m.
    make_trajectory(tmp_path / "data" / "t1", 65, stamp=1, position=straight_line(65, 0.0625))
    encoder = StampEncoder()
    settings = {"overlap_distance_m": 1.875, "min_chunk_distance_m": 0.0}
    (result,) = stream_results(tmp_path / "data", tmp_path / "cache", encoder, batch_size=7, **settings)
    assert result.spans == [(start, start + 33) for start in range(0, 33, 2)]
    assert sum(encoder.batch_sizes) == 65
    assert check_stamps(tmp_path / "cache", "t1", 1) == 17 * 33


def test_frames_of_pieces_that_move_too_little_are_not_decoded(tmp_path):
    # Pieces of 9, 4 and 9 frames between jumps of 10 m; the middle one moves 3 * 0.05 m, less than 0.3 m.
    x = np.concatenate([np.arange(9) * 0.25, 12 + np.arange(4) * 0.05, 23 + np.arange(9) * 0.25])
    folder = make_trajectory(tmp_path / "data" / "t1", 22, stamp=1, position=np.stack([x, 0 * x], axis=1))
    for number in range(9, 13):
        (folder / f"{number}.png").write_bytes(b"would fail if it were decoded")
    encoder = StampEncoder()
    (result,) = stream_results(tmp_path / "data", tmp_path / "cache", encoder)
    assert result.spans == [(0, 9), (13, 22)]
    assert sum(encoder.batch_sizes) == 18
    assert check_stamps(tmp_path / "cache", "t1", 1) == 18


def test_nothing_outside_the_cache_folder_is_touched(data, tmp_path, monkeypatch):
    def snapshot() -> dict[Path, tuple[int, bytes | None]]:
        paths = [path for path in tmp_path.rglob("*") if tmp_path / "cache" not in (path, *path.parents)]
        return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}

    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    (data / "t2" / "3.png").write_bytes(b"broken")
    (tmp_path / "cache").mkdir()
    before = snapshot()
    assert len(list(stream_results(data, tmp_path / "cache", StampEncoder()))) == 5
    assert snapshot() == before


# ----------------------------------------------------------------------------------------------------------------------
# Failures: a trajectory's own, the device's
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [0, 3])
@pytest.mark.parametrize("number", [0, 16, 32], ids=["first", "middle", "last"])
def test_broken_frame_fails_only_its_trajectory_and_leaves_nothing(data, tmp_path, number, in_flight):
    path = data / "t3" / f"{number}.png"
    path.write_bytes(path.read_bytes()[:50])  # of 95
    results = by_name(list(stream_results(data, tmp_path / "cache", LateEncoder(in_flight))))
    assert results.keys() == COUNTS.keys()
    assert isinstance(results["t3"].error, InputError)
    assert f"t3/{number}.png" in str(results["t3"].error)
    assert [name for name, result in results.items() if result.error is None] == ["t1", "t2", "t4", "t5"]
    check_cache(tmp_path / "cache", ["t1", "t2", "t4", "t5"])


def test_failed_trajectory_is_not_read_to_its_end(tmp_path, monkeypatch):
    folder = make_trajectory(tmp_path / "data" / "t1", 100, stamp=1)
    (folder / "0.png").write_bytes(b"broken")
    decoded = []

    class CountingDecoder(FrameDecoder):
        def __call__(self, data: np.ndarray, name: str) -> torch.Tensor:
            decoded.append(name)
            return super().__call__(data, name)

    monkeypatch.setattr(dino_cache, "FrameDecoder", CountingDecoder)
    (result,) = stream_results(tmp_path / "data", tmp_path / "cache", StampEncoder())
    assert isinstance(result.error, InputError)
    assert len(decoded) <= 16  # the two batches that were ahead


def test_trajectory_that_breaks_a_rule_fails_alone_and_keeps_batches_full(data, tmp_path):
    write_poses(data / "t3", straight_line(32), np.zeros(32))
    encoder = StampEncoder()
    results = by_name(list(stream_results(data, tmp_path / "cache", encoder)))
    assert isinstance(results["t3"].error, InputError)
    assert encoder.batch_sizes == [8] * 5 + [2]
    check_cache(tmp_path / "cache", ["t1", "t2", "t4", "t5"])


class NonFiniteEncoder(LateEncoder):
    """Finds the features of one frame (stamp, number) not finite."""

    def __init__(self, frame: tuple[int, int], batches_in_flight: int = 0):
        super().__init__(batches_in_flight)
        self.frame = frame

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        collect = super().encode(pixels)

        def result() -> EncodedRows:
            rows = collect()
            cls = rows.tokens["cls_token"]
            return rows._replace(finite=(cls[:, 0] != self.frame[0]) | (cls[:, 2] != self.frame[1]))

        return result


@pytest.mark.parametrize("in_flight", [0, 3])
@pytest.mark.parametrize("number", [0, 16, 32], ids=["first", "middle", "last"])
def test_features_that_are_not_finite_fail_only_their_trajectory(data, tmp_path, number, in_flight):
    results = by_name(list(stream_results(data, tmp_path / "cache", NonFiniteEncoder((3, number), in_flight))))
    assert results.keys() == COUNTS.keys()
    assert isinstance(results["t3"].error, InputError)
    assert f"t3/{number}.png" in str(results["t3"].error)
    assert "not finite" in str(results["t3"].error)
    check_cache(tmp_path / "cache", ["t1", "t2", "t4", "t5"])


def test_trajectory_with_two_faults_is_reported_once(data, tmp_path, monkeypatch):
    # The writer thread is at the batch whose features are not finite while the main thread meets the broken frame.
    (data / "t1" / "10.png").write_bytes(b"broken")
    reached = threading.Event()

    class Finite(np.ndarray):
        def all(self, *arguments: Any, **options: Any) -> Any:
            assert reached.wait(30)
            return super().all(*arguments, **options)

    class SlowlyJudged(NonFiniteEncoder):
        def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
            rows = super().encode(pixels)()
            return lambda: rows._replace(finite=rows.finite.view(Finite))

    class Reporting(TrajectoryResult):
        """The main thread is done with the broken frame as soon as it has made its result."""

        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            reached.set()

    monkeypatch.setattr(dino_cache, "TrajectoryResult", Reporting)
    names = [result.name for result in stream_results(data, tmp_path / "cache", SlowlyJudged((1, 3)))]
    assert sorted(names) == ["t1", "t2", "t3", "t4", "t5"]


class SmallDevice(StampEncoder):
    """Has memory for `most` frames at once."""

    def __init__(self, most: int):
        super().__init__()
        self.most = most

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        result = super().encode(pixels)
        if len(pixels) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result


@pytest.mark.parametrize("most", [1, 3, 7])
def test_out_of_device_memory_halves_the_batch_once_and_for_all(data, tmp_path, most):
    encoder = SmallDevice(most)
    list(stream_results(data, tmp_path / "cache", encoder))
    check_cache(tmp_path / "cache", list(COUNTS))
    tried = {7: [8, 4, 4], 3: [8, 4, 2, 2, 2, 2], 1: [8, 4, 2] + [1] * 8}[most]
    assert encoder.batch_sizes[: len(tried)] == tried
    assert max(encoder.batch_sizes[len(tried) :]) == tried[-1]


def test_one_frame_that_does_not_fit_on_the_device_is_a_device_error(data, tmp_path):
    with pytest.raises(DeviceError, match="one frame does not fit"):
        list(stream_results(data, tmp_path / "cache", SmallDevice(0)))
    check_cache(tmp_path / "cache", [])


class FailingDevice(LateEncoder):
    """Fails at its fifth batch: when that is started, or when its result is asked for."""

    def __init__(self, when: str, batches_in_flight: int):
        super().__init__(batches_in_flight)
        self.when = when

    def encode(self, pixels: torch.Tensor) -> Callable[[], EncodedRows]:
        collect = super().encode(pixels)
        if self.started != 5:
            return collect
        if self.when == "start":
            raise RuntimeError("CUDA error: an illegal memory access")

        def fail() -> EncodedRows:
            raise RuntimeError("CUDA error: an illegal memory access")

        return fail


@pytest.mark.parametrize("in_flight", [0, 3])
@pytest.mark.parametrize("when", ["start", "result"])
def test_failing_device_blames_no_trajectory_and_publishes_nothing_more(data, tmp_path, when, in_flight):
    results: list[TrajectoryResult] = []
    with pytest.raises(DeviceError, match="illegal memory access"):
        results.extend(stream_results(data, tmp_path / "cache", FailingDevice(when, in_flight)))
    assert all(result.error is None for result in results)
    published = sorted({path.parent.name for path in chunk_files(tmp_path / "cache")})
    assert published in ([], ["t1"], ["t1", "t2"])  # 32 frames came before: t1 and t2 whole, of t3 five
    check_cache(tmp_path / "cache", published)


# ----------------------------------------------------------------------------------------------------------------------
# Ending early
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_flight", [0, 1])
@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("call", [2, 10, 11, 30])  # of stop, which is asked twice a group of frames
def test_stop_encodes_no_further_batch_and_publishes_no_half_trajectory(data, tmp_path, call, batch_size, in_flight):
    encoder, calls, started = LateEncoder(in_flight), 0, []

    def stop() -> bool:
        nonlocal calls
        calls += 1
        if calls == call:
            started.append(encoder.started)
        return calls >= call

    results = list(
        stream_results(data, tmp_path / "cache", encoder, hooks=Hooks(should_stop=stop), batch_size=batch_size)
    )
    assert started == [encoder.started]
    ends = dict(zip(COUNTS, np.cumsum(list(COUNTS.values()))))
    encoded = [name for name, end in ends.items() if end <= sum(encoder.batch_sizes)]
    assert [result.name for result in results] == encoded
    check_cache(tmp_path / "cache", encoded)


def test_stop_before_the_first_frame_does_nothing(data, tmp_path):
    encoder = StampEncoder()
    assert list(stream_results(data, tmp_path / "cache", encoder, hooks=Hooks(should_stop=lambda: True))) == []
    assert encoder.batch_sizes == []
    check_cache(tmp_path / "cache", [])


def test_consumer_that_leaves_in_the_middle_leaves_no_thread_and_no_half_trajectory(data, tmp_path):
    threads = set(threading.enumerate())
    results = stream_results(data, tmp_path / "cache", StampEncoder())
    assert next(results).name == "t1"
    results.close()
    assert set(threading.enumerate()) == threads
    published = sorted({path.parent.name for path in chunk_files(tmp_path / "cache")})
    assert published == list(COUNTS)[: len(published)]
    check_cache(tmp_path / "cache", published)


# ----------------------------------------------------------------------------------------------------------------------
# Bounds
# ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [60, 240])
def test_frames_waiting_in_memory_are_bounded_whatever_the_trajectorys_length(tmp_path, monkeypatch, count):
    bound = (2 * dino_cache.available_cores() + 1) * 8  # two groups a worker, and the batch that is gathered
    make_trajectory(tmp_path / "data" / "t1", count, stamp=1)
    encoder, lock, decoded, most = LateEncoder(1), threading.Lock(), 0, 0

    class SlowFirstFrame(FrameDecoder):
        """Holds back frame 0, which is wanted first, so that all that may be decoded ahead of it is."""

        def __call__(self, data: np.ndarray, name: str) -> torch.Tensor:
            nonlocal decoded, most
            with lock:
                decoded += 1
                most = max(most, decoded - 8 * encoder.started)
            deadline = time.monotonic() + 0.3
            while name == "t1/0.png" and most <= bound and time.monotonic() < deadline:
                time.sleep(0.001)
            return super().__call__(data, name)

    monkeypatch.setattr(dino_cache, "FrameDecoder", SlowFirstFrame)
    list(stream_results(tmp_path / "data", tmp_path / "cache", encoder))
    assert decoded == count
    assert 8 < most <= bound


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.integers(), max_size=30), depth=st.integers(1, 6), workers=st.integers(1, 4))
def test_prefetch_gives_results_in_order_with_at_most_depth_under_way(values, depth, workers):
    pulled = given_out = most = 0

    def items() -> Iterator[int]:
        nonlocal pulled, most
        for value in values:
            pulled += 1
            most = max(most, pulled - given_out)
            yield value

    with ThreadPoolExecutor(workers) as pool:
        results = []
        for result in prefetch(lambda value: value * 3, items(), pool, depth):
            results.append(result)
            given_out += 1
    assert results == [value * 3 for value in values]
    assert most <= depth


@settings(deadline=None, max_examples=30)
@given(bad=st.integers(0, 9), depth=st.integers(1, 12))
def test_prefetch_raises_in_the_place_of_the_result(bad, depth):
    def work(number: int) -> int:
        if number == bad:
            raise ValueError(number)
        return number

    results = []
    with ThreadPoolExecutor(2) as pool, pytest.raises(ValueError, match=str(bad)):
        for result in prefetch(work, range(10), pool, depth):
            results.append(result)
    assert results == list(range(bad))


def test_prefetch_works_ahead_up_to_its_depth():
    ahead = threading.Barrier(4)  # broken unless four items are under way at once
    with ThreadPoolExecutor(4) as pool:
        assert list(prefetch(lambda number: (ahead.wait(30), number)[1], range(8), pool, 4)) == list(range(8))


def test_prefetch_that_is_closed_cancels_what_has_not_begun():
    all_pulled, release, begun = threading.Event(), threading.Event(), []

    def items() -> Iterator[int]:
        yield from range(5)
        all_pulled.set()
        yield 5

    def work(number: int) -> int:
        begun.append(number)
        assert (all_pulled if number == 0 else release).wait(30)
        return number

    with ThreadPoolExecutor(1) as pool:
        results = prefetch(work, items(), pool, 6)
        assert next(results) == 0
        results.close()  # 1 may have begun, 2 to 5 wait
        release.set()
    assert set(begun) <= {0, 1}


# ---------------------------------------------------------------------------------------------------------------------
# Looking at many files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wait_s", [0, 0.0005], ids=["a quick disk", "a slow one"])
@pytest.mark.parametrize("count", [0, 1, 64, 65, 300])
def test_map_files_gives_every_result_in_order(count, wait_s):
    threads = set()

    def square(number: int) -> int:
        threads.add(threading.get_ident())
        if wait_s:
            time.sleep(wait_s)
        return number * number

    assert list(dino_cache.map_files(square, list(range(count)))) == [number * number for number in range(count)]
    if wait_s and count > 64:  # the other way round, a busy machine may make any function look slow
        assert len(threads) > 1


def test_map_files_raises_in_the_place_of_the_result():
    def fail_at_200(number: int) -> int:
        time.sleep(0.0005)
        return 1 // (200 - number)

    results = dino_cache.map_files(fail_at_200, list(range(300)))
    with pytest.raises(ZeroDivisionError):
        list(results)
