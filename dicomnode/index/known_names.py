"""By what a patient and a study are, or were, known here: none of it leaves in a text of people.

What was received is in the rows of the index. This is what the records say otherwise: the value that serves, the
sides of conflicts, and what went out before, since a text may be older than the last correction.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from dicomnode.index.database import Database

NAMING: Mapping[str, tuple[str, ...]] = {
    "patient": ("PatientID", "PatientName", "PatientBirthDate"),
    "study": ("AccessionNumber", "ReferringPhysicianName", "StudyID"),
}
"""Type of record -> what names somebody in it."""

MOST = 200
"""Versions of one record that are looked at, the newest first."""

_SAID = (
    "SELECT data, common_data AS other FROM records WHERE type = ?1 AND record_id = ?2",
    "SELECT edge_data AS data, cloud_data AS other FROM record_conflicts WHERE type = ?1 AND record_id = ?2"
    " ORDER BY id DESC LIMIT ?3",
    "SELECT data, NULL AS other FROM sync_items WHERE type = ?1 AND record_id = ?2 ORDER BY id DESC LIMIT ?3",
)


def known_names(db: Database, kind: str, name: str) -> set[str]:
    """Values of :data:`NAMING` that a record has or had; empty where there is none."""
    found: set[str] = set()
    for query in _SAID:
        for row in db.rows(query, (kind, name, MOST)[: 3 if "?3" in query else 2]):
            for data in (json.loads(text) for text in row.values() if text):
                found |= {str(data[key]) for key in NAMING[kind] if data.get(key)}
    return found
