"""P-DATA in the reading thread: C-STORE is handled here, every other message goes to pynetdicom.

A message is a command, in one or more fragments, and often a data set (PS3.7 8.1, PS3.8
annex E). The fragments of a C-STORE go straight to a sink; nothing is queued and nothing is
decoded by pynetdicom.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from pynetdicom.pdu_primitives import P_DATA

from dicomnode.dimse.command import (
    C_STORE_RQ,
    C_STORE_RSP,
    MAX_COMMAND_BYTES,
    BadCommand,
    StoreCommand,
    StoreReply,
    command_field,
    elements,
    encode_store_reply,
    has_data_set,
    store_command,
    store_reply,
)
from dicomnode.dimse.wire import HEADER_BYTES, Wire

_PDV = struct.Struct(">IBB")
_IS_COMMAND, _IS_LAST = 0x01, 0x02
_PDU_PDV = struct.Struct(">BxIIBB")
PDV_OVERHEAD = 6
"""Bytes of a PDU's length that are not data: item length, context ID and control header."""

MOST_REPLIES = 16
"""Answers that nobody waits for; a peer that goes on sending them would fill the memory."""


class Reply(NamedTuple):
    """What a C-STORE is answered with; ``comment`` is free of patient data."""

    status: int
    comment: str = ""


class Sink(Protocol):
    """Takes the fragments of one object; ``finish`` is called once, after the last."""

    # The order is write*, finish, [the reply is sent], settle; or write*, discard.

    def write(self, fragment: memoryview) -> None: ...

    def finish(self) -> Reply: ...

    def settle(self) -> None:
        """The reply was sent, or could not be: what may come after it, such as counting."""

    def discard(self) -> None:
        """The association ended inside the object."""


OpenSink = Callable[[StoreCommand, Any], Sink]
"""(command, accepted presentation context) -> where its data set goes."""


def pdata_header(context_id: int, size: int, *, command: bool, last: bool) -> bytes:
    """Head of a P-DATA-TF PDU with one fragment of ``size`` bytes (PS3.8 9.3.5)."""
    control = (_IS_COMMAND if command else 0) | (_IS_LAST if last else 0)
    return _PDU_PDV.pack(0x04, size + PDV_OVERHEAD, size + 2, context_id, control)


def message_parts(context_id: int, command: bytes, data_set: bytes, max_pdu: int) -> list[bytes]:
    """The P-DATA-TF PDUs of a message; ``max_pdu`` is what the peer takes, 0 for no limit.

    A peer that takes less than 8 bytes takes no message at all (PS3.8 9.3.5.1); it gets PDUs of 8.
    """
    piece = max(max_pdu - PDV_OVERHEAD, 2) & ~1 if max_pdu else max(len(command), len(data_set))
    if len(command) <= piece:
        parts = [pdata_header(context_id, len(command), command=True, last=True) + command]
    else:
        parts = list(_fragments(context_id, command, piece, command=True))
    parts += _fragments(context_id, data_set, piece, command=False)
    return parts


def _fragments(context_id: int, data: bytes, piece: int, *, command: bool) -> Iterator[bytes]:
    for begin in range(0, len(data), piece):
        fragment = data[begin : begin + piece]
        yield pdata_header(context_id, len(fragment), command=command, last=begin + piece >= len(data))
        yield fragment


