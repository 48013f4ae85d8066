"""Earlier studies that have to come from a PACS, as the courier works on them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from dicomnode.index import chain, prior
from dicomnode.index.database import Database, Row
from dicomnode.index.states import backoff_seconds
from dicomnode.priors import INDEX, Candidate, PriorEvent, PriorState, fits, load

POLL_SECONDS = 0.5
"""How often it is looked whether what a peer has sent is there, and complete."""


class Priors:
    """One process asks, so a lease is only a mark: what a former life held is taken back at its start."""

    def __init__(self, db: Database) -> None:
        self.db = db

    def start(self) -> int:
        """Take back what was being asked when the process died."""
        with self.db.transaction():
            rows = self.db.rows("SELECT * FROM priors WHERE state = ?", (PriorState.asking,))
            for row in rows:
                prior.change(self.db, row, PriorEvent.retry, next_at=0.0)
        return len(rows)

    def tend(self) -> bool:
        """Settle what is over time, has arrived, or may be in the index by now; True when something changed."""
        now = self.db.clock.ticks()
        marks = ", ".join("?" * len(prior.OPEN_STATES))
        due = f"SELECT * FROM priors WHERE state IN ({marks}) AND (deadline_at <= ? OR next_at <= ?)"
        if not self.db.rows(due, (*prior.OPEN_STATES, now, now)):
            return False
        changed = False
        with self.db.transaction():
            for row in self.db.rows(due, (*prior.OPEN_STATES, now, now)):
                changed = self._tend(row, now) or changed
        return changed

    def _tend(self, row: Row, now: float) -> bool:
        db = self.db
        before = row["state"]
        if db.value("SELECT state FROM jobs WHERE id = ?", (row["job_id"],)) != "waiting":
            prior.change(db, row, PriorEvent.give_up, last_error="the job that wanted it does not wait any more")
        elif row["deadline_at"] <= now:
            cause = row["last_error"] or "nothing has come"
            prior.change(db, row, PriorEvent.give_up, last_error=f"not there within the time set: {cause}")
        elif before == PriorState.arriving:
            self._arrived(row)
        elif before == PriorState.pending and self._source(row) == INDEX:
            prior.look(db, int(row["id"]))
        else:
            return False
        return self._settled(row) or before == PriorState.arriving

    def _arrived(self, row: Row) -> None:
        """The series is there as a whole and is what was wished for, or another one is looked for."""
        db = self.db
        series = db.row("SELECT * FROM series WHERE SeriesInstanceUID = ?", (row["SeriesInstanceUID"],))
        count = 0
        if series is not None:
            count = int(db.value("SELECT count(*) FROM instances WHERE series_id = ?", (series["id"],)))
        if series is None or count < int(row["images"]) or series["selected_generation"] < series["generation"]:
            db.execute("UPDATE priors SET next_at = ? WHERE id = ?", (db.clock.ticks() + POLL_SECONDS, row["id"]))
            return
        wish = load(row["wish"])
        current = prior.attributes_of_job(db, int(row["job_id"]))
        if fits(current, Candidate(prior.attributes_of(db, int(series["id"])), count), wish):
            prior.take(db, row, int(series["id"]), self._source(row))
            return
        tried = json.dumps([*json.loads(row["tried"]), row["SeriesInstanceUID"]])
        prior.change(
            db, row, PriorEvent.retry, next_at=0.0, tried=tried, last_error="what came does not meet the conditions"
        )

    def _source(self, row: Row) -> str:
        sources = load(row["wish"]).sources
        return sources[int(row["place"])] if int(row["place"]) < len(sources) else ""

    def _settled(self, row: Row) -> bool:
        """Inside a transaction: decide the job where its wish has ended."""
        state = self.db.value("SELECT state FROM priors WHERE id = ?", (row["id"],))
        if state in (PriorState.found, PriorState.none):
            chain.advance(self.db, int(self.db.value("SELECT series_id FROM jobs WHERE id = ?", (row["job_id"],))))
            return True
        return False

    def due_peers(self) -> list[str]:
        """Peers that are to be asked now."""
        rows = self.db.rows(
            "SELECT * FROM priors WHERE state = ? AND next_at <= ?", (PriorState.pending, self.db.clock.ticks())
        )
        return list(dict.fromkeys(source for r in rows if (source := self._source(r)) not in (INDEX, "")))

    def next_due_in(self) -> float | None:
        """Seconds until something has to be looked at; None when nothing is open."""
        marks = ", ".join("?" * len(prior.OPEN_STATES))
        at = self.db.value(
            f"SELECT min(min(deadline_at, next_at)) FROM priors WHERE state IN ({marks}) AND state != ?",
            (*prior.OPEN_STATES, PriorState.asking),
        )
        return None if at is None else max(0.0, float(at) - self.db.clock.ticks())

    def ask(self, peer: str, owner: str) -> Row | None:
        """The oldest wish that this peer is to be asked for, held until it is answered."""
        with self.db.transaction():
            for row in self.db.rows(
                "SELECT * FROM priors WHERE state = ? AND next_at <= ? ORDER BY id",
                (PriorState.pending, self.db.clock.ticks()),
            ):
                if self._source(row) == peer:
                    prior.change(self.db, row, PriorEvent.ask, lease_owner=owner, attempts=int(row["attempts"]) + 1)
                    return {**row, "attempts": int(row["attempts"]) + 1, "state": PriorState.asking}
        return None

    def wanted(self, row: Row) -> dict[str, str]:
        """Attributes of the current series, by keyword."""
        return prior.attributes_of_job(self.db, int(row["job_id"]))

    def expect(self, row: Row, series_uids: Sequence[str]) -> None:
        """Before anything is moved: what comes under these UIDs is an earlier series, not a new study."""
        with self.db.transaction():
            for uid in series_uids:
                self.db.insert("prior_series", {"SeriesInstanceUID": uid, "prior_id": row["id"]}, conflict="OR IGNORE")

    def held(self, series_uid: str) -> int:
        """Instances of a series that the index holds."""
        sql = "SELECT count(*) FROM instances i JOIN series s ON s.id = i.series_id WHERE s.SeriesInstanceUID = ?"
        return int(self.db.value(sql, (series_uid,)))

    def moved(self, row: Row, study_uid: str, series_uid: str, images: int) -> None:
        """The peer says that it has sent ``images`` instances of this series."""
        self._change(
            row,
            PriorEvent.moved,
            StudyInstanceUID=study_uid,
            SeriesInstanceUID=series_uid,
            images=images,
            next_at=self.db.clock.ticks(),
            last_error=None,
        )

    def absent(self, row: Row, cause: str) -> None:
        """The peer has none: the next source is asked."""
        with self.db.transaction():
            current = self._current(row)
            if current is None:
                return
            prior.change(
                self.db,
                current,
                PriorEvent.retry,
                place=int(row["place"]) + 1,
                next_at=0.0,
                attempts=0,
                last_error=cause,
            )
            prior.look(self.db, int(row["id"]))
            self._settled(row)

    def retry(self, row: Row, cause: str, *, first: float, longest: float) -> None:
        """A passing cause: asked again later, until the time that was set is over."""
        wait = backoff_seconds(int(row["attempts"]), first, longest)
        self._change(row, PriorEvent.retry, next_at=self.db.clock.ticks() + wait, last_error=cause)

    def _change(self, row: Row, event: PriorEvent, **columns: object) -> None:
        with self.db.transaction():
            current = self._current(row)
            if current is not None:
                prior.change(self.db, current, event, **columns)

    def _current(self, row: Row) -> Row | None:
        """The row, while it is still being asked for."""
        return self.db.row("SELECT * FROM priors WHERE id = ? AND state = ?", (row["id"], PriorState.asking))

    def counts(self) -> dict[str, int]:
        found = {
            r["state"]: int(r["n"]) for r in self.db.rows("SELECT state, count(*) AS n FROM priors GROUP BY state")
        }
        return {state.value: found.get(state.value, 0) for state in PriorState}
