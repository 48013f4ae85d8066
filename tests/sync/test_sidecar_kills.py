"""kill -9 of a sidecar that has everything to do, beside a receiver whose sender must not notice.

Results, records, heartbeats, desired states and metrics are on their way at each kill; all arrive once in effect.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

from dicomnode.cloud.storage import Storage
from dicomnode.index.database import Database
from dicomnode.sync.metric_spool import FOLDER
from tests.cloud.endpoint import endpoint
from tests.e2e.harness import Node, make_series
from tests.peers import Ledger
from tests.sync.cloud_fake import served
from tests.sync.index_case import add_results
from tests.sync.test_cloud_faults import PLAN, assert_exactly_once_in_order, critical_result, expected
from tests.sync.test_records_kills import kill, start
from tests.sync.test_remote_write import decoded
from tests.sync.test_sidecar import until

KILLS = int(os.environ.get("DICOMNODE_SIDECAR_KILLS", "4"))
"""More of them than in a test run: 50."""


class Sink:
    """A receiver of remote-write; ``times``: those of the samples of one series, in milliseconds."""

    def __init__(self) -> None:
        self.times: set[int] = set()

    async def handle(self, request: web.Request) -> web.Response:
        for labels, samples in decoded(await request.read()).items():
            if ("__name__", "dicomnode_build_info") in labels:
                self.times |= {t for t, _ in samples}
        return web.Response(status=204)


@contextlib.contextmanager
def sending(ledger: Ledger) -> Iterator[None]:
    """One series after the other, at the pace of a modality."""
    stop, faults = threading.Event(), list[BaseException]()

    def store() -> None:
        try:
            while not stop.wait(0.1):
                ledger.send(make_series("beside", slices=8).items)
        except BaseException as error:
            faults.append(error)
            raise

    thread = threading.Thread(target=store, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)
    assert not faults


@pytest.mark.slow
@pytest.mark.timeout(180 + 60 * KILLS)
def test_kill_9_of_the_sidecar_at_random_moments(tmp_path: Path) -> None:
    """Its line is slow, so that kills hit requests; DICOMNODE_SIDECAR_KILLS is how many."""
    chance = random.Random(KILLS)
    data = tmp_path / "data"
    db = Database(data)
    sink, spooled = Sink(), set[int]()

    def more() -> None:
        for _ in range(3):
            add_results(db, data, 2, cloud=PLAN)
        critical_result(db, data)

    def waiting() -> set[int]:
        return {int(p.name.split("-")[1]) for p in (data / FOLDER).glob("*.z")}

    async def main() -> None:
        async with endpoint(tmp_path / "cloud") as (url, storage), served(sink.handle, "/api/v1/write") as metrics:
            node = Node(
                tmp_path / "node",
                data_dir=data,
                http={"port": 0},
                cloud={"stow_url": f"{url}/studies", "records_url": f"{url}/v1"},
                sync={"bandwidth_kb": 24, "normal_seconds": 0.2, "normal_items": 4, "pull_seconds": 0.3},
                delivery={"backoff_seconds": 0.1},
                fleet={"heartbeat_seconds": 0.3, "desired_seconds": 0.3, "accept": ["log_level"]},
                metrics={"remote_write_url": metrics, "interval_seconds": 1},
            ).start("run", "receiver")

            def sidecar() -> subprocess.Popen[bytes]:
                return start("run", "sidecar", "--config", str(node.config), folder=tmp_path, name="sidecar")

            def count() -> int:
                return len(storage.arrivals(100_000))

            ledger = Ledger(node.port)
            try:
                with sending(ledger):
                    for number in range(KILLS):
                        more()
                        storage.desire("DICOMNODE", {"log_level": ("debug", "info")[number % 2]})
                        before, stored = count(), len(ledger.acknowledged)
                        process = sidecar()
                        try:
                            await until(lambda b=before, p=process: count() > b or p.poll() is not None, 60)
                            assert process.poll() is None
                            await asyncio.sleep(chance.uniform(0, 0.4))
                        finally:
                            process.send_signal(signal.SIGKILL)
                            process.wait()
                            kill(process)
                        spooled.update(waiting())
                        await asyncio.to_thread(ledger.wait_acknowledged, stored + 8)
                    more()  # so that it has begun before it is told to stop
                    process = sidecar()
                    try:
                        left = "SELECT 1 AS one FROM sync_items WHERE state != 'stored'"
                        await until(lambda: process.poll() is not None or not db.row(left), 120)
                        applied = {"generation": KILLS, "applied": True}
                        await until(lambda: (storage.node("DICOMNODE") or {}).get("report") == applied, 30)
                        await until(lambda: heard(storage) == KILLS, 30)
                        await until(lambda: not waiting() & spooled, 60)
                        spooled.update(waiting())
                    finally:
                        process.terminate()
                        assert process.wait(20) == 0
                        kill(process)
                assert ledger.other == [] and ledger.cuts == 0
            finally:
                assert node.stop() == 0
            assert spooled - waiting() <= sink.times and sink.times
            all_arrived_once(db, data, storage)
            held = {r["SOPInstanceUID"]: r["dataset_sha256"] for r in db.rows("SELECT * FROM instances")}
            assert ledger.acknowledged.items() <= held.items() and len(ledger.acknowledged) >= 8 * KILLS

    asyncio.run(main())
    db.close()


def heard(storage: Storage) -> int:
    """Generation that the last heartbeat tells."""
    node = storage.node("DICOMNODE")
    return int(node["heartbeat"]["desired_generation"]) if node and node["heartbeat"] else 0


def all_arrived_once(db: Database, data: Path, storage: Storage) -> None:
    described = "settings/DICOMNODE"
    streams = expected(db, data)
    assert list(streams.pop(described)) and db.row("SELECT 1 AS one FROM sync_items WHERE type = 'settings'")
    with_settings = [a["name"] for a in storage.arrivals(100_000)]
    assert [n for n in with_settings if n.startswith("settings/")] == ["settings/DICOMNODE/1"]
    storage.rows("DELETE FROM arrivals WHERE name LIKE 'settings/%'")
    db._connection().execute("DELETE FROM sync_items WHERE type = 'settings'")
    assert_exactly_once_in_order(db, data, storage)
