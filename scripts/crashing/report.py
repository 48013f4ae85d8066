"""What a mode of ``scripts/crash`` found, for people and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.table import Table

Say = Callable[[str], None]


@dataclass(slots=True)
class Report:
    """``columns`` name what is in ``rows``; ``wrong`` is empty when every promise held."""

    mode: str
    title: str
    columns: Sequence[str]
    rows: list[Sequence[object]] = field(default_factory=list)
    counts: dict[str, Any] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0


def machine() -> dict[str, Any]:
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
    }


def as_json(report: Report) -> dict[str, Any]:
    return {
        "mode": report.mode,
        "seconds": round(report.seconds),
        **report.counts,
        "table": [dict(zip(report.columns, row, strict=True)) for row in report.rows],
        "wrong": report.wrong,
    }


def show(report: Report, console: Console) -> None:
    table = Table(title=f"{report.title}, {report.seconds:.0f} s", title_justify="left")
    for number, column in enumerate(report.columns):
        table.add_column(column, justify="right" if number and _numbers(report, number) else "left")
    for row in report.rows:
        table.add_row(*map(str, row))
    console.print(table)
    counts = ", ".join(f"{name.replace('_', ' ')}: {count}" for name, count in report.counts.items())
    console.print(f"{report.mode}: {counts}, wrong: {len(report.wrong)}")
    for fault in report.wrong:
        console.print(f"  {fault}")


def _numbers(report: Report, column: int) -> bool:
    return all(isinstance(row[column], int | float) for row in report.rows)
