"""Who is let in: by a token, or, where there are none, from this machine alone. Pure.

A proxy on the same host calls from loopback, and need neither say so (nginx as it comes) nor keep the name that was
asked for. So loopback counts for nothing where there are tokens: pages are for the administrator's token too, which
a browser gives as the password of HTTP Basic (RFC 7617). It is taken for pages only, which change nothing, since
browsers also send it along for pages of others.
"""

from __future__ import annotations

import base64
import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

_FORWARDED = frozenset({"forwarded", "via", "x-real-ip", "x-client-ip", "x-cluster-client-ip", "true-client-ip"})


def is_page(method: str, path: str) -> bool:
    """For people to look at."""
    return method in {"GET", "HEAD"} and (path in {"/", "/style.css"} or path.startswith("/objects/"))


def token_of(authorization: str, *, page: bool) -> str:
    """The token that a request shows; empty where it shows none. ``page``: as a password, too."""
    scheme, _, rest = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return rest.strip()
    if page and scheme.lower() == "basic":
        try:
            return base64.b64decode(rest.strip(), validate=True).decode().partition(":")[2]
        except ValueError:
            return ""
    return ""


def is_here(remote: str, headers: Mapping[str, str]) -> bool:
    """Whether a request comes from this machine, by a name of it (else DNS rebinding), and nobody passed it on."""
    passed_on = any(n.lower() in _FORWARDED or n.lower().startswith("x-forwarded") for n in headers)
    return is_loopback(remote) and is_loopback(_host(headers.get("Host", ""))) and not passed_on


def is_anothers(headers: Mapping[str, str]) -> bool:
    """Whether a page of another site makes the browser ask."""
    return headers.get("Sec-Fetch-Site", "none") not in {"none", "same-origin"} or "Origin" in headers


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _host(header: str) -> str:
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""
