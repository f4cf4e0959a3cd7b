"""The OpenAPI document is valid, whole, and true of what the server answers."""

import json
from typing import Any

import jsonschema
import pytest
from fastapi.routing import APIRoute
from pydantic import BaseModel

from serving.api import schemas
from serving.api.endpoints import ENDPOINTS, Endpoint
from serving.api.openapi import document
from tests.ingress.stack import stack
from tests.ingress.test_routes import CHAT, COMPLETION, SCRIPT, events

DOCUMENT = document("1.0")
BODIES: dict[str, dict[str, Any]] = {
    "completions": COMPLETION | {"logprobs": 2, "echo": True, "return_token_ids": True},
    "chat": CHAT | {"logprobs": True, "top_logprobs": 2},
    "responses": {"model": "nano", "input": "hi"},
    "messages": {"model": "nano", "messages": CHAT["messages"], "max_tokens": 20},
    "count_tokens": {"model": "nano", "messages": CHAT["messages"]},
    "tokenize": {"prompt": "hi", "return_token_strs": True},
    "detokenize": {"tokens": [1, 2]},
}
PATHS = {"model": "/v1/models/nano", "stored_response": "/v1/responses/resp_1",
         "delete_response": "/v1/responses/resp_1"}  # fmt: skip


def validate(body: Any, schema: dict[str, Any]) -> None:
    whole = {**schema, "components": DOCUMENT["components"]}
    jsonschema.Draft202012Validator(whole).validate(body)


def operation(endpoint: Endpoint) -> dict[str, Any]:
    found: dict[str, Any] = DOCUMENT["paths"][endpoint.path][endpoint.method.lower()]
    return found


def test_every_schema_is_valid_and_every_reference_leads_somewhere() -> None:
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    text = json.dumps(DOCUMENT)
    for reference in {part.partition('"')[0] for part in text.split('"$ref": "')[1:]}:
        place: Any = DOCUMENT
        for key in reference.removeprefix("#/").split("/"):
            place = place[key]
    ids = [o["operationId"] for path in DOCUMENT["paths"].values() for o in path.values()]
    assert len(ids) == len(set(ids)) == len(ENDPOINTS)


async def test_every_route_is_in_the_document_and_the_other_way_round() -> None:
    async with stack(SCRIPT) as it:
        routes = {
            (method, route.path.replace(":path", ""))
            for route in it.app.routes
            if isinstance(route, APIRoute) and route.include_in_schema
            for method in route.methods
        }
        served = (await it.http.get("/openapi.json")).json()
    assert routes - {("GET", "/openapi.json")} == {(e.method, e.path) for e in ENDPOINTS}
    assert served["paths"] == DOCUMENT["paths"]


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: f"{e.method} {e.path}")
async def test_answers_have_the_documented_shape(endpoint: Endpoint) -> None:
    async with stack(SCRIPT) as it:
        path = PATHS.get(endpoint.name, endpoint.path)
        body = BODIES.get(endpoint.name)
        answers = [await it.http.request(endpoint.method, path, json=body)]
        if endpoint.body is not None:
            broken = {**(body or {}), "no_such_field": 1}
            answers.append(await it.http.request(endpoint.method, path, json=broken))
            answers.append(await it.http.request(endpoint.method, path, content=b"{"))
    for answer in answers:
        documented = operation(endpoint)["responses"][str(answer.status_code)]["content"]
        media_type = answer.headers["content-type"].partition(";")[0]
        schema = documented[media_type]["schema"]
        validate(answer.json() if media_type == "application/json" else answer.text, schema)
    assert {answer.status_code for answer in answers[1:]} <= {400}


@pytest.mark.parametrize(
    ("path", "body", "shape"),
    [
        ("/v1/completions", BODIES["completions"], schemas.Completion),
        ("/v1/chat/completions", BODIES["chat"], schemas.ChatChunk),
    ],
)
async def test_chunks_have_their_shape(
    path: str, body: dict[str, Any], shape: type[BaseModel]
) -> None:
    async with stack(SCRIPT) as it:
        streamed = body | {"stream": True, "stream_options": {"include_usage": True}}
        response = await it.http.post(path, json=streamed)
    *chunks, done = events(response)
    assert done == "[DONE]"
    for chunk in chunks:
        shape.model_validate(chunk)


@pytest.mark.parametrize("name", BODIES)
async def test_what_the_document_refuses_the_server_refuses(name: str) -> None:
    (endpoint,) = [each for each in ENDPOINTS if each.name == name]
    schema = operation(endpoint)["requestBody"]["content"]["application/json"]["schema"]
    validate(BODIES[name], schema)
    async with stack(SCRIPT) as it:
        for field in BODIES[name]:
            broken = BODIES[name] | {field: {"of": ["another", "kind"]}}
            with pytest.raises(jsonschema.ValidationError):
                validate(broken, schema)
            assert (await it.http.post(endpoint.path, json=broken)).status_code == 400
