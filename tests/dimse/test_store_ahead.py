"""The SCU reads the next file while the peer works on the one before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian
from pynetdicom import AE, evt

from dicomnode.deliver.scu import Outgoing, SendOutcome, Sent, send_batch
from dicomnode.dimse import store
from dicomnode.dimse.store import NextFile, NotPart10, Opened
from dicomnode.settings import Delivery, Peer

DELIVERY = Delivery(connect_seconds=5, response_seconds=20)
UIDS = ("1.2.826.0.1.3680043.8.498.1", "1.2.826.0.1.3680043.8.498.2", "1.2.826.0.1.3680043.8.498.3")


@pytest.fixture
def objects(tmp_path: Path) -> list[Outgoing]:
    made = []
    for key, uid in enumerate(UIDS):
        ds = Dataset()
        ds.SOPClassUID, ds.SOPInstanceUID, ds.PatientID = CTImageStorage, uid, f"P{key}"
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        path = tmp_path / f"{key}.dcm"
        ds.save_as(path, enforce_file_format=True)
        made.append(Outgoing(key, path, str(CTImageStorage), str(ExplicitVRLittleEndian), uid))
    return made


@contextmanager
def pacs(on_store: Callable[[int, Dataset], int]) -> Iterator[Peer]:
    """An acceptor that asks ``on_store`` for its answer, with the number of the object."""
    ae = AE(ae_title="PACS")
    ae.add_supported_context(CTImageStorage, ExplicitVRLittleEndian)
    count = iter(range(100))
    handlers = [(evt.EVT_C_STORE, lambda event: on_store(next(count), event.dataset))]
    server = ae.start_server(("127.0.0.1", 0), block=False, evt_handlers=handlers)
    assert server is not None
    try:
        yield Peer(name="pacs", ae_title="PACS", host="127.0.0.1", port=server.socket.getsockname()[1])
    finally:
        server.shutdown()


def send(peer: Peer, objects: list[Outgoing]) -> list[SendOutcome]:
    outcomes: list[SendOutcome] = []
    send_batch("NODE", peer, DELIVERY, objects, outcomes.append)
    return outcomes


def test_the_next_file_is_read_before_the_answer(objects: list[Outgoing], monkeypatch: pytest.MonkeyPatch) -> None:
    read = {o.path: threading.Event() for o in objects}

    class Seen(Opened):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            read[path].set()

    monkeypatch.setattr(store, "Opened", Seen)
    ahead: list[bool] = []
    came: list[str] = []

    def on_store(number: int, ds: Dataset) -> int:
        came.append(str(ds.PatientID))
        if number + 1 < len(objects):
            ahead.append(read[objects[number + 1].path].wait(5))
        return 0

    with pacs(on_store) as peer:
        outcomes = send(peer, objects)
    assert ahead == [True, True]
    assert [o.sent for o in outcomes] == [Sent.stored] * 3
    assert came == ["P0", "P1", "P2"]


def test_a_file_that_cannot_be_read_is_told_in_its_turn(objects: list[Outgoing]) -> None:
    objects[1].path.unlink()
    objects[2].path.write_bytes(b"no DICOM")
    with pacs(lambda number, ds: 0) as peer:
        outcomes = send(peer, objects)
    assert [(o.key, o.sent) for o in outcomes] == [(0, Sent.stored), (1, Sent.rejected), (2, Sent.rejected)]


def test_what_is_held_back_is_not_sent_in_place_of_another(objects: list[Outgoing]) -> None:
    """The object after a refused one of its group was read ahead, and another goes out instead."""
    groups = ["a", "a", "b"]
    mixed = [
        Outgoing(o.key, o.path, o.sop_class_uid, o.transfer_syntax_uid, o.sop_instance_uid, group)
        for o, group in zip(objects, groups, strict=True)
    ]
    came: list[str] = []

    def on_store(number: int, ds: Dataset) -> int:
        came.append(str(ds.PatientID))
        return 0xA700 if number == 0 else 0

    with pacs(on_store) as peer:
        outcomes = send(peer, mixed)
    assert [o.sent for o in outcomes] == [Sent.retry, Sent.retry, Sent.stored]
    assert came == ["P0", "P2"]


def descriptors(path: Path) -> int:
    return sum(1 for fd in Path("/proc/self/fd").iterdir() if fd.exists() and fd.resolve() == path.resolve())


def test_no_descriptor_stays_open(objects: list[Outgoing]) -> None:
    ahead = NextFile()
    ahead.prepare(objects[0].path)
    assert descriptors(objects[0].path) in (0, 1)
    ahead.take(objects[1].path).close()
    ahead.prepare(objects[2].path)
    ahead.close()
    assert [descriptors(o.path) for o in objects] == [0, 0, 0]
    ahead.prepare(objects[0].path.with_name("none.dcm"))
    with pytest.raises(FileNotFoundError):
        ahead.take(objects[0].path.with_name("none.dcm")).begin()
    objects[0].path.write_bytes(b"no DICOM")
    with pytest.raises(NotPart10):
        ahead.take(objects[0].path).begin()
