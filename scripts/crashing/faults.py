"""A disk that fails: EIO and ENOSPC at every step of intake, results, deliveries and activation.

What must hold, whatever fails and however often: no acknowledgement of what is not durable; an
fsync that failed is not tried again, the process ends (exit 74); a full disk is answered with
0xA700 or ends the process, and all goes on when there is room; and what was acknowledged is there
afterwards.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import apsw

from dicomnode.durable import EXIT_STORAGE
from scripts.crashing.load import padded
from scripts.crashing.recordings import LONG_OBJECT, RING_OBJECT, SMALL_JOURNAL, small_items
from scripts.crashing.shim import Event, Faults, Op, Shim
from scripts.crashing.survey import JOURNAL_MB
from tests.e2e.harness import ROOT, Node, alive, make_series, python_environment, rule
from tests.peers import Association, Cut, Item, Rejected, SlowLink, StoreScp, contexts_for, data_set_of

OUT_OF_RESOURCES = 0xA700
WAIT_SECONDS = 60.0
KINDS = ["SEG", "SR"]
"""What each series gives."""

FILLERS = 3
"""Objects of ``RING_OBJECT`` bytes that make more than half of the journal."""

FILLS = (".part", "index.sqlite-wal", "journal/")
"""What a disk that becomes full cuts short: an object's file, the index's log, the journal."""

STEPS = (Op.create, Op.write, Op.sync, Op.rename, Op.unlink, Op.truncate)


@dataclass(frozen=True, slots=True)
class Case:
    """The ``nth`` call of a kind, on a path with ``match``, fails with ``code``; if sticky, all after it too."""

    op: Op
    code: int
    nth: int = 1
    sticky: bool = False
    match: str = ""
    shorten: bool = False

    def __str__(self) -> str:
        often = "from then on" if self.sticky else "once"
        short = " after a short write" if self.shorten else ""
        return (
            f"{errno.errorcode[self.code]} at {self.op.name} {self.nth} of {self.match or 'any file'}, {often}{short}"
        )


@dataclass(frozen=True, slots=True)
class Result:
    """``answers``: statuses, -1 for a cut connection. ``exit``: code when the process ended, else None."""

    case: Case
    fired: bool
    answers: tuple[int, ...]
    exit: int | None
    wrong: tuple[str, ...] = ()

    def outcome(self) -> str:
        if not self.fired:
            return "not reached"
        said = ", ".join("cut" if a < 0 else f"0x{a:04X}" for a in self.answers)
        return f"{said}; " + ("the process ended" if self.exit is not None else "the process goes on")


class Intake:
    """One receiver process on a disk that can fail.

    Each case sends a small and a long object, and then as many bytes as make the journal so
    full that it is retired at once: what happens after the answers need not be waited for.
    """

    def __init__(self, folder: Path, library: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.node = Node(folder, dimse={"workers": 1, "journal_mb": JOURNAL_MB})
        self.node.visible_seconds = 0.2  # what fails may keep objects from the index for longer than a look may take
        self.faults = Faults(folder / "faults")
        self.shim = Shim(library, self.node.data_dir, folder / "trace", port=self.node.port)
        self.node.environment = {**self.shim.environment(self.faults), **SMALL_JOURNAL}
        self._items = iter(_endless_items())
        self._sent: dict[str, set[str]] = {}
        self._acknowledged: dict[str, str] = {}
        self._small = ""

    def __enter__(self) -> Self:
        self.node.start("run", "receiver")
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.disarm()
        if self.node.running:
            self.node.stop()

    def reach(self, op: Op, match: str = "") -> int:
        """How many calls of a kind the two objects of a case make, up to their retirement."""
        self.faults.arm(op, errno.EIO, nth=1 << 30, match=match)
        list(self._send())
        self._wait_retired()
        seen = self.faults.seen
        self.faults.disarm()
        return seen

    def run(self, case: Case) -> Result:
        self.shim.forget()
        self.faults.arm(case.op, case.code, nth=case.nth, sticky=case.sticky, match=case.match, shorten=case.shorten)
        answers = tuple(self._send())
        self._wait_fired(case)
        fired = self.faults.fired > 0
        self.faults.disarm()
        again = [-1] if not self.node.running else list(self._send())
        code = None
        if -1 not in again:
            self._wait_retired()
        if -1 in again or not self.node.running:  # what failed was off the path of an answer
            self.node.wait(lambda: not self.node.running, WAIT_SECONDS, "the process ends")
            code = self.node.stop()
            self.node.start("run", "receiver")
            again = list(self._send())
            self._wait_retired()
        events = self.shim.events()
        wrong = [*_rules(case, fired and not _ignored(events), answers, code), *_no_second_sync(events)]
        if set(again) != {0}:
            wrong.append("it does not take objects again when the fault is over")
        wrong += self._kept()
        return Result(case, fired, answers, code, tuple(wrong))

    def _send(self) -> Iterator[int]:
        """A small object, a long one, and what fills the journal, each on an association of its own."""
        small = next(self._items)
        status = self._store(small)
        self._small = small.sop_instance_uid if status == 0 else ""
        yield status
        yield self._store(padded(next(self._items), LONG_OBJECT))
        for _ in range(FILLERS):
            yield self._store(padded(next(self._items), RING_OBJECT))

    def _store(self, item: Item) -> int:
        self._sent.setdefault(item.sop_instance_uid, set()).add(item.sha256)
        try:
            with Association(self.node.port, contexts=contexts_for([item]), timeout=20) as assoc:
                status = assoc.store(item)
                if status == 0:
                    self._acknowledged[item.sop_instance_uid] = item.sha256
        except (Cut, Rejected, AssertionError):
            return 0 if item.sop_instance_uid in self._acknowledged else -1
        return status

    def _wait_fired(self, case: Case) -> None:
        """Until the fault struck and its consequence is there, or nothing more will come."""

        def over() -> bool:
            if not self.node.running or self.faults.fired > (3 if case.sticky else 0):
                return True
            return self._retired()

        self.node.wait(over, WAIT_SECONDS, f"{case} struck")
        if case.op is Op.sync and case.code == errno.EIO and self.faults.fired and not _ignored(self.shim.events()):
            self.node.wait(lambda: not self.node.running, WAIT_SECONDS, "the process ends")

    def _wait_retired(self) -> None:
        self.node.wait(lambda: not self.node.running or self._retired(), WAIT_SECONDS, "the journal is retired")

    def _retired(self) -> bool:
        """Whether the small object's own file was synced, which is what lets go of the journal."""
        if not self._small:
            return True
        try:
            held = self.node.instance(self._small)
            ino = (self.node.data_dir / "objects" / held["file"]).stat().st_ino if held else -1
        except (apsw.Error, FileNotFoundError):  # the process ends, or begins
            return False
        return any(event.kind == "S" and event.ino == ino for event in self.shim.events())

    def _kept(self) -> Iterator[str]:
        rows = {r["SOPInstanceUID"]: r for r in self.node.rows("SELECT * FROM instances")}
        for uid, digest in self._acknowledged.items():
            if uid not in rows:
                yield "an acknowledged object has no row"
            elif rows[uid]["dataset_sha256"] != digest:
                yield "an acknowledged object has another row"
        for uid, row in rows.items():
            try:
                part10 = self.node.stored_part10(row)
            except FileNotFoundError:
                yield "a row has no file"
                continue
            if hashlib.sha256(data_set_of(part10)).hexdigest() not in self._sent[uid]:
                yield "a file is not whole"
        verdict = self.node.rows("PRAGMA integrity_check")
        if [r["integrity_check"] for r in verdict] != ["ok"]:
            yield "integrity_check"


