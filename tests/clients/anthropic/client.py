"""anthropic's own client against /v1/messages."""

import os

import anthropic

client = anthropic.Anthropic(base_url=os.environ["EXPERTLINE_URL"], api_key="none", max_retries=0)
ASKED = {
    "model": "nano",
    "max_tokens": 100,
    "messages": [{"role": "user", "content": "Which light?"}],
}
TOOL = {
    "name": "switch",
    "description": "Switches a light.",
    "input_schema": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}


def text() -> None:
    short = ASKED | {"max_tokens": 16}
    whole = client.messages.create(**short)
    assert whole.content[0].text
    counted = client.messages.count_tokens(model="nano", messages=ASKED["messages"])
    usage = whole.usage
    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)
    with client.messages.stream(**short) as stream:
        said = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert said == final.content[0].text
    assert final.stop_reason in ("max_tokens", "end_turn")


def tools() -> None:
    asked = ASKED | {
        "tools": [TOOL],
        "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
    }
    first = client.messages.create(**asked)
    assert first.stop_reason == "tool_use"
    (use,) = [block for block in first.content if block.type == "tool_use"]
    assert isinstance(use.input["on"], bool)
    with client.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert isinstance(final.content[-1].input["on"], bool)
    result = {"type": "tool_result", "tool_use_id": use.id, "content": "done"}
    talk = [
        *ASKED["messages"],
        {
            "role": "assistant",
            "content": [block.model_dump(exclude_none=True) for block in first.content],
        },
        {"role": "user", "content": [result]},
    ]
    last = client.messages.create(**(ASKED | {"messages": talk, "max_tokens": 8}))
    assert last.content


def errors() -> None:
    try:
        client.messages.create(**(ASKED | {"model": "other"}))
    except anthropic.NotFoundError as error:
        assert error.body["error"]["type"] == "not_found_error"
    else:
        raise AssertionError("a model that does not exist answered")


if __name__ == "__main__":
    text()
    tools()
    errors()
