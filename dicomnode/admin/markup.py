"""HTML as values: every string is escaped unless it was made here.

Small enough to read in one go, and there is no way to forget an escape: only
:class:`Markup` passes as it is, and only :func:`element` makes it.
"""

from __future__ import annotations

import html
import re

VOID = frozenset(["meta", "link", "br", "hr", "img"])
_NAME = re.compile(r"[a-z][a-z0-9-]*")


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


Child = str | int | float | Markup | None


def element(tag: str, *children: Child, **attributes: str | bool | None) -> Markup:
    """``<tag attributes>children</tag>``; None children and attributes are left out.

    Underscores in attribute names become hyphens and a trailing one is dropped (``class_``).
    Raises ValueError for a tag or attribute name that is not plain.
    """
    opening = tag
    for raw, value in attributes.items():
        name = raw.rstrip("_").replace("_", "-")
        if not _NAME.fullmatch(name) or name.startswith("on") or name == "style":
            raise ValueError(f"attribute '{name}' is not allowed")
        if value is None or value is False:
            continue
        opening += f" {name}" if value is True else f' {name}="{html.escape(str(value), quote=True)}"'
    if not _NAME.fullmatch(tag) or (tag in {"script", "style"} and children):
        raise ValueError(f"element '{tag}' is not allowed")
    if tag in VOID:
        return Markup(f"<{opening}>")
    return Markup(f"<{opening}>{join(*children)}</{tag}>")


def join(*children: Child) -> Markup:
    """Children one after the other, plain text escaped."""
    return Markup("".join(c if isinstance(c, Markup) else html.escape(str(c)) for c in children if c is not None))


def document(root: Markup) -> str:
    return f"<!DOCTYPE html>\n{root}\n"
