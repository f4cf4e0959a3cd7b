"""instructor: a model's answer as an object: tools, JSON, a schema, a stream, a refused object."""

import asyncio
import os
from typing import Annotated, Literal

import instructor
import openai
from instructor.core import InstructorRetryException
from pydantic import BaseModel, Field, field_validator

OPTIONS = {"base_url": f"{os.environ['EXPERTLINE_URL']}/v1", "api_key": "none", "max_retries": 0}
ASKED = {
    "model": "nano",
    "messages": [{"role": "user", "content": "Write a Python function `read_file`."}],
    "max_tokens": 300,
    "seed": 7,
}
MODES = (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA)


class Lamp(BaseModel):
    colour: Literal["red", "green"]
    on: bool


class Lights(BaseModel):
    lamps: Annotated[list[Lamp], Field(min_length=1, max_length=2)]
    street: Annotated[str, Field(max_length=8)]


class Broken(BaseModel):
    on: bool

    @field_validator("on")
    @classmethod
    def _never(cls, on: bool) -> bool:
        raise ValueError("neither on nor off")


def objects(mode: instructor.Mode) -> None:
    create = instructor.from_openai(openai.OpenAI(**OPTIONS), mode=mode).chat.completions
    made, raw = create.create_with_completion(**ASKED, response_model=Lights, max_retries=0)
    assert isinstance(made, Lights)
    assert raw.usage.total_tokens == raw.usage.prompt_tokens + raw.usage.completion_tokens
    *_, last = create.create_partial(**ASKED, response_model=Lights)
    Lights.model_validate(last.model_dump())  # its schema differs, and so what nano says


def asks_again(mode: instructor.Mode) -> None:
    """An object that fails validation goes back to the model with the complaint."""
    create = instructor.from_openai(openai.OpenAI(**OPTIONS), mode=mode).chat.completions
    try:
        create.create(**ASKED, response_model=Broken, max_retries=2)
    except InstructorRetryException as error:
        assert error.n_attempts >= 2
        assert "neither on nor off" in str(error)
    else:
        raise AssertionError("an invalid object was accepted")


async def asynchronous() -> None:
    create = instructor.from_openai(openai.AsyncOpenAI(**OPTIONS)).chat.completions
    assert isinstance(await create.create(**ASKED, response_model=Lamp, max_retries=0), Lamp)


if __name__ == "__main__":
    for mode in MODES:
        objects(mode)
        asks_again(mode)
    asyncio.run(asynchronous())
