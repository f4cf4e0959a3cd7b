"""A sequence whose numbers have gone wrong is alone with them."""

import pytest
import torch
from torch import Tensor

from tests.model.harness import Gang, Live
from tests.model.oracle import oracle

CHUNKS = (20, 1, 30, 1, 1, 17)  # prefill, decode and prefill that goes on


def logits_beside(gang: Gang, neighbour: Live, sick_from: int | None) -> tuple[Tensor, Tensor]:
    """Last logits of each step, of a sequence that is well and of its neighbour."""
    well = gang.open(list(range(300, 370)), column=len(gang._ranks) - 1)
    wells, neighbours = [], []
    for step, count in enumerate(CHUNKS):
        if step == sick_from:
            for cell, cache in gang._caches.items():
                if cell.rank == neighbour.column:
                    cache.rows[:, neighbour.pages] = torch.nan
        last = gang.advance({well: count, neighbour: 1})
        wells.append(last[well])
        neighbours.append(last[neighbour])
    return torch.stack(wells), torch.stack(neighbours)


@pytest.mark.parametrize(("stages", "ranks"), [(1, 1), (2, 2)])
def test_a_sequence_without_numbers_takes_no_other_with_it(stages: int, ranks: int) -> None:
    model = oracle("nano")

    def run(sick_from: int | None) -> tuple[Tensor, Tensor]:
        gang = Gang(model.config, model.tensors, stages, ranks)
        return logits_beside(gang, gang.open(list(range(100, 110))), sick_from)

    calm, _ = run(None)
    well, sick = run(2)
    assert not sick[2:].isfinite().any()
    assert torch.allclose(well, calm, atol=1e-3)


def test_pages_that_a_failed_sequence_left_do_no_harm() -> None:
    model = oracle("nano")

    def run(left: float) -> Tensor:
        gang = Gang(model.config, model.tensors)
        for cache in gang._caches.values():
            cache.rows.fill_(left)
        return logits_beside(gang, gang.open(list(range(100, 110))), None)[0]

    assert torch.allclose(run(torch.nan), run(0.0), atol=1e-3)
