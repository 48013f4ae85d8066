"""The DICOM acceptor: who may associate, C-STORE by our lane, the rest by pynetdicom or a service."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from pynetdicom import AE, evt
from pynetdicom.association import MODE_ACCEPTOR
from pynetdicom.dimse_primitives import C_ECHO
from pynetdicom.sop_class import Verification
from pynetdicom.transport import AddressInformation

from dicomnode import doorbell, logs, metrics
from dicomnode.dimse.association import (
    MISTYPED_ARGUMENT,
    SOP_CLASS_NOT_SUPPORTED,
    NodeAssociation,
    quiet_pynetdicom,
)
from dicomnode.dimse.command import StoreCommand
from dicomnode.dimse.lane import Reply
from dicomnode.dimse.wire import Limits, Wire
from dicomnode.durable import ObjectStore
from dicomnode.errors import NodeError
from dicomnode.header import Wanted
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.journals import Journals
from dicomnode.index.keys import HEADER_KEYS
from dicomnode.index.operation import Events, Severity
from dicomnode.receive.acceptor import Acceptor, Door
from dicomnode.receive.apply import Applier
from dicomnode.receive.classes import STORAGE_CLASSES
from dicomnode.receive.commit import Committer
from dicomnode.receive.guard import ConnectionCounter, Throttle
from dicomnode.receive.ingest import (
    OUT_OF_RESOURCES,
    PROCESSING_FAILURE,
    SUCCESS,
    UNRECOGNIZED_OPERATION,
    Incoming,
    Ingest,
    Safe,
    StoreAnswer,
    StoreRequest,
)
from dicomnode.receive.journal import SUFFIX, Journal
from dicomnode.receive.negotiation import Services, accepted_contexts, proposed_roles
from dicomnode.receive.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicomnode.receive.policy import Rejection, decide_association
from dicomnode.receive.progress import SUFFIX as PROGRESS_SUFFIX
from dicomnode.receive.progress import Progress, least_open, wait_until_visible
from dicomnode.receive.recovery import recover, recover_others
from dicomnode.receive.retire import Retirer
from dicomnode.reloading import Change, log_change
from dicomnode.settings import Peer, Settings
from dicomnode.tls import Transport
from dicomnode.tls_context import SecureSocket

SHUTDOWN_SECONDS = 3.0
CUT_SECONDS = 2.0
RING_SECONDS = 0.2
JOURNAL_SECONDS = 60.0
"""Another receiver that starts at the same time may hold this one's journal while it looks what is in it."""


