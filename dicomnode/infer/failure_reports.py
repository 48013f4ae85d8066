"""Reports of jobs that ended without a result, for rules that ask for one: made by the worker between jobs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from dicomnode import durable, logs
from dicomnode.durable import SyncFailed
from dicomnode.errors import NodeError, OperatorError, PeerAway
from dicomnode.index.database import Database, Row
from dicomnode.index.jobs import Jobs, Outcome, Result
from dicomnode.index.operation import Events
from dicomnode.infer.job_files import JobFiles
from dicomnode.records import EncodedObject, ModelIdentity, SourceInstance
from dicomnode.settings import Settings

ReportFailure = Callable[[Row, Sequence[SourceInstance], ModelIdentity | None], EncodedObject]
"""(job that failed or was refused, its sources, its model where that can serve) -> SR."""


class FailureReports:
    """``identity`` gives the model of a reference as it would serve, None where it cannot."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        files: JobFiles,
        identity: Callable[[str], ModelIdentity | None],
        report: ReportFailure,
    ) -> None:
        self._settings = settings
        self._jobs = Jobs(db)
        self._events = Events(db)
        self._files = files
        self._identity = identity
        self._report = report
        self._in_hand: int | None = None
        self._log = logs.get()

    def run_once(self, on_results: Callable[[], None]) -> bool:
        """Make the report that a failed or refused job owes, if one does; False when none does.

        It may owe one for longer than this process lives: the debt is in the job's row.
        """
        job = self._jobs.owed_report()
        if job is None:
            return False
        self._in_hand = int(job["id"])
        try:
            made = self._report(job, self._files.sources(job), self._identity(str(job["model"])))
            self._files.keep(self._files.staged([made]), lambda results: self._commit(job, results))
        except SyncFailed as error:
            durable.die(error)
        except (OperatorError, PeerAway) as error:  # a full disk: it passes, if only once the operator has acted
            with contextlib.suppress(NodeError):  # a locked index: then it counts as a try
                self._jobs.report_waits(int(job["id"]))
            self._log.warning("failure not reported yet", job=job["id"], error=str(error))
            if not job["waits"]:
                self._events.add("warning", "report-waits", f"job {job['id']}", str(error))
            return True
        except Exception as error:  # noqa: BLE001 the failure of a report must not stop the next study
            cause = str(error) if isinstance(error, NodeError) else type(error).__name__
            self._log.error("failure not reported", job=job["id"], exc_type=type(error).__name__, error=cause)
            if int(job["report_owed"]) <= 1:  # as it was before this try
                self._events.add("error", "report-impossible", f"job {job['id']}", cause)
            return True
        finally:
            self._in_hand = None
        self._log.info("failure reported", job=job["id"], model=job["model"], state=job["state"])
        on_results()
        return True

    def _commit(self, job: Row, results: Sequence[Result]) -> bool:
        self._in_hand = None  # a stop from here on must not make it owed again
        return self._jobs.reported(int(job["id"]), Outcome(results), cloud=self._settings.cloud_plan)

    def hand_back(self) -> None:
        """The worker is told to stop: what is being reported is due again, and this was no try."""
        job_id, self._in_hand = self._in_hand, None
        if job_id is not None:
            self._jobs.report_waits(job_id, at_once=True)
