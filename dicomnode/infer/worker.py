"""The worker: leases jobs, analyses, encodes, and commits results with their deliveries."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from dicomnode import logs, metrics
from dicomnode.clock import iso
from dicomnode.critical import Hit, critical_hits, unknown_keys
from dicomnode.errors import DeviceFull, DeviceLost, EngineError, NodeError, StorageError
from dicomnode.identity import parameters_digest, result_identity, tracking_uids
from dicomnode.index.database import Database, Row
from dicomnode.index.jobs import PRIORITIES, Jobs, Outcome
from dicomnode.index.operation import Events
from dicomnode.index.spool import Spool
from dicomnode.infer.ahead import ReadAhead
from dicomnode.infer.attempt import Attempt
from dicomnode.infer.choice import engine_name
from dicomnode.infer.comparing import changes_summary, inputs_digest, with_companions, with_prior
from dicomnode.infer.decode import Decoder
from dicomnode.infer.endings import Endings
from dicomnode.infer.failure_reports import FailureReports, ReportFailure
from dicomnode.infer.faults import Fault, Remedy, fault_of, leave_engine, remedy
from dicomnode.infer.heart import EXIT_HUNG, Heart
from dicomnode.infer.job_files import JobFiles, intact
from dicomnode.infer.mates import Mates
from dicomnode.infer.placing import PlacedModels, Servable
from dicomnode.infer.routing import Router
from dicomnode.infer.serving import ServingModels
from dicomnode.infer.summary import summary_of
from dicomnode.infer.together import Together
from dicomnode.orders import LABELMAP_SR, Order, load, with_proposed
from dicomnode.records import Analysis, EncodedObject, ModelIdentity, ResultIdentity, SourceInstance
from dicomnode.settings import Settings

Encode = Callable[[Analysis, ResultIdentity, ModelIdentity, Sequence[SourceInstance], Order], Sequence[EncodedObject]]

EXIT_LOST = EXIT_HUNG
"""The accelerator is spoilt for this process; the next one gets a fresh context."""


class Worker:
    """``encode`` comes from the composition root; ``on_results`` wakes courier and sidecar."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        models: ServingModels | PlacedModels,
        encode: Encode,
        *,
        owner: str,
        decoder: Decoder,
        on_results: Callable[[], None],
        ahead: ReadAhead | None = None,
        on_lost: Callable[[], None] = lambda: os._exit(EXIT_LOST),
        report: ReportFailure | None = None,
    ) -> None:
        self._settings = settings
        self._db = db
        self._jobs = Jobs(db)
        self._spool = Spool(db, settings.sync.spool_bytes if settings.cloud.stow_url else 0)
        self._events = Events(db)
        self._models = models
        self._router = Router(settings, db, models)
        self._encode = encode
        self._owner = owner
        self._decoder = decoder
        self._on_results = on_results
        self._ahead = ahead
        self._hearts: list[Heart] = []
        """Of the jobs at hand: the last is being done, those before it wait for it."""
        self._on_lost = on_lost
        self._endings = Endings(self._jobs, self._router, self._events, owner, settings.inference.max_attempts)
        self.files = JobFiles(self._jobs, settings.node.data_dir)
        self._mates = Mates(db, self._router, settings.inference, owner)
        self._together = Together(self, db, self._router, self._endings, self._mates, owner=owner, decoder=decoder)
        self._reports = FailureReports(settings, db, self.files, self._known_model, report) if report else None
        self._log = logs.get()

    def start(self) -> None:
        """Take back what a former life of this worker held."""
        self._expire((self._owner,))

    @property
    def router(self) -> Router:
        """Which version does which job."""
        return self._router

    def hand_back(self) -> int:
        """Give up what this worker holds; the attempt does not count.

        0 where the index is locked or its disk is full: the next start of this worker takes it back.
        """
        try:
            self._endings.settle_owed()
            self._router.stop()
            if self._reports is not None:
                self._reports.hand_back()
            return self._jobs.hand_back(self._owner)
        except StorageError as error:
            self._log.warning("jobs were not handed back", error=str(error))
            return 0

    def run_once(self) -> bool:
        """Do one job if one is due; False when there was none, or while the index takes no endings."""
        if not self._endings.settle_owed():
            return False
        self._expire(())
        if self._reports is not None and self._reports.run_once(self._on_results):
            return True
        before = PRIORITIES["batch"] if self._spool.full() else None
        job = self._jobs.lease(self._owner, self._settings.inference.lease_seconds, before=before)
        if job is None:
            return False
        self._do(job)
        return True

    def _do(self, job: Row) -> None:
        inference = self._settings.inference
        heart = Heart(self._jobs, int(job["id"]), self._owner, inference.lease_seconds, inference.job_seconds)
        self._hearts.append(heart)
        try:
            with heart, self._endings.guard(job):
                self._work(job)
        finally:
            self._hearts.pop()
        if self._endings.lost:
            self.hand_back()  # the less urgent job that waited for this one: it is not to blame
            self._on_lost()

    def _work(self, job: Row) -> None:
        attempt = self.open(job)
        try:
            mates = self._mates.of(attempt)
            if mates or self._mates.suits(attempt):
                self._together.run(attempt, mates, self._hearts[-1])
            else:
                self.conclude(attempt, self.analysed(attempt))
        finally:
            self.close(attempt)

    def between(self, attempt: Attempt, step: str) -> None:
        """A step of ``attempt`` has got on by a batch."""
        self._let_pass(attempt.job, step, attempt.stood)

    def _let_pass(self, job: Row, step: str, stood: dict[str, float]) -> None:
        """Between two batches: jobs that are more urgent are done now, and this one goes on after them.

        ``stood`` collects how long this one stood still, by step.
        """
        with self._hearts[-1].standing_still() as stood_still:
            try:
                while urgent := self._jobs.lease(
                    self._owner, self._settings.inference.lease_seconds, before=int(job["priority"])
                ):
                    self._log.info("a more urgent job goes first", job=urgent["id"], count=int(job["id"]))
                    self._do(urgent)
            except NodeError as error:  # a locked index: the next batch is soon enough
                self._log.warning("could not look for more urgent jobs", error=str(error))
        stood[step] = stood.get(step, 0.0) + stood_still()

    def _known_model(self, reference: str) -> ModelIdentity | None:
        """The model as it would serve; None when it cannot, which may be the failure itself."""
        try:
            return self._models.get(reference).identity
        except Exception:  # noqa: BLE001 whatever keeps it from serving is told by its own event
            return None

    def _expire(self, dead: tuple[str, ...]) -> None:
        expired = self._jobs.expire(self._settings.inference.max_attempts, dead)
        for shared, tell in ((True, self._router.parted), (False, self._router.lost)):
            if some := [int(job["id"]) for job in expired if bool(job["batch_studies"]) is shared]:
                tell(some)
        for job in expired:
            metrics.job("lost")
            self._log.warning("job taken back", job=job["id"], attempts=job["attempts"])
            if not job["batch_studies"] and job["attempts"] >= self._settings.inference.max_attempts:
                self._events.add(
                    "error", "job-failed", f"job {job['id']}", f"it ended the worker {job['attempts']} times; parked"
                )

    def open(self, job: Row) -> Attempt:
        """Its inputs as they are now, found intact, and the model that does it."""
        started = self._db.clock.ticks()
        sources = self.files.sources(job)
        if len(sources) != self._jobs.input_count(int(job["id"])):
            raise NodeError(
                "read inputs",
                "an image was replaced after the series was selected",
                "A newer revision follows",
                retryable=True,
            )
        attempt = Attempt(job, sources, started)
        attempt.ahead = self._ahead.take(sources) if self._ahead else {}
        attempt.read_ahead = len(attempt.ahead)
        try:
            self._ready(attempt)
        except BaseException:
            self.close(attempt)
            raise
        return attempt

    def close(self, attempt: Attempt) -> None:
        if self._ahead:
            self._ahead.done(attempt.sources)

    def _ready(self, attempt: Attempt) -> None:
        """``ahead`` has the slices whose file was read, and found intact, while the series arrived."""
        for source in attempt.sources:
            if source.sop_instance_uid not in attempt.ahead and not intact(source):
                raise NodeError(
                    "read inputs",
                    "a stored image is damaged or gone: its SHA-256 differs",
                    "Send the series again",
                    retryable=True,
                )
        job = attempt.job
        attempt.model = self._router.pick(
            job, len(attempt.sources), lambda d: self._jobs.place(attempt.job_id, self._owner, d)
        )
        attempt.more = {**self.files.companions(job), **self.files.masks(job)}

    def analysed(self, attempt: Attempt) -> Analysis:
        """By the model that was picked, or where that fails by one that ``faults`` names."""
        further: dict[str, Any] = {"more": attempt.more} if attempt.more else {}
        between = attempt.reports_to(self.between)

        def analyse(on: Servable) -> Analysis:
            return on.analyse(attempt.sources, decoder=self._decoder, progress=between, ahead=attempt.ahead, **further)

        if leave_engine(int(attempt.job["attempts"]), attempt.job["last_error"]):
            attempt.model = self._other(attempt.served_by, "DEVICE_LOST") or attempt.model
        try:
            return analyse(attempt.served_by)
        except EngineError as error:
            attempt.model, analysis = self._elsewhere(attempt.served_by, error, analyse)
            return analysis

    def conclude(self, attempt: Attempt, analysis: Analysis) -> None:
        """Encode and commit, and tell of it."""
        job, model, stood = attempt.job, attempt.served_by, attempt.stood
        seconds: dict[str, float] = {"wait": max(0.0, attempt.started - float(job["last_received_at"]))}
        analysis = with_prior(self._db, job, with_companions(self._db, job, analysis))
        seconds.update({step: spent - stood.get(step, 0.0) for step, spent in analysis.seconds.items()})
        if attempt.company:
            seconds["companions"] = attempt.waited
        begin = time.perf_counter()
        identity = self._identity(job, model, analysis)
        order = with_proposed(load(job["wishes"]), model.identity.critical)
        objects = self._encode(analysis, identity, model.identity, attempt.sources, order)
        seconds["encode"] = time.perf_counter() - begin
        begin = time.perf_counter()
        hits = critical_hits(analysis, order.critical)
        self._commit(job, objects, analysis, seconds, hits)
        seconds["commit"] = time.perf_counter() - begin
        seconds["total"] = self._db.clock.ticks() - float(job["last_received_at"])
        for stage in ("wait", "read", "inference", "postprocess", "encode", "commit", "total"):
            if stage in seconds:
                metrics.observe(stage, seconds[stage])
        metrics.job("done")
        if not attempt.company:
            metrics.batch_studies(analysis.engine.partition(" ")[0], 1)
        self._on_results()
        self._tell_of_conditions(job, hits, unknown_keys(analysis, order.critical))
        spent = sum(seconds[step] for step in analysis.seconds)
        self._router.end(attempt.job_id, "done", analysis, seconds=spent, batch_studies=attempt.company)
        self._log.info(
            "job done",
            job=job["id"],
            model=model.identity.name,
            version=model.identity.version,
            count=len(attempt.sources),
            read_ahead=attempt.read_ahead,
            **({"batch_studies": attempt.company} if attempt.company else {}),
            result=[o.kind for o in objects],
            seconds=round(seconds["total"], 3),
        )

    def _elsewhere(
        self,
        model: Servable,
        error: EngineError,
        analyse: Callable[[Servable], Analysis],
    ) -> tuple[Servable, Analysis]:
        """What the table of faults.py says after smaller batches did not help: another engine, or later."""
        other: Servable | None = None
        if fault_of(error.code) is not Fault.lost:
            other = self._other(model, error.code)
        step = remedy(error.code, can_shrink=False, has_other=other is not None)
        if step is Remedy.other_engine and other is not None:
            try:
                return other, analyse(other)
            except EngineError as second:
                error, step = second, remedy(second.code, can_shrink=False, has_other=False)
        if step is Remedy.end_process:
            raise DeviceLost(error.operation, error.cause, "See 'nvidia-smi' and the kernel's log for Xid") from error
        if fault_of(error.code) is Fault.oom:
            raise DeviceFull(error.operation, error.cause, error.hint) from error
        # The model has passed its golden cases here, so it is this series: not tried without limit.
        raise NodeError(error.operation, error.cause, error.hint, retryable=True) from error

    def _other(self, model: Servable, code: str) -> Servable | None:
        """The model on the next engine, for one job."""
        name = engine_name(model)
        try:
            given: Any = model  # of the kind that these models gave
            other: Servable | None = self._models.other(given)
        except EngineError as error:
            self._log.error("no other engine serves", model=model.identity.name, engine=name, error=str(error))
            return None
        if other is not None:
            metrics.fallback(name, code)
            self._log.warning(
                "another engine does this job", model=model.identity.name, engine=other.session.engine, code=code
            )
        return other

    def _identity(self, job: Row, model: Servable, analysis: Analysis) -> ResultIdentity:
        def make(current: Row) -> Row:
            before = self._jobs.predecessor(current)
            labelmap = self._jobs.predecessor(current, LABELMAP_SR)
            return asdict(
                result_identity(
                    inputs=inputs_digest(self._db, current),
                    model_digest=model.identity.digest,
                    parameters=parameters_digest(model.identity.parameters),
                    revision=int(current["revision"]),
                    segment_numbers=[s.number for s in analysis.segments],
                    content_datetime=iso(self._db.clock.wall()),
                    predecessor_sr=_named(before),
                    predecessor_labelmap_sr=_named(labelmap),
                )
            )

        stored = self._jobs.fix_identity(
            int(job["id"]), self._owner, version=model.identity.version, digest=model.identity.digest, make=make
        )
        before, labelmap = stored["predecessor_sr"], stored.get("predecessor_labelmap_sr")
        return ResultIdentity(
            **{
                **stored,
                "tracking_uids": tracking_uids(stored, [s.number for s in analysis.segments]),
                "predecessor_sr": tuple(before) if before else None,
                "predecessor_labelmap_sr": tuple(labelmap) if labelmap else None,
            }
        )

    def _commit(
        self,
        job: Row,
        objects: Sequence[EncodedObject],
        analysis: Analysis,
        seconds: dict[str, float],
        hits: Sequence[Hit],
    ) -> None:
        """Files durable first, then one transaction with rows, deliveries and the job's end."""
        self.files.keep(
            self.files.staged(objects),
            lambda results: self._jobs.finish(
                int(job["id"]),
                self._owner,
                Outcome(
                    results=results,
                    notes=analysis.notes,
                    summary={
                        "engine": analysis.engine,
                        "precision": analysis.precision,
                        "role": self._router.role(int(job["id"])),
                        "slices": len(analysis.source_uids),
                        **summary_of(analysis),
                        **({"changes": changes_summary(analysis)} if analysis.prior else {}),
                    },
                    seconds=seconds,
                    critical=[hit.key for hit in hits],
                    alert=bool(self._settings.alerts.url),
                ),
                cloud=self._settings.cloud_plan,
            ),
        )

    def _tell_of_conditions(self, job: Row, hits: Sequence[Hit], unknown: Sequence[str]) -> None:
        if hits:
            keys = ", ".join(dict.fromkeys(hit.key for hit in hits))
            self._log.warning("critical result", job=job["id"], model=job["model"], count=len(hits))
            self._events.add("warning", "critical-result", f"job {job['id']}", f"critical by its rule: {keys}")
        if unknown:
            self._log.info("critical conditions without a value", job=job["id"], key=list(unknown))


def _named(row: Row | None) -> tuple[str, str, str, str] | None:
    """An SR as Predecessor Documents Sequence names it."""
    if row is None:
        return None
    return row["StudyInstanceUID"], row["SeriesInstanceUID"], row["SOPClassUID"], row["SOPInstanceUID"]
