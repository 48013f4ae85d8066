"""The named steps before and after the network, each with typed parameters.

A step is a frozen value (its parameters, as the manifest gives them) with one pure method.
Steps before the network map an array of whole slices to one; steps after it map a State to
the next. A new step is a class here plus its name in PreStep or PostStep.

Patient axes are LPS: +x is the patient's left, +z the head (PS3.3 C.7.6.2.1.1), so sides
come from the affine and hold for any order of slices and any position of the patient.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from scipy import ndimage

from dicomnode.errors import BundleError
from dicomnode.infer import grid
from dicomnode.infer.airway import AirwaySize, find_airway
from dicomnode.infer.bits import Bits
from dicomnode.infer.separate import split_in_two
from dicomnode.infer.volume import Volume

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class State:
    """Where post-processing stands. Arrays other than ``outputs`` cover ``box`` only.

    ``outputs``: network outputs by name, shape of the volume. ``mask``: voxels still in
    play. ``blocked``: voxels that no later step may add (airways). ``labels``: 0 or part
    number. ``midline_x``: LPS x in mm of the middle of the body.
    """

    volume: Volume
    outputs: Mapping[str, Array]
    box: grid.Box
    mask: grid.Mask
    blocked: grid.Mask | None = None
    labels: npt.NDArray[np.uint8] | None = None
    midline_x: float = 0.0
    notes: tuple[str, ...] = ()

    @property
    def values(self) -> Array:
        """HU inside the box (a view)."""
        return self.volume.values[self.box]

    def note(self, text: str) -> State:
        return replace(self, notes=(*self.notes, text))

    def cut(self, box: grid.Box) -> State:
        """Narrow to ``box``, given in voxels of the present box."""
        absolute = tuple(
            slice(old.start + new.start, old.start + new.stop) for old, new in zip(self.box, box, strict=True)
        )
        return replace(
            self,
            box=(absolute[0], absolute[1], absolute[2]),
            mask=self.mask[box],
            blocked=None if self.blocked is None else self.blocked[box],
            labels=None if self.labels is None else self.labels[box],
        )

    def lps_x(self, index: npt.ArrayLike) -> float:
        """LPS x in mm of the (slice, row, column) ``index`` inside the box."""
        at = np.asarray(index, float) + [s.start for s in self.box]
        return float(self.volume.affine[0, :3] @ at + self.volume.affine[0, 3])

    def from_midline(self) -> npt.NDArray[np.float64]:
        """Signed distance in mm towards the patient's left of each column of the box (middle slice)."""
        shape = self.mask.shape
        start = self.lps_x((shape[0] / 2, shape[1] / 2, 0)) - self.midline_x
        return start + float(self.volume.affine[0, 2]) * np.arange(shape[2], dtype=np.float64)


def start(volume: Volume, outputs: Mapping[str, Array]) -> State:
    """The state before the first step: everything is in play."""
    n, r, c = volume.values.shape
    return State(volume, outputs, (slice(0, n), slice(0, r), slice(0, c)), np.ones((n, r, c), bool))


