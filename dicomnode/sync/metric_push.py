"""Prometheus remote-write at work: samples go into a durable spool, and from it to the receiver.

A request has whole collections in their order; one whose wall time goes back begins another
request. 5xx, 429 and a dead line are tried again after Retry-After or a back-off, in order; a
receiver that refuses a request for good is asked again with each collection by itself, and only
what it refuses then is dropped. Wrong address, token or rights (401, 403, 404, 405, 407) concern
no sample: the specification would drop, here everything waits until somebody has mended them.
A request that is repeated because its reply was lost has the same samples, which receivers ignore.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Any

import aiohttp
from prometheus_client.metrics_core import Metric

from dicomnode import logs
from dicomnode.clock import iso
from dicomnode.cloud_settings import node_name
from dicomnode.errors import OperatorError, PeerError, StorageError
from dicomnode.index.database import Database
from dicomnode.index.operation import Events
from dicomnode.metrics_push import SPOOL_BYTES, SPOOL_SAMPLES, SPOOL_SECONDS, count
from dicomnode.offline import may_ask
from dicomnode.settings import Cloud, Settings
from dicomnode.sync.bandwidth import Bucket
from dicomnode.sync.connectivity import Health, Limits, failed, succeeded
from dicomnode.sync.faults import reason
from dicomnode.sync.http import confidential, open_session, read_bounded, read_token
from dicomnode.sync.metric_spool import Entry, MetricSpool, overdue, thinned
from dicomnode.sync.remote_write import HEADERS, Collection, samples_of, snappy, write_request
from dicomnode.sync.reply import Fate, judge, retry_after_seconds

MOST_SAMPLES = 10_000
"""Samples in one request; a collection is never divided."""

MOST_REPLY_BYTES = 4096

LONGEST_WAIT_SECONDS = 60.0
"""Between two tries while the receiver is away."""

HOUR_SECONDS = 3600.0
DAY_MS = 86_400_000


class MetricPush:
    """``collect`` gives the families of /metrics; it blocks, and runs in a thread.

    ``line``: the cap of what goes out.
    """

    def __init__(
        self, settings: Settings, db: Database, collect: Callable[[], Iterable[Metric]], line: Bucket | None = None
    ) -> None:
        self._line = line or Bucket(0.0)
        self._to, self._mode = settings.metrics, settings.sync.offline_mode
        self._db, self._collect = db, collect
        self._limits = Limits(self._mode, settings.delivery.backoff_seconds, LONGEST_WAIT_SECONDS)
        self._health = Health()
        self._external = {"job": "dicomnode", "instance": node_name(settings.node.ae_title)}
        self._spool = MetricSpool(settings.node.data_dir, settings.node.reserve_mb << 20, db.clock)
        self._error, self._told, self._sent_time = "", "", ""
        self._refusal_told = float("-inf")
        self._log = logs.get()

    def start(self) -> None:
        """Blocking; before anything else."""
        self._spool.start()
        self._show()

    async def collect(self) -> None:
        """One sample of every series into the spool. Raises StorageError when the disk refuses."""
        await asyncio.to_thread(self._gather)

    def _gather(self) -> None:
        samples = samples_of(self._collect(), self._external)
        now = int(self._db.clock.ticks() * 1000)
        old = overdue(self._spool.entries(), now, int(self._to.max_age_days * DAY_MS))
        count("aged", self._spool.remove(old))
        try:
            self._spool.put(samples)
        except StorageError:
            count("unspooled", len(samples))
            raise
        finally:
            count("thinned", self._spool.remove(thinned(self._spool.entries(), self._to.spool_bytes)))
            self._show()

    async def push(self) -> int:
        """Send what waits, the oldest first; how many collections are settled.

        Raises OperatorError where an operator has to act: the schedule shows it.
        """
        if not may_ask(self._mode) or not self._health.usable(self._db.clock.ticks()):
            return 0
        entries = self._spool.entries()
        if not entries:
            return 0
        settled = 0
        try:
            headers = await asyncio.to_thread(self._headers)
            how = Cloud(ca_file=self._to.ca_file, timeout_seconds=self._to.timeout_seconds)
            async with open_session(how, self._to.remote_write_url) as session:
                while entries:
                    settled += await self._send(session, headers, entries)
                    if self._health.failures:
                        break
                    entries = self._spool.entries()
        except OperatorError as error:
            self._failed(error.cause, None)
            await self._tell(str(error))
            raise
        return settled

    def _headers(self) -> dict[str, str]:
        """The token is read anew each time, never logged."""
        if not confidential(self._to.remote_write_url):
            raise OperatorError("push metrics", "its address is not https", "Use https, or http on this machine")
        token = read_token(self._to.token_file)
        return HEADERS | ({"Authorization": f"Bearer {token}"} if token else {})

    async def _send(self, session: aiohttp.ClientSession, headers: dict[str, str], entries: Sequence[Entry]) -> int:
        """One request with the oldest; alone where it was refused as a whole."""
        batch = await asyncio.to_thread(self._load, entries)
        if not batch:
            return 0
        fate = await self._request(session, headers, batch)
        if fate is not Fate.alone:
            return await asyncio.to_thread(self._settle, fate, batch)
        settled = 0
        for one in batch:
            fate = await self._request(session, headers, [one])
            settled += await asyncio.to_thread(self._settle, fate, [one])
            if fate not in (Fate.stored, Fate.reject):
                break
        return settled

    def _load(self, entries: Sequence[Entry]) -> list[tuple[Entry, Collection]]:
        """The oldest collections that go in one request; damaged files are removed and counted."""
        batch: list[tuple[Entry, Collection]] = []
        samples = 0
        for entry in entries:
            if batch and (samples + entry.samples > MOST_SAMPLES or entry.time <= batch[-1][0].time):
                break
            try:
                batch.append((entry, self._spool.read(entry)))
            except ValueError:
                count("damaged", self._spool.remove([entry]))
                self._log.error("samples in the spool are damaged", count=entry.samples)
                continue
            samples += entry.samples
        return batch

    async def _request(
        self, session: aiohttp.ClientSession, headers: dict[str, str], batch: Sequence[tuple[Entry, Collection]]
    ) -> Fate:
        body = await asyncio.to_thread(lambda: snappy(write_request([c for _, c in batch])))
        await self._line.wait(len(body))
        begin = self._db.clock.ticks()
        try:
            async with session.post(
                self._to.remote_write_url, data=body, headers=headers, allow_redirects=False
            ) as response:
                status, wait = response.status, self._wait(response, self._db.clock.wall())
                if 200 <= status < 300:  # a receiver's is empty; what answers everything with a page of its own is none
                    await read_bounded(response, MOST_REPLY_BYTES)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            self._failed(f"the receiver cannot be reached ({reason(error)})", None)
            return Fate.retry
        except PeerError as error:
            self._failed(f"HTTP {status} with a reply that is no receiver's: {error.cause}", None)
            return Fate.retry
        if 200 <= status < 300:
            self._health = succeeded(self._health, self._db.clock.ticks() - begin, proven=True)
            self._error, self._sent_time = "", iso(self._db.clock.wall())
            await self._tell("")
            return Fate.stored
        fate = judge(status, None, [e.name for e, _ in batch])[batch[0][0].name].fate
        if fate is Fate.operator:
            cause = f"HTTP {status}"
            hint = "Check metrics.remote_write_url, the token and whether the receiver takes remote-write; samples wait"
            raise OperatorError("push metrics", cause, hint)
        if fate is Fate.retry:
            self._failed(f"HTTP {status}", wait)
        else:
            self._health = succeeded(self._health, self._db.clock.ticks() - begin, proven=True)
        if fate is Fate.reject:
            await self._refused(status)
        return fate

    async def _refused(self, status: int) -> None:
        """An event, but not for each collection of a week."""
        now = self._db.clock.ticks()
        if now < self._refusal_told + HOUR_SECONDS:
            return
        self._refusal_told = now
        text = (
            f"HTTP {status}: the receiver refuses samples for good, they are dropped; where they are too old for it,"
            " see storage.tsdb.out_of_order_time_window of Prometheus"
        )
        await asyncio.to_thread(Events(self._db).add, "error", "remote-write", "metrics", text)

    @staticmethod
    def _wait(response: aiohttp.ClientResponse, now: datetime) -> float | None:
        return retry_after_seconds(response.headers.get("Retry-After"), now)

    def _settle(self, fate: Fate, batch: Sequence[tuple[Entry, Collection]]) -> int:
        if fate not in (Fate.stored, Fate.reject):
            return 0
        samples = self._spool.remove([e for e, _ in batch])
        count("sent" if fate is Fate.stored else "refused", samples)
        self._show()
        return len(batch)

    def _failed(self, cause: str, wait: float | None) -> None:
        self._health = failed(self._health, self._db.clock.ticks(), self._limits, wait)
        self._error = cause

    async def _tell(self, text: str) -> None:
        """An event for each new cause that somebody can mend, and one when it is over."""
        before, self._told = self._told, text
        if text == before:
            return
        severity, words = ("error", text) if text else ("info", "metrics are taken again")
        await asyncio.to_thread(Events(self._db).add, severity, "remote-write", "metrics", words)  # type: ignore[arg-type]

    def _show(self) -> None:
        entries = self._spool.entries()
        SPOOL_BYTES.set(sum(e.size for e in entries))
        SPOOL_SAMPLES.set(sum(e.samples for e in entries))
        SPOOL_SECONDS.set(self._spool.age_seconds(entries[0]) if entries else 0.0)

    def report(self) -> dict[str, Any]:
        """For the heartbeat, ``status`` and the dashboard."""
        entries = self._spool.entries()
        return {
            "state": "waiting" if self._error else "well" if self._sent_time else "unknown",
            "waiting": len(entries),
            "bytes": sum(e.size for e in entries),
            "oldest_seconds": round(self._spool.age_seconds(entries[0]), 1) if entries else 0.0,
            "sent_time": self._sent_time,
            "error": self._error,
        }
