"""Headers of servers that may say anything, and whose token goes where."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dicomnode.settings import Cloud
from dicomnode.sync.source import content_range, strong, token_file
from dicomnode.sync.transfer import LEAST_BYTES_PER_SECOND, allowed_seconds
from dicomnode.sync.trust import TARGET


@given(st.one_of(st.text(max_size=60), st.from_regex(r"bytes \d{1,16}-\d{1,16}/(\d{1,16}|\*)", fullmatch=True)))
@example("bytes 5-4/10")
@example("bytes 0-10/10")
@example("bytes ٣-٤/٩")
def test_a_content_range_is_plausible_or_none(header: str) -> None:
    first, total = content_range(header)
    assert first >= -1
    assert first == -1 or total is None or first < total


@given(st.integers(0, 10**14), st.integers(0, 10**14))
def test_a_right_content_range_is_read(start: int, more: int) -> None:
    assert content_range(f"bytes {start}-{start + more}/{start + more + 1}") == (start, start + more + 1)
    assert content_range(f"bytes {start}-{start + more}/*") == (start, None)


@given(st.text(max_size=40))
def test_an_entity_tag_that_goes_back_is_one_header_value(tag: str) -> None:
    kept = strong(tag)
    assert kept in ("", tag)
    assert not any(c in kept for c in "\r\n\0 ") and kept.isascii()


def test_entity_tags() -> None:
    assert [strong(t) for t in ('"a"', 'W/"a"', '"', '""', '"a"b"', "a")] == ['"a"', "", "", "", "", ""]


@given(st.text(max_size=80))
@example("a/1.0.0.zip\n")
@example("../1.0.0.zip")
@example("a/٣.0.0.zip")
def test_a_target_never_leaves_its_folder(path: str) -> None:
    match = TARGET.fullmatch(path)
    if match:
        assert "/" not in match["name"] and not match["name"].startswith(".")
        assert all(part.isascii() and part.isdecimal() for part in match["version"].split("."))


@given(st.integers(0, 1 << 40), st.floats(0.1, 600))
def test_an_attempt_has_an_end(left: int, timeout: float) -> None:
    assert timeout <= allowed_seconds(left, timeout) <= timeout + left / LEAST_BYTES_PER_SECOND + 1


@pytest.mark.parametrize(
    ("url", "token"),
    [
        ("https://models.example/metadata/timestamp.json", "models"),
        ("https://files.example/targets/x", "models"),
        ("https://cloud.example/m.zip", "cloud"),
        ("https://cloud.example:444/m.zip", None),
        ("https://elsewhere.example/m.zip", None),
        ("http://models.example/metadata/timestamp.json", None),
    ],
)
def test_a_token_goes_to_its_own_host_alone(url: str, token: str | None, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "stow_url": "https://cloud.example/studies",
        "token_file": tmp_path / "cloud",
        "repository": {
            "metadata_url": "https://models.example/metadata",
            "targets_url": "https://files.example/targets",
            "root_file": tmp_path / "root",
            "token_file": tmp_path / "models",
        },
    }
    found = token_file(Cloud.model_validate(settings), url)
    assert (found.name if found else None) == token
