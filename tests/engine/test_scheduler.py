"""What one request sees of the scheduler, phase by phase. Pages are 4 tokens here."""

from collections.abc import Callable, Iterator

import pytest

from serving.engine.plan import RankResult, Sample, StepResult
from serving.engine.request import Finish, FinishReason, Request, RequestError, TokenOutput
from serving.engine.scheduler import Scheduler
from tests.engine.fake_gang import POISON_MESSAGE, undisturbed
from tests.engine.simulation import Simulation, limits, request, small_pages


@pytest.fixture(autouse=True)
def _small_pages() -> Iterator[None]:
    with small_pages():
        yield


def prompt(length: int, first: int = 0) -> list[int]:
    return list(range(first, first + length))


def last_ids(simulation: Simulation) -> list[int]:
    """Sequence ids of the newest step, first column. The n-th request is sequence n."""
    return [piece.id for piece in simulation.gang.plans[-1].columns[0].slices]


def held(simulation: Simulation) -> int:
    return sum(column.held for column in simulation.scheduler.stats().columns)


# --- refusals ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("refused", "why"),
    [
        (request("x", [], 1), "the prompt is empty"),
        (request("x", [1], 0), "max_tokens must be at least 1"),
        (request("x", prompt(30), 11), "41 tokens exceed the limit of 40"),
        (request("running", [1], 1), "a request with this id is running"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(refused: Request, why: str) -> None:
    simulation = Simulation(limits(pages=11))
    simulation.add(request("running", [5]))
    with pytest.raises(RequestError, match=why):
        simulation.add(refused)
    simulation.drain()


def test_the_longest_possible_request_is_served() -> None:
    simulation = Simulation(limits(pages=11))
    simulation.add(request("x", prompt(30), 10))
    simulation.drain()
    assert len(simulation.tokens["x"]) == 10


def test_the_model_length_limits_a_request_too() -> None:
    simulation = Simulation(limits(pages=11, model_len=20))
    simulation.add(request("fits", prompt(15), 5))
    with pytest.raises(RequestError, match="21 tokens exceed the limit of 20"):
        simulation.add(request("x", prompt(15), 6))
    simulation.drain()


def test_an_id_can_be_used_again_when_its_request_is_over() -> None:
    simulation = Simulation(limits(stages=2))
    simulation.add(request("x", [1, 2], 3))
    simulation.launch()
    simulation.cancel("x")
    simulation.add(request("x", [3, 4], 3))  # the cancelled one's sample is still to come
    simulation.drain()
    assert simulation.tokens["x"] == undisturbed(request("x", [3, 4], 3)).tokens


# --- ends -------------------------------------------------------------------------------------


def test_a_stop_token_ends_a_request_with_stop_and_is_told() -> None:
    free = undisturbed(request("x", [1, 2, 3], 20)).tokens
    stop = free[5]
    simulation = Simulation(limits())
    simulation.add(request("x", [1, 2, 3], 20, stop=frozenset({stop})))
    simulation.drain()
    assert simulation.reasons["x"] is FinishReason.STOP
    assert simulation.tokens["x"] == free[: free.index(stop) + 1]


def test_max_tokens_ends_a_request_with_length() -> None:
    simulation = Simulation(limits())
    simulation.add(request("x", [1, 2, 3], 6))
    simulation.drain()
    assert simulation.reasons["x"] is FinishReason.LENGTH
    assert len(simulation.tokens["x"]) == 6


def test_a_stop_token_at_the_last_place_is_a_stop() -> None:
    tokens = undisturbed(request("x", [9], 1)).tokens
    simulation = Simulation(limits())
    simulation.add(request("x", [9], 1, stop=frozenset(tokens)))
    simulation.drain()
    assert simulation.reasons["x"] is FinishReason.STOP


def test_a_sampling_error_fails_that_request_alone() -> None:
    simulation = Simulation(limits())
    simulation.add(request("good", [1, 2], 6), request("bad", [3], 6, poisoned=True))
    for _ in range(2):
        simulation.step()
    assert simulation.launch()
    outputs = simulation.deliver()
    failures = [output for output in outputs if isinstance(output, Finish)]
    assert [(f.request_id, f.reason, f.message) for f in failures] == [
        ("bad", FinishReason.ERROR, POISON_MESSAGE)
    ]
    assert [o.request_id for o in outputs if isinstance(o, TokenOutput)] == ["good"]
    simulation.drain()
    assert len(simulation.tokens["good"]) == 6


# --- steps ------------------------------------------------------------------------------------


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    simulation = Simulation(limits(step_tokens=7))
    simulation.add(request("x", prompt(20), 2))
    simulation.drain()
    slices = [plan.columns[0].slices[0] for plan in simulation.gang.plans]
    assert [(s.start, s.count, s.sample) for s in slices] == [
        (0, 7, False),
        (7, 7, False),
        (14, 6, True),
        (20, 1, True),
    ]
    assert [len(s.pages) for s in slices] == [2, 2, 1, 1]
    assert slices[3].tokens == simulation.tokens["x"][:1]


def test_a_prompt_fills_what_the_decodes_leave_of_the_budget() -> None:
    simulation = Simulation(limits(step_tokens=8))
    simulation.add(request("a", [1], 5), request("b", [2], 5))
    simulation.step()
    simulation.add(request("c", prompt(20), 1))
    simulation.step()
    assert [(s.id, s.count) for s in simulation.gang.plans[-1].columns[0].slices] == [
        (1, 1),
        (2, 1),
        (3, 6),
    ]
    simulation.drain()


@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_the_pipeline_is_full_when_there_are_enough_sequences(stages: int) -> None:
    simulation = Simulation(limits(stages=stages, sequences=64))
    simulation.add(*(request(str(i), [i], 20) for i in range(stages * stages)))
    while simulation.launch():  # the first step admits everybody
        pass
    simulation.deliver()
    for _ in range(4 * stages):
        while simulation.launch():
            pass
        assert simulation.scheduler.steps_in_flight == stages
        assert len(last_ids(simulation)) == stages
        simulation.deliver()
    simulation.drain()


@pytest.mark.parametrize(("stages", "sequences"), [(2, 3), (3, 4), (3, 5), (4, 6)])
def test_a_pipeline_that_sequences_do_not_fill_evenly_starves_nobody(
    stages: int, sequences: int
) -> None:
    simulation = Simulation(limits(stages=stages))
    simulation.add(*(request(str(i), [i], 30) for i in range(sequences)))
    while all(len(tokens) < 20 for tokens in simulation.tokens.values()):
        while simulation.launch():
            pass
        simulation.deliver()
    assert min(map(len, simulation.tokens.values())) >= 18
    simulation.drain()


@pytest.mark.parametrize(("stages", "sequences"), [(2, 3), (3, 4), (4, 5), (4, 4), (4, 9)])
def test_as_many_steps_are_in_flight_as_stages_if_there_are_sequences(
    stages: int, sequences: int
) -> None:
    simulation = Simulation(limits(stages=stages))
    simulation.add(*(request(str(i), [i], 30) for i in range(sequences)))
    while simulation.launch():  # the first step admits everybody
        pass
    simulation.deliver()
    for _ in range(5 * stages):
        while simulation.launch():
            pass
        assert simulation.scheduler.steps_in_flight == stages
        simulation.deliver()
    simulation.drain()


def test_a_prompt_in_chunks_fills_the_pipeline_alone() -> None:
    simulation = Simulation(limits(stages=3, step_tokens=4))
    simulation.add(request("x", prompt(20), 2))
    assert [simulation.launch() for _ in range(4)] == [True, True, True, False]
    simulation.drain()


def test_nothing_to_do_is_no_step() -> None:
    simulation = Simulation(limits(stages=2))
    assert simulation.scheduler.schedule() is None
    simulation.add(request("x", [1], 5))
    assert simulation.launch()
    assert simulation.scheduler.schedule() is None  # waits for its sample
    simulation.drain()


def test_columns_are_filled_evenly() -> None:
    simulation = Simulation(limits(columns=3))
    simulation.add(*(request(str(i), prompt(5, 10 * i), 4) for i in range(6)))
    simulation.step()
    assert simulation.gang.plans[-1].columns[0].rows == [10, 10, 10]
    simulation.drain()


# --- who goes first ---------------------------------------------------------------------------


def test_lower_priority_numbers_are_admitted_first() -> None:
    simulation = Simulation(limits(sequences=1))
    simulation.add(
        request("batch", [1], 2, priority=1),
        request("normal", [2], 2),
        request("urgent", [3], 2, priority=-1),
        request("normal too", [4], 2),
    )
    simulation.drain()
    assert list(simulation.final_stats) == ["urgent", "normal", "normal too", "batch"]


def test_an_urgent_prompt_takes_the_budget_first() -> None:
    simulation = Simulation(limits(step_tokens=4))
    simulation.add(request("slow", prompt(11), 2))
    simulation.step()
    simulation.add(request("urgent", prompt(6, 50), 2, priority=-1))
    simulation.step()
    assert last_ids(simulation) == [1]  # nothing was left of the budget to start the other
    simulation.step()
    assert [(s.id, s.count) for s in simulation.gang.plans[-1].columns[0].slices] == [
        (1, 3),
        (2, 1),
    ]
    simulation.step()
    assert last_ids(simulation) == [2]
    simulation.drain()


def test_an_urgent_sequence_takes_pages_from_a_running_one() -> None:
    simulation = Simulation(limits(pages=6))
    simulation.add(request("normal", prompt(4), 12))
    simulation.step()
    simulation.add(request("urgent", prompt(4, 50), 12, priority=-1))
    simulation.drain()
    assert simulation.final_stats["urgent"].preemptions == 0
    assert simulation.final_stats["normal"].preemptions == 1


def test_the_oldest_always_progresses() -> None:
    simulation = Simulation(limits(pages=8, sequences=8))
    simulation.add(*(request(str(i), prompt(3, 10 * i), 24) for i in range(8)))
    while "0" in simulation.live:
        before = len(simulation.tokens["0"])
        simulation.step()
        assert len(simulation.tokens["0"]) == before + 1
    assert simulation.final_stats["0"].preemptions == 0
    assert simulation.scheduler.stats().preemptions > 0
    simulation.drain()
    ends = list(simulation.final_stats)
    assert ends == sorted(ends)  # equal work: the older, the sooner


def test_a_small_request_does_not_overtake_an_older_one_that_waits_for_pages() -> None:
    simulation = Simulation(limits(pages=7))
    simulation.add(request("running", prompt(11), 2))
    simulation.step()
    simulation.add(request("large", prompt(15, 50), 2), request("small", [99], 2))
    assert simulation.launch()
    assert last_ids(simulation) == [1]
    assert simulation.scheduler.stats().waiting == 2
    simulation.drain()


# --- preemption -------------------------------------------------------------------------------


def preempted_in_decode(stages: int = 1, prefix_cache: bool = True) -> Simulation:
    """Two sequences that do not both fit; the second has just lost its pages."""
    simulation = Simulation(limits(stages=stages, pages=7, prefix_cache=prefix_cache))
    simulation.add(request("old", prompt(9), 14), request("young", prompt(7, 50), 14))
    while not simulation.scheduler.stats().preemptions:
        while simulation.launch():
            pass
        if not simulation.scheduler.stats().preemptions:
            simulation.deliver()
    assert simulation.tokens["young"]
    return simulation


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("prefix_cache", [True, False])
def test_a_preempted_sequence_continues_with_the_same_tokens(
    stages: int, prefix_cache: bool
) -> None:
    simulation = preempted_in_decode(stages, prefix_cache)
    simulation.drain()  # compares with the undisturbed generation
    assert simulation.final_stats["young"].preemptions >= 1
    assert simulation.final_stats["old"].preemptions == 0


def test_a_preempted_sequence_is_sent_again_with_all_its_tokens() -> None:
    simulation = preempted_in_decode()
    so_far = simulation.tokens["young"].copy()
    simulation.drain()
    news = [new for plan in simulation.gang.plans for new in plan.columns[0].new if new.id == 2]
    assert len(news) == 1 + simulation.final_stats["young"].preemptions
    assert news[1].tokens == prompt(7, 50) + so_far
    assert news[1].prompt_tokens == 7


def test_a_sample_on_its_way_counts_when_its_sequence_is_preempted() -> None:
    # Both are in flight at once, in different steps, when the older needs the younger's page.
    simulation = Simulation(limits(stages=2, pages=6, prefix_cache=False))
    simulation.add(request("old", prompt(3), 12), request("young", prompt(7, 50), 12))
    while not simulation.scheduler.stats().preemptions:
        while simulation.launch():
            pass
        if not simulation.scheduler.stats().preemptions:
            simulation.deliver()
    in_flight = [s.id for s in simulation.gang.plans[-2].columns[0].slices]
    assert in_flight == [2]
    before = len(simulation.tokens["young"])
    simulation.deliver()
    assert len(simulation.tokens["young"]) == before + 1
    simulation.drain()


def test_a_preempted_sequence_comes_back_before_younger_ones_start() -> None:
    simulation = preempted_in_decode()
    simulation.add(request("younger", [99], 2))
    simulation.drain()
    starts = [new.id for plan in simulation.gang.plans for new in plan.columns[0].new]
    assert starts == [1, 2, 2, 3]


def test_a_preempted_sequence_waits_for_its_steps_before_it_starts_again() -> None:
    simulation = Simulation(limits(stages=3, pages=6, prefix_cache=False))
    simulation.add(request("old", prompt(3), 12), request("young", prompt(7, 50), 12))
    while not simulation.scheduler.stats().preemptions:
        while simulation.launch():
            pass
        simulation.deliver()
    simulation.cancel("old")  # all pages are free now
    if any(s.id == 2 for s in simulation.gang.plans[-1].columns[0].slices):
        assert not simulation.launch()
    simulation.drain()


# --- prefix cache -----------------------------------------------------------------------------


def test_a_cached_prefix_is_not_computed_again() -> None:
    simulation = Simulation(limits())
    simulation.add(request("first", prompt(10), 2))
    simulation.drain()
    simulation.add(request("second", [*prompt(8), 77, 78, 79], 2))
    simulation.step()
    (piece,) = simulation.gang.plans[-1].columns[0].slices
    assert (piece.start, piece.count) == (8, 3)
    simulation.drain()
    assert simulation.final_stats["second"].cached_tokens == 8
    stats = simulation.scheduler.stats()
    assert (stats.prefix_query_tokens, stats.prefix_hit_tokens) == (21, 8)


def test_a_prefix_is_shared_while_its_first_owner_still_runs() -> None:
    simulation = Simulation(limits(stages=2))
    simulation.add(request("first", prompt(9), 12))
    simulation.step()
    before = held(simulation)
    simulation.add(request("second", [*prompt(8), 77], 12))
    simulation.step()
    assert held(simulation) == before + 1
    simulation.drain()
    assert simulation.final_stats["second"].cached_tokens == 8


def test_pages_still_in_flight_are_not_shared() -> None:
    simulation = Simulation(limits(stages=3, step_tokens=4))
    simulation.add(request("first", prompt(10), 2), request("second", prompt(10), 2))
    simulation.launch()
    simulation.launch()
    simulation.deliver()  # four positions are computed, four more on their way
    simulation.launch()
    assert last_ids(simulation) == [1, 2]
    simulation.drain()
    assert simulation.final_stats["second"].cached_tokens == 4


def test_the_prefix_cache_is_isolated_between_tenants() -> None:
    simulation = Simulation(limits())
    for number, (tenant, cached) in enumerate([("", 0), ("acme", 0), ("umbrella", 0), ("acme", 8)]):
        id = str(number)
        simulation.add(request(id, prompt(10), 2, tenant=tenant))
        simulation.drain()
        assert simulation.final_stats[id].cached_tokens == cached


@pytest.mark.parametrize(("length", "cached"), [(7, 4), (8, 4), (9, 8), (12, 8), (13, 12)])
def test_a_prefix_match_leaves_at_least_one_token_to_compute(length: int, cached: int) -> None:
    simulation = Simulation(limits())
    simulation.add(request("first", prompt(16), 2))
    simulation.drain()
    simulation.add(request("again", prompt(length), 2))
    simulation.drain()
    assert simulation.final_stats["again"].cached_tokens == cached


def test_the_next_turn_reuses_the_pages_of_generated_tokens() -> None:
    simulation = Simulation(limits())
    simulation.add(request("turn 1", prompt(6), 11))
    simulation.drain()
    said = prompt(6) + simulation.tokens["turn 1"]  # the last token was never computed
    simulation.add(request("turn 2", [*said, 1, 2, 3], 4))
    simulation.drain()
    assert simulation.final_stats["turn 2"].cached_tokens == 16


def test_a_prefix_is_looked_for_on_every_column() -> None:
    simulation = Simulation(limits(columns=3))
    simulation.add(*(request(str(i), prompt(9, 10 * i), 1) for i in range(3)))
    simulation.drain()
    for i in (2, 0, 1):
        simulation.add(request(f"again {i}", prompt(9, 10 * i), 1))
        simulation.drain()
        assert simulation.final_stats[f"again {i}"].cached_tokens == 8


def test_without_the_prefix_cache_nothing_is_remembered() -> None:
    simulation = Simulation(limits(prefix_cache=False))
    simulation.add(request("first", prompt(10), 2))
    simulation.drain()
    assert simulation.scheduler.stats().columns[0].remembered == 0
    simulation.add(request("second", prompt(10), 2))
    simulation.drain()
    assert simulation.final_stats["second"].cached_tokens == 0


def test_a_preempted_sequence_counts_once_in_the_prefix_statistics() -> None:
    simulation = preempted_in_decode()
    simulation.drain()
    assert simulation.scheduler.stats().prefix_query_tokens == 9 + 7


# --- cancellation -----------------------------------------------------------------------------


def waiting(simulation: Simulation) -> None:
    """`x` waits behind another."""


def prefilling(simulation: Simulation) -> None:
    """Chunks of `x` are in flight, and more are to come."""
    simulation.cancel("other")
    simulation.launch()
    simulation.launch()
    assert simulation.scheduler.steps_in_flight == 2


def decoding(simulation: Simulation) -> None:
    """`x` waits for its fourth token."""
    simulation.cancel("other")
    while len(simulation.tokens["x"]) < 3:
        while simulation.launch():
            pass
        simulation.deliver()
    simulation.launch()
    assert simulation.scheduler.steps_in_flight == 1


def between_steps(simulation: Simulation) -> None:
    """`x` has its third token, and no step is in flight."""
    decoding(simulation)
    simulation.deliver()


@pytest.mark.parametrize("phase", [waiting, prefilling, decoding, between_steps])
def test_cancellation_frees_pages_at_once(phase: Callable[[Simulation], None]) -> None:
    simulation = Simulation(limits(stages=2, step_tokens=4, sequences=1))
    simulation.add(request("other", [1], 3), request("x", prompt(13, 50), 9))
    simulation.launch()
    phase(simulation)
    others = 1 if "other" in simulation.live else 0
    simulation.cancel("x")
    assert held(simulation) == others
    tokens = simulation.tokens["x"].copy()
    simulation.drain()
    assert simulation.tokens["x"] == tokens
    simulation.check_ranks_forget()


@pytest.mark.parametrize("stages", [1, 2])
def test_a_preempted_sequence_can_be_cancelled(stages: int) -> None:
    simulation = preempted_in_decode(stages)
    assert simulation.scheduler.stats().waiting == 1
    simulation.cancel("young")
    assert simulation.scheduler.stats().waiting == 0
    simulation.drain()
    simulation.check_ranks_forget()


def test_pages_of_a_cancelled_sequence_are_used_while_its_steps_are_in_flight() -> None:
    simulation = Simulation(limits(stages=3, pages=5, step_tokens=8))
    simulation.add(request("x", prompt(14), 2))
    simulation.launch()
    simulation.launch()
    simulation.cancel("x")
    simulation.add(request("y", prompt(8, 50), 8))
    assert simulation.launch()  # three steps in flight, two of them of a sequence that is no more
    simulation.drain()


def test_a_request_that_is_cancelled_while_it_waits_leaves_nothing_behind() -> None:
    simulation = Simulation(limits(sequences=1))
    simulation.add(request("running", [1], 9), request("next", [2], 9))
    simulation.step()
    simulation.add(request("x", prompt(30), 5, priority=1))
    simulation.cancel("x")  # behind one that goes on waiting
    assert [each.request.id for each in simulation.scheduler._waiting] == ["next"]
    simulation.drain()


def test_cancelling_what_is_over_or_unknown_does_nothing() -> None:
    simulation = Simulation(limits())
    simulation.cancel("nobody")
    simulation.add(request("x", [1], 1))
    simulation.drain()
    simulation.cancel("x")
    assert simulation.reasons["x"] is FinishReason.LENGTH


# --- what graphs and failures need -------------------------------------------------------------


def test_a_step_is_pure_decode_when_no_column_has_a_chunk() -> None:
    scheduler = Scheduler(limits(columns=2))
    scheduler.add(request("x", prompt(9), 5))
    plan = scheduler.schedule()
    assert plan is not None
    assert [column.decode for column in plan.columns] == [False, False]
    results = [RankResult(plan.step, 0, rank) for rank in range(2)]
    results[0].samples.append(Sample(1, 7))
    scheduler.complete(StepResult(plan.step, results))
    scheduler.add(request("y", [1], 5))
    plan = scheduler.schedule()
    assert plan is not None
    assert plan.rows == 2
    assert [column.decode for column in plan.columns] == [True, True]


@pytest.mark.parametrize("first", [0, 1])
def test_what_one_rank_calls_failed_has_failed_whatever_others_say(first: int) -> None:
    scheduler = Scheduler(limits())
    scheduler.add(request("x", prompt(9), 5))
    plan = scheduler.schedule()
    assert plan is not None
    results = [RankResult(plan.step, stage, 0) for stage in range(2)]
    results[0].samples.append(Sample(1, 0, error="out of memory"))
    results[1].samples.append(Sample(1, 7))
    ordered = [results[first], results[1 - first]]
    (output,) = scheduler.complete(StepResult(plan.step, ordered))
    assert isinstance(output, Finish)
    assert output.message == "out of memory"
    assert scheduler.stats().columns[0].remembered == 0
    assert scheduler.idle


# --- integrity --------------------------------------------------------------------------------


def test_integrity_sees_a_page_that_a_sequence_lost() -> None:
    simulation = Simulation(limits())
    simulation.add(request("x", prompt(9), 5))
    simulation.step()
    simulation.scheduler._by_id[1].pages.pop()
    with pytest.raises(AssertionError):
        simulation.scheduler.check_integrity()


def test_integrity_sees_a_sequence_that_nobody_runs() -> None:
    simulation = Simulation(limits())
    simulation.add(request("x", prompt(9), 5))
    simulation.scheduler._waiting.clear()
    with pytest.raises(AssertionError, match="lost or double"):
        simulation.scheduler.check_integrity()
