"""The verb that writes the DICOM Conformance Statement."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from dicomnode.cli_common import Config, Json, console, settings_of
from dicomnode.errors import OperatorError


def conformance(
    config: Config = None,
    output: Annotated[Path | None, typer.Option("--output", help="file to write; left out: the terminal")] = None,
    as_json: Json = False,
) -> None:
    """Write the DICOM Conformance Statement of this node, as it is configured, in Markdown."""
    from datetime import datetime

    from dicomnode.conformance import statement
    from dicomnode.conformance_page import as_data, markdown

    document = statement(settings_of(config), datetime.now().astimezone().date())
    text = markdown(document)
    if as_json:
        text = json.dumps(as_data(document), indent=2, ensure_ascii=False) + "\n"
    if output is None:
        sys.stdout.write(text)
        return
    try:
        output.write_text(text, encoding="utf-8")
    except OSError as error:
        cause = f"{output}: {error.strerror}"
        raise OperatorError("write conformance statement", cause, "Check --output and its permissions") from None
    console.print(f"{output} written")
