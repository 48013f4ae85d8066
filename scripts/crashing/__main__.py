"""Tries what a node promises: kills, power cuts, failing disks, floods. One run may combine them."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rich.console import Console

from scripts.crashing.campaign import kills
from scripts.crashing.cuts import power
from scripts.crashing.failing import faults
from scripts.crashing.flood import flood
from scripts.crashing.kills import Plan
from scripts.crashing.report import Report, as_json, machine, show

KILLS, FLOOD = 50, 10_000
say = Console(stderr=True, highlight=False)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/crash", description=__doc__)
    parser.add_argument("--kills", type=int, nargs="?", const=KILLS, metavar="N", help=f"kill N processes ({KILLS})")
    parser.add_argument("--power", action="store_true", help="cut the power after every step of recordings")
    parser.add_argument("--faults", action="store_true", help="EIO and ENOSPC at every step, once and from then on")
    parser.add_argument("--flood", type=int, nargs="?", const=FLOOD, metavar="N", help=f"N connects, aborts ({FLOOD})")
    parser.add_argument("--seed", type=int, default=0, help="the same seed chooses the same (0)")
    parser.add_argument("--pace", type=float, default=0.6, help="mean seconds between two kills (0.6)")
    parser.add_argument("--part", type=float, default=1.0, help="of power cuts and steps that fail, only this part")
    parser.add_argument("--json", type=Path, help="write the counts to this file")
    parser.add_argument("--work", type=Path, help="keep everything in this new folder")
    arguments = parser.parse_args()
    if not (arguments.kills or arguments.power or arguments.faults or arguments.flood):
        arguments.kills = KILLS
    return arguments


def modes(arguments: argparse.Namespace, folder: Path) -> Iterator[Callable[[], Report]]:
    seed, part = arguments.seed, arguments.part
    if arguments.power:
        yield partial(power, folder / "power", seed, part, say.print)
    if arguments.faults:
        yield partial(faults, folder / "faults", seed, part, say.print)
    if arguments.flood:
        yield partial(flood, folder / "flood", arguments.flood, seed, say.print)
    if arguments.kills:
        os.environ.setdefault("DICOMNODE__DIMSE__JOURNAL_MB", "8")
        yield partial(kills, folder / "kills", Plan(arguments.kills, seed, arguments.pace), say.print)


def main() -> int:
    arguments = parse()
    folder = arguments.work or Path(tempfile.mkdtemp(prefix="dicomnode-crash-"))
    reports = []
    for mode in modes(arguments, folder):
        report = mode()
        reports.append(report)
        show(report, Console(width=120))
        if arguments.json:
            found = {**machine(), "seed": arguments.seed, "modes": [as_json(r) for r in reports]}
            arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    if any(report.wrong for report in reports):
        say.print(f"what was found lies in {folder}")
        return 1
    if arguments.work is None:
        shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
