"""Gives acknowledged objects of the journal their files and rows, in order, several in one commit.

One thread for each receiver process. It works while the senders prepare what comes next; who
must see the result (a release, a query on the same association) waits for it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dicomnode import durable
from dicomnode.durable import ObjectStore
from dicomnode.index.catalogue import Catalogue, NewInstance, Stored
from dicomnode.receive.journal import Buffer, Entry
from dicomnode.receive.retire import Retirer

MOST_BYTES = 16 * 1024 * 1024
"""Acknowledged bytes that may wait; a sender that is faster waits for its answer."""

MAX_BATCH = 64


@dataclass(slots=True)
class Acknowledged:
    """An object whose journal record is durable. ``done`` is called once it has its row."""

    entry: Entry
    buffer: Buffer
    meta: bytes
    instance: NewInstance
    done: Callable[[], None]
    applied: threading.Event = field(default_factory=threading.Event)


class Applier:
    """``on_commit`` is called after each commit. An error ends the process: the journal has the objects."""

    def __init__(
        self, store: ObjectStore, catalogue: Catalogue, retirer: Retirer, on_commit: Callable[[], None]
    ) -> None:
        self._store = store
        self._catalogue = catalogue
        self._retirer = retirer
        self._on_commit = on_commit
        self._changed = threading.Condition()
        self._waiting: list[Acknowledged] = []
        self._bytes = 0
        self._closing = False
        self._last: Acknowledged | None = None
        self._thread = threading.Thread(target=self._run, name="apply", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def put(self, item: Acknowledged) -> None:
        with self._changed:
            self._last = item
            self._waiting.append(item)
            self._bytes += item.buffer.size
            self._changed.notify_all()

    def wait_for_room(self) -> None:
        """Call before an object is acknowledged."""
        with self._changed:
            self._changed.wait_for(lambda: self._bytes <= MOST_BYTES)

    def catch_up(self) -> None:
        """Return when all that was put has its row: what takes another way must not overtake it."""
        last = self._last
        if last is not None:
            last.applied.wait()

    def refuse(self, entry: Entry) -> None:
        """A record that was reserved will not be acknowledged; without this the ring would end before it."""
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
                    self._changed.wait_for(lambda: self._waiting or self._closing)
                    batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
                if not batch:
                    return
                self._apply(batch)
                with self._changed:
                    self._bytes -= sum(item.buffer.size for item in batch)
                    self._changed.notify_all()
                for item in batch:
                    item.done()
                    item.applied.set()
                self._on_commit()

    def _apply(self, batch: Sequence[Acknowledged]) -> None:
        for item in batch:
            self._store.stage(item.instance.file, [item.meta, item.buffer.data_set], sync=False)
        outcomes = self._catalogue.commit([item.instance for item in batch], sync=False)
        for item, outcome in zip(batch, outcomes, strict=True):
            name = item.instance.file
            if outcome is Stored.duplicate:
                # Whoever wrote the file that serves may not have lived to make it durable.
                durable.remove(self._store.path(name))
                name = self._catalogue.file_of(item.instance.attributes["SOPInstanceUID"])
            self._retirer.settled(item.entry, name)
