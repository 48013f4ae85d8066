"""Command line of ``scripts/crash``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scripts.crashing.kills import Campaign, Plan, Runner, Setup
from scripts.crashing.verdict import Verdict, judge

say = Console(stderr=True, highlight=False)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/crash", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="processes to kill (50)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed chooses the same (0)")
    parser.add_argument("--pace", type=float, default=0.6, help="mean seconds between two kills (0.6)")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--work", type=Path, help="keep everything in this new folder")
    arguments = parser.parse_args()
    os.environ.setdefault("DICOMNODE__DIMSE__JOURNAL_MB", "8")
    folder = arguments.work or Path(tempfile.mkdtemp(prefix="dicomnode-crash-"))
    setup = Setup(folder)
    try:
        campaign = Runner(setup, Plan(arguments.kills, arguments.seed, arguments.pace), say.print).run()
        verdict = judge(setup, campaign)
    finally:
        setup.close()
    result = summary(campaign, verdict)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    if verdict.wrong:
        say.print(f"what was found lies in {folder}")
        return 1
    if arguments.work is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


def summary(campaign: Campaign, verdict: Verdict) -> dict[str, Any]:
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "seed": campaign.plan.seed,
        "seconds": round(campaign.seconds),
        "kills": {f"{process}, {phase}": count for (process, phase), count in sorted(campaign.killed.items())},
        "kills_in_all": sum(campaign.killed.values()),
        "rounds": campaign.rounds,
        "acknowledged": verdict.acknowledged,
        "objects": verdict.objects,
        "results": verdict.results,
        "lost": verdict.lost,
        "queries_and_moves": dict(campaign.asked),
        "wrong": list(verdict.wrong),
    }


def show(result: dict[str, Any]) -> None:
    table = Table(title=f"{result['kills_in_all']} kills in {result['seconds']} s", title_justify="left")
    table.add_column("process, and what the node did")
    table.add_column("kills", justify="right")
    for name, count in result["kills"].items():
        table.add_row(name, str(count))
    Console(width=120).print(table)
    say.print(
        f"{result['acknowledged']} answers of success for {result['objects']} objects, {result['results']} results;"
        f" lost: {result['lost']}, otherwise wrong: {len(result['wrong'])}"
    )
    for fault in result["wrong"]:
        say.print(f"  {fault}")


if __name__ == "__main__":
    sys.exit(main())
