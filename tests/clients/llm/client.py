"""`llm`, the command line: chat and completion models, a schema, a tools loop, a conversation."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

MODELS = """
- model_id: nano-chat
  model_name: nano
  api_base: {url}/v1
  supports_tools: true
  supports_schema: true
- model_id: nano-completion
  model_name: nano
  api_base: {url}/v1
  completion: true
"""
FUNCTIONS = """
def look() -> str:
    "Looks at the light."
    return "it is red"
"""
SCHEMA = {
    "type": "object",
    "properties": {"red": {"type": "boolean"}, "lamps": {"enum": [1, 2, 3]}},
    "required": ["red", "lamps"],
    "additionalProperties": False,
}
SHORT = ["-o", "max_tokens", "16", "-o", "seed", "1", "-o", "temperature", "0"]
ENOUGH = ["-o", "max_tokens", "100", "-o", "seed", "1", "-o", "temperature", "0"]


def ask(home: str, *arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "llm"), *arguments]
    environment = {**os.environ, "LLM_USER_PATH": home}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def last_log(home: str) -> dict:
    (entry,) = json.loads(ask(home, "logs", "-n", "1", "--json"))
    return entry


def streamed_and_whole(home: str) -> None:
    for model in ("nano-chat", "nano-completion"):
        streamed = ask(home, "-m", model, *SHORT, "def f(x):")
        assert streamed.strip()
        assert streamed == ask(home, "-m", model, "--no-stream", *SHORT, "def f(x):")
    ask(home, "-m", "nano-chat", *SHORT, "def f(x):")
    assert last_log(home)["output_tokens"] == 16


def schema(home: str) -> None:
    answer = json.loads(ask(home, "-m", "nano-chat", *ENOUGH, "--schema", json.dumps(SCHEMA), "hi"))
    assert isinstance(answer["red"], bool)
    assert answer["lamps"] in (1, 2, 3)


def tools(home: str) -> None:
    """The model may call or not; either way the server takes the tools and what follows."""
    for way in ([], ["--no-stream"]):
        ask(home, "-m", "nano-chat", *way, *ENOUGH, "--functions", FUNCTIONS, "Look!")


def conversation(home: str) -> None:
    ask(home, "-m", "nano-chat", *SHORT, "hi")
    before = last_log(home)["input_tokens"]
    ask(home, "-c", *SHORT, "hi")
    assert last_log(home)["input_tokens"] > before


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        models = MODELS.format(url=os.environ["EXPERTLINE_URL"])
        Path(home, "extra-openai-models.yaml").write_text(models)
        streamed_and_whole(home)
        schema(home)
        tools(home)
        conversation(home)
