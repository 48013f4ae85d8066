"""The life of models over HTTP. What changes comes from the composition root, which may verify bundles."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Protocol

from aiohttp import web

from dicomnode.admin.exchange import json_answer, limit_of
from dicomnode.errors import OperatorError
from dicomnode.index.database import Database, Row
from dicomnode.index.life import Life
from dicomnode.index.runs import Runs

ACTIONS = ("stage", "shadow", "canary", "activate", "retire")
NAME = r"{name:[a-z0-9][a-z0-9_.-]{0,63}}"
VERSION = r"{version:[0-9][0-9A-Za-z.+-]{0,63}}"


class Desk(Protocol):
    """:class:`dicomnode.model_desk.ModelDesk`; every call blocks, a change for as long as golden cases take."""

    def listing(self) -> list[Row]: ...

    def history(self, name: str | None = None, limit: int = 100) -> list[Row]: ...

    def comparisons(self, name: str | None = None, version: str | None = None, limit: int = 100) -> list[Row]: ...

    def change(
        self,
        action: Any,
        name: str,
        version: str,
        *,
        who: str,
        why: str = "",
        percent: float = 0.0,
        peers: Sequence[str] = (),
    ) -> dict[str, Any]: ...

    def approve(self, name: str, version: str, *, who: str, why: str = "") -> dict[str, Any]: ...

    def roll_back(self, name: str, *, who: str, why: str = "") -> dict[str, Any]: ...


class IndexOnly:
    """Shows what the index knows; changes need bundles, which only the composition root can verify."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def listing(self) -> list[Row]:
        return [{**row, "path": None} for row in Life(self._db).versions()]

    def history(self, name: str | None = None, limit: int = 100) -> list[Row]:
        return Life(self._db).history(name, limit)

    def comparisons(self, name: str | None = None, version: str | None = None, limit: int = 100) -> list[Row]:
        return Runs(self._db).comparisons(name, version, limit)

    def change(self, *_: object, **__: object) -> dict[str, Any]:
        raise OperatorError("change model", "this process only looks", "Use 'dicomnode models'", retryable=True)

    approve = roll_back = change


class ModelsApi:
    """Handlers over a desk. Changes of a model run one after the other."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._one = asyncio.Lock()

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/api/v1/models", self.listing)
        router.add_get(f"/api/v1/models/{NAME}/history", self.history)
        router.add_get(f"/api/v1/models/{NAME}/comparisons", self.comparisons)
        router.add_post(f"/api/v1/models/{NAME}/rollback", self.roll_back)
        router.add_post(f"/api/v1/models/{NAME}/{VERSION}/approve", self.approve)
        router.add_post(f"/api/v1/models/{NAME}/{VERSION}/{{action:{'|'.join(ACTIONS)}}}", self.change)

    async def listing(self, _: web.Request) -> web.Response:
        rows = await asyncio.to_thread(self._desk.listing)
        return json_answer(
            {"models": [{k: v for k, v in r.items() if k != "path"} | {"here": bool(r["path"])} for r in rows]}
        )

    async def history(self, request: web.Request) -> web.Response:
        rows = await asyncio.to_thread(self._desk.history, request.match_info["name"], limit_of(request))
        return json_answer({"history": rows})

    async def comparisons(self, request: web.Request) -> web.Response:
        version = request.query.get("version") or None
        rows = await asyncio.to_thread(self._desk.comparisons, request.match_info["name"], version, limit_of(request))
        return json_answer({"comparisons": rows})

    async def change(self, request: web.Request) -> web.Response:
        body = await _body(request)
        action = request.match_info["action"]
        options = {k: body[k] for k in ("percent", "peers") if k in body}
        if options and action != "canary":
            raise OperatorError("read request", "percent and peers are for a canary only")

        def run() -> dict[str, Any]:
            return self._desk.change(
                action,
                request.match_info["name"],
                request.match_info["version"],
                who=_who(request),
                why=body.get("why", ""),
                **options,
            )

        async with self._one:
            return json_answer(await asyncio.to_thread(run))

    async def approve(self, request: web.Request) -> web.Response:
        body = await _body(request)
        if body.keys() - {"why"}:
            raise OperatorError("read request", "percent and peers are for a canary only")

        def run() -> dict[str, Any]:
            return self._desk.approve(
                request.match_info["name"],
                request.match_info["version"],
                who=_who(request),
                why=body.get("why", ""),
            )

        async with self._one:
            return json_answer(await asyncio.to_thread(run))

    async def roll_back(self, request: web.Request) -> web.Response:
        body = await _body(request)

        def run() -> dict[str, Any]:
            return self._desk.roll_back(request.match_info["name"], who=_who(request), why=body.get("why", ""))

        async with self._one:
            return json_answer(await asyncio.to_thread(run))


def _who(request: web.Request) -> str:
    """There is no login yet: where the request came from, see :mod:`dicomnode.admin.guard`."""
    return f"api:{request.remote or 'unknown'}"


async def _body(request: web.Request) -> dict[str, Any]:
    """``{"why", "percent", "peers"}``, each optional; raises OperatorError for anything else."""
    if not request.can_read_body:
        return {}
    try:
        body = json.loads(await request.text() or "{}")
    except (ValueError, UnicodeDecodeError):
        body = None
    fits = isinstance(body, dict) and body.keys() <= {"why", "percent", "peers"}
    if fits and isinstance(body, dict):
        percent, peers = body.get("percent", 0.0), body.get("peers", [])
        fits = (
            isinstance(body.get("why", ""), str)
            and isinstance(percent, int | float)
            and not isinstance(percent, bool)
            and isinstance(peers, list)
            and all(isinstance(p, str) for p in peers)
        )
    if not fits or not isinstance(body, dict):
        raise OperatorError(
            "read request",
            "the body is not as described",
            'An object with "why", and for a canary "percent" or "peers"',
        )
    return body
