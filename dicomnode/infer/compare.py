"""What two versions of a model made of one series, set side by side. Pure, but for reading the SEG.

Segments are matched by label and measurements by segment label and key, so versions that number
their segments otherwise still compare.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one version found.

    ``masks``: by segment label, boolean (slices, rows, columns) in the order of the series'
    instances; ``measurements``: by ``segment label.key``.
    """

    masks: Mapping[str, Mask]
    measurements: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Dice of each segment that either found (0 where one did not), relative difference of each measurement."""

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
    """Raises ValueError where the masks do not have one shape."""
    found = {k for k, m in one.masks.items() if m.any()}, {k for k, m in other.masks.items() if m.any()}
    labels = sorted(found[0] | found[1])
    dice = {label: _dice(one.masks.get(label), other.masks.get(label)) for label in labels}
    keys = sorted(one.measurements.keys() | other.measurements.keys())
    differences = {key: _difference(one.measurements.get(key), other.measurements.get(key)) for key in keys}
    return Comparison(dice, differences, found[0] == found[1])


def _dice(a: Mask | None, b: Mask | None) -> float:
    if a is None or b is None:
        return 0.0
    if a.shape != b.shape:
        raise ValueError(f"masks of {a.shape} and {b.shape}")
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else 1.0


def _difference(a: float | None, b: float | None) -> float:
    """|a - b| as a share of the greater one, 0..2; 1 where only one version has such a number."""
    if a is None or b is None:
        return 1.0
    if a == b or (np.isnan(a) and np.isnan(b)):
        return 0.0
    if not (np.isfinite(a) and np.isfinite(b)):
        return 1.0
    return abs(a - b) / max(abs(a), abs(b))


def masks_of_labels(
    labels: npt.NDArray[np.uint8], names: Mapping[int, str], uids: Sequence[str], order: Sequence[str]
) -> dict[str, Mask]:
    """Masks from a label map whose slices are ``uids``, in ``order``; instances it left out are empty."""
    place = {uid: index for index, uid in enumerate(order)}
    rows = [place[uid] for uid in uids]
    found: dict[str, Mask] = {}
    for number, name in names.items():
        mask = np.zeros((len(order), *labels.shape[1:]), np.bool_)
        mask[rows] = labels == number
        found[name] = mask
    return found


def masks_of_seg(path: Path, order: Sequence[str]) -> dict[str, Mask]:
    """Masks by Segment Label of a stored SEG, binary or label map (PS3.3 C.8.20), in ``order``.

    A frame belongs to the instance that its derivation names. Raises ValueError, KeyError or
    AttributeError for a SEG that is not one of this node's.
    """
    import pydicom

    ds = pydicom.dcmread(path)
    names = {int(s.SegmentNumber): str(s.SegmentLabel) for s in ds.SegmentSequence}
    place = {uid: index for index, uid in enumerate(order)}
    frames = ds.pixel_array.reshape(-1, ds.Rows, ds.Columns)
    shape = (len(order), int(ds.Rows), int(ds.Columns))
    found = {name: np.zeros(shape, np.bool_) for number, name in names.items() if number}
    shared = ds.SharedFunctionalGroupsSequence[0]
    for frame, groups in zip(frames, ds.PerFrameFunctionalGroupsSequence, strict=True):
        uid = str(groups.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID)
        if ds.SegmentationType == "LABELMAP":
            for number, name in names.items():
                if number:
                    found[name][place[uid]] |= frame == number
            continue
        identification = groups.get("SegmentIdentificationSequence") or shared.SegmentIdentificationSequence
        found[names[int(identification[0].ReferencedSegmentNumber)]][place[uid]] |= frame > 0
    return found