class _Step(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Clip(_Step):
    """Limit the values to ``low``..``high`` (both kept); removes padding and metal."""

    step: Literal["clip"]
    low: float
    high: float

    def apply(self, slab: Array) -> Array:
        return np.clip(slab, *self.bounds_for(slab.dtype))

    def bounds_for(self, dtype: np.dtype[Any]) -> tuple[Any, Any]:
        """``low`` and ``high`` of ``dtype``, where it can hold them: with bounds of float numpy would make float64
        of whole numbers."""
        if dtype.kind in "iu" and self.low.is_integer() and self.high.is_integer():
            kind = np.iinfo(dtype)
            if kind.min <= self.low and self.high <= kind.max:
                return dtype.type(self.low), dtype.type(self.high)
        return self.low, self.high


class Cast(_Step):
    """Convert to the dtype of the network's input."""

    step: Literal["cast"]
    dtype: Literal["float32", "float16", "int16", "uint8"]

    def apply(self, slab: Array) -> Array:
        return slab.astype(self.dtype)


class FromOutput(_Step):
    """The mask is where the network's ``output`` is at least ``threshold``."""

    step: Literal["from_output"]
    output: str
    threshold: float = 0.5

    def apply(self, state: State) -> State:
        if self.output not in state.outputs:
            raise BundleError("post-process", f"the model has no output {self.output}")
        output = state.outputs[self.output]
        if output.dtype == np.uint8 and 0 < self.threshold <= 1:
            mask = output.view(bool) if output.max(initial=0) <= 1 else output > 0
        else:
            mask = output >= self.threshold
        return replace(state, mask=mask)


class InsideBody(_Step):
    """Keep air that lies inside the patient: the body is the largest piece of tissue.

    Works on a grid of about ``grid_mm``: tissue is opened by 6 mm (cuts the table off), its
    largest component is filled slice by slice and shrunk by one cell so that no skin remains.
    """

    step: Literal["inside_body"]
    grid_mm: float = Field(default=3.0, gt=0)

    def apply(self, state: State) -> State:
        step = grid.step_for(state.volume.spacing, self.grid_mm)
        tissue = ~state.mask[:, ::step, ::step]
        cell = step * max(state.volume.spacing[1:])
        opening = max(1, round(6.0 / cell))
        opened = Bits.of(tissue).eroded(crosses=opening).dilated(crosses=opening).mask()
        labels, counts = grid.label(opened)
        if counts.sum() == 0:
            return replace(state, mask=np.zeros_like(state.mask)).note("No body was found in the images")
        body: grid.Mask = labels == int(counts.argmax())
        body |= grid.enclosed(body)
        centre = np.array([np.mean(np.nonzero(body.any(axis=(1, 2)))[0]), 0.0, 0.0])
        for axis in (1, 2):
            weights = body.sum(axis=tuple(a for a in range(3) if a != axis))
            centre[axis] = step * float(weights @ np.arange(body.shape[axis])) / float(weights.sum())
        state = replace(state, midline_x=state.lps_x(centre))
        if _touches_frame(state.values[:, ::step, ::step], tissue):
            state = state.note("Lung may reach the edge of the field of view; volumes may be incomplete")
        body = Bits.of(body).eroded(crosses=1, border=True).mask()
        inside = state.mask & grid.enlarge(body, step, state.mask.shape)
        box = grid.bounding_box(inside, margin=4)
        state = replace(state, mask=inside)
        return state if box is None else state.cut(box)


def _touches_frame(values: Array, tissue: grid.Mask) -> bool:
    """Whether much of the image frame, in some slices, has the density of lung."""
    share = np.zeros(values.shape[0])
    for edge, body in (
        (values[:, 0], tissue[:, 0]),
        (values[:, -1], tissue[:, -1]),
        (values[:, :, 0], tissue[:, :, 0]),
        (values[:, :, -1], tissue[:, :, -1]),
    ):
        lungish = (edge > -930) & (edge < -600) & ~body
        share = np.maximum(share, lungish.mean(axis=1))
    return bool((share > 0.15).mean() > 0.05)


class RemoveAirways(_Step):
    """Take trachea and central bronchi with their wall (``wall_mm``) out of the mask.

    ``max_tree_ml`` is the leak limit of the growth; ``grid_mm`` the working pixel size.
    """

    step: Literal["remove_airways"]
    wall_mm: float = Field(default=2.5, ge=0, le=10)
    max_tree_ml: float = Field(default=90.0, gt=0)
    grid_mm: float = Field(default=1.4, gt=0)

    def apply(self, state: State) -> State:
        volume = state.volume
        step = grid.step_for(volume.spacing, self.grid_mm)
        spacing = (volume.spacing[0], volume.spacing[1] * step, volume.spacing[2] * step)
        airway = find_airway(
            grid.block_mean(state.values, step),
            state.mask[:, ::step, ::step],
            spacing,
            state.from_midline()[::step],
            head_last=bool(volume.affine[2, 0] > 0),
            size=AirwaySize(max_tree_ml=self.max_tree_ml),
        )
        if airway is None:
            return state.note("The trachea was not found; airways may be included in the lung volumes")
        in_plane = round(self.wall_mm / max(spacing[1:]))
        along = round(self.wall_mm / spacing[0])
        airway = Bits.of(airway).dilated(crosses=in_plane).along(along).mask()
        blocked = grid.enlarge(airway, step, state.mask.shape)
        return replace(state, mask=state.mask & ~blocked, blocked=blocked)


class RemoveGas(_Step):
    """Take gas outside the lungs (stomach, bowel, oesophagus) out of the mask.

    The diaphragm can be thinner than the scanner resolves, so such gas may hang together
    with a lung. A pocket below ``edge_hu`` of ``min_ml`` to ``max_ml`` counts as outside when
    its median is below ``median_hu`` (gas, not aerated tissue) and less than ``lung_share``
    of the shell 3 to 9 mm around it has the density of lung: a bulla is surrounded by lung.
    Works on a grid of about 3 mm. Free air in the pleura meets the same description.
    """

    step: Literal["remove_gas"]
    edge_hu: float = -930.0
    median_hu: float = -955.0
    min_ml: float = Field(default=3.0, gt=0)
    max_ml: float = Field(default=1000.0, gt=0)
    lung_share: float = Field(default=0.35, gt=0, lt=1)

    def apply(self, state: State) -> State:
        step = grid.step_for(state.volume.spacing, 3.0)
        along = max(1, int(3.0 / state.volume.spacing[0] + 0.25))
        hu = grid.block_mean(state.values[::along], step)
        mask = state.mask[::along, ::step, ::step]
        pockets, counts = grid.label(mask & (hu < self.edge_hu))
        boxes = ndimage.find_objects(pockets)
        cell_ml = state.volume.voxel_ml * along * step * step
        outside = np.zeros(mask.shape, bool)
        # Neighbours in the next slice count only where that is a step of the same order.
        solid = ndimage.generate_binary_structure(3, 1)
        cross = solid if state.volume.spacing[0] * along <= 4.0 else grid.IN_PLANE
        for number in np.flatnonzero((counts * cell_ml >= self.min_ml) & (counts * cell_ml <= self.max_ml)):
            box = tuple(
                slice(max(0, s.start - 4), min(size, s.stop + 4))
                for s, size in zip(boxes[number - 1], mask.shape, strict=True)
            )
            pocket = pockets[box] == number
            if np.median(hu[box][pocket]) >= self.median_hu:
                continue
            near = ndimage.binary_dilation(pocket, cross)
            shell = ndimage.binary_dilation(near, cross, iterations=2) & ~near
            density = hu[box][shell]
            if density.size and np.mean((density > self.edge_hu) & (density < -500)) < self.lung_share:
                outside[box] |= near
        if not outside.any():
            return state
        fine = grid.enlarge(np.repeat(outside, along, axis=0)[: len(state.mask)], step, state.mask.shape)
        whole = grid.bounding_box(fine, margin=4)
        assert whole is not None
        # The rim of the pocket, about 2 mm: blurred voxels that the coarse grid left over.
        rim = round(2.0 / max(state.volume.spacing[1:]))
        if rim:
            around = solid if state.volume.spacing[0] <= 2.0 else grid.IN_PLANE
            grown = ndimage.binary_dilation(fine[whole], around, rim, mask=state.mask[whole])
            fine[whole] |= grown
        blocked = fine if state.blocked is None else state.blocked | fine
        return replace(state, mask=state.mask & ~fine, blocked=blocked)


class TwoLungs(_Step):
    """Label the two lungs 1 and 2 among the components of the mask.

    A component counts from ``min_ml`` on, if its mean is above ``gas_hu`` (below lies pure
    gas: stomach, bowel) and it has at least ``min_ratio`` of the largest one. One component
    with at least ``both_sides`` of its voxels on either side of the midline is a pair of
    lungs that touch: it is split at the narrow place, or at the midline if there is none.
    """

    step: Literal["two_lungs"]
    min_ml: float = Field(default=100.0, gt=0)
    min_ratio: float = Field(default=0.1, gt=0, lt=1)
    gas_hu: float = -950.0
    both_sides: float = Field(default=0.2, gt=0, lt=0.5)

    def apply(self, state: State) -> State:
        components, counts = grid.label(state.mask)
        boxes = ndimage.find_objects(components)
        kept: list[int] = []
        for number in np.argsort(-counts, kind="stable")[:6]:
            least = max(self.min_ml, self.min_ratio * counts[kept[0]] * state.volume.voxel_ml if kept else 0.0)
            if counts[number] * state.volume.voxel_ml < least:
                break
            box = boxes[number - 1]
            inside = state.values[box][components[box] == number]
            if float(inside.mean(dtype=np.float64)) > self.gas_hu:
                kept.append(int(number))
        labels = np.zeros(state.mask.shape, np.uint8)
        if not kept:
            return replace(state, labels=labels).note("No lung was found")
        first: grid.Mask = components == kept[0]
        side = state.from_midline()
        left_share = float(first.sum(axis=(0, 1)) @ (side > 0)) / float(counts[kept[0]])
        if self.both_sides <= left_share <= 1 - self.both_sides:
            return self._split(state, first, side)
        labels[first] = 1
        if len(kept) > 1:
            labels[components == kept[1]] = 2
            return replace(state, labels=labels)
        return replace(state, labels=labels).note("Only one lung was found")

    @staticmethod
    def _split(state: State, joined: grid.Mask, side: npt.NDArray[np.float64]) -> State:
        box = grid.bounding_box(joined)
        assert box is not None
        parts = split_in_two(joined[box], state.volume.spacing, side[box[2]])
        labels = np.zeros(joined.shape, np.uint8)
        if parts is not None:
            labels[box] = parts
            return replace(state, labels=labels).note(
                "The lungs touch each other; they were separated at the narrowest place"
            )
        labels[joined] = np.broadcast_to(np.where(side > 0, 1, 2), joined.shape)[joined]
        return replace(state, labels=labels).note(
            "The lungs could not be told apart; they were divided at the middle of the body"
        )


class CloseAndFill(_Step):
    """Smooth each lung (in-plane closing) and fill small in-plane holes (vessels, nodules).

    Closing with ``radius_mm`` takes in vessels and indentations at the mediastinum and never
    enters the airways or the other lung. Holes up to ``max_hole_mm2`` are filled; larger
    ones stay open, since the dome of the liver looks like one.
    """

    step: Literal["close_and_fill"]
    radius_mm: float = Field(default=5.0, ge=0, le=30)
    max_hole_mm2: float = Field(default=300.0, ge=0)

    def apply(self, state: State) -> State:
        if state.labels is None:
            raise BundleError("post-process", "close_and_fill needs labels; put two_lungs before it")
        pixel = state.volume.spacing[1] * state.volume.spacing[2]
        radius = round(self.radius_mm / max(state.volume.spacing[1:]))
        labels = state.labels.copy()
        for number in (1, 2):
            box = grid.bounding_box(labels == number, margin=radius + 2)
            if box is None:
                continue
            view = labels[box]
            lung: grid.Mask = view == number
            if radius:
                added = grid.close_in_plane(lung, radius) & (view == 0)
                if state.blocked is not None:
                    added &= ~state.blocked[box]
                lung = lung | added
            lung |= grid.enclosed(lung, self.max_hole_mm2 / pixel) & (view == 0)
            view[lung] = number
        return replace(state, labels=labels)


class NameSides(_Step):
    """Give the parts the segment numbers of the patient's ``left`` and ``right`` lung.

    Two parts are compared with each other, a single one with the middle of the body.
    """

    step: Literal["name_sides"]
    left: int = Field(ge=1, le=255)
    right: int = Field(ge=1, le=255)

    def apply(self, state: State) -> State:
        if state.labels is None:
            raise BundleError("post-process", "name_sides needs labels; put two_lungs before it")
        where = {n: _centre(state.labels == n) for n in (1, 2)}
        x = {n: state.lps_x(centre) for n, centre in where.items() if centre is not None}
        limit = sum(x.values()) / 2 if len(x) == 2 else state.midline_x
        table = np.zeros(256, np.uint8)
        for number, position in x.items():
            table[number] = self.left if position > limit else self.right
        return replace(state, labels=table[state.labels])


def _centre(mask: grid.Mask) -> tuple[float, float, float] | None:
    total = int(np.count_nonzero(mask))
    if total == 0:
        return None
    through: npt.NDArray[np.int64] = mask.view(np.uint8).sum(axis=0, dtype=np.uint32).astype(np.int64)
    slices = np.array([np.count_nonzero(plane) for plane in mask], np.int64)
    sums = (slices, through.sum(axis=1), through.sum(axis=0))
    a, b, c = (float(s @ np.arange(len(s))) / total for s in sums)
    return (a, b, c)


class NoteCoverage(_Step):
    """Say so when a lung reaches the first or last slice with more than ``min_mm2``."""

    step: Literal["note_coverage"]
    min_mm2: float = Field(default=100.0, ge=0)

    def apply(self, state: State) -> State:
        if state.labels is None:
            return state
        pixel = state.volume.spacing[1] * state.volume.spacing[2]
        slices = state.volume.values.shape[0]
        head_last = state.volume.affine[2, 0] > 0
        for index, end in ((0, "foot" if head_last else "head"), (slices - 1, "head" if head_last else "foot")):
            at = index - state.box[0].start
            if 0 <= at < state.labels.shape[0] and np.count_nonzero(state.labels[at]) * pixel > self.min_mm2:
                state = state.note(
                    f"The lungs reach the end of the scan at the {end} side; volumes are of the imaged part"
                )
        return state


PreStep = Annotated[Clip | Cast, Field(discriminator="step")]
PostStep = Annotated[
    FromOutput | InsideBody | RemoveAirways | RemoveGas | TwoLungs | CloseAndFill | NameSides | NoteCoverage,
    Field(discriminator="step"),
]
