"""Which version analyses a job, the record of how it went, and the way back when it goes badly.

A job is decided anew at each attempt, by :func:`dicomnode.rollout.choose`: its study stays with
the version that it went to while that version serves, and takes the active one when it does not
any more. So a job whose worker died before a swap is done by what is active after it. That
cannot give two results: nothing of an attempt is visible before the one transaction that ends the
job, which stores the results of one version together with that version's identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dicomnode import logs, rollout
from dicomnode.errors import BundleError, EngineError, IllegalTransition, OperatorError, PeerAway
from dicomnode.index.database import Database, Row
from dicomnode.index.life import Change, Life
from dicomnode.index.model_states import ModelState
from dicomnode.index.operation import Events, Models
from dicomnode.index.runs import Origin, Runs
from dicomnode.infer.placing import PlacedModels, Record, Servable
from dicomnode.infer.purpose import check_clinical_version
from dicomnode.infer.serving import ServingModels, bundle_folders, serving_version, version_before
from dicomnode.infer.summary import part_of
from dicomnode.records import Analysis
from dicomnode.rollout import Canary, Limits, Role, RunState, Verdict
from dicomnode.settings import RolloutSettings, Settings

NODE = "node"
"""``who`` of what the node does by itself."""

HOUR = 3600.0
_PASSES = frozenset({"BUILDING", "OOM", "DEVICE_LOST"})
"""Why a version cannot be opened without being to blame: its engine is on its way, the GPU is full or gone."""


@dataclass(frozen=True, slots=True)
class Route:
    """A job's version and the row of its attempt."""

    model: Servable
    name: str
    role: Role
    run: int
    settled: bool


def limits_of(settings: RolloutSettings) -> Limits:
    return Limits(
        min_runs=settings.min_runs,
        max_error_excess=settings.max_error_excess,
        min_errors=settings.min_errors,
        max_slowdown=settings.max_slowdown,
        max_disagreement=settings.max_disagreement,
        min_dice=settings.min_dice,
        max_difference=settings.max_difference,
    )


