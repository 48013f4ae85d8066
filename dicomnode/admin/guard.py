"""What stands in for authentication in this version: who may look, who may change. Pure rules.

Nothing asks for a password yet. So a change is accepted only when the server is bound to a
loopback address, the caller is on it without a proxy in between, and the request carries a
header that a page of another origin cannot add. The Host header has to be a loopback name,
which ends DNS rebinding.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from urllib.parse import urlsplit

CHANGE_HEADER = "X-Dicomnode"
MAX_BODY_BYTES = 64 * 1024

SECURITY_HEADERS: Mapping[str, str] = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; script-src 'self'; img-src 'self'; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
    "Cache-Control": "no-store",
}
_FORWARDED = ("Forwarded", "X-Forwarded-For", "X-Real-IP", "Via")


def is_loopback(host: str) -> bool:
    """Whether a bind address or host name can only mean this machine."""
    name = host.strip("[]").lower()
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def host_name(host_header: str) -> str:
    """The name in a Host header, without the port; empty when it does not parse."""
    try:
        return urlsplit(f"//{host_header}").hostname or ""
    except ValueError:
        return ""


def refused_host(bind_host: str, host_header: str) -> bool:
    """True when a loopback server is called by a foreign name (DNS rebinding)."""
    return is_loopback(bind_host) and not is_loopback(host_name(host_header))


def refused_change(bind_host: str, remote: str | None, headers: Mapping[str, str]) -> str:
    """Why a change is refused, for the caller; empty when it may go on."""
    if not is_loopback(bind_host):
        return "changes over HTTP need http.host on a loopback address; this version has no login"
    if remote is None or not is_loopback(remote) or any(name in headers for name in _FORWARDED):
        return "changes over HTTP are accepted from this machine only, not through a proxy"
    if CHANGE_HEADER not in headers:
        return f"the header '{CHANGE_HEADER}: 1' is missing"
    origin = headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc.lower() != headers.get("Host", "").lower():
        return "the request comes from a page of another origin"
    if headers.get("Sec-Fetch-Site", "same-origin") not in {"same-origin", "none"}:
        return "the request comes from a page of another origin"
    return ""
