"""The PACS of the demo: Orthanc or DCMTK's storescp where installed, else one of our own."""

from __future__ import annotations

import http.client
import json
import os
import shutil
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import pydicom

from dicomnode.demo.launch import LOOPBACK, Program, accepts, free_port, wait_until
from dicomnode.errors import NodeError, OperatorError

AE_TITLE = "PACS"
CHOICE = "DICOMNODE_DEMO_PACS"
"""Environment variable that names the PACS to use: orthanc, storescp or own."""
START_SECONDS = 30.0


class Pacs(Protocol):
    """A DICOM archive on loopback.

    ``name`` is for people, ``address`` a web address for people or empty, ``folder`` where
    its files lie.
    """

    name: str
    port: int
    address: str
    folder: Path

    def start(self) -> None: ...

    def objects(self) -> Mapping[str, bytes]:
        """Everything that it has: SOPInstanceUID -> Part 10 file."""
        ...

    def check(self) -> None:
        """Raises when it does not run any more."""
        ...

    def stop(self) -> None: ...


def make_pacs(folder: Path, node_port: int, *, prefer_known_ports: bool) -> Pacs:
    """The best PACS that this machine has; ``DICOMNODE_DEMO_PACS`` overrides the choice."""
    choices: dict[str, str | None] = {"orthanc": "Orthanc", "storescp": "storescp", "own": None}
    wanted = os.environ.get(CHOICE, "")
    if wanted and wanted not in choices:
        raise OperatorError("choose PACS", f"{CHOICE} is '{wanted}'", f"One of: {', '.join(choices)}")
    for name, program in choices.items():
        if wanted and name != wanted:
            continue
        if program and not shutil.which(program):
            if wanted:
                raise OperatorError("choose PACS", f"{program} is not installed", "apt-get install orthanc dcmtk")
            continue
        port = free_port(4242 if prefer_known_ports else 0)
        folder.mkdir(parents=True, exist_ok=True)
        if name == "orthanc":
            return Orthanc(folder, port, free_port(8042 if prefer_known_ports else 0), node_port)
        return StoreScp(folder, port) if name == "storescp" else OwnPacs(folder, port)
    raise AssertionError("own is always there")


class Orthanc:
    name = "Orthanc"

    def __init__(self, folder: Path, port: int, http_port: int, node_port: int) -> None:
        self.folder, self.port, self._http_port = folder / "storage", port, http_port
        self.address = f"http://{LOOPBACK}:{http_port}/"
        self._program: Program | None = None
        self._log = folder / "orthanc.log"
        self._config = folder / "orthanc.json"
        settings = {
            "Name": "demo PACS",
            "StorageDirectory": str(self.folder),
            "IndexDirectory": str(folder / "index"),
            "DicomPort": port,
            "DicomAet": AE_TITLE,
            "HttpPort": http_port,
            "RemoteAccessAllowed": False,
            "AuthenticationEnabled": False,
            "DicomCheckCalledAet": False,
            "DicomAlwaysAllowEcho": True,
            "DicomAlwaysAllowStore": True,
            "DicomAlwaysAllowFind": True,
            "DicomAlwaysAllowGet": True,
            "DicomAlwaysAllowMove": True,
            "Plugins": [],
            "DicomModalities": {"node": ["DICOMNODE", LOOPBACK, node_port]},
        }
        self._config.write_text(json.dumps(settings, indent=2))

    def start(self) -> None:
        self._program = Program(self.name, ["Orthanc", str(self._config)], self._log)
        wait_until(
            lambda: accepts(self.port) and accepts(self._http_port), START_SECONDS, "start Orthanc", self._program
        )

    def objects(self) -> Mapping[str, bytes]:
        found = {}
        for item in json.loads(self._get("/instances?expand")):
            found[str(item["MainDicomTags"]["SOPInstanceUID"])] = self._get(f"/instances/{item['ID']}/file")
        return found

    def _get(self, path: str) -> bytes:
        connection = http.client.HTTPConnection(LOOPBACK, self._http_port, timeout=30.0)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            body = answer.read()
        except OSError as error:
            raise NodeError("ask Orthanc", f"no answer: {error.strerror}", f"See {self._log}") from None
        finally:
            connection.close()
        if answer.status != http.client.OK:
            raise NodeError("ask Orthanc", f"it answered {answer.status}", f"See {self._log}")
        return body

    def check(self) -> None:
        if self._program is not None:
            self._program.check()

    def stop(self) -> None:
        if self._program is not None:
            self._program.stop()


def read_folder(folder: Path) -> Mapping[str, bytes]:
    """SOPInstanceUID -> Part 10 file of all files in a folder."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith(".")):
        data = path.read_bytes()
        uid = pydicom.dcmread(BytesIO(data), specific_tags=["SOPInstanceUID"]).SOPInstanceUID
        found[str(uid)] = data
    return found


class StoreScp:
    name = "DCMTK storescp"
    address = ""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder / "storage", port
        self._log = folder / "storescp.log"
        self._program: Program | None = None

    def start(self) -> None:
        self.folder.mkdir(exist_ok=True)
        # +B keeps the bytes as received; without TCP_NODELAY each answer waits 40 ms.
        argv = ["env", "TCP_NODELAY=1", "storescp", "--fork", "-aet", AE_TITLE, "+xa", "+B"]
        self._program = Program(self.name, [*argv, "-od", str(self.folder), str(self.port)], self._log)
        wait_until(lambda: accepts(self.port), START_SECONDS, "start storescp", self._program)

    def objects(self) -> Mapping[str, bytes]:
        return read_folder(self.folder)

    def check(self) -> None:
        if self._program is not None:
            self._program.check()

    def stop(self) -> None:
        if self._program is not None:
            self._program.stop()


class OwnPacs:
    """Stores what it is sent, on pynetdicom, in threads of the demo's own process."""

    name = "a PACS of our own (pynetdicom)"
    address = ""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder, self.port = folder / "storage", port
        self._server: Any = None

    def start(self) -> None:
        from pynetdicom import AE, AllStoragePresentationContexts, evt
        from pynetdicom.sop_class import Verification

        self.folder.mkdir(exist_ok=True)
        ae = AE(ae_title=AE_TITLE)
        for context in AllStoragePresentationContexts:
            ae.add_supported_context(context.abstract_syntax)
        ae.add_supported_context(Verification)
        try:
            self._server = ae.start_server(
                (LOOPBACK, self.port), block=False, evt_handlers=[(evt.EVT_C_STORE, self._store)]
            )
        except OSError as error:
            raise OperatorError(
                "start the PACS", f"port {self.port}: {error.strerror}", "Start the demo again"
            ) from None

    def _store(self, event: Any) -> int:
        """Write the object and answer success (PS3.7 9.1.1); what fails answers 0xA700."""
        uid = str(event.request.AffectedSOPInstanceUID)
        if not pydicom.uid.UID(uid).is_valid:
            return 0xA900
        temporary = self.folder / f".{uid}"
        try:
            temporary.write_bytes(event.encoded_dataset())
            temporary.rename(self.folder / f"{uid}.dcm")
        except OSError:
            return 0xA700
        return 0x0000

    def objects(self) -> Mapping[str, bytes]:
        return read_folder(self.folder)

    def check(self) -> None:
        """It runs in this process."""

    def stop(self) -> None:
        if self._server is not None:
            self._server.shutdown()
            self._server = None
