"""The one metrics registry of a process, and how the sidecar shows those of the others.

prometheus-client's multi-process mode breaks custom collectors, so it is not used. Each
process counts here, puts :func:`snapshot` in its heartbeat row, and the sidecar exposes
the snapshots of all processes with a ``process`` label (:func:`families`). A snapshot
carries samples only; name, kind and help come from the definitions below, so a damaged or
foreign snapshot cannot add series. Labels take values from small fixed sets, never from
a peer's data.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from time import perf_counter
from typing import Any, Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric

REGISTRY = CollectorRegistry(auto_describe=False)
"""Everything that this process counts."""

Stage = Literal[
    "receive",
    "select",
    "wait",
    "read",
    "inference",
    "postprocess",
    "encode",
    "commit",
    "deliver",
    "sync",
    "total",
]
AssociationOutcome = Literal["accepted", "rejected", "released", "aborted", "refused", "lost"]
JobOutcome = Literal["done", "refused", "retried", "failed", "lost"]
EndpointOutcome = Literal["ok", "away", "error"]
SendOutcome = Literal["stored", "retried", "rejected"]
PriorOutcome = Literal["fetched", "absent", "retried"]
ReportOutcome = Literal["done", "retried", "refused"]
PullOutcome = Literal["activated", "placed", "retried", "rejected"]
InferenceStage = Literal["h2d", "compute", "d2h", "queue"]
ScheduledOutcome = Literal["ok", "failed", "missed"]

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_SLOW = (0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0, 3600.0)

STORE_TOTAL = Counter(
    "dicomnode_store",
    "C-STORE requests answered, by DIMSE status (0x0000 is success, PS3.4 B.2.3)",
    ["status"],
    registry=REGISTRY,
)
STORE_SECONDS = Histogram(
    "dicomnode_store_seconds",
    "From the last P-DATA of an object to its C-STORE response, seconds",
    buckets=_FAST,
    registry=REGISTRY,
)
STORE_BYTES = Counter(
    "dicomnode_store_bytes", "Data-set bytes of objects that were acknowledged with success", registry=REGISTRY
)
QUERY_TOTAL = Counter(
    "dicomnode_query_retrieve",
    "C-FIND, C-MOVE and C-GET requests answered, by DIMSE status of the final response (PS3.4 C.4)",
    ["service", "status"],
    registry=REGISTRY,
)
QUERY_SECONDS = Histogram(
    "dicomnode_query_retrieve_seconds",
    "From a C-FIND, C-MOVE or C-GET request to its final response, seconds",
    ["service"],
    buckets=_SLOW,
    registry=REGISTRY,
)
FIND_ANSWERS = Counter("dicomnode_find_answers", "Matches that were sent in C-FIND responses", registry=REGISTRY)
ASSOCIATIONS_TOTAL = Counter(
    "dicomnode_associations",
    "DICOM associations: accepted, rejected (A-ASSOCIATE-RJ), released, aborted, lost, or refused before one began",
    ["outcome"],
    registry=REGISTRY,
)
ASSOCIATIONS_OPEN = Gauge("dicomnode_associations_open", "DICOM associations open now", registry=REGISTRY)
STAGE_SECONDS = Histogram(
    "dicomnode_stage_seconds",
    "Time in a stage of the pipeline, seconds; total is from the last image to the committed result",
    ["stage"],
    buckets=_SLOW,
    registry=REGISTRY,
)
JOBS_TOTAL = Counter("dicomnode_jobs", "Ends of attempts at a job", ["outcome"], registry=REGISTRY)
ENDPOINT_REQUESTS_TOTAL = Counter(
    "dicomnode_inference_endpoint_requests",
    "Inference requests to a KServe endpoint: answered, away, or answered with what could not be used",
    ["endpoint", "outcome"],
    registry=REGISTRY,
)
ENDPOINT_SECONDS = Histogram(
    "dicomnode_inference_endpoint_seconds",
    "Time of an inference request to a KServe endpoint, seconds",
    ["endpoint"],
    buckets=_SLOW,
    registry=REGISTRY,
)
PLACEMENTS_TOTAL = Counter(
    "dicomnode_placements",
    "Jobs by the engine or endpoint that was chosen; none: every one was away or too busy",
    ["place"],
    registry=REGISTRY,
)
DELIVERIES_TOTAL = Counter(
    "dicomnode_deliveries", "Attempts to send a result to a DICOM peer", ["outcome"], registry=REGISTRY
)
NOTIFICATIONS_TOTAL = Counter(
    "dicomnode_notifications", "Attempts to send an Instance Availability Notification", ["outcome"], registry=REGISTRY
)
PRIORS_TOTAL = Counter(
    "dicomnode_priors", "Requests to a DICOM peer for an earlier study of a patient", ["outcome"], registry=REGISTRY
)
PROCEDURE_STEP_TOTAL = Counter(
    "dicomnode_procedure_step_requests",
    "N-CREATE, N-SET and N-GET requests of MPPS answered, by operation and DIMSE status",
    ["operation", "status"],
    registry=REGISTRY,
)
COMMITMENT_REQUESTS_TOTAL = Counter(
    "dicomnode_commitment_requests",
    "N-ACTION requests for storage commitment answered, by DIMSE status",
    ["status"],
    registry=REGISTRY,
)
COMMITMENT_REPORTS_TOTAL = Counter(
    "dicomnode_commitment_reports",
    "Attempts at reports of storage commitment, sent to peers or received from them",
    ["direction", "outcome"],
    registry=REGISTRY,
)
COMMITMENT_INSTANCES_TOTAL = Counter(
    "dicomnode_commitment_instances",
    "Instances in reports of storage commitment; role scp: what this node committed to, scu: what peers did",
    ["role", "outcome"],
    registry=REGISTRY,
)
SYNC_TOTAL = Counter(
    "dicomnode_sync", "Attempts to send a result to the cloud (STOW-RS)", ["outcome"], registry=REGISTRY
)
SYNC_BYTES = Counter("dicomnode_sync_bytes", "Bytes of objects that the cloud stored", registry=REGISTRY)
MODEL_PULLS_TOTAL = Counter("dicomnode_model_pulls", "Attempts to pull a model bundle", ["outcome"], registry=REGISTRY)
MODEL_REPOSITORY_FAILURES = Counter(
    "dicomnode_model_repository_failures",
    "Looks at the signed repository of models that failed: away, refused or expired",
    ["state"],
    registry=REGISTRY,
)
SCHEDULED_TOTAL = Counter(
    "dicomnode_scheduled_runs", "Runs of the sidecar's periodic jobs", ["task", "outcome"], registry=REGISTRY
)
SCHEDULED_SECONDS = Gauge(
    "dicomnode_scheduled_last_seconds", "Duration of a periodic job's last run, seconds", ["task"], registry=REGISTRY
)
SCHEDULED_TIME = Gauge(
    "dicomnode_scheduled_last_success_timestamp_seconds",
    "When a periodic job last ran without an error, Unix time",
    ["task"],
    registry=REGISTRY,
)
TLS_PEER_EXPIRY = "dicomnode_tls_peer_certificate_expiry_timestamp_seconds"
TLS_PEER_SECONDS = Gauge(
    TLS_PEER_EXPIRY,
    "End of the certificate that a configured peer last showed to a process of this kind, Unix time",
    ["peer"],
    registry=REGISTRY,
)
_peers_lock = threading.Lock()

INFERENCE_SECONDS = Histogram(
    "dicomnode_inference_seconds",
    "One batch on an engine, seconds, by stage: h2d and d2h are copies to and from the GPU",
    ["engine", "precision", "stage"],
    buckets=_FAST,
    registry=REGISTRY,
)
INFERENCE_BATCH = Histogram(
    "dicomnode_inference_batch_size",
    "Rows of the batches given to an engine",
    ["engine"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    registry=REGISTRY,
)
INFERENCE_STUDIES = Histogram(
    "dicomnode_inference_batch_studies",
    "Series that one pass through a network served: above 1 several studies shared its batches",
    ["engine"],
    buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512),
    registry=REGISTRY,
)
INFERENCE_ENGINE = Gauge(
    "dicomnode_inference_engine_info",
    "1 for the engine, with version and precision, that serves a model",
    ["model", "version", "engine", "precision"],
    registry=REGISTRY,
)
INFERENCE_FALLBACKS = Counter(
    "dicomnode_inference_fallbacks",
    "Times that an engine could not serve, by reason: at start, for a model, or for one job",
    ["engine", "code"],
    registry=REGISTRY,
)
GOLDEN_ERROR = Gauge(
    "dicomnode_inference_golden_error",
    "Worst golden case of a model on an engine: disagreement is a share of voxels, dice is 1 - Dice",
    ["model", "engine", "precision", "kind"],
    registry=REGISTRY,
)
PLAN_CACHE = Counter(
    "dicomnode_inference_plan_cache",
    "Look-ups of a built TensorRT engine: hit, miss, rejected (damaged, foreign, or refused by TensorRT)",
    ["outcome"],
    registry=REGISTRY,
)
BUILD_SECONDS = Histogram(
    "dicomnode_inference_build_seconds",
    "Building an engine beside serving, seconds",
    ["engine", "outcome"],
    buckets=_SLOW,
    registry=REGISTRY,
)
GPU_MEMORY = Gauge(
    "dicomnode_gpu_memory_bytes", "Memory of the GPU, bytes: used by all programs, total", ["kind"], registry=REGISTRY
)

_FIRST_VALUES: Mapping[str, Iterable[tuple[Counter, Iterable[str | tuple[str, ...]]]]] = {
    "receiver": (
        (STORE_TOTAL, ("0x0000",)),
        (QUERY_TOTAL, (("find", "0x0000"), ("move", "0x0000"), ("get", "0x0000"))),
        (ASSOCIATIONS_TOTAL, ("accepted", "rejected", "released", "aborted", "refused", "lost")),
    ),
    "worker": (
        (JOBS_TOTAL, ("done", "refused", "retried", "failed", "lost")),
        (PLAN_CACHE, ("hit", "miss", "rejected")),
    ),
    "courier": (
        (DELIVERIES_TOTAL, ("stored", "retried", "rejected")),
        (NOTIFICATIONS_TOTAL, ("stored", "retried", "rejected")),
    ),
    "sidecar": (
        (SYNC_TOTAL, ("stored", "retried", "rejected")),
        (MODEL_PULLS_TOTAL, ("activated", "placed", "retried", "rejected")),
    ),
}


def prepare(process: str) -> None:
    """Start the counters of a process at zero, so that its first event shows as an increase.

    ``process`` is the heartbeat name; what follows a hyphen (``receiver-2``) does not matter.
    """
    for counter, values in _FIRST_VALUES.get(process.partition("-")[0], ()):
        for value in values:
            counter.labels(*((value,) if isinstance(value, str) else value))


@cache
def _stored_well() -> Any:
    return STORE_TOTAL.labels("0x0000")


@cache
def _inference(engine: str, precision: str, stage: InferenceStage) -> Any:
    return INFERENCE_SECONDS.labels(engine, precision, stage)


@cache
def _stage(stage: Stage) -> Any:
    return STAGE_SECONDS.labels(stage)


def stored(status: int, seconds: float, size: int) -> None:
    """Count one answered C-STORE; ``size`` is the data set in bytes."""
    if status == 0:
        _stored_well().inc()
        STORE_BYTES.inc(size)
    else:
        STORE_TOTAL.labels(f"0x{status:04X}").inc()
    STORE_SECONDS.observe(seconds)


def queried(service: str, status: int, seconds: float, answers: int = 0) -> None:
    """Count one answered query or retrieve; ``service`` is find, move or get."""
    QUERY_TOTAL.labels(service, f"0x{status:04X}").inc()
    QUERY_SECONDS.labels(service).observe(seconds)
    if answers:
        FIND_ANSWERS.inc(answers)


def association(outcome: AssociationOutcome) -> None:
    """Count one association and keep the number of open ones."""
    ASSOCIATIONS_TOTAL.labels(outcome).inc()
    if outcome == "accepted":
        ASSOCIATIONS_OPEN.inc()
    elif outcome in {"released", "aborted", "lost"}:
        ASSOCIATIONS_OPEN.dec()


def observe(stage: Stage, seconds: float) -> None:
    """Record how long a stage took."""
    _stage(stage).observe(max(0.0, seconds))


@contextmanager
def timed(stage: Stage) -> Iterator[None]:
    """Record how long the block took, also when it raises."""
    begin = perf_counter()
    try:
        yield
    finally:
        observe(stage, perf_counter() - begin)


def job(outcome: JobOutcome) -> None:
    JOBS_TOTAL.labels(outcome).inc()


def endpoint(name: str, outcome: EndpointOutcome, seconds: float) -> None:
    """Count one inference request; ``name`` is an endpoint of the configuration."""
    ENDPOINT_REQUESTS_TOTAL.labels(name, outcome).inc()
    ENDPOINT_SECONDS.labels(name).observe(seconds)


def placed(place: str) -> None:
    """Count one decision; ``place`` is ``local``, an endpoint of the configuration, or ``none``."""
    PLACEMENTS_TOTAL.labels(place).inc()


def delivery(outcome: SendOutcome) -> None:
    DELIVERIES_TOTAL.labels(outcome).inc()


def prior(outcome: PriorOutcome) -> None:
    PRIORS_TOTAL.labels(outcome).inc()


def notification(outcome: SendOutcome) -> None:
    NOTIFICATIONS_TOTAL.labels(outcome).inc()


def procedure_step(operation: str, status: int) -> None:
    """Count one answered request; ``operation`` is one of ours, not the peer's text."""
    PROCEDURE_STEP_TOTAL.labels(operation, f"0x{status:04X}").inc()


