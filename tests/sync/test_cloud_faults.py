"""Everything arrives exactly once in effect, in order per study, whatever the line does (RELIABILITY.md)."""

from __future__ import annotations

import asyncio
import random
import ssl
import time
from pathlib import Path
from typing import Any

import pytest

from dicomnode.cloud.storage import Storage
from dicomnode.cloud_settings import Cloud, CloudPlan, Sync
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs, Outcome, Result
from dicomnode.pseudonyms import Pseudonyms
from dicomnode.sync import http
from dicomnode.sync.endpoints import PROBE_SECONDS
from dicomnode.sync.sender import CloudSender
from tests.certificates import Authority
from tests.cloud.endpoint import endpoint
from tests.sync.fault_proxy import fault_proxy, name_service
from tests.sync.index_case import (
    FakeClock,
    add_job,
    add_objects,
    add_results,
    as_they_are,
    make_settings,
    new_instance,
    secondary_capture,
    sender_of,
)

PLAN = CloudPlan("cloud", Sync().lanes, records=True)
FAULTS = (
    *("cut-request", "cut-reply", "half-open", "http-500", "http-503", "http-429", "slow", "half-body", "huge"),
    *("tls", "dns"),
)


def critical_result(db: Database, data: Path) -> None:
    from dicomnode import durable

    job_id = add_job(db, data)
    assert Jobs(db).lease("worker", 60.0) is not None
    results = [Result("SR", new_instance(durable.ObjectStore(data), "result"))]
    Jobs(db).finish(job_id, "worker", Outcome(results, critical=["effusion"], alert=False), cloud=PLAN)


def expected(db: Database, data: Path) -> dict[str, list[str]]:
    """Stream -> names under which its items have to arrive, in this order."""
    codec = Pseudonyms((data / "cloud-pseudonyms.key").read_bytes())
    found: dict[str, list[str]] = {}
    for row in db.rows(
        "SELECT d.*, r.SOPInstanceUID FROM sync_items d LEFT JOIN results r ON r.id = d.result_id ORDER BY d.id"
    ):
        if row["result_id"] is not None:
            name = codec.uid(row["SOPInstanceUID"])
        else:
            alias = codec.uid if row["type"] == "study" else lambda n, t=row["type"]: codec.record(t, n)
            name = f"{row['type']}/{alias(row['record_id'])}/{row['version']}"
        found.setdefault(row["stream"], []).append(name)
    return found


def assert_exactly_once_in_order(db: Database, data: Path, storage: Storage) -> None:
    assert {r["state"] for r in db.rows("SELECT state FROM sync_items")} == {"stored"}
    arrived = [a["name"] for a in storage.arrivals(100_000)]
    assert len(set(arrived)) == len(arrived)
    streams = expected(db, data)
    assert sorted(arrived) == sorted(name for names in streams.values() for name in names)
    place = {name: n for n, name in enumerate(arrived)}
    for names in streams.values():
        assert [place[n] for n in names] == sorted(place[n] for n in names), "the order of a study"
    assert storage.conflicts(None, 9) == []
    assert storage.rows("SELECT coalesce(max(differing), 0) AS n FROM objects")[0]["n"] == 0


