"""What the command line says of the node as one of a fleet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import typer

from dicomnode.cli_common import Config, Json, console, index, output, settings_of, table

desired_app = typer.Typer(no_args_is_help=True, help="What the cloud desires of this node: show, clear.")


def cloud_waits(cloud: Mapping[str, Any]) -> str:
    """What is not at the cloud yet, and what that holds up; empty when nothing waits."""
    items = sum(lane["count"] for lane in cloud["waiting"])
    if not items:
        return ""
    oldest = max(lane["oldest_seconds"] for lane in cloud["waiting"])
    size = cloud["waiting_bytes"] / (1 << 20)
    text = f"\n  waiting for it: {items} items, {size:.1f} MiB, the oldest for {_long(oldest)}"
    if cloud["spool_full"]:
        text += f"; sync.spool_mb is {cloud['spool_bytes'] >> 20}: jobs of priority batch wait until less does"
    return text


def repository_line(trust: Mapping[str, Any]) -> str:
    """State of the signed repository, until when what it signed holds, and why nothing new comes."""
    parts = [str(trust["state"])]
    if trust.get("expires_time") and trust["state"] != "expired":
        parts.append(f"what was signed last is valid until {trust['expires_time'][:19]}")
    return ", ".join(parts) + (f": {trust['reason']}" if trust["reason"] else "")


def _long(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def fleet_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Lines of ``dicomnode status``; ``data`` is its report."""
    push = data["remote_write"]
    if push["state"] != "off":
        waits = f", {push['waiting']} collections wait" if push["waiting"] else ""
        yield f"metrics (remote-write): {push['state']}{waits}{': ' if push['error'] else ''}{push['error']}"
    fleet = data["fleet"]
    if fleet["beat_time"]:
        skew = fleet["clock_skew_seconds"]
        clock = "" if skew is None else f", this clock is {skew:+.1f} s against the cloud's"
        yield f"heartbeat to the cloud: {fleet['beat_time'][:19]}{clock}"
    if newest := fleet["newest"]:
        serving = fleet["serving"]["generation"] if fleet["serving"] else "none"
        line = f"desired state: generation {newest['generation']} {newest['status']}, serving {serving}"
        yield f"{line}: {newest['reason']}" if newest["reason"] else line
    tasks = data["scheduled"]
    if tasks:
        failed = {name: task["error"] for name, task in tasks.items() if task.get("error")}
        yield f"periodic work: {len(tasks)} tasks, {len(failed)} failed last time"
        for name, error in sorted(failed.items()):
            yield f"  {name}: {error} (last run {tasks[name]['last_time']}, {tasks[name]['seconds']} s)"


@desired_app.command("show")
def desired_show(config: Config = None, as_json: Json = False) -> None:
    """What the cloud desires of this node: what serves, what was refused and why; the newest first."""
    from dicomnode.index.desired import DesiredStates

    settings = settings_of(config)
    with index(settings) as db:
        data = {"accept": list(settings.fleet.accept), "states": DesiredStates(db).listing()}

    def show(found: dict[str, Any]) -> None:
        console.print(f"the cloud may set: {', '.join(found['accept']) or 'nothing (fleet.accept)'}")
        rows = [
            {**r, "serves": "yes" if r["serves"] else "", "known": "yes" if r["reported"] else "no", "parts": parts(r)}
            for r in found["states"]
        ]
        columns = {"generation": "generation", "status": "state", "serves": "serves", "parts": "what"}
        table(
            rows, columns | {"decided_time": "decided", "known": "reported", "reason": "reason"}, "nothing is desired"
        )

    output(data, as_json, show)


def parts(row: Mapping[str, Any]) -> str:
    """What a state sets, in words."""
    state = row["state"]
    models = state.get("models") if isinstance(state.get("models"), dict) else {}
    found = [f"{name}@{version}" for name, version in (models or {}).items()]
    if state.get("rules") is not None:
        found.append("rules")
    if state.get("log_level"):
        found.append(f"log level {state['log_level']}")
    return ", ".join(found)


@desired_app.command("clear")
def desired_clear(config: Config = None, as_json: Json = False) -> None:
    """Forget every desired state: rules and log level are the configuration's until the cloud names one anew."""
    from dicomnode import doorbell
    from dicomnode.index.desired import DesiredStates
    from dicomnode.index.operation import Events

    settings = settings_of(config)
    with index(settings) as db:
        count = DesiredStates(db).clear()
        Events(db).add("info", "desired-state", "all", f"{count} desired states were forgotten (operator)")
    doorbell.ring(settings.node.data_dir, "worker")
    output({"forgotten": count}, as_json, lambda d: console.print(f"{d['forgotten']} desired states forgotten"))
