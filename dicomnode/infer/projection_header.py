"""What is read of a single image (CR, DX), and whether a model takes it. Pure.

PS3.3 A.2 (Computed Radiography) and A.26 (Digital X-Ray): such an image has no place in the
patient, only directions, and its pixels may have a size at the detector, in the patient, or none.
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dicomnode.errors import MalformedDataSet, UnsuitableSeries
from dicomnode.geometry import orientation_of
from dicomnode.header import inflates_within_limit
from dicomnode.infer.contract import ProjectionContract
from dicomnode.infer.slice_header import whole

FOR_PROCESSING_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.1.1.1"})
"""Digital X-Ray Image Storage - For Processing; the classes for mammography and dental images are not taken."""

FACTS = ("ExposureIndex", "TargetExposureIndex", "DeviationIndex", "Sensitivity", "RelativeXRayExposure", "KVP",
         "Exposure", "DistanceSourceToDetector")  # fmt: skip
"""Numbers that a model may report as the image states them."""

_GREY = ("BitsStored", "PixelRepresentation", "RescaleSlope", "RescaleIntercept", "RescaleType",
         "ModalityLUTSequence", "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction")  # fmt: skip
_TAGS = [
    "SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "Modality", "InstanceNumber", "Rows", "Columns",
    "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated", "PixelPaddingValue",
    "PixelPaddingRangeLimit", "PresentationIntentType", "PresentationLUTShape", "PixelIntensityRelationship",
    "PixelIntensityRelationshipSign", "PixelSpacing", "PixelSpacingCalibrationType", "ImagerPixelSpacing",
    "EstimatedRadiographicMagnificationFactor", "PatientOrientation", "ViewPosition", "ViewCodeSequence",
    "BodyPartExamined", "AnatomicRegionSequence", "Laterality", "ImageLaterality", "CollimatorShape",
    "CollimatorLeftVerticalEdge", "CollimatorRightVerticalEdge", "CollimatorUpperHorizontalEdge",
    "CollimatorLowerHorizontalEdge", "PixelAspectRatio", *FACTS, *_GREY,
]  # fmt: skip

_VIEWS = {"399348003": "AP", "272479007": "PA", "399173006": "LL", "399198007": "RL",
          "R-10206": "AP", "R-10214": "PA", "R-10236": "LL", "R-10232": "RL"}  # fmt: skip
"""View Code Sequence (CID 4010, SNOMED CT and the former SNOMED RT) -> View Position."""
_REGIONS = {"51185008": "CHEST", "T-D3000": "CHEST"}
"""Anatomic Region Sequence -> Body Part Examined (PS3.16 Annex L)."""


@dataclass(frozen=True, slots=True)
class PixelSize:
    """Millimetres between rows and between columns; ``source``: where in the room they are measured, in words."""

    mm: tuple[float, float]
    source: str
    in_patient: bool


@dataclass(frozen=True, slots=True)
class ProjectionHeader:
    """One single image as read; texts in upper case.

    ``orientation``: six direction cosines of Patient Orientation, None where it states none.
    ``field``: first and last + 1 row and column of a rectangular collimator, None where none is stated.
    ``aspect``: height and width of a pixel in proportion (Pixel Aspect Ratio). ``facts``: numbers of
    :data:`FACTS` that the image states. ``grey``: a pydicom data set with what the grey-scale transformations
    need.
    """

    uid: str
    series_uid: str
    sop_class_uid: str
    modality: str
    number: int
    rows: int
    columns: int
    frames: int
    samples: int
    photometric: str
    intent: str
    size: PixelSize | None
    orientation: tuple[float, ...] | None
    view: str
    body_part: str
    laterality: str
    relationship: str
    field: tuple[int, int, int, int] | None
    facts: Mapping[str, float]
    padding: tuple[int, int] | None
    grey: Any
    aspect: tuple[float, float] = (1.0, 1.0)


def read_projection_header(part10: bytes) -> ProjectionHeader:
    """Tolerant: what cannot be read as it should is missing. Raises MalformedDataSet for what is no DICOM file."""
    from pydicom import dcmread

    if not inflates_within_limit(part10):
        raise refuse("TOO_LARGE", "a deflated file becomes too large", "Send it in another transfer syntax")
    try:
        ds = dcmread(io.BytesIO(part10), stop_before_pixels=True, specific_tags=list(_TAGS))
        header = projection_header_of(ds)
    except Exception as cause:
        raise MalformedDataSet("read image", f"a file is no readable DICOM file ({type(cause).__name__})") from cause
    if not header.uid:
        raise MalformedDataSet("read image", "a file has no SOP Instance UID")
    return header


def projection_header_of(ds: Any) -> ProjectionHeader:
    sop_class = str(ds.get("SOPClassUID", "") or "")
    intent = _text(ds, "PresentationIntentType")
    if not intent:
        intent = "FOR PROCESSING" if sop_class in FOR_PROCESSING_CLASSES else "FOR PRESENTATION"
    rows, columns = int(ds.get("Rows") or 0), int(ds.get("Columns") or 0)
    facts = {name: value for name in FACTS if (value := _number(ds.get(name))) is not None}
    orientation = orientation_of([str(v) for v in _several(ds.get("PatientOrientation"))])
    relationship = _text(ds, "PixelIntensityRelationship")
    sign = _number(ds.get("PixelIntensityRelationshipSign"))
    padding = whole(ds.get("PixelPaddingValue"))
    limit = whole(ds.get("PixelPaddingRangeLimit"))
    return ProjectionHeader(
        uid=str(ds.get("SOPInstanceUID", "") or ""),
        series_uid=str(ds.get("SeriesInstanceUID", "") or ""),
        sop_class_uid=sop_class,
        modality=_text(ds, "Modality"),
        number=int(_number(ds.get("InstanceNumber")) or 0),
        rows=rows,
        columns=columns,
        frames=int(_number(ds.get("NumberOfFrames")) or 1),
        samples=int(ds.get("SamplesPerPixel") or 1),
        photometric=_text(ds, "PhotometricInterpretation"),
        intent=intent,
        size=pixel_size(ds),
        orientation=tuple(orientation) if orientation else None,
        view=_text(ds, "ViewPosition") or _coded(ds, "ViewCodeSequence", _VIEWS),
        body_part=_text(ds, "BodyPartExamined") or _coded(ds, "AnatomicRegionSequence", _REGIONS),
        laterality=_text(ds, "ImageLaterality") or _text(ds, "Laterality"),
        relationship=relationship + (f", sign {int(sign):+d}" if relationship and sign else ""),
        field=_field(ds, rows, columns),
        facts=facts,
        padding=None if padding is None else (padding, padding if limit is None else limit),
        grey=ds,
        aspect=_pair(ds.get("PixelAspectRatio")) or (1.0, 1.0),
    )


def pixel_size(ds: Any) -> PixelSize | None:
    """How large a pixel is, and where (PS3.3 10.7.1.2, 10.7.1.3).

    Pixel Spacing is calibrated to the patient where its calibration type says so, or where it differs from
    Imager Pixel Spacing; else it repeats the size at the detector, which is divided by the Estimated
    Radiographic Magnification Factor where the image states one.
    """
    spacing, imager = (_pair(ds.get(name)) for name in ("PixelSpacing", "ImagerPixelSpacing"))
    kind = _text(ds, "PixelSpacingCalibrationType")
    differs = spacing and imager and any(abs(a - b) > 1e-3 * b for a, b in zip(spacing, imager, strict=True))
    if spacing and (kind or differs):
        known = {"GEOMETRY": "corrected for geometric magnification", "FIDUCIAL": "measured on an object of known size"}
        return PixelSize(spacing, f"Pixel Spacing, {known.get(kind, 'calibrated, it is not said how')}", True)
    at_detector = imager or spacing
    if at_detector is None:
        return None
    name = "Imager Pixel Spacing" if imager else "Pixel Spacing, not calibrated"
    factor = _number(ds.get("EstimatedRadiographicMagnificationFactor"))
    if imager and factor and factor >= 1:
        text = f"{name} divided by the estimated magnification of {factor:g}"
        return PixelSize((imager[0] / factor, imager[1] / factor), text, True)
    return PixelSize(at_detector, f"{name}: at the detector, the patient is smaller by an unknown magnification", False)


def refusal(header: ProjectionHeader, contract: ProjectionContract) -> tuple[str, str, str] | None:
    """Code, cause and hint why the model does not take the image; None where it does."""
    h = header
    if h.modality not in contract.modalities:
        return "WRONG_MODALITY", f"the modality is not {' or '.join(contract.modalities)}", ""
    if h.sop_class_uid in FOR_PROCESSING_CLASSES or h.intent == "FOR PROCESSING":
        if "FOR PROCESSING" not in contract.intents:
            return (
                "FOR_PROCESSING",
                "the image is For Processing: raw detector values that are not meant to be looked at",
                "Have the modality send its image For Presentation",
            )
    elif h.intent not in contract.intents:
        return "FOR_PRESENTATION", f"the image is {h.intent.title()}; the model takes For Processing", ""
    if h.sop_class_uid not in contract.sop_classes:
        return "WRONG_SOP_CLASS", "the model does not take images of this SOP class", ""
    if h.rows < 1 or h.columns < 1:
        return "NO_PIXEL_DATA", "the image has no pixel data or no size", ""
    if h.frames != 1:
        return "MULTI_FRAME", "the image has several frames; the model takes single images", ""
    if h.samples != 1 or h.photometric not in ("MONOCHROME1", "MONOCHROME2"):
        return "NOT_GREYSCALE", "the image is not greyscale", ""
    return _by_size(h, contract) or _by_view(h, contract)


def _by_size(h: ProjectionHeader, contract: ProjectionContract) -> tuple[str, str, str] | None:
    if h.rows * h.columns > contract.max_pixels:
        return "TOO_LARGE", f"the image has {h.rows * h.columns} pixels; the limit is {contract.max_pixels}", ""
    if min(h.rows, h.columns) < contract.min_side:
        return "TOO_SMALL", f"the image has {h.rows} x {h.columns} pixels; the model needs {contract.min_side}", ""
    if not contract.needs_spacing:
        return None
    if h.size is None:
        return (
            "NO_SPACING",
            "the image states neither Pixel Spacing nor Imager Pixel Spacing, and the model measures in mm",
            "Have the modality or the reader's software write them",
        )
    low, high = contract.pixel_spacing_mm
    if not all(low <= mm <= high for mm in h.size.mm):
        return "SPACING_OUT_OF_RANGE", f"the pixels are {max(h.size.mm):g} mm; the model takes {low:g} to {high:g}", ""
    return None


def _by_view(h: ProjectionHeader, contract: ProjectionContract) -> tuple[str, str, str] | None:
    if contract.body_parts and h.body_part and h.body_part not in contract.body_parts:
        return "WRONG_BODY_PART", f"the image does not show {' or '.join(contract.body_parts)} by its header", ""
    if contract.views and h.view and h.view not in contract.views:
        return "WRONG_VIEW", f"the view is not {' or '.join(contract.views)}", ""
    return None


def refuse(code: str, cause: str, hint: str = "") -> UnsuitableSeries:
    return UnsuitableSeries("read image", code, cause, hint)


def _field(ds: Any, rows: int, columns: int) -> tuple[int, int, int, int] | None:
    """The edges are the outermost rows and columns that are not covered, counted from 1 (PS3.3 C.8.7.3)."""
    if "RECTANGULAR" not in [str(v) for v in _several(ds.get("CollimatorShape"))]:
        return None
    edges = [_number(ds.get(f"Collimator{name}Edge")) for name in
             ("UpperHorizontal", "LowerHorizontal", "LeftVertical", "RightVertical")]  # fmt: skip
    if any(e is None for e in edges):
        return None
    top, bottom, left, right = (round(e) for e in edges if e is not None)
    top, left, bottom, right = max(top - 1, 0), max(left - 1, 0), min(bottom, rows), min(right, columns)
    return (top, bottom, left, right) if top < bottom and left < right else None


def _coded(ds: Any, keyword: str, known: Mapping[str, str]) -> str:
    return next((known[v] for i in _several(ds.get(keyword)) if (v := str(i.get("CodeValue", ""))) in known), "")


def _text(ds: Any, keyword: str) -> str:
    value = ds.get(keyword)
    return str(value).strip().upper() if value is not None else ""


def _several(value: Any) -> Sequence[Any]:
    if value is None or isinstance(value, str):
        return [] if not value else [value]
    return list(value)


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _pair(value: Any) -> tuple[float, float] | None:
    found = [_number(v) for v in _several(value)]
    if len(found) != 2 or found[0] is None or found[1] is None or min(found[0], found[1]) <= 0:
        return None
    return found[0], found[1]
