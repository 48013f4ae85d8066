"""Markup, guard rules and words, as functions on values."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dicomnode import metrics, metrics_told
from dicomnode.admin.guard import is_loopback, refused_host
from dicomnode.admin.markup import Markup, element, join
from dicomnode.admin.words import WORDS


@given(st.text(), st.text())
def test_text_and_attributes_cannot_leave_their_place(text: str, value: str) -> None:
    made = element("td", text, class_=value)
    inner = made.removeprefix('<td class="').removesuffix("</td>")
    attribute, _, content = inner.partition('">')
    assert '"' not in attribute
    assert "<" not in attribute
    assert "<" not in content
    assert ">" not in content


def test_only_markup_passes_as_it_is() -> None:
    assert join(Markup("<b>"), "<b>", None, 3) == "<b>&lt;b&gt;3"
    assert element("p", element("b", "x"), "&") == "<p><b>x</b>&amp;</p>"
    assert element("button", data_retry="/x", disabled=True, title=None) == '<button data-retry="/x" disabled></button>'


@pytest.mark.parametrize(
    ("tag", "attributes"),
    [("a b", {}), ("a", {"onclick": "x"}), ("a", {"style": "x"}), ("A>", {}), ("a", {"x y": "z"})],
)
def test_names_are_plain(tag: str, attributes: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        element(tag, **attributes)  # type: ignore[arg-type]


def test_scripts_have_no_content() -> None:
    with pytest.raises(ValueError):
        element("script", "alert(1)")


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("[::1]", True),
        ("localhost", True),
        ("LOCALHOST", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


@given(st.text(alphabet=string.printable, max_size=40))
def test_a_host_header_never_raises(header: str) -> None:
    refused_host("127.0.0.1", header)


def test_every_word_is_there_twice() -> None:
    for key, (english, chinese) in WORDS.items():
        assert english, key
        assert chinese, key
        assert english.count("{}") == chinese.count("{}")


def test_snapshots_come_back_as_families() -> None:
    metrics.prepare("receiver-1")
    metrics.stored(0xA700, 0.1, 10)
    metrics.association("accepted")
    metrics.association("released")
    metrics.observe("read", -1.0)
    with metrics.timed("encode"):
        pass
    text = metrics.snapshot()
    assert "_created" not in text
    families = {f.name: f for f in metrics_told.families({"receiver-1": text, "worker": text})}
    statuses = {s.labels["process"] for s in families["dicomnode_store"].samples if s.labels["status"] == "0xA700"}
    assert statuses == {"receiver-1", "worker"}
    assert families["dicomnode_stage_seconds"].type == "histogram"


@given(
    st.text()
    | st.recursive(
        st.none() | st.integers(), lambda c: st.lists(c) | st.dictionaries(st.sampled_from(["dicomnode_store", "x"]), c)
    ).map(str)
)
def test_a_damaged_snapshot_adds_nothing(text: str) -> None:
    metrics_told.families({"worker": text})
