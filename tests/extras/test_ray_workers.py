"""executor: ray: the same caches from many workers, whatever happens to them.

Without Ray the tests of the work's division still run. The runs share one cluster of this machine, with made-up nodes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import dino_cache
from dino_cache import RunOptions, Trajectory
from dino_cache_extras.ray_workers import Assignment, WorkQueue, plan_workers
from progress_utils import RefusedError
from support import (
    REAL,
    ROOT,
    StampEncoder,
    cache_command,
    cache_content,
    check_stamps,
    chunk_files,
    make_trajectory,
    read_progress,
    run_cache,
    straight_line,
    tree,
    wait_until,
    write_config,
    write_poses,
)

FRAMES = 16  # two batches and two chunks

try:
    import ray
    from ray.cluster_utils import Cluster
except ImportError:
    ray = None

needs_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed: pip install -r requirements-ray.txt")

# ---------------------------------------------------------------------------------------------------------------------
# Dividing the work: no Ray
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "settings", "plan"),
    [
        ([(2, 0)], {}, ("cpu", 1, 2)),
        ([(64, 0), (64, 0)], {}, ("cpu", 32, 4)),
        ([(7, 0), (9, 0)], {"cpus_per_worker": 4}, ("cpu", 3, 4)),
        ([(7, 0), (9, 0)], {"cpus_per_worker": 4, "num_workers": 2}, ("cpu", 2, 4)),
        ([(2, 0)], {"num_workers": 2}, ("cpu", 2, 1)),  # what there is, divided
        ([(7, 0), (4, 0)], {"num_workers": 3}, ("cpu", 3, 3)),
        ([(64, 0)], {"num_workers": 2}, ("cpu", 2, 4)),  # no more than without a number
        ([(8, 4), (2, 4)], {"num_workers": 6}, ("cuda", 6, 1)),
        ([(64, 8)], {}, ("cuda", 8, 8)),
        ([(64, 8), (16, 4), (0, 0), (128, 0)], {}, ("cuda", 12, 4)),
        ([(64, 8)], {"device": "cuda", "num_workers": 3}, ("cuda", 3, 8)),
        ([(64, 8)], {"device": "cpu", "cpus_per_worker": 16}, ("cpu", 4, 16)),
        ([(12, 8)], {"cpus_per_worker": 2}, ("cuda", 6, 2)),
        ([(4, 8)], {}, ("cuda", 4, 1)),
    ],
)
def test_auto_is_a_worker_a_gpu_and_without_gpus_what_the_cores_hold(nodes, settings, plan):
    resources = [{"CPU": float(cores), "GPU": float(gpus), "memory": 1e9} for cores, gpus in nodes]
    assert plan_workers(resources, RunOptions(**settings)) == plan


def test_keys_that_a_node_lacks_count_as_nothing():
    assert plan_workers([{"memory": 1e9}, {"CPU": 4.0}], RunOptions()) == ("cpu", 1, 4)


@pytest.mark.parametrize(
    ("nodes", "settings", "message"),
    [
        ([(8, 0)], {"device": "cuda"}, "device: cuda: the Ray cluster has no GPU"),
        ([(8, 2)], {"device": "cuda:1"}, "device: cuda:1: .* each worker gets a GPU"),
        ([(8, 0)], {"num_workers": 3, "cpus_per_worker": 4}, "num_workers: 3 .* room for 2 workers, each with 4 CPU"),
        ([(8, 0)], {"cpus_per_worker": 16}, "cpus_per_worker: 16: .* room for 0 workers"),
        ([(64, 8)], {"num_workers": 9}, "num_workers: 9 .* room for 8 workers, each with 8 CPU cores and a GPU"),
    ],
)
def test_more_than_the_cluster_has_is_refused(nodes, settings, message):
    resources = [{"CPU": float(cores), "GPU": float(gpus)} for cores, gpus in nodes]
    with pytest.raises(RefusedError, match=message):
        plan_workers(resources, RunOptions(**settings))


def assignments(*frames: int) -> list[Assignment]:
    return [
        Assignment(Trajectory(f"t{index}", Path("/data") / f"t{index}"), count) for index, count in enumerate(frames)
    ]


def names(share: list[Assignment]) -> list[str]:
    return [assignment.trajectory.name for assignment in share]


def test_a_worker_gets_one_long_trajectory_or_many_short_ones():
    queue = WorkQueue(assignments(9000, 9000, *[100] * 300), num_workers=2)
    assert names(queue.take("a")) == ["t0"]
    assert names(queue.take("b")) == ["t1"]
    assert len(queue.take("a")) == 20  # 2048 frames


def test_a_worker_holds_no_more_than_half_its_share():
    queue = WorkQueue(assignments(*[100] * 40), num_workers=2)
    held = []
    while share := queue.take("a"):
        held += share
    assert len(held) == 15  # five at once, until it has more than 1000 frames


def test_the_last_trajectories_are_for_workers_that_have_nothing():
    queue = WorkQueue(assignments(9000, 9000, 9000), num_workers=3)
    assert names(queue.take("a", idle=2)) == ["t0"]
    assert queue.take("a", idle=2) == []
    assert names(queue.take("b", idle=1)) == ["t1"]
    assert names(queue.take("c", idle=0)) == ["t2"]


def test_shares_shrink_so_that_all_end_together():
    queue = WorkQueue(assignments(*[100] * 40), num_workers=2)
    assert len(queue.take("a")) == 5  # of 4000 frames for two a quarter of a half


def test_what_was_in_flight_is_tried_alone_and_fails_at_the_second_death():
    queue = WorkQueue(assignments(*[10] * 20), num_workers=1)
    first = names(queue.take("a"))
    queue.finish("a", first[0])
    while share := queue.take("a"):
        first += names(share)
    back, fatal = queue.lose("a", "node", {"node"})
    assert names(back) == first[1:]
    assert fatal == []
    for number, name in enumerate(first[1:]):
        worker = f"b{number}"
        assert names(queue.take(worker)) == [name]
        assert queue.take(worker) == []  # alone
        if number == 0:
            back, fatal = queue.lose(worker, "node", {"node"})
            assert (back, names(fatal)) == ([], [name])
        else:
            queue.finish(worker, name)
    assert names(queue.take("c")) == [f"t{len(first)}"]  # then what nobody had


def test_a_death_with_its_node_is_nobodys_fault():
    queue = WorkQueue(assignments(10), num_workers=1)
    for node in ("n1", "n2", "n3"):
        assert names(queue.take(node)) == ["t0"]
        back, fatal = queue.lose(node, node, {"n4"})
        assert (names(back), fatal) == (["t0"], [])
    assert names(queue.take("w")) == ["t0"]
    queue.lose("w", "n4", {"n4"})
    assert names(queue.take("w2")) == ["t0"]
    assert names(queue.lose("w2", "n4", {"n4"})[1]) == ["t0"]


@settings(deadline=None)
@given(st.data())
def test_every_trajectory_is_finished_or_fatal_exactly_once_whoever_dies(data):
    frames = data.draw(st.lists(st.integers(0, 3000), max_size=40))
    killers = {f"t{number}" for number in data.draw(st.sets(st.integers(0, 39), max_size=5))}
    workers = ["w0", "w1", "w2"]
    queue, done, failed = WorkQueue(assignments(*frames), 3), [], []
    held: dict[str, list[str]] = {worker: [] for worker in workers}
    while not queue.is_done:
        worker = data.draw(st.sampled_from(workers))
        held[worker] += names(queue.take(worker, idle=sum(not held[other] for other in workers if other != worker)))
        if not held[worker]:
            continue
        dies = held[worker][0] in killers or (killers & {*held[worker]} and data.draw(st.booleans()))
        if dies:
            back, fatal = queue.lose(worker, "node", {"node"})
            assert names(back + fatal) == held[worker]
            failed += names(fatal)
            held[worker] = []
        else:
            done.append(held[worker].pop(0))
            queue.finish(worker, done[-1])
    assert sorted(done + failed) == sorted(f"t{index}" for index in range(len(frames)))
    assert {*failed} == killers & {f"t{index}" for index in range(len(frames))}


def test_a_long_trajectory_counts_for_several_ahead():
    pulled = []

    def items() -> Iterator[int]:
        for weight in (1, 1, 1, 9, 9, 1):
            pulled.append(weight)
            yield weight

    with dino_cache.ThreadPoolExecutor(2) as pool:
        results = dino_cache.prefetch(lambda weight: weight, items(), pool, 4, weigh=lambda weight: weight)
        ahead = [(next(results), len(pulled) - number) for number in range(1, 7)]
    assert ahead == [(1, 3), (1, 2), (1, 1), (9, 1), (9, 1), (1, 0)]


# ---------------------------------------------------------------------------------------------------------------------
# Without Ray, and without workers
# ---------------------------------------------------------------------------------------------------------------------


def test_without_ray_the_run_is_refused_with_the_command_that_installs_it(tmp_path, run_here, monkeypatch):
    make_trajectory(tmp_path / "data" / "t0", FRAMES)
    config = write_config(tmp_path / "robot.yaml", tmp_path / "data", executor="ray")
    monkeypatch.setitem(sys.modules, "ray", None)
    outcome = run_here(config)
    assert outcome.code == 2
    assert "pip install -r requirements-ray.txt" in outcome.err
    assert chunk_files(tmp_path) == []
    assert not (tmp_path / "data" / "dino_cache_small" / "progress.json").exists()


def test_a_dry_run_asks_no_cluster(tmp_path, run_here, monkeypatch):
    make_trajectory(tmp_path / "data" / "t0", FRAMES)
    config = write_config(tmp_path / "robot.yaml", tmp_path / "data", executor="ray", precision="auto", batch_size=4)
    monkeypatch.setitem(sys.modules, "ray", None)
    for measure in ([], ["--measure"]):
        outcome = run_here(config, "--dry-run", *measure)
        assert outcome.code == 0
        assert "frames to encode: 16" in outcome.out
    assert "in one process, without Ray" in outcome.out


def test_a_local_run_says_how_to_use_the_other_gpus(tmp_path, run_here, monkeypatch):
    make_trajectory(tmp_path / "data" / "t0", FRAMES)
    config = write_config(tmp_path / "robot.yaml", tmp_path / "data", device="auto")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    outcome = run_here(config)
    assert outcome.code == 0
    assert "4 GPUs are visible and one of them is used; `executor: ray`" in outcome.err
    assert "requirements-ray.txt" in outcome.err


def test_datasets_that_want_different_workers_are_refused(tmp_path, run_here):
    make_trajectory(tmp_path / "a" / "t0", FRAMES)
    make_trajectory(tmp_path / "b" / "t0", FRAMES)
    config = write_config(tmp_path / "robot.yaml", tmp_path / "a", executor="ray")
    content = yaml.safe_load(config.read_text())
    content["datasets"]["other"] = {"data_folder": str(tmp_path / "b"), "num_workers": 1}
    config.write_text(yaml.safe_dump(content, sort_keys=False))
    outcome = run_here(config)
    assert outcome.code == 2
    assert "num_workers: auto, 1: a run's datasets share its Ray workers" in outcome.err


def test_a_worker_that_outlived_its_driver_publishes_nothing(tmp_path, run_here):
    """Its next chunk, its rename into place and its replacing of what is there all fail once a new run has begun."""
    make_trajectory(tmp_path / "data" / "t0", FRAMES, stamp=7)
    config, cache = write_config(tmp_path / "robot.yaml", tmp_path / "data"), tmp_path / "data" / "dino_cache_small"
    cache.mkdir()
    driver = dino_cache.ChunkStore(cache)
    driver.empty_staging()
    orphan = dino_cache.ChunkStore(cache, driver.new_staging_folder())
    staged = orphan.new_staging_folder()
    (staged / "chunk_00000.h5").write_bytes(b"of an orphan")
    for existing in (False, True):
        if existing:
            assert run_here(config).code == 0
        else:
            driver.empty_staging()  # as a new run does
        before = tree(cache)
        with pytest.raises(FileNotFoundError):
            orphan.publish(staged, "t0", lambda name: None)
        with pytest.raises(FileNotFoundError):
            orphan.new_staging_folder()
        assert tree(cache) == before
    assert check_stamps(cache, "t0", stamp=7) > 0


# ---------------------------------------------------------------------------------------------------------------------
# Real workers
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A Ray cluster of one node with two cores; processes that Ray starts find these tests' modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 << 20},
        )
        yield cluster
        cluster.shutdown()


class Lab:
    """A dataset t00, t01, ..., stamped with their numbers, its config, and what its encoders do."""

    def __init__(self, folder: Path, address: str, monkeypatch: pytest.MonkeyPatch, run_here: Callable[..., Any]):
        self.folder, self.data, self.cache = folder, folder / "data", folder / "data" / "dino_cache_small"
        self.config = folder / "robot.yaml"
        self.address, self._patch, self._run_here = address, monkeypatch, run_here
        (folder / "pids").mkdir()

    def add(self, count: int, frames: int = FRAMES) -> None:
        for number in range(count):
            make_trajectory(self.data / f"t{number:02d}", frames, stamp=number)
        self.configure()

    def configure(self, **settings: Any) -> None:
        ray_settings = {"executor": "ray", "ray_address": self.address, "cpus_per_worker": 1}
        write_config(self.config, self.data, **{**ray_settings, **settings})

    def run(self, *arguments: str, batch_s: float = 0.0, on_batch: Callable[[set[int]], None] = lambda stamps: None):
        """dino_cache.py in this process. In the workers each batch takes so long, and `on_batch` is told its stamps."""
        pids, driver = self.folder / "pids", os.getpid()

        def load(spec: dino_cache.CacheSpec, device: str) -> tuple[StampEncoder, str]:
            class WatchedEncoder(StampEncoder):
                def encode(self, pixels: torch.Tensor) -> Any:
                    on_batch(set(pixels[:, 0, 0, 0].tolist()))
                    time.sleep(batch_s)
                    return super().encode(pixels)

            if os.getpid() != driver:
                (pids / str(os.getpid())).touch()
            return WatchedEncoder(spec.image_size, spec.tokens), "stamp" + spec.weights

        self._patch.setattr(dino_cache, "load_encoder", load)
        self._patch.setattr("progress_utils.SAVE_SHARE", 1e9)  # saved after each trajectory
        return self._run_here(self.config, *arguments)

    def worker_pids(self) -> list[int]:
        return [int(path.name) for path in (self.folder / "pids").iterdir()]

    def kill_a_worker(self) -> None:
        os.kill(max(self.worker_pids()), signal.SIGKILL)

    def log(self) -> str:
        return (self.cache / "dino_cache.log").read_text()

    def check_complete(self, count: int, *missing: int) -> None:
        """Every trajectory but the missing ones is recorded, with each frame's own tokens, and nothing is left over."""
        progress = read_progress(self.cache)
        expected = [number for number in range(count) if number not in missing]
        assert sorted(progress["completed_trajectories"]) == [f"t{number:02d}" for number in expected]
        for number in expected:
            name = f"t{number:02d}"
            assert check_stamps(self.cache, name, number) > 0
            sizes = [path.stat().st_size for path in chunk_files(self.cache / name)]
            assert sizes == progress["trajectory_records"][name]["bytes"]
        assert list((self.cache / ".staging").iterdir()) == []


