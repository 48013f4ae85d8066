"""The admin API while sixteen senders fill the node."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack

import psutil

from benchmarks import clients, data, line
from benchmarks.data import ObjectSet
from benchmarks.node import AE_TITLE, Node
from benchmarks.report import Figures, Goal, Row, Section
from benchmarks.tools import LOOPBACK, NO_DELAY, Bench, BenchError, cpu_seconds, percentile, remove, say, timed
from dicomnode.promptness import ask_for_short_turns
from dicomnode.receive.progress import wait_until_visible

SENDERS = 16
LIMIT_MS = 50.0
PAUSE_SECONDS = 0.02
PATHS = ("/health", "/api/v1/status", "/api/v1/jobs", "/api/v1/deliveries", "/metrics")
"""The goal is for these together. ``/ready`` also writes to the index and is shown apart."""

APART = ("/ready",)


def run(bench: Bench) -> Section:
    sets = data.for_senders(bench, "ct", SENDERS, bench.amount(40, 4), 512)
    node = Node(bench.folder("admin"))
    with node.serving():
        say.print("admin API: at rest …")
        resting = _poll(node, bench.amount(8, 2))
        cost = _cost(node, bench.amount(200, 50))
        say.print(f"admin API: with {SENDERS} senders …")
        loaded, arrived = _under_load(node, sets, bench.amount(20, 3))
    say.print(f"admin API: with {SENDERS} senders and results for the cloud …")
    clouded, arrived_beside = _with_cloud(bench, sets)
    for objects in sets:
        remove(objects.folder)
    remove(node.folder)
    rows: list[Row] = []
    for path in (*PATHS, *APART):
        rows.append(
            {
                "path": path,
                "requests under load": len(loaded[path]),
                "p50 ms": f"{percentile(loaded[path], 0.5):.1f}",
                "p95 ms": f"{percentile(loaded[path], 0.95):.1f}",
                "most ms": f"{max(loaded[path]):.1f}",
                "p95 ms, also to the cloud": f"{percentile(clouded[path], 0.95):.1f}",
                "p95 ms at rest": f"{percentile(resting[path], 0.95):.1f}",
                "CPU ms": f"{cost[path]:.1f}",
            }
        )
    every = [ms for path in PATHS for ms in loaded[path]]
    worst = percentile(every, 0.95)
    beside = percentile([ms for path in PATHS for ms in clouded[path]], 0.95)
    note = (
        f"{SENDERS} dcmsend sent {arrived} objects of 526 KB meanwhile, all stored; {arrived_beside} while two results "
        "a second went to the reference cloud by TLS, with all intervals as they are by default. "
        f"One connection, {PAUSE_SECONDS * 1000:.0f} ms between requests, asked with short turns. "
        "CPU: of the sidecar for one request, at rest."
    )
    section = Section([Figures("Admin API under intake load", rows, note)])
    text = f"{worst:.1f} ms of {len(every)} requests; {beside:.1f} ms when results go to the cloud as well"
    section.goals.append(Goal("admin API under intake load, p95", f"< {LIMIT_MS:.0f} ms", text, worst < LIMIT_MS))
    section.samples = {
        "clouded_ms": clouded,
        "loaded_ms": loaded,
        "resting_ms": resting,
        "cpu_ms": cost,
        "objects_meanwhile": arrived,
    }
    return section


def _under_load(node: Node, sets: Sequence[ObjectSet], seconds: float) -> tuple[dict[str, list[float]], int]:
    """Milliseconds of each request while all senders send, and how many objects came meanwhile."""
    stop = threading.Event()
    sent: list[int] = []
    faults: list[BaseException] = []
    threads = [threading.Thread(target=_fill, args=(node, s, stop, sent, faults)) for s in sets]
    before = node.instances()
    for thread in threads:
        thread.start()
    try:
        found = _poll(node, seconds)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    wait_until_visible(node.data_dir / "journal")
    arrived = node.instances() - before
    if faults or arrived < sum(sent):
        raise BenchError(f"intake beside the admin API: {arrived} of {sum(sent)} arrived; {faults[:1]}")
    return found, arrived


def _with_cloud(bench: Bench, sets: Sequence[ObjectSet]) -> tuple[dict[str, list[float]], int]:
    """As :func:`_under_load`, with a node that sends its results to the reference cloud."""
    folder = bench.folder("admin-cloud")
    folder.mkdir(parents=True)
    with ExitStack() as stack:
        cloud = line.Other(stack, "cloud", str(folder), nice=10)
        node = Node(bench.folder("admin"), rules=line.cloud_rules(json.loads(cloud.answer())))
        stack.enter_context(node.serving())
        cloud.ask("pass")
        with line.results(node, line.PLAN):
            found = _under_load(node, sets, bench.amount(20, 3))
    remove(node.folder)
    return found


def _fill(node: Node, objects: ObjectSet, stop: threading.Event, sent: list[int], faults: list[BaseException]) -> None:
    """Send the set again and again, each time as a new study."""
    try:
        while not stop.is_set():
            objects.renew(durably=False)
            timed(clients.dcmsend(objects, AE_TITLE)(node.port), NO_DELAY)
            sent.append(len(objects))
    except (BenchError, OSError) as error:
        faults.append(error)


def _cost(node: Node, count: int) -> dict[str, float]:
    """Milliseconds of the sidecar's processor time for one request; other load on the machine does not show in it."""
    sidecar = psutil.Process(node.value("SELECT pid FROM processes WHERE name = 'sidecar'"))
    connection = http.client.HTTPConnection(LOOPBACK, node.http, timeout=30)
    found = {}
    for path in (*PATHS, *APART):
        before = cpu_seconds([sidecar])
        for _ in range(count):
            connection.request("GET", path)
            connection.getresponse().read()
        found[path] = 1000 * (cpu_seconds([sidecar]) - before) / count
    connection.close()
    return found


def _poll(node: Node, seconds: float) -> dict[str, list[float]]:
    """Milliseconds of each request; every answer must be 200 and complete.

    Who asks has short turns: in a hospital it is another machine, whose wait for a processor is not the sidecar's.
    """
    ask_for_short_turns()
    found: dict[str, list[float]] = {path: [] for path in (*PATHS, *APART)}
    connection = http.client.HTTPConnection(LOOPBACK, node.http, timeout=30)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline or not found[APART[-1]]:
            for path, times in found.items():
                begin = time.perf_counter()
                connection.request("GET", path)
                reply = connection.getresponse()
                reply.read()
                times.append(1000 * (time.perf_counter() - begin))
                if reply.status != 200:
                    raise BenchError(f"GET {path} was answered with {reply.status}")
                time.sleep(PAUSE_SECONDS)
    finally:
        connection.close()
    return found
