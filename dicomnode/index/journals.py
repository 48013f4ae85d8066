"""How far each intake journal is retired: up to there files and rows are durable by themselves."""

from __future__ import annotations

from dicomnode.index.database import Database


class Journals:
    def __init__(self, db: Database) -> None:
        self.db = db

    def retired(self, mark: str) -> int:
        """Number of the last record of journal ``mark`` that is not needed any more."""
        return int(self.db.value("SELECT retired FROM journals WHERE mark = ?", (mark,)) or 0)

    def retire(self, mark: str, number: int) -> None:
        """Record it durably; with it all that was committed before becomes durable too."""
        with self.db.transaction():
            self.db.insert("journals", {"mark": mark, "retired": number}, conflict="OR REPLACE")
