"""Sources of every kind with pixels, and an analysis of each; nothing here comes from a patient."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian

from dicomnode.identity import derived_uid
from dicomnode.records import Analysis, Code, Finding, Measurement, ProbabilityMap, SourceInstance
from tests.encode.encode_case import AXIAL, LUNG, MILLILITRE, SEGMENTS, VOLUME, Case, blobs, identity, slice_dataset

ROWS, COLUMNS, COUNT = 48, 64, 6
TILTED = (1.0, 0.0, 0.0, 0.0, 0.939693, -0.342020)
PRESENT, ABSENT = Code("52101004", "SCT", "Present"), Code("272519000", "SCT", "Absent")
PNEUMOTHORAX = Code("36118008", "SCT", "Pneumothorax")


def pixels(number: int) -> np.ndarray:
    """A picture in which every corner differs: bright to the right, and a dark square top left."""
    plane = np.add.outer(np.arange(ROWS) * 2, np.arange(COLUMNS) * 10).astype(np.int16) + number
    plane[2:8, 2:8] = -500
    return plane


def with_pixels(ds: Dataset, plane: np.ndarray, *, signed: bool = True, bits: int = 16) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, bits, bits - 1
    ds.PixelRepresentation = int(signed)
    ds.PixelData = (
        (plane if signed else np.clip(plane, 0, (1 << bits) - 1)).astype("<i2" if signed else "<u2").tobytes()
    )


def ct(orientation: tuple[float, ...] = AXIAL) -> list[Dataset]:
    out = []
    for number in range(COUNT):
        ds = slice_dataset(number, orientation, shape=(ROWS, COLUMNS))
        ds.PixelSpacing = [1.4, 0.7]
        ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, -24, "HU"
        ds.WindowCenter, ds.WindowWidth = [300, 40], [800, 400]
        with_pixels(ds, pixels(number))
        out.append(ds)
    return out


def tilted_ct() -> list[Dataset]:
    """A tilted gantry: the table moves along z, the slices are not square to it."""
    out = ct(TILTED)
    for number, ds in enumerate(out):
        ds.ImagePositionPatient = [-50.0, 20.0, 100.0 + 2.5 * number]
        ds.GantryDetectorTilt = 20
    return out


def mr() -> list[Dataset]:
    out = ct((0.0, 1.0, 0.0, 0.0, 0.0, -1.0))
    for ds in out:
        ds.Modality, ds.SOPClassUID = "MR", "1.2.840.10008.5.1.4.1.1.4"
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        for keyword in ("RescaleSlope", "RescaleIntercept", "RescaleType"):
            delattr(ds, keyword)
    return out


def cr() -> list[Dataset]:
    ds = ct()[0]
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID", "PixelSpacing",
                    "SliceThickness", "PositionReferenceIndicator", "RescaleSlope", "RescaleIntercept",
                    "RescaleType"):  # fmt: skip
        delattr(ds, keyword)
    ds.Modality, ds.SOPClassUID = "CR", "1.2.840.10008.5.1.4.1.1.1"
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.PatientOrientation, ds.ImagerPixelSpacing, ds.ViewPosition = ["L", "F"], [0.2, 0.2], "PA"
    with_pixels(ds, pixels(0), signed=False, bits=12)
    ds.PhotometricInterpretation = "MONOCHROME1"
    return [ds]


def dx() -> list[Dataset]:
    (ds,) = cr()
    ds.Modality, ds.SOPClassUID = "DX", "1.2.840.10008.5.1.4.1.1.1.1"
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.PresentationIntentType, ds.PresentationLUTShape = "FOR PRESENTATION", "INVERSE"
    ds.RescaleSlope, ds.RescaleIntercept, ds.RescaleType = 1, 0, "US"
    ds.PixelSpacing, ds.PatientOrientation = [0.2, 0.2], ["R", "F"]
    return [ds]


def _item(**values: object) -> Dataset:
    ds = Dataset()
    for keyword, value in values.items():
        setattr(ds, keyword, value)
    return ds


def enhanced(modality: str) -> list[Dataset]:
    """The CT stack as one multi-frame object, its frames from head to feet."""
    slices = ct() if modality == "CT" else mr()
    ds = Dataset()
    ds.update({e.tag: e for e in slices[0] if e.keyword not in (
        "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "RescaleSlope",
        "RescaleIntercept", "RescaleType", "WindowCenter", "WindowWidth", "PixelData", "Laterality")})  # fmt: skip
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2.1" if modality == "CT" else "1.2.840.10008.5.1.4.1.1.4.1"
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = derived_uid("test", "enhanced", modality)
    ds.ImageType, ds.NumberOfFrames = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], len(slices)
    first = slices[0]
    shared = _item(
        PixelMeasuresSequence=Sequence([_item(PixelSpacing=first.PixelSpacing, SliceThickness=2.5)]),
        PlaneOrientationSequence=Sequence([_item(ImageOrientationPatient=first.ImageOrientationPatient)]),
    )
    if modality == "CT":
        shared.PixelValueTransformationSequence = Sequence(
            [_item(RescaleSlope=1, RescaleIntercept=-24, RescaleType="HU")]
        )
    frame_type = "CTImageFrameTypeSequence" if modality == "CT" else "MRImageFrameTypeSequence"
    ds.SharedFunctionalGroupsSequence = Sequence([shared])
    ds.PerFrameFunctionalGroupsSequence = Sequence(
        [
            _item(
                PlanePositionSequence=Sequence([_item(ImagePositionPatient=s.ImagePositionPatient)]),
                FrameVOILUTSequence=Sequence([_item(WindowCenter=300, WindowWidth=800)]),
                **{frame_type: Sequence([_item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"])])},
            )
            for s in reversed(slices)
        ]
    )
    ds.PixelData = b"".join(s.PixelData for s in reversed(slices))
    return [ds]


SOURCES: dict[str, Callable[[], list[Dataset]]] = {
    "ct": ct,
    "tilted-ct": tilted_ct,
    "mr": mr,
    "cr": cr,
    "dx": dx,
    "enhanced-ct": lambda: enhanced("CT"),
    "enhanced-mr": lambda: enhanced("MR"),
}


def save(datasets: list[Dataset], folder: Path, syntax: UID = ExplicitVRLittleEndian) -> tuple[SourceInstance, ...]:
    found = []
    for number, ds in enumerate(datasets):
        path = folder / f"source-{number}.dcm"
        ds.save_as(path, enforce_file_format=True)
        found.append(SourceInstance(str(ds.SOPInstanceUID), str(ds.SOPClassUID), str(syntax), path, "0" * 64))
    return tuple(found)


def case_of(datasets: list[Dataset], folder: Path) -> Case:
    """A full analysis: two segments, a finding, a probability map; slices from the feet up."""
    sources = save(datasets, folder)
    frames = int(datasets[0].get("NumberOfFrames") or 0)
    count = frames or len(datasets)
    labels = np.zeros((count, ROWS, COLUMNS), np.uint8)
    labels[:, ::1, ::1] = np.repeat(np.repeat(blobs(count), 2, axis=1), 2, axis=2)
    analysis = Analysis(
        labels=labels,
        source_uids=tuple(s.sop_instance_uid for s in sources) * (frames or 1),
        source_frames=tuple(range(frames, 0, -1)),
        segments=SEGMENTS,
        measurements=(Measurement("volume_ml", VOLUME, 12.5, MILLILITRE, 1),),
        findings=(
            Finding("pneumothorax", PNEUMOTHORAX, PRESENT, 0.87, 0.5, "at the right apex"),
            Finding("effusion", Code("60046008", "SCT", "Pleural effusion"), ABSENT, 0.02, 0.5),
        ),
        probability_maps=(
            ProbabilityMap("lung", LUNG, np.linspace(0, 1, labels.size, dtype=np.float32).reshape(labels.shape)),
        ),
        engine="onnxruntime-cpu 1.32.0",
    )
    return Case(analysis, identity(), sources, datasets=tuple(datasets))
