"""The reference endpoint on a free loopback port, inside the test's event loop."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from aiohttp import web

from dicomnode.cloud.application import make_app
from dicomnode.cloud.storage import Storage


@contextlib.asynccontextmanager
async def endpoint(
    folder: Path,
    token: str | None = None,
    port: int = 0,
    models: Path | None = None,
    nodes: Any = None,
    nodes_dir: Path | None = None,
    **options: Any,
) -> AsyncIterator[tuple[str, Storage]]:
    """Its address without a path, and its storage."""
    storage = Storage(folder, reserve_mb=1)
    runner = web.AppRunner(make_app(storage, token, models, nodes, nodes_dir), shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, **options).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", storage
    finally:
        await runner.cleanup()
        storage.close()


def multipart(parts: Sequence[bytes], kind: str = "application/dicom") -> tuple[bytes, dict[str, str]]:
    boundary = secrets.token_hex(8)
    body = b"".join(f"--{boundary}\r\nContent-Type: {kind}\r\n\r\n".encode() + p + b"\r\n" for p in parts)
    headers = {"Content-Type": f'multipart/related; type="application/dicom"; boundary={boundary}'}
    return body + f"--{boundary}--\r\n".encode(), headers


def record(number: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "idempotency_key": f"00000000-0000-4000-8000-{number:012x}",
        "type": "ai-result",
        "id": "r1",
        "version": 1,
        "base_version": 0,
        "changed_time": "2026-11-29T03:00:00+00:00",
        "study": "1.2.3",
        "data": {"volume_ml": 1.5},
    } | changes
