"""The part of the dashboard about the node as one of a fleet; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dicomnode.admin.markup import Markup, element, join

Words = Callable[[str], str]
Pill = Callable[[str, Words], Markup]


def fleet_lines(report: Mapping[str, Any], w: Words, *, pill: Pill) -> Markup | None:
    """``report``: that of ``status``. None where the node is no part of a fleet."""
    lines = [
        line
        for line in (_remote_write(report["remote_write"], w, pill), *_fleet(report["fleet"], w, pill))
        if line is not None
    ]
    return join(*lines) if lines else None


def _remote_write(push: Mapping[str, Any], w: Words, pill: Pill) -> Markup | None:
    if push["state"] == "off":
        return None
    waits = f" {w('waiting')}: {push['waiting']}, {int(push['bytes']) >> 10} KiB" if push["waiting"] else ""
    error = element("span", push["error"], class_="error") if push["error"] else None
    return element("p", w("metrics_push"), " ", pill(push["state"], w), waits, " " if error else None, error)


def _fleet(fleet: Mapping[str, Any], w: Words, pill: Pill) -> list[Markup]:
    lines = []
    if fleet["beat_time"]:
        skew = fleet["clock_skew_seconds"]
        clock = "" if skew is None else f" · {w('clock_skew')} {skew:+.1f} s"
        moment = element("time", fleet["beat_time"][:19].replace("T", " "), datetime=fleet["beat_time"])
        lines.append(element("p", w("cloud_heartbeat"), " ", moment, clock))
    if newest := fleet["newest"]:
        serving = fleet["serving"]
        serves = f" · {w('desired_serving')} {serving['generation']}" if serving else ""
        error = element("span", newest["reason"], class_="error") if newest["reason"] else None
        text = f"{w('desired_state')} {newest['generation']} "
        lines.append(element("p", text, pill(newest["status"], w), serves, " " if error else None, error))
    return lines
