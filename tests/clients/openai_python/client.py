"""openai-python: every endpoint it has a method for, its helpers, its errors, its cancellation.

The client validates each answer and each streamed chunk against OpenAI's own types.
"""

import asyncio
import json
import os
import time
import urllib.request
from typing import Annotated

import openai
from openai.types.chat import ChatCompletionToolParam
from pydantic import BaseModel, Field

URL = os.environ["EXPERTLINE_URL"]
OPTIONS = {"base_url": f"{URL}/v1", "api_key": "none", "max_retries": 0, "timeout": 120}
FREED_WITHIN_S = 20
PROMPT = "def add(a, b):\n"
MESSAGES = [{"role": "user", "content": "Write a Python function `read_file`."}]
WEATHER: ChatCompletionToolParam = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "maxLength": 12},
                "unit": {"enum": ["C", "F"]},
            },
            "required": ["city", "unit"],
            "additionalProperties": False,
        },
    },
}

client = openai.OpenAI(**OPTIONS, _strict_response_validation=True)
lenient = openai.OpenAI(**OPTIONS)  # where OpenAI's types lack a null that its own server sends


class Lights(BaseModel):
    """Bounded: nano ends neither a list nor a string of its own accord."""

    colour: bool
    lamps: Annotated[list[bool], Field(max_length=3)]


class Switch(BaseModel):
    """Switches a lamp."""

    on: bool


def adds_up(usage: openai.types.CompletionUsage) -> bool:
    return usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def models() -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    assert model.id == "nano"


