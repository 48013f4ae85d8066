"""Samples that wait for the receiver of remote-write: one durable file for each collection.

The name of a file has the node time of its samples, which never runs backwards, then their
wall time; so the order of the names is the order of the samples, and a wall clock that jumps
makes nothing old. Two bounds, each with a counter of what it cost:

- age: files older than ``max_age_days`` are dropped, the oldest first;
- bytes: above ``spool_mb`` every second file of the older half is dropped, again and again until
  it fits. A long time away becomes coarser from its beginning; it is not cut off.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dicomnode import durable
from dicomnode.clock import Clock
from dicomnode.errors import DiskFull
from dicomnode.sync.remote_write import Collection, Labels, pack, unpack

FOLDER = "metrics-spool"
_NAME = re.compile(r"^(\d{16})-(\d{16})-(\d{1,7})\.z$")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file: node time and Unix time in milliseconds, number of samples, bytes."""

    ticks: int
    time: int
    samples: int
    size: int

    @property
    def name(self) -> str:
        return f"{self.ticks:016d}-{self.time:016d}-{self.samples}.z"


def overdue(entries: Sequence[Entry], now: int, max_age: int) -> list[Entry]:
    """What is older than ``max_age`` at node time ``now``, both in milliseconds. Pure."""
    return [e for e in entries if now - e.ticks > max_age]


def thinned(entries: Sequence[Entry], max_bytes: int) -> list[Entry]:
    """What has to go so that the rest has ``max_bytes`` at most; ``entries`` by age, the oldest first. Pure.

    The newest stays even where it is larger.
    """
    kept = list(entries)
    gone: list[Entry] = []
    while len(kept) > 1 and sum(e.size for e in kept) > max_bytes:
        half = (len(kept) + 1) // 2
        gone += kept[:half:2]
        kept = kept[1:half:2] + kept[half:]
    return gone


class MetricSpool:
    """Owned by one process; its methods may be called from any thread."""

    def __init__(self, data_dir: Path, reserve_bytes: int, clock: Clock) -> None:
        self.folder = data_dir / FOLDER
        self._reserve, self._clock = reserve_bytes, clock
        self._lock = threading.Lock()
        self._entries: list[Entry] = []

    def start(self) -> None:
        """Find what a former life left; what it left half written is removed."""
        durable.make_directory(self.folder)
        found = []
        for path in self.folder.iterdir():
            match = _NAME.match(path.name)
            if match:
                ticks, time, samples = (int(g) for g in match.groups())
                found.append(Entry(ticks, time, samples, path.stat().st_size))
            elif path.name.endswith(durable.TEMPORARY_SUFFIX):
                durable.remove(path)
        with self._lock:
            self._entries = sorted(found, key=lambda e: (e.ticks, e.time))

    def entries(self) -> list[Entry]:
        """The oldest first."""
        with self._lock:
            return list(self._entries)

    def put(self, samples: Sequence[tuple[Labels, float]]) -> None:
        """Durable when it returns. Raises DiskFull below the reserve, StorageError else."""
        if durable.free_bytes(self.folder) <= self._reserve:
            raise DiskFull("keep samples", "free space is at or below node.reserve_mb", "Make room on the disk")
        ticks, time = int(self._clock.ticks() * 1000), int(self._clock.wall().timestamp() * 1000)
        data = pack(Collection(time, samples))
        entry = Entry(ticks, time, len(samples), len(data))
        durable.write_durable(self.folder / entry.name, data)
        with self._lock:
            self._entries.append(entry)

    def read(self, entry: Entry) -> Collection:
        """Raises ValueError when the file is damaged or gone."""
        try:
            return unpack((self.folder / entry.name).read_bytes())
        except OSError as error:
            raise ValueError(error.strerror or "unreadable") from None

    def remove(self, entries: Sequence[Entry]) -> int:
        """How many samples they had; what another thread has removed does not count."""
        with self._lock:
            gone = set(entries) & set(self._entries)
            self._entries = [e for e in self._entries if e not in gone]
        for entry in gone:
            durable.remove(self.folder / entry.name)
        return sum(e.samples for e in gone)

    def age_seconds(self, entry: Entry) -> float:
        return max(0.0, self._clock.ticks() - entry.ticks / 1000)
