"""A series of single images (CR, DX): each is an input of its own, or there is a plain reason why not."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dicomnode.errors import MalformedDataSet
from dicomnode.infer.contract import ProjectionContract
from dicomnode.infer.decode import Decoder, InlineDecoder, Pixels, Undecodable
from dicomnode.infer.greyscale import grey_of
from dicomnode.infer.projection_header import ProjectionHeader, read_projection_header, refusal, refuse
from dicomnode.infer.volume import Projection, ReadSlice, Volume
from dicomnode.records import SourceInstance

CONVENTION = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""Patient Orientation L\\F: a frontal image as it is looked at, the patient's left at its right."""


@dataclass(frozen=True, slots=True)
class Images:
    """``images``: one volume of one slice for each image, by Instance Number. ``excluded``: SOPInstanceUIDs
    of those that the model does not take; ``notes`` say why.
    """

    images: tuple[Volume, ...]
    excluded: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def read_projections(
    instances: Sequence[SourceInstance | Path],
    contract: ProjectionContract,
    *,
    decoder: Decoder | None = None,
    read_bytes: Callable[[Path], bytes] = Path.read_bytes,
    ahead: Mapping[str, ReadSlice] | None = None,
) -> Images:
    """Read, check, decode and scale each image; arguments as of ``volume.read_volume``.

    An image that ``contract`` does not take is left out with its reason. Raises UnsuitableSeries with that
    reason where none is left, and for one that cannot be decoded; MalformedDataSet for what is no DICOM file.
    """
    known = ahead or {}
    headers: list[tuple[ProjectionHeader, Path]] = []
    for instance in instances:
        path = instance if isinstance(instance, Path) else instance.path
        header = read_projection_header(read_bytes(path))
        if isinstance(instance, SourceInstance) and header.uid != instance.sop_instance_uid:
            raise MalformedDataSet("read image", "a file holds another SOP Instance UID than the index says")
        headers.append((header, path))
    headers.sort(key=lambda pair: (pair[0].number, pair[0].uid))
    taken, excluded, notes = _chosen(headers, contract)
    late = [(read_bytes(path), h.rows, h.columns) for h, path in taken if h.uid not in known]
    decoded = (decoder or InlineDecoder()).frames(iter(late))
    images = []
    try:
        for (h, path), name in zip(taken, _names(taken), strict=True):
            stored = _stored(h, path, known, decoded, decoder or InlineDecoder(), read_bytes)
            images.append(image_volume(h, stored, contract, name))
    except Undecodable as cause:
        raise refuse(
            cause.code, cause.text, "Ask the sender to send the image again, or in another transfer syntax"
        ) from cause
    return Images(tuple(images), excluded, notes)


def _chosen(
    headers: Sequence[tuple[ProjectionHeader, Path]], contract: ProjectionContract
) -> tuple[list[tuple[ProjectionHeader, Path]], tuple[str, ...], tuple[str, ...]]:
    taken, excluded, notes = [], [], []
    first: tuple[str, str, str] | None = None
    for h, path in headers:
        why = refusal(h, contract)
        if why is None:
            taken.append((h, path))
            continue
        first = first or why
        excluded.append(h.uid)
        notes.append(f"Image {h.number or '?'} was left out: {why[1]}")
    intents = {h.intent for h, _ in taken}
    if len(intents) > 1:  # of one exposure both forms may come in a series
        best = next(i for i in contract.intents if i in intents)
        other = [h for h, _ in taken if h.intent != best]
        taken = [(h, path) for h, path in taken if h.intent == best]
        excluded += [h.uid for h in other]
        notes += [
            f"Image {h.number or '?'} was left out: it is {h.intent.title()}; others are {best.title()}" for h in other
        ]
    if first is not None and not taken:
        more = f" (and {len(excluded) - 1} more image(s))" if len(excluded) > 1 else ""
        raise refuse(first[0], first[1] + more, first[2])
    if len({h.uid for h, _ in taken}) != len(taken):
        raise refuse("DUPLICATE_INSTANCE", "the same SOP Instance UID occurs twice in the input")
    if len({h.series_uid for h, _ in taken}) > 1:
        raise refuse("MIXED_SERIES", "the images come from more than one series")
    if not taken:
        raise refuse("NO_IMAGES", "the series has no image")
    if len(taken) > contract.max_images:
        raise refuse(
            "TOO_MANY_IMAGES",
            f"the series has {len(taken)} images; the model takes {contract.max_images}",
            "Send them as several series",
        )
    return taken, tuple(excluded), tuple(notes)


def _names(taken: Sequence[tuple[ProjectionHeader, Path]]) -> list[str]:
    """What notes call each image; nothing where it is the only one."""
    return [f"Image {index}: " for index in range(1, len(taken) + 1)] if len(taken) > 1 else [""]


def _stored(
    header: ProjectionHeader,
    path: Path,
    ahead: Mapping[str, ReadSlice],
    decoded: Iterator[Pixels],
    decoder: Decoder,
    read_bytes: Callable[[Path], bytes],
) -> Pixels:
    """Stored values: those that were read ahead, else decoded now."""
    if header.uid not in ahead:
        return next(decoded)
    values = ahead[header.uid].values()
    if values is None or values.shape != (header.rows, header.columns):
        values = next(iter(decoder.frames([(read_bytes(path), header.rows, header.columns)])))
    return values


def image_volume(header: ProjectionHeader, stored: Pixels, contract: ProjectionContract, name: str = "") -> Volume:
    """One image as a volume of one slice: grey values, directions and pixel size in the patient as far as known."""
    grey = grey_of(stored, header, contract.values)
    notes = []
    if header.orientation is None:
        notes.append(
            "the image does not state Patient Orientation; it was taken as one that is looked at from the front, "
            "the patient's left at its right"
        )
    mm = header.size.mm if header.size else header.aspect  # without a size at least the proportions
    if contract.needs_spacing and header.size:
        notes.append(f"lengths are by {header.size.source}")
    if header.relationship:
        notes.append(f"Pixel Intensity Relationship {header.relationship}")
    if contract.body_parts and not header.body_part:
        notes.append("the image does not state which part of the body it shows")
    if contract.views and not header.view:
        notes.append("the image does not state its view")
    return Volume(
        values=grey.values[np.newaxis],
        affine=projection_affine(header.orientation or CONVENTION, mm),
        spacing=(1.0, mm[0], mm[1]),
        source_uids=(header.uid,),
        notes=tuple(f"{name}{text[:1].upper()}{text[1:]}" for text in notes),
        projection=Projection(
            white=grey.white,
            facts=header.facts,
            field=header.field,
            valid=grey.valid,
            sized=header.size is not None,
            view=header.view,
            body_part=header.body_part,
            laterality=header.laterality,
        ),
    )


def projection_affine(orientation: Sequence[float], mm: tuple[float, float]) -> npt.NDArray[np.float64]:
    """(slice, row, column, 1) to directions in the patient, mm; origin and depth (1 mm) mean nothing."""
    along_row, along_column = np.array(orientation[:3], float), np.array(orientation[3:], float)
    affine = np.eye(4)
    affine[:3, 0] = np.cross(along_row, along_column)
    affine[:3, 1] = along_column * mm[0]
    affine[:3, 2] = along_row * mm[1]
    return affine
