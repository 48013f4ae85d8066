"""The cloud outbox at work: three classes, in order within a study, to the best endpoint, until it has all.

Sending twice is harmless: an object keeps its SOP Instance UID, a record its idempotency key.
There is no attempt limit while the cause can pass: what fails while others are stored is parked in the
end (:mod:`dicomnode.sync.blame`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol, TypeVar

import aiohttp
import apsw

from dicomnode import durable, logs, metrics
from dicomnode.cloud_settings import LANES, Lane, node_name
from dicomnode.errors import InputError, OperatorError
from dicomnode.index.cloud_outbox import MOST_ENDED, CloudOutbox
from dicomnode.index.database import Database, Row
from dicomnode.index.operation import Events
from dicomnode.metrics_cloud import RECORDS_TOTAL
from dicomnode.settings import Settings
from dicomnode.sync.blame import MOST_REFUSED, MOST_TRIES, Blame, Class, least_tried_first, one_by_one, together
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.reply import Fate, Verdict
from dicomnode.sync.send_records import send_records
from dicomnode.sync.stow import Answer, Part, store
from dicomnode.sync.trouble import After, trouble

T = TypeVar("T")
MOST_REQUEST_BYTES = 32 << 20
"""Objects of one request together; a larger one goes by itself. What is de-identified is held in memory."""


class Prepare(Protocol):
    """What leaves in place of what is stored (:class:`dicomnode.sync.departure.Departures`)."""

    def ready(self) -> None:
        """Raises OperatorError when nothing can be prepared, so nothing may leave."""

    def object(self, item: Row, path: Path) -> tuple[str, bytes | None]:
        """SOPInstanceUID and content of an object; None: the file as it is. Raises InputError for one that cannot."""

    def record(self, item: Row) -> Mapping[str, Any]:
        """A record as config/cloud-api.yaml has it. Raises InputError for one that cannot leave."""

    def keep(self) -> None:
        """Commit what the pseudonyms stand for; before anything of it is sent."""


@dataclass(slots=True)
class _Batch:
    """What became of the items of one lease."""

    stored: list[int] = field(default_factory=list)
    conflicts: set[int] = field(default_factory=set)
    again: list[tuple[int, str]] = field(default_factory=list)
    untried: list[int] = field(default_factory=list)
    settled: int = 0
    failed: bool = False


class CloudSender:
    """One per node: leases carry ``owner``; :class:`Endpoints` remember who is well."""

    def __init__(
        self, settings: Settings, db: Database, endpoints: Endpoints, prepare: Prepare, owner: str = "sidecar"
    ) -> None:
        self.cloud, self.sync, self.delivery = settings.cloud, settings.sync, settings.delivery
        self.db = db
        self.endpoints = endpoints
        self.owner = owner
        self.outbox = CloudOutbox(db)
        self.objects = durable.ObjectStore(settings.node.data_dir)
        self._prepare = prepare
        self._blame = Blame()
        self._lone = asyncio.Lock()
        self._unread = set[int]()
        """Items that the disk did not give when they were tried last."""
        self._node = node_name(settings.node.ae_title)
        self._log = logs.get()

    def start(self) -> None:
        """Take back what a former life had in hand."""
        first, longest = self.delivery.backoff_seconds, self.delivery.backoff_max_seconds
        for item in self.outbox.recover(self.owner, first=first, longest=longest):
            self._tell_parked(item, item["last_error"])

    async def flush(self, lane: Lane | None = None) -> int:
        """Send what is due of a class, or of all; returns how many items were settled."""
        if not self.cloud.stow_url:
            return 0
        await asyncio.to_thread(self._prepare.ready)
        await asyncio.to_thread(self.outbox.expire)
        return sum([await self._flush(one) for one in ((lane,) if lane else LANES)])

    async def _flush(self, lane: Lane) -> int:
        settled, sessions = 0, dict[int, aiohttp.ClientSession]()
        try:
            while (number := self.endpoints.current()) is not None:
                items = await asyncio.to_thread(self._lease, lane)
                alone = not items
                if alone and self._lone.locked():  # a suspect of another class is tried: which one ends us must show
                    break
                async with self._lone if alone else contextlib.nullcontext():
                    items = items or await asyncio.to_thread(self._lease_suspect, lane)
                    if not items:
                        break
                    batch = await self._try(lane, number, sessions, items)
                settled += batch.settled
                await self.endpoints.tell()
                if batch.failed and self.endpoints.current() == number:
                    break
                if not batch.failed and not batch.settled and not alone:
                    break
        finally:
            for session in sessions.values():
                await session.close()
        return settled

    async def _try(
        self, lane: Lane, number: int, sessions: dict[int, aiohttp.ClientSession], items: Sequence[Row]
    ) -> _Batch:
        batch = _Batch()
        try:
            await self._send(lane, number, sessions, items, batch)
        except BaseException:  # a stop, or a fault of ours: they must not wait for their lease to end
            ids = [i["id"] for i in items]
            await asyncio.shield(asyncio.to_thread(self.outbox.release, ids, self.owner, tried=False))
            raise
        await asyncio.to_thread(self._finish, batch)
        return batch

    def _lease(self, lane: Lane) -> list[Row]:
        limit = self.sync.lane(lane).items
        return self.outbox.lease_lane(LANES.index(lane), self.owner, self._seconds(limit), limit, MOST_REQUEST_BYTES)

    def _lease_suspect(self, lane: Lane) -> list[Row]:
        return self.outbox.lease_suspect(LANES.index(lane), self.owner, self._seconds(1))

    def _seconds(self, items: int) -> float:
        """Of a lease, with a lane's share of the line."""
        seconds = self.cloud.timeout_seconds * (items + 2) + 600.0
        if self.sync.bandwidth_kb:
            seconds += MOST_REQUEST_BYTES * len(LANES) / (self.sync.bandwidth_kb * 1024.0)
        return seconds

    async def _send(
        self,
        lane: Lane,
        number: int,
        sessions: dict[int, aiohttp.ClientSession],
        items: Sequence[Row],
        batch: _Batch,
    ) -> None:
        """Requests of one kind each, so that every stream keeps its order; ends at the first that fails as a whole."""
        blocked = set[str]()
        for run in runs(items):
            alone = run[0]["suspect"] or self._blame.alone(_class(lane, run[0]))
            wanted = [i for i in run if i["stream"] not in blocked]
            batch.untried += [i["id"] for i in run if i["stream"] in blocked or batch.failed]
            if not wanted or batch.failed:
                continue
            try:
                if number not in sessions:
                    sessions[number] = self.endpoints.session(number)
                headers = await self.endpoints.headers(number)
            except OperatorError as error:
                self.endpoints.failed(number, str(error), mendable=True)
                batch.again += [(i["id"], str(error)) for i in wanted]
                batch.failed = True
                continue
            send = self._objects if wanted[0]["result_id"] is not None else self._records
            blocked |= await send(lane, number, sessions[number], headers, wanted, batch, alone)

    async def _objects(
        self,
        lane: Lane,
        number: int,
        session: aiohttp.ClientSession,
        headers: dict[str, str],
        items: Sequence[Row],
        batch: _Batch,
        alone: bool,
    ) -> set[str]:
        parts, held = await asyncio.to_thread(self._parts, items, batch)
        if not parts:
            return held

        async def request(some: Sequence[Part]) -> Answer:
            return await store(session, self.endpoints.all[number].stow_url, headers, some, **self._limits(lane))

        begin = perf_counter()
        items = [p.item for p in parts]
        answer = await self._ask(lane, request, {p.uid: p for p in parts}, items, alone)
        metrics.observe("sync", perf_counter() - begin)
        self._note(_class(lane, items[0]), number, answer, perf_counter() - begin, batch)
        pairs = [(p.item, answer.verdicts.get(p.uid)) for p in parts]
        sizes = {p.item["id"]: p.size for p in parts}
        return held | await asyncio.to_thread(self._settle, _class(lane, items[0]), pairs, answer, batch, sizes)

    async def _records(
        self,
        lane: Lane,
        number: int,
        session: aiohttp.ClientSession,
        headers: dict[str, str],
        items: Sequence[Row],
        batch: _Batch,
        alone: bool,
    ) -> set[str]:
        ready, held = await asyncio.to_thread(self._bodies, items, batch)
        if not ready:
            return held
        url = self.endpoints.all[number].records_url

        async def request(some: Sequence[tuple[Row, Mapping[str, Any]]]) -> Answer:
            return await send_records(session, url, headers, self._node, [r for _, r in some], **self._limits(lane))

        begin = perf_counter()
        things = {i["idempotency_key"]: (i, r) for i, r in ready}
        answer = await self._ask(lane, request, things, [i for i, _ in ready], alone)
        self._note(_class(lane, items[0]), number, answer, perf_counter() - begin, batch)
        pairs = [(i, answer.verdicts.get(i["idempotency_key"])) for i, _ in ready]
        return held | await asyncio.to_thread(self._settle, _class(lane, items[0]), pairs, answer, batch, {})

    async def _ask(
        self,
        lane: Lane,
        request: Callable[[Sequence[T]], Awaitable[Answer]],
        things: Mapping[str, T],
        items: Sequence[Row],
        alone: bool,
    ) -> Answer:
        """``things`` by key, and the rows that they belong to."""
        key = _class(lane, items[0])
        others, alike = self._blame.others_stored(key, items), self._blame.alike(key, items)
        streams = {k: str(i["stream"]) for k, i in zip(things, items, strict=True)}
        if not alone:
            return await together(request, things, streams, others_stored=others, alike=alike)
        there = self._blame.there(key, self.endpoints.answers)
        things = least_tried_first(things, items)
        return await one_by_one(request, things, streams, there=there, others_stored=others, alike=alike)

    def _limits(self, lane: Lane) -> dict[str, Any]:
        return {
            "seconds": self.cloud.timeout_seconds,
            "stall_seconds": self.cloud.stall_seconds,
            "now": self.db.clock.wall(),
            "throttle": self.endpoints.line.borrow if lane == "urgent" else self.endpoints.line.wait,
        }

    def _note(self, lane: Class, number: int, answer: Answer, seconds: float, batch: _Batch) -> None:
        if answer.whole:
            self.endpoints.failed(number, answer.whole, wait=answer.wait, mendable=answer.mendable)
            batch.failed = True
            self._blame.lane_failed(lane, self.endpoints.answers)
        else:
            self._blame.lane_went(lane, answer.verdicts)
            if answer.heard:  # a suspect that fails once more says nothing of the endpoint, which may be away
                self.endpoints.succeeded(number, seconds)

    def _parts(self, items: Sequence[Row], batch: _Batch) -> tuple[list[Part], set[str]]:
        """Check each file against its digest and prepare it, and the streams that have to wait.

        What cannot leave is parked, never sent; a shortage (open files, memory, a disk that errs) passes.
        """
        parts: list[Part] = []
        held: set[str] = set()
        for item in items:
            if item["stream"] in held:
                batch.untried.append(item["id"])
                continue
            part = self._made(item, partial(self._part, item), batch, held)
            if part is not None:
                parts.append(part)
        self._prepare.keep()
        return parts, held

    def _part(self, item: Row) -> Part:
        path = self.objects.path(item["file"])
        if not path.exists() or durable.sha256_file(path) != item["sha256"]:
            raise InputError("send", "the stored file is missing or does not match its digest")
        size = path.stat().st_size
        uid, content = self._prepare.object(item, path)
        return Part(item, uid, size if content is None else len(content), path, content)

    def _bodies(self, items: Sequence[Row], batch: _Batch) -> tuple[list[tuple[Row, Mapping[str, Any]]], set[str]]:
        """Records as they leave, and the streams that have to wait."""
        ready: list[tuple[Row, Mapping[str, Any]]] = []
        held: set[str] = set()
        for item in items:
            if item["stream"] in held:
                batch.untried.append(item["id"])
                continue
            record = self._made(item, partial(self._prepare.record, item), batch, held)
            if record is not None:
                ready.append((item, record))
        self._prepare.keep()
        return ready, held

    def _made(self, item: Row, make: Callable[[], T], batch: _Batch, held: set[str]) -> T | None:
        """What ``make`` returns; None where it fails, which hits this item and what has to wait for it alone."""
        try:
            return make()
        except (OperatorError, apsw.Error):  # no key, no index: nothing can be made ready
            raise
        except Exception as error:  # noqa: BLE001 whatever it is: others must not wait for it
            found = trouble(error, self.objects.root)
        if found.after is After.park:
            self._park(item, found.cause, batch)
        elif found.after is After.wait:
            held.add(item["stream"])
            self._wait(item, found.cause, disk=found.disk)
        elif not self._ended(item, found.cause, batch):
            held.add(item["stream"])
        return None

    def _wait(self, item: Row, cause: str, *, disk: bool = False, alone: bool = False) -> None:
        """It is tried again later, and nothing is counted against it; ``disk``: an operator is told, once.

        ``alone``: it broke a request, so it goes by itself from now on.
        """
        first, longest = self.delivery.backoff_seconds, self.delivery.backoff_max_seconds
        if alone:
            counted = {"strikes": item["strikes"], "ended": item["ended"]}
            self.outbox.doubt(item["id"], self.owner, cause, **counted, first=first, longest=longest)
        else:
            self.outbox.retry(item["id"], self.owner, cause, first=first, longest=longest)
        if disk:
            self._unread &= self.outbox.waiting(tuple(self._unread))  # others were withdrawn, or parked by an operator
            if not self._unread:
                Events(self.db).add("error", "disk", f"item {item['id']}", cause)
            self._unread.add(item["id"])

    def _ended(self, item: Row, cause: str, batch: _Batch) -> bool:
        """It ended a process, or as good as; whether it was parked for it."""
        ended = int(item["ended"]) + 1
        if ended >= MOST_ENDED:
            self._park(item, f"{cause}, as {ended - 1} times before", batch)
            return True
        first, longest = self.delivery.backoff_seconds, self.delivery.backoff_max_seconds
        self.outbox.doubt(
            item["id"], self.owner, cause, strikes=item["strikes"], ended=ended, first=first, longest=longest
        )
        return False

    def _park(self, item: Row, cause: str, batch: _Batch) -> None:
        self.outbox.reject(item["id"], self.owner, cause)
        self._blame.acquit(item["id"])
        self._unread.discard(item["id"])
        self._tell_parked(item, cause)
        batch.settled += 1

    def _tell_parked(self, item: Row, cause: str) -> None:
        Events(self.db).add("error", "sync-rejected", f"item {item['id']}", cause)
        self._count(item, "rejected")

    def _settle(
        self,
        lane: Class,
        pairs: Sequence[tuple[Row, Verdict | None]],
        answer: Answer,
        batch: _Batch,
        sizes: Mapping[int, int],
    ) -> set[str]:
        """Streams that have to wait for one of these items; one without a verdict was not asked for."""
        blocked: set[str] = set()
        for item, verdict in pairs:
            if verdict is None:
                batch.untried.append(item["id"])
            elif verdict.fate is Fate.stored:
                self._unread.discard(item["id"])
                self._blame.acquit(item["id"])
                batch.stored.append(item["id"])
                if verdict.conflict:
                    batch.conflicts.add(item["id"])
                batch.settled += 1
                self._count(item, "stored", sizes.get(item["id"], 0))
            elif verdict.fate is Fate.reject:
                self._park(item, verdict.cause, batch)
                if verdict.status:
                    self._blame.item_refused(lane, item, verdict.status)
            elif verdict.disk:
                blocked.add(item["stream"])
                self._wait(item, verdict.cause, disk=True, alone=True)
            elif answer.whole:  # the endpoint is to blame, and it has a back-off of its own
                blocked.add(item["stream"])
                self._count(item, "retried")
                batch.again.append((item["id"], verdict.cause))
            elif not self._strike(lane, item, verdict, batch):
                blocked.add(item["stream"])
        return blocked

    def _strike(self, lane: Class, item: Row, verdict: Verdict, batch: _Batch) -> bool:
        """It failed and others did not; whether it was parked for that."""
        first, longest = self.delivery.backoff_seconds, self.delivery.backoff_max_seconds
        if verdict.full:
            self.outbox.retry(item["id"], self.owner, verdict.cause, first=first, longest=longest)
        else:
            strikes = self._blame.item_failed(lane, item)
            if strikes >= (MOST_REFUSED if verdict.fate is Fate.operator else MOST_TRIES):
                self._park(item, f"{verdict.cause}, again and again while others were stored", batch)
                return True
            self.outbox.doubt(
                item["id"],
                self.owner,
                verdict.cause,
                strikes=strikes,
                ended=item["ended"],
                first=first,
                longest=longest,
            )
        self._count(item, "retried")
        return False

    def _finish(self, batch: _Batch) -> None:
        if batch.stored:
            self.outbox.settle(batch.stored, self.owner, batch.conflicts)
        for cause in dict.fromkeys(c for _, c in batch.again):
            self.outbox.release([i for i, c in batch.again if c == cause], self.owner, cause)
        if batch.untried:
            self.outbox.release(batch.untried, self.owner, tried=False)

    @staticmethod
    def _count(item: Row, outcome: metrics.SendOutcome, size: int = 0) -> None:
        if item["result_id"] is None:
            RECORDS_TOTAL.labels(outcome).inc()
        else:
            metrics.sync(outcome)
            metrics.SYNC_BYTES.inc(size)


def _class(lane: Lane, item: Row) -> Class:
    return lane, item["result_id"] is not None


def runs(items: Sequence[Row]) -> Iterator[list[Row]]:
    """Items in as few requests as possible: objects or records each, and every stream in its order. Pure."""
    left = list(items)
    while left:
        objects = left[0]["result_id"] is not None
        run: list[Row] = []
        rest: list[Row] = []
        held: set[str] = set()
        for item in left:
            if (item["result_id"] is not None) == objects and item["stream"] not in held:
                run.append(item)
            else:
                held.add(item["stream"])
                rest.append(item)
        yield run
        left = rest
