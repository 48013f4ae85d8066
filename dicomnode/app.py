"""Composition root: builds the processes from the stages and runs them.

``serve`` supervises receiver, worker, courier and sidecar for a laptop or a demo; under
systemd each is a unit of its own. Only this module and its neighbours (cli, sidecar,
doctor) import more than one stage.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from dicomnode import __version__, doorbell, durable, lifeline, logs, metrics
from dicomnode.clock import iso
from dicomnode.errors import EngineError, NodeError, OperatorError, SettingsError, StorageError, UnsuitableSeries
from dicomnode.identity import derived_uid, failure_identity
from dicomnode.index.database import Database, Row
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import BEAT_SECONDS, Events, Processes
from dicomnode.index.seen import SeenCertificates
from dicomnode.orders import Order
from dicomnode.records import Analysis, EncodedObject, ModelIdentity, ResultIdentity, SourceInstance
from dicomnode.settings import EngineName, Settings
from dicomnode.supervisor import EXIT_CONFIGURATION, Child, Supervisor
from dicomnode.tls import Transport

PROCESSES = ("receiver", "worker", "courier", "sidecar")
MANUFACTURER = "dicomnode"
JOB_GRACE_SECONDS = 2.0
COURIER_GRACE_SECONDS = 2.0
BIND_SECONDS = 3.0
SWEEP_SECONDS = 15.0
"""One folder of the store is swept this often: all 256 in about an hour."""


class Shell:
    """What every process has: logs, single instance, index, stop flag and heartbeat.

    The heartbeat row, and systemd's watchdog, are served from a thread that first asks
    ``healthy``.
    """

    def __init__(self, settings: Settings, name: str, *, lock: bool = True) -> None:
        logs.configure(name, settings.logging.level, settings.logging.format)
        metrics.prepare(name)
        self.settings = settings
        self.name = name
        self.log = logs.get()
        warnings.showwarning = self._show_warning
        self.stop = lifeline.StopFlag()
        durable.make_directory(settings.node.data_dir)
        self._lock = lifeline.hold_single_instance(settings.node.data_dir, name) if lock else -1
        self.db = Database(settings.node.data_dir)
        self._seen = SeenCertificates(self.db, name.partition("-")[0], [peer.name for peer in settings.peers])
        self.detail: Callable[[], dict[str, Any]] = dict
        self.healthy: Callable[[], bool] = lambda: True
        self._state = "starting"
        self._beat = threading.Thread(target=self._beat_loop, name="heartbeat", daemon=True)
        self._wake = threading.Event()

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Libraries quote values in their warnings, and values are patients' data: the kind and place only."""
        del message, file, line
        self.log.debug("library warning", exc_type=category.__name__, source=f"{Path(filename).name}:{lineno}")

    def ready(self) -> None:
        """Tell the index and systemd that this process does its work now."""
        self._state = "ready"
        self.beat()
        if not self._beat.is_alive():
            self._beat.start()
        lifeline.notify("READY=1")
        self.log.info("ready", pid=os.getpid())

    def beat(self) -> None:
        seen = metrics.peer_certificates()
        metrics.peer_certificates_known(self._seen.exchange(seen), seen)
        Processes(self.db).beat(self.name, self._state, self.detail(), metrics.snapshot())

    def _beat_loop(self) -> None:
        while not self._wake.wait(BEAT_SECONDS):
            try:
                if not self.healthy():
                    self.log.error("process is not healthy, it will be restarted")
                    os._exit(1)
                self.beat()
                lifeline.notify("WATCHDOG=1")
            except NodeError as error:
                self.log.warning("heartbeat not written", error=str(error))
            except Exception as error:  # noqa: BLE001 without this thread the process would look dead for ever
                self.log.error("heartbeat not written", exc_type=type(error).__name__)

    def close(self) -> None:
        lifeline.notify("STOPPING=1")
        self._wake.set()
        self._state = "stopping"
        try:
            self.beat()
        except NodeError as error:
            self.log.warning("heartbeat not written", error=str(error))
        self.db.close()
        self.log.info("stopped")


def command(process: str, config: Path | None, *extra: str) -> list[str]:
    """The command line that runs one process of this node."""
    argv = [sys.executable, "-m", "dicomnode", "run", process, *extra]
    return [*argv, "--config", str(config)] if config else argv


