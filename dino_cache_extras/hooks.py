"""`notify` and `metrics_file`: those are told who wait for a run.

    notify:
      - healthchecks: https://hc-ping.com/${HC_UUID}           # /start, then /<exit code> with the log's tail
      - webhook: https://example.org/hook                      # the outcome as JSON
      - ntfy: https://ntfy.sh/my-topic                         # a message with title and priority
        on: [failure]
      - command: mail -s "dino_cache $DINO_CACHE_VERDICT" me   # the verdict on stdin
        on: [failure, stop]
    metrics_file: /var/lib/node_exporter/dino_cache.prom

Each is told in a thread of its own, which is abandoned after HOOK_SECONDS, whatever it waits for. What fails is one
warning and changes no exit code. URLs hold secrets: in messages a hook is its kind and its host, and no text of a
library is shown.
"""

from __future__ import annotations

import base64
import collections
import contextlib
import itertools
import json
import logging
import os
import re
import signal
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dino_cache import EXIT_COMPLETED, EXIT_WORK_LEFT, HOOK_KEYS, LOG, DatasetOutcome, NightOutcome, one_of
from dino_cache_extras.metrics import read_own, write_metrics
from dino_cache_extras.run_outcome import SIGNALLED, RunOutcome, num_failed, run_outcome
from progress_utils import RefusedError, printable, progress_command

KINDS = ("healthchecks", "webhook", "ntfy", "command")
EVENTS = ("failure", "stop", "success")
HOOK_SECONDS = 10.0  # that a run waits for all hooks together, which are told at the same time
COMMAND_SECONDS = HOOK_SECONDS - 1  # after which a command is ended
TAIL_LINES = 100  # lines of the log that are sent
TAIL_CHARACTERS = 20_000
SHOWN_ERRORS = 10  # errors' lines, and failed trajectories of a dataset, that are sent where the log's tail is not
PRIORITIES = {"failure": "high", "stop": "default", "success": "low"}  # ntfy's


class Target(NamedTuple):
    """A URL, taken apart."""

    url: str  # without user and password
    host: str  # with the port, where there is one; all that is shown
    authorization: str | None


class Hook(NamedTuple):
    """One entry of `notify`."""

    kind: str
    name: str  # in messages
    target: Target | None  # of a command: None
    command: str
    events: tuple[str, ...]


class Message(NamedTuple):
    """What is told of a run's end."""

    outcome: RunOutcome
    event: str
    start: float  # [epoch seconds]
    tail: list[str]  # of the log
    errors: list[str]  # lines of errors in it, and why trajectories failed or could not be read

    def brief(self) -> str:
        """The verdict, and the errors."""
        return "\n".join([self.outcome.text, *self.errors])


# ----------------------------------------------------------------------------------------------------------------------
# Settings
# ----------------------------------------------------------------------------------------------------------------------


def expanded(text: str) -> str:
    """With environment variables in place. Raises ValueError, which names the variable alone."""
    text = os.path.expandvars(text)
    if "$" in text:
        name = re.search(r"\$\{?(\w+)", text)
        why = (
            f"the environment variable {name[1]} is not set" if name else "a $ begins a variable's name; a URL has %24"
        )
        raise ValueError(why)
    return text


def parsed_url(text: Any) -> Target:
    """Raises ValueError, without any part of the URL."""
    if not isinstance(text, str):
        raise ValueError("needs a URL, like https://example.org/path")
    text = expanded(text)
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("a URL has no spaces, control characters or letters beyond ASCII; write them as %20")
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError:
        raise ValueError("this is no URL: its host or port cannot be read") from None
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("needs a URL that begins with http:// or https:// and a host")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    host += f":{port}" if port is not None else ""
    authorization = None
    if parts.username is not None:
        user, password = urllib.parse.unquote(parts.username), urllib.parse.unquote(parts.password or "")
        authorization = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()
    return Target(parts._replace(netloc=host, fragment="").geturl(), host, authorization)


