"""A counter for what happens thousands of times a second."""

from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector


class LoopCounter(Collector):
    """Like prometheus_client's with one label, but for updates from one thread only, without
    its locks.

    Attributes:
        counts: by the label's values; who counts adds to them.
    """

    def __init__(
        self,
        name: str,
        help_text: str,
        label: str,
        values: Sequence[str],
        registry: CollectorRegistry,
    ) -> None:
        self.counts = dict.fromkeys(values, 0)
        self._name = name
        self._help = help_text
        self._label = label
        registry.register(self)

    def collect(self) -> Iterator[CounterMetricFamily]:
        family = CounterMetricFamily(self._name, self._help, labels=[self._label])
        for value, count in self.counts.items():
            family.add_metric([value], count)
        yield family
