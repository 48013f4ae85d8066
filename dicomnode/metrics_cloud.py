"""Figures of the line to the cloud; in the one registry of the process."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from prometheus_client import Counter, Gauge

from dicomnode.metrics import REGISTRY

__all__ = ["RECORDS_TAKEN", "RECORDS_TOTAL", "REGISTRY", "show_cloud"]
STATES = ("online", "degraded", "offline")

CLOUD_STATE = Gauge(
    "dicomnode_cloud_state",
    "1 for the state of the line to the cloud: online, degraded (backup, slow, or not proven again) or offline",
    ["state"],
    registry=REGISTRY,
)
CLOUD_ENDPOINT_UP = Gauge(
    "dicomnode_cloud_endpoint_up", "1 when the endpoint answers well", ["endpoint"], registry=REGISTRY
)
CLOUD_ENDPOINT_USED = Gauge(
    "dicomnode_cloud_endpoint_in_use", "1 for the endpoint that is sent to", ["endpoint"], registry=REGISTRY
)
CLOUD_ENDPOINT_SECONDS = Gauge(
    "dicomnode_cloud_endpoint_latency_seconds",
    "Mean time of an answer of the endpoint, seconds",
    ["endpoint"],
    registry=REGISTRY,
)
RECORDS_TOTAL = Counter(
    "dicomnode_sync_records", "Records sent to the cloud, by outcome", ["outcome"], registry=REGISTRY
)
DEPARTED = Counter(
    "dicomnode_departures",
    "Objects and records made ready for the cloud, at each attempt: with the patient's identity removed or kept, or "
    "withheld because it could not be removed",
    ["what", "identity"],
    registry=REGISTRY,
)
RECORDS_TAKEN = Counter(
    "dicomnode_records_taken",
    "Records that came from the cloud, by what became of them (own, applied, kept, merged, review, refused, ...)",
    ["outcome"],
    registry=REGISTRY,
)


class EndpointHealth(Protocol):
    @property
    def well(self) -> bool: ...
    @property
    def latency(self) -> float | None: ...


def show_cloud(state: str, endpoints: Iterable[tuple[str, bool, EndpointHealth]]) -> None:
    """``endpoints``: (name of the configuration, in use, health); without any nothing is shown."""
    endpoints = list(endpoints)
    if not endpoints:
        return
    for one in STATES:
        CLOUD_STATE.labels(one).set(1.0 if one == state else 0.0)
    for name, used, health in endpoints:
        CLOUD_ENDPOINT_UP.labels(name).set(1.0 if health.well else 0.0)
        CLOUD_ENDPOINT_USED.labels(name).set(1.0 if used else 0.0)
        CLOUD_ENDPOINT_SECONDS.labels(name).set(health.latency or 0.0)
