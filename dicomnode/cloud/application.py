"""The aiohttp application of the reference endpoint; see config/cloud-api.yaml."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from aiohttp import web

from dicomnode import __version__, logs, strict_json
from dicomnode.cloud import content, page, series, shapes, stow
from dicomnode.cloud.admission import is_anothers, is_here, is_page, token_of
from dicomnode.cloud.callers import ADMINISTRATOR, Caller, Callers
from dicomnode.cloud.models import ModelFiles
from dicomnode.cloud.storage import Storage
from dicomnode.errors import DiskFull, NodeError, OperatorError, StorageError

MAX_JSON_BYTES = 8 << 20
MOST_VALUES = 1 << 20
FEED_DEFAULT, FEED_MOST = 100, 1000
CONFLICT_STATES = ("open", "cloud", "edge", "merged")

CALLER = web.RequestKey("caller", Caller)

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; style-src 'self'; img-src 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Forbidden(OperatorError):
    """The token is right, but what was asked is not for its holder."""

    def __init__(self, cause: str) -> None:
        super().__init__("answer request", cause, "Each node needs the token that is its own (cloud.token_file)")


class Cloud:
    """Handlers over one storage. ``callers``: whom the tokens stand for; none: loopback callers only."""

    def __init__(self, storage: Storage, callers: Callers, models: Path | None = None) -> None:
        self.storage = storage
        self.models = models
        self.callers = callers

    async def blocking(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.to_thread(function, *arguments)

    async def refused(self, request: web.Request) -> int:
        """0, or the HTTP status with which a caller is turned away; ``request[CALLER]`` is who it is."""
        page = is_page(request.method, request.path)
        token = token_of(request.headers.get("Authorization", ""), page=page)
        await self.callers.follow(token)
        known = self.callers.find(token)
        request[CALLER] = known or ADMINISTRATOR
        if known is not None or request.path == "/health":
            return 0
        if self.callers:
            return 401
        here = is_here(request.remote or "", request.headers)
        return 0 if here and (page or not is_anothers(request.headers)) else 403

    def site(self, request: web.Request) -> str:
        """Whose data this request is about: a node's own site always, what the administrator names else."""
        caller = request[CALLER]
        asked = request.query.get("site")
        if not caller.node:
            return shapes.name(asked, "site") if asked is not None else ""
        if asked not in (None, caller.site):
            raise Forbidden("the token is that of a node of another site")
        return caller.site

    @staticmethod
    def own(request: web.Request, node: str) -> str:
        """``node`` where the caller may speak for it. Raises Forbidden for another one."""
        caller = request[CALLER]
        if caller.node and node != caller.node:
            raise Forbidden(f"the token is that of node {caller.node}, and this is about another")
        return node

    @staticmethod
    def administrator(handler: Handler) -> Handler:
        """For what no node may do."""

        async def guarded(request: web.Request) -> web.StreamResponse:
            caller = request[CALLER]
            if caller.node:
                raise Forbidden("the token is that of a node")
            return await handler(request)

        return guarded

    async def health(self, _: web.Request) -> web.Response:
        return web.json_response({"status": "ok", "version": __version__})

    async def page(self, _: web.Request) -> web.Response:
        text = await self.blocking(page.render, self.storage, self.models)
        return web.Response(text=text, content_type="text/html")

    async def object_page(self, request: web.Request) -> web.Response:
        uid, site = request.match_info["uid"], self.site(request)
        text = await self.blocking(page.object_page, uid, site, await self._content(uid, site))
        return web.Response(text=text, content_type="text/html")

    async def picture(self, request: web.Request) -> web.Response:
        found = await self.blocking(content.picture, await self._content(request.match_info["uid"], self.site(request)))
        if found is None:
            raise web.HTTPNotFound
        return web.Response(body=found, content_type="image/png")

    async def _content(self, uid: str, site: str) -> bytes:
        path = await self.blocking(self.storage.object_file, uid, site)
        if path is None or path.stat().st_size > content.MAX_FILE_BYTES:
            raise web.HTTPNotFound
        return await self.blocking(path.read_bytes)

    async def remote_write(self, request: web.Request) -> web.Response:
        """Prometheus remote-write 1.0: a node's figures; 204, or 400 for what is none and must not come again."""
        body = await request.read()

        def take() -> None:
            try:
                found = series.read_write_request(body)
            except ValueError as error:
                hint = "Send remote-write 1.0: a snappy block with a WriteRequest"
                raise OperatorError("read samples", str(error) or "unreadable", hint) from None
            self.storage.add_series(series.by_node(found, request[CALLER].node), self.site(request))

        await self.blocking(take)
        return web.Response(status=204)

    async def style(self, _: web.Request) -> web.Response:
        return web.Response(text=page.STYLE, content_type="text/css")

    async def stow(self, request: web.Request) -> web.Response:
        return await stow.store(self.storage, request, self.site(request))

    async def object(self, request: web.Request) -> web.StreamResponse:
        path = await self.blocking(self.storage.object_file, request.match_info["uid"], self.site(request))
        if path is None:
            raise web.HTTPNotFound
        return web.FileResponse(path, headers={"Content-Type": "application/dicom"})

    async def post_records(self, request: web.Request) -> web.Response:
        node, records = shapes.batch(await _json(request))
        site = self.site(request)
        self.own(request, node)

        def apply() -> list[dict[str, Any]]:
            outcomes = []
            for record in records:
                fault = shapes.record_fault(record)
                key = record["idempotency_key"]
                if fault:
                    outcomes.append({"idempotency_key": key, "outcome": "rejected", "version": None, "reason": fault})
                else:
                    outcomes.append(self.storage.add_record(node, record, site))
            return outcomes

        return web.json_response({"outcomes": await self.blocking(apply)})

    async def get_records(self, request: web.Request) -> web.Response:
        after = shapes.number(request.query.get("after"), 0, 0, shapes.MAX_VERSION, "after")
        limit = shapes.number(request.query.get("limit"), FEED_DEFAULT, 1, FEED_MOST, "limit")
        kind = shapes.kind(request.query["type"]) if "type" in request.query else None
        site, caller = self.site(request), request[CALLER]
        rows = await self.blocking(self.storage.feed, after, kind, limit, site)
        newest = await self.blocking(self.storage.newest, site)
        following = rows[-1]["seq"] if rows else after
        page = {"records": rows, "next": following, "newest": newest, "site": site, "node": caller.node}
        return web.json_response(page)

    async def get_record(self, request: web.Request) -> web.Response:
        one = (request.match_info["type"], request.match_info["id"], self.site(request))
        row = await self.blocking(self.storage.record, *one)
        if row is None:
            raise web.HTTPNotFound
        return web.json_response(row, headers={"ETag": f'"{row["version"]}"'})

    async def put_record(self, request: web.Request) -> web.Response:
        """A change at the cloud, guarded by If-Match (RFC 9110 13.1.1); If-Match "0" makes a new one."""
        kind, name = shapes.kind(request.match_info["type"]), shapes.name(request.match_info["id"], "id")
        expected = request.headers.get("If-Match", "").strip('"')
        if not expected:
            return stow.problem(428, OperatorError("change record", "If-Match is missing", "Send the version read"))
        version = shapes.number(expected, 0, 0, shapes.MAX_VERSION, "If-Match")
        body = shapes.fields(await _json(request), {"data"})
        data, site = shapes.data(body["data"]), self.site(request)
        row = await self.blocking(self.storage.change_record, kind, name, version, data, site)
        if row is None:
            return stow.problem(412, OperatorError("change record", "it has another version", "Read it again"))
        return web.json_response(row, headers={"ETag": f'"{row["version"]}"'})

    async def get_conflicts(self, request: web.Request) -> web.Response:
        state = request.query.get("state")
        if state is not None and state not in CONFLICT_STATES:
            raise OperatorError("read request", f"state is not one of {', '.join(CONFLICT_STATES)}")
        limit = shapes.number(request.query.get("limit"), FEED_DEFAULT, 1, FEED_MOST, "limit")
        site = self.site(request) if "site" in request.query else None
        return web.json_response({"conflicts": await self.blocking(self.storage.conflicts, state, limit, site)})

    async def decide(self, request: web.Request) -> web.Response:
        body = shapes.fields(await _json(request), {"take"}, frozenset({"data"}))
        take = body["take"]
        if take not in CONFLICT_STATES[1:]:
            raise OperatorError("read request", f"take is not one of {', '.join(CONFLICT_STATES[1:])}")
        if (take == "merged") != ("data" in body):
            raise OperatorError("read request", "data goes with take = merged, and only with it")
        merged = shapes.data(body["data"]) if take == "merged" else None
        row = await self.blocking(self.storage.decide, int(request.match_info["id"]), take, merged)
        if row is None:
            raise web.HTTPNotFound
        return web.json_response(row)

    async def post_heartbeat(self, request: web.Request) -> web.Response:
        body = shapes.data(await _json(request), "the body")
        node = self.own(request, shapes.name(body.get("node")))
        generation = await self.blocking(self.storage.heartbeat, node, body, self.site(request))
        return web.json_response({"generation": generation})

    async def get_nodes(self, _: web.Request) -> web.Response:
        return web.json_response({"nodes": await self.blocking(self.storage.nodes)})

    async def get_desired(self, request: web.Request) -> web.Response:
        name = self.own(request, shapes.name(request.match_info["node"]))
        node = await self.blocking(self.storage.node, name, self.site(request))
        if node is None or node["desired"] is None:
            raise web.HTTPNotFound
        headers = {"ETag": f'"{node["generation"]}"'}
        if request.headers.get("If-None-Match") == headers["ETag"]:
            return web.Response(status=304, headers=headers)
        return web.json_response({"generation": node["generation"], "state": node["desired"]}, headers=headers)

    async def put_desired(self, request: web.Request) -> web.Response:
        name = shapes.name(request.match_info["node"])
        body = shapes.fields(await _json(request), {"state"})
        state, site = shapes.data(body["state"], "state"), self.site(request)
        generation = await self.blocking(self.storage.desire, name, state, site)
        return web.json_response({"generation": generation})

    async def post_report(self, request: web.Request) -> web.Response:
        name = self.own(request, shapes.name(request.match_info["node"]))
        body = shapes.fields(await _json(request), {"generation", "applied"}, frozenset({"reason"}))
        if not isinstance(body["applied"], bool) or not isinstance(body["generation"], int):
            raise OperatorError("read request", "applied is not a boolean, or generation not a number")
        if not await self.blocking(self.storage.report, name, body, self.site(request)):
            raise web.HTTPNotFound
        return web.json_response({"taken": True})


