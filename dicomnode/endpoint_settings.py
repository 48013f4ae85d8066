"""KServe v2 / Triton servers: the entries [[inference.endpoints]], and what can be said of them without asking."""

from __future__ import annotations

import ipaddress
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, Self
from urllib.parse import SplitResult, urlsplit

from pydantic import Field, field_validator, model_validator

from dicomnode.findings import Finding, Level
from dicomnode.peer_settings import Section

MODEL = re.compile(r"[a-z0-9][a-z0-9-]{0,31}(@[0-9A-Za-z.-]{1,64})?")
REMOTE_MODEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}(@[A-Za-z0-9_.-]{0,64})?")

NetworkClass = Literal["host", "lan", "wan"]


class Endpoint(Section):
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]{0,31}$", description="short name in logs, jobs and metrics")
    url: str = Field(description="http(s)://HOST[:PORT][/PREFIX] or grpc(s)://HOST:PORT")
    connect_seconds: float = Field(3.0, gt=0, le=60, description="time for the connection")
    timeout_seconds: float = Field(60.0, gt=0, le=3600, description="absolute deadline of one request")
    token_file: Path | None = Field(None, description="file with a bearer token, read again for each request")
    ca_file: Path | None = Field(None, description="PEM file with the authorities to trust instead of the system's")
    models: dict[str, str] = Field(
        default_factory=dict, description="bundle NAME or NAME@VERSION -> NAME or NAME@VERSION on the server"
    )
    network: NetworkClass = Field("lan", description="how far the pixels travel: host | lan | wan")
    accelerator: Literal["gpu", "cpu"] = Field("gpu", description="what runs the models there")
    cost: float = Field(0.0, ge=0, le=1, description="price of its use, 0 (free) to 1 (dearest)")
    metrics_url: str = Field("", description="Triton's /metrics; empty: load is judged by latency alone")
    verify_seconds: float = Field(3600.0, gt=0, description="the golden cases are run again this often")

    @field_validator("url")
    @classmethod
    def _address(cls, value: str) -> str:
        parts = _split(value)
        if parts.scheme not in ("http", "https", "grpc", "grpcs"):
            raise ValueError("must begin with http://, https://, grpc:// or grpcs://")
        if parts.scheme.startswith("grpc") and (parts.port is None or parts.path.strip("/")):
            raise ValueError("a gRPC address is grpc://HOST:PORT or grpcs://HOST:PORT")
        return value.rstrip("/")

    @field_validator("metrics_url")
    @classmethod
    def _metrics(cls, value: str) -> str:
        if value and _split(value).scheme not in ("http", "https"):
            raise ValueError("must begin with http:// or https://")
        return value

    @field_validator("models")
    @classmethod
    def _names(cls, value: dict[str, str]) -> dict[str, str]:
        for ours, theirs in value.items():
            if not MODEL.fullmatch(ours) or not REMOTE_MODEL.fullmatch(theirs):
                raise ValueError("maps NAME or NAME@VERSION of a bundle to NAME or NAME@VERSION on the server")
        return value

    @model_validator(mode="after")
    def _token_stays_secret(self) -> Self:
        if self.token_file is not None and not self.encrypted and not self.on_this_host:
            raise ValueError("token_file needs https:// or grpcs://: over a plain connection everyone could read it")
        return self

    @property
    def scheme(self) -> str:
        return _split(self.url).scheme

    @property
    def encrypted(self) -> bool:
        return self.scheme in ("https", "grpcs")

    @property
    def host(self) -> str:
        return _split(self.url).hostname or ""

    @property
    def on_this_host(self) -> bool:
        """Whether the connection stays on this machine."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def remote(self, name: str, version: str) -> tuple[str, str]:
        """Name and version that the server has for a bundle; an empty version leaves it to the server.

        Without an entry in ``models`` they are the bundle's own. ``NAME@`` stands for a server
        that has no versions.
        """
        entry = self.models.get(f"{name}@{version}") or self.models.get(name) or name
        there, at, number = entry.partition("@")
        return there, number if at else version


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ValueError("is not an address such as http://gpu1:8000") from None
    if not parts.hostname or parts.query or parts.fragment or "@" in parts.netloc:
        raise ValueError("is not an address such as http://gpu1:8000; secrets go into token_file")
    return parts


def check_endpoints(endpoints: Sequence[Endpoint], *, needed: bool) -> None:
    """Raises ValueError when names repeat, or when none is given although the engine is ``kserve``."""
    names = [e.name for e in endpoints]
    if len(set(names)) != len(names) or "local" in names:
        raise ValueError("inference.endpoints: names must differ from each other and from 'local'")
    if needed and not endpoints:
        raise ValueError('inference.engine = "kserve" needs at least one [[inference.endpoints]]')


def endpoint_findings(endpoints: Sequence[Endpoint], *, used: bool) -> Iterator[Finding]:
    """What can be said without asking the endpoints; ``used``: the engine is ``auto`` or ``kserve``."""
    if endpoints and not used:
        hint = "Set inference.engine to auto or kserve, or take the endpoints out"
        yield Finding(Level.warn, "endpoints", "configured, but the engine that is set does not use them", hint)
    for endpoint in endpoints:
        if not endpoint.encrypted and not endpoint.on_this_host:
            hint = "Use https:// or grpcs://, or a network that only these machines share"
            yield Finding(Level.warn, "endpoints", f"{endpoint.name}: images travel unencrypted", hint)
        for key, path in (("token_file", endpoint.token_file), ("ca_file", endpoint.ca_file)):
            if path is not None:
                yield from _file(f"{endpoint.name}: {key}", path, secret=key == "token_file")


def _file(key: str, path: Path, *, secret: bool) -> Iterator[Finding]:
    try:
        mode, empty = stat.S_IMODE(path.stat().st_mode), not path.read_bytes().strip()
    except OSError as error:
        hint = "Check the path and its permissions"
        yield Finding(Level.fault, "endpoints", f"{key}: {path}: {error.strerror}", hint)
        return
    if empty:
        yield Finding(Level.fault, "endpoints", f"{key}: {path} is empty", "Write the content into it")
    elif secret and mode & 0o077:
        hint = f"chmod 600 {path}, or use LoadCredential as in systemd/"
        yield Finding(Level.warn, "endpoints", f"{key}: others on this box may read {path} (mode {mode:o})", hint)
