"""The models that serve: verified on this box's engine before their first job, then kept."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cmp_to_key
from pathlib import Path
from typing import Any

from dicomnode import logs, metrics
from dicomnode.errors import BundleError, EngineError
from dicomnode.index.database import Database
from dicomnode.index.life import Life
from dicomnode.index.operation import Events, Models, Severity
from dicomnode.infer.bundle import BundleFolder, compare_versions, find_bundles
from dicomnode.infer.choice import EngineChoice, NotBuilt, engine_name, engine_text
from dicomnode.infer.engine import Engine
from dicomnode.infer.golden import ReadyModel
from dicomnode.infer.purpose import check_clinical_at
from dicomnode.infer.upgrades import Upgrades


def bundle_folders(models_dir: Path, data_dir: Path) -> list[BundleFolder]:
    """Bundles that came with the node and those that were pulled; pulled ones go last."""
    return [*find_bundles(models_dir), *find_bundles(data_dir / "models")]


def resolve(
    folders: Sequence[BundleFolder],
    reference: str,
    active: dict[str, str],
    held_back: Mapping[str, frozenset[str]] | None = None,
) -> BundleFolder:
    """Which version of ``name`` or ``name@version`` serves. Pure.

    A version in the reference wins, then the activated one, then the newest release that is
    not ``held_back`` (staged, on trial or retired). Raises BundleError naming what there is.
    """
    name, _, version = reference.partition("@")
    version = version or active.get(name, "")
    held = (held_back or {}).get(name, frozenset()) if not version else frozenset()
    candidates = [f for f in folders if f.name == name and version in ("", f.version) and f.version not in held]
    if not candidates:
        known = ", ".join(f"{f.name}@{f.version}" for f in folders) or "none"
        wanted = f"{name}@{version}" if version else name
        if idle := ", ".join(f"{f.name}@{f.version}" for f in folders if f.name == name and f.version in held):
            cause = f"no version of {name} serves: {idle} is staged, on trial or retired"
            raise BundleError("find model", cause, f"'dicomnode models activate {name}@VERSION' lets one serve")
        raise BundleError("find model", f"there is no bundle {wanted}", f"Present: {known}. See inference.models_dir")
    releases = [f for f in candidates if "-" not in f.version] or candidates
    best = releases[0]
    for folder in releases[1:]:
        if compare_versions(folder.version, best.version) > 0:
            best = folder
    return best


def serving_version(
    folders: Sequence[BundleFolder], name: str, active: dict[str, str], held_back: Mapping[str, frozenset[str]]
) -> str | None:
    """The version of ``name`` that serves whoever is no canary's; None when there is none. Pure."""
    try:
        return resolve(folders, name, active, held_back).version
    except BundleError:
        return None


def version_before(
    folders: Sequence[BundleFolder],
    name: str,
    active: str | None,
    served: Sequence[str],
    held_back: Mapping[str, frozenset[str]] | None = None,
) -> str | None:
    """What a roll-back of ``name`` returns to. Pure.

    The last of those that ``served`` before (:meth:`Life.served_before`) and are on this box;
    where none did, the one that served by default, which is the newest other release that is not
    ``held_back``. None when nothing was activated or there is no such version.
    """
    if active is None:
        return None
    present = {f.version for f in folders if f.name == name}
    if served:
        return next((version for version in served if version in present), served[0])
    others = [f for f in folders if f.name == name and f.version != active]
    return serving_version(others, name, {}, held_back or {})


RETRY_SECONDS = 30.0
"""A bundle that cannot serve is looked at again this often while no job asks for it."""