def commitment_request(status: int) -> None:
    COMMITMENT_REQUESTS_TOTAL.labels(f"0x{status:04X}").inc()


def commitment_report(direction: Literal["sent", "received"], outcome: ReportOutcome) -> None:
    COMMITMENT_REPORTS_TOTAL.labels(direction, outcome).inc()


def committed(role: Literal["scp", "scu"], count: int, failed: int) -> None:
    """Count the instances of one report that arrived."""
    COMMITMENT_INSTANCES_TOTAL.labels(role, "committed").inc(count)
    COMMITMENT_INSTANCES_TOTAL.labels(role, "failed").inc(failed)


def peer_certificate(peer: str, ends_at: float) -> None:
    """``peer`` is a name of the configuration, ``ends_at`` Unix time."""
    with _peers_lock:
        TLS_PEER_SECONDS.labels(peer).set(ends_at)


def peer_certificates() -> dict[str, float]:
    """What :func:`peer_certificate` set, by peer."""
    return {s.labels["peer"]: s.value for family in TLS_PEER_SECONDS.collect() for s in family.samples}


def peer_certificates_known(known: Mapping[str, float], before: Mapping[str, float]) -> None:
    """Show what other processes saw, too; what came here since ``before`` was read is newer and stays."""
    with _peers_lock:
        shown = peer_certificates()
        for peer in {*known, *before}:
            if shown.get(peer) != before.get(peer):
                continue
            if peer in known:
                TLS_PEER_SECONDS.labels(peer).set(known[peer])
            else:
                TLS_PEER_SECONDS.remove(peer)


