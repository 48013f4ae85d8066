"""The part of the dashboard that says where a job was done, and why there; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dicomnode.admin.markup import Markup, element, join

_TERMS = ("locality", "fit", "load", "cost")


def placement_cell(engine: str | None, placement: Mapping[str, Any] | None, w: Callable[[str], str]) -> Markup | None:
    """The engine that did a job, or the place that was chosen for it; where there was a choice, every place's score.

    ``placement``: as :meth:`dicomnode.infer.placement.Decision.as_dict`, with ``tried``.
    """
    if not placement:
        return join(engine) if engine else None
    chosen = str(placement.get("chosen") or w("nowhere"))
    lines = [
        element(
            "li",
            element("b", str(c["name"])),
            f" {c['score']:.3f} (",
            ", ".join(f"{w(term)} {c[term]:.2f}" for term in _TERMS),
            ")",
            f": {w('chosen')}" if c["name"] == placement.get("chosen") else None,
            f": {w('skipped_place')}, {c['skipped']}" if c["skipped"] else None,
        )
        for c in placement.get("candidates", ())
    ]
    lines += [
        element("li", element("b", str(t["name"])), f": {w('failed')}, {t['cause']}")
        for t in placement.get("tried", ())
    ]
    title = element("summary", chosen, element("small", f" {engine}") if engine else None)
    return element("details", title, element("ul", *lines))
