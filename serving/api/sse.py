"""Server-sent events, as OpenAI's streams use them."""

from typing import Any

import msgspec

from serving.api.errors import ApiError

WAITING = b": waiting\n\n"  # a comment: clients skip it
DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()


def event(body: Any) -> bytes:
    """One event with a JSON body."""
    return b"data: %b\n\n" % _encoder.encode(body)


def encoded(body: Any) -> bytes:
    """A body as JSON."""
    return _encoder.encode(body)


def named_event(name: str, body: Any) -> bytes:
    """One event that says its kind, as the dialects beside OpenAI's older two have it."""
    return f"event: {name}\n".encode() + event(body)


def error_event(error: ApiError) -> bytes:
    """What a stream says instead of its end when it cannot go on."""
    return event(error.body)
