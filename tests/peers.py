"""Peers for tests: programs of others, scripted acceptors, and a sender that can attack.

Everything runs on loopback with ports that were free a moment ago and data in a folder of
the test. ``Association`` speaks DICOM's upper layer by itself (PS3.8 9.3), so a test decides
about every byte; it shares no code with the node.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import struct
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pytest

VERIFICATION = "1.2.840.10008.1.1"
CT_IMAGE = "1.2.840.10008.5.1.4.1.1.2"
IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
APPLICATION_CONTEXT = b"1.2.840.10008.3.1.1.1"


def program(name: str) -> str:
    """Path of a program of others; skips the test without it, fails it where CI is true."""
    # Debian's first: pynetdicom puts a storescu of its own into the environment's bin.
    path = shutil.which(name, path="/usr/bin:/usr/local/bin:/usr/sbin:/usr/local/sbin") or shutil.which(name)
    if path:
        return path
    if os.environ.get("CI") == "true":
        pytest.fail(f"{name} is not installed, and CI must have it")
    pytest.skip(f"{name} is not installed")


FIRST_PORT, SHARES = 10240, 8
_chance = random.SystemRandom()  # the other one is seeded anew for each test, alike in all workers
_given: set[int] = set()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that is free and likely stays so until it is wanted, however many tests run beside this one.

    It lies below those that the system gives to callers, and each worker of pytest-xdist has a share of its own.
    """
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range")
    last = int(limits.read_text().split()[0]) if limits.exists() else 32768
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    share = int(worker.removeprefix("gw")) % SHARES if worker else _chance.randrange(SHARES)
    wide = max(last - FIRST_PORT, 8000) // SHARES
    while True:
        port = FIRST_PORT + share * wide + _chance.randrange(wide)
        if port in _given:
            continue
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind((host, port))
            _given.add(port)
            return port


def wait_for(condition: Callable[[], Any], seconds: float, what: str, explain: Callable[[], str] = str) -> Any:
    """First true value of ``condition``; fails the test after ``seconds``."""
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            pytest.fail(f"not within {seconds:g} s: {what}\n{explain()}")
        time.sleep(0.02)


def accepts(port: int, host: str = "127.0.0.1") -> bool:
    try:
        socket.create_connection((host, port), timeout=1).close()
    except OSError:
        return False
    return True


def quiet_environment(**more: str) -> dict[str, str]:
    return {**os.environ, "TCP_NODELAY": "1", **more}


def run_program(name: str, *arguments: object, seconds: float = 120) -> subprocess.CompletedProcess[str]:
    """A program of others to its end; see :func:`program` for when it is missing."""
    return subprocess.run(
        [program(name), *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds,
        env=quiet_environment(),
    )


LIVE: set[Process] = set()
"""What was started and not stopped: a failed test leaves it behind, the session's end stops it."""


class Process:
    """A program in a session of its own, its output in a file; ended with all its children."""

    def __init__(self, argv: Sequence[str], log: Path, **environment: str) -> None:
        self.log = log
        self._file = log.open("ab")
        self.popen = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=subprocess.STDOUT,
            env=quiet_environment(**environment),
            start_new_session=True,
        )
        LIVE.add(self)

    @property
    def running(self) -> bool:
        return self.popen.poll() is None

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def stop(self, seconds: float = 20.0) -> int:
        """SIGTERM, then SIGKILL to the whole session; the exit code."""
        LIVE.discard(self)
        if self.running:
            self.popen.terminate()
        try:
            code = self.popen.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        if code is None:
            code = self.popen.wait()
        self._file.close()
        return code


# Objects to send.


