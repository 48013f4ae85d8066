"""How each version of a model does: agreement, latency, failures, drift. From rows, for metrics and the dashboard."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily, Metric

from dicomnode.drift import Drift, drift
from dicomnode.index.database import Database
from dicomnode.index.life import Life
from dicomnode.index.runs import Runs
from dicomnode.rollout import Limits, agreement
from dicomnode.settings import RolloutSettings

HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class VersionFigures:
    """One version in its window (``rollout.watch_runs``, ``rollout.watch_hours``).

    ``seconds``: quantile -> seconds of reading, inference and post-processing of a series.
    ``agreement`` and ``mean_least_dice`` are None without comparisons.
    """

    name: str
    version: str
    state: str = ""
    runs: dict[str, int] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    compared: int = 0
    failed_comparisons: int = 0
    agreement: float | None = None
    mean_least_dice: float | None = None
    drift: dict[str, Drift] = field(default_factory=dict)
    rolled_back_at: float | None = None


def version_figures(db: Database, settings: RolloutSettings) -> list[VersionFigures]:
    """All versions that have a state or have analysed something. Blocking."""
    life, runs = Life(db), Runs(db)
    states = {(r["name"], r["version"]): str(r["state"]) for r in life.versions()}
    back = {(r["name"], r["version"]): datetime.fromisoformat(r["time"]).timestamp() for r in life.rolled_back()}
    since = db.clock.ticks() - settings.watch_hours * HOUR
    limits = Limits(min_dice=settings.min_dice, max_difference=settings.max_difference)
    found = []
    for name, version in sorted(states.keys() | set(runs.known_versions())):
        recent = runs.recent(name, version, settings.watch_runs, since=since)
        compared = runs.compared(name, version, settings.watch_runs, since=since)
        dice = [c.least_dice for c in compared if c.least_dice is not None]
        outputs = runs.outputs(name, version)
        keys = sorted({key for one in outputs for key in one})
        moved = {
            key: d
            for key in keys
            if (d := drift([o[key] for o in outputs if key in o], settings.drift_reference, settings.drift_window))
        }
        found.append(
            VersionFigures(
                name,
                version,
                states.get((name, version), ""),
                dict(Counter(r.state for r in recent)),
                quantiles([r.seconds for r in recent if r.state == "done"]),
                len(compared),
                runs.failed_comparisons(name, version, settings.watch_runs, since=since),
                agreement(compared, limits),
                sum(dice) / len(dice) if dice else None,
                moved,
                back.get((name, version)),
            )
        )
    return found


def quantiles(seconds: list[float]) -> dict[str, float]:
    """``0.5`` and ``0.95``, nearest rank; empty without values."""
    ordered = sorted(seconds)
    return {q: ordered[min(len(ordered) - 1, int(float(q) * len(ordered)))] for q in ("0.5", "0.95")} if ordered else {}


def families(figures: list[VersionFigures]) -> list[Metric]:
    """Gauges by model and version; pure. Names of measurements come from verified bundles."""

    def gauge(name: str, text: str, labels: tuple[str, ...], values: list[tuple[tuple[str, ...], float]]) -> Metric:
        family = GaugeMetricFamily(f"dicomnode_model_{name}", text, labels=("model", "version", *labels))
        for label_values, value in values:
            family.add_metric(label_values, float(value))
        return family

    def each(value: Any) -> list[tuple[tuple[str, ...], float]]:
        return [((f.name, f.version), v) for f in figures if (v := value(f)) is not None]

    return [
        gauge(
            "state_info",
            "1 for the state of a version: staged, shadow, canary, active, retired",
            ("state",),
            [((f.name, f.version, f.state), 1.0) for f in figures if f.state],
        ),
        gauge(
            "runs",
            "Attempts of a version in its window by how they ended",
            ("outcome",),
            [((f.name, f.version, outcome), n) for f in figures for outcome, n in sorted(f.runs.items())],
        ),
        gauge(
            "run_seconds",
            "Reading, inference and post-processing of a series by a version in its window, seconds",
            ("quantile",),
            [((f.name, f.version, q), s) for f in figures for q, s in f.seconds.items()],
        ),
        gauge("comparisons", "Comparisons of a version in its window", (), each(lambda f: f.compared)),
        gauge(
            "comparisons_failed",
            "Comparisons that did not come about, in the window",
            (),
            each(lambda f: f.failed_comparisons),
        ),
        gauge(
            "agreement_ratio",
            "Share of the comparisons of a version that agree with the other one, 0 to 1",
            (),
            each(lambda f: f.agreement),
        ),
        gauge(
            "least_dice_mean",
            "Mean over comparisons of the Dice of the segment that agrees least",
            (),
            each(lambda f: f.mean_least_dice),
        ),
        gauge(
            "drift_psi",
            "Population stability index of a measurement: last analyses of a version against its first, less chance",
            ("measurement",),
            [((f.name, f.version, key), d.psi) for f in figures for key, d in f.drift.items()],
        ),
        gauge(
            "drift_mean_ratio",
            "Mean of a measurement in the last analyses divided by that in the first ones",
            ("measurement",),
            [
                ((f.name, f.version, key), d.recent_mean / d.reference_mean)
                for f in figures
                for key, d in f.drift.items()
                if d.reference_mean
            ],
        ),
        gauge(
            "rolled_back_timestamp_seconds",
            "When the node last rolled a version back by itself, Unix time",
            (),
            each(lambda f: f.rolled_back_at),
        ),
    ]
