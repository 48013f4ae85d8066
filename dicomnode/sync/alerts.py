"""Webhook for critical findings: signed, repeated until taken, without patient data.

One POST of JSON for each critical job. By default the study and series are named by an HMAC of
their UIDs: who has the secret can find them among its own, nobody else can. Values are not sent.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import socket
from typing import Any

import aiohttp

from dicomnode import logs
from dicomnode.errors import NodeError, OperatorError
from dicomnode.index.database import Database, Row
from dicomnode.index.operation import Events
from dicomnode.index.urgency import Alerts
from dicomnode.offline import HELD, is_inside, longest_wait, may_ask
from dicomnode.settings import Cloud, Settings
from dicomnode.sync.faults import reason
from dicomnode.sync.http import confidential, open_session, origin

SIGNATURE = "X-Dicomnode-Signature"
MOST_SECRET_BYTES = 4096
REFUSED_FOR_GOOD = frozenset({400, 410, 413, 415, 422})
"""Statuses that the same message will meet again; others pass once somebody has acted."""


def message(alert: Row, *, node: str, secret: bytes, identify: str) -> bytes:
    """The body. Pure; the same alert always has the same one."""

    def named(uid: str) -> str:
        return uid if identify == "uid" else hmac.new(secret, uid.encode(), hashlib.sha256).hexdigest()

    body = {
        "type": "critical-result",
        "id": alert["uuid"],
        "node": node,
        "time": alert["created_time"],
        "job": alert["job_id"],
        "model": alert["model"],
        "model_version": alert["model_version"],
        "revision": alert["revision"],
        "rules": json.loads(alert["rules"] or "[]"),
        "critical": json.loads(alert["keys"]),
        "identified_by": identify,
        "study": named(str(alert["StudyInstanceUID"])),
        "series": named(str(alert["SeriesInstanceUID"])),
    }
    return json.dumps(body, sort_keys=True, separators=(",", ":")).encode()


def signature(secret: bytes, timestamp: int, body: bytes) -> str:
    """``t=<Unix seconds>,v1=<hex HMAC-SHA-256 of "t.body">``: neither changed nor replayed much later."""
    digest = hmac.new(secret, f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={timestamp},v1={digest}"


def cloud_hosts(settings: Settings) -> frozenset[str]:
    """Hosts that take results: what is sent to one of them goes to the cloud. Pure."""
    urls = [u for e in settings.cloud.endpoints for u in (e.stow_url, e.records_url, e.health_url)]
    return frozenset(origin(u)[1] for u in urls if u)


def verdict(status: int) -> str:
    """What a reply means: ``stored``, ``retry`` or ``reject``. Pure."""
    if 200 <= status < 300:
        return "stored"
    return "reject" if status in REFUSED_FOR_GOOD else "retry"


class AlertSender:
    """One per node, in the sidecar; sends one alert at a time, the oldest first."""

    def __init__(self, settings: Settings, db: Database) -> None:
        self._alerts, self._mode = settings.alerts, settings.sync.offline_mode
        self._cloud_hosts = cloud_hosts(settings)
        self._held = False
        self._delivery = settings.delivery
        self._node = settings.node.ae_title
        self._db = db
        self._outbox = Alerts(db)
        self._log = logs.get()

    async def flush(self) -> int:
        """Send what is due; the number that was taken. A failing alert does not stop the others."""
        if not self._alerts.url:
            return 0
        due = await asyncio.to_thread(self._outbox.due)
        if due and not await self._may_go():
            return 0
        taken = 0
        for alert in due:
            taken += await self._send(alert)
        return taken

    async def _may_go(self) -> bool:
        """Whether alerts may leave now: to a webhook inside the hospital always. An event tells that they wait."""
        inside = not may_ask(self._mode) and await self._inside()
        held, self._held = self._held, not may_ask(self._mode, inside=inside)
        if self._held and not held:
            hint = 'alerts.place = "hospital" says that the webhook is inside'
            text = f"{HELD}, and alerts.url is at the cloud or cannot be looked up: alerts wait. {hint}"
            await asyncio.to_thread(Events(self._db).add, "error", "alert-held", "alerts", text)
        return not self._held

    async def _inside(self) -> bool:
        scheme, host, port = origin(self._alerts.url)
        del scheme
        try:
            found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError:
            found = []
        return is_inside(self._alerts.place, host, self._cloud_hosts, {str(one[4][0]) for one in found})

    async def _send(self, alert: Row) -> int:
        try:
            fate, cause = await self._post(alert)
        except NodeError as error:
            fate, cause = "retry", str(error)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            fate, cause = "retry", f"alerts.url cannot be reached ({reason(error)})"
        await asyncio.to_thread(self._settle, alert, fate, cause)
        return int(fate == "stored")

    async def _post(self, alert: Row) -> tuple[str, str]:
        if not confidential(self._alerts.url):
            raise OperatorError("send an alert", "alerts.url is not https", "Alerts concern patients")
        secret = await asyncio.to_thread(self._secret)
        body = message(alert, node=self._node, secret=secret, identify=self._alerts.identify)
        headers = {
            "Content-Type": "application/json",
            "Idempotency-Key": str(alert["uuid"]),
            SIGNATURE: signature(secret, int(self._db.clock.wall().timestamp()), body),
        }
        how = Cloud(ca_file=self._alerts.ca_file, timeout_seconds=self._alerts.timeout_seconds)
        async with (
            open_session(how, self._alerts.url) as session,
            session.post(self._alerts.url, data=body, headers=headers, allow_redirects=False) as response,
        ):
            return verdict(response.status), "" if response.status < 300 else f"HTTP status {response.status}"

    def _secret(self) -> bytes:
        """Read anew each time, so that it can be rotated. Never logged."""
        path = self._alerts.secret_file
        try:
            data = path.read_bytes()[:MOST_SECRET_BYTES].strip() if path else b""
        except OSError as error:
            raise OperatorError("read alerts.secret_file", error.strerror or "unreadable", "Check the file") from None
        if len(data) < 16:
            raise OperatorError("read alerts.secret_file", "it holds fewer than 16 bytes", "Make a longer secret")
        return data

    def _settle(self, alert: Row, fate: str, cause: str) -> None:
        fields: dict[str, Any] = {"job": alert["job_id"], "cause": cause, "attempts": alert["attempts"] + 1}
        if fate == "stored":
            self._outbox.stored(alert["id"])
            self._log.info("alert taken", **fields)
        elif fate == "retry":
            longest = longest_wait(self._mode, min(self._delivery.backoff_max_seconds, 300.0))
            self._outbox.retry(alert["id"], cause, first=self._delivery.backoff_seconds, longest=longest)
            self._log.warning("alert not taken", **fields)
            if alert["attempts"] == 2:
                Events(self._db).add("error", "alert-waiting", f"alert {alert['id']}", f"{cause}; tried on")
        else:
            self._outbox.reject(alert["id"], cause)
            self._log.error("alert rejected", **fields)
            Events(self._db).add("error", "alert-rejected", f"alert {alert['id']}", cause)
