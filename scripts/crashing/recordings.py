"""Recordings of a real node at work, for :mod:`scripts.crashing.power`."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from scripts.crashing.disk import Disk, everything
from scripts.crashing.power import Recording
from scripts.crashing.shim import Event, Shim
from scripts.crashing.survey import JOURNAL_MB, Received, usable, whole
from scripts.crashing.wire import answers
from tests.e2e.harness import ROOT, Node, make_series, python_environment
from tests.peers import Association, Cut, Item, contexts_for

LONG_OBJECT = 1_200_000
"""Bytes of padding that make an object go to its file while it comes in."""


RING_OBJECT = 900_000
"""Four of these fill the journal of a recording."""


class Sender:
    """A modality with a ledger: what it sent, in order, before it knew of an answer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.sent: dict[str, list[str]] = {}

    def store(self, *items: Item) -> None:
        """All on one association, each answered with success."""
        with Association(self._port, contexts=contexts_for(items)) as assoc:
            for item in items:
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


def changed(item: Item, extra: int) -> Item:
    """The same object with ``extra`` bytes of Data Set Trailing Padding (PS3.10 7.2), explicit VR little endian."""
    return replace(item, data=item.data + struct.pack("<HH2sHL", 0xFFFC, 0xFFFC, b"OB", 0, extra) + bytes(extra))


def small_items(count: int) -> list[Item]:
    """CT slices of about 1 KB, for which the index does as much as for large ones."""

    def shrink(ds: object, number: int) -> None:
        ds.Rows = ds.Columns = 8  # type: ignore[attr-defined]
        ds.PixelData = bytes(128)  # type: ignore[attr-defined]

    return make_series("power", change=shrink).items[:count]


def wait_retired(node: Node, count: int) -> None:
    """Until ``count`` objects that were in the journal alone have durable files and rows of their own."""
    node.wait(
        lambda: node.rows("SELECT coalesce(sum(retired), 0) AS n FROM journals")[0]["n"] >= count,
        30,
        f"{count} records of the journal are retired",
    )


@contextlib.contextmanager
def watched(node: Node, library: Path, *, peer: int = 0) -> Iterator[Shim]:
    """Everything that the node starts inside writes down what it does."""
    shim = Shim(library, node.data_dir, node.folder / "trace", port=node.port, peer=peer)
    node.environment = shim.environment()
    yield shim
    node.environment = {}


def intake(folder: Path, library: Path, *, extra: int = 0) -> Recording:
    """An empty box starts, takes three objects (one of them long), one again as it was, one with other
    bytes, half of another, and as many as go around the journal's ring; is killed, starts again, takes
    one more and stops. ``extra`` more objects come before the kill.
    """
    node = Node(folder, dimse={"workers": 1, "journal_mb": JOURNAL_MB})
    items = small_items(11 + extra)
    with watched(node, library) as shim:
        node.start("run", "receiver")
        sender = Sender(node.port)
        sender.store(items[0], items[1], changed(items[2], LONG_OBJECT))
        sender.store(changed(items[0], 2), items[1])
        sender.half(changed(items[3], LONG_OBJECT))
        for begin in range(0, extra, 25):
            sender.store(*items[11:][begin : begin + 25])
        wait_retired(node, 4 + extra)
        sender.store(*(changed(item, RING_OBJECT) for item in items[5:9]))
        wait_retired(node, 8 + extra)
        sender.store(*(changed(item, RING_OBJECT) for item in items[9:11]))
        node.kill("receiver-1")
        node.stop()
        node.start("run", "receiver")
        sender.store(items[4])
        assert node.stop() == 0
        events = shim.events()
    assert_complete(events, node.data_dir)
    said = answers(events)
    assert len(said) == 12 + extra, f"{len(said)} answers are in the trace"
    received = Received(sender.sent, said)
    return Recording("intake", events, (usable, whole, received), frozenset(s.number for s in said))


BEATER = """
import pathlib, sys
from dicomnode.index.database import Database
from dicomnode.index.operation import Events
events = Events(Database(pathlib.Path(sys.argv[1])))
print("ready", flush=True)
while True:
    events.add("info", "beat", "crash", "a durable commit of another process")
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


def assert_complete(events: list[Event], data_dir: Path) -> None:
    """The trace explains every byte that is there: the shim missed no write, rename or removal."""
    disk = Disk()
    for event in events:
        disk.apply(event)
    expected = disk.crash(everything)
    real = {p.relative_to(data_dir).as_posix(): p for p in data_dir.rglob("*") if p.is_file()}
    names = {n for n in real if not n.endswith("-shm")}
    assert names == expected.keys(), f"the trace does not explain {sorted(names ^ expected.keys())[:5]}"
    for name in names:
        digest = hashlib.sha256(real[name].read_bytes()).digest()
        assert digest == hashlib.sha256(expected[name]).digest(), f"the trace does not explain {name}"
