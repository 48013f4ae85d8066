"""``dicomnode cloud``: the endpoint in the foreground, until SIGTERM."""

from __future__ import annotations

import asyncio
import signal
import ssl
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from dicomnode import logs
from dicomnode.cloud.admission import is_loopback
from dicomnode.cloud.application import make_app
from dicomnode.cloud.callers import Caller, read_nodes, read_token
from dicomnode.cloud.storage import Storage
from dicomnode.errors import OperatorError


async def serve(
    storage: Storage,
    host: str,
    port: int,
    *,
    token: str | None = None,
    tls: ssl.SSLContext | None = None,
    models: Path | None = None,
    nodes: Mapping[str, Caller] | None = None,
    nodes_dir: Path | None = None,
    stop: asyncio.Event,
    started: Callable[[str], None] = lambda _: None,
) -> None:
    """Serve until ``stop``. ``started`` gets the address. Raises OperatorError when the port cannot be had."""
    runner = web.AppRunner(make_app(storage, token, models, nodes, nodes_dir), access_log=None, shutdown_timeout=2.0)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port, ssl_context=tls).start()
        except OSError as error:
            raise OperatorError("start the cloud endpoint", f"{host} port {port}: {error.strerror}") from error
        where, chosen = runner.addresses[0][:2]
        scheme = "https" if tls else "http"
        started(f"{scheme}://{f'[{where}]' if ':' in where else where}:{chosen}")
        await stop.wait()
    finally:
        await runner.cleanup()


def run_cloud(
    data_dir: Path,
    host: str,
    port: int,
    *,
    token_file: Path | None = None,
    nodes_dir: Path | None = None,
    certificate: Path | None = None,
    key: Path | None = None,
    reserve_mb: int = 256,
    models: Path | None = None,
    started: Callable[[str], None] = lambda _: None,
) -> int:
    """Blocks. Without a token only a loopback address is served, without a certificate none but plain HTTP."""
    token, nodes = read_token(token_file), read_nodes(nodes_dir)
    if token is None and not nodes and not is_loopback(host):
        cause = f"{host} is not a loopback address and there is no token"
        raise OperatorError("start the cloud endpoint", cause, "Give --token-file or --nodes")
    if token is not None and token in nodes:
        cause = "the administrator's token is also that of a node, which could do everything"
        raise OperatorError("start the cloud endpoint", cause, "Give the node a token of its own")
    tls = _tls(certificate, key)
    if tls is None and not is_loopback(host):
        logs.get().warning("no certificate: everybody between can read what is sent", address=host)
    storage = Storage(data_dir, reserve_mb)

    async def main() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        how: dict[str, Any] = {"token": token, "tls": tls, "models": models, "nodes": nodes, "nodes_dir": nodes_dir}
        await serve(storage, host, port, **how, stop=stop, started=started)

    try:
        asyncio.run(main())
    finally:
        storage.close()
    return 0


def _tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise OperatorError(
            "read the certificate", type(error).__name__, "Give PEM files that belong together"
        ) from None
    return context
