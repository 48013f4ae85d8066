"""Procedure Reported (121058): the imaging procedure, not the algorithm (IHE AIR)."""

from __future__ import annotations

from highdicom.sr import CodedConcept

from dicomnode.encode.common import long_string
from dicomnode.encode.headers import SourceHeaders

_BY_BODY_PART = {
    ("CT", "CHEST"): CodedConcept("169069000", "SCT", "CT of chest"),
    ("CR", "CHEST"): CodedConcept("399208008", "SCT", "Plain chest X-ray"),
    ("DX", "CHEST"): CodedConcept("399208008", "SCT", "Plain chest X-ray"),
}

# CID 100, Quantitative Diagnostic Imaging Procedures
_BY_MODALITY = {
    "CT": CodedConcept("25045-6", "LN", "CT unspecified body region"),
    "MR": CodedConcept("25056-3", "LN", "MRI unspecified body region"),
    "PT": CodedConcept("44136-0", "LN", "PET unspecified body region"),
    "NM": CodedConcept("49118-3", "LN", "NM unspecified body region"),
    "CR": CodedConcept("43468-8", "LN", "XR unspecified body region"),
    "DX": CodedConcept("43468-8", "LN", "XR unspecified body region"),
}
_GENERAL = CodedConcept("363679005", "SCT", "Imaging procedure")


def procedure_reported(headers: SourceHeaders) -> CodedConcept:
    """The study's own ProcedureCodeSequence, else one by modality and body part."""
    for item in headers.common.get("ProcedureCodeSequence") or []:
        value, scheme = item.get("CodeValue"), item.get("CodingSchemeDesignator")
        if value and scheme and item.get("CodeMeaning"):
            return CodedConcept(str(value), str(scheme), long_string(str(item.CodeMeaning)))
    body_part = str(headers.common.get("BodyPartExamined") or "").upper()
    return _BY_BODY_PART.get((headers.modality, body_part)) or _BY_MODALITY.get(headers.modality, _GENERAL)
