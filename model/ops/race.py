"""Drawing tokens in plain torch: what the filters leave runs a race.

Each token runs with its logit over the temperature plus a Gumbel number of its own, and the
furthest one wins: as often as the softmax says, for the maximum of independent Gumbel numbers
that are shifted by logits is distributed so. The number is hashed from (seed, position, token).
A device whose logits differ in the last bits, or who looks at the tokens in another order, thus
draws the same token but for near ties; inverting the cumulative distribution would let an error
in any one weight move all tokens that come after it.

A Gumbel number takes two logarithms. What it cannot be more than is seen from the exponent and
the fraction of the hashed number as a float, so that only the few who may win get their own.

Top-k, top-p and min-p each keep the most probable tokens down to some rank, so that all three
together are one rank and a threshold on the logits: no sort of whole rows. Ties go to the lower
id, everywhere.
"""

import math
from functools import cache

import torch
from torch import Tensor

from model.ops.blocks import Blocks

CANDIDATES = (64, 1024)  # ranks looked at first; rows that keep more are sorted whole
ROWS_AT_ONCE = 16  # drawn at once, which takes up to 60 bytes per row and token
RUNNERS_AT_ONCE = 2**17  # what races at once stays in the second-level cache
FEW_RUNNERS = 2**16  # all their numbers are there before it is known who may win
MIN_TEMPERATURE = 1e-6  # below it, the same

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
# An avalanching mixer of 32 bits: three shifts and, between them, two odd factors, as int32.
FACTORS = (0x7FEB352D, 0x846CA68B - 2**32)
_BITS = 31  # of a hashed number
_MARGIN = 1e-3  # more than all that is rounded in a bound


def draw_key(seed: int, position: int) -> int:
    """What the numbers of one draw are hashed from: 64 bits of splitmix64, as an int64.

    The seed is hashed once to spread neighbouring seeds over the state space; the position is
    the number of steps that the generator then takes from there.
    """
    state = _splitmix(seed & _MASK) + (position + 1) * _GOLDEN
    key = _splitmix(state & _MASK)
    return key - 2**64 if key >> 63 else key


