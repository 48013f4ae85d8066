"""How answers of a query go out: few calls, one command set for all, and a cancel is still seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pynetdicom.dimse_primitives import C_FIND

from dicomnode.dimse.command import C_FIND_RSP, elements, number
from dicomnode.serve import find as find_module
from dicomnode.serve.exchange import HELD_BYTES, PENDING, SUCCESS, Exchange
from dicomnode.settings import Settings
from tests.peers import EXPLICIT_LITTLE

MODEL = "1.2.840.10008.5.1.4.1.2.2.1"


class Peer:
    """An association that keeps what is said; ``polls`` counts the looks at the socket."""

    def __init__(self, max_pdu: int = 16384) -> None:
        self.said: list[bytes] = []
        self.polls = 0
        self.cancel_after = -1
        self.dimse = SimpleNamespace(maximum_pdu_size=max_pdu, cancel_req={})

    def usable(self) -> bool:
        return True

    def poll(self) -> None:
        self.polls += 1
        if self.cancel_after >= 0 and len(self.said) >= self.cancel_after:
            self.dimse.cancel_req[7] = object()

    def say(self, parts: list[bytes]) -> None:
        self.said.append(b"".join(parts))


def exchange(peer: Peer) -> Exchange:
    request = C_FIND()
    request.MessageID = 7
    context = SimpleNamespace(context_id=3, abstract_syntax=MODEL, transfer_syntax=[EXPLICIT_LITTLE])
    return Exchange(peer, request, context)


def messages(said: list[bytes], max_pdu: int = 16384) -> list[tuple[dict[int, bytes], bytes]]:
    """Command set and data set of each message; every PDU is one that the peer takes."""
    data, at = b"".join(said), 0
    found: list[tuple[dict[int, bytes], bytes]] = []
    command, data_set = b"", b""
    while at < len(data):
        assert data[at] == 0x04
        size = int.from_bytes(data[at + 2 : at + 6], "big")
        assert size <= max_pdu
        assert int.from_bytes(data[at + 6 : at + 10], "big") == size - 4
        assert data[at + 10] == 3
        control, value = data[at + 11], data[at + 12 : at + 6 + size]
        at += 6 + size
        if control & 1:
            assert not data_set
            command += value
        else:
            data_set += value
        if control & 2 and (not control & 1 or number(elements(command), 0x0800) == 0x0101):
            found.append((elements(command), data_set))
            command, data_set = b"", b""
    assert (command, data_set) == (b"", b"")
    return found


def test_many_answers_take_few_calls_and_arrive_in_order() -> None:
    peer = Peer()
    asked = exchange(peer)
    texts = [f"{n:04}".encode() * 50 for n in range(500)]
    for text in texts:
        asked.answer(PENDING, text)
    asked.respond(SUCCESS)
    found = messages(peer.said)
    assert [data for _, data in found] == [*texts, b""]
    assert [number(c, 0x0900) for c, _ in found] == [PENDING] * 500 + [SUCCESS]
    assert {(number(c, 0x0100), number(c, 0x0120), c[0x0002]) for c, _ in found} == {
        (C_FIND_RSP, 7, MODEL.encode() + b"\0")
    }
    assert len(peer.said) <= sum(map(len, peer.said)) // HELD_BYTES + 1
    assert max(map(len, peer.said)) < HELD_BYTES + 1024


@pytest.mark.parametrize("cancel_after", [-1, 1])
def test_the_socket_is_looked_at_before_each_call_and_a_cancel_ends_the_answers(
    monkeypatch: pytest.MonkeyPatch, cancel_after: int
) -> None:
    peer = Peer()
    peer.cancel_after = cancel_after
    plan: Any = SimpleNamespace(unsupported=())
    found = SimpleNamespace(rows=[{}] * 1000, ended=find_module.Ended.complete)
    monkeypatch.setattr(find_module, "parse_identifier", lambda *_: None)
    monkeypatch.setattr(find_module, "plan_find", lambda *_, **__: plan)
    monkeypatch.setattr(find_module, "run", lambda *_, **__: found)
    monkeypatch.setattr(find_module, "answers", lambda *_: iter([bytes(400)] * 1000))
    settings = Settings.model_validate({"node": {"data_dir": "/nowhere"}})
    result = find_module.find(
        settings, None, exchange(peer), find_module.Root.STUDY, relational=False, options=find_module.Options()
    )  # type: ignore[arg-type]
    statuses = [number(c, 0x0900) for c, _ in messages(peer.said)]
    if cancel_after < 0:
        assert (result.status, result.answers) == (SUCCESS, 1000)
        assert peer.polls <= len(peer.said) + 2
    else:
        assert result.status == 0xFE00
        assert result.answers < 100
    assert statuses == [PENDING] * result.answers + [result.status]
