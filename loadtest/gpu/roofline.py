"""The machine's own speed, which everything else is compared with."""

from collections.abc import Iterator

import torch

from loadtest.gpu.figure import COPY, MATMUL, Figure
from loadtest.gpu.timing import median_seconds


def measure(device: torch.device, tiny: bool) -> Iterator[Figure]:
    """Copy bandwidth (bytes read and written), then bf16 matrix products, on random numbers."""
    numbers = 2**16 if tiny else 2**31
    source = torch.empty(numbers, dtype=torch.bfloat16, device=device).normal_()
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device)
    yield Figure(COPY, 2 * source.nbytes / seconds / 1e9, "GB/s")
    side = 128 if tiny else 8192
    left, right = (
        torch.empty(side, side, dtype=torch.bfloat16, device=device).normal_() for _ in range(2)
    )
    seconds = median_seconds(lambda: left @ right, device)
    yield Figure(MATMUL, 2 * side**3 / seconds / 1e12, "TFLOP/s")
