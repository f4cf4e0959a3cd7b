"""The OpenAPI document, made from the table of endpoints and the models behind it."""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.api.endpoints import ENDPOINTS, Endpoint

_REFERENCE = "#/components/schemas/{model}"
_References = Mapping[type[BaseModel], Mapping[str, Any]]
_MEANINGS = {
    400: "The request cannot be honoured; the message says what to change.",
    401: "The API key is missing or unknown.",
    404: "No such model or response.",
    413: "The body is too long.",
    429: "Too many requests wait; retry-after says when to come again.",
    500: "The server failed.",
    503: "No engine can serve this now; retry-after says when to come again.",
}


def document(version: str) -> dict[str, Any]:
    """OpenAPI 3.1 for this server.

    Args:
        version: of the server.
    """
    shapes = {model for e in ENDPOINTS for model in (e.body, e.answer, e.error) if model}
    in_order = sorted(shapes, key=lambda model: f"{model.__module__}.{model.__name__}")
    references, definitions = models_json_schema(
        [(model, "validation") for model in in_order], ref_template=_REFERENCE
    )
    of = {model: references[model, "validation"] for model in in_order}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in ENDPOINTS:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, of)
    return {
        "openapi": "3.1.0",
        "info": {"title": "Expertline", "version": version},
        "paths": paths,
        "components": {
            "schemas": definitions["$defs"],
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(endpoint: Endpoint, of: _References) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": f"{endpoint.method.lower()}{re.sub('[^a-z]+', '_', endpoint.path)}",
        "summary": endpoint.summary,
        "security": [] if endpoint.public else [{"key": []}],
        "responses": {
            "200": {"description": "The answer.", "content": _answers(endpoint, of)},
            **{str(status): _failure(endpoint, status, of) for status in endpoint.errors},
        },
    }
    if "{name}" in endpoint.path:
        name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
        operation["parameters"] = [name]
    if endpoint.body is not None:
        content = {"application/json": {"schema": of[endpoint.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation


def _answers(endpoint: Endpoint, of: _References) -> dict[str, Any]:
    if endpoint.answer is None:
        return {"text/plain": {"schema": {"type": "string"}}}
    answers: dict[str, Any] = {"application/json": {"schema": of[endpoint.answer]}}
    if endpoint.streams:
        answers["text/event-stream"] = {}
    return answers


def _failure(endpoint: Endpoint, status: int, of: _References) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": of[endpoint.error]}}
    if endpoint.answer is None:
        content = {"text/plain": {"schema": {"type": "string"}}}
    return {"description": _MEANINGS[status], "content": content}
