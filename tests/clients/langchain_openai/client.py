"""langchain-openai: invoke, stream, a tools loop, structured output both ways, completions."""

import asyncio
import os
from typing import Annotated

from langchain_core.messages import AIMessageChunk, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import BaseModel, Field

SERVER = {
    "model": "nano",
    "base_url": f"{os.environ['EXPERTLINE_URL']}/v1",
    "api_key": "none",
    "max_retries": 0,
}
QUESTION = "Write a Python function `read_file`."
chat = ChatOpenAI(**SERVER, max_tokens=200, seed=3, temperature=1)


class Lights(BaseModel):
    """The lights of a crossing."""

    red: bool
    lamps: Annotated[list[int], Field(min_length=1, max_length=2)]


class Look(BaseModel):
    """Looks at a light."""

    closely: bool


def invoke_and_stream() -> None:
    answer = chat.invoke(QUESTION, max_tokens=16)
    assert answer.response_metadata["finish_reason"] == "length"
    chunks = list(chat.stream(QUESTION, max_tokens=16, stream_usage=True))
    assert "".join(chunk.text for chunk in chunks) == answer.text
    whole = added(chunks)
    for usage in (answer.usage_metadata, whole.usage_metadata):
        assert usage["output_tokens"] == 16
        assert usage["total_tokens"] == usage["input_tokens"] + 16
    assert whole.response_metadata["finish_reason"] == "length"


def tools() -> None:
    bound = chat.bind_tools([Look, Lights], tool_choice="Look", parallel_tool_calls=False)
    first = bound.invoke(QUESTION)
    (call,) = first.tool_calls
    assert call["name"] == "Look"
    Look.model_validate(call["args"])
    (streamed,) = added(bound.stream(QUESTION)).tool_calls
    assert streamed | {"id": ""} == call | {"id": ""}

    talk = [HumanMessage(QUESTION), first, ToolMessage("it is red", tool_call_id=call["id"])]
    last = chat.bind_tools([Look, Lights], tool_choice="none").invoke(talk, max_tokens=16)
    assert last.text
    assert not last.tool_calls


def structured() -> None:
    for method in ("json_schema", "function_calling"):
        answer = chat.with_structured_output(Lights, method=method, include_raw=True)
        given = answer.invoke(QUESTION)
        assert given["parsing_error"] is None
        assert isinstance(given["parsed"], Lights)
    *_, last = chat.with_structured_output(Lights, method="json_schema").stream(QUESTION)
    assert isinstance(last, Lights)


def logprobs() -> None:
    answer = chat.bind(logprobs=True, top_logprobs=2).invoke(QUESTION, max_tokens=4)
    assert len(answer.response_metadata["logprobs"]["content"]) == 4


def completions() -> None:
    plain = OpenAI(**SERVER, max_tokens=8, temperature=0)
    text = plain.invoke("def f(")
    assert text == "".join(plain.stream("def f("))
    assert [g[0].text for g in plain.generate(["def f(", "def f("]).generations] == [text, text]


async def batch() -> None:
    several = await chat.abatch([QUESTION] * 4, max_tokens=8)
    assert len({answer.text for answer in several}) == 1


def added(chunks) -> AIMessageChunk:
    whole, *rest = chunks
    for chunk in rest:
        whole += chunk
    return whole


if __name__ == "__main__":
    invoke_and_stream()
    tools()
    structured()
    logprobs()
    completions()
    asyncio.run(batch())
