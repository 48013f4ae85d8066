"""What this node accepts responsibility for: rows and bytes, not promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from dicomnode import durable
from dicomnode.commitment import Reference, Verdict
from dicomnode.durable import ObjectStore
from dicomnode.index.catalogue import Catalogue, NewInstance, Stored
from dicomnode.index.database import Database
from dicomnode.index.durability import Durability
from tests.index.rows import CT_IMAGE, instance

SEG = "1.2.840.10008.5.1.4.1.1.66.4"
PRINT = "1.2.840.10008.5.1.1.9"
COMMITTED, DAMAGED, ABSENT = int(Verdict.committed), int(Verdict.processing_failure), int(Verdict.no_such_instance)


class Shelf:
    """Objects with rows and files that agree."""

    def __init__(self, db: Database) -> None:
        self.db = db
        self.store = ObjectStore(db.data_dir)
        self.store.prepare()
        self.durability = Durability(db, self.store)
        self.pauses = 0
        self.patience = 10_000

    def pause(self, seconds: float) -> bool:
        self.pauses += 1
        return self.pauses < self.patience

    def put(self, uid: str, content: bytes = b"pixels", file: str = "") -> Path:
        new = instance(sop=uid, content=content.hex())
        name = file or f"00/{uid}-{len(content)}.dcm"
        meta = bytes(132) + b"\x02\0\0\0UL\x04\0" + (0).to_bytes(4, "little")
        digest = durable.hash_object(content, meta)
        path = self.store.stage(name, [meta, content])
        row = NewInstance(
            attributes=new.attributes,
            transfer_syntax_uid=new.transfer_syntax_uid,
            file=name,
            size=len(meta) + len(content),
            sha256=digest.whole,
            dataset_sha256=digest.data_set,
        )
        self.last = Catalogue(self.db).commit([row])[0]
        return path

    def judge(self, *uids: str, sop_class: str = CT_IMAGE) -> list[int]:
        found = self.durability.judge([Reference(sop_class, uid) for uid in uids], self.pause)
        assert found is not None
        self.damaged = found.damaged
        return list(found.verdicts)


@pytest.fixture
def shelf(db: Database) -> Shelf:
    return Shelf(db)


def test_what_is_there_whole_is_committed_and_the_rest_is_not(shelf: Shelf) -> None:
    shelf.put("1.5.1")
    assert shelf.judge("1.5.1", "1.5.2") == [COMMITTED, ABSENT]
    assert shelf.judge("1.5.1", sop_class=SEG) == [Verdict.class_instance_conflict]
    assert shelf.judge("1.5.9", sop_class=PRINT) == [Verdict.class_not_supported]
    assert shelf.judge(*[f"1.6.{n}" for n in range(1200)], "1.5.1") == [ABSENT] * 1200 + [COMMITTED]


def test_a_uid_with_two_classes_is_committed_to_in_neither(shelf: Shelf) -> None:
    shelf.put("1.5.1")
    both = [Reference(CT_IMAGE, "1.5.1"), Reference(SEG, "1.5.1")]
    found = shelf.durability.judge(both, shelf.pause)
    assert found is not None and set(found.verdicts) == {Verdict.class_instance_conflict}


@pytest.mark.parametrize("damage", ["cut", "flip", "remove", "longer"])
def test_bytes_that_are_not_what_came_are_not_committed_to(shelf: Shelf, damage: str) -> None:
    path = shelf.put("1.5.1")
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes({"cut": data[:-1], "flip": data[:-1] + b"?", "longer": data + b"\0"}[damage])
    assert shelf.judge("1.5.1") == [DAMAGED] and shelf.damaged == 1
    shelf.put("1.5.1", file="00/again.dcm")
    assert shelf.last is Stored.replaced, "the copy that the sender sends again takes the place of the damaged one"
    assert shelf.judge("1.5.1") == [COMMITTED]
    shelf.put("1.5.1", file="00/third.dcm")
    assert shelf.last is Stored.duplicate


def test_what_cannot_be_read_now_is_not_committed_to_and_kept(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf.put("1.5.1")

    def broken(*_: object) -> bool:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(durable, "object_intact", broken)
        assert shelf.judge("1.5.1") == [DAMAGED]
    assert shelf.judge("1.5.1") == [COMMITTED]
    shelf.put("1.5.1", file="00/again.dcm")
    assert shelf.last is Stored.duplicate


def test_an_object_that_is_replaced_meanwhile_is_judged_as_it_is_now(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shelf.put("1.5.1")
    real, replaced = durable.object_intact, []

    def replace_first(found: Path, expected: str) -> bool:
        if not replaced:
            replaced.append(True)
            shelf.put("1.5.1", b"other pixels")
            path.unlink()
        return real(found, expected)

    monkeypatch.setattr(durable, "object_intact", replace_first)
    assert shelf.judge("1.5.1") == [COMMITTED] and replaced


def test_an_object_whose_row_is_a_moment_late_is_waited_for(shelf: Shelf) -> None:
    """It is acknowledged from the journal before its row is made."""

    def pause(seconds: float) -> bool:
        if seconds:
            shelf.put("1.5.1")
        return True

    found = shelf.durability.judge([Reference(CT_IMAGE, "1.5.1")], pause)
    assert found is not None and found.verdicts == (COMMITTED,)


def test_a_judgement_can_be_given_up(shelf: Shelf) -> None:
    shelf.put("1.5.1")
    shelf.patience = 1
    assert shelf.durability.judge([Reference(CT_IMAGE, "1.5.1")], shelf.pause) is None
    assert shelf.durability.judge([Reference(CT_IMAGE, "1.5.2")], shelf.pause) is None
