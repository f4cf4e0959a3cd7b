"""Leases: who gets which engine, and that nothing reserved is ever lost."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.fleet import Condition, EngineHello, LeaseRequest
from serving.router.leases import LeaseBook, NeverFits
from serving.router.prefix_index import PrefixIndex


def book(*engines: str, tokens: int = 1000, longest: int = 800) -> LeaseBook:
    made = LeaseBook(PrefixIndex(100), expected_output_tokens=100)
    for engine in engines:
        made.join(EngineHello(engine, "127.0.0.1", 1, "nano", tokens, longest, []))
    return made


def ask(name: str, prompt: int = 100, output: int = 50, pages: int = 0) -> LeaseRequest:
    hashes = [f"page{i}".encode() for i in range(pages)]
    return LeaseRequest(name, "tenant", 0, prompt, output, hashes, 10.0)


def engine_of(made: LeaseBook, request: LeaseRequest) -> str | None:
    lease = made.grant(request, "ingress")
    return lease.engine_id if lease else None


def test_the_engine_with_the_fewest_reserved_tokens_is_chosen() -> None:
    made = book("a", "b")
    first = engine_of(made, ask("1", prompt=300))
    assert {first, engine_of(made, ask("2", prompt=100))} == {"a", "b"}
    assert engine_of(made, ask("3")) != first


def test_a_prefix_draws_its_next_turn_to_the_same_engine() -> None:
    made = book("a", "b")
    home = engine_of(made, ask("1", pages=4))
    assert engine_of(made, ask("2", pages=4)) == home


def test_affinity_yields_when_another_engine_is_emptier_by_more_than_it_saves() -> None:
    made = book("a", "b")
    home = engine_of(made, ask("1", prompt=300, pages=2))
    assert engine_of(made, ask("2", prompt=150, pages=2)) != home


def test_nothing_is_granted_without_room_and_all_comes_back_on_release() -> None:
    made = book("a", tokens=500, longest=400)
    assert engine_of(made, ask("1", prompt=300)) == "a"
    assert engine_of(made, ask("2", prompt=300)) is None
    made.release("1")
    assert made.engines["a"].reserved_tokens == 0
    assert engine_of(made, ask("2", prompt=300)) == "a"


def test_an_answer_of_unknown_length_reserves_what_is_expected() -> None:
    made = book("a")
    assert engine_of(made, ask("1", prompt=100, output=700)) == "a"
    assert made.engines["a"].reserved_tokens == 200


def test_what_no_engine_can_hold_is_refused() -> None:
    with pytest.raises(NeverFits, match="801 tokens exceed the limit of 800"):
        book("a", "b").grant(ask("1", prompt=800, output=1), "ingress")


def test_an_engine_that_is_too_small_is_passed_over() -> None:
    made = book("small", tokens=200, longest=150)
    made.join(EngineHello("large", "127.0.0.1", 1, "nano", 1000, 800, []))
    made.grant(ask("load", prompt=700), "ingress")
    assert engine_of(made, ask("1", prompt=200)) == "large"
    assert engine_of(made, ask("2", prompt=100)) == "small"


def test_an_idle_engine_takes_even_what_exceeds_its_room() -> None:
    made = book("a", tokens=100, longest=800)
    assert engine_of(made, ask("1", prompt=300)) == "a"
    assert engine_of(made, ask("2", prompt=1, output=1)) is None


def test_the_cost_of_a_choice_is_work_less_what_is_cached() -> None:
    made = book("a", "b", tokens=10_000, longest=10_000)
    home = engine_of(made, ask("1", prompt=128, output=1, pages=2))
    other = {"a": "b", "b": "a"}[str(home)]
    # home has 129 tokens reserved and 128 cached: one token more than the empty engine
    assert engine_of(made, ask("2", prompt=128, output=1, pages=2)) == other


def test_an_engine_that_joins_again_keeps_its_leases_and_its_old_connection_cannot_end_it() -> None:
    made = book("a")
    old = made.engines["a"]
    made.grant(ask("1"), "ingress")
    new = made.join(old.hello)
    made.leave(old)
    assert made.engines == {"a": new}
    made.release("1")
    assert new.reserved_tokens == 0


def test_without_engines_everybody_waits() -> None:
    assert engine_of(book(), ask("1")) is None


def test_leases_on_an_engine_that_left_are_void() -> None:
    made = book("a")
    made.grant(ask("1", pages=2), "ingress")
    made.leave(made.engines["a"])
    made.release("1")
    assert made.leases == {}
    assert made.index.hits([b"page0"]) == {}


def test_a_vanished_ingress_frees_its_leases_and_no_others() -> None:
    made = book("a")
    made.grant(ask("1"), "gone")
    made.grant(ask("2"), "stays")
    made.release_ingress("gone")
    assert set(made.leases) == {"2"}
    assert made.engines["a"].reserved_tokens == 150


MOVES = st.lists(
    st.tuples(
        st.sampled_from(["grant", "release", "leave", "join", "vanish"]),
        st.integers(0, 7),
        st.integers(1, 400),
    ),
    max_size=60,
)


@settings(deadline=None)
@given(MOVES)
def test_reserved_tokens_are_always_the_sum_of_the_leases(
    moves: list[tuple[str, int, int]],
) -> None:
    made = book("e0", "e1")
    for move, number, tokens in moves:
        engine, request, ingress = f"e{number % 3}", f"r{number}", f"i{number % 2}"
        match move:
            case "grant":
                made.grant(ask(request, prompt=tokens), ingress)
            case "release":
                made.release(request)
            case "leave" if engine in made.engines:
                made.leave(made.engines[engine])
            case "join":
                made.join(EngineHello(engine, "127.0.0.1", 1, "nano", 1000, 800, []))
            case "vanish":
                made.release_ingress(ingress)
        for name, view in made.engines.items():
            held = [lease.tokens for lease in made.leases.values() if lease.engine_id == name]
            assert view.reserved_tokens == sum(held)
        assert {lease.engine_id for lease in made.leases.values()} <= set(made.engines)


def test_the_index_is_bounded_and_forgets_the_oldest() -> None:
    index = PrefixIndex(3)
    index.record([b"1", b"2"], "a")
    index.record([b"1"], "a")
    index.record([b"3", b"4"], "b")
    assert index.hits([b"2"]) == {}
    assert index.hits([b"1"]) == {"a": 1}


def test_a_long_prompt_leaves_its_first_pages_in_the_index() -> None:
    index = PrefixIndex(3)
    index.record([b"1", b"2"], "a")
    index.record([b"3", b"4"], "b")
    assert index.hits([b"1", b"2"]) == {"a": 1}
    index.record([b"5", b"6", b"7", b"8"], "c")
    assert index.hits([b"5", b"6", b"7", b"8"]) == {"c": 3}


def test_an_index_without_room_finds_nothing() -> None:
    index = PrefixIndex(0)
    index.record([b"1"], "a")
    assert index.hits([b"1"]) == {}


def test_an_engine_that_is_gone_is_forgotten_and_no_other() -> None:
    index = PrefixIndex(10)
    index.record([b"1", b"2"], "a")
    index.record([b"2", b"3"], "b")
    index.forget("b")
    assert index.hits([b"1", b"2"]) == {"a": 1}
    index.forget("a")
    assert index.hits([b"1"]) == {}


def test_only_leading_pages_count() -> None:
    index = PrefixIndex(10)
    index.record([b"1", b"2"], "a")
    index.record([b"3"], "b")
    assert index.hits([b"1", b"x", b"3"]) == {"a": 1}
    assert index.hits([b"1", b"2", b"3"]) == {"a": 2, "b": 3}


def test_engines_that_do_not_serve_are_passed_over_even_when_they_are_empty() -> None:
    for condition in (Condition.REPAIRING, Condition.DRAINING, Condition.STOPPING):
        made = book("a", "b")
        made.engines["a"].condition = condition
        assert [engine_of(made, ask(str(i))) for i in range(3)] == ["b"] * 3
    made.engines["a"].condition, made.engines["a"].silent = Condition.SERVING, True
    assert engine_of(made, ask("4")) == "b"


@pytest.mark.parametrize(
    ("conditions", "chosen"),
    [
        ((Condition.REPAIRING, Condition.DRAINING), None),  # it will serve again: worth the wait
        ((Condition.STOPPING, Condition.DRAINING), "b"),
        ((Condition.STOPPING, Condition.STOPPING), None),
    ],
)
def test_with_nobody_serving_who_drains_is_the_last_resort(
    conditions: tuple[Condition, Condition], chosen: str | None
) -> None:
    made = book("a", "b")
    made.engines["a"].condition, made.engines["b"].condition = conditions
    assert engine_of(made, ask("1")) == chosen


def test_an_engine_to_be_avoided_is_taken_only_if_no_other_has_room() -> None:
    made = book("a", "b", tokens=500, longest=400)
    avoiding = replace(ask("1", prompt=300), avoid="a")
    assert engine_of(made, avoiding) == "b"
    assert engine_of(made, replace(avoiding, request_id="2")) == "a"
    made.engines["a"].condition = Condition.DRAINING
    made.release("2")
    assert engine_of(made, replace(avoiding, request_id="2")) is None


def test_what_runs_already_is_counted_when_its_engine_joins_later() -> None:
    made = book("a", tokens=500, longest=400)
    made.hold(ask("1", prompt=300), "ingress", "b")
    made.hold(ask("2", prompt=300), "ingress", "a")
    assert engine_of(made, ask("3", prompt=300)) is None
    made.join(EngineHello("b", "127.0.0.1", 1, "nano", 500, 400, []))
    assert made.engines["b"].reserved_tokens == 350
    assert engine_of(made, ask("3", prompt=300)) is None
    made.release("1")
    assert engine_of(made, ask("3", prompt=300)) == "b"


def test_what_runs_already_draws_its_next_turn_to_its_engine() -> None:
    made = book("a", "b")
    made.hold(ask("1", pages=4), "ingress", "b")
    made.release("1")
    assert engine_of(made, ask("2", pages=4)) == "b"
