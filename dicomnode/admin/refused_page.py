"""The part of the dashboard about records of the cloud that were not taken: why, and what to do; no values. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dicomnode.admin.conflicts_page import Table, Words
from dicomnode.admin.markup import Child, Markup, element, join
from dicomnode.conflicts import KIND_OF
from dicomnode.logs import uid_hash

Say = Callable[[str], str]
"""A sentence of the node in the reader's language."""

_NOT_RIGHT = re.compile(r"([A-Za-z_]+) is not (.*)")
_OF_A_VALUE = re.compile(rf"{_NOT_RIGHT.pattern}|a field is unknown; .*|the only record of type .*")
"""What :func:`dicomnode.record_shapes.fault` says: people may mend it, where the record was changed."""

_PARTS = ("data", "settled", "the reply is not JSON as it has to be")
"""What stands in front of another reason (:mod:`dicomnode.sync.feed_page`, :mod:`dicomnode.sync.pull_records`)."""


def refused_table(refused: Sequence[Mapping[str, Any]], w: Words, *, table: Table, say: Say) -> Markup:
    """``refused``: :meth:`dicomnode.index.record_reviews.Reviews.refused`; ids are shown as short hashes."""
    rows: list[list[Child]] = [
        [
            element("time", str(r["time"])[:19].replace("T", " "), datetime=str(r["time"])),
            w(f"record_{r['type']}") if r["type"] in KIND_OF else r["type"],
            element("code", uid_hash(r["cloud_id"])) if r["cloud_id"] else None,
            str(r["seq"]) if r["seq"] else "",
            element("span", _reason(r["why"], w, say), class_="reason"),
            element("span", w("mend_value" if _OF_A_VALUE.fullmatch(r["why"]) else "mend_form"), class_="reason"),
        ]
        for r in refused
    ]
    heads = ["time", "kind", "record", "feed_place", "why", "what_to_do"]
    note = element("p", w("refused_note"), " ", element("code", "dicomnode records refused"))
    return join(note, table(heads, rows, w))


def _reason(why: str, w: Words, say: Say) -> str:
    """A reason within another one is told by itself."""
    if found := _NOT_RIGHT.fullmatch(why):
        return w("not_right").format(found[1], say(found[2]))
    part, colon, rest = why.partition(": ")
    return f"{say(part)}: {_reason(rest, w, say)}" if colon and part in _PARTS else say(why)
