"""How a process's metrics get out: one port per process, found by file, merged on request.

A scrape through a load balancer would answer for one random process, so every process serves
its own. Prometheus finds them by a file in a folder that it watches (`file_sd_configs`); who
wants the whole system at one address merges the texts.
"""

import json
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, Metric, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

_ANSWERS_WITHIN_S = 0.5


class MetricsExporter:
    """Serves one registry over HTTP on a port of its own, and says so in a discovery file.

    Args:
        registry: what to serve.
        host: the address to serve on, as Prometheus reaches it.
        directory: where discovery files lie; made if it is not there.
        labels: what Prometheus is to add to this target's series.

    Raises:
        OSError: the address is not this machine's, or the directory cannot be written.
    """

    def __init__(
        self, registry: CollectorRegistry, host: str, directory: Path, labels: dict[str, str]
    ) -> None:
        self._server, self._thread = start_http_server(0, host, registry)
        self.address = _joined(host, self._server.server_port)
        self._file = directory / f"{self.address.replace(':', '-')}.json"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _remove_dead_targets(directory, host)
            _write(self._file, [{"targets": [self.address], "labels": labels}])
        except OSError:
            self.close()
            raise

    def close(self) -> None:
        """Stops serving and withdraws the discovery file; again is of no effect."""
        self._file.unlink(missing_ok=True)
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def merge_expositions(texts: Iterable[tuple[dict[str, str], str]]) -> str:
    """Several processes' text expositions as one, each family's samples together.

    The labels given with a text are added to all its samples, which keep what labels they have;
    they must tell the texts apart. A text that is empty or no exposition, or that contradicts
    the type of a family, is left out whole and counted in `expertline_targets_skipped`.
    """
    merged: dict[str, Metric] = {}
    skipped = 0
    for labels, text in texts:
        try:
            families = list(text_string_to_metric_families(text))
            if not families:
                raise ValueError("no families")
            if any(_contradicts(merged.get(family.name), family) for family in families):
                raise ValueError("a family has another type here")
        except (ValueError, KeyError, IndexError):  # what the parser meets garbage with
            skipped += 1
            continue
        for family in families:
            samples = [sample._replace(labels=labels | sample.labels) for sample in family.samples]
            whole = merged.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            whole.samples.extend(samples)
    return generate_latest(_Merged(merged, skipped)).decode()


class _Merged(Collector):
    """The merged families, as the library's writer wants them."""

    def __init__(self, families: dict[str, Metric], skipped: int) -> None:
        self._families = families
        self._skipped = skipped

    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()
        count = Metric(
            "expertline_targets_skipped", "Processes whose metrics could not be read.", "gauge"
        )
        count.add_sample(count.name, {}, self._skipped)
        yield count


def _contradicts(known: Metric | None, family: Metric) -> bool:
    return known is not None and known.type != family.type


def _remove_dead_targets(directory: Path, host: str) -> None:
    """Withdraws what killed processes of this host have left behind."""
    for path in directory.glob(f"{_joined(host, 0).removesuffix('0').replace(':', '-')}*.json"):
        port = path.stem.rpartition("-")[2]
        try:
            socket.create_connection((host, int(port)), _ANSWERS_WITHIN_S).close()
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except (OSError, ValueError):
            continue  # slow, or not ours: not known to be dead


def _joined(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _write(path: Path, content: object) -> None:
    """All or nothing, for whoever watches the directory."""
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(content), encoding="utf-8")
    draft.replace(path)
