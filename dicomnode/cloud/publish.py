"""Makes and signs a repository of model bundles (TUF 1.0) in a folder that any web server can serve.

Layout: ``metadata/``, ``targets/NAME/SHA256.VERSION.tar.gz``, and ``root.json`` for the nodes. Keys lie
elsewhere, one PEM file for each role (0600); that of ``root`` is needed for a new root alone and
belongs off the machine. Archives come first and the timestamp last, so a node that looks in the
middle finds the state before.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner  # type: ignore[attr-defined]  # it does not export by mypy's rules
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from dicomnode import durable
from dicomnode.errors import OperatorError

ROLES = ("root", "targets", "snapshot", "timestamp")
LIFE = {"root": 365, "targets": 180, "snapshot": 30, "timestamp": 30}
"""Days until a role's metadata expires; with ``days`` given, the last two have that."""

RENEW_DAYS = 60
"""A root that ends sooner gets a successor, where its key is at hand."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """A folder that the caller has checked."""

    name: str
    version: str
    path: Path

    @property
    def target(self) -> str:
        return f"{self.name}/{self.version}.tar.gz"


@dataclass(frozen=True, slots=True)
class Published:
    added: Sequence[str]
    withdrawn: Sequence[str]
    versions: dict[str, int]
    expires: datetime


class Publisher:
    """Raises OperatorError for keys or metadata that are not usable, StorageError when the disk refuses."""

    def __init__(self, folder: Path, keys: Path, *, days: int | None = None, now: datetime | None = None) -> None:
        self._folder, self._keys = folder, keys
        self._now = (now or datetime.now(UTC)).replace(microsecond=0)
        self._life = LIFE | ({"snapshot": days, "timestamp": days} if days else {})
        self._metadata = folder / "metadata"

    def publish(
        self, bundles: Sequence[Bundle] = (), *, withdraw: Sequence[str] = (), rotate: Sequence[str] = ()
    ) -> Published:
        """Add archives, take targets (``NAME@VERSION``) out, give roles new keys, and sign all of it anew.

        What was published once cannot be published with other content.
        """
        root = self._root(rotate)
        targets = self._newest("targets", Targets)
        added = [b.target for b in bundles if self._add(targets, b)]
        gone = [self._withdraw(targets, reference) for reference in withdraw]
        snapshot, timestamp = self._newest("snapshot", Snapshot), self._newest("timestamp", Timestamp)
        snapshot.meta = {"targets.json": MetaFile(version=self._sign("targets", targets, root))}
        timestamp.snapshot_meta = MetaFile(version=self._sign("snapshot", snapshot, root))
        self._sign("timestamp", timestamp, root)
        roles = {"root": root, "targets": targets, "snapshot": snapshot, "timestamp": timestamp}
        return Published(
            added, gone, {k: int(r.version) for k, r in roles.items()}, min(r.expires for r in roles.values())
        )

    def _root(self, rotate: Sequence[str]) -> Any:
        newest = max(self._metadata.glob("*.root.json"), key=_number, default=None)
        if newest is None:
            self._make_keys()
            root = Root(consistent_snapshot=True)
            root.version = 0
            for role in ROLES:
                root.add_key(self._key(role).public_key, role)
            return self._sign_root(root, [self._key("root")])
        root = self._read(newest, Root)
        self._take_new_keys(root)
        ends_soon = root.expires < self._now + timedelta(days=RENEW_DAYS)
        if not rotate and not (ends_soon and self._file("root").exists()):
            return root
        signers = [self._key("root")]  # the former one has to agree to its successor (TUF 5.3)
        for role in dict.fromkeys(rotate):
            root.revoke_key(self._key(role).public_key.keyid, role)
            new = CryptoSigner.generate_ed25519()
            root.add_key(new.public_key, role)
            durable.write_durable(self._file(role).with_suffix(".new"), new.private_bytes)
            if role == "root":
                signers.append(new)
        root = self._sign_root(root, signers)
        self._take_new_keys(root)
        return root

    def _take_new_keys(self, root: Any) -> None:
        """Keys that the root names take their place; also after a rotation that was cut in the middle."""
        for role in ROLES:
            new = self._file(role).with_suffix(".new")
            if not new.exists():
                continue
            if self._key(role, new).public_key.keyid in root.roles[role].keyids:
                durable.rename_into_place(new, self._file(role))
                durable.sync_directory(self._keys)
            else:
                durable.remove(new)

    def _sign_root(self, root: Any, signers: Sequence[Any]) -> Any:
        root.version += 1
        root.expires = self._now + timedelta(days=self._life["root"])
        document = Metadata(root)
        for signer in signers:
            document.sign(signer, append=True)
        data = document.to_bytes()
        durable.write_durable(self._metadata / f"{root.version}.root.json", data)
        durable.write_durable(self._folder / "root.json", data)
        return root

    def _sign(self, role: str, signed: Any, root: Any) -> int:
        key = self._key(role)
        if key.public_key.keyid not in root.roles[role].keyids:
            raise _wrong(self._file(role), "it is not the key that the root names for this role")
        signed.version += 1
        signed.expires = self._now + timedelta(days=self._life[role])
        document = Metadata(signed)
        document.sign(key)
        name = "timestamp.json" if role == "timestamp" else f"{signed.version}.{role}.json"
        durable.write_durable(self._metadata / name, document.to_bytes())
        return int(signed.version)

    def _newest(self, role: str, kind: Any) -> Any:
        """The last of a role, or a new one. Of files that no timestamp names yet the number is not used again."""
        pattern = "timestamp.json" if role == "timestamp" else f"*.{role}.json"
        newest = max(self._metadata.glob(pattern), key=_number, default=None)
        if newest is not None:
            return self._read(newest, kind)
        signed = kind()
        signed.version = 0
        return signed

    def _read(self, path: Path, kind: Any) -> Any:
        try:
            signed = Metadata.from_bytes(path.read_bytes()).signed
        except (RepositoryError, ValueError, OSError) as error:
            raise _wrong(path, type(error).__name__) from None
        if not isinstance(signed, kind):
            raise _wrong(path, f"it is of the role {signed.type}")
        return signed

    def _add(self, targets: Any, bundle: Bundle) -> bool:
        data = pack(bundle.path)
        digest = hashlib.sha256(data).hexdigest()
        known = targets.targets.get(bundle.target)
        if known is not None and known.hashes.get("sha256") != digest:
            raise OperatorError(
                f"publish {bundle.name}@{bundle.version}",
                "it was published with other content",
                "Give the changed bundle a new version",
            )
        durable.write_durable(self._folder / "targets" / bundle.name / f"{digest}.{bundle.version}.tar.gz", data)
        targets.targets[bundle.target] = TargetFile.from_data(bundle.target, data, ["sha256"])
        return known is None

    def _withdraw(self, targets: Any, reference: str) -> str:
        name, _, version = reference.partition("@")
        target = f"{name}/{version}.tar.gz"
        if targets.targets.pop(target, None) is None:
            raise OperatorError(f"withdraw {reference}", "it is not published", "Use NAME@VERSION")
        return target

    def _file(self, role: str) -> Path:
        return self._keys / f"{role}.pem"

    def _make_keys(self) -> None:
        durable.make_directory(self._keys)
        for role in ROLES:
            if not self._file(role).exists():
                durable.write_durable(self._file(role), CryptoSigner.generate_ed25519().private_bytes)

    def _key(self, role: str, path: Path | None = None) -> Any:
        path = path or self._file(role)
        try:
            if path.stat().st_mode & 0o077:
                raise _wrong(path, "others may read it", "chmod 600 it; if they did read it, give the role a new key")
            return CryptoSigner(load_pem_private_key(path.read_bytes(), None))
        except OSError as error:
            raise _wrong(path, error.strerror or "unreadable", "Put the key there, or give --keys") from None
        except (ValueError, TypeError, UnsupportedAlgorithm) as error:
            raise _wrong(path, f"it is no private key ({type(error).__name__})") from None


def pack(folder: Path) -> bytes:
    """The bundle as .tar.gz; the same bytes for the same content. Symbolic links are refused."""
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_symlink():
                raise OperatorError(f"pack {folder.parent.name}@{folder.name}", "it holds a symbolic link")
            if path.is_file():
                info = tarfile.TarInfo(path.relative_to(folder).as_posix())
                info.size, info.mode = path.stat().st_size, 0o644
                with path.open("rb") as content:
                    tar.addfile(info, content)
    return gzip.compress(plain.getvalue(), compresslevel=6, mtime=0)


def _number(path: Path) -> int:
    first = path.name.partition(".")[0]
    return int(first) if first.isdecimal() else 0


def _wrong(path: Path, cause: str, hint: str = "") -> OperatorError:
    return OperatorError(f"use {path.parent.name}{os.sep}{path.name}", cause, hint)
