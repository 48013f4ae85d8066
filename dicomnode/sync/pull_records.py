"""Records that were changed at the cloud: pulled from where the feed was left, taken in, decided.

A page and the place behind it are one transaction, so nothing is skipped and nothing counts twice.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from urllib.parse import quote

import aiohttp

from dicomnode import durable, logs
from dicomnode.cloud_settings import node_name
from dicomnode.conflicts import KIND_OF
from dicomnode.errors import OperatorError, PeerAway, PeerError
from dicomnode.index.database import Database, Row
from dicomnode.index.operation import Events
from dicomnode.index.records import Records, Rules, Taken
from dicomnode.metrics_cloud import RECORDS_TAKEN
from dicomnode.settings import Settings
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.http import Progress, read_bounded, watched

PAGE = 200
MOST_PAGES = 50
"""Of one run; the next one goes on where it ended."""

MAX_PAGE_BYTES = 64 << 20
MOST_NUMBER = 2**53 - 1  # config/cloud-api.yaml, also of what follows
MOST_DATA_BYTES = 256 << 10
MOST_NAMES_BYTES = 4 << 10
MOST_DEPTH = 32
_FIELDS: Mapping[str, type] = {
    "type": str,
    "id": str,
    "version": int,
    "key": str,
    "node": str,
    "data": dict,
    "changed_time": str,
    "settled": list,
    "seq": int,
}


class Leaving(Protocol):
    """Of :class:`dicomnode.sync.departure.Departures`, what is needed to compare both ends."""

    def ready(self) -> None: ...

    def record(self, item: Row) -> Mapping[str, Any]: ...

    def keep(self) -> None: ...


class RecordPuller:
    """One per node, in the event loop of the sidecar."""

    def __init__(self, settings: Settings, db: Database, endpoints: Endpoints, leaving: Leaving) -> None:
        self.settings = settings
        self.db = db
        self.endpoints = endpoints
        self._leaving = leaving
        self.records = Records(db, Rules(settings.cloud_plan, settings.sync.conflicts, leaving.record))
        self._log = logs.get()

    async def run_once(self) -> dict[Taken, int]:
        """Pull what is new and decide on it; what became of how many.

        Raises PeerError when the endpoint answers otherwise than config/cloud-api.yaml says.
        """
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
                    one = await self._get(session, f"{url}/records/{kind}/{quote(name, safe='')}", headers)
                    if one is not None:
                        await asyncio.to_thread(self._keep_one, url, kind, name, checked([one]))
        except PeerAway as error:
            self.endpoints.failed(number, error.cause)
            return await asyncio.to_thread(self._take)
        return found

    async def _pages(self, session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> dict[Taken, int]:
        """Each page is decided on before the next one comes, so that no more than one waits here."""
        found: dict[Taken, int] = {}
        for _ in range(MOST_PAGES):
            if not self._room():
                self._log.warning("records stay at the cloud: free space is at the reserve (node.reserve_mb)")
                break
            after = await asyncio.to_thread(self.records.after, url)
            page = await self._get(session, f"{url}/records?after={after}&limit={PAGE}", headers)
            rows, following = page_of(page)
            self._must_be_ours(page)
            await asyncio.to_thread(self._refused, len(page["records"]) - len(rows))
            newest = page.get("newest")
            if isinstance(newest, int) and newest < after:  # the cloud was set back: all of it is read again
                self._log.warning("the records of the cloud begin anew", after=after, newest=newest)
                rows, following = [], 0
            if following == after:
                break
            await asyncio.to_thread(self.records.keep, url, [r for r in rows if r["type"] in KIND_OF], following)
            for what, number in (await asyncio.to_thread(self._take)).items():
                found[what] = number + (0 if what is Taken.later else found.get(what, 0))
        return found or await asyncio.to_thread(self._take)

    def _must_be_ours(self, page: Mapping[str, Any]) -> None:
        """A cloud that tells whose token it saw must name this node: with a neighbour's token come its records."""
        known, own = page.get("node"), node_name(self.settings.node.ae_title)
        if isinstance(known, str) and known not in ("", own):
            hint = "Give cloud.token_file the token that the cloud has for this node, or mend node.ae_title"
            raise OperatorError("pull records", "the cloud knows this token as that of another node", hint)

    def _room(self) -> bool:
        node = self.settings.node
        return durable.free_bytes(node.data_dir) > node.reserve_mb << 20

    def _keep_one(self, url: str, kind: str, name: str, rows: list[Row]) -> None:
        if not rows:
            self.records.refuse(kind, name)
            self._refused(1)
        elif not self.records.keep(url, rows, self.records.after(url)):
            self.records.look_again(rows[0]["type"], rows[0]["id"])

    def _refused(self, number: int) -> None:
        """Records that could not be kept; those behind them are."""
        if number:
            RECORDS_TAKEN.labels(str(Taken.refused)).inc(number)
            self._tell_refused(number)

    def _tell_refused(self, number: int) -> None:
        text = f"{number} records of the cloud are not as they have to be and were not taken"
        Events(self.db).add("warning", "record-refused", "cloud", text)

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

    async def _get(self, session: aiohttp.ClientSession, url: str, headers: dict[str, str]) -> Any:
        """The JSON value, None for 404."""
        progress = Progress()

        async def request() -> tuple[int, bytes]:
            progress.waiting_for_reply()
            async with session.get(url, headers=headers, allow_redirects=False) as response:
                return response.status, await read_bounded(response, MAX_PAGE_BYTES, progress)

        operation = "pull records"
        try:
            status, body = await watched(request(), progress, self.settings.cloud.stall_seconds)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise PeerAway(operation, f"the endpoint cannot be reached ({type(error).__name__})") from None
        if status == 404:
            return None
        if status in (401, 403):
            raise OperatorError(operation, f"HTTP {status}", "Check the token and its rights at the cloud")
        if status >= 500 or status == 429:
            raise PeerAway(operation, f"HTTP {status}")
        if status != 200:
            raise PeerError(operation, f"HTTP {status} was not expected")
        try:
            return json.loads(body)
        except (ValueError, RecursionError):
            raise PeerError(operation, "the reply is not JSON", retryable=True) from None


