"""Prometheus remote-write: the message, the spool, what each answer of a receiver does to them, a real Prometheus."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import struct
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import imagecodecs
import pytest
from aiohttp import web
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from dicomnode import durable, wire
from dicomnode.admin.exposition import families
from dicomnode.errors import DiskFull, OperatorError
from dicomnode.index.database import Database
from dicomnode.metrics_push import SAMPLES_TOTAL
from dicomnode.sync.metric_push import MetricPush
from dicomnode.sync.metric_spool import FOLDER, Entry, MetricSpool, overdue, thinned
from dicomnode.sync.remote_write import Collection, pack, samples_of, snappy, unpack, write_request
from tests.peers import Process, wait_for
from tests.sync.cloud_fake import served
from tests.sync.index_case import CANARY, CANARY_ID, add_results, make_settings
from tests.sync.prometheus_case import Prometheus

WEEK = 7 * 86_400.0
Decoded = dict[tuple[tuple[str, str], ...], list[tuple[int, float]]]


@dataclass
class MovedClock:
    """Node time and wall time, which tests move apart if they like."""

    at: float
    node: float = 50_000.0

    def ticks(self) -> float:
        return self.node

    def wall(self) -> datetime:
        return datetime.fromtimestamp(self.at, UTC)

    def pass_by(self, seconds: float) -> None:
        self.at, self.node = self.at + seconds, self.node + seconds


def decoded(body: bytes) -> Decoded:
    """Of a WriteRequest, by the field numbers of the specification."""
    found: Decoded = {}
    for number, series in wire.fields(memoryview(imagecodecs.snappy_decode(body))):
        assert number == 1
        labels, samples = [], []
        for kind, value in wire.fields(wire.message(series)):
            if kind == 1:
                name, text = (wire.text(v) for _, v in wire.fields(wire.message(value)))
                labels.append((name, text))
            else:
                raw = bytes(wire.message(value))
                assert raw[0] == 0x09 and raw[9] == 0x10
                samples.append((wire.read_varint(memoryview(raw), 10)[0], struct.unpack("<d", raw[1:9])[0]))
        assert tuple(labels) not in found, "a series is in a request once"
        found[tuple(labels)] = samples
    return found


def gauge(value: float) -> list[Metric]:
    family = GaugeMetricFamily("dicomnode_try", "", labels=("peer", "empty"))
    family.add_metric(("ct1", ""), value)
    foreign = GaugeMetricFamily("python_info", "", labels=("host",))
    foreign.add_metric(("secret",), 1.0)
    return [family, foreign]


def test_a_request_has_sorted_labels_and_samples_in_their_order() -> None:
    external = {"job": "dicomnode", "instance": "node"}
    parts = [Collection(t, samples_of(gauge(v), external)) for t, v in ((1_000, 1.5), (2_000, float("inf")))]
    assert decoded(snappy(write_request([unpack(pack(p)) for p in parts]))) == {
        (("__name__", "dicomnode_try"), ("instance", "node"), ("job", "dicomnode"), ("peer", "ct1")): [
            (1_000, 1.5),
            (2_000, float("inf")),
        ]
    }


@pytest.mark.parametrize("bad", [b"", b"nonsense", pack(Collection(1, []))[:-3], b"x\x9c\x03\x00\x00\x00\x00\x01"])
def test_a_damaged_file_is_known(bad: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(bad)


def test_the_bounds_of_the_spool() -> None:
    entries = [Entry(i * 1000, i * 1000, 5, 100) for i in range(100)]
    assert overdue(entries, 100_000, 90_000) == entries[:10]
    gone = thinned(entries, 6_000)
    kept = [e for e in entries if e not in gone]
    assert sum(e.size for e in kept) <= 6_000 and len(set(gone)) == len(gone)
    assert kept[-25:] == entries[-25:], "the newest stay as they are"
    assert any(e in kept for e in entries[:10]), "the beginning is coarser, not cut off"
    assert thinned(entries, 10_000) == []
    assert thinned(entries[:1], 10) == [], "the newest stays in any case"


def test_a_wall_clock_that_jumps_makes_nothing_old(tmp_path: Path) -> None:
    clock = MovedClock(time.time())
    spool = MetricSpool(tmp_path, 0, clock)
    spool.start()
    for jump in (0.0, 10 * 365 * 86_400.0, -20 * 365 * 86_400.0):
        clock.at += jump
        clock.pass_by(60)
        spool.put([((("__name__", "dicomnode_try"),), 1.0)])
    again = MetricSpool(tmp_path, 0, clock)
    again.start()
    assert [e.ticks for e in again.entries()] == [50_060_000, 50_120_000, 50_180_000]
    assert overdue(again.entries(), int(clock.ticks() * 1000), 3_600_000) == []


def test_half_a_file_of_a_former_life_is_removed_and_a_full_disk_keeps_its_reserve(tmp_path: Path) -> None:
    folder = tmp_path / FOLDER
    folder.mkdir()
    (folder / f".x.z.1{durable.TEMPORARY_SUFFIX}").write_bytes(b"half")
    spool = MetricSpool(tmp_path, 1 << 60, MovedClock(time.time()))
    spool.start()
    assert list(folder.iterdir()) == []
    with pytest.raises(DiskFull):
        spool.put([])


def outcome(name: str) -> float:
    return SAMPLES_TOTAL.labels(name)._value.get()


@dataclass
class Case:
    push: MetricPush
    clock: MovedClock
    db: Database

    async def collect(self, times: int) -> None:
        for _ in range(times):
            self.clock.pass_by(60)
            await self.push.collect()


@contextlib.contextmanager
def opened(folder: Path, url: str, ae_title: str = "NODE", ago: float = WEEK, **options: object) -> Iterator[Case]:
    clock = MovedClock(time.time() - ago)
    db = Database(folder, clock=clock)
    node = {"data_dir": folder, "reserve_mb": 1, "ae_title": ae_title}
    settings = make_settings(folder, node=node, metrics={"remote_write_url": url, **options})
    case = Case(MetricPush(settings, db, lambda: gauge(clock.at)), clock, db)
    case.push.start()
    try:
        yield case
    finally:
        db.close()


class Receiver:
    """Answers with ``script``, then with 204; ``bad``: refuses requests that hold this value."""

    def __init__(self, *script: tuple[int, dict[str, str]], bad: float | None = None) -> None:
        self.script, self.bad = list(script), bad
        self.taken: list[Decoded] = []
        self.seen: list[web.Request] = []

    async def handle(self, request: web.Request) -> web.Response:
        self.seen.append(request)
        body = decoded(await request.read())
        if self.script:
            status, headers = self.script.pop(0)
            return web.Response(status=status, headers=headers)
        values = [v for samples in body.values() for _, v in samples]
        if self.bad in values:
            return web.Response(status=400)
        self.taken.append(body)
        return web.Response(status=204)


def with_receiver(folder: Path, receiver: Receiver, main: Callable[[Case], Awaitable[None]], **options: object) -> None:
    """``main`` with the receiver up; inside one event loop."""

    async def whole() -> None:
        async with served(receiver.handle, "/api/v1/write") as url:
            with opened(folder, url, **options) as case:
                await main(case)

    asyncio.run(whole())


def test_what_waits_goes_in_one_request_with_the_headers_of_the_specification(tmp_path: Path) -> None:
    receiver = Receiver()
    (tmp_path / "token").write_text("secret-token\n")

    async def main(case: Case) -> None:
        await case.collect(3)
        assert case.push.report()["waiting"] == 3
        sent = outcome("sent")
        assert await case.push.push() == 3
        assert outcome("sent") - sent == 3
        assert case.push.report()["state"] == "well"

    with_receiver(tmp_path, receiver, main, token_file=tmp_path / "token")
    [request], [body] = receiver.seen, receiver.taken
    assert request.headers["Content-Encoding"] == "snappy"
    assert request.headers["Content-Type"] == "application/x-protobuf"
    assert request.headers["X-Prometheus-Remote-Write-Version"] == "0.1.0"
    assert request.headers["User-Agent"].startswith("dicomnode/")
    assert request.headers["Authorization"] == "Bearer secret-token"
    [samples] = body.values()
    assert [t for t, _ in samples] == sorted({t for t, _ in samples}) and len(samples) == 3
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_5xx_and_429_are_tried_again_when_it_is_time(tmp_path: Path) -> None:
    receiver = Receiver((503, {}), (429, {"Retry-After": "40"}))

    async def main(case: Case) -> None:
        await case.collect(2)
        assert await case.push.push() == 0
        assert await case.push.push() == 0 and len(receiver.seen) == 1, "there is a back-off"
        case.clock.pass_by(3)
        assert await case.push.push() == 0 and len(receiver.seen) == 2
        case.clock.pass_by(39)
        assert await case.push.push() == 0 and len(receiver.seen) == 2, "Retry-After is kept to"
        case.clock.pass_by(2)
        assert await case.push.push() == 2
        assert case.push.report()["error"] == ""

    with_receiver(tmp_path, receiver, main)
    assert len(receiver.taken) == 1


def test_what_a_receiver_refuses_for_good_is_dropped_alone_and_counted(tmp_path: Path) -> None:
    receiver = Receiver()

    async def main(case: Case) -> None:
        await case.collect(3)
        receiver.bad = case.clock.at - 60
        refused, sent = outcome("refused"), outcome("sent")
        assert await case.push.push() == 3
        assert (outcome("refused") - refused, outcome("sent") - sent) == (1, 2)
        events = case.db.rows("SELECT * FROM events WHERE kind = 'remote-write'")
        assert len(events) == 1 and "out_of_order_time_window" in events[0]["text"]

    with_receiver(tmp_path, receiver, main)
    assert len(receiver.seen) == 4 and len(receiver.taken) == 2


def test_a_wrong_token_drops_nothing(tmp_path: Path) -> None:
    receiver = Receiver((401, {}))

    async def main(case: Case) -> None:
        await case.collect(2)
        with pytest.raises(OperatorError, match="HTTP 401"):
            await case.push.push()
        case.clock.pass_by(120)
        assert await case.push.push() == 2
        told = [e["severity"] for e in case.db.rows("SELECT * FROM events WHERE kind = 'remote-write'")]
        assert told == ["error", "info"]

    with_receiver(tmp_path, receiver, main)


def test_bounds_are_kept_and_counted(tmp_path: Path) -> None:
    receiver = Receiver()

    async def main(case: Case) -> None:
        await case.collect(3)
        case.clock.pass_by(2 * 86_400.0)
        aged = outcome("aged")
        await case.collect(1)
        assert outcome("aged") - aged == 3 and case.push.report()["waiting"] == 1
        [path] = (tmp_path / FOLDER).iterdir()
        path.write_bytes(b"damaged")
        damaged = outcome("damaged")
        assert await case.push.push() == 0
        assert outcome("damaged") - damaged == 1 and case.push.report()["waiting"] == 0

    with_receiver(tmp_path, receiver, main, max_age_days=1.0)
    assert receiver.seen == []


def test_no_patient_is_in_what_leaves(tmp_path: Path) -> None:
    db = Database(tmp_path)
    add_results(db, tmp_path, 2)
    settings = make_settings(tmp_path)
    samples = samples_of(families(db, settings), {})
    text = repr(samples)
    uids = [r["StudyInstanceUID"] for r in db.rows("SELECT StudyInstanceUID FROM studies")]
    db.close()
    assert len(samples) > 50 and uids
    assert not any(secret in text for secret in (CANARY, CANARY_ID, *uids))


@pytest.mark.peers
def test_a_week_away_comes_back_from_prometheus_by_query(tmp_path: Path) -> None:
    """Newer samples of another node are there already."""
    prometheus = Prometheus(tmp_path / "prometheus")

    async def main() -> None:
        with (
            opened(tmp_path / "node", prometheus.url) as away,
            opened(tmp_path / "other", prometheus.url, "OTHER", ago=60.0) as other,
        ):
            wanted = []
            for _ in range(20):
                away.clock.pass_by(6 * 3600.0)
                wanted.append(away.clock.at)
                await away.push.collect()
            assert await away.push.push() == 0, "nobody is there yet"
            assert "cannot be reached" in away.push.report()["error"]
            away.clock.pass_by(120)
            with prometheus.running():
                await other.collect(1)
                assert await other.push.push() == 1
                assert await away.push.push() == 20
                [one] = prometheus.series('dicomnode_try{instance="NODE"}', time.time() + 60, int(WEEK) + 3600)
            assert one["metric"] == {"__name__": "dicomnode_try", "instance": "NODE", "job": "dicomnode", "peer": "ct1"}
            assert [(pytest.approx(t, abs=0.01), pytest.approx(t)) for t in wanted] == [
                (float(t), float(v)) for t, v in one["values"]
            ]

    asyncio.run(main())


@pytest.mark.peers
def test_samples_outlive_a_killed_sidecar_and_an_outage(tmp_path: Path) -> None:
    prometheus, spool = Prometheus(tmp_path / "prometheus"), tmp_path / "data" / FOLDER
    config = tmp_path / "node.toml"
    config.write_text(
        f'[node]\nae_title = "EDGE"\ndata_dir = "{tmp_path / "data"}"\nreserve_mb = 1\n[http]\nport = 0\n'
        f'[metrics]\nremote_write_url = "{prometheus.url}"\ninterval_seconds = 1\n'
    )
    argv = [sys.executable, "-m", "dicomnode", "run", "sidecar", "--config", str(config)]
    killed = Process(argv, tmp_path / "killed.log")
    wait_for(lambda: spool.is_dir() and len(list(spool.glob("*.z"))) >= 2, 60, "samples wait", killed.output)
    os.killpg(killed.popen.pid, signal.SIGKILL)
    killed.stop()
    waiting = [int(p.name.split("-")[1]) / 1000 for p in spool.glob("*.z")]
    with prometheus.running():
        again = Process(argv, tmp_path / "again.log")
        try:

            def arrived() -> list[float]:
                found = prometheus.series('dicomnode_build_info{instance="EDGE"}', time.time() + 1, 600)
                return [float(t) for t, _ in found[0]["values"]] if found else []

            wait_for(lambda: len(arrived()) > len(waiting), 60, "all are there", again.output)
        finally:
            again.stop()
        assert {round(t, 2) for t in waiting} <= {round(t, 2) for t in arrived()}
