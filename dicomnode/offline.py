"""What ``sync.offline_mode`` means, decided in one place. Pure.

``always``: nothing is asked of the cloud and nothing goes there: results, records, heartbeat and desired state,
remote-write, model metadata and archives, ``doctor``'s look at them, and alerts where their webhook is at the
cloud. All of it waits in its rows. What works inside the hospital goes on: DICOM, ``/metrics``, the dashboard, and
alerts to a webhook inside: a critical finding must not wait for a decision about another building.
``never``: the cloud is never taken for offline: it is tried twice a minute at least.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection
from typing import Literal

Mode = Literal["auto", "always", "never"]
Place = Literal["auto", "hospital", "cloud"]

NEVER_LONGEST = 30.0
"""Seconds of the longest back-off with ``never``."""

HELD = 'sync.offline_mode = "always": nothing is asked of the cloud'


def may_ask(mode: Mode, *, inside: bool = False) -> bool:
    """Whether something that talks to another machine may do so now. ``inside``: that machine is the hospital's."""
    return inside or mode != "always"


def longest_wait(mode: Mode, longest: float) -> float:
    """Seconds of the longest back-off where the configuration says ``longest``."""
    return min(longest, NEVER_LONGEST) if mode == "never" else longest


def is_inside(place: Place, host: str, cloud_hosts: Collection[str], addresses: Collection[str]) -> bool:
    """Whether a webhook at ``host`` is inside the hospital.

    With ``auto``: it is no host of [cloud], and all its ``addresses`` (of the name, as it resolves now; none
    where it does not) are of private ranges or of this machine.
    """
    if place != "auto":
        return place == "hospital"
    if host in cloud_hosts or not addresses:
        return False
    return not any(_public(address) for address in addresses)


def _public(address: str) -> bool:
    ip = ipaddress.ip_address(address.partition("%")[0])
    inner = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return (inner or ip).is_global
