"""Status codes of the conformance statement: what each one that this node sends means, and how it takes a peer's.

The codes are the services' own constants; a test fails when a service has one that is not here.
What this node makes of a peer's status is asked of the code that decides it, for all codes there are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import groupby

from dicomnode import commitment
from dicomnode.dimse import association
from dicomnode.receive import ingest, policy
from dicomnode.serve import exchange, procedure_step


@dataclass(frozen=True, slots=True)
class Status:
    """``operations`` that it answers; ``when`` says in which case."""

    code: int
    operations: str
    meaning: str
    when: str


ANY_CONTEXT: tuple[Status, ...] = (
    Status(
        association.SOP_CLASS_NOT_SUPPORTED,
        "C-ECHO",
        "Refused: SOP Class not supported",
        "the command names another class than its presentation context",
    ),
    Status(
        association.UNRECOGNIZED_OPERATION,
        "any",
        "Unrecognized operation",
        "the presentation context is for another service, such as C-ECHO in a context of a storage SOP class",
    ),
    Status(
        association.MISTYPED_ARGUMENT,
        "any but C-STORE",
        "Mistyped argument",
        "the command set lacks a mandatory element",
    ),
)

STORAGE: tuple[Status, ...] = (
    Status(ingest.SUCCESS, "C-STORE", "Success", "the object is on stable storage and survives a loss of power"),
    Status(
        ingest.OUT_OF_RESOURCES,
        "C-STORE",
        "Refused: Out of Resources",
        "free space is at node.reserve_mb, the peer has too many unfinished objects (dimse.max_unfinished_mb),"
        " or the object could not be written",
    ),
    Status(
        ingest.DATA_SET_MISMATCH,
        "C-STORE",
        "Error: Data Set does not match SOP Class",
        "a UID is missing, is not a UID, or differs between command and data set",
    ),
    Status(
        ingest.UNRECOGNIZED_OPERATION,
        "C-STORE",
        "Unrecognized operation",
        "the presentation context is not for storage",
    ),
    Status(ingest.CANNOT_UNDERSTAND, "C-STORE", "Error: Cannot understand", "the data set cannot be parsed"),
    Status(ingest.PROCESSING_FAILURE, "C-STORE", "Processing failure", "an unexpected fault of this node"),
)

_ALL = "C-FIND, C-MOVE, C-GET"
_RETRIEVE = "C-MOVE, C-GET"
QUERY_RETRIEVE: tuple[Status, ...] = (
    Status(exchange.SUCCESS, _ALL, "Success", "all matches were returned, or all sub-operations succeeded"),
    Status(exchange.PENDING, _ALL, "Pending", "a match with all keys supported, or sub-operations continue"),
    Status(exchange.PENDING_WARNING, "C-FIND", "Pending", "a match; one or more optional keys are not supported"),
    Status(
        exchange.UNRECOGNIZED_OPERATION,
        _ALL,
        "Unrecognized operation",
        "the presentation context is not for this request",
    ),
    Status(
        exchange.MISTYPED_ARGUMENT,
        _ALL,
        "Mistyped argument",
        "the command set lacks a mandatory element, such as Move Destination",
    ),
    Status(exchange.CANCELLED, _ALL, "Cancel", "the peer cancelled the request (C-CANCEL)"),
    Status(
        exchange.OUT_OF_RESOURCES,
        "C-FIND",
        "Refused: Out of Resources",
        "dimse.query_per_second, dimse.queries_at_once or dimse.query_seconds is exceeded, or the index cannot be read",
    ),
    Status(
        exchange.CANNOT_COUNT,
        _RETRIEVE,
        "Refused: Out of Resources, unable to calculate number of matches",
        "more instances than one response can count, dimse.query_seconds is over, or the index cannot be read",
    ),
    Status(
        exchange.CANNOT_SUBOPERATE,
        _RETRIEVE,
        "Refused: Out of Resources, unable to perform sub-operations",
        "no instance could be sent",
    ),
    Status(
        exchange.DESTINATION_UNKNOWN,
        "C-MOVE",
        "Refused: Move Destination unknown",
        "the destination is no configured peer with host and port, or no AE title",
    ),
    Status(
        exchange.IDENTIFIER_MISMATCH,
        _ALL,
        "Error: Identifier does not match SOP Class",
        "the level is not one of the model, a unique key above it is missing, or a key has a wrong value",
    ),
    Status(
        exchange.SOME_FAILED,
        _RETRIEVE,
        "Warning: sub-operations complete, one or more failures or warnings",
        "failed instances are in Failed SOP Instance UID List (0008,0058)",
    ),
    Status(
        exchange.LIMIT_REACHED,
        "C-FIND",
        "Warning: not all matches were returned",
        "dimse.query_max_answers matches were returned; there are more",
    ),
    Status(exchange.UNABLE_TO_PROCESS, _ALL, "Failed: Unable to process", "the identifier or request is not readable"),
)

_ANY = "N-CREATE, N-SET, N-GET"
PROCEDURE_STEP: tuple[Status, ...] = (
    Status(procedure_step.SUCCESS, _ANY, "Success", "the step is committed, or returned"),
    Status(
        procedure_step.OPTIONAL_NOT_SUPPORTED,
        "N-GET",
        "Warning: Requested optional Attributes are not supported",
        "an attribute that was asked for is not in the step; the others are returned",
    ),
    Status(
        procedure_step.NO_SUCH_ATTRIBUTE,
        "N-SET",
        "No Such Attribute",
        "an attribute that N-SET may not change would change",
    ),
    Status(
        procedure_step.INVALID_ATTRIBUTE_VALUE,
        "N-CREATE, N-SET",
        "Invalid Attribute Value",
        "a status that the step may not take, a UID that is none, or a data set that cannot be parsed",
    ),
    Status(
        procedure_step.PROCESSING_FAILURE,
        _ANY,
        "Processing Failure",
        f"N-SET of a step that has ended (Error ID 0x{procedure_step.MAY_NO_LONGER_BE_UPDATED:04X},"
        " may no longer be updated), or an unexpected fault of this node",
    ),
    Status(procedure_step.DUPLICATE_INSTANCE, "N-CREATE", "Duplicate SOP Instance", "a step with this UID exists"),
    Status(procedure_step.NO_SUCH_INSTANCE, "N-SET, N-GET", "No Such SOP Instance", "there is no step with this UID"),
    Status(procedure_step.INVALID_INSTANCE, "N-CREATE", "Invalid SOP Instance", "the SOP Instance UID is not a UID"),
    Status(
        procedure_step.NO_SUCH_CLASS,
        "N-CREATE",
        "No Such SOP Class",
        "the command names another class than its context",
    ),
    Status(
        procedure_step.CLASS_INSTANCE_CONFLICT,
        "N-SET, N-GET",
        "Class-Instance Conflict",
        "the instance is none of the class that is named",
    ),
    Status(
        procedure_step.MISSING_ATTRIBUTE, "N-CREATE, N-SET", "Missing Attribute", "a required attribute is not present"
    ),
    Status(
        procedure_step.MISSING_ATTRIBUTE_VALUE,
        "N-CREATE, N-SET",
        "Missing Attribute Value",
        "a required attribute has no value",
    ),
    Status(
        procedure_step.UNRECOGNIZED_OPERATION,
        "others",
        "Unrecognized Operation",
        "this SOP class has no such operation",
    ),
    Status(
        procedure_step.RESOURCE_LIMITATION,
        _ANY,
        "Resource Limitation",
        "free space is at node.reserve_mb (N-CREATE), or the step could not be stored or read",
    ),
)

_BOTH = "N-ACTION, N-EVENT-REPORT"
COMMITMENT: tuple[Status, ...] = (
    Status(
        commitment.SUCCESS, _BOTH, "Success", "the request is recorded and will be reported on; the report is taken"
    ),
    Status(
        commitment.PROCESSING_FAILURE,
        _BOTH,
        "Processing Failure",
        "a report from a peer that is not asked for commitment, or an unexpected fault of this node",
    ),
    Status(commitment.NO_SUCH_INSTANCE, _BOTH, "No Such SOP Instance", "another instance than the well-known one"),
    Status(commitment.NO_SUCH_EVENT_TYPE, "N-EVENT-REPORT", "No Such Event Type", "neither event type 1 nor 2"),
    Status(
        commitment.INVALID_ARGUMENT_VALUE,
        _BOTH,
        "Invalid Argument Value",
        "a UID or the Referenced SOP Sequence is missing or wrong, or the data set cannot be parsed",
    ),
    Status(commitment.NO_SUCH_CLASS, _BOTH, "No Such SOP Class", "the command names another class than its context"),
    Status(commitment.NO_SUCH_ACTION, "N-ACTION", "No Such Action Type", "another action type than 1"),
    Status(commitment.NOT_AUTHORIZED, "N-ACTION", "Not Authorized", "the peer has no 'commit' in allow"),
    Status(commitment.UNRECOGNIZED_OPERATION, "others", "Unrecognized Operation", "the class has no such operation"),
    Status(
        commitment.RESOURCE_LIMITATION,
        _BOTH,
        "Resource Limitation",
        f"more than {commitment.MAX_REFERENCES} references in one request, or it could not be recorded",
    ),
)

OF_MODULE = {
    association: ANY_CONTEXT,
    ingest: STORAGE,
    exchange: QUERY_RETRIEVE,
    procedure_step: PROCEDURE_STEP,
    commitment: COMMITMENT,
}
"""Module with the constants -> what the statement says of them."""

FAILURE_REASONS: dict[commitment.Verdict, str] = {
    commitment.Verdict.committed: "(committed: in Referenced SOP Sequence, without a reason)",
    commitment.Verdict.processing_failure: "the instance is here, but its bytes are damaged or cannot be read",
    commitment.Verdict.no_such_instance: "this node does not hold the instance",
    commitment.Verdict.class_instance_conflict: "the instance is of another SOP class than the request says",
    commitment.Verdict.class_not_supported: "this node does not store this SOP class",
    commitment.Verdict.duplicate_transaction: "the Transaction UID is in use with another request",
    commitment.Verdict.resource_limitation: "not given by this node; understood in the reports of peers",
}

REJECTIONS: tuple[tuple[int, int, int, str], ...] = (
    (
        policy.REJECTED_PERMANENT,
        policy.SOURCE_SERVICE_USER,
        policy.NO_REASON_GIVEN,
        "no reason given: a caller from another machine without TLS while tls.required is set",
    ),
    (
        policy.REJECTED_PERMANENT,
        policy.SOURCE_SERVICE_USER,
        policy.APPLICATION_CONTEXT_NAME_NOT_SUPPORTED,
        "application context name not supported",
    ),
    (
        policy.REJECTED_PERMANENT,
        policy.SOURCE_SERVICE_USER,
        policy.CALLING_AE_NOT_RECOGNIZED,
        "calling AE title not recognized: not configured, or address, TLS or certificate are not the configured ones",
    ),
    (
        policy.REJECTED_PERMANENT,
        policy.SOURCE_SERVICE_USER,
        policy.CALLED_AE_NOT_RECOGNIZED,
        "called AE title not recognized: none of this node's, or one that this peer may not call",
    ),
)
"""Result, source, reason (PS3.8 table 9-21) and meaning."""


def behaviour(classify: Callable[[int | None], tuple[str, str]]) -> list[tuple[str, str]]:
    """Ranges of status codes and what ``classify`` makes of them, asked for every code (and for none)."""
    found: list[tuple[str, str]] = []
    for fate, group in groupby(range(0x10000), key=lambda status: str(classify(status)[0])):
        codes = list(group)
        found.append((_span(codes[0], codes[-1]), fate))
    merged: dict[str, list[str]] = {}
    for span, fate in found:
        merged.setdefault(fate, []).append(span)
    rest = max(merged, key=lambda fate: max(map(len, merged[fate])) + len(merged[fate]))
    rows = [(", ".join(spans), fate) for fate, spans in merged.items() if fate != rest]
    return [*rows, ("any other", rest), ("no response", str(classify(None)[0]))]


def _span(first: int, last: int) -> str:
    return code(first) if first == last else f"{code(first)} to {code(last)}"


def code(status: int) -> str:
    return f"0x{status:04X}"


def rows(statuses: Iterable[Status]) -> list[tuple[str, str, str, str]]:
    return [(code(s.code), s.meaning, s.operations, s.when) for s in sorted(statuses, key=lambda s: s.code)]
