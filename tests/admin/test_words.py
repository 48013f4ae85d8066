"""Both languages of the dashboard: every word that is asked for is there, every sentence is one that the node says."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession

from dicomnode.admin import phrases
from dicomnode.admin.phrases import phrase
from dicomnode.admin.ready import check_disk, check_receivers
from dicomnode.admin.words import WORDS
from dicomnode.cloud_settings import LANES
from dicomnode.conflicts import KIND_OF, Outcome
from dicomnode.index.commitment import AskState, PromiseState
from dicomnode.index.database import Database
from dicomnode.index.jobs import PRIORITIES
from dicomnode.index.model_states import ModelState
from dicomnode.index.notices import NoticeState
from dicomnode.index.operation import Events, Processes
from dicomnode.index.states import JobState, SendState
from dicomnode.index.trust import Trust, Trusted
from dicomnode.settings import Settings
from tests.admin.test_admin_http import drive, node, populate
from tests.sync.index_case import FakeClock, make_settings

ADMIN = Path(phrases.__file__).parent
PACKAGE = ADMIN.parent
_SAYS = {"w", "word", "_section", "_pill", "pill", "_table", "table"}


def asked_words() -> Iterator[tuple[str, str]]:
    """(file, key) of every literal that is shown as a word: arguments of w, heads of tables, titles of sections."""
    for path in sorted(ADMIN.glob("*.py")):
        for node_ in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            lists: list[ast.AST] = []
            if isinstance(node_, ast.Call) and getattr(node_.func, "id", "") in _SAYS:
                lists = list(node_.args)
            elif isinstance(node_, ast.Assign) and getattr(node_.targets[0], "id", "") in ("heads", "identity"):
                lists = [node_.value]
            for one in lists:
                values = [one] if isinstance(one, ast.Constant) else []
                if isinstance(one, ast.List | ast.Tuple):
                    values = [v for v in ast.walk(one) if isinstance(v, ast.Constant)]
                if isinstance(one, ast.IfExp):
                    values = [v for v in (one.body, one.orelse) if isinstance(v, ast.Constant)]
                for value in values:
                    if isinstance(value.value, str) and value.value:
                        yield path.name, value.value


def test_every_word_that_the_pages_ask_for_is_there() -> None:
    asked = list(asked_words())
    assert len(asked) > 120, "the pages are not read any more"
    assert [one for one in asked if one[1] not in WORDS] == []


@pytest.mark.parametrize(
    "states",
    [
        JobState, SendState, NoticeState, PromiseState, AskState, ModelState,
        [f"class_{lane}" for lane in LANES], list(PRIORITIES), [f"record_{kind}" for kind in KIND_OF],
        [f"side_{one}" for one in Outcome if one not in (Outcome.same, Outcome.review)],
        [f"mode_{one}" for one in ("auto", "always", "never")],
        ["online", "degraded", "offline", "off", "unknown", "well", "waiting"], ["applied", "refused"],
        ["current", "away", "refused", "expired", "unknown"], ["starting", "ready", "stopping", "silent_state"],
        ["info", "warning", "error"],
    ],
)  # fmt: skip
def test_every_state_has_a_word(states: Any) -> None:
    assert [str(state) for state in states if str(state) not in WORDS] == []


def test_a_chinese_word_is_chinese() -> None:
    """Names and abbreviations of the standard stay; anything else without a Chinese character was forgotten."""
    kept = {"language"}
    plain = [k for k, (_, zh) in WORDS.items() if not re.search(r"[\u4e00-\u9fff]", zh) and k not in kept]
    assert plain == []


def constants() -> str:
    """All text of the package but for the phrases themselves, f-strings with {} for their values."""
    found: list[str] = []
    for path in PACKAGE.rglob("*.py"):
        if path.name == "phrases.py":
            continue
        for node_ in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node_, ast.JoinedStr):
                found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node_.values))
            elif isinstance(node_, ast.Constant) and isinstance(node_.value, str):
                found.append(node_.value)
    return "\n".join(found)


def test_every_phrase_is_one_that_the_node_says() -> None:
    """When a sentence changes in the code, its Chinese form has to follow."""
    said = constants()
    for english, chinese in phrases._PHRASES:
        places = re.findall(r"\{\d?\}", chinese)
        assert len(places) == english.count("{}"), english
        for part in english.split("{}"):
            fragment = part.strip(" ;:.,()'")
            # What one sentence is made of may be put together from several places.
            pieces = [fragment] if fragment in said else re.split(r"[.;:] ", fragment)
            assert all(piece.strip(" ;:.,()'") in said for piece in pieces), f"nobody says: {fragment}"


def test_what_the_node_finds_is_told_in_the_readers_language(tmp_path: Path) -> None:
    disk = check_disk(make_settings(tmp_path)).detail
    assert re.fullmatch(r"可用 \d+ MiB，预留 1 MiB", phrase(disk, "zh")) and phrase(disk, "en") == disk
    assert phrase(check_receivers([], 2).detail, "zh") == "2 个接收进程中有 0 个响应"
    gap = "1 gap(s) between slices, about 4 slice(s) missing; the largest step is 50.00 mm where 10.00 mm is usual"
    assert phrase(f"quiet-period: nothing arrived for 2 s; {gap}", "zh") == (
        "静默期：2 秒内无新图像；层间有 1 处缺口，约缺 4 层；最大层距 50.00 mm，正常为 10.00 mm"
    )
    assert phrase("something new; readable and writable", "zh") == "something new；可读写"
    assert phrase("something new", "zh") == "something new" and phrase("", "zh") == ""
    assert phrase("{} {0} %s \\1", "zh") == "{} {0} %s \\1"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    repository = {"metadata_url": "https://models.example/metadata", "root_file": tmp_path / "root.json"}
    cloud = {"stow_url": "https://c.example/studies", "repository": repository}
    return node(tmp_path, cloud=cloud, metrics={"remote_write_url": "https://c.example/w"})


def test_the_page_in_both_languages(tmp_path: Path, settings: Settings) -> None:
    """No escaped markup, anchors that lead somewhere, labels for narrow screens and for readers."""
    db = Database(tmp_path, FakeClock())
    try:
        populate(db, tmp_path)
        trusted = Trusted(expires=datetime(2027, 1, 2, tzinfo=UTC), versions={}, offers=())
        Trust(db, settings.cloud.repository.metadata_url).good(trusted)
        Processes(db).beat("sidecar", "ready", {"remote_write": {"state": "waiting", "waiting": 3, "bytes": 9000,
                                                                 "oldest_seconds": 600, "error": "x"}})  # fmt: skip
        Events(db).add("warning", "k", "s", "t")

        async def body(client: ClientSession) -> None:
            for language, tag in (("en", "en"), ("zh", "zh-CN")):
                async with client.get(f"/?lang={language}") as answer:
                    text = await answer.text()
                assert f'<html lang="{tag}">' in text and "&lt;time" not in text and "2027-01-02" in text
                ids = set(re.findall(r'\bid="([a-z_]+)"', text))
                assert {a for a in re.findall(r'href="#([a-z_]+)"', text)} <= ids and "main" in ids
                assert re.search(r'<button type="button" data-retry="/api/v1/deliveries/\d+/retry" aria-label=', text)
                assert text.count("<th ") > 40 and "<th scope=" in text
                assert text.count('data-label="') > 40
                for title in re.findall(r'data-label="([^"]*)"', text):
                    assert f">{title}</th>" in text
            assert "3 批指标待推送，8 KiB，最早等待 10 分钟" in text and "所有时间均为 UTC" in text

        drive(db, settings, body)
    finally:
        db.close()
