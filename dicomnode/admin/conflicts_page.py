"""The part of the dashboard about conflicts of records: names of fields, never values; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dicomnode.admin.markup import Child, Markup, element

Words = Callable[[str], str]
Pill = Callable[[str, Words], Markup]
Table = Callable[[Sequence[str], Sequence[Sequence[Child]], Words], Markup]


def conflicts_table(conflicts: Sequence[Mapping[str, Any]], w: Words, *, pill: Pill, table: Table) -> Markup:
    """``conflicts``: :meth:`dicomnode.index.record_reviews.Reviews.listing`; ids are left out, some are UIDs."""
    rows: list[list[Child]] = [
        [
            str(c["id"]),
            w(f"record_{c['type']}"),
            ", ".join(c["fields"]),
            pill("review_open" if c["state"] == "open" else "review_decided", w),
            w(f"side_{c['decided_as']}") if c["decided_as"] else "",
            c["decided_by"] or "",
            w(c["why"]),
            element("time", str(c["created_time"])[:19].replace("T", " "), datetime=str(c["created_time"])),
            element("code", f"dicomnode conflicts show {int(c['id'])}") if c["state"] == "open" else None,
        ]
        for c in conflicts
    ]
    return table(["id", "kind", "fields", "state", "taken", "who", "why", "since", ""], rows, w)
