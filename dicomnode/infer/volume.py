"""A series of images as one volume, or a plain reason why it is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dicomnode.errors import MalformedDataSet
from dicomnode.geometry import StackReport, analyse_stack, frames_note
from dicomnode.infer.contract import InputContract
from dicomnode.infer.decode import Decoder, InlineDecoder, Pixels, Undecodable
from dicomnode.infer.multiframe import SINGLE_FRAME_CLASS, single_frames, split_frame_uid
from dicomnode.infer.rescale import assemble
from dicomnode.infer.room import Room
from dicomnode.infer.slice_header import SliceHeader, read_header, read_headers, refuse
from dicomnode.records import SourceInstance

__all__ = [
    "ReadSlice", "SliceHeader", "StackPlan", "Volume", "plan_stack", "read_header", "read_volume", "refuse",
    "spacing_of",
]  # fmt: skip

_SHEAR_TOLERANCE_MM = 0.5
"""Largest sideways deviation of a slice from the straight line through the stack."""


@dataclass(frozen=True, slots=True)
class Projection:
    """What makes a volume of one slice a single image (CR, DX).

    ``white``: its grey values run from 0, black, to this. ``facts``: numbers that its header states, by keyword.
    ``view``, ``body_part``, ``laterality``: as it states them, in upper case. ``field``: first and last + 1 row
    and column of a collimator that it states. ``valid``: bool (rows, columns), False where it has padding; None
    without any. ``sized``: whether the size of a pixel is known.
    """

    white: float
    facts: Mapping[str, float]
    field: tuple[int, int, int, int] | None = None
    valid: npt.NDArray[np.bool_] | None = None
    sized: bool = True
    view: str = ""
    body_part: str = ""
    laterality: str = ""


@dataclass(frozen=True, slots=True)
class Volume:
    """A regular stack of slices, or a single image.

    ``values``: int16 or float32 array (slices, rows, columns), C order, Hounsfield units for
    CT; int16 when every rescaled value is an integer. ``affine``: float64 (4, 4) from
    (slice, row, column, 1) to LPS millimetres; its slice axis is slanted for a tilted
    gantry. ``spacing``: mm along the normal, between rows, between columns.
    """

    values: npt.NDArray[Any]
    affine: npt.NDArray[np.float64]
    spacing: tuple[float, float, float]
    source_uids: tuple[str, ...]
    excluded_uids: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    source_frames: tuple[int, ...] = ()
    """Frame number, from 1, of each slice within its instance; empty for single-frame images."""
    projection: Projection | None = None

    @property
    def voxel_ml(self) -> float:
        """Volume of one voxel in millilitres: the determinant of the affine."""
        return abs(float(np.linalg.det(self.affine[:3, :3]))) / 1000.0


def spacing_of(affine: npt.NDArray[np.float64]) -> tuple[float, float, float]:
    """Millimetres along the normal, between rows, between columns: ``Volume.spacing`` of an affine."""
    normal = np.cross(affine[:3, 2], affine[:3, 1])
    along = abs(float(affine[:3, 0] @ normal)) / float(np.linalg.norm(normal))
    return along, float(np.linalg.norm(affine[:3, 1])), float(np.linalg.norm(affine[:3, 2]))


@dataclass(frozen=True, slots=True)
class StackPlan:
    """The decision about a series before any pixel is decoded."""

    headers: tuple[SliceHeader, ...]
    affine: npt.NDArray[np.float64]
    spacing: tuple[float, float, float]
    excluded_uids: tuple[str, ...]
    notes: tuple[str, ...]


class ReadSlice(Protocol):
    """A slice that was read, and is or will be decoded, before it was asked for."""

    @property
    def header(self) -> SliceHeader: ...

    @property
    def room(self) -> Room | None:
        """Memory for the volume of its series, which is the reader's; the same for all of its slices."""
        ...

    def values(self) -> Pixels | None:
        """Stored values (rows, columns); waits for them. None when it has to be decoded anew."""
        ...


