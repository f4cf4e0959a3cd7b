"""Errors as OpenAI's clients expect them: four keys, one place that makes them.

A message never repeats the client's input and never names a file of the server.
"""

from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_MAX_MESSAGE = 1000


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
                "type": _TYPES.get(self.status, "server_error"),
                "param": self.param,
                "code": self.code,
            }
        }

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
    return ApiError(error.status_code, str(error.detail)).response()


def validation_error(details: Any) -> ApiError:
    """The first thing that pydantic found wrong, without the value that was wrong."""
    first = details[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "The body is not valid JSON.")
    name = str(first["loc"][0])[:100] if first["loc"] else None
    if name is None:
        return ApiError(400, f"Invalid body: {first['msg']}.")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {name}", name)
    if first["type"] == "missing":
        return ApiError(400, f"Missing required parameter: '{name}'.", name)
    return ApiError(400, f"Invalid value for '{name}': {first['msg']}.", name)
