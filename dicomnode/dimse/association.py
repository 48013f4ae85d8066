"""pynetdicom's association without its threads: one thread reads, serves and sends.

The state table (PS3.8 9.2), negotiation and release are pynetdicom's. Its DUL provider is
driven from the thread that uses the association: sending acts at once, and waiting for a
primitive or a message reads the socket until it is there.
"""

from __future__ import annotations

import queue
import re
import time
from collections.abc import Callable, Sequence
from typing import Any

from pynetdicom import _config as pynetdicom_config
from pynetdicom import evt
from pynetdicom.association import Association
from pynetdicom.dimse import DIMSEServiceProvider
from pynetdicom.dimse_messages import DIMSEMessage
from pynetdicom.dimse_primitives import C_CANCEL, N_EVENT_REPORT
from pynetdicom.dul import DULServiceProvider
from pynetdicom.transport import AssociationSocket

from dicomnode.dimse.lane import Lane, OpenSink
from dicomnode.dimse.wire import P_DATA_TF, Silence, Wire, abort_pdu

ESTABLISHED = "Sta6"
CLOSED = "Sta1"
MOST_CANCELS = 10
MOST_WAITING = 64
"""Messages that wait while one is answered; without an operations window a peer has one outstanding (PS3.7 D.3.3.3)."""
LEAST_BYTES = 1024
"""What a message must grow by within ``pdu_seconds``, unless it ends: by single bytes it could go on for weeks."""
LINGER_SECONDS = 2.0
SOP_CLASS_NOT_SUPPORTED = 0x0122
"""To a C-ECHO of another class than its presentation context (PS3.7 9.1.5.1.4)."""
UNRECOGNIZED_OPERATION = 0x0211
"""To a request on a presentation context that is not for it (PS3.7 C.5)."""
MISTYPED_ARGUMENT = 0x0212
"""To a request that lacks a mandatory element of its command set (PS3.7 C.5)."""
LONGEST_AE_TITLE = 16
_AE_TITLE = re.compile(r" *[!-\[\]-~][ -\[\]-~]*")
"""Characters of an AE title, one of which is not a space (PS3.5 table 6.2-1)."""


def quiet_pynetdicom() -> None:
    """Its log handlers write patients' identifiers; AE titles are not padded in DIMSE."""
    pynetdicom_config.LOG_HANDLER_LEVEL = "none"
    pynetdicom_config.USE_SHORT_DIMSE_AET = True


class NodeSocket(AssociationSocket):  # type: ignore[misc]  # pynetdicom ships no types
    """AssociationSocket over a :class:`Wire`; the connection exists already."""

    def __init__(self, assoc: Any, wire: Wire, sock: Any) -> None:
        self.wire = wire
        super().__init__(assoc, client_socket=sock)

    def connect(self, primitive: Any) -> None:
        """The requestor's connection was made before negotiation."""
        primitive.result = "Evt2"
        self.provider_queue.put(primitive)

    def send(self, bytestream: bytes) -> None:
        try:
            self.wire.send([bytestream])
        except OSError:
            self.event_queue.put("Evt17")


