"""Where this process is."""

import ray


def node_address() -> str:
    """The address by which the cluster's other nodes reach this process's node.

    Ray's own `get_node_ip_address` looks at the machine's routes and not at the address that
    the node joined with: on a laptop it would open internal ports to the local network.
    """
    mine = ray.get_runtime_context().get_node_id()
    address: str = next(n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == mine)
    return address
