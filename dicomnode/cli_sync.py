"""Verbs about what goes to the cloud: the outbox, and what pseudonyms stand for."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dicomnode.cli_common import Config, Json, Limit, check_state, console, index, output, settings_of, table
from dicomnode.cloud_settings import LANES

UNKNOWN = "it is not known here; --study UID (its UID at home) searches the images of a study, too"

sync_app = typer.Typer(no_args_is_help=True, help="What goes to the cloud: list, retry, pseudonyms.")


@sync_app.command("list")
def sync_list(
    config: Config = None,
    as_json: Json = False,
    limit: Limit = 50,
    state: Annotated[str | None, typer.Option(help="only this state")] = None,
) -> None:
    """Results and records on their way to the cloud, newest first: class, state, attempts, last error."""
    from dicomnode.index.cloud_outbox import CloudOutbox

    check_state("sync", state)
    with index(settings_of(config)) as db:
        rows = CloudOutbox(db).listing(limit, state)
    columns = {"id": "item", "job_id": "job", "kind": "what", "class": "class", "state": "state"}
    columns |= {"attempts": "tries", "created_time": "made", "finished_time": "stored", "last_error": "last error"}
    shown = [{**row, "class": LANES[row["priority"]]} for row in rows]
    output(rows, as_json, lambda _: table(shown, columns, "nothing for the cloud"))


@sync_app.command("retry")
def sync_retry(
    item: Annotated[int | None, typer.Argument()] = None,
    all_rejected: Annotated[
        bool, typer.Option("--all-rejected", help="all that is parked, once the cause is mended")
    ] = False,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Send a parked item again, or a waiting one at once."""
    from dicomnode import doorbell
    from dicomnode.index.cloud_outbox import CloudOutbox

    if (item is None) is not all_rejected:
        raise typer.BadParameter("name one item, or --all-rejected")
    settings = settings_of(config)
    with index(settings) as db:
        count = 1
        if item is None:
            count = CloudOutbox(db).requeue_rejected()
        else:
            CloudOutbox(db).requeue(item)
        doorbell.ring(settings.node.data_dir, "sidecar", at_once=True)
    text = f"items sent again: {count}" if item is None else f"item {item} is sent again"
    output({"item": item, "count": count}, as_json, lambda _: console.print(text))


@sync_app.command("pseudonym")
def sync_pseudonym(
    value: Annotated[str, typer.Argument(help="pseudonym or UID as the cloud has it, or the value here")],
    study: Annotated[str, typer.Option(help="study at home whose images are searched, too")] = "",
    config: Config = None,
    as_json: Json = False,
) -> None:
    """What a pseudonym stands for, or what a value here became: shows patient data, so mind who looks."""
    from dicomnode.index.mapping import PseudonymRows
    from dicomnode.pseudonym_key import read_key
    from dicomnode.pseudonyms import Pseudonyms

    settings = settings_of(config)
    with index(settings) as db:
        found: list[dict[str, Any]] = PseudonymRows(db).find(value)
        if study and not found:
            codec = Pseudonyms(read_key(settings))
            for uid in PseudonymRows(db).source_uids(study):
                if value in (uid, codec.uid(uid)):
                    found.append({"kind": "instance", "pseudonym": codec.uid(uid), "original": uid})
    columns = {"kind": "what", "pseudonym": "pseudonym", "original": "at home", "issuer": "issuer"}
    output(found, as_json, lambda rows: table(rows, columns, UNKNOWN))