def run_receiver(settings: Settings, config: Path | None, *, fd: int = -1, tls_fd: int = -1, slot: int = 0) -> int:
    """Accept associations; with several workers, supervise them on the listening sockets."""
    if fd >= 0:
        return _run_listener(settings, _doors([fd, tls_fd]), f"receiver-{slot}")
    if settings.tls.port is not None:
        Transport(settings.tls).load()  # who starts the node hears at once what is wrong with the files
    sockets = [_listen(settings.dimse.host, settings.dimse.port)]
    if settings.tls.port is not None:
        sockets.append(_listen(settings.tls.host, settings.tls.port, "tls"))
    if settings.dimse.workers == 1:
        return _run_listener(settings, _doors([s.detach() for s in sockets]), "receiver-1")
    shell = Shell(settings, "receiver")
    shell.detail = lambda: {**_where(sockets), "workers": settings.dimse.workers}
    numbers = [sock.fileno() for sock in sockets]
    options: list[str] = []
    for option, number in zip(("--fd", "--tls-fd"), numbers, strict=False):
        os.set_inheritable(number, True)
        options += [option, str(number)]
    children = [
        Child(f"receiver-{n}", command("receiver", config, *options, "--slot", str(n)), tuple(numbers))
        for n in range(1, settings.dimse.workers + 1)
    ]
    shell.ready()
    try:
        return Supervisor(children, _restart_event(shell.db)).run(shell.stop)
    finally:
        shell.close()


def _listen(host: str, port: int, section: str = "dimse") -> socket.socket:
    """Bind, with patience for a former life of this receiver that is still going."""
    from dicomnode.receive.acceptor import listen

    deadline = time.monotonic() + BIND_SECONDS
    while True:
        try:
            return listen(host, port, section=section)
        except OperatorError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def _doors(numbers: Sequence[int]) -> list[Any]:
    """Listening sockets by descriptor: the plain one, then that of TLS where there is one."""
    from dicomnode.receive.acceptor import Door

    return [Door(socket.socket(fileno=n), tls=bool(place)) for place, n in enumerate(numbers) if n >= 0]


def _where(sockets: Sequence[socket.socket]) -> dict[str, Any]:
    names = [sock.getsockname()[:2] for sock in sockets]
    found = {"host": names[0][0], "port": names[0][1]}
    return {**found, "tls_port": names[1][1]} if len(names) > 1 else found


def _run_listener(settings: Settings, doors: Sequence[Any], name: str) -> int:
    from dicomnode.receive.listener import Listener

    shell = Shell(settings, name)
    where = _where([door.listening for door in doors])
    listener = Listener(settings, shell.db, doors, name, dimse_services(settings, shell.db))
    shell.detail = lambda: {**where, "associations": listener.open_associations()}
    shell.healthy = listener.accepting
    listener.start()
    shell.ready()
    while not shell.stop.wait(1.0):
        pass
    listener.close()
    shell.close()
    return 0


def dimse_services(settings: Settings, db: Database) -> Sequence[Any]:
    """What the acceptor serves beside C-ECHO and C-STORE."""
    from dicomnode.serve import Commitment, ProcedureSteps, QueryRetrieve

    return [QueryRetrieve(settings, db), ProcedureSteps(settings, db), Commitment(settings, db)]


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
    shell.detail = lambda: {**about, "models": models.report()}
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
        encoder(settings, decoder),
        owner="worker",
        decoder=decoder,
        on_results=ring_senders,
        ahead=ahead,
        on_lost=lambda: _leave_device(shell, decoder),
        report=failure_reporter(settings, shell.db),
    )
    worker.start()
    wanted = list(dict.fromkeys(m for rule in settings.rules for m in rule.models))
    models.prepare([*wanted, *worker.router.canaries()])
    shadows = Shadows(settings, shell.db, worker.router)
    decoder.warm_up()
    _warm_encoder(settings)

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


def _select(shell: Shell, selector: Any, bell: doorbell.Doorbell, on_bell: Callable[[], None]) -> None:
    """Look at open series whenever the bell rings or one has waited long enough."""
    wait = 0.0
    while not shell.stop.is_set():
        bell.wait(wait)
        on_bell()
        try:
            wait = selector.run_once()
        except NodeError as error:
            shell.log.error("selection failed, trying again", error=str(error))
            wait = doorbell.SLOW_BEAT_SECONDS


def _read_ahead(settings: Settings, db: Database, store: durable.ObjectStore, decoder: Any) -> Any:
    """Reads slices of series that a rule names a model for, while they arrive."""
    from dicomnode.infer.ahead import ReadAhead
    from dicomnode.select.rules import requests_for

    def wanted(attributes: Mapping[str, Any]) -> bool:
        return bool(requests_for(settings.rules, attributes))

    return ReadAhead(db, store, decoder, wanted, max_bytes=settings.inference.read_ahead_mb << 20)


def _serving(shell: Shell, on_better: Callable[[], None]) -> tuple[Any, dict[str, Any]]:
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
        return placed_models(settings, shell.db, None), {"engine": "kserve", "engines_rejected": {}}
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
    about = {
        "engine": choice.engines[0].name,
        "engines_rejected": {r.engine: f"{r.code}: {r.text}" for r in choice.rejected},
    }
    return placed_models(settings, shell.db, local) if inference.places else local, about


