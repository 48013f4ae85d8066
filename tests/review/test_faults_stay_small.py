"""One bad file, fault or odd moment must neither stop the others nor pass in silence."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE, evt

from dicomnode import app_shell, durable, header, logs, supervisor
from dicomnode.admin.ready import check_disk
from dicomnode.custody.sweep import GRACE_SECONDS, Sweeper
from dicomnode.deliver.scu import Outgoing, SendOutcome, Sent, send_batch
from dicomnode.durable import FANOUT, ObjectStore
from dicomnode.errors import EngineError, StorageError, UnsuitableSeries
from dicomnode.index.database import Database
from dicomnode.infer.decode import PoolDecoder, Undecodable
from dicomnode.infer.volume import read_header
from dicomnode.infer.worker import Worker
from dicomnode.receive.acceptor import Door, listen
from dicomnode.receive.listener import Listener
from dicomnode.receive.part10 import file_meta
from dicomnode.settings import Delivery, Peer, Settings
from dicomnode.supervisor import EXIT_CONFIGURATION, Child, Supervisor
from dicomnode.sync.stow import SLOWEST_BYTES_PER_SECOND, longest_seconds, request_timeout

CANARY = "CANARY^NAME"


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    made = Database(tmp_path / "data")
    yield made
    made.close()


def image(**attributes: Any) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = CTImageStorage, "1.2.3"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.PatientName = "1.2", "1.2.1", CANARY
    ds.Rows = ds.Columns = 2
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation, ds.PixelData = 15, 0, bytes(8)
    ds.update(attributes)
    return ds


def part10(ds: Dataset) -> bytes:
    out = io.BytesIO()
    pydicom.dcmwrite(out, ds, enforce_file_format=True)
    return out.getvalue()


# deliver


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"x" * 500, lambda data: data[:150]])
def test_a_damaged_result_file_does_not_stop_the_courier(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    ae = AE(ae_title="PACS")
    ae.add_supported_context(CTImageStorage)
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=[(evt.EVT_C_STORE, lambda _: 0)])
    peer = Peer(name="pacs", ae_title="PACS", host="127.0.0.1", port=server.socket.getsockname()[1])
    outgoing = []
    for key, data in enumerate((damage(part10(image())), part10(image()))):
        path = tmp_path / f"{key}.dcm"
        path.write_bytes(data)
        outgoing.append(Outgoing(key, path, CTImageStorage, ExplicitVRLittleEndian, f"1.5.{key}"))
    outcomes: list[SendOutcome] = []
    try:
        send_batch("NODE", peer, Delivery(connect_seconds=5, response_seconds=5), outgoing, outcomes.append)
    finally:
        server.shutdown()
    assert [o.sent for o in outcomes] == [Sent.rejected, Sent.stored]


# infer


def test_decoding_children_print_nothing_of_an_object(capfd: pytest.CaptureFixture[str]) -> None:
    bad = part10(image(NumberOfFrames="1")).replace(b"IS\x02\x001 ", b"IS\x02\x00ZQ")
    assert b"ZQ" in bad
    with PoolDecoder(1) as pool, pytest.raises(Undecodable):
        list(pool.frames([(bad, 2, 2)]))
    assert "ZQ" not in capfd.readouterr().err


def test_a_deflate_bomb_is_refused_before_it_is_inflated() -> None:
    data = part10(image())
    start = 144 + int.from_bytes(data[140:144], "little")
    meta = file_meta(
        sop_class_uid=CTImageStorage,
        sop_instance_uid="1.2.3",
        transfer_syntax_uid="1.2.840.10008.1.2.1.99",
        source_ae="CT1",
    )
    assert read_header(meta + _deflated(data[start:])).uid == "1.2.3"
    with pytest.raises(UnsuitableSeries, match="too large"):
        read_header(meta + _deflated(data[start:], bytes(1 << 20), 70))


def _deflated(data: bytes, filling: bytes = b"", times: int = 0) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    return packer.compress(data) + b"".join(packer.compress(filling) for _ in range(times)) + packer.flush()


def test_a_series_that_the_engine_fails_on_is_parked_in_the_end(db: Database, tmp_path: Path) -> None:
    def analyse(*_: Any, **__: Any) -> None:
        raise EngineError("run model", "GOLDEN_MISMATCH", "output is not finite")

    with db.transaction():
        db.insert("patients", {"PatientID": "P"})
        db.insert("studies", {"patient_id": 1, "StudyInstanceUID": "1.2"})
        db.insert("series", {"study_id": 1, "SeriesInstanceUID": "1.2.1"})
        row = {"series_id": 1, "model": "m", "state": "pending", "revision": 1, "priority": 1, "last_received_at": 0.0}
        db.insert("jobs", row)
    models: Any = SimpleNamespace(get=lambda _: SimpleNamespace(analyse=analyse))
    settings = Settings(node={"data_dir": tmp_path / "data"}, inference={"max_attempts": 2})
    decoder: Any = None
    worker = Worker(settings, db, models, lambda *_: [], owner="w", decoder=decoder, on_results=lambda: None)
    for _ in range(2):
        with db.transaction():
            db.execute("UPDATE jobs SET next_at = 0")
        assert worker.run_once()
    assert db.value("SELECT state FROM jobs") == "failed"


# receive


def test_an_unexpected_fault_while_storing_is_answered_and_told(db: Database, tmp_path: Path) -> None:
    settings = Settings(
        node={"data_dir": tmp_path / "data", "reserve_mb": 1},
        peers=[{"name": "ct1", "ae_title": "CT1", "allow": ["store"]}],
    )
    listening = listen("127.0.0.1", 0)
    listener = Listener(settings, db, [Door(listening)], "receiver-1")

    def broken(_: Any) -> None:
        raise KeyError(CANARY)

    listener.ingest = SimpleNamespace(begin=broken, buffers=listener.ingest.buffers)  # type: ignore[assignment]
    listener.start()
    sender = AE(ae_title="CT1")
    sender.add_requested_context(CTImageStorage, ExplicitVRLittleEndian)
    assoc = sender.associate("127.0.0.1", listening.getsockname()[1], ae_title="DICOMNODE")
    try:
        status = assoc.send_c_store(image())
    finally:
        assoc.release()
        listener.close()
    assert status.Status == 0x0110
    (event,) = db.rows("SELECT text FROM events WHERE kind = 'store-refused'")
    assert "KeyError" in event["text"] and "CANARY" not in event["text"]


def test_a_charset_padded_with_nul_is_understood_and_a_broken_one_is_the_default() -> None:
    """GB18030 has an odd length; senders that pad it with NUL exist (PS3.5 6.2 wants a space)."""
    name = "\u738b".encode("gb18030") + b"^A"

    def text(charset: bytes) -> str:
        data = struct.pack("<HH2sH", 8, 5, b"CS", len(charset)) + charset
        data += struct.pack("<HH2sH", 0x10, 0x10, b"PN", len(name)) + name
        return header.read_header(data, ExplicitVRLittleEndian, header.Wanted(["SpecificCharacterSet", "PatientName"]))[
            "PatientName"
        ]

    assert text(b"GB18030\0") == "\u738b^A"
    assert text(b"ISO\0IR 1") == name.decode("ascii", "replace")


def test_an_association_whose_end_could_not_be_recorded_is_recorded_later(db: Database, tmp_path: Path) -> None:
    door = Door(listen("127.0.0.1", 0))
    listener = Listener(Settings(node={"data_dir": tmp_path / "data"}), db, [door], "receiver-1")
    closed = listener.catalogue.association_closed
    listener.catalogue.association_opened(association_id="a", receiver="r", peer="p", ae="A", address="x")

    def full(*_: Any) -> None:
        raise StorageError("commit to the index", "no space left")

    listener.catalogue.association_opened(association_id="b", receiver="r", peer="p", ae="A", address="x")
    first, second = (SimpleNamespace(node_id=name, node_peer=object(), node_closed=False) for name in "ab")
    listener.catalogue.association_closed = full  # type: ignore[method-assign]
    listener._on_released(SimpleNamespace(assoc=first))
    listener.catalogue.association_closed = closed  # type: ignore[method-assign]
    listener._on_aborted(SimpleNamespace(assoc=second))
    assert db.rows("SELECT id, state FROM associations ORDER BY id") == [
        {"id": "a", "state": "released"},
        {"id": "b", "state": "aborted"},
    ]
    door.listening.close()


# custody


def test_an_acknowledged_object_survives_a_lost_index(tmp_path: Path) -> None:
    now = 1000.0
    clock: Any = SimpleNamespace(ticks=lambda: now)
    db = Database(tmp_path / "new-index", clock)  # the old one with the object's row is gone
    store = ObjectStore(tmp_path)
    store.prepare()
    whole = store.new_name("1.2.3")
    path = store.stage(whole, [b"acknowledged"])
    unnamed = path.with_name(f"x{durable.TEMPORARY_SUFFIX}")
    unnamed.write_bytes(b"half")
    sweeper = Sweeper(db, store)
    for _ in range(2 * FANOUT):
        sweeper.run_once()
        now += GRACE_SECONDS / FANOUT + 1
    assert (tmp_path / "strays" / path.name).read_bytes() == b"acknowledged"
    assert not path.exists() and not unnamed.exists()
    db.close()


# processes


def _tend(child: Child, watched: Supervisor, code: int) -> bool:
    child.process = SimpleNamespace(poll=lambda: code, pid=2**22 + 1)  # type: ignore[assignment]
    return watched._tend(child)


def test_a_child_that_did_work_does_not_end_the_node_with_78(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restarted receiver may find its port or lock still held by a former life in an fsync."""
    monkeypatch.setattr(Supervisor, "_reap_group", staticmethod(lambda pid: None))
    child = Child("c", ["x"])
    watched = Supervisor([child])
    assert _tend(child, watched, -9) and _tend(child, watched, EXIT_CONFIGURATION)
    assert not _tend(Child("new", ["x"]), watched, EXIT_CONFIGURATION)


