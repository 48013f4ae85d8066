"""Intake while the line to the cloud goes through every fault, against a node without a cloud.

Three associations store 131 KB images at 25 a second each, one stores four of 2 MB a second; meanwhile two
results a second are made, by the same commits in every case. In another order each round a node's line is well,
or has one of the faults of RELIABILITY.md; before each of these turns a node without a cloud has one, so that
both have the same behind them. As many turns without a cloud as one fault has, taken together, tell the noise.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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
ALONE, WELL = "no cloud", "line is well"
CASES = (WELL, *FAULTS)
RESULT_SECONDS = 0.5
SETTLE_SECONDS = 0.5
CLOUD = """
[cloud]
stow_url = "{at}/studies"
records_url = "{at}/v1"
health_url = "{at}/health"
ca_file = "{ca_file}"
[metrics]
remote_write_url = "https://localhost:{metrics}/api/v1/write"
ca_file = "{ca_file}"
"""
OFTEN = """
[cloud]
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
interval_seconds = 1
"""
"""Far more often than by default, so that a fault strikes all the time."""

PLAN = CloudPlan("cloud", Sync().lanes, records=True)


def cloud_rules(where: Mapping[str, Any], more: str = "") -> str:
    """With rules= of :class:`Node`. ``where``: the first line that the cloud of :class:`Other` says."""
    told = CLOUD.format(at=f"https://localhost:{where['line']}", **where)
    for section in filter(str.strip, more.split("[")):  # TOML has each table once
        name, _, keys = section.strip().partition("]")
        head = f"[{name}]\n"
        told = told.replace(head, f"{head}{keys.strip()}\n") if head in told else f"{told}{head}{keys.strip()}\n"
    return told


@dataclass(frozen=True)
class Turn:
    """Milliseconds of each C-STORE, by size. ``place``: of the turn within its round."""

    case: str
    round: int
    place: int
    small: list[float]
    large: list[float]


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
    seconds, rounds = bench.amount(6, 1), max(bench.repeat, bench.amount(3, 1))
    turns: list[Turn] = []
    seen: dict[str, int] = dict.fromkeys(FAULTS, 0)
    chance = random.Random(1)
    with ExitStack() as stack:
        folder = bench.folder("line")
        folder.mkdir(parents=True)
        cloud, senders = Other(stack, "cloud", str(folder), nice=10), Other(stack, "senders")
        where = json.loads(cloud.answer())
        told = cloud_rules(where, OFTEN)
        nodes = [Node(bench.folder("line"), rules=more) for more in ("", told)]
        nodes[1].environment = {"PYTHONPATH": f"{folder}:{environment({})['PYTHONPATH']}"}
        for node in nodes:
            stack.enter_context(node.serving())
        senders.answer()
        for turn in range(rounds):
            order = [case for fault in chance.sample(CASES, len(CASES)) for case in (ALONE, fault)]
            for place, case in enumerate(order):
                say.print(f"line {turn + 1}/{rounds}: {case} …")
                node = nodes[case != ALONE]
                settle()
                fault = case if case in FAULTS else "pass"
                before = cloud.ask(fault)["seen"]
                plan = PLAN if node is nodes[1] else OFF
                with results(node, plan):
                    time.sleep(SETTLE_SECONDS)
                    times = senders.ask(f"{node.port} {seconds} {1 + len(turns)}")
                if case in FAULTS:
                    met = cloud.ask(fault)["seen"] - before
                    seen[case] += met
                    if not met and not bench.quick:
                        raise BenchError(f"the fault {case} met no connection")
                turns.append(Turn(case, turn, place // 2, times["small"], times["large"]))
        cloud.ask("pass")
        _drained(nodes[1])
    for node in nodes:
        remove(node.folder)
    return _section(turns, seen, seconds)


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
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
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


def _section(turns: Sequence[Turn], seen: dict[str, int], seconds: float) -> Section:
    rounds = 1 + max(turn.round for turn in turns)
    groups = {case: [t for t in turns if t.case == case] for case in CASES}
    alone = [t for t in turns if t.case == ALONE]
    base, bulky_base = _p99(alone), _bulky(alone)
    by_chance = sorted(_p99([t for t in alone if t.place == place]) / base for place in range(len(CASES)))
    ratios = {case: _p99(group) / base for case, group in groups.items()}
    rows: list[Row] = []
    for case, group in {ALONE: alone, **groups}.items():
        each = [
            _p99([t for t in group if t.round == r]) / _p99([t for t in alone if t.round == r]) for r in range(rounds)
        ]
        rows.append(
            {
                "line": case,
                "C-STOREs": sum(len(t.small) for t in group),
                "p50 ms": f"{percentile([ms for t in group for ms in t.small], 0.5):.2f}",
                "p99 ms": f"{_p99(group):.2f}",
                "p99 / no cloud": f"{_p99(group) / base:.2f}",
                "of single rounds": f"{min(each):.2f} to {max(each):.2f}",
                "2 MB: p95 ms": f"{_bulky(group):.1f}",
                "2 MB: p95 / no cloud": f"{_bulky(group) / bulky_base:.2f}",
                "connections struck": seen.get(case, "-"),
            }
        )
    note = (
        "3 associations at 25 images of 131 KB a second each, one at 4 of 2 MB; "
        f"{seconds} s in each of {rounds} rounds, all cases in another order in each, a turn without a cloud before "
        "each; beside it two results a second, heartbeat, desired state, records and remote-write each second. Cloud "
        f"and proxy are on this machine, at nice 10. Noise: {len(CASES)} groups of turns without a cloud, each as "
        f"large as that of one case, have a p99 of {by_chance[0]:.2f} to {by_chance[-1]:.2f} of all of them."
    )
    worst = max(CASES, key=lambda case: ratios[case])
    section = Section([Figures("Intake while the line to the cloud fails", rows, note)])
    limit = max(1.1, by_chance[-1])
    text = f"{ratios[worst]:.2f} ({worst}), by chance up to {by_chance[-1]:.2f}"
    section.goals.append(
        Goal("C-STORE p99 under any fault of the line / without a cloud", "1.1, or noise", text, ratios[worst] <= limit)
    )
    section.samples = {
        "turns": [dataclasses.asdict(turn) for turn in turns],
        "struck": seen,
        "ratio_p99": ratios,
        "ratio_by_chance": by_chance,
    }
    return section


def _p99(turns: Sequence[Turn]) -> float:
    return percentile([ms for turn in turns for ms in turn.small], 0.99)


def _bulky(turns: Sequence[Turn]) -> float:
    return percentile([ms for turn in turns for ms in turn.large], 0.95)
