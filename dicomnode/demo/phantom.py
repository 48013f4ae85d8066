"""A procedural thorax CT whose lungs are known voxel by voxel; no patient was involved.

Coordinates are millimetres in the patient system (LPS, PS3.3 C.7.6.2.1.1: x to the left,
y to the back, z to the head) with the origin in the middle of the volume. The anatomy has a
fixed size of about 320 x 230 x 320 mm: other matrices and spacings sample the same body.

Truth. A voxel is lung when its centre lies inside the pleural surface: pulmonary vessels and
emphysema inside count as lung; trachea, main bronchi, hila and mediastinum do not. Emphysema
is every lung voxel whose HU before noise is below -950. Arrays are (slices, rows, columns);
slices run to the head, rows to the back, columns to the patient's left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from dicomnode.demo.anatomy import (
    EMPHYSEMA_HU,
    LEFT_LUNG,
    RIGHT_LUNG,
    Plane,
    Point,
    couch,
    lung_detail,
    lung_surface,
    paint_body,
)
from dicomnode.identity import derived_uid

EXAMPLE_TIME = datetime(2026, 1, 12, 9, 30, 15)  # DA and TM are local times
INTERCEPT = -1024

_NOISE_SD = 12.0


@dataclass(frozen=True, slots=True)
class LungTruth:
    """What is known of one lung (module docstring: what counts as lung and as emphysema).

    ``voxels_below_950`` counts HU < -950 in the final image, noise included; ``mean_hu`` is
    the mean of the final image over the label.
    """

    label: int
    name: str
    voxels: int
    volume_ml: float
    emphysema_voxels: int
    emphysema_ml: float
    voxels_below_950: int
    mean_hu: float


@dataclass(frozen=True, slots=True)
class Phantom:
    """The volume with its truth.

    ``hu`` int16 and ``labels`` uint8 (0, ``RIGHT_LUNG``, ``LEFT_LUNG``), both
    (slices, rows, columns). Spacings in mm. ``truth`` by label.
    """

    hu: npt.NDArray[np.int16]
    labels: npt.NDArray[np.uint8]
    truth: dict[int, LungTruth]
    pixel_spacing: float
    slice_spacing: float
    seed: int

    @property
    def spacing(self) -> Point:
        """Millimetres between slices, rows and columns."""
        return (self.slice_spacing, self.pixel_spacing, self.pixel_spacing)

    def position(self, index: int) -> Point:
        """ImagePositionPatient of a slice: the centre of its first voxel, LPS mm."""
        slices, rows, columns = self.hu.shape
        return (
            -(columns - 1) / 2 * self.pixel_spacing,
            -(rows - 1) / 2 * self.pixel_spacing,
            (index - (slices - 1) / 2) * self.slice_spacing,
        )


def thorax(
    *,
    slices: int = 128,
    rows: int = 512,
    columns: int = 512,
    pixel_spacing: float = 0.7,
    slice_spacing: float = 2.5,
    seed: int = 7,
) -> Phantom:
    """Render the phantom; the same arguments give the same voxels.

    Spacings in mm. The lungs are complete when slices x slice_spacing is at least 310 and
    rows and columns x pixel_spacing at least 340. Raises ``ValueError`` for an empty matrix
    or a spacing that is not positive.
    """
    if min(slices, rows, columns) < 1 or min(pixel_spacing, slice_spacing) <= 0:
        raise ValueError("slices, rows, columns and both spacings have to be positive")
    plane = Plane.whole(rows, columns, pixel_spacing)
    background = couch(plane)
    box = plane.box(-164, 164, -116, 116)  # nothing of the patient lies outside
    plane = plane.crop(box)
    detail = lung_detail(seed)
    hu = np.empty((slices, rows, columns), np.int16)
    labels = np.zeros((slices, rows, columns), np.uint8)
    side = np.where(plane.x < 0, np.uint8(RIGHT_LUNG), np.uint8(LEFT_LUNG))
    emphysema = {RIGHT_LUNG: 0, LEFT_LUNG: 0}
    for i in range(slices):
        z = (i - (slices - 1) / 2) * slice_spacing
        pleura = lung_surface(plane, z)
        inside = np.where(pleura < 0, side, np.uint8(0))
        labels[i][box] = inside
        image = background.copy()
        paint_body(image[box], plane, z, pleura, detail)
        low = inside[image[box] < EMPHYSEMA_HU]
        for label in emphysema:
            emphysema[label] += int(np.count_nonzero(low == label))
        white = np.random.default_rng([seed, 2, i]).standard_normal((rows + 1, columns + 1), np.float32)
        pairs = white[1:] + white[:-1]
        image += (_NOISE_SD / 2) * (pairs[:, 1:] + pairs[:, :-1])  # mean of 2 x 2: neighbours correlate
        hu[i] = np.rint(np.clip(image, INTERCEPT, 3071))
    voxel_ml = pixel_spacing**2 * slice_spacing / 1000
    truth: dict[int, LungTruth] = {}
    for label, name in ((RIGHT_LUNG, "right lung"), (LEFT_LUNG, "left lung")):
        values = hu[labels == label]
        truth[label] = LungTruth(
            label=label,
            name=name,
            voxels=values.size,
            volume_ml=values.size * voxel_ml,
            emphysema_voxels=emphysema[label],
            emphysema_ml=emphysema[label] * voxel_ml,
            voxels_below_950=int(np.count_nonzero(values < EMPHYSEMA_HU)),
            mean_hu=float(values.mean(dtype=np.float64)) if values.size else 0.0,
        )
    return Phantom(hu, labels, truth, pixel_spacing, slice_spacing, seed)


def _number(value: float) -> str:
    """A DS value (PS3.5 6.2): at most 16 characters, no exponent."""
    text = f"{value:.5f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


_FIXED: dict[str, object] = {  # what every phantom says of itself, PS3.3 A.3
    "SpecificCharacterSet": "ISO_IR 192",
    "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
    "SOPClassUID": CTImageStorage,
    "Modality": "CT",
    "Manufacturer": "dicomnode",
    "InstitutionName": "Phantom laboratory",
    "ReferringPhysicianName": "",
    "StationName": "PHANTOM",
    "StudyDescription": "CT thorax (procedural phantom)",
    "ManufacturerModelName": "Procedural thorax",
    "PatientBirthDate": "19600101",
    "PatientSex": "O",
    "PatientComments": "Procedural phantom, no patient",
    "ContrastBolusAgent": "Simulated iodine",
    "BodyPartExamined": "CHEST",
    "KVP": "120",
    "DeviceSerialNumber": "0",
    "SoftwareVersions": "phantom 1",
    "ProtocolName": "Thorax phantom",
    "GantryDetectorTilt": "0",
    "TableHeight": "150",
    "RotationDirection": "CW",
    "ExposureTime": "500",
    "XRayTubeCurrent": "200",
    "Exposure": "100",
    "ConvolutionKernel": "LUNG",
    "PatientPosition": "HFS",
    "SeriesNumber": "2",
    "AcquisitionNumber": "1",
    "ImageOrientationPatient": ["1", "0", "0", "0", "1", "0"],
    "PositionReferenceIndicator": "",
    "SamplesPerPixel": 1,
    "PhotometricInterpretation": "MONOCHROME2",
    "BitsAllocated": 16,
    "BitsStored": 16,
    "HighBit": 15,
    "PixelRepresentation": 0,
    "WindowCenter": ["-600", "40"],
    "WindowWidth": ["1500", "400"],
    "WindowCenterWidthExplanation": ["LUNG", "SOFT TISSUE"],
    "RescaleIntercept": str(INTERCEPT),
    "RescaleSlope": "1",
    "RescaleType": "HU",
}


def _common(phantom: Phantom, study: str, series: str, clock: datetime) -> pydicom.Dataset:
    """Everything but the patient that the instances of the series share."""
    ds = pydicom.Dataset()
    for keyword, value in _FIXED.items():
        setattr(ds, keyword, value)
    for event in ("Study", "Series", "Acquisition", "Content", "InstanceCreation"):
        setattr(ds, f"{event}Date", clock.strftime("%Y%m%d"))
        setattr(ds, f"{event}Time", clock.strftime("%H%M%S"))
    ds.AccessionNumber = ds.StudyID = f"PH{phantom.seed:06d}"
    ds.SeriesDescription = f"Thorax {_number(phantom.slice_spacing)} mm lung"
    ds.SliceThickness = ds.SpacingBetweenSlices = _number(phantom.slice_spacing)
    ds.ReconstructionDiameter = _number(phantom.hu.shape[2] * phantom.pixel_spacing)
    ds.StudyInstanceUID = study
    ds.SeriesInstanceUID = series
    ds.FrameOfReferenceUID = derived_uid(study, "frame of reference")
    ds.Rows, ds.Columns = phantom.hu.shape[1:]
    ds.PixelSpacing = [_number(phantom.pixel_spacing)] * 2
    return ds


def to_datasets(
    phantom: Phantom,
    *,
    patient_name: str = "Phantom^Thorax",
    patient_id: str = "PHANTOM-7",
    study_uid: str | None = None,
    series_uid: str | None = None,
    clock: datetime,
) -> Iterator[pydicom.Dataset]:
    """CT Image Storage instances from feet to head, with file meta, Explicit VR Little Endian.

    UIDs that are not given derive from seed, matrix, spacing and patient id, never from
    ``clock``: the same call makes the same objects. Stored values are HU + 1024, unsigned.
    """
    spacing = (_number(phantom.pixel_spacing), _number(phantom.slice_spacing))
    base = ("phantom", str(phantom.seed), str(phantom.hu.shape), *spacing, patient_id)
    study = study_uid or derived_uid(*base, "study")
    series = series_uid or derived_uid(*base, "series", study)
    common = _common(phantom, study, series, clock)
    common.PatientName, common.PatientID = patient_name, patient_id
    for index, plane in enumerate(phantom.hu):
        ds = pydicom.Dataset()
        ds.update(common)  # Dataset(common) would share its elements between the slices
        ds.SOPInstanceUID = derived_uid(series, "instance", str(index))
        ds.InstanceNumber = str(index + 1)
        position = phantom.position(index)
        ds.ImagePositionPatient = [_number(value) for value in position]
        ds.SliceLocation = _number(position[2])
        ds.add_new("PixelData", "OW", (plane.astype(np.int32) - INTERCEPT).astype("<u2").tobytes())
        ds.file_meta = FileMetaDataset()
        ds.file_meta.MediaStorageSOPClassUID = CTImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        yield ds


def write_series(
    phantom: Phantom,
    folder: Path,
    *,
    patient_name: str = "Phantom^Thorax",
    patient_id: str = "PHANTOM-7",
    study_uid: str | None = None,
    series_uid: str | None = None,
    clock: datetime = EXAMPLE_TIME,
) -> list[Path]:
    """Write ``to_datasets`` as Part 10 files ``00001.dcm`` ... into the folder (made if missing).

    Returns the paths from feet to head. Raises ``OSError`` as the file system does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths: list[Path] = []
    for ds in to_datasets(
        phantom,
        patient_name=patient_name,
        patient_id=patient_id,
        study_uid=study_uid,
        series_uid=series_uid,
        clock=clock,
    ):
        path = folder / f"{int(ds.InstanceNumber):05d}.dcm"
        ds.save_as(path, enforce_file_format=True)
        paths.append(path)
    return paths
