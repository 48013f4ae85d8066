"""The intake journal: a ring that gives back whole records, and what a power cut leaves of it."""

from __future__ import annotations

import itertools
import os
import struct
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
from dicomnode.receive import recovery
from dicomnode.receive import retire as retire_module
from dicomnode.receive.apply import Applier
from dicomnode.receive.commit import Committer
from dicomnode.receive.ingest import Ingest, Safe
from dicomnode.receive.journal import BLOCK, Buffer, Entry, Journal, checksum, padded
from dicomnode.receive.progress import Progress
from dicomnode.receive.recovery import recover, recover_others
from dicomnode.receive.retire import Retirer
from tests.peers import wait_for
from tests.receive.test_ingest import Sent, data_set, store_request

SIZE = 64 * BLOCK


def write(journal: Journal, data: bytes) -> Entry:
    place = journal.reserve(len(data))
    assert place is not None
    buffer = Buffer(len(data), journal.path)
    assert buffer.add(memoryview(data))
    entry = journal.finish(place, buffer, 0, b"fields", checksum(data))
    journal.sync(buffer)
    buffer.close()
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


STEP = st.tuples(st.integers(0, 12 * BLOCK), st.lists(st.integers(0, 40), max_size=4), st.integers(0, 8 * BLOCK))


@given(st.lists(STEP, max_size=60))
def test_what_is_held_is_never_overwritten(steps: list[tuple[int, list[int], int]]) -> None:
    """Records of any size, released in any order, some reserved larger than they become: none lies on another."""
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"journal-{os.getpid()}" / "h.journal"
    durable.remove_tree(path.parent)
    journal = Journal(path, SIZE)
    kept: dict[int, tuple[Entry, bytes, int]] = {}
    buffer = Buffer(SIZE, path)
    try:
        for size, released, spare in steps:
            for number in released:
                if number in kept:
                    journal.release(kept.pop(number)[0].place)
            place = journal.reserve(size + spare)
            if place is None:
                assert kept, "an empty ring has room"
                continue
            data = os.urandom(8).ljust(size, b"x")[:size]
            buffer.size = 0
            buffer.add(memoryview(data))
            streamed = size // 2 // BLOCK * BLOCK
            if streamed:
                journal.stream(place, buffer, 0, streamed)
            entry = journal.finish(place, buffer, streamed, b"", checksum(data))
            journal.sync(buffer)
            kept[entry.number] = (entry, data, journal._lengths[place.begin])
            places = sorted((e.place.begin, e.place.begin + length) for e, _, length in kept.values())
            assert all(a[1] <= b[0] for a, b in itertools.pairwise(places))
            assert places[0][0] >= BLOCK and places[-1][1] <= SIZE
        found = held(journal)
        assert {n: found.get(n) for n in kept} == {n: data for n, (_, data, _) in kept.items()}
        memory = memoryview(bytearray(SIZE))
        assert all(journal.read(entry, memory) == data for entry, data, _ in kept.values())
        assert journal.used() == sum(length for *_, length in kept.values()) / (SIZE - BLOCK)
    finally:
        buffer.close()
        journal.close()
        durable.remove_tree(path.parent)


def test_a_record_that_is_held_for_long_does_not_end_the_ring(journal: Journal) -> None:
    """A sender that stands still in the middle of its object; others go on around it."""
    stuck = journal.reserve(10 * BLOCK)
    for _ in range(40):
        journal.release(write(journal, b"x" * 5 * BLOCK).place)
    assert stuck is not None and journal.used() == 11 * BLOCK / (SIZE - BLOCK)


@pytest.mark.parametrize("place", [0, 4999, padded(5000) + 3, padded(5000) + 40, padded(5000) + 200])
def test_a_torn_record_is_left_out(journal: Journal, place: int) -> None:
    write(journal, b"a" * 5000)
    torn = write(journal, b"b" * 5000)
    write(journal, b"c" * 5000)
    with journal.path.open("r+b") as file:
        file.seek(torn.place.begin + place)
        byte = file.read(1)
        file.seek(torn.place.begin + place)
        file.write(bytes([byte[0] ^ 1]))
    assert set(held(journal)) == {1, 3} | ({2} if place == padded(5000) + 200 else set())


