"""Single images for tests: small pictures whose every value is known, and procedural radiographs as files."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset
from scipy import ndimage

from dicomnode.demo.radiograph import WHITE, Radiograph, radiograph, to_dataset
from dicomnode.identity import derived_uid
from dicomnode.infer.contract import ProjectionContract
from dicomnode.infer.golden import ReadyModel, open_model
from dicomnode.infer.ort import OnnxRuntimeCpu
from dicomnode.infer.volume import read_volume
from tests.encode.source_case import dx, with_pixels
from tests.infer.infer_case import CONTRACT as CT_CONTRACT
from tests.infer.infer_case import DATA, ROOT

BUNDLE = ROOT / "models" / "cxr-quality" / "1.1.0"
CLASSES = ("1.2.840.10008.5.1.4.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1", "1.2.840.10008.5.1.4.1.1.1.1.1")


def contract(**changes: Any) -> ProjectionContract:
    return ProjectionContract(**{"kind": "projection", "modalities": ("CR", "DX"), "sop_classes": CLASSES, **changes})


def image(plane: np.ndarray, bits: int = 12, **attributes: Any) -> Dataset:
    """A DX For Presentation that stores ``plane``; attributes of None are taken away."""
    (ds,) = dx()
    ds.Rows, ds.Columns = plane.shape
    with_pixels(ds, plane, signed=False, bits=bits)
    for keyword in ("WindowCenter", "WindowWidth"):
        delattr(ds, keyword)
    ds.PresentationLUTShape, ds.PatientOrientation, ds.BodyPartExamined = "IDENTITY", ["L", "F"], "CHEST"
    for keyword, value in attributes.items():
        if value is None:
            if keyword in ds:
                delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    return ds


def numbered(ds: Dataset, number: int) -> Dataset:
    """The same as another instance of its series."""
    ds.InstanceNumber = number
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = derived_uid("test", "image", str(number))
    return ds


def saved(ds: Dataset, folder: Path, name: str = "image.dcm") -> Path:
    path = folder / name
    ds.save_as(path, enforce_file_format=True)
    return path


@cache
def picture(**options: Any) -> Radiograph:
    return radiograph(**options)


def radiograph_file(folder: Path, kind: Any = "DX", **options: Any) -> Path:
    return saved(to_dataset(picture(**options), kind), folder, f"{kind}-{len(list(folder.iterdir()))}.dcm")


def quality_model() -> ReadyModel:
    return open_model(BUNDLE, OnnxRuntimeCpu(), threads=1)


@cache
def _real_attenuation() -> tuple[np.ndarray, tuple[float, float, float]]:
    """The real chest CT, every other slice and fourth pixel: per mm, and mm between slices, rows, columns."""
    files = sorted((DATA / "ct-chest-ricord").glob("*.dcm"))
    volume = read_volume(files, CT_CONTRACT)
    hu = volume.values[::2, ::4, ::4].astype(np.float32)
    between, down, across = volume.spacing
    return np.clip(hu + 1000, 0, None) * np.float32(2e-5), (2 * between, 4 * down, 4 * across)


def of_real_ct(*, turned: float = 0.0, leaning: float = 0.0, mm: float = 1.0) -> Radiograph:
    """A radiograph computed from it: line integrals, no noise; turned and leaning as of ``radiograph``."""
    attenuation, (between, down, across) = _real_attenuation()
    if turned:
        attenuation = ndimage.rotate(attenuation, turned, axes=(1, 2), reshape=False, order=1)
    lines = ndimage.zoom(attenuation.sum(axis=1)[::-1] * down, (between / mm, across / mm), order=1)
    if leaning:
        lines = ndimage.rotate(lines, -leaning, reshape=False, order=1, mode="nearest")
    grey = np.clip(lines / np.percentile(lines, 99.8) * WHITE, 0, WHITE)
    return Radiograph(np.rint(grey).astype(np.uint16), np.zeros(lines.shape, bool), mm)
