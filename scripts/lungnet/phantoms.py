"""Random chests with known lungs for training; no patient was involved.

A body from ``anatomy`` is bent (affine and smooth), its lungs get other borders, and
everything gets other densities: emphysema, ground glass, consolidation, nodules, effusion,
contrast, gas in stomach and bowel, arms, breasts, table, things on the table, the edge of the
field of view. What counts as lung: what lies inside the pleura, with vessels, small airways
and disease; not trachea, main bronchi, hila or effusion.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from scripts.lungnet.anatomy import SHAPE, SPACING, Fields, axes

F32 = npt.NDArray[np.float32]
Rng = np.random.Generator

RIGHT, LEFT = 1, 2


class Chest(NamedTuple):
    """``hu`` int16 and ``labels`` uint8 (0, RIGHT, LEFT), both of ``SHAPE``; without noise."""

    hu: npt.NDArray[np.int16]
    labels: npt.NDArray[np.uint8]


def _uniform(rng: Rng, low: float, high: float) -> float:
    return float(rng.uniform(low, high))


def waves(rng: Rng, knot_mm: float) -> F32:
    """A smooth random field of ``SHAPE`` with about unit variance; knots ``knot_mm`` apart.

    Quadratic B-splines along each axis: three small matrix products.
    """
    bases = [_splines(n, mm, knot_mm, _uniform(rng, 0, 1)) for n, mm in zip(SHAPE, SPACING, strict=True)]
    knots = rng.standard_normal([basis.shape[1] for basis in bases]).astype(np.float32)
    for basis in reversed(bases):  # the last axis is replaced and comes first
        knots = np.tensordot(basis, knots, axes=(1, 2))
    return np.asarray(knots * np.float32(2.4))


def _splines(count: int, mm: float, knot_mm: float, phase: float) -> F32:
    """Weights (count, knots) of quadratic B-splines."""
    at = np.arange(count) * mm / knot_mm + phase
    distance = np.abs(at[:, None] - np.arange(-1, int(at[-1]) + 3)[None])
    near, far = 0.75 - distance**2, 0.5 * (1.5 - np.minimum(distance, 1.5)) ** 2
    return np.where(distance < 0.5, near, far).astype(np.float32)


def _warp(rng: Rng) -> npt.NDArray[np.float32]:
    """Source coordinates in voxels (3, SHAPE): where each voxel of the new body comes from."""
    z, y, x = axes()
    angle, nod, lean = (np.radians(_uniform(rng, -a, a)) for a in (14, 8, 8))
    turn = np.array([[1, 0, 0], [0, np.cos(angle), -np.sin(angle)], [0, np.sin(angle), np.cos(angle)]])
    tilt = np.array([[np.cos(nod), -np.sin(nod), 0], [np.sin(nod), np.cos(nod), 0], [0, 0, 1]])
    side = np.array([[np.cos(lean), 0, -np.sin(lean)], [0, 1, 0], [np.sin(lean), 0, np.cos(lean)]])
    size = _uniform(rng, 0.9, 1.35)
    scale = np.diag([size * _uniform(rng, 0.8, 1.2), size * _uniform(rng, 0.88, 1.15), size * _uniform(rng, 0.9, 1.1)])
    matrix = (turn @ tilt @ side @ scale).astype(np.float32)
    shift = np.array([_uniform(rng, -15, 15), _uniform(rng, -15, 15), _uniform(rng, -12, 12)], np.float32)
    mid = np.array([float(z.mean()), 0, 0], np.float32)
    reach = _uniform(rng, 2, 11)
    source = np.empty((3, *SHAPE), np.float32)
    for i in range(3):
        mm = matrix[i, 0] * (z - mid[0]) + matrix[i, 1] * y + matrix[i, 2] * x + shift[i] + reach * waves(rng, 85)
        source[i] = mm / np.float32(SPACING[i]) + np.float32((SHAPE[i] - 1) / 2)
    return source


def _bent(body: Fields, source: npt.NDArray[np.float32]) -> Fields:
    """All fields at ``source``, trilinear; outside the body's grid the nearest value counts."""
    stacked = np.stack(body, axis=-1).reshape(-1, len(body))  # one gather fetches every field
    out = np.zeros((len(body), *SHAPE), np.float32)
    for plane in range(SHAPE[0]):  # plane by plane: the temporaries stay in the cache
        low, share = [], []
        for i, count in enumerate(SHAPE):
            at = np.clip(source[i, plane].ravel(), 0, count - 1.001)
            low.append(at.astype(np.int32))
            share.append((at - low[-1]).astype(np.float32))
        first = (low[0] * SHAPE[1] + low[1]) * SHAPE[2] + low[2]
        total = np.zeros((first.size, len(body)), np.float32)
        for dz, wz in ((0, 1 - share[0]), (1, share[0])):
            for dy, wy in ((0, 1 - share[1]), (1, share[1])):
                for dx, wx in ((0, 1 - share[2]), (1, share[2])):
                    step = (dz * SHAPE[1] + dy) * SHAPE[2] + dx
                    total += stacked.take(first + step, axis=0) * (wz * wy * wx)[:, None]
        out[:, plane] = total.T.reshape(len(body), *SHAPE[1:])
    return Fields(*out)