def parsed_hook(entry: Any) -> Hook:
    """Raises ValueError, without any part of a URL or command."""
    if not isinstance(entry, dict):
        raise ValueError(f"needs a kind and its address, like {{webhook: <url>}}; kinds: {', '.join(KINDS)}")
    kinds = [str(key) for key in entry if key != "on"]
    if len(kinds) != 1:
        raise ValueError(f"needs one kind of {', '.join(KINDS)}, and besides it `on` at most")
    kind = one_of(kinds[0], KINDS)
    events = entry.get("on", list(EVENTS))
    if not isinstance(events, list) or not events or not all(event in EVENTS for event in events):
        raise ValueError(f"on: needs a list of {', '.join(EVENTS)}")
    if kind == "healthchecks" and "on" in entry:
        raise ValueError("on: healthchecks is always told, since it raises the alarm where it hears nothing")
    if kind == "command":
        if not isinstance(entry[kind], str) or not entry[kind].strip() or "\0" in entry[kind]:
            raise ValueError("needs a command, as one would type it into a shell")
        return Hook(kind, kind, None, entry[kind], tuple(events))
    target = parsed_url(entry[kind])
    return Hook(kind, f"{kind} at {target.host}", target, "", tuple(events))


def metrics_path(config: Path, text: Any) -> Path | None:
    """Raises ValueError where something else is there than a metrics file of ours; what is no text is refused later."""
    if not text or not isinstance(text, str):
        return None
    path = Path(os.path.abspath(config.absolute().parent / expanded(os.path.expanduser(text))))
    with contextlib.suppress(OSError):  # said when it cannot be written
        read_own(path)
    return path


def begin(config: Path, sections: dict[str, dict[str, Any]], told: list[Any] | None) -> None:
    """Check the settings and, for a run, put its hooks into `told` and tell that it begins.

    Raises:
        RefusedError: a setting is not allowed, or is not the same for all datasets. The hooks that are as they should
            be hear of the run nevertheless.
    """
    faults, hooks, path = [], [], None
    settings = next(iter(sections.values()), {})
    for key in HOOK_KEYS:
        if any((section.get(key) or None) != (settings.get(key) or None) for section in sections.values()):
            faults.append(f"{config}: {key}: must be the same for all datasets: give it at the top")
    entries = settings.get("notify") or []
    if not isinstance(entries, list):
        faults.append(f"{config}: notify: needs a list, like `notify: [{{webhook: <url>}}]`")
        entries = []
    for number, entry in enumerate(entries, 1):
        try:
            hook = parsed_hook(entry)
            hooks.append(hook._replace(name=f"notify entry {number} ({hook.name})"))
        except ValueError as error:
            faults.append(f"{config}: notify: entry {number}: {error}")
    try:
        path = metrics_path(config, settings.get("metrics_file"))
    except ValueError as error:
        faults.append(f"{config}: metrics_file: {settings['metrics_file']}: {error}")
    if told is not None:
        told.append(RunHooks(hooks, path, [*sections]))
    if faults:
        raise RefusedError(*faults)


# ----------------------------------------------------------------------------------------------------------------------
# Telling
# ----------------------------------------------------------------------------------------------------------------------


class CommandError(Exception):
    """A command ended otherwise than with 0."""


class SameHost(urllib.request.HTTPRedirectHandler):
    """Follows to the same host and port, or from http to https there; another one would learn a URL's secret."""

    def redirect_request(self, request: Any, file: Any, code: int, message: str, headers: Any, url: str) -> Any:
        old, new = urllib.parse.urlsplit(request.full_url), urllib.parse.urlsplit(url)
        is_same = (old.scheme, old.netloc) == (new.scheme, new.netloc)
        is_safer = (old.scheme, new.scheme) == ("http", "https") and old.hostname == new.hostname
        if not (is_same or is_safer):
            return None  # then urllib raises HTTPError with the code
        return super().redirect_request(request, file, code, message, headers, url)


