"""The doctor at the line to the cloud: who answers, as whom, and at the right address. Nothing of a patient is sent."""

from __future__ import annotations

import http.client
import json
import socket
import ssl
from collections.abc import Iterable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

from dicomnode.clock import SystemClock, iso
from dicomnode.cloud_check import cloud_findings
from dicomnode.cloud_settings import PRIMARY, CloudEndpoint, node_name
from dicomnode.errors import NodeError, OperatorError
from dicomnode.findings import Finding, Level
from dicomnode.offline import HELD, may_ask
from dicomnode.settings import Repository, Settings

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 5.0
METADATA_SECONDS = 15.0
MAX_ANSWER_BYTES = 1 << 20
WAITS = "Results wait on this box and lose nothing. Check the outbound firewall, DNS and proxy"


def examine_cloud(settings: Settings) -> Iterable[Finding]:
    cloud = settings.cloud
    yield from cloud_findings(settings)
    ask = reach if may_ask(settings.sync.offline_mode) else _not_asked
    for endpoint in cloud.endpoints:
        reached = ask("cloud", endpoint.stow_url, endpoint.ca_file)
        yield reached
        if reached.level is Level.ok:
            yield from _ask(settings, endpoint)
    if not cloud.endpoints:
        yield Finding(Level.note, "cloud", "not configured: nothing leaves the building")
    urls = [pull.url for pull in cloud.models if pull.url]
    if cloud.repository.metadata_url:
        root = _root_file(cloud.repository)
        yield root
        if (
            root.level is Level.ok
            and may_ask(settings.sync.offline_mode)
            and not cloud.repository.metadata_url.startswith("s3:")
        ):
            yield _metadata(settings)
        urls += [u for u in (cloud.repository.metadata_url, cloud.repository.archives_url) if not u.startswith("s3:")]
    for host in dict.fromkeys(urlsplit(url)._replace(path="", query="", fragment="") for url in urls):
        yield ask("model pull", host.geturl(), cloud.ca_file)
    if settings.metrics.remote_write_url:
        yield ask("metrics", settings.metrics.remote_write_url, settings.metrics.ca_file)


def _ask(settings: Settings, endpoint: CloudEndpoint) -> Iterator[Finding]:
    """By requests that change nothing: is the path there, is the token right, and whose is it."""
    from dicomnode.sync.http import confidential, read_token

    where = "cloud" if endpoint.name == PRIMARY else f"cloud.backups {endpoint.name}"
    if not all(confidential(url) for url in (endpoint.stow_url, endpoint.records_url) if url):
        return  # told already; no token goes there
    try:
        token = read_token(endpoint.token_file)
    except OperatorError:
        return  # told already
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    status, _ = request("OPTIONS", endpoint.stow_url, headers, endpoint.ca_file)
    yield from judge_status(f"{where}.stow_url", status, "…/studies, where STOW-RS is taken")
    if endpoint.records_url:
        status, body = request("GET", f"{endpoint.records_url}/records?limit=1", headers, endpoint.ca_file)
        yield from judge_records(f"{where}.records_url", status, body, node_name(settings.node.ae_title))


def judge_status(key: str, status: int, right: str) -> Iterator[Finding]:
    """``status`` 0: no answer in time. Others than these are left to the service itself. Pure."""
    if status == 0:
        yield Finding(Level.warn, "cloud", f"{key}: it takes connections but does not answer", WAITS)
    elif status in (401, 403):
        text = f"{key}: HTTP {status}, the token is missing, wrong or of somebody else"
        yield Finding(Level.fault, "cloud", text, "Give token_file the token that the cloud has for this node")
    elif status == 404:
        text = f"{key}: HTTP 404, there is nothing at this path"
        yield Finding(Level.fault, "cloud", text, f"Correct {key}: {right}")
    elif 300 <= status < 400:
        text = f"{key}: HTTP {status}, it sends elsewhere, and the node does not follow"
        yield Finding(Level.fault, "cloud", text, f"Give {key} the address that it is sent to")


