"""The cap on what goes out: how much, and who waits for whom."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.index.database import Database
from dicomnode.model_desk import ModelDesk
from dicomnode.sidecar_fleet import Fleet
from dicomnode.sync.bandwidth import LOAN_SHARE, Bucket
from dicomnode.sync.departure import Departures
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.heartbeat import Heartbeat
from dicomnode.sync.sender import CloudSender
from tests.sync.cloud_fake import FakeCloud, served
from tests.sync.index_case import add_results, make_settings

RATE, BURST, LOAN = 1000.0, 1.0, 10.0
CHUNKS = st.integers(1, 2000)
SENDERS = st.lists(st.tuples(st.booleans(), st.lists(CHUNKS, min_size=1, max_size=30)), min_size=1, max_size=5)


class Line:
    """Senders that each send their chunks one after another, on a clock of its own."""

    def __init__(self, senders: list[tuple[bool, Any]]) -> None:
        self.now = 0.0
        self.bucket = Bucket(RATE, BURST, LOAN, lambda: self.now)
        self.left = [(urgent, iter(chunks)) for urgent, chunks in senders]
        self.ready = [0.0] * len(senders)
        self.sent: list[tuple[float, int, bool]] = []
        self.waits: list[tuple[float, bool]] = []

    def run(self, until: float = 1e9) -> None:
        while self.left and self.now < until:
            n = min(range(len(self.left)), key=lambda i: self.ready[i])
            self.now = max(self.now, self.ready[n])
            urgent, chunks = self.left[n]
            size = next(chunks, None)
            if size is None:
                del self.left[n], self.ready[n]
                continue
            wait = self.bucket.take(size, urgent=urgent)
            self.waits.append((wait, urgent))
            self.ready[n] = self.now + wait
            self.sent.append((self.ready[n], size, urgent))


@given(SENDERS)
def test_never_more_than_the_rate_the_burst_and_the_loan(senders: list[tuple[bool, list[int]]]) -> None:
    line = Line(senders)
    line.run()
    times = sorted({t for t, _, _ in line.sent})
    for begin in times:
        for end in times:
            if end >= begin:
                went = sum(s for t, s, _ in line.sent if begin <= t <= end)
                # What waited for its turn went by the end of its wait, so one chunk for each sender is on top
                on_top = 2000 * len(senders)
                assert went <= RATE * (end - begin) + RATE * (BURST + LOAN) + on_top


@given(SENDERS)
def test_without_urgent_traffic_the_cap_is_exact(senders: list[tuple[bool, list[int]]]) -> None:
    line = Line([(False, chunks) for _, chunks in senders])
    line.run()
    for t, _, _ in line.sent:
        assert sum(s for u, s, _ in line.sent if u <= t) <= RATE * (t + BURST) + 1e-6


@given(SENDERS)
def test_nobody_waits_longer_than_the_loan_and_those_before_it(senders: list[tuple[bool, list[int]]]) -> None:
    line = Line(senders)
    line.run()
    for wait, _ in line.waits:
        assert wait <= LOAN + 2000 * len(senders) / (RATE * LOAN_SHARE) + 1e-6


def endless(size: int) -> Any:
    while True:
        yield size


def test_urgent_traffic_without_end_leaves_the_others_their_half() -> None:
    line = Line([(True, endless(200)), (True, endless(200)), (False, endless(200))])
    line.run(until=1000.0)
    others = sum(s for _, s, urgent in line.sent if not urgent)
    assert others >= 0.49 * RATE * 1000
    assert sum(s for _, s, _ in line.sent) >= 0.99 * RATE * 1000, "and nothing of the line is left unused"


def test_what_is_urgent_goes_at_once_on_a_loan_which_grows_again() -> None:
    now = [0.0]
    bucket = Bucket(RATE, BURST, LOAN, lambda: now[0])
    assert bucket.take(int(RATE * (BURST + LOAN)), urgent=True) == 0.0
    assert bucket.take(100, urgent=True) == 100 / (RATE * LOAN_SHARE), "beyond it, as it is granted anew"
    assert bucket.take(100) > LOAN
    now[0] = 3.0
    assert bucket.take(int(3.0 * RATE * LOAN_SHARE) - 100, urgent=True) == 0.0


def test_no_cap_is_no_wait() -> None:
    bucket = Bucket(0.0)
    assert bucket.take(10**9) == bucket.take(10**9, urgent=True) == 0.0


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), CHUNKS, st.booleans()), max_size=40))
def test_a_clock_that_goes_back_lends_nothing(steps: list[tuple[float, int, bool]]) -> None:
    now = [0.0]
    bucket = Bucket(RATE, BURST, LOAN, lambda: now[0])
    for at, size, urgent in steps:
        now[0] = at
        assert bucket.take(size, urgent=urgent) >= 0.0
        assert bucket._level <= bucket._most and bucket._loan <= bucket._most_loan


def test_everything_that_goes_out_is_under_one_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Objects, records, heartbeats and metrics: what a server counts is what the line was asked for, or less."""
    asked: list[int] = []
    counted = [0]

    async def wait(_: Bucket, size: int) -> None:
        asked.append(size)

    monkeypatch.setattr(Bucket, "wait", wait)
    monkeypatch.setattr(Bucket, "borrow", wait)
    fake = FakeCloud()

    async def handle(request: web.Request) -> web.StreamResponse:
        counted[0] += len(await request.read())
        if request.path.endswith("/studies"):
            return await fake.handle(request)
        if request.path.endswith("/records"):
            keys = [r["idempotency_key"] for r in (await request.json())["records"]]
            return web.json_response({"outcomes": [{"idempotency_key": k, "outcome": "stored"} for k in keys]})
        return web.json_response({"generation": 0})

    async def main() -> None:
        async with served(handle, "/{any:.*}") as url:
            base = url.removesuffix("/{any:.*}")
            db = Database(tmp_path)
            cloud = {"stow_url": f"{base}/studies", "records_url": f"{base}/v1"}
            settings = make_settings(
                tmp_path, cloud=cloud, sync={"bandwidth_kb": 100}, metrics={"remote_write_url": f"{base}/write"}
            )
            before = 0

            def more() -> bool:
                nonlocal before
                grown, before = counted[0] - before, counted[0]
                return grown > 0 and counted[0] <= sum(asked)

            endpoints = Endpoints(settings, db)
            add_results(db, tmp_path, cloud=settings.cloud_plan)
            assert await CloudSender(settings, db, endpoints, Departures(settings, db)).flush() == 3 and more()
            assert await Heartbeat(settings, db, endpoints, dict).beat() and more()
            fleet = Fleet(settings, db, endpoints, ModelDesk(settings, db, lambda _: None), "sidecar")
            assert fleet._push is not None
            await asyncio.to_thread(fleet._push.start)
            await fleet._push.collect()
            assert await fleet._push.push() == 1 and more()
            db.close()

    asyncio.run(main())
