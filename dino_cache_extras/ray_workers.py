"""executor: ray: the same stream on many GPUs and machines.

The driver, the process that the user started, keeps the queue, the record and the lock. A worker is a Ray actor with an
encoder of its own: it runs cache_trajectories over what it asks the driver for, writes chunks straight into the cache
folder, and streams reports back. Both directions are Ray's: a streaming generator and actor calls.

    RayDataset (driver)  -- a share of trajectories -->  RayWorker (actor): cache_trajectories
                         <-- WorkerReport ------------
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import signal
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import dino_cache
from dino_cache import (
    LOG,
    CacheJob,
    CacheSpec,
    ChunkLabel,
    ChunkStore,
    DeviceError,
    Encoder,
    Hooks,
    InputError,
    LogFormatter,
    PreparedDataset,
    ReaderProcesses,
    ReadingJob,
    RunOptions,
    Trajectory,
    TrajectoryResult,
    cache_trajectories,
    check_engine,
    died,
    encoder_key,
    library_versions,
    process_umask,
    storage_errors,
    versions_of,
)
from progress_utils import DinoCacheError, RefusedError, available_cores, open_library

RAY_STORE_BYTES = 100 << 20  # memory of Ray's object store; only reports pass through it
CPU_WORKER_CORES = 4  # cores of a worker without a GPU
SHARE_FRAMES = 2048  # frames that a worker gets at once, at most: a second or so of a fast GPU's work
SHARE_DIVISOR = 4  # a worker gets at once at most this part of its fair share of what is left, so that all end together
HELD_DIVISOR = 2  # a worker that holds more than this part of its fair share gets nothing
SHORTEST_FRAMES = 32  # a trajectory with fewer frames costs as much as one with so many
REPORT_INTERVAL_S = 0.2  # time between a worker's reports, unless it waits for an answer
POLL_S = 0.1  # time in which the driver notices that the run shall end
LATE_WORKER_S = 60.0  # so long after the first worker is there, the run begins; others may join it later
NO_WORKER_S = 300.0  # so long without any worker, the cluster is gone, or too busy
STOP_TIMEOUT_S = 60.0  # time in which workers finish or drop what is in flight
FATAL_DEATHS = 2  # a trajectory that was in flight at so many deaths of workers fails
DEATHS_IN_A_ROW = 8  # deaths without a result between them, and two for each worker, after which the run ends

# ---------------------------------------------------------------------------------------------------------------------
# Dividing the work
# ---------------------------------------------------------------------------------------------------------------------


class WorkerPlan(NamedTuple):
    """How many workers a cluster holds, and what each takes."""

    device: Literal["cpu", "cuda"]
    count: int
    cpus: int

    def describe(self) -> str:
        """What one takes, in words."""
        return f"{self.cpus} CPU cores" + (" and a GPU" if self.device == "cuda" else "")


def plan_workers(nodes: list[dict[str, float]], options: RunOptions) -> WorkerPlan:
    """One worker a GPU; without GPUs, or for device: cpu, as many as the cores hold.

    Args:
        nodes: each node's resources, by Ray's names.

    Raises:
        RefusedError: the device is not in the cluster, or num_workers or cpus_per_worker are more than it has.
    """
    cores = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    cores_of_gpu_nodes = [(cpu, gpu) for cpu, gpu in cores if gpu and cpu]
    if options.device.startswith("cuda:"):
        raise RefusedError(f"device: {options.device}: with executor: ray each worker gets a GPU; use auto or cuda")
    if options.device == "cuda" and not cores_of_gpu_nodes:
        raise RefusedError("device: cuda: the Ray cluster has no GPU; use auto or cpu")
    if cores_of_gpu_nodes and options.device != "cpu":
        device, default = "cuda", min(cpu // gpu for cpu, gpu in cores_of_gpu_nodes)
    else:
        device, default = "cpu", min([CPU_WORKER_CORES, *(cpu for cpu, _ in cores if cpu)])

    def room(cpus: int) -> int:
        return sum(cpu // cpus if device == "cpu" else min(cpu // cpus, gpu) for cpu, gpu in cores)

    cpus = max(1, default) if options.cpus_per_worker == "auto" else options.cpus_per_worker
    if options.cpus_per_worker == "auto" and options.num_workers != "auto":  # divide the cores
        cpus = next((fewer for fewer in range(cpus, 0, -1) if room(fewer) >= options.num_workers), cpus)
    most = room(cpus)
    count = max(1, most) if options.num_workers == "auto" else options.num_workers
    plan = WorkerPlan(device, count, cpus)
    if count > most:
        raise RefusedError(
            f"num_workers: {options.num_workers} with cpus_per_worker: {options.cpus_per_worker}: the Ray cluster has "
            f"room for {most} workers, each with {plan.describe()}"
        )
    return plan


class Assignment(NamedTuple):
    """A trajectory to do, and how many frames of it are to encode."""

    trajectory: Trajectory
    num_frames: int

    @property
    def cost(self) -> int:
        """In frames."""
        return max(SHORTEST_FRAMES, self.num_frames)


def _cost(assignments: Iterable[Assignment]) -> int:
    return sum(assignment.cost for assignment in assignments)


class WorkQueue:
    """What is still to do and who is doing it. `worker` is any name."""

    def __init__(self, assignments: Iterable[Assignment], num_workers: int):
        self._waiting = deque(assignments)  # handed out in this order: long ones first, so that no straggler is left
        self._cost_left = _cost(self._waiting)  # of what is not finished
        self._suspects: deque[Assignment] = deque()  # were in flight when a worker died
        self._held: dict[str, dict[str, Assignment]] = {}  # worker -> trajectory name -> what it has in flight
        self._alone: set[str] = set()  # workers that try one suspect
        self._deaths: dict[str, list[str]] = {}  # trajectory name -> nodes on which its worker died
        self._num_workers = num_workers

    @property
    def has_work(self) -> bool:
        """Whether anything waits to be handed out."""
        return bool(self._waiting or self._suspects)

    @property
    def is_done(self) -> bool:
        """Whether nothing waits and nothing is in flight."""
        return not self.has_work and not any(self._held.values())

    def take(self, worker: str, idle: int = 0) -> list[Assignment]:
        """The worker's next share; nothing, where it shall end its stream.

        A suspect is tried by a worker that has nothing else, so that it is known who killed it. `idle` workers have
        nothing to do: the last trajectories are theirs.
        """
        fair_share = self._cost_left // self._num_workers
        held = self._held.setdefault(worker, {})
        if not held:
            self._alone.discard(worker)
        if self._suspects and not held:
            self._alone.add(worker)
            share = [self._suspects.popleft()]
        elif held and (
            worker in self._alone or len(self._waiting) <= idle or _cost(held.values()) > fair_share // HELD_DIVISOR
        ):
            share = []
        else:
            share = self._next_share(min(SHARE_FRAMES, fair_share // SHARE_DIVISOR))
        held.update((assignment.trajectory.name, assignment) for assignment in share)
        return share

    def _next_share(self, most: int) -> list[Assignment]:
        """The next one, and more while they cost at most so many frames together."""
        share, cost = [], 0
        while self._waiting and (not share or cost + self._waiting[0].cost <= most):
            share.append(self._waiting.popleft())
            cost += share[-1].cost
        return share

    def finish(self, worker: str, name: str) -> None:
        """The worker finished a trajectory, or failed it."""
        self._cost_left -= self._held[worker].pop(name).cost

    def lose(self, worker: str, node: str, live_nodes: Container[str]) -> tuple[list[Assignment], list[Assignment]]:
        """The worker died. Returns the trajectories that go back into the queue, and those that killed it and another.

        A death with its whole node is nobody's fault.
        """
        held = list(self._held.pop(worker, {}).values())
        back, fatal = [], []
        for assignment in held:
            deaths = self._deaths.setdefault(assignment.trajectory.name, [])
            deaths.append(node)
            is_fatal = sum(node in live_nodes for node in deaths) >= FATAL_DEATHS
            (fatal if is_fatal else back).append(assignment)
        self._cost_left -= _cost(fatal)
        self._suspects.extend(back)
        return back, fatal

    def drop(self, worker: str) -> None:
        """Forget what a worker that stops has in flight."""
        self._held.pop(worker, None)


# ---------------------------------------------------------------------------------------------------------------------
# The worker
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerJob:
    """What a worker must know of a dataset."""

    label: ChunkLabel
    options: RunOptions
    load_encoder: Callable[[CacheSpec, str], tuple[Encoder, str]]
    cache_dir: Path
    data_folder: Path
    versions: str | None = None  # of the driver's libraries, the engine's among them


@dataclass
class WorkerReport:
    """What a worker sends to the driver, in the order in which it is handled."""

    lines: list[tuple[int, str]] = field(default_factory=list)  # logging level, text
    num_frames: int = 0  # more that are encoded
    results: list[TrajectoryResult] = field(default_factory=list)
    replacing: str | None = None  # the record of this trajectory must be withdrawn; the worker waits
    wants_more: bool = False  # the worker waits for its next share
    has_ended: bool = False
    error: Exception | None = None

    def add(self, other: WorkerReport) -> None:
        """Take up what another one holds."""
        self.lines += other.lines
        self.num_frames += other.num_frames
        self.results += other.results
        self.replacing = other.replacing or self.replacing
        self.wants_more |= other.wants_more
        self.has_ended |= other.has_ended
        self.error = other.error or self.error

    @property
    def is_urgent(self) -> bool:
        """Whether the worker waits until it is read."""
        return self.replacing is not None or self.wants_more or self.has_ended


class OutboxHandler(logging.Handler):
    """Log lines become reports."""

    def __init__(self, outbox: queue.SimpleQueue[WorkerReport]):
        super().__init__()
        self._outbox = outbox
        self.setFormatter(LogFormatter())

    def emit(self, record: logging.LogRecord) -> None:
        lines = self.format(record).split("\n")  # the message, and a traceback
        self._outbox.put(WorkerReport(lines=[(record.levelno, line) for line in lines]))


class Place(NamedTuple):
    """Folders that a worker must see: one in staging that the driver made, and the data folder of its dataset."""

    staging: Path
    data_folder: Path


def place_fault(place: Place) -> str | None:
    """Why a worker on this node cannot work, or None. The staging folder was made by the driver under a random name:
    only the driver's own cache folder holds it."""
    if not place.staging.is_dir():
        return f"{place.staging} is not here: cache_dir must be on a filesystem that all nodes share, at the same path"
    try:
        with os.scandir(place.data_folder):
            pass
    except OSError as error:
        return f"data_folder {place.data_folder} cannot be listed here: {error.strerror}"
    return None


