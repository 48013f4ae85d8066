"""Messages of storage commitment: what is read, what is refused, what is written (PS3.4 J.3)."""

from __future__ import annotations

import io
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.filereader import read_dataset

from dicomnode import commitment
from dicomnode.commitment import (
    Reference,
    Refused,
    Request,
    Told,
    Verdict,
    classify_report_status,
    contradictory,
    encode_report,
    encode_request,
    parse_report,
    parse_request,
    storable,
    verdict_of,
)
from tests.commitment_case import asked, encoded, reference, told
from tests.peers import CT_IMAGE, EXPLICIT_LITTLE, IMPLICIT_LITTLE

SEG = "1.2.840.10008.5.1.4.1.1.66.4"
PRINT = "1.2.840.10008.5.1.1.9"
SYNTAXES = st.sampled_from([EXPLICIT_LITTLE, IMPLICIT_LITTLE])
UIDS = st.from_regex(r"[1-9][0-9.]{0,63}", fullmatch=True)
REFERENCES = st.lists(
    st.builds(Reference, st.sampled_from([CT_IMAGE, SEG, PRINT]), UIDS), min_size=1, max_size=30, unique=True
)
VERDICTS = st.sampled_from([int(v) for v in Verdict])


def decoded(data: bytes, syntax: str) -> Dataset:
    return read_dataset(io.BytesIO(data), syntax == IMPLICIT_LITTLE, True)


@given(UIDS, REFERENCES, SYNTAXES)
def test_a_request_is_read_as_it_was_written(transaction: str, references: list[Reference], syntax: str) -> None:
    request = Request(transaction, tuple(references))
    assert parse_request(encode_request(request, syntax), syntax) == request


@given(REFERENCES, SYNTAXES, st.data())
def test_a_report_is_read_as_it_was_written(references: list[Reference], syntax: str, data: Any) -> None:
    verdicts = data.draw(st.lists(VERDICTS, min_size=len(references), max_size=len(references)))
    event_type, written = encode_report(Request("1.2", tuple(references)), verdicts, "NODE", syntax)
    report = parse_report(event_type, written, syntax)
    failed = {r.SOPInstanceUID for r, v in zip(references, verdicts, strict=True) if v}
    assert set(report.failed) == failed and event_type == (2 if failed else 1)
    assert report.committed == {r.SOPInstanceUID for r in references} - failed
    assert report.TransactionUID == "1.2"


@pytest.mark.parametrize("syntax", [EXPLICIT_LITTLE, IMPLICIT_LITTLE])
def test_pydicom_reads_our_report(syntax: str) -> None:
    request = Request("1.2.3", (Reference(CT_IMAGE, "1.5.1"), Reference(SEG, "1.5.2")))
    event_type, data = encode_report(request, [Verdict.committed, Verdict.no_such_instance], "NODE", syntax)
    ds = decoded(data, syntax)
    assert (event_type, ds.TransactionUID, ds.RetrieveAETitle) == (2, "1.2.3", "NODE")
    (one,), (other,) = ds.ReferencedSOPSequence, ds.FailedSOPSequence
    assert (one.ReferencedSOPClassUID, one.ReferencedSOPInstanceUID) == (CT_IMAGE, "1.5.1")
    assert (other.ReferencedSOPInstanceUID, other.FailureReason) == ("1.5.2", 0x0112)
    assert "StorageMediaFileSetID" not in ds and "StorageMediaFileSetUID" not in ds
    event_type, data = encode_report(request, [0x0110, 0x0110], "NODE", syntax)
    assert "ReferencedSOPSequence" not in decoded(data, syntax) and "RetrieveAETitle" not in decoded(data, syntax)
    event_type, data = encode_report(request, [0, 0], "NODE", syntax)
    assert event_type == 1 and "FailedSOPSequence" not in decoded(data, syntax)


def test_pydicom_reads_our_request() -> None:
    ds = decoded(encode_request(Request("1.2.3", (Reference(CT_IMAGE, "1.5.1"),)), EXPLICIT_LITTLE), EXPLICIT_LITTLE)
    assert ds == asked(["1.5.1"], "1.2.3")


@pytest.mark.parametrize(
    ("ds", "status"),
    [
        (asked(["1.5"], ReferencedSOPSequence=None), 0x0115),
        (asked([]), 0x0115),
        (asked(["1.5"], TransactionUID=None), 0x0115),
        (asked(["1.5", reference("")]), 0x0115),
        (asked([reference("1.5", "")]), 0x0115),
    ],
    ids=["no-sequence", "empty-sequence", "no-transaction", "no-instance", "no-class"],
)
def test_requests_that_are_refused(ds: Dataset, status: int) -> None:
    with pytest.raises(Refused) as refused:
        parse_request(encoded(ds), EXPLICIT_LITTLE)
    assert refused.value.status == status and "1.5" not in refused.value.comment


