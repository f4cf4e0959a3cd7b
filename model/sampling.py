"""From logits to tokens: one vectorized pass over rows that each follow their own parameters.

A token is a pure function of its row's logits, parameters, counts, and of (seed, position).
Each draw uses a single uniform number, hashed from (seed, position), against the cumulative
distribution in the order of token ids; so neither the rest of the batch nor a preemption or a
move to another replica changes what is drawn. Ties go to the lower id, everywhere.

Top-k, top-p and min-p each keep the most probable tokens down to some rank, so that all three
together are one rank and a threshold on the logits: no sort of whole rows.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from model.sampling_params import SamplingParams

CANDIDATES = 1024  # ranks looked at first; rows that keep more are sorted whole
BLOCK = 256  # tokens that the draw looks at once
ROWS_AT_ONCE = 64  # bounds the workspace: about 20 bytes per row and token of the vocabulary
MIN_TEMPERATURE = 1e-6  # below it, the same

Likely = tuple[int, float]  # a token and its log-probability

_MASK = 2**64 - 1
_GOLDEN = 0x9E3779B97F4A7C15


class TokenCounts:
    """The tokens that a sequence has seen, as its penalties need them.

    Keep one for each sequence whose parameters are `penalized`, and `append` what it is given:
    a step then costs a copy of the distinct tokens, whatever the length of the sequence.
    """

    __slots__ = ("_generated", "_place", "_tokens")

    def __init__(self, prompt: Iterable[int], output: Iterable[int] = ()) -> None:
        self._tokens = array("q", dict.fromkeys(prompt))
        self._generated = array("f", bytes(4 * len(self._tokens)))
        self._place = {token: place for place, token in enumerate(self._tokens)}
        for token in output:
            self.append(token)

    def append(self, token: int) -> None:
        """Counts one more generated token."""
        place = self._place.get(token)
        if place is None:
            self._place[token] = len(self._tokens)
            self._tokens.append(token)
            self._generated.append(1.0)
        else:
            self._generated[place] += 1.0

    @property
    def tokens(self) -> np.ndarray:
        """The distinct tokens of prompt and output: int64 [distinct], a copy."""
        return np.array(self._tokens)

    @property
    def generated(self) -> np.ndarray:
        """How often each of `tokens` was generated, 0 if only prompted: float32 [distinct]."""
        return np.array(self._generated)


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What one row of logits is to become."""

    params: SamplingParams
    position: int  # of the token being chosen, in its sequence
    counts: TokenCounts | None = None  # must be given if the parameters are `penalized`
    output: Sequence[int] = ()  # generated so far; asked for by `min_tokens` and `bad_words`
    allowed: bytes | None = None  # a byte for each token: 0 where the grammar forbids it


@dataclass(slots=True)
class SampledToken:
    """The token of one row, or why there is none."""

    token: int
    logprob: float | None = None
    top: list[Likely] = field(default_factory=list)  # likeliest first
    error: str | None = None  # set: `token` means nothing


