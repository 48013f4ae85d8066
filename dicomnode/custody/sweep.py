"""Removes files that no row names: left by a crash between writing and committing.

Such a file was never acknowledged. It is removed only after it was seen without a row
twice, an hour of node time apart, so neither a slow commit nor a jump of the wall clock can
cost an object.
"""

from __future__ import annotations

from pathlib import Path

from dicomnode import durable
from dicomnode.durable import ObjectStore
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database

GRACE_SECONDS = 3600.0


class Sweeper:
    """Looks at one of the 256 folders per call, so that a large store costs little at a time."""

    def __init__(self, db: Database, store: ObjectStore) -> None:
        self._db = db
        self._catalogue = Catalogue(db)
        self._folders = list(store.folders())
        self._next = 0
        self._suspects: dict[Path, float] = {}

    def run_once(self) -> int:
        """Look at the next folder; returns how many files were removed."""
        folder = self._folders[self._next]
        self._next = (self._next + 1) % len(self._folders)
        present = {entry for entry in folder.iterdir()} if folder.is_dir() else set()
        if not present:
            return 0
        named = self._catalogue.files_in(folder.name)
        strays = {entry for entry in present if f"{folder.name}/{entry.name}" not in named}
        now = self._db.clock.ticks()
        for known in [p for p in self._suspects if p.parent == folder and p not in strays]:
            del self._suspects[known]
        removed = 0
        for stray in strays:
            first_seen = self._suspects.setdefault(stray, now)
            if now - first_seen >= GRACE_SECONDS:
                durable.remove(stray)
                del self._suspects[stray]
                removed += 1
        return removed
