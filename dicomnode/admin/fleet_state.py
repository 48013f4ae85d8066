"""What the sidecar's heartbeat tells of the node as one of a fleet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dicomnode.index.database import Row
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