def post(target: Target, body: str, *, path: str = "", **headers: str) -> None:
    """Send `body` to the URL, `path` being put to the end of its path."""
    parts = urllib.parse.urlsplit(target.url)
    url = parts._replace(path=parts.path.rstrip("/") + path if path else parts.path).geturl()
    if target.authorization is not None:
        headers["Authorization"] = target.authorization
    data = body.encode("utf-8", "backslashreplace")
    request = urllib.request.Request(url, data=data, headers={"User-Agent": "dino_cache", **headers}, method="POST")
    with urllib.request.build_opener(SameHost).open(request, timeout=HOOK_SECONDS):
        pass


def run_command(command: str, message: Message) -> None:
    """Run a shell's command line, the verdict on its stdin; what it says is dropped, since it may hold secrets."""
    outcome = message.outcome
    environment = {
        "DINO_CACHE_EXIT_CODE": str(outcome.exit_code),
        "DINO_CACHE_VERDICT": outcome.verdict,
        "DINO_CACHE_EVENT": message.event,
        "DINO_CACHE_SECONDS": f"{outcome.seconds:.0f}",
    }
    process = subprocess.Popen(
        ["/bin/sh", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, **environment}, start_new_session=True,
    )  # fmt: skip
    try:
        process.communicate((message.brief() + "\n").encode("utf-8", "backslashreplace"), timeout=COMMAND_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode:
        code = process.returncode
        raise CommandError(f"it ended with exit code {code}" if code > 0 else f"it was ended by signal {-code}")


def as_json(message: Message) -> str:
    """The outcome, for a webhook."""
    outcome = message.outcome
    datasets = [
        {
            "name": dataset.name, "exit_code": dataset.exit_code, "trajectories": dataset.num_trajectories,
            "completed": dataset.num_completed, "failed": num_failed(dataset), "left": dataset.num_left,
            "chunks": dataset.num_chunks, "bytes": dataset.num_bytes, "frames": dataset.num_frames,
            "seconds": round(dataset.seconds, 3),
        }
        for dataset in outcome.datasets
    ]  # fmt: skip
    return json.dumps(
        {
            "verdict": outcome.verdict, "text": outcome.text, "event": message.event, "exit_code": outcome.exit_code,
            "host": socket.gethostname(), "start": message.start, "seconds": round(outcome.seconds, 3),
            "frames": outcome.num_frames, "datasets": datasets, "errors": message.errors,
        }
    )  # fmt: skip


def tell_end(hook: Hook, message: Message) -> None:
    """Tell one hook how the run ended."""
    outcome = message.outcome
    if hook.kind == "healthchecks":
        tail = "\n".join(message.tail)[-TAIL_CHARACTERS:]
        post(hook.target, f"{outcome.text}\n\n{tail}", path=f"/{outcome.exit_code}")
    elif hook.kind == "webhook":
        post(hook.target, as_json(message), **{"Content-Type": "application/json"})
    elif hook.kind == "ntfy":
        host = printable(socket.gethostname()).encode("ascii", "replace").decode()
        title = {"Title": f"dino_cache {outcome.verdict} on {host}", "Priority": PRIORITIES[message.event]}
        post(hook.target, message.brief(), **title)
    else:
        run_command(hook.command, message)


def why_it_failed(error: Exception) -> str:
    """Without the text of other libraries, which may hold the URL."""
    reason = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, urllib.error.HTTPError):
        moved = ", which leads to another host and is not followed" if 300 <= error.code < 400 else ""
        return f"it answered {error.code}{moved}"
    if isinstance(error, TimeoutError | subprocess.TimeoutExpired) or isinstance(reason, TimeoutError):
        return f"no answer within {HOOK_SECONDS:.0f} s"
    if isinstance(reason, ssl.SSLError):
        return f"TLS: {reason.reason or type(reason).__name__}"
    if isinstance(reason, socket.gaierror):
        return "its host's name is not known"
    if isinstance(error, CommandError) or type(error) is ValueError:  # our own words
        return str(error)
    if isinstance(reason, OSError) and reason.errno is not None:
        return os.strerror(reason.errno)
    return type(error).__name__