class Listener:
    """One receiver process: accepts at ``doors`` until :meth:`close`."""

    def __init__(
        self, settings: Settings, db: Database, doors: Sequence[Door], name: str, services: Sequence[Services] = ()
    ) -> None:
        quiet_pynetdicom()
        dimse = settings.dimse
        self.settings = settings
        self.name = name
        self._journals = settings.node.data_dir / "journal"
        self.services = {uid: service for service in services for uid in service.classes}
        self.log = logs.get()
        self.events = Events(db)
        self.catalogue = Catalogue(db)
        self._throttle = Throttle()
        self._transport = Transport(settings.tls, self._tls_changed)
        lost = self.catalogue.associations_lost(name)
        if lost:
            self.log.warning("associations were cut when this receiver last ended", count=lost)
        self._limits = Limits(
            max_pdu=dimse.max_pdu_bytes,
            max_object=dimse.max_object_mb * 1024 * 1024,
            pdu_seconds=dimse.pdu_seconds,
            idle_seconds=dimse.idle_seconds,
        )
        store = ObjectStore(settings.node.data_dir)
        store.prepare()
        self._rang_at = 0.0
        self._committer = Committer(store, self.catalogue, self._ring_now_and_then)
        wanted = Wanted({*HEADER_KEYS, *settings.rule_keywords})
        self._safe = self._open_journal(store, wanted)
        self.ingest = Ingest(
            store,
            self._committer,
            wanted,
            reserve_bytes=settings.node.reserve_mb * 1024 * 1024,
            most_unfinished_bytes=dimse.max_unfinished_mb * 1024 * 1024,
            safe=self._safe,
        )
        self._ae = AE(ae_title=settings.node.ae_title)
        self._ae.acse_timeout = dimse.request_seconds
        self._ae.dimse_timeout = settings.delivery.response_seconds
        self._ae.network_timeout = dimse.idle_seconds
        self._ae.maximum_associations = 2**31  # the counter decides, before a thread is made
        self._connections = ConnectionCounter(dimse.max_connections, dimse.max_connections_per_address)
        self._open: set[NodeAssociation] = set()
        self._open_lock = threading.Lock()
        self._unclosed: dict[str, str] = {}
        self._acceptor = Acceptor(
            doors,
            self._connections,
            self._serve_connection,
            self._too_many,
            changed=self._tell_open,
            busier=lambda running: running > least_open(self._journals),
        )

    def _open_journal(self, store: ObjectStore, wanted: Wanted) -> Safe:
        """This process's journal, after everything that journals still hold was stored again."""
        folder = self._journals
        path = folder / f"{self.name}{SUFFIX}"
        journal = Journal(path, self.settings.dimse.journal_mb * 1024 * 1024, wait_seconds=JOURNAL_SECONDS)
        count = recover(journal, self.catalogue, store, wanted)
        count += recover_others(folder, path, self.catalogue, store, wanted)
        if count:
            self.log.warning("objects stored again from the journal", count=count)
            doorbell.ring(self.settings.node.data_dir, "worker")
        retirer = Retirer(journal, Journals(self.catalogue.db), store)
        retirer.start(journal.next_number)
        self._progress = progress = Progress(path.with_suffix(PROGRESS_SUFFIX), own=True)
        applier = Applier(journal, store, self.catalogue, retirer, progress, wanted, self._ring_now_and_then)
        applier.start()
        self._retirer = retirer
        return Safe(journal, applier)

    def _tell_open(self, running: int) -> None:
        self._progress.open = running

    def _ring_now_and_then(self) -> None:
        """The end of an association rings in any case; until then the worker need not look at each object."""
        now = time.monotonic()
        if now - self._rang_at >= RING_SECONDS:
            self._rang_at = now
            doorbell.ring(self.settings.node.data_dir, "worker")

    def start(self) -> None:
        self._acceptor.start()

    def accepting(self) -> bool:
        return self._acceptor.accepting()

    def open_associations(self) -> int:
        return self._connections.total()

    def close(self, seconds: float = SHUTDOWN_SECONDS) -> None:
        """Stop accepting, let running associations end for a while, then abort them."""
        self._acceptor.stop()
        if not self._acceptor.wait_quiet(seconds):
            with self._open_lock:
                still = list(self._open)
            for assoc in still:
                assoc.wire.abort()
            self._acceptor.wait_quiet(CUT_SECONDS)
        self._safe.applier.close()
        self._retirer.close()
        self.ingest.buffers.close()
        self._safe.journal.close()
        for service in dict.fromkeys(self.services.values()):
            service.close()

    # Each connection runs from here on in its own thread.

    def _serve_connection(self, sock: socket.socket, address: Any, door: Door) -> None:
        if door.tls:
            secure = self._secure(sock, str(address[0]))
            if secure is None:
                return
            sock = secure
        assoc = self._make_association(sock, address)
        with self._open_lock:
            self._open.add(assoc)
        try:
            assoc.run_reactor()
        except Exception as error:  # noqa: BLE001 one connection's failure must not end the others
            self.log.warning("connection failed", address=address[0], exc_type=type(error).__name__)
            assoc.wire.abort()
        finally:
            with self._open_lock:
                self._open.discard(assoc)
            assoc.end()
            try:
                self._finished(assoc, str(address[0]))
            except Exception as error:  # noqa: BLE001 logged; nothing acknowledged depends on it
                self.log.warning("association could not be closed in the index", exc_type=type(error).__name__)

    def _secure(self, sock: socket.socket, address: str) -> SecureSocket | None:
        """The handshake, before a byte of DICOM; None when it came to nothing."""
        try:
            return self._transport.wrap_server(sock)
        except NodeError as error:
            metrics.association("refused")
            if self._throttle.passes((address, error.cause)):
                self.log.warning("TLS refused", address=address, cause=error.cause, hint=error.hint)
                self._event("warning", "tls-refused", address, f"{error.cause}. {error.hint}")
            return None

    def _tls_changed(self, change: Change) -> None:
        log_change(change)
        if change.fault is None:
            self._event("info", "tls-files", self.name, "the TLS files changed and were read again")
        else:
            text = f"the TLS files changed and cannot be used, the former ones stay: {change.fault.cause}"
            self._event("error", "tls-files", self.name, f"{text}. {change.fault.hint}")

    def _make_association(self, sock: socket.socket, address: Any) -> NodeAssociation:
        assoc = _Accepted(self, Wire(sock, self._limits), sock)
        acceptor = assoc.acceptor
        acceptor.maximum_length = self.settings.dimse.max_pdu_bytes
        acceptor.ae_title = self.settings.node.ae_title
        acceptor.address_info = AddressInformation.from_tuple(sock.getsockname())
        acceptor.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        acceptor.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        assoc.requestor.address_info = AddressInformation.from_tuple(address)
        assoc.bind(evt.EVT_REQUESTED, self._on_requested)
        assoc.bind(evt.EVT_ESTABLISHED, self._on_established)
        assoc.bind(evt.EVT_SOP_EXTENDED, self._on_extended)
        assoc.bind(evt.EVT_DIMSE_RECV, _on_message)
        assoc.bind(evt.EVT_RELEASED, self._on_released)
        assoc.bind(evt.EVT_ABORTED, self._on_aborted)
        return assoc

    def _on_requested(self, event: Any) -> None:
        assoc = event.assoc
        request = assoc.requestor.primitive
        decision = decide_association(
            self.settings,
            calling=str(request.calling_ae_title),
            called=str(request.called_ae_title),
            address=assoc.requestor.address,
            tls=assoc.secure is not None,
            certificate=assoc.secure.certificate if assoc.secure is not None else None,
            application_context=str(request.application_context_name),
        )
        if isinstance(decision, Rejection):
            self._report_rejection(decision, assoc)
            assoc.acse.send_reject(decision.result, decision.source, decision.reason)
            assoc.kill()
            return
        assoc.node_peer = decision
        assoc.acceptor.supported_contexts = accepted_contexts(
            request.presentation_context_definition_list, decision, self.services, proposed_roles(request)
        )

    def _report_rejection(self, rejection: Rejection, assoc: Any) -> None:
        metrics.association("rejected")
        address = assoc.requestor.address
        if self._throttle.passes((address, rejection.cause)):
            self.log.warning("association rejected", address=address, cause=rejection.cause, hint=rejection.hint)
            self._event("warning", "association-rejected", address, f"{rejection.cause}. {rejection.hint}")

    def _on_extended(self, event: Any) -> dict[str, bytes]:
        """SOP Class Extended Negotiation (PS3.7 D.3.3.5); without an answer nothing is extended."""
        answers: dict[str, bytes] = {}
        proposed = {str(uid): info for uid, info in event.app_info.items()}
        for service in dict.fromkeys(self.services.values()):
            mine = {uid: info for uid, info in proposed.items() if uid in service.classes}
            if mine:
                answers |= service.negotiate(event.assoc, mine)
        return answers

    def _on_established(self, event: Any) -> None:
        metrics.association("accepted")
        secure = event.assoc.secure
        if secure is not None and secure.certificate is not None:
            metrics.peer_certificate(event.assoc.node_peer.name, secure.certificate.not_after.timestamp())
        self.log.debug("association accepted", peer=event.assoc.node_peer.name)

    def store_request(self, assoc: _Accepted, command: StoreCommand, context: Any) -> StoreRequest:
        """The first object of an association opens its row: it is evidence for completeness."""
        peer: Peer = assoc.node_peer
        if not assoc.node_id:
            association_id = uuid.uuid4().hex
            self.catalogue.association_opened(
                association_id=association_id,
                receiver=self.name,
                peer=peer.name,
                ae=peer.ae_title,
                address=assoc.requestor.address,
            )
            assoc.node_id = association_id
        return StoreRequest(
            sop_class_uid=command.sop_class_uid,
            sop_instance_uid=command.sop_instance_uid,
            transfer_syntax_uid=str(context.transfer_syntax[0]),
            calling_ae=peer.ae_title,
            association_id=assoc.node_id,
            peer=peer.name,
        )

    def report_store(self, answer: StoreAnswer, peer: Peer, seconds: float, size: int) -> None:
        metrics.stored(answer.status, seconds, size)
        metrics.observe("receive", seconds)
        if answer.status == SUCCESS:
            return
        status = f"0x{answer.status:04X}"
        self.log.warning("object not stored", peer=peer.name, status=status, cause=answer.cause, hint=answer.hint)
        if self._throttle.passes((peer.name, answer.cause)):
            self._event("error", "store-refused", peer.name, f"{status} {answer.cause}. {answer.hint}".strip())

    def _event(self, severity: Severity, kind: str, subject: str, text: str) -> None:
        """Events are rows: on a full disk, or without a descriptor, the log line alone has to do."""
        try:
            self.events.add(severity, kind, subject, text)
        except Exception as error:  # noqa: BLE001 the thread that accepts must not end with it
            self.log.warning(
                "event not recorded",
                kind=kind,
                error=str(error) if isinstance(error, NodeError) else type(error).__name__,
            )

    def _on_released(self, event: Any) -> None:
        self._closed(event.assoc, "released")

    def _on_aborted(self, event: Any) -> None:
        self._closed(event.assoc, "aborted")

    def _finished(self, assoc: _Accepted, address: str) -> None:
        """The association is over, however it ended."""
        violation, peer = assoc.wire.violation, assoc.node_peer
        if violation and self._throttle.passes((address, violation)):
            self.log.warning("connection cut", address=address, peer=peer.name if peer else "", cause=violation)
            self._event("warning", "limit", peer.name if peer else address, violation)
        if peer is not None:
            self._closed(assoc, "lost")

    def _too_many(self, address: str) -> None:
        metrics.association("refused")
        if self._throttle.passes((address, "too many connections")):
            self.log.warning("connection refused", address=address, cause="too many connections")
            self._event("warning", "limit", address, "too many connections from this address or in total")

    def _closed(self, assoc: Any, state: str) -> None:
        """Its end is evidence for completeness, so it may not be seen before its objects are."""
        if assoc.node_closed:
            return
        assoc.node_closed = True
        if assoc.node_id:
            self._safe.applier.then(lambda: self._close_rows(assoc.node_id, state))
        metrics.association("released" if state == "released" else "aborted" if state == "aborted" else "lost")

    def _close_rows(self, association_id: str, state: str) -> None:
        """What fails is tried again with the next one, or when the receiver starts again."""
        with self._open_lock:
            self._unclosed[association_id] = state
            unclosed = dict(self._unclosed)
        for one, end in unclosed.items():
            try:
                self.catalogue.association_closed(one, end)
            except NodeError as error:
                self.log.warning("association could not be closed in the index", error=str(error))
                return
            with self._open_lock:
                self._unclosed.pop(one, None)
        doorbell.ring(self.settings.node.data_dir, "worker")

    def wait_until_visible(self) -> None:
        """Whatever was acknowledged by now, by any receiver, is in the index."""
        if not wait_until_visible(self._journals):
            self.log.warning("what was received last is not in the index yet, a query goes on without it")


