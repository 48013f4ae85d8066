"""The wire side of a query or retrieve: responses and cancel.

pynetdicom negotiates and frames; its own C-FIND, C-MOVE and C-GET loops are not used: they
send a second final response after a warning (0xB001), name this node as the originator of a
move, decode what is retrieved, and wait for ever for an answer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pynetdicom.dimse_primitives import C_FIND, C_GET, C_MOVE

from dicomnode.dimse.command import C_FIND_RSP, C_GET_RSP, C_MOVE_RSP, SubOperations, encode_query_reply
from dicomnode.dimse.lane import message_parts
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

UNRECOGNIZED_OPERATION = 0x0211
MISTYPED_ARGUMENT = 0x0212
"""PS3.7 C.5: the context is not for this request; it lacks a mandatory element."""


HELD_BYTES = 32 * 1024
"""Answers of a query that are sent with one system call."""

_REPLIES = {C_FIND: C_FIND_RSP, C_GET: C_GET_RSP, C_MOVE: C_MOVE_RSP}


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
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._pending: dict[int, bytes] = {}

    @property
    def identifier(self) -> bytes:
        return bytes(self.request.Identifier.getvalue()) if self.request.Identifier is not None else b""

    def cancelled(self) -> bool:
        """C-CANCEL came, or there is nobody left to answer; reads what has come, without waiting."""
        self.assoc.poll()
        return self.message_id in self.assoc.dimse.cancel_req or self.gone()

    def gone(self) -> bool:
        return not self.assoc.usable()

    @property
    def holding(self) -> bool:
        """Whether answers wait to be sent with others."""
        return bool(self._held)

    def answer(self, status: int, identifier: bytes) -> None:
        """One match of a query. It waits for others to be sent with; :meth:`respond` sends what still waits.

        The command set is the same for all of them.
        """
        command = self._pending.get(status)
        if command is None:
            command = self._pending[status] = self._command(status, has_data_set=True)
        self._hold(message_parts(self.context_id, command, identifier, self.assoc.dimse.maximum_pdu_size))
        if self._held_bytes >= HELD_BYTES:
            self._send_held()

    def respond(self, status: int, identifier: bytes | None = None, counts: Counts | None = None) -> None:
        """Send one response, after the answers that wait. Nothing is sent to a peer that is gone."""
        command = self._command(status, has_data_set=bool(identifier), counts=counts)
        self._hold(message_parts(self.context_id, command, identifier or b"", self.assoc.dimse.maximum_pdu_size))
        self._send_held()

    def _command(self, status: int, *, has_data_set: bool, counts: Counts | None = None) -> bytes:
        suboperations = None
        if counts is not None:
            remaining = counts.remaining if status in (PENDING, CANCELLED) else None
            suboperations = SubOperations(remaining, counts.completed, counts.failed, counts.warning)
        return encode_query_reply(
            command_field=_REPLIES[type(self.request)],
            message_id=self.message_id,
            sop_class_uid=self.sop_class_uid,
            status=status,
            has_data_set=has_data_set,
            counts=suboperations,
        )

    def _hold(self, parts: list[bytes]) -> None:
        self._held += parts
        self._held_bytes += sum(map(len, parts))

    def _send_held(self) -> None:
        held, self._held, self._held_bytes = self._held, [], 0
        if not self.gone():
            self.assoc.say([b"".join(held)])

    def respond_final(self, status: int, counts: Counts) -> None:
        """The end of a retrieve, with the list of what failed."""
        failed = None
        if counts.failed_uids:
            failed = encode_identifier(
                {"FailedSOPInstanceUIDList": "\\".join(counts.failed_uids)}, self.transfer_syntax_uid
            )
        self.respond(status, failed, counts)
