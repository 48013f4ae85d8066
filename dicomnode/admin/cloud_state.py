"""The line to the cloud as the sidecar's heartbeat tells it, and what waits for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dicomnode.admin.kept import kept
from dicomnode.cloud_settings import LANES
from dicomnode.index.cloud_outbox import CloudOutbox
from dicomnode.index.database import Database, Row
from dicomnode.settings import Settings


def cloud_report(db: Database, settings: Settings, processes: Sequence[Row]) -> dict[str, Any]:
    """``state`` is ``off`` where nothing is configured, ``unknown`` without a live sidecar.

    ``spool_full``: more waits than may wait, jobs of priority batch are not begun.
    """
    configured = bool(settings.cloud.stow_url)
    told: Any = next((r["detail"].get("cloud") for r in processes if r["name"] == "sidecar" and r["alive"]), None)
    known = dict(told) if configured and isinstance(told, Mapping) else {}
    waiting = lanes(db)
    size = sum(w["bytes"] for w in waiting)
    return {
        "configured": configured,
        "state": known.get("state", "unknown" if configured else "off"),
        "mode": settings.sync.offline_mode,
        "endpoints": list(known.get("endpoints", ())),
        "waiting": waiting,
        "waiting_bytes": size,
        "spool_bytes": settings.sync.spool_bytes,
        "spool_full": configured and 0 < settings.sync.spool_bytes <= size,
    }


def lanes(db: Database) -> list[Row]:
    """Of each class: how many items wait, their bytes, and the age of the oldest in seconds."""
    found = {int(r["priority"]): r for r in kept(db, "lanes", CloudOutbox(db).lanes)}
    empty = {"count": 0, "bytes": 0, "oldest_seconds": 0.0}
    return [
        {"class": name, **{k: round(found.get(number, empty)[k] or 0, 1) for k in empty}}
        for number, name in enumerate(LANES)
    ]
