"""Which models come from where, and how far they go by themselves: [cloud.repository] and [[cloud.models]]."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from dicomnode.ladder import Goal, Plan
from dicomnode.peer_settings import Section

_GOALS: dict[str, Goal] = {"staged": "stage", "shadow": "shadow", "active": "activate"}


class Repository(Section):
    """A TUF repository (The Update Framework 1.0.34) with model archives as targets ``NAME/VERSION.tar.gz``."""

    metadata_url: str = Field("", description="folder of the signed metadata, https:// or s3://BUCKET/PREFIX")
    targets_url: str = Field("", description="folder of the archives; empty: 'targets' beside '…/metadata'")
    root_file: Path | None = Field(None, description="root.json that you trust, got in a way that you trust")
    refresh_seconds: float = Field(300.0, ge=1, description="time between two looks for new metadata")
    token_file: Path | None = Field(None, description="file with a bearer token for the hosts of the two addresses")
    s3_endpoint: str = Field("", description="address of an S3 service other than Amazon's")
    s3_region: str = Field("us-east-1", description="region of the bucket")
    s3_access_key_file: Path | None = Field(None, description="file with the access key ID; none: the machine's role")
    s3_secret_key_file: Path | None = Field(None, description="file with the secret access key")

    @field_validator("metadata_url", "targets_url")
    @classmethod
    def _address(cls, value: str) -> str:
        if value and not re.match(r"^(https?://|s3://[a-z0-9][a-z0-9.-]+)", value):
            raise ValueError("must begin with https:// (http:// and s3://BUCKET/ work too)")
        return value.rstrip("/")

    @field_validator("s3_endpoint")
    @classmethod
    def _http(cls, value: str) -> str:
        if value and not re.match(r"^https?://", value):
            raise ValueError("must begin with https:// (or http:// on loopback)")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.metadata_url and self.root_file is None:
            raise ValueError("metadata_url needs root_file: without a trusted root nothing can be believed")
        if self.metadata_url and not self.targets_url and not self.metadata_url.endswith("/metadata"):
            raise ValueError("targets_url is missing, and metadata_url does not end with /metadata")
        if (self.s3_access_key_file is None) != (self.s3_secret_key_file is None):
            raise ValueError("s3_access_key_file and s3_secret_key_file belong together")
        return self

    @property
    def archives_url(self) -> str:
        return self.targets_url or self.metadata_url.removesuffix("metadata") + "targets"


class ModelPull(Section):
    """With ``url`` and ``sha256`` one archive; without them what [cloud.repository] offers of the model."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$", description="bundle name")
    version: str = Field("", pattern=r"^(\d+\.\d+\.\d+)?$", description="bundle version; empty: the newest offered")
    url: str = Field("", pattern=r"^(https?://.*)?$", description="address of the bundle as .tar.gz or .zip")
    sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$", description="SHA-256 of the archive, lower-case hex")
    policy: Goal | None = Field(
        None, description="how far it goes by itself: stage, shadow, canary or activate (default)"
    )
    shadow_studies: int = Field(0, ge=0, description="comparisons in the shadow before it goes on")
    shadow_hours: float = Field(0.0, ge=0, description="hours in the shadow before it goes on")
    canary_percent: float = Field(0.0, ge=0, le=100, description="share of the studies as a canary; 0: no canary")
    canary_studies: int = Field(0, ge=0, description="studies as a canary before it goes on")
    canary_hours: float = Field(0.0, ge=0, description="hours as a canary before it goes on")
    approve: bool = Field(False, description="before it serves anybody an operator has to approve it")
    begin_as: Literal["staged", "shadow", "active"] | None = Field(
        None, description="former name of policy: staged, shadow or active"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if bool(self.url) != bool(self.sha256):
            raise ValueError("url and sha256 belong together; without both the model comes from [cloud.repository]")
        if self.url and not self.version:
            raise ValueError("version is missing: an archive named by url has one version")
        if self.policy is not None and self.begin_as is not None:
            raise ValueError("begin_as is the former name of policy; give policy alone")
        if self.plan.goal == "canary" and not self.canary_percent:
            raise ValueError("policy = 'canary' needs canary_percent")
        if self.plan.goal == "activate" and self.canary_percent and not (self.canary_studies or self.canary_hours):
            raise ValueError("canary_percent needs canary_studies or canary_hours, or policy = 'canary'")
        if not self.canary_percent and (self.canary_studies or self.canary_hours):
            raise ValueError("canary_studies and canary_hours need canary_percent")
        return self

    @property
    def plan(self) -> Plan:
        return Plan(
            goal=self.policy or _GOALS[self.begin_as or "active"],
            shadow_studies=self.shadow_studies,
            shadow_hours=self.shadow_hours,
            canary_percent=self.canary_percent,
            canary_studies=self.canary_studies,
            canary_hours=self.canary_hours,
            approve=self.approve,
        )