def _endless_items() -> Iterator[Item]:
    while True:
        yield from small_items(32)


def _rules(case: Case, fired: bool, answers: Sequence[int], code: int | None) -> Iterator[str]:
    if code is not None and code != EXIT_STORAGE:
        yield f"the process ended with {code}"
    if fired and case.op is Op.sync and case.code == errno.EIO and code is None:
        yield "an fsync failed and the process goes on"
    for status in answers:
        if status not in (0, -1, OUT_OF_RESOURCES):
            yield f"status 0x{status:04X}"
        if status == -1 and code is None:
            yield "a connection was cut though the process lives"


def _ignored(events: Sequence[Event]) -> bool:
    """Whether the last fault hit an fsync whose failure SQLite does not look at: that of the log's directory.

    Every connection does it with its first commit, so the name is certain unless it was made a moment ago.
    """
    return [event.path for event in _hit(events)][-1:] == [""]


def _hit(events: Sequence[Event]) -> list[Event]:
    return [event for event in events if event.kind == "F"]


def _no_second_sync(events: Sequence[Event]) -> Iterator[str]:
    """After a failed fsync the same process never syncs that file again: the kernel might say yes."""
    failed: set[tuple[int, str]] = set()
    for event in events:
        if event.kind == "F" and event.flags == Op.sync:
            failed.add((event.pid, event.path))
        elif event.kind == "S" and event.path and (event.pid, event.path) in failed:
            yield "a failed fsync was tried again"


