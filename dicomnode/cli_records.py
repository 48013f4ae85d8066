"""Verbs about records that both ends may change, and their conflicts."""

from __future__ import annotations

import getpass
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dicomnode.cli_common import Config, Json, Limit, check_state, console, index, output, settings_of, table
from dicomnode.errors import OperatorError
from dicomnode.settings import Settings

if TYPE_CHECKING:
    from dicomnode.index.database import Database
    from dicomnode.index.record_reviews import Reviews, Take

records_app = typer.Typer(no_args_is_help=True, help="Records that both ends may change: list, show, set.")
conflicts_app = typer.Typer(no_args_is_help=True, help="Conflicts of records: list, show, decide.")
Kind = Annotated[str, typer.Argument(help="patient, study, result-review, preferences, limits, ...")]
Name = Annotated[str, typer.Argument(help="id; of a patient the Patient ID or its pseudonym")]
Conflict = Annotated[int, typer.Argument(help="number of the conflict")]
Issuer = Annotated[str, typer.Option(help="Issuer of Patient ID")]


def _reviews(db: Database, settings: Settings) -> Reviews:
    from dicomnode.index.record_reviews import Reviews

    return Reviews(db, settings.cloud_plan)


def _who() -> str:
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return "cli"


def _ring(settings: Settings) -> None:
    from dicomnode import doorbell

    doorbell.ring(settings.node.data_dir, "sidecar")


@records_app.command("list")
def records_list(
    config: Config = None,
    as_json: Json = False,
    limit: Limit = 50,
    kind: Annotated[str | None, typer.Option("--type", help="only this type")] = None,
) -> None:
    """Records by type and id, newest first, without their values."""
    settings = settings_of(config)
    with index(settings) as db:
        rows = _reviews(db, settings).records(limit, kind)
    columns = {"type": "type", "record_id": "id", "version": "version"}
    columns |= {"common_version": "common version", "changed_time": "changed"}
    output(rows, as_json, lambda data: table(data, columns, "no records"))


@records_app.command("refused")
def records_refused(config: Config = None, as_json: Json = False, limit: Limit = 50) -> None:
    """Records of the cloud that were not taken, and why; one that is changed at the cloud comes again."""
    settings = settings_of(config)
    with index(settings) as db:
        rows = _reviews(db, settings).refused(limit)
    columns = {"time": "time", "seq": "seq at the cloud", "type": "type", "cloud_id": "id", "why": "why"}
    output(rows, as_json, lambda data: table(data, columns, "none was refused"))


@records_app.command("show")
def records_show(kind: Kind, name: Name, config: Config = None, as_json: Json = False, issuer: Issuer = "") -> None:
    """A record with its values: may show patient data, so mind who looks."""
    settings = settings_of(config)
    with index(settings) as db:
        name = _patient(db, settings, name, issuer, note=False) if kind == "patient" else name
        row = _reviews(db, settings).record(kind, name)
    output(row, as_json, lambda r: _print(r["data"]))


@records_app.command("set")
def records_set(
    kind: Kind,
    name: Name,
    fields: Annotated[
        list[str] | None, typer.Argument(help="FIELD=VALUE ...; an empty value takes the correction back")
    ] = None,
    blank: Annotated[list[str] | None, typer.Option(help="field that has no value, whatever was received")] = None,
    config: Config = None,
    as_json: Json = False,
    issuer: Issuer = "",
) -> None:
    """Change fields of a record; it goes to the cloud, and comes from there when it is changed at that end."""
    from dicomnode.record_shapes import read_field

    changes: dict[str, Any] = {}
    if not fields and not blank:
        raise typer.BadParameter("name a FIELD=VALUE, or --blank FIELD")
    for field in fields or ():
        key, separator, text = field.partition("=")
        if not separator:
            raise OperatorError("change record", "an argument is not FIELD=VALUE", "See 'dicomnode records set --help'")
        changes[key] = read_field(kind, key, text)
    settings = settings_of(config)
    with index(settings) as db:
        begin: dict[str, Any] = {}
        if kind == "patient":
            from dicomnode.index.record_reviews import demographics

            begin = demographics(db, name, issuer)
            name = _patient(db, settings, name, issuer)
        identified = settings.sync.patients_identity == "kept"
        version = _reviews(db, settings).change(
            kind, name, changes, begin=begin, identified=identified, blank=blank or ()
        )
    _ring(settings)
    done = {"type": kind, "record_id": name, "version": version or None}
    output(done, as_json, lambda _: console.print(f"version {version}" if version else "nothing has changed"))


