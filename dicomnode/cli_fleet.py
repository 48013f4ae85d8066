"""What the command line says of the node as one of a fleet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def fleet_lines(data: Mapping[str, Any]) -> Iterator[str]:
    """Lines of ``dicomnode status``; ``data`` is its report."""
    push = data["remote_write"]
    if push["state"] != "off":
        waits = f", {push['waiting']} collections wait" if push["waiting"] else ""
        yield f"metrics (remote-write): {push['state']}{waits} {push['error']}".rstrip()
    tasks = data["scheduled"]
    if tasks:
        failed = {name: task["error"] for name, task in tasks.items() if task.get("error")}
        yield f"periodic work: {len(tasks)} tasks, {len(failed)} failed last time"
        for name, error in sorted(failed.items()):
            yield f"  {name}: {error} (last run {tasks[name]['last_time']}, {tasks[name]['seconds']} s)"
