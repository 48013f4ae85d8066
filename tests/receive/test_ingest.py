"""C-STORE up to its status: success only for what survives, whatever step fails."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from dicomnode import durable
from dicomnode.durable import ObjectStore
from dicomnode.errors import StorageError
from dicomnode.header import Wanted
from dicomnode.index.catalogue import Catalogue, NewInstance, Stored
from dicomnode.index.database import Database
from dicomnode.index.keys import HEADER_KEYS
from dicomnode.receive import commit as commit_module
from dicomnode.receive import ingest as ingest_module
from dicomnode.receive.commit import Committer
from dicomnode.receive.ingest import Ingest, StoreAnswer, StoreRequest
from tests.index.rows import CT_IMAGE, FakeClock

IMPLICIT = "1.2.840.10008.1.2"
ROOT = Path(__file__).resolve().parents[2]


def data_set(sop: str = "1.2.3.4", **fields: Any) -> bytes:
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = CT_IMAGE, sop
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientID = "1.2.10", "1.2.20", "P1"
    for keyword, value in fields.items():
        setattr(ds, keyword, value)
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = True, True
    write_dataset(buffer, ds)
    return buffer.getvalue()


class Sent(NamedTuple):
    """A C-STORE-RQ with its data set."""

    request: StoreRequest
    data: bytes


def store_request(data: bytes | None = None, sop: str = "1.2.3.4", **changes: Any) -> Sent:
    values: dict[str, Any] = {
        "sop_class_uid": CT_IMAGE,
        "sop_instance_uid": sop,
        "transfer_syntax_uid": IMPLICIT,
        "calling_ae": "CT1",
        "association_id": "",
        "peer": "ct",
    }
    return Sent(StoreRequest(**{**values, **changes}), data_set(sop) if data is None else data)


@dataclass
class Lane:
    """An ingest on a fresh store and index."""

    folder: Path
    db: Database
    commits: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.store_ = ObjectStore(self.folder)
        self.store_.prepare()
        self.committer = Committer(self.store_, Catalogue(self.db), lambda: self.commits.append(1))
        self.ingest = Ingest(self.store_, self.committer, Wanted(HEADER_KEYS), reserve_bytes=1)

    def store(self, sent: Sent, fragment: int = 100) -> StoreAnswer:
        incoming = self.ingest.begin(sent.request)
        for begin in range(0, len(sent.data), fragment):
            incoming.write(memoryview(sent.data)[begin : begin + fragment])
        return incoming.finish()

    def files(self) -> set[str]:
        return {f"{p.parent.name}/{p.name}" for p in self.store_.root.rglob("*") if p.is_file()}

    def rows(self) -> set[str]:
        return {str(r["file"]) for r in self.db.rows("SELECT file FROM instances")}


@pytest.fixture
def lane(tmp_path: Path, db: Database) -> Iterator[Lane]:
    yield Lane(tmp_path / "data", db)


@pytest.fixture(params=["in memory", "spilled"])
def small_or_spilled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Objects that fit in memory, and the same ones as if they did not."""
    if request.param == "spilled":
        monkeypatch.setattr(ingest_module, "SPILL_BYTES", 64)
        monkeypatch.setattr(ingest_module, "FLUSH_BYTES", 128)
    return str(request.param)


@pytest.mark.usefixtures("small_or_spilled")
def test_stored_bytes_are_the_received_ones(lane: Lane) -> None:
    data = data_set(PatientName="A^B")
    answer = lane.store(store_request(data))
    assert answer.status == 0x0000
    (row,) = lane.db.rows("SELECT * FROM instances")
    content = lane.store_.path(row["file"]).read_bytes()
    assert content.endswith(data) and len(content) == row["size"]
    assert durable.sha256_object(lane.store_.path(row["file"])) == row["sha256"]
    assert durable.sha256(data) == row["dataset_sha256"]
    ds = pydicom.dcmread(io.BytesIO(content))
    assert ds.file_meta.TransferSyntaxUID == IMPLICIT and ds.PatientName == "A^B"
    assert ds.file_meta.SourceApplicationEntityTitle == "CT1"


@pytest.mark.usefixtures("small_or_spilled")
def test_duplicate_and_replaced(lane: Lane) -> None:
    assert lane.store(store_request()).status == 0
    before = lane.files()
    again = lane.store(store_request())
    assert (again.status, again.cause) == (0, Stored.duplicate)
    assert lane.files() == before, "the second copy is not kept"
    other = lane.store(store_request(data_set(PatientID="P2")))
    assert (other.status, other.cause) == (0, Stored.replaced)
    assert before < lane.files(), "the former bytes stay"
    assert lane.rows() == lane.files() - before