def make_app(
    storage: Storage,
    token: str | None = None,
    models: Path | None = None,
    nodes: Mapping[str, Caller] | None = None,
    nodes_dir: Path | None = None,
) -> web.Application:
    """``token``: the administrator's, ``nodes``: those of nodes, in ``nodes_dir`` where they are followed.

    ``models``: folder of a signed repository to serve.
    """
    cloud = Cloud(storage, Callers(token, nodes, nodes_dir), models)
    app = web.Application(client_max_size=series.MAX_BODY_BYTES, middlewares=[_errors, _guard(cloud)])
    add = app.router
    add.add_get("/", cloud.administrator(cloud.page))
    add.add_get("/style.css", cloud.style)
    add.add_get("/health", cloud.health)
    add.add_post("/studies", cloud.stow)
    add.add_post(r"/studies/{study:[0-9.]{1,64}}", cloud.stow)
    add.add_get(r"/v1/objects/{uid:[0-9.]{1,64}}", cloud.object)
    add.add_get(r"/objects/{uid:[0-9.]{1,64}}", cloud.administrator(cloud.object_page))
    add.add_get(r"/objects/{uid:[0-9.]{1,64}}/picture", cloud.administrator(cloud.picture))
    add.add_post("/api/v1/write", cloud.remote_write)
    add.add_post("/v1/records", cloud.post_records)
    add.add_get("/v1/records", cloud.get_records)
    add.add_get("/v1/records/{type}/{id}", cloud.get_record)
    add.add_put("/v1/records/{type}/{id}", cloud.administrator(cloud.put_record))
    add.add_get("/v1/conflicts", cloud.administrator(cloud.get_conflicts))
    add.add_post(r"/v1/conflicts/{id:\d{1,15}}/decide", cloud.administrator(cloud.decide))
    add.add_post("/v1/heartbeat", cloud.post_heartbeat)
    add.add_get("/v1/nodes", cloud.administrator(cloud.get_nodes))
    add.add_get("/v1/nodes/{node}/desired", cloud.get_desired)
    add.add_put("/v1/nodes/{node}/desired", cloud.administrator(cloud.put_desired))
    add.add_post("/v1/nodes/{node}/report", cloud.post_report)
    if models is not None:
        ModelFiles(models).add_routes(add)

    async def secure(_: web.Request, response: web.StreamResponse) -> None:
        response.headers.update(_HEADERS)
        response.headers.popall("Server", None)

    app.on_response_prepare.append(secure)
    return app


