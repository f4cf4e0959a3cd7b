"""The experts' and the sampling's benchmarks, run where there is no GPU."""

import torch

from loadtest.gpu import experts, sampling
from loadtest.gpu.figure import EXPERTS_DECODE, EXPERTS_ERROR, EXPERTS_PREFILL
from model.ops import reference
from model.ops.choice import implementations

CPU = torch.device("cpu")


def test_every_figure_of_the_experts_is_measured_by_each_kind_and_none_stays_forced() -> None:
    before = implementations("cpu")["weighted_experts"]
    figures = {figure.name: figure.value for figure in experts.measure(CPU, tiny=True)}
    assert implementations("cpu")["weighted_experts"] is before
    for how in ("", ", torch's grouped product", ", 8-bit floats"):
        assert figures[EXPERTS_DECODE + how] > 0
        assert figures[EXPERTS_PREFILL + how] > 0
    assert 0 < figures[EXPERTS_ERROR] < 2e-2


def test_rates_count_what_is_read_and_computed() -> None:
    assert experts.LARGE.numbers == 23_592_960
    gate_up, down = experts.TINY.weights(CPU)
    assert gate_up[0].numel() + down[0].numel() == experts.TINY.numbers
    hidden, ids, weights = experts.TINY.rows(5, CPU)
    assert all(len(set(row)) == experts.TINY.top_k for row in ids.tolist())
    packed = reference.pack_experts(gate_up, down)
    assert reference.weighted_experts(hidden, ids, weights, packed, 0).shape == hidden.shape


def test_each_kind_of_sampling_is_timed() -> None:
    figures = list(sampling.measure(CPU, tiny=True))
    assert len(figures) == 6
    assert all(figure.value > 0 for figure in figures)
