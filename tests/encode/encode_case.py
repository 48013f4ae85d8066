"""A small synthetic series on disk and an analysis of it; nothing here comes from a patient."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from dicomnode.encode import Station
from dicomnode.identity import derived_uid, result_identity
from dicomnode.records import (
    Analysis,
    Code,
    ModelIdentity,
    ResultIdentity,
    SegmentDefinition,
    SourceInstance,
)

REPOSITORY = Path(__file__).resolve().parents[2]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
OBLIQUE = (0.8, 0.6, 0.0, -0.36, 0.48, 0.8)

ANATOMICAL = Code("123037004", "SCT", "Anatomical Structure")
ABNORMAL = Code("49755003", "SCT", "Morphologically Abnormal Structure")
LUNG = Code("39607008", "SCT", "Lung")
SEGMENTS = (
    SegmentDefinition(1, "Right lung", ANATOMICAL, LUNG, Code("24028007", "SCT", "Right")),
    SegmentDefinition(2, "Left lung", ANATOMICAL, LUNG, Code("7771000", "SCT", "Left"), rgb=(0, 0, 255)),
    SegmentDefinition(3, "Nodule", ABNORMAL, Code("27925004", "SCT", "Nodule"), anatomic_region=LUNG),
)
VOLUME = Code("118565006", "SCT", "Volume")
MILLILITRE = Code("ml", "UCUM", "milliliter")
STATION = Station("Example Works", "dicomnode", "0.1.0", "SN-1", "Example Hospital")
MODEL = ModelIdentity(
    name="ct-lung",
    version="1.2.0",
    manufacturer="Example Labs",
    digest="ab" * 32,
    device_uid=derived_uid("model", "ct-lung", "1.2.0"),
    description="Lung segmentation by threshold",
    intended_use="Reference method for tests; not a medical device.",
    parameters={"threshold_hu": -500},
)


@dataclass(frozen=True)
class Case:
    """All arguments of ``encode_results`` with what a test compares the outcome to."""

    analysis: Analysis
    identity: ResultIdentity
    sources: tuple[SourceInstance, ...]
    model: ModelIdentity = MODEL
    station: Station = STATION
    datasets: tuple[Dataset, ...] = field(default=())

    def with_analysis(self, **changes: object) -> Case:
        return replace(self, analysis=replace(self.analysis, **changes))


def slice_dataset(
    number: int, orientation: Sequence[float], *, shape: tuple[int, int] = (24, 32), step: float = 2.5
) -> Dataset:
    """CT slice ``number`` (from 0) of a stack that grows along row x column direction."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = derived_uid("test", "slice", str(number))
    ds.StudyInstanceUID, ds.SeriesInstanceUID = derived_uid("test", "study"), derived_uid("test", "series")
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = derived_uid("test", "frame"), ""
    ds.Modality, ds.PatientName, ds.PatientID = "CT", "Example^Test", "ID-1"
    ds.PatientBirthDate, ds.PatientSex, ds.PatientAge = "19700101", "F", "054Y"
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber = "20240102", "030405", "S1", "A1"
    ds.ReferringPhysicianName, ds.StudyDescription = "Doctor^Some", "CT chest"
    ds.BodyPartExamined, ds.Laterality, ds.RequestingService = "CHEST", "", "Ward 7"
    ds.SeriesNumber, ds.InstanceNumber, ds.Manufacturer = 3, number + 1, "Scanner Works"
    ds.Rows, ds.Columns = shape
    ds.PixelSpacing, ds.SliceThickness = [0.7, 0.8], 2.5
    normal = np.cross(orientation[:3], orientation[3:])
    ds.ImageOrientationPatient = [round(float(c), 6) for c in orientation]
    ds.ImagePositionPatient = [round(float(c), 6) for c in np.array([-50, 20, 100]) + number * step * normal]
    return ds


def identity(revision: int = 1, predecessor: tuple[str, str, str, str] | None = None) -> ResultIdentity:
    return result_identity(
        inputs="inputs",
        model_digest=MODEL.digest,
        parameters="parameters",
        revision=revision,
        segment_numbers=[s.number for s in SEGMENTS],
        content_datetime="2024-05-06T07:08:09.123456+02:00",
        predecessor_sr=predecessor,
    )


def blobs(count: int, rows: int = 24, columns: int = 32) -> np.ndarray:
    """Two asymmetric blobs, so that any flip or transposition shows; segment 3 stays empty."""
    labels = np.zeros((count, rows, columns), np.uint8)
    if count < 4:
        labels[0, 3:9, 4:11] = 1
        return labels
    labels[1 : count - 1, 3:9, 4:11] = 1
    labels[count - 2, 3, 12] = 1
    labels[2:count, 5:18, 20:27] = 2
    labels[2, 20, 29] = 2
    return labels


def program(name: str) -> str:
    """Path of a program of others; absent it is a failure in CI, a skip elsewhere."""
    path = shutil.which(name)
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not installed, and CI must have it")
        pytest.skip(f"{name} is not installed")
    return path


def read(part10: bytes) -> Dataset:
    return pydicom.dcmread(BytesIO(part10))
