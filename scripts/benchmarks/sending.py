"""The sending side: our SCU beside DCMTK's and pynetdicom's, to the same storescp."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks import clients, data, peers
from benchmarks.data import ObjectSet
from benchmarks.node import Node
from benchmarks.peers import Acceptor
from benchmarks.report import Figures, Goal, Row, Section
from benchmarks.tools import Bench, BenchError, Samples, closed_port, remove, say, timed

LIBRARY, VERB, STORESCU, DCMSEND = "dicomnode.deliver (library)", "dicomnode send", "storescu", "dcmsend"
STOCK = "stock pynetdicom"
NAMES = (LIBRARY, VERB, STORESCU, DCMSEND, STOCK)
SLOW_SECONDS = 8.0
NOISE = 0.15
"""A difference below this share of the start-up says nothing."""

Cell = tuple[str, str]
"""Sender, set."""


def run(bench: Bench) -> Section:
    sets = (data.ct(bench), data.small(bench))
    found: dict[Cell, Samples] = {}
    idle: dict[Cell, float] = {}
    failures: list[str] = []
    for turn in range(bench.repeat):
        for objects in sets:
            for name in _turned(turn):
                samples = found.setdefault((name, objects.name), Samples())
                if samples.seconds and samples.best > SLOW_SECONDS:
                    continue
                say.print(f"sending {turn + 1}/{bench.repeat}, {objects.name}: {name} …")
                folder = bench.folder("sending")
                with peers.storescp(folder) as acceptor:
                    try:
                        samples.add(_senders(bench, idle)[name](objects, acceptor))
                    except BenchError as error:
                        if name != STOCK:  # which loses an answer now and then: that is a finding, not an end
                            raise
                        failures.append(str(error))
                        say.print(str(error))
                remove(folder)
    for objects in sets:
        remove(objects.folder)
    return _section(bench, sets, found, idle, len(failures))


def _turned(turn: int) -> tuple[str, ...]:
    """Another sender begins in each turn: the first finds the machine otherwise than the others."""
    first = turn % len(NAMES)
    return NAMES[first:] + NAMES[:first]


def _senders(bench: Bench, idle: dict[Cell, float]) -> dict[str, Callable[[ObjectSet, Acceptor], float]]:
    """Each returns seconds; of the programs, measured from outside, ``idle`` notes what is start-up."""

    def tool(name: str, argv_of: Callable[[ObjectSet, str], clients.Argv], objects: ObjectSet, to: Acceptor) -> float:
        argv = argv_of(objects, to.called)
        if (name, objects.name) not in idle:
            idle[name, objects.name] = clients.start_up(argv)
        return clients.send(objects, to, argv, no_delay=True, what=name)

    def python(name: str, role: str, objects: ObjectSet, to: Acceptor) -> float:
        return sum(clients.python_sender(role, objects, to, name).values())

    def verb(objects: ObjectSet, to: Acceptor) -> float:
        node = Node(bench.folder("sender"), targets={"pacs": to.port})
        cell = (VERB, objects.name)
        with closed_port() as nobody:  # in each round: the interpreter's start varies more than the sending lasts
            away = Node(bench.folder("sender"), targets={"pacs": nobody})
            start = timed(away.argv("send", "pacs", str(objects.folder)), {}, fails=True)
        idle[cell] = min(idle.get(cell, start), start)
        argv = node.argv("send", "pacs", str(objects.folder))
        return clients.send(objects, to, lambda _: argv, no_delay=False, what=VERB)

    return {
        LIBRARY: lambda o, a: python(LIBRARY, "library", o, a),
        VERB: verb,
        STORESCU: lambda o, a: tool(STORESCU, clients.storescu, o, a),
        DCMSEND: lambda o, a: tool(DCMSEND, clients.dcmsend, o, a),
        STOCK: lambda o, a: python(STOCK, "scu", o, a),
    }


def _section(
    bench: Bench,
    sets: tuple[ObjectSet, ...],
    found: dict[Cell, Samples],
    idle: dict[Cell, float],
    failures: int,
) -> Section:
    def net(name: str, objects: str) -> float | None:
        """Seconds of sending; None without a whole run, or where they are lost in the noise of the client's start."""
        if not found[name, objects].seconds:
            return None
        start = idle.get((name, objects), 0.0)
        seconds = found[name, objects].less(start)
        return seconds if seconds > NOISE * start else None

    rows: list[Row] = []
    for name in NAMES:
        row: Row = {"sender": name}
        for objects in sets:
            cell = (name, objects.name)
            seconds, ours = net(*cell), net(LIBRARY, objects.name)
            text = "lost in its start" if seconds is None else f"{seconds:.2f}"
            if seconds is not None and ours is not None and name != LIBRARY:
                text += f" ({seconds / ours:.2f}x)"
            row[f"{objects.name}, s"] = text
            row[f"{objects.name}: start, s"] = f"{idle[cell]:.2f}" if cell in idle else "-"
            row[f"{objects.name}: whole, s"] = f"{found[cell].best:.2f}" if found[cell].seconds else "-"
        rows.append(row)
    note = (
        f"To storescp with TCP_NODELAY, on one association; best of {bench.repeat} (over {SLOW_SECONDS:.0f} s: once). "
        "In brackets the ratio to our library, above 1: slower. A program's start is taken off, with dcmsend that is "
        "also its reading of all headers; the others read them as they send. The two without a start are measured "
        "from within a process that has started."
    )
    if failures:
        note += f" Stock pynetdicom did not send everything in {failures} runs, which are left out."
    section = Section([Figures("Sending to the same acceptor", rows, note)])
    for objects in sets:
        mine, other = net(LIBRARY, objects.name), net(STORESCU, objects.name)
        known = mine is not None and other is not None
        text = f"{mine:.2f} s against {other:.2f} s" if known else "-"
        met = mine <= other if mine is not None and other is not None else None
        section.goals.append(Goal(f"our SCU, {objects.name}", "at least as fast as storescu", text, met))
    section.samples["cells"] = [
        {
            "sender": name,
            "set": objects,
            **samples.as_json(),
            "start_up_s": idle.get((name, objects)),
        }
        for (name, objects), samples in found.items()
        if samples.seconds
    ]
    section.samples["failures_of_stock"] = failures
    return section
