"""Engines that are lost, silent or leaving in the middle: what the client sees is the same text."""

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from starlette.types import Message

from serving.api.sse import WAITING
from serving.engine.request import Request
from serving.fleet import BEAT_S, Condition, GenerateCall
from serving.ingress.resume import rest_of
from serving.ingress.streams import EventStream
from tests.ingress.stack import END, ScriptedEngine, Stack, stack
from tests.ingress.test_routes import CHAT, COMPLETION, SCRIPT, TEXT, TOKENIZER, events
from tests.waiting import until

PAIR = ("a", "b")
STOP = "return x"
SCRIPT_TO_STOP = next(n for n in range(len(SCRIPT)) if STOP in TOKENIZER.decode(SCRIPT[:n]))


def resumed(it: Stack, reason: str) -> float | None:
    return it.registry.get_sample_value("expertline_resumed_total", {"reason": reason})


def post(it: Stack, body: dict[str, Any], path: str = "/v1/completions") -> Any:
    return asyncio.create_task(it.http.post(path, json=body))


async def cut(
    it: Stack, body: dict[str, Any], after: int, path: str = "/v1/completions", calls: int = 1
) -> tuple[asyncio.Task[httpx.Response], ScriptedEngine]:
    """A request whose engine has said so many tokens and says no more; all later ones go on."""
    heard = _heard(it)
    hung = sum(engine.hung for engine in it.engines.values())
    before = {engine.name: len(engine.calls) for engine in it.engines.values()}
    for engine in it.engines.values():
        engine.hang_after = after
    asking = post(it, body, path)
    await until(lambda: sum(e.hung for e in it.engines.values()) == hung + calls)
    await until(lambda: _heard(it) == heard + calls * after)
    for engine in it.engines.values():
        engine.hang_after = None
    asked = [e for e in it.engines.values() if len(e.calls) > before[e.name]]
    return asking, max(asked, key=lambda engine: len(engine.calls))


def _heard(it: Stack) -> float:
    """Tokens that clients have got."""
    counted = it.registry.get_sample_value("expertline_tokens_total", {"kind": "generated"})
    return counted or 0.0


def survivor(it: Stack, lost: ScriptedEngine) -> ScriptedEngine:
    (other,) = [engine for engine in it.engines.values() if engine is not lost]
    return other


async def beat(it: Stack) -> None:
    """Time passes for the ingress; whoever is awake says something."""
    it.fleet.tick()
    for engine in it.engines.values():
        engine.tell()


@pytest.mark.parametrize("after", [0, 1, 4, len(SCRIPT)])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_is_replaced_without_a_gap_or_a_double(
    after: int, stream: bool
) -> None:
    async with stack(SCRIPT, engines=PAIR) as it:
        body = COMPLETION | {"stream": stream, "stream_options": {"include_usage": True}}
        asking, lost = await cut(it, body if stream else COMPLETION, after)
        await lost.die()
        response = await asyncio.wait_for(asking, 30)
        await it.quiet()
        other = survivor(it, lost)
    assert response.status_code == 200
    (first,), (second,) = lost.calls, other.calls
    assert second.request().prompt == first.request().prompt + SCRIPT[:after]
    assert (second.generated, second.max_tokens) == (after, first.max_tokens - after)
    assert second.sampling.seed == first.sampling.seed
    assert second.request_id != first.request_id
    if stream:
        *pieces, usage, done = events(response)
        assert done == "[DONE]"
        assert "".join(piece["choices"][0]["text"] for piece in pieces) == TEXT
        finishes = [piece["choices"][0]["finish_reason"] for piece in pieces]
        assert [finish for finish in finishes if finish] == ["stop"]
    else:
        usage = response.json()
        assert usage["choices"][0]["text"] == TEXT
    assert usage["usage"]["prompt_tokens"] == 2
    assert usage["usage"]["completion_tokens"] == len(SCRIPT) + 1


@pytest.mark.parametrize("limit", [3, 7])
async def test_the_limit_counts_over_all_engines(limit: int) -> None:
    async with stack(SCRIPT, engines=PAIR) as it:
        asking, lost = await cut(it, COMPLETION | {"max_tokens": limit}, 2)
        await lost.die()
        answer = (await asyncio.wait_for(asking, 30)).json()
        await it.quiet()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == limit


async def test_a_request_that_is_sent_away_goes_on_elsewhere_and_nothing_old_is_heard() -> None:
    async with stack(SCRIPT, engines=PAIR) as it:
        asking, first = await cut(it, COMPLETION, 4)
        first.turn(Condition.DRAINING)
        (call,) = first.calls
        first.move(call)
        first.script = [7] * 20
        await first._speak(call)  # what it still says is for nobody
        answer = (await asyncio.wait_for(asking, 30)).json()
        await it.quiet()
        assert len(survivor(it, first).calls) == 1
        assert resumed(it, "moved") == 1
    assert answer["choices"][0]["text"] == TEXT