def judge_records(key: str, status: int, body: Any, own: str) -> Iterator[Finding]:
    """Pure."""
    if status != 200:
        yield from judge_status(key, status, "…/v1, as config/cloud-api.yaml has it")
        return
    if not isinstance(body, dict) or not isinstance(body.get("records"), list):
        text = f"{key}: what answers does not speak config/cloud-api.yaml"
        yield Finding(Level.fault, "cloud", text, f"Correct {key}, or empty it: results go without records")
        return
    known = body.get("node")
    if isinstance(known, str) and known not in ("", own):
        text = f"{key}: the cloud knows the token as that of another node"
        yield Finding(Level.fault, "cloud", text, f"Give token_file the token of {own}")
        return
    whose = f", knows this node as {known}" if known else ""
    yield Finding(Level.ok, "cloud", f"{key}: records are exchanged{whose}")


def request(method: str, url: str, headers: dict[str, str], ca_file: Path | None) -> tuple[int, Any]:
    """Status and JSON, None where it is none; status 0 without an answer. Redirections are not followed."""
    parts = urlsplit(url)
    host, timeout = parts.hostname or "", ANSWER_SECONDS
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
        connection = http.client.HTTPSConnection(host, parts.port, timeout=timeout, context=context)
    else:
        connection = http.client.HTTPConnection(host, parts.port, timeout=timeout)
    try:
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, path or "/", headers=headers)
        answer = connection.getresponse()
        data = answer.read(MAX_ANSWER_BYTES)
    except (OSError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()
    try:
        return answer.status, json.loads(data)
    except (ValueError, RecursionError):
        return answer.status, None


def _root_file(repository: Repository) -> Finding:
    from dicomnode.sync.trust import read_root

    assert repository.root_file is not None  # the settings see to it
    try:
        read_root(repository.root_file)
    except OperatorError as error:
        return Finding(Level.fault, "models", f"{error.operation}: {error.cause}", error.hint)
    return Finding(Level.ok, "models", "cloud.repository.root_file holds a signed root")


def _metadata(settings: Settings) -> Finding:
    """What the repository has signed now, as a node takes it that knows nothing but the root file; nothing is kept."""
    from dicomnode.sync.source import source_for
    from dicomnode.sync.trust import BoundedFetcher, Expired, Refused, read_root, refresh

    cloud = settings.cloud
    url, root_file = cloud.repository.metadata_url, cloud.repository.root_file
    assert root_file is not None  # the settings see to it
    try:
        fetcher = BoundedFetcher(source_for(url, cloud, SystemClock()), min(cloud.timeout_seconds, METADATA_SECONDS))
        with TemporaryDirectory() as folder:
            trusted = refresh(read_root(root_file), url, Path(folder, "cache"), Path(folder, "work"), fetcher)
    except (Expired, Refused) as error:
        return Finding(Level.fault, "models", f"cloud.repository.metadata_url: {error.cause}", error.hint)
    except NodeError as error:
        return Finding(Level.warn, "models", f"cloud.repository.metadata_url: {error.cause}", error.hint)
    found = f"{len(trusted.offers)} archives are signed, until {iso(trusted.expires)}"
    return Finding(Level.ok, "models", f"cloud.repository.metadata_url: {found}")


def _not_asked(name: str, url: str, ca_file: Path | None) -> Finding:
    """In place of :func:`reach` while nothing may be asked of the cloud."""
    del ca_file
    return Finding(Level.note, name, f"{urlsplit(url).hostname}: {HELD}")


def reach(name: str, url: str, ca_file: Path | None) -> Finding:
    """A TCP connection, and a TLS handshake for https; nothing is sent."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    where = f"{host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=CONNECT_SECONDS) as sock:
            if parts.scheme == "https":
                context = ssl.create_default_context(cafile=str(ca_file) if ca_file else None)
                with context.wrap_socket(sock, server_hostname=host) as tls:
                    return Finding(Level.ok, name, f"{where} answers, {tls.version()}")
    except ssl.SSLCertVerificationError as error:
        hint = "Is a proxy in between? Put its authority into cloud.ca_file"
        return Finding(Level.warn, name, f"{where}: its certificate is not trusted: {error.verify_message}", hint)
    except OSError as error:
        return Finding(Level.warn, name, f"{where} cannot be reached: {error.strerror or type(error).__name__}", WAITS)
    return Finding(Level.ok, name, f"{where} accepts connections")
