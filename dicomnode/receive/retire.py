"""Makes files and rows of journalled objects durable by themselves, many at a time.

Order: fsync each file, fsync their folders, commit how far the journal is retired (with
synchronous FULL, so that every row before it is durable too), only then free the records.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from dicomnode import durable, logs
from dicomnode.durable import ObjectStore, SyncFailed
from dicomnode.errors import NodeError
from dicomnode.index.journals import Journals
from dicomnode.receive.journal import Entry, Journal

QUIET_SECONDS = 0.5
"""Records are retired when nothing has come for this long: barriers do not stand in the way of a burst."""

OLDEST_SECONDS = 5.0
"""... or when the oldest has waited this long,"""

FULL_ENOUGH = 0.5
"""... or when this part of the ring is held."""

SYNC_THREADS = 4
"""Objects that are made durable side by side."""

MOST_KNOWN = 16384

RETRY_SECONDS = 5.0
"""Pause after an attempt that failed, however full the ring: a full disk must not be written full of log lines."""


@dataclass(frozen=True, slots=True)
class _Settled:
    entry: Entry
    file: str


class Retirer:
    """One for each journal, with a thread of its own."""

    def __init__(self, journal: Journal, journals: Journals, store: ObjectStore) -> None:
        self._journal = journal
        self._journals = journals
        self._store = store
        self._log = logs.get()
        self._changed = threading.Condition()
        self._settled: dict[int, _Settled] = {}
        self._next = 0
        self._oldest_at = self._newest_at = self._retry_at = 0.0
        self._closing = False
        self._durable: set[str] = set()
        """Files that this process has made durable; an object that is sent again needs no second fsync."""
        self._pool = ThreadPoolExecutor(SYNC_THREADS, thread_name_prefix="sync")
        self._thread = threading.Thread(target=self._run, name="retire", daemon=True)

    def start(self, first: int) -> None:
        """``first`` is the number that the next record will get."""
        self._next = first
        self._thread.start()

    def settled(self, entry: Entry, file: str) -> None:
        """A record's object has its file (relative name) and row; or, with ``""``, it was refused."""
        with self._changed:
            self._newest_at = time.monotonic()
            if not self._settled:
                self._oldest_at = self._newest_at
            self._settled[entry.number] = _Settled(entry, file)
            if len(self._settled) == 1 or self._journal.used() > FULL_ENOUGH:
                self._changed.notify()

    def close(self) -> None:
        """Retire all that is settled and stop."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join()
        self._pool.shutdown()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._due():
                    if self._closing and self._next not in self._settled:
                        return
                    self._changed.wait(self._wait_seconds())
                batch = self._prefix()
            try:
                self._retire(batch)
            except SyncFailed as error:
                durable.die(error)
            except Exception as error:  # noqa: BLE001 without this thread the ring would fill for good
                text = str(error) if isinstance(error, NodeError) else type(error).__name__
                self._log.error("journal not retired, trying again", error=text)
                if self._closing:
                    return
                self._give_back(batch)

    def _due(self) -> bool:
        if self._next not in self._settled:
            return False
        now = time.monotonic()
        due = self._journal.used() > FULL_ENOUGH or now - self._oldest_at >= OLDEST_SECONDS
        return self._closing or (due and now >= self._retry_at)

    def _wait_seconds(self) -> float | None:
        if not self._settled:
            return None
        now = time.monotonic()
        return max(0.01, OLDEST_SECONDS - (now - self._oldest_at), self._retry_at - now)

    def _prefix(self) -> list[_Settled]:
        """What is settled without a gap: a number says that all before it are retired."""
        batch = []
        while self._next in self._settled:
            batch.append(self._settled.pop(self._next))
            self._next += 1
        self._oldest_at = time.monotonic()
        return batch

    def _give_back(self, batch: list[_Settled]) -> None:
        with self._changed:
            self._settled |= {s.entry.number: s for s in batch}
            self._next = batch[0].entry.number
            self._retry_at = time.monotonic() + RETRY_SECONDS

    def _retire(self, batch: list[_Settled]) -> None:
        names = {s.file for s in batch} - self._durable - {""}
        self._store.sync(sorted(names), self._pool)
        if len(self._durable) > MOST_KNOWN:
            self._durable.clear()
        self._durable |= names
        self._journals.retire(self._journal.mark, batch[-1].entry.number)
        for settled in batch:
            self._journal.release(settled.entry.place)
        self._journals.db.checkpoint()
