"""The acceptor: pynetdicom for negotiation and C-ECHO, with our guard, policy and ingest."""

from __future__ import annotations

import socket
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

from pynetdicom import AE, evt
from pynetdicom import _config as pynetdicom_config
from pynetdicom.association import Association
from pynetdicom.transport import RequestHandler, ThreadedAssociationServer

from dicomnode import doorbell, logs, metrics
from dicomnode.durable import ObjectStore
from dicomnode.errors import NodeError, OperatorError
from dicomnode.header import Wanted
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.keys import HEADER_KEYS
from dicomnode.index.operation import Events, Severity
from dicomnode.receive.guard import ConnectionCounter, GuardedSocket, Limits
from dicomnode.receive.ingest import (
    OUT_OF_RESOURCES,
    PROCESSING_FAILURE,
    SUCCESS,
    Committer,
    Ingest,
    StoreAnswer,
    StoreRequest,
)
from dicomnode.receive.negotiation import Services, accepted_contexts, proposed_roles
from dicomnode.receive.part10 import IMPLEMENTATION_CLASS_UID, IMPLEMENTATION_VERSION_NAME
from dicomnode.receive.policy import Rejection, decide_association
from dicomnode.settings import Peer, Settings

SHUTDOWN_SECONDS = 3.0
REPEAT_SECONDS = 10.0


class Throttle:
    """Lets the same complaint through once in a while: a flood must not become a flood of rows."""

    def __init__(self, seconds: float = REPEAT_SECONDS, most: int = 1000) -> None:
        self._seconds = seconds
        self._most = most
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str], float] = {}

    def passes(self, key: tuple[str, str]) -> bool:
        now = time.monotonic()
        with self._lock:
            if now - self._last.get(key, -self._seconds) < self._seconds:
                return False
            if len(self._last) >= self._most:
                self._last.clear()
            self._last[key] = now
            return True


