"""`llm`, the command line: a chat and a completion model from extra-openai-models.yaml."""

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
- model_id: nano-completion
  model_name: nano
  api_base: {url}/v1
  completion: true
"""


def ask(home: str, *arguments: str) -> str:
    command = [str(Path(sys.executable).parent / "llm"), *arguments]
    environment = {**os.environ, "LLM_USER_PATH": home}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as home:
        models = MODELS.format(url=os.environ["EXPERTLINE_URL"])
        Path(home, "extra-openai-models.yaml").write_text(models)
        options = ["-o", "max_tokens", "16", "-o", "seed", "1", "-o", "temperature", "0"]
        for model in ("nano-chat", "nano-completion"):
            streamed = ask(home, "-m", model, *options, "def f(x):")
            whole = ask(home, "-m", model, "--no-stream", *options, "def f(x):")
            assert streamed.strip()
            assert streamed == whole


if __name__ == "__main__":
    main()
