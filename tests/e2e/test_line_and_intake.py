"""A whole node whose line to the cloud goes through every fault while senders go on storing.

Node, ``dicomnode cloud`` and Prometheus are processes of their own; between them stand proxies that end
TLS. Results, records, heartbeats, desired states and metrics all have to come through, once in effect and
in order within a study, and no sender may notice anything.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import ssl
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dicomnode.cloud.storage import Storage
from dicomnode.demo.radiograph import to_dataset
from dicomnode.index.database import Database
from dicomnode.index.record_reviews import serving
from dicomnode.sync.metric_spool import FOLDER
from tests.certificates import Authority
from tests.e2e.harness import CANARY, Node, item_from, make_series, rule
from tests.infer.radiograph_case import numbered, picture
from tests.peers import Item, Ledger
from tests.sync.fault_proxy import FaultProxy, ResolverFault, fault_proxy
from tests.sync.prometheus_case import Prometheus
from tests.sync.test_cloud_faults import FAULTS, assert_exactly_once_in_order
from tests.sync.test_records_kills import kill, put, start

PREF = ("preferences", "dashboard")
MEETINGS = 4
"""Connections that each fault strikes before the next one has its turn."""

HELD = ("cut-reply", "http-503", "huge")
"""Faults that last until the metrics met them, too, which are pushed every five seconds."""


class Lines:
    """The proxies, in a thread of their own, and the node's resolver, all under one fault."""

    def __init__(self, folder: Path, context: ssl.SSLContext, ports: Sequence[int]) -> None:
        self._names = ResolverFault(folder)
        self.proxies: list[FaultProxy] = []
        self._context, self._ports = context, ports
        self._loop = asyncio.new_event_loop()
        self._ready, self._over = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        async def main() -> None:
            async with AsyncExitStack() as stack:
                made = [fault_proxy(("127.0.0.1", port), self._context) for port in self._ports]
                self.proxies = [await stack.enter_async_context(one) for one in made]
                self._ready.set()
                await self._over.wait()

        self._loop.run_until_complete(main())

    @contextmanager
    def open(self) -> Iterator[Lines]:
        self._thread.start()
        assert self._ready.wait(10)
        try:
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._over.set)
            self._thread.join(10)
            self._loop.close()

    def fault(self, name: str) -> None:
        for proxy in self.proxies:
            proxy.fault = "pass" if name == "dns" else name
        self._names.gone(name == "dns")

    def seen(self, name: str) -> int:
        return self._names.seen() if name == "dns" else self.proxies[0].seen.get(name, 0)

    def awaits_metrics(self, name: str) -> bool:
        return name in HELD and not self.proxies[1].seen.get(name)


class Senders:
    """Modalities: two store slices all the time, radiographs to be analysed come on demand."""

    def __init__(self, port: int) -> None:
        self.ledger = Ledger(port)
        self.analysed: list[str] = []
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._store, args=(n,), daemon=True) for n in range(2)]
        self._radiographs = numbers()
        self.faults: list[BaseException] = []

    def _store(self, number: int) -> None:
        try:
            for part in itertools.count():
                self.ledger.send(make_series(f"plain {number} {part}", slices=8).items)
                if self._stop.wait(0.1):  # the pace of a modality
                    return
        except BaseException as error:
            self.faults.append(error)
            raise

    def radiograph(self) -> None:
        ds = next(self._radiographs)
        ds.PatientName = f"{CANARY}^Line"
        item = item_from(ds)
        self.ledger.send([Item(str(ds.SOPClassUID), item.sop_instance_uid, item.transfer_syntax_uid, item.data)])
        self.analysed.append(str(ds.SeriesInstanceUID))

    @contextmanager
    def at_work(self) -> Iterator[Senders]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(60)


def numbers() -> Iterator[Any]:
    """Radiographs with UIDs of their own."""
    for number in itertools.count():
        yield numbered(to_dataset(picture(mm=2.0), "CR", patient_id=f"LINE-{number}"), number)


