"""One report of the node's state, for ``dicomnode status``, the API and the dashboard.

Everything is read from the index, the disk and the settings; nothing here needs the other
processes to answer. No patient data: UIDs stay out, peers and models have names of ours.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from typing import Any, Literal

from dicomnode import __version__, durable
from dicomnode.admin.cloud_state import cloud_report
from dicomnode.admin.fleet_state import fleet_report, remote_write_report
from dicomnode.admin.kept import kept
from dicomnode.admin.tls_state import tls_report
from dicomnode.clock import iso
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.commitment import Commitments
from dicomnode.index.database import Database, Row
from dicomnode.index.desired import serving_settings
from dicomnode.index.jobs import Jobs
from dicomnode.index.life import Life
from dicomnode.index.model_states import ModelState
from dicomnode.index.notices import Notices
from dicomnode.index.operation import Events, Figures, Models, Processes
from dicomnode.index.outbox import Outbox
from dicomnode.index.procedure import Steps
from dicomnode.index.record_reviews import Reviews
from dicomnode.index.trust import trust_rows
from dicomnode.index.urgency import Alerts
from dicomnode.offline import HELD, may_ask
from dicomnode.settings import Settings

RECENT_EVENTS = 20
MEBIBYTE = 1 << 20
_LIBRARIES = ("pydicom", "pynetdicom", "highdicom", "apsw", "aiohttp", "onnxruntime", "onnxruntime-gpu", "tensorrt")


def status_report(db: Database, settings: Settings) -> dict[str, Any]:
    """The whole state as one JSON-ready value; the keys are part of the API (openapi.yaml)."""
    processes = Processes(db).listing()
    figures, models = Figures(db), Models(db)
    return {
        "node": {
            "ae_title": settings.node.ae_title,
            "version": __version__,
            "python": platform.python_version(),
            "libraries": dict(library_versions()),
            "time": iso(db.clock.wall()),
        },
        "processes": [_process(row) for row in processes],
        "instances": {k: n for k, n in kept(db, "stored", Catalogue(db).counts).items() if k != "patients"},
        "associations_open": figures.open_associations(),
        "jobs": kept(db, "jobs", Jobs(db).counts),
        "oldest_job_seconds": round(figures.oldest_job_seconds(), 1),
        "deliveries": kept(db, "deliveries", Outbox(db, "deliveries").counts),
        "sync_items": kept(db, "sync_items", Outbox(db, "sync_items").counts),
        "reviews": Reviews(db, settings.cloud_plan).counts(),
        "cloud": cloud_report(db, settings, processes),
        "remote_write": remote_write_report(settings, processes),
        "fleet": fleet_report(db, settings, processes),
        "commitments": Commitments(db).counts(),
        "notifications": Notices(db).counts(),
        "alerts": Alerts(db).counts(),
        "procedure_steps": Steps(db).counts(),
        "destinations": [*_destinations(db, "deliveries"), *_destinations(db, "sync_items")],
        "models": {
            "active": models.active(),
            "wanted": sorted(wanted_models(serving_settings(settings, db))),
            "serving": serving_models(processes),
            "failed": failed_models(processes),
            "building": building_engines(processes),
            "engines_rejected": rejected_engines(processes),
            "pulls": models.pulls(),
            "repository": trust_rows(
                db, settings.cloud.repository.metadata_url, "" if may_ask(settings.sync.offline_mode) else HELD
            ),
            "waiting": waiting_versions(db),
            "disk": models_disk(settings),
        },
        "disk": disk(settings),
        "tls": tls_report(settings, processes),
        "scheduled": scheduled(processes),
        "rejections": figures.rejections(RECENT_EVENTS),
        "events": Events(db).listing(RECENT_EVENTS),
    }


def models_disk(settings: Settings) -> dict[str, Any]:
    """What pulled models take on the volume of ``data_dir``; ``coming_mb``: what was fetched and is not in place."""
    data_dir = settings.node.data_dir
    versions = [v for v in (data_dir / "models").glob("*/*") if v.is_dir()]
    return {
        "versions": len(versions),
        "mb": sum(durable.size_of(v) for v in versions) // MEBIBYTE,
        "coming_mb": durable.size_of(data_dir / "staging") // MEBIBYTE,
        "keep_retired": settings.cloud.keep_retired,
    }


def waiting_versions(db: Database) -> list[Row]:
    """Versions on their way up by a policy, and what each waits for."""
    kept, rows = ("name", "version", "state", "waits", "waits_for", "approved_by"), Life(db).versions()
    return [{k: row[k] for k in kept} for row in rows if row["waits"] and row["state"] != ModelState.active]


def _process(row: Row) -> dict[str, Any]:
    kept = ("name", "pid", "state", "alive", "started_time", "detail")
    return {k: row[k] for k in kept} | {"silent_seconds": round(row["silent_seconds"], 1)}


def _destinations(db: Database, table: Literal["deliveries", "sync_items"]) -> list[Row]:
    rows = kept(db, f"{table} by destination", lambda: Figures(db).waiting(table))
    return [{"outbox": table, **row, "oldest_seconds": round(row["oldest_seconds"], 1)} for row in rows]


def disk(settings: Settings) -> dict[str, Any]:
    """Free space on the volume of ``data_dir``; ``above_reserve`` is what intake asks."""
    free = durable.free_bytes(settings.node.data_dir)
    reserve = settings.node.reserve_mb * MEBIBYTE
    return {
        "free_mb": free // MEBIBYTE,
        "reserve_mb": settings.node.reserve_mb,
        "above_reserve": free > reserve,
    }


def wanted_models(settings: Settings) -> frozenset[str]:
    """References of the bundles that the rules use: ``name`` or ``name@version``."""
    return frozenset(model for rule in settings.rules for model in rule.every_model)


def serving_models(processes: list[Row]) -> dict[str, dict[str, str]]:
    """Reference -> ``name``, ``version``, ``engine`` of what live workers verified and serve.

    A worker's heartbeat detail has ``models``: ``{"ready": {reference: {...}}, "failed": {...}}``.
    """
    found: dict[str, dict[str, str]] = {}
    for models in _worker_models(processes):
        for reference, entry in models.get("ready", {}).items():
            found[reference] = {k: str(entry.get(k, "")) for k in ("name", "version", "engine")}
    return dict(sorted(found.items()))


def failed_models(processes: list[Row]) -> dict[str, str]:
    """Reference -> why live workers cannot serve it."""
    return {
        reference: str(why)
        for models in _worker_models(processes)
        for reference, why in models.get("failed", {}).items()
    }


def building_engines(processes: list[Row]) -> dict[str, dict[str, Any]]:
    """``name@version`` -> ``step``, ``share`` 0..1 and ``seconds`` of an engine that is built beside serving."""
    return {
        str(name): dict(build)
        for models in _worker_models(processes)
        for name, build in models.get("building", {}).items()
        if isinstance(build, Mapping)
    }


def rejected_engines(processes: list[Row]) -> dict[str, str]:
    """Engine, or reference and engine, -> why live workers do not use it: for every model, or for that one."""
    found: dict[str, str] = {}
    for row in processes:
        if row["alive"] and str(row["name"]).startswith("worker"):
            found |= {str(k): str(v) for k, v in row["detail"].get("engines_rejected", {}).items()}
    for models in _worker_models(processes):
        for reference, entry in models.get("ready", {}).items():
            for text in entry.get("rejected", ()):
                engine, _, why = str(text).partition(" ")
                precision, _, rest = why.partition(" ")
                found[f"{reference} on {engine} {precision}"] = rest
    return dict(sorted(found.items()))


def _worker_models(processes: list[Row]) -> list[Mapping[str, Any]]:
    rows = [r for r in processes if r["alive"] and str(r["name"]).startswith("worker")]
    return [m for r in rows if isinstance(m := r["detail"].get("models"), Mapping)]


def scheduled(processes: list[Row]) -> dict[str, Any]:
    """Periodic jobs of the sidecar as its heartbeat tells: last run, duration, error."""
    for row in processes:
        if row["name"] == "sidecar":
            tasks = row["detail"].get("scheduled")
            return dict(tasks) if isinstance(tasks, Mapping) else {}
    return {}


@cache
def library_versions() -> tuple[tuple[str, str], ...]:
    """Versions of the libraries that shape results or storage; absent ones are left out."""
    found = []
    for name in _LIBRARIES:
        try:
            found.append((name, metadata.version(name)))
        except metadata.PackageNotFoundError:
            continue
    return tuple(found)