def _do_jobs(
    shell: Shell, worker: Any, models: Any, shadows: Any, wanted: Sequence[str], jobs_bell: threading.Event
) -> None:
    """Jobs while there are any; comparisons of versions, and models that could not serve, in between."""
    while not shell.stop.is_set():
        jobs_bell.clear()
        shadows.pause()
        if not worker.run_once():
            shadows.go_on()
            _wait_either(jobs_bell, shell.stop, doorbell.SLOW_BEAT_SECONDS)
            needed = [*wanted, *worker.router.canaries()]
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


def encoder(settings: Settings, decoder: Any = None) -> Callable[..., Sequence[EncodedObject]]:
    """The encode stage as the worker needs it; ``decoder`` reads pixels in a process that may die."""
    from dicomnode.encode import encode_results

    station = _station(settings)
    options: dict[str, Any] = {} if decoder is None else {"pixels": partial(_pixels, decoder)}

    def encode(
        analysis: Analysis,
        identity: ResultIdentity,
        model: ModelIdentity,
        sources: Sequence[SourceInstance],
        order: Order,
    ) -> Sequence[EncodedObject]:
        return encode_results(analysis, identity, model, sources, station=station, order=order, **options)

    return encode


def _warm_encoder(settings: Settings) -> None:
    from dicomnode.encode.warm import warm_up

    warm_up(_station(settings))


def _station(settings: Settings) -> Any:
    from dicomnode.encode import Station

    return Station(
        manufacturer=MANUFACTURER,
        model_name="DICOM AI node",
        software_versions=__version__,
        serial_number=settings.node.ae_title,
        institution=settings.node.institution,
    )


def _pixels(decoder: Any, source: SourceInstance, frame: int, rows: int, columns: int) -> Any:
    """Stored values of one image or frame, by the decoder of the infer stage."""
    from dicomnode.infer.decode import Undecodable
    from dicomnode.infer.multiframe import single_frames

    try:
        data = source.path.read_bytes()
        if frame:
            (data,) = single_frames(data, [frame])
        (values,) = decoder.frames([(data, rows, columns)])
    except Undecodable as cause:
        raise UnsuitableSeries("make key image", cause.code, cause.text) from cause
    except OSError as error:
        raise UnsuitableSeries("make key image", "NO_FILE", f"unreadable ({error.strerror})") from error
    return values


def failure_reporter(settings: Settings, db: Database) -> Callable[..., EncodedObject]:
    """SR about a job that failed or was refused; its UIDs derive from the job's work and the reason."""
    from dicomnode.encode import Failure, encode_failure

    station = _station(settings)
    jobs = Jobs(db)

    def report(job: Row, sources: Sequence[SourceInstance], model: ModelIdentity | None) -> EncodedObject:
        refused, reason = job["state"] == "refused", str(job["last_error"] or "unknown")
        name, _, version = str(job["model"]).partition("@")
        named = model or ModelIdentity(
            name, version or "unknown", MANUFACTURER, "unknown", derived_uid("model", str(job["model"]))
        )
        before = jobs.predecessor(job)
        identity = failure_identity(
            inputs=str(job["inputs_sha256"]),
            model=str(job["model"]),
            revision=int(job["revision"]),
            reason=reason.partition(":")[0] if refused else "failed",
            content_datetime=iso(db.clock.wall()),
            predecessor_sr=(
                before["StudyInstanceUID"], before["SeriesInstanceUID"], before["SOPClassUID"], before["SOPInstanceUID"]
            ) if before else None,
        )  # fmt: skip
        failure = Failure(refused, reason, int(job["attempts"]))
        return encode_failure(failure, identity, named, sources, station=station)

    return report


