"""The cloud outbox: results by STOW-RS until the endpoint names them as stored (PS3.18 10.5).

Objects are streamed from disk as they are. Sending one twice is harmless: its SOP Instance
UID never changes. There is no attempt limit while the cause can pass.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import aiohttp

from dicomnode import durable, logs, metrics
from dicomnode.errors import NodeError, OperatorError
from dicomnode.index.database import Database, Row
from dicomnode.index.operation import Events
from dicomnode.index.outbox import Outbox
from dicomnode.index.states import backoff_seconds
from dicomnode.settings import Settings
from dicomnode.sync.http import confidential, open_session, read_bounded, read_token
from dicomnode.sync.reply import Fate, Reply, Verdict, judge, parse_reply, retry_after_seconds

DESTINATION = "cloud"
"""Name of the cloud in ``sync_items.destination``."""

BATCH_OBJECTS = 16
MAX_REPLY_BYTES = 4 << 20
SLOWEST_BYTES_PER_SECOND = 125_000
"""A line of 1 Mbit/s."""
CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Part:
    """One object of a request. ``size`` is what is sent, in bytes."""

    item: Row
    size: int

    @property
    def uid(self) -> str:
        return str(self.item["SOPInstanceUID"])


class StowSender:
    """One per node: leases carry ``owner``, and the endpoint's own back-off is kept here."""

    def __init__(self, settings: Settings, db: Database, owner: str = "sidecar") -> None:
        self.cloud = settings.cloud
        self.delivery = settings.delivery
        self.db = db
        self.owner = owner
        self.outbox = Outbox(db, "sync_items")
        self.objects = durable.ObjectStore(settings.node.data_dir)
        self._log = logs.get()
        self._failures = 0
        self._not_before = 0.0
        self._told = ""

    def start(self) -> None:
        """Take back what a former life had in hand."""
        self.outbox.expire(own=self.owner)

    async def flush(self) -> int:
        """Send what is due; returns how many items were settled. Ends at the first failing request."""
        if not self.cloud.stow_url:
            return 0
        settled = 0
        await asyncio.to_thread(self.outbox.expire)
        while self.db.clock.ticks() >= self._not_before:
            items = await asyncio.to_thread(self._lease)
            if not items:
                break
            before = settled
            settled += await self._send(items)
            if self._not_before > self.db.clock.ticks() or settled == before:
                break
        return settled

    def _lease(self) -> list[Row]:
        seconds = self.cloud.timeout_seconds * (BATCH_OBJECTS + 1) + 60.0
        return self.outbox.lease(DESTINATION, self.owner, seconds, BATCH_OBJECTS)

    async def _send(self, items: Sequence[Row]) -> int:
        """One request, and one for each object by itself when it was refused as a whole."""
        parts, settled = await asyncio.to_thread(self._open_parts, items)
        if not parts:
            return settled
        try:
            async with await self._session() as session:
                verdicts, wait = await self._request(session, parts)
                alone = [p for p in parts if verdicts[p.uid].fate is Fate.alone]
                for part in alone:
                    own, wait = await self._request(session, [part])
                    verdicts |= own
        except OperatorError as error:
            verdicts, wait = dict.fromkeys((p.uid for p in parts), Verdict(Fate.operator, str(error))), None
        return settled + await asyncio.to_thread(self._settle, parts, verdicts, wait)

    async def _session(self) -> aiohttp.ClientSession:
        if not confidential(self.cloud.stow_url):
            raise OperatorError("send to the cloud", "cloud.stow_url is not https", "Results carry patient identity")
        return open_session(self.cloud, self.cloud.stow_url)

    def _open_parts(self, items: Sequence[Row]) -> tuple[list[Part], int]:
        """Check each file against its digest; a damaged one is parked, never sent."""
        parts: list[Part] = []
        for item in items:
            path = self.objects.path(item["file"])
            try:
                whole = durable.sha256_file(path) == item["sha256"]
                size = path.stat().st_size
            except OSError:
                whole, size = False, 0
            if whole:
                parts.append(Part(item, size))
                continue
            self.outbox.reject(item["id"], self.owner, "the stored file is missing or does not match its digest")
            Events(self.db).add("error", "sync-rejected", f"item {item['id']}", "the stored file is damaged")
            metrics.sync("rejected")
        return parts, len(items) - len(parts)

    async def _request(
        self, session: aiohttp.ClientSession, parts: Sequence[Part]
    ) -> tuple[dict[str, Verdict], float | None]:
        """Verdict by SOPInstanceUID, and Retry-After in seconds where it was given."""
        uids = [p.uid for p in parts]
        boundary = secrets.token_hex(24)
        head = _head(boundary)
        tail = f"--{boundary}--\r\n".encode()
        length = sum(len(head) + p.size + 2 for p in parts) + len(tail)
        headers = {
            "Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}',
            "Content-Length": str(length),
            "Accept": "application/dicom+json",
        }
        token = await asyncio.to_thread(read_token, self.cloud.token_file)
        if token:
            headers["Authorization"] = f"Bearer {token}"
        begin = perf_counter()
        reply: Reply | None = None
        wait: float | None = None
        try:
            async with session.post(
                self.cloud.stow_url,
                data=self._body(head, parts, tail),
                headers=headers,
                allow_redirects=False,
                timeout=request_timeout(self.cloud.timeout_seconds, length),
            ) as response:
                wait = retry_after_seconds(response.headers.get("Retry-After"), self.db.clock.wall())
                status = response.status
                try:
                    body = await read_bounded(response, MAX_REPLY_BYTES)
                    reply = parse_reply(response.headers.get("Content-Type", ""), body)
                except (ValueError, aiohttp.ClientPayloadError):
                    reply = None
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            verdict = Verdict(Fate.retry, f"the endpoint cannot be reached: {type(error).__name__}")
            return dict.fromkeys(uids, verdict), wait
        except NodeError as error:
            return dict.fromkeys(uids, Verdict(Fate.retry, error.cause)), wait
        finally:
            metrics.observe("sync", perf_counter() - begin)
        return judge(status, reply, uids), wait

    async def _body(self, head: bytes, parts: Sequence[Part], tail: bytes) -> AsyncIterator[bytes]:
        for part in parts:
            yield head
            file = await asyncio.to_thread(self.objects.path(part.item["file"]).open, "rb")
            with file:
                left = part.size
                while left:
                    chunk = await asyncio.to_thread(file.read, min(CHUNK_BYTES, left))
                    if not chunk:
                        raise OSError("the file became shorter while it was sent")
                    left -= len(chunk)
                    yield chunk
            yield b"\r\n"
        yield tail

    def _settle(self, parts: Sequence[Part], verdicts: dict[str, Verdict], wait: float | None) -> int:
        settled = 0
        passing = [v for v in verdicts.values() if v.fate in {Fate.retry, Fate.operator, Fate.alone}]
        whole_failed = len(passing) == len(verdicts)
        self._failures = self._failures + 1 if whole_failed else 0
        first, longest = self.delivery.backoff_seconds, self.delivery.backoff_max_seconds
        for part in parts:
            verdict, item_id = verdicts[part.uid], part.item["id"]
            if verdict.fate is Fate.stored:
                self.outbox.stored(item_id, self.owner)
                metrics.sync("stored")
                metrics.SYNC_BYTES.inc(part.size)
                settled += 1
            elif verdict.fate is Fate.reject:
                self.outbox.reject(item_id, self.owner, verdict.cause)
                Events(self.db).add("error", "sync-rejected", f"item {item_id}", verdict.cause)
                metrics.sync("rejected")
                settled += 1
            else:
                pause = {"first": wait, "longest": wait} if wait is not None else {"first": first, "longest": longest}
                self.outbox.retry(item_id, self.owner, verdict.cause, **pause)
                metrics.sync("retried")
        if whole_failed:
            pause_all = wait if wait is not None else backoff_seconds(self._failures, first, longest)
            self._not_before = self.db.clock.ticks() + pause_all
        self._tell(passing[0] if passing else None)
        return settled

    def _tell(self, verdict: Verdict | None) -> None:
        """One event when the cloud goes away, one for each new cause an operator can mend, one when it is back."""
        text = verdict.cause if verdict else ""
        kind = verdict.fate if verdict else Fate.stored
        state = f"{kind}:{text}" if kind is Fate.operator else str(kind)
        if state == self._told:
            return
        if kind is Fate.stored:
            if self._told:
                Events(self.db).add("info", "cloud", DESTINATION, "results are accepted again")
        elif kind is Fate.operator:
            Events(self.db).add("error", "cloud", DESTINATION, text)
        else:
            Events(self.db).add("warning", "cloud", DESTINATION, f"results wait: {text}")
        self._told = "" if kind is Fate.stored else state
        self._log.info("cloud", destination=DESTINATION, state=str(kind), cause=text)


def request_timeout(seconds: float, length: int) -> aiohttp.ClientTimeout:
    """``seconds`` and the time that ``length`` bytes take on a slow line: else a large batch would never arrive."""
    return aiohttp.ClientTimeout(total=seconds + length / SLOWEST_BYTES_PER_SECOND, connect=min(30.0, seconds))


def _head(boundary: str) -> bytes:
    """Part header (PS3.18 8.6.1.2.1.4), without the transfer-syntax parameter.

    The file's meta header says it anyway, and Orthanc's plug-in (1.7) passes over a part
    whose type has a parameter, with HTTP 200 and nothing stored.
    """
    return f"--{boundary}\r\nContent-Type: application/dicom\r\n\r\n".encode("ascii")
