"""Which states are good, bad, or ask for a look; the colours of the dashboard. Pure."""

from __future__ import annotations

_GOOD = {
    "review_decided",
    "done",
    "stored",
    "committed",
    "reported",
    "answered",
    "ready",
    "ok",
    "info",
    "activated",
    "placed",
    "active",
    "default",
    "superseded",
    "skipped",
    "valid",
    "online",
    "well",
}
_BAD = {"failed", "rejected", "error", "silent_state", "problem", "expired", "offline"}
_WARN = {
    "review_open",
    "canary",
    "refused",
    "away",
    "unknown",
    "not-run",
    "warning",
    "starting",
    "stopping",
    "retried",
    "expiring",
    "degraded",
}


def tone_of(state: str) -> str:
    """A class of the style sheet. What is only on its way has no colour."""
    return "good" if state in _GOOD else "bad" if state in _BAD else "warn" if state in _WARN else "plain"
