"""Percentiles, doubts, and what counts as a good run."""

import json

from loadtest.report import Distribution, summarize
from loadtest.request import RequestRecord


def record(number: int, sent_s: float, **changes) -> RequestRecord:
    fields = {
        "first_s": sent_s + 0.1,
        "last_s": sent_s + 0.5,
        "end_s": sent_s + 0.6,
        "status": 200,
        "output_tokens": 5,
        "finish_reason": "length",
    }
    return RequestRecord(number, "completion", float(number), sent_s, **(fields | changes))


def test_percentiles_are_values_that_occurred():
    distribution = Distribution.of(range(100, 0, -1))
    assert (distribution.p50, distribution.p90, distribution.p99) == (50, 90, 99)
    assert (distribution.max, distribution.mean, distribution.count) == (100, 50.5, 100)
    assert Distribution.of([3.0]).p99 == 3.0
    assert Distribution.of([]) == Distribution()


def test_times_count_from_the_intended_arrival():
    report = summarize({}, [record(0, 0.0), record(1, 3.0)], 1.0)
    assert report.distributions["ttft_s"].max == 2.1
    assert round(report.distributions["ttft_from_send_s"].max, 6) == 0.1
    assert round(report.distributions["time_per_output_token_s"].p50, 6) == 0.1


def test_a_client_that_fell_behind_makes_the_run_doubtful():
    report = summarize({}, [record(0, 0.0), record(1, 3.0)], 1.0)
    assert len(report.doubts) == 2
    assert not report.flawless
    assert summarize({}, [record(0, 0.001), record(1, 1.001)], 1.2).flawless


def test_failed_requests_are_counted_and_stay_out_of_the_percentiles():
    failed = record(1, 1.0, error="server", message="lost", first_s=900.0)
    report = summarize({}, [record(0, 0.0), failed], 2.0)
    assert report.distributions["ttft_s"].count == 1
    assert report.errors["server"].example == "lost"
    assert not report.flawless


def test_a_run_without_requests_is_a_report_too():
    report = summarize({"rate": 0.1}, [], 0.0)
    assert json.loads(report.to_json())["requests"] == 0
