"""The intake journal: a ring that gives back whole records, and what a power cut leaves of it."""

from __future__ import annotations

import hashlib
import itertools
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode import durable
from dicomnode.durable import ObjectStore
from dicomnode.errors import StorageError
from dicomnode.header import Wanted
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.journals import Journals
from dicomnode.index.keys import HEADER_KEYS
from dicomnode.receive import apply as apply_module
from dicomnode.receive import retire as retire_module
from dicomnode.receive.apply import Applier
from dicomnode.receive.commit import Committer
from dicomnode.receive.ingest import Ingest, Safe
from dicomnode.receive.journal import BLOCK, HEAD_BYTES, Buffer, Entry, Journal
from dicomnode.receive.recovery import recover, recover_others
from dicomnode.receive.retire import Retirer
from tests.receive.test_ingest import Sent, data_set, store_request

SIZE = 64 * BLOCK


def write(journal: Journal, data: bytes) -> Entry:
    entry = journal.reserve(len(data))
    assert entry is not None
    buffer = Buffer(len(data))
    assert buffer.add(memoryview(data))
    journal.write(entry, buffer, {"n": str(entry.number)}, hashlib.sha256(data))
    return entry


def held(journal: Journal, after: int = 0) -> dict[int, bytes]:
    return {found.number: found.data_set for found in journal.records(after)}


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    made = Journal(tmp_path / "journal" / "a.journal", SIZE)
    yield made
    made.close()


def test_records_come_back_whole_after_opening_again(journal: Journal) -> None:
    written = {write(journal, bytes([n]) * n * 1000).number: bytes([n]) * n * 1000 for n in range(1, 8)}
    journal.close()
    again = Journal(journal.path, SIZE)
    assert held(again) == written
    assert held(again, after=5) == {n: d for n, d in written.items() if n > 5}
    again.close()


@given(st.lists(st.tuples(st.integers(0, 12 * BLOCK), st.integers(0, 6)), max_size=60))
def test_what_is_held_is_never_overwritten(steps: list[tuple[int, int]]) -> None:
    """Reserve records of any size and release the oldest ones: held ones do not overlap and stay readable."""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"journal-{os.getpid()}" / "h.journal"
    durable.remove_tree(path.parent)
    journal = Journal(path, SIZE)
    kept: dict[int, tuple[Entry, bytes]] = {}
    try:
        for size, released in steps:
            for number in sorted(kept)[:released]:
                journal.release(kept.pop(number)[0])
            entry = journal.reserve(size)
            if entry is None:
                assert kept, "an empty ring has room"
                continue
            data = os.urandom(8).ljust(size, b"x")[:size]
            buffer = Buffer(max(size, 1))
            buffer.add(memoryview(data))
            journal.write(entry, buffer, {}, hashlib.sha256(data))
            kept[entry.number] = (entry, data)
            places = sorted((e.begin, e.begin + e.length) for e, _ in kept.values())
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
            assert places[0][0] >= BLOCK and places[-1][1] <= SIZE
        found = held(journal)
        assert {n: found.get(n) for n in kept} == {n: data for n, (_, data) in kept.items()}
        assert journal.used() == sum(e.length for e, _ in kept.values()) / (SIZE - BLOCK)
    finally:
        journal.close()
        durable.remove_tree(path.parent)


@pytest.mark.parametrize("place", [3, 40, 200, HEAD_BYTES, HEAD_BYTES + 4999])
def test_a_torn_record_is_left_out(journal: Journal, place: int) -> None:
    write(journal, b"a" * 5000)
    torn = write(journal, b"b" * 5000)
    write(journal, b"c" * 5000)
    with journal.path.open("r+b") as file:
        file.seek(torn.begin + place)
        byte = file.read(1)
        file.seek(torn.begin + place)
        file.write(bytes([byte[0] ^ 1]))
    assert set(held(journal)) == {1, 3} | ({2} if place == 200 else set())


def test_data_that_looks_like_a_record_is_none(journal: Journal) -> None:
    write(journal, b"x" * 100)
    with journal.path.open("rb") as file:
        file.seek(BLOCK)
        record = file.read(2 * BLOCK)
    forged = bytes(record[:8]) + bytes(16) + bytes(record[24:])
    write(journal, forged)
    assert set(held(journal)) == {1, 2}