def completions() -> None:
    asked = {"model": "nano", "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked, n=2, logprobs=3)
    assert [choice.index for choice in whole.choices] == [0, 1]
    assert whole.choices[0].text == whole.choices[1].text
    assert adds_up(whole.usage)
    scores = whole.choices[0].logprobs
    lengths = {len(scores.tokens), len(scores.token_logprobs), len(scores.top_logprobs)}
    assert lengths | {len(scores.text_offset)} == {whole.usage.completion_tokens // 2}
    assert "".join(scores.tokens) == whole.choices[0].text

    chunks = list(
        lenient.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *body, last = chunks
    assert "".join(chunk.choices[0].text for chunk in body) == whole.choices[0].text
    assert body[-1].choices[0].finish_reason == whole.choices[0].finish_reason
    assert not last.choices
    assert adds_up(last.usage)

    several = client.completions.create(**(asked | {"prompt": [PROMPT, "import os\n"]}))
    assert several.choices[0].text == whole.choices[0].text
    assert [choice.index for choice in several.choices] == [0, 1]


def echo_and_suffix() -> None:
    asked = {"model": "nano", "prompt": PROMPT, "temperature": 0}
    scored = lenient.completions.create(**asked, max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == PROMPT
    assert scored.usage.completion_tokens == 0
    scores = scored.choices[0].logprobs
    assert scores.token_logprobs[0] is None
    assert all(score <= 0 for score in scores.token_logprobs[1:])
    assert "".join(scores.tokens).endswith(PROMPT)

    middle = client.completions.create(**asked, max_tokens=8, suffix="\n    return c\n")
    assert middle.usage.prompt_tokens > scored.usage.prompt_tokens


def chat() -> None:
    asked = {"model": "nano", "messages": MESSAGES, "max_tokens": 24, "seed": 1, "temperature": 1}
    pair = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2)
    assert [choice.index for choice in pair.choices] == [0, 1]
    assert pair.choices[0].message.content != pair.choices[1].message.content
    assert adds_up(pair.usage)
    scores = pair.choices[0].logprobs.content
    assert all(len(token.top_logprobs) == 2 for token in scores)
    assert b"".join(bytes(token.bytes) for token in scores).decode() == (
        pair.choices[0].message.content
    )

    single = client.chat.completions.create(**asked)
    text = single.choices[0].message.content
    assert text == pair.choices[0].message.content
    *body, last = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    assert body[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in body) == text
    assert [c.choices[0].finish_reason for c in body if c.choices[0].finish_reason] == ["length"]
    assert not last.choices
    assert last.usage.completion_tokens == single.usage.completion_tokens == 24

    stopped = client.chat.completions.create(**asked, stop=[text[3:6]])
    assert stopped.choices[0].message.content == text.partition(text[3:6])[0]
    assert stopped.choices[0].finish_reason == "stop"


def structured() -> None:
    asked = {"model": "nano", "messages": MESSAGES, "max_tokens": 400, "seed": 3}
    parsed = client.chat.completions.parse(**asked, response_format=Lights)
    assert isinstance(parsed.choices[0].message.parsed, Lights)
    with client.chat.completions.stream(**asked, response_format=Lights) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= set(events)
    assert final.choices[0].message.parsed == parsed.choices[0].message.parsed

    cut = asked | {"max_tokens": 2}
    try:
        client.chat.completions.parse(**cut, response_format=Lights)
    except openai.LengthFinishReasonError:
        pass
    else:
        raise AssertionError("an answer of two tokens was complete")


def tools() -> None:
    asked = {"model": "nano", "tools": [WEATHER], "seed": 5, "max_tokens": 200}
    required = {"tool_choice": "required", "parallel_tool_calls": False}
    first = client.chat.completions.create(**asked, **required, messages=MESSAGES)
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls
    arguments = json.loads(call.function.arguments)
    assert call.function.name == "get_weather"
    assert set(arguments) == {"city", "unit"}
    assert arguments["unit"] in ("C", "F")

    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    talk = [*MESSAGES, message, result]
    last = client.chat.completions.create(**asked, messages=talk, tool_choice="none")
    assert last.choices[0].message.content
    assert not last.choices[0].message.tool_calls

    with client.chat.completions.stream(**asked, **required, messages=MESSAGES) as stream:
        (done,) = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
        final = stream.get_final_completion()
    assert (done.name, done.parsed_arguments) == ("get_weather", arguments)
    assert final.choices[0].finish_reason == "tool_calls"

    chosen = client.chat.completions.parse(
        **asked | {"tools": [WEATHER, openai.pydantic_function_tool(Switch)]},
        messages=MESSAGES,
        tool_choice={"type": "function", "function": {"name": "Switch"}},
        parallel_tool_calls=False,
    )
    (call,) = chosen.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Switch)


def responses() -> None:
    asked = {"model": "nano", "input": "hi", "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**asked)
    usage = whole.usage
    assert whole.status == "incomplete"
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    events = list(client.responses.create(**asked, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    pieces = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(pieces) == events[-1].response.output_text == whole.output_text

    parsed = client.responses.parse(
        model="nano", input="hi", text_format=Lights, max_output_tokens=400, temperature=0
    )
    assert parsed.status == "completed"
    assert isinstance(parsed.output_parsed, Lights)

    assert not whole.store  # off unless configured
    refused(openai.NotFoundError, lambda: client.responses.retrieve(whole.id))


def response_tools() -> None:
    function = {"type": "function", **WEATHER["function"]}
    asked = {"model": "nano", "tools": [function], "max_output_tokens": 200, "temperature": 0}
    required = {"tool_choice": "required", "parallel_tool_calls": False}
    first = client.responses.create(**asked, **required, input="hi")
    (call,) = [item for item in first.output if item.type == "function_call"]
    assert set(json.loads(call.arguments)) == {"city", "unit"}
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    talk = [{"role": "user", "content": "hi"}, *first.output, result]
    last = client.responses.create(**asked, tool_choice="none", input=talk)
    assert last.output_text
    with client.responses.stream(**asked, **required, input="hi") as stream:
        done = [e for e in stream if e.type == "response.function_call_arguments.done"]
    assert [event.arguments for event in done] == [call.arguments]


def errors() -> None:
    asked = {"model": "nano", "messages": MESSAGES, "max_tokens": 8}
    for fields, kind, param in (
        ({"model": "other"}, openai.NotFoundError, "model"),
        ({"temperature": 3}, openai.BadRequestError, "temperature"),
        ({"extra_body": {"no_such_field": 1}}, openai.BadRequestError, "no_such_field"),
        ({"max_tokens": 10**6}, openai.BadRequestError, "max_tokens"),
        ({"messages": []}, openai.BadRequestError, "messages"),
        ({"stream": True, "top_p": 2}, openai.BadRequestError, "top_p"),
    ):
        error = refused(
            kind, lambda fields=fields: client.chat.completions.create(**asked | fields)
        )
        assert error.param == param, (fields, error.body)
        assert set(error.body) == {"message", "type", "param", "code"}
        assert error.request_id
    refused(openai.NotFoundError, lambda: client.models.retrieve("other"))


def refused(kind, call):
    """The error that a call ends with."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


async def concurrent() -> None:
    """Eight chats at once say what each says alone."""
    async with openai.AsyncOpenAI(**OPTIONS) as own:

        async def streamed(seed: int) -> str:
            stream = await own.chat.completions.create(
                model="nano", messages=MESSAGES, max_tokens=16, seed=seed, stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

        together = await asyncio.gather(*(streamed(seed) for seed in range(8)))
        assert together == [await streamed(seed) for seed in range(8)]


async def cancelled() -> None:
    """The server stops what the client no longer reads."""
    endless = {"model": "nano", "prompt": "x", "max_tokens": 3000, "n": 2}
    async with openai.AsyncOpenAI(**OPTIONS) as own:
        stream = await own.completions.create(
            **endless, stream=True, extra_body={"ignore_eos": True}
        )
        await anext(aiter(stream))
        assert running() == 2
        await stream.close()
        await all_freed()
        try:
            await own.with_options(timeout=1).completions.create(
                **endless, extra_body={"ignore_eos": True}
            )
        except openai.APITimeoutError:
            await all_freed()
        else:
            raise AssertionError("6000 tokens came within a second")


async def all_freed() -> None:
    deadline = time.monotonic() + FREED_WITHIN_S
    while running() and time.monotonic() < deadline:
        await asyncio.sleep(0.1)
    assert not running(), "the server goes on with what nobody reads"


def running() -> float:
    """Sequences that the engines run now."""
    with urllib.request.urlopen(f"{URL}/metrics") as response:
        lines = response.read().decode().splitlines()
    samples = [line for line in lines if line.startswith("expertline_requests_running")]
    assert samples, "no such metric"
    return sum(float(line.rsplit(" ", 1)[1]) for line in samples)


if __name__ == "__main__":
    models()
    completions()
    echo_and_suffix()
    chat()
    structured()
    tools()
    responses()
    response_tools()
    errors()
    asyncio.run(concurrent())
    asyncio.run(cancelled())
