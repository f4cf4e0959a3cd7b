"""The measurement of attention, run where there is no GPU."""

import pytest
import torch

from loadtest.gpu.attention import Decode, measure
from loadtest.gpu.figure import ATTEND_16, ATTEND_128, ATTEND_ERROR, GOALS

CPU = torch.device("cpu")


def test_every_figure_of_attention_that_must_be_reached_is_measured() -> None:
    figures = {figure.name: figure for figure in measure(CPU, tiny=True)}
    assert {ATTEND_128, ATTEND_16, ATTEND_ERROR} <= figures.keys()
    assert all(figure.value > 0 for figure in figures.values())
    assert figures[ATTEND_ERROR].value <= 1e-2
    over = {goal.figure: goal.over for goal in GOALS}
    assert figures[ATTEND_128].unit == "TFLOP/s"
    assert figures[ATTEND_16].unit == "GB/s"
    assert (over[ATTEND_128], over[ATTEND_16]) == ("bf16 matmul", "copy bandwidth")


@pytest.mark.parametrize(("fp8", "row"), [(False, 1152), (True, 656)])
def test_a_case_counts_what_decode_reads_and_computes(fp8: bool, row: int) -> None:
    case = Decode(heads=128, batch=64, context=8192, fp8=fp8)
    assert case.read == 64 * 8192 * row
    assert case.flop == 64 * 8192 * 128 * 2 * (576 + 512)
