"""The signed repository of models: python-tuf decides what to believe, here are its network and its disk.

The trusted root comes from the operator. Each refresh works on a copy of the cache in staging and
what it accepted is then made durable file by file, roots first; so after a power cut each file is
old or new, never torn, and what protects from a roll-back does not go backwards.

A repository can only ever add: nothing here touches a version that serves.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import aiohttp
from tuf.api import exceptions as tuf_errors
from tuf.api.metadata import Metadata, Root, Snapshot, TargetFile, Targets, Timestamp
from tuf.ngclient import Updater, UpdaterConfig
from tuf.ngclient.fetcher import FetcherInterface

from dicomnode import durable
from dicomnode.errors import NodeError, OperatorError, PeerAway, PeerError
from dicomnode.index.trust import Offer, Trusted
from dicomnode.sync.delegations import follow
from dicomnode.sync.source import Again, Source

MOST_TARGETS_BYTES = 4 << 20
MOST_ROOT_BYTES = 512_000
MOST_ROTATIONS = 64
TARGET = re.compile(
    r"(?P<name>[a-z0-9][a-z0-9_.-]{0,63})/(?P<version>\d{1,9}\.\d{1,9}\.\d{1,9})\.(?:tar\.gz|zip)", re.ASCII
)
_ROOTS = re.compile(r"\d{1,9}\.root\.json", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Refused(PeerError):
    """The metadata is not signed as it must be, is older than what was seen, or does not fit together."""


class Expired(PeerError):
    """The repository shows metadata whose time is over: it is not kept, or somebody holds back the new one."""


class BoundedFetcher(FetcherInterface):  # type: ignore[misc]  # its modules do not export by mypy's rules
    """python-tuf's downloads over our own sources: capped while reading, with an absolute deadline for each file.

    Runs in a thread that has no event loop.
    """

    def __init__(self, source: Source, seconds: float) -> None:
        self._source, self._seconds = source, seconds

    def _fetch(self, url: str) -> Iterator[bytes]:
        return iter((self.download_bytes(url, MOST_TARGETS_BYTES),))

    def download_bytes(self, url: str, max_length: int) -> bytes:
        """Raises DownloadHTTPError, DownloadLengthMismatchError or DownloadError, as python-tuf expects."""
        role = unquote(urlsplit(url).path.rpartition("/")[2])
        try:
            return asyncio.run(self._read(url, max_length))
        except Again as error:
            if error.status:
                raise tuf_errors.DownloadHTTPError(f"{role}: {error.cause}", error.status) from error
            raise tuf_errors.DownloadError(f"{role}: {error.cause}") from error
        except TimeoutError as error:
            raise tuf_errors.DownloadError(f"{role}: no end within {self._seconds:g} s") from error
        except NodeError as error:
            raise tuf_errors.DownloadError(f"{role}: {error.cause}") from error
        except (aiohttp.ClientError, OSError, ValueError, RuntimeError) as error:
            raise tuf_errors.DownloadError(f"{role}: {type(error).__name__}") from error

    async def _read(self, url: str, most: int) -> bytes:
        parts, size = [], 0
        async with asyncio.timeout(self._seconds), self._source.open(url) as answer:
            async for chunk in answer.chunks:
                size += len(chunk)
                if size > most:
                    raise tuf_errors.DownloadLengthMismatchError(f"more than {most} bytes came")
                parts.append(bytes(chunk))
        return b"".join(parts)


def read_root(path: Path) -> bytes:
    """The operator's root. Raises OperatorError when it is none."""
    hint = "Put the repository's root.json there, got in a way that you trust"
    try:
        with path.open("rb") as file:
            data = file.read(MOST_ROOT_BYTES + 1)
    except OSError as error:
        raise OperatorError("read cloud.repository.root_file", error.strerror or "unreadable", hint) from None
    try:
        _check_root(data)
    except (tuf_errors.RepositoryError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise OperatorError("read cloud.repository.root_file", f"it is no signed root: {_short(error)}", hint) from None
    return data


def _check_root(data: bytes) -> None:
    """Raises when it is none, or not signed by its own keys."""
    if len(data) > MOST_ROOT_BYTES:
        raise ValueError("it is too long")
    root = Metadata[Root].from_bytes(data)
    if not isinstance(root.signed, Root):
        raise ValueError(f"it is of the role {root.signed.type}")  # noqa: TRY004 one kind of error for what is in a file
    root.signed.verify_delegate(Root.type, root.signed_bytes, root.signatures)


def refresh(root: bytes, metadata_url: str, cache: Path, work: Path, fetcher: FetcherInterface) -> Trusted:
    """Look for new metadata and verify it; blocking. What was accepted is kept in ``cache``, whatever happens next.

    Raises Refused, Expired, PeerAway, and StorageError when the disk refuses.
    """
    durable.remove_tree(work)
    durable.make_directory(work)
    try:
        _copy_out(cache, work)
        try:
            config = UpdaterConfig(
                max_root_rotations=MOST_ROTATIONS,
                root_max_length=MOST_ROOT_BYTES,
                targets_max_length=MOST_TARGETS_BYTES,
            )
            updater = Updater(str(work), metadata_url, fetcher=fetcher, config=config, bootstrap=root)
            updater.refresh()
            return _trusted(work, updater)
        finally:
            _keep(work, cache)
    except tuf_errors.ExpiredMetadataError as error:
        raise Expired("refresh models", _short(error), "Have the repository signed anew") from error
    except tuf_errors.DownloadLengthMismatchError as error:
        raise Refused("refresh models", _short(error)) from error
    except tuf_errors.DownloadError as error:
        raise PeerAway("refresh models", _short(error)) from error
    except (tuf_errors.RepositoryError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise Refused("refresh models", _short(error), "Ask who runs the repository; nothing was taken over") from error
    except OSError as error:
        raise durable.storage_error("keep metadata of models", error) from error
    finally:
        durable.remove_tree(work)


def _copy_out(cache: Path, work: Path) -> None:
    (work / "root_history").mkdir(mode=0o700)
    for path in _files(cache):
        shutil.copyfile(path, work / path.relative_to(cache))


def _keep(work: Path, cache: Path) -> None:
    for path in _files(work):
        kept, data = cache / path.relative_to(work), path.read_bytes()
        if not kept.exists() or kept.read_bytes() != data:
            durable.write_durable(kept, data)


def _files(folder: Path) -> list[Path]:
    """Roots first, oldest first; then what they sign."""
    roots = sorted(
        (p for p in (folder / "root_history").glob("*") if _ROOTS.fullmatch(p.name)),
        key=lambda p: int(p.name.partition(".")[0]),
    )
    order = ("timestamp.json", "snapshot.json", "targets.json")
    delegated = sorted(p for p in folder.glob("*.json") if p.name not in (*order, "root.json"))
    return [*roots, *(folder / name for name in order if (folder / name).is_file()), *delegated]


def _trusted(work: Path, updater: Updater) -> Trusted:
    """What the refresh has verified, from where it put it."""
    root = Metadata[Root].from_file(str(work / "root.json"))
    timestamp = Metadata[Timestamp].from_file(str(work / "timestamp.json"))
    snapshot = Metadata[Snapshot].from_file(str(work / "snapshot.json"))
    targets = Metadata[Targets].from_file(str(work / "targets.json"))
    roles: dict[str, Any] = {
        "root": root.signed, "timestamp": timestamp.signed, "snapshot": snapshot.signed, "targets": targets.signed
    }  # fmt: skip
    consistent = bool(root.signed.consistent_snapshot)
    own = targets.signed.targets
    delegated, faults = follow(updater, targets.signed, work, own.keys(), TARGET)
    offers = offers_of(own.values(), consistent=consistent)
    for one in delegated:
        offers += [replace(o, role=one.role, until=one.until) for o in offers_of([one.target], consistent=consistent)]
    return Trusted(
        versions={name: int(signed.version) for name, signed in roles.items()},
        expires=min(signed.expires for signed in roles.values()),
        offers=sorted(offers, key=_order),
        faults=[_one_line(fault) for fault in faults],
    )


def offers_of(targets: Any, *, consistent: bool) -> list[Offer]:
    """Targets that are model archives, ``NAME/VERSION.tar.gz`` or ``.zip`` with a SHA-256; others are passed over.

    Pure. Those of delegated roles come from :mod:`dicomnode.sync.delegations`.
    """
    found = []
    for target in targets:
        path, digest = str(target.path), _digest(target)
        match = TARGET.fullmatch(path)
        if match is None or digest is None or target.length <= 0:
            continue
        folder, _, file = path.rpartition("/")
        where = f"{folder}/{digest}.{file}" if consistent else path
        found.append(Offer(match["name"], match["version"], where, digest, int(target.length)))
    return sorted(found, key=_order)


def _order(offer: Offer) -> tuple[str, tuple[int, ...], str]:
    return offer.name, offer.order, offer.target


def _digest(target: TargetFile) -> str | None:
    digest = str(target.hashes.get("sha256", ""))
    return digest if _SHA256.fullmatch(digest) else None


def _short(error: BaseException) -> str:
    """A library's message about metadata, on one line and bounded: parts of it come from the other side."""
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    return "".join(c for c in " ".join(text.split()) if c.isprintable())[:200]