class ServingModels:
    """Loads on demand and keeps what is loaded until another version takes its place."""

    def __init__(
        self,
        db: Database,
        engine: Engine | EngineChoice,
        *,
        models_dir: Path,
        data_dir: Path,
        threads: int,
        on_better: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_better`` is called, in another thread, when a model can move to a better engine."""
        self._models = Models(db)
        self._life = Life(db)
        self._events = Events(db)
        if not isinstance(engine, EngineChoice):
            engine = EngineChoice(engine.name, [engine], threads=threads)
        self._choice = engine
        self._upgrades = Upgrades(engine, on_better)
        self._spare: dict[Path, ReadyModel] = {}
        self._retired: list[ReadyModel] = []
        """Stand-ins out of service; a job that stands still for a more urgent one may be in the middle of one."""
        self._models_dir = models_dir
        self._data_dir = data_dir
        self._ready: dict[str, ReadyModel] = {}
        self._held: list[ReadyModel] = []
        self._replaced: list[ReadyModel] = []
        self._errors: dict[str, str] = {}
        self._not_before: dict[str, float] = {}
        self._log = logs.get()

    def get(self, reference: str) -> ReadyModel:
        """A model that has passed its golden cases.

        When the version that should serve cannot, the last good one does: the one that is
        loaded, else the one that was active before, else the next older release. A rule that
        pins ``name@version`` gets that version or nothing. Raises BundleError or EngineError
        when none can serve.
        """
        folders = bundle_folders(self._models_dir, self._data_dir)
        wanted = resolve(folders, reference, self._models.active(), self._life.held_back())
        known = self._ready.get(reference)
        if known is not None and known.identity.version == wanted.version:
            better = self._upgrades.take(wanted.path)
            if better is not None:
                return self._swap(reference, better)
            if self._choice.may_improve(known):
                self._upgrades.want(wanted.path, engine_text(known))
            return known
        good = known is not None and known.identity.version not in self._life.unfit(wanted.name)
        if known is not None and good and time.monotonic() < self._not_before.get(reference, 0.0):
            return known
        try:
            ready = self._open(wanted)
        except Exception as error:
            self._fail(reference, str(error))
            if "@" in reference:
                raise
            if known is not None and good:
                return known
            fallback = self._fallback(folders, wanted)
            if fallback is None:
                self.forget(reference)  # what is loaded was rolled back: no answer is better than its
                raise
            ready = fallback
        else:
            self._errors.pop(reference, None)
        return self._swap(reference, ready)

    def _swap(self, reference: str, ready: ReadyModel) -> ReadyModel:
        known = self._ready.get(reference)
        if known is not None:
            _told(known, on=False)
            self._replaced.append(known)
            self._drop_spare(known.bundle.path)
        self._ready[reference] = ready
        _told(ready)
        return ready

    def other(self, model: ReadyModel) -> ReadyModel | None:
        """The same model on the engine after the one that failed for a job; None when there is none.

        Raises EngineError when the next engine cannot serve it.
        """
        if not self._choice.has_other(model):
            return None
        path = model.bundle.path
        if path not in self._spare:
            self._spare[path] = self._choice.open(path, below=engine_name(model)).model
        return self._spare[path]

    def settled(self, model: ReadyModel) -> bool:
        """Whether it runs on the engine that it will stay on: none before it is being built, or due to be tried."""
        return self._choice.settled(model)

    def for_job(self, reference: str, record: Callable[[Mapping[str, Any]], None]) -> ReadyModel:
        """``get``; with one engine there is no decision to ``record``."""
        del record
        return self.get(reference)

    def forget(self, reference: str = "") -> None:
        """Take out of service what is loaded, of one reference or of all: it is verified again before it serves."""
        for name in [reference] if reference else list(self._ready):
            known = self._ready.pop(name, None)
            if known is not None:
                _told(known, on=False)
                self._retired.append(known)
                self._drop_spare(known.bundle.path)
            self._not_before.pop(name, None)

    def _drop_spare(self, path: Path) -> None:
        if (spare := self._spare.pop(path, None)) is not None:
            self._retired.append(spare)

    def _open(self, folder: BundleFolder) -> ReadyModel:
        """On the best engine that is built; a better one is built beside serving. Never one for benchmarks."""
        check_clinical_at(folder.path)
        ready = self._upgrades.take(folder.path)
        if ready is None:
            try:
                opened = self._choice.open(folder.path)
            except NotBuilt:
                self._upgrades.want(folder.path, "")
                raise
            ready = opened.model
            if opened.better:
                self._upgrades.want(folder.path, engine_text(ready))
        self._log.info(
            "model verified",
            model=folder.name,
            version=folder.version,
            engine=ready.report.engine,
            digest=ready.identity.digest[:16],
        )
        return ready

    def _fallback(self, folders: Sequence[BundleFolder], failed: BundleFolder) -> ReadyModel | None:
        """The best of the other versions that passes, or None."""
        previous = self._models.previous(failed.name)
        others = [f for f in folders if f.name == failed.name and f.version != failed.version and "-" not in f.version]
        unfit = self._life.unfit(failed.name)
        others = [f for f in others if f.version not in unfit]
        others.sort(key=cmp_to_key(lambda a, b: compare_versions(b.version, a.version)))
        others.sort(key=lambda f: f.version != previous)
        for folder in others:
            try:
                ready = self._open(folder)
            except (BundleError, EngineError) as error:
                self._log.error("model cannot serve", model=folder.name, version=folder.version, error=str(error))
                continue
            self._log.warning("the last good version serves", model=folder.name, version=folder.version)
            return ready
        return None

    def prepare(self, references: Sequence[str]) -> None:
        """Between jobs: verify all of these; what fails is reported and tried again with its next job."""
        while self._retired:
            self._retired.pop().close()
        self._close_replaced()
        for reference in references:
            if time.monotonic() < self._not_before.get(reference, 0.0):
                continue
            try:
                self.get(reference)
            except Exception as error:  # noqa: BLE001 one bad bundle must not stop the others
                self._fail(reference, str(error))
                self._log.error("model cannot serve", model=reference, error=str(error))

    def hold(self, model: ReadyModel) -> None:
        """A job begins with it: until :meth:`let_go` it stays open, whatever takes its place meanwhile."""
        self._held.append(model)

    def let_go(self, model: ReadyModel) -> None:
        index = next(i for i, held in enumerate(self._held) if held is model)
        del self._held[index]
        self._close_replaced()

    def _close_replaced(self) -> None:
        still = [m for m in self._replaced if any(m is held for held in self._held)]
        for model in self._replaced:
            if not any(model is held for held in still):
                model.close()
        self._replaced = still

    def keep(self, references: Sequence[str]) -> None:
        """Give back what none of these needs any more, such as a canary that was retired."""
        for reference in [r for r in self._ready if r not in references]:
            _told(self._ready[reference], on=False)
            known = self._ready.pop(reference)
            self._replaced.append(known)
            self._drop_spare(known.bundle.path)
        self._close_replaced()
        self._upgrades.keep({model.bundle.path for model in self._ready.values()} | self._wanted(references))
        for reference in [r for r in self._errors if r not in references]:
            del self._errors[reference]

    def _wanted(self, references: Sequence[str]) -> set[Path]:
        """Folders of the versions that should serve, loaded or not."""
        folders = bundle_folders(self._models_dir, self._data_dir)
        active, held = self._models.active(), self._life.held_back()
        found: set[Path] = set()
        for reference in references:
            with contextlib.suppress(BundleError):
                found.add(resolve(folders, reference, active, held).path)
        return found

    def _fail(self, reference: str, error: str) -> None:
        self._not_before[reference] = time.monotonic() + RETRY_SECONDS
        if self._errors.get(reference) != error:
            self._errors[reference] = error
            severity: Severity = "info" if "BUILDING:" in error else "error"
            self._events.add(severity, "model", reference, error)

    def report(self) -> dict[str, object]:
        """For the heartbeat: what serves, with version and engine, and what cannot."""
        return {
            "ready": {
                reference: {
                    "name": m.identity.name,
                    "version": m.identity.version,
                    "engine": m.report.engine,
                    "digest": m.identity.digest,
                    "rejected": [f"{r.engine} {r.code}: {r.text}" for r in self._choice.refusals(m.bundle.digest)],
                }
                for reference, m in list(self._ready.items())  # asked by the thread of the heartbeat
            },
            "failed": dict(self._errors),
            "building": self._upgrades.report(),
        }


def _told(model: ReadyModel, *, on: bool = True) -> None:
    engine, _, precision = engine_text(model).partition(" ")
    metrics.serves(model.identity.name, model.identity.version, engine, precision, on=on)
