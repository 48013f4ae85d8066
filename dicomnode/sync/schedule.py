"""Periodic work of the sidecar on APScheduler, with what an operator wants to know of each task.

APScheduler counts in wall time. A clock that is set back would leave its tasks asleep, so
a watch on the monotonic clock notices the jump and has every task run at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from apscheduler.events import EVENT_JOB_MISSED
from apscheduler.schedulers.asyncio import AsyncIOScheduler

from dicomnode import logs, metrics
from dicomnode.clock import iso
from dicomnode.errors import NodeError

WATCH = "clock-watch"
"""The one that APScheduler cannot drive, since it watches the clock that APScheduler goes by."""

WATCH_SECONDS = 5.0
JUMP_SECONDS = 10.0
STOP_SECONDS = 2.0


@dataclass(slots=True)
class Run:
    """What is known of one task; ``error`` is empty after a good run."""

    every_seconds: float
    runs: int = 0
    last_time: str = ""
    seconds: float = 0.0
    error: str = ""
    since: float | None = None
    """Of the run that goes on, monotonic seconds."""

    def as_json(self) -> dict[str, Any]:
        return {
            "every_seconds": self.every_seconds,
            "runs": self.runs,
            "last_time": self.last_time,
            "seconds": round(self.seconds, 3),
            "error": self.error,
            "running_seconds": 0.0 if self.since is None else round(time.monotonic() - self.since, 3),
        }


class Schedule:
    def __init__(self, wall: Callable[[], float] = time.time) -> None:
        self._scheduler: Any = AsyncIOScheduler(
            timezone=UTC, job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        )
        self._scheduler.add_listener(self._missed, EVENT_JOB_MISSED)
        self._wall = wall
        self._runs: dict[str, Run] = {}
        self._watch: asyncio.Task[None] | None = None
        self._running: set[asyncio.Task[Any]] = set()
        self._log = logs.get()

    def every(self, name: str, seconds: float, action: Callable[[], Awaitable[object]]) -> None:
        """Run ``action`` now and then every ``seconds``; one run of a task at a time."""
        self._runs[name] = Run(seconds)

        async def task() -> None:
            current = asyncio.current_task()
            assert current is not None
            self._running.add(current)
            try:
                await self._run(name, action)
            finally:
                self._running.discard(current)

        self._scheduler.add_job(task, "interval", seconds=seconds, id=name, next_run_time=datetime.now(UTC))

    def soon(self, name: str) -> None:
        """Bring the next run of a task forward to now."""
        self._scheduler.modify_job(name, next_run_time=datetime.now(UTC))

    def start(self) -> None:
        self._runs[WATCH] = Run(WATCH_SECONDS)
        self._scheduler.start()
        self._watch = asyncio.create_task(self._watch_clock(), name="watch-clock")

    async def stop(self) -> None:
        """End at once: running tasks are cancelled, their leases and staging take care of the rest."""
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        if self._scheduler.running:
            self._scheduler.shutdown(wait=False)
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running, timeout=STOP_SECONDS)

    def report(self) -> dict[str, dict[str, Any]]:
        """For the heartbeat: each task's last run, duration and error."""
        return {name: run.as_json() for name, run in self._runs.items()}

    async def _run(self, name: str, action: Callable[[], Awaitable[object]]) -> None:
        run = self._runs[name]
        begin = run.since = time.monotonic()
        try:
            await action()
        except Exception as error:  # noqa: BLE001 a failing task must not stop the others; it is shown and counted
            run.error = str(error) if isinstance(error, NodeError) else type(error).__name__
            self._log.error("periodic task failed", name=name, exc_type=type(error).__name__, error=run.error)
            metrics.SCHEDULED_TOTAL.labels(name, "failed").inc()
        else:
            run.error = ""
            metrics.SCHEDULED_TOTAL.labels(name, "ok").inc()
            metrics.SCHEDULED_TIME.labels(name).set(time.time())
        finally:
            run.since = None
        run.runs += 1
        run.last_time = iso(datetime.now(UTC).astimezone())
        run.seconds = time.monotonic() - begin
        metrics.SCHEDULED_SECONDS.labels(name).set(run.seconds)

    def _missed(self, event: Any) -> None:
        metrics.SCHEDULED_TOTAL.labels(str(event.job_id), "missed").inc()

    async def _watch_clock(self) -> None:
        offset = self._wall() - time.monotonic()

        async def look() -> None:
            nonlocal offset
            offset = self.realign(offset)

        while True:
            await asyncio.sleep(WATCH_SECONDS)
            await self._run(WATCH, look)

    def realign(self, offset: float) -> float:
        """Run every task now when wall and monotonic clock drifted apart since ``offset``; the new offset."""
        now = self._wall() - time.monotonic()
        if abs(now - offset) > JUMP_SECONDS:
            self._log.warning("the wall clock was set", seconds=round(now - offset))
            for name in self._runs.keys() - {WATCH}:
                self.soon(name)
        return now
