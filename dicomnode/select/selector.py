"""Looks at series that grew, decides when they are complete, and makes their jobs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dicomnode import doorbell, logs, metrics
from dicomnode.errors import NodeError
from dicomnode.geometry import SlicePlane, StackReport, analyse_stack
from dicomnode.index import chain, prior
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database, Row
from dicomnode.index.desired import ServingRules
from dicomnode.index.jobs import Jobs
from dicomnode.index.operation import Events
from dicomnode.index.procedure import Steps
from dicomnode.select.completeness import AssociationEvidence, Evidence, Verdict, decide
from dicomnode.select.rules import requests_for
from dicomnode.select.steps import Standing, StepEvidence, judge, referenced_steps
from dicomnode.settings import Settings

FETCHED = "fetched as an earlier study, not analysed by itself"
FARTHEST_MM = 1e6
"""Positions beyond a kilometre, infinite ones and NaN are no geometry."""


@dataclass(frozen=True, slots=True)
class Known:
    """What the instances of a series said when they were last read: ``stack`` of ``instances``."""

    generation: int
    instances: int
    stack: StackReport | None


class Selector:
    """One pass looks at every open series; call it when rung and when its wait is over."""

    def __init__(self, settings: Settings, db: Database, on_jobs: Callable[[], None] | None = None) -> None:
        self._settings = settings
        self._db = db
        self._catalogue = Catalogue(db)
        self._jobs = Jobs(db)
        self._events = Events(db)
        self._steps = Steps(db)
        self._on_jobs = on_jobs or (lambda: None)
        self._log = logs.get()
        self._reported: set[int] = set()
        self._known: dict[int, Known] = {}
        """By series that is open; each bell is a look at all of them, and most have not changed since the last."""
        self._rules = ServingRules(settings, db)

    def run_once(self) -> float:
        """Select what is complete; returns seconds until the next look is needed at most."""
        wait = doorbell.SLOW_BEAT_SECONDS
        if chain.tend(self._db):
            self._on_jobs()
        found = self._catalogue.open_series()
        self._known = {row["id"]: known for row in found if (known := self._known.get(row["id"])) is not None}
        for series in found:
            try:
                verdict = self._look(series)
            except NodeError:
                raise
            except Exception as error:  # noqa: BLE001 one odd series must not keep the others waiting
                self._report(int(series["id"]), error)
                continue
            wait = min(wait, verdict.wait_seconds) if not verdict.complete else wait
        return max(wait, 0.01)

    def _report(self, series_id: int, error: Exception) -> None:
        if series_id not in self._reported:
            self._reported.add(series_id)
            self._log.error("series cannot be judged", exc_type=type(error).__name__, count=series_id)
            self._events.add(
                "error",
                "selection",
                f"series {series_id}",
                f"it cannot be judged ({type(error).__name__}); report this",
            )

    def _look(self, series: Row) -> Verdict:
        begin = time.perf_counter()
        associations = [
            AssociationEvidence(str(a["state"]), int(a["instances"]))
            for a in self._catalogue.series_associations(series["id"])
        ]
        first = self._catalogue.first_attributes(series["id"])
        expected = stated_count(first)
        count = sum(a.instances for a in associations)
        silent = max(0.0, self._db.clock.ticks() - float(series["last_received_at"] or 0.0))
        quiet = self._settings.completeness.quiet_seconds
        step_seconds = self._settings.completeness.step_seconds
        if count == 0:
            self._jobs.select(series["id"], int(series["generation"]), "no instance is left in it", [])
            return Verdict(True, "")
        standing = self._standing(int(series["id"]), first, count, silent)
        held_back = standing.holds_back(silent, step_seconds)
        if standing.missing and held_back > 0:
            return Verdict(False, "", held_back)  # cheap: whatever its geometry is
        working = any(a.state == "open" for a in associations) and silent < quiet
        if working and not standing.settled and (expected is None or count < expected):
            # Cheap answer while the sender is at work; only a count or a list could end it earlier.
            return Verdict(False, "", quiet - silent)
        known = self._read(series, count)
        evidence = Evidence(
            instances=known.instances,
            associations=associations,
            expected=expected,
            stack=known.stack,
            silent_seconds=silent,
            standing=standing,
        )
        verdict = decide(evidence, quiet, step_seconds)
        if verdict.complete and not verdict.analyse:
            self._withhold(series, verdict.reason)
        elif verdict.complete:
            self._select(series, known.instances, verdict.reason)
            metrics.observe("select", time.perf_counter() - begin)
        return verdict

    def _read(self, series: Row, count: int) -> Known:
        """``count``: of its instances now; each that comes, or comes again otherwise, makes another generation."""
        known = self._known.get(series["id"])
        if known is None or (known.generation, known.instances) != (series["generation"], count):
            instances = self._catalogue.series_instances(series["id"])
            known = Known(int(series["generation"]), len(instances), stack_of(instances))
            self._known[series["id"]] = known
        return known

    def _standing(self, series_id: int, first: Mapping[str, str], count: int, silent: float) -> Standing:
        rows = self._steps.about(series_id, referenced_steps(first))
        if not rows:
            return Standing()
        now = self._db.clock.ticks()
        if not any(row["wrong_entry"] for row in rows):
            # Fewer are here than one step lists: no need to compare UIDs while it is waited for them.
            age = max(0.0, now - max(float(row["changed_at"]) for row in rows))
            short = Standing(missing=max(0, max(int(row["instances"]) for row in rows) - count), age_seconds=age)
            if short.holds_back(silent, self._settings.completeness.step_seconds) > 0:
                return short
        steps = [
            StepEvidence(
                state=str(row["state"]),
                age_seconds=max(0.0, now - float(row["changed_at"])),
                names=row["performed_id"] is not None,
                listed=self._steps.listed(row["performed_id"]) if row["instances"] else frozenset(),
                wrong_entry=bool(row["wrong_entry"]),
            )
            for row in rows
        ]
        return judge(steps, self._steps.held(series_id) if any(s.listed for s in steps) else frozenset())

    def _withhold(self, series: Row, reason: str) -> None:
        """Close a series without an analysis and stop what is under way for it."""
        withdrawn = self._steps.withdraw(series["id"])
        self._jobs.select(series["id"], int(series["generation"]), reason, [])
        self._log.warning("series not analysed", count=series["id"], reason=reason)
        self._events.add(
            "error" if withdrawn.sent else "warning",
            "procedure-step",
            f"series {series['id']}",
            f"not analysed, {reason}: {withdrawn.jobs} job(s) and {withdrawn.deliveries} result(s) withdrawn;"
            f" {withdrawn.sent} result(s) had been sent",
        )

    def _select(self, series: Row, count: int, reason: str) -> None:
        attributes = dict(self._catalogue.series_attributes(series["id"]) or {})
        first = self._catalogue.first_attributes(series["id"])
        uid = str(attributes.get("SeriesInstanceUID"))
        fetched = prior.fetched(self._db, uid)
        requests = [] if fetched else requests_for(self._rules(), {**attributes, **first})
        reason = f"{FETCHED}; {reason}" if fetched else reason
        made = self._jobs.select(series["id"], int(series["generation"]), reason, requests)
        if made:
            self._log.info(
                "series complete",
                series=logs.uid_hash(uid),
                count=count,
                reason=reason,
                job=made,
            )
            self._on_jobs()
        elif not requests:
            self._log.info(
                "series complete, an earlier study that was fetched" if fetched else "series complete, no rule matches",
                series=logs.uid_hash(uid),
                count=count,
            )


def stated_count(attributes: Mapping[str, str]) -> int | None:
    """Number of Series Related Instances (0020,1209), where a sender puts it into its objects."""
    stated = attributes.get("NumberOfSeriesRelatedInstances", "")
    if not (stated.isascii() and stated.isdigit() and len(stated) <= 12):  # IS, PS3.5 6.2; int() has limits of its own
        return None
    return int(stated) or None


def stack_of(instances: Sequence[Row]) -> StackReport | None:
    """Geometry of the images that have one, localizers left out; None when none has."""
    planes = [plane for row in instances if (plane := _plane(row)) is not None]
    return analyse_stack(planes) if planes else None


def _plane(row: Row) -> SlicePlane | None:
    if "LOCALIZER" in str(row["ImageType"]).upper().split("\\"):
        return None
    position = _numbers(row["ImagePositionPatient"], 3)
    orientation = _numbers(row["ImageOrientationPatient"], 6)
    if position is None or orientation is None:
        return None
    return SlicePlane(row["SOPInstanceUID"], position, orientation)  # type: ignore[arg-type]  # lengths checked


def _numbers(text: str, count: int) -> tuple[float, ...] | None:
    parts = (text or "").split("\\")
    if len(parts) != count:
        return None
    try:
        numbers = tuple(float(p) for p in parts)
    except ValueError:
        return None
    return numbers if all(abs(n) <= FARTHEST_MM for n in numbers) else None
