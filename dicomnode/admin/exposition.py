"""/metrics: gauges straight from the index rows, and the counters of all processes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric

from dicomnode import __version__, durable, metrics, metrics_push, metrics_told
from dicomnode.admin import metrics_page
from dicomnode.admin.cloud_state import lanes
from dicomnode.admin.fleet_state import desired_families
from dicomnode.admin.kept import kept
from dicomnode.admin.model_figures import VersionFigures, version_figures
from dicomnode.admin.model_figures import families as model_families
from dicomnode.admin.status import MEBIBYTE, library_versions, serving_models, waiting_versions
from dicomnode.admin.tls_state import own_certificate
from dicomnode.conflicts import KIND_OF
from dicomnode.errors import OperatorError
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.commitment import Commitments
from dicomnode.index.database import Database, Row
from dicomnode.index.desired import DesiredStates
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import Figures, Models, Processes
from dicomnode.index.outbox import Outbox
from dicomnode.index.procedure import Steps
from dicomnode.index.record_reviews import TAKES, Reviews, serving
from dicomnode.index.trust import trust_rows
from dicomnode.record_shapes import WARNINGS
from dicomnode.settings import Settings

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SNAPSHOT_KEPT_SECONDS = 300.0
"""Counters of a process that is silent longer are not shown any more (``process_up`` is)."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What /metrics shows besides counters, read in one go."""

    processes: list[Row] = field(default_factory=list)
    jobs: Mapping[str, int] = field(default_factory=dict)
    oldest_job_seconds: float = 0.0
    deliveries: list[Row] = field(default_factory=list)
    sync: Mapping[str, int] = field(default_factory=dict)
    sync_rows: list[Row] = field(default_factory=list)
    lanes: Sequence[Row] = ()
    spool_bytes: int = 0
    notifications: list[Row] = field(default_factory=list)
    commitments: list[Row] = field(default_factory=list)
    procedure_steps: Mapping[str, int] = field(default_factory=dict)
    stored: Mapping[str, int] = field(default_factory=dict)
    open_associations: int = 0
    active: Mapping[str, str] = field(default_factory=dict)
    pulls: list[Row] = field(default_factory=list)
    repository: Mapping[str, Any] = field(default_factory=dict)
    waiting: list[Row] = field(default_factory=list)
    events: Mapping[str, int] = field(default_factory=dict)
    free_bytes: int = 0
    reserve_bytes: int = 0
    certificate_ends_at: float | None = None
    versions: list[VersionFigures] = field(default_factory=list)
    reviews: Mapping[str, int] = field(default_factory=dict)
    oldest_review_seconds: float = 0.0
    conflicts: Mapping[str, int] = field(default_factory=dict)
    limits: Mapping[str, float] = field(default_factory=dict)


def read_facts(db: Database, settings: Settings) -> Facts:
    """Blocking: run it off the event loop."""
    figures, models, reviews = Figures(db), Models(db), Reviews(db, settings.cloud_plan)
    return Facts(
        processes=Processes(db).listing(),
        jobs=kept(db, "jobs", Jobs(db).counts),
        oldest_job_seconds=figures.oldest_job_seconds(),
        deliveries=kept(db, "deliveries by destination", lambda: figures.waiting("deliveries")),
        sync=kept(db, "sync_items", Outbox(db, "sync_items").counts),
        sync_rows=kept(db, "sync_items by destination", lambda: figures.waiting("sync_items")),
        lanes=lanes(db),
        spool_bytes=settings.sync.spool_bytes,
        notifications=figures.waiting("notifications"),
        commitments=Commitments(db).waiting(),
        procedure_steps=Steps(db).counts(),
        stored=kept(db, "stored", Catalogue(db).counts),
        open_associations=figures.open_associations(),
        active=models.active(),
        pulls=models.pulls(),
        repository=trust_rows(db, settings.cloud.repository.metadata_url),
        waiting=waiting_versions(db),
        events=figures.recent_events(),
        free_bytes=durable.free_bytes(settings.node.data_dir),
        reserve_bytes=settings.node.reserve_mb * MEBIBYTE,
        certificate_ends_at=_certificate_ends_at(settings),
        versions=kept(db, "versions", lambda: version_figures(db, settings.rollout)),
        reviews=reviews.counts(),
        oldest_review_seconds=reviews.oldest_seconds(),
        conflicts=reviews.decided(),
        limits={k: v for k, v in serving(db, "limits", WARNINGS).items() if v is not None},
    )


def _certificate_ends_at(settings: Settings) -> float | None:
    """None without a certificate; an unreadable one is as good as expired, so that its alert is raised."""
    try:
        own = own_certificate(settings.tls)
    except OperatorError:
        return 0.0
    return own.not_after.timestamp() if own else None


