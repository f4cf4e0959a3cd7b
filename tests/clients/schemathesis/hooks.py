"""Makes generated requests reach the model: else nearly all of them would end at its name."""

from typing import Any

import schemathesis

LENGTHS = {
    "/v1/completions": "max_tokens",
    "/v1/chat/completions": "max_tokens",
    "/v1/responses": "max_output_tokens",
    "/v1/messages": "max_tokens",
}
SHORT = 8


@schemathesis.hook
def before_call(context: schemathesis.HookContext, case: schemathesis.Case, kwargs: Any) -> None:
    """A request asks for the model that is there, and for few tokens."""
    length = LENGTHS.get(case.path)
    body = case.body
    if length is None or not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str):
        body["model"] = "nano"
    if body.get(length) is None or (type(body[length]) is int and body[length] > SHORT):
        body[length] = SHORT
    if case.path == "/v1/chat/completions":
        body.pop("max_completion_tokens", None)  # it would win
