"""A STOW-RS endpoint that keeps what it gets and can misbehave. Speaks PS3.18 10.5."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from email.parser import BytesParser
from email.policy import HTTP
from io import BytesIO

from aiohttp import web
from pydicom import dcmread

Behaviour = Callable[["FakeCloud", web.Request, list[str]], "web.StreamResponse | None"]


@dataclass
class FakeCloud:
    """``script`` is used up one entry per request; None behaves well."""

    script: list[object] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)
    puts: list[str] = field(default_factory=list)
    requests: list[dict[str, str]] = field(default_factory=list)
    url: str = ""

    async def handle(self, request: web.Request) -> web.StreamResponse:
        if request.method == "OPTIONS":  # the node asks whether it is well
            return web.Response(status=204)
        self.requests.append(dict(request.headers))
        body = await request.read()
        assert len(body) == int(request.headers["Content-Length"])
        action = self.script.pop(0) if self.script else None
        if callable(action):
            answer = action(self, request, body)
            if asyncio.iscoroutine(answer):
                answer = await answer
            if answer is not None:
                return answer  # type: ignore[no-any-return]
        return self.store(request, body)

    def parts(self, request: web.Request, body: bytes) -> dict[str, bytes]:
        head = f"Content-Type: {request.headers['Content-Type']}\r\n\r\n".encode()
        message = BytesParser(policy=HTTP).parsebytes(head + body)
        found = {}
        for part in message.iter_parts():
            assert part["Content-Type"] == "application/dicom"
            data = part.get_payload(decode=True)
            assert isinstance(data, bytes)
            ds = dcmread(BytesIO(data), stop_before_pixels=True)
            found[str(ds.SOPInstanceUID)] = data
        return found

    def store(self, request: web.Request, body: bytes, failed: dict[str, int] | None = None) -> web.Response:
        parts = self.parts(request, body)
        failed = failed or {}
        for uid, data in parts.items():
            if uid not in failed:
                self.stored[uid] = data
                self.puts.append(uid)
        status = 200 if not failed else 202 if len(failed) < len(parts) else 409
        return reply([u for u in parts if u not in failed], failed, status)


def reply(stored: list[str], failed: dict[str, int], status: int = 200) -> web.Response:
    body = {
        "00081199": {"vr": "SQ", "Value": [{"00081155": {"vr": "UI", "Value": [u]}} for u in stored]},
        "00081198": {
            "vr": "SQ",
            "Value": [
                {"00081155": {"vr": "UI", "Value": [u]}, "00081197": {"vr": "US", "Value": [reason]}}
                for u, reason in failed.items()
            ],
        },
    }
    return web.Response(
        body=json.dumps(body).encode(), status=status, headers={"Content-Type": "application/dicom+json; charset=utf-8"}
    )


@contextlib.asynccontextmanager
async def served(handler: object, path: str = "/studies") -> AsyncIterator[str]:
    """An aiohttp server on a free loopback port; its address with ``path``."""
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", path, handler)  # type: ignore[arg-type]
    runner = web.AppRunner(app, shutdown_timeout=0.5)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}{path}"
    finally:
        await runner.cleanup()
