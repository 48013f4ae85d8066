"""The node's configuration: one frozen, validated settings object.

Read from TOML; each key can be overridden by ``DICOMNODE__SECTION__KEY``. Secrets are read
from files that the settings only name. An unknown key is an error.
"""

from __future__ import annotations

import os
import re
import tomllib
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from dicomnode.alert_settings import Alerts
from dicomnode.cloud_settings import Cloud, CloudEndpoint, CloudPlan, Sync, plan_of
from dicomnode.endpoint_settings import Endpoint, check_endpoints
from dicomnode.errors import SettingsError
from dicomnode.fleet_settings import Fleet
from dicomnode.metrics_settings import MetricsSettings
from dicomnode.model_settings import ModelPull, Repository
from dicomnode.peer_settings import (
    AETitle,
    AETitles,
    Peer,
    Section,
    Service,
    Tls,
    caller_matches,
    check_peer,
    checked_ae_title,
)
from dicomnode.rule_settings import Priority, Range, Rule, RuleStep
from dicomnode.settings_words import plain

__all__ = [
    "Cloud",
    "CloudEndpoint",
    "ModelPull",
    "Peer",
    "Priority",
    "Range",
    "Repository",
    "Rule",
    "RuleStep",
    "Section",
    "Service",
    "Sync",
    "Tls",
    "caller_matches",
]


class EngineName(StrEnum):
    auto = "auto"
    tensorrt = "tensorrt"
    onnxruntime_gpu = "onnxruntime-gpu"
    onnxruntime_cpu = "onnxruntime-cpu"
    kserve = "kserve"


class Node(Section):
    ae_title: AETitle = Field("DICOMNODE", description="AE title that peers call")
    more_ae_titles: AETitles = Field((), description="further AE titles that this node answers to")
    data_dir: Path = Field(Path("/var/lib/dicomnode"), description="objects, index and state")
    institution: str = Field("", description="InstitutionName in results; empty: copied from nothing")
    reserve_mb: int = Field(1024, ge=1, description="MiB kept free; below it C-STORE answers 0xA700")

    _check = field_validator("ae_title")(checked_ae_title)

    @property
    def ae_titles(self) -> tuple[str, ...]:
        """Every AE title that may be called here."""
        return (self.ae_title, *self.more_ae_titles)


class Dimse(Section):
    host: str = Field("0.0.0.0", description="address to listen on")  # noqa: S104 modalities connect from the LAN
    port: int = Field(11112, ge=0, le=65535, description="TCP port; 0 lets the system choose")
    workers: int = Field(2, ge=1, le=64, description="receiver processes on the listening socket")
    max_pdu_bytes: int = Field(131072, ge=4096, le=4194304, description="largest P-DATA PDU accepted, bytes")
    pdu_seconds: float = Field(30.0, gt=0, description="absolute deadline for one PDU, from its first byte")
    request_seconds: float = Field(10.0, gt=0, description="time for A-ASSOCIATE-RQ after connecting")
    idle_seconds: float = Field(300.0, gt=0, description="an association without traffic is aborted")
    max_connections: int = Field(256, ge=1, le=4096, description="connections in total, each receiver process")
    max_connections_per_address: int = Field(64, ge=1, description="connections from one address")
    max_object_mb: int = Field(4096, ge=1, description="largest object in MiB; a larger one is aborted")
    journal_mb: int = Field(
        1024, ge=4, le=65536, description="MiB of the intake journal, made once, of each receiver process"
    )
    max_unfinished_mb: int = Field(
        8192, ge=1, description="MiB of unfinished objects from one peer, each receiver process; beyond: 0xA700"
    )
    query_max_answers: int = Field(10000, ge=1, description="answers to one C-FIND; more: 0xB001 after these")
    query_seconds: float = Field(30.0, gt=0, description="time to look through the index for one query")
    query_per_second: float = Field(
        200.0, gt=0, description="C-FIND requests per second of one AE title, each receiver process; beyond: 0xA700"
    )
    queries_at_once: int = Field(
        4, ge=1, description="C-FIND requests at a time of one AE title, each receiver process; beyond: 0xA700"
    )
    query_match_unknown: bool = Field(
        False, description="an empty attribute matches any value of a required key (PS3.4 C.2.2.1.2)"
    )
    log_identifiers: Literal[False] = Field(False, description="query identifiers are never logged")


