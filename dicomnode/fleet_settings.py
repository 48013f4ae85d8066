"""What the cloud is told of this node and what it may ask of it: the section [fleet]."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from dicomnode.peer_settings import Section

Part = Literal["models", "rules", "log_level"]


class Fleet(Section):
    """Needs cloud.records_url; see :mod:`dicomnode.sync.heartbeat` and :mod:`dicomnode.sync.desired`."""

    heartbeat_seconds: float = Field(60.0, ge=0, description="seconds between two heartbeats to the cloud; 0: none")
    desired_seconds: float = Field(60.0, ge=0, description="seconds between two looks at the desired state; 0: none")
    accept: tuple[Part, ...] = Field((), description="what the cloud may set here: models, rules, log_level")
