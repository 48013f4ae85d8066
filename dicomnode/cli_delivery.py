"""Verbs about what goes to DICOM peers: deliveries, storage commitment and notifications."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from dicomnode.cli_common import Config, Json, Limit, check_state, console, index, output, settings_of, table

deliveries_app = typer.Typer(no_args_is_help=True, help="Results on their way to DICOM peers: list, retry.")
commitments_app = typer.Typer(
    no_args_is_help=True, help="Storage commitment, asked of this node and of its peers: list, retry."
)
alerts_app = typer.Typer(no_args_is_help=True, help="Webhook messages of critical results: list, retry.")
notifications_app = typer.Typer(no_args_is_help=True, help="Instance Availability Notifications: list, retry.")

State = Annotated[str | None, typer.Option(help="only this state")]
Box = Callable[[Any], Any]
"""What has ``listing`` and ``requeue``, over an index that is open."""

_AFTER = {"state": "state", "attempts": "tries", "created_time": "made"}


def _list(
    box: Box,
    columns: Mapping[str, str],
    empty: str,
    selection: tuple[Path | None, bool, int, str | None],
    more: Callable[[dict[str, Any]], dict[str, Any]] = lambda row: row,
) -> None:
    """Print rows, newest first. ``more`` makes what people see of a row that is none of its columns."""
    config, as_json, limit, state = selection
    check_state(empty.removeprefix("no "), state)
    with index(settings_of(config)) as db:
        rows = box(db).listing(limit, state)
    output(rows, as_json, lambda _: table([more(row) for row in rows], {**columns, "last_error": "last error"}, empty))


def _retry(box: Box, word: str, number: int, config: Path | None, as_json: bool, bell: str = "courier") -> None:
    """Send item ``number`` again; the courier, or who sends it, is told at once."""
    from dicomnode import doorbell

    settings = settings_of(config)
    with index(settings) as db:
        state = box(db).requeue(number)
        doorbell.ring(settings.node.data_dir, bell)
    data = {word: number} if state is None else {word: number, "state": state}
    output(
        data, as_json, lambda _: console.print(f"{word} {number}{' is sent again' if state is None else f': {state}'}")
    )


def _deliveries(db: Any) -> Any:
    from dicomnode.index.outbox import Outbox

    return Outbox(db, "deliveries")


def _commitments(db: Any) -> Any:
    from dicomnode.index.commitment import Commitments

    return Commitments(db)


def _notifications(db: Any) -> Any:
    from dicomnode.index.notices import Notices

    return Notices(db)


def _alerts(db: Any) -> Any:
    from dicomnode.index.urgency import Alerts

    return Alerts(db)


@deliveries_app.command("list")
def deliveries_list(config: Config = None, as_json: Json = False, limit: Limit = 50, state: State = None) -> None:
    """Deliveries, newest first: state, attempts and the last answer of the peer."""
    columns = {"id": "delivery", "job_id": "job", "kind": "object", "destination": "to"}
    columns |= {"instead_of": "instead of", **_AFTER, "finished_time": "stored"}
    _list(_deliveries, columns, "no deliveries", (config, as_json, limit, state))


@deliveries_app.command("retry")
def deliveries_retry(delivery: Annotated[int, typer.Argument()], config: Config = None, as_json: Json = False) -> None:
    """Send a rejected delivery again, or a waiting one at once."""
    _retry(_deliveries, "delivery", delivery, config, as_json)


@commitments_app.command("list")
def commitments_list(config: Config = None, as_json: Json = False, limit: Limit = 50, state: State = None) -> None:
    """Storage commitment, newest first: by or of whom, of how many objects, state and last error."""
    columns = {"id": "commitment", "asked": "asked", "instances": "objects", "failed": "not committed"}
    columns |= {**_AFTER, "finished_time": "ended"}

    def asked(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "asked": f"{'by' if row['role'] == 'scp' else 'of'} {row['peer']}"}

    _list(_commitments, columns, "no storage commitment", (config, as_json, limit, state), asked)


@commitments_app.command("retry")
def commitments_retry(
    commitment: Annotated[int, typer.Argument()], config: Config = None, as_json: Json = False
) -> None:
    """Send a report again, or ask a peer again that owes one."""
    _retry(_commitments, "commitment", commitment, config, as_json)


@notifications_app.command("list")
def notifications_list(config: Config = None, as_json: Json = False, limit: Limit = 50, state: State = None) -> None:
    """Notifications, newest first: to whom, where the results are, state and last error."""
    columns = {"id": "notification", "job_id": "job", "destination": "to", "from": "results at"}
    columns |= {**_AFTER, "finished_time": "taken"}

    def whence(row: dict[str, Any]) -> dict[str, Any]:
        return {**row, "from": row["retrieve_from"] or "this node"}

    _list(_notifications, columns, "no notifications", (config, as_json, limit, state), whence)


@notifications_app.command("retry")
def notifications_retry(
    notification: Annotated[int, typer.Argument()], config: Config = None, as_json: Json = False
) -> None:
    """Send a rejected notification again, or a waiting one at once."""
    _retry(_notifications, "notification", notification, config, as_json)


@alerts_app.command("list")
def alerts_list(config: Config = None, as_json: Json = False, limit: Limit = 50, state: State = None) -> None:
    """Alerts, newest first: of which job, why, state and last error."""
    columns = {"id": "alert", "job_id": "job", "why": "critical", **_AFTER, "finished_time": "taken"}
    _list(
        _alerts,
        columns,
        "no alerts",
        (config, as_json, limit, state),
        lambda row: {**row, "why": ", ".join(row["keys"])},
    )


@alerts_app.command("retry")
def alerts_retry(alert: Annotated[int, typer.Argument()], config: Config = None, as_json: Json = False) -> None:
    """Send a rejected alert again, or a waiting one at once."""
    _retry(_alerts, "alert", alert, config, as_json, bell="sidecar")