def inference(engine: str, precision: str, stage: InferenceStage, seconds: float) -> None:
    """Record one stage of one batch."""
    _inference(engine, precision, stage).observe(max(0.0, seconds))


def inference_batch(engine: str, rows: int) -> None:
    INFERENCE_BATCH.labels(engine).observe(rows)


def batch_studies(engine: str, studies: int) -> None:
    """Record how many series shared the batches of one pass."""
    INFERENCE_STUDIES.labels(engine).observe(studies)


def serves(model: str, version: str, engine: str, precision: str, *, on: bool = True) -> None:
    """Note which engine serves a model, or with ``on`` false that it does no more."""
    if on:
        INFERENCE_ENGINE.labels(model, version, engine, precision).set(1)
    else:
        INFERENCE_ENGINE.remove(model, version, engine, precision)


def fallback(engine: str, code: str) -> None:
    INFERENCE_FALLBACKS.labels(engine, code).inc()


def golden(model: str, engine: str, precision: str, disagreement: float, dice: float) -> None:
    """Record the worst golden case: share of voxels that differ, and Dice."""
    GOLDEN_ERROR.labels(model, engine, precision, "disagreement").set(disagreement)
    GOLDEN_ERROR.labels(model, engine, precision, "dice").set(1.0 - dice)


