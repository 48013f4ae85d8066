"""Bad input: the status that the standard names, a log line and an event, and the next study works."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import SHARED_DATA, Node, make_series
from tests.peers import (
    EXPLICIT_LITTLE,
    IMPLICIT_LITTLE,
    VERIFICATION,
    Association,
    Cut,
    Item,
    Rejected,
    contexts_for,
    item_of,
    run_program,
    send_items,
)

SUCCESS, OUT_OF_RESOURCES, MISMATCH, CANNOT_UNDERSTAND = 0x0000, 0xA700, 0xA900, 0xC000


def next_study_works(node: Node) -> None:
    series = make_series("local afterwards")
    assert set(send_items(node.port, series.items)) == {SUCCESS}
    node.wait_job(series.series_uid)


def refusals(node: Node) -> list[str]:
    status = json.loads(node.cli("status", "--json"))
    return [e["text"] for e in status["rejections"] + status["events"]]


def wait_told(node: Node, *words: str, event: str = "") -> None:
    """The log, and the events of a kind, say so; a refusal is told once it was answered."""

    def told() -> bool:
        lines = node.log.read_text(errors="replace").splitlines()
        if not any(all(w in line for w in words) for line in lines):
            return False
        return not event or any(all(w in e["text"] for w in words) for e in node.events(event))

    node.wait(told, 20, f"it is told: {words}")


# Objects


def _element_text(ds_bytes: bytes, tag: bytes, vr: bytes, value: bytes) -> bytes:
    """Put a value of another length into a short element, explicit VR little endian."""
    start = ds_bytes.index(tag + vr)
    length = int.from_bytes(ds_bytes[start + 6 : start + 8], "little")
    return ds_bytes[: start + 6] + len(value).to_bytes(2, "little") + value + ds_bytes[start + 8 + length :]


def with_uid(item: Item, uid: bytes) -> Item:
    """SOP Instance UID (0008,0018) replaced in the data set."""
    value = uid + b"\0" * (len(uid) % 2)
    return Item(
        item.sop_class_uid,
        uid.decode("latin-1"),
        item.transfer_syntax_uid,
        _element_text(item.data, b"\x08\x00\x18\x00", b"UI", value),
    )


BAD_UIDS = [
    b"../../etc/passwd",
    b"1.2.3/../4",
    b"/1.2",
    b"1.2\x004",
    b"1." + b"2" * 63,
    b"1.2.%2e%2e",
    b"1.2 3",
    b"\xff.1",
]


@pytest.mark.parametrize("uid", BAD_UIDS, ids=range(len(BAD_UIDS)))
def test_what_is_no_uid_is_refused(node: Node, uid: bytes) -> None:
    """Either the status of a mismatch or an abort; no row and no file with such a name."""
    item = make_series("local uid").items[0]
    bad = with_uid(item, uid)
    for data, command in ((bad, uid), (bad, item.sop_instance_uid), (item, uid)):
        try:
            with Association(node.port) as assoc:
                status = assoc.store(data, uid=command)
                assert status in (MISMATCH, CANNOT_UNDERSTAND), hex(status)
        except Cut as cut:
            assert cut.abort is not None or "closed" in str(cut)
    assert not node.rows("SELECT 1 FROM instances WHERE SOPInstanceUID LIKE '%/%'")
    names = [p.name for folder in (node.data_dir / "objects").iterdir() for p in folder.iterdir()]
    assert all(len(name.split(".")[0]) == 32 for name in names)
    assert node.instance(item.sop_instance_uid) is None


def test_command_and_data_set_must_name_the_same_instance(node: Node) -> None:
    item = make_series("local mismatch").items[0]
    with Association(node.port) as assoc:
        assert assoc.store(item, uid="1.2.3.4") == MISMATCH
        assert assoc.store(item) == SUCCESS
    wait_told(node, "0xA900", "SOPInstanceUID differs", event="store-refused")
    assert any("0xA900 SOPInstanceUID differs" in text for text in refusals(node))


@pytest.mark.parametrize("keyword", ["StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"])
def test_without_its_uids_an_object_is_refused(node: Node, keyword: str) -> None:
    series = make_series("local missing")
    delattr(series.datasets[0], keyword)
    series.datasets[0].file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    from pydicom.filebase import DicomBytesIO
    from pydicom.filewriter import write_dataset

    buffer = DicomBytesIO()
    buffer.is_little_endian, buffer.is_implicit_VR = True, False
    write_dataset(buffer, series.datasets[0])
    item = Item(series.items[0].sop_class_uid, series.items[0].sop_instance_uid, EXPLICIT_LITTLE, buffer.getvalue())
    with Association(node.port) as assoc:
        assert assoc.store(item) == MISMATCH
    wait_told(node, "0xA900", f"{keyword} is missing")


@pytest.mark.parametrize("keep", [0, 7, 100, 300, 700])
def test_a_truncated_header_is_not_understood(node: Node, keep: int) -> None:
    item = make_series("local cut").items[0]
    cut = Item(item.sop_class_uid, item.sop_instance_uid, item.transfer_syntax_uid, item.data[:keep])
    with Association(node.port) as assoc:
        assert assoc.store(cut) in (CANNOT_UNDERSTAND, MISMATCH)
        assert assoc.store(item) == SUCCESS  # the association lives on


def test_a_slice_with_cut_pixels_is_refused_by_the_model_not_by_intake(node: Node) -> None:
    """Bytes are stored as received; the job says what is wrong and the next study works."""
    series = make_series("local short pixels")
    last = series.items[-1]
    short = Item(last.sop_class_uid, last.sop_instance_uid, last.transfer_syntax_uid, last.data[:-1000])
    statuses = send_items(node.port, [*series.items[:-1], short])
    assert set(statuses[:-1]) == {SUCCESS}
    if statuses[-1] == SUCCESS:
        job = node.wait_job(series.series_uid, state="refused")
        assert job["last_error"]
    else:
        assert statuses[-1] == CANNOT_UNDERSTAND
    next_study_works(node)


def _malformed() -> list[Path]:
    return sorted((SHARED_DATA / "malformed").glob("*.dcm")) or [Path("absent")]


@pytest.mark.parametrize("path", _malformed(), ids=lambda p: p.stem)
def test_malformed_files_get_an_answer_and_harm_nothing(node: Node, path: Path, shared_data: Path) -> None:
    item = item_of(path)
    with Association(node.port, contexts=contexts_for([item])) as assoc:
        if (item.sop_class_uid, item.transfer_syntax_uid) in assoc.accepted:
            assert assoc.store(item) in (SUCCESS, CANNOT_UNDERSTAND, MISMATCH)
        else:
            assert "Unknown" in path.name  # its SOP class is not accepted (PS3.8 9.3.3.2)
        assert assoc.echo() == SUCCESS
    assert set(node.pids()) >= node.expected()


def test_the_deeply_nested_file_is_not_understood(node: Node, shared_data: Path) -> None:
    item = item_of(shared_data / "malformed" / "2026-05-06-Deeply-Nested-Sequence.dcm")
    assert send_items(node.port, [item]) == [CANNOT_UNDERSTAND]
    wait_told(node, "0xC000", "nested deeper")


# Series that the model cannot take: a job that says why.


def test_a_gap_is_refused_with_its_reason(node: Node) -> None:
    series = make_series("local gap")
    items = [i for n, i in enumerate(series.items) if n not in (15, 16)]
    assert set(send_items(node.port, items)) == {SUCCESS}
    job = node.wait_job(series.series_uid, state="refused")
    assert job["reason"].startswith("quiet-period")
    assert job["last_error"].startswith("GAP: 1 gap(s) between slices, about 2 slice(s) missing")
    node.wait(lambda: any("GAP" in e["text"] for e in node.events("job-refused")), 20, "the event is there")
    next_study_works(node)


def test_mixed_orientation_is_refused_with_its_reason(node: Node) -> None:
    def tilt(ds: object, number: int) -> None:
        if number >= 20:
            ds.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]  # type: ignore[attr-defined]

    series = make_series("local mixed", change=tilt)
    assert set(send_items(node.port, series.items)) == {SUCCESS}
    job = node.wait_job(series.series_uid, state="refused")
    assert job["last_error"].startswith("MIXED_ORIENTATION: ")
    next_study_works(node)


def test_a_localizer_in_the_series_is_left_out(node: Node) -> None:
    def localizer(ds: object, number: int) -> None:
        if number == 0:
            ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]  # type: ignore[attr-defined]
            ds.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]  # type: ignore[attr-defined]

    series = make_series("local localizer", change=localizer)
    assert set(send_items(node.port, series.items)) == {SUCCESS}
    job = node.wait_job(series.series_uid)
    assert json.loads(job["summary"])["slices"] == 31
    assert "localizer" in job["notes"].lower()


def test_two_studies_interleaved_on_one_association(node: Node) -> None:
    first, second = make_series("local one"), make_series("local two")
    mixed = [item for pair in zip(first.items, second.items, strict=True) for item in pair]
    assert set(send_items(node.port, mixed)) == {SUCCESS}
    for series in (first, second):
        job = node.wait_job(series.series_uid)
        assert json.loads(job["summary"])["slices"] == 32
        assert len(node.jobs(series.series_uid)) == 1


# Callers


@pytest.mark.parametrize(
    ("called", "calling", "fields", "words"),
    [
        ("DICOMNODE", "STRANGER", (1, 1, 3), "'STRANGER' is not listed"),
        ("OTHER", "CT1", (1, 1, 7), "called AE title 'OTHER'"),
        ("DICOMNODE", "FAR", (1, 1, 3), "'FAR' is listed with another address"),
    ],
)
def test_strangers_are_rejected_with_the_reason_of_the_standard(
    node: Node, called: str, calling: str, fields: tuple[int, int, int], words: str
) -> None:
    """PS3.8 9.3.4: rejected-permanent by the service user, calling (3) or called (7) AE title."""
    with pytest.raises(Rejected) as rejected:
        Association(node.port, called=called, calling=calling)
    assert rejected.value.fields == fields
    node.wait(lambda: any(words in e["text"] for e in node.events("association-rejected")), 20, "the event is there")
    wait_told(node, "association rejected", words)
    assert any(words in text for text in refusals(node))
    assert any(words in e["text"] for e in json.loads(node.cli("events", "--json")))


def test_a_peer_gets_only_the_services_it_may_use(node: Node) -> None:
    item = make_series("local service").items[0]
    with Association(node.port, calling="ECHOER", contexts=contexts_for([item])) as assoc:
        assert assoc.accepted == {(VERIFICATION, IMPLICIT_LITTLE): 1}
        assert assoc.echo() == SUCCESS


# A full disk


@pytest.fixture
def small_volume(tmp_path: Path) -> Iterator[Path]:
    """A file system of 40 MB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    folder = tmp_path / "volume"
    folder.mkdir()
    if run_program("mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", folder).returncode:
        pytest.skip("a tmpfs cannot be mounted here")
    yield folder
    assert run_program("umount", "-l", folder).returncode == 0


