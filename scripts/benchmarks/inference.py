"""Inference: the worker's overhead, SEG encoding, agreement of engines and, on a GPU, the engines side by side."""

from __future__ import annotations

from benchmarks import agreement, gpu, overhead, seg_encoding
from benchmarks.report import Section
from benchmarks.subjects import chest, random_ones, shipped
from benchmarks.tools import Bench, say


def joined(parts: dict[str, Section]) -> Section:
    """One section of several; samples by part."""
    whole = Section()
    for name, part in parts.items():
        whole.tables += part.tables
        whole.goals += part.goals
        whole.samples[name] = part.samples
    return whole


def run(bench: Bench) -> Section:
    volume, what = chest(bench)
    say.print(f"inference on: {what}")
    lungs = shipped(bench, volume)
    every = [*lungs, *random_ones(bench, volume)]
    return joined(
        {
            "overhead": overhead.measure(bench, every),
            "seg": seg_encoding.measure(bench),
            "agreement": agreement.measure(bench, lungs),
            "gpu": gpu.measure(bench, every),
        }
    )
