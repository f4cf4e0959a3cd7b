"""What completions offer beyond plain text: echo, scores, several candidates, the middle."""

from typing import Any

import pytest

from serving.engine.request import FinishReason
from tests.ingress.stack import Stack, stack
from tests.ingress.test_routes import CHAT, COMPLETION, SCRIPT, TEXT, TOKENIZER, events

PROMPT = "def f(x):\n    return x"
IDS = [TOKENIZER.bos_id, *TOKENIZER.encode_text(PROMPT)]
BODY = COMPLETION | {"prompt": PROMPT}


async def post(it: Stack, **fields: Any) -> dict[str, Any]:
    response = await it.http.post("/v1/completions", json=BODY | fields)
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def test_echo_puts_the_prompt_in_front() -> None:
    async with stack(SCRIPT) as it:
        text = (await post(it, echo=True))["choices"][0]["text"]
        assert text == PROMPT + TEXT
        assert it.engine.calls[-1].sampling.prompt_logprobs is None
        ids = (await post(it, prompt=IDS[1:4], echo=True))["choices"][0]["text"]
        assert ids == TOKENIZER.decode(IDS[1:4]) + TEXT


async def test_echoed_log_probabilities_cover_prompt_and_answer() -> None:
    async with stack(SCRIPT) as it:
        logprobs = (await post(it, echo=True, logprobs=1))["choices"][0]["logprobs"]
        await it.quiet()
    count = len(IDS)
    assert logprobs["token_logprobs"][:count] == [None, *(-float(i) for i in range(1, count))]
    assert logprobs["token_logprobs"][count:] == [-0.5] * (len(SCRIPT) + 1)
    assert logprobs["top_logprobs"][0] is None
    whole = PROMPT + TEXT
    for token, offset in zip(logprobs["tokens"][1:-1], logprobs["text_offset"][1:-1], strict=True):
        assert whole[offset:].startswith(token)


async def test_a_prompt_can_be_scored_without_generating() -> None:
    async with stack(SCRIPT) as it:
        for logprobs in (0, 5, None):
            body = await post(it, echo=True, max_tokens=0, logprobs=logprobs)
            choice = body["choices"][0]
            assert choice["text"] == PROMPT
            assert choice["finish_reason"] == str(FinishReason.LENGTH)
            assert body["usage"]["completion_tokens"] == 0
            if logprobs is not None:
                assert len(choice["logprobs"]["tokens"]) == len(IDS)
        await it.quiet()


async def test_an_echoed_stream_begins_with_the_prompt() -> None:
    async with stack(SCRIPT) as it:
        response = await it.http.post(
            "/v1/completions", json=BODY | {"echo": True, "logprobs": 0, "stream": True}
        )
    chunks = [chunk["choices"][0] for chunk in events(response)[:-1]]
    assert chunks[0]["text"] == PROMPT
    assert "".join(chunk["text"] for chunk in chunks) == PROMPT + TEXT
    assert len(chunks[0]["logprobs"]["tokens"]) == len(IDS)


async def test_the_likeliest_of_several_candidates_are_given() -> None:
    async with stack(SCRIPT) as it:
        body = await post(it, n=2, best_of=5, prompt=[PROMPT, PROMPT])
        assert len(it.engine.calls) == 10
        assert {call.sampling.logprobs for call in it.engine.calls} == {0}
        seeds = [call.sampling.seed for call in it.engine.calls]
        assert len(set(seeds)) == 5
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert all(choice["logprobs"] is None for choice in body["choices"])
    assert body["usage"]["completion_tokens"] == 10 * (len(SCRIPT) + 1)


async def test_the_middle_is_asked_for_by_ids_in_the_order_of_training() -> None:
    fim = TOKENIZER.fim
    assert fim is not None
    literal = "<｜fim▁hole｜>"
    async with stack(SCRIPT) as it:
        await post(it, prompt=f"a {literal}", suffix=f"{literal} b")
        prompt = it.engine.calls[-1].request().prompt
        assert prompt == [
            TOKENIZER.bos_id,
            fim.begin,
            *TOKENIZER.encode_text(f"a {literal}"),
            fim.hole,
            *TOKENIZER.encode_text(f"{literal} b"),
            fim.end,
        ]
        await post(it, prompt="", suffix="")
        prompt = it.engine.calls[-1].request().prompt
        assert prompt == [TOKENIZER.bos_id, fim.begin, fim.hole, fim.end]


async def test_a_model_without_the_middle_says_so() -> None:
    async with stack(SCRIPT, model={"fill_in_the_middle": "off"}) as it:
        response = await it.http.post("/v1/completions", json=BODY | {"suffix": "x"})
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "suffix"
        assert "not trained to fill in the middle" in error["message"]
        assert it.engine.calls == []


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_token_ids_come_back_if_asked_for(path: str, stream: bool) -> None:
    body = (BODY if path == "/v1/completions" else CHAT) | {"return_token_ids": True}
    async with stack(SCRIPT) as it:
        response = await it.http.post(path, json=body | {"stream": stream})
        prompt = it.engine.calls[-1].request().prompt
    choices = (
        [chunk["choices"][0] for chunk in events(response)[:-1]]
        if stream
        else response.json()["choices"]
    )
    generated = [token for choice in choices for token in choice.get("token_ids", [])]
    assert generated[:-1] == SCRIPT
    assert next(c["prompt_token_ids"] for c in choices if "prompt_token_ids" in c) == prompt


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_a_stream_tells_the_ids_of_tokens_that_have_no_text_yet(path: str) -> None:
    body = (BODY if path == "/v1/completions" else CHAT) | {"return_token_ids": True}
    held_back = {"stop": [f"{TEXT}!"], "stream": True, "stream_options": {"include_usage": True}}
    async with stack(SCRIPT) as it:
        got = events(await it.http.post(path, json=body | held_back))[:-1]
    choices = [choice for chunk in got for choice in chunk["choices"]]
    told = [token for choice in choices for token in choice.get("token_ids", ())]
    assert told[:-1] == SCRIPT
    assert got[-1]["usage"]["completion_tokens"] == len(told)


async def test_sampling_fields_reach_the_engine() -> None:
    async with stack(SCRIPT) as it:
        await post(
            it,
            min_tokens=3,
            stop_token_ids=[7],
            bad_words=["foo"],
            allowed_token_ids=[1, 2],
            cache_salt="s3cret",
            priority=-2,
        )
        call = it.engine.calls[-1]
    assert call.sampling.min_tokens == 3
    assert call.sampling.end_token_ids == (7, TOKENIZER.eos_id)
    assert call.sampling.allowed_token_ids == (1, 2)
    assert set(call.sampling.bad_words) == {
        tuple(TOKENIZER.encode_text(text)) for text in ("foo", " foo")
    }
    assert (call.cache_salt, call.priority) == ("s3cret", -2)
    assert call.request().cache_scope != call.tenant


async def test_min_tokens_holds_for_stop_strings_too() -> None:
    async with stack(SCRIPT) as it:
        stop = TEXT[:2]
        plain = await post(it, stop=stop)
        assert plain["choices"][0]["text"] == ""
        later = await post(it, stop=stop, min_tokens=len(SCRIPT))
        assert later["choices"][0]["text"].startswith(TEXT)
