"""From logits to tokens: one vectorized pass over rows that each follow their own parameters.

A token is a pure function of its row's logits, parameters, counts, and of (seed, position): the
draw itself (`ops.draw`) is keyed by these two, so neither the rest of the batch nor a preemption
or a move to another replica changes what is drawn. Ties go to the lower id, everywhere.

What the host knows goes to the device without waiting for it, and nothing is read back before
all tokens are chosen.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from model import ops
from model.ops.blocks import Blocks
from model.ops.race import draw_key
from model.sampling_params import SamplingParams

ROWS_AT_ONCE = 64  # scored at once, which takes about 8 bytes per row and token

Likely = tuple[int, float]  # a token and its log-probability


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
    tokens, finite = choose(logits, rows).cpu().unbind(1)
    chosen = [
        SampledToken(token, error=_fault(row, bool(ok), logits[i]))
        for i, (row, token, ok) in enumerate(
            zip(rows, tokens.tolist(), finite.tolist(), strict=True)
        )
    ]
    _add_logprobs(logits, rows, chosen)
    return chosen


def choose(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """The device's part of `sample`: int64 [rows, 2], tokens and whether each is one (1) or not.

    Nothing in it waits for a GPU.
    """
    adjusted = _adjusted(logits, rows)
    finite = adjusted.amax(dim=1).isfinite()  # NaN wins a maximum
    keys = [draw_key(row.params.seed, row.position) for row in rows]
    limits = [_limits(row.params) for row in rows]
    tokens = ops.draw(
        adjusted,
        _on(logits.device, torch.tensor(keys)),
        _on(logits.device, torch.tensor(limits, dtype=torch.float64)),
    )
    return torch.stack((tokens, finite.long()), dim=1)


def _limits(params: SamplingParams) -> tuple[float, float, float, float]:
    """What `ops.draw` asks of a row: temperature, top-k, top-p and min-p."""
    certain = params.greedy or params.top_k == 1
    temperature = 0.0 if certain else params.temperature
    return temperature, float(params.top_k), params.top_p, params.min_p


def _on(device: torch.device, tensor: Tensor) -> Tensor:
    """The host's tensor on the device, for whose work the host does not wait."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


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
        index, token, value = (_on(logits.device, torch.tensor(x)) for x in zip(*bias, strict=True))
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
        known = torch.tensor([t for t in forbidden if 0 <= t < vocab], dtype=torch.int64)
        logits.index_fill_(0, _on(logits.device, known), float("-inf"))
    if row.allowed is not None:
        may = torch.frombuffer(bytearray(row.allowed), dtype=torch.uint8)[:vocab]
        logits.masked_fill_(_on(logits.device, may) == 0, float("-inf"))
    if params.allowed_token_ids:
        may = torch.zeros(vocab, dtype=torch.bool)
        may[[token for token in params.allowed_token_ids if token < vocab]] = True
        logits.masked_fill_(~_on(logits.device, may), float("-inf"))


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
    on_device = _on(logits.device, torch.from_numpy(columns))
    repetition, frequency, presence, count = on_device.unbind(1)
    index = _on(logits.device, torch.from_numpy(np.repeat(np.array(penalized), lengths)))
    token = _on(logits.device, torch.from_numpy(np.concatenate(seen)))
    value = logits[index, token]
    value = torch.where(value < 0, value * repetition, value / repetition)
    logits[index, token] = value - frequency * count - presence * (count > 0)


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
    blocks = Blocks(logprobs)
    largest = blocks.largest(max(1, min(max(wanted), vocab)))
    row, token = blocks.down_to(largest.gather(1, ranks.clamp(min=1)[:, None] - 1)[:, 0], ranks)
    tops: list[list[Likely]] = [[] for _ in tokens]
    likely = zip(row.tolist(), token.tolist(), logprobs[row, token].tolist(), strict=True)
    for place, candidate, logprob in likely:
        tops[place].append((candidate, logprob))
    for top in tops:
        top.sort(key=lambda pair: (-pair[1], pair[0]))
    return list(zip(own, tops, strict=True))