def test_every_fault_of_the_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each fault meets requests of all classes; in between the line is well, or not, as chance has it."""
    monkeypatch.setattr(http, "REPLY_SECONDS", 0.7)
    chance = random.Random(20261129)
    data = tmp_path / "data"
    authority = Authority(tmp_path / "ca")
    issued = authority.issue("cloud", dns=["localhost"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*issued.files)

    async def main() -> None:
        db = Database(data)
        async with endpoint(tmp_path / "cloud") as (url, storage):
            port = int(url.rsplit(":", 1)[1])
            async with fault_proxy(("127.0.0.1", port), context) as proxy:
                at = f"https://localhost:{proxy.port}"
                settings = make_settings(
                    data,
                    cloud={"stow_url": f"{at}/studies", "records_url": f"{at}/v1", "ca_file": authority.ca_file,
                           "stall_seconds": 0.5, "timeout_seconds": 5},
                    delivery={"backoff_seconds": 0.05, "backoff_max_seconds": 0.2},
                    sync={"urgent_items": 3, "normal_items": 5},
                )  # fmt: skip
                sender = sender_of(settings, db)
                with name_service(proxy):
                    for fault in FAULTS:
                        add_results(db, data, 1, cloud=CloudPlan("cloud"))
                        if fault != "cut-reply":  # there the first request has an object
                            add_results(db, data, chance.randint(1, 3), cloud=PLAN)
                            critical_result(db, data)
                        proxy.fault = fault
                        before = proxy.seen.get(fault, 0)

                        async def meets(fault: str = fault, before: int = before) -> None:
                            while proxy.seen.get(fault, 0) < before + 3:
                                await sender.flush()
                                await sender.endpoints.probe()
                                await asyncio.sleep(0.01)

                        await asyncio.wait_for(meets(), 60)
                        proxy.fault = "pass"
                        if chance.random() < 0.5:
                            await sender.flush()

                    async def drained() -> None:
                        while db.row("SELECT 1 AS one FROM sync_items WHERE state != 'stored'"):
                            await sender.flush()
                            await asyncio.sleep(0.01)

                    await asyncio.wait_for(drained(), 60)
                    for _ in range(2):
                        await sender.endpoints.probe()
                    assert sender.endpoints.link == "online"
                assert set(proxy.seen) >= set(FAULTS)
                assert_exactly_once_in_order(db, data, storage)
                assert storage.counts()["repeated"] > 0, "some were sent twice, since a reply was lost"
        db.close()

    asyncio.run(main())


def impatient(sender: CloudSender, patch: pytest.MonkeyPatch, name: str, seconds: float) -> list[float]:
    """``http.name`` is ``seconds`` until an endpoint is left: the next has a busy machine's time. When that was."""
    usual, failed, left = getattr(http, name), sender.endpoints.failed, list[float]()

    def leaves(*arguments: Any, **options: Any) -> None:
        left.append(time.monotonic())
        patch.setattr(http, name, usual)
        failed(*arguments, **options)

    patch.setattr(http, name, seconds)
    patch.setattr(sender.endpoints, "failed", leaves)
    return left


def test_a_half_open_primary_is_left_for_the_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing says that it is gone but silence; with the defaults that is noticed within 30 seconds."""
    assert http.REPLY_SECONDS + PROBE_SECONDS <= 30 and Cloud().stall_seconds + PROBE_SECONDS <= 30
    data = tmp_path / "data"

    async def main() -> None:
        db = Database(data)
        async with (
            endpoint(tmp_path / "one") as (one, primary),
            endpoint(tmp_path / "two") as (two, backup),
            fault_proxy(("127.0.0.1", int(one.rsplit(":", 1)[1]))) as proxy,
        ):
            section = {
                "stow_url": f"http://127.0.0.1:{proxy.port}/studies", "stall_seconds": 2,
                "backups": [{"name": "second", "stow_url": f"{two}/studies"}],
            }  # fmt: skip
            sender = sender_of(make_settings(data, cloud=section, delivery={"backoff_seconds": 0.05}), db)
            add_results(db, data, 1)
            assert await sender.flush() == 1 and len(primary.arrivals()) == 1
            proxy.fault = "half-open"
            with monkeypatch.context() as patch:
                left = impatient(sender, patch, "REPLY_SECONDS", 2.0)
                add_results(db, data, 2)
                begin = time.monotonic()
                assert await sender.flush() == 2
                assert len(left) == 1 and left[0] - begin < 20 and len(backup.arrivals()) == 2
            proxy.fault = "pass"

            async def returns() -> None:
                while sender.endpoints.link != "online":
                    await asyncio.sleep(0.05)
                    await sender.endpoints.probe()

            monkeypatch.setattr("dicomnode.sync.endpoints.PROBE_SECONDS", 0.01)
            await asyncio.wait_for(returns(), 30)
            add_results(db, data, 1)
            assert await sender.flush() == 1 and len(primary.arrivals()) == 2
        db.close()

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["drip-request", "drip-head", "drip-body"])
def test_a_dripping_primary_is_left_for_the_backup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Something moves all the time, so nothing stalls; with the defaults that is over within 30 seconds, too."""
    assert http.LOST_SECONDS + 1 + Sync().urgent_seconds <= 30
    data, clock = tmp_path / "data", FakeClock()

    async def main() -> None:
        db = Database(data, clock)
        async with (
            endpoint(tmp_path / "one") as (one, _),
            endpoint(tmp_path / "two") as (two, backup),
            fault_proxy(("127.0.0.1", int(one.rsplit(":", 1)[1]))) as proxy,
        ):
            backups = [{"name": "second", "stow_url": f"{two}/studies"}]
            section = {"stow_url": f"http://127.0.0.1:{proxy.port}/studies", "backups": backups, "stall_seconds": 20}
            sender = sender_of(make_settings(data, cloud=section), db)
            # More than the buffers of two sockets hold.
            add_objects(db, data, [("SEG", secondary_capture(4096 if fault == "drip-request" else 8)[1])])
            as_they_are(db)
            proxy.fault = fault
            left = impatient(sender, monkeypatch, "LOST_SECONDS", 2.5)
            begin = time.monotonic()
            assert await sender.flush() == 1
            assert len(left) == 1 and left[0] - begin < 19, "not for a stall"
            assert len(backup.arrivals()) == 1 and proxy.seen == {fault: 1}
        db.close()

    asyncio.run(main())


