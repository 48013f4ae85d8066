"""The measurement report: its tree read item by item, and as DCMTK prints it."""

from __future__ import annotations

from dataclasses import replace

import highdicom as hd
import numpy as np
import pytest
from pydicom.uid import Comprehensive3DSRStorage, SegmentationStorage

from dicomnode.encode import encode_results
from dicomnode.errors import NodeError
from dicomnode.records import Change, Code, Measurement, Prior
from tests.encode.encode_case import MODEL, SEGMENTS, VOLUME, identity, read


def objects_of(case):
    objects = encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station)
    return {o.kind: read(o.part10) for o in objects}


def walk(item):
    for child in item.get("ContentSequence", []):
        yield child
        yield from walk(child)


def named(item, meaning):
    return [c for c in walk(item) if c.ConceptNameCodeSequence[0].CodeMeaning == meaning]


def text(item, meaning):
    return [str(c.get("TextValue") or c.get("UID") or "") for c in named(item, meaning)]


def code(item, meaning):
    return [c.ConceptCodeSequence[0].CodeMeaning for c in named(item, meaning)]


def empty(case):
    return case.with_analysis(labels=np.zeros_like(case.analysis.labels), measurements=())


def test_document_head(make_case):
    case = make_case()
    sr = objects_of(case)["SR"]
    root = (sr.ConceptNameCodeSequence[0].CodeValue, sr.ContentTemplateSequence[0].TemplateIdentifier)
    assert sr.SOPClassUID == Comprehensive3DSRStorage
    assert root == ("126000", "1500")
    assert (sr.CompletionFlag, sr.VerificationFlag) == ("COMPLETE", "UNVERIFIED")
    assert (sr.SOPInstanceUID, sr.SeriesInstanceUID) == (case.identity.sr_uid, case.identity.sr_series_uid)
    assert (sr.SeriesNumber, sr.SeriesDescription) == (2003, "AI ct-lung 1.2.0 report")
    assert (sr.ContentDate, sr.ContentTime) == ("20240506", "070809.123456")
    assert code(sr, "Procedure reported") == ["CT of chest"]
    assert code(sr, "Language of Content Item and Descendants") == ["English (United States)"]


def test_groups_carry_the_tracking_uid_of_the_seg_and_refer_to_its_segment(make_case):
    objects = objects_of(make_case())
    seg, sr = objects["SEG"], objects["SR"]
    tracked = {s.SegmentNumber: (s.TrackingID, s.TrackingUID) for s in seg.SegmentSequence}
    found = {}
    for group in named(sr, "Measurement Group"):
        for reference in named(group, "Referenced Segment"):
            item = reference.ReferencedSOPSequence[0]
            assert item.ReferencedSOPClassUID == SegmentationStorage
            assert item.ReferencedSOPInstanceUID == seg.SOPInstanceUID
            pair = (*text(group, "Tracking Identifier"), *text(group, "Tracking Unique Identifier"))
            found[item.ReferencedSegmentNumber] = pair
            assert text(group, "Source Series for Segmentation") == [seg.ReferencedSeriesSequence[0].SeriesInstanceUID]
    assert found == tracked


def test_reference_follows_the_number_in_the_seg_when_a_segment_is_absent(make_case):
    case = make_case()
    labels = case.analysis.labels.copy()
    labels[labels == 1] = 0
    sr = objects_of(case.with_analysis(labels=labels))["SR"]
    groups = {text(g, "Tracking Identifier")[0]: g for g in named(sr, "Measurement Group")}
    reference = named(groups["ct-lung: Left lung"], "Referenced Segment")[0].ReferencedSOPSequence[0]
    assert reference.ReferencedSegmentNumber == 1
    assert named(groups["ct-lung: Right lung"], "Referenced Segment") == []


def test_findings_are_coded(make_case):
    sr = objects_of(make_case())["SR"]
    groups = named(sr, "Measurement Group")
    assert [code(g, "Finding") for g in groups] == [["Lung"], ["Lung"], ["Nodule"], []]
    assert [code(g, "Finding Site") for g in groups] == [["Lung"], ["Lung"], ["Lung"], []]
    assert [code(g, "Laterality") for g in groups] == [["Right"], ["Left"], [], []]
    assert code(groups[2], "Presence of property") == ["Absent"]
    assert text(groups[2], "Comment") == ["Not found: the model marked no voxel as Nodule."]


def test_values_keep_their_precision(make_case):
    case = make_case()
    report = hd.sr.Comprehensive3DSR.from_dataset(objects_of(case)["SR"])
    groups = report.content.get_volumetric_roi_measurement_groups()
    values = [g.get_measurements()[0].value for g in groups]
    assert values == [1234.5678901234, 0.000123456789]
    items = named(report, "Volume")
    written = [float(i.MeasuredValueSequence[0].NumericValue) for i in items]
    assert written == pytest.approx([1234.5678901234, 0.000123456789, 1234.568], rel=1e-7)
    assert all(len(str(i.MeasuredValueSequence[0].NumericValue)) <= 16 for i in items)
    units = {i.MeasuredValueSequence[0].MeasurementUnitsCodeSequence[0].CodeValue for i in items}
    assert units == {"ml"}
    assert code(items[2], "Derivation") == ["Total"]


