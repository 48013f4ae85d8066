"""Axis order and direction in the patient, and the slant of a tilted gantry."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from typing import Literal

import numpy as np
from pydantic import field_validator

from dicomnode.infer.stages.frame import Affine, Array, Frame, Kind, StageStep, check_size

_DIRECTIONS = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}
"""Letter -> (LPS axis, sign): the direction in which the index grows."""

_SLANT_MM = 0.01
"""Sideways shift over the whole stack that counts as none."""


def closest_axes(affine: Affine) -> tuple[tuple[int, int], ...]:
    """For each array axis the (LPS axis, sign) that it is closest to; each LPS axis once.

    Of the six assignments the one with the largest sum of direction cosines, so an oblique
    acquisition has a well-defined answer; at a tie the first in axis order.
    """
    columns = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    best = max(permutations(range(3)), key=lambda p: round(sum(abs(float(columns[p[i], i])) for i in range(3)), 6))
    return tuple((best[i], 1 if columns[best[i], i] >= 0 else -1) for i in range(3))


@dataclass(frozen=True, slots=True)
class _Turned:
    order: tuple[int, int, int]
    flips: tuple[int, ...]

    def __call__(self, values: Array, kind: Kind) -> Array:
        del kind  # no value is computed
        back = np.flip(values, self.flips) if self.flips else values
        return back.transpose(np.argsort(self.order))


class Orient(StageStep):
    """Turn the axes so that index 0, 1, 2 grow towards the three letters of ``axes``.

    ``RAS`` is what MONAI's Orientationd calls RAS (array axes x, y, z); ``SPL`` is the order
    (slices, rows, columns) of an axial head-first supine series. Only axes are exchanged
    and reversed (a view, no value changes); an oblique volume stays oblique.
    """

    step: Literal["orient"]
    axes: str

    @field_validator("axes")
    @classmethod
    def _three_directions(cls, value: str) -> str:
        if len(value) != 3 or {_DIRECTIONS.get(c, (9, 0))[0] for c in value} != {0, 1, 2}:
            raise ValueError("must name three directions of L/R, P/A and S/I, for example RAS or SPL")
        return value

    def apply(self, frame: Frame) -> Frame:
        wanted = [_DIRECTIONS[letter] for letter in self.axes]
        present = closest_axes(frame.affine)
        order = [next(i for i in range(3) if present[i][0] == axis) for axis, _ in wanted]
        flips = tuple(i for i in range(3) if present[order[i]][1] != wanted[i][1])
        if order == [0, 1, 2] and not flips:
            return frame
        values = frame.values.transpose(order)
        affine = frame.affine.copy()
        affine[:, :3] = frame.affine[:, order]
        for axis in flips:
            affine[:3, 3] += affine[:3, axis] * (values.shape[axis] - 1)
            affine[:3, axis] *= -1
        turned = _Turned((order[0], order[1], order[2]), flips)
        return frame.moved(np.flip(values, flips) if flips else values, affine, turned, owned=frame.owned)


def tilt_degrees(affine: Affine) -> float:
    """Angle between the slice axis and the normal of the slices; 0 for a straight stack."""
    normal = np.cross(affine[:3, 2], affine[:3, 1])
    cosine = abs(float(affine[:3, 0] @ normal)) / float(np.linalg.norm(normal) * np.linalg.norm(affine[:3, 0]))
    return float(np.degrees(np.arccos(min(1.0, cosine))))


@dataclass(frozen=True, slots=True)
class _Straightened:
    """``shifts``: (slices, 2) in voxels; slice k of the source lies at ``shifts[k]`` in the straight grid."""

    shape: tuple[int, int, int]
    shifts: tuple[tuple[float, float], ...]

    def __call__(self, values: Array, kind: Kind) -> Array:
        out = np.empty(self.shape, values.dtype)
        for index, (row, column) in enumerate(self.shifts):
            out[index] = shifted(values[index], -row, -column, self.shape[1:], kind, 0.0)
        return out


class Straighten(StageStep):
    """Resample a stack with a tilted gantry onto a grid with right angles.

    Each slice is moved within its plane, linearly interpolated, so that the slice axis
    becomes the normal; the grid grows in-plane to hold all slices, new voxels get ``fill``.
    Belongs before ``resample`` and ``orient``; nothing happens to a stack that is straight.
    """

    step: Literal["straighten"]
    fill: float = -1024.0

    def apply(self, frame: Frame) -> Frame:
        a = frame.affine[:3, :3]
        normal = np.cross(a[:, 2], a[:, 1])
        normal /= np.linalg.norm(normal)
        along = float(a[:, 0] @ normal)
        sideways = a[:, 0] - along * normal
        rate = np.array([float(sideways @ a[:, i]) / float(a[:, i] @ a[:, i]) for i in (1, 2)])
        slices = frame.shape[0]
        if float(np.linalg.norm(sideways)) * slices < _SLANT_MM:
            return frame
        offsets = np.arange(slices)[:, None] * rate
        low = np.floor(offsets.min(axis=0))
        grow = np.ceil(offsets.max(axis=0)) - low
        shape = (slices, frame.shape[1] + int(grow[0]), frame.shape[2] + int(grow[1]))
        check_size("straighten", shape)
        shifts = tuple((float(r), float(c)) for r, c in offsets - low)
        out = np.empty(shape, np.float32)
        for index, (row, column) in enumerate(shifts):
            out[index] = shifted(frame.values[index], row, column, shape[1:], "linear", self.fill)
        affine = frame.affine.copy()
        affine[:3, 0] = along * normal
        affine[:3, 3] += a[:, 1] * low[0] + a[:, 2] * low[1]
        return frame.moved(out, affine, _Straightened(frame.shape, shifts), owned=True)


def shifted(plane: Array, row: float, column: float, shape: tuple[int, int], kind: Kind, fill: float) -> Array:
    """``plane`` moved by (row, column) voxels into an array of ``shape``; ``fill`` where it does not reach."""
    out = plane
    for axis, by in ((0, row), (1, column)):
        out = _shift_axis(out, axis, by, shape[axis], kind, fill)
    return np.asarray(out, plane.dtype if kind == "nearest" else np.float32)


def _shift_axis(plane: Array, axis: int, by: float, size: int, kind: Kind, fill: float) -> Array:
    source = np.arange(size) - by
    length = plane.shape[axis]
    out: Array
    if kind == "nearest":
        near = np.floor(source + 0.5).astype(np.intp)
        out = np.take(plane, np.clip(near, 0, length - 1), axis=axis)
        outside = (near < 0) | (near >= length)
    else:
        low = np.clip(np.floor(source).astype(np.intp), 0, length - 1)
        high = np.minimum(low + 1, length - 1)
        weight = np.clip(source - low, 0.0, 1.0).astype(np.float32)
        weight = weight[:, None] if axis == 0 else weight
        first = np.take(plane, low, axis=axis).astype(np.float32)
        out = first + weight * (np.take(plane, high, axis=axis) - first)
        outside = (source < -0.5) | (source > length - 0.5)
    if outside.any():
        out[(outside, slice(None)) if axis == 0 else (slice(None), outside)] = fill
    return out
