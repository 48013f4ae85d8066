"""Steps of rules in rows: jobs that wait for others, decided in the transaction that ends what they follow.

There is no state beside the rows, so a process that dies between two steps leaves nothing to
be made up for: either the earlier step has ended and the later one is decided, or neither.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from dicomnode.chains import OPEN, Decision, Fate, Known, Needs, decide, decide_prior, dump, load
from dicomnode.index import companions, prior
from dicomnode.index.database import Database, Row
from dicomnode.index.states import JobEvent, JobState, next_job_state
from dicomnode.priors import PriorState, Wish

EVENTS: Mapping[Fate, JobEvent] = {Fate.run: JobEvent.ready, Fate.skip: JobEvent.skip, Fate.bar: JobEvent.bar}


def bound(needs: Needs, jobs: Mapping[str, int]) -> str:
    """What a step waits for with the jobs of the steps that it names, as its row keeps it."""
    return dump(needs, {name: jobs[name] for name in needs.steps if name in jobs})


def ended(db: Database, job: Row) -> None:
    """Inside a transaction, when a job has ended: decide what waits for it."""
    advance(db, int(job["series_id"]))
    if job["step"] in ("", prior.STEP):  # another study may wait to be compared with it
        for series in prior.comparing(db, int(job["series_id"])):
            advance(db, series)


def advance(db: Database, series_id: int) -> dict[int, JobState]:
    """Inside a transaction: decide every step of the series that waits and can be decided.

    Repeated until nothing changes, since one that is skipped decides those that follow it; each
    round takes one job at least out of ``waiting``. Returns the new states by job.
    """
    decided: dict[int, JobState] = {}
    while True:
        changed = False
        for job in db.rows(
            "SELECT * FROM jobs WHERE series_id = ? AND state = ? ORDER BY id",
            (series_id, JobState.waiting),
        ):
            decision = _decide(db, job)
            if decision.fate is Fate.wait:
                continue
            state = next_job_state(job["state"], EVENTS[decision.fate])
            db.execute(
                "UPDATE jobs SET state = ?, last_error = ?, next_at = 0 WHERE id = ?",
                (state, decision.reason or None, job["id"]),
            )
            decided[int(job["id"])] = state
            changed = True
        if not changed:
            return decided


def _decide(db: Database, job: Row) -> Decision:
    needs, jobs = load(job["needs"])
    known = {name: found for name, number in jobs.items() if (found := _known(db, number)) is not None}
    decision = decide(needs, known)
    if decision.fate is Fate.run and needs.prior is not None:
        decision = _decide_prior(db, job, needs, needs.prior)
    if decision.fate is not Fate.run or not needs.inputs:
        return decision
    missing = companions.bind(db, job, needs.inputs)
    if not missing:
        return decision
    if job["next_at"] > db.clock.ticks():
        return Decision(Fate.wait)
    return Decision(Fate.bar, f"no complete series for input {', '.join(missing)} within {needs.inputs_seconds:g} s")


def _decide_prior(db: Database, job: Row, needs: Needs, wanted: Wish) -> Decision:
    wish = prior.of_job(db, int(job["id"])) or prior.begin(db, job, wanted)
    if wish["state"] in prior.OPEN_STATES:
        return Decision(Fate.wait)
    found = wish["state"] == PriorState.found
    decision = decide_prior(needs, found=found, cause=str(wish["last_error"] or ""))
    if decision.fate is Fate.run and found and not prior.compared(db, job, wish):
        return Decision(Fate.wait)
    return decision


def _known(db: Database, job_id: int) -> Known | None:
    row = db.row("SELECT state, summary FROM jobs WHERE id = ?", (job_id,))
    return None if row is None else Known(str(row["state"]), json.loads(row["summary"]) if row["summary"] else {})


def tend(db: Database) -> bool:
    """Decide steps whose further series did not come in time; True when there were any."""
    if not companions.overdue(db):
        return False
    with db.transaction():
        for series_id in companions.overdue(db):
            advance(db, series_id)
    return True


def reopen(db: Database, series_id: int) -> None:
    """Inside a transaction, after a job was requeued: what was not run because of it waits again."""
    while True:
        changed = False
        for job in db.rows(
            "SELECT id, state, needs FROM jobs WHERE series_id = ? AND state = ?", (series_id, JobState.not_run)
        ):
            _, jobs = load(job["needs"])
            if any((known := _known(db, number)) is not None and known.state in OPEN for number in jobs.values()):
                hold(db, job)
                changed = True
        if not changed:
            return


def hold(db: Database, job: Row) -> None:
    """Inside a transaction: the step waits for what it follows, again."""
    state = next_job_state(job["state"], JobEvent.hold)
    db.execute("UPDATE jobs SET state = ?, last_error = NULL WHERE id = ?", (state, job["id"]))


def told(db: Database, job: Row) -> list[Row]:
    """Steps of the same rule around a job: those that it follows and those that follow it, for people."""
    around: list[Row] = []
    before = load(job["needs"])[1] if job["needs"] else {}
    query = "SELECT id, step, state, model, last_error FROM jobs WHERE id = ?"
    for name, number in before.items():
        row = db.row(query, (number,))
        if row is not None:
            around.append({"follows": True, "name": name, **row})
    for other in db.rows(
        "SELECT id, step, state, model, last_error, needs FROM jobs WHERE series_id = ? AND needs IS NOT NULL"
        " ORDER BY id",
        (job["series_id"],),
    ):
        needs = other.pop("needs")
        if int(job["id"]) in load(needs)[1].values():
            around.append({"follows": False, "name": other["step"].partition("/")[2], **other})
    return around
