"""Orthanc and DCMTK's dcmqrscp beside a receiver: each stores, moves and gets into the other.

The node is never a query SCU, so C-FIND, C-MOVE and C-GET go one way only; C-STORE and
C-ECHO go both. Orthanc 1.10 has no C-GET SCU (``/modalities/{id}/get`` came later).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.harness import CANARY, Node
from tests.peers import Item, Orthanc, Process, accepts, free_port, item_of, program, run_program, send_items, wait_for
from tests.serve.cases import SERIES_A1, SERIES_C, STUDY_A, STUDY_C, STUDY_D, UIDS, items

pytestmark = pytest.mark.peers
SENT = {item.sop_instance_uid: item for item in items()}
HERE = "127.0.0.1"


class QrScp:
    """DCMTK's central test node with one storage area, which it writes as received."""

    def __init__(self, folder: Path, port: int, peers: dict[str, tuple[str, int]], aet: str = "QRSCP") -> None:
        self.area = folder / "area"
        self.area.mkdir(parents=True)
        self.port, self.aet = port, aet
        lines = [
            f"NetworkTCPPort = {port}",
            "MaxPDUSize = 16384",
            "MaxAssociations = 16",
            "HostTable BEGIN",
            *(f"{name} = ({title}, {HERE}, {number})" for name, (title, number) in peers.items()),
            "HostTable END",
            "VendorTable BEGIN",
            "VendorTable END",
            "AETable BEGIN",
            f"{aet} {self.area} RW (200, 1024mb) ANY",
            "AETable END",
        ]
        config = folder / "dcmqrscp.cfg"
        config.write_text("\n".join(lines) + "\n")
        self._process = Process([program("dcmqrscp"), "+B", "-c", str(config)], folder / "log")
        wait_for(lambda: accepts(port), 10, "dcmqrscp listens", self._process.output)

    def objects(self) -> dict[str, Item]:
        """What it holds, by SOP Instance UID; beside the files lies its index."""
        return {item.sop_instance_uid: item for item in map(item_of, self.area.glob("*.dcm"))}

    def stop(self) -> None:
        self._process.stop(5)


@dataclass
class Ward:
    """A receiver that stores, two archives that know it, and nothing stored yet."""

    node: Node
    orthanc: Orthanc
    archive: QrScp

    def arrived(self, uids: set[str]) -> dict[str, Item]:
        """What the node has of these, once it has all of them."""
        marks = ", ".join("?" * len(uids))
        sql = f"SELECT file FROM instances WHERE SOPInstanceUID IN ({marks})"
        self.node.wait(lambda: len(self.node.rows(sql, sorted(uids))) == len(uids), 20, "the objects are stored")
        files = [self.node.data_dir / "objects" / row["file"] for row in self.node.rows(sql, sorted(uids))]
        return {item.sop_instance_uid: item for item in map(item_of, files)}


@pytest.fixture(scope="module")
def ward(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ward]:
    program("Orthanc")
    program("dcmqrscp")
    pacs_port, archive_port = free_port(), free_port()
    every = ["echo", "store", "find", "move", "get"]
    node = Node(
        tmp_path_factory.mktemp("ward"),
        peers=[
            {"name": "pacs", "ae_title": "PACS", "host": HERE, "port": pacs_port, "allow": every},
            {"name": "qrscp", "ae_title": "QRSCP", "host": HERE, "port": archive_port, "allow": every},
        ],
        dimse={"workers": 1},
    ).start("run", "receiver")
    orthanc = Orthanc(tmp_path_factory.mktemp("orthanc"), node_port=node.port, dicom_port=pacs_port).start()
    archive = QrScp(tmp_path_factory.mktemp("archive"), archive_port, {"node": ("DICOMNODE", node.port)})
    yield Ward(node, orthanc, archive)
    archive.stop()
    orthanc.stop()
    assert node.stop() == 0


def study(*uids: str) -> list[Item]:
    return [SENT[uid] for uid in uids]


def asked(program_name: str, port: int, called: str, *arguments: object) -> str:
    done = run_program(program_name, "-d", "-S", "-aet", "CT1", "-aec", called, *arguments, HERE, port)
    return done.stderr + done.stdout


def of_study(uid: str) -> list[str]:
    return ["-k", "QueryRetrieveLevel=STUDY", "-k", f"StudyInstanceUID={uid}"]


SUCCESS = "DIMSE Status                  : 0x0000: Success"


def test_orthanc_echoes_and_stores_into_the_node(ward: Ward) -> None:
    """Also an RLE image goes over as Orthanc has it."""
    assert ward.orthanc.post("/modalities/node/echo", {}) == {}
    sent = study(UIDS[6], UIDS[7])
    assert set(send_items(ward.orthanc.dicom_port, sent, called="PACS")) == {0x0000}
    ids = [i for found in ward.orthanc.instances(STUDY_D).values() for i in found]
    done = ward.orthanc.post("/modalities/node/store", {"Resources": ids, "Synchronous": True})
    assert (done["InstancesCount"], done["FailedInstancesCount"]) == (2, 0)
    got = ward.arrived({UIDS[6], UIDS[7]})
    assert {uid: item.transfer_syntax_uid for uid, item in got.items()} == {
        item.sop_instance_uid: item.transfer_syntax_uid for item in sent
    }
    assert {uid: item.data for uid, item in got.items()} == {item.sop_instance_uid: item.data for item in sent}


