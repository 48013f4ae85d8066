"""From the stored values of a single image to grey values that grow from black to white. Pure.

The order of PS3.3 C.11 and PS3.4 N.2: Modality LUT or rescale, then (where asked) VOI LUT or window,
then the polarity of Photometric Interpretation. Presentation LUT Shape INVERSE says the same as
MONOCHROME1, with which it has to come (PS3.3 C.8.11.3.1.1), so it is not applied a second time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from dicomnode.errors import UnsuitableSeries
from dicomnode.infer.decode import Pixels
from dicomnode.infer.projection_header import ProjectionHeader, refuse
from dicomnode.infer.rescale import padding_in

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Grey:
    """``values``: float32 (rows, columns), 0 black to ``white``; ``valid``: False where the image has padding,
    which is black; None without any.
    """

    values: npt.NDArray[np.float32]
    white: float
    valid: npt.NDArray[np.bool_] | None


def grey_of(stored: Pixels, header: ProjectionHeader, values: Literal["modality", "displayed"]) -> Grey:
    """Raises UnsuitableSeries (BAD_GREYSCALE) where the image's own tables cannot be applied."""
    outside = padding_in(stored, header.padding)
    try:
        found, low, high = _modality(stored, header.grey)
        if values == "displayed":
            found, low, high = _displayed(found, header.grey, low, high)
    except UnsuitableSeries:
        raise
    except Exception as cause:
        raise refuse(
            "BAD_GREYSCALE", f"a look-up table or window of the image cannot be applied ({type(cause).__name__})"
        ) from cause
    grey = np.clip(found, low, high).astype(np.float32)
    grey = np.float32(high) - grey if header.photometric == "MONOCHROME1" else grey - np.float32(low)
    white = high - low
    if values == "displayed":
        grey, white = grey / np.float32(white), 1.0
    if outside is not None:
        grey[outside] = 0.0
    return Grey(np.ascontiguousarray(grey), white, None if outside is None else ~outside)


def _modality(stored: Pixels, ds: Any) -> tuple[Array, float, float]:
    """Values after the Modality LUT, and the least and greatest that the image can express."""
    bits = int(ds.get("BitsStored") or 16)
    if not 1 <= bits <= 32:
        raise refuse("BAD_GREYSCALE", f"the image states {bits} bits stored")
    signed = int(ds.get("PixelRepresentation") or 0) == 1
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    if not signed and stored.dtype.kind == "u" and int(stored.max(initial=0)) > high:
        stored = stored & np.array(high, stored.dtype)  # overlays in the bits above (PS3.5 8.1.2, retired)
    if ds.get("ModalityLUTSequence"):
        depth = int(ds.ModalityLUTSequence[0].LUTDescriptor[2])
        return _by_lut(stored, ds, depth), 0.0, float((1 << depth) - 1)
    slope = 1.0 if ds.get("RescaleSlope") is None else float(ds.RescaleSlope)
    intercept = 0.0 if ds.get("RescaleIntercept") is None else float(ds.RescaleIntercept)
    if slope == 0:
        raise refuse("BAD_GREYSCALE", "the rescale slope of the image is 0")
    ends = (low * slope + intercept, high * slope + intercept)
    found = stored if (slope, intercept) == (1.0, 0.0) else stored.astype(np.float64) * slope + intercept
    return found, min(ends), max(ends)


def _by_lut(stored: Pixels, ds: Any, depth: int) -> Array:
    """``depth``: bits of an entry, 8 or 16 (PS3.3 C.11.1.1); what lies between is taken as some senders write it."""
    from pydicom.pixels.processing import apply_modality_lut

    table = ds.ModalityLUTSequence[0]
    entries, first, _ = table.LUTDescriptor
    if 8 < depth < 16:
        table.LUTDescriptor = [entries, first, 16]
    try:
        return np.asarray(apply_modality_lut(stored, ds))
    finally:
        table.LUTDescriptor = [entries, first, depth]


def _displayed(values: Array, ds: Any, low: float, high: float) -> tuple[Array, float, float]:
    """The first VOI LUT, or else the first window; its output is scaled to what the image can express."""
    from pydicom.pixels.processing import apply_voi, apply_windowing

    if ds.get("VOILUTSequence"):
        depth = int(ds.VOILUTSequence[0].LUTDescriptor[2])
        return apply_voi(np.rint(values).astype(np.int64), ds), 0.0, float((1 << depth) - 1)
    if ds.get("WindowCenter") is None or ds.get("WindowWidth") is None:
        return values, low, high
    return apply_windowing(values, ds), low, high
