"""The two lung fields of a frontal chest radiograph, chosen among the dark parts of the picture."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy import ndimage

from dicomnode.errors import BundleError
from dicomnode.infer.stages.frame import Frame, StageStep, restore
from dicomnode.infer.stages.orient import Orient
from dicomnode.infer.steps import State

UPRIGHT = Orient(step="orient", axes="PIL")
"""Rows grow to the feet, columns to the patient's left: as a frontal image is looked at."""

Labels = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
_CROSS = ndimage.generate_binary_structure(2, 1)
_DISC = ndimage.iterate_structure(ndimage.generate_binary_structure(2, 1), 2)
_MOST_PARTS = 6


class LungFields(StageStep):
    """Label the lung fields among the pieces of the mask: one to the patient's right, one to the left.

    ``output``: the network's answer that the mask is made of; below ``air_below`` lies direct exposure, and a
    piece whose rim is air by more than ``most_air`` is skin or what lies beyond it. A piece counts from
    ``min_share`` of the image on. Of the pairs beside each other the largest is taken whose smaller piece has
    ``min_ratio`` of the larger. What hangs together by a neck of less than twice ``neck`` cells are two pieces.
    Works on a grid of about ``grid`` cells across the shorter side.
    """

    step: Literal["lung_fields"]
    output: str
    right: int = Field(ge=1, le=255)
    left: int = Field(ge=1, le=255)
    air_below: float = -0.5
    most_air: float = Field(default=0.1, ge=0, le=1)
    min_share: float = Field(default=0.015, gt=0, lt=1)
    min_ratio: float = Field(default=0.2, gt=0, le=1)
    neck: int = Field(default=5, ge=1, le=32)
    grid: int = Field(default=256, ge=32, le=4096)

    def apply(self, state: State) -> State:
        if self.output not in state.outputs:
            raise BundleError("post-process", f"the model has no output {self.output}")
        frame = UPRIGHT.apply(Frame(state.mask, state.volume.affine))
        air = UPRIGHT.apply(Frame(state.outputs[self.output], state.volume.affine)).values[0] < self.air_below
        step = max(1, min(frame.shape[1:]) // self.grid)
        mask = frame.values[0]
        found, several = self._choose(mask[::step, ::step], air[::step, ::step])
        labels = np.ascontiguousarray(restore(frame.undo, _fine(found, mask, step)[np.newaxis], "nearest"))
        state = replace(state, labels=labels)
        if not several:
            return state.note("No lung fields were found; what is measured in them is missing")
        return state if several == 2 else state.note("Only one lung field was found")

    def _choose(self, mask: Mask, air: Mask) -> tuple[Labels, int]:
        """Labels on the grid, and how many fields there are."""
        core = ndimage.binary_erosion(mask, _CROSS, iterations=self.neck, border_value=1)
        pieces, count = ndimage.label(core)
        pieces = _grown(pieces, mask, self.neck)
        sizes: list[int] = np.bincount(pieces.ravel(), minlength=count + 1).tolist()
        largest = sorted(range(1, count + 1), key=lambda n: -sizes[n])[:_MOST_PARTS]
        kept = [n for n in largest if sizes[n] >= self.min_share * mask.size and self._in_patient(pieces == n, air)]
        centres = {n: _centre(pieces == n) for n in kept}
        pairs: list[tuple[int, int, int]] = [
            (sizes[a] + sizes[b], a, b)
            for a, b in combinations(kept, 2)
            if sizes[b] >= self.min_ratio * sizes[a] and _beside(centres[a], centres[b], mask.shape)
        ]
        labels = np.zeros(mask.shape, np.uint8)
        if pairs:
            chosen = sorted(max(pairs)[1:], key=lambda n: centres[n][1])
            for number, piece in zip((self.right, self.left), chosen, strict=True):
                labels[_filled(pieces == piece)] = number
        elif kept:
            side = self.right if centres[kept[0]][1] < mask.shape[1] / 2 else self.left
            labels[_filled(pieces == kept[0])] = side
        return labels, 2 if pairs else min(1, len(kept))

    def _in_patient(self, piece: Mask, air: Mask) -> bool:
        rim = ndimage.binary_dilation(piece, _DISC) & ~piece
        return int((rim & air).sum()) <= self.most_air * max(1, int(rim.sum()))


def _centre(piece: Mask) -> tuple[float, float]:
    rows, columns = np.nonzero(piece)
    return float(rows.mean()), float(columns.mean())


def _grown(pieces: npt.NDArray[np.int32], mask: Mask, steps: int) -> npt.NDArray[np.int32]:
    """Each piece by ``steps`` cells within the mask; where two meet the one with the greater number goes on."""
    for _ in range(steps):
        wider = ndimage.grey_dilation(pieces, footprint=_CROSS)
        pieces = np.where((pieces == 0) & mask, wider, pieces)
    return pieces


def _beside(a: tuple[float, float], b: tuple[float, float], shape: tuple[int, ...]) -> bool:
    """Further apart across than along, by a tenth of the width at least."""
    return abs(a[1] - b[1]) > max(abs(a[0] - b[0]), 0.1 * shape[1])


def _filled(piece: Mask) -> Mask:
    """Vessels and ribs that cut into the field are part of it."""
    pad = 4
    closed = ndimage.binary_closing(np.pad(piece, pad), _DISC, iterations=2)[pad:-pad, pad:-pad]
    filled: Mask = ndimage.binary_fill_holes(closed | piece)
    return filled


def _fine(found: Labels, mask: Mask, step: int) -> Labels:
    """The labels on the picture's own grid; its mask says where the border runs."""
    if step == 1:
        return found

    def fine(labels: Labels) -> Labels:
        return np.repeat(np.repeat(labels, step, axis=0), step, axis=1)[: mask.shape[0], : mask.shape[1]]

    inner = np.where(ndimage.minimum_filter(found, 3) == found, found, 0).astype(np.uint8)
    return np.where(mask, fine(ndimage.maximum_filter(found, 3)), fine(inner)).astype(np.uint8)
