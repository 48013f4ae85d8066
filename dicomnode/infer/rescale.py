"""From stored values to a volume in the units of the modality, padding left out. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from dicomnode.infer.decode import Pixels
from dicomnode.infer.slice_header import SliceHeader

AIR_HU = -1024
"""What is outside the reconstruction circle in the images of most scanners, and below air in all."""


Memory = Callable[[tuple[int, ...], npt.DTypeLike], npt.NDArray[Any]]
"""An array of a shape and type, of any content."""


def assemble(
    headers: Sequence[SliceHeader], frames: Iterator[Pixels], *, hounsfield: bool, memory: Memory = np.empty
) -> npt.NDArray[Any]:
    """Slices (slices, rows, columns) of ``frames``, which are stored values: x slope + intercept (PS3.3 C.11.1.1.2).

    What a slice declares as padding is outside the reconstruction: air in Hounsfield units, else
    the least value of the slice that is no padding.
    """
    shape = (len(headers), headers[0].rows, headers[0].columns)
    rescale = [(h.slope if h.slope is not None else 1.0, h.intercept or 0.0) for h in headers]
    whole = all(slope.is_integer() and intercept.is_integer() for slope, intercept in rescale)
    out: npt.NDArray[Any] = memory(shape, np.int16 if whole else np.float32)
    for index, frame in enumerate(frames):
        slope, intercept = rescale[index]
        outside = padding_in(frame, headers[index].padding)
        if out.dtype == np.int16 and not _fits(frame, outside, int(slope), int(intercept), out[index]):
            out = out.astype(np.float32)
        if out.dtype != np.int16:
            out[index] = frame.astype(np.float64) * slope + intercept
        if outside is not None:
            np.copyto(out[index], AIR_HU if hounsfield else out[index][~outside].min(), where=outside)
    return out


def padding_in(frame: Pixels, padding: tuple[int, int] | None) -> npt.NDArray[np.bool_] | None:
    """Where ``frame`` is padding; None where nothing is, or everything.

    The attribute's VR may be US where the pixels are signed, and the other way round: the bits count.
    """
    if padding is None:
        return None
    low, high = sorted(_as_stored(value, frame.dtype) for value in padding)
    outside: npt.NDArray[np.bool_] = frame == low if low == high else (frame >= low) & (frame <= high)
    return outside if 0 < np.count_nonzero(outside) < outside.size else None


def _fits(
    frame: Pixels, outside: npt.NDArray[np.bool_] | None, slope: int, intercept: int, out: npt.NDArray[np.int16]
) -> bool:
    """Whether 16 bits are enough, for the picture if not for its padding; then ``out`` has the result."""
    if _rescale_exactly(frame, slope, intercept, out):
        return True
    if outside is None:
        return False
    return _rescale_exactly(np.where(outside, frame[~outside].min(), frame), slope, intercept, out)


def _as_stored(value: int, dtype: np.dtype[Any]) -> int:
    return value - 0x10000 if dtype.kind == "i" and value >> 15 else value


def _rescale_exactly(frame: Pixels, slope: int, intercept: int, out: npt.NDArray[np.int16]) -> bool:
    """Into ``out`` where the result fits it; False leaves it as it is."""
    least, most = int(frame.min()), int(frame.max())
    ends = (least * slope + intercept, most * slope + intercept)
    if min(ends) < -32768 or max(ends) > 32767:
        return False
    if slope == 1 and frame.dtype.itemsize <= 2 and -32768 <= intercept <= 32767:
        # Sixteen bits wrap around, and what fits in the end is right again.
        np.add(frame.astype(np.uint16, copy=False).view(np.int16), np.int16(intercept), out=out)
    else:
        out[...] = frame.astype(np.int64) * slope + intercept
    return True
