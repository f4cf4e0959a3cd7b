"""Where this process is, and what Ray and Serve are about to do to it."""

import math
import time

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]  # a compiled module
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, placement_group_table

from serving.config import Settings
from serving.telemetry.logs import get_logger

log = get_logger("node")


def node_address(settings: Settings) -> str:
    """The address by which the fleet's other processes reach this one.

    As set, else what this node joined the cluster with. Ray's own `get_node_ip_address` looks
    at the machine's routes instead, which need not be the cluster's network.
    """
    if settings.internal_host is not None:
        return settings.internal_host
    mine = ray.get_runtime_context().get_node_id()
    address: str = next(n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == mine)
    return address


def stopping() -> bool:
    """Whether Serve has told the replica that runs in this process to stop.

    Serve tells a deployment's own code only when it is over. The replica knows at once, and
    there is no public way to ask it.
    """
    actors = ray._private.worker.global_worker.actors.values()
    replicas = (getattr(actor, "_replica_impl", None) for actor in actors)
    return any(getattr(replica, "_shutting_down", False) for replica in replicas)


class GangNodes:
    """Watches over the nodes that a placement group is on. Its calls block."""

    def __init__(self, group: PlacementGroup) -> None:
        context = ray.get_runtime_context()
        self.own = context.get_node_id()
        self._group = group
        self._gcs = GcsClient(address=context.gcs_address)

    def draining(self, timeout_s: float) -> tuple[frozenset[str], dict[str, float]] | None:
        """The group's nodes, and of all nodes that are about to go the seconds that they have.

        None when GCS does not say: no news is not good news.
        """
        try:
            deadlines = self._gcs.get_draining_nodes(timeout=timeout_s)
            if not deadlines:
                return frozenset(), {}
            nodes = placement_group_table(self._group)["bundles_to_node_id"].values()
        except (RayError, RuntimeError) as error:
            log.event("WARNING", "nodes.unknown", error=type(error).__name__)
            return None
        now_ms = time.time() * 1000
        left = {n: (ms - now_ms) / 1000 if ms else math.inf for n, ms in deadlines.items()}
        return frozenset(nodes), left
