"""Frames written as bytes are those that the library writes, and headers read fast are those that pydicom reads."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dicomnode.encode import encode_results, evidence, headers, seg, sr
from dicomnode.encode.frames import Plane, make_frames
from dicomnode.errors import NodeError
from dicomnode.records import Prior
from tests.encode.encode_case import AXIAL, CORONAL, OBLIQUE, SAGITTAL, SEGMENTS, read


def encoded(case):
    return [
        o.part10 for o in encode_results(case.analysis, case.identity, case.model, case.sources, station=case.station)
    ]


def by_the_library(case, monkeypatch):
    """The same with highdicom's own frames and headers as pydicom reads them."""
    with monkeypatch.context() as patch:
        patch.setattr(seg, "_growing_positions", lambda images: None)
        patch.setattr(headers, "begun_header", lambda head, wanted: None)
        patch.setattr(sr, "for_the_library", lambda references, content: list(references))
        patch.setattr(sr, "take_over", lambda report, seen, every: b"")
        return encoded(case)


def one_segment(case):
    labels = np.minimum(case.analysis.labels, 1)
    return case.with_analysis(labels=labels, segments=SEGMENTS[:1], measurements=())


def odd_numbers(ds, number):
    x, y, z = (float(v) for v in ds.ImagePositionPatient)
    ds.ImagePositionPatient = [f"+{x:.1f}".replace("+-", "-"), f"{y:e}", f" {z:.3f} "]
    ds.PixelSpacing = ["7.0e-1", "0.80"]


def lossy(ds, number):
    ds.LossyImageCompression, ds.LossyImageCompressionRatio = "01", "8.5"


def without_thickness(ds, number):
    if number % 2:
        del ds.SliceThickness
    ds.FrameOfReferenceUID = f"2.25.{number + 1}"


def uneven(ds, number):
    x, y, z = (float(v) for v in ds.ImagePositionPatient)
    ds.ImagePositionPatient = [x, y, z + 0.3 * number * number]


@pytest.mark.parametrize("one", [False, True])
@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize(
    ("orientation", "change"),
    [
        (AXIAL, None),
        (CORONAL, None),
        (SAGITTAL, odd_numbers),
        (OBLIQUE, lossy),
        (AXIAL, without_thickness),
        (AXIAL, uneven),
    ],
)
def test_the_same_bytes_as_the_library(make_case, monkeypatch, orientation, change, flipped, one):
    case = make_case(orientation, flipped=flipped, change=change)
    case = one_segment(case) if one else case
    assert encoded(case) == by_the_library(case, monkeypatch)


@pytest.mark.parametrize("one", [False, True])
def test_a_hole_in_the_findings(make_case, monkeypatch, one):
    case = make_case()
    labels = case.analysis.labels.copy()
    labels[3:5] = 0
    case = case.with_analysis(labels=labels)
    case = one_segment(case) if one else case
    assert encoded(case) == by_the_library(case, monkeypatch)


def test_frames_of_another_form_are_refused(make_case, monkeypatch):
    monkeypatch.setattr(seg, "frame_group", lambda *args: b"")
    with pytest.raises(NodeError, match="another form"):
        encoded(make_case())


def test_references_of_another_form_are_refused(make_case, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(seg, "references", lambda planes, series: {0x00082112: b""})
        with pytest.raises(NodeError, match="SourceImageSequence in another form"):
            encoded(make_case())
    monkeypatch.setattr(evidence, "reference", lambda sop_class, sop_instance: b"")
    with pytest.raises(NodeError, match="evidence in another form"):
        encoded(make_case())


def test_evidence_of_several_series_and_studies(make_case, monkeypatch):
    """As the library groups it: by study and series as they first occur, an instance once."""
    case = make_case()
    ct, first = "1.2.840.10008.5.1.4.1.1.2", case.sources[0].sop_instance_uid
    others = (
        ("2.25.70", ct, "2.25.71"),
        ("2.25.80", ct, "2.25.81"),
        ("2.25.70", ct, "2.25.72"),
        ("2.25.80", ct, first),
    )
    earlier = Prior("2.25.90", "2.25.91", "20200101", "CT", ((ct, "2.25.92"), (ct, "2.25.93")))
    case = case.with_analysis(others=others, prior=earlier)
    found = encoded(case)
    assert found == by_the_library(case, monkeypatch)
    report = read(found[-1])
    (study,) = report.CurrentRequestedProcedureEvidenceSequence
    assert [len(series.ReferencedSOPSequence) for series in study.ReferencedSeriesSequence] == [
        len(case.sources), 1, 2, 1,
    ]  # fmt: skip
    (other,) = report.PertinentOtherEvidenceSequence
    assert other.StudyInstanceUID == "2.25.90" and len(other.ReferencedSeriesSequence[0].ReferencedSOPSequence) == 2


def test_a_header_that_does_not_fit_the_first_bytes_is_read_whole(make_case, monkeypatch):
    case = make_case()
    expected = encoded(case)
    monkeypatch.setattr(headers, "HEAD_BYTES", 400)
    assert encoded(case) == expected


def test_the_source_is_not_changed_by_another_slices_values(make_case):
    """Slices share the elements that are the same in all of them, but not those that are filled in."""
    case = make_case(change=without_thickness)
    ds = read(encoded(case)[0])
    assert [float(v) for v in ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing] == [0.7, 0.8]
    again = replace(case, sources=tuple(reversed(case.sources)))
    assert encoded(again)[0] == encoded(case)[0]


@settings(max_examples=60)
@given(st.data())
def test_bits_of_all_frames_follow_each_other(data):
    """PS3.5 8.1.1: also where a frame is no whole number of bytes."""
    shape = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 7)))
    segments = data.draw(st.integers(1, 3))
    flat = data.draw(st.lists(st.integers(0, segments), min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
    labels = np.array(flat, np.uint8).reshape(shape)
    order = data.draw(st.permutations(range(shape[0])))
    planes = [Plane("1.2", f"2.25.{i + 1}", "0\\0\\1") for i in range(shape[0])]
    frames = make_frames(labels, segments, planes, order)
    wanted = [labels[i] == s for s in range(1, segments + 1) for i in order if (labels[i] == s).any()]
    assert frames.count == len(wanted)
    assert frames.planes == tuple(i for i in order if labels[i].any())
    assert len(frames.pixels) % 2 == 0 and len(frames.groups) % 2 == 0
    bits = np.unpackbits(np.frombuffer(frames.pixels, np.uint8), bitorder="little")
    size = shape[1] * shape[2]
    assert np.array_equal(bits[: len(wanted) * size], np.array(wanted, bool).reshape(-1))
    assert not bits[len(wanted) * size :].any()
