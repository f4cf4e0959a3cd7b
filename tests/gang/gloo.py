"""Gloo groups among the threads of a test."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch.distributed as dist

from model.layout import Layout
from model.moe import ExpertExchange, LocalExchange
from serving.gang.exchange import EXCHANGES
from serving.gang.fabric import GlooFabric

Result = TypeVar("Result")
TIMEOUT_S = 20.0


def gloo_group(size: int, timeout_s: float = TIMEOUT_S) -> list[GlooFabric]:
    """The members of one group, in rank order."""
    store = dist.HashStore()
    return together(
        size, lambda rank: GlooFabric(store, "test", rank, size, "127.0.0.1", timeout_s)
    )


def together(size: int, call: Callable[[int], Result]) -> list[Result]:
    """Calls once for every rank, each on a thread of its own."""
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(call, range(size)))


def real_exchanges(kind: str) -> Callable[[Layout], Sequence[ExpertExchange]]:
    """The exchanges that the gang uses, for the harness of the model's parity tests."""

    def build(layout: Layout) -> Sequence[ExpertExchange]:
        if layout.ranks == 1:
            return [LocalExchange()]
        experts = layout.config.n_routed_experts
        return [EXCHANGES[kind](fabric, experts) for fabric in gloo_group(layout.ranks)]

    return build
