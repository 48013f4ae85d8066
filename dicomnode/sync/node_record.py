"""The node's own settings as a record for the cloud: what it does, not where anything is."""

from __future__ import annotations

from typing import Any

from dicomnode import __version__
from dicomnode.cloud_settings import node_name
from dicomnode.index.cloud_rows import put_record
from dicomnode.index.database import Database
from dicomnode.settings import Settings


def node_settings(settings: Settings) -> dict[str, Any]:
    """No addresses, no paths, no names of peers or people; pure."""
    return {
        "ae_title": settings.node.ae_title,
        "version": __version__,
        "engine": settings.inference.engine.value,
        "completeness": settings.completeness.model_dump(mode="json"),
        "rollout": settings.rollout.model_dump(mode="json"),
        "sync": settings.sync.model_dump(mode="json"),
        "rules": [
            {
                "name": rule.name,
                "models": list(rule.every_model),
                "priority": rule.priority,
                "results": list(rule.results),
                "cloud_identity": rule.cloud_identity,
            }
            for rule in settings.rules
        ],
    }


def describe_node(settings: Settings, db: Database) -> int:
    """The next version of the record when the settings have changed; 0 when not, or when no records are sent."""
    plan = settings.cloud_plan
    if not plan.records:
        return 0
    with db.transaction():
        return put_record(db, plan, "settings", node_name(settings.node.ae_title), node_settings(settings))
