"""The part of the dashboard about the node as one of a fleet; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dicomnode.admin.markup import Markup, element, join

Words = Callable[[str], str]
Pill = Callable[[str, Words], Markup]


def fleet_lines(report: Mapping[str, Any], w: Words, *, pill: Pill) -> Markup | None:
    """``report``: that of ``status``. None where the node is no part of a fleet."""
    lines = [line for line in (_remote_write(report["remote_write"], w, pill),) if line is not None]
    return join(*lines) if lines else None


def _remote_write(push: Mapping[str, Any], w: Words, pill: Pill) -> Markup | None:
    if push["state"] == "off":
        return None
    waits = f" {w('waiting')}: {push['waiting']}, {int(push['bytes']) >> 10} KiB" if push["waiting"] else ""
    error = element("span", push["error"], class_="error") if push["error"] else None
    return element("p", w("metrics_push"), " ", pill(push["state"], w), waits, " " if error else None, error)
