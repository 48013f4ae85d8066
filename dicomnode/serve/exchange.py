"""The wire side of a query or retrieve: responses, cancel and C-STORE sub-operations.

pynetdicom negotiates and frames; its own C-FIND, C-MOVE and C-GET loops are not used: they
send a second final response after a warning (0xB001), name this node as the originator of a
move, decode what is retrieved, and wait for ever for an answer.
"""

from __future__ import annotations

import io
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE

from dicomnode.reactor import park
from dicomnode.serve.identifier import encode_identifier

SUCCESS = 0x0000
PENDING = 0xFF00
PENDING_WARNING = 0xFF01
CANCELLED = 0xFE00
OUT_OF_RESOURCES = 0xA700
CANNOT_COUNT = 0xA701
CANNOT_SUBOPERATE = 0xA702
DESTINATION_UNKNOWN = 0xA801
IDENTIFIER_MISMATCH = 0xA900
SOME_FAILED = 0xB000
LIMIT_REACHED = 0xB001
UNABLE_TO_PROCESS = 0xC000
"""Status codes of PS3.4 tables C.4-1 to C.4-3."""

MAX_QUEUED = 64
"""P-DATA that may wait for the socket: a large object is read as fast as it is sent, no faster."""


@dataclass(slots=True)
class Counts:
    """Sub-operations (PS3.7 9.1.3); ``failed_uids`` goes into a final response alone."""

    remaining: int = 0
    completed: int = 0
    failed: int = 0
    warning: int = 0
    failed_uids: list[str] = field(default_factory=list)

    def add(self, status: int | None, sop_instance_uid: str) -> None:
        self.remaining -= 1
        if status == SUCCESS:
            self.completed += 1
        elif status is not None and (status in (0x0001, 0x0107, 0x0116) or 0xB000 <= status <= 0xBFFF):
            self.warning += 1
        else:
            self.failed += 1
            self.failed_uids.append(sop_instance_uid)

    def final_status(self) -> int:
        """0xB000 when some failed or were stored with a warning, 0xA702 when nothing arrived."""
        if not self.failed and not self.warning:
            return SUCCESS
        return SOME_FAILED if self.completed or self.warning else CANNOT_SUBOPERATE


class Exchange:
    """One C-FIND, C-MOVE or C-GET request on an association, until its final response."""

    def __init__(self, assoc: Any, request: Any, context: Any) -> None:
        self.assoc = assoc
        self.request = request
        self.context_id = int(context.context_id)
        self.sop_class_uid = str(context.abstract_syntax)
        self.transfer_syntax_uid = str(context.transfer_syntax[0])
        self.message_id = int(request.MessageID)

    @property
    def identifier(self) -> bytes:
        return bytes(self.request.Identifier.getvalue()) if self.request.Identifier is not None else b""

    def cancelled(self) -> bool:
        """C-CANCEL came, or there is nobody left to answer."""
        return self.message_id in self.assoc.dimse.cancel_req or self.gone()

    def gone(self) -> bool:
        return not usable(self.assoc)

    def respond(self, status: int, identifier: bytes | None = None, counts: Counts | None = None) -> None:
        """Send one response; waits while the socket is behind. Nothing is sent to a peer that is gone."""
        if self.gone():
            return
        response = type(self.request)()
        response.MessageID = self.message_id
        response.MessageIDBeingRespondedTo = self.message_id
        response.AffectedSOPClassUID = self.sop_class_uid
        response.Status = status
        if counts is not None:
            response.NumberOfCompletedSuboperations = counts.completed
            response.NumberOfFailedSuboperations = counts.failed
            response.NumberOfWarningSuboperations = counts.warning
            if status in (PENDING, CANCELLED):
                response.NumberOfRemainingSuboperations = counts.remaining
        if identifier:
            response.Identifier = io.BytesIO(identifier)
        wait_for_room(self.assoc)
        self.assoc.dimse.send_msg(response, self.context_id)

    def respond_final(self, status: int, counts: Counts) -> None:
        """The end of a retrieve, with the list of what failed."""
        failed = None
        if counts.failed_uids:
            failed = encode_identifier(
                {"FailedSOPInstanceUIDList": "\\".join(counts.failed_uids)}, self.transfer_syntax_uid
            )
        self.respond(status, failed, counts)


def usable(assoc: Any) -> bool:
    """Whether the association still carries messages; it does not consume what waits on it."""
    return bool(assoc.is_established and assoc.dul.is_alive() and not assoc.acse.is_aborted())


def wait_for_room(assoc: Any) -> None:
    while assoc.dul.to_provider_queue.qsize() > MAX_QUEUED and usable(assoc):
        time.sleep(0.001)


@dataclass(frozen=True, slots=True)
class Originator:
    """Who asked for a C-MOVE (PS3.7 9.1.1.1.7): goes into each C-STORE request."""

    ae_title: str
    message_id: int


def store(
    assoc: Any,
    context_id: int,
    *,
    message_id: int,
    sop_class_uid: str,
    sop_instance_uid: str,
    data: tuple[Path, int] | bytes,
    originator: Originator | None,
    seconds: float,
    given_up: Callable[[], bool],
) -> int | None:
    """C-STORE one object on an accepted context; the status, or None without an answer in time.

    Without an answer the association is aborted: nothing after it could be told apart.
    ``data`` is a Part 10 file with the offset of its data set, sent as it is, or a data set.
    ``seconds`` runs from the last byte handed to the socket. OSError: the file cannot be read.
    """
    request = C_STORE()
    request.MessageID = message_id
    request.Priority = 0x0002
    request.AffectedSOPClassUID = sop_class_uid
    request.AffectedSOPInstanceUID = sop_instance_uid
    if originator is not None:
        request.MoveOriginatorApplicationEntityTitle = originator.ae_title
        request.MoveOriginatorMessageID = originator.message_id
    if isinstance(data, bytes):
        request.DataSet = io.BytesIO(data)
    else:
        request._dataset_path = data
    park(assoc)
    assoc._reactor_checkpoint.clear()
    try:
        while not assoc._is_paused:
            if not assoc.is_alive():
                return None
            time.sleep(0.0001)
        message = C_STORE_RQ()
        message.primitive_to_message(request)
        message.context_id = context_id
        for pdata in message.encode_msg(context_id, assoc.dimse.maximum_pdu_size):
            wait_for_room(assoc)
            if not usable(assoc):
                return None
            assoc.dul.send_pdu(pdata)
        while assoc.dul.to_provider_queue.qsize() and usable(assoc):
            time.sleep(0.0005)
        status = _answer(assoc, message_id, time.monotonic() + seconds, given_up)
        if status is None and usable(assoc):
            assoc.abort(block=False)  # an answer that comes late would be taken for the next object's
        return status
    finally:
        assoc._reactor_checkpoint.set()


def _answer(assoc: Any, message_id: int, deadline: float, given_up: Callable[[], bool]) -> int | None:
    while time.monotonic() < deadline and not given_up():
        try:
            _, message = assoc.dimse.msg_queue.get(timeout=0.1)
        except queue.Empty:
            if not usable(assoc):
                return None
            continue
        if isinstance(message, C_STORE) and message.MessageIDBeingRespondedTo == message_id:
            return int(message.Status) if message.Status is not None else None
        if message is not None:
            return None  # anything else here breaks the one outstanding operation (PS3.7 D.3.3.3)
    return None
