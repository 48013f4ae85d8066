"""A site, connections over loopback, and both directions of a handshake."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dicomnode.errors import NodeError, PeerError
from dicomnode.settings import Peer
from dicomnode.tls import Transport
from dicomnode.tls_context import SecureSocket
from tests.certificates import Authority
from tests.tls.tls_case import PATIENCE, Met, Pair, Site


@pytest.fixture
def site(tmp_path: Path) -> Site:
    authority = Authority(tmp_path / "ca")
    return Site(tmp_path, authority, authority.issue("node", dns=["node.hospital"], ips=["127.0.0.1"]))


@pytest.fixture
def connect() -> Iterator[Callable[[], Pair]]:
    """Both ends of a new connection over loopback."""
    opened: list[socket.socket] = []

    def make() -> Pair:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            client = socket.create_connection(listening.getsockname(), timeout=PATIENCE)
            server, _ = listening.accept()
        opened.extend((client, server))
        return client, server

    yield make
    for sock in opened:
        sock.close()


@pytest.fixture
def meet(connect: Callable[[], Pair]) -> Iterator[Callable[..., Met]]:
    """Our server against a client of the test; the server then says 'hello'."""
    opened: list[socket.socket] = []

    def call(transport: Transport, context: ssl.SSLContext, **options: Any) -> Met:
        client, server = connect()

        def answer() -> SecureSocket | NodeError:
            try:
                secure = transport.wrap_server(server)
            except NodeError as error:
                return error
            secure.sendall(b"hello")
            return secure

        with ThreadPoolExecutor(1) as pool:
            ours = pool.submit(answer)
            met = Met(PeerError("", ""), ConnectionError())
            try:
                secure = context.wrap_socket(client, **options)
                met.client = secure
                opened.append(secure)
                secure.settimeout(PATIENCE)
                met.read = secure.recv(5)
            except OSError as error:
                if isinstance(met.client, ssl.SSLSocket):
                    met.read = error
                else:
                    met.client = error
                client.close()
            met.server = ours.result(PATIENCE + 5)
        if isinstance(met.server, SecureSocket):
            opened.append(met.server)
        return met

    yield call
    for sock in opened:
        sock.close()


@pytest.fixture
def call(connect: Callable[[], Pair]) -> Iterator[Callable[..., SecureSocket]]:
    """Our client against a server of the test, which says 'hello'."""
    opened: list[socket.socket] = []

    def go(transport: Transport, context: ssl.SSLContext, peer: Peer) -> SecureSocket:
        client, server = connect()

        def answer() -> None:
            try:
                secure = context.wrap_socket(server, server_side=True)
                opened.append(secure)
                secure.sendall(b"hello")
            except OSError:
                server.close()

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            ours = transport.wrap_client(client, peer)
            opened.append(ours)
            return ours
        finally:
            thread.join(PATIENCE)

    yield go
    for sock in opened:
        sock.close()