def test_a_start_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any, **__: Any) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    child = Child("c", ["x"])
    watched = Supervisor([child])
    monkeypatch.setattr(supervisor.subprocess, "Popen", no_memory)
    assert watched._tend(child) and child.process is None and child.due > child.started
    monkeypatch.undo()
    child.due, child.argv = 0.0, [sys.executable, "-S", "-c", ""]
    assert watched._tend(child) and child.process is not None
    child.process.wait()


def test_a_fault_in_a_heartbeat_does_not_end_the_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app_shell, "BEAT_SECONDS", 0.001)
    beats = threading.Event()
    seen: list[int] = []

    def beat() -> None:
        seen.append(1)
        if len(seen) == 1:
            raise RuntimeError("dictionary changed size during iteration")
        beats.set()

    shell: Any = SimpleNamespace(_wake=threading.Event(), healthy=lambda: True, beat=beat, log=logs.get())
    thread = threading.Thread(target=app_shell.Shell._beat_loop, args=(shell,), daemon=True)
    thread.start()
    assert beats.wait(10)
    shell._wake.set()
    thread.join(10)


@pytest.mark.parametrize("where", ["main", "thread"])
def test_an_unforeseen_error_prints_its_type_and_no_value(where: str) -> None:
    code = (
        "import sys, threading\nfrom dicomnode import cli, logs\nlogs.configure('t', 'info', 'json')\n"
        f"def fail(*_): raise ValueError({CANARY!r})\n"
    )
    if where == "main":
        code += "cli._settings = fail\nsys.argv = ['dicomnode', 'check-config']\ncli.main()\n"
    else:
        code += "t = threading.Thread(target=fail)\nt.start()\nt.join()\n"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ}, check=False)
    assert "ValueError" in done.stderr and "CANARY" not in done.stderr
    assert (done.returncode == 1) == (where == "main")


# admin, sync


def test_a_broken_volume_is_a_line_of_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> int:
        raise StorageError("look at free space", "Input/output error")

    monkeypatch.setattr(durable, "free_bytes", broken)
    check = check_disk(Settings(node={"data_dir": tmp_path}))
    assert not check.ok and "Input/output error" in check.detail


def test_a_large_batch_gets_the_time_that_a_slow_line_needs() -> None:
    assert 60 <= longest_seconds(60.0, 1000) < 61
    assert longest_seconds(60.0, 100 * SLOWEST_BYTES_PER_SECOND) == 160.0
    assert request_timeout(60.0).connect == 30.0
