"""The choice of experts, in Triton."""

import torch
import triton
import triton.language as tl
from torch import Tensor


def route(
    logits: Tensor, top_k: int, groups: int, groups_kept: int, scale: float
) -> tuple[Tensor, Tensor]:
    logits = logits.contiguous()
    rows, experts = logits.shape
    ids = logits.new_empty(rows, top_k, dtype=torch.int64)
    weights = logits.new_empty(rows, top_k)
    size = experts // groups
    if rows:
        _route[(rows,)](
            logits, ids, weights, scale, groups, size, groups_kept, top_k,
            triton.next_power_of_2(groups), triton.next_power_of_2(size), num_warps=1,
        )  # fmt: skip
    return ids, weights


@triton.jit
def _route(
    logits, ids, weights, scale, groups, size, groups_kept, top_k,
    GROUPS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """One row a program, its experts as a table of groups.

    Of equals the first is taken. A row with NaN gets the first experts and NaN.
    """
    row = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, GROUPS)
    member = tl.arange(0, SIZE)
    expert = group[:, None] * size + member[None, :]
    inside = (group < groups)[:, None] & (member < size)[None, :]
    experts = groups * size
    value = tl.load(logits + row * experts + expert, mask=inside, other=float("-inf"))
    score = tl.exp(value - tl.max(tl.max(value, 1), 0))
    score = score / tl.sum(tl.sum(score, 1), 0)
    left = tl.where(inside & (score >= 0.0), score, -1.0)
    if groups_kept < groups:
        best = tl.max(left, 1)
        eligible = tl.zeros([GROUPS], tl.int1)
        for _ in range(groups_kept):
            first = tl.min(tl.where(best == tl.max(best, 0), group, GROUPS), 0)
            eligible = eligible | (group == first)
            best = tl.where(group == first, -1.0, best)
        left = tl.where(eligible[:, None], left, -1.0)
    for k in range(top_k):
        most = tl.max(tl.max(left, 1), 0)
        chosen = tl.min(tl.min(tl.where((left == most) & (left >= 0.0), expert, experts), 1), 0)
        chosen = tl.where(chosen < experts, chosen, k)
        left = tl.where(expert == chosen, -1.0, left)
        tl.store(ids + row * top_k + k, chosen.to(tl.int64))
        weight = tl.sum(tl.sum(tl.where(expert == chosen, score, 0.0), 1), 0)
        tl.store(weights + row * top_k + k, weight * scale)
