"""Structured output from a real cluster, at temperature 1 from a model that knows no JSON."""

import asyncio
import json
from decimal import Decimal
from typing import Any

import jsonschema
import openai
import pytest

from tests.cluster.server import Server

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

NAME = {"type": "string", "maxLength": 12}
SMALL = {"type": "integer", "minimum": -1000, "maximum": 1000}
POINT = {
    "type": "object",
    "properties": {"x": SMALL, "y": SMALL},
    "required": ["x", "y"],
    "additionalProperties": False,
}
# From a single word to references. Texts and numbers are bounded: without that, a toy of a model
# may write digits for as long as it is let.
SCHEMAS: list[dict[str, Any]] = [
    {"enum": ["red", "green", "blue"]},
    {"type": "integer", "minimum": -50, "maximum": 1000},
    {"type": "object", "properties": {"name": NAME}, "required": ["name"],
     "additionalProperties": False},
    POINT,
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 5},
    {"type": "object", "properties": {
        "points": {"type": "array", "items": POINT, "maxItems": 3},
        "kind": {"enum": ["line", "area"]}, "closed": {"type": ["boolean", "null"]}},
     "required": ["points", "kind", "closed"], "additionalProperties": False},
    {"anyOf": [POINT, {"type": "object", "properties": {"name": NAME}, "required": ["name"],
                       "additionalProperties": False}]},
    {"type": "object", "properties": {
        "id": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{4}$"},
        "date": {"type": "string", "format": "date"},
        "score": {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.01}},
     "required": ["id", "date", "score"], "additionalProperties": False},
    {"type": "object", "properties": {
        "user": {"type": "object", "properties": {
            "name": NAME, "emails": {"type": "array", "maxItems": 2, "items": NAME},
            "address": {"type": "object", "properties": {"street": NAME, "at": POINT},
                        "required": ["street", "at"], "additionalProperties": False}},
            "required": ["name", "emails", "address"], "additionalProperties": False}},
     "required": ["user"], "additionalProperties": False},
    {"$defs": {"tree": {"type": "object", "properties": {
        "value": {"type": "integer", "minimum": 0, "maximum": 99},
        "children": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 3}},
        "required": ["value", "children"], "additionalProperties": False},
        "leaf": {"type": "object", "properties": {"value": {"type": "integer", "minimum": 0,
                                                            "maximum": 99}},
                 "required": ["value"], "additionalProperties": False}},
     "$ref": "#/$defs/tree"},
]  # fmt: skip
RUNS = 8  # of each schema, streaming and not


async def answer(
    client: openai.AsyncOpenAI, schema: dict[str, Any], seed: int, stream: bool
) -> str:
    wanted: dict[str, Any] = {
        "model": "nano",
        "messages": [{"role": "user", "content": "Give me one."}],
        "temperature": 1.0,
        "seed": seed,
        "max_tokens": 600,
        "response_format": {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}},
    }
    if not stream:
        whole = await client.chat.completions.create(**wanted)
        assert whole.choices[0].finish_reason == "stop"
        return whole.choices[0].message.content or ""
    text, reasons = "", []
    async for chunk in await client.chat.completions.create(**wanted, stream=True):
        text += chunk.choices[0].delta.content or ""
        reasons.append(chunk.choices[0].finish_reason)
    assert reasons[-1] == "stop"
    return text


def exactly(text: str) -> Any:
    """JSON with numbers as they are written: as binary ones 0.56 is no multiple of 0.01."""
    return json.loads(text, parse_float=Decimal)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streaming"])
async def test_every_answer_parses_and_follows_its_schema(server: Server, stream: bool) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=300
    ) as client:
        wanted = [(schema, seed) for schema in SCHEMAS for seed in range(RUNS)]
        texts = await asyncio.gather(*(answer(client, *each, stream) for each in wanted))
    assert len(texts) == len(SCHEMAS) * RUNS
    for (schema, _), text in zip(wanted, texts, strict=True):
        jsonschema.validate(exactly(text), exactly(json.dumps(schema)))
    assert len(set(texts)) > 40  # it is not always the same one
