"""From stored values to grey in one presentation state for many images. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dicomnode.encode.picture import Display
from dicomnode.errors import UnsuitableSeries

Window = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Transformation:
    """``rescale``: slope and intercept, None for none. ``windows``: each different one, in the units after
    ``rescale``. ``of_image``: the index of each image's window, None where it has none.
    """

    rescale: tuple[float, float] | None
    windows: tuple[Window, ...]
    of_image: tuple[int | None, ...]


def transformation_of(displays: Sequence[Display]) -> Transformation:
    """The Modality LUT and the windows that show each image as it shows itself.

    A presentation state has one Modality LUT for all its images (PS3.3 A.33.1); where theirs differ,
    as in MR and PET, it has none and each image's window is brought back to its stored values. A linear window is
    a line through (centre - 0.5, width - 1) (PS3.3 C.11.2.1.2.1), so that is exact. Raises
    UnsuitableSeries (MIXED_RESCALE) where one of different slopes is not positive.
    """
    rescales = dict.fromkeys((d.slope, d.intercept) for d in displays)
    common = next(iter(rescales)) if len(rescales) == 1 else None
    windows: dict[Window, int] = {}
    of_image: list[int | None] = []
    for display in displays:
        window = display.window
        if common is None and window is not None:
            if display.slope <= 0:
                raise UnsuitableSeries(
                    "encode GSPS", "MIXED_RESCALE", "the images differ in rescale, and not all slopes are positive"
                )
            centre = (window[0] - 0.5 - display.intercept) / display.slope + 0.5
            window = (round(centre, 6), round((window[1] - 1) / display.slope + 1, 6))
        of_image.append(None if window is None else windows.setdefault(window, len(windows)))
    return Transformation(common, tuple(windows), tuple(of_image))
