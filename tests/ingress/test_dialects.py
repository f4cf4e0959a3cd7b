"""Responses and messages over the whole ingress: the same generation in other shapes."""

import json
from typing import Any

import httpx
import pytest

from tests.ingress.stack import stack
from tests.ingress.test_routes import SCRIPT, TEXT

RESPONSE = {"model": "nano", "input": "hi", "max_output_tokens": 50}
MESSAGE = {"model": "nano", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 50}


def named_events(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    found = []
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


async def test_a_response_has_the_text_whole_and_in_events() -> None:
    async with stack(SCRIPT) as it:
        whole = (await it.http.post("/v1/responses", json=RESPONSE)).json()
        streamed = await it.http.post("/v1/responses", json=RESPONSE | {"stream": True})
        await it.quiet()
    assert whole["output"][0]["content"][0]["text"] == TEXT
    assert (whole["status"], whole["store"]) == ("completed", False)
    events = named_events(streamed)
    deltas = [e["delta"] for name, e in events if name == "response.output_text.delta"]
    assert "".join(deltas) == TEXT
    assert events[-1][0] == "response.completed"
    assert [e["sequence_number"] for _, e in events] == list(range(len(events)))


async def test_a_message_has_the_text_whole_and_in_events() -> None:
    async with stack(SCRIPT) as it:
        whole = (await it.http.post("/v1/messages", json=MESSAGE)).json()
        streamed = await it.http.post("/v1/messages", json=MESSAGE | {"stream": True})
        count = await it.http.post(
            "/v1/messages/count_tokens", json={k: MESSAGE[k] for k in ("model", "messages")}
        )
        await it.quiet()
    assert whole["content"] == [{"type": "text", "text": TEXT}]
    assert whole["stop_reason"] == "end_turn"
    usage = whole["usage"]
    prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert count.json() == {"input_tokens": prompt}
    events = named_events(streamed)
    deltas = [e["delta"]["text"] for name, e in events if name == "content_block_delta"]
    assert "".join(deltas) == TEXT
    assert events[0][1]["message"]["usage"]["input_tokens"] == prompt
    assert events[-1][0] == "message_stop"


@pytest.mark.parametrize("path", ["/v1/messages", "/v1/messages/count_tokens"])
async def test_errors_of_messages_have_their_own_shape(path: str) -> None:
    async with stack(SCRIPT) as it:
        for body, status, kind in (
            (MESSAGE | {"speed_of_light": 1}, 400, "invalid_request_error"),
            ({"model": "other", "messages": MESSAGE["messages"]}, 400, "invalid_request_error")
            if path == "/v1/messages"
            else ({"model": "x", "messages": MESSAGE["messages"]}, 404, "not_found_error"),
        ):
            response = await it.http.post(path, json=body)
            assert response.status_code == status
            assert response.json()["type"] == "error"
            assert response.json()["error"]["type"] == kind


async def test_storing_is_off_unless_it_is_set() -> None:
    async with stack(SCRIPT) as it:
        for field in ({"store": True}, {"previous_response_id": "resp_1"}):
            response = await it.http.post("/v1/responses", json=RESPONSE | field)
            assert response.status_code == 400
            assert response.json()["error"]["param"] in field
        assert (await it.http.get("/v1/responses/resp_1")).status_code == 404


async def test_a_stored_response_goes_on_can_be_read_and_deleted() -> None:
    async with stack(SCRIPT, stored_responses=2) as it:
        first = (await it.http.post("/v1/responses", json=RESPONSE)).json()
        follow = RESPONSE | {"previous_response_id": first["id"], "input": "and then?"}
        second = (await it.http.post("/v1/responses", json=follow)).json()
        assert second["usage"]["input_tokens"] > first["usage"]["input_tokens"] + 5
        prompt = it.service.tokenizer.decode(it.engine.calls[-1].request().prompt)
        assert TEXT in prompt
        path = f"/v1/responses/{first['id']}"
        assert (await it.http.get(path)).json() == first
        assert (await it.http.delete(path)).json()["deleted"] is True
        assert (await it.http.get(path)).status_code == 404


async def test_a_key_of_anthropics_header_is_taken(tmp_path: Any) -> None:
    keys = tmp_path / "keys"
    keys.write_text("team:a-long-secret\n")
    async with stack(SCRIPT, api_keys_file=str(keys)) as it:
        refused = await it.http.post("/v1/messages", json=MESSAGE)
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "authentication_error"
        headers = {"x-api-key": "a-long-secret"}
        answer = await it.http.post("/v1/messages", json=MESSAGE, headers=headers)
        assert answer.status_code == 200
