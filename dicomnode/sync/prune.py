"""Pulled versions that nobody needs any more leave the disk: atomically, told, and never one that could serve.

That a version goes is committed first, in the transaction that finds that nothing names it; from then on nobody takes
it up. Then its folder is renamed out of ``models`` and deleted. A process that is killed in between, or a disk that
refuses, leaves the row, with which the next look or start goes on, and maybe a folder in ``staging/removed``, where
nothing looks for bundles, and which the next start deletes. Where the commit fails nothing has been touched.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable

from dicomnode import durable, logs
from dicomnode.errors import StorageError
from dicomnode.index.database import Database
from dicomnode.index.desired import DesiredStates, ServingRules
from dicomnode.index.life import Life
from dicomnode.index.model_space import Version, aside_of, fetched_again, named_by_jobs, removable
from dicomnode.index.operation import Events, Models
from dicomnode.index.removals import Removal, Removals
from dicomnode.settings import Settings
from dicomnode.sync.pull import SYNC

MEBIBYTE = 1 << 20
HERE = ("placed", "activated")


class Pruner:
    def __init__(self, settings: Settings, db: Database) -> None:
        self._settings, self._db = settings, db
        self._models, self._life, self._removals = Models(db), Life(db), Removals(db)
        self._rules = ServingRules(settings, db, tell=False)
        self._data_dir = settings.node.data_dir
        self._log = logs.get()

    def start(self) -> None:
        """Finish what a former life was killed in; a disk that refuses is asked again with the next look."""
        with contextlib.suppress(StorageError):
            self._finish()
        aside = aside_of(self._data_dir)
        for left in aside.iterdir() if aside.is_dir() else ():
            durable.remove_tree(left)

    async def run_once(self) -> int:
        """How many versions were removed."""
        return await asyncio.to_thread(self._look)

    def _look(self) -> int:
        for version in self._idle():
            self._begin(version)
        return self._finish()

    def _idle(self) -> list[Version]:
        pulled = {(str(p["name"]), str(p["version"])) for p in self._models.pulls() if p["state"] in HERE}
        keep = self._settings.cloud.keep_retired
        now = self._db.clock.ticks()
        return removable(self._life.versions(), pulled, self._named(), keep=keep, now=now)

    def _named(self) -> set[Version]:
        """By jobs, and by people: in rules, in [[cloud.models]], in what the cloud desires."""
        active = self._models.active()
        found = named_by_jobs(self._db) | set(active.items()) | {way for n in active if (way := self._way_back(n))}
        rules = [*self._settings.rules, *self._rules()]
        found |= set(_pins(reference for rule in rules for reference in rule.every_model))
        found |= {(entry.name, entry.version) for entry in self._settings.cloud.models if entry.version}
        desired = DesiredStates(self._db).serving()
        wanted = desired["state"].get("models") if desired else None
        return found | {(str(n), str(v)) for n, v in (wanted or {}).items()}

    def _way_back(self, name: str) -> Version | None:
        """What a roll-back would return to, where the version before the active one is not on the disk any more."""
        places = (self._data_dir / "models" / name, self._settings.inference.models_dir / name)
        served = self._life.served_before(name)
        return next(((name, v) for v in served if any((place / v).is_dir() for place in places)), None)

    def _begin(self, which: Version) -> None:
        why = f"retired and named by nobody (cloud.keep_retired = {self._settings.cloud.keep_retired})"
        with self._db.transaction():
            if which in self._idle():
                self._removals.begin(*which, who=SYNC, why=why, automatic=True)

    def _finish(self) -> int:
        """How many are gone. Raises StorageError where the disk refuses one, behind the others."""
        done, refused = 0, None
        for removal in self._removals.open():
            size = durable.size_of(self._removals.folder(removal.name, removal.version))
            try:
                ended = self._removals.finish(removal)
            except StorageError as error:
                refused = error
                continue
            if ended:
                done += 1
                self._tell(removal, size)
        if refused is not None:
            raise refused
        return done

    def _tell(self, removal: Removal, size: int) -> None:
        which = (removal.name, removal.version)
        back = f"To have it back: {fetched_again(*which)}"
        text = f"its folder was removed, {size / MEBIBYTE:.1f} MiB: {removal.why}. {back}"
        Events(self._db).add("info", "model-removed", "@".join(which), text)
        self._log.info("model removed", model=removal.name, version=removal.version, bytes=size)


def _pins(references: Iterable[str]) -> Iterable[Version]:
    for reference in references:
        name, _, version = reference.partition("@")
        if version:
            yield name, version
