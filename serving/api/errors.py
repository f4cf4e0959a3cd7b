"""Errors as OpenAI's clients expect them: four keys, one place that makes them.

A message never repeats the client's input and never names a file of the server.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_MAX_MESSAGE = 1000
_MAX_PATH = 100
_MOST_FAULTS = 1000


class ApiError(Exception):
    """Ends a request with an OpenAI-shaped body.

    Args:
        status: HTTP status.
        message: one line for a person.
        param: the field at fault.
        retry_after_s: sent as `retry-after`.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message[:_MAX_MESSAGE]
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, self._type),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def _type(self) -> str:
        return "server_error" if self.status >= 500 else "invalid_request_error"

    def response(self) -> JSONResponse:
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, round(self.retry_after_s)))
        return JSONResponse(self.body, status_code=self.status, headers=headers)


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_exception(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, str(error.detail)).response()
    response.headers.update(error.headers or {})
    return response


def server_fault() -> ApiError:
    """For an exception that nobody expected; it goes to the log and not to the client."""
    return ApiError(500, "The server failed to answer this request.")


async def on_exception(request: Request, error: Exception) -> JSONResponse:
    return server_fault().response()


def refusal(error: ValidationError, names: Mapping[str, str] | None = None) -> ApiError:
    """A 400 for a body that does not fit its model.

    Args:
        names: what the client calls fields that the model has another name for.
    """
    if error.error_count() > _MOST_FAULTS:  # to list a million takes longer than to find them
        return ApiError(400, "Invalid body: it has too many faults.")
    details = error.errors(include_input=False, include_url=False, include_context=False)
    for detail in details:
        if names and detail["loc"]:
            name = str(detail["loc"][0])
            detail["loc"] = (names.get(name, name), *detail["loc"][1:])
    return validation_error(details)


def validation_error(details: Any) -> ApiError:
    """The first thing that pydantic found wrong, without the value that was wrong."""
    # Of an alternative's several complaints the one that got deepest into the body fits best.
    first = max(details, key=lambda detail: len(detail["loc"]))
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.")
    if not first["loc"]:
        return ApiError(400, f"Invalid body: {first['msg']}.")
    path = _path(first["loc"])
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {path}", path)
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{path}'.", path)
    name = first["loc"][0]  # what lies below may be a key or an index that the client chose
    return ApiError(400, f"Invalid value for '{name}': {first['msg']}.", name)


def _path(loc: Sequence[str | int]) -> str:
    """A place in the body as OpenAI writes it: messages[0].content."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc)
    return "".join(parts).lstrip(".")[:_MAX_PATH]
