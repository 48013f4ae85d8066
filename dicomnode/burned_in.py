"""Whether a picture made from an image may show who it is of: what the image says, and of what kind it is. Pure.

Burned In Annotation (0028,0301) is optional in most classes (PS3.3 C.7.6.1) and missing from most CT. PS3.15
E.3.1 notes that CT images do not normally contain such annotation, whereas ultrasound images routinely do; the
filters of those who share images in number (RSNA CTP, Stanford) take original primary slices and leave out
screens, dose reports, localizers and all that is derived or secondary. The same table is here; it is a
convention and no proof, so an operator has to ask for it (``cloud.key_images``).
"""

from __future__ import annotations

from enum import StrEnum

from pydicom.dataset import Dataset

_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.128": "PT",
}
"""Single-frame slices; their enhanced classes demand Burned In Annotation NO themselves."""

_SUSPECT = (
    *("SCREEN", "SAVE", "CAPTURE", "SECONDARY", "DERIVED", "LOCALIZER", "SCOUT", "TOPO", "REPORT", "DOSE", "PROTOCOL"),
    *("OVERLAY", "ANNOT", "GRAPH", "TEXT", "PASTED", "COLLAGE", "POSDISP", "REFORMAT", "3D", "VOLREN"),
)
"""Parts of further values of Image Type that vendors give to what is no plain slice."""


class Shows(StrEnum):
    """Of an image: whether identity may be in its pixels."""

    no = "NO"  # it says so
    yes = "YES"
    primary = "primary"  # it does not say; it is an original slice of a kind that conventionally shows none
    unsaid = "unsaid"


def shows(ds: Dataset) -> Shows:
    """``ds``: header of an image or, of a multi-frame one, its own (not a frame's)."""
    said = str(ds.get("BurnedInAnnotation") or "").strip().upper()
    if said in (Shows.no, Shows.yes):
        return Shows(said)
    return Shows.primary if not said and _plain_slice(ds) else Shows.unsaid


def _plain_slice(ds: Dataset) -> bool:
    modality = _CLASSES.get(str(ds.get("SOPClassUID") or ""))
    if modality is None or str(ds.get("Modality") or "") != modality or ds.get("ConversionType"):
        return False
    if str(ds.get("NumberOfFrames") or "1").strip() != "1" or str(ds.get("RecognizableVisualFeatures") or "") == "YES":
        return False
    value = ds.get("ImageType")
    kinds = [str(v).strip().upper() for v in ([value] if isinstance(value, str) else value or ())]
    if kinds[:2] != ["ORIGINAL", "PRIMARY"] or (modality == "CT" and kinds[2:3] not in ([], [""], ["AXIAL"])):
        return False
    return not any(word in kind for kind in kinds[2:] for word in _SUSPECT)
