"""The queue: whose turn it is."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from serving.fleet import LeaseRequest
from serving.router.fair_queue import FairQueue, Waiting


def waiting(name: str, tenant: str = "t", priority: int = 0, deadline: float = 10.0) -> Waiting:
    request = LeaseRequest(name, tenant, priority, 1, 1, [], 1.0)
    return Waiting(request, f"ingress-{tenant}", 0.0, deadline)


def drain(queue: FairQueue) -> list[str]:
    names = []
    while (head := queue.head()) is not None:
        queue.take(head)
        names.append(head.request.request_id)
    return names


def test_tenants_take_turns() -> None:
    queue = FairQueue(10)
    for name in ("a1", "a2", "a3", "b1", "c1", "b2"):
        queue.push(waiting(name, tenant=name[0]))
    assert drain(queue) == ["a1", "b1", "c1", "a2", "b2", "a3"]


def test_a_lower_priority_number_goes_first() -> None:
    queue = FairQueue(10)
    for name, priority in (("late", 5), ("first", -1), ("middle", 0)):
        queue.push(waiting(name, priority=priority))
    assert drain(queue) == ["first", "middle", "late"]


def test_a_dropped_request_has_no_turn() -> None:
    queue = FairQueue(10)
    for name in ("1", "2", "3"):
        queue.push(waiting(name))
    assert queue.drop("1") is not None
    assert queue.drop("1") is None
    assert (len(queue), drain(queue)) == (2, ["2", "3"])


def test_those_past_their_deadline_are_taken_out() -> None:
    queue = FairQueue(10)
    queue.push(waiting("early", deadline=1.0))
    queue.push(waiting("late", deadline=5.0))
    assert queue.next_deadline() == 1.0
    assert [late.request.request_id for late in queue.expired(2.0)] == ["early"]
    assert queue.next_deadline() == 5.0


def test_the_bound_counts_who_is_really_waiting() -> None:
    queue = FairQueue(2)
    for name in ("1", "2", "3"):
        assert not queue.overfull
        queue.push(waiting(name))
    assert queue.overfull
    queue.drop("1")
    assert not queue.overfull


def test_a_request_that_comes_again_gives_up_its_old_place() -> None:
    queue = FairQueue(10)
    for name, priority in (("a", 0), ("b", 0), ("a", 0), ("b", 5)):
        queue.push(waiting(name, priority=priority))
    assert len(queue) == 2
    assert drain(queue) == ["a", "b"]


def test_nothing_is_kept_of_those_who_left_from_behind_a_head_that_does_not_move() -> None:
    queue = FairQueue(10)
    queue.push(waiting("head", tenant="first", priority=-1))
    for number in range(100):
        queue.push(waiting(str(number), tenant=f"t{number}", priority=number % 3))
        queue.drop(str(number))
    assert len(queue._lines) == 1


@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=40))
def test_a_tenant_never_goes_twice_while_another_waits(tenants: list[str]) -> None:
    queue = FairQueue(100)
    for number, tenant in enumerate(tenants):
        queue.push(waiting(f"{tenant}{number}", tenant=tenant))
    served = [name[0] for name in drain(queue)]
    for at, (one, next_one) in enumerate(pairwise(served)):
        assert one != next_one or set(served[at:]) == {one}


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 3), st.booleans()), max_size=40))
def test_everybody_gets_exactly_one_turn_in_order_of_their_tenant(
    pushes: list[tuple[int, int, bool]],
) -> None:
    queue, kept = FairQueue(100), []
    for number, (priority, tenant, dropped) in enumerate(pushes):
        queue.push(waiting(str(number), tenant=str(tenant), priority=priority))
        if dropped:
            queue.drop(str(number))
        else:
            kept.append((priority, tenant, number))
    served = [int(name) for name in drain(queue)]
    assert sorted(served) == sorted(number for *_, number in kept)
    assert [pushes[number][0] for number in served] == sorted(priority for priority, *_ in kept)
    for priority, tenant, _ in kept:
        own = [n for n in served if pushes[n][:2] == (priority, tenant)]
        assert own == sorted(own)
    assert len(queue) == 0
