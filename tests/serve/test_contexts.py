"""Which presentation contexts a peer gets, by what it is allowed. Pure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dicomnode.receive.negotiation import accepted_contexts
from dicomnode.serve.exchange import Counts
from dicomnode.serve.retrieve import Instance, batches, proposals
from dicomnode.serve.service import QueryRetrieve
from dicomnode.settings import Peer

CT, FIND, VERIFY = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.2.2.1", "1.2.840.10008.1.1"
EXPLICIT, IMPLICIT, J2K = "1.2.840.10008.1.2.1", "1.2.840.10008.1.2", "1.2.840.10008.1.2.4.90"


def accepted(allow: set[str], roles: dict[str, tuple[bool, bool]] | None = None) -> dict[str, Any]:
    proposed = [
        SimpleNamespace(abstract_syntax=CT, transfer_syntax=[J2K, EXPLICIT]),
        SimpleNamespace(abstract_syntax=FIND, transfer_syntax=["1.2.840.10008.1.2.2", IMPLICIT]),
        SimpleNamespace(abstract_syntax=VERIFY, transfer_syntax=[IMPLICIT]),
    ]
    service = QueryRetrieve.__new__(QueryRetrieve)
    peer = Peer(name="p", ae_title="P", allow=tuple(sorted(allow)))
    found = accepted_contexts(proposed, peer, dict.fromkeys(service.classes, service), roles)
    return {c.abstract_syntax: (c.transfer_syntax, c.scu_role, c.scp_role) for c in found}


@pytest.mark.parametrize(
    ("allow", "roles", "wanted"),
    [
        ({"store"}, {}, {CT: ([J2K, EXPLICIT], None, None)}),
        ({"store"}, {CT: (False, True)}, {}),
        ({"get"}, {}, {}),
        ({"get"}, {CT: (False, True)}, {CT: ([EXPLICIT], False, True)}),
        ({"get", "store"}, {CT: (True, True)}, {CT: ([J2K, EXPLICIT], True, True)}),
        ({"store"}, {CT: (True, True)}, {CT: ([J2K, EXPLICIT], True, False)}),
        ({"find", "echo"}, {}, {FIND: ([IMPLICIT], None, None), VERIFY: ([IMPLICIT], None, None)}),
        (set(), {}, {}),
    ],
)
def test_contexts(allow: set[str], roles: dict[str, tuple[bool, bool]], wanted: dict[str, Any]) -> None:
    assert accepted(allow, roles) == wanted


def test_batches_fit_on_an_association(tmp_path: Any) -> None:
    instances = [Instance(f"1.2.{n % 150}", f"1.3.{n}", f"1.4.{n % 2}", tmp_path) for n in range(300)]
    made = list(batches(instances))
    assert [i for batch in made for i in batch] == instances
    assert all(len(proposals(batch)) <= 128 for batch in made)
    assert list(batches([])) == []


def test_counts() -> None:
    counts = Counts(remaining=4)
    for status, sop in ((0x0000, "1"), (0xB000, "2"), (0xA700, "3"), (None, "4")):
        counts.add(status, sop)
    assert (counts.remaining, counts.completed, counts.warning, counts.failed) == (0, 1, 1, 2)
    assert counts.failed_uids == ["3", "4"]
    assert counts.final_status() == 0xB000