@pytest.mark.parametrize(
    ("value", "qualifier"),
    [(float("nan"), "Not a number"), (float("inf"), "Positive Infinity"), (-float("inf"), "Negative Infinity")],
)
@pytest.mark.peers
def test_what_is_no_number_is_written_as_such(make_case, assert_valid, value, qualifier):
    unit = Code("ml", "UCUM", "milliliter")
    case = make_case().with_analysis(measurements=(Measurement("v", VOLUME, value, unit, 1),))
    objects = encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station)
    assert_valid(objects[1].part10)
    item = named(read(objects[1].part10), "Volume")[0]
    assert len(item.MeasuredValueSequence) == 0
    assert item.NumericValueQualifierCodeSequence[0].CodeMeaning == qualifier


def test_provenance_is_named_the_same_everywhere(make_case):
    objects = objects_of(make_case())
    sr = objects["SR"]
    for ds in objects.values():
        (item,) = ds.ContributingEquipmentSequence
        purpose = item.PurposeOfReferenceCodeSequence[0]
        assert (purpose.CodeValue, purpose.CodingSchemeDesignator) == ("109102", "DCM")
        assert (item.Manufacturer, item.ManufacturerModelName) == (MODEL.manufacturer, MODEL.name)
        assert (item.SoftwareVersions, item.DeviceUID) == (MODEL.version, MODEL.device_uid)
        assert MODEL.digest in item.ContributionDescription
        assert item.ContributionDateTime == "20240506070809.123456+0200"
    assert set(text(sr, "Algorithm Name")) == set(text(sr, "Device Observer Model Name")) == {MODEL.name}
    assert set(text(sr, "Algorithm Version")) == {MODEL.version}
    assert set(text(sr, "Device Observer Manufacturer")) == {MODEL.manufacturer}
    assert set(text(sr, "Device Observer UID")) == {MODEL.device_uid}
    assert set(code(sr, "Algorithm Family")) == {"Artificial Intelligence"}


def test_evidence_is_every_source_instance_and_the_seg(make_case):
    case = make_case(extra=2)
    sr = objects_of(case)["SR"]
    (study,) = sr.CurrentRequestedProcedureEvidenceSequence
    assert study.StudyInstanceUID == sr.StudyInstanceUID == case.datasets[0].StudyInstanceUID
    listed = {
        series.SeriesInstanceUID: {r.ReferencedSOPInstanceUID for r in series.ReferencedSOPSequence}
        for series in study.ReferencedSeriesSequence
    }
    assert listed == {
        case.datasets[0].SeriesInstanceUID: {s.sop_instance_uid for s in case.sources},
        case.identity.seg_series_uid: {case.identity.seg_uid},
    }


def test_notes_and_intended_use_are_comments(make_case):
    sr = objects_of(make_case(extra=1))["SR"]
    container = named(sr, "Qualitative Evaluations")[0]
    assert code(container, "CAD Processing and Findings Summary") == ["All algorithms succeeded; with findings"]
    assert text(container, "Comment") == [
        "1 instance was left out: it is a localizer.",
        "Intended use of ct-lung: Reference method for tests; not a medical device.",
        "Made by software and not verified by a person.",
    ]


@pytest.mark.peers
def test_empty_mask_is_a_report_without_finding(make_case, assert_valid, dump_report):
    case = empty(make_case())
    (sr,) = encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station)
    assert sr.kind == "SR"
    ds = read(sr.part10)
    assert code(ds, "CAD Processing and Findings Summary") == ["All algorithms succeeded; without findings"]
    assert named(ds, "Referenced Segment") == []
    assert "No finding: the model marked no voxel in this series." in text(ds, "Comment")
    uids = {s.SeriesInstanceUID for s in ds.CurrentRequestedProcedureEvidenceSequence[0].ReferencedSeriesSequence}
    assert uids == {case.datasets[0].SeriesInstanceUID}
    assert_valid(sr.part10)
    assert "without findings" in dump_report(sr.part10)


@pytest.mark.peers
def test_a_model_without_segmentation_has_a_report_of_its_numbers(make_case, assert_valid):
    case = make_case()
    total = case.analysis.measurements[2]
    case = case.with_analysis(labels=None, segments=(), measurements=(total,), source_uids=())
    (sr,) = encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station)
    assert_valid(sr.part10)
    assert len(named(read(sr.part10), "Measurement Group")) == 1


@pytest.mark.peers
def test_a_revision_names_its_predecessor(make_case, assert_valid):
    study = make_case().datasets[0].StudyInstanceUID
    old = (str(study), identity(1).sr_series_uid, str(Comprehensive3DSRStorage), identity(1).sr_uid)
    case = replace(make_case(), identity=identity(2, old))
    objects = encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station)
    ds = read(objects[1].part10)
    item = ds.PredecessorDocumentsSequence[0]
    series = item.ReferencedSeriesSequence[0]
    reference = series.ReferencedSOPSequence[0]
    named_there = (item.StudyInstanceUID, series.SeriesInstanceUID)
    assert (*named_there, reference.ReferencedSOPClassUID, reference.ReferencedSOPInstanceUID) == old
    assert (ds.InstanceNumber, ds.SOPInstanceUID) == (2, identity(2).sr_uid)
    assert_valid(objects[1].part10)


