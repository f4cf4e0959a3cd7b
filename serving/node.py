"""Where this process is."""

import ray

from serving.config import Settings


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
