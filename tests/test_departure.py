"""How an engine leaves, under a clock that stands until it is moved."""

import math

import pytest

from serving.departure import NODE_MARGIN_S, Departure, Facts
from serving.fleet import Condition

BUDGET_S = 60.0
QUIET = Facts(own_node="a", draining={})


class Fake:
    """An engine's streams and its clock."""

    def __init__(self) -> None:
        self.condition = Condition.SERVING
        self.requests = ["one", "two"]
        self.moved: list[str] = []
        self.now = 100.0
        self.departure = Departure(self, BUDGET_S, lambda: self.now)

    def move(self, request_ids: list[str], reason: str) -> None:
        assert reason
        self.moved += request_ids
        self.requests = []

    def after(self, seconds: float, facts: Facts) -> bool:
        self.now += seconds
        return self.departure.advance(facts)


@pytest.fixture
def engine() -> Fake:
    return Fake()


def draining(node: str, seconds: float) -> Facts:
    return Facts(own_node="a", gang_nodes=frozenset("ab"), draining={node: seconds, "other": 1.0})


def test_an_engine_that_nobody_wants_gone_stays(engine: Fake) -> None:
    assert not engine.after(0, QUIET)
    assert not engine.after(1e6, Facts(draining={"z": 0.0}))
    assert engine.condition is Condition.SERVING


def test_what_somebody_else_says_of_its_condition_is_left_alone(engine: Fake) -> None:
    engine.condition = Condition.REPAIRING
    engine.after(0, QUIET)
    assert engine.condition is Condition.REPAIRING


def test_stopped_by_serve_it_takes_nothing_new_and_moves_what_the_budget_is_too_short_for(
    engine: Fake,
) -> None:
    told = Facts(stopping=True)
    assert not engine.after(0, told)
    assert engine.condition is Condition.STOPPING
    engine.after(BUDGET_S - 1, told)
    assert engine.moved == []
    assert not engine.after(1, told)  # Serve ends the process, and sees no open call now
    assert engine.moved == ["one", "two"]
    assert not engine.after(1, told)


def test_asked_to_it_ends_itself_once_nothing_runs(engine: Fake) -> None:
    engine.departure.ask()
    assert not engine.after(0, QUIET)
    assert engine.condition is Condition.STOPPING
    engine.requests = []
    assert engine.after(1, QUIET)
    assert engine.departure.reason == "asked"
    assert engine.moved == []


def test_asked_twice_it_has_no_more_time_than_at_first(engine: Fake) -> None:
    engine.departure.ask()
    engine.after(BUDGET_S - 1, QUIET)
    engine.departure.ask()
    engine.after(1, QUIET)
    assert engine.moved == ["one", "two"]
    assert engine.after(0, QUIET)


def test_on_a_draining_node_of_its_own_it_is_the_last_resort_until_the_node_goes(
    engine: Fake,
) -> None:
    engine.requests = []
    assert not engine.after(0, draining("a", 600.0))  # Serve will stop it
    assert engine.condition is Condition.DRAINING
    engine.requests = ["late"]
    assert not engine.after(590, draining("a", 10.0))
    assert engine.condition is Condition.DRAINING
    assert not engine.after(10 - NODE_MARGIN_S, draining("a", NODE_MARGIN_S))
    assert engine.condition is Condition.STOPPING
    assert engine.moved == ["late"]


def test_a_rank_on_a_draining_node_makes_it_leave_by_itself(engine: Fake) -> None:
    assert not engine.after(0, draining("b", math.inf))
    assert engine.condition is Condition.DRAINING
    assert not engine.after(BUDGET_S, draining("b", math.inf))
    assert engine.moved == ["one", "two"]
    assert engine.after(0, draining("b", math.inf))


def test_a_rank_on_a_node_with_little_time_makes_it_hurry(engine: Fake) -> None:
    engine.after(0, draining("b", 15.0))
    engine.after(15 - NODE_MARGIN_S, draining("b", NODE_MARGIN_S))
    assert engine.moved == ["one", "two"]


def test_an_idle_engine_with_a_rank_on_a_draining_node_leaves_at_once(engine: Fake) -> None:
    engine.requests = []
    assert engine.after(0, draining("b", math.inf))


def test_a_node_that_stays_after_all_is_served_on_again(engine: Fake) -> None:
    engine.after(0, draining("a", 600.0))
    unknown = Facts(own_node="a", draining=None)  # no news keeps what is known
    engine.after(1, unknown)
    assert engine.condition is Condition.DRAINING
    engine.after(1, QUIET)
    assert engine.condition is Condition.SERVING
    assert engine.departure.reason == ""
