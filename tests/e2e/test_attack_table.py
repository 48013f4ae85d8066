"""The attack table of RELIABILITY.md as far as DIMSE, intake and index go: which test tries what.

=========================  ==========================================================================================
row                        tests
=========================  ==========================================================================================
slow-loris                 e2e/test_attacks.py (silent, five bytes, drops, stalled and dripped P-DATA), e2e/test_tls.py
                           (handshake: silent, half, drops; silence after it), here: the rest over TLS;
                           review/test_wire_review.py (empty P-DATA, single bytes)
PDU length 4 GiB           e2e/test_attacks.py and e2e/test_tls.py, each type, before and after negotiation
path traversal             e2e/test_bad_input.py (UIDs), here: 64 kB, AE titles, Patient ID; serve/test_mpps.py
deflate bomb               test_header.py (reading), serve/test_bombs.py (retrieve), review/test_faults_stay_small.py
                           (worker), here: over the wire
nesting                    test_header.py, test_nested.py, e2e/test_bad_input.py, fuzz/fuzz_header.py, here: over the
                           wire
pixel bombs                infer/test_infer_volume.py (TOO_LARGE), serve/test_bombs.py, here: a whole node
endless fragments          here: an object, a query, a command; dimse/test_wire.py
unknown callers            e2e/test_bad_input.py (address, AE titles), e2e/test_tls.py (certificate A with AE title B),
                           receive/test_policy.py (every combination)
C-MOVE as exfiltration     serve/test_dcmtk.py (0xA801), serve/test_query_attacks.py (no look-up, no socket)
C-FIND flood               serve/test_extended.py (50 clients), serve/test_gate.py, serve/test_scu.py (row limit),
                           serve/test_dcmtk.py (cancel), index/test_matching.py (deadline)
SQL through keys           serve/test_query_attacks.py, index/test_matching.py, serve/test_dcmtk.py
association flood          scripts/crash, tests/crashing
polyglot preamble          here
PHI in logs                e2e/test_no_patient_data.py
=========================  ==========================================================================================
"""

from __future__ import annotations

import contextlib
import re
import socket
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.harness import ROOT, Node, make_series, rule
from tests.e2e.test_attacks import ended
from tests.e2e.tls_node import PER_ADDRESS, REQUEST_SECONDS, SecureNode, Site, call, make_receiver, make_site, wrap
from tests.peers import (
    CT_IMAGE,
    EXPLICIT_LITTLE,
    VERIFICATION,
    Association,
    Cut,
    Item,
    Rejected,
    command_set,
    contexts_for,
    run_program,
    send_items,
    wait_for,
)

DEFLATED = "1.2.840.10008.1.2.1.99"
STUDY_FIND = "1.2.840.10008.5.1.4.1.2.2.1"
PDU_SECONDS = 2.0


def test_the_table_names_tests_that_exist() -> None:
    assert __doc__ is not None
    named = set(re.findall(r"[a-z0-9_]+/test_[a-z_]+\.py|(?<![/a-z_])test_[a-z_]+\.py|fuzz/[a-z_]+\.py", __doc__))
    assert len(named) > 12
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []


# Over TLS


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return make_site(tmp_path_factory.mktemp("hospital"))


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, site: Site) -> Iterator[SecureNode]:
    node = make_receiver(tmp_path_factory.mktemp("secure"), site)
    yield node
    assert node.stop() == 0


def test_five_bytes_after_the_handshake_lock_nobody_out(secure: SecureNode, site: Site) -> None:
    flood = []
    for _ in range(PER_ADDRESS + 2):
        sock = socket.create_connection(("127.0.0.1", secure.tls_port), timeout=10, source_address=("127.0.0.9", 0))
        with contextlib.suppress(OSError, Cut):  # those that are too many are closed in the handshake
            secured = wrap(site, site.ct)(sock)
            flood.append(secured)
            secured.sendall(b"\x01\x00\x00\x00\x01")
    assert len(flood) >= PER_ADDRESS
    begin = time.monotonic()
    with call(secure, site, site.ct, calling="CT") as assoc:
        assert assoc.echo() == 0x0000
    assert time.monotonic() - begin < REQUEST_SECONDS + 3
    wait_for(lambda: all(ended(s) for s in flood), REQUEST_SECONDS + 5, "the loris is cut")
    for sock in flood:
        sock.close()


