"""A Redis of the suite's own, for what a cluster's head must not forget when it dies."""

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loadtest.chaos.nodes import NodesError

_PORT = 6390
_START_S = 20.0
_STOP_S = 10.0


def why_no_redis() -> str | None:
    """Why there can be none here; None if there can."""
    if shutil.which("redis-server") is None:
        return "there is no `redis-server` (Debian: apt-get install redis-server)"
    return None


@contextmanager
def redis_store(host: str, folder: Path) -> Iterator[dict[str, str]]:
    """A Redis on an address of the suite's own network; yields what Ray has to know of it.

    Raises:
        NodesError: it did not start.
    """
    options = {
        "--bind": host,
        "--port": str(_PORT),
        "--protected-mode": "no",  # the network leads nowhere but to the suite's namespaces
        "--save": "",
        "--dir": str(folder),
    }
    command = ["redis-server", *(word for option in options.items() for word in option)]
    with (folder / "redis.log").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + _START_S
        while not _answers(host):
            if process.poll() is not None or time.monotonic() > deadline:
                said = (folder / "redis.log").read_text(errors="replace")[-500:]
                raise NodesError(f"redis-server did not start: {said}")
            time.sleep(0.05)
        yield {"RAY_REDIS_ADDRESS": f"{host}:{_PORT}"}
    finally:
        process.terminate()
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(host: str) -> bool:
    try:
        socket.create_connection((host, _PORT), timeout=1.0).close()
    except OSError:
        return False
    return True