@pytest.fixture
def lab(cluster, tmp_path, run_here, monkeypatch) -> Lab:
    return Lab(tmp_path, cluster.address, monkeypatch, run_here)


@contextlib.contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Do something in another thread; what it raises, fails the test."""
    with dino_cache.ThreadPoolExecutor(1) as pool:
        done = pool.submit(action)
        yield
        done.result()


def same_but_batches(content: dict[str, Any]) -> dict[str, Any]:
    """Without the size of the batch that a frame was in, which a StampEncoder puts into the last column."""
    for _, datasets in content.values():
        datasets["cls_token"] = datasets["cls_token"][:, :3]
    return content


def check_equal(content: dict[str, Any], expected: dict[str, Any], tolerance: float = 0.0) -> None:
    """Attributes and poses are the same, tokens within `tolerance`, relative and absolute."""
    assert content.keys() == expected.keys()
    assert content
    for name, (attributes, datasets) in content.items():
        assert attributes == expected[name][0]
        assert datasets.keys() == expected[name][1].keys()
        for key, values in datasets.items():
            if key.endswith(("token", "tokens")):
                np.testing.assert_allclose(values, expected[name][1][key], rtol=tolerance, atol=tolerance)
            else:
                np.testing.assert_array_equal(values, expected[name][1][key])


@contextlib.contextmanager
def ray_nodes(cluster: Any) -> Iterator[Callable[[], list[Any]]]:
    """Tells the live nodes of a cluster."""
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    try:
        yield lambda: [node for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


@pytest.mark.slow
@needs_ray
def test_a_ray_run_with_a_limit_and_its_rest_equal_a_local_run_with_failures_and_changed_data(lab):
    def warn(stamps: set[int]) -> None:
        if 3 in stamps:
            logging.getLogger("dino_cache").warning("stamp 3 is on its way")

    lab.add(10)
    write_poses(lab.data / "t04", straight_line(FRAMES + 1), np.zeros(FRAMES))
    lab.configure(executor="local")
    assert lab.run().code == 1
    expected = same_but_batches(cache_content(lab.cache))
    local = read_progress(lab.cache)
    shutil.rmtree(lab.cache)
    lab.configure()
    outcome = lab.run("--limit", "6", on_batch=warn)
    assert outcome.code == 1  # one failed, and four are left
    assert len(read_progress(lab.cache)["completed_trajectories"]) == 5
    assert "2 Ray workers, each with 1 CPU cores" in outcome.out
    assert [line for line in lab.log().splitlines() if "[worker-" in line and "WARNING" in line and "stamp 3" in line]
    outcome = lab.run()
    assert outcome.code == 1
    assert "Resuming processing: 5/10 trajectories completed" in outcome.out
    check_equal(same_but_batches(cache_content(lab.cache)), expected)
    lab.check_complete(10, 4)
    progress = read_progress(lab.cache)
    for key in ("trajectory_checksums", "trajectory_records", "processing_config", "specs", "weights", "total_chunks"):
        assert progress[key] == local[key]
    assert progress["failures"]["t04"]["reason"] == local["failures"]["t04"]["reason"]
    assert "plan_trajectory" in lab.log()  # the traceback, from the worker


@pytest.mark.slow
@needs_ray
@pytest.mark.skipif(not REAL.is_dir(), reason=f"the real recordings are not in {REAL}")
def test_a_ray_run_over_real_and_sample_datasets_equals_a_local_run(cluster, tmp_path):
    """The command itself, with the real model: the recordings' datasets and the committed sample."""
    folders = {
        folder.name: folder for folder in (*REAL.iterdir(), ROOT / "sample" / "rendered_rooms") if folder.is_dir()
    }
    config = {
        "dino_model_type": "small",
        "weights": "random",
        "tokens": ["cls", "patch"],
        "image_size": [42, 56],
        "frame_stride": 3,
    }
    config |= {"device": "cpu", "precision": "fp32", "max_chunk_distance_m": 4.0, "batch_size": 16}
    contents = {}
    for executor in ("local", "ray"):
        caches = {name: tmp_path / executor / name for name in folders}
        places = {name: {"data_folder": str(folders[name]), "cache_dir": str(caches[name])} for name in folders}
        how = {"executor": executor, "ray_address": cluster.address, "cpus_per_worker": 1}
        path = tmp_path / f"{executor}.yaml"
        path.write_text(yaml.safe_dump({**config, **how, "datasets": places}))
        run = run_cache(path, fake=False)
        assert run.returncode == 0, run.stderr
        contents[executor] = {name: cache_content(cache) for name, cache in caches.items()}
    assert len(contents["ray"]) == 4
    for name in folders:
        check_equal(contents["ray"][name], contents["local"][name], tolerance=2e-3)  # float16 rounds to 1e-3