class Lane:
    """Puts the messages of one association together."""

    def __init__(self, assoc: Any, wire: Wire, open_sink: OpenSink | None) -> None:
        self._assoc = assoc
        self._wire = wire
        self._open_sink = open_sink
        self._command = bytearray()
        self._context_id = 0
        self._sink: Sink | None = None
        self._store: StoreCommand | None = None
        self._passing = False
        self._size = 0
        self.taken = 0
        """Bytes of commands and data sets so far."""
        self.replies: list[StoreReply] = []
        """Answers to C-STORE requests of ours, for :mod:`dicomnode.dimse.store`."""

    def receive(self, pdu: memoryview) -> None:
        """Handle one P-DATA-TF PDU. Raises Violation when it breaks the rules of a message."""
        position, end = HEADER_BYTES, len(pdu)
        while position < end:
            if end - position < PDV_OVERHEAD:
                self._wire.refuse("a P-DATA PDU whose items do not fit")
            length, context_id, control = _PDV.unpack_from(pdu, position)
            stop = position + 4 + length
            if length < 2 or stop > end:
                self._wire.refuse("a P-DATA PDU whose items do not fit")
            self._fragment(context_id, control, pdu[position + PDV_OVERHEAD : stop])
            position = stop

    @property
    def midway(self) -> bool:
        """Whether a message has begun and is not complete."""
        return bool(self._command) or self._passing or self._store is not None

    def close(self) -> None:
        """The association is over: what was not complete never came."""
        if self._sink is not None:
            self._sink.discard()
            self._sink = None

    def _fragment(self, context_id: int, control: int, data: memoryview) -> None:
        last = bool(control & _IS_LAST)
        self.taken += len(data)
        if control & _IS_COMMAND:
            if self._store is not None or self._passing:
                self._wire.refuse("a command inside a data set")
            if self._command and context_id != self._context_id:
                self._wire.refuse("a command on two presentation contexts")
            if len(self._command) + len(data) > MAX_COMMAND_BYTES:
                self._wire.refuse("a command set that is too long")
            self._context_id = context_id
            self._command += data
            if last:
                self._command_complete()
            return
        if context_id != self._context_id or not (self._store is not None or self._passing):
            self._wire.refuse("a data set without its command")
        self._size += len(data)
        if self._store is not None:
            self._stored_fragment(data, last)
        else:
            if self._size > self._wire.limits.max_message:
                self._wire.refuse(f"a message of more than {self._wire.limits.max_message} bytes")
            self._pass_on(control, data)
            self._passing = not last

    def _command_complete(self) -> None:
        data, self._command = self._command, bytearray()
        self._size = 0
        try:
            found = elements(data)
            field = command_field(found)
            if field == C_STORE_RSP:
                if len(self.replies) >= MOST_REPLIES:
                    self._wire.refuse("answers to requests that were not made")
                self.replies.append(store_reply(found))
                return
            context = self._assoc._accepted_cx.get(self._context_id)
            if field == C_STORE_RQ and self._open_sink is not None and context is not None and context.as_scp:
                self._begin_store(store_command(found), context)
                return
        except BadCommand:
            self._wire.refuse("a command set that cannot be read")
        self._passing = has_data_set(found)
        self._pass_on(_IS_COMMAND | _IS_LAST, memoryview(data))

    def _begin_store(self, command: StoreCommand, context: Any) -> None:
        assert self._open_sink is not None
        self._sink = self._open_sink(command, context)
        self._store = command
        if not command.has_data_set:
            self._finish_store()

    def _stored_fragment(self, data: memoryview, last: bool) -> None:
        assert self._sink is not None
        if self._size > self._wire.limits.max_object:
            self._wire.refuse(f"an object of more than {self._wire.limits.max_object} bytes")
        self._sink.write(data)
        if last:
            self._finish_store()

    def _finish_store(self) -> None:
        command, sink = self._store, self._sink
        assert command is not None and sink is not None
        self._store = self._sink = None
        reply = sink.finish()
        data = encode_store_reply(
            message_id=command.message_id,
            sop_class_uid=command.sop_class_uid,
            sop_instance_uid=command.sop_instance_uid,
            status=reply.status,
            comment=reply.comment,
        )
        try:
            self._wire.send(message_parts(self._context_id, data, b"", self._assoc.dimse.maximum_pdu_size))
        finally:
            sink.settle()

    def _pass_on(self, control: int, data: memoryview) -> None:
        primitive = P_DATA()
        primitive.presentation_data_value_list = [[self._context_id, bytes((control,)) + data]]
        self._assoc.dimse.receive_primitive(primitive)