def test_another_process_cannot_have_it(journal: Journal) -> None:
    with pytest.raises(StorageError, match="another process"):
        Journal(journal.path, SIZE)


def test_a_journal_of_another_size_is_kept_while_it_is_whole(journal: Journal) -> None:
    write(journal, b"abc")
    mark = journal.mark
    journal.close()
    again = Journal(journal.path, 2 * SIZE)
    assert (again.mark, again.size, held(again)) == (mark, SIZE, {1: b"abc"})
    again.close()


class Node:
    """An ingest with a journal; what it made can be lost as in a power cut."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.db = Database(folder)
        self.catalogue = Catalogue(self.db)
        self.store = ObjectStore(folder)
        self.store.prepare()
        self.wanted = Wanted(HEADER_KEYS)
        self.journal = Journal(folder / "journal" / "r.journal", 4 * 1024 * 1024)
        self.recovered = recover(self.journal, self.catalogue, self.store, self.wanted)
        self.retirer = Retirer(self.journal, Journals(self.db), self.store)
        self.committer = Committer(self.store, self.catalogue, lambda: None)
        self.applier = Applier(self.store, self.catalogue, self.retirer, lambda: None)
        self.applies = False
        self.ingest = Ingest(
            self.store,
            self.committer,
            self.wanted,
            reserve_bytes=1,
            safe=Safe(self.journal, self.applier),
        )

    def acknowledge(self, sent: Sent, *, settle: bool = True) -> int:
        incoming = self.ingest.begin(sent.request)
        incoming.write(memoryview(sent.data))
        status = incoming.finish().status
        item = incoming.settle() if settle else None
        if item is not None:
            if not self.applies:
                self.applier.start()
                self.applies = True
            assert item.applied.wait(60)
        return status

    def served(self) -> dict[str, bytes]:
        rows = self.db.rows("SELECT SOPInstanceUID, file, size, sha256 FROM instances")
        found = {}
        for row in rows:
            path = self.store.path(row["file"])
            assert durable.object_intact(path, row["sha256"]) and path.stat().st_size == row["size"]
            content = path.read_bytes()
            found[str(row["SOPInstanceUID"])] = content[144 + int.from_bytes(content[140:144], "little") :]
        return found

    def close(self) -> None:
        self.applier.close()
        self.committer.close()
        self.journal.close()
        self.db.close()

    def power_cut(self) -> Node:
        """Everything but the journal is gone."""
        self.close()
        for path in (self.folder / "index.sqlite", self.folder / "index.sqlite-wal", self.folder / "index.sqlite-shm"):
            path.unlink(missing_ok=True)
        durable.remove_tree(self.store.root)
        return Node(self.folder)

    def crash(self) -> Node:
        self.close()
        return Node(self.folder)


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def test_acknowledged_objects_survive_the_loss_of_files_and_rows(node: Node) -> None:
    sent = [store_request(sop=f"1.2.{n}") for n in range(5)]
    assert [node.acknowledge(s) for s in sent] == [0] * 5
    after = node.power_cut()
    assert after.recovered == 5
    assert after.served() == {s.request.sop_instance_uid: s.data for s in sent}
    assert after.journal.next_number == 6
    after.close()


def test_acknowledged_before_file_and_row_were_made(node: Node) -> None:
    sent = store_request()
    assert node.acknowledge(sent, settle=False) == 0
    assert node.served() == {}
    after = node.crash()
    assert after.served() == {sent.request.sop_instance_uid: sent.data}
    after.close()


def test_recovery_twice_makes_nothing_twice(node: Node) -> None:
    node.acknowledge(store_request())
    node.acknowledge(store_request(data_set(PatientID="P2")))
    after = node.crash()
    assert after.recovered == 2, "a crash alone left all in place; recovery makes it durable"
    again = after.crash()
    assert again.recovered == 0
    assert list(again.served().values()) == [data_set(PatientID="P2")], "the newest serves"
    assert again.db.value("SELECT count(*) FROM former_instances") == 1
    assert again.db.value("SELECT generation FROM series") == 2
    again.close()


def test_bytes_that_came_back_serve_again(node: Node) -> None:
    """A, B and A again under one UID; the process died before the last A had its row, and B's row is there."""
    first, second = store_request(), store_request(data_set(PatientID="P2"))
    assert node.acknowledge(first) == node.acknowledge(second) == 0
    assert node.acknowledge(first, settle=False) == 0
    after = node.crash()
    assert list(after.served().values()) == [first.data]
    assert {row["dataset_sha256"] for row in after.db.rows("SELECT dataset_sha256 FROM instances")} == {
        durable.sha256(first.data)
    }
    again = after.crash()
    assert list(again.served().values()) == [first.data]
    assert all(again.store.path(r["file"]).exists() for r in again.db.rows("SELECT file FROM former_instances"))
    again.close()


