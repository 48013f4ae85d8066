"""An analysis beside the earlier study that its job wished for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

from dicomnode.chains import load as load_needs
from dicomnode.index import companions, prior
from dicomnode.index.database import Database, Row
from dicomnode.infer.summary import measurement
from dicomnode.priors import PriorState
from dicomnode.priors import changes as changes_of
from dicomnode.records import Analysis, Change, Prior


def with_prior(db: Database, job: Row, analysis: Analysis) -> Analysis:
    """The analysis with what it is compared with, or with a note why there is nothing."""
    row = prior.of_job(db, int(job["id"]))
    if row is None:
        return analysis
    if row["state"] != PriorState.found:
        return replace(analysis, notes=(*analysis.notes, f"No earlier study to compare with: {row['last_error']}"))
    kept = json.loads(row["compared"])
    found = Prior(
        study_uid=kept["StudyInstanceUID"],
        series_uid=kept["SeriesInstanceUID"],
        study_date=kept["StudyDate"],
        modality=kept["Modality"],
        instances=tuple(prior.instances(db, int(row["series_id"]))),
        model_version=kept["model_version"] or "" if kept["state"] == "done" else "",
        changes=_changes(analysis, kept["measurements"]) if kept["state"] == "done" else (),
    )
    notes = analysis.notes
    if kept["state"] not in (None, "done"):
        notes = (*notes, f"The earlier study could not be analysed by this model; its job ended as {kept['state']}")
    return replace(analysis, prior=found, notes=notes)


def _changes(analysis: Analysis, before: list[dict[str, Any]]) -> tuple[Change, ...]:
    summaries = [measurement(m, analysis) for m in analysis.measurements]
    known = {(c["key"], c["segment"], c["unit"]): c["before"] for c in changes_of(summaries, before)}
    return tuple(
        Change(m, known[at])
        for m, s in zip(analysis.measurements, summaries, strict=True)
        if (at := (s["key"], s["segment"], s["unit"])) in known
    )


def changes_summary(analysis: Analysis) -> list[dict[str, Any]]:
    """The changes as the summary of a job holds them."""
    return [
        {**measurement(c.measurement, analysis), "before": c.before, "change": c.measurement.value - c.before}
        for c in (analysis.prior.changes if analysis.prior else ())
    ]


def with_companions(db: Database, job: Row, analysis: Analysis) -> Analysis:
    """The analysis with the further series and masks that it looked at."""
    found = companions.bound(db, int(job["id"]))
    masks = load_needs(job["needs"])[0].masks if job["needs"] else {}
    if not found and not masks:
        return analysis
    others = tuple(
        (str(r["SeriesInstanceUID"]), str(r["SOPClassUID"]), str(r["SOPInstanceUID"]))
        for rows in found.values()
        for r in rows
    )
    notes = tuple(f"Input {name}: series {rows[0]['SeriesInstanceUID']}" for name, rows in found.items())
    notes += tuple(f"Input {name}: the mask that step {ref} found" for name, ref in masks.items())
    return replace(analysis, others=others, notes=(*analysis.notes, *notes))


def inputs_digest(db: Database, job: Row) -> str:
    """What defines the result: the job's own inputs, further series, and the earlier study where there is one."""
    parts = [str(job["inputs_sha256"])]
    further = companions.digest(db, int(job["id"]))
    parts += [further] if further else []
    if job["needs"]:
        needs, jobs = load_needs(job["needs"])
        sql = "SELECT SOPInstanceUID FROM results WHERE job_id = ? AND kind = 'SEG'"
        parts += [f"{name} {ref} {db.value(sql, (jobs[ref.partition(':')[0]],))}" for name, ref in needs.masks.items()]
    row = prior.of_job(db, int(job["id"]))
    if row is not None and row["state"] == PriorState.found:
        kept = json.loads(row["compared"])
        parts += [kept["inputs_sha256"], str(kept["job"])]
    return parts[0] if len(parts) == 1 else hashlib.sha256(" ".join(parts).encode()).hexdigest()
