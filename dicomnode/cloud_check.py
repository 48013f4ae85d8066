"""What is wrong or worth knowing in the settings of the cloud, without asking anybody; it looks at files alone."""

from __future__ import annotations

import ipaddress
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from dicomnode.cloud_settings import PRIMARY
from dicomnode.errors import OperatorError
from dicomnode.findings import Finding, Level
from dicomnode.pseudonym_key import key_path, read_key
from dicomnode.settings import Settings


def cloud_findings(settings: Settings) -> Iterator[Finding]:
    """For ``check-config`` and ``doctor``."""
    cloud, sync = settings.cloud, settings.sync
    for key, url in _addresses(settings):
        yield from _clear_text(key, url)
    files: list[tuple[str, Path | None, bool]] = [
        ("cloud.token_file", cloud.token_file, True),
        ("cloud.ca_file", cloud.ca_file, False),
        ("metrics.token_file", settings.metrics.token_file, True),
        ("cloud.repository.token_file", cloud.repository.token_file, True),
        *((f"cloud.backups {b.name}: token_file", b.token_file, True) for b in cloud.backups),
    ]
    seen: set[Path] = set()
    for key, path, secret in files:
        if path is not None and path not in seen:
            seen.add(path)
            yield file_finding(key, path, secret=secret)
    if cloud.endpoints:
        yield from _pseudonym_key(settings)
    if settings.fleet.accept and not cloud.records_url:
        text = "fleet.accept lets the cloud set something, but there is no cloud.records_url to hear of it"
        yield Finding(Level.warn, "cloud", text, "Set cloud.records_url (…/v1), or empty fleet.accept")
    if sync.apply_corrections and cloud.records_url and sync.patients_identity == "removed":
        text = "sync.apply_corrections: the cloud can correct studies, but no name, ID or birth date"
        yield Finding(Level.note, "cloud", text, 'That needs sync.patients_identity = "kept"')
    if cloud.stow_url and sync.offline_mode == "always":
        text = "sync.offline_mode is always: what is for the cloud is kept here and not sent"
        yield Finding(Level.note, "cloud", text, "Set it to auto to send again")
    if cloud.repository.metadata_url and not any(not entry.url for entry in cloud.models):
        text = "cloud.repository is set, but no [[cloud.models]] follows a model there: nothing is pulled"
        yield Finding(Level.warn, "models", text, 'Add [[cloud.models]] with name = "…" and a policy')


def told(settings: Settings) -> Iterator[str]:
    """What leaves and what may come in, in lines for a person."""
    cloud, sync = settings.cloud, settings.sync
    if not cloud.stow_url:
        yield "cloud: off, nothing leaves the building"
    else:
        kept = [rule.name for rule in settings.rules if rule.cloud_identity == "kept"]
        who = f"removed, but for {', '.join(kept)}" if kept else "removed"
        records = "results and records" if cloud.records_url else "results (cloud.records_url is empty: no records)"
        backups = f", backups {', '.join(b.name for b in cloud.backups)}" if cloud.backups else ""
        yield f"cloud: {records} to {_host(cloud.stow_url)}{backups}; patient identity {who}"
    if cloud.records_url:
        yield f"  the cloud may set: {', '.join(settings.fleet.accept) or 'nothing'} (fleet.accept)"
        applied = "used in queries and new results" if sync.apply_corrections else "kept as records, not used"
        yield f"  corrections of patients and studies: {applied} (sync.apply_corrections)"
    if cloud.models:
        names = ", ".join(f"{m.name} from {_host(m.url or cloud.repository.metadata_url)}" for m in cloud.models)
        yield f"models in: {names}"
    if settings.metrics.remote_write_url:
        yield f"metrics to {_host(settings.metrics.remote_write_url)}"


def _addresses(settings: Settings) -> Iterable[tuple[str, str]]:
    cloud = settings.cloud
    for endpoint in cloud.endpoints:
        section = "cloud" if endpoint.name == PRIMARY else f"cloud.backups {endpoint.name}"
        for key in ("stow_url", "records_url", "health_url"):
            yield f"{section}.{key}", getattr(endpoint, key)
    yield "metrics.remote_write_url", settings.metrics.remote_write_url


def _clear_text(key: str, url: str) -> Iterator[Finding]:
    if url.startswith("http://") and not loopback(urlsplit(url).hostname or ""):
        text = f"{key} is http:// to another machine: nothing is sent there, since anybody between could read it"
        yield Finding(Level.fault, "cloud", text, "Use https://; http:// is for an address on this machine only")


def loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _host(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"


def file_finding(key: str, path: Path, *, secret: bool) -> Finding:
    try:
        mode = stat.S_IMODE(path.stat().st_mode)
        empty = not path.read_bytes().strip()
    except OSError as error:
        hint = f"Put the content there, readable for the node's user, or correct {key.rpartition(': ')[2]}"
        return Finding(Level.fault, "cloud", f"{key}: {path}: {error.strerror}", hint)
    if empty:
        return Finding(Level.fault, "cloud", f"{key}: {path} is empty", "Write the content into it")
    if secret and mode & 0o077:
        hint = f"chmod 600 {path}, or use LoadCredential as in systemd/"
        return Finding(Level.warn, "cloud", f"{key}: others on this box may read {path} (mode {mode:o})", hint)
    return Finding(Level.ok, "cloud", f"{key}: {path} is readable")


def _pseudonym_key(settings: Settings) -> Iterable[Finding]:
    """Nothing to say before the first result has left: the key is made then."""
    if settings.cloud.pseudonym_key_file is None and not key_path(settings).exists():
        return
    try:
        read_key(settings)
    except OperatorError as error:
        yield Finding(Level.fault, "cloud", f"{error.operation}: {error.cause}", error.hint)
    else:
        yield Finding(Level.ok, "cloud", f"the key of the pseudonyms is {key_path(settings)}: keep a copy")
