"""``dicomnode models import``: a MONAI bundle becomes a bundle of this node."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dicomnode.cli_common import Config, Json, console, output, settings_of


def models_import(
    path: Annotated[Path, typer.Argument(help="folder of a MONAI bundle (configs/, models/model.onnx)")],
    options: Annotated[Path, typer.Option("--options", help="TOML or JSON with names, codes and licence")],
    onnx: Annotated[Path | None, typer.Option("--onnx", help="the ONNX file, if it lies elsewhere")] = None,
    into: Annotated[Path | None, typer.Option("--into", help="models folder; default data_dir/models")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Turn a MONAI bundle with an ONNX model into a verified bundle; what cannot be mapped is refused by name."""
    from dicomnode.infer.importing.build import import_monai
    from dicomnode.infer.importing.options import read_options

    target = into if into is not None else settings_of(config).node.data_dir / "models"
    made = import_monai(path, read_options(options), target, onnx=onnx)

    def show(data: dict[str, Any]) -> None:
        console.print(f"{data['name']} {data['version']}: {data['path']}")
        console.print(f"  steps: {', '.join(data['steps'])}")
        console.print(f"  golden cases on onnxruntime-cpu: {', '.join(data['golden'])}")
        for note in data["notes"]:
            console.print(f"  note: {note}")
        console.print(f"  next: dicomnode models activate {data['name']}@{data['version']}")

    output(made.as_dict(), as_json, show)
