"""What an N-CREATE and an N-SET of a performed procedure step may say (PS3.4 table F.7.2-1). Pure.

Attributes that must have a value are asked for. One that must be there but may be empty
(type 2) is not: nothing here depends on it, and a step that was refused for it would leave
its images without the evidence that they are complete.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dicomnode.errors import IllegalTransition
from dicomnode.index.procedure import PerformedSeries, Step, StepState, next_step_state
from dicomnode.nested import EXPLICIT_LITTLE, DataSet, element, encode, items, tag_of, text

SUCCESS = 0x0000
OPTIONAL_NOT_SUPPORTED = 0x0001
NO_SUCH_ATTRIBUTE = 0x0105
INVALID_ATTRIBUTE_VALUE = 0x0106
PROCESSING_FAILURE = 0x0110
DUPLICATE_INSTANCE = 0x0111
NO_SUCH_INSTANCE = 0x0112
INVALID_INSTANCE = 0x0117
NO_SUCH_CLASS = 0x0118
CLASS_INSTANCE_CONFLICT = 0x0119
MISSING_ATTRIBUTE = 0x0120
MISSING_ATTRIBUTE_VALUE = 0x0121
UNRECOGNIZED_OPERATION = 0x0211
RESOURCE_LIMITATION = 0x0213
"""Status codes of PS3.7 C.5 and PS3.4 F.7.2, F.8.2."""

MAY_NO_LONGER_BE_UPDATED = 0xA710
"""Error ID (0000,0903) with 0x0110, PS3.4 table F.7.2-2."""

INCORRECT_WORKLIST_ENTRY = ("110514", "DCM")
"""CID 9300; IHE RAD TF-2 4.7: such images must not be used."""

UID = re.compile(r"[0-9.]{1,64}")

CREATE_VALUES = (
    "ScheduledStepAttributesSequence",
    "PerformedProcedureStepID",
    "PerformedStationAETitle",
    "PerformedProcedureStepStartDate",
    "PerformedProcedureStepStartTime",
    "PerformedProcedureStepStatus",
    "Modality",
)
"""Type 1 in the N-CREATE column."""

SET_NOT_ALLOWED = frozenset(
    tag_of(keyword)
    for keyword in (
        "ScheduledStepAttributesSequence",
        "PatientName",
        "PatientID",
        "IssuerOfPatientID",
        "PatientBirthDate",
        "PatientSex",
        "ReferencedPatientSequence",
        "AdmissionID",
        "PerformedProcedureStepID",
        "PerformedStationAETitle",
        "PerformedStationName",
        "PerformedLocation",
        "PerformedProcedureStepStartDate",
        "PerformedProcedureStepStartTime",
        "Modality",
        "StudyID",
    )
)
"""Not Allowed in the N-SET column: they say what the step is. Repeating them unchanged does no harm."""

_REFERENCES = ("ReferencedImageSequence", "ReferencedNonImageCompositeSOPInstanceSequence")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a request is refused. ``comment`` names attributes, never their values."""

    status: int
    comment: str
    tags: tuple[int, ...] = ()
    error_id: int | None = None


class Refused(Exception):
    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.comment)
        self.fault = fault


def refuse(status: int, comment: str, *keywords: str, error_id: int | None = None) -> Refused:
    return Refused(Fault(status, comment, tuple(tag_of(k) for k in keywords), error_id))


def created(ds: DataSet) -> Step:
    """The step that an N-CREATE makes. Raises Refused."""
    _need(ds, CREATE_VALUES)
    if text(ds, "PerformedProcedureStepStatus") != StepState.in_progress:
        raise refuse(INVALID_ATTRIBUTE_VALUE, "a step begins IN PROGRESS", "PerformedProcedureStepStatus")
    for item in items(ds, "ScheduledStepAttributesSequence"):
        _uid(item, "StudyInstanceUID")
    return _step(ds, StepState.in_progress, tuple(performed_series(ds)))


