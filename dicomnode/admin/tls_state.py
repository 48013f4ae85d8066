"""Which certificates TLS stands on and until when, as status, dashboard and /metrics show it.

The node's own is read from its file; those of peers are what receivers and courier last saw.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from dicomnode import metrics, metrics_told
from dicomnode.certificates import facts_of, load_authorities, now, plain
from dicomnode.errors import OperatorError
from dicomnode.settings import Settings, Tls

SOON = timedelta(days=30)


@dataclass(frozen=True, slots=True)
class Shown:
    """One certificate; ``peer`` is empty for the node's own."""

    not_after: datetime
    peer: str = ""
    subject: str = ""
    sha256: str = ""

    def as_json(self, moment: datetime) -> dict[str, Any]:
        left = self.not_after - moment
        found: dict[str, Any] = {
            "not_after": self.not_after.isoformat(timespec="seconds"),
            "days_left": left.days,
            "state": "expired" if left <= timedelta(0) else "expiring" if left < SOON else "valid",
        }
        if self.peer:
            return {"peer": self.peer, **found}
        return {"subject": self.subject, "sha256": self.sha256, **found}


def own_certificate(tls: Tls) -> Shown | None:
    """None without one in the settings. Raises OperatorError when its file cannot be read."""
    if tls.certificate_file is None:
        return None
    try:
        facts = facts_of(load_authorities(tls.certificate_file, "tls.certificate_file")[0])
    except ValueError as error:
        raise OperatorError("read TLS files", f"tls.certificate_file {tls.certificate_file}: {error}") from None
    subject = plain(next(iter(facts.names), ""), 64)
    return Shown(facts.not_after, subject=subject, sha256=facts.sha256)


def peer_certificates(processes: Iterable[Mapping[str, Any]]) -> list[Shown]:
    """Of each peer the one that is valid longest: a process that saw the former one may not have met the new one."""
    ends: dict[str, float] = {}
    for row in processes:
        for _, labels, end in metrics_told.told(str(row["metrics"] or ""), metrics.TLS_PEER_EXPIRY):
            peer = labels.get("peer", "")
            ends[peer] = max(ends.get(peer, 0.0), end)
    # A snapshot is text of an index that may be damaged; 253402300799 is the last second of year 9999.
    return [
        Shown(datetime.fromtimestamp(end, UTC), peer=peer)
        for peer, end in sorted(ends.items())
        if 0 < end <= 253402300799
    ]


def tls_report(
    settings: Settings, processes: Iterable[Mapping[str, Any]], moment: datetime | None = None
) -> dict[str, Any]:
    """The key ``tls`` of the status report; ``fault`` says why the own certificate cannot be shown."""
    moment = moment or now()
    fault, own = "", None
    try:
        own = own_certificate(settings.tls)
    except OperatorError as error:
        fault = error.cause
    return {
        "port": settings.tls.port,
        "required": settings.tls.required,
        "certificate": own.as_json(moment) if own else None,
        "fault": fault,
        "peers": [peer.as_json(moment) for peer in peer_certificates(processes)],
    }
