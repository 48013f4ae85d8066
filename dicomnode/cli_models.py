"""Command line: the life of a model, ``staged -> shadow -> canary -> active -> retired``."""

from __future__ import annotations

import getpass
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dicomnode.cli_common import Config, Json, Limit, console, index, output, settings_of, table
from dicomnode.errors import OperatorError
from dicomnode.settings import Settings

if TYPE_CHECKING:
    from dicomnode.model_desk import Action, ModelDesk

Reference = Annotated[str, typer.Argument(help="NAME@VERSION")]
Name = Annotated[str, typer.Argument(help="NAME")]
Why = Annotated[str, typer.Option("--why", help="reason, for the history")]

_LISTED = {
    "name": "model", "version": "version", "state": "state", "serves": "serves", "share": "canary of",
    "waits_for": "waits for", "path": "folder",
}  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the verbs to ``dicomnode models``."""
    for name, verb in (
        ("list", models_list),
        ("stage", models_stage),
        ("shadow", models_shadow),
        ("canary", models_canary),
        ("activate", models_activate),
        ("approve", models_approve),
        ("rollback", models_rollback),
        ("retire", models_retire),
        ("history", models_history),
        ("compare", models_compare),
    ):
        app.command(name)(verb)


@contextmanager
def _desk(settings: Settings) -> Iterator[ModelDesk]:
    from dicomnode.app import verify_model
    from dicomnode.model_desk import ModelDesk

    with index(settings) as db:
        yield ModelDesk(settings, db, lambda path: verify_model(settings, path))


def _who() -> str:
    """The account that types; it is in the history and nowhere else."""
    try:
        return f"cli:{getpass.getuser()}"
    except (KeyError, OSError):
        return "cli"


def _change(settings: Settings, action: Action, reference: str, as_json: bool, **options: Any) -> None:
    name, _, version = reference.partition("@")
    if not version:
        raise OperatorError(f"{action} model", "no version given", "Use NAME@VERSION, see 'dicomnode models list'")
    with _desk(settings) as desk:
        done = desk.change(action, name, version, who=_who(), **options)
    words = {"activate": "serves now"}.get(action, f"is {done['state']}")
    output(done, as_json, lambda _: console.print(f"{name} {version} {words}"))


def models_list(config: Config = None, as_json: Json = False) -> None:
    """Bundles on this box, their states, and which version serves."""
    from dicomnode.infer.serving import bundle_folders

    settings = settings_of(config)
    if settings.node.data_dir.is_dir():
        with _desk(settings) as desk:
            rows = desk.listing()
    else:
        folders = bundle_folders(settings.inference.models_dir, settings.node.data_dir)
        rows = [
            {"name": f.name, "version": f.version, "state": "unlisted", "serves": "", "path": str(f.path)}
            for f in folders
        ]

    def show(data: list[dict[str, Any]]) -> None:
        for row in data:
            parts = [f"{row['percent']:g} %"] if row.get("percent") else []
            row["share"] = ", ".join([*parts, *row.get("peers", [])])
        table(data, _LISTED, f"no bundles in {settings.inference.models_dir}")

    output(rows, as_json, show)


def models_stage(reference: Reference, config: Config = None, as_json: Json = False, why: Why = "") -> None:
    """Verify a version and note it down; it serves nobody. Also ends a shadow or canary."""
    _change(settings_of(config), "stage", reference, as_json, why=why)


def models_shadow(reference: Reference, config: Config = None, as_json: Json = False, why: Why = "") -> None:
    """Have a version analyse what the active one has done, for comparison only."""
    _change(settings_of(config), "shadow", reference, as_json, why=why)


def models_canary(
    reference: Reference,
    config: Config = None,
    as_json: Json = False,
    percent: Annotated[float, typer.Option(min=0, max=100, help="share of the studies, percent")] = 0.0,
    peer: Annotated[list[str] | None, typer.Option(help="all that this peer sends; may be repeated")] = None,
    why: Why = "",
) -> None:
    """Have a version serve a share of the studies, or what chosen peers send."""
    _change(settings_of(config), "canary", reference, as_json, percent=percent, peers=peer or (), why=why)


def models_activate(reference: Reference, config: Config = None, as_json: Json = False, why: Why = "") -> None:
    """Verify a version and make it the one that serves, without a restart."""
    _change(settings_of(config), "activate", reference, as_json, why=why)


def models_approve(reference: Reference, config: Config = None, as_json: Json = False, why: Why = "") -> None:
    """Let a pulled version go on by its policy, up to serving; also one whose state was set by hand."""
    name, _, version = reference.partition("@")
    if not version:
        raise OperatorError("approve model", "no version given", "Use NAME@VERSION, see 'dicomnode models list'")
    with _desk(settings_of(config)) as desk:
        done = desk.approve(name, version, who=_who(), why=why)
    output(done, as_json, lambda _: console.print(f"{name} {version} is approved; it goes on by its policy"))


def models_rollback(name: Name, config: Config = None, as_json: Json = False, why: Why = "") -> None:
    """End the canary, or return to the version that served before."""
    with _desk(settings_of(config)) as desk:
        done = desk.roll_back(name, who=_who(), why=why)
    output(done, as_json, lambda d: console.print(f"{name} {d['version']} serves now, {d['rolled_back']} does not"))


def models_retire(
    reference: Reference,
    config: Config = None,
    as_json: Json = False,
    delete: Annotated[bool, typer.Option("--delete", help="also remove the folder of a pulled bundle")] = False,
    why: Why = "",
) -> None:
    """Take a version that does not serve out of use for good."""
    settings = settings_of(config)
    name, _, version = reference.partition("@")
    with _desk(settings) as desk:
        retired = any(r["state"] == "retired" for r in desk.listing() if (r["name"], r["version"]) == (name, version))
    if not (delete and retired):
        _change(settings, "retire", reference, as_json, why=why)
    if delete:
        with _desk(settings) as desk:
            desk.delete(name, version)
        console.print(f"the folder of {name} {version} is removed")


def models_history(
    name: Annotated[str | None, typer.Argument(help="NAME; all when left out")] = None,
    config: Config = None,
    as_json: Json = False,
    limit: Limit = 50,
) -> None:
    """Who changed the state of a version, when and why, newest first."""
    columns = {
        "time": "time", "name": "model", "version": "version", "event": "event", "to_state": "state", "who": "who",
        "why": "why",
    }  # fmt: skip
    with _desk(settings_of(config)) as desk:
        output(desk.history(name, limit), as_json, lambda rows: table(rows, columns, "no model was changed yet"))


def models_compare(
    reference: Annotated[str, typer.Argument(help="NAME or NAME@VERSION")],
    config: Config = None,
    as_json: Json = False,
    limit: Limit = 50,
) -> None:
    """What a version on trial and the active one made of the same series."""
    from dicomnode.infer.routing import limits_of
    from dicomnode.rollout import Compared, agreement

    settings = settings_of(config)
    name, _, version = reference.partition("@")

    def show(rows: list[dict[str, Any]]) -> None:
        columns = {
            "job_id": "job", "version": "version", "other_version": "against", "role": "as", "least_dice": "least Dice",
            "greatest_difference": "greatest diff.", "same_findings": "same findings", "seconds": "s",
            "other_seconds": "s (other)", "error": "error",
        }  # fmt: skip
        done = [
            Compared(r["least_dice"], r["greatest_difference"], bool(r["same_findings"]))
            for r in rows
            if r["state"] == "done"
        ]
        for row in rows:
            for key in ("least_dice", "greatest_difference", "seconds", "other_seconds"):
                row[key] = None if row[key] is None else f"{row[key]:.4g}"
        table(rows, columns, "nothing was compared yet")
        share = agreement(done, limits_of(settings.rollout))
        if share is not None:
            console.print(f"{share:.0%} of {len(done)} comparisons agree")

    with _desk(settings) as desk:
        output(desk.comparisons(name, version or None, limit), as_json, show)
