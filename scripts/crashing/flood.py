"""``scripts/crash --flood``: connects and aborts against a running node; nothing of them may stay.

A mixture of what scanners, broken modalities and attackers do. Threads, descriptors and memory of
the whole node are looked at before, at some points on the way, and at the end.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from scripts.crashing.report import Report, Say
from tests.e2e.harness import Node
from tests.peers import CT_IMAGE, EXPLICIT_LITTLE, IMPLICIT_LITTLE, VERIFICATION, Association, Cut, Rejected, pdu

WARM_SHARE = 0.5
"""Part of the flood before the first look: pools, caches and the allocator's arenas fill once.

Measured: with two receivers RSS rises for 4,500 associations and is flat afterwards.
"""

LOOKS = 8
MORE = 2
SLOPE_LIMIT = 1 << 20
"""RSS, in bytes per 1,000 associations, that the node may grow by (RELIABILITY.md)."""

SPARE_THREADS, SPARE_DESCRIPTORS = 4, 16
"""A thread or connection of the node's own that came to life in between is no leak; one for each hundred callers is."""

SETTLE_SECONDS = 30.0
CONTEXTS = ((VERIFICATION, [IMPLICIT_LITTLE]), (CT_IMAGE, [EXPLICIT_LITTLE]))


@dataclass(frozen=True, slots=True)
class Look:
    """The node after ``count`` associations: all its processes together."""

    count: int
    threads: int
    descriptors: int
    rss: int


def slope(looks: Sequence[Look]) -> float:
    """Bytes of RSS per 1,000 associations: least squares over the looks. Pure."""
    middle = sum(look.count for look in looks) / len(looks)
    mean = sum(look.rss for look in looks) / len(looks)
    spread = sum((look.count - middle) ** 2 for look in looks)
    return 1000 * sum((look.count - middle) * (look.rss - mean) for look in looks) / spread if spread else 0.0


def leaks(looks: Sequence[Look]) -> list[str]:
    """What is not flat from the first look to the last. Pure."""
    first, last = looks[0], looks[-1]
    found = []
    if last.threads > first.threads + SPARE_THREADS:
        found.append(f"{last.threads} threads, {first.threads} before")
    if last.descriptors > first.descriptors + SPARE_DESCRIPTORS:
        found.append(f"{last.descriptors} descriptors, {first.descriptors} before")
    if slope(looks) >= SLOPE_LIMIT:
        found.append(f"RSS grows by {slope(looks) / 2**20:.2f} MB per 1,000 associations")
    return found


# What callers do.


def _connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def silent(port: int, _: random.Random) -> None:
    _connect(port).close()


def garbage(port: int, chance: random.Random) -> None:
    with _connect(port) as sock, contextlib.suppress(OSError):
        sock.sendall(chance.randbytes(chance.randrange(1, 200)))


def half_request(port: int, chance: random.Random) -> None:
    """An A-ASSOCIATE-RQ that announces more than comes, then a reset."""
    with _connect(port) as sock, contextlib.suppress(OSError):
        sock.sendall(pdu(0x01, bytes(chance.randrange(68)), length=500))


def aborted(port: int, _: random.Random) -> None:
    Association(port, contexts=CONTEXTS).abort()


def dropped(port: int, _: random.Random) -> None:
    Association(port, contexts=CONTEXTS).drop()


def rejected(port: int, _: random.Random) -> None:
    try:
        Association(port, contexts=CONTEXTS, calling="STRANGER").abort()
    except Rejected:
        return
    raise AssertionError("a stranger was accepted")


def echoed(port: int, _: random.Random) -> None:
    with Association(port, contexts=CONTEXTS) as assoc:
        assert assoc.echo() == 0


CALLERS: dict[Callable[[int, random.Random], None], int] = {
    silent: 3,
    garbage: 2,
    half_request: 1,
    aborted: 4,
    dropped: 2,
    rejected: 2,
    echoed: 1,
}
"""How often each comes."""


class Flood:
    """Callers one after the other, seeded; ``refused`` counts those that were cut or reset."""

    def __init__(self, node: Node, seed: int) -> None:
        self.node = node
        self.callers: Counter[str] = Counter()
        self.refused = 0
        self.count = 0
        self._chance = random.Random(seed)

    def run(self, count: int) -> None:
        for caller in self._chance.choices(list(CALLERS), list(CALLERS.values()), k=count):
            self.callers[caller.__name__] += 1
            try:
                caller(self.node.port, self._chance)
            except Cut:
                self.refused += 1
        self.count += count

    def look(self) -> Look:
        """After every connection of ours has ended in the node too."""
        receivers = [psutil.Process(self.node.pids()[f"receiver-{n}"]) for n in range(1, self.node.workers + 1)]

        def quiet() -> bool:
            return not any(c.status == psutil.CONN_ESTABLISHED for p in receivers for c in p.net_connections("tcp"))

        self.node.wait(quiet, SETTLE_SECONDS, "every connection has ended")
        family = self.node.family()
        return Look(
            self.count,
            sum(p.num_threads() for p in family),
            sum(p.num_fds() for p in family),
            sum(p.memory_info().rss for p in family),
        )


def measure(flood: Flood, count: int) -> list[Look]:
    """The flood, and the node at ``LOOKS`` points after the first part of it.

    What is not flat there is looked at again in as many further callers, at most ``MORE`` times: an
    allocator comes to the end of its steps, a leak does not.
    """
    warm = int(count * WARM_SHARE)
    flood.run(warm)
    looks = _window(flood, count - warm)
    for _ in range(MORE):
        if not leaks(looks):
            break
        looks = _window(flood, count - warm)
    return looks


def _window(flood: Flood, count: int) -> list[Look]:
    looks = [flood.look()]
    for number in range(LOOKS):
        flood.run(count * (number + 1) // LOOKS - count * number // LOOKS)
        looks.append(flood.look())
    return looks


def flood(folder: Path, count: int, seed: int, say: Say, *, workers: int = 2, verb: Sequence[str] = ()) -> Report:
    """Against a whole node, or against what ``verb`` starts."""
    node = Node(folder, dimse={"workers": workers, "journal_mb": 8}, logging={"level": "warning", "format": "json"})
    begin = time.monotonic()
    node.start(*verb)
    try:
        running = Flood(node, seed)
        looks = measure(running, count)
        say(f"{running.count} associations, {running.refused} of them cut by the node")
        wrong = leaks(looks)
        with Association(node.port, contexts=CONTEXTS) as assoc:
            if assoc.echo() != 0:
                wrong.append("a peer is not answered afterwards")
    finally:
        code = node.stop()
    wrong += [] if code == 0 else [f"the node ended with {code}"]
    rows = [(look.count, look.threads, look.descriptors, round(look.rss / 2**20, 1)) for look in looks]
    counts = {
        "associations": running.count,
        **running.callers,
        "threads": looks[-1].threads - looks[0].threads,
        "descriptors": looks[-1].descriptors - looks[0].descriptors,
        "rss_mb_per_1000": round(slope(looks) / 2**20, 3),
    }
    columns = ("associations", "threads", "descriptors", "RSS in MB")
    return Report("flood", "connects and aborts", columns, list(rows), counts, wrong, time.monotonic() - begin)