def test_what_is_no_uid_is_refused_and_not_repeated() -> None:
    for wrong in (b"../etc", b"1.2/20", b"1.2 20", b"Smith^"):
        data = encoded(asked(["1.9.99"])).replace(b"1.9.99", wrong)
        with pytest.raises(Refused) as refused:
            parse_request(data, EXPLICIT_LITTLE)
        assert refused.value.status == 0x0115 and wrong.decode() not in refused.value.comment


def test_number_of_references_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commitment, "MAX_REFERENCES", 3)
    assert len(parse_request(encoded(asked(["1.1", "1.2", "1.3"])), EXPLICIT_LITTLE).references) == 3
    with pytest.raises(Refused) as refused:
        parse_request(encoded(asked(["1.1", "1.2", "1.3", "1.4"])), EXPLICIT_LITTLE)
    assert refused.value.status == 0x0213


def test_a_reference_that_is_there_twice_counts_once() -> None:
    found = parse_request(encoded(asked(["1.1", "1.2", "1.1", reference("1.2", SEG)])), EXPLICIT_LITTLE)
    assert found.references == (Reference(CT_IMAGE, "1.1"), Reference(CT_IMAGE, "1.2"), Reference(SEG, "1.2"))
    assert contradictory(found.references) == {"1.2"}


@given(st.binary(max_size=300))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    for parse in (parse_request, lambda d, s: parse_report(1, d, s)):
        for syntax in (EXPLICIT_LITTLE, IMPLICIT_LITTLE):
            try:
                parse(data, syntax)
            except Refused as refused:
                assert refused.status in (0x0115, 0x0213)


def test_what_is_committed_and_failed_is_failed() -> None:
    report = parse_report(1, encoded(told("1.2", ["1.5", "1.6"], {"1.6": 0x0112})), EXPLICIT_LITTLE)
    assert report.committed == {"1.5"} and report.failed == {"1.6": 0x0112}


def test_a_failure_without_a_reason_is_a_failure() -> None:
    ds = told("1.2", [], {"1.6": 0x0112, "1.7": 0})
    del ds.FailedSOPSequence[0].FailureReason
    assert parse_report(2, encoded(ds), EXPLICIT_LITTLE).failed == {"1.6": 0x0110, "1.7": 0x0110}


def test_an_unknown_event_type_is_refused() -> None:
    with pytest.raises(Refused) as refused:
        parse_report(3, encoded(told("1.2", ["1.5"])), EXPLICIT_LITTLE)
    assert refused.value.status == 0x0113


@pytest.mark.parametrize(
    ("sop_class", "held", "intact", "verdict"),
    [
        (CT_IMAGE, CT_IMAGE, True, Verdict.committed),
        (CT_IMAGE, CT_IMAGE, False, Verdict.processing_failure),
        (CT_IMAGE, CT_IMAGE, None, Verdict.processing_failure),
        (CT_IMAGE, None, None, Verdict.no_such_instance),
        (PRINT, None, None, Verdict.class_not_supported),
        (SEG, CT_IMAGE, True, Verdict.class_instance_conflict),
        (PRINT, CT_IMAGE, True, Verdict.class_instance_conflict),
    ],
)
def test_verdicts(sop_class: str, held: str | None, intact: bool | None, verdict: Verdict) -> None:
    assert verdict_of(Reference(sop_class, "1.5"), held, intact) is verdict


def test_only_what_is_held_and_intact_is_committed() -> None:
    for held in (None, CT_IMAGE, SEG):
        for intact in (None, True, False):
            verdict = verdict_of(Reference(CT_IMAGE, "1.5"), held, intact)
            assert (verdict == Verdict.committed) == (held == CT_IMAGE and intact is True)


def test_storage_classes_are_those_that_the_receiver_takes() -> None:
    from dicomnode.receive.classes import STORAGE_CLASSES

    assert all(storable(uid) for uid in STORAGE_CLASSES)
    assert not any(storable(uid) for uid in (PRINT, commitment.SOP_CLASS, "1.2.840.10008.1.1", "1.2.3", ""))


@pytest.mark.parametrize(
    ("status", "wanted"),
    [
        (0x0000, Told.taken),
        (0x0116, Told.taken),
        (None, Told.retry),
        (0x0110, Told.retry),
        (0x0213, Told.retry),
        (0x0112, Told.rejected),
        (0x0115, Told.rejected),
    ],
)
def test_answers_to_a_report(status: int | None, wanted: Told) -> None:
    assert classify_report_status(status)[0] is wanted


def test_a_peer_that_can_only_hear_of_it_on_its_own_association_is_named() -> None:
    from dicomnode.config_summary import summary
    from dicomnode.settings import Settings

    peers = [
        {"name": "ct1", "ae_title": "CT1", "allow": ["store", "commit"]},
        {"name": "ct2", "ae_title": "CT2", "allow": ["store", "commit"], "host": "10.0.0.5", "port": 104},
    ]
    notes = [line for line in summary(Settings(peers=peers), []) if "commitment" in line]
    assert len(notes) == 1 and "ct1" in notes[0]
