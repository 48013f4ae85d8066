"""Deterministic identity of results: the same work always has the same UIDs.

UIDs are ``2.25.`` + a 128-bit number (PS3.5 B.2) from a SHA-256 over what defines the
result, so a retry, a second lease or a re-run cannot make a second object.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

from dicomnode.records import ResultIdentity


def derived_uid(*parts: str) -> str:
    """UID under 2.25 from the SHA-256 of the length-prefixed parts; at most 44 characters."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8")
        digest.update(len(data).to_bytes(8, "big"))
        digest.update(data)
    raw = bytearray(digest.digest()[:16])
    raw[6] = (raw[6] & 0x0F) | 0x80  # RFC 9562 version 8: custom, so it is a valid UUID
    raw[8] = (raw[8] & 0x3F) | 0x80
    return f"2.25.{int.from_bytes(raw, 'big')}"


def input_digest(instances: Iterable[tuple[str, str]]) -> str:
    """SHA-256 (hex) of the sorted set of (SOPInstanceUID, content hash)."""
    digest = hashlib.sha256()
    for uid, content in sorted(set(instances)):
        digest.update(f"{uid} {content}\n".encode())
    return digest.hexdigest()


def parameters_digest(parameters: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of the parameters as canonical JSON."""
    text = json.dumps(parameters, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def result_identity(
    *,
    inputs: str,
    model_digest: str,
    parameters: str,
    revision: int,
    segment_numbers: Iterable[int],
    content_datetime: str,
    predecessor_sr: tuple[str, str, str, str] | None = None,
    predecessor_labelmap_sr: tuple[str, str, str, str] | None = None,
) -> ResultIdentity:
    """Identity from input set, model digest, parameters and revision (ARCHITECTURE.md).

    ``content_datetime`` is fixed by the caller's stored row; it takes no part in the UIDs.
    """
    base = ("result", inputs, model_digest, parameters, str(revision))
    return ResultIdentity(
        seg_series_uid=derived_uid(*base, "SEG-series"),
        seg_uid=derived_uid(*base, "SEG"),
        sr_series_uid=derived_uid(*base, "SR-series"),
        sr_uid=derived_uid(*base, "SR"),
        tracking_uids={n: derived_uid(*base, "tracking", str(n)) for n in segment_numbers},
        content_datetime=content_datetime,
        revision=revision,
        predecessor_sr=predecessor_sr,
        predecessor_labelmap_sr=predecessor_labelmap_sr,
    )


def tracking_uids(stored: Mapping[str, Any], segment_numbers: Iterable[int]) -> dict[int, str]:
    """Tracking UIDs of a stored identity, and of segments that it does not name.

    Versions up to 0.1 of this program stored only those that the first attempt had found.
    """
    derived = {n: derived_uid(stored["sr_uid"], "tracking", str(n)) for n in segment_numbers}
    return derived | {int(n): uid for n, uid in stored["tracking_uids"].items()}


def failure_identity(
    *,
    inputs: str,
    model: str,
    revision: int,
    reason: str,
    content_datetime: str,
    predecessor_sr: tuple[str, str, str, str] | None = None,
) -> ResultIdentity:
    """Identity of a report of failure, from input set, model as the rule names it, revision and kind of reason.

    The model's digest takes no part: there may be no model that can be read.
    """
    base = ("failure", inputs, model, str(revision), reason)
    return ResultIdentity(
        seg_series_uid=derived_uid(*base, "SEG-series"),
        seg_uid=derived_uid(*base, "SEG"),
        sr_series_uid=derived_uid(*base, "SR-series"),
        sr_uid=derived_uid(*base, "SR"),
        tracking_uids={},
        content_datetime=content_datetime,
        revision=revision,
        predecessor_sr=predecessor_sr,
    )
