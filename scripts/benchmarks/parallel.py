"""1, 4 and 16 associations at once: aggregate rate, and whether anybody starves."""

from __future__ import annotations

import statistics
from functools import partial

from benchmarks import clients, data, peers
from benchmarks.data import ObjectSet
from benchmarks.peers import Acceptor
from benchmarks.report import Figures, Goal, Row, Section
from benchmarks.tools import (
    NO_DELAY,
    Bench,
    BenchError,
    Skipped,
    closed_port,
    remove,
    say,
    timed,
    together,
)

KINDS = (peers.DICOMNODE, peers.STORESCP_FORK, peers.ORTHANC, peers.PYNETDICOM)
SENDERS = (1, 4, 16)
FAIR = 2.0
"""The slowest of the senders may take so many times as long as the fastest."""

Run = tuple[float, float]
"""Wall-clock seconds of all, slowest / fastest."""


def run(bench: Bench) -> Section:
    section = Section()
    for name, count, side in (("ct", bench.amount(100, 8), 512), ("small", bench.amount(400, 20), 80)):
        sets = data.for_senders(bench, name, max(SENDERS), count, side)
        _one_size(bench, section, name, sets)
        for objects in sets:
            remove(objects.folder)
    return section


def send_all(acceptor: Acceptor, sets: list[ObjectSet]) -> Run:
    """Each set by a dcmsend of its own, at the same time; checks that everything arrived."""
    for objects in sets:
        objects.renew()
    before = acceptor.count()
    commands = [clients.dcmsend(s, acceptor.called)(acceptor.port) for s in sets]
    wall, each = together([partial(timed, argv, NO_DELAY) for argv in commands])
    acceptor.expect(before + sum(map(len, sets)), f"{len(sets)} in parallel")
    return wall, max(each) / min(each)


def _start_up(sets: list[ObjectSet]) -> float:
    """What so many dcmsend at once take to start and read their headers."""
    with closed_port() as port:
        return together([partial(timed, clients.dcmsend(s, "PACS")(port), NO_DELAY, fails=True) for s in sets])[0]


def _one_size(bench: Bench, section: Section, name: str, sets: list[ObjectSet]) -> None:
    idle = {n: min(_start_up(sets[:n]) for _ in range(3)) for n in SENDERS}
    found: dict[tuple[str, int], list[Run]] = {}
    for turn in range(bench.repeat):
        for kind in KINDS:
            say.print(f"parallel {turn + 1}/{bench.repeat}, {name}: {kind.name} …")
            folder = bench.folder("parallel")
            try:
                with kind.start(folder) as acceptor:
                    for n in SENDERS:
                        found.setdefault((kind.name, n), []).append(send_all(acceptor, sets[:n]))
            except Skipped as reason:
                bench.skip(str(reason))
            except BenchError as error:
                bench.skip(f"{kind.name}, {name} in parallel: {error}")
            remove(folder)
    count, size = len(sets[0]), sets[0].size

    def rate(kind: str, n: int) -> float | None:
        """Objects per second of all senders together. One sender's start-up is taken off."""
        runs = found.get((kind, n))
        wall = min(w for w, _ in runs) if runs else 0.0
        return n * count / max(wall - (idle[1] if n == 1 else 0.0), 0.001) if runs else None

    def fairness(kind: str, n: int) -> float | None:
        runs = found.get((kind, n))
        return statistics.median(r for _, r in runs) if runs else None

    rows: list[Row] = []
    for kind in KINDS:
        row: Row = {"acceptor": kind.name, "durable": kind.durable}
        for n in SENDERS:
            value = rate(kind.name, n)
            row[f"{n}: objects/s"] = "-" if value is None else f"{value:.0f}"
            row[f"{n}: MB/s"] = "-" if value is None else f"{value * size / count / 1e6:.0f}"
        for n in SENDERS[1:]:
            fair = fairness(kind.name, n)
            row[f"{n}: slowest/fastest"] = "-" if fair is None else f"{fair:.2f}"
        rows.append(row)
    start = ", ".join(f"{n} of them {s:.2f} s" for n, s in idle.items())
    note = (
        f"Each sender is a dcmsend (TCP_NODELAY) with {count} objects of {size / count / 1000:.0f} KB of its own. "
        f"Start alone: {start}; it is taken off for one, and overlaps with the others' sending for more. "
        f"Best of {bench.repeat}, slowest/fastest: median."
    )
    section.tables.append(Figures(f"Associations in parallel, {name}", rows, note))
    section.samples[name] = {
        "start_up_s": idle,
        "objects_each": count,
        "runs": [
            {"acceptor": k, "senders": n, "wall_s": [w for w, _ in runs], "slowest_to_fastest": [r for _, r in runs]}
            for (k, n), runs in found.items()
        ],
    }
    one = rate(peers.DICOMNODE.name, 1)
    for n in SENDERS[1:]:
        many, fair = rate(peers.DICOMNODE.name, n), fairness(peers.DICOMNODE.name, n)
        known = one is not None and many is not None and fair is not None
        text = f"{many:.0f} against {one:.0f} objects/s" if known else "-"
        met = many > one if one is not None and many is not None else None
        section.goals.append(Goal(f"{n} in parallel, {name}: aggregate", "above one association", text, met))
        what = f"{n} in parallel, {name}: nobody starves"
        verdict = None if fair is None else fair <= FAIR
        section.goals.append(Goal(what, f"slowest/fastest at most {FAIR:.0f}", f"{fair:.2f}" if fair else "-", verdict))
