"""Those who wait for a run are told how it went, whatever becomes of them, and no secret of theirs is."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

import dino_cache
from dino_cache_extras import hooks
from progress_utils import LOG_FILE
from support import Robot, StampEncoder, cache_command, chunk_files, run_cache, run_utils, tree, wait_until

SECRET = "s3cr3t"


class Request(NamedTuple):
    """What a server was sent."""

    method: str
    path: str  # with the query
    headers: dict[str, str]
    body: str


class Listener:
    """A server of this machine that keeps what it is sent. `answers` are given in turn, the last one again and again: a
    status, a status with the place that it leads to, or None, which never comes."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.answers: list[Any] = [200]
        self.is_over = threading.Event()
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
                listener.requests.append(Request(self.command, self.path, {**self.headers}, body))
                answer = listener.answers.pop(0) if len(listener.answers) > 1 else listener.answers[0]
                if answer is None:
                    listener.is_over.wait(60)
                    return
                status, where = answer if isinstance(answer, tuple) else (answer, None)
                self.send_response(status)
                if where:
                    self.send_header("Location", where)
                self.send_header("Content-Length", "0")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.host = f"127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def url(self, path: str) -> str:
        return f"http://{self.host}{path}"

    @property
    def paths(self) -> list[str]:
        return [request.path for request in self.requests]

    def close(self) -> None:
        self.is_over.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def listener(monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    listener = Listener()
    yield listener
    listener.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks have two seconds, for those that are to use them up."""
    monkeypatch.setattr(hooks, "HOOK_SECONDS", 2.0)
    monkeypatch.setattr(hooks, "COMMAND_SECONDS", 1.0)


def healthchecks(listener: Listener) -> list[dict[str, str]]:
    return [{"healthchecks": listener.url(f"/{SECRET}")}]


def warnings_of(outcome: Any) -> list[str]:
    return [line for line in outcome.err.splitlines() if "the run and its exit code are as they are" in line]


def refuse_secrets(folder: Path, *texts: str) -> None:
    """None in texts, nor in any file below the folder but the config."""
    for text in texts:
        assert SECRET not in text
    for name, content in tree(folder).items():
        if not name.endswith(".yaml"):
            assert SECRET.encode() not in (content or b""), name


# ---------------------------------------------------------------------------------------------------------------------
# Each kind of run
# ---------------------------------------------------------------------------------------------------------------------


def test_a_good_run_is_told_of_at_its_start_and_its_end(robot: Robot, run_here, listener) -> None:
    robot.add("t0", "t1")
    robot.configure(notify=healthchecks(listener))
    outcome = run_here(robot.config)
    assert outcome.code == 0
    assert listener.paths == [f"/{SECRET}/start", f"/{SECRET}/0"]
    first, *lines = listener.requests[1].body.splitlines()
    assert first.startswith("OK: 1 datasets, 2 completed (+2), 0 failed, 0 left, ")
    assert first.endswith("frames/s, exit 0")
    assert any("robot: 2/2 trajectories completed, 0 failed" in line for line in lines)
    assert warnings_of(outcome) == []
    refuse_secrets(robot.cache, outcome.out, outcome.err)


def test_a_partial_run(robot: Robot, run_here, listener) -> None:
    robot.add("t0")
    robot.add_broken("t1")
    robot.configure(notify=healthchecks(listener))
    assert run_here(robot.config).code == 1
    assert listener.paths == [f"/{SECRET}/start", f"/{SECRET}/1"]
    assert listener.requests[1].body.startswith("PARTIAL: 1 datasets, 1 completed (+1), 1 failed, 0 left")


def test_a_run_that_a_fault_ends(robot: Robot, run_here, listener, monkeypatch) -> None:
    def fail(self: StampEncoder, pixels: Any) -> None:
        raise RuntimeError("the device is gone")

    monkeypatch.setattr(StampEncoder, "encode", fail)
    robot.add("t0")
    robot.configure(notify=healthchecks(listener))
    assert run_here(robot.config).code == 3
    assert listener.paths == [f"/{SECRET}/start", f"/{SECRET}/3"]
    assert "the device is gone" in listener.requests[1].body


def test_a_run_that_leaves_work(robot: Robot, run_here, listener) -> None:
    robot.add("t0", "t1")
    robot.configure(notify=healthchecks(listener))
    assert run_here(robot.config, "--limit", "1").code == 5
    assert listener.paths == [f"/{SECRET}/start", f"/{SECRET}/5"]


def test_a_run_that_finds_its_cache_held(robot: Robot, run_here, listener) -> None:
    robot.add("t0")
    robot.configure(notify=healthchecks(listener))
    with dino_cache.locked_cache(robot.cache):
        assert run_here(robot.config).code == 4
    assert listener.paths == [f"/{SECRET}/start", f"/{SECRET}/4"]


@pytest.mark.slow
def test_sigterm(robot: Robot, listener) -> None:
    robot.add(*(f"t{number}" for number in range(10)))
    robot.configure(notify=healthchecks(listener))
    with subprocess.Popen(
        cache_command(robot.config), env={**os.environ, "STAMP_BATCH_SECONDS": "0.5"}, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        wait_until(lambda: chunk_files(robot.cache))
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert listener.paths == [f"/{SECRET}/start", f"/{SECRET}/143"]
    assert listener.requests[1].body.startswith("STOPPED: 1 datasets, ")
    refuse_secrets(robot.cache, out, err)


@pytest.mark.parametrize(
    "fault",
    [
        {"overlap_distance_m": 99.0},
        {"dino_model": "small"},
        {"split": "nowhere.txt"},
        {"datasets": ["robot"]},
        {"datasets": {"robot": {"data_folder": "/nowhere"}}},
    ],
    ids=str,
)
def test_a_run_that_the_configuration_refuses(robot: Robot, run_here, listener, fault: dict) -> None:
    robot.add("t0")
    robot.configure(notify=healthchecks(listener))
    robot.config.write_text(yaml.safe_dump({**yaml.safe_load(robot.config.read_text()), **fault}))
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert listener.paths == [f"/{SECRET}/start", f"/{SECRET}/2"]
    body = listener.requests[1].body
    assert re.match(r"FAILED: (1 datasets|[\d.]+ m?s), exit 2\n", body)
    assert outcome.err.strip().splitlines()[0] in body
    refuse_secrets(robot.config.parent, outcome.out, outcome.err)


def test_a_dry_run_tells_no_one(robot: Robot, run_here, listener, tmp_path) -> None:
    robot.add("t0")
    robot.configure(notify=[*healthchecks(listener), {"command": f"touch {tmp_path}/told"}], metrics_file="m.prom")
    assert run_here(robot.config, "--dry-run").code == 0
    assert listener.requests == []
    assert not (tmp_path / "told").exists()
    assert not (tmp_path / "m.prom").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Each kind of hook
# ---------------------------------------------------------------------------------------------------------------------


def test_a_webhook_gets_the_outcome_as_json(robot: Robot, run_here, listener) -> None:
    robot.add("t0")
    robot.add_broken("t1")
    robot.configure(notify=[{"webhook": listener.url(f"/hook?key={SECRET}")}])
    before = time.time()
    assert run_here(robot.config).code == 1
    (request,) = listener.requests
    assert (request.path, request.headers["Content-Type"]) == (f"/hook?key={SECRET}", "application/json")
    told = json.loads(request.body)
    assert (told["verdict"], told["exit_code"], told["event"]) == ("PARTIAL", 1, "failure")
    assert told["text"].startswith("PARTIAL: ")
    assert before <= told["start"] <= time.time()
    (dataset,) = told["datasets"]
    expected = {"name": "robot", "exit_code": 1, "trajectories": 2, "completed": 1, "failed": 1, "left": 0}
    assert {key: dataset[key] for key in expected} == expected
    assert dataset["bytes"] == sum(path.stat().st_size for path in chunk_files(robot.cache))
    assert dataset["chunks"] == len(chunk_files(robot.cache))
    assert told["errors"] == ["robot: failed: t1/traj_data.pkl: position[2, 1] is nan"]


def test_whoever_gets_no_log_is_told_of_twelve_failed_trajectories_and_those_of_this_run_first(
    robot: Robot, run_here, listener
) -> None:
    robot.add("t0")
    robot.add_broken("earlier1")
    robot.configure(max_attempts=1)
    assert run_here(robot.config).code == 1
    for number in range(11):
        robot.add_broken(f"now{number:02d}")
    robot.configure(max_attempts=1, notify=[{"ntfy": listener.url("/topic")}])
    assert run_here(robot.config).code == 1
    (request,) = listener.requests
    verdict, *lines, rest = request.body.splitlines()
    assert verdict.startswith("PARTIAL: ")
    reason = "traj_data.pkl: position[2, 1] is nan"
    assert lines == [f"robot: failed: now{number:02d}/{reason}" for number in range(10)]
    assert rest.startswith("robot: 2 more failed; ")
    assert "show --all" in rest


def test_ntfy_gets_a_title_and_a_priority(robot: Robot, run_here, listener) -> None:
    robot.add("t0")
    robot.configure(notify=[{"ntfy": listener.url("/topic")}])
    assert run_here(robot.config).code == 0
    robot.configure(notify=[{"ntfy": listener.url("/topic")}], split="nowhere.txt")
    assert run_here(robot.config).code == 2
    good, bad = listener.requests
    assert good.headers["Title"].startswith("dino_cache OK on ")
    assert (good.headers["Priority"], bad.headers["Priority"]) == ("low", "high")
    assert re.match(r"FAILED: \S+ s, exit 2\nerror: ", bad.body)


def test_a_command_gets_the_verdict_and_the_exit_code(robot: Robot, run_here, tmp_path) -> None:
    robot.add("t0")
    command = 'echo "$DINO_CACHE_EXIT_CODE $DINO_CACHE_VERDICT $DINO_CACHE_EVENT" > told; cat >> told'
    robot.configure(notify=[{"command": f"cd {tmp_path}; {command}"}])
    outcome = run_here(robot.config, "--limit", "1")
    assert outcome.code == 0
    first, second = (tmp_path / "told").read_text().splitlines()
    assert first == "0 OK success"
    assert second.startswith("OK: 1 datasets, 1 completed (+1)")


@pytest.mark.parametrize(("arguments", "event"), [((), "success"), (("--limit", "1"), "stop")])
def test_a_hook_hears_of_what_it_wants(robot: Robot, run_here, listener, arguments, event) -> None:
    robot.add("t0", "t1")
    robot.configure(notify=[{"webhook": listener.url(f"/{name}"), "on": [name]} for name in hooks.EVENTS])
    run_here(robot.config, *arguments)
    assert listener.paths == [f"/{event}"]


def test_environment_variables_and_passwords_of_urls(robot: Robot, run_here, listener, monkeypatch) -> None:
    monkeypatch.setenv("HOOK_SECRET", SECRET)
    robot.add("t0")
    robot.configure(notify=[{"webhook": f"http://me:{SECRET}@{listener.host}/${{HOOK_SECRET}}"}])
    outcome = run_here(robot.config)
    (request,) = listener.requests
    assert request.path == f"/{SECRET}"
    assert request.headers["Authorization"] == "Basic bWU6czNjcjN0"  # printf me:s3cr3t | base64
    assert request.headers["Host"] == listener.host
    refuse_secrets(robot.cache, outcome.out, outcome.err)


# ---------------------------------------------------------------------------------------------------------------------
# Hooks that fail
# ---------------------------------------------------------------------------------------------------------------------


def check_only_warned(robot: Robot, outcome: Any, *parts: str) -> None:
    """The run ended as ever, with one warning, which holds no secret; nor does anything else."""
    assert outcome.code == 0
    (warning,) = warnings_of(outcome)
    for part in parts:
        assert part in warning
    assert warning in (robot.cache / "dino_cache.log").read_text()
    assert "Traceback" not in outcome.err
    refuse_secrets(robot.cache, outcome.out, outcome.err)


@pytest.mark.parametrize("kind", ["healthchecks", "webhook", "ntfy"])
def test_a_server_that_answers_500(robot: Robot, run_here, listener, kind: str) -> None:
    listener.answers = [500]
    robot.add("t0")
    robot.configure(notify=[{kind: listener.url(f"/{SECRET}?{SECRET}")}])
    check_only_warned(robot, run_here(robot.config), f"{kind} at {listener.host}", "it answered 500")


@pytest.mark.parametrize("kind", ["healthchecks", "webhook", "ntfy"])
def test_a_server_that_never_answers(robot: Robot, run_here, listener, impatient, kind: str) -> None:
    listener.answers = [None]
    robot.add("t0")
    robot.configure(notify=[{kind: listener.url(f"/{SECRET}")}])
    check_only_warned(robot, run_here(robot.config), f"{kind} at {listener.host}", "no answer within 2 s")


def test_a_server_that_is_away(robot: Robot, run_here, listener) -> None:
    listener.close()
    robot.add("t0")
    robot.configure(notify=healthchecks(listener))
    check_only_warned(robot, run_here(robot.config), f"healthchecks at {listener.host}", "Connection refused")


def test_a_start_that_fails_is_told_where_the_end_does_not(robot: Robot, run_here, listener) -> None:
    listener.answers = [500, 200]
    robot.add("t0")
    robot.configure(notify=healthchecks(listener))
    check_only_warned(robot, run_here(robot.config), "it answered 500")
    assert listener.paths == [f"/{SECRET}/start", f"/{SECRET}/0"]


def test_a_start_that_takes_its_time_comes_before_the_end(robot: Robot, run_here, listener, monkeypatch) -> None:
    handle = listener._server.RequestHandlerClass.do_POST

    def handle_late(handler: Any) -> None:
        if handler.path.endswith("/start"):
            listener.is_over.wait(1)
        handle(handler)

    monkeypatch.setattr(listener._server.RequestHandlerClass, "do_POST", handle_late)
    robot.configure(notify=healthchecks(listener), not_a_key=1)
    outcome = run_here(robot.config)
    assert (outcome.code, warnings_of(outcome)) == (2, [])
    assert listener.paths == [f"/{SECRET}/start", f"/{SECRET}/2"]


def test_a_server_that_answers_with_the_secret(robot: Robot, run_here, listener, monkeypatch) -> None:
    def answer(handler: Any) -> None:
        handler.wfile.write(f"nonsense {handler.path}\r\n\r\n".encode())

    monkeypatch.setattr(listener._server.RequestHandlerClass, "do_POST", answer)
    robot.add("t0")
    robot.configure(notify=[{"webhook": listener.url(f"/{SECRET}")}])
    check_only_warned(robot, run_here(robot.config), "BadStatusLine")


def test_an_answer_that_comes_in_drips(robot: Robot, run_here, listener, impatient, monkeypatch) -> None:
    """Each byte comes in time; all of them would take for ever."""

    def drip(handler: Any) -> None:
        handler.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not listener.is_over.wait(0.2):
            handler.wfile.write(b"x")

    monkeypatch.setattr(listener._server.RequestHandlerClass, "do_POST", drip)
    robot.add("t0")
    robot.configure(notify=[{"webhook": listener.url(f"/{SECRET}")}])
    check_only_warned(robot, run_here(robot.config), "no answer within 2 s")


def test_a_host_whose_name_never_resolves(robot: Robot, run_here, impatient, monkeypatch) -> None:
    is_over = threading.Event()
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: is_over.wait(60))
    robot.add("t0")
    robot.configure(notify=[{"webhook": f"http://slow.example/{SECRET}"}])
    check_only_warned(robot, run_here(robot.config), "webhook at slow.example", "no answer within 2 s")
    is_over.set()


def test_a_redirect_to_another_host_is_not_followed(robot: Robot, run_here, listener) -> None:
    other = Listener()
    listener.answers = [(307, other.url("/")), (302, other.url("/"))]
    robot.add("t0")
    robot.configure(notify=healthchecks(listener))
    check_only_warned(robot, run_here(robot.config), "it answered 302, which leads to another host and is not followed")
    assert other.requests == []
    other.close()


def test_a_redirect_on_the_same_host_is_followed(robot: Robot, run_here, listener) -> None:
    listener.answers = [(302, listener.url("/moved")), 200]
    robot.add("t0")
    robot.configure(notify=[{"webhook": listener.url("/old")}])
    assert warnings_of(run_here(robot.config)) == []
    assert listener.paths == ["/old", "/moved"]


@pytest.mark.parametrize(
    ("command", "why"),
    [
        ("exit 7", "it ended with exit code 7"),
        ("kill -9 $$", "it was ended by signal 9"),
        (f"/nowhere/{SECRET}", "it ended with exit code 127"),
        ("sleep 60", "no answer within 2 s"),
    ],
)
def test_a_command_that_fails_or_hangs(robot: Robot, run_here, impatient, command: str, why: str) -> None:
    robot.add("t0")
    robot.configure(notify=[{"command": f"echo {SECRET}; echo {SECRET} >&2; {command}"}])
    check_only_warned(robot, run_here(robot.config), "notify entry 1 (command)", why)


def test_a_command_that_hangs_is_ended_with_what_it_started(robot: Robot, run_here, impatient, tmp_path) -> None:
    robot.add("t0")
    robot.configure(notify=[{"command": f"sleep 600 & echo $! > {tmp_path}/pid; wait"}])
    run_here(robot.config)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or "(sleep) Z" in Path(f"/proc/{pid}/stat").read_text())


@pytest.mark.slow
def test_a_process_ends_while_a_hook_hangs(robot: Robot, listener) -> None:
    """A real process, with the real ten seconds: nothing of the hook keeps it."""
    listener.answers = [None]
    robot.add("t0")
    robot.configure(notify=[*healthchecks(listener), {"webhook": listener.url("/")}])
    done = run_cache(robot.config, timeout=60)
    assert done.returncode == 0
    assert sum("no answer within 10 s" in line for line in done.stderr.splitlines()) == 2
    refuse_secrets(robot.cache, done.stdout, done.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes in the configuration
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("notify", "message"),
    [
        ({"webhook": f"http://h/{SECRET}"}, "notify: needs a list, like"),
        (f"http://h/{SECRET}", "notify: needs a list, like"),
        ([f"http://h/{SECRET}"], "entry 1: needs a kind and its address"),
        ([{"webhok": f"http://h/{SECRET}"}], "entry 1: should be one of healthchecks, webhook, ntfy, command"),
        ([{"webhook": f"{SECRET}.example/x"}], "entry 1: needs a URL that begins with http:// or https://"),
        ([{"webhook": f"ftp://h/{SECRET}"}], "entry 1: needs a URL that begins with http:// or https://"),
        ([{"webhook": f"http://h/{SECRET} x"}], "entry 1: a URL has no spaces"),
        ([{"webhook": f"http://h:{SECRET}/"}], "entry 1: this is no URL"),
        ([{"webhook": f"http://h/$NOT_THERE/{SECRET}"}], "entry 1: the environment variable NOT_THERE is not set"),
        ([{"webhook": 7}], "entry 1: needs a URL"),
        ([{"webhook": f"http://h/{SECRET}", "on": "failure"}], "entry 1: on: needs a list of failure, stop, success"),
        ([{"webhook": f"http://h/{SECRET}", "on": ["faliure"]}], "entry 1: on: needs a list of failure, stop, success"),
        ([{"healthchecks": f"http://h/{SECRET}", "on": ["stop"]}], "entry 1: on: healthchecks is always told"),
        ([{"webhook": f"http://h/{SECRET}", "ntfy": f"http://h/{SECRET}"}], "entry 1: needs one kind of"),
        ([{"command": ["mail", SECRET]}], "entry 1: needs a command, as one would type it"),
    ],
    ids=lambda value: value if isinstance(value, str) and SECRET not in value else "",
)
@pytest.mark.parametrize("is_dry", [False, True])
def test_a_mistake_is_refused_and_no_secret_is_shown(robot: Robot, run_here, notify, message, is_dry) -> None:
    robot.add("t0")
    robot.configure(notify=notify)
    outcome = run_here(robot.config, *(["--dry-run"] if is_dry else []))
    assert outcome.code == 2
    assert f"{robot.config}: " in outcome.err
    assert message in outcome.err
    assert not robot.cache.exists()
    refuse_secrets(robot.config.parent, outcome.out, outcome.err)


def test_the_good_hooks_hear_of_a_mistake_in_another(robot: Robot, run_here, listener) -> None:
    robot.add("t0")
    robot.configure(notify=[{"webhok": "http://h"}, *healthchecks(listener)])
    assert run_here(robot.config).code == 2
    assert listener.paths == [f"/{SECRET}/start", f"/{SECRET}/2"]


@pytest.mark.parametrize(
    "text", [f"notfy: [{{webhook: 'https://h/{SECRET}'}}]", f"notify: [{{webhook: 'https://h/{SECRET}']"]
)
def test_a_misspelt_key_or_bad_yaml_shows_no_secret(robot: Robot, run_here, text: str) -> None:
    robot.config.write_text(robot.config.read_text() + text)
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert str(robot.config) in outcome.err
    refuse_secrets(robot.config.parent, outcome.out, outcome.err)


@pytest.mark.parametrize("key", ["notify", "metrics_file"])
def test_hooks_are_the_same_for_all_datasets(robot: Robot, run_here, listener, key: str) -> None:
    robot.add("t0")
    robot.configure()
    content = yaml.safe_load(robot.config.read_text())
    value = healthchecks(listener) if key == "notify" else "m.prom"
    content["datasets"]["robot"][key] = value
    robot.config.write_text(yaml.safe_dump(content))
    assert run_here(robot.config).code == 0
    content["datasets"]["second"] = {"data_folder": str(robot.data), "cache_dir": "second"}
    robot.config.write_text(yaml.safe_dump(content))
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert f"{key}: must be the same for all datasets: give it at the top" in outcome.err
    refuse_secrets(robot.cache, outcome.out, outcome.err)


@pytest.mark.slow
def test_a_config_that_can_be_read_only_once(robot: Robot, listener) -> None:
    robot.add("t0")
    robot.configure(notify=healthchecks(listener))
    command = " ".join(cache_command(Path("X"))).replace("--config X", f"--config <(cat {robot.config})")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert listener.paths == [f"/{SECRET}/start", f"/{SECRET}/0"]


def test_without_hooks_nothing_of_them_is_imported(robot: Robot) -> None:
    code = f"import sys, dino_cache; dino_cache.load_config({str(robot.config)!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"dino_cache_extras.hooks", "urllib.request"} & {*done.stdout.split()}


# ---------------------------------------------------------------------------------------------------------------------
# Metrics
# ---------------------------------------------------------------------------------------------------------------------


def read_metrics(path: Path) -> dict[Any, float]:
    """Name, or name and dataset -> value, by prometheus_client's own parser."""
    families = [*text_string_to_metric_families(path.read_text())]
    assert all(family.type == "gauge" and family.documentation for family in families)
    samples = [sample for family in families for sample in family.samples]
    found = {(s.name, s.labels["dataset"]) if s.labels else s.name: s.value for s in samples}
    assert len(found) == len(samples)
    return found


def test_a_run_leaves_its_numbers(robot: Robot, run_here, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("WHERE", "m.prom")
    robot.add("t0")
    robot.add_broken("t1")
    robot.configure(metrics_file="${WHERE}")
    before = time.time()
    assert run_here(robot.config).code == 1
    found = read_metrics(tmp_path / "m.prom")
    assert before <= found["dino_cache_last_run_end_timestamp_seconds"] <= time.time()
    assert found["dino_cache_last_run_exit_code"] == 1
    assert "dino_cache_last_success_timestamp_seconds" not in found
    expected = {"": 2, "_completed": 1, "_failed": 1, "_left": 0}
    assert {key: found[f"dino_cache_trajectories{key}", "robot"] for key in expected} == expected
    files = chunk_files(robot.cache)
    assert found["dino_cache_chunks", "robot"] == len(files)
    assert found["dino_cache_written_bytes", "robot"] == sum(path.stat().st_size for path in files)
    assert found["dino_cache_encoded_frames", "robot"] > 0
    assert found["dino_cache_work_seconds", "robot"] > 0
    assert sorted(path.name for path in tmp_path.glob("m.prom*")) == ["m.prom"]


def test_the_time_of_the_last_success_stays(robot: Robot, run_here, tmp_path: Path) -> None:
    robot.add("t0")
    robot.configure(metrics_file="m.prom")
    assert run_here(robot.config).code == 0
    good = read_metrics(tmp_path / "m.prom")
    assert good["dino_cache_last_success_timestamp_seconds"] == good["dino_cache_last_run_end_timestamp_seconds"]
    robot.configure(metrics_file="m.prom", split="nowhere.txt")
    robot.config.write_text(robot.config.read_text() + "not_a_key: 1\n")
    assert run_here(robot.config).code == 2
    bad = read_metrics(tmp_path / "m.prom")
    assert bad["dino_cache_last_run_exit_code"] == 2
    assert bad["dino_cache_last_success_timestamp_seconds"] == good["dino_cache_last_success_timestamp_seconds"]
    assert bad["dino_cache_trajectories_completed", "robot"] == 1  # it is as it was


ODD_NAME = 'a "b"\\n\\ c\nd\u00e9'


def test_names_of_datasets_are_escaped_and_kept(robot: Robot, run_here, tmp_path: Path) -> None:
    robot.add("t0")
    robot.configure(metrics_file="m.prom")
    content = yaml.safe_load(robot.config.read_text())
    content["datasets"] = {ODD_NAME: content["datasets"]["robot"]}
    robot.config.write_text(yaml.safe_dump(content))
    assert run_here(robot.config).code == 0
    assert read_metrics(tmp_path / "m.prom")["dino_cache_trajectories_completed", ODD_NAME] == 1
    content["datasets"]["robot"] = {"data_folder": str(robot.data), "cache_dir": "second"}
    robot.config.write_text(yaml.safe_dump(content))
    assert run_here(robot.config, "--dataset", "robot").code == 0
    found = read_metrics(tmp_path / "m.prom")
    assert found["dino_cache_trajectories_completed", ODD_NAME] == 1
    assert found["dino_cache_trajectories_completed", "robot"] == 1
    content["datasets"].pop(ODD_NAME)
    robot.config.write_text(yaml.safe_dump(content))
    assert run_here(robot.config).code == 0
    assert ("dino_cache_trajectories_completed", ODD_NAME) not in read_metrics(tmp_path / "m.prom")


def test_another_file_is_never_replaced(robot: Robot, run_here) -> None:
    robot.add("t0")
    target = robot.data / "t0/traj_data.pkl"
    before = target.read_bytes()
    robot.configure(metrics_file=str(target))
    outcome = run_here(robot.config)
    assert outcome.code == 2
    assert "another file is there, which dino_cache did not write" in outcome.err
    assert target.read_bytes() == before


@pytest.mark.parametrize("where", ["nowhere/m.prom", "file/m.prom"])
def test_a_metrics_file_that_cannot_be_written(robot: Robot, run_here, tmp_path: Path, where: str) -> None:
    (tmp_path / "file").touch()
    robot.add("t0")
    robot.configure(metrics_file=where)
    check_only_warned(robot, run_here(robot.config), f"metrics_file {tmp_path / where}: ")


# ---------------------------------------------------------------------------------------------------------------------
# ops/dino-cache.logrotate
# ---------------------------------------------------------------------------------------------------------------------


def test_a_rotated_log_lies_in_nobodys_way(robot: Robot, run_here) -> None:
    robot.add("t0")
    assert run_here(robot.config).code == 0
    (robot.cache / f"{LOG_FILE}.1.gz").write_bytes(b"old lines")
    robot.add("t1")
    assert run_here(robot.config).code == 0
    assert run_utils("verify", "--cache-dir", str(robot.cache), "--repair", "--yes").returncode == 0
    assert (robot.cache / f"{LOG_FILE}.1.gz").read_bytes() == b"old lines"
