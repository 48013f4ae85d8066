"""What a body must look like (config/cloud-api.yaml); pure. A wrong one raises OperatorError that says why."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from dicomnode.errors import OperatorError
from dicomnode.strict_json import MOST_DEPTH, Twice, unfit

MAX_RECORDS = 500
MAX_DATA_BYTES = 256 * 1024
MAX_SETTLED = 100
MAX_VERSION = 2**53 - 1
_TYPE = re.compile(r"[a-z][a-z0-9-]{0,31}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")
_KEY = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_UID = re.compile(r"[0-9.]{1,64}")

Check = Callable[[Any], bool]


def _text(pattern: re.Pattern[str]) -> Check:
    return lambda v: isinstance(v, str) and pattern.fullmatch(v) is not None


def _whole(v: Any) -> bool:
    return isinstance(v, int) and not isinstance(v, bool) and 0 <= v <= MAX_VERSION


def _moment(v: Any) -> bool:
    """ISO 8601 with a time zone."""
    try:
        return isinstance(v, str) and len(v) <= 40 and datetime.fromisoformat(v).tzinfo is not None
    except ValueError:
        return False


def _data_fault(v: Any) -> str:
    return unfit(v, MAX_DATA_BYTES) if isinstance(v, dict) else "it is not an object"


def _data(v: Any) -> bool:
    return not _data_fault(v)


def _keys(v: Any) -> bool:
    return isinstance(v, list) and len(v) <= MAX_SETTLED and all(_text(_KEY)(k) for k in v)


_RECORD: Mapping[str, tuple[bool, Check, str]] = {
    "idempotency_key": (True, _text(_KEY), "a UUID in lower case"),
    "type": (True, _text(_TYPE), "a word such as ai-result"),
    "id": (True, _text(_NAME), "1 to 128 letters, digits and . _ : @ -"),
    "version": (True, lambda v: _whole(v) and v >= 1, "a whole number from 1"),
    "base_version": (True, _whole, "a whole number from 0"),
    "changed_time": (True, _moment, "ISO 8601 with a time zone"),
    "base_key": (False, lambda v: v is None or _text(_KEY)(v), "a UUID in lower case, or null"),
    "settles": (False, _keys, f"a list of at most {MAX_SETTLED} UUIDs in lower case"),
    "study": (False, lambda v: v is None or _text(_UID)(v), "a UID, or null"),
    "data": (True, _data, f"an object of at most {MAX_DATA_BYTES} bytes, {MOST_DEPTH} deep"),
}


def name(value: Any, what: str = "node") -> str:
    if not _text(_NAME)(value):
        raise _wrong(f"{what} is not 1 to 128 letters, digits and . _ : @ -")
    return str(value)


def kind(value: Any) -> str:
    if not _text(_TYPE)(value):
        raise _wrong("type is not a word such as ai-result")
    return str(value)


def batch(body: Any) -> tuple[str, list[Any]]:
    """``node`` and its records, which :func:`record_fault` looks at one by one."""
    fields(body, {"node", "records"})
    records = body["records"]
    if not isinstance(records, list) or not 1 <= len(records) <= MAX_RECORDS:
        raise _wrong(f"records is not a list of 1 to {MAX_RECORDS}")
    for record in records:
        if not isinstance(record, dict) or not _text(_KEY)(record.get("idempotency_key")):
            raise _wrong("a record has no idempotency_key, a UUID in lower case")
    return name(body["node"]), records


def record_fault(record: Mapping[str, Any]) -> str:
    """What is wrong with a record, by its key; empty when nothing is."""
    if isinstance(record, Twice):
        return "a field is there twice"
    if why := _data_fault(record.get("data", {})):
        return f"data: {why}"
    for key, (needed, check, right) in _RECORD.items():
        if key not in record:
            if needed:
                return f"{key} is missing"
        elif not check(record[key]):
            return f"{key} is not {right}"
    unknown = len(record.keys() - _RECORD.keys())
    if unknown:
        return f"{unknown} unknown fields"
    return "" if record["base_version"] < record["version"] else "base_version is not below version"


def fields(body: Any, needed: set[str], optional: frozenset[str] = frozenset()) -> Mapping[str, Any]:
    if not isinstance(body, dict):
        raise _wrong("the body is not a JSON object")
    if isinstance(body, Twice):
        raise _wrong("a field is there twice")
    missing = sorted(needed - body.keys())
    if missing:
        raise _wrong(f"{missing[0]} is missing")
    if body.keys() - needed - optional:
        raise _wrong(f"a field is unknown; known: {', '.join(sorted(needed | optional))}")
    return body


def data(value: Any, what: str = "data") -> Mapping[str, Any]:
    if why := _data_fault(value):
        raise _wrong(f"{what}: {why}")
    found: Mapping[str, Any] = value
    return found


def number(text: str | None, default: int, least: int, most: int, what: str) -> int:
    if text is None:
        return default
    if not re.fullmatch(r"\d{1,16}", text, re.ASCII) or not least <= int(text) <= most:
        raise _wrong(f"{what} is not a number from {least} to {most}")
    return int(text)


def _wrong(cause: str) -> OperatorError:
    return OperatorError("read request", cause, "See config/cloud-api.yaml")
