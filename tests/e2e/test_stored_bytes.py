"""What is acknowledged is stored as it was sent and indexed as it reads."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pydicom
import pytest
from pydicom.valuerep import PersonName

from dicomnode.durable import hash_object
from tests.e2e.harness import SHARED_DATA, Node, make_series
from tests.peers import Item, data_set_of, item_of, send_items


def files(folder: str) -> list[Path]:
    found = sorted(p for p in (SHARED_DATA / folder).rglob("*") if p.is_file() and p.name != "DICOMDIR")
    return found or [Path("absent")]


def stored(node: Node, item: Item) -> dict:
    """The row of an item whose file holds exactly the bytes that were sent."""
    row = node.instance(item.sop_instance_uid)
    assert row is not None
    part10 = node.stored_part10(row)
    assert part10[:128] == bytes(128)
    assert data_set_of(part10) == item.data
    assert row["dataset_sha256"] == item.sha256
    assert hash_object(item.data, part10[: -len(item.data)]).whole == row["sha256"]
    assert row["TransferSyntaxUID"] == item.transfer_syntax_uid
    return row


@pytest.mark.parametrize("path", files("transfer-syntaxes"), ids=lambda p: p.stem)
def test_each_transfer_syntax_is_stored_as_sent(receiver: Node, path: Path, shared_data: Path) -> None:
    item = item_of(path)
    assert item.transfer_syntax_uid == path.stem
    assert send_items(receiver.port, [item]) == [0x0000]
    row = stored(receiver, item)
    expected = pydicom.dcmread(path, stop_before_pixels=True, force=True)
    assert int(row["Rows"]) == expected.Rows
    assert row["SOPClassUID"] == expected.SOPClassUID


@pytest.mark.parametrize("path", files("charsets"), ids=lambda p: p.stem)
def test_each_character_set_is_indexed_as_it_reads(receiver: Node, path: Path, shared_data: Path) -> None:
    item = item_of(path)
    assert send_items(receiver.port, [item]) == [0x0000]
    attributes = json.loads(stored(receiver, item)["attributes"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ds = pydicom.dcmread(path, stop_before_pixels=True)
        name = str(ds.PatientName)
    assert PersonName(attributes["PatientName"]) == name.strip()
    assert name.isascii() == (path.stem in ("Lena-ascii", "ISO_IR13"))


@pytest.mark.parametrize(
    "path", [p for p in files("cr-chest") + files("malformed") if "NoPixelData" in p.name or "CR-" in p.name],
    ids=lambda p: p.stem,
)  # fmt: skip
def test_other_images_are_stored_as_sent(receiver: Node, path: Path, shared_data: Path) -> None:
    item = item_of(path)
    assert send_items(receiver.port, [item]) == [0x0000]
    stored(receiver, item)


def test_the_same_instance_twice_is_one_row_and_success(receiver: Node) -> None:
    item = make_series("twice").items[0]
    assert send_items(receiver.port, [item, item]) == [0x0000, 0x0000]
    assert send_items(receiver.port, [item]) == [0x0000]
    rows = receiver.rows("SELECT * FROM instances WHERE SOPInstanceUID = ?", (item.sop_instance_uid,))
    assert len(rows) == 1
    stored(receiver, item)
    folder = (receiver.data_dir / "objects" / rows[0]["file"]).parent
    known = receiver.rows("SELECT file FROM instances UNION SELECT file FROM former_instances")
    assert {f"{folder.name}/{p.name}" for p in folder.iterdir()} <= {r["file"] for r in known}


def test_other_bytes_under_the_same_uid_replace_and_keep_the_former(receiver: Node) -> None:
    first = make_series("former")
    item = first.items[0]
    first.datasets[0].ImageComments = "corrected"
    from tests.e2e.harness import item_from

    newer = item_from(first.datasets[0])
    assert newer.sop_instance_uid == item.sop_instance_uid
    assert newer.data != item.data
    assert send_items(receiver.port, [item]) == [0x0000]
    before = stored(receiver, item)
    assert send_items(receiver.port, [newer]) == [0x0000]
    assert stored(receiver, newer)["file"] != before["file"]
    former = receiver.rows("SELECT * FROM former_instances WHERE SOPInstanceUID = ?", (item.sop_instance_uid,))
    assert [(f["file"], f["sha256"]) for f in former] == [(before["file"], before["sha256"])]
    assert data_set_of(receiver.stored_part10(former[0])) == item.data
