"""The cloud outbox at work: three classes, in order within a study, to the best endpoint, until it has all.

Sending twice is harmless: an object keeps its SOP Instance UID, a record its idempotency key.
There is no attempt limit while the cause can pass: what fails while others are stored is parked in the
end (:mod:`dicomnode.sync.blame`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import Any, TypeVar

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
from dicomnode.sync.batch import Batch, Prepare, Ready, class_of, first_of, runs
from dicomnode.sync.blame import MOST_REFUSED, MOST_TRIES, Blame, Class, least_tried_first, one_by_one, together
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.refusal import Fault, fault_of
from dicomnode.sync.reply import Fate, Verdict
from dicomnode.sync.send_records import send_records
from dicomnode.sync.sizes import TOO_LARGE, Sizes
from dicomnode.sync.stow import Answer, Part, store
from dicomnode.sync.trouble import After, trouble

T = TypeVar("T")
MEBIBYTE = 1 << 20
ABOUT_BYTES = 320  # of each record in a request beside its data: key, names, times
MOST_REQUEST_BYTES = 32 * MEBIBYTE
"""Objects of one request together; a larger one goes by itself. What is de-identified is held in memory."""


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
        self._blame, self._sizes = Blame(), Sizes()
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
            while (number := self.endpoints.for_results()) is not None:
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
                if batch.failed and self.endpoints.for_results() == number:
                    break
                if not (batch.failed or batch.settled or batch.moved or alone):
                    break
        finally:
            for session in sessions.values():
                await session.close()
        return settled

    async def _try(
        self, lane: Lane, number: int, sessions: dict[int, aiohttp.ClientSession], items: Sequence[Row]
    ) -> Batch:
        batch = Batch()
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
        batch: Batch,
    ) -> None:
        """Requests of one kind each, so that every stream keeps its order; ends at the first that fails as a whole."""
        blocked = set[str]()
        for run in runs(items):
            places, behind = self._places(number, run, batch, blocked)
            for at, some in places:
                wanted = [i for i in some if i["stream"] not in blocked]
                batch.untried += [i["id"] for i in some if i["stream"] in blocked or batch.failed]
                if not wanted or batch.failed:
                    continue
                alone = wanted[0]["suspect"] or self._blame.alone(class_of(lane, wanted[0]), at)
                try:
                    if at not in sessions:
                        sessions[at] = self.endpoints.session(at)
                    headers = await self.endpoints.headers(at)
                except OperatorError as error:
                    self.endpoints.failed(at, str(error), mendable=True)
                    batch.again += [(i["id"], str(error)) for i in wanted]
                    batch.failed = True
                    continue
                send = self._objects if wanted[0]["result_id"] is not None else self._records
                blocked |= await send(lane, at, sessions[at], headers, wanted, batch, alone)
            blocked |= behind

    def _places(
        self, number: int, run: Sequence[Row], batch: Batch, blocked: set[str]
    ) -> tuple[Sequence[tuple[int, Sequence[Row]]], set[str]]:
        """``run`` by endpoint: ``number``, or another for what is too large for it; the streams that have to wait."""
        here: list[Row] = []
        elsewhere: dict[int, list[Row]] = {}
        moved, behind = set[str](), set[str]()
        for item in run:
            if item["stream"] in moved:
                behind.add(item["stream"])
                batch.untried.append(item["id"])
                continue
            others = self._others(number, item)
            if not others or not self._too_large(number, item):
                here.append(item)
                continue
            moved.add(item["stream"])
            if (at := self.endpoints.best(others)) is not None:
                elsewhere.setdefault(at, []).append(item)
            elif item["stream"] in blocked:
                batch.untried.append(item["id"])
            else:
                behind.add(item["stream"])
                names = ", ".join(self.endpoints.all[n].name for n in others)
                self._wait(item, f"too large for {self.endpoints.all[number].name} (HTTP 413); {names}: not there now")
        return [(number, here), *elsewhere.items()], behind

    def _too_large(self, number: int, item: Row) -> bool:
        return self._sizes.too_large(number, item["result_id"] is not None, item["size"], self.db.clock.ticks())

    def _others(self, number: int, item: Row) -> list[int]:
        """Endpoints that may take it although this one does not."""
        return [n for n in range(len(self.endpoints.all)) if n != number and not self._too_large(n, item)]

    async def _objects(
        self,
        lane: Lane,
        number: int,
        session: aiohttp.ClientSession,
        headers: dict[str, str],
        items: Sequence[Row],
        batch: Batch,
        alone: bool,
    ) -> set[str]:
        parts, held = await asyncio.to_thread(self._parts, items, batch)
        if not parts:
            return held

        async def request(some: Sequence[Part]) -> Answer:
            return await store(session, self.endpoints.all[number].stow_url, headers, some, **self._limits(lane))

        ready = [Ready(p.uid, p.item, p.size, p) for p in parts]
        return held | await self._rounds(lane, number, request, ready, batch, alone)

    async def _records(
        self,
        lane: Lane,
        number: int,
        session: aiohttp.ClientSession,
        headers: dict[str, str],
        items: Sequence[Row],
        batch: Batch,
        alone: bool,
    ) -> set[str]:
        ready, held = await asyncio.to_thread(self._bodies, items, batch)
        if not ready:
            return held
        url = self.endpoints.all[number].records_url

        async def request(some: Sequence[tuple[Row, Mapping[str, Any]]]) -> Answer:
            return await send_records(session, url, headers, self._node, [r for _, r in some], **self._limits(lane))

        things = [Ready(i["idempotency_key"], i, i["size"] + ABOUT_BYTES, (i, r)) for i, r in ready]
        return held | await self._rounds(lane, number, request, things, batch, alone)

    async def _rounds(
        self,
        lane: Lane,
        number: int,
        request: Callable[[Sequence[T]], Awaitable[Answer]],
        ready: Sequence[Ready[T]],
        batch: Batch,
        alone: bool,
    ) -> set[str]:
        """Requests that are no larger than the endpoint takes; the streams that have to wait."""
        key, blocked = class_of(lane, ready[0].item), set[str]()
        objects, left = key[1], list(ready)
        while left:
            most = float("inf") if alone else self._sizes.most(number, objects, self.db.clock.ticks())
            some = first_of(left, most)
            left = left[len(some) :]
            begin = perf_counter()
            answer = await self._ask(key, number, self._measured(number, objects, request, some), some, alone)
            if objects:
                metrics.observe("sync", perf_counter() - begin)
            self._note(key, number, answer, perf_counter() - begin, batch)
            blocked |= await asyncio.to_thread(self._settle, key, number, some, answer, batch)
            if batch.failed:
                break
            batch.untried += [r.item["id"] for r in left if r.item["stream"] in blocked]
            left = [r for r in left if r.item["stream"] not in blocked]
        batch.untried += [r.item["id"] for r in left]
        return blocked

    def _measured(
        self, number: int, objects: bool, request: Callable[[Sequence[T]], Awaitable[Answer]], some: Sequence[Ready[T]]
    ) -> Callable[[Sequence[T]], Awaitable[Answer]]:
        """``request``, whose answers show how much the endpoint takes at a time."""
        sizes = {id(r.thing): (r.size, r.item["size"]) for r in some}

        async def measured(things: Sequence[T]) -> Answer:
            answer = await request(things)
            size = sum(sizes[id(t)][0] for t in things)
            if any(v.status == TOO_LARGE for v in answer.verdicts.values()):
                alone = len(things) == 1
                size = sizes[id(things[0])][1] if alone else size
                self._sizes.refused(number, objects, size, self.db.clock.ticks(), alone=alone)
            elif any(v.fate is Fate.stored for v in answer.verdicts.values()):
                self._sizes.passed(number, objects, size)
            return answer

        return measured

    async def _ask(
        self,
        lane: Class,
        number: int,
        request: Callable[[Sequence[T]], Awaitable[Answer]],
        some: Sequence[Ready[T]],
        alone: bool,
    ) -> Answer:
        items = [r.item for r in some]
        things = {r.key: r.thing for r in some}
        streams = {r.key: str(r.item["stream"]) for r in some}
        others = self._blame.others_stored(lane, number, items)
        shown = self._blame.proven(lane, number, items)
        proven = {r.key for r in some if r.item["id"] in shown}
        alike = self._blame.alike(lane, number, items)
        if not alone:
            return await together(request, things, streams, others_stored=others, proven=proven, alike=alike)
        there = self._blame.there(lane, number, self.endpoints.answers)
        things = least_tried_first(things, items)
        return await one_by_one(request, things, streams, there=there, others_stored=others, proven=proven, alike=alike)

    def _limits(self, lane: Lane) -> dict[str, Any]:
        return {
            "seconds": self.cloud.timeout_seconds,
            "stall_seconds": self.cloud.stall_seconds,
            "now": self.db.clock.wall(),
            "throttle": self.endpoints.line.borrow if lane == "urgent" else self.endpoints.line.wait,
        }

    def _note(self, lane: Class, number: int, answer: Answer, seconds: float, batch: Batch) -> None:
        if answer.whole:
            mend = answer.mendable
            self.endpoints.failed(number, answer.whole, wait=answer.wait, mendable=mend, refused=mend)
            batch.failed = True
            self._blame.lane_failed(lane, number, self.endpoints.answers)
        else:
            self._blame.lane_went(lane, number, answer.verdicts)
            if answer.heard:  # a suspect that fails once more says nothing of the endpoint, which may be away
                self.endpoints.succeeded(number, seconds)

    def _parts(self, items: Sequence[Row], batch: Batch) -> tuple[list[Part], set[str]]:
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

    def _bodies(self, items: Sequence[Row], batch: Batch) -> tuple[list[tuple[Row, Mapping[str, Any]]], set[str]]:
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

    def _made(self, item: Row, make: Callable[[], T], batch: Batch, held: set[str]) -> T | None:
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

    def _ended(self, item: Row, cause: str, batch: Batch) -> bool:
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

    def _park(self, item: Row, cause: str, batch: Batch) -> None:
        self.outbox.reject(item["id"], self.owner, cause)
        self._blame.acquit(item["id"])
        self._unread.discard(item["id"])
        self._tell_parked(item, cause)
        batch.settled += 1

    def _tell_parked(self, item: Row, cause: str) -> None:
        Events(self.db).add("error", "sync-rejected", f"item {item['id']}", cause)
        self._count(item, "rejected")

    def _settle(self, lane: Class, number: int, some: Sequence[Ready[Any]], answer: Answer, batch: Batch) -> set[str]:
        """Streams that have to wait for one of these items; one without a verdict was not asked for."""
        blocked: set[str] = set()
        for ready in some:
            item, verdict = ready.item, answer.verdicts.get(ready.key)
            if verdict is None:  # what is behind it in its stream must not overtake it
                blocked.add(item["stream"])
                batch.untried.append(item["id"])
                continue
            if verdict.fate is Fate.stored:
                self._stored(item, verdict, batch, ready.size)
                continue
            large = verdict.status == TOO_LARGE
            if large and not answer.whole and self._others(number, item):
                self._count(item, "retried")
                batch.moved.append((item["id"], f"too large for {self.endpoints.all[number].name} (HTTP 413)"))
                blocked.add(item["stream"])
                continue
            if verdict.status and fault_of(verdict.status) is Fault.item:
                self._blame.item_refused(lane, number, item, verdict.status)
            if verdict.fate is Fate.reject:
                size = f"{ready.size / MEBIBYTE:.1f} MiB are more than the endpoint takes (HTTP 413): raise its limit"
                self._park(item, f"{size}, or that of what is before it" if large else verdict.cause, batch)
            elif verdict.disk:
                blocked.add(item["stream"])
                self._wait(item, verdict.cause, disk=True, alone=True)
            elif answer.whole:  # the endpoint is to blame, and it has a back-off of its own
                blocked.add(item["stream"])
                self._count(item, "retried")
                batch.again.append((item["id"], verdict.cause))
            elif not self._strike(lane, number, item, verdict, batch):
                blocked.add(item["stream"])
        return blocked

    def _stored(self, item: Row, verdict: Verdict, batch: Batch, size: int) -> None:
        self._unread.discard(item["id"])
        self._blame.acquit(item["id"])
        batch.stored.append(item["id"])
        if verdict.conflict:
            batch.conflicts.add(item["id"])
        batch.settled += 1
        self._count(item, "stored", size)

    def _strike(self, lane: Class, number: int, item: Row, verdict: Verdict, batch: Batch) -> bool:
        """It failed and others did not; whether it was parked for that."""
        first, longest = self.delivery.backoff_seconds, self.delivery.backoff_max_seconds
        if verdict.full:
            self.outbox.retry(item["id"], self.owner, verdict.cause, first=first, longest=longest)
        else:
            strikes = self._blame.item_failed(lane, number, item)
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

    def _finish(self, batch: Batch) -> None:
        if batch.stored:
            self.outbox.settle(batch.stored, self.owner, batch.conflicts)
        again = [*batch.again, *batch.moved]
        for cause in dict.fromkeys(c for _, c in again):
            self.outbox.release([i for i, c in again if c == cause], self.owner, cause)
        if batch.untried:
            self.outbox.release(batch.untried, self.owner, tried=False)

    @staticmethod
    def _count(item: Row, outcome: metrics.SendOutcome, size: int = 0) -> None:
        if item["result_id"] is None:
            RECORDS_TOTAL.labels(outcome).inc()
        else:
            metrics.sync(outcome)
            metrics.SYNC_BYTES.inc(size)