def _on_message(event: Any) -> None:
    """In the order of arrival: a cancel of this number that came before the request was for an earlier one."""
    if type(event.message).__name__ in ("C_FIND_RQ", "C_MOVE_RQ", "C_GET_RQ"):
        event.assoc.dimse.cancel_req.pop(event.message.command_set.get("MessageID"), None)


class _Accepted(NodeAssociation):
    """An association that a peer opened."""

    def __init__(self, listener: Listener, wire: Wire, sock: socket.socket) -> None:
        super().__init__(listener._ae, MODE_ACCEPTOR, wire, sock, self._open_sink)
        self._listener = listener
        self.secure = sock if isinstance(sock, SecureSocket) else None
        self.node_peer: Any = None
        self.node_id = ""
        self.node_closed = False

    def settle(self) -> None:
        """What was acknowledged here or elsewhere has its files and rows when this returns."""
        self._listener.wait_until_visible()

    def _open_sink(self, command: StoreCommand, context: Any) -> _StoreSink:
        return _StoreSink(self._listener, self, command, context)

    def _serve_request(self, msg: Any, context_id: int) -> None:
        context = self._accepted_cx.get(context_id)
        service = self._listener.services.get(str(context.abstract_syntax)) if context is not None else None
        if not msg.is_valid_request and msg.MessageIDBeingRespondedTo is None:
            # pynetdicom says nothing to it, and the peer would wait for its answer.
            self.refuse_request(msg, context_id, MISTYPED_ARGUMENT)
        elif service is not None and msg.is_valid_request:
            self.settle()
            service.serve(self, msg, context)
        elif context is not None and msg.is_valid_request and (refusal := _refusal(msg, context)):
            self.refuse_request(msg, context_id, refusal)
        else:
            super()._serve_request(msg, context_id)


