"""Gives acknowledged objects of the journal their files and rows, in order, several in one commit.

One thread for each receiver process. While objects come in it rests, so that senders have both
processor and interpreter; it works when nothing has come for a moment, when much is waiting or
something waits for long, or when somebody wants to see the result
(:mod:`dicomnode.receive.progress`). What it needs is in the journal, so waiting costs no memory.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from dicomnode import durable
from dicomnode.durable import ObjectStore
from dicomnode.header import Wanted
from dicomnode.index.catalogue import Catalogue, NewInstance, Stored
from dicomnode.receive.journal import Entry, Journal, padded
from dicomnode.receive.progress import Progress
from dicomnode.receive.record import Fields, describe
from dicomnode.receive.retire import Retirer

QUIET_SECONDS = 0.01
"""Nothing has come for this long: there is time."""

LONGEST_SECONDS = 5.0
"""Something waits for this long: it is done between the objects that come."""

MUCH = 0.45
"""Part of the ring whose objects may wait while more come in."""

TOO_MUCH = 0.7
"""... beyond which a sender waits for its answer."""

MANY, TOO_MANY = 4096, 16384
"""The same in objects."""

MAX_BATCH = 32


class Acknowledged(NamedTuple):
    """An object whose journal record is durable."""

    entry: Entry
    fields: Fields


Work = Acknowledged | Callable[[], None]


class Applier:
    """``on_commit`` is called after each commit. An error ends the process: the journal has the objects."""

    def __init__(
        self,
        journal: Journal,
        store: ObjectStore,
        catalogue: Catalogue,
        retirer: Retirer,
        progress: Progress,
        wanted: Wanted,
        on_commit: Callable[[], None],
    ) -> None:
        self._journal = journal
        self._store = store
        self._catalogue = catalogue
        self._retirer = retirer
        self._progress = progress
        self._wanted = wanted
        self._on_commit = on_commit
        self._changed = threading.Condition()
        self._waiting: deque[tuple[float, Work]] = deque()
        """With the time at which each came."""
        self._bytes = 0
        self._acknowledged = self._applied = 0
        self._newest_at = 0.0
        self._hurry = 0
        self._rests = False
        self._closing = False
        self._memory = bytearray()
        self._thread = threading.Thread(target=self._run, name="apply", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, item: Acknowledged) -> None:
        """Call before the answer is sent: who knows of the answer may ask for the object."""
        with self._changed:
            self._acknowledged += 1
            self._progress.acknowledged = self._acknowledged
            self._bytes += padded(item.entry.size)
            self._add(item)

    def then(self, call: Callable[[], None]) -> None:
        """Have something done when all that was put before has its row; at once where nothing waits."""
        with self._changed:
            if self._applied < self._acknowledged or self._waiting:
                self._add(call)
                return
        call()

    def _add(self, work: Work) -> None:
        self._newest_at = time.monotonic()
        self._waiting.append((self._newest_at, work))
        if self._rests:
            self._rests = False
            self._changed.notify_all()

    @property
    def waiting_bytes(self) -> int:
        """Room that the files of what is acknowledged will take."""
        return self._bytes

    def wait_for_room(self) -> None:
        """Call before an object is acknowledged."""
        if self._bytes > TOO_MUCH * self._journal.size or len(self._waiting) > TOO_MANY:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._bytes <= TOO_MUCH * self._journal.size and len(self._waiting) <= TOO_MANY
                )

    def catch_up(self) -> None:
        """Return when all that was put has its row: what takes another way must not overtake it."""
        with self._changed:
            target = self._acknowledged
            self._hurry = max(self._hurry, target)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._applied >= target)

    def refuse(self, entry: Entry) -> None:
        """A record that was numbered will not be acknowledged; without this the ring would end before it."""
        self._retirer.settled(entry, "")

    def close(self) -> None:
        """Apply what waits, and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        try:
            self._apply_all()
        except Exception as error:  # noqa: BLE001 whatever it is, the objects are acknowledged
            durable.die(error)

    def _apply_all(self) -> None:
        with self._catalogue.db.session():
            while True:
                with self._changed:
                    while not self._due():
                        self._rest()
                    batch = [self._waiting.popleft()[1] for _ in range(min(MAX_BATCH, len(self._waiting)))]
                if not batch:
                    return
                self._work(batch)

    def _rest(self) -> None:
        """A sender does not wake it for each object: it looks by itself while something waits."""
        if self._waiting:
            self._changed.wait(QUIET_SECONDS)
        else:
            self._rests = True
            self._changed.wait()

    def _due(self) -> bool:
        if self._closing:
            return True
        if not self._waiting:
            return False
        now = time.monotonic()
        return (
            now - self._newest_at >= QUIET_SECONDS
            or now - self._waiting[0][0] >= LONGEST_SECONDS
            or self._bytes > MUCH * self._journal.size
            or len(self._waiting) > MANY
            or max(self._hurry, self._progress.wanted) > self._applied
        )

    def _work(self, batch: Sequence[Work]) -> None:
        """Objects in one commit; a call waits for those before it."""
        objects: list[Acknowledged] = []
        for work in batch:
            if isinstance(work, Acknowledged):
                objects.append(work)
            else:
                self._apply(objects)
                objects = []
                work()
        self._apply(objects)

    def _apply(self, objects: Sequence[Acknowledged]) -> None:
        if not objects:
            return
        instances = [self._make_file(item) for item in objects]
        outcomes = self._catalogue.commit(instances, sync=False)
        for item, instance, outcome in zip(objects, instances, outcomes, strict=True):
            name = instance.file
            if outcome is Stored.duplicate:
                # Whoever wrote the file that serves may not have lived to make it durable.
                durable.remove(self._store.path(name))
                name = self._catalogue.file_of(instance.attributes["SOPInstanceUID"])
            self._retirer.settled(item.entry, name)
        with self._changed:
            self._bytes -= sum(padded(item.entry.size) for item in objects)
            self._applied += len(objects)
            self._progress.applied = self._applied
            self._changed.notify_all()
        self._on_commit()

    def _make_file(self, item: Acknowledged) -> NewInstance:
        if len(self._memory) < item.entry.size:
            self._memory = bytearray(item.entry.size)
        data_set = self._journal.read(item.entry, memoryview(self._memory))
        described = describe(item.fields, data_set, self._wanted)
        name = self._store.new_name(described.attributes["SeriesInstanceUID"])
        self._store.stage(name, [described.meta, data_set], sync=False)
        return described.instance(item.fields, name)
