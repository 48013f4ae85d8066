"""The text of /metrics, put together from parts that change at different times.

prometheus-client renders each of them. What another process told with its heartbeat is rendered
once, however often somebody asks until the next one: this is most of the page.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import ALLOWUTF8
from prometheus_client.registry import Collector

from dicomnode import metrics_push, metrics_told

Blocks = Mapping[str, str]
"""HELP and TYPE lines of a family -> its sample lines."""

_HELP = "\n# HELP "


class _Fixed(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


def blocks(families: Iterable[Metric]) -> Blocks:
    """Of families with different names. Pure."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Fixed(families))
    text = "\n" + generate_latest(registry, ALLOWUTF8).decode()  # our names need no escaping
    found = {}
    for block in text.split(_HELP)[1:]:  # no value holds a line's end, so nothing else begins like this
        documentation, kind, *samples = block.rstrip("\n").split("\n", 2)
        found[f"{_HELP[1:]}{documentation}\n{kind}\n"] = "".join(f"{lines}\n" for lines in samples)
    return found


@lru_cache(maxsize=32)
def told(process: str, snapshot: str) -> Blocks:
    """What a process told last; see :func:`dicomnode.metrics_told.families`."""
    return blocks(metrics_told.families({process: snapshot}, metrics_push.REGISTRY))


def page(parts: Iterable[Blocks]) -> bytes:
    """One text in which each family stands once, with the samples of all ``parts``. Pure."""
    merged: dict[str, list[str]] = {}
    for part in parts:
        for head, samples in part.items():
            merged.setdefault(head, []).append(samples)
    return "".join(head + "".join(samples) for head, samples in merged.items()).encode()
