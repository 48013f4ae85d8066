"""The cloud as the configuration knows it: the sections [cloud] and [sync]."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from dicomnode.burned_in import Shows
from dicomnode.conflicts import KIND_OF, Limits, Strategy
from dicomnode.model_settings import ModelPull, Repository
from dicomnode.offline import Mode
from dicomnode.peer_settings import Section

Lane = Literal["urgent", "normal", "batch"]
LANES: tuple[Lane, ...] = ("urgent", "normal", "batch")
"""Classes of the outbox; the index of each is ``priority`` in its rows."""

PRIMARY = "primary"
Identity = Literal["removed", "kept"]


def http_address(value: str) -> str:
    if value and not re.match(r"^https?://", value):
        raise ValueError("must begin with https:// (or http:// on loopback)")
    return value.rstrip("/")


class CloudEndpoint(Section):
    """One place that takes results; the primary is made of the keys of [cloud]."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$", description="short name in logs, status and metrics")
    stow_url: str = Field(min_length=1, description="STOW-RS address (…/studies)")
    records_url: str = Field("", description="address of the records, ending in /v1; empty: as the primary's is empty")
    health_url: str = Field("", description="answers 2xx when it is well; empty: OPTIONS of stow_url is asked")
    token_file: Path | None = Field(None, description="file with a bearer token")
    ca_file: Path | None = Field(None, description="PEM file with the authorities to trust")

    _http = field_validator("stow_url", "records_url", "health_url")(http_address)


class Cloud(Section):
    stow_url: str = Field("", description="STOW-RS address (…/studies); empty: nothing leaves the building")
    records_url: str = Field("", description="address of the records, ending in /v1; empty: no records are sent")
    health_url: str = Field("", description="answers 2xx when it is well; empty: OPTIONS of stow_url is asked")
    token_file: Path | None = Field(None, description="file with a bearer token")
    ca_file: Path | None = Field(None, description="PEM file with the authorities to trust")
    key_images: Literal["marked", "primary"] = Field(
        "marked",
        description="marked | primary: key images (SC) that leave de-identified; marked: where the source says"
        " BurnedInAnnotation NO; primary: of plain original CT, MR and PET slices that do not say it, too",
    )
    pseudonym_key_file: Path | None = Field(
        None, description="key of the pseudonyms; none: data_dir/cloud-pseudonyms.key, made when it is needed"
    )
    timeout_seconds: float = Field(60.0, gt=0, description="time for one request, beside that of its bytes")
    stall_seconds: float = Field(10.0, gt=0, le=20, description="a request without progress this long has failed")
    max_bundle_mb: int = Field(1024, ge=1, description="largest model archive, MiB")
    models: tuple[ModelPull, ...] = Field((), description="bundles to pull, verify and activate")
    keep_retired: int = Field(
        1, ge=0, le=100, description="pulled versions of a model kept beside those that are needed"
    )
    repository: Repository = Field(Repository(), description="signed repository of bundles (TUF)")
    backups: tuple[CloudEndpoint, ...] = Field((), description="taken while the primary is not well")

    _http = field_validator("stow_url", "records_url", "health_url")(http_address)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if (self.records_url or self.backups) and not self.stow_url:
            raise ValueError("records_url and backups need stow_url, the primary's address")
        names = [PRIMARY, *(b.name for b in self.backups)]
        if len(set(names)) != len(names):
            raise ValueError(f"backups: names must differ from each other and from '{PRIMARY}'")
        if any(bool(b.records_url) != bool(self.records_url) for b in self.backups):
            raise ValueError("backups: give records_url for all endpoints or for none")
        return self

    @model_validator(mode="after")
    def _offered(self) -> Self:
        for entry in self.models:
            if not entry.url and not self.repository.metadata_url:
                raise ValueError(f"models: '{entry.name}' has no url, and there is no [cloud.repository]")
        names = [entry.name for entry in self.models if not entry.url]
        if len(set(names)) != len(names):
            raise ValueError("models: the same model is followed twice; give each name once")
        return self

    @property
    def endpoints(self) -> tuple[CloudEndpoint, ...]:
        """The primary, then its backups; none where nothing leaves the building."""
        if not self.stow_url:
            return ()
        primary = CloudEndpoint(
            name=PRIMARY,
            stow_url=self.stow_url,
            records_url=self.records_url,
            health_url=self.health_url,
            token_file=self.token_file,
            ca_file=self.ca_file,
        )
        return (primary, *self.backups)


@dataclass(frozen=True, slots=True)
class LaneLimits:
    """How often a class is looked at, and how many items one request has."""

    seconds: float
    items: int


