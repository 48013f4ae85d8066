"""A page of the cloud's records (config/cloud-api.yaml): what of it can be kept, and where it ends. Pure.

One record that cannot be kept, or not even be read, must not hold up those behind it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from dicomnode.errors import PeerError
from dicomnode.index.database import Row
from dicomnode.strict_json import Twice, unfit

MOST_NUMBER = 2**53 - 1  # config/cloud-api.yaml, also of what follows
MOST_DATA_BYTES = 256 << 10
MOST_NAMES_BYTES = 4 << 10
_FIELDS: Mapping[str, type] = {
    "type": str,
    "id": str,
    "version": int,
    "key": str,
    "node": str,
    "data": dict,
    "changed_time": str,
    "settled": list,
    "seq": int,
}
NOT_WHOLE = "a field of it is missing or of another type"
_LONG_FIELDS = ("data", "settled")
_NEXT = re.compile(rb'"next"\s*:\s*(\d{1,16})\s*[,}]')
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")


@dataclass(frozen=True, slots=True)
class Unkept:
    """A record that is left out, and why. Its names are empty where they are not as they have to be."""

    why: str
    type: str = ""
    name: str = ""
    seq: int = 0


@dataclass(frozen=True, slots=True)
class Page:
    """``following``: the place behind it, ``newest``: the last of all, where the endpoint tells it."""

    rows: Sequence[Row]
    unkept: Sequence[Unkept]
    following: int
    newest: int | None


def page_of(page: Any) -> Page:
    """Raises PeerError for another form."""
    if not isinstance(page, dict) or not isinstance(page.get("records"), list) or not _place(page.get("next")):
        raise PeerError("pull records", "the reply is not a page of records", "See config/cloud-api.yaml")
    rows, unkept = checked(page["records"])
    newest = page.get("newest")
    return Page(rows, unkept, int(page["next"]), int(newest) if _place(newest) else None)


def checked(rows: Sequence[Any]) -> tuple[list[Row], list[Unkept]]:
    """Rows as config/cloud-api.yaml has them, and those that do not fit here."""
    kept: list[Row] = []
    unkept: list[Unkept] = []
    for row in rows:
        why = fault(row) if _whole_row(row) else NOT_WHOLE
        if why:
            unkept.append(_named(row, why))
        else:
            kept.append(row)
    return kept, unkept


def fault(row: Mapping[str, Any]) -> str:
    """Why a whole record cannot be kept; empty when it can."""
    names = {k: v for k, v in row.items() if k in _FIELDS and k not in _LONG_FIELDS}
    if isinstance(row, Twice):
        return "a field of it is there twice"
    if max(row["version"], row["seq"]) > MOST_NUMBER:
        return f"version or seq is above {MOST_NUMBER}"
    for key in _LONG_FIELDS:
        if why := unfit(row[key], MOST_DATA_BYTES):
            return f"{key}: {why}"
    why = unfit(names, MOST_NAMES_BYTES)
    return f"type, id, key, node and changed_time together: {why}" if why else ""


def place_behind(begin: bytes, end: bytes) -> int | None:
    """``next`` of a page whose records cannot be read: it stands before or behind their list.

    ``begin`` and ``end`` are those of its bytes. Content of a record cannot pass for it: behind the last
    bracket and before the first there is nothing of a record.
    """
    first, last = begin.find(b"["), end.rfind(b"]")
    for part in (end[last + 1 :] if last >= 0 else b"", begin[:first] if first >= 0 else b""):
        if match := _NEXT.search(part):
            place = int(match[1])
            return place if place <= MOST_NUMBER else None
    return None


def _named(row: Any, why: str) -> Unkept:
    found = row if isinstance(row, dict) else {}
    kind, name, seq = (found.get(key) for key in ("type", "id", "seq"))
    return Unkept(
        why,
        kind if isinstance(kind, str) and _NAME.fullmatch(kind) else "",
        name if isinstance(name, str) and _NAME.fullmatch(name) else "",
        int(seq) if _place(seq) else 0,
    )


def _whole_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(k), t) for k, t in _FIELDS.items())
        and all(_whole(row[k]) for k in ("version", "seq"))
        and all(isinstance(v, str) for v in row["settled"])
    )


def _place(value: Any) -> TypeGuard[int]:
    return _whole(value) and value <= MOST_NUMBER


def _whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