@pytest.mark.usefixtures("small_or_spilled")
@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (store_request(data_set(), sop="../../etc/passwd"), 0xA900),
        (store_request(data_set(), sop="/abs/1"), 0xA900),
        (store_request(data_set(), sop=""), 0xA900),
        (store_request(data_set(), sop="1" * 65), 0xA900),
        (store_request(data_set(), sop="1.2\0"), 0xA900),
        (store_request(data_set(), sop="1.2\n"), 0xA900),
        (store_request(data_set(), sop="1.2.%2e"), 0xA900),
        (store_request(data_set(), sop="١.٢"), 0xA900),
        (store_request(sop_class_uid="x"), 0xA900),
        (store_request(sop_class_uid="1.2.3"), 0xA900),
        (store_request(data_set("9.9.9")), 0xA900),
        (store_request(data_set(StudyInstanceUID="")), 0xA900),
        (store_request(data_set(SeriesInstanceUID="")), 0xA900),
        (store_request(data_set().replace(b"1.2.20", b"../../")), 0xA900),
        (store_request(data_set().replace(b"1.2.10", b"1.2/10")), 0xA900),
        (store_request(b""), 0xA900),
        (store_request(data_set()[:-1]), 0xC000),
        (store_request(b"\xff" * 20), 0xA900),
        (store_request(b"\x08\x00\x40\x11\xff\xff\xff\xff" * 20), 0xC000),
    ],
)
def test_refused_with_the_status_of_the_standard(lane: Lane, request_: Sent, status: int) -> None:
    answer = lane.store(request_)
    assert answer.status == status and answer.cause
    assert (
        request_.request.sop_instance_uid not in (answer.cause + answer.hint) or not request_.request.sop_instance_uid
    )
    assert lane.files() == set() and lane.rows() == set()


