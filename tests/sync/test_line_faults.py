"""Every fault of the line against what is exchanged beside the results: heartbeat, desired state, records, metrics.

Results have :mod:`tests.sync.test_cloud_faults`. Under a fault a part ends in time, with an error of ours
or done, and changes nothing by half; afterwards its effect is there once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dicomnode.cloud.storage import Storage
from dicomnode.errors import NodeError, PeerAway
from dicomnode.index.database import Database
from dicomnode.index.desired import DesiredStates
from dicomnode.index.record_reviews import serving
from dicomnode.model_desk import ModelDesk
from dicomnode.settings import Settings
from dicomnode.sync import fleet_calls, http, pull_records
from dicomnode.sync.departure import Departures
from dicomnode.sync.desired import DesiredState
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.fleet_calls import call
from dicomnode.sync.heartbeat import Heartbeat
from dicomnode.sync.metric_push import MetricPush
from dicomnode.sync.pull_records import RecordPuller
from tests.certificates import Authority
from tests.cloud.endpoint import endpoint
from tests.sync.cloud_fake import served
from tests.sync.fault_proxy import FaultProxy, fault_proxy, name_service
from tests.sync.index_case import FakeClock, make_settings
from tests.sync.prometheus_case import Prometheus
from tests.sync.test_cloud_faults import FAULTS
from tests.sync.test_remote_write import MovedClock, gauge

NODE, MOST_SECONDS = "DICOMNODE", 12.0
PREF = ("preferences", "dashboard")
DONE_UNDER = {"slow", "cut-request"}
"""Faults that a small request may get through: it is slow, or shorter than the cut."""

SHORT = {"half-body"}
"""What a receiver of remote-write answers is its status and no more."""


@pytest.fixture(scope="module")
def trusted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ssl.SSLContext]:
    """Authority to trust, and what the proxy shows."""
    folder = tmp_path_factory.mktemp("line")
    authority = Authority(folder / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("cloud", dns=["localhost"]).files)
    return authority.ca_file, context


@dataclass
class Line:
    proxy: FaultProxy
    storage: Storage
    settings: Settings
    db: Database
    endpoints: Endpoints
    patience: pytest.MonkeyPatch

    async def under(self, fault: str, part: Callable[[], Awaitable[object]]) -> object:
        """What became of one try: an error of ours, or what it returned; in time, and it met the fault."""
        self.proxy.fault = fault
        if fault == "half-open":  # ended by our own patience alone; else a busy machine has time
            self.patience.setattr(fleet_calls, "TIMEOUT_SECONDS", 1.0)
            self.patience.setattr(http, "REPLY_SECONDS", 0.7)
        before, begin = self.proxy.seen.get(fault, 0), time.monotonic()
        try:
            found: object = await part()
        except NodeError as error:
            found = error
        finally:
            self.proxy.fault = "pass"
            self.patience.setattr(fleet_calls, "TIMEOUT_SECONDS", 20.0)
            self.patience.setattr(http, "REPLY_SECONDS", 25.0)
        assert self.proxy.seen[fault] > before and time.monotonic() - begin < MOST_SECONDS
        return found


@contextlib.asynccontextmanager
async def line(
    folder: Path, trusted: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch, **sections: Any
) -> AsyncIterator[Line]:
    ca_file, context = trusted
    data = folder / "data"
    async with contextlib.AsyncExitStack() as stack:
        url, storage = await stack.enter_async_context(endpoint(folder / "cloud"))
        proxy = await stack.enter_async_context(fault_proxy(("127.0.0.1", int(url.rsplit(":", 1)[1])), context))
        at = f"https://localhost:{proxy.port}"
        cloud = {
                "stow_url": f"{at}/studies", "records_url": f"{at}/v1", "ca_file": ca_file,
                "stall_seconds": 0.7, "timeout_seconds": 5,
            }  # fmt: skip
        settings = make_settings(data, cloud=cloud, delivery={"backoff_seconds": 0.05}, **sections)
        db = Database(data, FakeClock())
        try:
            with name_service(proxy):
                yield Line(proxy, storage, settings, db, Endpoints(settings, db), monkeypatch)
        finally:
            db.close()


@pytest.mark.parametrize("fault", FAULTS)
def test_a_heartbeat(
    tmp_path: Path, trusted: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    async def main() -> None:
        async with line(tmp_path, trusted, monkeypatch) as it:
            beat = Heartbeat(it.settings, it.db, it.endpoints, lambda: {"version": "1", "libraries": ["x" * 8000]})
            found = await it.under(fault, beat.beat)
            assert isinstance(found, NodeError) or (found is True and fault in DONE_UNDER), found
            assert bool(beat.report()["beat_time"]) == (found is True)
            assert (it.storage.node(NODE) is not None) == (found is True or fault in ("cut-reply", "half-body"))
            it.db.clock.now += 1.5  # type: ignore[attr-defined]
            assert await beat.beat() and beat.report()["clock_skew_seconds"] is not None
            node = it.storage.node(NODE)
            assert node is not None and node["heartbeat"]["version"] == "1"

    asyncio.run(main())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_desired_state(
    tmp_path: Path, trusted: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The first generation serves on until the second is here whole; each is decided and reported once."""

    async def main() -> None:
        async with line(tmp_path, trusted, monkeypatch, fleet={"accept": ("log_level",)}) as it:
            desk = ModelDesk(it.settings, it.db, lambda _: None)
            desired = DesiredState(it.settings, it.db, it.endpoints, desk, lambda _: None, lambda *_: "")
            states = DesiredStates(it.db)
            it.storage.desire(NODE, {"log_level": "debug"})
            await desired.run_once()
            it.storage.desire(NODE, {"log_level": "error"})
            found = await it.under(fault, desired.run_once)
            assert isinstance(found, NodeError) or fault in DONE_UNDER, found
            assert states.log_level() == ("debug" if isinstance(found, NodeError) else "error")
            it.db.clock.now += 1.5  # type: ignore[attr-defined]
            for _ in range(2):
                await desired.run_once()
            assert states.log_level() == "error"
            node = it.storage.node(NODE)
            assert node is not None and node["report"] == {"generation": 2, "applied": True}
            told = it.db.rows("SELECT subject FROM events WHERE kind LIKE 'desired-state%' ORDER BY id")
            assert [t["subject"] for t in told] == ["generation 1", "generation 2"]

    asyncio.run(main())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_report_of_a_desired_state(
    tmp_path: Path, trusted: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """What was decided is told until the cloud has taken it, and then no more."""

    async def main() -> None:
        async with line(tmp_path, trusted, monkeypatch, fleet={"accept": ("log_level",)}) as it:
            desk = ModelDesk(it.settings, it.db, lambda _: None)
            desired = DesiredState(it.settings, it.db, it.endpoints, desk, lambda _: None, lambda *_: "")
            it.storage.desire(NODE, {"log_level": "error"})
            DesiredStates(it.db).decide(1, "d", {"log_level": "error"}, "refused", "a long reason " * 30)
            found = await it.under(fault, desired._report)
            newest = DesiredStates(it.db).newest()
            assert newest is not None and bool(newest["reported"]) == (found is None), found
            it.db.clock.now += 1.5  # type: ignore[attr-defined]
            await desired._report()
            node = it.storage.node(NODE)
            assert node is not None and node["report"]["generation"] == 1
            it.storage.report(NODE, {"told": "again?"})
            await desired._report()
            node = it.storage.node(NODE)
            assert node is not None and node["report"] == {"told": "again?"}

    asyncio.run(main())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_feed_of_records(
    tmp_path: Path, trusted: tuple[Path, ssl.SSLContext], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """A page counts whole or not at all; what the cloud changed is taken once, and in its order."""

    async def main() -> None:
        async with line(tmp_path, trusted, monkeypatch) as it:
            puller = RecordPuller(it.settings, it.db, it.endpoints, Departures(it.settings, it.db))
            counted: dict[str, int] = {}

            async def pull() -> None:
                for what, number in (await puller.run_once()).items():
                    counted[str(what)] = counted.get(str(what), 0) + number

            for version in range(3):
                it.storage.change_record(*PREF, version, {"refresh_seconds": 5 + version})
                await it.under(fault, pull)
                it.db.clock.now += 1.5  # type: ignore[attr-defined]
            while serving(it.db, *PREF).get("refresh_seconds") != 7:
                await pull()
                it.db.clock.now += 60  # type: ignore[attr-defined]
            assert await puller.run_once() == {}
            assert sum(counted.values()) <= 3 and set(counted) == {"applied"}
            assert not it.db.row("SELECT 1 AS one FROM record_conflicts")

    for name in ("MAX_PAGE_BYTES", "MOST_SKIPPED_BYTES"):  # of a page without an end, which is read at a pace
        monkeypatch.setattr(pull_records, name, 1 << 20)
    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with Prometheus(tmp_path_factory.mktemp("prometheus")).running() as it:
        yield it


@pytest.mark.peers
@pytest.mark.parametrize("fault", FAULTS)
def test_metrics_into_prometheus(
    tmp_path: Path, trusted: tuple[Path, ssl.SSLContext], prometheus: Prometheus, fault: str
) -> None:
    """Every sample is there once, with its time, though the receiver's answer may have been lost."""
    ca_file, context = trusted

    async def main() -> None:
        clock = MovedClock(float(int(time.time()) - 3600))
        node = {"data_dir": tmp_path, "reserve_mb": 1, "ae_title": fault.upper()}
        async with fault_proxy(("127.0.0.1", prometheus.port), context) as proxy:
            to = f"https://localhost:{proxy.port}/api/v1/write"
            settings = make_settings(
                tmp_path, node=node, delivery={"backoff_seconds": 0.05},
                metrics={"remote_write_url": to, "ca_file": ca_file, "timeout_seconds": 1},
            )  # fmt: skip
            db = Database(tmp_path, clock=clock)
            push = MetricPush(settings, db, lambda: gauge(clock.at))
            await asyncio.to_thread(push.start)
            wanted = []
            with name_service(proxy):
                for _ in range(3):
                    for _ in range(2):
                        clock.pass_by(60)
                        wanted.append(clock.at)
                        await push.collect()
                    proxy.fault, begin = fault, time.monotonic()
                    before = proxy.seen.get(fault, 0)
                    settled = await push.push()
                    assert proxy.seen[fault] > before and time.monotonic() - begin < MOST_SECONDS
                    assert settled == 0 or fault in (*DONE_UNDER, *SHORT), settled
                    assert bool(push.report()["error"]) == (push.report()["waiting"] > 0)
                    proxy.fault = "pass"
                for _ in range(20):  # a busy machine may need more than the second that a request has here
                    clock.pass_by(90)
                    await push.push()
                    if not push.report()["waiting"]:
                        break
            assert push.report()["waiting"] == 0 and push.report()["error"] == ""
            db.close()
            [one] = prometheus.series(f'dicomnode_try{{instance="{fault.upper()}"}}', time.time() + 60, 7200)
            assert [(float(t), float(v)) for t, v in one["values"]] == [(t, t) for t in wanted]

    asyncio.run(main())


@pytest.mark.parametrize("status", [429, 503])
def test_who_asks_to_be_left_alone_is(tmp_path: Path, status: int) -> None:
    """Retry-After of small requests holds for them; of the feed for all, as that of results does."""
    asked: list[str] = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(request.method)
        return web.Response(status=status, headers={"Retry-After": "40"})

    async def main() -> None:
        async with served(handle, "/{tail:.*}") as address:
            url = address.removesuffix("/{tail:.*}")
            settings = make_settings(tmp_path, cloud={"stow_url": f"{url}/studies", "records_url": f"{url}/v1"})
            clock = FakeClock()
            db = Database(tmp_path, clock)
            endpoints = Endpoints(settings, db)
            for pause, count in ((0, 1), (39, 1), (2, 2)):
                clock.now += pause
                with pytest.raises(PeerAway):
                    await call(endpoints, "POST", "/heartbeat", {})
                assert len(asked) == count
            assert endpoints.current() == 0, "results have a back-off of their own"
            puller = RecordPuller(settings, db, endpoints, Departures(settings, db))
            for pause, count in ((0, 3), (39, 3), (2, 4)):
                clock.now += pause
                await puller.run_once()
                assert len(asked) == count
            db.close()

    asyncio.run(main())
