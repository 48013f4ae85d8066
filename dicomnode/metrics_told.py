"""What other processes told of their figures, from the snapshots in their heartbeat rows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric

from dicomnode.metrics import REGISTRY


def families(snapshots: Mapping[str, str], registry: CollectorRegistry = REGISTRY) -> list[Metric]:
    """The families of all ``snapshots`` (process name -> text) with a ``process`` label.

    A snapshot or sample that does not parse, or that names a family unknown to this version,
    is left out: during an upgrade processes of two versions run side by side.
    """
    known: dict[str, Metric] = {f.name: Metric(f.name, f.documentation, f.type) for f in registry.collect()}
    for process, text in sorted(snapshots.items()):
        for name in _parsed(text):
            if (family := known.get(name)) is not None:
                for full, labels, value in told(text, name):
                    family.add_sample(full, {**labels, "process": process}, value)
    return [family for family in known.values() if family.samples]


def told(snapshot: str, name: str) -> Iterator[tuple[str, dict[str, str], float]]:
    """Name, labels and value of each sample of one family; what is damaged is left out."""
    samples = _parsed(snapshot).get(name)
    for sample in samples if isinstance(samples, list) else ():
        match sample:
            case [str(full), dict(labels), int(value) | float(value)] if full.startswith(name):
                yield full, {str(k): str(v) for k, v in labels.items()}, value


@lru_cache(maxsize=32)
def _parsed(text: str) -> Mapping[str, Any]:
    """Kept, since a snapshot is looked at far more often than its process has a heartbeat."""
    try:
        found = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
