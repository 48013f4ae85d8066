"""A peer that takes very small PDUs (PS3.8 D.1): every message of ours comes in pieces that fit."""

from __future__ import annotations

import struct

import pytest
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_dataset

from tests.peers import EXPLICIT_LITTLE, IMPLICIT_LITTLE, VERIFICATION, Association, contexts_for
from tests.serve.asking import STUDY_FIND, keys
from tests.serve.cases import STUDY_A, items
from tests.serve.conftest import Site


@pytest.mark.parametrize("max_pdu", [8, 64, 200])
def test_echo_and_store(site: Site, max_pdu: int) -> None:
    item = items()[0]
    with Association(site.node.port, contexts=contexts_for([item]), max_pdu=max_pdu) as assoc:
        assert assoc.echo() == 0x0000
        assert assoc.store(item) == 0x0000
        assert assoc.store(item, uid="1.2.3") == 0xA900
        assert 0 < assoc.longest_pdu <= max_pdu


@pytest.mark.parametrize("max_pdu", [8, 64])
def test_query(site: Site, max_pdu: int) -> None:
    buffer = DicomBytesIO()
    buffer.is_implicit_VR, buffer.is_little_endian = False, True
    write_dataset(buffer, keys("SERIES", StudyInstanceUID=STUDY_A, Modality="", SeriesInstanceUID=""))
    contexts = [(VERIFICATION, [IMPLICIT_LITTLE]), (STUDY_FIND, [EXPLICIT_LITTLE])]
    with Association(site.node.port, calling="ASKER", contexts=contexts, max_pdu=max_pdu) as assoc:
        command = [
            (0x0002, STUDY_FIND.encode() + b"\0" * (len(STUDY_FIND) % 2)),
            (0x0100, b"\x20\x00"),
            (0x0110, struct.pack("<H", 9)),
            (0x0700, b"\0\0"),
            (0x0800, b"\1\0"),
        ]
        assoc.request(assoc.accepted[STUDY_FIND, EXPLICIT_LITTLE], command, buffer.getvalue())
        statuses = []
        while 0x0000 not in statuses:
            statuses.append(assoc.response())
            if statuses[-1] == 0xFF00:
                assoc.data_set()
        assert statuses == [0xFF00, 0xFF00, 0x0000]
        assert 0 < assoc.longest_pdu <= max_pdu
