"""Benchmark of the node beside DCMTK, Orthanc, stock pynetdicom and the raw limit, in one run.

Everything runs on loopback in a temporary folder. Absolute times drift with the machine and
with other load on it; peers are measured in turn, the best of --repeat is the figure, and the
ratios within one run are what counts. A program that is absent is left out with a message.
"""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from importlib import import_module
from pathlib import Path

import psutil
from benchmarks import report
from benchmarks.report import Section
from benchmarks.tools import Bench, BenchError, Skipped, say
from rich.console import Console

SECTIONS = (
    "intake",
    "parallel",
    "memory",
    "idle",
    "scale",
    "sending",
    "retrieve",
    "sustained",
    "admin",
    "line",
    "reading",
    "turnaround",
    "inference",
)
"""Modules of the package with a function ``run(bench)``, in the order in which they run."""

INFERENCE = ("reading", "inference")
"""What ``--inference`` stands for."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="NAME,NAME", help=f"only these of: {', '.join(SECTIONS)}")
    parser.add_argument("--inference", action="store_true", help="only reading and inference: engines, worker, encoder")
    parser.add_argument("--quick", action="store_true", help="few and small objects, once: to try the script")
    parser.add_argument("--repeat", type=int, default=0, metavar="N", help="times each cell is measured (3; quick: 1)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every sample to this file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables to this file, for the README")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="where to put data (needs some 10 GB; /tmp)")
    found = parser.parse_args()
    found.names = [n for n in found.only.split(",") if n] or list(INFERENCE if found.inference else SECTIONS)
    unknown = [n for n in found.names if n not in SECTIONS]
    if unknown:
        parser.error(f"there is no section {', '.join(unknown)}; there are: {', '.join(SECTIONS)}")
    found.repeat = found.repeat or (1 if found.quick else 3)
    return found


def measure(names: list[str], bench: Bench) -> tuple[dict[str, Section], list[str]]:
    """Every section that came about, and which did not."""
    sections: dict[str, Section] = {}
    failed = []
    for name in names:
        run: Callable[[Bench], Section] = import_module(f"benchmarks.{name}").run
        try:
            sections[name] = run(bench)
        except Skipped as reason:
            bench.skip(f"section {name}: {reason}")
        except BenchError as error:
            say.print(f"[red]section {name} failed: {error}[/red]")
            failed.append(name)
    return sections, failed


def main() -> int:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # children are ended on the way out
    facts = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {round(psutil.virtual_memory().total / 2**30)} GiB, {platform.platform()}",
        "python": platform.python_version(),
        "quick": options.quick,
        "repeat": options.repeat,
        "load_before": os.getloadavg()[0],
    }
    with tempfile.TemporaryDirectory(prefix="dicomnode-bench-", dir=options.work) as name:
        bench = Bench(Path(name), options.quick, options.repeat)
        sections, failed = measure(options.names, bench)
    head = (
        f"{facts['date']}, {facts['machine']}, Python {facts['python']}, best of {options.repeat}, "
        f"load before the run {facts['load_before']:.1f}" + (", --quick: figures mean nothing" * options.quick)
    )
    report.show(Console(width=None if sys.stdout.isatty() else 170), head, sections, bench.skipped)
    if options.json:
        options.json.write_text(report.as_json(facts, sections, bench.skipped))
    if options.markdown:
        options.markdown.write_text(report.as_markdown(head, sections, bench.skipped))
    for section in failed:
        say.print(f"section {section} failed, see above")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
