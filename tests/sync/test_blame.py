"""One item that the receiver cannot digest holds back neither the others nor, for ever, itself."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dicomnode.cloud_settings import CloudPlan, Sync
from dicomnode.index.database import Database
from dicomnode.sync.blame import MOST_UNPROVEN
from dicomnode.sync.sender import CloudSender
from tests.sync.cloud_fake import FakeCloud, served
from tests.sync.index_case import FakeClock, add_results, as_they_are, make_settings, sender_of, states

Fault = Callable[[FakeCloud, web.Request, bytes], web.Response | None]


def drive(
    db: Database, tmp_path: Path, fault: Fault, body: Callable[[CloudSender, FakeCloud], Awaitable[None]]
) -> None:
    fake = FakeCloud([fault] * 1000)

    async def main() -> None:
        async with served(fake.handle) as url:
            await body(sender_of(make_settings(tmp_path, cloud={"stow_url": url, "timeout_seconds": 5}), db), fake)

    asyncio.run(main())


def one(db: Database, what: str, item: int) -> Any:
    return db.value(f"SELECT {what} FROM sync_items WHERE id = ?", (item,))


def more(db: Database, tmp_path: Path, count: int) -> list[str]:
    """As many results, each of a study of its own."""
    uids = [add_results(db, tmp_path)[0] for _ in range(count)]
    as_they_are(db)
    return uids


async def later(sender: CloudSender, clock: FakeClock) -> None:
    """The back-off is over, and a probe was answered."""
    clock.now += 3600
    sender.endpoints.succeeded(0, 0.01, proven=False)
    await sender.flush()


def picky(bad: list[str], kind: str) -> Fault:
    def fault(fake: FakeCloud, request: web.Request, body: bytes) -> web.Response | None:
        if not set(bad) & set(fake.parts(request, body)):
            return None
        if kind == "cut":
            assert request.transport is not None
            request.transport.abort()
        if kind == "0x0110":
            return fake.store(request, body, dict.fromkeys(bad, 0x0110))
        return web.Response(status=500)

    return fault


@pytest.mark.parametrize("kind", ["500", "cut", "0x0110"])
def test_a_poisonous_object_is_left_behind_and_parked_in_the_end(
    db: Database, tmp_path: Path, clock: FakeClock, kind: str
) -> None:
    uids = more(db, tmp_path, 8)
    bad = uids[:7]  # more of them than are tried where nothing says that the endpoint is there

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        for _ in range(4):
            await later(sender, clock)
        assert list(fake.stored) == uids[7:], "the others went"
        assert sender.endpoints.link == "online", "and the endpoint is not blamed"
        for _ in range(20):
            await later(sender, clock)
        assert states(db)[:7] == ["pending"] * 7, "nothing else was tried, so nothing says that they are to blame"
        for n in range(9):
            [good] = more(db, tmp_path, 1)
            await later(sender, clock)
            assert good in fake.stored, n

    drive(db, tmp_path, picky(bad, kind), body)
    assert states(db) == ["rejected"] * 7 + ["stored"] * 10
    cause = {"500": "HTTP 500", "cut": "cannot be reached", "0x0110": "0x0110"}[kind]
    assert cause in db.value("SELECT last_error FROM sync_items WHERE state = 'rejected'")


def test_an_outage_parks_nothing_though_probes_are_answered(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    more(db, tmp_path, 3)

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        for _ in range(30):
            await later(sender, clock)
        assert states(db) == ["pending"] * 3
        fake.script.clear()
        await later(sender, clock)

    drive(db, tmp_path, lambda *_: web.Response(status=503), body)
    assert states(db) == ["stored"] * 3


def test_an_outage_without_probes_is_not_flooded(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    more(db, tmp_path, 12)

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        for _ in range(4):
            clock.now += 3600
            await sender.flush()
        assert len(fake.requests) == 3 + 5

    drive(db, tmp_path, lambda *_: web.Response(status=503), body)


def test_the_same_refusal_of_each_is_the_endpoints(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    """A proxy that refuses everything (HTTP 400) must not park everything."""
    more(db, tmp_path, 3)

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        await sender.flush()
        assert states(db) == ["pending"] * 3 and sender.endpoints.link == "offline"
        fake.script.clear()
        await later(sender, clock)

    drive(db, tmp_path, lambda *_: web.Response(status=400), body)
    assert states(db) == ["stored"] * 3


def answering(bad: list[str], status: int) -> Fault:
    def fault(fake: FakeCloud, request: web.Request, body: bytes) -> web.Response | None:
        return web.Response(status=status) if set(bad) & set(fake.parts(request, body)) else None

    return fault


@pytest.mark.parametrize("status", [401, 403, 404, 405, 407])
def test_a_403_of_one_item_alone_parks_it_when_others_pass(
    db: Database, tmp_path: Path, clock: FakeClock, status: int
) -> None:
    """Something before the endpoint does not like this one body."""
    bad = more(db, tmp_path, 3)[:1]

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        for _ in range(4):
            await later(sender, clock)
        assert len(fake.stored) == 2 and sender.endpoints.link == "online", "the others went"
        for n in range(3):
            assert states(db)[0] == ("pending" if n < 2 else "rejected")
            more(db, tmp_path, 1)
            await later(sender, clock)

    drive(db, tmp_path, answering(bad, status), body)
    assert f"HTTP {status}" in db.value("SELECT last_error FROM sync_items WHERE state = 'rejected'")
    assert states(db) == ["rejected"] + ["stored"] * 5


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_401_of_all_is_the_endpoints_and_parks_nothing(
    db: Database, tmp_path: Path, clock: FakeClock, status: int
) -> None:
    more(db, tmp_path, 3)

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        more(db, tmp_path, 9)
        for _ in range(20):
            before = len(fake.requests)
            await later(sender, clock)
            assert len(fake.requests) - before <= MOST_UNPROVEN, "a token that is wrong is not tried with everything"
        assert states(db) == ["pending"] * 12
        [event] = db.rows("SELECT * FROM events WHERE severity = 'error'")
        assert event["subject"] == "cloud primary" and f"HTTP {status}" in event["text"]
        fake.script.clear()
        await later(sender, clock)

    drive(db, tmp_path, lambda *_: web.Response(status=status), body)
    assert states(db) == ["stored"] * 12


def test_as_many_403_at_the_front_as_are_tried_do_not_hide_what_is_behind(
    db: Database, tmp_path: Path, clock: FakeClock
) -> None:
    bad = more(db, tmp_path, MOST_UNPROVEN + 2)
    more(db, tmp_path, 1)

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        for _ in range(6):
            await later(sender, clock)
        assert len(fake.stored) == 1
        for _ in range(4):
            more(db, tmp_path, 1)
            await later(sender, clock)

    drive(db, tmp_path, answering(bad, 403), body)
    assert states(db) == ["rejected"] * len(bad) + ["stored"] * 5


@pytest.mark.parametrize("status", [400, 413, 415, 422])
def test_one_that_is_refused_alone_waits_for_others_the_next_one_alike_blames_the_endpoint(
    db: Database, tmp_path: Path, clock: FakeClock, status: int
) -> None:
    """What was stored before proves nothing: only what is stored after a refusal shows that the item is to blame."""
    bad: list[str] = []

    async def body(sender: CloudSender, fake: FakeCloud) -> None:
        before, fake.script = fake.script, []
        more(db, tmp_path, 2)
        await later(sender, clock)
        fake.script = before
        bad.extend(more(db, tmp_path, 1))
        for _ in range(4):
            await later(sender, clock)
        assert states(db)[2] == "pending", "nobody knows whether others would be taken"
        assert sender.endpoints.health[0].failures == 0
        more(db, tmp_path, 1)
        await later(sender, clock)
        assert states(db)[2:] == ["pending"] * 2 and sender.endpoints.link == "offline"
        [event] = db.rows("SELECT * FROM events WHERE severity = 'error'")
        assert f"HTTP {status}, and so for each item by itself" in event["text"]
        fake.script = [answering(bad, status)] * 99
        more(db, tmp_path, 1)
        await later(sender, clock)
        await later(sender, clock)

    drive(db, tmp_path, lambda *_: web.Response(status=status), body)
    assert states(db) == ["stored", "stored", "rejected", "stored", "stored"]
    assert f"HTTP {status}" in one(db, "last_error", 3)
    assert ("raise its limit" in one(db, "last_error", 3)) == (status == 413)


def test_what_a_backup_stores_says_nothing_of_the_primary(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    """The primary refuses everything, and its probes are answered; between them the backup takes what there is."""
    primary, backup = FakeCloud([lambda *_: web.Response(status=400)] * 1000), FakeCloud()

    async def main() -> None:
        async with served(primary.handle) as url, served(backup.handle) as other:
            cloud = {"stow_url": url, "backups": [{"name": "second", "stow_url": other}]}
            sender = sender_of(make_settings(tmp_path, cloud=cloud), db)
            for n in range(12):
                more(db, tmp_path, 1 + n % 3)
                await later(sender, clock)
                await sender.flush()
                for number in (0, 1):
                    sender.endpoints.succeeded(number, 0.01, proven=False)

    asyncio.run(main())
    assert len(primary.requests) > 12 and not primary.stored
    assert set(states(db)) <= {"stored", "pending"} and states(db).count("stored") >= 20


@pytest.mark.parametrize("status", [400, 401])
@pytest.mark.parametrize("backup", [True, False])
def test_what_refuses_for_days_is_told_once_and_asked_seldom_though_its_probes_are_answered(
    db: Database, tmp_path: Path, clock: FakeClock, status: int, backup: bool
) -> None:
    primary, second = FakeCloud([lambda *_: web.Response(status=status)] * 10_000), FakeCloud()

    async def main() -> None:
        async with served(primary.handle) as url, served(second.handle) as other:
            backups = [{"name": "second", "stow_url": other}] if backup else []
            sender = sender_of(make_settings(tmp_path, cloud={"stow_url": url, "backups": backups}), db)
            await sender.endpoints.probe()
            more(db, tmp_path, 2)
            for second_of in range(0, 1800, 15):  # the class looks seldom, so that probes get between
                if second_of % 300 == 0:
                    more(db, tmp_path, 1)
                await sender.flush()
                for _ in range(3):
                    clock.now += 5
                    await sender.endpoints.probe()
            assert len([e for e in db.rows("SELECT * FROM events") if e["severity"] == "error"]) == 1
            assert len(primary.requests) <= 40 * (MOST_UNPROVEN + 1)
            assert sender.endpoints.current() == (1 if backup else 0)
            primary.script.clear()
            more(db, tmp_path, 1)
            clock.now += 61
            await sender.flush()
            assert primary.stored and sender.endpoints.link == "online"

    asyncio.run(main())
    assert set(states(db)) == {"stored"}
    assert [e["severity"] for e in db.rows("SELECT * FROM events ORDER BY id")] == ["error", "info"]


def test_records_whose_address_is_wrong_wait_though_objects_are_stored(
    db: Database, tmp_path: Path, clock: FakeClock
) -> None:
    fake = FakeCloud()

    async def main() -> None:
        async with served(fake.handle) as url:
            cloud = {"stow_url": url, "records_url": url.replace("/studies", "/v2")}
            sender = sender_of(make_settings(tmp_path, cloud=cloud), db)
            for _ in range(20):
                add_results(db, tmp_path, cloud=CloudPlan("cloud", records=True))
                add_results(db, tmp_path, cloud=CloudPlan("cloud", {**Sync().lanes, "result": 0}))
                as_they_are(db)
                await later(sender, clock)

    asyncio.run(main())
    assert len(fake.stored) == 20
    assert "rejected" not in states(db)
