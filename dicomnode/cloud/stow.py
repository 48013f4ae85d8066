"""STOW-RS receiver (PS3.18 10.5): streamed to disk, durable before it is named as stored."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from aiohttp import BodyPartReader, MultipartReader, hdrs, web

from dicomnode import logs
from dicomnode.cloud.storage import Arrived, Storage
from dicomnode.errors import DiskFull, MalformedDataSet, NodeError, OperatorError
from dicomnode.header import Wanted, read_header
from dicomnode.part10 import HEAD_BYTES, begun_header, data_set_begin

CHUNK_BYTES = 256 * 1024
MAX_PARTS = 1000
MAX_OBJECT_BYTES = 4096 << 20

OUT_OF_RESOURCES = 0xA700  # PS3.4 B.2.3
CANNOT_UNDERSTAND = 0xC000
DUPLICATE_SOP_INSTANCE = 0x0111  # PS3.7 C.5.3
NOT_OF_THIS_STUDY = 0xA900

_UID = re.compile(r"[0-9.]{1,64}")
_KEYWORDS = (
    "SOPInstanceUID",
    "SOPClassUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "Modality",
    "PatientID",
    "PatientIdentityRemoved",
)


class Unreadable(Exception):
    """A part that is no DICOM object; told in OtherFailuresSequence."""


@dataclass(slots=True)
class _Receipt:
    """What became of the parts of one request; ``broken`` says why it ended early."""

    arrived: list[Arrived] = field(default_factory=list)
    failed: dict[str, int] = field(default_factory=dict)
    unreadable: int = 0
    broken: str = ""

    @property
    def parts(self) -> int:
        return len(self.arrived) + len(self.failed) + self.unreadable


async def store(storage: Storage, request: web.Request, site: str = "") -> web.Response:
    """Store the parts of one request; the reply names each instance as stored or failed.

    What was complete when a request breaks off is stored all the same.
    """
    if request.content_type != "multipart/related":
        return _refusal(415, "the body is not multipart/related")
    try:
        reader = await request.multipart()
    except (ValueError, AssertionError):
        return _refusal(400, "the multipart type has no usable boundary")
    receipt = _Receipt()
    try:
        await _take_parts(storage, reader, request.match_info.get("study"), receipt)
    except ConnectionError:
        receipt.broken = "the connection was lost"
    except BaseException:
        await asyncio.shield(asyncio.to_thread(storage.add_objects, receipt.arrived, site))
        raise
    fates = await asyncio.to_thread(storage.add_objects, receipt.arrived, site)
    return _answer(receipt, fates)


async def _take_parts(storage: Storage, reader: MultipartReader, study: str | None, receipt: _Receipt) -> None:
    try:
        while (part := await reader.next()) is not None:
            if not isinstance(part, BodyPartReader) or receipt.parts >= MAX_PARTS:
                receipt.broken = f"nested or more than {MAX_PARTS} parts"
                return
            try:
                one = await _receive(storage, part)
            except Unreadable:
                receipt.unreadable += 1
                continue
            if study and one.attributes["StudyInstanceUID"] != study:
                one.staged.abandon()
                receipt.failed[one.uid] = NOT_OF_THIS_STUDY
            else:
                receipt.arrived.append(one)
    except DiskFull:
        receipt.broken = "the disk is full"
    except (ValueError, AssertionError, EOFError):
        receipt.broken = "the multipart body is damaged"


def _answer(receipt: _Receipt, fates: Mapping[str, str]) -> web.Response:
    stored = [uid for uid, fate in fates.items() if fate != "differs"]
    failed = receipt.failed | {uid: DUPLICATE_SOP_INSTANCE for uid, fate in fates.items() if fate == "differs"}
    if receipt.broken == "the disk is full" and not stored:
        return _refusal(507, receipt.broken)
    if not receipt.parts:
        return _refusal(400, receipt.broken or "the body has no part")
    classes = {a.uid: a.attributes.get("SOPClassUID", "") for a in receipt.arrived}
    good = not (failed or receipt.unreadable or receipt.broken)
    status = 200 if good else 202 if stored else 409
    logs.get().info("objects received", count=len(stored), failed=len(failed) + receipt.unreadable, status=status)
    return _reply(status, stored, failed, classes, receipt.unreadable)


async def _receive(storage: Storage, part: BodyPartReader) -> Arrived:
    """One part to a staged file. Raises Unreadable or DiskFull; the file is gone then."""
    kind = part.headers.get(hdrs.CONTENT_TYPE, "").partition(";")[0].strip().lower()
    staged = await asyncio.to_thread(storage.begin)
    try:
        digest, size, head = hashlib.sha256(), 0, bytearray()
        while size <= MAX_OBJECT_BYTES and (chunk := await part.read_chunk(CHUNK_BYTES)):
            size += len(chunk)
            if len(head) < HEAD_BYTES:
                head += chunk[: HEAD_BYTES - len(head)]
            digest.update(chunk)
            await asyncio.to_thread(staged.write, [chunk])
        attributes, syntax = await asyncio.to_thread(_look, kind, bytes(head), staged.path, size)
    except BaseException:
        staged.abandon()
        raise
    return Arrived(attributes, syntax, staged, size, digest.hexdigest())


@cache
def _wanted() -> Wanted:
    return Wanted(_KEYWORDS)


def _look(kind: str, head: bytes, path: Path, size: int) -> tuple[Mapping[str, str], str]:
    begin = data_set_begin(head)
    if begin is None or kind not in {"application/dicom", ""} or size > MAX_OBJECT_BYTES:
        raise Unreadable
    syntax, start = begin
    try:
        found = begun_header(head, _wanted()) if size > len(head) else None
        if found is None:
            data = head if size <= len(head) else path.read_bytes()
            found = read_header(memoryview(data)[start:], syntax, _wanted())
    except (MalformedDataSet, ValueError, OSError):
        raise Unreadable from None
    if not all(_UID.fullmatch(found.get(k, "")) for k in ("SOPInstanceUID", "StudyInstanceUID")):
        raise Unreadable
    return found, syntax


def _refusal(status: int, cause: str) -> web.Response:
    error = OperatorError("store objects", cause)
    return problem(status, error)


def problem(status: int, error: NodeError) -> web.Response:
    body = {"error": {"operation": error.operation, "cause": error.cause, "hint": error.hint}}
    return web.json_response(body, status=status)


def _reply(
    status: int, stored: list[str], failed: Mapping[str, int], classes: Mapping[str, str], unreadable: int
) -> web.Response:
    """Store Instances Response Module (PS3.18 I.2), DICOM JSON."""

    def item(uid: str, reason: int | None = None) -> dict[str, Any]:
        found: dict[str, Any] = {"00081155": {"vr": "UI", "Value": [uid]}}
        if classes.get(uid):
            found["00081150"] = {"vr": "UI", "Value": [classes[uid]]}
        if reason is not None:
            found["00081197"] = {"vr": "US", "Value": [reason]}
        return found

    body: dict[str, Any] = {"00081199": {"vr": "SQ", "Value": [item(uid) for uid in stored]}}
    if failed:
        body["00081198"] = {"vr": "SQ", "Value": [item(uid, reason) for uid, reason in failed.items()]}
    if unreadable:
        other = {"00081197": {"vr": "US", "Value": [CANNOT_UNDERSTAND]}}
        body["0008119A"] = {"vr": "SQ", "Value": [other] * unreadable}
    return web.Response(body=json.dumps(body).encode(), status=status, content_type="application/dicom+json")
