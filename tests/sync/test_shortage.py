"""A passing shortage of this machine parks nothing."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from dicomnode import deidentify, durable
from dicomnode.cloud_settings import CloudPlan
from dicomnode.index.cloud_outbox import MOST_ENDED
from dicomnode.index.database import Database, Row
from dicomnode.pseudonyms import Pseudonyms
from dicomnode.sync import stow
from dicomnode.sync.aside import leave
from tests.cloud.endpoint import endpoint
from tests.sync.cloud_fake import FakeCloud, served
from tests.sync.index_case import (
    FakeClock,
    add_results,
    as_they_are,
    make_settings,
    secondary_capture,
    sender_of,
    states,
)


@pytest.mark.parametrize(
    "error", [OSError(errno.EMFILE, os.strerror(errno.EMFILE)), OSError(errno.EIO, "Input/output error"), MemoryError()]
)
@pytest.mark.parametrize("where", ["digest", "prepare"])
def test_a_result_waits_until_the_shortage_is_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, where: str
) -> None:
    clock, fake = FakeClock(), FakeCloud()
    db = Database(tmp_path, clock)
    [first], [second] = add_results(db, tmp_path), add_results(db, tmp_path)
    as_they_are(db)

    def short(*_: Any) -> Any:
        raise error

    async def main() -> None:
        async with served(fake.handle) as url:
            sender = sender_of(make_settings(tmp_path, cloud={"stow_url": url}), db)
            with monkeypatch.context() as patch:
                if where == "digest":
                    patch.setattr(durable, "sha256_file", short)
                else:
                    patch.setattr(sender._prepare, "object", short)
                assert await sender.flush() == 0
                assert states(db) == ["pending"] * 2
                assert "is tried again" in db.value("SELECT last_error FROM sync_items")
            clock.now += 3600
            assert await sender.flush() == 2

    asyncio.run(main())
    db.close()
    assert set(fake.stored) == {first, second}


def test_reading_and_parsing_tell_a_shortage_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(IsADirectoryError):
        leave(tmp_path, b"k" * 32)
    for error in (MemoryError(), OSError(errno.EMFILE, "Too many open files")):

        def short(*_: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(deidentify, "_object", short)
        with pytest.raises(type(error)):
            deidentify.deidentify(secondary_capture()[1], Pseudonyms(b"k" * 32))


PLAN = CloudPlan("cloud", records=True)
ERRORS = [OSError(errno.EIO, "Input/output error"), MemoryError(), ValueError("CANARY"), RecursionError()]


def _one(db: Database, what: str, item: int) -> Any:
    return db.value(f"SELECT {what} FROM sync_items WHERE id = ?", (item,))


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("kind", ["object", "record"])
def test_what_cannot_be_made_ready_hits_one_item_and_no_other(tmp_path: Path, kind: str, error: Exception) -> None:
    """The disk is not the item's fault, however often it errs; what nobody expects is, after some times."""
    clock = FakeClock()
    db = Database(tmp_path / "node", clock)
    passing = isinstance(error, OSError | MemoryError)

    async def main() -> None:
        async with endpoint(tmp_path / "cloud") as (url, storage):
            cloud = {"stow_url": f"{url}/studies", "records_url": f"{url}/v1"}
            sender = sender_of(make_settings(tmp_path / "node", cloud=cloud), db)
            for _ in range(3):
                add_results(db, tmp_path / "node", cloud=PLAN)
            as_they_are(db)
            column = "result_id" if kind == "object" else "record_id"
            bad = db.value(f"SELECT id FROM sync_items WHERE {column} IS NOT NULL ORDER BY id LIMIT 1")
            behind = db.rows("SELECT id FROM sync_items WHERE stream = ? AND id > ?", (_one(db, "stream", bad), bad))
            real = getattr(sender._prepare, kind)

            def make(item: Row, *more: Any) -> Any:
                if item["id"] == bad:
                    raise error
                return real(item, *more)

            setattr(sender._prepare, kind, make)
            for n in range(1, MOST_ENDED + 3):
                await sender.flush()
                waiting = {r["id"] for r in db.rows("SELECT id FROM sync_items WHERE state = 'pending'")}
                if passing or n < MOST_ENDED:
                    assert waiting == {bad, *(r["id"] for r in behind)}, "its stream waits, and no other one"
                clock.now += 3600
            assert sender.endpoints.health[0].failures == 0 and storage.arrivals()
            told = _one(db, "last_error", bad)
            assert "CANARY" not in told
            assert ("the disk of " in told and "Input/output error" in told) == isinstance(error, OSError)
            events = db.rows("SELECT * FROM events WHERE kind = 'disk'")
            assert len(events) == isinstance(error, OSError), "told once"
            assert _one(db, "state", bad) == ("pending" if passing else "rejected")
            if not passing:
                return
            assert (_one(db, "strikes", bad), _one(db, "ended", bad)) == (0, 0)
            setattr(sender._prepare, kind, real)
            await sender.flush()
            assert set(states(db)) == {"stored"}

    asyncio.run(main())
    db.close()


def test_a_disk_that_errs_is_told_again_when_what_it_kept_before_is_not_wanted_any_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    db = Database(tmp_path, clock)
    for _ in range(2):
        add_results(db, tmp_path)
    as_they_are(db)
    sender = sender_of(make_settings(tmp_path, cloud={"stow_url": "http://127.0.0.1:9/studies"}), db)

    def errs(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(durable, "sha256_file", errs)

    def told() -> list[str]:
        asyncio.run(sender.flush())
        clock.now += 3600
        return [str(r["subject"]) for r in db.rows("SELECT subject FROM events WHERE kind = 'disk' ORDER BY id")]

    assert told() == told() == ["item 1"], "once, for all that wait"
    with db.transaction():
        db.execute("UPDATE sync_items SET state = 'rejected'")  # an operator has given them up
    assert told() == ["item 1"]
    add_results(db, tmp_path)
    as_they_are(db)
    assert told() == told() == ["item 1", "item 3"]
    db.close()


def test_a_disk_that_errs_while_a_file_is_sent_blames_neither_object_nor_endpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, fake = FakeClock(), FakeCloud()
    db = Database(tmp_path, clock)
    uids = [add_results(db, tmp_path)[0] for _ in range(3)]
    as_they_are(db)
    real = stow._file

    async def broken(part: stow.Part) -> AsyncGenerator[bytes, None]:
        if part.uid == uids[1]:
            raise OSError(errno.EIO, "Input/output error")
        async for chunk in real(part):
            yield chunk

    async def main() -> None:
        async with served(fake.handle) as url:
            sender = sender_of(make_settings(tmp_path, cloud={"stow_url": url}), db)
            with monkeypatch.context() as patch:
                patch.setattr(stow, "_file", broken)
                for _ in range(12):
                    await sender.flush()
                    clock.now += 3600
                assert states(db) == ["stored", "pending", "stored"]
                assert sender.endpoints.health[0].failures == 0, "the endpoint is not to blame"
                assert "the disk of " in _one(db, "last_error", 2) and _one(db, "strikes", 2) == 0
            await sender.flush()

    asyncio.run(main())
    assert set(fake.stored) == set(uids)
    db.close()
