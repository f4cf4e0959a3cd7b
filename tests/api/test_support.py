"""The README's table of fields is what the code says, and no field of OpenAI's is missing."""

import typing
from pathlib import Path

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params
from pydantic import BaseModel

from serving.api.chat import ChatRequest
from serving.api.completions import CompletionRequest
from serving.api.responses import ResponsesRequest
from serving.api.support import COLUMNS, support, table

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_has_the_table_that_the_code_prints() -> None:
    text = README.read_text(encoding="utf-8")
    shown = text.partition("<!-- fields:begin -->\n")[2].partition("<!-- fields:end -->")[0]
    assert shown == table()


@pytest.mark.parametrize(
    ("shape", "theirs"),
    [
        (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
        (ChatRequest, chat_create_params.CompletionCreateParamsBase),
        (ResponsesRequest, response_create_params.ResponseCreateParamsBase),
    ],
)
def test_every_field_of_openais_has_an_answer_here(shape: type[BaseModel], theirs: type) -> None:
    fields = set(typing.get_type_hints(theirs)) | {"stream"}
    assert fields - set(shape.model_fields) == set()


def test_marks_are_what_the_models_do() -> None:
    assert support(ChatRequest, "functions") == "refused: use tools"
    assert support(ChatRequest, "user") == "no effect"
    assert support(ChatRequest, "seed") == "honoured"
    assert support(ChatRequest, "suffix") == "–"
    assert set(COLUMNS) == {"completions", "chat", "responses", "messages"}
