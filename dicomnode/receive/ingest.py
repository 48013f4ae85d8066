"""C-STORE: bytes as received -> durable file -> committed row -> status.

An object is answered with 0x0000 when it survives a power cut. One that fits into memory is
written to the intake journal (:mod:`dicomnode.receive.journal`), while it comes if it is of some
length, and answered; it gets its file and row when there is time (:mod:`dicomnode.receive.apply`),
and their own barriers still later. A long object goes to its file as its fragments
come, so it costs no memory: fsync file, name in place, fsync directory, row committed with
synchronous FULL, answer. So does any object while the journal is full.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from dicomnode import durable
from dicomnode.durable import ObjectStore, StagedFile, SyncFailed
from dicomnode.errors import DiskFull, MalformedDataSet, NodeError, StorageError
from dicomnode.header import DEFLATED, MAX_INFLATED, Wanted, read_begun_header, read_header
from dicomnode.index.catalogue import NewInstance, Stored
from dicomnode.receive.apply import Acknowledged, Applier
from dicomnode.receive.commit import Committer
from dicomnode.receive.journal import BLOCK, Buffer, BufferPool, Journal, Place, checksum
from dicomnode.receive.record import IDENTITY, Fields, meta_of

SUCCESS = 0x0000
OUT_OF_RESOURCES = 0xA700
DATA_SET_MISMATCH = 0xA900
CANNOT_UNDERSTAND = 0xC000
"""Statuses of the Storage Service Class, PS3.4 table B.2-1."""

PROCESSING_FAILURE = 0x0110
"""PS3.7 C.5.12: a fault of ours, not of the object."""
UNRECOGNIZED_OPERATION = 0x0211
"""PS3.7 C.5: C-STORE on a presentation context that is not for it."""

SPILL_BYTES = 1024 * 1024
"""Longer objects go to their file while they come in, in pieces of about this size."""

STREAM_BYTES = 128 * 1024
"""Of an object that is longer, what has come is on its way to the journal while the rest comes."""

FLUSH_BYTES = 64 * 1024 * 1024
"""A long object is brought to the disk this often."""

ROOM_SECONDS = 0.02
"""How long a look at the free space counts: others write to the volume too."""

_UID = re.compile(r"[0-9.]{1,64}")


class StoreRequest(NamedTuple):
    """One C-STORE-RQ: command fields, negotiated transfer syntax and whom it is from.

    ``peer`` is the caller's name in the settings. The first five are those of a journal record.
    """

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    calling_ae: str
    association_id: str
    peer: str = ""


class StoreAnswer(NamedTuple):
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
    for keyword in IDENTITY:
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


class Room:
    """Free space on the volume, looked at now and then; what was taken meanwhile is counted.

    ``owed``: bytes that are taken, though nothing on the volume shows it yet.
    """

    def __init__(self, store: ObjectStore, owed: Callable[[], int]) -> None:
        self._store = store
        self._owed = owed
        self._free = 0
        self._until = 0.0

    def take(self, size: int, reserve: int) -> bool:
        """Whether ``size`` bytes can be taken and ``reserve`` are left; they count as taken then."""
        now = time.monotonic()
        if now >= self._until or self._free - size < reserve:
            self._free = durable.free_bytes(self._store.root) - self._owed()
            self._until = now + ROOM_SECONDS
        if self._free - size < reserve:
            return False
        self._free -= size
        return True


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
        self.identity = Wanted(IDENTITY)
        """What an answer depends on; the rest of the header is read afterwards."""
        self.unfinished = Unfinished(most_unfinished_bytes)
        self.buffers = BufferPool(SPILL_BYTES, safe.journal.path if safe is not None else None)
        self.room = Room(store, lambda: safe.applier.waiting_bytes if safe is not None else 0)
        self._reserve = reserve_bytes
        self.clock: Callable[[], float] = committer.ticks
        """Node time, seconds."""

    def begin(self, request: StoreRequest) -> Incoming:
        """Take in one object; its fragments go to the answer's ``write``."""
        return Incoming(self, request)

    def check_room(self, size: int) -> None:
        """Raises DiskFull when ``size`` bytes, and the files still to be made, would touch the reserve."""
        if not self.room.take(size, self._reserve):
            raise DiskFull("store object", "free space is at the reserve", "Free space on the volume of node.data_dir")


