"""Current Requested Procedure Evidence of a report (PS3.3 C.17.2.3) as bytes.

Every image of the series is named there. As objects 248 of them cost the library and its writer
half of the time that a report takes; their bytes differ in one UID. Pure but for the check.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from pydicom.dataset import Dataset
from pydicom.filebase import DicomBytesIO
from pydicom.filewriter import write_data_element

from dicomnode.encode.frames import element, item, reference, text_element
from dicomnode.errors import NodeError

CURRENT_EVIDENCE = 0x0040A375
_KEYWORD = "CurrentRequestedProcedureEvidenceSequence"


class Reference(NamedTuple):
    """An instance as evidence names it."""

    study_uid: str
    series_uid: str
    sop_class_uid: str
    sop_instance_uid: str

    def data_set(self) -> Dataset:
        ds = Dataset()
        ds.StudyInstanceUID, ds.SeriesInstanceUID = self.study_uid, self.series_uid
        ds.SOPClassUID, ds.SOPInstanceUID = self.sop_class_uid, self.sop_instance_uid
        return ds


def evidence_bytes(references: Iterable[Reference]) -> bytes:
    """The sequence in the form of highdicom: studies and series as they first occur, an instance once."""
    studies: dict[str, dict[str, list[bytes]]] = {}
    named: set[str] = set()
    for study, series, sop_class, sop_instance in references:
        if sop_instance in named:
            continue
        named.add(sop_instance)
        studies.setdefault(study, {}).setdefault(series, []).append(reference(sop_class, sop_instance))
    return element(
        CURRENT_EVIDENCE,
        b"SQ",
        b"".join(
            item(
                element(0x00081115, b"SQ", b"".join(_series(uid, instances) for uid, instances in series.items()))
                + text_element(0x0020000D, b"UI", study)
            )
            for study, series in studies.items()
        ),
    )


def _series(uid: str, instances: Sequence[bytes]) -> bytes:
    return item(element(0x00081199, b"SQ", b"".join(instances)) + text_element(0x0020000E, b"UI", uid))


def for_the_library(references: Sequence[Reference], content: Sequence[Dataset]) -> list[Reference]:
    """What highdicom has to see: the first one, what ``content`` points to, and everything of other studies."""
    wanted = set(pointed_to(content))
    study = references[0].study_uid
    return [r for n, r in enumerate(references) if n == 0 or r.study_uid != study or r.sop_instance_uid in wanted]


def pointed_to(content: Iterable[Dataset]) -> Iterator[str]:
    """SOP Instance UIDs that content items refer to."""
    for one in content:
        for referenced in one.get("ReferencedSOPSequence") or ():
            yield str(referenced.ReferencedSOPInstanceUID)
        yield from pointed_to(one.get("ContentSequence") or ())


def take_over(sr: Dataset, seen: Sequence[Reference], every: Sequence[Reference]) -> bytes:
    """The element that stands for the one of ``sr``, which the library made of ``seen`` and which goes.

    Raises NodeError where the library's has another form; another version may have one.
    """
    study = every[0].study_uid
    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_data_element(buffer, sr[_KEYWORD])
    if buffer.getvalue() != evidence_bytes(r for r in seen if r.study_uid == study):
        raise NodeError("encode SR", "highdicom writes evidence in another form than this program", "Report this")
    del sr[_KEYWORD]
    return evidence_bytes(r for r in every if r.study_uid == study)
