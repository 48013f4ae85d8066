"""Peers that speak storage commitment with pynetdicom, and messages as they write them."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Self

from pydicom.dataset import Dataset
from pydicom.filebase import DicomIO
from pydicom.filewriter import write_dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, AllStoragePresentationContexts, build_role, evt
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance

from dicomnode.deliver.commitment import Asker
from dicomnode.deliver.courier import Courier
from dicomnode.deliver.reporter import Reporter
from dicomnode.durable import ObjectStore, sha256_file
from dicomnode.index.database import Database
from dicomnode.receive.acceptor import Door, listen
from dicomnode.receive.listener import Listener
from dicomnode.receive.progress import wait_until_visible
from dicomnode.serve import Commitment
from dicomnode.settings import Settings
from tests.e2e.harness import item_from
from tests.index.rows import finished_job
from tests.peers import CT_IMAGE, EXPLICIT_LITTLE, IMPLICIT_LITTLE, send_items, wait_for
from tests.serve.cases import dataset

COMMITMENT, INSTANCE = StorageCommitmentPushModel, StorageCommitmentPushModelInstance
SYNTAXES = [EXPLICIT_LITTLE, IMPLICIT_LITTLE]


def reference(uid: str, sop_class: str = CT_IMAGE) -> Dataset:
    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = sop_class, uid
    return item


def asked(uids: Iterable[str], transaction: str = "", **changes: Any) -> Dataset:
    """Action information; a change to None leaves the attribute out."""
    ds = Dataset()
    ds.TransactionUID = transaction or str(generate_uid())
    ds.ReferencedSOPSequence = [u if isinstance(u, Dataset) else reference(u) for u in uids]
    for keyword, value in changes.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def told(transaction: str, committed: Iterable[str] = (), failed: Mapping[str, int] | None = None) -> Dataset:
    """Event information as an SCP writes it."""
    ds = Dataset()
    ds.TransactionUID = transaction
    if committed := list(committed):
        ds.ReferencedSOPSequence = [reference(uid) for uid in committed]
    if failed:
        ds.FailedSOPSequence = [reference(uid) for uid in failed]
        for item, reason in zip(ds.FailedSOPSequence, failed.values(), strict=True):
            item.FailureReason = reason
    return ds


def encoded(ds: Dataset, syntax: str = EXPLICIT_LITTLE) -> bytes:
    buffer = DicomIO(io.BytesIO())
    buffer.is_little_endian, buffer.is_implicit_VR = True, syntax == IMPLICIT_LITTLE
    write_dataset(buffer, ds)
    return bytes(buffer.parent.getvalue())


def finish(*associations: Any) -> None:
    """Let pynetdicom's threads end, and close what it leaves open after an abort."""
    for assoc in associations:
        if assoc.is_established:
            assoc.release()
        assoc.kill()
        assoc.join(10)
        assoc.dul.join(10)
        if assoc.dul.socket is not None and assoc.dul.socket.socket is not None:
            assoc.dul.socket.socket.close()


class Heard:
    """Reports that a peer got: (event type, Transaction UID, committed UIDs, failed UIDs with reasons)."""

    def __init__(self) -> None:
        self.reports: list[tuple[int, str, set[str], dict[str, int]]] = []
        self.data: list[Dataset] = []
        self._changed = threading.Condition()

    def add(self, event: Any) -> None:
        ds = event.event_information
        failed = {i.ReferencedSOPInstanceUID: i.FailureReason for i in ds.get("FailedSOPSequence", [])}
        committed = {i.ReferencedSOPInstanceUID for i in ds.get("ReferencedSOPSequence", [])}
        with self._changed:
            self.data.append(ds)
            self.reports.append((event.event_type, str(ds.TransactionUID), committed, failed))
            self._changed.notify_all()

    def wait(self, count: int = 1, seconds: float = 20) -> list[tuple[int, str, set[str], dict[str, int]]]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.reports) >= count, seconds), f"{len(self.reports)} reports"
            return list(self.reports)