class Attempt:
    """Something done in a thread of its own, which is abandoned after HOOK_SECONDS."""

    def __init__(self, action: Callable[[], None]):
        self._fault: str | None = f"no answer within {HOOK_SECONDS:.0f} s"
        self._action, self._deadline = action, time.monotonic() + HOOK_SECONDS
        self._thread: threading.Thread | None = threading.Thread(target=self._do, name="hook", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # no more threads
            self._thread, self._fault = None, "no thread could be started"

    def _do(self) -> None:
        try:
            self._action()
            self._fault = None
        except Exception as error:
            self._fault = why_it_failed(error)

    def fault(self) -> str | None:
        """Wait for the end; what went wrong, if anything did."""
        if self._thread is not None:
            self._thread.join(max(0.0, self._deadline - time.monotonic()))
        return self._fault


class LogTail(logging.Handler):
    """The last lines of what this run says."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self.errors: collections.deque[str] = collections.deque(maxlen=SHOWN_ERRORS)

    def emit(self, record: logging.LogRecord) -> None:
        line = printable(record.getMessage())
        self.lines.append(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(record.created))} {line}")
        if record.levelno >= logging.ERROR:
            self.errors.append(line)


def failures_told(dataset: DatasetOutcome) -> list[str]:
    """A line on each of its trajectories that failed, now or earlier, or could not be read, those of this run first;
    after SHOWN_ERRORS how many more there are."""
    failures = sorted(dataset.failures.items(), key=lambda item: item[0] not in dataset.told)
    reasons = [failure["reason"] for _, failure in failures] + dataset.held_back
    lines = [f"{dataset.name}: failed: {printable(reason)}" for reason in reasons[:SHOWN_ERRORS]]
    more = len(reasons) - SHOWN_ERRORS
    return lines + [f"{dataset.name}: {more} more failed; {progress_command('show --all')} lists them"] * (more > 0)


def event_of(exit_code: int) -> str:
    """Which of EVENTS it is."""
    if exit_code == EXIT_COMPLETED:
        return "success"
    return "stop" if exit_code == EXIT_WORK_LEFT or exit_code > SIGNALLED else "failure"


class RunHooks:
    """Those that are told of one run. Made when it begins, which healthchecks is told at once."""

    def __init__(self, hooks: list[Hook], metrics_file: Path | None, names: list[str]):
        self._hooks, self._metrics_file, self._names = hooks, metrics_file, names
        self._start, self._began_at = time.time(), time.monotonic()
        self._tail = LogTail()
        LOG.addHandler(self._tail)
        is_pinged = [hook.kind == "healthchecks" for hook in hooks]
        self._starts = [
            Attempt(lambda hook=hook: post(hook.target, "", path="/start")) if pinged else None
            for hook, pinged in zip(hooks, is_pinged)
        ]

    def end(self, night: NightOutcome) -> None:
        """Tell how the run ended, and wait for HOOK_SECONDS at most. What fails is a warning each."""
        LOG.removeHandler(self._tail)
        try:
            for warning in self._tell(run_outcome(night, time.monotonic() - self._began_at)):
                LOG.warning("%s", warning)
        except Exception as error:  # of ours: the run is what it is
            LOG.warning("notify: nobody could be told how the run ended: unexpected: %s", type(error).__name__)

    def _tell(self, outcome: RunOutcome) -> list[str]:
        errors = [*self._tail.errors, *itertools.chain.from_iterable(map(failures_told, outcome.datasets))]
        message = Message(outcome, event_of(outcome.exit_code), self._start, list(self._tail.lines), errors)
        attempts: list[tuple[str, Attempt | None, Attempt]] = []
        if (path := self._metrics_file) is not None:
            writing = Attempt(lambda: write_metrics(path, outcome, time.time(), self._names))
            attempts.append((f"metrics_file {path}", None, writing))
        for hook, start in zip(self._hooks, self._starts):
            if message.event in hook.events:
                attempts.append((hook.name, start, Attempt(lambda hook=hook, start=start: _end(hook, start, message))))
        faults = [(name, ending.fault() or (start and start.fault())) for name, start, ending in attempts]
        return [f"{name}: {fault}; the run and its exit code are as they are" for name, fault in faults if fault]


def _end(hook: Hook, start: Attempt | None, message: Message) -> None:
    if start is not None:
        start.fault()  # it shall not come after the end
    tell_end(hook, message)
