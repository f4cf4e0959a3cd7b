"""The HTTP surface over a scripted engine: shapes, streams, errors, and what they leave behind."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from tests.ingress.stack import END, stack
from tests.model.oracle import NANO
from tests.waiting import until

TOKENIZER = Tokenizer.from_directory(NANO, ModelConfig.from_directory(NANO))
TEXT = "def f(x):\n    return x + 1\n"
SCRIPT = TOKENIZER.encode_text(TEXT)
COMPLETION = {"model": "nano", "prompt": "x", "max_tokens": 100}
CHAT = {"model": "nano", "messages": [{"role": "user", "content": "x"}], "max_tokens": 100}


def events(response: httpx.Response) -> list[Any]:
    """The bodies of a stream's events; [DONE] as it stands."""
    assert response.headers["content-type"].startswith("text/event-stream")
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    bodies = [block.removeprefix("data: ") for block in blocks]
    return [body if body == "[DONE]" else json.loads(body) for body in bodies]


async def test_a_whole_completion() -> None:
    async with stack(SCRIPT) as it:
        body = (await it.http.post("/v1/completions", json=COMPLETION)).json()
        await it.quiet()
    (choice,) = body["choices"]
    assert choice == {"index": 0, "text": TEXT, "logprobs": None, "finish_reason": "stop"}
    assert body["object"] == "text_completion"
    assert body["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": len(SCRIPT) + 1,
        "total_tokens": len(SCRIPT) + 3,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_a_chat_stream_has_one_role_one_finish_usage_and_an_end() -> None:
    body = CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    async with stack(SCRIPT) as it:
        got = events(await it.http.post("/v1/chat/completions", json=body))
        await it.quiet()
    *chunks, last, done = got
    assert done == "[DONE]"
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == len(SCRIPT) + 1
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == TEXT
    finishes = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert [reason for reason in finishes if reason] == ["stop"]
    assert finishes[-1] == "stop"
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_length_is_the_reason_when_max_tokens_ends_it() -> None:
    async with stack(SCRIPT) as it:
        body = (await it.http.post("/v1/completions", json=COMPLETION | {"max_tokens": 3})).json()
    assert body["choices"][0]["finish_reason"] == "length"
    assert body["choices"][0]["text"] == TOKENIZER.decode(SCRIPT[:3])


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_over_several_tokens_ends_the_text_and_the_engines_work(
    stream: bool,
) -> None:
    body = COMPLETION | {"stop": ["rn x +"], "stream": stream, "ignore_eos": True}
    async with stack(SCRIPT) as it:
        it.engine.hang_after = len(SCRIPT)
        response = await it.http.post("/v1/completions", json=body)
        if stream:
            choices = [event["choices"][0] for event in events(response)[:-1]]
        else:
            choices = response.json()["choices"]
        await until(lambda: it.engine.cancelled == [it.engine.calls[0].request_id])
        await it.quiet()
    assert "".join(choice["text"] for choice in choices) == TEXT[: TEXT.index("rn x +")]
    assert choices[-1]["finish_reason"] == "stop"


async def test_choices_of_several_prompts_come_in_order_and_prompts_count_once() -> None:
    body = {"model": "nano", "prompt": [[1, 2, 3], [4, 5]], "n": 2, "max_tokens": 2, "seed": 10}
    async with stack(SCRIPT) as it:
        answer = (await it.http.post("/v1/completions", json=body)).json()
        seeds = [call.sampling.seed for call in it.engine.calls]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["prompt_tokens"] == 5
    assert answer["usage"]["completion_tokens"] == 8
    assert seeds == [10, 11, 10, 11]


async def test_several_streamed_choices_each_end_once() -> None:
    async with stack(SCRIPT) as it:
        got = events(
            await it.http.post("/v1/completions", json=COMPLETION | {"n": 3, "stream": True})
        )
        await it.quiet()
    texts = ["", "", ""]
    for event in got[:-1]:
        texts[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert texts == [TEXT] * 3
    ends = [e["choices"][0]["index"] for e in got[:-1] if e["choices"][0]["finish_reason"]]
    assert sorted(ends) == [0, 1, 2]


async def test_logprobs_line_up_with_the_tokens() -> None:
    async with stack(SCRIPT) as it:
        short = {"max_tokens": 4}
        text = (
            await it.http.post("/v1/completions", json=COMPLETION | short | {"logprobs": 2})
        ).json()
        wanted = CHAT | short | {"logprobs": True, "top_logprobs": 2}
        chat = (await it.http.post("/v1/chat/completions", json=wanted)).json()
    logprobs = text["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == text["choices"][0]["text"]
    assert logprobs["text_offset"][1] == len(logprobs["tokens"][0])
    assert logprobs["token_logprobs"] == [-0.5] * 4
    content = chat["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == logprobs["tokens"]
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]


async def test_a_failure_in_mid_stream_is_an_error_event_and_a_clean_end() -> None:
    async with stack(SCRIPT) as it:
        it.engine.fail_after = 3
        got = events(await it.http.post("/v1/completions", json=COMPLETION | {"stream": True}))
        await it.quiet()
    assert [list(event) for event in got[-1:]] == [["error"]]
    assert got[-1]["error"]["message"] == "the row was not a number"
    assert "".join(e["choices"][0]["text"] for e in got[:-1]) == TOKENIZER.decode(SCRIPT[:3])


async def test_a_failure_before_the_end_of_a_whole_answer_is_a_500() -> None:
    async with stack(SCRIPT) as it:
        it.engine.fail_after = 3
        response = await it.http.post("/v1/completions", json=COMPLETION)
        await it.quiet()
    assert response.status_code == 500


async def test_a_client_that_leaves_ends_the_engines_work() -> None:
    async with stack(SCRIPT) as it:
        it.engine.hang_after = 3
        asking = asyncio.create_task(it.http.post("/v1/completions", json=COMPLETION))
        await until(lambda: len(it.engine.calls) == 1)
        asking.cancel()
        await until(lambda: it.engine.cancelled == [it.engine.calls[0].request_id])
        await it.quiet()


async def test_without_the_router_an_ingress_chooses_by_itself() -> None:
    async with stack(SCRIPT) as it:
        await it.router._server.close()
        await until(lambda: not it.fleet._link.connected)
        answers = await asyncio.gather(
            *(it.http.post("/v1/completions", json=COMPLETION) for _ in range(5))
        )
        assert [answer.json()["choices"][0]["text"] for answer in answers] == [TEXT] * 5


async def test_without_engines_nothing_is_ready() -> None:
    async with stack(SCRIPT, engine_joins=False, queue_timeout_s=0.2) as it:
        assert (await it.http.get("/livez")).status_code == 200
        assert (await it.http.get("/readyz")).status_code == 503
        response = await it.http.post("/v1/completions", json=COMPLETION)
        assert response.status_code == 503
        assert int(response.headers["retry-after"]) >= 1


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "too long": (COMPLETION | {"max_tokens": 5000}, 400, "maximum context length is 4096"),
    "other model": (COMPLETION | {"model": "x"}, 404, "'nano'"),
    "unknown": (COMPLETION | {"speed": 1}, 400, "speed"),
    "suffix": (COMPLETION | {"suffix": "x", "echo": True}, 400, "suffix"),
    "nothing": (COMPLETION | {"max_tokens": 0}, 400, "echo"),
    "best": (COMPLETION | {"n": 3, "best_of": 2}, 400, "best_of"),
    "streamed best": (COMPLETION | {"best_of": 2, "stream": True}, 400, "best_of"),
    "allowed": (COMPLETION | {"allowed_token_ids": [4096]}, 400, "vocabulary"),
    "stop id": (COMPLETION | {"stop_token_ids": [4096]}, 400, "vocabulary"),
    "salt": (COMPLETION | {"cache_salt": "two words"}, 400, "printable"),
    "n": (COMPLETION | {"n": 17}, 400, "1 to 16"),
    "no prompt": ({"model": "nano"}, 400, "prompt"),
    "bias": (COMPLETION | {"logit_bias": {"4096": 1}}, 400, "vocabulary"),
    "huge bias": (COMPLETION | {"logit_bias": {"9" * 5000: 1}}, 400, "token ids"),
    "token": (COMPLETION | {"prompt": [4096]}, 400, "vocabulary"),
    "no text": (COMPLETION | {"prompt": []}, 400, "empty"),
    "no tokens": (COMPLETION | {"prompt": [[]]}, 400, "empty"),
    "prompts": (COMPLETION | {"prompt": ["x"] * 17}, 400, "1 to 16"),
    "long prompt": (COMPLETION | {"prompt": [1] * 4096}, 400, "maximum context length"),
    "options": (COMPLETION | {"stream_options": {"include_usage": True}}, 400, "stream"),
}


@pytest.mark.parametrize(("body", "status", "word"), REFUSED.values(), ids=REFUSED)
async def test_what_cannot_be_honoured_is_refused(
    body: dict[str, Any], status: int, word: str
) -> None:
    async with stack(SCRIPT) as it:
        response = await it.http.post("/v1/completions", json=body)
        assert response.status_code == status
        assert word in response.json()["error"]["message"]
        assert it.engine.calls == []


async def test_a_request_that_is_too_long_has_the_code_that_clients_look_for() -> None:
    async with stack(SCRIPT) as it:
        response = await it.http.post("/v1/completions", json=COMPLETION | {"max_tokens": 5000})
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")


async def test_what_a_chat_message_may_not_hold_is_named() -> None:
    turn = {"role": "user", "content": "x"}
    image = {"type": "image_url", "image_url": {"url": "http://example.org/x.png"}}
    async with stack(SCRIPT) as it:
        for message, word in (
            (
                turn | {"tool_calls": [{"id": "1", "function": {"name": "f", "arguments": ""}}]},
                "messages",
            ),
            ({"role": "user"}, "content"),
            (turn | {"role": "tool"}, "messages"),
            (turn | {"content": [image]}, "messages"),
            (turn | {"content": None}, "messages"),
        ):
            body = CHAT | {"messages": [message]}
            response = await it.http.post("/v1/chat/completions", json=body)
            assert response.status_code == 400
            assert word in response.json()["error"]["message"]
            assert "example.org" not in response.text
        assert (await it.http.post("/v1/chat/completions", json=CHAT)).status_code == 200


async def test_logprobs_are_bounded_by_the_setting() -> None:
    async with stack(SCRIPT, max_logprobs=2) as it:
        for path, body in (
            ("/v1/completions", COMPLETION | {"logprobs": 3}),
            ("/v1/chat/completions", CHAT | {"logprobs": True, "top_logprobs": 3}),
        ):
            response = await it.http.post(path, json=body)
            assert response.status_code == 400
            assert "At most 2" in response.json()["error"]["message"]


async def test_defaults_are_those_of_the_checkpoint_and_a_seed_is_drawn_anew() -> None:
    async with stack(SCRIPT) as it:
        for _ in range(2):
            await it.http.post("/v1/completions", json={"model": "nano", "prompt": "x"})
        await it.http.post("/v1/chat/completions", json=CHAT | {"max_tokens": None})
        first, second, chat = it.engine.calls
    assert first.sampling.seed != second.sampling.seed
    assert first.max_tokens == 16
    assert chat.max_tokens == 4096 - len(chat.prompt) // 4
    assert first.stop_token_ids == [END]


async def test_the_largest_seed_has_a_next_one() -> None:
    async with stack(SCRIPT) as it:
        body = COMPLETION | {"n": 2, "seed": 2**63 - 1}
        assert (await it.http.post("/v1/completions", json=body)).status_code == 200


async def test_bodies_are_bounded_and_must_be_json() -> None:
    async with stack(SCRIPT, max_body_bytes=2048) as it:
        for content, status in (
            (b"x" * 3000, 413),
            (b"{", 400),
            (b"[]", 400),
            (b"\xff", 400),
            (b"", 400),
            (b"[" * 2000, 400),
            (b'{"model": "nano", "prompt": "\\ud800"}', 400),
        ):
            response = await it.http.post("/v1/completions", content=content)
            assert response.status_code == status
            assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_keys_guard_all_but_the_probes(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("alice:secret-one\n")
    async with stack(SCRIPT, api_keys_file=file) as it:
        for method, path in (
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/nano"),
        ):
            assert (await it.http.request(method, path, json=COMPLETION)).status_code == 401
        headers = {"authorization": "Bearer secret-one"}
        answer = await it.http.post("/v1/completions", json=COMPLETION, headers=headers)
        assert answer.status_code == 200
        assert it.engine.calls[0].tenant == "alice"
        assert (await it.http.get("/livez")).status_code == 200


async def test_a_request_id_is_kept_only_if_it_is_harmless() -> None:
    async with stack(SCRIPT) as it:
        kept = await it.http.post(
            "/v1/completions", json=COMPLETION, headers={"x-request-id": "mine-1"}
        )
        odd = await it.http.post(
            "/v1/completions", json=COMPLETION, headers={"x-request-id": "a b=c"}
        )
    assert kept.headers["x-request-id"].startswith("mine-1-")
    assert "a b" not in odd.headers["x-request-id"]


async def test_unknown_paths_and_methods_have_openai_errors() -> None:
    async with stack(SCRIPT) as it:
        unknown = await it.http.get("/v1/nothing")
        wrong = await it.http.get("/v1/completions")
    assert (unknown.status_code, wrong.status_code) == (404, 405)
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["error"]["type"] == "invalid_request_error"
    for response in (unknown, wrong):
        assert set(response.json()["error"]) == {"message", "type", "param", "code"}


async def test_models_are_listed_with_what_they_can_hold() -> None:
    async with stack(SCRIPT) as it:
        listed = (await it.http.get("/v1/models")).json()
        card = (await it.http.get("/v1/models/nano")).json()
        unknown = await it.http.get("/v1/models/a/b")
    assert listed == {"object": "list", "data": [card]}
    assert (card["id"], card["max_model_len"]) == ("nano", 4096)
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")


async def test_a_process_that_cannot_be_scraped_does_not_spoil_the_metrics() -> None:
    async with stack(SCRIPT) as it:
        response = await it.http.get("/metrics")
    assert response.status_code == 200
    assert "expertline_targets_skipped" in response.text
