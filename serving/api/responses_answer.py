"""Answers in the shape of OpenAI's responses: whole bodies, and the events of a stream."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from model.tokenizer import Tokenizer
from serving.api.answers import Answer
from serving.api.chat import ChatRequest
from serving.api.delta import CallDelta, Delta, Usage
from serving.api.errors import ApiError
from serving.api.response_store import ResponseStore, StoredResponse
from serving.api.responses import ResponsesRequest
from serving.api.sse import named_event
from serving.engine.request import TokenOutput

_FAILURES = {400: "invalid_prompt", 429: "rate_limit_exceeded"}


class ResponsesAnswer(Answer):
    """`response` and the events that tell of its growth.

    Args:
        chat: what `body` was translated into.
        store: keeps the response when it is complete, if the client and the server want it.
    """

    def __init__(
        self,
        request_id: str,
        model: str,
        tokenizer: Tokenizer,
        body: ResponsesRequest,
        chat: ChatRequest,
        store: ResponseStore | None = None,
        tenant: str = "",
    ) -> None:
        self.tells_tokens = body.logprobs
        self._tenant = tenant
        self._store = store if body.kept(store) else None
        self._past = body.past_of_next(chat) if self._store is not None else []
        self._head = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            **_echo(body),
            "store": self._store is not None,
        }
        self._output = _Output(request_id, tokenizer if body.logprobs else None)
        self._sent = 0

    def opening(self, choices: int) -> Iterator[bytes]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event({"type": kind, "response": self._body("in_progress")})

    def piece(self, index: int, delta: Delta) -> Iterator[bytes]:
        for change in self._output.add(delta):
            yield self._event(change)

    def closing(self, usage: Usage) -> Iterator[bytes]:
        response = self._complete(usage)
        yield self._event({"type": f"response.{response['status']}", "response": response})

    def failure(self, error: ApiError) -> Iterator[bytes]:
        fault = {"code": _FAILURES.get(error.status, "server_error"), "message": error.message}
        response = {**self._body("failed"), "error": fault}
        yield self._event({"type": "response.failed", "response": response})

    def whole(self, choices: Sequence[Delta], usage: Usage) -> dict[str, Any]:
        for _ in self._output.add(choices[0]):
            pass  # nobody reads how it grew
        return self._complete(usage)

    def _event(self, change: dict[str, Any]) -> bytes:
        numbered = {**change, "sequence_number": self._sent}
        self._sent += 1
        return named_event(change["type"], numbered)

    def _body(self, status: str) -> dict[str, Any]:
        return {
            **self._head,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "output": self._output.items,
            "usage": None,
        }

    def _complete(self, usage: Usage) -> dict[str, Any]:
        """The final response, which is kept from now on if it is to be."""
        response = self._body("completed")
        response["usage"] = {
            "input_tokens": usage.prompt_tokens,
            "input_tokens_details": {
                "cached_tokens": usage.cached_tokens,
                "cache_write_tokens": 0,
            },
            "output_tokens": usage.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": usage.total_tokens,
        }
        if self._output.cut:
            response["status"] = "incomplete"
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            response["completed_at"] = int(time.time())
        if self._store is not None:
            conversation = [*self._past, self._output.message]
            stored = StoredResponse(conversation, response)
            self._store.put(self._tenant, response["id"], stored)
        return response


class _Output:
    """The output items of a response, one of which is open at a time.

    Args:
        tokenizer: None where log-probabilities are not wanted.

    Attributes:
        items: those that are complete.
        cut: the limit of tokens ended the last one.
    """

    def __init__(self, request_id: str, tokenizer: Tokenizer | None) -> None:
        self.items: list[dict[str, Any]] = []
        self.cut = False
        self._request_id = request_id
        self._tokenizer = tokenizer
        self._written: list[str] | None = None  # of the open item: its text or arguments
        self._call: CallDelta | None = None  # the open item, if it is one
        self._called = False
        self._characters = 0  # of text
        self._waiting: list[dict[str, Any]] = []  # log-probabilities of text still held back
        self._logprobs: list[dict[str, Any]] = []  # of the text so far

    def add(self, delta: Delta) -> Iterator[dict[str, Any]]:
        """Takes in a delta; what changes is told as events without a number."""
        self._characters += len(delta.text)
        self._waiting += self._scores(delta)
        if delta.text:
            yield from self._say(delta.text)
        for call in delta.calls:
            if call.id is not None:
                yield from self._close("completed")
                yield from self._open_call(call)
            if call.arguments:
                yield from self._argue(call.arguments)
        if delta.finish_reason is not None:
            self.cut = delta.finish_reason == "length"
            if not self._called and (self._waiting or self._written is None):
                yield from self._say("")  # an answer has a message, be it empty
            yield from self._close("incomplete" if self.cut else "completed")

    @property
    def message(self) -> dict[str, Any]:
        """The output as an assistant's chat message."""
        texts = [item["content"][0]["text"] for item in self.items if item["type"] == "message"]
        calls = [
            {
                "id": item["call_id"],
                "type": "function",
                "function": {"name": item["name"], "arguments": item["arguments"]},
            }
            for item in self.items
            if item["type"] == "function_call"
        ]
        said = {"role": "assistant", "content": "".join(texts)}
        return {**said, "tool_calls": calls} if calls else said

    @property
    def _place(self) -> dict[str, Any]:
        prefix = "msg" if self._call is None else "fc"
        index = len(self.items)
        return {"item_id": f"{prefix}_{self._request_id}_{index}", "output_index": index}

    def _say(self, text: str) -> Iterator[dict[str, Any]]:
        if self._call is not None:
            yield from self._close("completed")
        if self._written is None:
            self._written = []
            yield self._item_event("added", {**self._message("in_progress"), "content": []})
            part = {"type": "response.content_part.added", "part": self._part()}
            yield {**part, **self._place, "content_index": 0}
        told, self._waiting = self._waiting, []
        self._written.append(text)
        self._logprobs += told
        if text or told:
            said = {"type": "response.output_text.delta", "delta": text, "logprobs": told}
            yield {**said, **self._place, "content_index": 0}

    def _open_call(self, call: CallDelta) -> Iterator[dict[str, Any]]:
        self._called = True
        self._waiting = []  # these tokens were the call's beginning
        self._call, self._written = call, []
        yield self._item_event("added", self._function_call("in_progress"))

    def _argue(self, arguments: str) -> Iterator[dict[str, Any]]:
        assert self._written is not None
        self._written.append(arguments)
        said = {"type": "response.function_call_arguments.delta", "delta": arguments}
        yield {**said, **self._place}

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        if self._written is None:
            return
        if self._call is not None:
            item = self._function_call(status)
            done = {"arguments": item["arguments"], "name": item["name"]}
            yield {"type": "response.function_call_arguments.done", **done, **self._place}
        else:
            item = self._message(status)
            place = {**self._place, "content_index": 0}
            part = item["content"][0]
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield {"type": "response.output_text.done", **done, **place}
            yield {"type": "response.content_part.done", "part": part, **place}
        yield self._item_event("done", item)
        self.items.append(item)
        self._call = self._written = None
        self._logprobs = []

    def _item_event(self, what: str, item: dict[str, Any]) -> dict[str, Any]:
        index = len(self.items)
        return {"type": f"response.output_item.{what}", "output_index": index, "item": item}

    def _message(self, status: str) -> dict[str, Any]:
        return {
            "id": self._place["item_id"],
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [self._part()],
        }

    def _part(self) -> dict[str, Any]:
        return {
            "type": "output_text",
            "text": "".join(self._written or ()),
            "annotations": [],
            "logprobs": self._logprobs,
        }

    def _function_call(self, status: str) -> dict[str, Any]:
        assert self._call is not None
        return {
            "id": self._place["item_id"],
            "type": "function_call",
            "status": status,
            "call_id": self._call.id,
            "name": self._call.name,
            "arguments": "".join(self._written or ()),
        }

    def _scores(self, delta: Delta) -> list[dict[str, Any]]:
        """Log-probabilities of the tokens of text; those of calls have no place to go."""
        if self._tokenizer is None or self._called:
            return []
        tokens = delta.tokens
        if delta.calls:
            starts = zip(tokens, delta.offsets, strict=True)
            tokens = [output for output, start in starts if start < self._characters]
        return [_score(output, self._tokenizer) for output in tokens]


def _score(output: TokenOutput, tokenizer: Tokenizer) -> dict[str, Any]:
    def entry(token: int, logprob: float | None) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token) or b""
        return {"token": raw.decode(errors="replace"), "logprob": logprob, "bytes": list(raw)}

    top = [entry(token, value) for token, value in output.top]
    return {**entry(output.token, output.logprob), "top_logprobs": top}


def _echo(body: ResponsesRequest) -> dict[str, Any]:
    """What a response repeats of its request."""
    given = body.model_dump(
        include={
            "instructions", "max_output_tokens", "max_tool_calls", "previous_response_id",
            "prompt_cache_key", "safety_identifier", "temperature", "top_logprobs", "top_p", "user",
        }
    )  # fmt: skip
    written = body.model_dump(
        include={"text", "tool_choice", "tools"}, by_alias=True, exclude_none=True
    )
    return {
        **given,
        "background": False,
        "metadata": body.metadata or {},
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": None, "summary": None},
        "service_tier": "default",
        "text": {"format": {"type": "text"}} | written.get("text", {}),
        "tool_choice": written.get("tool_choice", "auto"),
        "tools": written.get("tools", []),
        "truncation": "disabled",
    }
