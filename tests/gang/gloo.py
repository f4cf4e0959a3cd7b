"""Groups among the threads of a test: gloo's, and those over shared memory."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch.distributed as dist

from model.layout import Layout
from model.moe import ExpertExchange, LocalExchange
from serving.gang.exchange import EXCHANGES
from serving.gang.fabric import Fabric, GlooFabric
from serving.gang.meeting import Meeting, join
from serving.gang.shared_memory import SharedMemoryFabric

Result = TypeVar("Result")
TIMEOUT_S = 20.0


def gloo_group(size: int, timeout_s: float = TIMEOUT_S) -> list[GlooFabric]:
    """The members of one group, in rank order."""
    store = dist.HashStore()
    return together(
        size, lambda rank: GlooFabric(store, "test", rank, size, "127.0.0.1", timeout_s)
    )


def shared_memory_group(size: int, timeout_s: float = TIMEOUT_S) -> list[SharedMemoryFabric]:
    """The same over shared memory."""
    meeting = Meeting(size)

    def member(rank: int) -> SharedMemoryFabric:
        if rank == 0:
            return meeting.lead(timeout_s)
        return join(meeting.address, rank, size, timeout_s)

    return together(size, member)


GROUPS: dict[str, Callable[..., Sequence[Fabric]]] = {
    "gloo": gloo_group,
    "shared_memory": shared_memory_group,
}


def together(size: int, call: Callable[[int], Result]) -> list[Result]:
    """Calls once for every rank, each on a thread of its own."""
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(call, range(size)))


def real_exchanges(kind: str, fabric: str) -> Callable[[Layout], Sequence[ExpertExchange]]:
    """The exchanges that the gang uses, for the harness of the model's parity tests."""

    def build(layout: Layout) -> Sequence[ExpertExchange]:
        if layout.ranks == 1:
            return [LocalExchange()]
        experts = layout.config.n_routed_experts
        return [EXCHANGES[kind](member, experts) for member in GROUPS[fabric](layout.ranks)]

    return build
