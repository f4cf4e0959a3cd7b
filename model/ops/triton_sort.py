"""Which rows go to which expert, in Triton: sorted on the device, counts never leave it.

An *entry* is one row's wish for one expert; entry `row * top_k + k` is wish k of a row. Entries
are sorted by expert, stably, and those of one expert cut into *blocks* of at most so many; a
product then computes block by block. How many blocks there are is known to the device alone, so
products start as many programs as there could be, and those without a block end at once.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 256  # entries that one program sorts; so many or fewer are sorted by one kernel
_AT_ONCE = 32  # entries that a program compares with all others, or counts, at once


class Plan(NamedTuple):
    """Entries by expert.

    Attributes:
        order: [M] int32 entries, sorted; past the last that is here, anything.
        blocks: [3, most blocks] int32: each block's expert, where in `order` it begins and where
            it ends; (0, 0, 0) where there is none.
    """

    order: Tensor
    blocks: Tensor


def most_blocks(entries: int, experts: int, block: int) -> int:
    """How many blocks there are at worst: an expert's last block may hold a single entry."""
    return min(entries, (entries + experts * (block - 1)) // block)


def by_expert(ids: Tensor, first: int, experts: int, block: int) -> Plan:
    """Sorts entries, those of expert ids [N, top_k] int64, contiguous, N at least 1.

    Args:
        first: id of the first expert that is here.
        experts: how many are here.
        block: entries of one block.
    """
    entries, device = ids.numel(), ids.device
    order = torch.empty(entries, dtype=torch.int32, device=device)
    most = most_blocks(entries, experts, block)
    blocks = torch.empty(3, most, dtype=torch.int32, device=device)
    width = max(triton.next_power_of_2(experts), 16)
    if entries <= CHUNK:
        chunk = max(triton.next_power_of_2(entries), _AT_ONCE)
        _sort[(1,)](ids, order, blocks, entries, first, experts, most, block,
                    chunk, width, _AT_ONCE, num_warps=8)  # fmt: skip
        return Plan(order, blocks)
    chunks = triton.cdiv(entries, CHUNK)
    counts = torch.empty(chunks, width, dtype=torch.int32, device=device)
    _count[(chunks,)](ids, counts, entries, first, experts, CHUNK, width, _AT_ONCE)
    _lay_out[(1,)](counts, blocks, chunks, most, block, width, _AT_ONCE, num_warps=8)
    _place[(chunks,)](ids, counts, order, entries, first, experts,
                      CHUNK, width, _AT_ONCE, num_warps=8)  # fmt: skip
    return Plan(order, blocks)


@triton.jit
def _local(ids, entry, entries, first, experts):
    """Experts of some entries, counted from the first one here; `experts` for elsewhere."""
    expert = tl.load(ids + entry, mask=entry < entries, other=-1) - first
    return tl.where((expert >= 0) & (expert < experts), expert, experts).to(tl.int32)


@triton.jit
def _counts(
    ids, begin, entries, first, experts,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """How many of a chunk's entries go to each expert: int32 [WIDTH]."""
    column = tl.arange(0, WIDTH)
    counts = tl.zeros([WIDTH], tl.int32)
    for at in range(0, CHUNK, AT_ONCE):
        expert = _local(ids, begin + at + tl.arange(0, AT_ONCE), entries, first, experts)
        hit = (expert[:, None] == column[None, :]) & (column < experts)[None, :]
        counts += tl.sum(hit.to(tl.int32), 0)
    return counts


@triton.jit
def _write_blocks(blocks, total, most, size, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr):
    """The blocks of all experts, from their numbers of entries [WIDTH]."""
    expert = tl.arange(0, WIDTH)
    begin = tl.cumsum(total, 0) - total  # where each expert's entries begin
    count = (total + size - 1) // size
    at = tl.cumsum(count, 0) - count  # where each expert's blocks begin
    for i in range(tl.max(count, 0)):
        some = i < count
        first = begin + i * size
        tl.store(blocks + at + i, expert, mask=some)
        tl.store(blocks + most + at + i, first, mask=some)
        tl.store(blocks + 2 * most + at + i, tl.minimum(first + size, begin + total), mask=some)
    there = tl.sum(count, 0)
    for start in range(0, most, AT_ONCE):
        block = start + tl.arange(0, AT_ONCE)
        none = (block >= there) & (block < most)
        for part in tl.static_range(3):
            tl.store(blocks + part * most + block, tl.zeros([AT_ONCE], tl.int32), mask=none)


@triton.jit
def _sort(
    ids, order, blocks, entries, first, experts, most, size,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The whole sort, of no more entries than one chunk has."""
    entry = tl.arange(0, CHUNK)
    expert = _local(ids, entry, entries, first, experts)
    place = tl.zeros([CHUNK], tl.int32)
    for at in range(0, CHUNK, AT_ONCE):
        other = at + tl.arange(0, AT_ONCE)
        theirs = _local(ids, other, entries, first, experts)
        earlier = (theirs[None, :] == expert[:, None]) & (other[None, :] < entry[:, None])
        place += tl.sum(((theirs[None, :] < expert[:, None]) | earlier).to(tl.int32), 1)
    tl.store(order + place, entry, mask=expert < experts)
    total = _counts(ids, 0, entries, first, experts, CHUNK, WIDTH, AT_ONCE)
    _write_blocks(blocks, total, most, size, WIDTH, AT_ONCE)


@triton.jit
def _count(
    ids, counts, entries, first, experts,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    found = _counts(ids, chunk * CHUNK, entries, first, experts, CHUNK, WIDTH, AT_ONCE)
    tl.store(counts + chunk * WIDTH + tl.arange(0, WIDTH), found)


@triton.jit
def _lay_out(counts, blocks, chunks, most, size, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr):
    """Turns each chunk's counts [chunks, WIDTH] into where its entries of each expert go."""
    column = tl.arange(0, WIDTH)[None, :]
    row = tl.arange(0, AT_ONCE)[:, None]
    total = tl.zeros([WIDTH], tl.int32)
    for start in range(0, chunks, AT_ONCE):
        at = counts + (start + row) * WIDTH + column
        total += tl.sum(tl.load(at, mask=start + row < chunks, other=0), 0)
    _write_blocks(blocks, total, most, size, WIDTH, AT_ONCE)
    before = tl.cumsum(total, 0) - total
    for start in range(0, chunks, AT_ONCE):
        at = counts + (start + row) * WIDTH + column
        some = tl.load(at, mask=start + row < chunks, other=0)
        tl.store(at, before[None, :] + tl.cumsum(some, 0) - some, mask=start + row < chunks)
        before += tl.sum(some, 0)


@triton.jit
def _place(
    ids, places, order, entries, first, experts,
    CHUNK: tl.constexpr, WIDTH: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Puts a chunk's entries where they go."""
    chunk = tl.program_id(0)
    entry = chunk * CHUNK + tl.arange(0, CHUNK)
    expert = _local(ids, entry, entries, first, experts)
    earlier = tl.zeros([CHUNK], tl.int32)
    for at in range(0, CHUNK, AT_ONCE):
        other = chunk * CHUNK + at + tl.arange(0, AT_ONCE)
        theirs = _local(ids, other, entries, first, experts)
        same = (theirs[None, :] == expert[:, None]) & (other[None, :] < entry[:, None])
        earlier += tl.sum(same.to(tl.int32), 1)
    here = expert < experts
    place = tl.load(places + chunk * WIDTH + expert, mask=here, other=0) + earlier
    tl.store(order + place, entry, mask=here)
