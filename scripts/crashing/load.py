"""Load for a node that is being killed: modalities with ledgers of their own, and someone who asks and retrieves.

Each runs in a process of its own: ``python -m scripts.crashing.load {send,ask} ...``. A ledger is
a file to which a line is appended before an object is sent and after each answer, so it is true
whatever becomes of node, sender or this campaign.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import random
import signal
import struct
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from tests.peers import Association, Cut, Item, Rejected, contexts_for
from tests.reactor import park

GIVE_UP_SECONDS = 240.0
PAUSE_SECONDS = 0.05
"""Between two attempts at a connection."""


@dataclass(frozen=True, slots=True)
class Errand:
    """What one sender does: ``items`` on associations of ``batch`` objects.

    ``gap_seconds`` lie between two objects, ``pause_seconds`` between two associations. With
    ``rough`` it also does what real networks do: drops a connection in the middle of an
    object, sends objects again, and sends other bytes under the same UID.
    """

    items: Sequence[Item]
    batch: int
    rough: bool = False
    gap_seconds: float = 0.0
    pause_seconds: float = 0.0


class Ledger:
    """Appends to the file of one sender; see :func:`read_ledger`."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="ascii", buffering=1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def note(self, kind: str, item: Item, status: int = -1) -> None:
        self._file.write(f"{kind} {item.sop_instance_uid} {item.sha256} {status}\n")

    def done(self) -> None:
        self._file.write("done - - 0\n")


@dataclass(slots=True)
class Account:
    """What the senders say, by SOP Instance UID, as SHA-256 of data sets.

    ``serving``: what may be served, which is the version acknowledged last and what was sent after it.
    """

    sent: dict[str, set[str]] = field(default_factory=dict)
    acknowledged: dict[str, set[str]] = field(default_factory=dict)
    serving: dict[str, list[str]] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    cuts: int = 0
    finished: bool = True

    @property
    def answers(self) -> int:
        return self.statuses[0]


def read_ledger(paths: Iterable[Path]) -> Account:
    """Several ledgers as one; a UID is in one of them only."""
    account = Account()
    for path in paths:
        finished = False
        for line in path.read_text("ascii").splitlines():
            parts = line.split()
            if len(parts) != 4:
                continue  # a line that a kill cut off
            kind, uid, digest, status = parts
            if kind == "send":
                account.sent.setdefault(uid, set()).add(digest)
                account.serving.setdefault(uid, []).append(digest)
            elif kind == "answer":
                account.statuses[int(status)] += 1
                if status == "0":
                    account.acknowledged.setdefault(uid, set()).add(digest)
                    account.serving[uid] = [digest]
            elif kind == "cut":
                account.cuts += 1
            finished = finished or kind == "done"
        account.finished = account.finished and finished
    return account


def padded(item: Item, extra: int) -> Item:
    """The same object with ``extra`` bytes of Data Set Trailing Padding (PS3.10 7.2), explicit VR little endian."""
    return replace(item, data=item.data + struct.pack("<HH2sHL", 0xFFFC, 0xFFFC, b"OB", 0, extra) + bytes(extra))


class Modality:
    """Sends until everything of its errand was acknowledged."""

    def __init__(self, port: int, ledger: Ledger, seed: int) -> None:
        self._port = port
        self._ledger = ledger
        self._chance = random.Random(seed)

    def run(self, errand: Errand) -> None:
        deadline = time.monotonic() + GIVE_UP_SECONDS
        for begin in range(0, len(errand.items), errand.batch):
            waiting = list(errand.items[begin : begin + errand.batch])
            while waiting:
                if time.monotonic() > deadline:
                    raise SystemExit("the node did not take everything in time")
                waiting = self._association(waiting, errand.gap_seconds, errand.rough)
            if errand.rough:
                self._again(errand.items[begin : begin + errand.batch])
            time.sleep(errand.pause_seconds)
        self._ledger.done()

    def _association(self, items: Sequence[Item], gap_seconds: float, rough: bool) -> list[Item]:
        """One association; what is left to send."""
        left = list(items)
        try:
            with Association(self._port, contexts=contexts_for(items), timeout=30) as assoc:
                for item in items:
                    if rough and self._chance.random() < 0.03:
                        self._half(assoc, item)
                        return left
                    self._ledger.note("send", item)
                    status = assoc.store(item)
                    self._ledger.note("answer", item, status)
                    if status == 0:
                        left.remove(item)
                    time.sleep(gap_seconds)
        except (Cut, Rejected, AssertionError):
            self._ledger.note("cut", items[0])
            time.sleep(PAUSE_SECONDS)
        return left

    def _half(self, assoc: Association, item: Item) -> None:
        self._ledger.note("send", item)
        context = assoc.accepted[item.sop_class_uid, item.transfer_syntax_uid]
        assoc.request(context, assoc.store_command(item), None)
        for fragment in assoc.fragments(context, item.data, command=False):
            if self._chance.random() < 0.5:
                break
            assoc.send(fragment)
        assoc.drop()

    def _again(self, items: Sequence[Item]) -> None:
        """Some objects once more: as they are, or with other bytes, at once and on another association."""
        chosen = [i for i in items if self._chance.random() < 0.2]
        waiting = [i if self._chance.random() < 0.5 else padded(i, self._chance.randrange(2, 200, 2)) for i in chosen]
        deadline = time.monotonic() + GIVE_UP_SECONDS
        while waiting and time.monotonic() < deadline:
            waiting = self._association(waiting, 0.0, rough=False)


