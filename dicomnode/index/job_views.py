"""Jobs as they stand in the index, for whoever looks at them. Reads only."""

from __future__ import annotations

import json

from dicomnode.index import chain, prior
from dicomnode.index.database import Database, Row
from dicomnode.index.states import JobState


class JobViews:
    def __init__(self, db: Database) -> None:
        self.db = db

    def listing(self, limit: int = 100, state: str | None = None) -> list[Row]:
        """The newest first. They are chosen by number alone; else the inputs of every job would be counted."""
        where, parameters = ("WHERE state = ?", [state]) if state else ("", [])
        rows = self.db.rows(
            "SELECT j.id, j.state, j.model, j.model_version, j.revision, j.priority, j.reason, j.attempts,"
            " j.last_error, j.created_time, j.finished_time, j.rules, j.critical, j.step, j.placement,"
            " json_extract(j.summary, '$.engine') AS engine,"
            " st.StudyInstanceUID, se.SeriesInstanceUID,"
            " (SELECT count(*) FROM job_inputs i WHERE i.job_id = j.id) AS instances"
            " FROM jobs j JOIN series se ON se.id = j.series_id JOIN studies st ON st.id = se.study_id"
            f" WHERE j.id IN (SELECT id FROM jobs {where} ORDER BY id DESC LIMIT ?) ORDER BY j.id DESC",
            (*parameters, limit),
        )
        for row in rows:
            row["placement"] = json.loads(row["placement"]) if row["placement"] else None
        return rows

    def show(self, job_id: int) -> Row | None:
        """One job with its results and deliveries, JSON columns parsed."""
        job = self.db.row(
            "SELECT j.*, st.StudyInstanceUID, se.SeriesInstanceUID FROM jobs j JOIN series se ON se.id = j.series_id"
            " JOIN studies st ON st.id = se.study_id WHERE j.id = ?",
            (job_id,),
        )
        if job is None:
            return None
        job["steps"] = chain.told(self.db, job)
        job["prior"] = prior.told(self.db, job_id)
        for column in (
            "rules",
            "destinations",
            "notify",
            "wishes",
            "critical",
            "identity",
            "notes",
            "summary",
            "seconds",
            "placement",
            "needs",
        ):
            job[column] = json.loads(job[column]) if job[column] else None
        job["instances"] = self.db.value("SELECT count(*) FROM job_inputs WHERE job_id = ?", (job_id,))
        job["results"] = self.db.rows("SELECT * FROM results WHERE job_id = ? ORDER BY id", (job_id,))
        job["deliveries"] = self.db.rows("SELECT * FROM deliveries WHERE job_id = ? ORDER BY id", (job_id,))
        return job

    def counts(self) -> dict[str, int]:
        found = {r["state"]: int(r["n"]) for r in self.db.rows("SELECT state, count(*) AS n FROM jobs GROUP BY state")}
        return {state.value: found.get(state.value, 0) for state in JobState}

    def inputs(self, job_id: int) -> list[Row]:
        """The stored instances that the job was made for, with the content it was made for.

        One whose content was replaced since is left out: its series is selected again.
        """
        return self.db.rows(
            "SELECT n.* FROM job_inputs i"
            " JOIN instances n ON n.SOPInstanceUID = i.SOPInstanceUID AND n.dataset_sha256 = i.sha256"
            " WHERE i.job_id = ? ORDER BY n.id",
            (job_id,),
        )

    def result_file(self, job_id: int, kind: str) -> str:
        """Relative name of the object of a kind that a job made; empty where there is none."""
        sql = "SELECT file FROM results WHERE job_id = ? AND kind = ? ORDER BY id LIMIT 1"
        return str(self.db.value(sql, (job_id, kind)) or "")

    def input_count(self, job_id: int) -> int:
        return int(self.db.value("SELECT count(*) FROM job_inputs WHERE job_id = ?", (job_id,)))

    def predecessor(self, job: Row, kind: str = "SR") -> Row | None:
        """The latest SR for the same series and model: of an earlier revision, or this one's report of failure."""
        return self.db.row(
            "SELECT r.*, st.StudyInstanceUID FROM jobs j JOIN results r ON r.job_id = j.id AND r.kind = ?"
            " JOIN series se ON se.id = j.series_id JOIN studies st ON st.id = se.study_id"
            " WHERE j.series_id = ? AND j.model = ? AND j.step = ? AND j.revision <= ?"
            " ORDER BY j.revision DESC, r.id DESC LIMIT 1",
            (kind, job["series_id"], job["model"], job["step"], job["revision"]),
        )