@pytest.mark.slow
@pytest.mark.peers
@pytest.mark.timeout(420)
def test_no_fault_of_the_line_is_noticed_at_intake_or_loses_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(7)
    authority = Authority(tmp_path / "ca")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*authority.issue("cloud", dns=["localhost"]).files)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cloud = start("cloud", "--data-dir", str(tmp_path / "cloud"), "--port", "0", "--json", "--reserve-mb", "1",
                  folder=tmp_path, name="cloud")  # fmt: skip
    with ExitStack() as stack:
        stack.callback(lambda: cloud.poll() is None and kill(cloud))
        assert cloud.stdout
        lines_of = iter(cloud.stdout.readline, b"")
        page = json.loads(b"".join([*itertools.takewhile(lambda line: b"}" not in line, lines_of), b"}"]))["page"]
        prometheus = stack.enter_context(Prometheus(tmp_path / "prometheus").running())
        lines = stack.enter_context(
            Lines(tmp_path, context, [int(page.rstrip("/").rsplit(":", 1)[1]), prometheus.port]).open()
        )
        at, metrics_at = (f"https://localhost:{p.port}" for p in lines.proxies)
        node = Node(
            tmp_path / "node",
            rules=[rule("radiographs", {"Modality": ["CR"]}, model="cxr-quality")],
            cloud={"stow_url": f"{at}/studies", "records_url": f"{at}/v1", "health_url": f"{at}/health",
                   "ca_file": authority.ca_file, "stall_seconds": 1, "timeout_seconds": 2},
            sync={"urgent_seconds": 0.3, "normal_seconds": 0.3, "batch_seconds": 0.3, "pull_seconds": 0.5,
                  "normal_items": 3},
            delivery={"backoff_seconds": 0.1, "backoff_max_seconds": 0.3},
            fleet={"accept": ["log_level"], "heartbeat_seconds": 1, "desired_seconds": 0.5},
            metrics={"remote_write_url": f"{metrics_at}/api/v1/write", "ca_file": authority.ca_file,
                     "interval_seconds": 1, "timeout_seconds": 2},
        ).start()  # fmt: skip
        stack.callback(lambda: node.running and node.stop())
        with Senders(node.port).at_work() as senders:
            for number, fault in enumerate(FAULTS):
                stored = len(senders.ledger.acknowledged)
                lines.fault(fault)
                before, waits, deadline = lines.seen(fault), tries(node), time.monotonic() + 90
                put_while_down(page, number)
                senders.radiograph()
                while (
                    lines.seen(fault) < before + MEETINGS
                    or not struck(node, fault, waits)
                    or lines.awaits_metrics(fault)
                ):
                    assert time.monotonic() < deadline, f"{fault} met {lines.seen(fault) - before}: {node.tail()}"
                    time.sleep(0.05)
                senders.ledger.wait_acknowledged(stored + 16)
                lines.fault("pass")
                if chance.random() < 0.5:
                    node.wait(lambda: settled(node), 120, f"it is drained after {fault}")
            node.wait(lambda: everything(node, senders), 120, "all is analysed and has left")
            node.wait(lambda: applied(node) == len(FAULTS), 30, "the last desired state is applied")
            node.wait(lambda: serving_at(node) == 2 + len(FAULTS), 30, "the last record is taken")
        assert senders.ledger.other == [] and senders.ledger.cuts == 0 and senders.faults == []
        node.wait(lambda: not list((node.data_dir / FOLDER).glob("*.z")), 90, "the samples have left")
        assert node.stop() == 0
        samples_are_there_once(prometheus, node)
    assert_intake(node, senders)
    cloud_has_all(tmp_path, node)


def put_while_down(page: str, number: int) -> None:
    """Somebody at the cloud changes a record and desires another state."""
    url = page.rstrip("/")
    put(url, *PREF, refresh_seconds=3 + number)
    level = ("info", "debug")[number % 2]
    body = json.dumps({"state": {"log_level": level}}).encode()
    request = urllib.request.Request(
        f"{url}/v1/nodes/DICOMNODE/desired", body, {"Content-Type": "application/json"}, method="PUT"
    )
    urllib.request.urlopen(request, timeout=10).close()


