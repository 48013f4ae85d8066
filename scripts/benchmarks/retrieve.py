"""C-MOVE to storescp and C-GET by getscu of one study of 300 slices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

from benchmarks import clients, data, peers
from benchmarks.peers import Acceptor
from benchmarks.report import Figures, Goal, Row, Section, ratio
from benchmarks.tools import (
    NO_DELAY,
    Bench,
    BenchError,
    Samples,
    Skipped,
    free_port,
    remove,
    say,
    settle,
    timed,
)

TARGET = "SINK"
OURS, ORTHANC, DCMQRSCP = "dicomnode", "Orthanc, TCP_NODELAY", "dcmqrscp, TCP_NODELAY"
ARCHIVES: Mapping[str, Callable[[Path, Mapping[str, int]], object]] = {
    OURS: peers.dicomnode,
    ORTHANC: lambda folder, targets: peers.orthanc(folder, targets=targets),
    DCMQRSCP: peers.dcmqrscp,
}
Cell = tuple[str, str]
"""Archive, service."""


def run(bench: Bench) -> Section:
    """All archives hold the study and stay up; they take turns, and who waits does nothing."""
    objects = data.ct(bench)
    objects.renew()
    study = objects.study_uid()
    sink = free_port()
    found: dict[Cell, Samples] = {}
    with ExitStack() as stack:
        archives: dict[str, Acceptor] = {}
        for name, start in ARCHIVES.items():
            try:
                acceptor: Acceptor = stack.enter_context(start(bench.folder("archive"), {TARGET.lower(): sink}))  # type: ignore[arg-type]
            except Skipped as reason:
                bench.skip(str(reason))
                continue
            say.print(f"retrieve: filling {name} …")
            before = acceptor.count()
            timed(clients.dcmsend(objects, acceptor.called)(acceptor.port), NO_DELAY)
            acceptor.expect(before + len(objects), f"filling {name}")
            archives[name] = acceptor
        for turn in range(bench.repeat + 1):
            for name, acceptor in archives.items():
                say.print(f"retrieve {turn}/{bench.repeat}: {name} …")
                for service, once in (("C-MOVE", _move), ("C-GET", _get)):
                    try:
                        seconds = once(bench, acceptor, study, sink, len(objects))
                    except BenchError as error:
                        bench.skip(f"{service} from {name}: {error}")
                        continue
                    if turn:  # the first only warms what is cached on either side
                        found.setdefault((name, service), Samples()).add(seconds)
    idle = {
        "C-MOVE": clients.start_up(clients.movescu(study, "PACS", TARGET)),
        "C-GET": clients.start_up(clients.getscu(study, "PACS", bench.work)),
    }
    remove(objects.folder)
    return _section(bench, len(objects), found, idle)


def _move(bench: Bench, acceptor: Acceptor, study: str, sink: int, count: int) -> float:
    folder = bench.folder("sink")
    with peers.storescp(folder, aet=TARGET, port=sink) as target:
        settle()
        seconds = timed(clients.movescu(study, acceptor.called, TARGET)(acceptor.port), NO_DELAY)
        target.expect(count, "C-MOVE")
    remove(folder)
    return seconds


def _get(bench: Bench, acceptor: Acceptor, study: str, sink: int, count: int) -> float:
    del sink
    folder = bench.folder("got")
    folder.mkdir()
    settle()
    seconds = timed(clients.getscu(study, acceptor.called, folder)(acceptor.port), NO_DELAY)
    arrived = peers.files_in(folder)
    if arrived != count:
        raise BenchError(f"C-GET brought {arrived} of {count} objects")
    remove(folder)
    return seconds


def _section(bench: Bench, count: int, found: dict[Cell, Samples], idle: dict[str, float]) -> Section:
    def net(name: str, service: str) -> float | None:
        samples = found.get((name, service))
        return samples.less(idle[service]) if samples else None

    rows: list[Row] = []
    for name in ARCHIVES:
        row: Row = {"archive": name}
        for service in idle:
            seconds, ours = net(name, service), net(OURS, service)
            text = "-" if seconds is None else f"{seconds:.2f}"
            if seconds is not None and ours is not None and name != OURS:
                text += f" ({seconds / ours:.2f}x)"
            row[f"{service}, s"] = text
        rows.append(row)
    start = ", ".join(f"{service} {seconds:.2f} s" for service, seconds in idle.items())
    note = (
        f"movescu to storescp, getscu; TCP_NODELAY at every program of DCMTK. Best of {bench.repeat}, start of the "
        f"client taken off: {start}. In brackets the ratio to dicomnode, above 1: slower."
    )
    section = Section([Figures(f"Retrieving a study of {count} slices of 526 KB", rows, note)])
    for service in idle:
        for name in (ORTHANC, DCMQRSCP):
            mine, other = net(OURS, service), net(name, service)
            known = mine is not None and other is not None
            text = f"{mine:.2f} s against {other:.2f} s, {ratio(other or 0, mine or 1)}" if known else "-"
            met = mine < other if mine is not None and other is not None else None
            section.goals.append(Goal(f"{service} against {name}", "faster", text, met))
    section.samples = {
        "start_up_s": idle,
        "cells": [{"archive": n, "service": s, **v.as_json()} for (n, s), v in found.items()],
    }
    return section
