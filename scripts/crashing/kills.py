"""kill -9 of every process of a node at random moments under load, against ledgers kept outside it.

A campaign runs in rounds. In each, modalities send series that are analysed and small objects
that are only stored, roughly; someone queries and retrieves; and every process is killed at
random. A round ends when all of it has settled: acknowledged, analysed, delivered. What must
hold then, and at the end, is in :mod:`scripts.crashing.verdict`.
"""

from __future__ import annotations

import json
import pickle
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import apsw
import psutil

from scripts.crashing.load import Account, Errand, read_ledger
from scripts.crashing.series import Made, make
from tests.e2e.harness import Node, python_environment, rule
from tests.peers import Process, SlowLink, StoreScp

KILLS_PER_ROUND = 25
SETTLE_SECONDS = 60.0
WEIGHTS = {
    "serve": 1,
    "receiver": 2,
    "receiver-1": 5,
    "receiver-2": 5,
    "worker": 3,
    "decoder": 3,
    "courier": 5,
    "sidecar": 2,
}
"""How often each process is chosen among those that live."""

MOMENTS = {"receiving": 4.0, "analysing": 4.0, "sending": 8.0, "starting": 0.3, "all at once": 0.4}
"""How much more often one that is at work, and less often one that was killed a moment ago."""


@dataclass(frozen=True, slots=True)
class Plan:
    """``pace_seconds`` is the mean time between two kills; 2 cores want 0.6 or more to get work done between."""

    kills: int
    seed: int
    pace_seconds: float = 0.6
    series_per_round: int = 3
    small_series_per_round: int = 4


@dataclass(slots=True)
class Campaign:
    """What happened: kills by (process, what it did), and what was sent."""

    plan: Plan
    killed: Counter[tuple[str, str]] = field(default_factory=Counter)
    series: list[Made] = field(default_factory=list)
    small: list[Made] = field(default_factory=list)
    ledgers: list[Path] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    rounds: int = 0
    seconds: float = 0.0

    def account(self) -> Account:
        return read_ledger(self.ledgers)


