"""Rotary frequencies and rotation against transformers' own."""

import pytest
import torch
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2RotaryEmbedding,
    apply_rotary_emb,
)

from model import ops
from model.rope import Rope, rope_frequencies
from tests.model.oracle import FAMILIES, oracle


@pytest.mark.parametrize("name", ["nano", *FAMILIES])
def test_frequencies_equal_those_of_transformers(name: str) -> None:
    model = oracle(name)
    theirs = DeepseekV2RotaryEmbedding(model.reference.config)
    ours = rope_frequencies(model.config.rope, model.config.qk_rope_head_dim)
    assert torch.equal(ours, theirs.inv_freq)
    assert model.config.rope.cos_sin_multiplier == pytest.approx(theirs.attention_scaling)
    scale = model.reference.model.layers[0].self_attn.scaling
    assert model.config.softmax_scale == pytest.approx(scale)


def test_published_correction_range_is_pairs_10_to_23() -> None:
    model = oracle("nano")
    frequencies = rope_frequencies(model.config.rope, 64)
    trained = 10000.0 ** (-torch.arange(0, 64, 2) / 64)
    slowdown = trained / frequencies
    torch.testing.assert_close(slowdown[:11], torch.ones(11))
    torch.testing.assert_close(slowdown[23:], torch.full((9,), 40.0))
    assert torch.all(slowdown[11:23].diff() > 0)


@pytest.mark.parametrize("start", [0, 4000, 4096, 163_800])
def test_rotation_equals_that_of_transformers_past_the_trained_length(start: int) -> None:
    model = oracle("nano")
    positions = torch.arange(start, start + 32)
    x = torch.randn(32, 4, 64, generator=torch.Generator().manual_seed(0))
    angles = DeepseekV2RotaryEmbedding(model.reference.config)(x, positions[None])
    heads_first = x.transpose(0, 1)[None]
    expected, _ = apply_rotary_emb(heads_first, heads_first, angles)
    ops.rotate_(x, *Rope(model.config.rope, 64, "cpu")(positions))
    torch.testing.assert_close(x, expected[0].transpose(0, 1), rtol=1e-4, atol=1e-5)
