"""Weights from the hub where there is no network: refused soon, in our own words alone."""

import contextlib
import http.server
import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from dino_cache_extras import hub
from support import make_trajectory, run_cache, write_config


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_told_in_one_line(tmp_path: Path) -> None:
    make_trajectory(tmp_path / "data" / "t", count=6)
    config = write_config(tmp_path / "lab.yaml", tmp_path / "data", weights="pretrained")
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": ""}
    refused = run_cache(config, fake=False, env=environment)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert "http://127.0.0.1:9 cannot be reached: [Errno 111] Connection refused" in line
    assert "Ways on: go online once and run again" in line
    assert "Retry" not in refused.stdout
    assert not list(tmp_path.rglob("*.h5"))


@pytest.fixture
def silent_server() -> Iterator[str]:
    """Takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_does_not_answer_is_not_waited_for(silent_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "ANSWER_S", 0.2)
    monkeypatch.setattr(constants, "ENDPOINT", silent_server)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ConnectionError, match=r"cannot be reached: .*timed out"), hub.hub("timm/none"):
        pytest.fail("it was asked")


@pytest.mark.parametrize("status", [200, 302, 401, 404, 503])
def test_any_answer_is_one(status: int) -> None:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:  # the name is http.server's
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hub.refuse_silence(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


@pytest.mark.parametrize("endpoint", ["no address", "http://", "ftp://[/"])
def test_what_is_no_address_is_for_the_hubs_client_to_say(endpoint: str) -> None:
    with contextlib.suppress(ConnectionError):
        hub.refuse_silence(endpoint)


@pytest.mark.parametrize(
    ("name", "value"), [("ALL_PROXY", "socks5://127.0.0.1:9"), ("https_proxy", "socks5h://127.0.0.1:9")]
)
def test_a_proxy_that_cannot_be_asked_through_is_left_to_the_hubs_client(
    silent_server: str, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with hub.hub("timm/none"):
        assert not logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
    assert logging.getLogger("huggingface_hub.utils._http").isEnabledFor(logging.WARNING)