class Requester:
    """A modality that asks the node; it also listens for reports where ``port`` is taken."""

    def __init__(self, ae_title: str = "MOD1", *, status: int = 0x0000, roles: bool = True, port: int | None = None):
        self.heard, self.aside = Heard(), Heard()
        self.proposed: list[tuple[bool, bool] | None] = []
        self.status = status
        self._ae = AE(ae_title=ae_title)
        self._ae.add_requested_context(COMMITMENT, SYNTAXES)
        self._ae.acse_timeout = self._ae.dimse_timeout = self._ae.network_timeout = 20
        self.server: Any = None
        self.assoc: Any = None
        self._opened: list[Any] = []
        if port is not None:
            more = {"scu_role": False, "scp_role": True} if roles else {}
            self._ae.add_supported_context(COMMITMENT, SYNTAXES, **more)
            self.listen(port)

    def listen(self, port: int) -> None:
        handlers = [(evt.EVT_N_EVENT_REPORT, self._on_other), (evt.EVT_ESTABLISHED, self._on_established)]
        self.server = self._ae.start_server(("127.0.0.1", port), block=False, evt_handlers=handlers)
        self.port = self.server.socket.getsockname()[1]

    def _on_established(self, event: Any) -> None:
        item = event.assoc.requestor.role_selection.get(COMMITMENT)
        self.proposed.append((item.scu_role, item.scp_role) if item else None)

    def _on_other(self, event: Any) -> tuple[int, None]:
        self.aside.add(event)
        return self.status, None

    def open(self, node_port: int) -> Self:
        def on_same(event: Any) -> tuple[int, None]:
            self.heard.add(event)
            return self.status, None

        self.assoc = self._ae.associate(
            "127.0.0.1", node_port, ae_title="DICOMNODE", evt_handlers=[(evt.EVT_N_EVENT_REPORT, on_same)]
        )
        assert self.assoc.is_established
        self._opened.append(self.assoc)
        return self

    def ask(self, ds: Dataset, *, action: int = 1, sop_instance: str = INSTANCE) -> Dataset:
        status, _ = self.assoc.send_n_action(ds, action, COMMITMENT, sop_instance)
        return status

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        finish(*self._opened)
        if self.server is not None:
            served = self.server.active_associations
            self.server.shutdown()
            self.server.server_close()
            finish(*served)


Answer = Callable[[str, list[str]], Dataset | None]
"""(Transaction UID, SOP Instance UIDs) -> event information, or None for no report."""


def commits(transaction: str, uids: Sequence[str]) -> Dataset:
    return told(transaction, uids)


class Committer:
    """A PACS that stores and is asked for commitment.

    ``answer`` decides about each report. ``way``: it goes out on the ``same`` association, on a
    ``new`` one with role selection, on one ``without`` it, or ``never``. ``status`` answers the
    N-ACTION; None aborts instead.
    """

    def __init__(self, *, way: str = "same", answer: Answer = commits, ae_title: str = "PACS", port: int = 0) -> None:
        self.way, self.answer = way, answer
        self.status: int | None = 0x0000
        self.store_status = 0x0000
        self.node_port = 0
        self.called = "DICOMNODE"
        self.asked: list[tuple[str, list[str]]] = []
        self.stored: list[str] = []
        self.answered: list[int | None] = []
        self.changed = threading.Condition()
        self._later: dict[Any, Any] = {}
        self.ae = AE(ae_title=ae_title)
        self.ae.supported_contexts = AllStoragePresentationContexts
        self.ae.add_supported_context(COMMITMENT, SYNTAXES)
        self.ae.acse_timeout = self.ae.dimse_timeout = self.ae.network_timeout = 20
        self.handlers = [
            (evt.EVT_N_ACTION, self._action),
            (evt.EVT_C_STORE, self._store),
            (evt.EVT_DIMSE_SENT, self._sent),
        ]
        self.server: Any = None
        self.start(port)
        self.port = self.server.socket.getsockname()[1]

    def start(self, port: int) -> None:
        self.server = self.ae.start_server(("127.0.0.1", port), block=False, evt_handlers=self.handlers)

    def stop(self) -> None:
        served = self.server.active_associations
        self.server.shutdown()
        self.server.server_close()
        finish(*served)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self, condition: Callable[[], bool], seconds: float = 20) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, seconds), (self.asked, self.answered)

    def _store(self, event: Any) -> int:
        with self.changed:
            self.stored.append(str(event.request.AffectedSOPInstanceUID))
            self.changed.notify_all()
        return self.store_status

    def _action(self, event: Any) -> tuple[int, None]:
        ds = event.action_information
        uids = [str(i.ReferencedSOPInstanceUID) for i in ds.ReferencedSOPSequence]
        with self.changed:
            self.asked.append((str(ds.TransactionUID), uids))
            self.changed.notify_all()
        if self.status is None:
            event.assoc.abort(block=False)
            return 0x0000, None
        report = self.answer(str(ds.TransactionUID), uids) if self.status == 0x0000 else None
        if report is not None and self.way != "never":
            if self.way == "same":
                self._later[event.assoc] = report
            else:
                threading.Thread(target=self.report, args=(report,), daemon=True).start()
        return self.status, None

    def _sent(self, event: Any) -> None:
        """After the response to an N-ACTION: the report on the same association, from a thread of its own."""
        report = self._later.pop(event.assoc, None) if type(event.message).__name__ == "N_ACTION_RSP" else None
        if report is not None:
            threading.Thread(target=self._report_on, args=(event.assoc, report), daemon=True).start()

    def _report_on(self, assoc: Any, ds: Dataset) -> int | None:
        event_type = 2 if "FailedSOPSequence" in ds else 1
        status, _ = assoc.send_n_event_report(ds, event_type, COMMITMENT, INSTANCE)
        found = status.Status if "Status" in status else None
        with self.changed:
            self.answered.append(found)
            self.changed.notify_all()
        return found

    def report(self, ds: Dataset, *, ae_title: str = "") -> int | None:
        """On an association of its own to the node; the status of the answer."""
        ae = AE(ae_title=ae_title or self.ae.ae_title)
        ae.add_requested_context(COMMITMENT, SYNTAXES)
        ae.acse_timeout = ae.dimse_timeout = ae.network_timeout = 20
        roles = [] if self.way == "without" else [build_role(COMMITMENT, scp_role=True)]
        assoc = ae.associate("127.0.0.1", self.node_port, ae_title=self.called, ext_neg=roles)
        assert assoc.is_established
        try:
            return self._report_on(assoc, ds)
        finally:
            finish(assoc)


