"""litellm: completion, stream and its chunk builder, tools, text completion."""

import json
import os

import litellm

COMMON = {"api_base": f"{os.environ['EXPERTLINE_URL']}/v1", "api_key": "none", "num_retries": 0}
CHAT = {"model": "openai/nano", "messages": [{"role": "user", "content": "hi"}], "seed": 1}
FUNCTION = {
    "name": "switch",
    "parameters": {
        "type": "object",
        "properties": {"on": {"type": "boolean"}},
        "required": ["on"],
        "additionalProperties": False,
    },
}


def main() -> None:
    whole = litellm.completion(**COMMON, **CHAT, max_tokens=16)
    text = whole.choices[0].message.content
    assert whole.usage.completion_tokens <= 16
    chunks = list(litellm.completion(**COMMON, **CHAT, max_tokens=16, stream=True))
    built = litellm.stream_chunk_builder(chunks)
    assert built.choices[0].message.content == text
    called = litellm.completion(
        **COMMON,
        **CHAT,
        max_tokens=100,
        tools=[{"type": "function", "function": FUNCTION}],
        tool_choice="required",
        parallel_tool_calls=False,
    )
    (call,) = called.choices[0].message.tool_calls
    assert isinstance(json.loads(call.function.arguments)["on"], bool)
    plain = litellm.text_completion(
        **COMMON, model="text-completion-openai/nano", prompt="def f(", max_tokens=8
    )
    assert plain.choices[0].text


if __name__ == "__main__":
    main()
