"""Jobs: one analysis of one series by one model, leased by a worker.

A lease is a row, so a worker that dies loses it by silence and the work is redone with the
same result UIDs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dicomnode.chains import Needs
from dicomnode.clock import iso
from dicomnode.cloud_settings import OFF, CloudPlan
from dicomnode.errors import LeaseLost, OperatorError
from dicomnode.identity import input_digest
from dicomnode.index import chain, companions, prior, sharing
from dicomnode.index.catalogue import Catalogue, NewInstance
from dicomnode.index.cloud_rows import hand_to_cloud
from dicomnode.index.database import Row
from dicomnode.index.job_views import JobViews
from dicomnode.index.notices import make_notices
from dicomnode.index.states import JobEvent, JobState, backoff_seconds, next_job_state
from dicomnode.index.urgency import hurry, raise_alert
from dicomnode.orders import Order, dump, load, shares

PRIORITIES: Mapping[str, int] = {"stat": 0, "routine": 1, "batch": 2}
REPORT_TRIES = 3
"""A report of failure that takes its worker down is not tried for ever."""
LONGEST_WAIT = 300.0
"""Seconds between two tries of one job."""


@dataclass(frozen=True, slots=True)
class Request:
    """Select's wish for a job: which model, for which rules, to which peers; ``notify`` get an IAN.

    ``names``: the steps of rules, as ``rule/step``, that it is. ``step`` is the one that has
    ``needs``; it has a job of its own.
    """

    model: str
    rules: tuple[str, ...]
    destinations: tuple[str, ...]
    priority: str
    notify: tuple[str, ...] = ()
    order: Order = field(default_factory=Order)
    names: tuple[str, ...] = ()
    step: str = ""
    needs: Needs = field(default_factory=Needs)


@dataclass(frozen=True, slots=True)
class Result:
    """A finished object of a job, its file durable. ``kind`` and ``shows`` as in ``EncodedObject``."""

    kind: str
    instance: NewInstance
    shows: str = ""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a worker hands over when a job is finished."""

    results: Sequence[Result]
    notes: Sequence[str] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    critical: Sequence[str] = ()
    """Keys of the conditions that the findings meet; such results go first."""
    alert: bool = True
    """Whether a webhook is told of critical results."""


