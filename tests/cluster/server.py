"""A whole server, started as a user starts it, for the tests of this folder."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Server:
    """One `expertline up` and where to find it."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path
    ready_line: str
    workdir: Path

    def pids(self) -> list[int]:
        """All processes that carry this server's environment."""
        mark = f"RAY_TMPDIR={self.workdir}".encode()
        return [pid for pid in _all_pids() if mark in _environment(pid)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(*options: str) -> Iterator[Server]:
    """`expertline up` with these options, until the end of the body; nothing is left then."""
    with tempfile.TemporaryDirectory(prefix="xl", ignore_cleanup_errors=True) as folder:
        workdir, port = Path(folder), free_port()
        log = workdir / "up.log"
        environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        environment |= {"RAY_TMPDIR": folder, "COLUMNS": "200"}
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
            yield Server(f"http://127.0.0.1:{port}", process, log, line, workdir)
        finally:
            _stop(process)


def _ready_line(process: subprocess.Popen[bytes], log: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("ready "):
                return line
        time.sleep(0.1)
    raise AssertionError(f"the server did not start:\n{log.read_text(errors='replace')[-4000:]}")


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


def _environment(pid: int) -> list[bytes]:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return []
