"""litellm: chat, its stream and chunk builder, a tools loop, schemas, errors, text completion."""

import asyncio
import json
import os

import litellm
from pydantic import BaseModel

SERVER = {"api_base": f"{os.environ['EXPERTLINE_URL']}/v1", "api_key": "none", "num_retries": 0}
MESSAGES = [{"role": "user", "content": "Write a Python function `read_file`."}]
CHAT = {**SERVER, "model": "openai/nano", "messages": MESSAGES, "seed": 1, "temperature": 1}
TEXT = {**SERVER, "model": "text-completion-openai/nano", "prompt": "def f(", "temperature": 0}
SWITCH = {
    "name": "switch",
    "description": "Switches a light.",
    "parameters": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}
TOOLS = {"tools": [{"type": "function", "function": SWITCH}], "parallel_tool_calls": False}


class Lights(BaseModel):
    red: bool
    green: bool


def chat() -> None:
    whole = litellm.completion(**CHAT, max_tokens=16)
    usage = whole.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert whole.choices[0].finish_reason == "length"
    chunks = list(
        litellm.completion(
            **CHAT, max_tokens=16, stream=True, stream_options={"include_usage": True}
        )
    )
    built = litellm.stream_chunk_builder(chunks)
    assert built.choices[0].message.content == whole.choices[0].message.content
    assert built.choices[0].finish_reason == "length"
    assert built.usage.completion_tokens == usage.completion_tokens == 16
    assert built.usage.prompt_tokens == usage.prompt_tokens


def tools() -> None:
    asked = {**CHAT, **TOOLS, "tool_choice": "required", "max_tokens": 100}
    first = litellm.completion(**asked).choices[0]
    assert first.finish_reason == "tool_calls"
    (call,) = first.message.tool_calls
    assert isinstance(json.loads(call.function.arguments)["on"], bool)
    built = litellm.stream_chunk_builder(list(litellm.completion(**asked, stream=True)))
    (streamed,) = built.choices[0].message.tool_calls
    assert streamed.function == call.function

    result = {"role": "tool", "tool_call_id": call.id, "content": "done"}
    talk = {"messages": [*MESSAGES, first.message, result], "tool_choice": "none"}
    last = litellm.completion(**asked | talk | {"max_tokens": 8}).choices[0]
    assert last.message.content
    assert not last.message.tool_calls


def structured() -> None:
    answer = litellm.completion(**CHAT, max_tokens=100, response_format=Lights)
    Lights.model_validate_json(answer.choices[0].message.content)


def errors() -> None:
    for fields, kind in (
        ({"model": "openai/other"}, litellm.NotFoundError),
        ({"temperature": 3}, litellm.BadRequestError),
        ({"max_tokens": 10**6}, litellm.BadRequestError),
    ):
        try:
            litellm.completion(**CHAT | fields)
        except kind:
            continue
        raise AssertionError(f"{fields} was accepted")


def completions() -> None:
    whole = litellm.text_completion(**TEXT, max_tokens=8)
    pieces = litellm.text_completion(**TEXT, max_tokens=8, stream=True)
    assert "".join(piece.choices[0].text or "" for piece in pieces) == whole.choices[0].text


async def at_once() -> None:
    answers = await asyncio.gather(*(litellm.acompletion(**CHAT, max_tokens=8) for _ in range(4)))
    assert len({answer.choices[0].message.content for answer in answers}) == 1


if __name__ == "__main__":
    chat()
    tools()
    structured()
    errors()
    completions()
    asyncio.run(at_once())
