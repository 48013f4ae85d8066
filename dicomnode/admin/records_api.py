"""Records and conflicts over HTTP. Lists name fields; values are shown on this machine only, like changes."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from aiohttp import web

from dicomnode import doorbell
from dicomnode.admin import guard
from dicomnode.admin.exchange import json_answer, limit_of
from dicomnode.errors import OperatorError
from dicomnode.index.database import Database
from dicomnode.index.record_reviews import TAKES, Reviews
from dicomnode.record_shapes import FIELDS
from dicomnode.settings import Settings

NAME = r"{type:[a-z][a-z0-9-]{0,31}}/{name:[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}}"
STATES = ("open", "decided")


class RecordsApi:
    def __init__(self, db: Database, settings: Settings) -> None:
        self._settings = settings
        self._reviews = Reviews(db, settings.cloud_plan)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/api/v1/records", self.records)
        router.add_get("/api/v1/records/refused", self.refused)
        router.add_get(f"/api/v1/records/{NAME}", self.record)
        router.add_put(f"/api/v1/records/{NAME}", self.change)
        router.add_get("/api/v1/conflicts", self.conflicts)
        router.add_get(r"/api/v1/conflicts/{id:\d{1,15}}", self.conflict)
        router.add_post(r"/api/v1/conflicts/{id:\d{1,15}}/decide", self.decide)

    async def records(self, request: web.Request) -> web.Response:
        kind = request.query.get("type") or None
        rows = await asyncio.to_thread(self._reviews.records, limit_of(request), kind)
        return json_answer({"records": rows})

    async def refused(self, request: web.Request) -> web.Response:
        return json_answer({"refused": await asyncio.to_thread(self._reviews.refused, limit_of(request))})

    async def record(self, request: web.Request) -> web.Response:
        self._near(request)
        return json_answer(
            await asyncio.to_thread(self._reviews.record, request.match_info["type"], request.match_info["name"])
        )

    async def change(self, request: web.Request) -> web.Response:
        body = await _body(request, {"changes"}, {"blank"})
        blank = body.get("blank", [])
        kind, name, changes = request.match_info["type"], request.match_info["name"], body["changes"]
        if not isinstance(changes, dict):
            raise OperatorError(
                "read request", "changes is not an object", f"Fields: {', '.join(FIELDS.get(kind, ()))}"
            )
        if not isinstance(blank, list) or not all(isinstance(one, str) for one in blank):
            raise OperatorError("read request", "blank is not a list of names", "Fields that are to have no value")
        identified = self._settings.sync.patients_identity == "kept"

        def run() -> int:
            return self._reviews.change(kind, name, changes, identified=identified, blank=blank)

        version = await asyncio.to_thread(run)
        self._ring()
        return json_answer({"type": kind, "record_id": name, "version": version or None})

    async def conflicts(self, request: web.Request) -> web.Response:
        state = request.query.get("state") or None
        if state is not None and state not in STATES:
            raise OperatorError("read query", "state is unknown", f"Use one of: {', '.join(STATES)}")
        return json_answer({"conflicts": await asyncio.to_thread(self._reviews.listing, limit_of(request), state)})

    async def conflict(self, request: web.Request) -> web.Response:
        self._near(request)
        return json_answer(await asyncio.to_thread(self._reviews.show, int(request.match_info["id"])))

    async def decide(self, request: web.Request) -> web.Response:
        body = await _body(request, {"take"}, {"data"})
        if body["take"] not in TAKES or not isinstance(body.get("data", {}), dict):
            raise OperatorError("read request", "take or data is not as described", f"take: {', '.join(TAKES)}")

        def run() -> dict[str, Any]:
            who = f"api:{request.remote or 'unknown'}"
            return self._reviews.decide(int(request.match_info["id"]), body["take"], body.get("data"), who=who)

        done = await asyncio.to_thread(run)
        self._ring()
        return json_answer(done)

    def _near(self, request: web.Request) -> None:
        """There is no login yet, so values are shown to whom may change them."""
        why = guard.refused_change(self._settings.http.host, request.remote, request.headers)
        if why:
            hint = f"On the node: curl -H '{guard.CHANGE_HEADER}: 1' ..., or the dicomnode command"
            error = {"operation": "show record", "cause": why.replace("changes", "values"), "hint": hint}
            raise web.HTTPForbidden(text=json.dumps({"error": error}), content_type="application/json")

    def _ring(self) -> None:
        doorbell.ring(self._settings.node.data_dir, "sidecar")


async def _body(request: web.Request, needed: set[str], optional: set[str] | None = None) -> dict[str, Any]:
    try:
        body = json.loads(await request.text() or "{}")
    except (ValueError, UnicodeDecodeError, RecursionError):
        body = None
    if not isinstance(body, dict) or not needed <= body.keys() <= needed | (optional or set()):
        known = ", ".join(sorted(needed | (optional or set())))
        raise OperatorError("read request", "the body is not as described", f"An object with: {known}")
    return body