@dataclass(frozen=True, slots=True)
class Item:
    """An instance as it goes over the wire: ``data`` are the bytes of its data set."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    data: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def item_of(path: Path) -> Item:
    """A file as it is: nothing of its data set is parsed when it is a Part 10 file."""
    from pydicom import dcmread
    from pydicom.filereader import read_file_meta_info

    if path.read_bytes()[128:132] != b"DICM":  # a bare data set, implicit VR little endian
        ds = dcmread(path, force=True, stop_before_pixels=True)
        return Item(str(ds.SOPClassUID), str(ds.SOPInstanceUID), IMPLICIT_LITTLE, path.read_bytes())
    meta = read_file_meta_info(path)
    return Item(
        str(meta.MediaStorageSOPClassUID),
        str(meta.MediaStorageSOPInstanceUID),
        str(meta.TransferSyntaxUID),
        data_set_of(path.read_bytes()),
    )


def data_set_of(part10: bytes) -> bytes:
    """What follows group 2 of a Part 10 file (PS3.10 7.1)."""
    assert part10[128:132] == b"DICM"
    assert part10[132:136] == b"\x02\x00\x00\x00"
    return part10[144 + int.from_bytes(part10[140:144], "little") :]


# DICOM's upper layer, by hand.


class Cut(Exception):
    """The connection ended: closed, reset, or A-ABORT (then ``abort`` holds source and reason)."""

    def __init__(self, text: str, abort: tuple[int, int] | None = None) -> None:
        super().__init__(text)
        self.abort = abort


class Rejected(Exception):
    """A-ASSOCIATE-RJ with result, source and reason (PS3.8 9.3.4)."""

    def __init__(self, result: int, source: int, reason: int) -> None:
        super().__init__(f"result {result}, source {source}, reason {reason}")
        self.fields = (result, source, reason)


def _item(kind: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", kind, 0, len(payload)) + payload


def pdu(kind: int, payload: bytes, length: int | None = None) -> bytes:
    """A PDU; ``length`` announces another length than the payload has."""
    return struct.pack(">BBL", kind, 0, len(payload) if length is None else length) + payload


def associate_rq(called: str, calling: str, contexts: Sequence[tuple[str, Sequence[str]]], max_pdu: int) -> bytes:
    """A-ASSOCIATE-RQ with odd context ids in order (PS3.8 9.3.2)."""
    body = struct.pack(">HH", 1, 0) + called.encode().ljust(16)[:16] + calling.encode().ljust(16)[:16] + bytes(32)
    body += _item(0x10, APPLICATION_CONTEXT)
    for number, (abstract, syntaxes) in enumerate(contexts):
        inner = bytes((2 * number + 1, 0, 0, 0)) + _item(0x30, abstract.encode())
        body += _item(0x20, inner + b"".join(_item(0x40, s.encode()) for s in syntaxes))
    user = _item(0x51, struct.pack(">L", max_pdu)) + _item(0x52, b"2.25.1234567") + _item(0x55, b"TESTPEER")
    return pdu(0x01, body + _item(0x50, user))


def command_set(elements: Iterable[tuple[int, bytes]]) -> bytes:
    """Group 0000, implicit VR little endian, with its length."""
    body = b"".join(struct.pack("<HHL", 0, tag, len(value)) + value for tag, value in elements)
    return struct.pack("<HHLL", 0, 0, 4, len(body)) + body


def _padded(uid: str | bytes) -> bytes:
    raw = uid if isinstance(uid, bytes) else uid.encode()
    return raw + b"\0" * (len(raw) % 2)


class Association:
    """An association as requestor; blocking, one message at a time."""

    def __init__(
        self,
        port: int,
        *,
        called: str = "DICOMNODE",
        calling: str = "CT1",
        contexts: Sequence[tuple[str, Sequence[str]]] = (
            (VERIFICATION, [IMPLICIT_LITTLE]),
            (CT_IMAGE, [EXPLICIT_LITTLE]),
        ),
        host: str = "127.0.0.1",
        source: str = "127.0.0.1",
        timeout: float = 20.0,
        secure: Callable[[socket.socket], socket.socket] | None = None,
        max_pdu: int = 131072,
    ) -> None:
        self.longest_pdu = 0
        """Of the P-DATA that was read, bytes of its length field."""
        self.peer_max_pdu = 16384
        self._message = 0
        self.accepted: dict[tuple[str, str], int] = {}
        try:
            self.sock = socket.create_connection((host, port), timeout=timeout, source_address=(source, 0))
        except OSError as error:
            raise Cut(f"connect: {error}") from error
        try:
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if secure is not None:
                self.sock = secure(self.sock)
            self.send(associate_rq(called, calling, contexts, max_pdu))
            kind, payload = self.read_pdu()
            if kind == 0x03:
                raise Rejected(payload[1], payload[2], payload[3])
            if kind != 0x02:
                raise Cut(f"PDU type {kind} instead of an answer")
            self._accept(payload, contexts)
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.release()
        else:
            self.sock.close()

    def _accept(self, payload: bytes, contexts: Sequence[tuple[str, Sequence[str]]]) -> None:
        position = 68
        while position + 4 <= len(payload):
            kind, _, length = struct.unpack_from(">BBH", payload, position)
            value = payload[position + 4 : position + 4 + length]
            if kind == 0x21 and value[2] == 0:
                syntax = value[8 : 8 + int.from_bytes(value[6:8], "big")].rstrip(b"\0").decode()
                self.accepted[contexts[value[0] // 2][0], syntax] = value[0]
            elif kind == 0x50:
                self.peer_max_pdu = int.from_bytes(value[4:8], "big") or 131072
            position += 4 + length

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError as error:
            raise Cut(f"send: {error}") from error

    def _read(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            try:
                part = self.sock.recv(count - len(data))
            except OSError as error:
                raise Cut(f"receive: {error}") from error
            if not part:
                raise Cut("closed by the peer")
            data += part
        return data

    def read_pdu(self) -> tuple[int, bytes]:
        kind, _, length = struct.unpack(">BBL", self._read(6))
        payload = self._read(length)
        if kind == 0x04:
            self.longest_pdu = max(self.longest_pdu, length)
        if kind == 0x07:
            raise Cut("A-ABORT", (payload[2], payload[3]))
        return kind, payload

    def fragments(self, context: int, data: bytes, *, command: bool) -> Iterator[bytes]:
        """P-DATA-TF PDUs with one fragment each (PS3.8 9.3.5, annex E)."""
        step = self.peer_max_pdu - 6
        for start in range(0, max(len(data), 1), step):
            part = data[start : start + step]
            last = start + step >= len(data)
            header = (1 if command else 0) | (2 if last else 0)
            yield pdu(0x04, struct.pack(">LBB", len(part) + 2, context, header) + part)

    def request(self, context: int, elements: Iterable[tuple[int, bytes]], data: bytes | None) -> None:
        out = b"".join(self.fragments(context, command_set(elements), command=True))
        if data is not None:
            out += b"".join(self.fragments(context, data, command=False))
        self.send(out)

    def response(self) -> int:
        """Status (0000,0900) of the next response."""
        command = b""
        while True:
            kind, payload = self.read_pdu()
            if kind != 0x04:
                raise Cut(f"PDU type {kind} instead of a response")
            position = 0
            while position < len(payload):
                length = int.from_bytes(payload[position : position + 4], "big")
                header = payload[position + 5]
                command += payload[position + 6 : position + 4 + length]
                position += 4 + length
                if header & 2:
                    return self._status(command)

    def data_set(self) -> bytes:
        """The data set that follows a response, whose fragments come in PDUs of their own."""
        data = b""
        while True:
            kind, payload = self.read_pdu()
            if kind != 0x04:
                raise Cut(f"PDU type {kind} instead of a data set")
            data += payload[6:]
            if payload[5] & 2:
                return data

    @staticmethod
    def _status(command: bytes) -> int:
        position = 0
        while position < len(command):
            _, tag, length = struct.unpack_from("<HHL", command, position)
            if tag == 0x0900:
                return int.from_bytes(command[position + 8 : position + 8 + length], "little")
            position += 8 + length
        raise Cut("a response without status")

    def echo(self) -> int:
        context = self.accepted[VERIFICATION, IMPLICIT_LITTLE]
        self._message += 1
        self.request(
            context,
            [
                (0x0002, _padded(VERIFICATION)),
                (0x0100, b"\x30\x00"),
                (0x0110, struct.pack("<H", self._message)),
                (0x0800, b"\x01\x01"),
            ],
            None,
        )
        return self.response()

    def store(self, item: Item, *, uid: str | bytes | None = None) -> int:
        """C-STORE; ``uid`` replaces the SOP Instance UID of the command alone."""
        context = self.accepted[item.sop_class_uid, item.transfer_syntax_uid]
        self.request(context, self.store_command(item, uid), item.data)
        return self.response()

    def store_command(self, item: Item, uid: str | bytes | None = None) -> list[tuple[int, bytes]]:
        self._message = self._message % 65535 + 1
        return [
            (0x0002, _padded(item.sop_class_uid)),
            (0x0100, b"\x01\x00"),
            (0x0110, struct.pack("<H", self._message)),
            (0x0700, b"\x00\x00"),
            (0x0800, b"\x01\x00"),
            (0x1000, _padded(item.sop_instance_uid if uid is None else uid)),
        ]

    def release(self) -> None:
        try:
            self.send(pdu(0x05, bytes(4)))
            kind, _ = self.read_pdu()
            assert kind == 0x06, f"PDU type {kind} in answer to A-RELEASE-RQ"
        finally:
            self.sock.close()

    def abort(self) -> None:
        """A-ABORT by the service user, then close."""
        with contextlib.suppress(Cut):
            self.send(pdu(0x07, bytes(4)))
        self.sock.close()

    def drop(self) -> None:
        """Reset the connection without a word."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def contexts_for(items: Iterable[Item]) -> list[tuple[str, list[str]]]:
    pairs = dict.fromkeys((i.sop_class_uid, i.transfer_syntax_uid) for i in items)
    return [(VERIFICATION, [IMPLICIT_LITTLE]), *((c, [s]) for c, s in pairs)]


