"""Shared pieces of the infer tests: the model under test, phantoms as DICOM series, fakes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian

from dicomnode.infer.bundle import Bundle
from dicomnode.infer.contract import InputContract
from dicomnode.infer.engine import Engine, Ok, Rejected
from dicomnode.infer.golden import GoldenReport, check_golden, session_for

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "models" / "ct-lung" / "1.0.0"
DATA = ROOT.parent / "shared" / "data"
CONTRACT = InputContract(
    modality="CT",
    sop_classes=(str(CTImageStorage),),
    orientation="axial",
    min_slices=3,
    slice_spacing_mm=(0.3, 10.0),
    pixel_spacing_mm=(0.3, 2.0),
    hounsfield=True,
)


def build_script() -> ModuleType:
    """scripts/build_ct_lung.py as a module."""
    spec = importlib.util.spec_from_file_location("build_ct_lung", ROOT / "scripts" / "build_ct_lung.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_series(
    folder: Path,
    hu: np.ndarray,
    spacing: tuple[float, float, float] = (10.0, 2.0, 2.0),
    *,
    row_sign: int = 1,
    column_sign: int = 1,
    slope: float = 1.0,
    intercept: float = -1024.0,
    edit: Callable[[int, Dataset], None] | None = None,
) -> list[Path]:
    """Write (z, y, x) LPS ``hu`` as single-frame CT files, one per slice, foot to head.

    The signs turn the image axes in the patient (prone: both -1; feet first, supine: row -1),
    without moving the patient's anatomy in LPS.
    """
    folder.mkdir(parents=True, exist_ok=True)
    turned = hu[:, ::column_sign, ::row_sign]
    _, rows, columns = hu.shape
    paths = []
    for index, pixels in enumerate(turned):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
        # UIDs do not follow the slice order
        ds.SOPInstanceUID = f"1.2.3.{(index * 7919) % 1009 + 1}"
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2.3", "1.2.3.4", "1.2.3.5"
        ds.Modality = "CT"
        ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
        ds.Rows, ds.Columns = rows, columns
        ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
        ds.PixelSpacing = [spacing[1], spacing[2]]
        ds.ImageOrientationPatient = [row_sign, 0, 0, 0, column_sign, 0]
        ds.ImagePositionPatient = [
            -row_sign * (columns - 1) / 2 * spacing[2],
            -column_sign * (rows - 1) / 2 * spacing[1],
            index * spacing[0],
        ]
        ds.RescaleSlope, ds.RescaleIntercept = slope, intercept
        ds.PixelData = np.rint((pixels.astype(float) - intercept) / slope).astype("<i2").tobytes()
        if edit:
            edit(index, ds)
        path = folder / f"{index:04d}.dcm"
        pydicom.dcmwrite(path, ds, enforce_file_format=True)
        paths.append(path)
    return paths


def copy_bundle(folder: Path) -> Path:
    """A writable copy of the model at ``folder``/ct-lung/1.0.0."""
    target = folder / "ct-lung" / "1.0.0"
    shutil.copytree(MODEL, target)
    return target


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = bundle / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def replace_file(bundle: Path, name: str, content: bytes) -> None:
    """Write ``name`` and its digest, as an author who changes the bundle would."""
    (bundle / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit_manifest(bundle, lambda m: m["files"].update({name: digest}))


class FakeEngine:
    """An engine that answers with ``function(hu)`` for the output ``air``."""

    name, version = "fake", "1"

    def __init__(self, function: Callable[[np.ndarray], np.ndarray], answer: Ok | Rejected | None = None) -> None:
        self.function = function
        self.answer = answer or Ok()
        self.open_sessions = 0

    def probe(self) -> Ok | Rejected:
        return self.answer

    def load(self, onnx: bytes, *, threads: int = 0) -> FakeEngine:
        self.open_sessions += 1
        return self

    @property
    def engine(self) -> str:
        return "fake 1"

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"air": self.function(inputs["hu"])}

    def close(self) -> None:
        self.open_sessions -= 1


def crash(part10: bytes, rows: int, columns: int) -> None:
    """Stands for a codec that crashes; runs in a child of the pool."""
    os.kill(os.getpid(), signal.SIGSEGV)


def golden_report(bundle: Bundle, engine: Engine) -> GoldenReport:
    """What the gate finds, of which ``models verify`` tells only the first problem; never raises for a mismatch."""
    session = session_for(bundle, engine, 1)
    try:
        return check_golden(bundle, session)
    finally:
        session.close()
