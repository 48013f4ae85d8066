"""Verbs about what goes to DICOM peers: deliveries, storage commitment and notifications."""

from __future__ import annotations

from typing import Annotated

import typer

from dicomnode.cli_common import Config, Json, Limit, console, index, output, settings_of, table

deliveries_app = typer.Typer(no_args_is_help=True, help="Results on their way to DICOM peers: list, retry.")
commitments_app = typer.Typer(
    no_args_is_help=True, help="Storage commitment, asked of this node and of its peers: list, retry."
)
notifications_app = typer.Typer(no_args_is_help=True, help="Instance Availability Notifications: list, retry.")


@deliveries_app.command("list")
def deliveries_list(
    config: Config = None,
    as_json: Json = False,
    limit: Limit = 50,
    state: Annotated[str | None, typer.Option(help="only this state")] = None,
) -> None:
    """Deliveries, newest first: state, attempts and the last answer of the peer."""
    from dicomnode.index.outbox import Outbox

    columns = {
        "id": "delivery", "job_id": "job", "kind": "object", "destination": "to", "state": "state",
        "attempts": "tries", "created_time": "made", "finished_time": "stored", "last_error": "last error",
    }  # fmt: skip
    with index(settings_of(config)) as db:
        output(
            Outbox(db, "deliveries").listing(limit, state), as_json, lambda rows: table(rows, columns, "no deliveries")
        )


@deliveries_app.command("retry")
def deliveries_retry(delivery: Annotated[int, typer.Argument()], config: Config = None, as_json: Json = False) -> None:
    """Send a rejected delivery again, or a waiting one at once."""
    from dicomnode import doorbell
    from dicomnode.index.outbox import Outbox

    settings = settings_of(config)
    with index(settings) as db:
        Outbox(db, "deliveries").requeue(delivery)
        doorbell.ring(settings.node.data_dir, "courier")
    output({"delivery": delivery}, as_json, lambda _: console.print(f"delivery {delivery} is sent again"))


@commitments_app.command("list")
def commitments_list(
    config: Config = None,
    as_json: Json = False,
    limit: Limit = 50,
    state: Annotated[str | None, typer.Option(help="only this state")] = None,
) -> None:
    """Storage commitment, newest first: by or of whom, of how many objects, state and last error."""
    from dicomnode.index.commitment import Commitments

    columns = {
        "id": "commitment", "asked": "asked", "instances": "objects", "failed": "not committed", "state": "state",
        "attempts": "tries", "created_time": "made", "finished_time": "ended", "last_error": "last error",
    }  # fmt: skip
    with index(settings_of(config)) as db:
        rows = Commitments(db).listing(limit, state)
    shown = [{**row, "asked": f"{'by' if row['role'] == 'scp' else 'of'} {row['peer']}"} for row in rows]
    output(rows, as_json, lambda _: table(shown, columns, "no storage commitment"))


@commitments_app.command("retry")
def commitments_retry(
    commitment: Annotated[int, typer.Argument()], config: Config = None, as_json: Json = False
) -> None:
    """Send a report again, or ask a peer again that owes one."""
    from dicomnode import doorbell
    from dicomnode.index.commitment import Commitments

    settings = settings_of(config)
    with index(settings) as db:
        state = Commitments(db).requeue(commitment)
        doorbell.ring(settings.node.data_dir, "courier")
    data = {"commitment": commitment, "state": state}
    output(data, as_json, lambda _: console.print(f"commitment {commitment}: {state}"))


@notifications_app.command("list")
def notifications_list(
    config: Config = None,
    as_json: Json = False,
    limit: Limit = 50,
    state: Annotated[str | None, typer.Option(help="only this state")] = None,
) -> None:
    """Notifications, newest first: to whom, where the results are, state and last error."""
    from dicomnode.index.notices import Notices

    columns = {
        "id": "notification", "job_id": "job", "destination": "to", "from": "results at", "state": "state",
        "attempts": "tries", "created_time": "made", "finished_time": "taken", "last_error": "last error",
    }  # fmt: skip
    with index(settings_of(config)) as db:
        rows = Notices(db).listing(limit, state)
    shown = [{**row, "from": row["retrieve_from"] or "this node"} for row in rows]
    output(rows, as_json, lambda _: table(shown, columns, "no notifications"))


@notifications_app.command("retry")
def notifications_retry(
    notification: Annotated[int, typer.Argument()], config: Config = None, as_json: Json = False
) -> None:
    """Send a rejected notification again, or a waiting one at once."""
    from dicomnode import doorbell
    from dicomnode.index.notices import Notices

    settings = settings_of(config)
    with index(settings) as db:
        state = Notices(db).requeue(notification)
        doorbell.ring(settings.node.data_dir, "courier")
    data = {"notification": notification, "state": state}
    output(data, as_json, lambda _: console.print(f"notification {notification}: {state}"))