class Http(Section):
    host: str = Field("127.0.0.1", description="address of the sidecar's HTTP server")
    port: int = Field(8080, ge=0, le=65535, description="TCP port; 0 lets the system choose")


class Completeness(Section):
    quiet_seconds: float = Field(10.0, gt=0, description="the longest wait after the last instance")
    step_seconds: float = Field(
        600.0, ge=0, description="the longest silence while a procedure step (MPPS) says that more is to come"
    )


class Inference(Section):
    engine: EngineName = Field(EngineName.auto, description="which engine runs the models")
    models_dir: Path = Field(Path("models"), description="bundles: <name>/<version>/")
    threads: int = Field(0, ge=0, description="CPU threads of the engine; 0: all cores")
    max_batch: int = Field(
        16,
        ge=1,
        le=512,
        description="slices or patches in one batch of an engine; halved while GPU memory is too small",
    )
    batch_studies: int = Field(
        0,
        ge=0,
        le=512,
        description="series of few images that share batches while they wait in the queue; 0: as many as fit on a GPU "
        "or an endpoint, each by itself on the CPU; 1: each by itself",
    )
    gpu_memory_share: float = Field(
        0.8,
        gt=0,
        le=1,
        description="share of the GPU's memory that all TensorRT models together may take, 0 to 1; "
        "with onnxruntime-gpu each model by itself",
    )
    lease_seconds: float = Field(60.0, gt=1, description="a job whose worker is silent this long is redone")
    job_seconds: float = Field(
        1800.0, gt=10, description="a job that takes longer ends its worker and counts as an attempt"
    )
    read_ahead_mb: int = Field(
        1024, ge=0, description="memory for slices that are decoded while their series arrives; 0: none are"
    )
    max_attempts: int = Field(10, ge=1, description="crashes or errors before a job is parked as failed")
    endpoints: tuple[Endpoint, ...] = Field((), description="KServe v2 / Triton servers that may take jobs")
    local_cost: float = Field(0.0, ge=0, le=1, description="price of this box's own engine, 0 (free) to 1 (dearest)")
    placement_locality: float = Field(0.4, ge=0, description="weight of data locality where several could take a job")
    placement_fit: float = Field(0.3, ge=0, description="weight of resource fit: GPU or CPU, memory")
    placement_load: float = Field(0.2, ge=0, description="weight of idleness")
    placement_cost: float = Field(0.1, ge=0, description="weight of cheapness")
    placement_max_load: float = Field(0.9, gt=0, le=1, description="an engine or endpoint above this load is skipped")
    verify_memory_mb: int = Field(
        16384, ge=512, description="MiB of memory for the process that verifies a bundle; beyond: it fails"
    )
    verify_seconds: float = Field(900.0, gt=1, description="time for the verification of a bundle")

    @model_validator(mode="after")
    def _placement(self) -> Self:
        check_endpoints(self.endpoints, needed=self.engine is EngineName.kserve)
        if not self.placement_locality + self.placement_fit + self.placement_load + self.placement_cost:
            raise ValueError("one of the placement weights must be above 0")
        return self

    @property
    def places(self) -> tuple[Endpoint, ...]:
        """The endpoints that jobs may go to: those configured, where the engine is auto or kserve."""
        return self.endpoints if self.engine in (EngineName.auto, EngineName.kserve) else ()


