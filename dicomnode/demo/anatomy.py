"""The body of the thorax phantom: analytic shapes in millimetres, painted slice by slice.

Coordinates as in ``phantom``: LPS, origin in the middle of the volume. Every shape gives a
signed distance (mm, negative inside); surfaces are anti-aliased over one ramp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Point = tuple[float, float, float]

RIGHT_LUNG = 1
LEFT_LUNG = 2
EMPHYSEMA_HU = -950

_LEVEL_MM = 25.0  # one vertebra with its disc, and one rib
_TOP_LEVEL_Z = 142.0  # level of the first thoracic vertebra


class _Tube(NamedTuple):
    """A polyline of (x, y, z, radius) in mm, filled with one HU."""

    nodes: tuple[tuple[float, float, float, float], ...]
    hu: float


class Ellipsoid(NamedTuple):
    """Centre and semi-axes in mm; ``angle`` turns it about z (degrees, +x towards +y)."""

    centre: Point
    radii: Point
    angle: float
    hu: float


class Segment(NamedTuple):
    """A cone with round ends."""

    start: Point
    end: Point
    r0: float
    r1: float
    hu: float


_HEART = (  # in painting order: pericardial fat, muscle, then the chambers with contrast
    Ellipsoid((17, -27, -42), (64, 48, 52), 25, -70),
    Ellipsoid((17, -27, -42), (60, 44, 48), 25, 95),
    Ellipsoid((42, -24, -50), (27, 21, 33), 32, 265),
    Ellipsoid((10, -47, -48), (34, 17, 32), 20, 215),
    Ellipsoid((-24, -24, -42), (19, 24, 28), 0, 230),
    Ellipsoid((6, 4, -20), (30, 15, 20), 0, 270),
)
_GREAT_VESSELS = (
    _Tube(((24, 46, 52, 12), (25, 49, 0, 12), (21, 46, -80, 11.5), (8, 42, -170, 11)), 290),
    _Tube(((8, -20, -22, 13), (-10, -30, 8, 15), (-12, -28, 42, 15), (-5, -17, 62, 14)), 290),
    _Tube(((-5, -17, 62, 14), (10, 8, 72, 13), (22, 34, 64, 12.5), (24, 46, 50, 12)), 290),
    _Tube(((-7, -16, 70, 6), (-18, -8, 110, 6), (-22, -4, 165, 5)), 290),
    _Tube(((6, -2, 76, 4.5), (14, 2, 115, 4), (20, 2, 165, 4)), 290),
    _Tube(((18, 18, 74, 5), (24, 20, 110, 5), (40, 14, 145, 5)), 290),
    _Tube(((-28, -20, -30, 10), (-29, -20, 30, 9.5), (-27, -24, 88, 8.5), (-32, -22, 125, 8)), 330),
    _Tube(((-27, -26, 86, 8), (4, -36, 92, 7), (30, -26, 112, 7), (36, -18, 165, 6)), 250),
    _Tube(((14, -46, -22, 14), (17, -36, 10, 14), (19, -22, 22, 12)), 320),
    _Tube(((19, -22, 22, 11), (32, 2, 26, 10), (44, 16, 18, 8)), 320),
    _Tube(((18, -18, 18, 11), (-10, -4, 12, 10), (-42, 8, 6, 8.5)), 320),
    _Tube(((26, 6, -14, 7), (44, 14, -16, 6)), 260),
    _Tube(((-16, 6, -16, 7), (-42, 10, -18, 6)), 260),
    _Tube(((-22, -8, -66, 11), (-20, 6, -110, 12), (-18, 14, -170, 12)), 130),
    _Tube(((-9, 40, -170, 4), (-9, 41, 40, 4), (-24, 2, 46, 4)), 180),
    _Tube(((3, 27, 165, 7), (6, 33, 40, 7.5), (10, 30, -60, 8), (28, 0, -112, 9)), 38),
)
_TRACHEA = (
    _Tube(((0, 2, 170, 9), (-1, 10, 80, 9), (-1, 16, 34, 9)), -1000),
    _Tube(((-1, 16, 34, 8), (-20, 18, 14, 7.5), (-36, 20, -2, 6)), -1000),
    _Tube(((-1, 16, 34, 8), (18, 20, 12, 6.5), (38, 24, -4, 5.5)), -1000),
)
_HILA = (Ellipsoid((-42, 14, 0), (11, 14, 20), 0, 45), Ellipsoid((44, 16, 3), (10, 13, 18), 0, 45))
_HILUM_ROOTS: dict[int, Point] = {RIGHT_LUNG: (-46, 12, 0), LEFT_LUNG: (48, 15, 2)}
_BONES = (
    _Tube(((-22, -72, 104, 7), (-70, -56, 132, 6), (-130, -8, 148, 6)), 480),
    _Tube(((22, -72, 104, 7), (70, -56, 132, 6), (130, -8, 148, 6)), 480),
)
_SCAPULAE = (
    Ellipsoid((-95, 72, 72), (36, 4.0, 58), 36, 420),
    Ellipsoid((95, 72, 72), (36, 4.0, 58), -36, 420),
)
_LIVER = (
    Ellipsoid((-45, -6, -150), (100, 90, 92), 0, 112),
    Ellipsoid((-4, -34, -126), (52, 36, 26), 0, 112),
)
_SPLEEN = Ellipsoid((82, 40, -126), (30, 40, 46), 20, 125)
_STOMACH = Ellipsoid((54, -20, -110), (38, 42, 38), 0, 30)
_GAS_LEVEL_Y = -30.0  # supine: gas lies in front, the fluid level is horizontal


class Plane:
    """A rectangle of an axial plane, and what does not change from slice to slice.

    ``x`` float32 (1, columns) and ``y`` float32 (rows, 1): voxel centres in mm.
    """

    def __init__(self, x: F32, y: F32, pixel: float) -> None:
        self.x, self.y, self.pixel = x, y, pixel
        self.edge = max(1.2, pixel)  # width of the partial-volume ramp at a surface, mm
        right = -60 - 44 * ((x + 56) / 64) ** 2 - 42 * ((y + 14) / 80) ** 2
        left = -70 - 44 * ((x - 56) / 64) ** 2 - 42 * ((y + 14) / 80) ** 2
        self.dome: F32 = np.maximum(np.maximum(right, left), -147)  # height of the diaphragm, mm
        self.front: F32 = 0.5 - 0.5 * (y - 2) / np.sqrt(x * x + (y - 2) ** 2 + 1)  # 0 back, 1 front
        half = np.interp(y, [-95, -60, -30, 0, 30, 55, 80, 100], [8, 12, 26, 28, 24, 21, 30, 40])
        self.midline: F32 = np.abs(x) - half.astype(np.float32)

    @classmethod
    def whole(cls, rows: int, columns: int, pixel: float) -> Plane:
        """The plane of a matrix around the origin."""
        x = (np.arange(columns) - (columns - 1) / 2) * pixel
        y = (np.arange(rows) - (rows - 1) / 2) * pixel
        return cls(x.astype(np.float32)[None, :], y.astype(np.float32)[:, None], pixel)

    def crop(self, box: tuple[slice, slice]) -> Plane:
        """The part of the plane in a box of (rows, columns)."""
        return Plane(self.x[:, box[1]], self.y[box[0]], self.pixel)

    def cover(self, distance: F32, shift: float = 0.5) -> F32:
        """Share of each voxel that is inside a surface, from the signed distance in mm."""
        share: F32 = np.clip(shift - distance * (1 / self.edge), 0, 1)
        return share

    def box(self, x0: float, x1: float, y0: float, y1: float) -> tuple[slice, slice]:
        """Index ranges (rows, columns) that hold the rectangle given in mm; may be empty."""
        left, top = float(self.x[0, 0]), float(self.y[0, 0])
        row0, row1 = int((y0 - top) / self.pixel), int((y1 - top) / self.pixel) + 2
        col0, col1 = int((x0 - left) / self.pixel), int((x1 - left) / self.pixel) + 2
        return slice(max(row0, 0), max(row1, 0)), slice(max(col0, 0), max(col1, 0))


def couch(plane: Plane) -> F32:
    """HU (rows, columns) of air with a curved carbon-fibre couch: two thin skins around foam."""
    top = plane.y - (115 - plane.x**2 / 800)
    bottom = plane.y - (140 - plane.x**2 / 1300)
    body = np.maximum(np.maximum(-top, bottom), np.abs(plane.x) - 168)
    image = np.full(body.shape, -1000, np.float32)
    whole = slice(None), slice(None)
    _blend(image, whole, plane.cover(body), -150)
    _blend(image, whole, plane.cover(body + 2.2), -925)
    return image


def _blend(image: F32, box: tuple[slice, slice], cover: F32, hu: float | F32) -> None:
    """Mix ``hu`` into the box of the image by the share that it covers."""
    part = image[box]
    part += cover * (hu - part)


def _squircle(plane: Plane, cy: float, a: float, b: float, square: float) -> F32:
    """About the signed distance (mm) to a rounded rectangle around (0, cy), semi-axes a and b."""
    u, v = plane.x / a, (plane.y - cy) / b
    u2, v2 = u * u, v * v
    cut_u, cut_v = square * np.minimum(u2, 1), square * np.minimum(v2, 1)
    value = u2 + v2 - cut_u * np.minimum(v2, 1) - 1
    gx, gy = (2 / a) * u * (1 - cut_v), (2 / b) * v * (1 - cut_u)
    return (value / np.sqrt(gx * gx + gy * gy + 1e-6)).astype(np.float32, copy=False)


def _ellipsoid(plane: Plane, body: Ellipsoid, z: float, margin: float) -> tuple[tuple[slice, slice], F32] | None:
    """Box and signed distance (mm) where the plane comes within ``margin`` of the ellipsoid."""
    (cx, cy, cz), (a, b, c) = body.centre, body.radii
    if abs(z - cz) > c + margin:
        return None
    cos, sin = float(np.cos(np.radians(body.angle))), float(np.sin(np.radians(body.angle)))
    reach_x, reach_y = float(np.hypot(a * cos, b * sin)), float(np.hypot(a * sin, b * cos))
    box = plane.box(cx - reach_x - margin, cx + reach_x + margin, cy - reach_y - margin, cy + reach_y + margin)
    dx, dy = plane.x[:, box[1]] - cx, plane.y[box[0]] - cy
    u, v, w = (cos * dx + sin * dy) / a, (cos * dy - sin * dx) / b, (z - cz) / c
    square = u * u + v * v + w * w
    f = np.sqrt(square + 1e-6)
    slope = np.sqrt((u / a) ** 2 + (v / b) ** 2 + (w / c) ** 2 + 1e-9)
    return box, ((f - 1) * f / slope).astype(np.float32, copy=False)


def reaches(cone: Segment, z: float, margin: float) -> bool:
    reach = max(cone.r0, cone.r1) + margin
    return min(cone.start[2], cone.end[2]) - reach <= z <= max(cone.start[2], cone.end[2]) + reach


def cone_distance(plane: Plane, cone: Segment, z: float, margin: float) -> tuple[tuple[slice, slice], F32] | None:
    """Box and signed distance (mm) where the plane comes within ``margin`` of the cone."""
    if not reaches(cone, z, margin):
        return None
    (x0, y0, z0), (x1, y1, z1) = cone.start, cone.end
    reach = max(cone.r0, cone.r1) + margin
    box = plane.box(min(x0, x1) - reach, max(x0, x1) + reach, min(y0, y1) - reach, max(y0, y1) + reach)
    dx, dy, dz = plane.x[:, box[1]] - x0, plane.y[box[0]] - y0, z - z0
    lx, ly, lz = x1 - x0, y1 - y0, z1 - z0
    t = np.clip((dx * lx + (dy * ly + dz * lz)) * (1 / (lx * lx + ly * ly + lz * lz + 1e-6)), 0, 1)
    ex, ey, ez = dx - t * lx, dy - t * ly, dz - t * lz
    distance = np.sqrt(ex * ex + ey * ey + ez * ez) - (cone.r0 + t * (cone.r1 - cone.r0))
    return box, distance.astype(np.float32, copy=False)


def _segments(tubes: Sequence[_Tube]) -> list[Segment]:
    return [
        Segment(p[:3], q[:3], p[3], q[3], tube.hu)
        for tube in tubes
        for p, q in zip(tube.nodes, tube.nodes[1:], strict=False)
    ]


_VESSEL_SEGMENTS = _segments(_GREAT_VESSELS)
AIRWAY_SEGMENTS = _segments(_TRACHEA)
_BONE_SEGMENTS = _segments(_BONES)


def _smooth(z: float, low: float, high: float) -> float:
    t = min(max((z - low) / (high - low), 0.0), 1.0)
    return t * t * (3 - 2 * t)


def _both(first: F32, second: F32, radius: float) -> F32:
    """Signed distance of the intersection, with the edge rounded by about ``radius`` mm."""
    h = np.maximum(radius - np.abs(first - second), 0)
    out: F32 = np.maximum(first, second) + h * h * (0.25 / radius)
    return out


def _narrowing(z: float, smallest: float) -> float:
    """Width of the chest at a height, as a share of the full width: a dome over the apices."""
    t = min(max((z - 10) / 126, 0.0), 1.0)
    return float(max((1 - t**2.4) ** 0.5, smallest))


def _cavity(plane: Plane, z: float, smallest: float) -> F32:
    """Signed distance (mm) to the inner chest wall; ``smallest`` bounds how far it narrows."""
    s = _narrowing(z, smallest)
    return _squircle(plane, -4 + 16 * (1 - s), 121 * s, 81 * s**0.9, 0.28)


def lung_surface(plane: Plane, z: float) -> F32:
    """Signed distance (mm, negative inside) to the pleural surface of both lungs."""
    mediastinum = plane.midline - 8 * _smooth(z, 80, 130)
    for ellipsoid in (_HEART[0], *_HILA):
        if found := _ellipsoid(plane, ellipsoid, z, 16):
            part = mediastinum[found[0]]
            np.minimum(part, found[1] - 1.5, out=part)
    for cone in (*_VESSEL_SEGMENTS, *AIRWAY_SEGMENTS):
        if found := cone_distance(plane, cone, z, 16):
            part = mediastinum[found[0]]
            np.minimum(part, found[1] - (5 if cone.hu < 0 else 3), out=part)
    inside = _both(_cavity(plane, z, 0.02), -mediastinum, 9)
    return _both(inside, (plane.dome - z) * 0.75, 7)


def _spine_y(z: float) -> float:
    return 58 - 5 * (z / 150) ** 2


def _paint_spine(image: F32, plane: Plane, z: float) -> None:
    """Vertebral body or disc, pedicles, arch, canal, transverse and spinous process."""
    y = _spine_y(z)
    phase = (z - _TOP_LEVEL_Z) % _LEVEL_MM - _LEVEL_MM / 2  # 0 in the middle of a disc
    level_z = z - phase + _LEVEL_MM / 2 * (1 if phase > 0 else -1)
    arch = abs(phase) > 5.5
    if arch:
        for side in (-1, 1):
            rod = Segment((side * 10, y + 12, z), (side * 14, y + 24, z), 5, 5, 420)
            wing = Segment((side * 14, y + 24, level_z), (side * 33, y + 33, level_z + 3), 5, 4, 380)
            lamina = Segment((side * 14, y + 25, z), (0, y + 37, z), 3.5, 3.5, 450)
            for cone in (rod, wing, lamina):
                if found := cone_distance(plane, cone, z, 2):
                    _blend(image, found[0], plane.cover(found[1]), cone.hu)
    spine = Segment((0, y + 36, level_z), (0, y + 50, level_z - 18), 4, 3.5, 380)
    if found := cone_distance(plane, spine, z, 2):
        _blend(image, found[0], plane.cover(found[1]), spine.hu)
    waist = 1.5 * _smooth(abs(phase), 5, 12)
    body = Ellipsoid((0, y, z), (18.5 - waist, 15 - waist, 1), 0, 0)
    if found := _ellipsoid(plane, body, z, 2):
        box, distance = found
        if abs(phase) < 2.6:
            _blend(image, box, plane.cover(distance), 85)
        else:
            _blend(image, box, plane.cover(distance), 520)
            _blend(image, box, plane.cover(distance + 1.6), 430 if abs(phase) < 4.2 else 190)
    canal = Ellipsoid((0, y + 22.5, z), (10, 8.5, 1), 0, 0)
    if found := _ellipsoid(plane, canal, z, 2):
        _blend(image, found[0], plane.cover(found[1]), 8)
        _blend(image, found[0], plane.cover(found[1] + 3), 38)


def _paint_ribs(image: F32, plane: Plane, z: float, wall: F32) -> None:
    """Twelve tilted rings in the chest wall: bone at the back and side, cartilage in front."""
    height = z + 78 * plane.front - _TOP_LEVEL_Z  # each rib falls by 78 mm on its way to the front
    index = np.rint(height * (-1 / _LEVEL_MM))
    off = height + index * _LEVEL_MM
    end = np.where(index < 7, 1.0, np.maximum(0.97 - 0.13 * (index - 6), 0.3))
    distance = (np.sqrt((wall - 6.4) ** 2 + (off * 0.62) ** 2) - 4.1).astype(np.float32)
    distance[(index < 0) | (index > 11) | (plane.front > end)] = 50
    cartilage = np.clip((plane.front - 0.80) * 40, 0, 1)
    whole = slice(None), slice(None)
    _blend(image, whole, plane.cover(distance), 720 - 600 * cartilage)
    _blend(image, whole, plane.cover(distance + 1.5), 260 - 150 * cartilage)


def _paint_wall(image: F32, plane: Plane, z: float, wall: F32) -> None:
    """Skin, fat, muscle with its fat planes, chest wall with ribs, sternum, shoulder girdle."""
    narrow = _smooth(z, 50, 165)
    a, b = 160 - 12 * narrow, 112 - 14 * narrow
    cy = 112 - b
    whole = slice(None), slice(None)
    skin = _squircle(plane, cy, a, b, 0.22)
    _blend(image, whole, plane.cover(skin), 15)
    _blend(image, whole, plane.cover(skin + 2.2), -105)
    fat = 14 - 5 * _smooth(z, -60, 60)
    muscle = _squircle(plane, cy + 1, a - fat, b - 0.75 * fat, 0.24)
    _blend(image, whole, plane.cover(muscle), 56)
    for depth, width in ((10 + 9 * plane.front, 1.5), (21 - 8 * plane.front, 1.1)):  # under the big muscles
        _blend(image, whole, plane.cover(np.maximum(np.abs(wall - depth) - width, muscle + 5)), -80)
    for blade in _SCAPULAE:
        if found := _ellipsoid(plane, blade, z, 2):
            _blend(image, found[0], plane.cover(found[1]), 600)
            _blend(image, found[0], plane.cover(found[1] + 1.4), 220)
    _blend(image, whole, plane.cover(wall), -92)
    _paint_ribs(image, plane, z, wall)
    for cone in _BONE_SEGMENTS:
        if found := cone_distance(plane, cone, z, 2):
            _blend(image, found[0], plane.cover(found[1]), 650)
            _blend(image, found[0], plane.cover(found[1] + 1.8), 230)
    if -70 < z < 112:
        half = 9 + 9 * _smooth(z, 55, 90) + 5 * _smooth(-z, -20, 30) * _smooth(z, -70, -40)
        share = _narrowing(z, 0.1)
        front = -4 + 16 * (1 - share) - 81 * share**0.9 - 6.5
        bone = Ellipsoid((0, front, z), (half + 5, 5.5, 1), 0, 0)
        if found := _ellipsoid(plane, bone, z, 2):
            _blend(image, found[0], plane.cover(found[1]), 420)
            _blend(image, found[0], plane.cover(found[1] + 1.5), 140)


def _paint_abdomen(image: F32, plane: Plane, z: float, wall: F32) -> None:
    """Diaphragm and what lies below it: liver, spleen, stomach with an air-fluid level."""
    below = np.maximum(wall + 0.5, (z - plane.dome) * 0.75)
    if float(below.min()) > plane.edge:
        return
    _blend(image, (slice(None), slice(None)), plane.cover(below), 58)
    interior = plane.cover(below + 3.5)
    _blend(image, (slice(None), slice(None)), interior, -100)
    for organ in (_SPLEEN, _STOMACH, *_LIVER):
        if found := _ellipsoid(plane, organ, z, 2):
            box, distance = found
            _blend(image, box, plane.cover(distance) * interior[box], 70 if organ is _STOMACH else organ.hu)
            if organ is _STOMACH:
                content = np.where(plane.y[box[0]] < _GAS_LEVEL_Y, np.float32(-985), np.float32(organ.hu))
                _blend(image, box, plane.cover(distance + 4) * plane.cover(below[box] + 9), content)


def _paint_mediastinum(image: F32, plane: Plane, z: float) -> None:
    for ellipsoid in (*_HILA, *_HEART):
        if found := _ellipsoid(plane, ellipsoid, z, 2):
            _blend(image, found[0], plane.cover(found[1]), ellipsoid.hu)
    vessels = [found for cone in _VESSEL_SEGMENTS if (found := cone_distance(plane, cone, z, 3))]
    blood = [cone.hu for cone in _VESSEL_SEGMENTS if reaches(cone, z, 3)]
    airways = [found for cone in AIRWAY_SEGMENTS if (found := cone_distance(plane, cone, z, 4))]
    for box, distance in vessels:  # all walls before all lumina, so that forks are open
        _blend(image, box, plane.cover(distance - 1), 45)
    for (box, distance), hu in zip(vessels, blood, strict=True):
        _blend(image, box, plane.cover(distance), hu)
    for box, distance in airways:
        _blend(image, box, plane.cover(distance - 2), 45)
    for box, distance in airways:
        _blend(image, box, plane.cover(distance), -1000)


class LungDetail(NamedTuple):
    """Vessels and emphysema of both lungs."""

    vessels: list[Segment]
    emphysema: list[Ellipsoid]


def _vessel_tree(root: Point, targets: npt.NDArray[np.float64], leaf: float, hu: float) -> list[Segment]:
    """A tree from the root to all targets: short ways, radii by Murray's law (r^2.7 adds up)."""
    order = np.argsort(np.linalg.norm(targets - root, axis=1))
    nodes = np.vstack([np.asarray(root, float)[None], targets[order]])
    way = np.zeros(len(nodes))
    parent = np.zeros(len(nodes), int)
    for i in range(1, len(nodes)):
        step = np.sqrt(((nodes[:i] - nodes[i]) ** 2) @ np.ones(3))
        parent[i] = int(np.argmin(step + 0.45 * way[:i]))
        way[i] = way[parent[i]] + step[parent[i]]
    load = np.ones(len(nodes))
    for i in range(len(nodes) - 1, 0, -1):
        load[parent[i]] += load[i]
    radius = np.minimum(leaf * load ** (1 / 2.7), 5.0)
    points = [(float(p[0]), float(p[1]), float(p[2])) for p in nodes]
    return [
        Segment(
            points[parent[i]],
            points[i],
            min(float(radius[parent[i]]), 1.35 * float(radius[i])),
            float(radius[i]),
            hu,
        )
        for i in range(1, len(nodes))
    ]