class Introduction(NamedTuple):
    """Where a worker is, and why it cannot work, if so."""

    host: str
    node: str
    fault: str | None


class RayWorker:
    """The actor. `work` runs in one thread, the short calls beside it."""

    def __init__(self, name: str, device: str, cpus: int, versions: str):
        self._name, self._device, self._cpus, self._versions = name, device, cpus, versions
        self._outbox: queue.SimpleQueue[WorkerReport] = queue.SimpleQueue()
        self._shares: queue.SimpleQueue[list[Assignment]] = queue.SimpleQueue()
        self._permits: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._is_stopping = threading.Event()
        self._num_frames: dict[str, int] = {}
        self._encoder_key: tuple | None = None
        self._encoder: Encoder | None = None
        LOG.setLevel(logging.INFO)
        LOG.propagate = False
        LOG.handlers[:] = [OutboxHandler(self._outbox)]
        process_umask()

    def introduce(self, places: list[Place]) -> Introduction:
        """Where this is, and whether it sees the places as the driver does."""
        import ray

        faults = [place_fault(place) for place in places]
        if self._versions != library_versions():
            faults.append(f"it has {library_versions()}, the driver has {self._versions}")
        fault = next((fault for fault in faults if fault), None)
        return Introduction(socket.gethostname(), ray.get_runtime_context().get_node_id(), fault)

    def load(self, job: WorkerJob, staging: Path) -> str | None:
        """Get ready for a dataset; returns why it cannot, or None."""
        import torch

        if fault := place_fault(Place(staging, job.data_folder)):
            return fault
        torch.set_num_threads(self._cpus)  # of this thread
        spec = job.label.spec
        if spec.engine != "torch":
            try:
                check_engine(spec, self._device)
            except RefusedError as error:
                return str(error)
            if job.versions != versions_of(spec):
                return f"it has {versions_of(spec)}, the driver has {job.versions}"
        if self._encoder_key != encoder_key(spec, self._device):
            self._encoder = None  # first, as two may not fit on the device
            try:
                self._encoder, digest = job.load_encoder(spec, self._device)
            except RefusedError as error:
                return str(error)
            if digest != job.label.weights_digest:
                return f"weights: {spec.weights} has digest {digest} here, {job.label.weights_digest} at the driver"
            self._encoder_key = encoder_key(spec, self._device)
        self._is_stopping.clear()
        auto = {"decode_workers": self._cpus} if job.options.decode_workers == "auto" else {}
        self._options = job.options.model_copy(update=auto)
        self._label, self._store = job.label, ChunkStore(job.cache_dir, staging)
        return None

    def work(self, first: list[Assignment]) -> Iterator[WorkerReport]:
        """Cache `first` and what the driver answers to each request for more; ends when it answers with nothing."""
        threading.Thread(target=self._stream, args=(first,), name="stream").start()
        has_ended = False
        while not has_ended:
            report = self._next_report()
            has_ended = report.has_ended
            yield report

    def _next_report(self) -> WorkerReport:
        """What has come together in a while, or up to what is urgent."""
        report, deadline = WorkerReport(), time.monotonic() + REPORT_INTERVAL_S
        while not report.is_urgent and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Empty):
                report.add(self._outbox.get(timeout=left))
        return report

    def _stream(self, first: list[Assignment]) -> None:
        import torch

        torch.set_num_threads(self._cpus)  # of this thread, which encodes
        hooks = Hooks(
            should_stop=self._is_stopping.is_set,
            on_encoded=self._on_encoded,
            before_replacing=self._ask_before_replacing,
            num_frames_of=self._num_frames.__getitem__,
        )
        trajectories, error = self._pull(first), None
        try:
            for result in cache_trajectories(
                trajectories, self._label, self._options, self._encoder, self._store, hooks
            ):
                if result.error is not None:
                    result.error.add_note(f"on {self._name}:\n{''.join(traceback.format_exception(result.error))}")
                self._outbox.put(WorkerReport(results=[result]))
        except Exception as fault:
            error = fault if isinstance(fault, DinoCacheError) else RuntimeError(repr(fault))
            error.add_note(f"on {self._name}:\n{''.join(traceback.format_exception(fault))}")
        self._outbox.put(WorkerReport(has_ended=True, error=error))

    def _pull(self, share: list[Assignment]) -> Iterator[Trajectory]:
        while share:
            for trajectory, num_frames in share:
                self._num_frames[trajectory.name] = num_frames
                yield trajectory
            self._outbox.put(WorkerReport(wants_more=True))
            share = self._shares.get()

    def _on_encoded(self, count: int) -> None:
        self._outbox.put(WorkerReport(num_frames=count))

    def _ask_before_replacing(self, name: str) -> None:
        self._outbox.put(WorkerReport(replacing=name))
        self._permits.get()

    def give_share(self, share: list[Assignment]) -> None:
        """The driver's answer to a request for more."""
        self._shares.put(share)

    def permit_replacing(self) -> None:
        """The driver's answer to a report of `replacing`."""
        self._permits.put(None)

    def request_stop(self) -> None:
        """Finish or drop what is in flight."""
        self._is_stopping.set()


