"""The worker process: select, read ahead, infer and encode, put together."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from dicomnode import doorbell, durable, lifeline
from dicomnode.app_results import encoder, failure_reporter, warm_encoder
from dicomnode.app_shell import Shell
from dicomnode.errors import EngineError, NodeError
from dicomnode.index.database import Database
from dicomnode.index.desired import ServingRules
from dicomnode.settings import EngineName, Settings

JOB_GRACE_SECONDS = 2.0


def run_worker(settings: Settings) -> int:
    """Select complete series and do their jobs; one job at a time on this box's engine."""
    from dicomnode.infer.decode import PoolDecoder
    from dicomnode.infer.shadow import Shadows
    from dicomnode.infer.worker import Worker
    from dicomnode.select.selector import Selector

    shell = Shell(settings, "worker")
    data_dir = settings.node.data_dir
    jobs_bell = threading.Event()
    models, about = _serving(shell, jobs_bell.set)
    shell.detail = lambda: {**about(), "models": models.report()}
    store = durable.ObjectStore(data_dir)
    store.prepare()
    bell = doorbell.Doorbell(data_dir, "worker")
    selector = Selector(settings, shell.db, on_jobs=jobs_bell.set)
    decoder = PoolDecoder(max(1, os.cpu_count() or 1))
    ahead = _read_ahead(settings, shell.db, store, decoder)

    def ring_senders() -> None:
        doorbell.ring(data_dir, "courier")
        doorbell.ring(data_dir, "sidecar")

    worker = Worker(
        settings,
        shell.db,
        models,
        encoder(settings, decoder, shell.db),
        owner="worker",
        decoder=decoder,
        on_results=ring_senders,
        ahead=ahead,
        on_lost=lambda: _leave_device(shell, decoder),
        report=failure_reporter(settings, shell.db),
    )
    worker.start()
    rules = ServingRules(settings, shell.db)

    def wanted() -> list[str]:
        return list(dict.fromkeys(m for rule in rules() for m in rule.every_model))

    models.prepare([*wanted(), *worker.router.canaries()])
    shadows = Shadows(settings, shell.db, worker.router)
    decoder.warm_up()
    warm_encoder(settings)

    thread = threading.Thread(target=_select, args=(shell, selector, bell, ahead.wake), name="select", daemon=True)
    shell.healthy = thread.is_alive
    thread.start()
    reading = threading.Thread(target=ahead.run, args=(shell.stop.is_set,), name="read-ahead", daemon=True)
    reading.start()
    shell.ready()
    threading.Thread(target=_leave_job, args=(shell, worker, decoder), name="stop", daemon=True).start()
    _do_jobs(shell, worker, models, shadows, wanted, jobs_bell)
    shadows.close()
    ahead.wake()
    reading.join(JOB_GRACE_SECONDS)
    decoder.close()
    shell.close()
    return 0


LOOKING_SHARE = 0.2
"""Of one core for looks at open series: while images arrive the bell rings with each commit."""


def _select(shell: Shell, selector: Any, bell: doorbell.Doorbell, on_bell: Callable[[], None]) -> None:
    """Look at open series whenever the bell rings or one has waited long enough."""
    wait = 0.0
    while not shell.stop.is_set():
        bell.wait(wait)
        on_bell()
        begin = time.thread_time()  # what it waited for the index took nothing from anybody
        try:
            wait = selector.run_once()
            pause = (time.thread_time() - begin) * (1.0 / LOOKING_SHARE - 1.0)
            shell.stop.wait(pause)
            wait -= pause
        except NodeError as error:
            shell.log.error("selection failed, trying again", error=str(error))
            wait = doorbell.SLOW_BEAT_SECONDS


def _read_ahead(settings: Settings, db: Database, store: durable.ObjectStore, decoder: Any) -> Any:
    """Reads slices of series that a rule names a model for, while they arrive."""
    from dicomnode.index import prior
    from dicomnode.infer.ahead import ReadAhead
    from dicomnode.select.rules import requests_for

    rules = ServingRules(settings, db)

    def wanted(attributes: Mapping[str, Any]) -> bool:
        if prior.fetched(db, str(attributes.get("SeriesInstanceUID"))):
            return False
        return bool(requests_for(rules(), attributes))

    return ReadAhead(db, store, decoder, wanted, max_bytes=settings.inference.read_ahead_mb << 20)


def _serving(shell: Shell, on_better: Callable[[], None]) -> tuple[Any, Callable[[], dict[str, Any]]]:
    """The models as the worker needs them, and what the heartbeat says of the engine.

    With endpoints configured (``inference.places``) each job goes to the best place; a box
    without an engine of its own that works then leaves everything to them.
    """
    from dicomnode.infer.choice import EngineChoice
    from dicomnode.infer.placing import placed_models
    from dicomnode.infer.serving import ServingModels

    settings, inference = shell.settings, shell.settings.inference
    choice: EngineChoice | None = None
    if inference.engine is not EngineName.kserve:
        try:
            choice = EngineChoice.of(settings)
        except EngineError as error:
            if not inference.places:
                raise
            shell.log.warning("no engine on this box, the endpoints serve", cause=error.cause)
    if choice is None:
        return placed_models(settings, shell.db, None), lambda: {"engine": "kserve", "engines_rejected": {}}
    for rejection in choice.rejected:
        shell.log.info("engine not used", engine=rejection.engine, code=rejection.code, cause=rejection.text)
    local = ServingModels(
        shell.db,
        choice,
        models_dir=inference.models_dir,
        data_dir=settings.node.data_dir,
        threads=inference.threads,
        on_better=on_better,
    )

    def about(choice: EngineChoice = choice) -> dict[str, Any]:  # a GPU that was full may have come back
        return {
            "engine": choice.engines[0].name,
            "engines_rejected": {r.engine: f"{r.code}: {r.text}" for r in choice.rejected},
        }

    return placed_models(settings, shell.db, local) if inference.places else local, about


def _do_jobs(
    shell: Shell, worker: Any, models: Any, shadows: Any, wanted: Callable[[], list[str]], jobs_bell: threading.Event
) -> None:
    """Jobs while there are any; comparisons of versions, and models that could not serve, in between."""
    while not shell.stop.is_set():
        jobs_bell.clear()
        shadows.pause()
        if not worker.run_once():
            shadows.go_on()
            _wait_either(jobs_bell, shell.stop, doorbell.SLOW_BEAT_SECONDS)
            needed = [*wanted(), *worker.router.canaries()]
            models.prepare(needed)
            models.keep(needed)


def _leave_job(shell: Shell, worker: Any, decoder: Any) -> None:
    """On a stop signal: a job that does not end at once goes back to the queue, uncounted."""
    while not shell.stop.wait(3600.0):
        pass
    time.sleep(JOB_GRACE_SECONDS)  # the main thread ends by itself when it is idle
    count = worker.hand_back()
    shell.log.info("job handed back", count=count)
    lifeline.notify("STOPPING=1")
    decoder.kill()
    os._exit(0)


def _leave_device(shell: Shell, decoder: Any) -> None:
    """The accelerator is spoilt for this process and its lease is given back: end, to be started afresh."""
    from dicomnode.infer.worker import EXIT_LOST

    shell.log.error("the GPU fails every call, the worker is restarted")
    decoder.kill()
    os._exit(EXIT_LOST)


def _wait_either(first: threading.Event, stop: lifeline.StopFlag, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not first.wait(0.1) and not stop.is_set() and time.monotonic() < deadline:
        pass