def send_items(port: int, items: Sequence[Item], **kwargs: Any) -> list[int]:
    """All items on one association that is released; their statuses."""
    with Association(port, contexts=contexts_for(items), **kwargs) as assoc:
        return [assoc.store(item) for item in items]


@dataclass
class Ledger:
    """What the sender saw acknowledged, kept outside the node.

    ``acknowledged`` maps SOP Instance UID to the SHA-256 of the data set of each 0x0000.
    A cut connection is made anew and the sender goes on with what has no acknowledgement.
    """

    port: int
    acknowledged: dict[str, str] = field(default_factory=dict)
    cuts: int = 0
    other: list[int] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def send(self, items: Sequence[Item], *, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while waiting := [i for i in items if i.sop_instance_uid not in self.acknowledged]:
            assert time.monotonic() < deadline, f"{len(waiting)} objects were not acknowledged in {seconds:g} s"
            try:
                with Association(self.port, contexts=contexts_for(items), timeout=30) as assoc:
                    for item in waiting:
                        self._note(item, assoc.store(item))
            except (Cut, AssertionError):
                self.cuts += 1
                time.sleep(0.05)

    def _note(self, item: Item, status: int) -> None:
        with self.changed:
            if status == 0x0000:
                self.acknowledged[item.sop_instance_uid] = item.sha256
            else:
                self.other.append(status)
            self.changed.notify_all()

    def wait_acknowledged(self, count: int, seconds: float = 60.0) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.acknowledged) >= count, seconds)


