"""Streams: what they carry piece by piece, and what is left when a client goes away."""

import asyncio
import json
from typing import Any

import pytest

from model.tokenizer import Detokenizer
from serving.engine.request import RequestStats
from serving.ingress.streams import EventStream
from serving.ingress.text import StopStrings
from tests.ingress.stack import END, Stack, stack
from tests.ingress.test_routes import CHAT, COMPLETION, SCRIPT, TEXT, TOKENIZER, events
from tests.waiting import until

ODD_TEXT = "naïve 🎉 — done\n"
ODD = TOKENIZER.encode_text(ODD_TEXT)


class Client:
    """An ASGI client of one streamed request; `gone` makes it leave.

    A server of ASGI 2.4 says so when it is written to, an older one only when it is asked.
    """

    def __init__(self, it: Stack, spec: str, body: dict[str, Any] | None) -> None:
        self.gone = asyncio.Event()
        self.chunks: list[bytes] = []
        self._spec = spec
        self._body = body
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/completions",
            "raw_path": b"/v1/completions",
            "root_path": "",
            "query_string": b"",
            "headers": [],
            "client": ("127.0.0.1", 1),
            "server": ("test", 80),
        }
        self.served = asyncio.create_task(it.app(scope, self._receive, self._send))

    async def _receive(self) -> dict[str, Any]:
        if self._body is not None:
            content, self._body = json.dumps(self._body).encode(), None
            return {"type": "http.request", "body": content, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if self.gone.is_set() and self._spec == "2.4":
            raise OSError("the client is gone")
        if message["type"] == "http.response.body":
            self.chunks.append(message["body"])


def disconnects(it: Stack, phase: str) -> float | None:
    return it.registry.get_sample_value("expertline_disconnects_total", {"phase": phase})


def answered(it: Stack, code: int) -> float | None:
    labels = {"endpoint": "completions", "code": str(code)}
    return it.registry.get_sample_value("expertline_requests_total", labels)


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
@pytest.mark.parametrize("choices", [1, 3])
async def test_a_client_that_leaves_a_stream_ends_the_engines_work(spec: str, choices: int) -> None:
    async with stack(SCRIPT) as it:
        if spec == "2.3":
            it.engine.hang_after = 3
        endless = COMPLETION | {"ignore_eos": True, "max_tokens": 4000, "stream": True}
        client = Client(it, spec, endless | {"n": choices})
        begun = "expertline_request_ttft_seconds_count"
        await until(lambda: it.registry.get_sample_value(begun) == choices)
        client.gone.set()
        await asyncio.wait_for(client.served, 30)
        await until(lambda: len(it.engine.cancelled) == choices)
        await it.quiet()
        assert disconnects(it, "decode") == choices
        assert answered(it, 200) == 1
        assert it.registry.get_sample_value("expertline_streams_open") == 0


@pytest.mark.parametrize("spec", ["2.3", "2.4"])
async def test_a_stream_that_is_never_read_leaves_nothing(spec: str) -> None:
    async with stack(SCRIPT) as it:
        it.engine.hang_after = 0
        client = Client(it, spec, COMPLETION | {"stream": True})
        client.gone.set()
        await asyncio.wait_for(client.served, 30)
        await it.quiet()
        assert disconnects(it, "prefill") == 1
        assert not client.chunks or spec == "2.3"


async def test_a_client_that_leaves_before_its_body_is_complete_is_nobodys_error() -> None:
    async with stack(SCRIPT) as it:
        client = Client(it, "2.3", None)
        client.gone.set()
        await asyncio.wait_for(client.served, 30)
        assert answered(it, 499) == 1
        assert it.engine.calls == []


async def test_a_client_that_leaves_the_queue_holds_no_place() -> None:
    async with stack(SCRIPT, engine_tokens=150) as it:
        it.engine.hang_after = 0
        first = asyncio.create_task(it.http.post("/v1/completions", json=COMPLETION))
        await until(lambda: len(it.engine.calls) == 1)
        second = asyncio.create_task(it.http.post("/v1/completions", json=COMPLETION))
        await until(lambda: it.router.status()["queued"] == 1)
        second.cancel()
        await until(lambda: it.router.status()["queued"] == 0)
        first.cancel()
        await it.quiet()
        assert len(it.engine.calls) == 1
        assert answered(it, 499) == 2


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_that_fit_only_one_after_another_all_come(stream: bool) -> None:
    async with stack(SCRIPT, engine_tokens=150) as it:
        body = COMPLETION | {"n": 4, "stream": stream}
        response = await it.http.post("/v1/completions", json=body)
        await it.quiet()
    assert response.status_code == 200
    assert response.text.count('"finish_reason":"stop"') == 4


async def test_a_stream_that_gets_no_lease_is_an_ordinary_error() -> None:
    async with stack(SCRIPT, engine_tokens=150) as it:
        it.engine.hang_after = 0
        holder = asyncio.create_task(it.http.post("/v1/completions", json=COMPLETION))
        await until(lambda: len(it.engine.calls) == 1)
        it.service._settings = it.service._settings.model_copy(
            update={"router": it.service._settings.router.model_copy(
                update={"queue_timeout_s": 0.05})}
        )  # fmt: skip
        response = await it.http.post("/v1/completions", json=COMPLETION | {"stream": True})
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["type"] == "server_error"
        holder.cancel()
        await it.quiet()


async def test_time_of_a_stream_is_counted_to_its_end() -> None:
    async with stack(SCRIPT) as it:
        it.engine.hang_after = 3
        client = Client(it, "2.3", COMPLETION | {"stream": True})
        await until(lambda: len(client.chunks) > 0)
        assert answered(it, 200) == 0
        client.gone.set()
        await client.served
        assert answered(it, 200) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_the_failure_of_one_choice_ends_the_others(stream: bool) -> None:
    async with stack(SCRIPT) as it:
        it.engine.fail_after, it.engine.fail_only = 2, "-1"
        body = COMPLETION | {"n": 3, "stream": stream, "ignore_eos": True, "max_tokens": 1000}
        response = await it.http.post("/v1/completions", json=body)
        await it.quiet()
        if not stream:
            assert response.status_code == 500
            return
        got = events(response)
    assert ["error" in event for event in got].count(True) == 1
    assert got[-1]["error"]["message"] == "the row was not a number"
    assert disconnects(it, "decode") == 0


@pytest.mark.parametrize("choices", [1, 2])
async def test_a_fault_of_the_server_is_an_error_that_says_nothing_of_it(choices: int) -> None:
    def fault(*_: object) -> None:
        raise RuntimeError("internals")

    async with stack(SCRIPT) as it:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(StopStrings, "push", fault)
            body = COMPLETION | {"n": choices}
            whole = await it.http.post("/v1/completions", json=body)
            streamed = await it.http.post("/v1/completions", json=body | {"stream": True})
        await it.quiet()
    assert whole.status_code == 500
    for error in (whole.json()["error"], events(streamed)[-1]["error"]):
        assert set(error) == {"message", "type", "param", "code"}
        assert "internals" not in error["message"]


@pytest.mark.parametrize("stop", [None, ["x + 2", "turn x !"]])
async def test_offsets_of_a_stream_are_those_of_the_whole(stop: list[str] | None) -> None:
    for script in (SCRIPT, ODD):
        async with stack(script) as it:
            body = COMPLETION | {"logprobs": 1, "stop": stop}
            whole = (await it.http.post("/v1/completions", json=body)).json()["choices"][0]
            got = events(await it.http.post("/v1/completions", json=body | {"stream": True}))
        pieces = [event["choices"][0] for event in got[:-1]]
        assert "".join(piece["text"] for piece in pieces) == whole["text"]
        for key, value in whole["logprobs"].items():
            assert [x for piece in pieces for x in piece["logprobs"][key]] == value
        detokenizer, text = Detokenizer(TOKENIZER), ""
        for token, offset in zip(script, whole["logprobs"]["text_offset"], strict=False):
            assert offset == len(text)
            text += detokenizer.push(token)


async def test_a_character_over_several_tokens_comes_whole() -> None:
    async with stack(ODD) as it:
        got = events(await it.http.post("/v1/completions", json=COMPLETION | {"stream": True}))
    texts = [event["choices"][0]["text"] for event in got[:-1]]
    assert "".join(texts) == ODD_TEXT
    assert "\ufffd" not in "".join(texts)
    assert len(texts) < len(ODD) + 1


async def test_a_character_that_is_cut_off_by_the_limit_is_replaced() -> None:
    cut = TOKENIZER.encode_text("🎉")[:2]
    async with stack(cut) as it:
        body = COMPLETION | {"max_tokens": 2}
        choice = (await it.http.post("/v1/completions", json=body)).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("\ufffd", "length")


@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_held_back_for_a_stop_string_comes_at_the_end(stream: bool) -> None:
    async with stack(SCRIPT) as it:
        body = COMPLETION | {"stop": ["+ 1\n!"], "stream": stream}
        response = await it.http.post("/v1/completions", json=body)
    choices = (
        [event["choices"][0] for event in events(response)[:-1]]
        if stream
        else response.json()["choices"]
    )
    assert "".join(choice["text"] for choice in choices) == TEXT
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["stop"]


async def test_a_stop_string_in_the_last_token_is_billed_as_the_engine_counts() -> None:
    async with stack(SCRIPT) as it:
        counted = RequestStats(2, cached_tokens=1, generated_tokens=len(SCRIPT))
        body = COMPLETION | {"max_tokens": len(SCRIPT), "stop": TEXT[-2:]}
        speak = it.engine._send

        def send(call: Any, frame: Any) -> None:
            for output in frame.tokens:
                output.stats = counted if output.finish else None
            speak(call, frame)

        it.engine._send = send  # type: ignore[method-assign]
        answer = (await it.http.post("/v1/completions", json=body)).json()
        await it.quiet()
        assert it.engine.cancelled == []
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["choices"][0]["text"] == TEXT[:-2]
    assert answer["usage"]["completion_tokens"] == len(SCRIPT)
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


async def test_usage_of_a_stream_counts_every_choice_and_each_prompt_once() -> None:
    body = {"model": "nano", "prompt": [[1, 2, 3], [4, 5]], "n": 2, "max_tokens": 3}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with stack(SCRIPT) as it:
        got = events(await it.http.post("/v1/completions", json=body))
    used = got[-2]["usage"]
    assert (used["prompt_tokens"], used["completion_tokens"]) == (5, 12)
    assert used["total_tokens"] == 17


async def test_chunks_of_a_chat_share_id_time_and_model_and_open_each_choice_once() -> None:
    async with stack(SCRIPT) as it:
        body = CHAT | {"n": 2, "stream": True, "logprobs": True}
        got = events(await it.http.post("/v1/chat/completions", json=body))
    assert got.pop() == "[DONE]"
    assert len({(event["id"], event["created"], event["model"]) for event in got}) == 1
    assert {event["object"] for event in got} == {"chat.completion.chunk"}
    for index in (0, 1):
        own = [e["choices"][0] for e in got if e["choices"][0]["index"] == index]
        assert [choice["delta"].get("role") for choice in own].count("assistant") == 1
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        tokens = [t["token"] for c in own if c["logprobs"] for t in c["logprobs"]["content"]]
        assert "".join(tokens[:-1]) == TEXT
        assert [choice["finish_reason"] for choice in own].count("stop") == 1


async def test_a_special_token_is_not_shown() -> None:
    special = next(i for i in TOKENIZER.special_tokens.values() if i not in (END, 0))
    async with stack([*SCRIPT[:2], special, *SCRIPT[2:]]) as it:
        answer = (await it.http.post("/v1/completions", json=COMPLETION)).json()
    assert answer["choices"][0]["text"] == TEXT


async def test_events_are_closed_when_nobody_reads_them_to_their_end() -> None:
    made: list[Any] = []
    original = EventStream.__init__

    def init(self: EventStream, events: Any, *others: Any) -> None:
        made.append(events)
        original(self, events, *others)

    async with stack(SCRIPT) as it:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(EventStream, "__init__", init)
            endless = COMPLETION | {"ignore_eos": True, "max_tokens": 4000, "stream": True}
            client = Client(it, "2.4", endless | {"n": 2})
            await until(lambda: len(client.chunks) > 0)
            client.gone.set()
            await asyncio.wait_for(client.served, 30)
    assert [events.ag_frame for events in made] == [None]
