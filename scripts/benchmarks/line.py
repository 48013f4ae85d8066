"""Intake while the line to the cloud goes through every fault, against a node without a cloud.

Three associations store 131 KB images at 25 a second each, one stores four of 2 MB a second; meanwhile two
results a second are made, by the same commits in every case. In turns, in another order each round: two nodes
without a cloud (what differs between them is noise), and a third one whose line is well, or has one of the
faults of RELIABILITY.md.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.node import Node
from benchmarks.report import Figures, Goal, Row, Section
from benchmarks.tools import ROOT, Bench, BenchError, environment, percentile, remove, say, settle
from dicomnode.cloud_settings import OFF, CloudPlan, Sync
from dicomnode.durable import ObjectStore
from dicomnode.index.catalogue import Catalogue
from dicomnode.index.database import Database
from dicomnode.index.jobs import Jobs, Outcome, Request, Result

FAULTS = (
    *("cut-request", "cut-reply", "half-open", "http-500", "http-503", "http-429", "slow", "half-body", "huge"),
    *("tls", "dns"),
)
ALONE, ALONE_AGAIN, WELL = "no cloud", "no cloud, another node", "line is well"
CASES = (ALONE, ALONE_AGAIN, WELL, *FAULTS)
RESULT_SECONDS = 0.5
SETTLE_SECONDS = 0.5
CLOUD = """
[cloud]
stow_url = "{at}/studies"
records_url = "{at}/v1"
health_url = "{at}/health"
ca_file = "{ca_file}"
stall_seconds = 1
timeout_seconds = 2
[sync]
urgent_seconds = 0.2
normal_seconds = 0.2
batch_seconds = 0.2
pull_seconds = 0.5
[delivery]
backoff_seconds = 0.1
backoff_max_seconds = 0.3
[fleet]
heartbeat_seconds = 1
desired_seconds = 1
[metrics]
remote_write_url = "https://localhost:{metrics}/api/v1/write"
ca_file = "{ca_file}"
interval_seconds = 1
"""
"""Far more often than by default, so that a fault strikes all the time; with rules= of :class:`Node`."""


class Other:
    """A process of :mod:`benchmarks.line_ends`: a line to it, a JSON line back."""

    def __init__(self, stack: ExitStack, *arguments: str, nice: int = 0) -> None:
        argv = ["nice", "-n", str(nice), sys.executable, "-m", "benchmarks.line_ends", *arguments]
        self._process = subprocess.Popen(
            argv, env=environment({}), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        stack.callback(self._end)

    def _end(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def answer(self) -> str:
        assert self._process.stdout is not None
        text = self._process.stdout.readline()
        if not text:
            raise BenchError("the other end of the line ended")
        return text

    def ask(self, line: str) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return json.loads(self.answer())


def run(bench: Bench) -> Section:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))  # the fault proxy is the tests'
    seconds, rounds = bench.amount(6, 1), max(bench.repeat, bench.amount(5, 1))
    found: dict[str, list[list[float]]] = {case: [] for case in CASES}
    large: dict[str, list[list[float]]] = {case: [] for case in CASES}
    seen: dict[str, int] = dict.fromkeys(FAULTS, 0)
    chance = random.Random(1)
    with ExitStack() as stack:
        folder = bench.folder("line")
        folder.mkdir(parents=True)
        cloud, senders = Other(stack, "cloud", str(folder), nice=10), Other(stack, "senders")
        where = json.loads(cloud.answer())
        told = CLOUD.format(at=f"https://localhost:{where['line']}", **where)
        nodes = [Node(bench.folder("line"), rules=more) for more in ("", "", told)]
        nodes[2].environment = {"PYTHONPATH": f"{folder}:{environment({})['PYTHONPATH']}"}
        for node in nodes:
            stack.enter_context(node.serving())
        senders.answer()
        for turn in range(rounds):
            for case in chance.sample(CASES, len(CASES)):
                say.print(f"line {turn + 1}/{rounds}: {case} …")
                node = nodes[{ALONE: 0, ALONE_AGAIN: 1}.get(case, 2)]
                settle()
                fault = case if case in FAULTS else "pass"
                before = cloud.ask(fault)["seen"]
                plan = CloudPlan("cloud", Sync().lanes, records=True) if node is nodes[2] else OFF
                with results(node, plan):
                    time.sleep(SETTLE_SECONDS)
                    times = senders.ask(f"{node.port} {seconds} {1 + turn * len(CASES) + CASES.index(case)}")
                if case in FAULTS:
                    met = cloud.ask(fault)["seen"] - before
                    seen[case] += met
                    if not met and not bench.quick:
                        raise BenchError(f"the fault {case} met no connection")
                found[case].append(times["small"])
                large[case].append(times["large"])
        cloud.ask("pass")
        _drained(nodes[2])
    for node in nodes:
        remove(node.folder)
    return _section(found, large, seen, seconds)


@contextmanager
def results(node: Node, plan: CloudPlan) -> Iterator[None]:
    """Made twice a second, as the worker hands them over."""
    stop, faults = threading.Event(), list[BaseException]()

    def make() -> None:
        try:
            db = Database(node.data_dir)
            while not stop.wait(RESULT_SECONDS):
                _make_result(db, node.data_dir, plan)
            db.close()
        except BaseException as error:
            faults.append(error)
            raise

    thread = threading.Thread(target=make)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    if faults:
        raise BenchError(f"no results were made: {type(faults[0]).__name__}")


def _make_result(db: Database, data_dir: Path, plan: CloudPlan) -> None:
    """Source and result are durable first; in the transaction nobody else can lease the job."""
    from tests.sync.index_case import new_instance

    store = ObjectStore(data_dir)
    source, result = new_instance(store, "received"), new_instance(store, "result")
    with db.transaction():
        Catalogue(db).commit([source])
        uid = source.attributes["SeriesInstanceUID"]
        series = db.row("SELECT id, generation FROM series WHERE SeriesInstanceUID = ?", (uid,))
        assert series is not None
        jobs = Jobs(db)
        [job] = jobs.select(series["id"], series["generation"], "quiet", [Request("bench", ("bench",), (), "routine")])
        jobs.lease("bench", 60.0)
        jobs.finish(job, "bench", Outcome([Result("SR", result)]), cloud=plan)


def _drained(node: Node) -> None:
    deadline = time.monotonic() + 300
    while left := node.value("SELECT count(*) FROM sync_items WHERE state <> 'stored'"):
        if time.monotonic() > deadline:
            raise BenchError(f"{left} items did not reach the cloud once the line was well")
        time.sleep(0.1)


def _section(
    found: dict[str, list[list[float]]], large: dict[str, list[list[float]]], seen: dict[str, int], seconds: float
) -> Section:
    bulky = {case: [ms for times in rounds for ms in times] for case, rounds in large.items()}
    bulky_base = percentile([*bulky[ALONE], *bulky[ALONE_AGAIN]], 0.95)
    pooled = {case: [ms for times in rounds for ms in times] for case, rounds in found.items()}
    base = percentile([*pooled[ALONE], *pooled[ALONE_AGAIN]], 0.99)
    each = [percentile(a, 0.99) / percentile(b, 0.99) for a, b in zip(found[ALONE], found[ALONE_AGAIN], strict=True)]
    noise = max(
        [percentile(pooled[ALONE_AGAIN], 0.99) / percentile(pooled[ALONE], 0.99), *each, *(1 / e for e in each)]
    )
    rows: list[Row] = []
    ratios: dict[str, float] = {}
    for case in CASES:
        times = pooled[case]
        ratios[case] = percentile(times, 0.99) / base
        by_round = [
            percentile(mine, 0.99) / percentile([*a, *b], 0.99)
            for mine, a, b in zip(found[case], found[ALONE], found[ALONE_AGAIN], strict=True)
        ]
        rows.append(
            {
                "line": case,
                "C-STOREs": len(times),
                "p50 ms": f"{percentile(times, 0.5):.2f}",
                "p99 ms": f"{percentile(times, 0.99):.2f}",
                "p99 / no cloud": f"{ratios[case]:.2f}",
                "of single rounds": f"{min(by_round):.2f} to {max(by_round):.2f}",
                "median of rounds": f"{statistics.median(by_round):.2f}",
                "2 MB: p95 ms": f"{percentile(bulky[case], 0.95):.1f}",
                "2 MB: p95 / no cloud": f"{percentile(bulky[case], 0.95) / bulky_base:.2f}",
                "connections struck": seen.get(case, "-"),
            }
        )
    note = (
        "3 associations at 25 images of 131 KB a second each, one at 4 of 2 MB; "
        f"{seconds} s in each of {len(found[ALONE])} rounds, all cases in another order in each; beside it two results "
        "a second, heartbeat, desired state, records and remote-write each second. Cloud and proxy are on this "
        "machine, at nice 10. Noise: the two nodes without a cloud against each other, p99 in the worst round "
        f"{noise:.2f}."
    )
    worst = max((WELL, *FAULTS), key=lambda case: ratios[case])
    section = Section([Figures("Intake while the line to the cloud fails", rows, note)])
    limit = max(1.1, noise)
    text = f"{ratios[worst]:.2f} ({worst}), noise up to {noise:.2f}"
    section.goals.append(
        Goal("C-STORE p99 under any fault of the line / without a cloud", "1.1, or noise", text, ratios[worst] <= limit)
    )
    section.samples = {"ms": found, "large_ms": large, "struck": seen, "ratio_p99": ratios, "noise_p99": noise}
    return section
