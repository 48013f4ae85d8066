"""What the sidecar's heartbeat tells of the node as one of a fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from dicomnode.index.database import Database, Row
from dicomnode.index.desired import DesiredStates
from dicomnode.settings import Settings


def told(processes: Sequence[Row], key: str) -> Mapping[str, Any]:
    """What a live sidecar says under ``key``; empty when it says nothing."""
    found: Any = next((r["detail"].get(key) for r in processes if r["name"] == "sidecar" and r["alive"]), None)
    return found if isinstance(found, Mapping) else {}


def remote_write_report(settings: Settings, processes: Sequence[Row]) -> dict[str, Any]:
    """``state`` is ``off`` where metrics are not pushed, ``unknown`` without a live sidecar."""
    configured = bool(settings.metrics.remote_write_url)
    empty = {"waiting": 0, "bytes": 0, "oldest_seconds": 0.0, "sent_time": "", "error": ""}
    known = told(processes, "remote_write") if configured else {}
    return {"state": "unknown" if configured else "off", **empty, **known}


def fleet_report(db: Database, settings: Settings, processes: Sequence[Row]) -> dict[str, Any]:
    """Heartbeat and clock against the cloud, and the desired states: ``serving`` and the ``newest`` decided."""
    states = DesiredStates(db)
    kept = ("generation", "status", "reason", "decided_time", "reported")
    serving, newest = states.serving(), states.newest()
    empty = {"beat_time": "", "clock_skew_seconds": None, "clock_doubt_seconds": 0.0, "desired_generation": 0}
    return {
        **empty,
        **told(processes, "fleet"),
        "accept": list(settings.fleet.accept),
        "serving": {k: serving[k] for k in kept} if serving else None,
        "newest": {k: newest[k] for k in kept} if newest else None,
    }


def desired_families(serving: Mapping[str, Any] | None, newest: Mapping[str, Any] | None) -> list[Metric]:
    """For /metrics; nothing is shown where nothing was desired. Pure."""
    generation = GaugeMetricFamily(
        "dicomnode_desired_generation",
        "Generation of the desired state: the one in force, and the newest that was decided",
        labels=("which",),
    )
    refused = GaugeMetricFamily("dicomnode_desired_refused", "1 while the newest desired state is refused")
    if newest is not None:
        generation.add_metric(("serving",), float(serving["generation"]) if serving else 0.0)
        generation.add_metric(("newest",), float(newest["generation"]))
        refused.add_metric((), float(newest["status"] == "refused"))
    return [generation, refused]