def test_a_full_disk_answers_a700_before_the_reserve_and_resumes(tmp_path: Path, small_volume: Path) -> None:
    reserve_mb = 8
    node = Node(
        tmp_path / "full",
        data_dir=small_volume / "data",
        node={"reserve_mb": reserve_mb},
        dimse={"workers": 1},
    ).start("run", "receiver")
    ballast = small_volume / "ballast"
    ballast.write_bytes(bytes(20 << 20))
    statuses = []
    while len(statuses) < 2000 and OUT_OF_RESOURCES not in statuses:
        statuses += send_items(node.port, make_series("full").items)
    assert set(statuses) == {SUCCESS, OUT_OF_RESOURCES}
    assert statuses.index(OUT_OF_RESOURCES) == statuses.count(SUCCESS)  # success first, then refusals alone
    free = os.statvfs(small_volume)
    assert free.f_bavail * free.f_frsize >= (reserve_mb - 1) << 20
    assert node.rows("SELECT count(*) AS n FROM instances")[0]["n"] == statuses.count(SUCCESS)
    wait_told(node, "0xA700", "free space is at the reserve", event="store-refused")
    ballast.unlink()
    assert set(send_items(node.port, make_series("resumed").items)) == {SUCCESS}
    assert node.stop() == 0


def test_no_room_at_all_is_an_answer_and_no_acknowledgement(tmp_path: Path, small_volume: Path) -> None:
    """Something else fills the volume behind the reserve's back: ENOSPC on the way."""
    node = Node(tmp_path / "none", data_dir=small_volume / "data", node={"reserve_mb": 1}, dimse={"workers": 1}).start(
        "run", "receiver"
    )
    assert set(send_items(node.port, make_series("before").items)) == {SUCCESS}
    assert node.rows("SELECT count(*) AS n FROM instances")[0]["n"] == 32  # all files are made
    free = os.statvfs(small_volume)
    ballast = small_volume / "ballast"
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - (64 << 10)))
    assert set(send_items(node.port, make_series("none").items[:3])) == {OUT_OF_RESOURCES}
    ballast.unlink()
    assert set(send_items(node.port, make_series("after").items)) == {SUCCESS}
    assert node.rows("SELECT count(*) AS n FROM instances")[0]["n"] == 64
    assert node.stop() == 0
