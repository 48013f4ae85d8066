"""The sweeper removes what no row names, late, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from dicomnode.custody.sweep import GRACE_SECONDS, Sweeper
from dicomnode.durable import FANOUT, ObjectStore
from dicomnode.index.catalogue import Catalogue, NewInstance
from dicomnode.index.database import Database


@dataclass
class HandClock:
    now: float = 1000.0
    wall_time: datetime = field(default_factory=lambda: datetime(2026, 1, 1, tzinfo=UTC))

    def wall(self) -> datetime:
        return self.wall_time

    def ticks(self) -> float:
        return self.now


def sweep_all(sweeper: Sweeper) -> int:
    return sum(sweeper.run_once() for _ in range(FANOUT))


def test_only_unnamed_files_go_and_only_after_the_grace_period(tmp_path: Path) -> None:
    clock = HandClock()
    db = Database(tmp_path, clock)
    store = ObjectStore(tmp_path)
    store.prepare()
    kept, stray = store.new_name("1.2.3"), store.new_name("1.2.3")
    for name in (kept, stray):
        store.stage(name, [b"data"])
    uids = {"SOPInstanceUID": "1.2", "StudyInstanceUID": "1.1", "SeriesInstanceUID": "1.2.3", "SOPClassUID": "1"}
    Catalogue(db).commit([NewInstance(uids, "1.2.840.10008.1.2", kept, 4, "a", "b")])
    sweeper = Sweeper(db, store)

    assert sweep_all(sweeper) == 0
    clock.wall_time = datetime(2036, 1, 1, tzinfo=UTC)  # a jump of the wall clock is no reason
    clock.now += GRACE_SECONDS - 1
    assert sweep_all(sweeper) == 0
    assert store.path(stray).exists()
    clock.now += 2
    assert sweep_all(sweeper) == 1
    assert store.path(kept).exists()
    assert not store.path(stray).exists()
    db.close()


def test_a_file_that_gets_its_row_late_is_kept(tmp_path: Path) -> None:
    clock = HandClock()
    db = Database(tmp_path, clock)
    store = ObjectStore(tmp_path)
    store.prepare()
    name = store.new_name("1.2.3")
    store.stage(name, [b"data"])
    sweeper = Sweeper(db, store)
    sweep_all(sweeper)
    uids = {"SOPInstanceUID": "1.2", "StudyInstanceUID": "1.1", "SeriesInstanceUID": "1.2.3", "SOPClassUID": "1"}
    Catalogue(db).commit([NewInstance(uids, "1.2.840.10008.1.2", name, 4, "a", "b")])
    clock.now += 10 * GRACE_SECONDS
    assert sweep_all(sweeper) == 0
    assert store.path(name).exists()
    db.close()
