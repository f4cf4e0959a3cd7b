"""Attention in fp64, one sequence after the other: what kernels and the reference approximate."""

import torch
from torch import Tensor

from model.cache import PAGE_TOKENS
from model.ops import reference


def error(found: Tensor, expected: Tensor) -> float:
    """The largest error, as a share of the largest magnitude."""
    assert found.shape == expected.shape
    off = (found.cpu().double() - expected.cpu()).abs().max()
    return float(off / expected.abs().max())


def attend(
    query: Tensor, key: Tensor, shared_key: Tensor, value: Tensor, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """As `ops.attend`; outputs and log-sum-exps in fp64."""
    query, key, shared_key, value = (each.double() for each in (query, key, shared_key, value))
    keys = torch.cat((key, shared_key[:, None].expand(-1, key.shape[1], -1)), dim=-1)
    scores = torch.einsum("nhd,mhd->nhm", query, keys) * scale
    if causal:
        unseen = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device).triu(1)
        scores = scores.masked_fill(unseen[:, None], float("-inf"))
    return torch.einsum("nhm,mhv->nhv", scores.softmax(-1), value), scores.logsumexp(-1)


def attend_latents(
    query: Tensor, latents: Tensor, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As `ops.attend_latents`; outputs and log-sum-exps in fp64."""
    query, latents = query.double(), latents.double()
    scores = torch.einsum("nhd,md->nhm", query, latents) * scale
    out = torch.einsum("nhm,mv->nhv", scores.softmax(-1), latents[:, :value_dim])
    return out, scores.logsumexp(-1)


def attend_pages(
    query: Tensor, cache: Tensor, pages: Tensor, lengths: Tensor, value_dim: int, scale: float
) -> tuple[Tensor, Tensor]:
    """As `ops.attend_pages`; outputs and log-sum-exps in fp64."""
    found = []
    for asked, table, length in zip(query.double(), pages, lengths.tolist(), strict=True):
        place = torch.arange(length, device=pages.device)
        slots = table[place // PAGE_TOKENS] * PAGE_TOKENS + place % PAGE_TOKENS
        rows = reference.read_rows(cache, slots, asked)
        found.append(attend_latents(asked[None], rows, value_dim, scale))
    out, lse = zip(*found, strict=True)
    return torch.cat(out), torch.cat(lse)
