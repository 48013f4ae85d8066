"""kill -9 of every process at seeded moments: nothing acknowledged is lost, nothing comes twice.

The ledger is the sender's own: SHA-256 of each data set that was answered with 0x0000. The
PACS is behind a slow line, so that sending takes long enough to be hit. The quiet period is
longer than a restart, so that a cut sender is back before the series counts as complete.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import apsw
import psutil
import pydicom
import pytest

from dicomnode.durable import hash_object
from tests.e2e.harness import SLICES, Node, make_series, rule
from tests.peers import Item, Ledger, Orthanc, SlowLink, data_set_of, item_of, program

pytestmark = [pytest.mark.peers, pytest.mark.slow]

QUIET_SECONDS = 20.0


@pytest.fixture(scope="module")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """A PACS of this module's own, so that counting its objects means something."""
    program("Orthanc")
    peer = Orthanc(tmp_path_factory.mktemp("kills-pacs")).start()
    yield peer
    peer.stop()


@pytest.fixture(scope="module")
def line(pacs: Orthanc) -> Iterator[SlowLink]:
    link = SlowLink(pacs.dicom_port)
    yield link
    link.stop()


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory, line: SlowLink) -> Iterator[Node]:
    running = Node(
        tmp_path_factory.mktemp("kills"),
        peers=[{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": line.port}],
        rules=[rule("ct", {"Modality": "CT"}, to=["pacs"])],
        completeness={"quiet_seconds": QUIET_SECONDS},
        inference={"lease_seconds": 10},
    ).start()
    yield running
    assert running.stop() == 0
    connection = apsw.Connection(str(running.data_dir / "index.sqlite"))
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


class Killer:
    """Kills at the moments that a seed gives; ``killed`` lists what died when."""

    def __init__(self, node: Node, seed: int) -> None:
        self.node = node
        self.random = random.Random(seed)
        self.killed: list[str] = []

    def kill(self, name: str, moment: str, within_seconds: float) -> None:
        time.sleep(self.random.uniform(0.0, within_seconds))  # the random moment itself, not a wait for something
        self.node.kill(name)
        self.killed.append(f"{name} {moment}")

    def while_receiving(self, ledger: Ledger, count: int, times: int) -> None:
        """A receiver child or the parent of all, after random numbers of acknowledgements."""
        for number in sorted(self.random.sample(range(1, count), times)):
            ledger.wait_acknowledged(number)
            self.kill(self.random.choice(["receiver-1", "receiver-2", "receiver"]), f"at {number} stored", 0.02)

    def while_working(self, series_uid: str, within_seconds: float) -> None:
        """The worker between the lease and a little after the commit: infer, encode, commit."""
        self.node.wait(
            lambda: any(j["state"] in ("running", "done") for j in self.node.jobs(series_uid)), 60, "the job is leased"
        )
        self.kill("worker", "while it works", within_seconds)

    def while_sending(self, series_uid: str, within_seconds: float) -> None:
        self.node.wait(
            lambda: any(d["state"] != "pending" for d in self.node.deliveries(series_uid)), 60, "a delivery is sent"
        )
        self.kill("courier", "while it sends", within_seconds)

    def a_decoder(self, series_uid: str, within_seconds: float) -> None:
        """One of the worker's own children, which decode the images."""
        self.node.wait(
            lambda: any(j["state"] == "running" for j in self.node.jobs(series_uid)), 60, "the job is leased"
        )
        time.sleep(self.random.uniform(0.0, within_seconds))
        worker = psutil.Process(self.node.wait(lambda: self.node.pids().get("worker"), 30, "the worker runs"))
        child = self.random.choice(worker.children())
        child.kill()
        self.killed.append("a child of the worker")


def in_background(ledger: Ledger, items: Sequence[Item]) -> threading.Thread:
    thread = threading.Thread(target=ledger.send, args=(items,), daemon=True)
    thread.start()
    return thread


def assert_whole(node: Node, pacs: Orthanc, ledger: Ledger, items: Sequence[Item], study: str, series: str) -> None:
    """Everything acknowledged is there byte for byte; one job, one SEG, one SR."""
    assert ledger.other == []
    assert ledger.acknowledged == {i.sop_instance_uid: i.sha256 for i in items}
    rows = node.rows(
        "SELECT n.* FROM instances n JOIN series s ON s.id = n.series_id WHERE s.SeriesInstanceUID = ?", (series,)
    )
    assert {r["SOPInstanceUID"] for r in rows} == ledger.acknowledged.keys()
    assert len(rows) == len(items)
    for row in rows:
        part10 = node.stored_part10(row)
        assert hashlib.sha256(data_set_of(part10)).hexdigest() == ledger.acknowledged[row["SOPInstanceUID"]]
        assert hash_object(data_set_of(part10), part10[: -len(data_set_of(part10))]).whole == row["sha256"]
    assert [(j["revision"], j["state"]) for j in node.jobs(series)] == [(1, "done")]
    assert [(d["kind"], d["state"]) for d in node.deliveries(series)] == [("SEG", "stored"), ("SR", "stored")]
    assert {modality: len(ids) for modality, ids in pacs.instances(study).items()} == {"SEG": 1, "SR": 1}


@pytest.mark.timeout(180)
@pytest.mark.parametrize(("seed", "also"), list(enumerate(["sidecar", "receiver", "courier", "receiver-2"])))
def test_five_kills_on_the_way_of_one_series(node: Node, pacs: Orthanc, seed: int, also: str) -> None:
    """Twenty in all: two while receiving, one while inferring or encoding, one while sending, one at any time."""
    series = make_series(f"kills {seed}")
    ledger, killer = Ledger(node.port), Killer(node, seed)
    sender = in_background(ledger, series.items)
    killer.while_receiving(ledger, SLICES, 2)
    sender.join(60)
    killer.kill(also, "at any time", 1.0)
    killer.while_working(series.series_uid, 0.9)
    killer.while_sending(series.series_uid, 0.6)
    assert len(killer.killed) == 5
    node.wait_delivered(series.series_uid, seconds=60)
    node.wait_ready()
    assert_whole(node, pacs, ledger, series.items, series.study_uid, series.series_uid)


@pytest.mark.timeout(240)
def test_kills_on_the_way_of_the_real_ct(node: Node, pacs: Orthanc, line: SlowLink, real_ct: list[Path]) -> None:
    """Seven: three while receiving, three while decoding, inferring or encoding, one while sending."""
    header = pydicom.dcmread(real_ct[0], stop_before_pixels=True)
    study, series = str(header.StudyInstanceUID), str(header.SeriesInstanceUID)
    items = [item_of(p) for p in real_ct]
    line.bytes_per_second = 8_000_000  # its SEG has 16 MB
    ledger, killer = Ledger(node.port), Killer(node, 99)
    sender = in_background(ledger, items)
    killer.while_receiving(ledger, len(items), 3)
    sender.join(90)
    killer.a_decoder(series, 1.0)
    killer.while_working(series, 2.0)
    killer.while_working(series, 8.0)
    killer.while_sending(series, 2.0)
    assert len(killer.killed) == 7
    node.wait_delivered(series, seconds=120)
    node.wait_ready()
    assert_whole(node, pacs, ledger, items, study, series)
