"""The demo: a study goes through a node and a loopback PACS, and what comes back is judged.

The node is the real one, ``dicomnode serve`` in processes of its own; the study comes over
the network from an AE that its configuration lists.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from dicomnode import logs
from dicomnode.deliver.files import send_files
from dicomnode.deliver.scu import SendOutcome, Sent
from dicomnode.demo import report as report_text
from dicomnode.demo.inputs import Inputs, read_inputs, write_phantom, write_radiographs
from dicomnode.demo.launch import LOOPBACK, Program
from dicomnode.demo.node import MODALITY_AE, NODE_AE, Ports, choose_ports, start_node, wait_ready, write_configuration
from dicomnode.demo.outcome import Findings, conclude
from dicomnode.demo.pacs import Pacs, make_pacs
from dicomnode.demo.telling import step
from dicomnode.demo.watch import all_jobs, wait_answered
from dicomnode.demo.workspace import Workspace, prepare
from dicomnode.errors import OperatorError
from dicomnode.index.database import Database
from dicomnode.receive.progress import wait_until_visible
from dicomnode.settings import Delivery, Peer

EXIT_INTERRUPTED = 130
PLAIN_WIDTH = 110


@dataclass(slots=True)
class Demo:
    """What one run has in its hands; ``seconds`` by step."""

    space: Workspace
    ports: Ports
    pacs: Pacs
    node: Program
    begin: float
    seconds: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        """Raises when node or PACS have ended."""
        self.node.check()
        self.pacs.check()


@dataclass(slots=True)
class Sending:
    """How it went: ``failed`` in words, ``last_response`` in node time."""

    outcomes: list[SendOutcome] = field(default_factory=list)
    last_response: float = 0.0

    @property
    def failed(self) -> list[str]:
        return [o.cause for o in self.outcomes if o.sent is not Sent.stored]


def run_demo(path: Path | None, *, once: bool, output: Path, slices: int, as_json: bool) -> int:
    """Run it; the exit code is 0 only if everything came back right. Without ``slices`` the phantom is radiographed.

    Without ``once`` node and PACS stay up until Ctrl-C or SIGTERM. Everything that was
    started is stopped, however it ends. Raises OperatorError with what to do.
    """
    logs.configure("demo", "error", "console")
    console = Console(stderr=as_json, highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(stderr=as_json, highlight=False, markup=False, width=PLAIN_WIDTH)
    if path is not None and not path.exists():
        raise OperatorError("read the folder", f"{path} does not exist", "Give a folder with DICOM files")
    try:
        with _interruptible(), contextlib.ExitStack() as stack:
            begin = time.perf_counter()
            space = prepare(output)
            if path is not None and space.root == path.resolve():
                raise OperatorError("prepare the demo's folder", "it is the folder to send", "Give another --output")
            ports = choose_ports(prefer_known=not once)
            pacs = make_pacs(space.pacs, ports.dicom, prefer_known_ports=not once)
            stack.callback(pacs.stop)
            with step(console, f"Starting {pacs.name}"):
                pacs.start()
            settings = write_configuration(space, ports, pacs.port)
            node = start_node(space)
            stack.callback(_stop, console, node, pacs)
            demo = Demo(space, ports, pacs, node, begin)
            inputs = _inputs(demo, path, slices, console)
            with step(console, "Starting the node", None) as told:
                wait_ready(node, ports)
            demo.seconds["start"] = told.seconds
            db = Database(settings.node.data_dir)
            stack.callback(db.close)
            report = _round_trip(demo, inputs, db, console)
            _publish(report, demo, console, as_json=as_json, once=once)
            if not once:
                _stay(demo)
            return 0 if report["ok"] else 1
    except KeyboardInterrupt:
        console.print("Interrupted; node and PACS are stopped.")
        return EXIT_INTERRUPTED


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM ends the demo as Ctrl-C does, so that its programs are stopped."""

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _stop(console: Console, node: Program, pacs: Pacs) -> None:
    """Both are asked at once; the PACS is waited for later."""
    with contextlib.suppress(KeyboardInterrupt), step(console, "Stopping node and PACS"):
        node.ask_to_stop()
        pacs.stop()
        node.stop()


def _inputs(demo: Demo, path: Path | None, slices: int, console: Console) -> Inputs:
    """The phantom or the user's files; the node starts meanwhile."""
    if path is not None:
        with step(console, f"Reading {path}") as told:
            inputs = read_inputs(path)
            told.say(f"{len(inputs.files)} images, {len(inputs.series)} series, {inputs.studies} studies")
        return inputs
    if not slices:
        with step(console, "Rendering two radiographs of the phantom") as told:
            leaning = write_radiographs(demo.space.inputs)
        demo.seconds["phantom"] = told.seconds
        return read_inputs(demo.space.inputs, leaning=leaning)
    with step(console, f"Rendering the phantom, {slices} slices", slices) as told:
        phantom = write_phantom(demo.space.inputs, slices, told.advance)
    demo.seconds["phantom"] = told.seconds
    return read_inputs(demo.space.inputs, phantom)


