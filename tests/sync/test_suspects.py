"""An item that ends the process, or the one that de-identifies, is parked in the end, across restarts; others go on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dicomnode.deidentify import Departure
from dicomnode.index.cloud_outbox import MOST_ENDED, CloudOutbox
from dicomnode.index.database import Database
from dicomnode.sync.aside import ChildEnded, leave
from dicomnode.sync.batch import Ready
from dicomnode.sync.blame import MOST_TRIES
from dicomnode.sync.departure import Departures
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.sender import CloudSender
from tests.sync.cloud_fake import FakeCloud, served
from tests.sync.index_case import FakeClock, add_results, as_they_are, make_settings, sender_of, states
from tests.sync.test_blame import picky


class Died(BaseException):
    """kill -9: nothing is tidied up after it."""


class Mortal(CloudSender):
    """Dies when it sends an item of ``poison``."""

    poison: Sequence[str] = ()
    died_alone = False

    async def _ask(self, lane: Any, number: int, request: Any, some: Sequence[Ready[Any]], alone: bool) -> Any:
        if {r.item["SOPInstanceUID"] for r in some} & set(self.poison):
            self.outbox.release = lambda *_, **__: None  # type: ignore[method-assign]
            self.died_alone = len(some) == 1
            raise Died
        return await super()._ask(lane, number, request, some, alone)


def one(db: Database, what: str, item: int) -> Any:
    return db.value(f"SELECT {what} FROM sync_items WHERE id = ?", (item,))


def test_an_item_that_ends_the_process_each_time_is_parked_and_the_others_go(
    db: Database, tmp_path: Path, clock: FakeClock
) -> None:
    fake = FakeCloud()
    before, (bad, behind) = add_results(db, tmp_path), add_results(db, tmp_path, 2)
    after = add_results(db, tmp_path)
    as_they_are(db)

    async def life() -> bool:
        """One life of the process; whether it ended well."""
        async with served(fake.handle) as url:
            settings = make_settings(tmp_path, cloud={"stow_url": url})
            sender = Mortal(settings, db, Endpoints(settings, db), Departures(settings, db))
            sender.poison = [bad]
            sender.start()
            try:
                await sender.flush()
            except Died:
                assert sender.died_alone or not fake.stored
                return False
            return True

    assert not asyncio.run(life()), "with all of them in hand"
    assert not asyncio.run(life()), "with it alone"
    assert asyncio.run(life()), "it waits"
    assert set(fake.stored) == {*before, *after}, "the others went"
    for n in range(2, MOST_ENDED + 1):
        assert states(db)[1] == "pending", n
        clock.now += 3600
        assert not asyncio.run(life()) and asyncio.run(life())
    assert set(fake.stored) == {*before, *after, behind}, "what is behind it goes on"
    assert states(db) == ["stored", "rejected", "stored", "stored"]
    assert one(db, "last_error", 2) == f"the sidecar ended {MOST_ENDED} times while it sent this item alone"
    assert [e["subject"] for e in db.rows("SELECT * FROM events WHERE kind = 'sync-rejected'")] == ["item 2"]

    CloudOutbox(db).requeue(2)  # by hand: all its tries again, alone
    assert not asyncio.run(life()) and one(db, "trying", 2) == 1
    assert states(db)[1] == "sending"
    assert asyncio.run(life()) and one(db, "ended", 2) == 1 and states(db)[1] == "pending", "it waits"


def test_a_stop_speaks_against_nothing(db: Database, tmp_path: Path) -> None:
    add_results(db, tmp_path)
    as_they_are(db)
    db._connection().execute("UPDATE sync_items SET suspect = 1, ended = 3")

    class Stopped(CloudSender):
        async def _ask(self, *_: Any) -> Any:
            raise asyncio.CancelledError

    settings = make_settings(tmp_path, cloud={"stow_url": "http://127.0.0.1:9/studies"})
    sender = Stopped(settings, db, Endpoints(settings, db), Departures(settings, db))
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(sender.flush())
    sender.start()
    assert states(db) == ["pending"] and one(db, "ended", 1) == 3


def test_a_suspect_that_fails_once_more_does_not_make_an_endpoint_well(
    db: Database, tmp_path: Path, clock: FakeClock
) -> None:
    add_results(db, tmp_path)
    as_they_are(db)
    db._connection().execute("UPDATE sync_items SET suspect = 1, strikes = 1")
    sender = sender_of(make_settings(tmp_path, cloud={"stow_url": "http://127.0.0.1:9/studies"}), db)
    sender.endpoints.failed(0, "away")
    clock.now += 3600
    asyncio.run(sender.flush())
    assert one(db, "attempts", 1) == 1 and one(db, "suspect", 1) == 1
    assert not sender.endpoints.health[0].well and sender.endpoints.answers == 0


def test_suspicions_outlive_a_restart(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    """What fails while others are stored is parked after so many times, however often the sidecar is restarted."""
    [bad] = add_results(db, tmp_path)
    fake = FakeCloud([picky([bad], "500")] * 1000)
    lives = 0

    async def life() -> None:
        async with served(fake.handle) as url:
            sender = sender_of(make_settings(tmp_path, cloud={"stow_url": url}), db)
            sender.start()
            for _ in range(4):
                add_results(db, tmp_path)
                as_they_are(db)
                clock.now += 3600
                sender.endpoints.succeeded(0, 0.01, proven=False)
                await sender.flush()

    while states(db)[0] != "rejected":
        lives += 1
        assert lives < MOST_TRIES
        asyncio.run(life())
    assert lives > 2 and one(db, "strikes", 1) == MOST_TRIES - 1
    assert "again and again while others were stored" in one(db, "last_error", 1)


def test_an_object_that_ends_the_de_identifier_is_parked_and_its_study_goes_on(
    db: Database, tmp_path: Path, clock: FakeClock
) -> None:
    fake = FakeCloud()
    add_results(db, tmp_path, 2)
    add_results(db, tmp_path)
    bad = one(db, "(SELECT file FROM results r WHERE r.id = result_id)", 1)

    def take_away(path: Path, key: bytes, plain_slice: bool) -> Departure:
        if path.name == Path(bad).name:
            raise ChildEnded("de-identify", "the de-identifier ended by signal 9, memory most likely")
        return leave(path, key)

    async def life(times: int) -> None:
        async with served(fake.handle) as url:
            settings = make_settings(tmp_path, cloud={"stow_url": url})
            sender = CloudSender(settings, db, Endpoints(settings, db), Departures(settings, db, take_away))
            sender.start()
            for _ in range(times):
                await sender.flush()
                clock.now += 3600

    asyncio.run(life(MOST_ENDED - 2))
    assert states(db) == ["pending", "pending", "stored"], "its study waits for it"
    asyncio.run(life(1))
    assert states(db)[0] == "pending"
    asyncio.run(life(1))
    assert states(db) == ["rejected", "stored", "stored"]
    assert one(db, "last_error", 1) == ("the de-identifier ended by signal 9, memory most likely, as 9 times before")
    bad = "nothing"
    CloudOutbox(db).requeue(1)
    asyncio.run(life(1))
    assert states(db) == ["stored"] * 3
