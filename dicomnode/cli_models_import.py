"""``dicomnode models import``: a MONAI bundle becomes a bundle of this node."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dicomnode.cli_common import Config, Json, console, index, output, settings_of
from dicomnode.settings import Settings


def models_import(
    path: Annotated[Path, typer.Argument(help="folder of a MONAI bundle (configs/, models/model.onnx)")],
    options: Annotated[Path, typer.Option("--options", help="TOML or JSON with names, codes and licence")],
    onnx: Annotated[Path | None, typer.Option("--onnx", help="the ONNX file, if it lies elsewhere")] = None,
    into: Annotated[Path | None, typer.Option("--into", help="models folder; default data_dir/models")] = None,
    config: Config = None,
    as_json: Json = False,
) -> None:
    """Turn a MONAI bundle with an ONNX model into a verified bundle; what cannot be mapped is refused by name.

    Where the node looks for models it is staged: it serves once it is activated.
    """
    from dicomnode.infer.importing.build import import_monai
    from dicomnode.infer.importing.options import read_options

    chosen = read_options(options)
    if into is not None and (config is None or not _served_from(settings_of(config), into)):
        made = import_monai(path, chosen, into, onnx=onnx)
    else:
        settings = settings_of(config)
        target = into or settings.node.data_dir / "models"
        with index(settings) as db:
            made = import_monai(path, chosen, target, onnx=onnx, before_placing=partial(_stage, db))

    def show(data: dict[str, Any]) -> None:
        console.print(f"{data['name']} {data['version']}: {data['path']}")
        console.print(f"  steps: {', '.join(data['steps'])}")
        console.print(f"  golden cases on onnxruntime-cpu: {', '.join(data['golden'])}")
        for note in data["notes"]:
            console.print(f"  note: {note}")
        console.print(f"  next: dicomnode models activate {data['name']}@{data['version']}")

    output(made.as_dict(), as_json, show)


def _served_from(settings: Settings, folder: Path) -> bool:
    """Whether the node looks for models in ``folder``."""
    places = (settings.node.data_dir / "models", settings.inference.models_dir)
    return folder.resolve() in [place.resolve() for place in places]


def _stage(db: Any, name: str, version: str) -> None:
    """Hold it back; what an operator has said of this version before stays."""
    from dicomnode.index.life import Life

    life = Life(db)
    if life.state(name, version) is None:
        life.stage(name, version, who="import", why="imported")