def _splitmix(state: int) -> int:
    """The output function of splitmix64."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def draw(logits: Tensor, keys: Tensor, limits: Tensor) -> Tensor:
    """As `model.ops.draw`; looks at the limits from the host."""
    drawn = (limits[:, 0] > 0.0).nonzero()[:, 0]
    tokens = torch.empty_like(keys) if len(drawn) == len(keys) else logits.argmax(dim=1)
    for part in drawn.split(ROWS_AT_ONCE) if len(drawn) else ():
        tokens[part] = _drawn(_rows(logits, part), keys[part], limits[part])
    return tokens


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    """Some rows, in order; without a copy if they follow one another."""
    first, last = int(index[0]), int(index[-1])
    return tensor[first : last + 1] if last - first < len(index) else tensor[index]


def gumbel(keys: Tensor, vocab: int) -> Tensor:
    """A number for each token, from the standard Gumbel distribution: keys [R] to [R, vocab] fp32.

    Between -2.8 and 22.2. Uniforms come with more bits near 0, which the largest numbers are
    made of.
    """
    return _gumbel(_hashed(_spread(vocab, keys.device), keys[:, None]))


def _gumbel(number: Tensor) -> Tensor:
    """Of hashed numbers, which are overwritten."""
    uniform = number.add_(0.5).mul_(2.0**-_BITS).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def _hashed(spread: Tensor, keys: Tensor) -> Tensor:
    """Numbers below 2^31, as fp32, of tokens and keys [R, 1] or [N]."""
    low, high = keys.view(torch.int32).view(*keys.shape, 2).unbind(-1)
    bits = spread ^ low
    bits ^= (bits >> 16) & 0xFFFF
    bits *= FACTORS[0]
    bits ^= (bits >> 15) & 0x1FFFF
    bits += high
    bits *= FACTORS[1]
    bits ^= (bits >> 16) & 0xFFFF
    bits &= 2**_BITS - 1
    return bits.float()


@cache
def _spread(vocab: int, device: torch.device) -> Tensor:
    """Token ids, mixed: what has no structure left for a key to meet. int32 [vocab]."""
    bits = torch.arange(vocab, dtype=torch.int32, device=device)
    bits ^= (bits >> 16) & 0xFFFF
    bits *= FACTORS[0]
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= FACTORS[1]
    return bits.bitwise_xor_((bits >> 16) & 0xFFFF)


def _drawn(logits: Tensor, keys: Tensor, limits: Tensor) -> Tensor:
    """A token for each row, all of them drawn: [R]."""
    temperature, top_k, top_p, min_p = limits.unbind(1)
    heights = logits - logits.amax(dim=1, keepdim=True)
    heights /= temperature.clamp(min=MIN_TEMPERATURE).float()[:, None]
    tokens = torch.empty_like(keys)
    filtered = (top_k > 0) | (top_p < 1.0) | (min_p > 0.0)
    if len(free := (~filtered).nonzero()[:, 0]):
        tokens[free] = _race(_rows(heights, free), keys[free])
    if len(some := filtered.nonzero()[:, 0]):
        of_some = _rows(heights, some)
        kept = _most_probable(_rows(logits, some), of_some, limits[some])
        tokens[some] = _winners(of_some, keys[some], *kept)
    return tokens


def _race(heights: Tensor, keys: Tensor) -> Tensor:
    """The winners [R] among all tokens, whose logits are scaled: [R, V]."""
    if heights.numel() <= FEW_RUNNERS:
        return (heights + gumbel(keys, heights.shape[1])).argmax(dim=1)
    winners = []
    rows = max(RUNNERS_AT_ONCE // heights.shape[1], 1)
    for some, own in zip(heights.split(rows), keys.split(rows), strict=True):
        reach = Blocks(_reach(some, own))
        row, favourite = torch.arange(len(own), device=own.device), reach.peaks()
        level = _places(some, own, row, favourite) - _MARGIN
        winners.append(_winners(some, own, *reach.reaching(level)))
    return torch.cat(winners)


def _reach(heights: Tensor, keys: Tensor) -> Tensor:
    """How far each token may come: [R, V].

    A Gumbel number is no more than -log(u), u the hashed number over 2^31. The bits of a float,
    as a whole number, are a line below its logarithm.
    """
    bits = _hashed(_spread(heights.shape[1], keys.device), keys[:, None]).view(torch.int32)
    scale = math.log(2.0) * 2.0**-23
    return bits.float().mul_(-scale).add_(math.log(2.0) * (_BITS + 127)).add_(heights)


def _places(heights: Tensor, keys: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """How far tokens of rows have come: [N]."""
    spread = _spread(heights.shape[1], keys.device)[token]
    return heights[row, token] + _gumbel(_hashed(spread, keys[row]))


def _winners(heights: Tensor, keys: Tensor, row: Tensor, token: Tensor) -> Tensor:
    """The winners [R] among some tokens of each row; of a row with none, its last one."""
    (rows, vocab), place = heights.shape, _places(heights, keys, row, token)
    best = place.new_full((rows,), float("-inf")).scatter_reduce_(0, row, place, "amax")
    first = token.where(place == best[row], vocab - 1)
    return token.new_full((rows,), vocab - 1).scatter_reduce_(0, row, first, "amin")


def _most_probable(logits: Tensor, heights: Tensor, limits: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and tokens that survive top-k, top-p and min-p.

    A row whose last surviving rank is not among the `CANDIDATES` is sorted whole.
    """
    vocab = logits.shape[1]
    temperature, top_k, top_p, min_p = limits.unbind(1)
    scale = temperature.clamp(min=MIN_TEMPERATURE).float()[:, None]
    top_k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    shares = top_p < 1.0
    bounds = torch.stack((top_k, top_p.where(shares, float("inf")), min_p), dim=1)
    mass = heights.exp().sum(dim=1, dtype=torch.float64) if bool(shares.any()) else top_p
    cut, ranks = logits.new_empty(len(logits)), top_k.long()
    open_rows = torch.arange(len(logits), device=logits.device)
    blocks = looked_at = Blocks(logits)
    for width in (*CANDIDATES, vocab):
        width = min(width, vocab)
        values = looked_at.largest(width)  # [O, width], largest first
        weights = ((values - values[:, :1]) / scale[open_rows]).exp()  # the likeliest weighs 1
        last = _last_rank(weights, mass[open_rows], bounds[open_rows])
        ranks[open_rows] = last
        cut[open_rows] = values.gather(1, last[:, None] - 1)[:, 0]
        most = top_k[open_rows]
        wide = ((last == width) & (most != width)) | ((most > width) & (most < vocab))
        open_rows = open_rows[wide]
        if width == vocab or not len(open_rows):
            break
        looked_at = Blocks(_rows(logits, open_rows))
    return blocks.down_to(cut, ranks)


def _last_rank(weights: Tensor, mass: Tensor, limits: Tensor) -> Tensor:
    """How many of the ranked tokens survive, at least one: int64 [R].

    Top-k comes first; top-p is the smallest set that holds its share of what top-k left;
    min-p is relative to the likeliest token, which weighs 1.
    """
    top_k, top_p, min_p = limits.unsqueeze(2).unbind(1)  # [R, 1] each
    width = weights.shape[1]
    until = weights.cumsum(dim=1, dtype=torch.float64)
    left = until.gather(1, top_k.long().clamp(max=width) - 1)
    left = torch.where(top_k <= width, left, mass[:, None])
    rank = torch.arange(width, device=weights.device)
    kept = (rank < top_k) & (until - weights < top_p * left) & (weights >= min_p)
    return kept.sum(dim=1).clamp(min=1)