class Provider(DULServiceProvider):  # type: ignore[misc]
    """DUL service provider that acts in the caller's thread."""

    mark: tuple[bool, int] | None = None
    """How far the association was when its patience began at ``since``; None begins it anew."""
    since = 0.0

    def start(self) -> None:
        self.assoc._dul_ready.set()
        self._act()

    def is_alive(self) -> bool:
        return False

    def stop_dul(self) -> bool:
        return True

    def send_pdu(self, primitive: Any) -> None:
        super().send_pdu(primitive)
        while self._process_recv_primitive():
            self._act()

    def receive_pdu(self, wait: bool = False, timeout: float | None = None) -> Any:
        deadline = time.monotonic() + (timeout or 0.0)
        while wait and self.to_user_queue.empty() and self.state_machine.current_state != CLOSED:
            try:
                self.pump(deadline - time.monotonic())
            except Silence:
                break
        return super().receive_pdu(wait=False)

    def pump(self, seconds: float) -> None:
        """Read one PDU and act on it. Raises Silence when none begins in time."""
        sock = self.socket
        if sock is None or sock.socket is None:
            self._closed()
            return
        try:
            found = sock.wire.read(max(seconds, 0.0))
        except Silence:
            raise
        except OSError:
            found = None
        self._handle(found)

    def _handle(self, found: tuple[int, memoryview] | None) -> None:
        if found is None:
            self.lost()
            return
        kind, pdu = found
        try:
            if kind == P_DATA_TF and self.state_machine.current_state == ESTABLISHED:
                self.assoc.lane.receive(pdu)
            else:
                self._control(pdu)
        except OSError:
            self.event_queue.put("Evt17")
        self._act()

    def stream(self) -> None:
        """Read as :meth:`pump` does, and go on while nothing but C-STORE comes.

        Raises Silence after ``idle_seconds`` without a PDU, ``pdu_seconds`` inside a message. A PDU
        without data is legal and says nothing: it does not put that off.
        """
        assoc, sock, machine = self.assoc, self.socket, self.state_machine
        lane, events, messages = assoc.lane, self.event_queue.queue, assoc.dimse.msg_queue.queue
        while True:
            remaining = self._patience(lane)
            if sock is None or sock.socket is None or machine.current_state != ESTABLISHED:
                self.pump(remaining)
                return
            try:
                found = sock.wire.read(remaining)
            except Silence:
                raise
            except OSError:
                found = None
            if found is None or found[0] != P_DATA_TF:
                self._handle(found)
                return
            try:
                lane.receive(found[1])
            except OSError:
                events.append("Evt17")
            if events or messages:
                self._act()
                return

    def _patience(self, lane: Lane) -> float:
        """Seconds that are left for the next PDU. Raises Silence when there are none."""
        midway, taken, now = lane.midway, lane.taken, time.monotonic()
        mark = (midway, taken // LEAST_BYTES if midway else taken)
        if mark != self.mark:
            self.mark, self.since = mark, now
        limits = self.assoc.wire.limits
        remaining: float = self.since + (limits.pdu_seconds if midway else limits.idle_seconds) - now
        if remaining <= 0:
            raise Silence("nothing but empty PDUs")
        return remaining

    def lost(self) -> None:
        """The connection is gone (PS3.8 9.2, event 17)."""
        self.event_queue.put("Evt17")
        self._act()

    def _control(self, data: memoryview) -> None:
        try:
            pdu, event = self._decode_pdu(bytearray(data))
        except Exception:  # noqa: BLE001 whatever a peer's bytes raise in pynetdicom's decoder
            self.event_queue.put("Evt19")
            return
        self._recv_pdu.put(pdu)
        self.event_queue.put(event)

    def _act(self) -> None:
        """Let the state table work off its events."""
        try:
            while not self.event_queue.empty():
                self.state_machine.do_action(self.event_queue.get_nowait())
        except Exception:  # noqa: BLE001 an event that the state does not allow: PS3.8 says abort
            if self.socket is not None:
                self.socket.send(abort_pdu(2))
                self.socket._shutdown_socket()
            while not self.to_provider_queue.empty():
                self.to_provider_queue.get_nowait()
            self._closed()

    def _closed(self) -> None:
        assoc = self.assoc
        self.state_machine.current_state = CLOSED
        if assoc.is_established:
            assoc.is_aborted = True
            assoc.is_established = False
        assoc._kill = True


class Messages(DIMSEServiceProvider):  # type: ignore[misc]
    """DIMSE service provider whose waiting reads the socket."""

    message: Any

    def get_msg(self, block: bool = False) -> Any:
        seconds = self.dimse_timeout
        deadline = time.monotonic() + (3600.0 if seconds is None else seconds)
        while block and self.msg_queue.empty() and self.assoc.usable():
            try:
                self.dul.pump(deadline - time.monotonic())
            except Silence:
                break
        try:
            return self.msg_queue.get_nowait()
        except queue.Empty:
            return None, None

    def receive_primitive(self, primitive: Any) -> None:
        """Collect a message; a complete one is queued, but for cancels, which are set aside."""
        if self.message is None:
            self.message = DIMSEMessage()
        try:
            if not self.message.decode_msg(primitive, self.assoc):
                return
            message, self.message = self.message, None
            evt.trigger(self.assoc, evt.EVT_DIMSE_RECV, {"message": message})
            request = _primitive(message)
        except Exception:  # noqa: BLE001 whatever a peer's bytes raise in pynetdicom's decoder
            self.dul.event_queue.put("Evt19")
            return
        if isinstance(request, C_CANCEL):
            # One that comes after the last answer stays until its number is used again.
            if len(self.cancel_req) >= MOST_CANCELS:
                self.cancel_req.pop(next(iter(self.cancel_req)))
            self.cancel_req[request.MessageIDBeingRespondedTo] = request
        elif self.assoc.is_requestor and isinstance(request, N_EVENT_REPORT) and request.is_valid_request:
            self.assoc._serve_request(request, message.context_id)
        elif self.msg_queue.qsize() >= MOST_WAITING:
            self.assoc.wire.refuse("too many messages that wait for their answer")
        else:
            request.node_bytes = message.data_set.getbuffer().nbytes if message.data_set is not None else 0
            waiting = sum(getattr(other, "node_bytes", 0) for _, other in tuple(self.msg_queue.queue))
            if waiting + request.node_bytes > self.assoc.wire.limits.max_message:
                self.assoc.wire.refuse("too many bytes in messages that wait for their answer")
            self.msg_queue.put((message.context_id, request))


def _primitive(message: Any) -> Any:
    """A complete message as pynetdicom's primitive.

    pynetdicom refuses a Move Destination that is no AE title, and with it the message. Here it is
    the title "", which nobody has, so that the requestor is told (PS3.4 table C.4-2, 0xA801).
    """
    destination = message.command_set.get("MoveDestination", "none")
    text = destination if isinstance(destination, str) else ""
    if type(message).__name__ != "C_MOVE_RQ" or (len(text) <= LONGEST_AE_TITLE and _AE_TITLE.fullmatch(text)):
        return message.message_to_primitive()
    del message.command_set.MoveDestination
    request = message.message_to_primitive()
    request._move_destination = ""
    return request


class NodeAssociation(Association):  # type: ignore[misc]
    """An association of one thread, as acceptor or requestor.

    As acceptor :meth:`run_reactor` runs it from A-ASSOCIATE to its end in the calling thread.
    As requestor pynetdicom's ``send_*`` methods, ``release`` and ``abort`` work as they do there.
    """

    is_established: bool

    def __init__(self, ae: Any, mode: str, wire: Wire, sock: Any, open_sink: OpenSink | None = None) -> None:
        super().__init__(ae, mode)
        self.wire = wire
        self.dul = Provider(self)
        self.dimse = Messages(self)
        self.lane = Lane(self, wire, open_sink)
        self.acse_timeout = self.ae.acse_timeout
        self.network_timeout = self.ae.network_timeout
        self._is_paused = True  # pynetdicom's requests wait for a reactor that rests; here it always does
        self.set_socket(NodeSocket(self, wire, sock))

    def usable(self) -> bool:
        """Whether it still carries messages."""
        return bool(self.is_established and not self._kill and not self.acse.is_aborted())

    def poll(self) -> None:
        """Read what has come, without waiting: a cancel or an abort shows."""
        while self.usable() and self.wire.arrived():
            self.dul.pump(self.wire.limits.pdu_seconds)

    def say(self, parts: Sequence[bytes]) -> None:
        """Send PDUs that are encoded already; a peer that is gone shows in :meth:`usable`."""
        try:
            self.wire.send(parts)
        except OSError:
            self.dul.lost()

    def wait(self, seconds: float, until: Callable[[], bool]) -> bool:
        """Read messages until ``until()`` is true, the association ends or the time is over."""
        deadline = time.monotonic() + seconds
        while not until():
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not self.usable():
                return False
            try:
                self.dul.pump(remaining)
            except Silence:
                return until()
            self._look_for_end()
        return True

    def end(self) -> None:
        """Free what the association holds; call when it is over, however it ended."""
        self.lane.close()
        if self.is_rejected or self.is_released or self.is_aborted or self._sent_abort:
            self.wire.linger(LINGER_SECONDS)
        self.wire.cut()
        self.wire.close()

    def refuse_request(self, request: Any, context_id: int, status: int) -> None:
        """Answer a request of any kind with a status that says no; abort where its number is not known."""
        if request.MessageID is None:
            self.wire.violation = "a request without Message ID"
            self.abort()
            return
        response = type(request)()
        response.MessageIDBeingRespondedTo = request.MessageID
        response.Status = status
        self.dimse.send_msg(response, context_id)

    def settle(self) -> None:
        """Called before a request other than C-STORE is served: finish what it may have to see."""

    def _serve_request(self, msg: Any, context_id: int) -> None:
        self.settle()
        try:
            super()._serve_request(msg, context_id)
        finally:
            self._is_paused = True  # it was taken back, and the next request of ours would wait for it for ever

    def _run_reactor(self) -> None:
        """Serve until release, abort or silence; in the thread that reads.

        A PDU without data is legal and says nothing: it does not put the end of patience off.
        """
        while not self._kill:
            context_id, message = self.dimse.get_msg()
            if message is not None:
                self._serve_request(message, context_id)
                self.dul.mark = None
            elif not self._look_for_end():
                try:
                    self.dul.stream()
                except Silence:
                    self.wire.violation = (
                        "a message that stopped midway" if self.lane.midway else "an association without traffic"
                    )
                    self.abort()

    def _look_for_end(self) -> bool:
        if self.is_established and self.acse.is_release_requested():
            self.acse.send_release(is_response=True)
            self.is_released = True
            self.is_established = False
            evt.trigger(self, evt.EVT_RELEASED, {})
            self.kill()
            return True
        if self.acse.is_aborted():
            self.dul.receive_pdu()
            self.is_aborted = True
            self.is_established = False
            evt.trigger(self, evt.EVT_ABORTED, {})
            self.kill()
            return True
        return False
