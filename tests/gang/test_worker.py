"""Steps of whole layouts: replayed from graphs, and where memory is short."""

from collections.abc import Callable
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch

from model.graphs import DecodeGraphs
from model.sampling_params import SamplingParams
from model.stage import Stage
from serving.engine.request import Request
from serving.gang import sampling
from tests.gang.workers import GREEDY, Engine, call_again, requests


@cache
def undisturbed(count: int) -> dict[str, list[int]]:
    """What one rank gives that computes every step as it comes."""
    return Engine().generate(requests(count))[0]


@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (2, 1), (2, 2)])
def test_replayed_steps_give_the_tokens_of_eager_ones(stages: int, ranks: int) -> None:
    """Up to five sequences, in buckets of 1, 2, 4 and 8 rows."""
    engine = Engine(stages, ranks, capture=call_again)
    replayed: list[tuple[int, int]] = []
    run = DecodeGraphs.run

    def counted(graphs: DecodeGraphs, bucket: int, spans: Any, inputs: Any) -> torch.Tensor:
        replayed.append((bucket, len(spans)))
        return run(graphs, bucket, spans, inputs)

    with patch.object(DecodeGraphs, "run", counted):
        assert engine.generate(requests(5)) == (undisturbed(5), {})
    assert {bucket for bucket, _ in replayed} >= {1, 2}
    assert any(spans < bucket for bucket, spans in replayed)


def test_a_step_with_a_chunk_in_any_column_is_eager_in_all() -> None:
    engine = Engine(1, 2, capture=call_again)
    engine.scheduler.add(Request("short", [1, 2], 30, GREEDY))
    engine.step()
    engine.scheduler.add(Request("long", list(range(50)), 4, GREEDY))
    with patch.object(DecodeGraphs, "run", side_effect=AssertionError("it is not pure decode")):
        plan, result, _ = engine.step() or pytest.fail("nothing to do")
    assert sorted(plan.columns[0].rows) == [1, 50]
    assert not any(column.decode for column in plan.columns)
    assert len(result.samples) == 2


def test_what_depends_on_the_routing_is_not_recorded() -> None:
    engine = Engine(1, 2, exchange="all_to_all", capture=call_again)
    assert engine.generate(requests(5)) == (undisturbed(5), {})
    assert all(worker._graphs is None for worker in engine.workers)


def lacking(most: int) -> Callable[[int], None]:
    """Memory for so many rows."""

    def reserve(rows: int) -> None:
        if rows > most:
            raise torch.OutOfMemoryError("no memory for the test")

    return reserve


@pytest.mark.parametrize("short", [(0, 0), (0, 1), (1, 0)])
def test_where_memory_is_short_the_newest_sequences_fail_alone(short: tuple[int, int]) -> None:
    """Whichever stage has too little, and without a word to the other ranks."""
    some = requests(5)
    engine = Engine(2, 2, reserve={short: lacking(45)})
    tokens, errors = engine.generate(some)
    assert 0 < len(errors) < 5
    assert all("out of memory" in message for message in errors.values())
    for request in some:
        if request.id not in errors:
            assert tokens[request.id] == undisturbed(5)[request.id]
    assert engine.generate([Request("after", [5, 6, 7], 4, GREEDY)])[1] == {}


def test_a_step_that_runs_out_of_memory_begins_again_without_the_newest() -> None:
    some = [Request(f"r{i}", [7 + i] * 10, 6, GREEDY) for i in range(3)]
    wanted, _ = Engine().generate(some)
    forward, seen = Stage.forward, []

    def hungry(stage: Stage, inputs: torch.Tensor, context: Any, cache: Any) -> torch.Tensor:
        seen.append(context.rows)
        if context.rows > 20:
            raise torch.OutOfMemoryError("no memory for the test")
        return forward(stage, inputs, context, cache)

    with patch.object(Stage, "forward", hungry):
        tokens, errors = Engine().generate(some)
    assert seen[:3] == [30, 20, 2]
    assert list(errors) == ["r2"]
    assert tokens == wanted | {"r2": []}


def test_sampling_without_memory_fails_the_newest_too() -> None:
    some = [Request(f"r{i}", [7 + i] * 10, 6, SamplingParams(seed=i)) for i in range(3)]
    wanted, _ = Engine(2, 1).generate(some)
    sample = sampling.sample

    def hungry(logits: torch.Tensor, rows: Any) -> Any:
        if len(rows) > 2:
            raise torch.OutOfMemoryError("no memory for the test")
        return sample(logits, rows)

    with patch.object(sampling, "sample", hungry):
        tokens, errors = Engine(2, 1, max_step_tokens=40).generate(some)
    assert list(errors) == ["r2"]
    assert tokens == wanted | {"r2": []}


def test_memory_that_ends_in_the_middle_of_a_meeting_ends_the_rank() -> None:
    """Its peers wait for what will not come: the gang has to form again."""
    engine = Engine(2, 1)
    engine.scheduler.add(Request("r", [1, 2, 3], 2, GREEDY))
    plan = engine.scheduler.schedule()
    assert plan is not None
    with (
        patch.object(Stage, "forward", side_effect=torch.OutOfMemoryError("for the test")),
        pytest.raises(torch.OutOfMemoryError),
    ):
        engine.workers[0].step(plan.columns[0])


def test_pages_that_were_never_computed_are_not_found_by_others() -> None:
    """The prompt fills a page in the step in which its sequence fails."""
    engine = Engine(reserve={(0, 0): lacking(40)})
    prompt = [*range(64), 1]
    assert engine.generate([Request("first", prompt, 4, GREEDY)])[1].keys() == {"first"}
    assert engine.scheduler.stats().columns[0].remembered == 0
