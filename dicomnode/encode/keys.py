"""Which slices show a result best. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dicomnode.critical import is_positive
from dicomnode.records import Analysis, SegmentDefinition

MOST_KEY_SLICES = 5


def key_slices(analysis: Analysis, found: Sequence[SegmentDefinition]) -> tuple[int, ...]:
    """Slice indices, growing: for each segment the one with most of it, the first segments first.

    For findings about the whole series the middle slice; of images that were analysed by
    themselves those with a positive answer, else those with any. Empty when there is nothing to show.
    """
    labels = analysis.labels
    chosen: list[int] = []
    if analysis.projection:
        answered = [f for f in analysis.findings if f.image is not None]
        of_images = [f.image for f in answered if is_positive(f)] or [f.image for f in answered]
        chosen = list(dict.fromkeys(image for image in of_images if image is not None))
    if labels is not None:
        for segment in found:
            best = int(np.argmax([np.count_nonzero(plane == segment.number) for plane in labels]))
            if best not in chosen:
                chosen.append(best)
    if not chosen and analysis.findings and analysis.source_uids:
        chosen = [len(analysis.source_uids) // 2]
    return tuple(sorted(chosen[:MOST_KEY_SLICES]))