async def test_who_is_sent_away_by_the_only_engine_waits_for_it() -> None:
    async with stack(SCRIPT) as it:
        asking, engine = await cut(it, COMPLETION, 4)
        engine.turn(Condition.REPAIRING)
        engine.move(engine.calls[0])
        await until(lambda: it.router.status()["queued"] == 1)
        assert (await it.http.get("/readyz")).status_code == 503
        assert (await it.http.get("/livez")).status_code == 200
        engine.turn(Condition.SERVING)
        answer = (await asyncio.wait_for(asking, 30)).json()
        assert (await it.http.get("/readyz")).status_code == 200
        await it.quiet()
    assert answer["choices"][0]["text"] == TEXT


async def test_a_new_request_waits_while_the_only_engine_is_being_replaced() -> None:
    async with stack(SCRIPT) as it:
        await it.engine.die()
        await until(lambda: not it.fleet._streams)
        asking = post(it, COMPLETION)
        await until(lambda: it.router.status()["queued"] == 1)
        successor = ScriptedEngine(SCRIPT, "engine")
        it.engines["engine"] = successor
        await successor.join(it.router, 4096)
        assert (await asyncio.wait_for(asking, 30)).json()["choices"][0]["text"] == TEXT
        await it.quiet()


async def test_a_silent_engine_loses_its_requests_to_another_one() -> None:
    async with stack(SCRIPT, engines=PAIR) as it:
        it.fleet._watching.cancel()  # the test is its clock
        asking, silent = await cut(it, COMPLETION, 4)
        silent.awake.clear()
        heard = it.fleet._streams[survivor(it, silent).name]
        for _ in range(int(it.fleet._silence_s / BEAT_S)):
            await beat(it)
            await until(lambda: heard.missed == 0)
            assert it.fleet.serving == 2
        while it.fleet.serving == 2:  # a last word may still have been under way
            await beat(it)
            await until(lambda: heard.missed == 0)
        answer = (await asyncio.wait_for(asking, 30)).json()
        assert answer["choices"][0]["text"] == TEXT
        assert resumed(it, "silent") == 1
        assert it.fleet._streams[silent.name].connected  # it may yet wake up
        await until(lambda: silent.cancelled == [silent.calls[0].request_id])
        silent.awake.set()
        silent.tell()
        await until(lambda: it.fleet.serving == 2)


async def test_a_long_repair_is_waited_for_only_if_no_other_engine_serves() -> None:
    async with stack(SCRIPT, engines=PAIR) as it:
        it.fleet._watching.cancel()  # the test is its clock
        asking, repaired = await cut(it, COMPLETION, 4)
        other = survivor(it, repaired)
        repaired.turn(Condition.REPAIRING)
        other.turn(Condition.DRAINING)
        await until(lambda: it.fleet.serving == 0)
        for _ in range(20):
            await beat(it)
            await until(lambda: all(s.missed == 0 for s in it.fleet._streams.values()))
        assert not other.calls
        other.turn(Condition.SERVING)
        await until(lambda: it.fleet.serving == 1)
        await beat(it)
        assert (await asyncio.wait_for(asking, 30)).json()["choices"][0]["text"] == TEXT
        assert resumed(it, "repair") == 1
        await until(lambda: repaired.cancelled == [repaired.calls[0].request_id])


async def test_the_only_engine_is_waited_for_however_silent() -> None:
    async with stack(SCRIPT) as it:
        it.fleet._watching.cancel()  # the test is its clock
        asking, engine = await cut(it, COMPLETION, 4)
        engine.awake.clear()
        while it.fleet.ready:
            await beat(it)
        assert (await it.http.get("/readyz")).status_code == 503
        assert (await it.http.get("/livez")).status_code == 200
        assert resumed(it, "silent") == 0
        assert not asking.done()
        connected = engine.streams["ingress"]
        while engine.streams["ingress"] is connected:  # until it is given up, and made anew
            await beat(it)
            await asyncio.sleep(0)
        engine.awake.set()
        engine.tell()
        answer = (await asyncio.wait_for(asking, 30)).json()
    assert answer["choices"][0]["text"] == TEXT


