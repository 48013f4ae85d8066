"""Comparisons beside the clinical work: after it, below it, and out of its way at once.

A comparison runs in a child (:mod:`dicomnode.infer.shadow_child`), because it must neither delay
a clinical result nor take the worker with it when a new version crashes or eats the memory.
While the worker has a job the child is stopped (SIGSTOP) and takes no processor time; when there
is none it goes on. It holds no lock of the index, so it can be stopped anywhere.

Shadow: the new version on what the active one has done. Canary: the active version on what the
canary has done, so that both ways give the same kind of row.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import IO, Any

from dicomnode import durable, logs
from dicomnode.durable import ObjectStore, SyncFailed
from dicomnode.errors import BundleError, NodeError
from dicomnode.index.database import Database, Row
from dicomnode.index.jobs import Jobs
from dicomnode.index.life import Life
from dicomnode.index.model_states import ModelState
from dicomnode.index.operation import Events
from dicomnode.index.runs import Runs
from dicomnode.infer.compare import Finding
from dicomnode.infer.routing import HOUR, Router
from dicomnode.infer.serving import bundle_folders, resolve
from dicomnode.infer.shadow_child import Task
from dicomnode.lifeline import SUPERVISED
from dicomnode.settings import EngineName, Settings

DIED = "the process that compares ended (code {}): out of memory, or the model crashed"

LEAST_SHARE = 0.05


@dataclass(slots=True)
class _Running:
    """``computed``: seconds until the child was last stopped; ``since``: when it went on, None while it is stopped."""

    child: subprocess.Popen[bytes]
    answer: IO[bytes]
    comparison: int
    name: str
    version: str
    role: str
    job_seconds: float
    job_outputs: dict[str, float]
    computed: float
    since: float | None
    paused: float = 0.0
    stopped_at: float = 0.0

    def spent(self) -> float:
        return self.computed + (time.monotonic() - self.since if self.since is not None else 0.0)


class Shadows:
    """Call :meth:`pause` before a job is looked for and :meth:`go_on` when there was none."""

    def __init__(self, settings: Settings, db: Database, router: Router) -> None:
        self._settings = settings
        self._db = db
        self._router = router
        self._jobs = Jobs(db)
        self._life = Life(db)
        self._runs = Runs(db)
        self._events = Events(db)
        self._store = ObjectStore(settings.node.data_dir)
        self._running: _Running | None = None
        self._log = logs.get()

    @property
    def busy(self) -> bool:
        """Whether a comparison is under way, stopped or not."""
        return self._running is not None

    @property
    def child_pid(self) -> int | None:
        return self._running.child.pid if self._running else None

    def pause(self) -> None:
        """The child takes no processor time from here on, until :meth:`go_on`."""
        one = self._running
        if one is not None and one.since is not None:
            one.child.send_signal(signal.SIGSTOP)
            one.computed, one.since, one.stopped_at = one.spent(), None, time.monotonic()

    def go_on(self) -> None:
        """Let the child go on, take what it has made, or begin the next comparison.

        No memory for a child, a locked index: the comparison is given up and made again later, and
        the clinical work goes on.
        """
        try:
            self._step()
        except SyncFailed as error:
            durable.die(error)
        except (NodeError, OSError) as error:
            self._log.warning("comparison given up", cause=getattr(error, "cause", type(error).__name__))
            self.close()

    def _step(self) -> None:
        one = self._running
        if one is None:
            self._begin()
            return
        if one.since is None:
            one.child.send_signal(signal.SIGCONT)
            one.since = time.monotonic()
            one.paused += one.since - one.stopped_at
        if one.child.poll() is not None:
            self._take(one)
        elif one.spent() > self._settings.rollout.shadow_seconds:
            self._end(one, {"error": f"it took more than {self._settings.rollout.shadow_seconds:g} s of computing"})

    def close(self) -> None:
        """End the child; the comparison is made again by the next life of the worker."""
        one, self._running = self._running, None
        if one is not None:
            one.child.kill()
            one.child.wait()
            one.answer.close()

    def _begin(self) -> None:
        for row in self._life.versions():
            name, version = row["name"], row["version"]
            if row["state"] not in (ModelState.shadow, ModelState.canary):
                continue
            active = self._router.active(name)
            if active is None:
                continue
            role = "shadow" if row["state"] == ModelState.shadow else "canary"
            runs = version if role == "shadow" else active
            since = max(float(row["since_at"]), self._db.clock.ticks() - self._settings.rollout.shadow_hours * HOUR)
            job = self._runs.due(name, runs, role=role, since=since)
            if job is not None and (role == "shadow" or job["made_by"] == version):
                self._start(job, name, runs, role)
                return

    def _start(self, job: Row, name: str, runs: str, role: str) -> None:
        version, other = (runs, str(job["made_by"])) if role == "shadow" else (str(job["made_by"]), runs)
        comparison = self._runs.compare_begin(int(job["id"]), name, version, other, role)
        folders = bundle_folders(self._settings.inference.models_dir, self._settings.node.data_dir)
        inputs = self._jobs.inputs(int(job["id"]))
        cause = ""
        try:
            folder = resolve(folders, f"{name}@{runs}", {})
        except BundleError as error:
            cause = error.cause
        if len(inputs) != self._jobs.input_count(int(job["id"])):
            cause = "an image was replaced after the job's analysis"
        if cause:
            self._runs.compare_end(comparison, {"state": "failed", "error": cause})
            return
        results = self._jobs.show(int(job["id"]))
        assert results is not None
        summary = results["summary"] or {}
        measured = dict(Finding.of(summary, None).measurements)
        task = Task(
            bundle=str(folder.path),
            engine=_engine(self._settings.inference.engine),
            data_dir=str(self._settings.node.data_dir),
            threads=self._settings.inference.threads,
            max_batch=self._settings.inference.max_batch,
            gpu_memory_share=beside(self._settings.inference.gpu_memory_share),
            sources=[
                [
                    r["SOPInstanceUID"],
                    r["SOPClassUID"],
                    r["TransferSyntaxUID"],
                    str(self._store.path(r["file"])),
                    r["sha256"],
                ]
                for r in inputs
            ],
            segs=[str(self._store.path(r["file"])) for r in results["results"] if r["kind"] == "SEG"],
            summary={key: summary.get(key) or [] for key in ("segments", "measurements", "findings")},
            memory_mb=self._settings.inference.verify_memory_mb,
        )
        with contextlib.ExitStack() as ours:  # files in memory: a pipe could fill up while the child is stopped
            question = ours.enter_context(os.fdopen(os.memfd_create("task"), "w+b", buffering=0))
            answer = ours.enter_context(os.fdopen(os.memfd_create("answer"), "rb", buffering=0))
            question.write(task.as_json())
            question.seek(0)
            child = subprocess.Popen(
                [sys.executable, "-m", "dicomnode.infer.shadow_child"],
                stdin=question,
                stdout=answer,
                stderr=subprocess.DEVNULL,
                env={**os.environ, SUPERVISED: str(os.getpid())},
            )
            question.close()
            ours.pop_all()
        self._running = _Running(
            child,
            answer,
            comparison,
            name,
            version,
            role,
            float(job["made_in"] or 0.0),
            measured,
            0.0,
            time.monotonic(),
        )

    def _take(self, one: _Running) -> None:
        one.answer.seek(0)
        try:
            answer: dict[str, Any] = json.loads(one.answer.read())
        except ValueError:
            answer = {"error": DIED.format(one.child.returncode)}
        self._end(one, answer)

    def _end(self, one: _Running, answer: dict[str, Any]) -> None:
        if "error" in answer:
            self._runs.compare_end(one.comparison, {"state": "failed", "error": answer["error"]})
            self._events.add("warning", "model-comparison", f"{one.name}@{one.version}", answer["error"])
            self._log.warning("comparison failed", model=one.name, version=one.version, error=answer["error"])
        else:
            seconds = max(0.0, float(answer.pop("seconds")) - one.paused)
            outputs = answer.pop("outputs")
            pair = (seconds, one.job_seconds) if one.role == "shadow" else (one.job_seconds, seconds)
            made = outputs if one.role == "shadow" else one.job_outputs
            fields = {**answer, "seconds": pair[0], "other_seconds": pair[1], "outputs": made}
            self._runs.compare_end(one.comparison, {"state": "done", "error": None, **fields})
        self.close()
        self._router.recheck(one.name)


def beside(share: float) -> float:
    """Share of the GPU's memory for a comparison: what the clinical work leaves. A child that is stopped keeps it."""
    return max(LEAST_SHARE, round(1.0 - share, 3))


def _engine(setting: EngineName) -> str:
    """What comparisons run on: this box's engine, where endpoints serve its CPU.

    Endpoints are left to the clinical work, which a comparison there could not make room for.
    """
    return (EngineName.onnxruntime_cpu if setting is EngineName.kserve else setting).value
