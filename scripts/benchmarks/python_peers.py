"""Peers in processes of their own, so that no interpreter lock is shared with the bench.

    python -m benchmarks.python_peers scp PORT FOLDER      stock pynetdicom acceptor, no fsync
    python -m benchmarks.python_peers scu PORT FOLDER      stock pynetdicom sender
    python -m benchmarks.python_peers library PORT FOLDER  dicomnode.deliver as a library
    python -m benchmarks.python_peers raw PORT FOLDER      the limit: bytes, file, fdatasync

Senders print their seconds for headers and for sending, without the interpreter's start, as JSON.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LENGTH_BYTES = 8
MOST_ASSOCIATIONS = 300


def serve_stock(port: int, folder: Path) -> None:
    """As pynetdicom's documentation shows it; only the number of associations is raised."""
    from pynetdicom import AE, AllStoragePresentationContexts, evt
    from pynetdicom.sop_class import Verification

    def store(event: Any) -> int:
        (folder / f"{event.request.AffectedSOPInstanceUID}.dcm").write_bytes(event.encoded_dataset())
        return 0x0000

    ae = AE(ae_title="PACS")
    ae.supported_contexts = AllStoragePresentationContexts
    ae.add_supported_context(Verification)
    ae.maximum_associations = MOST_ASSOCIATIONS
    ae.network_timeout = 600
    ae.start_server(("127.0.0.1", port), block=True, evt_handlers=[(evt.EVT_C_STORE, store)])


def send_stock(port: int, files: Sequence[Path]) -> dict[str, float]:
    from pydicom import dcmread
    from pynetdicom import AE
    from pynetdicom.presentation import build_context

    begin = time.perf_counter()
    metas = [dcmread(f, specific_tags=[], stop_before_pixels=True).file_meta for f in files]
    pairs = dict.fromkeys((m.MediaStorageSOPClassUID, m.TransferSyntaxUID) for m in metas)
    scanned = time.perf_counter()
    ae = AE(ae_title="BENCH")
    ae.requested_contexts = [build_context(*pair) for pair in pairs]
    assoc = ae.associate("127.0.0.1", port, ae_title="PACS")
    if not assoc.is_established:
        raise SystemExit("no association")
    for path in files:
        status = assoc.send_c_store(dcmread(path))
        if "Status" not in status or status.Status != 0x0000:
            raise SystemExit("an object was not stored")
    assoc.release()
    return {"scan_s": scanned - begin, "send_s": time.perf_counter() - scanned}


def send_library(port: int, folder: Path) -> dict[str, float]:
    from dicomnode.deliver.files import find_files, send_files
    from dicomnode.settings import Delivery, Peer

    begin = time.perf_counter()
    files, _ = find_files([folder])
    scanned = time.perf_counter()
    peer = Peer(name="pacs", ae_title="PACS", host="127.0.0.1", port=port)
    outcomes = send_files("BENCH", peer, Delivery(), files)
    sent = time.perf_counter()
    if any(o.sent != "stored" for o in outcomes):
        raise SystemExit("an object was not stored")
    return {"scan_s": scanned - begin, "send_s": sent - scanned}


def serve_raw(port: int, folder: Path) -> None:
    """Each object: eight bytes of length, then its bytes; answered with one byte once it is durable."""
    with socket.create_server(("127.0.0.1", port)) as listening:
        for number in range(1_000_000):
            sock, _ = listening.accept()
            threading.Thread(target=_take, args=(sock, folder, number), daemon=True).start()


def _take(sock: socket.socket, folder: Path, connection: int) -> None:
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    view = memoryview(bytearray(1 << 20))
    with sock:
        number = 0
        while len(head := sock.recv(LENGTH_BYTES, socket.MSG_WAITALL)) == LENGTH_BYTES:
            left = int.from_bytes(head, "big")
            fd = os.open(folder / f"{connection}-{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            while left:
                size = sock.recv_into(view[: min(left, len(view))])
                if not size:
                    return
                os.write(fd, view[:size])
                left -= size
            os.fdatasync(fd)
            os.close(fd)
            sock.sendall(b"\x01")
            number += 1


def send_raw(port: int, files: Sequence[Path]) -> float:
    """Seconds for all files over one connection, each waiting for its answer."""
    begin = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for path in files:
            data = path.read_bytes()
            sock.sendall(len(data).to_bytes(LENGTH_BYTES, "big"))
            sock.sendall(data)
            if sock.recv(1) != b"\x01":
                raise OSError("the raw server gave no answer")
    return time.perf_counter() - begin


def main(role: str, port: int, folder: Path) -> None:
    if role == "scp":
        serve_stock(port, folder)
    elif role == "raw":
        serve_raw(port, folder)
    else:
        found = send_stock(port, sorted(folder.iterdir())) if role == "scu" else send_library(port, folder)
        sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
