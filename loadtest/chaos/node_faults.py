"""What is done to a whole node: its cable pulled, its raylet or its power gone, or drained; and
to the head.

Each fault ends with the node back: new, empty and reachable.
"""

import asyncio
from abc import abstractmethod
from dataclasses import dataclass

import httpx

from loadtest.chaos.faults import Fault
from loadtest.chaos.node_server import NodeServer
from loadtest.chaos.nodes import Node, NodesError
from loadtest.chaos.operations import in_cluster
from loadtest.chaos.server import PROGRAM, Server
from loadtest.chaos.waiting import ChaosError, until

_UNPLUGGED_S = 10.0
_HEADLESS_S = 5.0
_EMPTY_S = 90.0
_DRAINED_S = 150.0


@dataclass
class NodeFault(Fault):
    """Of one node that serves, drawn anew each time.

    Attributes:
        cut_ingresses: an ingress was on it: streams through that one are cut with it.
    """

    cut_ingresses: bool = False

    @property
    def excuses(self) -> bool:
        return self.cut_ingresses

    async def strike(self, server: Server) -> None:
        assert isinstance(server, NodeServer)
        node = self._drawn(server)
        try:
            await self._hurt(server, node)
        finally:
            await asyncio.to_thread(_renew, server, node)

    @abstractmethod
    async def _hurt(self, server: NodeServer, node: Node) -> None:
        """Does it to the node."""

    def _drawn(self, server: NodeServer) -> Node:
        """A node with a rank on it, if there is one without an ingress: only its streams end
        with it."""
        serving = {node.name: {p.role for p in server.on(node)} for node in server.workers}
        nodes = [node for node in server.workers if "rank" in serving[node.name]]
        if not nodes:
            raise ChaosError("no node has a rank")
        calm = [node for node in nodes if "ingress" not in serving[node.name]]
        node = self.rng.choice(calm or nodes)
        self.cut_ingresses = "ingress" in serving[node.name]
        return node


@dataclass
class Unplug(NodeFault):
    """The link goes down: nobody is told anything."""

    name = "link down"

    async def _hurt(self, server: NodeServer, node: Node) -> None:
        assert server.cluster is not None
        server.cluster.link(node, up=False)
        await asyncio.sleep(_UNPLUGGED_S)


@dataclass
class KillRaylet(NodeFault):
    """The raylet dies, and Ray ends what it had started."""

    name = "kill raylet"

    async def _hurt(self, server: NodeServer, node: Node) -> None:
        assert server.cluster is not None
        server.cluster.kill_raylet(node)
        await until(lambda: not server.on(node), _EMPTY_S, "a node without raylet was empty")


@dataclass
class PowerOff(NodeFault):
    """Every process of the node is killed at once."""

    name = "power off a node"

    async def _hurt(self, server: NodeServer, node: Node) -> None:
        assert server.cluster is not None
        await asyncio.to_thread(server.cluster.kill, node)


@dataclass
class DrainNode(NodeFault):
    """The node is told to drain, and is taken away once nothing serves on it any more."""

    name = "drain a node"

    @property
    def excuses(self) -> bool:
        return False  # all that was there had time to leave

    async def _hurt(self, server: NodeServer, node: Node) -> None:
        await in_cluster(server, _DRAINED_S, *PROGRAM, "drain", "--node", node.address)
        roles = {"rank", "engine", "router", "ingress"}
        await until(
            lambda: not roles.intersection(p.role for p in server.on(node)),
            _EMPTY_S,
            "nothing served on a drained node",
        )


@dataclass
class HeadLoss(Fault):
    """Every process of the head is killed: GCS, its raylet, Serve's controller, a proxy. It comes
    back after a while with the same address and the same store."""

    name = "kill the head"
    cut_ingresses: bool = False

    @property
    def excuses(self) -> bool:
        return self.cut_ingresses

    async def strike(self, server: Server) -> None:
        assert isinstance(server, NodeServer)
        assert server.cluster is not None
        head = server.cluster.head
        self.cut_ingresses = "ingress" in {process.role for process in server.on(head)}
        await asyncio.to_thread(server.cluster.kill, head)
        try:
            await asyncio.sleep(_HEADLESS_S)
        finally:
            await asyncio.to_thread(_renew, server, head)

    async def recovered(self, server: Server, client: httpx.AsyncClient) -> bool:
        return bool(server.pids("controller")) and await super().recovered(server, client)


def _renew(server: NodeServer, node: Node) -> None:
    """The node's old processes go, and a new raylet comes."""
    assert server.cluster is not None
    try:
        server.cluster.kill(node)
        server.cluster.link(node, up=True)
        server.cluster.start(node)
    except NodesError as error:
        raise ChaosError(f"a node did not come back: {error}") from error