def intake_cases(intake: Intake, chance: random.Random, part: float) -> list[Case]:
    """Every step that an intake takes, or ``part`` of them: EIO and ENOSPC, once and from then on.

    However small the part is, each kind of step and each kind of fault is in it.
    """
    cases: list[Case] = []
    for op in STEPS:
        steps = range(1, intake.reach(op) + 1)
        for code, sticky in itertools.product((errno.EIO, errno.ENOSPC), (False, True)) if steps else ():
            count = max(1, round(part * len(steps)))
            cases += [Case(op, code, n, sticky) for n in sorted(chance.sample(steps, count))]
    return cases + [Case(Op.write, errno.ENOSPC, 1, True, match, True) for match in FILLS]


# Results, deliveries, activation.


@dataclass(frozen=True, slots=True)
class Later:
    """A fault while the node does something with what it holds: ``when`` is ``analysing`` or ``sending``."""

    when: str
    case: Case


LATER = tuple(
    Later(when, Case(op, code, match=match))
    for when, match, ops in (
        ("analysing", "objects/", (Op.create, Op.write, Op.sync, Op.rename)),
        ("analysing", "index.sqlite-wal", (Op.write, Op.sync)),
        ("sending", "index.sqlite-wal", (Op.write, Op.sync)),
    )
    for op in ops
    for code in (errno.EIO, errno.ENOSPC)
)
ACTIVATION = tuple(
    Case(op, code, match="index.sqlite-wal") for op in (Op.write, Op.sync) for code in (errno.EIO, errno.ENOSPC)
)


