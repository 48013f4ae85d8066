"""Graphic annotations of a presentation state as bytes (PS3.3 C.10.5). Pure.

Outlines of two lungs in 248 slices make 360 annotations with half a million numbers. As objects
they cost the library and its writer two seconds; their bytes cost a few milliseconds.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dicomnode.encode.contours import Polygon
from dicomnode.encode.frames import element, item, text_element

GRAPHIC_ANNOTATIONS = 0x00700001
MOST_POINTS = 8190
"""Of one polyline: a value of VR FL has at most 65534 bytes in Explicit VR (PS3.5 7.1.2), 8 for each point."""


@dataclass(frozen=True, slots=True)
class Place:
    """The image that an annotation is on; ``frame`` from 1, 0 for a single-frame image."""

    sop_class_uid: str
    sop_instance_uid: str
    frame: int


def annotation(place: Place, layer: str, tracking_id: str, tracking_uid: str, polygons: Sequence[Polygon]) -> bytes:
    """Item of the Graphic Annotation Sequence: a closed polyline for each polygon, in pixels, not filled."""
    image = text_element(0x00081150, b"UI", place.sop_class_uid) + text_element(
        0x00081155, b"UI", place.sop_instance_uid
    )
    if place.frame:
        image += text_element(0x00081160, b"IS", str(place.frame))
    head = text_element(0x00620020, b"UT", tracking_id) + text_element(0x00620021, b"UI", tracking_uid) + _IN_PIXELS
    objects = [
        item(
            head
            + element(0x00700021, b"US", struct.pack("<H", len(polygon)))
            + element(0x00700022, b"FL", np.ascontiguousarray(polygon, "<f4").tobytes())
            + _POLYLINE
        )
        for polygon in map(shortened, polygons)
    ]
    return item(
        element(0x00081140, b"SQ", item(image))
        + text_element(0x00700002, b"CS", layer)
        + element(0x00700009, b"SQ", b"".join(objects))
    )


def shortened(polygon: Polygon) -> Polygon:
    """Every second, third ... point, as many as fit one element; still closed."""
    step = -(-len(polygon) // MOST_POINTS)
    return polygon if step == 1 else np.concatenate([polygon[:-1:step], polygon[-1:]])


_IN_PIXELS = text_element(0x00700005, b"CS", "PIXEL") + element(0x00700020, b"US", struct.pack("<H", 2))
_POLYLINE = text_element(0x00700023, b"CS", "POLYLINE") + text_element(0x00700024, b"CS", "N")