def changed(state: str, before: DataSet, modification: DataSet) -> Step:
    """The step after an N-SET: what it modifies replaces what was there, sequences as a whole.

    Raises Refused.
    """
    if not _open(state):
        raise refuse(
            PROCESSING_FAILURE,
            "Performed Procedure Step Object may no longer be updated",
            error_id=MAY_NO_LONGER_BE_UPDATED,
        )
    wrong = tuple(t for t in sorted(SET_NOT_ALLOWED & set(modification)) if not _same(before, modification, t))
    if wrong:
        raise Refused(Fault(NO_SUCH_ATTRIBUTE, "an attribute may not be changed by N-SET", wrong))
    given = "PerformedProcedureStepStatus"
    status = text(modification, given) if element(modification, given) is not None else state
    try:
        following = next_step_state(state, status)
    except IllegalTransition:
        raise refuse(INVALID_ATTRIBUTE_VALUE, "this is no status that a step may take", given) from None
    after = {**before, **modification}
    if following is StepState.completed:
        _need(after, ("PerformedSeriesSequence",))
    named = element(modification, "PerformedSeriesSequence") is not None
    return _step(after, following, tuple(performed_series(after)) if named else None)


def performed_series(ds: DataSet) -> Iterator[PerformedSeries]:
    """Items of the Performed Series Sequence with all instances that they refer to. Raises Refused."""
    for item in items(ds, "PerformedSeriesSequence"):
        series = _uid(item, "SeriesInstanceUID")
        found = [_uid(r, "ReferencedSOPInstanceUID") for keyword in _REFERENCES for r in items(item, keyword)]
        yield PerformedSeries(series, tuple(dict.fromkeys(found)))


def selected(ds: DataSet, tags: Sequence[int]) -> tuple[DataSet, bool]:
    """What an N-GET asks for, everything without ``tags``; whether something of it is not here."""
    if not tags:
        return ds, False
    return {t: ds[t] for t in tags if t in ds}, not set(tags) <= set(ds)


def only(ds: DataSet, tags: Sequence[int]) -> DataSet:
    """Attributes that a response gives back (PS3.7 C.5.11)."""
    return {t: ds[t] for t in tags if t in ds}


def _step(ds: DataSet, state: StepState, series: tuple[PerformedSeries, ...] | None) -> Step:
    scheduled = items(ds, "ScheduledStepAttributesSequence")
    return Step(
        state=state,
        study_uids=tuple(text(item, "StudyInstanceUID") for item in scheduled),
        Modality=text(ds, "Modality"),
        wrong_entry=state is StepState.discontinued and _wrong_entry(ds),
        series=series,
        attributes=encode(ds, EXPLICIT_LITTLE),
    )


def _wrong_entry(ds: DataSet) -> bool:
    reasons = items(ds, "PerformedProcedureStepDiscontinuationReasonCodeSequence")
    return any((text(r, "CodeValue"), text(r, "CodingSchemeDesignator")) == INCORRECT_WORKLIST_ENTRY for r in reasons)


def _open(state: str) -> bool:
    try:
        next_step_state(state, state)
    except IllegalTransition:
        return False
    return True


def _same(before: Mapping[int, object], modification: Mapping[int, object], tag: int) -> bool:
    return before.get(tag) == modification[tag]


def _need(ds: DataSet, keywords: Sequence[str]) -> None:
    for keyword in keywords:
        found = element(ds, keyword)
        if found is None:
            raise refuse(MISSING_ATTRIBUTE, f"{keyword} is missing", keyword)
        if found.empty:
            raise refuse(MISSING_ATTRIBUTE_VALUE, f"{keyword} is empty", keyword)


def _uid(ds: DataSet, keyword: str) -> str:
    _need(ds, (keyword,))
    value = text(ds, keyword)
    if not UID.fullmatch(value):
        raise refuse(INVALID_ATTRIBUTE_VALUE, f"{keyword} is not a UID", keyword)
    return value