def read_volume(
    instances: Sequence[SourceInstance | Path],
    contract: InputContract,
    *,
    decoder: Decoder | None = None,
    read_bytes: Callable[[Path], bytes] = Path.read_bytes,
    ahead: Mapping[str, ReadSlice] | None = None,
) -> Volume:
    """Read, check, decode and rescale a series; slices are sorted along their normal.

    ``read_bytes`` is the seam for stores that are not plain files, ``ahead`` what was read while
    the series arrived, by SOP Instance UID. Raises UnsuitableSeries with a code when the series
    does not meet ``contract`` and MalformedDataSet when a file is no DICOM file or is another
    instance than the index says.
    """
    paths: dict[str, Path] = {}
    headers: list[SliceHeader] = []
    known = ahead or {}
    for instance in instances:
        path = instance if isinstance(instance, Path) else instance.path
        read = known.get(instance.sop_instance_uid) if isinstance(instance, SourceInstance) else None
        if read is not None and read.header.frames == 1 and read.header.sop_class_uid not in SINGLE_FRAME_CLASS:
            found = [read.header]
        else:
            found = read_headers(read_bytes(path), contract)
        uid = split_frame_uid(found[0].uid)[0]
        if isinstance(instance, SourceInstance) and uid != instance.sop_instance_uid:
            raise MalformedDataSet("read series", "a file holds another SOP Instance UID than the index says")
        if uid in paths:
            raise refuse("DUPLICATE_INSTANCE", "the same SOP Instance UID occurs twice in the input")
        paths[uid] = path
        headers += found
    plan = plan_stack(headers, contract)
    places = [split_frame_uid(h.uid) for h in plan.headers]
    try:
        frames = _frames(plan, places, known, decoder or InlineDecoder(), lambda uid: read_bytes(paths[uid]))
        room = next((r for r in (known[h.uid].room for h in plan.headers if h.uid in known) if r is not None), None)
        memory = room.array if room else np.empty
        values = assemble(plan.headers, frames, hounsfield=contract.hounsfield, memory=memory)
    except Undecodable as cause:
        raise refuse(
            cause.code, cause.text, "Ask the sender to send the series again, or in another transfer syntax"
        ) from cause
    return Volume(
        values=values,
        affine=plan.affine,
        spacing=plan.spacing,
        source_uids=tuple(uid for uid, _ in places),
        excluded_uids=_left_out(plan, places),
        notes=plan.notes,
        source_frames=tuple(frame or 1 for _, frame in places) if any(frame for _, frame in places) else (),
    )


def _frames(
    plan: StackPlan,
    places: Sequence[tuple[str, int]],
    ahead: Mapping[str, ReadSlice],
    decoder: Decoder,
    read: Callable[[str], bytes],
) -> Iterator[Pixels]:
    """Stored values of each slice in order: those that were read ahead, the others decoded now, on all cores."""
    late = [(h, place) for h, place in zip(plan.headers, places, strict=True) if h.uid not in ahead]
    decoded = decoder.frames(_files(late, read))
    for h in plan.headers:
        if h.uid not in ahead:
            yield next(decoded)
            continue
        values = ahead[h.uid].values()
        if values is None or values.shape != (h.rows, h.columns):
            values = next(iter(decoder.frames([(read(h.uid), h.rows, h.columns)])))
        yield values


def _left_out(plan: StackPlan, places: Sequence[tuple[str, int]]) -> tuple[str, ...]:
    """Instances of which no frame is used."""
    used = {uid for uid, _ in places}
    return tuple(dict.fromkeys(uid for uid, _ in map(split_frame_uid, plan.excluded_uids) if uid not in used))


def _files(
    slices: Sequence[tuple[SliceHeader, tuple[str, int]]], read: Callable[[str], bytes]
) -> Iterator[tuple[bytes, int, int]]:
    """What the decoder gets, slice by slice; a multi-frame object is read once and taken apart."""
    frames: dict[int, bytes] = {}
    opened = ""
    for h, (uid, frame) in slices:
        if not frame:
            yield read(uid), h.rows, h.columns
            continue
        if opened != uid:
            numbers = [n for _, (other, n) in slices if other == uid]
            frames = dict(zip(numbers, single_frames(read(uid), numbers), strict=True))
            opened = uid
        yield frames.pop(frame), h.rows, h.columns


def plan_stack(headers: Sequence[SliceHeader], contract: InputContract) -> StackPlan:
    """Decide from headers alone whether they make the volume that ``contract`` asks for."""
    localizers = [h for h in headers if h.localizer]
    slices = [h for h in headers if not h.localizer]
    notes: list[str] = []
    if localizers:
        notes.append(f"{len(localizers)} localizer image(s) in the series were left out")
    _check_kind(slices, contract)
    _check_size(slices, contract)
    if len(slices) < contract.min_slices:
        raise refuse(
            "TOO_FEW_SLICES",
            f"the series has {len(slices)} usable slice(s); the model needs {contract.min_slices} or more",
            "Send the whole series, or a thin-slice reconstruction",
        )
    if contract.hounsfield:
        _check_hounsfield(slices)
    frames = len({h.frame_uid for h in slices})
    if frames > 1:
        notes.append(frames_note(frames))
    stack, by_uid = _check_stack(slices, contract)
    ordered = tuple(by_uid[uid] for uid in stack.order)
    affine, spacing = _affine(ordered, stack, contract)
    return StackPlan(ordered, affine, spacing, tuple(h.uid for h in localizers), tuple(notes))


def _check_kind(slices: Sequence[SliceHeader], contract: InputContract) -> None:
    for h in slices:
        if h.modality != contract.modality:
            raise refuse("WRONG_MODALITY", f"the series has another modality than {contract.modality}")
        if h.sop_class_uid not in contract.sop_classes:
            raise refuse("WRONG_SOP_CLASS", "the model does not take images of this SOP class")
    if len({h.series_uid for h in slices}) > 1:
        raise refuse("MIXED_SERIES", "the images come from more than one series")


