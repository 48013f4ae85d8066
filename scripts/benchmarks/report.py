"""Results: tables for people, JSON for machines, Markdown for the README, goals with a verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Figures:
    """A table: every row has the same keys, which are its headings."""

    title: str
    rows: Sequence[Row]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Goal:
    """A goal of PERFORMANCE.md; ``met`` None where it could not be measured."""

    what: str
    goal: str
    measured: str
    met: bool | None

    @property
    def verdict(self) -> str:
        return {True: "met", False: "NOT MET", None: "not measured"}[self.met]


@dataclass(slots=True)
class Section:
    """What one module measured; ``samples`` is everything, for the JSON file."""

    tables: list[Figures] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    samples: dict[str, Any] = field(default_factory=dict)


def ratio(other: float, ours: float) -> str:
    return f"{other / ours:.2f}x"


def show(console: Console, head: str, sections: dict[str, Section], skipped: Sequence[str]) -> None:
    console.print(head)
    for section in sections.values():
        for figures in section.tables:
            _table(console, figures)
    _table(console, goals_table(sections))
    for text in skipped:
        console.print(f"left out: {text}")


def goals_table(sections: dict[str, Section]) -> Figures:
    rows = [
        {"what": g.what, "goal": g.goal, "measured": g.measured, "verdict": g.verdict}
        for section in sections.values()
        for g in section.goals
    ]
    return Figures("Goals", rows)


def _table(console: Console, figures: Figures) -> None:
    if not figures.rows:
        return
    table = Table(title=figures.title, title_justify="left", caption=figures.note, caption_justify="left")
    for number, key in enumerate(figures.rows[0]):
        table.add_column(key, overflow="fold", justify="right" if number and figures.title != "Goals" else "left")
    for row in figures.rows:
        table.add_row(*(str(value) for value in row.values()))
    console.print(table)


def as_markdown(head: str, sections: dict[str, Section], skipped: Sequence[str]) -> str:
    parts = [head]
    for figures in [*(f for s in sections.values() for f in s.tables), goals_table(sections)]:
        if not figures.rows:
            continue
        names = list(figures.rows[0])
        lines = [f"**{figures.title}**", "", _line(names), _line(["---"] * len(names))]
        lines += [_line(row.values()) for row in figures.rows]
        parts.append("\n".join(lines + (["", figures.note] if figures.note else [])))
    parts += [f"Left out: {text}." for text in skipped]
    return "\n\n".join(parts) + "\n"


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(c).replace("|", "/") for c in cells) + " |"


def as_json(facts: Row, sections: dict[str, Section], skipped: Sequence[str]) -> str:
    found = {
        **facts,
        "skipped": list(skipped),
        "sections": {
            name: {
                "tables": [{"title": f.title, "note": f.note, "rows": list(f.rows)} for f in section.tables],
                "goals": [
                    {"what": g.what, "goal": g.goal, "measured": g.measured, "met": g.met} for g in section.goals
                ],
                "samples": section.samples,
            }
            for name, section in sections.items()
        },
    }
    return json.dumps(found, indent=2) + "\n"