class RolloutSettings(Section):
    automatic: bool = Field(True, description="roll a version back when it is worse than the one before")
    watch_runs: int = Field(50, ge=1, le=1000, description="window: the last analyses of a version, at most")
    watch_hours: float = Field(168.0, gt=0, description="window: hours that analyses count")
    probation_hours: float = Field(24.0, ge=0, description="hours that a version is watched after its activation")
    min_runs: int = Field(5, ge=1, description="analyses or comparisons before time or disagreement count")
    min_errors: int = Field(3, ge=1, description="failed analyses before the error rate counts")
    max_error_excess: float = Field(
        0.2, ge=0, le=1, description="share of failed analyses above that of the version before"
    )
    max_slowdown: float = Field(
        2.0, ge=1, description="median time of an image as a multiple of that of the version before"
    )
    max_disagreement: float = Field(0.25, ge=0, le=1, description="share of comparisons that may disagree")
    min_dice: float = Field(0.85, ge=0, le=1, description="Dice of each segment below which two versions disagree")
    max_difference: float = Field(
        0.15, ge=0, description="relative difference of a measurement above which they disagree"
    )
    shadow_hours: float = Field(24.0, gt=0, description="hours that a finished analysis may wait for its comparison")
    shadow_seconds: float = Field(1800.0, gt=1, description="computing time for one comparison; beyond: it fails")
    drift_reference: int = Field(200, ge=20, description="first analyses of a version that its drift is measured from")
    drift_window: int = Field(100, ge=20, description="last analyses of a version whose drift is measured")


class Delivery(Section):
    backoff_seconds: float = Field(2.0, gt=0, description="first wait after a failed delivery")
    backoff_max_seconds: float = Field(900.0, gt=0, description="longest wait between attempts")
    connect_seconds: float = Field(10.0, gt=0, description="TCP connect time-out")
    response_seconds: float = Field(60.0, gt=0, description="time for the peer's C-STORE response")
    batch: int = Field(100, ge=1, description="objects on one association")
    parallel: int = Field(8, ge=1, le=64, description="peers that are served at the same time")
    commitment_wait_seconds: float = Field(
        5.0, ge=0, description="how long an association is kept for a report of storage commitment, or its answer"
    )
    commitment_timeout_seconds: float = Field(
        3600.0, gt=0, description="time for a peer's report of storage commitment; then it is asked again"
    )


class Logging(Section):
    level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe level logged")
    format: Literal["auto", "json", "console"] = Field("auto", description="auto: console on a terminal, else JSON")


def _meet(one: str, other: str) -> bool:
    """Whether two listening addresses share a network interface."""
    return one == other or bool({one, other} & {"0.0.0.0", "::"})  # noqa: S104 compared, not bound


