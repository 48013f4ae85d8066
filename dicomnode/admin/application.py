"""The aiohttp application: routes, middlewares, JSON. What writes or may take long runs off the event loop."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, TypeVar

import apsw
from aiohttp import web

from dicomnode import doorbell, logs
from dicomnode.admin import exposition, guard, page
from dicomnode.admin.exchange import limit_of
from dicomnode.admin.model_figures import version_figures
from dicomnode.admin.models_api import Desk, IndexOnly, ModelsApi
from dicomnode.admin.models_page import RECENT
from dicomnode.admin.reading import Reading
from dicomnode.admin.ready import Check, check_port, local_checks
from dicomnode.admin.records_api import RecordsApi
from dicomnode.admin.status import status_report
from dicomnode.admin.words import choose_language
from dicomnode.errors import IllegalTransition, NodeError, OperatorError, StorageError
from dicomnode.index.cloud_outbox import CloudOutbox
from dicomnode.index.commitment import AskState, Commitments, PromiseState
from dicomnode.index.database import Database, Row
from dicomnode.index.desired import DesiredStates
from dicomnode.index.jobs import Jobs
from dicomnode.index.notices import Notices, NoticeState
from dicomnode.index.outbox import Outbox
from dicomnode.index.record_reviews import Reviews, serving
from dicomnode.index.states import JobState, SendState
from dicomnode.index.urgency import Alerts
from dicomnode.promptness import ask_for_short_turns
from dicomnode.record_shapes import DASHBOARD, WARNINGS
from dicomnode.settings import Settings

READY_KEPT_SECONDS = 1.0
"""A probe writes one durable row, so many probes in a second share one answer."""

_STATIC = Path(__file__).with_name("static")
_STATIC_TYPES = {"style.css": "text/css", "app.js": "text/javascript", "icon.svg": "image/svg+xml"}
_HIDDEN_COLUMNS = frozenset(["file", "lease_owner", "sha256", "metrics"])
_ITEM = r"{id:\d{1,15}}"

T = TypeVar("T")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Table = Literal["deliveries", "sync_items"]


class Admin:
    """Handlers over one index. ``own_process`` is the heartbeat name of the process that serves."""

    def __init__(self, db: Database, settings: Settings, own_process: str, desk: Desk) -> None:
        self.db = db
        self.desk = desk
        self.settings = settings
        self.own_process = own_process
        self._threads = ThreadPoolExecutor(
            max_workers=2, thread_name_prefix="admin-index", initializer=ask_for_short_turns
        )
        self.reading = Reading(self._threads)
        self._ready: tuple[float, dict[str, Check]] | None = None
        self._ready_lock = asyncio.Lock()

    async def blocking(self, function: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def lifetime(self, _: web.Application) -> AsyncIterator[None]:
        yield
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def checks(self) -> dict[str, Check]:
        async with self._ready_lock:
            if self._ready is None or time.monotonic() - self._ready[0] >= READY_KEPT_SECONDS:
                checks, address = await self.blocking(local_checks, self.db, self.settings)
                checks["dimse"] = await check_port(*address)
                self._ready = (time.monotonic(), checks)
            return self._ready[1]

    async def health(self, _: web.Request) -> web.Response:
        return json_response({"alive": True})

    async def ready(self, _: web.Request) -> web.Response:
        checks = await self.checks()
        ready = all(check.ok for check in checks.values())
        body = {"ready": ready, "checks": {name: check.as_json() for name, check in checks.items()}}
        return json_response(body, status=200 if ready else 503)

    async def metrics(self, _: web.Request) -> web.Response:
        body = await self.reading(exposition.exposition, self.db, self.settings, self.own_process)
        return web.Response(body=body, headers={"Content-Type": exposition.CONTENT_TYPE})

    async def dashboard(self, request: web.Request) -> web.Response:
        checks = await self.checks()

        def collect() -> str:
            preferences = serving(self.db, "preferences", DASHBOARD)
            asked = request.query.get("lang") or preferences.get("language") or None
            reviews = Reviews(self.db, self.settings.cloud_plan)
            language = choose_language(asked, request.headers.get("Accept-Language", ""))
            view = page.View(
                settings=self.settings,
                report=status_report(self.db, self.settings),
                checks=checks,
                jobs=Jobs(self.db).listing(25),
                deliveries=Outbox(self.db, "deliveries").listing(25),
                sync=CloudOutbox(self.db).listing(25),
                notifications=Notices(self.db).listing(25),
                commitments=Commitments(self.db).listing(25),
                model_versions=self.desk.listing(),
                model_figures=version_figures(self.db, self.settings.rollout),
                model_history=self.desk.history(limit=RECENT),
                model_comparisons=self.desk.comparisons(limit=RECENT),
                conflicts=reviews.listing(25),
                refused=reviews.refused(25),
                limits=serving(self.db, "limits", WARNINGS),
                refresh_seconds=round(preferences.get("refresh_seconds") or page.REFRESH_SECONDS),
                language=language,
                changes_allowed=guard.is_loopback(self.settings.http.host),
            )
            return page.render(view)

        text = await self.blocking(collect)
        return web.Response(text=text, content_type="text/html", headers={"Vary": "Accept-Language"})

    async def static(self, request: web.Request) -> web.Response:
        name = request.match_info["name"]
        if name not in _STATIC_TYPES:
            raise web.HTTPNotFound
        body = await self.blocking((_STATIC / name).read_bytes)
        return web.Response(body=body, content_type=_STATIC_TYPES[name], charset="utf-8")

    async def status(self, _: web.Request) -> web.Response:
        return json_response(await self.reading(status_report, self.db, self.settings))

    async def jobs(self, request: web.Request) -> web.Response:
        limit, state = _listing_query(request, JobState)
        rows = await self.reading(Jobs(self.db).listing, limit, state)
        return json_response({"jobs": rows})

    async def job(self, request: web.Request) -> web.Response:
        job = await self.reading(Jobs(self.db).show, int(request.match_info["id"]))
        if job is None:
            return _problem(404, OperatorError("show job", f"there is no job {request.match_info['id']}"))
        for part in ("results", "deliveries"):
            job[part] = [_shown(row) for row in job[part]]
        return json_response(_shown(job))

    async def retry_job(self, request: web.Request) -> web.Response:
        job_id = int(request.match_info["id"])
        jobs = Jobs(self.db)
        await self.blocking(jobs.retry, job_id)
        doorbell.ring(self.settings.node.data_dir, "worker")
        return json_response({"id": job_id, "state": JobState.pending}, status=202)

    def outbox(self, table: Table, key: str) -> Handler:
        async def listing(request: web.Request) -> web.Response:
            limit, state = _listing_query(request, SendState)
            box = CloudOutbox(self.db) if table == "sync_items" else Outbox(self.db, table)
            rows = await self.reading(box.listing, limit, state)
            return json_response({key: [_shown(row) for row in rows]})

        return listing

    async def notifications(self, request: web.Request) -> web.Response:
        limit, state = _listing_query(request, NoticeState)
        rows = await self.reading(Notices(self.db).listing, limit, state)
        return json_response({"notifications": [_shown(row) for row in rows]})

    async def retry_notification(self, request: web.Request) -> web.Response:
        notice_id = int(request.match_info["id"])
        state = await self.blocking(Notices(self.db).requeue, notice_id)
        doorbell.ring(self.settings.node.data_dir, "courier")
        return json_response({"id": notice_id, "state": state}, status=202)

    async def alerts(self, request: web.Request) -> web.Response:
        limit, state = _listing_query(request, SendState)
        return json_response({"alerts": await self.reading(Alerts(self.db).listing, limit, state)})

    async def retry_alert(self, request: web.Request) -> web.Response:
        alert_id = int(request.match_info["id"])
        await self.blocking(Alerts(self.db).requeue, alert_id)
        doorbell.ring(self.settings.node.data_dir, "sidecar")
        return json_response({"id": alert_id, "state": SendState.pending}, status=202)

    async def commitments(self, request: web.Request) -> web.Response:
        limit, state = _listing_query(request, PromiseState, AskState)
        rows = await self.reading(Commitments(self.db).listing, limit, state)
        return json_response({"commitments": rows})

    async def retry_commitment(self, request: web.Request) -> web.Response:
        commitment_id = int(request.match_info["id"])
        state = await self.blocking(Commitments(self.db).requeue, commitment_id)
        doorbell.ring(self.settings.node.data_dir, "courier")
        return json_response({"id": commitment_id, "state": state}, status=202)

    async def desired(self, _: web.Request) -> web.Response:
        states = await self.reading(DesiredStates(self.db).listing)
        rows = [{k: v for k, v in row.items() if k not in ("decided_at", "digest")} for row in states]
        return json_response({"accept": list(self.settings.fleet.accept), "states": rows})

    def retry_item(self, table: Table, bell: str) -> Handler:
        async def retry(request: web.Request) -> web.Response:
            item_id = int(request.match_info["id"])
            outbox = CloudOutbox(self.db) if table == "sync_items" else Outbox(self.db, table)
            await self.blocking(outbox.requeue, item_id)
            doorbell.ring(self.settings.node.data_dir, bell, at_once=True)
            return json_response({"id": item_id, "state": SendState.pending}, status=202)

        return retry


def make_app(
    db: Database, settings: Settings, *, own_process: str = "sidecar", desk: Desk | None = None
) -> web.Application:
    """The admin application; the caller binds it to ``settings.http`` and runs it.

    ``desk`` carries out changes of models; without one they can only be looked at.
    ``own_process`` is the heartbeat name under which this process's own counters are shown.
    """
    desk = desk or IndexOnly(db)
    admin = Admin(db, settings, own_process, desk)
    app = web.Application(
        client_max_size=guard.MAX_BODY_BYTES,
        middlewares=[_errors_middleware, _guard_middleware(settings)],
    )
    app.cleanup_ctx.append(admin.lifetime)
    app.on_response_prepare.append(_security_headers)
    app.router.add_get("/health", admin.health)
    app.router.add_get("/ready", admin.ready)
    app.router.add_get("/metrics", admin.metrics)
    app.router.add_get("/", admin.dashboard)
    app.router.add_get("/static/{name}", admin.static)
    app.router.add_get("/api/v1/status", admin.status)
    app.router.add_get("/api/v1/jobs", admin.jobs)
    app.router.add_get(f"/api/v1/jobs/{_ITEM}", admin.job)
    app.router.add_post(f"/api/v1/jobs/{_ITEM}/retry", admin.retry_job)
    app.router.add_get("/api/v1/deliveries", admin.outbox("deliveries", "deliveries"))
    app.router.add_post(f"/api/v1/deliveries/{_ITEM}/retry", admin.retry_item("deliveries", "courier"))
    app.router.add_get("/api/v1/notifications", admin.notifications)
    app.router.add_post(f"/api/v1/notifications/{_ITEM}/retry", admin.retry_notification)
    app.router.add_get("/api/v1/alerts", admin.alerts)
    app.router.add_post(f"/api/v1/alerts/{_ITEM}/retry", admin.retry_alert)
    app.router.add_get("/api/v1/commitments", admin.commitments)
    app.router.add_post(f"/api/v1/commitments/{_ITEM}/retry", admin.retry_commitment)
    app.router.add_get("/api/v1/sync", admin.outbox("sync_items", "items"))
    app.router.add_post(f"/api/v1/sync/{_ITEM}/retry", admin.retry_item("sync_items", "sidecar"))
    app.router.add_get("/api/v1/desired", admin.desired)
    ModelsApi(desk).add_routes(app.router)
    RecordsApi(db, settings).add_routes(app.router)
    return app


def json_response(value: Any, *, status: int = 200) -> web.Response:
    body = json.dumps(value, ensure_ascii=False, default=str).encode()
    return web.Response(body=body, status=status, headers={"Content-Type": "application/json"})


def _shown(row: Mapping[str, Any]) -> Row:
    """A row without what only this machine needs: paths, owners, digests of files."""
    return {k: v for k, v in row.items() if k not in _HIDDEN_COLUMNS}


def _listing_query(request: web.Request, *kinds: type[StrEnum]) -> tuple[int, str | None]:
    state = request.query.get("state") or None
    states = list(dict.fromkeys(state.value for kind in kinds for state in kind))
    if state is not None and state not in states:
        raise OperatorError("read query", "state is unknown", f"Use one of: {', '.join(states)}")
    return limit_of(request), state


def _problem(status: int, error: NodeError) -> web.Response:
    body = {"error": {"operation": error.operation, "cause": error.cause, "hint": error.hint}}
    return json_response(body, status=status)


@web.middleware
async def _errors_middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Our errors and HTTP errors as JSON; anything else is logged by type only and answered 500."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.content_type == "application/json":  # raised, its text would be taken for aiohttp's own
            return web.Response(text=error.text, status=error.status, content_type="application/json")
        answer = _problem(error.status, NodeError("answer request", error.reason))
        if isinstance(error, web.HTTPMethodNotAllowed):
            answer.headers["Allow"] = error.headers["Allow"]
        return answer
    except IllegalTransition as error:
        return _problem(409, error)
    except OperatorError as error:
        passing = error.retryable or isinstance(error, StorageError)
        status = 503 if passing else 404 if "there is no" in error.cause else 400
        return _problem(status, error)
    except (NodeError, apsw.Error, OSError) as error:
        logs.get().error("request failed", operation="admin", exc_type=type(error).__name__, path=request.path)
        cause = error.cause if isinstance(error, NodeError) else "the index or the disk does not answer"
        return _problem(503, NodeError("answer request", cause, "See /ready and the log of the sidecar"))


def _guard_middleware(settings: Settings) -> Any:
    host = settings.http.host

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        if guard.refused_host(host, request.headers.get("Host", "")):
            hint = "Call it as http://127.0.0.1 or http://localhost"
            return _problem(421, NodeError("answer request", "the Host header is not a loopback name", hint))
        if request.method not in {"GET", "HEAD"}:
            why = guard.refused_change(host, request.remote, request.headers)
            if why:
                hint = f"On the node: curl -X POST -H '{guard.CHANGE_HEADER}: 1' …, or the dicomnode command"
                return _problem(403, NodeError("change", why, hint))
        return await handler(request)

    return guarded


async def _security_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(guard.SECURITY_HEADERS)
    response.headers.popall("Server", None)