def lung_detail(seed: int) -> LungDetail:
    """Random but repeatable: two vessel trees and emphysema (upper zones) for each lung."""
    rng = np.random.default_rng([seed, 1])
    step = 5.0
    plane = Plane.whole(64, 72, step)
    heights = np.arange(-155, 140, step)
    depth = -np.stack([lung_surface(plane, float(z)) for z in heights])
    vessels: list[Segment] = []
    emphysema: list[Ellipsoid] = []
    for label, side in ((RIGHT_LUNG, plane.x[0] < 0), (LEFT_LUNG, plane.x[0] > 0)):
        inside = np.argwhere((depth > 4) & side)
        where = np.stack([plane.x[0][inside[:, 2]], plane.y[inside[:, 1], 0], heights[inside[:, 0]]], axis=1)
        room = depth[tuple(inside.T)]
        for count, leaf, hu in ((520, 0.62, 150.0), (380, 0.58, 120.0)):
            picked = rng.choice(len(where), min(count, len(where)), replace=False)
            targets = where[picked] + rng.uniform(-step / 2, step / 2, (len(picked), 3))
            vessels += _vessel_tree(_HILUM_ROOTS[label], targets, leaf, hu)
        sizes = [*rng.uniform(11, 16, 4), *rng.uniform(3.5, 7.5, 45 if label == RIGHT_LUNG else 28)]
        free = room - 3  # mm from each place to the pleura or to the nearest spot placed so far
        for size in sizes:
            weight = ((free > size) & (where[:, 2] > -20)) * np.exp(where[:, 2] / 45)
            if not weight.any():
                continue
            centre = where[rng.choice(len(where), p=weight / weight.sum())]
            free = np.minimum(free, np.sqrt(((where - centre) ** 2) @ np.ones(3)) - size - 2)
            a, b, c = (float(size * f) for f in rng.uniform(0.8, 1.0, 3))
            spot = (float(centre[0]), float(centre[1]), float(centre[2]))
            emphysema.append(Ellipsoid(spot, (a, b, c), float(rng.uniform(0, 90)), -985))
    return LungDetail(vessels, emphysema)


