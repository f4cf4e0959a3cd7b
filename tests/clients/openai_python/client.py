"""openai-python: completions, chat, helpers, tools, responses, errors, cancellation."""

import asyncio
import json
import os
import time
import urllib.request

import openai
from pydantic import BaseModel

URL = os.environ["EXPERTLINE_URL"]
client = openai.OpenAI(base_url=f"{URL}/v1", max_retries=0, timeout=120)
MESSAGES = [{"role": "user", "content": "Write a Python function `read_file`."}]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city.",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string", "maxLength": 12}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


class Point(BaseModel):
    kind: str
    closed: bool


def models() -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "nano"


def completions() -> None:
    asked = {"model": "nano", "prompt": "def add(a, b):\n", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked, n=2, logprobs=3)
    assert len(whole.choices) == 2
    assert len(whole.choices[0].logprobs.tokens) == 12
    text = "".join(c.choices[0].text for c in client.completions.create(**asked, stream=True))
    assert text == whole.choices[0].text
    echoed = client.completions.create(**(asked | {"max_tokens": 0}), echo=True, logprobs=1)
    assert echoed.choices[0].text == asked["prompt"]
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    middle = client.completions.create(**asked, suffix="\n    return c\n")
    assert middle.usage.prompt_tokens > whole.usage.prompt_tokens


def chat() -> None:
    asked = {"model": "nano", "messages": MESSAGES, "max_tokens": 24, "seed": 1, "temperature": 1}
    whole = client.chat.completions.create(**asked, n=2, logprobs=True, top_logprobs=2)
    again = client.chat.completions.create(**asked)
    assert again.choices[0].message.content == whole.choices[0].message.content
    assert all(len(t.top_logprobs) == 2 for t in whole.choices[0].logprobs.content)
    options = {"include_usage": True}
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options=options))
    assert chunks[-1].usage.completion_tokens <= 24
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == again.choices[0].message.content
    stopped = client.chat.completions.create(**asked, stop=[text[3:6]])
    assert stopped.choices[0].message.content == text.partition(text[3:6])[0]
    assert stopped.choices[0].finish_reason == "stop"


def helpers() -> None:
    asked = {"model": "nano", "messages": MESSAGES, "max_tokens": 200, "seed": 3}
    parsed = client.chat.completions.parse(**asked, response_format=Bounded)
    assert isinstance(parsed.choices[0].message.parsed, Bounded)
    with client.chat.completions.stream(**asked, response_format=Bounded) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    assert isinstance(final.choices[0].message.parsed, Bounded)


class Bounded(BaseModel):
    closed: bool
    kind: bool


def tools() -> None:
    talk = list(MESSAGES)
    asked = {"model": "nano", "tools": TOOLS, "seed": 5, "max_tokens": 200}
    first = client.chat.completions.create(
        **asked, messages=talk, tool_choice="required", parallel_tool_calls=False
    )
    message = first.choices[0].message
    assert first.choices[0].finish_reason == "tool_calls"
    (call,) = message.tool_calls
    assert set(json.loads(call.function.arguments)) == {"city"}
    talk += [message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    last = client.chat.completions.create(**asked, messages=talk, tool_choice="none")
    assert last.choices[0].message.content
    with client.chat.completions.stream(
        **asked, messages=MESSAGES, tool_choice="required", parallel_tool_calls=False
    ) as stream:
        done = [e for e in stream if e.type == "tool_calls.function.arguments.done"]
    assert [e.name for e in done] == ["get_weather"]
    assert set(done[0].parsed_arguments) == {"city"}


def responses() -> None:
    asked = {"model": "nano", "input": "hi", "max_output_tokens": 16, "temperature": 0}
    whole = client.responses.create(**asked)
    assert whole.output_text
    events = list(client.responses.create(**asked, stream=True))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == (
        whole.output_text
    )
    parsed = client.responses.parse(model="nano", input="hi", text_format=Bounded)
    assert isinstance(parsed.output_parsed, Bounded)


def errors() -> None:
    for status, fields in (
        (openai.NotFoundError, {"model": "other"}),
        (openai.BadRequestError, {"temperature": 3}),
        (openai.BadRequestError, {"extra_body": {"no_such_field": 1}}),
        (openai.BadRequestError, {"max_tokens": 10**6}),
    ):
        asked = {"model": "nano", "messages": MESSAGES} | fields
        try:
            client.chat.completions.create(**asked)
        except status as error:
            assert error.request_id
            assert error.body["message"]
        else:
            raise AssertionError(f"{fields} was accepted")


async def cancelled() -> None:
    async with openai.AsyncOpenAI(base_url=f"{URL}/v1", max_retries=0) as own:
        stream = await own.completions.create(
            model="nano",
            prompt="x",
            max_tokens=4000,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        async for _ in stream:
            break
        await stream.close()
    deadline = time.monotonic() + 20
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
    for check in (models, completions, chat, helpers, tools, responses, errors):
        check()
    asyncio.run(cancelled())
