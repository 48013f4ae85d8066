"""Delegated roles of the signed repository: which of their targets count, decided by python-tuf alone.

``Updater.get_targetinfo`` follows delegations for one path; what is on offer has to be listed first. So the
files of the roles only propose paths, and each path is asked for: what comes back was found in a role that is
signed by its own keys, is of now, and may sign for that path, in the order of trust of TUF 5.6.7.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import DelegatedRole, Metadata, TargetFile, Targets
from tuf.ngclient import Updater

MOST_ROLES = 32
MOST_TARGETS = 2000
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_BROKEN = (tuf_errors.RepositoryError, tuf_errors.DownloadError, ValueError, TypeError, KeyError, RecursionError)


@dataclass(frozen=True, slots=True)
class Delegated:
    """A target and the role whose file proposed it, with the end of that file (ISO 8601)."""

    target: TargetFile
    role: str
    until: str


def follow(
    updater: Updater, top: Targets, folder: Path, known: Collection[str], wanted: re.Pattern[str]
) -> tuple[list[Delegated], list[str]]:
    """Targets of delegated roles whose paths are ``wanted`` and not ``known``, and what is wrong with which role.

    ``updater`` has refreshed into ``folder``. A role that is broken, expired or not there takes nothing from
    the others. Roles by hash prefixes (bins) are not followed: their names say nothing of what they hold.
    """
    found: dict[str, Delegated] = {}
    faults: list[str] = []
    waiting, seen = _roles(top, faults), set[str]()
    while waiting:
        role = waiting.pop(0)
        if role.name in seen:
            continue
        if len(seen) == MOST_ROLES:
            faults.append(f"more than {MOST_ROLES} delegated roles")
            break
        seen.add(role.name)
        try:
            signed = _load(updater, role, folder)
            waiting += _roles(signed, faults)
            paths = [p for p in signed.targets if wanted.fullmatch(p) and p not in known and p not in found]
            for path in paths[: MOST_TARGETS - len(found)]:
                target = updater.get_targetinfo(path)
                if target is not None:
                    found[path] = Delegated(target, role.name, signed.expires.isoformat())
                else:
                    faults.append(f"role {role.name} lists what it may not sign for")
        except _BROKEN as error:
            faults.append(f"role {_shown(role.name)} is not followed: {error or type(error).__name__}")
    return list(found.values()), list(dict.fromkeys(faults))


def _load(updater: Updater, role: DelegatedRole, folder: Path) -> Targets:
    """Its file, which the updater has verified or, where an earlier role ends the search, may be of before."""
    probe = probe_of(role)
    if probe is None or not _NAME.fullmatch(role.name):
        raise ValueError("its name or paths are not of the form that models have, NAME-*/*")
    updater.get_targetinfo(probe)
    path = folder / f"{quote(role.name, '')}.json"
    if not path.exists():
        raise ValueError("an earlier role that ends the search stands before it")
    signed: Any = Metadata.from_file(str(path)).signed
    if not isinstance(signed, Targets):
        raise ValueError(f"it is of the role {signed.type}")  # noqa: TRY004 one kind of error for what is in a file
    return signed


def probe_of(role: DelegatedRole) -> str | None:
    """A path that the role may sign for; None where its patterns give none. Pure."""
    for pattern in role.paths or ():
        probe = re.sub(r"[*?]", "x", pattern)
        if role.is_delegated_path(probe):
            return str(probe)
    return None


def _roles(signed: Targets, faults: list[str]) -> list[DelegatedRole]:
    delegations = signed.delegations
    if delegations is None:
        return []
    if delegations.succinct_roles is not None:
        faults.append("roles by hash prefixes are not followed")
    roles: Iterable[DelegatedRole] = (delegations.roles or {}).values()
    return list(roles)


def _shown(name: str) -> str:
    return name if _NAME.fullmatch(name) else "with an unusual name"
