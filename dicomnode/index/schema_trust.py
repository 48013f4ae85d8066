"""Tables of models from a signed repository, as migration m0020 makes them; see :mod:`dicomnode.index.trust`."""

from __future__ import annotations

from sqlite_utils import Database


def create_trust(db: Database) -> None:
    """The repository's standing, where pulls came from, and what a version waits for or was approved by."""
    db["model_trust"].create(
        {
            "repository": str,
            "state": str,
            "reason": str,
            "checked_time": str,
            "good_time": str,
            "expires_time": str,
            "versions": str,
            "offers": str,
        },
        pk="repository",
        not_null={"state", "reason", "versions", "offers"},
        defaults={"reason": "", "versions": "{}", "offers": "[]"},
    )
    db["model_pulls"].add_column("source", str, not_null_default="url")
    db["model_pulls"].add_column("length", int)
    for column in ("waits", "waits_for", "approved_by", "approved_time"):
        db["model_versions"].add_column(column, str)
