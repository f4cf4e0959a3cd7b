"""A whole server with paced ranks, for as long as it is measured; nothing is left afterwards."""

import json
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loadtest.costs.serve import SETTINGS
from loadtest.peers.environments import peer_environment
from loadtest.peers.process import PeerFailed, last_words, started
from loadtest.workload import Workload

HOST = "127.0.0.1"
_READY_S = 180.0
_POLL_S = 0.2
_MODEL = "nano"
_REQUEST = (
    "POST /v1/chat/completions HTTP/1.1\r\nhost: %s\r\ncontent-type: application/json\r\n"
    "content-length: %d\r\n\r\n%s"
)


@dataclass(frozen=True, slots=True)
class PacedServer:
    """Where it is, and how to ask it."""

    port: int

    def request(self, number: int, pace_ms: int, max_tokens: int) -> bytes:
        """A streamed chat request as bytes on the wire; its tokens come every `pace_ms`.

        The pace is the whole server's, from the latest request on.
        """
        prompt = Workload(seed=0, endpoint="chat").prompt(number)
        body = {"model": _MODEL, "max_tokens": max_tokens, "seed": pace_ms, "stream": True}
        content = json.dumps({**prompt.body(), **body})
        return (_REQUEST % (HOST, len(content), content)).encode("ascii")


@contextmanager
def paced_server(streams: int) -> Iterator[PacedServer]:
    """A server that can run so many streams at once.

    Raises:
        PeerFailed: it did not come up.
    """
    with peer_environment() as environment:
        folder, port = Path(environment["RAY_TMPDIR"]), _free_port()
        log, settings = folder / "server.log", json.dumps(_settings(streams, port, folder))
        (folder / SETTINGS).write_text(settings, encoding="utf-8")
        command = [sys.executable, "-m", "loadtest.costs.serve", str(folder)]
        with started(command, environment, log) as process:
            deadline = time.monotonic() + _READY_S
            while not _ready(log):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise PeerFailed(last_words(log) or "the server did not come up")
                time.sleep(_POLL_S)
            yield PacedServer(port)


def _settings(streams: int, port: int, folder: Path) -> dict[str, Any]:
    """As `expertline up` has them, with room for the streams: no memory, the ranks hold nothing."""
    return {
        "gang": {"cache_tokens": streams * 8192, "device": "cpu"},
        "engine": {"max_sequences": streams, "max_step_tokens": 8192},
        "ingress": {"port": port},
        "router": {"queue_limit": streams},
        "telemetry": {"targets_directory": str(folder / "targets"), "log_level": "WARNING"},
    }


def _ready(log: Path) -> bool:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return any(line.startswith("ready ") for line in lines)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
