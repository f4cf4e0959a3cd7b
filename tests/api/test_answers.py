"""Chunks of a stream, whichever way they are put together."""

import json
from typing import cast

import pytest

from model.tokenizer import Tokenizer
from serving.api.answers import ChatAnswer, CompletionAnswer, OpenAIAnswer
from serving.api.delta import Delta

NO_TOKENIZER = cast(Tokenizer, None)  # nothing here asks for a token's text


@pytest.mark.parametrize("shape", [ChatAnswer, CompletionAnswer])
@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("text", ["return", ' "\\\n\t', "é\u2028🙂\x00"])
def test_a_chunk_of_text_says_what_one_that_also_ends_says(
    shape: type[OpenAIAnswer], include_usage: bool, text: str
) -> None:
    answer = shape("id", "nano", NO_TOKENIZER, False, include_usage, False)
    going, ending = (
        [json.loads(event.removeprefix(b"data: ")) for event in answer.piece(3, delta)]
        for delta in (Delta(text), Delta(text, finish_reason="stop"))
    )
    assert len(going) == len(ending) == 1
    assert ending[0]["choices"][0].pop("finish_reason") == "stop"
    assert going[0]["choices"][0].pop("finish_reason", "") is None
    assert going == ending