@pytest.mark.slow
@needs_ray
def test_changed_data_is_un_recorded_before_its_chunks_are_replaced(lab, monkeypatch):
    lab.add(3)
    lab.configure(executor="local")
    assert lab.run().code == 0
    lab.configure(num_workers=1)
    old = chunk_files(lab.cache / "t01")[0].read_bytes()
    write_poses(lab.data / "t01", straight_line(FRAMES, step_m=0.2), np.zeros(FRAMES))
    at_withdrawal = []

    def withdraw(run: dino_cache.DatasetRun, name: str) -> None:
        withdraw_plainly(run, name)
        at_withdrawal.append((name, name in read_progress(lab.cache)["completed_trajectories"]))
        assert chunk_files(lab.cache / name)[0].read_bytes() == old

    withdraw_plainly = dino_cache.DatasetRun._withdraw
    monkeypatch.setattr(dino_cache.DatasetRun, "_withdraw", withdraw)
    assert lab.run().code == 0
    assert at_withdrawal == [("t01", False)]
    assert chunk_files(lab.cache / "t01")[0].read_bytes() != old
    lab.check_complete(3)


@pytest.mark.slow
@needs_ray
def test_a_killed_worker_loses_nothing(lab):
    lab.add(24)

    def kill() -> None:
        wait_until(lambda: len(chunk_files(lab.cache)) > 4, 240)
        lab.kill_a_worker()

    with meanwhile(kill):
        assert lab.run(batch_s=0.1).code == 0
    lab.check_complete(24)
    assert "died; " in lab.log()


