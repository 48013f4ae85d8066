"""Objects of odd sources: valid all the same (dciodvfy), and always the same bytes."""

from __future__ import annotations

import hashlib
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.encode import encode_results
from dicomnode.encode.common import quiet_pydicom
from dicomnode.errors import NodeError, UnsuitableSeries
from dicomnode.records import Analysis, Code, Measurement, SourceInstance
from tests.encode.encode_case import (
    AXIAL,
    CORONAL,
    MILLILITRE,
    REPOSITORY,
    SAGITTAL,
    SEGMENTS,
    SHARED_DATA,
    VOLUME,
    Case,
    blobs,
    identity,
    read,
)


def encode(case):
    return encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station)


def comments(part10):
    ds = read(part10)
    container = ds.ContentSequence[-1]
    return [str(c.TextValue) for c in container.ContentSequence if c.ValueType == "TEXT"]


def remove(*keywords):
    def change(ds, number):
        for keyword in keywords:
            if keyword in ds:
                delattr(ds, keyword)

    return change


@pytest.mark.peers
@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL])
@pytest.mark.parametrize("flipped", [False, True])
def test_valid_in_every_orientation(make_case, assert_valid, orientation, flipped):
    for item in encode(make_case(orientation, flipped=flipped)):
        assert_valid(item.part10)


@pytest.mark.peers
def test_missing_type_2_attributes_are_empty_in_the_results(make_case, assert_valid):
    missing = (
        "AccessionNumber", "StudyID", "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate",
        "StudyTime", "ReferringPhysicianName", "SliceThickness", "PositionReferenceIndicator", "SeriesNumber",
        "BodyPartExamined", "PatientAge", "StudyDescription",
    )  # fmt: skip
    for item in encode(make_case(change=remove(*missing))):
        ds = read(item.part10)
        assert (ds.PatientID, ds.AccessionNumber, ds.StudyDate) == ("", "", "")
        assert_valid(item.part10)
        if item.kind == "SEG":
            measures = ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
            assert float(measures.SliceThickness) == pytest.approx(2.5)


@pytest.mark.peers
def test_values_of_a_wrong_form_are_left_out(make_case, assert_valid):
    def change(ds, number):
        ds.PatientSex, ds.PatientBirthDate, ds.StudyTime, ds.PatientAge = "X", "1970-1-1", "3 o'clock", "54"

    with pydicom.config.disable_value_validation():
        case = make_case(change=change)
    for item in encode(case):
        ds = read(item.part10)
        assert (ds.PatientSex, ds.PatientBirthDate, ds.StudyTime) == ("", "", "")
        assert "PatientAge" not in ds
        assert_valid(item.part10)


def test_an_identifier_too_long_for_its_vr_still_matches_the_study(make_case):
    number = "ACCESSION-2024-0000017"

    def change(ds, _):
        ds.AccessionNumber = number

    with pydicom.config.disable_value_validation():
        assert [read(item.part10).AccessionNumber for item in encode(make_case(change=change))] == [number] * 2


@pytest.mark.peers
def test_numbers_in_forms_that_scanners_write(make_case, assert_valid):
    def change(ds, number):
        ds.ImagePositionPatient = [
            pydicom.valuerep.DSfloat(v) for v in ("-50.000000000000001", "2E1", str(number * 2.5))
        ]
        ds.SeriesNumber, ds.BodyPartExamined = 0, "Knee"
        ds.add_new("PatientWeight", "LO", "heavy")  # read back as DS where the VR is implicit

    with pydicom.config.disable_value_validation():
        case = make_case(change=change)
    for item in encode(case):
        assert_valid(item.part10)


@pytest.mark.peers
@pytest.mark.parametrize("body_part", ["KNEE", "LUNG", "BREAST"])
def test_paired_body_parts_need_no_laterality(make_case, assert_valid, body_part):
    def change(ds, number):
        ds.BodyPartExamined = body_part

    for item in encode(make_case(change=change)):
        assert_valid(item.part10)


@pytest.mark.parametrize("state", ["absent", "no DICOM", "another instance"])
def test_unusable_files_are_named_errors_without_paths_or_values(make_case, state):
    case = make_case()
    path = case.sources[2].path
    if state == "absent":
        path.unlink()
    elif state == "no DICOM":
        path.write_bytes(b"x" * 300)
    else:
        path.write_bytes(case.sources[1].path.read_bytes())
    with pytest.raises(NodeError) as caught:
        encode(case)
    assert str(path) not in str(caught.value)


@pytest.mark.parametrize("with_mask", [True, False])
def test_a_retired_class_of_source_is_refused_by_name(make_case, with_mask):
    def change(ds, number):
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.6"

    case = make_case(change=change)
    case = case if with_mask else case.with_analysis(labels=None)
    with pytest.raises(UnsuitableSeries) as caught:
        encode(case)
    assert caught.value.code == "NOT_ENCODABLE"


