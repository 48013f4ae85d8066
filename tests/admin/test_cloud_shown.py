"""The line to the cloud in status, dashboard, metrics and the list of items."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from dicomnode.admin.status import status_report
from dicomnode.cli import _cloud_line
from dicomnode.cli_fleet import cloud_waits
from dicomnode.cloud_settings import CloudPlan, Sync
from dicomnode.index.database import Database
from dicomnode.index.operation import Processes
from tests.admin.test_admin_http import CHANGE, drive, node
from tests.sync.index_case import CANARY, CANARY_ID, FakeClock, add_results

CLOUD = {"stow_url": "https://cloud.example/studies", "records_url": "https://cloud.example/v1"}
TOLD = {
    "state": "degraded",
    "mode": "auto",
    "endpoints": [
        {"name": "primary", "in_use": False, "well": False, "latency_seconds": None, "failures": 3,
         "again_in_seconds": 7.5, "error": "it cannot be reached (connection refused)"},
        {"name": "second", "in_use": True, "well": True, "latency_seconds": 0.0123, "failures": 0,
         "again_in_seconds": 0.0, "error": ""},
    ],
}  # fmt: skip


@pytest.fixture
def db(tmp_path: Path, clock: FakeClock) -> Any:
    database = Database(tmp_path, clock)
    add_results(database, tmp_path, 2, cloud=CloudPlan("cloud", Sync().lanes, records=True))
    yield database
    database.close()


def test_status_says_what_is_used_and_what_waits(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    settings = node(tmp_path, cloud=CLOUD, sync={"spool_mb": 3})
    cloud = status_report(db, settings)["cloud"]
    assert (cloud["state"], cloud["endpoints"]) == ("unknown", []), "no sidecar has told anything"
    Processes(db).beat("sidecar", "ready", {"cloud": TOLD})
    clock.now += 5
    cloud = status_report(db, settings)["cloud"]
    assert cloud["state"] == "degraded" and cloud["spool_bytes"] == 3 << 20
    waiting = {w["class"]: w for w in cloud["waiting"]}
    assert (waiting["normal"]["count"], waiting["normal"]["oldest_seconds"]) == (4, 5.0)
    assert cloud["waiting_bytes"] == waiting["normal"]["bytes"] > 0
    line = _cloud_line(cloud)
    assert line == "degraded, primary it cannot be reached (connection refused), second in use"
    assert not cloud["spool_full"] and cloud_waits(cloud) == "\n  waiting for it: 4 items, 0.0 MiB, the oldest for 5 s"
    off = status_report(db, node(tmp_path))["cloud"]
    assert off["state"] == "off" and _cloud_line(off) == "off, nothing leaves"


def test_dashboard_metrics_and_items(db: Database, tmp_path: Path) -> None:
    Processes(db).beat("sidecar", "ready", {"cloud": TOLD})
    db._connection().execute("UPDATE sync_items SET state = 'rejected', last_error = 'no', strikes = 9 WHERE id = 1")

    async def body(client: ClientSession) -> None:
        for language, words in (("en", ("degraded", "In use", "12 ms")), ("zh", ("降级", "使用中", "12 ms"))):
            async with client.get(f"/?lang={language}") as answer:
                page = await answer.text()
            assert all(word in page for word in words) and "connection refused" in page
            assert CANARY not in page and CANARY_ID not in page
        async with client.get("/metrics") as answer:
            text = await answer.text()
        assert 'dicomnode_sync_waiting_items{class="normal"} 3.0' in text
        assert "dicomnode_sync_spool_limit_bytes 0.0" in text
        async with client.get("/api/v1/sync") as answer:
            items = (await answer.json())["items"]
        assert [i["kind"] for i in items] == ["ai-result", "SR", "SR", "study"]
        assert CANARY_ID not in str(items) and "data" not in items[0]
        async with client.post("/api/v1/sync/1/retry", headers=CHANGE) as answer:
            assert answer.status == 202
        assert db.value("SELECT strikes FROM sync_items WHERE id = 1") == 0, "it has all its tries again"
        async with client.get("/api/v1/sync?state=rejected") as answer:
            assert (await answer.json())["items"] == []

    drive(db, node(tmp_path, cloud=CLOUD), body)


def test_what_back_pressure_holds_up_is_said(db: Database, tmp_path: Path, clock: FakeClock) -> None:
    """Jobs that wait for the cloud look like jobs that nobody does; the operator has to see why."""
    db._connection().execute("UPDATE sync_items SET size = 2 << 20")
    clock.now += 3 * 86400
    settings = node(tmp_path, cloud=CLOUD, sync={"spool_mb": 3})
    cloud = status_report(db, settings)["cloud"]
    assert cloud["spool_full"]
    assert cloud_waits(cloud) == (
        "\n  waiting for it: 4 items, 8.0 MiB, the oldest for 3 days;"
        " sync.spool_mb is 3: jobs of priority batch wait until less does"
    )
    assert not status_report(db, node(tmp_path, cloud=CLOUD))["cloud"]["spool_full"], "without a cap"
    assert not status_report(db, node(tmp_path, sync={"spool_mb": 3}))["cloud"]["spool_full"], "nothing is held up"

    async def body(client: ClientSession) -> None:
        async with client.get("/") as answer:
            assert "More waits than sync.spool_mb (3 MiB)" in await answer.text()

    drive(db, settings, body)
