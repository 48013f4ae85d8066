"""``scripts/crash --kills``: a campaign of kills, and what must hold after it."""

from __future__ import annotations

from pathlib import Path

from scripts.crashing.kills import Campaign, Plan, Runner, Setup
from scripts.crashing.report import Report, Say
from scripts.crashing.verdict import Verdict, judge


def kills(folder: Path, plan: Plan, say: Say) -> Report:
    setup = Setup(folder)
    try:
        campaign = Runner(setup, plan, say).run()
        verdict = judge(setup, campaign)
    finally:
        setup.close()
    return told(campaign, verdict)


def told(campaign: Campaign, verdict: Verdict) -> Report:
    report = Report("kills", f"{sum(campaign.killed.values())} kills", ("process", "what the node did", "kills"))
    report.rows = [(*key, count) for key, count in sorted(campaign.killed.items())]
    report.counts = {
        "kills": sum(campaign.killed.values()),
        "rounds": campaign.rounds,
        "answers_of_success": verdict.acknowledged,
        "objects": verdict.objects,
        "results": verdict.results,
        "lost": verdict.lost,
        **{name: campaign.asked[name] for name in ("find", "moved") if name in campaign.asked},
    }
    report.wrong = list(verdict.wrong)
    report.seconds = campaign.seconds
    return report
