"""Changes in the life of a model, for the command line and the admin API. Part of the composition root.

Whatever is going to serve is verified first, on this box's engine and in a process of its own;
then the state changes in one transaction, and the worker is rung. Blocking: golden cases run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dicomnode import doorbell
from dicomnode.errors import BundleError, OperatorError
from dicomnode.index.database import Database, Row
from dicomnode.index.desired import ServingRules
from dicomnode.index.life import Change, Life
from dicomnode.index.model_space import fetched_again
from dicomnode.index.model_states import ModelState
from dicomnode.index.operation import Events, Models
from dicomnode.index.removals import Removals
from dicomnode.index.runs import Runs
from dicomnode.infer.bundle import BundleFolder
from dicomnode.infer.purpose import check_clinical_at
from dicomnode.infer.serving import bundle_folders, resolve, serving_version, version_before
from dicomnode.settings import Settings

Action = Literal["stage", "shadow", "canary", "activate", "retire"]
ACTIONS: tuple[Action, ...] = ("stage", "shadow", "canary", "activate", "retire")
_WORDS = {
    "stage": "staged",
    "shadow": "runs in the shadow",
    "canary": "serves as a canary",
    "activate": "serves now",
    "retire": "retired",
}


class ModelDesk:
    """``verify(path)`` raises BundleError or EngineError. Thread-safe as the index is."""

    def __init__(self, settings: Settings, db: Database, verify: Callable[[Path], object]) -> None:
        self._settings = settings
        self._db = db
        self._verify = verify
        self._life = Life(db)
        self._pointer = Models(db)
        self._removals = Removals(db)
        self._rules = ServingRules(settings, db)

    def folders(self) -> list[BundleFolder]:
        return bundle_folders(self._settings.inference.models_dir, self._settings.node.data_dir)

    def listing(self) -> list[Row]:
        """Every version on this box or on record: state, share, whether it is here, whether it serves by default."""
        folders = {(f.name, f.version): f for f in self.folders()}
        rows = {(r["name"], r["version"]): r for r in self._life.versions()}
        active, held = self._pointer.active(), self._life.held_back()
        found = []
        for name, version in sorted(folders.keys() | rows.keys()):
            row = rows.get((name, version), {})
            folder = folders.get((name, version))
            try:
                serves = resolve(list(folders.values()), name, active, held).version == version
            except BundleError:
                serves = False
            found.append(
                {
                    "name": name,
                    "version": version,
                    "state": row.get("state") or ("default" if serves else "unlisted"),
                    "serves": "yes" if serves else "",
                    "percent": row.get("percent") or 0.0,
                    "peers": row.get("peers") or [],
                    "previous": bool(row.get("previous")),
                    "faulty": bool(row.get("faulty")),
                    "since_time": row.get("since_time"),
                    "waits": None if row.get("state") == ModelState.active else row.get("waits"),
                    "waits_for": None if row.get("state") == ModelState.active else row.get("waits_for"),
                    "approved_by": row.get("approved_by"),
                    "path": str(folder.path) if folder else None,
                }
            )
        return found

    def change(
        self,
        action: Action,
        name: str,
        version: str,
        *,
        who: str,
        why: str = "",
        percent: float = 0.0,
        peers: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Carry out one action; ``{"name", "version", "state"}`` of the version then."""
        unknown = sorted(set(peers) - {n for p in self._settings.peers for n in (p.name, p.ae_title)})
        if unknown:
            raise OperatorError(
                "make a canary", f"[[peers]] has no '{unknown[0]}'", "Use the name or AE title of a peer"
            )
        if action != "retire":
            self._check(self._path(name, version), serves=action != "stage")
        if action != "activate":
            self._keep_service(action, name, version, who)
        with self._db.transaction():
            if action != "retire":
                self._path(name, version)  # it may have been removed since; now it is not any more
            self._move(action, name, version, percent, peers, who, why)
        return self._told(name, version, _WORDS[action], who)

    def _move(
        self, action: Action, name: str, version: str, percent: float, peers: Sequence[str], who: str, why: str
    ) -> None:
        match action:
            case "stage":
                self._life.stage(name, version, who=who, why=why)
            case "shadow":
                self._life.shadow(name, version, who=who, why=why)
            case "canary":
                self._life.canary(name, version, percent=percent, peers=peers, who=who, why=why)
            case "activate":
                self._pin_default(name, version, who)
                self._life.activate(name, version, who=who, why=why)
            case "retire":
                self._life.retire(name, version, who=who, why=why)

    def activate_all(
        self, versions: Mapping[str, str], *, who: str, why: str, also: Callable[[], None] = lambda: None
    ) -> None:
        """Have these serve, all or none, in one transaction that begins with ``also``.

        Each is verified before it; one that serves already is left alone. Raises BundleError, EngineError.
        """
        active = self._pointer.active()
        changes = {n: v for n, v in versions.items() if active.get(n) != v}
        for name, version in changes.items():
            self._check(self._path(name, version))
        with self._db.transaction():
            also()
            for name, version in changes.items():
                self._path(name, version)
                self._pin_default(name, version, who)
                self._life.activate(name, version, who=who, why=why)
        for name, version in changes.items():
            self._told(name, version, _WORDS["activate"], who)

    def roll_back(self, name: str, *, who: str, why: str = "") -> dict[str, Any]:
        """End the canary of the model when there is one; else return to the version before the active one."""
        canary = self._life.in_state(ModelState.canary, name)
        if canary:
            version = canary[0]["version"]
            self._life.roll_back(name, version, None, Change(who, why))
            self._told(name, version, "was rolled back as a canary", who)
            return {"name": name, "version": self._pointer.active().get(name), "rolled_back": version}
        active, served = self._pointer.active().get(name), self._life.served_before(name)
        target = version_before(self.folders(), name, active, served, self._life.held_back())
        if active is None or target is None:
            raise OperatorError(
                "roll back model",
                f"no earlier version of '{name}' was active, but for those that were rolled back",
                f"Choose one: 'dicomnode models list', then 'dicomnode models activate {name}@VERSION'",
            )
        self._check(self._path(name, target))
        with self._db.transaction():
            self._path(name, target)
            self._life.roll_back(name, active, target, Change(who, why))
        self._told(name, target, "serves again", who)
        return {"name": name, "version": target, "rolled_back": active}

    def approve(self, name: str, version: str, *, who: str, why: str = "") -> dict[str, Any]:
        """Let a version that was pulled go on by its policy, up to serving."""
        self._life.approve(name, version, who=who, why=why)
        doorbell.ring(self._settings.node.data_dir, "sidecar")
        return self._told(name, version, "was approved", who)

    def delete(self, name: str, version: str) -> None:
        """Remove the folder of a retired version that was pulled. The version before the active one stays."""
        row = next((r for r in self._life.versions(name) if r["version"] == version), None)
        operation = f"delete {name}@{version}"
        if row is None or row["state"] != ModelState.retired:
            raise OperatorError(operation, "it is not retired", "Retire it first: 'dicomnode models retire'")
        if row["previous"]:
            raise OperatorError(operation, "it is the version before the active one", "It is kept for a roll-back")
        folder = self._settings.node.data_dir / "models" / name / version
        if not any(f.path == folder for f in self.folders()):
            raise OperatorError(operation, "it is not among the pulled ones", "What came with the node stays")
        with self._db.transaction():
            self._removals.begin(name, version, who="operator", why="deleted by hand")
        for removal in self._removals.open():
            if (removal.name, removal.version) == (name, version):
                self._removals.finish(removal)

    def history(self, name: str | None = None, limit: int = 100) -> list[Row]:
        return self._life.history(name, limit)

    def comparisons(self, name: str | None = None, version: str | None = None, limit: int = 100) -> list[Row]:
        return Runs(self._db).comparisons(name, version, limit)

    def _path(self, name: str, version: str) -> Path:
        """Where a version is. Raises OperatorError for one that was removed, BundleError for one that is not here."""
        if self._removals.begun(name, version):
            hint = f"'dicomnode models delete {name}@{version}' ends it, where the sidecar does not"
            raise OperatorError(f"use {name}@{version}", "its folder is being removed to free space", hint)
        try:
            return resolve(self.folders(), f"{name}@{version}", {}).path
        except BundleError:
            removed = self._life.removed_time(name, version)
            if removed is None:
                raise
            cause = f"its folder was removed on {removed} to free space"
            raise OperatorError(f"use {name}@{version}", cause, fetched_again(name, version)) from None

    def _check(self, path: Path, *, serves: bool = True) -> None:
        """Whether the bundle may serve, where it is going to, and that it works. Raises BundleError or EngineError."""
        if serves:
            check_clinical_at(path)
        self._verify(path)

    def _keep_service(self, action: Action, name: str, version: str, who: str) -> None:
        """Before ``version`` is taken out of the default: another becomes the active one, or nothing changes.

        Raises OperatorError where rules name the model and nothing else could serve it, and what
        ``verify`` raises for the version that would have to.
        """
        held = self._life.held_back()
        default = serving_version(self.folders(), name, self._pointer.active(), held)
        ends = default == version and name not in self._pointer.active()
        others = [f for f in self.folders() if f.name == name and f.version != version]
        successor = serving_version(others, name, {}, held)
        if ends and successor is None and any(name in rule.every_model for rule in self._rules()):
            raise OperatorError(
                f"{action} {name}@{version}",
                "it is the only version that can serve the rules that name it",
                f"Activate another version first, or take '{name}' out of [[rules]]",
            )
        if ends and successor is not None:
            self._check(resolve(others, f"{name}@{successor}", {}).path)
        if ends or action != "retire":
            self._pin_default(name, version, who)

    def _pin_default(self, name: str, version: str, who: str) -> None:
        """What serves only because it is the newest on the disk becomes the active one, so that there is a way back."""
        if name in self._pointer.active():
            return
        others = [f for f in self.folders() if f.name == name and f.version != version]
        try:
            default = resolve(others, name, {}, self._life.held_back())
        except BundleError:
            return
        self._life.activate(name, default.version, who=who, why="it served until now without having been activated")

    def _told(self, name: str, version: str, what: str, who: str) -> dict[str, Any]:
        doorbell.ring(self._settings.node.data_dir, "worker")
        Events(self._db).add("info", "model", f"{name}@{version}", f"{what} ({who})")
        return {"name": name, "version": version, "state": self._life.state(name, version)}
