"""pydantic-ai: a tool loop, structured output, a stream."""

import asyncio
import os

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider

MODEL = OpenAIChatModel(
    "nano",
    provider=OpenAIProvider(base_url=f"{os.environ['EXPERTLINE_URL']}/v1", api_key="none"),
)
SETTINGS = {"max_tokens": 200, "seed": 2}


class Light(BaseModel):
    red: bool
    green: bool


def structured() -> None:
    for output in (Light, NativeOutput(Light)):
        agent = Agent(MODEL, output_type=output, model_settings=SETTINGS)
        assert isinstance(agent.run_sync("Which light?").output, Light)


def tools() -> None:
    called = []
    agent = Agent(MODEL, output_type=Light, model_settings=SETTINGS, retries=5)

    @agent.tool_plain
    def look(closely: bool) -> str:
        called.append(closely)
        return "it is red"

    for seed in range(20):  # the model chooses by chance between looking and answering
        chance = {"max_tokens": 200, "seed": seed, "temperature": 2.0}
        result = agent.run_sync("Which light?", model_settings=chance)
        assert isinstance(result.output, Light)
        if called:
            break
    assert called, "the tool was never called"


async def streaming() -> None:
    agent = Agent(MODEL, model_settings={"max_tokens": 16})
    async with agent.run_stream("hi") as stream:
        text = [piece async for piece in stream.stream_text(delta=True)]
    assert "".join(text)
    assert stream.usage.output_tokens if not callable(stream.usage) else stream.usage()


if __name__ == "__main__":
    structured()
    tools()
    asyncio.run(streaming())