class Conflicts(Section):
    """Which side serves when a record was changed at both ends, by kind of data; see :mod:`dicomnode.conflicts`."""

    patients: Strategy = Field(
        Strategy.review, description="corrections of demographics: newest|cloud|edge|merge|review"
    )
    studies: Strategy = Field(Strategy.newest, description="metadata of studies")
    results: Strategy = Field(Strategy.cloud, description="summaries of analyses and reviews of them")
    preferences: Strategy = Field(Strategy.edge, description="preferences of users, such as the dashboard's language")
    settings: Strategy = Field(Strategy.merge, description="settings, such as the limits of warnings")
    tie_seconds: float = Field(1.0, ge=0, description="newest: changes closer than this are for a person to decide")
    skew_seconds: float = Field(
        300.0, gt=0, description="newest: a clock that is off by more is for a person to decide"
    )

    def strategy(self, kind: str) -> Strategy:
        """Of a type of records; one that is not known is for a person to decide."""
        found = KIND_OF.get(kind)
        return getattr(self, found) if found else Strategy.review

    @property
    def limits(self) -> Limits:
        return Limits(self.tie_seconds, self.skew_seconds)


class Sync(Section):
    """What goes to the cloud, how soon, and how much of the line it may take."""

    offline_mode: Mode = Field("auto", description="auto | always | never")
    urgent_seconds: float = Field(1.0, gt=0, description="seconds between two looks at urgent items")
    urgent_items: int = Field(10, ge=1, le=500, description="urgent items in one request")
    normal_seconds: float = Field(5.0, gt=0, description="seconds between two looks at normal items")
    normal_items: int = Field(50, ge=1, le=500, description="normal items in one request")
    batch_seconds: float = Field(30.0, gt=0, description="seconds between two looks at batch items")
    batch_items: int = Field(50, ge=1, le=500, description="batch items in one request")
    critical: Lane = Field("urgent", description="class of a study's results and summaries after a critical finding")
    results: Lane = Field("normal", description="class of DICOM results")
    summaries: Lane = Field("normal", description="class of summaries of analyses")
    studies: Lane = Field("batch", description="class of study metadata")
    settings: Lane = Field("batch", description="class of this node's settings")
    preferences: Lane = Field("batch", description="class of user preferences")
    pull_seconds: float = Field(30.0, gt=0, description="seconds between two looks for records changed at the cloud")
    patients_identity: Identity = Field(
        "removed", description="removed | kept: whether corrections of names, IDs and birth dates leave"
    )
    apply_corrections: bool = Field(
        False, description="corrected patients and studies serve in C-FIND and new results; objects stay as they are"
    )
    conflicts: Conflicts = Field(Conflicts(), description="who serves when both ends changed a record, by kind of data")

    bandwidth_kb: int = Field(
        0, ge=0, description="KiB per second that go out at most: results, records, metrics, heartbeats; 0: no cap"
    )
    urgent_loan_seconds: float = Field(
        10.0, ge=0, le=3600, description="seconds of bandwidth_kb that urgent items may take ahead of the others"
    )
    spool_mb: int = Field(0, ge=0, description="MiB that may wait before batch jobs do; 0: no cap")

    @property
    def spool_bytes(self) -> int:
        return self.spool_mb << 20

    def lane(self, name: Lane) -> LaneLimits:
        return {
            "urgent": LaneLimits(self.urgent_seconds, self.urgent_items),
            "normal": LaneLimits(self.normal_seconds, self.normal_items),
            "batch": LaneLimits(self.batch_seconds, self.batch_items),
        }[name]

    @property
    def lanes(self) -> Mapping[str, int]:
        """Type of data -> ``priority`` of its rows."""
        return {
            kind: LANES.index(getattr(self, key))
            for kind, key in (
                ("critical", "critical"),
                ("result", "results"),
                ("ai-result", "summaries"),
                ("study", "studies"),
                ("settings", "settings"),
                ("preferences", "preferences"),
                ("limits", "settings"),
                ("patient", "studies"),
                ("result-review", "summaries"),
            )
        }


@dataclass(frozen=True, slots=True)
class CloudPlan:
    """What the transaction that commits a result has to know of the cloud; no destination: nothing is sent."""

    destination: str = ""
    lanes: Mapping[str, int] | None = None
    records: bool = False
    pictures: frozenset[str] = frozenset({Shows.no})
    """Of which sources (:class:`dicomnode.burned_in.Shows`) key images may leave without identity."""

    def priority(self, kind: str) -> int:
        return (self.lanes or Sync().lanes)[kind]


OFF = CloudPlan()
DESTINATION = "cloud"
"""Name of the cloud in ``sync_items.destination``."""


def node_name(ae_title: str) -> str:
    """The node's name in records: letters, digits and . _ : @ - (config/cloud-api.yaml)."""
    name = re.sub(r"[^A-Za-z0-9._:@-]", "-", ae_title.strip())
    return name if re.match(r"[A-Za-z0-9]", name) else f"node{name}"


def plan_of(cloud: Cloud, sync: Sync) -> CloudPlan:
    if not cloud.stow_url:
        return OFF
    return CloudPlan(DESTINATION, sync.lanes, bool(cloud.records_url), pictures_of(cloud))


def pictures_of(cloud: Cloud) -> frozenset[str]:
    return frozenset({Shows.no, Shows.primary} if cloud.key_images == "primary" else {Shows.no})