@pytest.mark.parametrize("fault", ["http-400", "http-413"])
def test_a_proxy_that_refuses_everything_parks_nothing(tmp_path: Path, fault: str) -> None:
    """From one moment on, in the middle of a round, with suspects, of all classes and kinds, over restarts."""
    data, clock = tmp_path / "data", FakeClock()

    async def main() -> None:
        db = Database(data, clock)
        async with (
            endpoint(tmp_path / "cloud") as (url, storage),
            fault_proxy(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as proxy,
        ):
            at = f"http://127.0.0.1:{proxy.port}"
            settings = make_settings(data, cloud={"stow_url": f"{at}/studies", "records_url": f"{at}/v1"})

            def results() -> None:
                add_results(db, data, 1, cloud=PLAN)
                critical_result(db, data)

            for day in range(4):
                sender = sender_of(settings, db)  # the sidecar is restarted
                sender.start()
                proxy.fault = "pass"
                results()
                await sender.flush()
                results()
                with db.transaction():
                    db.execute("UPDATE sync_items SET suspect = 1, strikes = 2 WHERE id % 5 = 0 AND state = 'pending'")
                proxy.fault = fault
                for _ in range(3):
                    before = proxy.seen.get(fault, 0)
                    await sender.flush()
                    assert proxy.seen.get(fault, 0) - before <= 24, "nor is it flooded"
                    sender.endpoints.succeeded(0, 0.01, proven=False)  # a probe is answered
                    clock.now += 3600
                found = {r["state"] for r in db.rows("SELECT state FROM sync_items")}
                assert found == {"stored", "pending"}, day
            assert not db.rows("SELECT * FROM events WHERE kind = 'sync-rejected'")
            proxy.fault = "pass"
            for _ in range(4):
                await sender.flush()
                clock.now += 3600
            assert_exactly_once_in_order(db, data, storage)
        db.close()

    asyncio.run(main())


def test_a_week_without_the_cloud_and_then_all_of_it(tmp_path: Path) -> None:
    """``scripts/measure_cloud_drain.py`` does the same with 5,000 results."""
    data, clock = tmp_path / "data", FakeClock()
    db = Database(data, clock)

    async def main() -> None:
        async with endpoint(tmp_path / "cloud") as (url, _):
            port = int(url.rsplit(":", 1)[1])
        section = {"stow_url": f"{url}/studies", "records_url": f"{url}/v1"}
        sender = sender_of(make_settings(data, cloud=section), db)
        for day in range(7):
            for _ in range(3):
                add_results(db, data, 2, cloud=PLAN)
            for _ in range(24):
                assert await sender.flush() == 0
                await sender.endpoints.probe()
                clock.now += 3600
            assert sender.endpoints.link == "offline", day
        assert len(db.rows("SELECT * FROM events")) == 1, "told once, not a thousand times"
        waits = db.value("SELECT count(*) FROM sync_items WHERE state = 'pending'")
        async with endpoint(tmp_path / "cloud", port=port) as (_, storage):
            assert await sender.flush() == waits == 7 * 3 * 4
            assert_exactly_once_in_order(db, data, storage)
            assert sender.endpoints.link == "online"

    asyncio.run(main())
    db.close()
