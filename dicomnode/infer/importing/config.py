"""A MONAI bundle's configuration as plain data: references followed, expressions left alone.

MONAI's language (monai.bundle.ConfigParser): ``@id`` refers to another entry, ``::`` and
``#`` go down into it, ``$`` starts a Python expression, ``%`` a macro. Only references are
resolved here; an expression stays an ``Expression`` and is refused where its value is needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dicomnode.errors import BundleError

MAX_CONFIG_BYTES = 4 << 20
_REFERENCE = re.compile(r"\$?\s*@([A-Za-z_][A-Za-z0-9_]*(?:(?:::|#)[A-Za-z0-9_]+)*)\s*")
_MAX_DEPTH = 64


@dataclass(frozen=True, slots=True)
class Expression:
    """Python code in a configuration; never run."""

    text: str


def refuse(cause: str, hint: str = "") -> BundleError:
    return BundleError("import model", cause, hint)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; raises BundleError."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise refuse(f"{path.name} is larger than {MAX_CONFIG_BYTES} bytes")
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as cause:
        raise refuse(f"{path.name} cannot be read ({cause.strerror})", "Give the folder of a MONAI bundle") from cause
    except (ValueError, RecursionError) as cause:
        raise refuse(f"{path.name} is not valid JSON") from cause
    if not isinstance(content, dict):
        raise refuse(f"{path.name} is no JSON object")
    return content


def resolve(value: Any, config: Mapping[str, Any], depth: int = 0) -> Any:
    """``value`` with references replaced by what they refer to and expressions marked as such."""
    if depth > _MAX_DEPTH:
        raise refuse("the configuration refers to itself")
    if isinstance(value, str):
        match = _REFERENCE.fullmatch(value)
        if match:
            return resolve(_look_up(match[1], config), config, depth + 1)
        return Expression(value) if value.startswith(("$", "%")) else value
    if isinstance(value, list):
        return [resolve(item, config, depth + 1) for item in value]
    if isinstance(value, dict):
        return {key: resolve(item, config, depth + 1) for key, item in value.items()}
    return value


def _look_up(name: str, config: Mapping[str, Any]) -> Any:
    found: Any = config
    for part in re.split(r"::|#", name):
        if isinstance(found, list) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, Mapping) and part in found:
            found = found[part]
        else:
            raise refuse(f"the configuration refers to '{name}', which is not there")
    return found


class Arguments:
    """The arguments of one transform; what nobody took at the end is refused by name."""

    def __init__(self, name: str, values: Mapping[str, Any], ignored: frozenset[str]) -> None:
        self.name = name
        self._left = {k: v for k, v in values.items() if k not in ignored and not k.startswith("_")}

    def take(self, key: str, default: Any = None) -> Any:
        value = self._left.pop(key, default)
        if isinstance(value, Expression):
            raise refuse(f"{self.name}.{key} is a Python expression", "Replace it by its value in the configuration")
        return value

    def expect(self, key: str, *allowed: Any) -> None:
        """``key``, where given, has one of these values; others change the result in a way that is not known here."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            raise refuse(f"{self.name}.{key} = {value!r} cannot be mapped", f"Known: {', '.join(map(repr, allowed))}")

    def number(self, key: str, default: float | None = None) -> float:
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise refuse(f"{self.name}.{key} must be a number")
        return float(value)

    def three(self, key: str, default: Any = None) -> list[Any]:
        """A value per axis; one value stands for all three."""
        value = self.take(key, default)
        values = value if isinstance(value, list) else [value] * 3
        if len(values) != 3 or any(isinstance(v, bool) or not isinstance(v, int | float) for v in values):
            raise refuse(f"{self.name}.{key} must be a number or three, for a volume")
        return values

    def done(self) -> None:
        if self._left:
            raise refuse(f"{self.name}.{sorted(self._left)[0]} cannot be mapped", "Ask for it, or change the bundle")