class Setup:
    """A node, a PACS behind a slow line so that sending takes long enough to be hit, and a peer to move to."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.pacs = StoreScp(folder / "pacs", "+B")
        self.mover = StoreScp(folder / "mover", "+B", aet="MOVER")
        self.line = SlowLink(self.pacs.port, bytes_per_second=400_000, answer_seconds=0.05)
        self.node = Node(
            folder / "node",
            peers=[
                {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": self.line.port},
                {"name": "mover", "ae_title": "MOVER", "host": "127.0.0.1", "port": self.mover.port},
                {"name": "asker", "ae_title": "ASKER", "allow": ["echo", "find", "move", "get"]},
            ],
            rules=[rule("ct", {"Modality": "CT", "SeriesDescription": "analyse"}, to=["pacs"])],
            completeness={"quiet_seconds": 4},
            dimse={"workers": 2, "journal_mb": 8},
            inference={"lease_seconds": 5, "max_attempts": 1000},
            logging={"level": "warning", "format": "json"},
        )

    def close(self) -> None:
        if self.node.running:
            self.node.stop()
        self.line.stop()
        self.pacs.stop()
        self.mover.stop()


class Killer:
    """Chooses a process and kills it; knows what it was at."""

    def __init__(self, node: Node, chance: random.Random) -> None:
        self._node = node
        self._chance = chance

    def kill(self) -> tuple[str, str] | None:
        """One kill, or None when there is nobody to kill."""
        alive = self.alive()
        if len(alive) < 2 and self._chance.random() < 0.9:  # a start that is cut short each time would prove little
            return None
        targets = [(name, p, self._phase(name, p)) for name, processes in alive.items() for p in processes]
        if not targets:
            return None
        weights = [WEIGHTS[name] * MOMENTS.get(phase, 1.0) / len(alive[name]) for name, _, phase in targets]
        name, process, phase = self._chance.choices(targets, weights)[0]
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            return None
        return name, phase

    def alive(self) -> dict[str, list[psutil.Process]]:
        """Processes of the node by the name of what they do, from their command lines."""
        found: dict[str, list[psutil.Process]] = {}
        try:
            family = self._node.family()
        except psutil.NoSuchProcess:
            return {}
        for process in family:
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                name = name_of(process.cmdline())
            except psutil.NoSuchProcess:
                continue
            if name:
                found.setdefault(name, []).append(process)
        return found

    def _phase(self, name: str, process: psutil.Process) -> str:
        if name == "serve":
            return "all at once"
        try:
            if name.startswith("receiver-"):
                busy = any(c.status == psutil.CONN_ESTABLISHED for c in process.net_connections("tcp"))
                return self._or_starting(name, process, "receiving" if busy else "idle")
            if name in ("worker", "decoder"):
                running = self._node.rows("SELECT 1 FROM jobs WHERE state = 'running'")
                return self._or_starting("worker", process, "analysing" if running else "idle", child=name == "decoder")
            if name == "courier":
                sending = self._node.rows("SELECT 1 FROM deliveries WHERE state = 'sending'")
                return self._or_starting(name, process, "sending" if sending else "idle")
            return self._or_starting(name, process, "serving")
        except (psutil.Error, apsw.Error):
            return "unknown"

    def _or_starting(self, name: str, process: psutil.Process, phase: str, *, child: bool = False) -> str:
        ready = self._node.rows("SELECT pid FROM processes WHERE name = ? AND state = 'ready'", (name,))
        pid = process.ppid() if child else process.pid
        return phase if [r["pid"] for r in ready] == [pid] else "starting"


def name_of(argv: Sequence[str]) -> str:
    """Which part of the node a command line is; empty for none of them (a resource tracker)."""
    if "dicomnode" not in argv:
        return (
            "decoder"
            if any("spawn_main" in a for a in argv) and any("--multiprocessing-fork" in a for a in argv)
            else ""
        )
    words = list(argv[argv.index("dicomnode") + 1 :])
    if words[:1] == ["serve"]:
        return "serve"
    if words[:2] == ["run", "receiver"] and "--slot" in words:
        return f"receiver-{words[words.index('--slot') + 1]}"
    return words[1] if words[:1] == ["run"] else ""


class Runner:
    """Runs a campaign on a setup."""

    def __init__(self, setup: Setup, plan: Plan, say: Callable[[str], None] = lambda _: None) -> None:
        self.setup = setup
        self.campaign = Campaign(plan)
        self._chance = random.Random(plan.seed)
        self._killer = Killer(setup.node, self._chance)
        self._say = say
        self._asked = setup.folder / "asked.json"
        self._series_list = setup.folder / "series.txt"

    def run(self) -> Campaign:
        begin = time.monotonic()
        self.setup.node.start()
        asker = self._load("ask", self._series_list, self._asked, self.setup.node.port, self.setup.node.http_port)
        try:
            while sum(self.campaign.killed.values()) < self.campaign.plan.kills:
                self._round()
                self._say(self._progress(begin))
        finally:
            asker.stop(10)
        if self._asked.exists():
            self.campaign.asked.update(json.loads(self._asked.read_text() or "{}"))
        self.campaign.seconds = time.monotonic() - begin
        return self.campaign

    def _progress(self, begin: float) -> str:
        account = self.campaign.account()
        return (
            f"round {self.campaign.rounds}: {sum(self.campaign.killed.values())} kills,"
            f" {account.answers} objects acknowledged, {time.monotonic() - begin:.0f} s"
        )

    def _round(self) -> None:
        plan, campaign = self.campaign.plan, self.campaign
        campaign.rounds += 1
        series = [make("analyse", self._chance) for _ in range(plan.series_per_round)]
        small = [make("keep", self._chance, small=True) for _ in range(plan.small_series_per_round)]
        campaign.series += series
        campaign.small += small
        whole, few = [i for m in series for i in m.items], [i for m in small for i in m.items]
        errands = [
            Errand(whole, batch=len(series[0].items), gap_seconds=0.05, pause_seconds=2.0),
            Errand(few, batch=4, gap_seconds=0.01, pause_seconds=0.2, rough=True),
        ]
        senders = [self._send(errand) for errand in errands]
        with self._series_list.open("a", encoding="ascii") as file:
            file.writelines(f"{m.study_uid} {m.series_uid}\n" for m in (*series, *small))
        left = min(KILLS_PER_ROUND, plan.kills - sum(campaign.killed.values()))
        while left:
            time.sleep(min(self._chance.expovariate(1 / plan.pace_seconds), 4 * plan.pace_seconds))
            killed = self._killer.kill()
            if killed is not None:
                campaign.killed[killed] += 1
                left -= 1
            if killed is not None and killed[0] == "serve":
                self._restart()
        self._settle(senders, series)

    def _restart(self) -> None:
        """The whole node is gone; a supervisor would start it again."""
        self.setup.node.wait(lambda: not self.setup.node.running, 30, "the killed node is gone")
        self.setup.node.bury()
        self.setup.node.start(wait=False)

    def _send(self, errand: Errand) -> Process:
        number = len(self.campaign.ledgers)
        file = self.setup.folder / f"errand-{number}.pickle"
        file.write_bytes(pickle.dumps(errand))
        ledger = self.setup.folder / f"ledger-{number}.txt"
        ledger.touch()
        self.campaign.ledgers.append(ledger)
        return self._load("send", file, ledger, self.setup.node.port)

    def _load(self, kind: str, *arguments: object) -> Process:
        seed = self._chance.randrange(2**31)
        argv = [sys.executable, "-m", "scripts.crashing.load", kind, *map(str, arguments), str(seed)]
        return Process(argv, self.setup.folder / f"{kind}.log", **python_environment())

    def _settle(self, senders: Sequence[Process], series: Sequence[Made]) -> None:
        """Everything was acknowledged, analysed and delivered."""
        node = self.setup.node
        try:
            node.wait(lambda: not any(s.running for s in senders), SETTLE_SECONDS, "every sender is done")
            for sender in senders:
                code = sender.stop()
                assert code == 0, f"a sender ended with {code}: {sender.output()[-500:]}"
            node.wait_ready(SETTLE_SECONDS)
            node.wait(lambda: all(map(self._delivered, series)), SETTLE_SECONDS, "all is analysed and delivered")
        finally:
            for sender in senders:
                sender.stop(1)

    def _delivered(self, made: Made) -> bool:
        """The newest revision has every image, and everything that was made reached the PACS."""
        series_uid = made.series_uid
        try:
            jobs = self.setup.node.jobs(series_uid)
            if not jobs or any(j["state"] not in ("done", "superseded") for j in jobs) or jobs[-1]["state"] != "done":
                return False
            inputs = self.setup.node.rows("SELECT count(*) AS n FROM job_inputs WHERE job_id = ?", (jobs[-1]["id"],))
            rows = self.setup.node.deliveries(series_uid)
        except apsw.Error:
            return False
        return inputs[0]["n"] == len(made.items) and bool(rows) and all(r["state"] == "stored" for r in rows)
