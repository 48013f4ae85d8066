"""The text of /metrics: what prometheus-client would write of everything at once, with less work."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from dicomnode import metrics, metrics_push, metrics_told
from dicomnode.admin import metrics_page
from dicomnode.admin.metrics_page import blocks, page, told

HOSTILE = 'a"b\\c\n# HELP evil x\nevil 1'


def gauge(name: str, *values: tuple[str, float]) -> Metric:
    family = GaugeMetricFamily(name, "text \\ with\nan end", labels=("peer",))
    for peer, value in values:
        family.add_metric((peer,), value)
    return family


def everything() -> list[Metric]:
    info = InfoMetricFamily("dicomnode_build", "versions")
    info.add_metric((), {"version": "1"})
    counter = CounterMetricFamily("dicomnode_try", "a counter", labels=("outcome",))
    counter.add_metric(("ok",), 3.0)
    histogram = HistogramMetricFamily("dicomnode_seconds", "a histogram")
    histogram.add_metric((), [("0.1", 1.0), ("+Inf", 2.0)], 0.3)
    return [info, counter, histogram, gauge("dicomnode_empty"), gauge("dicomnode_one", (HOSTILE, float("inf")))]


def rendered(families: Iterable[Metric]) -> str:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(metrics_page._Fixed(families))
    return generate_latest(registry).decode()


def test_blocks_are_the_whole_page() -> None:
    assert page([blocks(everything())]).decode() == rendered(everything())
    assert page([blocks([])]) == b""


def test_a_family_of_several_processes_stands_once() -> None:
    one, two = gauge("dicomnode_one", ("a", 1.0)), gauge("dicomnode_one", (HOSTILE, 2.0), ("c", 3.0))
    together = gauge("dicomnode_one", ("a", 1.0), (HOSTILE, 2.0), ("c", 3.0))
    text = page([blocks([one]), blocks([gauge("dicomnode_empty")]), blocks([two])]).decode()
    assert text == rendered([together, gauge("dicomnode_empty")])
    [family] = [f for f in text_string_to_metric_families(text) if f.samples]
    assert {s.labels["peer"] for s in family.samples} == {"a", HOSTILE, "c"}


def test_what_a_process_told_is_rendered_once_for_each_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    real = metrics_told.families

    def families(snapshots: dict[str, str], registry: CollectorRegistry) -> list[Metric]:
        asked.extend(snapshots)
        return real(snapshots, registry)

    monkeypatch.setattr(metrics_told, "families", families)
    told.cache_clear()
    metrics.stored(0xA900, 0.1, 10)
    before = metrics.snapshot()
    assert told("receiver-1", before) == told("receiver-1", before) and asked == ["receiver-1"]
    assert told("receiver-2", before) != told("receiver-1", before)
    metrics.stored(0xA900, 0.1, 10)
    assert told("receiver-1", metrics.snapshot()) != told("receiver-1", before)
    assert asked == ["receiver-1", "receiver-2", "receiver-1"]


def test_the_process_that_serves_is_shown_as_a_snapshot_would_be() -> None:
    metrics.stored(0xA900, 0.1, 10)
    live = metrics.live("sidecar", metrics_push.REGISTRY)
    told_now = metrics_told.families({"sidecar": metrics.snapshot()}, metrics_push.REGISTRY)
    assert {f.name: f.samples for f in live} == {f.name: f.samples for f in told_now}
    assert "_created" not in rendered(live)
