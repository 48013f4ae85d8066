"""Corrected patient and study attributes in new results, with what they were before (PS3.3 C.12.1).

The former values are those of the source images, which stay as they are: a reader of the result finds both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime

from pydicom.dataset import Dataset

from dicomnode.encode.headers import SourceHeaders
from dicomnode.errors import NodeError

REASON = "CORRECT"
"""Replaced because it was incorrect (PS3.3 C.12.1.1.9), not to fit a system's own conventions (COERCE)."""


@dataclass(frozen=True, slots=True)
class Correction:
    """``values``: DICOM keyword -> value that serves. ``changed_time``: ISO 8601. ``system``: who applies it."""

    values: Mapping[str, str] = field(default_factory=dict)
    changed_time: str = ""
    system: str = ""


def apply_correction(headers: SourceHeaders, correction: Correction | None) -> SourceHeaders:
    """``headers`` with the corrected attributes and Original Attributes Sequence; as they are where nothing differs.

    Raises ``NodeError`` where ``changed_time`` is not ISO 8601.
    """
    if correction is None:
        return headers
    former, common = Dataset(), Dataset()
    common.update(headers.common)
    for keyword, value in correction.values.items():
        before = headers.common.get(keyword)
        if str(before or "") != value:
            setattr(former, keyword, "" if before is None else before)
            setattr(common, keyword, value)
    if not len(former):
        return headers
    try:
        when = datetime.fromisoformat(correction.changed_time)
    except ValueError:
        raise NodeError("encode result", "the time of a correction is not ISO 8601") from None
    item = Dataset()
    item.SourceOfPreviousValues = ""  # Type 2: the modality, whose name is in the images
    item.AttributeModificationDateTime = when.strftime("%Y%m%d%H%M%S.%f%z")
    item.ModifyingSystem = correction.system[:64]
    item.ReasonForTheAttributeModification = REASON
    item.ModifiedAttributesSequence = [former]
    common.OriginalAttributesSequence = [item]
    said = "Patient or study attributes differ from the images: a correction that serves at the node was applied."
    return replace(headers, common=common, notes=(*headers.notes, said))