# ---------------------------------------------------------------------------------------------------------------------
# The driver
# ---------------------------------------------------------------------------------------------------------------------


class WorkerLostError(Exception):
    """A worker died, or cannot be reached."""


@dataclass(eq=False)
class WorkerHandle:
    """A worker as the driver sees it. Its next message comes from `source`: an object reference, or while it is working
    the stream of its reports."""

    name: str
    actor: Any
    source: Any
    state: Literal["starting", "here", "loading", "idle", "working"] = "starting"
    host: str = "?"
    node: str = ""
    staging: Path | None = None
    job: WorkerJob | None = None

    def describe(self) -> str:
        """For messages."""
        return f"{self.name} on {self.host}"

    def enter(self, state: Literal["here", "loading", "idle", "working"], source: Any = None) -> None:
        """Go on to another state."""
        self.state, self.source = state, source


class RayWorkers:
    """The workers of a run, whatever dataset they work on."""

    encodes_here = False

    def __init__(self, plan: WorkerPlan, places: list[Place]):
        self.plan, self.device = plan, plan.device
        self.handles: list[WorkerHandle] = []
        self._num_started = 0
        for _ in range(plan.count):
            self.start_worker(places)

    def describe(self) -> str:
        return f"{self.plan.count} Ray workers, each with {self.plan.describe()}"

    def start_worker(self, places: Iterable[Place] = ()) -> None:
        """Start a worker; it is there when it has introduced itself."""
        import ray

        self._num_started += 1
        name, plan = f"worker-{self._num_started}", self.plan
        resources = {"num_cpus": plan.cpus, "num_gpus": 1 if plan.device == "cuda" else 0}
        remote = ray.remote(RayWorker).options(max_concurrency=4, scheduling_strategy="SPREAD", **resources)
        actor = remote.remote(name, plan.device, plan.cpus, library_versions())
        self.handles.append(WorkerHandle(name, actor, actor.introduce.remote(list(places))))

    def kill_worker(self, handle: WorkerHandle) -> None:
        """End a worker at once."""
        import ray

        self.handles.remove(handle)
        ray.kill(handle.actor)

    def with_messages(self) -> list[WorkerHandle]:
        """The workers whose next message is there; waits for the first, at most POLL_S."""
        import ray

        sources = {handle.source: handle for handle in self.handles if handle.source is not None}
        if not sources:
            time.sleep(POLL_S)
            return []
        if not ray.wait(list(sources), timeout=POLL_S)[0]:
            return []
        return [sources[source] for source in ray.wait(list(sources), num_returns=len(sources), timeout=0)[0]]

    def next_message(self, handle: WorkerHandle) -> Any:
        """A worker's next message; None at the end of its stream of reports.

        Raises:
            WorkerLostError: it died, cannot be reached, or could not do what it was asked.
        """
        import ray

        try:
            return ray.get(next(handle.source) if handle.state == "working" else handle.source)
        except StopIteration:
            return None
        except ray.exceptions.RayError as error:
            raise WorkerLostError(" ".join(str(error).split())[:500]) from error

    def gather(self, should_stop: Callable[[], bool]) -> None:
        """Wait until the workers are there and see the same folders as the driver.

        Raises:
            RefusedError: one does not, or none comes.
        """
        deadline, why = time.monotonic() + NO_WORKER_S, "`ray status` tells what the cluster waits for"
        while self._is_starting() and time.monotonic() < deadline and not should_stop():
            for handle in self.with_messages():
                try:
                    self.register(handle, self.next_message(handle))
                    deadline = min(deadline, time.monotonic() + LATE_WORKER_S)
                except WorkerLostError as error:
                    why = f"{error}. The program and its Python environment must be at the same path on every node"
                    LOG.warning("%s could not start: %s", handle.name, why)
                    self.kill_worker(handle)
        there = sum(handle.state == "here" for handle in self.handles)
        if not there and not should_stop():
            raise RefusedError(f"no Ray worker could be started: {why}")
        LOG.info("%d of %d workers are there, each with %s", there, self.plan.count, self.plan.describe())

    def _is_starting(self) -> bool:
        return any(handle.state == "starting" for handle in self.handles)

    def register(self, handle: WorkerHandle, introduction: Introduction) -> None:
        """Count a worker as there. Raises RefusedError where it cannot work."""
        handle.host, handle.node, fault = introduction
        if fault is not None:
            raise RefusedError(f"{handle.describe()}: {fault}")
        handle.enter("here")

    def stream(self, job: CacheJob, hooks: Hooks) -> Iterator[TrajectoryResult]:
        """What became of each trajectory, as it comes; long ones are begun first, those that failed before last."""
        assignments = [Assignment(trajectory, job.num_frames[trajectory.name]) for trajectory in job.trajectories]
        assignments.sort(key=lambda item: (item.trajectory.name in job.retried, -item.num_frames))
        worker_job = WorkerJob(
            label=job.label,
            options=job.options,
            load_encoder=dino_cache.load_encoder,
            cache_dir=job.store.cache_dir,
            data_folder=job.data_folder,
            versions=versions_of(job.label.spec),
        )
        return RayDataset(self, assignments, worker_job, job.store, hooks).results()