def _round_trip(demo: Demo, inputs: Inputs, db: Database, console: Console) -> dict[str, Any]:
    """Send, wait, fetch, judge; returns the report."""
    sending = _send(demo, inputs, db, console)
    with step(console, "Waiting for the answers") as told:
        wait_answered(db, lambda progress: told.say(str(progress)), demo.check)
    jobs = all_jobs(db)
    stored = [float(d["finished_at"]) for job in jobs for d in job["deliveries"] if d["finished_at"]]
    with step(console, "Checking what came back") as told:
        found = conclude(inputs, sending.failed, jobs, demo.pacs.objects(), demo.space)
        told.say(f"{sum(c.ok for c in found.checks)} of {len(found.checks)} checks right")
    demo.seconds["last_response_to_results"] = max(0.0, max(stored) - sending.last_response) if stored else -1.0
    demo.seconds["total"] = time.perf_counter() - demo.begin
    return _report(demo, inputs, sending, found)


def _send(demo: Demo, inputs: Inputs, db: Database, console: Console) -> Sending:
    """C-STORE everything to the node as AE ``MODALITY``."""
    peer = Peer(name="node", ae_title=NODE_AE, host=LOOPBACK, port=demo.ports.dicom)
    sending = Sending()
    title = f"Sending {len(inputs.files)} images as {MODALITY_AE}"
    with step(console, title, len(inputs.files)) as told:

        def note(outcome: SendOutcome) -> None:
            sending.last_response = db.clock.ticks()
            sending.outcomes.append(outcome)
            told.advance()

        send_files(MODALITY_AE, peer, Delivery(), inputs.files, note)
    demo.seconds["send"] = told.seconds
    wait_until_visible(db.data_dir / "journal")  # or it would look as if there were nothing to answer
    return sending


def _report(demo: Demo, inputs: Inputs, sending: Sending, found: Findings) -> dict[str, Any]:
    size = sum(f.path.stat().st_size for f in inputs.files)
    space, end_to_end = demo.space, demo.seconds.pop("last_response_to_results")
    return {
        "ok": found.ok,
        "pacs": demo.pacs.name,
        "sent": {
            "images": len(inputs.files),
            "stored": len(inputs.files) - len(sending.failed),
            "failed": sorted(set(sending.failed)),
            "skipped_files": inputs.skipped,
            "megabytes": round(size / 1e6, 1),
            "studies": inputs.studies,
            "series": [s.as_dict() for s in inputs.series],
        },
        "jobs": found.jobs,
        "unmatched": found.unmatched,
        "comparisons": [c.as_dict() for c in found.comparisons],
        "checks": [c.as_dict() for c in found.checks],
        "seconds": {
            **{k: round(v, 3) for k, v in demo.seconds.items()},
            "last_response_to_results": round(end_to_end, 3) if end_to_end >= 0 else None,
        },
        "where": {
            "pictures": ", ".join(map(str, found.montages)) or "none: nothing was segmented",
            "SEG and SR that came back": str(space.results),
            "images that were sent": str(inputs.folder),
            "node: configuration, log": f"{space.config}, {space.node_log}",
            "node: dashboard": f"http://{LOOPBACK}:{demo.ports.http}/",
            "node: DICOM": f"{NODE_AE} at {LOOPBACK}:{demo.ports.dicom}",
            "PACS": f"{demo.pacs.name}, {LOOPBACK}:{demo.pacs.port} {demo.pacs.address}".strip(),
            "this report as JSON": str(space.report),
        },
        "try": _commands(demo, inputs),
    }


def _commands(demo: Demo, inputs: Inputs) -> dict[str, str]:
    program = Path(sys.executable).with_name("dicomnode")
    base = [_near(program)] if program.exists() else [sys.executable, "-m", "dicomnode"]
    node, modality = _near(demo.space.config), _near(demo.space.modality_config)
    folder = _near(inputs.folder)
    commands = {
        "what runs, what is stored, what waits": [*base, "status", "--config", node],
        "one job: why it ran, what it found, how long it took": [*base, "jobs", "show", "1", "--config", node],
        "ports, disk, models and peers, and what to do": [*base, "doctor", "--config", node],
        "send it again: nothing is done twice; or send your own": [*base, "send", "node", folder, "--config", modality],
    }
    if shutil.which("storescu"):
        call = ["storescu", "-aet", MODALITY_AE, "-aec", NODE_AE, LOOPBACK, str(demo.ports.dicom), "+sd", folder]
        commands["the same with DCMTK"] = call
    reports = sorted(demo.space.results.glob("SR-*.dcm"))
    if shutil.which("dsrdump") and reports:
        commands["the report as text"] = ["dsrdump", _near(reports[0])]
    return {purpose: shlex.join(argv) for purpose, argv in commands.items()}


def _near(path: Path) -> str:
    """Relative to where the person stands, where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def _publish(report: dict[str, Any], demo: Demo, console: Console, *, as_json: bool, once: bool) -> None:
    text = json.dumps(report, indent=2, ensure_ascii=False, default=str)
    demo.space.report.write_text(text + "\n", encoding="utf-8")
    report_text.show(report, console)
    if not once:
        report_text.show_playground(report, console)
    if as_json:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()


def _stay(demo: Demo, poll: Callable[[float], None] = time.sleep) -> None:
    """Until Ctrl-C or SIGTERM, which is the normal end; raises when node or PACS end by themselves."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            demo.check()
            poll(0.5)
