"""What keeps a pulled version of a model on the disk: what it serves, waits or stands by for, and who names it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from dicomnode.index.database import Database, Row

Version = tuple[str, str]
GRACE_SECONDS = 3600.0
"""After its retirement: what was about to begin with it has begun by then, and is a row."""


def aside_of(data_dir: Path) -> Path:
    """Where a folder goes in one step before it is deleted; nothing looks for bundles there."""
    return data_dir / "staging" / "removed"


def named_by_jobs(db: Database) -> set[Version]:
    """Versions that a job which is not over names, as its pin or as the version that it was begun with."""
    found = set()
    for row in db.rows(
        "SELECT DISTINCT model, model_version, state IN ('waiting', 'pending', 'running') AS open FROM jobs"
        " WHERE state IN ('waiting', 'pending', 'running')"
        " OR (instr(model, '@') > 0 AND state IN ('failed', 'refused', 'not-run'))"
    ):
        name, _, pinned = str(row["model"]).partition("@")
        if pinned:
            found.add((name, pinned))
        if row["open"] and row["model_version"]:
            found.add((name, str(row["model_version"])))
    rows = db.rows("SELECT DISTINCT name, version FROM model_runs WHERE state = 'running'")
    return found | {(str(r["name"]), str(r["version"])) for r in rows}


def removable(
    versions: Sequence[Row], pulled: Collection[Version], named: Collection[Version], *, keep: int, now: float
) -> list[Version]:
    """Which of ``versions`` (:meth:`Life.versions`) may go: pulled, retired for a while, and needed by nobody. Pure.

    Of each model the ``keep`` that were retired last stay, those that were rolled back only after the others.
    The version before the active one always stays.
    """
    found: list[Version] = []
    for name in sorted({str(r["name"]) for r in versions}):
        idle = [
            r
            for r in versions
            if r["name"] == name
            and r["state"] == "retired"
            and not r["previous"]
            and (name, r["version"]) in pulled
            and (name, r["version"]) not in named
        ]
        idle.sort(key=lambda r: (not r["faulty"], float(r["since_at"] or 0.0)), reverse=True)
        found += [(name, str(r["version"])) for r in idle[keep:] if now - float(r["since_at"] or 0.0) >= GRACE_SECONDS]
    return found


def fetched_again(name: str, version: str) -> str:
    """What to do to have back a version that was removed; for people."""
    return (
        f'name it in [[cloud.models]] (name = "{name}", version = "{version}", policy = "stage") and restart the'
        f" sidecar: it is fetched again; then 'dicomnode models activate {name}@{version}'"
    )