def test_no_patient_data_reaches_the_log(make_case, caplog, recwarn):
    def change(ds, number):
        ds.PatientName, ds.ReferringPhysicianName = "Secretpatient", "Secretdoctor"
        ds.PatientBirthDate, ds.AccessionNumber, ds.PatientID = "1-9-70 Secret", "Secret" * 9, "Secret" * 20

    with pydicom.config.disable_value_validation():
        case = make_case(change=change)
    with caplog.at_level("DEBUG"):
        encode(case)
    assert "Secret" not in caplog.text
    assert len(recwarn) == 0


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["differs", "missing"])
def test_one_frame_of_reference_and_a_note_of_it(make_case, assert_valid, kind):
    def change(ds, number):
        if kind == "differs":
            ds.FrameOfReferenceUID = f"2.25.{1000 + number}"
        else:
            del ds.FrameOfReferenceUID

    seg, sr = encode(make_case(change=change))
    assert_valid(seg.part10)
    assert_valid(sr.part10)
    uid = read(seg.part10).FrameOfReferenceUID
    assert uid == "2.25.1000" if kind == "differs" else uid.startswith("2.25.")
    assert sum("frame" in comment for comment in comments(sr.part10)) == 1


@pytest.mark.peers
def test_projection_without_geometry(make_case, assert_valid):
    def change(ds, number):
        remove("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "PixelSpacing")(ds, 0)
        ds.Modality, ds.PatientOrientation = "CR", ["L", "F"]
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"

    case = make_case(change=change, count=1)
    for item in encode(case):
        assert_valid(item.part10)
        if item.kind == "SEG":
            mask = pydicom.pixels.unpack_bits(read(item.part10).PixelData)[: 24 * 32].reshape(24, 32)
            assert np.array_equal(mask, case.analysis.labels[0])


@pytest.mark.peers
def test_research_attributes_and_issuers_survive(make_case, assert_valid):
    def change(ds, number):
        ds.ClinicalTrialSponsorName, ds.ClinicalTrialProtocolID, ds.ClinicalTrialSubjectID = "Sponsor", "P", "7"
        ds.PatientIdentityRemoved, ds.DeidentificationMethod = "YES", "by hand"
        issuer = Dataset()
        issuer.LocalNamespaceEntityID = "HOSPITAL"
        ds.IssuerOfAccessionNumberSequence = Sequence([issuer])

    for item in encode(make_case(change=change)):
        ds = read(item.part10)
        assert ds.ClinicalTrialSubjectID == "7"
        assert ds.IssuerOfAccessionNumberSequence[0].LocalNamespaceEntityID == "HOSPITAL"
        assert ds.PatientIdentityRemoved == "YES"
        assert_valid(item.part10)


NAMES = [
    ("ISO_IR 100", "Äneas^Rüdiger"),
    (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎=やまだ^たろう"),
    (["", "ISO 2022 IR 149"], "Hong^Gildong=洪^吉洞=홍^길동"),
    ("GB18030", "Wang^XiaoDong=王^小东"),
    ("ISO_IR 144", "Люкceмбypг"),
    ("ISO_IR 192", "Wang^XiaoDong=王^小東"),
]


@pytest.mark.peers
@pytest.mark.parametrize(("character_set", "name"), NAMES, ids=[str(c) for c, _ in NAMES])
def test_names_come_through_in_utf_8(make_case, assert_valid, character_set, name):
    def change(ds, number):
        ds.SpecificCharacterSet, ds.PatientName = character_set, name
        ds.ReferringPhysicianName = name
        item = Dataset()
        item.PatientID, item.IssuerOfPatientID, item.TypeOfPatientID = "2", "Ward", "TEXT"
        ds.OtherPatientIDsSequence = Sequence([item])

    for encoded in encode(make_case(change=change)):
        ds = read(encoded.part10)
        assert ds.SpecificCharacterSet == "ISO_IR 192"
        assert (str(ds.PatientName), str(ds.ReferringPhysicianName)) == (name, name)
        assert name.encode() in encoded.part10
        assert_valid(encoded.part10)


def test_ascii_alone_needs_no_character_set(make_case):
    def change(ds, number):
        ds.SpecificCharacterSet = "ISO_IR 100"

    for item in encode(make_case(change=change)):
        assert "SpecificCharacterSet" not in read(item.part10)


def test_the_models_own_text_can_ask_for_utf_8(make_case):
    case = make_case()
    case = replace(case, model=replace(case.model, intended_use="Genauigkeit ± 5 ml"))
    seg, sr = encode(case)
    assert "SpecificCharacterSet" not in read(seg.part10)
    assert any("± 5 ml" in comment for comment in comments(sr.part10))


@pytest.mark.peers
@pytest.mark.parametrize("name", sorted(p.name for p in (SHARED_DATA / "charsets").rglob("*") if p.is_file()) or ["-"])
def test_names_of_real_files(make_case, assert_valid, name):
    if name == "-":
        pytest.skip("no files: ../shared/data/charsets is absent")
    if name == "DICOMDIR":
        pytest.skip("a directory record is no image")
    path = next((SHARED_DATA / "charsets").rglob(name))
    with quiet_pydicom():
        source = pydicom.dcmread(path, stop_before_pixels=True)
        expected = str(source.PatientName)
    instance = SourceInstance(
        str(source.SOPInstanceUID), str(source.SOPClassUID), str(ExplicitVRLittleEndian), path, "0" * 64
    )
    case = make_case()
    case = replace(case, sources=(instance,)).with_analysis(labels=None, source_uids=(), segments=(), measurements=())
    (report,) = encode(case)
    ds = read(report.part10)
    assert str(ds.PatientName) == expected
    assert ds.get("SpecificCharacterSet") == (None if expected.isascii() else "ISO_IR 192")
    assert expected.encode() in report.part10
    assert_valid(report.part10)


def test_the_same_inputs_give_the_same_bytes(make_case):
    case = make_case()
    first, second = encode(case), encode(case)
    assert [o.part10 for o in first] == [o.part10 for o in second]


def test_another_process_gives_the_same_bytes(make_case, tmp_path):
    case = make_case()
    (tmp_path / "case.pickle").write_bytes(
        pickle.dumps((case.analysis, case.identity, dict_of(case.model), case.sources, case.station))
    )
    script = (
        "import sys, pickle, hashlib\n"
        "from dicomnode.encode import encode_results\n"
        "from dicomnode.records import ModelIdentity\n"
        "a, i, m, s, st = pickle.load(open(sys.argv[1], 'rb'))\n"
        "for o in encode_results(a, i, ModelIdentity(**m), s, station=st):\n"
        "    print(hashlib.sha256(o.part10).hexdigest())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "case.pickle"],
        capture_output=True,
        text=True,
        check=True,
        cwd=REPOSITORY,
        env={"PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"},
    )
    assert done.stdout.split() == [hashlib.sha256(o.part10).hexdigest() for o in encode(case)]


def dict_of(model):
    return {name: getattr(model, name) for name in model.__slots__}


def test_the_stored_files_are_not_touched(make_case):
    case = make_case()
    before = [s.path.read_bytes() for s in case.sources]
    encode(case)
    assert [s.path.read_bytes() for s in case.sources] == before


@pytest.fixture
def real_case(real_ct: list[Path]) -> Case:
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in real_ct]
    headers_by_height = sorted(headers, key=lambda ds: float(ds.ImagePositionPatient[2]))
    case_sources = tuple(
        SourceInstance(str(ds.SOPInstanceUID), str(ds.SOPClassUID), str(ds.file_meta.TransferSyntaxUID), path, "0" * 64)
        for ds, path in zip(headers, real_ct, strict=True)
    )

    analysis = Analysis(
        labels=blobs(len(headers), 512, 512),
        source_uids=tuple(str(ds.SOPInstanceUID) for ds in headers_by_height),
        segments=SEGMENTS,
        measurements=(Measurement("volume_ml", VOLUME, 3210.123456, MILLILITRE, 1, Code("373098007", "SCT", "Mean")),),
    )
    return Case(analysis, identity(), case_sources, datasets=tuple(headers_by_height))


@pytest.mark.peers
def test_real_ct(real_case, assert_valid):
    seg, sr = encode(real_case)
    assert_valid(seg.part10)
    assert_valid(sr.part10)
    ds = read(seg.part10)
    rows = {tuple(map(float, d.ImagePositionPatient)): i for i, d in enumerate(real_case.datasets)}
    frames = pydicom.pixels.unpack_bits(ds.PixelData)[: ds.NumberOfFrames * 512 * 512].reshape(-1, 512, 512)
    rebuilt = np.zeros_like(real_case.analysis.labels)
    for frame, group in zip(frames, ds.PerFrameFunctionalGroupsSequence, strict=True):
        at = rows[tuple(map(float, group.PlanePositionSequence[0].ImagePositionPatient))]
        rebuilt[at][frame == 1] = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    assert np.array_equal(rebuilt, real_case.analysis.labels)


@pytest.mark.parametrize(
    ("stated", "expected", "said"),
    [
        ("+0800", ("20240506", "130809.123456"), "+0800"),
        ("-0330", ("20240506", "013809.123456"), "-0330"),
        (None, ("20240506", "070809.123456"), None),  # those of the node, which is where the modality is
        ("nonsense", ("20240506", "070809.123456"), None),
        ("+2500", ("20240506", "070809.123456"), None),
    ],
)
def test_times_are_in_the_time_zone_that_the_source_states(make_case, stated, expected, said):
    """It speaks for all dates and times of an object, those of the study that are copied from the source among them."""

    def change(ds, number):
        if stated:
            ds.TimezoneOffsetFromUTC = stated

    with quiet_pydicom():
        case = make_case(change=change)
    for item in encode(case):
        ds = read(item.part10)
        assert (ds.ContentDate, ds.ContentTime) == expected
        assert ds.get("TimezoneOffsetFromUTC") == said
        assert ds.StudyTime == case.datasets[0].StudyTime


def test_frames_of_reference_that_differ_are_said_once(make_case):
    from dicomnode.geometry import frames_note

    def change(ds, number):
        ds.FrameOfReferenceUID = f"1.2.{number + 1}"

    case = make_case(change=change)
    case = case.with_analysis(notes=(frames_note(len(case.datasets)),))  # as the volume was read
    report = encode(case)[1].part10
    assert report.count(b"different frames of reference") == 1