def exposition(db: Database, settings: Settings, own_process: str = "sidecar") -> bytes:
    """The page of /metrics. Blocking."""
    facts = read_facts(db, settings)
    told = [metrics_page.told(*one) for one in sorted(_snapshots(facts, own_process).items())]
    now = [*_of_the_index(db, facts), *metrics.live(own_process, metrics_push.REGISTRY)]
    return metrics_page.page([metrics_page.blocks(now), *told])


def families(db: Database, settings: Settings, own_process: str = "sidecar") -> list[Metric]:
    """All of it. ``own_process`` is shown live, the others from their heartbeats. Blocking."""
    facts = read_facts(db, settings)
    snapshots = _snapshots(facts, own_process) | {own_process: metrics.snapshot()}
    return [*_of_the_index(db, facts), *metrics_told.families(snapshots, metrics_push.REGISTRY)]


def _snapshots(facts: Facts, own_process: str) -> dict[str, str]:
    """By process, without our own and without those that have been silent for long."""
    return {
        str(row["name"]): str(row["metrics"] or "")
        for row in facts.processes
        if row["silent_seconds"] < SNAPSHOT_KEPT_SECONDS and row["name"] != own_process
    }


def _of_the_index(db: Database, facts: Facts) -> list[Metric]:
    states = DesiredStates(db)
    return [*gauges(facts), *desired_families(states.serving(), states.newest())]


