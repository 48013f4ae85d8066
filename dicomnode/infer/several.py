"""What was found in each image of a series as one analysis. Pure.

Each image keeps its own segments, measurements and findings, told apart by ``image``; the label map holds
all of them under numbers of their own, since one SEG series and one report are made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from dicomnode.infer.projection_header import refuse
from dicomnode.infer.projections import Images
from dicomnode.records import Analysis

MOST_NUMBERS = 255


def merge(analyses: Sequence[Analysis], images: Images) -> Analysis:
    """``analyses``: of each of ``images.images``, in their order, at least one. Raises UnsuitableSeries
    (TOO_MANY_IMAGES) where the segments of all of them have no room in a label map.
    """
    first = analyses[0]
    per_image = max((s.number for s in first.segments), default=0)
    if per_image * len(analyses) > MOST_NUMBERS:
        raise refuse(
            "TOO_MANY_IMAGES",
            f"the series has {len(analyses)} images with {per_image} structures each; {MOST_NUMBERS} is the limit",
            "Send them as several series",
        )
    own = [_of_image(one, index, per_image * index) for index, one in enumerate(analyses)]
    many = len(own) > 1
    seconds = {step: sum(a.seconds.get(step, 0.0) for a in own) for step in first.seconds}
    return replace(
        first,
        labels=_labels(own, per_image) if first.labels is not None else None,
        source_uids=tuple(uid for a in own for uid in a.source_uids),
        segments=tuple(
            replace(s, label=f"{s.label}, image {i + 1}") if many and i else s
            for i, a in enumerate(own)
            for s in a.segments
        ),
        measurements=tuple(m for a in own for m in a.measurements),
        findings=tuple(f for a in own for f in a.findings),
        notes=(*images.notes, *(_named(note, i, many) for i, a in enumerate(own) for note in a.notes)),
        excluded_uids=images.excluded,
        seconds=seconds,
        projection=True,
    )


def _of_image(one: Analysis, image: int, shift: int) -> Analysis:
    return replace(
        one,
        segments=tuple(replace(s, number=s.number + shift, image=image) for s in one.segments),
        measurements=tuple(
            replace(m, image=image, segment=None if m.segment is None else m.segment + shift) for m in one.measurements
        ),
        findings=tuple(replace(f, image=image) for f in one.findings),
    )


def _named(note: str, image: int, many: bool) -> str:
    return note if not many or note.startswith("Image ") else f"Image {image + 1}: {note}"


def _labels(own: Sequence[Analysis], per_image: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """As large as the largest image in each direction."""
    planes = [a.labels[0] for a in own if a.labels is not None]
    out = np.zeros((len(planes), max(p.shape[0] for p in planes), max(p.shape[1] for p in planes)), np.uint8)
    for index, plane in enumerate(planes):
        out[index, : plane.shape[0], : plane.shape[1]] = np.where(plane, plane + np.uint8(per_image * index), 0)
    return out