@conflicts_app.command("list")
def conflicts_list(
    config: Config = None,
    as_json: Json = False,
    limit: Limit = 50,
    state: Annotated[str | None, typer.Option(help="open or decided")] = None,
) -> None:
    """Conflicts, newest first: which fields differ, and what became of it. Values: 'conflicts show'."""
    check_state("conflicts", state)
    settings = settings_of(config)
    with index(settings) as db:
        rows = _reviews(db, settings).listing(limit, state)
    columns = {"id": "conflict", "type": "type", "record_id": "record", "names": "fields", "state": "state"}
    columns |= {"decided_as": "taken", "decided_by": "by", "why": "why", "created_time": "since"}
    shown = [{**row, "names": ", ".join(row["fields"])} for row in rows]
    output(rows, as_json, lambda _: table(shown, columns, "no conflicts"))


@conflicts_app.command("show")
def conflicts_show(conflict: Conflict, config: Config = None, as_json: Json = False) -> None:
    """Both sides of a conflict: may show patient data, so mind who looks."""
    settings = settings_of(config)
    with index(settings) as db:
        row = _reviews(db, settings).show(conflict)

    def show(found: dict[str, Any]) -> None:
        console.print(f"conflict {conflict}, {found['type']} {found['record_id']}: {found['why']}")
        sides = {"edge": "edge_data", "cloud": "cloud_data", "common": "common_data", "serves": "serves"}
        rows = [
            {
                "field": f,
                **{side: json.dumps((found[key] or {}).get(f), ensure_ascii=False) for side, key in sides.items()},
            }
            for f in found["fields"]
        ]
        columns = {"field": "field", "edge": "here", "cloud": "cloud", "common": "both had", "serves": "serves now"}
        table(rows, columns, "no field differs")

    output(row, as_json, show)


@conflicts_app.command("decide")
def conflicts_decide(
    conflict: Conflict,
    take: Annotated[str, typer.Argument(help="cloud, edge, or merged with --data")],
    config: Config = None,
    as_json: Json = False,
    data: Annotated[str | None, typer.Option(help="the whole value as JSON; '-' reads it from standard input")] = None,
) -> None:
    """Close a review: one side, or a value of your own, serves at both ends from now on."""
    from dicomnode.index.record_reviews import TAKES

    chosen: Take | None = next((t for t in TAKES if t == take), None)
    if chosen is None:
        raise OperatorError("decide conflict", "this cannot be taken", f"One of: {', '.join(TAKES)}")
    value = None
    if data is not None:
        try:
            value = json.loads(typer.get_text_stream("stdin").read() if data == "-" else data)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise OperatorError("decide conflict", "--data is not a JSON object", "Quote it for the shell, or use '-'")
    settings = settings_of(config)
    with index(settings) as db:
        done = _reviews(db, settings).decide(conflict, chosen, value, who=_who())
    _ring(settings)
    output(done, as_json, lambda d: console.print(f"conflict {conflict} is decided: {d['take']}"))


def _print(data: dict[str, Any]) -> None:
    rows = [{"field": k, "value": json.dumps(v, ensure_ascii=False)} for k, v in data.items()]
    table(rows, {"field": "field", "value": "value"}, "empty")


def _patient(db: Database, settings: Settings, name: str, issuer: str, *, note: bool = True) -> str:
    """The pseudonym by which a patient's record is known; ``note``: so that what comes from the cloud finds it."""
    from dicomnode.index.mapping import PseudonymRows
    from dicomnode.pseudonym_key import ensure_key
    from dicomnode.pseudonyms import Pseudonyms

    rows = PseudonymRows(db)
    if any(r["kind"] == "patient" and r["pseudonym"] == name for r in rows.find(name)):
        return name
    codec = Pseudonyms(ensure_key(settings, used=rows.used))
    found = codec.patient(name, issuer)
    if note:
        rows.keep({("patient", found): f"{name}^{issuer}" if issuer else name}, codec)
    return found
