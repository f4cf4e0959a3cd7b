"""Serve's own request routing, taught to honour a lease.

The leased engine's replica id travels as the call's session id. A call without a lease, or
whose engine has gone in the meantime, goes to the replica with the shortest known queue. Runs
in every process that holds a handle to the engines; this module stays light for that reason.
"""

import random

from ray.serve.request_router import FIFOMixin, PendingRequest, RequestRouter, RunningReplica


class LeaseRouter(FIFOMixin, RequestRouter):
    """Routes a call to the replica that its lease names."""

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        leased = pending_request.metadata.session_id if pending_request else ""
        for replica in candidate_replicas:
            if replica.replica_id.unique_id == leased:
                return [[replica]]
        known = self.replica_queue_len_cache
        shuffled = random.sample(candidate_replicas, len(candidate_replicas))
        return [sorted(shuffled, key=lambda replica: known.get(replica.replica_id) or 0)[:2]]
