"""What the sidecar does as one of a fleet: its metrics go to whom watches over all. Part of the composition root."""

from __future__ import annotations

import asyncio
from typing import Any

from dicomnode.admin.exposition import families
from dicomnode.index.database import Database
from dicomnode.settings import Settings
from dicomnode.sync.metric_push import MetricPush
from dicomnode.sync.schedule import Schedule

PUSH_SECONDS = 5.0
"""Between two looks into the spool."""


class Fleet:
    """``own_process``: name of the process that runs this, whose counters are shown live."""

    def __init__(self, settings: Settings, db: Database, own_process: str) -> None:
        self._settings = settings
        pushes = bool(settings.metrics.remote_write_url)
        self._push = MetricPush(settings, db, lambda: families(db, settings, own_process)) if pushes else None

    async def start(self, schedule: Schedule) -> None:
        if self._push is not None:
            await asyncio.to_thread(self._push.start)
            schedule.every("metrics-collect", self._settings.metrics.interval_seconds, self._push.collect)
            schedule.every("metrics-push", PUSH_SECONDS, self._push.push)

    def report(self) -> dict[str, Any]:
        """For the heartbeat row."""
        return {} if self._push is None else {"remote_write": self._push.report()}
