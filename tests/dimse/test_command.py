"""Command sets of C-STORE against pydicom's reader and writer."""

from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.dimse_messages import C_STORE_RQ
from pynetdicom.dimse_primitives import C_STORE
from pynetdicom.dsutils import decode, encode

from dicomnode.dimse.command import (
    BadCommand,
    elements,
    encode_store_reply,
    encode_store_request,
    store_command,
    store_reply,
)

UIDS = st.from_regex(r"[0-2](\.(0|[1-9][0-9]{0,8})){1,6}", fullmatch=True)
NUMBERS = st.integers(0, 65535)


def parsed(data: bytes) -> object:
    return decode(io.BytesIO(data), True, True)


@given(UIDS, UIDS, NUMBERS, st.none() | st.tuples(st.from_regex(r"[A-Z]{1,16}", fullmatch=True), NUMBERS))
def test_request_is_what_pynetdicom_reads(cls: str, sop: str, number: int, mover: tuple[str, int] | None) -> None:
    data = encode_store_request(message_id=number, sop_class_uid=cls, sop_instance_uid=sop, originator=mover)
    ds = parsed(data)
    assert (ds.AffectedSOPClassUID, ds.AffectedSOPInstanceUID, ds.MessageID) == (cls, sop, number)  # type: ignore[attr-defined]
    assert (ds.CommandField, ds.CommandGroupLength) == (1, len(data) - 12)  # type: ignore[attr-defined]
    if mover is not None:
        assert (ds.MoveOriginatorApplicationEntityTitle, ds.MoveOriginatorMessageID) == mover  # type: ignore[attr-defined]
    command = store_command(elements(data))
    assert (command.message_id, command.sop_class_uid, command.sop_instance_uid) == (number, cls, sop)
    assert command.has_data_set


@given(UIDS, UIDS, NUMBERS, NUMBERS, st.text(max_size=100))
def test_reply_is_what_pynetdicom_reads(cls: str, sop: str, number: int, status: int, comment: str) -> None:
    data = encode_store_reply(
        message_id=number, sop_class_uid=cls, sop_instance_uid=sop, status=status, comment=comment
    )
    ds = parsed(data)
    assert (ds.CommandField, ds.Status, ds.MessageIDBeingRespondedTo) == (0x8001, status, number)  # type: ignore[attr-defined]
    assert (store_reply(elements(data)).status, store_reply(elements(data)).message_id) == (status, number)


@given(UIDS, UIDS, NUMBERS)
def test_reads_what_pynetdicom_writes(cls: str, sop: str, number: int) -> None:
    primitive = C_STORE()
    primitive.MessageID, primitive.Priority = number, 2
    primitive.AffectedSOPClassUID, primitive.AffectedSOPInstanceUID = cls, sop
    primitive.DataSet = io.BytesIO(b"1234")
    message = C_STORE_RQ()
    message.primitive_to_message(primitive)
    command = store_command(elements(encode(message.command_set, True, True)))
    assert (command.message_id, command.sop_class_uid, command.sop_instance_uid) == (number, cls, sop)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_command_or_refused(data: bytes) -> None:
    try:
        store_command(elements(data))
    except BadCommand:
        return
    store_command(elements(data))


@pytest.mark.parametrize("data", [b"\0" * 7, b"\0\0\0\1\xff\xff\xff\xff", b"\x08\0\x18\0\0\0\0\0", b""])
def test_what_is_no_command_is_refused(data: bytes) -> None:
    with pytest.raises(BadCommand):
        store_command(elements(data))
