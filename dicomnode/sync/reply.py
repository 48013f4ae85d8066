"""What a STOW-RS reply means for each instance (PS3.18 10.5.3). Pure: bytes in, verdicts out.

The HTTP status alone does not say what was stored: an instance counts as stored only when
the reply names it in ReferencedSOPSequence. Replies come as DICOM JSON or as Native DICOM
Model XML, whatever was asked for.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from enum import StrEnum
from http import HTTPStatus
from typing import Any
from xml.etree import ElementTree

from dicomnode.sync.refusal import Fault, Step, decide, fault_of

FAILED_SOP_SEQUENCE = "00081198"
REFERENCED_SOP_SEQUENCE = "00081199"
REFERENCED_SOP_INSTANCE_UID = "00081155"
FAILURE_REASON = "00081197"

DUPLICATE_SOP_INSTANCE = 0x0111  # PS3.7 C.5.3
PROCESSING_FAILURE = 0x0110  # PS3.7 C.5.12
NOT_AUTHORIZED = 0x0124  # PS3.7 C.5.24
OUT_OF_RESOURCES = range(0xA700, 0xA800)  # PS3.4 B.2.3
ALREADY_STORED = 45070  # Azure's DICOM service: same UIDs are there

RETRY_AFTER_MOST_SECONDS = 3600.0
WITH_SEQUENCES = frozenset([HTTPStatus.OK, HTTPStatus.ACCEPTED, HTTPStatus.CONFLICT])


class Fate(StrEnum):
    """What becomes of one instance of a request."""

    stored = "stored"
    retry = "retry"  # the endpoint or the network; this passes
    operator = "operator"  # somebody has to mend URL, token or rights; tried again until then
    reject = "reject"  # this instance is refused for good
    alone = "alone"  # the request was refused as a whole: send each instance by itself


_FATES = {
    Step.each: Fate.alone,
    Step.park: Fate.reject,
    Step.doubt: Fate.reject,  # seen beside the others: dicomnode.sync.blame.weighed
    Step.strike: Fate.retry,
    Step.endpoint: Fate.retry,
    Step.operator: Fate.operator,
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """``conflict``: of a record that is kept there beside another one, which serves. ``full``: it has no room.

    ``status``: of HTTP, where it answered the request as a whole. ``disk``: ours did not give the file.
    """

    fate: Fate
    cause: str = ""
    conflict: bool = False
    full: bool = False
    status: int = 0
    disk: bool = False


@dataclass(frozen=True, slots=True)
class Reply:
    """SOPInstanceUIDs that the reply names; ``failed`` maps to FailureReason (0: not given)."""

    stored: frozenset[str] = frozenset()
    failed: Mapping[str, int] = field(default_factory=dict)


def parse_reply(content_type: str, body: bytes) -> Reply:
    """Raises ValueError for a body that is not a whole reply. ``content_type`` may carry parameters."""
    kind = content_type.partition(";")[0].strip().lower()
    text = body.decode("utf-8", errors="strict").lstrip("\ufeff \r\n\t")
    if "json" in kind or (text[:1] in {"{", "["} and "xml" not in kind):
        return _from_items(*_json_sequences(text))
    return _from_items(*_xml_sequences(text))


_TELLS = {
    Fault.item: ": the request was refused",
    Fault.either: ": check cloud.stow_url, the token and its rights",
    Fault.passing: "",
}


def judge(status: int, reply: Reply | None, uids: Collection[str]) -> dict[str, Verdict]:
    """A verdict for each of ``uids`` that were in the request.

    ``reply`` is None when there was none that could be read whole.
    """
    if status in WITH_SEQUENCES and reply is not None:
        return {uid: _judge_one(reply, uid) for uid in uids}
    if status in WITH_SEQUENCES:
        verdict = Verdict(Fate.retry, f"HTTP {status} with a reply that could not be read whole")
    else:
        fault = fault_of(status)
        fate = _FATES[decide(fault, together=len(uids) > 1, stored=False, alike=0)]
        verdict = Verdict(
            fate, f"HTTP {status}{_TELLS[fault] if status >= 300 else ' was not expected'}", status=status
        )
    return dict.fromkeys(uids, verdict)


def _judge_one(reply: Reply, uid: str) -> Verdict:
    reason = reply.failed.get(uid)
    if reason is None:
        if uid in reply.stored:
            return Verdict(Fate.stored)
        return Verdict(Fate.retry, "the reply names the instance neither as stored nor as failed")
    if reason in {DUPLICATE_SOP_INSTANCE, ALREADY_STORED}:
        return Verdict(Fate.stored, "it was there already")
    if reason in OUT_OF_RESOURCES or reason in {PROCESSING_FAILURE, 0}:
        cause = f"the endpoint could not store it now (FailureReason 0x{reason:04X})"
        return Verdict(Fate.retry, cause, full=reason in OUT_OF_RESOURCES)
    if reason == NOT_AUTHORIZED:
        return Verdict(Fate.operator, "not authorized (FailureReason 0x0124): check the rights of the token")
    return Verdict(Fate.reject, f"refused for good (FailureReason 0x{reason:04X})")


def retry_after_seconds(value: str | None, now: datetime) -> float | None:
    """Retry-After (RFC 9110 10.2.3) as seconds from ``now``; None when absent or unreadable.

    Never negative, never more than an hour: an endpoint cannot silence the node for years.
    """
    if not value:
        return None
    text = value.strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:9])
    else:
        try:
            moment = parsedate_to_datetime(text)
        except ValueError:
            return None
        if moment.tzinfo is None:
            return None
        seconds = (moment - now).total_seconds()
    return min(max(0.0, seconds), RETRY_AFTER_MOST_SECONDS)


Items = Iterator[tuple[str, int]]


def _from_items(stored: Items, failed: Items) -> Reply:
    return Reply(frozenset(uid for uid, _ in stored), dict(failed))


def _json_sequences(text: str) -> tuple[Items, Items]:
    try:
        found: Any = json.loads(text)
    except RecursionError:
        raise ValueError("the reply is nested too deeply") from None
    if isinstance(found, list) and len(found) == 1:
        found = found[0]
    if not isinstance(found, dict):
        raise ValueError("the reply is not a DICOM JSON object")  # noqa: TRY004 one error type for all bad replies
    return _json_items(found, REFERENCED_SOP_SEQUENCE), _json_items(found, FAILED_SOP_SEQUENCE)


def _json_items(found: Mapping[str, Any], tag: str) -> Items:
    sequence = found.get(tag)
    values = sequence.get("Value") if isinstance(sequence, dict) else None
    for item in values if isinstance(values, list) else []:
        if isinstance(item, dict):
            uid = _json_first(item, REFERENCED_SOP_INSTANCE_UID)
            if isinstance(uid, str):
                yield uid.strip(" \0"), _number(_json_first(item, FAILURE_REASON))


def _json_first(item: Mapping[str, Any], tag: str) -> Any:
    element = item.get(tag)
    values = element.get("Value") if isinstance(element, dict) else None
    return values[0] if isinstance(values, list) and values else None


def _xml_sequences(text: str) -> tuple[Items, Items]:
    if "<!" in text.replace("<!--", ""):
        raise ValueError("the reply has a document type or CDATA")  # no entities: no entity bombs
    try:
        root = ElementTree.fromstring(text)  # noqa: S314 declarations were refused above
    except ElementTree.ParseError as error:
        raise ValueError("the reply is neither DICOM JSON nor whole XML") from error
    return _xml_items(root, REFERENCED_SOP_SEQUENCE), _xml_items(root, FAILED_SOP_SEQUENCE)


def _xml_items(root: ElementTree.Element, tag: str) -> Items:
    for element in root:
        if element.get("tag") == tag:
            for item in element:
                uid = _xml_first(item, REFERENCED_SOP_INSTANCE_UID)
                if uid:
                    yield uid.strip(" \0"), _number(_xml_first(item, FAILURE_REASON))


def _xml_first(item: ElementTree.Element, tag: str) -> str | None:
    for element in item:
        if element.get("tag") == tag:
            return next((value.text for value in element if value.text), None)
    return None


def _number(value: Any) -> int:
    try:
        return int(value) if value is not None else 0
    except (TypeError, ValueError):
        return 0
