"""The latent cache in 8-bit floats: its bytes, its error, and that no schedule changes a logit."""

from dataclasses import replace

import pytest
import torch

from model import ops
from model.cache import LatentCache, bytes_per_page
from model.config import CheckpointError
from model.ops import reference
from model.quantize import FP8, FP8_MAX, fp8_row_bytes, fp8_rows, from_fp8_rows
from tests.model.harness import CPU, Gang, relative_error
from tests.model.oracle import oracle
from tests.model.test_parity import random_tokens

ROW = 576
BYTES = 656


def rows(count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, ROW, generator=generator)


def test_a_row_has_its_latents_then_four_scales_then_the_key() -> None:
    row = rows(1)
    stored = fp8_rows(row, BYTES)
    assert fp8_row_bytes(512, 64) == BYTES
    assert (stored.dtype, stored.shape) == (torch.uint8, (1, BYTES))
    scales = stored[:, 512:528].contiguous().view(torch.float32)
    largest = row[:, :512].unflatten(1, (4, 128)).abs().amax(-1)
    assert torch.allclose(scales, largest / FP8_MAX)
    assert torch.equal(stored[:, 528:].contiguous().view(torch.bfloat16), row[:, 512:].bfloat16())
    assert stored[:, :512].contiguous().view(FP8).float().abs().amax() == FP8_MAX


def test_an_element_is_off_by_a_sixteenth_of_itself_at_most() -> None:
    row = rows(64) * torch.logspace(-3, 3, 64)[:, None]
    back = from_fp8_rows(fp8_rows(row, BYTES), ROW, torch.float32)
    error = (back - row).abs()
    smallest = row[:, :512].abs().amax(1, keepdim=True) / FP8_MAX * 2**-10  # half the least step
    assert (error[:, :512] <= row[:, :512].abs() / 16 + smallest).all()
    assert (error[:, 512:] <= row[:, 512:].abs() / 256).all()


def test_zeros_stay_zeros_and_other_latents_than_512_fit() -> None:
    assert not from_fp8_rows(torch.zeros(3, BYTES, dtype=torch.uint8), ROW, torch.float32).any()
    assert not from_fp8_rows(fp8_rows(torch.zeros(3, ROW), BYTES), ROW, torch.float32).any()
    narrow = rows(5)[:, : 256 + 32]
    back = from_fp8_rows(fp8_rows(narrow, fp8_row_bytes(256, 32)), 288, torch.float32)
    assert torch.equal(back[:, 256:], narrow[:, 256:].bfloat16().float())
    assert relative_error(back, narrow) < 0.05


def test_attention_over_bytes_is_attention_over_the_rows_they_stand_for() -> None:
    written = rows(300)
    cache = torch.zeros(6, 64, BYTES, dtype=torch.uint8)
    slots = torch.arange(64, 364)
    ops.write_rows(cache, slots, written)
    plain = torch.zeros(6, 64, ROW)
    plain.flatten(0, 1)[slots] = ops.read_rows(cache, slots, written)
    query, pages = torch.randn(2, 4, ROW), torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 0, 0]])
    lengths = torch.tensor([300, 150])
    expected = reference.attend_pages(query, plain, pages, lengths, 512, 0.1)
    for attend in (ops.attend_pages, reference.attend_pages):
        assert relative_error(attend(query, cache, pages, lengths, 512, 0.1), expected) < 1e-5


def test_no_schedule_changes_a_logit_and_the_error_is_small() -> None:
    model = oracle("nano")
    tokens = random_tokens(model, 150)
    expected = model.logits(tokens)[-1]
    last = []
    for schedule in ([150], [64, 86], [149, 1], [100, *[1] * 50]):
        gang = Gang(model.config, model.tensors, stages=2, cache_dtype=FP8)
        live = gang.open(tokens)
        for count in schedule:
            logits = gang.advance({live: count})[live]
        last.append(logits)
    for logits in last[1:]:
        assert relative_error(logits, last[0]) < 1e-4
    assert 1e-4 < relative_error(last[0], expected) < 0.05


def test_a_page_costs_what_it_takes_and_an_odd_latent_is_refused() -> None:
    config = oracle("nano").config
    cache = LatentCache(config, 3, 5, FP8, CPU)
    assert cache.layer(2).shape == (5, 64, BYTES)
    assert cache.rows.nbytes == 5 * bytes_per_page(config, 3, FP8)
    with pytest.raises(CheckpointError, match=r"a latent has 48: set gang\.cache_dtype"):
        LatentCache(replace(config, kv_lora_rank=48), 3, 5, FP8, CPU)
