"""Enhanced multi-frame sources (PS3.3 C.7.6.16): each analysed frame as if it were an image.

While objects are built, a frame stands under a UID derived from its instance and number, so that
the library, which thinks in single images, keeps frames apart. :func:`name_frames` then puts
instance and frame number in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pydicom
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from dicomnode.errors import MalformedDataSet, StorageError, UnsuitableSeries
from dicomnode.functional_groups import flat
from dicomnode.identity import derived_uid
from dicomnode.records import SourceInstance

OPERATION = "read source headers"
Frames = Mapping[str, tuple[str, int, str]]
"""Stand-in UID -> SOPInstanceUID, frame number from 1, SOPClassUID."""

_STAND_IN_CLASS = {"MR": "1.2.840.10008.5.1.4.1.1.4", "PT": "1.2.840.10008.5.1.4.1.1.128"}
_CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"


def stand_in(uid: str, frame: int) -> str:
    """UID under which one frame of an instance is handled while objects are built."""
    return derived_uid(uid, "frame", str(frame))


def read_frames(source: SourceInstance, frames: Sequence[int]) -> list[Dataset]:
    """Headers of ``frames`` (numbers from 1), flat as those of single-frame images.

    Raises ``StorageError``, ``MalformedDataSet``, or ``UnsuitableSeries`` (NO_SUCH_FRAME).
    """
    try:
        ds = pydicom.dcmread(source.path, stop_before_pixels=True)
    except OSError as error:
        raise StorageError(OPERATION, f"a source file cannot be opened ({error.strerror})") from None
    except (InvalidDicomError, EOFError, ValueError) as error:
        raise MalformedDataSet(OPERATION, f"a source file cannot be read ({type(error).__name__})") from None
    return [flat_frame(ds, number) for number in frames]


def flat_frame(ds: Dataset, number: int) -> Dataset:
    """One frame's attributes at the top level, the frame's own group before the shared one."""
    count = int(ds.get("NumberOfFrames") or 1)
    if not 1 <= number <= count:
        raise UnsuitableSeries(OPERATION, "NO_SUCH_FRAME", f"frame {number} of an instance with {count}")
    out: Dataset = flat(ds, number)
    out.SOPInstanceUID = stand_in(str(ds.SOPInstanceUID), number)
    # By its class the library would know that there is more than one frame.
    out.SOPClassUID = _STAND_IN_CLASS.get(str(ds.get("Modality")), _CT_IMAGE)
    return out


def name_frames(ds: Dataset, frames: Frames) -> None:
    """Replace stand-ins by instance and frame number wherever ``ds`` refers to them."""
    if not frames:
        return
    for element in ds:
        if element.VR != "SQ":
            continue
        _name(element.value, frames)
        for item in element.value:
            name_frames(item, frames)
        if element.keyword in ("ReferencedInstanceSequence", "ReferencedSOPSequence", "ReferencedImageSequence"):
            ds[element.tag].value = _together(element.value)


def _name(items: Sequence[Dataset], frames: Frames) -> None:
    for item in items:
        known = frames.get(str(item.get("ReferencedSOPInstanceUID", "")))
        if known:
            item.ReferencedSOPInstanceUID = known[0]
            item.ReferencedFrameNumber = known[1]
            item.ReferencedSOPClassUID = known[2]


def _together(items: Sequence[Dataset]) -> list[Dataset]:
    """One reference for each instance with all its frame numbers, in the order of the items."""
    found: dict[str, Dataset] = {}
    for item in items:
        uid = str(item.get("ReferencedSOPInstanceUID", ""))
        if "ReferencedFrameNumber" not in item or uid not in found:
            found[uid or str(len(found))] = item
            continue
        numbers = found[uid].ReferencedFrameNumber
        numbers = [numbers] if isinstance(numbers, int) else list(numbers)
        added = item.ReferencedFrameNumber
        numbers += [n for n in ([added] if isinstance(added, int) else list(added)) if n not in numbers]
        found[uid].ReferencedFrameNumber = numbers
    return list(found.values())
