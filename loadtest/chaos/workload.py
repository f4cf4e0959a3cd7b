"""The requests of the suite: a little of everything, each with one right answer.

A case is a pure function of (seed, number). All are greedy or sampled with a seed of their own,
ask for their token ids, and all but one kind are streamed.
"""

import itertools
import random
from collections.abc import Sequence
from typing import Any

from loadtest.request import TO_THE_END, Reading
from loadtest.runner import Call
from loadtest.workload import Endpoint, Workload

LONG = "long"  # streams that last long enough to be hit
KINDS = (
    "completion",
    "chat",
    LONG,
    "fim",
    "json",
    "two choices",
    "logprobs",
    "leaving",
    "slow reader",
    "stop",
    "whole",
)
UNHURRIED = frozenset({"leaving", "slow reader"})  # silences of their own making
LONG_TOKENS = 96
_SHORT_TOKENS = (4, 16)
_PROMPT_CHARACTERS = (40, 320)
_SUFFIX_CHARACTERS = 80
_SLOW_S = 0.15
_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "maxItems": 3},
    },
    "required": ["name", "count"],
    "additionalProperties": False,
}


def cases(seed: int, model: str, count: int) -> list[Call]:
    """So many cases, kinds in turn."""
    return [_case(seed, model, number, KINDS[number % len(KINDS)]) for number in range(count)]


def undisturbed(call: Call) -> Call:
    """The same request, read to its end."""
    return Call(call.kind, call.path, call.body)


def in_turn(calls: Sequence[Call], seed: int, long_ones: int) -> list[int]:
    """An order of its own for a round, as indices: some long ones first, then all, shuffled."""
    order = list(range(len(calls)))
    random.Random(seed).shuffle(order)
    lasting = [index for index in order if calls[index].kind == LONG]
    return [*itertools.islice(itertools.cycle(lasting), long_ones), *order]


def _case(seed: int, model: str, number: int, kind: str) -> Call:
    rng = random.Random(f"{seed}:{number}")
    chat = kind in ("chat", "json") or (kind == "logprobs" and rng.random() < 0.5)
    body = _asked(seed, number, kind, "chat" if chat else "completions", rng)
    body |= {
        "model": model,
        "return_token_ids": True,
        "max_tokens": LONG_TOKENS if kind == LONG else rng.randint(*_SHORT_TOKENS),
    }
    if kind != "whole":
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if rng.random() < 0.5:
        body |= {"temperature": 0}
    else:
        body |= {"temperature": round(rng.uniform(0.5, 1.1), 2), "seed": rng.randrange(10**6)}
        if rng.random() < 0.5:
            body |= {"top_p": 0.9, "frequency_penalty": 0.3}
    reading = TO_THE_END
    if kind == "leaving":
        reading = Reading(leave_after=rng.randint(1, _SHORT_TOKENS[0]))
    elif kind == "slow reader":
        reading = Reading(pause_s=_SLOW_S)
    return Call(kind, "chat/completions" if chat else "completions", body, reading)


def _asked(
    seed: int, number: int, kind: str, endpoint: Endpoint, rng: random.Random
) -> dict[str, Any]:
    """What is asked for, by kind."""
    text = Workload(seed, endpoint).prompt(number).text[: rng.randint(*_PROMPT_CHARACTERS)]
    body: dict[str, Any] = {"prompt": text}
    if endpoint == "chat":
        body = {"messages": [{"role": "user", "content": text}]}
    if kind == "json":
        schema = {"name": "answer", "schema": _SCHEMA, "strict": True}
        return body | {"response_format": {"type": "json_schema", "json_schema": schema}}
    if kind == "fim":
        return body | {"suffix": text[-_SUFFIX_CHARACTERS:], "ignore_eos": True}
    if kind == "two choices":
        return body | {"n": 2, "ignore_eos": True}
    if kind == "logprobs":
        asked = {"logprobs": True, "top_logprobs": 2} if endpoint == "chat" else {"logprobs": 2}
        return body | asked | {"ignore_eos": True}
    if kind == "stop":
        return body | {"stop": ["\n\n", "return"]}
    return body | {"ignore_eos": True}