class Asker:
    """C-ECHO, C-FIND, C-MOVE and HTTP, over and over; a node that is away is no error, a wrong answer is."""

    def __init__(self, port: int, http_port: int, log: Path, seed: int) -> None:
        self._port = port
        self._http_port = http_port
        self._log = log
        self._chance = random.Random(seed)
        self._stop = False
        self._counts: Counter[str] = Counter()

    def run(self, series: Path) -> None:
        """``series`` lists study and series UIDs, one pair a line; it may grow."""
        signal.signal(signal.SIGTERM, self._on_stop)
        while not self._stop:
            pairs = [line.split() for line in series.read_text("ascii").splitlines()] if series.exists() else []
            with contextlib.suppress(OSError, RuntimeError, ValueError):
                self._once(pairs)
            self._log.write_text(json.dumps(self._counts))
            time.sleep(0.1)

    def _on_stop(self, *_: object) -> None:
        self._stop = True

    def _once(self, pairs: Sequence[Sequence[str]]) -> None:
        with contextlib.suppress(OSError):
            url = f"http://127.0.0.1:{self._http_port}/api/v1/status"
            with urllib.request.urlopen(url, timeout=5) as answer:
                self._counts["http"] += answer.status == 200
        if pairs:
            self._query(*self._chance.choice(pairs))

    def _query(self, study: str, series: str) -> None:
        from pydicom import Dataset
        from pynetdicom import AE
        from pynetdicom.sop_class import (
            StudyRootQueryRetrieveInformationModelFind as FindModel,
        )
        from pynetdicom.sop_class import (
            StudyRootQueryRetrieveInformationModelMove as MoveModel,
        )

        ae = AE("ASKER")
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 10
        ae.add_requested_context(FindModel)
        ae.add_requested_context(MoveModel)
        assoc = ae.associate("127.0.0.1", self._port, ae_title="DICOMNODE")
        if not assoc.is_established:
            self._counts["away"] += 1
            return
        keys: Any = Dataset()
        keys.QueryRetrieveLevel = "IMAGE"
        keys.StudyInstanceUID, keys.SeriesInstanceUID, keys.SOPInstanceUID = study, series, ""
        try:
            park(assoc)
            found = [i for s, i in assoc.send_c_find(keys, FindModel) if i is not None]
            self._counts["find"] += 1
            self._counts["matches"] += len(found)
            if found:
                move: Any = Dataset()
                move.QueryRetrieveLevel = "IMAGE"
                move.StudyInstanceUID, move.SeriesInstanceUID = study, series
                move.SOPInstanceUID = self._chance.choice(found).SOPInstanceUID
                park(assoc)
                for status, _ in assoc.send_c_move(move, "MOVER", MoveModel):
                    self._counts["moved"] += int("Status" in status and status.Status == 0x0000)
        finally:
            if assoc.is_established:
                assoc.release()


def main(argv: Sequence[str]) -> None:
    """``send ERRAND LEDGER PORT SEED`` or ``ask SERIES LOG PORT HTTP_PORT SEED``."""
    if argv[0] == "send":
        errand: Errand = pickle.loads(Path(argv[1]).read_bytes())
        with Ledger(Path(argv[2])) as ledger:
            Modality(int(argv[3]), ledger, int(argv[4])).run(errand)
    else:
        Asker(int(argv[3]), int(argv[4]), Path(argv[2]), int(argv[5])).run(Path(argv[1]))


if __name__ == "__main__":
    main(sys.argv[1:])
