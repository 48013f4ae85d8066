"""What an N-ACTION and an N-EVENT-REPORT of the Storage Commitment Push Model say (PS3.4 J.3). Pure.

Both roles use it: the acceptor and the courier answer what is asked of this node, and take the
reports about what this node asked of its peers.
"""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from functools import cache
from typing import NamedTuple

from pydicom._uid_dict import UID_dictionary
from pynetdicom import AllStoragePresentationContexts
from pynetdicom.sop_class import StorageCommitmentPushModel, StorageCommitmentPushModelInstance

from dicomnode.errors import MalformedDataSet
from dicomnode.nested import DataSet, Element, encode, items, parse, tag_of, text

SOP_CLASS = str(StorageCommitmentPushModel)
SOP_INSTANCE = str(StorageCommitmentPushModelInstance)
"""The well-known instance (PS3.4 J.3.5)."""

REQUEST = 1
"""Action Type ID (J.3.2.1)."""

ALL_COMMITTED, SOME_FAILED = 1, 2
"""Event Type IDs (J.3.3.1)."""

SUCCESS = 0x0000
PROCESSING_FAILURE = 0x0110
NO_SUCH_INSTANCE = 0x0112
NO_SUCH_EVENT_TYPE = 0x0113
INVALID_ARGUMENT_VALUE = 0x0115
NO_SUCH_CLASS = 0x0118
NO_SUCH_ACTION = 0x0123
NOT_AUTHORIZED = 0x0124
UNRECOGNIZED_OPERATION = 0x0211
RESOURCE_LIMITATION = 0x0213
"""Statuses of N-ACTION and N-EVENT-REPORT (PS3.7 10.1.1, 10.1.4, C)."""

MAX_REFERENCES = 50_000
"""In one request; a study of ten thousand slices fits five times."""

_WARNINGS = frozenset({0x0001, 0x0107, 0x0116})
_PASSING = frozenset({PROCESSING_FAILURE, NOT_AUTHORIZED, 0x0210, RESOURCE_LIMITATION})
_UID = re.compile(r"[0-9.]{1,64}")
_ROOT = "1.2.840.10008.5.1.4.1.1."


class Verdict(IntEnum):
    """About one reference: committed, or its Failure Reason (0008,1197), PS3.3 C.14.1.1."""

    committed = 0x0000
    processing_failure = 0x0110
    no_such_instance = 0x0112
    class_instance_conflict = 0x0119
    class_not_supported = 0x0122
    duplicate_transaction = 0x0131
    resource_limitation = 0x0213


class Reference(NamedTuple):
    SOPClassUID: str
    SOPInstanceUID: str


