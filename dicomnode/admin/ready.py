"""Whether the node can take and analyse studies now. The PACS or the cloud being away is not un-ready."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from dataclasses import dataclass
from typing import Any

import apsw

from dicomnode import durable
from dicomnode.admin.status import (
    MEBIBYTE,
    building_engines,
    failed_models,
    rejected_engines,
    serving_models,
    wanted_models,
)
from dicomnode.errors import NodeError, StorageError
from dicomnode.index.database import Database, Row
from dicomnode.index.desired import serving_settings
from dicomnode.index.operation import Figures, Processes
from dicomnode.settings import Settings

CONNECT_SECONDS = 2.0


@dataclass(frozen=True, slots=True)
class Check:
    """One line of /ready: ``detail`` tells the operator what is, ``hint`` what to do."""

    ok: bool
    detail: str
    hint: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "detail": self.detail} | ({"hint": self.hint} if self.hint and not self.ok else {})


def check_index(db: Database) -> Check:
    """Reads and durably writes one row."""
    try:
        Figures(db).check_readable()
        db.remember_time()
    except (NodeError, apsw.Error) as error:
        return Check(False, f"the index does not answer: {type(error).__name__}", "Check the volume of data_dir")
    return Check(True, "readable and writable")


def check_disk(settings: Settings) -> Check:
    try:
        free = durable.free_bytes(settings.node.data_dir) // MEBIBYTE
    except StorageError as error:
        return Check(False, f"data_dir: {error.cause}", "Check the volume of data_dir")
    reserve = settings.node.reserve_mb
    return Check(
        free > reserve,
        f"{free} MiB free, {reserve} MiB in reserve",
        "Free space on the volume of data_dir; until then C-STORE answers 0xA700",
    )


def receivers(processes: list[Row]) -> list[Row]:
    """The live listeners (``receiver-1``…), without the ``receiver`` that supervises them."""
    return [r for r in processes if str(r["name"]).startswith("receiver-") and r["alive"]]


def check_receivers(processes: list[Row], workers: int) -> Check:
    """Every configured receiver has a fresh heartbeat."""
    alive = len(receivers(processes))
    return Check(
        alive >= workers,
        f"{alive} of {workers} receivers answer",
        "See 'journalctl -u dicomnode-receiver' for why a receiver is silent",
    )


def check_models(processes: list[Row], wanted: frozenset[str]) -> Check:
    """A live worker serves every model that the rules name."""
    serving = serving_models(processes)
    missing = sorted(wanted - set(serving))
    if missing:
        failed = failed_models(processes)
        why = "; ".join(f"{name}: {failed.get(name, 'no live worker serves it')}" for name in missing)
        return Check(False, why, "See 'dicomnode models list' and 'journalctl -u dicomnode-worker'")
    names = sorted({f"{m['name']} {m['version']} ({m['engine']})" for m in serving.values()})
    told = [f"{name}: {b.get('step')} {b.get('share', 0):.0%}" for name, b in building_engines(processes).items()]
    told += [f"not used: {engine}, {why}" for engine, why in rejected_engines(processes).items()]
    return Check(True, "; ".join([", ".join(names) or "no rule names a model", *told]))


def dimse_address(processes: list[Row], settings: Settings) -> tuple[str, int]:
    """Where to try the DIMSE port: the heartbeat's port when the system chose it."""
    port = settings.dimse.port
    for row in receivers(processes) if not port else ():
        port = int(row["detail"].get("port") or 0)
    try:
        address = ipaddress.ip_address(settings.dimse.host)
    except ValueError:
        return settings.dimse.host, port
    if address.is_unspecified:
        return ("127.0.0.1" if address.version == 4 else "::1"), port
    return str(address), port


async def check_port(host: str, port: int) -> Check:
    """A TCP connection is accepted."""
    hint = "See 'journalctl -u dicomnode-receiver'; another program may hold the port"
    if not port:
        return Check(False, "no receiver has told its port", hint)
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            _, writer = await asyncio.open_connection(host, port)
    except (OSError, TimeoutError):
        return Check(False, f"port {port} does not accept connections", hint)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return Check(True, f"port {port} accepts connections")


def local_checks(db: Database, settings: Settings) -> tuple[dict[str, Check], tuple[str, int]]:
    """All checks but the port, and where the port is. Blocking: run it off the event loop."""
    checks = {"index": check_index(db), "disk": check_disk(settings)}
    processes = Processes(db).listing() if checks["index"].ok else []
    checks["receivers"] = check_receivers(processes, settings.dimse.workers)
    checks["models"] = check_models(
        processes, wanted_models(serving_settings(settings, db)) if checks["index"].ok else frozenset()
    )
    return checks, dimse_address(processes, settings)
