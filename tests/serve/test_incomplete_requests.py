"""Requests without a mandatory element, or on a context that is not for them: an answer or an end, never silence."""

from __future__ import annotations

import struct

import pytest

from tests.e2e.harness import CANARY, item_from
from tests.peers import CT_IMAGE, EXPLICIT_LITTLE, VERIFICATION, Association, Cut
from tests.serve.asking import STUDY_FIND, STUDY_GET, STUDY_MOVE
from tests.serve.cases import SERIES_A1, STUDY_A, dataset
from tests.serve.conftest import Site

Elements = list[tuple[int, bytes]]

MPPS = "1.2.840.10008.3.1.2.3.3"
IDENTIFIER = b"\x08\x00\x52\x00CS\x06\x00STUDY \x20\x00\x0d\x00UI\x06\x001.2.3\x00"
FIND, MOVE, GET, ECHO, CREATE = 0x0020, 0x0021, 0x0010, 0x0030, 0x0140
MISTYPED, UNRECOGNIZED = 0x0212, 0x0211


def uid(text: str) -> bytes:
    return text.encode() + b"\0" * (len(text) % 2)


def us(number: int) -> bytes:
    return struct.pack("<H", number)


def command(field: int, sop_class: str, *leave_out: int, data: bool = True) -> Elements:
    whole = [(0x0002, uid(sop_class)), (0x0100, us(field)), (0x0110, us(3)), (0x0700, us(0))]
    whole += [(0x0800, us(1 if data else 0x0101)), (0x1000, uid("1.2.3"))]
    return [(tag, value) for tag, value in whole if tag not in leave_out]


@pytest.mark.parametrize(
    ("model", "elements", "status"),
    [
        (STUDY_FIND, command(FIND, STUDY_FIND, 0x0002), MISTYPED),
        (STUDY_GET, command(GET, STUDY_GET, 0x0002), MISTYPED),
        (STUDY_MOVE, command(MOVE, STUDY_MOVE), MISTYPED),  # no Move Destination
        (STUDY_FIND, command(ECHO, VERIFICATION, data=False), UNRECOGNIZED),
        (STUDY_FIND, command(CREATE, MPPS), UNRECOGNIZED),
        (STUDY_FIND, command(MOVE, STUDY_MOVE), MISTYPED),
        (STUDY_MOVE, command(FIND, STUDY_FIND), 0xC000),
        (STUDY_FIND, command(FIND, STUDY_FIND, data=False), 0xA900),
    ],
)
def test_each_is_answered_and_the_association_goes_on(site: Site, model: str, elements: Elements, status: int) -> None:
    contexts = [(model, [EXPLICIT_LITTLE])]
    with Association(site.node.port, calling="ASKER", contexts=contexts, timeout=10) as assoc:
        context = assoc.accepted[model, EXPLICIT_LITTLE]
        for _ in range(2):
            data = None if (0x0800, us(0x0101)) in elements else IDENTIFIER
            assoc.request(context, elements, data)
            assert assoc.response() == status


@pytest.mark.parametrize(
    "destination",
    [
        b"",
        b"  ",
        b"SEVENTEEN-LETTERS ",
        b"S" * 60000,
        b"SINK\\PLAIN",
        b"SINK\x01\x02",
        "SÍNK".encode(),
        CANARY.encode() + b"\x01^",
    ],
    ids=["empty", "spaces", "long", "very long", "two", "control", "not ASCII", "canary"],
)
def test_a_destination_that_is_no_ae_title_is_unknown(site: Site, destination: bytes) -> None:
    elements = [*command(MOVE, STUDY_MOVE), (0x0600, destination)]
    with Association(site.node.port, calling="ASKER", contexts=[(STUDY_MOVE, [EXPLICIT_LITTLE])], timeout=10) as assoc:
        for _ in range(2):
            assoc.request(assoc.accepted[STUDY_MOVE, EXPLICIT_LITTLE], elements, IDENTIFIER)
            assert assoc.response() == 0xA801


@pytest.mark.parametrize(
    ("context", "elements", "status"),
    [
        (CT_IMAGE, command(ECHO, CT_IMAGE, data=False), UNRECOGNIZED),
        (CT_IMAGE, command(ECHO, VERIFICATION, data=False), UNRECOGNIZED),
        (VERIFICATION, command(ECHO, CT_IMAGE, data=False), 0x0122),
        (VERIFICATION, command(ECHO, VERIFICATION, data=False), 0x0000),
        (CT_IMAGE, command(FIND, STUDY_FIND), UNRECOGNIZED),
        (CT_IMAGE, command(FIND, CT_IMAGE), UNRECOGNIZED),
        (VERIFICATION, command(CREATE, MPPS), UNRECOGNIZED),
    ],
)
def test_contexts_of_echo_and_store_are_for_nothing_else(
    site: Site, context: str, elements: Elements, status: int
) -> None:
    contexts = [(VERIFICATION, [EXPLICIT_LITTLE]), (CT_IMAGE, [EXPLICIT_LITTLE])]
    with Association(site.node.port, contexts=contexts, timeout=10) as assoc:
        for _ in range(2):
            data = None if (0x0800, us(0x0101)) in elements else IDENTIFIER
            assoc.request(assoc.accepted[context, EXPLICIT_LITTLE], elements, data)
            assert assoc.response() == status


@pytest.mark.parametrize("context", [VERIFICATION, STUDY_FIND, STUDY_GET])
def test_nothing_is_stored_by_the_context_of_another_service(site: Site, context: str) -> None:
    """A peer that may not store has such contexts all the same."""
    item = item_from(dataset(SERIES_A1, STUDY_A, "1.2.3.4.5"))
    contexts = [(context, [EXPLICIT_LITTLE])]
    with Association(site.node.port, calling="ASKER", contexts=contexts, timeout=10) as assoc:
        for _ in range(2):
            assoc.request(assoc.accepted[context, EXPLICIT_LITTLE], assoc.store_command(item), item.data)
            assert assoc.response() == UNRECOGNIZED
    assert site.node.instance(item.sop_instance_uid) is None


def test_without_a_number_there_is_no_answer_but_an_end(site: Site) -> None:
    assoc = Association(site.node.port, calling="ASKER", contexts=[(STUDY_FIND, [EXPLICIT_LITTLE])], timeout=10)
    assoc.request(assoc.accepted[STUDY_FIND, EXPLICIT_LITTLE], command(FIND, STUDY_FIND, 0x0110), IDENTIFIER)
    with pytest.raises(Cut) as cut:
        assoc.response()
    assert cut.value.abort is not None
    assoc.sock.close()