def test_a_record_does_not_take_the_place_of_what_was_received_later(node: Node) -> None:
    """It waited in a journal while another receiver took other bytes under its UID."""
    early, late = store_request(), store_request(data_set(PatientID="P2"))
    assert node.acknowledge(early, settle=False) == 0
    other = Ingest(node.store, node.committer, node.wanted, reserve_bytes=1).begin(late.request)
    other.write(memoryview(late.data))
    assert other.finish().status == 0
    after = node.crash()
    assert after.recovered == 1
    assert list(after.served().values()) == [late.data]
    (former,) = after.db.rows("SELECT * FROM former_instances")
    assert after.store.path(former["file"]).read_bytes().endswith(early.data)
    assert after.db.value("SELECT generation FROM series") == 1
    after.close()


def test_a_torn_file_with_a_row_is_mended(node: Node) -> None:
    sent = store_request()
    node.acknowledge(sent)
    (row,) = node.db.rows("SELECT file FROM instances")
    node.store.path(row["file"]).write_bytes(b"torn")
    after = node.crash()
    assert after.served() == {sent.request.sop_instance_uid: sent.data}
    after.close()


def test_the_copy_of_another_sender_that_never_became_durable_is_replaced(node: Node) -> None:
    """First copy's process died before its journal was written; the second was acknowledged as a duplicate."""
    first = store_request(calling_ae="OTHER")
    direct = Ingest(node.store, node.committer, node.wanted, reserve_bytes=1).begin(first.request)
    direct.write(memoryview(first.data))
    assert direct.finish().status == 0
    second = store_request()
    assert node.acknowledge(second) == 0
    (row,) = node.db.rows("SELECT file FROM instances")
    node.store.path(row["file"]).unlink()
    after = node.crash()
    assert after.served() == {second.request.sop_instance_uid: second.data}
    after.close()


def test_refused_objects_do_not_come_back(node: Node) -> None:
    assert node.acknowledge(store_request(data_set("9.9.9"))) == 0xA900
    assert node.acknowledge(store_request(data_set()[:-1])) == 0xC000
    after = node.power_cut()
    assert after.recovered == 0 and after.served() == {}
    after.close()


def test_a_full_journal_means_the_slower_way(node: Node) -> None:
    big = data_set(BitsAllocated=8, PixelData=b"x" * 700_000)
    sent = [store_request(big.replace(b"1.2.3.4", b"1.2.3.%d" % n), sop=f"1.2.3.{n}") for n in range(9)]
    assert [node.acknowledge(s) for s in sent] == [0] * 9
    assert node.journal.used() > 0.6
    assert len(held(node.journal)) < 9
    assert node.served() == {s.request.sop_instance_uid: s.data for s in sent}
    node.close()