class Settings(BaseSettings):
    """All settings of the node. Build it with :func:`load_settings`."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        env_prefix="DICOMNODE__",
        env_nested_delimiter="__",
        hide_input_in_errors=True,
    )

    node: Node = Node()
    dimse: Dimse = Dimse()
    tls: Tls = Tls()
    http: Http = Http()
    peers: tuple[Peer, ...] = ()
    completeness: Completeness = Completeness()
    inference: Inference = Inference()
    rollout: RolloutSettings = RolloutSettings()
    delivery: Delivery = Delivery()
    cloud: Cloud = Cloud()
    sync: Sync = Sync()
    alerts: Alerts = Alerts()
    metrics: MetricsSettings = MetricsSettings()
    fleet: Fleet = Fleet()
    logging: Logging = Logging()
    rules: tuple[Rule, ...] = ()

    @classmethod
    def settings_customise_sources(  # type: ignore[override]  # the other sources are not used
        cls, settings_cls: type[BaseSettings], init_settings: PydanticBaseSettingsSource, **_: object
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Environment first, then what the TOML file gave; no .env and no secrets directory."""
        return EnvSettingsSource(settings_cls), init_settings

    @model_validator(mode="after")
    def _cross_check(self) -> Self:
        names = [p.name for p in self.peers]
        if len(set(names)) != len(names):
            raise ValueError("peers: two peers have the same name; names must differ")
        callers = [
            (p.ae_title, frozenset(p.hosts), p.tls, p.certificate_sha256, p.certificate_name, frozenset(p.called_ae))
            for p in self.peers
        ]
        if len(set(callers)) != len(callers):
            raise ValueError(
                "peers: two peers have the same ae_title and host (and tls, certificate and called_ae);"
                " the caller would be ambiguous"
            )
        if self.tls.port and self.tls.port == self.dimse.port and _meet(self.tls.host, self.dimse.host):
            raise ValueError("tls.port is dimse.port; TLS needs a port of its own, usually 2762")
        for peer in self.peers:
            check_peer(peer, self.tls, self.node.ae_titles)
        self.check_rules()
        return self

    def check_rules(self) -> None:
        """Whether the rules fit each other and the peers; raises ValueError."""
        rule_names = [r.name for r in self.rules]
        if len(set(rule_names)) != len(rule_names):
            raise ValueError("rules: two rules have the same name; names must differ")
        by_name = {p.name: p for p in self.peers}
        for rule in self.rules:
            self._check_rule(rule, by_name)

    def _check_rule(self, rule: Rule, by_name: dict[str, Peer]) -> None:
        for target in rule.destinations:
            if target not in by_name:
                raise ValueError(f"rules '{rule.name}': send_to names the peer '{target}', which [[peers]] lacks")
            if not by_name[target].reachable:
                raise ValueError(f"rules '{rule.name}': peer '{target}' needs host and port to be sent to")
        for target in rule.notify:
            if target not in by_name:
                raise ValueError(f"rules '{rule.name}': notify names the peer '{target}', which [[peers]] lacks")
            if not by_name[target].reachable:
                raise ValueError(f"rules '{rule.name}': peer '{target}' needs host and port to be notified")
        for target in rule.prior_peers:
            self._check_prior_source(rule.name, target, by_name)

    def _check_prior_source(self, rule: str, target: str, by_name: dict[str, Peer]) -> None:
        """A peer is asked by C-FIND and C-MOVE, and what it moves comes back from its address by C-STORE."""
        peer = by_name.get(target)
        if peer is None:
            raise ValueError(f"rules '{rule}': prior.from names the peer '{target}', which [[peers]] lacks")
        if not peer.reachable:
            raise ValueError(f"rules '{rule}': peer '{target}' needs host and port to be asked for priors")
        if not any("store" in p.allow and set(p.hosts) & set(peer.hosts) for p in self.peers):
            raise ValueError(
                f"rules '{rule}': peer '{target}' is asked for priors but may not send them;"
                ' add "store" to its allow, or list the AE title from which it sends'
            )

    def peer(self, name: str) -> Peer | None:
        return next((p for p in self.peers if p.name == name), None)

    @property
    def cloud_plan(self) -> CloudPlan:
        return plan_of(self.cloud, self.sync)

    @property
    def rule_keywords(self) -> frozenset[str]:
        """DICOM keywords that rules look at; the header reader collects them."""
        return frozenset(k for r in self.rules for k in r.keywords)


def load_settings(path: Path | None) -> Settings:
    """Read and validate the configuration.

    Relative paths are taken from the folder of the TOML file. Raises SettingsError with
    every wrong key, what is wrong with it and the file.
    """
    operation = "read configuration"
    data: dict[str, Any] = {}
    if path is not None:
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise SettingsError(operation, f"{path} does not exist", "Give --config FILE or DICOMNODE_CONFIG") from None
        except OSError as error:
            raise SettingsError(operation, f"{path}: {error.strerror}", "Check its permissions") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SettingsError(operation, f"{path} is not TOML: {error}", "Mend the line that it names") from None
    unknown = _unknown_environment()
    if unknown:
        raise SettingsError(operation, *unknown)
    try:
        settings = Settings(**data)
    except ValidationError as error:
        raise SettingsError(operation, _explain(error, path), "See config/dicomnode.toml for every key") from None
    except Exception as error:  # pydantic-settings wraps bad JSON in environment variables
        if type(error).__name__ != "SettingsError":
            raise
        raise SettingsError(operation, str(error), "Lists and tables in the environment are JSON") from None
    return _anchored(settings, path.parent.resolve() if path else Path.cwd())