class Listener:
    """One receiver process: accepts on ``listening`` until :meth:`close`."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        listening: socket.socket,
        name: str,
        services: Sequence[Services] = (),
    ) -> None:
        pynetdicom_config.LOG_HANDLER_LEVEL = "none"  # its handlers log patient identifiers
        pynetdicom_config.USE_SHORT_DIMSE_AET = True
        dimse = settings.dimse
        self.settings = settings
        self.name = name
        self.services = {uid: service for service in services for uid in service.classes}
        self.log = logs.get()
        self.events = Events(db)
        self._throttle = Throttle()
        self.catalogue = Catalogue(db)
        lost = self.catalogue.associations_lost(name)
        if lost:
            self.log.warning("associations were cut when this receiver last ended", count=lost)
        self.limits = Limits(
            max_pdu=dimse.max_pdu_bytes,
            max_object=dimse.max_object_mb * 1024 * 1024,
            pdu_seconds=dimse.pdu_seconds,
            request_seconds=dimse.request_seconds,
            max_connections=dimse.max_connections,
            max_connections_per_address=dimse.max_connections_per_address,
        )
        store = ObjectStore(settings.node.data_dir)
        store.prepare()
        self.committer = Committer(store, self.catalogue, lambda: doorbell.ring(settings.node.data_dir, "worker"))
        self.ingest = Ingest(
            store,
            self.committer,
            Wanted({*HEADER_KEYS, *settings.rule_keywords}),
            reserve_bytes=settings.node.reserve_mb * 1024 * 1024,
        )
        ae = AE(ae_title=settings.node.ae_title)
        ae.implementation_class_uid = IMPLEMENTATION_CLASS_UID
        ae.implementation_version_name = IMPLEMENTATION_VERSION_NAME
        ae.maximum_pdu_size = dimse.max_pdu_bytes
        ae.maximum_associations = 100_000  # our own counter decides, before a thread is made
        ae.acse_timeout = dimse.request_seconds
        ae.dimse_timeout = None
        ae.network_timeout = dimse.idle_seconds
        self._server = _Server(ae, listening, self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.2,), name="acceptor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def accepting(self) -> bool:
        return self._thread.is_alive()

    def open_associations(self) -> int:
        return self._server.connections.total()

    def close(self, seconds: float = SHUTDOWN_SECONDS) -> None:
        """Stop accepting, let running associations end for a while, then abort them."""
        self._server.shutdown()
        deadline = time.monotonic() + seconds
        while self._server.active_associations and time.monotonic() < deadline:
            time.sleep(0.02)
        for assoc in self._server.active_associations:
            assoc.abort(block=False)
        self.committer.close()
        for service in dict.fromkeys(self.services.values()):
            service.close()

    # Events of pynetdicom; each runs in the association's own thread.

    def on_requested(self, event: Any) -> None:
        assoc = event.assoc
        request = assoc.requestor.primitive
        decision = decide_association(
            self.settings,
            calling=str(request.calling_ae_title),
            called=str(request.called_ae_title),
            address=assoc.requestor.address,
        )
        if isinstance(decision, Rejection):
            self._report_rejection(decision, assoc)
            assoc.acse.send_reject(decision.result, decision.source, decision.reason)
            assoc.kill()
            return
        assoc.node_peer = decision
        assoc.node_id = ""
        assoc.acceptor.supported_contexts = accepted_contexts(
            request.presentation_context_definition_list, decision, self.services, proposed_roles(request)
        )

    def _report_rejection(self, rejection: Rejection, assoc: Any) -> None:
        metrics.association("rejected")
        address = assoc.requestor.address
        if self._throttle.passes((address, rejection.cause)):
            self.log.warning("association rejected", address=address, cause=rejection.cause, hint=rejection.hint)
            self._event("warning", "association-rejected", address, f"{rejection.cause}. {rejection.hint}")

    def on_extended(self, event: Any) -> dict[str, bytes]:
        """SOP Class Extended Negotiation (PS3.7 D.3.3.5); without an answer nothing is extended."""
        answers: dict[str, bytes] = {}
        proposed = {str(uid): info for uid, info in event.app_info.items()}
        for service in dict.fromkeys(self.services.values()):
            mine = {uid: info for uid, info in proposed.items() if uid in service.classes}
            if mine:
                answers |= service.negotiate(event.assoc, mine)
        return answers

    def on_message(self, event: Any) -> None:
        """In the order of arrival: a cancel that came before this request was for an earlier one.

        pynetdicom clears cancels when it begins to serve, and so loses one that follows its request closely.
        """
        if type(event.message).__name__ in ("C_FIND_RQ", "C_MOVE_RQ", "C_GET_RQ"):
            event.assoc.dimse.cancel_req.clear()

    def serve(self, assoc: Any, request: Any, context_id: int) -> bool:
        """Serve a request of the further services; False when it is none."""
        context = assoc._accepted_cx.get(context_id)
        service = self.services.get(str(context.abstract_syntax)) if context is not None else None
        if service is None or not request.is_valid_request:
            return False
        assoc._is_paused = True  # this thread is the reactor: sub-operations need not wait for it
        try:
            service.serve(assoc, request, context)
        finally:
            assoc._is_paused = False
            assoc.dul.socket.message_done()
        return True

    def on_established(self, event: Any) -> None:
        metrics.association("accepted")
        peer: Peer = event.assoc.node_peer
        self.log.debug("association accepted", peer=peer.name)

    def on_store(self, event: Any) -> int:
        begin = time.perf_counter()
        assoc = event.assoc
        peer: Peer = assoc.node_peer
        request = event.request
        buffer = request.DataSet.getbuffer() if request.DataSet is not None else memoryview(b"")
        try:
            self._open(assoc, peer)
            answer = self.ingest.store(
                StoreRequest(
                    sop_class_uid=str(request.AffectedSOPClassUID or ""),
                    sop_instance_uid=str(request.AffectedSOPInstanceUID or ""),
                    transfer_syntax_uid=str(event.context.transfer_syntax),
                    data_set=buffer,
                    calling_ae=peer.ae_title,
                    association_id=assoc.node_id,
                )
            )
        except NodeError as error:
            answer = StoreAnswer(OUT_OF_RESOURCES, f"{error.operation}: {error.cause}", error.hint)
        except Exception as error:  # noqa: BLE001 pynetdicom would answer 0xC211 and tell nobody
            answer = StoreAnswer(PROCESSING_FAILURE, f"unexpected {type(error).__name__}", "Report this")
        size = len(buffer)
        buffer.release()
        assoc.dul.socket.message_done()
        seconds = time.perf_counter() - begin
        metrics.stored(answer.status, seconds, size)
        metrics.observe("receive", seconds)
        if answer.status != SUCCESS:
            self._report_refusal(answer, peer)
        return answer.status

    def _open(self, assoc: Any, peer: Peer) -> None:
        """Record the association with its first object; it is evidence for completeness."""
        if assoc.node_id:
            return
        association_id = uuid.uuid4().hex
        self.catalogue.association_opened(
            association_id=association_id,
            receiver=self.name,
            peer=peer.name,
            ae=peer.ae_title,
            address=assoc.requestor.address,
        )
        assoc.node_id = association_id

    def _report_refusal(self, answer: StoreAnswer, peer: Peer) -> None:
        status = f"0x{answer.status:04X}"
        self.log.warning("object not stored", peer=peer.name, status=status, cause=answer.cause, hint=answer.hint)
        if self._throttle.passes((peer.name, answer.cause)):
            self._event("error", "store-refused", peer.name, f"{status} {answer.cause}. {answer.hint}".strip())

    def _event(self, severity: Severity, kind: str, subject: str, text: str) -> None:
        """Events are rows: on a full disk the log line alone has to do."""
        try:
            self.events.add(severity, kind, subject, text)
        except NodeError as error:
            self.log.warning("event not recorded", kind=kind, error=str(error))

    def on_released(self, event: Any) -> None:
        self._closed(event.assoc, "released")

    def on_aborted(self, event: Any) -> None:
        self._closed(event.assoc, "aborted")

    def finished(self, assoc: Any, address: str) -> None:
        """The association's thread ended, however it did."""
        sock = assoc.dul.socket
        violation = getattr(sock, "violation", "")
        if violation:
            peer = getattr(assoc, "node_peer", None)
            if self._throttle.passes((address, violation)):
                self.log.warning("connection cut", address=address, peer=peer.name if peer else "", cause=violation)
                self._event("warning", "limit", peer.name if peer else address, violation)
        if getattr(assoc, "node_peer", None) is not None:
            self._closed(assoc, "lost")

    def too_many(self, address: str) -> None:
        if self._throttle.passes((address, "too many connections")):
            self.log.warning("connection refused", address=address, cause="too many connections")
            self._event("warning", "limit", address, "too many connections from this address or in total")

    def _closed(self, assoc: Any, state: str) -> None:
        if getattr(assoc, "node_closed", False):
            return
        if assoc.node_id:
            self.catalogue.association_closed(assoc.node_id, state)  # when it fails, finished() tries again
        assoc.node_closed = True
        if assoc.node_id:
            doorbell.ring(self.settings.node.data_dir, "worker")
        metrics.association("released" if state == "released" else "aborted" if state == "aborted" else "lost")