def live_nodes() -> set[str]:
    """Ids of the cluster's nodes that are not known to be dead."""
    import ray

    return {node["NodeID"] for node in ray.nodes() if node["Alive"]}


class RayDataset:
    """One dataset's work by the workers."""

    def __init__(
        self, workers: RayWorkers, assignments: list[Assignment], job: WorkerJob, store: ChunkStore, hooks: Hooks
    ):
        self._workers, self._job, self._store, self._hooks = workers, job, store, hooks
        self._queue = WorkQueue(assignments, workers.plan.count)
        self._stop_deadline = math.inf
        self._last_presence = time.monotonic()
        self._deaths_in_a_row = 0  # without a result between them

    def results(self) -> Iterator[TrajectoryResult]:
        """What became of each trajectory, as it comes.

        Raises:
            RefusedError: a worker's weights or folders are not the driver's; nothing was begun.
            StorageError, DeviceError: the fault is not a trajectory's; nothing further is yielded.
        """
        try:
            self._load_encoders()
            while (self._is_working or not self._queue.is_done) and not self._has_stopped():
                for handle in self._in_state("idle"):
                    self._begin_work(handle)
                for handle in self._workers.with_messages():
                    yield from self._handle_message(handle)
                self._check_presence()
        finally:
            for handle in self._in_state("loading", "working"):
                self._remove(handle)

    def _in_state(self, *states: str) -> list[WorkerHandle]:
        return [handle for handle in self._workers.handles if handle.state in states]

    @property
    def _is_working(self) -> bool:
        return bool(self._in_state("working"))

    @property
    def _is_stopping(self) -> bool:
        return self._stop_deadline < math.inf

    def _has_stopped(self) -> bool:
        """Pass a stop on to the workers; true when all have heeded it."""
        if self._hooks.should_stop() and not self._is_stopping:
            self._stop_deadline = time.monotonic() + STOP_TIMEOUT_S
            for handle in self._in_state("working"):
                handle.actor.request_stop.remote()
        return self._is_stopping and (not self._is_working or time.monotonic() > self._stop_deadline)

    def _load_encoders(self) -> None:
        """Get all workers that are there ready, together, and start those that the dataset before lost."""
        while len(self._workers.handles) < self._workers.plan.count:
            self._workers.start_worker()
        for handle in self._in_state("here", "idle"):
            self._load(handle)
        while self._in_state("loading") and not self._hooks.should_stop():
            for handle in self._workers.with_messages():
                for _ in self._handle_message(handle, is_begun=False):
                    pass

    def _load(self, handle: WorkerHandle) -> None:
        handle.staging, handle.job = self._store.new_staging_folder(), self._job
        handle.enter("loading", handle.actor.load.remote(self._job, handle.staging))

    def _begin_work(self, handle: WorkerHandle) -> None:
        if self._queue.has_work and not self._is_stopping:
            work = handle.actor.work.options(num_returns="streaming")
            handle.enter("working", work.remote(self._queue.take(handle.name)))

    def _handle_message(self, handle: WorkerHandle, *, is_begun: bool = True) -> Iterator[TrajectoryResult]:
        try:
            message = self._workers.next_message(handle)
            if handle.state == "starting":
                self._workers.register(handle, message)
                self._load(handle)
            elif handle.state == "loading":
                self._on_loaded(handle, message)
            elif message is None:
                handle.enter("idle")
            else:
                yield from self._handle_report(handle, message)
        except WorkerLostError as error:
            yield from self._on_death(handle, str(error))
        except RefusedError as error:
            if not is_begun:
                raise
            LOG.error("%s. It is left out", error)
            self._remove(handle)

    def _on_loaded(self, handle: WorkerHandle, fault: str | None) -> None:
        if fault is not None:
            raise RefusedError(f"{handle.describe()}: {fault}")
        if handle.job is self._job:
            handle.enter("idle")
        else:  # it was still loading for the dataset before
            self._load(handle)

    def _handle_report(self, handle: WorkerHandle, report: WorkerReport) -> Iterator[TrajectoryResult]:
        for level, line in report.lines:
            LOG.log(level, "[%s] %s", handle.describe(), line)
        if report.num_frames:
            self._hooks.on_encoded(report.num_frames)
        for result in report.results:
            self._queue.finish(handle.name, result.name)
            self._deaths_in_a_row = 0
            yield result
        if report.error is not None:
            raise report.error
        if report.replacing is not None:
            self._hooks.before_replacing(report.replacing)
            handle.actor.permit_replacing.remote()
        if report.wants_more:
            idle = len(self._in_state("idle"))
            share = [] if self._is_stopping else self._queue.take(handle.name, idle=idle)
            handle.actor.give_share.remote(share)

    def _on_death(self, handle: WorkerHandle, why: str) -> Iterator[TrajectoryResult]:
        """Put a dead worker's trajectories back and start another worker in its place."""
        self._remove(handle)
        if self._is_stopping:
            self._queue.drop(handle.name)
            return
        back, fatal = self._queue.lose(handle.name, handle.node, live_nodes())
        LOG.warning("%s died; %d trajectories go back into the queue: %s", handle.describe(), len(back), why)
        self._deaths_in_a_row += 1
        if self._deaths_in_a_row > DEATHS_IN_A_ROW + 2 * self._workers.plan.count:
            raise DeviceError(f"{self._deaths_in_a_row} workers died in a row, the last one so: {why}")
        for trajectory, _ in fatal:
            kind = self._job.options.checksum
            error = InputError(f"{trajectory.name}: killed its worker twice, the last time {handle.describe()}: {why}")
            with contextlib.closing(ReaderProcesses(None, 1, method="spawn")) as readers:
                yield died(readers, trajectory, error, ReadingJob(self._job.label.spec, kind), lambda: False)
        self._workers.start_worker()

    def _remove(self, handle: WorkerHandle) -> None:
        """End a worker; what it staged is gone, so that it can publish nothing even if it lives on. The finished chunks
        of what it did not come to the end of go to the next one."""
        self._workers.kill_worker(handle)
        if handle.staging is not None:
            with storage_errors(self._store.cache_dir):
                self._store.keep_partials(handle.staging)
                self._store.discard_staged([handle.staging])

    def _check_presence(self) -> None:
        """Raise DeviceError where no worker is left and none comes."""
        if self._in_state("loading", "idle", "working"):
            self._last_presence = time.monotonic()
        elif not self._workers.handles or time.monotonic() > self._last_presence + NO_WORKER_S:
            raise DeviceError("no Ray worker is left, and none could be started; `ray status` tells why")


