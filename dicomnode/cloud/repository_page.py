"""The models that are offered, as the signed metadata names them; read for people, not trusted by anybody."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

_TARGETS = re.compile(r"(\d{1,9})\.targets\.json", re.ASCII)
MAX_BYTES = 4 << 20


def offered(folder: Path) -> tuple[list[tuple[str, str, int, str]], str]:
    """(model, version, bytes, SHA-256) by name, and until when the repository is valid; empty where unknown."""
    metadata = folder / "metadata"
    numbered = [(int(m[1]), p) for p in metadata.glob("*.targets.json") if (m := _TARGETS.fullmatch(p.name))]
    signed = _signed(max(numbered)[1]) if numbered else {}
    rows = []
    for name, entry in signed.get("targets", {}).items():
        model, _, file = name.partition("/")
        rows.append(
            (model, re.sub(r"\.(tar\.gz|zip)$", "", file), int(entry["length"]), str(entry["hashes"]["sha256"]))
        )
    return sorted(rows), str(_signed(metadata / "timestamp.json").get("expires", ""))


def _signed(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            found: Any = json.loads(file.read(MAX_BYTES))["signed"]
    except (OSError, ValueError, KeyError):
        return {}
    return found if isinstance(found, dict) else {}
