"""What the demo prints: tables for people, one JSON value for programs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

STAGES = {
    "wait": "wait for completeness",
    "read": "read and decode",
    "inference": "inference",
    "postprocess": "post-processing",
    "encode": "encode SEG and SR",
    "commit": "commit durably",
    "deliver": "deliver to the PACS",
}


def show(report: Mapping[str, Any], console: Console) -> None:
    """The whole report. Wide lines (paths, commands) are not wrapped."""
    console.print()
    for job in report["jobs"]:
        _show_job(job, console)
    if report["comparisons"]:
        console.print(_comparisons(report["comparisons"]))
    if report["unmatched"]:
        console.print(_unmatched(report["unmatched"]))
    console.print(_checks(report["checks"]))
    console.print(_verdict(report))
    _where(report, console)


def _mark(ok: bool) -> Text:
    return Text("right", "bold green") if ok else Text("WRONG", "bold red")


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _show_job(job: Mapping[str, Any], console: Console) -> None:
    style = {"done": "green", "refused": "yellow"}.get(job["state"], "red")
    head = Text.assemble((f"Job {job['id']}  ", "bold"), (job["state"], f"bold {style}"), f"  {job['series']}")
    lines: list[Any] = [
        head,
        Text(f"  {job['model']}, {job['engine']}" if job["engine"] else f"  {job['model']}", "dim"),
    ]
    lines.append(Text(f"  complete because: {job['reason']}", "dim"))
    if job["error"]:
        verb = "refused because" if job["state"] == "refused" else "error"
        lines.append(Text(f"  {verb}: {job['error']}", style))
    lines += [Text(f"  note: {note}", "dim") for note in job["notes"]]
    for result in job["results"]:
        place = f"at the PACS, {result['bytes'] / 1024:.0f} KiB" if result["at_pacs"] else "NOT at the PACS"
        lines.append(Text(f"  {result['kind']:<3} {place}", "" if result["at_pacs"] else "red"))
    console.print(*lines, sep="\n", soft_wrap=True)
    if job["seconds"]:
        console.print(_stages(job))
    if job["measurements"] and not job["compared"]:
        table = _table("Measured (from the SR that came back)")
        for name in ("structure", "quantity"):
            table.add_column(name)
        table.add_column("value", justify="right")
        for row in job["measurements"]:
            table.add_row(row["structure"], row["quantity"], f"{row['value']:,.2f} {row['unit']}")
        console.print(table)


def _stages(job: Mapping[str, Any]) -> Table:
    table = _table("Time per stage")
    table.add_column("stage")
    table.add_column("seconds", justify="right")
    table.add_column("")
    seconds = {k: float(v) for k, v in job["seconds"].items() if k in STAGES}
    longest = max(seconds.values(), default=1.0) or 1.0
    for key, name in STAGES.items():
        if key in seconds:
            table.add_row(name, f"{seconds[key]:.2f}", Text("█" * max(1, round(30 * seconds[key] / longest)), "cyan"))
    table.add_section()
    table.add_row(
        Text("last image in -> results at PACS", "bold"),
        Text(f"{job['seconds']['end to end']:.2f}", "bold"),
        "",
    )
    return table


def _comparisons(rows: list[Mapping[str, Any]]) -> Table:
    table = _table("Measured (from the SR that came back) against the phantom's truth")
    for name in ("structure", "quantity"):
        table.add_column(name)
    for name in ("measured", "true", "difference", "allowed"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for row in rows:
        unit = "%" if row["relative"] else ("pt" if row["unit"] == "%" else row["unit"])
        table.add_row(
            row["structure"],
            f"{row['quantity']}, {row['unit']}",
            f"{row['measured']:,.2f}",
            f"{row['true']:,.2f}",
            f"{row['difference']:+.2f} {unit}",
            f"±{row['limit']:g}",
            _mark(row["ok"]),
        )
    return table


def _unmatched(rows: list[Mapping[str, Any]]) -> Table:
    table = _table("Series without a job: stored and indexed, but no rule matches them")
    table.add_column("series")
    table.add_column("why")
    for row in rows:
        table.add_row(row["series"], row["why"])
    return table


def _checks(rows: list[Mapping[str, Any]]) -> Table:
    table = _table("Checks")
    for name in ("what", "found", "wanted", ""):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row["what"], row["found"], row["wanted"], _mark(row["ok"]))
    return table


def _verdict(report: Mapping[str, Any]) -> Panel:
    sent, seconds = report["sent"], report["seconds"]
    rate = f"{sent['images'] / seconds['send']:.0f} images/s" if seconds["send"] else ""
    lines = [
        Text(_sentence(report), "bold"),
        Text(f"{sent['images']} images ({sent['megabytes']:.0f} MB) sent in {seconds['send']:.1f} s, {rate}"),
    ]
    if seconds["last_response_to_results"] is not None:
        lines.append(
            Text(
                f"last C-STORE response -> all results at the PACS: {seconds['last_response_to_results']:.2f} s", "bold"
            )
        )
    lines.append(Text(f"whole demo {seconds['total']:.1f} s", "dim"))
    style = "green" if report["ok"] else "red"
    return Panel(Group(*lines), border_style=style, box=box.ROUNDED, expand=False)


def _sentence(report: Mapping[str, Any]) -> str:
    if not report["ok"]:
        return "Something is wrong, see above."
    if any(job["state"] == "done" for job in report["jobs"]):
        return "Everything came back right."
    if report["jobs"]:
        return "Every series was answered, but none analysed: the model refused them, each with its reason above."
    return "Everything was stored, but nothing analysed: no series is CT, CR or DX, so no rule matched."


def _where(report: Mapping[str, Any], console: Console) -> None:
    width = max(len(name) for name in report["where"])
    for name, place in report["where"].items():
        console.print(f"  {name:<{width}}  ", Text(str(place), "cyan"), sep="", soft_wrap=True)


def show_playground(report: Mapping[str, Any], console: Console) -> None:
    """What a person may try while node and PACS stay up."""
    console.print()
    console.print(Text("Node and PACS stay up. Try, in another terminal:", "bold"))
    for purpose, command in report["try"].items():
        console.print(Text(f"  # {purpose}", "dim"), soft_wrap=True)
        console.print(f"  {command}", soft_wrap=True)
    console.print()
    console.print(Text("Ctrl-C ends them.", "bold"))
