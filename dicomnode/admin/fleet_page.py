"""The part of the dashboard about the node as one of a fleet; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dicomnode.admin.markup import Markup, element, join

Words = Callable[[str], str]
Pill = Callable[[str, Words], Markup]


def fleet_lines(report: Mapping[str, Any], w: Words, *, pill: Pill, say: Words = str) -> Markup | None:
    """``report``: that of ``status``; ``say``: a sentence of the node in the reader's language.

    None where the node is no part of a fleet.
    """
    lines = [
        line
        for line in (_remote_write(report["remote_write"], w, pill, say), *_fleet(report["fleet"], w, pill, say))
        if line is not None
    ]
    return join(*lines) if lines else None


def _remote_write(push: Mapping[str, Any], w: Words, pill: Pill, say: Words) -> Markup | None:
    if push["state"] == "off":
        return None
    size, minutes = max(1, int(push["bytes"]) >> 10), float(push["oldest_seconds"]) / 60
    waits = " " + w("spooled").format(push["waiting"], size, f"{minutes:.0f}") if push["waiting"] else ""
    error = element("span", say(push["error"]), class_="error") if push["error"] else None
    return element("p", w("metrics_push"), " ", pill(push["state"], w), waits, " " if error else None, error)


def _fleet(fleet: Mapping[str, Any], w: Words, pill: Pill, say: Words) -> list[Markup]:
    lines = []
    if fleet["beat_time"]:
        skew = fleet["clock_skew_seconds"]
        clock = "" if skew is None else f" · {w('clock_skew')} {skew:+.1f} s"
        moment = element("time", fleet["beat_time"][:19].replace("T", " "), datetime=fleet["beat_time"])
        lines.append(element("p", w("cloud_heartbeat"), " ", moment, clock))
    if newest := fleet["newest"]:
        serving = fleet["serving"]
        serves = f" · {w('desired_serving')} {serving['generation']}" if serving else ""
        error = element("span", say(newest["reason"]), class_="error") if newest["reason"] else None
        text = f"{w('desired_state')} {newest['generation']} "
        told = None if newest["reported"] else f" · {w('not_reported')}"
        lines.append(element("p", text, pill(newest["status"], w), serves, told, " " if error else None, error))
    if fleet["beat_time"] or fleet["newest"]:
        accepted = ", ".join(fleet["accept"]) or w("accept_nothing")
        lines.append(element("p", w("accept"), " ", accepted))
    return lines