async def _json(request: web.Request) -> Any:
    body = await request.read()
    if len(body) > MAX_JSON_BYTES:
        raise web.HTTPRequestEntityTooLarge(MAX_JSON_BYTES, len(body))
    try:
        return strict_json.read(body, MOST_VALUES)
    except ValueError as error:
        raise OperatorError("read request", f"the body: {error}", "See config/cloud-api.yaml") from None


def _guard(cloud: Cloud) -> Any:
    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        status = await cloud.refused(request)
        if status == 401:
            page = is_page(request.method, request.path)
            hint = "Pages take the administrator's (--token-file) as the password, with any name" if page else ""
            answer = stow.problem(401, OperatorError("answer request", "the token is missing or wrong", hint))
            answer.headers["WWW-Authenticate"] = 'Basic realm="dicomnode cloud"' if page else "Bearer"
            return answer
        if status:
            hint = "Start it with --token-file to serve other machines, or behind a proxy"
            return stow.problem(403, OperatorError("answer request", "only this machine is served", hint))
        return await handler(request)

    return guarded


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    try:
        return await handler(request)
    except web.HTTPException as error:
        answer = stow.problem(error.status, NodeError("answer request", error.reason))
        if isinstance(error, web.HTTPMethodNotAllowed):
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except DiskFull as error:
        return stow.problem(507, error)
    except StorageError as error:
        logs.get().error("request failed", operation="cloud", exc_type=type(error).__name__)
        return stow.problem(503, NodeError("answer request", "the storage does not answer"))
    except OperatorError as error:
        return stow.problem(403 if isinstance(error, Forbidden) else 400, error)
