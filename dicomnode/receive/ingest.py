"""C-STORE: bytes as received -> durable file -> committed row -> status.

An object is answered with 0x0000 when it survives a power cut. One that fits into memory is
written to the intake journal (:mod:`dicomnode.receive.journal`) and answered; while its sender
prepares the next one it gets its file and row (:mod:`dicomnode.receive.apply`), whose own
barriers come later. A long object goes to its file as its fragments
come, so it costs no memory: fsync file, name in place, fsync directory, row committed with
synchronous FULL, answer. So does any object while the journal is full.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from dicomnode import durable
from dicomnode.durable import ObjectStore, StagedFile, SyncFailed
from dicomnode.errors import DiskFull, MalformedDataSet, NodeError, StorageError
from dicomnode.header import DEFLATED, MAX_INFLATED, Wanted, read_header
from dicomnode.index.catalogue import NewInstance, Stored
from dicomnode.receive.apply import Acknowledged, Applier
from dicomnode.receive.commit import Committer
from dicomnode.receive.journal import Buffer, BufferPool, Entry, Journal
from dicomnode.receive.part10 import file_meta
from dicomnode.receive.recovery import fields_of

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
DATA_SET_MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
"""Statuses of the Storage Service Class, PS3.4 table B.2-1."""

PROCESSING_FAILURE = 0x0110
"""PS3.7 C.5.12: a fault of ours, not of the object."""

SPILL_BYTES = 1024 * 1024
"""Longer objects go to their file while they come in, in pieces of about this size."""

FLUSH_BYTES = 64 * 1024 * 1024
"""A long object is brought to the disk this often."""

_UID = re.compile(r"[0-9.]{1,64}")


@dataclass(frozen=True, slots=True)
class StoreRequest:
    """One C-STORE-RQ: command fields, negotiated transfer syntax and whom it is from.

    ``peer`` is the caller's name in the settings.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae: str
    association_id: str
    peer: str = ""


@dataclass(frozen=True, slots=True)
class StoreAnswer:
    """Status to answer with; ``cause`` is for the log and free of patient data."""

    status: int
    cause: str = ""
    hint: str = ""


def check_request(request: StoreRequest) -> StoreAnswer | None:
    """Why the command alone forbids to store, or None. Pure."""
    if not _UID.fullmatch(request.sop_instance_uid) or not _UID.fullmatch(request.sop_class_uid):
        return StoreAnswer(DATA_SET_MISMATCH, "a UID of the command is not a UID", "Mend the object at its sender")
    return None


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


class Unfinished:
    """Bytes of objects that are not complete, by peer: one peer may not fill the disk with halves."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._lock = threading.Lock()
        self._bytes: Counter[str] = Counter()

    def take(self, peer: str, count: int) -> bool:
        """False, and nothing taken, when the peer would have more than it may."""
        with self._lock:
            if self._bytes[peer] + count > self._most:
                return False
            self._bytes[peer] += count
            return True

    def give_back(self, peer: str, count: int) -> None:
        with self._lock:
            self._bytes[peer] -= count
            if self._bytes[peer] <= 0:
                del self._bytes[peer]


@dataclass(frozen=True, slots=True)
class Safe:
    """The journal, and who makes files and rows of what is in it."""

    journal: Journal
    applier: Applier


class Ingest:
    """Handles C-STORE requests; one per process, used by all its associations.

    Without ``safe`` every object takes the way of the long ones.
    """

    def __init__(
        self,
        store: ObjectStore,
        committer: Committer,
        wanted: Wanted,
        *,
        reserve_bytes: int,
        most_unfinished_bytes: int = 2**62,
        safe: Safe | None = None,
    ) -> None:
        self.store = store
        self.committer = committer
        self.wanted = wanted
        self.safe = safe
        self.unfinished = Unfinished(most_unfinished_bytes)
        self.buffers = BufferPool(SPILL_BYTES)
        self._reserve = reserve_bytes

    def begin(self, request: StoreRequest) -> Incoming:
        """Take in one object; its fragments go to the answer's ``write``."""
        return Incoming(self, request)

    def check_room(self, size: int) -> None:
        """Raises DiskFull when ``size`` bytes would touch the reserve."""
        if durable.free_bytes(self.store.root) - size < self._reserve:
            raise DiskFull("store object", "free space is at the reserve", "Free space on the volume of node.data_dir")


