"""Drawing tokens on the device, in Triton: one program a row, nothing read back.

The filters of `model.ops.race` without its sorts: each keeps what lies above some logit, and of
the tokens that tie with that one the first few. Bisection finds it among all floats, whose order
is that of whole numbers; a pass over the row tests three thresholds at once, so that sixteen
passes do. A row of 102,400 logits is 400 KB and stays in the second-level cache.
"""

import triton
import triton.language as tl
from torch import Tensor

from model.ops.race import FACTORS, MIN_TEMPERATURE

_AT_ONCE = 4096
_WARPS = 16
_FIRST_FACTOR = tl.constexpr(FACTORS[0])
_SECOND_FACTOR = tl.constexpr(FACTORS[1] % 2**32)


def draw(logits: Tensor, keys: Tensor, limits: Tensor) -> Tensor:
    logits, (rows, vocab) = logits.contiguous(), logits.shape
    tokens = keys.new_empty(rows)
    block = min(triton.next_power_of_2(vocab), _AT_ONCE)
    if rows:
        _draw[(rows,)](
            logits, keys.contiguous(), limits.contiguous(), tokens, vocab, MIN_TEMPERATURE, block,
            num_warps=min(max(block // 256, 1), _WARPS),
        )  # fmt: skip
    return tokens


@triton.jit
def _mixed(bits):
    """All of 32 bits into each."""
    bits ^= bits >> 16
    bits *= _FIRST_FACTOR
    bits ^= bits >> 15
    bits *= _SECOND_FACTOR
    return bits ^ (bits >> 16)


@triton.jit
def gumbel(token, low, high):
    """As `model.ops.race.gumbel`: the numbers of some tokens for the two halves of a key."""
    bits = _mixed(token.to(tl.uint32)) ^ low
    bits ^= bits >> 16
    bits *= _FIRST_FACTOR
    bits ^= bits >> 15
    bits += high
    bits *= _SECOND_FACTOR
    bits ^= bits >> 16
    uniform = ((bits & 0x7FFFFFFF).to(tl.int32).to(tl.float32) + 0.5) * (1.0 / 2147483648.0)
    uniform = tl.minimum(uniform, 1.0 - 1.0 / 16777216.0)
    # Kahan's way to log(1 - u), exact where 1 - u rounds.
    rest = 1.0 - uniform
    race = tl.where(rest == 1.0, uniform, -tl.log(rest) * uniform / (1.0 - rest))
    return -tl.log(race)


@triton.jit
def _place(value):
    """Where a float stands in the order of all of them: int64."""
    bits = value.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _float_at(place):
    bits = place.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _block(logits, start, vocab, BLOCK: tl.constexpr):
    token = start + tl.arange(0, BLOCK)
    return tl.load(logits + token, mask=token < vocab, other=float("-inf"))


@triton.jit
def _size(value, peak, temperature, BY_MASS: tl.constexpr):
    """What tokens count for: one each, or as much as they weigh (the likeliest one 1)."""
    if BY_MASS:
        return tl.exp((value - peak) / temperature).to(tl.float64)
    return tl.where(value > float("-inf"), 1.0, 0.0).to(tl.float64)


@triton.jit
def _above(logits, level, peak, temperature, vocab, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Number or mass of the tokens above a level: fp64."""
    size = tl.zeros([BLOCK], tl.float64)
    for start in range(0, vocab, BLOCK):
        value = _block(logits, start, vocab, BLOCK)
        size += tl.where(value > level, _size(value, peak, temperature, BY_MASS), 0.0)
    return tl.sum(size, 0)


@triton.jit
def _cut(
    logits, target, peak, temperature, vocab, BY_MASS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Down to which logit a filter keeps: the lowest with less than `target` above it."""
    # The highest place known to have too much above it, and the lowest one known not to.
    low, high = _place(tl.full([], float("-inf"), tl.float32)) - 1, _place(peak)
    while high - low > 1:
        step = tl.maximum((high - low) // 4, 1)
        first, second = low + step, tl.minimum(low + 2 * step, high)
        third = tl.minimum(low + 3 * step, high)
        above_first = tl.zeros([BLOCK], tl.float64)
        above_second, above_third = above_first, above_first
        for start in range(0, vocab, BLOCK):
            value = _block(logits, start, vocab, BLOCK)
            size = _size(value, peak, temperature, BY_MASS)
            above_first += tl.where(value > _float_at(first), size, 0.0)
            above_second += tl.where(value > _float_at(second), size, 0.0)
            above_third += tl.where(value > _float_at(third), size, 0.0)
        if tl.sum(above_first, 0) < target:
            high = first
        elif tl.sum(above_second, 0) < target:
            low, high = first, second
        elif tl.sum(above_third, 0) < target:
            low, high = second, third
        else:
            low = third
    return _float_at(high)


@triton.jit
def _room(above, target, size):
    """How many ties of that size fit before the target is reached."""
    return tl.minimum(tl.ceil((target - above) / size), 2147483647.0)


@triton.jit
def _draw(logits, keys, limits, tokens, vocab, MIN_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocab
    asked = tl.load(limits + 4 * row)
    top_k, top_p = tl.load(limits + 4 * row + 1), tl.load(limits + 4 * row + 2)
    min_p = tl.load(limits + 4 * row + 3).to(tl.float32)
    temperature = tl.maximum(asked, MIN_TEMPERATURE).to(tl.float32)
    drawn = asked > 0.0

    highest = tl.full([BLOCK], float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        highest = tl.maximum(highest, _block(logits, start, vocab, BLOCK))
    peak = tl.max(highest, 0)

    cut, room = tl.full([], float("-inf"), tl.float32), tl.full([], 2147483647.0, tl.float64)
    by_number = drawn & (top_k > 0.0) & (top_k < vocab)
    if by_number:
        cut = _cut(logits, top_k, peak, temperature, vocab, False, BLOCK)
        above = _above(logits, cut, peak, temperature, vocab, False, BLOCK)
        room = _room(above, top_k, 1.0)
    if drawn & (top_p < 1.0):
        mass = _above(logits, cut, peak, temperature, vocab, True, BLOCK)
        if by_number:
            mass += room * _size(cut, peak, temperature, True)
        target = top_p * mass
        level = _cut(logits, target, peak, temperature, vocab, True, BLOCK)  # no lower than cut
        above = _above(logits, level, peak, temperature, vocab, True, BLOCK)
        fits = _room(above, target, _size(level, peak, temperature, True))
        room = tl.where(level == cut, tl.minimum(room, fits), fits)
        cut = level

    low, high = _halves(tl.load(keys + row))
    best, winner = tl.full([BLOCK], float("-inf"), tl.float32), tl.zeros([BLOCK], tl.int32)
    seen = tl.zeros([], tl.int32)
    for start in range(0, vocab, BLOCK):
        token = start + tl.arange(0, BLOCK)
        value = _block(logits, start, vocab, BLOCK)
        height = (value - peak) / temperature
        ties = (value == cut).to(tl.int32)
        kept = (value > cut) | ((ties != 0) & (seen + tl.cumsum(ties, 0) <= room))
        seen += tl.sum(ties, 0)
        if drawn:
            kept = kept & (tl.exp(height) >= min_p)
            height += gumbel(token, low, high)
        height = tl.where(kept & (token < vocab), height, float("-inf"))
        winner = tl.where(height > best, token, winner)
        best = tl.maximum(best, height)
    first = tl.min(tl.where(best == tl.max(best, 0), winner, vocab - 1), 0)
    tl.store(tokens + row, first.to(tl.int64))


@triton.jit
def _halves(key):
    return (key & 0xFFFFFFFF).to(tl.uint32), ((key >> 32) & 0xFFFFFFFF).to(tl.uint32)
