"""anthropic's own client: messages, streams, token counts, a tools loop, schemas, errors.

The client validates each answer and each streamed event against Anthropic's own types.
"""

import asyncio
import json
import os

import anthropic

OPTIONS = {
    "base_url": os.environ["EXPERTLINE_URL"],
    "api_key": "none",
    "max_retries": 0,
    "timeout": 120,
    "_strict_response_validation": True,
}
TALK = [{"role": "user", "content": "Write a Python function `read_file`."}]
GREEDY = {"temperature": 0}  # no argument of the client's own any more
ASKED = {"model": "nano", "max_tokens": 100, "messages": TALK, "extra_body": GREEDY}
SHORT = ASKED | {"max_tokens": 16}
SWITCH = {
    "name": "switch",
    "description": "Switches a light.",
    "input_schema": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}

client = anthropic.Anthropic(**OPTIONS)


def text() -> None:
    whole = client.messages.create(**SHORT)
    assert whole.stop_reason == "max_tokens"
    assert whole.usage.output_tokens == 16
    assert (
        prompt_tokens(whole.usage)
        == client.messages.count_tokens(model="nano", messages=TALK).input_tokens
    )

    with client.messages.stream(**SHORT) as stream:
        said = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert said == final.content[0].text == whole.content[0].text
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 16

    cut = said[4:7]
    stopped = client.messages.create(**SHORT, stop_sequences=[cut])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", cut)
    assert stopped.content[0].text == said.partition(cut)[0]


def events() -> None:
    kinds = [event.type for event in client.messages.create(**SHORT, stream=True)]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) <= {"content_block_delta", "ping"}


def system_and_blocks() -> None:
    block = {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    plain = client.messages.count_tokens(model="nano", messages=TALK)
    more = client.messages.count_tokens(model="nano", messages=TALK, system=[block])
    assert more.input_tokens > plain.input_tokens
    prefilled = [*TALK, {"role": "assistant", "content": "def read_file("}]
    assert client.messages.create(**SHORT | {"messages": prefilled}, system=[block]).content


def tools() -> None:
    asked = ASKED | {"tools": [SWITCH]}
    any_one = {"type": "any", "disable_parallel_tool_use": True}
    first = client.messages.create(**asked, tool_choice=any_one)
    assert first.stop_reason == "tool_use"
    (use,) = [block for block in first.content if block.type == "tool_use"]
    assert isinstance(use.input["on"], bool)
    assert (
        prompt_tokens(first.usage)
        == client.messages.count_tokens(
            model="nano", messages=TALK, tools=[SWITCH], tool_choice=any_one
        ).input_tokens
    )

    with client.messages.stream(**asked, tool_choice=any_one) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == final.content[-1].input == use.input
    assert final.stop_reason == "tool_use"

    result = {"type": "tool_result", "tool_use_id": use.id, "content": "done"}
    talk = [
        *TALK,
        {"role": "assistant", "content": first.content},
        {"role": "user", "content": [result]},
    ]
    last = client.messages.create(**asked | {"messages": talk}, tool_choice={"type": "none"})
    assert [block.type for block in last.content] == ["text"]


def schema() -> None:
    output = {"format": {"type": "json_schema", "schema": SWITCH["input_schema"]}}
    answer = client.messages.create(**ASKED, output_config=output)
    assert isinstance(json.loads(answer.content[0].text)["on"], bool)


def errors() -> None:
    for fields, kind, named in (
        ({"model": "other"}, anthropic.NotFoundError, "not_found_error"),
        ({"extra_body": {"temperature": 3}}, anthropic.BadRequestError, "invalid_request_error"),
        ({"messages": []}, anthropic.BadRequestError, "invalid_request_error"),
    ):
        try:
            client.messages.create(**ASKED | fields)
        except kind as error:
            assert error.body["error"]["type"] == named
        else:
            raise AssertionError(f"{fields} was accepted")


async def asynchronous() -> None:
    async with anthropic.AsyncAnthropic(**OPTIONS) as own:
        answers = await asyncio.gather(*(own.messages.create(**SHORT) for _ in range(4)))
    assert len({answer.content[0].text for answer in answers}) == 1


def prompt_tokens(usage: anthropic.types.Usage) -> int:
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


if __name__ == "__main__":
    text()
    events()
    system_and_blocks()
    tools()
    schema()
    errors()
    asyncio.run(asynchronous())
