"""`expertline chat`: a conversation in the terminal, streamed."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
from rich.console import Console

from deploy.errors import UsageError

_CONNECT_S = 5.0


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Where to talk, and how."""

    url: str
    model: str | None
    system: str | None
    temperature: float | None
    max_tokens: int | None
    api_key: str | None


def talk(options: ChatOptions, console: Console) -> None:
    """Reads lines until end of input; Ctrl-C stops an answer, and the program only when idle.

    Raises:
        UsageError: no server there, or it refuses us.
    """
    headers = {"authorization": f"Bearer {options.api_key}"} if options.api_key else {}
    timeout = httpx.Timeout(None, connect=_CONNECT_S)
    with httpx.Client(base_url=options.url, headers=headers, timeout=timeout) as client:
        model = options.model or _first_model(client)
        console.print(f"{model} at {options.url}; end with Ctrl-D", style="dim")
        turns: list[dict[str, str]] = []
        if options.system:
            turns.append({"role": "system", "content": options.system})
        while (line := _read_line()) is not None:
            if not line.strip():
                continue
            turns.append({"role": "user", "content": line})
            answer = _answer(client, model, turns, options, console)
            turns.append({"role": "assistant", "content": answer})


def _read_line() -> str | None:
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _first_model(client: httpx.Client) -> str:
    try:
        response = client.get("/v1/models")
    except httpx.HTTPError as error:
        reason = type(error).__name__
        raise UsageError(f"{client.base_url}: no server answers ({reason})") from error
    if response.status_code != 200:
        raise UsageError(f"{client.base_url}: {_message(response)}")
    return str(response.json()["data"][0]["id"])


def _answer(
    client: httpx.Client,
    model: str,
    turns: list[dict[str, str]],
    options: ChatOptions,
    console: Console,
) -> str:
    body: dict[str, Any] = {"model": model, "messages": turns, "stream": True}
    if options.temperature is not None:
        body["temperature"] = options.temperature
    if options.max_tokens is not None:
        body["max_tokens"] = options.max_tokens
    said = ""
    try:
        for text in _stream(client, body):
            said += text
            console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" [stopped]", style="dim", markup=False, end="")
    console.print()
    return said


def _stream(client: httpx.Client, body: dict[str, Any]) -> Iterator[str]:
    try:
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                response.read()
                raise UsageError(_message(response))
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[len("data: ") :])
                if "error" in event:
                    raise UsageError(event["error"]["message"])
                for choice in event["choices"]:
                    yield choice["delta"].get("content") or ""
    except httpx.HTTPError as error:
        raise UsageError(f"the connection was lost ({type(error).__name__})") from error


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"
