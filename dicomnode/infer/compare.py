"""What two versions of a model made of one series, set side by side. Pure, but for reading the SEG.

Segments are matched by label, measurements by segment label and key, answers by key, so versions
that number their segments otherwise still compare. Masks go by image and frame, and only what
holds a voxel is kept: a multi-frame object and single images compare alike, and images of
different size (projections) stand side by side.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]
Plane = tuple[str, int]
"""SOPInstanceUID of an image and number of its frame, from 1; 1 for an image of one frame."""
Masks = Mapping[str, Mapping[Plane, Mask]]
"""By segment label: boolean (rows, columns) of each plane that holds a voxel of it."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What one version found.

    ``masks``: None where it made segments and none of them was kept, so that only their labels
    are known. ``segments``: labels of those that occur. ``measurements``: by ``segment label.key``.
    ``answers``: coded value of each classification by its key; ``probabilities`` likewise, 0..1.
    """

    masks: Masks | None
    segments: frozenset[str] = frozenset()
    measurements: Mapping[str, float] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)
    probabilities: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, summary: Mapping[str, Any], masks: Masks | None) -> Finding:
        """From the summary that a job keeps of its result (:mod:`dicomnode.infer.summary`)."""
        measured = summary.get("measurements") or ()
        answered = summary.get("findings") or ()
        names = [f"{m['segment']}.{m['key']}" if m["segment"] else str(m["key"]) for m in measured]
        keys = list(_apart(str(f["key"]) for f in answered))
        return cls(
            masks,
            frozenset(summary.get("segments") or ()),
            {name: float(m["value"]) for name, m in zip(_apart(names), measured, strict=True)},
            {key: str(f["code"] or f["positive"]) for key, f in zip(keys, answered, strict=True)},
            {key: float(p) for key, f in zip(keys, answered, strict=True) if (p := f["probability"]) is not None},
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Dice of each segment that either found (0 where one did not), and differences.

    ``dice`` is empty where neither found a segment, and where one kept no masks.
    ``differences``: of each measurement as a share of the greater value, of each probability as it is.
    ``same_findings``: the same segments occur and every classification has the same answer.
    """

    dice: Mapping[str, float]
    differences: Mapping[str, float]
    same_findings: bool

    def fields(self) -> dict[str, Any]:
        """Columns of ``model_comparisons``."""
        return {
            "dice": dict(self.dice),
            "least_dice": min(self.dice.values(), default=None),
            "differences": dict(self.differences),
            "greatest_difference": max(self.differences.values(), default=None),
            "same_findings": int(self.same_findings),
        }


def compare(one: Finding, other: Finding) -> Comparison:
    """Raises ValueError where two masks of one image do not fit upon each other."""
    dice = {}
    if one.masks is not None and other.masks is not None:
        labels = sorted(one.segments | other.segments)
        dice = {label: _dice(one.masks.get(label, {}), other.masks.get(label, {})) for label in labels}
    keys = sorted(one.measurements.keys() | other.measurements.keys())
    differences = {key: _difference(one.measurements.get(key), other.measurements.get(key)) for key in keys}
    for key in sorted(one.probabilities.keys() | other.probabilities.keys()):
        a, b = one.probabilities.get(key), other.probabilities.get(key)
        differences[key] = 1.0 if a is None or b is None else abs(a - b)
    return Comparison(dice, differences, (one.segments, one.answers) == (other.segments, other.answers))


def _apart(names: Iterable[str]) -> Iterator[str]:
    """The names, a number behind each that comes again: every image of its own is measured alike."""
    seen: dict[str, int] = {}
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name} {seen[name]}"


def _dice(a: Mapping[Plane, Mask], b: Mapping[Plane, Mask]) -> float:
    total = sum(int(mask.sum()) for side in (a, b) for mask in side.values())
    both = sum(_shared(a[plane], b[plane]) for plane in a.keys() & b.keys())
    return 2.0 * both / total if total else 1.0


def _shared(a: Mask, b: Mask) -> int:
    """Pixels that both have. An image may stand padded among larger ones; a mask there fits nowhere else."""
    rows, columns = (min(sizes) for sizes in zip(a.shape, b.shape, strict=True))
    if any(mask[rows:].any() or mask[:, columns:].any() for mask in (a, b)):
        raise ValueError(f"masks of {a.shape} and {b.shape}")
    return int((a[:rows, :columns] & b[:rows, :columns]).sum())


def _difference(a: float | None, b: float | None) -> float:
    """|a - b| as a share of the greater one, 0..2; 1 where only one version has such a number."""
    if a is None or b is None:
        return 1.0
    if a == b or (np.isnan(a) and np.isnan(b)):
        return 0.0
    if not (np.isfinite(a) and np.isfinite(b)):
        return 1.0
    return abs(a - b) / max(abs(a), abs(b))


def planes_of(uids: Sequence[str], frames: Sequence[int] = ()) -> list[Plane]:
    """The planes of an analysis or a volume: its ``source_uids`` and ``source_frames``."""
    return [(uid, int(frame)) for uid, frame in zip(uids, frames or [1] * len(uids), strict=True)]


def masks_of_labels(
    labels: npt.NDArray[np.uint8] | None, names: Mapping[int, str], planes: Sequence[Plane]
) -> dict[str, dict[Plane, Mask]]:
    """Masks from a label map whose slices are ``planes``; several numbers of one name are one mask."""
    found: dict[str, dict[Plane, Mask]] = {name: {} for name in names.values()}
    for plane, image in zip(planes, labels if labels is not None else (), strict=labels is not None):
        for number, name in names.items():
            _add(found[name], plane, image == number)
    return found


def masks_of_seg(path: Path) -> dict[str, dict[Plane, Mask]]:
    """Masks by Segment Label of a stored SEG, binary or label map (PS3.3 C.8.20).

    A frame belongs to the image, and where that has several to the frame, that its derivation names.
    Raises ValueError, KeyError or AttributeError for a SEG that is not one of this node's.
    """
    import pydicom

    ds = pydicom.dcmread(path)
    names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in ds.SegmentSequence if s.SegmentNumber}
    found: dict[str, dict[Plane, Mask]] = {name: {} for name in names.values()}
    shared = ds.SharedFunctionalGroupsSequence[0]
    frames = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
    for frame, groups in zip(frames, ds.PerFrameFunctionalGroupsSequence, strict=True):
        source = groups.DerivationImageSequence[0].SourceImageSequence[0]
        plane = (str(source.ReferencedSOPInstanceUID), int(source.get("ReferencedFrameNumber") or 1))
        if ds.SegmentationType == "LABELMAP":
            for number, name in names.items():
                _add(found[name], plane, frame == number)
            continue
        identification = groups.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence
        _add(found[names[int(identification[0].ReferencedSegmentNumber)]], plane, frame > 0)
    return found


def masks_of_segs(paths: Iterable[Path]) -> dict[str, dict[Plane, Mask]]:
    """The masks of several, as a job makes one for each image of its own."""
    found: dict[str, dict[Plane, Mask]] = {}
    for path in paths:
        for label, planes in masks_of_seg(path).items():
            for plane, mask in planes.items():
                _add(found.setdefault(label, {}), plane, mask)
    return found


def _add(planes: dict[Plane, Mask], plane: Plane, mask: Mask) -> None:
    if mask.any():
        planes[plane] = planes[plane] | mask if plane in planes else mask
