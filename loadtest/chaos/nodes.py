"""Several Ray nodes with their own addresses on one machine, to be cut off and killed.

Each node is a network namespace with a cable (a veth pair) into one bridge. What runs in a
namespace is known by it, so that a node can be killed, and everything be removed, by that alone.
Root only. GPUs are numbers that Ray believes in: enough to see where ranks are placed.
"""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

GCS_PORT = 6379
# A raylet waits only so long to be told ports that its agents chose; these are each node's own.
_AGENT_PORTS = {
    "dashboard-agent-grpc-port": 6401,
    "dashboard-agent-listen-port": 6402,
    "runtime-env-agent-port": 6403,
    "metrics-export-port": 6404,
}
_RESOLVERS = Path("/etc/netns")  # in here, a folder per namespace that `ip netns exec` lays on /etc
_START_S = 60.0
_OBJECT_STORE_BYTES = 100 * 1024 * 1024
_FAST_DEATH = {  # a node is dead after three seconds without a sign of life
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class NodesError(Exception):
    """The cluster could not be made; the message says what failed."""


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """What Ray is to believe of a node."""

    cpus: int = 2
    gpus: int = 0


@dataclass(slots=True)
class Node:
    """One node: a namespace, its address, and the `ray start` that runs there."""

    name: str  # of the namespace
    cable: str  # the bridge's end of it
    address: str
    spec: NodeSpec
    process: subprocess.Popen[bytes] | None = None

    @property
    def pids(self) -> list[int]:
        """Every process of the node."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def titled(self, text: str) -> list[int]:
        """Its processes whose command line contains a text."""
        return [pid for pid in self.pids if text.encode() in _command_line(pid)]


@dataclass(slots=True)
class NodeCluster:
    """The nodes, the first of which is the head, and what every process of it needs to know."""

    nodes: list[Node]
    bridge: str
    folder: Path
    environment: dict[str, str] = field(repr=False)

    @property
    def head(self) -> Node:
        return self.nodes[0]

    @property
    def address(self) -> str:
        """For RAY_ADDRESS."""
        return f"{self.head.address}:{GCS_PORT}"

    def spawn(
        self, node: Node, command: Sequence[str], log: Path, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Starts a program on a node, its output in a file."""
        with log.open("ab") as output:
            return subprocess.Popen(
                ["ip", "netns", "exec", node.name, *command],
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def link(self, node: Node, up: bool) -> None:
        """Pulls the node's cable, or puts it back."""
        _ip("link", "set", node.cable, "up" if up else "down")

    def kill_raylet(self, node: Node) -> None:
        """The node's raylet dies at once; Ray ends the node's workers with it."""
        for pid in node.titled("raylet/raylet"):
            _kill(pid)

    def kill(self, node: Node) -> None:
        """Power failure: every process of the node."""
        while pids := node.pids:
            for pid in pids:
                _kill(pid)
            time.sleep(0.02)
        if node.process is not None:
            node.process.wait()

    def start(self, *nodes: Node) -> None:
        """Starts Ray on nodes that have none, each with an empty disk, and waits until it says so.

        Raises:
            NodesError: one did not come up.
        """
        for node in nodes:
            ray = [sys.executable, "-m", "ray.scripts.scripts", "start"]
            shutil.rmtree(self._temporary(node), ignore_errors=True)
            self._log(node).unlink(missing_ok=True)
            node.process = self.spawn(node, [*ray, *self._options(node)], self._log(node))
        deadline = time.monotonic() + _START_S
        for node in nodes:
            while b"Ray runtime started" not in self._log(node).read_bytes():
                ended = node.process is None or node.process.poll() is not None
                if ended or time.monotonic() > deadline:
                    text = self._log(node).read_text(errors="replace")[-2000:]
                    raise NodesError(f"Ray did not start on {node.address}:\n{text}")
                time.sleep(0.1)

    def _log(self, node: Node) -> Path:
        return self.folder / f"{node.name}.log"

    def _temporary(self, node: Node) -> Path:
        return self.folder / node.cable

    def _options(self, node: Node) -> list[str]:
        options = [
            f"--node-ip-address={node.address}",
            f"--num-cpus={node.spec.cpus}",
            f"--num-gpus={node.spec.gpus}",
            f"--object-store-memory={_OBJECT_STORE_BYTES}",
            f"--temp-dir={self._temporary(node)}",
            *(f"--{name}={port}" for name, port in _AGENT_PORTS.items()),
            "--disable-usage-stats",
            "--block",
        ]
        if node is not self.head:
            return [*options, f"--address={self.address}"]
        return [*options, "--head", f"--port={GCS_PORT}", "--include-dashboard=false"]


def why_not() -> str | None:
    """Why this machine cannot have such a cluster; None if it can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no `ip` command (Debian: apt-get install iproute2)"
    mark = f"xl{secrets.token_hex(3)}"
    try:
        _refuse_names(mark)
        _ip("netns", "add", mark)
        _ip("link", "add", mark, "type", "bridge")
        _ip("link", "add", f"{mark}v", "type", "veth", "peer", "name", "eth0", "netns", mark)
    except (NodesError, OSError) as error:
        return f"network namespaces are not permitted here ({error})"
    finally:
        shutil.rmtree(_RESOLVERS / mark, ignore_errors=True)
        for thing in (("link", "del", f"{mark}v"), ("link", "del", mark), ("netns", "del", mark)):
            with contextlib.suppress(NodesError):
                _ip(*thing)
    return None


@contextmanager
def node_cluster(
    specs: Sequence[NodeSpec],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[str], AbstractContextManager[Mapping[str, str]]] | None = None,
) -> Iterator[NodeCluster]:
    """A running cluster of these nodes, the first of them the head; afterwards nothing is left.

    Args:
        folder: short, empty, for logs and Ray's own files.
        environment: more variables for every process of the cluster.
        prepare: given this machine's own address in the nodes' network, once that is there and
            before Ray is; entered for as long as the cluster runs, and gives more variables.

    Raises:
        NodesError: it did not come up.
    """
    mark = f"xl{secrets.token_hex(2)}"
    subnet = f"10.{secrets.randbelow(100) + 100}.{secrets.randbelow(256)}"
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(24)}
    variables = inherited | _FAST_DEATH | secret | dict(environment or {})
    nodes = [
        Node(f"{mark}n{i}", f"{mark}v{i}", f"{subnet}.{i + 1}", spec)
        for i, spec in enumerate(specs)
    ]
    cluster = NodeCluster(nodes, mark, folder, variables)
    try:
        _ip("link", "add", mark, "type", "bridge")
        _ip("addr", "add", f"{subnet}.254/24", "dev", mark)
        _ip("link", "set", mark, "up")
        for node in nodes:
            _plug_in(node, mark, f"{subnet}.254")
        with nullcontext({}) if prepare is None else prepare(f"{subnet}.254") as more:
            variables.update(more)
            cluster.start(nodes[0])
            cluster.start(*nodes[1:])
            yield cluster
    finally:
        _remove(cluster)


def _plug_in(node: Node, bridge: str, gateway: str) -> None:
    _refuse_names(node.name)
    _ip("netns", "add", node.name)
    _ip("link", "add", node.cable, "type", "veth", "peer", "name", "eth0", "netns", node.name)
    _ip("link", "set", node.cable, "master", bridge, "up")
    _ip("-n", node.name, "addr", "add", f"{node.address}/24", "dev", "eth0")
    for device in ("lo", "eth0"):
        _ip("-n", node.name, "link", "set", device, "up")
    _ip("-n", node.name, "route", "add", "default", "via", gateway)


def _refuse_names(namespace: str) -> None:
    """A name server that refuses: one out of reach would make whoever asks for a name wait."""
    folder = _RESOLVERS / namespace
    folder.mkdir(parents=True)
    (folder / "resolv.conf").write_text("nameserver 127.0.0.1\n")


def _remove(cluster: NodeCluster) -> None:
    """Processes first: a namespace lives as long as they do."""
    for node in cluster.nodes:
        with contextlib.suppress(NodesError):  # it never came to be
            cluster.kill(node)
            _ip("netns", "del", node.name)  # its cable goes with it
        shutil.rmtree(_RESOLVERS / node.name, ignore_errors=True)
    with contextlib.suppress(NodesError):
        _ip("link", "del", cluster.bridge)


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise NodesError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""  # it ended in the meantime


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
