"""What the sidecar does as one of a fleet: metrics, heartbeat, desired state. Part of the composition root."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dicomnode import __version__
from dicomnode.admin.exposition import families
from dicomnode.admin.status import status_report
from dicomnode.app_shell import LogLevel
from dicomnode.errors import BundleError, OperatorError
from dicomnode.findings import Level
from dicomnode.gpu_facts import gpu_facts
from dicomnode.index.database import Database
from dicomnode.index.desired import DesiredStates
from dicomnode.index.operation import BEAT_SECONDS, Processes
from dicomnode.infer.purpose import rule_findings
from dicomnode.infer.serving import bundle_folders, resolve
from dicomnode.model_desk import ModelDesk
from dicomnode.settings import Settings
from dicomnode.sync.desired import DesiredState
from dicomnode.sync.endpoints import Endpoints
from dicomnode.sync.heartbeat import Heartbeat
from dicomnode.sync.metric_push import MetricPush
from dicomnode.sync.repository import ModelRepository
from dicomnode.sync.schedule import Schedule

PUSH_SECONDS = 5.0
"""Between two looks into the spool."""


class Fleet:
    """``own_process``: name of the process that runs this, whose counters are shown live."""

    def __init__(
        self, settings: Settings, db: Database, endpoints: Endpoints, desk: ModelDesk, own_process: str
    ) -> None:
        self._settings, self._db = settings, db
        self._level = LogLevel(settings, db)
        collect: Callable[[], Any] = lambda: families(db, settings, own_process)  # noqa: E731
        self._push = MetricPush(settings, db, collect, endpoints.line) if settings.metrics.remote_write_url else None
        named, fleet = bool(settings.cloud.records_url), settings.fleet
        beats, looks = named and fleet.heartbeat_seconds > 0, named and fleet.desired_seconds > 0
        vouched = ModelRepository(settings, db).vouched
        self._heartbeat = Heartbeat(settings, db, endpoints, lambda: describe(settings, db)) if beats else None
        self._desired = DesiredState(settings, db, endpoints, desk, judge, vouched) if looks else None

    async def start(self, schedule: Schedule) -> None:
        schedule.every("log-level", BEAT_SECONDS, self._follow)
        if self._push is not None:
            await asyncio.to_thread(self._push.start)
            schedule.every("metrics-collect", self._settings.metrics.interval_seconds, self._push.collect)
            schedule.every("metrics-push", PUSH_SECONDS, self._push.push)
        if self._heartbeat is not None:
            schedule.every("fleet-heartbeat", self._settings.fleet.heartbeat_seconds, self._heartbeat.beat)
        if self._desired is not None:
            schedule.every("fleet-desired", self._settings.fleet.desired_seconds, self._desired.run_once)

    async def _follow(self) -> None:
        await asyncio.to_thread(self._level.follow)

    def report(self) -> dict[str, Any]:
        """For the heartbeat row."""
        found: dict[str, Any] = {}
        if self._push is not None:
            found["remote_write"] = self._push.report()
        if self._heartbeat is not None:
            found["fleet"] = self._heartbeat.report()
        return found


def describe(settings: Settings, db: Database) -> dict[str, Any]:
    """What the cloud is told: versions, digests, queues, disk, GPU; counts and states only."""
    report = status_report(db, settings)
    serving = DesiredStates(db).serving()
    return {
        "version": __version__,
        "python": report["node"]["python"],
        "libraries": report["node"]["libraries"],
        "processes": {p["name"]: bool(p["alive"]) for p in report["processes"]},
        "models": serving_digests(Processes(db).listing()),
        "active": report["models"]["active"],
        "queues": {key: report[key] for key in ("jobs", "deliveries", "sync_items", "notifications", "alerts")},
        "oldest_job_seconds": report["oldest_job_seconds"],
        "instances": report["instances"],
        "disk": report["disk"],
        "gpu": gpu_facts(),
        "tasks_failed": {name: task["error"] for name, task in report["scheduled"].items() if task.get("error")},
        "desired_generation": serving["generation"] if serving else 0,
    }


def serving_digests(processes: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Name, version, engine and digest of what live workers have verified and serve."""
    found = {}
    for row in processes:
        if row["alive"] and str(row["name"]).startswith("worker"):
            ready = row["detail"].get("models", {}).get("ready", {})
            for one in ready.values():
                kept = {k: str(one.get(k, "")) for k in ("name", "version", "engine", "digest")}
                found[kept["name"], kept["version"]] = kept
    return [found[key] for key in sorted(found)]


def judge(settings: Settings) -> None:
    """Rules may name only bundles that are here and not for benchmarks. Raises OperatorError."""
    folders = bundle_folders(settings.inference.models_dir, settings.node.data_dir)
    for rule in settings.rules:
        for reference in rule.every_model:
            try:
                resolve(folders, reference, {})
            except BundleError as error:
                cause = f"rules '{rule.name}': {reference}: {error.cause}"
                raise OperatorError("take the desired state", cause, "Offer the model first") from None
    for finding in rule_findings(settings):
        if finding.level is Level.fault:
            raise OperatorError("take the desired state", finding.text, finding.hint)