class Site:
    """A receiver of the node in this process, and the courier's parts, which run when the test says so."""

    def __init__(self, db: Database, peers: Sequence[Mapping[str, Any]], **delivery: float) -> None:
        quick = {"backoff_seconds": 2, "backoff_max_seconds": 900, "connect_seconds": 5, "response_seconds": 5}
        self.db = db
        self.settings = Settings(
            node={"data_dir": db.data_dir, "reserve_mb": 1},
            dimse={"journal_mb": 4},
            peers=[{"host": "127.0.0.1", **peer} for peer in peers],
            delivery={**quick, "commitment_wait_seconds": 5, **delivery},
        )
        self._listening = listen("127.0.0.1", 0)
        self.port = int(self._listening.getsockname()[1])
        self._listener = Listener(
            self.settings, db, [Door(self._listening)], "receiver-1", [Commitment(self.settings, db)]
        )
        self._listener.start()
        self.reporter = Reporter(self.settings, db, "courier")
        self.asker = Asker(self.settings, db, "courier")
        self.courier = Courier(self.settings, db, "courier")

    def close(self) -> None:
        self._listener.close()
        self._listening.close()

    def store(self, count: int = 2, ae_title: str = "MOD1") -> list[str]:
        """Objects as a modality stores them; their UIDs."""
        items = [item_from(dataset("1.2.20", "1.2.10", str(generate_uid()))) for _ in range(count)]
        assert set(send_items(self.port, items, calling=ae_title)) == {0x0000}
        assert wait_until_visible(self.db.data_dir / "journal")
        return [item.sop_instance_uid for item in items]

    def rows(self) -> list[dict[str, Any]]:
        return self.db.rows("SELECT * FROM commitments ORDER BY id")

    def states(self) -> list[str]:
        return [str(row["state"]) for row in self.rows()]

    def wait_state(self, *states: str) -> None:
        wait_for(lambda: self.states() == list(states), 20, f"{states}", lambda: str(self.rows()))

    def deliveries(self) -> list[str]:
        return [r["state"] for r in self.db.rows("SELECT state FROM deliveries ORDER BY id")]

    def results(self, study: str = "1.2.10") -> list[str]:
        """A finished job, its SEG and SR on the way to ``pacs``; their UIDs."""
        job_id = finished_job(self.db, study)
        store = ObjectStore(self.db.data_dir)
        rows = self.db.rows("SELECT file, SOPInstanceUID FROM results WHERE job_id = ? ORDER BY id", (job_id,))
        for row in rows:
            ds = dataset("1.2.30", study, row["SOPInstanceUID"])
            ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
            ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            path = store.path(row["file"])
            path.parent.mkdir(parents=True, exist_ok=True)
            ds.save_as(path, enforce_file_format=True)
            with self.db.transaction():
                self.db.execute("UPDATE results SET sha256 = ? WHERE file = ?", (sha256_file(path), row["file"]))
        return [str(row["SOPInstanceUID"]) for row in rows]
