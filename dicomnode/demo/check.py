"""What came back, measured against what is true. No I/O but for the validator."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dicomnode.demo.objects import Number, Placed, place_seg, read_numbers, volume_affine
from dicomnode.demo.phantom import LungTruth, Phantom

VOLUME_PERCENT = 3.0
"""The model cuts the lung at the hilum and closes vessels by its own rules, the truth by the
pleural surface; on a surface of about 1300 cm2 half a voxel of 0.7 mm is 1.5 %."""
MEAN_HU = 12.0
SHARE_POINTS = 1.0
DICE = 0.97
TILT_DEGREES = 1.0


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that has to be right: what was found, what was wanted."""

    what: str
    found: str
    wanted: str
    ok: bool

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Comparison:
    """One number of the report beside the truth; ``limit`` is in ``unit`` or in percent."""

    structure: str
    quantity: str
    unit: str
    measured: float
    true: float
    difference: float
    limit: float
    relative: bool

    @property
    def ok(self) -> bool:
        return abs(self.difference) <= self.limit

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}


_QUANTITIES = {
    "118565006 SCT": ("volume", VOLUME_PERCENT, True),
    "112031 DCM": ("mean density", MEAN_HU, False),
    "LAA950 99DICOMNODE": ("below -950 HU", SHARE_POINTS, False),
}


def true_value(quantity: str, truth: LungTruth) -> float:
    if quantity == "volume":
        return truth.volume_ml
    if quantity == "mean density":
        return truth.mean_hu
    return 100.0 * truth.voxels_below_950 / max(truth.voxels, 1)


def compare(numbers: list[Number], labels: Mapping[int, str], truth: Mapping[int, LungTruth]) -> list[Comparison]:
    """The report's numbers beside the phantom's truth; ``labels``: SegmentNumber -> SegmentLabel."""
    by_name = {t.name.casefold(): t for t in truth.values()}
    found = []
    for number in numbers:
        known = by_name.get(labels.get(number.segment or 0, "").casefold())
        if known is None or number.code not in _QUANTITIES:
            continue
        quantity, limit, relative = _QUANTITIES[number.code]
        true = true_value(quantity, known)
        difference = number.value - true
        if relative:
            difference = 100.0 * difference / true if true else float("inf")
        unit = {"[hnsf'U]": "HU"}.get(number.unit, number.unit)
        found.append(Comparison(known.name, quantity, unit, number.value, true, difference, limit, relative))
    return found


def compare_tilt(numbers: list[Number], leaning: float) -> list[Comparison]:
    """The tilt in the report of a radiograph beside the angle by which the phantom leans, degrees."""
    return [
        Comparison("chest", "tilt", "deg", n.value, leaning, n.value - leaning, TILT_DEGREES, relative=False)
        for n in numbers
        if n.code == "CXRTILT 99DICOMNODE"
    ]


def phantom_affine(phantom: Phantom) -> Any:
    return volume_affine(phantom.position(0), (1, 0, 0, 0, 1, 0), phantom.spacing)


def check_phantom(seg: Any, sr: Any, phantom: Phantom) -> tuple[Placed, list[Comparison], list[Check]]:
    """Everything that is known of the phantom against the SEG and the SR that came back."""
    placed = place_seg(seg, phantom_affine(phantom), phantom.hu.shape)
    labels = {s.number: s.label for s in placed.segments}
    comparisons = compare(read_numbers(sr), labels, phantom.truth)
    checks = [
        Check(
            "SR numbers",
            f"{len(comparisons)} compared, {sum(c.ok for c in comparisons)} right",
            f"{len(phantom.truth) * len(_QUANTITIES)} right",
            len(comparisons) == len(phantom.truth) * len(_QUANTITIES) and all(c.ok for c in comparisons),
        )
    ]
    for truth in phantom.truth.values():
        numbers = [s.number for s in placed.segments if s.label.casefold() == truth.name.casefold()]
        score = dice(np.isin(placed.labels, numbers), phantom.labels == truth.label)
        checks.append(
            Check(
                f"SEG overlap, {truth.name}", f"Dice {score:.4f}", f"at least {DICE}", bool(numbers) and score >= DICE
            )
        )
    return placed, comparisons, checks


def dice(a: Any, b: Any) -> float:
    """Twice the overlap over the sum of both sizes; 0 for two empty masks: nothing was found."""
    total = int(np.count_nonzero(a)) + int(np.count_nonzero(b))
    return 2.0 * int(np.count_nonzero(a & b)) / total if total else 0.0


def check_validity(paths: list[Path]) -> Check | None:
    """Errors that dicom3tools' dciodvfy finds; None when it is not installed."""
    program = shutil.which("dciodvfy")
    if program is None or not paths:
        return None
    errors = []
    for path in paths:
        run = subprocess.run([program, "-new", str(path)], capture_output=True, timeout=60, check=False)
        lines = (run.stderr + run.stdout).decode(errors="replace").splitlines()
        errors += [line for line in lines if line.startswith("Error")]
    return Check(
        "valid DICOM (dciodvfy)", f"{len(errors)} errors" + (f": {errors[0]}" if errors else ""), "none", not errors
    )
