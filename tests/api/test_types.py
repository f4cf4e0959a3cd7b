"""Every field of a request, with whatever a client may put there: valid, or a clear 400."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from serving.api.chat import ChatRequest
from serving.api.completions import CompletionRequest
from serving.api.errors import ApiError, validation_error
from serving.api.strict import Refused
from tests.api.odd import SECRET

VALID: dict[type[BaseModel], dict[str, Any]] = {
    CompletionRequest: {"model": "nano", "prompt": "x"},
    ChatRequest: {"model": "nano", "messages": [{"role": "user", "content": "x"}]},
}
FIELDS = [(shape, name) for shape in VALID for name in shape.model_fields]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=20),
    st.just(SECRET),
    st.lists(st.one_of(st.integers(-5, 2**40), st.text(max_size=5), st.none()), max_size=5),
    st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.floats()), max_size=3),
    st.recursive(st.integers(), lambda inner: st.lists(inner, max_size=2), max_leaves=20),
)


def refusal(shape: type[BaseModel], body: dict[str, Any]) -> ApiError | None:
    try:
        shape.model_validate_json(json.dumps(body))
    except ValidationError as error:
        details = error.errors(include_input=False, include_url=False, include_context=False)
        return validation_error(details)
    return None


@pytest.mark.parametrize(("shape", "name"), FIELDS, ids=lambda value: str(value))
@settings(max_examples=25, deadline=None)
@given(value=ODD)
def test_any_value_is_valid_or_a_short_error_that_does_not_repeat_it(
    shape: type[BaseModel], name: str, value: Any
) -> None:
    error = refusal(shape, VALID[shape] | {name: value})
    if error is not None:
        text = json.dumps(error.body)
        assert error.status == 400
        assert set(error.body["error"]) == {"message", "type", "param", "code"}
        assert len(text) < 4096
        assert SECRET not in text


@pytest.mark.parametrize("shape", VALID)
@pytest.mark.parametrize("name", ["speed", "prompt_embeds", "chat_template", "x" * 5000])
def test_an_unknown_field_is_refused_by_name(shape: type[BaseModel], name: str) -> None:
    error = refusal(shape, VALID[shape] | {name: 1})
    assert error is not None
    assert name[:100] in error.message
    assert len(error.message) < 300


REFUSED = [
    (shape, name)
    for shape, name in FIELDS
    if any(isinstance(mark, Refused) for mark in shape.model_fields[name].metadata)
]


@pytest.mark.parametrize(("shape", "name"), REFUSED)
def test_what_is_not_honoured_is_refused_unless_it_is_null(
    shape: type[BaseModel], name: str
) -> None:
    assert refusal(shape, VALID[shape] | {name: None}) is None
    error = refusal(shape, VALID[shape] | {name: {"any": "thing"}})
    assert error is not None
    assert error.param == name


@pytest.mark.parametrize(
    ("field", "value"),
    [("n", True), ("n", "1"), ("n", 1.5), ("n", 0), ("n", 10**9), ("max_tokens", 2**40),
     ("temperature", "0"), ("temperature", -0.1), ("temperature", 2.1), ("top_p", 0),
     ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 1.0), ("stop", [""]), ("stop", ["x"] * 5),
     ("stop_token_ids", [-1]), ("stop_token_ids", [0] * 2000), ("logit_bias", {"x": 1}),
     ("logit_bias", {"1": 101}), ("logit_bias", {"9" * 5000: 1}), ("priority", 2**70),
     ("prompt", [[1], ["x"]]), ("prompt", [1, True]), ("prompt", [-1]), ("prompt", [2**31])],
)  # fmt: skip
def test_extremes_are_refused(field: str, value: Any) -> None:
    error = refusal(CompletionRequest, VALID[CompletionRequest] | {field: value})
    assert error is not None
    assert error.param == field


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_numbers_that_are_none_are_refused(number: str) -> None:
    body = f'{{"model": "nano", "prompt": "x", "temperature": {number}}}'
    with pytest.raises(ValidationError):
        CompletionRequest.model_validate_json(body)


def test_prompts_are_told_apart() -> None:
    def prompts(value: Any) -> list[str | list[int]]:
        body = VALID[CompletionRequest] | {"prompt": value}
        return CompletionRequest.model_validate_json(json.dumps(body)).prompts

    assert prompts("x") == ["x"]
    assert prompts(["x", "y"]) == ["x", "y"]
    assert prompts([1, 2]) == [[1, 2]]
    assert prompts([[1, 2], [3]]) == [[1, 2], [3]]