@pytest.mark.slow
@needs_ray
def test_a_trajectory_that_kills_its_worker_twice_fails_and_the_rest_goes_on(lab):
    lab.add(8)
    lab.configure(num_workers=1)

    def die(stamps: set[int]) -> None:
        if 5 in stamps:
            os.kill(os.getpid(), signal.SIGKILL)

    outcome = lab.run(on_batch=die)
    assert outcome.code == 1
    lab.check_complete(8, 5)
    assert len(lab.worker_pids()) == 3  # the first and two in its place
    failure = read_progress(lab.cache)["failures"]["t05"]
    assert "t05: killed its worker twice" in failure["reason"]
    listing = dino_cache.list_trajectory(Trajectory("t05", lab.data / "t05"), dino_cache.FRAME_PATTERN)
    assert failure["checksum"] == dino_cache.trajectory_checksum(listing, "stat")  # so its attempts are counted


@pytest.mark.slow
@needs_ray
def test_a_device_fault_stops_the_run_and_blames_no_trajectory(lab):
    lab.add(6)
    lab.configure(num_workers=1)

    def fail(stamps: set[int]) -> None:
        if 3 in stamps:
            raise RuntimeError("out of order")

    outcome = lab.run(on_batch=fail)
    assert outcome.code == 3
    assert "the encoder failed: out of order" in outcome.err
    progress = read_progress(lab.cache)
    assert progress["failures"] == {}
    assert "t03" not in progress["completed_trajectories"]


