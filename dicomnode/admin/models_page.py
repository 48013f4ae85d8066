"""The part of the dashboard about model versions; pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dicomnode.admin.markup import Child, Markup, element, join
from dicomnode.admin.model_figures import VersionFigures

Words = Callable[[str], str]
Pill = Callable[[str, Words], Markup]
Table = Callable[[Sequence[str], Sequence[Sequence[Child]], Words], Markup]
RECENT = 10

_BUTTONS = {
    "staged": ("shadow", "activate", "retire"),
    "shadow": ("stage", "activate"),
    "canary": ("stage", "activate"),
    "retired": ("stage",),
    "unlisted": ("stage",),
}


def versions_table(
    versions: Sequence[Mapping[str, Any]],
    figures: Sequence[VersionFigures],
    w: Words,
    *,
    pill: Pill,
    table: Table,
    changes_allowed: bool,
) -> Markup:
    """A row for each version with how it does, and buttons for what its state allows.

    ``versions``: :meth:`dicomnode.model_desk.ModelDesk.listing`.
    """
    by_version = {(f.name, f.version): f for f in figures}
    rows: list[list[Child]] = []
    for row in versions:
        f = by_version.get((row["name"], row["version"])) or VersionFigures(row["name"], row["version"])
        share = [f"{row['percent']:g} %"] if row["percent"] else []
        bad = sum(n for state, n in f.runs.items() if state in ("error", "lost", "refused"))
        moved = max((d.psi for d in f.drift.values()), default=None)
        since = str(row["since_time"] or "")
        rows.append(
            [
                row["name"],
                row["version"],
                join(
                    pill(row["state"], w),
                    " " if row["previous"] else None,
                    element("small", w("previous_version")) if row["previous"] else None,
                    _waits(row, w),
                ),
                ", ".join([*share, *row["peers"]]),
                element("time", since[:19].replace("T", " "), datetime=since) if since else None,
                str(f.runs.get("done", 0)),
                element("span", str(bad), class_="error") if bad else "0",
                f"{f.seconds['0.5']:.2f} s" if "0.5" in f.seconds else "",
                "" if f.agreement is None else f"{f.agreement:.0%} / {f.compared}",
                "" if f.mean_least_dice is None else f"{f.mean_least_dice:.3f}",
                "" if moved is None else f"{moved:.2f}",
                _buttons(row, w) if changes_allowed else None,
            ]
        )
    heads = [
        *("model", "version", "state", "share", "since", "analyses", "failures"),
        *("median_time", "agreement", "least_dice", "drift"),
    ]
    return table([*heads, ""], rows, w)


def _waits(row: Mapping[str, Any], w: Words) -> Markup | None:
    """What keeps a pulled version from going on by its policy."""
    if not row.get("waits"):
        return None
    return element("div", element("small", f"{w('waits_for')}: {w('waits_' + row['waits'])}", title=row["waits_for"]))


def _buttons(row: Mapping[str, Any], w: Words) -> Markup | None:
    base = f"/api/v1/models/{row['name']}"
    found = [
        element("button", w(f"do_{action}"), type="button", data_retry=f"{base}/{row['version']}/{action}")
        for action in _BUTTONS.get(row["state"], ())
        if row["path"] or action == "retire"
    ]
    if row.get("waits") in ("approval", "by-hand"):
        found.append(element("button", w("do_approve"), type="button", data_retry=f"{base}/{row['version']}/approve"))
    if row["state"] in ("active", "canary"):
        found.append(element("button", w("do_rollback"), type="button", data_retry=f"{base}/rollback"))
    return join(*found) if found else None


def history_table(history: Sequence[Mapping[str, Any]], w: Words, *, pill: Pill, table: Table) -> Markup:
    """The newest changes: who, when, why."""
    rows: list[list[Child]] = [
        [
            element("time", str(h["time"])[:19].replace("T", " "), datetime=str(h["time"])),
            f"{h['name']} {h['version']}",
            pill(h["to_state"], w),
            h["who"],
            h["why"] or "",
        ]
        for h in history[:RECENT]
    ]
    return table(["time", "model", "state", "who", "why"], rows, w)


def comparisons_table(comparisons: Sequence[Mapping[str, Any]], w: Words, *, pill: Pill, table: Table) -> Markup:
    """The newest comparisons of two versions on one series."""

    def number(value: Any, form: str) -> str:
        return "" if value is None else format(float(value), form)

    rows: list[list[Child]] = [
        [
            str(c["job_id"]),
            f"{c['name']} {c['version']}",
            c["other_version"],
            pill(c["role"], w),
            number(c["least_dice"], ".3f"),
            number(c["greatest_difference"], ".1%"),
            "" if c["same_findings"] is None else w("yes" if c["same_findings"] else "no"),
            number(c["seconds"], ".2f"),
            number(c["other_seconds"], ".2f"),
            element("span", c["error"], class_="error") if c["error"] else None,
        ]
        for c in comparisons[:RECENT]
    ]
    heads = [
        *("job", "version", "against", "compared_as", "least_dice", "greatest_difference"),
        *("same_findings", "seconds_own", "seconds_other", "error"),
    ]
    return table(heads, rows, w)
