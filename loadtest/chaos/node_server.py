"""A server under test on several nodes of one machine, each a network namespace.

The head holds control and no model; engines and ranks lie on the others, which are what is hurt.
Clients reach the head's proxy, and commands run there; where the head itself is hurt, on another
node. The program that deployed is the head's, and dies with it.
"""

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from deploy.local_ray import serve_environment
from loadtest.chaos.nodes import Node, NodeCluster, NodesError, NodeSpec, node_cluster
from loadtest.chaos.processes import Process
from loadtest.chaos.redis_store import redis_store
from loadtest.chaos.server import MARK, PROGRAM, TARGETS, Layout, Server, ready, write_settings
from loadtest.chaos.waiting import ChaosError

_PORT = 8000  # the namespaces are the suite's own
_LONGEST_STREAM_S = 600.0
_WORKERS = 3


@dataclass(frozen=True)
class NodeServer(Server):
    """One of several nodes."""

    cluster: NodeCluster | None = None

    @property
    def workers(self) -> list[Node]:
        """The nodes that may be hurt: all but the head."""
        assert self.cluster is not None
        return self.cluster.nodes[1:]

    def on(self, node: Node) -> list[Process]:
        """Processes with a role that run on a node."""
        there = set(node.pids)
        return [process for process in self.processes() if process.pid in there]


@asynccontextmanager
async def running_on_nodes(layout: Layout) -> AsyncIterator[NodeServer]:
    """A server for the body; afterwards neither processes nor namespaces are left.

    Raises:
        ChaosError: it did not come up.
    """
    specs = [NodeSpec(cpus=0), *[NodeSpec(cpus=1)] * _WORKERS]
    with tempfile.TemporaryDirectory(prefix="xc-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        mark = {MARK: name, "PYTHONUNBUFFERED": "1"}
        store = partial(redis_store, folder=folder) if layout.redis else None
        variables = mark | serve_environment(folder, _LONGEST_STREAM_S)
        try:
            with node_cluster(specs, folder, variables, store) as cluster:
                yield await _served(cluster, layout, folder)
        except NodesError as error:
            raise ChaosError(f"the nodes did not come up: {error}") from error


async def _served(cluster: NodeCluster, layout: Layout, folder: Path) -> NodeServer:
    config, log = folder / "settings.yaml", folder / "up.log"
    settings = layout.settings(_PORT, folder / TARGETS)
    settings["gang"]["placement"] = "SPREAD"
    settings["ingress"]["host"] = "0.0.0.0"
    del settings["internal_host"]  # each node's own
    write_settings(config, settings)
    command = [*PROGRAM, "up", "--config", str(config)]
    # A driver elsewhere would take the head for its own node: Ray looks for it by process.
    process = cluster.spawn(cluster.head, command, log, RAY_ADDRESS=cluster.address)
    await ready(process, log)
    front = cluster.nodes[1] if layout.redis else cluster.head
    return NodeServer(
        url=f"http://{front.address}:{_PORT}",
        mark=f"{MARK}={folder}",
        workdir=folder,
        config=config,
        log=log,
        layout=layout,
        variables={**cluster.environment, "RAY_ADDRESS": cluster.address},
        prefix=("ip", "netns", "exec", front.name),
        cluster=cluster,
    )