def _gauge(name: str, text: str, labels: tuple[str, ...], values: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    family = GaugeMetricFamily(f"dicomnode_{name}", text, labels=labels)
    for label_values, value in values:
        family.add_metric(label_values, float(value))
    return family


def _by_state(counts: Mapping[str, int]) -> list[tuple[tuple[str, ...], float]]:
    return [((state,), count) for state, count in counts.items()]


def gauges(facts: Facts) -> list[Metric]:
    """The families of the index; pure."""
    build = InfoMetricFamily("dicomnode_build", "Version of the node and of its libraries")
    build.add_metric((), {"version": __version__} | {k.replace("-", "_"): v for k, v in library_versions()})
    unfinished = [r for r in facts.deliveries if r["state"] in {"pending", "sending"}]
    oldest: dict[str, float] = {r["destination"]: 0.0 for r in facts.deliveries}
    for row in unfinished:
        oldest[row["destination"]] = max(oldest[row["destination"]], row["oldest_seconds"])
    oldest_sync = max(
        (r["oldest_seconds"] for r in facts.sync_rows if r["state"] in {"pending", "sending"}), default=0.0
    )
    oldest_commitment: dict[tuple[str, ...], float] = {(r["role"], r["peer"]): 0.0 for r in facts.commitments}
    for row in facts.commitments:
        if row["state"] in {"pending", "reporting", "asking", "waiting"}:
            key = (row["role"], row["peer"])
            oldest_commitment[key] = max(oldest_commitment[key], row["oldest_seconds"])
    serving = sorted({(m["name"], m["version"]) for m in serving_models(facts.processes).values()})
    return [
        build,
        _gauge(
            "process_up",
            "1 when a process has a fresh heartbeat and says that it is ready",
            ("process",),
            [((r["name"],), 1.0 if r["alive"] else 0.0) for r in facts.processes],
        ),
        _gauge(
            "process_silent_seconds",
            "Time since a process's last heartbeat, seconds",
            ("process",),
            [((r["name"],), r["silent_seconds"]) for r in facts.processes],
        ),
        _gauge("queue_jobs", "Jobs in the index by state", ("state",), _by_state(facts.jobs)),
        _gauge(
            "queue_oldest_job_seconds",
            "Age of the oldest job that is not finished, seconds",
            (),
            [((), facts.oldest_job_seconds)],
        ),
        _gauge(
            "queue_deliveries",
            "Deliveries in the index by destination and state",
            ("destination", "state"),
            [((r["destination"], r["state"]), r["count"]) for r in facts.deliveries],
        ),
        _gauge(
            "queue_oldest_delivery_seconds",
            "Age of the oldest delivery that still waits, seconds",
            ("destination",),
            [((destination,), seconds) for destination, seconds in oldest.items()],
        ),
        _gauge(
            "queue_commitments",
            "Storage commitment transactions; role scp: asked of this node by the peer, scu: asked of the peer",
            ("role", "peer", "state"),
            [((r["role"], r["peer"], r["state"]), r["count"]) for r in facts.commitments],
        ),
        _gauge(
            "queue_oldest_commitment_seconds",
            "Age of the oldest storage commitment transaction without a report, seconds",
            ("role", "peer"),
            oldest_commitment.items(),
        ),
        _gauge(
            "queue_notifications",
            "Instance Availability Notifications in the index by destination and state",
            ("destination", "state"),
            [((r["destination"], r["state"]), r["count"]) for r in facts.notifications],
        ),
        _gauge("procedure_steps", "Performed procedure steps by state", ("state",), _by_state(facts.procedure_steps)),
        _gauge("queue_sync_items", "Items of the cloud outbox by state", ("state",), _by_state(facts.sync)),
        _gauge(
            "queue_oldest_sync_seconds", "Age of the oldest cloud item that waits, seconds", (), [((), oldest_sync)]
        ),
        _gauge(
            "sync_waiting_items",
            "Items that wait for the cloud, by class",
            ("class",),
            [((r["class"],), r["count"]) for r in facts.lanes],
        ),
        _gauge(
            "sync_waiting_bytes",
            "Bytes of results and records that wait for the cloud, by class",
            ("class",),
            [((r["class"],), r["bytes"]) for r in facts.lanes],
        ),
        _gauge(
            "sync_oldest_seconds",
            "Age of the oldest item that waits for the cloud, by class, seconds",
            ("class",),
            [((r["class"],), r["oldest_seconds"]) for r in facts.lanes],
        ),
        _gauge(
            "sync_spool_limit_bytes",
            "Bytes that may wait before jobs of priority batch do; 0: no cap",
            (),
            [((), facts.spool_bytes)],
        ),
        *(
            _gauge(f"stored_{level}", f"Number of {level} in the index", (), [((), facts.stored.get(level, 0))])
            for level in ("studies", "series", "instances")
        ),
        _gauge("index_associations_open", "Associations open by the index", (), [((), facts.open_associations)]),
        _gauge("disk_free_bytes", "Free space on the volume of data_dir, bytes", (), [((), facts.free_bytes)]),
        _gauge(
            "disk_reserve_bytes", "Space kept free; below it C-STORE answers 0xA700", (), [((), facts.reserve_bytes)]
        ),
        _gauge(
            "tls_certificate_expiry_timestamp_seconds",
            "End of this node's own certificate, Unix time; 0 when its file cannot be read",
            (),
            [] if facts.certificate_ends_at is None else [((), facts.certificate_ends_at)],
        ),
        _gauge(
            "model_active_info",
            "1 for the version of a model that was activated",
            ("model", "version"),
            [((name, version), 1.0) for name, version in facts.active.items()],
        ),
        _gauge(
            "model_serving_info",
            "1 for a verified version that a live worker serves",
            ("model", "version"),
            [((name, version), 1.0) for name, version in serving],
        ),
        _gauge(
            "model_pull_info",
            "1 for the state of a configured model pull",
            ("model", "version", "state"),
            [((r["name"], r["version"], r["state"]), 1.0) for r in facts.pulls],
        ),
        *_repository(facts),
        _gauge("recent_events", "Events of the last hour by severity", ("severity",), _by_state(facts.events)),
        *model_families(facts.versions),
    ]


def _repository(facts: Facts) -> list[Metric]:
    """The signed repository of models, and versions on their way up."""
    ends = facts.repository.get("expires_time")
    return [
        _gauge(
            "model_repository_info",
            "1 for the standing of the signed repository of models: current, away, refused, expired or unknown",
            ("state",),
            [((str(facts.repository["state"]),), 1.0)] if facts.repository else [],
        ),
        _gauge(
            "model_repository_expiry_timestamp_seconds",
            "End of what is known of the repository, Unix time; nothing new is taken after it",
            (),
            [((), datetime.fromisoformat(ends).timestamp())] if ends else [],
        ),
        _gauge(
            "model_waiting_info",
            "1 for what a pulled version waits for before it goes on by its policy",
            ("model", "version", "state", "reason"),
            [((r["name"], r["version"], r["state"], r["waits"]), 1.0) for r in facts.waiting],
        ),
        *_record_gauges(facts),
    ]


def _record_gauges(facts: Facts) -> list[Metric]:
    """Records that both ends may change."""
    return [
        _gauge(
            "record_reviews_open",
            "Records changed at both ends that wait for a person's decision, by type",
            ("type",),
            [((kind,), facts.reviews.get(kind, 0)) for kind in sorted({*KIND_OF, *facts.reviews})],
        ),
        _gauge(
            "record_review_oldest_seconds",
            "Age of the oldest record that waits for a decision, seconds",
            (),
            [((), facts.oldest_review_seconds)],
        ),
        _gauge(
            "record_conflicts",
            "Conflicts of records that were decided, by the side that was taken",
            ("taken",),
            [((side,), facts.conflicts.get(side, 0)) for side in TAKES],
        ),
        _gauge(
            "warning_limit",
            "Limits that people set (record limits/warnings), in the unit of their name",
            ("limit",),
            [((name,), value) for name, value in sorted(facts.limits.items())],
        ),
    ]


def metric_names() -> frozenset[str]:
    """Every sample name that /metrics can show; dashboards and alert rules are tested against it."""
    names: set[str] = set()
    for family in [*gauges(Facts()), *desired_families(None, None), *metrics_push.REGISTRY.collect()]:
        suffixes: dict[str, tuple[str, ...]] = {
            "counter": ("_total",),
            "histogram": ("_bucket", "_count", "_sum"),
            "info": ("_info",),
        }
        names |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    return frozenset(names)