def _check_size(slices: Sequence[SliceHeader], contract: InputContract) -> None:
    """Sizes in integers, before anything is decoded or allocated."""
    total = 0
    for h in slices:
        if h.rows < 1 or h.columns < 1:
            raise refuse("NO_PIXEL_DATA", "an instance has no pixel data or no size")
        if h.frames != 1:
            raise refuse("MULTI_FRAME", "an instance has several frames; the model takes single-frame images")
        if h.samples != 1 or h.photometric not in ("MONOCHROME2", ""):
            raise refuse("NOT_GREYSCALE", "the images are not greyscale with bright for high values")
        total += h.rows * h.columns * h.frames * h.samples
    if total > contract.max_voxels or len(slices) > contract.max_slices:
        raise refuse(
            "TOO_LARGE",
            f"the series has {len(slices)} slices with {total} voxels; "
            f"the limits are {contract.max_slices} and {contract.max_voxels}",
        )
    if len({(h.rows, h.columns) for h in slices}) > 1:
        raise refuse("SIZE_MISMATCH", "the slices differ in their number of rows or columns")
    if any(h.pixel_spacing is None or min(h.pixel_spacing) <= 0 for h in slices):
        raise refuse("NO_SPACING", "a slice does not say its pixel spacing")
    spacings = np.array([h.pixel_spacing for h in slices], float).reshape(-1, 2)
    if len(spacings) and np.any(np.ptp(spacings, axis=0) > 1e-3 * spacings[0]):
        raise refuse("SPACING_MISMATCH", "the slices differ in pixel spacing")


def _check_hounsfield(slices: Sequence[SliceHeader]) -> None:
    for h in slices:
        if h.slope is None or h.intercept is None or h.slope == 0:
            raise refuse("NOT_HOUNSFIELD", "a slice has no rescale slope and intercept, so no Hounsfield units")
        if h.rescale_type not in ("", "HU"):
            raise refuse("NOT_HOUNSFIELD", "the pixel values are not in Hounsfield units")


def _check_stack(slices: Sequence[SliceHeader], contract: InputContract) -> tuple[StackReport, dict[str, SliceHeader]]:
    planes = [h.plane for h in slices if h.plane is not None]
    if len(planes) != len(slices):
        raise refuse("NO_GEOMETRY", f"{len(slices) - len(planes)} slice(s) do not say where they lie")
    # Positions of equal distance sort by UID; the order of arrival must not matter.
    stack = analyse_stack(sorted(planes, key=lambda p: p.uid))
    hints = {
        "MIXED_ORIENTATION": "Send localizers and reformats as series of their own",
        "DUPLICATE_POSITION": "Send each reconstruction or contrast phase as a series of its own",
        "GAP": "Send the missing slices",
    }
    for code in ("MIXED_ORIENTATION", "DUPLICATE_POSITION", "GAP", "NON_UNIFORM"):
        if code in stack.problems:
            raise refuse(code, stack.problems[code], hints.get(code, ""))
    tilt = float(np.degrees(np.arccos(min(1.0, abs(stack.normal[2])))))
    if contract.orientation == "axial" and tilt > contract.max_tilt_degrees:
        raise refuse(
            "NOT_AXIAL",
            f"the slices are tilted by {tilt:.0f} degrees from axial; "
            f"the model takes up to {contract.max_tilt_degrees:.0f}",
        )
    return stack, {h.uid: h for h in slices}


def _affine(
    ordered: Sequence[SliceHeader], stack: StackReport, contract: InputContract
) -> tuple[npt.NDArray[np.float64], tuple[float, float, float]]:
    """PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1, with the slice step as the mean of all steps."""
    first = ordered[0]
    assert first.plane is not None and first.pixel_spacing is not None
    row_mm, column_mm = first.pixel_spacing
    for name, value, (low, high) in (
        ("slice spacing", stack.spacing, contract.slice_spacing_mm),
        ("pixel spacing", row_mm, contract.pixel_spacing_mm),
        ("pixel spacing", column_mm, contract.pixel_spacing_mm),
    ):
        if not low <= value <= high:
            raise refuse(
                "SPACING_OUT_OF_RANGE", f"the {name} is {value:.2f} mm; the model takes {low:g} to {high:g} mm"
            )
    positions = np.array([h.plane.position for h in ordered if h.plane is not None], float)
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    drift = positions - (positions[0] + np.arange(len(positions))[:, None] * step)
    normal = np.array(stack.normal)
    sideways = drift - (drift @ normal)[:, None] * normal
    if float(np.abs(sideways).max()) > _SHEAR_TOLERANCE_MM:
        raise refuse("NON_UNIFORM", "the slices are shifted sideways against each other")
    affine = np.eye(4)
    affine[:3, 0] = step
    affine[:3, 1] = np.array(first.plane.orientation[3:]) * row_mm  # towards growing row index
    affine[:3, 2] = np.array(first.plane.orientation[:3]) * column_mm
    affine[:3, 3] = positions[0]
    return affine, (float(step @ normal), row_mm, column_mm)
