"""Large numbers found by blocks are those that a look at whole rows finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.ops.blocks import Blocks


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 5),
    width=st.sampled_from([1, 63, 64, 65, 700, 5000]),
    count=st.sampled_from([1, 2, 17, 64]),
    levels=st.sampled_from([3, 50, 10**6]),
    seed=st.integers(0, 10**6),
)
def test_the_largest_numbers_and_where_they_stand(
    rows: int, width: int, count: int, levels: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(-levels, levels, (rows, width), generator=generator).float()
    count = min(count, width)
    blocks = Blocks(numbers)
    expected = numbers.sort(dim=1, descending=True, stable=True)
    assert torch.equal(blocks.largest(count), expected.values[:, :count])
    assert torch.equal(numbers.gather(1, blocks.peaks()[:, None]), expected.values[:, :1])

    ranks = torch.randint(1, count + 1, (rows,), generator=generator)
    cut = expected.values.gather(1, ranks[:, None] - 1)[:, 0]
    row, column = blocks.down_to(cut, ranks)
    for i, rank in enumerate(ranks.tolist()):
        assert column[row == i].tolist() == sorted(expected.indices[i, :rank].tolist())


@pytest.mark.parametrize("width", [20, 100])
def test_nothing_stands_beyond_the_last_column_or_at_minus_infinity(width: int) -> None:
    numbers = torch.full((2, width), float("-inf"))
    numbers[0, 3] = 1.0
    blocks = Blocks(numbers)
    row, column = blocks.reaching(torch.full((2,), float("-inf")))
    assert (row.tolist(), column.tolist()) == ([0], [3])
    assert (blocks.peaks() < width).all()
