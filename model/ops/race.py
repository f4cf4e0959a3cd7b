"""Drawing tokens in plain torch: what the filters leave runs a race.

Each token runs with its logit over the temperature plus a Gumbel number of its own, and the
furthest one wins: as often as the softmax says, for the maximum of independent Gumbel numbers
that are shifted by logits is distributed so. The number is hashed from (seed, position, token).
A device whose logits differ in the last bits, or who looks at the tokens in another order, thus
draws the same token but for near ties; inverting the cumulative distribution would let an error
in any one weight move all tokens that come after it.

Top-k, top-p and min-p each keep the most probable tokens down to some rank, so that all three
together are one rank and a threshold on the logits: no sort of whole rows. Ties go to the lower
id, everywhere.
"""

from functools import cache

import torch
from torch import Tensor

CANDIDATES = 1024  # ranks looked at first; rows that keep more are sorted whole
ROWS_AT_ONCE = 64  # filtered at once, which takes about 20 bytes per row and token
RUNNERS_AT_ONCE = 2**17  # what races at once stays in the second-level cache
MIN_TEMPERATURE = 1e-6  # below it, the same

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15
# An avalanching mixer of 32 bits: three shifts and, between them, two odd factors, as int32.
FACTORS = (0x7FEB352D, 0x846CA68B - 2**32)


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
    temperature = limits[:, 0]
    tokens = logits.argmax(dim=1)
    drawn = (temperature > 0.0).nonzero()[:, 0]
    for part in drawn.split(ROWS_AT_ONCE):
        tokens[part] = _race(*_kept(logits[part], limits[part]), keys[part])
    return tokens


def gumbel(keys: Tensor, vocab: int) -> Tensor:
    """A number for each token, from the standard Gumbel distribution: keys [R] to [R, vocab] fp32.

    Between -2.8 and 22.2. Uniforms come with more bits near 0, which the largest numbers are
    made of.
    """
    low, high = keys.view(torch.int32).view(-1, 2, 1).unbind(1)  # [R, 1] each
    bits = _spread(vocab, keys.device) ^ low  # [R, vocab]
    bits ^= (bits >> 16) & 0xFFFF
    bits *= FACTORS[0]
    bits ^= (bits >> 15) & 0x1FFFF
    bits += high
    bits *= FACTORS[1]
    bits ^= (bits >> 16) & 0xFFFF
    bits &= 0x7FFFFFFF
    uniform = bits.float().add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


@cache
def _spread(vocab: int, device: torch.device) -> Tensor:
    """Token ids, mixed: what has no structure left for a key to meet. int32 [vocab]."""
    bits = torch.arange(vocab, dtype=torch.int32, device=device)
    bits ^= (bits >> 16) & 0xFFFF
    bits *= FACTORS[0]
    bits ^= (bits >> 15) & 0x1FFFF
    bits *= FACTORS[1]
    return bits.bitwise_xor_((bits >> 16) & 0xFFFF)


def _race(heights: Tensor, kept: Tensor | None, keys: Tensor) -> Tensor:
    """The winners [R] among the kept of scaled logits [R, V], which are overwritten."""
    if kept is not None:
        heights.masked_fill_(~kept, float("-inf"))
    rows = max(RUNNERS_AT_ONCE // heights.shape[1], 1)
    for part, part_keys in zip(heights.split(rows), keys.split(rows), strict=True):
        part += gumbel(part_keys, heights.shape[1])
    return heights.argmax(dim=1)


def _kept(logits: Tensor, limits: Tensor) -> tuple[Tensor, Tensor | None]:
    """Logits below the peak in temperatures, and which survive the filters (None: all)."""
    temperature, top_k, top_p, min_p = limits.unbind(1)
    peak = logits.amax(dim=1, keepdim=True)
    heights = (logits - peak) / temperature.clamp(min=MIN_TEMPERATURE).float()[:, None]
    filtered = ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)).nonzero()[:, 0]
    if not len(filtered):
        return heights, None
    weights = heights[filtered].exp()  # [F, V], the likeliest token weighs 1
    some = _most_probable(logits[filtered], weights, limits[filtered, 1:])
    if len(filtered) == len(logits):
        return heights, some
    kept = torch.ones_like(logits, dtype=torch.bool)
    kept[filtered] = some
    return heights, kept


def _most_probable(logits: Tensor, weights: Tensor, limits: Tensor) -> Tensor:
    """Which tokens survive top-k, top-p and min-p (the limits): bool [R, V].

    A row whose last surviving rank is not among the `CANDIDATES` is sorted whole.
    """
    vocab = logits.shape[1]
    top_k, top_p, _ = limits.unbind(1)
    limits = limits.clone()
    limits[:, 0] = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab)
    limits[:, 1] = torch.where(top_p < 1.0, top_p, float("inf"))
    top_k = limits[:, 0]
    mass = weights.sum(dim=1, dtype=torch.float64)
    width = min(CANDIDATES, vocab)
    ordered = _ranked(logits, weights, width)
    ranks = _last_rank(*ordered, mass, limits)
    cut = ordered[0].gather(1, ranks[:, None] - 1)
    wide = ((ranks == width) & (top_k != width)) | ((top_k > width) & (top_k < vocab))
    if width < vocab and bool(wide.any()):
        ordered = _ranked(logits[wide], weights[wide], vocab)
        ranks[wide] = _last_rank(*ordered, mass[wide], limits[wide])
        cut[wide] = ordered[0].gather(1, ranks[wide, None] - 1)
    return down_to(logits, cut, ranks)


def _ranked(logits: Tensor, weights: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest logits of each row, largest first, and their weights: [R, width]."""
    values, tokens = logits.topk(width, dim=1)
    return values, weights.gather(1, tokens)


def _last_rank(values: Tensor, weights: Tensor, mass: Tensor, limits: Tensor) -> Tensor:
    """How many of the ranked tokens survive, at least one: int64 [R].

    Top-k comes first; top-p is the smallest set that holds its share of what top-k left;
    min-p is relative to the likeliest token, which weighs 1.
    """
    top_k, top_p, min_p = limits.unsqueeze(2).unbind(1)  # [R, 1] each
    width = values.shape[1]
    until = weights.cumsum(dim=1, dtype=torch.float64)
    left = until.gather(1, top_k.long().clamp(max=width) - 1)
    left = torch.where(top_k <= width, left, mass[:, None])
    rank = torch.arange(width, device=values.device)
    kept = (rank < top_k) & (until - weights < top_p * left) & (weights >= min_p)
    return kept.sum(dim=1).clamp(min=1)


def down_to(logits: Tensor, cut: Tensor, ranks: Tensor) -> Tensor:
    """The `ranks` largest of each row, `cut` [R, 1] the last of them: bool [R, V].

    Of the tokens that tie with the last, those of lower id are kept.
    """
    above = logits > cut
    level = logits == cut
    room = ranks[:, None] - above.sum(dim=1, keepdim=True)
    return above | (level & (level.cumsum(dim=1, dtype=torch.int32) <= room))
