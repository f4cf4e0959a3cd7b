"""Random schedules: whatever happens to a request, its tokens are those it would get alone."""

from collections.abc import Iterator
from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from serving.engine.request import Request
from serving.engine.scheduler import EngineLimits
from tests.engine.fake_gang import undisturbed
from tests.engine.simulation import TENANTS, Simulation, limits, request, small_pages

CHUNKS, SCHEDULES_PER_CHUNK = 8, 400


@pytest.fixture(autouse=True, scope="module")
def _small_pages() -> Iterator[None]:
    with small_pages():
        yield


def random_limits(random: Random) -> EngineLimits:
    return limits(
        stages=random.randint(1, 4),
        columns=random.choice([1, 1, 2, 3]),
        pages=random.choice([4, 5, 6, 8, 12]),
        step_tokens=random.choice([1, 2, 3, 5, 8, 16]),
        sequences=random.choice([1, 3, 6, 8]),
        model_len=random.choice([16, 40, 40]),
        prefix_cache=random.random() < 0.8,
    )


def random_request(id: str, random: Random, simulation: Simulation) -> Request:
    longest = simulation.scheduler.limits.max_request_tokens
    family = Random(random.choice("ab"))  # prompts of a family begin alike
    prompt = [family.randrange(9) for _ in range(random.randint(1, longest // 3))]
    if simulation.requests and random.random() < 0.3:  # the next turn of a conversation
        before = random.choice(list(simulation.requests.values()))
        prompt = before.prompt + undisturbed(before).tokens + prompt[:3]
    prompt = prompt[: longest - 1]
    if random.random() < 0.3:
        prompt[-1] = random.randrange(20)
    scored = random.random() < 0.2
    return request(
        id,
        prompt,
        max_tokens=random.randint(0 if scored else 1, longest - len(prompt)),
        stop=frozenset({0, 1}) if random.random() < 0.3 else frozenset(),
        tenant=random.choice(TENANTS[:2]),
        priority=random.choice([0, 0, 0, -1, 1]),
        poisoned=random.random() < 0.03,
        scored=scored,
    )


def random_ranks(random: Random, limits: EngineLimits) -> set[tuple[int, int]]:
    """Who dies at once: mostly one; none if the ranks have only lost each other."""
    cells = [(stage, column) for stage in range(limits.stages) for column in range(limits.columns)]
    return set(random.sample(cells, min(random.choice([0, 1, 1, 1, 2]), len(cells))))


def run_schedule(random: Random) -> Simulation:
    simulation = Simulation(random_limits(random))
    moves = ["add", "launch", "advance", "deliver", "cancel", "kill"]
    weights = [random.random() * w for w in (3, 4, 6, 3, 0.5, 0.2)]
    for move in random.choices(moves, weights, k=random.randint(20, 150)):
        if move == "add" and len(simulation.live) < 12:
            id = str(len(simulation.requests))
            simulation.add(random_request(id, random, simulation))
        elif move == "launch":
            simulation.launch()
        elif move == "advance" and simulation.gang.ready_stages:
            simulation.gang.advance(random.choice(simulation.gang.ready_stages))
        elif move == "deliver" and simulation.gang.has_result:
            simulation.deliver()
        elif move == "cancel" and simulation.live:
            simulation.cancel(random.choice(simulation.live))
        elif move == "kill":
            simulation.kill(random_ranks(random, simulation.scheduler.limits))
    simulation.drain()
    return simulation


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_schedule_gives_the_undisturbed_tokens(chunk: int) -> None:
    preemptions = hits = cancelled_in_flight = kills = 0
    for number in range(SCHEDULES_PER_CHUNK):
        name = f"{chunk}.{number}"
        try:
            simulation = run_schedule(Random(name))
            stats = simulation.scheduler.stats()
            preemptions += stats.preemptions
            hits += stats.prefix_hit_tokens
            kills += simulation.kills
            cancelled_in_flight += sum(
                bool(simulation.tokens[id])
                for id, reason in simulation.reasons.items()
                if reason == "cancelled"
            )
            simulation.check_ranks_forget()
        except Exception as error:
            error.add_note(f"schedule {name}")
            raise
    # The schedules are only worth something when they get into trouble.
    assert preemptions > SCHEDULES_PER_CHUNK // 2
    assert hits > SCHEDULES_PER_CHUNK
    assert cancelled_in_flight > SCHEDULES_PER_CHUNK // 20
    assert kills > SCHEDULES_PER_CHUNK // 2


class Engine(RuleBasedStateMachine):
    """The same moves, chosen and simplified by Hypothesis."""

    @initialize(
        limits=st.builds(
            limits,
            stages=st.integers(1, 3),
            columns=st.integers(1, 2),
            pages=st.integers(4, 7),
            step_tokens=st.integers(1, 9),
            sequences=st.integers(1, 4),
            prefix_cache=st.booleans(),
        )
    )
    def start(self, limits: EngineLimits) -> None:
        self.simulation = Simulation(limits)

    @rule(
        family=st.integers(0, 1),
        shared=st.integers(0, 11),
        own=st.lists(st.integers(0, 2), max_size=3),
        max_tokens=st.integers(1, 12),
        stops=st.booleans(),
        tenant=st.sampled_from(TENANTS),
        priority=st.integers(-1, 1),
        scored=st.booleans(),
    )
    def add(
        self,
        family: int,
        shared: int,
        own: list[int],
        max_tokens: int,
        stops: bool,
        tenant: str,
        priority: int,
        scored: bool,
    ) -> None:
        longest = self.simulation.scheduler.limits.max_request_tokens
        prompt = ([family] * shared + own or [family])[: longest - 1]
        self.simulation.add(
            request(
                str(len(self.simulation.requests)),
                prompt,
                max_tokens=min(max_tokens, longest - len(prompt)),
                stop=frozenset(range(8)) if stops else frozenset(),
                tenant=tenant,
                priority=priority,
                scored=scored,
            )
        )

    @precondition(lambda self: self.simulation.live)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        self.simulation.cancel(data.draw(st.sampled_from(self.simulation.live)))

    @precondition(lambda self: self.simulation.live)
    @rule()
    def launch(self) -> None:
        self.simulation.launch()

    @precondition(lambda self: self.simulation.gang.ready_stages)
    @rule(data=st.data())
    def advance(self, data: st.DataObject) -> None:
        stages = self.simulation.gang.ready_stages
        self.simulation.gang.advance(data.draw(st.sampled_from(stages)))

    @precondition(lambda self: self.simulation.scheduler.steps_in_flight)
    @rule()
    def deliver(self) -> None:
        self.simulation.deliver()

    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        limits = self.simulation.scheduler.limits
        stage, column = st.integers(0, limits.stages - 1), st.integers(0, limits.columns - 1)
        self.simulation.kill(data.draw(st.sets(st.tuples(stage, column), max_size=2)))

    def teardown(self) -> None:
        if hasattr(self, "simulation"):
            self.simulation.drain()
            self.simulation.check_ranks_forget()


TestEngine = Engine.TestCase
TestEngine.settings = settings(
    max_examples=120,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