@pytest.mark.parametrize("drip", [False, True], ids=["stalled", "drip"])
def test_p_data_that_stalls_over_tls_is_aborted_at_its_deadline(secure: SecureNode, site: Site, drip: bool) -> None:
    item = make_series("stall").items[0]
    assoc = call(secure, site, site.ct, calling="CT")
    context = assoc.accepted[CT_IMAGE, EXPLICIT_LITTLE]
    assoc.send(b"".join(assoc.fragments(context, command_set(assoc.store_command(item)), command=True)))
    assoc.send(struct.pack(">BBLLBB", 0x04, 0, 10006, 10002, context, 0) + item.data[:5000])
    begin = time.monotonic()
    with contextlib.suppress(Cut):
        while not ended(assoc.sock) and time.monotonic() - begin < PDU_SECONDS + 5:
            if drip:
                assoc.send(b"\0")
            time.sleep(0.1)
    assert time.monotonic() - begin < PDU_SECONDS + 3
    assoc.sock.close()
    assert secure.instance(item.sop_instance_uid) is None


# One receiver with small limits


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    running = Node(
        tmp_path_factory.mktemp("attacked"),
        peers=[{"name": "asker", "ae_title": "ASKER", "allow": ["echo", "find"]}],
        dimse={"workers": 1, "max_object_mb": 4, "pdu_seconds": PDU_SECONDS},
    ).start("run", "receiver")
    yield running
    assert running.stop() == 0


def rss(node: Node) -> int:
    return int(psutil.Process(node.pids()["receiver-1"]).memory_info().rss)


def files(node: Node) -> list[Path]:
    return sorted(p for p in node.folder.rglob("*") if p.is_file() and "objects" in p.parts)


ENDLESS: dict[str, tuple[str, str, int]] = {
    "an object": ("CT1", CT_IMAGE, 0x0001),
    "a query": ("ASKER", STUDY_FIND, 0x0020),
    "an echo with a data set": ("CT1", VERIFICATION, 0x0030),
}


@pytest.mark.parametrize("kind", [*ENDLESS, "a command"])
def test_fragments_for_ever_end_at_a_limit(node: Node, kind: str) -> None:
    calling, abstract, field = ENDLESS.get(kind, ("CT1", CT_IMAGE, 0x0001))
    assoc = Association(node.port, calling=calling, contexts=[(abstract, [EXPLICIT_LITTLE])])
    if not assoc.accepted:  # verification is Implicit VR alone
        assoc.sock.close()
        assoc = Association(node.port, calling=calling, contexts=[(abstract, ["1.2.840.10008.1.2"])])
    (context,) = assoc.accepted.values()
    uid = abstract.encode() + b"\0" * (len(abstract) % 2)
    command = [(0x0002, uid), (0x0100, struct.pack("<H", field)), (0x0110, b"\1\0"), (0x0700, b"\0\0")]
    command += [(0x0800, b"\1\0"), (0x1000, b"1.2.826.0.1.9\0")]
    before, stored = rss(node), files(node)
    piece = struct.pack(">BBLLBB", 0x04, 0, 100_006, 100_002, context, 1 if kind == "a command" else 0) + bytes(100_000)
    sent, begin = 0, time.monotonic()
    with contextlib.suppress(Cut):
        if kind != "a command":
            assoc.send(b"".join(assoc.fragments(context, command_set(command), command=True)))
        while time.monotonic() - begin < 20:
            assoc.send(piece)
            sent += 100_000
    assert time.monotonic() - begin < 20, f"{sent} bytes were taken"
    assoc.sock.close()
    assert rss(node) - before < 80 << 20
    node.wait(lambda: files(node) == stored, 10, "nothing of it stays")
    node.wait(lambda: node.events("limit"), 20, "the event is there")


def stores(node: Node, syntax: str, data: bytes) -> int:
    item = Item(CT_IMAGE, "1.2.826.0.1.3680043.9.1", syntax, data)
    with Association(node.port, contexts=contexts_for([item])) as assoc:
        return assoc.store(item)


SEQUENCE = struct.pack("<HH2sHI", 0x0008, 0x1140, b"SQ", 0, 0xFFFFFFFF)
OPEN_ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0xFFFFFFFF)
EMPTY_ITEM = struct.pack("<HHI", 0xFFFE, 0xE000, 0)


def _deflated(size: int) -> bytes:
    squeezer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return squeezer.compress(bytes(size)) + squeezer.flush()


