"""What has one segmentation and one presentation state: a volume, or each image of its own. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dicomnode.encode.common import Context
from dicomnode.identity import derived_uid
from dicomnode.records import Analysis, SegmentDefinition


@dataclass(frozen=True, slots=True)
class Part:
    """``found`` in the order in which its segmentation numbers them; ``variant`` sets UIDs apart."""

    analysis: Analysis
    context: Context
    found: tuple[SegmentDefinition, ...]
    variant: str = ""

    def key(self, keys: Sequence[int]) -> int:
        """The slice that shows the part best."""
        return 0 if self.analysis.projection else keys[0]


def parts(analysis: Analysis, found: Sequence[SegmentDefinition], context: Context) -> list[Part]:
    """The whole series; for projections each image with a segment, its labels cut to its own size.

    A projection lies in no common space with another (no Frame of Reference), so no object holds
    frames of two.
    """
    if not analysis.projection:
        return [Part(analysis, context, tuple(found))]
    out = []
    for index, image in enumerate(context.headers.slices):
        on_it = tuple(s for s in found if s.image == index)
        if not on_it or analysis.labels is None:
            continue
        rows, columns = int(image.Rows), int(image.Columns)
        own = replace(
            analysis,
            labels=np.ascontiguousarray(analysis.labels[index : index + 1, :rows, :columns]),
            source_uids=analysis.source_uids[index : index + 1],
            segments=tuple(s for s in analysis.segments if s.image == index),
        )
        variant = f"image {index}" if index else ""
        identity = context.identity
        if variant:
            identity = replace(identity, seg_uid=derived_uid(identity.seg_uid, variant))
        headers = replace(context.headers, slices=(image,))
        out.append(Part(own, replace(context, headers=headers, identity=identity), on_it, variant))
    return out
