"""Measurements and findings as the summary of a job holds them, in JSON. Pure."""

from __future__ import annotations

from typing import Any

from dicomnode.critical import is_positive
from dicomnode.records import Analysis, Finding, Measurement


def part_of(one: Measurement, analysis: Analysis) -> str | None:
    """Label of what was measured: a segment, or one of several images; None for the whole series, or its only image."""
    if one.segment is not None:
        return next((s.label for s in analysis.segments if s.number == one.segment), None)
    return f"image {one.image + 1}" if one.image is not None and len(analysis.source_uids) > 1 else None


def measurement(one: Measurement, analysis: Analysis) -> dict[str, Any]:
    return {"key": one.key, "segment": part_of(one, analysis), "value": one.value, "unit": one.unit.value}


def finding(one: Finding) -> dict[str, Any]:
    answer = one.value.meaning if one.value else None
    return {
        "key": one.key,
        "answer": answer,
        "code": one.value.value if one.value else None,
        "positive": is_positive(one),
        "probability": one.probability,
        "threshold": one.threshold,
    }


def summary_of(analysis: Analysis) -> dict[str, Any]:
    """What was found, for people and for comparisons."""
    return {
        "segments": labels_found(analysis),
        "measurements": [measurement(m, analysis) for m in analysis.measurements],
        "findings": [finding(f) for f in analysis.findings],
    }


def labels_found(analysis: Analysis) -> list[str]:
    """Labels of the segments that occur."""
    found = analysis.numbers_found()
    return [s.label for s in analysis.segments if s.number in found]