BOMBS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "deflated zeros": (DEFLATED, lambda: _deflated(1 << 30)),
    "nested 200 deep": (EXPLICIT_LITTLE, lambda: (SEQUENCE + OPEN_ITEM) * 200),
    "nested 20,000 deep": (EXPLICIT_LITTLE, lambda: (SEQUENCE + OPEN_ITEM) * 20_000),
    "empty items": (EXPLICIT_LITTLE, lambda: SEQUENCE + EMPTY_ITEM * 450_000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_answered_at_once_and_cost_little(node: Node, name: str) -> None:
    syntax, make = BOMBS[name]
    data = make()
    assert len(data) < 4 << 20
    before, begin = rss(node), time.monotonic()
    assert stores(node, syntax, data) == 0xC000
    assert time.monotonic() - begin < 5
    assert rss(node) - before < 200 << 20
    with Association(node.port) as assoc:
        assert assoc.echo() == 0x0000


@pytest.mark.parametrize("where", ["command", "data set", "both"])
def test_a_uid_of_64_kilobytes(node: Node, where: str) -> None:
    long = b"1." + b"2" * 65_000
    item = make_series("uid").items[0]
    start = item.data.index(b"\x08\x00\x18\x00UI")
    size = int.from_bytes(item.data[start + 6 : start + 8], "little")
    data = item.data[: start + 6] + len(long).to_bytes(2, "little") + long + item.data[start + 8 + size :]
    changed = Item(
        item.sop_class_uid, item.sop_instance_uid, EXPLICIT_LITTLE, item.data if where == "command" else data
    )
    before = files(node)
    with contextlib.suppress(Cut), Association(node.port) as assoc:
        assert assoc.store(changed, uid=item.sop_instance_uid if where == "data set" else long) in (0xA900, 0xC000)
    assert files(node) == before


@pytest.mark.parametrize(
    "title", ["../../../../tmp", "/etc/passwd", "..%2e/%2e%2e", "CT1\0/../x", "a" * 16, "*", "' OR 1=1--"]
)
def test_ae_titles_are_no_paths_and_open_nothing(node: Node, title: str) -> None:
    for called, calling in (("DICOMNODE", title), (title, "CT1")):
        with pytest.raises((Rejected, Cut)):
            Association(node.port, called=called[:16], calling=calling[:16])
    with Association(node.port) as assoc:
        assert assoc.echo() == 0x0000


@pytest.mark.parametrize("value", ["../../../../tmp/x", "/etc/passwd", "..%2e%2f", "x\\..\\y", "' OR 1=1--", "a\r\nb"])
def test_what_a_patient_id_holds_is_no_path(node: Node, value: str) -> None:
    """It is stored as it came, under a name that is the node's own."""
    series = make_series("path", PatientID=value, StudyID=value[:16], slices=2)
    assert send_items(node.port, series.items[:1]) == [0x0000]
    row = node.wait(lambda: node.instance(series.items[0].sop_instance_uid), 10, "the row is there")
    assert re.fullmatch(r"[0-9a-f]{2}/[0-9a-f]{32}\.dcm", row["file"])
    outside = {p.relative_to(node.folder).parts[0] for p in node.folder.rglob("*")}
    assert outside <= {"data", "node.toml", "node.log"}


@pytest.mark.parametrize("magic", [b"MZ\x90\0", b"\x7fELF\2\1\1", b"#!/bin/sh\n"])
def test_a_polyglot_preamble_is_not_kept_and_files_are_not_programs(node: Node, tmp_path: Path, magic: bytes) -> None:
    series = make_series("polyglot", slices=2)
    (path, *_) = series.write(tmp_path)
    data = path.read_bytes()
    path.write_bytes(magic + data[len(magic) :])
    done = run_program("storescu", "-aet", "CT1", "-aec", "DICOMNODE", "127.0.0.1", node.port, path)
    assert done.returncode == 0, done.stderr
    row = node.wait(lambda: node.instance(series.items[0].sop_instance_uid), 10, "the row is there")
    stored = node.data_dir / "objects" / row["file"]
    assert stored.read_bytes()[:132] == bytes(128) + b"DICM"
    assert stat.S_IMODE(stored.stat().st_mode) == 0o600


# A whole node


def test_pixel_bombs_are_jobs_that_are_refused(tmp_path: Path) -> None:
    """Numbers are compared before anything is decoded; the next series is analysed."""
    node = Node(
        tmp_path / "bombs",
        rules=[rule("any", {"Modality": "CT"})],
        dimse={"workers": 1},
        completeness={"quiet_seconds": 1},
    ).start()
    bombs = []
    for tags in ({"Rows": 65535, "Columns": 65535}, {"NumberOfFrames": 2**31 - 1}, {"Rows": 65535, "Columns": 1}):
        series = make_series("bomb", slices=8, **tags)
        bombs.append(series)
        assert set(send_items(node.port, series.items)) == {0x0000}
    for series in bombs:
        job = node.wait_job(series.series_uid, state="refused")
        assert job["last_error"]
    assert max(p.memory_info().rss for p in node.family()) < 2 << 30
    fine = make_series("fine")
    assert set(send_items(node.port, fine.items)) == {0x0000}
    node.wait_job(fine.series_uid)
    assert node.stop() == 0
