"""The verb of the reference cloud endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from dicomnode.cli_common import Json, output


def cloud(
    data_dir: Annotated[Path, typer.Option(help="where it keeps what arrives")] = Path("cloud-data"),
    host: Annotated[str, typer.Option(help="address to listen on; other than loopback needs --token-file")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 lets the system choose")] = 8090,
    token_file: Annotated[Path | None, typer.Option(help="file with the bearer token that nodes must send")] = None,
    certificate: Annotated[Path | None, typer.Option(help="PEM file with a certificate chain; then https")] = None,
    key: Annotated[Path | None, typer.Option(help="PEM file with its key, where it is not in the same file")] = None,
    reserve_mb: Annotated[int, typer.Option(min=1, help="MiB kept free; below it 507 is answered")] = 256,
    as_json: Json = False,
) -> None:
    """Reference cloud endpoint (STOW-RS and config/cloud-api.yaml), for trying and testing; SIGTERM ends it."""
    from dicomnode import logs
    from dicomnode.cloud.run import run_cloud

    logs.configure("cloud", "info", "auto")

    def started(url: str) -> None:
        data = {"page": f"{url}/", "stow_url": f"{url}/studies", "records_url": f"{url}/v1"}
        output(data, as_json, lambda d: typer.echo("\n".join(f"{k}: {v}" for k, v in d.items())))

    code = run_cloud(
        data_dir,
        host,
        port,
        token_file=token_file,
        certificate=certificate,
        key=key,
        reserve_mb=reserve_mb,
        started=started,
    )
    raise typer.Exit(code)