def test_retired_records_are_durable_and_free_the_ring(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files, their folder, then the index; only then may the ring use the place again."""
    steps: list[str] = []
    real_sync, real_folder, real_retire = durable.sync_file, durable.sync_directory, Journals.retire
    monkeypatch.setattr(durable, "sync_file", lambda p: (steps.append("file"), real_sync(p))[1])
    monkeypatch.setattr(durable, "sync_directory", lambda p: (steps.append("folder"), real_folder(p)))

    def retire(journals: Journals, mark: str, number: int) -> None:
        assert node.journal.used() > 0
        steps.append(f"index {number}")
        real_retire(journals, mark, number)

    monkeypatch.setattr(Journals, "retire", retire)
    node.retirer.start(node.journal.next_number)
    for n in range(3):
        node.acknowledge(store_request(sop=f"1.2.{n}"))
    node.retirer.close()
    assert steps == ["file"] * 3 + ["folder", "index 3"]
    assert node.journal.used() == 0
    assert node.crash().recovered == 0


def test_a_retirement_that_fails_is_tried_again_after_a_pause(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """However full the ring is: without the pause a full disk would be written full of log lines."""
    attempts: list[int] = []
    tried = threading.Event()

    def full(_journals: Journals, _mark: str, number: int) -> None:
        attempts.append(number)
        tried.set()
        raise StorageError("commit to the index", "no space left")

    big = data_set(BitsAllocated=8, PixelData=b"x" * 700_000)
    with monkeypatch.context() as patch:
        patch.setattr(retire_module, "RETRY_SECONDS", 3600.0)
        patch.setattr(Journals, "retire", full)
        node.retirer.start(node.journal.next_number)
        for n in range(4):
            assert node.acknowledge(store_request(big.replace(b"1.2.3.4", b"1.2.3.%d" % n), sop=f"1.2.3.{n}")) == 0
        assert tried.wait(60)
        assert node.journal.used() > retire_module.FULL_ENOUGH
        for n in range(9):
            assert (
                node.acknowledge(store_request(data_set().replace(b"1.2.3.4", b"1.2.4.%d" % n), sop=f"1.2.4.{n}")) == 0
            )
        assert len(attempts) == 1
        patch.setattr(Journals, "retire", lambda *_: attempts.append(-1))
        node.retirer.close()
    after = node.crash()
    assert after.recovered == 13
    after.close()


def test_a_gap_is_not_passed(node: Node) -> None:
    """A record whose object has no row yet must be found again, so nothing after it is retired."""
    node.retirer.start(node.journal.next_number)
    node.acknowledge(store_request(sop="1.2.1"))
    node.acknowledge(store_request(sop="1.2.2"), settle=False)
    node.acknowledge(store_request(sop="1.2.3"))
    node.retirer.close()
    assert Journals(node.db).retired(node.journal.mark) == 1
    after = node.crash()
    assert set(after.served()) == {"1.2.1", "1.2.2", "1.2.3"}
    after.close()


def test_an_error_after_the_acknowledgement_ends_the_process(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(error: BaseException) -> Any:
        raise SystemExit(str(error))

    def full(*_: Any, **__: Any) -> Any:
        raise StorageError("commit to the index", "no space left")

    sent = store_request()
    incoming = node.ingest.begin(sent.request)
    incoming.write(memoryview(sent.data))
    assert incoming.finish().status == 0
    assert incoming.settle() is not None
    monkeypatch.setattr(durable, "die", dies)
    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "commit", full)
        with pytest.raises(SystemExit, match="no space left"):
            node.applier._run()
    after = node.crash()
    assert set(after.served()) == {"1.2.3.4"}
    after.close()


def test_acknowledged_bytes_that_wait_are_bounded(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third object is acknowledged only when the first two have their rows."""
    monkeypatch.setattr(apply_module, "MOST_BYTES", 10)
    items = []
    for n in range(1):
        sent = store_request(sop=f"1.2.{n}")
        incoming = node.ingest.begin(sent.request)
        incoming.write(memoryview(sent.data))
        assert incoming.finish().status == 0
        items.append(incoming.settle())
    third = store_request(sop="1.2.9")
    incoming = node.ingest.begin(third.request)
    incoming.write(memoryview(third.data))
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(incoming.finish)
        assert not answer.done()
        node.applier.start()
        assert answer.result(60).status == 0
        assert all(item is not None and item.applied.is_set() for item in items)
    incoming.settle()
    node.close()


def test_failed_journal_write_is_no_acknowledgement(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(error: BaseException) -> Any:
        raise SystemExit(str(error))

    def fails(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(durable, "die", dies)
    monkeypatch.setattr(durable.Steps, "fdatasync", staticmethod(fails))
    with pytest.raises(SystemExit, match="Input/output error"):
        node.acknowledge(store_request())
    node.close()


def test_journals_of_receivers_that_are_gone_are_recovered(node: Node, tmp_path: Path) -> None:
    node.acknowledge(store_request(), settle=False)
    node.journal.close()
    own = Journal(tmp_path / "journal" / "other.journal", SIZE)
    folder = tmp_path / "journal"
    assert recover_others(folder, own.path, node.catalogue, node.store, node.wanted) == 1
    assert set(node.served()) == {"1.2.3.4"}
    assert recover_others(folder, own.path, node.catalogue, node.store, node.wanted) == 0
    own.close()
    node.close()
