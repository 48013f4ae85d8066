"""Which findings and measurements of an analysis are critical by the rules' conditions. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dicomnode.orders import Condition
from dicomnode.records import Analysis, Finding, Measurement

PRESENT = ("52101004", "SCT")  # CID 240
ABSENT = (("272519000", "SCT"), ("2667000", "SCT"), ("373068000", "SCT"))
"""Absent as an observation and as a qualifier, and Undetermined."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A condition that was met; ``text`` says by what, for the reader of the report."""

    key: str
    text: str


def critical_hits(analysis: Analysis, conditions: Iterable[Condition]) -> tuple[Hit, ...]:
    """Every condition that the analysis meets, in the order of the conditions."""
    hits: list[Hit] = []
    for condition in conditions:
        hits += _measured(analysis, condition)
        hits += [
            Hit(condition.key, f"{finding.name.meaning}: {_shown(finding)}")
            for finding in analysis.findings
            if finding.key == condition.key and _finding_meets(finding, condition)
        ]
    return tuple(hits)


def unknown_keys(analysis: Analysis, conditions: Iterable[Condition]) -> tuple[str, ...]:
    """Keys that nothing in the analysis has: misspelt, or of a segment that was not found."""
    known = {m.key for m in analysis.measurements} | {f.key for f in analysis.findings}
    return tuple(dict.fromkeys(c.key for c in conditions if c.key not in known))


def _measured(analysis: Analysis, condition: Condition) -> Sequence[Hit]:
    if condition.value:
        return ()
    labels = {s.number: s.label for s in analysis.segments}
    several = len(analysis.source_uids) > 1

    def whole(m: Measurement) -> str:
        return f"image {m.image + 1}" if several and m.image is not None else "the series"

    return [
        Hit(
            condition.key,
            f"{m.name.meaning} of {labels.get(m.segment or 0) or whole(m)}: {m.value:.6g} {m.unit.value}",
        )
        for m in analysis.measurements
        if m.key == condition.key and within(m.value, condition)
    ]


def is_positive(finding: Finding) -> bool:
    """Present by its coded value; by its probability where the value is none of Present and Absent."""
    if finding.value is not None and (finding.value.value, finding.value.scheme) in (PRESENT, *ABSENT):
        return (finding.value.value, finding.value.scheme) == PRESENT
    if finding.probability is None or finding.threshold is None:
        return finding.value is not None
    return finding.probability >= finding.threshold


def _finding_meets(finding: Finding, condition: Condition) -> bool:
    if condition.value == "*":
        return is_positive(finding)
    if condition.value:
        wanted = condition.value.casefold()
        return finding.value is not None and wanted in (
            finding.value.value.casefold(),
            finding.value.meaning.casefold(),
        )
    return finding.probability is not None and within(finding.probability, condition)


def within(value: float, condition: Condition) -> bool:
    """Inclusive; NaN and infinite values are within nothing."""
    return (
        math.isfinite(value)
        and (condition.minimum is None or value >= condition.minimum)
        and (condition.maximum is None or value <= condition.maximum)
    )


def _shown(finding: Finding) -> str:
    parts = [finding.value.meaning] if finding.value else []
    parts += [f"probability {finding.probability:.3g}"] if finding.probability is not None else []
    return ", ".join(parts) or finding.text or "found"
