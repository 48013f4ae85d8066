"""One association: what each acceptor takes to receive "ct" and "small" from dcmsend."""

from __future__ import annotations

from benchmarks import clients, data, peers
from benchmarks.data import ObjectSet
from benchmarks.peers import Kind
from benchmarks.python_peers import send_raw
from benchmarks.report import Figures, Goal, Row, Section, ratio
from benchmarks.tools import Bench, Samples, Skipped, remove, say, settle

KINDS = (
    peers.DICOMNODE,
    peers.STORESCP,
    peers.STORESCP_FORK,
    peers.STORESCP_SHIPPED,
    peers.ORTHANC,
    peers.ORTHANC_SHIPPED,
    peers.PYNETDICOM,
)
SLOW_SECONDS = 8.0
"""A cell that takes longer is measured once: its time is all waiting, and waiting does not vary."""

CLIENTS = {"as shipped": False, "TCP_NODELAY": True}
Cell = tuple[str, str, str]
"""Acceptor, set, client."""


def run(bench: Bench) -> Section:
    sets = (data.ct(bench), data.small(bench))
    idle = {s.name: clients.start_up(clients.dcmsend(s, "PACS")) for s in sets}
    found: dict[Cell, Samples] = {}
    held: dict[Cell, Samples] = {}
    cpu: dict[Cell, float] = {}
    for turn in range(bench.repeat):
        for kind in KINDS:
            say.print(f"intake {turn + 1}/{bench.repeat}: {kind.name} …")
            try:
                _measure(bench, kind, sets, found, held, cpu)
            except Skipped as reason:
                bench.skip(str(reason))
        _limit(bench, sets, found)
    for s in sets:
        remove(s.folder)
    return _section(sets, idle, found, held, cpu, bench.repeat)


def _measure(
    bench: Bench,
    kind: Kind,
    sets: tuple[ObjectSet, ...],
    found: dict[Cell, Samples],
    held: dict[Cell, Samples],
    cpu: dict[Cell, float],
) -> None:
    folder = bench.folder("intake")
    with kind.start(folder) as acceptor:
        for objects in sets:
            for client, no_delay in CLIENTS.items():
                cell = (kind.name, objects.name, client)
                samples = found.setdefault(cell, Samples())
                if samples.seconds and samples.best > SLOW_SECONDS:
                    continue
                spent = acceptor.cpu()
                argv = clients.dcmsend(objects, acceptor.called)
                until = held.setdefault(cell, Samples())
                what = " / ".join(cell)
                samples.add(clients.send(objects, acceptor, argv, no_delay=no_delay, what=what, held=until))
                cpu[cell] = min(cpu.get(cell, 1e9), acceptor.cpu() - spent)
    remove(folder)


def _limit(bench: Bench, sets: tuple[ObjectSet, ...], found: dict[Cell, Samples]) -> None:
    folder = bench.folder("raw")
    with peers.RAW.start(folder) as acceptor:
        for objects in sets:
            settle()
            before = acceptor.count()
            seconds = send_raw(acceptor.port, objects.files)
            acceptor.expect(before + len(objects), "the raw limit")
            found.setdefault((peers.RAW.name, objects.name, "TCP_NODELAY"), Samples()).add(seconds)
    remove(folder)


def _net(found: dict[Cell, Samples], idle: dict[str, float], cell: Cell) -> float | None:
    """Best time without dcmsend's start-up; the raw client has none."""
    samples = found.get(cell)
    if samples is None or not samples.seconds:
        return None
    return samples.best if cell[0] == peers.RAW.name else samples.less(idle[cell[1]])


def _section(
    sets: tuple[ObjectSet, ...],
    idle: dict[str, float],
    found: dict[Cell, Samples],
    held: dict[Cell, Samples],
    cpu: dict[Cell, float],
    repeat: int,
) -> Section:
    kinds = [k for k in (*KINDS, peers.RAW) if any(c[0] == k.name for c in found)]
    rows: list[Row] = []
    for kind in kinds:
        row: Row = {"acceptor": kind.name, "durable": kind.durable}
        for objects in sets:
            for client in CLIENTS:
                seconds = _net(found, idle, (kind.name, objects.name, client))
                ours = _net(found, idle, (peers.DICOMNODE.name, objects.name, client))
                text = "-" if seconds is None else f"{seconds:.2f}"
                if seconds is not None and ours and kind is not peers.DICOMNODE:
                    text += f" ({seconds / ours:.2f}x)"
                row[f"{objects.name}, client {client}"] = text
        for objects in sets:
            until = held.get((kind.name, objects.name, "TCP_NODELAY"))
            row[f"{objects.name}, until held"] = f"{until.less(idle[objects.name]):.2f}" if until else "-"
        spent = cpu.get((kind.name, "small", "TCP_NODELAY"), 0.0)
        row["CPU ms per small object"] = f"{1000 * spent / len(sets[1]):.2f}" if spent > 0 else "-"
        rows.append(row)
    sizes = ", ".join(f"{s.name}: {len(s)} x {s.size / len(s) / 1000:.0f} KB" for s in sets)
    start = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in idle.items())
    note = (
        f"{sizes}. Best of {repeat} (what takes over {SLOW_SECONDS:.0f} s: once), seconds; in brackets the ratio to "
        "dicomnode, above 1: slower. Until held (client TCP_NODELAY): until the acceptor's own index, or folder, has "
        "all; what is acknowledged is durable before. dcmsend's start and reading of headers is taken off: "
        f"{start}. The raw client has none. CPU of --fork's children is not seen."
    )
    section = Section([Figures("Intake, one association (dcmsend)", rows, note)], _goals(found, idle))
    section.samples = {
        "dcmsend_start_up_s": idle,
        "cells": [
            {"acceptor": a, "set": s, "client": c, **v.as_json(), "acceptor_cpu_s": round(cpu.get((a, s, c), 0.0), 3)}
            for (a, s, c), v in found.items()
            if v.seconds
        ],
    }
    return section


def _goals(found: dict[Cell, Samples], idle: dict[str, float]) -> list[Goal]:
    def best(names: tuple[str, ...], objects: str, client: str) -> float | None:
        times = [t for n in names if (t := _net(found, idle, (n, objects, client))) is not None]
        return min(times) if times else None

    goals = []
    ours = (peers.DICOMNODE.name,)
    tuned = (peers.STORESCP.name, peers.STORESCP_FORK.name)
    for objects, limit in (("ct", 1.0), ("small", 1.3)):
        mine, other = best(ours, objects, "TCP_NODELAY"), best(tuned, objects, "TCP_NODELAY")
        met = None if mine is None or other is None else mine <= limit * other
        text = "-" if mine is None or other is None else f"{mine:.2f} s against {other:.2f} s, {mine / other:.2f}x"
        what = f"durable, indexed intake of {objects} against tuned storescp"
        goals.append(Goal(what, f"at most {limit:.1f}x its time", text, met))
    for name in (peers.STORESCP_SHIPPED.name, peers.ORTHANC_SHIPPED.name):
        for objects in ("ct", "small"):
            mine, other = best(ours, objects, "as shipped"), best((name,), objects, "as shipped")
            met = None if mine is None or other is None else other >= 15 * mine
            text = "-" if mine is None or other is None else ratio(other, mine)
            goals.append(Goal(f"untuned client, {objects}, against {name}", "at least 15x", text, met))
    return goals
