"""Figures of the node as one of a fleet: metrics that are pushed, the clock; in the one registry of the process."""

from __future__ import annotations

from typing import Literal

from prometheus_client import Counter, Gauge

from dicomnode.metrics_cloud import REGISTRY

__all__ = ["REGISTRY", "count"]
SampleOutcome = Literal["sent", "refused", "aged", "thinned", "damaged", "unspooled"]

SAMPLES_TOTAL = Counter(
    "dicomnode_remote_write_samples",
    "Samples for remote-write: sent; refused by the receiver for good; aged out, thinned or damaged in the spool; "
    "unspooled where there was no room on the disk",
    ["outcome"],
    registry=REGISTRY,
)
SPOOL_BYTES = Gauge(
    "dicomnode_remote_write_spool_bytes", "Bytes of samples that wait for remote-write", registry=REGISTRY
)
SPOOL_SECONDS = Gauge(
    "dicomnode_remote_write_oldest_seconds", "Age of the oldest samples that wait for remote-write", registry=REGISTRY
)

SPOOL_SAMPLES = Gauge("dicomnode_remote_write_spooled_samples", "Samples that wait for remote-write", registry=REGISTRY)
HEARTBEAT = Gauge(
    "dicomnode_cloud_heartbeat_timestamp_seconds",
    "Last heartbeat that the cloud took, Unix time; 0 before the first",
    registry=REGISTRY,
)
CLOCK_SKEW = Gauge(
    "dicomnode_clock_skew_seconds", "Time that this node's clock is ahead of the cloud's, seconds", registry=REGISTRY
)


def count(outcome: SampleOutcome, samples: int) -> None:
    if samples:
        SAMPLES_TOTAL.labels(outcome).inc(samples)
