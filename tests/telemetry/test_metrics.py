"""What the processes count, as Prometheus reads it."""

import re
from dataclasses import dataclass, field

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.telemetry.metrics import (
    EngineMetrics,
    IngressMetrics,
    RouterMetrics,
    new_registry,
)
from serving.telemetry.rank_metrics import RankMetrics


@dataclass
class Figures:
    compute_s: float
    wait_s: float
    exchange_s: float
    exchange_bytes: int
    samples: list = field(default_factory=list)


@dataclass
class Token:
    error: str | None = None


@pytest.fixture
def registry() -> CollectorRegistry:
    return new_registry()


def test_an_answered_request_shows_in_every_series_of_the_ingress(registry):
    metrics = IngressMetrics(registry)
    metrics.leased(0.004)
    metrics.prompt(100, 64)
    metrics.first_token(0.2)
    metrics.next_tokens(1, 0.02)
    assert registry.get_sample_value("expertline_streams_open") == 1
    metrics.released()
    metrics.answered("chat", 200, 0.3)
    metrics.disconnected("decode")
    value = registry.get_sample_value
    assert value("expertline_requests_total", {"endpoint": "chat", "code": "200"}) == 1
    assert value("expertline_tokens_total", {"kind": "prompt"}) == 100
    assert value("expertline_tokens_total", {"kind": "cached"}) == 64
    assert value("expertline_tokens_total", {"kind": "generated"}) == 2
    assert value("expertline_request_queue_seconds_bucket", {"le": "0.005"}) == 1
    assert value("expertline_request_queue_seconds_bucket", {"le": "0.002"}) == 0
    assert value("expertline_request_ttft_seconds_count") == 1
    assert value("expertline_request_itl_seconds_count") == 1
    assert value("expertline_request_e2e_seconds_sum") == 0.3
    assert value("expertline_streams_open") == 0
    assert value("expertline_disconnects_total", {"phase": "decode"}) == 1
    assert value("expertline_disconnects_total", {"phase": "queued"}) == 0


def test_the_router_counts_outcomes_and_shows_the_fleet(registry):
    metrics = RouterMetrics(registry)
    metrics.granted(0.1)
    metrics.refused("deadline")
    metrics.state(queued=3, reserved_tokens=500, ready=2, loading=1)
    value = registry.get_sample_value
    assert value("expertline_leases_total", {"outcome": "granted"}) == 1
    assert value("expertline_leases_total", {"outcome": "deadline"}) == 1
    assert value("expertline_leases_total", {"outcome": "full"}) == 0
    assert value("expertline_queue_requests") == 3
    assert value("expertline_fleet_engines", {"state": "loading"}) == 1
    assert value("expertline_reserved_tokens") == 500


def test_the_engine_shows_pages_by_column_and_state(registry):
    metrics = EngineMetrics(registry)
    metrics.step(0.012, 48)
    metrics.state(running=4, waiting=1, steps_in_flight=2)
    metrics.pages(1, held=10, remembered=5, free=49)
    metrics.prefix(128, 64)
    metrics.preempted()
    value = registry.get_sample_value
    assert value("expertline_pages", {"column": "1", "state": "remembered"}) == 5
    assert value("expertline_step_tokens_bucket", {"le": "64.0"}) == 1
    assert value("expertline_prefix_hit_tokens_total") == 64
    assert value("expertline_preemptions_total") == 1
    assert value("expertline_steps_in_flight") == 2


def test_a_ranks_series_carry_its_cell(registry):
    metrics = RankMetrics(registry, stage=1, rank=0)
    metrics.loaded(2.5, 4096)
    metrics.step(Figures(0.5, 0.25, 0.1, 1000))
    metrics.step(Figures(0.5, 0.25, 0.1, 1000, [Token(), Token("logits are NaN")]))
    cell = {"stage": "1", "rank": "0"}
    value = registry.get_sample_value
    assert value("expertline_stage_compute_seconds_total", cell) == 1.0
    assert value("expertline_stage_wait_seconds_total", cell) == 0.5
    assert value("expertline_exchange_bytes_total", cell) == 2000
    assert value("expertline_nan_rows_total", cell) == 1
    assert value("expertline_weight_load_seconds", cell) == 2.5
    assert value("expertline_cache_bytes", cell) == 4096


def test_all_names_are_prefixed_documented_and_distinct(registry):
    for metrics in (IngressMetrics, RouterMetrics, EngineMetrics):
        metrics(registry)  # a name that two classes share would raise here
    RankMetrics(registry, 0, 0)
    families = list(text_string_to_metric_families(generate_latest(registry).decode()))
    assert len(families) > 25
    for family in families:
        assert re.fullmatch(r"expertline_[a-z0-9_]+", family.name)
        assert family.documentation.endswith("."), family.name
        assert not family.name.endswith("_created")


def test_sub_second_buckets_are_dense(registry):
    metrics = IngressMetrics(registry)
    metrics.leased(0.0)
    (queue,) = (f for f in registry.collect() if f.name == "expertline_request_queue_seconds")
    bounds = [float(s.labels["le"]) for s in queue.samples if s.name.endswith("_bucket")]
    assert bounds == sorted(bounds)
    assert sum(bound <= 1.0 for bound in bounds) >= 16
