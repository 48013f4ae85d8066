"""The SEG, reread with code that shares nothing with what wrote it."""

from __future__ import annotations

import highdicom as hd
import numpy as np
import pytest
from pydicom.uid import ExplicitVRLittleEndian

from dicomnode.encode import encode_results
from dicomnode.errors import NodeError, UnsuitableSeries
from tests.encode.encode_case import (
    AXIAL,
    CORONAL,
    MODEL,
    OBLIQUE,
    SAGITTAL,
    SEGMENTS,
    STATION,
    identity,
    read,
)


def seg_of(case):
    objects = encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station)
    assert [o.kind for o in objects] == ["SEG", "SR"]
    return read(objects[0].part10)


def labels_by_position(seg, case):
    """Label volume rebuilt from positions and orientations alone, in the source's order."""
    shared = seg.SharedFunctionalGroupsSequence[0]
    source = case.datasets[0]
    orientation = [float(c) for c in shared.PlaneOrientationSequence[0].ImageOrientationPatient]
    assert orientation == [float(c) for c in source.ImageOrientationPatient]
    assert [float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing] == [0.7, 0.8]
    bits = np.unpackbits(np.frombuffer(seg.PixelData, np.uint8), bitorder="little")
    frames = bits[: seg.NumberOfFrames * seg.Rows * seg.Columns].reshape(-1, seg.Rows, seg.Columns)
    index = {tuple(map(float, ds.ImagePositionPatient)): i for i, ds in enumerate(case.datasets)}
    out = np.zeros(case.analysis.labels.shape, np.uint8)
    for frame, group in zip(frames, seg.PerFrameFunctionalGroupsSequence, strict=True):
        assert frame.any(), "an empty frame"
        position = tuple(map(float, group.PlanePositionSequence[0].ImagePositionPatient))
        number = group.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        out[index[position]][frame == 1] = number
    return out


@pytest.mark.parametrize("orientation", [AXIAL, CORONAL, SAGITTAL, OBLIQUE])
@pytest.mark.parametrize("flipped", [False, True])
def test_every_voxel_lies_where_the_source_has_it(make_case, orientation, flipped):
    case = make_case(orientation, flipped=flipped)
    seg = seg_of(case)
    assert np.array_equal(labels_by_position(seg, case), case.analysis.labels)


@pytest.mark.parametrize("flipped", [False, True])
def test_frames_refer_to_the_slice_they_were_made_from(make_case, flipped):
    case = make_case(flipped=flipped)
    seg = hd.seg.Segmentation.from_dataset(seg_of(case))
    pixels = seg.get_pixels_by_source_instance(
        case.analysis.source_uids, combine_segments=True, assert_missing_frames_are_empty=True
    )
    assert np.array_equal(pixels, case.analysis.labels)


def test_frames_are_ordered_by_segment_then_position(make_case):
    groups = seg_of(make_case()).PerFrameFunctionalGroupsSequence
    keys = [tuple(g.FrameContentSequence[0].DimensionIndexValues) for g in groups]
    numbers = [g.SegmentIdentificationSequence[0].ReferencedSegmentNumber for g in groups]
    assert keys == sorted(keys)
    assert numbers == sorted(numbers)


def test_all_analysed_slices_are_referenced_even_empty_ones(make_case):
    case = make_case(extra=1)
    series = seg_of(case).ReferencedSeriesSequence
    assert [s.SeriesInstanceUID for s in series] == [case.datasets[0].SeriesInstanceUID]
    named = {r.ReferencedSOPInstanceUID for r in series[0].ReferencedInstanceSequence}
    assert named == set(case.analysis.source_uids)


def test_segments_name_the_algorithm_and_the_tracking_uid(make_case):
    case = make_case()
    seg = seg_of(case)
    assert [s.SegmentNumber for s in seg.SegmentSequence] == [1, 2]
    for item, segment in zip(seg.SegmentSequence, SEGMENTS, strict=False):
        assert item.SegmentLabel == segment.label
        assert item.SegmentAlgorithmType == "AUTOMATIC"
        assert item.TrackingUID == case.identity.tracking_uids[segment.number]
        assert item.TrackingID == f"ct-lung: {segment.label}"
        algorithm = item.SegmentationAlgorithmIdentificationSequence[0]
        assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == (MODEL.name, MODEL.version)
        assert algorithm.AlgorithmFamilyCodeSequence[0].CodeValue == "123110"
        modifier = item.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
        assert modifier.CodeMeaning == segment.type_modifier.meaning


