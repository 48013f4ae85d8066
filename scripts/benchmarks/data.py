"""Objects to send: sets of CT files whose UIDs can be renewed in place, and one of 2 GB.

Every UID is ``2.25.1`` and digits of fixed width, so that a file keeps its length and new
UIDs are a few bytes written into it: an acceptor never gets an object twice.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, CTImageStorage, ExplicitVRLittleEndian

from benchmarks.tools import Bench, settle

GRAYSCALE_WORD_MULTI_FRAME = "1.2.840.10008.5.1.4.1.1.7.3"
FRAME_BYTES = 512 * 512 * 2
HEADER_BYTES = 8192
_RUN = re.compile(rb"2\.25\.1(\d{10})\d{11}")
_runs = itertools.count(1)


def uid(sender: int, kind: int, number: int, run: int = 0) -> str:
    """``kind``: 1 study, 2 series, 3 instance, 4 frame of reference."""
    return f"2.25.1{run:010d}{sender:04d}{kind}{number:06d}"


@dataclass(frozen=True, slots=True)
class ObjectSet:
    """A folder of Part 10 files of one study; ``places`` are where the UIDs stand in each."""

    name: str
    folder: Path
    files: tuple[Path, ...]
    places: tuple[tuple[int, ...], ...]
    size: int
    """Bytes of all files."""

    def __len__(self) -> int:
        return len(self.files)

    def renew(self, *, durably: bool = True) -> None:
        """New UIDs for all, so that the next sending is a new study. ``durably``: nothing is left to write."""
        digits = f"{next(_runs):010d}".encode()
        for path, places in zip(self.files, self.places, strict=True):
            fd = os.open(path, os.O_WRONLY)
            try:
                for place in places:
                    os.pwrite(fd, digits, place)
            finally:
                os.close(fd)
        if durably:
            settle()

    def study_uid(self) -> str:
        from pydicom import dcmread

        return str(dcmread(self.files[0], specific_tags=["StudyInstanceUID"]).StudyInstanceUID)


def open_set(name: str, folder: Path) -> ObjectSet:
    files = tuple(sorted(folder.iterdir()))
    places = tuple(tuple(m.start(1) for m in _RUN.finditer(p.read_bytes()[:HEADER_BYTES])) for p in files)
    return ObjectSet(name, folder, files, places, sum(p.stat().st_size for p in files))


def ct(bench: Bench) -> ObjectSet:
    """300 x 512 KB."""
    return write_set("ct", bench.folder("ct"), bench.amount(300, 40), 512)


def small(bench: Bench) -> ObjectSet:
    """1,000 x 14 KB."""
    return write_set("small", bench.folder("small"), bench.amount(1000, 60), 80)


def for_senders(bench: Bench, name: str, senders: int, count: int, side: int) -> list[ObjectSet]:
    """As many sets with different objects as there are senders."""
    return [write_set(name, bench.folder(f"{name}-sender"), count, side, sender=n) for n in range(senders)]


def write_set(name: str, folder: Path, count: int, side: int, *, sender: int = 0) -> ObjectSet:
    """CT images of ``side`` x ``side``, uncompressed, with noise as pixels."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(sender).integers(0, 4096, side * side, "<u2")
    for number in range(count):
        ds = ct_image(sender, number, side)
        ds.add_new("PixelData", "OW", np.roll(noise, number * side).tobytes())
        ds.save_as(folder / f"{number:06d}.dcm", enforce_file_format=True)
    return open_set(name, folder)


def _image(sop_class: str, sender: int, number: int, rows: int, columns: int) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = sop_class
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = uid(sender, 3, number)
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uid(sender, 1, 0), uid(sender, 2, 0)
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = f"Bench^{sender}", f"B{sender}", "19600101", "O"
    ds.StudyDate = ds.SeriesDate = ds.ContentDate = "20260101"
    ds.StudyTime = ds.SeriesTime = ds.ContentTime = "120000"
    ds.AccessionNumber, ds.StudyID, ds.ReferringPhysicianName = f"A{sender}", "1", ""
    ds.Manufacturer, ds.InstitutionName, ds.StationName = "dicomnode", "Bench", "BENCH"
    ds.StudyDescription = ds.SeriesDescription = "bench"
    ds.SeriesNumber, ds.InstanceNumber = 1, number + 1
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.Rows, ds.Columns = rows, columns
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 0
    return ds


def ct_image(sender: int, number: int, side: int) -> Dataset:
    """CT Image Storage (PS3.3 A.3) with the attributes that scanners send, no pixels."""
    ds = _image(CTImageStorage, sender, number, side, side)
    ds.Modality, ds.ImageType, ds.BodyPartExamined = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], "CHEST"
    ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = uid(sender, 4, 0), ""
    ds.ImagePositionPatient = [-180.0, -180.0, float(number)]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.PixelSpacing, ds.SliceThickness, ds.SliceLocation = [0.7, 0.7], 1.0, float(number)
    ds.KVP, ds.ExposureTime, ds.XRayTubeCurrent, ds.Exposure = 120, 500, 200, 100
    ds.ConvolutionKernel, ds.PatientPosition, ds.ProtocolName = "LUNG", "HFS", "Bench"
    ds.GantryDetectorTilt, ds.TableHeight, ds.RotationDirection = 0, 150, "CW"
    ds.ManufacturerModelName, ds.SoftwareVersions, ds.DeviceSerialNumber = "Bench", "1", "0"
    ds.WindowCenter, ds.WindowWidth = [-600, 40], [1500, 400]
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = -1024, 1, "HU"
    return ds


def cr_studies(bench: Bench, count: int) -> list[ObjectSet]:
    """Studies of two CR images of 8 MB each (2,000 x 2,000)."""
    pixels = np.random.default_rng(1).integers(0, 4096, 2000 * 2000, "<u2").tobytes()
    found = []
    for sender in range(count):
        folder = bench.folder("cr")
        folder.mkdir(parents=True)
        for number, view in enumerate(("PA", "LL")):
            ds = _image(ComputedRadiographyImageStorage, sender, number, 2000, 2000)
            ds.Modality, ds.BodyPartExamined, ds.ViewPosition, ds.PlateType = "CR", "CHEST", view, ""
            ds.PatientOrientation = ["L", "F"]
            ds.add_new("PixelData", "OW", pixels)
            ds.save_as(folder / f"{number}.dcm", enforce_file_format=True)
        found.append(open_set("cr", folder))
    return found


def multi_frame(bench: Bench) -> ObjectSet:
    """One object of 4,000 frames, 2.1 GB, whose pixels are a hole in the file."""
    frames = bench.amount(4000, 160)
    folder = bench.folder("multi-frame")
    folder.mkdir(parents=True)
    ds = _image(GRAYSCALE_WORD_MULTI_FRAME, 0, 0, 512, 512)
    ds.Modality, ds.ConversionType, ds.NumberOfFrames, ds.BurnedInAnnotation = "OT", "SYN", frames, "NO"
    ds.FrameIncrementPointer = 0x00181063
    ds.FrameTime = 40
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType, ds.PresentationLUTShape = 0, 1, "US", "IDENTITY"
    ds.add_new("PixelData", "OW", b"")
    head = BytesIO()
    ds.save_as(head, enforce_file_format=True)
    path = folder / "0.dcm"
    length = frames * FRAME_BYTES
    with path.open("wb") as file:
        file.write(head.getvalue()[:-4] + length.to_bytes(4, "little"))  # PixelData comes last
        file.truncate(file.tell() + length)
    return open_set("multi-frame", folder)
