"""The verb of the reference cloud endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dicomnode.cli_common import Json, output
from dicomnode.clock import iso
from dicomnode.errors import OperatorError


def cloud(
    data_dir: Annotated[Path, typer.Option(help="where it keeps what arrives")] = Path("cloud-data"),
    host: Annotated[str, typer.Option(help="address to listen on; other than loopback needs tokens")] = ("127.0.0.1"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 lets the system choose")] = 8090,
    token_file: Annotated[
        Path | None,
        typer.Option(help="file with the administrator's token, the password of pages; without --nodes all use it"),
    ] = None,
    nodes: Annotated[
        Path | None,
        typer.Option(help="folder with a token per file, SITE/NODE, followed: each node sees its own site only"),
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM file with a certificate chain; then https")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file with its key, where it is not in the same file")] = None,
    models: Annotated[
        Path | None, typer.Option(help="repository of models to serve, made by 'dicomnode models publish'")
    ] = None,
    reserve_mb: Annotated[int, typer.Option(min=1, help="MiB kept free; below it 507 is answered")] = 256,
    as_json: Json = False,
) -> None:
    """Reference cloud endpoint (STOW-RS and config/cloud-api.yaml), for trying and testing; SIGTERM ends it."""
    from dicomnode import logs
    from dicomnode.cloud.run import run_cloud

    logs.configure("cloud", "info", "auto")

    def started(url: str) -> None:
        data = {"page": f"{url}/", "stow_url": f"{url}/studies", "records_url": f"{url}/v1"}
        data["remote_write_url"] = f"{url}/api/v1/write"
        if models is not None:
            data["metadata_url"] = f"{url}/models/metadata"
        output(data, as_json, lambda d: typer.echo("\n".join(f"{k}: {v}" for k, v in d.items())))

    code = run_cloud(
        data_dir,
        host,
        port,
        token_file=token_file,
        nodes_dir=nodes,
        certificate=certificate,
        key=key,
        reserve_mb=reserve_mb,
        models=models,
        started=started,
    )
    raise typer.Exit(code)


def _check_before_signing(path: Path) -> None:
    """Every node would refuse it later; here its author still looks at it. Raises BundleError, EngineError."""
    from tempfile import TemporaryDirectory

    from dicomnode.app import verify_model
    from dicomnode.settings import Settings

    with TemporaryDirectory() as folder:
        verify_model(Settings(node={"data_dir": folder}), path)


def models_publish(
    to: Annotated[Path, typer.Option(help="folder of the repository; made when it is not there")],
    folders: Annotated[list[Path] | None, typer.Argument(help="bundle folders, NAME/VERSION")] = None,
    keys: Annotated[Path, typer.Option(help="folder of the private keys; made with the repository")] = Path("keys"),
    withdraw: Annotated[list[str] | None, typer.Option(help="NAME@VERSION that is not offered any more")] = None,
    rotate: Annotated[list[str] | None, typer.Option(help="root, targets, snapshot or timestamp: a new key")] = None,
    days: Annotated[int | None, typer.Option(min=1, max=365, help="until it has to be signed again")] = None,
    golden_cases: Annotated[bool, typer.Option(help="run those of each bundle on this machine first")] = True,
    as_json: Json = False,
) -> None:
    """Sign a repository of model bundles, for nodes to follow; without a folder its dates are renewed."""
    from dicomnode.cloud.publish import ROLES, Bundle, Publisher
    from dicomnode.infer.bundle import load_bundle

    unknown = sorted(set(rotate or ()) - set(ROLES))
    if unknown:
        raise OperatorError("publish models", f"there is no role '{unknown[0]}'", f"Roles: {', '.join(ROLES)}")
    bundles = [load_bundle(path.resolve()) for path in folders or ()]
    for bundle in bundles if golden_cases else ():
        _check_before_signing(bundle.path)
    done = Publisher(to, keys, days=days).publish(
        [Bundle(b.identity.name, b.identity.version, b.path) for b in bundles],
        withdraw=withdraw or (),
        rotate=rotate or (),
    )
    data = {
        "added": list(done.added),
        "withdrawn": list(done.withdrawn),
        "versions": done.versions,
        "expires_time": iso(done.expires),
        "root_file": str(to / "root.json"),
    }

    def show(found: dict[str, Any]) -> None:
        for word in ("added", "withdrawn"):
            for target in found[word]:
                typer.echo(f"{word}: {target}")
        typer.echo(f"valid until {found['expires_time']}; nodes trust {found['root_file']}")

    output(data, as_json, show)
