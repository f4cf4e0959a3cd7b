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
from serving.api.answers import Answer, ChatAnswer, CompletionAnswer, Delta, usage
from serving.api.errors import ApiError, validation_error
from serving.api.sse import DONE, error_event, event
from serving.engine.request import RequestStats, TokenOutput
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
    return Delta("hi 🎉", outputs, list(range(len(tokens))), "length")


USED = usage([RequestStats(3, 1, 2), RequestStats(3, 0, 4), RequestStats(5, 5, 1)], per_prompt=2)


def test_prompts_count_once_however_many_choices_they_have() -> None:
    assert USED == {
        "prompt_tokens": 8,
        "completion_tokens": 7,
        "total_tokens": 15,
        "prompt_tokens_details": {"cached_tokens": 6},
    }
    assert CompletionUsage.model_validate(USED).total_tokens == 15


@pytest.mark.parametrize(
    ("answer", "whole", "chunk"),
    [
        (CompletionAnswer("r", "nano", TOKENIZER), Completion, Completion),
        (ChatAnswer("r", "nano", TOKENIZER), ChatCompletion, ChatCompletionChunk),
    ],
)
def test_openais_own_types_read_every_body(
    answer: Answer,
    whole: type[Completion | ChatCompletion],
    chunk: type[Completion | ChatCompletionChunk],
) -> None:
    logprobs = answer.logprobs(delta())
    body = answer.whole([answer.choice(0, delta(), logprobs)], USED)
    assert whole.model_validate(body, strict=True).id == body["id"]
    for choices in ([answer.piece(0, delta(), logprobs)], answer.opening(0), []):
        sent = json.loads(event(answer.chunk(choices, USED))[6:])
        assert chunk.model_validate(sent).id == body["id"]


def test_bytes_of_a_cut_character_are_exact() -> None:
    content = ChatAnswer("r", "nano", TOKENIZER).logprobs(delta())["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in content) == "hi 🎉".encode()
