"""The section ``[alerts]`` of the configuration."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator, model_validator

from dicomnode.offline import Place
from dicomnode.peer_settings import Section


class Alerts(Section):
    """Webhook for critical findings; see :mod:`dicomnode.sync.alerts`."""

    url: str = Field("", description="address that is told of critical findings by POST; empty: nobody is")
    secret_file: Path | None = Field(None, description="file with the secret of the HMAC-SHA-256 signature")
    identify: Literal["hash", "uid"] = Field("hash", description="hash: UIDs are hashed with the secret; uid: as is")
    ca_file: Path | None = Field(None, description="PEM file with the authorities to trust")
    timeout_seconds: float = Field(10.0, gt=0, description="time for one request")
    place: Place = Field("auto", description="where url is, for sync.offline_mode: auto | hospital | cloud")

    @field_validator("url")
    @classmethod
    def _http(cls, value: str) -> str:
        if value and not re.match(r"^https?://", value):
            raise ValueError("must begin with https:// (or http:// on loopback)")
        return value

    @model_validator(mode="after")
    def _signed(self) -> Self:
        if self.url and self.secret_file is None:
            raise ValueError("url needs secret_file: an alert that nobody can check is worth nothing")
        return self