def test_orthanc_moves_into_the_node_and_back_by_series(ward: Ward) -> None:
    """movescu asks Orthanc to send to the node; Orthanc then asks the node for one series."""
    sent = study(*UIDS[:4])
    assert set(send_items(ward.orthanc.dicom_port, sent, called="PACS")) == {0x0000}
    out = asked("movescu", ward.orthanc.dicom_port, "PACS", "-aem", "DICOMNODE", *of_study(STUDY_A))
    assert SUCCESS in out, out
    got = ward.arrived(set(UIDS[:4]))
    assert {uid: item.data for uid, item in got.items()} == {item.sop_instance_uid: item.data for item in sent}
    for ids in ward.orthanc.instances(STUDY_A).values():
        for identifier in ids:
            ward.orthanc.delete(f"/instances/{identifier}")
    asked_for = {"StudyInstanceUID": STUDY_A, "SeriesInstanceUID": SERIES_A1}
    ward.orthanc.post(
        "/modalities/node/move",
        {"Level": "Series", "Resources": [asked_for], "TargetAet": "PACS", "Synchronous": True},
    )
    assert {modality: len(ids) for modality, ids in ward.orthanc.instances(STUDY_A).items()} == {"CT": 3}


@pytest.mark.parametrize(
    ("level", "query", "answer"),
    [
        ("Patient", {"PatientID": "P3"}, ("PatientID", "P3")),
        ("Study", {"PatientID": "P3", "StudyInstanceUID": ""}, ("StudyInstanceUID", STUDY_C)),
        ("Series", {"StudyInstanceUID": STUDY_C, "SeriesInstanceUID": ""}, ("SeriesInstanceUID", SERIES_C)),
        (
            "Instance",
            {"StudyInstanceUID": STUDY_C, "SeriesInstanceUID": SERIES_C, "SOPInstanceUID": ""},
            ("SOPInstanceUID", UIDS[5]),
        ),
    ],
    ids=["patient", "study", "series", "instance"],
)
def test_orthanc_asks_at_every_level(ward: Ward, level: str, query: dict[str, str], answer: tuple[str, str]) -> None:
    assert set(send_items(ward.node.port, study(UIDS[5]))) == {0x0000}
    done = ward.orthanc.post("/modalities/node/query", {"Level": level, "Query": query})
    found = [
        ward.orthanc.get(f"{done['Path']}/answers/{n}/content?simplify")
        for n in ward.orthanc.get(done["Path"] + "/answers")
    ]
    keyword, value = answer
    assert [one[keyword] for one in found] == [value]


def test_the_node_moves_into_dcmqrscp_and_back(ward: Ward, tmp_path: Path) -> None:
    """dcmqrscp as move target keeps every byte; what it holds it finds, gives, and moves to the node again."""
    sent = study(*UIDS[:4])
    assert set(send_items(ward.node.port, sent)) == {0x0000}
    out = asked("movescu", ward.node.port, "DICOMNODE", "-aem", "QRSCP", *of_study(STUDY_A))
    assert SUCCESS not in out  # CT1 may store, and nothing else
    move = ["-aet", "PACS", "-aec", "DICOMNODE", "-aem", "QRSCP", *of_study(STUDY_A), HERE, ward.node.port]
    done = run_program("movescu", "-d", "-S", *move)
    assert SUCCESS in done.stderr + done.stdout, done.stderr
    held = ward.archive.objects()
    assert {uid: item.data for uid, item in held.items() if uid in UIDS[:4]} == {
        item.sop_instance_uid: item.data for item in sent
    }
    got = tmp_path / "got"
    got.mkdir()
    out = asked("getscu", ward.archive.port, "QRSCP", "+B", "-od", got, *of_study(STUDY_A))
    assert {item.sop_instance_uid for item in map(item_of, got.iterdir())} == set(UIDS[:4]), out
    out = asked("movescu", ward.archive.port, "QRSCP", "-aem", "DICOMNODE", *of_study(STUDY_A))
    assert SUCCESS in out, out
    back = ward.node.rows("SELECT peer, sum(instances) AS n FROM associations WHERE peer = 'qrscp' GROUP BY peer")
    assert back, "dcmqrscp opened no association"
    assert ward.node.rows("SELECT count(*) AS n FROM former_instances") == [{"n": 0}]  # the same bytes came back


def test_the_command_line_sends_to_both(ward: Ward, tmp_path: Path) -> None:
    """``dicomnode echo`` and ``dicomnode send`` to Orthanc and dcmqrscp."""
    from pydicom import dcmread

    uid = UIDS[4]
    assert set(send_items(ward.node.port, study(uid))) == {0x0000}
    (row,) = ward.node.rows("SELECT file FROM instances WHERE SOPInstanceUID = ?", (uid,))
    path = ward.node.data_dir / "objects" / row["file"]
    ward.node.cli("echo", "qrscp")
    for peer in ("pacs", "qrscp"):
        ward.node.cli("send", peer, str(path))
    assert ward.archive.objects()[uid].data == SENT[uid].data
    (identifier,) = [i for ids in ward.orthanc.instances(str(dcmread(path).StudyInstanceUID)).values() for i in ids]
    stored = tmp_path / "stored.dcm"
    stored.write_bytes(ward.orthanc.file(identifier))
    assert item_of(stored).data == SENT[uid].data
    assert CANARY.casefold() not in ward.node.log.read_text().casefold()
