"""A client leaves in the midst of its stream: its pages are free within one step."""

import json

import httpx

from loadtest.chaos.arena import Arena
from loadtest.chaos.baseline import total
from loadtest.chaos.scenario import Scenario
from loadtest.chaos.server import MODEL, Layout
from loadtest.chaos.waiting import until

STEPS = "disconnect, steps until pages are free"
SECONDS = "disconnect, s until pages are free"
_FREE_S = 30.0
_TOKENS = 1000
_HEARD = (3, 30)  # tokens before it leaves


class Disconnect(Scenario):
    """A lone stream each time, so that every step is its own: those that were run, less those
    whose tokens came and the one that was under way when the client left, were run for nobody."""

    name = "disconnect"
    layout = Layout(stages=2, ranks=2)

    async def play(self, arena: Arena) -> None:
        for number in range(arena.count):
            arena.outcome.faults.append("client leaves")
            before = await _steps(arena)
            heard = await _leave(arena, number)
            seconds = await until(lambda: _free(arena), _FREE_S, "pages free after a client left")
            arena.outcome.requests += 1
            arena.outcome.measured(SECONDS, seconds)
            for_nobody = await _steps(arena) - before - heard - 1
            arena.outcome.measured(STEPS, max(0.0, for_nobody))
            await arena.settle("client leaves")


async def _leave(arena: Arena, number: int) -> int:
    """A stream that its client leaves; how many tokens were heard."""
    body = {
        "model": MODEL,
        "prompt": f"# {arena.seed}:{number}\ndef ",
        "max_tokens": _TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    enough, heard = arena.rng.randint(*_HEARD), 0
    async with (
        httpx.AsyncClient(timeout=_FREE_S, trust_env=False) as client,
        client.stream("POST", f"{arena.server.url}/v1/completions", json=body) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: "):
                heard += len(json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"])
            if heard >= enough:
                break
    return heard


async def _steps(arena: Arena) -> float:
    """Steps that all engines have run."""
    metrics = await arena.server.metrics(arena.client)
    return total(metrics, "expertline_step_seconds_count")


async def _free(arena: Arena) -> bool:
    metrics = await arena.server.metrics(arena.client)
    known = "expertline_pages" in metrics
    return known and not total(metrics, "expertline_pages", state="held")
