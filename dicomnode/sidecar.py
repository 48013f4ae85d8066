"""The sidecar process: admin HTTP server, cloud outbox, model pull, heartbeat. Part of the composition root."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dicomnode import doorbell, lifeline, logs, metrics
from dicomnode.admin.application import make_app
from dicomnode.admin.server import AdminServer
from dicomnode.cloud_settings import LANES
from dicomnode.index.database import Database
from dicomnode.index.operation import BEAT_SECONDS, Processes
from dicomnode.model_desk import ModelDesk
from dicomnode.promptness import giving_way
from dicomnode.settings import Settings
from dicomnode.sidecar_fleet import Fleet
from dicomnode.sync.alerts import AlertSender
from dicomnode.sync.aside import Aside
from dicomnode.sync.departure import Departures
from dicomnode.sync.endpoints import PROBE_SECONDS, Endpoints
from dicomnode.sync.node_record import describe_node
from dicomnode.sync.promote import Promoter
from dicomnode.sync.prune import Pruner
from dicomnode.sync.pull import ModelPuller
from dicomnode.sync.pull_records import RecordPuller
from dicomnode.sync.repository import ModelRepository
from dicomnode.sync.schedule import Schedule
from dicomnode.sync.sender import CloudSender

NAME = "sidecar"
ALERT_SECONDS = 2.0
PULL_SECONDS = 30.0
SPACE_SECONDS = 600.0
REMEMBER_SECONDS = 60.0


async def run_sidecar(settings: Settings, db: Database, *, verify: Callable[[Path], None], stop: asyncio.Event) -> None:
    """Serve and work until ``stop`` is set.

    ``verify(path)`` checks a model bundle and raises BundleError or EngineError; it runs in
    a thread. Raises OperatorError when the HTTP port cannot be had. The chosen port is in
    the heartbeat detail (``{"port": N, "scheduled": {...}}``).
    """
    metrics.prepare(NAME)
    desk = ModelDesk(settings, db, verify)
    server = AdminServer(settings, make_app(db, settings, own_process=NAME, desk=desk))
    port = await server.start()
    try:
        with giving_way():  # nobody waits for what is done here; intake and API do not wait for it, either
            await _work(settings, db, verify, desk, stop, server, port)
    finally:
        await server.stop()


async def _work(
    settings: Settings,
    db: Database,
    verify: Callable[[Path], None],
    desk: ModelDesk,
    stop: asyncio.Event,
    server: AdminServer,
    port: int,
) -> None:
    log, loop = logs.get(), asyncio.get_running_loop()
    processes, schedule = Processes(db), Schedule()
    endpoints, aside = Endpoints(settings, db), Aside()
    departures = Departures(settings, db, aside.leave)
    sender = CloudSender(settings, db, endpoints, departures, NAME)
    alerts, fleet = AlertSender(settings, db), Fleet(settings, db, endpoints, desk, NAME)
    await asyncio.to_thread(sender.start)

    def beat(state: str) -> None:
        detail: dict[str, Any] = {"host": settings.http.host, "port": port, "scheduled": schedule.report()}
        detail |= fleet.report() | ({"cloud": endpoints.report()} if endpoints.all else {})
        processes.beat(NAME, state, detail, metrics.snapshot())

    async def heartbeat() -> None:
        await server.answers()
        await asyncio.to_thread(beat, "ready")
        lifeline.notify("WATCHDOG=1")

    async def remember() -> None:
        await asyncio.to_thread(db.remember_time)

    schedule.every("heartbeat", BEAT_SECONDS, heartbeat)
    schedule.every("remember-time", REMEMBER_SECONDS, remember)
    if endpoints.all:
        await asyncio.to_thread(describe_node, settings, db)
        _send_to_cloud(settings, schedule, endpoints, sender, RecordPuller(settings, db, endpoints, departures))
    if settings.alerts.url:
        schedule.every("alerts", ALERT_SECONDS, alerts.flush)
    if settings.cloud.models:
        await _models_in(settings, db, verify, desk, schedule)
    await fleet.start(schedule)
    bell = doorbell.Doorbell(settings.node.data_dir, NAME)

    loop.add_reader(bell.fileno(), partial(_rung, bell, schedule, endpoints))
    schedule.start()
    await heartbeat()
    lifeline.loaded()
    lifeline.notify("READY=1")
    log.info("ready", address=settings.http.host, port=port)
    try:
        await _until(stop, server)
    finally:
        lifeline.notify("STOPPING=1")
        loop.remove_reader(bell.fileno())
        bell.close()
        await schedule.stop()
        aside.close()
        await asyncio.to_thread(beat, "stopping")


async def _until(stop: asyncio.Event, server: AdminServer) -> None:
    """Raises what ended the admin server, should it: the process is started again."""
    asked: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    ended: asyncio.Future[Any] = asyncio.wrap_future(server.ended)
    try:
        await asyncio.wait([asked, ended], return_when=asyncio.FIRST_COMPLETED)
        if ended.done():
            ended.result()
    finally:
        asked.cancel()


def _rung(bell: doorbell.Doorbell, schedule: Schedule, endpoints: Endpoints) -> None:
    """Bring forward what has come; the other classes of the cloud gather it within their interval."""
    bell.wait(0.0)
    names = ["cloud-urgent", "alerts", "model-policy"]
    if bell.at_once():
        endpoints.try_again()
        names += [f"cloud-{lane}" for lane in LANES]
    for name in schedule.report().keys() & names:
        schedule.soon(name)


def _send_to_cloud(
    settings: Settings, schedule: Schedule, endpoints: Endpoints, sender: CloudSender, records: RecordPuller
) -> None:
    """The classes beside each other: what is urgent does not wait for a large batch."""
    schedule.every("cloud-health", PROBE_SECONDS, endpoints.probe)
    for lane in LANES:
        schedule.every(f"cloud-{lane}", settings.sync.lane(lane).seconds, partial(sender.flush, lane))
    if settings.cloud.records_url:
        schedule.every("cloud-records", settings.sync.pull_seconds, records.run_once)


async def _models_in(
    settings: Settings, db: Database, verify: Callable[[Path], None], desk: ModelDesk, schedule: Schedule
) -> None:
    """Follow the repository, fetch what is wanted, and take it up as its policy says."""
    repository = ModelRepository(settings, db)
    puller = ModelPuller(settings, db, verify, repository.offered)
    pruner = Pruner(settings, db)
    await asyncio.to_thread(puller.start)
    await asyncio.to_thread(pruner.start)

    async def follow() -> None:
        if await repository.run_once():
            puller.look_again()  # also while it is at work
            schedule.soon("model-pull")

    async def pull() -> None:
        await puller.run_once()
        schedule.soon("model-policy")

    if settings.cloud.repository.metadata_url:
        schedule.every("model-repository", settings.cloud.repository.refresh_seconds, follow)
    schedule.every("model-pull", PULL_SECONDS, pull)
    schedule.every("model-space", SPACE_SECONDS, pruner.run_once)
    schedule.every("model-policy", PULL_SECONDS, Promoter(settings, db, desk, repository.vouched).run_once)