def test_data_that_looks_like_a_record_is_none(journal: Journal) -> None:
    write(journal, b"x" * 100)
    with journal.path.open("rb") as file:
        file.seek(2 * BLOCK)
        tail = file.read(BLOCK)
    write(journal, b"x" * BLOCK + tail[:8] + bytes(16) + tail[24:])
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
        self.progress = Progress(folder / "journal" / "r.progress", own=True)
        self.applier = Applier(
            self.journal, self.store, self.catalogue, self.retirer, self.progress, self.wanted, lambda: None
        )
        self.applies = False
        self.ingest = Ingest(
            self.store,
            self.committer,
            self.wanted,
            reserve_bytes=1,
            safe=Safe(self.journal, self.applier),
        )

    def receive(self, sent: Sent) -> int:
        incoming = self.ingest.begin(sent.request)
        for begin in range(0, len(sent.data), 100_000):
            incoming.write(memoryview(sent.data)[begin : begin + 100_000])
        return incoming.finish().status

    def acknowledge(self, sent: Sent, *, applies: bool = True) -> int:
        """Receive, and have it in the index; without ``applies`` the process died right after the answer."""
        put = self.applier.put
        if not applies:
            self.applier.put = lambda item: None  # type: ignore[method-assign]
        try:
            status = self.receive(sent)
        finally:
            self.applier.put = put  # type: ignore[method-assign]
        if applies:
            if not self.applies:
                self.applier.start()
                self.applies = True
            self.applier.catch_up()
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
    assert node.acknowledge(sent, applies=False) == 0
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


