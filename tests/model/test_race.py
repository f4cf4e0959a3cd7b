"""The race that draws tokens: its numbers, and what moves its outcome."""

import math

import numpy as np
import torch

from model.ops.race import FEW_RUNNERS, draw, draw_key, gumbel
from model.sampling_params import MAX_SEED


def numbers(seeds: range, positions: range, vocab: int) -> np.ndarray:
    """What the tokens race with, as uniform numbers: [seeds, positions, vocab]."""
    keys = torch.tensor([draw_key(seed, position) for seed in seeds for position in positions])
    found = gumbel(keys, vocab).double().neg().exp().neg().exp()
    return found.view(len(seeds), len(positions), vocab).numpy()


def test_numbers_are_uniform_and_independent_along_seeds_positions_and_tokens() -> None:
    grid = numbers(range(64), range(32), 64)
    assert 0.0 < grid.min() < 0.0005
    assert 0.9995 < grid.max() < 1.0
    counts = np.histogram(grid, bins=64, range=(0, 1))[0]
    expected = grid.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 63 + 5 * math.sqrt(126)
    for axis in range(3):
        for step in (1, 2, 16):
            left, right = np.split(grid, [step], axis)[1], np.split(grid, [-step], axis)[0]
            assert abs(np.corrcoef(left.ravel(), right.ravel())[0, 1]) < 5 / math.sqrt(left.size)
    joint = np.histogram2d(grid[:-1].ravel(), grid[1:].ravel(), bins=16)[0]
    expected = grid[1:].size / 256
    assert ((joint - expected) ** 2 / expected).sum() < 255 + 5 * math.sqrt(510)


def test_a_seeded_request_means_the_same_for_ever() -> None:
    assert draw_key(0, 0) == -2152535657050944081
    assert draw_key(MAX_SEED, 10**6) != draw_key(MAX_SEED - 1, 10**6)
    found = gumbel(torch.tensor([draw_key(0, 0), draw_key(MAX_SEED, 9)]), 3)
    expected = [[-0.26002756, 1.4701010, -0.18057734], [-0.07388860, -0.01445583, 1.2509813]]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_a_draw_survives_logits_that_differ_in_the_last_bits() -> None:
    """What another replica computes; inverting a distribution would move tokens by the dozen."""
    generator = torch.Generator().manual_seed(11)
    logits = torch.randn(1, 2500, generator=generator) * 3
    nearly = logits * (1 + torch.randn(logits.shape, generator=generator) * 1e-6)
    keys = torch.tensor([draw_key(seed, seed) for seed in range(2000)])
    limits = torch.tensor([[1.3, 0.0, 0.999, 0.0]], dtype=torch.float64).expand(2000, -1)
    tokens = [draw(some.expand(2000, -1), keys, limits) for some in (logits, nearly)]
    assert len(tokens[0].unique()) > 300
    assert int((tokens[0] != tokens[1]).sum()) <= 1


def test_who_wins_is_not_overlooked_among_those_whose_numbers_are_not_computed() -> None:
    generator = torch.Generator().manual_seed(5)
    rows, vocab = 2000, 101
    assert rows * vocab > FEW_RUNNERS
    keys = torch.tensor([draw_key(seed, 3) for seed in range(rows)])
    free = torch.tensor([[1.0, 0.0, 1.0, 0.0]], dtype=torch.float64).expand(rows, -1)
    for spread in (0.0, 1.0, 10.0, 1000.0):
        logits = torch.randn(rows, vocab, generator=generator) * spread
        logits[:, 7] = -math.inf
        heights = logits - logits.amax(dim=1, keepdim=True)
        expected = (heights + gumbel(keys, vocab)).argmax(dim=1)
        assert torch.equal(draw(logits, keys, free), expected)
