"""The Hugging Face hub: whether it can be reached is known soon, and its own lines stay off the terminal."""

from __future__ import annotations

import contextlib
import logging
import queue
import ssl
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator

from huggingface_hub import constants, try_to_load_from_cache

ANSWER_S = 6.0  # an answer of the hub takes at most so long; its client would try for a minute, and say so each time
WEIGHTS_FILES = ("model.safetensors", "pytorch_model.bin")  # of timm's repositories


@contextlib.contextmanager
def hub(repository: str) -> Iterator[None]:
    """For loading the weights of a repository, which are taken from the hub's cache where they are in it.

    Raises:
        ConnectionError: they are not, and the hub does not answer.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.ERROR)  # it says each time that it tries again
    try:
        is_kept = any(isinstance(try_to_load_from_cache(repository, name), str) for name in WEIGHTS_FILES)
        proxies = urllib.request.getproxies()
        can_ask = "all" not in proxies and not any(proxy.startswith("socks") for proxy in proxies.values())
        if not is_kept and can_ask and not constants.HF_HUB_OFFLINE:
            refuse_silence(constants.ENDPOINT)
        yield
    finally:
        logger.setLevel(level)


def refuse_silence(endpoint: str) -> None:
    """Raise ConnectionError unless a server answers there, whatever it says. A thread asks, since looking up a host's
    name cannot be given a time."""
    answers: queue.SimpleQueue[OSError | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: answers.put(_ask(endpoint)), daemon=True).start()
    try:
        error = answers.get(timeout=ANSWER_S + 1)
    except queue.Empty:
        error = TimeoutError("no answer")
    if error is not None:
        raise ConnectionError(f"{endpoint} cannot be reached: {error}") from error


def _ask(endpoint: str) -> OSError | None:
    """Why nothing answers, or None."""
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=ANSWER_S):
            return None
    except urllib.error.HTTPError:  # an answer
        return None
    except urllib.error.URLError as error:
        reason = error.reason if isinstance(error.reason, OSError) else OSError(str(error.reason))
        return None if isinstance(reason, ssl.SSLError) else reason  # of whom it trusts the hub's client knows more
    except OSError as error:
        return error
    except Exception:  # an answer that is no HTTP, an address that is none: the client's to say
        return None
