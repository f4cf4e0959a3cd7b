"""Answers and errors in the shape of Anthropic's messages."""

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
from fastapi.responses import JSONResponse

from model.tokenizer import Tokenizer
from serving.api.answers import Answer
from serving.api.delta import CallDelta, Delta, Usage
from serving.api.errors import ApiError
from serving.api.messages import MessagesRequest
from serving.api.sse import named_event

_ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def messages_error(error: ApiError, request_id: str | None = None) -> JSONResponse:
    """An error as Anthropic's clients expect it, before a stream has begun."""
    response = JSONResponse(_error_body(error, request_id), status_code=error.status)
    retry_after = error.response().headers.get("retry-after")
    if retry_after is not None:
        response.headers["retry-after"] = retry_after
    return response


class MessagesAnswer(Answer):
    """`message` and the events that tell of its growth.

    Args:
        tokenizer: for the signature that all dialects have; there are no log-probabilities here.
        body: likewise.
    """

    def __init__(
        self, request_id: str, model: str, tokenizer: Tokenizer, body: MessagesRequest
    ) -> None:
        self._head = {
            "id": f"msg_{request_id}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._request_id = request_id
        self._blocks = 0
        self._open: str | None = None  # type of the block that is not complete yet
        self._end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        self._called = False

    def opening(self, choices: int) -> Iterator[bytes]:
        prompt_tokens = sum(len(prompt) for prompt in self.prompts)
        usage = _usage(Usage(prompt_tokens, 0, 0))
        message = {**self._head, "content": [], **self._end, "usage": usage}
        yield _event({"type": "message_start", "message": message})
        yield _event({"type": "ping"})

    def piece(self, index: int, delta: Delta) -> Iterator[bytes]:
        if delta.text:
            if self._open != "text":
                yield from self._begin({"type": "text", "text": ""})
            yield self._block_event("delta", delta={"type": "text_delta", "text": delta.text})
        for call in delta.calls:
            if call.id is not None:
                self._called = True
                yield from self._begin(_tool_use(call, {}))
            if call.arguments:
                part = {"type": "input_json_delta", "partial_json": call.arguments}
                yield self._block_event("delta", delta=part)
        if delta.finish_reason is not None:
            yield from self._stop()
            self._end = _end(delta, self._called)

    def closing(self, usage: Usage) -> Iterator[bytes]:
        yield _event({"type": "message_delta", "delta": self._end, "usage": _usage(usage)})
        yield _event({"type": "message_stop"})

    def failure(self, error: ApiError) -> Iterator[bytes]:
        yield _event(_error_body(error, self._request_id))

    def whole(self, choices: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        delta = choices[0]
        content: list[dict[str, Any]] = [{"type": "text", "text": delta.text}] if delta.text else []
        content += [_tool_use(call, _input(call.arguments)) for call in delta.calls]
        end = _end(delta, bool(delta.calls))
        return {**self._head, "content": content, **end, "usage": _usage(usage)}

    def _begin(self, block: dict[str, Any]) -> Iterator[bytes]:
        yield from self._stop()
        self._open = block["type"]
        yield self._block_event("start", content_block=block)

    def _stop(self) -> Iterator[bytes]:
        if self._open is not None:
            yield self._block_event("stop")
            self._open = None
            self._blocks += 1

    def _block_event(self, what: str, **fields: Any) -> bytes:
        return _event({"type": f"content_block_{what}", "index": self._blocks, **fields})


def _event(body: dict[str, Any]) -> bytes:
    return named_event(body["type"], body)


def _error_body(error: ApiError, request_id: str | None) -> dict[str, Any]:
    fallback = "api_error" if error.status >= 500 else "invalid_request_error"
    fault = {"type": _ERROR_TYPES.get(error.status, fallback), "message": error.message}
    named = {} if request_id is None else {"request_id": request_id}
    return {"type": "error", "error": fault, **named}


def _end(delta: Delta, called: bool) -> dict[str, Any]:
    """Why a message ended; a call counts as a reason even where OpenAI's dialect says `stop`."""
    if delta.finish_reason == "length":
        reason = "max_tokens"
    elif delta.stop_string is not None:
        reason = "stop_sequence"
    else:
        reason = "tool_use" if called else "end_turn"
    return {"stop_reason": reason, "stop_sequence": delta.stop_string}


def _tool_use(call: CallDelta, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}


def _input(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object, even where a limit has cut them."""
    try:
        # Unlike the standard library's, this one refuses half a surrogate, which no body can hold.
        return msgspec.json.decode(arguments, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError, RecursionError):
        return {}


def _usage(usage: Usage) -> dict[str, int]:
    """Tokens as Anthropic counts them: those found in the cache are no input tokens."""
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached_tokens,
        "output_tokens": usage.completion_tokens,
    }