# Peers that accept.


class Orthanc:
    """Orthanc as PACS, with its REST interface."""

    def __init__(
        self, folder: Path, *, aet: str = "PACS", node_port: int = 0, dicom_port: int = 0, **more: Any
    ) -> None:
        self.aet = aet
        self.dicom_port = dicom_port or free_port()
        self.http_port = free_port()
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        config = {
            "Name": "test",
            "StorageDirectory": str(folder / "storage"),
            "IndexDirectory": str(folder / "index"),
            "DicomPort": self.dicom_port,
            "DicomAet": aet,
            "HttpPort": self.http_port,
            "RemoteAccessAllowed": False,
            "DicomCheckCalledAet": False,
            "DicomAlwaysAllowEcho": True,
            "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowGet": True,
            "DicomAlwaysAllowMove": True,
            "AuthenticationEnabled": False,
            "Plugins": [],
            "DicomModalities": {"node": ["DICOMNODE", "127.0.0.1", node_port]} if node_port else {},
            **more,
        }
        self._config = folder / "orthanc.json"
        self._config.write_text(json.dumps(config))
        self._process: Process | None = None

    def start(self) -> Self:
        self._process = Process([program("Orthanc"), str(self._config)], self._folder / "orthanc.log")
        wait_for(
            lambda: accepts(self.http_port) and accepts(self.dicom_port), 30, "Orthanc is up", self._process.output
        )
        return self

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
            self._process = None

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.http_port}{path}", timeout=30) as answer:
            return json.load(answer)

    def post(self, path: str, body: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.http_port}{path}", data=json.dumps(body).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def delete(self, path: str) -> None:
        request = urllib.request.Request(f"http://127.0.0.1:{self.http_port}{path}", method="DELETE")
        with urllib.request.urlopen(request, timeout=30):
            pass

    def file(self, identifier: str) -> bytes:
        url = f"http://127.0.0.1:{self.http_port}/instances/{identifier}/file"
        with urllib.request.urlopen(url, timeout=60) as answer:
            return bytes(answer.read())

    def instances(self, study_uid: str) -> dict[str, list[str]]:
        """Modality -> Orthanc's ids of the instances of one study."""
        found: dict[str, list[str]] = {}
        series = self.post("/tools/find", {"Level": "Series", "Expand": True, "Query": {"StudyInstanceUID": study_uid}})
        for one in series:
            found.setdefault(one["MainDicomTags"].get("Modality", ""), []).extend(one["Instances"])
        return found


