"""De-identification of every kind of result: nothing of the patient in any byte, valid, and always the same bytes."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import pytest
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian, generate_uid

from dicomnode.deidentify import REDACTED, deidentify, deidentify_record
from dicomnode.encode import encode_results
from dicomnode.errors import MalformedDataSet
from dicomnode.identity import derived_uid
from dicomnode.orders import KINDS, order_for
from dicomnode.pseudonyms import Pseudonyms
from tests.encode.source_case import SOURCES, case_of
from tests.sync.index_case import secondary_capture

CODEC = Pseudonyms(b"k" * 32)
NAME, ID = "CanaryName^CanaryGiven", "CANARY-ID-0815"
OTHERS = {
    "AccessionNumber": "CANARY-ACC",
    "PatientBirthDate": "19700203",
    "ReferringPhysicianName": "CanaryDoctor^Some",
    "StudyDescription": "CanaryStudy",
    "StudyID": "CANARY-SID",
    "PatientComments": "CanaryComment",
}


def everything(tmp_path: Path) -> list[bytes]:
    def named(ds: Dataset) -> Dataset:
        ds.PatientName, ds.PatientID, ds.BurnedInAnnotation = NAME, ID, "NO"
        for keyword, value in OTHERS.items():
            setattr(ds, keyword, value)
        return ds

    case = case_of([named(ds) for ds in SOURCES["tilted-ct"]()], tmp_path)
    order = order_for(["pacs"], KINDS, "labelmap")
    made = encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station, order=order)
    return [m.part10 for m in made]


def uids_of(ds: Dataset) -> set[str]:
    found: set[str] = set()
    for element in ds:
        if element.VR == "SQ":
            for item in element.value:
                found |= uids_of(item)
        elif element.VR == "UI":
            found |= {str(v) for v in (element.value if element.VM > 1 else [element.value])}
    return {u for u in found if u and not u.startswith("1.2.840.10008.")}


def test_no_byte_of_the_patient_leaves(tmp_path: Path) -> None:
    parts = everything(tmp_path)
    assert len(parts) >= 8
    known = {u for part in parts for u in uids_of(dcmread(BytesIO(part)))}
    for part in parts:
        before = dcmread(BytesIO(part))
        left = deidentify(part, CODEC)
        assert b"anary" in part and b"CANARY" in part
        assert b"anary" not in left.content and b"CANARY" not in left.content
        assert b"19700203" not in left.content
        assert [u for u in known if u.encode() in left.content] == []
        after = dcmread(BytesIO(left.content))
        assert after.PatientName == after.PatientID == CODEC.patient(ID)
        assert after.PatientIdentityRemoved == "YES" and after.PatientBirthDate == after.AccessionNumber == ""
        assert after.StudyDate != before.StudyDate and after.Modality == before.Modality
        assert (after.get("PixelData"), after.SOPClassUID) == (before.get("PixelData"), before.SOPClassUID)
        assert len(uids_of(after)) == len(uids_of(before)), "each UID has one of its own"
        assert left.sop_instance_uid == CODEC.uid(str(before.SOPInstanceUID)) == after.SOPInstanceUID
        assert left.mapping["patient", CODEC.patient(ID)] == ID
        assert left.mapping["study", str(after.StudyInstanceUID)] == before.StudyInstanceUID
        assert deidentify(part, CODEC).content == left.content
        assert deidentify(part, Pseudonyms(b"l" * 32)).sop_instance_uid != left.sop_instance_uid


def report(tmp_path: Path) -> Dataset:
    return next(ds for ds in (dcmread(BytesIO(p)) for p in everything(tmp_path)) if ds.Modality == "SR")


def written(ds: Dataset) -> bytes:
    buffer = BytesIO()
    dcmwrite(buffer, ds, enforce_file_format=True)
    return buffer.getvalue()


def test_what_others_could_put_into_a_report_does_not_leave(tmp_path: Path) -> None:
    ds = report(tmp_path)
    ds.SpecificCharacterSet = "ISO_IR 192"

    def item(kind: str, code: str, **values: object) -> Dataset:
        name = Dataset()
        name.CodeValue, name.CodingSchemeDesignator, name.CodeMeaning = code, "DCM", "x"
        found = Dataset()
        found.RelationshipType, found.ValueType, found.ConceptNameCodeSequence = "CONTAINS", kind, [name]
        for keyword, value in values.items():
            setattr(found, keyword, value)
        return found

    local = Dataset()
    local.CodeValue, local.CodingSchemeDesignator, local.CodeMeaning = "77", "99LOCAL", "Chest of CanaryName"
    public = Dataset()
    public.CodeValue, public.CodingSchemeDesignator, public.CodeMeaning = "51185008", "SCT", "Chest of CanaryName"
    foreign, other = generate_uid(), derived_uid("another series")
    ds.SeriesInstanceUID = "1.2.9"
    ds.ContentSequence += [
        item("PNAME", "121008", PersonName=NAME),
        item("TEXT", "121030", TextValue="Subject CanaryName"),
        item("TEXT", "121106", TextValue=f"Of {ID}, canaryname, seen 2024-01-02 in {foreign}; 王"),
        item("TEXT", "121106", TextValue=f"Input x: series {other}. Input y: series 1.2.9"),
        item("CODE", "121058", ConceptCodeSequence=[local]),
        item("CODE", "121058", ConceptCodeSequence=[public]),
        item("DATE", "121107", Date="20240102"),
    ]
    ds.add_new(0x00091001, "LO", "CANARY private")
    content = deidentify(written(ds), CODEC).content
    assert b"anary" not in content.lower() and foreign.encode() not in content and b"2024-01-02" not in content
    after = dcmread(BytesIO(content))
    texts = [c.TextValue for c in after.ContentSequence if c.ValueType == "TEXT"]
    assert texts[-2].startswith(f"Of {REDACTED}, {REDACTED}, seen 202") and texts[-2].endswith("; 王")
    assert texts[-1] == f"Input x: series {CODEC.uid(other)}. Input y: series {after.SeriesInstanceUID}"
    assert after.ContentSequence[-2].ConceptCodeSequence[0].CodeMeaning == f"Chest of {REDACTED}"
    assert after.ContentSequence[-1].Date not in ("", "20240102")


def test_burned_in_identity_and_rubbish_do_not_leave(tmp_path: Path) -> None:
    ds = report(tmp_path)
    ds.BurnedInAnnotation = "YES"
    with pytest.raises(MalformedDataSet, match="burned"):
        deidentify(written(ds), CODEC)
    with pytest.raises(MalformedDataSet, match="cannot be de-identified"):
        deidentify(b"this is not DICOM", CODEC)


def test_values_that_no_rule_would_see_do_not_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pydicom.config.replace_un_with_known_vr", False)
    ds, content = secondary_capture()
    ds.add_new("ImageComments", "UN", b"CANARY")
    with pytest.raises(MalformedDataSet, match="ImageComments has no VR"):
        deidentify(written(ds), CODEC)
    ds = dcmread(BytesIO(content))
    ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    buffer = BytesIO()
    dcmwrite(buffer, ds, implicit_vr=True, little_endian=True, enforce_file_format=True)
    with pytest.raises(MalformedDataSet, match="has no VR"):
        deidentify(buffer.getvalue(), CODEC)


def test_a_picture_leaves_only_where_its_source_says_that_it_shows_no_identity() -> None:
    ds, content = secondary_capture()
    assert ds.BurnedInAnnotation == "NO" and deidentify(content, CODEC).content
    for sop_class in (ds.SOPClassUID, f"{ds.SOPClassUID}.4"):
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = sop_class
        for said in ("YES", "", "UNKNOWN", None):
            ds.BurnedInAnnotation = said
            with pytest.raises(MalformedDataSet, match="burned"):
                deidentify(written(ds), CODEC)
        del ds.BurnedInAnnotation
        with pytest.raises(MalformedDataSet, match="BurnedInAnnotation NO"):
            deidentify(written(ds), CODEC)


@pytest.mark.parametrize(("age", "left"), [("095Y", "090Y"), ("054Y", "054Y"), ("003M", "003M")])
def test_age(tmp_path: Path, age: str, left: str) -> None:
    ds = report(tmp_path)
    ds.PatientAge = age
    assert dcmread(BytesIO(deidentify(written(ds), CODEC).content)).get("PatientAge") == left


def test_records() -> None:
    patient = {"PatientID": ID, "PatientName": NAME, "IssuerOfPatientID": "", "AccessionNumber": "CANARY-ACC"}
    study = {
        "StudyInstanceUID": "1.2.3.4.5.6", "StudyDate": "20240102", "StudyDescription": "CanaryStudy", **patient,
        "PatientSex": "F", "ModalitiesInStudy": ["CT"], "NumberOfStudyRelatedSeries": 2,
    }  # fmt: skip
    out, mapping = deidentify_record("study", study, patient, CODEC)
    assert out == {
        "PatientSex": "F", "ModalitiesInStudy": ["CT"], "NumberOfStudyRelatedSeries": 2,
        "StudyInstanceUID": CODEC.uid("1.2.3.4.5.6"), "PatientID": CODEC.patient(ID), "StudyDate": out["StudyDate"],
    }  # fmt: skip
    assert out["StudyDate"] not in ("", "20240102") and mapping["patient", out["PatientID"]] == ID
    told = {"SeriesInstanceUID": "1.2.3.4.5.7", "notes": [f"{NAME} of {ID}"], "objects": [{"uid": "1.2.3.4.5.8"}]}
    out, _ = deidentify_record("ai-result", told | {"new": "CANARY"}, patient, CODEC)
    assert "anary" not in str(out).lower() and "1.2.3.4" not in str(out) and "new" not in out
    assert deidentify_record("unknown", told, patient, CODEC)[0] == {"SeriesInstanceUID": CODEC.uid("1.2.3.4.5.7")}
    assert deidentify_record("settings", {"a": 1}, {}, CODEC) == ({"a": 1}, {})


def test_every_uid_of_a_record_is_exchanged() -> None:
    """Those of this node (2.25), and short ones, which only their field or the study tells from a version."""
    made, series = derived_uid("object"), derived_uid("series")
    told = {
        "SeriesInstanceUID": series, "model_version": "1.32.0", "engine": "onnxruntime 1.20.1",
        "objects": [{"kind": "SEG", "SOPInstanceUID": made}, {"kind": "SR", "SOPInstanceUID": "1.2.7"}],
        "slices": {"SOPInstanceUIDs": [made, "1.2.8"]},
        "notes": [f"Input x: series {series}", "Input y: series 1.2.9, of 1.2.7"],
    }  # fmt: skip
    out, _ = deidentify_record("ai-result", told, {"PatientID": ID}, CODEC, ["1.2.9"])
    assert out == told | {
        "SeriesInstanceUID": CODEC.uid(series),
        "objects": [
            {"kind": "SEG", "SOPInstanceUID": CODEC.uid(made)},
            {"kind": "SR", "SOPInstanceUID": CODEC.uid("1.2.7")},
        ],
        "slices": {"SOPInstanceUIDs": [CODEC.uid(made), CODEC.uid("1.2.8")]},
        "notes": [
            f"Input x: series {CODEC.uid(series)}",
            f"Input y: series {CODEC.uid('1.2.9')}, of {CODEC.uid('1.2.7')}",
        ],
    }