def sample(logits: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
    """Chooses one token for each row.

    Log-probabilities are those of the model: of the logits as given, before penalties, bias,
    what is forbidden, and temperature. A logit of -inf forbids its token. A row whose logits are
    NaN, +inf or all -inf, whose parameters name no token of the vocabulary, or that is left
    without any token, gets an error and disturbs no other.

    Args:
        logits: float [rows, vocabulary], on any device; not changed.

    Raises:
        ValueError: a row asks for penalties and has no counts.
    """
    if not rows:
        return []
    logits = logits.float()
    adjusted = _adjusted(logits, rows)
    tokens = adjusted.argmax(dim=1)
    drawn = [i for i, row in enumerate(rows) if not row.params.greedy and row.params.top_k != 1]
    for first in range(0, len(drawn), ROWS_AT_ONCE):
        part = drawn[first : first + ROWS_AT_ONCE]
        where = torch.tensor(part, device=logits.device)
        tokens[where] = _draw(adjusted[where], [rows[i] for i in part])
    finite = adjusted.amax(dim=1).isfinite().tolist()  # NaN wins a maximum
    chosen = [
        SampledToken(token, error=_fault(row, ok, logits[i]))
        for i, (row, token, ok) in enumerate(zip(rows, tokens.tolist(), finite, strict=True))
    ]
    _add_logprobs(logits, rows, chosen)
    return chosen


def score(logits: Tensor, tokens: Sequence[int], top: int) -> list[tuple[float, list[Likely]]]:
    """Log-probability of a given token in each row, and the `top` likeliest tokens there.

    Args:
        logits: float [rows, vocabulary], on any device.
        tokens: one a row.
    """
    scored: list[tuple[float, list[Likely]]] = []
    for first in range(0, len(tokens), ROWS_AT_ONCE):
        part = tokens[first : first + ROWS_AT_ONCE]
        scored += _logprobs(logits[first : first + len(part)].float(), part, [top] * len(part))
    return scored


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1), a pure function of its arguments: 53 bits of splitmix64.

    The seed is hashed once to spread neighbouring seeds over the state space; the position is
    the number of steps that the generator then takes from there.
    """
    state = _mix(seed & _MASK) + (position + 1) * _GOLDEN
    return (_mix(state & _MASK) >> 11) * 2.0**-53


def _mix(state: int) -> int:
    """The output function of splitmix64."""
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
    return state ^ (state >> 31)


def _fault(row: SamplingRow, finite: bool, logits: Tensor) -> str | None:
    vocab, params = len(logits), row.params
    named = (*(token for token, _ in params.logit_bias), *params.allowed_token_ids)
    unknown = [token for token in named if not 0 <= token < vocab]
    if unknown:
        return f"the request names token {unknown[0]}; the vocabulary has {vocab}"
    if finite:
        return None
    if logits.amax().isfinite():
        return "the request's restrictions leave no token that may come next"
    return "the model's logits are not finite numbers"


def _adjusted(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Logits after penalties, bias and restrictions; the same tensor if no row has any."""
    penalized = [i for i, row in enumerate(rows) if row.params.penalized]
    bias = [
        (i, token, float(value))
        for i, row in enumerate(rows)
        for token, value in row.params.logit_bias
        if 0 <= token < logits.shape[1]
    ]
    restricted = [i for i, row in enumerate(rows) if row.allowed or row.params.restricted]
    if not penalized and not bias and not restricted:
        return logits
    adjusted = logits.clone()
    if penalized:
        _penalize(adjusted, rows, penalized)
    if bias:
        index, token, value = (
            torch.tensor(x, device=logits.device) for x in zip(*bias, strict=True)
        )
        adjusted.index_put_((index, token), value, accumulate=True)
    for i in restricted:
        _restrict(adjusted[i], rows[i])
    return adjusted


def _restrict(logits: Tensor, row: SamplingRow) -> None:
    """In place: -inf for every token of [V] that may not come next."""
    params, vocab = row.params, len(logits)
    forbidden: set[int] = set()
    if len(row.output) < params.min_tokens:
        forbidden.update(params.end_token_ids)
    for *before, last in params.bad_words:
        if list(row.output[max(0, len(row.output) - len(before)) :]) == before:
            forbidden.add(last)
    if forbidden:
        logits[[token for token in forbidden if token < vocab]] = float("-inf")
    if row.allowed is not None:
        may = torch.frombuffer(bytearray(row.allowed), dtype=torch.uint8)[:vocab]
        logits.masked_fill_(may.to(logits.device) == 0, float("-inf"))
    if params.allowed_token_ids:
        may = torch.zeros(vocab, dtype=torch.bool)
        may[[token for token in params.allowed_token_ids if token < vocab]] = True
        logits.masked_fill_(~may.to(logits.device), float("-inf"))


