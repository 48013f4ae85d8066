"""A procedural chest radiograph: the thorax phantom seen by X-rays from the front; no patient was involved.

Line integrals of attenuation through the phantom (parallel beam, no scatter) become grey values as a chest
image For Presentation has them: lungs dark, mediastinum bright, direct exposure black. Rows run to the feet,
columns to the patient's left, so the picture is one that is looked at from the front.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian
from scipy import ndimage

from dicomnode.demo.phantom import EXAMPLE_TIME, thorax
from dicomnode.identity import derived_uid

WHITE = 4095
WATER_PER_MM = 0.02
"""Attenuation of water at about 60 keV."""

_SLICE_MM, _PIXEL_MM = 2.5, 2.0
_SLICES, _MATRIX = 128, 176
_BLACK, _BRIGHT = 0.1, 5.6
"""Line integrals that become the ends of the grey scale."""

Grey = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Radiograph:
    """``pixels``: uint16 (rows, columns), 0 black to ``WHITE``. ``lungs``: bool of that shape, where the beam
    crossed a lung. ``mm``: size of a pixel.
    """

    pixels: Grey
    lungs: npt.NDArray[np.bool_]
    mm: float


def radiograph(
    *,
    mm: float = 0.8,
    turned: float = 0.0,
    leaning: float = 0.0,
    photons: float = 1e5,
    gain: float = 1.0,
    field: tuple[float, float, float, float] = (0.0, 1.0, 0.0, 1.0),
    seed: int = 7,
) -> Radiograph:
    """Render it; the same arguments give the same pixels.

    ``turned``: degrees about the body's axis, the patient's left side to the front. ``leaning``: degrees in the
    plane of the picture, the head to the patient's left. ``photons``: per pixel without a patient. ``gain``:
    of the grey scale; above 1 the bright end is clipped. ``field``: first and last row and column of a
    collimator, as shares of the picture; what lies outside is white.
    """
    attenuation, through = _line_integrals(turned)
    shape = (round(_SLICES * _SLICE_MM / mm), round(_MATRIX * _PIXEL_MM / mm))
    lines, depth = (_sampled(a, shape, leaning) for a in (attenuation, through))
    random = np.random.default_rng([seed, 11])
    expected = photons * np.exp(-np.maximum(lines, 0))
    counted = np.maximum(expected + np.sqrt(expected) * random.standard_normal(shape), 0.5)
    grey = gain * (np.log(photons / counted) - _BLACK) / (_BRIGHT - _BLACK) * WHITE
    top, bottom, left, right = field
    rows, columns = (
        slice(round(a * n), round(b * n)) for a, b, n in ((top, bottom, shape[0]), (left, right, shape[1]))
    )
    pixels = np.full(shape, WHITE, np.uint16)
    pixels[rows, columns] = np.clip(np.rint(grey), 0, WHITE)[rows, columns]
    lungs = np.zeros(shape, bool)
    lungs[rows, columns] = (depth > 10.0)[rows, columns]
    return Radiograph(pixels, lungs, mm)


@cache
def _body() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Attenuation per mm, and 1 where lung is: (slices from the feet, rows to the back, columns to the left)."""
    body = thorax(slices=_SLICES, rows=_MATRIX, columns=_MATRIX, pixel_spacing=_PIXEL_MM, slice_spacing=_SLICE_MM)
    attenuation = np.maximum(body.hu.astype(np.float32) + 1000, 0) * np.float32(WATER_PER_MM / 1000)
    return attenuation, (body.labels > 0).astype(np.float32)


@cache
def _line_integrals(turned: float) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Attenuation along the beam, and mm of lung, both (slices from the head, columns)."""
    parts = []
    for volume in _body():
        seen = ndimage.rotate(volume, turned, axes=(1, 2), reshape=False, order=1) if turned else volume
        parts.append(np.ascontiguousarray(seen.sum(axis=1)[::-1]) * np.float32(_PIXEL_MM))
    return parts[0], parts[1]


def _sampled(lines: npt.NDArray[np.float32], shape: tuple[int, int], leaning: float) -> npt.NDArray[np.float64]:
    """At the picture's pixels, edge to edge, turned about its middle."""
    angle = np.deg2rad(leaning)
    scale = np.array([_SLICES / shape[0], _MATRIX / shape[1]])
    mm = np.array([_SLICE_MM, _PIXEL_MM])
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = np.diag(1 / mm) @ turn @ np.diag(mm) @ np.diag(scale)
    middle = (np.array(lines.shape) - 1) / 2 - matrix @ ((np.array(shape) - 1) / 2)
    found: npt.NDArray[np.float64] = ndimage.affine_transform(
        lines.astype(np.float64), matrix, middle, shape, order=1, mode="nearest"
    )
    return found