@dataclass(frozen=True, slots=True)
class Request:
    """Action information of an N-ACTION (PS3.4 table J.3.2-1); no reference is in it twice."""

    TransactionUID: str
    references: tuple[Reference, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """Event information of an N-EVENT-REPORT (PS3.4 table J.3.3-1).

    ``failed`` has a reason for each SOP Instance UID; what is in it is not in ``committed``.
    """

    TransactionUID: str
    committed: frozenset[str]
    failed: Mapping[str, int]


class Refused(Exception):
    """A message is answered with ``status``; ``comment`` is free of what the peer sent."""

    def __init__(self, status: int, comment: str) -> None:
        super().__init__(f"0x{status:04X}")
        self.status = status
        self.comment = comment


class Told(StrEnum):
    """What became of a report that was sent."""

    taken = "taken"
    retry = "retry"
    rejected = "rejected"


def parse_request(data: bytes, transfer_syntax_uid: str) -> Request:
    """Raises Refused with a status that an N-ACTION may have (PS3.7 10.1.4.1.10)."""
    ds = _parse(data, transfer_syntax_uid)
    found = items(ds, "ReferencedSOPSequence")
    if not found:
        raise Refused(INVALID_ARGUMENT_VALUE, "Referenced SOP Sequence is missing or empty")
    if len(found) > MAX_REFERENCES:
        raise Refused(RESOURCE_LIMITATION, f"more than {MAX_REFERENCES} references in one request")
    references = dict.fromkeys(
        Reference(_uid(item, "ReferencedSOPClassUID"), _uid(item, "ReferencedSOPInstanceUID")) for item in found
    )
    return Request(_uid(ds, "TransactionUID"), tuple(references))


def encode_request(request: Request, transfer_syntax_uid: str) -> bytes:
    ds = {
        tag_of("TransactionUID"): _ui(request.TransactionUID),
        tag_of("ReferencedSOPSequence"): Element("SQ", items=tuple(_reference(r) for r in request.references)),
    }
    return encode(ds, transfer_syntax_uid)


def encode_report(
    request: Request, verdicts: Sequence[int], retrieve_ae_title: str, transfer_syntax_uid: str
) -> tuple[int, bytes]:
    """Event Type ID and event information; ``verdicts`` are in the order of the references.

    A sequence is left out where it has no item: both are type 1C with at least one. Storage
    media are not named: what is stored here is retrieved over the network.
    """
    committed = [_reference(r) for r, v in zip(request.references, verdicts, strict=True) if v == Verdict.committed]
    failed = [
        {**_reference(r), tag_of("FailureReason"): Element("US", struct.pack("<H", v))}
        for r, v in zip(request.references, verdicts, strict=True)
        if v != Verdict.committed
    ]
    ds: DataSet = {tag_of("TransactionUID"): _ui(request.TransactionUID)}
    if committed:
        ds[tag_of("RetrieveAETitle")] = Element("AE", retrieve_ae_title.encode("ascii"))
        ds[tag_of("ReferencedSOPSequence")] = Element("SQ", items=tuple(committed))
    if failed:
        ds[tag_of("FailedSOPSequence")] = Element("SQ", items=tuple(failed))
    return SOME_FAILED if failed else ALL_COMMITTED, encode(ds, transfer_syntax_uid)


def parse_report(event_type: int, data: bytes, transfer_syntax_uid: str) -> Report:
    """Raises Refused with a status that an N-EVENT-REPORT may have.

    The sequences count, not the event type: only what is named as committed is, and not when
    it is named as failed too.
    """
    if event_type not in (ALL_COMMITTED, SOME_FAILED):
        raise Refused(NO_SUCH_EVENT_TYPE, "this SOP class has no such event type")
    ds = _parse(data, transfer_syntax_uid)
    failed = {
        _uid(item, "ReferencedSOPInstanceUID"): _reason(item.get(tag_of("FailureReason")))
        for item in items(ds, "FailedSOPSequence")
    }
    committed = {_uid(item, "ReferencedSOPInstanceUID") for item in items(ds, "ReferencedSOPSequence")}
    return Report(_uid(ds, "TransactionUID"), frozenset(committed - failed.keys()), failed)


def verdict_of(reference: Reference, held_class: str | None, intact: bool | None) -> Verdict:
    """About one reference, from what the index and the store say.

    ``held_class`` is the SOP class of the instance held here, None without one; ``intact``
    whether its bytes were read back as they came, None when they could not be read.
    """
    if held_class is None:
        known = storable(reference.SOPClassUID)
        return Verdict.no_such_instance if known else Verdict.class_not_supported
    if held_class != reference.SOPClassUID:
        return Verdict.class_instance_conflict
    return Verdict.committed if intact else Verdict.processing_failure


def contradictory(references: Iterable[Reference]) -> frozenset[str]:
    """SOP Instance UIDs that a request names with several SOP classes: one of them must be wrong."""
    return frozenset(uid for uid, count in Counter(r.SOPInstanceUID for r in references).items() if count > 1)


@cache
def storable(sop_class_uid: str) -> bool:
    """Whether the class is one that this node stores: those of PS3.4 B.5, and the retired ones."""
    if sop_class_uid in {str(cx.abstract_syntax) for cx in AllStoragePresentationContexts}:
        return True
    name, kind, *_ = UID_dictionary.get(sop_class_uid, ("", ""))
    return sop_class_uid.startswith(_ROOT) and kind == "SOP Class" and "Storage" in name


def classify_report_status(status: int | None) -> tuple[Told, str]:
    """What the status of an N-EVENT-REPORT-RSP means for the sender (PS3.7 10.1.1.1.8, C)."""
    if status is None:
        return Told.retry, "the peer did not answer the report"
    name = f"status 0x{status:04X}"
    if status == SUCCESS or status in _WARNINGS:
        return Told.taken, "" if status == SUCCESS else f"taken with warning, {name}"
    if status in _PASSING:
        return Told.retry, f"the peer cannot take the report now, {name}"
    return Told.rejected, f"the peer refused the report, {name}"


def accepted(status: int) -> bool:
    """Whether the status of an N-ACTION-RSP means that a report will come (PS3.4 J.3.2.1.4)."""
    return status == SUCCESS or status in _WARNINGS


def _parse(data: bytes, transfer_syntax_uid: str) -> DataSet:
    try:
        return parse(data, transfer_syntax_uid)
    except MalformedDataSet as error:
        raise Refused(INVALID_ARGUMENT_VALUE, error.cause) from None


def _uid(ds: DataSet, keyword: str) -> str:
    value = text(ds, keyword)
    if not _UID.fullmatch(value):
        raise Refused(INVALID_ARGUMENT_VALUE, f"{keyword} is missing or no UID")
    return value


def _reason(found: Element | None) -> int:
    if found is None or len(found.value) < 2:
        return Verdict.processing_failure
    return int(struct.unpack_from("<H", found.value)[0]) or Verdict.processing_failure


def _ui(uid: str) -> Element:
    return Element("UI", uid.encode("ascii"))


def _reference(reference: Reference) -> DataSet:
    return {
        tag_of("ReferencedSOPClassUID"): _ui(reference.SOPClassUID),
        tag_of("ReferencedSOPInstanceUID"): _ui(reference.SOPInstanceUID),
    }