class Jobs(JobViews):
    # Select's side

    def select(self, series_id: int, generation: int, reason: str, requests: Iterable[Request]) -> list[int]:
        """Close the series' generation and make its jobs, in one transaction.

        The input set is what the index holds now. A job for the same model and the same
        inputs is not made twice; a job for changed inputs is the next revision, and what
        was still waiting for the old set is superseded. A request comes behind those whose
        steps it names. Returns the new job ids; does nothing when the series has grown meanwhile.
        """
        db = self.db
        made: list[int] = []
        with db.transaction():
            series = db.row("SELECT id, generation, last_received_at FROM series WHERE id = ?", (series_id,))
            if series is None or series["generation"] != generation:
                return []
            db.execute(
                "UPDATE series SET selected_generation = ?, selected_reason = ? WHERE id = ?",
                (generation, reason, series_id),
            )
            inputs = [
                (str(r["SOPInstanceUID"]), str(r["dataset_sha256"]))
                for r in db.rows(
                    "SELECT SOPInstanceUID, dataset_sha256 FROM instances WHERE series_id = ?", (series_id,)
                )
            ]
            digest = input_digest(inputs)
            steps: dict[str, int] = {}
            for request in requests:
                known, job_id = self._make(series, generation, reason, request, digest, steps)
                steps.update(dict.fromkeys(request.names, known or job_id))
                if job_id:
                    made.append(job_id)
                    for uid, content in inputs:
                        db.insert("job_inputs", {"job_id": job_id, "SOPInstanceUID": uid, "sha256": content})
            for waiting in (series_id, *companions.waiting_beside(db, series_id)):
                chain.advance(db, waiting)
        return made

    def _make(
        self, series: Row, generation: int, reason: str, request: Request, digest: str, steps: Mapping[str, int]
    ) -> tuple[int, int]:
        """The job that is there for these inputs, or 0, and the one that was made, or 0."""
        db = self.db
        whose = (series["id"], request.model, request.step)
        latest = db.row(
            "SELECT id, revision, inputs_sha256 FROM jobs WHERE series_id = ? AND model = ? AND step = ?"
            " ORDER BY revision DESC LIMIT 1",
            whose,
        )
        if latest is not None and latest["inputs_sha256"] == digest:
            return int(latest["id"]), 0
        for old in db.rows(
            "SELECT id, state FROM jobs WHERE series_id = ? AND model = ? AND step = ?"
            " AND state NOT IN ('done', 'superseded')",
            whose,
        ):
            state = next_job_state(old["state"], JobEvent.supersede)
            db.execute("UPDATE jobs SET state = ?, lease_owner = NULL WHERE id = ?", (state, old["id"]))
        return 0, db.insert(
            "jobs",
            {
                "series_id": series["id"],
                "model": request.model,
                "step": request.step,
                "needs": chain.bound(request.needs, steps) if request.needs.any else None,
                "rules": json.dumps(request.rules),
                "destinations": json.dumps(request.destinations),
                "notify": json.dumps(request.notify),
                "wishes": dump(request.order),
                "priority": PRIORITIES[request.priority],
                "revision": int(latest["revision"]) + 1 if latest else 1,
                "inputs_sha256": digest,
                "generation": generation,
                "reason": reason,
                "state": JobState.waiting if request.needs.any else JobState.pending,
                "next_at": db.clock.ticks() + request.needs.inputs_seconds if request.needs.inputs else 0.0,
                "last_received_at": float(series["last_received_at"]),
                "created_at": db.clock.ticks(),
                "created_time": iso(db.clock.wall()),
            },
        )

    # The worker's side

    def lease(self, owner: str, seconds: float, *, before: int | None = None) -> Row | None:
        """Take the most urgent job that is due, or None. Counts an attempt.

        ``before``: only one that goes before a job of this priority (PRIORITIES). ``parted`` of what is returned:
        whether its last attempt was one in company that ended the worker.
        """
        db = self.db
        now = db.clock.ticks()
        bound = max(PRIORITIES.values()) + 1 if before is None else before
        candidate = (
            "SELECT * FROM jobs WHERE state = 'pending' AND next_at <= ? AND priority < ? ORDER BY priority, id LIMIT 1"
        )
        if db.row(candidate, (now, bound)) is None:  # look before taking the write lock
            return None
        with db.transaction():
            job = db.row(candidate, (now, bound))
            if job is None:
                return None
            state = next_job_state(job["state"], JobEvent.lease)
            db.execute(
                "UPDATE jobs SET state = ?, lease_owner = ?, lease_until = ?, attempts = attempts + 1,"
                " started_at = ?, batch_studies = 0 WHERE id = ?",
                (state, owner, now + seconds, now, job["id"]),
            )
            taken = db.row("SELECT * FROM jobs WHERE id = ?", (job["id"],))
            return taken and {**taken, "parted": int(job["batch_studies"]) > 0}

    def extend(self, job_id: int, owner: str, seconds: float) -> None:
        """Keep a lease alive. Raises LeaseLost when it is not ours any more."""
        with self.db.transaction():
            changed = self.db.execute(
                "UPDATE jobs SET lease_until = ? WHERE id = ? AND lease_owner = ? AND state = 'running'",
                (self.db.clock.ticks() + seconds, job_id, owner),
            )
        if not changed:
            raise LeaseLost("extend the lease", f"job {job_id} was taken over or superseded")

    def fix_identity(self, job_id: int, owner: str, *, version: str, digest: str, make: Callable[[Row], Row]) -> Row:
        """Store the identity of the results before anything is encoded; the first one stays.

        ``make(job)`` builds it; it is used when none was stored for this model digest.
        """
        db = self.db
        with db.transaction():
            job = self._owned(job_id, owner)
            if job["identity"] and job["model_digest"] == digest:
                stored: Row = json.loads(job["identity"])
                return stored
            identity = make(job)
            db.execute(
                "UPDATE jobs SET identity = ?, model_version = ?, model_digest = ? WHERE id = ?",
                (json.dumps(identity), version, digest, job_id),
            )
            return identity

    def place(self, job_id: int, owner: str, decision: Mapping[str, Any]) -> None:
        """Keep where the job runs and why; a later decision replaces an earlier one. Raises LeaseLost."""
        with self.db.transaction():
            self._owned(job_id, owner)
            self.db.execute("UPDATE jobs SET placement = ? WHERE id = ?", (json.dumps(dict(decision)), job_id))

    def finish(self, job_id: int, owner: str, outcome: Outcome, *, cloud: CloudPlan = OFF) -> None:
        """Commit results, deliveries, cloud items and notices together with the end of the job."""
        db = self.db
        with db.transaction():
            job = self._owned(job_id, owner)
            now, moment = db.clock.ticks(), iso(db.clock.wall())
            if job["step"] == prior.STEP:  # only for comparison here
                cloud = OFF
            self._hand_over(job, outcome, load(job["wishes"]), json.loads(job["destinations"]), cloud)
            self._leave(job, JobEvent.finish)
            db.execute(
                "UPDATE jobs SET critical = ?, notes = ?, summary = ?, seconds = ?, last_error = NULL, finished_at = ?,"
                " finished_time = ? WHERE id = ?",
                (
                    json.dumps(list(outcome.critical)) if outcome.critical else None,
                    json.dumps(list(outcome.notes)),
                    json.dumps(dict(outcome.summary)),
                    json.dumps(dict(outcome.seconds)),
                    now,
                    moment,
                    job_id,
                ),
            )
            chain.ended(db, job)

    def _hand_over(
        self, job: Row, outcome: Outcome, order: Order, destinations: Sequence[str], cloud: CloudPlan
    ) -> None:
        """Inside a transaction: rows of the results, and of everything that carries or tells of them."""
        db = self.db
        now, moment = db.clock.ticks(), iso(db.clock.wall())
        job_id = int(job["id"])
        study_id = int(db.value("SELECT study_id FROM series WHERE id = ?", (job["series_id"],)))
        uids: dict[int, str] = {}
        made: list[tuple[int, str]] = []
        for result in outcome.results:
            result_id = self._result(job_id, result, moment)
            uids[result_id] = result.instance.attributes["SOPInstanceUID"]
            made.append((result_id, result.kind))
        for destination in destinations:
            for result_id, fallback in shares(made, order, destination):
                row = {
                    "result_id": result_id,
                    "job_id": job_id,
                    "study_id": study_id,
                    "destination": destination,
                    "state": "pending",
                    "created_at": now,
                    "created_time": moment,
                }
                conflict = "OR IGNORE"
                db.insert("deliveries", row | ({"fallback_result_id": fallback} if fallback else {}), conflict=conflict)
        hand_to_cloud(
            db,
            cloud,
            job=job,
            study_id=study_id,
            results=[result_id for result_id, _ in shares(made, Order(kinds={"": order.made}), "")],
            outcome=outcome,
            identified=order.identified,
        )
        if outcome.critical:
            hurry(db, study_id)
            if outcome.alert:
                raise_alert(db, job_id=job_id, study_id=study_id, keys=outcome.critical)
        for place in destinations or ("",):
            share = {result: uids[result] for result, _ in shares(made, order, place)}
            if share:
                make_notices(
                    db,
                    job_id=job_id,
                    study_id=study_id,
                    results=share,
                    notify=json.loads(job["notify"] or "[]"),
                    destinations=(place,) if place else (),
                )

    def _result(self, job_id: int, result: Result, moment: str) -> int:
        """Row of a result; the one that is there when another job made the same object.

        Two rules can name one model in two ways, ``name`` and ``name@version``: the same
        work has the same UIDs, and the object that came first stays.
        """
        attributes = result.instance.attributes
        known = self.db.value("SELECT id FROM results WHERE SOPInstanceUID = ?", (attributes["SOPInstanceUID"],))
        if known is not None:
            return int(known)
        Catalogue(self.db).add(result.instance)
        return self.db.insert(
            "results",
            {
                "job_id": job_id,
                "kind": result.kind,
                "SOPClassUID": attributes["SOPClassUID"],
                "SOPInstanceUID": attributes["SOPInstanceUID"],
                "SeriesInstanceUID": attributes["SeriesInstanceUID"],
                "TransferSyntaxUID": result.instance.transfer_syntax_uid,
                "file": result.instance.file,
                "sha256": result.instance.sha256,
                "shows": result.shows,
                "created_time": moment,
            },
        )

    def refuse(self, job_id: int, owner: str, error: str) -> None:
        """The input does not meet the model's contract; final until requeued or superseded."""
        with self.db.transaction():
            job = self._owned(job_id, owner)
            self._leave(job, JobEvent.refuse, error)
            chain.ended(self.db, job)

    def fail(self, job_id: int, owner: str, error: str, *, max_attempts: int, backoff: float = 2.0) -> JobState:
        """An error that may pass: retried later, parked as failed after ``max_attempts``."""
        with self.db.transaction():
            job = self._owned(job_id, owner)
            event = JobEvent.give_up if job["attempts"] >= max_attempts else JobEvent.retry
            state = self._leave(job, event, error)
            wait = backoff_seconds(job["attempts"], backoff, LONGEST_WAIT) if state is JobState.pending else 0.0
            self.db.execute("UPDATE jobs SET next_at = ? WHERE id = ?", (self.db.clock.ticks() + wait, job_id))
            chain.ended(self.db, job)
            return state

    def wait(self, job_id: int, owner: str, error: str, *, backoff: float = 2.0) -> int:
        """What it needs is away: it waits without limit, longer each time, and the attempt does not count.

        Returns how often it has waited.
        """
        with self.db.transaction():
            job = self._owned(job_id, owner)
            self._leave(job, JobEvent.retry, error)
            return self._wait(job, backoff, "attempts = max(0, attempts - 1), batch_studies = 0")

    def _wait(self, job: Row, backoff: float, change: str) -> int:
        waits = int(job["waits"]) + 1
        due = self.db.clock.ticks() + backoff_seconds(waits, backoff, LONGEST_WAIT)
        self.db.execute(f"UPDATE jobs SET {change}, waits = ?, next_at = ? WHERE id = ?", (waits, due, job["id"]))
        return waits

    def owed_report(self) -> Row | None:
        """A job that ended without a result and whose rule asks for a report of that; counts a try.

        Committed before the report is made, so one that takes the worker with it ends some time.
        What keeps it from being made and passes is no try: see :meth:`report_waits`.
        """
        query = (
            "SELECT * FROM jobs WHERE report_owed > 0 AND state IN ('refused', 'failed')"
            " AND next_at <= ? ORDER BY id LIMIT 1"
        )
        now = self.db.clock.ticks()
        if self.db.row(query, (now,)) is None:
            return None
        with self.db.transaction():
            job = self.db.row(query, (now,))
            if job is not None:
                self.db.execute(
                    "UPDATE jobs SET report_owed = report_owed - 1, next_at = ? WHERE id = ?", (now + 10.0, job["id"])
                )
            return job

    def report_waits(self, job_id: int, *, at_once: bool = False) -> None:
        """The try that :meth:`owed_report` counted was none: a full disk, a stop. It waits, or is due ``at_once``."""
        with self.db.transaction():
            job = self.db.row("SELECT * FROM jobs WHERE id = ? AND state IN ('refused', 'failed')", (job_id,))
            if job is None:
                return
            again = f"report_owed = min({REPORT_TRIES}, report_owed + 1)"
            if at_once:
                self.db.execute(f"UPDATE jobs SET {again}, next_at = 0 WHERE id = ?", (job_id,))
            else:
                self._wait(job, 10.0, again)

    def reported(self, job_id: int, outcome: Outcome, *, cloud: CloudPlan = OFF) -> bool:
        """Commit the report of a failure with its deliveries; False when the job has changed meanwhile."""
        with self.db.transaction():
            job = self.db.row("SELECT * FROM jobs WHERE id = ? AND state IN ('refused', 'failed')", (job_id,))
            if job is None:
                return False
            order = load(job["wishes"])
            destinations = [d for d in order.report_to if d]
            report = Order(kinds=dict.fromkeys((*destinations, ""), ("SR",)))
            self._hand_over({**job, "notify": "[]"}, outcome, report, destinations, cloud)
            self.db.execute("UPDATE jobs SET report_owed = 0 WHERE id = ?", (job_id,))
        return True

    def hand_back(self, owner: str) -> int:
        """The worker is told to stop: what it holds waits again, and the attempt does not count."""
        with self.db.transaction():
            held = self.db.rows("SELECT * FROM jobs WHERE state = 'running' AND lease_owner = ?", (owner,))
            for job in held:
                self._leave(job, JobEvent.lose)
                self.db.execute(
                    "UPDATE jobs SET attempts = max(0, attempts - 1), batch_studies = 0 WHERE id = ?", (job["id"],)
                )
        return len(held)

    def expire(self, max_attempts: int, dead_owners: Sequence[str] = ()) -> list[Row]:
        """Take back leases that ran out, or whose owner is known to be gone.

        A job that took its worker with it ``max_attempts`` times is parked, so that one
        poisonous study cannot stop the others. One that shared a batch then is not blamed for it.
        """
        db = self.db
        now = db.clock.ticks()
        marks = ", ".join("?" * len(dead_owners))
        query = f"SELECT * FROM jobs WHERE state = 'running' AND (lease_until < ? OR lease_owner IN ({marks}))"
        if not db.rows(query, (now, *dead_owners)):
            return []
        with db.transaction():
            lost = db.rows(query, (now, *dead_owners))
            for job in lost:
                if job["batch_studies"]:
                    sharing.lost_in_company(db, job, "the worker died while this job shared a batch with others")
                    continue
                event = JobEvent.give_up if job["attempts"] >= max_attempts else JobEvent.lose
                self._leave(job, event, "the worker died or fell silent while it held the job")
                chain.ended(db, job)
            return lost

    # The operator's side

    def retry(self, job_id: int) -> None:
        """Requeue a failed or refused job; what was not run because of it waits again.

        Raises OperatorError for an unknown one.
        """
        with self.db.transaction():
            job = self.db.row("SELECT * FROM jobs WHERE id = ?", (job_id,))
            if job is None:
                raise OperatorError("retry job", f"there is no job {job_id}", "See 'dicomnode jobs list'")
            self._leave(job, JobEvent.requeue)
            self.db.execute(
                "UPDATE jobs SET attempts = 0, waits = 0, next_at = 0, report_owed = 0, batch_studies = 0 WHERE id = ?",
                (job_id,),
            )
            if job["needs"]:
                chain.hold(self.db, {**job, "state": JobState.pending})
            chain.reopen(self.db, int(job["series_id"]))
            chain.advance(self.db, int(job["series_id"]))

    def _owned(self, job_id: int, owner: str) -> Row:
        job = self.db.row("SELECT * FROM jobs WHERE id = ?", (job_id,))
        if job is None or job["state"] != JobState.running or job["lease_owner"] != owner:
            raise LeaseLost("change job", f"job {job_id} was taken over or superseded")
        return job

    def _leave(self, job: Row, event: JobEvent, error: str | None = None) -> JobState:
        state = next_job_state(job["state"], event)
        self.db.execute(
            "UPDATE jobs SET state = ?, lease_owner = NULL, lease_until = NULL, last_error = coalesce(?, last_error)"
            " WHERE id = ?",
            (state, error, job["id"]),
        )
        if event in (JobEvent.refuse, JobEvent.give_up) and load(job["wishes"]).report_to:
            self.db.execute("UPDATE jobs SET report_owed = ?, waits = 0 WHERE id = ?", (REPORT_TRIES, job["id"]))
        return state