def test_reserve_is_not_touched(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    request = store_request()
    lane.ingest._reserve = 10_000
    monkeypatch.setattr(durable, "free_bytes", lambda _: 10_000 + len(request.data) - 1)
    answer = lane.store(request)
    assert answer.status == 0xA700 and "Free space" in answer.hint
    assert lane.files() == set()
    monkeypatch.setattr(durable, "free_bytes", lambda _: 10_000 + len(request.data))
    assert lane.store(request).status == 0, "resumes unaided"


FAULTS = [
    ("open", errno.ENOSPC),
    ("open", errno.EIO),
    ("write", errno.ENOSPC),
    ("write", errno.EIO),
    ("fsync", errno.ENOSPC),
    ("rename", errno.ENOSPC),
    ("rename", errno.EIO),
]


@pytest.mark.usefixtures("small_or_spilled")
@pytest.mark.parametrize(("step", "code"), FAULTS)
def test_failed_file_step_is_out_of_resources(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, step: str, code: int
) -> None:
    def fails(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(durable.Steps, step, staticmethod(fails))
        assert lane.store(store_request()).status == 0xA700
    assert lane.files() == set() and lane.rows() == set() and lane.commits == []
    assert lane.store(store_request()).status == 0


@pytest.mark.usefixtures("small_or_spilled")
@pytest.mark.parametrize(
    "error", [StorageError("commit to the index", "no space left", retryable=True), apsw.FullError()]
)
def test_failed_commit_is_out_of_resources(lane: Lane, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = Catalogue._settle

    def settle(self: Catalogue, adding: Any) -> None:
        real(self, adding)
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "_settle", settle)
        assert lane.store(store_request()).status == 0xA700
    assert lane.files() == set() and lane.rows() == set()
    assert lane.store(store_request()).status == 0, "the committer lives on"


def test_unexpected_error_of_a_commit_reaches_the_caller(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    def settle(self: Catalogue, adding: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Catalogue, "_settle", settle)
        with pytest.raises(ZeroDivisionError):
            lane.store(store_request())
    assert lane.rows() == set()
    assert lane.store(store_request()).status == 0


DYING = """
import errno, pathlib, sys
sys.path.insert(0, sys.argv[2])
from dicomnode import durable
from dicomnode.index.database import Database
from tests.receive.test_ingest import Lane, store_request
folder = pathlib.Path(sys.argv[1])
lane = Lane(folder, Database(folder))
real, left = durable.steps.fsync, [int(sys.argv[3])]
def fsync(fd):
    left[0] -= 1
    if left[0] < 0:
        raise OSError(errno.EIO, "Input/output error")
    real(fd)
durable.Steps.fsync = staticmethod(fsync)
print("answered", lane.store(store_request()).status, flush=True)
"""


@pytest.mark.parametrize(("survived", "answered"), [(0, False), (1, False), (2, True)])
def test_fsync_error_ends_the_process_without_an_answer(tmp_path: Path, survived: int, answered: bool) -> None:
    """First fsync: the file, second: its folder."""
    done = subprocess.run(
        [sys.executable, "-c", DYING, str(tmp_path), str(ROOT), str(survived)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )
    assert ("answered 0" in done.stdout) is answered, done.stderr
    assert done.returncode == (0 if answered else durable.EXIT_STORAGE)
    db = Database(tmp_path, FakeClock())
    assert db.value("SELECT count(*) FROM instances") == (1 if answered else 0)
    db.close()


class Recorder:
    """Writes down the order of everything that durability rests on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        self.paths: dict[int, str] = {}
        for name in ("open", "write", "fsync", "rename"):
            monkeypatch.setattr(durable.Steps, name, staticmethod(self._wrap(name, getattr(durable.steps, name))))
        commit = Catalogue.commit

        def recorded(catalogue: Catalogue, batch: list[NewInstance]) -> list[Stored]:
            self.seen.append("begin")
            outcome = commit(catalogue, batch)
            self.seen.append("committed")
            return outcome

        monkeypatch.setattr(Catalogue, "commit", recorded)

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            result = real(*arguments)
            if name == "open":
                self.paths[result] = "directory" if Path(arguments[0]).is_dir() else "file"
            elif name == "rename":
                self.seen.append("rename")
            else:
                self.seen.append(f"{name} {self.paths[arguments[0]]}")
            return result

        return step


CONTRACT = ["write file", "fsync file", "rename", "fsync directory", "begin", "committed", "answer 0x0000"]


def keeps_contract(seen: list[str]) -> bool:
    """ARCHITECTURE.md, "The acknowledgement"."""
    return seen == CONTRACT


def test_nothing_is_acknowledged_before_it_is_durable(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(monkeypatch)
    answer = lane.store(store_request())
    recorder.seen.append(f"answer 0x{answer.status:04X}")
    assert keeps_contract(recorder.seen), recorder.seen


@pytest.mark.parametrize("missing", CONTRACT)
def test_the_contract_notices_a_step_that_is_missing_or_late(missing: str) -> None:
    without = [step for step in CONTRACT if step != missing]
    assert not keeps_contract(without)
    assert not keeps_contract([*without, missing]) or missing == CONTRACT[-1]


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("write_synced", lambda path, parts, sync: path.write_bytes(b"".join(parts))),
        ("sync_directory", lambda path: None),
        ("rename_into_place", os.rename),
    ],
)
def test_the_recording_notices_a_node_that_skips_a_step(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, name: str, broken: Callable[..., Any]
) -> None:
    recorder = Recorder(monkeypatch)
    monkeypatch.setattr(durable, name, broken)
    answer = lane.store(store_request())
    recorder.seen.append(f"answer 0x{answer.status:04X}")
    assert answer.status == 0 and not keeps_contract(recorder.seen)


def test_waiting_associations_share_a_commit(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    real, batches = Catalogue.commit, []
    entered, go = threading.Event(), threading.Event()

    def commit(catalogue: Catalogue, batch: list[NewInstance]) -> list[Stored]:
        batches.append(len(batch))
        entered.set()
        assert go.wait(30)
        return real(catalogue, batch)

    monkeypatch.setattr(Catalogue, "commit", commit)
    arrived = threading.Semaphore(0)

    class Turn(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            arrived.release()
            return super().wait(timeout)

    class Ticket(commit_module._Ticket):
        def __init__(self, instance: NewInstance) -> None:
            super().__init__(instance, Turn())

    monkeypatch.setattr(commit_module, "_Ticket", Ticket)
    with ThreadPoolExecutor(12) as pool:
        first = pool.submit(lane.store, store_request(sop="1.2.0"))
        assert entered.wait(30)
        rest = [pool.submit(lane.store, store_request(sop=f"1.2.{n}")) for n in range(1, 12)]
        for _ in rest:
            assert arrived.acquire(timeout=30)
        go.set()
        assert [f.result(30).status for f in (first, *rest)] == [0] * 12
    assert batches == [1, 11]
    assert lane.rows() == lane.files() and len(lane.rows()) == 12
    assert len(lane.commits) == 2


def test_failure_of_a_shared_commit_reaches_every_one(lane: Lane, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit(catalogue: Catalogue, batch: list[NewInstance]) -> list[Stored]:
        raise StorageError("commit to the index", "locked", retryable=True)

    monkeypatch.setattr(Catalogue, "commit", commit)
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda n: lane.store(store_request(sop=f"1.2.{n}")), range(6)))
    assert [a.status for a in answers] == [0xA700] * 6 and lane.files() == set()
