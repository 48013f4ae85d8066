"""Ends of peers' certificates: shared by the processes of a kind, kept over a restart, written when they change."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from dicomnode import metrics
from dicomnode.index.database import Database
from dicomnode.index.seen import KEPT_SECONDS, SeenCertificates
from tests.index.rows import START, FakeClock

NOW = START.timestamp()
PEERS = ("ct", "pacs")


def test_kinds_of_processes_share_and_the_last_word_counts(db: Database) -> None:
    first, second = (SeenCertificates(db, "receiver", PEERS) for _ in range(2))
    courier = SeenCertificates(db, "courier", PEERS)
    assert first.exchange({"ct": NOW + 900}) == {"ct": NOW + 900}
    assert second.exchange({}) == {"ct": NOW + 900}
    assert courier.exchange({"pacs": NOW + 5}) == {"pacs": NOW + 5}
    # It has a new certificate that ends earlier; the other receiver still shows the former one.
    assert second.exchange({"ct": NOW + 10}) == {"ct": NOW + 10}
    assert first.exchange({"ct": NOW + 900}) == {"ct": NOW + 10}
    assert SeenCertificates(db, "receiver", PEERS).exchange({}) == {"ct": NOW + 10}


def test_it_survives_the_process_and_forgets_what_nobody_uses(tmp_path: Path, clock: FakeClock) -> None:
    db = Database(tmp_path, clock)
    SeenCertificates(db, "receiver", PEERS).exchange({"ct": NOW + 900, "pacs": NOW + 86400, "stranger": NOW + 900})
    db.close()
    db = Database(tmp_path, clock)
    assert SeenCertificates(db, "receiver", PEERS).exchange({}) == {"ct": NOW + 900, "pacs": NOW + 86400}
    assert SeenCertificates(db, "receiver", ["pacs", "stranger"]).exchange({}) == {"pacs": NOW + 86400}
    one = SeenCertificates(db, "receiver", PEERS)
    clock.move(KEPT_SECONDS + 1000)
    assert one.exchange({"ct": NOW + 900, "pacs": NOW + 86400}) == {"pacs": NOW + 86400}
    db.close()


def test_only_changes_are_written(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    writes: list[Mapping[str, float]] = []
    record = SeenCertificates._record
    monkeypatch.setattr(SeenCertificates, "_record", lambda self, ends: (writes.append(ends), record(self, ends)))
    one = SeenCertificates(db, "receiver", PEERS)
    shown = {"ct": NOW + 900}
    for _ in range(3):
        shown = one.exchange(shown)
    again = SeenCertificates(db, "receiver", PEERS)
    again.exchange(again.exchange({}))
    long_over = NOW - KEPT_SECONDS - 1
    one.exchange({"ct": long_over})
    assert writes == [{"ct": NOW + 900}]


def test_what_came_meanwhile_is_newer_than_what_others_saw() -> None:
    metrics.peer_certificate("ct", 1.0)
    metrics.peer_certificate("pacs", 2.0)
    metrics.peer_certificate("old", 3.0)
    try:
        before = metrics.peer_certificates()
        metrics.peer_certificate("pacs", 20.0)
        metrics.peer_certificates_known({"ct": 10.0, "pacs": 15.0, "mr": 30.0}, before)
        assert metrics.peer_certificates() == {"ct": 10.0, "pacs": 20.0, "mr": 30.0}
    finally:
        metrics.TLS_PEER_SECONDS.clear()