def _penalize(logits: Tensor, rows: Sequence[SamplingRow], penalized: list[int]) -> None:
    """In place: repetition over all seen tokens, frequency and presence over generated ones."""
    seen, generated, settings = [], [], []
    for i in penalized:
        counts, params = rows[i].counts, rows[i].params
        if counts is None:
            raise ValueError("a row with penalties needs its token counts")
        seen.append(counts.tokens)
        generated.append(counts.generated)
        settings.append(
            (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        )
    lengths = [len(tokens) for tokens in seen]
    per_token = np.repeat(np.array(settings, dtype=np.float32), lengths, axis=0)
    columns = np.column_stack([per_token, np.concatenate(generated)])
    repetition, frequency, presence, count = torch.from_numpy(columns).to(logits.device).unbind(1)
    index = torch.from_numpy(np.repeat(np.array(penalized), lengths)).to(logits.device)
    token = torch.from_numpy(np.concatenate(seen)).to(logits.device)
    value = logits[index, token]
    value = torch.where(value < 0, value * repetition, value / repetition)
    logits[index, token] = value - frequency * count - presence * (count > 0)


def _draw(logits: Tensor, rows: list[SamplingRow]) -> Tensor:
    """One token a row from the filtered distribution: float32 [R, V] -> int64 [R]."""
    peak = logits.amax(dim=1, keepdim=True)
    temperature = _column([max(row.params.temperature, MIN_TEMPERATURE) for row in rows], logits)
    weights = ((logits - peak) / temperature.float()).exp()  # [R, V], the likeliest token weighs 1
    filtered = [
        i
        for i, row in enumerate(rows)
        if row.params.top_k > 0 or row.params.top_p < 1.0 or row.params.min_p > 0.0
    ]
    if filtered:
        where = torch.tensor(filtered, device=logits.device)
        some = [rows[i].params for i in filtered]
        kept = _most_probable(logits[where], weights[where], some)
        weights[where] = weights[where].where(kept, 0.0)
    return _invert(weights, _column([uniform(r.params.seed, r.position) for r in rows], weights))


def _most_probable(logits: Tensor, weights: Tensor, params: list[SamplingParams]) -> Tensor:
    """Which tokens survive top-k, top-p and min-p: bool [R, V].

    A row whose last surviving rank is not among the `CANDIDATES` is sorted whole.
    """
    vocab = logits.shape[1]
    limits = torch.tensor(
        [
            (
                min(p.top_k or vocab, vocab),
                p.top_p if p.top_p < 1.0 else float("inf"),
                p.min_p,
            )
            for p in params
        ],
        dtype=torch.float64,
        device=logits.device,
    )
    mass = weights.sum(dim=1, dtype=torch.float64)
    width = min(CANDIDATES, vocab)
    ordered = _ranked(logits, weights, width)
    ranks = _last_rank(*ordered, mass, limits)
    cut = ordered[0].gather(1, ranks[:, None] - 1)
    top_k = limits[:, 0]
    wide = ((ranks == width) & (top_k != width)) | ((top_k > width) & (top_k < vocab))
    if width < vocab and bool(wide.any()):
        ordered = _ranked(logits[wide], weights[wide], vocab)
        ranks[wide] = _last_rank(*ordered, mass[wide], limits[wide])
        cut[wide] = ordered[0].gather(1, ranks[wide, None] - 1)
    return _down_to(logits, cut, ranks)


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


def _down_to(logits: Tensor, cut: Tensor, ranks: Tensor) -> Tensor:
    """The `ranks` largest of each row, `cut` [R, 1] the last of them: bool [R, V].

    Of the tokens that tie with the last, those of lower id are kept.
    """
    above = logits > cut
    level = logits == cut
    room = ranks[:, None] - above.sum(dim=1, keepdim=True)
    return above | (level & (level.cumsum(dim=1, dtype=torch.int32) <= room))


def _invert(weights: Tensor, share: Tensor) -> Tensor:
    """Where the cumulative weight of each row passes `share` [R, 1] of the whole: int64 [R].

    First the block of tokens, then the token inside it, summed in float64: a token without
    weight is never chosen.
    """
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK)).reshape(len(weights), -1, BLOCK)
    until = blocks.sum(dim=2, dtype=torch.float64).cumsum(dim=1)  # [R, blocks]
    target = share * until[:, -1:]
    block = torch.searchsorted(until, target, right=True).clamp(max=blocks.shape[1] - 1)
    inside = blocks[torch.arange(len(blocks), device=weights.device), block[:, 0]]
    inside = inside.cumsum(dim=1, dtype=torch.float64)  # [R, BLOCK]
    target = target - F.pad(until, (1, 0)).gather(1, block)
    # The two sums round differently; stay below the second one's end.
    target = target.minimum(inside[:, -1:].nextafter(torch.zeros_like(target)))
    token = block * BLOCK + torch.searchsorted(inside, target, right=True)
    return token[:, 0].clamp(max=weights.shape[1] - 1)


def _column(values: list[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, device=like.device)[:, None]


def _add_logprobs(logits: Tensor, rows: Sequence[SamplingRow], chosen: list[SampledToken]) -> None:
    """Fills in what the rows asked for, of those without an error."""
    asking = [
        (i, row.params.logprobs)
        for i, row in enumerate(rows)
        if row.params.logprobs is not None and chosen[i].error is None
    ]
    if not asking:
        return
    index, wanted = zip(*asking, strict=True)
    some = logits[torch.tensor(index, device=logits.device)]
    found = _logprobs(some, [chosen[i].token for i in index], wanted)
    for i, (logprob, top) in zip(index, found, strict=True):
        chosen[i].logprob, chosen[i].top = logprob, top


def _logprobs(
    logits: Tensor, tokens: Sequence[int], wanted: Sequence[int]
) -> list[tuple[float, list[Likely]]]:
    """Of each row: the log-probability of its token, and its `wanted` likeliest tokens."""
    device, vocab = logits.device, logits.shape[1]
    logprobs = logits.log_softmax(dim=1)  # [A, V]
    own = logprobs.gather(1, torch.tensor(tokens, device=device)[:, None])[:, 0].tolist()
    ranks = torch.tensor(wanted, device=device).clamp(max=vocab)
    cut = logprobs.topk(max(1, int(ranks.max()))).values.gather(1, ranks.clamp(min=1)[:, None] - 1)
    found = _down_to(logprobs, cut, ranks).nonzero()
    tops: list[list[Likely]] = [[] for _ in tokens]
    for (row, token), logprob in zip(found.tolist(), logprobs[*found.T].tolist(), strict=True):
        tops[row].append((token, logprob))
    for top in tops:
        top.sort(key=lambda pair: (-pair[1], pair[0]))
    return list(zip(own, tops, strict=True))