# ---------------------------------------------------------------------------------------------------------------------
# The executor
# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def ray_connection(address: str) -> Iterator[list[dict[str, float]]]:
    """Connected to a Ray cluster; yields its nodes' resources. `local` starts one that ends with this process.

    Raises:
        RefusedError: Ray is not installed, or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's default to be, without its remark
    ray = open_library("ray")
    how: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": "error"}
    if address == "local":
        how |= {"num_cpus": available_cores(), "include_dashboard": False, "object_store_memory": RAY_STORE_BYTES}
    handler = signal.getsignal(signal.SIGTERM)  # Ray puts its own in its place
    try:
        ray.init(**how)
    except SystemExit:  # by that handler
        handler(signal.SIGTERM, None)
    except Exception as error:
        raise RefusedError(
            f"ray_address: {address}: cannot connect: {error}. Start Ray on this machine (`ray start`), or use local"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, handler)
    try:
        yield [node["Resources"] for node in ray.nodes() if node["Alive"]]
    finally:
        ray.shutdown()


@contextlib.contextmanager
def workers(datasets: list[PreparedDataset]) -> Iterator[RayWorkers]:
    """Workers for these datasets, on their way.

    Raises:
        RefusedError: the datasets want different workers, or the cluster cannot be reached or does not hold them.
    """
    options = [dataset.config.options for dataset in datasets]
    for key in ("ray_address", "num_workers", "cpus_per_worker", "device"):
        wanted = dict.fromkeys(getattr(option, key) for option in options)
        if len(wanted) > 1:
            raise RefusedError(f"{key}: {', '.join(map(str, wanted))}: a run's datasets share its Ray workers; set one")
    with ray_connection(options[0].ray_address) as nodes:
        plan = plan_workers(nodes, options[0])
        places = []
        for dataset in datasets:
            with storage_errors(dataset.config.cache_dir):
                dataset.store.empty_staging()
                places.append(Place(dataset.store.new_staging_folder(), dataset.config.data_folder))
        yield RayWorkers(plan, places)
