"""Modality performed procedure steps: what modalities say that they do and did (PS3.4 F.7).

:meth:`Steps.create` and :meth:`Steps.replace` are the steps after which an N-CREATE or
N-SET may be answered with success. What a step says about a series is evidence for
completeness; it may come before the first image or after the last one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from dicomnode.clock import iso
from dicomnode.errors import IllegalTransition
from dicomnode.index.database import Database, Row
from dicomnode.index.notices import NOT_THERE, NoticeEvent, next_notice_state
from dicomnode.index.states import JobEvent, SendEvent, next_job_state, next_send_state

WITHHELD = "procedure-step: discontinued, incorrect worklist entry selected"
"""Why a series is closed without an analysis; kept with the series."""


class StepState(StrEnum):
    """Performed Procedure Step Status (0040,0252), PS3.3 C.4.14."""

    in_progress = "IN PROGRESS"
    completed = "COMPLETED"
    discontinued = "DISCONTINUED"


STEP_TABLE: Mapping[tuple[StepState | None, StepState], StepState] = {
    (None, StepState.in_progress): StepState.in_progress,
    (StepState.in_progress, StepState.in_progress): StepState.in_progress,
    (StepState.in_progress, StepState.completed): StepState.completed,
    (StepState.in_progress, StepState.discontinued): StepState.discontinued,
}
"""(state, status of the message) -> state; None: it is being created. PS3.4 F.7.2.1.3, F.7.2.2.3."""

FINAL = frozenset(StepState) - {state for state, _ in STEP_TABLE if state is not None}
"""States that no N-SET changes."""


def next_step_state(state: str | None, status: str) -> StepState:
    """Raises IllegalTransition when the table does not know it."""
    try:
        return STEP_TABLE[None if state is None else StepState(state), StepState(status)]
    except (KeyError, ValueError):
        raise IllegalTransition("change procedure step", f"this status is not possible in state '{state}'") from None


@dataclass(frozen=True, slots=True)
class PerformedSeries:
    """One item of the Performed Series Sequence; ``instances`` are the UIDs that it refers to."""

    SeriesInstanceUID: str
    instances: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Step:
    """A performed procedure step as it stands.

    ``attributes`` is the whole data set, Explicit VR Little Endian. ``series`` is None where
    a message says nothing about series. ``wrong_entry``: discontinued because the wrong
    worklist entry was selected, so its images carry another patient's or study's identity.
    """

    state: StepState
    study_uids: tuple[str, ...]
    Modality: str
    wrong_entry: bool
    series: tuple[PerformedSeries, ...] | None
    attributes: bytes


@dataclass(frozen=True, slots=True)
class Withdrawn:
    """What became of work on a series that is not analysed any more; ``sent``: too late."""

    jobs: int = 0
    deliveries: int = 0
    sent: int = 0


class Steps:
    def __init__(self, db: Database) -> None:
        self.db = db

    def create(self, uid: str, step: Step, peer: str) -> bool:
        """Commit a new step; False when one with this SOP Instance UID is there."""
        db = self.db
        now, moment = db.clock.ticks(), iso(db.clock.wall())
        with db.transaction():
            step_id = db.insert(
                "procedure_steps",
                {
                    "SOPInstanceUID": uid,
                    "peer": peer,
                    "state": step.state,
                    "Modality": step.Modality,
                    "wrong_entry": int(step.wrong_entry),
                    "version": 1,
                    "attributes": step.attributes,
                    "created_at": now,
                    "created_time": moment,
                    "changed_at": now,
                    "changed_time": moment,
                },
                conflict="OR IGNORE",
            )
            if not step_id:
                return False
            for study in dict.fromkeys(step.study_uids):
                db.insert("procedure_step_studies", {"step_id": step_id, "StudyInstanceUID": study})
            self._series(step_id, step.series or ())
        return True

    def read(self, uid: str) -> Row | None:
        return self.db.row("SELECT * FROM procedure_steps WHERE SOPInstanceUID = ?", (uid,))

    def replace(self, step_id: int, version: int, step: Step) -> bool:
        """Commit a changed step; False when it changed since ``version`` was read.

        A series that was closed already is looked at again where the step's end says
        something new about it: that it must not be analysed, or that it may be after all.
        """
        db = self.db
        with db.transaction():
            changed = db.execute(
                "UPDATE procedure_steps SET state = ?, wrong_entry = ?, attributes = ?, version = version + 1,"
                " changed_at = ?, changed_time = ? WHERE id = ? AND version = ?",
                (
                    step.state,
                    int(step.wrong_entry),
                    step.attributes,
                    db.clock.ticks(),
                    iso(db.clock.wall()),
                    step_id,
                    version,
                ),
            )
            if not changed:
                return False
            if step.series is not None:
                db.execute(
                    "DELETE FROM performed_instances WHERE performed_series_id IN"
                    " (SELECT id FROM performed_series WHERE step_id = ?)",
                    (step_id,),
                )
                db.execute("DELETE FROM performed_series WHERE step_id = ?", (step_id,))
                self._series(step_id, step.series)
            self._look_again(step_id, step)
        return True

    def _look_again(self, step_id: int, step: Step) -> None:
        """A new generation voids a decision that is being made without what the step says now."""
        bump = "UPDATE series SET generation = generation + 1 WHERE generation > 0"
        named = "SELECT SeriesInstanceUID FROM performed_series WHERE step_id = ?"
        if step.wrong_entry:
            self.db.execute(f"{bump} AND SeriesInstanceUID IN ({named})", (step_id,))
            self.db.execute(  # and what refers to the step without being named by it
                f"{bump} AND SeriesInstanceUID NOT IN ({named}) AND id IN"
                " (SELECT se.id FROM procedure_steps s JOIN procedure_step_studies t ON t.step_id = s.id"
                " JOIN studies st ON st.StudyInstanceUID = t.StudyInstanceUID JOIN series se ON se.study_id = st.id"
                " JOIN instances n ON n.series_id = se.id WHERE s.id = ? AND instr(n.attributes, s.SOPInstanceUID))",
                (step_id, step_id),
            )
        elif step.state is StepState.completed:
            self.db.execute(
                f"{bump} AND SeriesInstanceUID IN ({named})"
                " AND (selected_generation < generation OR selected_reason = ?)",
                (step_id, WITHHELD),
            )

    def _series(self, step_id: int, series: Sequence[PerformedSeries]) -> None:
        listed: dict[str, dict[str, None]] = {}
        for one in series:
            listed.setdefault(one.SeriesInstanceUID, {}).update(dict.fromkeys(one.instances))
        for uid, instances in listed.items():
            performed_id = self.db.insert(
                "performed_series",
                {"step_id": step_id, "SeriesInstanceUID": uid, "instances": len(instances)},
            )
            for instance in instances:
                self.db.insert("performed_instances", {"performed_series_id": performed_id, "SOPInstanceUID": instance})

    # Select's side

    def about(self, series_id: int, referenced: Sequence[str] = ()) -> list[Row]:
        """Steps that speak of a series: by naming it, or because its images refer to them.

        ``referenced`` are SOP Instance UIDs of steps from the images. Where there is neither,
        a running step of the same study and modality counts: most modalities name their
        series only in the end. ``performed_id`` is None for what does not name the series.
        """
        columns = "s.id, s.SOPInstanceUID, s.state, s.wrong_entry, s.changed_at"
        found = self.db.rows(
            f"SELECT {columns}, p.id AS performed_id, p.instances FROM series se"
            " JOIN performed_series p ON p.SeriesInstanceUID = se.SeriesInstanceUID"
            " JOIN procedure_steps s ON s.id = p.step_id WHERE se.id = ? ORDER BY s.id",
            (series_id,),
        )
        known = {row["SOPInstanceUID"] for row in found}
        for uid in dict.fromkeys(referenced):
            if uid not in known:
                found += self.db.rows(
                    f"SELECT {columns}, NULL AS performed_id, 0 AS instances FROM procedure_steps s"
                    " WHERE s.SOPInstanceUID = ?",
                    (uid,),
                )
        return found or self.db.rows(
            f"SELECT {columns}, NULL AS performed_id, 0 AS instances FROM series se"
            " JOIN studies st ON st.id = se.study_id"
            " JOIN procedure_step_studies t ON t.StudyInstanceUID = st.StudyInstanceUID"
            " JOIN procedure_steps s ON s.id = t.step_id AND s.state = ? AND s.Modality = se.Modality"
            " WHERE se.id = ? ORDER BY s.id",
            (StepState.in_progress, series_id),
        )

    def listed(self, performed_id: int) -> frozenset[str]:
        """SOP Instance UIDs that a step lists for one series."""
        rows = self.db.rows(
            "SELECT SOPInstanceUID FROM performed_instances WHERE performed_series_id = ?", (performed_id,)
        )
        return frozenset(str(r["SOPInstanceUID"]) for r in rows)

    def held(self, series_id: int) -> frozenset[str]:
        """SOP Instance UIDs of a series that are stored here."""
        rows = self.db.rows("SELECT SOPInstanceUID FROM instances WHERE series_id = ?", (series_id,))
        return frozenset(str(r["SOPInstanceUID"]) for r in rows)

    def withdraw(self, series_id: int) -> Withdrawn:
        """Stop what is under way for a series that must not be analysed, in one transaction.

        Jobs that are not done are refused, results that were not sent are parked; an operator
        can requeue both. What a peer stored already is counted in ``sent``.
        """
        db = self.db
        with db.transaction():
            jobs = db.rows(
                "SELECT id, state FROM jobs WHERE series_id = ?"
                " AND state IN ('waiting', 'pending', 'running', 'failed')",
                (series_id,),
            )
            for job in jobs:
                state = next_job_state(job["state"], JobEvent.withdraw)
                db.execute(
                    "UPDATE jobs SET state = ?, lease_owner = NULL, lease_until = NULL, last_error = ? WHERE id = ?",
                    (state, WITHHELD, job["id"]),
                )
            deliveries = 0
            for table in ("deliveries", "sync_items"):
                for item in db.rows(
                    f"SELECT d.id, d.state FROM {table} d JOIN jobs j ON j.id = d.job_id"
                    " WHERE j.series_id = ? AND d.state IN ('pending', 'sending')",
                    (series_id,),
                ):
                    sent = next_send_state(item["state"], SendEvent.withdraw)
                    self._park(table, item["id"], sent)
                    deliveries += 1
            for notice in db.rows(
                "SELECT n.id, n.state FROM notifications n JOIN jobs j ON j.id = n.job_id"
                " WHERE j.series_id = ? AND n.state IN ('waiting', 'pending', 'sending')",
                (series_id,),
            ):
                self._park("notifications", notice["id"], next_notice_state(notice["state"], NoticeEvent.withdraw))
            late = db.value(
                "SELECT count(*) FROM deliveries d JOIN jobs j ON j.id = d.job_id"
                f" WHERE j.series_id = ? AND d.state NOT IN {NOT_THERE}",
                (series_id,),
            )
        return Withdrawn(len(jobs), deliveries, int(late))

    def _park(self, table: str, item_id: int, state: str) -> None:
        self.db.execute(
            f"UPDATE {table} SET state = ?, lease_owner = NULL, last_error = ? WHERE id = ?", (state, WITHHELD, item_id)
        )

    def counts(self) -> dict[str, int]:
        rows = self.db.rows("SELECT state, count(*) AS n FROM procedure_steps GROUP BY state")
        found = {r["state"]: int(r["n"]) for r in rows}
        return {state.value: found.get(state.value, 0) for state in StepState}
