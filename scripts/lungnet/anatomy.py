"""The demo's thorax sampled on the network's grid, as fields that can be bent and painted anew.

Grid (slices, rows, columns) of 3.0 x 2.5 x 2.5 mm, indices growing to the head, back and left
(``SPL``); coordinates in mm as in ``dicomnode.demo.anatomy``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from dicomnode.demo import anatomy as demo

F32 = npt.NDArray[np.float32]

SPACING = (3.0, 2.5, 2.5)
SHAPE = (136, 104, 144)
CENTRE_Z = -18.0
"""Height of the middle slice: the grid reaches from the upper abdomen to the neck."""


class Fields(NamedTuple):
    """One body before its variations, each float32 of ``SHAPE``.

    ``tissue``: HU of the body without lungs, air outside. ``pleura``: signed distance to the
    lungs in mm, negative inside. ``vessels``: share of vessel in the lungs' texture.
    ``airways``: share of trachea and main bronchi, walls included. ``skin``: 1 inside the body.
    """

    tissue: F32
    pleura: F32
    vessels: F32
    airways: F32
    skin: F32


def axes() -> tuple[F32, F32, F32]:
    """Millimetres along slices, rows and columns, shaped to broadcast."""
    z, y, x = (((np.arange(n) - (n - 1) / 2) * mm).astype(np.float32) for n, mm in zip(SHAPE, SPACING, strict=True))
    return (z + np.float32(CENTRE_Z))[:, None, None], y[None, :, None], x[None, None, :]


def fields(seed: int) -> Fields:
    """Sample the body; ``seed`` draws its vessel tree."""
    detail = demo.lung_detail(seed)
    plane = demo.Plane(*(np.ascontiguousarray(a) for a in (axes()[2][0], axes()[1][0])), SPACING[1])
    out = Fields(*(np.zeros(SHAPE, np.float32) for _ in Fields._fields))
    nowhere = np.full(SHAPE[1:], 99, np.float32)
    for index, z in enumerate(float(v) for v in axes()[0][:, 0, 0]):
        tissue = np.full(SHAPE[1:], -1000, np.float32)
        demo.paint_body(tissue, plane, z, nowhere, detail)
        out.tissue[index] = tissue
        pleura = demo.lung_surface(plane, z)
        out.pleura[index] = pleura
        out.skin[index] = _skin(plane, z)
        near = [cone for cone in detail.vessels if demo.reaches(cone, z, 2)]
        for cone in near:
            if found := demo.cone_distance(plane, cone, z, 2):
                part = out.vessels[index][found[0]]
                np.maximum(part, plane.cover(found[1]), out=part)
        for cone in demo.AIRWAY_SEGMENTS:
            if found := demo.cone_distance(plane, cone, z, 6):
                part = out.airways[index][found[0]]
                np.maximum(part, plane.cover(found[1] - 2), out=part)
    return out


def _skin(plane: demo.Plane, z: float) -> F32:
    t = min(max((z - 50) / 115, 0.0), 1.0)
    narrow = t * t * (3 - 2 * t)
    a, b = 160 - 12 * narrow, 112 - 14 * narrow
    across, along = (plane.x / a) ** 2, ((plane.y - 112 + b) / b) ** 2
    corner = 0.22 * np.minimum(across, 1) * np.minimum(along, 1)
    return (across + along - corner <= 1).astype(np.float32)
