"""Judgements of the settings in words for the person who wrote the file. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_PATTERNS: Mapping[str, str] = {
    r"^[a-z0-9][a-z0-9_-]{0,31}$": "1 to 32 of a-z, 0-9, _ and -, a letter or digit first; no capitals, no spaces",
    r"^[a-z0-9][a-z0-9_.-]{0,63}$": "1 to 64 of a-z, 0-9, _ . and -, a letter or digit first",
    r"^(\d+\.\d+\.\d+)?$": "a version such as 1.2.0, or empty",
    r"^(https?://.*)?$": "an address that begins with https:// (or http:// on loopback), or empty",
    r"^([0-9a-f]{64})?$": "64 hexadecimal digits in lower case, or empty",
}


def plain(item: Mapping[str, Any]) -> str:
    """What is wrong, of one error of pydantic."""
    if item["type"] == "string_pattern_mismatch":
        found = _PATTERNS.get(str(item.get("ctx", {}).get("pattern")))
        if found:
            return f"should be {found}"
    return str(item["msg"]).removeprefix("Value error, ")
