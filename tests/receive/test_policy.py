"""Who may associate, and which contexts are accepted."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pynetdicom.presentation import build_context

from dicomnode.receive.negotiation import accepted_contexts
from dicomnode.receive.policy import Rejection, decide_association
from dicomnode.settings import Peer, Settings

CT, VERIFICATION, FIND = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.1.1", "1.2.840.10008.5.1.4.1.2.1.1"
IMPLICIT, EXPLICIT, JPEG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.4.70"
NODE = Settings(
    node={"ae_title": "NODE"},
    peers=[
        {"name": "anywhere", "ae_title": "CT", "allow": ["echo"]},
        {"name": "room1", "ae_title": "CT", "host": "10.0.0.1", "allow": ["store"]},
        {"name": "room2", "ae_title": "MR", "host": "10.0.0.2"},
    ],
)


@pytest.mark.parametrize(
    ("calling", "called", "address", "answer"),
    [
        ("CT", "NODE", "10.0.0.1", "room1"),
        (" CT  ", "NODE    ", "10.0.0.1", "room1"),
        ("CT", "NODE", "10.9.9.9", "anywhere"),
        ("MR", "NODE", "10.0.0.2", "room2"),
        ("MR", "NODE", "::ffff:10.0.0.2", "room2"),
        ("MR", "NODE", "10.0.0.3", (1, 1, 3)),
        ("US", "NODE", "10.0.0.1", (1, 1, 3)),
        ("ct", "NODE", "10.0.0.1", (1, 1, 3)),
        ("", "NODE", "10.0.0.1", (1, 1, 3)),
        ("CT", "node", "10.0.0.1", (1, 1, 7)),
        ("CT", "ANY-SCP", "10.0.0.1", (1, 1, 7)),
        ("CT", "", "10.0.0.1", (1, 1, 7)),
    ],
)
def test_decision(calling: str, called: str, address: str, answer: object) -> None:
    found = decide_association(NODE, calling=calling, called=called, address=address)
    if isinstance(found, Peer):
        assert found.name == answer
    else:
        assert (found.result, found.source, found.reason) == answer
        assert found.cause and found.hint


def test_nobody_listed_means_nobody_may(tmp_path: object) -> None:
    assert isinstance(decide_association(Settings(), calling="A", called="DICOMNODE", address="::1"), Rejection)


@given(st.text(max_size=40))
def test_strangers_cannot_write_into_the_log(title: str) -> None:
    for found in (
        decide_association(NODE, calling=title, called="NODE", address="1.1.1.1"),
        decide_association(NODE, calling="X", called=title, address="1.1.1.1"),
    ):
        if isinstance(found, Rejection):
            assert found.cause.isascii() and found.cause.isprintable() and "<" not in found.cause
            assert len(found.cause) < 120


def allowing(*services: Any) -> Peer:
    return Peer(name="p", ae_title="P", allow=services)


def test_contexts_keep_the_order_of_the_requestor() -> None:
    proposed = [build_context(CT, [JPEG, EXPLICIT, "9.9.9"]), build_context(CT, [IMPLICIT, JPEG])]
    (context,) = accepted_contexts(proposed, allowing("store"))
    assert [str(t) for t in context.transfer_syntax] == [JPEG, EXPLICIT, IMPLICIT]


@pytest.mark.parametrize(
    ("allowed", "accepted"),
    [(set(), []), ({"echo"}, [VERIFICATION]), ({"store"}, [CT]), ({"echo", "store", "find"}, [VERIFICATION, CT])],
)
def test_contexts_follow_the_services_of_the_peer(allowed: set[str], accepted: list[str]) -> None:
    proposed = [build_context(c, [IMPLICIT]) for c in (VERIFICATION, CT, FIND, "1.2.3.99")]
    assert [str(c.abstract_syntax) for c in accepted_contexts(proposed, allowing(*allowed))] == accepted


def test_context_without_a_known_syntax_is_not_accepted() -> None:
    assert accepted_contexts([build_context(CT, ["9.9.9"])], allowing("store")) == []