class Whole:
    """A whole node; each case sends one series and waits for its results at the peer."""

    def __init__(self, folder: Path, library: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.pacs = StoreScp(folder / "pacs", "+B")
        self.line = SlowLink(self.pacs.port, bytes_per_second=400_000, answer_seconds=0.2)
        self.node = Node(
            folder / "node",
            peers=[{"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": self.line.port}],
            rules=[rule("ct", {"Modality": "CT"}, to=["pacs"])],
            dimse={"workers": 1, "journal_mb": JOURNAL_MB},
        )
        self.faults = Faults(folder / "faults")
        self._shim = Shim(library, self.node.data_dir, folder / "trace")
        self.node.environment = self._shim.environment(self.faults)

    def __enter__(self) -> Self:
        self.node.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.faults.disarm()
        if self.node.running:
            self.node.stop()
        self.line.stop()
        self.pacs.stop()

    def run(self, later: Later) -> Result:
        series = make_series("faults")
        self.node.wait(self._alive, WAIT_SECONDS, "every process is ready")
        with Association(self.node.port, contexts=contexts_for(series.items)) as assoc:
            answers = tuple({assoc.store(item) for item in series.items})
        case = later.case
        self.node.wait(lambda: self._at(later.when, series.series_uid), WAIT_SECONDS, f"the node is {later.when}")
        self._shim.forget()
        self.faults.arm(case.op, case.code, match=case.match)
        self.node.wait(lambda: self.faults.fired, WAIT_SECONDS, f"{case} struck")
        self.faults.disarm()
        self._see_it_end(case)
        wrong = []
        # Whoever the fault hit may take a while to end, and be the supervisor: it is looked after to the end.
        self.node.wait(lambda: self._alive() and self._delivered(series.series_uid), 2 * WAIT_SECONDS, "all is stored")
        jobs = [(j["revision"], j["state"]) for j in self.node.jobs(series.series_uid)]
        if jobs != [(1, "done")]:
            wrong.append(f"the jobs are {jobs}")
        made = self.node.deliveries(series.series_uid)
        there = {path.name.partition(".")[2]: path for path in self.pacs.files()}
        for row in made:
            held = self.node.instance(row["SOPInstanceUID"])
            path = there.get(row["SOPInstanceUID"])
            sent = hashlib.sha256(data_set_of(path.read_bytes())).hexdigest() if path else ""
            if held is None or sent != held["dataset_sha256"]:
                wrong.append(f"the {row['kind']} at the peer is not the node's")
        if sorted(r["kind"] for r in made) != KINDS:
            wrong.append("there is not one SEG and one SR")
        return Result(case, True, answers, None, tuple(wrong))

    def _see_it_end(self, case: Case) -> None:
        """A process whose fsync failed must end: what it holds may never reach the disk, whatever it is told later."""
        if case.op is not Op.sync or case.code != errno.EIO:
            return
        hit = self.node.wait(lambda: _hit(self._shim.events()), WAIT_SECONDS, f"{case} is in the trace")
        if not _ignored(hit):
            self.node.wait(lambda: not any(alive(e.pid) for e in hit), WAIT_SECONDS, "the process ends")

    def _alive(self) -> bool:
        """Whether all of it runs; the whole node may have ended, and a supervisor would start it again."""
        if not self.node.running:
            self.node.bury()
            self.node.start(wait=False)
        return self.node.expected() <= self.node.pids().keys()

    def _delivered(self, series_uid: str) -> bool:
        rows = self.node.deliveries(series_uid)
        return len(rows) >= len(KINDS) and all(r["state"] == "stored" for r in rows)

    def _at(self, when: str, series_uid: str) -> bool:
        if when == "analysing":
            return any(j["state"] == "running" for j in self.node.jobs(series_uid))
        return any(d["state"] == "sending" for d in self.node.deliveries(series_uid))

    def activate(self, case: Case) -> list[str]:
        """``models activate`` on a disk that fails for it alone, then on one that works."""
        faults = Faults(self.node.folder / "faults-of-the-verb")
        faults.arm(case.op, case.code, match=case.match)
        argv = [sys.executable, "-m", "dicomnode", "models", "activate", "ct-lung@1.0.0", "--config"]
        environment = {**python_environment(), **self._shim.environment(faults)}
        failed = _run([*argv, str(self.node.config)], environment)
        fired = faults.fired > 0
        faults.disarm()
        wrong = [] if fired else ["the fault did not strike"]
        wrong += [] if failed in (1, EXIT_STORAGE) else [f"models activate ended with {failed}"]
        if _run([*argv, str(self.node.config)], environment) != 0:
            wrong.append("models activate does not work afterwards")
        return wrong


def _run(argv: Sequence[str], environment: dict[str, str]) -> int:
    done = subprocess.run(
        list(argv), check=False, capture_output=True, cwd=ROOT, timeout=180, env={**os.environ, **environment}
    )
    return done.returncode
