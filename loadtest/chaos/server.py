"""A server under test: `expertline up` on a port of the loopback, watched from outside."""

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml
from prometheus_client.parser import text_string_to_metric_families

from deploy.local_ray import free_ports
from loadtest.chaos.processes import Process, marked
from loadtest.chaos.waiting import ChaosError, until
from loadtest.peers.process import last_words, started

START_S = 400.0
MODEL = "nano"
STEP_TIMEOUT_S = 8.0
TARGETS = "targets"
MARK = "EXPERTLINE_UNDER_TEST"
_REPAIRS = 1000  # each of them is meant
_QUEUE_S = 240.0  # longer than an engine takes to start on a machine that others slow down
_DISK_BYTES = 96 * 1024 * 1024
_ASK_S = 10.0
PROGRAM = (sys.executable, "-c", "from deploy.cli import main; main()")


@dataclass(frozen=True, slots=True)
class Layout:
    """How a server is cut."""

    stages: int = 1
    ranks: int = 1  # of a stage
    engines: int = 1
    ingresses: int = 1
    nodes: bool = False  # over several of them
    redis: bool = False  # keeps what the head knows

    def settings(self, port: int, targets: Path) -> dict[str, Any]:
        """As `expertline up --config` reads them: fp32, so that answers can be compared."""
        return {
            "model": {"path": MODEL, "dtype": "float32"},
            "gang": {
                "stages": self.stages,
                "expert_parallel": self.ranks,
                "cache_tokens": 8192,
                "step_timeout_s": STEP_TIMEOUT_S,
            },
            "engine": {"replicas": self.engines, "repairs_per_hour": _REPAIRS},
            "router": {"queue_timeout_s": _QUEUE_S},
            "ingress": {"port": port, "replicas": self.ingresses},
            "telemetry": {"targets_directory": str(targets)},
            "internal_host": "127.0.0.1",
            "secret": secrets.token_hex(32),  # the same when a changed configuration is applied
        }

    def __str__(self) -> str:
        where = " over nodes" if self.nodes else ""
        where += ", Redis" if self.redis else ""
        return f"{self.engines} × ({self.stages}×{self.ranks}){where}"


@dataclass(frozen=True)
class Server:
    """One that has become ready.

    Attributes:
        mark: what the environment of each of its processes holds.
        workdir: what it writes is in here; a file system of its own if `own_disk`.
        variables: the environment of a command that is to find its cluster.
        prefix: how such a command begins.
    """

    url: str
    mark: str
    workdir: Path
    config: Path
    log: Path
    layout: Layout
    own_disk: bool = False
    variables: Mapping[str, str] = field(default_factory=dict, repr=False)
    prefix: tuple[str, ...] = ()

    @property
    def targets(self) -> Path:
        """Where its processes announce where they tell their metrics."""
        return self.workdir / TARGETS

    def processes(self, *roles: str) -> list[Process]:
        """Those with one of these roles; all with a role if none is named."""
        return [p for p in marked(self.mark) if not roles or p.role in roles]

    def pids(self, role: str) -> list[int]:
        return [process.pid for process in self.processes(role)]

    async def is_ready(self, client: httpx.AsyncClient) -> bool:
        try:
            response = await client.get(f"{self.url}/readyz", timeout=_ASK_S)
        except httpx.HTTPError:
            return False
        return response.status_code == httpx.codes.OK

    async def metrics(self, client: httpx.AsyncClient) -> dict[str, list[dict[str, Any]]]:
        """Samples of the whole fleet by name, each its labels and a `value`; empty if it cannot
        be had now."""
        try:
            response = await client.get(f"{self.url}/metrics", timeout=_ASK_S)
            response.raise_for_status()
        except httpx.HTTPError:
            return {}
        found: dict[str, list[dict[str, Any]]] = {}
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                labels: dict[str, Any] = dict(sample.labels)
                found.setdefault(sample.name, []).append(labels | {"value": sample.value})
        return found


@asynccontextmanager
async def running(layout: Layout) -> AsyncIterator[Server]:
    """A server for the body; afterwards nothing of it is left.

    Raises:
        ChaosError: it did not come up.
    """
    with _workdir() as (folder, own_disk):
        (port,) = free_ports(1)
        config, log = folder / "settings.yaml", folder / "up.log"
        write_settings(config, layout.settings(port, folder / TARGETS))
        variables = environment(folder)
        command = [*PROGRAM, "up", "--config", str(config)]
        with started(command, variables, log) as process:
            await ready(process, log)
            yield Server(
                f"http://127.0.0.1:{port}",
                f"{MARK}={folder}",
                folder,
                config,
                log,
                layout,
                own_disk,
                variables,
            )


def write_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """As YAML that only its owner reads: it holds a secret."""
    path.touch(mode=0o600)
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")


def environment(folder: Path) -> dict[str, str]:
    """Of a server's processes: nothing of another cluster, and a mark of its own."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("RAY_") and name.lower() not in ("http_proxy", "https_proxy")
    }
    return kept | {
        MARK: str(folder),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "200",
    }


@contextmanager
def _workdir() -> Iterator[tuple[Path, bool]]:
    """A folder with a short name, on a small file system of its own where that is permitted."""
    folder = Path(tempfile.mkdtemp(prefix="xc-"))
    size = f"size={_DISK_BYTES}"
    mount = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
    own = bool(shutil.which("mount")) and _succeeds(mount)
    try:
        yield folder, own
    finally:
        if own:
            _succeeds(["umount", "--lazy", str(folder)])
        shutil.rmtree(folder, ignore_errors=True)


def _succeeds(command: list[str]) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


async def ready(process: "subprocess.Popen[bytes]", log: Path) -> None:
    """Until it says that it is ready."""

    def said_or_ended() -> bool:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return process.poll() is not None or any(line.startswith("ready ") for line in lines)

    await until(said_or_ended, START_S, "the server became ready")
    if process.poll() is not None:
        raise ChaosError(f"the server did not start: {last_words(log)}")
