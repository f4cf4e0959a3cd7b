"""How long it takes to draw tokens from logits of the real vocabulary, and to wait for them."""

from collections.abc import Iterator
from functools import partial

import torch

from loadtest.gpu.figure import Figure
from loadtest.gpu.timing import median_seconds
from model.sampling import SamplingRow, sample
from model.sampling_params import SamplingParams

_KINDS = {
    "greedy": SamplingParams(temperature=0.0),
    "all tokens": SamplingParams(seed=1),
    "top-k and top-p": SamplingParams(temperature=0.7, top_k=50, top_p=0.95, seed=1),
}


def measure(device: torch.device, tiny: bool) -> Iterator[Figure]:
    """Times of whole calls, with what the host does for each row."""
    vocab = 500 if tiny else 102_400
    for count in (1, 64):
        logits = torch.randn(count, vocab, device=device) * 3
        for name, params in _KINDS.items():
            rows = [SamplingRow(params, position) for position in range(count)]
            seconds = median_seconds(partial(sample, logits, rows), device)
            yield Figure(f"sampling, {name}, {count} rows, time", seconds * 1e6, "µs")
