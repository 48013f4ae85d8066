"""Group commit: the associations of a process share directory barriers and index commits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from dicomnode import durable
from dicomnode.durable import ObjectStore, SyncFailed
from dicomnode.errors import StorageError
from dicomnode.index.catalogue import Catalogue, NewInstance, Stored

MAX_BATCH = 256


@dataclass(slots=True)
class _Ticket:
    instance: NewInstance
    turn: threading.Event = field(default_factory=threading.Event)
    leads: bool = False
    outcome: Stored | None = None
    error: BaseException | None = None


class Committer:
    """Who comes first commits for all that wait by then; a lone association changes no thread.

    ``on_commit`` is called after each commit, by the thread that made it.
    """

    def __init__(self, store: ObjectStore, catalogue: Catalogue, on_commit: Callable[[], None]) -> None:
        self._store = store
        self._catalogue = catalogue
        self._on_commit = on_commit
        self._session = catalogue.db.session()
        self._lock = threading.Lock()
        self._waiting: list[_Ticket] = []
        self._led = False

    def commit(self, instance: NewInstance) -> Stored:
        """Block until the row and its file's name are durable. Raises StorageError when they could not be."""
        ticket = _Ticket(instance)
        with self._lock:
            self._waiting.append(ticket)
            if not self._led:
                self._led = ticket.leads = True
        if not ticket.leads:
            ticket.turn.wait()
        if ticket.leads:
            self._lead()
        if ticket.error is not None:
            raise ticket.error
        if ticket.outcome is None:
            raise StorageError("commit to the index", "the commit ended without an outcome")
        return ticket.outcome

    def file_of(self, sop_instance_uid: str) -> str:
        return self._catalogue.file_of(sop_instance_uid)

    def ticks(self) -> float:
        """Node time; of what is acknowledged before its commit, the order."""
        return self._catalogue.db.clock.ticks()

    def close(self) -> None:
        """When nobody commits any more."""
        self._session.close()

    def _lead(self) -> None:
        """Commit a batch (the leader's ticket is in it), then let the next one lead."""
        with self._lock:
            batch, self._waiting = self._waiting[:MAX_BATCH], self._waiting[MAX_BATCH:]
        self._commit(batch)
        with self._lock:
            successor = self._waiting[0] if self._waiting else None
            self._led = successor is not None
        for ticket in batch:
            if not ticket.leads:
                ticket.turn.set()
        if successor is not None:
            successor.leads = True
            successor.turn.set()

    def _commit(self, batch: list[_Ticket]) -> None:
        try:
            for folder in {self._store.path(t.instance.file).parent for t in batch}:
                durable.sync_directory(folder)
            with self._session:
                outcomes = self._catalogue.commit([t.instance for t in batch])
        except SyncFailed as error:
            durable.die(error)
        except Exception as error:  # noqa: BLE001 each waiting association must learn of it, whatever it is
            for ticket in batch:
                ticket.error = error
            return
        for ticket, outcome in zip(batch, outcomes, strict=True):
            ticket.outcome = outcome
        self._on_commit()
