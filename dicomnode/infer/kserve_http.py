"""KServe v2 over HTTP, with aiohttp on an event loop of its own.

The worker is synchronous. aiohttp is used all the same: it is there already, and only an
event loop ends a request at an absolute deadline however slowly a peer drips its bytes; the
time-outs of http.client count from the last byte.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar
from urllib.parse import quote

import aiohttp

from dicomnode import __version__
from dicomnode.endpoint_settings import Endpoint
from dicomnode.errors import OperatorError
from dicomnode.infer import kserve_json
from dicomnode.infer.engine import Array
from dicomnode.infer.kserve_tensors import Reply, Signature
from dicomnode.infer.kserve_transport import away, mismatch, read_token, shown, unusable

HEADER_LENGTH = "Inference-Header-Content-Length"
CHUNK_BYTES = 1 << 20
MAX_TEXT_BYTES = 64 * 1024
_PASSES = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses that say 'not now' (RFC 9110, RFC 6585); 500 is an answer to this very request."""

T = TypeVar("T")
_DEAD = (
    aiohttp.ServerDisconnectedError,
    aiohttp.ClientOSError,
    ConnectionResetError,
    BrokenPipeError,
)
"""A kept connection that the server had closed shows in one of these."""


class HttpTransport:
    """See ``kserve_transport.Transport``. No redirects, no proxy, no cookies, no compression."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._base = endpoint.url
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None

    def ready(self, seconds: float) -> str:
        operation = "probe"
        status, _, body = self._get("v2/health/ready", seconds, operation)
        if status != 200:
            raise away(operation, self._endpoint.name, f"says that it is not ready (HTTP {status})")
        status, _, body = self._get("v2", seconds, operation)
        try:
            return shown(kserve_json.server_name(bytes(body))) if status == 200 else ""
        except ValueError:
            return ""

    def model_ready(self, name: str, version: str, seconds: float) -> bool:
        status, _, _ = self._get(f"{_path(name, version)}/ready", seconds, "probe model")
        return status == 200

    def metadata(self, name: str, version: str, seconds: float) -> Signature:
        operation = "read model metadata"
        status, _, body = self._get(_path(name, version), seconds, operation)
        self._expect_success(status, bytes(body), operation)
        try:
            return kserve_json.model_metadata(bytes(body))
        except ValueError as error:
            raise unusable(operation, self._endpoint.name, f"sent metadata that cannot be read ({error})") from None

    def infer(
        self, name: str, version: str, inputs: Mapping[str, Array], outputs: Sequence[str], *, limit: int
    ) -> Reply:
        operation = "run model"
        header, parts = kserve_json.infer_request(inputs, outputs)
        headers = {
            "Content-Type": "application/octet-stream",
            "Content-Length": str(len(header) + sum(map(len, parts))),
            HEADER_LENGTH: str(len(header)),
        }

        async def body() -> AsyncIterator[bytes | memoryview]:
            yield header
            for part in parts:
                for at in range(0, len(part), CHUNK_BYTES):
                    yield part[at : at + CHUNK_BYTES]

        status, length, reply = self._run(
            self._request("POST", f"{_path(name, version)}/infer", headers, body, limit + kserve_json.MAX_JSON_BYTES),
            self._endpoint.timeout_seconds,
            operation,
        )
        self._expect_success(status, bytes(reply[:MAX_TEXT_BYTES]), operation)
        try:
            return kserve_json.infer_reply(memoryview(reply), len(reply) if length is None else int(length))
        except ValueError as error:
            raise unusable(operation, self._endpoint.name, f"sent a reply that cannot be read ({error})") from None

    def metrics(self, url: str, limit: int, seconds: float) -> str:
        """The text of Triton's /metrics. Without the token: it is another port. Raises as the others."""
        status, _, body = self._run(self._request("GET", url, {}, None, limit, token=False), seconds, "read metrics")
        self._expect_success(status, b"", "read metrics")
        return body.decode("utf-8", "replace")

    def close(self) -> None:
        if self._session is not None:
            self._loop.run_until_complete(_end(self._session))
            self._session = None
        if not self._loop.is_closed():
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    def _get(self, path: str, seconds: float, operation: str) -> tuple[int, str | None, bytearray]:
        return self._run(self._request("GET", path, {}, None, kserve_json.MAX_JSON_BYTES), seconds, operation)

    def _expect_success(self, status: int, body: bytes, operation: str) -> None:
        name = self._endpoint.name
        if status == 200:
            return
        if status in _PASSES:
            raise away(operation, name, f"answered HTTP {status}")
        said = shown(kserve_json.error_text(body))
        cause = f"answered HTTP {status}" + (f": {said}" if said else "")
        if status in (401, 403):
            raise unusable(operation, name, cause, "Check token_file of this endpoint")
        if 300 <= status < 400:
            raise unusable(operation, name, cause, "Redirects are not followed: give the address itself as url")
        if status == 404:
            raise mismatch(operation, name, f"it does not have the model ({cause.removeprefix('answered ')})")
        raise unusable(operation, name, cause, "See the server's log")

    def _run(self, call: Coroutine[Any, Any, T], seconds: float, operation: str) -> T:
        name = self._endpoint.name

        async def within() -> T:
            async with asyncio.timeout(seconds):
                return await call

        try:
            return self._loop.run_until_complete(within())
        except TimeoutError:  # aiohttp's time-outs are of this kind, too
            raise away(operation, name, f"did not answer within {seconds:g} s") from None
        except aiohttp.ClientConnectorCertificateError:
            hint = "Give the authority that issued it as ca_file"
            raise unusable(operation, name, "shows a certificate that is not trusted", hint) from None
        except aiohttp.ClientPayloadError:
            raise away(operation, name, "closed the connection in the middle of its reply") from None
        except (aiohttp.ClientConnectionError, OSError) as error:
            raise away(operation, name, f"cannot be reached ({type(error).__name__})") from None
        except aiohttp.ClientError as error:
            raise unusable(operation, name, f"does not speak HTTP ({type(error).__name__})") from None

    async def _request(
        self, method: str, path: str, headers: Mapping[str, str], body: Any, limit: int, *, token: bool = True
    ) -> tuple[int, str | None, bytearray]:
        """Status, length of the JSON object as the server gives it, body of at most ``limit`` bytes."""
        for last in (False, True):
            try:
                return await self._once(method, path, headers, body, limit, token)
            except aiohttp.ClientConnectorError:
                raise  # it was a new connection
            except _DEAD:
                if last:
                    raise
        raise AssertionError

    async def _once(
        self, method: str, path: str, headers: Mapping[str, str], body: Any, limit: int, token: bool
    ) -> tuple[int, str | None, bytearray]:
        session = self._open()
        secret = read_token(self._endpoint.token_file) if token else ""
        sent = {**headers, **({"Authorization": f"Bearer {secret}"} if secret else {})}
        url = path if "://" in path else f"{self._base}/{path}"
        async with session.request(
            method, url, headers=sent, data=body() if body else None, allow_redirects=False
        ) as response:
            length = response.headers.get(HEADER_LENGTH)
            if length is not None and not (length.isascii() and length.isdigit() and len(length) < 12):
                raise unusable(f"{method} request", self._endpoint.name, "sent a wrong header length")
            if response.headers.get("Content-Encoding", "identity").lower() not in ("", "identity"):
                raise unusable(f"{method} request", self._endpoint.name, "compressed its reply though not asked to")
            allowed = limit if response.status == 200 else MAX_TEXT_BYTES
            received = bytearray()
            if (response.content_length or 0) <= allowed:
                async for chunk in response.content.iter_any():
                    received += chunk
                    if len(received) > allowed:
                        break
                else:
                    return response.status, length, received
            response.close()
            if response.status != 200:
                return response.status, length, bytearray()
            raise unusable(
                f"{method} request", self._endpoint.name, f"sent more than the {limit} bytes that its reply can have"
            )

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            context: ssl.SSLContext | bool = True
            if self._base.startswith("https:") or self._endpoint.ca_file is not None:
                ca_file = self._endpoint.ca_file
                try:
                    context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
                except (OSError, ssl.SSLError) as error:
                    hint = "Give a PEM file with certificates"
                    raise OperatorError("read ca_file of an inference endpoint", type(error).__name__, hint) from None
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(ssl=context, limit=2),
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._endpoint.connect_seconds),
                headers={"User-Agent": f"dicomnode/{__version__}", "Accept-Encoding": "identity"},
                auto_decompress=False,
                trust_env=False,
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        return self._session


async def _end(session: aiohttp.ClientSession) -> None:
    await session.close()
    for _ in range(3):  # a TLS connection is gone some turns of the loop later
        await asyncio.sleep(0)


def _path(name: str, version: str) -> str:
    model = f"v2/models/{quote(name, safe='')}"
    return f"{model}/versions/{quote(version, safe='')}" if version else model
