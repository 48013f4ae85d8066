"""Benchmark: intake against other acceptors, and time from the last slice to results at the PACS.

Everything runs on loopback in temporary folders. Absolute times drift with the machine; the
ratios within one run are what counts. A program that is absent is skipped with a message.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from dicomnode.deliver.files import find_files, send_files
from dicomnode.demo.phantom import thorax, write_series
from dicomnode.index.database import Database
from dicomnode.settings import Delivery, Peer

ROOT = Path(__file__).resolve().parent.parent
REAL_CT = ROOT.parent / "shared" / "data" / "ct-chest-ricord"
say = Console(stderr=True, highlight=False)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"bench: gave up waiting for {what}")
        time.sleep(0.01)


def accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def running(argv: list[str], env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        argv, env={**os.environ, **(env or {})}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def storescp(folder: Path, *, no_delay: bool) -> Iterator[int]:
    port = free_port()
    folder.mkdir(parents=True)
    argv = ["storescp", "--fork", "-aet", "PACS", "+xa", "-od", str(folder), str(port)]
    with running(argv, {"TCP_NODELAY": "1"} if no_delay else {}):
        wait_for(lambda: accepts(port), "storescp")
        yield port


@contextmanager
def orthanc(folder: Path) -> Iterator[int]:
    port, http = free_port(), free_port()
    folder.mkdir(parents=True)
    config = {
        "StorageDirectory": str(folder / "store"),
        "IndexDirectory": str(folder / "index"),
        "DicomPort": port,
        "DicomAet": "PACS",
        "HttpPort": http,
        "DicomCheckCalledAet": False,
        "DicomAlwaysAllowStore": True,
        "AuthenticationEnabled": False,
        "Plugins": [],
    }
    file = folder / "orthanc.json"
    file.write_text(json.dumps(config))
    with running(["Orthanc", str(file)]):
        wait_for(lambda: accepts(port), "Orthanc")
        yield port


class Node:
    """A node as ``dicomnode serve`` runs it, with one sender and one PACS."""

    def __init__(self, folder: Path, *, pacs_port: int, rules: bool) -> None:
        self.port, self.http = free_port(), free_port()
        self.data_dir = folder / "data"
        folder.mkdir(parents=True)
        self.config = folder / "node.toml"
        rule = '[[rules]]\nname = "chest"\nmatch = { Modality = "CT" }\nmodels = ["ct-lung"]\nsend_to = ["pacs"]\n'
        self.config.write_text(
            f'[node]\ndata_dir = "data"\nreserve_mb = 100\n[dimse]\nhost = "127.0.0.1"\nport = {self.port}\n'
            f"[http]\nport = {self.http}\n"
            f'[inference]\nmodels_dir = "{ROOT / "models"}"\n'
            '[[peers]]\nname = "ct"\nae_title = "BENCH"\nallow = ["echo", "store"]\n'
            f'[[peers]]\nname = "pacs"\nae_title = "PACS"\nhost = "127.0.0.1"\nport = {pacs_port}\n'
            + (rule if rules else "")
        )

    @contextmanager
    def serving(self) -> Iterator[subprocess.Popen[bytes]]:
        argv = [sys.executable, "-m", "dicomnode", "serve", "--config", str(self.config)]
        with running(argv) as process:
            wait_for(self._ready, "the node", 120)
            yield process

    def _ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}/ready", timeout=5) as reply:
                return bool(reply.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def write_ct(folder: Path, count: int) -> None:
    """``count`` CT slices of 512 KB, uncompressed: the "ct" set of PERFORMANCE figures."""
    phantom = thorax(slices=count, slice_spacing=320.0 / count)
    folder.mkdir(parents=True)
    write_series(phantom, folder)


def dcmsend(port: int, folder: Path, called: str, *, no_delay: bool) -> float:
    env = {**os.environ, **({"TCP_NODELAY": "1"} if no_delay else {})}
    begin = time.perf_counter()
    subprocess.run(
        ["dcmsend", "-aet", "BENCH", "-aec", called, "127.0.0.1", str(port), "+sd", "+r", str(folder)],
        env=env,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return time.perf_counter() - begin


def bench_intake(work: Path, count: int) -> list[dict[str, Any]]:
    """One association, ``count`` x 512 KB, client as shipped and with TCP_NODELAY."""
    data = work / "ct"
    say.print(f"making {count} CT slices of 512 KB …")
    write_ct(data, count)
    rows: list[dict[str, Any]] = []

    def measure(acceptor: str, durable: str, context: Callable[[int], Any], called: str) -> None:
        row: dict[str, Any] = {"acceptor": acceptor, "durable": durable}
        for number, (key, no_delay) in enumerate((("as_shipped_s", False), ("no_delay_s", True))):
            say.print(f"intake: {acceptor}, client {'TCP_NODELAY' if no_delay else 'as shipped'} …")
            with context(number) as port:
                row[key] = round(dcmsend(port, data, called, no_delay=no_delay), 2)
        rows.append(row)

    @contextmanager
    def node(number: int) -> Iterator[int]:
        bench_node = Node(work / f"intake-node-{number}", pacs_port=free_port(), rules=False)
        with bench_node.serving():
            yield bench_node.port

    measure("dicomnode", "yes, indexed", node, "DICOMNODE")
    measure("storescp (TCP_NODELAY)", "no", lambda n: storescp(work / f"scp-{n}", no_delay=True), "PACS")
    measure("storescp as shipped", "no", lambda n: storescp(work / f"scp-plain-{n}", no_delay=False), "PACS")
    if shutil.which("Orthanc"):
        measure("Orthanc", "yes, indexed", lambda n: orthanc(work / f"orthanc-{n}"), "PACS")
    else:
        say.print("Orthanc is not installed: left out (apt-get install orthanc)")
    for row in rows:
        row["as_shipped_ratio"] = round(row["as_shipped_s"] / rows[0]["as_shipped_s"], 2)
        row["no_delay_ratio"] = round(row["no_delay_s"] / rows[0]["no_delay_s"], 2)
    return rows


def bench_turnaround(work: Path, folder: Path, label: str) -> dict[str, Any]:
    """From the last C-STORE response to SEG and SR stored at the PACS, and where the time goes."""
    say.print(f"turnaround: {label} …")
    with storescp(work / f"pacs-{label}", no_delay=True) as pacs_port:
        node = Node(work / f"turnaround-{label}", pacs_port=pacs_port, rules=True)
        with node.serving() as process:
            files, _ = find_files([folder])
            peer = Peer(name="node", ae_title="DICOMNODE", host="127.0.0.1", port=node.port)
            begin = time.perf_counter()
            outcomes = send_files("BENCH", peer, Delivery(), files)
            last_response = time.time()
            sent = time.perf_counter() - begin
            if any(o.sent != "stored" for o in outcomes):
                raise SystemExit("bench: the node did not take every slice")
            memory = 0
            db = Database(node.data_dir)

            def delivered() -> bool:
                nonlocal memory
                tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
                memory = max(memory, sum(_rss(p) for p in tree))
                return db.value("SELECT count(*) FROM deliveries WHERE state = 'stored'") == 2

            wait_for(delivered, "SEG and SR at the PACS", 180)
            done = max(
                datetime.fromisoformat(r["finished_time"]).timestamp()
                for r in db.rows("SELECT finished_time FROM deliveries")
            )
            seconds = json.loads(db.value("SELECT seconds FROM jobs"))
            db.close()
    total = done - last_response
    inference, postprocess = seconds["inference"], seconds["postprocess"]
    return {
        "series": label,
        "slices": len(files),
        "intake_s": round(sent, 2),
        "last_response_to_pacs_s": round(total, 2),
        "inference_s": round(inference, 2),
        "postprocess_s": round(postprocess, 2),
        "without_inference_s": round(total - inference - postprocess, 2),
        "read_s": round(seconds["read"], 2),
        "encode_s": round(seconds["encode"], 2),
        "peak_rss_all_processes_mb": round(memory / 2**20),
    }


def _rss(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def show(title: str, rows: list[dict[str, Any]]) -> None:
    if not rows:
        return
    table = Table(title=title, title_justify="left")
    for key in rows[0]:
        table.add_column(key.replace("_", " "))
    for row in rows:
        table.add_row(*(str(row[key]) for key in rows[0]))
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    parser.add_argument("--quick", action="store_true", help="fewer objects, for trying the script")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {round(psutil.virtual_memory().total / 2**30)} GiB, {platform.platform()}",
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory(prefix="dicomnode-bench-") as name:
        work = Path(name)
        if shutil.which("dcmsend") and shutil.which("storescp"):
            result["intake"] = bench_intake(work, 60 if arguments.quick else 300)
            turnaround = [bench_turnaround(work, work / "ct", "phantom")]
            if REAL_CT.is_dir():
                turnaround.append(bench_turnaround(work, REAL_CT, "real-ct-jpeg-lossless"))
            else:
                say.print("the real chest CT is not here: left out")
            result["turnaround"] = turnaround
        else:
            say.print("DCMTK is not installed: nothing to measure against (apt-get install dcmtk)")
    Console(width=160).print(f"{result['date']}, {result['machine']}, Python {result['python']}")
    show("Intake, one association, seconds; ratio to dicomnode (above 1: slower)", result.get("intake", []))
    show("From the last C-STORE response to SEG + SR stored at the PACS", result.get("turnaround", []))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
        say.print(f"figures are in {arguments.json}")


if __name__ == "__main__":
    main()
