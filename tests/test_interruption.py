"""Runs that are killed or stopped, and what the next run makes of them."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dino_cache
import progress_utils
from support import (
    STAMP_SHAPE,
    StampEncoder,
    cache_command,
    cache_content,
    check_stamps,
    chunk_files,
    make_trajectory,
    read_chunk,
    read_progress,
    tree,
    wait_until,
    write_config,
)

# 16 frames, 0.25 m apart: with 2 m chunks that overlap by 0.5 m, frames 0-8 and 6-15, as 0.25 m more is less than min.
# Two batches each, so batches are full in every run, and their size, which is in the tokens too, is always the same.
FRAMES, CHUNKS = 16, 2

# ---------------------------------------------------------------------------------------------------------------------
# Runs in other processes, and what must hold whenever they end
# ---------------------------------------------------------------------------------------------------------------------

FORKED = multiprocessing.get_context("forkserver")  # imports torch, for seconds, once for all
FORKED.set_forkserver_preload(["h5py", "pydantic", "pytest", "torchvision.io", "torchvision.transforms.v2", "tqdm"])


def forked_run(config: Path, batch_seconds: float, fatal_batch: int | None, fatal_second: float) -> None:
    """dino_cache.py with a slow StampEncoder, output beside the config.

    It kills itself `fatal_second` after `fatal_batch` was begun, counted from 0.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, dino_cache.HELD_SIGNALS)  # held back if readers came first to FORKED
    descriptor = os.open(config.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    progress_utils.SAVE_SHARE = 1e9  # saved after each trajectory, as in any run that is longer than these

    class SlowStampEncoder(StampEncoder):
        def encode(self, pixels: Any) -> Any:
            print("batch begun", flush=True)
            if len(self.batch_sizes) == fatal_batch:
                threading.Timer(fatal_second, os.kill, (os.getpid(), signal.SIGKILL)).start()
            time.sleep(batch_seconds)
            return super().encode(pixels)

    def load_encoder(spec: dino_cache.CacheSpec, device: str) -> tuple[StampEncoder, str]:
        return SlowStampEncoder(spec.image_size, spec.tokens), "stamp" + spec.weights

    dino_cache.load_encoder = load_encoder
    dino_cache.model_shape = lambda model_type: STAMP_SHAPE
    sys.exit(dino_cache.main(["--config", str(config)]))


def start_forked(
    config: Path, batch_seconds: float, fatal_batch: int | None = None, fatal_second: float = 0.0
) -> BaseProcess:
    process = FORKED.Process(target=forked_run, args=(config, batch_seconds, fatal_batch, fatal_second))
    process.start()
    return process


@contextmanager
def stuck_run(config: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A run that works on its first batch for longer than any test takes; output beside the config."""
    log, environment = config.with_suffix(".log"), {**os.environ, "STAMP_BATCH_SECONDS": "600"}
    with open(log, "wb") as output:
        process = subprocess.Popen(cache_command(config), stdout=output, stderr=output, env=environment)
    try:
        wait_until(lambda: "batch begun" in log.read_text(), 120)
        yield process
    finally:
        process.kill()
        process.wait()


def make_dataset(tmp_path: Path, names: int) -> tuple[Path, Path]:
    """Data of t0, t1, ... and the config of its cache; returns config and cache."""
    for number in range(names):
        make_trajectory(tmp_path / "data" / f"t{number}", FRAMES, stamp=number)
    return write_config(tmp_path / "robot.yaml", tmp_path / "data"), tmp_path / "data" / "dino_cache_small"


def undisturbed_content(run_here: Callable[..., Any], config: Path, cache: Path) -> dict[str, Any]:
    """What a run in one go makes of the data; there is no cache afterwards."""
    assert run_here(config).code == 0
    content = cache_content(cache)
    shutil.rmtree(cache)
    return content


def recorded(cache: Path) -> list[str]:
    """The names of what is completed: each listed once, nothing failed, and all chunks there as the record says."""
    if not (cache / "progress.json").exists():
        return []
    progress = read_progress(cache)
    names = progress["completed_trajectories"]
    assert len(set(names)) == len(names)
    assert progress["failed_trajectories"] == []
    for name in names:
        entry, chunks = progress["trajectory_records"][name], chunk_files(cache / name)
        assert [path.stat().st_size for path in chunks] == entry["bytes"]
        for path, span in zip(chunks, entry["spans"], strict=True):
            attributes, datasets = read_chunk(path)
            assert attributes["trajectory_checksum"] == progress["trajectory_checksums"][name]
            np.testing.assert_array_equal(datasets["frame_index"], np.arange(*span))
        check_stamps(cache, name, int(name[1:]))
    return sorted(names)


def check_finished(cache: Path, expected: dict[str, Any]) -> None:
    """The cache is that of an undisturbed run, attribute for attribute and row for row, and nothing is left over."""
    content = cache_content(cache)
    assert content.keys() == expected.keys()
    for name, (attributes, datasets) in content.items():
        assert attributes == expected[name][0]
        assert datasets.keys() == expected[name][1].keys()
        for key, values in datasets.items():
            known = (
                ... if values.ndim < 2 or not key.endswith("_token") else np.s_[..., :3]
            )  # the last tells of batches
            np.testing.assert_array_equal(values[known], expected[name][1][key][known])
    assert recorded(cache) == sorted({str(Path(name).parent) for name in expected})
    assert list((cache / ".staging").iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Killed
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_five_kills_at_random_moments_leave_what_an_undisturbed_run_makes(tmp_path, run_here):
    config, cache = make_dataset(tmp_path, names=22)  # 44 batches, more than five runs live to do
    expected = undisturbed_content(run_here, config, cache)
    assert len(expected) == 22 * CHUNKS
    moments, before = random.Random(20220110), []
    for _ in range(5):
        process = start_forked(config, 0.05, moments.randint(5, 7), moments.uniform(0.0, 0.05))
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        after = recorded(cache)
        assert set(before) < set(after)  # of five whole batches, with at most three on the way, one trajectory's are in
        before = after
    assert len(before) < 22
    outcome = run_here(config)
    assert outcome.code == 0
    assert f"Loaded existing progress: {len(before)} trajectories completed" in outcome.out
    check_finished(cache, expected)


# ---------------------------------------------------------------------------------------------------------------------
# Stopped
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
        pytest.param(signal.SIGXCPU, 152, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_command_with_its_code_and_the_next_run_resumes(tmp_path, run_here, number, code):
    config, cache = make_dataset(tmp_path, names=10)
    expected = undisturbed_content(run_here, config, cache)
    with subprocess.Popen(
        cache_command(config),
        env={**os.environ, "STAMP_BATCH_SECONDS": "0.5"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(lambda: chunk_files(cache))
        process.send_signal(number)
        _, messages = process.communicate(timeout=60)
    assert process.returncode == code
    assert "run the same command again" in messages
    assert "Traceback" not in messages
    assert list((cache / ".staging").iterdir()) == []
    done = len(recorded(cache))
    assert 1 <= done < 10
    outcome = run_here(config)
    assert outcome.code == 0
    assert f"Resuming processing: {done}/10 trajectories completed" in outcome.out
    check_finished(cache, expected)


@pytest.mark.parametrize("batch", [0, 1, 4, 9])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_a_signal_in_any_batch_drops_or_finishes_what_is_in_flight(
    tmp_path, run_here, monkeypatch, batch, number, code
):
    config, cache = make_dataset(tmp_path, names=6)
    expected = undisturbed_content(run_here, config, cache)
    encode = StampEncoder.encode

    def interrupted(self: StampEncoder, pixels: Any) -> Any:
        if len(self.batch_sizes) == batch:
            os.kill(os.getpid(), number)
        return encode(self, pixels)

    with monkeypatch.context() as patch:
        patch.setattr(StampEncoder, "encode", interrupted)
        assert run_here(config).code == code
    assert len(recorded(cache)) in (batch // 2, (batch + 1) // 2)  # two batches a trajectory; this one counts or not
    assert len(chunk_files(cache)) == CHUNKS * len(recorded(cache))
    assert list((cache / ".staging").iterdir()) == []
    assert run_here(config).code == 0
    check_finished(cache, expected)


def test_a_signal_before_the_work_begins_leaves_everything_as_it_was(tmp_path, run_here, encoders, monkeypatch):
    config, cache = make_dataset(tmp_path, names=2)
    assert run_here(config, "--limit", "1").code == 5
    before = tree(cache)
    encoders.clear()

    def interrupted(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return StampEncoder(), "stamprandom"

    monkeypatch.setattr("dino_cache.load_encoder", interrupted)
    assert run_here(config).code == 143
    assert tree(cache) == before


def test_a_second_signal_stops_at_once(tmp_path):
    config, _ = make_dataset(tmp_path, names=1)
    with stuck_run(config) as process:
        os.kill(process.pid, signal.SIGTERM)
        wait_until(lambda: "Stopping" in config.with_suffix(".log").read_text())
        assert process.poll() is None
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(60) == 143


COMPANY = [  # signals that come together; a second one that insists ends the run with its own code
    ([signal.SIGHUP, signal.SIGHUP], None),  # a terminal that is closed, and its shell
    ([signal.SIGUSR1, signal.SIGTERM], None),  # a scheduler: a warning, then the end of the time
    ([signal.SIGXCPU, signal.SIGXCPU, signal.SIGUSR2, signal.SIGINT], None),
    ([signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM], 143),
    ([signal.SIGINT, signal.SIGTERM], 143),
    ([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT], 130),
]


@pytest.mark.parametrize(("numbers", "code"), COMPANY, ids=str)
def test_only_a_second_sigint_or_sigterm_stops_at_once(numbers, code, monkeypatch):
    before = {number: signal.getsignal(number) for number in dino_cache.STOP_SIGNALS}

    class ProcessEnded(Exception):
        pass

    def end(status: int) -> None:
        raise ProcessEnded(status)

    monkeypatch.setattr(os, "_exit", end)
    stop_request = dino_cache.StopRequest(None)
    stop_request.install()
    try:
        for number in numbers[:-1]:
            os.kill(os.getpid(), number)
        if code is None:
            os.kill(os.getpid(), numbers[-1])
            assert stop_request.exit_code == 128 + numbers[0]
        else:
            with pytest.raises(ProcessEnded, match=f"^{code}$"):
                os.kill(os.getpid(), numbers[-1])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# A shell's nohup, or its background job: the signal is ignored in what is begun.
WITH_IGNORED = (
    "import os, signal, sys; signal.signal(int(sys.argv[1]), signal.SIG_IGN); os.execv(sys.argv[2], sys.argv[2:])"
)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_a_signal_that_came_ignored_stays_ignored(tmp_path, run_here, number):
    config, cache = make_dataset(tmp_path, names=2)
    expected = undisturbed_content(run_here, config, cache)
    with subprocess.Popen(
        [sys.executable, "-c", WITH_IGNORED, str(int(number)), *cache_command(config)],
        env={**os.environ, "STAMP_BATCH_SECONDS": "0.3"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        wait_until(lambda: "Processing" in process.stdout.readline())
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == 0
    check_finished(cache, expected)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_a_run_whose_console_is_dead_and_the_next_one_resumes(tmp_path, run_here, number, code):
    config, cache = make_dataset(tmp_path, names=6)
    expected = undisturbed_content(run_here, config, cache)
    with subprocess.Popen(
        cache_command(config),
        env={**os.environ, "STAMP_BATCH_SECONDS": "0.3"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:
        wait_until(lambda: chunk_files(cache))
        process.stdout.close()  # as `2>&1 | tee` that is killed
        process.send_signal(number)
        assert process.wait(60) == code
    assert "Stopped by a signal" in (cache / "dino_cache.log").read_text()
    assert 1 <= len(recorded(cache)) < 6
    assert run_here(config).code == 0
    check_finished(cache, expected)


def test_a_second_run_is_refused_at_once_and_told_who_works(tmp_path, run_here, encoders):
    config, cache = make_dataset(tmp_path, names=1)
    with stuck_run(config) as process:
        before = tree(cache)
        outcome = run_here(config)
        assert outcome.code == 4
        assert f"pid {process.pid} " in outcome.err
        assert encoders == []
        assert tree(cache) == before
        assert process.poll() is None
    assert run_here(config).code == 0  # the dead one's lock is gone with it
    assert recorded(cache) == ["t0"]