def tries(node: Node, state: str = "%") -> dict[int, int]:
    """Item -> how often it was tried."""
    rows = node.rows("SELECT id, attempts FROM sync_items WHERE state LIKE ?", (state,))
    return {r["id"]: r["attempts"] for r in rows}


def struck(node: Node, fault: str, before: dict[int, int]) -> bool:
    """Something that waits was tried in vain since; a slow line takes what is made now all the same."""
    if fault == "slow":
        return max(tries(node, "stored"), default=0) > max(before, default=0)
    return any(count > before.get(item, 0) for item, count in tries(node, "pending").items())


def settled(node: Node) -> bool:
    return not node.rows("SELECT 1 AS one FROM sync_items WHERE state != 'stored' LIMIT 1")


def everything(node: Node, senders: Senders) -> bool:
    done = node.rows("SELECT count(*) AS n FROM jobs WHERE state = 'done'")[0]["n"]
    return bool(done == len(senders.analysed)) and settled(node)


def applied(node: Node) -> int:
    rows = node.rows("SELECT max(generation) AS n FROM desired_states WHERE status = 'applied' AND reported = 1")
    return int(rows[0]["n"] or 0)


def serving_at(node: Node) -> Any:
    rows = node.rows("SELECT data FROM records WHERE type = ? AND record_id = ?", PREF)
    return json.loads(rows[0]["data"]).get("refresh_seconds") if rows else None


def samples_are_there_once(prometheus: Prometheus, node: Node) -> None:
    """As many as were collected, each with a time of its own; the last ones may wait in the spool."""
    [one] = prometheus.series('dicomnode_build_info{instance="DICOMNODE"}', time.time() + 5, 3600)
    times = [float(t) for t, _ in one["values"]]
    with opened(node.data_dir) as db:
        detail = json.loads(db.value("SELECT detail FROM processes WHERE name = 'sidecar'"))
    waiting = len(list((node.data_dir / FOLDER).glob("*.z")))
    assert len(set(times)) == len(times) and times == sorted(times)
    assert len(times) + waiting - detail["scheduled"]["metrics-collect"]["runs"] in (
        0,
        1,
    )  # one was cut short by the end


def assert_intake(node: Node, senders: Senders) -> None:
    """Every object that was acknowledged is held byte for byte."""
    with opened(node.data_dir) as db:
        held = {r["SOPInstanceUID"]: r for r in db.rows("SELECT * FROM instances WHERE association_id IS NOT NULL")}
        ledger = senders.ledger.acknowledged
        assert ledger.keys() <= held.keys() and len(ledger) > 16 * len(FAULTS)
        assert {u: held[u]["dataset_sha256"] for u in ledger} == ledger


@contextmanager
def opened(folder: Path) -> Iterator[Database]:
    db = Database(folder)
    try:
        yield db
    finally:
        db.close()


def cloud_has_all(folder: Path, node: Node) -> None:
    storage = Storage(folder / "cloud", reserve_mb=1)
    with opened(node.data_dir) as db:
        told = storage.node("DICOMNODE")
        assert told is not None and told["report"] == {"generation": len(FAULTS), "applied": True}
        assert told["heartbeat"]["processes"]["worker"] is True
        held = storage.record(*PREF)
        assert held is not None and serving(db, *PREF) == held["data"] == {"refresh_seconds": 2 + len(FAULTS)}
        assert not db.row("SELECT 1 AS one FROM record_conflicts")
        storage.rows("DELETE FROM arrivals WHERE name LIKE 'settings/%' OR name LIKE 'preferences/%'")
        db._connection().execute("DELETE FROM sync_items WHERE type = 'settings'")
        assert_exactly_once_in_order(db, node.data_dir, storage)
    storage.close()
