"""How many pages a device holds, found out by running the largest step."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import pytest
import torch

from model.cache import bytes_per_page
from model.config import CheckpointError
from model.layout import Cell, Layout
from model.moe import LocalExchange
from model.stage import Stage
from serving.gang.exchange import EXCHANGES, StageExchange
from serving.gang.fabric import EchoFabric
from serving.gang.memory import StepMemory, measure_steps, pages_that_fit
from tests.model.harness import CPU, load
from tests.model.oracle import oracle

CONFIG = oracle("nano").config
PAGE = bytes_per_page(CONFIG, 5, torch.float32)


@dataclass
class CountedMemory:
    """A device of a thousand pages on which a step takes one page a row."""

    used: int = 0
    rows: list[int] = field(default_factory=list)

    def total(self) -> int:
        return 1000 * PAGE

    def free(self) -> int:
        return self.total() - self.used

    def available(self) -> int:
        return self.free()

    def peak(self, call: Callable[[], None]) -> int:
        forward = Stage.forward

        def counted(stage: Stage, inputs: torch.Tensor, context: Any, cache: Any) -> torch.Tensor:
            self.rows.append(context.rows)
            return forward(stage, inputs, context, cache)

        with patch.object(Stage, "forward", counted):
            call()
        return self.rows[-1] * PAGE


def measured(cell: Cell, stages: int, exchange: StageExchange | None, ranks: int) -> CountedMemory:
    layout = Layout(CONFIG, stages, ranks)
    stage = Stage(CONFIG, layout, cell, torch.float32, CPU, exchange or LocalExchange())
    load(stage, oracle("nano").tensors)
    memory = CountedMemory()
    steps = measure_steps(CONFIG, stage, exchange, memory, step_tokens=96, sequences=8)
    assert steps == StepMemory(PAGE, 96 * PAGE, 96)
    return memory


@pytest.mark.parametrize("kind", [None, *EXCHANGES])
@pytest.mark.parametrize("cell", [Cell(0, 0), Cell(1, 1)])
def test_the_largest_step_runs_on_any_cell_without_its_peers(cell: Cell, kind: str | None) -> None:
    if kind is None:
        memory = measured(Cell(cell.stage, 0), 2, None, 1)
    else:
        peers = EchoFabric(cell.rank, 2)
        exchange = EXCHANGES[kind](peers, CONFIG.n_routed_experts)
        memory = measured(cell, 2, exchange, 2)
        assert exchange._fabric is peers
    assert memory.rows == [1, 96]


def test_pages_get_what_weights_and_the_largest_step_leave() -> None:
    steps = StepMemory(PAGE, 96 * PAGE, 96)
    memory = CountedMemory(used=300 * PAGE)
    assert pages_that_fit(CONFIG, 5, torch.float32, memory, 0.9, steps) == 1000 - 300 - 100 - 96
    memory.used = 802 * PAGE
    with pytest.raises(CheckpointError, match=r"step of 96 tokens .* higher gang.memory_fraction"):
        pages_that_fit(CONFIG, 5, torch.float32, memory, 0.9, steps)


def test_a_step_reserves_what_its_rows_take_and_never_more_than_the_largest() -> None:
    steps = StepMemory(least=100, most=1060, rows=96)
    assert [steps.needed(rows) for rows in (1, 2, 3, 64, 65, 96)] == [
        110,
        120,
        140,
        740,
        1060,
        1060,
    ]


def test_a_step_makes_sure_of_its_memory_only_where_it_is_short() -> None:
    """2**60 bytes are more than any machine has."""
    steps, memory = StepMemory(0, 2**60, 1), CountedMemory()
    with pytest.raises(RuntimeError, match="memory"):
        steps.reserve(1, memory, CPU)
    with patch.object(CountedMemory, "available", return_value=2**61):
        steps.reserve(1, memory, CPU)
