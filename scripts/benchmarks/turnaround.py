"""From the last C-STORE response to SEG and SR stored at the PACS, and where the time goes."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import datetime
from pathlib import Path

import psutil

from benchmarks import peers
from benchmarks.node import AE_TITLE, CHEST_RULE, Node
from benchmarks.report import Figures, Goal, Row, Section
from benchmarks.tools import LOOPBACK, SHARED_DATA, Bench, BenchError, family, remove, say, wait_for
from dicomnode.deliver.files import find_files, send_files
from dicomnode.deliver.scu import SendOutcome
from dicomnode.demo.phantom import thorax, write_series
from dicomnode.settings import Delivery, Peer

REAL_CT = SHARED_DATA / "ct-chest-ricord"
REAL, PHANTOM = "real chest CT, JPEG Lossless", "phantom, uncompressed"
BURST, SCANNER = "as fast as it goes", "25 images/s"
IMAGES_PER_SECOND = 25.0
"""A CT scanner sends while it reconstructs."""
GOAL_SECONDS = 1.0


def run(bench: Bench) -> Section:
    section = Section()
    rows: list[Row] = []
    phantom = bench.folder("phantom")
    slices = bench.amount(300, 60)
    say.print(f"making a phantom of {slices} slices …")
    write_series(thorax(slices=slices, slice_spacing=320.0 / slices), phantom)
    series = {PHANTOM: phantom}
    if REAL_CT.is_dir():
        series[REAL] = REAL_CT
    else:
        bench.skip("turnaround of the real chest CT: its folder is not here")
    for label, folder in series.items():
        for pace in (BURST, SCANNER):
            runs = []
            for turn in range(bench.repeat):
                say.print(f"turnaround {turn + 1}/{bench.repeat}: {label}, {pace} …")
                runs.append(_once(bench, folder, 0.0 if pace == BURST else 1.0 / IMAGES_PER_SECOND))
            best = min(runs, key=lambda r: float(r["without inference, s"]))
            rows.append({"series": label, "sent": pace, **best})
            section.samples[f"{label}, {pace}"] = runs
    remove(phantom)
    note = (
        f"From the last response to both objects at storescp; the run of {bench.repeat} with the least beside "
        "inference (network and post-processing of the model, ct-lung on the CPU)."
    )
    section.tables.append(Figures("From the last slice acknowledged to SEG + SR at the PACS", rows, note))
    for judged in rows[-2:]:
        seconds = float(judged["without inference, s"])
        what = f"last slice to SEG + SR, inference excluded ({judged['series']}, {judged['sent']})"
        section.goals.append(Goal(what, f"< {GOAL_SECONDS:.0f} s", f"{seconds:.2f} s", seconds < GOAL_SECONDS))
    return section


def _once(bench: Bench, series: Path, gap: float) -> Row:
    """``gap``: seconds from the begin of one image to that of the next, at least."""
    work = bench.folder("turnaround")
    with peers.storescp(work / "pacs") as pacs:
        node = Node(work / "node", targets={"pacs": pacs.port}, rules=CHEST_RULE)
        with node.serving():
            files, _ = find_files([series])
            peer = Peer(name="node", ae_title=AE_TITLE, host=LOOPBACK, port=node.port)
            begin = time.perf_counter()
            answered: list[float] = []

            def wait_for_the_next(_: SendOutcome) -> None:
                answered.append(time.time())
                due = begin + gap * len(answered)
                if gap and len(answered) < len(files):
                    time.sleep(max(0.0, due - time.perf_counter()))

            outcomes = send_files("BENCH", peer, Delivery(), files, wait_for_the_next)
            last_response = answered[-1]
            sent = time.perf_counter() - begin
            if any(o.sent != "stored" for o in outcomes):
                raise BenchError("the node did not take every slice")
            memory = 0

            def delivered() -> bool:
                nonlocal memory
                memory = max(memory, sum(map(_rss, family(node.pid))))
                time.sleep(0.04)  # a look at every process costs what is being measured
                return bool(node.value("SELECT count(*) FROM deliveries WHERE state = 'stored'") == 2)

            wait_for(delivered, "SEG and SR at the PACS", 300)
            pacs.expect(2, "results at the PACS")
            finished = [r["finished_time"] for r in node.rows("SELECT finished_time FROM deliveries")]
            seconds = json.loads(node.value("SELECT seconds FROM jobs"))
    remove(work)
    total = max(datetime.fromisoformat(t).timestamp() for t in finished) - last_response
    inference, after = seconds["inference"], seconds["postprocess"]
    return {
        "slices": len(files),
        "intake, s": f"{sent:.2f}",
        "in all, s": f"{total:.2f}",
        "inference, s": f"{inference:.2f}",
        "post-processing, s": f"{after:.2f}",
        "without inference, s": f"{total - inference - after:.2f}",
        "reading, s": f"{seconds['read']:.2f}",
        "encoding, s": f"{seconds['encode']:.2f}",
        "peak RSS of all, MB": f"{memory / 1e6:.0f}",
    }


def _rss(process: psutil.Process) -> int:
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0
