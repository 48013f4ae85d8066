"""What is going on, step by step: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

TITLE, WIDE, WIDE_BAR, NARROW_BAR = 34, 100, 24, 14
"""Columns on a terminal: of the title, from which width on the bar is long, of the bars."""


@dataclass(slots=True)
class Step:
    """``advance`` counts one, ``say`` replaces the words at the end of the line."""

    advance: Callable[[], None]
    say: Callable[[str], None]
    seconds: float = 0.0


@contextmanager
def step(console: Console, title: str, total: int | None = None) -> Iterator[Step]:
    """Tell that a step begins, how far it is and how long it took."""
    begin = time.perf_counter()
    if console.is_terminal:
        bar = [BarColumn(NARROW_BAR if console.width < WIDE else WIDE_BAR)] if total else []
        room = max(10, console.width - TITLE - 14 - (bar[0].bar_width or 0 if bar else 0))
        columns = (
            SpinnerColumn(finished_text="[green]✓"),
            TextColumn(f"{{task.description:<{TITLE}}}"),
            *bar,
            TextColumn(f"{{task.fields[words]:<{room}}}"),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=total, words="")
            count = 0

            def advance() -> None:
                nonlocal count
                count += 1
                progress.update(task, completed=count, words=f"{count} of {total}")

            told = Step(advance, lambda words: progress.update(task, words=words[:room]))
            yield told
            told.seconds = time.perf_counter() - begin
            progress.update(task, total=total or 1, completed=total or 1)
    else:
        console.print(f"{title} ...")
        told = Step(lambda: None, lambda words: console.print(f"  {words}"))
        yield told
        told.seconds = time.perf_counter() - begin
        console.print(f"  done in {told.seconds:.1f} s")
