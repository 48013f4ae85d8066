"""From an analysis to the objects that its job was asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dicomnode.critical import Hit, critical_hits
from dicomnode.encode.common import Context, Provenance, quiet_pydicom
from dicomnode.encode.gsps import encode_gsps
from dicomnode.encode.headers import SourceHeaders, read_headers
from dicomnode.encode.keys import key_slices
from dicomnode.encode.kos import encode_kos
from dicomnode.encode.original import Correction, apply_correction
from dicomnode.encode.parts import Part, parts
from dicomnode.encode.pixels import Pixels, read_pixels
from dicomnode.encode.pm import encode_pm
from dicomnode.encode.sc import encode_key_images
from dicomnode.encode.seg import encode_labelmap, encode_seg
from dicomnode.encode.sr import Segmentation, encode_sr
from dicomnode.encode.station import Station
from dicomnode.errors import InputError, NodeError
from dicomnode.orders import LABELMAP, Order
from dicomnode.records import (
    Analysis,
    EncodedObject,
    ModelIdentity,
    ResultIdentity,
    SegmentDefinition,
    SourceInstance,
)

DEFAULT_ORDER = Order()


def encode_results(
    analysis: Analysis,
    identity: ResultIdentity,
    model: ModelIdentity,
    sources: Sequence[SourceInstance],
    *,
    station: Station,
    order: Order = DEFAULT_ORDER,
    pixels: Pixels = read_pixels,
    correction: Correction | None = None,
) -> tuple[EncodedObject, ...]:
    """The objects of one analysis that ``order`` asks for, in the order of sending, as Part 10 files.

    SEG, presentation state, key images, their selection and probability maps are made where there
    is something to show; an SR always says what was found, or that nothing was. A label map comes
    beside the binary SEG that stands in for it, with a report of its own.

    ``sources``: every instance of the analysed series, excluded ones too; their headers are
    read from their files. ``correction``: patient and study attributes that serve in their place.
    The same arguments give the same bytes, in any process. Raises
    ``NodeError`` when the arguments contradict each other, ``InputError`` when the source
    files cannot carry a result.
    """
    found = segments_with_voxels(analysis)
    untracked = {segment.number for segment in analysis.segments} - set(identity.tracking_uids)
    if untracked:
        raise NodeError("encode result", f"segments {sorted(untracked)} have no tracking UID")
    keys = key_slices(analysis, found)
    every = bool(found or keys or analysis.probability_maps or analysis.projection)
    wanted = analysis.source_uids if every else analysis.source_uids[:1]
    frames = analysis.source_frames if every else analysis.source_frames[:1]
    with quiet_pydicom():
        headers = read_headers(wanted, sources, frames, one_size=not analysis.projection)
        headers = apply_correction(headers, correction)
        provenance = Provenance.of(model, identity, analysis.engine, analysis.precision, headers.zone)
        context = Context(identity, model, provenance, headers, tuple(sources), station)
        hits = critical_hits(analysis, order.critical)
        remarks: list[str] = []
        pictures = _pictures(analysis, found, keys, context, order, pixels, hits, remarks)
        maps = _maps(analysis, context, order, remarks)
        reports = _segmentations_and_reports(analysis, found, context, order, hits, remarks)
    return (*reports, *pictures, *maps)


def _segmentations_and_reports(
    analysis: Analysis,
    found: Sequence[SegmentDefinition],
    context: Context,
    order: Order,
    hits: Sequence[Hit],
    remarks: Sequence[str],
) -> list[EncodedObject]:
    """Each segmentation before the report that refers to it."""
    out: list[EncodedObject] = []

    def report(segmentations: Sequence[Segmentation], variant: str) -> None:
        if "SR" in order.made:
            out.append(
                encode_sr(
                    analysis,
                    found,
                    context,
                    segmentations=segmentations,
                    variant=variant,
                    hits=hits,
                    remarks=remarks,
                )
            )

    segmentations: list[Segmentation] = []
    if found and "SEG" in order.made:
        each = [(p, _fitting_labels(p.analysis, p.context.headers)) for p in parts(analysis, found, context)]
        if order.labelmap:
            maps = [encode_labelmap(labels, p.found, p.context) for p, labels in each]
            out += maps
            report([_of(m, p, one_frame=True) for m, (p, _) in zip(maps, each, strict=True)], LABELMAP)
        for part, labels in each:
            out.append(encode_seg(labels, part.found, part.context))
            segmentations.append(_of(out[-1], part))
    report(segmentations, "plain" if found and not segmentations else "")
    return out


def _pictures(
    analysis: Analysis,
    found: Sequence[SegmentDefinition],
    keys: Sequence[int],
    context: Context,
    order: Order,
    pixels: Pixels,
    hits: Sequence[Hit],
    remarks: list[str],
) -> list[EncodedObject]:
    """GSPS, SC and KOS. An image that cannot be shown costs its picture, not the result: ``remarks`` say so."""
    out: list[EncodedObject] = []
    images: list[EncodedObject] = []
    if not keys:
        return out
    if "GSPS" in order.made and found:
        try:
            out += [
                encode_gsps(p.analysis, p.found, p.key(keys), p.context, p.variant)
                for p in parts(analysis, found, context)
            ]
        except InputError as error:
            remarks.append(f"No presentation state could be made: {error.cause}.")
    if "SC" in order.made:
        try:
            images = encode_key_images(analysis, found, keys, context, pixels, hits)
        except InputError as error:
            remarks.append(f"No key image could be made: {error.cause}.")
        out += images
    if "KOS" in order.made:
        try:
            out.append(encode_kos(keys, images if order.together("KOS", "SC") else [], context))
        except InputError as error:
            remarks.append(f"No selection of key images could be made: {error.cause}.")
    return out


def _maps(analysis: Analysis, context: Context, order: Order, remarks: list[str]) -> list[EncodedObject]:
    if "PM" not in order.made:
        return []
    try:
        return [encode_pm(one, context) for one in analysis.probability_maps]
    except InputError as error:
        remarks.append(f"No probability map could be made: {error.cause}.")
        return []


def _of(encoded: EncodedObject, part: Part, *, one_frame: bool = False) -> Segmentation:
    return Segmentation(
        encoded.sop_class_uid,
        encoded.sop_instance_uid,
        encoded.series_instance_uid,
        {segment.number: position for position, segment in enumerate(part.found, start=1)},
        one_frame,
    )


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
    present = analysis.numbers_found()
    undefined = present - {segment.number for segment in analysis.segments}
    if undefined:
        raise NodeError("encode SEG", f"labels {sorted(undefined)} have no segment definition")
    return tuple(sorted((s for s in analysis.segments if s.number in present), key=lambda segment: segment.number))