def run_courier(settings: Settings) -> int:
    """Send results to DICOM peers, ask them for commitment, and report what they asked for."""
    from dicomnode.custody.sweep import Sweeper
    from dicomnode.deliver.commitment import Asker
    from dicomnode.deliver.courier import Courier
    from dicomnode.deliver.crew import Crew
    from dicomnode.deliver.notify import Notifier
    from dicomnode.deliver.reporter import Reporter

    shell = Shell(settings, "courier")
    bell = doorbell.Doorbell(settings.node.data_dir, "courier")

    def look_again() -> None:
        doorbell.ring(settings.node.data_dir, "courier")

    crews = [Crew(settings.delivery.parallel, look_again) for _ in range(3)]
    notices = Crew(1)
    notifier = Notifier(settings, shell.db, "courier")
    stages: list[Courier | Asker | Reporter] = [
        Courier(settings, shell.db, "courier", crews[0]),
        Asker(settings, shell.db, "courier", crews[1]),
        Reporter(settings, shell.db, "courier", crews[2]),
    ]
    for stage in (*stages, notifier):
        stage.start()

    def notify() -> bool:
        notifier.run_once()
        return False

    sweeper = Sweeper(shell.db, durable.ObjectStore(settings.node.data_dir))
    sweep_at = time.monotonic() + SWEEP_SECONDS
    shell.ready()
    wait = 0.0
    while not shell.stop.is_set():
        bell.wait(min(wait, doorbell.SLOW_BEAT_SECONDS))
        try:
            wait = min(stage.run_once() for stage in stages)
            notices.take("notify", notify)
            if time.monotonic() >= sweep_at:
                sweep_at = time.monotonic() + SWEEP_SECONDS
                removed = sweeper.run_once()
                if removed:
                    shell.log.warning("files without a row cleared away, see strays/ in data_dir", count=removed)
        except NodeError as error:
            shell.log.error("delivery failed, trying again", error=str(error))
            wait = doorbell.SLOW_BEAT_SECONDS
    deadline = time.monotonic() + COURIER_GRACE_SECONDS
    ended = [crew.close(max(0.0, deadline - time.monotonic())) for crew in (*crews, notices)]
    shell.close()
    if not all(ended):
        os._exit(0)  # a peer is still waited for; what was on its way goes again, under the same UIDs
    return 0


def run_sidecar(settings: Settings) -> int:
    """Admin API, dashboard, metrics, cloud outbox and model pull."""
    import asyncio

    from dicomnode.sidecar import run_sidecar as run

    shell = Shell(settings, "sidecar")

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await run(settings, shell.db, verify=lambda path: verify_model(settings, path), stop=stop)

    asyncio.run(main())
    return 0


def verify_model(settings: Settings, path: Path, *, build: bool = False) -> None:
    """Digests and golden cases of a bundle on the engine that serves, in a child that may die.

    It is this box's, or with ``kserve`` an endpoint's. With ``build`` the best engine is built
    first where it is not yet; an engine that was asked for by name always is. Raises BundleError
    or EngineError; PeerAway when every endpoint is away.
    """
    from dicomnode.infer.choice import limits_of
    from dicomnode.infer.verification import verify_apart

    inference = settings.inference
    verify_apart(
        path,
        inference.engine.value,
        data_dir=settings.node.data_dir,
        limits=limits_of(settings),
        build=build,
        threads=inference.threads,
        memory_mb=inference.verify_memory_mb,
        seconds=inference.verify_seconds,
        endpoints=inference.endpoints,
    )


def run_process(
    process: str, settings: Settings, config: Path | None, *, fd: int = -1, tls_fd: int = -1, slot: int = 0
) -> int:
    """Entry of ``dicomnode run``; returns the exit code."""
    if process == "receiver":
        return run_receiver(settings, config, fd=fd, tls_fd=tls_fd, slot=slot)
    if process == "worker":
        return run_worker(settings)
    if process == "courier":
        return run_courier(settings)
    return run_sidecar(settings)


def serve(settings: Settings, config: Path | None) -> int:
    """Run the whole node in the foreground until SIGTERM or Ctrl-C."""
    shell = Shell(settings, "serve")
    processes = Processes(shell.db)
    announced = False

    def announce() -> None:
        nonlocal announced
        if announced:
            return
        alive = {p["name"]: p for p in processes.listing() if p["alive"]}
        if {"worker", "courier", "sidecar"} <= set(alive) and any(n.startswith("receiver-") for n in alive):
            announced = True
            receiver = next(p for n, p in alive.items() if n.startswith("receiver-"))
            sidecar = alive["sidecar"]["detail"]
            shell.log.info(
                "node is ready",
                ae=settings.node.ae_title,
                address=receiver["detail"].get("host"),
                port=receiver["detail"].get("port"),
                url=f"http://{settings.http.host}:{sidecar.get('port', settings.http.port)}/",
            )

    shell.ready()
    children = [Child(name, command(name, config)) for name in PROCESSES]
    try:
        return Supervisor(children, _restart_event(shell.db)).run(shell.stop, announce)
    finally:
        shell.close()


def _restart_event(db: Database) -> Callable[[str, int], None]:
    def record(name: str, code: int) -> None:
        Events(db).add("error", "process-restarted", name, f"it ended with exit code {code} and was started again")

    return record


def explain_and_exit(error: NodeError) -> int:
    """Print an operator's error; the exit code says whether starting again can help."""
    sys.stderr.write(f"dicomnode: {error}\n")
    if isinstance(error, StorageError):
        return durable.EXIT_STORAGE
    under_systemd = bool(os.environ.get("NOTIFY_SOCKET"))
    # A port or lock that another program holds is free some day: a unit must not stay down for it.
    final = isinstance(error, SettingsError) or (isinstance(error, OperatorError) and not under_systemd)
    return EXIT_CONFIGURATION if final and not error.retryable else 1