class Incoming:
    """One object on its way in. After a refusal its fragments are read and dropped (PS3.7 9.3.1)."""

    def __init__(self, ingest: Ingest, request: StoreRequest) -> None:
        self._ingest = ingest
        self._request = request
        self._answer = check_request(request)
        self._buffer: Buffer | None = ingest.buffers.take()
        self._checksum = checksum()
        self._place: Place | None = None
        self._streams = ingest.safe is not None
        self._streamed = 0
        self._checked = False
        self._staged: StagedFile | None = None
        self._meta = b""
        self._hash = hashlib.sha256()
        self._attributes: dict[str, str] = {}
        self._taken = 0
        self._flushed = 0
        self.size = 0
        """Bytes of the data set so far."""

    def write(self, fragment: memoryview) -> None:
        self.size += len(fragment)
        if self._answer is not None:
            return
        buffer = self._buffer
        assert buffer is not None
        if buffer.add(fragment):
            self._checksum.update(fragment)
            if self._streams and buffer.size - self._streamed >= STREAM_BYTES:
                self._answer = self._guarded(self._stream)
        else:
            self._answer = self._guarded(lambda: self._write_long(buffer, fragment))
        if self._answer is not None:
            self.discard()

    def finish(self) -> StoreAnswer:
        """Store it; the answer is success only when the object survives a power cut."""
        answer = self._answer if self._answer is not None else self._guarded(self._store)
        self.discard()
        return answer if answer is not None else StoreAnswer(PROCESSING_FAILURE, "no answer was found", "Report this")

    def discard(self) -> None:
        """Leave nothing of an object that is not stored; harmless after :meth:`finish`."""
        if self._buffer is not None:
            self._ingest.buffers.give_back(self._buffer)
            self._buffer = None
        self._leave_journal()
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

    def _stream(self) -> StoreAnswer | None:
        """Have what has come written to the journal, in the background, and look at the header meanwhile."""
        safe, buffer = self._ingest.safe, self._buffer
        assert safe is not None and buffer is not None
        if self._place is None:
            safe.applier.wait_for_room()
            self._place = safe.journal.reserve(SPILL_BYTES)
            if self._place is None:
                self._streams = False
                return None
        end = buffer.size // BLOCK * BLOCK
        safe.journal.stream(self._place, buffer, self._streamed, end)
        first, self._streamed = not self._streamed, end
        if first:
            found = read_begun_header(buffer.data_set, self._request.transfer_syntax_uid, self._ingest.identity)
            self._checked = found is not None and check_header(self._request, found) is None
        return None

    def _leave_journal(self) -> None:
        if self._place is not None:
            assert self._ingest.safe is not None
            self._ingest.safe.journal.release(self._place)
            self._place = None
        self._streams = False

    def _write_long(self, buffer: Buffer, fragment: memoryview) -> StoreAnswer | None:
        """The object does not fit into the buffer: it goes to its file."""
        self._leave_journal()
        while len(fragment):
            part = fragment[: buffer.capacity - buffer.size]
            buffer.add(part)
            fragment = fragment[len(part) :]
            if len(fragment) and (answer := self._spill()) is not None:
                return answer
        return None

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
            self._meta = meta_of(self._fields())
            self._staged = ingest.store.begin()
            self._staged.write([self._meta])
        self._hash.update(buffer.data_set)
        self._staged.write([buffer.data_set])
        self._flushed += buffer.size
        buffer.size = 0
        if self._flushed >= FLUSH_BYTES:
            self._flushed = 0
            self._staged.flush()
        return None

    def _store(self) -> StoreAnswer | None:
        if self._staged is not None:
            return self._spill() or self._store_staged(self._staged)
        self._ingest.check_room(self.size)
        safe, buffer = self._ingest.safe, self._buffer
        assert buffer is not None
        if safe is None:
            return self._store_at_once(buffer)
        if self._place is None:
            safe.applier.wait_for_room()
            self._place = safe.journal.reserve(buffer.size)
        return self._store_at_once(buffer) if self._place is None else self._journal(safe, buffer, self._place)

    def _journal(self, safe: Safe, buffer: Buffer, place: Place) -> StoreAnswer:
        """Into the journal; its header is looked at while the disk writes."""
        fields = self._fields()
        entry = safe.journal.finish(place, buffer, self._streamed, fields.encode(), self._checksum)
        self._place = None  # from here on the number holds it
        acknowledged = False
        try:
            wrong = None if self._checked else self._wrong(buffer)
            if wrong is not None:
                return wrong
            safe.journal.sync(buffer)
            acknowledged = True
        finally:
            if not acknowledged:
                safe.journal.void(entry, buffer)
                safe.applier.refuse(entry)
        safe.applier.put(Acknowledged(entry, fields))
        return StoreAnswer(SUCCESS)

    def _wrong(self, buffer: Buffer) -> StoreAnswer | None:
        found = read_header(buffer.data_set, self._request.transfer_syntax_uid, self._ingest.identity)
        return check_header(self._request, found)

    def _store_at_once(self, buffer: Buffer) -> StoreAnswer:
        """File and row with barriers of their own, where there is no journal or no room in it."""
        request = self._request
        self._attributes = read_header(buffer.data_set, request.transfer_syntax_uid, self._ingest.wanted)
        wrong = check_header(request, self._attributes)
        if wrong is not None:
            return wrong
        self._meta = meta_of(self._fields())
        self._hash.update(buffer.data_set)
        name = self._ingest.store.new_name(self._attributes["SeriesInstanceUID"])
        self._ingest.store.stage(name, [self._meta, buffer.data_set])
        return self._commit(name)

    def _fields(self) -> Fields:
        return Fields(*self._request[:5], self._ingest.clock())

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
