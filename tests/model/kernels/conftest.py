"""What these files have in common: they run in processes of their own, see test_kernels.py."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _every_element_must_be_written() -> Iterator[None]:
    """New tensors begin as NaN, or as the largest number of their dtype."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
