"""``scripts/crash --faults``: EIO and ENOSPC at every step, once and from then on."""

from __future__ import annotations

import random
import time
from collections import Counter
from pathlib import Path

from scripts.crashing.faults import ACTIVATION, LATER, Intake, Result, Whole, intake_cases
from scripts.crashing.report import Report, Say
from scripts.crashing.shim import build

PROGRESS = 50


def faults(folder: Path, seed: int, part: float, say: Say) -> Report:
    folder.mkdir(parents=True, exist_ok=True)
    library = build(folder)
    report = Report("faults", "a disk that fails", ("step", "cases", "struck", "the process ended", "wrong"))
    begin = time.monotonic()
    results: dict[str, list[Result]] = {}
    with Intake(folder / "intake", library) as intake:
        cases = intake_cases(intake, random.Random(seed), part)
        for number, case in enumerate(cases, 1):
            result = intake.run(case)
            results.setdefault(f"intake, {case.op.name}", []).append(result)
            if number % PROGRESS == 0 or result.wrong:
                say(f"{number} of {len(cases)} cases: {case}: {result.outcome()} {'; '.join(result.wrong)}")
    with Whole(folder / "whole", library) as whole:
        for later in LATER:
            result = whole.run(later)
            say(f"while {later.when}, {later.case}: {result.outcome()} {'; '.join(result.wrong)}")
            results.setdefault(f"while {later.when}", []).append(result)
        for case in ACTIVATION:
            wrong = tuple(whole.activate(case))
            results.setdefault("models activate", []).append(Result(case, True, (), None, wrong))
    report.seconds = time.monotonic() - begin
    fill(report, results)
    return report


def fill(report: Report, results: dict[str, list[Result]]) -> None:
    total: Counter[str] = Counter()
    for step, found in results.items():
        struck, ended = sum(r.fired for r in found), sum(r.exit is not None for r in found)
        wrong = [f"{step}: {r.case}: {text}" for r in found for text in r.wrong]
        report.rows.append((step, len(found), struck, ended, len(wrong)))
        report.wrong += wrong
        total.update(cases=len(found), struck=struck, process_ended=ended)
    report.counts = dict(total)
