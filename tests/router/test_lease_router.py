"""Serve's routing, with a lease and without."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from serving.router.lease_router import LeaseRouter


@dataclass
class Queues:
    """What Serve knows of its replicas' queues."""

    lengths: dict[str, int] = field(default_factory=dict)

    def get(self, replica_id: Any) -> int | None:
        return self.lengths.get(replica_id.unique_id)


def router(**lengths: int) -> LeaseRouter:
    made: Any = LeaseRouter.__new__(LeaseRouter)  # its own constructor wants a running Serve
    made._replica_queue_len_cache = Queues(lengths)
    return made


def replicas(*names: str) -> list[Any]:
    return [SimpleNamespace(replica_id=SimpleNamespace(unique_id=name)) for name in names]


def pending(session_id: str) -> Any:
    return SimpleNamespace(metadata=SimpleNamespace(session_id=session_id))


async def chosen(made: LeaseRouter, candidates: list[Any], request: Any) -> list[list[str]]:
    ranks = await made.choose_replicas(candidates, request)
    return [[replica.replica_id.unique_id for replica in rank] for rank in ranks]


async def test_a_lease_names_the_only_candidate() -> None:
    candidates = replicas("a", "b", "c")
    assert await chosen(router(b=100), candidates, pending("b")) == [["b"]]


async def test_a_lease_on_an_engine_that_is_gone_falls_back_to_the_shortest_queues() -> None:
    candidates = replicas("a", "b", "c")
    for request in (pending("gone"), pending(""), None):
        assert await chosen(router(a=5, b=1, c=3), candidates, request) == [["b", "c"]]


async def test_a_replica_that_nobody_has_heard_of_counts_as_idle() -> None:
    assert await chosen(router(a=1), replicas("a", "new"), None) == [["new", "a"]]


async def test_equals_are_not_always_tried_in_the_same_order() -> None:
    made, candidates = router(), replicas("a", "b", "c")
    firsts = {(await chosen(made, candidates, None))[0][0] for _ in range(100)}
    assert firsts == {"a", "b", "c"}


async def test_without_replicas_there_is_no_candidate() -> None:
    assert await chosen(router(), [], pending("a")) == [[]]
