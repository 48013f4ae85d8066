"""Versions of models whose folders are on their way off the disk: said before it is begun, so that it can be ended.

A row is committed first; from then on nobody takes the version up (:meth:`Removals.begun`). Then the folder goes, and
then the row. Who is killed in between, or whose disk refuses, goes on from the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicomnode import durable
from dicomnode.index.database import Database, Row
from dicomnode.index.life import Life
from dicomnode.index.model_space import aside_of
from dicomnode.index.operation import Models


@dataclass(frozen=True, slots=True)
class Removal:
    """``folder``: which one is meant (:func:`dicomnode.durable.mark_of`), since another may take its place."""

    name: str
    version: str
    folder: str
    who: str
    why: str
    automatic: bool = False

    @classmethod
    def of(cls, row: Row) -> Removal:
        known: dict[str, Any] = {key: row[key] for key in cls.__slots__}
        return cls(**{**known, "automatic": bool(row["automatic"])})


class Removals:
    def __init__(self, db: Database) -> None:
        self.db = db

    def folder(self, name: str, version: str) -> Path:
        return self.db.data_dir / "models" / name / version

    def begin(self, name: str, version: str, *, who: str, why: str, automatic: bool = False) -> None:
        """Inside the transaction that finds that nobody needs it; nothing is touched before that has committed."""
        removal = Removal(name, version, durable.mark_of(self.folder(name, version)), who, why, automatic)
        row = {key: getattr(removal, key) for key in removal.__slots__}
        self.db.insert("model_removals", {**row, "automatic": int(removal.automatic)}, conflict="OR REPLACE")

    def begun(self, name: str, version: str) -> bool:
        query = "SELECT 1 FROM model_removals WHERE name = ? AND version = ?"
        return self.db.value(query, (name, version)) is not None

    def open(self) -> list[Removal]:
        return [Removal.of(r) for r in self.db.rows("SELECT * FROM model_removals ORDER BY name, version")]

    def finish(self, removal: Removal) -> bool:
        """Whether it is gone now; False where another folder stands in its place, or somebody else ended it.

        Raises StorageError where the disk refuses; then it stays begun.
        """
        folder = self.folder(removal.name, removal.version)
        mark, aside = durable.mark_of(folder), None
        if mark and mark != removal.folder:  # put there since
            return self._end(removal, removed=False)
        if mark:
            aside = durable.set_aside(folder, aside_of(self.db.data_dir))
        elif folder.parent.is_dir():
            durable.sync_directory(folder.parent)  # who set it aside may not have lived to do it
        ended = self._end(removal, removed=True)
        if aside is not None:
            durable.remove_tree(aside)
        return ended

    def _end(self, removal: Removal, *, removed: bool) -> bool:
        """Its folder is not there any more; ``removed``: it went, and no other one was put in its place.

        False where somebody else has ended it.
        """
        one = (removal.name, removal.version)
        with self.db.transaction():
            if not self.begun(*one):
                return False
            self.db.execute("DELETE FROM model_removals WHERE name = ? AND version = ?", one)
            Models(self.db).gone(*one)  # what stands there now was not pulled: nobody could fetch it again
            if removed:
                who = {"who": removal.who, "why": removal.why}
                Life(self.db).removed(*one, **who, automatic=removal.automatic)
        return removed