def _refusal(request: Any, context: Any) -> int:
    """The status of a request that no service takes and that is no C-ECHO as it should be; 0 for one. Pure."""
    if context.abstract_syntax != Verification or not isinstance(request, C_ECHO):
        return UNRECOGNIZED_OPERATION
    return 0 if request.AffectedSOPClassUID == Verification else SOP_CLASS_NOT_SUPPORTED


class _StoreSink:
    """One C-STORE; an unexpected error becomes an answer, so that the peer sends the object again."""

    def __init__(self, listener: Listener, assoc: _Accepted, command: StoreCommand, context: Any) -> None:
        self._listener = listener
        self._assoc = assoc
        self._peer: Peer = assoc.node_peer
        self._begin = time.perf_counter()
        self._size = 0
        self._seconds = 0.0
        self._answer: StoreAnswer | None = None
        self._failed: StoreAnswer | None = None
        self._incoming: Incoming | None = None
        if context.abstract_syntax not in STORAGE_CLASSES:
            # Not only wrong (PS3.7 9.3.1.1): its context is what the caller may do, and that is not to store.
            cause = "C-STORE on a presentation context of another service"
            self._failed = StoreAnswer(UNRECOGNIZED_OPERATION, cause, "The sender has to propose a storage SOP class")
            return
        try:
            self._incoming = listener.ingest.begin(listener.store_request(assoc, command, context))
        except Exception as error:  # noqa: BLE001
            self._failed = _failure(error)

    def write(self, fragment: memoryview) -> None:
        self._size += len(fragment)
        if self._failed is not None or self._incoming is None:
            return
        try:
            self._incoming.write(fragment)
        except Exception as error:  # noqa: BLE001
            self._failed = _failure(error)
            self._incoming.discard()

    def finish(self) -> Reply:
        answer = self._failed
        if answer is None and self._incoming is not None:
            try:
                answer = self._incoming.finish()
            except Exception as error:  # noqa: BLE001
                answer = _failure(error)
                self._incoming.discard()
        assert answer is not None
        self._answer, self._seconds = answer, time.perf_counter() - self._begin
        return Reply(answer.status, answer.cause if answer.status != SUCCESS else "")

    def settle(self) -> None:
        assert self._answer is not None
        self._listener.report_store(self._answer, self._peer, self._seconds, self._size)

    def discard(self) -> None:
        if self._incoming is not None:
            self._incoming.discard()


def _failure(error: Exception) -> StoreAnswer:
    if isinstance(error, NodeError):
        return StoreAnswer(OUT_OF_RESOURCES, f"{error.operation}: {error.cause}", error.hint)
    return StoreAnswer(PROCESSING_FAILURE, f"unexpected {type(error).__name__}", "Report this")