class Router:
    """Used by one worker, whose jobs may be nested: a more urgent one goes first in the middle of another."""

    def __init__(self, settings: Settings, db: Database, models: ServingModels | PlacedModels) -> None:
        self._rules = settings.rollout
        self._limits = limits_of(settings.rollout)
        self._folders = (settings.inference.models_dir, settings.node.data_dir)
        self._db = db
        self._models = models
        self._life = Life(db)
        self._runs = Runs(db)
        self._pointer = Models(db)
        self._events = Events(db)
        self._log = logs.get()
        self._open: dict[int, Route] = {}

    def pick(self, job: Row, instances: int, record: Record) -> Servable:
        """The model for a job, ready and held until :meth:`end`; its attempt is on record.

        The version is decided here, the place by the models, which give ``record`` what they
        decided. Raises as :meth:`ServingModels.get` does, BundleError for a bundle that is for
        benchmarks, and PeerAway when every place is away.
        """
        reference = str(job["model"])
        name, _, pinned = reference.partition("@")
        origin = self._runs.origin(job)
        role: Role = "pinned" if pinned else "active"
        model = None if pinned else self._on_trial(name, int(job["id"]), origin, instances, record)
        if model is not None:
            role = "canary"
        else:
            model = self._models.for_job(reference, record)
        version = model.identity.version
        check_clinical_version(bundle_folders(*self._folders), name, version)
        run = self._runs.begin(int(job["id"]), origin.study_id, name, version, role, instances)
        given: Any = model  # of the kind that these models gave
        self._close(int(job["id"]))  # a former attempt whose end was never written
        self._models.hold(given)
        self._open[int(job["id"])] = Route(model, name, role, run, self._models.settled(given))
        return model

    def destined(self, jobs: Sequence[Row]) -> list[str]:
        """The version that :meth:`pick` would take for each of these jobs of one model, as things stand; no attempt."""
        reference = str(jobs[0]["model"]) if jobs else ""
        name, _, pinned = reference.partition("@")
        canaries = [] if pinned else self._canaries(name)
        if not canaries:
            return [pinned or self.active(name) or ""] * len(jobs)
        active = self.active(name) or ""
        return [self._choose(name, self._runs.origin(job), canaries, active)[1] for job in jobs]

    def _canaries(self, name: str) -> list[Canary]:
        rows = self._life.in_state(ModelState.canary, name)
        return [Canary(r["version"], float(r["percent"]), tuple(r["peers"])) for r in rows]

    def _choose(self, name: str, origin: Origin, canaries: Sequence[Canary], active: str) -> tuple[Role, str]:
        before = self._runs.before(origin.study_id, name)
        return rollout.choose(name, origin.study_uid, origin.callers, canaries, active=active, before=before)

    def _on_trial(self, name: str, job_id: int, origin: Origin, instances: int, record: Record) -> Servable | None:
        """The canary that this study goes to; None for the active version, also when the canary cannot serve."""
        canaries = self._canaries(name)
        if not canaries:
            return None
        role, version = self._choose(name, origin, canaries, self.active(name) or "")
        if role != "canary":
            return None
        try:
            return self._models.for_job(f"{name}@{version}", record)
        except PeerAway as error:  # no fault of this version: it is not counted, and the study need not wait for it
            self._log.warning("canary has no place now", model=name, version=version, error=str(error))
            return None
        except (BundleError, EngineError) as error:
            if isinstance(error, EngineError) and error.code in _PASSES:
                self._log.info("canary waits for its engine", model=name, version=version, cause=error.cause)
                return None
            self._log.error("canary cannot serve", model=name, version=version, error=str(error))
            run = self._runs.begin(job_id, origin.study_id, name, version, "canary", instances)
            self._runs.end(run, "error")
            self.recheck(name)
            return None

    def end(
        self,
        job_id: int,
        state: RunState,
        analysis: Analysis | None = None,
        *,
        seconds: float = 0.0,
        batch_studies: int = 0,
    ) -> None:
        """How the attempt that :meth:`pick` began has ended; without one it does nothing."""
        route = self._open.get(job_id)
        if route is None:
            return
        self._runs.end(  # where the index does not take it the attempt stays open, to be ended later
            route.run,
            state,
            seconds=seconds,
            outputs=outputs_of(analysis) if analysis else None,
            engine=analysis.engine.partition(" ")[0] if analysis else "",
            settled=route.settled,
            batch_studies=batch_studies,
        )
        self._close(job_id)
        self.recheck(route.name)

    def _close(self, job_id: int) -> None:
        if (route := self._open.pop(job_id, None)) is not None:
            given: Any = route.model
            self._models.let_go(given)

    def role(self, job_id: int) -> str:
        """Role of the version that does a job at hand."""
        return self._open[job_id].role if job_id in self._open else ""

    def lost(self, job_ids: Sequence[int]) -> None:
        """Jobs whose worker died while it held them."""
        for name in {name for name, _ in self._runs.lose(job_ids)}:
            self.recheck(name)

    def parted(self, job_ids: Sequence[int]) -> None:
        """Jobs whose worker died while they shared a batch: it is not known which of them is to blame."""
        self._runs.part(job_ids)

    def stop(self) -> None:
        """The worker is told to stop."""
        self._runs.stop()

    def active(self, name: str) -> str | None:
        """The version that serves all studies but a canary's, whether it was activated or serves by default."""
        return serving_version(bundle_folders(*self._folders), name, self._pointer.active(), self._life.held_back())

    def canaries(self) -> list[str]:
        """References that have to be ready beside those of the rules."""
        return [f"{r['name']}@{r['version']}" for r in self._life.in_state(ModelState.canary)]

    def recheck(self, name: str) -> Verdict | None:
        """Judge what is on trial and roll it back where it has to be; the verdict that was carried out."""
        if not self._rules.automatic:
            return None
        now = self._db.clock.ticks()
        active = self.active(name)
        for row in self._life.versions(name):
            version, since = row["version"], float(row["since_at"] or 0.0)
            begin = max(since, now - self._rules.watch_hours * HOUR)
            target: str | None = None
            if row["state"] == ModelState.canary:
                reference = active
            elif row["state"] == ModelState.active and now - since < self._rules.probation_hours * HOUR:
                reference = target = self._way_back(name, version)
            else:
                continue
            if reference is None:
                continue
            verdict = rollout.judge(
                self._runs.recent(name, version, self._rules.watch_runs, since=begin),
                self._runs.recent(name, reference, self._rules.watch_runs),
                self._runs.compared(name, version, self._rules.watch_runs, since=begin),
                self._limits,
            )
            if verdict is not None and self._roll_back(name, version, target, verdict):
                return verdict
        return None

    def _way_back(self, name: str, version: str) -> str | None:
        """The version before, when it is on the disk; one that was rolled back itself is none."""
        folders = bundle_folders(*self._folders)
        before = version_before(folders, name, version, self._life.served_before(name), self._life.held_back())
        return before if before in {f.version for f in folders if f.name == name} else None

    def _roll_back(self, name: str, version: str, target: str | None, verdict: Verdict) -> bool:
        change = Change(NODE, f"{verdict.reason}: {verdict.text}", automatic=True)
        try:
            self._life.roll_back(name, version, target, change)
        except (IllegalTransition, OperatorError):
            return False  # somebody was quicker
        instead = f"{target} serves again" if target else "the active version serves its studies"
        self._events.add(
            "error", "model-rolled-back", f"{name}@{version}", f"{verdict.reason}: {verdict.text}; {instead}"
        )
        self._log.error("model rolled back", model=name, version=version, cause=verdict.reason, reason=verdict.text)
        return True


def outputs_of(analysis: Analysis) -> dict[str, float]:
    """Measurements by ``segment label.key`` or ``image 2.key``, or ``key`` for those of the whole series."""
    parts = [(part_of(m, analysis), m) for m in analysis.measurements]
    return {f"{part}.{m.key}" if part is not None else m.key: float(m.value) for part, m in parts}
