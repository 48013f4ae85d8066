"""A week without the cloud with many results waiting, then how fast they drain into ``dicomnode cloud``.

Usage: ``python scripts/measure_cloud_drain.py [--results 5000] [--identified]``. Half of the results are
SEG, half SR, of small synthetic series; each study has its metadata and a summary, too. The week passes
on a clock of the script's own; the drain is real, the endpoint a process of its own on this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dicomnode import durable  # noqa: E402
from dicomnode.errors import MalformedDataSet  # noqa: E402
from dicomnode.index.catalogue import Catalogue, NewInstance  # noqa: E402
from dicomnode.index.cloud_outbox import CloudOutbox  # noqa: E402
from dicomnode.index.database import Database  # noqa: E402
from dicomnode.index.jobs import Jobs, Outcome, Request, Result  # noqa: E402
from dicomnode.settings import Settings  # noqa: E402
from dicomnode.sync.aside import Aside  # noqa: E402
from dicomnode.sync.departure import Departures  # noqa: E402
from dicomnode.sync.endpoints import Endpoints  # noqa: E402
from dicomnode.sync.sender import CloudSender  # noqa: E402

EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
WEEK_HOURS = 7 * 24


@dataclass
class HandClock:
    now: float = 1_000_000.0

    def ticks(self) -> float:
        return self.now

    def wall(self) -> datetime:
        return datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=self.now)


def templates(folder: Path) -> dict[str, bytes]:
    """A SEG and an SR as the encoder makes them."""
    from tests.encode.source_case import SOURCES, case_of
    from tests.encode.test_kinds import encode

    case = case_of(SOURCES["mr"](), folder)
    return {o.kind: o.part10 for o in encode(case) if o.kind in ("SEG", "SR")}


def renamed(part10: bytes, study: str, chance: random.Random) -> bytes:
    """The same object of another study and with UIDs of its own, each as long as before."""
    names = {u for u in re.findall(rb"2\.25\.\d{30,39}", part10)}
    for number, uid in enumerate(sorted(names)):
        seed = random.Random(f"{study}{number}") if number else chance
        digits = len(uid) - 5
        new = b"2.25." + str(seed.randrange(10 ** (digits - 1), 10**digits)).encode()
        part10 = part10.replace(uid, new)
    return part10


def fill(db: Database, data_dir: Path, studies: int, settings: Settings, clock: HandClock) -> None:
    from io import BytesIO

    from pydicom import dcmread

    store = durable.ObjectStore(data_dir)
    store.prepare()
    chance = random.Random(1)
    with tempfile.TemporaryDirectory() as folder:
        made = templates(Path(folder))

    def instance(part10: bytes, origin: str) -> NewInstance:
        ds = dcmread(BytesIO(part10), stop_before_pixels=True)
        name = store.new_name(str(ds.SeriesInstanceUID))
        store.stage(name, [part10], sync=False)
        keys = ("SOPInstanceUID", "SOPClassUID", "SeriesInstanceUID", "StudyInstanceUID", "PatientID", "PatientName")
        digest = durable.sha256(part10)
        attributes = {k: str(ds[k].value) for k in (*keys, "Modality", "StudyDate")}
        return NewInstance(attributes, EXPLICIT_LITTLE, name, len(part10), digest, digest, origin=origin)

    for number in range(studies):
        source = instance(renamed(made["SEG"], f"source{number}", chance), "received")
        Catalogue(db).commit([source], sync=False)
        series = db.row("SELECT id, generation FROM series ORDER BY id DESC LIMIT 1")
        assert series is not None
        request = Request("ct-lung", ("chest",), (), "routine")
        [job] = Jobs(db).select(series["id"], series["generation"], "quiet", [request])
        assert Jobs(db).lease("worker", 60.0) is not None
        results = [Result(k, instance(renamed(p, f"{k}{number}", chance), "result")) for k, p in made.items()]
        Jobs(db).finish(job, "worker", Outcome(results, summary={"slices": 8}), cloud=settings.cloud_plan)
        if number % (studies // WEEK_HOURS + 1) == 0:
            clock.now += 3600


async def week(sender: CloudSender, clock: HandClock) -> None:
    for _ in range(WEEK_HOURS):
        assert await sender.flush() == 0
        await sender.endpoints.probe()
        clock.now += 3600


def cpu_seconds(endpoint: int) -> tuple[float, float, float]:
    """Processor time so far of this process, of those that de-identify, and of the endpoint."""

    def of(process: psutil.Process) -> float:
        times = process.cpu_times()
        return float(times.user + times.system)

    ours = psutil.Process()
    helpers = [c for c in ours.children() if c.pid != endpoint]
    return of(ours), sum(map(of, helpers)), of(psutil.Process(endpoint))


async def drain(sender: CloudSender) -> int:
    """As the sidecar does it: the classes beside each other."""
    return sum(await asyncio.gather(*(sender.flush(lane) for lane in ("urgent", "normal", "batch"))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=int, default=5000)
    parser.add_argument("--identified", action="store_true", help="as they are, without de-identification")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "node"
        command = [sys.executable, "-m", "dicomnode", "cloud", "--port", "0", "--json", "--data-dir", f"{folder}/cloud"]
        endpoint = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT, text=True)
        assert endpoint.stdout is not None
        text = ""
        while not text.rstrip().endswith("}"):
            text += endpoint.stdout.readline()
        urls = json.loads(text)
        try:
            clock, aside = HandClock(), Aside()
            db = Database(data, clock)

            def settings(stow: str, records: str) -> Settings:
                where = {"stow_url": stow, "records_url": records}
                rule = {"name": "chest", "models": ["ct-lung"], "cloud_identity": "kept"}  # for --identified
                return Settings(node={"data_dir": data, "reserve_mb": 1}, cloud=where, rules=[rule])

            def sender(where: Settings) -> CloudSender:
                return CloudSender(where, db, Endpoints(where, db), Departures(where, db, aside.leave))

            real = settings(urls["stow_url"], urls["records_url"])
            away = settings("http://127.0.0.1:9/studies", "http://127.0.0.1:9/v1")
            begin = time.perf_counter()
            fill(db, data, options.results // 2, real, clock)
            if options.identified:
                db._connection().execute("UPDATE sync_items SET identified = 1")
            print(f"{options.results} results made in {time.perf_counter() - begin:.0f} s")
            asyncio.run(week(sender(away), clock))
            box = CloudOutbox(db)
            items, size = sum(w["count"] for w in box.lanes()), box.waiting_bytes()
            with tempfile.NamedTemporaryFile() as warm:  # loading its libraries is no part of a result
                warm.write(b"no object")
                warm.flush()
                with contextlib.suppress(MalformedDataSet):
                    aside.leave(Path(warm.name), b"k" * 32)
            begin, before = time.perf_counter(), cpu_seconds(endpoint.pid)
            settled = asyncio.run(drain(sender(real)))
            seconds, after = time.perf_counter() - begin, cpu_seconds(endpoint.pid)
            assert settled == items and box.counts()["stored"] == items, box.counts()
            each = [1000 * (b - a) / options.results for a, b in zip(before, after, strict=True)]
            print(
                f"{items} items ({options.results} results, {size / 1e6:.1f} MB) drained in {seconds:.0f} s:"
                f" {options.results / seconds:.1f} results/s, {size / seconds / 1e6:.2f} MB/s,"
                f" processor time for each result {each[0]:.1f} ms here, {each[1]:.1f} ms to de-identify,"
                f" {each[2]:.1f} ms of the endpoint"
            )
            aside.close()
            db.close()
        finally:
            endpoint.terminate()
            endpoint.wait()


if __name__ == "__main__":
    main()