class StoreScp:
    """DCMTK's storescp; ``faults`` are its options such as ``--abort-after``."""

    def __init__(self, folder: Path, *faults: str, port: int = 0, aet: str = "PACS") -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.port = port or free_port()
        argv = [program("storescp"), "--fork", "-aet", aet, "+xa", *faults, "-od", str(folder), str(self.port)]
        self._process = Process(argv, folder.with_suffix(".log"))
        wait_for(lambda: accepts(self.port), 10, "storescp listens", self._process.output)

    def files(self) -> list[Path]:
        return sorted(p for p in self.folder.iterdir() if p.is_file())

    def stop(self) -> None:
        self._process.stop(5)


class ScriptedScp:
    """A storage SCP whose script decides about each C-STORE.

    ``script(number, uid)`` returns a status, or None to store and then abort without an
    answer. ``stored`` lists what was kept, by UID, with the number of times that it came.
    """

    def __init__(self, script: Callable[[int, str], int | None], *, port: int = 0) -> None:
        from pynetdicom import AE, AllStoragePresentationContexts, evt

        self.stored: dict[str, list[bytes]] = {}
        self.order: list[tuple[str, str]] = []
        self._script = script
        self._count = 0
        ae = AE(ae_title="PACS")
        ae.supported_contexts = AllStoragePresentationContexts
        for context in ae.supported_contexts:
            context.transfer_syntax = [*context.transfer_syntax, "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.1.99"]
        self.port = port or free_port()
        self._server = ae.start_server(
            ("127.0.0.1", self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
        )

    def _store(self, event: Any) -> int:
        uid = str(event.request.AffectedSOPInstanceUID)
        self._count += 1
        status = self._script(self._count, uid)
        if status in (None, 0x0000):
            self.stored.setdefault(uid, []).append(event.request.DataSet.getvalue())
            self.order.append((str(event.request.AffectedSOPClassUID), uid))
        if status is None:
            event.assoc.abort(block=False)
            return 0x0000
        return status

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


class SlowLink:
    """A TCP forwarder of limited bandwidth, so that a transfer takes long enough to be cut.

    ``bytes_per_second`` towards the target, for connections made from then on; answers are
    held back for ``answer_seconds``.
    """

    def __init__(self, target_port: int, *, bytes_per_second: int = 400_000, answer_seconds: float = 0.05) -> None:
        self._target = target_port
        self.bytes_per_second = bytes_per_second
        self._answer = answer_seconds
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.settimeout(0.2)
        self.port = int(self._listening.getsockname()[1])
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                inner, _ = self._listening.accept()
            except TimeoutError:
                continue
            except OSError:
                return
            try:
                outer = socket.create_connection(("127.0.0.1", self._target), timeout=5)
            except OSError:
                inner.close()
                continue
            inner.settimeout(60)
            outer.settimeout(60)
            chunk = max(4096, self.bytes_per_second // 100)
            pause = chunk / self.bytes_per_second
            threading.Thread(target=self._pump, args=(inner, outer, chunk, pause), daemon=True).start()
            threading.Thread(target=self._pump, args=(outer, inner, 65536, self._answer), daemon=True).start()

    def _pump(self, source: socket.socket, target: socket.socket, chunk: int, pause: float) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(chunk):
                if self._stop.wait(pause):
                    break
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        source.close()

    def stop(self) -> None:
        self._stop.set()
        self._listening.close()
        self._thread.join(5)