def test_measurement_of_an_undefined_segment_is_refused(make_case):
    unit = Code("ml", "UCUM", "milliliter")
    case = make_case().with_analysis(measurements=(Measurement("v", VOLUME, 1.0, unit, 7),))
    with pytest.raises(NodeError, match="undefined segment"):
        objects_of(case)


@pytest.mark.parametrize(
    ("modality", "body_part", "expected"),
    [
        ("CT", "CHEST", "CT of chest"),
        ("CT", "", "CT unspecified body region"),
        ("MR", "BRAIN", "MRI unspecified body region"),
        ("US", "", "Imaging procedure"),
    ],
)
def test_procedure_is_derived_from_modality_and_body_part(make_case, modality, body_part, expected):
    def change(ds, number):
        ds.Modality, ds.BodyPartExamined = modality, body_part

    assert code(objects_of(make_case(change=change))["SR"], "Procedure reported") == [expected]


def test_procedure_code_of_the_study_comes_first(make_case):
    def change(ds, number):
        item = hd.sr.CodedConcept("P5-0001", "99LOCAL", "CT chest low dose")
        ds.ProcedureCodeSequence = [item]

    sr = objects_of(make_case(change=change))["SR"]
    assert code(sr, "Procedure reported") == ["CT chest low dose"]
    assert sr.ProcedureCodeSequence[0].CodeValue == "P5-0001"


@pytest.mark.peers
def test_dsrdump_reads_what_a_radiologist_needs(make_case, dump_report):
    text_of_report = dump_report(objects_part(make_case(extra=1)))
    for line in (
        'Procedure reported")=(169069000,SCT,"CT of chest")',
        'Tracking Identifier")="ct-lung: Right lung"',
        'Volume")="1234.5679" (ml,UCUM,"milliliter")',
        'Laterality")=(24028007,SCT,"Right")',
        'Comment")="Intended use of ct-lung: Reference method for tests; not a medical device."',
        'Algorithm Version")="1.2.0"',
    ):
        assert line in text_of_report
    assert len(SEGMENTS) == text_of_report.count('"Finding category"')


def objects_part(case):
    return encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station)[1].part10


@pytest.mark.parametrize("date", ["20230405", ""])
def test_earlier_study_is_listed_and_changes_refer_to_the_former_value(make_case, assert_valid, date):
    case = make_case()
    measured = next(m for m in case.analysis.measurements if m.segment == 1)
    other = Measurement("emphysema", Code("LAA950", "99DICOMNODE", "Below -950 HU"), 5.0, Code("%", "UCUM", "percent"))
    images = tuple(("1.2.840.10008.5.1.4.1.1.2", f"1.2.3.{n}") for n in range(3))
    prior = Prior(
        "1.2.3", "1.2.3.0", date, "CT", images, "1.1.0", (Change(measured, measured.value - 10.0), Change(other, 7.5))
    )
    case = case.with_analysis(prior=prior, measurements=(*case.analysis.measurements, other))
    objects = encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station)
    (part10,) = [o.part10 for o in objects if o.kind == "SR"]
    assert_valid(part10)
    sr = read(part10)
    listed = [
        (study.StudyInstanceUID, series.SeriesInstanceUID, i.ReferencedSOPInstanceUID)
        for study in sr.PertinentOtherEvidenceSequence
        for series in study.ReferencedSeriesSequence
        for i in series.ReferencedSOPSequence
    ]
    assert {("1.2.3", "1.2.3.0", uid) for _, uid in images} <= set(listed)
    (library,) = named(sr, "Image Library")
    assert [i.ReferencedSOPSequence[0].ReferencedSOPInstanceUID for i in named(library, "Source")] == [
        uid for _, uid in images
    ]
    (volume,) = named(sr, "Change of Volume since prior study")
    assert float(volume.MeasuredValueSequence[0].NumericValue) == pytest.approx(10.0)
    (former,) = volume.ContentSequence
    assert former.RelationshipType == "INFERRED FROM" and former.ConceptNameCodeSequence[0].CodeMeaning == "Volume"
    assert float(former.MeasuredValueSequence[0].NumericValue) == pytest.approx(measured.value - 10.0)
    assert [c.UID for c in named(former, "Procedure Study Instance UID")] == ["1.2.3"]
    assert [str(c.Date) for c in named(former, "Study Date")] == ([date] if date else [])
    (share,) = named(sr, "Change of Below -950 HU since prior study")
    assert float(share.MeasuredValueSequence[0].NumericValue) == -2.5
    told = text(sr, "Comment")
    assert any("7.5 then, 5 now, change -2.5 %" in t for t in told)
    assert any(t.startswith("Compared with the study") and "version 1.1.0" in t for t in told)
