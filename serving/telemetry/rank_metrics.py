"""The metrics of a rank: where its time goes."""

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge


class Sampled(Protocol):
    """A sequence's new token, or why it has none."""

    error: str | None


class StepFigures(Protocol):
    """What a rank measured of one step."""

    compute_s: float
    wait_s: float
    exchange_s: float
    exchange_bytes: int

    @property
    def samples(self) -> Sequence[Sampled]: ...


class RankMetrics:
    """Where the time of one rank goes. Stage and rank are labels, so that cells can be summed."""

    def __init__(self, registry: CollectorRegistry, stage: int, rank: int) -> None:
        def counter(name: str, documentation: str) -> Counter:
            metric = Counter(name, documentation, ["stage", "rank"], registry=registry)
            return metric.labels(str(stage), str(rank))

        def gauge(name: str, documentation: str) -> Gauge:
            metric = Gauge(name, documentation, ["stage", "rank"], registry=registry)
            return metric.labels(str(stage), str(rank))

        self._compute = counter(
            "expertline_stage_compute_seconds_total",
            "In the layers of this stage, expert exchange included.",
        )
        self._wait = counter(
            "expertline_stage_wait_seconds_total",
            "Waiting for the previous stage's hidden states: the pipeline's bubble.",
        )
        self._exchange = counter(
            "expertline_exchange_seconds_total",
            "In expert exchanges, waiting for the other ranks of the stage included.",
        )
        self._exchange_bytes = counter(
            "expertline_exchange_bytes_total", "Sent to other ranks in expert exchanges."
        )
        self._nan_rows = counter(
            "expertline_nan_rows_total", "Sequences that failed for logits that are no numbers."
        )
        self._load = gauge("expertline_weight_load_seconds", "It took to load this rank's weights.")
        self._cache = gauge("expertline_cache_bytes", "Memory of this rank's latent cache.")

    def loaded(self, seconds: float, cache_bytes: int) -> None:
        """The rank is ready."""
        self._load.set(seconds)
        self._cache.set(cache_bytes)

    def step(self, figures: StepFigures) -> None:
        """The rank has done one step."""
        self._compute.inc(figures.compute_s)
        self._wait.inc(figures.wait_s)
        self._exchange.inc(figures.exchange_s)
        self._exchange_bytes.inc(figures.exchange_bytes)
        self._nan_rows.inc(sum(sample.error is not None for sample in figures.samples))
