"""Groups among the threads of a test: gloo's, over shared memory, and NCCL's."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
import torch.distributed as dist

from model.layout import Layout
from model.moe import ExpertExchange, LocalExchange
from serving.gang.exchange import EXCHANGES
from serving.gang.fabric import Fabric, GlooFabric
from serving.gang.meeting import Meeting, join
from serving.gang.nccl import NcclFabric, new_unique_id
from serving.gang.shared_memory import SharedMemoryFabric
from tests.gang import fake_nccl

Result = TypeVar("Result")
TIMEOUT_S = 120.0


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


def threaded_nccl_group(size: int, timeout_s: float = TIMEOUT_S) -> list[NcclFabric]:
    """The fabric of GPUs over a NCCL that moves host memory."""
    name = bytes(value & 0xFF for value in fake_nccl.get_unique_id())

    def member(rank: int) -> NcclFabric:
        return NcclFabric(name, rank, size, timeout_s, nccl=fake_nccl, cuda=fake_nccl)

    return together(size, member)


def nccl_group(size: int, timeout_s: float = TIMEOUT_S) -> list[NcclFabric]:
    """The same on real GPUs, one a rank."""
    name = new_unique_id()

    def member(rank: int) -> NcclFabric:
        torch.cuda.set_device(rank)
        return NcclFabric(name, rank, size, timeout_s)

    return together(size, member)


GROUPS: dict[str, Callable[..., Sequence[Fabric]]] = {
    "gloo": gloo_group,
    "shared_memory": shared_memory_group,
}
FABRICS = GROUPS | {"threaded nccl": threaded_nccl_group, "nccl": nccl_group}


def sizes_of(kind: str, sizes: Iterable[int]) -> list[int]:
    """Those of the sizes that this machine has devices for; NCCL also goes with one rank."""
    if kind != "nccl":
        return list(sizes)
    return [size for size in (1, *sizes) if size <= torch.cuda.device_count()]


def device_of(kind: str, rank: int) -> torch.device:
    """Where the tensors of a member are."""
    return torch.device("cuda", rank) if kind == "nccl" else torch.device("cpu")


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