def page_of(page: Any) -> tuple[list[Row], int]:
    """Rows and the place behind them; raises PeerError for another form. Pure."""
    if not isinstance(page, dict) or not isinstance(page.get("records"), list) or not _place(page.get("next")):
        raise PeerError("pull records", "the reply is not a page of records", retryable=True)
    return checked(page["records"]), int(page["next"])


def checked(rows: Sequence[Any]) -> list[Row]:
    """Rows as config/cloud-api.yaml has them, but for those that do not fit here.

    Raises PeerError for what is no record: then the endpoint speaks otherwise, not one record. Pure.
    """
    for row in rows:
        whole = isinstance(row, dict) and all(isinstance(row.get(k), t) for k, t in _FIELDS.items())
        if not whole or not all(_whole(row[k]) for k in ("version", "seq")) or not _texts(row["settled"]):
            raise PeerError("pull records", "a record of the reply is not whole", retryable=True)
    return [row for row in rows if fits(row)]


def fits(row: Mapping[str, Any]) -> bool:
    """Whether a whole record can be kept: one that cannot must not hold up those behind it. Pure."""
    data, settled = row["data"], row["settled"]
    names = {k: v for k, v in row.items() if k in _FIELDS and k not in ("data", "settled")}
    if max(row["version"], row["seq"]) > MOST_NUMBER or not _shallow(data):
        return False
    return _size(data) <= MOST_DATA_BYTES and _size(settled) <= MOST_DATA_BYTES and _size(names) <= MOST_NAMES_BYTES


def _shallow(data: Any) -> bool:
    """No value of JSON within more than MOST_DEPTH others."""
    level = [data]
    for _ in range(MOST_DEPTH):
        level = [v for one in level for v in (one.values() if isinstance(one, dict) else one)]
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            return True
    return False


def _size(value: Any) -> float:
    """Bytes as JSON; infinite for what is no Unicode or no number of JSON."""
    try:
        return len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
    except ValueError:
        return math.inf


def _texts(values: Sequence[Any]) -> bool:
    return all(isinstance(v, str) for v in values)


def _place(value: Any) -> bool:
    return _whole(value) and value <= MOST_NUMBER


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
