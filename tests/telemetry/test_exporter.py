"""Metrics over HTTP, discovery files, and the merged exposition."""

import json
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from serving.telemetry.exporter import MetricsExporter, merge_expositions
from serving.telemetry.metrics import new_registry
from serving.telemetry.rank_metrics import RankMetrics

LOCAL = "127.0.0.1"


def exposition(requests: int, note: str = "plain") -> str:
    registry = CollectorRegistry()
    Counter("served", "What was\nserved.", ["note"], registry=registry).labels(note).inc(requests)
    Histogram("took_seconds", "Time.", buckets=(0.1, 1), registry=registry).observe(0.5)
    Gauge("depth", "Depth.", registry=registry).set(7)
    return generate_latest(registry).decode()


def parsed(text: str) -> dict:
    """Families by name; fails if a family comes twice."""
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {family.name: family for family in families}


def test_a_scrape_gives_the_registrys_metrics(tmp_path: Path):
    registry = new_registry()
    exporter = MetricsExporter(registry, LOCAL, tmp_path / "targets", {"process": "rank"})
    RankMetrics(registry, 0, 1).loaded(1.5, 64)
    with urllib.request.urlopen(f"http://{exporter.address}/metrics", timeout=60) as answer:
        families = parsed(answer.read().decode())
    assert families["expertline_cache_bytes"].samples[0].value == 64
    assert "expertline_process_cpu_seconds" in families
    exporter.close()


def test_the_discovery_file_names_the_target_and_goes_with_it(tmp_path: Path):
    labels = {"process": "rank", "cell": "1.0"}
    exporter = MetricsExporter(new_registry(), LOCAL, tmp_path, labels)
    (path,) = tmp_path.iterdir()
    assert path.suffix == ".json"
    assert json.loads(path.read_text()) == [{"targets": [exporter.address], "labels": labels}]
    exporter.close()
    exporter.close()
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://{exporter.address}/metrics", timeout=60)


def test_files_that_killed_processes_left_are_withdrawn(tmp_path: Path):
    alive = MetricsExporter(new_registry(), LOCAL, tmp_path, {})
    gone = MetricsExporter(new_registry(), LOCAL, tmp_path, {})
    left = next(p for p in tmp_path.iterdir() if gone.address.replace(":", "-") in p.name)
    content = left.read_text()
    gone.close()
    left.write_text(content)
    foreign = tmp_path / "10.9.8.7-1.json"
    foreign.write_text("[]")
    new = MetricsExporter(new_registry(), LOCAL, tmp_path, {})
    names = {path.stem for path in tmp_path.iterdir()}
    assert names == {*(e.address.replace(":", "-") for e in (alive, new)), "10.9.8.7-1"}
    alive.close()
    new.close()


def test_families_of_several_processes_become_one_with_the_labels_added():
    text = merge_expositions(
        [({"instance": "a:1"}, exposition(2)), ({"instance": "b:2"}, exposition(3))]
    )
    families = parsed(text)
    assert text.count("# TYPE served_total counter") == 1
    assert text.count("# HELP served_total What was\\nserved.") == 1
    served = {s.labels["instance"]: s.value for s in families["served"].samples if s.value < 100}
    assert served == {"a:1": 2, "b:2": 3}
    buckets = [s for s in families["took_seconds"].samples if s.name.endswith("_bucket")]
    assert [s.value for s in buckets] == [0, 1, 1, 0, 1, 1]
    assert families["expertline_targets_skipped"].samples[0].value == 0


def test_label_values_survive_escaping_and_own_labels_win():
    odd = 'a "quoted" \\ back\nslash'
    labels = {"where": odd, "note": "added"}
    families = parsed(merge_expositions([(labels, exposition(1, note=odd))]))
    (sample,) = (s for s in families["served"].samples if s.name == "served_total")
    assert sample.labels == {"where": odd, "note": odd}


@pytest.mark.parametrize(
    "garbage",
    ["", "<html><body>502</body></html>", "hello", 'x{a="b" 1', "\x00\x01", "# TYPE depth"],
)
def test_garbage_is_skipped_and_counted(garbage: str):
    families = parsed(merge_expositions([({"i": "1"}, garbage), ({"i": "2"}, exposition(4))]))
    skipped = families["expertline_targets_skipped"].samples[0].value
    assert skipped == 1
    assert families["depth"].samples[0].labels == {"i": "2"}


def test_a_text_that_contradicts_a_type_is_left_out_whole():
    other = "# TYPE depth counter\ndepth_total 1\n# TYPE more gauge\nmore 1\n"
    families = parsed(merge_expositions([({"i": "1"}, exposition(1)), ({"i": "2"}, other)]))
    assert families["expertline_targets_skipped"].samples[0].value == 1
    assert "more" not in families


def test_nothing_merges_to_a_valid_exposition():
    assert set(parsed(merge_expositions([]))) == {"expertline_targets_skipped"}
