"""Requests that another engine began: the rest is what the first one would have given."""

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from serving.engine.request import Finish, FinishReason, Request, RequestError, TokenOutput
from serving.fleet import GenerateCall
from tests.engine.fake_gang import undisturbed
from tests.engine.simulation import Simulation, limits, request, small_pages


@pytest.fixture(autouse=True)
def _small_pages() -> Iterator[None]:
    with small_pages():
        yield


def rest(whole: Request, emitted: list[int]) -> Request:
    """What is left of a request after these tokens."""
    return replace(
        whole,
        prompt=[*whole.prompt, *emitted],
        generated=len(emitted),
        max_tokens=whole.max_tokens - len(emitted),
    )


def until_cut(whole: Request, tokens: int) -> list[int]:
    """What an engine gives before it dies, which is after so many tokens."""
    simulation = Simulation(limits())
    simulation.add(whole)
    while len(simulation.tokens[whole.id]) < tokens:
        simulation.step()
    return simulation.tokens[whole.id]


@pytest.mark.parametrize("cut", range(8))
def test_the_rest_is_the_same_wherever_the_cut_is(cut: int) -> None:
    whole = request("x", [3, 1, 4, 1, 5], 9)
    emitted = until_cut(whole, cut)
    assert len(emitted) == cut
    simulation = Simulation(limits(stages=2))
    simulation.add(rest(whole, emitted))
    simulation.drain()
    assert emitted + simulation.tokens["x"] == undisturbed(whole).tokens
    assert simulation.reasons["x"] is FinishReason.LENGTH


@pytest.mark.parametrize("cut", [0, 1, 2])
def test_ranks_tell_the_output_from_the_prompt(cut: int) -> None:
    whole = request("x", [1, 2, 3], 9, poisoned=True)  # its third token cannot be sampled
    emitted = until_cut(whole, cut)
    simulation = Simulation(limits())
    simulation.add(rest(whole, emitted))
    simulation.drain()
    new = simulation.gang.plans[0].columns[0].new[0]
    assert (new.prompt_tokens, len(new.tokens)) == (3, 3 + cut)
    assert simulation.reasons["x"] is FinishReason.ERROR
    assert len(emitted + simulation.tokens["x"]) == 2


def test_a_preemption_of_the_rest_keeps_the_count() -> None:
    first = request("first", [1] * 7, 20)
    whole = request("x", [2, 7, 1, 8], 20)
    emitted = until_cut(whole, 6)
    simulation = Simulation(limits(pages=9, columns=1))
    simulation.add(first, rest(whole, emitted))
    simulation.drain()
    assert simulation.final_stats["x"].preemptions
    told = [new for plan in simulation.gang.plans for new in plan.columns[0].new if new.id == 2]
    assert {new.prompt_tokens for new in told} == {4}
    assert emitted + simulation.tokens["x"] == undisturbed(whole).tokens


def test_the_clients_prompt_alone_is_scored() -> None:
    whole = request("x", [1, 2, 3, 4, 5, 6], 5, scored=True)
    emitted = until_cut(whole, 3)
    simulation = Simulation(limits(step_tokens=4))
    simulation.add(rest(whole, emitted))
    simulation.drain()
    assert len(simulation.scores["x"]) == 5
    assert simulation.final_stats["x"].prompt_tokens == 6


def test_moves_without_end_change_nothing() -> None:
    for seed in range(20):
        rng = random.Random(seed)
        whole = request("x", [rng.randrange(40) for _ in range(rng.randint(1, 12))], 25)
        emitted: list[int] = []
        ended: FinishReason | None = None
        while ended is None:
            simulation = Simulation(
                limits(stages=rng.choice([1, 2, 3]), columns=rng.choice([1, 2]))
            )
            simulation.add(rest(whole, emitted))
            for _ in range(rng.randint(0, 6)):
                simulation.launch()
                if simulation.scheduler.steps_in_flight and not ended:
                    simulation.deliver()
                    ended = simulation.reasons.get("x")
            emitted = emitted + simulation.tokens["x"]
        assert (emitted, ended) == undisturbed(whole)


@pytest.mark.parametrize("generated", [-1, 3, 4])
def test_a_request_without_a_prompt_of_its_own_is_refused(generated: int) -> None:
    simulation = Simulation(limits())
    with pytest.raises(RequestError, match="the client's own"):
        simulation.scheduler.add(replace(request("x", [1, 2, 3], 2), generated=generated))


def test_the_cache_counts_for_the_clients_prompt_only() -> None:
    simulation = Simulation(limits())
    simulation.add(request("first", list(range(12)), 5))
    simulation.drain()
    again = replace(request("again", list(range(12)), 5), generated=6)
    simulation.scheduler.add(again)
    simulation.gang.submit(simulation.scheduler.schedule())  # type: ignore[arg-type]
    (output,) = simulation.scheduler.complete(simulation.gang.take_result())
    assert isinstance(output, TokenOutput | Finish)
    assert output.stats is not None
    assert (output.stats.prompt_tokens, output.stats.cached_tokens) == (6, 6)


def test_a_call_carries_how_much_was_generated() -> None:
    continued = rest(request("x", [1, 2], 9), [5, 6, 7])
    assert GenerateCall.of("ingress", continued).request() == continued
    assert continued.prompt_tokens == 2
