"""The worker: leases jobs, analyses, encodes, and commits results with their deliveries."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from dicomnode import durable, logs, metrics
from dicomnode.clock import iso
from dicomnode.durable import ObjectStore, SyncFailed
from dicomnode.errors import EngineError, InputError, LeaseLost, NodeError, OperatorError, UnsuitableSeries
from dicomnode.header import Wanted, read_header
from dicomnode.identity import parameters_digest, result_identity
from dicomnode.index.catalogue import NewInstance
from dicomnode.index.database import Database, Row
from dicomnode.index.jobs import Jobs, Outcome, Result
from dicomnode.index.keys import HEADER_KEYS
from dicomnode.index.operation import Events
from dicomnode.infer.ahead import ReadAhead
from dicomnode.infer.decode import Decoder
from dicomnode.infer.golden import ReadyModel
from dicomnode.infer.serving import ServingModels
from dicomnode.infer.volume import ReadSlice
from dicomnode.records import Analysis, EncodedObject, Finding, ModelIdentity, ResultIdentity, SourceInstance
from dicomnode.settings import Settings

Encode = Callable[[Analysis, ResultIdentity, ModelIdentity, Sequence[SourceInstance]], Sequence[EncodedObject]]
WITHOUT_LIMIT = 1_000_000_000
EXIT_HUNG = 75
"""EX_TEMPFAIL of sysexits.h."""


class Worker:
    """``encode`` comes from the composition root; ``on_results`` wakes courier and sidecar."""

    def __init__(
        self,
        settings: Settings,
        db: Database,
        models: ServingModels,
        encode: Encode,
        *,
        owner: str,
        decoder: Decoder,
        on_results: Callable[[], None],
        ahead: ReadAhead | None = None,
    ) -> None:
        self._settings = settings
        self._db = db
        self._jobs = Jobs(db)
        self._events = Events(db)
        self._models = models
        self._encode = encode
        self._owner = owner
        self._decoder = decoder
        self._on_results = on_results
        self._ahead = ahead
        self._hearts: list[_Heart] = []
        """Of the jobs at hand: the last is being done, those before it wait for it."""
        self._store = ObjectStore(settings.node.data_dir)
        self._wanted = Wanted(HEADER_KEYS)
        self._log = logs.get()

    def start(self) -> None:
        """Take back what a former life of this worker held."""
        self._expire((self._owner,))

    def hand_back(self) -> int:
        """Give up what this worker holds; the attempt does not count."""
        return self._jobs.hand_back(self._owner)

    def run_once(self) -> bool:
        """Do one job if one is due; False when there was none."""
        self._expire(())
        job = self._jobs.lease(self._owner, self._settings.inference.lease_seconds)
        if job is None:
            return False
        self._do(job)
        return True

    def _do(self, job: Row) -> None:
        inference = self._settings.inference
        heart = _Heart(self._jobs, int(job["id"]), self._owner, inference.lease_seconds, inference.job_seconds)
        self._hearts.append(heart)
        try:
            with heart:
                self._guarded(job)
        finally:
            self._hearts.pop()

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

    def _expire(self, dead: tuple[str, ...]) -> None:
        for job in self._jobs.expire(self._settings.inference.max_attempts, dead):
            metrics.job("lost")
            self._log.warning("job taken back", job=job["id"], attempts=job["attempts"])
            if job["attempts"] >= self._settings.inference.max_attempts:
                self._events.add(
                    "error", "job-failed", f"job {job['id']}", f"it ended the worker {job['attempts']} times; parked"
                )

    def _guarded(self, job: Row) -> None:
        job_id = int(job["id"])
        try:
            self._work(job)
        except LeaseLost as error:
            metrics.job("lost")
            self._log.info("result dropped", job=job_id, cause=error.cause)
        except InputError as error:
            code = error.code if isinstance(error, UnsuitableSeries) else "MALFORMED"
            if code == "DECODER_CRASHED":  # or the kernel took its memory: worth another try
                self._retry(job, str(error), self._settings.inference.max_attempts)
                return
            text = f"{code}: {error.cause}. {error.hint}".strip()
            self._settle(lambda: self._jobs.refuse(job_id, self._owner, text))
            metrics.job("refused")
            self._log.warning("series refused", job=job_id, model=job["model"], code=code, cause=error.cause)
            self._events.add("warning", "job-refused", f"job {job_id}", text)
        except SyncFailed as error:
            durable.die(error)
        except OperatorError as error:
            # A missing model or a full disk: it passes once the operator has acted.
            self._retry(job, str(error), WITHOUT_LIMIT)
        except NodeError as error:
            self._retry(job, str(error), self._settings.inference.max_attempts)
        except Exception as error:  # noqa: BLE001 whatever a model does, the next study must work
            self._log.exception("job failed", job=job_id, exc_type=type(error).__name__)
            self._retry(job, f"unexpected {type(error).__name__}", self._settings.inference.max_attempts)

    def _retry(self, job: Row, text: str, max_attempts: int) -> None:
        job_id = int(job["id"])
        states: list[str] = []
        self._settle(lambda: states.append(self._jobs.fail(job_id, self._owner, text, max_attempts=max_attempts)))
        state = states[0] if states else "lost"
        metrics.job("failed" if state == "failed" else "retried")
        self._log.error("job not done", job=job_id, state=state, attempts=job["attempts"], error=text)
        if state == "failed" or job["attempts"] == 1:
            self._events.add("error", "job-failed", f"job {job_id}", text)

    def _settle(self, change: Callable[[], None]) -> None:
        try:
            change()
        except LeaseLost as error:
            self._log.info("job was taken over", cause=error.cause)

    def _work(self, job: Row) -> None:
        started = self._db.clock.ticks()
        sources = [
            SourceInstance(
                r["SOPInstanceUID"], r["SOPClassUID"], r["TransferSyntaxUID"], self._store.path(r["file"]), r["sha256"]
            )
            for r in self._jobs.inputs(int(job["id"]))
        ]
        if len(sources) != self._jobs.input_count(int(job["id"])):
            raise NodeError(
                "read inputs",
                "an image was replaced after the series was selected",
                "A newer revision follows",
                retryable=True,
            )
        model = self._models.get(str(job["model"]))
        ahead = self._ahead.take(sources) if self._ahead else {}
        try:
            self._analyse(job, model, sources, ahead, started)
        finally:
            if self._ahead:
                self._ahead.done(sources)

    def _analyse(
        self,
        job: Row,
        model: ReadyModel,
        sources: Sequence[SourceInstance],
        ahead: Mapping[str, ReadSlice],
        started: float,
    ) -> None:
        """``ahead``: slices whose file was read, and found intact, while the series arrived."""
        for source in sources:
            if source.sop_instance_uid not in ahead and not _intact(source):
                raise NodeError(
                    "read inputs",
                    "a stored image is damaged or gone: its SHA-256 differs",
                    "Send the series again",
                    retryable=True,
                )
        seconds: dict[str, float] = {"wait": max(0.0, started - float(job["last_received_at"]))}
        read_ahead = len(ahead)
        stood: dict[str, float] = {}

        def between(step: str, _: float) -> None:
            self._let_pass(job, step, stood)

        try:
            analysis = model.analyse(sources, decoder=self._decoder, progress=between, ahead=ahead)
        except EngineError as error:
            # The model has passed its golden cases here, so it is this series: not tried without limit.
            raise NodeError(error.operation, error.cause, error.hint, retryable=True) from error
        seconds.update({step: spent - stood.get(step, 0.0) for step, spent in analysis.seconds.items()})
        begin = time.perf_counter()
        identity = self._identity(job, model, analysis)
        objects = self._encode(analysis, identity, model.identity, sources)
        seconds["encode"] = time.perf_counter() - begin
        begin = time.perf_counter()
        self._commit(job, objects, analysis, seconds)
        seconds["commit"] = time.perf_counter() - begin
        seconds["total"] = self._db.clock.ticks() - float(job["last_received_at"])
        for stage in ("wait", "read", "inference", "postprocess", "encode", "commit", "total"):
            if stage in seconds:
                metrics.observe(stage, seconds[stage])
        metrics.job("done")
        self._on_results()
        self._log.info(
            "job done",
            job=job["id"],
            model=model.identity.name,
            version=model.identity.version,
            count=len(sources),
            read_ahead=read_ahead,
            result=[o.kind for o in objects],
            seconds=round(seconds["total"], 3),
        )

    def _identity(self, job: Row, model: ReadyModel, analysis: Analysis) -> ResultIdentity:
        def make(current: Row) -> Row:
            before = self._jobs.predecessor(current)
            return asdict(
                result_identity(
                    inputs=current["inputs_sha256"],
                    model_digest=model.identity.digest,
                    parameters=parameters_digest(model.identity.parameters),
                    revision=int(current["revision"]),
                    segment_numbers=[s.number for s in analysis.segments],
                    content_datetime=iso(self._db.clock.wall()),
                    predecessor_sr=(
                        (
                            before["StudyInstanceUID"],
                            before["SeriesInstanceUID"],
                            before["SOPClassUID"],
                            before["SOPInstanceUID"],
                        )
                        if before
                        else None
                    ),
                )
            )

        stored = self._jobs.fix_identity(
            int(job["id"]), self._owner, version=model.identity.version, digest=model.identity.digest, make=make
        )
        before = stored["predecessor_sr"]
        return ResultIdentity(
            **{
                **stored,
                "tracking_uids": {int(n): uid for n, uid in stored["tracking_uids"].items()},
                "predecessor_sr": tuple(before) if before else None,
            }
        )

    def _commit(
        self, job: Row, objects: Sequence[EncodedObject], analysis: Analysis, seconds: dict[str, float]
    ) -> None:
        """Files durable first, then one transaction with rows, deliveries and the job's end."""
        results = [self._stage(o) for o in objects]
        paths = [self._store.path(r.instance.file) for r in results]
        try:
            for folder in {p.parent for p in paths}:
                durable.sync_directory(folder)
            self._jobs.finish(
                int(job["id"]),
                self._owner,
                Outcome(
                    results=results,
                    notes=analysis.notes,
                    summary={
                        "engine": analysis.engine,
                        "slices": len(analysis.source_uids),
                        "segments": [s.label for s in analysis.segments],
                        "measurements": [_measurement(m, analysis) for m in analysis.measurements],
                        "findings": [_finding(f) for f in analysis.findings],
                    },
                    seconds=seconds,
                ),
                sync_destination="cloud" if self._settings.cloud.stow_url else "",
            )
        except NodeError:
            for path in paths:
                durable.remove(path)
            raise

    def _stage(self, encoded: EncodedObject) -> Result:
        name = self._store.new_name(encoded.series_instance_uid)
        self._store.stage(name, [encoded.part10])
        data_set = data_set_of(encoded.part10)
        attributes = read_header(data_set, encoded.transfer_syntax_uid, self._wanted)
        return Result(
            encoded.kind,
            NewInstance(
                attributes=attributes,
                transfer_syntax_uid=encoded.transfer_syntax_uid,
                file=name,
                size=len(encoded.part10),
                sha256=durable.sha256(encoded.part10),
                dataset_sha256=durable.sha256(data_set),
                origin="result",
            ),
        )


