"""Trajectories that a run did not come to the end of: the next one goes on after their finished chunks."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml

import dino_cache
import progress_utils
from support import (
    STAMP_SHAPE,
    BitEncoder,
    PlainEncoder,
    StampEncoder,
    cache_content,
    check_stamps,
    chunk_files,
    encoded,
    make_trajectory,
    read_progress,
    render,
    straight_line,
    tree,
    write_config,
    write_frame,
    write_poses,
)

# 80 frames, 0.25 m apart: chunks of 2 m that overlap by 0.5 m, of 9 frames each: [0, 9), [6, 15), [12, 21) ...
FRAMES = 80
SPANS = [(start, min(start + 9, FRAMES)) for start in range(0, FRAMES - 3, 6)]
NAME = "long/ü tra\nck"


class Trial:
    """A dataset of one trajectory, or more, and runs of it."""

    def __init__(self, folder: Path, run_here: Callable[..., Any]):
        self.data, self.cache, self.config = folder / "data", folder / "cache", folder / "robot.yaml"
        self.run = lambda *arguments: run_here(self.config, *arguments)
        self.encoded: list[int] = []  # numbers of frames, in order
        self.stop_after: int | None = None  # frames, of one run
        make_trajectory(self.data / NAME, FRAMES, stamp=1)
        self.configure()

    def configure(self, **settings: Any) -> None:
        content = yaml.safe_load(write_config(self.config, self.data, batch_size=1, **settings).read_text())
        content["datasets"]["robot"]["cache_dir"] = str(self.cache)
        self.config.write_text(yaml.safe_dump(content))

    def interrupt(self, after: int, *arguments: str, code: int = 143) -> None:
        """A run that gets a signal when so many frames are encoded."""
        self.encoded.clear()
        self.stop_after = after
        outcome = self.run(*arguments)
        self.stop_after = None
        assert outcome.code == code, outcome.err
        assert chunk_files(self.cache) == []

    def finish(self, *arguments: str) -> list[int]:
        """A run to the end; returns the frames that it encoded."""
        self.encoded.clear()
        outcome = self.run(*arguments)
        assert outcome.code == 0, outcome.err
        assert list((self.cache / ".staging").iterdir()) == []
        return list(self.encoded)

    @property
    def journals(self) -> list[Path]:
        return sorted((self.cache / ".staging").rglob("*.journal"))

    @property
    def staged(self) -> list[Path]:
        """Chunk files in staging."""
        return sorted((self.cache / ".staging").rglob("chunk_*.h5"))


@pytest.fixture
def trial(tmp_path, run_here, monkeypatch) -> Trial:
    trial = Trial(tmp_path, run_here)

    class CountingEncoder(PlainEncoder):
        def encode(self, pixels: Any) -> Any:
            trial.encoded += [int(high) * 256 + int(low) for _, high, low in self.stamps(pixels)]
            if len(trial.encoded) == trial.stop_after:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().encode(pixels)

    def load(spec: dino_cache.CacheSpec, device: str) -> tuple[StampEncoder, str]:
        return CountingEncoder(spec.image_size, spec.tokens), "stamp" + spec.weights

    monkeypatch.setattr(dino_cache, "load_encoder", load)
    return trial


@pytest.fixture
def expected(trial: Trial) -> dict[str, Any]:
    """What a run makes that nobody disturbed; there is no cache afterwards."""
    assert sorted(set(trial.finish())) == list(range(FRAMES))
    content = cache_content(trial.cache)
    assert [(chunk["start"], chunk["stop"]) for chunk, _ in content.values()] == SPANS
    shutil.rmtree(trial.cache)
    return content


def check_same(cache: Path, expected: dict[str, Any]) -> None:
    """Attributes equal, and datasets byte for byte."""
    content = cache_content(cache)
    assert content.keys() == expected.keys()
    for name, (attributes, datasets) in content.items():
        assert attributes == expected[name][0]
        assert {key: (rows.dtype, rows.shape, rows.tobytes()) for key, rows in datasets.items()} == {
            key: (rows.dtype, rows.shape, rows.tobytes()) for key, rows in expected[name][1].items()
        }


def durable_after(frames: int) -> int:
    """Chunks that are whole when the first so many frames are there; the last one is never left alone."""
    return min(sum(stop <= frames for _, stop in SPANS), len(SPANS) - 1)


@pytest.mark.parametrize("after", [1, 9, 10, 30, 76, 79])
def test_a_stopped_run_is_taken_up_at_the_first_frame_of_the_next_chunk(trial, expected, after):
    trial.interrupt(after)
    durable = len(trial.staged)
    assert durable in (durable_after(after), durable_after(after - 1))  # the last batch may have been dropped
    assert trial.finish() == list(range(SPANS[durable][0], FRAMES))
    check_same(trial.cache, expected)
    assert check_stamps(trial.cache, NAME, 1) == sum(stop - start for start, stop in SPANS)


def test_several_stops_in_a_row_lose_a_chunk_each_at_most(trial, expected):
    total = 0
    for after in (20, 20, 20):
        trial.interrupt(after)
        total += len(trial.encoded)
    total += len(trial.finish())
    check_same(trial.cache, expected)
    assert total <= FRAMES + 3 * (9 + 3)


def change_a_frame(trial: Trial, size: int) -> None:
    path = trial.data / NAME / "3.png"
    write_frame(path, 2, 3)
    path.write_bytes(path.read_bytes().ljust(size, b"\0"))


def flip_a_bit(trial: Trial, chunk: int) -> None:
    path = trial.staged[chunk]
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("checksum", "size"), [("stat", 400), ("content", 0)])
def test_changed_data_begin_anew(trial, checksum, size):
    """As far as the checksum tells: sizes, or every byte."""
    trial.configure(checksum=checksum)
    trial.interrupt(30)
    change_a_frame(trial, size)
    assert trial.finish() == list(range(FRAMES))
    with h5py.File(chunk_files(trial.cache)[0]) as file:
        assert file["cls_token"][:, 0].tolist() == [1, 1, 1, 2, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "settings", [{"max_chunk_distance_m": 3.0}, {"resize": "stretch"}, {"frame_stride": 2}, {"position_scale": 1.5}]
)
def test_changed_settings_begin_anew(trial, settings):
    trial.interrupt(30)
    trial.configure(**settings)
    assert trial.finish("--yes") == list(range(0, FRAMES, settings.get("frame_stride", 1)))


def test_settings_that_compute_nothing_else_change_nothing(trial, expected):
    trial.interrupt(30)
    trial.configure(checksum="stat", decode_workers=1, progress_interval_s=7)
    assert trial.finish()[0] > 0
    check_same(trial.cache, expected)


def test_other_weights_begin_anew(trial, monkeypatch):
    trial.interrupt(30)
    load = dino_cache.load_encoder
    monkeypatch.setattr(dino_cache, "load_encoder", lambda spec, device: (load(spec, device)[0], "others"))
    assert trial.finish("--yes") == list(range(FRAMES))


@pytest.mark.parametrize("chunk", [0, 1, 2])
def test_a_damaged_chunk_in_staging_and_those_after_it_are_not_used(trial, expected, chunk):
    trial.interrupt(30)
    assert len(trial.staged) == 4
    flip_a_bit(trial, chunk)
    assert trial.finish() == list(range(SPANS[chunk][0], FRAMES))
    check_same(trial.cache, expected)


@pytest.mark.parametrize("where", ["head", "data", "poses", "end"])
def test_any_byte_of_a_chunk_in_staging_counts(trial, where):
    trial.interrupt(30)
    path = trial.staged[1]
    with h5py.File(path) as file:
        offset = {"head": 3, "data": file["cls_token"].id.get_offset(), "poses": file["yaw"].id.get_offset(), "end": -1}
    data = bytearray(path.read_bytes())
    data[offset[where]] ^= 1
    path.write_bytes(data)
    assert trial.finish()[0] == SPANS[1][0]


def test_a_chunk_of_another_trajectory_is_not_taken_for_this_one(trial, expected):
    trial.interrupt(30)
    shutil.copy(trial.staged[0], trial.staged[1])  # intact in itself
    assert trial.finish()[0] == SPANS[1][0]
    check_same(trial.cache, expected)


def test_a_torn_last_line_of_the_journal_is_dropped_and_no_line_is_written_behind_it(trial, expected):
    trial.interrupt(30)
    (journal,) = trial.journals
    journal.write_bytes(journal.read_bytes()[:-20])
    trial.interrupt(20)
    assert trial.encoded[0] == SPANS[durable_after(30) - 1][0]
    assert trial.finish()[0] > SPANS[durable_after(30)][0]
    check_same(trial.cache, expected)


def trial_first(after: int) -> int:
    """The frame that a run is taken up at which stopped after so many."""
    return SPANS[durable_after(after)][0]


@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"00000000 {}\n", b"no journal\n"])
def test_a_journal_that_tells_nothing_is_no_reason_to_fail(trial, expected, content):
    trial.interrupt(30)
    trial.journals[0].write_bytes(content)
    assert trial.finish() == list(range(FRAMES))
    check_same(trial.cache, expected)


def test_a_bad_frame_in_the_middle_drops_what_there_was(trial):
    trial.interrupt(30)
    good = (trial.data / NAME / "50.png").read_bytes()
    status = os.stat(trial.data / NAME / "50.png")
    (trial.data / NAME / "50.png").write_bytes(bytes(len(good)))
    os.utime(trial.data / NAME / "50.png", ns=(status.st_atime_ns, status.st_mtime_ns))  # unchanged to the checksum
    assert trial.run().code == 1
    assert list((trial.cache / ".staging").iterdir()) == []
    (trial.data / NAME / "50.png").write_bytes(good)
    assert trial.finish() == list(range(FRAMES))


def test_force_rebuild_begins_anew_and_one_that_was_interrupted_goes_on(trial, expected):
    trial.interrupt(30)
    trial.interrupt(30, "--force-rebuild")
    assert trial.encoded[0] == 0
    assert trial.finish()[0] > 0
    check_same(trial.cache, expected)


def test_reset_begins_anew(trial):
    trial.interrupt(30)
    assert progress_utils.main(["reset", "--cache-dir", str(trial.cache), "--yes"]) == 0
    assert trial.finish() == list(range(FRAMES))


def test_limit_and_a_split_leave_what_they_do_not_take_up(trial, expected, tmp_path):
    trial.interrupt(30)
    make_trajectory(trial.data / "a", 20, stamp=2)  # before it in order
    assert trial.run("--limit", "1").code == 5
    assert trial.encoded[-1] == 19
    assert trial.finish()[0] == trial_first(30)
    shutil.rmtree(trial.cache / "a")
    check_same(trial.cache, expected)


def test_two_trajectories_never_share_what_is_begun(trial, expected):
    """Of the same poses and files, to the byte and the time of change."""
    shutil.copytree(trial.data / NAME, trial.data / "z")
    trial.interrupt(30)
    (trial.data / NAME).rename(trial.data / "other")
    trial.finish()
    assert sorted(read_progress(trial.cache)["completed_trajectories"]) == ["other", "z"]
    told = {
        (path.split("/")[0], attributes["trajectory"]) for path, (attributes, _) in cache_content(trial.cache).items()
    }
    assert told == {("other", "other"), ("z", "z")}


def test_dry_run_counts_what_is_left_and_writes_nothing(trial):
    trial.interrupt(30)
    before = tree(trial.cache)
    lines = trial.run("--dry-run").out
    assert f"frames to encode: {FRAMES - trial_first(30)}\n" in lines
    assert f"chunks to write: {len(SPANS) - durable_after(30)}\n" in lines
    assert tree(trial.cache) == before


def test_verify_knows_what_is_begun_and_repair_keeps_it(trial, capsys):
    trial.interrupt(30)
    (trial.cache / ".staging" / "junk").mkdir()
    for arguments, code in ((["--deep"], 1), (["--repair", "--yes"], 1), (["--deep"], 0)):
        assert progress_utils.main(["verify", "--cache-dir", str(trial.cache), *arguments]) == code
    assert ".staging/junk" in capsys.readouterr().out
    assert trial.finish()[0] == trial_first(30)


# ---------------------------------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------------------------------

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["h5py", "pydantic", "pytest", "torchvision.io", "torchvision.transforms.v2", "tqdm"])
IN_FLIGHT = 4  # batches between an encoder and the disk


def run_with(encoder: type[StampEncoder], config: Path) -> None:
    """A run in a process that was forked for it, with this encoder; what it says goes into <config>.log."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, dino_cache.HELD_SIGNALS)
    output = os.open(config.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    dino_cache.load_encoder = lambda spec, device: (encoder(spec.image_size, spec.tokens), "stamp" + spec.weights)
    dino_cache.model_shape = lambda model_type: STAMP_SHAPE
    sys.exit(dino_cache.main(["--config", str(config)]))


def run_until(config: Path, told: Path, last: int | None, then_s: float) -> None:
    """A run that kills itself, so long after it began to encode its frame number `last`; each is told in a file."""

    class FatalEncoder(PlainEncoder):
        def encode(self, pixels: Any) -> Any:
            if len(self.batch_sizes) == last:
                threading.Timer(then_s, os.kill, (os.getpid(), signal.SIGKILL)).start()
            with open(told, "a") as file:
                file.write("x")
            time.sleep(0.005)
            return super().encode(pixels)

    run_with(FatalEncoder, config)


@pytest.mark.slow
def test_ten_kills_at_random_cost_a_chunk_each_and_what_was_in_flight(trial, expected, tmp_path):
    told, moments = tmp_path / "told", random.Random(16)
    kills = 0
    for _ in range(10):
        process = FORKED.Process(
            target=run_until, args=(trial.config, told, moments.randint(8, 16), moments.uniform(0, 0.02))
        )
        process.start()
        process.join(60)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 5
    encoded = len(told.read_text()) + len(trial.finish())
    check_same(trial.cache, expected)
    assert encoded <= FRAMES + kills * (9 + IN_FLIGHT)


LONG = int(os.environ.get("LONG_FRAMES", "4000"))  # frames, not less; with 20000 it takes minutes
CHUNK, BATCH = LONG // 40, 16
BATCH_S = 0.004  # an encoder that a kill can still meet where it was meant to
MOST_LOST = CHUNK + IN_FLIGHT * BATCH  # by a kill
BEFORE_KILLS = (MOST_LOST + 1, LONG * 12 // 200)  # frames that a run encodes; by ten runs less than all


class PlainBitEncoder(BitEncoder, PlainEncoder):
    """Reads the numbers out of JPEGs, of which the whole 16 bits are the frame's."""


def run_long(config: Path, told: Path) -> None:
    """A run of which each frame is told in a file, by a byte, before it is encoded."""

    class TellingEncoder(PlainBitEncoder):
        def encode(self, pixels: Any) -> Any:
            with open(told, "ab") as file:
                file.write(b"x" * len(pixels))
            time.sleep(BATCH_S)
            return super().encode(pixels)

    run_with(TellingEncoder, config)


def make_long_trajectory(folder: Path) -> None:
    """LONG small JPEGs, 0.25 m apart."""
    folder.mkdir(parents=True)
    for number in range(LONG):
        (folder / f"{number}.jpg").write_bytes(encoded(render(0, number)))
    write_poses(folder, straight_line(LONG), np.zeros(LONG))


def check_numbers(content: dict[str, Any]) -> list[tuple[int, int]]:
    """Assert that each row of all chunks is its own frame's; returns where the chunks begin and end."""
    for _, datasets in content.values():
        tokens = datasets["cls_token"].astype(int)
        np.testing.assert_array_equal(tokens[:, 0] * 4096 + tokens[:, 1] * 256 + tokens[:, 2], datasets["frame_index"])
    return [(int(attributes["start"]), int(attributes["stop"])) for attributes, _ in content.values()]


@pytest.mark.slow
def test_ten_kills_in_a_long_trajectory_cost_ten_chunks_and_what_was_in_flight_at_most(tmp_path):
    data, cache, told = tmp_path / "data", tmp_path / "data" / "dino_cache_small", tmp_path / "told"
    make_long_trajectory(data / "long")
    distance = (CHUNK - 1) * 0.25 + 0.1  # CHUNK frames, not one more
    config = write_config(
        tmp_path / "long.yaml", data, batch_size=BATCH, resize="stretch", max_chunk_distance_m=distance
    )

    def start() -> Any:
        process = FORKED.Process(target=run_long, args=(config, told))
        process.start()
        return process

    undisturbed = start()
    undisturbed.join()
    assert undisturbed.exitcode == 0
    expected = cache_content(cache)
    spans = check_numbers(expected)
    assert (spans[0], spans[-1][1], max(stop - begin for begin, stop in spans)) == ((0, CHUNK), LONG, CHUNK)
    assert told.stat().st_size == LONG
    shutil.rmtree(cache)
    told.write_bytes(b"")

    moments = random.Random(20_000)
    for _ in range(10):
        before, process = told.stat().st_size, start()
        frames = moments.randint(*BEFORE_KILLS)
        while told.stat().st_size < before + frames:
            assert process.exitcode is None
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert chunk_files(cache) == []  # published whole, later
    last = start()
    last.join()
    assert last.exitcode == 0
    assert LONG < told.stat().st_size <= LONG + 10 * MOST_LOST
    check_same(cache, expected)
    assert list((cache / ".staging").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------------------------------


def test_a_lost_workers_chunks_go_to_the_next_one_and_it_can_write_no_more(trial, expected, tmp_path):
    """A worker stages in a folder of its own. When the driver takes it for dead, it may live on."""
    trial.interrupt(30)
    (journal,) = trial.journals
    driver = dino_cache.ChunkStore(trial.cache)
    staging = driver.new_staging_folder()
    (partial,) = progress_utils.find_partials(trial.cache / ".staging")
    progress_utils.move_partial(partial, staging / "tmp1")
    assert not journal.exists()
    driver.keep_partials(staging)
    driver.discard_staged([staging])
    assert trial.journals == [journal]
    with pytest.raises(FileNotFoundError):
        progress_utils.note_partial(staging / "tmp1", [{"bytes": 1}])
    assert trial.finish()[0] == trial_first(30)
    check_same(trial.cache, expected)


def test_staging_of_a_worker_that_was_killed_with_its_driver_is_looked_through(trial, expected):
    trial.interrupt(30)
    (partial,) = progress_utils.find_partials(trial.cache / ".staging")
    (trial.cache / ".staging" / "tmpworker").mkdir()
    progress_utils.move_partial(partial, trial.cache / ".staging" / "tmpworker" / "tmp1")
    assert trial.finish()[0] == trial_first(30)
    check_same(trial.cache, expected)


def test_links_in_staging_are_not_followed(trial, tmp_path):
    trial.interrupt(30)
    (partial,) = progress_utils.find_partials(trial.cache / ".staging")
    outside = tmp_path / "outside"
    outside.mkdir()
    progress_utils.move_partial(partial, outside / "tmp1")
    before = tree(outside)
    (trial.cache / ".staging" / "link").symlink_to(outside)
    assert trial.finish() == list(range(FRAMES))
    assert tree(outside) == before
