"""Command line: thin verbs over the stages. Every verb takes --config; lists print --json."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dicomnode import __version__, cli_models, logs
from dicomnode.cli_cloud import cloud, models_publish
from dicomnode.cli_common import Config, Json, Limit, check_state, console
from dicomnode.cli_common import index as _index
from dicomnode.cli_common import output as _print
from dicomnode.cli_common import settings_of as _settings
from dicomnode.cli_common import table as _table
from dicomnode.cli_conformance import conformance
from dicomnode.cli_delivery import alerts_app, commitments_app, deliveries_app, notifications_app
from dicomnode.cli_fleet import cloud_waits, desired_app, fleet_lines, repository_line
from dicomnode.cli_models_import import models_import
from dicomnode.cli_records import conflicts_app, records_app
from dicomnode.cli_sync import sync_app
from dicomnode.errors import NodeError, OperatorError
from dicomnode.settings import Settings

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="DICOM-native AI node.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,  # they show values
)
jobs_app = typer.Typer(no_args_is_help=True, help="Analyses: list, show, retry.")
models_app = typer.Typer(no_args_is_help=True, help="Model bundles and the life of each version.")
app.add_typer(jobs_app, name="jobs")
app.add_typer(deliveries_app, name="deliveries")
app.add_typer(commitments_app, name="commitments")
app.add_typer(notifications_app, name="notifications")
app.add_typer(alerts_app, name="alerts")
app.add_typer(sync_app, name="sync")
app.add_typer(records_app, name="records")
app.add_typer(conflicts_app, name="conflicts")
app.add_typer(desired_app, name="desired")
app.command()(cloud)
cli_models.register(models_app)
app.add_typer(models_app, name="models")
app.command()(conformance)
models_app.command("import")(models_import)
models_app.command("publish")(models_publish)


def main() -> None:
    """Entry point; an error of ours is one readable line, not a traceback."""
    try:
        app()
    except NodeError as error:
        from dicomnode.app import explain_and_exit

        sys.exit(explain_and_exit(error))
    except Exception as error:  # noqa: BLE001 a message or a frame's values may be patients' data
        sys.stderr.write(f"dicomnode: unexpected {logs.fault(error)}; report this\n")
        sys.exit(1)


@app.command()
def serve(config: Config = None) -> None:
    """Run the node in the foreground: receiver, worker, courier and sidecar."""
    from dicomnode import app as node

    raise typer.Exit(node.serve(_settings(config), config))


@app.command()
def run(
    process: Annotated[str, typer.Argument(help="receiver, worker, courier or sidecar")],
    config: Config = None,
    fd: Annotated[int, typer.Option(hidden=True)] = -1,
    tls_fd: Annotated[int, typer.Option(hidden=True)] = -1,
    slot: Annotated[int, typer.Option(hidden=True)] = 0,
) -> None:
    """Run one process of the node; systemd units use this."""
    from dicomnode import app as node
    from dicomnode.lifeline import SUPERVISED, die_with_parent

    if process not in node.PROCESSES:
        raise OperatorError("run", f"there is no process '{process}'", f"One of: {', '.join(node.PROCESSES)}")
    if os.environ.get(SUPERVISED):
        die_with_parent()
    raise typer.Exit(node.run_process(process, _settings(config), config, fd=fd, tls_fd=tls_fd, slot=slot))


@app.command("check-config")
def check_config(config: Config = None, as_json: Json = False) -> None:
    """Read the configuration, check every key and say what it means; exit 78 when it is wrong."""
    from dicomnode.cloud_check import cloud_findings
    from dicomnode.config_summary import summary
    from dicomnode.endpoint_settings import endpoint_findings
    from dicomnode.findings import Level
    from dicomnode.infer.purpose import rule_findings
    from dicomnode.tls_check import tls_findings

    settings = _settings(config)
    inference = settings.inference
    findings = [
        *tls_findings(settings),
        *endpoint_findings(inference.endpoints, used=bool(inference.places)),
        *rule_findings(settings),
        *cloud_findings(settings),
    ]
    wrong = [f for f in findings if f.level is Level.fault]

    def show(_: dict[str, Any]) -> None:
        console.print(f"{config}: {'WRONG' if wrong else 'OK'}")
        for line in summary(settings, findings):
            console.print(f"  {line}")

    _print({**settings.model_dump(mode="json"), "findings": [f.as_dict() for f in findings]}, as_json, show)
    if wrong:
        raise typer.Exit(78)


@app.command()
def doctor(config: Config = None, as_json: Json = False) -> None:
    """Check ports, TLS, disk, clock, engine, models and peers, and say what to do; exit 1 on a fault."""
    from dicomnode.doctor import examine

    findings = [f.as_dict() for f in examine(_settings(config))]

    def show(rows: list[dict[str, Any]]) -> None:
        _table(rows, {"level": "", "check": "check", "text": "finding", "hint": "what to do"}, "nothing to check")

    _print(findings, as_json, show)
    if any(f["level"] == "FAULT" for f in findings):
        raise typer.Exit(1)


@app.command()
def status(config: Config = None, as_json: Json = False) -> None:
    """What runs, what is stored, what waits and what went wrong."""
    from dicomnode.admin.status import status_report

    settings = _settings(config)

    def show(data: dict[str, Any]) -> None:
        console.print(f"dicomnode {__version__}, {settings.node.ae_title}")
        rows = [{**p, "alive": "up" if p["alive"] else "DOWN"} for p in data["processes"]]
        _table(rows, {"name": "process", "alive": "", "pid": "pid", "started_time": "since"}, "no process has run yet")
        for title, counts in (
            ("stored", data["instances"]),
            ("jobs", data["jobs"]),
            ("deliveries", data["deliveries"]),
            ("commitments asked by peers", data["commitments"]["scp"]),
            ("commitments asked of peers", data["commitments"]["scu"]),
            ("notifications", data["notifications"]),
            ("cloud items", data["sync_items"]),
        ):
            text = ", ".join(f"{n} {name}" for name, n in counts.items() if n) or "none"
            console.print(f"{title}: {text}")
        if data["sync_items"].get("rejected"):
            console.print("  why they are parked: dicomnode sync list --state rejected")
        for reference, model in data["models"]["serving"].items():
            console.print(f"model {reference}: {model['version']} on {model['engine']}")
        for name, build in data["models"]["building"].items():
            console.print(f"engine for {name}: {build['step']}, {build['share']:.0%}, {build['seconds']} s")
        if trust := data["models"]["repository"]:
            console.print(f"model repository: {repository_line(trust)}")
        for one in data["models"]["waiting"]:
            console.print(f"model {one['name']} {one['version']} is {one['state']} and waits: {one['waits_for']}")
        for pull in data["models"]["pulls"]:
            if pull["last_error"]:
                console.print(f"model {pull['name']} {pull['version']} is {pull['state']}: {pull['last_error']}")
        if (models := data["models"]["disk"])["versions"]:
            coming = f", {models['coming_mb']} MiB on their way" if models["coming_mb"] else ""
            console.print(f"pulled models: {models['versions']} versions, {models['mb']} MiB on the disk{coming}")
        console.print(f"cloud: {_cloud_line(data['cloud'])}{cloud_waits(data['cloud'])}")
        for line in fleet_lines(data):
            console.print(line)
        console.print(f"TLS: {_tls_line(data['tls'])}")
        disk = data["disk"]
        console.print(f"disk: {disk['free_mb']} MiB free, {disk['reserve_mb']} MiB reserved")
        if data["reviews"]:
            said = ", ".join(f"{kind} {number}" for kind, number in data["reviews"].items())
            console.print(f"to decide (dicomnode conflicts list --state open): {said}")
        if data["events"]:
            console.print()
            _table(
                data["events"][:10],
                {"time": "time", "severity": "", "kind": "event", "subject": "about", "text": "what"},
                "",
            )

    with _index(settings) as db:
        _print(status_report(db, settings), as_json, show)


def _cloud_line(cloud: dict[str, Any]) -> str:
    if not cloud["endpoints"]:
        return "off, nothing leaves" if not cloud["configured"] else "not known, the sidecar does not run"
    parts = [cloud["state"] + ("" if cloud["mode"] == "auto" else f" (offline_mode = {cloud['mode']})")]
    for endpoint in cloud["endpoints"]:
        how = "in use" if endpoint["in_use"] else "well" if endpoint["well"] else endpoint["error"] or "not tried"
        parts.append(f"{endpoint['name']} {how}")
        if endpoint["in_use"] and endpoint["error"]:
            parts[-1] += f" ({endpoint['error']})"
    return ", ".join(parts)


def _tls_line(tls: dict[str, Any]) -> str:
    own, parts = tls["certificate"], []
    if tls["port"] is not None:
        parts.append(f"port {tls['port']}")
    if own:
        parts.append(f"certificate '{own['subject']}' until {own['not_after'][:10]} ({own['days_left']} days)")
    if tls["fault"]:
        parts.append(tls["fault"])
    parts += [
        f"the certificate of {peer['peer']} ends {peer['not_after'][:10]}"
        for peer in tls["peers"]
        if peer["state"] != "valid"
    ]
    return ", ".join(parts) or "off"


@app.command()
def events(config: Config = None, as_json: Json = False, limit: Limit = 50) -> None:
    """Rejections, refusals, restarts and failures, newest first."""
    from dicomnode.index.operation import Events

    with _index(_settings(config)) as db:
        columns = {"time": "time", "severity": "", "kind": "event", "subject": "about", "text": "what"}
        _print(Events(db).listing(limit), as_json, lambda rows: _table(rows, columns, "no events"))


@app.command()
def echo(
    peer: Annotated[str, typer.Argument(help="name of a peer")], config: Config = None, as_json: Json = False
) -> None:
    """C-ECHO to a peer of the configuration."""
    import time

    from dicomnode.deliver.scu import echo as c_echo
    from dicomnode.tls import Transport

    settings = _settings(config)
    target = _peer(settings, peer)
    begin = time.perf_counter()
    c_echo(settings.node.ae_title, target, settings.delivery, Transport(settings.tls))
    seconds = round(time.perf_counter() - begin, 3)
    data = {"peer": peer, "ae_title": target.ae_title, "status": "success", "seconds": seconds}
    _print(data, as_json, lambda d: console.print(f"{peer} ({target.ae_title}) answered in {d['seconds']} s"))


def _peer(settings: Settings, name: str) -> Any:
    target = settings.peer(name)
    if target is None:
        known = ", ".join(p.name for p in settings.peers) or "none"
        raise OperatorError("find peer", f"there is no peer '{name}'", f"Listed in [[peers]]: {known}")
    return target


@app.command()
def send(
    peer: Annotated[str, typer.Argument(help="name of a peer")],
    paths: Annotated[list[Path], typer.Argument(help="DICOM files or folders")],
    config: Config = None,
    as_json: Json = False,
) -> None:
    """C-STORE files to a peer, as they are; exit 1 when one was not stored."""
    from dicomnode.deliver.files import find_files, send_files
    from dicomnode.tls import Transport

    settings = _settings(config)
    target = _peer(settings, peer)
    found, skipped = find_files(paths)
    with _progress(len(found), f"sending to {peer}") as advance:
        transport = Transport(settings.tls)
        report = send_files(settings.node.ae_title, target, settings.delivery, found, lambda _: advance(), transport)
    data = {
        "peer": peer,
        "stored": sum(o.sent == "stored" for o in report),
        "failed": [{"file": str(found[o.key].path), "cause": o.cause} for o in report if o.sent != "stored"],
        "skipped": [str(p) for p in skipped],
    }

    def show(result: dict[str, Any]) -> None:
        console.print(f"{result['stored']} stored at {peer}, {len(result['failed'])} failed")
        for item in result["failed"]:
            console.print(f"  {item['file']}: {item['cause']}")
        if skipped:
            console.print(f"  {len(skipped)} file(s) are not DICOM Part 10 and were skipped")

    _print(data, as_json, show)
    if data["failed"]:
        raise typer.Exit(1)


@contextmanager
def _progress(total: int, label: str) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, nothing else anywhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as progress:
        task = progress.add_task(label, total=total)
        yield lambda: progress.advance(task)


@jobs_app.command("list")
def jobs_list(
    config: Config = None,
    as_json: Json = False,
    limit: Limit = 50,
    state: Annotated[str | None, typer.Option(help="only this state")] = None,
) -> None:
    """Jobs, newest first."""
    from dicomnode.index.jobs import Jobs

    check_state("jobs", state)
    columns = {
        "id": "job", "state": "state", "model": "model", "step": "step", "revision": "rev", "instances": "images",
        "critical": "critical", "created_time": "made", "reason": "why complete", "last_error": "error",
    }  # fmt: skip
    with _index(_settings(config)) as db:
        _print(Jobs(db).listing(limit, state), as_json, lambda rows: _table(rows, columns, "no jobs"))


@jobs_app.command("show")
def jobs_show(job: Annotated[int, typer.Argument()], config: Config = None, as_json: Json = False) -> None:
    """One job: why it ran, on what, what it found, how long each stage took, where results went."""
    from dicomnode.cli_jobs import job_lines
    from dicomnode.index.jobs import Jobs

    def show(data: dict[str, Any]) -> None:
        for line in job_lines(data):
            console.print(line)

    with _index(_settings(config)) as db:
        found = Jobs(db).show(job)
        if found is None:
            raise OperatorError("show job", f"there is no job {job}", "See 'dicomnode jobs list'")
        _print(found, as_json, show)


@jobs_app.command("retry")
def jobs_retry(job: Annotated[int, typer.Argument()], config: Config = None, as_json: Json = False) -> None:
    """Put a failed or refused job back into the queue."""
    from dicomnode import doorbell
    from dicomnode.index.jobs import Jobs

    settings = _settings(config)
    with _index(settings) as db:
        Jobs(db).retry(job)
        doorbell.ring(settings.node.data_dir, "worker")
    _print({"job": job, "state": "pending"}, as_json, lambda _: console.print(f"job {job} waits again"))


@models_app.command("verify")
def models_verify(
    reference: Annotated[
        str | None, typer.Argument(help="NAME@VERSION, or NAME for its newest version; all when left out")
    ] = None,
    build: Annotated[bool, typer.Option("--build", help="build TensorRT engines that are missing; minutes")] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Check digests, model files and golden cases; exit 78 when one fails.

    They run on what would serve now: with inference.engine = "auto" the first engine of this box that
    passes and need not be built, with an engine's name that one alone (built where it has to be), with
    "kserve" an endpoint.
    """
    from dicomnode.app import verify_model
    from dicomnode.infer.serving import bundle_folders, resolve

    settings = _settings(config)
    folders = bundle_folders(settings.inference.models_dir, settings.node.data_dir)
    chosen = [resolve(folders, reference, {})] if reference else folders
    rows = []
    for folder in chosen:
        engine = verify_model(settings, folder.path, build=build)
        rows.append({"name": folder.name, "version": folder.version, "verified": True, "engine": engine})

    def show(data: list[dict[str, Any]]) -> None:
        for row in data:
            console.print(f"{row['name']} {row['version']}: digests and golden cases OK on {row['engine']}")

    _print(rows, as_json, show)


@app.command()
def demo(
    path: Annotated[Path | None, typer.Argument(help="folder with DICOM of your own")] = None,
    once: Annotated[bool, typer.Option("--once", help="exit after one full round trip")] = False,
    output: Annotated[Path, typer.Option(help="where the results go")] = Path("demo-output"),
    slices: Annotated[int, typer.Option(min=24, help="slices of the phantom")] = 128,
    radiograph: Annotated[bool, typer.Option("--radiograph", help="a CR and a DX of the phantom instead")] = False,
    as_json: Json = False,
) -> None:
    """Send a study through a node and a loopback PACS and show what comes back."""
    from dicomnode.demo.run import run_demo

    if radiograph and path is not None:
        raise typer.BadParameter("--radiograph is the phantom's; leave the folder out")
    raise typer.Exit(run_demo(path, once=once, output=output, slices=0 if radiograph else slices, as_json=as_json))


@app.command()
def version(as_json: Json = False) -> None:
    """The version of the node."""
    _print({"version": __version__}, as_json, lambda d: console.print(d["version"]))