def data_set_of(part10: bytes) -> memoryview:
    """The data set of a Part 10 file: what follows group 2 (PS3.10 7.1)."""
    length = int.from_bytes(part10[140:144], "little")
    return memoryview(part10)[144 + length :]


def _intact(source: SourceInstance) -> bool:
    try:
        return durable.object_intact(source.path, source.sha256)
    except OSError:
        return False


def _measurement(measurement: Any, analysis: Analysis) -> dict[str, Any]:
    label = next((s.label for s in analysis.segments if s.number == measurement.segment), None)
    return {"key": measurement.key, "segment": label, "value": measurement.value, "unit": measurement.unit.value}


def _finding(finding: Finding) -> dict[str, Any]:
    answer = finding.value.meaning if finding.value else None
    return {"key": finding.key, "answer": answer, "probability": finding.probability, "threshold": finding.threshold}


class _Heart:
    """Keeps the lease alive while a job runs; ends the process when it takes too long.

    A codec or engine that hangs cannot be interrupted from Python, so the process goes: the
    lease is taken back at its restart, and after ``max_attempts`` the job is parked.
    """

    def __init__(self, jobs: Jobs, job_id: int, owner: str, seconds: float, limit: float) -> None:
        self._jobs, self._job_id, self._owner, self._seconds = jobs, job_id, owner, seconds
        self._deadline = time.monotonic() + limit
        self._stands = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="lease", daemon=True)

    def __enter__(self) -> _Heart:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    @contextmanager
    def standing_still(self) -> Iterator[Callable[[], float]]:
        """While a more urgent job is done, this one's time does not run; gives the seconds that it stood."""
        begin = time.monotonic()
        self._stands = True
        try:
            yield lambda: time.monotonic() - begin
        finally:
            self._deadline += time.monotonic() - begin
            self._stands = False

    def _beat(self) -> None:
        while not self._stop.wait(min(self._seconds / 3, max(0.1, self._deadline - time.monotonic()))):
            if time.monotonic() >= self._deadline and not self._stands:
                logs.get().error("job takes too long, the worker is restarted", job=self._job_id)
                os._exit(EXIT_HUNG)
            try:
                self._jobs.extend(self._job_id, self._owner, self._seconds)
            except LeaseLost:
                return  # finish() will find out and drop the result
            except NodeError:
                continue  # a locked index: the next beat is soon enough
