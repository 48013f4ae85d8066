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
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dicomnode import doorbell, durable
from dicomnode.app_shell import Shell
from dicomnode.app_worker import run_worker
from dicomnode.errors import NodeError, OperatorError, SettingsError, StorageError
from dicomnode.index.database import Database
from dicomnode.index.operation import Events, Processes
from dicomnode.settings import Settings
from dicomnode.supervisor import EXIT_CONFIGURATION, Child, Supervisor, how_it_ended
from dicomnode.tls import Transport

PROCESSES = ("receiver", "worker", "courier", "sidecar")
COURIER_GRACE_SECONDS = 2.0
BIND_SECONDS = 3.0
SWEEP_SECONDS = 15.0
"""One folder of the store is swept this often: all 256 in about an hour."""


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


def run_courier(settings: Settings) -> int:
    """Send results to DICOM peers, ask them for commitment, report what they asked for, and fetch earlier studies."""
    from dicomnode.custody.sweep import Sweeper
    from dicomnode.deliver.commitment import Asker
    from dicomnode.deliver.courier import Courier
    from dicomnode.deliver.crew import Crew
    from dicomnode.deliver.notify import Notifier
    from dicomnode.deliver.priors import PriorFetcher
    from dicomnode.deliver.reporter import Reporter

    shell = Shell(settings, "courier")
    bell = doorbell.Doorbell(settings.node.data_dir, "courier")

    def look_again() -> None:
        doorbell.ring(settings.node.data_dir, "courier")

    crews = [Crew(settings.delivery.parallel, look_again) for _ in range(4)]
    notices = Crew(1)
    notifier = Notifier(settings, shell.db, "courier")

    def wake_worker() -> None:
        doorbell.ring(settings.node.data_dir, "worker")

    stages: list[Courier | Asker | Reporter | PriorFetcher] = [
        Courier(settings, shell.db, "courier", crews[0]),
        Asker(settings, shell.db, "courier", crews[1]),
        Reporter(settings, shell.db, "courier", crews[2]),
        PriorFetcher(settings, shell.db, "courier", crews[3], on_decided=wake_worker),
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
        await run(settings, shell.db, verify=lambda path: verify_pulled(settings, path), stop=stop)

    asyncio.run(main())
    return 0


def verify_pulled(settings: Settings, path: Path) -> None:
    """:func:`verify_model` of a bundle that is going to be activated: none that is for benchmarks."""
    from dicomnode.infer.purpose import check_clinical_at

    check_clinical_at(path)
    verify_model(settings, path)


def verify_model(settings: Settings, path: Path, *, build: bool = False) -> str:
    """Digests and golden cases of a bundle on the engine that serves, in a child that may die; that engine's name.

    It is this box's, or with ``kserve`` an endpoint's. With ``build`` the best engine is built
    first where it is not yet; an engine that was asked for by name always is. Raises BundleError
    or EngineError; PeerAway when every endpoint is away.
    """
    from dicomnode.infer.choice import limits_of
    from dicomnode.infer.verification import verify_apart

    inference = settings.inference
    return verify_apart(
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
        Events(db).add("error", "process-restarted", name, f"it {how_it_ended(code)} and was started again")

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
