"""Enhanced multi-frame images (PS3.3 C.7.6.16): what is said of a frame, as a single-frame image says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHARED, PER_FRAME = "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"

GROUPS: Mapping[str, tuple[str, ...]] = {
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness"),
    "PixelValueTransformationSequence": ("RescaleSlope", "RescaleIntercept", "RescaleType"),
    "FrameVOILUTSequence": ("WindowCenter", "WindowWidth"),
    "CTImageFrameTypeSequence": ("FrameType",),
    "MRImageFrameTypeSequence": ("FrameType",),
}
"""Functional group macro -> its attributes that stand at the top level of a single-frame image."""

_OWN = frozenset({SHARED, PER_FRAME, "NumberOfFrames", "SOPInstanceUID", "SOPClassUID"})


def flat(ds: Any, number: int) -> Any:
    """The attributes of frame ``number`` (from 1) of data set ``ds`` at its top level, without UID and class.

    The frame's own groups override the shared ones. Elements are those of ``ds``, not copies: replace
    them, never change one.
    """
    from pydicom.dataset import Dataset

    own: Sequence[Any] = ds.get(PER_FRAME) or []
    out = Dataset()
    for element in ds:
        if element.keyword not in _OWN:
            out.add(element)
    for group in [*(ds.get(SHARED) or [])[:1], *own[number - 1 : number]]:
        for sequence, keywords in GROUPS.items():
            for item in (group.get(sequence) or [])[:1]:
                for keyword in keywords:
                    if keyword in item:
                        out.add(item[keyword])
    return out
