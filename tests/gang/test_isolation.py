"""What goes wrong with one sequence of a step is its own affair."""

import pytest
import torch
from torch import Tensor

from model.sampling import SampledToken, SamplingRow, sample
from model.sampling_params import SamplingParams
from serving.gang import sampling
from serving.gang.sampling import sample_apart


@pytest.mark.parametrize("bad", [{3}, {0}, {6}, {2, 5}, set(range(7))])
def test_a_row_that_cannot_be_sampled_fails_alone(
    bad: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails_for_some(logits: Tensor, rows: list[SamplingRow]) -> list[SampledToken]:
        if any(row.params.seed in bad for row in rows):
            raise RuntimeError("an index is out of range")
        return sample(logits, rows)

    torch.manual_seed(0)
    logits = torch.randn(7, 50)
    rows = [SamplingRow(SamplingParams(temperature=1.0, seed=i), position=i) for i in range(7)]
    wanted = sample(logits, rows)
    monkeypatch.setattr(sampling, "sample", fails_for_some)
    for index, got in enumerate(sample_apart(logits, rows)):
        if index in bad:
            assert got.error == "Sampling failed: RuntimeError."
        else:
            assert got == wanted[index]
