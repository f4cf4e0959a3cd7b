"""pydantic-ai: structured output both ways, a tools loop, streams of text and of objects."""

import asyncio
import os
from typing import Annotated

from pydantic import BaseModel, Field
from pydantic_ai import Agent, NativeOutput, ToolOutput
from pydantic_ai.exceptions import ModelHTTPError
from pydantic_ai.messages import ToolReturnPart
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

PROVIDER = OpenAIProvider(base_url=f"{os.environ['EXPERTLINE_URL']}/v1", api_key="none")
CHAT = OpenAIChatModel("nano", provider=PROVIDER)
RESPONSES = OpenAIResponsesModel("nano", provider=PROVIDER)
SETTINGS = {"max_tokens": 200, "temperature": 0.0}
QUESTION = "Write a Python function `read_file`."
TRIES = 20


class Lights(BaseModel):
    red: bool
    lamps: Annotated[list[int], Field(min_length=1, max_length=2)]


def structured() -> None:
    for model in (CHAT, RESPONSES):
        for output in (ToolOutput(Lights), NativeOutput(Lights)):
            answer = Agent(model, output_type=output, model_settings=SETTINGS).run_sync(QUESTION)
            assert isinstance(answer.output, Lights), (model, output)
            assert answer.usage.input_tokens > 0
            assert answer.usage.output_tokens > 0


def tools() -> None:
    """The model is to call something: the look or the answer, as chance has it."""
    agent = Agent(CHAT, output_type=Lights, retries=5)

    @agent.tool_plain
    def look(closely: bool) -> str:
        """Looks at the light."""
        assert isinstance(closely, bool)
        return "it is red"

    for seed in range(TRIES):
        chance = {"max_tokens": 200, "seed": seed, "temperature": 2.0}
        answer = agent.run_sync(QUESTION, model_settings=chance)
        assert isinstance(answer.output, Lights)
        parts = [part for message in answer.all_messages() for part in message.parts]
        if any(isinstance(p, ToolReturnPart) and p.tool_name == "look" for p in parts):
            return
    raise AssertionError("the tool was never called")


async def streams() -> None:
    for model in (CHAT, RESPONSES):
        short = SETTINGS | {"max_tokens": 16}
        whole = await Agent(model, model_settings=short).run(QUESTION)
        async with Agent(model, model_settings=short).run_stream(QUESTION) as stream:
            pieces = [piece async for piece in stream.stream_text(delta=True)]
        assert "".join(pieces) == whole.output
        assert stream.usage.output_tokens == whole.usage.output_tokens == 16

        agent = Agent(model, output_type=NativeOutput(Lights), model_settings=SETTINGS)
        async with agent.run_stream(QUESTION) as stream:
            assert isinstance(await stream.get_output(), Lights)
        agent = Agent(model, output_type=ToolOutput(Lights), model_settings=SETTINGS)
        async with agent.run_stream(QUESTION) as stream:
            assert isinstance(await stream.get_output(), Lights)


def errors() -> None:
    try:
        Agent(OpenAIChatModel("other", provider=PROVIDER)).run_sync(QUESTION)
    except ModelHTTPError as error:
        assert error.status_code == 404
    else:
        raise AssertionError("a model that does not exist answered")


if __name__ == "__main__":
    structured()
    tools()
    asyncio.run(streams())
    errors()
