"""Memory of every receiving process: under 16 associations, and for one object of 2 GB."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from benchmarks import clients, data, peers
from benchmarks.data import ObjectSet
from benchmarks.parallel import send_all
from benchmarks.peers import Acceptor, Kind
from benchmarks.report import Figures, Goal, Row, Section
from benchmarks.tools import MEGABYTE, Bench, BenchError, Samples, Skipped, remove, say

SAMPLE_SECONDS = 0.1
WORKER_MEGABYTES = 150
EXTRA_MEGABYTES = 64
PARALLEL = (peers.DICOMNODE, peers.STORESCP_FORK, peers.ORTHANC, peers.PYNETDICOM)
LARGE = (
    peers.DICOMNODE,
    peers.STORESCP,
    Kind("storescp +B, TCP_NODELAY", "no", lambda folder: peers.storescp(folder, more=("+B",))),
)


@dataclass(slots=True)
class Peaks:
    """Highest values in bytes: of one process, and of all together at one moment."""

    rss: int = 0
    uss: int = 0
    pss: int = 0
    all_pss: int = 0
    processes: int = 0
    extra: int = 0
    """RSS of the process that grew most above what it had before."""

    before: dict[int, int] = field(default_factory=dict)

    def look(self, processes: list[psutil.Process]) -> None:
        together, alive = 0, 0
        for process in processes:
            with contextlib.suppress(psutil.Error):
                info = process.memory_full_info()
                high = max(info.rss, high_water(process.pid))
                self.rss, self.uss, self.pss = max(self.rss, high), max(self.uss, info.uss), max(self.pss, info.pss)
                self.extra = max(self.extra, high - self.before.get(process.pid, 0))
                together += info.pss
                alive += 1
        self.all_pss, self.processes = max(self.all_pss, together), max(self.processes, alive)


def high_water(pid: int) -> int:
    """VmHWM in bytes: the kernel's own peak of RSS, which no sampling misses."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def start_afresh(processes: list[psutil.Process]) -> dict[int, int]:
    """Set each VmHWM back to what it has now (proc(5), clear_refs); RSS by process id."""
    found = {}
    for process in processes:
        with contextlib.suppress(OSError, psutil.Error):
            Path(f"/proc/{process.pid}/clear_refs").write_text("5")
            found[process.pid] = process.memory_info().rss
    return found


@contextmanager
def watching(processes: Callable[[], list[psutil.Process]]) -> Iterator[Peaks]:
    """Sample in the background and once more at the end."""
    peaks = Peaks(before=start_afresh(processes()))
    stop = threading.Event()

    def loop() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            peaks.look(processes())

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield peaks
    finally:
        stop.set()
        thread.join()
        peaks.look(processes())


def run(bench: Bench) -> Section:
    section = Section()
    _sixteen(bench, section)
    _large(bench, section)
    return section


def _mb(size: float) -> str:
    return f"{size / MEGABYTE:.0f}"


def _sixteen(bench: Bench, section: Section) -> None:
    sets = data.for_senders(bench, "ct", 16, bench.amount(60, 6), 512)
    rows: list[Row] = []
    for kind in PARALLEL:
        say.print(f"memory, 16 associations: {kind.name} …")
        folder = bench.folder("memory")
        try:
            with kind.start(folder) as acceptor:
                with watching(acceptor.processes) as peaks:
                    send_all(acceptor, sets)
                rows.append(
                    {
                        "receiver": kind.name,
                        "processes": peaks.processes,
                        "RSS MB": _mb(peaks.rss),
                        "USS MB": _mb(peaks.uss),
                        "PSS MB": _mb(peaks.pss),
                        "PSS MB of all": _mb(peaks.all_pss),
                    }
                )
                if kind is peers.DICOMNODE:
                    text = f"{_mb(peaks.rss)} MB RSS"
                    met = peaks.rss < WORKER_MEGABYTES * MEGABYTE
                    section.goals.append(
                        Goal("receiver under 16 associations", f"< {WORKER_MEGABYTES} MB each", text, met)
                    )
        except Skipped as reason:
            bench.skip(str(reason))
        except BenchError as error:
            bench.skip(f"memory of {kind.name}: {error}")
        remove(folder)
    for objects in sets:
        remove(objects.folder)
    note = f"Peaks of the largest process while 16 senders send {len(sets[0])} x 526 KB each."
    section.tables.append(Figures("Memory under 16 associations", rows, note))
    section.samples["sixteen"] = rows


def _large(bench: Bench, section: Section) -> None:
    objects = data.multi_frame(bench)
    idle = clients.start_up(clients.dcmsend(objects, "PACS"))
    times: dict[str, Samples] = {}
    extra: dict[str, int] = {}
    for turn in range(bench.repeat):
        for kind in LARGE:
            say.print(f"memory {turn + 1}/{bench.repeat}, one object of {objects.size / 1e9:.1f} GB: {kind.name} …")
            folder = bench.folder("large")
            try:
                with kind.start(folder) as acceptor:
                    seconds, peak = _send_large(objects, acceptor)
                times.setdefault(kind.name, Samples()).add(seconds)
                extra[kind.name] = max(extra.get(kind.name, 0), peak)
            except Skipped as reason:
                bench.skip(str(reason))
            except BenchError as error:
                bench.skip(f"{kind.name}, object of 2 GB: {error}")
            remove(folder)
    rows: list[Row] = [
        {
            "receiver": name,
            "s": f"{samples.less(idle):.1f}",
            "MB/s": _mb(objects.size / samples.less(idle)),
            "extra RSS MB": _mb(extra[name]),
        }
        for name, samples in times.items()
    ]
    remove(objects.folder)
    note = (
        f"dcmsend with TCP_NODELAY; best of {bench.repeat}; start {idle:.2f} s taken off. +B: storescp without parsing."
    )
    section.tables.append(Figures(f"One multi-frame object of {objects.size / 1e9:.1f} GB", rows, note))
    section.samples["large"] = {name: {**t.as_json(), "extra_rss": extra[name]} for name, t in times.items()}
    ours = peers.DICOMNODE.name
    text, met = (
        ("-", None) if ours not in extra else (f"{_mb(extra[ours])} MB", extra[ours] < EXTRA_MEGABYTES * MEGABYTE)
    )
    section.goals.append(Goal("an object of 2 GB adds to the receiver", f"< {EXTRA_MEGABYTES} MB", text, met))


def _send_large(objects: ObjectSet, acceptor: Acceptor) -> tuple[float, int]:
    with watching(acceptor.processes) as peaks:
        argv = clients.dcmsend(objects, acceptor.called)
        seconds = clients.send(objects, acceptor, argv, no_delay=True, what="one large object")
    return seconds, peaks.extra
