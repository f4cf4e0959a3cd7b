"""Errors and events as OpenAI's clients read them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.completion import Completion

from model.config import ModelConfig
from model.tokenizer import Tokenizer
from serving.api.answers import ChatAnswer, CompletionAnswer, OpenAIAnswer
from serving.api.delta import CallDelta, Delta, Usage
from serving.api.errors import ApiError, validation_error
from serving.api.sse import DONE, error_event, event
from serving.engine.request import TokenOutput
from tests.model.oracle import NANO

TOKENIZER = Tokenizer.from_directory(NANO, ModelConfig.from_directory(NANO))


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, "invalid_request_error"), (401, "authentication_error"), (404, "not_found_error"),
     (405, "invalid_request_error"), (413, "invalid_request_error"), (429, "rate_limit_error"),
     (500, "server_error"), (503, "server_error")],
)  # fmt: skip
def test_the_type_of_an_error_follows_its_status(status: int, kind: str) -> None:
    error = ApiError(status, "why", "field", "code").response()
    assert error.status_code == status
    assert json.loads(bytes(error.body)) == {
        "error": {"message": "why", "type": kind, "param": "field", "code": "code"}
    }


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=3000))
def test_an_error_is_short_and_one_event(message: str) -> None:
    error = ApiError(500, message)
    assert len(error.message) <= 1000
    sent = error_event(error)
    assert sent.startswith(b"data: ")
    assert sent.endswith(b"\n\n")
    assert sent.count(b"\n") == 2
    assert json.loads(sent[6:]) == error.body


def test_when_to_come_again_is_a_whole_second_at_least() -> None:
    for wanted, sent in ((0.1, "1"), (1.4, "1"), (2.6, "3")):
        response = ApiError(429, "busy", retry_after_s=wanted).response()
        assert response.headers["retry-after"] == sent
    assert "retry-after" not in ApiError(400, "no").response().headers


def test_the_end_of_a_stream_is_openais() -> None:
    assert DONE == b"data: [DONE]\n\n"
    assert event({"text": "naïve\n"}) == 'data: {"text":"naïve\\n"}\n\n'.encode()


@pytest.mark.parametrize(
    ("detail", "param", "words"),
    [
        ({"type": "json_invalid", "loc": (), "msg": "secret"}, None, "not valid JSON"),
        ({"type": "model_type", "loc": (), "msg": "an object"}, None, "an object"),
        ({"type": "missing", "loc": ("messages", 0, "role"), "msg": ""}, "messages[0].role", "M"),
        ({"type": "extra_forbidden", "loc": ("x" * 500,), "msg": ""}, "x" * 100, "Unrecognized"),
        ({"type": "float_type", "loc": ("logit_bias", "secret"), "msg": "no"}, "logit_bias", "no"),
    ],
)
def test_a_refusal_names_the_field_and_not_its_value(
    detail: dict[str, object], param: str | None, words: str
) -> None:
    error = validation_error([detail])
    assert (error.status, error.param) == (400, param)
    assert words in error.message
    assert "secret" not in error.message


def delta() -> Delta:
    tokens = TOKENIZER.encode_text("hi 🎉")
    outputs = [TokenOutput("r", token, -0.5, [(token, -0.5), (5, -1.0)]) for token in tokens]
    call = CallDelta(0, "{}", "call_1", "f")
    return Delta("hi 🎉", outputs, list(range(len(tokens))), [call], "length")


USED = Usage(prompt_tokens=8, cached_tokens=6, completion_tokens=7)


def answer(shape: type[OpenAIAnswer], return_token_ids: bool = False) -> OpenAIAnswer:
    made = shape("r", "nano", TOKENIZER, True, True, return_token_ids)
    made.prompts = [[1, 2], [3]]
    return made


@pytest.mark.parametrize(
    ("shape", "whole", "chunk"),
    [
        (CompletionAnswer, Completion, Completion),
        (ChatAnswer, ChatCompletion, ChatCompletionChunk),
    ],
)
def test_openais_own_types_read_every_body(
    shape: type[OpenAIAnswer],
    whole: type[Completion | ChatCompletion],
    chunk: type[Completion | ChatCompletionChunk],
) -> None:
    it = answer(shape)
    body = it.whole([delta()], USED)
    read = whole.model_validate(body)
    assert read.id == body["id"]
    assert read.usage == CompletionUsage.model_validate(
        {
            "prompt_tokens": 8,
            "completion_tokens": 7,
            "total_tokens": 15,
            "prompt_tokens_details": {"cached_tokens": 6},
        }
    )
    events = [*it.opening(2), *it.piece(0, delta()), *it.closing(USED)]
    assert events.pop() == DONE
    for sent in events:
        assert chunk.model_validate(json.loads(sent[6:])).id == body["id"]


@pytest.mark.parametrize("shape", [CompletionAnswer, ChatAnswer])
def test_token_ids_are_each_prompts_own(shape: type[OpenAIAnswer]) -> None:
    ids = TOKENIZER.encode_text("hi 🎉")
    choices = answer(shape, return_token_ids=True).whole([delta()] * 4, USED)["choices"]
    assert [choice["token_ids"] for choice in choices] == [ids] * 4
    assert [choice["prompt_token_ids"] for choice in choices] == [[1, 2], [1, 2], [3], [3]]


def test_bytes_of_a_cut_character_are_exact() -> None:
    choice = answer(ChatAnswer).whole([delta()], USED)["choices"][0]
    content = choice["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "hi 🎉".encode()


def test_the_token_itself_is_always_among_the_likeliest() -> None:
    unlikely = Delta("x", [TokenOutput("r", 300, -9.0, [(301, -0.1)])], [0], [], "stop")
    logprobs = answer(CompletionAnswer).whole([unlikely], USED)["choices"][0]["logprobs"]
    (top,) = logprobs["top_logprobs"]
    assert sorted(top.values()) == [-9.0, -0.1]
    assert top[logprobs["tokens"][0]] == -9.0


def test_tokens_that_are_half_a_character_do_not_fall_together() -> None:
    halves = TOKENIZER.encode_text("🎉")
    assert len(halves) > 1
    outputs = [TokenOutput("r", token, -1.0, [(t, -1.0) for t in halves]) for token in halves]
    cut = Delta("🎉", outputs, [0] * len(halves), [], "length")
    logprobs = answer(CompletionAnswer).whole([cut], USED)["choices"][0]["logprobs"]
    assert all(len(top) == len(set(halves)) for top in logprobs["top_logprobs"])
    assert logprobs["tokens"][0].startswith("bytes:\\x")
