"""langchain-openai: invoke, stream, tools, structured output both ways, completions."""

import os

from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel

URL = f"{os.environ['EXPERTLINE_URL']}/v1"
chat = ChatOpenAI(model="nano", base_url=URL, max_retries=0, max_tokens=200, seed=3)


class Light(BaseModel):
    """A traffic light."""

    red: bool
    green: bool


def invoke_and_stream() -> None:
    answer = chat.invoke("hi", max_tokens=16)
    assert answer.content
    assert answer.usage_metadata["output_tokens"] <= 16
    chunks = list(chat.stream("hi", max_tokens=16, stream_usage=True))
    assert "".join(chunk.content for chunk in chunks) == answer.content
    assert any(chunk.usage_metadata for chunk in chunks)


def tools() -> None:
    bound = chat.bind_tools([Light], tool_choice="required", parallel_tool_calls=False)
    (call,) = bound.invoke("hi").tool_calls
    assert call["name"] == "Light"
    Light.model_validate(call["args"])
    whole = None
    for chunk in bound.stream("hi"):
        whole = chunk if whole is None else whole + chunk
    assert [c["name"] for c in whole.tool_calls] == ["Light"]


def structured() -> None:
    for method in ("json_schema", "function_calling"):
        assert isinstance(chat.with_structured_output(Light, method=method).invoke("hi"), Light)


def completions() -> None:
    plain = OpenAI(model="nano", base_url=URL, max_retries=0, max_tokens=8, temperature=0)
    assert plain.invoke("def f(") == "".join(plain.stream("def f("))


if __name__ == "__main__":
    for check in (invoke_and_stream, tools, structured, completions):
        check()