class Incoming:
    """One object on its way in. After a refusal its fragments are read and dropped (PS3.7 9.3.1)."""

    def __init__(self, ingest: Ingest, request: StoreRequest) -> None:
        self._ingest = ingest
        self._request = request
        self._answer = check_request(request)
        self._buffer: Buffer | None = ingest.buffers.take()
        self._staged: StagedFile | None = None
        self._meta = b""
        self._hash = hashlib.sha256()
        self._attributes: dict[str, str] = {}
        self._entry: Entry | None = None
        self._taken = 0
        self._flushed = 0
        self._received_at = 0.0
        self.size = 0
        """Bytes of the data set so far."""

    def write(self, fragment: memoryview) -> None:
        self.size += len(fragment)
        if self._answer is not None:
            return
        assert self._buffer is not None
        self._hash.update(fragment)
        while len(fragment):
            part = fragment[: self._buffer.capacity - self._buffer.size]
            self._buffer.add(part)
            fragment = fragment[len(part) :]
            if len(fragment) and self._answer is None:
                self._answer = self._guarded(self._spill)
            if self._answer is not None:
                self.discard()
                return

    def finish(self) -> StoreAnswer:
        """Store it; the answer is success only when the object survives a power cut.

        Send the answer, then call :meth:`settle`.
        """
        answer = self._answer if self._answer is not None else self._guarded(self._store)
        if self._entry is None:
            self.discard()
        return answer if answer is not None else StoreAnswer(PROCESSING_FAILURE, "no answer was found", "Report this")

    def settle(self) -> Acknowledged | None:
        """Hand an acknowledged object of the journal on; None when nothing is left to do for it."""
        entry, buffer, safe = self._entry, self._buffer, self._ingest.safe
        if entry is None or buffer is None or safe is None:
            return None
        self._entry = self._buffer = None
        name = self._ingest.store.new_name(self._attributes["SeriesInstanceUID"])
        buffers = self._ingest.buffers
        item = Acknowledged(entry, buffer, self._meta, self._instance(name), lambda: buffers.give_back(buffer))
        safe.applier.put(item)
        return item

    def discard(self) -> None:
        """Leave nothing of an object that is not stored; harmless after :meth:`settle`."""
        if self._buffer is not None:
            self._ingest.buffers.give_back(self._buffer)
            self._buffer = None
        if self._staged is not None:
            self._staged.abandon()
            self._staged = None
        if self._taken:
            self._ingest.unfinished.give_back(self._request.peer, self._taken)
            self._taken = 0

    def _guarded(self, step: Callable[[], StoreAnswer | None]) -> StoreAnswer | None:
        try:
            return step()
        except MalformedDataSet as error:
            return StoreAnswer(CANNOT_UNDERSTAND, error.cause, error.hint)
        except SyncFailed as error:
            durable.die(error)
        except StorageError as error:
            return StoreAnswer(OUT_OF_RESOURCES, f"{error.operation}: {error.cause}", error.hint)

    def _spill(self) -> StoreAnswer | None:
        """Move what has come to the file; an answer when it may not grow."""
        ingest, buffer = self._ingest, self._buffer
        assert buffer is not None
        if not ingest.unfinished.take(self._request.peer, buffer.size):
            return StoreAnswer(
                OUT_OF_RESOURCES,
                "this peer has too many bytes of unfinished objects here",
                "Send fewer large objects at a time, or raise dimse.max_unfinished_mb",
            )
        self._taken += buffer.size
        ingest.check_room(buffer.size)
        if self._staged is None:
            self._meta = self._file_meta()
            self._staged = ingest.store.begin()
            self._staged.write([self._meta])
        self._staged.write([buffer.data_set])
        self._flushed += buffer.size
        buffer.size = 0
        if self._flushed >= FLUSH_BYTES:
            self._flushed = 0
            self._staged.flush()
        return None

    def _file_meta(self) -> bytes:
        request = self._request
        return file_meta(
            sop_class_uid=request.sop_class_uid,
            sop_instance_uid=request.sop_instance_uid,
            transfer_syntax_uid=request.transfer_syntax_uid,
            source_ae=request.calling_ae,
        )

    def _store(self) -> StoreAnswer | None:
        if self._staged is not None:
            return self._spill() or self._store_staged(self._staged)
        buffer = self._buffer
        assert buffer is not None
        self._ingest.check_room(self.size)
        self._meta = self._file_meta()
        self._attributes = read_header(buffer.data_set, self._request.transfer_syntax_uid, self._ingest.wanted)
        wrong = check_header(self._request, self._attributes)
        if wrong is not None:
            return wrong
        safe = self._ingest.safe
        if safe is not None:
            safe.applier.wait_for_room()
        entry = safe.journal.reserve(buffer.size) if safe is not None else None
        if safe is None or entry is None:
            name = self._ingest.store.new_name(self._attributes["SeriesInstanceUID"])
            self._ingest.store.stage(name, [self._meta, buffer.data_set])
            return self._commit(name)
        self._received_at = self._ingest.committer.ticks()
        try:
            safe.journal.write(entry, buffer, self._fields(), self._hash.copy())
        except BaseException:
            safe.applier.refuse(entry)
            raise
        self._entry = entry
        return StoreAnswer(SUCCESS)

    def _fields(self) -> dict[str, str]:
        request = self._request
        return fields_of(
            sop_class_uid=request.sop_class_uid,
            sop_instance_uid=request.sop_instance_uid,
            transfer_syntax_uid=request.transfer_syntax_uid,
            calling_ae=request.calling_ae,
            association_id=request.association_id,
            received_at=self._received_at,
        )

    def _store_staged(self, staged: StagedFile) -> StoreAnswer:
        ingest, request = self._ingest, self._request
        self._attributes = self._header_of(staged)
        wrong = check_header(request, self._attributes)
        if wrong is not None:
            return wrong
        name = ingest.store.new_name(self._attributes["SeriesInstanceUID"])
        ingest.store.place(staged, name)
        self._staged = None
        return self._commit(name)

    def _header_of(self, staged: StagedFile) -> dict[str, str]:
        """From the file, mapped: pages that are not looked at are not read."""
        syntax = self._request.transfer_syntax_uid
        with mmap.mmap(staged.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
            begin = len(self._meta)
            end = begin + MAX_INFLATED if syntax in DEFLATED else len(view)  # zlib copies what it leaves unread
            with view[begin:end] as data:
                return read_header(data, syntax, self._ingest.wanted)

    def _instance(self, name: str) -> NewInstance:
        data_hash, whole = self._hash.hexdigest(), self._hash.copy()
        whole.update(self._meta)
        return NewInstance(
            attributes=self._attributes,
            transfer_syntax_uid=self._request.transfer_syntax_uid,
            file=name,
            size=len(self._meta) + self.size,
            sha256=whole.hexdigest(),
            dataset_sha256=data_hash,
            association_id=self._request.association_id,
            received_at=self._received_at,
        )

    def _commit(self, name: str) -> StoreAnswer:
        store, committer = self._ingest.store, self._ingest.committer
        if self._ingest.safe is not None:
            self._ingest.safe.applier.catch_up()  # an older object of this UID may wait there: the newest serves
        try:
            outcome = committer.commit(self._instance(name))
        except NodeError:
            durable.remove(store.path(name))
            raise
        if outcome is Stored.duplicate:
            durable.remove(store.path(name))
            # Whoever wrote the file that serves may not have lived to make it durable.
            serving = store.path(committer.file_of(self._request.sop_instance_uid))
            durable.sync_file(serving)
            durable.sync_directory(serving.parent)
        return StoreAnswer(SUCCESS, outcome)
