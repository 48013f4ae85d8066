"""Studies of two CR images without pause: how many an hour, and that nothing is left waiting."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial

from benchmarks import clients, data
from benchmarks.data import ObjectSet
from benchmarks.node import AE_TITLE, Node
from benchmarks.report import Figures, Goal, Section
from benchmarks.tools import NO_DELAY, Bench, BenchError, remove, say, timed, together, wait_for

RULE = '[[rules]]\nname = "cr"\nmatch = { Modality = "CR" }\nmodels = ["ct-lung"]\n'
"""No model for CR is shipped: the job runs up to the contract of ct-lung, which refuses it."""

MODALITIES = 2
"""Senders at a time, each sends its next study as soon as the last is acknowledged."""

STUDIES_PER_HOUR = 1000
WAITING = {
    "series that nobody selected": "SELECT count(*) FROM series WHERE selected_generation < generation",
    "jobs": "SELECT count(*) FROM jobs WHERE state IN ('pending', 'running')",
    "deliveries": "SELECT count(*) FROM deliveries WHERE state IN ('pending', 'sending')",
    "associations": "SELECT count(*) FROM associations WHERE state = 'open'",
}


def run(bench: Bench) -> Section:
    folders = bench.amount(8, 3)
    rounds = bench.amount(30, 2)
    studies = data.cr_studies(bench, folders * MODALITIES)
    node = Node(bench.folder("sustained"), rules=RULE)
    say.print(f"sustained: {folders * MODALITIES * rounds} studies of two CR images …")
    with node.serving():
        before = node.instances()
        begin = time.perf_counter()
        queues = [studies[n::MODALITIES] * rounds for n in range(MODALITIES)]
        sent, _ = together([partial(_send_all, node, iter(q)) for q in queues])
        count = folders * MODALITIES * rounds
        wait_for(lambda: not any(map(node.value, WAITING.values())), "the node to finish what it has", 300)
        seconds = time.perf_counter() - begin
        if node.instances() - before != 2 * count:
            raise BenchError(f"{node.instances() - before} of {2 * count} images arrived")
        jobs = {r["state"]: r["n"] for r in node.rows("SELECT state, count(*) AS n FROM jobs GROUP BY state")}
    if sum(jobs.values()) != count:
        raise BenchError(f"{sum(jobs.values())} jobs for {count} studies")
    for objects in studies:
        remove(objects.folder)
    remove(node.folder)
    hourly = count / seconds * 3600
    row = {
        "studies": count,
        "sent in, s": f"{sent:.1f}",
        "nothing waits after, s": f"{seconds:.1f}",
        "studies per hour": f"{hourly:.0f}",
        "MB/s": f"{2 * count * 8 / seconds:.0f}",
        "jobs": ", ".join(f"{n} {state}" for state, n in jobs.items()),
    }
    note = (
        f"{MODALITIES} senders (storescu, one association for each study, 2 x 8 MB), the next study as soon as the "
        "last is acknowledged. Each study is received, found complete, and its job run up to the model's contract: "
        "no model for CR is shipped, so it ends as refused."
    )
    section = Section([Figures("Sustained studies of two CR images", [row], note)])
    text = f"{hourly:.0f}, nothing waiting"
    section.goals.append(
        Goal("two-image CR studies per hour", f"> {STUDIES_PER_HOUR}", text, hourly > STUDIES_PER_HOUR)
    )
    section.samples = {**row, "seconds": seconds}
    return section


def _send_all(node: Node, studies: Iterator[ObjectSet]) -> float:
    begin = time.perf_counter()
    for objects in studies:
        objects.renew(durably=False)
        timed(clients.storescu(objects, AE_TITLE)(node.port), NO_DELAY)
    return time.perf_counter() - begin