def _mix(hu: F32, cover: F32, value: F32 | float) -> None:
    hu += cover * (value - hu)


def _ball(rng: Rng, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> F32:
    """Share of each voxel that is inside an ellipsoid turned about z."""
    z, y, x = axes()
    a = np.radians(_uniform(rng, 0, 180))
    dz, dy, dx = z - centre[0], y - centre[1], x - centre[2]
    u, v = np.cos(a) * dx + np.sin(a) * dy, np.cos(a) * dy - np.sin(a) * dx
    f = np.sqrt((dz / radii[0]) ** 2 + (v / radii[1]) ** 2 + (u / radii[2]) ** 2)
    return np.asarray(np.clip(0.5 - (f - 1) * min(radii) / SPACING[1], 0, 1), np.float32)


def _tissue(rng: Rng, hu: F32) -> F32:
    """Other contrast, other fat, other bone, with slow variation."""
    fat, muscle = _uniform(rng, -125, -75), _uniform(rng, 20, 75)
    bright = _uniform(rng, 0.0, 1.6)
    knots = [-1100, -1000, -400, -100, 50, 130, 330, 800]
    values = [-1100, -1000, -400, fat, muscle, muscle + 80 * bright, muscle + 280 * bright, _uniform(rng, 350, 1100)]
    out = np.interp(hu, knots, values).astype(np.float32)
    out += (hu > -300) * _uniform(rng, 0, 25) * waves(rng, 30)
    return out


def _lung_texture(rng: Rng, vessels: F32, pleura: F32) -> F32:
    """HU of both lungs: density with gravity, vessels, disease."""
    _, y, _ = axes()
    hu = np.full(SHAPE, _uniform(rng, -925, -690), np.float32)
    hu += _uniform(rng, -0.3, 0.9) * y + _uniform(rng, 5, 45) * waves(rng, _uniform(rng, 15, 60))
    _mix(hu, vessels * _uniform(rng, 0.2, 1.0), _uniform(rng, 0, 200))
    if rng.random() < 0.45:  # emphysema and bullae
        _mix(hu, _patches(rng, pleura, _uniform(rng, 12, 45), _uniform(rng, 0.3, 1.6)), _uniform(rng, -1010, -940))
    if rng.random() < 0.6:  # ground glass, often under the pleura
        _mix(hu, _patches(rng, pleura, _uniform(rng, 15, 60), _uniform(rng, 0.3, 1.6)), _uniform(rng, -750, -350))
    if rng.random() < 0.5:  # consolidation
        _mix(hu, _patches(rng, pleura, _uniform(rng, 15, 50), _uniform(rng, 0.9, 2.0)), _uniform(rng, -300, 80))
    if rng.random() < 0.3:  # bands and reticulation
        band = np.abs(waves(rng, _uniform(rng, 10, 25)))
        _mix(hu, np.clip(1 - band / _uniform(rng, 0.03, 0.12), 0, 1) * _uniform(rng, 0.3, 0.9), _uniform(rng, -500, 0))
    return hu


def _patches(rng: Rng, pleura: F32, knot_mm: float, level: float) -> F32:
    """Soft patches of a wave above ``level``, in half of the cases mostly near the pleura."""
    field = waves(rng, knot_mm)
    if rng.random() < 0.5:
        field = field + np.exp(pleura * np.float32(1 / 12)) * 1.2 - 0.6
    if rng.random() < 0.5:  # in the back and below
        z, y, _ = axes()
        field = field + y * 0.012 - (z + 20) * 0.006
    return np.asarray(np.clip((field - level) * _uniform(rng, 2, 8), 0, 1), np.float32) * _uniform(rng, 0.5, 1.0)


def _effusion(rng: Rng, pleura: F32, source_x: F32) -> F32:
    """Share of pleural fluid at the back below, on one side or both; zero in most bodies."""
    if rng.random() > 0.3:
        return np.zeros(SHAPE, np.float32)
    z, y, _ = axes()
    level = y - _uniform(rng, 5, 50) - (z + 60) * _uniform(rng, 0.1, 0.6) + 6 * waves(rng, 60)
    cover = np.clip(level * 0.4 + 0.5, 0, 1)
    which = rng.integers(3)
    if which < 2:
        cover = cover * ((source_x < 0) if which == 0 else (source_x > 0))
    return np.asarray(cover * (pleura < 1), np.float32)


def _gas(rng: Rng, hu: F32, source: npt.NDArray[np.float32], inside: F32) -> None:
    """Gas in stomach and bowel below the diaphragm, and now and then in the oesophagus."""
    z, y, x = (source[i] for i in range(3))
    del y, x
    below = ndimage.binary_erosion(inside > 0.5, iterations=5)
    mm = (z - (SHAPE[0] - 1) / 2) * SPACING[0] - 18.0
    for _ in range(int(rng.integers(0, 9))):
        place = np.argwhere(below & (mm < _uniform(rng, -170, -105)))
        if not len(place):
            return
        at = place[rng.integers(len(place))]
        centre = tuple(float((i - (n - 1) / 2) * s) for i, n, s in zip(at, SHAPE, SPACING, strict=True))
        big = _uniform(rng, 6, 42)
        radii = (big * _uniform(rng, 0.5, 1), big * _uniform(rng, 0.5, 1), big)
        ball = _ball(rng, (centre[0] - 18.0, centre[1], centre[2]), radii)
        _mix(hu, np.clip(ball * 1.3, 0, 1) * (inside > 0.5), 40)
        _mix(hu, np.clip(ball * 3 - 2, 0, 1) * below * (mm < -95), _uniform(rng, -1010, -850))


def _around(rng: Rng, hu: F32, skin: F32) -> None:
    """Arms, breasts, table, blankets, tubes: only where there was air."""
    z, y, x = axes()
    air = np.asarray(skin < 0.5)
    free = air.astype(np.float32)
    back = _uniform(rng, 95, 135) * (1 if rng.random() < 0.9 else -1)
    if rng.random() < 0.85:
        bend = _uniform(rng, 300, 2500)
        gap = np.abs(y + np.zeros_like(x) - back - np.sign(back) * 8 + np.sign(back) * x**2 / bend)
        thick = _uniform(rng, 1.5, 4)
        width = np.abs(x) < _uniform(rng, 150, 260)
        _mix(hu, free * np.clip(1.5 - gap / thick, 0, 1) * width, _uniform(rng, -800, 150))
        core = (y - back) * np.sign(back)
        foam = ((core > 8) & (core < 40) & width).astype(np.float32) + 0 * z
        _mix(hu, free * foam * np.clip(gap / thick - 1, 0, 1), _uniform(rng, -990, -880))
    if rng.random() < 0.3:
        for side in (-1, 1):
            at = side * _uniform(rng, 165, 215)
            along = at + (z - 20) * side * _uniform(rng, -0.2, 0.2)
            radius = _uniform(rng, 28, 48)
            distance = np.hypot(x - along, y - _uniform(rng, -20, 60))
            _mix(hu, free * np.clip((radius - distance) * 0.4, 0, 1), _uniform(rng, -100, 60))
            _mix(hu, free * np.clip((radius * 0.3 - distance) * 0.4, 0, 1), _uniform(rng, 300, 1200))
    for _ in range(int(rng.integers(0, 7))):
        centre = (_uniform(rng, -200, 170), _uniform(rng, -130, 130), _uniform(rng, -180, 180))
        radii = (_uniform(rng, 10, 90), _uniform(rng, 3, 20), _uniform(rng, 5, 60))
        _mix(hu, free * _ball(rng, centre, radii), _uniform(rng, -1000, -20) if rng.random() < 0.7 else 500)


def _breasts(rng: Rng, hu: F32, skin: F32) -> None:
    front = _uniform(rng, -115, -85)
    for side in (-1, 1):
        radii = (_uniform(rng, 40, 75), _uniform(rng, 20, 55), _uniform(rng, 40, 70))
        ball = _ball(rng, (_uniform(rng, -40, 20), front, side * _uniform(rng, 60, 95)), radii)
        _mix(hu, ball * (skin < 0.5), _uniform(rng, -110, 30))
        np.maximum(skin, ball, out=skin)


def _neck(rng: Rng, hu: F32, skin: F32) -> None:
    """Above some height only a neck is left, or shoulders that are wider than the chest."""
    z, y, x = axes()
    start = _uniform(rng, 110, 210)
    t = np.clip((z - start) / _uniform(rng, 15, 60), 0, 1)
    wide = 170 * (1 - t) + _uniform(rng, 55, 80) * t
    deep = 120 * (1 - t) + _uniform(rng, 50, 75) * t
    outside = ((x / wide) ** 2 + ((y - 5) / deep) ** 2 > 1) & (t > 0)
    hu[outside] = -1000
    skin[outside] = 0


def chest(rng: Rng, body: Fields) -> Chest:
    """One random chest made of ``body``."""
    source = _warp(rng)
    bent = _bent(body, source)
    pleura, airways, vessels, skin = bent.pleura, bent.airways, bent.vessels, bent.skin
    source_x = (source[2] - (SHAPE[2] - 1) / 2) * SPACING[2]
    hu = _tissue(rng, bent.tissue)
    _neck(rng, hu, skin)
    if rng.random() < 0.4:
        _breasts(rng, hu, skin)
    border = pleura + _uniform(rng, 0, 6) * waves(rng, _uniform(rng, 20, 50)) + _uniform(rng, -3, 5)
    for side in (source_x < 0, source_x > 0):
        if rng.random() < 0.15:  # a smaller lung
            border += side * _uniform(rng, 3, 18)
    lung = np.clip(0.5 - border / SPACING[1], 0, 1) * (1 - airways) * (skin > 0.5)
    inside_before = np.clip(0.5 - pleura / SPACING[1], 0, 1) * (1 - airways)
    _mix(hu, inside_before, _uniform(rng, -110, 70))  # where the new lung does not reach
    _gas(rng, hu, source, skin)
    fluid = _effusion(rng, border, source_x) * lung
    texture = _lung_texture(rng, vessels, border)
    _mix(hu, lung, texture)
    _mix(hu, fluid, _uniform(rng, 0, 45))
    hu[(bent.tissue < -900) & (airways > 0.6)] = _uniform(rng, -1010, -930)
    labels = np.where((lung - fluid) > 0.5, np.where(source_x < 0, RIGHT, LEFT), 0).astype(np.uint8)
    _around(rng, hu, skin)
    hu = ndimage.gaussian_filter(hu, (_uniform(rng, 0, 0.7), *[_uniform(rng, 0, 0.55)] * 2))
    if rng.random() < 0.35:
        _, y, x = axes()
        radius = _uniform(rng, 120, 175)
        hu = np.where(np.hypot(x - _uniform(rng, -15, 15), y - _uniform(rng, -15, 15)) > radius, np.float32(-1024), hu)
    return Chest(np.rint(np.clip(hu, -1024, 3071)).astype(np.int16), labels)
