"""Acceptors to measure against, each in its own processes and folder, as context managers."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.node import AE_TITLE, Node
from benchmarks.tools import (
    LOOPBACK,
    NO_DELAY,
    BenchError,
    accepts,
    cpu_seconds,
    family,
    free_port,
    program,
    running,
    wait_for,
)

PATIENCE_SECONDS = 20.0
"""How long an acceptor may take to show what it has acknowledged."""


@dataclass(frozen=True, slots=True)
class Acceptor:
    """A running peer: where it listens, how it is called, what it holds, which processes it is."""

    port: int
    called: str
    count: Callable[[], int]
    processes: Callable[[], list[psutil.Process]]

    def cpu(self) -> float:
        return cpu_seconds(self.processes())

    def expect(self, number: int, what: str) -> None:
        """Raises BenchError unless the acceptor holds exactly so many objects."""
        try:
            wait_for(lambda: self.count() >= number, what, PATIENCE_SECONDS)
        except BenchError:
            raise BenchError(f"{what}: {self.count()} objects arrived, {number} were sent") from None
        if self.count() != number:
            raise BenchError(f"{what}: {self.count()} objects are there, {number} were sent")


@dataclass(frozen=True, slots=True)
class Kind:
    """A peer that can be started: ``start(folder)`` with a folder that does not exist yet."""

    name: str
    durable: str
    start: Callable[[Path], AbstractContextManager[Acceptor]]


def files_in(folder: Path) -> int:
    return sum(1 for _ in folder.iterdir())


@contextmanager
def dicomnode(
    folder: Path, targets: Mapping[str, int] | None = None, data_dir: Path | None = None
) -> Iterator[Acceptor]:
    node = Node(folder, targets=targets, data_dir=data_dir)
    with node.serving():
        yield Acceptor(node.port, AE_TITLE, node.instances, node.receivers)


@contextmanager
def storescp(
    folder: Path,
    *,
    fork: bool = False,
    no_delay: bool = True,
    aet: str = "PACS",
    port: int = 0,
    more: tuple[str, ...] = (),
) -> Iterator[Acceptor]:
    port = port or free_port()
    objects = folder / "objects"
    objects.mkdir(parents=True)
    mode = ["--fork"] if fork else []
    argv = [program("storescp"), *mode, "-aet", aet, "+xa", *more, "-od", str(objects), str(port)]
    with running(argv, NO_DELAY if no_delay else {}, folder / "log") as process:
        wait_for(lambda: accepts(port), "storescp")
        yield Acceptor(port, aet, lambda: files_in(objects), lambda: family(process.pid))


@contextmanager
def orthanc(folder: Path, *, no_delay: bool = True, targets: Mapping[str, int] | None = None) -> Iterator[Acceptor]:
    port, http = free_port(), free_port()
    folder.mkdir(parents=True)
    config = {
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "index"),
        "DicomPort": port,
        "DicomAet": "PACS",
        "HttpPort": http,
        "DicomCheckCalledAet": False,
        "DicomAlwaysAllowStore": True,
        "DicomAlwaysAllowFind": True,
        "DicomAlwaysAllowMove": True,
        "DicomAlwaysAllowGet": True,
        "DicomThreadsCount": 32,
        "AuthenticationEnabled": False,
        "DicomModalities": {name: [name.upper(), LOOPBACK, number] for name, number in (targets or {}).items()},
        "Plugins": [],
    }
    file = folder / "orthanc.json"
    file.write_text(json.dumps(config))

    def count() -> int:
        with urllib.request.urlopen(f"http://{LOOPBACK}:{http}/statistics", timeout=30) as reply:
            return int(json.load(reply)["CountInstances"])

    with running([program("Orthanc"), str(file)], NO_DELAY if no_delay else {}, folder / "log") as process:
        wait_for(lambda: accepts(port) and accepts(http), "Orthanc")
        yield Acceptor(port, "PACS", count, lambda: family(process.pid))


@contextmanager
def dcmqrscp(folder: Path, targets: Mapping[str, int] | None = None) -> Iterator[Acceptor]:
    """DCMTK's archive with one storage area, every peer allowed."""
    port = free_port()
    area = folder / "area"
    area.mkdir(parents=True)
    hosts = {"bench": 0, **(targets or {})}
    lines = [
        f"NetworkTCPPort = {port}",
        "MaxPDUSize = 131072",
        "MaxAssociations = 64",
        "HostTable BEGIN",
        *(f"{name} = ({name.upper()}, {LOOPBACK}, {number})" for name, number in hosts.items()),
        "HostTable END",
        "VendorTable BEGIN",
        "VendorTable END",
        "AETable BEGIN",
        f"PACS {area} RW (10000, 100000mb) ANY",
        "AETable END",
    ]
    file = folder / "dcmqrscp.cfg"
    file.write_text("\n".join(lines) + "\n")
    with running([program("dcmqrscp"), "-c", str(file)], NO_DELAY, folder / "log") as process:
        wait_for(lambda: accepts(port), "dcmqrscp")
        yield Acceptor(port, "PACS", lambda: len(list(area.glob("*.dcm"))), lambda: family(process.pid))


@contextmanager
def python_peer(folder: Path, role: str) -> Iterator[Acceptor]:
    """Stock pynetdicom (``scp``) or the limit (``raw``)."""
    port = free_port()
    objects = folder / "objects"
    objects.mkdir(parents=True)
    argv = [sys.executable, "-m", "benchmarks.python_peers", role, str(port), str(objects)]
    with running(argv, {}, folder / "log") as process:
        wait_for(lambda: accepts(port), f"the Python peer '{role}'")
        yield Acceptor(port, "PACS", lambda: files_in(objects), lambda: family(process.pid))


DICOMNODE = Kind("dicomnode", "yes, indexed", dicomnode)
STORESCP_SHIPPED = Kind("storescp as shipped", "no", lambda folder: storescp(folder, no_delay=False))
STORESCP = Kind("storescp, TCP_NODELAY", "no", storescp)
STORESCP_FORK = Kind("storescp --fork, TCP_NODELAY", "no", lambda folder: storescp(folder, fork=True))
ORTHANC_SHIPPED = Kind("Orthanc as shipped", "yes, indexed", lambda folder: orthanc(folder, no_delay=False))
ORTHANC = Kind("Orthanc, TCP_NODELAY", "yes, indexed", orthanc)
PYNETDICOM = Kind("stock pynetdicom", "no", lambda folder: python_peer(folder, "scp"))
RAW = Kind("raw socket, one file each, fdatasync", "yes", lambda folder: python_peer(folder, "raw"))
