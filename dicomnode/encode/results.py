"""From an analysis to the objects that are delivered: SEG where something was found, and SR."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dicomnode.encode.common import Context, Provenance, quiet_pydicom
from dicomnode.encode.headers import SourceHeaders, read_headers
from dicomnode.encode.seg import encode_seg
from dicomnode.encode.sr import encode_sr
from dicomnode.encode.station import Station
from dicomnode.errors import NodeError
from dicomnode.records import (
    Analysis,
    EncodedObject,
    ModelIdentity,
    ResultIdentity,
    SegmentDefinition,
    SourceInstance,
)


def encode_results(
    analysis: Analysis,
    identity: ResultIdentity,
    model: ModelIdentity,
    sources: Sequence[SourceInstance],
    *,
    station: Station,
) -> tuple[EncodedObject, ...]:
    """SEG (unless nothing was found) and SR of one analysis, in this order, as Part 10 files.

    ``sources``: every instance of the analysed series, excluded ones too; their headers are
    read from their files. The same arguments give the same bytes, in any process. Raises
    ``NodeError`` when the arguments contradict each other, ``InputError`` when the source
    files cannot carry a result.
    """
    found = segments_with_voxels(analysis)
    untracked = {segment.number for segment in analysis.segments} - set(identity.tracking_uids)
    if untracked:
        raise NodeError("encode result", f"segments {sorted(untracked)} have no tracking UID")
    wanted = analysis.source_uids if found else analysis.source_uids[:1]
    with quiet_pydicom():
        headers = read_headers(wanted, sources)
        provenance = Provenance.of(model, identity, analysis.engine, analysis.precision)
        context = Context(identity, model, provenance, headers, tuple(sources), station)
        objects = []
        if found:
            objects.append(encode_seg(_fitting_labels(analysis, headers), found, context))
        objects.append(encode_sr(analysis, found, context))
    return tuple(objects)


def _fitting_labels(analysis: Analysis, headers: SourceHeaders) -> npt.NDArray[np.uint8]:
    labels = analysis.labels
    assert labels is not None
    size = (int(headers.slices[0].Rows), int(headers.slices[0].Columns))
    if labels.shape[1:] != size:
        raise NodeError("encode SEG", f"labels of {labels.shape[1:]} on images of {size}")
    return labels


def segments_with_voxels(analysis: Analysis) -> tuple[SegmentDefinition, ...]:
    """The defined segments that occur in ``labels``, by number.

    Raises ``NodeError`` when the labels have another type, shape or value than they should.
    """
    labels = analysis.labels
    if labels is None:
        return ()
    if labels.dtype != np.uint8 or labels.ndim != 3 or labels.shape[0] != len(analysis.source_uids) or not labels.size:
        raise NodeError("encode SEG", f"labels are {labels.dtype} {labels.shape}", "one uint8 plane per slice")
    data = labels.tobytes()  # a byte search is far faster and smaller than a histogram
    present = {number for number in range(1, int(labels.max()) + 1) if data.find(number) >= 0}
    undefined = present - {segment.number for segment in analysis.segments}
    if undefined:
        raise NodeError("encode SEG", f"labels {sorted(undefined)} have no segment definition")
    return tuple(sorted((s for s in analysis.segments if s.number in present), key=lambda segment: segment.number))
