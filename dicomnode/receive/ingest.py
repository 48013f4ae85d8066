"""C-STORE: bytes as received -> durable file -> committed row -> status.

The order is the acknowledgement contract of ARCHITECTURE.md: fsync file, name in place,
fsync directory, index row committed, then 0x0000. The directory barrier and the commit are
shared by all associations that wait at that moment (group commit).
"""

from __future__ import annotations

import hashlib
import queue
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from dicomnode import durable
from dicomnode.durable import ObjectStore, SyncFailed
from dicomnode.errors import DiskFull, MalformedDataSet, NodeError, StorageError
from dicomnode.header import Wanted, read_header
from dicomnode.index.catalogue import Catalogue, NewInstance, Stored
from dicomnode.receive.part10 import file_meta

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
DATA_SET_MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
"""Statuses of the Storage Service Class, PS3.4 table B.2-1."""

PROCESSING_FAILURE = 0x0110
"""PS3.7 C.5.12: a fault of ours, not of the object."""

MAX_BATCH = 256
_UID = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """One C-STORE-RQ: command fields, negotiated transfer syntax and the data set as received."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    data_set: bytes | memoryview
    calling_ae: str
    association_id: str


@dataclass(frozen=True, slots=True)
class StoreAnswer:
    """Status to answer with; ``cause`` is for the log and free of patient data."""

    status: int
    cause: str = ""
    hint: str = ""


def check_header(request: StoreRequest, attributes: dict[str, str]) -> StoreAnswer | None:
    """Why an object cannot be stored, or None. Pure.

    The UIDs of command and data set must agree (PS3.4 B.2.3: A9xx when they do not).
    """
    for keyword in ("SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "SOPClassUID"):
        value = attributes.get(keyword, "")
        if not value:
            return StoreAnswer(DATA_SET_MISMATCH, f"{keyword} is missing or empty", "Mend the object at its sender")
        if not _UID.fullmatch(value):
            return StoreAnswer(DATA_SET_MISMATCH, f"{keyword} is not a UID", "Mend the object at its sender")
    if attributes["SOPInstanceUID"] != request.sop_instance_uid:
        return StoreAnswer(DATA_SET_MISMATCH, "SOPInstanceUID differs between command and data set")
    if attributes["SOPClassUID"] != request.sop_class_uid:
        return StoreAnswer(DATA_SET_MISMATCH, "SOPClassUID differs between command and data set")
    return None


class Committer:
    """Shares directory barriers and commits between the associations of this process."""

    def __init__(self, store: ObjectStore, catalogue: Catalogue, on_commit: Callable[[], None]) -> None:
        self._store = store
        self._catalogue = catalogue
        self._on_commit = on_commit
        self._waiting: queue.SimpleQueue[tuple[NewInstance, Future[Stored]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="committer", daemon=True)
        self._thread.start()

    def commit(self, instance: NewInstance) -> Stored:
        """Block until the row is durable. Raises StorageError when it could not be."""
        future: Future[Stored] = Future()
        self._waiting.put((instance, future))
        return future.result()

    def close(self) -> None:
        self._waiting.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while True:
            first = self._waiting.get()
            if first is None:
                return
            batch = [first]
            while len(batch) < MAX_BATCH:
                try:
                    item = self._waiting.get_nowait()
                except queue.Empty:
                    break
                if item is None:
                    self._waiting.put(None)
                    break
                batch.append(item)
            self._commit(batch)

    def _commit(self, batch: list[tuple[NewInstance, Future[Stored]]]) -> None:
        try:
            for folder in {self._store.path(instance.file).parent for instance, _ in batch}:
                durable.sync_directory(folder)
            outcomes = self._catalogue.commit([instance for instance, _ in batch])
        except SyncFailed as error:
            durable.die(error)
        except Exception as error:  # noqa: BLE001 the waiting associations must learn of it, whatever it is
            for _, future in batch:
                future.set_exception(error)
            return
        for (_, future), outcome in zip(batch, outcomes, strict=True):
            future.set_result(outcome)
        self._on_commit()


class Ingest:
    """Handles C-STORE requests; one per process, used by all its associations."""

    def __init__(self, store: ObjectStore, committer: Committer, wanted: Wanted, *, reserve_bytes: int) -> None:
        self._store = store
        self._committer = committer
        self._wanted = wanted
        self._reserve = reserve_bytes

    def store(self, request: StoreRequest) -> StoreAnswer:
        """Store one object; the answer is success only when it survives a power cut."""
        try:
            return self._store_checked(request)
        except MalformedDataSet as error:
            return StoreAnswer(CANNOT_UNDERSTAND, error.cause, error.hint)
        except SyncFailed as error:
            durable.die(error)
        except StorageError as error:
            return StoreAnswer(OUT_OF_RESOURCES, f"{error.operation}: {error.cause}", error.hint)

    def _store_checked(self, request: StoreRequest) -> StoreAnswer:
        if not _UID.fullmatch(request.sop_instance_uid) or not _UID.fullmatch(request.sop_class_uid):
            return StoreAnswer(DATA_SET_MISMATCH, "a UID of the command is not a UID", "Mend the object at its sender")
        size = len(request.data_set)
        if durable.free_bytes(self._store.root) - size < self._reserve:
            raise DiskFull("store object", "free space is at the reserve", "Free space on the volume of node.data_dir")
        attributes = read_header(request.data_set, request.transfer_syntax_uid, self._wanted)
        wrong = check_header(request, attributes)
        if wrong is not None:
            return wrong
        meta = file_meta(
            sop_class_uid=request.sop_class_uid,
            sop_instance_uid=request.sop_instance_uid,
            transfer_syntax_uid=request.transfer_syntax_uid,
            source_ae=request.calling_ae,
        )
        data_hash = hashlib.sha256(request.data_set)
        file_hash = hashlib.sha256(meta)
        file_hash.update(request.data_set)
        name = self._store.new_name(attributes["SeriesInstanceUID"])
        path = self._store.stage(name, [meta, request.data_set])
        try:
            outcome = self._committer.commit(
                NewInstance(
                    attributes=attributes,
                    transfer_syntax_uid=request.transfer_syntax_uid,
                    file=name,
                    size=len(meta) + size,
                    sha256=file_hash.hexdigest(),
                    dataset_sha256=data_hash.hexdigest(),
                    association_id=request.association_id,
                )
            )
        except NodeError:
            durable.remove(path)
            raise
        if outcome is Stored.duplicate:
            durable.remove(path)
        return StoreAnswer(SUCCESS, outcome)
