"""Conditions of rules on DICOM attributes. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any


def value_matches(value: str, condition: Any) -> bool:
    """One condition of a rule against an attribute's text (values joined by a backslash).

    A list means any of its entries; a text with ``*`` or ``?`` is a glob; a number compares
    as a number; a range, which has ``min`` and ``max`` as attributes or keys, is inclusive. Text
    compares without regard to case and surrounding spaces. A multi-valued attribute matches when
    one of its values does.
    """
    if isinstance(condition, list | tuple):
        return any(value_matches(value, one) for one in condition)
    values = [part.strip() for part in value.split("\\")]
    return any(_one_matches(part, condition) for part in values)


def all_match(conditions: Mapping[str, Any], attributes: Mapping[str, Any]) -> bool:
    """Whether every condition holds; an attribute that is missing matches only ``"*"`` and ``""``."""
    return all(value_matches(str(attributes.get(key) or ""), wanted) for key, wanted in conditions.items())


def _one_matches(value: str, condition: Any) -> bool:
    if isinstance(condition, Mapping):
        return _in_range(value, condition.get("min"), condition.get("max"))
    if hasattr(condition, "min") and hasattr(condition, "max"):
        return _in_range(value, condition.min, condition.max)
    if isinstance(condition, bool):
        return False
    if isinstance(condition, int | float):
        number = _number(value)
        return number is not None and number == float(condition)
    wanted = str(condition).strip()
    if "*" in wanted or "?" in wanted:
        pattern = "".join({"*": ".*", "?": "."}.get(c, re.escape(c)) for c in wanted)
        return re.fullmatch(pattern, value, re.IGNORECASE | re.DOTALL) is not None
    return value.casefold() == wanted.casefold()


def _in_range(value: str, low: Any, high: Any) -> bool:
    if all(isinstance(b, int | float) for b in (low, high) if b is not None):
        number = _number(value)
        if number is None:
            return False
        return not ((low is not None and number < float(low)) or (high is not None and number > float(high)))
    if not value:
        return False
    return not ((low is not None and value < str(low)) or (high is not None and value > str(high)))


def _number(value: str) -> float | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None  # NaN would lie within every range
