"""Connections of the admin server: what aiohttp answers before a request reaches the application.

A request that its parser cannot read is answered with 400 and the line in question, and logged
with it; a URL can hold a patient's name. Here neither has a byte of the request.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from aiohttp import web

from dicomnode import logs
from dicomnode.admin.guard import SECURITY_HEADERS


class Connection(web.RequestHandler):
    """One HTTP connection whose errors are told without what the caller sent."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Status and its phrase alone; ``message`` and the text of ``exc`` may quote the request."""
        del message
        fault = logs.fault(exc) if exc is not None else ""
        log = logs.get()
        (log.error if status == HTTPStatus.INTERNAL_SERVER_ERROR else log.debug)(
            "request not served", operation="admin", status=status, exc_type=fault
        )
        if request.writer.output_size > 0:
            raise ConnectionError("a part of another answer was sent")
        answer = web.Response(status=status, text=_phrase(status), headers=SECURITY_HEADERS)
        answer.force_close()
        return answer

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """An exception that comes here was raised before the application's handlers; 417 quotes its header."""
        if isinstance(resp, web.HTTPException):
            resp.text = _phrase(resp.status)
        return await super().finish_response(request, resp, start_time)

    def log_exception(self, *args: Any, **kw: Any) -> None:
        """aiohttp's own lines have tracebacks, which quote values."""
        del args
        error = kw.get("exc_info")
        fault = logs.fault(error) if isinstance(error, BaseException) else ""
        logs.get().error("connection failed", operation="admin", exc_type=fault)


def _phrase(status: int) -> str:
    return f"{status} {HTTPStatus(status).phrase}\n"


class _Server(web.Server):
    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)


class Runner(web.AppRunner):
    """AppRunner whose connections are :class:`Connection`."""

    async def _make_server(self) -> web.Server:
        made = await super()._make_server()
        return _Server(
            made.request_handler,
            request_factory=made.request_factory,
            handler_cancellation=made.handler_cancellation,
            loop=made._loop,
            **made._kwargs,
        )
