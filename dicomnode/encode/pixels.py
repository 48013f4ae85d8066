"""Pixels and display attributes of single source images, for key images and presentation states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from dicomnode.encode.multiframe import flat_frame
from dicomnode.encode.picture import Display
from dicomnode.errors import MalformedDataSet, StorageError, UnsuitableSeries
from dicomnode.records import SourceInstance

Pixels = Callable[[SourceInstance, int, int, int], npt.NDArray[Any]]
"""(source, frame from 1 or 0 for a single-frame image, rows, columns) -> stored values (rows, columns)."""

OPERATION = "make key image"
_TAGS = [
    "SOPClassUID", "SOPInstanceUID", "NumberOfFrames", "Rows", "Columns", "SamplesPerPixel",
    "PhotometricInterpretation", "BurnedInAnnotation", "Modality", "ImageType", "ConversionType",
    "RecognizableVisualFeatures",
    "PixelSpacing", "ImagerPixelSpacing", "ImageOrientationPatient", "PatientOrientation", "PixelAspectRatio",
    "RescaleSlope", "RescaleIntercept", "RescaleType", "WindowCenter", "WindowWidth", "PresentationLUTShape",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]  # fmt: skip


def read_display_header(source: SourceInstance, frame: int) -> Dataset:
    """Attributes of one image or frame (from 1; 0: single-frame) that decide how it is shown.

    Raises ``StorageError``, ``MalformedDataSet``, ``UnsuitableSeries`` (NOT_GREYSCALE).
    """
    try:
        ds = pydicom.dcmread(source.path, stop_before_pixels=True, specific_tags=list(_TAGS))
    except OSError as error:
        raise StorageError(OPERATION, f"a source file cannot be opened ({error.strerror})") from None
    except (InvalidDicomError, EOFError, ValueError) as error:
        raise MalformedDataSet(OPERATION, f"a source file cannot be read ({type(error).__name__})") from None
    if int(ds.get("SamplesPerPixel") or 1) != 1:
        raise UnsuitableSeries(OPERATION, "NOT_GREYSCALE", "the image is not greyscale")
    return flat_frame(ds, frame) if frame else ds


def display_of(ds: Dataset) -> Display:
    """Rescale, first window and polarity; what is missing or no number is left at its default."""
    centre, width = _number(ds, "WindowCenter"), _number(ds, "WindowWidth")
    slope = _number(ds, "RescaleSlope")
    return Display(
        slope=1.0 if slope is None else slope,
        intercept=_number(ds, "RescaleIntercept") or 0.0,
        window=None if centre is None or not width or width < 1 else (centre, width),
        inverted=ds.get("PhotometricInterpretation") == "MONOCHROME1" or ds.get("PresentationLUTShape") == "INVERSE",
    )


def spacing_of(ds: Dataset) -> tuple[tuple[float, float], bool]:
    """Distance between rows and between columns, and whether it is in mm of the patient.

    Without Pixel Spacing the detector's, else Pixel Aspect Ratio, else square: good for proportions only.
    """
    for keyword in ("PixelSpacing", "ImagerPixelSpacing", "PixelAspectRatio"):
        try:
            row, column = (float(v) for v in ds.get(keyword) or ())
        except (TypeError, ValueError):
            continue
        if row > 0 and column > 0 and 0.02 < row / column < 50:
            return (row, column), keyword == "PixelSpacing"
    return (1.0, 1.0), False


def read_pixels(source: SourceInstance, frame: int, rows: int, columns: int) -> npt.NDArray[Any]:
    """``Pixels`` in this process; the node decodes in a process that may die."""
    from pydicom.pixels import pixel_array

    try:
        # Not from the path: the library cannot find its place in a deflated file
        array = pixel_array(pydicom.dcmread(source.path), index=frame - 1 if frame else 0)
    except Exception as error:
        raise UnsuitableSeries(
            OPERATION, "DECODE_FAILED", f"pixels cannot be decoded ({type(error).__name__})"
        ) from error
    if array.shape != (rows, columns):
        raise UnsuitableSeries(OPERATION, "DECODE_FAILED", f"decoded to {array.shape}")
    return np.asarray(array)


def _number(ds: Dataset, keyword: str) -> float | None:
    try:
        value = ds.get(keyword)
        if value is None or isinstance(value, str | float | int):
            number = float(value) if value not in (None, "") else None
        else:
            number = float(value[0])
    except (TypeError, ValueError, IndexError):
        return None
    return number if number is not None and np.isfinite(number) else None