@pytest.mark.slow
@needs_ray
def test_other_weights_on_a_worker_are_refused(lab, monkeypatch):
    lab.add(2)
    lab.configure(num_workers=1)
    driver = os.getpid()

    def load(spec: dino_cache.CacheSpec, device: str) -> tuple[StampEncoder, str]:
        return StampEncoder(spec.image_size, spec.tokens), "mine" if os.getpid() == driver else "theirs"

    monkeypatch.setattr(dino_cache, "load_encoder", load)
    outcome = lab._run_here(lab.config)
    assert outcome.code == 2
    assert "worker-" in outcome.err
    assert "has digest theirs here, mine at the driver" in outcome.err
    assert chunk_files(lab.cache) == []


@pytest.mark.slow
@needs_ray
def test_a_killed_driver_leaves_a_cache_that_the_next_run_finishes_at_once(lab):
    lab.add(12)
    lab.configure(num_workers=1)
    environment = {**os.environ, "STAMP_BATCH_SECONDS": "0.1"}
    with subprocess.Popen(cache_command(lab.config), env=environment, stdout=subprocess.DEVNULL) as driver:
        wait_until(lambda: chunk_files(lab.cache) and read_progress(lab.cache)["completed_trajectories"])
        driver.kill()
    done = read_progress(lab.cache)["completed_trajectories"]
    outcome = lab.run()
    assert outcome.code == 0
    assert f"Resuming processing: {len(done)}/12" in outcome.out
    lab.check_complete(12)