def test_recovery_of_many_is_durable_before_the_journal_is_empty(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = [store_request(sop=f"1.2.{n}") for n in range(5)]
    assert [node.acknowledge(s, applies=False) for s in sent] == [0] * 5
    monkeypatch.setattr(recovery, "BATCH", 2)
    steps: list[str] = []
    real_sync, real_folder, real_retire = durable.sync_file, durable.sync_directory, Journals.retire
    monkeypatch.setattr(durable, "sync_file", lambda p: (steps.append("file"), real_sync(p))[1])

    def folder(path: Path) -> None:
        if path.parent.name == "objects":
            steps.append("folder")
        real_folder(path)

    def retire(journals: Journals, mark: str, number: int) -> None:
        steps.append(f"index {number}")
        real_retire(journals, mark, number)

    monkeypatch.setattr(durable, "sync_directory", folder)
    monkeypatch.setattr(Journals, "retire", retire)
    after = node.crash()
    two = ["file", "file", "folder"]
    assert steps == [*two, "index 2", *two, "index 4", "file", "folder", "index 5"]
    assert len(after.served()) == 5
    after.close()


def test_bytes_that_came_back_serve_again(node: Node) -> None:
    """A, B and A again under one UID; the process died before the last A had its row, and B's row is there."""
    first, second = store_request(), store_request(data_set(PatientID="P2"))
    assert node.acknowledge(first) == node.acknowledge(second) == 0
    assert node.acknowledge(first, applies=False) == 0
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
    assert node.acknowledge(early, applies=False) == 0
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


def test_what_is_sent_again_needs_no_second_fsync(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    real = durable.sync_file
    monkeypatch.setattr(durable, "sync_file", lambda p: (synced.append(p), real(p))[1])
    monkeypatch.setattr(retire_module, "OLDEST_SECONDS", 0.0)
    node.retirer.start(node.journal.next_number)
    for count in range(1, 4):
        node.acknowledge(store_request())
        wait_for(lambda n=count: Journals(node.db).retired(node.journal.mark) == n, 20, "it is retired")
    node.retirer.close()
    assert len(synced) == 1
    assert node.crash().recovered == 0


def test_a_gap_is_not_passed(node: Node) -> None:
    """A record whose object has no row yet must be found again, so nothing after it is retired."""
    node.retirer.start(node.journal.next_number)
    node.acknowledge(store_request(sop="1.2.1"))
    node.acknowledge(store_request(sop="1.2.2"), applies=False)
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
    assert node.receive(sent) == 0
    monkeypatch.setattr(durable, "die", dies)
    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "commit", full)
        with pytest.raises(SystemExit, match="no space left"):
            node.applier._run()
    after = node.crash()
    assert set(after.served()) == {"1.2.3.4"}
    after.close()


@pytest.mark.parametrize("limit", ["TOO_MUCH", "TOO_MANY"])
def test_what_waits_is_bounded(node: Node, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    """The second object is acknowledged only when the first has its row."""
    monkeypatch.setattr(apply_module, limit, 0)
    assert node.receive(store_request(sop="1.2.0")) == 0
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(node.receive, store_request(sop="1.2.9"))
        with pytest.raises(TimeoutError):
            answer.result(0.2)
        node.applier.start()
        assert answer.result(60) == 0
    assert "1.2.0" in node.served()
    node.close()


def test_a_burst_is_applied_when_it_is_over(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """While objects come the sender has the processor; whoever asks for them gets them at once."""
    monkeypatch.setattr(apply_module, "QUIET_SECONDS", 30.0)
    monkeypatch.setattr(apply_module, "LONGEST_SECONDS", 30.0)
    node.applier.start()
    assert [node.receive(store_request(sop=f"1.2.{n}")) for n in range(3)] == [0] * 3
    assert node.served() == {}
    order: list[int] = []
    node.applier.then(lambda: order.append(len(node.served())))
    assert order == []
    node.applier.catch_up()
    assert len(node.served()) == 3
    node.applier.close()
    assert order == [3]


def test_what_waits_for_long_is_not_put_off_by_what_comes(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sender that never rests: each object is in the index some seconds later, not only the first few."""
    now = 100.0
    monkeypatch.setattr(apply_module.time, "monotonic", lambda: now)
    for n in range(3 * apply_module.MAX_BATCH):
        assert node.receive(store_request(sop=f"1.2.{n}")) == 0
        now += 0.001
    assert not node.applier._due()
    now = 100.09 + apply_module.LONGEST_SECONDS  # all but the last few have waited too long by now
    rounds = 0
    while node.applier._due():
        node.applier._work([node.applier._waiting.popleft()[1] for _ in range(apply_module.MAX_BATCH // 2)])
        node.applier._newest_at = now
        rounds += 1
    assert rounds == 6
    node.close()


def test_files_still_to_be_made_have_their_room(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reserve is not for them: what is acknowledged must not find the disk full."""
    data = data_set(BitsAllocated=8, PixelData=b"x" * 500_000)
    sent = [store_request(data.replace(b"1.2.3.4", b"1.2.3.%d" % n), sop=f"1.2.3.{n}") for n in range(3)]
    monkeypatch.setattr(durable, "free_bytes", lambda path: 1_200_000)
    assert [node.receive(s) for s in sent] == [0, 0, 0xA700]
    node.close()


@pytest.mark.parametrize("limit", ["QUIET_SECONDS", "LONGEST_SECONDS", "MUCH", "MANY"])
def test_what_ends_the_rest(node: Node, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    for name in ("QUIET_SECONDS", "LONGEST_SECONDS"):
        monkeypatch.setattr(apply_module, name, 3600.0)
    monkeypatch.setattr(apply_module, limit, 0)
    done = threading.Event()
    assert node.receive(store_request()) == 0
    node.applier.then(done.set)
    node.applier.start()
    assert done.wait(20)
    assert set(node.served()) == {"1.2.3.4"}
    node.close()


def test_long_objects_are_in_the_journal_before_their_end(node: Node) -> None:
    """And those that grow too long for it, or break off, leave no trace there."""
    data = data_set(BitsAllocated=8, PixelData=b"x" * 700_000)
    incoming = node.ingest.begin(store_request(data).request)
    incoming.write(memoryview(data)[:400_000])
    assert node.journal.used() > 0
    with node.journal.path.open("rb") as file:
        assert data[:390_000] in file.read()
    incoming.discard()
    assert node.journal.used() == 0
    grown = data_set(BitsAllocated=8, PixelData=b"x" * 1_500_000)
    assert node.acknowledge(store_request(grown)) == 0
    assert node.journal.used() == 0
    assert node.acknowledge(store_request(data.replace(b"1.2.3.4", b"1.2.3.5"), sop="1.2.3.5")) == 0
    assert node.served() == {"1.2.3.4": grown, "1.2.3.5": data.replace(b"1.2.3.4", b"1.2.3.5")}
    after = node.power_cut()
    assert set(after.served()) == {"1.2.3.5"}, "the long one has a file and a row of its own"
    after.close()


def test_the_header_is_read_before_the_end_only_where_it_is_whole(node: Node) -> None:
    """A private value that reaches over the first part must not pass for the end of the header."""
    value = b"\x09\x00\x10\x10" + struct.pack("<I", 300_000) + bytes(300_000)
    head = data_set(BitsAllocated=8, PixelData=b"x" * 200_000)
    place = head.index(b"\x20\x00\x0d\x00")
    data = head[:place] + value + head[place:]
    assert node.acknowledge(store_request(data)) == 0
    assert node.acknowledge(store_request(data[:-100_001])) == 0, "what follows Pixel Data's head is not looked at"
    broken = head[:place] + value[:4] + b"\xff\xff\xff\x7f" + value[8:] + head[place:]
    assert node.acknowledge(store_request(broken)) == 0xC000
    node.close()


@pytest.mark.parametrize("keep_index", [True, False])
@pytest.mark.parametrize("applied", range(4))
def test_the_same_bytes_again_after_others(node: Node, applied: int, keep_index: bool) -> None:
    """A, B, A: the newest serves, however many of them had their rows when the power went."""
    a, b = store_request(data_set()), store_request(data_set(PatientComments="other"))
    for number, sent in enumerate((a, b, a)):
        assert node.acknowledge(sent, applies=number < applied) == 0
    after = node.crash() if keep_index else node.power_cut()
    assert after.served() == {"1.2.3.4": a.data}
    again = after.crash()
    assert again.served() == {"1.2.3.4": a.data}
    again.close()


def test_what_another_receiver_took_later_serves(node: Node) -> None:
    """Two receivers: the older object gets its row last."""
    older, newer = store_request(), store_request(data_set(PatientComments="newer"))
    assert node.receive(older) == 0
    direct = Ingest(node.store, node.committer, node.wanted, reserve_bytes=1).begin(newer.request)
    direct.write(memoryview(newer.data))
    assert direct.finish().status == 0
    node.applier.start()
    node.applier.catch_up()
    assert node.served() == {"1.2.3.4": newer.data}
    (former,) = node.db.rows("SELECT * FROM former_instances")
    assert durable.object_intact(node.store.path(former["file"]), former["sha256"])
    after = node.crash()
    assert after.served() == {"1.2.3.4": newer.data}
    assert after.db.value("SELECT count(*) FROM former_instances") == 1
    after.close()


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
    node.acknowledge(store_request(), applies=False)
    node.journal.close()
    own = Journal(tmp_path / "journal" / "other.journal", SIZE)
    folder = tmp_path / "journal"
    assert recover_others(folder, own.path, node.catalogue, node.store, node.wanted) == 1
    assert set(node.served()) == {"1.2.3.4"}
    assert recover_others(folder, own.path, node.catalogue, node.store, node.wanted) == 0
    own.close()
    node.close()
