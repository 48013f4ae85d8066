"""A cap on bandwidth slows what goes out; it never makes a request fail."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from dicomnode.sync.http import Progress
from dicomnode.sync.reply import Fate
from dicomnode.sync.send_records import send_records
from dicomnode.sync.stow import CHUNK_BYTES, Answer, Part, longest_seconds, store
from tests.sync.cloud_fake import FakeCloud, served
from tests.sync.index_case import secondary_capture

LIMITS: dict[str, Any] = {"seconds": 0.1, "stall_seconds": 0.05, "now": datetime(2026, 1, 1, tzinfo=UTC)}


async def slow(size: int) -> None:
    """The cap of a line on which each chunk waits for longer than a whole request may take."""
    await asyncio.sleep(0.3 if size else 0.0)


def test_objects_that_the_cap_holds_back_arrive() -> None:
    ds, data = secondary_capture()
    part = Part({}, str(ds.SOPInstanceUID), len(data), Path("unused"), data)
    fake = FakeCloud()

    async def main() -> Answer:
        async with served(fake.handle) as url, aiohttp.ClientSession() as session:
            return await store(session, url, {}, [part], **LIMITS, throttle=slow)

    answer = asyncio.run(main())
    assert not answer.whole and fake.stored == {part.uid: data}


def test_records_that_the_cap_holds_back_arrive_in_chunks() -> None:
    record = {"idempotency_key": "k", "data": "x" * CHUNK_BYTES}
    asked: list[int] = []

    async def handle(request: web.Request) -> web.Response:
        assert "Transfer-Encoding" not in request.headers
        await request.json()
        return web.json_response({"outcomes": [{"idempotency_key": "k", "outcome": "stored"}]})

    async def throttle(size: int) -> None:
        asked.append(size)
        await slow(size)

    async def main() -> Answer:
        async with served(handle, "/v1/records") as url, aiohttp.ClientSession() as session:
            return await send_records(
                session, url.removesuffix("/records"), {}, "N", [record], **LIMITS, throttle=throttle
            )

    answer = asyncio.run(main())
    assert answer.verdicts["k"].fate is Fate.stored, answer
    assert asked[0] == 0 and len(asked) == 3, "what urgent items borrowed is paid before the connection is opened"


def test_only_the_nodes_own_waits_are_free(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("dicomnode.sync.http.time.monotonic", lambda: now[0])
    progress = Progress(longest_seconds(10.0, 0))
    with progress.held():
        now[0] = 1000.0
        assert not progress.stalled(5.0)
    for now[0] in (1004.0, 1008.0):
        assert not progress.stalled(5.0)
        progress.touch()
    now[0] = 1011.0
    assert progress.stalled(5.0), "the request as a whole took more than 10 seconds of the line"


MEGABYTE = 1_000_000


@pytest.mark.parametrize(
    ("size", "rate", "lasts"),
    [
        (100 * MEGABYTE, 250_000, None),  # 2 Mbit/s
        (MEGABYTE, 125_000, None),
        (MEGABYTE, 1, 26.0),
        (MEGABYTE, 7_000, 29.0),  # the stall limit alone would never see this
    ],
)
def test_what_drips_is_over_in_less_than_30_seconds_and_a_slow_line_is_not(
    monkeypatch: pytest.MonkeyPatch, size: int, rate: int, lasts: float | None
) -> None:
    """Chunks of 64 KiB that take their time upwards, then as much of a reply; with the defaults."""
    now = [0.0]
    monkeypatch.setattr("dicomnode.sync.http.time.monotonic", lambda: now[0])
    for begin in (0, 60):  # what went well before does not buy time
        progress = Progress(longest_seconds(60.0, size))
        progress.touch(begin * MEGABYTE)
        if begin:
            progress.waiting_for_reply()
        start, moved, limit = now[0], 0, 1 if rate == 1 else 64 * 1024
        while moved < size and not progress.stalled(10.0):
            now[0] += 0.25
            moved += int(rate * 0.25) or 1
            if moved % limit < max(1, rate * 0.25):
                progress.touch(limit)
        over = now[0] - start
        assert (moved >= size) if lasts is None else over < lasts, over
