"""A whole server, started as a user starts it, for the tests of this folder."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from deploy.local_ray import free_ports

# Far above what is usual: these are for machines that neighbours slow down for minutes.
START_TIMEOUT_S = 400.0
STOP_TIMEOUT_S = 120.0
CLIENT_TIMEOUT_S = 120.0
_PORT_TAKEN = "cannot be listened on"


class PortTaken(Exception):
    """Somebody listens where the server was to."""


@dataclass(frozen=True)
class Server:
    """One `expertline up` and where to find it."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    ready_line: str
    workdir: Path

    @property
    def ready(self) -> bool:
        """Whether a request would be served now."""
        return self.get("/readyz").status_code == httpx.codes.OK

    def pids(self) -> list[int]:
        """All processes that carry this server's environment."""
        mark = f"RAY_TMPDIR={self.workdir}".encode()
        return [pid for pid in _all_pids() if mark in _told(pid, "environ").split(b"\0")]

    def find(self, title: str) -> list[int]:
        """Those whose title contains a text."""
        return [pid for pid in self.pids() if title.encode() in _told(pid, "cmdline")]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=CLIENT_TIMEOUT_S)

    def complete(self, **body: Any) -> httpx.Response:
        """Asks nano for a completion."""
        ask = {"model": "nano"} | body
        return httpx.post(f"{self.url}/v1/completions", json=ask, timeout=CLIENT_TIMEOUT_S)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of a name that have these labels, over all processes."""
        return sum(value for _, value in self.samples(name, **labels))

    def samples(self, name: str, **labels: str) -> list[tuple[dict[str, str], float]]:
        """Of all processes that answered in time, labels and value of each."""
        return [
            (sample.labels, sample.value)
            for family in text_string_to_metric_families(self.get("/metrics").text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]


@contextmanager
def running_server(*options: str) -> Iterator[Server]:
    """`expertline up` with these options, until the end of the body; nothing is left then."""
    with tempfile.TemporaryDirectory(prefix="xl", ignore_cleanup_errors=True) as folder:
        try:
            server = _started(Path(folder), options)
        except PortTaken:  # since we looked; twice would be no chance
            server = _started(Path(folder), options)
        try:
            yield server
        finally:
            _stop(server.process)


def _started(workdir: Path, options: tuple[str, ...]) -> Server:
    (port,) = free_ports(1)
    log = workdir / "up.log"
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"RAY_TMPDIR": str(workdir), "COLUMNS": "200"}
    command = [sys.executable, "-c", "from deploy.cli import main; main()", "up"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        line = _ready_line(process, log)
    except BaseException:
        _stop(process)
        raise
    return Server(f"http://127.0.0.1:{port}", process, log, line, workdir)


def _ready_line(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("ready "):
                return line
        time.sleep(0.1)
    said = log.read_text(encoding="utf-8", errors="replace")
    if _PORT_TAKEN in said:
        raise PortTaken(said)
    raise AssertionError(f"the server did not start:\n{said[-4000:]}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


def _all_pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _told(pid: int, file: str) -> bytes:
    """What /proc says of a process; nothing if it has gone, or is not ours to ask about."""
    try:
        return Path(f"/proc/{pid}/{file}").read_bytes()
    except OSError:
        return b""
