"""The three classes of the outbox: how often, how many at once, what is in which, and that objects go as a stream."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from dicomnode import sidecar
from dicomnode.cloud_settings import CloudPlan, Sync
from dicomnode.index.database import Database
from dicomnode.sync import stow
from dicomnode.sync.departure import Departures
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.pull_records import RecordPuller
from dicomnode.sync.schedule import Schedule
from dicomnode.sync.sender import CloudSender
from dicomnode.sync.stow import CHUNK_BYTES, Part
from tests.sync.cloud_fake import FakeCloud, served
from tests.sync.index_case import add_results, as_they_are, make_settings, sender_of


@pytest.mark.parametrize(
    ("sync", "seconds"),
    [({}, (1.0, 5.0, 30.0)), ({"urgent_seconds": 0.5, "normal_seconds": 7.0, "batch_seconds": 90.0}, (0.5, 7.0, 90.0))],
)
def test_each_class_is_looked_at_in_its_interval(
    tmp_path: Path, sync: dict[str, Any], seconds: tuple[float, ...]
) -> None:
    db = Database(tmp_path)
    settings = make_settings(tmp_path, cloud={"stow_url": "http://127.0.0.1:9/studies"}, sync=sync)
    endpoints, leaving = Endpoints(settings, db), Departures(settings, db)
    flushed: list[str | None] = []

    class Seen(CloudSender):
        async def flush(self, lane: Any = None) -> int:
            flushed.append(lane)
            return 0

    async def main() -> None:
        schedule = Schedule()
        sender = Seen(settings, db, endpoints, leaving)
        sidecar._send_to_cloud(settings, schedule, endpoints, sender, RecordPuller(settings, db, endpoints, leaving))
        told = schedule.report()
        assert tuple(told[f"cloud-{lane}"]["every_seconds"] for lane in ("urgent", "normal", "batch")) == seconds
        schedule.start()
        while len(flushed) < 3:
            await asyncio.sleep(0)
        await schedule.stop()

    asyncio.run(asyncio.wait_for(main(), 30))
    assert sorted(map(str, flushed[:3])) == ["batch", "normal", "urgent"], "each by itself, beside the others"
    db.close()


@pytest.mark.parametrize(
    ("lane", "sync", "requests"),
    [
        (0, {}, [10, 2]),
        (1, {}, [12]),
        (2, {}, [12]),
        (0, {"urgent_items": 12}, [12]),
        (1, {"normal_items": 5}, [5, 5, 2]),
        (2, {"batch_items": 7}, [7, 5]),
    ],
)
def test_how_many_go_in_one_request(tmp_path: Path, lane: int, sync: dict[str, Any], requests: list[int]) -> None:
    assert (Sync().urgent_items, Sync().normal_items, Sync().batch_items) == (10, 50, 50)
    db, fake, sizes = Database(tmp_path), FakeCloud(), []
    add_results(db, tmp_path, 12, cloud=CloudPlan("cloud", {**Sync().lanes, "result": lane}))
    as_they_are(db)

    def count(fake: FakeCloud, request: Any, body: bytes) -> None:
        sizes.append(len(fake.parts(request, body)))

    fake.script = [count] * 9

    async def main() -> None:
        async with served(fake.handle) as url:
            await sender_of(make_settings(tmp_path, cloud={"stow_url": url}, sync=sync), db).flush()

    asyncio.run(main())
    db.close()
    assert sizes == requests


def test_the_class_of_each_type_of_data_is_a_setting() -> None:
    assert Sync().lanes == {
        "critical": 0, "result": 1, "ai-result": 1, "result-review": 1,
        "study": 2, "patient": 2, "settings": 2, "limits": 2, "preferences": 2,
    }  # fmt: skip
    keys = ("critical", "results", "summaries", "studies", "settings", "preferences")
    for n, lane in enumerate(("urgent", "normal", "batch")):
        assert set(Sync(**dict.fromkeys(keys, lane)).lanes.values()) == {n}


def test_an_object_is_sent_as_a_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Never more of it in memory than a few chunks, whatever its size."""
    path = tmp_path / "large.dcm"
    with path.open("wb") as file:
        file.truncate(5 * CHUNK_BYTES + 17)
    parts = [Part({}, "1.2.3", path.stat().st_size, path), Part({}, "1.2.4", 3, Path("unused"), b"abc")]

    async def read() -> list[int]:
        return [len(chunk) async for chunk in stow._body(b"head", parts, b"tail", {})]

    sizes = asyncio.run(read())
    assert max(sizes) == CHUNK_BYTES and sum(sizes) == 2 * len(b"head") + 2 * 2 + 4 + path.stat().st_size + 3

    async def shorter() -> None:
        body = stow._body(b"head", [Part({}, "1.2.3", path.stat().st_size + 1, path)], b"tail", {})
        with pytest.raises(OSError, match="shorter"):
            async for _ in body:
                pass

    asyncio.run(shorter())