def _paint_lung(image: F32, plane: Plane, z: float, pleura: F32, detail: LungDetail) -> None:
    """Parenchyma (denser towards the back), fissures, vessels, emphysema."""
    cover = plane.cover(pleura)
    fissure = 0.72 * (z - 10) + 0.69 * (plane.y - 5) + 0.0006 * plane.x**2
    line = np.maximum(1 - np.abs(fissure) * (1 / plane.edge), 0)
    tissue = (-862 + 0.2 * plane.y) + 70 * line
    lung = np.broadcast_to(tissue, image.shape).astype(np.float32)
    for cone in detail.vessels:
        if found := cone_distance(plane, cone, z, plane.edge):
            _blend(lung, found[0], plane.cover(found[1]), cone.hu)
    # The ramp is shifted so that -950 HU is crossed at the surface of the ellipsoid.
    shift = (EMPHYSEMA_HU + 860) / (-985 + 860)
    for spot in detail.emphysema:
        if found := _ellipsoid(plane, spot, z, plane.edge):
            _blend(lung, found[0], plane.cover(found[1], shift), spot.hu)
    image += cover * (lung - image)


def paint_body(image: F32, plane: Plane, z: float, pleura: F32, detail: LungDetail) -> None:
    """The patient without noise over what lies behind, from the skin inwards."""
    wall = _cavity(plane, z, 0.42)
    _paint_wall(image, plane, z, wall)
    _paint_abdomen(image, plane, z, wall)
    _paint_lung(image, plane, z, pleura, detail)
    _paint_spine(image, plane, z)
    _paint_mediastinum(image, plane, z)
