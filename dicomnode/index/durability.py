"""For which instances this node accepts responsibility: a committed row, and its bytes read back.

A modality may delete what was committed to, so rows alone do not do. Each file is read once
and compared with the SHA-256 of what came: that finds a lost write or bit rot while the sender
still has the object, and costs about a second per gigabyte. It is done after the response to
the N-ACTION, so nobody waits for it. That an object is in the intake journal, not yet under
barriers of its own, does not matter: it survives a power cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from dicomnode import durable
from dicomnode.commitment import Reference, Verdict, contradictory, storable, verdict_of
from dicomnode.durable import ObjectStore
from dicomnode.index.database import Database, Row

LATE_SECONDS = 3.0
"""An object is acknowledged a moment before its row is there, in a burst of small ones a second."""

LOOK_SECONDS = 0.05
_IN_ONE_QUERY = 500

Pause = Callable[[float], bool]
"""Waits that many seconds; False when the judgement is not wanted any more."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """``verdicts`` in the order of the references; ``damaged`` objects are held but not intact."""

    verdicts: tuple[int, ...]
    damaged: int


class Durability:
    def __init__(self, db: Database, store: ObjectStore) -> None:
        self._db = db
        self._store = store

    def judge(self, references: Sequence[Reference], pause: Pause) -> Judgement | None:
        """Read back what is held; None when ``pause`` said so. ``pause(0)`` is called before each file."""
        held = self._held(r.SOPInstanceUID for r in references)
        for _ in range(round(LATE_SECONDS / LOOK_SECONDS)):
            missing = [r.SOPInstanceUID for r in references if r.SOPInstanceUID not in held and storable(r.SOPClassUID)]
            if not missing:
                break
            if not pause(LOOK_SECONDS):
                return None
            held |= self._held(missing)
        twisted = contradictory(references)
        verdicts: list[int] = []
        damaged = 0
        for reference in references:
            if not pause(0.0):
                return None
            row = held.get(reference.SOPInstanceUID)
            if reference.SOPInstanceUID in twisted and row is not None:
                verdicts.append(Verdict.class_instance_conflict)
                continue
            intact: bool | None = None
            if row is not None and row["SOPClassUID"] == reference.SOPClassUID:
                intact = self._intact(row)
                damaged += not intact
            verdicts.append(verdict_of(reference, None if row is None else row["SOPClassUID"], intact))
        return Judgement(tuple(int(v) for v in verdicts), damaged)

    def _held(self, uids: Iterable[str]) -> dict[str, Row]:
        wanted = list(dict.fromkeys(uids))
        found: dict[str, Row] = {}
        for start in range(0, len(wanted), _IN_ONE_QUERY):
            part = wanted[start : start + _IN_ONE_QUERY]
            marks = ", ".join("?" * len(part))
            for row in self._db.rows(
                "SELECT SOPInstanceUID, SOPClassUID, file, size, sha256 FROM instances"
                f" WHERE SOPInstanceUID IN ({marks})",
                part,
            ):
                found[str(row["SOPInstanceUID"])] = row
        return found

    def _intact(self, row: Row) -> bool | None:
        """Whether the bytes are what the row says; None when they cannot be read now."""
        try:
            whole = self._whole(row)
        except OSError:
            return None
        if whole:
            return True
        uid = str(row["SOPInstanceUID"])
        newer = self._held([uid]).get(uid)
        if newer is not None and newer["file"] != row["file"]:  # replaced meanwhile
            try:
                return self._whole(newer)
            except OSError:
                return None
        self._let_replace(row)
        return False

    def _whole(self, row: Row) -> bool:
        path = self._store.path(row["file"])
        try:
            if path.stat().st_size != row["size"]:
                return False
            return durable.object_intact(path, str(row["sha256"]))
        except FileNotFoundError:
            return False

    def _let_replace(self, row: Row) -> None:
        """The next copy of this object must not count as one that is here already."""
        with self._db.transaction():
            self._db.execute(
                "UPDATE instances SET dataset_sha256 = '' WHERE SOPInstanceUID = ? AND sha256 = ? AND file = ?",
                (row["SOPInstanceUID"], row["sha256"], row["file"]),
            )
