"""HTTP 413: batches are made as large as the endpoint takes them, and what is too large by itself goes elsewhere."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from hypothesis import given
from hypothesis import strategies as st

from dicomnode.cloud_settings import CloudPlan
from dicomnode.index.database import Database
from dicomnode.sync.sizes import REMEMBERED_SECONDS, Sizes
from tests.cloud.endpoint import endpoint
from tests.sync.cloud_fake import FakeCloud, served
from tests.sync.index_case import (
    FakeClock,
    add_objects,
    add_results,
    as_they_are,
    make_settings,
    secondary_capture,
    sender_of,
    states,
)

SMALL, LARGE = 120, 800
"""Rows of pictures: 15 KB, 640 KB."""


@dataclass
class Limited(FakeCloud):
    """Behind a proxy that takes so many bytes; ``sizes``: of what was refused."""

    limit: int = 1 << 30
    sizes: list[int] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        size = request.content_length or 0
        if size > self.limit:
            self.sizes.append(size)
            return web.Response(status=413)
        return await super().handle(request)


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def db(tmp_path: Path, clock: FakeClock) -> Any:
    database = Database(tmp_path / "node", clock)
    yield database
    database.close()


def results(db: Database, *rows: int) -> list[str]:
    """Results of one job, so of one stream; their SOPInstanceUIDs."""
    made = [secondary_capture(one) for one in rows]
    add_objects(db, db.data_dir, [("SEG", part10) for _, part10 in made])
    as_they_are(db)
    return [str(ds.SOPInstanceUID) for ds, _ in made]


def test_batches_become_as_large_as_the_endpoint_takes_them(db: Database, clock: FakeClock) -> None:
    fake = Limited(limit=70_000)

    async def main() -> None:
        async with served(fake.handle) as url:
            sender = sender_of(make_settings(db.data_dir, cloud={"stow_url": url}), db)

            async def sent(seconds: float, limit: int) -> int:
                """How many requests were refused for another 24 objects."""
                clock.now += seconds
                fake.limit, before = limit, len(fake.sizes)
                wanted = [uid for _ in range(8) for uid in results(db, SMALL, SMALL, SMALL)]
                assert await sender.flush() == 24
                assert fake.puts[-24:] == wanted, "in their order"
                return len(fake.sizes) - before

            assert 2 <= await sent(0, 70_000) <= 4, "it is found out by halves"
            assert await sent(0, 70_000) == 0, "and not again"
            before = len(fake.requests)
            assert await sent(REMEMBERED_SECONDS / 2, 1 << 30) == 0
            assert len(fake.requests) - before > 5
            before = len(fake.requests)
            assert await sent(REMEMBERED_SECONDS, 1 << 30) == 0
            assert len(fake.requests) - before == 1, "somebody may have raised the limit"

    asyncio.run(main())
    assert set(states(db)) == {"stored"}


def test_a_stream_keeps_its_order_where_the_limit_is_lower_than_it_was(db: Database) -> None:
    """The first of several requests is halved; what was behind what it then left untried must not overtake it."""
    fake = Limited(limit=200_000)

    async def main() -> None:
        async with served(fake.handle) as url:
            sender = sender_of(make_settings(db.data_dir, cloud={"stow_url": url}), db)
            results(db, *[SMALL] * 24)
            assert await sender.flush() == 24 and fake.sizes
            fake.limit = 70_000
            wanted = results(db, *[SMALL] * 24)
            assert await sender.flush() == 24
            assert fake.puts[24:] == wanted

    asyncio.run(main())
    assert set(states(db)) == {"stored"}


def test_records_are_halved_too(db: Database, tmp_path: Path) -> None:
    refused: list[int] = []

    async def main() -> None:
        async with endpoint(tmp_path / "cloud") as (url, storage), ClientSession() as session:

            async def limited(request: web.Request) -> web.StreamResponse:
                body = await request.read()
                if request.method == "POST" and len(body) > 4000:
                    refused.append(len(body))
                    return web.Response(status=413)
                target = f"{url}{request.path}"
                async with session.request(request.method, target, data=body, headers=request.headers) as answer:
                    return web.Response(status=answer.status, body=await answer.read(), headers=answer.headers)

            async with served(limited, "/{tail:.*}") as address:
                at = address.removesuffix("/{tail:.*}")
                cloud = {"stow_url": f"{url}/studies", "records_url": f"{at}/v1"}
                sender = sender_of(make_settings(db.data_dir, cloud=cloud), db)
                for _ in range(12):
                    add_results(db, db.data_dir, cloud=CloudPlan("cloud", records=True))
                await sender.flush()
                assert refused and set(states(db)) == {"stored"}
                count = len(refused)
                for _ in range(12):
                    add_results(db, db.data_dir, cloud=CloudPlan("cloud", records=True))
                await sender.flush()
                assert len(refused) == count and set(states(db)) == {"stored"}
                assert sender.endpoints.link == "online" and storage.arrivals()

    asyncio.run(main())


def test_what_is_too_large_goes_to_the_backup_that_takes_it(db: Database, clock: FakeClock) -> None:
    primary, backup = Limited(limit=100_000), Limited()

    async def main() -> None:
        async with served(primary.handle) as url, served(backup.handle) as other:
            cloud = {"stow_url": url, "backups": [{"name": "second", "stow_url": other}]}
            sender = sender_of(make_settings(db.data_dir, cloud=cloud), db)
            for number in (0, 1):
                sender.endpoints.succeeded(number, 0.01)
            for refused in (True, False):
                before = len(primary.sizes)
                first, large, last = results(db, SMALL, LARGE, SMALL)
                other_study = results(db, SMALL)
                assert await sender.flush() == 4
                assert {*primary.puts[-3:]} == {first, last, *other_study}
                assert primary.puts.index(first) < primary.puts.index(last)
                assert backup.puts[-1:] == [large]
                assert (len(primary.sizes) > before) == refused, "the next one is not asked for at the primary"
            assert sender.endpoints.link == "online" and len(backup.puts) == 2

            sender.endpoints.failed(1, "away")
            _, behind = results(db, LARGE, SMALL)
            assert await sender.flush() == 0
            assert states(db)[-2:] == ["pending", "pending"], "in order, so both wait"
            told = db.value("SELECT last_error FROM sync_items WHERE state = 'pending' ORDER BY id")
            assert "too large for primary" in told and "second: not there now" in told
            clock.now += 1800
            assert await sender.flush() == 2 and primary.puts[-1] == behind

    asyncio.run(main())
    assert set(states(db)) == {"stored"}


def test_records_do_not_overtake_an_object_behind_one_that_goes_elsewhere(db: Database) -> None:
    primary, backup = Limited(limit=100_000), Limited()
    order: list[int] = []

    async def main() -> None:
        async with served(primary.handle) as url, served(backup.handle) as other:
            cloud = {"stow_url": url, "backups": [{"name": "second", "stow_url": other}]}
            sender = sender_of(make_settings(db.data_dir, cloud=cloud), db)
            for number in (0, 1):
                sender.endpoints.succeeded(number, 0.01)
            results(db, LARGE)
            assert await sender.flush() == 1, "how much the primary takes is known"
            objects = sender._objects

            async def sent(*arguments: Any) -> set[str]:
                order.extend(i["id"] for i in arguments[4])
                return await objects(*arguments)

            async def told(*arguments: Any) -> set[str]:
                ids = [i["id"] for i in arguments[4]]
                order.extend(ids)
                arguments[5].stored += ids
                arguments[5].settled += len(ids)
                return set()

            sender._objects, sender._records = sent, told  # type: ignore[method-assign]
            pictures = [("SEG", secondary_capture(one)[1]) for one in (LARGE, SMALL)]
            add_objects(db, db.data_dir, pictures, CloudPlan("cloud", records=True))
            as_they_are(db)
            await sender.flush()

    asyncio.run(main())
    assert set(states(db)) == {"stored"}
    stream = {r["id"]: r["stream"] for r in db.rows("SELECT id, stream FROM sync_items")}
    last = [n for n in order if stream[n] == stream[max(order)]]
    assert len(last) > 2 and last == sorted(last)


def test_what_is_too_large_for_all_is_parked_with_that_reason(db: Database, clock: FakeClock) -> None:
    primary, backup = Limited(limit=100_000), Limited(limit=200_000)

    async def main() -> None:
        async with served(primary.handle) as url, served(backup.handle) as other:
            cloud = {"stow_url": url, "backups": [{"name": "second", "stow_url": other}]}
            sender = sender_of(make_settings(db.data_dir, cloud=cloud), db)
            results(db, LARGE)
            for _ in range(4):
                results(db, SMALL)
                await sender.flush()
                clock.now += 600
            assert sender.endpoints.health[0].failures == sender.endpoints.health[1].failures == 0

    asyncio.run(main())
    assert states(db) == ["rejected", *["stored"] * 4]
    assert "0.6 MiB are more than the endpoint takes (HTTP 413)" in db.value("SELECT last_error FROM sync_items")
    assert len(primary.sizes) + len(backup.sizes) <= 6


SIZES = st.lists(st.integers(1, 1000), min_size=1, max_size=30)


@given(st.integers(1, 2000), SIZES)
def test_what_is_known_converges(limit: int, sizes: list[int]) -> None:
    """Whatever is asked for: what was refused is not asked for again."""
    known = Sizes()
    refusals = 0
    for wanted in sizes * 4:
        size = int(min(wanted, known.most(0, True, 0.0)))
        if size > limit:
            known.refused(0, True, size, 0.0, alone=False)
            refusals += 1
        else:
            known.passed(0, True, size)
        assert refusals == 0 or known.most(0, True, 0.0) >= limit // 2, "and not cut to less than half of what passes"
    assert refusals <= 11, "halves: not one for each"
    assert known.most(0, True, REMEMBERED_SECONDS) == float("inf")
    assert known.most(0, False, 0.0) == known.most(1, True, 0.0) == float("inf"), "of another kind, another endpoint"
