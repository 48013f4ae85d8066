"""Fixtures: the nodes and peers that several tests share. What is expensive lives for the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import SHARED_DATA, Node, rule
from tests.peers import LIVE, Orthanc, program


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whatever stands on the fixture ``pacs`` needs Orthanc."""
    for item in items:
        if Path(__file__).parent in item.path.parents and "pacs" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.peers)


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind() -> Iterator[None]:
    yield
    for process in list(LIVE):
        process.stop(5)


@pytest.fixture(scope="session")
def pacs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    program("Orthanc")
    peer = Orthanc(tmp_path_factory.mktemp("pacs")).start()
    yield peer
    peer.stop()


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory, pacs: Orthanc) -> Iterator[Node]:
    """A whole node with Orthanc as PACS; rules look at SeriesDescription."""
    running = Node(
        tmp_path_factory.mktemp("node"),
        peers=[
            {"name": "pacs", "ae_title": "PACS", "host": "127.0.0.1", "port": pacs.dicom_port},
            {"name": "second", "ae_title": "PACS2", "host": "127.0.0.1", "port": pacs.dicom_port},
            {"name": "elsewhere", "ae_title": "FAR", "host": "192.0.2.1", "allow": ["echo", "store"]},
            {"name": "echoer", "ae_title": "ECHOER", "allow": ["echo"]},
        ],
        rules=[
            rule("to-pacs", {"Modality": "CT", "SeriesDescription": "pacs*"}, to=["pacs"]),
            rule("quiet", {"Modality": "CT", "SeriesDescription": "local*"}),
            rule("double-a", {"SeriesDescription": "double"}, to=["pacs"], priority="batch"),
            rule("double-b", {"Modality": ["MR", "CT"], "SeriesDescription": "doub*"}, to=["second"], priority="stat"),
            rule("pinned", {"SeriesDescription": "double"}, to=["pacs"], model="ct-lung@1.0.0"),
            rule("stat", {"SeriesDescription": "urgent"}, priority="stat"),
            rule("batch", {"SeriesDescription": "patient"}, priority="batch"),
            rule("list", {"SeriesDescription": "rules", "BodyPartExamined": ["HEAD", "CHEST"]}),
            rule("range", {"SeriesDescription": "ranges", "SliceThickness": {"min": 5, "max": 20}}, to=["pacs"]),
            rule("dates", {"SeriesDescription": "dates", "StudyDate": {"min": "20250101", "max": "20271231"}}),
            rule("no-column", {"SeriesDescription": "columns", "RotationDirection": "cw", "KVP": 120}),
        ],
    ).start()
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def receiver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    """One receiver process alone: enough for what ends at the acknowledgement."""
    running = Node(tmp_path_factory.mktemp("receiver"), dimse={"workers": 1}).start("run", "receiver")
    yield running
    assert running.stop() == 0


@pytest.fixture(scope="session")
def real_ct() -> list[Path]:
    """The real chest CT beside the project, which is not part of it."""
    files = sorted((SHARED_DATA / "ct-chest-ricord").glob("*.dcm"))
    if not files:
        pytest.skip("no real CT: ../shared/data/ct-chest-ricord is absent")
    return files


@pytest.fixture
def shared_data() -> Path:
    if not SHARED_DATA.is_dir():
        pytest.skip("no test data: ../shared/data is absent")
    return SHARED_DATA