async def test_choices_go_on_each_by_itself() -> None:
    async with stack(SCRIPT, engines=PAIR) as it:
        body = COMPLETION | {"n": 3, "stream": True, "seed": 5}
        asking, lost = await cut(it, body, 3, calls=3)
        other, began = survivor(it, lost), len(lost.calls)
        for call in other.calls[:]:  # these hang as well: the engine sends them to itself
            other.move(call)
        await lost.die()
        got = events(await asyncio.wait_for(asking, 30))
        await it.quiet()
        assert resumed(it, "lost") + resumed(it, "failed") == began
        assert resumed(it, "moved") == 3 - began
    for index in range(3):
        own = [e["choices"][0] for e in got[:-1] if e["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in own) == TEXT
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == ["stop"]
    again = [call for call in other.calls if call.generated]
    assert sorted(call.sampling.seed for call in again) == [5, 6, 7]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_and_offsets_come_once_for_every_token(stream: bool) -> None:
    async with stack(SCRIPT, engines=PAIR) as it:
        body = COMPLETION | {"logprobs": 1, "stream": stream}
        whole = await it.http.post("/v1/completions", json=body)
    async with stack(SCRIPT, engines=PAIR) as it:
        asking, lost = await cut(it, body, 3)
        await lost.die()
        broken = await asyncio.wait_for(asking, 30)
    assert logprobs_of(broken, stream) == logprobs_of(whole, stream)
    assert len(logprobs_of(whole, stream)["tokens"]) == len(SCRIPT) + 1


def logprobs_of(response: httpx.Response, stream: bool) -> dict[str, Any]:
    if not stream:
        found: dict[str, Any] = response.json()["choices"][0]["logprobs"]
        return found
    merged: dict[str, list[Any]] = {}
    for event in events(response)[:-1]:
        for key, values in event["choices"][0]["logprobs"].items():
            merged.setdefault(key, []).extend(values)
    return merged


async def test_a_prompts_scores_are_not_asked_for_again_once_they_came() -> None:
    async with stack(SCRIPT, engines=PAIR) as it:
        body = COMPLETION | {"echo": True, "logprobs": 0, "prompt": [9, 8, 7, 6]}
        whole = (await it.http.post("/v1/completions", json=body)).json()
        asking, lost = await cut(it, body, 2)
        await lost.die()
        answer = (await asyncio.wait_for(asking, 30)).json()
        await it.quiet()
        again = survivor(it, lost).calls[-1]
    assert again.generated == 2
    assert again.sampling.prompt_logprobs is None
    assert answer["choices"] == whole["choices"]


async def test_a_prompt_whose_scores_were_lost_is_scored_again() -> None:
    async with stack(SCRIPT, engines=PAIR) as it:
        body = COMPLETION | {"echo": True, "logprobs": 0, "prompt": [9, 8, 7, 6], "max_tokens": 2}
        whole = (await it.http.post("/v1/completions", json=body)).json()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ScriptedEngine, "_score", lambda self, call: None)
            asking, lost = await cut(it, body, 0)
        await lost.die()
        answer = (await asyncio.wait_for(asking, 30)).json()
        await it.quiet()
        again = survivor(it, lost).calls[-1]
    assert again.sampling.prompt_logprobs == 0
    assert answer["choices"] == whole["choices"]


@pytest.mark.parametrize("after", range(1, SCRIPT_TO_STOP))
async def test_a_stop_string_may_lie_across_the_cut(after: int) -> None:
    async with stack(SCRIPT, engines=PAIR) as it:
        asking, lost = await cut(it, COMPLETION | {"stop": STOP}, after)
        await lost.die()
        choice = (await asyncio.wait_for(asking, 30)).json()["choices"][0]
        await it.quiet()
    assert choice["text"] == TEXT[: TEXT.index(STOP)]
    assert choice["finish_reason"] == "stop"


async def test_a_grammar_is_given_to_the_next_engine_with_what_was_said_under_it() -> None:
    async with stack(SCRIPT, engines=PAIR) as it:
        asking, lost = await cut(it, COMPLETION | {"structured_outputs": {"regex": "[^z]*"}}, 5)
        await lost.die()
        assert (await asyncio.wait_for(asking, 30)).status_code == 200
        again = survivor(it, lost).calls[0]
    assert again.sampling.grammar == lost.calls[0].sampling.grammar is not None
    assert again.request().prompt[-5:] == SCRIPT[:5]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_that_no_engine_survives_is_given_up(stream: bool) -> None:
    async with stack(SCRIPT, resume_attempts=2) as it:
        body = CHAT | {"stream": stream}
        asking, engine = await cut(it, body, 3, "/v1/chat/completions")
        engine.hang_after = 3
        for calls in (1, 2, 3):
            await until(lambda wanted=calls: len(engine.calls) == wanted)  # type: ignore[misc]
            engine.move(engine.calls[-1])
        response = await asyncio.wait_for(asking, 30)
        await it.quiet()
        assert it.registry.get_sample_value("expertline_given_up_total") == 1
    assert [call.generated for call in engine.calls] == [0, 3, 3]
    if stream:
        assert events(response)[-1]["error"]["type"] == "server_error"
        return
    assert response.status_code == 503
    assert response.json()["error"]["type"] == "server_error"
    assert response.headers["retry-after"] == "1"


async def test_a_request_without_an_engine_is_given_up_in_its_time() -> None:
    async with stack(SCRIPT, resume_timeout_s=0.3) as it:
        asking, engine = await cut(it, COMPLETION | {"stream": True}, 3)
        await engine.die()
        got = events(await asyncio.wait_for(asking, 30))
        assert got[-1]["error"]["message"].startswith("The engine was lost")
        await until(lambda: it.router.status()["queued"] == 0)
        assert not it.fleet._inboxes
        assert not it.fleet._held


async def test_a_comment_keeps_a_waiting_stream_alive() -> None:
    said: list[bytes] = []

    async def send(message: Message) -> None:
        said.append(message.get("body", b""))
        if said.count(WAITING) == 2:
            gone_on.set()

    async def pieces() -> AsyncGenerator[bytes]:
        yield b"data: 1\n\n"
        await gone_on.wait()
        yield b"data: 2\n\n"

    gone_on = asyncio.Event()
    await EventStream(pieces(), AsyncExitStack(), keep_alive_s=0.01).stream_response(send)
    assert said == [b"", b"data: 1\n\n", WAITING, WAITING, b"data: 2\n\n", b""]


async def test_comments_do_not_disturb_what_a_client_reads() -> None:
    async with stack(SCRIPT, keep_alive_s=0.01) as it:
        asking, engine = await cut(it, COMPLETION | {"stream": True}, 3)
        await asyncio.sleep(0.1)
        engine.move(engine.calls[0])
        response = await asyncio.wait_for(asking, 30)
    got = [block for block in response.text.split("\n\n") if not block.startswith(": ")]
    bodies = [json.loads(block.removeprefix("data: ")) for block in got[:-2]]
    assert "".join(body["choices"][0]["text"] for body in bodies) == TEXT
    assert got[-2:] == ["data: [DONE]", ""]


async def test_leases_that_a_router_did_not_live_to_grant_are_granted_without_it() -> None:
    async with stack(SCRIPT, engine_tokens=150) as it:
        first, engine = await cut(it, COMPLETION, 2)
        second = post(it, COMPLETION)
        await until(lambda: it.router.status()["queued"] == 1)
        await it.router._server.close()  # the engine and the ingress lose it
        assert (await asyncio.wait_for(second, 30)).json()["choices"][0]["text"] == TEXT
        engine.move(engine.calls[0])
        assert (await asyncio.wait_for(first, 30)).json()["choices"][0]["text"] == TEXT


async def test_a_client_that_does_not_read_loses_its_request_and_nobody_else_does() -> None:
    async with stack(SCRIPT, engine_tokens=20_000, max_unread_tokens=64) as it:
        opened = it.fleet.open("unread")
        for position in range(65):
            it.engine.say("unread", position)
        await until(lambda: len(opened.tokens) == 65)
        other = post(it, COMPLETION)
        it.fleet.tick()
        assert "unread" not in it.fleet._inboxes
        assert opened.failure is not None
        assert len(opened.take()) == 65
        assert (await other).json()["choices"][0]["text"] == TEXT


def test_the_rest_of_a_request_begins_where_it_was_cut() -> None:
    whole = Request("r", [1, 2], 10, stop_token_ids=frozenset({END}), tenant="t", cache_salt="s")
    emitted: Sequence[int] = [5, 6, 7]
    rest = rest_of(whole, emitted, 2)
    assert rest == Request(
        "r.2",
        [1, 2, 5, 6, 7],
        7,
        stop_token_ids=frozenset({END}),
        tenant="t",
        cache_salt="s",
        generated=3,
    )
    assert rest.prompt_tokens == 2
    assert GenerateCall.of("i", rest).request() == rest
    assert rest_of(whole, [], 3).prompt == whole.prompt


async def test_the_cache_is_accounted_for_as_the_first_engine_found_it() -> None:
    async with stack(SCRIPT, engines=PAIR) as it:
        for engine in it.engines.values():
            engine.cached_tokens = 1
        asking, lost = await cut(it, COMPLETION, 3)
        survivor(it, lost).cached_tokens = 2
        await lost.die()
        usage = (await asyncio.wait_for(asking, 30)).json()["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}
    assert usage["completion_tokens"] == len(SCRIPT) + 1
