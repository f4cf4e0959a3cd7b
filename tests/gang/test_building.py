"""A worker from its spec, and how a gang agrees on the size of its caches."""

from dataclasses import dataclass, field

import pytest

from model.config import CheckpointError
from model.random_checkpoint import NANO
from serving.config import Settings
from serving.gang.building import build_worker
from serving.gang.fabric import EchoFabric
from serving.gang.members import Member, Members
from serving.gang.messages import (
    GANG_CODEC,
    CacheSize,
    RankHello,
    RankMeasured,
    RankSpec,
)
from serving.gang.repair import Forming, GangBounds
from serving.specs import engine_limits, rank_specs
from tests.gang.test_memory import CountedMemory
from tests.gang.workers import call_again


def settings(**gang: object) -> Settings:
    engine = {"max_step_tokens": 64, "max_sequences": 4}
    return Settings.model_validate({"gang": gang, "engine": engine, "model": {"dtype": "float32"}})


def gpu_spec(**gang: object) -> RankSpec:
    """What a rank gets on a GPU, but for the device."""
    (spec,) = rank_specs(settings(**gang), "127.0.0.1", 1, "cuda")
    spec.device = "cpu"
    return spec


def test_on_gpus_a_rank_finds_out_how_many_pages_fit_and_takes_what_all_have() -> None:
    told: list[tuple[int, int]] = []
    asked: list[int] = []

    def agree(pages: int) -> int:
        asked.append(pages)
        return 20

    memory = CountedMemory(used=300 * 5 * 64 * 576 * 4)
    worker, cache_bytes = build_worker(
        gpu_spec(), None, None, lambda *progress: told.append(progress), agree, memory, call_again
    )
    assert told[-1][0] == told[-1][1] > 0
    assert asked == [1000 - 300 - 100 - 64]
    assert cache_bytes == 20 * 5 * 64 * 576 * 4
    assert worker._graphs is not None
    assert sorted(worker._graphs._graphs) == [1, 2, 4]
    assert worker._reserve is not None


def test_a_number_of_tokens_that_was_set_counts_if_they_fit() -> None:
    asked: list[int] = []
    memory = CountedMemory()
    spec = gpu_spec(cache_tokens=640, graphs="off")

    def agree(pages: int) -> int:
        asked.append(pages)
        return pages

    worker, _ = build_worker(spec, None, None, lambda done, total: None, agree, memory)
    assert asked == [11]
    assert worker._graphs is None


def test_a_rank_that_comes_back_takes_the_others_number_and_records_when_they_do() -> None:
    spec = gpu_spec()
    spec.measure, spec.pages = False, 9

    def agree(pages: int) -> int:
        raise AssertionError("the others have agreed before")

    worker, cache_bytes = build_worker(
        spec, None, None, lambda done, total: None, agree, CountedMemory(), call_again
    )
    assert cache_bytes == 9 * 5 * 64 * 576 * 4
    assert worker._graphs is not None
    assert worker._graphs._graphs == {}


def test_a_new_group_makes_graphs_of_the_old_one_void() -> None:
    spec = gpu_spec(expert_parallel=1)
    spec.ranks = 2
    worker, _ = build_worker(
        spec, None, EchoFabric(0, 2), lambda done, total: None, lambda pages: 20,
        CountedMemory(), call_again,
    )  # fmt: skip
    assert worker._graphs is not None
    assert worker._graphs._graphs
    worker.join(None, EchoFabric(0, 2))
    assert worker._graphs._graphs == {}


def test_int8_is_for_cpus() -> None:
    spec = gpu_spec()
    spec.quantize, spec.device = "int8", "cuda"
    with pytest.raises(CheckpointError, match="for CPUs"):
        build_worker(spec, None, None, lambda done, total: None, lambda pages: pages)


def test_cpus_get_a_fixed_number_and_gpus_none() -> None:
    assert gpu_spec().pages == 0
    assert gpu_spec(cache_tokens=6400).pages == 101
    (spec,) = rank_specs(settings(), "127.0.0.1", 1, "cpu")
    assert (spec.pages, spec.measure, spec.graphs) == (513, False, False)
    assert engine_limits(settings()).pages_per_column == 513
    limits = engine_limits(settings(), pages=101)
    assert (limits.pages_per_column, limits.max_request_tokens) == (101, 6400)
    assert spec.model_directory == str(NANO)


@dataclass
class Wire:
    """Keeps what is sent to a rank."""

    frames: list[bytes] = field(default_factory=list)

    def send_frame(self, frame: bytes) -> None:
        self.frames.append(frame)


def test_the_rank_with_the_least_memory_decides_for_all() -> None:
    members = Members(b"a secret of the test", 2, 1, lambda result: None)
    wires = [Wire(), Wire()]
    for stage, wire in enumerate(wires):
        members.here[stage, 0] = Member(RankHello(stage, 0, 1, ""), wire)  # type: ignore[arg-type]
    for stage, pages in enumerate([700, 500]):
        assert [len(wire.frames) for wire in wires] == [0, 0]
        members._receive((stage, 0), members.here[stage, 0], RankMeasured(pages))
    assert members.pages == 500
    assert wires[0].frames == wires[1].frames == [GANG_CODEC.frame(CacheSize(500))]


async def test_who_comes_later_gets_what_the_others_have() -> None:
    members = Members(b"a secret of the test", 1, 1, lambda result: None)
    spec = gpu_spec()
    bounds = GangBounds(1, 1, 1, 1, 1)
    forming = Forming(members, None, b"", bounds, {(0, 0): spec})  # type: ignore[arg-type]

    async def form(timeout_s: float) -> set[tuple[int, int]]:
        members.pages = 77
        return set()

    forming._form = form  # type: ignore[method-assign]
    await forming.start()
    assert (spec.pages, spec.measure, forming.pages) == (77, False, 77)
