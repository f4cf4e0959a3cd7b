"""Open-loop runs against a server that behaves, and against servers that do not."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator

import pytest
from fastapi.responses import JSONResponse, StreamingResponse
from rich.console import Console

from loadtest.report import LoadReport
from loadtest.runner import LoadError, LoadPlan, run_load
from tests.loadtest.stub import GOOD, Stub, chunk, running, usage


@pytest.fixture
def stub() -> Iterator[Stub]:
    with running(Stub()) as server:
        yield server


def plan(stub: Stub, **changes) -> LoadPlan:
    return LoadPlan(**{"url": stub.url, "rate": 100.0, "requests": 6, **changes})


def shown(report: LoadReport) -> str:
    console = Console(width=120, force_terminal=False)
    with console.capture() as capture:
        console.print(report.render())
    return capture.get()


def test_a_good_run_counts_tokens_as_the_server_does(stub: Stub):
    report = run_load(plan(stub, max_tokens=9, api_key="key-1"))
    assert (report.requests, report.succeeded, report.errors) == (6, 6, {})
    assert (report.prompt_tokens, report.output_tokens) == (42, 36)
    assert report.finish_reasons == {"stop": 6}
    times = report.distributions
    assert times["ttft_s"].count == times["itl_s"].count == 6  # two chunks with text, one gap
    assert times["itl_s"].p50 > 0  # chunks that a pause delayed may be read together
    assert times["e2e_s"].p50 > times["itl_s"].p50
    assert times["e2e_s"].p50 >= times["e2e_from_send_s"].p50 > 0.03
    assert times["time_per_output_token_s"].p50 == pytest.approx(times["itl_s"].p50 / 5)
    assert set(stub.paths) == {"completions"}
    body = stub.bodies[0]
    assert (body["model"], body["max_tokens"], body["stream"]) == ("stub-model", 9, True)
    assert body["stream_options"] == {"include_usage": True}
    assert stub.headers[0]["authorization"] == "Bearer key-1"


def test_the_report_as_json_has_a_schema_and_no_key(stub: Stub):
    report = run_load(plan(stub, model="given", requests=2, api_key="secret-key"))
    assert "secret-key" not in report.to_json()
    assert "secret-key" not in repr(plan(stub, api_key="secret-key"))
    content = json.loads(report.to_json())
    assert content["schema"] == "expertline.loadtest/1"
    assert content["config"]["model"] == "given"
    assert content["machine"]["cpus"] >= 1
    assert "httpx" in content["versions"]
    assert set(content["distributions"]["ttft_s"]) == {
        "count", "mean", "p50", "p90", "p95", "p99", "max",
    }  # fmt: skip
    assert [record["number"] for record in content["records"]] == [0, 1]
    assert "gaps_s" not in content["records"][0]


def test_chat_requests_carry_messages(stub: Stub):
    run_load(plan(stub, endpoint="chat", requests=2, url=f"{stub.url}/v1/"))
    assert set(stub.paths) == {"chat/completions"}
    assert stub.bodies[0]["messages"][0]["role"] == "user"


def test_the_same_seed_sends_the_same_prompts_at_the_same_times(stub: Stub):
    run_load(plan(stub, requests=4, seed=5))
    run_load(plan(stub, requests=4, seed=5))
    run_load(plan(stub, requests=4, seed=6))
    prompts = [sorted(body["prompt"] for body in stub.bodies[i : i + 4]) for i in (0, 4, 8)]
    assert prompts[0] == prompts[1] != prompts[2]
    assert plan(stub, seed=5).arrivals() == plan(stub, seed=5).arrivals()


def test_answers_that_wait_do_not_hold_the_arrivals_back(stub: Stub):
    """No answer ends before the last request came: only an open loop gets that far."""
    requests = 20
    everyone = asyncio.Event()

    async def held() -> AsyncIterator[str]:
        yield f"data: {chunk('x')}\n\n"
        await everyone.wait()
        for event in GOOD[2:]:
            if isinstance(event, str):
                yield f"data: {event}\n\n"

    def script(number: int) -> StreamingResponse:
        if number == requests - 1:
            everyone.set()
        return StreamingResponse(held(), media_type="text/event-stream")

    stub.script = script
    report = run_load(plan(stub, rate=40.0, requests=requests, timeout_s=60.0))
    assert report.succeeded == requests, report.errors


BAD = {
    "an event after [DONE]": [*GOOD, chunk("more")],
    "ended without [DONE]": GOOD[:-1],
    "choice 0 has no finish_reason": [chunk("x"), usage(), "[DONE]"],
    "choice 0 goes on after its finish_reason": [chunk("x", "stop"), chunk("", "stop"), "[DONE]"],
    "choice 1 has no finish_reason": [chunk("x", "stop"), chunk("y", index=1), usage(), "[DONE]"],
    "id changed": [chunk("x"), chunk("y", id="cmpl-2")],
    "not JSON": ["{"],
    "not an object": ["[]"],
    "without choices": [json.dumps({"id": "cmpl-1"})],
    "without index": [json.dumps({"id": "cmpl-1", "choices": [{"text": "x"}]})],
    "without token counts": [chunk("x", usage={"prompt_tokens": 1})],
    "no usage": [chunk("x", "stop"), "[DONE]"],
    "no choices": [usage(), "[DONE]"],
    "usage went down": [chunk("x", "stop"), usage(1, 5), usage(1, 4), "[DONE]"],
}


def test_every_violation_of_the_grammar_is_found(stub: Stub):
    expected = list(BAD)
    stub.script = lambda number: BAD[expected[number]]
    report = run_load(plan(stub, requests=len(BAD)))
    assert report.succeeded == 0
    assert report.errors["grammar"].count == len(BAD)
    said = sorted(record.message for record in report.records)
    assert all(any(want in message for message in said) for want in expected), said
    assert report.distributions["ttft_s"].count == 0
    assert "grammar" in shown(report)


def test_failures_are_told_apart_by_kind(stub: Stub):
    error = JSONResponse({"error": {"message": "slow down"}}, status_code=429)
    reported = [chunk("x"), json.dumps({"error": {"message": "lost"}}), "[DONE]"]
    answers = [error, reported, JSONResponse({"choices": []}), GOOD]
    stub.script = lambda number: answers[number % 4]
    report = run_load(plan(stub, requests=4))
    assert {kind: error.count for kind, error in report.errors.items()} == {
        "http_429": 1,
        "server": 1,
        "grammar": 1,
    }
    assert "slow down" in report.errors["http_429"].example
    assert report.errors["server"].example == "lost"
    assert "content-type" in report.errors["grammar"].example
    assert report.succeeded == 1
    assert not report.flawless


def test_a_stream_that_hangs_is_cut_at_the_timeout(stub: Stub):
    stub.script = lambda number: [chunk("x"), 300.0]
    report = run_load(plan(stub, requests=2, timeout_s=0.5))
    assert report.errors["timeout"].count == 2
    assert report.seconds < 100


def test_a_server_that_is_not_there(stub: Stub):
    nowhere = "http://127.0.0.1:9"
    with pytest.raises(LoadError, match="tells no model"):
        run_load(plan(stub, url=nowhere))
    report = run_load(plan(stub, url=nowhere, model="m", requests=2))
    assert report.errors["connection"].count == 2


def test_a_run_by_duration_offers_its_rate(stub: Stub):
    ended = []
    report = run_load(
        plan(stub, requests=None, duration_s=0.5, rate=40.0),
        progress=lambda sent, done, total: ended.append((sent, done, total)),
    )
    assert report.requests == len(stub.bodies) == report.succeeded
    assert report.offered_rate == pytest.approx(report.requests / 0.5)
    assert ended[-1] == (report.requests,) * 3
    text = shown(report)
    assert f"{report.requests} of {report.requests} requests succeeded" in text
    assert "time per output token ms" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"requests": None},
        {"duration_s": 1.0},
        {"rate": 0.0},
        {"rate": float("nan")},
        {"max_tokens": -1},
        {"requests": 10_000_000},
        {"url": "localhost:8000"},
        {"endpoint": "images"},
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes):
    with pytest.raises(LoadError):
        LoadPlan(**{"url": "http://127.0.0.1:1", "requests": 1, **changes})
