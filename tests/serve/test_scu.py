"""Odd requests and exact protocol, by pynetdicom as SCU and by hand."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Any

import pytest
from pydicom.dataset import Dataset
from pydicom.uid import generate_uid
from pynetdicom import AE, build_role, evt

from tests.e2e.harness import CANARY, item_from
from tests.peers import CT_IMAGE, EXPLICIT_LITTLE, IMPLICIT_LITTLE, Association, command_set, send_items
from tests.reactor import park
from tests.serve.asking import (
    PATIENT_FIND,
    PATIENT_GET,
    STUDY_FIND,
    STUDY_GET,
    STUDY_MOVE,
    associated,
    find,
    keys,
    relational,
)
from tests.serve.cases import MR_IMAGE, SERIES_A1, SERIES_D, STUDY_A, STUDY_B, STUDY_C, STUDY_D, UIDS, dataset
from tests.serve.conftest import Site


@pytest.mark.parametrize(
    ("model", "query"),
    [
        (STUDY_FIND, keys("PATIENT", PatientID="P1")),
        (STUDY_FIND, Dataset()),
        (STUDY_FIND, keys("NONSENSE", PatientID="P1")),
        (STUDY_FIND, keys("SERIES", SeriesInstanceUID="")),
        (STUDY_FIND, keys("IMAGE", StudyInstanceUID=STUDY_A, SOPInstanceUID="")),
        (STUDY_FIND, keys("SERIES", StudyInstanceUID=[STUDY_A, STUDY_B])),
        (PATIENT_FIND, keys("STUDY", StudyInstanceUID=STUDY_A)),
        (PATIENT_FIND, keys("STUDY", PatientID="P*", StudyInstanceUID="")),
    ],
)
def test_identifier_does_not_match(site: Site, model: str, query: Dataset) -> None:
    query.PatientName = query.get("PatientName", "")
    with associated(site) as assoc:
        assert find(assoc, query, model) == ([], [0xA900])
        assert find(assoc, keys("STUDY", StudyInstanceUID=STUDY_A))[1] == [0xFF00, 0x0000], "the association goes on"


def test_relational_query(site: Site) -> None:
    query = keys("IMAGE", SOPInstanceUID=UIDS[:2], PatientName=f"{CANARY.lower()}*", StudyDate="20240101-")
    with associated(site) as assoc:
        assert find(assoc, query)[1] == [0xA900]
    with associated(site, negotiation=relational(STUDY_FIND)) as assoc:
        found, statuses = find(assoc, query)
        assert {ds.SOPInstanceUID for ds in found} == set(UIDS[:2])
        assert statuses[-1] == 0x0000


def test_unsupported_key_is_left_out_with_a_warning(site: Site) -> None:
    """C.2.2.1.3: what does not exist is not returned; only 0xFF01 tells that something was asked in vain."""
    query = keys("STUDY", StudyInstanceUID=STUDY_A, OtherPatientIDs="x", SeriesDescription="y")
    query.add_new(0x00091010, "LO", "z")
    query.RequestAttributesSequence = []
    with associated(site) as assoc:
        found, statuses = find(assoc, query)
    assert statuses == [0xFF01, 0x0000]
    left_out = ("OtherPatientIDs", "SeriesDescription", "RequestAttributesSequence", 0x00091010)
    assert not [key for key in left_out if key in found[0]]
    assert found[0].StudyInstanceUID == STUDY_A


@pytest.mark.parametrize("model", [STUDY_FIND, PATIENT_FIND])
def test_more_answers_than_the_limit(site: Site, model: str) -> None:
    with associated(site, negotiation=relational(STUDY_FIND, PATIENT_FIND)) as assoc:
        found, statuses = find(assoc, keys("IMAGE", SOPInstanceUID=""), model)
    assert len(found) == 5
    assert statuses[-1] == 0xB001


@pytest.mark.parametrize(
    ("charset", "name", "study"),
    [
        ("ISO_IR 192", "müller^jörg", STUDY_C),
        ("ISO_IR 100", "MÜLLER*", STUDY_C),
        ("ISO_IR 192", "山田^*", STUDY_B),
        ("ISO_IR 192", "*=*=やまだ*", STUDY_B),
        (["", "ISO 2022 IR 87"], "=山田^太郎", STUDY_B),
        ("ISO_IR 192", "yamada^t*", STUDY_B),
    ],
)
def test_character_sets(site: Site, charset: Any, name: str, study: str) -> None:
    query = keys("STUDY", SpecificCharacterSet=charset, PatientName=name, StudyInstanceUID="")
    with associated(site) as assoc:
        found, _ = find(assoc, query)
    assert [ds.StudyInstanceUID for ds in found] == [study]
    assert found[0].SpecificCharacterSet == "ISO_IR 192"
    wanted = {STUDY_B: "Yamada^Tarou=山田^太郎=やまだ^たろう", STUDY_C: "Müller^Jörg"}
    assert str(found[0].PatientName) == wanted[study]


def test_services_that_are_not_allowed_are_rejected_contexts(site: Site) -> None:
    contexts = [(uid, [IMPLICIT_LITTLE]) for uid in (STUDY_FIND, STUDY_MOVE, STUDY_GET, PATIENT_GET)]
    with associated(site, contexts, calling="FINDER") as assoc:
        assert [c.abstract_syntax for c in assoc.accepted_contexts] == [STUDY_FIND]
    with associated(site, [(CT_IMAGE, [EXPLICIT_LITTLE]), (STUDY_GET, [EXPLICIT_LITTLE])]) as assoc:
        assert [c.abstract_syntax for c in assoc.accepted_contexts] == [STUDY_GET], "may get, may not store"
    with Association(site.node.port, calling="CT1", contexts=[(STUDY_FIND, [IMPLICIT_LITTLE])]) as assoc:
        assert not assoc.accepted


class Getter:
    """C-GET with a storage SCP on the same association."""

    def __init__(self, site: Site, answer: Any = lambda event: 0x0000, syntaxes: Sequence[str] = (EXPLICIT_LITTLE,)):
        self.site = site
        self.got: list[Any] = []
        self.answer = answer
        self.syntaxes = syntaxes

    def _store(self, event: Any) -> int:
        self.got.append(event)
        return int(self.answer(event))

    def run(
        self, query: Dataset, model: str = STUDY_GET, negotiation: Sequence[Any] = (), classes: Sequence[str] = ()
    ) -> list[Any]:
        classes = classes or [CT_IMAGE, MR_IMAGE]
        contexts = [(model, [EXPLICIT_LITTLE]), *((c, self.syntaxes) for c in classes)]
        roles = [build_role(c, scp_role=True) for c in classes]
        with associated(
            self.site, contexts, negotiation=[*roles, *negotiation], handlers=[(evt.EVT_C_STORE, self._store)]
        ) as assoc:
            park(assoc)
            return list(assoc.send_c_get(query, model, msg_id=7))


def counts(status: Dataset) -> tuple[int | None, ...]:
    return tuple(status.get(f"NumberOf{k}Suboperations") for k in ("Remaining", "Completed", "Failed", "Warning"))


def test_get_counts(site: Site) -> None:
    answers = Getter(site).run(keys("STUDY", StudyInstanceUID=STUDY_A))
    assert [counts(s) for s, _ in answers] == [
        (3, 1, 0, 0), (2, 2, 0, 0), (1, 3, 0, 0), (None, 4, 0, 0),
    ]  # fmt: skip
    assert [s.Status for s, _ in answers] == [0xFF00] * 3 + [0x0000]


def test_get_counts_what_has_no_context_as_failed(site: Site) -> None:
    answers = Getter(site).run(keys("STUDY", StudyInstanceUID=STUDY_A), classes=[CT_IMAGE])
    status, identifier = answers[-1]
    assert (status.Status, counts(status)) == (0xB000, (None, 3, 1, 0))
    assert identifier.FailedSOPInstanceUIDList == UIDS[3]
    assert all(ds is None for _, ds in answers[:-1])


def test_get_when_nothing_arrives(site: Site) -> None:
    answers = Getter(site, answer=lambda _: 0xA700).run(
        keys("SERIES", StudyInstanceUID=STUDY_A, SeriesInstanceUID=SERIES_A1)
    )
    status, identifier = answers[-1]
    assert (status.Status, counts(status)) == (0xA702, (None, 0, 3, 0))
    assert sorted(identifier.FailedSOPInstanceUIDList) == sorted(UIDS[:3])


def test_get_with_warnings(site: Site) -> None:
    answers = Getter(site, answer=lambda _: 0xB007).run(keys("STUDY", StudyInstanceUID=STUDY_D))
    assert (answers[-1][0].Status, counts(answers[-1][0])) == (0xB000, (None, 0, 0, 2))


def test_get_cancelled_after_the_first(site: Site) -> None:
    def cancel(event: Any) -> int:
        context = next(c for c in event.assoc.accepted_contexts if c.abstract_syntax == STUDY_GET)
        event.assoc.send_c_cancel(7, context.context_id)
        return 0x0000

    getter = Getter(site, answer=cancel)
    answers = getter.run(keys("STUDY", StudyInstanceUID=STUDY_A))
    assert len(getter.got) == 1
    assert (answers[-1][0].Status, counts(answers[-1][0])) == (0xFE00, (3, 1, 0, 0))


def test_get_as_stored_where_the_peer_takes_it(site: Site) -> None:
    getter = Getter(site, syntaxes=["1.2.840.10008.1.2.5"])
    answers = getter.run(keys("STUDY", StudyInstanceUID=STUDY_D))
    assert (answers[-1][0].Status, counts(answers[-1][0])) == (0xB000, (None, 1, 1, 0))
    assert getter.got[0].request.AffectedSOPInstanceUID == UIDS[6]


def test_get_in_implicit(site: Site) -> None:
    getter = Getter(site, syntaxes=[IMPLICIT_LITTLE, EXPLICIT_LITTLE])
    answers = getter.run(keys("STUDY", StudyInstanceUID=STUDY_D))
    assert answers[-1][0].Status == 0x0000
    for event in getter.got:
        ds = event.dataset
        ds.file_meta = event.file_meta
        assert ds.file_meta.TransferSyntaxUID == IMPLICIT_LITTLE
        assert ds.pixel_array[0, 5] == 5


def test_get_relational_and_patient_level(site: Site) -> None:
    query = keys("IMAGE", SOPInstanceUID=UIDS[0])
    assert [s.Status for s, _ in Getter(site).run(query)] == [0xA900]
    assert Getter(site).run(query, negotiation=relational(STUDY_GET))[-1][0].Status == 0x0000
    assert [s.Status for s, _ in Getter(site).run(keys("PATIENT", PatientID="P1"))] == [0xA900]
    assert counts(Getter(site).run(keys("PATIENT", PatientID="P1"), PATIENT_GET)[-1][0])[1] == 4
    assert Getter(site).run(keys("PATIENT", PatientID="nobody"), PATIENT_GET)[-1][0].Status == 0x0000
    assert [s.Status for s, _ in Getter(site).run(keys("PATIENT", PatientID=""), PATIENT_GET)] == [0xA900]


def test_a_missing_file_is_counted_as_failed(site: Site) -> None:
    study, series = generate_uid(), generate_uid()
    apart = {"PatientID": "Q9", "PatientName": "Other", "AccessionNumber": "Z", "StudyDate": "", "StudyTime": ""}
    sent = [item_from(dataset(series, study, generate_uid(), **apart)) for _ in range(2)]
    assert set(send_items(site.node.port, sent)) == {0x0000}
    row = site.node.instance(sent[0].sop_instance_uid)
    assert row is not None
    (site.node.data_dir / "objects" / row["file"]).unlink()
    status, identifier = Getter(site).run(keys("STUDY", StudyInstanceUID=study))[-1]
    assert (status.Status, counts(status)) == (0xB000, (None, 1, 1, 0))
    assert identifier.FailedSOPInstanceUIDList == sent[0].sop_instance_uid


def test_move_names_who_asked(site: Site) -> None:
    got: list[Any] = []

    def take(event: Any) -> int:
        got.append(event.request)
        return 0x0000

    ae = AE(ae_title="SINK")
    ae.add_supported_context(CT_IMAGE, [EXPLICIT_LITTLE])
    server = ae.start_server(("127.0.0.1", site.sink_port), block=False, evt_handlers=[(evt.EVT_C_STORE, take)])
    try:
        with associated(site, [(STUDY_MOVE, [IMPLICIT_LITTLE])]) as assoc:
            query = keys("SERIES", StudyInstanceUID=STUDY_D, SeriesInstanceUID=SERIES_D)
            park(assoc)
            answers = list(assoc.send_c_move(query, "SINK", STUDY_MOVE, msg_id=9))
    finally:
        server.shutdown()
        server.server_close()
    assert (answers[-1][0].Status, counts(answers[-1][0])) == (0x0000, (None, 2, 0, 0))
    assert {(r.MoveOriginatorApplicationEntityTitle, r.MoveOriginatorMessageID) for r in got} == {("ASKER", 9)}


def test_a_target_that_goes_away(site: Site) -> None:
    """It aborts in the second object: what follows is failed, and the requestor gets its answer."""
    number = iter(range(100))

    def take(event: Any) -> int:
        if next(number) == 1:
            event.assoc.abort(block=False)
        return 0x0000

    ae = AE(ae_title="SINK")
    ae.add_supported_context(CT_IMAGE, [EXPLICIT_LITTLE])
    server = ae.start_server(("127.0.0.1", site.sink_port), block=False, evt_handlers=[(evt.EVT_C_STORE, take)])
    try:
        with associated(site, [(STUDY_MOVE, [IMPLICIT_LITTLE])]) as assoc:
            query = keys("SERIES", StudyInstanceUID=STUDY_A, SeriesInstanceUID=SERIES_A1)
            park(assoc)
            status, identifier = list(assoc.send_c_move(query, "SINK", STUDY_MOVE))[-1]
    finally:
        server.shutdown()
        server.server_close()
    assert (status.Status, counts(status)) == (0xB000, (None, 1, 2, 0))
    assert sorted(identifier.FailedSOPInstanceUIDList) == sorted(UIDS[1:3])


def raw_find(message_id: int = 1) -> list[tuple[int, bytes]]:
    uid = STUDY_FIND.encode() + b"\0" * (len(STUDY_FIND) % 2)
    return [
        (0x0002, uid),
        (0x0100, b"\x20\x00"),
        (0x0110, struct.pack("<H", message_id)),
        (0x0700, b"\x00\x00"),
        (0x0800, b"\x01\x00"),
    ]


SEQUENCE = b"\x40\x00\x75\x02SQ\x00\x00\xff\xff\xff\xff"
ITEM = b"\xfe\xff\x00\xe0\xff\xff\xff\xff"


@pytest.mark.parametrize(
    "identifier",
    [b"\x08\x00\x52\x00CS\xff\xff", SEQUENCE + (ITEM + SEQUENCE) * 500, b"nonsense that is no data set"],
    ids=["length", "depth", "nonsense"],
)
def test_bytes_that_are_no_identifier(site: Site, identifier: bytes) -> None:
    with Association(site.node.port, calling="ASKER", contexts=[(STUDY_FIND, [EXPLICIT_LITTLE])]) as assoc:
        context = assoc.accepted[STUDY_FIND, EXPLICIT_LITTLE]
        assoc.request(context, raw_find(), identifier)
        assert assoc.response() == 0xC000


def final_status(assoc: Association) -> int:
    """Reads responses and their identifiers up to the one that is not pending."""
    command = b""
    while True:
        kind, payload = assoc.read_pdu()
        assert kind == 0x04
        position = 0
        while position < len(payload):
            length = int.from_bytes(payload[position : position + 4], "big")
            header = payload[position + 5]
            if header & 1:
                command += payload[position + 6 : position + 4 + length]
                if header & 2:
                    status, command = assoc._status(command), b""
                    if status not in (0xFF00, 0xFF01):
                        return status
            position += 4 + length


def test_a_cancel_right_behind_its_request_is_not_lost(site: Site) -> None:
    """Both are on the wire before the receiver looks; the cancel is not for the next request of that number."""
    # One patient's studies: what other tests have stored here must not bring the answers to their limit.
    query = b"\x08\x00\x52\x00CS\x06\x00STUDY " + b"\x10\x00\x20\x00LO\x02\x00P1" + b"\x20\x00\x0d\x00UI\x00\x00"
    with Association(site.node.port, calling="ASKER", contexts=[(STUDY_FIND, [EXPLICIT_LITTLE])]) as assoc:
        context = assoc.accepted[STUDY_FIND, EXPLICIT_LITTLE]
        cancel = [(0x0100, b"\xff\x0f"), (0x0120, struct.pack("<H", 3)), (0x0800, b"\x01\x01")]
        out = b"".join(assoc.fragments(context, command_set(raw_find(3)), command=True))
        out += b"".join(assoc.fragments(context, query, command=False))
        out += b"".join(assoc.fragments(context, command_set(cancel), command=True))
        assoc.send(out)
        # The answers may be out before the receiver has read the cancel.
        assert final_status(assoc) in (0xFE00, 0x0000)
        assoc.request(context, raw_find(3), query)
        assert final_status(assoc) == 0x0000


def test_many_queries_at_once(site: Site) -> None:
    results: list[int] = []

    def ask() -> None:
        with associated(site) as assoc:
            for _ in range(3):
                results.append(find(assoc, keys("STUDY", PatientID="P1", StudyInstanceUID=""))[1][-1])

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [0x0000] * 24


def test_no_identifier_in_the_log(site: Site) -> None:
    with associated(site) as assoc:
        find(assoc, keys("STUDY", PatientID="Zqcanary", PatientName="Zqcanary*", StudyInstanceUID=""))
        query = keys("SERIES", PatientID="Zqcanary")
        assert find(assoc, query)[1] == [0xA900]
    text = site.node.log.read_text()
    assert "zqcanary" not in text.casefold()
    assert all("zqcanary" not in str(e).casefold() for e in site.node.events())
