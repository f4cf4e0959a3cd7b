"""The server that `expertline chat` talks to: any that speaks OpenAI's API, streamed."""

import json
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx

_NOT_OPENAI = "what answers is not an OpenAI-compatible server"

Body = dict[str, Any]
Turn = dict[str, str]


class ServerError(Exception):
    """The server refused, failed or went away; one line, and the program goes on."""


@dataclass(frozen=True, slots=True)
class Server:
    """An OpenAI-compatible server, and how it is to sample."""

    client: httpx.Client
    temperature: float | None
    max_tokens: int | None

    def models(self) -> list[str]:
        """Names of its models, at least one."""
        try:
            response = self.client.get("/v1/models")
            if response.status_code != 200:
                raise ServerError(_message(response))
            names = [str(model["id"]) for model in response.json()["data"]]
        except httpx.HTTPError as error:
            raise ServerError(f"no server answers ({type(error).__name__})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(_NOT_OPENAI) from error
        if not names:
            raise ServerError("the server has no model")
        return names

    def chat(self, model: str, messages: list[Turn]) -> Generator[str]:
        """The next turn, piece by piece."""
        for choice in self._stream("/v1/chat/completions", model, {"messages": messages}):
            yield choice["delta"].get("content") or ""

    def middle(self, model: str, prefix: str, suffix: str) -> Generator[str]:
        """What belongs between the two, piece by piece."""
        for choice in self._stream("/v1/completions", model, {"prompt": prefix, "suffix": suffix}):
            yield choice["text"]

    def _stream(self, path: str, model: str, body: Body) -> Iterator[Body]:
        """Choices as they come; closing the iterator closes the connection."""
        body = {"model": model, **body, "stream": True}
        if self.temperature is not None:
            body["temperature"] = self.temperature
        if self.max_tokens is not None:
            body["max_tokens"] = self.max_tokens
        try:
            with self.client.stream("POST", path, json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise ServerError(_message(response))
                for event in _events(response):
                    yield from event["choices"]
        except httpx.HTTPError as error:
            raise ServerError(f"the connection was lost ({type(error).__name__})") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(_NOT_OPENAI) from error


def _events(response: httpx.Response) -> Iterator[Body]:
    """Events up to [DONE].

    Lines are cut by hand: httpx also cuts at U+2028 and the like, which may stand inside JSON.
    """
    rest = b""
    for part in response.iter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if not line.startswith(b"data:"):
                continue
            data = line.removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            event = json.loads(data)
            if "error" in event:
                raise ServerError(str(event["error"]["message"]))
            yield event
    raise ServerError("the connection was closed before the answer was complete")


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"
