"""What pseudonyms stand for: the way back from the cloud, at home only.

A patient's is made of Patient ID and issuer and stays what it is. Its original is a text for people, ``ID`` or
``ID^ISSUER``, which may mean two patients (``A^B``); the issuer beside it says which.
"""

from __future__ import annotations

from collections.abc import Mapping

from dicomnode.clock import iso
from dicomnode.index.database import Database, Row
from dicomnode.index.keys import PATIENT_KEYS
from dicomnode.pseudonyms import Pseudonyms, readings

_TOGETHER = 1000
"""Rows of one transaction, for which others wait."""


class PseudonymRows:
    """Rows for patients, studies, series and results that left.

    UIDs of source images have none: with the key they are found by computing, and there are hundreds
    to each result.
    """

    def __init__(self, db: Database) -> None:
        self.db = db

    def keep(self, mapping: Mapping[tuple[str, str], str], codec: Pseudonyms | None = None) -> None:
        """``mapping``: (kind, pseudonym) -> original; what is known stays. ``codec`` made the pseudonyms."""
        moment = iso(self.db.clock.wall())
        with self.db.transaction():
            for (kind, pseudonym), original in mapping.items():
                row: Row = {"pseudonym": pseudonym, "kind": kind, "original": original, "created_time": moment}
                row["issuer"] = _issuer(pseudonym, original, codec) if kind == "patient" else None
                self.db.insert("pseudonyms", row, conflict="OR IGNORE")

    def tell_apart(self, codec: Pseudonyms) -> None:
        """Note the issuers of those that an earlier version kept without; of one of another key it stays unknown."""
        rows = self.db.rows("SELECT pseudonym, original FROM pseudonyms WHERE kind = 'patient' AND issuer IS NULL")
        found = [(codec.issuer(r["pseudonym"], r["original"]), r["pseudonym"]) for r in rows]
        known = [one for one in found if one[0] is not None]
        for begin in range(0, len(known), _TOGETHER):
            with self.db.transaction():
                for one in known[begin : begin + _TOGETHER]:
                    self.db.execute("UPDATE pseudonyms SET issuer = ? WHERE pseudonym = ?", one)

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


def _issuer(pseudonym: str, original: str, codec: Pseudonyms | None) -> str | None:
    if "^" not in original:
        return ""
    return codec.issuer(pseudonym, original) if codec else None


def patient_of(db: Database, original: str, issuer: str | None) -> Row | None:
    """The row of the patient whom a pseudonym stands for: ``id`` and :data:`PATIENT_KEYS`; None where there is none.

    ``issuer`` None: it is not known which part of the original that is. Then it is the patient who is here; where
    two are, it is neither of them, for one's correction must not become the other's.
    """
    number = original.removesuffix(f"^{issuer}") if issuer else original
    pairs = readings(original) if issuer is None else [(number, issuer)]
    rows = (
        db.row(
            f"SELECT id, {', '.join(PATIENT_KEYS)} FROM patients WHERE PatientID = ? AND IssuerOfPatientID = ?", pair
        )
        for pair in pairs
    )
    found = [row for row in rows if row is not None]
    return found[0] if len(found) == 1 else None
