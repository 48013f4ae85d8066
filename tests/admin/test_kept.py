"""Dear figures are kept for a while, others never; each index has its own."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from dicomnode.admin import kept as module
from dicomnode.admin.kept import DEAR_SECONDS, LONGEST_SECONDS, TIMES, kept
from dicomnode.admin.status import status_report
from dicomnode.index.database import Database
from dicomnode.index.outbox import Outbox
from tests.sync.index_case import add_results, make_settings


class Figure:
    """Costs what it is told to; counts how often it was looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, price: float) -> None:
        self.price, self.looks, self.now, self.used = price, 0, 100.0, 0.0
        monkeypatch.setattr(time, "thread_time", lambda: self.used)
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def __call__(self) -> int:
        self.used += self.price
        self.looks += 1
        return self.looks


@pytest.fixture
def db(tmp_path: Path) -> Database:
    return Database(tmp_path / "data")


def test_what_is_quick_is_always_new(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = Figure(monkeypatch, DEAR_SECONDS * 0.9)
    assert [kept(db, "a", figure) for _ in range(3)] == [1, 2, 3]


def test_what_is_dear_is_kept_for_its_price(db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Database(tmp_path / "other")
    figure = Figure(monkeypatch, 0.02)
    assert [kept(db, "a", figure) for _ in range(3)] == [1, 1, 1]
    assert kept(db, "b", figure) == 2 and kept(other, "a", figure) == 3
    figure.now += TIMES * 0.02 - 0.01
    assert kept(db, "a", figure) == 1
    figure.now += 0.02
    assert kept(db, "a", figure) == 4
    figure.price = 60.0
    figure.now += LONGEST_SECONDS
    assert kept(db, "a", figure) == 5
    figure.now += LONGEST_SECONDS + 0.01
    figure.price = 0.0
    assert [kept(db, "a", figure) for _ in range(2)] == [6, 7], "it became quick"
    other.close()


def test_a_fault_is_not_kept(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DEAR_SECONDS", 0.0)

    def fails() -> int:
        raise OSError

    with pytest.raises(OSError):
        kept(db, "a", fails)
    assert kept(db, "a", lambda: 3) == 3


def test_a_status_of_dear_figures_follows_in_the_end(
    db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DEAR_SECONDS", 0.0)
    monkeypatch.setattr(module, "TIMES", 1e9)
    monkeypatch.setattr(module, "LONGEST_SECONDS", 60.0)
    settings = make_settings(tmp_path / "data")
    looks: list[str] = []
    counts = Outbox.counts
    monkeypatch.setattr(Outbox, "counts", lambda self: looks.append(self.table) or counts(self))
    add_results(db, tmp_path / "data", 2)
    assert [status_report(db, settings)["sync_items"]["pending"] for _ in range(3)] == [2, 2, 2]
    assert sorted(looks) == ["deliveries", "sync_items"]
    add_results(db, tmp_path / "data", 1)
    assert status_report(db, settings)["sync_items"]["pending"] == 2
    monkeypatch.setattr(module, "DEAR_SECONDS", 1e9)
    real = time.monotonic
    monkeypatch.setattr(time, "monotonic", lambda: real() + 61)
    assert status_report(db, settings)["sync_items"]["pending"] == 3
