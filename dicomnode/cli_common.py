"""What the verbs of the command line share: options, reading the settings and the index, printing."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dicomnode import logs
from dicomnode.errors import OperatorError
from dicomnode.settings import Settings, load_settings

Config = Annotated[
    Path | None, typer.Option("--config", envvar="DICOMNODE_CONFIG", help="TOML file; default from DICOMNODE_CONFIG.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Limit = Annotated[int, typer.Option("--limit", min=1, help="Most rows to print.")]
PIPED_WIDTH = 160
"""Columns where there is no terminal: a pipe or a log needs no narrow table, and a path must stay whole."""

console = Console(highlight=False, markup=False, soft_wrap=True, width=None if sys.stdout.isatty() else PIPED_WIDTH)


def settings_of(config: Path | None) -> Settings:
    if config is None:
        raise OperatorError("start", "no configuration given", "Use --config FILE or set DICOMNODE_CONFIG")
    logs.configure("cli", "warning", "console")
    return load_settings(config)


@contextmanager
def index(settings: Settings) -> Iterator[Any]:
    from dicomnode.index.database import Database

    if not settings.node.data_dir.is_dir():
        raise OperatorError(
            "open index", f"{settings.node.data_dir} does not exist", "Start the node once, or check node.data_dir"
        )
    try:
        db = Database(settings.node.data_dir)
    except PermissionError:
        raise OperatorError(
            "open index",
            f"no permission for {settings.node.data_dir}",
            "Run as the node's user, e.g. sudo -u dicomnode",
        ) from None
    try:
        yield db
    finally:
        db.close()


def check_state(what: str, state: str | None) -> None:
    """Of ``--state`` of a list: what is no state would list nothing, as if all were well. Raises BadParameter."""
    if state is None:
        return
    from dicomnode.index.commitment import AskState, PromiseState
    from dicomnode.index.notices import NoticeState
    from dicomnode.index.states import JobState, SendState

    known: dict[str, list[str]] = {
        "jobs": list(JobState),
        "storage commitment": [*PromiseState, *AskState],
        "notifications": list(NoticeState),
        "conflicts": ["open", "decided"],
    }
    states = [str(one) for one in known.get(what, list(SendState))]
    if state not in states:
        raise typer.BadParameter(f"one of {', '.join(dict.fromkeys(states))}", param_hint="--state")


def output(data: Any, as_json: bool, show: Callable[[Any], None]) -> None:
    if as_json:
        sys.stdout.write(json.dumps(data, indent=2, default=str, ensure_ascii=False) + "\n")
    else:
        show(data)


_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)T(\d\d:\d\d:\d\d)(?:\.\d+)?\+00:00")


def _cell(value: Any) -> str:
    """Times to the second, in UTC as everywhere; ``--json`` has them whole."""
    return "" if value is None else _MOMENT.sub(r"\1 \2", str(value))


def table(rows: list[dict[str, Any]], columns: dict[str, str], empty: str) -> None:
    if not rows:
        console.print(empty)
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in columns.values():
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(key)) for key in columns))
    console.print(table)
