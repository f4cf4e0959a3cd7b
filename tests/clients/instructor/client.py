"""instructor: a model's answer as an object, through tools, JSON and a schema."""

import os

import instructor
import openai
from pydantic import BaseModel


class Light(BaseModel):
    red: bool
    green: bool


def main() -> None:
    client = openai.OpenAI(base_url=f"{os.environ['EXPERTLINE_URL']}/v1", max_retries=0)
    for mode in (instructor.Mode.TOOLS, instructor.Mode.TOOLS_STRICT, instructor.Mode.JSON_SCHEMA):
        made = instructor.from_openai(client, mode=mode).chat.completions.create(
            model="nano",
            messages=[{"role": "user", "content": "Which light?"}],
            response_model=Light,
            max_retries=0,
            max_tokens=200,
        )
        assert isinstance(made, Light), mode


if __name__ == "__main__":
    main()