def _explain(error: ValidationError, path: Path | None) -> str:
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"]) or "configuration"
        value = item.get("input")  # what was judged: the environment may have replaced the file's value
        message = plain(item)
        if item["type"] == "extra_forbidden":
            message = f"unknown key; {_near(item['loc'])}"
            value = None
        shown = f" = {value!r}" if isinstance(value, str | int | float | bool) else ""
        shown = re.sub(r"//[^/@]*@", "//***@", shown)  # a password in an address stays out of terminals and logs
        lines.append(f"{key}{shown}: {message}")
    where = f"{path}: " if path else ""
    return where + "; ".join(lines)


def _unknown_environment() -> tuple[str, str] | None:
    """Cause and hint for a DICOMNODE__ variable whose section does not exist."""
    prefix = "DICOMNODE__"
    sections = sorted(Settings.model_fields)
    for name in sorted(os.environ):
        if name.upper().startswith(prefix) and name[len(prefix) :].split("__")[0].lower() not in sections:
            return f"environment variable {name}: there is no such section", f"Sections: {', '.join(sections)}"
    return None


_LISTED: dict[str, Any] = {
    "peers": Peer,
    "rules": Rule,
    "models": ModelPull,
    "backups": CloudEndpoint,
    "endpoints": Endpoint,
    "steps": RuleStep,
}


def _near(loc: tuple[int | str, ...]) -> str:
    """Name the keys that exist where the unknown one stands."""
    import difflib

    model: Any = Settings
    for part in loc[:-1]:
        if isinstance(part, int):
            continue
        fields = getattr(model, "model_fields", {})
        model = _LISTED.get(str(part)) or (fields[part].annotation if part in fields else None)
        if model is None:
            return "remove it"
    known = sorted(getattr(model, "model_fields", {}))
    close = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known keys here: {', '.join(known)}"


def _anchored(settings: Settings, base: Path) -> Settings:
    """Make relative paths absolute, from the folder of the configuration file."""

    def absolute(path: Path) -> Path:
        return path if path.is_absolute() else Path(os.path.normpath(base / path))

    node = settings.node.model_copy(update={"data_dir": absolute(settings.node.data_dir)})
    models_dir = settings.inference.models_dir
    if not models_dir.is_absolute() and not (base / models_dir).is_dir():
        shipped = Path(__file__).resolve().parent.parent / models_dir
        models_dir = shipped if shipped.is_dir() else models_dir
    endpoints = tuple(
        e.model_copy(
            update={k: absolute(v) for k in ("token_file", "ca_file") if (v := getattr(e, k)) is not None},
        )
        for e in settings.inference.endpoints
    )
    inference = settings.inference.model_copy(update={"models_dir": absolute(models_dir), "endpoints": endpoints})
    backups = tuple(
        b.model_copy(update={k: absolute(v) for k in ("token_file", "ca_file") if (v := getattr(b, k)) is not None})
        for b in settings.cloud.backups
    )
    source = settings.cloud.repository
    repository = source.model_copy(
        update={
            k: absolute(v)
            for k in ("root_file", "token_file", "s3_access_key_file", "s3_secret_key_file")
            if (v := getattr(source, k)) is not None
        }
    )
    cloud = settings.cloud.model_copy(
        update={
            "backups": backups,
            "repository": repository,
            **{
                k: absolute(v)
                for k in ("token_file", "ca_file", "pseudonym_key_file")
                if (v := getattr(settings.cloud, k)) is not None
            },
        }
    )
    alerts = settings.alerts.model_copy(
        update={k: absolute(v) for k in ("secret_file", "ca_file") if (v := getattr(settings.alerts, k)) is not None}
    )
    metrics = settings.metrics.model_copy(
        update={k: absolute(v) for k in ("token_file", "ca_file") if (v := getattr(settings.metrics, k)) is not None}
    )
    tls = settings.tls.model_copy(
        update={
            key: absolute(path)
            for key in ("certificate_file", "key_file", "ca_file", "crl_file")
            if (path := getattr(settings.tls, key)) is not None
        }
    )
    return settings.model_copy(
        update={
            "node": node,
            "inference": inference,
            "cloud": cloud,
            "alerts": alerts,
            "metrics": metrics,
            "tls": tls,
        }
    )
