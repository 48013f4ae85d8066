"""The heartbeat to the cloud: counts, versions and digests; no patient, no address."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from dicomnode import logs
from dicomnode.clock import iso
from dicomnode.cloud_settings import node_name
from dicomnode.errors import PeerRefused
from dicomnode.index.database import Database
from dicomnode.index.operation import Events
from dicomnode.metrics_push import CLOCK_SKEW, HEARTBEAT
from dicomnode.settings import Settings
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.fleet_calls import call

SKEW_MOST_SECONDS = 5.0
"""Beyond it an event tells: TLS, signed metadata and the order of changes rest on the clock."""


class Heartbeat:
    """``describe`` gives the body without name and time; it blocks, and runs in a thread."""

    def __init__(
        self, settings: Settings, db: Database, endpoints: Endpoints, describe: Callable[[], Mapping[str, Any]]
    ) -> None:
        self._node = node_name(settings.node.ae_title)
        self._db, self._endpoints, self._describe = db, endpoints, describe
        self._skew: float | None = None
        self._doubt = 0.0
        self._skewed = False
        self._beat_time = ""
        self.desired = 0
        """Generation that the cloud named last."""

    async def beat(self) -> bool:
        """Whether the cloud took it. Raises PeerAway, PeerRefused and OperatorError; the schedule shows them."""
        body = await asyncio.to_thread(self._describe)
        now = iso(self._db.clock.wall())
        skew = {} if self._skew is None else {"clock_skew_seconds": self._skew}
        reply = await call(self._endpoints, "POST", "/heartbeat", {**body, **skew, "node": self._node, "time": now})
        if reply is None:
            return False
        if reply.status != 200:
            hint = "Check cloud.records_url and the token"
            raise PeerRefused("send the heartbeat", f"HTTP {reply.status}", hint)
        if reply.skew is not None:
            self._skew, self._doubt = reply.skew, reply.doubt
            CLOCK_SKEW.set(reply.skew)
            await self._judge(reply.skew)
        generation = reply.body.get("generation") if isinstance(reply.body, dict) else None
        self.desired = generation if isinstance(generation, int) else 0
        self._beat_time = now
        HEARTBEAT.set(datetime.fromisoformat(now).timestamp())
        return True

    async def _judge(self, skew: float) -> None:
        skewed = abs(skew) > SKEW_MOST_SECONDS
        if skewed == self._skewed:
            return
        self._skewed = skewed
        logs.get().warning("clock against the cloud", seconds=skew)
        severity = "warning" if skewed else "info"
        ahead = "ahead of" if skew > 0 else "behind"
        text = f"this node's clock is {abs(skew):.1f} s {ahead} the cloud's" + ("; check NTP" if skewed else "")
        await asyncio.to_thread(Events(self._db).add, severity, "clock", "cloud", text)  # type: ignore[arg-type]

    def report(self) -> dict[str, Any]:
        """For the heartbeat row, ``status`` and the dashboard."""
        return {
            "beat_time": self._beat_time,
            "clock_skew_seconds": self._skew,
            "clock_doubt_seconds": round(self._doubt, 2),
            "desired_generation": self.desired,
        }
