"""The endpoints of the cloud at work: health, probes, which one is used, what operators are told."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import aiohttp

from dicomnode import logs
from dicomnode.cloud_settings import CloudEndpoint
from dicomnode.errors import NodeError, OperatorError
from dicomnode.index.database import Database
from dicomnode.index.operation import Events
from dicomnode.metrics_cloud import show_cloud
from dicomnode.offline import may_ask
from dicomnode.settings import Cloud, Settings
from dicomnode.sync.bandwidth import Bucket
from dicomnode.sync.connectivity import Health, Limits, Link, choose, failed, link, succeeded
from dicomnode.sync.faults import reason
from dicomnode.sync.http import confidential, open_session, origin, read_token

PROBE_SECONDS = 5.0
"""Between two looks: fail-over and return need no traffic."""
ANSWER_SECONDS = 5.0
"""For the answer to one."""
AWAY_SECONDS = 30.0
"""Between two looks at one that did not answer the look before. Its back-off is for what is sent: it may reach a
quarter of an hour, and whoever is back should not wait so long for the results."""
TRIAL_SECONDS = 60.0
"""Longest pause until one that refuses what it is sent is tried with results again, whatever its probes say."""


class Endpoints:
    """One per node. Not thread-safe: it lives in the event loop of the sidecar."""

    def __init__(self, settings: Settings, db: Database) -> None:
        self.cloud, self.sync = settings.cloud, settings.sync
        delivery = settings.delivery
        self.all: Sequence[CloudEndpoint] = settings.cloud.endpoints
        self.limits = Limits(settings.sync.offline_mode, delivery.backoff_seconds, delivery.backoff_max_seconds)
        self.health = [Health() for _ in self.all]
        self.line = Bucket(settings.sync.bandwidth_kb * 1024.0, loan=settings.sync.urgent_loan_seconds)
        """The cap of everything that goes out."""
        self.answers = 0
        """Good answers of all, those of probes among them."""
        self._causes = [""] * len(self.all)
        self._told = [""] * len(self.all)
        self._quiet_since = [float("-inf")] * len(self.all)
        self._left_alone_until = [float("-inf")] * len(self.all)
        self._silent_since = [float("inf")] * len(self.all)
        """When a look had no answer; infinite for those that answer, whatever else is wrong with them."""
        self._trial_at: dict[int, float] = {}
        """Those that refused what they were sent, and nothing was taken since."""
        self._untold: list[tuple[Any, str, str]] = []
        self._db = db
        self._link: Link | None = None
        self._log = logs.get()
        self.refresh()

    def current(self) -> int | None:
        """Which endpoint to use now."""
        return choose(self.health, self._db.clock.ticks(), self.limits.mode)

    def for_results(self) -> int | None:
        """As :meth:`current`; but a primary that refused what it was sent is tried with results from time to time.

        That its probes are answered proves nothing, and without a trial it would never be taken again.
        """
        chosen = self.current()
        if chosen is not None and 0 in self._trial_at and self.health[0].usable(self._db.clock.ticks()):
            return 0
        return chosen

    def best(self, among: Sequence[int]) -> int | None:
        """Which of these to use now."""
        chosen = choose([self.health[n] for n in among], self._db.clock.ticks(), self.limits.mode)
        return None if chosen is None else among[chosen]

    @property
    def link(self) -> Link:
        return link(self.health, self._db.clock.ticks(), self.limits)

    def leave_alone(self, number: int, seconds: float) -> None:
        """With requests that can wait; it asked for it (Retry-After), and results have a back-off of their own."""
        self._left_alone_until[number] = self._db.clock.ticks() + seconds

    def left_alone_seconds(self, number: int) -> float:
        """How long it is still to be left alone."""
        return max(0.0, self._left_alone_until[number] - self._db.clock.ticks())

    def try_again(self) -> None:
        """An operator says that something was mended: no back-off is waited for. What is wrong still is told."""
        self.health = [replace(health, not_before=0.0) for health in self.health]
        self.refresh()

    def session(self, number: int) -> aiohttp.ClientSession:
        """Raises OperatorError when the endpoint's address or files are unusable."""
        endpoint = self.all[number]
        if not all(confidential(u) for u in (endpoint.stow_url, endpoint.records_url, endpoint.health_url) if u):
            hint = "Results concern patients: use https, or http on this machine"
            raise OperatorError("send to the cloud", f"{endpoint.name}: its address is not https", hint)
        how = Cloud(ca_file=endpoint.ca_file, timeout_seconds=self.cloud.timeout_seconds)
        return open_session(how, endpoint.stow_url)

    async def headers(self, number: int) -> dict[str, str]:
        """Raises OperatorError when the token file is unusable. It is read anew each time, never logged."""
        token = await asyncio.to_thread(read_token, self.all[number].token_file)
        return {"Authorization": f"Bearer {token}"} if token else {}

    def succeeded(self, number: int, latency: float, *, proven: bool = True) -> None:
        """``proven``: something was taken, it was not only a probe."""
        self.answers += 1
        self._quiet_since[number] = self._db.clock.ticks()
        self._silent_since[number] = float("inf")
        if not proven and number in self._trial_at:
            before = self.health[number]
            self.health[number] = replace(before, not_before=min(before.not_before, self._trial_at[number]))
            self.refresh()
            return
        self._trial_at.pop(number, None)
        self.health[number] = succeeded(self.health[number], latency, proven=proven)
        if self.health[number].well:
            self._causes[number] = ""
            self._tell(number, "", mendable=False)
        self.refresh()

    def failed(
        self, number: int, cause: str, *, wait: float | None = None, mendable: bool = False, refused: bool = False
    ) -> None:
        """``mendable``: an operator has to act; told once for each cause. ``refused``: it answers and takes nothing."""
        now = self._db.clock.ticks()
        self.health[number] = failed(self.health[number], now, self.limits, wait)
        if refused:
            found = self.health[number]
            soonest = found.not_before if wait is not None else min(found.not_before, now + TRIAL_SECONDS)
            self._trial_at[number] = soonest
            self.health[number] = replace(found, not_before=soonest)
        self._causes[number] = cause
        self._tell(number, cause, mendable=mendable)
        self.refresh()

    async def probe(self) -> None:
        """Ask those that may be asked and had no answer lately; all at a time."""
        now = self._db.clock.ticks()
        if not may_ask(self.limits.mode):
            self.refresh()
            return
        await asyncio.gather(*(self._probe(i) for i in range(len(self.all)) if self._looked_at(i, now)))
        self.refresh()
        await self.tell()

    def _looked_at(self, number: int, now: float) -> bool:
        if self.health[number].usable(now):
            return now - self._quiet_since[number] >= PROBE_SECONDS
        return now - self._silent_since[number] >= AWAY_SECONDS and not self.left_alone_seconds(number)

    def _silent(self, number: int, cause: str) -> None:
        self.failed(number, cause)
        self._silent_since[number] = self._db.clock.ticks()

    async def _probe(self, number: int) -> None:
        endpoint = self.all[number]
        begin = perf_counter()
        try:
            method, url = ("GET", endpoint.health_url) if endpoint.health_url else ("OPTIONS", endpoint.stow_url)
            known = {origin(u) for u in (endpoint.stow_url, endpoint.records_url) if u}
            headers = await self.headers(number) if origin(url) in known else {}  # the token is for nobody else
            timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
            async with (
                self.session(number) as session,
                session.request(method, url, headers=headers, allow_redirects=False, timeout=timeout) as response,
            ):
                most = 300 if endpoint.health_url else 500  # who does not know OPTIONS is well
                if response.status >= most or response.status in (401, 403):
                    self._silent(number, f"its health is HTTP {response.status}")
                    return
        except OperatorError as error:
            self.failed(number, str(error), mendable=True)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, NodeError) as error:
            self._silent(number, f"it cannot be reached ({reason(error)})")
        else:
            self.succeeded(number, perf_counter() - begin, proven=False)

    def refresh(self) -> None:
        """Metrics, and an event when the state of the line changes."""
        state = self.link
        current = self.current()
        pairs = zip(self.all, self.health, strict=True)
        show_cloud(state, [(e.name, i == current, h) for i, (e, h) in enumerate(pairs)])
        if state is not self._link:
            self._log.info("cloud", state=str(state))
            self._link = state

    def report(self) -> dict[str, Any]:
        """For the heartbeat, ``status`` and the dashboard."""
        now, current = self._db.clock.ticks(), self.current()
        return {
            "state": str(self.link),
            "mode": self.limits.mode,
            "endpoints": [
                {
                    "name": endpoint.name,
                    "in_use": number == current,
                    "well": health.well,
                    "latency_seconds": None if health.latency is None else round(health.latency, 4),
                    "failures": health.failures,
                    "again_in_seconds": round(max(0.0, health.not_before - now), 1),
                    "error": self._causes[number],
                }
                for number, (endpoint, health) in enumerate(zip(self.all, self.health, strict=True))
            ],
        }

    def _tell(self, number: int, cause: str, *, mendable: bool) -> None:
        """One event when an endpoint goes, one for each new cause that an operator can mend, one when it is back."""
        state = f"mend: {cause}" if mendable else "away" if cause else ""
        before, self._told[number] = self._told[number], state
        if state == before:
            return
        name = self.all[number].name
        if mendable:
            self._untold.append(("error", name, cause))
        elif cause:
            self._untold.append(("warning", name, f"results wait or go elsewhere: {cause}"))
        else:
            self._untold.append(("info", name, "results are accepted again"))
        self._log.info("cloud endpoint", name=name, state=state.partition(":")[0] or "well", cause=cause)

    async def tell(self) -> None:
        """Write the events that came up; away from the event loop, since a row may have to wait."""
        untold, self._untold = self._untold, []
        for severity, name, text in untold:
            await asyncio.to_thread(Events(self._db).add, severity, "cloud", f"cloud {name}", text)
