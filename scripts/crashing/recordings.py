"""Recordings of a real node at work, for :mod:`scripts.crashing.power`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import apsw
import psutil
import sqlite_utils
from pydicom import dcmread

from dicomnode.index.schema import migrations
from scripts.crashing.disk import FORGOTTEN, Disk, Snapshot, everything
from scripts.crashing.load import padded
from scripts.crashing.power import Recording
from scripts.crashing.shim import KILL, Event, Faults, Op, Shim
from scripts.crashing.survey import JOURNAL_MB, Bundle, Delivered, Kept, Received, usable, whole
from scripts.crashing.wire import C_STORE_RSP, Said, answers, heard, requests
from tests.e2e.harness import ROOT, Node, make_series, python_environment, rule
from tests.peers import Association, Cut, Item, StoreScp, contexts_for, data_set_of

LONG_OBJECT = 1_200_000
"""Bytes of padding that make an object go to its file while it comes in."""


RING_OBJECT = 900_000
"""Three of these make a recording's journal so full that what came before is retired; two more go around its ring."""


SMALL_JOURNAL = {"DICOMNODE__DIMSE__JOURNAL_MB": str(JOURNAL_MB)}
"""A variable goes before the file, and the test run sets another one for all its nodes."""


class Sender:
    """A modality with a ledger: what it sent, in order, before it knew of an answer."""

    def __init__(self, port: int, shim: Shim | None = None) -> None:
        self._port = port
        self._shim = shim
        self.sent: dict[str, list[str]] = {}

    def store(self, *items: Item) -> None:
        """All on one association, each answered with success."""
        with Association(self._port, contexts=contexts_for(items)) as assoc:
            for item in items:
                self.store_on(assoc, item)

    def store_on(self, assoc: Association, item: Item) -> None:
        self._note(item)
        status = assoc.store(item)
        assert status == 0, f"status 0x{status:04X}"

    def half(self, item: Item) -> None:
        """An object that ends in the middle, with the connection."""
        self._note(item)
        assoc = Association(self._port, contexts=contexts_for([item]))
        context = assoc.accepted[item.sop_class_uid, item.transfer_syntax_uid]
        assoc.request(context, assoc.store_command(item), None)
        pdus = list(assoc.fragments(context, item.data, command=False))
        with contextlib.suppress(Cut):
            for fragment in pdus[: max(1, len(pdus) * 2 // 3)]:
                assoc.send(fragment)
        assoc.drop()

    def _note(self, item: Item) -> None:
        self.sent.setdefault(item.sop_instance_uid, []).append(item.sha256)
        if self._shim is not None:
            self._shim.mark(item.sop_instance_uid)

    def received(self, events: Sequence[Event], said: Sequence[Said]) -> Received:
        begun: dict[str, list[int]] = {}
        for event in events:
            if event.kind == "K":
                begun.setdefault(event.data.decode(), []).append(event.number)
        return Received(self.sent, said, begun)


def small_items(count: int) -> list[Item]:
    """CT slices of about 1 KB, for which the index does as much as for large ones."""

    def shrink(ds: object, _number: int) -> None:
        ds.Rows = ds.Columns = 8  # type: ignore[attr-defined]
        ds.PixelData = bytes(128)  # type: ignore[attr-defined]

    return make_series("power", change=shrink).items[:count]


def wait_retired(node: Node, count: int) -> None:
    """Until ``count`` objects that were in the journal alone have durable files and rows of their own."""
    node.wait(
        lambda: sum(row["retired"] for row in node.rows("SELECT retired FROM journals")) >= count,
        30,
        f"{count} records of the journal are retired",
    )


@contextlib.contextmanager
def watched(node: Node, library: Path, *, peer: int = 0) -> Iterator[Shim]:
    """Everything that the node starts inside writes down what it does."""
    shim = Shim(library, node.data_dir, node.folder / "trace", port=node.port, peer=peer)
    node.environment = {**shim.environment(), **SMALL_JOURNAL}
    node.looks_at_copies = True
    yield shim
    node.environment = {}
    node.looks_at_copies = False


def intake(folder: Path, library: Path, *, extra: int = 0) -> Recording:
    """An empty box starts, takes three objects (one of them long), one again as it was, one with other
    bytes, half of another, and as many as go around the journal's ring; is killed, starts again, takes
    one more and stops. ``extra`` more objects come before the kill.
    """
    node = Node(folder, dimse={"workers": 1, "journal_mb": JOURNAL_MB})
    items = small_items(10 + extra)
    with watched(node, library) as shim:
        node.start("run", "receiver")
        sender = Sender(node.port, shim)
        sender.store(items[0], items[1], padded(items[2], LONG_OBJECT))
        sender.store(padded(items[0], 2), items[1])
        sender.half(padded(items[3], LONG_OBJECT))
        for begin in range(0, extra, 25):
            sender.store(*items[10:][begin : begin + 25])
        sender.store(*(padded(item, RING_OBJECT) for item in items[5:8]))
        wait_retired(node, 7 + extra)  # all of them: the kill must not land inside a retirement
        sender.store(*(padded(item, RING_OBJECT) for item in items[8:10]))
        node.kill("receiver-1")
        node.stop()
        node.start("run", "receiver")
        sender.store(items[4])
        assert node.stop() == 0
        events = shim.events()
    assert_complete(events, node.data_dir)
    said = answers(events)
    assert len(said) == 11 + extra, f"{len(said)} answers are in the trace"
    received = sender.received(events, said)
    moments = frozenset(s.number for s in said)
    return Recording("intake", events, (usable, whole, received), moments, fresh=received.fresh())


def replaced(folder: Path, library: Path) -> Recording:
    """Bytes A, then B, then A again under one UID, by one receiver and by two in turn; nothing is retired in between.

    What is acknowledged last must serve, whichever journal or row a power cut leaves of the others.
    """
    node = Node(folder, dimse={"workers": 2, "journal_mb": JOURNAL_MB})
    items = small_items(2)
    with watched(node, library) as shim:
        node.start("run", "receiver")
        sender = Sender(node.port, shim)
        first, second = sorted(node.expected())
        for item, receivers in ((items[0], (first, first, first)), (items[1], (first, second, first))):
            for version, receiver in zip((item, padded(item, 2), item), receivers, strict=True):
                _store_at(node, sender, receiver, version)
        for receiver in (first, second):
            node.kill(receiver)
        node.stop()
        events = shim.events()
    assert_complete(events, node.data_dir)
    said = answers(events)
    assert len(said) == 6, f"{len(said)} answers are in the trace"
    received = sender.received(events, said)
    fresh = received.fresh()
    return Recording("replaced", events, (usable, whole, received), frozenset(fresh), said[0].number, fresh=fresh[1:])


def _store_at(node: Node, sender: Sender, receiver: str, item: Item) -> None:
    """The kernel chooses who accepts: asked again until it is this receiver."""
    process = psutil.Process(node.pids()[receiver])
    for _ in range(1000):
        with Association(node.port, contexts=contexts_for([item])) as assoc:
            ours = assoc.sock.getsockname()[1]
            if any(c.raddr and c.raddr.port == ours for c in process.net_connections("tcp")):
                sender.store_on(assoc, item)
                return
    raise AssertionError(f"{receiver} accepts nothing")


BEATER = """
import pathlib, sys, time
from dicomnode.index.database import Database
from dicomnode.index.operation import Events
events = Events(Database(pathlib.Path(sys.argv[1])))
print("ready", flush=True)
while True:
    events.add("info", "beat", "crash", "a durable commit of another process")
    time.sleep(0.01)
"""


def crowd(folder: Path, library: Path, *, senders: int = 4, objects: int = 5) -> Recording:
    """Two receivers, several senders at once, and another process whose commits are durable at any moment."""
    node = Node(folder, dimse={"workers": 2, "journal_mb": JOURNAL_MB})
    items = small_items(senders * objects)
    with watched(node, library) as shim:
        node.start("run", "receiver")
        parts = [Sender(node.port) for _ in range(senders)]
        beater = subprocess.Popen(
            [sys.executable, "-c", BEATER, str(node.data_dir)],
            env={**os.environ, **python_environment(), **node.environment},
            stdout=subprocess.PIPE,
            cwd=ROOT,
        )
        try:
            assert beater.stdout is not None and beater.stdout.readline() == b"ready\n"
            with ThreadPoolExecutor(senders) as pool:
                jobs = [pool.submit(s.store, *items[n::senders]) for n, s in enumerate(parts)]
                for job in jobs:
                    job.result(60)
        finally:
            beater.kill()
            beater.communicate()
        node.kill("receiver-1")
        assert node.stop() == 0
        events = shim.events()
    assert_complete(events, node.data_dir)
    said = answers(events)
    assert len(said) == len(items), f"{len(said)} answers are in the trace"
    received = Received({uid: versions for s in parts for uid, versions in s.sent.items()}, said)
    first = next(e.number for e in events if e.kind == "N")
    return Recording("crowd", events, (usable, whole, received), frozenset(s.number for s in said), first)


def results(folder: Path, library: Path) -> Recording:
    """A series is here for certain; the node starts, analyses it and delivers SEG and SR to a peer."""
    pacs = StoreScp(folder / "pacs", "+B")
    try:
        node = Node(
            folder / "node",
            peers=[{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": pacs.port}],
            rules=[rule("ct", {"Modality": "CT"}, to=["pacs"])],
            dimse={"workers": 1, "journal_mb": JOURNAL_MB},
        )
        series = make_series("power")
        node.start("run", "receiver")
        sender = Sender(node.port)
        sender.store(*series.items)
        assert node.stop() == 0
        before = Snapshot(node.data_dir)
        with watched(node, library, peer=pacs.port) as shim:
            node.start()
            node.wait_delivered(series.series_uid)
            assert node.stop() == 0
            events = shim.events()
        assert_complete(events, node.data_dir, before())
        there = {
            str(ds.SOPInstanceUID): path for path in pacs.files() if (ds := dcmread(path, stop_before_pixels=True))
        }
        stored = {uid: hashlib.sha256(data_set_of(path.read_bytes())).hexdigest() for uid, path in there.items()}
    finally:
        pacs.stop()
    sent = requests(events)
    assert {s.uid for s in sent} == stored.keys() and len(stored) == 2, "SEG and SR are in the trace"
    delivered = Delivered(sent, heard(events), stored)
    received = Received(sender.sent, [Said(-1, C_STORE_RSP, uid, 0) for uid in sender.sent])
    first = next(e.number for e in events if e.path.startswith("objects/"))
    moments = frozenset(s.number for s in sent)
    rests_on = ("an object", "an object's folder", "the write-ahead log", "the database")
    return Recording("results", events, (usable, whole, received, delivered), moments, first, before, rests_on=rests_on)


MIGRATE = """
import pathlib, sys
from dicomnode.index.database import Database
Database(pathlib.Path(sys.argv[1])).close()
"""
OLD_SCHEMA = "m0004_operation"
"""An index before this migration is the oldest that anyone has."""


def upgrade(folder: Path, library: Path) -> Recording:
    """An index of an older version, with rows in it, is opened by this one."""
    data_dir = folder / "data"
    data_dir.mkdir(parents=True)
    connection = sqlite3.connect(data_dir / "index.sqlite")
    migrations.apply(sqlite_utils.Database(connection), stop_before=OLD_SCHEMA)
    for number in range(200):
        connection.execute("INSERT INTO patients (PatientID, IssuerOfPatientID) VALUES (?, '')", (f"P{number}",))
    connection.commit()
    connection.close()
    before = Snapshot(data_dir)
    shim = Shim(library, data_dir, folder / "trace")
    subprocess.run(
        [sys.executable, "-c", MIGRATE, str(data_dir)],
        check=True,
        cwd=ROOT,
        env={**os.environ, **python_environment(), **shim.environment()},
        timeout=60,
    )
    events = shim.events()
    assert_complete(events, data_dir, before())
    rests_on = ("the rollback journal", "data_dir", "the database")
    return Recording("upgrade", events, (usable, Kept("patients", 200)), frozenset(), 0, before, rests_on=rests_on)


def bundle(folder: Path, library: Path) -> Recording:
    """The sidecar pulls a model bundle, verifies it and makes it the one that serves."""
    name, version = "ct-lung", "9.0.0"
    source = folder / "source" / version
    shutil.copytree(ROOT / "models" / name / "1.0.0", source)
    manifest = source / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"1.0.0"', f'"{version}"', 1))
    archive = folder / "bundle.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(source, arcname=".")
    with served(folder) as port:
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        url = f"http://127.0.0.1:{port}/{archive.name}"
        pull = {"name": name, "version": version, "url": url, "sha256": digest}
        node = Node(folder / "node", cloud={"models": [pull]}, dimse={"workers": 1, "journal_mb": JOURNAL_MB})
        with watched(node, library) as shim:
            node.start("run", "sidecar", wait=False)
            node.wait(lambda: active(node).get(name) == version, 60, "the bundle is active")
            assert node.stop() == 0
            events = shim.events()
    assert_complete(events, node.data_dir)
    wanted = {p.relative_to(source).as_posix(): p.read_bytes() for p in source.rglob("*") if p.is_file()}
    first = next(e.number for e in events if e.path.startswith("staging"))
    rests_on = ("data_dir", "a folder of staging", "a file of a bundle", "a folder of models", "the database")
    return Recording("bundle", events, (usable, Bundle(name, version, wanted)), frozenset(), first, rests_on=rests_on)


def active(node: Node) -> dict[str, str]:
    try:
        return {row["name"]: row["version"] for row in node.rows("SELECT name, version FROM models")}
    except apsw.Error:
        return {}


@contextlib.contextmanager
def served(folder: Path) -> Iterator[int]:
    """The files of a folder by HTTP; the port."""
    handler = partial(QuietHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield int(server.server_address[1])
        server.shutdown()
        thread.join()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """The campaign's output is no access log."""


def birth(folder: Path, library: Path, *, dies_before_sync: int) -> Recording | None:
    """The first start dies before its n-th fsync; the second takes an object. None when there is no such fsync.

    What the first life made and could not sync, the second must not take for certain.
    """
    node = Node(folder, dimse={"workers": 1, "journal_mb": JOURNAL_MB})
    faults = Faults(folder / "faults")
    item = small_items(1)[0]
    sender = Sender(node.port)
    with watched(node, library) as shim:
        node.environment = {**shim.environment(faults), **SMALL_JOURNAL}
        faults.arm(Op.sync, KILL, nth=dies_before_sync)
        node.start("run", "receiver", wait=False)
        node.wait(lambda: not node.running or node.expected() <= node.pids().keys(), 60, "the first life is over")
        born = node.running
        faults.disarm()
        if not born:
            node.start("run", "receiver")
            sender.store(item)
        node.stop()
        events = shim.events()
    if born:
        return None
    assert_complete(events, node.data_dir)
    said = answers(events)
    received = Received(sender.sent, said)
    return Recording("birth", events, (usable, whole, received), frozenset(s.number for s in said), said[0].number)


def assert_complete(events: list[Event], data_dir: Path, disk: Disk | None = None) -> None:
    """The trace explains every byte that is there: the shim missed no write, rename or removal."""
    disk = disk or Disk()
    for event in events:
        disk.apply(event)
    expected = disk.crash(everything)
    real = {p.relative_to(data_dir).as_posix(): p for p in data_dir.rglob("*") if p.is_file()}
    names = {n for n in real if not n.endswith(FORGOTTEN)}
    known = {n for n in expected if not n.endswith(FORGOTTEN)}
    assert names == known, f"the trace does not explain {sorted(names ^ known)[:5]}"
    for name in names:
        digest = hashlib.sha256(real[name].read_bytes()).digest()
        assert digest == hashlib.sha256(expected[name]).digest(), f"the trace does not explain {name}"