class _Handler(RequestHandler):  # type: ignore[misc]
    """Makes the association with the guarded socket; contexts come with the request."""

    server: _Server

    def _create_association(self) -> Association:
        assoc = super()._create_association()
        assoc.dul.socket = None
        while not assoc.dul.event_queue.empty():
            assoc.dul.event_queue.get_nowait()
        assoc.set_socket(GuardedSocket(assoc, self.request, self.server.listener.limits))
        listener, serve_request = self.server.listener, assoc._serve_request

        def serve(message: Any, context_id: int) -> None:
            if not listener.serve(assoc, message, context_id):
                serve_request(message, context_id)

        assoc._serve_request = serve
        return assoc


class _Server(ThreadedAssociationServer):  # type: ignore[misc]
    """Serves on a socket that was bound elsewhere, with caps on connections."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, ae: AE, listening: socket.socket, listener: Listener) -> None:
        self.socket: Any = None
        self._listening = listening
        self.listener = listener
        self.connections = ConnectionCounter(listener.limits)
        handlers = [
            (evt.EVT_REQUESTED, listener.on_requested),
            (evt.EVT_ESTABLISHED, listener.on_established),
            (evt.EVT_C_STORE, listener.on_store),
            (evt.EVT_DIMSE_RECV, listener.on_message),
            (evt.EVT_SOP_EXTENDED, listener.on_extended),
            (evt.EVT_RELEASED, listener.on_released),
            (evt.EVT_ABORTED, listener.on_aborted),
        ]
        super().__init__(
            ae, listening.getsockname(), listener.settings.node.ae_title, [], None, handlers, request_handler=_Handler
        )
        ae._servers.append(self)

    def server_bind(self) -> None:
        if self.socket is not None:
            self.socket.close()
        self.socket = self._listening
        self.server_address = self.socket.getsockname()

    def server_activate(self) -> None:
        """The socket listens already."""

    def verify_request(self, _request: socket.socket, client_address: Any) -> bool:
        """Called before a thread is made for a connection."""
        if self.connections.admit(client_address[0]):
            return True
        metrics.association("refused")
        self.listener.too_many(str(client_address[0]))
        return False

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        assoc: Any = None
        try:
            handler = _Handler.__new__(_Handler)
            handler.request, handler.client_address, handler.server = request, client_address, self
            assoc = handler._create_association()
            assoc.start()
            assoc.join()
        except Exception as error:  # noqa: BLE001 one connection's failure must not end the others
            self.listener.log.warning("connection failed", address=client_address[0], exc_type=type(error).__name__)
            self.shutdown_request(request)
        finally:
            self.connections.leave(client_address[0])
            if assoc is not None:
                self._finish(assoc, client_address[0])

    def _finish(self, assoc: Any, address: str) -> None:
        try:
            self.listener.finished(assoc, address)
        except Exception as error:  # noqa: BLE001 logged; nothing acknowledged depends on it
            self.listener.log.warning("association could not be closed in the index", exc_type=type(error).__name__)


def listen(host: str, port: int, backlog: int = 128) -> socket.socket:
    """Bind and listen. Raises OperatorError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        hint = {
            13: "Ports below 1024 need CAP_NET_BIND_SERVICE (see systemd/) or choose a higher dimse.port",
            98: "Another program listens there; stop it or change dimse.port",
            99: "This machine has no such address; change dimse.host",
        }.get(error.errno or 0, "Check dimse.host and dimse.port")
        raise OperatorError("listen for DICOM", f"{host}:{port}: {error.strerror}", hint) from None
    return sock
