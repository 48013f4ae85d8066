"""Enhanced multi-frame images (PS3.3 A.38, A.36) as a stack of single frames.

A model that takes CT or MR images takes the frames of their enhanced forms: the same units and
geometry, said in functional groups (PS3.3 C.7.6.16). Frames go to the decoder one by one, each as
a file of its own, so that a large object is spread over the cores and a codec's crash stays there.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Sequence
from typing import Any

from dicomnode.errors import MalformedDataSet, UnsuitableSeries
from dicomnode.functional_groups import PER_FRAME, SHARED, flat

SINGLE_FRAME_CLASS = {
    "1.2.840.10008.5.1.4.1.1.2.1": "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.2.2": "1.2.840.10008.5.1.4.1.1.2",
    "1.2.840.10008.5.1.4.1.1.4.1": "1.2.840.10008.5.1.4.1.1.4",
    "1.2.840.10008.5.1.4.1.1.4.4": "1.2.840.10008.5.1.4.1.1.4",
}
"""Enhanced and Legacy Converted Enhanced CT and MR -> the class of their frames."""

_INSTANCE = 0x00080018
GROUP_TAGS = (SHARED, PER_FRAME)
_PIXEL = (
    "SOPClassUID", "SOPInstanceUID", "SamplesPerPixel", "PhotometricInterpretation", "Rows", "Columns",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip


def frame_uid(uid: str, number: int) -> str:
    """Name of a frame, from 1, while the stack is planned; no UID contains the sign."""
    return f"{uid}#{number}"


def split_frame_uid(uid: str) -> tuple[str, int]:
    """SOPInstanceUID, and the frame number or 0."""
    whole, _, number = uid.partition("#")
    return whole, int(number or 0)


def flatten(ds: Any, sop_classes: Collection[str]) -> list[Any]:
    """One data set with the attributes of a single-frame image for each frame of ``ds``.

    The class is the single-frame one where ``sop_classes``, those that the model takes, have not
    the enhanced one. Raises MalformedDataSet when frames and functional groups differ in number.
    """
    from pydicom.config import IGNORE
    from pydicom.dataelem import DataElement

    own = ds.get(PER_FRAME) or []
    if len(own) != int(ds.get("NumberOfFrames") or 1):
        raise MalformedDataSet("read series", "a multi-frame image does not describe each of its frames")
    found = []
    own_class = str(ds.SOPClassUID)
    for number in range(1, len(own) + 1):
        out = flat(ds, number)
        kind = list(out.get("FrameType") or ds.get("ImageType") or [])
        out.pop("ImageType", None)  # the element that frames share stays as it is
        out.ImageType = kind
        out.SOPClassUID = own_class if own_class in sop_classes else SINGLE_FRAME_CLASS[own_class]
        # Not judged as a UID, which it is not
        out.add(DataElement(_INSTANCE, "UI", frame_uid(str(ds.SOPInstanceUID), number), validation_mode=IGNORE))
        found.append(out)
    return found


def single_frames(part10: bytes, numbers: Sequence[int]) -> list[bytes]:
    """Part 10 files with one frame each, its code stream as it is; no codec is involved.

    Raises UnsuitableSeries (DECODE_FAILED) where a frame is not there.
    """
    from pydicom import dcmread
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate, generate_frames

    try:
        ds = dcmread(io.BytesIO(part10), force=False)
        syntax = ds.file_meta.TransferSyntaxUID
        count = int(ds.get("NumberOfFrames") or 1)
        if syntax.is_encapsulated:
            every = list(generate_frames(ds.PixelData, number_of_frames=count))
            values = [encapsulate([every[n - 1]]) for n in numbers]
        else:
            size = int(ds.Rows) * int(ds.Columns) * int(ds.SamplesPerPixel) * int(ds.BitsAllocated) // 8
            values = [ds.PixelData[(n - 1) * size : n * size] for n in numbers]
        out = []
        for value in values:
            one = Dataset()
            one.file_meta = FileMetaDataset()
            one.file_meta.TransferSyntaxUID = syntax
            for keyword in _PIXEL:
                if keyword in ds:
                    one[keyword] = ds[keyword]
            one.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
            one.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
            one.PixelData = value + b"\0" * (len(value) % 2)  # one that is too short does not decode
            one["PixelData"].VR = ds["PixelData"].VR
            one["PixelData"].is_undefined_length = bool(syntax.is_encapsulated)
            buffer = io.BytesIO()
            one.save_as(buffer, enforce_file_format=True)
            out.append(buffer.getvalue())
    except Exception as cause:
        raise UnsuitableSeries(
            "decode pixel data", "DECODE_FAILED", f"frames cannot be told apart ({type(cause).__name__})"
        ) from cause
    return out
