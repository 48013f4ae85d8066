"""What pseudonyms stand for: the way back from the cloud, at home only."""

from __future__ import annotations

from collections.abc import Mapping

from dicomnode.clock import iso
from dicomnode.index.database import Database, Row


class PseudonymRows:
    """Rows for patients, studies, series and results that left.

    UIDs of source images have none: with the key they are found by computing, and there are hundreds
    to each result.
    """

    def __init__(self, db: Database) -> None:
        self.db = db

    def keep(self, mapping: Mapping[tuple[str, str], str]) -> None:
        """``mapping``: (kind, pseudonym) -> original; what is known stays."""
        moment = iso(self.db.clock.wall())
        with self.db.transaction():
            for (kind, pseudonym), original in mapping.items():
                row = {"pseudonym": pseudonym, "kind": kind, "original": original, "created_time": moment}
                self.db.insert("pseudonyms", row, conflict="OR IGNORE")

    def find(self, value: str) -> list[Row]:
        """Rows of a pseudonym, or of an original."""
        return self.db.rows("SELECT * FROM pseudonyms WHERE pseudonym = ? OR original = ? LIMIT 100", (value, value))

    @property
    def used(self) -> bool:
        return self.db.row("SELECT 1 AS one FROM pseudonyms LIMIT 1") is not None

    def source_uids(self, study: str) -> list[str]:
        """SOPInstanceUIDs of all that is held of a study, for a search by computing."""
        return [
            str(r["SOPInstanceUID"])
            for r in self.db.rows(
                "SELECT i.SOPInstanceUID FROM instances i JOIN series se ON se.id = i.series_id"
                " JOIN studies st ON st.id = se.study_id WHERE st.StudyInstanceUID = ?",
                (study,),
            )
        ]