def to_dataset(
    image: Radiograph,
    kind: Literal["CR", "DX"] = "DX",
    *,
    patient_id: str = "PHANTOM-7",
    patient_name: str = "Phantom^Thorax",
    clock: datetime = EXAMPLE_TIME,
) -> pydicom.Dataset:
    """One image, Explicit VR Little Endian: a DX For Presentation, or a CR stored with black for high values.

    UIDs derive from pixels, kind and patient, never from ``clock``.
    """
    base = ("radiograph", kind, patient_id, str(image.pixels.shape), str(int(image.pixels.sum(dtype=np.int64))))
    ds = pydicom.Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["ORIGINAL", "PRIMARY"] if kind == "CR" else ["ORIGINAL", "PRIMARY", ""]
    ds.SOPClassUID = ComputedRadiographyImageStorage if kind == "CR" else DigitalXRayImageStorageForPresentation
    ds.StudyInstanceUID, ds.SeriesInstanceUID = derived_uid(*base, "study"), derived_uid(*base, "series")
    ds.SOPInstanceUID = derived_uid(*base, "instance")
    for event in ("Study", "Series", "Acquisition", "Content"):
        setattr(ds, f"{event}Date", clock.strftime("%Y%m%d"))
        setattr(ds, f"{event}Time", clock.strftime("%H%M%S"))
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = kind, "dicomnode", "Procedural thorax"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = patient_name, patient_id, "19600101", "O"
    ds.PatientComments = "Procedural phantom, no patient"
    ds.AccessionNumber = ds.StudyID = "PH000011"
    ds.ReferringPhysicianName = ""
    ds.StudyDescription, ds.SeriesDescription = "Chest (procedural phantom)", "Chest PA"
    ds.SeriesNumber, ds.InstanceNumber, ds.BodyPartExamined, ds.ViewPosition = 1, 1, "CHEST", "PA"
    ds.KVP = "60"
    ds.PatientOrientation, ds.ImagerPixelSpacing = ["L", "F"], [f"{image.mm:g}"] * 2
    ds.SamplesPerPixel, ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 1, 16, 12, 11, 0
    ds.Rows, ds.Columns = image.pixels.shape
    pixels = image.pixels
    if kind == "CR":
        ds.PhotometricInterpretation, pixels = "MONOCHROME1", (WHITE - pixels).astype(np.uint16)
    else:
        ds.PhotometricInterpretation, ds.PresentationLUTShape = "MONOCHROME2", "IDENTITY"
        ds.PresentationIntentType, ds.ImageLaterality = "FOR PRESENTATION", "U"
        ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", -1
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
        ds.LossyImageCompression, ds.BurnedInAnnotation = "00", "NO"
        ds.DetectorType, ds.DetectorID, ds.PositionerType = "DIRECT", "PHANTOM", "NONE"
        ds.ExposureIndex, ds.TargetExposureIndex, ds.DeviationIndex = "250", "250", "0"
        ds.AcquisitionContextSequence = []
        region, view = pydicom.Dataset(), pydicom.Dataset()
        region.CodeValue, region.CodingSchemeDesignator, region.CodeMeaning = "51185008", "SCT", "Chest"
        view.CodeValue, view.CodingSchemeDesignator, view.CodeMeaning = "272479007", "SCT", "postero-anterior"
        view.ViewModifierCodeSequence = []
        ds.AnatomicRegionSequence, ds.ViewCodeSequence = [region], [view]
    ds.WindowCenter, ds.WindowWidth = "2048", "4096"
    ds.add_new("PixelData", "OW", pixels.astype("<u2").tobytes())
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    return ds


def write_radiograph(
    image: Radiograph, path: Path, kind: Literal["CR", "DX"] = "DX", patient_id: str = "PHANTOM-7"
) -> Path:
    """As a Part 10 file. Raises ``OSError`` as the file system does."""
    to_dataset(image, kind, patient_id=patient_id).save_as(path, enforce_file_format=True)
    return path
