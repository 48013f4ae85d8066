"""A SEG of 248 x 512 x 512 with two lungs: ours against highdicom's own."""

from __future__ import annotations

import time
from io import BytesIO
from pathlib import Path
from typing import Any

import highdicom as hd
import numpy as np
import numpy.typing as npt
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from benchmarks.report import Figures, Goal, Section
from benchmarks.tools import Bench, Samples, say
from dicomnode.encode.results import encode_results
from dicomnode.encode.station import Station
from dicomnode.identity import derived_uid, result_identity
from dicomnode.orders import Order
from dicomnode.records import Analysis, Code, ModelIdentity, SegmentDefinition, SourceInstance

LIMIT_SECONDS = 0.3
_THING, _LUNG = Code("91723000", "SCT", "Anatomical Structure"), Code("39607008", "SCT", "Lung")
SEGMENTS = (SegmentDefinition(1, "Right lung", _THING, _LUNG), SegmentDefinition(2, "Left lung", _THING, _LUNG))
MODEL = ModelIdentity("bench", "1.0.0", "dicomnode", "0" * 64, derived_uid("bench", "model"))
STATION = Station("dicomnode", "dicomnode", "0", "0", "Bench")


def lungs(slices: int, matrix: int) -> npt.NDArray[np.uint8]:
    """Labels: two ellipsoids that take about as much of the volume as lungs do."""
    z, y, x = (np.linspace(-1, 1, n, dtype=np.float32) for n in (slices, matrix, matrix))
    out = np.zeros((slices, matrix, matrix), np.uint8)
    for label, centre in ((1, -0.38), (2, 0.38)):
        inside = (z[:, None, None] / 0.97) ** 2 + (y[:, None] / 0.55) ** 2 + ((x - centre) / 0.3) ** 2 <= 1
        out[inside] = label
    return out


def write_headers(folder: Path, slices: int, matrix: int) -> tuple[SourceInstance, ...]:
    """CT slices of nothing as files."""
    folder.mkdir(parents=True)
    found = []
    for number in range(slices):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = derived_uid("bench", "slice", str(number))
        ds.StudyInstanceUID, ds.SeriesInstanceUID = derived_uid("bench", "study"), derived_uid("bench", "series")
        ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = derived_uid("bench", "frame"), ""
        ds.Modality, ds.PatientName, ds.PatientID, ds.StudyID = "CT", "Bench^Mark", "BENCH", "1"
        ds.PatientBirthDate, ds.PatientSex, ds.StudyDate, ds.StudyTime = "", "O", "20260101", "120000"
        ds.AccessionNumber, ds.ReferringPhysicianName = "", ""
        ds.SeriesNumber, ds.InstanceNumber = 1, number + 1
        ds.Rows = ds.Columns = matrix
        ds.PixelSpacing, ds.SliceThickness = [0.7, 0.7], 1.25
        ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, 1.25 * number]
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.PixelData = bytes(2 * matrix * matrix)
        path = folder / f"{number:04d}.dcm"
        dcmwrite(path, ds, enforce_file_format=True)
        found.append(SourceInstance(str(ds.SOPInstanceUID), str(CTImageStorage), str(ExplicitVRLittleEndian), path, ""))
    return tuple(found)


def ours(labels: npt.NDArray[np.uint8], sources: tuple[SourceInstance, ...]) -> bytes:
    """Headers read, SEG made and written, as the worker does it; without the SR."""
    identity = result_identity(
        inputs="bench",
        model_digest=MODEL.digest,
        parameters="",
        revision=1,
        segment_numbers=[1, 2],
        content_datetime="2026-01-01T12:00:00+00:00",
    )
    analysis = Analysis(
        labels=labels,
        source_uids=tuple(s.sop_instance_uid for s in sources),
        segments=SEGMENTS,
        measurements=(),
        engine="bench",
    )
    made = encode_results(analysis, identity, MODEL, sources, station=STATION, order=Order(kinds={"": ("SEG",)}))
    return made[0].part10


def theirs(labels: npt.NDArray[np.uint8], sources: tuple[SourceInstance, ...]) -> bytes:
    """The same with highdicom alone, headers read by pydicom."""
    images = [dcmread(s.path, stop_before_pixels=True) for s in sources]
    descriptions = [
        hd.seg.SegmentDescription(
            segment_number=s.number,
            segment_label=s.label,
            segmented_property_category=hd.sr.CodedConcept(s.category.value, "SCT", s.category.meaning),
            segmented_property_type=hd.sr.CodedConcept(s.type.value, "SCT", s.type.meaning),
            algorithm_type=hd.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=hd.AlgorithmIdentificationSequence(
                "bench", hd.sr.CodedConcept("123110", "DCM", "Artificial Intelligence"), "1.0.0"
            ),
        )
        for s in SEGMENTS
    ]
    seg = hd.seg.Segmentation(
        source_images=images,
        pixel_array=labels,
        segmentation_type=hd.seg.SegmentationTypeValues.BINARY,
        segment_descriptions=descriptions,
        series_instance_uid=derived_uid("bench", "seg-series"),
        series_number=2,
        sop_instance_uid=derived_uid("bench", "seg"),
        instance_number=1,
        manufacturer="dicomnode",
        manufacturer_model_name="dicomnode",
        software_versions="0",
        device_serial_number="0",
    )
    buffer = BytesIO()
    seg.save_as(buffer)
    return buffer.getvalue()


def measure(bench: Bench) -> Section:
    slices, matrix = bench.amount(248, 20), bench.amount(512, 64)
    sources = write_headers(bench.folder("seg"), slices, matrix)
    labels = lungs(slices, matrix)
    times: dict[str, Samples] = {"dicomnode": Samples(), "highdicom": Samples()}
    frames: dict[str, Any] = {}
    ways = (("dicomnode", ours), ("highdicom", theirs))
    for turn in range(-1, bench.repeat):  # the first one loads tables
        for name, way in ways:
            say.print(f"SEG by {name} {turn + 1}/{bench.repeat} …")
            begin = time.perf_counter()
            made = way(labels, sources)
            if turn >= 0:
                times[name].add(time.perf_counter() - begin)
            frames[name] = (int(dcmread(BytesIO(made)).NumberOfFrames), len(made))
    if frames["dicomnode"][0] != frames["highdicom"][0]:
        raise AssertionError("the two made another number of frames")
    best = times["dicomnode"].best
    rows = [
        {
            "encoder": name,
            "s": f"{samples.best:.2f}",
            "ratio": f"{samples.best / best:.1f}x",
            "frames": frames[name][0],
            "MB": f"{frames[name][1] / 1e6:.1f}",
        }
        for name, samples in times.items()
    ]
    note = f"From labels of {slices} x {matrix} x {matrix} and files to Part 10 bytes; best of {bench.repeat}."
    section = Section([Figures("SEG with two lungs", rows, note)])
    section.goals.append(
        Goal(
            "SEG of 248 x 512 x 512",
            f"< {LIMIT_SECONDS} s",
            f"{best:.2f} s",
            None if bench.quick else best < LIMIT_SECONDS,
        )
    )
    section.samples = {name: samples.as_json() for name, samples in times.items()}
    return section