@pytest.mark.slow
@needs_ray
def test_sigterm_stops_the_workers_and_the_run_resumes(lab):
    lab.add(24)

    def stop() -> None:
        wait_until(lambda: len(chunk_files(lab.cache)) > 4, 240)
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(stop):
        outcome = lab.run(batch_s=0.1)
    assert outcome.code == 143
    assert "run the same command again" in outcome.err
    done = [int(name[1:]) for name in read_progress(lab.cache)["completed_trajectories"]]
    assert 2 <= len(done) < 24
    lab.check_complete(24, *({*range(24)} - {*done}))
    assert sorted({path.parent.name for path in chunk_files(lab.cache)}) == sorted(f"t{number:02d}" for number in done)


@pytest.mark.slow
@needs_ray
def test_ctrl_c_on_a_run_that_started_ray_itself_ends_it_with_its_code(tmp_path):
    for index in range(12):
        make_trajectory(tmp_path / "data" / f"t{index:02d}", FRAMES, stamp=index)
    config = write_config(tmp_path / "robot.yaml", tmp_path / "data", executor="ray", num_workers=1)
    cache = tmp_path / "data" / "dino_cache_small"
    with subprocess.Popen(
        cache_command(config),
        env={**os.environ, "STAMP_BATCH_SECONDS": "0.2"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        wait_until(lambda: chunk_files(cache))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, Ray's processes included
        _, messages = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "run the same command again" in messages
    assert "Traceback" not in messages
    assert 0 < len(read_progress(cache)["completed_trajectories"]) < 12
    assert list((cache / ".staging").iterdir()) == []


@pytest.mark.slow
@needs_ray
def test_a_node_that_is_lost_loses_nothing(lab, cluster):
    lab.add(12)
    node = cluster.add_node(num_cpus=1, object_store_memory=80 << 20)

    def lose_it() -> None:
        wait_until(lambda: len(chunk_files(lab.cache)) > 4, 240)
        raylet = node.all_processes["raylet"][0].process.pid
        lost = [pid for pid in lab.worker_pids() if f"PPid:\t{raylet}\n" in Path(f"/proc/{pid}/status").read_text()]
        cluster.remove_node(node, allow_graceful=False)
        os.kill(lost[0], signal.SIGKILL)  # it would outlive its node by seconds

    with meanwhile(lose_it):
        outcome = lab.run(batch_s=0.2)
    assert outcome.code == 0
    assert "3 of 3 workers are there" in outcome.out
    lab.check_complete(12)
    assert "died; " in lab.log()


CAN_UNSHARE = subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@needs_ray
@pytest.mark.skipif(not CAN_UNSHARE, reason="needs the right to mount, which root has")
def test_a_node_that_sees_another_cache_folder_is_refused(lab, cluster):
    lab.add(2)
    lab.cache.mkdir()
    ray_start = f"{Path(sys.executable).parent}/ray start --address={cluster.address} --num-cpus=1 --block"
    script = f"mount -t tmpfs none {lab.cache} && exec {ray_start} --object-store-memory={80 << 20}"
    with subprocess.Popen(
        ["unshare", "-m", "-p", "--fork", "--kill-child", "--mount-proc", "sh", "-c", script],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as node:
        try:
            with ray_nodes(cluster) as nodes:
                before = len(nodes())  # a lost one counts for a while
                wait_until(lambda: len(nodes()) > before)
            outcome = lab.run()
        finally:
            node.kill()
    assert outcome.code == 2
    assert "worker-" in outcome.err
    assert "is not here: cache_dir must be on a filesystem that all nodes share" in outcome.err
    assert str(lab.cache) in outcome.err
    assert not (lab.cache / "progress.json").exists()


@pytest.mark.slow
@needs_ray
def test_workers_cut_anew_what_is_stored_and_encode_what_is_not(lab):
    lab.add(6)
    lab.configure(frame_stride=2)
    assert lab.run().code == 0

    def refuse(stamps: set[int]) -> None:
        raise AssertionError("something was encoded")

    lab.configure(frame_stride=4, max_chunk_distance_m=1.5)
    outcome = lab.run("--recut", on_batch=refuse)
    assert outcome.code == 0, outcome.err
    assert "6 completed (+6)" in outcome.out
    for number in range(6):
        assert check_stamps(lab.cache, f"t{number:02d}", number, frame_stride=4) > 0
    lab.configure(max_chunk_distance_m=3.0)
    assert f"frames to encode: {6 * (FRAMES - FRAMES // 4)}" in lab.run("--recut", "--dry-run").out
    assert lab.run("--recut", "--limit", "3").code == 5
    assert lab.run().code == 0
    lab.check_complete(6)
    assert read_progress(lab.cache)["recut_started"] is None
