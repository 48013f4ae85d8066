"""Clears away files that no row names: left by a crash between writing and committing.

Such a file was never acknowledged, unless the index was lost or restored from a backup. So
only what has not got its name yet (``.part``) is deleted; a whole object is put aside into
``<data_dir>/strays``, and only after it was seen without a row twice, an hour of node time
apart, so neither a slow commit nor a jump of the wall clock can cost an object.
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
        self._aside = store.root.parent / "strays"

    def run_once(self) -> int:
        """Look at the next folder; returns how many files were cleared away."""
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
                self._clear(stray)
                del self._suspects[stray]
                removed += 1
        return removed

    def _clear(self, stray: Path) -> None:
        if stray.suffix == durable.TEMPORARY_SUFFIX:
            durable.remove(stray)
            return
        durable.make_directory(self._aside)
        durable.rename_into_place(stray, self._aside / stray.name)
        durable.sync_directory(self._aside)
