"""Which slices show a result best. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dicomnode.records import Analysis, SegmentDefinition

MOST_KEY_SLICES = 5


def key_slices(analysis: Analysis, found: Sequence[SegmentDefinition]) -> tuple[int, ...]:
    """Slice indices, growing: for each segment the one with most of it, the first segments first.

    For findings about the whole series, such as of a radiograph, the middle slice. Empty when
    there is nothing to show.
    """
    labels = analysis.labels
    chosen: list[int] = []
    if labels is not None:
        for segment in found:
            best = int(np.argmax([np.count_nonzero(plane == segment.number) for plane in labels]))
            if best not in chosen:
                chosen.append(best)
    if not chosen and analysis.findings and analysis.source_uids:
        chosen = [len(analysis.source_uids) // 2]
    return tuple(sorted(chosen[:MOST_KEY_SLICES]))