def plan_cache(outcome: Literal["hit", "miss", "rejected"]) -> None:
    PLAN_CACHE.labels(outcome).inc()


def engine_build(engine: str, outcome: Literal["built", "failed"], seconds: float) -> None:
    BUILD_SECONDS.labels(engine, outcome).observe(seconds)


def gpu_memory(free: int, total: int) -> None:
    """Bytes, as the driver tells them."""
    GPU_MEMORY.labels("used").set(total - free)
    GPU_MEMORY.labels("total").set(total)


def sync(outcome: SendOutcome) -> None:
    SYNC_TOTAL.labels(outcome).inc()


def model_pull(outcome: PullOutcome) -> None:
    MODEL_PULLS_TOTAL.labels(outcome).inc()


def snapshot(registry: CollectorRegistry = REGISTRY) -> str:
    """This process's samples as compact JSON, for its heartbeat row.

    ``{family: [[sample name, {label: value}, number], ...]}``; creation times are left out.
    """
    found: dict[str, list[list[Any]]] = {}
    for family in registry.collect():
        samples = [[s.name, s.labels, s.value] for s in family.samples if not s.name.endswith("_created")]
        if samples:
            found[family.name] = samples
    return json.dumps(found, separators=(",", ":"))


def live(process: str, registry: CollectorRegistry = REGISTRY) -> list[Metric]:
    """The families of this process as it stands, with a ``process`` label; those without a sample are left out."""
    found = []
    for family in registry.collect():
        own = Metric(family.name, family.documentation, family.type)
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                own.add_sample(sample.name, {**sample.labels, "process": process}, sample.value)
        if own.samples:
            found.append(own)
    return found
