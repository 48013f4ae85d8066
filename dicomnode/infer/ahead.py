"""Slices are read and decoded while their series still arrives.

When the last slice is acknowledged, what remains to be read are the few that came with it. The
work is the same that the job would do: the file's hash is compared with the index, the header
parsed, the pixels decoded in the pool. Memory is bounded; a series that no rule wants costs one
look at its attributes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any, Protocol

from dicomnode import logs
from dicomnode.durable import ObjectStore, hash_object
from dicomnode.errors import NodeError
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database, Row
from dicomnode.infer.decode import Pixels, Undecodable
from dicomnode.infer.room import Room
from dicomnode.infer.slice_header import SliceHeader, read_header
from dicomnode.part10 import data_set_begin
from dicomnode.records import SourceInstance

KEPT_SECONDS = 300.0
"""What no job has asked for this long after its last slice is let go."""

LARGEST_FILE = 64 << 20
"""A larger file is one object with many frames: reading it ahead would fill the memory at one stroke."""

AT_ONCE = 64


class Decodes(Protocol):
    """The decoder's side that is used here."""

    def submit(self, part10: bytes, rows: int, columns: int) -> Future[Pixels]: ...

    @property
    def at_once(self) -> int:
        """How many it takes without one waiting for long."""
        ...


@dataclass(slots=True)
class _Slice:
    """See ``volume.ReadSlice``. ``sha256`` is that of the file that was read, ``size`` what it takes of the memory."""

    header: SliceHeader
    sha256: str
    size: int
    future: Future[Pixels] | None
    room: Room | None = None

    def values(self) -> Pixels | None:
        future, self.future = self.future, None  # the volume has its own copy
        if future is None:
            return None
        try:
            return future.result()
        except (Undecodable, BrokenProcessPool, CancelledError, RuntimeError):
            return None  # the job decodes it again and says what is wrong with it


@dataclass(slots=True)
class _Series:
    wanted: bool
    last_id: int = 0
    touched: float = 0.0
    uids: set[str] = field(default_factory=set)
    room: Room | None = None
    """Of the slices that are kept; whoever takes them has it."""


class ReadAhead:
    """``wanted(attributes)`` says whether a rule names a model for a series.

    ``max_bytes`` bounds what is kept: the pixels of each slice, and as much again in the volume that they will make.
    """

    def __init__(
        self,
        db: Database,
        store: ObjectStore,
        decoder: Decodes,
        wanted: Callable[[Mapping[str, Any]], bool],
        *,
        max_bytes: int,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._catalogue = Catalogue(db)
        self._store = store
        self._decoder = decoder
        self._wanted = wanted
        self._max_bytes = max_bytes
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._series: dict[int, _Series] = {}
        self._slices: dict[str, _Slice] = {}
        self._taken: set[str] = set()
        self._bytes = 0
        self._places = threading.Semaphore(decoder.at_once)
        self._rung = threading.Event()
        self._log = logs.get()

    @property
    def kept_bytes(self) -> int:
        return self._bytes

    def wake(self) -> None:
        """Rows were committed."""
        self._rung.set()

    def run(self, stopping: Callable[[], bool], beat_seconds: float = 1.0) -> None:
        """Look whenever woken, until ``stopping``; for a thread of its own."""
        while not stopping():
            self._rung.wait(beat_seconds)
            self._rung.clear()
            try:
                self.look()
            except NodeError as error:
                self._log.warning("reading ahead paused", error=str(error))
            except Exception as error:  # noqa: BLE001 it only saves time: the job reads what is missing
                self._log.error("reading ahead failed", exc_type=type(error).__name__)

    def look(self) -> None:
        """One pass over the open series; reads what is new and wanted as far as memory goes."""
        now = self._monotonic()
        growing = [int(series["id"]) for series in self._catalogue.open_series()]
        for number in growing:
            known = self._series.get(number) or self._meet(number)
            if not known.wanted:
                continue
            while self._bytes < self._max_bytes:
                rows = self._catalogue.instances_after(number, known.last_id, AT_ONCE)
                for row in rows:
                    if self._bytes >= self._max_bytes:
                        break
                    known.last_id, known.touched = int(row["id"]), now
                    self._read(row, known)
                if len(rows) < AT_ONCE:
                    break
        self._let_go(now, set(growing))

    def take(self, sources: Sequence[SourceInstance]) -> dict[str, _Slice]:
        """What was read of these instances, by SOP Instance UID; it is the caller's from now on.

        Instances that were not read yet are left to the caller, too.
        """
        found: dict[str, _Slice] = {}
        rooms: set[int] = set()
        with self._lock:
            for source in sources:
                self._taken.add(source.sop_instance_uid)
                one = self._slices.pop(source.sop_instance_uid, None)
                if one is None:
                    continue
                self._bytes -= one.size
                rooms.add(id(one.room))
                if one.sha256 == source.sha256:
                    found[source.sop_instance_uid] = one
            for series in self._series.values():
                if id(series.room) in rooms:
                    series.room = None
        return found

    def done(self, sources: Sequence[SourceInstance]) -> None:
        """The job that took these has ended."""
        with self._lock:
            self._taken.difference_update(s.sop_instance_uid for s in sources)

    def _meet(self, number: int) -> _Series:
        attributes = {**(self._catalogue.series_attributes(number) or {}), **self._catalogue.first_attributes(number)}
        made = self._series[number] = _Series(self._wanted(attributes), touched=self._monotonic())
        return made

    def _read(self, row: Row, series: _Series) -> None:
        uid = str(row["SOPInstanceUID"])
        if int(row["size"]) > LARGEST_FILE or uid in self._taken:
            return
        try:
            part10 = self._store.path(row["file"]).read_bytes()
            begin = data_set_begin(part10)
            if begin is None or hash_object(memoryview(part10)[begin[1] :], part10[: begin[1]]).whole != row["sha256"]:
                return  # the job says so
            header = read_header(part10)
        except (OSError, NodeError):
            return
        size = header.rows * header.columns * header.bytes_per_pixel
        if header.uid != uid or header.frames != 1 or header.samples != 1 or not 0 < size <= LARGEST_FILE:
            return
        self._places.acquire()
        try:
            future = self._decoder.submit(part10, header.rows, header.columns)
        except RuntimeError:  # the pool is being replaced or is closing
            self._places.release()
            return
        future.add_done_callback(lambda _: self._places.release())
        room = self._room(series, size)
        with self._lock:
            if uid not in self._taken:
                self._slices[uid] = _Slice(header, str(row["sha256"]), 2 * size, future, room)
                self._bytes += 2 * size
                series.uids.add(uid)

    def _room(self, series: _Series, size: int) -> Room | None:
        """The volume's memory with place for one slice more; None where the system grants none."""
        with self._lock:
            room = series.room
        if room is None:
            try:
                room = Room(max(self._max_bytes, 1))
            except (OSError, ValueError):
                return None
            with self._lock:
                series.room = room
        room.grow(size)
        return room

    def _let_go(self, now: float, growing: set[int]) -> None:
        """A series that still grows is remembered, so that it is not read from its begin again."""
        with self._lock:
            for number, series in list(self._series.items()):
                if now - series.touched <= KEPT_SECONDS:
                    continue
                for uid in series.uids:
                    one = self._slices.pop(uid, None)
                    if one is not None:
                        self._bytes -= one.size
                series.uids.clear()
                series.room = None
                if number not in growing:
                    del self._series[number]
