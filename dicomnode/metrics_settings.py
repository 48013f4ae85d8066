"""Where this node's metrics are pushed to: the section [metrics]."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator

from dicomnode.cloud_settings import http_address
from dicomnode.peer_settings import Section


class MetricsSettings(Section):
    """/metrics is always there; this is Prometheus remote-write, see :mod:`dicomnode.sync.metric_push`."""

    remote_write_url: str = Field(
        "", description="address that takes Prometheus remote-write 1.0; empty: metrics are not pushed"
    )
    token_file: Path | None = Field(None, description="file with a bearer token")
    ca_file: Path | None = Field(None, description="PEM file with the authorities to trust")
    interval_seconds: float = Field(60.0, ge=1, description="seconds between two samples of every series")
    spool_mb: int = Field(256, ge=1, description="MiB that may wait; beyond it the older half is thinned")
    max_age_days: float = Field(14.0, gt=0, description="days after which samples that wait are dropped")
    timeout_seconds: float = Field(30.0, gt=0, description="time for one request")

    _http = field_validator("remote_write_url")(http_address)

    @property
    def spool_bytes(self) -> int:
        return self.spool_mb << 20