def test_absent_segments_leave_no_hole_in_the_numbers(make_case):
    case = make_case()
    labels = case.analysis.labels.copy()
    labels[labels == 1] = 0
    labels[4, 10, 10] = 3
    case = case.with_analysis(labels=labels, measurements=())
    seg = seg_of(case)
    assert [(s.SegmentNumber, s.SegmentLabel) for s in seg.SegmentSequence] == [(1, "Left lung"), (2, "Nodule")]
    expected = np.select([labels == 2, labels == 3], [1, 2], 0)
    assert np.array_equal(labels_by_position(seg, case), expected)


def test_a_single_segment_is_named_in_every_frame(make_case):
    case = make_case()
    labels = (case.analysis.labels == 1).astype(np.uint8)
    seg = seg_of(case.with_analysis(labels=labels, measurements=()))
    assert "SegmentIdentificationSequence" not in seg.SharedFunctionalGroupsSequence[0]
    assert np.array_equal(labels_by_position(seg, case), labels)


def test_spacing_between_slices_is_that_of_the_source_not_of_the_findings(make_case):
    case = make_case()
    labels = np.zeros_like(case.analysis.labels)
    labels[2, 4:6, 4:6] = labels[4, 4:6, 4:6] = 1
    seg = seg_of(case.with_analysis(labels=labels, measurements=()))
    measures = seg.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0]
    assert float(measures.SpacingBetweenSlices) == pytest.approx(2.5)


def test_identity_series_and_equipment_are_those_given(make_case):
    case = make_case(revision=2)
    seg = seg_of(case)
    assert seg.file_meta.TransferSyntaxUID == ExplicitVRLittleEndian
    assert (seg.SOPInstanceUID, seg.SeriesInstanceUID) == (case.identity.seg_uid, case.identity.seg_series_uid)
    assert (seg.SegmentationType, seg.Modality, seg.InstanceNumber) == ("BINARY", "SEG", 2)
    assert (seg.SeriesNumber, seg.SeriesDescription) == (1003, "AI ct-lung 1.2.0 segmentation")
    assert (seg.ContentLabel, seg.ContentCreatorName) == ("CT_LUNG", "ct-lung^AI")
    assert (seg.Manufacturer, seg.ManufacturerModelName) == (STATION.manufacturer, STATION.model_name)
    assert (seg.ContentDate, seg.ContentTime) == ("20240506", "070809.123456")
    assert (seg.InstanceCreationDate, seg.InstanceCreationTime) == ("20240506", "070809.123456")
    assert seg.FrameOfReferenceUID == case.datasets[0].FrameOfReferenceUID
    assert (seg.PatientID, seg.PatientName, seg.AccessionNumber) == ("ID-1", "Example^Test", "A1")
    assert "RequestingService" not in seg
    assert "Laterality" not in seg


@pytest.mark.parametrize("change", ["value", "shape", "dtype", "unknown source"])
def test_contradictory_arguments_are_refused(make_case, change):
    case = make_case()
    labels = case.analysis.labels.copy()
    sources = case.sources
    if change == "value":
        labels[3, 3, 3] = 9
    elif change == "shape":
        labels = labels[:, :-1]
    elif change == "dtype":
        labels = labels.astype(np.int32)
    else:
        sources = sources[1:]
    case = case.with_analysis(labels=labels)
    with pytest.raises(NodeError):
        encode_results(case.analysis, identity(), MODEL, sources, station=STATION)


def test_slices_of_two_series_are_refused(make_case):
    def change(ds, number):
        if number == 3:
            ds.SeriesInstanceUID = "2.25.1"

    case = make_case(change=change)
    with pytest.raises(UnsuitableSeries, match="2 series"):
        seg_of(case)
