"""Records that were changed at the cloud: pulled from where the feed was left, taken in, decided.

A page and the place behind it are one transaction, so nothing is skipped and nothing counts twice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import quote

import aiohttp

from dicomnode import durable, logs, strict_json
from dicomnode.cloud_settings import node_name
from dicomnode.conflicts import KIND_OF
from dicomnode.errors import OperatorError, PeerAway, PeerError
from dicomnode.index.database import Database, Row
from dicomnode.index.operation import Events, Severity
from dicomnode.index.records import Records, Rules, Taken
from dicomnode.metrics_cloud import RECORDS_TAKEN
from dicomnode.settings import Settings
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.faults import reason
from dicomnode.sync.feed_page import NOT_WHOLE, Unkept, checked, page_of, place_behind
from dicomnode.sync.http import Progress, read_ends, watched
from dicomnode.sync.reply import retry_after_seconds

PAGE = 200
MOST_PAGES = 50
"""Of one run; the next one goes on where it ended."""

MAX_PAGE_BYTES = 16 << 20
"""A text in which one character is beyond U+FFFF takes four bytes for each of them, twice while it is read."""

MOST_SKIPPED_BYTES = 256 << 20
"""Of one record that cannot be read; only its end is kept, to know where to go on."""

END_BYTES = 4096
SHRINK = 8
"""A page that cannot be read is asked for again with so many times fewer records, at last with one."""

AGAIN = "a record that is changed at the cloud comes again"


class Unreadable(PeerError):
    """A reply that is no JSON, or too deep or too long. ``following``: the place behind it, where it is told."""

    def __init__(self, cause: str, digest: str, following: int | None) -> None:
        super().__init__("pull records", cause, "See config/cloud-api.yaml, which has the limits of records")
        self.digest, self.following = digest, following


class Leaving(Protocol):
    """Of :class:`dicomnode.sync.departure.Departures`, what is needed to compare both ends."""

    def ready(self) -> None: ...

    def record(self, item: Row) -> Mapping[str, Any]: ...

    def keep(self) -> None: ...


class Busy(PeerAway):
    """The endpoint is there and cannot answer now; ``wait``: the seconds that it named (Retry-After)."""

    def __init__(self, operation: str, cause: str, wait: float | None) -> None:
        super().__init__(operation, cause)
        self.wait = wait


class RecordPuller:
    """One per node, in the event loop of the sidecar."""

    def __init__(self, settings: Settings, db: Database, endpoints: Endpoints, leaving: Leaving) -> None:
        self.settings = settings
        self.db = db
        self.endpoints = endpoints
        self._leaving = leaving
        self.records = Records(db, Rules(settings.cloud_plan, settings.sync.conflicts, leaving.record))
        self._told = ""
        self._log = logs.get()

    async def run_once(self) -> dict[Taken, int]:
        """Pull what is new and decide on it; what became of how many.

        Raises PeerError when the endpoint answers otherwise than config/cloud-api.yaml says; told once.
        """
        try:
            found = await self._run()
        except PeerAway:
            raise
        except PeerError as error:
            await asyncio.to_thread(self._tell_feed, str(error))
            raise
        return found

    async def _run(self) -> dict[Taken, int]:
        await asyncio.to_thread(self._leaving.ready)
        number = self.endpoints.current()
        if number is None:
            return await asyncio.to_thread(self._take)
        url = self.endpoints.all[number].records_url
        headers = await self.endpoints.headers(number)
        try:
            async with self.endpoints.session(number) as session:
                found = await self._pages(session, url, headers)
                missing = await asyncio.to_thread(self.records.missing) if self._room() else []
                for kind, name in missing:
                    await self._fetch_one(session, url, headers, kind, name)
        except PeerAway as error:
            self.endpoints.failed(number, error.cause, wait=error.wait if isinstance(error, Busy) else None)
            return await asyncio.to_thread(self._take)
        await asyncio.to_thread(self._tell_feed, "")
        return found

    async def _pages(self, session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> dict[Taken, int]:
        """Each page is decided on before the next one comes, so that no more than one waits here."""
        found: dict[Taken, int] = {}
        limit, anew = PAGE, False
        for _ in range(MOST_PAGES):
            if not self._room():
                self._log.warning("records stay at the cloud: free space is at the reserve (node.reserve_mb)")
                break
            after = await asyncio.to_thread(self.records.after, url)
            address = f"{url}/records?after={after}&limit={limit}"
            try:
                body = await self._get(session, address, headers, alone=limit == 1)
            except Unreadable as error:
                if limit == 1:
                    await self._skip(session, url, headers, address, after, error)
                limit = max(1, limit // SHRINK) if limit > 1 else PAGE
                continue
            self._must_be_ours(body)
            page = await asyncio.to_thread(page_of, body)
            following, rows, unkept = page.following, page.rows, page.unkept
            if page.newest is not None and page.newest < after:  # the cloud was set back: all of it is read again
                if anew:
                    raise PeerError("pull records", "newest is behind a place that was told before", "It may only rise")
                self._log.warning("the records of the cloud begin anew", after=after, newest=page.newest)
                rows, unkept, following, anew = [], [], 0, True
            elif following < after:
                raise PeerError("pull records", f"next is {following}, behind {after}", "It may only rise")
            if following == after:
                if unkept and not rows:
                    cause = "no record of the page is whole, and next stays where it was"
                    raise PeerError("pull records", cause, "See config/cloud-api.yaml for their form")
                break
            await asyncio.to_thread(self._keep, url, rows, unkept, following)
            for what, count in (await asyncio.to_thread(self._take)).items():
                found[what] = count + (0 if what is Taken.later else found.get(what, 0))
        return found or await asyncio.to_thread(self._take)

    def _must_be_ours(self, page: Any) -> None:
        """A cloud that tells whose token it saw must name this node: with a neighbour's token come its records."""
        known = page.get("node") if isinstance(page, dict) else None
        own = node_name(self.settings.node.ae_title)
        if isinstance(known, str) and known not in ("", own):
            hint = "Give cloud.token_file the token that the cloud has for this node, or mend node.ae_title"
            raise OperatorError("pull records", "the cloud knows this token as that of another node", hint)

    async def _skip(
        self,
        session: aiohttp.ClientSession,
        url: str,
        headers: dict[str, str],
        address: str,
        after: int,
        unreadable: Unreadable,
    ) -> None:
        """Go on behind one record that cannot be read; what says so twice is no accident of the line.

        Raises Unreadable where it is not the same again, or does not tell where it ends.
        """
        if unreadable.following is None or unreadable.following <= after:
            raise unreadable
        try:
            await self._get(session, address, headers, alone=True)
        except Unreadable as again:
            if (again.digest, again.following) != (unreadable.digest, unreadable.following):
                raise
            left = Unkept(unreadable.cause, seq=unreadable.following)
            await asyncio.to_thread(self._keep, url, [], [left], unreadable.following)

    async def _fetch_one(
        self, session: aiohttp.ClientSession, url: str, headers: dict[str, str], kind: str, name: str
    ) -> None:
        """One record whose other side has not come; one that cannot be read is not asked for again."""
        try:
            one = await self._get(session, f"{url}/records/{kind}/{quote(name, safe='')}", headers)
        except Unreadable as error:
            await asyncio.to_thread(self._keep_one, url, kind, name, ([], [Unkept(error.cause, kind, name)]))
            return
        if one is not None:
            await asyncio.to_thread(self._keep_one, url, kind, name, checked([one]))

    def _room(self) -> bool:
        node = self.settings.node
        return durable.free_bytes(node.data_dir) > node.reserve_mb << 20

    def _keep(self, url: str, rows: Sequence[Row], unkept: Sequence[Unkept], following: int) -> None:
        """Records, the place behind them, and what of them could not be kept.

        A page that is longer than was asked for is kept in parts, and what it names wrongly is noted for one page:
        whoever stores an image waits for the index meanwhile. The place moves with the last part.
        """
        left = [{"why": u.why, "type": u.type, "cloud_id": u.name, "seq": u.seq} for u in unkept[:PAGE]]
        known = [r for r in rows if r["type"] in KIND_OF]
        before = self.records.after(url)
        for begin in range(0, max(1, len(known)), PAGE):
            part, last = known[begin : begin + PAGE], begin + PAGE >= len(known)
            self.records.keep(url, part, following if last else before, left if last else ())
        if unkept:
            RECORDS_TAKEN.labels(str(Taken.refused)).inc(len(unkept))
            none_whole = len(unkept) > 1 and not rows and all(u.why == NOT_WHOLE for u in unkept)
            self._tell_refused(len(unkept), f"{unkept[0].why} ({_place_text(unkept[0])})", none_whole=none_whole)

    def _keep_one(self, url: str, kind: str, name: str, found: tuple[list[Row], list[Unkept]]) -> None:
        rows, unkept = found
        if not rows:
            self.records.refuse(kind, name, unkept[0].why)
            RECORDS_TAKEN.labels(str(Taken.refused)).inc()
            self._tell_refused(1, f"{unkept[0].why} ({_place_text(unkept[0])})")
        elif not self.records.keep(url, rows, self.records.after(url)):
            self.records.look_again(rows[0]["type"], rows[0]["id"])

    def _tell_refused(self, number: int, why: str = "", *, none_whole: bool = False) -> None:
        """Records that could not be kept; those behind them are. ``none_whole``: the cloud may speak otherwise."""
        first = f", the first one: {why}" if why else ""
        text = f"{number} records of the cloud are not as they have to be and were not taken{first}"
        hint = f"See 'dicomnode records refused'; {AGAIN}"
        if none_whole:
            hint = f"No record of the page was whole: ask whether the cloud keeps to config/cloud-api.yaml. {hint}"
        Events(self.db).add("error" if none_whole else "warning", "record-refused", "cloud", f"{text}. {hint}")

    def _tell_feed(self, text: str) -> None:
        """An event when the feed cannot be read, one for each cause, and one when it can again."""
        before, self._told = self._told, text
        if text == before:
            return
        severity: Severity = "error" if text else "info"
        words = (
            f"records of the cloud cannot be read; what goes out goes on. {text}" if text else "records are read again"
        )
        Events(self.db).add(severity, "record-feed", "cloud", words)

    def _take(self) -> dict[Taken, int]:
        found = self.records.take_all()
        self._leaving.keep()
        for what, number in found.items():
            RECORDS_TAKEN.labels(str(what)).inc(number)
        if found.get(Taken.refused):
            self._tell_refused(found[Taken.refused])
        if found.get(Taken.review):
            text = f"{found[Taken.review]} conflicts wait for a decision: dicomnode conflicts list"
            Events(self.db).add("warning", "record-review", "cloud", text)
        return found

    async def _get(
        self, session: aiohttp.ClientSession, url: str, headers: dict[str, str], *, alone: bool = False
    ) -> Any:
        """The JSON value, None for 404. ``alone``: of a page with one record, whose end is wanted in any case.

        Raises Unreadable for a reply that cannot be read.
        """
        progress = Progress()

        async def request() -> tuple[int, float | None, bytes, bytes]:
            progress.waiting_for_reply()
            most = MOST_SKIPPED_BYTES if alone else MAX_PAGE_BYTES
            async with session.get(url, headers=headers, allow_redirects=False) as response:
                wait = retry_after_seconds(response.headers.get("Retry-After"), self.db.clock.wall())
                ends = await read_ends(response, MAX_PAGE_BYTES, END_BYTES, most, progress)
                return response.status, wait, *ends

        operation = "pull records"
        try:
            status, wait, body, end = await watched(request(), progress, self.settings.cloud.stall_seconds)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise PeerAway(operation, f"the endpoint cannot be reached ({reason(error)})") from None
        if status == 404:
            return None
        if status in (401, 403):
            raise OperatorError(operation, f"HTTP {status}", "Check the token and its rights at the cloud")
        if status >= 500 or status == 429:
            raise Busy(operation, f"HTTP {status}", wait)
        if status != 200:
            raise PeerError(operation, f"HTTP {status} was not expected")
        try:
            return await asyncio.to_thread(_read, body)
        except ValueError as error:
            following = place_behind(body[:END_BYTES], end)
            digest = durable.sha256(body[: body.rfind(b"]") + 1])
            raise Unreadable(f"the reply is not JSON as it has to be: {error}", digest, following) from None


def _read(body: bytes) -> Any:
    if len(body) > MAX_PAGE_BYTES:
        raise ValueError(f"it is longer than {MAX_PAGE_BYTES >> 20} MiB")
    return strict_json.read(body)


def _place_text(unkept: Unkept) -> str:
    return f"seq {unkept.seq}" if unkept.seq else f"{unkept.type or 'type'} {unkept.name or 'unknown'}"
