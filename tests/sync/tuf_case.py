"""A TUF repository written by python-tuf itself, in memory, with every key at hand to do it wrong."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

from aiohttp import web
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

ROLES = ("root", "timestamp", "snapshot", "targets")
Behaviour = Callable[[web.Request, bytes], Any]


def later(days: float = 30.0) -> datetime:
    return (datetime.now(UTC) + timedelta(days=days)).replace(microsecond=0)


class TufRepository:
    """``files``: path -> bytes as served; ``publish`` makes a new set, ``script`` changes answers by path."""

    def __init__(self, threshold: int = 1) -> None:
        self.keys = {role: [CryptoSigner.generate_ed25519() for _ in range(threshold)] for role in ROLES}
        self.root = Root(expires=later(365), consistent_snapshot=True)
        for role, keys in self.keys.items():
            for key in keys:
                self.root.add_key(key.public_key, role)
            self.root.roles[role].threshold = threshold
        self.targets = Targets(expires=later())
        self.snapshot = Snapshot(expires=later())
        self.timestamp = Timestamp(expires=later())
        for signed in (self.root, self.targets, self.snapshot, self.timestamp):
            signed.version = 0  # each publication counts it up
        self.files: dict[str, bytes] = {}
        self.script: dict[str, Behaviour] = {}
        self.asked: list[str] = []
        self.publish_root()
        self.trusted_root = self.files["metadata/1.root.json"]
        self.publish()

    def sign(self, signed: Any, *signers: Any) -> bytes:
        document = Metadata(signed)
        for key in signers or self.keys[signed.type]:
            document.sign(key, append=True)
        return document.to_bytes()

    def publish_root(self, *also: Any) -> None:
        """A new root, signed by the present keys and ``also`` (the former ones, when they change)."""
        self.root.version += 1
        self.files[f"metadata/{self.root.version}.root.json"] = self.sign(self.root, *self.keys["root"], *also)

    def rotate(self, role: str) -> Any:
        """New key of a role; the former one, which does not count any more."""
        [former] = self.keys[role]
        self.root.revoke_key(former.public_key.keyid, role)
        self.keys[role] = [CryptoSigner.generate_ed25519()]
        self.root.add_key(self.keys[role][0].public_key, role)
        self.publish_root(*([former] if role == "root" else []))
        return former

    def add(self, path: str, data: bytes) -> None:
        self.targets.targets[path] = TargetFile.from_data(path, data, ["sha256"])
        folder, _, file = path.rpartition("/")
        self.files[f"targets/{folder}/{hashlib.sha256(data).hexdigest()}.{file}"] = data

    def where(self, path: str) -> str:
        folder, _, file = path.rpartition("/")
        return f"targets/{folder}/{self.targets.targets[path].hashes['sha256']}.{file}"

    def publish(self) -> None:
        """New targets, snapshot and timestamp."""
        self.targets.version += 1
        self.put("targets", self.targets)
        self.publish_snapshot()

    def publish_snapshot(self) -> None:
        self.snapshot.version += 1
        self.snapshot.meta["targets.json"] = MetaFile(version=self.targets.version)
        self.put("snapshot", self.snapshot)
        self.publish_timestamp()

    def publish_timestamp(self) -> None:
        self.timestamp.version += 1
        self.timestamp.snapshot_meta = MetaFile(version=self.snapshot.version)
        self.files["metadata/timestamp.json"] = self.sign(self.timestamp)

    def put(self, role: str, signed: Any, *signers: Any) -> None:
        self.files[f"metadata/{signed.version}.{role}.json"] = self.sign(signed, *signers)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        path = request.match_info["path"]
        self.asked.append(path)
        if path not in self.files:
            return web.Response(status=404)
        data = self.files[path]
        for key, behaviour in self.script.items():
            if key in path:
                answer = behaviour(request, data)
                return await answer if asyncio.iscoroutine(answer) else answer
        return ranged(request, data)


def ranged(request: web.Request, data: bytes) -> web.Response:
    """An honest answer, with entity tag and ranges."""
    etag = f'"{hashlib.sha256(data).hexdigest()[:16]}"'
    start = int(request.headers.get("Range", "bytes=0-").removeprefix("bytes=").rstrip("-"))
    if request.headers.get("If-Range", etag) != etag:
        start = 0
    if start and start >= len(data):
        return web.Response(status=416)
    headers = {"ETag": etag}
    if start:
        headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
    return web.Response(body=data[start:], status=206 if start else 200, headers=headers)


class Line:
    """What becomes of a body: ``cut`` after so many bytes, ``drip`` for ever, ``endless`` zeros."""

    def cut(self, count: int) -> Behaviour:
        async def behave(request: web.Request, data: bytes) -> web.StreamResponse:
            response = web.StreamResponse(headers={"Content-Length": str(len(data)), "ETag": '"a"'})
            await response.prepare(request)
            await response.write(data[:count])
            assert request.transport is not None
            request.transport.close()
            return response

        return behave

    async def drip(self, request: web.Request, data: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"ETag": '"a"'})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            for byte in data[:-1]:
                await response.write(bytes([byte]))
                await asyncio.sleep(0.02)  # the pace of the attack, not a wait of the test
            while request.transport is not None and not request.transport.is_closing():
                await asyncio.sleep(0.02)
        return response

    async def endless(self, request: web.Request, data: bytes) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while request.transport is not None and not request.transport.is_closing():
                await response.write(bytes(1 << 16))
        return response
