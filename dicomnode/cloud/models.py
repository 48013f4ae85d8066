"""The repository of models as files: what ``dicomnode models publish`` made, with ranges and entity tags."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from aiohttp import web

_METADATA = re.compile(r"(?:\d{1,9}\.)?[a-z]{1,20}\.json", re.ASCII)
_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
_ARCHIVE = re.compile(r"[0-9a-f]{64}\.\d{1,9}\.\d{1,9}\.\d{1,9}\.(?:tar\.gz|zip)", re.ASCII)


class ModelFiles:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add_routes(self, router: web.UrlDispatcher) -> None:
        router.add_get("/models/metadata/{file}", self.metadata)
        router.add_get("/models/targets/{name}/{file}", self.archive)

    async def metadata(self, request: web.Request) -> web.StreamResponse:
        file = request.match_info["file"]
        if not _METADATA.fullmatch(file):
            raise web.HTTPNotFound
        return await _send(self._folder / "metadata" / file, "application/json")

    async def archive(self, request: web.Request) -> web.StreamResponse:
        name, file = request.match_info["name"], request.match_info["file"]
        if not _NAME.fullmatch(name) or not _ARCHIVE.fullmatch(file):
            raise web.HTTPNotFound
        return await _send(self._folder / "targets" / name / file, "application/octet-stream")


async def _send(path: Path, kind: str) -> web.StreamResponse:
    if not await asyncio.to_thread(path.is_file):
        raise web.HTTPNotFound
    return web.FileResponse(path, headers={"Content-Type": kind})
